"""Every parser of files, with seeds and a way to make them wrong.

`python -m tests.support.fuzzed_parsers` reads 200,000 inputs and prints a table.

An input is right if it is read, or refused by an InputError of one plain, short message, in good
time and without much memory. Anything else is a finding; its number gives it again (`--only`).
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import safetensors.numpy

from lora.adapters.files import load_adapter, open_adapter
from lora.adapters.peft_files import read_peft_factors
from lora.commands.inspect import adapter_facts, gguf_facts
from lora.config.data_section import SourceConfig
from lora.config.schema import load_config
from lora.data.conversations import conversation_of
from lora.data.opened import opened
from lora.data.readers import parsed_line
from lora.data.records import check_record
from lora.data.sources import open_source
from lora.forward.gguf.file import GGUFFile
from lora.forward.gguf.quantization import QUANTIZATIONS
from lora.forward.model.architecture import Architecture
from lora.forward.text.chat_template import ChatTemplate
from lora.forward.text.tokenizer import Tokenizer
from lora.shaders.errors import InputError
from lora.storage.stores import ollama_settings, resolve_model
from lora.training.checkpoint_state import read_checkpoint_state
from tests.support.mutations import (
    Mutator,
    mutated_bytes,
    mutated_header,
    mutated_json,
    mutated_words,
)
from tests.support.ollama_store import REGISTRY, install, layer
from tests.support.tiny_gguf import write_tiny_llama
from tests.support.tiny_models import TINY_MODELS

SEEDS = Path(__file__).parents[1] / "seeds"
SECONDS = 5.0  # of this process's time, for an input
PEAK_BYTES = 1 << 30  # that an input may add to the largest memory so far
_MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
_TEXT = "Hi <|im_end|> 12345 été\n\n  aaaa 🙂"


@dataclass(frozen=True)
class Parser:
    """One way in.

    Attributes:
        name: for the table.
        share: of all inputs.
        mutate: how a seed is made wrong.
        seeds: what is made wrong.
        read: given a folder and an input, puts it where it is read from, and reads it.
    """

    name: str
    share: float
    mutate: Mutator
    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[Path, bytes], object]


@dataclass
class Findings:
    """What came of some inputs."""

    read: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    slowest: float = 0.0


@cache
def _files(*patterns: str) -> list[bytes]:
    return [p.read_bytes() for pattern in patterns for p in sorted(SEEDS.glob(pattern))]


def _put(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzzed-"))


@cache
def _ggufs() -> list[bytes]:
    made = []
    for name in ("llama_odd", "gemma3", "phi3_long", "qwen3"):
        if name in TINY_MODELS:
            path = _folder() / f"{name}.gguf"
            TINY_MODELS[name].write_gguf(path)
            made.append(path.read_bytes())
    path = _folder() / "text.gguf"
    write_tiny_llama(path, n_layers=1, types={"weight": "Q4_1", "norm.weight": "F32"})
    return [*made, path.read_bytes()]


@cache
def _adapted() -> tuple[Architecture, Path]:
    """A tiny model's architecture, and a folder with its adapter in both forms."""
    from lora.export.to_gguf import export

    folder, model = _folder(), TINY_MODELS["llama_odd"]
    model.write_gguf(folder / "base.gguf")
    model.write_adapter(folder / "good")
    export(folder / "good", "gguf", output=folder / "good.gguf", base=str(folder / "base.gguf"))
    return Architecture.from_gguf(GGUFFile(folder / "base.gguf")), folder


def _read_gguf(folder: Path, content: bytes) -> None:
    gguf_file = GGUFFile(_put(folder, "x.gguf", content))
    gguf_facts(gguf_file.path)
    for tensor in gguf_file.tensors.values():
        if tensor.type in QUANTIZATIONS and len(tensor.shape) == 2:
            quantization = QUANTIZATIONS[tensor.type]
            data = tensor.data[:64]
            if quantization.finite_rows(data).all():
                quantization.pack(data, tensor.shape[1])
    architecture = Architecture.from_gguf(gguf_file)
    for spec in architecture.layers:
        if getattr(spec.mixer, "rope", None) is not None:
            assert np.isfinite(spec.mixer.rope.tables(8)).all()  # type: ignore[attr-defined]
    tokenizer = Tokenizer.from_gguf(gguf_file)
    tokenizer.decode(tokenizer.encode(_TEXT).ids[:8])


def _read_gguf_adapter(folder: Path, content: bytes) -> None:
    architecture, _ = _adapted()
    path = _put(folder, "a.gguf", content)
    saved = open_adapter(path, architecture)
    load_adapter(path, saved.layout(architecture))


def _read_settings(folder: Path, content: bytes) -> None:
    factors = {
        f"base_model.model.model.layers.0.self_attn.{name}_proj.lora_{half}.weight": np.ones(
            (4, 8) if half == "A" else (8, 4), np.float32
        )
        for name in "qv"
        for half in "AB"
    }
    _put(folder, "s/adapter_model.safetensors", safetensors.numpy.save(factors))
    _put(folder, "s/adapter_config.json", content)
    adapter_facts(folder / "s")


def _read_weights(folder: Path, content: bytes) -> None:
    architecture, good = _adapted()
    settings = (good / "good" / "adapter_config.json").read_bytes()
    _put(folder, "w/adapter_config.json", settings)
    _put(folder, "w/adapter_model.safetensors", content)
    read_peft_factors(folder / "w")
    saved = open_adapter(folder / "w", architecture)
    load_adapter(folder / "w", saved.layout(architecture))


def _read_tokenizer(folder: Path, content: bytes) -> None:
    path = _put(folder, "t/tokenizer.json", content)
    config = path.with_name("tokenizer_config.json")
    config.unlink(missing_ok=True)
    tokenizer = Tokenizer.from_file(path)
    tokenizer.decode(tokenizer.encode(_TEXT).ids)


def _read_tokenizer_config(folder: Path, content: bytes) -> None:
    _put(folder, "c/tokenizer.json", (SEEDS / "tokenizer" / "bpe.json").read_bytes())
    _put(folder, "c/tokenizer_config.json", content)
    tokenizer = Tokenizer.from_file(folder / "c")
    template = ChatTemplate.of(tokenizer)
    if template is not None:
        template.render(_MESSAGES)


def _read_template(folder: Path, content: bytes) -> None:
    template = ChatTemplate(content.decode(errors="replace"), bos_token="<s>")
    _ = template.variables
    template.render(_MESSAGES, tools=[{"name": "f"}], add_generation_prompt=True)


def _read_rows(folder: Path, content: bytes, ending: str = "jsonl") -> None:
    path = str(_put(folder, f"d.{ending}", content))
    source = opened(open_source(SourceConfig(path=path), "train"), "auto", {})
    form = source.shape.data_format
    for piece in source.rows.pieces():
        for raw in piece.rows:
            values = parsed_line(raw) if isinstance(raw, bytes) else raw
            record = check_record(values, source.shape)
            if form in ("chat", "instruct"):
                conversation_of(record.columns, form)


_PAIRS = [{"prompt": f"wake me at {n}", "completion": f"été, {n}"} for n in range(40)]


def _tables(kind: str) -> list[bytes]:
    """Rows as other forms than lines of JSON."""
    if kind == "csv":
        lines = (f'"{row["prompt"]}","{row["completion"]}"\r\n' for row in _PAIRS)
        return [("prompt,completion\n" + "".join(lines)).encode(), b"prompt;completion\na;b\n"]
    if kind == "json":
        chats = [{"messages": [{"role": r, "content": "Hi"} for r in ("user", "assistant")]}] * 9
        return [json.dumps(_PAIRS, indent=1).encode(), json.dumps(chats).encode()]
    if kind == "jsonl.gz":
        return [gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in _PAIRS))]
    table, found = pa.Table.from_pylist(_PAIRS), pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(table, found)
    else:
        with pa.ipc.new_file(found, table.schema) as writer:
            writer.write_table(table)
    return [found.getvalue().to_pybytes()]


def _read_manifest(folder: Path, content: bytes) -> None:
    _put(folder, f"store/manifests/{REGISTRY}/m/latest", content)
    os.environ["OLLAMA_MODELS"] = str(folder / "store")
    resolve_model("ollama:m")
    ollama_settings("ollama:m")


@cache
def _manifests() -> list[bytes]:
    store = _folder() / "store"
    (store / "blobs").mkdir(parents=True)
    params = layer(store, b'{"stop": ["x"]}', "application/vnd.ollama.image.params")
    return [install(store, f"{REGISTRY}/m/latest", layer(store), params).read_bytes()]


PARSERS = (
    Parser("config (YAML)", 0.16, mutated_words, lambda: _files("yaml/*"), lambda folder, content: (
        load_config(str(_put(folder, "x.yaml", content))).dump_yaml())),
    Parser("GGUF: header, model, tokenizer", 0.2, mutated_header, _ggufs, _read_gguf),
    Parser("GGUF adapter", 0.08, mutated_header,
           lambda: [(_adapted()[1] / "good.gguf").read_bytes()], _read_gguf_adapter),
    Parser("adapter_config.json", 0.12, mutated_json, lambda: _files("adapter/*"), _read_settings),
    Parser("adapter_model.safetensors", 0.08, mutated_bytes, lambda: [
        (_adapted()[1] / "good" / "adapter_model.safetensors").read_bytes()], _read_weights),
    Parser("tokenizer.json", 0.06, mutated_json,
           lambda: _files("tokenizer/bpe*", "tokenizer/uni*"), _read_tokenizer),
    Parser("tokenizer_config.json", 0.03, mutated_json,
           lambda: _files("tokenizer/config*"), _read_tokenizer_config),
    Parser("chat template (Jinja)", 0.08, mutated_words,
           lambda: _files("templates/*"), _read_template),
    Parser("rows (JSONL)", 0.06, mutated_json, lambda: _files("jsonl/*"), _read_rows),
    *(
        Parser(f"rows ({kind})", 0.01, mutated_bytes, partial(_tables, kind),
               partial(_read_rows, ending=kind))
        for kind in ("csv", "json", "parquet", "arrow")
    ),
    Parser("checkpoint's state.json", 0.05, mutated_json, lambda: _files("state/*"),
           lambda folder, content: read_checkpoint_state(_put(folder, "state.json", content))),
    Parser("Ollama's manifest", 0.04, mutated_json, _manifests, _read_manifest),
)  # fmt: skip


@contextmanager
def _empty_folder() -> Iterator[Path]:
    memory = "/dev/shm"  # hundreds of thousands of small files need no disk
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzzed-", dir=place) as name:
        yield Path(name)


def input_of(parser: Parser, number: int) -> bytes:
    """The input of a number: one seed of the parser's, made wrong."""
    rng = random.Random(f"{parser.name} {number}")
    seeds = parser.seeds()
    return parser.mutate(rng, rng.choice(list(seeds)), seeds)


def fuzz(parser: Parser, numbers: range) -> Findings:
    """Reads the inputs of some numbers."""
    found = Findings()
    with _empty_folder() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")  # a library's warning goes to stderr, with a line of code
        if parser.name.startswith("Ollama"):
            parser.seeds()
            (folder / "store").mkdir()
            (folder / "store" / "blobs").symlink_to(_folder() / "store" / "blobs")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in numbers:
            content = input_of(parser, number)
            started = time.process_time()
            try:
                parser.read(folder, content)
                found.read += 1
            except InputError as error:
                found.refused += 1
                text = str(error)
                if not text.replace("\n", "").isprintable() or not 0 < len(text) < 6500:
                    found.wrong.append(f"{number}: the message {text[:200]!r}")
            except BaseException as error:  # a library's panic is no Exception
                if isinstance(error, KeyboardInterrupt):
                    raise
                found.wrong.append(f"{number}: {type(error).__name__}: {str(error)[:200]}")
            seconds = time.process_time() - started
            found.slowest = max(found.slowest, seconds)
            if seconds > SECONDS:
                found.wrong.append(f"{number}: took {seconds:.1f} seconds")
            now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if (now - peak) * (1 if sys.platform == "darwin" else 1024) > PEAK_BYTES:
                found.wrong.append(f"{number}: took {(now - peak) >> 10} MiB")
            peak = now
    return found


def main() -> None:
    """Runs all parsers and prints a table; exit status 1 where something was found."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--inputs", type=int, default=200_000, help="over all parsers")
    options.add_argument("--first", type=int, default=0, help="number of the first input of each")
    options.add_argument("--only", help="one parser, by a part of its name")
    given = options.parse_args()
    totals: Counter[str] = Counter()
    wrong = 0
    print(
        "| parser | inputs | read | refused | slowest (s) | wrong |\n"
        "| --- | --: | --: | --: | --: | --: |"
    )
    for parser in PARSERS:
        if given.only and given.only.lower() not in parser.name.lower():
            continue
        n = round(given.inputs * (1.0 if given.only else parser.share))
        found = fuzz(parser, range(given.first, given.first + n))
        totals.update(inputs=n, read=found.read, refused=found.refused)
        wrong += len(found.wrong)
        print(
            f"| {parser.name} | {n:,} | {found.read:,} | {found.refused:,} | {found.slowest:.2f} | "
            f"{len(found.wrong)} |",
            flush=True,
        )
        for line in found.wrong[:10]:
            print(f"  {parser.name}, {line}", file=sys.stderr, flush=True)
    print(
        f"| all | {totals['inputs']:,} | {totals['read']:,} | {totals['refused']:,} | | {wrong} |"
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"\nPeak of this process: {peak} MiB.")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
