"""Adapters in transformers' classes for text and images, which some checkpoints open as."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.config.schema import Config
from lora.training.session import TrainingSession
from tests.support.tiny_model import TinyModel
from tests.support.tiny_models import TINY_MODELS
from tests.support.tiny_ours import open_session

pytestmark = pytest.mark.parity


def build_whole(model: TinyModel) -> Any:
    """The class for images, too, with the tiny model's weights in its language model."""
    import torch
    import transformers

    from tests.support.tiny_judge import build

    text = build(model)
    if model.family == "gemma4_text":
        config = transformers.Gemma4Config(
            text_config=copy.deepcopy(text.config), vision_config=None, audio_config=None
        )
        whole: Any = transformers.Gemma4ForConditionalGeneration(config)
    else:
        vision = transformers.PixtralVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            head_dim=16, image_size=28, patch_size=14,
        )  # fmt: skip
        config = transformers.Mistral3Config(
            text_config=copy.deepcopy(text.config), vision_config=vision,
            tie_word_embeddings=text.config.tie_word_embeddings,
        )  # fmt: skip
        whole = transformers.Mistral3ForConditionalGeneration(config)
    whole = whole.float().eval()
    state = {
        name.replace("model.", "model.language_model.", 1): value
        for name, value in text.state_dict().items()
    }
    missing, unexpected = whole.load_state_dict(state, strict=False)
    assert not unexpected
    assert not any("language_model" in name for name in missing)
    assert isinstance(whole, torch.nn.Module)
    return whole


@pytest.mark.parametrize("name", ["gemma4_e2b", "mistral3"])
def test_peft_finds_the_layers(name: str, tmp_path: Path) -> None:
    """What we save by default changes the class for images, too, as it changes ours."""
    from peft import PeftModel

    from tests.support.tiny_judge import judge, logits

    model = TINY_MODELS[name]
    model.write_gguf(tmp_path / "model.gguf")
    model.write_adapter(tmp_path / "adapter")
    opened = open_session(model, tmp_path / "model.gguf", tmp_path / "adapter")
    settings = opened.config.model_dump()
    settings["adapter"]["peft_layers"] = "auto"
    with TrainingSession(Config.model_validate(settings), train=False, examples=[]) as session:
        session.load_adapter(tmp_path / "adapter")
        session.save(tmp_path / "saved")
        session.load_adapter(tmp_path / "saved")  # and we read it back
    net = PeftModel.from_pretrained(build_whole(model), tmp_path / "saved")
    found = logits(net, model.token_rows())
    expected = judge(model, tmp_path / "adapter").adapted_logits
    assert np.abs(found - expected).max() < 1e-4
