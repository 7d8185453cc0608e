"""Steps beside an event loop: small ones take one core, large ones all; and no other thread is touched."""

from __future__ import annotations

import threading

import pytest
import torch

from nemo_engine.ops.op import compiled_for_cpu
from nemo_engine.runner.threads import SharedCores

MIB = 1 << 20


@pytest.mark.skipif(compiled_for_cpu() is None, reason="csrc/cpu was not built")
@pytest.mark.parametrize(
    ("weight_bytes", "num_tokens", "is_small"),
    [(16 * MIB, 1, True), (16 * MIB, 16, True), (16 * MIB, 17, False), (24_000 * MIB, 1, False), (0, 5000, True)],
)
def test_small_steps_take_one_core(weight_bytes: int, num_tokens: int, is_small: bool) -> None:
    before, found = torch.get_num_threads(), []

    def steps() -> None:
        cores = SharedCores(weight_bytes)
        for tokens in (num_tokens, num_tokens, 1 << 40, num_tokens):
            cores.take(tokens)
            found.append(torch.get_num_threads())

    thread = threading.Thread(target=steps)
    thread.start()
    thread.join()
    some = 1 if is_small else before
    assert found == [some, some, before, some] and torch.get_num_threads() == before


@pytest.mark.skipif(compiled_for_cpu() is None, reason="csrc/cpu was not built")
def test_a_number_of_threads_that_is_none_is_refused() -> None:
    kernels = compiled_for_cpu()
    assert kernels is not None
    for count in (0, -1, 5000):
        with pytest.raises(ValueError, match=f"threads must be from 1 to 4096, got {count}"):
            kernels.set_num_threads(count)
