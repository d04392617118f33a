"""A Hugging Face hub on this machine: one public data set, all else gated or unknown."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT, BLOB = "0" * 40, "1" * 40


def _handler(files: Mapping[str, bytes]) -> type[BaseHTTPRequestHandler]:
    entries = [
        {"type": "file", "path": name, "size": len(content), "oid": BLOB}
        for name, content in files.items()
    ]
    facts = {"id": "owner/chats", "sha": COMMIT, "private": False, "gated": False, "tags": [],
             "siblings": [{"rfilename": name} for name in files]}  # fmt: skip

    class Hub(BaseHTTPRequestHandler):
        """The parts of the hub's interface that datasets 4 and huggingface_hub 1 ask for."""

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            if "gated" in path:
                self._answer(403, b"", error="GatedRepo")
            elif path.startswith("api/datasets/owner/chats"):
                content: Any = entries if "/tree/" in path else facts
                self._answer(200, json.dumps(content).encode())
            elif path.startswith("datasets/owner/chats/resolve/"):
                content = files.get(path.split("/", 5)[5])
                if content is None:
                    self._answer(404, b"", error="EntryNotFound")
                else:
                    self._answer(200, content)
            else:
                self._answer(404, b"", error="RepoNotFound")

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, status: int, body: bytes, *, error: str | None = None) -> None:
            self.send_response(status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)),
                       "ETag": f'"{BLOB}"', "X-Repo-Commit": COMMIT}  # fmt: skip
            for name, value in (headers | ({"X-Error-Code": error} if error else {})).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    return Hub


@contextmanager
def fake_hub(files: Mapping[str, bytes]) -> Iterator[str]:
    """Serve ``owner/chats`` with these files while the block runs; yield the hub's address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(files))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
