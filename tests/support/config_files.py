"""Configs of few lines, and what is said of those that are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora.config.schema import load_config
from lora.shaders.errors import InputError

LEAST = "model: {path: m.gguf}\ndata: {train: t.jsonl}\noutput: runs/x\n"


def write(path: str, text: str) -> str:
    Path(path).write_text(text)
    return path


def refusal(path: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)
