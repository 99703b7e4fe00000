"""A step as a program: dispatches recorded once, replayed every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import Any

from lora.shaders.recording import Recording
from lora.shaders.templates import render
from lora.shaders.tensor import Tensor
from lora.shaders.webgpu import BindGroup, Commands, Encoder, Launch, Pipeline

# A GPU begins with the first submission while the host still encodes the next; fewer dispatches to
# a submission cost the host more than the device gains (benchmarks/submissions.py, docs/log.md).
MAX_SUBMISSION_DISPATCHES = 128
# The first of a program has so few that it is there soon, each after it half as many more again: a
# GPU takes longer to run a dispatch than the host to encode one, but not much where it is small.
FIRST_SUBMISSION_DISPATCHES = 16
MAX_WORKGROUPS = 65_535  # of one dimension of a dispatch, by WebGPU's default limits
_QUERIES = 4096  # timestamps in one query set, WebGPU's largest


@dataclass(frozen=True)
class Dispatch:
    """One kernel launch: plain data, ready to be encoded.

    Attributes:
        label: what listings call it.
        template: name of the WGSL template, without its ending.
        constants: what the template was rendered with; "wgsl" alone where there is no template,
            with the text itself.
        pipeline, bind_group: both made for the device; None where memory only counts.
        workgroups: the grid (x, y, z).
        flops: floating-point operations at full extent; a multiply-add counts two.
        tensors: as bound to @group(0), in the order of their @binding numbers.
    """

    label: str
    template: str
    constants: Mapping[str, Any]
    pipeline: Pipeline
    bind_group: BindGroup
    workgroups: tuple[int, int, int]
    flops: int
    tensors: tuple[Tensor, ...]

    @property
    def code(self) -> str:
        """The kernel's WGSL text."""
        if "wgsl" in self.constants:
            return str(self.constants["wgsl"])
        return render(self.template, dict(self.constants))

    @property
    def launch(self) -> Launch:
        """What an encoder takes."""
        return self.pipeline, self.bind_group, self.workgroups


@dataclass(frozen=True)
class Copy:
    """A copy between device buffers, or (source None) a fill with zeros."""

    label: str
    source: Tensor | None
    destination: Tensor


@dataclass(frozen=True)
class KernelTime:
    """What one dispatch took on the device."""

    label: str
    template: str
    seconds: float
    flops: int


def fold(n_workgroups: int) -> tuple[int, int, int]:
    """A one-dimensional grid folded into x and y.

    Kernels launched so find their place as `group.x + group.y * groups.x` (builtins workgroup_id
    and num_workgroups) and return when it is past the end: the fold may launch a few too many.
    """
    if n_workgroups <= MAX_WORKGROUPS:
        return max(1, n_workgroups), 1, 1
    y = -(-n_workgroups // MAX_WORKGROUPS)
    return -(-n_workgroups // y), y, 1


@dataclass(frozen=True)
class Planned:
    """A dispatch that is not appended yet; attributes as the arguments of `Program.dispatch`."""

    template: str
    constants: dict[str, Any]
    tensors: Sequence[Tensor]
    workgroups: int | tuple[int, int, int]
    label: str
    flops: int = 0

    def append(self, program: Program) -> None:
        """Appends it."""
        program.dispatch(
            self.template, self.constants, self.tensors, self.workgroups, label=self.label,
            flops=self.flops,
        )  # fmt: skip


class Program:
    """A list of dispatches and copies, built once and replayed.

    `forward/`, `backward/` and `optim/` append to it; nothing runs until `run`. Bind groups are
    made while recording, so that a replay allocates nothing.

    Args:
        recording: what it is recorded with.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self.commands: list[Dispatch | Copy] = []
        self._scope: list[str] = []

    # -- recording ------------------------------------------------------------------------------

    def scope(self, name: str) -> _Scope:
        """A context manager that puts `name.` before the labels recorded inside it."""
        return _Scope(self, name)

    def dispatch(
        self,
        template: str,
        constants: dict[str, Any],
        tensors: Sequence[Tensor],
        workgroups: int | tuple[int, int, int],
        *,
        label: str = "",
        flops: int = 0,
    ) -> None:
        """Appends one kernel launch.

        Args:
            template: name of the WGSL template, without its ending.
            constants: what the template needs to be rendered.
            tensors: bound to @group(0) in the order of their @binding numbers.
            workgroups: grid (x, y, z), or a number of workgroups that `fold` lays out.
            label: what it is called in listings; the template's name by default.
            flops: floating-point operations of one launch at full extent.
        """
        pipeline = self.recording.memory.kernel(template, constants)
        self._append(template, constants, pipeline, tensors, workgroups, label or template, flops)

    def dispatch_wgsl(
        self, label: str, code: str, tensors: Sequence[Tensor], workgroups: int
    ) -> None:
        """Appends one launch of a kernel that is no template here: a script's own loss, say.

        Its indices must stay inside what it binds, as ours do: it is compiled like them, and Dawn
        guards none of them then. LORA_CHECKED=1 in the environment finds those that don't.

        Args:
            label: what it is called in listings.
            code: WGSL whose entry point is `main`.
            tensors, workgroups: see `dispatch`.
        """
        pipeline = self.recording.memory.compile(label, code)
        self._append(label, {"wgsl": code}, pipeline, tensors, workgroups, label, 0)

    def _append(
        self,
        template: str,
        constants: dict[str, Any],
        pipeline: Pipeline,
        tensors: Sequence[Tensor],
        workgroups: int | tuple[int, int, int],
        label: str,
        flops: int,
    ) -> None:
        grid = fold(workgroups) if isinstance(workgroups, int) else workgroups
        if max(grid) > MAX_WORKGROUPS:
            raise ValueError(f"{template}: a grid of {grid} passes {MAX_WORKGROUPS} workgroups")
        most = self.recording.facts.max_binding
        for tensor in tensors:
            if tensor.n_bytes > most:
                raise ValueError(
                    f"{template}: {tensor.shape} ({tensor.n_bytes} bytes) is larger than the "
                    f"device's largest binding, {most}"
                )
        bind_group = self.recording.memory.bind(pipeline, tensors)
        name = ".".join([*self._scope, label])
        self.commands.append(
            Dispatch(
                name, template, dict(constants), pipeline, bind_group, grid, flops, tuple(tensors)
            )
        )  # fmt: skip

    def copy(self, source: Tensor, destination: Tensor, *, label: str = "copy") -> None:
        """Appends a copy of a whole tensor."""
        if source.n_bytes != destination.n_bytes:
            raise ValueError(f"cannot copy {source.shape} into {destination.shape}")
        self.commands.append(Copy(".".join([*self._scope, label]), source, destination))

    def clear(self, tensor: Tensor, *, label: str = "clear") -> None:
        """Appends a fill with zeros."""
        self.commands.append(Copy(".".join([*self._scope, label]), None, tensor))

    # -- running --------------------------------------------------------------------------------

    def run(self) -> None:
        """Encodes and submits the program, in one or several pieces; does not wait for it."""
        handle = self.recording.memory.handle
        for commands in self._pieces():
            encoder = handle.encoder()
            _encode(encoder, commands)
            handle.submit(encoder.finish())

    @property
    def dispatches(self) -> list[Dispatch]:
        """Its kernel launches, in order."""
        return [command for command in self.commands if isinstance(command, Dispatch)]

    def _pieces(self) -> list[list[Dispatch | Copy]]:
        """The commands in submissions: none takes too long, and a GPU's first is there soon.

        Drivers of desktops kill what takes long. A copy goes with the dispatch before it.
        """
        pieces: list[list[Dispatch | Copy]] = [[]]
        most_flops, is_cpu = self.recording.submissions.flops, self.recording.facts.is_cpu
        most = MAX_SUBMISSION_DISPATCHES
        if not is_cpu:
            most = min(most, FIRST_SUBMISSION_DISPATCHES)
        flops = dispatches = 0
        for command in self.commands:
            if isinstance(command, Dispatch):
                if flops > most_flops or dispatches == most:
                    pieces.append([])
                    flops = dispatches = 0
                    most = min(MAX_SUBMISSION_DISPATCHES, most + -(-most // 2))
                flops += command.flops
                dispatches += 1
            pieces[-1].append(command)
        return pieces

    def time(self) -> list[KernelTime]:
        """Runs the program with a timestamp before and after every dispatch; waits for it.

        Needs the feature timestamp-query. Every dispatch gets a pass of its own, so that the sum
        lies somewhat above the time of `run`.
        """
        times: list[KernelTime] = []
        stretch = _QUERIES // 2  # commands of which each may need two timestamps
        for start in range(0, len(self.commands), stretch):
            times += self._time_some(self.commands[start : start + stretch])
        return times

    def _time_some(self, commands: Sequence[Dispatch | Copy]) -> list[KernelTime]:
        handle = self.recording.memory.handle
        dispatches = [c for c in commands if isinstance(c, Dispatch)]
        encoder = handle.encoder()
        if not dispatches:  # a query set may not be empty, nor resolved where nothing was written
            _encode(encoder, commands)
            handle.submit(encoder.finish())
            return []
        queries = handle.query_set(2 * len(dispatches))
        index = 0
        for command in commands:
            if isinstance(command, Copy):
                _encode_copy(encoder, command)
            else:
                encoder.dispatches([command.launch], (queries, 2 * index, 2 * index + 1))
                index += 1
        stamps = iter(handle.submit_timed(encoder, queries, 2 * len(dispatches)))
        return [
            KernelTime(d.label, d.template, 1e-9 * (end - begin), d.flops)
            for d, begin, end in zip(dispatches, stamps, stamps, strict=True)
        ]


class _Scope:
    def __init__(self, program: Program, name: str) -> None:
        self._program = program
        self._name = name

    def __enter__(self) -> None:
        self._program._scope.append(self._name)

    def __exit__(self, *_: object) -> None:
        self._program._scope.pop()


def encode(programs: Iterable[Program]) -> Commands:
    """Programs of one device as one submission, to be handed to its `handle.submit` once.

    For programs so short that no watchdog minds.
    """
    listed = list(programs)
    encoder = listed[0].recording.memory.handle.encoder()
    for program in listed:
        _encode(encoder, program.commands)
    return encoder.finish()


def _encode(encoder: Encoder, commands: Sequence[Dispatch | Copy]) -> None:
    """Appends commands to an encoder; dispatches between two copies share a pass."""
    start = 0
    while start < len(commands):
        command = commands[start]
        if isinstance(command, Copy):
            _encode_copy(encoder, command)
            start += 1
            continue
        stretch = list(takewhile(lambda c: isinstance(c, Dispatch), islice(commands, start, None)))
        encoder.dispatches(c.launch for c in stretch if isinstance(c, Dispatch))
        start += len(stretch)


def _encode_copy(encoder: Encoder, command: Copy) -> None:
    to = command.destination
    if command.source is None:
        encoder.clear(to.buffer, to.offset, to.n_bytes)
    else:
        source = command.source
        encoder.copy(source.buffer, source.offset, to.buffer, to.offset, to.n_bytes)
