"""A Hugging Face hub on this machine that gives a model, refuses it, or stalls."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "owner/model"


@dataclass
class Hub:
    """``folder`` is the model ``name``. Requests whose path contains ``stalls`` get
    no answer (of a file, half of it); with ``gated`` nobody gets a file. ``pause``: seconds in the
    middle of each."""

    folder: Path
    stalls: str = "\0"
    gated: bool = False
    pause: float = 0.0
    name: str = NAME
    requests: list[str] = field(default_factory=list)
    url: str = ""

    def wait_for(self, part: str, seconds: float = 240.0) -> None:
        """Until something was asked for whose path contains that."""
        until = time.monotonic() + seconds
        while not any(part in path for path in self.requests):
            assert time.monotonic() < until, self.requests
            time.sleep(0.02)

    def environment(self, home: Path) -> dict[str, str]:
        """Variables with which the hub's library uses this hub and an empty cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "",
        }


@contextmanager
def hub(folder: Path, **options: str | bool | float) -> Iterator[Hub]:
    """A hub that serves until the end of the block."""
    state = Hub(folder, **options)  # type: ignore[arg-type]
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            state.requests.append(f"{self.command} {path}")
            file = "/resolve/" in path
            if state.stalls in path and not file:
                over.wait()
            elif state.gated and file:
                self._answer(b"Access to model is restricted.", status=401, code="GatedRepo")
            elif file:
                self._file(path.partition("/resolve/")[2].partition("/")[2])
            elif "/tree/" in path:
                self._json([self._entry(file) for file in sorted(folder.iterdir())])
            elif path.startswith(f"/api/models/{state.name}"):
                names = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
                self._json({"id": state.name, "sha": COMMIT, "siblings": names, "private": False})
            else:
                self._answer(b"Not found", status=404, code="RepoNotFound")

        def _entry(self, file: Path) -> dict[str, object]:
            return {"type": "file", "path": file.name, "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.name.encode()).hexdigest()}  # fmt: skip

        def _json(self, value: object) -> None:
            self._answer(json.dumps(value).encode(), kind="application/json")

        def _file(self, name: str) -> None:
            if not (folder / name).is_file():
                self._answer(b"Entry not found", status=404, code="EntryNotFound")
                return
            data = (folder / name).read_bytes()
            self._answer(data, stalls=state.stalls in name)

        def _answer(
            self, data: bytes, *, status: int = 200, kind: str = "application/octet-stream",
            code: str = "", stalls: bool = False,
        ) -> None:  # fmt: skip
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Content-Type", kind)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
            if code:
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", data.decode())
            self.end_headers()
            if self.command == "HEAD":
                return
            half = len(data) // 2
            self.wfile.write(data[:half])
            self.wfile.flush()
            if stalls:
                over.wait()
                return
            time.sleep(state.pause)
            self.wfile.write(data[half:])

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        over.set()
        server.shutdown()
        server.server_close()
