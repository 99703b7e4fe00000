"""The command `lora tune`; lora/commands/cli.py registers it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from lora.commands.options import ConfigArgument, Overrides, WebGPUOverride, overrides
from lora.commands.tables import table_console

if TYPE_CHECKING:  # imported in the command: `lora --help` has no use for them
    from lora.forward.plans.matmul_plans import ProductShape, Request
    from lora.forward.plans.matmul_tiles import Plan


def tune_command(
    config: ConfigArgument,
    set_: Overrides = None,
    webgpu: WebGPUOverride = None,
    seconds: Annotated[float, typer.Option(help="Time to spend.")] = 30.0,
    again: Annotated[bool, typer.Option(help="Forget what is known of this device.")] = False,
) -> None:
    """Find the fastest tiles for a config's products, with more time than `lora train` takes.

    Products whose tiles were found with as much time before are left as they are.
    """
    from lora.commands.waiting import waiting
    from lora.config.schema import load_config
    from lora.forward.plans.matmul_tiles import choose_plan
    from lora.forward.plans.tuning import tune
    from lora.shaders.device import Device
    from lora.shaders.errors import InputError
    from lora.storage.tile_cache import TileCache
    from lora.training.device_state import SessionPlan
    from lora.training.workload import Workload

    if seconds <= 0:
        raise InputError(f"--seconds {seconds:g}: give some time, such as 30.")
    loaded = load_config(config, overrides(set_, webgpu))
    device = Device(loaded.device, webgpu=loaded.webgpu)
    if device.facts.is_cpu:
        raise InputError(
            f"{device.facts.name} runs on the CPU, whose products have no tiles to choose. Name a "
            "GPU in `device` (see `lora devices`)."
        )
    with waiting():
        requests = SessionPlan.of(device.facts, Workload.open(loaded, train=True)).requests
    cache = TileCache(device)
    if again:
        cache.forget()
    looked_for: list[Request] = []

    def tuner(
        device: Device, missing: Sequence[Request], /, *, seconds: float
    ) -> Mapping[ProductShape, Plan]:
        looked_for.extend(missing)
        return tune(device, missing, seconds=seconds)

    with waiting("Timing tiles"):
        cache.find(requests, tuner, seconds)
    console = table_console()
    if not looked_for:
        console.print(
            "All of these were found with as much time before; --again looks for them anew."
        )
    if loaded.train.tuning == "off":
        console.print("train.tuning is off in this config: its runs take the default tiles.")
    table = Table("product", "times a step", "default", "chosen", title=device.facts.name)
    counts = Counter(request.product for request in requests)
    first: dict[ProductShape, Request] = {}
    for request in requests:
        first.setdefault(request.product, request)
    for product, count in counts.most_common():
        default = choose_plan(first[product].space(device.facts))
        chosen = cache.plan(product) or default
        name = f"{product.rows} x {product.columns} x {product.contraction} {product.quantization}"
        name += " to the input" if product.transposed else ""
        table.add_row(name, str(count), default.name, chosen.name)
    console.print(table)
    console.print(f"Kept in {cache.path}.", highlight=False)
