"""What a session works on, before a device holds anything of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lora.adapters.files import SavedAdapter, load_adapter, open_adapter
from lora.config.trained_tokens import token_ids
from lora.data.batches import Batch, check_batch
from lora.data.examples import DataSummary, Example, id_range, lengths_of, trained_of
from lora.data.given import are_tokens, given_rows, is_counted
from lora.data.loading import DataSets
from lora.data.order import BatchStream, DataStream, Share
from lora.data.peers import Alone, Peers
from lora.data.rows import chat_template
from lora.data.streams import StreamedBatches, StreamedExamples
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adapter import ALIGNMENT, AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.model.low_rank import Beside
from lora.forward.model.trained_tokens import embedding_rows
from lora.forward.text.tokenizer import Tokenizer
from lora.optim.optimizers import BLOCKS
from lora.shaders.errors import InputError
from lora.shaders.stages import stage
from lora.storage.stores import resolve_model

if TYPE_CHECKING:
    from lora.config.schema import Config

_SAMPLED = 1000  # rows that `data_digest` looks into
_MOST_ROWS = 1 << 26  # of a micro-batch; elements of its tensors are counted in 32 bits


@dataclass(frozen=True)
class Workload:
    """A model's file, an adapter's layout and tokenized data, all checked.

    Attributes:
        config: what it was made from.
        trains: whether training is wanted, or evaluation and generation alone.
        train_examples, eval_examples: none where rows are streamed, or there is no such data.
        train_summary, eval_summary: None where the data did not come from the config.
        streamed: the examples of training, where rows are not counted.
        eval_sets: which of eval_examples make up each named set of data.eval; {} without names.
        data: reads rows as the config says.
        initial: the adapter to begin with, f32 [layout.size].
        share: which of a step's micro-batches are this process's.
        processes: that the run was begun with; each adds train.gradient_accumulation micro-batches
            to a step.
    """

    config: Config
    trains: bool
    gguf_file: GGUFFile
    architecture: Architecture
    tokenizer: Tokenizer
    layout: AdapterLayout
    train_examples: Sequence[Example]
    train_summary: DataSummary | None
    eval_examples: Sequence[Example]
    eval_summary: DataSummary | None
    eval_sets: Mapping[str, range]
    streamed: StreamedExamples | None
    data: DataSets
    initial: np.ndarray
    share: Share = Share()
    processes: int = 1

    @classmethod
    def open(
        cls,
        config: Config,
        *,
        train: bool,
        examples: Iterable[Any] | None = None,
        now: datetime | None = None,
        peers: Peers | None = None,
        processes: int | None = None,
    ) -> Workload:
        """Reads what a config names.

        Args:
            train: False leaves out the data of training.
            examples: in place of data.train: tokenized ones, or rows, which are streamed where
                they have no length.
            now: the time that chat templates write; None for the clock.
            peers: the processes that train together, which all call this; None for this one alone.
            processes: that the run was begun with; None for as many as there are.

        Raises:
            InputError: a file can't be read, or they do not fit together.
        """
        peers = Alone() if peers is None else peers
        stage(f"Reading {Path(config.model.path).name}")
        gguf_file = GGUFFile(resolve_model(config.model.path))
        architecture = Architecture.from_gguf(gguf_file)
        tokenizer = Tokenizer.open(gguf_file, config.model.tokenizer)
        layout = layout_of(config, architecture, lambda: tokenizer)
        stage("Reading the data")
        tokens = examples is not None and is_counted(examples) and are_tokens(examples)
        given = None if examples is None or tokens else given_rows(examples)
        data = DataSets(config.data, tokenizer, now, config.train.seed, given, peers)
        train_examples: Sequence[Example] = []
        train_summary, streamed = None, None
        if tokens:
            assert examples is not None
            train_examples = examples if isinstance(examples, Sequence) else list(examples)
            if not train_examples:
                raise InputError("examples: got none; give at least one.")
        elif train and (config.data.streaming or not (given is None or is_counted(given.rows))):
            streamed = _streamed(config, data)
        elif train:
            train_examples, train_summary = data.examples("train")
        eval_examples: Sequence[Example] = []
        eval_summary = None
        eval_sets: dict[str, range] = {}
        if config.data.evaluates:
            most = config.train.eval_samples if train else None
            eval_examples, eval_summary, eval_sets = data.evaluated(most)
        initial = _initial_parameters(config, layout, gguf_file)
        for found in (train_examples, eval_examples):
            _check_tokens(found, architecture.vocab_size)
        workload = cls(
            config, train, gguf_file, architecture, tokenizer, layout, train_examples,
            train_summary, eval_examples, eval_summary, eval_sets, streamed, data, initial,
            Share(peers.rank, peers.size), processes or peers.size,
        )  # fmt: skip
        if train:
            total_steps = workload.stream().total_steps
            warmup_steps = config.train.resolve_warmup(total_steps)  # refuses one that is longer
            config.train.check_schedule(total_steps, warmup_steps)
        return workload

    def check(self, batch: Batch, most_rows: int) -> None:
        """Refuses what the device would take and give a loss for that means nothing.

        Raises:
            InputError: see `check_batch`.
        """
        check_batch(batch, self.architecture.vocab_size, self.longest, most_rows)

    @cached_property
    def base_digest(self) -> list[Any]:
        """What tells one base model from another at a glance."""
        tensors = self.gguf_file.tensors.values()
        return [[t.name, t.type.name, list(t.shape)] for t in tensors]

    @cached_property
    def data_digest(self) -> list[Any]:
        """What tells data from other data at a glance: all lengths, and the tokens of some rows."""
        found: list[Any] = []
        for examples in (self.train_examples, self.eval_examples):
            digest = hashlib.sha256(lengths_of(examples).astype("<i4").tobytes())
            digest.update(trained_of(examples).astype("<i4").tobytes())
            for place in range(0, len(examples), max(1, len(examples) // _SAMPLED)):
                digest.update(examples[place].ids.astype("<i4").tobytes())
            found.append(digest.hexdigest())
        return found

    @cached_property
    def trains_on_chats(self) -> bool:
        """Whether rows of data.train become chats: messages do, and instructions by a template."""
        found = self.streamed or self.train_summary
        formats = "" if found is None else found.data_format  # several: "chat and text"
        if "chat" in formats:
            return True
        return "instruct" in formats and chat_template(self.config.data, self.tokenizer) is not None

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest example that can occur."""
        found = (lengths_of(e).max(initial=1) for e in (self.train_examples, self.eval_examples))
        return max(self.config.data.max_length, *map(int, found))

    @property
    def maximum_rows(self) -> int:
        """Tokens of the largest micro-batch that can occur."""
        longest = self._most(*map(lengths_of, (self.train_examples, self.eval_examples)))
        rows = max(longest, self.config.data.max_length)
        if rows > _MOST_ROWS:
            raise InputError(
                f"train.batch_size: micro-batches of up to {rows:,} tokens (data.max_length "
                f"{self.config.data.max_length:,}) are more than the {_MOST_ROWS:,} that kernels "
                "count; take fewer at a time, and train.gradient_accumulation for the rest."
            )
        return rows

    @property
    def maximum_targets(self) -> int:
        """Trained tokens of the largest micro-batch; one at least, for generation."""
        return max(1, self._most(*map(trained_of, (self.train_examples, self.eval_examples))))

    def _most(self, train: np.ndarray, evaluation: np.ndarray) -> int:
        """The largest sum of sizes over a micro-batch of training or evaluation.

        Args:
            train, evaluation: of each example.
        """
        data, batch_size = self.config.data, self.config.train.batch_size
        most = int(np.sort(evaluation)[-batch_size:].sum())
        if data.packing or self.streamed is not None:
            return max(most, batch_size * data.max_length)
        return max(most, int(np.sort(train)[-batch_size:].sum()))

    @property
    def micro_batches(self) -> int:
        """Of a step, of all processes together; the last of an epoch may have fewer."""
        return self.config.train.gradient_accumulation * self.processes

    def stream(self) -> BatchStream:
        """The micro-batches of a whole run that are this process's, from the first."""
        train, data = self.config.train, self.config.data
        if self.streamed is not None:
            assert train.steps is not None  # checked when it was opened
            return StreamedBatches(
                self.streamed.__iter__,
                batch_size=train.batch_size,
                gradient_accumulation=self.micro_batches,
                packing=data.packing,
                max_length=data.max_length,
                shuffle=data.shuffle,
                buffer=data.shuffle_buffer,
                seed=train.seed,
                steps=train.steps,
                share=self.share,
            )
        return DataStream(
            self.train_examples,
            batch_size=train.batch_size,
            gradient_accumulation=self.micro_batches,
            packing=data.packing,
            max_length=data.max_length,
            shuffle=data.shuffle,
            seed=train.seed,
            epochs=train.epochs,
            steps=train.steps,
            share=self.share,
        )


def layout_of(
    config: Config, architecture: Architecture, tokenizer: Callable[[], Tokenizer]
) -> AdapterLayout:
    """The adapter that a config asks for, on a model.

    Args:
        tokenizer: gives the model's, where texts of adapter.trainable_tokens ask for it.

    Raises:
        InputError: the model lacks what is to be adapted, or has nothing of such a rank.
    """
    adapter = config.adapter

    def encode(text: str) -> Sequence[int]:
        return tokenizer().encode(text, continues=True).ids

    layout = AdapterLayout(
        architecture,
        adapter.resolve_layers(architecture.n_layers),
        adapter.resolve_targets(architecture),
        adapter.rank,
        adapter.scale,
        adapter.resolve_modules(architecture),
        alignment=BLOCKS.get(config.train.optimizer, ALIGNMENT),
        beside=Beside(
            dora=adapter.variant == "dora",
            tokens=token_ids(adapter.trainable_tokens, architecture.vocab_size, encode),
        ),
    )
    _check_rank(layout)
    return layout


def _initial_parameters(config: Config, layout: AdapterLayout, gguf_file: GGUFFile) -> np.ndarray:
    adapter, init_from = config.adapter, config.adapter.init_from
    if init_from is None:
        flat = layout.initial(config.train.seed, adapter.init)
        layout.trained_tokens(flat)[:] = embedding_rows(gguf_file, layout.tokens)
        return flat
    saved = open_adapter(Path(init_from), layout.architecture)
    if adapter.rank_pattern or adapter.alpha_pattern:
        _check_patterns(init_from, saved, layout)
    elif saved.rank != adapter.rank or not math.isclose(saved.scale, adapter.scale, rel_tol=1e-6):
        raise InputError(
            f"adapter.init_from: {init_from} was made with {saved.made_with}, but adapter.rank "
            f"is {adapter.rank}, adapter.alpha {adapter.alpha:g} and adapter.variant "
            f"{adapter.variant}; set them to the same."
        )
    return load_adapter(Path(init_from), layout)


def _check_patterns(init_from: str, saved: SavedAdapter, layout: AdapterLayout) -> None:
    """Refuses an adapter whose matrices have other ranks or scales than the patterns give them.

    Raises:
        InputError: one has.
    """
    for path, low in layout.low_ranks().items():
        own = saved.low.get(path)
        if own is None:
            continue  # it lacks the matrix: told where its numbers are read
        if own.rank != low.rank or not math.isclose(own.scale, low.scale, rel_tol=1e-6):
            raise InputError(
                f"adapter.init_from: {init_from} has {path} with the rank {own.rank} and the scale "
                f"{own.scale:g}, but adapter.rank, adapter.alpha and their patterns give it "
                f"{low.rank} and {low.scale:g}; set them to the same."
            )


def _check_rank(layout: AdapterLayout) -> None:
    """Refuses a rank that no matrix has: memory for it would be asked for before anything is said.

    Raises:
        InputError: it is above all sizes of the matrices that are adapted.
    """
    architecture = layout.architecture
    sizes: dict[int, int] = {}  # the largest by the rank that it has
    for group in layout.groups:
        holder = architecture.holder(group.layer)
        for matrix, low in zip(group.members, group.low, strict=True):
            most = max(matrix.in_size(holder), matrix.out_size(holder))
            sizes[low.rank] = max(sizes.get(low.rank, 0), most)
    if layout.embedding is not None:
        most = max(architecture.vocab_size, architecture.hidden_size)
        sizes[layout.embedding.low.rank] = max(sizes.get(layout.embedding.low.rank, 0), most)
    for rank, most in sizes.items():
        if rank > most:
            raise InputError(
                f"adapter.rank: got {rank:,}, but the largest of the adapted matrices has "
                f"{most:,} rows or columns; 8 to 64 are common."
            )


def _streamed(config: Config, data: DataSets) -> StreamedExamples:
    """The examples of rows that are not counted.

    Raises:
        InputError: a setting wants to know how many there are.
    """
    if config.train.steps is None:
        raise InputError(
            "examples: rows without a length are streamed and not counted, so train.steps must say "
            "how long to train; or give a list."
        )
    if config.data.eval_share is not None:
        raise InputError("data.eval_share: rows that are streamed are not counted; give a list.")
    if config.train.reuse_frozen_prefix == "on":
        raise InputError(
            "train.reuse_frozen_prefix: on: rows that are streamed come anew in each epoch, and "
            "nothing of them is kept; set it to auto."
        )
    return data.streamed()


def _check_tokens(examples: Sequence[Example], vocab_size: int) -> None:
    least, most = id_range(examples)
    if least < 0 or most >= vocab_size:
        raise InputError(
            f"The tokenizer gives id {least if least < 0 else most}, but the model's vocabulary "
            f"has {vocab_size} entries; model.tokenizer does not fit this model."
        )
