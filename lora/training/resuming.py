"""A session put where a checkpoint stands, and what that checkpoint can't be gone on with."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors

from lora.adapters.peft_files import load_peft_adapter
from lora.forward.plans.matmul_plans import ProductShape
from lora.forward.plans.matmul_tiles import Plan
from lora.optim.guard import GuardState
from lora.shaders.choice import say_once
from lora.shaders.errors import InputError
from lora.shaders.untrusted import reading
from lora.storage.tile_cache import circumstances, plan_of_entry
from lora.training.checkpoint import (
    FOLDER,
    OPTIMIZER,
    checkpoints,
    newest_whole,
    set_aside,
    started_at,
)
from lora.training.fingerprints import differences, settings_differences
from lora.training.session import TrainingSession

if TYPE_CHECKING:
    from lora.config.schema import Config

_PROCESSES = re.compile(r"^processes ")
_IN_KERNELS = re.compile(r"^train\.(weight_decay|max_grad_norm) ")  # constants of theirs


def check_can_resume(config: Config) -> None:
    """Refuses before anything is loaded what can be told by then.

    Raises:
        InputError: the output has no checkpoints, or the newest whole one was made with other
            settings, as far as neither model nor data are needed to see it.
    """
    _check_there(Path(config.output))
    found = newest_whole(Path(config.output))
    then = None if found is None else found[1].get("fingerprints")
    if found is not None and then is not None:
        _refuse(found[0], settings_differences(then, config))


def _check_there(output: Path) -> None:
    if not checkpoints(output):
        raise InputError(f"--resume: {output / FOLDER} holds no checkpoint; run without --resume.")


def _refuse(path: Path, differences: Sequence[str]) -> None:
    if differences:
        raise InputError(
            f"{path} was made with {'; with '.join(differences)}. Resume with what it was made "
            "with, or start anew without --resume."
        )


def resume(session: TrainingSession, output: Path) -> Path:
    """Puts a session where the last whole checkpoint of `output` stands; returns its directory.

    The session takes over the checkpoint's plans of products. It warns where it can't, since the
    last bits of what follows may then differ from those of a run that was never stopped. Lines say
    which damaged checkpoints were passed over (they are renamed), and which settings changed.

    Raises:
        InputError: there is none, or it was made with another base, other data, another adapter or
            settings that can't change on the way; or the run has fewer steps than are done.
    """
    if session.stream is None:
        raise ValueError("a session without training cannot resume")
    path, state = _chosen(output)
    _check_steps(session, path, int(state["step"]))
    began = started_at(output)
    summary = session.workload.train_summary
    if summary is not None and summary.dated and began not in (None, session.started):
        raise InputError(
            "The chat template writes the date, and this session was opened with another than the "
            "run began with; open it with TrainingSession(…, started=started_at(output))."
        )
    changed = _check_fingerprints(session, path, state)
    flat = load_peft_adapter(path, session.layout)
    try:
        with (
            reading(path / OPTIMIZER, "a file of safetensors"),
            safetensors.safe_open(path / OPTIMIZER, framework="numpy") as file,
        ):
            moments = {name: file.get_tensor(name) for name in session.adapter.optimizer.tensors}
        if not all(np.isfinite(moment).all() for moment in moments.values()):
            raise InputError(f"{path / OPTIMIZER}: holds NaN or infinite numbers.")
    except InputError as error:
        raise InputError(f"{path}: not a checkpoint that can be read ({error}).") from None
    wanted = session.adapter.optimizer.tensors
    if any(
        (m.shape, m.dtype) != (wanted[name].shape, wanted[name].numpy_dtype)
        for name, m in moments.items()
    ):
        raise InputError(f"{path}: its optimizer state does not fit this config's adapter.")
    session.stream.restore(dict(state["stream"]))
    _take_plans(session, state, kernels_too=not any(_IN_KERNELS.search(c) for c in changed))
    session.restore(int(state["step"]), flat, moments)
    if "guard" in state:  # else of a version whose loss scale never changed
        session.set_guard(GuardState.of_dict(state["guard"]))
    return path


def _chosen(output: Path) -> tuple[Path, dict[str, Any]]:
    """The newest whole checkpoint with its state; damaged ones are said and set aside."""
    found = newest_whole(output)
    if found is not None:
        path, state, damaged = found
        for broken, reason in damaged:
            say_once(
                f"{broken} is damaged ({reason}): the run goes on from the one before, {path.name}."
            )
            set_aside(broken)
        if not {"step", "stream", "plans", "found_with"} <= set(state):
            raise InputError(f"{path}: not a checkpoint that can be read; remove it.")
        return path, state
    there = checkpoints(output)
    _check_there(output)
    which = there[0] if len(there) == 1 else f"{output / FOLDER}: none of {len(there)}"
    raise InputError(f"{which}: not a checkpoint that can be read; run without --resume.")


def _check_steps(session: TrainingSession, path: Path, done: int) -> None:
    """Refuses a run that ends before the checkpoint."""
    if session.total_steps < done:
        raise InputError(
            f"{path} has {done} steps behind it, and the run as configured has only "
            f"{session.total_steps} in all; give more train.steps or train.epochs, or start anew "
            "without --resume."
        )


def _check_fingerprints(session: TrainingSession, path: Path, state: dict[str, Any]) -> list[str]:
    """Refuses what the checkpoint wasn't made with; says what else changed, and returns it."""
    then = state.get("fingerprints")
    if then is None:  # of a version that kept less
        if state.get("precision") != session.precision:
            raise InputError(
                f"The checkpoint was made with train.precision {state.get('precision')}, and now "
                f"it is {session.precision}; resume with the setting of then, or "
                "start anew without --resume."
            )
        say_once(f"{path} does not say what data and base it was made with: these are as you say.")
        return []
    refused, free = differences(then, session.fingerprints())
    _refuse(path, refused)
    if free:
        say_once(f"{path} was made with {'; with '.join(free)}: the run goes on so.")
    if any(_PROCESSES.search(piece) for piece in free):
        say_once(
            "The data come in the same order and each step has the same micro-batches, but their "
            "gradients are added up in another order: the last bits of what follows may differ."
        )
    return free


def _take_plans(session: TrainingSession, state: dict[str, Any], *, kernels_too: bool) -> None:
    """Gives the session the plans of then; warns where these or the kernels are others.

    Args:
        kernels_too: False where a setting that is written into them was changed, and that is said.
    """
    plans, reason = _plans_of_then(session, dict(state["found_with"]), dict(state["plans"]))
    session.use_plans(plans)
    if reason is None and kernels_too and session.kernels_digest() != state.get("kernels"):
        reason = "The checkpoint was made with other kernels"
    if reason is not None:
        warnings.warn(
            f"{reason}: the last bits of what follows may differ from a run that was never "
            "stopped.",
            stacklevel=3,
        )


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
