"""A device half without a device: acts on step plans, checks everything that it is told, and makes up tokens.

Every place of every page holds the prefix that was written there, so reading a page that is wrong, stale or not yet
written shows at once. A token is a function of its request's whole history and seed, so what a request should
generate can be worked out alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from hashlib import blake2b

from nemo_engine.scheduler import Request
from nemo_engine.scheduler.token_rules import ends_in_repetition
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_DRAFTED, TOKEN_NOT_TAKEN, SlotFill, StepPlan, StepResult

VOCAB = 11
Fault = Callable[[Sequence[int], int], int | None]


def next_token(history: Sequence[int], seed: int, allowed: Sequence[int] = range(VOCAB)) -> int:
    """The token after ``history``."""
    digest = blake2b(repr((tuple(history), seed)).encode(), digest_size=4).digest()
    return allowed[int.from_bytes(digest, "little") % len(allowed)]


class ScriptedGrammar:
    """Allows a few tokens, by what came before; after ``length`` tokens only token 2.

    With ``has_faults`` it breaks now and then.
    """

    def __init__(self, seed: int, length: int, has_faults: bool) -> None:
        self.script = (seed, length, has_faults)
        self.tokens: list[int] = []

    def fresh(self, tokens: Sequence[int] = ()) -> ScriptedGrammar:
        """The same grammar after ``tokens``."""
        other = ScriptedGrammar(*self.script)
        other.tokens = list(tokens)
        return other

    def allowed(self) -> list[int]:
        seed, length, _ = self.script
        if len(self.tokens) >= length:
            return [2]
        dice = random.Random(repr((seed, self.tokens)))
        return sorted(dice.sample(range(VOCAB), dice.randint(1, 4)))

    def breaks(self, where: str) -> bool:
        return self.script[2] and random.Random(repr((where, self.script, self.tokens))).random() < 0.03

    def mask(self) -> bytes:
        if self.breaks("mask"):
            raise RuntimeError("planted")
        return sum(1 << token for token in self.allowed()).to_bytes(4, "little")

    def accept(self, token_id: int) -> None:
        if self.breaks("accept"):
            raise RuntimeError("planted")
        assert token_id in self.allowed(), "a token that the mask forbade"
        self.tokens.append(token_id)

    @property
    def is_finished(self) -> bool:
        return len(self.tokens) > self.script[1] or self.tokens[-1:] == [2]


def expected_output(prompt: Sequence[int], request: Request) -> tuple[list[int], str, int | str | None]:
    """What ``request`` generates alone: tokens, finish reason, stop reason."""
    history = list(prompt)
    rule = request.params.repetition_detection
    grammar = request.grammar.fresh() if isinstance(request.grammar, ScriptedGrammar) else None
    while True:
        output = history[len(prompt) :]
        if grammar is not None and grammar.breaks("mask"):
            return output, "error", None
        token = next_token(history, request.seed, range(VOCAB) if grammar is None else grammar.allowed())
        if grammar is not None and token not in request.stop_token_ids:
            if grammar.breaks("accept"):
                return output, "error", None
            grammar.accept(token)
        history.append(token)
        output = history[len(prompt) :]
        if token in request.stop_token_ids:
            return output, "stop", None if token in request.eos_token_ids else token
        if grammar is not None and not request.eos_token_ids and grammar.is_finished:
            return output, "stop", None
        if rule is not None and ends_in_repetition(history, len(output), rule):
            return output, "repetition", None
        if len(history) == request.max_total_tokens:
            return output, "length", None


class ScriptedHandle:
    """A step that is done as soon as it is launched."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def result(self) -> StepResult:
        return self._result


class ScriptedRunner:
    """Keeps slots and pages as the device does, and asserts that plans make sense. ``fault`` may fail rows."""

    def __init__(self, page_size: int, fault: Fault = lambda history, seed: None) -> None:
        self.page_size = page_size
        self.plans: list[StepPlan] = []
        self._fault = fault
        self._fills: dict[int, SlotFill] = {}
        self._tokens: dict[int, list[int]] = {}
        self._num_computed: dict[int, int] = {}
        self._page_tables: dict[int, list[int]] = {}
        self._written: dict[tuple[int, int], tuple[int, ...]] = {}  # (page, offset) -> the prefix that ends there

    def launch(self, plan: StepPlan) -> ScriptedHandle:
        self.plans.append(plan)
        for fill in plan.fills:
            assert fill.slot > 0 and min(fill.pages) > 0
            assert len(fill.pages) == -(-len(fill.token_ids) // self.page_size)
            assert fill.num_computed_tokens < len(fill.token_ids)
            self._fills[fill.slot] = fill
            self._tokens[fill.slot] = list(fill.token_ids)
            self._num_computed[fill.slot] = fill.num_computed_tokens
            self._page_tables[fill.slot] = list(fill.pages)
        for slot, index, page in plan.new_pages:
            assert page > 0 and index == len(self._page_tables[slot])
            self._page_tables[slot].append(page)
        drafts = {slot: self._draft(slot, plan.width) for slot in plan.decode_slots if plan.width > 1}
        rows = [(slot, self._num_computed[slot], 1 + len(drafts.get(slot, ())), True) for slot in plan.decode_slots]
        rows += [(row.slot, row.start, row.num_tokens, row.samples) for row in plan.prefills]
        slots = [slot for slot, *_ in rows]
        assert len(set(slots)) == len(slots), "a slot has two rows"
        masks = dict(plan.masks)
        assert len(masks) == len(plan.masks)
        masked = [slot for slot, *_, samples in rows if samples and self._fills[slot].params.structured_outputs]
        assert sorted(masks) == sorted(masked), "who is constrained has a mask wherever it samples"
        for slot, start, count, _ in rows:
            self._tokens[slot] += drafts.get(slot, ())
            self._write(slot, start, count)
        token_ids = []
        for slot, start, count, samples in rows:
            self._read(slot, start + count)
            if slot in drafts:
                token_ids += self._accept(slot, drafts[slot], plan.width, masks.get(slot))
            elif samples:
                token_ids.append(self._sample(slot, masks.get(slot)))
            else:
                assert start + count < len(self._tokens[slot])
        return ScriptedHandle(StepResult(plan.step_id, token_ids))

    def _draft(self, slot: int, width: int) -> list[int]:
        """Drafts of which about two in three are right, as many as the slot may have."""
        fill, history = self._fills[slot], list(self._tokens[slot])
        room = min(width - 1, fill.draft_until - 1 - len(history))
        dice = random.Random(repr((history, width)))
        drafts: list[int] = []
        for _ in range(dice.randint(0, max(0, room))):
            token = next_token(history, fill.seed)
            drafts.append(token if dice.random() < 0.7 else dice.randrange(VOCAB))
            history.append(drafts[-1])
        return drafts

    def _accept(self, slot: int, drafts: list[int], width: int, mask: bytes | None) -> list[int]:
        """The tokens of a wide row; forgets drafts that were wrong, whose places in pages hold what they hold."""
        tokens = self._tokens[slot]
        known = len(tokens) - len(drafts)
        del tokens[known:]
        self._num_computed[slot] = known
        chosen = [self._sample(slot, mask)]
        for draft in drafts:
            if draft != chosen[-1]:
                break
            self._num_computed[slot] += 1
            chosen.append(self._sample(slot, mask))
        codes = [TOKEN_NOT_TAKEN] * (1 + len(drafts) - len(chosen)) + [TOKEN_NOT_DRAFTED] * (width - 1 - len(drafts))
        return chosen + codes

    def recover(self) -> None:
        pass

    def close(self) -> None:
        pass

    def _write(self, slot: int, start: int, count: int) -> None:
        assert count > 0 and start == self._num_computed[slot], "positions are computed in order, each once"
        tokens, pages = self._tokens[slot], self._page_tables[slot]
        assert start + count <= len(tokens), "a position is computed before its token is known"
        for position in range(start, start + count):
            place = (pages[position // self.page_size], position % self.page_size)
            self._written[place] = tuple(tokens[: position + 1])
        self._num_computed[slot] = start + count

    def _read(self, slot: int, end: int) -> None:
        tokens, pages = self._tokens[slot], self._page_tables[slot]
        for position in range(end):
            place = (pages[position // self.page_size], position % self.page_size)
            assert self._written.get(place) == tuple(tokens[: position + 1]), (slot, position, place)

    def _sample(self, slot: int, mask: bytes | None) -> int:
        fill, tokens = self._fills[slot], self._tokens[slot]
        assert self._num_computed[slot] == len(tokens)
        failure = self._fault(tokens, fill.seed)
        bits = (1 << VOCAB) - 1 if mask is None else int.from_bytes(mask, "little")
        allowed = [token for token in range(VOCAB) if bits >> token & 1]
        if not allowed:
            failure = TOKEN_ALL_MASKED
        token = next_token(tokens, fill.seed, allowed) if allowed else 0
        tokens.append(token if failure is None else 0)
        return token if failure is None else failure
