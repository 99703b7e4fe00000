"""YAML as plain values, with errors that name the file and the line."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from lora.shaders.errors import InputError
from lora.shaders.untrusted import read_text, shown

# PyYAML takes a second for 100 KB; the longest configs are lists of layers and of files.
_MOST_BYTES = 1 << 18
_MOST_NODES = 20_000
_MOST_DEPTH = 50
_MOST_DIGITS = 400  # 1e308 written out has 309
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def read_yaml_mapping(path: str | Path) -> dict[str, Any]:
    """Reads a YAML file whose top is a mapping.

    Raises:
        InputError: there is no such file, it is no YAML (with the line), a key stands twice, or
            its top is no mapping.
    """
    text = read_text(Path(path), _MOST_BYTES)
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        found = "nothing" if values is None else shown(values)
        raise InputError(f"{path}: holds {found}; a config is a mapping of keys to values.")
    return values


def parse_yaml(text: str, source: str) -> Any:
    """Parses one YAML document.

    Args:
        text: the document.
        source: where it comes from, for the errors.

    Raises:
        InputError: it is no YAML, or a key stands twice in one mapping.
    """
    if len(text) > _MOST_BYTES:
        raise InputError(f"{source}: a text of {len(text):,} characters is no value.")
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise InputError(f"{source}{line}: not valid YAML: {error.problem}.") from None
    except RecursionError:
        raise InputError(f"{source}: not valid YAML: nested too deeply.") from None
    except Exception as error:
        # Besides YAMLError, whatever a constructor makes of a wrong scalar: ValueError of a date
        # such as 2026-13-45, OverflowError of a float, binascii.Error, KeyError.
        reason = " ".join(str(error)[:300].split())
        raise InputError(f"{source}: not valid YAML: {reason}.") from None


class _Loader(yaml.SafeLoader):
    """Plain values of a bounded size; a key that stands twice is a mistake.

    An alias stands for all that its anchor holds, so that ten lines may be a thousand million
    values: they count as often as they stand. PyYAML reads digits in groups of 60 (1:30 is 90, and
    ten thousand groups a number of 18,000 digits): long numbers are no numbers of a config.
    """

    def get_single_node(self) -> yaml.Node | None:
        """The document's nodes.

        Raises:
            MarkedYAMLError: with its aliases written out it has too many, is nested too deeply, or
                holds itself.
        """
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count(node, {}, set(), 0)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """PyYAML keeps the last of two equal keys; a config with both has a mistake in it."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # a list or a mapping as a key is refused by PyYAML
            if key_node.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shown(key_node.value)} stands here a second time",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """A scalar's text."""
        is_number = isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS
        if is_number and len(node.value) > _MOST_DIGITS:
            raise yaml.MarkedYAMLError(
                problem=f"a number of {len(node.value):,} digits", problem_mark=node.start_mark
            )
        return super().construct_scalar(node)


def _count(node: yaml.Node, counted: dict[int, int], open_: set[int], depth: int) -> int:
    """Nodes below a node and itself, with every alias written out."""
    if id(node) in open_:
        raise yaml.MarkedYAMLError(
            problem="an alias stands inside of what it stands for", problem_mark=node.start_mark
        )
    if depth > _MOST_DEPTH:
        raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=node.start_mark)
    if id(node) in counted:
        return counted[id(node)]
    open_.add(id(node))
    n_nodes = 1
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            n_nodes += _count(one, counted, open_, depth + 1)
    elif isinstance(node, yaml.MappingNode):
        for key, one in node.value:
            n_nodes += _count(key, counted, open_, depth + 1)
            n_nodes += _count(one, counted, open_, depth + 1)
    open_.discard(id(node))
    if n_nodes > _MOST_NODES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {_MOST_NODES:,} values, aliases (*name) written out",
            problem_mark=node.start_mark,
        )
    counted[id(node)] = n_nodes
    return n_nodes
