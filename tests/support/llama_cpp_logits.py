"""What llama.cpp (xllamacpp's server) makes of a GGUF, with or without a GGUF adapter.

A process of its own, as in llama_cpp.py. Its cache and attention are kept in f32.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

_LETTER = 40  # some printable token that it is made to choose; see tiny_judge.py


@dataclass(frozen=True)
class LlamaCpp:
    """One model, perhaps with an adapter, that llama.cpp runs."""

    model: Path
    adapter: Path | None = None

    def continuations(self, prompts: list[list[int]], n_tokens: int) -> list[list[int]]:
        """The greedy continuation of each prompt, no token that would end it allowed."""
        return self._ask([{"prompt": ids, "n_tokens": n_tokens} for ids in prompts])

    def log_probabilities(
        self, prompts: list[list[int]], n_likeliest: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """After each prompt: ids and log-probabilities of the likeliest tokens."""
        answers = self._ask([{"prompt": ids, "n_likeliest": n_likeliest} for ids in prompts])
        return [(np.array(ids), np.array(values)) for ids, values in answers]

    def _ask(self, requests: list[dict[str, object]]) -> list:
        asked = {
            "model": str(self.model),
            "adapter": str(self.adapter) if self.adapter else None,
            "requests": requests,
        }
        done = subprocess.run(
            [sys.executable, __file__],
            input=json.dumps(asked).encode(),
            capture_output=True,
            timeout=600,
        )
        if done.returncode != 0:
            raise RuntimeError(f"llama.cpp failed on {self}: {done.stderr.decode()[-2000:]}")
        answer: list = json.loads(done.stdout.splitlines()[-1])
        return answer


_KEPT: list[Any] = []  # servers until the process ends, see llama_cpp.py


def _serve(model: str, adapter: str | None, requests: list[dict]) -> list:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    if adapter:
        parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0)]
    parameters.n_ctx = 256
    parameters.n_parallel = 1
    parameters.port = 0
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = 1  # two that wait for a busy core spin
    parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    _KEPT.append(server)
    connection = http.client.HTTPConnection(urlsplit(server.listening_address).netloc)

    def complete(body: dict) -> dict:
        connection.request(
            "POST", "/completion", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        answer: dict = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(str(answer))
        return answer

    answers = []
    for request in requests:
        body = {"prompt": request["prompt"], "cache_prompt": False, "temperature": -1.0}
        if "n_tokens" in request:
            body |= {"n_predict": request["n_tokens"], "return_tokens": True, "ignore_eos": True}
            answers.append(complete(body)["tokens"])
        else:
            body |= {"n_predict": 1, "n_probs": request["n_likeliest"]}
            body |= {"logit_bias": [[_LETTER, 1000.0]]}
            (step,) = complete(body)["completion_probabilities"]
            entries = step["top_logprobs"]
            answers.append([[e["id"] for e in entries], [e["logprob"] for e in entries]])
    return answers


if __name__ == "__main__":
    print(json.dumps(_serve(**json.load(sys.stdin))), flush=True)
    os._exit(0)
