"""How long a step will take: its products are timed, the rest is put down by what it moves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora.data.order import DataStream, UsualMicroBatch
from lora.forward.plans.workbench import Stopwatch, Workbench
from lora.shaders.device import Device
from lora.shaders.program import Dispatch, Program
from lora.training.device_state import SessionPlan
from lora.training.profiling import measure_peaks

# Products read nothing that decides an index, so that they may run on whatever numbers.
_TIMED = re.compile(r"matmul_(tiled|matrix|wide|reduce)|decode_weights|largest_of_rows")
_ROWS_TIMED_ON_A_CPU = 64
_ROUNDS = 3
_LONG = 0.2  # seconds
# Of the fastest product's rate, what attention and the low-rank kernels reach; and the seconds
# that any dispatch takes on a GPU (docs/log.md, "Expected and measured times of a step").
_OTHERS_RATE = 0.35
_GPU_DISPATCH = 7e-6


@dataclass(frozen=True)
class _Shares:
    """What an average micro-batch has of the largest, which programs are recorded for."""

    rows: float = 1.0
    targets: float = 1.0
    pairs: float = 1.0  # of tokens that attention looks at, without a window

    @classmethod
    def of(cls, plan: SessionPlan, usual: UsualMicroBatch) -> _Shares:
        rows = plan.workload.maximum_rows
        return cls(
            usual.tokens / rows,
            usual.trained / plan.tensors.step.inputs.targets.maximum,
            usual.squared_lengths / rows**2,
        )


@dataclass(frozen=True)
class _Timed:
    """What one of some equal dispatches takes."""

    seconds: float
    flops: float


def expected_seconds(plan: SessionPlan, device: Device) -> float:
    """About how long a step takes: waiting for data, evaluations and the host not counted.

    Each product runs on the device as training would run it, with the rows of an average
    micro-batch (the largest, where rows are streamed and nobody knows). What else a step
    dispatches is put down by its bytes and operations.

    Args:
        plan: with the plans of products that training will take.
        device: with timestamps, and room for the largest product beside nothing else.
    """
    stream = plan.workload.stream()
    shares, micro_batches = _Shares(), float(plan.workload.config.train.gradient_accumulation)
    if isinstance(stream, DataStream):
        usual = stream.usual_micro_batch()
        shares = _Shares.of(plan, usual)
        micro_batches = usual.a_step / plan.workload.share.size
    timed = _time_products(plan, device, shares)
    bandwidth = measure_peaks(device).bytes_per_second
    rate = _OTHERS_RATE * max((one.flops / one.seconds for one in timed.values()), default=1e12)

    def seconds_of(program: Program) -> float:
        total = 0.0
        for dispatch in program.dispatches:
            key = _key(dispatch)
            if key in timed:
                total += timed[key].seconds
                continue
            share = _share(plan, shares, dispatch)
            n_bytes = share * sum(tensor.n_bytes for tensor in dispatch.tensors)
            if dispatch.template.startswith("attention") and not dispatch.constants.get("window"):
                share = shares.pairs
            moved = max(n_bytes / bandwidth, share * dispatch.flops / rate)
            total += moved if plan.facts.is_cpu else max(moved, _GPU_DISPATCH)
        return total

    training = plan.programs.training
    assert training is not None  # who asks plans a training
    prefix = seconds_of(plan.programs.prefix)
    if plan.tensors.train_cache is not None and isinstance(stream, DataStream):
        prefix /= max(1.0, stream.total_steps / stream.steps_per_epoch())  # then it is kept
    once = seconds_of(training.begin) + seconds_of(training.finish)
    return once + micro_batches * (prefix + seconds_of(training.micro_batch))


def _key(dispatch: Dispatch) -> str:
    shapes = [tensor.shape for tensor in dispatch.tensors]
    constants = sorted(dispatch.constants.items())
    return repr((dispatch.template, constants, dispatch.workgroups, shapes))


def _share(plan: SessionPlan, shares: _Shares, dispatch: Dispatch) -> float:
    """Of the rows that a dispatch was recorded for, those in use."""
    inputs, first = plan.tensors.step.inputs, dispatch.tensors[0]
    if first is inputs.rows.uniform:
        return shares.rows
    targets = (inputs.targets, *(extent for _, _, extent in inputs.chunks))
    return shares.targets if any(first is extent.uniform for extent in targets) else 1.0


def _time_products(plan: SessionPlan, device: Device, shares: _Shares) -> Mapping[str, _Timed]:
    """Of each product of a micro-batch that differs from the others: seconds and operations."""
    training = plan.programs.training
    assert training is not None
    found: dict[str, Dispatch] = {}
    for program in (plan.programs.prefix, training.micro_batch):
        for dispatch in program.dispatches:
            if _TIMED.fullmatch(dispatch.template):
                found.setdefault(_key(dispatch), dispatch)
    watch = Stopwatch(device)
    timed = {}
    for key, dispatch in found.items():
        timed[key] = _time(device, watch, dispatch, _share(plan, shares, dispatch))
    return timed


def _time(device: Device, watch: Stopwatch, dispatch: Dispatch, share: float) -> _Timed:
    """A dispatch with a share of its rows."""
    most = _maximum_rows(dispatch)
    in_use = max(1, round(share * most))
    rows = min(in_use, _ROWS_TIMED_ON_A_CPU) if device.facts.is_cpu else in_use
    with Workbench(device) as bench:
        program = bench.again(dispatch, rows)
        seconds = watch([program], 1)[0]
        if seconds < _LONG:  # else no clock has to speed up, and no start counts
            repeats = watch.repeats(seconds)
            seconds = sorted(watch([program], repeats)[0] for _ in range(_ROUNDS))[_ROUNDS // 2]
    return _Timed(seconds * in_use / rows, dispatch.flops * in_use / most)


def _maximum_rows(dispatch: Dispatch) -> int:
    """The rows that a dispatch was recorded for: those of the activations that it reads."""
    return max((t.extent.maximum for t in dispatch.tensors if t.extent is not None), default=1)
