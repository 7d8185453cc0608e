"""Steps of padding alone, before the first request: everything is compiled, and every library has what it keeps per
thread.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_engine.checkpoint.progress import progress_bar
from nemo_engine.runner.step_compute import StepCompute
from nemo_engine.runner.step_rows import StepRows
from nemo_engine.runner.transfer import to_device

_SETTLING_TOKENS = 64  # of a step that reaches all cores and libraries


def settle(step: StepCompute, max_num_batched_tokens: int) -> None:
    """A step of prompts and a step of a decode, on the thread that will run all steps.

    Libraries keep some things per thread (cuBLAS its handle and workspace, OpenMP its pool), which they make now.
    """
    for counts in (_padding_rows(step, min(_SETTLING_TOKENS, max_num_batched_tokens)), [1]):
        _run_padding(step, counts)


def warm_up(
    step: StepCompute, sizes: Sequence[int], wide_sizes: Sequence[tuple[int, int]], max_num_batched_tokens: int
) -> None:
    """Run every kind of step once, so that every kernel is compiled and the largest step's memory is taken.

    sizes, wide_sizes: rows, and rows and width, of those that will be captured. Others are run at each power of two,
    where implementations may change, and at the most.
    """
    decodes = [(rows, 1) for rows in sorted({*_powers_of_two(step.table.num_slots), *sizes})] + sorted(wide_sizes)
    prefills = [_padding_rows(step, tokens) for tokens in _powers_of_two(max_num_batched_tokens)]
    with progress_bar("warm up", len(decodes) + len(prefills), None, unit="steps") as advance:
        for rows, width in decodes:
            _run_padding(step, [1] * rows, width)
            advance(1)
        for counts in prefills:
            _run_padding(step, counts)
            advance(1)


def _run_padding(step: StepCompute, counts: list[int], width: int = 1) -> None:
    """A step of rows of slot 0. Only its page 0 is written."""
    table, sampler = step.table, step.sampler
    decodes = len(counts) if max(counts) == 1 else 0
    num_sampled = len(counts) if width > 1 else min(len(counts), table.num_slots)
    packed = StepRows.pack([0] * len(counts), counts, {}, range(num_sampled))
    words = to_device(packed, table.device)
    num_pages = table.page_table.shape[1] if max(counts) > 1 else 1
    rows = StepRows.of(words, len(counts), decodes, sum(counts), max(counts), num_pages, width=width)
    logits, slot_ids, positions, seq_lens = step.logits(rows, *step.forward(rows))
    sampler.sample_any(logits.float(), slot_ids, positions)  # as edited logits are
    tokens = sampler.sample_any(logits, slot_ids, positions)
    step.ops.top_logprobs(logits, tokens, 1)
    step.advance(rows, seq_lens, tokens)


def _padding_rows(step: StepCompute, num_tokens: int) -> list[int]:
    """Lengths of rows, each of at most a slot's tokens, that are ``num_tokens`` together."""
    longest = step.table.token_ids.shape[1]
    whole, rest = divmod(num_tokens, longest)
    return [longest] * whole + [rest] * (rest > 0)


def _powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to ``limit``, and ``limit`` itself."""
    return [1 << i for i in range((limit - 1).bit_length())] + [limit]
