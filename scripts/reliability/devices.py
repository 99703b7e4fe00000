"""The device destroyed in the middle of a step."""

from __future__ import annotations

import shutil
from typing import Any

from lora.config.schema import load_config
from lora.data.batches import Batch
from lora.training.checkpoint import checkpoints
from lora.training.endings import DeviceLostError
from lora.training.run import run_training
from lora.training.session import TrainingSession
from scripts.reliability.case import ADAPTER, STEPS, Case, Tally


def _lose_at(session: TrainingSession, step: int) -> None:
    run, left = session._run_micro_batch, [step]

    def losing(programs: Any, batch: Batch) -> None:
        run(programs, batch)
        if left and session.steps_done + 1 == left[0]:
            left.pop()
            session.device.handle.wgpu.destroy()  # type: ignore[attr-defined]

    session._run_micro_batch = losing  # type: ignore[method-assign]


def device_lost(case: Case, count: int, setting: str) -> Tally:
    """At different steps; with `stop` the run is resumed, with `retry` it goes on by itself."""
    tally = Tally(f"the device is destroyed mid-step, on_device_loss: {setting}")
    output = case.folder / f"lost-{setting}"
    for turn in range(count):
        shutil.rmtree(output, ignore_errors=True)
        given = [f"output={output}", f"train.on_device_loss={setting}"]
        session = TrainingSession(load_config(str(case.config), given))
        _lose_at(session, 1 + turn * (STEPS - 1) // max(1, count - 1))
        try:
            run_training(session)
            tally.add("went on by itself", (output / ADAPTER).read_bytes() == case.adapter)
        except DeviceLostError as error:
            named = "train.max_submission_seconds" in str(error) and setting == "stop"
            saved = "a checkpoint" if checkpoints(output) else "none yet"
            result = f"ended with cause and setting named, {saved}" if named else f"WRONG: {error}"
            tally.add(result, case.is_mended(output))
        finally:
            session.close()
    return tally
