"""After the last output of a request nothing of it can be reached, however it ended, also while the engine rests."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nemo_engine import AsyncEngine, Engine, SamplingParams
from nemo_engine.engine.base import PreparedRequest
from nemo_engine.engine.engine_thread import Stream
from nemo_engine.engine.user_request import Completion, UserRequest
from nemo_engine.scheduler import Request
from nemo_engine.scheduler.scheduled_step import ScheduledStep
from nemo_engine.step import TOKEN_NOT_FINITE, StepPlan
from tests.helpers.scripted_engine import EOS, scripted_engine
from tests.scheduler.scripted import VOCAB, next_token

KINDS = (Request, Completion, UserRequest, PreparedRequest, ScheduledStep, StepPlan, Stream)
LONG = 300  # tokens that nobody gets to


@pytest.fixture(scope="module", autouse=True)
def only_what_is_made_here() -> Iterator[None]:
    """The collector leaves out what was there before these tests: the packages, a million objects."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def reachable() -> list[str]:
    gc.collect()
    return sorted(type(thing).__name__ for thing in gc.get_objects() if type(thing) in KINDS)


def ids(*token_ids: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(token_ids)}


def prompt_before(tokens: set[int], seed: int) -> list[int]:
    """A prompt whose third token, and none before, is one of ``tokens``."""
    for first in range(VOCAB):
        for second in range(VOCAB):
            history = [first, second]
            for _ in range(3):
                history.append(next_token(history, seed))
            if history[4] in tokens and not tokens & set(history[2:4]):
                return history[:2]
    raise AssertionError


def rest(engine: Engine) -> None:
    while engine.has_unfinished_requests():
        engine.step()


def some_steps(engine: Engine, count: int) -> None:
    for _ in range(count):
        engine.step()


def aborted_after(count: int, length: int) -> Callable[[Engine], None]:
    def run(engine: Engine) -> None:
        engine.add_request("a", ids(*[1] * length), SamplingParams(max_tokens=LONG, ignore_eos=True))
        some_steps(engine, count)
        engine.abort("a")

    return run


def aborted_waiting(engine: Engine) -> None:
    for index in range(30):
        engine.add_request(f"{index}", ids(1), SamplingParams(max_tokens=LONG, ignore_eos=True), priority=index % 3)
    engine.step()
    engine.abort([str(index) for index in range(30)])


def preempted(engine: Engine) -> None:
    for index in range(4):
        engine.add_request(f"{index}", ids(index), SamplingParams(max_tokens=70, ignore_eos=True))
    while engine.stats().total_preemptions == 0:
        engine.step()
    engine.abort(["0", "1"])


def dropped_stream(engine: Engine) -> None:
    stream = engine.stream(ids(1), SamplingParams(max_tokens=LONG, ignore_eos=True))
    next(stream)
    stream.close()


def interrupted(engine: Engine) -> None:
    runner: Any = engine._core.runner
    launch = runner.launch

    def interrupt(plan: StepPlan) -> None:
        runner.launch = launch
        raise KeyboardInterrupt

    engine.add_request("a", ids(1), SamplingParams(max_tokens=LONG, ignore_eos=True))
    engine.step()
    runner.launch = interrupt
    with pytest.raises(KeyboardInterrupt):
        engine.step()


def refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        engine.generate([ids(1), ids(*[1] * 500)], SamplingParams(max_tokens=2))
    engine.add_request("a", ids(1), SamplingParams(max_tokens=2))
    with pytest.raises(ValueError, match="in use"):
        engine.add_request("a", ids(1), SamplingParams(max_tokens=2))


WAYS: dict[str, Callable[[Engine], object]] = {
    "length": lambda e: e.generate(ids(1), SamplingParams(max_tokens=3, ignore_eos=True)),
    "end of sequence": lambda e: e.generate(ids(*prompt_before({EOS}, 4)), SamplingParams(max_tokens=LONG, seed=4)),
    "stop id": lambda e: e.generate(
        ids(*prompt_before({5}, 4)), SamplingParams(max_tokens=LONG, seed=4, stop_token_ids=[5], ignore_eos=True)
    ),
    "siblings": lambda e: e.generate(ids(3, 1), SamplingParams(max_tokens=LONG, seed=4, n=4)),
    "error": lambda e: e.generate(ids(1), SamplingParams(max_tokens=LONG, seed=99)),
    "aborted while it waits": aborted_waiting,
    "aborted between chunks": aborted_after(2, 100),
    "aborted when it has just been prefilled": aborted_after(1, 5),
    "aborted while it decodes": aborted_after(7, 5),
    "preempted": preempted,
    "dropped stream": dropped_stream,
    "interrupted": interrupted,
    "refused": refused,
}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_left(way: str, depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(history: Any, seed: int) -> int | None:
        return TOKEN_NOT_FINITE if seed == 99 and len(history) > 4 else None

    options = {"max_num_batched_tokens": 16, "num_pages": 40 if way == "preempted" else 200}
    before = reachable()
    engine = scripted_engine(Engine, monkeypatch, depth=depth, fault=fault, **options)
    WAYS[way](engine)
    rest(engine)
    assert reachable() == before
    waiting = engine._core.scheduler.waiting
    assert not waiting._preempted and not waiting._new and not waiting._priorities


@pytest.mark.parametrize("way", ["end", "abort", "client gone", "loop gone"])
def test_nothing_is_left_while_the_thread_rests(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = reachable()
    with scripted_engine(AsyncEngine, monkeypatch, depth=2) as engine:
        params = SamplingParams(max_tokens=LONG, seed=4, ignore_eos=way != "end")

        async def client() -> None:
            outputs = engine.generate(ids(*prompt_before({EOS}, 4)), params, "a")
            async for _ in outputs:
                if way == "abort":
                    engine.abort("a")
                elif way in ("client gone", "loop gone"):
                    break
            if way == "client gone":
                await outputs.aclose()  # type: ignore[attr-defined]

        loop = asyncio.new_event_loop()
        loop.run_until_complete(client())
        loop.close()
        for _ in range(500):
            left = reachable()
            if left == before:
                break
            time.sleep(0.02)
        assert left == before


def test_stop_strings_and_grammars_leave_nothing() -> None:
    with Engine("nemo-tiny", device="cpu", num_kv_pages=100, max_model_len=1024) as engine:
        before = reachable()
        text = engine.generate("The heapq", SamplingParams(temperature=0.0, max_tokens=12))[0].outputs[0].text
        (stopped,) = engine.generate("The heapq", SamplingParams(temperature=0.0, max_tokens=900, stop=text[8:12]))
        (formed,) = engine.generate("The", SamplingParams(max_tokens=900, structured_outputs={"choice": ["yes", "no"]}))
        assert stopped.outputs[0].finish_reason == formed.outputs[0].finish_reason == "stop"
        assert reachable() == before
