"""What a model is made of, read out of a GGUF: one decoder, described by data.

The metadata keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A model that has
something which no field here describes is refused by name; it is never trained without it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType as Type

from forward.gguf_file import GGUFFile
from shaders.errors import InputError

MATRIX_TYPES = (Type.Q4_1, Type.Q8_0, Type.F16, Type.BF16, Type.F32)
VECTOR_TYPES = (Type.F16, Type.BF16, Type.F32)  # norms are never quantized


@dataclass(frozen=True)
class Architecture:
    """The sizes and variants of one decoder; everything that forward/ needs to record it."""

    name: str  # general.architecture, for example "llama"
    n_layers: int  # decoder layers
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width inside the feed-forward block
    n_heads: int  # query heads
    n_kv_heads: int  # key and value heads; divides n_heads
    head_size: int  # numbers in a head; n_heads · head_size need not be hidden_size
    vocab_size: int  # rows of the embedding and of the head, padding rows included
    context_length: int  # tokens in a row that the model was trained for
    norm_epsilon: float  # added to the mean square in RMSNorm
    rope_base: float  # theta: pair j turns by position · rope_base^(-2j / rope_dimensions)
    rope_dimensions: int  # leading numbers of a head that are rotated; even
    rope_interleaved: bool  # pairs are (2j, 2j+1), else (j, j + rope_dimensions/2)
    tied_head: bool  # the head is token_embd.weight itself; there is no output.weight

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.n_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key heads (or all value heads) together."""
        return self.n_kv_heads * self.head_size

    @classmethod
    def from_gguf(cls, gguf_file: GGUFFile) -> Architecture:
        """Reads the metadata and checks every tensor's name, shape and type against it.

        Raises:
            InputError: the file is no complete model, or the model has something that is not
                supported; the message names it.
        """
        metadata = _Metadata(gguf_file)
        family = _family(gguf_file)
        metadata.check_nothing_unsupported()
        hidden_size = metadata.size("embedding_length", multiple_of=4)
        n_heads = metadata.size("attention.head_count")
        head_size = metadata.size("attention.key_length", hidden_size // n_heads, multiple_of=4)
        architecture = cls(
            name=metadata.name,
            n_layers=metadata.size("block_count"),
            hidden_size=hidden_size,
            intermediate_size=metadata.size("feed_forward_length", multiple_of=4),
            n_heads=n_heads,
            n_kv_heads=metadata.size("attention.head_count_kv", n_heads),
            head_size=head_size,
            vocab_size=_vocab_size(gguf_file, metadata),
            context_length=metadata.size("context_length"),
            norm_epsilon=metadata.positive_number("attention.layer_norm_rms_epsilon"),
            rope_base=metadata.positive_number("rope.freq_base", 10000.0),
            rope_dimensions=metadata.size("rope.dimension_count", head_size, multiple_of=2),
            rope_interleaved=family.rope_interleaved,
            tied_head="output.weight" not in gguf_file.tensors,
        )
        _check_sizes(architecture, metadata)
        _check_tensors(architecture, gguf_file)
        return architecture


@dataclass(frozen=True)
class _Family:
    """What general.architecture implies and the metadata doesn't say."""

    rope_interleaved: bool


_FAMILIES = {"llama": _Family(rope_interleaved=True)}


@dataclass(frozen=True)
class AdaptableMatrix:
    """A matrix of every layer that LoRA can adapt, under PEFT's name and under GGUF's.

    Attributes:
        module: PEFT's name for it, as in the config's `adapter.targets`.
        peft_parent: the module that holds it within a layer.
        gguf_name: its name within a layer of the GGUF.
        in_field, out_field: the field of Architecture that is its number of columns, of rows.
        heads_field: the field that counts its heads where rope turns its output, else None.
    """

    module: str
    peft_parent: str
    gguf_name: str
    in_field: str
    out_field: str
    heads_field: str | None = None

    def tensor_name(self, layer: int) -> str:
        """Its tensor in the GGUF, for example `blk.3.attn_q.weight`."""
        return f"blk.{layer}.{self.gguf_name}.weight"

    def peft_path(self, layer: int) -> str:
        """Its module in the Hugging Face model, e.g. `model.layers.3.self_attn.q_proj`."""
        return f"model.layers.{layer}.{self.peft_parent}.{self.module}"

    def in_size(self, architecture: Architecture) -> int:
        """Its number of columns: A is [rank, in_size]."""
        return int(getattr(architecture, self.in_field))

    def out_size(self, architecture: Architecture) -> int:
        """Its number of rows: B is [out_size, rank]."""
        return int(getattr(architecture, self.out_field))

    def permuted_heads(self, architecture: Architecture) -> int | None:
        """The heads within which the GGUF permutes its rows; None where the order is PEFT's."""
        if self.heads_field is None or not architecture.rope_interleaved:
            return None
        return int(getattr(architecture, self.heads_field))


ADAPTABLE_MATRICES = {
    matrix.module: matrix
    for matrix in (
        AdaptableMatrix("q_proj", "self_attn", "attn_q", "hidden_size", "query_size", "n_heads"),
        AdaptableMatrix("k_proj", "self_attn", "attn_k", "hidden_size", "kv_size", "n_kv_heads"),
        AdaptableMatrix("v_proj", "self_attn", "attn_v", "hidden_size", "kv_size"),
        AdaptableMatrix("o_proj", "self_attn", "attn_output", "query_size", "hidden_size"),
        AdaptableMatrix("gate_proj", "mlp", "ffn_gate", "hidden_size", "intermediate_size"),
        AdaptableMatrix("up_proj", "mlp", "ffn_up", "hidden_size", "intermediate_size"),
        AdaptableMatrix("down_proj", "mlp", "ffn_down", "intermediate_size", "hidden_size"),
    )
}


def permute_rows_to_gguf(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Puts rows in the Hugging Face order of q and k into the order of a llama GGUF.

    Within a head of size d, GGUF row 2j + h is Hugging Face row h·d/2 + j, h in {0, 1}: rope
    then turns neighbours instead of halves (llama.cpp, convert_hf_to_gguf.py, `permute`).

    Args:
        array: [n_heads · d, ...]: a weight, a bias, or the B of an adapter.
        n_heads: n_heads for q, n_kv_heads for k.

    Returns:
        A new array of the same shape.
    """
    halves = array.reshape(n_heads, 2, _half_head(array, n_heads), *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def permute_rows_to_hf(array: np.ndarray, n_heads: int) -> np.ndarray:
    """Undoes `permute_rows_to_gguf`: from the order of a llama GGUF to Hugging Face's.

    Args:
        array: [n_heads · d, ...].
        n_heads: n_heads for q, n_kv_heads for k.

    Returns:
        A new array of the same shape.
    """
    pairs = array.reshape(n_heads, _half_head(array, n_heads), 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _half_head(array: np.ndarray, n_heads: int) -> int:
    if array.shape[0] % (2 * n_heads):
        raise ValueError(f"{array.shape[0]} rows are not {n_heads} heads of an even size")
    return array.shape[0] // (2 * n_heads)


# What a key must say (or be absent) for the decoder to be right, without the architecture prefix.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scale_linear": (1.0,),
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "use_parallel_residual": (False,),
}


class _Metadata:
    """The file's metadata under the architecture's prefix, each value checked as it is read."""

    def __init__(self, gguf_file: GGUFFile) -> None:
        self.path = gguf_file.path
        self.values = gguf_file.metadata
        self.name = str(self.values.get("general.architecture"))

    def check_nothing_unsupported(self) -> None:
        for key, neutral in _NEUTRAL_VALUES.items():
            value = self.values.get(f"{self.name}.{key}", neutral[0])
            if value not in neutral:
                raise InputError(
                    f"{self.path}: {self.name}.{key} is {value!r}, which is not supported yet; "
                    f"supported is {' or '.join(map(repr, neutral))}."
                )
        n_parts = self.values.get("split.count", 1)
        if n_parts not in (0, 1):
            raise InputError(
                f"{self.path} is one of {n_parts} parts of a model. Join them with "
                "`llama-gguf-split --merge` first."
            )

    def size(self, key: str, default: int | None = None, *, multiple_of: int = 1) -> int:
        value = self._value(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise InputError(
                f"{self.path}: {self.name}.{key} is {_shortened(value)}; one whole number above "
                "0 is supported."
            )
        if value % multiple_of:
            raise InputError(
                f"{self.path}: {self.name}.{key} is {value}; supported are multiples of "
                f"{multiple_of}."
            )
        return value

    def positive_number(self, key: str, default: float | None = None) -> float:
        value = self._value(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
            raise InputError(
                f"{self.path}: {self.name}.{key} is {_shortened(value)}; a number above 0 is "
                "expected."
            )
        return float(value)

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(f"{self.name}.{key}", default)
        if value is None:
            raise InputError(f"{self.path} lacks the metadata key {self.name}.{key}.")
        return value


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _family(gguf_file: GGUFFile) -> _Family:
    kind = gguf_file.metadata.get("general.type", "model")
    if kind != "model":
        raise InputError(f"{gguf_file.path} holds a GGUF {kind!r}; a model is expected.")
    name = gguf_file.metadata.get("general.architecture")
    if name is None:
        raise InputError(f"{gguf_file.path} lacks the metadata key general.architecture.")
    if name not in _FAMILIES:
        raise InputError(
            f"{gguf_file.path} has the architecture {name!r}, which is not supported yet; "
            f"supported: {', '.join(_FAMILIES)} (Llama, Mistral, SmolLM2)."
        )
    return _FAMILIES[name]


def _vocab_size(gguf_file: GGUFFile, metadata: _Metadata) -> int:
    embedding = gguf_file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{gguf_file.path} lacks the tensor 'token_embd.weight'.")
    vocab_size = metadata.size("vocab_size", embedding.shape[0])
    n_tokens = len(gguf_file.metadata.get("tokenizer.ggml.tokens", ()))
    if n_tokens > vocab_size:
        raise InputError(
            f"{gguf_file.path}: its tokenizer has {n_tokens:,} tokens, its vocabulary only "
            f"{vocab_size:,} rows."
        )
    return vocab_size


def _check_sizes(architecture: Architecture, metadata: _Metadata) -> None:
    """Checks what ties the sizes together."""
    if architecture.n_heads % architecture.n_kv_heads:
        raise InputError(
            f"{metadata.path}: {architecture.n_heads} heads cannot share "
            f"{architecture.n_kv_heads} key and value heads evenly."
        )
    if architecture.rope_dimensions > architecture.head_size:
        raise InputError(
            f"{metadata.path}: {metadata.name}.rope.dimension_count is "
            f"{architecture.rope_dimensions}, more than the head size {architecture.head_size}."
        )
    value_length = metadata.size("attention.value_length", architecture.head_size)
    if value_length != architecture.head_size:
        raise InputError(
            f"{metadata.path}: {metadata.name}.attention.value_length is {value_length}, but the "
            f"keys' is {architecture.head_size}; different sizes are not supported."
        )


def _expected_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model with its shape in numpy order."""
    hidden_size = architecture.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (architecture.vocab_size, hidden_size),
        "output_norm.weight": (hidden_size,),
    }
    if not architecture.tied_head:
        shapes["output.weight"] = (architecture.vocab_size, hidden_size)
    for layer in range(architecture.n_layers):
        shapes[f"blk.{layer}.attn_norm.weight"] = (hidden_size,)
        shapes[f"blk.{layer}.ffn_norm.weight"] = (hidden_size,)
        for matrix in ADAPTABLE_MATRICES.values():
            shape = (matrix.out_size(architecture), matrix.in_size(architecture))
            shapes[matrix.tensor_name(layer)] = shape
    return shapes


# Tensors that other models of a supported architecture have, and what they mean.
_UNSUPPORTED_TENSORS = (
    (r"rope_freqs\.weight|rope_factors_\w+\.weight", "rope scaling (Llama 3.1 and later)"),
    (r".*_exps.*|.*ffn_gate_inp.*", "experts"),
    (r".*\.bias", "biases"),
)


def _check_tensors(architecture: Architecture, gguf_file: GGUFFile) -> None:
    """Checks that the file holds exactly the tensors that the decoder reads."""
    # A damaged block_count of billions must not become a dictionary of as many names.
    if architecture.n_layers > len(gguf_file.tensors):
        raise InputError(
            f"{gguf_file.path} claims {architecture.n_layers} layers but holds only "
            f"{len(gguf_file.tensors)} tensors."
        )
    shapes = _expected_shapes(architecture)
    for name in gguf_file.tensors:
        if name not in shapes:
            raise _unsupported_tensor(gguf_file, name)
    for name, shape in shapes.items():
        tensor = gguf_file.tensors.get(name)
        if tensor is None:
            raise InputError(f"{gguf_file.path} lacks the tensor {name!r} of shape {list(shape)}.")
        if tensor.shape != shape:
            raise InputError(
                f"{gguf_file.path}: tensor {name!r} has the shape {list(tensor.shape)}; by the "
                f"metadata it must be {list(shape)}."
            )
        types = MATRIX_TYPES if len(shape) > 1 else VECTOR_TYPES
        if tensor.type not in types:
            raise InputError(
                f"{gguf_file.path}: tensor {name!r} is stored as {tensor.type.name}, which is not "
                f"supported yet; supported: {', '.join(kind.name for kind in types)}."
            )


def _unsupported_tensor(gguf_file: GGUFFile, name: str) -> InputError:
    meaning = next(
        (what for pattern, what in _UNSUPPORTED_TENSORS if re.fullmatch(pattern, name)), None
    )
    if meaning is None:
        return InputError(
            f"{gguf_file.path} holds the tensor {name!r}, which the architecture "
            f"{gguf_file.metadata['general.architecture']!r} as supported here does not have."
        )
    return InputError(
        f"{gguf_file.path} holds the tensor {name!r}: a model with {meaning} is not supported yet."
    )
