"""LoRA adapters as GGUF files, the form that llama.cpp and Ollama load.

Metadata: `general.architecture` as the base's, `general.type` adapter, `adapter.type` lora, and
`adapter.lora.alpha`. Tensors: `blk.3.attn_q.weight.lora_a` [rank, columns] and `.lora_b` [rows,
rank], rows in the base GGUF's order. llama.cpp multiplies B · A by alpha / rank, with the rank of
each tensor and one alpha for all; by 1 where there is no alpha.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from forward.adapter import AdapterLayout
from forward.architecture import Architecture, permute_rows_to_hf
from forward.gguf_file import GGUFFile, shortened
from forward.quantization import QUANTIZATIONS
from lora.adapted_tensor import AdaptedTensor, adaptable
from lora.gguf_output import new_file
from shaders.errors import InputError

ADAPTER_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)


def write_gguf_adapter(
    path: Path, architecture: str, tensors: Iterable[AdaptedTensor], kind: GGMLQuantizationType
) -> None:
    """Writes an adapter for llama.cpp; what one alpha can't say is multiplied into B.

    Args:
        architecture: the base's general.architecture.
        kind: one of ADAPTER_TYPES.

    Raises:
        InputError: a number is too large for F16, or the adapter's alpha is 0.
    """
    tensors = list(tensors)
    # What alpha must be for each tensor; rsLoRA's is alpha · sqrt(rank).
    wanted = {tensor.name: tensor.scale * tensor.rank for tensor in tensors}
    alpha = Counter(wanted.values()).most_common(1)[0][0]
    if alpha == 0:
        raise InputError("The adapter's alpha is 0, which llama.cpp takes for none; it adds 0.")
    halves: dict[str, np.ndarray] = {}
    for tensor in tensors:
        factor = wanted[tensor.name] / alpha
        b = tensor.b if factor == 1 else tensor.b * np.float32(factor)
        for suffix, values in (("lora_a", tensor.a), ("lora_b", b)):
            name = f"{tensor.name}.{suffix}"
            if kind == GGMLQuantizationType.F16:
                if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
                    raise InputError(f"{name} has numbers that are too large for F16; take F32.")
                values = values.astype(np.float16)
            halves[name] = np.ascontiguousarray(values)
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, values in halves.items():
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


@dataclass(frozen=True)
class AdapterSettings:
    """What a GGUF adapter says of itself.

    Attributes:
        path: of the file.
        architecture: general.architecture of the base that it is for.
        rank: of all its tensors.
        alpha: B · A is multiplied by alpha / rank.
        tensors: the names of the base's tensors that it adapts.
    """

    path: Path
    architecture: str
    rank: int
    alpha: float
    tensors: tuple[str, ...]

    def modules(self, architecture: Architecture) -> list[str]:
        """The PEFT paths (`model.layers.0.self_attn.q_proj`) of what it adapts.

        Raises:
            InputError: it is not for this base.
        """
        if self.architecture != architecture.name:
            raise InputError(
                f"{self.path} is an adapter for the architecture {self.architecture!r}; this "
                f"model's is {architecture.name!r}."
            )
        paths = {name: path for path, _, name in adaptable(architecture)}
        for name in self.tensors:
            if name not in paths:
                raise InputError(
                    f"{self.path} adapts {name}, which can't be adapted here or which this model "
                    f"of {architecture.n_layers} layers does not have."
                )
        return [paths[name] for name in self.tensors]


def read_adapter_settings(path: Path) -> AdapterSettings:
    """Reads the header of a GGUF adapter.

    Raises:
        InputError: the file is no LoRA adapter, or its tensors are of several ranks.
    """
    return _settings(GGUFFile(path))


def load_gguf_adapter(path: Path, layout: AdapterLayout) -> np.ndarray:
    """A GGUF adapter in the layout of the device, f32 [layout.size].

    Where alpha / rank is another number than the layout's scale (a run of rsLoRA), B takes up the
    difference: the product is the file's.

    Raises:
        InputError: it is no adapter, or it does not fit the model or the layout.
    """
    file = GGUFFile(path)
    settings = _settings(file)
    architecture = layout.architecture
    given = dict(zip(settings.modules(architecture), settings.tensors, strict=True))
    wanted = layout.to_modules(np.zeros(layout.size, np.float32))
    for paths, others, why in (
        (wanted, given, "has no factors for {}, which adapter.targets and adapter.layers ask for"),
        (given, wanted, "also adapts {}, which adapter.targets and adapter.layers leave out"),
    ):
        missing = sorted(set(paths) - set(others))
        if missing:
            raise InputError(f"{path} {why.format(missing[0])} ({len(missing)} such).")
    factor = np.float32(settings.alpha / settings.rank / layout.scale)
    matrices = {name: matrix for _, matrix, name in adaptable(architecture)}
    modules = {}
    for module, name in given.items():
        a, b = (_decoded(file, f"{name}.{half}") for half in ("lora_a", "lora_b"))
        shapes = tuple(half.shape for half in wanted[module])
        if (a.shape, b.shape) != shapes:
            raise InputError(
                f"{path}: {name} has A {a.shape} and B {b.shape}; this model and adapter.rank "
                f"want {shapes[0]} and {shapes[1]}."
            )
        heads = matrices[name].permuted_heads(architecture)
        rows = b if heads is None else permute_rows_to_hf(b, heads)
        modules[module] = (a, rows if factor == 1 else rows * factor)
    return layout.from_modules(modules)


def _settings(file: GGUFFile) -> AdapterSettings:
    kinds = file.metadata.get("general.type", "model"), file.metadata.get("adapter.type")
    if kinds != ("adapter", "lora"):
        raise InputError(
            f"{file.path} is no LoRA adapter: general.type is {shortened(kinds[0])}, adapter.type "
            f"is {shortened(kinds[1])}."
        )
    names: dict[str, set[str]] = {}
    ranks: dict[int, str] = {}
    for name, tensor in file.tensors.items():
        base, _, half = name.rpartition(".")
        if half not in ("lora_a", "lora_b") or len(tensor.shape) != 2:
            raise InputError(f"{file.path}: {name} is not the A or B of a LoRA adapter.")
        names.setdefault(base, set()).add(half)
        ranks.setdefault(tensor.shape[0 if half == "lora_a" else 1], name)
    for base, halves in names.items():
        if len(halves) != 2:
            raise InputError(f"{file.path}: {base} has only one of its A and B.")
    if not names:
        raise InputError(f"{file.path} holds no tensors: the adapter changes nothing.")
    if len(ranks) > 1:
        (first, one), (second, other), *_ = ranks.items()
        raise InputError(
            f"{file.path} has tensors of several ranks ({one} {first}, {other} {second}); only "
            "one rank for all is supported."
        )
    (rank,) = ranks
    alpha = file.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise InputError(f"{file.path}: adapter.lora.alpha is {shortened(alpha)}, no number.")
    return AdapterSettings(
        path=file.path,
        architecture=str(file.metadata.get("general.architecture")),
        rank=rank,
        alpha=float(alpha) or float(rank),  # llama.cpp takes 0 for none, and then scales by 1
        tensors=tuple(names),
    )


def _decoded(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    if tensor.type not in QUANTIZATIONS:
        raise InputError(
            f"{file.path}: {name} is stored as {tensor.type.name}, which is not supported."
        )
    values = gguf.quants.dequantize(np.ascontiguousarray(tensor.data), tensor.type)
    if not np.isfinite(values).all():
        raise InputError(f"{file.path}: {name} holds NaN or infinite numbers.")
    return values.reshape(tensor.shape).astype(np.float32)
