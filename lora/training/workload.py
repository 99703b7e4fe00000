"""What a session works on, before a device holds anything of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lora.adapters.files import load_adapter, open_adapter
from lora.data.batches import DataStream
from lora.data.examples import DataSummary, Example, load_examples
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError
from lora.storage.stores import resolve_model

if TYPE_CHECKING:
    from lora.config.schema import Config


@dataclass(frozen=True)
class Workload:
    """A model's file, an adapter's layout and tokenized data, all checked.

    Attributes:
        config: what it was made from.
        trains: whether training is wanted, or evaluation and generation alone.
        train_summary, eval_summary: None where the data did not come from the config.
        initial: the adapter to begin with, f32 [layout.size].
    """

    config: Config
    trains: bool
    gguf_file: GGUFFile
    architecture: Architecture
    tokenizer: Tokenizer
    layout: AdapterLayout
    train_examples: list[Example]
    train_summary: DataSummary | None
    eval_examples: list[Example]
    eval_summary: DataSummary | None
    initial: np.ndarray

    @classmethod
    def open(
        cls,
        config: Config,
        *,
        train: bool,
        examples: Sequence[Example] | None = None,
        now: datetime | None = None,
    ) -> Workload:
        """Reads what a config names.

        Args:
            train: False leaves out the data of training.
            examples: tokenized ones in place of data.train.
            now: the time that chat templates write; None for the clock.

        Raises:
            InputError: a file can't be read, or they do not fit together.
        """
        gguf_file = GGUFFile(resolve_model(config.model.path))
        architecture = Architecture.from_gguf(gguf_file)
        tokenizer = Tokenizer.open(gguf_file, config.model.tokenizer)
        layout = layout_of(config, architecture)
        train_examples: list[Example] = []
        train_summary = None
        if examples is not None:
            train_examples = list(examples)
        elif train:
            train_examples, train_summary = load_examples(config.data, tokenizer, now=now)
        eval_examples: list[Example] = []
        eval_summary = None
        if config.data.eval is not None:
            eval_examples, eval_summary = load_examples(config.data, tokenizer, "eval", now)
        initial = _initial_parameters(config, layout)
        _check_tokens([*train_examples, *eval_examples], architecture.vocab_size)
        workload = cls(
            config, train, gguf_file, architecture, tokenizer, layout, train_examples,
            train_summary, eval_examples, eval_summary, initial,
        )  # fmt: skip
        if train:
            config.train.resolve_warmup(workload.stream().total_steps)  # refuses one that is longer
        return workload

    @property
    def longest(self) -> int:
        """Tokens of the longest example that can occur."""
        lengths = (len(e.ids) for e in (*self.train_examples, *self.eval_examples))
        return max(self.config.data.max_length, *lengths, 1)

    @property
    def maximum_rows(self) -> int:
        """Tokens of the largest micro-batch that can occur."""
        longest = self._most(lambda example: len(example.ids))
        return max(longest, self.config.data.max_length)

    @property
    def maximum_targets(self) -> int:
        """Trained tokens of the largest micro-batch; one at least, for generation."""
        return max(1, self._most(lambda example: int(example.trained.sum())))

    def _most(self, size: Callable[[Example], int]) -> int:
        """The largest sum of sizes over a micro-batch of training or evaluation."""
        data, batch_size = self.config.data, self.config.train.batch_size
        sums = []
        for examples, packing in ((self.train_examples, data.packing), (self.eval_examples, False)):
            if packing:
                sums.append(batch_size * data.max_length)
            else:
                sums.append(sum(sorted(map(size, examples), reverse=True)[:batch_size]))
        return max(sums)

    def stream(self) -> DataStream:
        """The micro-batches of a whole run, from the first."""
        train, data = self.config.train, self.config.data
        return DataStream(
            self.train_examples,
            batch_size=train.batch_size,
            gradient_accumulation=train.gradient_accumulation,
            packing=data.packing,
            max_length=data.max_length,
            shuffle=data.shuffle,
            seed=train.seed,
            epochs=train.epochs,
            steps=train.steps,
        )


def layout_of(config: Config, architecture: Architecture) -> AdapterLayout:
    """The adapter that a config asks for, on a model.

    Raises:
        InputError: the model lacks what is to be adapted.
    """
    adapter = config.adapter
    return AdapterLayout(
        architecture,
        adapter.resolve_layers(architecture.n_layers),
        adapter.resolve_targets(architecture),
        adapter.rank,
        adapter.scale,
    )


def _initial_parameters(config: Config, layout: AdapterLayout) -> np.ndarray:
    adapter, init_from = config.adapter, config.adapter.init_from
    if init_from is None:
        return layout.initial(config.train.seed)
    saved = open_adapter(Path(init_from), layout.architecture)
    if saved.rank != adapter.rank or not math.isclose(saved.scale, adapter.scale, rel_tol=1e-6):
        raise InputError(
            f"adapter.init_from: {init_from} was made with {saved.made_with}, but adapter.rank "
            f"is {adapter.rank}, adapter.alpha {adapter.alpha:g} and adapter.variant "
            f"{adapter.variant}; set them to the same."
        )
    return load_adapter(Path(init_from), layout)


def _check_tokens(examples: Sequence[Example], vocab_size: int) -> None:
    for example in examples:
        if int(example.ids.max()) >= vocab_size:
            raise InputError(
                f"The tokenizer gives id {int(example.ids.max())}, but the model's vocabulary "
                f"has {vocab_size} entries; model.tokenizer does not fit this model."
            )
