"""LoRA adapters as GGUF files, the form that llama.cpp and Ollama load.

Metadata: `general.architecture` as the base's, `general.type` adapter, `adapter.type` lora, and
`adapter.lora.alpha`. Tensors: `blk.3.attn_q.weight.lora_a` [rank, columns] and `.lora_b` [rows,
rank], rows in the base GGUF's order. llama.cpp multiplies B · A by alpha / rank, with the rank of
each tensor and one alpha for all; by 1 where there is no alpha.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from lora.adapters.adapted_tensor import AdaptedTensor, adaptable
from lora.adapters.saved_factors import SavedFactors, most_common, pack
from lora.adapters.saved_tokens import put_tokens
from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.model.row_order import to_hf
from lora.shaders.errors import InputError
from lora.shaders.untrusted import as_f32, reading, shown
from lora.storage.gguf_output import new_file

ADAPTER_TYPES = (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
_SUFFIXES = ("lora_a", "lora_b")  # of the tensors' names, A's and B's


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
    alpha = most_common(wanted.values())
    if not alpha:
        raise InputError("The adapter's alpha is 0, which llama.cpp takes for none; it adds 0.")
    arrays: dict[str, np.ndarray] = {}
    for tensor in tensors:
        factor = wanted[tensor.name] / alpha
        b = tensor.b if factor == 1 else tensor.b * np.float32(factor)
        for suffix, values in zip(_SUFFIXES, (tensor.a, b), strict=True):
            name = f"{tensor.name}.{suffix}"
            if kind == GGMLQuantizationType.F16:
                if np.abs(values).max(initial=0) > np.finfo(np.float16).max:
                    raise InputError(f"{name} has numbers that are too large for F16; take F32.")
                values = values.astype(np.float16)
            arrays[name] = np.ascontiguousarray(values)
    with new_file(path) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for name, values in arrays.items():
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
        alpha: B · A is multiplied by alpha / rank; None: by 1.
        ranks: by the names of the base's tensors that it adapts.
    """

    path: Path
    architecture: str
    alpha: float | None
    ranks: Mapping[str, int]

    @property
    def rank(self) -> int:
        """The highest rank."""
        return max(self.ranks.values())

    def scale(self, tensor: str) -> float:
        """What B · A of a tensor is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.ranks[tensor]

    def modules(self, architecture: Architecture) -> dict[str, str]:
        """The tensors that it adapts by PEFT path (`model.layers.0.self_attn.q_proj`).

        Raises:
            InputError: it is not for this base.
        """
        if self.architecture != architecture.name:
            raise InputError(
                f"{self.path} is an adapter for the architecture {self.architecture!r}; this "
                f"model's is {architecture.name!r}."
            )
        places = list(adaptable(architecture))
        known = {place.tensor for place in places}
        for name in self.ranks:
            if name not in known:
                raise InputError(
                    f"{self.path} adapts {name}, which can't be adapted here or which this model "
                    f"of {architecture.n_layers} layers does not have."
                )
        return {place.path: place.tensor for place in places if place.tensor in self.ranks}


def read_adapter_settings(path: Path) -> AdapterSettings:
    """Reads the header of a GGUF adapter.

    Raises:
        InputError: the file is no LoRA adapter.
    """
    file = GGUFFile(path)
    with reading(path, "a LoRA adapter"):
        return _settings(file)


def load_gguf_adapter(path: Path, layout: AdapterLayout) -> np.ndarray:
    """A GGUF adapter in the layout of the device, f32 [layout.size]; see `saved_factors.pack`.

    Raises:
        InputError: it is no adapter, or it does not fit the model or the layout.
    """
    file = GGUFFile(path)
    settings = _settings(file)
    architecture = layout.architecture
    places = {place.path: place for place in adaptable(architecture)}
    modules = {}
    for module, name in settings.modules(architecture).items():
        a, b = (_decoded(file, f"{name}.{suffix}") for suffix in _SUFFIXES)
        place = places[module]
        n_rows, n_columns = (
            place.matrix.out_size(place.holder),
            place.matrix.in_size(place.holder),
        )
        if any(other.first_row for other in places.values() if other.tensor == name):
            if len(b) != place.tensor_rows:
                raise InputError(
                    f"{path}: B of {name} has {len(b)} rows; this model's has {place.tensor_rows}."
                )
            b = b[place.first_row : place.first_row + n_rows]
        if len(b) == n_rows and a.shape[1] == n_columns:  # else it is refused below
            b = to_hf(b, place.matrix.row_order(place.holder))
            a = to_hf(a.T, place.matrix.column_order(place.holder)).T
        scale = settings.scale(name) * dict(architecture.scaled).get(name, 1.0)
        modules[module] = SavedFactors(a, b, scale)
    flat = pack(path, modules, layout)
    put_tokens(path, None, layout, flat)
    return flat


def _settings(file: GGUFFile) -> AdapterSettings:
    kinds = file.metadata.get("general.type", "model"), file.metadata.get("adapter.type")
    if kinds != ("adapter", "lora"):
        raise InputError(
            f"{file.path} is no LoRA adapter: general.type is {shown(kinds[0])}, adapter.type "
            f"is {shown(kinds[1])}."
        )
    ranks: dict[str, dict[str, int]] = {}
    for name, tensor in file.tensors.items():
        base, _, suffix = name.rpartition(".")
        if suffix not in _SUFFIXES or len(tensor.shape) != 2:
            raise InputError(f"{file.path}: {name} is not the A or B of a LoRA adapter.")
        ranks.setdefault(base, {})[suffix] = tensor.shape[0 if suffix == "lora_a" else 1]
    for base, both in ranks.items():
        if len(both) != 2:
            raise InputError(f"{file.path}: {base} has only one of its A and B.")
        if len(set(both.values())) != 1:
            raise InputError(
                f"{file.path}: A of {base} has the rank {both['lora_a']}, B {both['lora_b']}."
            )
    if not ranks:
        raise InputError(f"{file.path} holds no tensors: the adapter changes nothing.")
    given = file.metadata.get("adapter.lora.alpha", 0.0)
    alpha = as_f32(given)
    if alpha is None:
        raise InputError(
            f"{file.path}: adapter.lora.alpha is {shown(given)}, no number of the range of 32 bits."
        )
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(
            f"{file.path}: general.architecture is {shown(architecture)}, no name of one."
        )
    return AdapterSettings(
        path=file.path,
        architecture=architecture,
        alpha=alpha or None,  # llama.cpp takes 0 for none
        ranks={base: both["lora_a"] for base, both in ranks.items()},
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
