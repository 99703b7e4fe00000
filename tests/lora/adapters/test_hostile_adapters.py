"""Adapters that are attacks or accidents, and those that PEFT writes under other names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from lora.adapters.adapted_tensor import read_adapted_tensors
from lora.adapters.files import load_adapter, open_adapter
from lora.adapters.peft_files import read_peft_factors
from lora.adapters.peft_settings import read_peft_settings
from lora.adapters.saved_factors import most_common
from lora.commands.inspect import adapter_facts, describe_adapter
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.forward.model.layer_spec import Attention
from lora.shaders.errors import InputError
from tests.support.imports import REPOSITORY
from tests.support.tiny_models import TINY_MODELS

_LAYER = "base_model.model.model.layers.0."
_A = np.arange(1, 4 * 8 + 1, dtype=np.float32).reshape(4, 8) / 32
_B = np.arange(1, 6 * 4 + 1, dtype=np.float32).reshape(6, 4) / 24
_SETTINGS: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}


def _adapter(
    folder: Path,
    settings: dict[str, Any] | str | bytes = _SETTINGS,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    folder.mkdir(exist_ok=True)
    if tensors is None:
        tensors = _factors("self_attn.q_proj", _A, _B)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    content = json.dumps(settings) if isinstance(settings, dict) else settings
    encoded = content if isinstance(content, bytes) else content.encode()
    (folder / "adapter_config.json").write_bytes(encoded)
    return folder


def _factors(module: str, a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{_LAYER}{module}.lora_A.weight": a, f"{_LAYER}{module}.lora_B.weight": b}


SETTINGS = {
    "deep": "[" * 100_000,
    "deep in a key": '{"peft_type": "LORA", "x": ' + "[" * 990 + "]" * 990 + "}",
    "many digits": '{"peft_type": "LORA", "lora_alpha": 8, "r": ' + "9" * 5000 + "}",
    "infinite rank": '{"peft_type": "LORA", "lora_alpha": 8, "r": 1e999}',
    "rank of text": _SETTINGS | {"r": "4"},
    "rank of truth": _SETTINGS | {"r": True},
    "huge rank": _SETTINGS | {"r": 10**12},
    "infinite alpha": '{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999}',
    "huge alpha": _SETTINGS | {"lora_alpha": 1e308},
    "tiny alpha": _SETTINGS | {"lora_alpha": 1e-308},
    "alpha of digits": '{"peft_type": "LORA", "r": 4, "lora_alpha": 1' + "0" * 400 + "}",
    "alpha null": _SETTINGS | {"lora_alpha": None},
    "no alpha": {"peft_type": "LORA", "r": 4},
    "kind of a list": {"peft_type": ["LORA"]},
    "patterns of a list": _SETTINGS | {"rank_pattern": ["q_proj"]},
    "pattern's rank of text": _SETTINGS | {"rank_pattern": {"q_proj": "4"}},
    "pattern that never ends": _SETTINGS | {"rank_pattern": {"(.+.+)+x": 4}},
    "pattern that is none": _SETTINGS | {"alpha_pattern": {"(": 4}},
    "deep pattern": _SETTINGS | {"rank_pattern": {"(" * 5000 + ")" * 5000: 4}},
    "truth of text": _SETTINGS | {"use_dora": "false"},
    "base of a list": _SETTINGS | {"base_model_name_or_path": ["x"]},
    "initialised by a number": _SETTINGS | {"init_lora_weights": 7},
    "half a surrogate": '{"peft_type": "LORA", "r": 4, "lora_alpha": 8, "x": "\\ud800"}',
    "latin-1": b'{"peft_type": "LORA", "x": "\xe9"}',
    "a list": "[]",
    "nothing": "",
    "large": " " * (1 << 23),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_that_are_wrong_are_one_sentence(tmp_path: Path, name: str) -> None:
    folder = _adapter(tmp_path / "adapter", SETTINGS[name])
    started = time.perf_counter()
    with pytest.raises(InputError) as caught:
        read_peft_factors(folder)
    assert time.perf_counter() - started < 20  # 2 seconds of a processor that others use, too
    message = str(caught.value)
    assert str(folder) in message and "\n" not in message and len(message) < 600


TENSORS = {
    "layer of letters": {
        name.replace("layers.0", "layers.abc"): v
        for name, v in _factors("self_attn.q_proj", _A, _B).items()
    },
    "layer of many digits": {
        name.replace("layers.0", "layers." + "9" * 5000): v
        for name, v in _factors("self_attn.q_proj", _A, _B).items()
    },
    "path": {
        name.replace("layers.0", "../../x"): v
        for name, v in _factors("self_attn.q_proj", _A, _B).items()
    },
    "escape": {
        name.replace("self_attn", "\x1b[2J"): v
        for name, v in _factors("self_attn.q_proj", _A, _B).items()
    },
    "too large for f32": _factors("self_attn.q_proj", _A.astype(np.float64) * 1e300, _B),
    "no columns": _factors("self_attn.q_proj", np.zeros((4, 0), np.float32), _B),
    "one dimension": _factors("self_attn.q_proj", np.zeros(4, np.float32), _B),
    "rows that nobody names": _factors("self_attn.q_proj", _A, _B)
    | {
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": np.zeros(
            (2, 8), np.float32
        )
    },
    "factors of the embedding": {"base_model.model.model.embed_tokens.lora_embedding_A": _A},
    "a base of another size": _factors("self_attn.q_proj", _A, _B)
    | {f"{_LAYER}self_attn.q_proj.base_layer.weight": np.zeros((5, 8), np.float32)},
    "a base without factors": {
        f"{_LAYER}self_attn.q_proj.base_layer.weight": np.zeros((6, 8), np.float32)
    },
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_are_wrong_are_one_sentence(tmp_path: Path, name: str) -> None:
    folder = _adapter(tmp_path / "adapter", _SETTINGS, TENSORS[name])
    with pytest.raises(InputError) as caught:
        adapter_facts(folder)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.mark.filterwarnings("error")
def test_the_largest_numbers_can_be_looked_at(tmp_path: Path) -> None:
    most = np.finfo(np.float32).max
    tensors = _factors("self_attn.q_proj", np.full_like(_A, most), np.full_like(_B, most))
    folder = _adapter(tmp_path / "adapter", _SETTINGS, tensors)
    assert adapter_facts(folder)["matrices"][0]["mean_a"] == pytest.approx(float(most))


def test_no_escape_reaches_the_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    settings = _SETTINGS | {"base_model_name_or_path": "\x1b[2J\x1b]0;pwn\x07x"}
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    for part in describe_adapter(_adapter(tmp_path / "adapter", settings)):
        console.print(part)
    console.file.close()
    assert "\x1b" not in console.export_text() and "\x07" not in console.export_text()


def test_a_base_matrix_beside_its_factors_is_passed_over(tmp_path: Path) -> None:
    """PEFT saves lm_head.base_layer.weight where lm_head is adapted."""
    base = "base_model.model.lm_head."
    tensors = {
        f"{base}base_layer.weight": np.ones((6, 8), np.float32),
        f"{base}lora_A.weight": _A, f"{base}lora_B.weight": _B,
    }  # fmt: skip
    factors = read_peft_factors(_adapter(tmp_path / "adapter", _SETTINGS, tensors))
    assert set(factors) == {"lm_head"}
    np.testing.assert_array_equal(factors["lm_head"].b, _B)


@pytest.mark.parametrize("targets", [r".*\.(q|v)_proj", "all-linear", ["q_proj"], None])
def test_targets_may_be_written_in_any_way(tmp_path: Path, targets: Any) -> None:
    settings = _SETTINGS | {"target_modules": targets, "rank_pattern": {r".*\.0\..*(q|v)_proj": 4}}
    folder = _adapter(tmp_path / "adapter", settings | {"r": 2})
    (factors,) = read_peft_factors(folder).values()
    assert (factors.rank, factors.scale) == (4, 2.0)


def test_the_first_pattern_counts(tmp_path: Path) -> None:
    patterns = {r".*_proj": 16, "q_proj": 32, r"layers\.0\.self_attn\.q_proj": 64}
    for order in (list(patterns), list(patterns)[::-1], list(patterns)[1:]):
        alphas = {name: patterns[name] for name in order}
        folder = _adapter(tmp_path / "adapter", _SETTINGS | {"alpha_pattern": alphas})
        (factors,) = read_peft_factors(folder).values()
        assert factors.scale == alphas[order[0]] / 4


# -- other names -----------------------------------------------------------------------------------


def _architecture(tmp_path: Path, name: str) -> Architecture:
    TINY_MODELS[name].write_gguf(tmp_path / f"{name}.gguf")
    return Architecture.from_gguf(GGUFFile(tmp_path / f"{name}.gguf"))


def _product(folder: Path, architecture: Architecture) -> dict[str, np.ndarray]:
    tensors = read_adapted_tensors(folder, read_peft_settings(folder), architecture)
    return {name: one.change(np.zeros((len(one.b), one.a.shape[1]), np.float32), 0)
            for name, one in tensors.items()}  # fmt: skip


def _random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_a_fused_adapter_fits_a_model_of_three_matrices(tmp_path: Path) -> None:
    architecture = _architecture(tmp_path, "gemma3")  # rows as Hugging Face's
    spec = architecture.layers[0]
    mixer = spec.mixer
    assert isinstance(mixer, Attention)
    a, b = _random(0, 4, spec.hidden_size), _random(1, mixer.qkv_size, 4)
    folder = _adapter(tmp_path / "x", _SETTINGS, _factors("self_attn.qkv_proj", a, b))
    found = _product(folder, architecture)
    whole = np.concatenate([found[f"blk.0.attn_{part}.weight"] for part in "qkv"])
    np.testing.assert_allclose(whole, 2 * b @ a, rtol=1e-6)
    saved = open_adapter(folder, architecture)
    assert saved.targets == ["k_proj", "q_proj", "v_proj"] and saved.rank == 4
    assert load_adapter(folder, saved.layout(architecture)).any()


@pytest.mark.parametrize("alphas", [{}, {"v_proj": 24}])
def test_three_adapters_fit_a_model_of_one_matrix(tmp_path: Path, alphas: dict[str, int]) -> None:
    architecture = _architecture(tmp_path, "phi3")
    spec = architecture.layers[0]
    mixer = spec.mixer
    assert isinstance(mixer, Attention)
    width, keys = spec.hidden_size, mixer.kv_size
    q = _random(0, 4, width), _random(1, mixer.query_size, 4)
    v = _random(2, 4, width), _random(3, keys, 4)
    tensors = _factors("self_attn.q_proj", *q) | _factors("self_attn.v_proj", *v)
    folder = _adapter(tmp_path / "x", _SETTINGS | {"alpha_pattern": alphas}, tensors)
    found = _product(folder, architecture)["blk.0.attn_qkv.weight"]
    scale = alphas.get("v_proj", 8) / 4
    whole = [2 * q[1] @ q[0], np.zeros((keys, width)), scale * v[1] @ v[0]]
    np.testing.assert_allclose(found, np.concatenate(whole), rtol=1e-5, atol=1e-5)
    saved = open_adapter(folder, architecture)
    assert saved.targets == ["qkv_proj"] and saved.rank == 8


def test_a_fused_adapter_of_another_size_is_refused(tmp_path: Path) -> None:
    architecture = _architecture(tmp_path, "gemma3")
    a, b = _random(0, 4, architecture.hidden_size), _random(1, 7, 4)
    folder = _adapter(tmp_path / "x", _SETTINGS, _factors("mlp.gate_up_proj", a, b))
    with pytest.raises(InputError, match="gate_up_proj has 7 rows; this model's mlp.gate_proj"):
        open_adapter(folder, architecture)


# -- order -----------------------------------------------------------------------------------------


def test_ties_have_one_answer() -> None:
    assert most_common([2.0, 3.0, 3.0, 2.0]) == most_common([3.0, 2.0, 2.0, 3.0]) == 2.0
    assert most_common([]) is None


def test_a_tie_of_alphas_has_one_answer(tmp_path: Path) -> None:
    """Ten processes, since the order of a file's tensors is that of a library's random hashes."""
    settings = _SETTINGS | {"alpha_pattern": {"k_proj": 12}}
    tensors = _factors("self_attn.q_proj", _A, _B) | _factors("self_attn.k_proj", _A, _B)
    folder = _adapter(tmp_path / "adapter", settings, tensors)
    code = (
        "import sys; from pathlib import Path\n"
        "from lora.adapters.peft_files import read_peft_factors\n"
        "from lora.adapters.saved_factors import common_scale\n"
        "for _ in range(5):\n"
        "    found = read_peft_factors(Path(sys.argv[1]))\n"
        "    print(list(found), common_scale(f.scale for f in found.values()))"
    )
    lines = set()
    for seed in ("0", "1"):
        environment = dict(os.environ, PYTHONHASHSEED=seed, PYTHONPATH=str(REPOSITORY))
        shown = subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        lines |= set(shown.stdout.splitlines())
    assert len(lines) == 1 and lines.pop().endswith(" 2.0")
