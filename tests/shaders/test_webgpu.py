"""What shaders/webgpu.py asks, of both implementations; of Dawn where it takes a driver here."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from lora.shaders.choice import UnavailableError, list_devices
from lora.shaders.device import Device
from lora.shaders.errors import GPUError
from lora.shaders.program import Program
from lora.shaders.readback import ReadbackRing
from lora.shaders.tensor import Tensor
from lora.shaders.webgpu import Use

CODE = """
@group(0) @binding(0) var<storage, read_write> out: array<u32>;
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) at: vec3<u32>) { out[at.x] += at.x + 1u; }
"""


@pytest.fixture(scope="module", params=["wgpu", "dawn"])
def webgpu(request: pytest.FixtureRequest) -> str:
    """The setting of each implementation that can be used here."""
    try:
        list_devices(request.param)
    except UnavailableError as reason:
        pytest.skip(str(reason))
    setting: str = request.param
    return setting


@pytest.fixture(scope="module")
def device(webgpu: str) -> Iterator[Device]:
    with Device(webgpu=webgpu) as opened:
        yield opened


def count_twice(device: Device) -> list[int]:
    """Two launches of the kernel, over 128 and over 64 elements."""
    handle = device.handle
    kernel = handle.compile("count", CODE)
    out = device.memory.empty((128,), "u32")
    group = handle.bind_group(kernel, [(out.buffer, 0, out.n_bytes)])
    encoder = handle.encoder()
    encoder.dispatches([(kernel, group, (2, 1, 1)), (kernel, group, (1, 1, 1))])
    handle.submit(encoder.finish())
    counted: list[int] = device.memory.read(out).tolist()
    return counted


COUNTED = [n * (2 if n <= 64 else 1) for n in range(1, 129)]


@pytest.mark.parametrize("checked", ["0", "1"])
def test_dispatches_run_in_order(
    webgpu: str, checked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_CHECKED", checked)
    with Device(webgpu=webgpu) as device:
        assert count_twice(device) == COUNTED
        with pytest.raises(GPUError, match="expected"):
            device.handle.compile("wrong", "fn main( {")


def test_a_wrong_dispatch_is_an_error_when_the_encoder_finishes(device: Device) -> None:
    """Our calls go without an error scope each: what is wrong must still not pass in silence."""
    handle = device.handle
    kernel = handle.compile("count", CODE)
    out = device.memory.empty((64,), "u32")
    encoder = handle.encoder()
    group = handle.bind_group(kernel, [(out.buffer, 0, out.n_bytes)])
    encoder.dispatches([(kernel, group, (70_000, 1, 1))])
    with pytest.raises(GPUError, match="70000|dispatch"):
        handle.submit(encoder.finish())


def test_a_buffer_too_large_is_an_error(device: Device) -> None:
    with pytest.raises(GPUError):
        device.handle.create_buffer(2 * device.facts.max_buffer + 256, Use.STORAGE)


def test_one_found_opens_several_devices(device: Device) -> None:
    found = device.found
    for _ in range(2):
        handle = found.open([], {}, checked=True)
        handle.compile("count", CODE)
        handle.close()
    assert count_twice(device) == COUNTED


def test_what_a_driver_lacks_is_refused(device: Device) -> None:
    with pytest.raises(GPUError, match="(?i)limit|better"):
        device.found.open([], {"max-buffer-size": 1 << 62}, checked=True)


def test_results_come_back_late_and_in_order(device: Device) -> None:
    ring = ReadbackRing(device.memory, 8, slots=2)
    for first in range(5):  # more than there are slots
        ring.push(device.memory.upload(np.array([first, 0.5], np.float32)), np.ndarray.tolist)
    assert [ring.take(), ring.take()] == [[0.0, 0.5], [1.0, 0.5]]
    assert ring.ready(wait=True) == [[2.0, 0.5], [3.0, 0.5], [4.0, 0.5]]


def test_a_source_is_mapped_written_and_copied_from_again_and_again(device: Device) -> None:
    """And what comes back is read into memory that is there."""
    n, handle = 1000, device.handle
    source, result = device.memory.source(4 * n), device.memory.staging(4 * n)
    tensor = device.memory.empty((n,))
    found = np.empty(n, np.float32)
    for step in range(3):
        wanted = np.random.default_rng(step).normal(size=n).astype(np.float32)
        writing = handle.map_for_writing(source)
        while not writing.arrived():
            handle.poll()
        writing.write(wanted.view(np.uint8))
        encoder = handle.encoder()
        encoder.copy(source, 0, tensor.buffer, tensor.offset, 4 * n)
        encoder.copy(tensor.buffer, tensor.offset, result, 0, 4 * n)
        handle.submit(encoder.finish())
        reading = handle.map_for_reading(result)
        while not reading.arrived():
            handle.poll()
        reading.read_into(found.view(np.uint8))
        assert found.tobytes() == wanted.tobytes()


def test_times_are_nanoseconds_of_the_device(device: Device) -> None:
    """A kernel of several thousand turns takes longer than one turn, and no second."""
    times = []
    for turns in (1, 20_000):
        program = Program(device.recording())
        out = device.memory.empty((64,), "u32")
        code = CODE.replace(
            "{ out", "{ for (var i = 0u; i < TURNSu; i++) { out[at.x] = out[at.x] * 7u + i; } out"
        )
        program.dispatch_wgsl("turns", code.replace("TURNS", str(turns)), [out], 1)
        program.run()
        times.append(min(program.time()[0].seconds for _ in range(3)))
    assert 0 < times[0] < times[1] < 1.0


def test_several_threads_compile_for_one_device(device: Device) -> None:
    """As the tuner does; a wrong kernel's error comes to whoever asked for it."""

    def compiled(number: int) -> str:
        try:
            device.handle.compile("some", CODE.replace("1u;", f"{number}u;" if number % 3 else ";"))
        except GPUError:
            return "refused"
        return "taken"

    with ThreadPoolExecutor(16) as pool:  # so many that they meet
        outcomes = list(pool.map(compiled, range(300)))
    assert outcomes == ["taken" if number % 3 else "refused" for number in range(300)]


def test_the_environment_stays_as_it_is(webgpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Vulkan loader is spared a warning, and nobody else sees the variable."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    before = dict(os.environ)
    assert list_devices(webgpu)
    assert dict(os.environ) == before


def test_written_bytes_come_back(device: Device) -> None:
    data = np.arange(100_000, dtype=np.uint32)
    tensor: Tensor = device.memory.upload(data)
    device.handle.release_staging()
    assert (device.memory.read(tensor) == data).all()
