"""Parts of files, read ahead of who wants them: by a thread, into two buffers in turn or straight to where they belong.

So files are read while the part before is copied to the device. Must not know models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from types import TracebackType

import torch

from nemo_engine.checkpoint.safetensors_files import TensorInfo, read_into


@dataclass(frozen=True, slots=True)
class Part:
    """``nbytes`` bytes of a tensor from byte ``begin`` on; into ``out`` (contiguous, on the CPU) if given."""

    info: TensorInfo
    begin: int
    nbytes: int
    out: torch.Tensor | None = None


class ReadAhead:
    """Reads ``parts`` in order; ``take`` hands them out. A context manager, at whose end the thread has ended.

    Those without a place go into two buffers of the largest one's size, pinned if ``is_pinned``, so that copies to a
    GPU are as fast as its link.
    """

    def __init__(self, parts: Sequence[Part], is_pinned: bool) -> None:
        self._parts = parts
        self._free: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        self._done: SimpleQueue[torch.Tensor | BaseException] = SimpleQueue()
        self._taken: torch.Tensor | None = None  # the buffer that the caller reads
        size = max([part.nbytes for part in parts if part.out is None], default=0)
        for _ in range(2 if size else 0):
            self._free.put(torch.empty(size, dtype=torch.uint8, pin_memory=is_pinned))
        self._is_over = False
        self._thread = Thread(target=self._read, name="read weights", daemon=True)

    def __enter__(self) -> ReadAhead:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over = True
        self._free.put(None)  # if the thread waits for a buffer
        self._thread.join()

    def take(self, part: Part) -> torch.Tensor:
        """The bytes (uint8) of ``part``, which is the next; those of a buffer until the next call.

        Raises what reading raised.
        """
        if self._taken is not None:
            self._free.put(self._taken)
            self._taken = None
        done = self._done.get()
        if isinstance(done, BaseException):
            raise done
        if part.out is None:
            self._taken = done
        return done[: part.nbytes]

    def _read(self) -> None:
        try:
            for part in self._parts:
                target = self._free.get() if part.out is None else part.out.view(-1).view(torch.uint8)
                if target is None or self._is_over:
                    return
                read_into(part.info, target[: part.nbytes].numpy().data, part.begin)
                self._done.put(target)
        except BaseException as error:  # the caller's own, when it asks for the part
            self._done.put(error)
