"""The command line: `lora COMMAND`."""

from __future__ import annotations

import inspect as inspect_module
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora.commands.bench import bench_command
from lora.commands.convert import convert_command
from lora.commands.data import data_command
from lora.commands.debug_nan import debug_nan_command
from lora.commands.devices import devices_command
from lora.commands.evaluate import eval_command
from lora.commands.export import export_command
from lora.commands.init import init_command
from lora.commands.options import (
    DeviceName,
    PromptPrecision,
    TextPrecision,
    WebGPUName,
    key_of_option,
)
from lora.commands.plan import plan_command
from lora.commands.report import report_command
from lora.commands.train import train_command
from lora.commands.tune import tune_command
from lora.shaders.errors import InputError, LoraError, for_terminal, plain

if TYPE_CHECKING:  # the rest of lora is imported in the commands: --help and completion are quick
    from lora.generation.sampling import Sampling


class _Commands(typer.core.TyperGroup):
    """The commands; one that Ctrl-C ends says so, with exit status 130."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # typer would end without a word
            print("\nlora: interrupted", file=sys.stderr)
            raise typer.Exit(130) from None


# Rich's boxes cut the options' names where a terminal is narrow: there help is plain text.
_COLUMNS = shutil.get_terminal_size().columns
_IS_NARROW = _COLUMNS < 60
app = typer.Typer(
    cls=_Commands,
    rich_markup_mode=None if _IS_NARROW else "rich",
    help="Fine-tune the GGUF model you already run, on whatever GPU you have.",
    no_args_is_help=True,
    context_settings={
        "help_option_names": ["-h", "--help"],
        **({"terminal_width": max(_COLUMNS, 20)} if _IS_NARROW else {}),
    },
    pretty_exceptions_enable=False,
)


def _add(name: str, command: Callable[..., None]) -> None:
    """Adds a command; its help flows, where typer would break lines as the docstring does."""
    paragraphs = inspect_module.cleandoc(command.__doc__ or "").split("\n\n")
    flowing = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name=name, help=flowing)(command)


def _print_version(asked: bool) -> None:
    if asked:
        from lora import __version__

        print(f"webgpu-lora {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show tracebacks of errors.")] = False,
) -> None:
    """Options of all commands; `main` reads --debug itself, before any command runs."""


_add("init", init_command)
_add("convert-config", convert_command)
_add("train", train_command)
_add("plan", plan_command)
_add("bench", bench_command)
_add("data", data_command)
_add("eval", eval_command)


Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")]
TopK = Annotated[int, typer.Option(min=0, help="So many most likely tokens; 0: all.")]
TopP = Annotated[float, typer.Option(help="The most likely tokens that reach it together.")]
MinP = Annotated[float, typer.Option(help="Tokens of this share of the likeliest one's chance.")]
RepetitionPenalty = Annotated[float, typer.Option(help="Above 1: fewer repetitions.")]
Seed = Annotated[
    int | None,
    typer.Option(help="Of the one series of draws, for a chat's answers all together."),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of an answer.")]
MaxLength = Annotated[
    int | None,
    typer.Option(min=2, help="Room for prompt and answer; by default the model's, 4096 at most."),
]
TokenizerFile = Annotated[
    str | None,
    typer.Option(help="A tokenizer.json, or its directory, in place of the GGUF's own."),
]
ORDER_OF_SAMPLING = (
    "A token is chosen as in transformers: repetition penalty over the whole text, temperature, "
    "top-k, top-p, min-p, in this order (llama.cpp has the temperature last and penalizes the last "
    "64 tokens only)."
)
CHAT_TEMPERATURE, CHAT_TOP_K, CHAT_TOP_P, CHAT_MIN_P = 0.7, 40, 0.95, 0.05


def _check_draws(sampling: Sampling, default: Sampling) -> Sampling:
    """Refuses options that choose between draws where none is made.

    Raises:
        InputError: the temperature is 0 and one of them is given.
    """
    from lora.generation.sampling import GREEDY

    for name in ("top_k", "top_p", "min_p", "seed"):
        idle = getattr(GREEDY, name), getattr(default, name)
        if sampling.temperature == 0 and getattr(sampling, name) not in idle:
            option = "--" + name.replace("_", "-")
            raise InputError(
                f"{option} chooses between draws, and at temperature 0 none is made: give a "
                f"--temperature above 0, such as 0.7, or leave {option} out."
            )
    return sampling


def _read_prompt(prompt: str) -> str:
    """The prompt of the command line; "-" reads it from stdin.

    Raises:
        InputError: it is not UTF-8.
    """
    from lora.commands.chat import check_is_text

    what = "The prompt (--prompt)"
    if prompt == "-":
        what = "The prompt on stdin"
        read = sys.stdin.buffer.read().decode("utf-8", errors="surrogateescape")
        prompt = read.replace("\r\n", "\n").removesuffix("\n")
    check_is_text(prompt, what)
    return prompt


@app.command(epilog=ORDER_OF_SAMPLING)
def generate(
    model: Annotated[str, typer.Argument(help="A GGUF file, ollama:NAME or hf:ORG/REPO[:QUANT].")],
    prompt: Annotated[
        str,
        typer.Option(
            help="The text to go on from; - reads it from stdin, as UTF-8 and without the newline "
            "at its end."
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option(help="A PEFT adapter directory, or a GGUF adapter.")
    ] = None,
    chat: Annotated[bool, typer.Option(help="Render the prompt as a user's turn.")] = False,
    max_tokens: MaxTokens = 64,
    max_length: MaxLength = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    tokenizer: TokenizerFile = None,
    device: DeviceName = "auto",
    webgpu: WebGPUName = "auto",
    precision: PromptPrecision = TextPrecision.F32,
) -> None:
    """Continue a text with the tuned model."""
    from lora.commands.prompts import check_can_chat, trained_templates
    from lora.commands.waiting import waiting
    from lora.generation.opening import open_generator
    from lora.generation.sampling import GREEDY, Sampling
    from lora.shaders.choice import Wanted

    sampling = _check_draws(
        Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed), GREEDY
    )
    prompt = _read_prompt(prompt)
    adapters = {} if adapter is None else {"adapter": adapter}
    if chat:
        check_can_chat(model, tokenizer, adapters.values())
    with waiting():
        generator = open_generator(
            model,
            adapters,
            tokenizer=tokenizer,
            max_length=max_length,
            device=Wanted(device, webgpu, precision.value),
        )
    text: str | list[int] = prompt
    if chat:
        template = trained_templates(generator.tokenizer, adapters).get("adapter")
        asked = [{"role": "user", "content": prompt}]
        from lora.generation.prompts import conversation_ids

        text = conversation_ids(generator.tokenizer, asked, template)
    for piece in generator.stream(
        text, max_tokens=max_tokens, adapter=next(iter(adapters), None), sampling=sampling
    ):
        print(for_terminal(piece), end="", flush=True)
    print()


@app.command(name="chat", epilog=ORDER_OF_SAMPLING)
def converse(
    model: Annotated[str, typer.Argument(help="A GGUF file, ollama:NAME or hf:ORG/REPO[:QUANT].")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]PATH", help="Adapters; the first one is on."),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_tokens: MaxTokens = 512,
    max_length: MaxLength = None,
    temperature: Temperature = CHAT_TEMPERATURE,
    top_k: TopK = CHAT_TOP_K,
    top_p: TopP = CHAT_TOP_P,
    min_p: MinP = CHAT_MIN_P,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    tokenizer: TokenizerFile = None,
    device: DeviceName = "auto",
    webgpu: WebGPUName = "auto",
    precision: PromptPrecision = TextPrecision.F32,
) -> None:
    """Converse with a model, with adapters to switch on, off and between."""
    from lora.commands.chat import chat
    from lora.generation.sampling import Sampling
    from lora.shaders.choice import Wanted

    by_default = Sampling(CHAT_TEMPERATURE, CHAT_TOP_K, CHAT_TOP_P, CHAT_MIN_P)
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    chat(
        model,
        adapter or [],
        system=system,
        sampling=_check_draws(sampling, by_default),
        max_tokens=max_tokens,
        tokenizer=tokenizer,
        max_length=max_length,
        device=Wanted(device, webgpu, precision.value),
    )


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_DIR",
            help="A GGUF file, ollama:NAME[:TAG], hf:ORG/REPO[:QUANT], or an adapter.",
        ),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What a GGUF or an adapter holds."""
    from lora.commands.inspect import adapter_facts, describe_adapter, describe_gguf, gguf_facts
    from lora.commands.tables import table_console

    is_adapter, console = Path(model).is_dir(), table_console()
    if as_json:
        facts = adapter_facts(Path(model)) if is_adapter else gguf_facts(model)
        console.print_json(data=facts, ensure_ascii=True)
        return
    for part in describe_adapter(Path(model)) if is_adapter else describe_gguf(model):
        console.print(part, crop=False)


_add("report", report_command)
_add("export", export_command)
_add("tune", tune_command)
_add("devices", devices_command)
_add("debug-nan", debug_nan_command)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="smollm2-135m or gemma3-270m.")],
    directory: Annotated[Path, typer.Option(help="Where to put it.")] = Path("models"),
) -> None:
    """Fetch a known small model."""
    from lora.storage.pull import pull as pull_model

    print(plain(str(pull_model(name, directory))))


def main() -> None:
    """Runs the command line. Exit status: 0 done, 1 failed, 2 wrong input, 130 interrupted."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    try:
        status = app(arguments, standalone_mode=False, prog_name="lora")
    except (InputError, LoraError) as error:
        if debug:
            raise
        print(f"lora: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:  # who reads has enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        click_exit = getattr(error, "exit_code", None)
        if click_exit is None or debug:
            if debug:
                raise
            text = plain(str(error))
            print(f"lora: {type(error).__name__}: {text} (see --debug)", file=sys.stderr)
            sys.exit(1)
        getattr(error, "show", lambda: None)()
        if hint := key_of_option(error):
            print(hint, file=sys.stderr)
        sys.exit(click_exit)
    sys.exit(status if isinstance(status, int) else 0)
