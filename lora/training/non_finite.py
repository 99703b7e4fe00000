"""Where numbers stop being finite: a step run again, kernel by kernel."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lora.data.batches import Batch
from lora.shaders.program import Dispatch, Program
from lora.shaders.tensor import Tensor
from lora.training.endings import Culprit
from lora.training.programs import TrainingPrograms, loss_weight_words

_OF_THE_NORM = ("gradient_squares", "gradient_norm")  # what comes before AdamW
_BINDING = re.compile(r"@binding\((\d+)\)\s*var<([^>]+)>\s*(\w+)")


def find_in_step(
    prefix: Program,
    programs: TrainingPrograms,
    batches: Sequence[Batch],
    write_inputs: Callable[[Batch], None],
) -> Culprit | None:
    """Runs forward and backward of a step again and looks at all that each kernel writes.

    The adapter and its moments stay as they are; activations and gradients are those of this step
    afterwards. Takes about as long as reading all activations back.

    Args:
        prefix, programs: of a session.
        batches: of the step.
        write_inputs: puts a micro-batch's tokens on the device.

    Returns:
        The first tensor with a value that is not finite; None where all are.
    """
    if not batches:  # one of several processes, without a share of this step
        return None
    finish = Program(prefix.recording)
    finish.commands = [
        command
        for command in programs.finish.commands
        if isinstance(command, Dispatch) and command.template in _OF_THE_NORM
    ]
    if programs.pieces:  # the sum of all processes' gradients is not looked for
        finish.commands = [c for p in programs.pieces if p.sum is not None for c in p.sum.commands]
    for program in (prefix, programs.micro_batch):
        _clear_written(program)
    n_trained = sum(batch.n_trained for batch in batches)
    words = loss_weight_words(n_trained, programs.loss_scale)
    prefix.recording.memory.write(programs.loss_weight, words)
    programs.begin.run()
    for batch in batches:
        write_inputs(batch)
        for program in (prefix, programs.micro_batch):
            found = _first(program)
            if found is not None:
                return found
    return _first(finish)


def _first(program: Program) -> Culprit | None:
    """Runs a program one command at a time, up to the first that writes what is not finite."""
    for command in program.commands:
        single = Program(program.recording)
        single.commands = [command]
        single.run()
        if not isinstance(command, Dispatch):
            continue
        for name, tensor in _written(command):
            values = _in_use(program, tensor)
            if not np.isfinite(values).all():
                return _culprit(program, command, name, values)
    return None


def _bindings(dispatch: Dispatch) -> Iterator[tuple[str, str, Tensor]]:
    """The kernel's name, the kind and the tensor of each binding."""
    for number, kind, name in _BINDING.findall(dispatch.code):
        if int(number) < len(dispatch.tensors):
            yield name, kind, dispatch.tensors[int(number)]


def _written(dispatch: Dispatch) -> Iterator[tuple[str, Tensor]]:
    """What a launch writes, of floating-point numbers."""
    for name, kind, tensor in _bindings(dispatch):
        if "read_write" in kind and tensor.dtype != "u32":
            yield name, tensor


def _clear_written(program: Program) -> None:
    """Takes out what earlier steps left where kernels write some of the values only."""
    clearing = Program(program.recording)
    for dispatch in program.dispatches:
        for _, tensor in _written(dispatch):
            clearing.clear(tensor)
    clearing.run()


def _in_use(program: Program, tensor: Tensor) -> np.ndarray:
    memory = program.recording.memory
    values = memory.read(tensor)
    if tensor.extent is not None:
        rows = int(memory.read(tensor.extent.uniform)[0])
        values = values[:rows]
    return values


def _culprit(program: Program, dispatch: Dispatch, name: str, values: np.ndarray) -> Culprit:
    """Of a launch that wrote `values` under that name."""
    largest, bad = 0.0, []
    for binding, kind, tensor in _bindings(dispatch):
        if "read_write" in kind or "uniform" in kind or tensor.dtype == "u32":
            continue
        read = np.abs(_in_use(program, tensor).astype(np.float32))
        finite = np.isfinite(read)
        largest = max(largest, float(np.max(read, where=finite, initial=0.0)))
        if not finite.all():
            bad.append(binding)
    n_bad = int(values.size - np.isfinite(values).sum())
    return Culprit(
        dispatch.template, dispatch.label, name, values.shape, n_bad, largest, tuple(bad)
    )
