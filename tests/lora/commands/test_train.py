"""What `lora train` says at its end."""

from __future__ import annotations

import os
import subprocess
import sys


def test_the_last_words_find_a_reader() -> None:
    """Ctrl-C ends the `tee` of `lora train | tee log`, too."""
    code = "from lora.commands.train import say_last; say_last(['Stopped.', 'Go on'])"
    for reader_is_there in (True, False):
        read, write = os.pipe()
        if not reader_is_there:
            os.close(read)
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, text=True
        )
        os.close(write)
        if reader_is_there:
            assert os.read(read, 100) == b"Stopped.\nGo on\n" and done.stderr == ""
            os.close(read)
        else:
            assert done.stderr.startswith("Stopped.\nGo on\n")
