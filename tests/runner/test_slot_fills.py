"""What requests write where they enter slots: one upload a step, whatever enters, and nothing of it elsewhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_engine.ops import Ops, Site
from nemo_engine.ops.sampling import seed_key
from nemo_engine.runner.request_table import RequestTable
from nemo_engine.runner.sampler import Sampler
from nemo_engine.runner.slot_fills import SlotFills
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.step import SlotFill
from tests.helpers.checkpoints import tiny_config

CPU, META = torch.device("cpu"), torch.device("meta")
OPS = Ops.select(Site.of(tiny_config(), 16, torch.float32, CPU), {})
VOCAB, SLOTS = 50, 6
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0.0, "top_k": 7},
    {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1},
    {"presence_penalty": 0.5, "frequency_penalty": -0.25, "repetition_penalty": 1.5},
    {},
]


def make(device: torch.device) -> tuple[RequestTable, Sampler, SlotFills]:
    table = RequestTable(SLOTS, 40, 16, 9, VOCAB, device)
    sampler = Sampler(SLOTS, VOCAB, OPS, device, without_token=(48, 49))
    return table, sampler, SlotFills(table, sampler)


def make_fill(slot: int, length: int, which: int, **other: Any) -> SlotFill:
    ids = torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(slot)).tolist()
    pages = tuple(range(slot, slot + -(-length // 16)))
    params = SamplingParams(**PARAMS[which])
    return SlotFill(slot, ids, length - length // 3, length - 1, pages, params, seed=slot << 60, **other)


class Crossings(TorchDispatchMode):
    """Counts operations that bring a tensor of the host to the device, and those that change something there."""

    uploads = changes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        self.uploads += any(not x.is_meta for x in tensors) and isinstance(result, torch.Tensor) and result.is_meta
        self.changes += func._schema.is_mutable
        return result


@pytest.mark.parametrize("count", [1, 4])
def test_a_step_has_one_upload_whatever_enters(count: int) -> None:
    fills = make(META)[2]
    fills.prepare([make_fill(slot, 7 * slot, slot % 4) for slot in range(1, count + 1)])
    with Crossings() as crossings:
        words = fills.upload(range(33))
    assert words.shape == (33,) and words.is_meta
    # The states of all together, and tokens and pages of each; where a request has penalties, its history too.
    penalised = sum(slot % 4 == 2 for slot in range(1, count + 1))
    assert (crossings.uploads, crossings.changes) == (1, 3 + 2 * count + 4 * penalised)


def test_slots_hold_what_entered_and_others_what_they_held() -> None:
    table, sampler, fills = make(CPU)
    table.token_ids[1:], table.page_table[1:] = -7, -7
    slots = {3: (1, 1), 1: (17, 2), 5: (40, 0), 2: (32, 3)}  # length and parameters; slots in no order
    entering = [make_fill(slot, *which, draft_until=slot) for slot, which in slots.items()]
    params = sampler.slot_params
    before = {field.name: getattr(params, field.name).clone() for field in dataclasses.fields(params)}
    fills.prepare(entering)
    assert fills.upload([5, -6, 1 << 62]).tolist() == [5, -6, 1 << 62]
    for fill in entering:
        slot, length, want = fill.slot, len(fill.token_ids), fill.params
        assert table.token_ids[slot].tolist() == [*fill.token_ids, *[-7] * (40 - length)]
        assert table.page_table[slot].tolist() == [*fill.pages, *[-7] * (3 - len(fill.pages))]
        assert (table.num_computed[slot], table.draft_until[slot]) == (length - 1, slot)
        row = [getattr(params, name)[slot].item() for name in ("temperature", "top_k", "top_p", "min_p", "seed_keys")]
        temperature = 1.0 if want.temperature is None else want.temperature
        cuts = [VOCAB, 1.0, 0.0] if want.is_greedy else [want.top_k or VOCAB, want.top_p, want.min_p]
        assert row == [temperature, *cuts, seed_key(slot << 60)], slot
        penalties = [getattr(params, name)[slot].item() for name in ("frequency", "presence", "repetition")]
        assert penalties == [want.frequency_penalty, want.presence_penalty, want.repetition_penalty]
        assert sampler._hides[slot]
    counts = torch.tensor(entering[1].token_ids[entering[1].num_prompt_tokens :]).bincount(minlength=VOCAB)
    assert params.output_counts[1].tolist() == counts.tolist() and counts.sum() == 5
    assert params.prompt_mask[1].nonzero().flatten().tolist() == sorted({*entering[1].token_ids[:12]})
    for slot in (0, 4, 6):
        assert (table.token_ids[slot] == (-7 if slot else 0)).all() and not table.num_computed[slot]
        for name in ("temperature", "min_p", "top_k", "top_p", "seed_keys", "frequency", "presence", "repetition"):
            assert getattr(params, name)[slot] == before[name][slot] and not sampler._hides[slot]


def test_fills_of_a_step_that_failed_are_forgotten() -> None:
    table, _, fills = make(CPU)
    table.token_ids[1:] = 1 << 30  # what is not entered is no token to count
    with pytest.raises(ValueError, match="pages must be from 1 to 9"):
        fills.prepare([make_fill(1, 5, 2), dataclasses.replace(make_fill(2, 5, 0), pages=(99,))])
    fills.prepare([make_fill(3, 4, 0)])
    fills.upload([])
    assert table.num_computed.tolist() == [0, 0, 0, 3, 0, 0, 0]
