"""Architecture from whole files: what is read, what is refused, and by which name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forward.architecture import (
    ADAPTABLE_MATRICES,
    Architecture,
    permute_rows_to_gguf,
    permute_rows_to_hf,
)
from forward.gguf_file import GGUFFile
from shaders.errors import InputError
from tests.forward.tiny_gguf import write_tiny_llama

HIDDEN = np.zeros(32, np.float32)


def _read(tmp_path: Path, **options: Any) -> Architecture:
    path = tmp_path / "tiny.gguf"
    write_tiny_llama(path, **options)
    return Architecture.from_gguf(GGUFFile(path))


def _error(tmp_path: Path, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        _read(tmp_path, **options)
    return str(caught.value)


def test_fields(tmp_path: Path) -> None:
    architecture = _read(tmp_path, types={"weight": "Q8_0"}, head_size=16, tied_head=False)
    assert architecture == Architecture(
        name="llama",
        n_layers=2,
        hidden_size=32,
        intermediate_size=64,
        n_heads=4,
        n_kv_heads=2,
        head_size=16,
        vocab_size=320,
        context_length=128,
        norm_epsilon=float(np.float32(1e-5)),
        rope_base=10000.0,
        rope_dimensions=16,
        rope_interleaved=True,
        tied_head=False,
    )
    assert (architecture.query_size, architecture.kv_size) == (64, 32)


def test_defaults_of_absent_keys(tmp_path: Path) -> None:
    absent = (
        "attention.key_length",
        "attention.value_length",
        "rope.freq_base",
        "rope.dimension_count",
        "vocab_size",
        "attention.head_count_kv",
    )
    metadata = {f"llama.{key}": None for key in absent}
    architecture = _read(tmp_path, n_kv_heads=4, metadata=metadata)
    assert architecture.head_size == architecture.rope_dimensions == 8
    assert architecture.n_kv_heads == 4
    assert architecture.rope_base == 10000.0
    assert architecture.vocab_size == 320


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16", "F32"])
def test_supported_types(tmp_path: Path, kind: str) -> None:
    assert _read(tmp_path, types={"weight": kind}).tied_head


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "qwen2"}, "architecture 'qwen2', which is not supported yet"),
        ({"general.architecture": None}, "lacks the metadata key general.architecture"),
        ({"general.type": "adapter"}, "holds a GGUF 'adapter'"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type is 'yarn'"),
        ({"llama.rope.scale_linear": 4.0}, "llama.rope.scale_linear is 4.0"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window is 4096"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"split.count": 3}, "one of 3 parts"),
        ({"llama.block_count": None}, "lacks the metadata key llama.block_count"),
        ({"llama.block_count": 3}, "lacks the tensor 'blk.2.attn_norm.weight' of shape [32]"),
        ({"llama.block_count": 2**32 - 1}, "claims 4294967295 layers"),
        ({"llama.block_count": 0}, "llama.block_count is 0"),
        ({"llama.block_count": "two"}, "llama.block_count is 'two'"),
        ({"llama.attention.head_count": [4, 4]}, "head_count is [4, 4]"),
        ({"llama.attention.head_count_kv": 3}, "cannot share 3"),
        ({"llama.embedding_length": 30}, "embedding_length is 30; supported are multiples of 4"),
        ({"llama.embedding_length": 36}, "'token_embd.weight' has the shape [320, 32]"),
        ({"llama.attention.value_length": 4}, "value_length is 4"),
        ({"llama.rope.dimension_count": 12}, "more than the head size 8"),
        ({"llama.rope.dimension_count": 7}, "multiples of 2"),
        ({"llama.rope.freq_base": -1.0}, "rope.freq_base is -1.0"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon is nan"),
        ({"llama.vocab_size": 300}, "has 320 tokens, its vocabulary only 300 rows"),
        ({"llama.vocab_size": 324}, "it must be [324, 32]"),
    ],
)
def test_refused_metadata(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    assert message in _error(tmp_path, metadata=metadata)


def test_neutral_metadata_is_accepted(tmp_path: Path) -> None:
    _read(tmp_path, metadata={"llama.rope.scaling.type": "none", "llama.expert_count": 0})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"rope_freqs.weight": HIDDEN}, "'rope_freqs.weight': a model with rope scaling"),
        ({"blk.0.attn_q.bias": HIDDEN}, "'blk.0.attn_q.bias': a model with biases"),
        ({"blk.0.ffn_gate_inp.weight": HIDDEN}, "a model with experts"),
        ({"blk.0.attn_q_norm.weight": HIDDEN}, "holds the tensor 'blk.0.attn_q_norm.weight'"),
        ({"token_embd.weight": None}, "lacks the tensor 'token_embd.weight'"),
        ({"blk.1.attn_v.weight": None}, "lacks the tensor 'blk.1.attn_v.weight' of shape [16, 32]"),
        (
            {"blk.1.attn_v.weight": np.zeros((32, 16), np.float32)},
            "'blk.1.attn_v.weight' has the shape [32, 16]; by the metadata it must be [16, 32]",
        ),
        ({"output_norm.weight": np.zeros((1, 32), np.float32)}, "must be [32]"),
    ],
)
def test_refused_tensors(
    tmp_path: Path, tensors: dict[str, np.ndarray | None], message: str
) -> None:
    assert message in _error(tmp_path, tensors=tensors)


def test_refused_types(tmp_path: Path) -> None:
    message = _error(tmp_path, types={"blk.1.ffn_up.weight": "Q5_0"})
    assert "'blk.1.ffn_up.weight' is stored as Q5_0" in message
    assert "supported: Q4_1, Q8_0, F16, BF16, F32" in message
    message = _error(tmp_path, types={"output_norm.weight": "Q8_0"})
    assert "'output_norm.weight' is stored as Q8_0" in message


def test_adaptable_matrices_name_the_files_tensors(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    written = write_tiny_llama(path, head_size=16)
    architecture = Architecture.from_gguf(GGUFFile(path))
    assert list(ADAPTABLE_MATRICES) == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    for matrix in ADAPTABLE_MATRICES.values():
        shape = (matrix.out_size(architecture), matrix.in_size(architecture))
        assert written[matrix.tensor_name(1)].shape == shape
    q_proj, down_proj = ADAPTABLE_MATRICES["q_proj"], ADAPTABLE_MATRICES["down_proj"]
    assert q_proj.peft_path(3) == "model.layers.3.self_attn.q_proj"
    assert down_proj.peft_path(0) == "model.layers.0.mlp.down_proj"
    heads = {m.module: m.permuted_heads(architecture) for m in ADAPTABLE_MATRICES.values()}
    assert {module: n for module, n in heads.items() if n} == {"q_proj": 4, "k_proj": 2}


@pytest.mark.parametrize("width", [None, 3])
def test_row_order_of_q_and_k(width: int | None) -> None:
    n_heads, head_size = 3, 8
    n_rows = n_heads * head_size
    rows = np.arange(n_rows * (width or 1)).reshape((n_rows, width) if width else (n_rows,))
    permuted = permute_rows_to_gguf(rows, n_heads)
    for head in range(n_heads):
        for j in range(head_size // 2):
            for h in (0, 1):
                np.testing.assert_array_equal(
                    permuted[head * head_size + 2 * j + h],
                    rows[head * head_size + h * head_size // 2 + j],
                )
    np.testing.assert_array_equal(permute_rows_to_hf(permuted, n_heads), rows)


def test_the_real_model(smollm2: Path) -> None:
    architecture = Architecture.from_gguf(GGUFFile(smollm2))
    assert (architecture.n_layers, architecture.hidden_size) == (30, 576)
    assert (architecture.n_heads, architecture.n_kv_heads, architecture.head_size) == (9, 3, 64)
    assert (architecture.intermediate_size, architecture.vocab_size) == (1536, 49152)
    assert architecture.rope_base == 100000.0
    assert architecture.tied_head
