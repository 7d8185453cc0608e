"""Thousands of random workloads over a scripted runner: every request generates what it would alone, and nothing is
lost.
"""

from __future__ import annotations

import pickle
import random
from dataclasses import dataclass, field

import pytest

from nemo_engine.engine.core import EngineCore
from nemo_engine.sampling_params import RepetitionDetection, SamplingParams
from nemo_engine.scheduler import Request, RequestStatus, Scheduler, Speculation
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE, StepPlan
from tests.helpers.speculating import choose_widths
from tests.scheduler.invariants import check
from tests.scheduler.scripted import VOCAB, ScriptedGrammar, ScriptedHandle, ScriptedRunner, expected_output

EOS = frozenset([2])


@dataclass
class Workload:
    """Settings of a scheduler, and requests with the step before which each arrives."""

    page_size: int
    num_pages: int
    max_num_seqs: int
    budget: int
    caching: bool
    depth: int
    has_faults: bool
    widths: list[int] = field(default_factory=list)
    arrivals: list[tuple[int, Request]] = field(default_factory=list)
    prompts: dict[str, list[int]] = field(default_factory=dict)


def make_workload(rng: random.Random) -> Workload:
    page_size = rng.choice([1, 2, 3, 4, 8, 16])
    max_num_seqs = rng.randint(1, 8)
    workload = Workload(
        page_size=page_size,
        num_pages=rng.randint(2, 12) if rng.random() < 0.7 else 200,
        max_num_seqs=max_num_seqs,
        budget=max_num_seqs + rng.choice([0, 1, 3, 10, 100]),
        caching=rng.random() < 0.6,
        depth=rng.choice([1, 1, 2, 3]),
        has_faults=rng.random() < 0.2,
    )
    stem = [rng.randrange(VOCAB) for _ in range(5 * page_size)]
    room = workload.num_pages * page_size + 1
    share = rng.choice([0, 0, 0.3, 1])  # of the requests have a grammar
    for index in range(rng.randint(1, 14)):
        length = rng.choice(
            [1, page_size - 1, page_size, page_size + 1, 2 * page_size, 3 * page_size + 1, rng.randint(1, 20)]
        )
        length = max(1, min(length, room - 1))
        shared = rng.choice([0, length, rng.randint(0, length)])
        prompt = (stem[:shared] + [rng.randrange(VOCAB) for _ in range(length)])[:length]
        grammar = None
        if rng.random() < share:
            grammar = ScriptedGrammar(rng.randrange(3), rng.randint(1, 30), workload.has_faults)
        params = SamplingParams(
            structured_outputs=None if grammar is None else {"regex": "as the grammar says"},
            max_tokens=rng.choice([None, 1, rng.randint(1, max(1, min(40, room - length)))])
            if room - length < 60
            else rng.randint(1, 40),
            stop_token_ids=rng.sample(range(VOCAB), rng.choice([0, 0, 1, 2])),
            ignore_eos=rng.random() < 0.5,
            prompt_logprobs=rng.choice([None, None, None, 0]),
            repetition_detection=rng.choice([None, None, RepetitionDetection(3, 1, 2)]),
        )
        salt = rng.choice([b"", b"", b"siblings"])
        name = f"r{index}"
        request = Request(
            name,
            prompt,
            params,
            seed=rng.randrange(3),
            eos_token_ids=EOS,
            priority=rng.choice([0, 0, 0, 1, -1]),
            cache_salt=salt,
            grammar=grammar,
        )
        workload.prompts[name] = prompt
        workload.arrivals.append((rng.choice([0, 0, rng.randint(0, 30)]), request))
    workload.arrivals.sort(key=lambda arrival: arrival[0])
    return workload


def fault(history: object, seed: int) -> int | None:
    """Fails about one in forty tokens, always the same ones."""
    dice = random.Random(repr((history, seed))).randrange(80)
    return {0: TOKEN_NOT_FINITE, 1: TOKEN_ALL_MASKED}.get(dice)


class DistantRunner(ScriptedRunner):
    """Gets its plans from another process."""

    def launch(self, plan: StepPlan) -> ScriptedHandle:
        received = pickle.loads(pickle.dumps(plan))
        assert received == plan
        return super().launch(received)


def run(
    workload: Workload, rng: random.Random, kind: type[ScriptedRunner] = ScriptedRunner
) -> tuple[Scheduler, ScriptedRunner, dict[str, str]]:
    """Play ``workload`` to its end with random aborts; returns who was ended from outside, and how."""
    scheduler = Scheduler(
        num_pages=workload.num_pages,
        page_size=workload.page_size,
        max_num_seqs=workload.max_num_seqs,
        max_num_batched_tokens=workload.budget,
        max_model_len=10**6,
        enable_prefix_caching=workload.caching,
        speculation=Speculation(workload.widths, max(workload.widths, default=1) - 1),
    )
    if workload.widths:
        choose_widths(scheduler, rng, workload.widths)
    runner = kind(workload.page_size, fault) if workload.has_faults else kind(workload.page_size)
    core = EngineCore(scheduler, runner, workload.depth)
    arrivals = list(workload.arrivals)
    total = sum(len(workload.prompts[r.request_id]) + 60 for _, r in arrivals)
    ended: dict[str, str] = {}
    finished: dict[str, Request] = {}
    steps = 0
    while arrivals or core.has_work():
        while arrivals and arrivals[0][0] <= steps:
            scheduler.add(arrivals.pop(0)[1])
        if rng.random() < 0.03:
            _, victim = rng.choice(workload.arrivals)
            reason = rng.choice(["abort", "stop"])
            if scheduler.finish(victim.request_id, reason, "text" if reason == "stop" else None) is not None:
                ended[victim.request_id] = reason
        committed = core.step()
        check(scheduler)
        if committed is not None:
            assert len(committed.requests) == len(committed.token_ids)
            newest = dict(zip(committed.requests, committed.token_ids, strict=True))
            assert all(request.token_ids[-1] == token_id for request, token_id in newest.items())
            for request in committed.finished:
                assert request.request_id not in finished
                finished[request.request_id] = request
        steps += 1
        # Each step gets somebody one token further, unless it throws work away; thrice the work is ample.
        assert steps < 50 + 30 * total, "no progress"
    assert set(finished) | set(ended) == set(workload.prompts) and not set(finished) & set(ended)
    return scheduler, runner, ended


@pytest.mark.parametrize("speculates", [False, True])
@pytest.mark.parametrize("block", range(5))
def test_every_request_generates_what_it_would_alone(block: int, speculates: bool) -> None:
    preemptions = hits = errors = broken = constrained = accepted = rejected = 0
    for number in range(200):
        rng = random.Random(1000 * (block + 5 * speculates) + number)
        workload = make_workload(rng)
        if speculates:
            workload.page_size = max(2, workload.page_size)
            workload.widths = [width for width in (2, 4, 8) if width <= workload.page_size]
        scheduler, _, ended = run(workload, rng)
        for _, request in workload.arrivals:
            output, reason, stop_reason = expected_output(workload.prompts[request.request_id], request)
            if request.request_id in ended:
                assert request.finish_reason == ended[request.request_id]
                assert request.token_ids[request.num_prompt_tokens :] == output[: request.num_output_tokens]
            elif request.finish_reason == "error" and "planted" in (request.error or ""):
                broken += 1
                assert (request.token_ids[request.num_prompt_tokens :], reason) == (output, "error")
            elif request.finish_reason == "error":
                errors += 1
                history = request.token_ids
                assert workload.has_faults and fault(history, request.seed) is not None and request.error
                assert request.token_ids[request.num_prompt_tokens :] == output[: request.num_output_tokens]
            else:
                assert (request.token_ids[request.num_prompt_tokens :], request.finish_reason, request.stop_reason) == (
                    output,
                    reason,
                    stop_reason,
                )
            assert request.status is RequestStatus.FINISHED and request.pages == []
            constrained += request.grammar is not None and request.num_preemptions > 0
        stats = scheduler.stats()
        assert (stats.num_running, stats.num_waiting) == (0, 0) and stats.num_free_pages == workload.num_pages
        preemptions += stats.total_preemptions
        hits += stats.total_prefix_hit_tokens
        accepted += sum(scheduler.speculation.num_accepted)
        rejected += scheduler.speculation.num_drafts - sum(scheduler.speculation.num_accepted)
    assert min(accepted, rejected) > 300 or not speculates
    assert preemptions > 20 and hits > 100 and errors > 5 and broken > 2 and constrained > 5, (
        "the workloads do not reach what they are meant to test"
    )


def test_plans_are_values_that_can_be_sent() -> None:
    num_masks = num_fills = 0
    for number in range(40):
        workload, distant = make_workload(random.Random(number)), make_workload(random.Random(number))
        _, runner, _ = run(workload, random.Random(number))
        _, other, _ = run(distant, random.Random(number), DistantRunner)
        assert runner.plans == other.plans
        num_masks += sum(len(plan.masks) for plan in runner.plans)
        num_fills += sum(len(plan.fills) for plan in runner.plans)
    assert num_masks > 100 and num_fills > 100
