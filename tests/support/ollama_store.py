"""Ollama's store, built in a directory."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

MODEL = "application/vnd.ollama.image.model"
REGISTRY = "registry.ollama.ai/library"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "store"
    (folder / "blobs").mkdir(parents=True)
    monkeypatch.setenv("OLLAMA_MODELS", str(folder))
    return folder


def layer(store: Path, contents: bytes = b"a model", kind: str = MODEL) -> dict[str, Any]:
    """Writes a blob and returns the layer that stands for it in a manifest."""
    digest = hashlib.sha256(contents).hexdigest()
    (store / "blobs" / f"sha256-{digest}").write_bytes(contents)
    return {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(contents)}


def install(store: Path, name: str, *layers: dict[str, Any]) -> Path:
    """Writes the manifest of host/namespace/model/tag with a template and the given layers."""
    path = store / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    template = layer(store, b"{{ .Prompt }}", "application/vnd.ollama.image.template")
    path.write_text(json.dumps({"schemaVersion": 2, "layers": [template, *layers]}))
    return path
