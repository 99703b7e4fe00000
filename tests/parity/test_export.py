"""What `lora export` writes, run by llama.cpp itself, against our own session."""

from __future__ import annotations

import ctypes
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.numpy
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from lora.adapters.adapted_tensor import adaptable
from lora.config.schema import Config
from lora.data.batches import make_batch
from lora.data.examples import Example
from lora.export.to_gguf import Export, export
from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.quantization import QUANTIZATIONS, quantize
from lora.forward.model.architecture import Architecture
from lora.generation.opening import open_generator
from lora.shaders.device import Device
from lora.shaders.errors import InputError
from lora.storage.gguf_output import TensorPlace, padding, write_header
from lora.training.programs import record_eval
from lora.training.session import TrainingSession
from tests.support.llama_cpp_logits import LlamaCpp
from tests.support.llama_vulkan import LlamaVulkan, NoLlamaVulkan
from tests.support.peft_reference import REAL_MODELS, eval_losses, token_ids
from tests.support.tiny_models import TINY_MODELS

pytestmark = pytest.mark.parity

RANK, ALPHA = 6, 15
CHANGE = 0.05
N_PROMPTS, PROMPT_TOKENS, N_TOKENS = 5, 12, 64
LENGTHS = (PROMPT_TOKENS, PROMPT_TOKENS + 40)  # prefixes of each row whose probabilities are asked
N_LIKELIEST = 4096
N_VULKAN_STEPS = 16


# -- quantizers -----------------------------------------------------------------------------------


def ggml_quantize(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """What llama.cpp's quantize writes without an importance matrix."""
    import xllamacpp

    library = ctypes.CDLL(str(Path(xllamacpp.__file__).parent / "xllamacpp.abi3.so"))
    function = library.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    stored = np.zeros((rows, columns // block_size * block_bytes), np.uint8)
    n = function(int(kind), values.ctypes.data, stored.ctypes.data, 0, rows, columns, None)
    assert n == stored.size
    return stored


@pytest.mark.parametrize("kind", [k for k in QUANTIZATIONS if GGML_QUANT_SIZES[k][0] > 1])
def test_quantizers_beside_ggml(kind: GGMLQuantizationType) -> None:
    """Squared error on numbers of several distributions: no larger than ggml's but for 1 %."""
    random = np.random.default_rng(0)
    for name, values in (
        ("normal", random.normal(0, 0.02, (256, 1024))),
        ("heavy tails", random.standard_t(4, (256, 1024)) * 0.02),
        ("one sign", np.abs(random.normal(0, 0.02, (256, 1024)))),
    ):
        exact = values.astype(np.float32)
        ours, theirs = (
            np.linalg.norm(gguf.quants.dequantize(write(exact, kind), kind) - exact)
            / np.linalg.norm(exact)
            for write in (quantize, ggml_quantize)
        )
        print(f"{kind.name}, {name}: ours {ours:.5f}, ggml's {theirs:.5f}")
        assert ours < 1.01 * theirs


@pytest.mark.parametrize("model", REAL_MODELS)
def test_real_tensors_come_back(model: str, request: pytest.FixtureRequest) -> None:
    """Weights that a file has already: writing them again in their type hardly changes them."""
    file = GGUFFile(request.getfixturevalue(model))
    worst: dict[str, float] = {}
    for tensor in file.tensors.values():
        if len(tensor.shape) == 1 or tensor.name == "token_embd.weight":
            continue
        data = np.ascontiguousarray(tensor.data[:256])
        once = gguf.quants.dequantize(data, tensor.type)
        twice = gguf.quants.dequantize(quantize(once, tensor.type), tensor.type)
        change = float(np.linalg.norm(twice - once) / np.linalg.norm(once))
        worst[tensor.type.name] = max(worst.get(tensor.type.name, 0.0), change)
    print(model, "changed by at most", {k: f"{v:.1e}" for k, v in worst.items()})
    # Rounding anew changes Q4 by 7e-2 and Q6_K by 2e-2.
    assert max(worst.values()) < 5e-3


# -- tiny models: every architecture --------------------------------------------------------------


_IN_LLAMA_CPP = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi3_short")
_NEWER_IN_LLAMA_CPP = (
    "granite", "olmo2", "olmo3", "glm4", "mistral3", "ernie4_5", "exaone4_whole", "hunyuan",
    "seed_oss",
    "gemma4_e2b",
    "gemma4_dense",
    "lfm2",
    "qwen35",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "head", "fused"),
    [(name, head, False) for name in _IN_LLAMA_CPP for head in (False, True)]
    + [(name, False, True) for name in ("llama", "qwen2")]
    + [(name, False, False) for name in _NEWER_IN_LLAMA_CPP],
)
def test_tiny_models_in_llama_cpp(name: str, head: bool, fused: bool, tmp_path: Path) -> None:
    """The adapter alone and merged, against transformers and PEFT; `fused`: q, k, v one tensor."""
    from tests.support.tiny_judge import judge, log_softmax

    model = replace(TINY_MODELS[name], adapted_head=head)
    tied = model.config["tie_word_embeddings"]
    base = tmp_path / "base.gguf"
    model.write_gguf(base, range(2) if fused else ())
    model.write_adapter(tmp_path / "adapter")
    judgement = judge(model, tmp_path / "adapter")
    row = model.token_rows()[0]
    prefixes = [row[:length] for length in (1, 7, 25, 40)]  # shorter and longer than windows
    expected, bare = (
        log_softmax(logits)[[len(prefix) - 1 for prefix in prefixes]]
        for logits in (judgement.adapted_logits, judgement.logits)
    )
    assert np.abs(expected - bare).max() > 1.0

    def worst(llama_cpp: LlamaCpp) -> float:
        answers = llama_cpp.log_probabilities(prefixes, expected.shape[1])
        assert all(len(tokens) == expected.shape[1] for tokens, _ in answers)
        return max(
            float(np.abs(values - expected[i][tokens]).max())
            for i, (tokens, values) in enumerate(answers)
        )

    # As in test_architectures.py: f32 sums in another order; Gemma's GELU is a table of f16 there
    # (not in its Vulkan build: test_tiny_gemmas_in_llama_cpp_vulkan).
    tolerance = 2e-2 if model.architecture.startswith("gemma") else 1e-4
    if not (head and tied):
        adapter = export(tmp_path / "adapter", "gguf", base=str(base))
        error = worst(LlamaCpp(base, adapter.path))
        print(f"{name}: log-probabilities differ by at most {error:.1e} with the adapter")
        assert error < tolerance
    if head and model.architecture == "gemma2":
        with pytest.raises(InputError, match="llama.cpp gives gemma2 no head of its own"):
            export(tmp_path / "adapter", "merged-gguf", base=str(base))
    else:
        merged = export(tmp_path / "adapter", "merged-gguf", base=str(base))
        error = worst(LlamaCpp(merged.path))
        print(f"{name}: log-probabilities differ by at most {error:.1e} merged")
        assert error < tolerance


@contextmanager
def skipping_without_vulkan() -> Iterator[None]:
    """Skips the test where llama.cpp's Vulkan build can't be had or finds no device."""
    try:
        yield
    except NoLlamaVulkan as reason:
        pytest.skip(f"llama.cpp's Vulkan build: {reason}")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "gemma3" else [pytest.mark.long])
        for name in ("gemma2", "gemma3", "gemma4_e2b", "gemma4_dense")
    ],
)
def test_tiny_gemmas_in_llama_cpp_vulkan(name: str, tmp_path: Path) -> None:
    """Where llama.cpp computes its GELU, Gemmas are as near as other models are on its CPU."""
    from tests.support.tiny_judge import judge, log_softmax

    model = TINY_MODELS[name]
    base = tmp_path / "base.gguf"
    model.write_gguf(base)
    model.write_adapter(tmp_path / "adapter")
    row = model.token_rows()[0]
    expected = judge(model, tmp_path / "adapter").adapted_logits[: len(row)]
    adapter = export(tmp_path / "adapter", "gguf", base=str(base))
    with skipping_without_vulkan():
        (logits,) = LlamaVulkan(base, adapter.path).logits([row], singly=name == "gemma4_e2b")
    error = float(np.abs(log_softmax(expected) - log_softmax(logits)).max())
    print(f"{name}: log-probabilities differ by at most {error:.1e} with the adapter")
    assert error < 1e-4  # f32 sums in another order


# -- the real models ------------------------------------------------------------------------------


def write_f32(path: Path, base: GGUFFile) -> None:
    """The same model with all weights as F32."""
    kind = GGMLQuantizationType.F32
    places = [TensorPlace(t.name, t.shape, kind) for t in base.tensors.values()]
    with open(path, "wb") as file:
        write_header(file, base, places)
        for tensor in base.tensors.values():
            for start in range(0, len(tensor.data), 4096):
                data = np.ascontiguousarray(tensor.data[start : start + 4096])
                file.write(gguf.quants.dequantize(data, tensor.type).tobytes())
            file.write(padding(base, 4 * int(np.prod(tensor.shape))))


def write_random_adapter(directory: Path, base: Path) -> None:
    """A PEFT adapter of all matrices, large enough that a wrong row or scale shows."""
    file = GGUFFile(base)
    architecture = Architecture.from_gguf(file)
    random = np.random.default_rng(3)
    tensors = {}
    for place in adaptable(architecture):
        path, matrix, name = place.path, place.matrix, place.tensor
        if name == "output.weight":
            continue
        columns = matrix.in_size(place.holder)
        a = random.normal(0, columns**-0.5, (RANK, columns))
        # scale · B · A is then CHANGE times as large as the weight.
        tensor = file.tensors[name]
        weights = gguf.quants.dequantize(np.ascontiguousarray(tensor.data[:64]), tensor.type)
        std = CHANGE * np.sqrt(np.mean(weights**2) * columns * RANK) / ALPHA
        b = random.normal(0, std, (matrix.out_size(place.holder), RANK))
        tensors[f"base_model.model.{path}.lora_A.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{path}.lora_B.weight"] = b.astype(np.float32)
    directory.mkdir()
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    settings = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "base_model_name_or_path": str(base),
        "target_modules": "all-linear",
    }
    (directory / "adapter_config.json").write_text(json.dumps(settings))


def session_of(
    model: Path, rows: list[list[int]], first_trained: int, adapter: Path | None, device: Device
) -> TrainingSession:
    """A session that holds the rows as its examples, trained from a position on."""
    examples = []
    for index, row in enumerate(rows):
        trained = np.arange(len(row)) >= first_trained
        examples.append(Example(np.array(row, np.int32), trained, index))
    config = Config.model_validate(
        {
            "model": {"path": str(model)},
            "adapter": {
                "rank": RANK,
                "alpha": ALPHA,
                "init_from": str(adapter) if adapter else None,
            },
            "data": {"train": "none", "max_length": max(map(len, rows))},
            "train": {"steps": 1, "batch_size": 1},
            "output": "none",
        }
    )
    return TrainingSession(config, train=False, examples=examples, device=device)


def our_logits(
    model: Path, rows: list[list[int]], adapter: Path | None, device: Device
) -> list[list[np.ndarray]]:
    """Logits of the N_TOKENS positions that predict the continuation: bare, and under the adapter.

    One row at a time: 64 targets are one chunk of the head.
    """
    session = session_of(model, rows, PROMPT_TOKENS, adapter, device)
    assert len(session.inputs.chunks) == 1
    results = []
    for parameters in (None, session.adapter.parameters) if adapter else (None,):
        program = record_eval(
            session._recording,
            session.model,
            session.inputs,
            session._act,
            session.layout,
            parameters,
        )
        logits = []
        for example in session.workload.train_examples:
            batch = make_batch([example])
            session._enter(batch, None)
            program.run()
            values = device.memory.read(session._act.head.logits)
            logits.append(values[:N_TOKENS, : session.model.architecture.vocab_size])
        results.append(logits)
    return results


def llama_cpp_losses(theirs: LlamaCpp, rows: list[list[int]]) -> list[float]:
    """The mean loss of each row's tokens but the first, each after its prefix.

    A token that is none of the likeliest is asked for again, with all of the vocabulary.
    """
    places = [(i, n) for i, row in enumerate(rows) for n in range(1, len(row))]
    found: dict[tuple[int, int], float] = {}
    n_all = len(GGUFFile(theirs.model).metadata["tokenizer.ggml.tokens"])
    for n_asked in (N_LIKELIEST, n_all):
        missing = [place for place in places if place not in found]
        prefixes = [rows[i][:n] for i, n in missing]
        answers = theirs.log_probabilities(prefixes, n_asked) if missing else []
        for (i, n), (tokens, values) in zip(missing, answers, strict=True):
            for value in values[tokens == rows[i][n]]:
                found[i, n] = float(value)
    return [
        -float(np.mean([found[i, n] for n in range(1, len(row))])) for i, row in enumerate(rows)
    ]


@dataclass
class RealCase:
    """A real model, a random adapter, its exports, and what both sides make of them."""

    base: Path
    folder: Path
    device: Device

    @cached_property
    def adapter(self) -> Path:
        write_random_adapter(self.folder / "adapter", self.base)
        return self.folder / "adapter"

    @cached_property
    def f32_base(self) -> Path:
        write_f32(self.folder / "f32.gguf", GGUFFile(self.base))
        return self.folder / "f32.gguf"

    @cached_property
    def gguf_adapter(self) -> Path:
        return export(self.adapter, "gguf").path

    @cached_property
    def merged(self) -> Export:
        return export(self.adapter, "merged-gguf")

    @cached_property
    def merged_f32(self) -> Path:
        to = self.folder / "merged_f32" / "merged.gguf"
        return export(self.adapter, "merged-gguf", base=str(self.f32_base), output=to).path

    @cached_property
    def prompts(self) -> list[list[int]]:
        return [row[:PROMPT_TOKENS] for row in token_ids(self.base)["train"][:N_PROMPTS]]

    @cached_property
    def rows(self) -> list[list[int]]:
        """Prompts with llama.cpp's greedy continuations, in f32 under the adapter."""
        answers = LlamaCpp(self.f32_base, self.gguf_adapter).continuations(self.prompts, N_TOKENS)
        return [p + a for p, a in zip(self.prompts, answers, strict=True)]

    @cached_property
    def ours(self) -> list[list[np.ndarray]]:
        return our_logits(self.base, self.rows, self.adapter, self.device)

    @cached_property
    def _answers(self) -> dict[LlamaCpp, list[tuple[np.ndarray, np.ndarray]]]:
        return {}

    def answers(self, theirs: LlamaCpp) -> list[tuple[np.ndarray, np.ndarray]]:
        """The likeliest tokens and their log-probabilities after each prefix of each row."""
        if theirs not in self._answers:
            prefixes = [row[:length] for row in self.rows for length in LENGTHS]
            self._answers[theirs] = theirs.log_probabilities(prefixes, N_LIKELIEST)
        return self._answers[theirs]

    def errors(self, theirs: LlamaCpp, ours: list[np.ndarray]) -> tuple[float, float]:
        """Difference of log-probabilities of the likeliest tokens: the largest, and the mean.

        Args:
            ours: logits of N_TOKENS positions of each row.
        """
        from tests.support.tiny_judge import log_softmax

        answers = iter(self.answers(theirs))
        differences = []
        for logits in ours:
            for length in LENGTHS:
                tokens, values = next(answers)
                position = length - PROMPT_TOKENS
                expected = log_softmax(logits[position][None])[0]
                differences.append(np.abs(expected[tokens] - values))
        return float(np.max(differences)), float(np.mean(differences))


# Gemma takes minutes, most of them llama.cpp's; tiny Gemmas above show what is theirs alone.
@pytest.fixture(
    scope="module",
    params=[
        pytest.param(n, marks=[pytest.mark.long] if n == "gemma3" else []) for n in REAL_MODELS
    ],
)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, device: Device
) -> Iterator[RealCase]:
    folder = tmp_path_factory.mktemp("real")
    yield RealCase(request.getfixturevalue(request.param), folder, device)
    shutil.rmtree(folder)  # more than a gigabyte


def is_gemma(model: Path) -> bool:
    """Whether the model's activation is GELU."""
    return str(GGUFFile(model).metadata["general.architecture"]).startswith("gemma")


def check_f32(case: RealCase, worst: float, mean: float) -> None:
    """5e-3, where llama.cpp computes what we do. Its CPU build takes GELU from a table of f16
    values, so that Gemma's bare model, too, lies farther away; then the adapter must not add to
    that, and test_gemma_in_llama_cpp_vulkan asks the build that computes it.
    """
    if not is_gemma(case.base):
        assert worst < 5e-3
        return
    worst_bare, mean_bare = case.errors(LlamaCpp(case.f32_base), case.ours[0])
    print(f"without any adapter by {mean_bare:.1e} on average, {worst_bare:.1e} at most")
    assert mean < 5e-3
    assert worst < max(5e-3, 1.5 * worst_bare)


def test_adapter_on_the_f32_base(case: RealCase) -> None:
    bare, adapted = case.ours
    worst, mean = case.errors(LlamaCpp(case.f32_base, case.gguf_adapter), adapted)
    _, without = case.errors(LlamaCpp(case.f32_base), adapted)
    print(f"log-probabilities differ by {mean:.1e} on average, {worst:.1e} at most; where")
    print(f"llama.cpp leaves the adapter out, by {without:.1e}")
    assert without > 0.1
    check_f32(case, worst, mean)


@pytest.mark.long
def test_gemma_in_llama_cpp_vulkan(case: RealCase) -> None:
    """Where llama.cpp computes in f32 all through: a row at once, step by step, and merged.

    Few tokens, since a software driver takes 13 s for a row and one for a step.
    """
    if not is_gemma(case.base):
        pytest.skip(
            "llama.cpp's CPU build computes this model in f32: test_adapter_on_the_f32_base"
        )
    from tests.support.tiny_judge import log_softmax

    def compare(what: str, ours: np.ndarray, theirs: np.ndarray) -> None:
        known = np.isfinite(theirs[0])  # not what would end the text
        errors = np.abs(log_softmax(ours[:, known]) - log_softmax(theirs[:, known]))
        print(f"{what}, {len(ours)} positions: {known.sum()} log-probabilities of each differ by")
        print(f"{errors.mean():.1e} on average, {errors.max():.1e} at most")
        assert errors.max() < 5e-3
        chosen = theirs.argmax(1)
        gaps = ours[:, known].max(1) - ours[np.arange(len(ours)), chosen]
        assert gaps.max() < 1e-2  # the same choices but between near equals

    with skipping_without_vulkan():
        theirs = LlamaVulkan(case.f32_base, case.gguf_adapter)
        (at_once,) = theirs.logits(case.rows[:1], first=PROMPT_TOKENS - 1)
    compare("a row at once", case.ours[1][0], at_once[:N_TOKENS])

    prompt = case.prompts[1]
    ((tokens, steps),) = theirs.continuations([prompt], N_VULKAN_STEPS)
    generator = open_generator(
        str(case.base),
        {"tuned": case.gguf_adapter},
        max_length=PROMPT_TOKENS + N_VULKAN_STEPS,
        device=case.device,
    )
    ours = [
        generator.next_logits([*prompt, *tokens[:index]], adapter="tuned")
        for index in range(N_VULKAN_STEPS)
    ]
    compare("step by step", np.stack(ours), steps)

    row = case.rows[2][: PROMPT_TOKENS + N_VULKAN_STEPS - 1]
    (merged,) = LlamaVulkan(case.merged_f32).logits([row], first=PROMPT_TOKENS - 1)
    compare("merged", case.ours[1][2][:N_VULKAN_STEPS], merged)


def test_greedy_continuation(case: RealCase) -> None:
    """Position by position after llama.cpp's tokens, of which none may end the text."""
    n_near = 0
    kinds = np.array(GGUFFile(case.base).metadata["tokenizer.ggml.token_type"])
    allowed = kinds != gguf.TokenType.CONTROL
    for row, logits in zip(case.rows, case.ours[1], strict=True):
        assert len(row) == PROMPT_TOKENS + N_TOKENS
        for position, token in enumerate(row[PROMPT_TOKENS:]):
            assert allowed[token]
            values = logits[position, : len(allowed)]
            gap = float(values[allowed].max() - values[token])
            n_near += gap > 0
            assert gap < 1e-2, (position, token, int(values.argmax()))
    print(f"{N_PROMPTS * N_TOKENS} tokens, {n_near} of them another choice between near equals")


def test_everyone_gives_the_same_eval_loss(case: RealCase) -> None:
    """PEFT with the directory, llama.cpp with the GGUF adapter, and our session with either."""
    rows = token_ids(case.base)["eval"]
    losses = {
        "PEFT": eval_losses(case.base, case.adapter, rows),
        "llama.cpp": llama_cpp_losses(LlamaCpp(case.f32_base, case.gguf_adapter), rows),
    }
    for kind, path in {"directory": case.adapter, "GGUF": case.gguf_adapter}.items():
        session = session_of(case.base, rows, 1, path, case.device)
        losses[f"ours, {kind}"] = [
            session.evaluate([e]).loss for e in session.workload.train_examples
        ]
    bare = [session.evaluate([e], adapted=False).loss for e in session.workload.train_examples]
    print("eval losses:", {name: np.round(values, 5).tolist() for name, values in losses.items()})
    print("without the adapter:", np.round(bare, 5).tolist())
    # Each is f32 sums in another order, 1e-4 apart; llama.cpp's table of GELUs for Gemma is the
    # widest, 5e-3 a token (check_f32).
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["PEFT"], rtol=0, atol=1e-2, err_msg=name)
    # A random change may leave the mean of one row where it was, but not that of both: half the
    # scale in one loader, or no adapter, would be beyond the tolerance.
    assert np.abs(np.subtract(bare, losses["PEFT"])).max() > 0.05


def test_generated_tokens(case: RealCase) -> None:
    """Our generator, keys and values kept, under the GGUF adapter: llama.cpp's tokens.

    Where it goes another way, both tokens must be near equals there, or llama.cpp not allowed to
    take ours since it ends the text; then ours goes on after llama.cpp's.
    """
    generator = open_generator(
        str(case.base),
        {"tuned": case.gguf_adapter},
        max_length=PROMPT_TOKENS + N_TOKENS,
        device=case.device,
    )
    kinds = np.array(GGUFFile(case.base).metadata["tokenizer.ggml.token_type"])
    allowed = kinds != gguf.TokenType.CONTROL
    n_near = n_ends = 0
    for row in case.rows[::2]:  # the other prompts: test_greedy_continuation
        assert len(row) == PROMPT_TOKENS + N_TOKENS
        position = PROMPT_TOKENS
        while position < len(row):
            tokens = generator.stream_ids(
                row[:position], max_tokens=len(row) - position, adapter="tuned"
            )
            for token in tokens:
                position += 1
                if token != row[position - 1]:
                    logits = generator.next_logits(row[: position - 1], adapter="tuned")
                    wanted = logits[: len(allowed)][allowed].max()
                    assert logits[row[position - 1]] > wanted - 1e-2, (position, token)
                    n_ends += not allowed[token]
                    n_near += bool(allowed[token])
                    break
    print(f"{n_near} tokens are another choice between near equals,")
    print(f"{n_ends} where ours would have ended the text")


def test_adapter_on_the_quantized_base(case: RealCase) -> None:
    """llama.cpp rounds activations there; the adapter must not add to that."""
    bare, adapted = case.ours
    _, with_it = case.errors(LlamaCpp(case.base, case.gguf_adapter), adapted)
    _, without = case.errors(LlamaCpp(case.base), bare)
    print(f"log-probabilities differ by {with_it:.3f} with the adapter, {without:.3f} without")
    assert with_it < 1.3 * without


def test_merged(case: RealCase) -> None:
    """The merged file in llama.cpp and in our own session; in F32 it is the adapter's model."""
    (merged,) = our_logits(case.merged.path, case.rows, None, case.device)
    _, own = case.errors(LlamaCpp(case.merged.path), merged)
    _, bare = case.errors(LlamaCpp(case.base), case.ours[0])
    print(f"log-probabilities differ by {own:.3f} on the merged file, {bare:.3f} on the base")
    assert own < 1.3 * bare
    worst, mean = case.errors(LlamaCpp(case.merged_f32), case.ours[1])
    print(f"merged in F32 they differ by {mean:.1e} on average, {worst:.1e} at most")
    check_f32(case, worst, mean)
    _, rounding = case.errors(LlamaCpp(case.merged.path), case.ours[1])
    print(f"merged in its own types it lies {rounding:.3f} from the exact merge")
