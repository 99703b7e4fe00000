"""What is under way, where a command has nothing to print for a while."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from lora.commands.progress import clock
from lora.shaders.errors import for_terminal
from lora.shaders.stages import stages_told


class _Line:
    """What is under way and for how long, in one line however narrow the terminal is."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._begun = time.monotonic()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Made anew several times a second."""
        shown = f"{for_terminal(self.what)} … · {clock(time.monotonic() - self._begun)}"
        yield Text(shown, style="dim", no_wrap=True, overflow="ellipsis")


@contextmanager
def waiting(what: str = "Starting") -> Iterator[Callable[[str], None]]:
    """Shows a line on stderr during the block, which prints nothing itself; then it is gone.

    On stderr, since stdout may be a file or a pipe that somebody waits for all the same. Where
    stderr is no terminal, or one that can't go back a line, nothing is shown.

    Args:
        what: is under way at first.

    Yields:
        What says something else; the stages of what is opened say it by themselves.
    """
    console, line = Console(stderr=True), _Line(what)

    def tell(now: str) -> None:
        line.what = now

    with stages_told(tell):
        if not console.is_terminal or console.is_dumb_terminal:
            yield tell
            return
        # What else is said on stderr goes above the line; stdout is somewhere else.
        live = Live(line, console=console, transient=True, redirect_stdout=False)
        with live, _noticing_ctrl_c(partial(tell, "Stopping")):
            yield tell


@contextmanager
def _noticing_ctrl_c(notice: Callable[[], None]) -> Iterator[None]:
    """Calls `notice` at once, on another thread; KeyboardInterrupt comes as ever.

    That is when the main thread is back from the driver, which may have the work of seconds.
    """
    if threading.current_thread() is not threading.main_thread():  # none else may ask for signals
        yield
        return
    told, woken = socket.socketpair()
    woken.setblocking(False)

    def listen() -> None:
        with suppress(OSError):
            for number in iter(lambda: told.recv(1), b""):
                if number[0] == signal.SIGINT:
                    notice()

    listening = threading.Thread(target=listen, daemon=True)
    previous = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    listening.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        woken.close()
        listening.join(timeout=1)
        told.close()
