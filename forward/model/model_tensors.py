"""Checks that a GGUF holds exactly the tensors that the decoder reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from gguf import GGMLQuantizationType as Type

from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.model.rope_frequencies import ROPE_TENSORS
from lora.shaders.errors import InputError

VECTOR_TYPES = (Type.F16, Type.BF16, Type.F32)  # norms and biases are never quantized

# Tensors that other models of a supported architecture have, and what they mean.
_UNSUPPORTED_TENSORS = (
    (r".*_exps.*|.*ffn_gate_inp.*", "experts"),
    (r".*\.bias", "biases in these places"),
    (r".*\.(attn_q|attn_k|attn_v|attn_output|ffn_\w+)\.scale", "weight scales of their own"),
)


# Encoders of images and sound, which some converters put into the same file.
_OF_OTHER_MODALITIES = re.compile(r"(v|mm|a)\..*")


def unused_tensors(
    gguf_file: GGUFFile, n_layers: int, keyless: Collection[int]
) -> Mapping[str, Sequence[str]]:
    """Tensors that a file may hold and text doesn't need, by what they are.

    They are left alone in training, and copied into merged files.

    Args:
        gguf_file: of the model.
        n_layers: what follows them predicts further tokens (nextn_predict_layers).
        keyless: layers that take other layers' keys and values.
    """
    found: dict[str, list[str]] = {}
    for name in gguf_file.tensors:
        block = re.match(r"blk\.(\d+)\.(.*)", name)
        if _OF_OTHER_MODALITIES.fullmatch(name):
            found.setdefault("images and sound", []).append(name)
        elif block and int(block[1]) >= n_layers:
            found.setdefault("predicting further tokens (MTP)", []).append(name)
        elif block and int(block[1]) in keyless and re.match(r"attn_(k|v|k_norm)\.", block[2]):
            found.setdefault("keys and values that no layer takes", []).append(name)
    return found


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]], gguf_file: GGUFFile, unused: Collection[str] = ()
) -> None:
    """Checks names, shapes and types of what the decoder reads.

    Args:
        shapes: every tensor of the decoder, in numpy order.
        gguf_file: of the model.
        unused: names of tensors that may be there, too.

    Raises:
        InputError: a tensor is missing, is of another shape, of a type that is not supported, or
            is one that the decoder would not read.
    """
    for name in gguf_file.tensors:
        if name not in shapes and name not in ROPE_TENSORS and name not in unused:
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
        types = tuple(QUANTIZATIONS) if len(shape) > 1 else VECTOR_TYPES
        if tensor.type not in types:
            raise InputError(
                f"{gguf_file.path}: tensor {name!r} is stored as {tensor.type.name}, which is not "
                f"supported; supported: {', '.join(kind.name for kind in types)}."
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
        f"{gguf_file.path} holds the tensor {name!r}: a model with {meaning} is not supported."
    )
