"""Text with keys and values kept, against the whole forward pass run again for every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config.schema import Config
from lora.data.examples import Example
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.generation.engine import Adapter
from lora.generation.generator import TextGenerator
from lora.generation.opening import open_generator, upload_adapter
from lora.generation.sampling import GREEDY, Sampler, Sampling
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.training.session import TrainingSession
from tests.support.full_rerun import FullRerun
from tests.support.kernels import with_facts
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import open_session
from tests.support.tiny_run import TYPES

PREFILLED = 6  # tokens at once, before those one by one


# Between them every line, numbers aside, of the kernels that tiny models' texts take on a GPU. Of
# the other models tests/forward/model/test_families.py has the logits; that one row's programs
# forget no part of a layer, tests/lora/training/test_layer_spec.py.
BY_KERNELS_OF_GPUS = (
    "llama_odd", "llama_head_dim", "llama_bias", "qwen3", "gemma2_q8_0", "mistral3", "gemma4_e2b",
    "lfm2", "qwen35",
)  # fmt: skip
# The same lines in other kernels, each of which is compiled: `make parity-long`.
OTHERS = (
    "llama_head", "smollm3", "gemma3", "phi3_window", "phi3_long", "olmo3", "hunyuan",
    "gemma4_dense",
)  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        *BY_KERNELS_OF_GPUS,
        *(pytest.param(name, marks=[pytest.mark.parity, pytest.mark.long]) for name in OTHERS),
    ],
)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def session(name: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], TrainingSession]:
    folder = tmp_path_factory.mktemp(name)

    @cache
    def opened() -> TrainingSession:
        model = TINY_MODELS[name]
        model.write_gguf(folder / "model.gguf")
        model.write_adapter(folder / "adapter")
        return open_session(model, folder / "model.gguf", folder / "adapter")

    return opened


def generator_of(session: TrainingSession, *, is_cpu: bool) -> TextGenerator:
    """A generator on the session's model and adapter, by the kernels of a CPU device or a GPU."""
    state = session.adapter
    adapter = Adapter(session.layout, state.parameters, state.dora, state.tokens)
    recording = with_facts(session._recording, is_cpu=is_cpu)
    return TextGenerator(recording, session.model, session.tokenizer, {"tuned": adapter})


def test_token_by_token(name: str, session: Callable[[], TrainingSession]) -> None:
    """By the kernels with the lanes and stretches that a GPU gets."""
    check_token_by_token(name, session(), adapted=True, is_cpu=False)


@pytest.mark.parametrize("plain", ["llama_odd", "qwen3", "gemma2_q8_0", "gemma3", "phi3_long"])
def test_without_an_adapter_on_a_cpu(plain: str, tmp_path: Path) -> None:
    TINY_MODELS[plain].write_gguf(tmp_path / "model.gguf")
    TINY_MODELS[plain].write_adapter(tmp_path / "adapter")
    opened = open_session(TINY_MODELS[plain], tmp_path / "model.gguf", tmp_path / "adapter")
    check_token_by_token(plain, opened, adapted=False, is_cpu=True)


def check_token_by_token(
    name: str, opened: TrainingSession, *, adapted: bool, is_cpu: bool
) -> None:
    """40 given tokens, beyond every window and past LongRoPE's change of divisors."""
    judge = FullRerun(opened)
    ids = TINY_MODELS[name].token_rows()[0]
    adapter = "tuned" if adapted else None
    with generator_of(opened, is_cpu=is_cpu) as generator:
        for n in range(PREFILLED, len(ids) + 1):
            ours = generator.next_logits(ids[:n], adapter=adapter)
            if n % 3 and n != 17:  # LongRoPE's long divisors begin with 17 tokens here
                continue
            expected = judge.next_logits(ids[:n], adapted=adapted)
            # Both are f32 sums of the same terms in another order; each is up to 5e-5 from the
            # exact logits of up to 20 (tests/forward/model/test_families.py).
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)
        # All at once, as a text that begins: on a GPU by the attention of training.
        generator.forget()
        ours = generator.next_logits(ids, adapter=adapter)
        expected = judge.next_logits(ids, adapted=adapted)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_cpu", [True, False])
def test_token_by_token_under_dora(tmp_path: Path, is_cpu: bool) -> None:
    """By the walk of many rows: what scales columns stands between products."""
    model = TINY_MODELS["llama_bias"]
    model.write_gguf(tmp_path / "model.gguf")
    values = {
        "model": {"path": str(tmp_path / "model.gguf")},
        "adapter": {"rank": 4, "variant": "dora", "peft_layers": "model.layers"},
        "data": {"train": "none", "max_length": 64},
        "train": {"steps": 1, "tuning": "off"},
        "output": "none",
    }
    rows = [np.array(row, np.int32) for row in model.token_rows()]
    examples = [Example(row, np.arange(len(row)) > 0, i) for i, row in enumerate(rows)]
    with TrainingSession(Config.model_validate(values), examples=examples) as opened:
        flat = opened.parameters()
        rng = np.random.default_rng(0)
        begun = opened.layout.magnitudes(flat)
        modules = opened.layout.to_modules(flat)
        for _, b in modules.values():
            b[:] = rng.normal(size=b.shape) * 0.2
        flat = opened.layout.from_modules(modules)
        turned = {path: m * rng.uniform(0.7, 1.4, m.shape) for path, m in begun.items()}
        opened.layout.set_magnitudes(flat, {p: m.astype(np.float32) for p, m in turned.items()})
        opened.memory.write(opened.adapter.parameters, flat)
        losses = opened.evaluate(examples).loss, opened.evaluate(examples, adapted=False).loss
        assert abs(losses[0] - losses[1]) > 0.05
        check_token_by_token("llama_bias", opened, adapted=True, is_cpu=is_cpu)
        # And from files, by those who only read them.
        opened.save(tmp_path / "saved")
        ids = model.token_rows()[0]
        expected = FullRerun(opened).next_logits(ids, adapted=True)
        with open_generator(
            str(tmp_path / "model.gguf"), {"tuned": tmp_path / "saved"}, device=opened.device,
            max_length=64,
        ) as generator:  # fmt: skip
            found = generator.next_logits(ids, adapter="tuned")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "is_cpu"), [("llama_odd", True), ("gemma2_q8_0", False)])
def test_token_by_token_with_an_adapted_embedding(tmp_path: Path, name: str, is_cpu: bool) -> None:
    """What is looked up alone: a head that is the embedding stays the base's."""
    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    ids = model.token_rows()[0]
    values = {
        "model": {"path": str(tmp_path / "model.gguf")},
        "adapter": {"rank": 3, "targets": ["embed_tokens"]},
        "data": {"train": "none", "max_length": 64},
        "train": {"steps": 1, "tuning": "off"},
        "output": "none",
    }
    examples = [Example(np.array(ids, np.int32), np.arange(len(ids)) > 0, 0)]
    with TrainingSession(Config.model_validate(values), examples=examples) as opened:
        bare = opened.evaluate(examples, adapted=False).loss
        assert opened.evaluate(examples).loss == pytest.approx(bare, rel=1e-6)  # as it begins
        modules = opened.layout.to_modules(opened.parameters())
        ((a, _),) = modules.values()
        a[:] = np.random.default_rng(0).normal(size=a.shape) * 0.3
        opened.set_parameters(opened.layout.from_modules(modules))
        assert abs(opened.evaluate(examples).loss - bare) > 0.01
        assert opened.evaluate(examples, adapted=False).loss == bare
        check_token_by_token(name, opened, adapted=True, is_cpu=is_cpu)


@pytest.mark.parametrize(
    ("name", "is_cpu"), [("llama_head", False), ("gemma2_q8_0", False), ("gemma2_q8_0", True)]
)
def test_token_by_token_with_trained_rows(tmp_path: Path, name: str, is_cpu: bool) -> None:
    """Of the embedding alone; of a head that is the embedding, too, capped, and adapted."""
    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    ids = model.token_rows()[0]
    values = {
        "model": {"path": str(tmp_path / "model.gguf")},
        "adapter": {
            "rank": 4,
            "layers": [1],
            "targets": ["q_proj", "lm_head"],
            "trainable_tokens": [ids[0], 319, ids[9]],
        },
        "data": {"train": "none", "max_length": 64},
        "train": {"steps": 1, "tuning": "off"},
        "output": "none",
    }
    examples = [Example(np.array(ids, np.int32), np.arange(len(ids)) > 0, 0)]
    if name == "llama_head":  # whose vocabulary is odd
        values["adapter"]["trainable_tokens"][1] = 316
    with TrainingSession(Config.model_validate(values), examples=examples) as opened:
        bare = opened.evaluate(examples, adapted=False).loss
        flat = opened.parameters()
        assert opened.evaluate(examples).loss == pytest.approx(bare, rel=1e-6)  # as it begins
        modules = opened.layout.to_modules(flat)
        own = opened.layout.trained_tokens(flat)
        for _, b in modules.values():
            b[:] = np.random.default_rng(1).normal(size=b.shape) * 0.2
        flat = opened.layout.from_modules(modules)
        rows = opened.layout.trained_tokens(flat)
        rows[:] = own
        rows += 3 * np.random.default_rng(0).normal(size=rows.shape) * rows.std()
        opened.set_parameters(flat)
        assert abs(opened.evaluate(examples).loss - bare) > 0.01
        assert opened.evaluate(examples, adapted=False).loss == bare
        check_token_by_token(name, opened, adapted=True, is_cpu=is_cpu)
        check_token_by_token(name, opened, adapted=False, is_cpu=is_cpu)
        opened.save(tmp_path / "saved")
        expected = FullRerun(opened).next_logits(ids, adapted=True)
        with open_generator(
            str(tmp_path / "model.gguf"), {"tuned": tmp_path / "saved"}, device=opened.device,
            max_length=64,
        ) as generator:  # fmt: skip
            found = generator.next_logits(ids, adapter="tuned")
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"rank": 3, "targets": ["q_proj", "down_proj", "lm_head"]},
    "b": {"rank": 6, "layers": [1]},
}


def config_of(folder: Path, adapter: str) -> Config:
    return Config.model_validate(
        {
            "model": {"path": str(folder / "model.gguf")},
            "adapter": ADAPTERS[adapter],
            "data": {"train": "none", "max_length": 120},
            "output": "none",
        }
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and two adapters of other ranks, targets and layers."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_llama(folder / "model.gguf", n_layers=2, types=TYPES, vocab_size=321)
    for name in ADAPTERS:
        session = TrainingSession(config_of(folder, name), train=False)
        rng = np.random.default_rng(ord(name))
        modules = {
            path: (a, rng.normal(0, 0.3, b.shape).astype(np.float32))
            for path, (a, b) in session.layout.to_modules(session.parameters()).items()
        }
        flat = session.layout.from_modules(modules)
        session.device.memory.write(session.adapter.parameters, flat)
        session.save(folder / name)
    return folder


@pytest.fixture(scope="module")
def generator(tiny: Path, device: Device) -> TextGenerator:
    adapters = {name: tiny / name for name in "ab"}
    return open_generator(str(tiny / "model.gguf"), adapters, max_length=120, device=device)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    """100 tokens: on the CPU, a prompt of two pieces."""
    return np.random.default_rng(0).integers(3, 300, 100).tolist()


def test_adapters_of_other_ranks_side_by_side(
    tiny: Path, generator: TextGenerator, ids: list[int]
) -> None:
    """Each against a session of its own; going back and forth leaves nothing behind."""
    expected = {}
    for name in "ab":
        session = TrainingSession(config_of(tiny, name), train=False)
        session.load_adapter(tiny / name)
        judge = FullRerun(session)
        expected[name] = judge.next_logits(ids, adapted=True)
        expected[None] = judge.next_logits(ids, adapted=False)
    assert abs(expected["a"] - expected["b"]).max() > 0.1
    for name in ("a", None, "b", "a"):
        ours = generator.next_logits(ids, adapter=name)
        np.testing.assert_allclose(ours, expected[name], rtol=0, atol=1e-4)


Q4_0 = {"weight": "Q4_0", "norm.weight": "F32"}
GATE_AND_UP_DIFFER = {"ffn_up.weight": "Q8_0"}
# Whole numbers for gate, up and down only: of the two parts of qkv one takes none.
MIXED = {**Q4_0, "attn_v.weight": "F16", "ffn_down.weight": "Q5_0", "attn_output.weight": "F16"}


@pytest.mark.parametrize(
    ("types", "head_size", "first", "dispatches"),
    # A head that is no whole block of numbers: a dispatch of its own makes them.
    [(Q4_0, 32, 1, 6), (Q4_0, 16, 1, 7), (GATE_AND_UP_DIFFER, 32, 0, 8), (MIXED, 32, 0, 8)],
    ids=["one type", "small heads", "gate and up differ", "mixed"],
)
def test_the_dispatches_of_a_gpu(
    tmp_path: Path,
    device: Device,
    types: dict[str, str],
    head_size: int,
    first: int,
    dispatches: int,
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Norms and activations inside the products, against those of a CPU device.

    Args:
        first: dispatches between the embedding and the first layer.
        dispatches: of a layer.
    """
    n_layers = 3
    write_tiny_llama(
        tmp_path / "model.gguf", n_layers=n_layers, types=types, head_size=head_size,
        hidden_size=64, intermediate_size=256,
    )  # fmt: skip
    found = []
    facts = device.facts
    for is_cpu in (True, False):
        monkeypatch.setattr(device, "facts", replace(facts, is_cpu=is_cpu))
        with open_generator(str(tmp_path / "model.gguf"), device=device) as generator:
            generator.next_logits(ids[:70])
            found.append(generator.next_logits(ids[:71]))
            engine = generator._engine
            layers, head = engine._programs_of(None, engine._tensors.step)
    # As in test_token_by_token.
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-4)
    # Those of a GPU: the embedding and the layers; the logits and the most likely token.
    assert len(layers.commands) == 1 + first + dispatches * n_layers
    assert len(head.commands) == 2


def test_two_greedy_texts_in_turn(tiny: Path, ids: list[int]) -> None:
    """Each as it is alone, though the device goes on with one before the other is asked for."""
    device = Device()
    device.facts = replace(device.facts, is_cpu=False)  # steps ahead are a GPU's
    adapters = {name: tiny / name for name in "ab"}
    generator = open_generator(str(tiny / "model.gguf"), adapters, max_length=120, device=device)
    texts = {"a": ids[:9], "b": ids[:30], None: ids[20:41]}
    alone = {
        adapter: list(generator.stream_ids(text, max_tokens=7, adapter=adapter))
        for adapter, text in texts.items()
    }
    streams = {
        adapter: generator.stream_ids(text, max_tokens=7, adapter=adapter)
        for adapter, text in texts.items()
    }
    found: dict[str | None, list[int]] = {adapter: [] for adapter in texts}
    for _ in range(7):
        for adapter, stream in streams.items():
            found[adapter].append(next(stream))
    assert found == alone
    stream = generator.stream_ids(texts["a"], max_tokens=7, adapter="a")
    first = [next(stream), next(stream)]
    generator.forget()  # as after a step of training
    assert first + list(stream) == alone["a"]


def test_only_what_is_new_is_computed(generator: TextGenerator, ids: list[int]) -> None:
    """A text that goes on, one that turns off, and one that is a part of the last."""
    other = [*ids[:40], *reversed(ids[40:90])]
    fresh = []
    for text in (ids[:50], ids[:90], other, other[:45], ids):
        generator.forget()
        fresh.append(generator.next_logits(text, adapter="a"))
    generator.forget()
    for text, expected, reused in zip(
        (ids[:50], ids[:90], other, other[:45], ids), fresh, (0, 50, 40, 44, 40), strict=True
    ):
        assert generator._reusable(text, "a") == reused
        # Prompts of other lengths are cut into other pieces: f32 sums in another order.
        ours = generator.next_logits(text, adapter="a")
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_greedy_and_its_argmax_on_the_device(generator: TextGenerator, ids: list[int]) -> None:
    prompt = ids[:20]
    new = list(generator.stream_ids(prompt, max_tokens=12, adapter="b"))
    text = list(prompt)
    for _ in range(12):
        text.append(int(generator.next_logits(text, adapter="b").argmax()))
    assert new == text[20:]
    # The same choice on the host, out of logits that were read back.
    sampled = Sampling(temperature=1.0, top_k=1)
    assert list(generator.stream_ids(prompt, max_tokens=12, adapter="b", sampling=sampled)) == new
    times = generator.times
    assert (times.reused_tokens, times.prompt_tokens, times.new_tokens) == (19, 1, 12)
    assert times.prompt_seconds > 0 and times.new_seconds > 0


def test_where_a_text_ends(generator: TextGenerator, ids: list[int]) -> None:
    new = list(generator.stream_ids(ids[:20], max_tokens=12))
    stop = new[5]
    assert (
        list(generator.stream_ids(ids[:20], max_tokens=12, stop_ids=frozenset([stop])))
        == (new[: new.index(stop)])
    )
    # The room: 120 tokens, of which the last is not run.
    assert len(list(generator.stream_ids(ids, max_tokens=99))) == 20
    for prompt in ([], [5] * 120):
        with pytest.raises(InputError, match=r"from 1 to 119 fit here"):
            next(generator.stream_ids(prompt, max_tokens=1))
    with pytest.raises(InputError, match="no adapter 'c'; loaded: a, b"):
        next(generator.stream_ids(ids, max_tokens=1, adapter="c"))
    with pytest.raises(InputError, match="token id 321, but the vocabulary of the model has 321"):
        generator.next_logits([5, 321])


def test_seeds(generator: TextGenerator, ids: list[int]) -> None:
    def draw(seed: int) -> list[int]:
        sampling = Sampling(temperature=1.5, top_p=0.95, seed=seed)
        return list(generator.stream_ids(ids[:10], max_tokens=10, sampling=sampling))

    assert draw(1) == draw(1) != draw(2)


def test_one_sampler_for_several_texts(generator: TextGenerator, ids: list[int]) -> None:
    """It goes on with its draws, and the same seed gives all of them again."""

    def draw() -> list[list[int]]:
        sampler = Sampler(Sampling(temperature=1.5, seed=1))
        return [
            list(generator.stream_ids(ids[:10], max_tokens=10, sampling=sampler)) for _ in range(2)
        ]

    first, second = draw()
    assert first != second
    assert draw() == [first, second]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=1)])
@pytest.mark.parametrize("is_cpu", [True, False], ids=["cpu", "gpu"])
def test_stopping(
    tiny: Path,
    ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
    sampling: Sampling,
    is_cpu: bool,
) -> None:
    """Between pieces of the prompt and after every token; what is held then is what was computed.

    "gpu": where greedy tokens are computed ahead.
    """
    monkeypatch.setattr("lora.generation.engine._CPU_PIECE_ROWS", 16)
    monkeypatch.setattr("lora.generation.engine._PIECE_ROWS", 16)
    device = Device()
    device.facts = replace(device.facts, is_cpu=is_cpu)
    generator = open_generator(str(tiny / "model.gguf"), max_length=120, device=device)

    def generate(asked: int) -> list[int]:
        """Ten tokens, unless `stopped` says so when asked that many times."""
        left = [asked]

        def stopped() -> bool:
            left[0] -= 1
            return left[0] == 0

        new = generator.stream_ids(ids, max_tokens=10, sampling=sampling, stopped=stopped)
        return list(new)

    expected = list(generator.stream_ids(ids, max_tokens=10, sampling=sampling))
    assert len(expected) == 10
    for n_pieces in (1, 2, 5):  # of the seven of the prompt
        generator.forget()
        assert generate(n_pieces) == []
        assert generator._held == ids[: 16 * n_pieces]
        times = generator.times
        assert (times.prompt_tokens, times.new_tokens) == (16 * n_pieces, 0)
        assert times.prompt_seconds > 0 and not times.ended
        # It goes on from there, and nothing is left of the stopped text.
        assert generate(99) == expected
        assert generator.times.reused_tokens == 16 * n_pieces
    generator.forget()
    assert generate(6 + 4) == expected[:4]  # six times in the prompt
    assert generator._held[:103] == [*ids, *expected[:3]]
    # Once in the prompt now, whose last token alone is computed again: never between pieces.
    assert generate(2) == expected[:2]
    assert generate(99) == expected


class _ByteTokenizer:
    """One token a byte; like SentencePiece, a leading space of a whole text is taken off."""

    end_of_turn_ids = frozenset([0])

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace").removeprefix(" ")


@pytest.mark.parametrize("answer", [" héllo 🙂 end", "a\ufffd b", "🙂"])
def test_streamed_text_joins_on(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    """Characters of several tokens come whole; the space before the first word stays."""
    tokens = list(answer.encode())
    monkeypatch.setattr(generator, "tokenizer", _ByteTokenizer())
    monkeypatch.setattr(generator, "stream_ids", lambda *_, **__: iter(tokens))
    pieces = list(generator.stream(list(b"Say"), max_tokens=99))
    assert "".join(pieces) == answer
    assert len(pieces) == len(answer) - answer.count("\ufffd")  # held back, then with the next


def test_bytes_that_are_no_text_are_shown_in_the_end(
    generator: TextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator, "tokenizer", _ByteTokenizer())
    for tokens in ([0xF0, 0x9F], [0x80] * 9):
        monkeypatch.setattr(generator, "stream_ids", lambda *_, t=tokens, **__: iter(t))
        text = "".join(generator.stream(list(b"Say"), max_tokens=99))
        assert text == bytes(tokens).decode(errors="replace")


def test_a_room_beyond_the_models_context(tiny: Path, device: Device) -> None:
    path = str(tiny / "model.gguf")
    with pytest.raises(InputError, match=r"max_length is 129, but .* up to 128 tokens"):
        open_generator(path, max_length=129, device=device)
    assert open_generator(path, max_length=128, device=device).room == 128


@pytest.mark.parametrize("missing", ["weights", "key-value cache"])
def test_no_memory(tiny: Path, missing: str) -> None:
    """The model itself does not fit, or the keys and values after it: all figures are told."""
    path, device = str(tiny / "model.gguf"), Device()
    generator = open_generator(path, device=device)
    by_purpose, total = dict(device.allocated), sum(device.allocated.values())
    generator.close()
    assert device.allocated == {}
    small = Device()
    most = by_purpose["weights"] - 1 if missing == "weights" else total - 1
    small.facts = replace(small.facts, memory_limit=most)
    with pytest.raises(InputError, match="does not fit: .* has .* MiB of memory") as raised:
        open_generator(path, device=small)
    assert small.allocated == {}  # what was taken before is given back
    said = str(raised.value)
    assert said.startswith("Text of up to 128 tokens" if missing != "weights" else path)
    assert f"takes {total / 2**20:,.0f} MiB (" in said
    for purpose, n_bytes in by_purpose.items():
        assert f"{purpose} {n_bytes / 2**20:,.0f}" in said
    assert "--max-length" in said


def test_adapters_that_do_not_fit(tiny: Path, tmp_path: Path, device: Device) -> None:
    write_tiny_llama(tmp_path / "one.gguf", n_layers=1)
    with pytest.raises(InputError, match="adapts layer 1, but the model has 1 layers"):
        open_generator(str(tmp_path / "one.gguf"), {"b": tiny / "b"}, device=device)
    separate = Architecture.from_gguf(GGUFFile(tmp_path / "one.gguf"))
    mixer = replace(separate.layers[0].mixer, fused_modules=True)
    fused = replace(separate, layers=(replace(separate.layers[0], mixer=mixer),))
    with pytest.raises(InputError, match=r"adapts .*q_proj.*does not have; it has qkv_proj"):
        upload_adapter(device.recording(), fused, tiny / "b")
