"""How decode attention splits its rows among units of work: the rule that the kernels compute on the device, from the
lengths.

The rule. Rows stand on a line, each with its tiles of keys and ``PART_COST`` tiles for what a part costs beside its
keys. A unit takes what comes next on the line, up to an equal share and one part's cost; where a row does not fit
whole, the unit takes so much of it that its part's cost still fits, and leaves the rest to the next unit. So all units
end together, a row that fits is not cut, the cuts of a row lie a share apart, and units never outnumber the blocks that
the GPU runs at once.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, pairwise

TILE = 64  # keys; rows are cut between tiles
PART_COST = 2
MIN_SHARE = 2  # tiles: less would wait longer for its first keys than it reads
BLOCKS_PER_SM = 2  # of the decode kernels


def num_units(sms: int, kv_heads: int) -> int:
    """Units of work per KV head such that the blocks of all heads run at once."""
    return max(1, sms * BLOCKS_PER_SM // kv_heads)


def share_of(lengths: Sequence[int], units: int) -> int:
    """Tiles that a unit advances on the line, at least."""
    return max(MIN_SHARE, -(-sum(map(_line_tiles, lengths)) // units))


def cuts(lengths: Sequence[int], units: int) -> list[tuple[int, int]]:
    """Where units begin and end, as (row, tile): unit u has the keys from cut u to cut u + 1.

    There are at most ``units`` + 1.

    lengths: keys of each row; a row of none belongs to no unit. The last cut is (rows, 0).
    """
    starts = list(accumulate(map(_line_tiles, lengths), initial=0))
    share, place, made = share_of(lengths, units), 0, [(0, 0)]
    while place < starts[-1]:
        reached = place + share + PART_COST
        row = bisect_right(starts, reached) - 1  # that holds it; the end of the line counts as one more
        place = max(starts[row], reached - PART_COST) if row < len(lengths) else starts[-1]
        made.append((row, place - starts[row]))
    return made


def parts(lengths: Sequence[int], units: int) -> list[list[tuple[int, int, int]]]:
    """What each unit reads: (row, first key, end) in the order in which it does."""
    split = []
    for (row, tile), (last, last_tile) in pairwise(cuts(lengths, units)):
        begins, ends = {row: tile * TILE}, {last: last_tile * TILE}
        rows = range(row, min(last + 1, len(lengths)))
        spans = [(at, begins.get(at, 0), ends.get(at, lengths[at])) for at in rows]
        split.append([span for span in spans if span[1] < span[2]])
    return split


def _line_tiles(length: int) -> int:
    return -(-length // TILE) + PART_COST if length > 0 else 0
