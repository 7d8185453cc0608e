"""Replicas on Ray Serve: each is an engine behind the very application of ``nemo_engine.server``, so routes, limits and
errors are the same.

Serve places, watches, scales and drains them. Needs the extra ``ray``. ``build_app`` is what ``serve run
nemo_engine.ray:build_app`` and a YAML for ``serve deploy`` name.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from nemo_engine.checks import check_int
from nemo_engine.config import EngineConfig
from nemo_engine.engine.async_engine import AsyncEngine, EngineDeadError
from nemo_engine.option_names import refuse_unknown_arguments
from nemo_engine.scaling import replicas_wanted
from nemo_engine.server.app import create_app
from nemo_engine.server.options import ServerOptions

try:
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingContext, RequestRouterConfig
except ImportError as error:
    raise ImportError(f"replicas need Ray ({error}): pip install 'nemo-engine[ray]'") from error

_ARGUMENTS = {"model", "engine", "server", "num_replicas", "min_replicas", "max_replicas", "session_affinity", "name"}
_NOT_HERE = ("host", "port", "uds", "ssl_certfile", "ssl_keyfile", "max_connections")  # what Serve's proxy does
_SESSIONS = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
_BY_SESSION = "hdr(x-session-id)"  # HAProxy's name for the same
_HEALTH_PERIOD = 5.0  # seconds


class Replica:
    """One engine and its application.

    ``engine`` and ``server`` are the fields of ``EngineConfig`` and ``ServerOptions``.
    """

    async def __init__(self, model: str, engine: Mapping[str, Any], server: Mapping[str, Any]) -> None:  # type: ignore[misc]
        self._engine = await asyncio.to_thread(AsyncEngine, model, **engine)
        self._app = create_app(self._engine, ServerOptions(**server), model=model)
        metrics = self._app.state.service.metrics
        metrics.name_engine(serve.get_replica_context().replica_id.unique_id)
        self._metrics = asyncio.get_running_loop().create_task(metrics.follow())

    def __serve_build_asgi_app__(self) -> Any:
        """Serve's hook: the application that this replica serves."""
        return self._app

    async def check_health(self) -> None:
        """Serve's hook: raises where the engine has stopped, and Serve then starts another replica."""
        if not self._engine.is_ready:
            raise self._engine.error or EngineDeadError("the engine has stopped")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve's hook: what ``scale_by_load`` goes by."""
        stats = self._engine.stats()
        return {
            "running": float(stats.num_running),
            "waiting": float(self._app.state.service.num_waiting),
            "kv_use": 1 - stats.num_free_pages / stats.num_pages,
            "slots": float(self._engine.config.max_num_seqs),
        }

    async def __del__(self) -> None:  # noqa: PLE0302
        """Serve's hook: the requests have ended, or had their time."""
        self._metrics.cancel()
        await asyncio.to_thread(self._engine.close)


def scale_by_load(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """How many replicas there should be, by what they say of themselves: see ``replicas_wanted``."""
    now = context.current_num_replicas
    metrics: dict[str, dict[Any, Any]] = context.raw_metrics or {}

    def latest(name: str) -> list[float]:
        return [points[-1].value for points in metrics.get(name, {}).values() if points]

    wanted = replicas_wanted(
        now, sum(latest("running")), sum(latest("waiting")), max(latest("kv_use"), default=0.0),
        max(latest("slots"), default=1.0),
    )  # fmt: skip
    return max(context.capacity_adjusted_min_replicas, min(wanted, context.capacity_adjusted_max_replicas)), {}


def build_app(args: Mapping[str, Any]) -> Any:
    """The Serve application of ``args``. Raises ``ValueError`` for what is wrong before anything is placed.

    model: as ``Engine`` takes it. engine, server: the fields of ``EngineConfig`` and ``ServerOptions``. num_replicas: 1
    by default; or min_replicas and max_replicas, between which ``scale_by_load`` decides. session_affinity: requests
    with the same header ``x-session-id`` go to the same replica, which has their prefix in its cache, and to the next
    on the ring if that is gone. name: of the deployment.
    """
    args = dict(args)
    unknown = {name: args.pop(name) for name in list(args) if name not in _ARGUMENTS}
    refuse_unknown_arguments(_arguments, unknown)
    return _arguments(**args)


def _arguments(
    model: str | None = None,
    engine: Mapping[str, Any] | None = None,
    server: Mapping[str, Any] | None = None,
    num_replicas: int | str | None = None,
    min_replicas: int | str | None = None,
    max_replicas: int | str | None = None,
    session_affinity: bool | str = False,
    name: str = "nemo-engine",
) -> Any:
    if not model or not isinstance(model, str):
        raise ValueError(f"model must be a directory, a Hub repository id or nemo-tiny, got {model!r}")
    num_replicas, min_replicas, max_replicas = (
        _count(*given)
        for given in (("num_replicas", num_replicas), ("min_replicas", min_replicas), ("max_replicas", max_replicas))
    )
    if session_affinity in ("true", "false"):
        session_affinity = session_affinity == "true"
    if not isinstance(session_affinity, bool):
        raise ValueError(f"session_affinity must be true or false, got {session_affinity!r}")
    engine, server = dict(engine or {}), dict(server or {})
    for option in _NOT_HERE:
        if option in server:
            raise ValueError(f"server.{option} is not for a replica: Serve's proxy listens (http_options)")
    if "batch_dir" in server:
        raise ValueError("server.batch_dir is for one server: a folder of files is not shared by replicas")
    config, options = EngineConfig(**engine), ServerOptions(**server)
    if (min_replicas is None) != (max_replicas is None):
        raise ValueError("min_replicas and max_replicas go together: give both or neither")
    if num_replicas is not None and max_replicas is not None:
        raise ValueError("num_replicas does not go with min_replicas and max_replicas")
    placing: dict[str, Any] = {"num_replicas": 1 if num_replicas is None else num_replicas}
    if max_replicas is not None:
        policy = {"policy_function": "nemo_engine.ray:scale_by_load"}
        placing = {
            "autoscaling_config": AutoscalingConfig(min_replicas=min_replicas, max_replicas=max_replicas, policy=policy)
        }
    if session_affinity and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":  # it chooses, and asks no router
        balance = os.environ.get("RAY_SERVE_HAPROXY_BALANCE_ALGORITHM")
        if balance != _BY_SESSION:
            raise ValueError(
                "session_affinity with RAY_SERVE_ENABLE_HA_PROXY=1 needs RAY_SERVE_HAPROXY_BALANCE_ALGORITHM="
                f"{_BY_SESSION!r} on every node, got {balance!r}"
            )
    elif session_affinity:
        placing["request_router_config"] = RequestRouterConfig(request_router_class=_SESSIONS)
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name=name,
        max_ongoing_requests=config.max_num_seqs + options.max_queue,
        graceful_shutdown_timeout_s=options.drain_timeout,
        health_check_period_s=_HEALTH_PERIOD,
        ray_actor_options={
            "num_gpus": 0 if config.device == "cpu" else 1
        },  # a whole one: the engine plans for all of its memory
        **placing,
    )
    return deployment.bind(model, engine, server)


def _count(name: str, value: int | str | None) -> int | None:
    """A number of replicas, which ``serve run`` gives as text."""
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    return None if value is None else check_int(name, value, low=1)
