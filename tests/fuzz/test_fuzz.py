"""The fuzz in the suite: fixed seeds that reach everything, and faults put back that it must find.

``make fuzz MINUTES=n`` tries new seeds.
"""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
from fuzz.cases import FAULTS
from fuzz.play import play
from fuzz.run import ENGINES, cases_of, try_seed

from nemo_engine.engine.core import EngineCore
from nemo_engine.engine.input_processor import InputProcessor
from nemo_engine.engine.output_processor import OutputProcessor
from nemo_engine.engine.user_request import UserRequest
from nemo_engine.runner.request_table import RequestTable
from nemo_engine.runner.runner import Runner
from nemo_engine.scheduler import Request, Scheduler, StepOutput
from nemo_engine.scheduler.kv_manager import KVManager

SEEDS = range(19, 29)
_counts: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Kept log records have traces, and these hold requests that have ended."""
    caplog.set_level(logging.CRITICAL + 1, logger="nemo_engine")


@pytest.mark.parametrize("seed", SEEDS)
def test_engines_do_what_the_reference_does(seed: int) -> None:
    _counts.update(try_seed(seed))


def test_the_seeds_reach_what_they_are_meant_to_test() -> None:
    if not _counts:
        pytest.skip("run with the seeds")
    ends = [f"end by {reason}" for reason in ("length", "stop", "abort", "error", "repetition")]
    planted = {kind: _counts[f"planted {kind}"] for kind in FAULTS}
    assert sum(map(bool, planted.values())) >= 6, planted
    for name in (*ends, "aborts", "preemptions", "cached tokens", "pages", "refused", "constrained", "siblings"):
        assert _counts[name], (name, _counts)


def found(seeds: range) -> str:
    """What the fuzz says of the first engine of ``seeds`` that is wrong."""
    for seed in seeds:
        for number in range(ENGINES):
            cases = cases_of(seed, number)
            cases[0].fault = None
            try:
                play(cases)
            except AssertionError as error:
                return str(error)
    return ""


def test_prompt_log_probabilities_lost_with_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = Scheduler.commit

    def lose(self: Scheduler, result: Any) -> StepOutput:
        committed = commit(self, result)
        ended = set(committed.finished)
        committed.prompt_logprobs = [entry for entry in committed.prompt_logprobs if entry[0] not in ended]
        return committed

    monkeypatch.setattr(Scheduler, "commit", lose)
    assert "no log-probability of prompt token" in found(SEEDS)


def test_decode_rows_kept_although_a_request_got_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    take, fill = RequestTable.take_new_pages, RequestTable.fill

    def forget_fill(self: RequestTable, entry: Any) -> None:
        fill(self, entry)
        self.num_changes -= 1

    def forget(self: RequestTable, plan: Any) -> Any:
        taken = take(self, plan)
        self.num_changes -= bool(plan.new_pages and plan.prefills)
        return taken

    monkeypatch.setattr(RequestTable, "fill", forget_fill)
    monkeypatch.setattr(RequestTable, "take_new_pages", forget)
    assert found(SEEDS)


def test_ended_requests_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Request] = []
    end = Scheduler._end

    def keep(self: Scheduler, request: Request, *args: Any, **options: Any) -> None:
        end(self, request, *args, **options)
        if request.finish_reason == "stop":
            kept.append(request)

    monkeypatch.setattr(Scheduler, "_end", keep)
    assert "is held by ['list" in found(SEEDS)


@pytest.mark.parametrize(("form", "is_mended"), [("{id}#{index}", False), ("{index}_{id}", True)])
def test_keys_made_of_clients_ids(monkeypatch: pytest.MonkeyPatch, form: str, is_mended: bool) -> None:
    """``is_mended``: what a collision leaves half done is cleaned up, and a client is told that its id is taken."""
    requests = InputProcessor.requests

    def named(self: InputProcessor, request_id: str, *args: Any) -> list[Request]:
        siblings = requests(self, request_id, *args)
        for index, sibling in enumerate(siblings):
            sibling.request_id = form.format(id=request_id, index=index) if len(siblings) > 1 else request_id
        return siblings

    def add(self: OutputProcessor, user: UserRequest) -> None:
        for completion in user.completions:
            self._scheduler.add(completion.request)
        self._users[user] = None
        self._by_id[user.request_id] = user
        for completion in user.completions:
            self._completions[completion.request] = completion
            if user.wants_every_step:
                self._attended[completion.request] = completion

    monkeypatch.setattr(InputProcessor, "requests", named)
    if not is_mended:
        monkeypatch.setattr(OutputProcessor, "add", add)
        monkeypatch.setattr(EngineCore, "change", lambda self: nullcontext())
    assert "is in use by an unfinished request" in found(SEEDS)


def test_prefixes_that_are_found_across_salts(monkeypatch: pytest.MonkeyPatch) -> None:
    extend = KVManager.extend_hashes

    def unsalted(self: KVManager, request: Request, count: int) -> None:
        salt, request.cache_salt = request.cache_salt, b""
        extend(self, request, count)
        request.cache_salt = salt

    monkeypatch.setattr(KVManager, "extend_hashes", unsalted)
    assert "content that no request had" in found(SEEDS)


def test_noise_of_another_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Runner.launch

    def shifted(self: Runner, plan: Any) -> Any:  # in every hundredth step
        if plan.step_id % 100 == 7:
            self._sampler.slot_params.seed_keys[1:] += 1
        return launch(self, plan)

    monkeypatch.setattr(Runner, "launch", shifted)
    assert "has the score" in found(SEEDS)
