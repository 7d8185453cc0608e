"""Drafts and their acceptance on a CPU, run by run: a step of a small model takes less time than the definitions' calls
of torch.
"""

from __future__ import annotations

from torch import Tensor

from nemo_engine.ops.draft import LONGEST_MATCH, SHORTEST_MATCH
from nemo_engine.step import TOKEN_NOT_DRAFTED, TOKEN_NOT_TAKEN


def draft_(
    token_ids: Tensor, num_computed: Tensor, draft_until: Tensor, slots: Tensor, width: int, max_drafts: int
) -> Tensor:
    """See ``draft.draft_``."""
    table, computed, until = token_ids.numpy(), num_computed.numpy(), draft_until.numpy()
    ahead: list[int] = []
    for slot in slots[::width].tolist():
        last = int(computed[slot])
        count = min(max_drafts, int(until[slot]) - 2 - last)
        if count > 0:
            row = table[slot]
            end = _latest_match(row[: last + 1].tobytes(), last)
            if end < 0:
                count = 0
            else:
                period = last - end
                for step in range(count):
                    row[last + 1 + step] = row[end + 1 + step % period]
        ahead += [min(step, max(0, count)) for step in range(width)]
    return slots.new_tensor(ahead)


def _latest_match(known: bytes, last: int) -> int:
    """Where the latest earlier occurrence of the longest suffix ends, negative for none. known: ids of 4 bytes each."""
    for length in range(LONGEST_MATCH, SHORTEST_MATCH - 1, -1):
        if last < length:
            continue
        suffix, end = known[-4 * length :], len(known) - 4
        while (start := known.rfind(suffix, 0, end)) >= 0:
            if start % 4 == 0:
                return start // 4 + length - 1
            end = start + 4 * length - 1  # it lies between two ids
    return -1


def accept_(
    token_ids: Tensor, num_computed: Tensor, slots: Tensor, seq_lens: Tensor, tokens: Tensor, width: int
) -> None:
    """See ``draft.accept_``."""
    table, computed = token_ids.numpy(), num_computed.numpy()
    lengths, chosen = seq_lens[width - 1 :: width].tolist(), tokens.tolist()
    for run, slot in enumerate(slots[::width].tolist()):
        first, last = run * width, int(computed[slot])
        count = max(0, lengths[run] - 1 - last)
        row, taken = table[slot], 1
        while taken <= count and row[last + taken] == chosen[first + taken - 1]:
            taken += 1
        if slot:
            row[last + taken] = max(0, chosen[first + taken - 1])
            computed[slot] = last + taken
        for place in range(taken, width):
            chosen[first + place] = TOKEN_NOT_TAKEN if place <= count else TOKEN_NOT_DRAFTED
    tokens.copy_(tokens.new_tensor(chosen))
