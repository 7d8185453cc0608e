"""Log-probabilities as the routes write them: OpenAI's lists of completions, OpenAI's objects of chat, vLLM's prompt
log-probabilities.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from nemo_engine.outputs import Logprob, RequestOutput
from nemo_engine.server.protocol import ChatRequest, CompletionRequest, SamplingRequest
from nemo_engine.text import Tokenizer


def finite(value: float) -> float:
    """A log-probability that JSON can hold."""
    return max(value, -9999.0)


def token_text(request: SamplingRequest, token_id: int, logprob: Logprob | None, tokenizer: Tokenizer | None) -> str:
    """How a token is named beside its log-probability."""
    text = (
        logprob.decoded_token
        if logprob is not None
        else None
        if tokenizer is None
        else tokenizer.decode_token(token_id)
    )
    return f"token_id:{token_id}" if request.return_tokens_as_token_ids or text is None else text


class TextOffsets:
    """Where the tokens of a text stand in it, in characters, as they come.

    A token of whole characters stands where these are, whatever stood in front of it. One that is part of a character
    stands where the text ends that is whole before it. A control token that the text does not show stands where it
    would be.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, start: int = 0, skips_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skips_special = skips_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._end = start
        self._is_at_start = True

    def take(self, token_id: int) -> int:
        """The place of the next token."""
        if self._tokenizer is None:
            return self._end
        data = self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skips_special)
        if self._is_at_start and data:
            data = self._tokenizer.strip_start(data)
            self._is_at_start = False
        before = self._end
        self._end += len(self._decoder.decode(data))
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            return before
        return self._end - len(text) if text else before


def completion_logprobs(
    request: CompletionRequest,
    tokenizer: Tokenizer | None,
    token_ids: Sequence[int],
    entries: Sequence[dict[int, Logprob] | None],
    offsets: Sequence[int],
) -> dict[str, Any]:
    """OpenAI's lists.

    The first token of an echoed prompt, whose entry is None, has no log-probability. offsets: of the tokens in the
    text.
    """
    tokens: list[str] = []
    values: list[float | None] = []
    top: list[dict[str, float] | None] = []
    for token_id, entry in zip(token_ids, entries, strict=True):
        chosen = None if entry is None else entry[token_id]
        tokens.append(token_text(request, token_id, chosen, tokenizer))
        values.append(None if chosen is None else finite(chosen.logprob))
        best = None if entry is None else list(entry.items())[: max(request.logprobs or 0, 1) + 1]
        top.append(
            None
            if best is None
            else {token_text(request, other, logprob, tokenizer): finite(logprob.logprob) for other, logprob in best}
        )
    return {"text_offset": list(offsets), "token_logprobs": values, "tokens": tokens, "top_logprobs": top}


def chat_logprobs(
    request: ChatRequest, tokenizer: Tokenizer, token_ids: Sequence[int], entries: Sequence[dict[int, Logprob]]
) -> list[dict[str, Any]]:
    """OpenAI's form of the log-probabilities of generated tokens.

    ``bytes`` are the token's own, which need not be whole characters.
    """
    count = request.top_logprobs or 0

    def shown(token_id: int, logprob: Logprob) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id, skip_special_tokens=False)
        name = token_text(request, token_id, logprob, tokenizer)
        return {"token": name, "logprob": finite(logprob.logprob), "bytes": list(data)}

    content = []
    for token_id, entry in zip(token_ids, entries):
        best = sorted(entry.items(), key=lambda item: item[1].rank or 0)
        top = [shown(other, candidate) for other, candidate in best[: None if count == -1 else count]]
        content.append(shown(token_id, entry[token_id]) | {"top_logprobs": top})
    return content


def prompt_logprobs(final: RequestOutput) -> list[dict[str, Any] | None] | None:
    """vLLM's form: for each prompt token None or ``{token id: {logprob, rank, decoded_token}}``."""
    if final.prompt_logprobs is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token_id): {
                "logprob": finite(logprob.logprob),
                "rank": logprob.rank,
                "decoded_token": logprob.decoded_token,
            }
            for token_id, logprob in entry.items()
        }
        for entry in final.prompt_logprobs
    ]
