"""Checks that a GGUF holds exactly the tensors that the decoder reads."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

from lora.forward.gguf.file import GGUFFile, GGUFTensor
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.model.rope_frequencies import ROPE_TENSORS, read_vector
from lora.shaders.errors import InputError

VECTOR_TYPES = (Type.F16, Type.BF16, Type.F32)  # norms and biases are never quantized

# Tensors that other models of a supported architecture have, and what they mean.
_UNSUPPORTED_TENSORS = (
    (r".*_exps.*|.*ffn_gate_inp.*", "experts"),
    (r".*\.bias", "biases in these places"),
    (r".*\.scale", "weight scales in these places"),
)


_MAY_HAVE_SCALE = re.compile(r"blk\.\d+\.(attn_(q|k|v|output)|ffn_(gate|up|down))\.weight")

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


def scale_name(name: str, gguf_file: GGUFFile) -> str | None:
    """The tensor of one number that a matrix's products are multiplied by; None without one."""
    scale = f"{name.removesuffix('.weight')}.scale"
    return scale if _MAY_HAVE_SCALE.fullmatch(name) and scale in gguf_file.tensors else None


def scales_adapters(name: str) -> bool:
    """Whether llama.cpp multiplies an adapter's share by a tensor's scale, too.

    It does in feed-forward blocks; elsewhere it adds that share afterwards. (Tried with xllamacpp
    2026-10: tests/parity/test_scales.py.)
    """
    return ".ffn_" in name


def read_scale(name: str, gguf_file: GGUFFile) -> float | None:
    """That number; None where a matrix has none."""
    scale = scale_name(name, gguf_file)
    if scale is None:
        return None
    return float(read_vector(gguf_file, gguf_file.tensors[scale]).reshape(-1)[0])


def scaled_tensor(name: str, gguf_file: GGUFFile, *, holds_data: bool) -> GGUFTensor:
    """A matrix as it stands in products: as F32, which no scale rounds, where it has a scale.

    Args:
        name: of the tensor.
        gguf_file: that holds it.
        holds_data: False where only its size is asked for.
    """
    tensor, scale = gguf_file.tensors[name], read_scale(name, gguf_file)
    if scale is None:
        return tensor
    rows, columns = tensor.shape
    data = np.broadcast_to(np.uint8(0), (rows, 4 * columns))
    if holds_data:
        values = quants.dequantize(np.ascontiguousarray(tensor.data), tensor.type)
        exact = np.asarray(values, np.float32).reshape(rows, columns) * np.float32(scale)
        data = exact.view(np.uint8)
    return replace(tensor, type=Type.F32, data=data)


def check_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    gguf_file: GGUFFile,
    unused: Collection[str] = (),
    tables: Collection[str] = (),
) -> None:
    """Checks names, shapes and types of what the decoder reads.

    Args:
        shapes: every tensor of the decoder, in numpy order.
        gguf_file: of the model.
        unused: names of tensors that may be there, too.
        tables: those of `shapes` that are no matrices of products.

    Raises:
        InputError: a tensor is missing, is of another shape, of a type that is not supported, or
            is one that the decoder would not read.
    """
    scales = {scale_name(name, gguf_file) for name, shape in shapes.items() if len(shape) == 2}
    shapes = dict(shapes) | {name: (1,) for name in scales if name is not None}
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
        is_matrix = len(shape) > 1 and name not in tables
        types = tuple(QUANTIZATIONS) if is_matrix else VECTOR_TYPES
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
