"""`python -m lora`: the command line."""

from lora.commands.cli import main

main()
