"""Recorded decode steps, and of wide ones the rows alone that have a draft of their own.

A wide step has ``width`` rows for each request, of which those without a draft repeat another row. On a CPU the host
can read how many drafts there are before it computes, and leave the others out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch

from nemo_engine.runner.launched_step import LaunchedStep
from nemo_engine.runner.recorded import RecordedDecodes
from nemo_engine.runner.sampler import Report
from nemo_engine.runner.step_compute import StepCompute
from nemo_engine.runner.step_rows import StepRows
from nemo_engine.runner.transfer import to_device
from nemo_engine.step import StepPlan


@dataclass(frozen=True, slots=True)
class DraftedRuns:
    """The rows of a decode step that compute a token that no other row does."""

    step: StepCompute
    width: int
    all_slots: tuple[int, ...]  # of all rows, in runs of ``width``
    slots: tuple[int, ...]  # of the rows that are computed
    places: tuple[int, ...]  # of these among all rows
    ahead: tuple[int, ...]  # how many places after the last known token each of them computes; empty in narrow steps

    @classmethod
    def of(cls, step: StepCompute, slots: tuple[int, ...], width: int) -> DraftedRuns:
        """Make drafts for the rows of ``slots`` if they are runs of more than one row."""
        if width == 1:
            return cls(step, 1, slots, slots, (), ())
        ahead = step.draft(to_device(slots, step.table.device), width).tolist()
        places = tuple([row for row in range(len(slots)) if row % width == 0 or ahead[row] > ahead[row - 1]])
        chosen = tuple([slots[row] for row in places])
        return cls(step, width, slots, chosen, places, tuple([ahead[row] for row in places]))

    def launch(self, recorded: RecordedDecodes, rows: StepRows, plan: StepPlan) -> LaunchedStep:
        """Compute them, ``rows`` as uploaded."""
        count, sampler = len(self.slots), self.step.sampler
        only_draws = sampler.needs_only_draws(plan.decode_slots, plan.masks)
        if self.width == 1:
            if only_draws:
                return LaunchedStep(plan, recorded.run(count), [], {})
            return LaunchedStep(plan, *self.step.choose(rows, self.slots, recorded.logits(rows, count), plan.masks), {})
        reports: list[Report] = []
        if only_draws:
            tokens = recorded.draw(count, self.ahead)
        else:
            logits, slot_ids, seq_lens, _ = recorded.logits(rows, count, self.ahead)
            token_ids = self.step.table.token_ids
            tokens, reports = sampler.sample(logits, self.slots, slot_ids, seq_lens, token_ids, plan.masks)
        ends = pairwise([*self.places, len(self.all_slots)])
        source = torch.tensor([row for row, (place, end) in enumerate(ends) for _ in range(place, end)])
        tokens = tokens.index_select(0, source)  # a row that is not computed repeats the one before
        self.step.accept(torch.tensor(self.all_slots), recorded.seq_lens.index_select(0, source), tokens, self.width)
        for report in reports:
            report.rows = [self.places[row] for row in report.rows]
        return LaunchedStep(plan, tokens, reports, {})
