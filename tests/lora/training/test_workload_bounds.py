"""Sizes that no run has are refused before memory for them is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora.config.schema import load_config
from lora.shaders.errors import InputError
from lora.training.workload import Workload
from tests.support.tiny_run import write_run


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"adapter": {"rank": 65}}, "adapter.rank: got 65, .* has 64 rows or columns"),
        ({"adapter": {"rank": 321, "targets": ["lm_head"]}}, "got 321, .* has 320 rows"),
        ({"adapter": {"rank": 65536, "layers": [1]}}, "adapter.rank: got 65,536"),
    ],
)
def test_a_rank_above_all_sizes(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Workload.open(load_config(str(write_run(tmp_path, **section))), train=True)


def test_the_largest_rank(tmp_path: Path) -> None:
    config = load_config(str(write_run(tmp_path, adapter={"rank": 64})))
    assert Workload.open(config, train=True).layout.rank == 64


def test_micro_batches_that_cannot_be_counted(tmp_path: Path) -> None:
    sections: dict[str, Any] = {
        "data": {"packing": True, "max_length": 100_000}, "train": {"batch_size": 100_000}
    }  # fmt: skip
    workload = Workload.open(load_config(str(write_run(tmp_path, **sections))), train=True)
    with pytest.raises(InputError, match="train.batch_size: micro-batches of up to 10,000,000,000"):
        _ = workload.maximum_rows


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("row", "settings", "chats"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
         {}, True),
        ({"instruction": "say", "input": "a", "output": "b"}, {}, True),
        ({"question": "say a", "answer": "b"}, {}, True),
        ({"question": "say a", "answer": "b"}, {"format": "completion"}, False),
        ({"prompt": "say a", "completion": "b"}, {}, False),
    ],
)  # fmt: skip
def test_which_rows_are_chats(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, str], chats: bool, streaming: bool
) -> None:
    """Prompts to be answered, and the commands at the end, go by what the rows became."""
    path = write_run(tmp_path, data=settings | {"streaming": streaming}, train={"steps": 2})
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    workload = Workload.open(load_config(str(path)), train=True)
    assert workload.trains_on_chats == chats
