"""What `train.precision` means on a device: of activations, and of both sides of products."""

from __future__ import annotations

from dataclasses import replace

from lora.shaders.facts import DeviceFacts
from lora.training.communicator import Communicator
from lora.training.workload import Workload


def precision_on(facts: DeviceFacts, workload: Workload) -> str:
    """ "f16" or "f32".

    `auto` is f16 where matrix units multiply it, which `trust_matrix_units` has left to a device
    that computes right with them; f32 elsewhere. And f32 with DoRA, whose rows of W are compared
    with those of B · A: its model is not balanced for f16 (`lora.forward.model.balance`).
    """
    wanted = workload.config.train.precision
    if wanted != "auto":
        return wanted
    on_units = facts.has_matrix_units and "shader-f16" in facts.features
    return "f16" if on_units and not workload.layout.dora else "f32"


def agreed_precision(
    workload: Workload, facts: DeviceFacts, communicator: Communicator
) -> Workload:
    """The workload with f32 where `auto` would be that for one of several processes.

    Their gradients are added up as they are: under f16 they hold the loss scale.
    """
    found = communicator.gather(precision_on(facts, workload))
    if len(set(found)) == 1:
        return workload
    train = workload.config.train.model_copy(update={"precision": "f32"})
    return replace(workload, config=workload.config.model_copy(update={"train": train}))


def precision_words(facts: DeviceFacts, workload: Workload) -> str:
    """What a run says of it when it starts."""
    found, asked = precision_on(facts, workload), workload.config.train.precision
    if asked != "auto":
        return f"{found} (train.precision)"
    if found == "f16":
        return "f16, on matrix units (train.precision: auto)"
    why = "DoRA" if workload.layout.dora and facts.has_matrix_units else "no matrix units"
    return f"f32, {why} (train.precision: auto)"
