"""Token ids and rendered chats from llama.cpp itself (xllamacpp's server).

    python tests/support/llama_cpp.py MODEL.gguf < asked.json > answers.json

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
from typing import Any
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
    bodies = [
        {"content": text, "add_special": add_special, "parse_special": True} for text in texts
    ]
    answers = _answers(model, {"path": "/tokenize", "bodies": bodies})
    for text, answer in zip(texts, answers, strict=True):
        if "tokens" not in answer:
            raise RuntimeError(f"{text[:80]!r}: {answer}")
    return [answer["tokens"] for answer in answers]


def llama_cpp_prompts(
    model: Path, bodies: Sequence[dict[str, Any]], *, template: str | None = None
) -> list[str | None]:
    """What llama.cpp renders with --jinja, up to where the assistant's answer begins.

    Args:
        model: a GGUF that llama.cpp can load.
        bodies: of /apply-template: messages, and tools or chat_template_kwargs.
        template: in place of the GGUF's own.

    Returns:
        the prompts, without the BOS that a template writes; None where it refuses the messages.
    """
    asked = {"path": "/apply-template", "bodies": list(bodies), "template": template}
    return [answer.get("prompt") for answer in _answers(model, asked)]


def _answers(model: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, __file__, str(model)],
        input=json.dumps(asked).encode(),
        capture_output=True,
        timeout=600,
    )
    if done.returncode != 0:
        raise RuntimeError(f"llama.cpp failed on {model}: {done.stderr.decode()[-2000:]}")
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


# Servers until the process ends: now and then one never comes back from its destructor, which joins
# a thread that still waits for what else a connection brings.
_KEPT: list[Any] = []


def _serve(model: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.n_ctx = 64
    parameters.port = 0
    parameters.warmup = False
    parameters.verbosity = 0
    parameters.n_gpu_layers = 0
    parameters.cpuparams.n_threads = 1
    if asked["path"] == "/apply-template":
        parameters.use_jinja = True
        if asked["template"] is not None:
            parameters.chat_template = asked["template"]
    server = xllamacpp.Server(parameters)
    _KEPT.append(server)
    connection = http.client.HTTPConnection(urlsplit(server.listening_address).netloc)
    answers = []
    for body in asked["bodies"]:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", asked["path"], json.dumps(body), headers)
        answers.append(json.loads(connection.getresponse().read()))
    return answers


if __name__ == "__main__":
    print(json.dumps(_serve(sys.argv[1], json.load(sys.stdin))), flush=True)
    os._exit(0)
