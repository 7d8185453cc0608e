"""The engine for asyncio programs: the same tokens as the plain one, and what happens to requests that are dropped,
slow or ill-fated.
"""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from nemo_engine import AsyncEngine, Engine, EngineClosedError, EngineDeadError, RequestOutput, SamplingParams
from nemo_engine.sampling_params import RequestOutputKind
from tests.scheduler.invariants import check

OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float64", "page_size": 16, "num_kv_pages": 200, "max_num_seqs": 16,
    "max_num_batched_tokens": 128, "max_model_len": 512,
}  # fmt: skip
DELTA = RequestOutputKind.DELTA


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncEngine]:
    with AsyncEngine("nemo-tiny", **OPTIONS) as engine:
        yield engine


def seeded(seed: int, max_tokens: int = 24, **options: Any) -> SamplingParams:
    return SamplingParams(temperature=0.9, seed=seed, max_tokens=max_tokens, ignore_eos=True, **options)


def prompt_ids(seed: int, length: int = 20) -> dict[str, list[int]]:
    return {"prompt_token_ids": [1, *[1000 + (seed * 37 + i * 11) % 4000 for i in range(length)]]}


async def last(engine: AsyncEngine, *args: Any, **options: Any) -> RequestOutput:
    async for output in engine.generate(*args, **options):
        final = output
    return final


async def until(engine: AsyncEngine, count: int) -> None:
    """Wait until ``count`` requests are unfinished."""
    while engine.num_unfinished != count:
        await asyncio.sleep(0.005)


async def idle(engine: AsyncEngine) -> None:
    """Wait, for a bounded time, until the engine has nothing to do; every page must then be free."""
    for _ in range(5000):
        await engine.call(lambda e: check(e._core.scheduler))
        stats = await engine.call(lambda e: e.stats())
        if stats.num_running == stats.num_waiting == engine.num_unfinished == 0:
            assert stats.num_free_pages == stats.num_pages
            return
        await asyncio.sleep(0.02)
    raise AssertionError("the engine did not come to rest")


def test_many_at_once_give_what_each_gives_alone(engine: AsyncEngine) -> None:
    count = 40  # more than there are slots
    with Engine("nemo-tiny", **OPTIONS) as plain:
        expected = [plain.generate(prompt_ids(i), seeded(i))[0].outputs[0] for i in range(count)]

    async def one(index: int) -> None:
        kind = (RequestOutputKind.CUMULATIVE, DELTA, RequestOutputKind.FINAL_ONLY)[index % 3]
        text, token_ids, num_outputs = "", [], 0
        async for output in engine.generate(prompt_ids(index), seeded(index, output_kind=kind)):
            (completion,) = output.outputs
            num_outputs += 1
            if kind is DELTA:
                text, token_ids = text + completion.text, token_ids + completion.token_ids
            else:
                text, token_ids = completion.text, completion.token_ids
        assert output.finished and (num_outputs == 1) == (kind is RequestOutputKind.FINAL_ONLY)
        assert (text, token_ids) == (expected[index].text, expected[index].token_ids)

    async def everything() -> None:
        await asyncio.gather(*[one(i) for i in range(count)])
        await idle(engine)

    asyncio.run(everything())


def test_chat_and_text_prompts(engine: AsyncEngine) -> None:
    async def run() -> None:
        outputs = [o async for o in engine.chat([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=3))]
        assert outputs[-1].finished and outputs[-1].sampling_params is not None
        assert outputs[-1].sampling_params.temperature == 0.3
        final = await last(engine, "The heapq module", SamplingParams(max_tokens=4, temperature=0.0))
        assert len(final.outputs[0].token_ids) == 4 and final.outputs[0].text

    asyncio.run(run())


def test_bad_input_is_refused_and_disturbs_nobody(engine: AsyncEngine) -> None:
    async def run() -> None:
        may_go_on = threading.Event()
        pause = asyncio.create_task(engine.call(lambda _: may_go_on.wait(60)))  # so that "taken" does not end meanwhile
        running = asyncio.create_task(last(engine, prompt_ids(1), seeded(1, 60), "taken"))
        await until(engine, 1)
        for prompt, params, request_id, message in (
            ("", None, None, "prompt must not be empty"),
            (prompt_ids(1), seeded(1, 5000), None, "more than max_model_len 512"),
            (prompt_ids(1), None, "", "request_id must be a non-empty string"),
            (prompt_ids(1), None, 7, "request_id must be a non-empty string, got 7"),
            (prompt_ids(1), None, "taken", "request_id 'taken' is in use"),
            (prompt_ids(1), "hot", None, "sampling_params must be a SamplingParams"),
        ):
            with pytest.raises(ValueError, match=message):
                await last(engine, prompt, params, request_id)
        may_go_on.set()
        assert await pause
        assert len((await running).outputs[0].token_ids) == 60
        await idle(engine)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["break", "aclose", "cancel", "abort", "garbage"])
def test_a_dropped_iterator_frees_its_pages(engine: AsyncEngine, how: str) -> None:
    async def run() -> None:
        params = seeded(3, 400)
        if how == "cancel":
            task = asyncio.create_task(last(engine, prompt_ids(3), params))
            await until(engine, 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "abort":
            outputs = []
            async for output in engine.generate(prompt_ids(3), params, "victim"):
                outputs.append(output)
                engine.abort(["victim", "nobody"])
            assert outputs[-1].outputs[0].finish_reason == "abort" and len(outputs[-1].outputs[0].token_ids) < 400
        else:
            iterator = engine.generate(prompt_ids(3), params)
            async for _ in iterator:
                break
            if how == "aclose":
                await iterator.aclose()  # type: ignore[attr-defined]
            del iterator
            gc.collect()
        await idle(engine)

    asyncio.run(run())


def test_a_request_that_is_cancelled_while_it_is_added_never_runs(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = engine._engine.prepare
    has_begun, may_go_on = threading.Event(), threading.Event()

    def slow(*args: Any, **more: Any) -> Any:
        has_begun.set()
        assert may_go_on.wait(30)
        return prepare(*args, **more)

    async def run() -> None:
        monkeypatch.setattr(engine._engine, "prepare", slow)
        params = seeded(3, 400, structured_outputs={"regex": "[a-z]{100,400}"})
        task = asyncio.create_task(last(engine, prompt_ids(3), params, "victim"))
        assert await asyncio.to_thread(has_begun.wait, 30)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        may_go_on.set()
        await asyncio.get_running_loop().shutdown_default_executor()
        assert engine.num_unfinished == 0
        await idle(engine)

    asyncio.run(run())


def test_a_dropped_iterator_ends_no_other_request_of_its_id(engine: AsyncEngine) -> None:
    async def run() -> None:
        before = engine.generate(prompt_ids(3), seeded(3, 20), "again")
        await anext(before)
        while engine.num_unfinished:
            await asyncio.sleep(0.01)
        after = engine.generate(prompt_ids(4), seeded(4, 40), "again")
        await anext(after)
        await before.aclose()  # type: ignore[attr-defined]
        outputs = [output async for output in after]
        assert outputs[-1].outputs[0].finish_reason == "length"
        await idle(engine)

    asyncio.run(run())


_NOT_CLOSED = """
import asyncio, os
from nemo_engine import AsyncEngine, EngineClosedError, SamplingParams

engine = AsyncEngine("nemo-tiny", num_kv_pages=200, device="cpu")
iterator = engine.generate("The heapq", SamplingParams(max_tokens=5000, ignore_eos=True))
loop = asyncio.new_event_loop()
loop.run_until_complete(anext(iterator))
child = os.fork()
if child == 0:
    try:
        asyncio.run(anext(engine.generate("The heapq")))
    except EngineClosedError as error:
        print("child:", error, engine.is_ready, flush=True)
    engine.close()
    os._exit(0)
os.waitpid(child, 0)
print("parent: leaving", engine.num_unfinished, flush=True)
"""


def test_it_can_be_left_open_and_says_that_it_was_forked() -> None:
    done = subprocess.run([sys.executable, "-c", _NOT_CLOSED], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (
        "child: the engine runs in the process that this one was forked from" in done.stdout and "spawn" in done.stdout
    )
    assert "used neither engine nor torch False" in done.stdout and "parent: leaving 1" in done.stdout


def test_one_that_is_forgotten_is_closed() -> None:
    engine = AsyncEngine("nemo-tiny", **OPTIONS)
    steps = engine._steps
    del engine
    gc.collect()
    assert not steps.is_alive


def test_a_slow_consumer_holds_up_nobody_and_loses_nothing(engine: AsyncEngine) -> None:
    async def run() -> None:
        params = seeded(5, 200, output_kind=DELTA, logprobs=1)
        expected = await last(engine, prompt_ids(5), seeded(5, 200, logprobs=1))
        slow = engine.generate(prompt_ids(5), params)
        first = await anext(slow)
        quick = await last(engine, prompt_ids(6), seeded(6, 200))
        assert len(quick.outputs[0].token_ids) == 200
        await idle(engine)  # the slow one has long ended, and one merged output waits
        rest = [output async for output in slow]
        assert len(rest) == 1 and rest[0].finished
        parts = [first.outputs[0], rest[0].outputs[0]]
        assert [t for part in parts for t in part.token_ids] == expected.outputs[0].token_ids
        assert "".join(part.text for part in parts) == expected.outputs[0].text
        entries = [entry for part in parts for entry in part.logprobs or ()]
        assert [list(entry) for entry in entries] == [list(entry) for entry in expected.outputs[0].logprobs or ()]

    asyncio.run(run())


def test_several_completions_are_merged_by_index(engine: AsyncEngine) -> None:
    async def run() -> None:
        iterator = engine.generate(prompt_ids(8), seeded(8, 12, n=3, output_kind=DELTA))
        outputs = [await anext(iterator)]
        while engine.num_unfinished:
            await asyncio.sleep(0.02)
        outputs += [output async for output in iterator]
        plain = await last(engine, prompt_ids(8), seeded(8, 12, n=3))
        for completion in plain.outputs:
            parts = [c for output in outputs for c in output.outputs if c.index == completion.index]
            assert [t for part in parts for t in part.token_ids] == completion.token_ids
            assert parts[-1].finish_reason == "length"

    asyncio.run(run())


def test_an_idle_engine_burns_no_time(engine: AsyncEngine) -> None:
    asyncio.run(idle(engine))
    used = []
    for _ in range(5):  # something else of this process may compute in a second, but not in each
        before = time.process_time()
        time.sleep(1.0)
        used.append(time.process_time() - before)
        if used[-1] < 0.05:
            return
    raise AssertionError(f"CPU seconds in a second each: {used}")


def test_loops_of_several_threads_share_it(engine: AsyncEngine) -> None:
    results: dict[int, list[int]] = {}

    def work(index: int) -> None:
        results[index] = asyncio.run(last(engine, prompt_ids(index), seeded(index))).outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    expected = {
        index: asyncio.run(last(engine, prompt_ids(index), seeded(index))).outputs[0].token_ids for index in range(6)
    }
    assert results == expected


def test_a_loop_that_closes_with_requests_under_way_leaves_none(engine: AsyncEngine) -> None:
    loop = asyncio.new_event_loop()
    iterator = engine.generate(prompt_ids(4), seeded(4, 450))
    loop.run_until_complete(anext(iterator))
    loop.close()
    asyncio.run(idle(engine))
    del iterator


def test_drain_waits_and_refuses_and_aborts_at_its_deadline() -> None:
    async def run() -> None:
        for timeout, is_complete in ((600.0, True), (0.01, False)):
            with AsyncEngine("nemo-tiny", **OPTIONS) as engine:
                assert engine.is_ready and engine.stats().num_running == 0
                tasks = [asyncio.create_task(last(engine, prompt_ids(i), seeded(i, 300))) for i in range(3)]
                await until(engine, 3)
                assert await engine.drain(timeout) is is_complete
                assert not engine.is_ready
                reasons = {(await task).outputs[0].finish_reason for task in tasks}
                assert reasons == ({"length"} if is_complete else {"abort"})
                with pytest.raises(EngineClosedError, match="drained"):
                    await last(engine, prompt_ids(0))
                assert await engine.drain() is True

    asyncio.run(run())


def test_close_ends_what_runs_and_refuses_what_comes() -> None:
    async def run() -> None:
        engine = AsyncEngine("nemo-tiny", **OPTIONS)
        task = asyncio.create_task(last(engine, prompt_ids(1), seeded(1, 400)))
        await until(engine, 1)
        engine.close()
        engine.close()
        assert (await task).outputs[0].finish_reason == "abort"
        with pytest.raises(EngineClosedError):
            await last(engine, prompt_ids(1))
        with pytest.raises(EngineClosedError):
            await engine.call(lambda e: e.stats())
        assert not engine.is_ready and engine.error is None

    asyncio.run(run())


def test_when_the_thread_dies_every_waiter_hears_of_it(caplog: pytest.LogCaptureFixture) -> None:
    def die(_: Any) -> None:
        raise SystemExit("planted")

    async def run() -> None:
        with AsyncEngine("nemo-tiny", **OPTIONS) as engine:
            tasks = [asyncio.create_task(last(engine, prompt_ids(i), seeded(i, 400))) for i in range(20)]
            await until(engine, 20)
            drain = asyncio.create_task(engine.drain())
            await asyncio.sleep(0)
            with pytest.raises(EngineDeadError, match="planted"):
                await engine.call(die)
            with pytest.raises(EngineDeadError, match="planted"):
                await drain
            for task in tasks:
                with pytest.raises(EngineDeadError, match="SystemExit: planted"):
                    await task
            assert not engine.is_ready and isinstance(engine.error, EngineDeadError)
            for late in (last(engine, prompt_ids(0)), engine.drain()):
                with pytest.raises(EngineDeadError):
                    await late

    asyncio.run(run())
    assert "has ended by an error" in caplog.text


def test_a_failed_step_ends_its_requests_and_the_engine_lives() -> None:
    async def run() -> None:
        with AsyncEngine("nemo-tiny", **OPTIONS) as engine:
            expected = await last(engine, prompt_ids(1), seeded(1))

            def plant(plain: Any) -> None:
                launch = plain._core.runner.launch

                def broken(plan: Any) -> Any:
                    plain._core.runner.launch = launch
                    raise RuntimeError("planted")

                plain._core.runner.launch = broken

            await engine.call(plant)
            final = await last(engine, prompt_ids(1), seeded(1))
            assert final.outputs[0].finish_reason == "error" and "planted" in str(final.outputs[0].error)
            again = await last(engine, prompt_ids(1), seeded(1))
            assert again.outputs[0].token_ids == expected.outputs[0].token_ids
            await idle(engine)

    asyncio.run(run())
