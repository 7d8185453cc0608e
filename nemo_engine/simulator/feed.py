"""What comes when: items of a workload at their arrivals, later turns after the answers before them, and in a closed
loop the next item.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence

from nemo_engine.sampling_params import SamplingParams
from nemo_engine.simulator.scheduler import SimulatedRequest
from nemo_engine.workload import Arrivals, Item
from nemo_engine.workload.items import Messages

Encode = Callable[[str | Messages], Sequence[int]]

_FIRST_PREFIX_CODE = -2  # and downwards; -1 has the same hash as -2 in Python
_FIRST_CODE = 1 << 20  # of prompts that are only lengths: above all token ids, each prompt its own
_CODES = (1 << 31) - 1 - _FIRST_CODE


class Conversation:
    """An item and how far it has come. ``history``: the tokens of prompts and answers so far."""

    __slots__ = ("history", "item", "turn")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.turn = 0
        self.history: list[int] = []


class Contents:
    """Makes token ids of prompts. Equal prefixes become equal ids; lengths alone become ids that nothing else has.

    encode: makes ids of texts; without it they are counted as their ``prompt_tokens``.
    """

    def __init__(self, encode: Encode | None = None) -> None:
        self._encode = encode
        self._prefix_codes: dict[str, int] = {}
        self._num_codes = 0
        self._num_requests = 0
        self._params: dict[int, SamplingParams] = {}

    def num_prompt_tokens(self, conversation: Conversation) -> int:
        """Tokens of the next turn's prompt. Raises ``ValueError`` for a text of unknown length."""
        item = conversation.item
        turn = item.turns[conversation.turn]
        count = turn.num_tokens
        if count is None or (self._encode is not None and not isinstance(turn.prompt, int)):
            count = len(self._ids(conversation))
        return len(conversation.history) + count + (item.prefix_tokens if conversation.turn == 0 else 0)

    def _ids(self, conversation: Conversation) -> Sequence[int]:
        """What the next turn adds, without a prefix."""
        turn = conversation.item.turns[conversation.turn]
        prompt = turn.prompt
        if isinstance(prompt, tuple) and isinstance(prompt[0], int):
            return prompt
        if not isinstance(prompt, int) and self._encode is not None:
            return self._encode(prompt)
        if turn.num_tokens is None:
            raise ValueError(
                f"request {conversation.item.request_id!r}: a prompt of text needs prompt_tokens beside it, or a model "
                "with a tokenizer"
            )
        self._num_codes += 1
        return [_FIRST_CODE + self._num_codes % _CODES] * turn.num_tokens

    def request(self, conversation: Conversation, arrived_s: float) -> SimulatedRequest:
        """The next turn as a request; its tokens become the conversation's history."""
        item = conversation.item
        turn = item.turns[conversation.turn]
        tokens = conversation.history
        if conversation.turn == 0 and item.prefix is not None:
            code = self._prefix_codes.setdefault(item.prefix, _FIRST_PREFIX_CODE - len(self._prefix_codes))
            tokens = [code] * item.prefix_tokens
        ids = self._ids(conversation)
        tokens = [*tokens, *ids] if tokens else list(ids)
        params = self._params.get(turn.output_tokens)
        if params is None:
            if len(self._params) > 100_000:
                self._params.clear()
            params = SamplingParams(temperature=0.0, max_tokens=turn.output_tokens, ignore_eos=True)
            self._params[turn.output_tokens] = params
        self._num_requests += 1
        return SimulatedRequest(
            str(self._num_requests), tokens, params, priority=item.priority, arrived_s=arrived_s, origin=conversation
        )


class Feed:
    """The arrivals still to come, in order of time."""

    def __init__(self, items: Iterable[Item], arrivals: Arrivals) -> None:
        self._items = iter(items)
        self._arrivals = arrivals
        self._times = None if arrivals.kind in ("file", "closed") else arrivals.times()
        self._due: list[tuple[float, int, Conversation]] = []  # turns and, in a closed loop, items
        self._count = 0
        self._latest = 0.0  # arrival of an item's own
        self._next: tuple[float, Conversation] | None = None  # of an open loop
        self.num_items = 0
        self.has_feedback = arrivals.kind == "closed"  # whether what ends may bring arrivals: known so far
        if arrivals.kind == "closed":
            assert arrivals.concurrency is not None
            for _ in range(arrivals.concurrency):
                self._start_next(0.0)
        else:
            self._look_ahead()

    def _take(self) -> Item | None:
        item = next(self._items, None)
        if item is not None:
            self.num_items += 1
            self.has_feedback |= len(item.turns) > 1
        return item

    def _start_next(self, now: float) -> None:
        item = self._take()
        if item is not None:
            self._push(now, Conversation(item))

    def _look_ahead(self) -> None:
        item = self._take()
        if item is None:
            self._next = None
        elif self._times is not None:
            self._next = (next(self._times), Conversation(item))
        elif item.arrival_s is None:
            raise ValueError(f"request {item.request_id!r} has no arrival_s: give a rate or a concurrency")
        elif item.arrival_s < self._latest:
            raise ValueError(
                f"request {item.request_id!r}: arrival_s must not be before that of the item before it "
                f"({self._latest}), got {item.arrival_s}"
            )
        else:
            self._latest = item.arrival_s
            self._next = (item.arrival_s, Conversation(item))

    def _push(self, when: float, conversation: Conversation) -> None:
        self._count += 1
        heapq.heappush(self._due, (when, self._count, conversation))

    def again(self, conversation: Conversation, when: float) -> None:
        """The turn that ``conversation`` is at is asked once more: its request was lost."""
        self._push(when, conversation)

    def next_time(self) -> float:
        """When the next one comes; infinity if none is known."""
        first = self._next[0] if self._next is not None else math.inf
        return min(first, self._due[0][0]) if self._due else first

    def pop(self) -> tuple[float, Conversation]:
        """The next one."""
        if self._next is None or (self._due and self._due[0][0] <= self._next[0]):
            when, _, conversation = heapq.heappop(self._due)
            return when, conversation
        item = self._next
        self._look_ahead()
        return item

    def ended(self, conversation: Conversation, token_ids: list[int] | None, now: float) -> None:
        """A turn is answered, all its tokens being ``token_ids``; None: it was refused, and so is what would follow
        it.
        """
        turns = conversation.item.turns
        conversation.turn += 1
        if token_ids is not None and conversation.turn < len(turns):
            conversation.history = token_ids
            self._push(now + turns[conversation.turn].think_s, conversation)
        elif self._arrivals.kind == "closed":
            self._start_next(now)
