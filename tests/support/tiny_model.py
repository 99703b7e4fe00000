"""A tiny random model of any supported architecture: Hugging Face's tensors, and the GGUF of them.

Everything here is numpy: the recorded comparison runs without torch. `tiny_judge.py` loads the
same tensors into transformers. The GGUF holds what llama.cpp's converter writes for the
architecture: its metadata keys and tensor names, the row order of q and k, Gemma's norms plus one,
rope factors.
"""

from __future__ import annotations

import itertools
import json
import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

from lora.forward.model.row_order import permute_rows_to_gguf
from tests.support.tiny_families import FAMILIES, layer_shapes, llama3_divisors, rope_of_family
from tests.support.tiny_gemma4 import gemma4_divisors, gemma4_metadata, gemma4_shapes
from tests.support.tiny_gguf import tiny_tokenizer_metadata, write_gguf
from tests.support.tiny_qwen35 import qwen35_in_gguf, qwen35_metadata
from tests.support.tiny_recurrent import lfm2_metadata

# Both exceed every window. Together 63 rows: with a target for each they fit one chunk of the head.
LENGTHS = (40, 23)

_FROZEN = ("model.embed_tokens", "model.per_layer_model_projection")  # never adapted
_GAIN = 1.3  # matrices make their output this much larger than their normed input
_EMBEDDING_STD = 0.4  # logits then spread by about 3
_NORM_STD = 0.3
_BIAS_STD = 0.5


@dataclass(frozen=True)
class TinyModel:
    """One random model, its adapter and its tokens; all of it follows from the fields.

    Attributes:
        name: of the test case.
        family: transformers' `model_type`.
        config: what its transformers config is given.
        extra_metadata: GGUF keys that llama.cpp's converter would not write, without prefix.
        matrix_type: how the GGUF stores matrices; the judge gets what that decodes to.
        rank, alpha: of the adapter.
        adapted_layers: None for all. Layers below the lowest are a fixed prefix on our side.
        adapted_head: whether lm_head is adapted, too.
        transformers_reads: whether transformers' loader knows the GGUF's architecture.
        llama_cpp: whether llama.cpp computes the same as transformers. With Q8_0 it doesn't: it
            quantizes activations too.
    """

    name: str
    family: str
    config: dict[str, Any]
    extra_metadata: dict[str, Any] = field(default_factory=dict)
    matrix_type: str = "F32"
    rank: int = 4
    alpha: int = 8
    adapted_layers: tuple[int, ...] | None = None
    adapted_head: bool = False
    transformers_reads: bool = True
    llama_cpp: bool = True

    @property
    def architecture(self) -> str:
        """The GGUF's `general.architecture`."""
        return FAMILIES[self.family].architecture or self.family

    @property
    def head_dim(self) -> int:
        """Numbers in a head."""
        default = self.config["hidden_size"] // self.config["num_attention_heads"]
        return int(self.config.get("head_dim", default))

    @property
    def rotary_dim(self) -> int:
        """Leading numbers of a head that rope turns."""
        rope = self.config["rope_parameters"]
        return int(self.head_dim * rope.get("partial_rotary_factor", 1.0))

    @property
    def layers(self) -> list[int]:
        """The adapted layers."""
        every = range(self.config["num_hidden_layers"])
        return list(every if self.adapted_layers is None else self.adapted_layers)

    @property
    def targets(self) -> list[str]:
        """PEFT's names of the adapted matrices."""
        return sorted({name.split(".")[-3] for name in self.adapter()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter of the Hugging Face model."""
        c = self.config
        hidden = c["hidden_size"]
        vocabulary = (c["vocab_size"], hidden)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocabulary}
        for layer in range(c["num_hidden_layers"]):
            of_layer = layer_shapes(self, layer)
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
        shapes[f"{FAMILIES[self.family].final_norm}.weight"] = (hidden,)
        if self.family == "gemma4_text":
            shapes |= gemma4_shapes(self)
        if not c["tie_word_embeddings"]:
            shapes["lm_head.weight"] = vocabulary
        return shapes

    def weights(self) -> dict[str, np.ndarray]:
        """Every parameter by its Hugging Face name, f32: what the GGUF's values decode to."""
        kind = gguf.GGMLQuantizationType[self.matrix_type]
        return {
            name: gguf.quants.dequantize(gguf.quants.quantize(values, kind), kind)
            if values.ndim == 2
            else values
            for name, values in self._exact_weights().items()
        }

    def _exact_weights(self) -> dict[str, np.ndarray]:
        weights = {}
        for name, shape in self.shapes().items():
            values = _normal((self.name, name), shape)
            if name.endswith(".bias") or name.endswith("A_log"):
                values *= _BIAS_STD
            elif self.family == "qwen3_5_text" and name.endswith("norm.weight") and len(shape) == 1:
                values = _NORM_STD * values + (".linear_attn." in name)
            elif len(shape) == 1:
                values = _NORM_STD * values + (
                    0.0 if FAMILIES[self.family].stored_less_one else 1.0
                )
            elif name.startswith("model.embed_tokens") or name == "lm_head.weight":
                values *= _EMBEDDING_STD
            else:
                values *= _GAIN / math.sqrt(shape[1])
            weights[name] = values.astype(np.float32)
        return weights

    def token_rows(self) -> list[list[int]]:
        """The token ids of each sequence, LENGTHS of them."""
        random = np.random.RandomState(_seed(self.name, "tokens"))
        vocab_size = self.config["vocab_size"]
        return [random.randint(3, vocab_size, length).tolist() for length in LENGTHS]

    def adapter(self) -> dict[str, np.ndarray]:
        """A and B of all matrices of the adapted layers by PEFT's names; B is far from zero."""
        tensors = {}
        shapes = self.shapes()
        if self.adapted_head:  # where it is tied, only the head's use of the weight is adapted
            shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        for name, shape in shapes.items():
            if len(shape) != 2 or name.startswith(_FROZEN):
                continue
            if name == "lm_head.weight":
                if not self.adapted_head:
                    continue
            elif int(name.split(".")[2]) not in self.layers:
                continue
            path = f"base_model.model.{name.removesuffix('.weight')}"
            a = _normal((self.name, name, "A"), (self.rank, shape[1])) / math.sqrt(shape[1])
            b = _normal((self.name, name, "B"), (shape[0], self.rank)) * 0.15
            tensors[f"{path}.lora_A.weight"] = a.astype(np.float32)
            tensors[f"{path}.lora_B.weight"] = b.astype(np.float32)
        return tensors

    def write_adapter(self, directory: Path) -> None:
        """Writes `adapter()` as a PEFT adapter directory."""
        tensors = self.adapter()
        directory.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.name,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": self.targets,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": False,
        }
        if self.adapted_layers and self.adapted_head:  # layers_to_transform drops the head
            paths = {name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in tensors}
            settings["target_modules"] = sorted(paths)
        elif self.adapted_layers:
            settings |= {"layers_to_transform": self.adapted_layers, "layers_pattern": "layers"}
        (directory / "adapter_config.json").write_text(json.dumps(settings))

    def write_gguf(
        self,
        path: Path,
        fused_layers: Collection[int] = (),
        *,
        more: Mapping[str, np.ndarray] | None = None,
        keys: Mapping[str, Any] | None = None,
        scales: Mapping[str, float] | None = None,
    ) -> None:
        """Writes the model as llama.cpp's converter would.

        Args:
            fused_layers: whose q, k and v are one tensor, as its --fuse-qkv makes them.
            more: tensors beside the model's.
            keys: metadata in place of the model's, without prefix.
            scales: of tensors, by the names of their scales: each tensor is divided by its own.
        """
        known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        if self.architecture not in known:
            raise ValueError(
                f"gguf-py knows no architecture {self.architecture!r}: where llama.cpp writes "
                f"{self.family!r} under another name, _GGUF_NAMES says which."
            )
        names = gguf.get_tensor_name_map(known[self.architecture], self.config["num_hidden_layers"])
        heads = {
            "q_proj": self.config["num_attention_heads"],
            "k_proj": self.config["num_key_value_heads"],
        }
        tensors: dict[str, np.ndarray] = {}
        for name, exact in self._exact_weights().items():
            module = name.split(".")[-2]
            values = exact
            if FAMILIES[self.family].permuted and module in heads:
                values = permute_rows_to_gguf(exact, heads[module])
            if FAMILIES[self.family].stored_less_one and name.endswith("norm.weight"):
                values = exact + np.float32(1.0)
            if values.ndim == 3:  # of a convolution of each column
                values = values[:, 0]
            if self.family == "qwen3_5_text":
                name, values = qwen35_in_gguf(self, name, values)
            if name.endswith("layer_scalar"):
                name += ".weight"
            gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if gguf_name is None or gguf_name in tensors:
                raise ValueError(f"gguf-py has no name of its own for {name}")
            tensors[gguf_name] = values
        for layer, kind in itertools.product(fused_layers, ("weight", "bias")):
            parts = [f"blk.{layer}.attn_{which}.{kind}" for which in "qkv"]
            if parts[0] in tensors:
                whole = np.concatenate([tensors.pop(part) for part in parts])
                tensors[f"blk.{layer}.attn_qkv.{kind}"] = whole
        for name, scale in (scales or {}).items():
            tensors[f"{name.removesuffix('scale')}weight"] /= np.float32(scale)
            tensors[name] = np.array([scale], np.float32)
        write_gguf(
            path,
            self._metadata()
            | {f"{self.architecture}.{key}": value for key, value in (keys or {}).items()},
            {**self._rope_tensors(), **tensors, **(more or {})},
            {".weight": self.matrix_type} if self.matrix_type != "F32" else {},
        )

    def _metadata(self) -> dict[str, Any]:
        c = self.config
        sizes: dict[str, Any] = {
            "block_count": c["num_hidden_layers"],
            "context_length": c["max_position_embeddings"],
            "embedding_length": c["hidden_size"],
            "feed_forward_length": c["intermediate_size"],
            "attention.head_count": c["num_attention_heads"],
            "attention.head_count_kv": c["num_key_value_heads"],
            "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        }
        if "head_dim" in c:
            sizes["attention.key_length"] = c["head_dim"]
            sizes["attention.value_length"] = c["head_dim"]
        if self.architecture == "llama":
            sizes["vocab_size"] = c["vocab_size"]
            sizes["rope.dimension_count"] = self.head_dim
        if "partial_rotary_factor" in c["rope_parameters"]:
            sizes["rope.dimension_count"] = self.rotary_dim
        if self.family == "phi3":
            sizes["rope.dimension_count"] = self.rotary_dim
            sizes["attention.sliding_window"] = c["sliding_window"] or 0
        for name, key in FAMILIES[self.family].keys.items():
            if c.get(name) is not None:
                sizes[key] = c[name]
        sizes |= self._rope_metadata() | self.extra_metadata
        if self.family == "gemma4_text":
            sizes |= gemma4_metadata(self)
        if self.family == "qwen3_5_text":
            sizes |= qwen35_metadata(self)
        if self.family == "lfm2":
            sizes |= lfm2_metadata(self)
        return {
            "general.architecture": self.architecture,
            "general.type": "model",
            "general.name": "tiny",  # with "phi3" in it, llama.cpp expects Phi's special tokens
            "general.file_type": {"F32": 0, "Q8_0": 7}[self.matrix_type],
            **{f"{self.architecture}.{key}": value for key, value in sizes.items()},
            **tiny_tokenizer_metadata(c["vocab_size"]),
        }

    def _rope_metadata(self) -> dict[str, Any]:
        rope, keys = rope_of_family(self)
        if self.family == "gemma2":
            return keys  # the converter writes none; the base is always 10000
        keys["rope.freq_base"] = rope["rope_theta"]
        if self.family == "phi3":
            keys["rope.scaling.original_context_length"] = self.config[
                "original_max_position_embeddings"
            ]
            if rope["rope_type"] == "longrope":
                keys["rope.scaling.attn_factor"] = self._longrope_factor()
        elif rope["rope_type"] == "linear":
            keys["rope.scaling.type"] = "linear"
            keys["rope.scaling.factor"] = rope["factor"]
        elif rope["rope_type"] == "yarn":
            keys["rope.scaling.type"] = "yarn"
            keys["rope.scaling.factor"] = rope["factor"]
            keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
            for key in ("beta_fast", "beta_slow"):
                if key in rope:
                    keys[f"rope.scaling.yarn_{key}"] = rope[key]
            if "mscale_all_dim" in rope:
                keys["rope.scaling.yarn_log_multiplier"] = rope["mscale_all_dim"]
                keys["attention.temperature_scale"] = rope["llama_4_scaling_beta"]
        return keys

    def _longrope_factor(self) -> float:
        original = self.config["original_max_position_embeddings"]
        scale = self.config["max_position_embeddings"] / original
        return math.sqrt(1.0 + math.log(scale) / math.log(original)) if scale > 1.0 else 1.0

    def _rope_tensors(self) -> dict[str, np.ndarray]:
        rope = self.config["rope_parameters"]
        if self.family == "gemma4_text":
            return {"rope_freqs.weight": gemma4_divisors(self)}
        if rope.get("rope_type") == "longrope":
            return {
                f"rope_factors_{length}.weight": np.array(rope[f"{length}_factor"], np.float32)
                for length in ("long", "short")
            }
        if rope.get("rope_type") == "llama3":
            return {"rope_freqs.weight": llama3_divisors(rope, self.head_dim)}
        return {}


def _seed(*words: str) -> int:
    return zlib.crc32("/".join(words).encode())


def _normal(words: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
    """Normal numbers by name. RandomState's stream is frozen: records outlive numpy's versions."""
    return np.random.RandomState(_seed(*words)).standard_normal(shape)
