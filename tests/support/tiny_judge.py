"""The judges of the tiny models: transformers and PEFT, transformers' GGUF loader, llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
import xllamacpp
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from tests.support.tiny_model import TinyModel

torch.set_num_threads(1)

_CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
    "gemma4_text": ("Gemma4TextConfig", "Gemma4ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "granite": ("GraniteConfig", "GraniteForCausalLM"),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM"),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM"),
    "glm4": ("Glm4Config", "Glm4ForCausalLM"),
    "ministral3": ("Ministral3Config", "Ministral3ForCausalLM"),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM"),
    "seed_oss": ("SeedOssConfig", "SeedOssForCausalLM"),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM"),
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "lfm2": ("Lfm2Config", "Lfm2ForCausalLM"),
    "hunyuan_v1_dense": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM"),
}

# Config fields that transformers reads out of a GGUF of each family. It reads no rope scaling, soft
# caps, biases or query_pre_attn_scalar, no window but Gemma's and no head size of qwen3 (its
# default is 128): llama.cpp is the judge of those keys.
_FIELDS_READ = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "vocab_size",
    "tie_word_embeddings",
)


# Some printable token. llama.cpp's server gives no probabilities beside an empty text, and it is
# empty after the end token or half a character; so it is made to choose this one. The
# probabilities are those before the bias.
_LETTER = 40


@dataclass(frozen=True)
class Judgement:
    """What transformers and PEFT give for all sequences of a tiny model."""

    logits: np.ndarray  # [tokens of all sequences, vocab_size], of the bare model
    adapted_logits: np.ndarray  # the same under the adapter
    loss: float  # under the adapter, mean over all shifted tokens
    gradients: dict[str, np.ndarray]  # of that loss, by PEFT's tensor names


def judge(model: TinyModel, adapter: Path) -> Judgement:
    """Runs a tiny model and its PEFT adapter directory in float32 with eager attention."""
    net = build(model)
    rows = model.token_rows()
    bare = logits(net, rows)
    net = PeftModel.from_pretrained(net, adapter, is_trainable=True)
    adapted = logits(net, rows)
    n_targets = sum(len(row) - 1 for row in rows)
    loss = 0.0
    for row in rows:
        ids = torch.tensor([row])
        part = net(input_ids=ids, labels=ids).loss * ((len(row) - 1) / n_targets)
        part.backward()
        loss += float(part.detach())
    gradients = {
        name.replace(".default", ""): parameter.grad.numpy().copy()
        for name, parameter in net.named_parameters()
        if parameter.requires_grad
    }
    return Judgement(bare, adapted, loss, gradients)


def build(model: TinyModel) -> Any:
    """The transformers model with the tiny model's weights."""
    config_class, model_class = (getattr(transformers, name) for name in _CLASSES[model.family])
    config = config_class(attn_implementation="eager", **model.config)
    net = model_class(config).float().eval()
    weights = {name: torch.from_numpy(values) for name, values in model.weights().items()}
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    net.load_state_dict(weights, strict=True)
    return net


def logits(net: Any, rows: list[list[int]]) -> np.ndarray:
    """Logits of all positions of all sequences, f32 [tokens, vocab_size].

    Those of the gated delta rule are computed in f64: in f32 transformers is itself up to 1.1e-4
    away from that, since what comes out of the rule in a sequence's first tokens is near zero and
    the norm of each head divides by it. It says torch.float32 in the rule, whatever the net is in.
    """
    if net.config.model_type != "qwen3_5_text":
        return _logits(net, rows)
    try:
        with mock.patch.object(torch, "float32", torch.float64):
            return _logits(net.double(), rows).astype(np.float32)
    finally:
        net.float()


def _logits(net: Any, rows: list[list[int]]) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate(
            [net(input_ids=torch.tensor([row])).logits[0].numpy() for row in rows]
        )


def logits_through_gguf(model: TinyModel, gguf_path: Path) -> np.ndarray:
    """The same with the weights as transformers reads them from the GGUF, under our config.

    The config comes from us because the loader drops parts of it; `check_metadata` compares what
    it does read.
    """
    net = AutoModelForCausalLM.from_pretrained(
        gguf_path.parent,
        gguf_file=gguf_path.name,
        config=build(_as_loaded(model)).config,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    return logits(net.eval(), model.token_rows())


def _as_loaded(model: TinyModel) -> TinyModel:
    """The family as which transformers can load a GGUF: Mistral is a Llama there.

    (With "mistral" in general.name it takes MistralConfig, and then finds no such architecture in
    gguf-py 0.19.) A Llama has no window.
    """
    return replace(model, family="llama") if model.family == "mistral" else model


def check_metadata(model: TinyModel, gguf_path: Path) -> None:
    """Asserts that transformers reads the model's sizes and rope bases from the GGUF."""
    read = AutoConfig.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    ours = build(_as_loaded(model)).config
    assert read.model_type == ours.model_type
    for name in _FIELDS_READ:
        expected = getattr(ours, name)
        if isinstance(expected, float):  # f32 in the file
            expected = float(np.float32(expected))
        assert getattr(read, name) == expected, name
    if model.family != "qwen3":
        assert getattr(read, "head_dim", model.head_dim) in (model.head_dim, None)
    if model.architecture.startswith("gemma"):
        assert read.sliding_window == ours.sliding_window
        assert read.layer_types == ours.layer_types
    theta = [_base(config.rope_parameters) for config in (read, ours)]
    assert theta[0] == theta[1]


def _base(rope: dict[str, Any]) -> float:
    return float(rope.get("full_attention", rope)["rope_theta"])


def llama_cpp_log_probabilities(
    model: TinyModel, gguf_path: Path, lengths: tuple[int, ...]
) -> np.ndarray:
    """llama.cpp's log-probabilities after prefixes of the first sequence, f32 [n, vocab_size].

    Its cache and its attention are kept in f32.
    """
    row, vocab_size = model.token_rows()[0], model.config["vocab_size"]
    rope = model.config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    settings = xllamacpp.CommonParams()
    settings.model.path = str(gguf_path)
    settings.n_ctx = 128
    settings.n_parallel = 1
    settings.warmup = False
    settings.verbosity = 0
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if "beta_slow" in rope:  # it leaves the file's keys for these unread
        settings.yarn_beta_fast = rope["beta_fast"]
        settings.yarn_beta_slow = rope["beta_slow"]
    server = xllamacpp.Server(settings)
    found = np.full((len(lengths), vocab_size), np.nan, np.float32)
    for index, length in enumerate(lengths):
        answer = server.handle_completions(
            {
                "prompt": row[:length],
                "n_predict": 1,
                "n_probs": vocab_size,
                "temperature": -1.0,  # greedy, with probabilities of the untouched logits
                "logit_bias": [[_LETTER, 1000.0]],
                "cache_prompt": False,
            }
        )
        for entry in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[index, entry["id"]] = entry["logprob"]
    return found


def log_softmax(values: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits [n, vocab_size], in float64."""
    shifted = values.astype(np.float64) - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
