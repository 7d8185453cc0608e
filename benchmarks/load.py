"""Load on an OpenAI-compatible server, as its clients make it and see it: one conversation is one client."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_engine.benchmarks.http_stream import HttpError, get_json, post_events
from nemo_engine.workload import Arrivals, Item, prompt_messages, prompt_token_ids
from nemo_engine.workload.content import filler_text

_BOS = 1  # Tekken's, in front of prompts of made-up ids


@dataclass(slots=True)
class Trip:
    """One request as its client saw it. Seconds; ``sent`` is a moment, and ``late`` after the arrival that was due.

    ``error`` if it failed.
    """

    sent: float
    late: float = 0.0
    ttft: float | None = None
    end: float = 0.0
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """Mean time of a token after the first."""
        if self.ttft is None or self.num_tokens < 2:
            return None
        return (self.end - self.sent - self.ttft) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True)
class Asking:
    """How requests are put. route: "completions" or "chat". prompts: "ids" or "text", of completions whose prompts are
    made up.

    vocab_size: ids are below it. ignore_eos: answers are as long as was asked for, and it is checked. timeout: seconds
    of a request.
    """

    route: str = "completions"
    prompts: str = "ids"
    vocab_size: int = 6144
    ignore_eos: bool = True
    timeout: float = 600.0

    def needs_ids(self, item: Item) -> bool:
        """Whether a second turn needs the token ids of the first answer."""
        return self.route == "completions" and self.prompts == "ids" and not _has_text(item)

    def body(self, item: Item, turn: int, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The request of a turn after the answers to those before. ``ValueError`` naming what this route cannot ask."""
        body: dict[str, Any] = {
            "max_tokens": item.turns[turn].output_tokens, "temperature": 0.0, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        if self.ignore_eos:
            body["ignore_eos"] = True
        if self.route == "chat":
            return body | {"messages": prompt_messages(item, turn, texts)}
        if not self.needs_ids(item):
            return body | {"prompt": _text(item, turn, texts)}
        if len(item.turns) > 1:
            body["return_token_ids"] = True
        prompt = prompt_token_ids(item, turn, self.vocab_size, ids)
        return body | {"prompt": [_BOS, *prompt[1:]] if isinstance(item.turns[0].prompt, int) else prompt}

    def check(self, items: Sequence[Item]) -> None:
        """``ValueError`` naming the first request that cannot be asked so."""
        for item in items:
            self.body(item, len(item.turns) - 1, ["word"] * len(item.turns), [[_BOS]] * len(item.turns))


def _has_text(item: Item) -> bool:
    return any(isinstance(turn.prompt, str) or _is_chat(turn.prompt) for turn in item.turns)


def _is_chat(prompt: object) -> bool:
    return isinstance(prompt, tuple) and not isinstance(prompt[0], int)


def _text(item: Item, turn: int, answers: Sequence[str]) -> str:
    """A turn as one text, with what stands before it."""
    parts = [] if item.prefix is None else [filler_text(f"prefix {item.prefix}", item.prefix_tokens)]
    for index in range(turn + 1):
        prompt = item.turns[index].prompt
        if isinstance(prompt, int):
            parts.append(filler_text(f"{item.request_id} {index}", prompt))
        elif isinstance(prompt, str):
            parts.append(prompt)
        else:
            what, other = ("messages", "--route chat") if _is_chat(prompt) else ("token ids", "--prompts ids")
            raise ValueError(f"request {item.request_id!r}: {what} are no text for a completion: use {other}")
        if index < turn:
            parts.append(answers[index])
    return " ".join(parts)


@dataclass(slots=True)
class Server:
    """Where requests go. model: its name in requests, None for none. dead: why it cannot be asked at all."""

    name: str
    url: str
    model: str | None = None
    api_key: str | None = None
    dead: str | None = None

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    async def first_model(self) -> str:
        """The first of /v1/models. Raises ``HttpError``, ``OSError``."""
        answer = await get_json(f"{self.url}/v1/models", self.headers)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise HttpError(f"/v1/models tells no model: {str(answer)[:200]}") from None


async def load(server: Server, items: Sequence[Item], arrivals: Arrivals, asking: Asking, salt: str) -> list[Trip]:
    """Send all items as ``arrivals`` says; a turn of a conversation follows the answer to the one before, and
    ``think_s``.

    In a closed loop a conversation keeps its place until its last answer. Prompts that are made up differ by ``salt``,
    but for their shared prefixes.
    """
    if server.dead is not None:
        return [Trip(0.0, error=server.dead) for _ in items]
    trips: list[Trip] = []
    gate = asyncio.Semaphore(arrivals.concurrency or 1)
    is_closed = arrivals.kind == "closed"
    began = time.perf_counter()

    async def one(item: Item, due: float) -> None:
        item = replace(item, request_id=salt + item.request_id)
        if is_closed:
            async with gate:
                trips.extend([trip async for trip in _converse(server, item, asking, time.perf_counter())])
        else:
            await asyncio.sleep(max(0.0, began + due - time.perf_counter()))
            trips.extend([trip async for trip in _converse(server, item, asking, began + due)])

    await asyncio.gather(*[one(item, due) for item, due in zip(items, _due(items, arrivals))])
    return trips


def _due(items: Sequence[Item], arrivals: Arrivals) -> Sequence[float]:
    """Seconds from the start at which each item comes; zeros in a closed loop."""
    if arrivals.kind in ("closed", "file"):
        return [item.arrival_s or 0.0 for item in items]
    times = arrivals.times()
    return [next(times) for _ in items]


async def _converse(server: Server, item: Item, asking: Asking, due: float) -> AsyncIterator[Trip]:
    texts: list[str] = []
    ids: list[list[int]] = []
    for index, turn in enumerate(item.turns):
        if index:
            await asyncio.sleep(turn.think_s)
            due = time.perf_counter()
        body = asking.body(item, index, texts, ids)
        trip, text, tokens = await _send(server, body, asking)
        trip.late = trip.sent - due
        if trip.error is None and index + 1 < len(item.turns) and asking.needs_ids(item):
            if len(tokens) != trip.num_tokens:
                trip.error = (
                    "the server tells no token ids of its answer, which the next turn needs: use --prompts text or "
                    "--route chat"
                )
        yield trip
        if trip.error is not None:
            return
        texts.append(text)
        ids.append(tokens)


async def _send(server: Server, body: dict[str, Any], asking: Asking) -> tuple[Trip, str, list[int]]:
    """(what the client saw, the answer's text, its token ids if the server tells them)."""
    url = f"{server.url}/v1/{'chat/completions' if asking.route == 'chat' else 'completions'}"
    if server.model is not None:
        body = {**body, "model": server.model}
    trip, text, ids = Trip(time.perf_counter()), "", list[int]()
    has_usage = False
    try:
        async with asyncio.timeout(asking.timeout), aclosing(post_events(url, body, server.headers)) as events:
            async for now, event in events:
                usage, choices = _parts(event)
                if usage:
                    has_usage = True
                    trip.num_tokens, trip.num_prompt_tokens = usage["completion_tokens"], usage["prompt_tokens"]
                for choice in choices:
                    piece, tokens = _piece(choice)
                    text += piece
                    ids += tokens
                    if piece or tokens or choice.get("finish_reason"):
                        _note(trip, now, has_content=bool(piece or tokens))
    except TimeoutError:
        trip.error = f"no end within {asking.timeout:g} s"
    except (HttpError, OSError, KeyError, TypeError, AttributeError) as error:
        trip.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
    trip.end = trip.end or time.perf_counter()
    if trip.error is None:
        trip.error = _what_is_wrong(trip, has_usage, int(body["max_tokens"]), asking.ignore_eos)
    return trip, text, ids


def _parts(event: Any) -> tuple[Any, Any]:
    """(usage, choices) of an event. ``HttpError`` for one that tells an error."""
    error = event.get("error")
    if error:
        raise HttpError(str(error.get("message", error)) if isinstance(error, dict) else str(error))
    return event.get("usage"), event.get("choices") or ()


def _piece(choice: dict[str, Any]) -> tuple[str, list[int]]:
    """(text, token ids) that an event's choice brings."""
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or "", choice.get(
        "token_ids"
    ) or []


def _note(trip: Trip, now: float, *, has_content: bool) -> None:
    """An event came. One that only says that the answer has ended is no token, unless there was none before."""
    if trip.ttft is None:
        trip.ttft = now - trip.sent
    elif has_content:
        trip.gaps.append(now - trip.end)
    trip.end = now


def _what_is_wrong(trip: Trip, has_usage: bool, num_asked: int, ignore_eos: bool) -> str | None:
    if not has_usage:
        return "the server told no usage, so its tokens cannot be counted"
    if trip.ttft is None:
        return "the answer has no text"
    if ignore_eos and trip.num_tokens != num_asked:
        return f"{trip.num_tokens} tokens came, and {num_asked} were asked for"
    return None
