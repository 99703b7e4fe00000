"""Children that end with this process, however it ends.

A child reads a pipe whose other end its parent alone holds: once that is closed, by the end of the
parent at the latest, the child ends too. No system call of one platform is needed, and nothing runs
between fork and exec, where threads of the GPU's driver would be in the way.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence


def run_module(
    module: str,
    arguments: Sequence[str] = (),
    *,
    timeout: float | None = None,
    environment: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs `python -m module` to its end, in a child whose output is kept.

    Args:
        environment: by default this process's.

    Raises:
        subprocess.TimeoutExpired: it took longer than `timeout` seconds, and was ended.
        OSError: it can't be started.
    """
    watched, held = os.pipe()
    try:
        return subprocess.run(
            [sys.executable, "-m", "lora.storage.children", module, *arguments],
            stdin=watched, capture_output=True, text=True, timeout=timeout, env=environment,
        )  # fmt: skip
    finally:
        os.close(watched)
        os.close(held)


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
