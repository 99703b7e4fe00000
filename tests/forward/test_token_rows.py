"""Rows of the embedding and of the head that are trained themselves."""

import numpy as np
import pytest

from lora.checks.kernels.tokens import TokenCase
from lora.checks.references.token_rows import replaced, token_logits_reference
from lora.forward.embedding import embedding
from lora.forward.matmul import matmul
from lora.forward.product import Product
from lora.forward.token_rows import replace_logits, replace_rows
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from tests.support.kernels import MARKER, activation, extent_in_use, marked, run_twice

SHAPES = [(1, 1, 8, 4, 2), (3, 2, 12, 36, 5), (67, 66, 50, 100, 3), (130, 130, 320, 64, 9)]


@pytest.mark.parametrize(("rows", "in_use", "vocab", "width", "n"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 7.5])
def test_the_embedding_looks_up_trained_rows(
    recording: Recording, rows: int, in_use: int, vocab: int, width: int, n: int, scale: float
) -> None:
    case = TokenCase.of(recording, vocab, width, n)
    tokens = np.random.default_rng(rows).integers(0, vocab, rows)
    tokens[0] = vocab - 1
    extent = extent_in_use(recording, rows, in_use)
    out, program = marked(recording, extent, width), Program(recording)
    ids = activation(recording, tokens, extent)
    embedding(program, ids, case.matrix, extent, scale=scale, out=out)
    replace_rows(program, ids, case.trained, extent, out, scale=scale)
    result = run_twice(program, out)
    expected = replaced(case.w, case.rows, case.ids)[tokens] * scale
    np.testing.assert_allclose(result[:in_use], expected[:in_use], rtol=2.4e-7)  # one product
    assert (result[in_use:] == MARKER).all()


@pytest.mark.parametrize(("rows", "in_use", "vocab", "width", "n"), SHAPES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_head_multiplies_by_trained_rows(
    recording: Recording,
    rows: int,
    in_use: int,
    vocab: int,
    width: int,
    n: int,
    softcap: float | None,
) -> None:
    case = TokenCase.of(recording, vocab, width, n)
    x = np.random.default_rng(rows).normal(size=(rows, width)).astype(np.float32)
    extent = extent_in_use(recording, rows, in_use)
    logits = marked(recording, extent, case.matrix.out_features)
    own, program = marked(recording, extent, case.n_columns), Program(recording)
    source = activation(recording, x, extent)
    head = Product(source, case.matrix, softcap=softcap)
    matmul(program, head, out=logits)
    replace_logits(program, head, case.trained, own, logits)
    result = run_twice(program, logits)
    expected = token_logits_reference(x, case.w, case.rows, case.ids, softcap)
    # Sums of `width` products of size 1, each within 2^-24 of it.
    np.testing.assert_allclose(
        result[:in_use, :vocab], expected[:in_use], rtol=1e-5, atol=width * 2.0**-23
    )
    assert (result[in_use:] == MARKER).all()
