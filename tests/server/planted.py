"""Answers that nemo-tiny would never give, in the place of the engine's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from nemo_engine import AsyncEngine, RequestOutput, SamplingParams
from nemo_engine.engine.input_processor import EncodedPrompt
from nemo_engine.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics
from nemo_engine.sampling_params import RequestOutputKind

WEATHER_PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
CALLS = "[TOOL_CALLS]"  # a piece that stands for the token


@contextmanager
def planted(
    engine: AsyncEngine,
    pieces: Sequence[str],
    finish_reason: FinishReason = "stop",
    metrics: RequestMetrics | None = None,
    raises: Exception | None = None,
) -> Iterator[list[EncodedPrompt]]:
    """Every request is answered with ``pieces``, each a delta of one token; ``raises`` is raised behind them.

    Yields the prompts that came.
    """
    prompts: list[EncodedPrompt] = []

    async def generate(
        prompt: EncodedPrompt, params: SamplingParams, request_id: str = "", **_: Any
    ) -> AsyncIterator[RequestOutput]:
        prompts.append(prompt)
        is_delta = params.output_kind is RequestOutputKind.DELTA
        start = "".join(pieces[: pieces.index(CALLS)]) if CALLS in pieces else None
        whole = CompletionOutput(0, "", [], logprobs=None if params.logprobs is None else [])
        for index, piece in enumerate(pieces):
            is_last = index == len(pieces) - 1 and raises is None
            one = CompletionOutput(0, "", [], logprobs=None if params.logprobs is None else []) if is_delta else whole
            token_id = _token_of(engine, piece)
            one.token_ids.append(token_id)
            if one.logprobs is not None:
                one.logprobs.append({token_id: Logprob(-0.5, 1, piece)})
            if piece != CALLS:
                one.text += piece
            if start is not None and index >= pieces.index(CALLS):
                one.tool_calls_start = len(start)
            if is_last:
                one.finish_reason = finish_reason
                one.error = "planted" if finish_reason == "error" else None
            if is_delta or is_last:
                yield RequestOutput(
                    request_id, None, prompt.token_ids, [one], is_last, metrics=metrics, sampling_params=params
                )
        if raises is not None:
            raise raises

    with patch.object(engine, "generate_encoded", generate), patch("nemo_engine.server.metrics.Metrics.request_done"):
        yield prompts


def _token_of(engine: AsyncEngine, piece: str) -> int:
    assert engine.tokenizer is not None
    if piece == CALLS:
        assert engine.tokenizer.tool_calls_id is not None
        return engine.tokenizer.tool_calls_id
    return engine.tokenizer.encode(piece, bos=False)[0] if piece else 1000
