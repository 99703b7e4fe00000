"""Who imports whom, from the source: `python -m tests.support.imports` lists it by room and wing.

Imports inside functions and under TYPE_CHECKING count, too: what is read together must be
understood together.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
ROOMS = ("shaders", "forward", "backward", "optim", "lora")

# What a room or wing may import, besides itself; a room without wings stands for its own files.
MAY_IMPORT = {
    "shaders": set(),
    "forward/gguf": {"shaders"},
    "forward/text": {"forward/gguf", "shaders"},
    "forward/model": {"forward/gguf", "shaders"},
    "forward/plans": {"shaders"},
    "forward": {"forward/model", "forward/plans", "shaders"},
    "forward/decoder": {"forward", "forward/model", "shaders"},
    "backward": {"forward", "forward/decoder", "forward/model", "forward/plans", "shaders"},
    "optim": {"shaders"},
}
_FORWARD = {name for name in MAY_IMPORT if name.startswith("forward")} | {"shaders"}
_WINGS = ("storage", "config", "data", "adapters", "generation", "export", "training", "commands")
for _place, _wing in enumerate(_WINGS):
    MAY_IMPORT[f"lora/{_wing}"] = _FORWARD | {f"lora/{below}" for below in _WINGS[:_place]}
MAY_IMPORT["lora/config"] |= {"optim"}  # the words of its schedules
MAY_IMPORT["lora/export"] -= {"lora/generation"}
MAY_IMPORT["lora/training"] = MAY_IMPORT["lora/training"] - {"lora/export"} | {"backward", "optim"}
MAY_IMPORT["lora/checks"] = _FORWARD | {"backward", "optim", "lora/storage"}
for _wing in ("generation", "training", "commands"):
    MAY_IMPORT[f"lora/{_wing}"] |= {"lora/checks"}
MAY_IMPORT["lora"] = {name for name in MAY_IMPORT if name.startswith("lora/")} | {"shaders"}


@cache
def module_files() -> dict[str, Path]:
    """Every module of the product by its dotted name; a room's folder is a package of `lora`."""
    found = {}
    for room in ROOMS:
        for path in sorted((REPOSITORY / room).rglob("*.py")):  # rglob does not follow the links
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts if room == "lora" else ("lora", *parts))] = path
    return found


@cache
def imported_names(path: Path) -> set[str]:
    """What a file imports, dotted; `from a import b` gives both a and a.b."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            module = node.module or ""
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


@cache
def import_graph() -> dict[str, set[str]]:
    """module → the modules of the product that it imports, its own packages left out."""
    files = module_files()
    return {
        name: {
            other
            for other in imported_names(path)
            if other in files and other != name and not name.startswith(f"{other}.")
        }
        for name, path in files.items()
    }


def home_of(module: str) -> str:
    """The room or the wing that a module lies in: "forward/text", "backward", "lora/data"."""
    parts = module.split(".")
    in_room = len(parts) > 1 and parts[1] in ROOMS
    room, rest = (parts[1], parts[2:]) if in_room else (parts[0], parts[1:])
    path = module_files()[module]
    has_wing = path.parent != REPOSITORY / room
    return f"{room}/{rest[0]}" if has_wing else room


@cache
def homes_graph() -> dict[str, set[str]]:
    """The same arrows between rooms and wings."""
    homes: dict[str, set[str]] = defaultdict(set)
    for module, others in import_graph().items():
        home = home_of(module)
        homes[home] |= {home_of(other) for other in others} - {home}
    return dict(homes)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of arrows; empty where there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def main() -> None:
    """Prints rooms and wings with their arrows, lowest first, then the modules of each."""
    homes, modules = homes_graph(), import_graph()
    for home in TopologicalSorter(homes).static_order():
        print(f"{home} → {', '.join(sorted(homes[home])) or 'nothing'}")
        for module in sorted(m for m in modules if home_of(m) == home):
            print(f"    {module} → {', '.join(sorted(modules[module])) or 'nothing'}")
    print(f"circles: {' → '.join(circle(modules) or circle(homes)) or 'none'}")


if __name__ == "__main__":
    main()
