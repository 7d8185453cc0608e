"""Every decision of the scheduler against a plain model of its rules, plan by plan.

The model has no hashes: it keeps the free pages in a list, and knows cached content by the tokens themselves.
"""

from __future__ import annotations

import random

import pytest

from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scheduler import Request, Scheduler
from nemo_engine.step import StepPlan, StepResult
from tests.scheduler.invariants import check
from tests.scheduler.scripted import VOCAB, next_token


class Anything:
    """A grammar that allows everything: with one step in flight, a request that has it is planned as any other."""

    is_finished = False

    def mask(self) -> bytes:
        return bytes([255] * 4)

    def accept(self, token_id: int) -> None:
        pass


class Known:
    """A request in the model."""

    def __init__(self, request: Request, arrival: int) -> None:
        self.name, self.seed = request.request_id, request.seed
        self.tokens, self.limit = list(request.token_ids), request.max_total_tokens
        self.urgency = (request.priority, arrival)
        self.stops = request.stop_token_ids
        self.is_constrained = request.grammar is not None
        self.computed = 0
        self.num_offered = 0  # leading pages that have been offered to the cache
        self.pages: list[int] = []
        self.is_running = False
        self.is_decoding = False


class Model:
    """The rules of ARCHITECTURE, sections 4 and 5, written down as plainly as possible."""

    def __init__(self, num_pages: int, page_size: int, max_num_seqs: int, budget: int, caching: bool) -> None:
        self.size, self.max_num_seqs, self.budget, self.caching = page_size, max_num_seqs, budget, caching
        self.free = list(range(1, num_pages + 1))
        self.users = dict.fromkeys(self.free, 0)
        self.content: dict[int, tuple[int, ...]] = {}
        self.in_doubt: set[int] = set()  # pages whose content nobody has sampled a token from
        self.requests: list[Known] = []
        self.decoding: list[Known] = []  # in row order
        self.num_preemptions = 0

    def running(self) -> list[Known]:
        return [r for r in self.requests if r.is_running]

    def take(self) -> int:
        page = self.free.pop(0)
        self.content.pop(page, None)
        self.in_doubt.discard(page)
        self.users[page] = 1
        return page

    def give_back(self, known: Known) -> None:
        for page in reversed(known.pages):
            self.users[page] -= 1
            if self.users[page] == 0:
                if page in self.in_doubt:
                    self.content.pop(page, None)
                self.free.insert(len(self.free) if page in self.content else 0, page)
        known.pages = []

    def remember(self, known: Known, end: int) -> None:
        first, known.num_offered = known.num_offered, max(known.num_offered, end // self.size)
        for index in range(first, known.num_offered if self.caching else 0):
            prefix = tuple(known.tokens[: (index + 1) * self.size])
            self.in_doubt.add(known.pages[index])
            if prefix not in self.content.values() and known.pages[index] not in self.content:
                self.content[known.pages[index]] = prefix

    def leave(self, known: Known) -> None:
        if known.is_decoding:
            self.remember(known, len(known.tokens) - 1)
            self.in_doubt -= set(known.pages[: (len(known.tokens) - 1) // self.size])
        self.give_back(known)
        known.is_running = known.is_decoding = False
        known.computed = 0

    def schedule(self) -> tuple[set[str], list[tuple[str, int, int]]]:
        """Names that decode, and (name, start, count) of the prefill rows."""
        has_preempted = False
        due = [r for r in self.requests if r.is_decoding and r.computed == len(r.pages) * self.size]
        due.sort(key=lambda r: r.urgency)
        for known in due:  # all that is full is offered before any page is given
            self.remember(known, known.computed)
        for known in due:
            while known.is_running and not self.free:
                victim = max(self.running(), key=lambda r: r.urgency)
                self.leave(victim)
                self.num_preemptions += 1
                has_preempted = True
            if known.is_running:
                known.pages.append(self.take())
        decodes = [r for r in self.requests if r.is_decoding]
        left = self.budget - len(decodes)
        prefills = []
        is_blocked = has_preempted
        for known in sorted((r for r in self.requests if not r.is_decoding), key=lambda r: r.urgency):
            if not known.is_running:
                is_blocked = (
                    is_blocked or left == 0 or len(self.running()) == self.max_num_seqs or not self.admit(known)
                )
            if known.is_running:
                left = self.prefill(known, left, prefills)
        for known in decodes:
            known.computed += 1
        return {r.name for r in decodes}, prefills

    def admit(self, known: Known) -> bool:
        matched: list[int] = []
        for index in range((len(known.tokens) - 1) // self.size if self.caching else 0):
            prefix = tuple(known.tokens[: (index + 1) * self.size])
            page = next((page for page, content in self.content.items() if content == prefix), None)
            if page is None:
                break
            matched.append(page)
        new = -(-len(known.tokens) // self.size) - len(matched)
        if new + sum(self.users[page] == 0 for page in matched) > len(self.free):
            return False
        for page in matched:
            if self.users[page] == 0:
                self.free.remove(page)
            self.users[page] += 1
        known.pages = matched + [self.take() for _ in range(new)]
        known.computed = len(matched) * self.size
        known.num_offered = len(matched)
        known.is_running = True
        return True

    def prefill(self, known: Known, left: int, prefills: list[tuple[str, int, int]]) -> int:
        count = min(left, len(known.tokens) - known.computed)
        if count == 0:
            return left
        prefills.append((known.name, known.computed, count))
        known.computed += count
        self.remember(known, known.computed)
        return left - count

    def commit(self) -> None:
        """Tokens arrive in row order; stops are seen as they arrive, lengths after them."""
        arrived = sorted((r for r in self.decoding if r.is_running), key=lambda r: r.is_constrained)
        prefilled = [r for r in self.requests if r.is_running and not r.is_decoding and r.computed == len(r.tokens)]
        arrived += sorted(prefilled, key=lambda r: r.urgency)
        self.decoding = arrived
        for known in arrived:
            known.tokens.append(next_token(known.tokens, known.seed))
            known.is_decoding = True
        for ends in (lambda r: r.tokens[-1] in r.stops, lambda r: len(r.tokens) == r.limit):
            for known in arrived:
                if known.is_running and ends(known):
                    self.leave(known)
                    self.requests.remove(known)


def names_of(plan: StepPlan | None, by_slot: dict[int, str]) -> tuple[set[str], list[tuple[str, int, int]]]:
    if plan is None:
        return set(), []
    return {by_slot[slot] for slot in plan.decode_slots}, [
        (by_slot[r.slot], r.start, r.num_tokens) for r in plan.prefills
    ]


@pytest.mark.parametrize("caching", [False, True])
def test_every_plan_is_the_one_that_the_rules_ask_for(caching: bool) -> None:
    total_preemptions = 0
    for number in range(400):
        rng = random.Random(number)
        size, pages, seqs = rng.choice([1, 2, 4, 5]), rng.randint(3, 14), rng.randint(1, 5)
        budget = seqs + rng.choice([0, 2, 7, 50])
        scheduler = Scheduler(
            num_pages=pages, page_size=size, max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=10**6,
            enable_prefix_caching=caching,
        )  # fmt: skip
        model = Model(pages, size, seqs, budget, caching)
        requests: dict[str, Request] = {}
        stem = [rng.randrange(VOCAB) for _ in range(30)]
        room = pages * size + 1
        for step in range(120):
            if rng.random() < 0.25 and len(requests) < 12:
                length = rng.randint(1, min(room - 1, 3 * size + 1))
                prompt = stem[: rng.randint(0, length)]
                prompt += [rng.randrange(VOCAB) for _ in range(length - len(prompt))]
                params = SamplingParams(
                    max_tokens=rng.randint(1, min(room - length, 20)),
                    ignore_eos=True,
                    stop_token_ids=rng.sample(range(VOCAB), 1),
                )
                grammar = Anything() if rng.random() < 0.4 else None
                request = Request(
                    f"r{step}", prompt, params, seed=step, priority=rng.choice([0, 0, 1]), grammar=grammar
                )
                scheduler.add(request)
                requests[request.request_id] = request
                model.requests.append(Known(request, len(requests)))
            expected = model.schedule()
            plan = scheduler.schedule()
            by_slot = {r.slot: r.request_id for r in requests.values() if r.status.name == "RUNNING"}
            assert names_of(plan, by_slot) == expected, (number, step)
            if plan is not None:
                rows = [by_slot[slot] for slot in plan.decode_slots] + [
                    by_slot[r.slot] for r in plan.prefills if r.samples
                ]
                scheduler.commit(
                    StepResult(plan.step_id, [next_token(requests[n].token_ids, requests[n].seed) for n in rows])
                )
            model.commit()
            check(scheduler)
            assert scheduler.stats().num_free_pages == len(model.free)
            assert scheduler.stats().total_preemptions == model.num_preemptions
        total_preemptions += model.num_preemptions
    assert total_preemptions > 50
