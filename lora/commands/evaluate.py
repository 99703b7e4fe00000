"""The command `lora eval`; lora/commands/cli.py registers it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora.commands.options import ConfigArgument, Overrides, WebGPUOverride, overrides
from lora.commands.tables import Records, table_console
from lora.shaders.errors import for_terminal

if TYPE_CHECKING:  # imported in the command: `lora --help` has no use for them
    from lora.data.examples import DataSummary, Example
    from lora.training.metrics import EvalResult
    from lora.training.session import TrainingSession

# Nothing is chosen by these sets here, which --set may name otherwise than the config.
_NOTHING_CHOSEN = (
    "train.best=off",
    "train.load_best_model_at_end=false",
    "train.early_stopping_patience=null",
)
_MORE_TOKENS = 8  # that a written-out answer may have than the wanted one: it shows rambling


def eval_command(
    config: ConfigArgument,
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter directory, or a GGUF adapter.")
    ] = None,
    set_: Overrides = None,
    webgpu: WebGPUOverride = None,
    examples: Annotated[
        int, typer.Option(min=0, help="So many first examples with their answers; not in JSON.")
    ] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss, perplexity and exact match on data.eval: the bare model, and with --adapter both.

    All rows of it are taken, whatever train.eval_samples is.
    Exact are examples whose every answer is right to its end; never those cut at data.max_length.
    What the adapter's own files say of its rank and matrices counts, not the config.
    """
    from lora.adapters.files import with_adapter
    from lora.commands.waiting import waiting
    from lora.config.schema import load_config
    from lora.shaders.errors import InputError
    from lora.training.session import TrainingSession

    loaded = load_config(config, [*_NOTHING_CHOSEN, *overrides(set_, webgpu)])
    if not loaded.data.evaluates:  # said before the model is loaded for nothing
        raise InputError(
            "data.eval is null: there is nothing to evaluate on. Name a file of examples in the "
            "config, or with --set data.eval=FILE."
        )
    if adapter is not None:
        loaded = with_adapter(loaded, adapter)
    with waiting() as tell:
        session = TrainingSession(loaded, train=False)
        results = {}
        for name in ("base", *(["adapter"] if adapter is not None else [])):
            told = partial(_tell_progress, tell, name)
            told(0, len(session.workload.eval_examples))  # the first batch waits for kernels
            results[name] = session.evaluate(adapted=name == "adapter", progress=told)
    summary = session.workload.eval_summary
    assert summary is not None  # data.eval is set
    if as_json:
        values = {
            "model_path": loaded.model.path,
            "adapter_path": None if adapter is None else str(adapter),
            "data": loaded.data.model_dump(mode="json")["eval"],
            "max_length": summary.max_length,
            "n_rows": summary.n_rows,
            "n_left_out": summary.n_untrained,
            **{name: result.as_dict() for name, result in results.items()},
        }
        print(json.dumps(values, indent=2))
        return
    print(describe_examples(summary, results["base"]))
    table_console().print(table_of(results))
    _print_answers(session, list(results), examples)


def _tell_progress(tell: Callable[[str], None], name: str, done: int, total: int) -> None:
    tell(f"Evaluating {name}, {done}/{total}")


def describe_examples(summary: DataSummary, result: EvalResult) -> str:
    """How many examples the figures are of, and which of them or beside them to know about."""
    text = f"{result.n_examples} examples"
    some_too_long = summary.longest > summary.max_length
    if result.n_cut:
        text += f", {result.n_cut} cut to {summary.max_length} tokens (never counted as exact)"
    for reason, n_rows in summary.left_out.items():
        text += f"; {n_rows} left out, {reason}"
    if some_too_long and (result.n_cut or summary.n_untrained):
        text += f"; data.max_length: {summary.longest} would hold them all"
    return text


def table_of(results: Mapping[str, EvalResult]) -> Records:
    """Each result with those of its sets."""
    rows = {
        label: one
        for name, result in results.items()
        for label, one in (
            (name, result),
            *((f"{name}, {part}", each) for part, each in result.sets.items()),
        )
    }
    return Records(
        ("", "loss", "perplexity", "token accuracy", "exact match"),
        [
            (
                name,
                f"{result.loss:.4f}",
                f"{result.perplexity:.3f}",
                f"{result.token_accuracy:.1%}",
                f"{result.n_exact}/{result.n_examples} ({result.exact_match:.1%})",
            )
            for name, result in rows.items()
        ],
    )


def first_answer(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before an example's first trained stretch, and that stretch."""
    start = int(example.trained.argmax())
    untrained = (~example.trained[start:]).nonzero()[0]
    end = start + int(untrained[0]) if len(untrained) else len(example.ids)
    return example.ids[:start].tolist(), example.ids[start:end].tolist()


def _print_answers(session: TrainingSession, names: list[str], n_examples: int) -> None:
    """Writes out the first answers of the first examples.

    With print: rich would break long lines and read `:smile:` and brackets as its own.
    """
    from lora.commands.waiting import waiting

    decode = session.tokenizer.decode
    for example in session.workload.eval_examples[:n_examples]:
        prompt, wanted = first_answer(example)
        reaches_end = len(prompt) + len(wanted) == len(example.ids)
        print(f"\nprompt  {for_terminal(decode(prompt).strip())}")
        print(f"wanted  {decode(wanted)!r}{' (cut)' if example.cut and reaches_end else ''}")
        for name in names:
            with waiting(f"{name} answers"):
                answer = session.generate(
                    prompt, max_tokens=len(wanted) + _MORE_TOKENS, adapted=name == "adapter"
                )
            print(f"{name:8}{answer!r}")
