"""``ServerOptions``: how the server listens, whom it lets in, and its limits.

What the engine does is ``EngineConfig``.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_engine.sampling_params import SamplingParams

API_KEY_VARIABLE = "NEMO_ENGINE_API_KEY"
DEFAULTS_THAT_MAY_BE_SET = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
                            "frequency_penalty", "max_tokens")  # fmt: skip
_SIZES_AND_TIMES = (
    "max_request_mib",
    "max_bodies_mib",
    "max_batch_file_mib",
    "header_timeout",
    "body_timeout",
    "keep_alive_timeout",
    "send_timeout",
    "request_timeout",
    "drain_timeout",
)
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """The options of ``nemo-engine serve``.

    host: address to listen on; 0.0.0.0 for all.
    port: to listen on; 0 takes a free one.
    uds: path of a Unix socket to listen on instead; whoever may write to it may ask.
    served_model_name: names that requests may use for the model; the first is the one in responses; None takes the name
        that was given.
    api_key: accepted keys, each as KEY or as NAME:KEY, whose name stands in logs and metrics; without this,
        api_key_file and the variable NEMO_ENGINE_API_KEY, anyone may ask.
    api_key_file: a file with one key a line, read again on SIGHUP.
    allowed_hosts: names that the header Host may have, "*.NAME" for all below a name, "*" for any; None takes the names
        of this machine's loopback if the server listens there and has no keys, and any otherwise.
    cors_origin: origins whose pages may call the server from a browser, or "*".
    max_request_mib: largest body of a request, in MiB.
    max_bodies_mib: largest size of all bodies together that are being received, in MiB.
    max_connections: open connections; more get status 503.
    header_timeout: seconds in which the head of a request must arrive, and in which a new connection must begin one.
    body_timeout: seconds in which the body must arrive.
    keep_alive_timeout: seconds that a connection may stay without a request after an answer.
    send_timeout: seconds after which a client that reads nothing of its answer is cut off.
    max_queue: requests that may wait for a place in the batch; more get status 429.
    max_queue_per_key: completions of one key that may wait.
    fairness_header: a header, set by a proxy, whose values take turns as keys do.
    max_prompt_tokens: longest prompt that is taken.
    max_completion_tokens: most tokens that a request may generate.
    max_completions: most completions per request, ``n`` times the number of prompts.
    request_timeout: seconds after which a request is ended; a request may ask for less with ``timeout``.
    drain_timeout: seconds that running requests get to finish after SIGTERM.
    ssl_certfile: TLS certificate.
    ssl_keyfile: its key.
    log_requests: one line of JSON per request on stderr.
    log_prompts: with prompts and answers.
    metrics_prefix: what the names in /metrics start with; "vllm" lets dashboards made for vLLM work.
    page: serve the page at /.
    default_sampling_params: sampling parameters for requests that do not set them, over the model's own.
    system_placement: where chat puts the system prompt: "last" (before the last user message, as the model was trained)
        or "first" (stays in the prefix cache from turn to turn).
    trust_request_chat_template: take the field chat_template of requests; a template is code, run with limits but run.
    batch_dir: a folder for the files and results of /v1/files and /v1/batches, which without it are refused; batches
        that are not finished go on when a server is started with it again.
    max_batch_file_mib: largest such file, in MiB.
    otlp_endpoint: where to send OpenTelemetry spans; needs the extra otel.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    served_model_name: Sequence[str] | None = None
    api_key: Sequence[str] | None = None
    api_key_file: str | None = None
    allowed_hosts: Sequence[str] | None = None
    cors_origin: Sequence[str] | None = None
    max_request_mib: float = 16.0
    max_bodies_mib: float = 256.0
    max_connections: int = 4096
    header_timeout: float = 10.0
    body_timeout: float = 60.0
    keep_alive_timeout: float = 75.0
    send_timeout: float = 60.0
    max_queue: int = 1024
    max_queue_per_key: int | None = None
    fairness_header: str | None = None
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_completions: int = 128
    request_timeout: float | None = None
    drain_timeout: float = 30.0
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    log_requests: bool = True
    log_prompts: bool = False
    metrics_prefix: str = "nemo_engine"
    page: bool = True
    default_sampling_params: dict[str, str] | None = None
    system_placement: str = "last"
    trust_request_chat_template: bool = False
    batch_dir: str | None = None
    max_batch_file_mib: float = 512.0
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        _check_int("port", self.port, 0, 65535)
        for name in ("max_connections", "max_queue", "max_completions"):
            _check_int(name, getattr(self, name), 1)
        for name in ("max_queue_per_key", "max_prompt_tokens", "max_completion_tokens"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 1)
        for name in _SIZES_AND_TIMES:
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if value is not None and (not is_number or value < 0 or (value == 0 and name != "drain_timeout")):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        if self.system_placement not in ("last", "first"):
            raise ValueError(f'system_placement must be "last" or "first", got {self.system_placement!r}')
        if not self.metrics_prefix.isidentifier():
            raise ValueError(
                "metrics_prefix must be letters, digits and underscores, not starting with a digit, got "
                f"{self.metrics_prefix!r}"
            )
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("ssl_certfile and ssl_keyfile go together: give both or neither")
        for name in ("ssl_certfile", "ssl_keyfile", "api_key_file"):
            value = getattr(self, name)
            if value is not None and not Path(value).is_file():
                raise ValueError(f"{name} must be a file that exists, got {value!r}")
        if self.batch_dir is not None and not Path(self.batch_dir).is_dir():
            raise ValueError(f"batch_dir must be a folder that exists, got {self.batch_dir!r}")
        for name in ("api_key", "served_model_name", "allowed_hosts"):
            for value in getattr(self, name) or ():
                if not isinstance(value, str) or not value.strip():
                    raise ValueError(f"{name} must not be empty, got {value!r}")
        if self.fairness_header is not None and not _HEADER_NAME.fullmatch(self.fairness_header):
            raise ValueError(f"fairness_header must be the name of a header, got {self.fairness_header!r}")
        self.sampling_defaults()

    def keys(self) -> tuple[bytes, ...]:
        """All accepted API keys, with their names: of the options, the file and the environment.

        Empty: the server is open.
        """
        api_keys = list(self.api_key or ())
        if self.api_key_file is not None:
            lines = Path(self.api_key_file).read_text().splitlines()
            of_file = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
            if not of_file:
                raise ValueError(f"api_key_file {self.api_key_file!r} holds no key")
            api_keys += of_file
        api_keys += [key for key in os.environ.get(API_KEY_VARIABLE, "").split(",") if key.strip()]
        return tuple(dict.fromkeys(key.strip().encode() for key in api_keys))

    def sampling_defaults(self) -> dict[str, Any]:
        """``default_sampling_params`` as numbers, checked."""
        defaults: dict[str, Any] = {}
        for name, text in (self.default_sampling_params or {}).items():
            if name not in DEFAULTS_THAT_MAY_BE_SET:
                raise ValueError(f"default_sampling_params takes {', '.join(DEFAULTS_THAT_MAY_BE_SET)}, got {name!r}")
            try:
                defaults[name] = int(text) if name in ("top_k", "max_tokens") else float(text)
            except (TypeError, ValueError):
                raise ValueError(f"default_sampling_params {name} must be a number, got {text!r}") from None
        SamplingParams(**defaults)
        return defaults


def _check_int(name: str, value: object, low: int, high: int | None = None) -> None:
    limit = f"at least {low}" if high is None else f"in [{low}, {high}]"
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be an integer {limit}, got {value!r}")
