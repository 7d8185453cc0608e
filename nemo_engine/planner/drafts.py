"""What drafts are worth on paper: how many of a row are right, and what wide steps then make."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from nemo_engine.config import WIDE_STEP_TOKENS, EngineConfig
from nemo_engine.planner.roofline import Roofline


@dataclass(frozen=True, slots=True)
class Acceptance:
    """How many drafts of a row are right. ``at_least[i]``: the share of rows whose first i + 1 are, which is what
    ``spec_decode_num_accepted_tokens_per_pos`` counts.
    """

    at_least: tuple[float, ...]

    def __post_init__(self) -> None:
        shares = (1.0, *self.at_least)
        if not all(1 >= before >= after >= 0 for before, after in zip(shares, shares[1:])):
            raise ValueError(f"acceptance must fall from 1 to 0, or stay, got {list(self.at_least)}")

    @classmethod
    def parse(cls, text: str, num_drafts: int) -> Self:
        """One number: the share of drafts that are right of those behind right ones. Several: ``at_least``, zeros
        beyond. Raises ``ValueError``.
        """
        try:
            numbers = [float(part) for part in text.split(",")]
        except ValueError:
            raise ValueError(f"acceptance must be numbers with commas between them, got {text!r}") from None
        if len(numbers) == 1:
            numbers = [numbers[0] ** (place + 1) for place in range(num_drafts)]
        if len(numbers) > num_drafts:
            raise ValueError(f"acceptance has {len(numbers)} shares for {num_drafts} drafts (num_speculative_tokens)")
        return cls(tuple(numbers))

    def expected(self, num_drafts: int) -> float:
        """Drafts of a row that are right, of ``num_drafts``, in the mean."""
        return sum(self.at_least[:num_drafts])

    def num_right(self, part: float) -> int:
        """The right drafts of the row at ``part``, from 0 to 1, of all rows by how many drafts are right."""
        return sum([part < share for share in self.at_least])


NO_DRAFTS = Acceptance(())


def wide_rates(
    roofline: Roofline, acceptance: Acceptance, config: EngineConfig, context: int, batches: Iterable[int]
) -> dict[int, dict[int, float]]:
    """Output tokens a second of decode steps alone, by requests at a time and by width, as far as a step has room;
    ``context`` tokens each.
    """
    rates: dict[int, dict[int, float]] = {}
    room = min(WIDE_STEP_TOKENS, config.tokens_per_step // 2)
    for batch in batches:
        rates[batch] = {}
        for width in [1, *[width for width in config.widths if width * batch <= room]]:
            tokens = batch * (1 + acceptance.expected(min(width - 1, config.num_speculative_tokens)))
            seconds = roofline.step_seconds(batch, batch * context, (), width)
            rates[batch][width] = tokens / max(roofline.host_seconds(batch), seconds)
    return rates
