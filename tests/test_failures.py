"""An exception at every call inside the engine, one after the other: what comes after it is right, and nothing is
lost.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

import nemo_engine
from nemo_engine.engine.async_engine import AsyncEngine
from nemo_engine.engine.engine import Engine
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import RequestOutputKind, SamplingParams
from nemo_engine.scheduler import Request
from nemo_engine.step import TOKEN_NOT_FINITE
from tests.helpers.scripted_engine import check_books, scripted_engine
from tests.scheduler.scripted import VOCAB, next_token

PACKAGE = nemo_engine.__path__[0]
STRIDE = 41  # of the places at which something is raised; 1 tries all
STEM = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]


def ids(*token_ids: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(token_ids)}


class Planted:
    """Raises ``error`` at the ``place``-th call into, inside or out of a function of the package, or counts these."""

    def __init__(self, place: int | None, error: type[BaseException]) -> None:
        self.place, self.error, self.num_seen = place, error, 0

    def __enter__(self) -> Planted:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: object) -> None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            self.num_seen += 1
            if self.num_seen == self.place:
                raise self.error("planted")


def drive(engine: Engine, finals: dict[str, RequestOutput], plant: Planted | None = None) -> list[str]:
    """Chunks, a shared prefix, siblings, preemptions, an abort and a deadline of steps. Returns what was raised."""
    raised = []
    params = SamplingParams(max_tokens=14, ignore_eos=True, seed=1)
    delta = SamplingParams(max_tokens=14, ignore_eos=True, seed=2, output_kind=RequestOutputKind.DELTA)
    work: list[Callable[[], Any]] = [
        lambda: engine.add_request("a", ids(*STEM), params),
        lambda: engine.add_request(
            "b", ids(*STEM, 1, 2, 3), SamplingParams(n=2, max_tokens=9, ignore_eos=True, seed=5)
        ),
        *[engine.step] * 3,
        lambda: engine.add_request("c", ids(*STEM[:9]), delta, priority=-1),
        lambda: engine.add_request("gone", ids(*STEM[::-1]), params),
        *[engine.step] * 3,
        lambda: engine.abort("gone"),
    ]
    for number in range(120):
        if number >= len(work) and not engine.has_unfinished_requests():
            return raised
        act = work[number] if number < len(work) else engine.step
        try:
            if plant is None:
                outputs = act()
            else:
                with plant:
                    outputs = act()
        except BaseException as error:
            assert str(error) == "planted", error
            raised.append(type(error).__name__)
            continue
        for output in outputs or ():
            if output.finished:
                finals[output.request_id] = output
    raise AssertionError("no end")


def tokens_of(output: RequestOutput) -> list[list[int]]:
    return [completion.token_ids for completion in output.outputs]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised where a generator is closed
@pytest.mark.parametrize(("error", "depth"), [(KeyboardInterrupt, 1), (MemoryError, 2)])
def test_whatever_is_raised_wherever(
    error: type[BaseException], depth: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL + 1, "nemo_engine")
    options = {"depth": depth, "num_pages": 12, "max_num_batched_tokens": 7, "max_num_seqs": 4}
    expected: dict[str, RequestOutput] = {}
    counted = Planted(None, error)
    engine = scripted_engine(Engine, monkeypatch, **options)
    drive(engine, expected, counted)
    assert set(expected) == {"a", "b", "c", "gone"} and engine.stats().total_preemptions > 0
    num_raised = num_errors = 0
    for place in range(1 + depth, counted.num_seen + 1, STRIDE):
        engine = scripted_engine(Engine, monkeypatch, **options)
        seen: dict[str, RequestOutput] = {}
        num_raised += len(drive(engine, seen, Planted(place, error)))
        check_books(engine)
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages), place
        seen.pop("gone", None)  # its end may be what was cut short
        for name, output in seen.items():
            for ours, theirs in zip(output.outputs, expected[name].outputs, strict=True):
                num_errors += ours.finish_reason == "error"
                if ours.finish_reason in ("error", "abort"):
                    assert output.sampling_params is not None
                    if output.sampling_params.output_kind is not RequestOutputKind.DELTA:
                        assert ours.token_ids == theirs.token_ids[: len(ours.token_ids)]
                else:
                    assert ours.token_ids == theirs.token_ids, (place, name)
        again: dict[str, RequestOutput] = {}
        drive(engine, again)
        check_books(engine)
        assert {name: tokens_of(again[name]) for name in "abc"} == {name: tokens_of(expected[name]) for name in "abc"}
        engine.close()
        assert engine._core.runner.is_closed  # type: ignore[attr-defined]
    assert num_raised > 50 and num_errors > 50


def test_a_request_that_cannot_be_planned_ends_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted_engine(Engine, monkeypatch)
    admit = engine._core.scheduler.kv.admit

    def refuses(request: Request) -> bool:
        if request.token_ids[0] == 7:
            raise RuntimeError("planted")
        return admit(request)

    monkeypatch.setattr(engine._core.scheduler.kv, "admit", refuses)
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    engine.add_request("bad", ids(7), params)
    engine.add_request("good", ids(8), params)
    finals = {}
    for _ in range(20):
        try:
            finals |= {output.request_id: output.outputs[0] for output in engine.step() if output.finished}
        except RuntimeError as error:
            assert str(error) == "planted"
    assert (finals["bad"].finish_reason, finals["good"].finish_reason) == ("error", "length")
    assert "planted" in (finals["bad"].error or "")


def test_a_lost_device_is_said_and_the_engine_can_be_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted_engine(Engine, monkeypatch)
    runner: Any = engine._core.runner

    def fails(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    runner.launch = runner.recover = fails
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the device is lost: an illegal memory access"):
            engine.generate(ids(1), SamplingParams(max_tokens=2))
    assert engine.stats().num_running == 0
    engine.close()
    assert runner.is_closed


def test_a_step_in_flight_that_fails_does_not_keep_the_engine_from_being_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = scripted_engine(Engine, monkeypatch, depth=2)
    runner: Any = engine._core.runner

    class Broken:
        def result(self) -> None:
            raise RuntimeError("planted")

    engine.add_request("a", ids(1), SamplingParams(max_tokens=9))
    runner.launch = lambda plan: Broken()
    engine.step()
    engine.close()
    assert runner.is_closed


def test_an_error_in_turning_tokens_into_text_ends_that_request_alone() -> None:
    with Engine("nemo-tiny", device="cpu", num_kv_pages=40, max_model_len=512) as engine:
        assert engine.tokenizer is not None
        params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, logprobs=1)
        expected = engine.generate("The heapq", params)[0].outputs[0]
        token_bytes = engine.tokenizer.token_bytes

        def broken(token_id: int, **options: Any) -> bytes:
            if token_id == 1010:
                raise IndexError("planted")
            return token_bytes(token_id, **options)

        engine.tokenizer.token_bytes = broken  # type: ignore[method-assign]
        bad = SamplingParams(max_tokens=5, ignore_eos=True, allowed_token_ids=[1010])
        outputs = engine.generate(["The heapq", "The heapq"], [bad, params])
        assert [output.outputs[0].finish_reason for output in outputs] == ["error", "length"]
        assert "IndexError: planted" in (outputs[0].outputs[0].error or "")
        assert outputs[1].outputs[0].token_ids == expected.token_ids
        assert engine.stats().num_running == 0


# ---- what failed requests leave


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("how", ["fails", "aborted between chunks", "a reader is aborted"])
def test_nothing_that_is_not_known_to_be_sound_can_be_found(
    how: str, depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads what the first request writes in its first life gets no token."""
    bad_seed: list[int] = [7]

    def fault(history: Any, seed: int) -> int | None:
        return TOKEN_NOT_FINITE if seed in bad_seed else None

    engine = scripted_engine(Engine, monkeypatch, depth=depth, fault=fault, max_num_batched_tokens=6)
    params = SamplingParams(max_tokens=3, ignore_eos=True, seed=7)
    pool = engine._core.scheduler.kv.pool
    engine.add_request("first", ids(*STEM), params)
    engine.step()
    engine.add_request("reader", ids(*STEM, *STEM), SamplingParams(max_tokens=3, ignore_eos=True, seed=8))
    engine.step()
    assert pool.num_cached > 0
    if how == "aborted between chunks":
        engine.abort(["first", "reader"])
        assert pool.num_cached == 0
    finals: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        finals |= {output.request_id: output for output in engine.step() if output.finished}
        if how == "a reader is aborted" and "first" in finals:
            engine.abort("reader")
    if how != "aborted between chunks":
        assert finals["first"].outputs[0].finish_reason == "error"
    if how == "fails":  # it is computed anew, without what the first one wrote
        history = [*STEM, *STEM]
        for token in finals["reader"].outputs[0].token_ids:
            assert token == next_token(history, 8)
            history.append(token)
        assert len(history) == 2 * len(STEM) + 3 and finals["reader"].metrics.num_preemptions == 1  # type: ignore[union-attr]
    else:
        assert pool.num_cached == 0
    bad_seed.clear()
    assert engine.generate(ids(*STEM), params)[0].outputs[0].finish_reason == "length"
    check_books(engine)


# ---- what was kept from a step


def test_users_ids_are_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted_engine(Engine, monkeypatch)
    long = SamplingParams(max_tokens=9, ignore_eos=True, seed=1)
    for name in ("x#1", "1-x", "2-x#1", "0", "1"):
        engine.add_request(name, ids(1), long)
    engine.add_request("x", ids(1), SamplingParams(max_tokens=9, ignore_eos=True, seed=1, n=3))
    with pytest.raises(ValueError, match="request_id 'x' is in use"):
        engine.add_request("x", ids(1), long)
    assert len(engine.generate([ids(1)] * 3, long)) == 3  # whose labels are numbers too
    finals = {output.request_id: output for output in drained(engine)}
    assert set(finals) == {"x#1", "1-x", "2-x#1", "0", "1", "x"}
    assert all(output.outputs[0].token_ids == finals["x"].outputs[0].token_ids for output in finals.values())
    engine.add_request("x", ids(1), long)
    for bad in ([["x"]], 7, ["x", None]):
        with pytest.raises(ValueError, match="request_id"):
            engine.abort(bad)  # type: ignore[arg-type]
    assert [output.outputs[0].finish_reason for output in drained(engine)] == ["length"]


def drained(engine: Engine) -> list[RequestOutput]:
    finals = []
    while engine.has_unfinished_requests():
        finals += [output for output in engine.step() if output.finished]
    return finals


def test_a_stream_names_the_prompt_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted_engine(Engine, monkeypatch)
    with pytest.raises(ValueError, match=r"prompts\[2\]: .* more than max_model_len 400"):
        engine.stream([ids(1), ids(2), ids(*[3] * 401)], SamplingParams(max_tokens=1))


def test_an_urgent_prompt_does_not_wait_for_the_rest_of_a_lesser_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for priority, first in ((-1, "urgent"), (0, "large")):
        engine = scripted_engine(Engine, monkeypatch, max_num_batched_tokens=8)
        engine.add_request("large", ids(*[VOCAB - 1] * 200), SamplingParams(max_tokens=1))
        engine.step()
        engine.add_request("urgent", ids(1, 2, 3), SamplingParams(max_tokens=1), priority=priority)
        finals = [output.request_id for output in engine.step() if output.finished]
        assert finals == (["urgent"] if first == "urgent" else [])
        assert [output.request_id for output in drained(engine)][:1] == ["large"]


def test_a_dead_engine_is_not_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = scripted_engine(AsyncEngine, monkeypatch)
    ready = []

    def close() -> None:  # of the loop, in the thread, after it has died
        ready.append(engine.is_ready)

    def dies() -> None:
        raise SystemError("planted")

    engine._engine.close = close  # type: ignore[method-assign]
    assert engine.is_ready
    with pytest.raises(ValueError, match=r"request_id\[0\] must be a string, got \['x'\]"):
        engine.abort([["x"]])  # type: ignore[list-item]
    engine._steps.post(dies)
    engine._steps._thread.join(30)
    assert ready == [False] and not engine.is_ready and engine.error is not None


def test_a_stop_token_is_no_text_although_its_end_was_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure between the token and the end that it brings: the request ends by the error, and its text has no more
    than it would have.
    """

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    with Engine("nemo-tiny", device="cpu", num_kv_pages=16, max_model_len=64) as engine:
        params = SamplingParams(temperature=0.0, max_tokens=8, allowed_token_ids=[2000], stop_token_ids=[2000])
        engine.add_request("a", "The", params)
        with monkeypatch.context() as patch:
            patch.setattr("nemo_engine.scheduler.scheduler.end_of", fail)
            with pytest.raises(RuntimeError, match="planted"):
                for _ in range(4):
                    engine.step()
        outputs = [output for _ in range(4) for output in engine.step()]
        (completion,) = outputs[-1].outputs
        assert (completion.finish_reason, completion.token_ids, completion.text) == ("error", [2000], "")
