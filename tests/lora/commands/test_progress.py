"""What a run shows: the bar at several widths, plain lines, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lora import TrainingSession
from lora.commands.plan import seconds_shown
from lora.commands.progress import Pace, TrainingProgress, binary_size, clock
from lora.shaders.device import Device
from lora.shaders.stages import stage, stages_told
from lora.training.metrics import EvalResult, Metrics, Sample
from tests.support.command_server import run_lora as lora
from tests.support.tiny_run import write_run


def metrics(step: int, loss: float = 1.0, seconds: float = 2.0, **more: Any) -> Metrics:
    return Metrics(step, step / 10, loss, 1.0, 2e-4, 100, 50, 100 / seconds, seconds, **more)


def session(
    done: int = 0,
    total: int = 36,
    every: int | None = None,
    threshold: float = 0.0,
    output: str = "nowhere",
    at_start: bool = False,
) -> Any:
    train = SimpleNamespace(
        eval_every=every, early_stopping_threshold=threshold, eval_at_start=at_start
    )
    return SimpleNamespace(
        steps_done=done, total_steps=total, config=SimpleNamespace(train=train, output=output),
        workload=SimpleNamespace(eval_examples=[1] * 60),
        device=SimpleNamespace(allocated={"weights": 3 << 29}),
    )  # fmt: skip


def shown(progress: TrainingProgress, width: int) -> list[str]:
    """The bar as a terminal of so many columns has it."""
    console = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    with console.capture() as captured:
        console.print(progress)
    return captured.get().splitlines()


def on_terminal(width: int = 80) -> tuple[TrainingProgress, io.StringIO]:
    file = io.StringIO()
    console = Console(width=width, file=file, force_terminal=True, color_system=None)
    return TrainingProgress(console), file


def test_prompts_that_are_answered_are_no_step() -> None:
    progress, _ = on_terminal()
    progress.started(session())
    progress.sampling(0, 1, 3)
    assert shown(progress, 80)[1].startswith("answering prompt 2/3 … · ")
    progress.sampled(0, [])
    assert shown(progress, 80)[1].startswith("First step … · ")


def test_an_evaluation_before_the_first_step_is_named() -> None:
    progress, _ = on_terminal()
    progress.started(session(at_start=True))
    assert shown(progress, 80)[1].startswith("Evaluating before the first step … · ")
    progress.evaluated(0, EvalResult(1.0, 2.7, 0.5, 0.0, 0, 60, 100, 0))
    assert shown(progress, 80)[1].startswith("First step … · ")
    progress, _ = on_terminal()
    progress.started(session(done=7, at_start=True))  # a resumed run has had it
    assert shown(progress, 80)[1].startswith("First step … · ")


def test_a_run_that_is_stopped_says_where_it_stands() -> None:
    progress, _ = on_terminal()
    progress.started(session(total=50))
    assert progress.standing() == "step 0 of 50"
    for step, loss in ((1, 2.0), (2, 1.0)):
        progress.step(metrics(step, loss=loss))
    # The average of 2 and 1 with weights of 0.09 and 0.1.
    assert progress.standing() == "step 2 of 50 (loss 1.0000, its moving average 1.4737)"


@pytest.mark.parametrize("width", [80, 40])
def test_the_bar_is_true_from_the_first_second(width: int) -> None:
    progress, _ = on_terminal(width)
    assert shown(progress, width)[0].startswith("Starting …")
    progress.stage("Loading the model")
    assert "Loading the model …" in shown(progress, width)[0]
    progress.started(session(done=7))
    lines = shown(progress, width)
    assert lines[0].startswith("step 7/36 ") and lines[0].rstrip().endswith("19%")
    assert "First step …" in lines[1] and "nan" not in "".join(lines)
    assert "-:--" not in "".join(lines) and "1.5 GiB" in "".join(lines)
    for step in range(8, 20):
        progress.step(metrics(step, loss=2.0 if step == 8 else 1.0))
    lines = shown(progress, width)
    text = " ".join(lines)
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("step 19/36 ")
    for words in ("loss 1.0000", "ema 1.04", "lr 0.0002", "50 tokens/s", "0:00:34 left"):
        assert words in text, words
    progress.evaluating(19, 12, 60)
    lines = shown(progress, width)
    assert lines[0].startswith("eval 12/60 ") and lines[1].startswith("after step 19/36 · loss")


def test_the_time_left_follows_the_last_steps() -> None:
    progress, _ = on_terminal()
    progress.started(session(total=100, every=10))
    progress.step(metrics(1, seconds=60.0))
    assert progress._seconds_left() == 99 * 60.0  # for want of another
    progress.step(metrics(2, seconds=25.0))
    assert progress._seconds_left() == 98 * 25.0  # the first one compiled
    progress.evaluated(2, EvalResult(1.0, 2.7, 0.5, 0.0, 0, 60, 100, 0, seconds=30.0))
    assert progress._seconds_left() == 98 * 25.0 + 9 * 30.0
    progress.step(metrics(100, seconds=25.0))
    assert progress._seconds_left() == 0


def test_the_time_left_counts_on_within_a_long_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("lora.commands.progress.time.monotonic", lambda: now[0])
    progress, _ = on_terminal()
    progress.started(session(total=3))
    for step in (1, 2):
        progress.step(metrics(step, seconds=25.0))
    for after, left in ((0, "0:00:25"), (10, "0:00:15"), (14, "0:00:01"), (60, "0:00:00")):
        now[0] += after
        assert f"{left} left" in " ".join(shown(progress, 80))


def test_the_moving_average_begins_at_the_first_loss() -> None:
    pace = Pace()
    assert pace.mean_loss is None and pace.seconds_a_step is None
    pace.add(metrics(1, loss=4.0))
    assert pace.mean_loss == pytest.approx(4.0)
    pace.add(metrics(2, loss=float("nan"), skipped=True))
    assert pace.mean_loss == pytest.approx(4.0)
    for step in range(3, 60):
        pace.add(metrics(step, loss=1.0))
    assert pace.mean_loss == pytest.approx(1.0, abs=0.01)


def test_plain_lines_without_a_terminal() -> None:
    file = io.StringIO()
    progress = TrainingProgress(Console(file=file, width=4000))
    with progress:
        progress.stage("Reading the data")
        progress.started(session(done=10, total=50))
        for step in range(11, 51):
            progress.step(metrics(step))
        result = EvalResult(0.5, 1.6, 0.25, 0.0, 3, 60, 100, 0, seconds=61.0)
        progress.improved(50, "eval_loss", 0.5)
        progress.evaluated(50, result)
        progress.sampled(50, [Sample("wake me", "a\x1b[2Jb")])
        progress.stopping(signal.SIGINT)
        progress.saved(50, Path("run/checkpoints/step-000050"))
    text = file.getvalue()
    lines = text.splitlines()
    assert "\x1b" not in text and any(line.endswith("Reading the data") for line in lines)
    assert "Resumed: 10 of 50 steps were done before." in lines
    steps = [line.split()[1] for line in lines if line.startswith("step ") and "lr" in line]
    assert steps == [
        "11/50",
        "15/50",
        "20/50",
        "25/50",
        "30/50",
        "35/50",
        "40/50",
        "45/50",
        "50/50",
    ]
    assert (
        "step 50: eval loss 0.5000, accuracy 25.0%, exact match 3/60, best so far (0:01:01)"
        in lines
    )
    assert any("'wake me' → 'a\\x1b[2Jb'" in line for line in lines)
    assert any("once more stops at once" in line for line in lines)
    assert lines[-1] == "step 50: saved run/checkpoints/step-000050"


def test_the_best_is_said_of_the_set_that_decides(capsys: pytest.CaptureFixture[str]) -> None:
    one = EvalResult(0.5, 1.6, 0.25, 0.0, 3, 60, 100, 0)
    both = replace(one, sets={"calls": one, "calls_old": one})
    for metric, line in (
        ("eval_loss", 0), ("eval_calls_exact_match", 1), ("eval_calls_old_loss", 2)
    ):  # fmt: skip
        progress = TrainingProgress(Console(width=4000))
        progress.improved(5, metric, 0.5)
        progress.evaluated(5, both)
        lines = capsys.readouterr().out.splitlines()
        assert [number for number, text in enumerate(lines) if "best so far" in text] == [line]


def test_a_resumed_runs_average_goes_on(tmp_path: Path) -> None:
    """As that of a run that was never stopped."""
    whole, losses = Pace(), [4.0, 3.0, 2.0, 1.0]
    for step, loss in enumerate(losses, 1):
        whole.add(metrics(step, loss=loss))
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step, past in ((1, 4.0), (2, 3.0), (3, None)):
            file.write(json.dumps({"step": step, "loss": past}) + "\n")
    progress, _ = on_terminal()
    progress.started(session(done=3, output=str(tmp_path)))
    for step, loss in ((4, 2.0), (5, 1.0)):
        progress.step(metrics(step, loss=loss))
    assert f"ema {whole.mean_loss:.4f}" in " ".join(shown(progress, 80))


@pytest.mark.parametrize(("threshold", "gain"), [(0.0, "no gain"), (0.01, "no gain above 0.01")])
def test_why_a_run_stops_early(
    threshold: float, gain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a threshold the last evaluation may have been the best so far."""
    progress = TrainingProgress(Console(width=4000))
    progress.started(session(threshold=threshold))
    progress.stopped_early(4, 2)
    said = f"step 4: stops early, the last 2 evaluations brought {gain}"
    assert said in capsys.readouterr().out.splitlines()


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = io.StringIO()
    with TrainingProgress(Console(file=file, force_terminal=True, width=80)) as progress:
        progress.started(session())
        progress.step(metrics(1))
    assert "step 1/36  loss 1.0000" in file.getvalue()


def test_stages_are_heard_within_their_block() -> None:
    heard: list[str] = []
    stage("before")
    with stages_told(heard.append):
        stage("Loading")
    stage("after")
    assert heard == ["Loading"]


def test_a_session_names_its_stages(tmp_path: Path, device: Device) -> None:
    heard: list[str] = []
    with stages_told(heard.append):
        TrainingSession.from_config(write_run(tmp_path), device=device).close()
    assert heard[:2] == ["Reading model.gguf", "Reading the data"]
    assert "Loading the model" in heard and heard[-1].startswith("Compiling ")


def test_forms() -> None:
    assert [clock(s) for s in (0.4, 59.6, 3725)] == ["0:00:00", "0:01:00", "1:02:05"]
    assert [binary_size(n) for n in (312 << 20, 3 << 29)] == ["312 MiB", "1.5 GiB"]
    assert [seconds_shown(s) for s in (0.0123, 1.42, 25, 110, 1500, 9000)] == [
        "12.3 ms", "1.4 s", "25 s", "110 s", "25 min", "2.5 h"
    ]  # fmt: skip


def test_ctrl_c_is_acknowledged_within_a_long_step(tmp_path: Path) -> None:
    """The device keeps the main thread; the line comes all the same, and then the checkpoint."""
    path = write_run(tmp_path, n_rows=40, train={"epochs": 50})
    code = """
import sys
from tests.support.stuck import until_told
from lora.training.session import TrainingSession
run = TrainingSession._run_micro_batch
def long(self, programs, batch):
    run(self, programs, batch)
    if self.steps_done == 2:
        print("LONG", flush=True)
        until_told()
TrainingSession._run_micro_batch = long
sys.argv = ["lora", "train", sys.argv[1]]
from lora.commands.cli import main
main()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("LONG"):
                break
        time.sleep(0.3)  # it prints before it is stuck
        process.send_signal(signal.SIGINT)
        for line in process.stdout:
            if "Stopping after the step under way" in line:
                break
        else:
            pytest.fail("never acknowledged")
        rest = process.communicate("the step ends\n", timeout=120)[0]
    assert process.returncode == 130 and "--resume" in rest


def test_training_without_a_config(tmp_path: Path) -> None:
    write_run(tmp_path)
    given = ["--model", tmp_path / "model.gguf", "--data", tmp_path / "train.jsonl"]
    more = ["--set", "train.steps=2", "--output", tmp_path / "out"]
    done = lora("train", *given, *more)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert f"lora report {tmp_path / 'out'}" in done.stdout
    assert "trained  " in done.stdout and "Saved the adapter to" in done.stdout
    for arguments, words in (
        ([], "train needs a config (lora init writes one), or the base model and the examples"),
        (given[:2], "train needs a config"),
        ([tmp_path / "config.yaml", *given], "train takes a config, or --model and --data"),
        ([*given, "--set", "train.stepz=1"], "did you mean steps?"),
    ):
        refused = lora("train", *arguments)
        assert refused.returncode == 2 and words in refused.stderr, refused.stderr


def test_plan_and_its_json(tmp_path: Path) -> None:
    """A pipe gets whole lines, whatever COLUMNS says of a terminal that isn't there."""
    path = write_run(tmp_path)
    plan = lora("plan", path, COLUMNS="30")
    assert plan.returncode == 0, plan.stderr
    row = next(line for line in plan.stdout.splitlines() if line.startswith("adapter"))
    assert row.endswith("v_proj of 3 layers") and "evaluation" in plan.stdout
    facts = json.loads(lora("plan", path, "--json").stdout)
    assert facts["steps"] == 8 and facts["adapter"]["rank"] == 3
    assert facts["memory_bytes"]["total"] == sum(
        size for name, size in facts["memory_bytes"].items() if name != "total"
    )
    assert facts["data"]["examples"] == 10 and facts["eval_examples"] == 3


def test_bench_and_its_json(tmp_path: Path, device: Device) -> None:
    path = write_run(tmp_path)
    if "timestamp-query" not in device.facts.features:
        pytest.skip("the device has no timestamps")
    facts = json.loads(lora("bench", path, "--json").stdout)
    assert facts["seconds"] == pytest.approx(sum(k["seconds"] for k in facts["kernels"]))
    assert {"kernel", "label", "calls", "flops", "n_bytes"} <= set(facts["kernels"][0])
    assert facts["peaks"]["flops"] > 0


@pytest.mark.parametrize("width", [80, 200])
def test_the_table_of_kernels_fits(width: int) -> None:
    from lora.training.profiling import KernelRow, Peaks, print_kernels

    file = io.StringIO()
    rows = [
        KernelRow("attention_backward_kv_sum", "attention_backward_kv_sum", 30, 12e-3, 0, 1 << 30),
        KernelRow("matmul_matrix", "d_gate_up", 300, 123.4e-3, 10**13, 1 << 34),
    ]
    print_kernels(Console(file=file, width=width, force_terminal=True, color_system=None), rows,
                  Peaks(1e14, 1e12))  # fmt: skip
    text = file.getvalue()
    assert all(len(line) <= width for line in text.splitlines())
    for words in (
        "calls",
        "GFLOP/s",
        "GB/s",
        "123.40",
        "81,037",
        "139",
        "attention_backward_kv_sum",
    ):
        assert words in text, text
