"""The transformers config that tiny models begin with."""

from __future__ import annotations

from typing import Any


def config_of(**changes: Any) -> dict[str, Any]:
    """Two layers of 64 columns, with changes."""
    return {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "rope_parameters": rope_of(),
        **changes,
    }


def rope_of(rope_type: str = "default", rope_theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    """Parameters of rope."""
    return {"rope_type": rope_type, "rope_theta": rope_theta, **more}
