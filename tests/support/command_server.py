"""Commands of `lora` and scripts, each in a fork of a process that has imported everything already.

A command of a process of its own takes Python two seconds to begin, and its kernels are those of
real runs. Here it begins at once, with kernels in their shortest forms (short_kernels.py); exit
status, output and what it leaves are its own. Tests of how a process begins or is ended by a signal
start one.

    python -m tests.support.command_server
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).parents[2]
# A command loads the implementation of WebGPU that it takes, of which one may not be installed.
_LEFT_TO_COMMANDS = ("lora.__main__", "lora.shaders.native", "lora.shaders.dawn")


def run_lora(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """What `subprocess.run([sys.executable, "-m", "lora", …], capture_output=True)` returns."""
    return _asked(None, arguments, environment)


def run_script(path: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The same of a script."""
    return _asked(str(path), arguments, {})


def _asked(
    script: str | None, arguments: Sequence[object], environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    words = [script or "lora", *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        shown, said = (Path(folder) / name for name in ("stdout", "stderr"))
        request = {
            "script": script, "words": words, "environment": {**os.environ, **environment},
            "folder": os.getcwd(), "stdout": str(shown), "stderr": str(said),
        }  # fmt: skip
        server = _server()
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, "the server of commands has ended"
        # As a pipe that is read as text gives it.
        return subprocess.CompletedProcess(
            words, int(answer), *(path.read_text() for path in (shown, said))
        )


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.support.command_server"], cwd=_REPOSITORY,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    atexit.register(_end, server)
    return server


def _end(server: subprocess.Popen[str]) -> None:
    with server:  # closes its input, at whose end it leaves
        pass


def serve() -> None:
    """Runs what is asked for on the standard input until that ends, one after the other."""
    import lora
    from tests.support.short_kernels import short_kernels

    for module in pkgutil.walk_packages(lora.__path__, "lora."):
        if module.name not in _LEFT_TO_COMMANDS:
            importlib.import_module(module.name)
    with short_kernels():
        for line in sys.stdin:
            child = os.fork()
            if child == 0:
                _run(json.loads(line))
            _, status = os.waitpid(child, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)


def _run(request: dict[str, Any]) -> None:
    """Becomes that command; does not return."""
    for number, (path, flags) in enumerate(
        ((os.devnull, os.O_RDONLY), (request["stdout"], os.O_WRONLY | os.O_CREAT),
         (request["stderr"], os.O_WRONLY | os.O_CREAT))
    ):  # fmt: skip
        os.dup2(os.open(path, flags, 0o600), number)
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["words"]
    code: object = 0
    try:
        if request["script"]:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            runpy.run_module("lora", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


if __name__ == "__main__":
    serve()
