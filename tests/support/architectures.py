"""Architectures as values: a small Llama, and a Phi with fused modules."""

from dataclasses import replace

from lora.forward.model.architecture import Architecture
from lora.forward.model.layer_spec import NO_NORM, Attention, GatedFeedForward, LayerSpec
from lora.forward.model.rope_frequencies import Rope

LLAMA_LAYER = LayerSpec(
    mixer=Attention(
        n_heads=4, n_kv_heads=2, head_size=8, rope=Rope(10000.0, 8, interleaved=True), window=None,
        scale=8**-0.5, softcap=None, qk_norm=NO_NORM, fused_modules=False, permuted=True,
    ),
    feed_forward=GatedFeedForward(64, "silu", fused_modules=False),
    hidden_size=32, norm_epsilon=1e-5, post_norms=False, biases=frozenset(),
)  # fmt: skip
LLAMA = Architecture(
    name="llama", layers=(LLAMA_LAYER,) * 3, hidden_size=32, vocab_size=322, context_length=128,
    norm_epsilon=1e-5, tied_head=True, logit_softcap=None, embedding_scale=1.0,
)  # fmt: skip
_PHI3_LAYER = replace(
    LLAMA_LAYER,
    mixer=replace(
        LLAMA_LAYER.mixer, rope=Rope(1e4, 8, interleaved=False), fused_modules=True, permuted=False
    ),
    feed_forward=replace(LLAMA_LAYER.feed_forward, fused_modules=True),
)
PHI3 = replace(LLAMA, name="phi3", layers=(_PHI3_LAYER,) * 3)
