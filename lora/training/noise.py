"""What training draws anew for each step: masks of dropout, noise on the embeddings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lora.data.batches import Batch
from lora.forward.dropout import Dropout, row_keys
from lora.forward.embedding_noise import EmbeddingNoise
from lora.forward.model.inputs import Inputs
from lora.shaders.memory import Memory
from lora.shaders.recording import Recording
from lora.training.workload import Workload


@dataclass(frozen=True)
class Noise:
    """Both, as the programs take them; None for what isn't wanted.

    Keys follow from the run's seed, the step, the number of the example among all of the run and
    the place in it: not from where a row lies, in which micro-batch, or who computes it.
    """

    seed: int
    hidden_size: int
    dropout: Dropout | None = None
    embedding: EmbeddingNoise | None = None

    @classmethod
    def allocate(cls, recording: Recording, workload: Workload, inputs: Inputs) -> Noise:
        """What the config of a session asks for, in training."""
        config, architecture = workload.config, workload.architecture
        seed, size = config.train.seed, architecture.hidden_size
        if not workload.trains:
            return cls(seed, size)
        probability, alpha = config.adapter.dropout, config.train.neftune_noise_alpha
        dropout = embedding = None
        if probability:
            dropout = Dropout.allocate(recording, inputs, workload.layout, probability)
        if alpha:
            # Gemma's class for embeddings multiplies them itself; others do it behind the noise.
            own = architecture.name.startswith("gemma")
            scale = 1.0 if own else architecture.embedding_scale
            embedding = EmbeddingNoise.allocate(recording, inputs, alpha, scale)
        return cls(seed, size, dropout, embedding)

    def write(self, memory: Memory, batch: Batch, step: int | None) -> None:
        """Puts what a micro-batch takes on the device.

        Args:
            step: of the optimizer, counted from 0; None for an evaluation, which has none of it.
        """
        if step is None:
            if self.embedding is not None:
                self.embedding.leave_out(memory, batch.rows)
            return
        if self.dropout is None and self.embedding is None:
            return
        ends = [*batch.example_starts[1:], batch.rows]
        lengths = [end - start for start, end in zip(batch.example_starts, ends, strict=True)]
        keys = row_keys(self.seed, step, batch.examples, lengths)
        if self.dropout is not None:
            self.dropout.write(memory, keys, batch.targets)
        if self.embedding is not None:
            each = np.repeat(np.array(lengths), lengths)
            self.embedding.write(memory, keys, each, self.hidden_size)
