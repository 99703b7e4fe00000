"""Tiny random models of the architectures that came after Phi: rows of `TINY_MODELS`."""

from __future__ import annotations

from typing import Any

from tests.support.tiny_config import config_of, rope_of
from tests.support.tiny_model import TinyModel

_LOCAL, _GLOBAL = "sliding_attention", "full_attention"


def _gemma4_config(**changes: Any) -> dict[str, Any]:
    """Without inputs of layers and shared keys."""
    return config_of(
        head_dim=16,
        global_head_dim=32,
        num_global_key_value_heads=None,
        rms_norm_eps=1e-6,
        sliding_window=8,
        final_logit_softcapping=5.0,
        vocab_size_per_layer_input=320,
        hidden_size_per_layer_input=0,
        num_kv_shared_layers=0,
        attention_k_eq_v=False,
        use_double_wide_mlp=False,
        pad_token_id=0,
        rope_parameters={
            _GLOBAL: rope_of("proportional", rope_theta=1e6, partial_rotary_factor=0.25),
            _LOCAL: rope_of(),
        },
        **changes,
    )


# Of E2B's kind. Layers 2 and 3 are those whose keys and values the last three take.
_E2B = _gemma4_config() | {
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "layer_types": [_LOCAL, _GLOBAL, _LOCAL, _GLOBAL, _LOCAL, _LOCAL, _GLOBAL],
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
}


_LFM2 = config_of(
    norm_eps=1e-5,
    conv_L_cache=3,
    conv_bias=False,
    block_auto_adjust_ff_dim=False,
)

_QWEN35 = config_of(
    head_dim=32,
    rms_norm_eps=1e-4,  # under a smaller one f32 itself is 3e-4 away from f64, in any order
    tie_word_embeddings=False,
    linear_conv_kernel_dim=4,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    rope_parameters=rope_of(partial_rotary_factor=0.25, mrope_section=[2, 1, 1]),
)

NEWER_MODELS = (
    TinyModel(
        "lfm2",
        "lfm2",
        _LFM2
        | {
            "num_hidden_layers": 4,
            "layer_types": ["conv", "conv", "full_attention", "conv"],
        },
        transformers_reads=False,
    ),
    TinyModel(
        "qwen35",
        "qwen3_5_text",
        # Two value heads a key head; rows that are longer than chunks and no multiple of them.
        _QWEN35
        | {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
        transformers_reads=False,
    ),
    TinyModel(
        "qwen35_upper",
        "qwen3_5_text",
        # A DeltaNet in the frozen prefix, and one as the lowest adapted layer.
        _QWEN35
        | {
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention"] * 2 + ["full_attention"],
            "linear_num_key_heads": 4,
            "tie_word_embeddings": True,
        },
        rank=6,
        alpha=12,
        adapted_layers=(1, 2),
        transformers_reads=False,
    ),
    TinyModel(
        "lfm2_upper",
        "lfm2",
        # A convolution in the frozen prefix, and one as the lowest adapted layer, of four taps.
        _LFM2
        | {
            "num_hidden_layers": 3,
            "layer_types": ["conv", "conv", "full_attention"],
            "conv_L_cache": 4,
        },
        rank=6,
        alpha=12,
        adapted_layers=(1, 2),
        transformers_reads=False,
    ),
    TinyModel(
        "gemma4_e2b",
        "gemma4_text",
        _E2B,
        transformers_reads=False,
    ),
    TinyModel(
        "gemma4_upper",
        "gemma4_text",
        # A prefix that is frozen, with a layer whose keys and values others take; another such
        # layer is the lowest that is adapted.
        _E2B,
        rank=6,
        alpha=12,
        adapted_layers=(3, 5, 6),
        transformers_reads=False,
    ),
    TinyModel(
        "gemma4_dense",
        "gemma4_text",
        # Of 31B's kind: where all is seen, keys are values, and have heads of their own number.
        _gemma4_config()
        | {
            "num_hidden_layers": 4,
            "layer_types": [_LOCAL, _GLOBAL, _LOCAL, _GLOBAL],
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
        },
        rank=6,
        alpha=12,
        adapted_layers=(1, 2, 3),
        transformers_reads=False,
    ),
    TinyModel(
        "granite",
        "granite",
        config_of(
            embedding_multiplier=3.0,
            attention_multiplier=0.2,
            residual_multiplier=0.4,
            logits_scaling=2.0,
        ),
        transformers_reads=False,
    ),
    TinyModel(
        "olmo2",
        "olmo2",
        config_of(tie_word_embeddings=False, rms_norm_eps=1e-6),
        rank=6,
        alpha=12,
        transformers_reads=False,
    ),
    TinyModel(
        "olmo3",
        "olmo3",
        # The fourth layer sees all, through YaRN, and is not the last.
        config_of(
            num_hidden_layers=5,
            tie_word_embeddings=False,
            rms_norm_eps=1e-6,
            sliding_window=8,
            layer_types=["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": rope_of("yarn", factor=8.0, original_max_position_embeddings=64),
                "sliding_attention": rope_of(),
            },
        ),
        adapted_layers=(1, 2, 3, 4),
        transformers_reads=False,
    ),
    TinyModel(
        "glm4",
        "glm4",
        config_of(
            head_dim=16,
            pad_token_id=0,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=rope_of(partial_rotary_factor=0.5),
        ),
        transformers_reads=False,
    ),
    TinyModel(
        "mistral3",
        "ministral3",
        config_of(
            head_dim=16,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            rope_parameters=rope_of(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=4.0,
                beta_slow=0.25,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.4,
                max_position_embeddings=64,
            ),
        ),
        transformers_reads=False,
    ),
    TinyModel(
        "ernie4_5", "ernie4_5", config_of(head_dim=16, use_bias=False), transformers_reads=False
    ),
    TinyModel(
        "exaone4",
        "exaone4",
        # The fourth layer sees all and has no rope, and is not the last.
        config_of(
            num_hidden_layers=5,
            head_dim=16,
            sliding_window=8,
            sliding_window_pattern=4,
            layer_types=["sliding_attention"] * 3 + ["full_attention", "sliding_attention"],
        ),
        adapted_layers=(2, 3, 4),
        transformers_reads=False,
        llama_cpp=False,  # it takes the window with 64 layers only
    ),
    TinyModel(
        "exaone4_whole",
        "exaone4",
        config_of(
            head_dim=16,
            sliding_window=None,
            sliding_window_pattern=None,
            layer_types=["full_attention"] * 2,
        ),
        transformers_reads=False,
    ),
    TinyModel(
        "hunyuan",
        "hunyuan_v1_dense",
        config_of(head_dim=16, pad_token_id=0),
        rank=6,
        alpha=12,
        transformers_reads=False,
    ),
    TinyModel(
        "seed_oss",
        "seed_oss",
        config_of(
            head_dim=24, attention_bias=True, attention_out_bias=False, tie_word_embeddings=False
        ),
        transformers_reads=False,
    ),
)
