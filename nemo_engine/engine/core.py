"""The loop: plans steps, hands them to the runner, and takes results back, with up to ``depth`` steps in flight.

Knows the scheduler and the runner, and nothing of models, kernels or text.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.outputs import StepRecord
from nemo_engine.scheduler import Scheduler, Speculation, StepOutput
from nemo_engine.startup_log import StartupLog
from nemo_engine.step import StepPlan, StepResult

HISTORY = 16384  # steps that are remembered

_logger = logging.getLogger("nemo_engine")


class Handle(Protocol):
    """What ``StepRunner.launch`` returns: a step that is being computed."""

    def result(self) -> StepResult:
        """Wait for the step and return what came out of it."""


class StepRunner(Protocol):
    """What the core needs of a runner; tests and the simulator bring their own."""

    def launch(self, plan: StepPlan) -> Handle:
        """Start computing ``plan`` after all steps launched before."""

    def settle(self) -> None:
        """Prepare this thread to launch all steps while other threads compute too."""

    def count_saturated(self) -> tuple[int, int]:
        """Entries of an FP8 KV cache at its largest number, and entries that are not 0."""

    def recover(self) -> None:
        """After a failed step: forget what the next step would have used again, and wait for the device.

        Raises if the device is lost.
        """

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
        self.history: deque[StepRecord] = deque(maxlen=HISTORY)
        self._in_flight: deque[tuple[StepPlan, Handle]] = deque()
        self._unreported: StepOutput | None = None  # of a failure, for the next step to return
        self._cut_short: str | None = None  # why a change of requests and pages may be half done
        self._lost: BaseException | None = None

    @contextmanager
    def change(self) -> Iterator[None]:
        """The context of every change of requests or pages.

        What an exception cuts short, an interrupt say, is mended before the next change: the requests that were running
        end with an error, which the next ``step`` reports.
        """
        if self._cut_short is not None:
            self._unreported = self.fail(self._cut_short)
        self._cut_short = "the engine was interrupted"
        try:
            yield
        except BaseException as error:
            self._cut_short = f"the engine was interrupted: {type(error).__name__}: {error}"
            raise
        self._cut_short = None

    def step(self) -> StepOutput | None:
        """Plan and launch the next step, if there is one. Then, if ``depth`` steps are in flight or nothing was
        launched, wait for the oldest one and commit it.

        If the runner breaks (out of memory, say), the requests that were running end with an error and the engine lives
        on. An interrupt (Ctrl-C), or an exception of the scheduler, does the same to them and is passed on; the next
        step then reports them. RuntimeError, for good, if the device is lost.
        """
        if self._unreported is not None:
            committed, self._unreported = self._unreported, None
            return committed
        if self._lost is not None:
            raise RuntimeError(f"the device is lost: {self._lost}") from self._lost
        try:
            plan = self.scheduler.schedule()
            try:
                if plan is not None:
                    self._in_flight.append((plan, self.runner.launch(plan)))
                if not self._in_flight or (plan is not None and len(self._in_flight) < self.depth):
                    return None
                oldest, handle = self._in_flight.popleft()
                result = handle.result()
            except Exception as error:
                committed = self.fail(_describe(error))
                _logger.exception(
                    "a step failed; the %d requests that were running end with it", len(committed.finished)
                )
                return committed
            committed = self.scheduler.commit(result)
            self._record(oldest, committed)
            return committed
        except BaseException as error:
            # If nothing runs, every further step would raise the same: the first request that waits ends with it.
            self._unreported = self.fail(_describe(error), or_first=isinstance(error, Exception))
            raise

    def fail(self, message: str, or_first: bool = False) -> StepOutput:
        """End the requests that are running with ``message``, and begin anew with the others; see
        ``Scheduler.fail_running``.

        RuntimeError, for good, if the device does not answer any more.
        """
        self._in_flight.clear()
        committed = self.scheduler.fail_running(message, or_first)
        try:
            self.runner.recover()
        except Exception as error:
            self._lost = error
            raise RuntimeError(f"the device is lost: {error}") from error
        return committed

    def _record(self, plan: StepPlan, committed: StepOutput) -> None:
        num_decodes, prefills = len(plan.decode_slots), plan.prefills
        firsts = [request for request in committed.prefilled if request.num_output_tokens == 1]
        self.history.append(
            StepRecord(
                plan.step_id,
                time.monotonic(),
                num_decodes,
                len(prefills),
                sum([row.num_tokens for row in prefills]),
                len(committed.token_ids),
                sum([request.num_prompt_tokens for request in firsts]),
            )
        )

    @property
    def is_dead(self) -> bool:
        """Whether no step can be made any more."""
        return self._lost is not None

    def has_work(self) -> bool:
        """Whether a request is unfinished or a step is in flight."""
        has_report = self._unreported is not None or self._cut_short is not None
        return bool(self._in_flight) or has_report or self.scheduler.has_unfinished()

    def close(self) -> None:
        """Wait for what is in flight and free the runner, also if that broke."""
        in_flight, self._in_flight = self._in_flight, deque()
        try:
            for _, handle in in_flight:
                handle.result()
        except Exception:
            _logger.exception("a step that was in flight when the engine was closed failed")
        finally:
            self.runner.close()


def _describe(error: BaseException) -> str:
    return f"the step failed: {type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class StartedCore:
    """A core that is ready, and what its start found out about the model."""

    core: EngineCore
    model_config: ModelConfig
    model_path: Path


def start_core(
    model: str | Path,
    config: EngineConfig,
    startup_log: StartupLog,
    count_tokens: Callable[[Sequence[Path]], int | None],
) -> StartedCore:
    """Load ``model`` and build runner, scheduler and core as ``config`` says.

    ``count_tokens`` is asked, before the weights are read, how many ids the tokenizer has that is looked for in these
    directories.
    """
    from nemo_engine.runner.startup import start_device_half  # brings torch in

    half = start_device_half(model, config, startup_log, count_tokens)
    scheduler = Scheduler(
        num_pages=half.num_pages,
        page_size=config.page_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=half.max_num_batched_tokens,
        max_model_len=half.max_model_len,
        enable_prefix_caching=config.enable_prefix_caching,
        speculation=Speculation(config.widths, config.num_speculative_tokens),
    )
    return StartedCore(EngineCore(scheduler, half.runner, half.pipeline_depth), half.model_config, half.model_path)
