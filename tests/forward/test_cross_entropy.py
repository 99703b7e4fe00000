"""Cross-entropy, its argmax and its gradient against float64 numpy."""

import numpy as np
import pytest

from lora.checks.references.cross_entropy import gradient_reference, losses_reference
from lora.forward.cross_entropy import (
    Criterion,
    Objective,
    cross_entropy,
    gradient_in_blocks,
)
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.tensor import Extent, Tensor
from tests.support.kernels import (
    MARKER,
    activation,
    central_difference,
    extent_in_use,
    marked,
    with_facts,
)


def test_reference_is_the_derivative() -> None:
    rng = np.random.default_rng(0)
    logits, direction = rng.normal(size=(3, 11)), rng.normal(size=(3, 11))
    labels = np.array([0, 10, 4])
    slope = central_difference(
        lambda v: float(losses_reference(v, labels).sum()), logits, direction
    )
    expected = (gradient_reference(logits, labels, np.ones(3)) * direction).sum()
    assert slope == pytest.approx(expected, rel=1e-8)


def padded(recording: Recording, logits: np.ndarray, extent: Extent) -> Tensor:
    """Logits with columns after the vocabulary, to whole vectors, that must stay as they are."""
    stride = -(-logits.shape[1] // 4) * 4
    stored = np.full((len(logits), stride), 100.0, np.float32)
    stored[:, : logits.shape[1]] = logits
    return activation(recording, stored, extent)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize("with_gradient", [True, False])
@pytest.mark.parametrize(
    ("rows", "in_use", "vocab_size"),
    [(1, 1, 5), (67, 60, 101), (130, 130, 5), (3, 3, 5000), (3, 2, 16391), (2, 1, 49152)],
)
def test_cross_entropy(
    recording: Recording, rows: int, in_use: int, vocab_size: int,
    with_gradient: bool, is_cpu: bool,
) -> None:  # fmt: skip
    recording = with_facts(recording, is_cpu=is_cpu)  # both run on any device
    rng = np.random.default_rng(vocab_size)
    logits = 5 * rng.normal(size=(rows, vocab_size)).astype(np.float32)
    labels = rng.integers(0, vocab_size, rows)
    logits[0, :4] = 80.0, -80.0, 80.0, 80.0  # a tie: the lowest index is the argmax
    labels[0] = 0
    weights = rng.normal(size=rows).astype(np.float32)
    extent = extent_in_use(recording, rows, in_use)
    tensor = padded(recording, logits, extent)
    stored = recording.memory.read(tensor)
    losses, correct = marked(recording, extent), marked(recording, extent)
    program = Program(recording)
    cross_entropy(
        program, tensor, activation(recording, labels, extent), losses, correct,
        activation(recording, weights, extent) if with_gradient else None, vocab_size=vocab_size,
    )  # fmt: skip
    results = []
    for _ in range(2):
        recording.memory.write(tensor, stored)
        program.run()
        results.append([recording.memory.read(t) for t in (tensor, losses, correct)])
    for first, second in zip(*results, strict=True):
        assert first.tobytes() == second.tobytes()
    whole, found, right = results[0]
    gradient = whole[:, :vocab_size]
    assert (whole[:, vocab_size:] == 100.0).all()
    # The loss is a difference of numbers up to 80: f32 holds them to 4e-6.
    np.testing.assert_allclose(
        found[:in_use], losses_reference(logits, labels)[:in_use], rtol=2e-6, atol=1e-5
    )
    assert (right[:in_use] == (logits.argmax(axis=1) == labels)[:in_use]).all()
    assert right[0] == 1.0
    assert (found[in_use:] == MARKER).all() and (right[in_use:] == MARKER).all()
    expected = gradient_reference(logits, labels, weights) if with_gradient else logits
    # exp of a difference that f32 rounds at 1e-5 (|logit| 80): as much in relative terms. At the
    # label, 1 less: one rounding of a number near 1.
    atol = 2.0**-24 * np.abs(weights).max()
    np.testing.assert_allclose(gradient[:in_use], expected[:in_use], rtol=2e-5, atol=atol)
    assert (gradient[in_use:] == logits[in_use:]).all()


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize("label", [0, 3, 8195])
def test_equal_logits(recording: Recording, label: int, is_cpu: bool) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)
    extent = recording.memory.extent(1)
    tensor = activation(recording, np.full((1, 8200), 2.5, np.float32), extent)
    losses, correct = marked(recording, extent), marked(recording, extent)
    program = Program(recording)
    cross_entropy(
        program, tensor, activation(recording, np.array([label]), extent), losses, correct, None
    )
    program.run()
    assert recording.memory.read(losses)[0] == pytest.approx(np.log(8200), rel=1e-6)
    assert recording.memory.read(correct)[0] == float(label == 0)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize("rival", [6, 7, 9, 10, 40, 8190, 8199])
def test_of_two_highest_the_lower_index_is_the_argmax(
    recording: Recording, rival: int, is_cpu: bool
) -> None:
    """In the label's own quad, in other lanes' quads, in another stretch of a GPU's."""
    recording = with_facts(recording, is_cpu=is_cpu)
    label = 8
    for ours, wanted in ((label, rival > label), (rival, rival < label)):
        logits = np.zeros((1, 8200), np.float32)
        logits[0, [label, rival]] = 3.0
        extent = recording.memory.extent(1)
        losses, correct = marked(recording, extent), marked(recording, extent)
        program = Program(recording)
        cross_entropy(
            program, activation(recording, logits, extent),
            activation(recording, np.array([ours]), extent), losses, correct, None,
        )  # fmt: skip
        program.run()
        assert recording.memory.read(correct)[0] == float(wanted)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
def test_a_logit_that_is_no_number_shows_in_the_loss(recording: Recording, is_cpu: bool) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)
    logits = np.zeros((2, 8200), np.float32)
    logits[1, 8193] = np.nan
    extent = recording.memory.extent(2)
    losses, correct = marked(recording, extent), marked(recording, extent)
    program = Program(recording)
    cross_entropy(
        program, activation(recording, logits, extent), activation(recording, np.array([1, 1]),
        extent),
        losses, correct, None,
    )  # fmt: skip
    program.run()
    assert np.isnan(recording.memory.read(losses)).tolist() == [False, True]


def test_a_shift_of_all_logits_changes_nothing(recording: Recording) -> None:
    """Only differences count. Multiples of 1/64, and 4096 more, are exact in f32: equal bytes."""
    rng = np.random.default_rng(4)
    logits = rng.integers(-512, 512, (3, 101)).astype(np.float32) / 64
    labels = activation(recording, rng.integers(0, 101, 3), extent := recording.memory.extent(3))
    found = []
    for shift in (0, 4096):
        losses, correct = marked(recording, extent), marked(recording, extent)
        program = Program(recording)
        cross_entropy(
            program, padded(recording, logits + np.float32(shift), extent), labels, losses, correct,
            None, vocab_size=101,
        )  # fmt: skip
        program.run()
        found.append(recording.memory.read(losses))
    assert found[0].tobytes() == found[1].tobytes()


def test_capped_logits_and_columns_past_the_vocabulary(recording: Recording) -> None:
    """The gradient is the one to the raw logits; padding stays, whatever it holds."""
    rng = np.random.default_rng(5)
    raw, labels, cap, scale = 40 * rng.normal(size=(5, 30)), rng.integers(0, 30, 5), 30.0, 0.5

    def capped(v: np.ndarray) -> np.ndarray:
        return cap * np.tanh(v / cap)

    expected = gradient_reference(capped(raw), labels, np.full(5, scale))
    expected *= 1 - (capped(raw) / cap) ** 2
    direction = rng.normal(size=raw.shape)
    slope = central_difference(
        lambda v: scale * float(losses_reference(capped(v), labels).sum()), raw, direction
    )
    assert slope == pytest.approx((expected * direction).sum(), rel=1e-7)

    stored = np.full((5, 32), 100.0, np.float32)
    stored[:, :30] = capped(raw)
    extent = recording.memory.extent(5)
    tensor = activation(recording, stored, extent)
    losses, correct = marked(recording, extent), marked(recording, extent)
    weights = activation(recording, np.full(5, scale, np.float32), extent)
    program = Program(recording)
    cross_entropy(
        program, tensor, activation(recording, labels, extent), losses, correct, weights,
        vocab_size=30, softcap=cap,
    )  # fmt: skip
    program.run()
    found = recording.memory.read(tensor)
    np.testing.assert_allclose(
        recording.memory.read(losses),
        losses_reference(stored[:, :30], labels),
        rtol=2e-6,
        atol=4e-6,
    )
    # 1 − (logit / cap)² is a difference of numbers near 1 where the cap bites: 2^-22 at most.
    np.testing.assert_allclose(found[:, :30], expected, rtol=2e-5, atol=5e-7)
    assert (found[:, 30:] == 100.0).all()


def criterion_reference(
    logits: np.ndarray, labels: np.ndarray, criterion: Criterion, shares: np.ndarray | None = None
) -> np.ndarray:
    """Losses [rows] in float64; `shares` stand for the probabilities that DFT holds constant."""
    plain = losses_reference(logits, labels)
    if criterion.dft:
        return (np.exp(-plain) if shares is None else shares) * plain
    # What another label's loss is: the same logarithm, less that label's logit.
    every = losses_reference(logits, np.zeros(len(labels), int))[:, None] + logits[:, :1] - logits
    return (1 - criterion.smoothing) * plain + criterion.smoothing * every.mean(1)


@pytest.mark.parametrize("is_cpu", [True, False], ids=["CPU's lanes", "GPU's lanes"])
@pytest.mark.parametrize(
    ("criterion", "vocab_size"),
    [(Criterion(0.1), 317), (Criterion(dft=True), 317), (Criterion(0.3), 9001)],
)
def test_criteria(
    recording: Recording, criterion: Criterion, vocab_size: int, is_cpu: bool
) -> None:
    recording = with_facts(recording, is_cpu=is_cpu)
    rows, in_use, cap = 5, 4, 30.0
    rng = np.random.default_rng(vocab_size)
    raw = 3 * rng.normal(size=(rows, vocab_size))
    labels = rng.integers(0, vocab_size, rows)
    weights = rng.uniform(0.5, 2.0, rows).astype(np.float32)

    def capped(v: np.ndarray) -> np.ndarray:
        return cap * np.tanh(v / cap)

    extent = extent_in_use(recording, rows, in_use)
    logits = capped(raw).astype(np.float32)
    tensor = padded(recording, logits, extent)
    losses, correct = marked(recording, extent), marked(recording, extent)
    given = activation(recording, weights, extent)
    program = Program(recording)
    cross_entropy(
        program, tensor, activation(recording, labels, extent), losses, correct,
        Objective(given, criterion), vocab_size=vocab_size, softcap=cap,
    )  # fmt: skip
    program.run()
    expected = criterion_reference(logits, labels, criterion)
    found = recording.memory.read(losses)
    np.testing.assert_allclose(found[:in_use], expected[:in_use], rtol=4e-6, atol=4e-6)
    assert (found[in_use:] == MARKER).all()
    d = recording.memory.read(tensor)[:in_use, :vocab_size].astype(np.float64)
    # Along some directions it is the derivative by the raw logits.
    shares = np.exp(-losses_reference(capped(raw), labels))
    for seed in range(3):
        direction = np.random.default_rng(seed).normal(size=raw.shape)
        direction[in_use:] = 0.0
        slope = central_difference(
            lambda v: float(
                (weights * criterion_reference(capped(v), labels, criterion, shares)).sum()
            ),
            raw,
            direction,
        )
        size = np.abs(d * direction[:in_use]).sum()
        assert (d * direction[:in_use]).sum() == pytest.approx(slope, abs=1e-5 * size)


@pytest.mark.parametrize(
    ("rows", "in_use", "vocab_size", "criterion", "softcap"),
    [
        (1, 1, 8, Criterion(), None),
        (67, 60, 104, Criterion(dft=True), 30.0),
        (3, 2, 8190, Criterion(smoothing=0.2), None),
        (3, 3, 16390, Criterion(), None),  # a last stretch of one lane
        (2, 1, 49152, Criterion(), 30.0),
    ],
)
def test_a_gradient_in_f16_lies_in_blocks(
    recording: Recording, rows: int, in_use: int, vocab_size: int, criterion: Criterion,
    softcap: float | None,
) -> None:  # fmt: skip
    """The f32 gradient rounded; zero in columns past the vocabulary, which products read."""
    recording = with_facts(recording, is_cpu=False)
    rng = np.random.default_rng(vocab_size)
    logits = 5 * rng.normal(size=(rows, -(-vocab_size // 8) * 8)).astype(np.float32)
    labels = rng.integers(0, vocab_size, rows)
    weights = (1024 * rng.normal(size=rows)).astype(np.float32)
    extent, memory = extent_in_use(recording, rows, in_use), recording.memory
    found = []
    for halves in (False, True):
        tensor = activation(recording, logits, extent)
        losses, correct = marked(recording, extent), marked(recording, extent)
        objective = Objective(activation(recording, weights, extent), criterion, halves)
        program = Program(recording)
        cross_entropy(
            program, tensor, activation(recording, labels, extent), losses, correct, objective,
            vocab_size=vocab_size, softcap=softcap,
        )  # fmt: skip
        program.run()
        of_rows = memory.read(losses).tobytes(), memory.read(correct).tobytes()
        found.append((tensor, of_rows))
    (whole, of_whole), (in_place, of_halves) = found
    assert of_whole == of_halves
    expected = memory.read(whole)
    expected[:, vocab_size:] = 0.0
    blocks = gradient_in_blocks(in_place)
    assert blocks.tensor.n_bytes == in_place.n_bytes and blocks.tensor.dtype == "f16"
    column = np.arange(logits.shape[1])
    halved = memory.read(blocks.tensor)[:, column + column // blocks.block * blocks.block]
    # Drivers round to either neighbour, and may lose what is below f16's normal numbers.
    np.testing.assert_allclose(
        halved[:in_use].astype(np.float32), expected[:in_use], rtol=2.0**-10, atol=2.0**-14
    )
    assert (memory.read(in_place)[in_use:] == logits[in_use:]).all()


def test_no_gradient_in_f16_where_a_lane_has_no_whole_eights(recording: Recording) -> None:
    extent = extent_in_use(recording, 2, 2)
    for is_cpu, columns in ((True, 16), (False, 12)):
        logits = activation(recording, np.zeros((2, columns), np.float32), extent)
        values = [marked(recording, extent) for _ in range(3)]
        labels = activation(recording, np.zeros(2, np.int64), extent)
        program = Program(with_facts(recording, is_cpu=is_cpu))
        with pytest.raises(ValueError, match=f"of {columns} columns"):
            cross_entropy(program, logits, labels, *values[:2], Objective(values[2], halves=True))


def test_smoothing_and_dft_are_not_both() -> None:
    with pytest.raises(ValueError, match=r"smoothing 0\.1, dft True"):
        Criterion(0.1, dft=True)
