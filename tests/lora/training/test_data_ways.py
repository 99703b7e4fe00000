"""However examples come to a session: packed, accumulated, streamed or given by a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.adapters.origin import origin_of
from lora.config.schema import load_config
from lora.data.batches import make_batch
from lora.data.examples import Example
from lora.forward.gguf.file import GGUFFile
from lora.shaders.errors import InputError
from lora.training.checkpoint import save_checkpoint
from lora.training.resuming import resume
from lora.training.session import TrainingSession
from tests.support.tiny_run import write_run

FIXED = {"schedule": "constant", "max_grad_norm": None, "learning_rate": 0.01}
ROWS = [{"prompt": f"say {'ab' * (1 + i % 4)} ", "completion": f"{'ba' * (1 + i % 3)}!"}
        for i in range(12)]  # fmt: skip


def gradient_and_loss(session: TrainingSession, groups: list[list[Example]]) -> tuple[Any, float]:
    """Of one step over some micro-batches; the flat gradient before clipping."""
    session.step([make_batch(group) for group in groups])
    (metrics,) = session.finished_steps(wait=True)
    return session.memory.read(session.adapter.gradients[0]).astype(np.float64), metrics.loss


def compare(folder: Path, *ways: list[list[int]]) -> None:
    """Steps over the same examples, laid into micro-batches in several ways, are the same step."""
    found = []
    path = write_run(folder, n_rows=12, train={**FIXED, "batch_size": 12}, data={"eval": None})
    for groups in ways:
        with TrainingSession.from_config(path, ["data.packing=true"]) as session:
            examples = session.workload.train_examples
            found.append(
                gradient_and_loss(session, [[examples[i] for i in group] for group in groups])
            )
    first, loss = found[0]
    assert np.abs(first).max() > 1e-4
    for gradient, other_loss in found[1:]:
        # In f32 the same products are summed in another order.
        assert np.abs(gradient - first).max() <= 1e-5 * np.abs(first).max()
        assert other_loss == pytest.approx(loss, rel=1e-5)


def test_packed_and_accumulated_equal_one_example_at_a_time(tmp_path: Path) -> None:
    alone = [[i] for i in range(12)]
    packed = [[7, 3, 11, 0, 5], [1, 2, 4, 6, 8, 9, 10]]
    compare(
        tmp_path, alone, packed, [list(range(12))], [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    )


def test_a_packed_epoch_trains_on_what_an_unpacked_one_does(tmp_path: Path) -> None:
    """One step an epoch either way: the losses and gradients are the same."""
    path = write_run(tmp_path, n_rows=12, train={**FIXED, "epochs": 1})
    found = []
    for overrides in (
        ["data.packing=true", "train.batch_size=2", "train.gradient_accumulation=100"],
        ["train.batch_size=3", "train.gradient_accumulation=4"],
    ):
        with TrainingSession.from_config(path, overrides) as session:
            (metrics,) = list(session.train())
            found.append((session.parameters(), metrics.loss, metrics.grad_norm))
            assert metrics.trained_tokens > 0
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-5)


class Endless:
    """Rows without a length, in the same order each time."""

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows

    def __iter__(self) -> Iterator[dict[str, str]]:
        for index in range(self.n_rows):
            yield {**ROWS[index % 12], "completion": f"{index}!"}


def test_a_stream_goes_on_byte_for_byte(tmp_path: Path) -> None:
    """Streamed, shuffled and packed, stopped in the middle of an epoch."""
    overrides = ["data.packing=true", "data.shuffle_buffer=7", "train.steps=9", "data.eval=null",
                 "train.batch_size=1"]  # fmt: skip
    config = load_config(str(write_run(tmp_path)), overrides)
    with TrainingSession(config, examples=Endless(20)) as whole:
        losses = [metrics.loss for metrics in whole.train()]
        expected = whole.parameters()
        assert whole.stream is not None and whole.stream.epoch > 0
    with TrainingSession(config, examples=Endless(20)) as stopped:
        for step, _ in enumerate(stopped.steps(), 1):
            if step == 4:
                break
        stopped.finished_steps(wait=True)
        save_checkpoint(stopped, tmp_path / "out")
        done = stopped.steps_done
    with TrainingSession(config, examples=Endless(20)) as resumed:
        resume(resumed, tmp_path / "out")
        rest = [metrics.loss for metrics in resumed.train()]
        assert rest == losses[done:]
        assert resumed.parameters().tobytes() == expected.tobytes()


def test_a_streamed_file_is_a_stream(tmp_path: Path) -> None:
    path = write_run(tmp_path, train={"steps": 5})
    with TrainingSession.from_config(path, ["data.streaming=true"]) as session:
        assert session.workload.train_examples == [] and session.workload.streamed is not None
        assert len([metrics.loss for metrics in session.train()]) == 5
        assert session.evaluate().n_examples == 3
    for overrides, words in (
        (["train.steps=null"], "data.streaming: rows that are streamed are not counted, so"),
        (["data.eval=null", "data.eval_share=0.1"], "so eval_share can't take a share of them"),
        (["train.reuse_frozen_prefix=on"], "nothing of them is kept; set it to auto"),
    ):
        with pytest.raises(InputError, match=words):
            TrainingSession.from_config(path, ["data.streaming=true", *overrides])


def test_rows_that_a_script_gives(tmp_path: Path) -> None:
    """A list trains as a file of the same rows does; no data.train is needed then."""
    path = write_run(tmp_path, n_rows=12, train={"epochs": 1})
    Path(tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with TrainingSession.from_config(path) as session:
        list(session.train())
        expected = session.parameters()
    without = load_config(str(path), ["data.train=null"], needs_data=False)
    with TrainingSession(without, examples=ROWS) as session:
        list(session.train())
        assert session.parameters().tobytes() == expected.tobytes()
        assert session.evaluate(ROWS[:2]).n_examples == 2
    with TrainingSession.from_config(path, ["data.train=null"], examples=ROWS) as session:
        assert len(session.workload.train_examples) == 12
    with pytest.raises(InputError, match="examples, row 1: lacks completion"):
        TrainingSession(without, examples=[ROWS[0], {"prompt": "a"}])
    with pytest.raises(InputError, match="so train.steps must say how long"):
        TrainingSession(without, examples=iter(ROWS))
    with pytest.raises(InputError, match="examples: holds no rows"):
        TrainingSession(without, examples=[])
    with pytest.raises(InputError, match="data.train: missing; give a file"):
        load_config(str(path), ["data.train=null"])


def test_what_the_device_would_take_is_checked_where_it_enters(tmp_path: Path) -> None:
    def example(ids: list[int]) -> Example:
        return Example(np.array(ids, np.int32), np.arange(len(ids)) > 0, 0)

    with TrainingSession.from_config(write_run(tmp_path)) as session:
        for ids, words in (
            ([1, 100_000], "the token id 100000, but the vocabulary of the model has"),
            ([1, -3], "the token id -3, but the vocabulary"),
            ([5] * 33, "has 33 tokens, and the session was opened for examples of at most 32"),
        ):
            with pytest.raises(InputError, match=words):
                session.step([make_batch([example([5, 6])]), make_batch([example(ids)])])
            assert session.steps_done == 0
            with pytest.raises(InputError, match=words):
                session.evaluate([example(ids)])
        with pytest.raises(InputError, match="A micro-batch has .* tokens, and the session was op"):
            session.step([make_batch([example([5] * 30)] * 8)])
        with pytest.raises(InputError, match="some are rows and some tokens"):
            session.evaluate([example([5, 6]), ROWS[0]])


def test_messages_wherever_a_prompt_is_taken(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + ' ' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    messages = [{"role": "user", "content": "hello"}]
    path = write_run(tmp_path)
    chats = [{"messages": [*messages, {"role": "assistant", "content": "bye"}]}]
    config = load_config(str(path), ["data.eval=null"])
    data = config.data.model_copy(update={"chat_template": template})
    config = config.model_copy(update={"data": data})
    with TrainingSession(config, examples=chats) as session:
        asked = session.generate(messages, max_tokens=4)
        assert asked == session.generate("user: hello assistant:", max_tokens=4)
        with pytest.raises(InputError, match=r"messages\[0\].content is 3; it must be a string"):
            session.generate([{"role": "user", "content": 3}])


def test_an_adapter_of_given_rows_knows_its_run(tmp_path: Path) -> None:
    config = load_config(str(write_run(tmp_path)), ["data.train=null"], needs_data=False)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(config.dump_yaml())
    origin = origin_of(run)
    assert origin is not None and origin.config == config
    assert origin.prompt_form(GGUFFile(config.model.path)) is None
