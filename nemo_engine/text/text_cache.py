"""``TextCache``: keeps results that were computed from texts, for the texts that were used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_MAX_CHARS = 1 << 22  # of the texts that a cache keeps
_OVERHEAD = 64  # characters that an entry counts beside those of its text


class TextCache(Generic[T]):
    """The results of ``make`` for the texts that were used last. May be used by any thread."""

    def __init__(self, make: Callable[[str], T]) -> None:
        self._make = make
        self._known: OrderedDict[str, T] = OrderedDict()
        self._num_chars = 0
        self._lock = threading.Lock()

    def __call__(self, text: str) -> T:
        with self._lock:
            if text in self._known:
                self._known.move_to_end(text)
                return self._known[text]
        value = self._make(text)
        with self._lock:
            if text not in self._known:
                self._known[text] = value
                self._num_chars += len(text) + _OVERHEAD
            while self._num_chars > _MAX_CHARS:
                gone, _ = self._known.popitem(last=False)
                self._num_chars -= len(gone) + _OVERHEAD
        return value
