"""``Sampler`` against an independent implementation that works row by row, by sorting, in numpy; and what must not
happen: rows that mix, state that outlives its request, logits that change, a question to the device in a steady step.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_engine.ops import Ops, Site
from nemo_engine.ops.op import compiled_for_cpu
from nemo_engine.ops.sample import top_logprobs
from nemo_engine.runner.sampler import Sampler
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE, SlotFill, TokenLogprobs
from tests.helpers.checkpoints import tiny_config

CPU = torch.device("cpu")
OPS = Ops.select(Site.of(tiny_config(), 16, torch.float32, CPU), {})
MAX_LEN = 64

# ---- the independent implementation


def reference_gumbel(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """Gumbel noise (V,) in fp64, from the definition in ``nemo_engine.ops.sampling``, in numpy's unsigned integers."""

    def mix64(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 2**64 - 1
        z = (z ^ z >> 27) * 0x94D049BB133111EB & 2**64 - 1
        return z ^ z >> 31

    def mix32(x: np.ndarray) -> np.ndarray:
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x21F0AAAD)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0xD35A2D97)
        return x ^ x >> np.uint32(15)

    golden = 0x9E3779B97F4A7C15
    key = mix64(mix64((seed + golden) % 2**64) + golden * position & 2**64 - 1)
    x = mix32(np.arange(vocab_size, dtype=np.uint32) ^ np.uint32(key & 0xFFFFFFFF)) ^ np.uint32(key >> 32)
    u = (mix32(x).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    return -np.log(-np.log1p(-np.minimum(u, np.float32(1 - 2.0**-24)).astype(np.float64)))


def reference_scores(logits: np.ndarray, request: Request, position: int) -> np.ndarray:
    """What the chosen token maximises, -inf where a token cannot be chosen. logits: (V,) fp64."""
    params, history = request.params, request.token_ids[:position]
    prompt, output = history[: request.num_prompt_tokens], history[request.num_prompt_tokens :]
    scores = logits.copy()
    if params.allowed_token_ids:
        for token in set(range(len(scores))) - set(params.allowed_token_ids):
            scores[token] = -np.inf
    for word in request.bad_words:
        start = list(word[:-1])
        if len(output) >= len(start) and (not start or output[-len(start) :] == start):
            scores[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        for token in request.stop_token_ids:
            scores[token] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += bias
    for token in set(prompt + output):
        scores[token] *= 1 / params.repetition_penalty if scores[token] > 0 else params.repetition_penalty
    for token in set(output):
        scores[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.is_greedy or np.all(scores == -np.inf):
        return scores
    scores = scores / (1.0 if params.temperature is None else params.temperature)
    weights = np.exp(scores - scores.max())
    if params.min_p > 0:
        scores = np.where(weights >= params.min_p, scores, -np.inf)
    if params.top_k:
        scores = np.where(scores >= np.sort(scores)[::-1][min(params.top_k, len(scores)) - 1], scores, -np.inf)
    if params.top_p < 1:
        descending = np.sort(scores)[::-1]
        mass = np.cumsum(np.exp(descending - descending[0]))
        last = descending[np.searchsorted(mass / mass[-1], params.top_p)]
        scores = np.where(scores >= last, scores, -np.inf)
    return scores + reference_gumbel(request.seed, position, len(scores))


# ---- driving a sampler as the runner does


@dataclasses.dataclass
class Request:
    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    bad_words: tuple[tuple[int, ...], ...] = ()

    def fill(self, slot: int) -> SlotFill:
        return SlotFill(
            slot=slot,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            num_computed_tokens=0,
            pages=(1,),
            params=self.params,
            seed=self.seed,
            stop_token_ids=self.stop_token_ids,
            bad_words_token_ids=self.bad_words,
        )


class Driver:
    """A sampler, the token table, and who is in which slot."""

    def __init__(self, vocab_size: int, num_slots: int = 8) -> None:
        self.sampler = Sampler(num_slots, vocab_size, OPS, CPU)
        self.logprobs: dict[int, TokenLogprobs] = {}  # of the last step, failed rows too
        self.table = torch.full((num_slots + 1, MAX_LEN), -7, dtype=torch.int32)
        self.requests: dict[int, Request] = {}

    def fill(self, slot: int, request: Request) -> None:
        self.requests[slot] = request
        self.table[slot] = -7
        self.table[slot, : len(request.token_ids)] = torch.tensor(request.token_ids, dtype=torch.int32)
        fill = request.fill(slot)
        self.sampler.enter([fill], torch.tensor([slot]), torch.tensor(self.sampler.fill(fill))[None], self.table)

    def sample(self, logits: torch.Tensor, slots: tuple[int, ...]) -> list[int]:
        """One step; tokens join the requests."""
        positions = torch.tensor([len(self.requests[slot].token_ids) for slot in slots])
        sampled, reports = self.sampler.sample(logits, slots, torch.tensor(slots), positions, self.table)
        self.logprobs = dict(entry for report in reports for entry in report.entries())
        tokens = sampled.tolist()
        for slot, token, position in zip(slots, tokens, positions.tolist(), strict=True):
            self.requests[slot].token_ids.append(max(token, 0))
            self.table[slot, position] = max(token, 0)
        return tokens


def sample_alone(logits: torch.Tensor, request: Request) -> int:
    """The token of one fresh request in a sampler of its own. logits: (V,)."""
    driver = Driver(logits.shape[0], num_slots=1)
    driver.fill(1, dataclasses.replace(request, token_ids=list(request.token_ids)))
    return driver.sample(logits[None], (1,))[0]


def assert_chosen(token: int, logits: torch.Tensor, request: Request, position: int) -> None:
    """``token`` is the reference's; a tie of scores within the rounding of the logits' dtype may go either way."""
    scores = reference_scores(logits.double().numpy(), request, position)
    if np.all(scores == -np.inf):
        assert token == TOKEN_ALL_MASKED
        return
    assert token >= 0
    expected = int(np.argmax(scores))
    tolerance = 3e-6 * max(1.0, np.abs(scores[np.isfinite(scores)]).max()) if logits.dtype == torch.float32 else 1e-5
    assert token == expected or scores[expected] - scores[token] < tolerance, (request.params, token, expected)


def make_logits(kind: str, rows: int, vocab_size: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64) * 3
    if kind == "ties":
        logits = logits.round()
    elif kind == "huge":
        logits = logits * 1e4
    elif kind == "masked":
        logits[torch.rand(rows, vocab_size, generator=generator) < 0.4] = -torch.inf
    return logits.to(dtype)


PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "cool": {"temperature": 0.3},
    "hot": {"temperature": 2.0},
    "top_k": {"top_k": 3},
    "top_k off": {"top_k": 10**9},
    "top_p": {"top_p": 0.6},
    "min_p": {"min_p": 0.2},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.8},
    "repetition below 1": {"repetition_penalty": 0.6},
    "frequency": {"temperature": 0.0, "frequency_penalty": 1.7},
    "presence": {"frequency_penalty": -0.5, "presence_penalty": 1.9},
    "all penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": -1.0},
    "bias": {"temperature": 0.0, "logit_bias": {0: 3.5, 2: -4.0}},
    "strong bias": {"logit_bias": {1: 100.0}},
    "ban": {"logit_bias": {0: -100.0}, "top_k": 2},
    "allowed": {"temperature": 0.0, "allowed_token_ids": [0, 3]},
    "allowed and biased": {"allowed_token_ids": [3, 1], "logit_bias": {3: 2.0, 2: 50.0}},
    "min_tokens": {"temperature": 0.0, "min_tokens": 4, "max_tokens": 50},
    "min_tokens drawn": {"min_tokens": 2, "max_tokens": 50, "top_p": 0.9},
    "everything": {
        "temperature": 0.9,
        "top_k": 30,
        "top_p": 0.92,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "min_tokens": 3,
        "max_tokens": 50,
        "logit_bias": {1: 1.5, 4: -2.0},
        "seed": 3,
    },
}


def clip_to(vocab_size: int, values: dict[str, Any]) -> SamplingParams:
    """``values`` with token ids folded into the vocabulary."""
    values = dict(values)
    if "logit_bias" in values:
        values["logit_bias"] = {token % vocab_size: bias for token, bias in values["logit_bias"].items()}
    if "allowed_token_ids" in values:
        values["allowed_token_ids"] = [token % vocab_size for token in values["allowed_token_ids"]]
    return SamplingParams(**values)


def make_request(name: str, vocab_size: int, seed: int) -> Request:
    choices = np.random.default_rng(seed)
    words: tuple[tuple[int, ...], ...] = ()
    if name in ("everything", "allowed"):
        words = tuple(tuple(choices.integers(0, vocab_size, length).tolist()) for length in (1, 2, 2, 3))
    return Request(
        params=clip_to(vocab_size, PARAMETERS[name]),
        token_ids=choices.integers(0, vocab_size, 5).tolist(),
        num_prompt_tokens=3 if seed % 2 else 5,
        seed=int(choices.integers(0, 2**64, dtype=np.uint64)),
        stop_token_ids=frozenset(choices.integers(0, vocab_size, 2).tolist()),
        bad_words=words,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "huge", "masked"])
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 50])
def test_every_parameter_equals_the_reference(vocab_size: int, kind: str, dtype: torch.dtype) -> None:
    names = list(PARAMETERS)
    slots = tuple(range(1, len(names) + 1))
    driver = Driver(vocab_size, num_slots=len(names))
    for slot, name in zip(slots, names, strict=True):
        driver.fill(slot, make_request(name, vocab_size, slot))
    for step in range(8):
        logits = make_logits(kind, len(names), vocab_size, step, dtype)
        tokens = driver.sample(logits, slots)
        for row, slot in enumerate(slots):
            request = driver.requests[slot]
            assert_chosen(tokens[row], logits[row], request, len(request.token_ids) - 1)


@pytest.mark.parametrize("vocab_size", [6144, 131072])
def test_large_vocabularies_equal_the_reference(vocab_size: int) -> None:
    names = list(PARAMETERS)
    slots = tuple(range(1, len(names) + 1))
    driver = Driver(vocab_size, num_slots=len(names))
    for slot, name in zip(slots, names, strict=True):
        driver.fill(slot, make_request(name, vocab_size, slot))
    for step in range(2):
        logits = make_logits("normal", len(names), vocab_size, step, torch.float32)
        tokens = driver.sample(logits, slots)
        for row, slot in enumerate(slots):
            assert_chosen(tokens[row], logits[row], driver.requests[slot], len(driver.requests[slot].token_ids) - 1)


@st.composite
def some_params(draw: st.DrawFn) -> SamplingParams:
    def maybe(strategy: st.SearchStrategy[Any], off: Any) -> Any:
        return draw(st.one_of(st.just(off), strategy))

    ids = st.integers(0, 10)
    return SamplingParams(
        temperature=maybe(st.floats(0.01, 2.0), 0.0),
        top_k=maybe(st.integers(1, 13), 0),
        top_p=maybe(st.floats(0.01, 1.0), 1.0),
        min_p=maybe(st.floats(0.0, 1.0), 0.0),
        repetition_penalty=maybe(st.floats(0.1, 5.0), 1.0),
        frequency_penalty=maybe(st.floats(-2.0, 2.0), 0.0),
        presence_penalty=maybe(st.floats(-2.0, 2.0), 0.0),
        min_tokens=maybe(st.integers(1, 6), 0),
        max_tokens=50,
        logit_bias=maybe(st.dictionaries(ids, st.floats(-120.0, 120.0), max_size=4), None),
        allowed_token_ids=maybe(st.lists(ids, min_size=1, max_size=6), None),
    )


@st.composite
def some_request(draw: st.DrawFn) -> Request:
    ids = st.integers(0, 10)
    token_ids = draw(st.lists(ids, min_size=1, max_size=12))
    return Request(
        params=draw(some_params()),
        token_ids=token_ids,
        num_prompt_tokens=draw(st.integers(1, len(token_ids))),
        seed=draw(st.integers(0, 2**64 - 1)),
        stop_token_ids=frozenset(draw(st.lists(ids, max_size=3))),
        bad_words=tuple(draw(st.lists(st.lists(ids, min_size=1, max_size=3).map(tuple), max_size=4))),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(requests=st.lists(some_request(), min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_combinations_equal_the_reference_and_rows_alone(requests: list[Request], seed: int) -> None:
    driver = Driver(11)
    slots = tuple(range(1, len(requests) + 1))
    for slot, request in zip(slots, requests, strict=True):
        driver.fill(slot, dataclasses.replace(request, token_ids=list(request.token_ids)))
    for step in range(3):
        logits = make_logits("normal", len(requests), 11, seed + step, torch.float64)
        before = [
            dataclasses.replace(driver.requests[slot], token_ids=[*driver.requests[slot].token_ids]) for slot in slots
        ]
        tokens = driver.sample(logits, slots)
        for row, request in enumerate(before):
            # A fresh sampler is one to which a preempted request comes back.
            assert sample_alone(logits[row], request) == tokens[row]
            assert_chosen(tokens[row], logits[row], request, len(request.token_ids))


# ---- rows do not mix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [7, 1001])
def test_a_request_samples_the_same_alone_and_in_any_batch(vocab_size: int, dtype: torch.dtype) -> None:
    names = list(PARAMETERS)
    logits = make_logits("normal", len(names), vocab_size, 1, dtype)
    alone = [sample_alone(logits[row], make_request(name, vocab_size, row)) for row, name in enumerate(names)]
    order = np.random.default_rng(0)
    for _ in range(6):
        rows = order.permutation(len(names))[: order.integers(1, len(names) + 1)].tolist()
        driver = Driver(vocab_size, num_slots=len(names))
        for row in rows:
            driver.fill(row + 1, make_request(names[row], vocab_size, row))
        assert driver.sample(logits[rows], tuple(row + 1 for row in rows)) == [alone[row] for row in rows]


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_row_that_is_not_finite_fails_alone(poison: float) -> None:
    names = list(PARAMETERS)
    slots = tuple(range(1, len(names) + 1))
    logits = make_logits("normal", len(names), 40, 2, torch.float32)

    def run(bad: dict[int, int]) -> list[int]:
        driver = Driver(40, num_slots=len(names))
        for slot, name in zip(slots, names, strict=True):
            driver.fill(slot, make_request(name, 40, slot))
        poisoned = logits.clone()
        for row, token in bad.items():
            poisoned[row, token] = poison
        first = driver.sample(poisoned, slots)
        return [*first, *driver.sample(logits, slots)]

    good = run({})
    assert min(good) >= 0
    for bad_rows in ([0], [1, 6], range(len(names))):
        tokens = run({row: (3 * row) % 40 for row in bad_rows})
        for row in range(len(names)):
            assert tokens[row] == (TOKEN_NOT_FINITE if row in bad_rows else good[row])
            if row not in bad_rows:
                assert tokens[row + len(names)] == good[row + len(names)]


def test_a_masked_token_does_not_hide_a_nan() -> None:
    logits = torch.zeros(1, 5)
    logits[0, 2] = math.nan
    request = Request(SamplingParams(temperature=0.0, allowed_token_ids=[1]), [0], 1)
    assert sample_alone(logits[0], request) == TOKEN_NOT_FINITE


# ---- masks of grammars


def mask_of(allowed: Sequence[int], vocab_size: int) -> bytes:
    return sum(1 << token for token in set(allowed)).to_bytes(-(-vocab_size // 32) * 4, "little")


def sample_masked(
    driver: Driver, logits: torch.Tensor, slots: tuple[int, ...], masks: dict[int, Sequence[int]]
) -> list[int]:
    positions = torch.tensor([len(driver.requests[slot].token_ids) for slot in slots])
    packed = [(slot, mask_of(allowed, logits.shape[1])) for slot, allowed in masks.items()]
    tokens, reports = driver.sampler.sample(logits, slots, torch.tensor(slots), positions, driver.table, packed)
    driver.logprobs = dict(entry for report in reports for entry in report.entries())
    return tokens.tolist()


@pytest.mark.parametrize("vocab_size", [1, 7, 32, 33, 64, 97, 6144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_masked_rows_equal_the_reference_and_the_others_are_free(vocab_size: int, dtype: torch.dtype) -> None:
    names = list(PARAMETERS)
    slots = tuple(range(1, len(names) + 1))
    rng = np.random.default_rng(vocab_size)
    logits = make_logits("normal", len(names), vocab_size, 3, dtype)
    free, masked = Driver(vocab_size, len(names)), Driver(vocab_size, len(names))
    for driver in (free, masked):
        for slot, name in zip(slots, names, strict=True):
            driver.fill(slot, make_request(name, vocab_size, slot))
    masks = {
        slot: rng.choice(vocab_size, rng.integers(1, vocab_size + 1), False).tolist()
        for slot in slots
        if rng.random() < 0.6
    }
    order = list(masks)
    rng.shuffle(order)
    before = logits.clone()
    unmasked = sample_masked(free, logits, slots, {})
    tokens = sample_masked(masked, logits, slots, {slot: masks[slot] for slot in order})
    assert torch.equal(logits, before)
    for row, slot in enumerate(slots):
        if slot not in masks:
            assert tokens[row] == unmasked[row]
            continue
        kept = torch.full_like(logits[row], -torch.inf)
        kept[masks[slot]] = logits[row, masks[slot]]
        if dtype is not torch.bfloat16:
            assert_chosen(tokens[row], kept, masked.requests[slot], len(masked.requests[slot].token_ids))
        assert tokens[row] in masks[slot] or tokens[row] == TOKEN_ALL_MASKED


def test_masks_leave_the_logprobs_raw_and_hide_no_nan() -> None:
    driver = Driver(40)
    for slot in (1, 2, 3):
        driver.fill(slot, Request(SamplingParams(temperature=0.0, logprobs=1), [1], 1))
    logits = make_logits("normal", 3, 40, 1, torch.float32)
    logits[1, 7] = torch.nan
    masks = {slot: [5, 9] for slot in (1, 2)}
    assert sample_masked(driver, logits, (1, 2, 3), masks)[1] == TOKEN_NOT_FINITE
    entry = driver.logprobs[0]
    assert entry.token_ids[0] in (5, 9) and entry.token_ids[1] == int(logits[0].argmax())
    assert entry.logprobs == pytest.approx(logits[0].log_softmax(0)[entry.token_ids].tolist())


@pytest.mark.parametrize("mask", [b"", bytes(8), b"\xff" * 4, b"\xff" * 12])
def test_a_mask_that_is_empty_or_of_another_length_allows_nothing(mask: bytes) -> None:
    driver = Driver(40)
    for slot in (1, 2):
        driver.fill(slot, Request(SamplingParams(temperature=0.0), [1], 1))
    logits = make_logits("normal", 2, 40, 1, torch.float32)
    slots, positions = torch.tensor([1, 2]), torch.tensor([1, 1])
    tokens, _ = driver.sampler.sample(logits, (1, 2), slots, positions, driver.table, [(2, mask)])
    assert tokens.tolist() == [int(logits[0].argmax()), TOKEN_ALL_MASKED]


def test_masks_need_the_logits() -> None:
    driver = Driver(40)
    driver.fill(1, Request(SamplingParams(temperature=0.0), [1], 1))
    slots = (1,)
    assert driver.sampler.needs_only_tokens(slots)
    assert not driver.sampler.needs_only_tokens(slots, [(1, bytes(8))])
    assert driver.sampler.needs_only_tokens(slots)


def test_what_the_parameters_of_slots_alone_decide() -> None:
    """Neither penalties, nor what edits or reports logits, nor hidden ids; of all slots together."""
    driver = Driver(40)
    kinds = (
        {},
        {"top_p": 0.5},
        {"presence_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"logprobs": 1},
        {"logit_bias": {3: 1.0}},
    )
    for slot, kind in enumerate(kinds, 1):
        driver.fill(slot, Request(SamplingParams(**kind), [1], 1))
    sampler = driver.sampler
    assert [sampler.needs_only_draws((slot,), ()) for slot in range(1, 7)] == [True, True, False, False, False, False]
    assert sampler.needs_only_draws((1, 2), ()) and not sampler.needs_only_draws((1, 3), ())
    assert not sampler.needs_only_draws((1, 2), [(1, bytes(8))])
    hiding = Sampler(8, 40, OPS, CPU, without_token=[5])
    assert hiding.needs_only_tokens((0,)) and not hiding.needs_only_draws((0,), ())


def test_nothing_left_to_choose() -> None:
    greedy, drawn = (
        SamplingParams(temperature=0.0, min_tokens=1),
        SamplingParams(top_p=0.5, top_k=2, min_p=0.1, min_tokens=1),
    )
    for params in (greedy, drawn):
        driver = Driver(4)
        driver.fill(1, Request(params, [0], 1, stop_token_ids=frozenset(range(4))))
        driver.fill(2, Request(params, [0], 1, bad_words=((0,), (1,), (2,), (3,))))
        driver.fill(3, Request(params, [0], 1))
        driver.fill(4, Request(dataclasses.replace(params, allowed_token_ids=[2]), [0], 1, bad_words=((2,),)))
        driver.fill(5, Request(params, [0], 1))
        logits = torch.tensor([[0.0, 1.0, 2.0, 30.0]]).repeat(5, 1)
        logits[2] = -math.inf
        masked = TOKEN_ALL_MASKED
        assert driver.sample(logits, (1, 2, 3, 4, 5)) == [masked, masked, masked, masked, 3]
    # min_tokens is over for the first one: its stop tokens are free again.
    assert driver.sample(logits[:1], (1,)) == [3]


# ---- single rules


def test_bad_words_are_looked_for_in_the_output_only() -> None:
    def chosen(token_ids: Sequence[int], num_prompt_tokens: int, *words: tuple[int, ...]) -> int:
        request = Request(SamplingParams(temperature=0.0), list(token_ids), num_prompt_tokens, bad_words=words)
        return sample_alone(torch.tensor([0.0, 1.0, 2.0, 3.0]), request)

    assert chosen([0, 1], 1, (1, 3)) == 2
    assert chosen([0, 1], 2, (1, 3)) == 3  # the 1 is the prompt's
    assert chosen([0, 1, 2], 1, (1, 2, 3)) == 2
    assert chosen([0, 1, 2], 2, (1, 2, 3)) == 3
    assert chosen([1], 1, (3, 1, 2, 3, 3)) == 3  # longer than all there is
    assert chosen([0, 1], 1, (1, 3), (2, 3), (0, 3)) == 2  # of three words with one end, one fits
    assert chosen([0, 1], 1, (2, 3), (1, 3)) == 2
    assert chosen([0, 1, 1], 1, (1, 1, 3), (1, 2), (1,)) == 0
    assert chosen([0], 1, (3,)) == 2


def test_min_tokens_counts_output_tokens() -> None:
    driver = Driver(4)
    params = SamplingParams(temperature=0.0, min_tokens=2, max_tokens=9)
    driver.fill(1, Request(params, [1, 1, 1], 3, stop_token_ids=frozenset({3, 2})))
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    slots = (1,)
    assert [driver.sample(logits, slots)[0] for _ in range(3)] == [1, 1, 3]


def test_stop_tokens_are_free_without_min_tokens() -> None:
    request = Request(SamplingParams(temperature=0.0), [1], 1, stop_token_ids=frozenset({3}))
    assert sample_alone(torch.tensor([0.0, 1.0, 2.0, 3.0]), request) == 3


def test_seeds_use_all_64_bits_and_positions_differ() -> None:
    logits = torch.zeros(1000)
    tokens = set()
    seeds = [0, 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    for seed, length in itertools.product(seeds, (1, 2, 3)):
        tokens.add((seed, length, sample_alone(logits, Request(SamplingParams(), [0] * length, 1, seed=seed))))
    assert len({token for _, _, token in tokens}) >= 19  # 21 draws out of 1000
    assert tokens == {
        (seed, length, int(np.argmax(reference_gumbel(seed, length, 1000)))) for seed in seeds for length in (1, 2, 3)
    }


def test_absurd_parameters_still_give_tokens() -> None:
    for params in (
        SamplingParams(repetition_penalty=1e-300),
        SamplingParams(repetition_penalty=1e300),
        SamplingParams(temperature=0.01, logit_bias={0: 1e6, 1: -1e6}),
        SamplingParams(top_p=5e-324, min_p=1.0, top_k=1),
    ):
        for scale in (1.0, 3e38, 1e-38):
            token = sample_alone(torch.tensor([0.5, -1.0, 1.0, 0.0]) * scale, Request(params, [0, 1, 2, 3], 2))
            assert 0 <= token < 4


# ---- state


def test_penalties_are_counted_as_tokens_come_and_rebuilt_when_a_slot_is_filled_again() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=1.0)
    logits = torch.tensor([[0.0, 1.5, 2.25]])
    driver = Driver(3)
    driver.fill(1, Request(params, [2, 2, 2], 3))
    slots = (1,)
    expected = [2, 1, 2, 1, 2, 0]
    assert [driver.sample(logits, slots)[0] for _ in range(6)] == expected
    # Preempted after four tokens, in the same slot and in another one; then a new request.
    for slot in (1, 2):
        driver.fill(slot, Request(params, [2, 2, 2, *expected[:4]], 3))
        assert [driver.sample(logits, (slot,))[0] for _ in range(2)] == expected[4:]
    driver.fill(1, Request(params, [2], 1))
    assert [driver.sample(logits, slots)[0] for _ in range(6)] == expected


def test_nothing_is_left_of_the_request_before() -> None:
    vocab_size = 30
    logits = make_logits("normal", 8, vocab_size, 4, torch.float32)
    names = list(PARAMETERS)
    for first, second in itertools.permutations(
        ["everything", "greedy", "plain", "allowed", "all penalties", "min_tokens"], 2
    ):
        driver = Driver(vocab_size)
        slots = (3,)
        driver.fill(3, make_request(first, vocab_size, 1))
        for step in range(2):
            driver.sample(logits[step : step + 1], slots)
        driver.sample(logits[2:3], slots)  # a step too many, as the overlapped pipeline makes
        driver.fill(3, make_request(second, vocab_size, names.index(second)))
        fresh = Driver(vocab_size)
        fresh.fill(3, make_request(second, vocab_size, names.index(second)))
        for step in range(3, 8):
            assert driver.sample(logits[step : step + 1], slots) == fresh.sample(logits[step : step + 1], slots)


def test_a_failed_row_counts_no_token() -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    driver = Driver(3)
    driver.fill(1, Request(params, [2], 1))
    assert driver.sample(torch.full((1, 3), math.nan), (1,)) == [TOKEN_NOT_FINITE]
    assert driver.sample(torch.tensor([[1.0, 0.5, 0.0]]), (1,)) == [0]


def test_slots_may_be_filled_between_steps_of_the_same_tuple() -> None:
    driver = Driver(50)
    slots = (1, 2)
    logits = make_logits("normal", 2, 50, 0, torch.float32)
    driver.fill(1, Request(SamplingParams(temperature=0.0), [0], 1))
    driver.fill(2, Request(SamplingParams(temperature=0.0), [0], 1))
    best = logits.argmax(1).tolist()
    assert driver.sample(logits, slots) == best
    driver.fill(2, Request(SamplingParams(temperature=0.0, logit_bias={best[1]: -100.0}), [0], 1))
    changed = driver.sample(logits, slots)
    assert changed[0] == best[0] and changed[1] == logits[1].topk(2).indices[1]


def test_equal_tuples_in_another_order_of_slots() -> None:
    driver = Driver(50)
    logits = make_logits("normal", 1, 50, 0, torch.float32).repeat(2, 1)
    driver.fill(1, Request(SamplingParams(temperature=0.0), [0], 1))
    driver.fill(2, Request(SamplingParams(temperature=0.0, allowed_token_ids=[7]), [0], 1))
    best = int(logits[0].argmax())
    assert best != 7
    assert driver.sample(logits, (1, 2)) == [best, 7]
    assert driver.sample(logits, (2, 1)) == [7, best]


def test_logits_are_left_as_they_are() -> None:
    names = list(PARAMETERS)
    slots = tuple(range(1, len(names) + 1))
    driver = Driver(20, num_slots=len(names))
    for slot, name in zip(slots, names, strict=True):
        driver.fill(slot, make_request(name, 20, slot))
    logits = make_logits("normal", len(names), 20, 6, torch.float32)
    before = logits.clone()
    driver.sample(logits, slots)
    assert torch.equal(logits, before)


def test_no_rows() -> None:
    driver = Driver(20)
    tokens, reports = driver.sampler.sample(
        torch.empty(0, 20), (), torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), driver.table
    )
    assert tokens.shape == (0,) and tokens.dtype == torch.int64 and reports == []


class OperationLog(TorchDispatchMode):
    """Every operation that reaches torch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def steady_step(names: Sequence[str], dtype: torch.dtype = torch.float32) -> list[str]:
    """The operations of the second of two steps of the same batch."""
    driver = Driver(300, num_slots=len(names))
    slots = tuple(range(1, len(names) + 1))
    for slot, name in zip(slots, names, strict=True):
        driver.fill(slot, make_request(name, 300, slot))
    logits = make_logits("normal", len(names), 300, 0, dtype)
    driver.sample(logits, slots)
    slot_ids, positions = torch.tensor(slots), torch.full((len(names),), 6)
    with OperationLog() as log:
        driver.sampler.sample(logits, slots, slot_ids, positions, driver.table)
    return log.names


def test_a_steady_step_asks_the_device_nothing() -> None:
    names = steady_step(list(PARAMETERS))
    assert len(names) > 50
    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::_to_copy.item", "aten::equal", "aten::unique"}
    assert waits.isdisjoint(names)


def test_what_no_row_uses_costs_nothing() -> None:
    """In fp64, by the definition; csrc/cpu does all in one call."""
    exact = functools.partial(steady_step, dtype=torch.float64)
    greedy = exact(["greedy"] * 4)
    assert len(greedy) <= 8, greedy
    assert len(exact(["plain"] * 4)) < len(exact(["top_p"] * 4))
    assert not any("scatter" in name or "topk" in name for name in exact(["plain", "greedy"]))
    assert not any("clone" in name for name in exact(["plain", "greedy", "top_p"]))
    if compiled_for_cpu() is not None:
        assert steady_step(["plain", "greedy", "top_p"]) == ["aten::new_empty"]


class Uploads(OperationLog):
    """Every operation, and what is copied from the host; what holds as many elements as ``most`` or more."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most, self.uploaded, self.large = most, 0, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, torch.Tensor) and result.is_meta:
            self.uploaded += func.name() == "aten::_to_copy" and not args[0].is_meta
            if result.numel() >= self.most:
                self.large.add(func.name())
        return result


def edited_step(num_rows: int, num_edited: int, num_masked: int = 0) -> tuple[Uploads, list[torch.Tensor]]:
    """A new batch on a device that only has shapes, whose last rows have masks, min_tokens, and words: its operations,
    and the logits that tokens were chosen from.
    """
    meta, vocab_size, given = torch.device("meta"), 320, []

    def sample_(logits: torch.Tensor, *others: Any) -> torch.Tensor:
        given.append(logits)
        return torch.empty(len(logits), dtype=torch.int64, device=meta)

    sampler = Sampler(num_rows, vocab_size, dataclasses.replace(OPS, sample_=sample_), meta)
    params = SamplingParams(temperature=0.7, min_tokens=4, logit_bias={9: 1.0}, allowed_token_ids=[1, 2, 9])
    slots = tuple(range(1, num_rows + 1))
    for slot in slots:
        plain = Request(SamplingParams(temperature=0.7), [1, 2], 2)
        edited = Request(params, [1, 2], 2, stop_token_ids=frozenset({3}), bad_words=((5, 6), (7,)))
        sampler.fill((plain if slot <= num_rows - num_edited else edited).fill(slot))
    masks = [(slot, bytes(40)) for slot in slots[num_rows - num_masked :]]
    logits = torch.empty(num_rows, vocab_size, dtype=torch.bfloat16, device=meta)
    index = torch.empty(num_rows, dtype=torch.int64, device=meta)
    table = torch.empty(num_rows + 1, MAX_LEN, dtype=torch.int32, device=meta)
    with Uploads(num_rows * vocab_size) as log:
        sampler.sample(logits, slots, index, index, table, masks)
    assert given[-1] is logits or num_edited == num_rows
    return log, given


def test_edits_of_a_new_batch_are_one_upload_and_operations_whatever_the_rows() -> None:
    logs = [edited_step(rows, rows)[0] for rows in (1, 64, 256)]
    assert [log.uploaded for log in logs] == [1, 1, 1]
    assert logs[0].names == logs[1].names == logs[2].names and len(logs[0].names) <= 48
    masked = [edited_step(rows, rows, rows)[0] for rows in (1, 64)]
    assert [log.uploaded for log in masked] == [2, 2] and masked[0].names == masked[1].names


@pytest.mark.parametrize(("num_edited", "num_masked"), [(1, 0), (0, 1), (1, 1), (2, 3)])
def test_an_edited_row_costs_the_others_no_copy(num_edited: int, num_masked: int) -> None:
    log, given = edited_step(64, num_edited, num_masked)
    assert not log.large
    assert [(len(logits), logits.dtype) for logits in given] == [
        (max(num_edited, num_masked), torch.float32),
        (64, torch.bfloat16),
    ]


# ---- log-probabilities


def exact_logprobs(logits: torch.Tensor) -> np.ndarray:
    values = logits.double().numpy()
    shifted = values - values.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("vocab_size", [1, 7, 6144])
def test_logprobs_are_those_of_the_raw_logits(vocab_size: int, dtype: torch.dtype, tolerance: float) -> None:
    asks: list[dict[str, Any]] = [
        {"logprobs": 3},
        {},
        {"logprobs": 0},
        {"logprobs": -1},
        {"logprob_token_ids": [0, vocab_size - 1, vocab_size // 2]},
        {"logprobs": 3, "temperature": 0.0, "logit_bias": {0: 100.0}},
        {"logprobs": 20},
    ]
    driver = Driver(vocab_size)
    slots = tuple(range(1, len(asks) + 1))
    for slot, ask in zip(slots, asks, strict=True):
        driver.fill(slot, Request(SamplingParams(**ask), [0], 1, seed=slot))
    logits = make_logits("normal", len(asks), vocab_size, 9, dtype)
    tokens = driver.sample(logits, slots)
    found = driver.logprobs
    assert sorted(found) == [0, 2, 3, 4, 5, 6]
    exact = exact_logprobs(logits)
    for row, entry in found.items():
        params = driver.requests[slots[row]].params
        order = sorted(range(vocab_size), key=lambda token: (-logits[row, token].item(), token))
        if params.logprob_token_ids:
            others = list(params.logprob_token_ids)
        else:
            others = order[: vocab_size if params.logprobs == -1 else params.logprobs]
        assert entry.token_ids == [tokens[row], *others]
        assert entry.ranks == [order.index(token) + 1 for token in entry.token_ids]
        np.testing.assert_allclose(entry.logprobs, exact[row, entry.token_ids], rtol=tolerance, atol=tolerance)
        assert all(type(value) is float for value in entry.logprobs)
        assert all(type(value) is int for value in entry.token_ids + entry.ranks)


def test_ranks_of_ties_are_vllms() -> None:
    ids, _, ranks = top_logprobs(torch.tensor([[1.0, 2.0, 1.0, 1.0]]), torch.tensor([3]), 3)
    assert ids.tolist() == [[3, 1, 0, 2]]
    assert ranks.tolist() == [[4, 1, 2, 3]]


def test_failed_rows_do_not_spoil_the_logprobs_of_others() -> None:
    driver = Driver(4)
    for slot in (1, 2):
        driver.fill(slot, Request(SamplingParams(logprobs=2, temperature=0.0), [0], 1))
    logits = torch.tensor([[0.0, math.nan, 0.0, 0.0], [0.0, 1.0, 2.0, 3.0]])
    assert driver.sample(logits, (1, 2)) == [TOKEN_NOT_FINITE, 3]
    assert driver.logprobs[1].token_ids == [3, 3, 2]


def test_logprobs_do_not_depend_on_the_batch() -> None:
    logits = make_logits("ties", 4, 1001, 3, torch.float32)
    driver = Driver(1001)
    for slot, count in zip((1, 2, 3, 4), (5, 20, 5, -1), strict=True):
        driver.fill(slot, Request(SamplingParams(logprobs=count), [0], 1))

    def found(rows: Sequence[int]) -> list[TokenLogprobs]:
        positions = torch.full((len(rows),), 9)
        slots = tuple(row + 1 for row in rows)
        _, reports = driver.sampler.sample(logits[list(rows)], slots, torch.tensor(slots), positions, driver.table)
        return [
            entry
            for _, entry in sorted((pair for report in reports for pair in report.entries()), key=lambda pair: pair[0])
        ]

    together = found(range(4))
    for row in range(4):
        assert found([row]) == [together[row]]


@pytest.mark.parametrize("count", [0, 1, 4, -1])
def test_prompt_logprobs(count: int) -> None:
    driver = Driver(33)
    driver.fill(2, Request(SamplingParams(prompt_logprobs=count), [0] * 9, 9))
    logits = make_logits("normal", 8, 33, 5, torch.float64)
    targets = torch.tensor([3, 0, 32, 8, 8, 1, 2, 30])
    entries = [entry for _, entry in driver.sampler.report_prompt(logits, targets, 2).entries()]
    exact = exact_logprobs(logits)
    assert len(entries) == 8
    for row, entry in enumerate(entries):
        order = np.argsort(-exact[row], kind="stable").tolist()
        assert entry.token_ids == [targets[row].item(), *(order if count == -1 else order[:count])]
        assert entry.ranks == [order.index(token) + 1 for token in entry.token_ids]
        np.testing.assert_allclose(entry.logprobs, exact[row, entry.token_ids], rtol=1e-12)
