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


def imported_packages(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    files = list((REPOSITORY / room).rglob("*.py"))
    assert files
    for path in files:
        packages = imported_packages(path)
        upwards = packages & (set(MAY_IMPORT) - MAY_IMPORT[room])
        assert not upwards, f"{path.relative_to(REPOSITORY)} imports {sorted(upwards)}"
        judges = packages & JUDGES
        assert not judges, f"{path.relative_to(REPOSITORY)} imports {sorted(judges)}"
