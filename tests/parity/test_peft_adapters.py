"""Adapters that PEFT itself makes and saves: ranks and alphas of single matrices, DoRA.

PEFT with the tiny transformers model is the judge of what our session, our generator and our
exports make of the directory.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lora.adapters.files import open_adapter, with_adapter
from lora.config.schema import Config
from lora.data.examples import Example
from lora.export.to_gguf import export
from lora.forward.gguf.file import GGUFFile
from lora.forward.model.architecture import Architecture
from lora.generation.opening import open_generator
from lora.shaders.errors import InputError
from lora.training.session import TrainingSession
from tests.support.llama_cpp_logits import LlamaCpp
from tests.support.tiny_model import TinyModel
from tests.support.tiny_models import TINY_MODELS

pytestmark = pytest.mark.parity

# f32 sums in another order, on logits that spread by about 3 (as in test_architectures.py).
TOLERANCE = 2e-4
LENGTHS = (1, 7, 25, 40)  # prefixes of the first row: shorter and longer than windows


class Made:
    """A tiny model's GGUF, an adapter that PEFT made for it and saved, and PEFT's logits."""

    def __init__(self, model: TinyModel, folder: Path, **options: Any) -> None:
        import torch
        from peft import LoraConfig, get_peft_model

        from tests.support.tiny_judge import build, logits

        self.base, self.adapter = folder / "base.gguf", folder / "adapter"
        model.write_gguf(self.base)
        self.row = model.token_rows()[0]
        targets = [name for name in model.targets if name != "lm_head"]
        torch.manual_seed(1)
        settings = LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, **options
        )
        self.net = get_peft_model(build(model), settings).eval()
        with torch.no_grad():
            for name, parameter in self.net.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(0, 0.3)
                elif "lora_magnitude_vector" in name:
                    parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
        self.net.save_pretrained(self.adapter)
        self.logits = logits(self.net, [self.row])
        with self.net.disable_adapter():
            self.bare = logits(self.net, [self.row])

    def check(self, ours: Any, what: str, adapter: str | None) -> None:
        """Our generator's logits after each prefix against PEFT's."""
        for length in LENGTHS:
            found = ours.next_logits(self.row[:length], adapter=adapter)
            error = np.abs(found - self.logits[length - 1]).max()
            print(f"{what}, {length} tokens: logits differ by at most {error:.1e}")
            assert error < TOLERANCE
        assert np.abs(self.logits - self.bare).max() > 0.5

    def check_llama_cpp(self, theirs: LlamaCpp, tolerance: float) -> None:
        """llama.cpp's log-probabilities after each prefix against PEFT's."""
        from tests.support.tiny_judge import log_softmax

        expected = log_softmax(self.logits)
        answers = theirs.log_probabilities([self.row[:n] for n in LENGTHS], expected.shape[1])
        for length, (tokens, values) in zip(LENGTHS, answers, strict=True):
            error = np.abs(values - expected[length - 1][tokens]).max()
            print(f"llama.cpp, {length} tokens: log-probabilities differ by at most {error:.1e}")
            assert error < tolerance


PATTERNS = {
    "rank_pattern": {"q_proj": 6, r"layers\.1\.self_attn\.o_proj": 2, "qkv_proj": 7},
    "alpha_pattern": {"down_proj": 3, "model.layers.0.self_attn.q_proj": 20, "qkv_proj": 5},
}


@pytest.mark.parametrize("stabilized", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("name", ["llama_odd", "qwen3", "gemma3", "phi3"])
def test_ranks_and_alphas_of_single_matrices(name: str, stabilized: bool, tmp_path: Path) -> None:
    made = Made(TINY_MODELS[name], tmp_path, use_rslora=stabilized, **PATTERNS)
    exported = export(made.adapter, "gguf", base=str(made.base)).path
    saved = open_adapter(made.adapter, Architecture.from_gguf(GGUFFile(made.base)))
    assert saved.rank == (7 if name == "phi3" else 6)
    ours = open_generator(
        str(made.base), {"directory": made.adapter, "gguf": exported}, max_length=64
    )
    made.check(ours, "PEFT directory", "directory")
    made.check(ours, "exported GGUF", "gguf")
    tolerance = 2e-2 if name == "gemma3" else TOLERANCE  # see test_export.py on Gemma's GELU
    made.check_llama_cpp(LlamaCpp(made.base, exported), tolerance)


def test_padding_stays_zero_in_training(tmp_path: Path) -> None:
    """A session that begins from an adapter of several ranks, and what PEFT makes of its end."""
    import torch
    from peft import PeftModel

    from tests.support.tiny_judge import build, logits
    from tests.support.tiny_ours import logits as our_logits

    model = TINY_MODELS["llama"]
    made = Made(model, tmp_path, **PATTERNS)
    row = np.array(made.row, np.int32)
    config = Config.model_validate(
        {
            "model": {"path": str(made.base)},
            "data": {"train": "none", "max_length": len(row)},
            "train": {"steps": 3, "batch_size": 1, "learning_rate": 0.01, "weight_decay": 0.1},
            "output": "none",
        }
    )
    session = TrainingSession(
        with_adapter(config, made.adapter), examples=[Example(row, np.arange(len(row)) > 0, 0)]
    )
    before = session.layout.to_modules(session.parameters())
    assert len(list(session.train())) == 3
    after = session.layout.to_modules(session.parameters())
    for path, (a, b) in after.items():
        rank = 6 if "q_proj" in path else 2 if path.endswith("1.self_attn.o_proj") else 4
        assert not a[rank:].any() and not b[:, rank:].any()
        for first, last in zip(before[path], (a, b), strict=True):
            assert (first != last).sum() > 0.9 * (first != 0).sum()
    session.save(tmp_path / "trained")
    with torch.no_grad():
        net = PeftModel.from_pretrained(build(model), tmp_path / "trained").eval()
        expected = logits(net, [made.row])
    np.testing.assert_allclose(our_logits(session, adapted=True), expected, atol=TOLERANCE)
    assert np.abs(expected - made.logits).max() > 0.1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("qwen2", PATTERNS),
        ("gemma2", {}),
        ("phi3", {"use_rslora": True}),
    ],
)
def test_dora_is_merged(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = TINY_MODELS[name]
    made = Made(model, tmp_path, use_dora=True, **options)
    done = export(made.adapter, "merged-gguf", base=str(made.base))
    assert done.n_tensors == len([name for name in done.merged if name.change > 0.1]) > 0
    made.check(open_generator(str(done.path), max_length=64), "merged", None)
    tolerance = 2e-2 if name == "gemma2" else TOLERANCE  # see test_export.py on Gemma's GELU
    made.check_llama_cpp(LlamaCpp(done.path), tolerance)
    # Tensor by tensor: what merge_and_unload gives, written as the tiny model's GGUF is.
    merged = made.net.merge_and_unload().state_dict()
    before, after = GGUFFile(made.base), GGUFFile(done.path)
    name_of = "blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight"
    found = np.ascontiguousarray(after.tensors[name_of[0]].data).view(np.float32)
    np.testing.assert_allclose(found, merged[name_of[1]].numpy(), atol=1e-5)
    assert (found != np.ascontiguousarray(before.tensors[name_of[0]].data).view(np.float32)).any()


@pytest.mark.parametrize(("name", "options"), [("qwen2", PATTERNS), ("gemma2", {})])
def test_dora_runs_beside_its_base(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    """As PEFT runs it; a GGUF adapter can't hold it, and that is said with the way out."""
    made = Made(TINY_MODELS[name], tmp_path, use_dora=True, **options)
    assert json.loads((made.adapter / "adapter_config.json").read_text())["use_dora"] is True
    with open_generator(str(made.base), {"own": made.adapter}, max_length=64) as ours:
        made.check(ours, "PEFT directory", "own")
    with pytest.raises(InputError, match="lora export .*adapter --to merged-gguf"):
        export(made.adapter, "gguf", base=str(made.base))
