"""What general.architecture implies and a GGUF's metadata doesn't say: one row a family.

Sources: llama.cpp (src/models, src/llama-model.cpp) for what its loader takes for granted, and the
models' own code in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adaptable import LANGUAGE_LAYERS, TEXT_LAYERS
from lora.forward.model.layer_spec import HEAD_NORM, LATE_NORM, NO_NORM, WIDTH_NORM
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
            halves. (GLM 4 and ERNIE 4.5 turn neighbours there, too.)
        biases: matrices (GGUF names within a layer) that may have a bias.
        fused_qkv: q, k, v are one module of the Hugging Face model.
        fused_gate_up: gate and up are one module there.
        qk_norm: what RMSNorm q and k pass, as in `Attention`.
        pre_norms: attention and feed-forward are given the normed residual stream.
        post_norms: what attention and feed-forward give passes an RMSNorm before it is added.
        feed_forward_norm: GGUF name of the norm before the feed-forward block.
        multipliers: the metadata have numbers for the embedding, the scores, what the blocks give,
            and the logits. Only for a family without norms of heads and post norms.
        temperature: the metadata may have one for queries far into a text.
        two_kinds: layers with a window and those without have heads, key heads and rope of their
            own; some may take other layers' keys and values (forward/model/read_gemma4.py).
        scaled_embedding: embeddings are multiplied by sqrt(hidden_size).
        softcaps: default caps of attention scores and of logits, None where it has no caps.
        window_pattern: every n-th layer sees all, the others a window; 1: a window is for all.
        default_epsilon: of the norms, where the file has none (Ollama's converter writes none).
        local_rope_base: base of rope in layers with a window, where it is another; those layers
            have no rope scaling then.
        plain_local_rope: layers with a window have no rope scaling.
        global_rope: where layers have a window, those without one have rope, too.
        no_rope_every: every n-th layer has no rope; None where all have it.
        wide_scale_layers: with that many layers the attention scale is
            1/sqrt(hidden_size / n_heads), not 1/sqrt(head_size); None for no such model.
        short_convolutions: layers without key heads are short convolutions, and modules have the
            names of Hugging Face's LFM2.
        delta_net: layers are gated DeltaNets but every `full_attention_interval`th, whose attention
            has an output gate.
        output_norm: GGUF name of the norm after the last layer.
        peft_layers: where the layers lie in the Hugging Face model that checkpoints of the family
            open as.
    """

    models: str
    activation: str = "silu"
    rope_interleaved: bool = False
    permuted: bool = False
    biases: frozenset[str] = frozenset()
    fused_qkv: bool = False
    fused_gate_up: bool = False
    qk_norm: str = NO_NORM
    pre_norms: bool = True
    post_norms: bool = False
    feed_forward_norm: str = "ffn_norm"
    multipliers: bool = False
    temperature: bool = False
    two_kinds: bool = False
    scaled_embedding: bool = False
    softcaps: tuple[float, float] | None = None
    window_pattern: int = 1
    default_epsilon: float | None = None
    local_rope_base: float | None = None
    plain_local_rope: bool = False
    global_rope: bool = True
    no_rope_every: int | None = None
    wide_scale_layers: int | None = None
    short_convolutions: bool = False
    delta_net: bool = False
    output_norm: str = "output_norm"
    peft_layers: str = TEXT_LAYERS


_QKV_BIASES = frozenset(("attn_q", "attn_k", "attn_v"))
FAMILIES = {
    "llama": Family(
        "Llama 2 and 3, Mistral, Devstral Small 1, SmolLM 1 and 2",
        rope_interleaved=True,
        permuted=True,
        biases=frozenset(
            ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
        ),
    ),
    "smollm3": Family("SmolLM 3", rope_interleaved=True, permuted=True, no_rope_every=4),
    "qwen2": Family("Qwen 2 and 2.5", biases=_QKV_BIASES),
    "qwen3": Family("Qwen 3", qk_norm=HEAD_NORM),
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
        "Gemma 3, FunctionGemma",
        activation="gelu_tanh",
        qk_norm=HEAD_NORM,
        post_norms=True,
        scaled_embedding=True,
        softcaps=(0.0, 0.0),
        window_pattern=6,
        default_epsilon=1e-6,
        local_rope_base=10000.0,
        wide_scale_layers=62,  # 27B
    ),
    "gemma4": Family(
        "Gemma 4, dense and E2B, E4B",
        activation="gelu_tanh",
        qk_norm=HEAD_NORM,
        post_norms=True,
        scaled_embedding=True,
        softcaps=(0.0, 0.0),
        default_epsilon=1e-6,
        two_kinds=True,
        peft_layers=LANGUAGE_LAYERS,
    ),
    "qwen35": Family(
        "Qwen 3.5 and 3.6, dense",
        qk_norm=HEAD_NORM,
        feed_forward_norm="post_attention_norm",
        delta_net=True,
    ),
    "lfm2": Family(
        "LFM2 and LFM2.5, dense",
        qk_norm=HEAD_NORM,
        short_convolutions=True,
        output_norm="token_embd_norm",
    ),
    "phi3": Family("Phi 3, 3.5 and 4", fused_qkv=True, fused_gate_up=True),
    "granite": Family(
        "Granite 3 and 4, dense", rope_interleaved=True, permuted=True, multipliers=True
    ),
    "olmo2": Family(
        "OLMo 2 and 3",
        qk_norm=WIDTH_NORM,
        pre_norms=False,
        post_norms=True,
        window_pattern=4,
        plain_local_rope=True,
    ),
    "glm4": Family(
        "GLM 4",
        rope_interleaved=True,
        biases=_QKV_BIASES,
        fused_gate_up=True,
        post_norms=True,
    ),
    "mistral3": Family(
        "Ministral 3, Mistral Small 3, Devstral 2",
        rope_interleaved=True,
        permuted=True,
        temperature=True,
        peft_layers=LANGUAGE_LAYERS,
    ),
    "ernie4_5": Family("ERNIE 4.5, dense", rope_interleaved=True),
    "exaone4": Family(
        "EXAONE 4",
        qk_norm=HEAD_NORM,
        pre_norms=False,
        post_norms=True,
        window_pattern=4,
        global_rope=False,
    ),
    "hunyuan-dense": Family("Hunyuan, dense", qk_norm=LATE_NORM),
    "seed_oss": Family("Seed-OSS", biases=_QKV_BIASES, feed_forward_norm="post_attention_norm"),
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
        supported = ", ".join(FAMILIES)
        raise InputError(
            f"{gguf_file.path} has the architecture {shown(name)}, which is not supported; "
            f"supported: {supported}."
        )
    return FAMILIES[name]
