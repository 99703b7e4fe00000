"""Kernels of an embedding that is trained: some rows themselves, or by A and B."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
from gguf import GGMLQuantizationType

from lora.backward.embedding_lora import embedding_lora_gradients
from lora.backward.token_rows import embedding_gradient, logits_gradient, take_logits
from lora.checks.comparison import Check, Comparison, compare, same, untouched, worst
from lora.checks.references.embedding_lora import (
    embedding_lora_gradients_reference,
    embedding_lora_reference,
)
from lora.checks.references.token_rows import (
    embedding_gradient_reference,
    replaced,
    token_logits_reference,
)
from lora.checks.tensors import activation, extent_in_use, frozen, marked, normal
from lora.forward.embedding import embedding
from lora.forward.embedding_lora import add_embedding
from lora.forward.matmul import matmul
from lora.forward.model.inputs import token_order
from lora.forward.model.trained_tokens import EmbeddingFactors, TokenIndex, TokenRows
from lora.forward.model.weights import FrozenMatrix
from lora.forward.product import Product
from lora.forward.token_rows import replace_logits, replace_rows
from lora.shaders.program import Program
from lora.shaders.recording import Recording

ROWS, IN_USE, VOCAB, WIDTH, TOKENS = 67, 66, 100, 100, 5


@dataclass(frozen=True)
class TokenCase:
    """An embedding W [vocab, width], and rows [n, width] in the places `ids`."""

    matrix: FrozenMatrix
    w: np.ndarray
    ids: np.ndarray
    rows: np.ndarray
    trained: TokenRows

    @classmethod
    def of(cls, recording: Recording, vocab: int, width: int, n: int) -> TokenCase:
        """Random numbers; the first and the last token are among those that are trained."""
        rng = np.random.default_rng(vocab + n)
        matrix, w = frozen(recording, GGMLQuantizationType.F32, vocab, width)
        ids = rng.permutation(np.unique([*rng.choice(vocab, n, replace=False)[2:], 0, vocab - 1]))
        rows = rng.normal(size=(len(ids), width)).astype(np.float32)
        index = TokenIndex.allocate(recording, [int(i) for i in ids], vocab)
        padded = np.zeros((index.ids.shape[0], width), np.float32)
        padded[: len(ids)] = rows
        trained = TokenRows(index, recording.memory.upload(padded), in_head=True)
        return cls(matrix, w, ids, rows, trained)

    @property
    def n_columns(self) -> int:
        """Rows on the device: whole quads."""
        return self.trained.rows.shape[0]


def check_rows(recording: Recording) -> Comparison:
    """Copies of one row or another, times a number."""
    case = TokenCase.of(recording, VOCAB, WIDTH, TOKENS)
    tokens = np.random.default_rng(1).integers(0, VOCAB, ROWS)
    extent = extent_in_use(recording, ROWS, IN_USE)
    out, program = marked(recording, extent, WIDTH), Program(recording)
    ids = activation(recording, tokens, extent)
    embedding(program, ids, case.matrix, extent, scale=2.0, out=out)
    replace_rows(program, ids, case.trained, extent, out, scale=2.0)
    program.run()
    expected, result = (
        2.0 * replaced(case.w, case.rows, case.ids)[tokens],
        recording.memory.read(out),
    )
    return worst(same(result[:IN_USE], expected[:IN_USE]), untouched(result[IN_USE:]))


def check_columns(recording: Recording) -> Comparison:
    """Logits of all tokens: sums of a hundred products of size 1."""
    case, x = TokenCase.of(recording, VOCAB, WIDTH, TOKENS), normal(2, ROWS, WIDTH)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    logits, own = (marked(recording, extent, n) for n in (VOCAB, case.n_columns))
    source = activation(recording, x, extent)
    head = Product(source, case.matrix)
    matmul(program, head, out=logits)
    replace_logits(program, head, case.trained, own, logits)
    program.run()
    expected = token_logits_reference(x, case.w, case.rows, case.ids)
    result = recording.memory.read(logits)
    return worst(
        compare(result[:IN_USE], expected[:IN_USE], rtol=1e-5, atol=WIDTH * 2.0**-23),
        untouched(result[IN_USE:]),
    )


def check_gradient(recording: Recording, of_head: bool) -> Comparison:
    """Sums of up to 66 terms of size 1 or 2."""
    case, v = TokenCase.of(recording, VOCAB, WIDTH, TOKENS), normal(3, ROWS, WIDTH)
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    out = recording.memory.upload(np.zeros((case.n_columns, WIDTH), np.float32))
    source = activation(recording, v, extent)
    if of_head:
        given = normal(4, ROWS, VOCAB)
        d_logits, own = (
            activation(recording, given, extent),
            marked(recording, extent, case.n_columns),
        )
        take_logits(program, d_logits, case.trained, own)
        logits_gradient(program, source, own, case.trained, out)
        expected = given[:IN_USE, case.ids].T.astype(np.float64) @ v[:IN_USE]
    else:
        tokens = case.ids[np.arange(ROWS) % len(case.ids)]
        ids = activation(recording, tokens, extent)
        embedding_gradient(program, ids, case.trained, source, out, scale=2.0)
        expected = embedding_gradient_reference(v[:IN_USE], tokens[:IN_USE], case.ids, 2.0)
    program.run()
    padded = np.zeros((case.n_columns, WIDTH))
    padded[: len(case.ids)] = expected
    return compare(recording.memory.read(out), padded, rtol=1e-5, atol=IN_USE * 2.0**-22)


def check_embedding_lora(recording: Recording) -> Comparison:
    """What A and B add, and their gradients: sums of up to 66 products of size 2."""
    rank, memory = 8, recording.memory
    a, b, d_x = normal(5, VOCAB, rank), normal(6, rank, WIDTH), normal(7, ROWS, WIDTH)
    tokens = np.arange(ROWS) % 7 * 3
    extent, program = extent_in_use(recording, ROWS, IN_USE), Program(recording)
    lora = EmbeddingFactors(memory.upload(a), memory.upload(b), 2.0)
    zeros = (memory.upload(np.zeros_like(values)) for values in (a, b))
    gradient = EmbeddingFactors(next(zeros), next(zeros), lora.scale)
    ids, x = activation(recording, tokens, extent), activation(recording, 0 * d_x, extent)
    add_embedding(program, ids, lora, extent, x, scale=1.0)
    order = np.resize(token_order(tokens[:IN_USE]), ROWS)
    embedding_lora_gradients(
        program,
        ids,
        activation(recording, order, extent),
        lora,
        activation(recording, d_x, extent),
        gradient,
        scale=1.0,
    )
    program.run()
    wanted = embedding_lora_gradients_reference(tokens[:IN_USE], a, b, d_x[:IN_USE], 2.0)
    added = embedding_lora_reference(tokens, a, b, 2.0)
    return worst(
        compare(memory.read(x)[:IN_USE], added[:IN_USE], rtol=1e-5, atol=rank * 2.0**-21),
        *(
            compare(memory.read(tensor), values, rtol=1e-5, atol=WIDTH * 8 * 2.0**-22)
            for tensor, values in zip((gradient.a, gradient.b), wanted, strict=True)
        ),
    )


CHECKS = [
    Check("embedding_scatter", f"{ROWS}x{WIDTH}, rank 8", check_embedding_lora),
    Check("token_rows", f"{ROWS}x{WIDTH}", check_rows),
    Check("token_columns", f"{ROWS}x{VOCAB}, {TOKENS} tokens", check_columns),
    *(
        Check(
            "token_gradient",
            f"{ROWS}x{WIDTH}, {TOKENS} tokens, of the {'head' if of_head else 'embedding'}",
            partial(check_gradient, of_head=of_head),
            as_cpu=as_cpu,
        )
        for of_head in (False, True)
        for as_cpu in (False, True)
    ),
]
