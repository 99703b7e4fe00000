"""Which stretches of a conversation's text the model must say, and what stands before each.

A turn is what generation gives: it begins where the template's generation prompt ends. Text is
what llama.cpp renders with --jinja for the same messages, tools and template variables; a template
may render a turn differently once others follow it (Qwen3 drops thoughts, Phi-3 ends the whole
text with EOS), so each is kept with the rendering in which it comes last.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora.data.conversations import Conversation, Form, Message, in_form
from lora.data.fields import Shown, dropped_fields, dropped_tool
from lora.shaders.errors import InputError

if TYPE_CHECKING:  # Jinja2 is loaded for chats only
    from lora.config.data_section import DataConfig
    from lora.forward.text.chat_template import ChatTemplate, Rendering, Span

ASSISTANT = "assistant"
_LONGEST_HEADER = 200  # characters that a template writes between a prompt and an answer, at most


@dataclass(frozen=True)
class Turn:
    """A message to train on, in the rendering of the conversation through it.

    Attributes:
        index: of the message.
        text: the rendering of all messages through this one; where that has the prompt otherwise
            than generation (Mistral shows the system message in the last question only), the
            generation's prompt and the answer.
        start: where in it the model's part begins.
        after_prompt: a generation prompt ends there, so that tokens do, too.
        said: what the template marks with {% generation %}; None where it marks nothing.
        closing: where the text has no end of turn of its own: what the template writes next if a
            user's message follows, or a tool's result (GLM's <|user|>); "" where it refuses one.
    """

    index: int
    text: str
    start: int
    after_prompt: bool
    said: list[Span] | None
    closing: str


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as text.

    Attributes:
        text: all of it.
        turns: those to train on, ascending.
        ends_with_turn: the last message is one of them.
    """

    text: str
    turns: list[Turn]
    ends_with_turn: bool


def render_turns(
    conversation: Conversation,
    template: ChatTemplate,
    settings: DataConfig,
    end_texts: Sequence[str] = (),
) -> RenderedConversation:
    """Renders a conversation, and checks that nothing of it is dropped.

    Args:
        conversation: of a record.
        template: what renders it.
        settings: which of its messages are trained.
        end_texts: the end-of-turn tokens as they are written.

    Raises:
        InputError: the template refuses the messages, or something in them has no place in the
            text: says which message and which field.
    """
    unread = [name for name in conversation.arguments if name not in template.optional_variables]
    if unread:
        raise InputError(f"chat_template_kwargs: {unread_argument(unread[0], template)}")
    if _folds_results(template.source):
        roles = [message["role"] for message in conversation.messages]
        if "tool" in roles:
            raise InputError(
                f"{conversation.names[roles.index('tool')]}: llama.cpp writes results of tools "
                "into the calls under this first template of Gemma 4, and transformers as turns: "
                "give a newer one with data.chat_template."
            )
    refusals: list[InputError] = []
    for form in conversation.forms:
        try:
            return _Renderer(conversation, form, template, settings, end_texts).render()
        except InputError as error:
            refusals.append(error)
    # Of the template's own form, which comes furthest: in others it stumbles, or drops all.
    raise max(refusals, key=lambda error: getattr(error, "index", -2))


def _folds_results(source: str) -> bool:
    """Whether llama.cpp rewrites results of tools for a template, by what it looks for itself."""
    return "'<|tool_call>call:'" in source and "{#- OpenAI Chat Completions:" not in source


def unread_argument(name: str, template: ChatTemplate) -> str:
    """Why a template variable can't be given, for errors."""
    read = ", ".join(template.optional_variables) or "none"
    return f"{name} is no variable that the chat template reads; it reads {read}."


class _DroppedError(InputError):
    """A template doesn't show something of the message `index`; -1: of the tools."""

    def __init__(self, message: str, index: int) -> None:
        super().__init__(message)
        self.index = index


class _Renderer:
    """Renders one conversation, turn by turn."""

    def __init__(
        self,
        conversation: Conversation,
        form: Form,
        template: ChatTemplate,
        settings: DataConfig,
        end_texts: Sequence[str],
    ) -> None:
        self._conversation = conversation
        self._form = form
        self._messages = conversation.in_form(form)
        if "developer" not in template.source:  # llama.cpp's name for it then
            self._messages = [
                {**message, "role": "system"} if message["role"] == "developer" else message
                for message in self._messages
            ]
        self._template = template
        self._settings = settings
        self._end_texts = end_texts
        self._known: dict[tuple[int, bool], Rendering] = {}

    def render(self) -> RenderedConversation:
        messages, trains_all = self._conversation.messages, self._settings.train_on == "all"
        indices = _trained(self._conversation, self._settings)
        whole = self._text(len(messages))
        if self._form.content_as_parts and "[{'type': 'text'" in whole:
            raise InputError("The chat template refused the messages: it takes no parts.")
        self._check_tools(whole)
        if trains_all:
            self._check(range(len(messages)), Shown(whole))
            return RenderedConversation(whole, [], messages[-1]["role"] == ASSISTANT)
        turns: list[Turn] = []
        done, before = 0, ""  # how many messages are checked, and their rendering
        for index, message in enumerate(messages):
            if message["role"] != ASSISTANT and index not in indices:
                continue
            if index == 0 and message["role"] == ASSISTANT and index in indices:
                raise InputError(
                    "The chat begins with the assistant, so nothing stands before what it says; "
                    "begin with a user's message, or set data.train_on: all."
                )
            turn = self._turn(index)
            # An answer that isn't trained may lose its thoughts later on, but not when it is given.
            context = turn.text[: turn.start]
            self._check(range(done, index), Shown(context, common_length(before, context)))
            self._check([index], Shown(turn.text, turn.start))
            if index in indices:
                self._check_end(turn)
                turns.append(turn)
            done, before = index + 1, turn.text
        self._check(range(done, len(messages)), Shown(whole, common_length(before, whole)))
        return RenderedConversation(whole, turns, len(messages) - 1 in indices)

    def _turn(self, index: int) -> Turn:
        through = self._through(index + 1)
        text = through.text
        if self._conversation.messages[index]["role"] == ASSISTANT:
            before = self._text(index, add_generation_prompt=True) if index else ""
            start = common_length(before, text)
            after_prompt = start == len(before)
            if not after_prompt and start < common_length(before, self._text(index)):
                answer = self._answer_start(index, before, text)
                moved = len(before) - answer
                marks = through.said and [(a + moved, b + moved) for a, b in through.said]
                return Turn(index, before + text[answer:], len(before), True, marks, "")
            said = through.said
        else:  # marks are around what assistants say
            start, after_prompt, said = self._content_start(index, text), False, None
        ended = any(end in text[start:] for end in self._end_texts)
        closing = "" if ended else self._closing(index, text)
        return Turn(index, text, start, after_prompt, said, closing)

    def _answer_start(self, index: int, before: str, text: str) -> int:
        """Where the answer begins in a rendering that has the prompt otherwise.

        There ends what it has in common with the prompt's end, which must hold the whole last
        message, and it is the same for every answer.
        """
        other = in_form({"role": ASSISTANT, "content": "\ufdd2"}, self._form)  # as no answer begins
        stop = common_length(text, self._render([*self._messages[:index], other]).text)
        ends = range(stop, max(0, stop - _LONGEST_HEADER), -1)
        shared = {end: _common_ending(before, text[:end]) for end in ends}
        answer = max(shared, key=shared.__getitem__, default=0)
        last = Shown(before[len(before) - shared.get(answer, 0) :])
        if next(dropped_fields(self._conversation.messages[index - 1], last), None) is not None:
            raise InputError(
                f"{self._conversation.names[index]}: the chat template writes the message before "
                "it otherwise once it follows, so where the answer begins can't be told. Give "
                "another template with data.chat_template, or set data.train_on: all."
            )
        return answer

    def _content_start(self, index: int, text: str) -> int:
        """Where the content of a message stands that has no generation prompt of its own."""
        content = self._conversation.messages[index]["content"].strip()
        start = text.rfind(content)
        if start < 0 or not content:
            raise InputError(
                f"{self._name(index, 'content')}: the chat template does not write it as it is, so "
                f"it can't be trained; leave {self._conversation.messages[index]['role']} out of "
                "data.roles_to_train."
            )
        return start

    def _closing(self, index: int, text: str) -> str:
        """What a template writes behind a turn: GLM's <|user|>, or <|observation|> after calls."""
        called = bool(self._messages[index].get("tool_calls"))
        follows = in_form({"role": "tool" if called else "user", "content": "x"}, self._form)
        messages = [*self._messages[: index + 1], follows]
        try:
            longer = self._render(messages).text
        except InputError:
            return ""
        return longer[len(text) :] if longer.startswith(text) else ""

    def _check(self, indices: Sequence[int], shown: Shown) -> None:
        """Refuses messages of which something isn't shown."""
        for index in indices:
            for name in dropped_fields(self._conversation.messages[index], shown):
                role = self._conversation.messages[index]["role"]
                raise _DroppedError(
                    f"{self._name(index, name)}: the chat template does not show it (role {role}), "
                    "so the model would be trained without it. Take it out of the row, leave the "
                    "row out, or give a template that shows it with data.chat_template.",
                    index,
                )

    def _check_end(self, turn: Turn) -> None:
        """Refuses a message that goes on where generation has stopped."""
        found = [(turn.text.find(end, turn.start), end) for end in self._end_texts]
        place, end = min(((p, e) for p, e in found if p >= 0), default=(len(turn.text), ""))
        rest = turn.text[place + len(end) :]
        if not rest.strip():
            return
        shown = Shown(turn.text[: place + len(end)], turn.start)
        name = next(dropped_fields(self._conversation.messages[turn.index], shown), None)
        if name is not None:
            raise InputError(
                f"{self._name(turn.index, name)}: it goes on behind {end}, and generation stops "
                "there, so the rest would not be trained. Take that token out of the row."
            )

    def _check_tools(self, whole: str) -> None:
        tools = self._conversation.tools
        if tools is None:
            return
        without = self._render(self._messages, with_tools=False).text
        name = dropped_tool(tools, whole, without)
        if name is not None:
            raise _DroppedError(
                f"tools: the chat template does not show the tool {name!r}, so the model would be "
                "trained without it. Take tools out of the row, leave the row out, or give a "
                "template that shows them with data.chat_template.",
                -1,
            )

    def _name(self, index: int, field: str) -> str:
        """What users call a field of a message."""
        name = self._conversation.names[index]
        field = self._conversation.given_names.get((index, field), field)
        return f"{name}.{field}" if name.startswith("messages") else name

    def _text(self, n_messages: int, *, add_generation_prompt: bool = False) -> str:
        return self._through(n_messages, add_generation_prompt=add_generation_prompt).text

    def _through(self, n_messages: int, *, add_generation_prompt: bool = False) -> Rendering:
        key = (n_messages, add_generation_prompt)
        if key not in self._known:  # the whole is mostly the rendering through its last turn, too
            self._known[key] = self._render(
                self._messages[:n_messages], add_generation_prompt=add_generation_prompt
            )
        return self._known[key]

    def _render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        with_tools: bool = True,
    ) -> Rendering:
        return self._template.render(
            messages,
            tools=self._conversation.tools if with_tools else None,
            add_generation_prompt=add_generation_prompt,
            arguments=self._conversation.arguments,
        )


def _trained(conversation: Conversation, settings: DataConfig) -> list[int]:
    """The messages to train on: by their role, unless they say something else themselves."""
    wanted = conversation.wanted
    if settings.train_on == "all":
        if False in wanted:
            name = conversation.names[wanted.index(False)]
            raise InputError(
                f"{name} says that it is not trained, but data.train_on: all trains every token; "
                "take completion or last, or leave weight and train out."
            )
        return []
    by_role = [
        index
        for index, message in enumerate(conversation.messages)
        if message["role"] in settings.roles_to_train
    ]
    if settings.train_on == "last":
        by_role = by_role[-1:]
    return [
        index
        for index, asked in enumerate(wanted)
        if (index in by_role if asked is None else asked)
    ]


def _common_ending(first: str, second: str) -> int:
    """How many characters two texts have in common at their end."""
    return common_length(first[::-1], second[::-1])


def common_length(first: str, second: str) -> int:
    """How many characters two texts have in common at their beginning."""
    if second.startswith(first):
        return len(first)
    return len(os.path.commonprefix([first, second]))
