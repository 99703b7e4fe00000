"""The tiny random models that the judges compute too, some of every supported architecture."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_config import config_of as _config
from tests.support.tiny_config import rope_of as _rope
from tests.support.tiny_model import TinyModel
from tests.support.tiny_newer_models import NEWER_MODELS


def _gemma2_config(**changes: Any) -> dict[str, Any]:
    """Caps so low that they bite; layers 0 and 2 have the window."""
    config = _config(
        num_hidden_layers=3,
        head_dim=24,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        rms_norm_eps=1e-6,
    )
    config |= changes
    # The GGUF doesn't hold it: llama.cpp takes the head size, but hidden / heads with 46 layers.
    return config | {"query_pre_attn_scalar": config["head_dim"]}


def _gemma3_config(
    global_rope: dict[str, Any], local_base: float, **changes: Any
) -> dict[str, Any]:
    """Seven layers: the sixth is the global one, and not the last."""
    config = _config(
        num_hidden_layers=7,
        rms_norm_eps=1e-6,
        rope_parameters={
            "full_attention": global_rope,
            "sliding_attention": _rope(rope_theta=local_base),
        },
    )
    config |= changes
    return config | {"query_pre_attn_scalar": config["head_dim"]}


def _phi3_config(**changes: Any) -> dict[str, Any]:
    return _config(
        original_max_position_embeddings=128,
        sliding_window=None,
        pad_token_id=0,  # the default lies outside the tiny vocabulary
        **changes,
    )


def _longrope(rotary_dim: int, **more: Any) -> dict[str, Any]:
    n = rotary_dim // 2
    return _rope(
        "longrope",
        short_factor=[1.0 + 0.125 * j for j in range(n)],
        long_factor=[1.5 + 0.75 * j for j in range(n)],
        **more,
    )


TINY_MODELS = {
    model.name: model
    for model in (
        TinyModel("llama", "llama", _config()),
        TinyModel(
            "llama_odd",
            "llama",
            _config(
                vocab_size=317,
                hidden_size=96,
                intermediate_size=160,
                num_attention_heads=3,
                num_key_value_heads=1,
                tie_word_embeddings=False,
            ),
            rank=6,
            alpha=12,
        ),
        TinyModel(
            "llama_head",
            "llama",
            _config(vocab_size=317, tie_word_embeddings=False),
            rank=6,
            alpha=12,
            adapted_head=True,
        ),
        TinyModel("llama_head_only", "llama", _config(), adapted_layers=(), adapted_head=True),
        TinyModel("llama_head_dim", "llama", _config(head_dim=24, tie_word_embeddings=False)),
        TinyModel(
            "llama_bias",
            "llama",
            _config(attention_bias=True, mlp_bias=True),
            adapted_layers=(1,),
        ),
        TinyModel(
            "llama_rope_freqs",
            "llama",
            # Of the eight frequencies two stay, two are mixed, four are slowed.
            _config(
                rope_parameters=_rope(
                    "llama3",
                    factor=8.0,
                    low_freq_factor=1.0,
                    high_freq_factor=4.0,
                    original_max_position_embeddings=100,
                )
            ),
        ),
        TinyModel(
            "smollm3",
            "smollm3",
            # The fourth layer has no rope, and is not the last.
            _config(num_hidden_layers=5, pad_token_id=None),
            transformers_reads=False,
        ),
        TinyModel("llama_linear", "llama", _config(rope_parameters=_rope("linear", factor=4.0))),
        TinyModel(
            "llama_yarn",
            "llama",
            _config(
                rope_parameters=_rope(
                    "yarn",
                    factor=4.0,
                    original_max_position_embeddings=32,
                    beta_fast=4.0,
                    beta_slow=0.25,
                )
            ),
        ),
        TinyModel("llama_q8_0", "llama", _config(), matrix_type="Q8_0", llama_cpp=False),
        TinyModel(
            "mistral", "mistral", _config(sliding_window=None, head_dim=16, rms_norm_eps=1e-6)
        ),
        TinyModel(
            "mistral_window",
            "mistral",
            _config(sliding_window=12, head_dim=16, tie_word_embeddings=False),
            # llama.cpp's converter drops the window, and its architecture llama never has one.
            extra_metadata={"attention.sliding_window": 12},
            llama_cpp=False,
        ),
        TinyModel(
            "qwen2",
            "qwen2",
            _config(
                vocab_size=319,
                hidden_size=96,
                num_attention_heads=3,
                num_key_value_heads=1,
                rms_norm_eps=1e-6,
            ),
        ),
        TinyModel(
            "qwen3",
            "qwen3",
            _config(
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=128,
                rope_parameters=_rope(rope_theta=1e6),
            ),
        ),
        TinyModel(
            "qwen3_yarn",
            "qwen3",
            _config(
                head_dim=32,
                tie_word_embeddings=False,
                rope_parameters=_rope(
                    "yarn", rope_theta=1e4, factor=2.0, original_max_position_embeddings=64
                ),
            ),
            rank=6,
            alpha=12,
        ),
        TinyModel("gemma2", "gemma2", _gemma2_config()),
        TinyModel(  # the head is tied and its logits are capped
            "gemma2_head", "gemma2", _gemma2_config(), adapted_layers=(2,), adapted_head=True
        ),
        TinyModel(
            "gemma2_q8_0",
            "gemma2",
            _gemma2_config(
                hidden_size=96, num_attention_heads=3, num_key_value_heads=1, head_dim=64
            ),
            matrix_type="Q8_0",
            rank=6,
            alpha=12,
            adapted_layers=(1, 2),
            llama_cpp=False,
        ),
        TinyModel(
            "gemma3",
            "gemma3_text",
            _gemma3_config(
                _rope(rope_theta=1e6),
                10000.0,
                head_dim=24,
                num_key_value_heads=1,
                sliding_window=12,
            ),
        ),
        TinyModel(
            "gemma3_linear",
            "gemma3_text",
            _gemma3_config(
                _rope("linear", rope_theta=1e5, factor=8.0),
                5000.0,
                hidden_size=96,
                num_attention_heads=3,
                num_key_value_heads=1,
                head_dim=32,
                sliding_window=16,
            ),
            rank=6,
            alpha=12,
            adapted_layers=(3, 5, 6),
        ),
        TinyModel("phi3", "phi3", _phi3_config(tie_word_embeddings=False)),
        TinyModel(
            "phi3_window",
            "phi3",
            _phi3_config(tie_word_embeddings=False) | {"sliding_window": 9},
            matrix_type="Q8_0",
            adapted_layers=(1,),
            llama_cpp=False,  # it also switches Phi's window off
        ),
        TinyModel(
            "phi3_short",
            "phi3",
            # Short factors: the original context is longer than the sequences (and than the 256
            # that llama.cpp rounds its context up to).
            _phi3_config(rope_parameters=_longrope(12, partial_rotary_factor=0.75))
            | {"original_max_position_embeddings": 256, "max_position_embeddings": 1024},
        ),
        TinyModel(
            "phi3_short_rows",
            "phi3",
            # Short factors still: both sequences together are longer, neither of them is.
            _phi3_config(rope_parameters=_longrope(16)) | {"original_max_position_embeddings": 48},
            llama_cpp=False,  # it takes the long ones: its context is 256
        ),
        TinyModel(
            "phi3_long",
            "phi3",
            _phi3_config(tie_word_embeddings=False, rope_parameters=_longrope(16))
            | {"original_max_position_embeddings": 16},
            rank=6,
            alpha=12,
        ),
        *NEWER_MODELS,
    )
}
