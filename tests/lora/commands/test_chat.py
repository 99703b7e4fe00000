"""The conversation loop, with scripted lines, on a tiny model."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from lora.commands.chat import Chat, chat, named_adapters
from lora.commands.cli import generate
from lora.commands.prompts import check_can_chat, trained_templates
from lora.config.schema import Config
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.tokenizer import Tokenizer
from lora.generation.generator import TextGenerator
from lora.generation.opening import open_generator
from lora.generation.prompts import conversation_ids
from lora.generation.sampling import GREEDY, Sampling
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.training.session import TrainingSession
from tests.support.tiny_gguf import CHATML, write_tiny_llama

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
        session.device.memory.write(
            session.adapter.parameters, session.layout.from_modules(modules)
        )
        session.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def generator(folder: Path, device: Device) -> TextGenerator:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.generation.engine._PIECE_ROWS", 64)  # a prompt in pieces, anywhere
        return opened(folder, device)


def opened(folder: Path, device: Device) -> TextGenerator:
    adapters = {name: folder / name for name in ("polite", "rude")}
    return open_generator(str(folder / "model.gguf"), adapters, max_length=ROOM, device=device)


class Conversation:
    """A chat whose lines are given, and what it wrote."""

    def __init__(
        self,
        generator: TextGenerator,
        max_tokens: int = 4,
        sampling: Sampling = GREEDY,
        **options: object,
    ) -> None:
        generator.forget()
        self.written: list[str] = []
        self.chat = Chat(generator, self.write, max_tokens=max_tokens, sampling=sampling, **options)

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
    for leave in ("/exit", "/quit", "/bye"):
        assert conversation.say(leave, "hello") == ""
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


def test_ctrl_c_while_the_prompt_is_computed(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two pieces; the message is not kept, what was computed of it is."""
    conversation = Conversation(generator)
    text = "a b" * 25
    expected = conversation.say(text)
    conversation = Conversation(generator)
    programs_of, recorded = generator._engine._programs_of, []

    def interrupt(*args: object, **opening: bool) -> object:
        recorded.append(args)
        if len(recorded) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return programs_of(*args, **opening)

    monkeypatch.setattr(generator._engine, "_programs_of", interrupt)
    written = conversation.say(text)
    assert written == "\n(stopped before the answer; the message is not kept)\n\n"
    assert conversation.chat.messages == []
    assert len(recorded) == 1 and len(generator._held) == 64
    again = conversation.say(text)
    assert generator.times.reused_tokens == 64
    assert again.split("\n")[0] == expected.split("\n")[0]


def test_ctrl_c_where_tokens_give_no_text(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(generator, max_tokens=30)
    monkeypatch.setattr(generator, "_text_after", lambda *_: "")
    most_likely, n = generator._most_likely, [0]

    def interrupt(*args: object) -> int:
        n[0] += 1
        if n[0] == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return most_likely(*args)

    monkeypatch.setattr(generator, "_most_likely", interrupt)
    assert "the message is not kept" in conversation.say("hello")
    assert n == [3]


def test_how_an_answer_ended(generator: TextGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    def summary(max_tokens: int) -> str:
        return Conversation(generator, max_tokens).say("hello").strip().split("\n")[-1]

    tokenizer = generator.tokenizer
    monkeypatch.setattr(tokenizer, "_end_of_turn_ids", frozenset())
    assert summary(3).startswith("[3 tokens, ")
    assert summary(3).endswith("; cut at --max-tokens 3]")
    assert summary(500).endswith(f"; the room of {ROOM} tokens is full (--max-length)]")
    one = summary(1)
    assert one.startswith("[1 token; prompt ") and one.endswith("; cut at --max-tokens 1]")
    # An answer that ends by itself, though with the last token that it may have.
    prompt = conversation_ids(tokenizer, [{"role": "user", "content": "hello"}])
    third = list(generator.stream_ids(prompt, max_tokens=3, adapter="polite"))[-1]
    monkeypatch.setattr(tokenizer, "_end_of_turn_ids", frozenset([third]))
    assert summary(3).endswith("; adapter polite]")


def test_a_conversation_has_bos_once(tmp_path: Path) -> None:
    """llama.cpp's: put first where the file asks for it and the template doesn't write it."""
    path = tmp_path / "model.gguf"
    for add_bos, writes in ((False, False), (False, True), (True, False), (True, True)):
        template = ("{{ bos_token }}" if writes else "") + CHATML
        metadata = {
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.add_bos_token": add_bos,
            "tokenizer.chat_template": template,
        }
        write_tiny_llama(path, metadata=metadata)
        tokenizer = Tokenizer.from_gguf(GGUFFile(path))
        ids = conversation_ids(tokenizer, [{"role": "user", "content": "hello"}])
        assert ids.count(0) == (add_bos or writes)
        assert (ids[0] == 0) is (add_bos or writes)


def test_an_adapters_own_template_writes_its_chats(
    generator: TextGenerator, tmp_path: Path
) -> None:
    """As its run was trained; the bare model is asked the same, others have the model's."""
    run = tmp_path / "run"
    run.mkdir()
    source = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ mood }}"
    data = {"train": "t", "chat_template": source, "chat_template_kwargs": {"mood": "glad"}}
    config = {"model": {"path": "m.gguf"}, "data": data, "output": "run"}
    (run / "config.yaml").write_text(json.dumps(config))
    adapters = {"polite": run, "rude": tmp_path / "other.gguf"}
    with pytest.raises(InputError, match="chat_template.jinja: there is no such file, and the ad"):
        trained_templates(generator.tokenizer, adapters)
    (run / "chat_template.jinja").write_text(source)
    templates = trained_templates(generator.tokenizer, adapters)
    assert list(templates) == ["polite"]
    conversation = Conversation(generator, templates=templates)
    asked: list[list[int]] = []
    stream = generator.stream

    def noting(ids: list[int], **options: object) -> Iterator[str]:
        asked.append(ids)
        return stream(ids, **options)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generator, "stream", noting)
        conversation.say("hi", "/adapter off", "/reset", "hi")
    ours = generator.tokenizer.encode("[hi]glad").ids
    assert asked == [ours, ours]
    # A model without a template can chat with such an adapter.
    write_tiny_llama(tmp_path / "model.gguf", metadata={"tokenizer.chat_template": None})
    check_can_chat(str(tmp_path / "model.gguf"), None, [run])


def test_one_series_of_draws(generator: TextGenerator) -> None:
    """The same message is answered otherwise the second time, and the same way in another run."""

    def answers() -> list[str]:
        sampling = Sampling(temperature=2.0, seed=5)
        conversation = Conversation(generator, max_tokens=12, sampling=sampling)
        return [conversation.say("hello", "/reset").split("\n[")[0] for _ in range(2)]

    first, second = answers()
    assert first != second
    assert answers() == [first, second]


def test_lines_that_are_not_utf_8(generator: TextGenerator) -> None:
    conversation = Conversation(generator)
    written = conversation.say(b"caf\xe9".decode("utf-8", "surrogateescape"), "/exit")
    assert written == (
        "The line is not UTF-8: its character 4 is the byte 0xE9. Convert it, for example with "
        "iconv -f latin1 -t utf-8, or set the terminal to UTF-8.\n"
    )
    assert conversation.chat.messages == []
    assert "'\\ud83d'" in conversation.say("\ud83d")  # half a pair that no byte became


# Lines as `lora chat` reads them: how long each is, in a process of its own.
READER = """
from lora.commands.chat import check_is_text, open_terminal
from lora.shaders.errors import InputError
read = open_terminal()
while True:
    try:
        line = read()
    except EOFError:
        break
    try:
        check_is_text(line, "It")
        print(f"<{len(line)}>", flush=True)
    except InputError as error:
        print(error, flush=True)
"""


def test_bytes_on_stdin_that_are_not_utf_8() -> None:
    """They cost their line only."""
    result = subprocess.run(
        [sys.executable, "-c", READER],
        input=b"ab\ncaf\xe9\nabc\n",
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "", "PYTHONUTF8": "1"},
    )
    assert result.returncode == 0, result.stderr
    shown = result.stdout.decode()
    assert "<2>" in shown and "character 4 is the byte 0xE9" in shown and "<3>" in shown


def test_long_lines_on_a_terminal(folder: Path, generator: TextGenerator) -> None:
    """Terminals cut at 4095 bytes what they collect themselves."""
    pty = pytest.importorskip("pty", reason="Windows has other terminals")
    text = "The quick brown fox jumps over the lazy dog and goes home," * 150
    n_tokens = len(conversation_ids(generator.tokenizer, [{"role": "user", "content": text}]))
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "lora", "chat", folder / "model.gguf", "--max-length", "16"],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
        env=os.environ | {"TERM": "xterm"},
    )  # fmt: skip
    os.close(follower)
    shown = b""

    def read_until(wanted: bytes, seconds: float, times: int = 1) -> None:
        nonlocal shown
        while shown.count(wanted) < times and select.select([leader], [], [], seconds)[0]:
            shown += os.read(leader, 4096)

    try:
        read_until(b"> ", 60)
        for n in range(50):
            os.write(leader, text[n * 174 : (n + 1) * 174].encode())
            read_until(b",", 0.2, 3 * (n + 1))  # neither side's buffer may fill
        os.write(leader, b"\n")
        read_until(b"/reset", 20)
    except OSError:  # the process has ended
        pass
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    assert f"has {n_tokens} tokens and the room is 16".encode() in shown, shown[-300:]


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
    assert "adapter first; cut" in written and "adapter off; cut" in written
    assert "(adapter off; loaded: first, polite)" in written


def test_a_template_is_missed_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model.gguf"
    write_tiny_llama(model, metadata={"tokenizer.chat_template": None})
    monkeypatch.setattr("lora.commands.chat.open_generator", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr(
        "lora.generation.opening.open_generator", lambda *_, **__: pytest.fail("loaded")
    )
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
    names = named_adapters(["runs/smol-v1.5", "runs/smol-v1.gguf"])
    assert list(names) == ["smol-v1.5", "smol-v1"]
    assert named_adapters(["runs/a/", "x=runs/b"]) == {"a": Path("runs/a"), "x": Path("runs/b")}
    for values in (["runs/a", "other/a"], ["off=runs/a"], ["=runs/a"]):
        with pytest.raises(InputError, match="is taken; give another one: --adapter NAME="):
            named_adapters(values)
