"""Configs that are attacks or accidents: one sentence, at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lora.config.schema import load_config
from lora.config.yaml_file import parse_yaml, read_yaml_mapping
from lora.shaders.errors import InputError

GOOD = "model: {path: m.gguf}\ndata: {train: d.jsonl}\noutput: o\n"
_LAUGHS = "\n".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" if n else "a0: &a0 [x]" for n in range(10)
)
_MERGES = "\n".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" if n else "a0: &a0 {x: 1}"
    for n in range(10)
)
FILES = {
    "a billion laughs": (_LAUGHS, "more than 20,000 values, aliases"),
    "merged mappings": (_MERGES, "more than 20,000 values, aliases"),
    "itself": ("a: &a [*a]", "inside of what it stands for"),
    "itself as a key": ("&a {*a : 1}", "inside of what it stands for|unhashable|not valid YAML"),
    "deep": ("[" * 3000, "nested too deeply|not valid YAML"),
    "deep blocks": ("\n".join(" " * n + "a:" for n in range(300)), "nested too deeply"),
    "a number in groups of 60": ("a: " + ":".join(["1"] * 30000), "a number of"),
    "a float in groups of 60": ("a: " + ":".join(["1"] * 30000) + ".0", "a number of"),
    "a long number": ("a: " + "9" * 5000, "a number of 5,000 digits"),
    "a list as a key": ("? [1]\n: 2", "unhashable"),
    "a date that is none": ("a: 2026-13-45", "not valid YAML"),
    "binary that is none": ("a: !!binary 'a'", "not valid YAML|base64"),
    "a python object": ("!!python/object/apply:os.system [id]", "could not determine"),
    "too long": ("a: b\n" * 60000, "is larger than 262,144 bytes"),
    "a null character": ("a: \0", "not valid YAML"),
    "only a text": ("x" * 100_000, "a config is a mapping"),
}


@pytest.mark.parametrize("name", FILES)
def test_one_sentence_at_once(tmp_path: Path, name: str) -> None:
    content, words = FILES[name]
    path = tmp_path / "x.yaml"
    path.write_text(content)
    started = time.process_time()
    with pytest.raises(InputError, match=words) as caught:
        read_yaml_mapping(path)
    assert time.process_time() - started < 5
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 600


def test_aliases_are_fine_within_limits() -> None:
    text = "a: &a [1, 2]\nb: *a\nc: {<<: &m {x: 1}, y: 2}\nd: *m\n"
    assert parse_yaml(text, "x") == {
        "a": [1, 2], "b": [1, 2], "c": {"x": 1, "y": 2}, "d": {"x": 1}
    }  # fmt: skip


VALUES = {
    "adapter: {rank: 1000000000000}": "adapter.rank: got 1000000000000; allowed here: .*65536",
    "adapter: {alpha: 1.0e+39}": "adapter.alpha: got 1e.39; allowed here: a number that 32 bits",
    "adapter: {alpha: 1.0e-300}": "a number that 32 bits hold",
    "train: {learning_rate: 1e999}": "train.learning_rate",
    "train: {batch_size: 1e999}": "train.batch_size",
    "train: {steps: 9999999999999999999999}": "at most 2147483647",
    "train: {epsilon: 1.0e-50}": "a number that 32 bits hold",
    'device: "\\e[2J"': "",
}


@pytest.mark.parametrize("text", VALUES)
def test_numbers_that_no_kernel_can_hold(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD + text + "\n")
    if not VALUES[text]:
        assert load_config(str(path)).device == "\x1b[2J"
        return
    with pytest.raises(InputError, match=VALUES[text]):
        load_config(str(path))


@pytest.mark.parametrize("name", ['"x\\0y"', "x" * 300, "/".join(["x" * 200] * 30)])
def test_what_no_path_can_be(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD.replace("output: o", f"output: {name}"))
    with pytest.raises(InputError, match="output: got '.*(null character|are the most that)"):
        load_config(str(path))


def test_many_unknown_keys_are_not_all_told(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD + "".join(f"key{n}: {n}\n" for n in range(9000)))
    with pytest.raises(InputError) as caught:
        load_config(str(path))
    lines = str(caught.value).splitlines()
    assert len(lines) == 13 and lines[-1].endswith("and more: 8988 further problems.")


def test_messages_hold_no_terminal_escapes(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(GOOD + '"\\e]0;x\\a": 1\ndata2: "\\e[31m"\n')
    with pytest.raises(InputError) as caught:
        load_config(str(path))
    assert str(caught.value).replace("\n", "").isprintable()
