"""The command `lora train`; lora/commands/cli.py registers it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora.commands.options import Overrides, WebGPUOverride, overrides
from lora.shaders.errors import InputError, plain

if TYPE_CHECKING:  # imported in the command: `lora --help` has no use for them
    from lora.config.schema import Config
    from lora.training.communicator import Communicator


def train_command(
    config: Annotated[str | None, typer.Argument(help="A YAML config.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Without a config: the base model, as model.path in one."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Without a config: the examples, as data.train in one.")
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="The directory that the run writes to.")
    ] = None,
    set_: Overrides = None,
    webgpu: WebGPUOverride = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Check everything, train nothing.")] = False,
) -> None:
    """Train an adapter; Ctrl-C saves a checkpoint and says how to resume.

    A config is written by `lora init`; --model and --data train with what it would hold. Under
    mpiexec -n N, or srun, N processes train one, each on a device of its own.
    """
    from lora.training.watch import joined

    given = overrides(set_, webgpu)
    if output is not None:
        given.append(f"output={output}")
    with joined() as communicator:
        loaded, words = _settings(config, model, data, given)
        _train(communicator, loaded, words, resume=resume, dry_run=dry_run)


def _train(
    communicator: Communicator, loaded: Config, words: list[str], *, resume: bool, dry_run: bool
) -> None:
    """Of several processes rank 0 alone shows anything, and looks at the output.

    Args:
        words: of the command line that give the config.
    """
    from lora.commands.plan import print_plan
    from lora.commands.progress import TrainingProgress
    from lora.commands.summary import print_summary
    from lora.commands.tables import table_console
    from lora.shaders.stages import stages_told
    from lora.storage.hub_upload import check_can_push
    from lora.training.leading import open_together, quiet
    from lora.training.output import check_output, check_room
    from lora.training.reporters import check_reporters, open_reporters
    from lora.training.resuming import check_can_resume
    from lora.training.run import Interrupted, run_training

    quiet(communicator)
    console, leads = table_console(), communicator.rank == 0
    console.quiet = not leads
    if leads:
        check_output(Path(loaded.output), resuming=resume)
        if resume:
            check_can_resume(loaded)
        check_room(loaded, Path(loaded.output))
        check_reporters(loaded)
        if loaded.hub is not None:
            check_can_push(loaded.hub)
    try:
        with TrainingProgress(console) as progress:
            with stages_told(progress.stage):
                session = open_together(loaded, communicator, resuming=resume)
            print_plan(console, session.plan)
            if dry_run:
                return
            reporters = open_reporters(loaded) if leads else []
            written = run_training(session, resuming=resume, listeners=[progress, *reporters])
    except Interrupted as stop:
        together = ["mpiexec", "-n", str(communicator.size)] if communicator.size > 1 else []
        command = shlex.join([*together, "lora", "train", *words, "--resume"])
        if leads:
            stands = progress.standing()
            say_last(
                [
                    f"Stopped after {stands}; saved {stop.checkpoint}, which --adapter takes, too.",
                    f"Go on with: {command}",
                ]
            )
        raise typer.Exit(128 + stop.signum) from None
    if leads:
        print_summary(console, session, words, written)
        typer.echo(f"Saved the adapter to {plain(str(written))}.")


def say_last(lines: Sequence[str]) -> None:
    """Prints lines as they are, without markup and wrapping, wherever there still is a reader.

    Ctrl-C ends the `tee` behind a pipe, too: then stderr has them. Nobody may be left at all.
    """
    for to_stderr in (False, True):
        with suppress(OSError):
            for line in lines:
                typer.echo(line, err=to_stderr)
            return


def _settings(
    config: str | None, model: str | None, data: str | None, given: Sequence[str]
) -> tuple[Config, list[str]]:
    """The config, and the words of the command line that give it again.

    Raises:
        InputError: there is neither a config nor a model and data, or both; or it is wrong.
    """
    from lora.config.schema import checked_config, load_config

    again = [word for value in given for word in ("--set", value)]
    if config is not None:
        if model or data:
            raise InputError(
                "train takes a config, or --model and --data, and not both; "
                "--set model.path=… overrides a config's."
            )
        return load_config(config, given), [config, *again]
    if not model or not data:
        raise InputError(
            "train needs a config (lora init writes one), or the base model and the examples: "
            "lora train --model models/MODEL.gguf --data data/train.jsonl"
        )
    name = Path(data).name.partition(".")[0] or "run"
    values = {"model": {"path": model}, "data": {"train": data}, "output": f"runs/{name}"}
    words = ["--model", model, "--data", data, *again]
    return checked_config(values, "lora train", given), words
