"""Where an adapter comes from: the config of the run that saved it, and what follows from that."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lora.config.schema import Config, load_config
from lora.data.opened import first_records
from lora.data.records import check_record
from lora.data.sources import open_source
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.chat_template import ChatTemplate
from lora.forward.text.configured import read_template
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError

CONFIG = "config.yaml"
TEMPLATE = "chat_template.jinja"
_PROMPTS = 10_000  # of which the common ending is taken


@dataclass(frozen=True)
class PromptForm:
    """How an adapter's prompts are written, where no chat template stands around them.

    Attributes:
        data_format: completion, instruct or text.
        ending: white space that ends each prompt; "" for none, or where it isn't known.
    """

    data_format: str
    ending: str


@dataclass(frozen=True)
class Origin:
    """The run that an adapter comes from.

    Attributes:
        config: of the run.
        run: its directory.
        folders: where relative paths of its config may lead from, likeliest first.
    """

    config: Config
    run: Path
    folders: tuple[Path, ...]

    @property
    def template_file(self) -> Path | None:
        """The chat template that the run wrote chats with; None for the model's own.

        Raises:
            InputError: it isn't there any more.
        """
        if self.config.data.chat_template is None:
            return None
        file = self.run / TEMPLATE
        if not file.is_file():
            raise InputError(
                f"{file}: there is no such file, and the adapter was trained with a chat template "
                "of its own (data.chat_template); put it there."
            )
        return file

    def chat_template(self, tokenizer: Tokenizer) -> ChatTemplate | None:
        """What chats with the adapter are written with, template variables included.

        Args:
            tokenizer: the model's.

        Returns:
            None where neither the run nor the model has a template.

        Raises:
            InputError: the run's isn't there any more.
        """
        file = self.template_file
        source = None if file is None else read_template(file)
        arguments = self.config.data.chat_template_kwargs
        return ChatTemplate.of(tokenizer, source, arguments=arguments)

    def find(self, name: str) -> Path | None:
        """The file or directory that the run's config calls by a path; None if it is gone."""
        return next((path for f in self.folders if (path := f / name).exists()), None)

    def prompt_form(self, base: GGUFFile) -> PromptForm | None:
        """How prompts are written; None where a chat template writes them or it can't be known."""
        data_format, prompts = self._prompts()
        if data_format == "instruct" and self._has_chat_template(base) is False:
            return PromptForm(data_format, "\n\n")  # as lora/data/rows.py writes them
        if data_format == "completion":
            return PromptForm(data_format, _common_ending(prompts))
        return PromptForm(data_format, "") if data_format == "text" else None

    def _prompts(self) -> tuple[str, list[str]]:
        """The format, "auto" if not known; some prompts, if they matter and the file is there."""
        source = next(iter(self.config.data.sources("train")), None)
        data_format = "auto" if source is None else source.format or "auto"
        if data_format not in ("auto", "completion"):  # the others' rows say nothing more
            return data_format, []
        path = None if source is None or source.path is None else self.find(source.path)
        if source is None or path is None or not path.is_file():
            return data_format, []
        try:
            rows = open_source(source.model_copy(update={"path": str(path)}), "train")
            shape, values = first_records(rows, data_format, source.columns, _PROMPTS)
            if shape.data_format != "completion":
                return shape.data_format, []
            records = [check_record(value, shape) for value in values]
        except InputError:
            return data_format, []
        return shape.data_format, [record.columns["prompt"] for record in records]

    def _has_chat_template(self, base: GGUFFile) -> bool | None:
        """Whether rows of instructions went through a chat template; None: it can't be known."""
        if self.config.data.chat_template is not None:
            return True
        name = self.config.model.tokenizer
        if name is None:
            return base.metadata.get("tokenizer.chat_template") is not None
        path = self.find(name)
        try:
            tokenizer = None if path is None else Tokenizer.from_file(path, gguf_file=base)
        except InputError:
            return None
        return None if tokenizer is None else tokenizer.chat_template is not None


def origin_of(directory: Path) -> Origin | None:
    """The run of an adapter directory or of a checkpoint; None if no config lies there."""
    run = Path(os.path.abspath(directory))
    if run.parent.name == "checkpoints":
        run = run.parents[1]
    try:
        config = load_config(str(run / CONFIG), needs_data=False)  # a script may have given rows
    except InputError:  # none, or that of another program
        return None
    # A run that wrote to runs/a and lies in /home/x/runs/a was started in /home/x.
    output = Path(os.path.normpath(config.output)).parts
    started = [Path(*run.parts[: -len(output)])] if run.parts[-len(output) :] == output else []
    return Origin(config, run, (Path(), *started))


def _common_ending(texts: list[str]) -> str:
    """The spaces, tabs and line breaks with which all of some texts end."""
    shared = os.path.commonprefix([text[::-1] for text in texts])[::-1]
    return shared[len(shared.rstrip(" \t\r\n")) :]
