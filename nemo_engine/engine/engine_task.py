"""``EngineTask``: an engine's steps in the event loop of those who ask, for a batch, which nobody else waits beside."""

from __future__ import annotations

import asyncio
import threading
import time

from nemo_engine.engine.base import BaseEngine
from nemo_engine.engine.engine_thread import EngineSteps, Stream, call_in
from nemo_engine.outputs import SchedulerStats

_LONGEST_WAIT = 0.02  # seconds of steps without an output that anybody waits for, after which the event loop goes on


class EngineTask(EngineSteps):
    """Runs the steps of ``engine``, which stays the caller's, in the running event loop, between its other callbacks.

    Threads that take turns at the interpreter cost a batch a tenth of its throughput. Here no thread has to be waited
    for, and the loop waits while a step is computed. Other threads may advance the engine too.
    """

    def __init__(self, engine: BaseEngine) -> None:
        super().__init__(engine)
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._has_arrived = asyncio.Event()
        self._has_woken = False
        self._task = self._loop.create_task(self._run())

    @property
    def is_alive(self) -> bool:
        """Whether steps are run."""
        return not self._task.done()

    @property
    def stats(self) -> SchedulerStats:
        """Requests and pages now, and totals since the start."""
        return self._engine.stats()

    @property
    def last_step_id(self) -> int:
        """The last step that was committed; 0 before the first."""
        return self._engine.last_step_id

    def close(self) -> None:
        """End all requests ("abort") and run no more steps, in the event loop. May be called twice."""
        if threading.get_ident() == self._loop_thread:
            self._end()
        else:
            call_in(self._loop, self._end)

    def wake_later(self, stream: Stream) -> None:
        """Wake the consumer of ``stream`` when the event loop goes on."""
        if threading.get_ident() == self._loop_thread:
            stream.wake()
            self._has_woken = True
        else:
            call_in(stream.loop, stream.wake)

    def _notify(self) -> None:
        if threading.get_ident() == self._loop_thread:  # the loop is awake, and needs no byte in its socket
            self._has_arrived.set()
        else:
            call_in(self._loop, self._has_arrived.set)

    def _end(self) -> None:
        if not self.is_closing:
            self.is_closing = True
            self._task.cancel()
            self._run_commands()
            self._engine.abort(list(self.streams))

    async def _run(self) -> None:
        try:
            went_on = 0.0
            while True:
                self._has_arrived.clear()
                if self._inbox:
                    self._run_commands()
                if self.streams or self._engine.has_work():
                    self._advance()
                    if self._has_woken or time.monotonic() > went_on + _LONGEST_WAIT:
                        self._has_woken = False
                        await asyncio.sleep(0)
                        went_on = time.monotonic()
                elif not self._inbox:
                    await self._has_arrived.wait()
        except Exception as error:
            self._die(error)
