"""The direction of imports between rooms and between their wings, without a circle anywhere."""

import pytest

from tests.support.imports import (
    ROOMS,
    circle,
    home_of,
    homes_graph,
    import_graph,
    imported_names,
    module_files,
)

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
MAY_IMPORT["lora/export"] -= {"lora/generation"}
MAY_IMPORT["lora/training"] = MAY_IMPORT["lora/training"] - {"lora/export"} | {"backward", "optim"}
MAY_IMPORT["lora/checks"] = _FORWARD | {"backward", "optim"}
MAY_IMPORT["lora/commands"] |= {"lora/checks"}
MAY_IMPORT["lora"] = {name for name in MAY_IMPORT if name.startswith("lora/")} | {"shaders"}

JUDGES = {"torch", "transformers", "peft", "xllamacpp", "accelerate", "tests", "benchmarks"}


def test_every_home_has_its_directions() -> None:
    assert {home_of(module) for module in module_files()} == set(MAY_IMPORT)


@pytest.mark.parametrize("home", MAY_IMPORT)
def test_imports_go_downwards(home: str) -> None:
    assert homes_graph()[home] <= MAY_IMPORT[home]


@pytest.mark.parametrize("graph", [import_graph, homes_graph])
def test_there_is_no_circle(graph: object) -> None:
    assert callable(graph)
    assert circle(graph()) == []


def test_a_circle_is_found() -> None:
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_nothing_imports_a_judge_or_a_room_by_its_bare_name() -> None:
    for module, path in module_files().items():
        first = {name.split(".")[0] for name in imported_names(path)}
        assert not first & (JUDGES | (set(ROOMS) - {"lora"})), module
