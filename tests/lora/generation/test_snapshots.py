"""Texts of recurrent models: what is reused of the last one, and where a text may go back to."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lora.generation.generator import TextGenerator
from lora.generation.opening import open_generator
from lora.generation.sampling import GREEDY, Sampling
from lora.generation.snapshots import N_SNAPSHOTS, Snapshots
from lora.shaders.device import Device
from tests.support.tiny_models import TINY_MODELS

RECURRENT = ("lfm2", "qwen35")
IDS = np.random.default_rng(0).integers(3, 300, 100).tolist()


@pytest.fixture(scope="module", params=[(name, cpu) for name in RECURRENT for cpu in (True, False)],
                ids=lambda p: f"{p[0]} {'cpu' if p[1] else 'gpu'}")  # fmt: skip
def generator(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> TextGenerator:
    name, is_cpu = request.param
    folder = tmp_path_factory.mktemp("recurrent")
    model = TINY_MODELS[name]
    model.write_gguf(folder / "model.gguf")
    model.write_adapter(folder / "tuned")
    device = Device()
    device.facts = replace(device.facts, is_cpu=is_cpu)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora.generation.engine._CPU_PIECE_ROWS", 16)
        patch.setattr("lora.generation.engine._PIECE_ROWS", 16)
        path = str(folder / "model.gguf")
        return open_generator(path, {"tuned": folder / "tuned"}, max_length=120, device=device)


def test_texts_that_part_go_on_from_a_snapshot(generator: TextGenerator) -> None:
    other = [*IDS[:70], *reversed(IDS[70:90])]
    # A text, one that goes on, one that turns off, a part of it, the first again, and one that
    # parts before all snapshots.
    texts = (IDS[:50], IDS[:90], other, other[:45], IDS, [*IDS[:8], 5, 6, 7])
    fresh = []
    for text in texts:
        generator.forget()
        fresh.append(generator.next_logits(text, adapter="tuned"))
    generator.forget()
    # Pieces end at 16, 32, 48 and 50, then at 66, 82 and 90; four of these are kept.
    reused = (0, 50, 66, 0, 45, 0)
    for text, expected, n in zip(texts, fresh, reused, strict=True):
        assert generator._reusable(text, "tuned") == n
        ours = generator.next_logits(text, adapter="tuned")
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_another_adapter_begins_anew(generator: TextGenerator) -> None:
    found = {}
    for adapter in (None, "tuned"):
        generator.forget()
        found[adapter] = generator.next_logits(IDS[:20], adapter=adapter)
    assert np.abs(found[None] - found["tuned"]).max() > 0.1
    for adapter in ("tuned", None, "tuned"):
        again = generator.next_logits(IDS[:20], adapter=adapter)
        np.testing.assert_allclose(again, found[adapter], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, top_k=1)])
def test_a_chat_goes_on_after_its_answer(generator: TextGenerator, sampling: Sampling) -> None:
    """The answer's tokens are reused; and an answer taken back is computed from its question."""
    generator.forget()
    answer = list(generator.stream_ids(IDS[:30], max_tokens=9, sampling=sampling))
    longer = [*IDS[:30], *answer, *IDS[60:65]]
    assert generator._reusable(longer, None) == 38  # the last token of an answer is not run
    follow_up = list(generator.stream_ids(longer, max_tokens=5, sampling=sampling))
    again = [*IDS[:30], *answer[:4], *IDS[60:65]]  # a part of the answer was left out
    assert generator._reusable(again, None) == 30
    changed = list(generator.stream_ids(again, max_tokens=5, sampling=sampling))
    for text, expected in ((longer, follow_up), (again, changed)):
        generator.forget()
        found = list(generator.stream_ids(text, max_tokens=5, sampling=sampling))
        assert found == expected


def test_stopped_between_pieces(generator: TextGenerator) -> None:
    generator.forget()
    asked = iter([False, True])
    stopped = generator.stream_ids(IDS, max_tokens=3, stopped=lambda: next(asked))
    assert list(stopped) == []
    assert generator._reusable(IDS, None) == 32
    found = list(generator.stream_ids(IDS, max_tokens=3))
    generator.forget()
    assert list(generator.stream_ids(IDS, max_tokens=3)) == found


class Noted:
    """A store that notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []

    def keep_state(self, slot: int) -> None:
        self.calls.append(("keep", slot))

    def restore_state(self, slot: int) -> None:
        self.calls.append(("restore", slot))


def test_which_snapshots_are_kept() -> None:
    store = Noted()
    snapshots = Snapshots(store)
    assert snapshots.nearest(5, 9) == 0
    for position in (10, 20, 30, 40, 50):
        snapshots.keep(position)
    assert [slot for _, slot in store.calls] == [0, 1, 2, 3, 0] and N_SNAPSHOTS == 4
    assert snapshots.nearest(55, 55) == 55 and snapshots.nearest(54, 55) == 50
    assert snapshots.nearest(19, 55) == 0
    snapshots.go_back(30, 55)
    assert store.calls[-1] == ("restore", 2)
    assert snapshots.nearest(54, 55) == 30
    snapshots.keep(35)
    assert store.calls[-1] == ("keep", 0)
    snapshots.go_back(35, 35)
    assert store.calls[-1] == ("keep", 0)
    snapshots.forget()
    assert snapshots.nearest(54, 55) == 0


def test_a_model_without_states_goes_back_anywhere() -> None:
    snapshots = Snapshots(None)
    snapshots.keep(10)
    snapshots.go_back(3, 10)
    assert snapshots.nearest(7, 10) == 7
