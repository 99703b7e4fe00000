"""Models of recurrent layers as files have them, and those that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.forward.model.layer_spec import Attention
from lora.forward.model.recurrent_spec import GatedDeltaNet, ShortConvolution
from lora.shaders.errors import InputError
from tests.support.tiny_models import TINY_MODELS


def read(name: str, path: Path, **more: Any) -> Architecture:
    TINY_MODELS[name].write_gguf(path, **more)
    return Architecture.from_gguf(GGUFFile(path))


def test_layers(tmp_path: Path) -> None:
    lfm2 = read("lfm2", tmp_path / "lfm2.gguf")
    kinds = [type(spec.mixer) for spec in lfm2.layers]
    assert kinds == [ShortConvolution, ShortConvolution, Attention, ShortConvolution]
    assert lfm2.recurrent and lfm2.output_norm == "token_embd_norm"
    assert list(lfm2.matrices) == [
        "in_proj", "out_proj", "w1", "w3", "w2", "q_proj", "k_proj", "v_proj", "lm_head"
    ]  # fmt: skip
    qwen35 = read("qwen35", tmp_path / "qwen35.gguf")
    kinds = [type(spec.mixer) for spec in qwen35.layers]
    assert kinds == [GatedDeltaNet, Attention, GatedDeltaNet]
    attention = qwen35.layers[1].mixer
    assert isinstance(attention, Attention) and attention.output_gate
    assert (attention.rope.dimensions, attention.head_size) == (8, 32)


def test_every_so_many_th_layer_is_attention(tmp_path: Path) -> None:
    keys = {"attention.recurrent_layers": [True] * 3, "full_attention_interval": 2}
    with pytest.raises(InputError, match=r"'blk\.1\.attn_(q|k)"):  # the list wins
        read("qwen35", tmp_path / "list.gguf", keys=keys)


def test_layers_that_predict_further_tokens_are_left_alone(tmp_path: Path) -> None:
    spare = {
        "blk.3.nextn.eh_proj.weight": np.ones((64, 128), np.float32),
        "blk.3.attn_q.weight": np.ones((256, 64), np.float32),
    }
    for flags in ([True, False, True], [True, False, True, False]):
        keys = {
            "block_count": 4, "nextn_predict_layers": 1, "attention.recurrent_layers": flags,
        }  # fmt: skip
        architecture = read("qwen35", tmp_path / "mtp.gguf", keys=keys, more=spare)
        assert architecture.n_layers == 3
        assert dict(architecture.unused) == {"predicting further tokens (MTP)": 2}


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("lfm2", "shortconv.l_cache", 1, "shortconv.l_cache is 1; 2 to 8 are supported"),
        ("lfm2", "shortconv.l_cache", 9, "shortconv.l_cache is 9; 2 to 8 are supported"),
        ("lfm2", "shortconv.l_cache", 4, r"must be \[64, 4\]"),
        ("lfm2", "attention.head_count_kv", [0, 0, 3, 0], "4 heads cannot share 3 key and value"),
        ("qwen35", "ssm.group_count", 3, "3 key heads and 4 value heads of 16 numbers"),
        ("qwen35", "ssm.inner_size", 32, "32 together, are not supported"),
        ("qwen35", "ssm.state_size", 18, "supported are multiples of 4"),
        ("qwen35", "ssm.time_step_rank", 6, "supported are multiples of 4"),
        ("qwen35", "ssm.conv_kernel", 99, "ssm.conv_kernel is 99; 2 to 8"),
        ("qwen35", "attention.recurrent_layers", [True], "no list of 3 booleans"),
        ("qwen35", "attention.recurrent_layers", [1, 0, 1], "no list of 3 booleans"),
    ],
)
def test_files_that_are_refused(
    tmp_path: Path, name: str, key: str, value: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(name, tmp_path / "model.gguf", keys={key: value})


def test_value_heads_have_an_order_of_their_own() -> None:
    spec = GatedDeltaNet(key_heads=2, value_heads=6, head_size=4, taps=4)
    assert spec.value_order(6).tolist() == [0, 3, 1, 4, 2, 5]
    rows = spec.value_order(2 * 8 + 24)
    assert rows[:16].tolist() == list(range(16))
    assert rows[16:24].tolist() == [16, 17, 18, 19, 28, 29, 30, 31]
    assert sorted(rows) == list(range(40))
