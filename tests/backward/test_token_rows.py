"""Gradients of rows of the embedding and of the head that are trained themselves."""

import numpy as np
import pytest

from lora.backward.matmul import matmul_backward
from lora.backward.token_rows import (
    embedding_gradient,
    logits_gradient,
    logits_input_gradient,
    take_logits,
)
from lora.checks.kernels.tokens import TokenCase
from lora.checks.references.token_rows import (
    embedding_gradient_reference,
    logits_gradients_reference,
    replaced,
    token_logits_reference,
)
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import (
    MARKER,
    activation,
    central_difference,
    extent_in_use,
    marked,
    run_twice,
    with_facts,
)

SHAPES = [(1, 1, 8, 4, 2), (3, 2, 12, 36, 5), (67, 66, 50, 100, 3), (130, 130, 320, 576, 9)]


def test_references_are_the_derivatives() -> None:
    rng = np.random.default_rng(0)
    w, rows, direction = rng.normal(size=(9, 8)), rng.normal(size=(3, 8)), rng.normal(size=(3, 8))
    ids, tokens = np.array([8, 0, 4]), np.array([4, 1, 8, 4, 4])
    d_x = rng.normal(size=(5, 8))
    slope = central_difference(
        lambda r: float((replaced(w, r, ids)[tokens] * 3.0 * d_x).sum()), rows, direction
    )
    own = embedding_gradient_reference(d_x, tokens, ids, 3.0)
    assert slope == pytest.approx((own * direction).sum(), rel=1e-8)
    assert not own[1].any()  # the token 0 stands nowhere
    x, d_logits = rng.normal(size=(5, 8)), rng.normal(size=(5, 9))
    d_input, d_rows = logits_gradients_reference(d_logits, x, w, rows, ids)

    def of_rows(r: np.ndarray) -> float:
        return float((token_logits_reference(x, w, r, ids) * d_logits).sum())

    def of_x(v: np.ndarray) -> float:
        return float((token_logits_reference(v, w, rows, ids) * d_logits).sum())

    slope = central_difference(of_rows, rows, direction)
    assert slope == pytest.approx((d_rows * direction).sum(), rel=1e-8)
    along = rng.normal(size=x.shape)
    assert central_difference(of_x, x, along) == pytest.approx((d_input * along).sum(), rel=1e-8)


@pytest.mark.parametrize("is_cpu", [False, True])
@pytest.mark.parametrize(("rows", "in_use", "vocab", "width", "n"), SHAPES)
def test_the_embedding_s_gradient(
    recording: Recording, rows: int, in_use: int, vocab: int, width: int, n: int, is_cpu: bool
) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)
    case, rng = TokenCase.of(recording, vocab, width, n), np.random.default_rng(rows)
    tokens, d_x = rng.integers(0, vocab, rows), rng.normal(size=(rows, width)).astype(np.float32)
    tokens[rows // 2 :] = vocab - 1  # one stands in many rows
    extent = extent_in_use(recording, rows, in_use)
    before = rng.normal(size=(case.n_columns, width)).astype(np.float32)
    out, program = recording.memory.upload(before), Program(recording)
    embedding_gradient(
        program, activation(recording, tokens, extent), case.trained,
        activation(recording, d_x, extent), out, scale=1.5,
    )  # fmt: skip
    result = run_twice(program, out)
    expected = before.astype(np.float64)
    expected[: len(case.ids)] += embedding_gradient_reference(
        d_x[:in_use], tokens[:in_use], case.ids, 1.5
    )
    # Sums of up to `rows` terms of size 1.5.
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=rows * 2.0**-22)
    assert (result[len(case.ids) :] == before[len(case.ids) :]).all()


@pytest.mark.parametrize("is_cpu", [False, True])
@pytest.mark.parametrize(("rows", "in_use", "vocab", "width", "n"), SHAPES)
def test_the_head_s_gradients(
    recording: Recording, rows: int, in_use: int, vocab: int, width: int, n: int, is_cpu: bool
) -> None:
    case = TokenCase.of(recording, vocab, width, n)
    recording = with_facts(recording, is_cpu=is_cpu)
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, width)).astype(np.float32)
    given = np.zeros((rows, case.matrix.out_features), np.float32)
    given[:, :vocab] = rng.normal(size=(rows, vocab))
    extent = extent_in_use(recording, rows, in_use)
    d_logits, own = activation(recording, given, extent), marked(recording, extent, case.n_columns)
    d_x = marked(recording, extent, width)
    d_rows = recording.memory.upload(np.zeros((case.n_columns, width), np.float32))
    program = Program(recording)
    take_logits(program, d_logits, case.trained, own)
    logits_gradient(program, activation(recording, x, extent), own, case.trained, d_rows)
    matmul_backward(program, d_logits, case.matrix, out=d_x)
    logits_input_gradient(program, own, case.trained, d_x)
    program.run()
    d_input, d_trained = logits_gradients_reference(
        given[:in_use, :vocab], x[:in_use], case.w, case.rows, case.ids
    )
    result = recording.memory.read(d_x)
    np.testing.assert_allclose(result[:in_use], d_input, rtol=1e-5, atol=vocab * 2.0**-22)
    assert (result[in_use:] == MARKER).all()
    result = recording.memory.read(d_rows)
    np.testing.assert_allclose(result[: len(case.ids)], d_trained, rtol=1e-5, atol=rows * 2.0**-22)
    assert not result[len(case.ids) :].any()  # what pads them stays zero
    left = recording.memory.read(d_logits)
    assert not left[:in_use, case.ids].any() and (left[in_use:] == given[in_use:]).all()


def test_what_does_not_fit_is_refused(recording: Recording) -> None:
    case, extent = TokenCase.of(recording, 12, 8, 3), recording.memory.extent(2)
    program = Program(recording)
    tokens = recording.memory.empty((2,), "u32", extent=extent)
    d_x, out = (recording.memory.empty(s, extent=extent) for s in ((2, 8), (3, 8)))
    with pytest.raises(ValueError, match=r"token_gradient output has shape \(3, 8\)"):
        embedding_gradient(program, tokens, case.trained, d_x, out)
    half = recording.memory.empty((2, 4), "f16", extent=extent)
    with pytest.raises(ValueError, match="own is f16"):
        logits_gradient(program, d_x, half, case.trained, recording.memory.empty((4, 8)))
