"""How many of a CPU's cores a step takes: one or all that this process may use, by what steps of its kind took of
late.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from nemo_engine.ops.op import compiled_for_cpu

# What one core does in some two milliseconds: bytes that it reads once, and bytes of weights, in a cache by then, times
# the tokens that they meet.
_READ = 32 << 20
_MULTIPLIED = 256 << 20
_REMEMBERED = 8  # steps of a kind
_TRIED = 3  # steps of a kind in a row of trials: older ones say nothing of now
_BETWEEN_TRIALS = 32  # steps of a kind
_TRIALS_SHARE = 0.02  # of the time that steps take, what trials may cost more than the choice that they try to better


class Cores:
    """Gives each step one core or all, whichever took less time of late.

    Every operation of a step waits for the slowest of its threads. One whose core is taken by another program comes
    late by that program's turn, a hundred times what its share of a small operation takes; on a quiet machine all cores
    are faster for most steps. No file of the system tells which of the two holds here (a container sees neither its
    neighbours nor the host), but the steps' own times do. So steps of a kind, which are those of like numbers of tokens
    and pages, begin with what ``is_small`` says, or with all cores as soon as smaller ones take all; now and then one
    of them tries the other number, as often as trials cost 2 % of the time at most.

    weight_bytes, page_bytes: of all layers. adapts_below: steps of as many tokens or more keep to what ``is_small``
    says, since their bits depend on the number of threads, as those of MKL's fp32 products do, and a clock must not
    choose bits. clock: seconds.
    """

    def __init__(
        self, weight_bytes: int, page_bytes: int, *, adapts_below: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._weight_bytes = weight_bytes
        self._page_bytes = page_bytes
        self._adapts_below = adapts_below
        self._clock = clock
        self._allowed = allowed_cores()
        self._credit = 0.0  # seconds that trials may still cost
        self._kinds: dict[tuple[int, int], _Kind] = {}
        self._cpu = compiled_for_cpu()

    @contextmanager
    def step(self, num_tokens: int, num_pages: int) -> Iterator[None]:
        """Run a step of ``num_tokens`` that attends to ``num_pages`` inside; this thread's number of threads is what it
        was afterwards.
        """
        before = torch.get_num_threads()
        max_threads = min(before, self._allowed)
        if (
            self._cpu is None or max_threads == 1 == before
        ):  # without csrc/cpu, torch could only change it for the whole process
            yield
            return
        key = num_tokens.bit_length(), num_pages.bit_length()
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(takes_all=self._begins_with_all(num_tokens, num_pages, *key))
        elif kind.has_only_run_alone:
            kind.takes_all = self._begins_with_all(num_tokens, num_pages, *key)
        adapts = max_threads > 1 and num_tokens < self._adapts_below
        is_trial = adapts and kind.may_try(self._credit)
        takes_all = max_threads > 1 and kind.takes_all is not is_trial
        count = max_threads if takes_all else 1
        if count != before:
            self._cpu.set_num_threads(count)
        began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - began
            if count != before:
                self._cpu.set_num_threads(before)
        if adapts:
            self._credit = min(1.0, self._credit + _TRIALS_SHARE * seconds)
            if is_trial:
                self._credit -= max(0.0, seconds - kind.seconds(kind.takes_all))
            kind.note(takes_all, is_trial, seconds)

    def _begins_with_all(self, num_tokens: int, num_pages: int, tokens_bits: int, pages_bits: int) -> bool:
        smaller = [kind for (t, p), kind in self._kinds.items() if t <= tokens_bits and p <= pages_bits]
        learned = num_tokens < self._adapts_below and any([kind.takes_all for kind in smaller])
        return learned or not self.is_small(num_tokens, num_pages)

    def is_small(self, num_tokens: int, num_pages: int) -> bool:
        """Whether one core does such a step in some two milliseconds, so that others gain little."""
        return (
            self._weight_bytes * num_tokens <= _MULTIPLIED
            and self._weight_bytes + self._page_bytes * num_pages <= _READ
        )


class _Kind:
    """The last steps of one kind: their seconds with one core and with all, and which of the two is chosen."""

    def __init__(self, takes_all: bool) -> None:
        self.takes_all = takes_all
        self._times: dict[bool, deque[float]] = {choice: deque(maxlen=_REMEMBERED) for choice in (False, True)}
        self._since_trial = 0

    @property
    def has_only_run_alone(self) -> bool:
        """Whether no step has taken all cores yet: what smaller ones have learned since it began is news."""
        return not (self.takes_all or self._times[True])

    def seconds(self, takes_all: bool) -> float:
        """The mean of what is remembered, but for the slowest step if there are several: a single late thread is no
        load.
        """
        times = sorted(self._times[takes_all])
        return sum(times[:-1]) / (len(times) - 1) if len(times) > _TRIED else sum(times) / len(times)

    def may_try(self, credit: float) -> bool:
        """Whether the other choice is due, and its likely cost is within ``credit`` seconds."""
        if self._since_trial < _BETWEEN_TRIALS or not self._times[self.takes_all]:  # the choice may be a smaller kind's
            return False
        if not self._times[not self.takes_all]:
            return self.seconds(self.takes_all) <= credit
        return self.seconds(not self.takes_all) - self.seconds(self.takes_all) <= credit

    def note(self, takes_all: bool, is_trial: bool, seconds: float) -> None:
        """A step with one core, or all, took ``seconds``."""
        times = self._times[takes_all]
        if is_trial:
            self._since_trial = 0
            while len(times) >= _TRIED:
                times.popleft()
        else:
            self._since_trial += 1
        times.append(seconds)
        other = self._times[not self.takes_all]
        if other and len(self._times[self.takes_all]) >= _TRIED:
            if self.seconds(not self.takes_all) < self.seconds(self.takes_all):
                self.takes_all = not self.takes_all
                self._since_trial = 0


def allowed_cores(system: Path = Path("/")) -> int:
    """Cores that this process may use at once: those of its affinity, and no more than whole ones of its cgroups'
    quotas.

    system: the root under which proc/ and sys/ lie.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(affinity, int(min(_quotas(system), default=affinity))))


def _quotas(system: Path) -> Iterator[float]:
    """The quotas, in cores, of the cgroup of this process and of those around it: of version 2 (cpu.max) or 1
    (cpu.cfs_quota_us).
    """
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / (controllers and "cpu")
        # In a container, the path may be that of the host, of which only the root is to be seen.
        for folder in {root, *(root / part for part in _and_parents(path.strip("/")))}:
            if controllers:
                quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            else:
                quota, _, period = _read(folder / "cpu.max").partition(" ")
            if quota.isdigit() and period.isdigit() and int(quota) and int(period):
                yield int(quota) / int(period)


def _and_parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
