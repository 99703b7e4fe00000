"""A process that tokenizes pieces: `python -m lora.data.worker`, asked by lora/data/pool.py.

On standard input comes a pickled `Setup`, then pieces; for each the result goes to standard output.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass

from lora.data.pieces import PieceTokenizer, Task, tokenize_piece
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.origin import TokenizerOrigin
from lora.forward.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Setup:
    """What a process is told first."""

    task: Task
    tokenizer: TokenizerOrigin


def main() -> None:
    """Answers until nothing more is asked."""
    asked = sys.stdin.buffer
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what else is printed must not stand between the answers
    setup: Setup = pickle.load(asked)
    tokenizer = PieceTokenizer(setup.task, _opened(setup.tokenizer))
    while True:
        try:
            piece = pickle.load(asked)
        except EOFError:
            return
        pickle.dump(tokenize_piece(tokenizer, piece), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _opened(origin: TokenizerOrigin) -> Tokenizer:
    gguf_file = None if origin.gguf is None else GGUFFile(origin.gguf)
    if origin.file is not None:
        return Tokenizer.from_file(origin.file, gguf_file=gguf_file)
    assert gguf_file is not None  # a tokenizer comes out of one of them
    return Tokenizer.from_gguf(gguf_file)


if __name__ == "__main__":
    main()
