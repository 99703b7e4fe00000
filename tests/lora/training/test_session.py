"""Training, evaluation and generation on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lora import InputError, LoraError, TrainingSession
from lora.data.batches import make_batch
from lora.data.examples import Example
from lora.generation.generator import TextGenerator
from lora.shaders.device import Device
from tests.support.tiny_run import write_run


def trained(path: Path, *overrides: str) -> tuple[TrainingSession, list[float]]:
    session = TrainingSession.from_config(path, overrides)
    return session, [metrics.loss for metrics in session.train()]


def test_it_learns(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    session, losses = trained(path, "train.epochs=15")
    assert len(losses) == 15 * 4
    assert np.mean(losses[-4:]) < 0.5 * np.mean(losses[:4])
    before, after = session.evaluate(adapted=False), session.evaluate()
    assert after.loss < before.loss
    assert after.perplexity == pytest.approx(np.exp(after.loss))
    assert after.n_examples == 3


def test_one_seed_gives_one_adapter(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    first, second = (trained(path)[0].parameters() for _ in range(2))
    assert first.tobytes() == second.tobytes()
    other = trained(path, "train.seed=1")[0].parameters()
    assert first.tobytes() != other.tobytes()


def test_recompute_changes_nothing(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    on, off = (trained(path, f"train.recompute={s}")[0].parameters() for s in ("on", "off"))
    assert on.tobytes() == off.tobytes()


@pytest.mark.parametrize("layers", ["{last: 2}", "[1]"])
def test_reusing_the_frozen_prefix_changes_nothing(tmp_path: Path, layers: str) -> None:
    """Byte for byte, over epochs that are shuffled differently."""
    path = write_run(tmp_path)
    results = []
    for setting in ("on", "off"):
        overrides = [f"adapter.layers={layers}", f"train.reuse_frozen_prefix={setting}"]
        results.append(trained(path, "train.epochs=3", *overrides)[0].parameters())
    assert results[0].tobytes() == results[1].tobytes()


def test_accumulation_is_the_mean_over_all_trained_tokens(tmp_path: Path) -> None:
    """Micro-batches of one give the gradients of one batch of all, as transformers' Trainer."""
    path = write_run(tmp_path)
    whole = trained(path, "train.batch_size=4", "train.steps=2", "train.seed=3")
    parts = trained(
        path, "train.batch_size=1", "train.gradient_accumulation=4", "train.steps=2", "train.seed=3"
    )
    np.testing.assert_allclose(whole[1], parts[1], rtol=1e-5)
    # Adam's first steps have the size of the rate, whatever the gradient: compare with that.
    difference = np.abs(whole[0].parameters() - parts[0].parameters())
    assert np.median(difference) < 1e-5


def test_packing_trains_on_the_same_tokens(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    plain = TrainingSession.from_config(path, ["train.epochs=1"])
    packed = TrainingSession.from_config(path, ["train.epochs=1", "data.packing=true"])
    totals = [sum(m.trained_tokens for m in session.train()) for session in (plain, packed)]
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize(
    "targets", ["[q_proj, v_proj]", "[k_proj]", "[o_proj]", "[up_proj]", "[down_proj]"]
)
def test_some_matrices_get_the_gradients_they_get_among_all(tmp_path: Path, targets: str) -> None:
    """With B = 0 the other adapters change no output: a matrix alone has the same gradient."""
    path = write_run(tmp_path)
    found = {}
    for name, setting in (("all", "all-linear"), ("some", targets)):
        session = TrainingSession.from_config(path, [f"adapter.targets={setting}"])
        rng = np.random.default_rng(0)
        modules = session.layout.to_modules(session.parameters())
        for module, (a, b) in sorted(modules.items()):
            chosen = module.rsplit(".", 1)[1] in targets
            a[:] = np.random.default_rng(len(module) + a.shape[1]).normal(size=a.shape) * 0.1
            if chosen:
                b[:] = rng.normal(size=b.shape) * 0.1
        session.device.memory.write(
            session.adapter.parameters, session.layout.from_modules(modules)
        )
        session.step([make_batch(session.workload.train_examples[:3])])
        gradient = session.device.memory.read(session.adapter.gradients[0])
        found[name] = session.layout.to_modules(gradient)
    for module, (d_a, d_b) in found["some"].items():
        expected_a, expected_b = found["all"][module]
        scale = max(abs(expected_b).max(), 1e-8)
        np.testing.assert_allclose(d_a, expected_a, atol=1e-5 * max(abs(expected_a).max(), 1e-8))
        np.testing.assert_allclose(d_b, expected_b, atol=1e-5 * scale)
        assert abs(expected_b).max() > 0


def test_the_gradient_is_the_slope_of_the_loss(tmp_path: Path) -> None:
    """The whole step against central differences of its own loss, along the gradient."""
    path = write_run(tmp_path)
    session = TrainingSession.from_config(
        path, ["train.learning_rate=1e-30", "train.batch_size=10"]
    )
    rng = np.random.default_rng(5)
    modules = session.layout.to_modules(session.parameters())
    for _, b in modules.values():
        b[:] = rng.normal(size=b.shape) * 0.1
    flat = session.layout.from_modules(modules)
    session.device.memory.write(session.adapter.parameters, flat)
    session.step([make_batch(session.workload.train_examples)])
    gradient = session.device.memory.read(session.adapter.gradients[0]).astype(np.float64)
    norm = np.linalg.norm(gradient)
    (metrics,) = session.finished_steps(wait=True)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)

    def loss(distance: float) -> float:
        moved = (flat + distance * gradient / norm).astype(np.float32)
        session.device.memory.write(session.adapter.parameters, moved)
        return session.evaluate(session.workload.train_examples).loss

    # f32 losses of about 6 carry 1e-6: over 2 · 0.02 along the steepest way that is 1e-4 of it.
    slope = (loss(0.02) - loss(-0.02)) / 0.04
    assert slope == pytest.approx(norm, rel=5e-3)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    session = TrainingSession.from_config(write_run(tmp_path))
    flat = session.parameters()
    flat[3] = np.inf
    session.device.memory.write(session.adapter.parameters, flat)
    begins = r"1 to 3: .*begins in layers.0.qkv.z .*, as is some of what it read \(factor\).*Lower"
    with pytest.raises(LoraError, match=begins):
        list(session.train())
    assert session.parameters().tobytes() == flat.tobytes()
    assert (session.steps_done, session.stream.step) == (0, 0)


def test_generation_agrees_with_evaluation(tmp_path: Path) -> None:
    """The greedy continuation, found token by token, is right where every argmax is."""
    path = write_run(tmp_path)
    session, _ = trained(path, "train.epochs=25")
    exact = []
    for example in session.workload.train_examples[:4]:
        first = int(example.trained.argmax())
        result = session.evaluate([example])
        prompt = [int(token) for token in example.ids[:first]]
        answer = session.generate(prompt, max_tokens=len(example.ids) - first)
        wanted = session.tokenizer.decode([int(token) for token in example.ids[first:]])
        assert (answer == wanted) == (result.n_exact == 1)
        exact.append(answer == wanted)
    assert {*exact} == {True, False}  # both happen


def test_an_example_that_was_cut_is_never_exact(tmp_path: Path) -> None:
    """Made exact by construction: what follows the prompt is what the model says itself."""
    session = TrainingSession.from_config(write_run(tmp_path), train=False)
    prompt = session.workload.eval_examples[0].ids[:4].tolist()
    generator = TextGenerator(session._recording, session.model, session.tokenizer)
    said = list(generator.stream_ids(prompt, max_tokens=3))
    ids = np.array([*prompt, *said], dtype=np.int32)
    whole = Example(ids, np.arange(len(ids)) >= len(prompt), 0)
    cut = replace(whole, cut=True)
    wrong_ids = ids.copy()
    wrong_ids[-1] += 1
    wrong = replace(whole, ids=wrong_ids)
    # Two micro-batches, of which each holds examples of both kinds.
    result = session.evaluate([whole, cut, wrong, cut, whole], adapted=False)
    assert (result.n_exact, result.n_cut, result.n_examples) == (2, 2, 5)
    assert result.exact_match == 2 / 5
    assert result.token_accuracy == pytest.approx(14 / 15)  # those of the cut ones count


def test_init_from_continues_an_adapter(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    session, _ = trained(path)
    session.save(tmp_path / "first")
    again = TrainingSession.from_config(path, [f"adapter.init_from={tmp_path / 'first'}"])
    assert again.parameters().tobytes() == session.parameters().tobytes()
    with pytest.raises(
        InputError, match="was made with rank 3, alpha 6 and .*, but adapter.rank is 8"
    ):
        TrainingSession.from_config(
            path, [f"adapter.init_from={tmp_path / 'first'}", "adapter.rank=8"]
        )
    with pytest.raises(InputError, match="alpha 6 and .*, but adapter.rank is 3, adapter.alpha 7"):
        TrainingSession.from_config(
            path, [f"adapter.init_from={tmp_path / 'first'}", "adapter.alpha=7"]
        )


def test_the_saved_config_is_pefts(tmp_path: Path) -> None:
    path = write_run(tmp_path)
    session = TrainingSession.from_config(path, ["adapter.layers={last: 2}"])
    session.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA" and settings["r"] == 3 and settings["lora_alpha"] == 6
    assert settings["layers_to_transform"] == [1, 2]


def test_the_whole_step_at_webgpus_default_limits(tmp_path: Path) -> None:
    """128 MiB bindings, 16 KiB workgroup memory, 256 lanes, 8 storage buffers; both matmuls."""
    path = write_run(tmp_path, train={"precision": "f32"})
    from lora.config.schema import load_config

    limits = {
        "max-storage-buffer-binding-size": 128 << 20,
        "max-buffer-size": 256 << 20,
        "max-compute-workgroup-storage-size": 16 << 10,
        "max-compute-invocations-per-workgroup": 256,
        "max-compute-workgroup-size-x": 256,
        "max-storage-buffers-per-shader-stage": 8,
    }
    results = []
    for is_cpu in (True, False):
        device = Device(limits=limits)
        device.facts = replace(device.facts, is_cpu=is_cpu)
        session = TrainingSession(load_config(str(path)), device=device)
        results.append([metrics.loss for metrics in session.train()])
    # Both ways sum the same products in another order.
    np.testing.assert_allclose(results[0][:3], results[1][:3], rtol=1e-5)


def test_a_prompt_without_room_is_refused(tmp_path: Path) -> None:
    session = TrainingSession.from_config(write_run(tmp_path))
    with pytest.raises(InputError, match="tokens; from 1 to"):
        session.generate([5] * 200)


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    from lora.config.schema import load_config

    config = load_config(str(write_run(tmp_path)))
    example = Example(np.array([1, 100_000], np.int32), np.array([False, True]), 0)
    with pytest.raises(InputError, match="does not fit this model"):
        TrainingSession(config, examples=[example])
