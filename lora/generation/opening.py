"""Opening a model and adapters for text, without anything that only training needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lora.adapters.files import load_adapter, open_adapter
from lora.forward.dora import Dora
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.forward.model.frozen_model import Model, load_model
from lora.forward.text.tokenizer import Tokenizer
from lora.generation.engine import Adapter, TextTensors, memory_figures
from lora.generation.generator import TextGenerator
from lora.shaders.choice import Wanted
from lora.shaders.device import Device
from lora.shaders.errors import DeviceMemoryError, InputError
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import Arena, CountingMemory
from lora.shaders.recording import Recording
from lora.shaders.stages import stage
from lora.storage.stores import resolve_model
from lora.storage.tile_cache import find_tiles

DEFAULT_ROOM = 4096  # tokens


def upload_adapter(recording: Recording, architecture: Architecture, path: Path) -> Adapter:
    """Puts an adapter on the device: a PEFT directory, or a GGUF adapter.

    Raises:
        InputError: it is no adapter, or not one for this model.
    """
    layout = open_adapter(path, architecture).layout(architecture)
    layout.check_bindings(recording.facts)
    flat = recording.memory.empty_flat(layout.size, purpose="adapter")
    recording.memory.write(flat, load_adapter(path, layout))
    return Adapter(layout, flat, tokens=layout.token_index(recording))


def measured(recording: Recording, model: Model, adapter: Adapter) -> Adapter:
    """The same adapter; of DoRA with the lengths of its rows on this model."""
    if not adapter.layout.dora:
        return adapter
    dora = Dora.allocate(recording, model, adapter.factors)
    dora.update.run()
    return replace(adapter, dora=dora)


def check_half_products(facts: DeviceFacts) -> None:
    """Raises InputError where a prompt's products can't be in f16."""
    if facts.is_cpu or "shader-f16" not in facts.features:
        raise InputError(
            f"--precision f16: {facts.name} computes a prompt's products in f32 only. Leave the "
            "option out."
        )


def open_generator(
    model: str,
    adapters: Mapping[str, Path] | None = None,
    *,
    tokenizer: str | None = None,
    max_length: int | None = None,
    device: str | Wanted | Device = "auto",
) -> TextGenerator:
    """Opens a model and adapters for text; `close` on what it returns gives all memory back.

    Args:
        model: a GGUF file, or a name as in model.path.
        adapters: PEFT adapter directories or GGUF adapters by name.
        tokenizer: a tokenizer.json, or a directory that holds one; None for the GGUF's own.
        max_length: the room: tokens of prompt and answer together; None for what the model was
            trained for, DEFAULT_ROOM at most. More than it was trained for is refused.
        device: as in the config, also with an implementation of WebGPU and the precision of a
            prompt's products; or one that is open already, and stays open.

    Raises:
        InputError: the model or an adapter can't be read, they do not fit together, max_length is
            beyond the model's context, or the device has no room or no products in f16.
    """
    stage(f"Reading {Path(model).name}")
    gguf_file = GGUFFile(resolve_model(model))
    architecture = Architecture.from_gguf(gguf_file)
    text_tokens = Tokenizer.open(gguf_file, tokenizer)
    room = max_length or min(architecture.context_length, DEFAULT_ROOM)
    if room > architecture.context_length:
        raise InputError(
            f"max_length is {room}, but {model} was trained for texts of up to "
            f"{architecture.context_length} tokens and writes nonsense beyond them. Set "
            f"--max-length to {architecture.context_length} or less."
        )
    stage("Loading the model")
    wanted = Wanted(device) if isinstance(device, str) else device
    if isinstance(wanted, Device):
        opened, memory = wanted, wanted.arena()
        owner: Device | Arena = memory
    else:
        owner = opened = Device(wanted.device, webgpu=wanted.webgpu)
        memory = opened.arena()
    try:
        products = "f32"  # not on matrix units, of which no child was asked whether they are right
        if not isinstance(wanted, Device) and wanted.products == "f16":
            from lora.checks.matrix_units import trust_matrix_units  # with all of their kernels

            check_half_products(opened.facts)
            trust_matrix_units(opened, wanted.device)
            products = "f16"
        recording = opened.recording(memory=memory, plans=find_tiles(opened, "auto"))
        recording = replace(recording, products=products)
        try:
            loaded = load_model(recording, gguf_file, architecture, room)
        except DeviceMemoryError as error:
            counted = CountingMemory(opened.facts)
            counting = replace(recording, memory=counted)
            TextTensors.allocate(
                counting, load_model(counting, gguf_file, architecture, room), room
            )
            raise InputError(
                f"{model} does not fit: {error}, and with room for texts of {room} tokens it takes "
                f"{memory_figures(counted.allocated)}. Take a smaller quantization, or lower "
                "--max-length."
            ) from error
        uploaded = {
            name: measured(recording, loaded, upload_adapter(recording, architecture, path))
            for name, path in (adapters or {}).items()
        }
        return TextGenerator(recording, loaded, text_tokens, uploaded, owner=owner)
    except BaseException:
        owner.close()
        raise
