"""The direction of imports between the rooms."""

import ast
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
MAY_IMPORT = {
    "shaders": {"shaders"},
    "forward": {"forward", "shaders"},
    "backward": {"backward", "forward", "shaders"},
    "optim": {"optim", "forward", "shaders"},
    "lora": {"lora", "optim", "backward", "forward", "shaders"},
}
JUDGES = {"torch", "transformers", "peft", "xllamacpp", "accelerate", "tests"}


def imported_modules(path: Path) -> set[str]:
    """What a file imports, dotted."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add(node.module or "")
    return found


def room_of(module: str) -> str:
    """The room of a module of ours: `lora.forward.x` lies in forward/."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else parts[0]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    files = list((REPOSITORY / room).rglob("*.py"))
    assert files
    for path in files:
        modules = imported_modules(path)
        bare = {m for m in modules if m.split(".")[0] in set(MAY_IMPORT) - {"lora"}}
        assert not bare, f"{path.relative_to(REPOSITORY)} imports {sorted(bare)} without lora."
        ours = {room_of(m) for m in modules if m.split(".")[0] == "lora"}
        upwards = ours - MAY_IMPORT[room]
        assert not upwards, f"{path.relative_to(REPOSITORY)} imports {sorted(upwards)}"
        judges = {m.split(".")[0] for m in modules} & JUDGES
        assert not judges, f"{path.relative_to(REPOSITORY)} imports {sorted(judges)}"
