"""Checkpoints: enough to go on bit for bit.

`OUTPUT/checkpoints/step-000100/` holds the adapter as PEFT saves it, the two moments of AdamW, the
position in the data, when the run began (chat templates may write the date), and the tiles of the
products, which decide in which order sums are taken. The
order of an epoch follows from (seed, epoch), so that position is all of the random state.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors
import safetensors.numpy

from lora.adapters.peft_files import load_peft_adapter, save_peft_adapter
from lora.forward.plans.matmul_plans import ProductShape
from lora.forward.plans.matmul_tiles import Plan
from lora.shaders.choice import SETTINGS, asked_for
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.shaders.untrusted import read_json_object, reading
from lora.storage.files import new_directory
from lora.storage.tile_cache import circumstances, entry_of, plan_of_entry
from lora.training.checkpoint_state import read_checkpoint_state
from lora.training.session import TrainingSession

if TYPE_CHECKING:
    from lora.config.schema import Config

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
    adapter, memory = session.adapter, session.memory
    moments = {
        "first_moment": memory.read(adapter.first_moment),
        "second_moment": memory.read(adapter.second_moment),
    }
    state = {
        "step": session.steps_done,
        "started": session.started.isoformat(),
        "stream": session.stream.state(),
        "precision": session.config.train.precision,
        "found_with": circumstances(session.device.facts),
        "webgpu": session.device.found.implementation.setting,
        "kernels": session.kernels_digest(),
        "plans": {product.key: entry_of(plan) for product, plan in session.plans.items()},
    }
    with new_directory(path) as directory:
        save_peft_adapter(directory, session.layout, session.parameters(), session.config)
        (directory / _OPTIMIZER).write_bytes(safetensors.numpy.save(moments))
        (directory / _STATE).write_text(json.dumps(state, indent=2) + "\n")
    for old in checkpoints(output)[: -session.config.train.keep_checkpoints]:
        shutil.rmtree(old)
    return path


def device_of_then(config: Config) -> Device:
    """The device to go on with a run on: with `webgpu: auto`, through what its checkpoint names.

    So the kernels are those of then. Where that can't be used here any more, auto chooses anew, and
    `resume` says so.

    Args:
        config: of the run; its output directory may hold checkpoints.

    Raises:
        InputError: there is no such device.
    """
    then = None
    for path in checkpoints(Path(config.output))[-1:]:
        with suppress(InputError):  # `resume` says what is wrong with it
            then = read_json_object(path / _STATE).get("webgpu")
    if asked_for(config.webgpu) == "auto" and isinstance(then, str) and then in SETTINGS:
        with suppress(InputError):
            return Device(config.device, webgpu=then)
    return Device(config.device, webgpu=config.webgpu)


def started_at(output: Path) -> datetime | None:
    """When a run began, by its last checkpoint; None where there is none that says it."""
    for path in checkpoints(output)[-1:]:
        try:
            return datetime.fromisoformat(read_json_object(path / _STATE)["started"])
        except (InputError, ValueError, KeyError, TypeError):
            return None  # resume says what is wrong with it
    return None


def resume(session: TrainingSession, output: Path) -> Path:
    """Puts a session where the last checkpoint of `output` stands; returns its directory.

    The session takes over the checkpoint's plans of products. It warns where it can't, since the
    last bits of what follows may then differ from those of a run that was never stopped.

    Raises:
        InputError: there is none, or it was made with another adapter, other data or in another
            precision.
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
        state = read_checkpoint_state(path / _STATE)
        step, stream, precision = state["step"], state["stream"], state["precision"]
        found_with, entries = state["found_with"], state["plans"]
        kernels = state.get("kernels")  # None: of a version that did not keep it
        with (
            reading(path / _OPTIMIZER, "a file of safetensors"),
            safetensors.safe_open(path / _OPTIMIZER, framework="numpy") as file,
        ):
            moments = [file.get_tensor(name) for name in ("first_moment", "second_moment")]
        if not all(np.isfinite(moment).all() for moment in moments):
            raise InputError(f"{path / _OPTIMIZER}: holds NaN or infinite numbers.")
    except InputError as error:
        raise InputError(
            f"{path}: not a checkpoint that can be read ({error}); remove it to resume from the "
            "one before."
        ) from None
    if any(m.shape != (session.layout.size,) or m.dtype != np.float32 for m in moments):
        raise InputError(f"{path}: its optimizer state does not fit this config's adapter.")
    now = session.config.train.precision
    if precision != now:
        raise InputError(
            f"The checkpoint was made with train.precision {precision}, and now it is {now}; "
            "resume with the setting of then, or start anew without --resume."
        )
    summary = session.workload.train_summary
    began = started_at(output)
    if summary is not None and summary.dated and began not in (None, session.started):
        raise InputError(
            "The chat template writes the date, and this session was opened with another than the "
            "run began with; open it with TrainingSession(…, started=started_at(output))."
        )
    session.stream.restore(stream)
    plans, reason = _plans_of_then(session, found_with, entries)
    session.use_plans(plans)
    if reason is None and session.kernels_digest() != kernels:
        reason = "The checkpoint was made with other kernels"
    if reason is not None:
        warnings.warn(
            f"{reason}: the last bits of what follows may differ from a run that was never "
            "stopped.",
            stacklevel=2,
        )
    session.steps_done = step
    for tensor, array in (
        (session.adapter.parameters, flat),
        (session.adapter.first_moment, moments[0]),
        (session.adapter.second_moment, moments[1]),
    ):
        session.memory.write(tensor, array)
    return path


def _plans_of_then(
    session: TrainingSession, found_with: dict[str, Any], entries: dict[str, Any]
) -> tuple[dict[ProductShape, Plan], str | None]:
    """The plans that a checkpoint holds for this session's products, and why these aren't all.

    Args:
        session: which resumes.
        found_with, entries: of the checkpoint.
    """
    facts = session.device.facts
    changed = [
        f"{_named(name, found_with.get(name))} (now {now})"
        for name, now in circumstances(facts).items()
        if found_with.get(name) != now
    ]
    plans = {
        product: plan_of_entry(facts, product, entries.get(product.key))
        for product in session.plans
    }
    usable = {product: plan for product, plan in plans.items() if plan is not None}
    if changed:
        return {}, f"The checkpoint was made with {', '.join(changed)}"
    if len(usable) < len(plans):
        n_lacking = len(plans) - len(usable)
        return usable, f"The checkpoint has no tiles for {n_lacking} of {len(plans)} products"
    return usable, None


def _named(name: str, value: Any) -> str:
    """A circumstance of then; Dawn's version comes with its own name (`circumstances`)."""
    return str(value) if name == "wgpu" and str(value).startswith("Dawn") else f"{name} {value}"
