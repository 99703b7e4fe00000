"""Every kernel that real runs use, as WGSL: recorded on devices that nobody needs to have.

Runs are recorded as they are on a device, in memory that only counts, for devices of several kinds:
their kernels are all that is kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import numpy as np

from lora.config.schema import Config
from lora.data.examples import Example
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.matmul_matrix import has_matrix_units
from lora.forward.model.balance import record_row_bounds
from lora.forward.model.weights import MatrixPart, record_largest
from lora.forward.plans.matmul_tiles import (
    DECODED_TILES,
    HALF_TILES,
    MATRIX_TILES,
    PAIRED_TILES,
    PREPARED_TILES,
    TILES,
    Plan,
    PlanSpace,
    Tile,
    cut,
)
from lora.generation.engine import Adapter, DecodeEngine
from lora.shaders.facts import DeviceFacts
from lora.shaders.memory import CountingMemory
from lora.shaders.program import Program
from lora.shaders.recording import Recording
from lora.shaders.templates import render
from lora.shaders.webgpu import MatrixShape
from lora.training.device_state import SessionPlan
from lora.training.programs import record_eval
from lora.training.workload import Workload
from tests.support.powered_models import with_powers
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS

WGSL = Path(__file__).parents[2] / "shaders" / "wgsl"
_MIB = 1 << 20
_NUMBER = re.compile(r"\d+")
_ALL = {"layers": "all", "targets": "all-linear"}


@dataclass(frozen=True)
class Kind:
    """What of a device decides which kernels a run asks for; WebGPU's default limits."""

    name: str
    adapter_type: str = "DiscreteGPU"
    backend: str = "Vulkan"
    workgroup_memory: int = 16384
    most_lanes: int = 256
    most_storage_buffers: int = 8
    max_binding: int = 128 * _MIB
    matrix_shapes: tuple[MatrixShape, ...] = ()

    @property
    def facts(self) -> DeviceFacts:
        """As a device of this kind has them."""
        return DeviceFacts(
            name=self.name,
            info={"adapter_type": self.adapter_type, "backend_type": self.backend},
            is_cpu=self.adapter_type == "CPU",
            features=frozenset({"shader-f16", "subgroups"}),
            max_buffer=2 * self.max_binding,
            max_binding=self.max_binding,
            workgroup_memory=self.workgroup_memory,
            most_lanes=self.most_lanes,
            most_storage_buffers=self.most_storage_buffers,
            matrix_shapes=self.matrix_shapes,
        )


LARGE_GPU = Kind(
    "large GPU", workgroup_memory=49152, most_lanes=1024, most_storage_buffers=32,
    max_binding=2048 * _MIB,
)  # fmt: skip
SMALL_GPU = Kind("GPU of default limits")
# Fragments as NVIDIA's and as Apple's GPUs have them.
MATRIX_GPU = replace(
    LARGE_GPU, name="GPU with matrix units",
    matrix_shapes=(MatrixShape(16, 16, 16, "f16", "f32", 32, 32),),
)  # fmt: skip
SMALL_MATRICES = replace(
    LARGE_GPU, name="GPU with small matrix units", workgroup_memory=32768,
    matrix_shapes=(MatrixShape(8, 8, 8, "f16", "f32", 32, 32),),
)  # fmt: skip
METAL = Kind("Metal", backend="Metal", workgroup_memory=32768, most_lanes=1024)
CPU = Kind("CPU", adapter_type="CPU", workgroup_memory=32768, most_lanes=1024)
F32, F16 = {"precision": "f32", "recompute": "on"}, {"precision": "f16", "recompute": "off"}
KEPT = {**F32, "recompute": "off"}
# Between them they have all that an architecture may have: biases, norms of heads, post norms,
# caps, windows, layers without rope, heads of their own that are adapted, one tensor for q, k, v.
_MODELS = (
    "llama_odd", "llama_head_only", "llama_bias", "smollm3", "qwen3", "gemma2_head", "gemma3",
    "phi3_short", "olmo3", "mistral3", "hunyuan", "gemma4_e2b",
    "gemma4_dense", "lfm2", "qwen35",
)  # fmt: skip
_TILED = "llama_odd"  # the model whose products are recorded with every tile
# Tokens of the two examples that are a micro-batch.
_SHORT, _LONG = (70, 33), (1500, 500)


@dataclass(frozen=True)
class Request:
    """A kernel that a device was asked to compile."""

    kind: Kind
    template: str
    constants: dict[str, Any]


Found = dict[str, Request]  # by template and constants
Run = Callable[[Found], None]


def keep(kind: Kind, programs: Iterable[Program], found: Found) -> None:
    """Adds the kernels of programs, recorded for a kind of device."""
    for program in programs:
        for dispatch in program.dispatches:
            key = f"{dispatch.template} {sorted(dispatch.constants.items())!r}"
            if key not in found or kind is SMALL_GPU:
                found[key] = Request(kind, dispatch.template, dict(dispatch.constants))


@dataclass
class Renderings:
    """Distinct WGSL texts.

    Attributes:
        templates: each text's template.
        within_defaults: those that a GPU of WebGPU's default limits asks for.
        files: what went into them, of shaders/wgsl/: "decode/q4_0.wgsl".
    """

    templates: dict[str, str] = field(default_factory=dict)
    within_defaults: set[str] = field(default_factory=set)
    files: set[str] = field(default_factory=set)

    @cached_property
    def unlike(self) -> dict[str, str]:
        """Of those that are the same but for numbers one, with its lines where these are 0.

        A line once: a loop that is unrolled further has no line that a compiler would refuse anew.
        """
        plain = {
            text: "\n".join(dict.fromkeys(_NUMBER.sub("0", text).splitlines()))
            for text in self.templates
        }
        chosen = {lines: text for text, lines in plain.items()}
        chosen |= {lines: text for text, lines in plain.items() if text in self.within_defaults}
        return {text: without for without, text in chosen.items()}

    @cached_property
    def covering(self) -> dict[str, str]:
        """So many of them that every line appears that any of them has, numbers aside."""
        seen: set[str] = set()
        chosen = {}
        for text, without in self.unlike.items():
            template = self.templates[text]
            lines = {f"{template} {line}" for line in without.splitlines()}
            if not lines <= seen:
                seen |= lines
                chosen[text] = template
        return chosen


@cache
def all_renderings() -> Renderings:
    """The kernels of all runs below."""
    found: Found = {}
    with TemporaryDirectory() as folder:
        for record in _runs(Path(folder)):
            record(found)
    renderings = Renderings()
    with _files_read(renderings.files):
        for request in found.values():
            text = render(request.template, request.constants)
            renderings.templates[text] = request.template
            if request.kind is SMALL_GPU:
                renderings.within_defaults.add(text)
    return renderings


def _files_read(files: set[str]) -> AbstractContextManager[Any]:
    """While it lasts, the template files that are loaded are noted."""
    from lora.shaders.templates import _environment

    _environment.cache_clear()  # what is loaded already is not loaded again
    loader = _environment().loader
    assert loader is not None
    load = loader.load

    def noted(environment: Any, name: str, *rest: Any) -> Any:
        files.add(name)
        return load(environment, name, *rest)

    return mock.patch.object(loader, "load", noted)


def _runs(folder: Path) -> Iterator[Run]:
    """Recordings of training, evaluation, prompts and single rows."""
    for name in _MODELS:
        path, model = folder / f"{name}.gguf", TINY_MODELS[name]
        model.write_gguf(path)
        adapter = {"layers": model.layers or "all", "targets": model.targets}
        yield _record(path, (LARGE_GPU, SMALL_GPU), (F32, F16), adapter)
        yield _record(path, (CPU,), (F32, KEPT), adapter)
    yield _record(folder / "qwen35.gguf", (MATRIX_GPU, SMALL_MATRICES), (F16,))
    tiled = folder / f"{_TILED}.gguf"
    yield _record(tiled, (METAL,), (F32,))
    yield _record(tiled, (CPU,), (F16,))
    for index, tile in enumerate((*TILES, *HALF_TILES)):
        yield _record_tile(LARGE_GPU, tiled, tile, splits=(1, 3)[index % 2])
    for index, tile in enumerate((*MATRIX_TILES, *PAIRED_TILES, *PREPARED_TILES)):
        kind = (MATRIX_GPU, SMALL_MATRICES)[index // 2 % 2]
        if tile.workgroup_bytes <= kind.workgroup_memory:
            yield _record_tile(kind, tiled, tile, splits=(1, 3)[index % 2])
    # Options of the adapter and of training.
    path, model = folder / "options.gguf", TINY_MODELS["llama_head"]
    model.write_gguf(path)
    patterns = {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 5.0}}
    adapter = {"targets": [*model.targets], "dropout": 0.1, "loraplus_lr_ratio": 16.0, **patterns}
    noisy = {"neftune_noise_alpha": 5.0, "label_smoothing": 0.1, "optimizer": "adamw_8bit"}
    other = {"loss_type": "dft", "optimizer": "lion"}
    yield _record(path, (LARGE_GPU, SMALL_GPU), ({**F32, **noisy}, {**F16, **other}), adapter)
    yield _record(path, (MATRIX_GPU, SMALL_MATRICES), ({**F16, **other},), adapter)
    yield _record(path, (CPU,), ({**F32, **noisy},), adapter)
    yield _record(path, (LARGE_GPU, CPU), (F32,), patterns)
    path, model = folder / "dora.gguf", TINY_MODELS["llama_bias"]
    model.write_gguf(path)
    yield _record(path, (LARGE_GPU, SMALL_GPU), (F32, F16), {"variant": "dora"})
    yield _record(path, (MATRIX_GPU,), (F16,), {"variant": "dora"})
    # Rows of the embedding, here the head's, too, and capped.
    path, model = folder / "tokens.gguf", TINY_MODELS["gemma2"]
    model.write_gguf(path)
    tokens = {"trainable_tokens": [5, 9, 12, 13, 20]}
    yield _record(path, (LARGE_GPU, SMALL_GPU), (F32, F16), tokens)
    yield _record(path, (MATRIX_GPU,), (F16,), tokens)
    yield _record(path, (CPU,), (F32,), tokens)
    yield _record(path, (LARGE_GPU,), (F32,), {**tokens, "targets": ["q_proj", "lm_head"]})
    # A and B of the embedding.
    adapter = {"targets": ["embed_tokens", "q_proj"]}
    yield _record(path, (LARGE_GPU, SMALL_GPU), (F32, F16), adapter)
    yield _record(path, (MATRIX_GPU,), (F16,), adapter)
    yield _record(path, (CPU,), (F32,), adapter)
    # Widths of no whole eights, and gradients that nothing clips.
    path = folder / "narrow.gguf"
    write_tiny_llama(path, hidden_size=36, intermediate_size=60, n_heads=3, n_kv_heads=1,
                     head_size=12)  # fmt: skip
    yield _record(path, (LARGE_GPU, CPU), (F32, {**F16, "max_grad_norm": None}))
    yield _record(path, (MATRIX_GPU,), (F16, F32))
    # Norms after quantized products of rows that are no few steps of a workgroup.
    post_norms, path = TINY_MODELS["gemma2_q8_0"], folder / "wide.gguf"
    replace(post_norms, config=post_norms.config | {"hidden_size": 512}).write_gguf(path)
    yield _record(path, (LARGE_GPU,), (F32,))
    # Prompts on matrix units, with windows, caps and heads of whole fragments.
    yield _record_text(path, (MATRIX_GPU, SMALL_MATRICES))
    # Types that differ within a stack; the largest heads.
    path = folder / "mixed.gguf"
    write_tiny_llama(
        path, n_layers=1, hidden_size=1024, intermediate_size=256, n_heads=2, n_kv_heads=1,
        head_size=256, types={"weight": "Q4_0", "attn_k.weight": "Q8_0", "ffn_up.weight": "Q8_0"},
        tensors=_biases(q=512, k=256, v=256),
    )  # fmt: skip
    yield _record(path, (LARGE_GPU, METAL, CPU), (F32, F16))
    # Contractions so long that a lane goes round, with a rest; biases of gate and up.
    path = folder / "long.gguf"
    write_tiny_llama(
        path, n_layers=1, hidden_size=3072, intermediate_size=256, n_heads=2, n_kv_heads=1,
        head_size=64, types={"weight": "Q4_0"}, tensors=_biases(gate=256, up=256),
    )  # fmt: skip
    yield _record(path, (LARGE_GPU, METAL), (F32,))
    yield _record_largest
    yield with_powers(_record(tiled, (LARGE_GPU, MATRIX_GPU, CPU), (F16,)))
    for kind in QUANTIZATIONS:
        path = folder / f"{kind.name}.gguf"
        write_tiny_llama(
            path, n_layers=1, hidden_size=256, intermediate_size=512, head_size=64,
            vocab_size=512, types={"weight": kind.name}, metadata={"llama.context_length": 4096},
        )  # fmt: skip
        yield _record(path, (LARGE_GPU,), (F32, F16), lengths=_LONG)
        yield _record(path, (MATRIX_GPU,), (F16,), lengths=_LONG)
        yield _record_tile(MATRIX_GPU, path, PAIRED_TILES[1], splits=1)
        yield _record_tile(MATRIX_GPU, path, PREPARED_TILES[4], splits=1)
        yield _record(path, (CPU,), (F32,), lengths=_LONG)
        yield _record_tile(MATRIX_GPU, path, DECODED_TILES[0], splits=1)


def _record_largest(found: Found) -> None:
    """What a model's loading runs for products in pairs."""
    memory = CountingMemory(MATRIX_GPU.facts)
    program = Program(Recording(MATRIX_GPU.facts, memory))
    for quantization in QUANTIZATIONS.values():
        if quantization.name != "f16":
            words = memory.empty((70, quantization.row_words(256)), "u32")
            record_largest(program, words, quantization, memory.empty((70 + 256,), "u32"))
        part = MatrixPart(quantization, memory.empty((70, quantization.row_words(256)), "u32"), 0)
        record_row_bounds(program, part, memory.empty((256,)), memory.empty((70, 4)))
    keep(MATRIX_GPU, [program], found)


def _biases(**sizes: int) -> dict[str, np.ndarray]:
    """Biases of the first layer's matrices."""
    return {
        f"blk.0.{'ffn' if name in ('gate', 'up') else 'attn'}_{name}.bias": np.ones(n, np.float32)
        for name, n in sizes.items()
    }


def _record(
    path: Path,
    kinds: Sequence[Kind],
    settings: Sequence[dict[str, Any]],
    adapter: Mapping[str, Any] = _ALL,
    lengths: Sequence[int] = _SHORT,
) -> Run:
    """Training and evaluation of a model on devices of some kinds; text where it is f32."""

    def run(found: Found) -> None:
        for kind in kinds:
            for train in settings:
                plan = _plan(kind, path, adapter, train, lengths)
                keep(kind, _training(plan), found)
                if train is F32:  # text has no other
                    keep(kind, _text(plan), found)

    return run


def _record_text(path: Path, kinds: Sequence[Kind]) -> Run:
    """Text of a model on devices of some kinds, in pieces of many rows."""

    def run(found: Found) -> None:
        for kind in kinds:
            keep(kind, _text(_plan(kind, path, _ALL, F32, _LONG)), found)

    return run


def _record_tile(kind: Kind, path: Path, tile: Tile, splits: int) -> Run:
    """Training of a model whose products all have one tile and so many stretches."""
    half = tile.item_bytes == 2

    def choose(space: PlanSpace) -> Plan:
        return Plan(tile, *cut(space.contraction, splits, tile.depth))

    def run(found: Found) -> None:
        with mock.patch("lora.forward.plans.matmul_plans.choose_plan", choose):
            plan = _plan(kind, path, _ALL, F16 if half else F32)
            keep(kind, _training(plan), found)

    return run


def _plan(
    kind: Kind,
    path: Path,
    adapter: Mapping[str, Any],
    train: Mapping[str, Any],
    lengths: Sequence[int] = _SHORT,
) -> SessionPlan:
    """Records a training session."""
    config = Config.model_validate(
        {
            "model": {"path": str(path)},
            "adapter": {"rank": 8, "alpha": 16, **adapter},
            "data": {"train": "none", "max_length": max(lengths), "shuffle": False},
            "train": {
                "steps": 1,
                "batch_size": len(lengths),
                "tuning": "off",
                **train,
            },
            "output": "none",
        }
    )
    rng = np.random.default_rng(0)
    examples = [
        Example(rng.integers(3, 300, n).astype(np.int32), np.arange(n) > 0, i)
        for i, n in enumerate(lengths)
    ]
    return SessionPlan.of(kind.facts, Workload.open(config, train=True, examples=examples))


def _training(plan: SessionPlan) -> list[Program]:
    """Its programs, and those of evaluations with and without the adapter."""
    training, step = plan.programs.training, plan.tensors.step
    assert training is not None
    recording = _counting(plan, plan.precision)
    evaluations = [
        record_eval(recording, step.model, step.inputs, step.activations, step.layout, flat)
        for flat in (step.adapter, None)
    ]
    dora = step.adapter.dora
    lengths = [] if dora is None else [dora.update]
    return [*plan.programs.step, *evaluations, *lengths]


def _text(plan: SessionPlan) -> list[Program]:
    """Prompts and single rows, of the bare model and of the adapter."""
    state = plan.tensors.step.adapter
    adapter = Adapter(plan.workload.layout, state.parameters, state.dora, state.tokens)
    products = "f16" if has_matrix_units(plan.facts) else None
    recording = replace(_counting(plan), products=products)
    engine = DecodeEngine(recording, plan.tensors.step.model, {"adapter": adapter})
    pieces, step = engine._tensors.pieces, engine._tensors.step
    return [
        program
        for name in (None, "adapter")
        for steps, opening, few in (
            (pieces, True, False), (pieces, False, False), (pieces, False, True),
            (step, False, False),
        )
        for program in engine._programs_of(name, steps, opening=opening, few=few)
    ]  # fmt: skip


def _counting(plan: SessionPlan, precision: str = "f32") -> Recording:
    return Recording(plan.facts, CountingMemory(plan.facts), precision)
