"""The loop: plans steps, hands them to the runner, and takes results back, with up to ``depth`` steps in flight.

Knows the scheduler and the runner, and nothing of models, kernels or text.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from nemo_engine.scheduler import Committed, Scheduler
from nemo_engine.step import StepPlan, StepResult


class Handle(Protocol):
    """A launched step."""

    def result(self) -> StepResult:
        """Wait for the step and return what came out of it."""


class StepRunner(Protocol):
    """What the core needs of a runner; tests and the simulator bring their own."""

    def launch(self, plan: StepPlan) -> Handle:
        """Start computing ``plan`` after all steps launched before."""

    def close(self) -> None:
        """Free everything."""


class EngineCore:
    """Drives one scheduler and one runner.

    ``depth`` 1 is synchronous. With 2, a step is scheduled and launched before the one before it is waited for, so the
    host's work overlaps the device's; each request that ends by a token's value then costs one discarded token.
    """

    def __init__(self, scheduler: Scheduler, runner: StepRunner, depth: int) -> None:
        assert depth >= 1
        self.scheduler = scheduler
        self.runner = runner
        self.depth = depth
        self._in_flight: deque[Handle] = deque()

    def step(self) -> Committed | None:
        """Launch the next step if there is one, and commit the oldest if ``depth`` are in flight or nothing was launched."""
        plan = self.scheduler.schedule()
        if plan is not None:
            self._in_flight.append(self.runner.launch(plan))
        if self._in_flight and (plan is None or len(self._in_flight) >= self.depth):
            return self.scheduler.commit(self._in_flight.popleft().result())
        return None

    def has_work(self) -> bool:
        """Whether a request is unfinished or a step is in flight."""
        return bool(self._in_flight) or self.scheduler.has_unfinished()

    def close(self) -> None:
        """Wait for what is in flight and free the runner."""
        while self._in_flight:
            self._in_flight.popleft().result()
        self.runner.close()
