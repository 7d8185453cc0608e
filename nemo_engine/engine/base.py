"""``BaseEngine``: one model and its loop. ``Engine`` runs the loop in the caller's thread, ``AsyncEngine`` in a thread
of its own.

Puts together input checking, the core and output processing; knows neither model, ops nor tensors.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.engine.core import start_core
from nemo_engine.engine.input_processor import CHAT_MAX_TOKENS, EncodedPrompt, InputProcessor, Params
from nemo_engine.engine.output_processor import OutputProcessor
from nemo_engine.engine.user_request import Sink, UserRequest
from nemo_engine.outputs import RequestView, SchedulerStats, StepRecord
from nemo_engine.sampling_params import RequestOutputKind, SamplingParams
from nemo_engine.scheduler import Request
from nemo_engine.startup_log import StartupLog
from nemo_engine.text import ChatRenderers, Tokenizer, load_tokenizer

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request that has passed every check, not queued yet."""

    user: UserRequest


FORKED = (
    "the engine runs in the process that this one was forked from, whose threads a fork does not copy: start processes "
    "by 'spawn', as "
    "multiprocessing.get_context('spawn') does, or make the engine after the fork, where the parent has used neither "
    "engine nor torch"
)


class _Lock:
    """A reentrant lock that refuses a forked process: there, a hold that another thread had at the fork would never
    end.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._process = os.getpid()

    @property
    def is_forked(self) -> bool:
        """Whether this process is a fork of the one that made the lock."""
        return os.getpid() != self._process

    def check(self) -> None:
        """Raise ``RuntimeError`` in a forked process."""
        if self.is_forked:
            raise RuntimeError(FORKED)

    def __enter__(self) -> None:
        self.check()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class BaseEngine:
    """Takes prepared requests and advances all of them step by step; outputs go to each request's own sink.

    ``options`` are the fields of ``EngineConfig``; an unknown one is a ``ValueError`` that says what to use. Methods
    may be called from any thread. Use it as a context manager, or call ``close()``, to give all memory back. In a
    process that was forked from this one, methods raise ``RuntimeError``.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        self.config = EngineConfig(**options)
        self.startup_log = StartupLog()
        self.tokenizer: Tokenizer | None = None
        self.renderers: ChatRenderers | None = None
        started = start_core(model, self.config, self.startup_log, self._load_tokenizer)
        self._core = started.core
        self._is_closed = False
        self._lock = _Lock()
        self.model_config: ModelConfig = started.model_config
        self.model_path: Path = started.model_path
        self.max_model_len: int = self._core.scheduler.max_model_len
        self.max_num_batched_tokens: int = self._core.scheduler.max_num_batched_tokens
        difference = None if self.tokenizer is None else self.tokenizer.differs_from(self.model_config.vocab_size)
        if difference is not None:
            _logger.warning("%s", difference)
        self._inputs = InputProcessor(self.model_config, self.config, self.renderers, self.max_model_len)
        self._outputs = OutputProcessor(self._core.scheduler, self.tokenizer)
        self.startup_log.log()

    def _load_tokenizer(self, folders: Sequence[Path]) -> int | None:
        """Load the tokenizer of the first of ``folders`` that has one, before the weights are read.

        Returns how many ids it has, or None if no folder has a tokenizer.
        """
        if self.config.skip_tokenizer_init:
            self._check_no_template()
            return None
        option = self.config.tokenizer
        places = folders if option is None else [Path(option)]
        with self.startup_log.stage("load tokenizer"):
            self.tokenizer = next(
                (tokenizer for place in places if (tokenizer := load_tokenizer(place)) is not None), None
            )
        _logger.info("tokenizer: %s", "none" if self.tokenizer is None else self.tokenizer.describe())
        if self.tokenizer is None:
            self._check_no_template()
            return None
        with self.startup_log.stage("try chat template"):
            looked_in = dict.fromkeys([*(place for place in places if place.is_dir()), *folders])
            self.renderers = ChatRenderers(self.tokenizer, list(looked_in), self.config.chat_template)
        _logger.info("%s", self.renderers.line())
        return self.tokenizer.vocab_size

    def _check_no_template(self) -> None:
        if self.config.chat_template is not None:
            raise ValueError("chat_template needs a tokenizer, and this engine has none")

    @property
    def inputs(self) -> InputProcessor:
        """Encodes prompts and conversations and checks parameters, in any thread."""
        self._lock.check()
        return self._inputs

    def check_fits(self, prompt: EncodedPrompt, params: SamplingParams) -> None:
        """Raise ``ValueError`` for a request that could never finish within this context and this cache."""
        self._core.scheduler.max_total_tokens(len(prompt.token_ids), params.max_tokens)

    def room_for(self, num_prompt_tokens: int) -> int:
        """Tokens that a request may generate after a prompt of that length; ``ValueError`` if not even one fits."""
        return self._core.scheduler.max_total_tokens(num_prompt_tokens, None) - num_prompt_tokens

    def chat_params(self, prompts: Sequence[EncodedPrompt], params: Params) -> list[SamplingParams]:
        """The effective parameters of each conversation. Without ``params``, ``max_tokens`` is lowered to what the
        context and the cache still hold.
        """
        effective = self.inputs.params_per_prompt(params, len(prompts), is_chat=True)
        if params is not None:
            return effective
        room = [min(CHAT_MAX_TOKENS, self.room_for(len(prompt.token_ids))) for prompt in prompts]
        return [replace(each, max_tokens=max_tokens) for each, max_tokens in zip(effective, room, strict=True)]

    def prepare(
        self,
        request_id: str,
        prompt: EncodedPrompt,
        params: SamplingParams,
        kind: RequestOutputKind,
        sink: Sink,
        priority: int = 0,
        is_named: bool = True,
        client: str = "",
    ) -> PreparedRequest:
        """Check a request and make it ready for ``submit``; callers that run the loop themselves use it.

        ``inputs`` has made ``prompt`` and ``params``. This takes no lock, so a step may run meanwhile. The thread that
        calls ``advance`` appends the outputs to ``sink``. ``request_id`` is a label; only if ``is_named`` must it be
        unique, and only then does ``abort`` find the request by it. Waiting requests of equal ``priority`` are taken
        from each ``client`` in turn.
        """
        self.check_fits(prompt, params)
        user = UserRequest(request_id, prompt, params, kind, sink, is_named)
        self._outputs.complete(user, self.inputs.requests(request_id, prompt, params, priority, client))
        return PreparedRequest(user)

    def submit(self, prepared: PreparedRequest) -> None:
        """Queue a prepared request, all of its completions or none. Raises ``ValueError`` if its id is in use."""
        user = prepared.user
        with self._lock:
            self._check_open()
            if user.is_named and user.request_id in self._outputs:
                raise ValueError(f"request_id {user.request_id!r} is in use by an unfinished request")
            with self._core.change():
                self._outputs.add(user)

    def advance(self) -> None:
        """Run one step for all requests; new outputs go to the sink of each request.

        RuntimeError if the device is lost. After any other exception the requests that were running end with it, and
        the next call goes on.
        """
        with self._lock:
            self._check_open()
            with self._core.change():
                committed = self._core.step()
                if committed is None:
                    return
                try:
                    self._outputs.process(committed)
                except Exception as error:
                    _logger.exception("the outputs of a step could not be made")
                    message = f"the outputs of a step could not be made: {type(error).__name__}: {error}"
                    self._outputs.process(self._core.fail(message))

    def abort(self, request_id: str | Sequence[str]) -> None:
        """End requests with all their completions; the next ``step()`` returns their last outputs, as "abort".

        Ids that no unfinished request has are passed over. If an id is no string, it raises ``ValueError`` and ends
        nothing.
        """
        ids = check_ids(request_id)
        with self._lock, self._core.change():
            for known_id in ids:
                self._outputs.abort(known_id)

    def withdraw(self, prepared: Iterable[PreparedRequest]) -> None:
        """End submitted requests as ``abort`` does, whether or not they are named."""
        with self._lock, self._core.change():
            for request in prepared:
                self._outputs.abort(request.user)

    @property
    def is_dead(self) -> bool:
        """Whether the device is lost, so that ``advance`` will do nothing but raise."""
        return self._core.is_dead

    def has_work(self) -> bool:
        """Whether ``advance`` has something to do: a request is unfinished, or a step in flight holds memory until it
        is committed.
        """
        with self._lock:
            return len(self._outputs) > 0 or self._core.has_work()

    def settle(self) -> None:
        """Prepare this thread to run the steps while other threads serve the outputs. Call it in the thread that will
        call ``advance``, before the first step.
        """
        self._core.runner.settle()

    def num_waiting_of(self, client: str | None) -> int:
        """Completions of ``client``, or of all for None, that wait. Takes no lock."""
        waiting = self._core.scheduler.waiting
        return len(waiting) if client is None else waiting.count_of(client)

    def stats(self) -> SchedulerStats:
        """Requests and pages at this moment, and totals since the start."""
        with self._lock:
            return self._core.scheduler.stats()

    @property
    def last_step_id(self) -> int:
        """The last step that was committed; 0 before the first."""
        history = self._core.history
        return history[-1].step_id if history else 0

    def steps_since(self, step_id: int) -> list[StepRecord]:
        """The records of the steps after ``step_id``, oldest first; the last ``core.HISTORY`` steps are remembered."""
        with self._lock:
            recent = takewhile(lambda record: record.step_id > step_id, reversed(self._core.history))
            return list(recent)[::-1]

    def page_states(self) -> bytes:
        """A byte for each page of the KV cache: 0 free, 1 free with cached content, 2 in use, 3 in use by several."""
        with self._lock:
            return self._core.scheduler.kv.pool.states()

    def cached_pages(self, token_ids: Sequence[int]) -> list[int]:
        """The cached pages that a prompt of ``token_ids`` would reuse now, in order, as indices into ``page_states``.

        Looking does not count as a use of them.
        """
        request = Request("", token_ids, SamplingParams())
        with self._lock:
            return [page - 1 for page in self._core.scheduler.kv.match(request)]

    def requests(self, limit: int) -> list[RequestView]:
        """At most ``limit`` unfinished completions: first those that run, by arrival; then those that wait, in the
        order in which they will be admitted if no other request comes.
        """
        with self._lock:
            return self._outputs.views(limit)

    def count_saturated_kv(self) -> tuple[int, int]:
        """How much of an FP8 KV cache is saturated: (entries at its largest number, entries that are not 0).

        Reads the whole cache. Other caches give (0, 0).
        """
        with self._lock:
            self._check_open()
            return self._core.runner.count_saturated()

    def reset_prefix_cache(self) -> None:
        """Forget all cached prefixes; running requests are not disturbed."""
        with self._lock, self._core.change():
            self._core.scheduler.kv.pool.forget_all()

    def close(self) -> None:
        """End all requests and give all memory back. May be called twice; any other call then raises RuntimeError.

        In a forked process it does nothing: the engine is the parent's.
        """
        if self._lock.is_forked:
            return
        with self._lock:
            if not self._is_closed:
                self._is_closed = True
                self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the engine is closed")


def check_ids(request_id: object) -> list[str]:
    """One id or several as a list; ``ValueError`` if one is no string."""
    if isinstance(request_id, str):
        return [request_id]
    if not isinstance(request_id, Iterable):
        raise ValueError(f"request_id must be a string or a list of strings, got {request_id!r}")
    ids = list(request_id)
    for index, element in enumerate(ids):
        if not isinstance(element, str):
            raise ValueError(f"request_id[{index}] must be a string, got {element!r}")
    return ids
