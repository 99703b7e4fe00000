"""Token ids from llama.cpp itself (xllamacpp's server), for texts or for what a GGUF tokenizes.

    python tests/support/llama_cpp.py MODEL.gguf < texts.json > ids.json

A process of its own: a second server in one process has crashed, and its threads don't end.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit


def llama_cpp_ids(
    model: Path, texts: Sequence[str], *, add_special: bool = False
) -> list[list[int]]:
    """The ids that llama.cpp gives for each text, special tokens in it parsed.

    Args:
        model: a GGUF that llama.cpp can load: its weights may be tiny, but must be there.
        texts: any texts.
        add_special: BOS and EOS where the model wants them.
    """
    asked = json.dumps({"texts": list(texts), "add_special": add_special})
    done = subprocess.run(
        [sys.executable, __file__, str(model)],
        input=asked.encode(),
        capture_output=True,
        timeout=600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp failed on {model}: {done.stderr.decode()[-2000:]}")
    answer: list[list[int]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _serve(model: str, asked: dict[str, object]) -> list[list[int]]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = 64
    parameters.port = 0
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    connection = http.client.HTTPConnection(urlsplit(server.listening_address).netloc)
    answers = []
    for text in asked["texts"]:  # type: ignore[attr-defined]
        body = {"content": text, "add_special": asked["add_special"], "parse_special": True}
        connection.request(
            "POST", "/tokenize", json.dumps(body), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        answer = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"{text[:80]!r}: {answer}")
        answers.append(answer["tokens"])
    return answers


if __name__ == "__main__":
    print(json.dumps(_serve(sys.argv[1], json.load(sys.stdin))), flush=True)
    os._exit(0)
