"""The config's sources of data, and the settings under which a run is watched."""

from __future__ import annotations

import pytest

from lora.config.schema import load_config
from tests.support.config_files import LEAST, refusal, write


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("{}", "give path (a file or a directory) or name (of a Hugging Face data set), and not b"),
        ("{path: a, name: b}", "give path (a file or a directory) or name (of a"),
        ("{path: a, weigth: 2}", "weigth: unknown key; did you mean weight?"),
        ("{path: a, r: 2}", "r: unknown key; its name here is adapter.rank."),
        ("{path: a, weight: 0}", "weight: got 0; allowed here: a number above 0."),
        ("[a, {path: b, format: chatt}]", "format: got 'chatt'; allowed here: null, auto, chat"),
        ("{path: a, columns: {promt: q}}", "columns: 'promt' is no column that is known "
         "here; did you mean prompt?"),
        ("[a, 3]", "got 3; allowed here: a file, a directory"),
    ],
)  # fmt: skip
def test_sources_that_are_wrong(path: str, value: str, words: str) -> None:
    override = f"data.train={value}"
    assert refusal(path, override).startswith(f"--set {override}: data.train: {words}")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.eval=e", "data.eval_share=0.1"], "eval and eval_share are both given; keep one"),
        (["data.eval={path: e, weight: 2}"], "eval: every row is evaluated once, so weight can't"),
        (["data.streaming=true"], "data.streaming: rows that are streamed are not counted, so tr"),
        (
            ["data.streaming=true", "train.steps=3", "data.train={path: t, weight: 2}"],
            "streaming: rows that are streamed are taken once each, so weight can't be 2",
        ),
    ],
)
def test_settings_of_data_that_exclude_each_other(
    path: str, overrides: list[str], words: str
) -> None:
    assert words in refusal(path, *overrides)


def test_a_source_as_a_mapping_is_read_back(path: str) -> None:
    source = "{name: org/set, config: en, split: 'train[:20%]', columns: {prompt: q}, weight: 0.5}"
    over = [f"data.train=[a.jsonl, {source}]", "data.format=completion", "data.eval_share=0.1",
            "data.columns={completion: a}", "train.eval_every=3"]  # fmt: skip
    config = load_config(write(path, LEAST), over)
    assert load_config(write(path, config.dump_yaml())) == config
    first, second = config.data.sources("train")
    assert (first.path, first.format, first.columns) == (
        "a.jsonl",
        "completion",
        {"completion": "a"},
    )
    assert (second.name, second.weight, second.split) == ("org/set", 0.5, "train[:20%]")
    assert second.columns == {"completion": "a", "prompt": "q"}


@pytest.mark.parametrize(
    ("section", "override", "words"),
    [
        ("eval: e.jsonl", "train.eval_every=banana", "got 'banana'; allowed here: null, a whole"),
        (
            "eval: e.jsonl",
            "train.eval_every=0 epochs",
            "got '0 epochs'; allowed here: null, a whol",
        ),
        (
            "eval: e.jsonl",
            "train.best=eval_los",
            "train.best: got 'eval_los'; did you mean eval_loss",
        ),
        ("eval: {a: e.jsonl}", "train.best=eval_b_loss", "did you mean eval_a_loss?"),
        ("eval: null", "train.best=eval_loss", "train.best is 'eval_loss', but data.eval is null"),
        ("eval: null", "train.eval_samples=3", "train.eval_samples is 3, but data.eval is null"),
        ("eval: null", "train.load_best_model_at_end=true", "load_best_model_at_end is True, but"),
        ("eval: e.jsonl", "train.early_stopping_patience=2", "but eval_every is null: nothing is"),
        ("eval: e.jsonl", "train.early_stopping_threshold=2", "early_stopping_patience is null"),
        ("eval: e.jsonl", "train.sample_every=2", "but there are no sample_prompts; give some."),
        (
            "eval: e.jsonl",
            "train.sample_prompts=[[{role: user}]]",
            "a prompt is a text, or messages",
        ),
        ("eval: e.jsonl", "train.report_to=[mlflow]", "allowed here: a list of tensorboard, wandb"),
        ("eval: e.jsonl", "hub=nowhere", "got 'nowhere'; allowed here: null, or ORG/REPO."),
        ("eval: {loss: e.jsonl}", "device=auto", "got 'loss'; a set needs another name"),
        ("eval: {a b: e.jsonl}", "device=auto", "got the name 'a b' of a set; a name is letters"),
        ("eval: {a: {pat: 3}}", "device=auto", "a: pat: unknown key; did you mean path?"),
    ],
)
def test_what_a_run_cannot_be_watched_with(
    path: str, section: str, override: str, words: str
) -> None:
    write(path, LEAST.replace("train: t.jsonl", f"train: t.jsonl, {section}"))
    assert words in refusal(path, override)


def test_named_eval_sets(path: str) -> None:
    text = "train: t.jsonl, eval: {a: e.jsonl, b: [x.jsonl, {path: y.jsonl, format: text}]}"
    config = load_config(write(path, LEAST.replace("train: t.jsonl", text)))
    assert config.data.eval_sets == {"a": 1, "b": 2}
    assert [s.path for s in config.data.sources("eval")] == ["e.jsonl", "x.jsonl", "y.jsonl"]
    assert load_config(write(path, config.dump_yaml())) == config
    # A mapping with a key of a source is a source.
    text = "train: t.jsonl, eval: {path: e.jsonl, max_samples: 3}"
    config = load_config(write(path, LEAST.replace("train: t.jsonl", text)))
    assert config.data.eval_sets == {} and len(config.data.sources("eval")) == 1
