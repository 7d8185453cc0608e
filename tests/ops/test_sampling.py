"""The noise against its definition in plain integers, the draw against sorting in numpy and against exact
probabilities.

Statistical tests use fixed seeds, so they always give the same answer; each was run at a false-alarm rate of 1e-9, and
there are fewer than 100 of them, so the chance that a sound generator failed any of them when they were written is
below 1e-7.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from nemo_engine.ops import sampling

FALSE_ALARM_RATE = 1e-9
M32, M64 = 2**32 - 1, 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15

# ---- the noise as its docstring defines it, in Python's integers


def mix64(z: int) -> int:
    z ^= z >> 30
    z = z * 0xBF58476D1CE4E5B9 & M64
    z ^= z >> 27
    z = z * 0x94D049BB133111EB & M64
    return z ^ z >> 31


def mix32(x: int) -> int:
    x ^= x >> 16
    x = x * 0x21F0AAAD & M32
    x ^= x >> 15
    x = x * 0xD35A2D97 & M32
    return x ^ x >> 15


def reference_bits(seed: int, position: int, token: int) -> int:
    key = mix64(mix64(seed + GOLDEN & M64) + GOLDEN * position & M64)
    return mix32(mix32(token ^ key & M32) ^ key >> 32)


def to_float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def make_keys(seeds: list[int], positions: list[int]) -> torch.Tensor:
    return sampling.row_keys(torch.tensor([sampling.seed_key(seed) for seed in seeds]), torch.tensor(positions))


def unsigned(bits: torch.Tensor) -> np.ndarray:
    return bits.numpy().view(np.uint32)


SEEDS = [0, 1, 2, 12345, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
POSITIONS = [0, 1, 2, 63, 64, 131071, 131072, 1 << 20]


def test_noise_bits_equal_the_definition() -> None:
    pairs = [(seed, position) for seed in SEEDS for position in POSITIONS]
    got = unsigned(sampling.noise_bits(make_keys([s for s, _ in pairs], [p for _, p in pairs]), 67))
    for row, (seed, position) in enumerate(pairs):
        assert got[row].tolist() == [reference_bits(seed, position, token) for token in range(67)], (seed, position)


def test_noise_bits_at_high_token_ids() -> None:
    got = unsigned(sampling.noise_bits(make_keys([7], [9]), 131072))[0]
    for token in (6143, 6144, 65535, 65536, 131071):
        assert got[token] == reference_bits(7, 9, token)


def test_noise_golden_values() -> None:
    # Written down once: a change of the noise changes every seeded output that users have kept.
    assert sampling.seed_key(0) == -2152535657050944081
    assert sampling.seed_key(2**64 - 1) == -1956407806741107680
    keys = make_keys([0, 42], [0, 131071])
    assert keys.tolist() == [5197578548964807871, 9679774173189574]
    bits = unsigned(sampling.noise_bits(keys, 131072))
    assert bits[0, [0, 1, 131071]].tolist() == [0x2B1CB25A, 0x5A817D8C, 0xC7C5D8F9]
    assert bits[1, [0, 1, 131071]].tolist() == [0xE223B186, 0xCC89E0D3, 0x1CFC0A0F]


def test_uniform_and_exponential_from_the_bits() -> None:
    keys = make_keys(SEEDS, list(range(len(SEEDS))))
    bits = unsigned(sampling.noise_bits(keys, 501))
    got = sampling.log_exponential(keys, 501)
    assert got.dtype == torch.float32
    for row in range(len(SEEDS)):
        for token in (0, 1, 250, 500):
            u = min(to_float32(to_float32(to_float32(float(int(bits[row, token]))) + 0.5) * 2.0**-32), 1 - 2.0**-24)
            exact = math.log(-math.log1p(-u))
            assert got[row, token].item() == pytest.approx(exact, abs=1e-6 * max(1.0, abs(exact)))


def test_uniform_is_strictly_between_0_and_1(monkeypatch: pytest.MonkeyPatch) -> None:
    extremes = torch.tensor([[0, 1, -1, -128, -129, 2**31 - 1, -(2**31)]], dtype=torch.int32)
    monkeypatch.setattr(sampling, "noise_bits", lambda keys, vocab_size: extremes.clone())
    got = sampling.log_exponential(torch.zeros(1, dtype=torch.int64), 7)[0]
    assert torch.isfinite(got).all()
    assert got[0].item() == pytest.approx(-33 * math.log(2), rel=1e-6)
    assert got[2].item() == got[3].item() == pytest.approx(math.log(24 * math.log(2)), rel=1e-6)
    assert got.argmin() == 0 and got.argmax() == 2


@pytest.mark.parametrize("vocab_size", [1, 7, 33, 1001, 6144])
@pytest.mark.parametrize("num_threads", [1, 2])
def test_noise_of_a_row_does_not_depend_on_the_batch(vocab_size: int, num_threads: int) -> None:
    keys = make_keys(list(range(37)), list(range(100, 137)))
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = sampling.log_exponential(keys, vocab_size)
    finally:
        torch.set_num_threads(before)
    for row in (0, 1, 17, 36):
        assert torch.equal(sampling.log_exponential(keys[row : row + 1], vocab_size)[0], together[row])


# ---- the noise as a random source


def assert_fits(observed: np.ndarray, probabilities: np.ndarray) -> None:
    """Pearson's chi-square test of counts against exact probabilities, at FALSE_ALARM_RATE in both tails."""
    observed, expected = observed.ravel(), probabilities.ravel() * observed.sum()
    assert observed[expected == 0].sum() == 0
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert expected.min() > 5, "too few draws for the test"
    statistic = ((observed - expected) ** 2 / expected).sum()
    degrees = max(1, len(observed) - 1)
    p_value = chi2.sf(statistic, degrees)
    assert FALSE_ALARM_RATE < p_value, f"chi-square {statistic:.1f} with {degrees} degrees of freedom"
    if degrees > 10:
        assert chi2.cdf(statistic, degrees) > FALSE_ALARM_RATE, "too even to be random"


def walk(name: str, count: int) -> torch.Tensor:
    """Keys of ``count`` neighbouring (seed, position) pairs."""
    steps = torch.arange(count)
    seeds = {"positions": [5] * count, "seeds": range(count), "both": range(count), "against": range(count, 0, -1)}[
        name
    ]
    positions = torch.full((count,), 77) if name == "seeds" else steps
    return sampling.row_keys(torch.tensor([sampling.seed_key(seed) for seed in seeds]), positions)


WALKS = ["positions", "seeds", "both", "against"]


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("shift", [0, 4, 14, 28])
def test_neighbouring_noise_is_uniform_and_independent(name: str, shift: int) -> None:
    nibble = (unsigned(sampling.noise_bits(walk(name, 60_000), 8)) >> shift & 15).astype(np.int64)
    assert_fits(np.bincount(nibble.ravel(), minlength=16), np.full(16, 1 / 16))
    even = np.full(256, 1 / 256)
    for first, second in (
        (nibble[:, :-1], nibble[:, 1:]),  # neighbouring tokens
        (nibble[:-1], nibble[1:]),  # neighbouring rows
        (nibble[:-1, :-1], nibble[1:, 1:]),  # both
        (nibble[:, :-4], nibble[:, 4:]),
    ):
        assert_fits(np.bincount((first * 16 + second).ravel(), minlength=256), even)


@pytest.mark.parametrize("stride", [64, 1 << 20, 1 << 32, GOLDEN])
def test_noise_of_structured_seeds_is_independent(stride: int) -> None:
    seeds = [index * stride & M64 for index in range(60_000)]
    high = (unsigned(sampling.noise_bits(make_keys(seeds, [3] * len(seeds)), 4)) >> 28).astype(np.int64)
    assert_fits(np.bincount((high[:-1] * 16 + high[1:]).ravel(), minlength=256), np.full(256, 1 / 256))


def test_every_bit_of_the_noise_is_fair_and_flips_with_every_bit_of_the_seed() -> None:
    base = unsigned(sampling.noise_bits(make_keys(list(range(2000)), [1] * 2000), 16))
    count = base.size
    spread = 7 * math.sqrt(count) / 2  # seven standard deviations: 3e-12 per bit, 6.5e-9 for all of them
    for bit in range(32):
        assert abs(int((base >> bit & 1).sum()) - count / 2) < spread
    for seed_bit in range(64):
        flipped = unsigned(sampling.noise_bits(make_keys([s ^ 1 << seed_bit for s in range(2000)], [1] * 2000), 16))
        for bit in range(32):
            assert abs(int(((base ^ flipped) >> bit & 1).sum()) - count / 2) < spread, (seed_bit, bit)


# ---- the draw

PROBABILITIES = np.array([0.5, 0.2, 0.12, 0.09, 0.06, 0.02, 0.01])


def draw_many(logits: torch.Tensor, keys: torch.Tensor, temperature: float = 1.0, **filters: float) -> np.ndarray:
    """How often each token comes out of ``len(keys)`` draws from the same logits (V,)."""
    count = len(keys)
    wide = {"min_p": torch.float64, "top_k": torch.int64, "top_p": torch.float64}
    arguments = {name: torch.full((count,), value, dtype=wide[name]) for name, value in filters.items()}
    tokens = sampling.draw(
        logits.expand(count, -1),
        keys,
        torch.full((count,), temperature, dtype=torch.float64),
        **arguments,
        max_top_k=int(filters.get("top_k", 0)),
    )
    return np.bincount(tokens.numpy(), minlength=len(logits))


def kept_by(probabilities: np.ndarray, min_p: float = 0.0, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """The distribution after the filters, by sorting."""
    kept = np.where(probabilities >= min_p * probabilities.max(), probabilities, 0.0)
    if top_k:
        kept = np.where(kept >= np.sort(kept)[::-1][min(top_k, len(kept)) - 1], kept, 0.0)
    kept = kept / kept.sum()
    if top_p < 1.0:
        ordered = np.sort(kept)[::-1]
        last = ordered[np.searchsorted(np.cumsum(ordered), top_p)]
        kept = np.where(kept >= last, kept, 0.0)
    return kept / kept.sum()


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_frequencies_equal_the_probabilities(name: str, dtype: torch.dtype) -> None:
    logits = torch.tensor(np.log(PROBABILITIES), dtype=dtype)
    assert_fits(draw_many(logits, walk(name, 200_000)), PROBABILITIES)


@pytest.mark.parametrize(
    ("temperature", "filters"),
    [
        (0.5, {}),
        (2.0, {}),
        (1.0, {"min_p": 0.15}),
        (1.0, {"top_k": 3}),
        (1.0, {"top_p": 0.75}),
        (1.0, {"top_p": 0.45}),
        (0.7, {"top_k": 5, "top_p": 0.9}),
        (1.5, {"min_p": 0.1, "top_k": 6}),
        (1.3, {"min_p": 0.05, "top_k": 5, "top_p": 0.85}),
    ],
)
def test_frequencies_with_temperature_and_filters(temperature: float, filters: dict[str, float]) -> None:
    heated = PROBABILITIES ** (1 / temperature)
    expected = kept_by(heated / heated.sum(), **filters)  # type: ignore[arg-type]
    logits = torch.tensor(np.log(PROBABILITIES), dtype=torch.float32) + 3.25
    count = 4_000 if filters else 40_000  # selecting takes time per row
    assert_fits(draw_many(logits, walk("both", count), temperature, **filters), expected)


def test_frequencies_over_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6144, generator=generator) * 2
    probabilities = logits.double().softmax(0).numpy()
    order = np.argsort(probabilities)
    bins = np.empty(6144, dtype=np.int64)
    bins[order] = np.minimum((np.cumsum(probabilities[order]) * 40).astype(np.int64), 39)
    counts = draw_many(logits, walk("positions", 8000))
    assert_fits(np.bincount(bins, counts, 40), np.bincount(bins, probabilities, 40))


def test_consecutive_draws_are_independent() -> None:
    count = 200_000
    logits = torch.tensor(np.log(PROBABILITIES), dtype=torch.float32).expand(count, -1)
    tokens = sampling.draw(logits, walk("positions", count), torch.ones(count, dtype=torch.float64)).numpy()
    for lag in (1, 2, 64):
        pairs = np.bincount(tokens[:-lag] * 7 + tokens[lag:], minlength=49)
        assert_fits(pairs, np.outer(PROBABILITIES, PROBABILITIES))


# ---- the filters keep exactly the tokens that sorting keeps


def kept_tokens(logits: torch.Tensor, temperature: float, min_p: float, top_k: int, top_p: float) -> set[int]:
    """The tokens that ``draw`` can choose: each is made to win in turn by a noise that favours it without limit."""
    vocab_size = len(logits)
    eye = torch.full((vocab_size, vocab_size), 0.0, dtype=torch.float32)
    eye.fill_diagonal_(-1e30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "log_exponential", lambda keys, size: eye.clone())
        tokens = sampling.draw(
            logits.expand(vocab_size, -1),
            torch.zeros(vocab_size, dtype=torch.int64),
            torch.full((vocab_size,), temperature, dtype=torch.float64),
            torch.full((vocab_size,), min_p, dtype=torch.float64),
            torch.full((vocab_size,), top_k or vocab_size, dtype=torch.int64),
            torch.full((vocab_size,), top_p, dtype=torch.float64),
            max_top_k=top_k if top_k < vocab_size else 0,
        )
    return {token for token in range(vocab_size) if tokens[token] == token and logits[token] > -torch.inf}


def sorted_tokens(logits: torch.Tensor, temperature: float, min_p: float, top_k: int, top_p: float) -> set[int]:
    scaled = logits.double().numpy() / temperature
    weights = np.exp(scaled - scaled.max())
    kept = kept_by(weights / weights.sum(), min_p, top_k, top_p)
    # Tokens too unlikely for fp64 are judged by their logits: kept where nothing cuts, or where they tie with one kept.
    if top_p >= 1.0 and min_p == 0.0:
        last = np.sort(scaled)[::-1][min(top_k or len(scaled), len(scaled)) - 1]
        return {token for token in range(len(scaled)) if scaled[token] >= last and scaled[token] > -np.inf}
    return set(np.flatnonzero(kept).tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 40, 300])
@pytest.mark.parametrize("kind", ["normal", "ties", "huge", "masked", "flat"])
def test_filters_keep_what_sorting_keeps(dtype: torch.dtype, vocab_size: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    choices = np.random.default_rng(vocab_size)
    for _ in range(25):
        logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
        if kind == "ties":
            logits = (logits * 2).round()
        elif kind == "huge":
            logits *= 1e4
        elif kind == "masked":
            logits[torch.rand(vocab_size, generator=generator) < 0.5] = -torch.inf
            logits[0] = 1.0
        elif kind == "flat":
            logits *= 1e-3
        logits = logits.to(dtype)
        temperature = float(choices.choice([0.01, 0.5, 1.0, 2.0]))
        min_p = float(choices.choice([0.0, 0.0, 0.03, 0.7]))
        top_k = int(choices.choice([0, 0, 1, 2, 5, 39, 299, 1000]))
        top_p = float(choices.choice([1.0, 1.0, 1e-9, 0.1234, 0.5432, 0.98765]))
        got = kept_tokens(logits, temperature, min_p, min(top_k, vocab_size), top_p)
        assert got == sorted_tokens(logits, temperature, min_p, top_k, top_p), (temperature, min_p, top_k, top_p)


@pytest.mark.parametrize("name", ["plain", "min_p", "top_k", "top_p", "all"])
@pytest.mark.parametrize(("rows", "vocab_size"), [(1, 1), (3, 7), (5, 1001), (32, 6144), (2, 131072)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tokens_are_drawn_that_the_filters_keep(dtype: torch.dtype, rows: int, vocab_size: int, name: str) -> None:
    generator = torch.Generator().manual_seed(rows * vocab_size)
    logits = (torch.randn(rows, vocab_size, generator=generator) * 3).to(dtype)
    keys = sampling.row_keys(torch.tensor([sampling.seed_key(row) for row in range(rows)]), torch.arange(rows))
    temperature = torch.linspace(0.3, 1.5, rows, dtype=torch.float64)
    min_p, top_k, top_p = (value if name in (filter, "all") else off for filter, value, off in (
        ("min_p", 0.02, 0.0), ("top_k", min(50, vocab_size - 1), 0), ("top_p", 0.9, 1.0)))  # fmt: skip
    filters = (
        torch.full((rows,), min_p, dtype=torch.float64) if min_p else None,
        torch.full((rows,), top_k) if top_k else None,
        torch.full((rows,), top_p, dtype=torch.float64) if top_p < 1 else None,
    )
    tokens = sampling.draw(logits, keys, temperature, *filters, top_k)
    assert torch.equal(tokens, sampling.draw(logits, keys, temperature, *filters, top_k))
    for row, token in enumerate(tokens.tolist()):
        assert token in sorted_tokens(logits[row], temperature[row].item(), min_p, top_k, top_p)


def test_the_token_that_crosses_top_p_is_kept_and_so_are_its_ties() -> None:
    logits = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]).log()
    assert kept_tokens(logits, 1.0, 0.0, 0, 0.41) == {0, 1}
    assert kept_tokens(logits, 1.0, 0.0, 0, 0.69) == {0, 1}
    assert kept_tokens(logits, 1.0, 0.0, 0, 0.71) == {0, 1, 2, 3, 4}
    assert kept_tokens(logits, 1.0, 0.0, 0, 1e-6) == {0}


def test_top_p_acts_on_what_top_k_leaves() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept_tokens(logits, 1.0, 0.0, 0, 0.56) == {0, 1}
    assert kept_tokens(logits, 1.0, 0.0, 2, 0.56) == {0}  # 0.4 of 0.7 is 0.571


def test_top_k_keeps_ties_and_zero_has_one_sign() -> None:
    assert kept_tokens(torch.tensor([0.0, -0.0, 0.0, -1.0]), 1.0, 0.0, 1, 1.0) == {0, 1, 2}
    assert kept_tokens(torch.tensor([-0.0, 0.0, -1.0]), 1.0, 0.0, 0, 0.5) == {0, 1}


@pytest.mark.parametrize(("top_k", "max_top_k"), [(1, 1), (50, 50), (383, 383), (385, 385), (6143, 6143)])
def test_both_ways_to_the_kth_value_agree_with_sorting(top_k: int, max_top_k: int) -> None:
    distance = torch.rand(3, 6144, generator=torch.Generator().manual_seed(1)) * 9
    rows = torch.tensor([[top_k], [6144], [1]])
    got = sampling._kth_distance(distance, rows, max_top_k)
    assert got[:, 0].tolist() == [distance[0].sort().values[top_k - 1].item(), math.inf, distance[2].min().item()]


@pytest.mark.parametrize("vocab_size", [1, 7, 6144, 131072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_draws_the_same_alone_and_in_any_batch(vocab_size: int, dtype: torch.dtype) -> None:
    num_rows = 9
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(num_rows, vocab_size, generator=generator).to(dtype) * 3
    keys = make_keys(list(range(num_rows)), [50] * num_rows)
    temperature = torch.linspace(0.2, 2.0, num_rows, dtype=torch.float64)
    min_p = torch.tensor([0.0, 0.1, 0.0] * 3, dtype=torch.float64)
    top_k = torch.tensor([vocab_size, vocab_size, 5, 3000, vocab_size, 1, vocab_size, 2, 40]).clamp(max=vocab_size)
    top_p = torch.tensor([1.0, 0.5, 1.0, 0.9, 0.8, 1.0, 1.0, 0.99, 1.0], dtype=torch.float64)
    together = sampling.draw(logits, keys, temperature, min_p, top_k, top_p, min(3000, vocab_size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_BLOCK_ELEMENTS", 4 * vocab_size)
        assert torch.equal(
            sampling.draw(logits, keys, temperature, min_p, top_k, top_p, min(3000, vocab_size)), together
        )
    for row in range(num_rows):
        one = slice(row, row + 1)
        k, p, floor = int(top_k[row]), float(top_p[row]), float(min_p[row])
        alone = sampling.draw(
            logits[one],
            keys[one],
            temperature[one],
            min_p[one] if floor else None,
            top_k[one] if k < vocab_size else None,
            top_p[one] if p < 1.0 else None,
            k if k < vocab_size else 0,
        )
        assert alone.item() == together[row].item(), row


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_bad_row_stays_in_range_and_alone(poison: float, dtype: torch.dtype) -> None:
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(2)).to(dtype)
    keys = make_keys([1, 2, 3, 4, 5], [1] * 5)
    ones = torch.ones(5, dtype=torch.float64)
    arguments = (ones * 0.7, ones * 0.01, torch.full((5,), 20), ones * 0.9, 20)
    good = sampling.draw(logits, keys, *arguments)
    for position in (slice(None), slice(7, 8)):
        bad = logits.clone()
        bad[2, position] = poison
        tokens = sampling.draw(bad, keys, *arguments)
        assert ((tokens >= 0) & (tokens < 33)).all()
        assert torch.equal(tokens[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


def test_a_low_temperature_costs_no_precision() -> None:
    # Two logits near 1e4, 0.01 apart, at temperature 0.01: in fp32, 1e6 would round the difference away.
    logits = torch.tensor([10000.0, 9999.990234375], dtype=torch.float32)
    odds = math.exp(-0.009765625 / 0.01)
    expected = np.array([1.0, odds]) / (1.0 + odds)
    assert_fits(draw_many(logits, walk("seeds", 100_000), 0.01), expected)


# ---- penalties


def penalised(
    logits: np.ndarray, output: list[int], prompt: list[int], repetition: float, frequency: float, presence: float
) -> np.ndarray:
    result = logits.copy()
    for token in set(output) | set(prompt):
        result[token] = result[token] / repetition if result[token] > 0 else result[token] * repetition
    for token in set(output):
        result[token] -= frequency * output.count(token) + presence
    return result


def test_penalties_equal_the_definition() -> None:
    choices = np.random.default_rng(0)
    rows = []
    for _ in range(40):
        logits = choices.normal(size=23) * 5
        logits[choices.random(23) < 0.1] = -np.inf
        output, prompt = choices.integers(0, 23, 9).tolist(), choices.integers(0, 23, 4).tolist()
        rates = (choices.uniform(0.2, 3.0), choices.uniform(-2, 2), choices.uniform(-2, 2))
        rows.append((logits, output, prompt, *rates))
    logits = torch.tensor(np.stack([row[0] for row in rows]))
    counts = torch.tensor(np.stack([np.bincount(row[1], minlength=23) for row in rows]), dtype=torch.int32)
    mask = torch.tensor(np.stack([np.bincount(row[2], minlength=23) for row in rows])) > 0
    repetition, frequency, presence = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (3, 4, 5))
    sampling.apply_penalties_(logits, counts, frequency, presence, repetition, mask)
    expected = np.stack([penalised(*row) for row in rows])
    np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-12)


def test_penalties_that_are_off_change_no_bit() -> None:
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(5))
    changed = logits.clone()
    counts = torch.ones(2, 50, dtype=torch.int32)
    zeros, ones = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    sampling.apply_penalties_(changed, counts, zeros, zeros, ones, counts > 0)
    assert torch.equal(changed, logits)


@pytest.mark.parametrize("repetition", [1e-300, 1e-38, 1e38, 1e300])
def test_absurd_repetition_penalties_stay_finite(repetition: float) -> None:
    logits = torch.tensor([[3e38, -3e38, 0.0, 1e-30, -1e-30, -math.inf]])
    seen = torch.ones(1, 6, dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.float64)
    sampling.apply_penalties_(logits, seen, zero, zero, torch.tensor([repetition], dtype=torch.float64), seen > 0)
    assert torch.isfinite(logits[0, :5]).all()
    assert logits[0, 5] == -math.inf


# ---- ranking


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 7, 100, 6144])
def test_top_tokens_are_sorted_and_ties_go_to_the_lower_id(dtype: torch.dtype, vocab_size: int) -> None:
    values = (torch.randn(4, vocab_size, generator=torch.Generator().manual_seed(8)) * 4).round().to(dtype)
    values[0, ::3] = -math.inf
    values[1] = 0.0
    values[1, ::2] = -0.0
    for k in {1, min(5, vocab_size), max(1, vocab_size // 8), max(1, vocab_size - 1), vocab_size}:
        expected = [sorted(range(vocab_size), key=lambda token: (-row[token], token))[:k] for row in values.tolist()]
        assert sampling.top_tokens(values, k).tolist() == expected


def test_num_at_least_counts_ties() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 2.0, -math.inf], [5.0, 4.0, 3.0, 2.0, 1.0]])
    wanted = torch.tensor([[3.0, 2.0, -math.inf], [5.0, 1.0, 2.5]])
    assert sampling.num_at_least(values, wanted).tolist() == [[2, 3, 5], [1, 5, 3]]
    assert sampling.num_at_least(values, wanted[:, :1]).tolist() == [[2], [1]]
