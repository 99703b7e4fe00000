"""The command line: `lora COMMAND`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lora.inspect import describe_adapter, describe_gguf, gguf_facts
from lora.pull import pull as pull_model
from shaders.device import list_adapters
from shaders.errors import InputError, LoraError

app = typer.Typer(
    help="Fine-tune the GGUF model you already run, on whatever GPU you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

ConfigArgument = Annotated[str, typer.Argument(help="A YAML config.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key of the config."),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of all commands; `main` reads --debug itself, before any command runs."""


@app.command()
def train(
    config: ConfigArgument,
    set_: Overrides = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, train nothing.")] = False,
) -> None:
    """Train an adapter; Ctrl-C saves a checkpoint and says how to resume."""
    from lora.config import load_config
    from lora.progress import TrainingProgress, print_plan
    from lora.run import Interrupted, run_training
    from lora.session import TrainingSession

    session = TrainingSession(load_config(config, set_ or []))
    print_plan(console, session)
    if dry_run:
        return
    try:
        with TrainingProgress(console, session) as progress:
            output = run_training(
                session, resuming=resume, on_step=progress.step, on_eval=progress.evaluated
            )
    except Interrupted as stop:
        given = "".join(f" --set {value}" for value in set_ or [])
        console.print(f"Stopped; saved {stop.checkpoint}.")
        console.print(f"Go on with: lora train {config}{given} --resume", highlight=False)
        raise typer.Exit(130) from None
    console.print(f"Saved the adapter to {output}.")


@app.command(name="eval")
def evaluate(
    config: ConfigArgument,
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter directory.")] = None,
    set_: Overrides = None,
    examples: Annotated[int, typer.Option(help="Answers to write out.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Loss, perplexity and exact match on data.eval, with and without the adapter."""
    from lora.config import load_config
    from lora.progress import print_evaluation
    from lora.session import TrainingSession

    session = TrainingSession(load_config(config, set_ or []), train=False)
    results = {"base": session.evaluate(adapted=False)}
    if adapter is not None:
        session.load_adapter(adapter)
        results["adapter"] = session.evaluate()
    if as_json:
        values: dict[str, Any] = {name: vars(result) for name, result in results.items()}
        console.print_json(json.dumps(values))
        return
    print_evaluation(console, session, results, examples)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A GGUF file.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    adapter: Annotated[Path | None, typer.Option(help="A PEFT adapter directory.")] = None,
    chat: Annotated[bool, typer.Option(help="Render the prompt as a user's turn.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1)] = 64,
    max_length: Annotated[int, typer.Option(min=2, help="Room for prompt and answer.")] = 256,
    device: Annotated[str, typer.Option(help="auto, an index, or part of a name.")] = "auto",
) -> None:
    """Continue a text greedily, with the tuned model."""
    from forward.chat import render_chat
    from lora.inference import open_for_inference, token_text

    session = open_for_inference(model, adapter, max_length=max_length, device=device)
    add_bos = None
    if chat:
        template = session.tokenizer.chat_template
        if template is None:
            raise InputError(f"--chat: {model} holds no chat template; leave --chat out.")
        prompt = render_chat(
            template,
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            bos_token=token_text(session.tokenizer, session.tokenizer.bos_id),
            eos_token=token_text(session.tokenizer, session.tokenizer.eos_id),
        )
        add_bos = False  # the template writes it where it belongs
    for piece in session.stream_text(
        prompt, max_tokens=max_tokens, adapted=adapter is not None, add_bos=add_bos
    ):
        print(piece, end="", flush=True)
    print()


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_DIR",
            help="A GGUF file, ollama:NAME[:TAG], hf:ORG/REPO/FILE, or an adapter directory.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="A GGUF's facts as JSON.")] = False,
) -> None:
    """What a GGUF or an adapter holds."""
    if as_json:
        console.print_json(data=gguf_facts(model))
        return
    is_adapter = Path(model).is_dir()
    for part in describe_adapter(Path(model)) if is_adapter else describe_gguf(model):
        console.print(part)


@app.command()
def devices() -> None:
    """The adapters that WebGPU sees, their limits and features."""
    adapters = list_adapters()
    if not adapters:
        raise InputError(
            "WebGPU found no adapter on this machine. Install a Vulkan driver "
            "(Debian: apt-get install mesa-vulkan-drivers)."
        )
    table = Table("index", "name", "kind", "backend", "driver", "binding", "workgroup", "features")
    for index, adapter in enumerate(adapters):
        info, limits = adapter.info, adapter.limits
        table.add_row(
            str(index),
            info["device"],
            info["adapter_type"],
            info["backend_type"],
            info["description"],
            f"{limits['max-storage-buffer-binding-size'] / 2**20:.0f} MiB",
            f"{limits['max-compute-workgroup-storage-size'] / 2**10:.0f} KiB",
            ", ".join(f for f in ("shader-f16", "subgroup", "timestamp-query")
                      if f in adapter.features),
        )  # fmt: skip
    console.print(table)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m or gemma3-270m.")],
    directory: Annotated[Path, typer.Option(help="Where to put it.")] = Path("models"),
) -> None:
    """Fetch a known small model."""
    console.print(str(pull_model(name, directory)))


def main() -> None:
    """Runs the command line. Exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        status = app(arguments, standalone_mode=False)
    except (InputError, LoraError) as error:
        if debug:
            raise
        print(f"lora: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except (KeyboardInterrupt, typer.Abort):
        print("lora: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        click_exit = getattr(error, "exit_code", None)
        if click_exit is None or debug:
            if debug:
                raise
            print(f"lora: {type(error).__name__}: {error} (see --debug)", file=sys.stderr)
            sys.exit(1)
        getattr(error, "show", lambda: None)()
        sys.exit(click_exit)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
