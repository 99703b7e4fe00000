"""What pydantic found wrong in a config, as sentences.

Each field's description says what the field allows, so that a message can be put together from
the key, the value that was given, and the description.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from lora.config.other_names import OTHER_NAMES
from lora.shaders.untrusted import shown

_MOST_PROBLEMS = 12  # that are told at once


def config_problems(
    error: ValidationError, model: type[BaseModel], values: Mapping[str, Any]
) -> dict[str, str]:
    """Turns pydantic's findings into one sentence a key.

    Args:
        error: what pydantic raised.
        model: the whole config's model.
        values: what was given, as nested mappings.

    Returns:
        the key's dotted path (empty for the config as a whole) to the sentence, in the order in
        which pydantic found them.
    """
    problems: dict[str, str] = {}
    for finding in error.errors(include_url=False):
        path, field = _locate(model, finding["loc"])
        key = ".".join(path)
        if finding["type"] in ("extra_forbidden", "invalid_key"):
            sentence = _unknown_key(model, path)
        elif finding["type"] == "missing":
            sentence = f"missing; give {_allowed(field)}."
        elif finding["type"] == "value_error":
            # Written in our own validators, as sentences.
            sentence = str(finding["ctx"]["error"])
        else:
            most = finding.get("ctx", {}).get("le")
            allowed = _allowed(field)
            if most is not None and str(most) not in allowed:
                allowed += f", at most {most}"
            sentence = f"got {shown(_value_at(values, path))}; allowed here: {allowed}."
        if len(problems) == _MOST_PROBLEMS and key not in problems:
            problems["and more"] = f"{error.error_count() - _MOST_PROBLEMS} further problems."
            break
        # A union reports each of its members' complaints; they have one key and say the same.
        problems.setdefault(key, sentence)
    return problems


def did_you_mean(wrong: str, right: list[str]) -> str:
    """`; did you mean X?` with the nearest right spelling, or an empty string."""
    near = get_close_matches(wrong[:100].lower(), right, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _locate(
    model: type[BaseModel], location: tuple[int | str, ...]
) -> tuple[list[str], FieldInfo | None]:
    """The key's path, and its field; what follows a leaf (list index, union member) is dropped."""
    path: list[str] = []
    section: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for name in location:
        if section is None:
            break
        path.append(str(name))
        field = section.model_fields.get(str(name))
        section = _section_of(field)
    return path, field


def _section_of(field: FieldInfo | None) -> type[BaseModel] | None:
    kind = None if field is None else field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _unknown_key(model: type[BaseModel], path: list[str]) -> str:
    *sections, name = path
    section = model
    for part in sections:
        section = _section_of(section.model_fields[part]) or section
    if name.lower() in OTHER_NAMES:
        return f"unknown key; its name here is {OTHER_NAMES[name.lower()]}."
    suggestion = did_you_mean(name, list(section.model_fields))
    if suggestion:
        return "unknown key" + suggestion
    # A right key in the wrong section: learning_rate beside train, not inside it.
    for other in dotted_keys(model):
        if other.rpartition(".")[2] == name:
            return f"unknown key; did you mean {other}?"
    return f"unknown key; allowed here: {', '.join(section.model_fields)}."


def dotted_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of a model, sections and what is in them: `train`, `train.steps`."""
    for name, field in model.model_fields.items():
        yield prefix + name
        section = _section_of(field)
        if section is not None:
            yield from dotted_keys(section, f"{prefix}{name}.")


def _allowed(field: FieldInfo | None) -> str:
    section = _section_of(field)
    if section is not None:
        return f"a mapping with the keys {', '.join(section.model_fields)}"
    return (field.description if field is not None else None) or "nothing"


def _value_at(values: Any, path: list[str]) -> Any:
    for name in path:
        if not isinstance(values, Mapping) or name not in values:
            return values  # a key that is no text, such as a date
        values = values[name]
    return values
