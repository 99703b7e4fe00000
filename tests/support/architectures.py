"""Architectures as values: a small Llama, and a Phi with fused matrices."""

from dataclasses import replace

from lora.forward.model.architecture import Architecture, LayerKind
from lora.forward.model.rope_frequencies import Rope

LLAMA = Architecture(
    name="llama", n_layers=3, hidden_size=32, intermediate_size=64, n_heads=4, n_kv_heads=2,
    head_size=8, vocab_size=322, context_length=128, norm_epsilon=1e-5,
    layer_kinds=(LayerKind(None, Rope(10000.0, 8, interleaved=True)),) * 3, tied_head=True,
    activation="silu", attention_scale=8**-0.5, attention_softcap=None, logit_softcap=None,
    embedding_scale=1.0, qk_norm=False, post_norms=False, biases=frozenset(), fused=False,
    permuted=True,
)  # fmt: skip
PHI3 = replace(
    LLAMA, name="phi3", layer_kinds=(LayerKind(None, Rope(1e4, 8, interleaved=False)),) * 3,
    fused=True, permuted=False,
)  # fmt: skip
