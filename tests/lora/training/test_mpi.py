"""Two processes under mpiexec on the one software device: what they train, and how they end."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora import InputError, TrainingSession, run_training
from lora.training.mpi import launched_rank, launched_size, open_mpi
from lora.training.run import Interrupted
from tests.support.tiny_run import write_run

MPIEXEC = Path(sys.executable).with_name("mpiexec")
ADAPTER = "adapter_model.safetensors"
needs_mpi = pytest.mark.skipif(
    not MPIEXEC.exists() or importlib.util.find_spec("mpi4py") is None,
    reason="pip install 'webgpu-lora[mpi]'",
)


@contextmanager
def ranks(*arguments: str, code: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """`mpiexec -n 2 lora …`, or a script in its place; gone however the block is left."""
    python = [sys.executable, *(["-m", "lora"] if code is None else ["-c", code])]
    with subprocess.Popen(
        [str(MPIEXEC), "-n", "2", *python, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def metrics_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def trained(path: Path, output: Path, *options: str) -> bytes:
    """The adapter of two ranks."""
    shared = ["--set", f"output={output}", "--set", "device=shared"]
    with ranks("train", str(path), *shared, *options) as process:
        printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert printed[0].count("Saved the adapter") == 1 and "2 ranks  slowest" in printed[0]
    assert "communication" in printed[0] and not printed[1]
    return (output / ADAPTER).read_bytes()


@needs_mpi
def test_two_ranks_train_what_one_process_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """20 steps within 1e-5, half of them twice to the same bytes; one process goes on in order."""
    train = {"steps": 20, "eval_every": 10, "batch_size": 2, "save_every": 10}
    path = write_run(tmp_path, n_rows=14, train=train)
    first = trained(path, tmp_path / "first")
    # From the checkpoint before the last: two ranks go on as if they had never stopped.
    second = tmp_path / "second"
    shutil.copytree(tmp_path / "first", second)
    shutil.rmtree(second / "checkpoints" / "step-000020")
    (second / ADAPTER).unlink()
    assert trained(path, second, "--resume") == first
    one = ["train.gradient_accumulation=2"]
    alone = TrainingSession.from_config(path, [*one, f"output={tmp_path / 'alone'}"])
    run_training(alone)
    together, wanted = metrics_of(tmp_path / "first"), metrics_of(tmp_path / "alone")
    assert len(together) == len(wanted) == 22
    for ours, theirs in zip(together, wanted, strict=True):
        key = "loss" if "loss" in theirs else "eval_loss"
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5)
        assert ours.get("tokens") == theirs.get("tokens")
        if key == "loss":
            assert ours["slowest_rank"] in (0, 1) and 0 <= ours["communication"] <= 1
            assert "communication" not in theirs
    # Another number of ranks: the step keeps the micro-batches of then, and the same order.
    logging.disable(logging.NOTSET)
    options = [f"output={tmp_path / 'first'}", "train.steps=24"]
    resumed = TrainingSession.from_config(path, options, processes=2)
    run_training(resumed, resuming=True)
    assert "processes 2, and now it is 1" in caplog.text and "last bits" in caplog.text
    longer = TrainingSession.from_config(path, [*one, *options[1:], f"output={tmp_path / 'alone'}"])
    run_training(longer, resuming=True)
    after = [
        [m for m in metrics_of(tmp_path / name) if "loss" in m][20:] for name in ("first", "alone")
    ]
    assert len(after[0]) == 4
    for ours, theirs in zip(*after, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@needs_mpi
def test_a_killed_rank_ends_all_and_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path, n_rows=40, train={"epochs": 100, "save_every": 2})
    output = tmp_path / "run"
    code = (
        "import os, sys; from lora.__main__ import main\n"
        f"open({str(tmp_path)!r} + '/pid-' + os.environ['PMI_RANK'], 'w').write(str(os.getpid()))\n"
        "main()"
    )
    with ranks("train", str(path), "--set", "device=shared", code=code) as process:
        end = time.monotonic() + 120
        while not (output / "checkpoints" / "step-000002").exists():
            assert time.monotonic() < end and process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 10
    assert process.returncode != 0
    assert errors.count("lora: ") == 1 and "lora: rank 1 on " in errors
    assert "was killed or crashed" in errors


_BREAKING = """
from lora.training.session import TrainingSession
step = TrainingSession.step
def breaking(session, batches):
    step(session, batches)
    if session.communicator.rank == 1 and session.steps_done == 3:
        raise RuntimeError("a fault of this test")
TrainingSession.step = breaking
from lora.__main__ import main
main()
"""


@needs_mpi
def test_an_exception_in_one_rank_ends_all_and_is_told_once(tmp_path: Path) -> None:
    path = write_run(tmp_path, n_rows=40, train={"epochs": 100, "save_every": 2})
    with ranks("train", str(path), "--set", "device=shared", code=_BREAKING) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("lora: ")]
    assert line.startswith("lora: rank 1 on ")
    assert "RuntimeError: a fault of this test (see --debug)" in line
    assert (tmp_path / "run" / "checkpoints" / "step-000002").exists()


@needs_mpi
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--set", "train.stepz=3"], "train.stepz: unknown key; did you mean steps?"),
        ([], "2 processes run on "),
        (["--set", "device=shared", "--set", "train.on_device_loss=retry"], "on_device_loss"),
    ],
)
def test_what_all_refuse_is_said_once(tmp_path: Path, options: list[str], message: str) -> None:
    path = write_run(tmp_path)
    with ranks("train", str(path), *options) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.count("lora: ") == 1 and message in errors


_SCRIPT = """
import sys
from lora import TrainingSession, joined
with joined() as ranks:
    options = ["device=shared", "train.steps=3"]
    with TrainingSession.from_config(sys.argv[1], options, communicator=ranks) as session:
        losses = [metrics.loss for metrics in session.train()]
        evaluated = session.evaluate()
        everyone = ranks.gather((losses, evaluated.loss, session.parameters().tobytes()))
    assert len(losses) == 3 and everyone[0] == everyone[1]
    if ranks.rank == 0:
        print("all the same")
"""


@needs_mpi
def test_a_script_trains_on_all_ranks(tmp_path: Path) -> None:
    with ranks(str(write_run(tmp_path)), code=_SCRIPT) as process:
        printed, errors = process.communicate(timeout=200)
    assert (process.returncode, printed, errors) == (0, "all the same\n", "")


_SUMS = """
import numpy as np
from lora.training.reducer import Reducer
from lora.training.watch import joined
with joined() as ranks:
    assert ranks.size == 2 and ranks.overlaps and len(set(ranks.hosts)) == 1
    n = 1_000_003
    every = np.random.default_rng(0).normal(size=(2, n)).astype(np.float32)
    wanted = every[0] + every[1]
    for groups in ([0, 0], [0, 1]):  # two of one host, one on each of two
        for levels in (ranks.levels(), ranks.grouped(groups)):
            reducer = Reducer(levels, "f32", threaded=True)
            for key in range(3):
                found = reducer.begin(key, every[ranks.rank]).result()
                assert found.tobytes() == wanted.tobytes()
            reducer.close()
    half = ranks.reducer("f16")
    found = half.begin(0, every[ranks.rank]).result()
    assert 0 < np.abs(found - wanted).max() < 4 * 2.0**-11 * np.abs(every).max()
    assert len({one.tobytes() for one in ranks.gather(found)}) == 1
    assert ranks.wait_for(ranks.rank) == 0
    if ranks.rank == 0:
        print("all the same")
"""


@needs_mpi
def test_what_mpi_adds_up() -> None:
    """Without a device: both kinds of levels, f32 and f16."""
    with ranks(code=_SUMS) as process:
        printed, errors = process.communicate(timeout=120)
    assert (process.returncode, printed, errors) == (0, "all the same\n", "")


@needs_mpi
def test_processes_that_do_not_see_each_other_are_refused() -> None:
    """A launcher of another MPI: each takes itself for the only one, and all would write."""
    code = "from lora.__main__ import main; main()"
    environment = {**os.environ, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", code, "train", "none.yaml"],
        capture_output=True, text=True, env=environment, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert "started 2 processes, and each takes itself for the only one" in done.stderr


def test_without_mpi4py_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PMI_SIZE", "SLURM_STEP_NUM_TASKS", "MPI_LOCALNRANKS", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("OMPI_COMM_WORLD_SIZE", raising=False)
    assert (launched_size(), launched_rank()) == (1, 0)
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    assert (launched_size(), launched_rank()) == (4, 3)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(InputError, match=r"pip install 'webgpu-lora\[mpi\]'"):
        open_mpi()


def test_a_stop_that_any_rank_was_sent_is_the_runs(tmp_path: Path) -> None:
    """What `step` gathers of the others' signals ends the run behind a checkpoint."""
    path = write_run(tmp_path, train={"steps": 6})
    session = TrainingSession.from_config(path)
    session.stop_signal = signal.SIGTERM
    with pytest.raises(Interrupted) as stopped:
        run_training(session)
    assert stopped.value.signum == signal.SIGTERM and stopped.value.checkpoint.exists()
