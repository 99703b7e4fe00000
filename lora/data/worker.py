"""A process that tokenizes pieces: `python -m lora.data.worker`, asked by lora/data/pool.py.

On standard input comes a pickled `Setup`, then pieces; for each the result goes to standard output.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
from dataclasses import dataclass
from typing import Any

from lora.data.pieces import PieceTokenizer, Task, tokenize_piece
from lora.forward.gguf.file import GGUFFile
from lora.forward.text.bounded import become_bounded
from lora.forward.text.origin import TokenizerOrigin
from lora.forward.text.tokenizer import Tokenizer

SECONDS_A_ROW = 20.0  # of the processor
_BYTES_A_SECOND = 20_000.0  # further time for long rows


@dataclass(frozen=True)
class Setup:
    """What a process is told first."""

    task: Task
    tokenizer: TokenizerOrigin


def main() -> None:
    """Answers until nothing more is asked."""
    become_bounded()  # what files prescribe runs right here, in the time that a row has
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
        pickle.dump(tokenize_piece(tokenizer, piece, _limit_time), answers, pickle.HIGHEST_PROTOCOL)
        answers.flush()


def _limit_time(raw: Any) -> None:
    """Ends this process if a row takes longer than any honest one: a template is a program."""
    if hasattr(signal, "setitimer"):  # not on Windows
        size = len(raw) if isinstance(raw, bytes) else 0
        # Of the processor, so that a busy machine refuses nothing.
        signal.setitimer(signal.ITIMER_PROF, SECONDS_A_ROW + size / _BYTES_A_SECOND)


def _opened(origin: TokenizerOrigin) -> Tokenizer:
    gguf_file = None if origin.gguf is None else GGUFFile(origin.gguf)
    if origin.file is not None:
        return Tokenizer.from_file(origin.file, gguf_file=gguf_file)
    assert gguf_file is not None  # a tokenizer comes out of one of them
    return Tokenizer.from_gguf(gguf_file)


if __name__ == "__main__":
    main()
