"""What general.architecture implies and a GGUF's metadata doesn't say: one row a family.

Sources: llama.cpp (src/models, src/llama-model.cpp) for what its loader takes for granted, and the
models' own code in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.gguf.file import GGUFFile
from lora.shaders.errors import InputError
from lora.shaders.untrusted import shown


@dataclass(frozen=True)
class Family:
    """One value of general.architecture.

    Attributes:
        models: known models of it, for messages.
        activation: of the gate, a name of forward/swiglu.py.
        rope_interleaved: rope turns neighbours (2j, 2j + 1); otherwise halves.
        permuted: the rows of q and k are permuted within heads, since Hugging Face's model turns
            halves.
        biases: matrices (GGUF names within a layer) that may have a bias.
        fused: q, k, v are one module of the Hugging Face model, and gate and up another.
        qk_norm: every head of q and of k passes an RMSNorm before rope.
        post_norms: what attention and feed-forward give passes an RMSNorm before it is added.
        scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
        softcaps: default caps of attention scores and of logits, None where it has no caps.
        window_pattern: every n-th layer sees all, the others a window; 1: a window is for all.
        default_epsilon: of the norms, where the file has none (Ollama's converter writes none).
        local_rope_base: base of rope in layers with a window, where it is another; those layers
            have no rope scaling then.
        no_rope_every: every n-th layer has no rope; None where all have it.
        wide_scale_layers: with that many layers the attention scale is
            1/sqrt(hidden_size / n_heads), not 1/sqrt(head_size); None for no such model.
    """

    models: str
    activation: str = "silu"
    rope_interleaved: bool = False
    permuted: bool = False
    biases: frozenset[str] = frozenset()
    fused: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    scaled_embedding: bool = False
    softcaps: tuple[float, float] | None = None
    window_pattern: int = 1
    default_epsilon: float | None = None
    local_rope_base: float | None = None
    no_rope_every: int | None = None
    wide_scale_layers: int | None = None


FAMILIES = {
    "llama": Family(
        "Llama 2 and 3, Mistral, SmolLM 1 and 2",
        rope_interleaved=True,
        permuted=True,
        biases=frozenset(
            ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        ),
    ),
    "smollm3": Family("SmolLM 3", rope_interleaved=True, permuted=True, no_rope_every=4),
    "qwen2": Family("Qwen 2 and 2.5", biases=frozenset(("attn_q", "attn_k", "attn_v"))),
    "qwen3": Family("Qwen 3", qk_norm=True),
    "gemma2": Family(
        "Gemma 2",
        activation="gelu_tanh",
        post_norms=True,
        scaled_embedding=True,
        softcaps=(50.0, 30.0),
        window_pattern=2,
        wide_scale_layers=46,  # 27B
    ),
    "gemma3": Family(
        "Gemma 3",
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        scaled_embedding=True,
        softcaps=(0.0, 0.0),
        window_pattern=6,
        default_epsilon=1e-6,
        local_rope_base=10000.0,
        wide_scale_layers=62,  # 27B
    ),
    "phi3": Family("Phi 3, 3.5 and 4", fused=True),
}


def family_of(gguf_file: GGUFFile) -> Family:
    """The family of a model.

    Raises:
        InputError: the file is no model, or of an architecture that is not supported.
    """
    kind = gguf_file.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{gguf_file.path} holds a GGUF {shown(kind)}; a model is expected.")
    name = gguf_file.metadata.get("general.architecture")
    if name is None:
        raise InputError(f"{gguf_file.path} lacks the metadata key general.architecture.")
    if not isinstance(name, str) or name not in FAMILIES:
        supported = "; ".join(f"{key} ({row.models})" for key, row in FAMILIES.items())
        raise InputError(
            f"{gguf_file.path} has the architecture {shown(name)}, which is not supported; "
            f"supported: {supported}."
        )
    return FAMILIES[name]
