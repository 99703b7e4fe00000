"""The model card of an adapter: README.md with the metadata that PEFT and the Hub know."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora.forward.gguf.file import GGUFFile
from lora.shaders.choice import say_once
from lora.storage.files import write_file
from lora.storage.hub import repository_of
from lora.training.history import History, numbers

if TYPE_CHECKING:
    from lora.config.schema import Config

CARD = "README.md"
_MARK = "webgpu-lora"  # a tag, by which a card of ours is known
# Where converters write which repository a GGUF itself was made from. (general.base_model.* is what
# that one was tuned from: another model.)
_SOURCES = ("general.source.repo_url", "general.source.huggingface.repository",
            "general.source.url", "general.repo_url")  # fmt: skip
_REPOSITORY = re.compile(r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+?)/?")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,40}")


def base_repository(config: Config, gguf_file: GGUFFile) -> str | None:
    """ORG/REPO of the base model on the Hub; None where neither the file nor its name says it."""
    for key in _SOURCES:
        value = gguf_file.metadata.get(key)
        match = _REPOSITORY.fullmatch(value) if isinstance(value, str) else None
        if match is not None:
            return match[1]
    return repository_of(config.model.path)


def model_card(
    config: Config, gguf_file: GGUFFile, history: History | None = None, *, chats: bool = False
) -> str:
    """The card's text.

    Args:
        config: of the run. Of paths only the last part is told.
        gguf_file: the base model's.
        history: of the run; None for what was not trained as one.
        chats: whether the rows were chats: then a bare text is nothing that it was trained on.
    """
    history = history or History()
    name = Path(config.output).name
    sections = [
        f"---\n{yaml.safe_dump(_metadata(config, gguf_file), sort_keys=False)}---",
        f"# {_plain(name)}",
        _introduction(config, gguf_file),
        _results(history),
        _training(config, history),
        _use(config, gguf_file, name, chats),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def write_card(
    directory: Path,
    config: Config,
    gguf_file: GGUFFile,
    history: History | None = None,
    *,
    chats: bool = False,
) -> None:
    """Writes `model_card` into a directory, but over none that someone else has written."""
    path = directory / CARD
    try:
        if path.exists() and _MARK not in path.read_text(errors="replace"):
            return
        write_file(path, model_card(config, gguf_file, history, chats=chats))
    except OSError as error:  # the adapter is worth more
        say_once(f"{path} cannot be written ({error.strerror}): the adapter has no model card.")


def _metadata(config: Config, gguf_file: GGUFFile) -> dict[str, Any]:
    """As PEFT writes it; keys whose values aren't known are left out."""
    repository = base_repository(config, gguf_file)
    found: dict[str, Any] = {}
    if repository is not None:
        found["base_model"] = repository
    found["library_name"] = "peft"
    found["pipeline_tag"] = "text-generation"
    license_ = gguf_file.metadata.get("general.license")
    if isinstance(license_, str) and _LICENSE.fullmatch(license_):
        found["license"] = license_
    data = [s.name for s in config.data.sources("train") if s.name is not None and "/" in s.name]
    if data:
        found["datasets"] = list(dict.fromkeys(data))
    found["tags"] = [
        *([f"base_model:adapter:{repository}"] if repository is not None else []),
        "lora",
        _MARK,
    ]
    return found


def _introduction(config: Config, gguf_file: GGUFFile) -> str:
    repository = base_repository(config, gguf_file)
    file = Path(config.model.path).name if repository is None else repository
    variant = {"rslora": "rsLoRA"}.get(config.adapter.variant, "LoRA")
    return (
        f"A {variant} adapter for `{_plain(file)}`, trained on the quantized weights of "
        f"`{_plain(Path(config.model.path).name)}` with webgpu-lora."
    )


def _results(history: History) -> str:
    """Loss and evaluations, before and after."""
    lines = []
    if history.evaluations:
        first, last = history.evaluations[0], history.evaluations[-1]
        lines += [
            f"| evaluation | after step {first['step']} | after step {last['step']} |",
            "| --- | --- | --- |",
        ]
        for key in last:
            if key.startswith("eval_") and key != "eval_seconds":
                values = [numbers([line], key) for line in (first, last)]
                shown = [f"{value[0]:.4g}" if value else "" for value in values]
                lines.append(f"| `{key}` | {shown[0]} | {shown[1]} |")
    return "\n".join(["## Results", "", *lines]) if lines else ""


def _training(config: Config, history: History) -> str:
    train, adapter = config.train, config.adapter
    tokens = adapter.trainable_tokens
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    rows = {
        "rank, alpha": f"{adapter.rank}, {adapter.alpha:g}",
        "matrices": targets,
        **({"rows of the embedding": ", ".join(map(str, tokens))} if tokens else {}),
        "learning rate": f"{train.learning_rate:g}, {train.schedule}",
        "micro-batch × accumulation": f"{train.batch_size} × {train.gradient_accumulation}",
        "data.max_length": f"{config.data.max_length} tokens",
        "precision": train.precision,
        "seed": str(train.seed),
    }
    losses = numbers(history.steps, "loss")
    if losses:
        rows["steps"] = str(history.steps[-1]["step"])
        rows["epochs"] = f"{numbers(history.steps, 'epoch')[-1]:.2f}"
        rows["trained tokens"] = f"{history.sum_of('trained_tokens'):,.0f}"
        rows["training loss"] = f"{losses[0]:.4f} → {losses[-1]:.4f}"
    body = "\n".join(f"| {name} | {_plain(value)} |" for name, value in rows.items())
    return f"## Training\n\n| | |\n| --- | --- |\n{body}"


def _use(config: Config, gguf_file: GGUFFile, name: str, chats: bool) -> str:
    repository = base_repository(config, gguf_file)
    adapter = config.hub or name
    command, prompt = ("chat", "") if chats else ("generate", ' --prompt "…"')
    with_peft = ""
    if repository is not None:
        with_peft = f"""
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{_plain(repository)}")
model = PeftModel.from_pretrained(base, "{_plain(adapter)}")
```
"""
    return f"""## Use
{with_peft}
```sh
lora {command} {_plain(Path(config.model.path).name)} --adapter {_plain(name)}{prompt}
lora export {_plain(name)} --to {config.adapter.gguf_form}   # for llama.cpp and Ollama
```"""


def _plain(text: str) -> str:
    """A text of one line that ends no cell and no code."""
    return "".join(c for c in text if c.isprintable() and c not in "|`")
