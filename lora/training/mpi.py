"""The processes that an MPI launcher started, through mpi4py: the only file that imports it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lora.shaders.errors import InputError
from lora.training.communicator import Communicator
from lora.training.levels import Kept, Key, Level, starts
from lora.training.shared_memory import SharedLevel

# What launchers tell each process: how many it is one of. Hydra (MPICH, Intel MPI) and PMI-2 of
# Slurm, Open MPI, and a step of Slurm whatever it speaks.
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "MPI_LOCALNRANKS")
_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
_SPINS = 200  # tests of a request before the thread begins to sleep between two
_NAP = 5e-5  # seconds
_SPARE = 4  # processors of a process, from which on one may wait actively


def launched_size() -> int:
    """How many processes a launcher of MPI says that it started; 1 where there was none."""
    told = [os.environ.get(name, "") for name in _SIZES]
    return max([int(size) for size in told if size.isdigit()], default=1)


def launched_rank() -> int:
    """Which of them this one is, by the launcher's word; 0 where there was none."""
    told = [os.environ.get(name, "") for name in _RANKS]
    return next((int(rank) for rank in told if rank.isdigit()), 0)


def open_mpi() -> MPI:
    """The processes that were started together with this one.

    Raises:
        InputError: mpi4py or an MPI is missing, or is another than the launcher's.
    """
    started = launched_size()
    try:
        from mpi4py import MPI as library  # here: it starts MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no MPI library
        raise InputError(
            f"{started} processes were started together, which takes mpi4py and an MPI ({error}); "
            "pip install 'webgpu-lora[mpi]'."
        ) from error
    world = library.COMM_WORLD
    if world.Get_size() != started and world.Get_size() == 1:
        raise InputError(
            f"The launcher started {started} processes, and each takes itself for the only one: "
            f"mpi4py uses {_name(library)}, and the launcher is another MPI's. Use the mpiexec "
            "that came with it (beside python), under Slurm srun --mpi=pmi2."
        )
    return MPI(library, world)


def _name(library: Any) -> str:
    name, version = library.get_vendor()
    return f"{name} {'.'.join(map(str, version))}"


class MPI(Communicator):
    """See `Communicator`.

    Args:
        library: the module mpi4py.MPI.
        world: its communicator of all processes.
    """

    def __init__(self, library: Any, world: Any) -> None:
        self._library = library
        self._world = world
        self.rank: int = world.Get_rank()
        self.size: int = world.Get_size()
        self.name = _name(library)
        self._messages: list[Level] | None = None

    def gather(self, value: Any) -> list[Any]:
        """See `Communicator`."""
        found: list[Any] = self._world.allgather(value)
        return found

    def broadcast(self, value: Any) -> Any:
        """See `Communicator`."""
        return self._world.bcast(value, 0)

    def wait_for(self, value: Any) -> Any:
        """See `Communicator`: without taking a processor meanwhile."""
        _wait(self._world.Ibarrier(), _NAP)
        return self.broadcast(value)

    @property
    def overlaps(self) -> bool:
        """See `Communicator`: two threads take turns, which an MPI must allow for."""
        return bool(self._library.Query_thread() >= self._library.THREAD_SERIALIZED)

    def levels(self) -> Sequence[Level]:
        """See `Communicator`: hosts inside, where each has the same number of processes."""
        names = list(dict.fromkeys(self.hosts))
        counts = {self.hosts.count(name) for name in names}
        if self._messages is None:
            if len(names) == 1 or counts == {1} or len(counts) > 1:
                self._messages = [self._level(self._world.Dup())]
            else:
                self._messages = self._split([names.index(host) for host in self.hosts])
        return self._sharing(self._messages, within=len(names) == 1 or len(self._messages) > 1)

    def grouped(self, groups: Sequence[int]) -> list[Level]:
        """The levels of processes in groups of one size: within one, then across them.

        Args:
            groups: of each rank, from 0.
        """
        return self._sharing(self._split(groups), within=True)

    def _split(self, groups: Sequence[int]) -> list[Level]:
        mine = groups[self.rank]
        place = groups[: self.rank].count(mine)
        within = self._world.Split(mine, self.rank)
        across = self._world.Split(place, self.rank)
        return [self._level(within), self._level(across)]

    @staticmethod
    def _sharing(messages: Sequence[Level], *, within: bool) -> list[Level]:
        """The same, where the first is of one host's processes; each who asks has memory anew."""
        return [SharedLevel(messages[0]), *messages[1:]] if within else list(messages)

    def _level(self, communicator: Any) -> Level:
        """Where there are processors to spare nobody naps: shared memory is slower then."""
        processors = _n_processors()
        pause = 0.0 if processors >= _SPARE * self.local_size else _NAP
        return _MPILevel(communicator, self._library.BYTE, pause)

    def abort(self, status: int) -> None:
        """Ends all processes, however they stand."""
        self._world.Abort(status)


class _MPILevel:
    """See `Level`.

    Args:
        communicator: mpi4py's, that nothing else uses.
        byte: its type.
        pause: seconds between two looks at a request; 0 lets others run, and no more.
    """

    def __init__(self, communicator: Any, byte: Any, pause: float) -> None:
        self._communicator = communicator
        self._byte = byte
        self._pause = pause
        self._kept = Kept()
        self.rank: int = communicator.Get_rank()
        self.size: int = communicator.Get_size()

    def everyone(self, value: Any) -> list[Any]:
        """See `Level`."""
        found: list[Any] = self._communicator.allgather(value)
        return found

    def barrier(self) -> None:
        """See `Level`."""
        _wait(self._communicator.Ibarrier(), self._pause)

    def reserve(self, sizes: Sequence[int]) -> None:
        """See `Level`."""

    def release(self) -> None:
        """See `Level`."""

    def place(self, key: Key, n: int) -> np.ndarray:
        """See `Level`."""
        return self._kept((*key, "place"), n)

    def scatter(self, key: Key, sent: np.ndarray, counts: Sequence[int]) -> list[np.ndarray]:
        """See `Level`."""
        own = [counts[self.rank]] * self.size
        received = self._kept((*key, "parts"), sum(own), np.uint8)
        _wait(
            self._communicator.Ialltoallv(
                [sent, counts, starts(counts), self._byte],
                [received, own, starts(own), self._byte],
            ),
            self._pause,
        )
        return list(received.reshape(self.size, counts[self.rank]))

    def result(self, key: Key, counts: Sequence[int]) -> np.ndarray:
        """See `Level`."""
        return self._kept((*key, "result"), counts[self.rank], np.uint8)

    def gather(self, key: Key, own: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """See `Level`."""
        received = self._kept((*key, "whole"), sum(counts), np.uint8)
        _wait(
            self._communicator.Iallgatherv(
                [own, counts[self.rank], self._byte],
                [received, counts, starts(counts), self._byte],
            ),
            self._pause,
        )
        return received


def _n_processors() -> int:
    """That this process may run on."""
    available = getattr(os, "sched_getaffinity", None)
    return len(available(0)) if available is not None else os.cpu_count() or 1


def _wait(request: Any, pause: float) -> None:
    """Waits for a request.

    MPI's own wait would take a processor all the while, which the threads of a software driver and
    of the data need; and libraries move data only while they are called.
    """
    for _ in range(_SPINS):
        if request.Test():
            return
    while not request.Test():
        time.sleep(pause)
