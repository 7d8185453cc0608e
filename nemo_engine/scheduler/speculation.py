"""How wide the next step is, and what came out of a wide one.

In a wide step a decoding request computes several tokens, the last known one and drafts, which the device looks up in
the request's own text (``StepPlan.width``). How many of them follow from the sampled tokens is known when the step is
committed. Until then ``Request.num_computed_tokens`` is an upper bound: it grows by the width when the step is planned,
and falls by what was not taken when it is committed. Pages follow the bound. Offers to the prefix cache, limits and
ends follow the tokens, which are committed one by one, as if each had come from a step of its own.

The width is the one that promises most tokens a second: tokens, by how often drafts of the requests that decode were
right of late; seconds, by the last steps of that width and of about as many rows. Where drafts do not pay, steps are
narrow, and now and then a wide one looks whether that is still so.

A promise may be wrong: texts change, times are measured with noise, and what was never measured is a guess. So there is
an account of seconds, which gets 0.8 % of the time of all steps and what each wide step gained or lost beside narrow
ones of its tokens. No step is wide that could lose more than the account holds, so all that is ever lost is that
share, the few steps' time that the account begins with, and surprises, which later steps must earn back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nemo_engine.config import MAX_GRAPH_TOKENS, WIDE_STEP_TOKENS
from nemo_engine.scheduler.estimates import Acceptance, StepTimes
from nemo_engine.step import TOKEN_NOT_DRAFTED, TOKEN_NOT_TAKEN, StepResult

if TYPE_CHECKING:
    from nemo_engine.scheduler.request import Request
    from nemo_engine.scheduler.running import RunningRequests
    from nemo_engine.scheduler.scheduled_step import ScheduledStep
    from nemo_engine.scheduler.waiting import WaitingQueue

_FIRST_GUESS = 0.5  # of drafts that are right, before any was made; half of the guess for each new request
_PRIOR = 2.0  # drafts that a new request's guess is worth
_KEPT = 0.8  # of what an estimate is worth, from one wide step to the next
_KEPT_OF_ALL = 0.995
_SHARE = 0.008  # of the time that may be lost
_FIRST_BALANCE = 1.0  # narrow steps
_MAX_BALANCE = 16.0  # narrow steps; what a long gain saves up for later losses
_MAX_SURPRISE = 4.0  # times what was expected: a step that took longer was disturbed
_BETWEEN_TRIALS = 8  # steps, at least
_RESTS = 7  # narrow steps without a look, for it takes time too, after each of many that found that no width pays
_MANY = 64
_NARROW_EVERY = 100  # wide steps, so that what a narrow one takes is known
_MIN_GAIN = 1.03  # what a width must promise: times are measured with noise


def num_prompt_tokens(running: RunningRequests, waiting: WaitingQueue) -> int:
    """Tokens of the prompts that the next step may compute: of all under way, and of the first waiting if a slot is
    free.
    """
    coming = [*running.prefilling, *([waiting.first()] if waiting and running.free_slots else [])]
    return sum([len(request.token_ids) - request.num_computed_tokens for request in coming])


class Speculation:
    """Chooses widths among ``widths``, ascending, for at most ``num_drafts`` drafts behind a token; 1 if there are
    none.
    """

    def __init__(self, widths: Sequence[int], num_drafts: int) -> None:
        assert num_drafts < max(widths, default=1), (widths, num_drafts)
        self._drafts = {width: min(width - 1, num_drafts) for width in widths}
        self._kinds: dict[int, StepTimes] = {}
        self._of_all = Acceptance(_FIRST_GUESS, _PRIOR, _KEPT_OF_ALL)
        self._balance: float | None = None  # seconds that wide steps may lose; None until a narrow one was measured
        self._last_commit = 0.0
        self.num_rows = 0  # of wide steps that had drafts
        self.num_drafts = 0
        self.num_accepted = [0] * num_drafts  # drafts that were right, by their place behind the known token

    def counts(self) -> dict[str, Any]:
        """The fields of ``SchedulerStats`` that tell of drafts."""
        return {
            "num_spec_drafts": self.num_rows,
            "num_spec_draft_tokens": self.num_drafts,
            "num_spec_accepted_tokens_per_pos": tuple(self.num_accepted),
        }

    def enter(self, request: Request) -> None:
        """Say whether ``request`` has drafts; see ``SamplingParams.why_no_drafts``."""
        if self._drafts and request.params.why_no_drafts is None and request.grammar is None:
            request.acceptance = Acceptance((self._of_all.rate + _FIRST_GUESS) / 2, _PRIOR, _KEPT)

    def width_for(
        self, decodes: Sequence[Request], max_tokens: int, num_free_pages: int, num_prompt_tokens: int
    ) -> int:
        """The width of a step that decodes ``decodes`` and computes ``max_tokens`` at most, half of which are left to
        prompts. Drafts are not worth a preemption, nor a graph: 1 if a wide step lacked pages, or if the graph of a
        narrow one could hold the prompts too.
        """
        if not self._drafts or 0 < num_prompt_tokens <= MAX_GRAPH_TOKENS:
            return 1
        width = self._best_width(decodes, max_tokens)
        num_growing = sum([request.num_computed_tokens + width > request.compute_limit for request in decodes])
        return width if num_growing <= num_free_pages else 1

    def _best_width(self, decodes: Sequence[Request], max_tokens: int) -> int:
        rows, max_wide_tokens = len(decodes), min(WIDE_STEP_TOKENS, max_tokens // 2)
        kind = self._kinds.get(rows.bit_length())
        if kind is not None and kind.num_rests:
            kind.num_rests -= 1
            return 1
        trial = min(self._drafts)
        if trial * rows > max_wide_tokens:
            return 1
        drafting = [request.acceptance for request in decodes if request.acceptance is not None]
        if not drafting or kind is None or not kind.is_known or kind.since_narrow >= _NARROW_EVERY:
            return 1
        narrow = kind.cost(1)
        limit = narrow + (self._balance or 0.0)
        best, best_rate = 1, _MIN_GAIN * rows / narrow
        for width, num_drafts in self._drafts.items():
            cost = kind.cost(width)
            if width * rows > max_wide_tokens or cost > limit:
                break
            rate = (rows + sum([acceptance.expected(num_drafts) for acceptance in drafting])) / cost
            if rate > best_rate:
                best, best_rate = width, rate
        kind.num_vain = kind.num_vain + 1 if best == 1 else 0
        kind.num_rests = _RESTS if kind.num_vain > _MANY else 0
        if best == 1 and kind.since_trial >= _BETWEEN_TRIALS and kind.cost(trial) <= limit:
            best, kind.since_trial = trial, 0
        return best

    def commit(
        self, step: ScheduledStep, result: StepResult, running: RunningRequests, now: float
    ) -> tuple[list[Request], StepResult]:
        """What the step's requests get, as if each token had come from a step of one token; and learn from it."""
        if self._drafts:
            self._note_time(step, now, result.token_ids)
        if step.width == 1:
            return step.sampling, result
        requests, result, freed = self.take(step, result)
        for request in freed:
            running.resume_decode(request)
        return requests, result

    def take(self, step: ScheduledStep, result: StepResult) -> tuple[list[Request], StepResult, list[Request]]:
        """The requests that get a token, each as often as it gets one, and ``result`` with these tokens alone; and the
        requests that may go on, because a bound that had reached their limit has fallen.
        """
        requests: list[Request] = []
        kept: list[int] = []
        freed: list[Request] = []
        width = step.width
        for row, request in enumerate(step.decodes):
            first = row * width
            codes = result.token_ids[first : first + width]
            num_taken = sum([code not in (TOKEN_NOT_TAKEN, TOKEN_NOT_DRAFTED) for code in codes])
            requests += [request] * num_taken
            kept += range(first, first + num_taken)
            if request.acceptance is not None and request not in step.departed:
                had_steps_left = request.has_steps_left
                request.num_computed_tokens -= width - num_taken
                if request.has_steps_left and not had_steps_left:
                    freed.append(request)
                self._note(request.acceptance, width, num_taken - 1, width - 1 - codes.count(TOKEN_NOT_DRAFTED))
        end = len(step.decodes) * width
        requests += step.sampling[len(step.decodes) :]
        kept += range(end, len(result.token_ids))
        logprobs = {new: result.logprobs[old] for new, old in enumerate(kept) if old in result.logprobs}
        token_ids = [result.token_ids[index] for index in kept]
        return requests, replace(result, token_ids=token_ids, logprobs=logprobs), freed

    def _note(self, acceptance: Acceptance, width: int, num_right: int, num_drafts: int) -> None:
        if num_drafts:
            self.num_rows += 1
            self.num_drafts += num_drafts
            for place in range(num_right):
                self.num_accepted[place] += 1
        num_wrong = int(num_right < self._drafts[width])
        acceptance.note(num_right, num_wrong)
        self._of_all.note(num_right, num_wrong)

    def _note_time(self, step: ScheduledStep, now: float, token_ids: Sequence[int]) -> None:
        """``step`` was committed at ``now`` with ``token_ids``. Steps with prompts tell nothing of decode steps.

        A step takes from commit to commit, for what the host does between steps is done once in a wide one as well;
        that it did not wait for requests is known of one whose requests have decoded before.
        """
        last_commit, self._last_commit = self._last_commit, now
        if step.decodes and not step.prefills:
            has_waited = step.decodes[0].num_output_tokens < 2
            seconds = now - (max(step.planned_at, last_commit) if has_waited else last_commit)
            rows = len(step.decodes)
            kind = self._kinds.get(rows.bit_length())
            if kind is None:
                kind = self._kinds[rows.bit_length()] = StepTimes()
            if step.width > 1 and not kind.is_known:
                return
            expected = kind.cost(step.width) if kind.is_known else seconds
            if kind.num_rests and step.width == 1:
                kind.since_trial += 1
            else:
                kind.note(step.width, seconds)
            narrow = kind.cost(1)
            balance = _FIRST_BALANCE * narrow if self._balance is None else self._balance + _SHARE * narrow
            if step.width > 1:
                num_tokens = sum([token not in (TOKEN_NOT_TAKEN, TOKEN_NOT_DRAFTED) for token in token_ids])
                balance += num_tokens / rows * narrow - min(seconds, _MAX_SURPRISE * expected)
            self._balance = min(balance, _MAX_BALANCE * narrow)
