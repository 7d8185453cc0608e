"""The choice of widths: it gains what there is to gain, and loses at most 2 % where there is nothing."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scheduler import Request, Speculation
from nemo_engine.scheduler.running import RunningRequests
from nemo_engine.scheduler.scheduled_step import ScheduledStep
from nemo_engine.scheduler.speculation import num_prompt_tokens
from nemo_engine.scheduler.waiting import WaitingQueue
from nemo_engine.step import TOKEN_NOT_DRAFTED, TOKEN_NOT_TAKEN, StepResult

WIDTHS = (2, 4, 8)
# Seconds of a step of each width, in narrow ones.
FLAT = {1: 1.0, 2: 1.0, 4: 1.01, 8: 1.02}
USUAL = {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.8}
STEEP = {1: 1.0, 2: 1.7, 4: 3.0, 8: 5.8}
ABSURD = {1: 1.0, 2: 7.0, 4: 8.0, 8: 12.0}  # wide steps that a machine has no good code for


def request(length: int, prompt: int = 4) -> Request:
    made = Request("r", [1] * prompt, SamplingParams(max_tokens=length))
    made.max_total_tokens = prompt + length
    return made


def ratio(
    costs: dict[int, float],
    rows: int,
    rate: Callable[[int], float],
    rng: random.Random,
    *,
    length: int = 256,
    noise: float = 0.03,
    load: Callable[[float], float] = lambda now: 1.0,
) -> tuple[float, dict[int, int]]:
    """Tokens a second beside those of narrow steps, and how many steps of each width there were, of ``rows`` requests at a
    time. rate: of right drafts, by the request's tokens so far. load: what slows all steps, by the time.
    """
    speculation = Speculation(WIDTHS, 7)
    now, slowness, num_tokens, steps = 0.0, 0.0, 0, dict.fromkeys(costs, 0)
    decodes: list[Request] = []
    while num_tokens < 700 * rows + 2000:
        while len(decodes) < rows:
            decodes.append(request(rng.randint(length // 2, length)))
            speculation.enter(decodes[-1])
        width = speculation.width_for(decodes, 8192, 10**6, 0)
        steps[width] += 1
        step = ScheduledStep(1, decodes[:], [], width, now)
        slow, delay = load(now) * rng.uniform(1 - noise, 1 + noise), 20.0 * (rng.random() < 0.005)
        now, slowness = now + costs[width] * slow + delay, slowness + costs[1] * slow + delay
        codes: list[int] = []
        for one in decodes:
            taken, has_drafts = 1, rng.random() < 0.9
            while has_drafts and taken < width and rng.random() < rate(one.num_output_tokens + taken):
                taken += 1
            rejected = width - taken if has_drafts else 0
            codes += [5] * taken + [TOKEN_NOT_TAKEN] * rejected + [TOKEN_NOT_DRAFTED] * (width - taken - rejected)
        speculation._note_time(step, now, codes)
        if width > 1:
            got, result, _ = speculation.take(step, StepResult(1, codes))
            assert len(got) == len(result.token_ids) and set(result.token_ids) == {5}
        else:
            got = decodes
        for one in got:
            one.token_ids.append(5)
        num_tokens += len(got)
        decodes = [one for one in decodes if one.num_output_tokens < one.params.max_tokens]
    return num_tokens / rows * slowness / sum(steps.values()) / now, steps


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("costs", [FLAT, USUAL, STEEP, ABSURD], ids=["flat", "usual", "steep", "absurd"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3, 0.6])
def test_it_never_loses(costs: dict[int, float], rows: int, rate: float) -> None:
    runs = [ratio(costs, rows, lambda _: rate, random.Random(seed))[0] for seed in range(2)]
    assert sum(runs) / len(runs) >= 0.98, runs


@pytest.mark.parametrize("costs", [USUAL, STEEP, ABSURD], ids=["usual", "steep", "absurd"])
def test_nor_where_texts_and_the_machine_change_and_times_are_noise(costs: dict[int, float]) -> None:
    """Repetition that ends as soon as it is noticed, and a machine that others use by turns."""
    runs = [
        ratio(
            costs, 2, lambda place: 0.9 if place % 12 < 4 else 0.0, random.Random(seed), noise=0.4,
            load=lambda now: 1.0 + 2.0 * (int(now / 150) % 3 == 0),
        )[0]
        for seed in range(4)
    ]  # fmt: skip
    assert sum(runs) / len(runs) >= 0.98, runs


@pytest.mark.parametrize(
    ("costs", "rate", "least"), [(FLAT, 0.9, 4.0), (USUAL, 0.9, 2.3), (USUAL, 0.6, 1.2), (FLAT, 0.3, 1.3)]
)
def test_it_gains_where_drafts_are_right(costs: dict[int, float], rate: float, least: float) -> None:
    for rows in (1, 6):
        assert ratio(costs, rows, lambda _: rate, random.Random(rows))[0] >= least


def test_it_notices_that_a_text_begins_and_ends_to_repeat_itself() -> None:
    gained, steps = ratio(USUAL, 1, lambda place: 0.95 if place // 64 % 2 else 0.02, random.Random(4), length=512)
    assert gained > 1.25 and min(steps[1], steps[8] + steps[4]) > 300, (gained, steps)


def test_prompts_to_come_are_counted() -> None:
    """What is left of those under way, and the first that waits if a slot is free."""
    running, waiting = RunningRequests(2), WaitingQueue()
    assert num_prompt_tokens(running, waiting) == 0
    for prompt in (100, 30, 7):
        made = request(50, prompt)
        made.arrival = prompt
        waiting.push(made)
    first = waiting.first()
    assert num_prompt_tokens(running, waiting) == len(first.token_ids)
    for computed in (4, 5):
        entering = waiting.first()
        waiting.pop()
        running.enter(entering, 0.0)
        entering.num_computed_tokens = computed
    rest = sum(len(one.token_ids) - one.num_computed_tokens for one in running.prefilling)
    assert num_prompt_tokens(running, waiting) == rest > 0, "no slot is free"


def test_no_more_tokens_than_a_step_may_have() -> None:
    speculation = Speculation(WIDTHS, 7)
    decodes = [request(50) for _ in range(40)]
    for one in decodes:
        speculation.enter(one)
    speculation._note_time(ScheduledStep(1, decodes, [], 1, 0.0), 1.0, [5] * 40)
    for most, width in ((8192, 4), (640, 4), (319, 2), (159, 1)):
        assert speculation.width_for(decodes, most, 1000, 0) == width
    assert speculation.width_for(decodes, 8192, 39, 0) == 1, "a wide step takes pages that are not free"
    for coming, width in ((1, 1), (1024, 1), (1025, 4)):  # a graph holds narrow steps of up to 1024
        assert speculation.width_for(decodes, 8192, 1000, coming) == width
    plain = [Request("p", [1], SamplingParams(speculation=False)) for _ in range(40)]
    assert speculation.width_for(plain, 8192, 1000, 0) == 1


def test_what_was_not_taken_falls_from_the_bound_and_frees_who_waits_for_it() -> None:
    speculation = Speculation(WIDTHS, 7)
    one, other, gone = request(6), request(50), request(50)
    plain = Request("p", [1, 2], SamplingParams(frequency_penalty=1.0))
    for each in (one, other, gone, plain):
        speculation.enter(each)
    one.num_computed_tokens, other.num_computed_tokens, gone.num_computed_tokens = 3 + 8, 3 + 8, 0
    step = ScheduledStep(1, [one, other, gone, plain], [], 8, departed={gone})
    no, none = TOKEN_NOT_TAKEN, TOKEN_NOT_DRAFTED
    codes = [5, 6, no, no, none, none, none, none, *[7] * 8, *[8] * 8, 9, *[none] * 7]
    requests, result, freed = speculation.take(step, StepResult(1, codes))
    assert requests == [one] * 2 + [other] * 8 + [gone] * 8 + [plain]
    assert result.token_ids == [5, 6] + [7] * 8 + [8] * 8 + [9]
    assert (one.num_computed_tokens, other.num_computed_tokens, gone.num_computed_tokens) == (5, 11, 0)
    assert freed == [one]
    assert speculation.counts() == {
        "num_spec_drafts": 2, "num_spec_draft_tokens": 10, "num_spec_accepted_tokens_per_pos": (2, 1, 1, 1, 1, 1, 1)
    }  # fmt: skip
