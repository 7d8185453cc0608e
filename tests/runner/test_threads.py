"""Steps take one core or all, whichever was faster of late, for both engines alike; and no more than a container's
quota.
"""

from __future__ import annotations

import asyncio
import math
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from nemo_engine import AsyncEngine, Engine, SamplingParams
from nemo_engine.ops.cpu.packed import WIDENED_FROM
from nemo_engine.ops.op import compiled_for_cpu
from nemo_engine.runner import threads
from nemo_engine.runner.runner import Runner
from nemo_engine.runner.threads import Cores, allowed_cores

MIB = 1 << 20
HAS_PRODUCTS = torch.ops.mkldnn._is_mkldnn_bf16_supported()  # of bf16
needs_kernels = pytest.mark.skipif(compiled_for_cpu() is None, reason="csrc/cpu was not built")


class Machine:
    """A clock, and steps that take what the machine at that time makes of one core or of all four."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cores: Cores | None = None) -> None:
        self.now = 0.0
        self.taken: list[int] = []
        monkeypatch.setattr(threads, "allowed_cores", lambda: 4)
        self.cores = cores or Cores(16 * MIB, MIB // 4, adapts_below=math.inf, clock=lambda: self.now)

    def run(self, steps: int, alone: float, together: float, num_tokens: int = 1, late_every: int = 0) -> float:
        """The seconds of ``steps``. late_every: of so many steps on all cores, one waits 4 ms for a thread."""
        began = self.now
        for index in range(steps):
            with self.cores.step(num_tokens, 1):
                count = torch.get_num_threads()
                self.taken.append(count)
                self.now += alone if count == 1 else together
                if count > 1 and late_every and index % late_every == 0:
                    self.now += 4e-3
        return self.now - began


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    kernels = compiled_for_cpu()
    assert kernels is not None
    before = torch.get_num_threads()
    kernels.set_num_threads(4)
    yield Machine(monkeypatch)
    assert torch.get_num_threads() == 4  # after each step
    kernels.set_num_threads(before)


@needs_kernels
def test_a_quiet_machine_loses_nothing(machine: Machine) -> None:
    """Steps begin on one core, and find soon that all are faster; what trials cost stays in bounds."""
    assert machine.run(3000, alone=0.9e-3, together=0.67e-3) < 1.03 * 3000 * 0.67e-3
    assert machine.taken[0] == 1 and machine.taken[-100:].count(4) >= 97
    # As fast is no gain; slower, and much slower, is found once and then tried rarely.
    for together in (0.9e-3, 1.5e-3, 60e-3):
        machine.run(200, 0.9e-3, together)
        assert machine.run(5000, 0.9e-3, together) < 1.025 * 5000 * 0.9e-3


@needs_kernels
def test_a_step_of_all_cores_that_waits_for_one_is_left_within_a_few(machine: Machine) -> None:
    machine.run(300, 0.9e-3, 0.67e-3)
    assert machine.taken[-1] == 4
    machine.run(12, 1.2e-3, 50e-3)  # others come
    assert machine.taken[-1] == 1
    assert machine.run(5000, 1.2e-3, 50e-3) < 1.06 * 5000 * 1.2e-3
    machine.run(8000, 0.9e-3, 0.67e-3)  # and go
    assert machine.taken[-40:].count(4) >= 38


@needs_kernels
def test_a_single_late_thread_is_no_load_but_every_fourth_is(machine: Machine) -> None:
    machine.run(300, 0.9e-3, 0.67e-3)
    machine.run(1500, 0.9e-3, 0.67e-3, late_every=200)
    assert machine.taken[-1500:].count(1) < 100
    machine.run(600, 0.9e-3, 0.67e-3, late_every=4)
    assert machine.taken[-200:].count(1) > 180


@needs_kernels
def test_a_kind_that_began_early_follows_what_smaller_ones_learn(machine: Machine) -> None:
    """As rare wide steps between narrow ones do."""
    machine.run(3, 1.6e-3, 1.1e-3, num_tokens=2)
    machine.run(200, 0.9e-3, 0.67e-3)
    machine.run(4, 1.6e-3, 1.1e-3, num_tokens=2)
    assert machine.taken[:3] == [1, 1, 1] and machine.taken[-4:] == [4, 4, 4, 4]
    machine.run(200, 1.6e-3, 5e-3, num_tokens=2)
    assert machine.taken[-100:].count(1) > 90, "it goes back where that is slower"


@needs_kernels
@pytest.mark.parametrize("seed", range(8))
def test_steps_of_all_sizes_in_any_order_choose_well(machine: Machine, seed: int) -> None:
    """Kinds in turns on a machine that changes often: no step fails, and none of the fixed choices would have been better."""
    random = Random(seed)
    spent, fixed = 0.0, [0.0, 0.0]
    for _ in range(60):
        factors = [random.choice((0.3, 1.0, 3.0)) for _ in fixed]
        for _ in range(random.choice((1, 40, 150))):
            tokens = random.choice((1, 1, 1, 2, 8, 16, 64))
            alone, together = (factor * tokens**0.5 * 1e-3 for factor in factors)
            spent += machine.run(1, alone, together, num_tokens=tokens)
            fixed = [fixed[0] + alone, fixed[1] + together]
    assert {1, 4} == set(machine.taken) and spent < 1.1 * min(fixed)


@needs_kernels
def test_kinds_of_steps_are_told_apart(machine: Machine) -> None:
    """Large steps begin on all cores, and what small ones taught says nothing of them."""
    machine.run(200, 0.9e-3, 5e-3)
    machine.run(1, 20e-3, 10e-3, num_tokens=64)
    assert machine.taken[-2:] == [1, 4]
    for weights, tokens, pages, is_small in [
        (16, 1, 1, True), (16, 16, 64, True), (16, 17, 64, False), (16, 1, 65, False), (32, 1, 0, True),
        (33, 1, 0, False), (24_000, 1, 1, False),
    ]:  # fmt: skip
        assert Cores(weights * MIB, MIB // 4, adapts_below=math.inf).is_small(tokens, pages) is is_small


@needs_kernels
def test_a_larger_kind_begins_with_what_a_smaller_one_has_learned(machine: Machine) -> None:
    machine.run(200, 5e-3, 1e-3, num_tokens=2)
    machine.taken.clear()
    machine.run(1, 5e-3, 1e-3, num_tokens=8)
    machine.run(1, 5e-3, 1e-3, num_tokens=1)
    assert machine.taken == [4, 1], "eight tokens are more than two, one is less"


@needs_kernels
def test_a_step_that_fails_leaves_the_threads_as_they_were(machine: Machine) -> None:
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt), machine.cores.step(1, 1):
            raise KeyboardInterrupt
    assert torch.get_num_threads() == 4


def _cgroups(root: Path, lines: str, files: dict[str, str]) -> int:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return allowed_cores(root)


@pytest.mark.parametrize(
    ("lines", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {}, 8),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000\n", "a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/host/path/of/it\n", {"cpu.max": "400000 100000\n"}, 4),
        ("4:memory:/x\n1:cpu,cpuacct:/d\n0::/\n", {"cpu/d/cpu.cfs_quota_us": "300000\n", "cpu/d/cpu.cfs_period_us": "100000\n"}, 3),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "garbage\n", "cpu/cpu.cfs_period_us": "0\n"}, 8),
    ],
)  # fmt: skip
def test_the_quota_of_a_cgroup_is_kept(
    lines: str, files: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert _cgroups(tmp_path, lines, files) == expected
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3}, raising=False)
    assert allowed_cores(tmp_path) == 1
    assert allowed_cores(tmp_path / "nothing here") == 1


@needs_kernels
def test_a_step_takes_no_more_cores_than_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = compiled_for_cpu()
    assert kernels is not None
    monkeypatch.setattr(threads, "allowed_cores", lambda: 2)
    before = torch.get_num_threads()
    kernels.set_num_threads(6)
    try:
        with Cores(1 << 40, MIB, adapts_below=math.inf).step(4096, 1):
            assert torch.get_num_threads() == 2
        assert torch.get_num_threads() == 6
    finally:
        kernels.set_num_threads(before)


def test_both_engines_say_what_each_step_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, and the pages that are attended to, in the thread that runs the step."""
    found: list[tuple[Any, ...]] = []
    step = Cores.step
    monkeypatch.setattr(
        Cores, "step", lambda self, *sizes: found.append((threading.current_thread().name, *sizes)) or step(self,
        *sizes)
    )  # fmt: skip
    options: dict[str, Any] = {
        "device": "cpu", "skip_tokenizer_init": True, "page_size": 16, "num_kv_pages": 64, "max_model_len": 128,
    }  # fmt: skip
    prompt: dict[str, Any] = {"prompt_token_ids": list(range(3, 33))}
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    sizes = [(30, 2), (1, 2), (1, 2), (1, 3)]
    with Engine("nemo-tiny", **options) as engine:
        found.clear()  # of start-up
        engine.generate([prompt], params)
    assert found == [(threading.current_thread().name, *size) for size in sizes]

    async def serve() -> None:
        async with AsyncEngine("nemo-tiny", **options) as engine:
            assert engine.max_num_batched_tokens == 2048  # the CPU's default
            found.clear()
            async for _ in engine.generate(prompt, params):
                pass

    asyncio.run(serve())
    assert found == [("nemo-engine", *size) for size in sizes]


@needs_kernels
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    """So a clock may choose it in bf16: a request has the same tokens and log-probabilities each time."""
    kernels = compiled_for_cpu()
    assert kernels is not None
    before, found = torch.get_num_threads(), []
    prompts = [{"prompt_token_ids": [1, *range(3 + i, 23 + 14 * i)]} for i in range(6)]
    params = SamplingParams(temperature=0.0, max_tokens=8, logprobs=2, ignore_eos=True)
    options: dict[str, Any] = {
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 6,
        "num_kv_pages": 64,
        "max_model_len": 256,
    }
    with Engine("nemo-tiny", device="cpu", dtype="bfloat16", **options) as engine:
        runner = engine._core.runner
        assert isinstance(runner, Runner) and runner._cores is not None and runner._cores._adapts_below == math.inf
        runner._cores = None
        for count in (1, 2, 5):
            kernels.set_num_threads(count)
            outputs = [*engine.generate(prompts, params), *engine.generate(prompts[3], params)]
            found.append([(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in outputs])
            engine.reset_prefix_cache()
    kernels.set_num_threads(before)
    assert found[0] == found[1] == found[2]


@needs_kernels
def test_the_clock_chooses_for_few_tokens_alone_where_many_are_multiplied_in_fp32(machine: Machine) -> None:
    machine.cores._adapts_below = 8
    machine.run(500, 5e-3, 1e-3, num_tokens=7)
    assert machine.taken[0] == 1 and machine.taken[-100:].count(4) >= 97
    machine.taken.clear()
    machine.run(500, 5e-3, 1e-3, num_tokens=8)
    assert machine.taken == [1] * 500
    prefer = {"linear": "onednn" if HAS_PRODUCTS else "widened"}
    options: dict[str, Any] = {"num_kv_pages": 64, "max_model_len": 256, "prefer": prefer}
    with Engine("nemo-tiny", device="cpu", dtype="bfloat16", **options) as engine:
        runner = engine._core.runner
        assert isinstance(runner, Runner) and runner._cores is not None
        assert runner._cores._adapts_below == (math.inf if HAS_PRODUCTS else WIDENED_FROM)


@needs_kernels
def test_the_clock_chooses_nothing_where_bits_depend_on_it(machine: Machine) -> None:
    machine.cores._adapts_below = 0
    machine.run(500, 5e-3, 1e-3)
    machine.run(500, 1e-3, 5e-3, num_tokens=64)
    assert machine.taken == [1] * 500 + [4] * 500
    for dtype in ("float32", "float64"):
        with Engine("nemo-tiny", device="cpu", dtype=dtype, num_kv_pages=64, max_model_len=256) as engine:
            runner = engine._core.runner
            assert isinstance(runner, Runner) and runner._cores is not None and runner._cores._adapts_below == 0


@needs_kernels
def test_a_number_of_threads_that_is_none_is_refused() -> None:
    kernels = compiled_for_cpu()
    assert kernels is not None
    for count in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"threads must be from 1 to 4096, got {count}"):
            kernels.set_num_threads(count)
