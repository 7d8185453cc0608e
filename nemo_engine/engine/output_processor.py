"""Turns committed steps into what users see: text, deltas, log-probabilities, finish reasons and times.

Work is done per token only for requests that need it (streaming, stop strings, log-probabilities); the others are
looked at when they finish.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from itertools import chain, islice

from nemo_engine.engine.user_request import Completion, UserRequest
from nemo_engine.outputs import Logprob, RequestView
from nemo_engine.sampling_params import RequestOutputKind
from nemo_engine.scheduler import Request, RequestStatus, Scheduler, StepOutput
from nemo_engine.step import TokenLogprobs
from nemo_engine.text import Detokenizer, Tokenizer

_logger = logging.getLogger("nemo_engine")


class OutputProcessor:
    """Keeps the user requests under way, and brings their outputs to their sinks.

    Users' ids are labels, by which those who gave them find their requests again; everything else here is known by the
    object.
    """

    def __init__(self, scheduler: Scheduler, tokenizer: Tokenizer | None) -> None:
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._users: dict[UserRequest, None] = {}
        self._by_id: dict[str, UserRequest] = {}  # of the named
        self._completions: dict[Request, Completion] = {}
        self._attended: dict[Request, Completion] = {}  # those of users that want every step

    def __len__(self) -> int:
        return len(self._users)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._by_id

    def add(self, user: UserRequest) -> None:
        """Take charge of ``user`` and queue its completions.

        If that raises, ``process`` is to be told of a failure, and removes what was.
        """
        user.metrics.queued_ts = time.monotonic()
        try:
            for completion in user.completions:
                self._completions[completion.request] = completion
                if user.wants_every_step:
                    self._attended[completion.request] = completion
                self._scheduler.add(completion.request)
            if user.is_named:
                self._by_id[user.request_id] = user
            self._users[user] = None
        except BaseException:
            self._forget(user)
            raise

    def complete(self, user: UserRequest, requests: list[Request]) -> None:
        """Give ``user`` its completions, which are to be made by ``requests``.

        Changes nothing here, and may be called in any thread.
        """
        params = user.params
        for index, request in enumerate(requests):
            detokenizer = None
            if self._tokenizer is not None and params.detokenize:
                detokenizer = Detokenizer(
                    self._tokenizer,
                    stop=tuple(params.stop or ()),
                    include_stop_str_in_output=params.include_stop_str_in_output,
                    skip_special_tokens=params.skip_special_tokens,
                    spaces_between_special_tokens=params.spaces_between_special_tokens,
                    min_tokens=params.min_tokens,
                    mark_token_id=self._tokenizer.tool_calls_id,
                )
            user.completions.append(Completion(user, index, request, detokenizer))

    def _forget(self, user: UserRequest) -> None:
        for completion in user.completions:
            self._completions.pop(completion.request, None)
            self._attended.pop(completion.request, None)
        if self._by_id.get(user.request_id) is user:
            del self._by_id[user.request_id]
        self._users.pop(user, None)

    def views(self, limit: int) -> list[RequestView]:
        """At most ``limit`` completions: those that run in order of arrival, then those that wait as they are to come.

        O(completions).
        """
        running = [entry for entry in self._completions.values() if entry.request.status is RequestStatus.RUNNING]
        waiting = (self._completions.get(request) for request in self._scheduler.waiting)
        now = time.monotonic()
        shown = islice(chain(running, filter(None, waiting)), limit)
        return [self._view(completion, now) for completion in shown]

    def _view(self, completion: Completion, now: float) -> RequestView:
        request = completion.request
        num_computed = min(request.num_computed_tokens, max(0, request.max_total_tokens - 1))
        is_prefilling = num_computed < len(request.token_ids) - 1
        is_running = request.status is RequestStatus.RUNNING
        return RequestView(
            request_id=completion.owner.request_id + (f"#{completion.index}" if completion.owner.params.n > 1 else ""),
            state="waiting" if not is_running else "prefill" if is_prefilling else "decode",
            age=now - completion.owner.metrics.arrival_time,
            num_prompt_tokens=request.num_prompt_tokens,
            num_cached_tokens=request.num_cached_tokens,
            num_computed_tokens=num_computed,
            num_output_tokens=request.num_output_tokens,
            num_pages=len(request.pages),
            num_preemptions=request.num_preemptions,
        )

    def process(self, committed: StepOutput) -> None:
        """Bring one committed step to the users; may end requests whose stop string has appeared.

        Passes over requests that it does not know: they have been aborted.
        """
        now = time.monotonic()
        if committed.failure is not None:
            self._settle(committed.failure, now)
            return
        changed: dict[UserRequest, None] = {}
        for request in committed.prefilled:
            metrics = self._completions[request].owner.metrics
            if metrics.first_token_ts is None and request.num_output_tokens:
                metrics.first_token_ts = now
        for request, first, entries in committed.prompt_logprobs:
            completion = self._completions[request]
            if not self._take_prompt(completion, first, entries):
                changed[completion.owner] = None
        if self._attended:
            requests = committed.requests
            for index, request in enumerate(requests):
                attended = self._attended.get(request)
                if attended is not None and attended.stop_string is None:
                    later = index + 1  # a wide step may have more tokens for it
                    while later < len(requests) and requests[later] is request:
                        later += 1
                    self._take(attended, committed.logprobs.get(index), later - index - 1)
                    changed[attended.owner] = None
        for request in committed.finished:
            completion = self._completions[request]
            changed[completion.owner] = None
            if request not in self._attended:
                self._take(completion)
        for user in changed:
            self._emit(user, now)

    def _settle(self, failure: str, now: float) -> None:
        """A failure ended what ran, and may have hidden what ended before: look at everybody."""
        for request in list(self._scheduler.requests.values()):
            if request not in self._completions:  # it was being added
                self._scheduler.finish(request.request_id, "abort")
        for user in list(self._users):
            lacks_prompt = user.prompt_logprobs is not None and None in user.prompt_logprobs[1:]
            for completion in user.completions:
                request = completion.request
                is_unread = completion.num_read_tokens < request.num_output_tokens and request in self._attended
                is_torn = completion.is_reading or user.is_emitting
                if is_torn or (completion.is_finished and (is_unread or lacks_prompt)):
                    self._fail(completion, failure)
                if completion.is_finished and completion.logprobs is None:
                    self._take(completion)
            if user.has_ended:
                self._forget(user)
            elif user.is_finished:
                self._emit(user, now)

    def abort(self, user: UserRequest | str) -> None:
        """End a user request, by its id if it is named; its last output, with what it had, goes to its sink.

        Passes over the unknown.
        """
        known = self._by_id.get(user) if isinstance(user, str) else user
        if known is None or known not in self._users:
            return
        for completion in known.completions:
            self._scheduler.finish(completion.request.request_id, "abort")
            self._take(completion)
        self._emit(known, time.monotonic())

    def _take(self, completion: Completion, logprobs: TokenLogprobs | None = None, num_later: int = 0) -> None:
        """Turn what is new, but for ``num_later`` tokens, into text, which may end the request: at a stop string, or
        because there is no text for it.
        """
        request = completion.request
        try:
            if logprobs is not None:
                assert completion.logprobs is not None
                completion.logprobs.append(self._logprob_dict(logprobs))
                completion.cumulative_logprob += logprobs.logprobs[0]
            stop_string = completion.read(num_later)
        except Exception as error:
            self._fail(completion, "its tokens could not be turned into text", error)
            return
        if stop_string is not None and request.finish_reason not in ("abort", "error"):
            self._scheduler.finish(request.request_id, "stop", stop_string)
            # The scheduler may have ended it in this very step, by length or by a stop token: the text decides.
            request.finish_reason, request.stop_reason = "stop", stop_string

    def _take_prompt(self, completion: Completion, first: int, entries: list[TokenLogprobs]) -> bool:
        """Keep the log-probabilities of the prompt from position ``first`` on; False if that ended the request."""
        prompt_logprobs = completion.owner.prompt_logprobs
        assert prompt_logprobs is not None
        try:
            prompt_logprobs[first : first + len(entries)] = [self._logprob_dict(entry) for entry in entries]
        except Exception as error:
            self._fail(completion, "its prompt could not be turned into text", error)
            return False
        return True

    def _fail(self, completion: Completion, message: str, error: Exception | None = None) -> None:
        """End one completion alone, with what it had."""
        request = completion.request
        if error is not None:
            _logger.error("request %s: %s", completion.owner.request_id, message, exc_info=error)
            message = f"{message}: {type(error).__name__}: {error}"
        self._scheduler.finish(request.request_id, "error")
        request.finish_reason, request.stop_reason, request.error = "error", None, message

    def _emit(self, user: UserRequest, now: float) -> None:
        user.metrics.last_token_ts = now
        if user.is_finished:
            for completion in user.completions:
                if completion.detokenizer is not None and completion.stop_string is None and not completion.is_reading:
                    try:
                        completion.detokenizer.finish()
                    except Exception as error:
                        self._fail(completion, "its tokens could not be turned into text", error)
            self._send(user)
            self._forget(user)
            return
        if user.kind is RequestOutputKind.FINAL_ONLY or not self._is_due(user):
            return
        self._send(user)

    @staticmethod
    def _send(user: UserRequest) -> None:
        user.is_emitting = True
        output = user.output()
        user.sink.append(output)
        user.has_ended = output.finished
        user.is_emitting = False

    @staticmethod
    def _is_due(user: UserRequest) -> bool:
        """Whether enough is new for an output, by ``stream_interval``; the first token is always worth one."""
        interval = user.params.stream_interval or 1
        if interval == 1 or not user.has_emitted:
            return True
        return any(c.request.num_output_tokens - c.num_emitted_tokens >= interval for c in user.completions)

    def _logprob_dict(self, entry: TokenLogprobs) -> dict[int, Logprob]:
        decode: Callable[[int], str] | None = None if self._tokenizer is None else self._tokenizer.decode_token
        return {
            token_id: Logprob(logprob, rank, None if decode is None else decode(token_id))
            for token_id, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True)
        }
