"""A step that was launched: the only place where the host waits for the device."""

from __future__ import annotations

from torch import Tensor

from nemo_engine.runner.sampler import Report
from nemo_engine.runner.transfer import Download
from nemo_engine.step import StepPlan, StepResult


class LaunchedStep:
    """A launched step. On the CPU it is done when launched; on CUDA ``result`` waits for it."""

    def __init__(
        self, plan: StepPlan, tokens: Tensor, reports: list[Report], prompt_reports: dict[int, list[Report]]
    ) -> None:
        self._step_id = plan.step_id
        self._tokens = Download(tokens)
        self._reports = reports
        self._prompt_reports = prompt_reports

    def result(self) -> StepResult:
        """Wait for the step and return what came out of it."""
        tokens = self._tokens.tolist()
        entries = [entry for report in self._reports for entry in report.entries()]
        logprobs = {row: entry for row, entry in entries if tokens[row] >= 0}
        prompt_logprobs = {
            index: [entry for report in reports for _, entry in report.entries()]
            for index, reports in self._prompt_reports.items()
        }
        return StepResult(self._step_id, tokens, logprobs, prompt_logprobs)
