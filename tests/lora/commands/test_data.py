"""`lora data`: what it shows of the rows is what is trained."""

from __future__ import annotations

import html
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora.commands.data import data_command
from lora.commands.data_view import histogram, visible
from lora.config.schema import load_config
from lora.data.loading import load_examples
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError
from tests.support.fake_tokenizer import assistant, user
from tests.support.tiny_gguf import CHATML, write_tiny_llama
from tests.support.tiny_sentencepiece import spaced_metadata

# As Qwen3's: the last answer alone has a place for thoughts.
THINKS_LAST = CHATML.replace(
    "message['content'] +",
    "('hm ' if loop.last and message.role == 'assistant' else '') + message['content'] +",
)
ROWS: list[dict[str, Any]] = [
    {"messages": [user("the \x1b[31mred <b>"), assistant("hello\nworld")], "id": 1},
    {"messages": [user("a"), assistant("b"), user("c"), assistant("the end of " * 9)]},
    {"messages": [user("a" * 80), assistant("b")]},
    {"messages": [user("only asked")]},
    {"messages": [user("a"), assistant("b")], "weight": 0},
]


def write(folder: Path, rows: Any = ROWS, **data: Any) -> str:
    """A config; its directory is the folder."""
    write_tiny_llama(folder / "model.gguf")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"path": str(folder / "model.gguf")},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 60, **data},
        "output": str(folder / "run"),
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], config: str, **options: Any) -> str:
    capsys.readouterr()
    data_command(config, **options)
    return capsys.readouterr().out


def test_json_has_what_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, chat_template=THINKS_LAST, train_on="completion")
    lines = [json.loads(line) for line in printed(capsys, config, as_json=True).splitlines()]
    loaded = load_config(config)
    tokenizer = Tokenizer.from_gguf(GGUFFile(loaded.model.path))
    examples, _ = load_examples(loaded.data, tokenizer)
    assert [(line["row"], line["turn"]) for line in lines] == [(0, None), (1, None), (1, 1)]
    for line, example in zip(lines, examples, strict=True):
        assert list(line) == ["row", "turn", "text", "ids", "trained", "cut"]
        assert line["ids"] == example.ids.tolist()
        assert line["trained"] == example.trained.astype(int).tolist()
        assert line["cut"] is example.cut
    assert lines[2]["text"].endswith("<|im_start|>assistant\nhm b<|im_end|>")
    assert [line["cut"] for line in lines] == [False, True, False]
    assert len(printed(capsys, config, as_json=True, rows=1).splitlines()) == 1
    with pytest.raises(InputError, match="data.eval: got null"):
        data_command(config, evaluation=True)
    over = [f"data.eval={loaded.data.train}"]
    assert len(printed(capsys, config, as_json=True, evaluation=True, set_=over).splitlines()) == 3


def test_what_a_pipe_gets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path)
    shown = printed(capsys, config, ids=True, rows=2)
    assert "\x1b" not in shown  # neither colours nor the row's own
    place = f"{tmp_path}/train.jsonl"
    assert shown.startswith(f"row 0 ({place}, line 1): ")
    assert (
        "<|im_start|>user↵\nthe \\x1b[31mred <b><|im_end|>↵\n<|im_start|>assistant↵\n"
        "[[hello↵\nworld<|im_end|>]]↵\n" in shown
    )
    second = shown[shown.index("row 1") :]
    cut = re.match(
        r"row 1 \(.*, line 2\): (\d+) tokens, (\d+) trained; the last (\d+) are cut off, some",
        second,
    )
    assert cut is not None and int(cut[1]) - int(cut[3]) == 60
    assert "[[the end of the end" in second and "]][cut]\n" in second
    numbers = re.findall(r"^[\d\[\] ]+$", second, re.MULTILINE)[0]
    assert len(re.findall(r"\d+", numbers)) == 60
    assert "left out, what is trained begins beyond data.max_length: row 2\n" in shown
    assert "left out, empty, or without a turn to train: row 3\n" in shown
    assert "left out, of weight 0: row 4\n" in shown
    assert "ignored columns: id" in shown
    assert shown.count("row 0 (") == 1 and "row 2 (" not in shown
    # Nothing at all is trained: the reasons are shown all the same.
    nothing = write(tmp_path, ROWS[3:])
    assert printed(capsys, nothing).startswith("0 chat examples")


def test_a_terminal_of_80_columns_gets_colours(tmp_path: Path) -> None:
    config = write(tmp_path)
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(
        [sys.executable, "-m", "lora", "data", config], stdout=follower, env=environment
    ) as process:
        os.close(follower)
        received = b""
        while True:
            try:
                part = os.read(leader, 4096)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            received += part
    os.close(leader)
    assert process.returncode == 0
    shown = received.decode().replace("\r\n", "\n")
    assert "\x1b[32mhello↵\x1b[0m\n\x1b[32mworld<|im_end|>\x1b[0m↵" in shown
    assert "[[" not in shown
    plain = re.sub(r"\x1b\[[\d;]*m", "", shown)
    assert max(map(len, plain.splitlines())) <= 80


def test_a_reader_that_has_enough_and_a_terminal_of_ascii(tmp_path: Path) -> None:
    config = write(tmp_path, ROWS[:1] * 3000)
    command = [sys.executable, "-m", "lora", "data", config, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["row"] == 0
        process.stdout.close()
        assert process.stderr.read() == b""
    done = subprocess.run(
        command[:-1], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"[[hello\\u21b5\nworld" in done.stdout


def test_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, page = write(tmp_path), tmp_path / "page.html"
    assert printed(capsys, config, html=page) == f"Wrote {page}.\n"
    text = page.read_text()
    tokens = re.findall(r'<span title="(\d+)"( class="trained")?>([^<]*)</span>', text)
    loaded = load_config(config)
    examples, _ = load_examples(loaded.data, Tokenizer.from_gguf(GGUFFile(loaded.model.path)))
    assert [int(token[0]) for token in tokens] == [i for e in examples for i in e.ids.tolist()]
    assert [bool(t[1]) for t in tokens] == [t for e in examples for t in e.trained.tolist()]
    written = html.unescape("".join(token[2] for token in tokens))
    assert "\\x1b[31mred <b><|im_end|>\n<|im_start|>assistant\nhello" in written
    assert 'class="cut">[cut]' in text and "Left out, of weight 0: row 4" in text
    printed(capsys, config, html=page, rows=1)  # a page of ours is replaced
    assert "row 0 (" in page.read_text() and "row 1 (" not in page.read_text()
    page.write_text("mine")
    with pytest.raises(InputError, match=r"page.html is there already; name another file"):
        data_command(config, html=page)
    assert page.read_text() == "mine"
    with pytest.raises(InputError, match="is a directory; name a file, such as data.html"):
        data_command(config, html=tmp_path)


def test_spaces_of_sentencepiece_are_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first token loses its space when it is decoded by itself."""
    config = write(tmp_path, [{"prompt": "hi", "completion": " hi é"}])
    write_tiny_llama(tmp_path / "model.gguf", metadata=spaced_metadata())
    assert "\nhi[[ hi é</s>]]\n" in printed(capsys, config)
    page = tmp_path / "page.html"
    printed(capsys, config, html=page)
    assert "".join(re.findall(r"<span[^>]*>([^<]*)</span>", page.read_text())) == (
        "hi hi é&lt;/s&gt;"
    )


def test_a_histogram_fits_its_width() -> None:
    lengths = [*range(1, 100), *[250] * 40, 999]
    for width in (40, 80, 200):
        lines = histogram(lengths, 260, width)
        assert max(map(len, lines)) <= width
        assert sum(int(re.match(r" *\d+ to +\d+ +(\d+)", line)[1]) for line in lines[1:]) == 140
    assert histogram(lengths, 260, 80)[1].startswith("   0 to   99  99 █")
    assert [line.split("█")[-1].strip() for line in lines if "cut" in line][1:] == [
        "some cut",
        "cut",
    ]
    assert histogram([3], 8, 80)[1:] == [
        "0 to 0  0",
        "1 to 1  0",
        "2 to 2  0",
        f"3 to 3  1 {'█' * 57}",
    ]


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert visible("a\x1b[2J\r\nb\u202e\n") == "a\\x1b[2J\\r↵\nb\\u202e↵\n"
