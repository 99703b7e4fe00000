"""LoRA on the embedding: what is added, and both gradients."""

import numpy as np
import pytest

from lora.backward.embedding_lora import embedding_lora_gradients
from lora.checks.references.embedding_lora import (
    embedding_lora_gradients_reference,
    embedding_lora_reference,
)
from lora.forward.embedding_lora import add_embedding
from lora.forward.model.inputs import token_order
from lora.forward.model.trained_tokens import EmbeddingFactors
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import (
    activation,
    central_difference,
    extent_in_use,
    run_twice,
    with_facts,
)

SHAPES = [(1, 1, 8, 4, 4), (3, 2, 12, 36, 8), (67, 66, 52, 100, 12), (130, 130, 320, 576, 16)]


def test_the_reference_is_the_derivative() -> None:
    rng = np.random.default_rng(0)
    a, b, d_x = rng.normal(size=(9, 4)), rng.normal(size=(4, 8)), rng.normal(size=(5, 8))
    tokens = np.array([4, 1, 8, 4, 4])
    d_a, d_b = embedding_lora_gradients_reference(tokens, a, b, d_x, 1.5)
    along = rng.normal(size=a.shape), rng.normal(size=b.shape)

    def of_a(v: np.ndarray) -> float:
        return float((embedding_lora_reference(tokens, v, b, 1.5) * d_x).sum())

    def of_b(v: np.ndarray) -> float:
        return float((embedding_lora_reference(tokens, a, v, 1.5) * d_x).sum())

    assert central_difference(of_a, a, along[0]) == pytest.approx((d_a * along[0]).sum(), rel=1e-8)
    assert central_difference(of_b, b, along[1]) == pytest.approx((d_b * along[1]).sum(), rel=1e-8)


@pytest.mark.parametrize("is_cpu", [False, True])
@pytest.mark.parametrize(("rows", "in_use", "vocab", "width", "rank"), SHAPES)
def test_against_the_reference(
    recording: Recording, rows: int, in_use: int, vocab: int, width: int, rank: int, is_cpu: bool
) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)
    memory, rng = recording.memory, np.random.default_rng(rows)
    a, b, x, d_x = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((vocab, rank), (rank, width), (rows, width), (rows, width))
    )
    tokens = rng.integers(0, vocab, rows)
    tokens[rows // 2 :] = vocab - 1  # one stands in many rows
    extent = extent_in_use(recording, rows, in_use)
    lora = EmbeddingFactors(memory.upload(a), memory.upload(b), 2.0)
    ids, out = activation(recording, tokens, extent), activation(recording, x, extent)
    program = Program(recording)
    add_embedding(program, ids, lora, extent, out, scale=0.5)
    result = run_twice(program, out)
    expected = x + embedding_lora_reference(tokens, a, b, 1.0)
    # Sums of `rank` products of size 1.
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=1e-5, atol=rank * 2.0**-21)
    assert (result[in_use:] == x[in_use:]).all()
    before = [rng.normal(size=values.shape).astype(np.float32) for values in (a, b)]
    gradient = EmbeddingFactors(*(memory.upload(values) for values in before), 2.0)
    program = Program(recording)
    order = activation(recording, np.resize(token_order(tokens[:in_use]), rows), extent)
    embedding_lora_gradients(
        program, ids, order, lora, activation(recording, d_x, extent), gradient, scale=0.5
    )
    program.run()
    wanted = embedding_lora_gradients_reference(tokens[:in_use], a, b, d_x[:in_use], 1.0)
    for tensor, start, change in zip((gradient.a, gradient.b), before, wanted, strict=True):
        # Sums of up to rows · width products of size 1, most of them of far fewer.
        np.testing.assert_allclose(
            memory.read(tensor), start + change, rtol=1e-5, atol=width * rows**0.5 * 2.0**-22
        )


def test_a_tokens_rows_are_added_in_their_order_wherever_they_lie(recording: Recording) -> None:
    """Apart or side by side, among other tokens: the same bits."""
    memory, rng = recording.memory, np.random.default_rng(0)
    rows, vocab, width, rank = 130, 12, 36, 8
    a, b, d_x = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((vocab, rank), (rank, width), (rows, width))
    )
    tokens, found = rng.integers(0, vocab - 1, rows), []
    apart = np.arange(rows)
    side_by_side = token_order(tokens)
    assert (np.diff(tokens[side_by_side]) >= 0).all()
    for places in (apart, side_by_side):
        extent = extent_in_use(recording, rows, rows)
        lora = EmbeddingFactors(memory.upload(a), memory.upload(b), 2.0)
        gradient = EmbeddingFactors(memory.upload(0 * a), memory.upload(0 * b), 2.0)
        ids, order, d = (
            activation(recording, values, extent)
            for values in (tokens[places], token_order(tokens[places]), d_x[places])
        )
        program = Program(recording)
        embedding_lora_gradients(program, ids, order, lora, d, gradient, scale=1.0)
        program.run()
        found.append(memory.read(gradient.a))
    assert found[0].tobytes() == found[1].tobytes()
    assert (found[0][vocab - 1] == 0).all()  # stands in no row
