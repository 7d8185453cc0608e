"""A server in a thread of this process, on a free port, for tests with real clients."""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import uvicorn
from fastapi import FastAPI

from nemo_engine import AsyncEngine
from nemo_engine.server.app import create_app
from nemo_engine.server.options import ServerOptions
from nemo_engine.server.run import uvicorn_config
from nemo_engine.server.service import Service

MODEL = "nemo-tiny"
# float32: what else is in a batch changes the last bits, which in bfloat16 now and then changes a token.
ENGINE_OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "page_size": 16, "num_kv_pages": 400, "max_num_seqs": 32,
    "max_num_batched_tokens": 256, "max_model_len": 1024,
}  # fmt: skip


class LiveServer:
    """``create_app`` over ``engine``, which stays the caller's: several servers may share one.

    Use it as a context manager.
    """

    def __init__(self, engine: AsyncEngine, **options: Any) -> None:
        options.setdefault("log_requests", False)
        server_options = ServerOptions(**options)
        self.app: FastAPI = create_app(engine, server_options, model=MODEL)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn_config(self.app, server_options))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    @property
    def service(self) -> Service:
        """What the routes share."""
        service: Service = self.app.state.service
        return service

    @property
    def num_connections(self) -> int:
        """Connections that are open."""
        return len(self._server.server_state.connections)

    def __enter__(self) -> LiveServer:
        self._thread.start()
        deadline = time.monotonic() + 120
        while not self._server.started:
            assert self._thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(120)
        self._socket.close()
