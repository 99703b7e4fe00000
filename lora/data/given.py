"""Rows that a script gives, in place of files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lora.data.examples import Example, Examples
from lora.data.loading import DataSets
from lora.data.masks import TextTokenizer
from lora.data.sources import GivenRows
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError
from lora.storage.stores import resolve_model

Row = Mapping[str, Any]


class OnceThrough:
    """An iterator as rows: the first can be looked at, and they can be gone through once."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._seen: list[Row] = []
        self._gone = False

    def first(self) -> list[Row]:
        """The first row, which stays; none where there is none."""
        if not self._seen and not self._gone:
            self._seen = list(islice(self._rows, 1))
        return self._seen

    def __iter__(self) -> Iterator[Row]:
        if self._gone:
            raise InputError(
                "examples: an iterator is gone through once, and the run goes on behind its end; "
                "give something that can be iterated again (a list, a datasets.IterableDataset, "
                "an object with __iter__), or fewer train.steps."
            )
        self._gone = True
        return chain(self._seen, self._rows)


def is_counted(rows: Iterable[Any]) -> bool:
    """Whether rows are all there: a list, a datasets.Dataset. Others are streamed."""
    return hasattr(rows, "__len__") and hasattr(rows, "__getitem__")


def given_rows(rows: Iterable[Any]) -> GivenRows:
    """Rows of a script as a source."""
    return GivenRows(OnceThrough(rows) if isinstance(rows, Iterator) else rows)


def are_tokens(rows: Iterable[Any]) -> bool:
    """Whether rows are tokens already, all of them.

    Raises:
        InputError: some are.
    """
    if isinstance(rows, Examples):
        return True
    # Of a list all; a data set may have millions of rows, whose first says it.
    looked_at = rows if isinstance(rows, list | tuple) else islice(iter(rows), 1)
    kinds = {isinstance(row, Example) for row in looked_at}
    if len(kinds) == 2:
        raise InputError("examples: some are rows and some tokens (Example); give one kind.")
    return kinds == {True}


def tokenize(row: Row, model: str | Path | TextTokenizer | Any, **settings: Any) -> list[Example]:
    """A row as the tokens that training takes, and which of them are trained.

    Args:
        row: of any shape that `data.train` may have, such as {"messages": …}.
        model: a GGUF file, or a name as in model.path; a Config or a TrainingSession, whose
            settings then hold; or a tokenizer.
        settings: keys of `data:`, such as train_on="all" or max_length=1024.

    Returns:
        mostly one example; several where a chat's template shows a turn otherwise later on, or
        with overflow="split"; none where no token is trained.

    Raises:
        InputError: the row or a setting is wrong.

    Example:
        >>> (example,) = lora.tokenize({"prompt": "2 + 2 =", "completion": " 4"}, "model.gguf")
        >>> example.ids[example.trained]
    """
    from lora.config.data_section import DataConfig  # pydantic

    config = getattr(model, "config", model)
    values: dict[str, Any] = {}
    if hasattr(config, "data") and hasattr(config, "model"):
        values = config.data.model_dump(exclude={"train", "eval", "eval_share", "streaming"})
    tokenizer = _tokenizer_of(model, config)
    try:
        data = DataConfig.model_validate({**values, **settings})
    except ValueError as error:  # pydantic's is one
        from lora.config.errors import config_problems

        problems = config_problems(error, DataConfig, settings)  # type: ignore[arg-type]
        raise InputError(
            "\n".join(f"tokenize: {key}: {sentence}" for key, sentence in problems.items())
        ) from None
    return list(DataSets(data, tokenizer, given=GivenRows([row])).load("train").examples)


def _tokenizer_of(model: Any, config: Any) -> TextTokenizer:
    if hasattr(model, "tokenizer") and not hasattr(model, "encode"):  # a session
        found: TextTokenizer = model.tokenizer
        return found
    if hasattr(model, "encode"):
        tokenizer: TextTokenizer = model
        return tokenizer
    if hasattr(config, "model"):
        return Tokenizer.open(GGUFFile(resolve_model(config.model.path)), config.model.tokenizer)
    return Tokenizer.open(GGUFFile(resolve_model(str(model))))
