"""Finds out whether an output has begun to loop."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_engine.sampling_params import RepetitionDetection


def ends_in_repetition(token_ids: Sequence[int], num_output_tokens: int, rule: RepetitionDetection) -> bool:
    """Whether the last output tokens are ``rule.min_count`` copies of one pattern of an allowed size.

    Cost: at most ``max_pattern_size * min_count`` comparisons per pattern size, whatever the length of the output.
    """
    for size in range(max(1, rule.min_pattern_size), rule.max_pattern_size + 1):
        span = size * rule.min_count
        if span > num_output_tokens:
            return False
        start = len(token_ids) - span
        if all(token_ids[i] == token_ids[i + size] for i in range(len(token_ids) - size - 1, start - 1, -1)):
            return True
    return False
