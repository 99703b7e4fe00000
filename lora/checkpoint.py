"""Checkpoints: enough to go on bit for bit.

`OUTPUT/checkpoints/step-000100/` holds the adapter as PEFT saves it, the two moments of AdamW, and
the position in the data. The order of an epoch follows from (seed, epoch), so that position is all
of the random state.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from lora.files import new_directory
from lora.peft_files import load_peft_adapter, save_peft_adapter
from lora.session import TrainingSession
from shaders.errors import InputError

_NAME = re.compile(r"step-(\d{6,})")
_OPTIMIZER = "optimizer.safetensors"
_STATE = "state.json"


def checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    folder = output / "checkpoints"
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name)] if folder.exists() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save_checkpoint(session: TrainingSession, output: Path) -> Path:
    """Writes a checkpoint of the steps done so far; waits for them. Returns its directory.

    Only the newest train.keep_checkpoints stay.
    """
    if session.stream is None:
        raise ValueError("a session without training has no checkpoints")
    path = output / "checkpoints" / f"step-{session.steps_done:06d}"
    device, adapter = session.device, session.adapter
    moments = {
        "first_moment": device.read(adapter.first_moment),
        "second_moment": device.read(adapter.second_moment),
    }
    state = {"step": session.steps_done, "stream": session.stream.state()}
    with new_directory(path) as directory:
        save_peft_adapter(directory, session.layout, session.parameters(), session.config)
        (directory / _OPTIMIZER).write_bytes(safetensors.numpy.save(moments))
        (directory / _STATE).write_text(json.dumps(state, indent=2) + "\n")
    for old in checkpoints(output)[: -session.config.train.keep_checkpoints]:
        shutil.rmtree(old)
    return path


def resume(session: TrainingSession, output: Path) -> Path:
    """Puts a session where the last checkpoint of `output` stands; returns its directory.

    Raises:
        InputError: there is none, or it was made with another adapter or other data.
    """
    found = checkpoints(output)
    if not found:
        raise InputError(
            f"--resume: {output}/checkpoints holds no checkpoint; run without --resume."
        )
    path = found[-1]
    if session.stream is None:
        raise ValueError("a session without training cannot resume")
    flat = load_peft_adapter(path, session.layout)
    try:
        state = json.loads((path / _STATE).read_text())
        step, stream = int(state["step"]), dict(state["stream"])
        with safetensors.safe_open(path / _OPTIMIZER, framework="numpy") as file:
            moments = [file.get_tensor(name) for name in ("first_moment", "second_moment")]
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise InputError(
            f"{path}: not a checkpoint that can be read ({error}); remove it to resume from the "
            "one before."
        ) from None
    if any(m.shape != (session.layout.size,) or m.dtype != np.float32 for m in moments):
        raise InputError(f"{path}: its optimizer state does not fit this config's adapter.")
    session.stream.restore(stream)
    session.steps_done = step
    for tensor, array in (
        (session.adapter.parameters, flat),
        (session.adapter.first_moment, moments[0]),
        (session.adapter.second_moment, moments[1]),
    ):
        session.device.write(tensor, array)
    return path
