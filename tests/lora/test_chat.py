"""The conversation loop, with scripted lines, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lora.chat import Chat, chat, check_can_chat, named_adapters
from lora.cli import generate
from lora.config import Config
from lora.generation import TextGenerator, open_generator
from lora.sampling import GREEDY, Sampling
from lora.session import TrainingSession
from shaders.device import Device
from shaders.errors import InputError
from tests.forward.tiny_gguf import write_tiny_llama

ROOM = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, device: Device) -> Path:
    """A tiny model with ChatML and two adapters, "polite" and "rude"."""
    folder = tmp_path_factory.mktemp("chat")
    write_tiny_llama(folder / "model.gguf")
    config = Config.model_validate(
        {
            "model": {"path": str(folder / "model.gguf")},
            "adapter": {"rank": 4},
            "data": {"train": "none", "max_length": 8},
            "output": "none",
        }
    )
    session = TrainingSession(config, train=False, device=device)
    for seed, name in enumerate(("polite", "rude")):
        rng = np.random.default_rng(seed)
        modules = {
            path: (a, rng.normal(0, 0.5, b.shape).astype(np.float32))
            for path, (a, b) in session.layout.to_modules(session.parameters()).items()
        }
        session.device.write(session.adapter.parameters, session.layout.from_modules(modules))
        session.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def generator(folder: Path, device: Device) -> TextGenerator:
    adapters = {name: folder / name for name in ("polite", "rude")}
    return open_generator(str(folder / "model.gguf"), adapters, max_length=ROOM, device=device)


class Conversation:
    """A chat whose lines are given, and what it wrote."""

    def __init__(self, generator: TextGenerator, max_tokens: int = 4, **options: object) -> None:
        generator.forget()
        self.written: list[str] = []
        self.chat = Chat(generator, self.write, max_tokens=max_tokens, sampling=GREEDY, **options)

    def write(self, piece: str) -> None:
        self.written.append(piece)

    def say(self, *lines: str) -> str:
        """Runs the loop over lines and the end of input; what was written meanwhile."""
        left: Iterator[str] = iter(lines)

        def read() -> str:
            line = next(left, None)
            if line is None:
                raise EOFError
            return line

        self.written = []
        self.chat.run(read)
        return "".join(self.written)


def test_turns_go_on_from_what_is_kept(generator: TextGenerator) -> None:
    conversation = Conversation(generator)
    written = conversation.say("hello", "", "and the world")
    roles = [message["role"] for message in conversation.chat.messages]
    assert roles == ["user", "assistant"] * 2
    first, second = (m["content"] for m in conversation.chat.messages[1::2])
    assert written.startswith(first) and second in written
    assert written.count("tokens, ") == 2 and "adapter polite" in written
    times = generator.times
    ids = conversation.chat._rendered()
    # The second prompt went on from the first and its answer, as far as that is written again by
    # the same tokens.
    assert times.reused_tokens > 5 and times.prompt_tokens < len(ids) - 5
    assert f"prompt {times.prompt_tokens} new" in written

    # What is answered is what the whole text, computed at once, goes on with.
    conversation.chat.messages.pop()
    whole = conversation.chat._rendered()
    generator.forget()
    again = generator.stream(whole, max_tokens=4, adapter="polite")
    assert "".join(again) == second


def test_switching_adapters(generator: TextGenerator) -> None:
    def answer(*commands: str) -> str:
        conversation = Conversation(generator)
        conversation.say(*commands, "hello")
        return conversation.chat.messages[-1]["content"]

    def expected(adapter: str | None) -> str:
        generator.forget()
        conversation = Conversation(generator)
        conversation.chat.messages = [{"role": "user", "content": "hello"}]
        ids = conversation.chat._rendered()
        return "".join(generator.stream(ids, max_tokens=4, adapter=adapter))

    assert len({expected(None), expected("polite"), expected("rude")}) == 3
    assert answer() == answer("/adapter polite") == expected("polite")
    assert answer("/adapter off") == expected(None)
    assert answer("/adapter off", "/adapter on") == expected("polite")
    assert answer("/adapter rude") == expected("rude")
    assert answer("/adapter rude", "/adapter off", "/adapter on") == expected("rude")
    conversation = Conversation(generator)
    assert "(adapter polite; loaded: polite, rude)" in conversation.say("/adapter")
    assert "no adapter 'x'; loaded: polite, rude" in conversation.say("/adapter x")


def test_commands(generator: TextGenerator) -> None:
    conversation = Conversation(generator, system="Be kind.")
    system = {"role": "system", "content": "Be kind."}
    assert conversation.chat.messages == [system]
    conversation.say("hello", "/reset")
    assert conversation.chat.messages == [system]
    conversation.say("/system Be brief. ", "hello")
    assert conversation.chat.messages[0] == {"role": "system", "content": "Be brief."}
    assert len(conversation.chat.messages) == 3
    conversation.say("/system")
    assert conversation.chat.messages == []
    help_text = conversation.say("/help")
    for command in ("/adapter", "/system", "/reset", "/help", "/exit", "Ctrl-D", "Ctrl-C"):
        assert command in help_text
    assert "no command /what; /help" in conversation.say("/what is this")
    assert conversation.say("/exit", "hello") == ""
    assert conversation.chat.messages == []


def test_ctrl_c_stops_the_answer_only(generator: TextGenerator) -> None:
    before = signal.getsignal(signal.SIGINT)
    conversation = Conversation(generator, max_tokens=50)
    whole = conversation.say("hello")
    full = conversation.chat.messages[-1]["content"]
    conversation = Conversation(generator, max_tokens=50)
    pieces: list[str] = []

    def interrupt(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    conversation.chat._write = interrupt
    conversation.say("hello")
    kept = conversation.chat.messages[-1]
    assert kept == {"role": "assistant", "content": "".join(pieces[:2])}
    assert full.startswith(kept["content"]) and len(kept["content"]) < len(full)
    assert "stopped" in pieces[2] and "stopped" not in whole
    assert signal.getsignal(signal.SIGINT) is before
    conversation.say("and then")  # goes on
    assert len(conversation.chat.messages) == 4


def test_ctrl_c_at_the_prompt(generator: TextGenerator) -> None:
    conversation = Conversation(generator)

    def reads() -> Callable[[], str]:
        results = iter([KeyboardInterrupt, "hello", EOFError])

        def read() -> str:
            result = next(results)
            if isinstance(result, str):
                return result
            raise result

        return read

    conversation.chat.run(reads())
    assert "Ctrl-D or /exit leaves" in "".join(conversation.written)
    assert len(conversation.chat.messages) == 2


def test_a_full_room(generator: TextGenerator) -> None:
    """Refused with a sentence; the conversation is as before, and goes on after /reset."""
    conversation = Conversation(generator)
    conversation.say("hello")
    messages = list(conversation.chat.messages)
    written = conversation.say("x" * ROOM)
    assert f"the room is {ROOM}; begin again with /reset" in written
    assert conversation.chat.messages == messages
    conversation.say("/reset", "hello")
    assert conversation.chat.messages == messages


def test_a_model_without_a_template(tmp_path: Path, device: Device) -> None:
    write_tiny_llama(tmp_path / "model.gguf", metadata={"tokenizer.chat_template": None})
    generator = open_generator(str(tmp_path / "model.gguf"), max_length=16, device=device)
    with pytest.raises(InputError, match=r"no chat template, so it cannot chat; .*lora generate,"):
        Conversation(generator)


def test_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["hello", "/adapter off", "hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    chat(
        str(folder / "model.gguf"),
        [f"first={folder / 'rude'}", str(folder / "polite")],
        system=None,
        sampling=Sampling(temperature=0.8, seed=1),
        max_tokens=3,
        max_length=64,
        device="auto",
    )
    written = capsys.readouterr().out
    assert "adapter first; /help lists" in written
    assert "adapter first]" in written and "adapter off]" in written
    assert "(adapter off; loaded: first, polite)" in written


def test_a_template_is_missed_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    write_tiny_llama(model, metadata={"tokenizer.chat_template": None})
    monkeypatch.setattr("lora.chat.open_generator", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("lora.generation.open_generator", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(InputError, match="no chat template"):
        chat(
            str(model), [], system=None, sampling=GREEDY, max_tokens=3, max_length=16, device="auto"
        )
    with pytest.raises(InputError, match="no chat template"):
        generate(str(model), prompt="a", chat=True)
    # A tokenizer of its own may bring one along.
    alphabet = {character: i for i, character in enumerate("abc")}
    tokenizer = {"model": {"type": "BPE", "vocab": alphabet, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match="no chat template"):
        check_can_chat(str(model), str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    check_can_chat(str(model), str(tmp_path))


def test_paths_with_an_equals_sign(tmp_path: Path) -> None:
    path = tmp_path / "rank=4"
    assert named_adapters([str(path)]) == {str(tmp_path / "rank"): Path("4")}  # nothing there
    path.mkdir()
    assert named_adapters([str(path)]) == {"rank=4": path}
    assert named_adapters([f"a={path}", str(path)]) == {"a": path, "rank=4": path}


def test_names_of_adapters() -> None:
    assert named_adapters(["runs/a/", "x=runs/b"]) == {"a": Path("runs/a"), "x": Path("runs/b")}
    for values in (["runs/a", "other/a"], ["off=runs/a"], ["=runs/a"]):
        with pytest.raises(InputError, match="is taken; give another one: --adapter NAME="):
            named_adapters(values)
