"""Which device each of a host's processes takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from lora.shaders.errors import InputError
from lora.shaders.webgpu import MatrixShape
from lora.training.communicator import SingleProcess
from lora.training.placement import device_of, placed


@dataclass
class Found:
    """As much of a device as is looked at."""

    name: str
    kind: str = "DiscreteGPU"
    backend: str = "Vulkan"
    matrix_shapes: tuple[MatrixShape, ...] = ()
    info: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.info = {
            "device": self.name,
            "adapter_type": self.kind,
            "backend_type": self.backend,
        }


GPUS = [Found("H200"), Found("H200"), Found("A10")]
HOST = [Found("llvmpipe", "CPU"), *GPUS, Found("Iris", "IntegratedGPU")]


def taken(device: str | int, size: int) -> list[int]:
    return [placed(HOST, device, rank, size, "node1") for rank in range(size)]  # type: ignore[arg-type]


def test_ranks_take_a_hosts_gpus_in_turn() -> None:
    assert taken("auto", 3) == [1, 2, 3]
    assert taken("h200", 2) == [1, 2]
    assert taken(3, 1) == [3]


def test_shared_goes_round() -> None:
    assert taken("shared", 7) == [1, 2, 3, 1, 2, 3, 1]


@pytest.mark.parametrize(
    ("device", "size", "message"),
    [
        ("auto", 4, r"4 processes run on node1, which has 3 devices .*1: H200, 2: H200, 3: A10"),
        ("a10", 2, "has 1 device for them"),
        (1, 2, "set device: shared"),
        ("B200", 1, "no device has that in its name"),
    ],
)
def test_more_processes_than_devices_are_refused(
    device: str | int, size: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        taken(device, size)


def test_backends_that_show_the_same_gpu_count_once() -> None:
    both = [Found("RTX", backend="D3D12"), Found("RTX", backend="Vulkan")]
    assert placed(both, "auto", 0, 1, "pc") == 0  # type: ignore[arg-type]
    with pytest.raises(InputError, match="has 1 device"):
        placed(both, "auto", 0, 2, "pc")  # type: ignore[arg-type]


def test_one_process_takes_what_the_config_says() -> None:
    assert device_of(SingleProcess(), "Radeon", "auto") == "Radeon"
