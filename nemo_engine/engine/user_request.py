"""``UserRequest``: a request as its user made it, with the state of each of its completions."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Protocol

from nemo_engine.engine.input_processor import EncodedPrompt
from nemo_engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
from nemo_engine.sampling_params import RequestOutputKind, SamplingParams
from nemo_engine.scheduler import Request, RequestStatus
from nemo_engine.text import Detokenizer


class Sink(Protocol):
    """Where the outputs of a request go; a list is one."""

    def append(self, output: RequestOutput, /) -> None:
        """Take one output. Called between steps, so it must return at once."""


class Completion:
    """One of the completions of a user's request: a scheduler request and its text so far."""

    __slots__ = (
        "cumulative_logprob", "detokenizer", "index", "is_reading", "logprobs", "num_emitted_tokens", "num_read_tokens",
        "owner", "request", "stop_string",
    )  # fmt: skip

    def __init__(self, owner: UserRequest, index: int, request: Request, detokenizer: Detokenizer | None) -> None:
        self.owner = owner
        self.index = index
        self.request = request
        self.detokenizer = detokenizer
        self.logprobs: list[dict[int, Logprob]] | None = [] if owner.params.has_logprobs else None
        self.cumulative_logprob = 0.0
        self.num_read_tokens = 0  # output tokens that the detokenizer has seen
        self.num_emitted_tokens = 0
        self.stop_string: str | None = None
        self.is_reading = False  # and for good, if an exception cut it short

    @property
    def is_finished(self) -> bool:
        """Whether the scheduler has ended the request."""
        return self.request.status is RequestStatus.FINISHED

    def read(self, num_later: int = 0) -> str | None:
        """Feed what was generated since the last call to the detokenizer, but for the last ``num_later`` tokens;
        returns the stop string that appeared, behind which no token stays.
        """
        request = self.request
        end = len(request.token_ids) - num_later
        new = request.token_ids[request.num_prompt_tokens + self.num_read_tokens : end]
        if self.detokenizer is None or not new or self.stop_string is not None or self.is_reading:
            self.num_read_tokens += len(new)
            return None
        # Whatever the reason: a failure may come between the token and the end that it brings.
        ends_at_stop_token = new[-1] in request.stop_token_ids
        self.is_reading = True
        self.stop_string = self.detokenizer.append(new, last_is_stop_token=ends_at_stop_token)
        self.num_read_tokens += len(new)
        if self.stop_string is not None:
            del request.token_ids[end:]
        self.is_reading = False
        return self.stop_string

    def has_news(self) -> bool:
        """Whether tokens have come since the last output."""
        return self.request.num_output_tokens > self.num_emitted_tokens

    def output(self, is_delta: bool) -> CompletionOutput:
        """What is new since the last output, or all so far."""
        request = self.request
        first = self.num_emitted_tokens if is_delta else 0
        token_ids = request.token_ids[request.num_prompt_tokens + first :]
        if self.logprobs is not None:  # fewer than tokens where a failure came between
            token_ids = token_ids[: len(self.logprobs) - first]
        self.num_emitted_tokens = first + len(token_ids)
        text = ""
        if self.detokenizer is not None:
            text = self.detokenizer.take_delta() if is_delta else self.detokenizer.text
        return CompletionOutput(
            index=self.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=None if self.logprobs is None else self.cumulative_logprob,
            logprobs=None if self.logprobs is None else self.logprobs[first:],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            error=request.error,
            tool_calls_start=None if self.detokenizer is None else self.detokenizer.mark,
        )


class UserRequest:
    """A request as the user made it: one prompt, ``n`` completions, and where its outputs go."""

    def __init__(
        self,
        request_id: str,
        prompt: EncodedPrompt,
        params: SamplingParams,
        kind: RequestOutputKind,
        sink: Sink,
        is_named: bool = True,
    ) -> None:
        self.request_id = request_id
        self.is_named = is_named  # so that it can be aborted by its id
        self.prompt = prompt
        self.params = params
        self.kind = kind
        self.sink = sink
        self.completions: list[Completion] = []
        self.metrics = RequestMetrics(arrival_time=time.monotonic())
        self.prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(prompt.token_ids)
        self.has_emitted = False
        self.is_emitting = False  # and for good, if an exception cut it short: something may be lost
        self.has_ended = False  # its last output has been sent

    @property
    def is_finished(self) -> bool:
        """Whether all completions have ended."""
        return all(completion.is_finished for completion in self.completions)

    @property
    def wants_every_step(self) -> bool:
        """Whether a step's tokens must be looked at before the end."""
        return self.kind is not RequestOutputKind.FINAL_ONLY or bool(self.params.stop) or self.params.has_logprobs

    def output(self) -> RequestOutput:
        """The output of now, per ``kind``."""
        is_delta = self.kind is RequestOutputKind.DELTA
        requests = [completion.request for completion in self.completions]
        self.metrics.scheduled_ts = requests[0].scheduled_ts
        self.metrics.num_generation_tokens = sum(request.num_output_tokens for request in requests)
        self.metrics.num_preemptions = sum(request.num_preemptions for request in requests)
        is_finished = self.is_finished
        outputs = [c.output(is_delta) for c in self.completions if not is_delta or is_finished or c.has_news()]
        self.has_emitted = True
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt.text,
            prompt_token_ids=self.prompt.token_ids,
            outputs=outputs,
            finished=is_finished,
            prompt_logprobs=self.prompt_logprobs,
            num_cached_tokens=requests[0].num_cached_tokens,
            cache_report=requests[0].cache_report,
            metrics=replace(self.metrics),  # an output does not change once it is given
            sampling_params=self.params,
        )
