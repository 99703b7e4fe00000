"""What a run came to, and the commands to go on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora import TrainingSession, run_training
from lora.commands.summary import next_commands, summary_rows, summary_rows_of
from lora.config.adapter_section import AdapterConfig
from lora.shaders.device import Device
from lora.training.history import History
from tests.support.tiny_run import write_run


def test_the_summary(tmp_path: Path, device: Device) -> None:
    path = write_run(tmp_path, train={"steps": 4, "eval_at_start": True})
    with TrainingSession.from_config(path, device=device) as opened:
        output = run_training(opened)
        rows = summary_rows(opened.config, output)
        assert set(rows) == {"trained", "loss", "evaluation", "best", "adapter"}
        assert rows["trained"].startswith("4 steps in 0:0")
        assert " → " in rows["loss"] and "(its moving average " in rows["loss"]
        assert "(after steps 0 and 4)" in rows["evaluation"]
        commands = next_commands(opened.config, [str(path), "--set", "a=b c"], output)
        chat = next_commands(opened.config, [str(path)], output, chats=True)
    assert chat[1] == f"lora chat {tmp_path / 'model.gguf'} --adapter {output}"
    assert commands[0] == f"lora eval {path} --set 'a=b c' --adapter {output}"
    assert [c.split()[1] for c in commands] == ["eval", "generate", "export", "report"]


def test_the_summary_has_a_row_for_each_named_set() -> None:
    lines = [
        {"step": step, **{f"eval_{name}{kind}": value / (1 + step) for name in ("", "a_", "b_c_")
                          for kind, value in (("loss", 4.0), ("perplexity", 50.0),
                                              ("accuracy", 0.5), ("exact_match", 0.0))}}
        for step in (0, 1)
    ]  # fmt: skip
    rows = summary_rows_of(History([], lines))
    assert list(rows) == ["evaluation", "  a", "  b_c"]
    assert rows["  a"] == "loss 4.0000 → 2.0000, accuracy 50.0% → 25.0%, exact match 0.0% → 0.0%"
    assert rows["evaluation"] == f"{rows['  a']} (after steps 0 and 1)"


def test_the_summary_counts_what_was_skipped_and_tried_again() -> None:
    step = {"loss": 2.0, "seconds": 1.0, "tokens": 9, "trained_tokens": 4}
    found = ({"retried": 3}, {}, {"skipped": True}, {"skipped": True, "retried": 5})
    rows = summary_rows_of(History([{"step": n, **step, **one} for n, one in enumerate(found)]))
    assert rows["skipped"].startswith("2 steps, ")
    assert rows["retried"].startswith("2 steps, 8 times in all, ")
    assert not {"skipped", "retried"} & set(summary_rows_of(History([{"step": 1, **step}])))


@pytest.mark.parametrize(
    ("adapter", "form"),
    [
        ({}, "gguf"),
        ({"targets": "all-linear"}, "gguf"),
        ({"targets": ["q_proj", "lm_head"]}, "gguf"),
        ({"targets": ["embed_tokens", "q_proj"]}, "merged-gguf"),
        ({"targets": ".*(q_proj|embed_tokens)"}, "merged-gguf"),
        ({"targets": ".*(q_proj|embed_tokens)", "exclude": ["embed_tokens"]}, "gguf"),
        ({"trainable_tokens": [5]}, "merged-gguf"),
        ({"variant": "dora"}, "merged-gguf"),
    ],
)
def test_it_names_the_export_that_can_hold_the_adapter(adapter: dict[str, Any], form: str) -> None:
    """A GGUF adapter is refused for the others; tests/lora/export has that."""
    assert AdapterConfig(**adapter).gguf_form == form
