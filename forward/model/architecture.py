"""What a model is made of, read out of a GGUF: one decoder, described by data.

The metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A model that has
something which no field here describes is refused by name; it is never trained without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.metadata import Metadata
from lora.forward.model.families import family_of
from lora.forward.model.layer_spec import FUSED_QKV, HEAD, AdaptableMatrix, LayerSpec
from lora.forward.model.model_tensors import check_tensors
from lora.forward.model.read_layers import read_layers, read_softcaps
from lora.shaders.errors import InputError
from lora.shaders.untrusted import reading


@dataclass(frozen=True)
class Architecture:
    """The sizes and variants of one decoder; everything that forward/ needs to record it.

    Attributes:
        name: general.architecture, for example "llama".
        layers: the decoder layers, from the embedding up.
        hidden_size: width of the residual stream.
        vocab_size: rows of the embedding and of the head, padding rows included.
        context_length: tokens in a row that the model was trained for.
        norm_epsilon: added to the mean square in the last RMSNorm.
        tied_head: the head is token_embd.weight itself; there is no output.weight.
        logit_softcap: logits s become softcap · tanh(s / softcap); None for no cap.
        embedding_scale: embeddings are multiplied by it.
    """

    name: str
    layers: tuple[LayerSpec, ...]
    hidden_size: int
    vocab_size: int
    context_length: int
    norm_epsilon: float
    tied_head: bool
    logit_softcap: float | None
    embedding_scale: float

    @property
    def n_layers(self) -> int:
        """Decoder layers; in keys also the number of what comes after them, the head."""
        return len(self.layers)

    @property
    def logits_size(self) -> int:
        """Width of the logits on the device: the vocabulary, padded to whole vec4."""
        return -(-self.vocab_size // 4) * 4

    @cached_property
    def matrices(self) -> Mapping[str, AdaptableMatrix]:
        """Its matrices that LoRA can adapt, by PEFT's names, the head last."""
        found = (m for spec in self.layers for group in spec.groups.values() for m in group)
        return {m.module: m for m in (*found, HEAD)}

    def holder(self, layer: int) -> LayerSpec | Architecture:
        """What has the sizes of a layer's matrices; of the head's, for the layer n_layers."""
        return self.layers[layer] if layer < self.n_layers else self

    def tensors_of(self, layer: int, group: str) -> tuple[str, ...]:
        """The names of the file's tensors that hold a group of a layer's matrices, in order."""
        spec = self.layers[layer]
        if group == "qkv" and spec.fused_tensor:
            return (f"blk.{layer}.{FUSED_QKV}.weight",)
        return tuple(matrix.tensor_name(layer) for matrix in spec.groups[group])

    def place_of(self, layer: int, matrix: AdaptableMatrix) -> tuple[str, int]:
        """The file's tensor that holds a layer's matrix, and the first of its rows there."""
        spec = self.layers[layer]
        tensors, members = self.tensors_of(layer, matrix.group), spec.groups[matrix.group]
        if len(tensors) == len(members):
            return matrix.tensor_name(layer), 0
        before = members[: members.index(matrix)]
        return tensors[0], sum(member.out_size(spec) for member in before)

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile) -> Architecture:
        """Reads the metadata and checks every tensor's name, shape and type against it.

        Raises:
            InputError: the file is no complete model, or the model has something that is not
                supported; the message names it.
        """
        with reading(gguf_file.path, "a model"):
            return cls._read(gguf_file)

    @classmethod
    def _read(cls, gguf_file: GGUFFile) -> Architecture:
        family = family_of(gguf_file)
        metadata = Metadata(gguf_file)
        _check_nothing_unsupported(metadata)
        hidden_size = metadata.size("embedding_length", multiple_of=4)
        softcaps = read_softcaps(metadata, family)
        layers = read_layers(gguf_file, metadata, family)
        architecture = cls(
            name=metadata.name,
            layers=layers,
            hidden_size=hidden_size,
            vocab_size=_vocab_size(gguf_file, metadata),
            context_length=metadata.size("context_length"),
            norm_epsilon=layers[-1].norm_epsilon,
            tied_head="output.weight" not in gguf_file.tensors,
            logit_softcap=softcaps[1],
            embedding_scale=hidden_size**0.5 if family.scaled_embedding else 1.0,
        )
        check_tensors(architecture.tensor_shapes(), gguf_file)
        return architecture

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the decoder reads, with its shape in numpy order."""
        hidden = (self.hidden_size,)
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, self.hidden_size),
            "output_norm.weight": hidden,
        }
        if not self.tied_head:
            shapes["output.weight"] = (self.vocab_size, self.hidden_size)
        for layer, spec in enumerate(self.layers):
            blk = f"blk.{layer}."
            shapes[blk + "attn_norm.weight"] = hidden
            shapes[blk + "ffn_norm.weight"] = hidden
            for block in (spec.mixer, spec.feed_forward):
                for name, width in block.vectors.items():
                    shapes[f"{blk}{name}.weight"] = (width,)
            if spec.post_norms:
                shapes[blk + "post_attention_norm.weight"] = hidden
                shapes[blk + "post_ffw_norm.weight"] = hidden
            for group, members in spec.groups.items():
                for matrix in members:
                    rows = matrix.out_size(spec)
                    if not (group == "qkv" and spec.fused_tensor):
                        shapes[matrix.tensor_name(layer)] = (rows, matrix.in_size(spec))
                    if matrix.gguf_name in spec.biases:
                        shapes[f"{blk}{matrix.gguf_name}.bias"] = (rows,)
            if spec.fused_tensor:
                rows = sum(matrix.out_size(spec) for matrix in spec.groups["qkv"])
                shapes[f"{blk}{FUSED_QKV}.weight"] = (rows, self.hidden_size)
                if FUSED_QKV in spec.biases:
                    shapes[f"{blk}{FUSED_QKV}.bias"] = (rows,)
        return shapes


# What a key must say (or be absent) for the decoder to be right, without the architecture prefix.
_NEUTRAL_VALUES: dict[str, tuple[object, ...]] = {
    "expert_count": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}


def _check_nothing_unsupported(metadata: Metadata) -> None:
    for key, neutral in _NEUTRAL_VALUES.items():
        metadata.require(key, *neutral)


def _vocab_size(gguf_file: GGUFFile, metadata: Metadata) -> int:
    embedding = gguf_file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{gguf_file.path} lacks the tensor 'token_embd.weight'.")
    vocab_size = metadata.size("vocab_size", embedding.shape[0])
    tokens = gguf_file.metadata.get("tokenizer.ggml.tokens")
    n_tokens = len(tokens) if isinstance(tokens, list) else 0
    if n_tokens > vocab_size:
        raise InputError(
            f"{gguf_file.path}: its tokenizer has {n_tokens:,} tokens, its vocabulary only "
            f"{vocab_size:,} rows."
        )
    return vocab_size
