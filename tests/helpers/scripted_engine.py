"""Whole engines over the scripted device half: every step is checked for sense, and takes no time."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import pytest

from nemo_engine.engine.async_engine import AsyncEngine
from nemo_engine.engine.core import EngineCore, StartedCore
from nemo_engine.engine.engine import Engine
from nemo_engine.scheduler import Scheduler
from nemo_engine.step import StepPlan
from tests.helpers.checkpoints import tiny_config
from tests.scheduler.invariants import check
from tests.scheduler.scripted import VOCAB, Fault, ScriptedHandle, ScriptedRunner

E = TypeVar("E", Engine, AsyncEngine)
EOS = 2


class Runner(ScriptedRunner):
    """As the core wants it for a whole life."""

    is_closed = False

    def launch(self, plan: StepPlan) -> ScriptedHandle:
        handle = super().launch(plan)
        self.plans.clear()
        return handle

    def settle(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True


def scripted_engine(
    kind: type[E], monkeypatch: pytest.MonkeyPatch, *, depth: int = 1, fault: Fault | None = None, **options: int
) -> E:
    """An engine of token ids below ``VOCAB``; ``options`` of its scheduler."""
    sizes = {"num_pages": 200, "page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 64} | options
    scheduler = Scheduler(**sizes, max_model_len=400)
    runner = Runner(sizes["page_size"]) if fault is None else Runner(sizes["page_size"], fault)
    config = tiny_config(vocab_size=VOCAB)
    started = StartedCore(EngineCore(scheduler, runner, depth), config, Path("scripted"))  # type: ignore[arg-type]
    monkeypatch.setattr("nemo_engine.engine.base.start_core", lambda *arguments: started)
    engine: Any = kind("scripted", skip_tokenizer_init=True, scheduling_policy="priority")
    return engine


def check_books(engine: Engine) -> None:
    """Pages, slots and lists agree, and what can be found in the prefix cache was written there."""
    core: Any = engine._core
    scheduler = core.scheduler
    check(scheduler)
    size = scheduler.kv.page_size
    for page_hash, page in scheduler.kv.pool._page_of.items():
        tokens = core.runner._written.get((page, size - 1))
        assert tokens is not None, f"page {page} can be found, and nobody has written it"
        chain = blake2b(b"", digest_size=16).digest()
        for start in range(0, len(tokens), size):
            content = b"".join(token.to_bytes(4, "little") for token in tokens[start : start + size])
            chain = blake2b(chain + content, digest_size=16).digest()
        assert chain == page_hash, f"page {page} is found for what it does not hold"
