"""How well decode attention's split fills a GPU: the least time of its reads over the time that a model of the GPU
gives, without a GPU.

The model: blocks start in order, as many at once as there are places. A block starts and ends each of its parts in a
time in which it reads nothing, and in between reads its keys. All blocks that read share the memory's rate equally, but
none gets more than ``MOST_RATE`` times what it gets when all places read.

    python benchmarks/decode_split.py         # the table in NOTES.md: NeMo's heads on an H200
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

from nemo_engine.kernels.decode_split import BLOCKS_PER_SM, PART_COST, TILE, num_units, parts

SMS, KV_HEADS, HEAD_DIM = 132, 8, 128
BYTES_PER_S = 4.3e12  # the copy rate of an H200
MOST_RATE = 2.0  # half of the blocks are enough to ask for all that the memory gives
Blocks = Sequence[Sequence[int]]  # for each block in the order of their start, the keys of its parts


def model_time(blocks: Blocks, places: int) -> float:
    """The time of all blocks, counted in the time in which a block reads a tile; ``places`` blocks read at once."""
    waiting = [list(block) for block in reversed(blocks)]
    running: list[list[float]] = []  # what is left of a pause, and of the tiles that follow it
    queues: list[list[int]] = []  # the parts after these
    now = 0.0

    def fill_places() -> None:
        while waiting and len(running) < places:
            queues.append(waiting.pop())
            running.append([0.0, 0.0])

    fill_places()
    while running:
        for state, queue in zip(running, queues, strict=True):
            while queue and max(state) <= 1e-9:
                state[:] = PART_COST, queue.pop(0) / TILE
        busy = [index for index, state in enumerate(running) if max(state) > 1e-9]
        running, queues = [running[index] for index in busy], [queues[index] for index in busy]
        if len(running) < places and waiting:
            fill_places()
            continue
        reading = sum(state[0] <= 1e-9 for state in running)
        rate = min(MOST_RATE, places / max(1, reading))
        step = min((state[0] if state[0] > 1e-9 else state[1] / rate for state in running), default=0.0)
        for state in running:
            if state[0] > 1e-9:
                state[0] -= step
            else:
                state[1] -= step * rate
        now += step
    return now


def fill(lengths: Sequence[int], blocks: Blocks, units: int) -> float:
    """The fill, at most 1, of a split whose units hold ``blocks`` on as many places as the rule has units."""
    return sum(lengths) / TILE / units / model_time(blocks, units)


def rule_fill(lengths: Sequence[int], units: int) -> float:
    """The fill of the rule in ``nemo_engine.kernels.decode_split``."""
    return fill(lengths, [[end - begin for _, begin, end in unit] for unit in parts(lengths, units)], units)


def mixes() -> dict[str, list[int]]:
    """Batches that a server may have."""
    rng = random.Random(16)
    return {
        "1 x 1,024": [1024],
        "64 x 1,024": [1024] * 64,
        "256 x 1,024": [1024] * 256,
        "8 x 8,192": [8192] * 8,
        "1 x 130,560": [130560],
        "17 x 8,192": [8192] * 17,
        "2 x 65,536": [65536] * 2,
        "33 x 4,096": [4096] * 33,
        "8 x 32,768": [32768] * 8,
        "1 x 131,072 in 64 x 1,024": [1024] * 32 + [131072] + [1024] * 32,
        "1 x 131,072 in 64 x 2,100": [2100] * 32 + [131072] + [2100] * 32,
        "1 x 100,000 after 128 x 2,048": [2048] * 128 + [100000],
        "90,000, 30, 250,000": [90000, 30, 250000],
        "1,024 x 500": [500] * 1024,
        "256 lognormal": [min(131072, int(rng.lognormvariate(7.5, 1.2)) + 1) for _ in range(256)],
        "64 lognormal, wide": [min(131072, int(rng.lognormvariate(8.5, 2.0)) + 1) for _ in range(64)],
        "40 uniform to 32,768": [rng.randint(1, 32768) for _ in range(40)],
        "8 uniform to 131,072": [rng.randint(1, 131072) for _ in range(8)],
        "500 of 30 to 300, 5 of 80,000": [rng.randint(30, 300) for _ in range(500)] + [80000] * 5,
    }


def main() -> int:
    """Print the table."""
    units = num_units(SMS, KV_HEADS)
    print(f"{KV_HEADS} KV heads on {SMS} SMs, {BLOCKS_PER_SM} blocks each: {units} units a head")
    print("| rows | keys | fill | us, bf16 | us, FP8 |\n|---|---|---|---|---|")
    for name, lengths in mixes().items():
        share = rule_fill(lengths, units)
        times = (2 * KV_HEADS * HEAD_DIM * size * sum(lengths) / BYTES_PER_S / share * 1e6 for size in (2, 1))
        print(f"| {name} | {sum(lengths):,} | {share:.2f} | " + " | ".join(f"{time:.1f}" for time in times) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
