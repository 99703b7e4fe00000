"""Architecture from whole files: what is read, what is refused, and by which name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.forward.model.layer_spec import NO_NORM, Attention, GatedFeedForward, LayerSpec
from lora.forward.model.rope_frequencies import Rope
from lora.forward.model.row_order import permute_rows_to_gguf, permute_rows_to_hf
from lora.shaders.errors import InputError
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS

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
    epsilon = float(np.float32(1e-5))
    layer = LayerSpec(
        mixer=Attention(
            n_heads=4,
            n_kv_heads=2,
            head_size=16,
            rope=Rope(10000.0, 16, interleaved=True),
            window=None,
            scale=0.25,
            softcap=None,
            qk_norm=NO_NORM,
            fused_modules=False,
            permuted=True,
        ),
        feed_forward=GatedFeedForward(64, "silu", fused_modules=False),
        hidden_size=32,
        norm_epsilon=epsilon,
        post_norms=False,
        biases=frozenset(),
    )
    assert architecture == Architecture(
        name="llama",
        layers=(layer, layer),
        hidden_size=32,
        vocab_size=320,
        context_length=128,
        norm_epsilon=epsilon,
        tied_head=False,
        logit_softcap=None,
        embedding_scale=1.0,
    )
    assert (layer.mixer.query_size, layer.mixer.kv_size) == (64, 32)


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
    mixer = architecture.layers[0].mixer
    assert (mixer.head_size, mixer.n_kv_heads, mixer.window) == (8, 4, None)
    assert mixer.rope == Rope(10000.0, 8, interleaved=True)
    assert architecture.layers[1] == architecture.layers[0]
    assert architecture.vocab_size == 320


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "F16", "BF16", "F32"])
def test_supported_types(tmp_path: Path, kind: str) -> None:
    assert _read(tmp_path, types={"weight": kind}).tied_head


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba', which is not supported; supp"),
        ({"general.architecture": "qwen2"}, "lacks the metadata key qwen2.embedding_length"),
        ({"general.architecture": None}, "lacks the metadata key general.architecture"),
        ({"general.type": "adapter"}, "holds a GGUF 'adapter'"),
        ({"llama.rope.scaling.type": "dynamic"}, "llama.rope.scaling.type is 'dynamic'"),
        ({"llama.rope.scaling.type": "longrope"}, "lacks the tensors rope_factors_long.weight"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -2.0}, "is -2.0"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, "is a kind of rope that is not supp"),
        ({"llama.attn_logit_softcapping": 50.0}, "soft caps (50.0, None) in a model of the"),
        ({"llama.attention.sliding_window": 2.5}, "llama.attention.sliding_window is 2.5"),
        (
            {
                "llama.attention.sliding_window": 8,
                "llama.attention.sliding_window_pattern": [True, False, True],
            },
            "sliding_window_pattern is no list of 2 booleans",
        ),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"llama.block_count": None}, "lacks the metadata key llama.block_count"),
        ({"llama.block_count": 3}, "lacks the tensor 'blk.2.attn_norm.weight' of shape [32]"),
        ({"llama.block_count": 2**32 - 1}, "claims 4294967295 layers"),
        ({"llama.block_count": 0}, "llama.block_count is 0"),
        ({"llama.block_count": "two"}, "llama.block_count is 'two'"),
        ({"llama.attention.head_count": [4, 2, 4]}, "head_count has 3 numbers for 2 layers"),
        ({"llama.attention.head_count": [4, 0]}, "head_count is 0"),
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
        ({"rope_freqs.weight": HIDDEN}, "'rope_freqs.weight' of shape [32] is not 4 numbers"),
        ({"rope_freqs.weight": np.zeros(4, np.float32)}, "is not 4 numbers above 0"),
        ({"rope_factors_long.weight": np.ones(4, np.float32)}, "holds only one of rope_factors"),
        ({"blk.0.attn_norm.bias": HIDDEN}, "'blk.0.attn_norm.bias': a model with biases in"),
        ({"blk.0.attn_q.bias": np.ones(16, "f4")}, "'blk.0.attn_q.bias' has the shape [16]"),
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
    message = _error(tmp_path, types={"blk.1.ffn_up.weight": "TQ1_0"}, hidden_size=256)
    assert "'blk.1.ffn_up.weight' is stored as TQ1_0" in message
    assert "supported: F32, F16, BF16, " in message
    message = _error(tmp_path, types={"output_norm.weight": "Q8_0"})
    assert "'output_norm.weight' is stored as Q8_0" in message


def test_matrices_name_the_files_tensors(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    written = write_tiny_llama(path, head_size=16)
    architecture = Architecture.from_gguf(GGUFFile(path))
    assert list(architecture.matrices) == [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj", "lm_head"),
    ]
    spec = architecture.layers[1]
    for members in spec.groups.values():
        for matrix in members:
            shape = (matrix.out_size(spec), matrix.in_size(spec))
            assert written[matrix.tensor_name(1)].shape == shape
    named = architecture.matrices
    assert named["q_proj"].peft_path(3) == "model.layers.3.self_attn.q_proj"
    assert named["down_proj"].peft_path(0) == "model.layers.0.mlp.down_proj"
    assert named["lm_head"].peft_path(2) == "lm_head"
    heads = {m.module: m.permuted_heads(spec) for m in named.values()}
    assert {module: n for module, n in heads.items() if n} == {"q_proj": 4, "k_proj": 2}
    # Whether rope turns neighbours does not say whether rows are permuted for it.
    assert spec.mixer.rope.interleaved
    as_stored = replace(spec, mixer=replace(spec.mixer, permuted=False))
    assert named["q_proj"].permuted_heads(as_stored) is None


def test_biases_and_rope_scaling_of_a_llama(tmp_path: Path) -> None:
    biases = {
        f"blk.{i}.attn_{m}.bias": np.ones(n, "f4")
        for i in (0, 1)
        for m, n in (("q", 32), ("k", 16))
    }
    factors = np.array([1, 2, 4, 8], np.float32)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    architecture = _read(
        tmp_path, tensors={**biases, "rope_freqs.weight": factors}, metadata=scaling
    )
    assert [spec.biases for spec in architecture.layers] == [{"attn_q", "attn_k"}] * 2
    rope = architecture.layers[0].mixer.rope
    assert (rope.factor, rope.divisors) == (4.0, (1.0, 2.0, 4.0, 8.0))


def test_windows(tmp_path: Path) -> None:
    """One window for all layers (Mistral), or a list of flags, one a layer."""
    window = {"llama.attention.sliding_window": 8}
    assert [spec.mixer.window for spec in _read(tmp_path, metadata=window).layers] == [8, 8]
    window["llama.attention.sliding_window_pattern"] = [False, True]  # type: ignore[assignment]
    assert [spec.mixer.window for spec in _read(tmp_path, metadata=window).layers] == [None, 8]


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
    (spec,) = set(architecture.layers)
    mixer = spec.mixer
    assert (mixer.n_heads, mixer.n_kv_heads, mixer.head_size) == (9, 3, 64)
    assert (spec.feed_forward.intermediate_size, architecture.vocab_size) == (1536, 49152)
    assert (mixer.window, mixer.rope) == (None, Rope(1e5, 64, interleaved=True))
    assert architecture.tied_head


def test_names_of_ollamas_converter(tmp_path: Path) -> None:
    """It calls the bases of rope global and local, and leaves out Gemma's epsilon."""
    TINY_MODELS["gemma3"].write_gguf(tmp_path / "gemma3.gguf")
    file = GGUFFile(tmp_path / "gemma3.gguf")
    file.metadata["gemma3.attention.layer_norm_rms_epsilon"] = 1e-6
    expected = Architecture.from_gguf(file)
    globally, locally = (
        next(s.mixer.rope.base for s in expected.layers if (s.mixer.window is None) == every)
        for every in (True, False)
    )
    assert globally != locally
    for key in ("rope.freq_base", "rope.freq_base_swa", "attention.layer_norm_rms_epsilon"):
        file.metadata.pop(f"gemma3.{key}", None)
    file.metadata["gemma3.rope.global.freq_base"] = globally
    file.metadata["gemma3.rope.local.freq_base"] = locally
    assert Architecture.from_gguf(file) == expected


def test_layers_without_rope(tmp_path: Path) -> None:
    TINY_MODELS["smollm3"].write_gguf(tmp_path / "smollm3.gguf")
    layers = Architecture.from_gguf(GGUFFile(tmp_path / "smollm3.gguf")).layers
    turning = [bool(spec.mixer.rope.frequencies().any()) for spec in layers]
    assert turning == [True, True, True, False, True]
    still = layers[3].mixer.rope.tables(5)
    assert (still[..., 0] == 1).all() and (still[..., 1] == 0).all()
