"""A stand-in for the Hugging Face Hub on localhost: downloads, listings and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "/org/Tiny-GGUF"


class StandInHub:
    """What downloads, `list_repo_files`, `create_repo` and `create_commit` ask the Hub for.

    Attributes:
        files: path in the repository to contents.
        requests: what was asked, as "METHOD /path".
        gated: whether files are for those who have accepted terms.
        cut: whether the contents stop halfway.
        cache: an empty HF_HOME.
        pushed: path in the repository to contents, of all commits.
        refuses: whether commits are refused.
    """

    def __init__(self, folder: Path) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.gated = False
        self.cut = False
        self.refuses = False
        self.pushed: dict[str, bytes] = {}
        self._large: dict[str, bytes] = {}  # by their SHA-256
        self.cache = folder / "cache"
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_POST(self) -> None:
                hub.take(self)

            def do_PUT(self) -> None:
                hub.take(self)

            def do_GET(self) -> None:
                hub.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path = urlsplit(handler.path).path
        self.requests.append(f"{handler.command} {path}")
        if path.startswith("/cdn/"):
            contents = self.files[path.removeprefix("/cdn/")]
            return send(handler, 200, contents, cut=self.cut)
        if path.startswith(f"/api/models{REPOSITORY}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(contents), "oid": "0" * 40}
                for name, contents in self.files.items()
            ]
            return send(handler, 200, json.dumps(tree).encode(), {"Content-Type": "text/json"})
        if not path.startswith(f"{REPOSITORY}/resolve/"):
            return send(handler, 404, headers={"X-Error-Code": "RepoNotFound"})
        revision, _, file = path.removeprefix(f"{REPOSITORY}/resolve/").partition("/")
        if self.gated:
            return send(handler, 403, headers={"X-Error-Code": "GatedRepo"})
        if revision not in ("main", "v1", COMMIT):
            return send(handler, 404, headers={"X-Error-Code": "RevisionNotFound"})
        commit = {"X-Repo-Commit": COMMIT}
        if file not in self.files:
            return send(handler, 404, headers={"X-Error-Code": "EntryNotFound"} | commit)
        # Large files are at another host, as on the Hub.
        contents = self.files[file]
        etag = hashlib.sha256(contents).hexdigest()
        linked = {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(len(contents))}
        elsewhere = f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{file}"
        return send(handler, 302, headers=commit | linked | {"Location": elsewhere})

    def take(self, handler: BaseHTTPRequestHandler) -> None:
        """Answers what makes a repository and a commit; large files are PUT, as on the Hub."""
        path = urlsplit(handler.path).path
        self.requests.append(f"{handler.command} {path}")
        body = read_body(handler)

        def say(values: object, status: int = 200) -> None:
            send(handler, status, json.dumps(values).encode(), {"Content-Type": "application/json"})

        if path == "/api/repos/create":
            asked = json.loads(body)
            return say({"url": f"{self.url}/{asked.get('organization')}/{asked['name']}"})
        if path == "/api/validate-yaml":
            return say({"errors": [], "warnings": []})
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            large = [name["path"] for name in files if name["path"].endswith(".safetensors")]
            return say({"files": [
                {"path": f["path"], "uploadMode": "lfs" if f["path"] in large else "regular",
                 "shouldIgnore": False, "oid": None} for f in files
            ]})  # fmt: skip
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            return say({"transfer": "basic", "objects": [
                {"oid": o["oid"], "size": o["size"],
                 "actions": {"upload": {"href": f"{self.url}/lfs/{o['oid']}", "header": {}}}}
                for o in objects
            ]})  # fmt: skip
        if path.startswith("/lfs/"):
            self._large[path.removeprefix("/lfs/")] = body
            return send(handler, 200)
        if path.endswith("/commit/main"):
            if self.refuses:
                return say({"error": "You don't have the rights to push here"}, 403)
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    contents = base64.b64decode(entry["value"]["content"])
                    self.pushed[entry["value"]["path"]] = contents
                if entry["key"] == "lfsFile":
                    self.pushed[entry["value"]["path"]] = self._large[entry["value"]["oid"]]
            commit = f"{self.url}/org/mine/commit/{'1' * 40}"
            return say({"commitUrl": commit, "commitOid": "1" * 40})
        return send(handler, 404)

    def environment(self, **more: str) -> dict[str, str]:
        """Of a process that takes this for the Hub."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.cache),
            "NO_PROXY": "127.0.0.1,localhost",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }
        return kept | settings | more

    def resolve(self, *names: str, **environment: str) -> list[str]:
        """Each name's path, or its error's class and message, found in another process.

        Another process, as huggingface_hub reads its environment when it is imported.
        """
        code = (
            "import sys, time\n"
            "time.sleep = lambda _: None  # 23 s between attempts at a host that is not there\n"
            "from lora.storage.stores import resolve_model\n"
            "for name in sys.argv[1:]:\n"
            "    try:\n"
            "        print(resolve_model(name))\n"
            "    except Exception as error:\n"
            "        print(f'{type(error).__name__}: {error}')\n"
        )
        result = subprocess.run(
            [sys.executable, "-c", code, *names],
            capture_output=True,
            text=True,
            env=self.environment(**environment),
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()


def send(
    handler: BaseHTTPRequestHandler,
    status: int,
    contents: bytes = b"",
    headers: dict[str, str] | None = None,
    *,
    cut: bool = False,
) -> None:
    handler.send_response(status)
    for name, value in (headers or {}).items():
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(contents)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(contents[: len(contents) // 2] if cut else contents)
    handler.close_connection = cut


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[StandInHub]:
    stand_in = StandInHub(tmp_path)
    thread = threading.Thread(target=stand_in.server.serve_forever, args=[0.02], daemon=True)
    thread.start()
    yield stand_in
    stand_in.server.shutdown()
    stand_in.server.server_close()
    thread.join()


def read_body(handler: BaseHTTPRequestHandler) -> bytes:
    """Of a request, also one that comes in chunks."""
    if handler.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    body = b""
    while size := int(handler.rfile.readline().split(b";")[0], 16):
        body += handler.rfile.read(size)
        handler.rfile.readline()
    handler.rfile.readline()
    return body
