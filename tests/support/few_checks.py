"""The checks of `lora devices --check` that stay where all would compile for long."""

from __future__ import annotations

from lora.checks.comparison import Check
from lora.checks.suite import ALL_CHECKS


def a_few() -> list[Check]:
    """The first check of each kernel, as CPU devices and as GPUs have it.

    Of products in stretches, which a second pass adds, one more of each kind.
    """
    found: dict[tuple[str, str, bool], Check] = {}
    for check in ALL_CHECKS:
        stretches = check.shape.partition(" in ")[2]
        found.setdefault((check.kernel, stretches, check.as_cpu), check)
    return list(found.values())
