"""llama.cpp through the C interface of its Python binding, on a GGUF file: continuous batching over its own cache.

``llama_cpp.Llama`` runs one sequence at a time, so this steps the library as its server does: every step decodes the
sequences under way and fills what is left of ``n_batch`` with prompts of the next ones. The batch is filled and the
greedy token taken by numpy, as cheaply as Python can. ``make_gguf.py`` makes the file.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

_ERROR = 4  # ggml's level


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: object) -> None:
    """Errors alone, to stderr. The binding's own callback fails on names of tokens that are no UTF-8."""
    if level == _ERROR:
        sys.stderr.write(text.decode("utf-8", "replace"))


@dataclass(slots=True)
class _Sequence:
    """A request under way in cache sequence ``slot``; ``done``: tokens of it that are in the cache."""

    index: int
    slot: int
    prompt: list[int]
    count: int
    output: list[int]
    done: int = 0


class _Batch:
    """A ``llama_batch`` over numpy arrays, filled row by row."""

    def __init__(self, capacity: int) -> None:
        self._tokens, self._positions, self._slots = (np.zeros(capacity, np.int32) for _ in range(3))
        self._wants_logits = np.zeros(capacity, np.int8)
        self._ones = np.ones(capacity, np.int32)
        base, width = self._slots.ctypes.data, self._slots.itemsize
        self._pointers = (base + width * np.arange(capacity)).astype(np.uintp)  # row i has one sequence, at slots[i]
        self._raw = llama_cpp.llama_batch()
        self._point("token", self._tokens)
        self._point("pos", self._positions)
        self._point("n_seq_id", self._ones)
        self._point("seq_id", self._pointers)
        self._point("logits", self._wants_logits)

    def _point(self, name: str, array: np.ndarray) -> None:
        kind = dict(self._raw._fields_)[name]
        setattr(self._raw, name, ctypes.cast(array.ctypes.data, kind))

    def clear(self) -> None:
        """Take all rows out."""
        self._raw.n_tokens = 0

    @property
    def size(self) -> int:
        """Rows."""
        return int(self._raw.n_tokens)

    def add(self, sequence: _Sequence, tokens: list[int], wants_logits: bool) -> None:
        """Rows of the next ``tokens`` of a sequence, with logits after the last if wanted."""
        first, last = self.size, self.size + len(tokens)
        self._tokens[first:last] = tokens
        self._positions[first:last] = np.arange(sequence.done, sequence.done + len(tokens))
        self._slots[first:last] = sequence.slot
        self._wants_logits[first:last] = 0
        self._wants_logits[last - 1] = wants_logits
        sequence.done += len(tokens)
        self._raw.n_tokens = last

    def decode(self, context: Any) -> None:
        """Compute all rows. ``RuntimeError`` if the library refuses."""
        status = llama_cpp.llama_decode(context, self._raw)
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {self.size} tokens")


class Peer:
    """gguf: the converted checkpoint, None for the only .gguf in its folder. n_seq: sequences at once, None for as many
    as there are prompts.

    n_batch, n_ubatch: tokens of a step, and of one pass over the weights. kv_unified: one buffer of keys and values for
    all sequences; without it each has a part of its own, which is faster where they share nothing. flash_attn: None
    lets the library choose. n_threads: None for all cores.
    """

    def __init__(
        self,
        model: str,
        *,
        gguf: str | None = None,
        n_seq: int | None = None,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        kv_unified: bool = False,
        flash_attn: bool | None = None,
        n_threads: int | None = None,
    ) -> None:
        if gguf is None:
            files = sorted(Path(model).glob("*.gguf"))
            if len(files) != 1:
                raise FileNotFoundError(f"{model} holds {len(files)} .gguf files, and llama.cpp.gguf names none")
            gguf = str(files[0])
        if not Path(gguf).is_file():
            raise FileNotFoundError(f"there is no file {gguf}")
        llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = -1
        self._model = llama_cpp.llama_model_load_from_file(gguf.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._n_seq, self._n_batch, self._n_ubatch = n_seq, n_batch, n_ubatch
        self._kv_unified, self._flash_attn = kv_unified, flash_attn
        self._n_threads = n_threads or len(os.sched_getaffinity(0))
        self._context: Any = None
        self._holds = (0, 0)  # sequences, tokens of each
        self._batch = _Batch(n_batch)

    def versions(self) -> dict[str, str]:
        """The versions of what computes."""
        return {"llama-cpp-python": version("llama-cpp-python")}

    def prepare(self, prompts: list[list[int]], max_tokens: list[int]) -> None:
        """Have a context that is large enough."""
        self._reserve(self._at_once(len(prompts)), max(len(p) + n for p, n in zip(prompts, max_tokens)))

    def _at_once(self, count: int) -> int:
        return min(self._n_seq or count, count, llama_cpp.llama_max_parallel_sequences())

    def generate(self, prompts: list[list[int]], max_tokens: list[int]) -> list[list[int]]:
        """Greedy tokens of every prompt, up to ``n_seq`` at once."""
        num_at_once = self._at_once(len(prompts))
        waiting = deque(enumerate(zip(prompts, max_tokens)))
        free = list(range(num_at_once))[::-1]
        running: list[_Sequence] = []
        outputs: list[list[int]] = [[] for _ in prompts]
        while waiting or running:
            while waiting and free:
                index, (prompt, count) = waiting.popleft()
                running.append(_Sequence(index, free.pop(), prompt, count, outputs[index]))
            self._step(running)
            for sequence in [one for one in running if len(one.output) == one.count]:
                llama_cpp.llama_memory_seq_rm(self._memory, sequence.slot, -1, -1)
                running.remove(sequence)
                free.append(sequence.slot)
        return outputs

    def _step(self, running: list[_Sequence]) -> None:
        """One batch: a token of each sequence that decodes, then prompts while there is room; appends the greedy
        tokens.
        """
        self._batch.clear()
        sampled = []
        for sequence in running:
            if sequence.output:
                self._batch.add(sequence, sequence.output[-1:], True)
                sampled.append(sequence)
        for sequence in running:
            room = self._n_batch - self._batch.size
            if sequence.done < len(sequence.prompt) and room:
                tokens = sequence.prompt[sequence.done : sequence.done + room]
                is_last = sequence.done + len(tokens) == len(sequence.prompt)
                self._batch.add(sequence, tokens, is_last)
                if is_last:
                    sampled.append(sequence)
        self._batch.decode(self._context)
        if not sampled:
            return
        logits = llama_cpp.llama_get_logits(self._context)  # waits; rows are in the order of the batch
        rows = np.ctypeslib.as_array(logits, (len(sampled), self._vocab_size))
        for sequence, token in zip(sampled, rows.argmax(axis=1).tolist()):
            sequence.output.append(token)

    @property
    def _memory(self) -> Any:
        return llama_cpp.llama_get_memory(self._context)

    def _reserve(self, sequences: int, tokens: int) -> None:
        """Have a context of at least so many sequences of so many tokens."""
        if self._holds[0] >= sequences and self._holds[1] >= tokens:
            return
        self._free_context()
        tokens = -(-tokens // 256) * 256
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * tokens, sequences
        params.n_batch, params.n_ubatch = self._n_batch, self._n_ubatch
        params.n_threads = params.n_threads_batch = self._n_threads
        params.kv_unified = self._kv_unified
        if self._flash_attn is not None:
            params.flash_attn_type = int(self._flash_attn)
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {sequences} sequences of {tokens} tokens")
        self._holds = (sequences, tokens)

    def _free_context(self) -> None:
        if self._context:
            llama_cpp.llama_free(self._context)
        self._context, self._holds = None, (0, 0)

    def close(self) -> None:
        """Free everything."""
        self._free_context()
        llama_cpp.llama_model_free(self._model)
