"""Speculation whose widths and drafts a test chooses: any width at any step, drafts that are right, wrong or looked up."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nemo_engine.engine.engine import Engine
from nemo_engine.scheduler import Scheduler

Plant = Callable[[Sequence[int], int], Sequence[int]]  # from known tokens and a number to at most as many drafts


def choose_widths(scheduler: Scheduler, rng: random.Random, widths: Sequence[int] = (2, 4, 8)) -> None:
    """Each step is of a random width, as far as a step's tokens allow."""

    def width_for(decodes: Sequence[Any], max_tokens: int, *_: int) -> int:
        return rng.choice([1, *[width for width in widths if width * len(decodes) <= max_tokens]])

    scheduler.speculation.width_for = width_for  # type: ignore[method-assign]


def plant_drafts(engine: Engine, plant: Plant) -> None:
    """Drafts are what ``plant`` says."""

    def draft_(
        token_ids: Tensor, num_computed: Tensor, draft_until: Tensor, slots: Tensor, width: int, max_drafts: int
    ) -> Tensor:
        ahead: list[int] = []
        for slot in slots[::width].tolist():
            last = int(num_computed[slot])
            room = min(max_drafts, int(draft_until[slot]) - 2 - last)
            drafts = list(plant(token_ids[slot, : last + 1].tolist(), room))[:room] if room > 0 else []
            for place, draft in enumerate(drafts):
                token_ids[slot, last + 1 + place] = draft
            ahead += [min(place, len(drafts)) for place in range(width)]
        return slots.new_tensor(ahead)

    step = engine._core.runner._step  # type: ignore[attr-defined]
    step.ops = dataclasses.replace(step.ops, draft_=draft_)


def random_drafts(rng: random.Random, vocab_size: int) -> Plant:
    """Any number of any tokens."""
    return lambda known, room: [rng.randrange(vocab_size) for _ in range(rng.randint(0, room))]


def right_drafts(texts: Sequence[Sequence[int]]) -> Plant:
    """What follows in the first of ``texts``, whole requests, that begins with what is known."""

    def plant(known: Sequence[int], room: int) -> Sequence[int]:
        for text in texts:
            if len(text) > len(known) and list(text[: len(known)]) == list(known):
                return text[len(known) : len(known) + room]
        return ()

    return plant
