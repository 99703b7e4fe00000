"""How fast each pair of a head turns: rope's base and the ways in which it is stretched.

Names and formulas follow transformers' modeling_rope_utils.py; the keys and tensors of a GGUF are
those that llama.cpp reads. Llama 3's scaling comes as the tensor rope_freqs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from gguf import quants

from lora.forward.gguf.file import GGUFFile, GGUFTensor
from lora.forward.gguf.metadata import Metadata
from lora.shaders.errors import InputError
from lora.shaders.untrusted import MOST_LARGE, as_f32, reading, shown


@dataclass(frozen=True)
class Yarn:
    """YaRN (Peng et al. 2023): slow pairs are interpolated, fast ones left, those between mixed.

    Attributes:
        original_context: tokens of a row before it was stretched.
        beta_fast: pairs that turn more often than this over the original context are left.
        beta_slow: pairs that turn less often are interpolated.
    """

    original_context: int
    beta_fast: float
    beta_slow: float


@dataclass(frozen=True)
class LongRope:
    """LongRoPE (Ding et al. 2024): each pair has its own divisor, another one in long examples.

    Attributes:
        original_context: examples of up to so many tokens take the short divisors.
        short: [dimensions / 2].
        long: [dimensions / 2].
    """

    original_context: int
    short: tuple[float, ...]
    long: tuple[float, ...]


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer (Su et al. 2021, "RoFormer").

    Attributes:
        base: theta; pair j turns by position · base^(-2j / dimensions) before scaling.
        dimensions: leading numbers of a head that are rotated; even.
        interleaved: pairs are (2j, 2j + 1), else (j, j + dimensions / 2).
        factor: positions are divided by it ("linear"; with `yarn` only in slow pairs).
        divisors: what each pair's frequency is divided by; empty for 1.
        yarn: see Yarn.
        long: see LongRope.
        amplitude: cosines and sines are multiplied by it (attention_factor in transformers).
    """

    base: float
    dimensions: int
    interleaved: bool
    factor: float = 1.0
    divisors: tuple[float, ...] = ()
    yarn: Yarn | None = None
    long: LongRope | None = None
    amplitude: float = 1.0

    def frequencies(self, *, long: bool = False) -> np.ndarray:  # float64 [dimensions / 2]
        """Radians a position, pair by pair.

        Args:
            long: for examples longer than LongRoPE's original context.
        """
        pairs = np.arange(0, self.dimensions, 2, dtype=np.float64) / self.dimensions
        frequency = self.base**-pairs
        if self.divisors:
            frequency = frequency / np.array(self.divisors)
        if self.long is not None:
            frequency = frequency / np.array(self.long.long if long else self.long.short)
        if self.yarn is None:
            return frequency / self.factor
        kept = 1.0 - self._ramp(self.yarn)
        return frequency / self.factor * (1.0 - kept) + frequency * kept

    def _ramp(self, yarn: Yarn) -> np.ndarray:
        """0 for pairs that are left, 1 for those that are interpolated."""

        def pair_of(rotations: float) -> float:
            """The pair that turns so often over the original context."""
            turns = yarn.original_context / (rotations * 2 * math.pi)
            return self.dimensions * math.log(turns) / (2 * math.log(self.base))

        low = max(math.floor(pair_of(yarn.beta_fast)), 0)
        high = min(math.ceil(pair_of(yarn.beta_slow)), self.dimensions - 1)
        width = max(high - low, 0.001)
        return np.clip((np.arange(self.dimensions // 2) - low) / width, 0.0, 1.0)

    def tables(self, n_positions: int, *, long: bool = False, first: int = 0) -> np.ndarray:
        """Cosines and sines of every angle, computed in float64.

        WGSL's own sin and cos are too coarse at large angles (Vulkan asks for 2^-11 within one
        turn).

        Args:
            n_positions: so many.
            long: as in `frequencies`.
            first: the first of the positions.

        Returns:
            f32 [n_positions, dimensions / 2, 2]: amplitude · (cos, sin).
        """
        positions = np.arange(first, first + n_positions, dtype=np.float64)
        angle = positions[:, None] * self.frequencies(long=long)
        both = np.stack([np.cos(angle), np.sin(angle)], axis=-1)
        return (self.amplitude * both).astype(np.float32)


@dataclass(frozen=True)
class Temperature:
    """Queries at position p are multiplied by 1 + scale · ln(1 + floor(p / length)) (Llama 4)."""

    scale: float
    length: int

    def factors(self, n_positions: int) -> np.ndarray:
        """What queries are multiplied by, f32 [n_positions]; computed in float64."""
        turns = np.arange(n_positions, dtype=np.float64) // self.length
        return (1.0 + self.scale * np.log1p(turns)).astype(np.float32)


# What `rope.` keys say that is read here; any other would be dropped in silence.
_KEYS = frozenset(
    f"rope.{key}"
    for key in (
        "dimension_count", "dimension_count_swa",
        "dimension_sections",  # for images; a text has one position for all sections
        "freq_base", "freq_base_swa", "global.freq_base", "local.freq_base",
        "scale_linear", "scaling.type",
        "scaling.factor", "scaling.attn_factor", "scaling.original_context_length",
        "scaling.finetuned", "scaling.yarn_ext_factor", "scaling.yarn_attn_factor",
        "scaling.yarn_beta_fast", "scaling.yarn_beta_slow",
    )
)  # fmt: skip
_LOG_MULTIPLIER = "rope.scaling.yarn_log_multiplier"
ROPE_TENSORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)


def read_rope(
    gguf_file: GGUFFile,
    metadata: Metadata,
    head_size: int,
    *,
    interleaved: bool,
    log_multiplier: bool = False,
) -> Rope:
    """The rotary embedding that the file's metadata and tensors describe.

    Args:
        head_size: columns of a head.
        interleaved: see `Rope`.
        log_multiplier: YaRN may have the key of that name (Mistral 3).

    Raises:
        InputError: it has something that is not done here.
    """
    for key in metadata.values:
        short = key.removeprefix(f"{metadata.name}.")
        known = short in _KEYS or (log_multiplier and short == _LOG_MULTIPLIER)
        if short.startswith("rope.") and short != key and not known:
            raise InputError(f"{metadata.path}: {key} is a kind of rope that is not supported.")
    dimensions = metadata.size("rope.dimension_count", head_size, multiple_of=2)
    if dimensions > head_size:
        raise InputError(
            f"{metadata.path}: {metadata.name}.rope.dimension_count is {dimensions}, more than "
            f"the head size {head_size}."
        )
    kind = metadata.get("rope.scaling.type", "none")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise InputError(
            f"{metadata.path}: {metadata.name}.rope.scaling.type is {shown(kind)}, which is not "
            "supported; supported: none, linear, yarn, longrope."
        )
    # The old key stands for a linear scaling of its own.
    factor = metadata.positive_number("rope.scale_linear", 1.0)
    amplitude = metadata.positive_number("rope.scaling.attn_factor", 1.0)
    yarn = None
    if kind in ("linear", "yarn"):
        factor = metadata.positive_number("rope.scaling.factor", factor)
    if kind == "yarn":
        metadata.require("rope.scaling.yarn_ext_factor", 1.0, -1.0)
        yarn = Yarn(
            original_context(metadata),
            metadata.positive_number("rope.scaling.yarn_beta_fast", 32.0),
            metadata.positive_number("rope.scaling.yarn_beta_slow", 1.0),
        )
        amplitude *= metadata.positive_number("rope.scaling.yarn_attn_factor", 1.0)
        grown = 0.1 * math.log(factor) if factor > 1 else 0.0
        # DeepSeek's way: what the scores are multiplied by elsewhere is taken out here.
        amplitude *= (1.0 + grown) / (
            1.0 + grown * (metadata.optional_number(_LOG_MULTIPLIER) or 0.0)
        )
    rope = Rope(
        base=metadata.positive_number(
            "rope.freq_base", metadata.positive_number("rope.global.freq_base", 10000.0)
        ),
        dimensions=dimensions,
        interleaved=interleaved,
        factor=factor,
        divisors=_divisors(gguf_file, "rope_freqs.weight", dimensions),
        yarn=yarn,
        long=_long_rope(gguf_file, metadata, dimensions),
        amplitude=amplitude,
    )
    check_rope(metadata, rope)
    return rope


def check_rope(metadata: Metadata, rope: Rope) -> None:
    """Refuses numbers that are right one by one and don't give cosines and sines together.

    Raises:
        InputError: a pair turns infinitely fast at the last position, or the amplitude is no f32.
    """
    whole = f"{metadata.path}: what {metadata.name}.rope says (base {rope.base:g}"
    with reading(whole + ")", "a rope"), np.errstate(all="ignore"):
        tables = [rope.frequencies()] + ([rope.frequencies(long=True)] if rope.long else [])
    turns = all(np.isfinite(table * MOST_LARGE).all() for table in tables)
    if rope.base <= 1 or not turns or as_f32(rope.amplitude) is None:
        raise InputError(
            f"{whole}, factor {rope.factor:g}, amplitude {rope.amplitude:g}) gives no cosines and "
            "sines: the base must be above 1, and all that follows finite. The file is damaged."
        )


def original_context(metadata: Metadata) -> int:
    """Tokens of a row before rope was stretched; the context where the file does not say."""
    return metadata.size("rope.scaling.original_context_length", metadata.size("context_length"))


def _long_rope(gguf_file: GGUFFile, metadata: Metadata, dimensions: int) -> LongRope | None:
    long = _divisors(gguf_file, "rope_factors_long.weight", dimensions)
    short = _divisors(gguf_file, "rope_factors_short.weight", dimensions)
    if not long and not short:
        if metadata.get("rope.scaling.type") == "longrope":
            raise InputError(
                f"{gguf_file.path}: {metadata.name}.rope.scaling.type is 'longrope', but the file "
                "lacks the tensors rope_factors_long.weight and rope_factors_short.weight."
            )
        return None
    if not long or not short:
        raise InputError(
            f"{gguf_file.path} holds only one of rope_factors_long.weight and "
            "rope_factors_short.weight."
        )
    return LongRope(original_context(metadata), short, long)


def _divisors(gguf_file: GGUFFile, name: str, dimensions: int) -> tuple[float, ...]:
    tensor = gguf_file.tensors.get(name)
    if tensor is None:
        return ()
    values = read_vector(gguf_file, tensor)
    if values.shape != (dimensions // 2,) or not (values > 0).all():
        raise InputError(
            f"{gguf_file.path}: tensor {name!r} of shape {list(tensor.shape)} is not "
            f"{dimensions // 2} numbers above 0, one for each pair that rope turns."
        )
    return tuple(float(value) for value in values)


def read_vector(gguf_file: GGUFFile, tensor: GGUFTensor) -> np.ndarray:
    """A small tensor (a norm, a bias) as f32, in its own shape.

    Raises:
        InputError: it holds NaN or infinite numbers.
    """
    values = quants.dequantize(np.asarray(tensor.data).reshape(-1), tensor.type)
    array = np.asarray(values, np.float32).reshape(tensor.shape)
    if not np.isfinite(array).all():
        raise InputError(f"{gguf_file.path}: tensor {tensor.name!r} holds NaN or infinite numbers.")
    return array
