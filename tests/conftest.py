"""What every test may ask for: the device (the software driver in CI) and the real models."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest

from lora.shaders.choice import ENVIRONMENT
from lora.shaders.device import Device
from lora.shaders.recording import Recording
from tests.support.long_cases import LONG
from tests.support.short_kernels import short_kernels

# Not what a machine's drivers make of `auto`; `make test-dawn` asks for the other one.
os.environ.setdefault(ENVIRONMENT, "wgpu")

# One commit gives one result.
# No deadline: a busy machine made an example of 10 ms one of 275.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fixed")

MODELS = Path(__file__).parent.parent / "models"

# The test files that take longest on an empty cache of shaders, longest first: xdist hands whole
# files to its workers, and none of these should be the last to start.
LONGEST_FILES = (
    "lora/generation/test_generator.py",
    "backward/test_attention.py",
    "forward/test_attention.py",
    "forward/model/test_families.py",
    "shaders/test_translation.py",
    "lora/commands/test_devices.py",
    "forward/test_quantized_matmul.py",
    "forward/test_matmul_int_row.py",
    "lora/training/test_precision.py",
    "lora/training/test_mpi.py",
    "backward/test_lora.py",
    "lora/training/test_session.py",
    "lora/training/test_default_limits.py",
    "forward/plans/test_matmul_tiles.py",
    "test_package.py",
    "forward/test_matmul_row.py",
    "forward/test_matmul_norm.py",
    "forward/test_matmul.py",
)
# Folders and files whose tests have kernels as real runs have them; those of processes whose runs
# another one continues, too.
AS_IN_RUNS = {
    "forward", "forward/plans", "backward", "optim", "shaders", "benchmarks", "lora/checks",
    "lora/commands/test_devices.py",
    "lora/training/test_mpi.py", "parity/test_export.py",
    "parity/test_half.py", "parity/test_head.py", "parity/test_int_rows.py",
    "parity/test_live.py", "parity/test_options_real.py", "parity/test_paired.py",
    "parity/test_recorded.py",
}  # fmt: skip
_PLACES = {Path(__file__).parent / file: place for place, file in enumerate(LONGEST_FILES)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first; the rest stays in order. The judges' warnings are theirs."""
    items.sort(key=lambda item: _PLACES.get(item.path, len(_PLACES)))
    _mark_long(items, whole=config.args_source is pytest.Config.ArgsSource.TESTPATHS)
    for item in items:
        if item.get_closest_marker("parity"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


def _mark_long(items: list[pytest.Item], *, whole: bool) -> None:
    """Those of tests/support/long_cases.py; a file that is collected as a whole must have its."""
    left, files = {(file, end) for file, ends in LONG.items() for end in ends}, set()
    for item in items:
        file = item.path.relative_to(Path(__file__).parent.parent).as_posix()
        files.add(file)
        found = [end for end in LONG.get(file, ()) if item.nodeid.endswith(end)]
        left -= {(file, end) for end in found}
        if found:
            item.add_marker(pytest.mark.long)
    gone = {(file, end) for file, end in left if file in files or not _is_there(file)}
    if whole and gone:
        raise pytest.UsageError(f"tests/support/long_cases.py names what is not there: {gone}")


def _is_there(file: str) -> bool:
    return (Path(__file__).parent.parent / file).exists()


def pytest_collection_finish() -> None:
    """Python's collector took a tenth of the time, mostly to pass by what stays to the end."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def kernels_are_short(request: pytest.FixtureRequest) -> Iterator[None]:
    """But for the tests of kernels and of what renders them, which have them as runs have them."""
    place = request.path.relative_to(Path(__file__).parent)
    if place.parent.as_posix() in AS_IN_RUNS or place.as_posix() in AS_IN_RUNS:
        yield
    else:
        with short_kernels():
            yield


@pytest.fixture
def short() -> Iterator[None]:
    """For tests of steps in folders whose kernels are as in runs."""
    with short_kernels():
        yield


_SHARED: list[Device] = []
_MOST_MAPS = 25_000  # of 65,530: a file may add as many


@pytest.fixture(scope="module", autouse=True)
def no_file_keeps_memory() -> Iterator[None]:
    """Sessions that a file's tests left open go at its end, not when Python next looks.

    A bind group is a map of memory in Mesa 26's llvmpipe. Of these a process has 65,530, a tiny
    session has 2,300, and one too many ended the process.
    """
    yield
    gc.collect()
    gc.freeze()  # what is left stays to the end: the next file's end need not look at it again


def _many_maps() -> bool:
    """Whether memory is mapped in so many pieces that the next file might be one too many."""
    maps = Path("/proc/self/maps")
    return maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPS


@pytest.fixture(autouse=True)
def no_test_keeps_many_maps() -> Iterator[None]:
    """Sessions of one file that open devices of their own go before there are too many of them."""
    yield
    if os.environ.get("LORA_WEBGPU") == "dawn" and _many_maps():
        gc.collect()


@pytest.fixture(scope="module")
def device() -> Iterator[Device]:
    """One for all files of a worker, unless what it holds comes near what a process may map.

    Through Dawn a layout of bindings keeps some 70 of llvmpipe's maps for as long as its device is
    open, and every kernel has one.
    """
    if not _SHARED:
        _SHARED.append(Device())
    yield _SHARED[0]
    if _many_maps():
        gc.collect()
        _SHARED.pop().close()


@pytest.fixture
def recording(device: Device) -> Iterator[Recording]:
    """What a test records with; its memory is given back after it."""
    with device.arena() as arena:
        yield device.recording(memory=arena)


def _model(file: str, name: str) -> Path:
    path = MODELS / file
    if not path.exists():
        pytest.skip(f"models/{file} is absent: lora pull {name}")
    return path


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return _model("SmolLM2-135M-Instruct.Q4_1.gguf", "smollm2-135m")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    return _model("gemma-3-270m-q4_k_m.gguf", "gemma3-270m")


def pytest_sessionfinish() -> None:
    """Waits for kernels whose results nobody read: llvmpipe crashes where it compiles at exit."""
    while _SHARED:
        device = _SHARED.pop()
        device.memory.read(device.memory.upload(np.zeros(1, np.float32)))
        device.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Shows what tests recorded as "print", a worker's too: the figures that CI is to tell."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "print":
                terminalreporter.write_line(str(text))
