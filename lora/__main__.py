"""`python -m lora`, and the installed command `lora`."""

import sys


def main() -> None:
    """Runs the command line."""
    if sys.argv[1:] == ["--version"]:
        # Asked by scripts and in bug reports: said without loading the command line.
        from lora import __version__

        print(f"webgpu-lora {__version__}")
        return
    from lora.commands.cli import main as run_command

    run_command()


if __name__ == "__main__":
    main()
