"""What training by many GPUs should come to, on paper: prints the tables of docs/scaling.md.

    python benchmarks/scaling.py

A step is its micro-batches and what of the exchange isn't hidden behind the backward pass of the
last one (`lora/training/exchange.py`, `lora/training/reducer.py`). Rates are settings here: those
within a host are what `data_parallel.py` measured on two H200s (docs/scaling.md).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.sessions import markdown_table

PIECES = 8  # that a gradient leaves in
BACKWARD = 0.6  # of a micro-batch's time


@dataclass(frozen=True)
class Run:
    """What is trained.

    Attributes:
        megabytes: of the gradient in f32.
        seconds: of a micro-batch of 4 × 512 tokens on one GPU.
    """

    name: str
    megabytes: float
    seconds: float


@dataclass(frozen=True)
class Network:
    """What joins hosts.

    Attributes:
        rate: bytes a second of a host, of which its processes have a share each.
        latency: seconds of a message.
    """

    name: str
    rate: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """A host.

    Attributes:
        gpus: in it.
        to_host, to_device: bytes a second of a gradient's copy, each GPU's own.
        adding: bytes a second that a process reads and writes as it adds up its segment.
        local: bytes a second at which a process sends messages to others of its host.
        pause: seconds that a device stands still in each step: nothing can be sent ahead of sums.
        halving: bytes of f32 a second that a process converts to f16 and back.
    """

    gpus: int = 8
    to_host: float = 5.5e9
    to_device: float = 5.5e9
    adding: float = 5e9
    local: float = 2e9
    pause: float = 4e-3
    halving: float = 4e9


# README's tables of one H200 with matrix units; r = 16 on all linear layers.
RUNS = (
    Run("SmolLM2-135M", 19.5, 0.0225),
    Run("Llama 1.2B", 45.1, 0.0604),
    Run("Llama 8B", 167.8, 0.3025),
    Run("20B, 32 experts in each of 24 layers", 865.0, 0.30),
)
NETWORKS = (
    Network("10 GbE", 1.15e9, 30e-6),
    Network("100 GbE", 11.5e9, 15e-6),
    Network("InfiniBand NDR", 45e9, 2e-6),
)


@dataclass(frozen=True)
class Exchange:
    """Seconds of one: of its parts, with nothing to hide behind, and of what a step waits for."""

    parts: dict[str, float]
    alone: float
    exposed: float

    @property
    def bound(self) -> str:
        """The part that takes longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def exchange(
    run: Run, gpus: int, network: Network, machine: Machine, *, half: bool, levels: bool = True
) -> Exchange:
    """Of a step.

    Args:
        half: whether comm_dtype is f16.
        levels: whether processes of a host add up first; False: all exchange with all.
    """
    size = 1e6 * run.megabytes
    inside = min(gpus, machine.gpus)
    hosts = gpus // inside
    parts = {"copies": size / machine.to_host + size / machine.to_device}
    if levels or hosts == 1:
        parts["within a host"] = (1 + 1 / inside) * size / machine.adding
        crossing, peers, share = 2 * (hosts - 1) / hosts * size, hosts - 1, size / inside
    else:
        parts["within a host"] = 2 * inside / gpus * size / machine.local
        crossing, peers, share = 2 * (gpus - inside) / gpus * size * inside, gpus - 1, size
    parts["network"] = (0.5 if half else 1.0) * crossing / network.rate
    parts["latency"] = 2 * PIECES * peers * network.latency if hosts > 1 else 0.0
    if half and hosts == 1:  # the only level is the one that is halved
        parts["within a host"] /= 2
    if half:
        parts["f16"] = 3 * share / machine.halving
    total, longest = sum(parts.values()), max(parts.values())
    alone = longest + (total - longest) / PIECES  # the parts work side by side on several pieces
    hidden = BACKWARD * run.seconds * (1 - 1 / PIECES)
    return Exchange(parts, alone, max(alone - hidden, total / PIECES) + machine.pause)


def efficiency(run: Run, accumulation: int, found: Exchange) -> float:
    """Tokens a second of all, of as many times those of one."""
    seconds = accumulation * run.seconds
    return seconds / (seconds + found.exposed)


def main() -> None:
    machine = Machine()
    for run in RUNS:
        rows = []
        for network in NETWORKS:
            for gpus in (8, 64, 512):
                if gpus == machine.gpus and network is not NETWORKS[0]:
                    continue  # one host: no network
                found = exchange(run, gpus, network, machine, half=False)
                half = exchange(run, gpus, network, machine, half=True)
                cells = [f"{efficiency(run, n, found):.0%}" for n in (1, 4, 16)]
                name = "one host" if gpus == machine.gpus else network.name
                rows.append(
                    [name, gpus, f"{1e3 * found.exposed:,.0f}", *cells,
                     f"{efficiency(run, 4, half):.0%}", found.bound]
                )  # fmt: skip
        print(f"\n{run.name}: {run.megabytes:,.0f} MB, {1e3 * run.seconds:,.0f} ms a micro-batch\n")
        header = [
            "network", "GPUs", "ms that a step waits", "accumulation 1", "4", "16", "4, f16",
            "bound by",
        ]  # fmt: skip
        print("\n".join(markdown_table(header, rows)))
    run, network = RUNS[2], NETWORKS[0]
    flat = exchange(run, 64, network, machine, half=False, levels=False)
    grouped = exchange(run, 64, network, machine, half=False)
    where = f"{run.name} on 64 GPUs at {network.name}"
    waiting = f"{flat.exposed:.1f} s of waiting; hosts first: {grouped.exposed:.1f} s"
    print(f"\n{where}, all with all: {waiting}; two GPUs of one host, accumulation 1 and 4:")
    pair = replace(machine, gpus=2)
    for two in RUNS[:3]:
        found = exchange(two, 2, network, pair, half=False)
        shares = ", ".join(f"{efficiency(two, n, found):.0%}" for n in (1, 4))
        times = f"{1e3 * found.alone:.0f} ms alone, {1e3 * found.exposed:.0f} ms of waiting"
        print(f"  {two.name}: {times}; {shares}")


if __name__ == "__main__":
    main()
