"""The command `lora plan`, and what `lora train` shows before it begins."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lora.commands.options import ConfigArgument, Overrides, WebGPUOverride, overrides
from lora.commands.tables import print_rows, table_console, tokens_shown

if TYPE_CHECKING:  # imported in the command: `lora --help` has no use for them
    from lora.data.order import BatchStream
    from lora.forward.model.adapter import AdapterLayout
    from lora.training.device_state import SessionPlan


def plan_command(
    config: ConfigArgument,
    set_: Overrides = None,
    webgpu: WebGPUOverride = None,
    fit: Annotated[bool, typer.Option("--fit", help="Also the largest sizes that fit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What `lora train` would do: device, adapter, steps, memory by purpose, time a step."""
    from lora.commands.fit import print_fit
    from lora.commands.waiting import waiting
    from lora.config.schema import load_config
    from lora.shaders.device import Device
    from lora.shaders.errors import DeviceMemoryError
    from lora.storage.tile_cache import find_tiles
    from lora.training.device_state import SessionPlan
    from lora.training.fitting import fits
    from lora.training.step_time import expected_seconds
    from lora.training.workload import Workload

    loaded = load_config(config, overrides(set_, webgpu))
    with waiting() as tell:
        workload = Workload.open(loaded, train=True)
        tell("Opening the device")
        with Device(loaded.device, webgpu=loaded.webgpu) as device:
            tell("Planning the steps")
            plans = find_tiles(device, loaded.train.tuning)
            planned = SessionPlan.of(device.facts, workload, plans)
            if planned.precision == "f16":
                tell("Reading the weights")
                with suppress(DeviceMemoryError):  # the plan says that there is no room
                    planned = planned.of_file(device, plans)
            seconds = None
            if "timestamp-query" in device.facts.features:
                tell("Timing the products of a step")
                with suppress(DeviceMemoryError):  # the plan says that there is no room
                    seconds = expected_seconds(planned, device)
            largest = None
            if fit:
                tell("Looking for what fits")
                largest = fits(device.facts, workload, planned.tensors.balance)
    if as_json:
        facts = plan_facts(planned, seconds)
        if largest is not None:
            facts["fits"] = asdict(largest)
        print(json.dumps(facts, indent=2))
        return
    console = table_console()
    print_plan(console, planned, seconds_a_step=seconds)
    if largest is not None:
        print_fit(console, workload, largest)


def plan_facts(plan: SessionPlan, seconds_a_step: float | None) -> dict[str, Any]:
    """A plan as values that JSON can hold; bytes and seconds as numbers, None for what isn't known.

    Args:
        seconds_a_step: as it was estimated.
    """
    workload, layout = plan.workload, plan.workload.layout
    stream, summary = workload.stream(), workload.train_summary
    return {
        "device": plan.facts.name,
        "webgpu": plan.facts.software,
        "model": workload.config.model.path,
        "architecture": layout.architecture.name,
        "layers": layout.architecture.n_layers,
        "adapter": {
            "parameters": layout.n_trainable,
            "rank": layout.rank,
            "targets": sorted(layout.targets),
            "layers": list(layout.layers),
            "trainable_tokens": list(layout.tokens),
        },
        "data": None
        if summary is None
        else {
            "examples": summary.n_examples,
            "tokens": summary.n_tokens,
            "trained_tokens": summary.n_trained_tokens,
            "longest": summary.longest,
            "cut": summary.n_cut,
            "left_out": dict(summary.left_out),
        },
        "eval_examples": len(workload.eval_examples),
        "steps": stream.total_steps,
        "warmup_steps": workload.config.train.resolve_warmup(stream.total_steps),
        "micro_batch_tokens": workload.maximum_rows,
        "precision": plan.precision,
        "recomputed_layers": plan.tensors.recomputed,
        "packing_efficiency": getattr(stream, "packing_efficiency", None),
        "memory_bytes": {"total": sum(plan.allocated.values()), **dict(plan.allocated)},
        "seconds_a_step": seconds_a_step,
        "left_alone": dict(layout.architecture.unused),
    }


def print_plan(console: Console, plan: SessionPlan, *, seconds_a_step: float | None = None) -> None:
    """What is about to be trained: device, adapter, data, memory by purpose, time."""
    from lora.training.precision import precision_words

    workload, allocated = plan.workload, plan.allocated
    layout, config = workload.layout, workload.config
    stream = workload.stream()
    total_steps = stream.total_steps
    memory = ", ".join(
        f"{name} {size / 2**20:.0f}" for name, size in allocated.items() if size >> 20
    )
    rows = {
        "device": f"{plan.facts.name}, through {plan.facts.software}",
        "model": f"{config.model.path} ({layout.architecture.name}, "
        f"{layout.architecture.n_layers} layers)",
        "adapter": f"{layout.n_trainable:,} parameters: rank {layout.rank} on "
        f"{_targets_shown(layout)} of {len(layout.layers)} layer{'s' * (len(layout.layers) != 1)}"
        + (f", and {tokens_shown(layout.tokens)}" if layout.tokens else ""),
        "data": str(workload.streamed or workload.train_summary),
        "steps": f"{total_steps}{_epochs(stream)}, micro-batches of at most "
        f"{workload.maximum_rows} tokens, recompute {_recompute(plan)}",
        "memory (MiB)": f"{sum(allocated.values()) / 2**20:.0f}" + (memory and f": {memory}"),
    }
    if not plan.facts.is_cpu:
        rows["precision"] = precision_words(plan.facts, workload)
    if (above := _above_limit(plan)) is not None:
        rows["above limit"] = above
    if workload.eval_examples:
        sets = ", ".join(f"{name} {len(part)}" for name, part in workload.eval_sets.items())
        rows["evaluation"] = f"{len(workload.eval_examples)} examples" + (
            f": {sets}" if sets else ""
        )
    if (bare := _bare_mixers(layout)) is not None:
        rows["not adapted"] = bare
    if workload.share.size > 1:
        rows["processes"] = (
            f"{workload.share.size}, which share {workload.micro_batches} micro-batches a step"
        )
    if layout.architecture.unused:
        rows["left alone"] = ", ".join(
            f"{what} ({n} tensors)" for what, n in layout.architecture.unused
        )
    packing = getattr(stream, "packing_efficiency", None)
    if packing is not None:
        rows["packing"] = f"{packing:.1%} of the micro-batches' room is filled"
    if seconds_a_step is not None:
        rows["time"] = (
            f"about {seconds_shown(seconds_a_step)} a step, "
            f"{seconds_shown(seconds_a_step * total_steps)} in all"
            f"{', evaluations not counted' if workload.eval_examples else ''}"
        )
    print_rows(console, rows)


def _epochs(stream: BatchStream) -> str:
    """How often the steps pass over the data; "" where rows are not counted."""
    steps_per_epoch = getattr(stream, "steps_per_epoch", None)
    if steps_per_epoch is None:
        return ""
    epochs = f"{stream.total_steps / steps_per_epoch():.3g}"
    return f" ({epochs} epoch{'' if epochs == '1' else 's'})"


def _above_limit(plan: SessionPlan) -> str | None:
    """What to do where a run takes more than train.memory_limit; None where it takes no more."""
    from lora.training.recompute import memory_limit

    train = plan.workload.config.train
    limit = memory_limit(plan.facts, train.memory_limit)
    if limit is None or sum(plan.allocated.values()) <= limit:
        return None
    return (
        f"train.memory_limit ({train.memory_limit}) is {limit / 2**20:.0f} MiB; lower "
        "train.batch_size or data.max_length, or take a smaller quantization (lora plan --fit says "
        "what fits)"
    )


def _recompute(plan: SessionPlan) -> str:
    """on, off, or of how many layers."""
    layout = plan.workload.layout
    layers = layout.architecture.n_layers - layout.lowest_layer
    count = plan.tensors.recomputed
    return "off" if count == 0 else "on" if count >= layers else f"of {count} of {layers} layers"


def seconds_shown(seconds: float) -> str:
    """A time with as many digits as it deserves: 12 ms, 1.4 s, 110 s, 25 min, 3.2 h."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _targets_shown(layout: AdapterLayout) -> str:
    """The adapted matrices; of those that some of the layers lack, in how many they are."""
    from lora.forward.model.adaptable import HEAD

    counts = Counter(m.module for group in layout.groups for m in group.members)
    n_layers = len(layout.layers)
    return ", ".join(
        name
        if counts[name] in (n_layers, 0) or name == HEAD.module
        else f"{name} (in {counts[name]})"
        for name in sorted(layout.targets)
    )


def _bare_mixers(layout: AdapterLayout) -> str | None:
    """Which layers' mixers are left out though others' are adapted; None where none are.

    The usual seven names are those of attention: in a model of other mixers they are few of all.
    """
    layers = layout.architecture.layers
    names = [[m.module for m in layers[layer].mixer.matrices] for layer in layout.layers]
    bare = [of for of in names if not layout.targets & set(of)]
    if not bare or len(bare) == len(names):
        return None
    missing = ", ".join(dict.fromkeys(name for of in bare for name in of))
    return (
        f"what mixes tokens in {len(bare)} of {len(names)} layers ({missing}); adapter.targets: "
        "all-linear adapts it"
    )
