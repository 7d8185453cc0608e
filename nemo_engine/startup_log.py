"""The start-up log: each stage of bringing the engine up, its seconds, and the bytes it read or allocated."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class StartupStage:
    """One finished stage. ``num_bytes`` is 0 where bytes mean nothing."""

    name: str
    seconds: float
    num_bytes: int = 0


@dataclass(slots=True)
class Stage:
    """A stage that is under way; ``num_bytes`` may be set until it ends."""

    name: str
    num_bytes: int = 0


class StartupLog:
    """Collects the stages of one start-up, in the order in which they ended."""

    def __init__(self) -> None:
        self._rows: list[StartupStage] = []

    @property
    def rows(self) -> tuple[StartupStage, ...]:
        """The stages so far."""
        return tuple(self._rows)

    @contextmanager
    def stage(self, name: str, num_bytes: int = 0) -> Iterator[Stage]:
        """Time the block. A stage that raises leaves no row."""
        stage = Stage(name, num_bytes)
        start = time.perf_counter()
        yield stage
        self._rows.append(StartupStage(name, time.perf_counter() - start, stage.num_bytes))

    def format(self) -> str:
        """An aligned table with a total of the seconds; empty when there are no rows."""
        if not self._rows:
            return ""
        total = StartupStage("total", sum(row.seconds for row in self._rows))
        cells = [("start-up", "seconds", "bytes")]
        cells += [(row.name, f"{row.seconds:.3f}", _size(row.num_bytes)) for row in (*self._rows, total)]
        widths = [max(len(row[column]) for row in cells) for column in range(3)]
        return "\n".join(
            f"{n.ljust(widths[0])}  {s.rjust(widths[1])}  {b.rjust(widths[2])}".rstrip() for n, s, b in cells
        )

    def log(self) -> None:
        """Write the table to the log, level INFO."""
        if self._rows:
            _logger.info("%s", self.format())


def _size(num_bytes: int) -> str:
    if num_bytes == 0:
        return ""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.2f} {unit}"
    return f"{num_bytes} B"
