"""Steps beside an event loop: small ones take one core, large ones all; and no other thread is touched."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from nemo_engine import AsyncEngine, Engine, SamplingParams
from nemo_engine.ops.op import compiled_for_cpu
from nemo_engine.runner.threads import SharedCores

MIB = 1 << 20


@pytest.mark.skipif(compiled_for_cpu() is None, reason="csrc/cpu was not built")
@pytest.mark.parametrize(
    ("weight_bytes", "num_tokens", "num_pages", "is_small"),
    [
        (16 * MIB, 1, 1, True),
        (16 * MIB, 16, 64, True),
        (16 * MIB, 17, 64, False),
        (16 * MIB, 1, 65, False),  # of a quarter of a MiB each
        (32 * MIB, 1, 0, True),
        (33 * MIB, 1, 0, False),
        (24_000 * MIB, 1, 1, False),
    ],
)
def test_small_steps_take_one_core(weight_bytes: int, num_tokens: int, num_pages: int, is_small: bool) -> None:
    kernels = compiled_for_cpu()
    assert kernels is not None
    before, found = torch.get_num_threads(), []

    def steps() -> None:
        torch.get_num_threads()  # a thread's first question sets its number
        kernels.set_num_threads(3)
        cores = SharedCores(weight_bytes, MIB // 4)
        for tokens in (num_tokens, num_tokens, 1 << 40, num_tokens):
            cores.take(tokens, num_pages)
            found.append(torch.get_num_threads())

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    some = 1 if is_small else 3
    assert found == [some, some, 3, some] and torch.get_num_threads() == before != 3


def test_only_served_steps_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step of an ``AsyncEngine`` says what it computes and attends to, in its thread; an ``Engine`` has the cores to itself."""
    found = []
    monkeypatch.setattr(SharedCores, "take", lambda _, *sizes: found.append((threading.current_thread().name, *sizes)))
    options: dict[str, Any] = {
        "device": "cpu",
        "skip_tokenizer_init": True,
        "page_size": 16,
        "num_kv_pages": 64,
        "max_model_len": 128,
    }
    prompt: dict[str, Any] = {"prompt_token_ids": list(range(3, 33))}
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with Engine("nemo-tiny", **options) as engine:
        engine.generate([prompt], params)
    assert found == []

    async def serve() -> None:
        async with AsyncEngine("nemo-tiny", **options) as engine:
            assert engine.max_num_batched_tokens == 2048  # the CPU's default
            async for _ in engine.generate(prompt, params):
                pass

    asyncio.run(serve())
    assert found == [("nemo-engine", *sizes) for sizes in [(30, 2), (1, 2), (1, 2), (1, 3)]]


@pytest.mark.skipif(compiled_for_cpu() is None, reason="csrc/cpu was not built")
def test_a_number_of_threads_that_is_none_is_refused() -> None:
    kernels = compiled_for_cpu()
    assert kernels is not None
    for count in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"threads must be from 1 to 4096, got {count}"):
            kernels.set_num_threads(count)
