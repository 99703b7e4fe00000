"""Messages to text, by the chat template inside the model.

Rendered as transformers does (utils/chat_template_utils.py, `_compile_jinja_template`), because
the templates are written for it, with the variables that llama.cpp gives with --jinja. A template
comes out of a downloaded file: it runs in Jinja's sandbox, in a process with limits on time and
memory (forward/text/bounded.py), and writes at most a multiple of what it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora.forward.text.bounded import ask
from lora.shaders.errors import InputError
from lora.shaders.untrusted import n_characters

Span = tuple[int, int]  # (start, end) in characters, end exclusive

# Written around what {% generation %} holds and taken out again: noncharacters, which no text has.
_OPENS, _CLOSES = "\ufdd0", "\ufdd1"
# In templates that read thoughts. llama.cpp finds these out by rendering some: tags alone, such as
# those with which a prompt closes thoughts that it doesn't want, are none.
_THOUGHTS = re.compile(r"reasoning|thought|\[THINK\]|<\|channel")
_WHITE_SPACE = " \t\n\r\f\v"
_MARK = re.compile(f"[{_OPENS}{_CLOSES}]")
# What a template writes: so many characters, and so many for each that it is given.
_MOST_WRITTEN, _MOST_TIMES = 1 << 22, 32
_WHAT = "The chat template"
_DATE, _DATETIME = "%d %b %Y", "%b %d %Y"
# Not to be given as arguments.
_GIVEN = (
    "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token",
    "strftime_now",
)  # fmt: skip


class SpecialTokens(Protocol):
    """What is asked of a tokenizer here."""

    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def chat_template(self) -> str | None: ...
    @property
    def tool_use_template(self) -> str | None: ...
    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...


@dataclass(frozen=True)
class Rendering:
    """Messages as text.

    Attributes:
        text: the rendering.
        said: what {% generation %} holds, ascending; None where the template has no such mark.
    """

    text: str
    said: list[Span] | None = None


@dataclass(frozen=True)
class ChatTemplate:
    """A template with all that it is given besides the messages.

    Attributes:
        source: Jinja.
        tool_use_source: of the template that some models have for rows with tools; None for none.
        bos_token, eos_token: their text, for templates that write them; None leaves the name
            undefined, which renders as nothing.
        arguments: further variables (`chat_template_kwargs`), such as enable_thinking.
        now: what strftime_now, date_string and datetime tell; None for the clock.
    """

    source: str
    tool_use_source: str | None = None
    bos_token: str | None = None
    eos_token: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    now: datetime | None = None

    @classmethod
    def of(
        cls,
        tokenizer: SpecialTokens,
        source: str | None = None,
        *,
        arguments: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> ChatTemplate | None:
        """The template of a tokenizer, or another one with the tokenizer's BOS and EOS.

        Args:
            source: in place of the tokenizer's; None for the tokenizer's.
            arguments, now: see the class.

        Returns:
            None where there is no template.
        """
        own = source is None
        template = tokenizer.chat_template if own else source
        if template is None:
            return None
        bos, eos = (
            None if token is None else tokenizer.decode([token], skip_special=False)
            for token in (tokenizer.bos_id, tokenizer.eos_id)
        )
        for_tools = tokenizer.tool_use_template if own else None
        return cls(template, for_tools, bos, eos, arguments or {}, now)

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads from outside, those of messages and tools included."""
        sources = filter(None, (self.source, self.tool_use_source))
        return frozenset().union(*(_variables_of(source) for source in sources))

    @cached_property
    def is_dated(self) -> bool:
        """Whether it reads the time."""
        return not self.variables.isdisjoint(("strftime_now", "date_string", "datetime"))

    @property
    def written_date(self) -> str:
        """What it may write of the time; "" for nothing. Renderings with the same are the same."""
        if not self.is_dated:
            return ""
        now, formats = self.now or datetime.now(), [_DATE, _DATETIME]
        for source in filter(None, (self.source, self.tool_use_source)):
            found = ask(date_formats, source, what=_WHAT)
            if found is None:
                return now.isoformat()
            formats += found
        return repr([now.strftime(one) for one in formats])

    @property
    def optional_variables(self) -> list[str]:
        """What may be given as `arguments`, by the names that the template reads."""
        built_in = {*_GIVEN, *_environment().globals}
        return sorted(self.variables - built_in)

    def _variables(self, source: str, now: datetime) -> dict[str, Any]:
        """What a template is given whatever the messages."""
        special_tokens = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        given: dict[str, Any] = {
            **{name: text for name, text in special_tokens.items() if text is not None},
            # As llama.cpp; where transformers gives nothing, thoughts are off in Qwen 3.5's small
            # models, and Llama 3.1's date is one of 2024.
            "enable_thinking": _reads_thoughts(source),
        }
        if self.is_dated:  # it takes longer than all the rest
            given |= {"date_string": now.strftime(_DATE), "datetime": now.strftime(_DATETIME)}
        return {**given, **self.arguments}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        arguments: Mapping[str, Any] | None = None,
    ) -> Rendering:
        """Renders messages into the text that the model was trained on.

        Args:
            messages: each with `role` and `content`, and whatever else the template reads.
            tools: JSON schemas of functions; None for none.
            add_generation_prompt: ends with the opening of an assistant's turn.
            arguments: further variables, besides the template's own and before them.

        Raises:
            InputError: the template is no Jinja, or refuses the messages.
        """
        use_tools = tools is not None and self.tool_use_source is not None
        source = self.tool_use_source if use_tools else self.source
        assert source is not None
        now = self.now or datetime.now()
        variables = {**self._variables(source, now), **(arguments or {})}
        # tools and documents are given as None and not left out: templates ask `tools is none`.
        given = {"documents": None, **variables, "messages": messages, "tools": tools}
        text, has_marks = ask(render_source, source, given, now, add_generation_prompt, what=_WHAT)
        return _unmarked(text) if has_marks else Rendering(text)


def render_source(
    source: str, given: dict[str, Any], now: datetime, add_generation_prompt: bool
) -> tuple[str, bool]:
    """Renders; run by `ask`.

    Returns:
        the text with its marks, and whether the template has {% generation %} blocks.

    Raises:
        InputError: the template is no Jinja, refuses the messages, or writes too much.
    """
    compiled = _compile(source)
    given = {"strftime_now": now.strftime, **given}
    pieces: list[str] = []
    most, n_written = _MOST_WRITTEN, 0
    try:
        for piece in compiled.generate(given, add_generation_prompt=add_generation_prompt):
            n_written += len(piece)
            if n_written > most:
                most = _MOST_WRITTEN + _MOST_TIMES * n_characters(given)
                if n_written > most:
                    raise InputError(
                        f"The chat template writes more than {most:,} characters, which no "
                        "honest one does with these messages; look at what it says."
                    )
            pieces.append(piece)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # a template is a program: it may raise anything
        raise InputError(
            f"The chat template refused the messages: {_reason(error)}. Check their roles and "
            "fields."
        ) from error
    return "".join(pieces), _has_generation_blocks(source)


def _unmarked(marked: str) -> Rendering:
    """Takes the marks of generation blocks out of a rendering, and says where they were."""
    said: list[Span] = []
    parts: list[str] = []
    length, opened, done = 0, None, 0
    for mark in _MARK.finditer(marked):
        parts.append(marked[done : mark.start()])
        length += len(parts[-1])
        done = mark.end()
        if (mark[0] == _OPENS) is not (opened is None):
            raise InputError(
                "The messages hold U+FDD0 or U+FDD1, which are no characters, or the chat template "
                "nests {% generation %} blocks."
            )
        if opened is None:
            opened = length
        else:
            said.append((opened, length))
            opened = None
    return Rendering("".join([*parts, marked[done:]]), said)


class _Environment(ImmutableSandboxedEnvironment):
    """Strips ASCII white space, as llama.cpp; Python would strip a no-break space, too."""

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Calls what a template calls."""
        of_text = isinstance(getattr(obj, "__self__", None), str)
        if of_text and not args and obj.__name__ in ("strip", "lstrip", "rstrip"):
            args = (_WHITE_SPACE,)
        return super().call(context, obj, *args, **kwargs)


@lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.filters["trim"] = _trim
    environment.globals["raise_exception"] = _raise_exception
    return environment


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    try:
        return _environment().from_string(template)
    except MemoryError:
        raise
    except Exception as error:  # besides TemplateSyntaxError, RecursionError and the like
        raise InputError(f"The chat template is not valid Jinja: {_reason(error)}.") from error


@lru_cache(maxsize=8)
def _variables_of(template: str) -> frozenset[str]:
    return frozenset(ask(undeclared_variables, template, what=_WHAT))


def undeclared_variables(template: str) -> list[str]:
    """The names that a template reads from outside; run by `ask`.

    Raises:
        InputError: it is no Jinja.
    """
    _compile(template)  # refuses what is no Jinja
    return sorted(meta.find_undeclared_variables(_environment().parse(template)))


def date_formats(template: str) -> list[str] | None:
    """The formats in which a template writes the time by strftime_now; run by `ask`.

    Returns:
        None where that can't be told: a format is computed, or the function has another name.
    """
    formats = []
    for call in _environment().parse(template).find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and call.node.name == "strftime_now":
            given = [one.value for one in call.args if isinstance(one, nodes.Const)]
            if len(given) != 1 or len(call.args) != 1:
                return None
            formats.append(str(given[0]))
    return formats if _named(template).count("strftime_now") == len(formats) else None


@lru_cache(maxsize=8)
def _reads_thoughts(template: str) -> bool:
    return _THOUGHTS.search(template) is not None


def _named(template: str) -> list[str]:
    """The names that a template reads or sets, as often as it does; tests for one don't count."""
    names = _environment().parse(template).find_all(nodes.Name)
    tests = _environment().parse(template).find_all(nodes.Test)
    tested = [t.node.name for t in tests if isinstance(t.node, nodes.Name)]
    found = [name.name for name in names]
    for name in tested:
        found.remove(name)
    return found


@lru_cache(maxsize=8)
def _has_generation_blocks(template: str) -> bool:
    _compile(template)
    parsed = _environment().parse(template)
    marks = parsed.find_all(nodes.TemplateData)
    return any(_OPENS in data.data for data in marks)


class _GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %}, transformers' mark around what is trained on.

    The text inside is rendered as if the mark were not there, between two marks of our own. What is
    set inside is not seen outside, as in transformers.
    """

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        opens, closes = (
            nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in (_OPENS, _CLOSES)
        )
        return nodes.Scope([opens, *body, closes], lineno=line)


def _trim(value: Any, chars: str | None = None) -> str:
    return str(value).strip(chars or _WHITE_SPACE)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes <, > and & for HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _reason(error: Exception) -> str:
    """The error's text as part of a sentence."""
    return (str(error) or type(error).__name__).rstrip(".")
