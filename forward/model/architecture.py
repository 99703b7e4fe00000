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
from lora.forward.model.adaptable import (
    FUSED_QKV,
    HEAD,
    TEXT_LAYERS,
    AdaptableMatrix,
)
from lora.forward.model.families import family_of
from lora.forward.model.layer_spec import OUTPUT_SCALE, LayerSpec
from lora.forward.model.model_tensors import (
    check_tensors,
    read_scale,
    scales_adapters,
    unused_tensors,
)
from lora.forward.model.read_layers import (
    per_layer_size,
    read_layers,
    read_multipliers,
    read_softcaps,
)
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
        logit_divisor: logits are divided by it.
        scaled: tensors whose products are multiplied by a number of their own, each with that,
            where llama.cpp does so with an adapter's share, too.
        unused: what tensors of the file are that text doesn't need, each with how many.
        per_layer_size: numbers that a token has for every layer beside its embedding; 0 for none.
        output_norm: GGUF name of the norm after the last layer.
        peft_layers: where the layers lie in the Hugging Face model that its checkpoints open as.
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
    logit_divisor: float = 1.0
    peft_layers: str = TEXT_LAYERS
    scaled: tuple[tuple[str, float], ...] = ()
    unused: tuple[tuple[str, int], ...] = ()
    per_layer_size: int = 0
    output_norm: str = "output_norm"

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

    @cached_property
    def donors(self) -> Mapping[int, int]:
        """The layers whose keys and values others take, each with the last of those."""
        found = ((spec.keys_of, layer) for layer, spec in enumerate(self.layers))
        return {donor: layer for donor, layer in found if donor is not None}

    @property
    def tables(self) -> frozenset[str]:
        """Tensors of two dimensions that are no matrices of products, and never quantized."""
        return frozenset(
            f"blk.{layer}.{name}"
            for layer, spec in enumerate(self.layers)
            for block in spec.blocks
            for name in block.tables
        )

    @property
    def recurrent(self) -> bool:
        """Whether a text leaves states behind that can't be shortened token by token."""
        return any(spec.mixer.recurrent for spec in self.layers)

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
        multipliers = read_multipliers(metadata, family)
        layers = read_layers(gguf_file, metadata, family)
        keyless = {layer for layer, spec in enumerate(layers) if spec.keys_of is not None}
        unused = unused_tensors(gguf_file, len(layers), keyless)
        architecture = cls(
            name=metadata.name,
            layers=layers,
            hidden_size=hidden_size,
            vocab_size=_vocab_size(gguf_file, metadata),
            context_length=metadata.size("context_length"),
            norm_epsilon=layers[-1].norm_epsilon,
            tied_head="output.weight" not in gguf_file.tensors,
            logit_softcap=softcaps[1],
            embedding_scale=hidden_size**0.5
            if family.scaled_embedding
            else multipliers.embedding / multipliers.residual,
            logit_divisor=multipliers.logits,
            peft_layers=family.peft_layers,
            scaled=_scaled_tensors(gguf_file),
            unused=tuple((what, len(names)) for what, names in unused.items()),
            per_layer_size=per_layer_size(metadata, family),
            output_norm=family.output_norm,
        )
        left_alone = [name for names in unused.values() for name in names]
        check_tensors(
            architecture.tensor_shapes(), gguf_file, frozenset(left_alone), architecture.tables
        )
        return architecture

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the decoder reads, with its shape in numpy order."""
        hidden = (self.hidden_size,)
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd.weight": (self.vocab_size, self.hidden_size),
            f"{self.output_norm}.weight": hidden,
        }
        if not self.tied_head:
            shapes["output.weight"] = (self.vocab_size, self.hidden_size)
        if self.per_layer_size:
            width = self.n_layers * self.per_layer_size
            shapes["per_layer_token_embd.weight"] = (self.vocab_size, width)
            shapes["per_layer_model_proj.weight"] = (width, self.hidden_size)
            shapes["per_layer_proj_norm.weight"] = (self.per_layer_size,)
        for layer, spec in enumerate(self.layers):
            blk = f"blk.{layer}."
            shapes |= {f"{blk}{name}.weight": hidden for name in spec.norms}
            if spec.output_scale:
                shapes[f"{blk}{OUTPUT_SCALE}.weight"] = (1,)
            for block in spec.blocks:
                for name, width in block.vectors.items():
                    shapes[f"{blk}{name}.weight"] = (width,)
                shapes |= {blk + name: shape for name, shape in block.tables.items()}
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
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "use_parallel_residual": (False,),
}


def _check_nothing_unsupported(metadata: Metadata) -> None:
    n_experts = metadata.get("expert_count", 0)
    if n_experts != 0:
        raise InputError(
            f"{metadata.path}: {metadata.name}.expert_count is {n_experts}: a mixture of experts "
            "is not supported."
        )
    for key, neutral in _NEUTRAL_VALUES.items():
        metadata.require(key, *neutral)


def _scaled_tensors(gguf_file: GGUFFile) -> tuple[tuple[str, float], ...]:
    scales = ((name, read_scale(name, gguf_file)) for name in gguf_file.tensors)
    return tuple(
        (name, scale) for name, scale in scales if scale is not None and scales_adapters(name)
    )


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
