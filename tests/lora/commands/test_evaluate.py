"""What `lora eval` says: of which examples its figures are, and some answers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from lora.commands.cli import app
from lora.commands.evaluate import describe_examples, first_answer
from lora.config.schema import load_config
from lora.data.examples import DataSummary, Example
from lora.shaders.errors import InputError
from lora.training.metrics import EvalResult
from lora.training.session import TrainingSession
from tests.support.tiny_run import write_run

# Of 5, 10 and 8 tokens with their ends.
ROWS = [
    {"prompt": "ab", "completion": "cd"},
    {"prompt": "abcdefgh", "completion": "x"},
    {"prompt": "abcd", "completion": "xyz"},
]


def config_with(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A tiny model's config whose data.eval holds these rows."""
    path = write_run(folder)
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["eval", *map(str, arguments)])


def summary(*, left_out: dict[str, int] | None = None, longest: int = 10) -> DataSummary:
    n_out = sum((left_out or {}).values())
    return DataSummary("chat", 4, 40, 20, 0, n_out, longest, 16, 4 + n_out, left_out or {})


def result(n_cut: int = 0) -> EvalResult:
    return EvalResult(1.0, math.e, 0.5, 0.25, 1, 4, 20, n_cut)


@pytest.mark.parametrize(
    ("data", "n_cut", "expected"),
    [
        (summary(), 0, "4 examples"),
        # Only what is no answer was cut.
        (summary(longest=17), 0, "4 examples"),
        (
            summary(longest=30),
            2,
            "4 examples, 2 cut to 16 tokens (never counted as exact); data.max_length: 30 would "
            "hold them all",
        ),
        (
            summary(left_out={"of weight 0": 2, "without an answer": 1}),
            0,
            "4 examples; 2 left out, of weight 0; 1 left out, without an answer",
        ),
        (
            summary(left_out={"too long": 3}, longest=30),
            0,
            "4 examples; 3 left out, too long; data.max_length: 30 would hold them all",
        ),
    ],
)
def test_which_examples_the_figures_are_of(data: DataSummary, n_cut: int, expected: str) -> None:
    assert describe_examples(data, result(n_cut)) == expected


def test_cut_and_left_out_rows_are_told(tmp_path: Path) -> None:
    path = config_with(tmp_path, ROWS)
    shown = evaluated(path, "--set", "data.max_length=6", "--examples", 2)
    assert shown.exit_code == 0, shown.output
    first, *others = shown.stdout.splitlines()
    assert first == (
        "2 examples, 1 cut to 6 tokens (never counted as exact); 1 left out, what is trained "
        "begins beyond data.max_length; data.max_length: 10 would hold them all"
    )
    assert [line for line in others if line.startswith("wanted")] == [
        "wanted  'cd'",
        "wanted  'xy' (cut)",
    ]


def test_json_says_what_was_evaluated(tmp_path: Path) -> None:
    path = config_with(tmp_path, ROWS)
    adapter = tmp_path / "adapter"
    TrainingSession(load_config(str(path)), train=False).save(adapter)
    shown = evaluated(path, "--adapter", adapter, "--set", "data.max_length=6", "--json")
    assert shown.exit_code == 0, shown.output
    values = json.loads(shown.stdout)
    results = [values.pop(name) for name in ("base", "adapter")]
    assert values == {
        "model_path": str(tmp_path / "model.gguf"),
        "adapter_path": str(adapter),
        "data": str(tmp_path / "eval.jsonl"),
        "max_length": 6,
        "n_rows": 3,
        "n_left_out": 1,
    }
    assert [(r["n_examples"], r["n_cut"]) for r in results] == [(2, 1), (2, 1)]


def test_wanted_is_the_first_turn_on_one_line_as_it_is(tmp_path: Path) -> None:
    # Longer than a pipe's 80 columns; rich would make a face and bold letters of the rest.
    answer = "a" * 90 + " :smile: [bold]b[/bold]"
    turns = ["hi", answer, "and?", "second"]
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": text}
        for index, text in enumerate(turns)
    ]
    path = config_with(tmp_path, [{"messages": messages}])
    shown = evaluated(path, "--set", "data.max_length=256", "--set", "data.append_eos=off")
    assert shown.exit_code == 0, shown.output
    assert f"wanted  {answer!r}" in shown.stdout.splitlines()
    assert "and?" not in shown.stdout and "second" not in shown.stdout


@pytest.mark.parametrize(
    ("trained", "prompt", "answer"),
    [([0, 1, 1, 0, 1], [7], [8, 9]), ([0, 0, 1, 1, 1], [7, 8], [9, 10, 11])],
)
def test_the_first_answer(trained: list[int], prompt: list[int], answer: list[int]) -> None:
    ids = np.arange(7, 12, dtype=np.int32)
    assert first_answer(Example(ids, np.array(trained, dtype=np.bool_), 0)) == (prompt, answer)


def test_a_negative_number_of_answers_is_refused(tmp_path: Path) -> None:
    shown = evaluated(tmp_path / "absent.yaml", "--examples", -1)
    assert shown.exit_code == 2
    assert "--examples" in shown.output  # the words are typer's


def test_nothing_to_evaluate_on_is_said_before_the_model_is_opened(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    (tmp_path / "model.gguf").unlink()
    shown = evaluated(path, "--set", "data.eval=null")
    assert isinstance(shown.exception, InputError)
    assert str(shown.exception) == (
        "data.eval is null: there is nothing to evaluate on. Name a file of examples in the "
        "config, or with --set data.eval=FILE."
    )


def test_other_examples_than_those_that_choose_the_best(tmp_path: Path) -> None:
    """data.eval is what --set says, whatever set of the config's own train.best names."""
    config_with(tmp_path, ROWS)
    kept = {"eval": {"kept": str(tmp_path / "train.jsonl")}}
    (tmp_path / "kept").mkdir()
    path = write_run(tmp_path / "kept", data=kept, train={"best": "eval_kept_loss"})
    shown = evaluated(path, "--json", "--set", f"data.eval={tmp_path / 'eval.jsonl'}")
    assert shown.exit_code == 0, shown.stderr
    assert json.loads(shown.stdout)["base"]["n_examples"] == 3
