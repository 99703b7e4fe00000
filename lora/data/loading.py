"""Data sets to examples: sources opened, tokenized or found in the cache, and put together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from functools import cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from lora.data.cache import folder_of_tables, keep, kept, key_of
from lora.data.examples import DataSummary, Examples, LoadedData, Places
from lora.data.masks import TextTokenizer
from lora.data.opened import OpenedSource, check_settings_of_chats, opened
from lora.data.peers import Alone, Peers, tokenized_together
from lora.data.pieces import PieceTokenizer, Task, tokenize_piece
from lora.data.pool import Pool, can_start, n_processes
from lora.data.rows import template_source
from lora.data.sources import GivenRows, Piece, RowSource, Split, open_source
from lora.data.streams import StreamedExamples
from lora.data.table import REASONS, USED, TableWriter, TokenizedPiece, TokenTable
from lora.forward.text.origin import TokenizerOrigin
from lora.shaders.errors import InputError

if TYPE_CHECKING:
    from lora.config.data_section import DataConfig

_AT_ONCE = 2  # pieces for each of a pool's processes, before peers are told
_FEW_PIECES = 2  # up to so many are tokenized here, and not kept: starting processes takes longer
_EVAL_ROWS = 0xE7A1  # beside the seed, for the draw of data.eval_share
_EVAL_SAMPLES = 0x5A3B  # the same, of train.eval_samples


class DataSets:
    """data.train and data.eval of one config; each is read once.

    Args:
        settings: the config's `data:`.
        tokenizer: the model's.
        now: what chat templates take for the time; None for the clock.
        seed: of the rows that data.eval_share takes.
        given: rows in place of data.train; None for none.
        peers: the processes that read the same data; None for this one alone.
    """

    def __init__(
        self,
        settings: DataConfig,
        tokenizer: TextTokenizer,
        now: datetime | None = None,
        seed: int = 0,
        given: RowSource | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._now = datetime.now() if now is None else now
        self._seed = seed
        self._given = given
        self._peers: Peers = Alone() if peers is None else peers
        self._loaded = cache(self._load)
        self._tables = cache(self._tokenize)
        self._opened = cache(self._open)

    def load(self, split: Split) -> LoadedData:
        """All of one, with what is left out, which may be all.

        Raises:
            InputError: data can't be read, a row doesn't fit its format, or the model has no chat
                template for chats.
        """
        share = self._settings.eval_share
        if share is None:
            return self._loaded(split)
        whole = self._loaded("train")
        used = np.unique(whole.examples.rows)
        n_taken = max(1, round(share * len(used)))
        if n_taken >= len(used):
            raise InputError(
                f"data.eval_share: {share:g} of {len(used)} rows leaves none to train on."
            )
        draw = np.random.default_rng((self._seed, _EVAL_ROWS)).permutation(len(used))
        taken = np.sort(used[draw[:n_taken]])
        rest = np.setdiff1d(np.arange(len(whole.places)), taken, assume_unique=True)
        weights = [source.weight for source in self._opened("train")]
        examples = Examples(self._tables("train"), weights, taken if split == "eval" else rest)
        return _part(whole, examples, taken if split == "eval" else rest, self._settings)

    def examples(self, split: Split) -> tuple[Examples, DataSummary]:
        """The examples of one, at least one.

        Raises:
            InputError: as `load`, or no token of the whole data set is trained.
        """
        loaded = self.load(split)
        summary = loaded.summary
        if not loaded.examples:
            reasons = "; ".join(
                f"{number}, {reason}" for reason, number in summary.left_out.items()
            )
            raise InputError(
                f"data.{split}: no token of its {summary.n_rows} rows is trained. Left out: "
                f"{reasons} (data.max_length is {self._settings.max_length}; the longest row has "
                f"{summary.longest} tokens)."
            )
        return loaded.examples, summary

    def evaluated(self, most: int | None = None) -> tuple[Examples, DataSummary, dict[str, range]]:
        """The examples of data.eval, and which of them make up each named set.

        Args:
            most: rows of a set that are taken, drawn by the seed; None for all.

        Raises:
            InputError: as `examples`, also of one set alone.
        """
        examples, summary = self.examples("eval")
        sets = self._settings.eval_sets
        bounds = examples.first_rows[np.cumsum([0, *sets.values()])] if sets else None
        if most is not None:
            used = np.unique(examples.rows)
            taken = np.sort(
                np.concatenate([_drawn(part, most, self._seed) for part in _parts(used, bounds)])
            )
            whole = self.load("eval")
            chosen = Examples(examples.tables, None, taken)
            examples, summary = chosen, _part(whole, chosen, taken, self._settings).summary
        if bounds is None:
            return examples, summary, {}
        places = np.searchsorted(examples.rows, bounds).tolist()
        found = {
            name: range(*ends)
            for name, ends in zip(sets, zip(places, places[1:], strict=False), strict=True)
        }
        for name, part in found.items():
            if not part:
                raise InputError(f"data.eval.{name}: no token of its rows is trained.")
        return examples, summary, found

    def streamed(self) -> StreamedExamples:
        """The rows of data.train as they come.

        Raises:
            InputError: a source can't be opened, or its first row is wrong.
        """
        return StreamedExamples(
            self._opened("train", True), self._settings, self._tokenizer, self._now
        )

    def of_rows(self, rows: Iterable[Any]) -> Examples:
        """Other rows, tokenized by the same settings.

        Raises:
            InputError: one is wrong, or no token of theirs is trained.
        """
        given = DataSets(
            self._settings.model_copy(update={"eval_share": None}),
            self._tokenizer,
            self._now,
            given=GivenRows(rows),
        )
        return given.examples("train")[0]

    def _load(self, split: Split) -> LoadedData:
        tables = self._tables(split)
        weights = [source.weight for source in self._opened(split)]
        return _loaded(Examples(tables, weights), self._settings)

    def _open(self, split: Split, streaming: bool = False) -> list[OpenedSource]:
        if self._given is not None and split == "train":
            return [opened(self._given, self._settings.format, self._settings.columns)]
        configured = self._settings.sources(split)
        if not configured:
            raise InputError(f"data.{split}: got null; name the examples to {_VERBS[split]} on.")
        return [
            opened(
                open_source(one, split, streaming=streaming or self._settings.streaming),
                one.format or "auto",
                one.columns,
                one.weight,
            )
            for one in configured
        ]

    def _tokenize(self, split: Split) -> list[TokenTable]:
        sources = self._opened(split)
        formats = {source.shape.data_format for source in sources}
        if split == "train" and formats <= {"completion", "text"}:
            check_settings_of_chats(self._settings, " and ".join(sorted(formats)))
        return [
            tokenized_source(source, self._settings, self._tokenizer, self._now, self._peers)
            for source in sources
        ]


_VERBS = {"train": "train", "eval": "evaluate"}


def load_examples(
    settings: DataConfig,
    tokenizer: TextTokenizer,
    split: Literal["train", "eval"] = "train",
    now: datetime | None = None,
) -> tuple[Examples, DataSummary]:
    """Loads and tokenizes the records of data.train or data.eval.

    Args:
        settings: the config's `data:`.
        tokenizer: the model's.
        split: which of the two; data.eval must be set for "eval".
        now: what chat templates take for the time; None for the clock.

    Raises:
        InputError: data can't be read, a row doesn't fit its format, the model has no chat
            template for chats, or no token of the whole data set is trained.
    """
    return DataSets(settings, tokenizer, now).examples(split)


def load_data(
    settings: DataConfig,
    tokenizer: TextTokenizer,
    split: Literal["train", "eval"] = "train",
    now: datetime | None = None,
    seed: int = 0,
) -> LoadedData:
    """The same with what is left out, which may be all; arguments and errors as `load_examples`.

    `seed` is that of the rows that data.eval_share takes, train.seed.
    """
    return DataSets(settings, tokenizer, now, seed).load(split)


def tokenized_source(
    source: OpenedSource,
    settings: DataConfig,
    tokenizer: TextTokenizer,
    now: datetime,
    peers: Peers | None = None,
) -> TokenTable:
    """A source's rows as tokens: out of the cache, or tokenized, by several processes if many.

    Args:
        peers: who call this together; None for this process alone.

    Raises:
        InputError: a row is wrong.
    """
    peers = Alone() if peers is None else peers
    task = Task(settings, source.shape, source.rows.is_pieces, now)
    here = PieceTokenizer(task, tokenizer)
    pieces = source.rows.pieces()
    few = list(islice(pieces, _FEW_PIECES + 1))
    origin: TokenizerOrigin | None = getattr(tokenizer, "origin", None)
    data_format, dated = source.shape.data_format, here.rows.is_dated
    if len(few) <= _FEW_PIECES or origin is None or not can_start():
        found = (tokenize_piece(here, piece) for piece in chain(few, pieces))
        return _in_memory(found, data_format, dated)
    from lora.data.worker import Setup

    every: Iterator[Piece] = chain(few, pieces)
    data = source.rows.fingerprint()
    if settings.chat_template is not None:  # the processes may run elsewhere, and it may change
        text = template_source(settings.chat_template)
        task = replace(task, settings=settings.model_copy(update={"chat_template": text}))
    setup = Setup(task, origin)
    if data is None:
        with Pool(setup, _pool_size(peers)) as pool:
            return _in_memory(_by_all(pool, peers, every), data_format, dated)
    key = key_of(task, data, origin, here.rows.written_date)
    table = kept(key)
    if all(peers.gather(table is not None)):
        assert table is not None
        return table
    from lora.shaders.choice import say_once

    say_once(f"Tokenizing {source.rows.name}; later starts read it from {folder_of_tables()}.")
    with Pool(setup, _pool_size(peers)) as pool:
        tokens = _by_all(pool, peers, every)
        if table is None and peers.local_rank == 0:
            table = keep(key, tokens, data_format, dated)
        for _ in tokens:  # who keeps nothing does its share of the work all the same
            pass
    peers.gather(None)  # those who wrote have ended
    if table is None:
        table = kept(key)
    if table is None:
        raise InputError(
            f"{folder_of_tables()}: what the first process of this host has tokenized can't be "
            "read from there; set XDG_CACHE_HOME to one folder for all processes of a host."
        )
    return table


def _pool_size(peers: Peers) -> int:
    """Processes of this one's pool: those of a host share its processors."""
    return max(1, n_processes() // peers.local_size)


def _by_all(pool: Pool, peers: Peers, pieces: Iterator[Piece]) -> Iterator[TokenizedPiece]:
    """The tokens of all pieces, by the pools of all processes."""
    if peers.size == 1:
        return pool.tokenized(pieces)
    at_once = _AT_ONCE * max(peers.gather(_pool_size(peers)))
    return tokenized_together(peers, pieces, pool.tokenized, at_once)


def _in_memory(pieces: Iterator[TokenizedPiece], data_format: str, dated: bool) -> TokenTable:
    with TableWriter() as writer:
        for piece in pieces:
            if piece.error is not None:
                raise InputError(piece.error)
            writer.add(piece)
        table = writer.finish(data_format, dated)
    assert table is not None  # it has no folder
    return table


def _parts(rows: np.ndarray, bounds: np.ndarray | None) -> list[np.ndarray]:
    """Ascending rows, cut at the first rows of sets; whole without any."""
    return [rows] if bounds is None else np.split(rows, np.searchsorted(rows, bounds[1:-1]))


def _drawn(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """So many of some rows at most: files may be sorted, so that the first ones are one kind."""
    draw = np.random.default_rng((seed, _EVAL_SAMPLES)).permutation(len(rows))
    return rows[draw[:most]]


def _loaded(examples: Examples, settings: DataConfig) -> LoadedData:
    left_out = np.flatnonzero(examples.reasons != USED)
    lengths = examples.texts[1]
    summary = _summary(examples, settings, lengths, left_out, len(examples.reasons))
    return LoadedData(examples, Places(examples), lengths, left_out, summary)


def _part(
    whole: LoadedData, examples: Examples, rows: np.ndarray, settings: DataConfig
) -> LoadedData:
    """Some rows of a data set, ascending."""
    left_out = np.intersect1d(whole.left_out_rows, rows)
    text_rows, text_lengths = examples.texts
    lengths = text_lengths[np.isin(text_rows, rows)]
    summary = _summary(examples, settings, lengths, left_out, len(rows))
    return LoadedData(examples, whole.places, lengths, left_out, summary)


def _summary(
    examples: Examples,
    settings: DataConfig,
    lengths: np.ndarray,
    left_out: np.ndarray,
    n_rows: int,
) -> DataSummary:
    tables = examples.tables
    reasons = examples.reasons[left_out]
    kinds, first = np.unique(reasons, return_index=True)
    n_long = int(np.count_nonzero(lengths > settings.max_length))
    return DataSummary(
        data_format=" and ".join(dict.fromkeys(table.data_format for table in tables)),
        n_examples=len(examples),
        n_tokens=int(examples.lengths.sum(dtype=np.int64)),
        n_trained_tokens=int(examples.n_trained.sum(dtype=np.int64)),
        n_cut=n_long if settings.overflow == "cut" else 0,
        n_untrained=len(left_out),
        longest=int(lengths.max(initial=0)),
        max_length=settings.max_length,
        n_rows=n_rows,
        left_out={
            REASONS[kinds[i]]: int(np.count_nonzero(reasons == kinds[i])) for i in np.argsort(first)
        },
        ignored=tuple(dict.fromkeys(name for table in tables for name in table.ignored)),
        dated=any(table.dated for table in tables),
        n_split=n_long if settings.overflow == "split" else 0,
    )
