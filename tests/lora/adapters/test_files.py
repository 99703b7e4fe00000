"""A PEFT directory and the GGUF adapter made of it are the same adapter, wherever one is taken."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from typer.testing import CliRunner

from lora.adapters.files import load_adapter, open_adapter, with_adapter
from lora.commands.cli import app
from lora.commands.inspect import gguf_facts
from lora.config.schema import Config
from lora.export.to_gguf import export
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.adapter import AdapterLayout
from lora.forward.model.architecture import Architecture
from lora.generation.opening import open_generator
from lora.shaders.errors import InputError
from lora.training.session import TrainingSession
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import open_session
from tests.support.tiny_run import write_run


@pytest.fixture(params=["llama_odd", "phi3", "llama_head", "gemma3"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A tiny model's name, and a folder with model.gguf, the directory adapter and adapter.gguf."""
    model = TINY_MODELS[request.param]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    export(
        tmp_path / "adapter", "gguf", output=tmp_path / "adapter.gguf",
        base=str(tmp_path / "model.gguf"),
    )  # fmt: skip
    return request.param, tmp_path


def test_training_starts_from_either(made: tuple[str, Path]) -> None:
    name, folder = made
    sessions = [
        open_session(TINY_MODELS[name], folder / "model.gguf", folder / adapter)
        for adapter in ("adapter", "adapter.gguf")
    ]
    first, second = (session.parameters() for session in sessions)
    assert np.count_nonzero(first) > 0
    # alpha is a float32 in the file, and the scale a quotient of it: the last bit of B may differ.
    np.testing.assert_allclose(second, first, rtol=3e-7)


def test_layouts_and_values(made: tuple[str, Path]) -> None:
    name, folder = made
    architecture = Architecture.from_gguf(GGUFFile(folder / "model.gguf"))
    peft, gguf = (open_adapter(folder / a, architecture) for a in ("adapter", "adapter.gguf"))
    assert (peft.rank, peft.targets, peft.layers) == (gguf.rank, gguf.targets, gguf.layers)
    assert peft.scale == pytest.approx(gguf.scale)
    assert peft.targets == TINY_MODELS[name].targets
    layout = peft.layout(architecture)
    np.testing.assert_allclose(
        load_adapter(gguf.path, layout), load_adapter(peft.path, layout), rtol=3e-7
    )


def test_generation_under_either(made: tuple[str, Path]) -> None:
    _, folder = made
    generator = open_generator(
        str(folder / "model.gguf"),
        {"peft": folder / "adapter", "gguf": folder / "adapter.gguf"},
        max_length=32,
    )
    ids = list(range(5, 15))
    peft, gguf, bare = (generator.next_logits(ids, adapter=a) for a in ("peft", "gguf", None))
    np.testing.assert_allclose(gguf, peft, atol=1e-4)
    assert np.abs(bare - peft).max() > 0.1


def test_inspect_says_what_it_is(made: tuple[str, Path]) -> None:
    name, folder = made
    facts = gguf_facts(folder / "adapter.gguf")["adapter"]
    model = TINY_MODELS[name]
    assert (facts["rank"], facts["alpha"]) == (model.rank, pytest.approx(model.alpha))
    assert facts["ranks"] == [model.rank]
    assert facts["tensors"] == len(model.adapter()) // 2


def test_an_adapter_of_another_kind_of_model(made: tuple[str, Path], tmp_path: Path) -> None:
    _, folder = made
    other = TINY_MODELS["qwen3"]
    other.write_gguf(tmp_path / "other.gguf")
    architecture = Architecture.from_gguf(GGUFFile(tmp_path / "other.gguf"))
    with pytest.raises(InputError, match="is an adapter for the architecture"):
        open_adapter(folder / "adapter.gguf", architecture)


@pytest.mark.parametrize("adapter", ["adapter", "adapter.gguf"])
def test_another_alpha_in_the_config_changes_nothing(made: tuple[str, Path], adapter: str) -> None:
    """The product that was trained is what counts: B takes up the difference."""
    _, folder = made
    architecture = Architecture.from_gguf(GGUFFile(folder / "model.gguf"))
    layout = open_adapter(folder / adapter, architecture).layout(architecture)
    wider = AdapterLayout(
        architecture, layout.layers, layout.targets, layout.rank, 4 * layout.scale
    )
    own, scaled = (load_adapter(folder / adapter, each) for each in (layout, wider))
    for path, (a, b) in layout.to_modules(own).items():
        other_a, other_b = wider.to_modules(scaled)[path]
        np.testing.assert_array_equal(other_a, a)
        np.testing.assert_allclose(4 * other_b, b, rtol=3e-7)


@pytest.fixture
def several(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """An adapter whose o_proj has rank 2 and alpha -3, and its products by module path."""
    model = TINY_MODELS["llama"]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    tensors, products = model.adapter(), {}
    for name in [name for name in tensors if name.endswith("lora_A.weight")]:
        other = name.replace("lora_A", "lora_B")
        rank, alpha = (2, -3) if "o_proj" in name else (model.rank, model.alpha)
        tensors[name], tensors[other] = tensors[name][:rank], tensors[other][:, :rank].copy()
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        products[module] = alpha / rank * tensors[other] @ tensors[name]
    safetensors.numpy.save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    change(tmp_path / "adapter", rank_pattern={"o_proj": 2}, alpha_pattern={"o_proj": -3})
    return tmp_path, products


def change(adapter: Path, **settings: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def check_products(layout: AdapterLayout, flat: np.ndarray, wanted: dict[str, np.ndarray]) -> None:
    modules = layout.to_modules(flat)
    assert modules.keys() == wanted.keys()
    for path, (a, b) in modules.items():
        # One rounding of B, and sums of up to four products of numbers below 2.
        np.testing.assert_allclose(layout.scale * b @ a, wanted[path], atol=2e-6)


def test_ranks_and_alphas_of_single_matrices(several: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Out of the directory, and out of the GGUF made of it; tests/parity holds PEFT beside it."""
    folder, products = several
    gguf = export(folder / "adapter", "gguf", base=str(folder / "model.gguf")).path
    architecture = Architecture.from_gguf(GGUFFile(folder / "model.gguf"))
    for path in (folder / "adapter", gguf):
        saved = open_adapter(path, architecture)
        assert (saved.rank, saved.scale) == (4, 2.0)
        assert saved.made_with == "rank 4, alpha 8 and variant lora"
        layout = saved.layout(architecture)
        check_products(layout, load_adapter(path, layout), products)


def test_an_alpha_of_zero_adds_nothing(several: tuple[Path, dict[str, np.ndarray]]) -> None:
    folder, products = several
    change(folder / "adapter", lora_alpha=0, alpha_pattern={})
    architecture = Architecture.from_gguf(GGUFFile(folder / "model.gguf"))
    saved = open_adapter(folder / "adapter", architecture)
    layout = saved.layout(architecture)
    assert saved.scale == 1.0
    nothing = {path: np.zeros_like(product) for path, product in products.items()}
    check_products(layout, load_adapter(saved.path, layout), nothing)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_halves(several: tuple[Path, dict[str, np.ndarray]], dtype: str) -> None:
    """As runs on GPUs save them; BF16 is the upper half of an f32."""
    folder, products = several
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    if dtype == "F16":
        stored = {name: values.astype(np.float16) for name, values in tensors.items()}
    else:
        stored = {n: (v.view(np.uint32) >> 16).astype(np.uint16) for n, v in tensors.items()}
    specs = {
        name: safetensors.TensorSpec(
            dtype={"F16": "float16", "BF16": "bfloat16"}[dtype],
            shape=values.shape,
            data_ptr=values.ctypes.data,
            data_len=values.nbytes,
        )
        for name, values in stored.items()
    }
    path.write_bytes(safetensors.serialize(specs))
    architecture = Architecture.from_gguf(GGUFFile(folder / "model.gguf"))
    layout = open_adapter(path.parent, architecture).layout(architecture)
    found = layout.to_modules(load_adapter(path.parent, layout))
    for module, product in products.items():
        a, b = found[module]
        # bf16 has 8 bits and is cut off here, not rounded: 2^-7 for each of A and B.
        size = np.linalg.norm(product)
        assert np.linalg.norm(layout.scale * b @ a - product) < 2 * 2**-7 * size
        assert np.abs(layout.scale * b @ a - product).max() > 0


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("pissa", r"changed the base's weights too.* path_initial_model_for_weight_conversion"),
        ("pissa_niter_16", r"init_lora_weights is 'pissa_niter_16'"),
        ("OLoRA", r"changed the base's weights too"),
        ("corda", r"changed the base's weights too"),
        ("lora_ga", r"changed the base's weights too"),
        ("loftq", r"changed the base's weights too.* merge_and_unload\(\)"),
        ("novel", r"init_lora_weights is 'novel', which is not known here"),
        (["pissa"], r"which is not known here"),
    ],
)
def test_an_adapter_of_other_weights_than_the_bases(
    several: tuple[Path, dict[str, np.ndarray]], init: object, message: str
) -> None:
    """PiSSA and its like take out of W what A and B begin with: nothing may load them on W."""
    folder, _ = several
    architecture = Architecture.from_gguf(GGUFFile(folder / "model.gguf"))
    layout = open_adapter(folder / "adapter", architecture).layout(architecture)
    change(folder / "adapter", init_lora_weights=init)
    for load in (
        lambda: open_adapter(folder / "adapter", architecture),
        lambda: load_adapter(folder / "adapter", layout),
        lambda: export(folder / "adapter", "gguf", base=str(folder / "model.gguf")),
        lambda: export(folder / "adapter", "merged-gguf", base=str(folder / "model.gguf")),
        lambda: open_generator(
            str(folder / "model.gguf"), {"it": folder / "adapter"}, max_length=32
        ),
        lambda: open_session(TINY_MODELS["llama"], folder / "model.gguf", folder / "adapter"),
    ):
        with pytest.raises(InputError, match=message):
            load()


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_beginnings_that_leave_the_base(
    several: tuple[Path, dict[str, np.ndarray]], init: object
) -> None:
    folder, products = several
    change(folder / "adapter", init_lora_weights=init)
    architecture = Architecture.from_gguf(GGUFFile(folder / "model.gguf"))
    layout = open_adapter(folder / "adapter", architecture).layout(architecture)
    check_products(layout, load_adapter(folder / "adapter", layout), products)


def test_a_config_with_the_adapters_own_settings(
    several: tuple[Path, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    folder, _ = several
    config = Config.model_validate(
        {
            "model": {"path": str(folder / "model.gguf")},
            "adapter": {"rank": 9, "targets": ["down_proj"]},
            "data": {"train": "none"},
            "output": "none",
        }
    )
    own = with_adapter(config, folder / "adapter")
    assert own.model == config.model and own.data == config.data
    assert (own.adapter.rank, own.adapter.scale) == (4, 2.0)
    assert own.adapter.targets == TINY_MODELS["llama"].targets
    assert own.adapter.layers == TINY_MODELS["llama"].layers
    assert own.adapter.init_from == str(folder / "adapter")
    change(folder / "adapter", use_rslora=True)
    rs = with_adapter(config, folder / "adapter").adapter
    assert (rs.variant, rs.alpha, rs.scale) == ("rslora", 8.0, 4.0)
    # The head alone is in no layer.
    head = TINY_MODELS["llama_head"]
    head.write_gguf(folder / "head.gguf")
    tensors = {n: v for n, v in head.adapter().items() if "lm_head" in n}
    safetensors.numpy.save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    change(folder / "adapter", rank_pattern={}, alpha_pattern={}, r=head.rank)
    other = config.model_copy(
        update={"model": config.model.model_copy(update={"path": str(folder / "head.gguf")})}
    )
    alone = with_adapter(other, folder / "adapter").adapter
    assert (alone.targets, alone.layers) == (["lm_head"], "all")


def test_eval_takes_rank_and_targets_from_the_adapter(tmp_path: Path) -> None:
    path = write_run(tmp_path, adapter={"rank": 5, "alpha": 7, "targets": ["q_proj", "lm_head"]})
    session = TrainingSession.from_config(path, train=False)
    random = np.random.default_rng(0)
    modules = {
        name: (a, random.normal(0, 0.5, b.shape).astype(np.float32))
        for name, (a, b) in session.layout.to_modules(session.parameters()).items()
    }
    session.device.memory.write(session.adapter.parameters, session.layout.from_modules(modules))
    session.save(tmp_path / "adapter")
    wanted = {"base": session.evaluate(adapted=False), "adapter": session.evaluate()}
    assert abs(wanted["base"].loss - wanted["adapter"].loss) > 0.1
    others = ["--set", "adapter.rank=16", "--set", "adapter.targets=[down_proj]"]
    arguments = ["eval", str(path), "--adapter", str(tmp_path / "adapter"), "--json", *others]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    for name, expected in wanted.items():
        assert values[name]["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert values[name]["n_exact"] == expected.n_exact
