"""``serve``: runs the server in this process: listens, drains when told to stop, and fails when its engine does."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import resource
import signal
import socket
import ssl
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from nemo_engine.engine.async_engine import AsyncEngine, EngineDeadError
from nemo_engine.server.app import create_app
from nemo_engine.server.batch.worker import BatchWorker
from nemo_engine.server.clients import LOOPBACK_NAMES
from nemo_engine.server.http_protocol import Connections
from nemo_engine.server.options import API_KEY_VARIABLE, ServerOptions
from nemo_engine.server.service import Service
from nemo_engine.server.tracing import Tracing

EXIT_OK = 0
EXIT_FAILED = 1  # the engine's thread ended by an error

_LOOK_AT_ENGINE = 0.5  # seconds
_CLOSE_CONNECTIONS = 3  # seconds that connections get after their requests have ended
_SPARE_FILES = 128  # that connections leave to the rest of the process
_SWITCH_INTERVAL = 0.0005  # seconds after which a thread that encodes or writes lets the engine's and the loop go on

_logger = logging.getLogger("nemo_engine.server")


def serve(model: str | Path, options: ServerOptions, engine_options: dict[str, Any]) -> int:
    """Load ``model`` and serve it until SIGTERM or SIGINT; returns the exit code.

    On the first signal /health fails at once and no request is taken; those that run may finish until
    ``drain_timeout``, which ends them. A second signal ends everything.
    """
    keys = options.keys()  # what is wrong should not cost a load
    Tracing(options.otlp_endpoint).close()
    _check_tls(options)
    _log_requests()
    listener = _listen(options)
    options = _for_address(options, listener, is_open=not keys)
    try:
        with AsyncEngine(model, **engine_options) as engine:
            app = create_app(engine, options, model=str(model))
            gc.collect()
            gc.freeze()  # what stays for good is not looked at in every full collection, which nothing can interrupt
            sys.setswitchinterval(_SWITCH_INTERVAL)
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                return runner.run(_serve(app, listener, options))
    finally:
        listener.close()
        if options.uds is not None:
            Path(options.uds).unlink(missing_ok=True)


def _address_text(listener: socket.socket, options: ServerOptions) -> str:
    """What a client is told to connect to."""
    if options.uds is not None:
        return f"unix:{options.uds}"
    address = listener.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    return f"{'https' if options.ssl_certfile else 'http'}://{host}:{address[1]}"


async def _serve(app: FastAPI, listener: socket.socket, options: ServerOptions) -> int:
    service: Service = app.state.service
    server = _Server(uvicorn_config(app, options), service)
    print(f"nemo-engine: {service.model_name} at {_address_text(listener, options)}", file=sys.stderr, flush=True)
    if service.engine.renderers is not None:
        print(f"nemo-engine: {service.engine.renderers.line()}", file=sys.stderr, flush=True)
    if options.api_key_file is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _read_keys_again, service)
    watcher = asyncio.create_task(server.watch_engine())
    metrics = asyncio.create_task(service.metrics.follow())
    batches: BatchWorker | None = app.state.batches
    if batches is not None:
        batches.start()
    try:
        await server.serve(sockets=[listener])
    finally:
        watcher.cancel()
        metrics.cancel()
        if batches is not None:
            await batches.stop()
        await asyncio.to_thread(service.tracing.close)
    return EXIT_FAILED if service.engine.error is not None else EXIT_OK


def _read_keys_again(service: Service) -> None:
    try:
        service.keys.reload()
    except (ValueError, OSError) as error:
        _logger.error("SIGHUP: the keys stay as they were: %s", error)
    else:
        _logger.warning("SIGHUP: %d keys are accepted", len(service.keys))


def uvicorn_config(app: FastAPI, options: ServerOptions) -> uvicorn.Config:
    """How uvicorn serves ``app``."""
    return uvicorn.Config(
        app,
        http=Connections(options).protocol,  # type: ignore[arg-type]
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_keep_alive=options.keep_alive_timeout,  # type: ignore[arg-type]
        timeout_graceful_shutdown=_CLOSE_CONNECTIONS,
        ssl_certfile=options.ssl_certfile,
        ssl_keyfile=options.ssl_keyfile,
        backlog=4096,
    )


class _Server(uvicorn.Server):
    """Drains before it stops."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first begins the drain, the second ends the requests, a third does not wait for their
        clients.
        """
        if self._service.is_draining:
            self.force_exit = self.should_exit
            self.should_exit = True
            return
        self._service.is_draining = True
        name = signal.Signals(sig).name
        self._loop.call_soon_threadsafe(self._begin_drain, name)

    def _begin_drain(self, name: str) -> None:
        self._draining = asyncio.ensure_future(self._drain(name))

    async def _drain(self, name: str) -> None:
        timeout = self._service.options.drain_timeout
        running = self._service.engine.num_unfinished
        _logger.warning("%s: %d requests may finish within %g s", name, running, timeout)
        with contextlib.suppress(EngineDeadError):  # ``watch_engine`` sees it too
            if not await self._service.engine.drain(timeout):
                _logger.warning("the requests that were left after %g s were ended", timeout)
        self.should_exit = True

    async def watch_engine(self) -> None:
        """Stop the server when the engine's thread has ended by an error: nothing it could answer would be true."""
        while self._service.engine.error is None:
            await asyncio.sleep(_LOOK_AT_ENGINE)
        self.should_exit = True


def _log_requests() -> None:
    """Requests are logged as lines of JSON and nothing else, whatever else is logged."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of tracebacks; ``Access`` sees every error before
    logger = logging.getLogger("nemo_engine.access")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False


def _check_tls(options: ServerOptions) -> None:
    """Raise ``ValueError``, naming the file, for a certificate or a key that cannot be used."""
    if options.ssl_certfile is None or options.ssl_keyfile is None:
        return

    def no_password() -> str:
        raise ValueError(f"ssl_keyfile {options.ssl_keyfile!r} must not need a password")

    try:
        ssl.create_default_context().load_verify_locations(options.ssl_certfile)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(f"ssl_certfile {options.ssl_certfile!r} holds no certificate: {error}") from None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(options.ssl_certfile, options.ssl_keyfile, no_password)
    except (ssl.SSLError, OSError) as error:
        raise ValueError(
            f"ssl_keyfile {options.ssl_keyfile!r} holds no key, or not that of ssl_certfile: {error}"
        ) from None


def _for_address(options: ServerOptions, listener: socket.socket, *, is_open: bool) -> ServerOptions:
    """What follows from where the server listens and whether it has keys: the names that it answers to, and a
    warning.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_FILES
    options = replace(options, max_connections=max(1, min(options.max_connections, limit)))
    if not is_open or options.uds is not None:
        return options
    address = listener.getsockname()[0]
    if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        _logger.warning(
            "anyone who reaches %s may use this server: it has no API keys (--api-key, --api-key-file, %s)",
            address,
            API_KEY_VARIABLE,
        )
    elif options.allowed_hosts is None:
        return replace(options, allowed_hosts=(*LOOPBACK_NAMES, options.host))
    return options


def _listen(options: ServerOptions) -> socket.socket:
    """Bind before the model is loaded: a port in use should not cost a load.

    Allows as many connections as the system does.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if options.uds is not None:
        return _listen_at_path(options.uds)
    try:
        infos = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {options.host!r} is no address: {error}") from None
    family, kind, proto, _, address = infos[0]
    listener = socket.socket(family, kind, proto)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ValueError(f"port {options.port} of {options.host} cannot be listened on: {error.strerror}") from None
    return listener


def _listen_at_path(path: str) -> socket.socket:
    """A Unix socket at ``path``; one that a killed server left behind, to which nobody listens, is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if Path(path).is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(path)
                except ConnectionRefusedError:
                    Path(path).unlink()
                else:
                    raise ValueError(f"uds {path!r}: another process listens there")
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ValueError(f"uds {path!r} cannot be listened on: {error.strerror or error}") from None
    except ValueError:
        listener.close()
        raise
    return listener


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
