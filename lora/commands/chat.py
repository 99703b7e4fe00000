"""`lora chat`: a conversation in the terminal, with adapters to switch between."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from lora.commands.prompts import (
    check_can_chat,
    trained_templates,
)
from lora.commands.waiting import waiting
from lora.forward.text.chat_template import ChatTemplate
from lora.generation.generator import TextGenerator
from lora.generation.opening import open_generator
from lora.generation.prompts import check_has_template, conversation_ids
from lora.generation.sampling import Sampler, Sampling
from lora.shaders.choice import Wanted
from lora.shaders.errors import InputError, for_terminal

HELP = """\
/adapter           which adapter is on, and which are loaded
/adapter on|off    answer with the adapter, or with the bare model
/adapter NAME      answer with another of the adapters
/system TEXT       begin again with a system message; without TEXT, with none
/reset             begin again
/help              this list
/exit              leave (or /quit, /bye, Ctrl-D); Ctrl-C stops an answer"""
_LEAVE = ("/exit", "/quit", "/bye")  # the last two are llama.cpp's and Ollama's


class Chat:
    """One conversation: reads lines, answers them, obeys commands.

    Every turn the whole conversation is rendered by the model's chat template; the generator
    computes only what it has not seen, since the keys and values of the rest are kept.

    Args:
        generator: its first adapter, if it has any, is on at the beginning.
        write: takes the pieces of what is shown.
        max_tokens: of one answer.
        sampling: how tokens are chosen; a seed gives one series of draws for all answers.
        system: the system message; None for none.
        templates: chat templates by the adapters that were trained with them; the model's for
            others.

    Raises:
        InputError: there is no chat template.
    """

    def __init__(
        self,
        generator: TextGenerator,
        write: Callable[[str], None],
        *,
        max_tokens: int,
        sampling: Sampling,
        system: str | None = None,
        templates: Mapping[str, ChatTemplate] | None = None,
    ) -> None:
        self._generator = generator
        self._templates = templates or {}
        self._write = write
        self._max_tokens = max_tokens
        self._sampler = Sampler(sampling)
        self._system = system
        self._chosen = next(iter(generator.adapters), None)  # what /adapter on means
        self.adapter = self._chosen
        if self._template is None:
            check_has_template(generator.tokenizer.chat_template)
        self.messages: list[dict[str, str]] = []
        self.reset()

    @property
    def _template(self) -> ChatTemplate | None:
        """The chosen adapter's, also while it is off: the bare model is asked the same."""
        return None if self._chosen is None else self._templates.get(self._chosen)

    def reset(self) -> None:
        """Forgets the conversation; the system message stays."""
        self.messages = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})

    def run(self, read: Callable[[], str]) -> None:
        """Answers line by line until /exit, or until `read` raises EOFError."""
        while True:
            try:
                line = read().strip()
                check_is_text(line, "The line")
            except EOFError:
                self._write("\n")
                return
            except KeyboardInterrupt:
                self._write("\n(Ctrl-D or /exit leaves)\n")
                continue
            except InputError as error:
                self._write(f"{error}\n")
                continue
            if line in _LEAVE:
                return
            try:
                if line.startswith("/"):
                    self._write(self._obey(line) + "\n")
                elif line:
                    self.answer(line)
            except InputError as error:
                self._write(f"{error}\n")

    def answer(self, text: str) -> None:
        """Takes a user's message and writes the answer as it comes; Ctrl-C stops it.

        A message that was stopped before anything was written is not kept.

        Raises:
            InputError: the template refuses it, or the conversation fills the room. The message is
                not kept then.
        """
        self.messages.append({"role": "user", "content": text})
        answer = ""
        try:
            with _noticing_interrupts() as interrupted:
                for piece in self._generator.stream(
                    self._rendered(),
                    max_tokens=self._max_tokens,
                    adapter=self.adapter,
                    sampling=self._sampler,
                    stopped=interrupted,
                ):
                    self._write(piece)
                    answer += piece
        except InputError:
            self.messages.pop()
            raise
        if interrupted() and not answer:
            self.messages.pop()
            self._write("\n(stopped before the answer; the message is not kept)\n")
            return
        self.messages.append({"role": "assistant", "content": answer})
        self._write(f"\n[{self._summary(interrupted=interrupted())}]\n")

    def _rendered(self) -> list[int]:
        """The conversation as token ids, up to where the answer begins.

        Raises:
            InputError: it leaves no room for an answer.
        """
        ids = conversation_ids(self._generator.tokenizer, self.messages, self._template)
        if len(ids) >= self._generator.room:
            raise InputError(
                f"The conversation has {len(ids)} tokens and the room is {self._generator.room}; "
                "begin again with /reset, or start with a larger --max-length."
            )
        return ids

    def _summary(self, *, interrupted: bool) -> str:
        times = self._generator.times
        tokens = f"{times.new_tokens} tokens, {times.speed:.1f}/s"
        parts = [
            tokens if times.new_tokens > 1 else "1 token",  # it came with the prompt: no speed
            f"prompt {times.prompt_tokens} new, {times.prompt_speed:.0f}/s, "
            f"{times.reused_tokens} kept",
            f"adapter {self.adapter or 'off'}",
        ]
        if not times.ended:
            cut = f"cut at --max-tokens {self._max_tokens}"
            full = f"the room of {self._generator.room} tokens is full (--max-length)"
            reason = cut if times.new_tokens == self._max_tokens else full
            parts.append("stopped" if interrupted else reason)
        return "; ".join(parts)

    def _obey(self, line: str) -> str:
        """Does what a command says; returns what to show."""
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        if command == "/help":
            return HELP
        if command == "/reset":
            self.reset()
            return "(a new conversation)"
        if command == "/system":
            self._system = argument or None
            self.reset()
            return "(a new conversation, " + ("with" if argument else "without") + " that message)"
        if command == "/adapter":
            return self._switch(argument)
        return f"There is no command {command}; /help lists them."

    def _switch(self, name: str) -> str:
        loaded = self._generator.adapters
        if name == "off":
            self.adapter = None
        elif name == "on" and self._chosen is not None:
            self.adapter = self._chosen
        elif name in loaded:
            self.adapter = self._chosen = name
        elif name:
            known = ", ".join(loaded) or "none; start with --adapter DIRECTORY"
            return f"There is no adapter {name!r}; loaded: {known}."
        return f"(adapter {self.adapter or 'off'}; loaded: {', '.join(loaded) or 'none'})"


def check_is_text(text: str, what: str) -> None:
    """Refuses a text that was read from bytes that are not UTF-8.

    Args:
        text: its wrong bytes are surrogates, as Python reads command lines (PEP 383).
        what: "The prompt", for the error.

    Raises:
        InputError: it has surrogates.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        found = f"the byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else ascii(chr(code))
        raise InputError(
            f"{what} is not UTF-8: its character {error.start + 1} is {found}. Convert it, for "
            "example with iconv -f latin1 -t utf-8, or set the terminal to UTF-8."
        ) from error


@contextmanager
def _noticing_interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is only noted inside, so that it never cuts through work on the device."""
    seen = False

    def note(*_: object) -> None:
        nonlocal seen
        seen = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: seen
    finally:
        signal.signal(signal.SIGINT, before)


def named_adapters(values: list[str]) -> dict[str, Path]:
    """Adapters by name, out of PATH or NAME=PATH each.

    A value that is a path as a whole is one, also with an = in it.

    Raises:
        InputError: two have one name, or one is called on or off.
    """
    named: dict[str, Path] = {}
    for value in values:
        name, equals, rest = value.partition("=")
        if equals and not Path(value).exists():
            path = Path(rest)
        else:
            path = Path(value)
            name = path.resolve().name.removesuffix(".gguf")
        if name in named or name in ("on", "off", ""):
            raise InputError(
                f"--adapter {value}: the name {name!r} is taken; give another one: "
                f"--adapter NAME={path}."
            )
        named[name] = path
    return named


def open_terminal() -> Callable[[], str]:
    """What reads the next line: of any length, on a terminal with arrow keys and a history.

    Wrong bytes become surrogates (`check_is_text`), so that they cost their line only.

    To be called before a device is opened: LLVM, inside Mesa's drivers, brings along libedit, whose
    functions have the names of readline's. Loaded after it, readline overwrote memory when a line
    was long.
    """
    with suppress(ImportError):  # on Windows, whose terminal has these things
        # Without it the terminal itself collects a line, and cuts it at 4095 bytes.
        import readline  # noqa: F401
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    return lambda: input("> ")


def chat(
    model: str,
    adapters: list[str],
    *,
    system: str | None,
    sampling: Sampling,
    max_tokens: int,
    tokenizer: str | None = None,
    max_length: int | None,
    device: Wanted,
) -> None:
    """Opens a model with its adapters and converses on the terminal: the command `lora chat`.

    Args:
        model: a GGUF file, or a name as in model.path.
        adapters: PATH or NAME=PATH each, of PEFT directories or GGUF adapters; the first is on.
        system: the system message.
        sampling: how tokens are chosen.
        max_tokens: of one answer.
        tokenizer: a tokenizer.json in place of the GGUF's own.
        max_length: the room of the conversation; None for what suits the model.
        device: as in the config, with the implementation of WebGPU.

    Raises:
        InputError: something can't be opened, or the model has no chat template.
    """
    if system is not None:
        check_is_text(system, "The system message (--system)")
    read_line = open_terminal()
    named = named_adapters(adapters)
    check_can_chat(model, tokenizer, named.values())
    with waiting():
        generator = open_generator(
            model,
            named,
            tokenizer=tokenizer,
            max_length=max_length,
            device=device,
        )

    def write(piece: str) -> None:
        print(for_terminal(piece), end="", flush=True)

    conversation = Chat(
        generator,
        write,
        max_tokens=max_tokens,
        sampling=sampling,
        system=system,
        templates=trained_templates(generator.tokenizer, named),
    )
    write(f"{model}; adapter {conversation.adapter or 'off'}; /help lists the commands\n")
    conversation.run(read_line)
