"""What could make a kernel read or write out of bounds never reaches the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_engine.runner.request_table import RequestTable
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.step import SlotFill, StepPlan

GOOD: dict[str, Any] = {
    "slot": 2, "token_ids": [1, 2, 3], "num_prompt_tokens": 3, "num_computed_tokens": 0, "pages": (4,),
    "params": SamplingParams(), "seed": 0,
}  # fmt: skip


def make_table() -> RequestTable:
    return RequestTable(num_slots=4, max_len=40, page_size=16, num_pages=9, vocab_size=50, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot": 0}, r"slot 0 \(of 1 to 4\)"),
        ({"slot": 5}, r"slot 5 \(of 1 to 4\)"),
        ({"slot": -1}, "slot -1"),
        ({"token_ids": [1] * 41}, r"41 tokens \(at most 40\)"),
        ({"token_ids": []}, "0 tokens"),
        ({"num_computed_tokens": 3}, "3 of them computed"),
        ({"num_computed_tokens": -1}, "-1 of them computed"),
        ({"token_ids": [1, 50]}, "token_ids must be from 0 to 49, got 1 to 50"),
        ({"token_ids": [-1, 5]}, "token_ids must be from 0 to 49, got -1 to 5"),
        ({"token_ids": [1 << 40]}, "token_ids must be from 0 to 49"),
        ({"pages": (0,)}, "pages must be from 1 to 9, got 0 to 0"),
        ({"pages": (3, 10)}, "pages must be from 1 to 9, got 3 to 10"),
    ],
)
def test_a_bad_fill_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    table = make_table()
    table.fill(SlotFill(**GOOD))
    before = [x.clone() for x in (table.token_ids, table.num_computed, table.page_table)]
    with pytest.raises(ValueError, match=message):
        table.fill(SlotFill(**(GOOD | change)))
    for was, now in zip(before, (table.token_ids, table.num_computed, table.page_table), strict=True):
        assert torch.equal(was, now)


@pytest.mark.parametrize(
    ("new_pages", "message"),
    [
        ([(0, 0, 1)], "no place for page 0 of slot 0"),
        ([(5, 0, 1)], "no place for page 0 of slot 5"),
        ([(1, 3, 1)], "no place for page 3 of slot 1"),
        ([(1, -1, 1)], "no place for page -1 of slot 1"),
        ([(1, 0, 0)], "pages must be from 1 to 9, got 0"),
        ([(1, 0, 10)], "pages must be from 1 to 9, got 10"),
        ([(1, 0, 3), (1, 1, 4)], "slot 1 gets two"),
    ],
)
def test_bad_new_pages_are_refused(new_pages: list[tuple[int, int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_table().take_new_pages(StepPlan(0, (1,), new_pages=tuple(new_pages)))


def test_padding_is_token_0_in_page_0() -> None:
    table = make_table()
    assert not table.token_ids[0].any() and not table.page_table[0].any() and table.num_computed[0] == 0
