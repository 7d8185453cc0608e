"""Recorded decode steps, and of wide ones the rows alone that have a draft of their own.

A wide step has ``width`` rows for each request, of which those without a draft repeat another row. On a CPU the host
can read how many drafts there are before it computes, and leave the others out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nemo_engine.runner.launched_step import LaunchedStep
from nemo_engine.runner.recorded import RecordedDecodes
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
        results = recorded.replay(rows, len(self.slots), self.ahead)
        if self.width == 1 and self.step.sampler.needs_only_draws(self.slots, plan.masks):
            return LaunchedStep(plan, recorded.finish(len(self.slots)), [], {})
        if self.width == 1:
            return LaunchedStep(plan, *self.step.choose(rows, self.slots, results, plan.masks), {})
        logits, slot_ids, seq_lens, _ = results
        token_ids, device = self.step.table.token_ids, slot_ids.device
        tokens, reports = self.step.sampler.sample(logits, self.slots, slot_ids, seq_lens, token_ids, plan.masks)
        is_computed = torch.zeros(len(self.all_slots), dtype=torch.int64)
        is_computed[[*self.places]] = 1
        source = is_computed.cumsum(0) - 1  # a row that is not computed repeats the one before
        tokens = tokens[source]
        self.step.accept(to_device(self.all_slots, device), seq_lens[source], tokens, self.width)
        for report in reports:
            report.rows = [self.places[row] for row in report.rows]
        return LaunchedStep(plan, tokens, reports, {})
