"""A GGUF's metadata under its architecture's prefix, each value checked as it is read."""

from __future__ import annotations

from typing import Any

from lora.forward.gguf.file import GGUFFile
from lora.shaders.errors import InputError
from lora.shaders.untrusted import as_f32, shown

_MOST_SIZE = 2**32 - 1  # what the format writes sizes with


class Metadata:
    """Reads keys such as `llama.block_count` by what follows the architecture's name.

    Attributes:
        path: of the file, for messages.
        name: general.architecture.
        values: all metadata of the file.
    """

    def __init__(self, gguf_file: GGUFFile) -> None:
        self.path = gguf_file.path
        self.values = gguf_file.metadata
        name = self.values.get("general.architecture")
        self.name = name if isinstance(name, str) else shown(name)

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it is, or the default where the file has none."""
        return self.values.get(f"{self.name}.{key}", default)

    def size(self, key: str, default: int | None = None, *, multiple_of: int = 1) -> int:
        """A whole number above 0; a list of equal numbers (one a layer) counts as one.

        Raises:
            InputError: it is missing and has no default, or is something else.
        """
        value = self._required(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        return self._checked(key, value, multiple_of)

    def _checked(self, key: str, value: Any, multiple_of: int) -> int:
        number = isinstance(value, int) and not isinstance(value, bool)
        if not number or not 1 <= value <= _MOST_SIZE:
            raise InputError(
                f"{self.path}: {self.name}.{key} is {shown(value)}; one whole number above "
                f"0 is supported, {_MOST_SIZE:,} at most."
            )
        if value % multiple_of:
            raise InputError(
                f"{self.path}: {self.name}.{key} is {value}; supported are multiples of "
                f"{multiple_of}."
            )
        return value

    def window(self, key: str) -> int:
        """As `size`, up to the largest of 64 bits: a window that is wider than any text.

        Raises:
            InputError: as of `size`.
        """
        value = self.get(key)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        return _MOST_SIZE if is_whole and value > _MOST_SIZE else self.size(key)

    def sizes(
        self,
        key: str,
        n_layers: int,
        default: int | None = None,
        *,
        multiple_of: int = 1,
        none: bool = False,
    ) -> tuple[int, ...]:
        """Whole numbers above 0, one a layer: of a list, or the same for all.

        Args:
            key: without the architecture's name.
            n_layers: of the model.
            default: where the file has none.
            multiple_of: of which they must be multiples.
            none: a layer may have 0.

        Raises:
            InputError: as of `size`, or a list is of another length.
        """
        value = self._required(key, default)
        values = value if isinstance(value, list) else [value] * n_layers
        if len(values) != n_layers or not values:
            raise InputError(
                f"{self.path}: {self.name}.{key} has {len(values)} numbers for {n_layers} layers."
            )
        return tuple(
            0 if none and item == 0 else self._checked(key, item, multiple_of) for item in values
        )

    def positive_number(self, key: str, default: float | None = None) -> float:
        """A number above 0 that an f32 holds: kernels compute with no other.

        Raises:
            InputError: it is missing and has no default, or is something else.
        """
        value = self._required(key, default)
        number = as_f32(value)
        if number is None or number <= 0:
            raise InputError(
                f"{self.path}: {self.name}.{key} is {shown(value)}; a number above 0 is "
                "expected, of the range of 32 bits."
            )
        return number

    def optional_number(self, key: str, default: float = 0.0) -> float | None:
        """A finite number above 0, or None where it is 0: an option that is switched off."""
        value = self.get(key, default)
        return None if value == 0 else self.positive_number(key, default)

    def require(self, key: str, *neutral: Any) -> None:
        """Refuses a key that says anything but one of these, or is absent.

        Raises:
            InputError: it says something else, which nothing here would do.
        """
        value = self.get(key, neutral[0])
        if value not in neutral:
            raise InputError(
                f"{self.path}: {self.name}.{key} is {shown(value)}, which is not supported; "
                f"supported is {' or '.join(map(repr, neutral))}."
            )

    def _required(self, key: str, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise InputError(f"{self.path} lacks the metadata key {self.name}.{key}.")
        return value
