"""The benchmark against PEFT on a tiny model: what it reports is what a session does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import vs_peft
from benchmarks.peft_side import serves
from benchmarks.sessions import Case, used_memory
from benchmarks.vs_peft import PEFT_VARIANTS, parse_options, parse_shapes
from benchmarks.vs_peft_report import LOSS_TOLERANCE, NORM_TOLERANCE, memory_lines, write_report
from lora.shaders.choice import choose_device
from lora.shaders.device import Device
from lora.training.session import TrainingSession
from tests.support.half_tensors import needs_halves
from tests.support.synthetic_models import SHAPES, write_model
from tests.support.synthetic_runs import (
    as_examples,
    largest_difference,
    loss_curves,
    repeating_sequences,
    run_config,
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "model.gguf"
    write_model(path, SHAPES["tiny"])
    return path


def test_shapes_of_several_models() -> None:
    cases = parse_shapes(["tiny:1x128,4x512,8x64p", "Llama-1.2B:2x64"], 20)
    assert cases == {
        "tiny": [Case(1, 128, 20), Case(4, 512, 20), Case(8, 64, 20, packed=True)],
        "Llama-1.2B": [Case(2, 64, 20)],
    }
    assert Case(1, 128, 20).warm_up == 5 and Case(1, 128, 2).warm_up == 1


@pytest.mark.parametrize("text", ["tiny", "tiny:", "tiny:4", "tiny:4x", "other:1x2", "tiny:1x2,"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="BATCHxLENGTH|none of"):
        parse_shapes([text], 20)


def test_variants() -> None:
    assert parse_options([]).variants == list(PEFT_VARIANTS)[:4]
    assert parse_options(["--no-peft"]).variants == []
    assert parse_options(["--peft", "float32,bfloat16"]).variants == ["float32", "bfloat16"]
    with pytest.raises(SystemExit):
        parse_options(["--peft", "float64"])


@pytest.mark.parametrize(
    ("done", "served"),
    [
        (set(), {(), ("compile",), ("liger",), ("nf4",), ("nf4", "liger")}),
        ({"liger"}, {("liger",), ("nf4", "liger")}),
        ({"nf4"}, {("nf4",), ("nf4", "liger")}),
        ({"liger", "nf4"}, {("nf4", "liger")}),
    ],
)
def test_no_variant_runs_with_the_kernels_of_another(
    done: set[str], served: set[tuple[str, ...]]
) -> None:
    """Liger's kernels stay in a model: NF4 after them would be measured with them."""
    base = SimpleNamespace(prepared_for=done)
    variants = PEFT_VARIANTS.values()
    assert {variant.kernels for variant in variants if serves(base, variant)} == served


def test_the_head_alone_has_the_type_of_output_weight() -> None:
    """Not each layer's attn_output.weight, whose name ends so, too."""
    shape = SHAPES["Llama-8B"]
    assert shape.type_of("output.weight").name == shape.type_of("blk.0.ffn_down.weight").name
    assert shape.type_of("output.weight").name == "Q6_K"
    assert shape.type_of("blk.0.attn_output.weight").name == "Q4_K"


def test_the_largest_difference_is_relative_and_over_common_steps() -> None:
    assert largest_difference([2.0, 3.03, 9.0], [2.0, 3.0]) == pytest.approx(0.01)


def test_rows_repeat_and_share_an_alphabet() -> None:
    rows = repeating_sequences(512, 5, 50)
    assert all(np.array_equal(row[8:], row[:-8]) for row in rows)
    assert len(np.unique(np.concatenate(rows))) <= 16


def test_loss_curves_fall_and_are_those_of_training(tiny: Path) -> None:
    steps, rows, length = 8, 2, 32
    curves = loss_curves(tiny, steps, ["f32"], batch_size=rows, length=length)
    config = run_config(tiny, batch_size=rows, length=length, steps=steps, learning_rate=1e-3)
    examples = as_examples(repeating_sequences(SHAPES["tiny"].vocab_size, rows * steps, length))
    session = TrainingSession(config, examples=examples)
    assert curves == {"f32": [metrics.loss for metrics in session.train()]}
    assert curves["f32"][-1] < 0.97 * curves["f32"][0]


def test_loss_curves_of_two_precisions_part_a_little(tiny: Path) -> None:
    with Device() as device:
        needs_halves(device.facts)
    curves = loss_curves(tiny, 6, ["f32", "f16"], batch_size=2, length=24)
    # Every stored activation of f16 is rounded by up to 2^-11: the losses can't be equal, and
    # those of a step are means over 46 tokens of sums of such errors of either sign.
    assert 0 < largest_difference(curves["f16"], curves["f32"]) < 2**-9


def test_a_report(tiny: Path, tmp_path: Path) -> None:
    """Ours at both settings of recompute, which differ by nothing but the order of sums."""
    case = Case(2, 20, 3)
    results = {
        f"ours f32, recompute {recompute}": vs_peft.ours(
            tiny, "tiny", case, "f32", recompute, tmp_path / "adapter"
        )
        for recompute in ("on", "off")
    }
    write_report(tmp_path, "tiny", case, results)
    saved = json.loads((tmp_path / "vs_peft-tiny-2x20.json").read_text())
    for result in saved.values():
        assert len(result["losses"]) == len(result["norms"]) == case.warm_up + case.steps
        assert result["ms"] > 0 and result["planned_MiB"] == result["memory_MiB"] > 0
    text = (tmp_path / "vs_peft-tiny-2x20.md").read_text()
    on, off = [line for line in text.splitlines() if line.startswith("| ours")][:2]
    assert on.endswith("| is compared with |") and off.endswith("| yes |")
    if "timestamp-query" in choose_device().found.features:
        assert "| matmul_" in text


def test_memory_against_the_plan_and_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {
        "memory_MiB": 1000.0,
        "memory": {"weights": 600.0, "activations": 400.0, "inputs": 0.1},
        "planned_MiB": 1000.0,
        "context_MiB": 150.0,
        "nvidia_smi_MiB": 1228.8,
    }
    lines = memory_lines({"ours": result, "elsewhere": result | {"nvidia_smi_MiB": None}})
    assert lines[2] == (
        "| ours | 1000 | 1000 | 1229 | 150 | +7.9% | 10% | weights 600, activations 400 |"
    )
    assert "| +" not in lines[3] and "| 8% |" in lines[3]

    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\necho "$*" | grep -q memory.used && echo 1234\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert used_memory() == 1234 << 20
    monkeypatch.setenv("PATH", "/nowhere")
    assert used_memory() is None


@pytest.mark.parity
def test_peft_leaves_its_model_as_it_was(tiny: Path, tmp_path: Path) -> None:
    """One transformers model serves all variants; float32 is what ours is compared with."""
    case, adapter = Case(1, 16, 2), tmp_path / "adapter"
    ours = vs_peft.ours(tiny, "tiny", case, "f32", "off", adapter)
    vs_peft.make_base(tiny)
    base = vs_peft.load_base(tiny)
    runs = [
        vs_peft.peft(base, "tiny", case, PEFT_VARIANTS[key], adapter)
        for key in ("float32", "float32-checkpointing", "bfloat16", "bfloat16")
    ]
    plain, checkpointed, half, half_again = runs
    for figures in ("losses", "norms"):
        assert checkpointed[figures] == pytest.approx(plain[figures], rel=1e-6)
        assert half_again[figures] == half[figures]
    assert largest_difference(ours["losses"], plain["losses"]) < LOSS_TOLERANCE
    assert largest_difference(ours["norms"], plain["norms"]) < NORM_TOLERANCE
    # bfloat16 keeps eight bits: it is another computation, of about the same loss.
    assert 1e-5 < largest_difference(half["losses"], plain["losses"]) < 2**-7


@pytest.mark.parity
def test_padded_rows_are_what_ours_are(tiny: Path, tmp_path: Path) -> None:
    """Sequences of several lengths: ours lie end to end, PEFT's are padded; the losses agree."""
    case, adapter = Case(3, 24, 2, packed=True), tmp_path / "adapter"
    assert len({len(ids) for ids in case.data("tiny")}) > 3
    ours = vs_peft.ours(tiny, "tiny", case, "f32", "off", adapter)
    vs_peft.make_base(tiny)
    plain = vs_peft.peft(vs_peft.load_base(tiny), "tiny", case, PEFT_VARIANTS["float32"], adapter)
    assert largest_difference(ours["losses"], plain["losses"]) < LOSS_TOLERANCE
    assert largest_difference(ours["norms"], plain["norms"]) < NORM_TOLERANCE


@pytest.mark.parity
def test_a_large_base_has_random_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shapes are the file's; its losses are of other weights, and so not told."""
    monkeypatch.setattr("benchmarks.peft_side.MOST_READ", 1000)
    case, adapter = Case(1, 16, 2), tmp_path / "adapter"
    results = {"ours f16": vs_peft.ours(tiny, "tiny", case, "f32", "off", adapter)}
    tiny.with_suffix(".pt").unlink(missing_ok=True)
    vs_peft.make_base(tiny)
    base = vs_peft.load_base(tiny)
    assert base.config.hidden_size == SHAPES["tiny"].hidden_size
    variant = PEFT_VARIANTS["bfloat16"]
    results[variant.label] = vs_peft.peft(base, "tiny", case, variant, adapter)
    assert results[variant.label]["losses"] is None
    lines = write_report(tmp_path, "tiny", case, results).splitlines()
    (line,) = [line for line in lines if line.startswith("| PEFT bfloat16 |")]
    assert line.endswith("|  |  |  |  |")
