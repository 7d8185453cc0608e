"""What was learned of drafts and steps: how often drafts were right of late, and what steps of each width took."""

from __future__ import annotations

from collections import deque

_ASSUMED_COST = 0.1  # of each further token of a row, in narrow steps, until it was measured
_FORGOTTEN_AFTER = 1000  # steps of a kind, in which a width was not chosen: what it took then says little
_REMEMBERED = 9  # steps of a kind


class Acceptance:
    """How often drafts were right of late: ``rate``, that of a draft whose predecessors are right."""

    __slots__ = ("_kept", "_right", "_tried")

    def __init__(self, rate: float, weight: float, kept: float) -> None:
        self._right, self._tried, self._kept = rate * weight, weight, kept

    @property
    def rate(self) -> float:
        """From 0 to 1."""
        return self._right / self._tried

    def note(self, num_right: int, num_wrong: int) -> None:
        """What a wide step showed: drafts that were right, and the one that was wrong or missing."""
        self._right = self._kept * self._right + num_right
        self._tried = self._kept * self._tried + num_right + num_wrong

    def expected(self, num_drafts: int) -> float:
        """Drafts that are right, of ``num_drafts`` in a row."""
        rate = self.rate
        return num_drafts * rate if rate > 0.999 else rate * (1 - rate**num_drafts) / (1 - rate)


class StepTimes:
    """The last steps of about as many rows: seconds of narrow ones, and of others beside these, for a machine that is
    slower for a while is so for all.
    """

    def __init__(self) -> None:
        self._last: dict[int, deque[float]] = {}  # by width
        self._medians: dict[int, float] = {}
        self._noted_at: dict[int, int] = {}
        self._num_noted = 0
        self.since_trial = 0  # narrow steps
        self.since_narrow = 0  # wide steps
        self.num_vain = 0  # looks for a width that pays, since one was found
        self.num_rests = 0  # narrow steps to come without a look

    @property
    def is_known(self) -> bool:
        """Whether a narrow step was measured."""
        return 1 in self._medians

    def cost(self, width: int) -> float:
        """Seconds of a step of ``width``: until one was measured, a guess, but no less than a less wide one takes."""
        narrow = self._medians[1]
        if width == 1:
            return narrow
        if width in self._medians:
            return narrow * self._medians[width]
        less = [beside for known, beside in self._medians.items() if 1 < known < width]
        return narrow * max([1 + _ASSUMED_COST * (width - 1), *less])

    def note(self, width: int, seconds: float) -> None:
        """A step of ``width`` took ``seconds``; if it is wide, a narrow one was noted before."""
        self._num_noted += 1
        self._noted_at[width] = self._num_noted
        last = self._last.setdefault(width, deque(maxlen=_REMEMBERED))
        last.append(seconds if width == 1 else max(1.0, seconds / self._medians[1]))
        self._medians[width] = sorted(last)[len(last) // 2]
        if width > 1:
            self.since_narrow += 1
            return
        self.since_trial, self.since_narrow = self.since_trial + 1, 0
        if self._num_noted % _FORGOTTEN_AFTER == 0:
            for known, noted_at in [*self._noted_at.items()]:
                if self._num_noted - noted_at > _FORGOTTEN_AFTER:
                    del self._noted_at[known], self._medians[known], self._last[known]
