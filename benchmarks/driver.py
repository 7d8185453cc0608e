"""Drives an engine of this process step by step with requests of random token ids, and notes when each token comes."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from nemo_engine import Engine

SETTLING_STEPS = 5  # after the last prefill, before decode steps are timed


class DoesNotFit(RuntimeError):
    """What was asked for does not run at once in this engine."""


def params(num_out: int, kind: RequestOutputKind) -> SamplingParams:
    """Greedy, of exactly ``num_out`` tokens, without text."""
    return SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True, detokenize=False, output_kind=kind)


def count_tokens(outputs: Sequence[RequestOutput]) -> int:
    """The tokens of ``outputs``. Raises ``RuntimeError`` if a request failed: its time would mean nothing."""
    completions = [completion for output in outputs for completion in output.outputs]
    for completion in completions:
        if completion.finish_reason == "error":
            raise RuntimeError(f"a request failed: {completion.error}")
    return sum(len(completion.token_ids) for completion in completions)


@dataclass(slots=True)
class BatchTimes:
    """Seconds from the arrival of a batch to every token of each of its requests."""

    tokens: dict[str, list[float]] = field(default_factory=dict)

    @property
    def first(self) -> list[float]:
        """To each request's first token."""
        return [times[0] for times in self.tokens.values()]

    @property
    def last(self) -> list[float]:
        """To each request's last token."""
        return [times[-1] for times in self.tokens.values()]

    @property
    def gaps(self) -> list[float]:
        """Between a token and the next one of its request; none of requests of one token."""
        return [after - before for times in self.tokens.values() for before, after in zip(times, times[1:])]

    @property
    def per_token(self) -> list[float]:
        """Each request's seconds per token after its first; none of requests of one token."""
        return [(times[-1] - times[0]) / (len(times) - 1) for times in self.tokens.values() if len(times) > 1]


@dataclass(frozen=True, slots=True)
class DecodeSteps:
    """Seconds of each of some steps in which ``batch`` requests decoded, whose contexts were ``context`` tokens in the
    mean.
    """

    batch: int
    context: float
    seconds: list[float]


class Driver:
    """Requests of random token ids that never end early; no two prompts share a page."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._rng = random.Random(0)
        self._count = 0
        self._open: list[str] = []

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """``count`` prompts of ``length`` token ids."""
        ids = range(3, self.engine.model_config.vocab_size)
        return [self._rng.choices(ids, k=length) for _ in range(count)]

    def check_fits(self, batch: int, num_in: int, num_out: int) -> None:
        """``DoesNotFit`` if ``batch`` such requests cannot run at once, ``ValueError`` if one of them can never
        finish.
        """
        engine = self.engine
        room = engine.room_for(num_in)
        if num_out > room:
            raise DoesNotFit(
                f"{num_in} tokens and {num_out} more do not fit into the context: {room} may follow that prompt"
            )
        if batch > engine.config.max_num_seqs:
            raise DoesNotFit(f"{batch} requests do not run at once: max_num_seqs is {engine.config.max_num_seqs}")
        size, held = engine.config.page_size, engine.stats().num_pages
        needed = batch * -(-(num_in + num_out) // size)
        if needed > held:
            raise DoesNotFit(
                f"the KV cache does not hold {batch} requests of {num_in + num_out} tokens: they need {needed} pages "
                f"of {size}, it has {held}"
            )

    def run(self, prompts: Sequence[list[int]], num_out: int) -> BatchTimes:
        """All ``prompts`` at once, ``num_out`` tokens each."""
        engine, times = self.engine, BatchTimes()
        engine.reset_prefix_cache()
        preemptions = engine.stats().total_preemptions
        start = time.perf_counter()
        try:
            for prompt in prompts:
                self._add(prompt, num_out)
            while engine.has_unfinished_requests():
                outputs = engine.step()
                now = time.perf_counter() - start
                for output in outputs:
                    times.tokens.setdefault(output.request_id, []).extend([now] * count_tokens([output]))
        finally:
            self._abort_all()
        counts = {len(each) for each in times.tokens.values()}
        if counts != {num_out} or len(times.tokens) != len(prompts):
            raise RuntimeError(
                f"{len(prompts)} requests of {num_out} tokens gave {len(times.tokens)} of {sorted(counts)}"
            )
        if engine.stats().total_preemptions != preemptions:
            raise DoesNotFit(f"the KV cache does not hold {len(prompts)} requests: some were preempted")
        return times

    def generate(self, prompts: Sequence[list[int]], max_tokens: Sequence[int]) -> tuple[float, list[list[int]]]:
        """(seconds, greedy tokens of every prompt), as a peer's process gives them."""
        requests_params = [params(count, RequestOutputKind.FINAL_ONLY) for count in max_tokens]
        start = time.perf_counter()
        outputs = self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], requests_params)
        seconds = time.perf_counter() - start
        self.engine.reset_prefix_cache()
        count_tokens(outputs)
        return seconds, [list(output.outputs[0].token_ids) for output in outputs]

    def decode(
        self, batch: int, context: int, steps: int, observer: AbstractContextManager[object] | None = None
    ) -> DecodeSteps:
        """Time ``steps`` steps in which ``batch`` requests decode; their contexts are ``context`` tokens, or a little
        more.

        The more they are, the longer the first ones decode while the last prompts are computed; the result has the true
        mean. ``observer`` is entered before the first timed step and left after the last.
        """
        engine = self.engine
        if context > engine.max_model_len:
            raise DoesNotFit(f"{context} tokens do not fit into the context: max_model_len is {engine.max_model_len}")
        num_out = steps + SETTLING_STEPS + 2 * batch + 8  # none ends before the last is measured
        num_in = max(1, min(context - SETTLING_STEPS - steps // 2, engine.max_model_len - num_out))
        self.check_fits(batch, num_in, steps + SETTLING_STEPS)
        engine.reset_prefix_cache()
        preemptions = engine.stats().total_preemptions
        started: set[str] = set()
        before, settled, tokens = 0, 0, 0
        seconds: list[float] = []
        try:
            for prompt in self.prompts(batch, num_in):
                self._add(prompt, num_out)
            while settled < SETTLING_STEPS:
                outputs = engine.step()
                settled += len(started) == batch
                before += count_tokens(outputs)
                started.update(output.request_id for output in outputs)
            with observer or nullcontext():
                for _ in range(steps):
                    start = time.perf_counter()
                    outputs = engine.step()
                    seconds.append(time.perf_counter() - start)
                    tokens += count_tokens(outputs)
        finally:
            self._abort_all()
        if tokens != batch * steps or engine.stats().total_preemptions != preemptions:
            raise DoesNotFit(f"{steps} steps of {batch} requests gave {tokens} tokens: the KV cache does not hold them")
        return DecodeSteps(batch, num_in + before / batch + steps / 2, seconds)

    def _add(self, prompt: list[int], num_out: int) -> None:
        self._open.append(f"bench-{self._count}")
        self._count += 1
        self.engine.add_request(self._open[-1], {"prompt_token_ids": prompt}, params(num_out, RequestOutputKind.DELTA))

    def _abort_all(self) -> None:
        """End what was added, and take what is still to come."""
        self.engine.abort(self._open)
        self._open.clear()
        while self.engine.has_unfinished_requests():
            self.engine.step()


def summary(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Median, p90 and p99 of all values of all rounds; ``low`` and ``high`` are the least and the greatest median of a
    round.

    ``rounds`` in it holds those medians, in order.
    """
    from nemo_engine.benchmarks.report.results import percentiles

    medians = [statistics.median(values) for values in rounds]
    quantiles = percentiles([value for values in rounds for value in values], (50, 90, 99))
    return {
        "median": quantiles["p50"], "low": min(medians), "high": max(medians),
        "p90": quantiles["p90"], "p99": quantiles["p99"],
        "rounds": medians,
    }  # fmt: skip
