"""Types of values that several sections of the config have."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lora.config.durations import checked_duration
from lora.config.paths import expanded
from lora.config.sizes import checked_size
from lora.shaders.untrusted import F32_LEAST, F32_MOST, MOST_LARGE

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)[eE][+-]?\d+")


def _number_from_text(value: Any) -> Any:
    """PyYAML reads 1e-5 as text: YAML 1.1 wants a dot in it (1.0e-5)."""
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def word_from_switch(value: Any) -> Any:
    """YAML 1.1 reads on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def section_from_nothing(value: Any) -> Any:
    """A section whose keys are all commented out is null in YAML; it means the defaults."""
    return {} if value is None else value


def _of_32_bits(number: float) -> float:
    """Kernels compute in f32: a number beyond it would be infinite there, or zero."""
    if number != 0 and not F32_LEAST <= abs(number) <= F32_MOST:
        raise ValueError(
            f"got {number:g}; allowed here: a number that 32 bits hold, 0 or from {F32_LEAST:.1e} "
            f"to {F32_MOST:.1e}."
        )
    return number


Number = Annotated[
    float,
    BeforeValidator(_number_from_text),
    Field(allow_inf_nan=False),
    AfterValidator(_of_32_bits),
]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(word_from_switch)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expanded)]
Count = Annotated[int, Field(ge=1, le=MOST_LARGE)]
MemorySize = Annotated[str, AfterValidator(checked_size)]
Duration = Annotated[str, AfterValidator(checked_duration)]


class Section(BaseModel):
    """Unknown keys and values of another type are refused; a config doesn't change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
