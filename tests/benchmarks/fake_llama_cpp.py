"""The part of ``llama_cpp`` that the peer calls, over a toy model: the next token is the sum of all tokens of its
sequence, modulo 97.

Checks what the library takes for granted: positions without holes, sequences and rows within what the context was made
for.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

VOCAB = 97
decoded: list[list[tuple[int, int]]] = []  # (sequence, position) of the rows of every step


class llama_batch(ctypes.Structure):  # noqa: N801
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class _Context:
    def __init__(self, params: SimpleNamespace) -> None:
        self.params = params
        self.cache: dict[int, list[int]] = {}
        self.logits: Any = None


def llama_log_callback(function: Any) -> Any:
    return function


def llama_log_set(*_: Any) -> None:
    pass


def llama_backend_init() -> None:
    pass


def llama_model_default_params() -> SimpleNamespace:
    return SimpleNamespace()


def llama_context_default_params() -> SimpleNamespace:
    return SimpleNamespace()


def llama_model_load_from_file(path: bytes, params: SimpleNamespace) -> str:
    return "model"


def llama_model_get_vocab(model: str) -> str:
    return "vocab"


def llama_vocab_n_tokens(vocab: str) -> int:
    return VOCAB


def llama_max_parallel_sequences() -> int:
    return 256


def llama_init_from_model(model: str, params: SimpleNamespace) -> _Context:
    return _Context(params)


def llama_get_memory(context: _Context) -> _Context:
    return context


def llama_memory_seq_rm(context: _Context, sequence: int, start: int, end: int) -> bool:
    assert (start, end) == (-1, -1)
    del context.cache[sequence]
    return True


def llama_decode(context: _Context, batch: llama_batch) -> int:
    assert 0 < batch.n_tokens <= context.params.n_batch
    rows, step = [], []
    for row in range(batch.n_tokens):
        assert batch.n_seq_id[row] == 1
        sequence = batch.seq_id[row][0]
        assert 0 <= sequence < context.params.n_seq_max
        tokens = context.cache.setdefault(sequence, [])
        assert batch.pos[row] == len(tokens) < context.params.n_ctx // context.params.n_seq_max
        tokens.append(batch.token[row])
        step.append((sequence, batch.pos[row]))
        if batch.logits[row]:
            rows.append(sum(tokens) % VOCAB)
    decoded.append(step)
    flat = (ctypes.c_float * (len(rows) * VOCAB))()
    for index, token in enumerate(rows):
        flat[index * VOCAB + token] = 1.0
    context.logits = flat
    return 0


def llama_get_logits(context: _Context) -> Any:
    return ctypes.cast(context.logits, ctypes.POINTER(ctypes.c_float))


def llama_free(context: _Context) -> None:
    context.cache.clear()


def llama_model_free(model: str) -> None:
    pass
