"""A scripted engine for the tests of the command line: it answers in pieces, several requests in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest

from nemo_engine.config import EngineConfig
from nemo_engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from nemo_engine.sampling_params import SamplingParams


class FakeEngine:
    """``pieces(text)`` are the deltas of the answer to ``text``; calls are recorded on the class by ``install``."""

    calls: ClassVar[list[tuple[str, Any, SamplingParams]]] = []
    options: ClassVar[dict[str, Any]] = {}
    error: str | None = None
    interrupt_after: int | None = None

    def __init__(self, model: str, **options: Any) -> None:
        EngineConfig(**options)
        if model == "missing":
            raise ValueError("model 'missing' is neither\na directory nor a repository id")
        type(self).options = options
        self.max_model_len = 4096
        self.tokenizer = SimpleNamespace()
        self.is_closed = False

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True

    def stats(self) -> Any:
        return SimpleNamespace(peak_used_pages=3, num_pages=8)

    @staticmethod
    def pieces(text: str) -> list[str]:
        return [f"<{text[-12:]}", "…", "é🙂>"]

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[RequestOutput]:
        type(self).calls.append(("generate", list(prompts), params))
        outputs = []
        for index, prompt in enumerate(prompts):
            texts = ["".join(self.pieces(prompt))] * params.n
            outputs.append(self._output(str(index), prompt, texts, params, is_last=True, num_tokens=3))
        return outputs

    def stream(self, prompts: Sequence[Any], params: SamplingParams) -> Iterator[RequestOutput]:
        type(self).calls.append(("stream", list(prompts), params))
        texts = [prompt if isinstance(prompt, str) else "ids" for prompt in prompts]
        return self._deltas(texts, params)

    def stream_chat(self, messages: Sequence[dict[str, str]], params: SamplingParams) -> Iterator[RequestOutput]:
        type(self).calls.append(("chat", [dict(message) for message in messages], params))
        if messages[-1]["content"] == "too long":
            raise ValueError("the prompt has 5000 tokens, max_model_len is 4096")
        return self._deltas([messages[-1]["content"]], params)

    def _deltas(self, prompts: list[str], params: SamplingParams) -> Iterator[RequestOutput]:
        pieces = [self.pieces(prompt) for prompt in prompts]
        for step in range(3):
            for index in reversed(range(len(prompts))):  # the last prompt is always ahead
                if self.interrupt_after == step:
                    raise KeyboardInterrupt
                texts = [pieces[index][step]] * params.n
                yield self._output(str(index), prompts[index], texts, params, is_last=step == 2, num_tokens=step + 1)

    def _output(
        self, request_id: str, prompt: str, texts: list[str], params: SamplingParams, *, is_last: bool, num_tokens: int
    ) -> RequestOutput:
        now = time.monotonic()
        reason: Any = ("error" if self.error else "length") if is_last else None
        completions = [
            CompletionOutput(index, text, [5], finish_reason=reason, error=self.error if is_last else None)
            for index, text in enumerate(texts)
        ]
        metrics = RequestMetrics(
            now - 1.0, first_token_ts=now - 0.5, last_token_ts=now, num_generation_tokens=num_tokens
        )
        return RequestOutput(
            request_id,
            prompt,
            [1, 2, 3],
            completions,
            is_last,
            num_cached_tokens=2,
            metrics=metrics,
            sampling_params=params,
        )


def install(monkeypatch: pytest.MonkeyPatch) -> type[FakeEngine]:
    """Put a fresh fake in the place of ``nemo_engine.engine.engine.Engine``; torch is not needed then."""
    fake = type("FakeEngine", (FakeEngine,), {"calls": [], "options": {}})
    module = ModuleType("nemo_engine.engine.engine")
    module.Engine = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nemo_engine.engine.engine", module)
    return fake
