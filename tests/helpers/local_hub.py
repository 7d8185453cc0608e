"""A small Hugging Face Hub on this machine: what huggingface_hub asks of the real one, for folders, with a record of
what was asked.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LocalHub:
    """``repos`` by id; with a ``token``, nothing is told without it. ``asked``: (method, path, bytes sent)."""

    repos: dict[str, Path]
    token: str | None = None
    url: str = ""
    asked: list[tuple[str, str, int]] = field(default_factory=list)


@contextmanager
def serve(repos: dict[str, Path], token: str | None = None) -> Iterator[LocalHub]:
    """Serve ``repos`` on a free port."""
    hub = LocalHub(repos, token)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(has_body=True)

        def do_HEAD(self) -> None:
            self._answer(has_body=False)

        def log_message(self, *_: object) -> None:
            pass

        def _answer(self, *, has_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            status, headers, body = self._content(path)
            if has_body and status == 200 and "Range" in self.headers:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()  # type: ignore[union-attr]
                end = min(len(body), int(last) + 1) if last else len(body)
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(body)}"
                status, body = 206, body[int(first) : end]
            hub.asked.append((self.command, path, len(body) if has_body else 0))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if has_body:
                self.wfile.write(body)

        def _content(self, path: str) -> tuple[int, dict[str, str], bytes]:
            if hub.token is not None and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return 401, {}, b""
            for repo, folder in hub.repos.items():
                files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
                if path.startswith(f"/api/models/{repo}/tree/"):
                    rows = [
                        {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                        for name, content in files.items()
                    ]
                    return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
                if path in (
                    f"/api/models/{repo}",
                    f"/api/models/{repo}/revision/main",
                    f"/api/models/{repo}/revision/{COMMIT}",
                ):
                    told = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                    return 200, {"Content-Type": "application/json"}, json.dumps(told).encode()
                asked = re.fullmatch(rf"/{re.escape(repo)}/resolve/[^/]+/(.+)", path)
                if asked and asked[1] in files:
                    content = files[asked[1]]
                    tag = hashlib.sha1(content).hexdigest()
                    return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, content
                if asked:
                    return 404, {"X-Error-Code": "EntryNotFound"}, b""
            return 404, {"X-Error-Code": "RepoNotFound"}, b""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
