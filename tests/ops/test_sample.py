"""``sample_`` and ``top_logprobs``: the definitions on rows that are easy to get wrong, and the Triton kernels against
them, token for token.

Tests marked ``interpreted`` join when ``TRITON_INTERPRET=1`` is set before the interpreter starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.ops import sampling
from nemo_engine.ops.op import Case, Impl, compiled_for_cpu
from nemo_engine.ops.sample import SAMPLE, TOP_LOGPROBS, SampleFacts, SlotParams, sample_, sample_inputs, top_logprobs
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE
from tests.emulation.library import Watch, emulated, watched
from tests.helpers.lanes import has_lanes
from tests.ops.test_ops import site

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float32)


def hard_logits(kind: str, rows: int, vocab_size: int, generator: torch.Generator) -> Tensor:
    """(R, V) fp32."""
    logits = torch.randn(rows, vocab_size, generator=generator) * 3
    if kind == "equal":
        logits.fill_(-1.5)
    elif kind == "few levels":
        logits = logits.round()
    elif kind == "close":
        logits = 7 + logits * 1e-3
    elif kind == "masked":
        logits[torch.rand(rows, vocab_size, generator=generator) < 0.9] = -torch.inf
        logits[:, vocab_size // 2] = 0.5
    elif kind == "peaked":
        logits[:, vocab_size // 3] = 60.0
    elif kind == "one token":
        logits.fill_(-torch.inf)
        logits[:, vocab_size - 1] = -3.0
    elif kind == "broken":
        logits[0::4, vocab_size // 2] = torch.nan
        logits[1::4, vocab_size - 1] = torch.inf
        logits[2::4] = -torch.inf
    return logits


KINDS = ("normal", "equal", "few levels", "close", "masked", "peaked", "one token", "broken")


def hard_inputs(dtype: torch.dtype, kind: str, rows: int, vocab_size: int, seed: int = 1) -> tuple[Any, ...]:
    """Every row with parameters of its own, taken at random from those at the edges; the last two rows are padding."""
    generator = torch.Generator().manual_seed(seed)
    logits = hard_logits(kind, rows, vocab_size, generator).to(dtype)
    params = SlotParams.off(rows, vocab_size, CPU)
    params.output_counts.copy_(torch.randint(0, 4, params.output_counts.shape, generator=generator))
    params.prompt_mask.copy_(torch.rand(params.prompt_mask.shape, generator=generator) < 0.3)
    slots = 1 + torch.randperm(rows, generator=generator)
    slots[-2:] = 0

    def put(name: str, *choices: float) -> None:
        values = getattr(params, name)
        picked = torch.tensor(choices, dtype=torch.float64)[torch.randint(len(choices), (rows,), generator=generator)]
        values[1:] = picked.to(values.dtype)

    put("temperature", 0.0, 0.01, 0.6, 1.0, 5.0)
    put("min_p", 0.0, 0.0, 0.0, 1e-4, 0.05, 1.0)
    put("top_k", *(min(k, vocab_size) for k in (vocab_size, vocab_size, 1, 5, 40, 700, max(1, vocab_size - 1))))
    put("top_p", 1.0, 1e-6, 0.5, 0.9, 0.999999)
    put("frequency", 0.0, 0.0, 0.7, -1.1)
    put("presence", 0.0, 0.0, 1.3, -0.4)
    put("repetition", 1.0, 1.0, 1.7, 0.6)
    params.seed_keys[1:] = torch.tensor([sampling.seed_key(seed + slot) for slot in range(1, rows + 1)])
    return logits, slots, torch.randint(0, 1 << 20, (rows,), generator=generator), params


def hard_cases() -> list[Case]:
    shapes = ((6, 1), (10, 7), (16, 1001), (8, 6144))
    return [
        Case(f"{kind} {rows}x{size}", partial(hard_inputs, kind=kind, rows=rows, vocab_size=size))
        for kind in KINDS
        for rows, size in shapes
    ]


def copied(params: SlotParams, device: str = "cpu") -> SlotParams:
    return SlotParams(
        **{field.name: getattr(params, field.name).clone().to(device) for field in dataclasses.fields(params)}
    )


def assert_same(function: Callable[..., Tensor], args: tuple[Any, ...]) -> None:
    """The same tokens and the same counts as the definition's."""
    logits, slots, positions, params = args
    other, before = copied(params), logits.clone()
    expected = sample_(logits, slots, positions, params)
    got = function(logits, slots, positions, other)
    assert got.dtype == torch.int64 and got.tolist() == expected.tolist()
    assert torch.equal(other.output_counts, params.output_counts)
    assert torch.equal(logits.isnan(), before.isnan()) and torch.equal(logits.nan_to_num(), before.nan_to_num())


# ---- the definition


@pytest.mark.parametrize("case", hard_cases(), ids=lambda case: case.name)
def test_rows_do_not_mix(case: Case) -> None:
    logits, slots, positions, params = case.make(torch.float32)
    alone = copied(params)
    tokens = sample_(logits, slots, positions, params)
    for row in range(len(logits)):
        one = slice(row, row + 1)
        assert sample_(logits[one], slots[one], positions[one], alone).tolist() == tokens[one].tolist(), row
    assert torch.equal(alone.output_counts, params.output_counts)


def test_failed_rows_have_codes_and_are_not_counted() -> None:
    logits, slots, positions, params = hard_inputs(torch.float32, "broken", 24, 50)
    before = params.output_counts.clone()
    tokens = sample_(logits, slots, positions, params)
    codes = [TOKEN_NOT_FINITE, TOKEN_NOT_FINITE, TOKEN_ALL_MASKED]
    assert [token for row, token in enumerate(tokens.tolist()) if row % 4 < 3] == codes * 6
    assert (tokens[3::4] >= 0).all()
    penalised = SampleFacts.of(slots, params, 50).penalised
    assert 0 < (params.output_counts - before).sum() == (tokens[penalised] >= 0).sum() < len(penalised)


def test_greedy_takes_the_lowest_of_equal_tokens_and_padding_is_greedy() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 3)
    params = SlotParams.off(1, 4, CPU)
    params.presence[1] = 0.5
    params.output_counts[1] = torch.tensor([0, 3, 0, 0])
    params.prompt_mask.zero_()
    assert sample_(logits, torch.tensor([0, 1, 0]), torch.tensor([5, 6, 7]), params).tolist() == [1, 2, 1]
    assert params.output_counts[1].tolist() == [0, 3, 1, 0]


@pytest.mark.parametrize("name", ["greedy", "plain", "all", "penalties"])
def test_facts_only_save_work(name: str) -> None:
    logits, slots, positions, params = sample_inputs(9, 300, name, torch.float32)
    drawn = params.temperature[slots] > 0
    facts = SampleFacts(drawn.nonzero().squeeze(1), int(drawn.sum()), True, 299, True, torch.arange(9), True)
    params.output_counts[0], params.prompt_mask[0] = 0, False
    params.output_counts[slots[params.temperature[slots] == 0]] *= name != "greedy"
    other = copied(params)
    assert torch.equal(sample_(logits, slots, positions, params, facts), sample_(logits, slots, positions, other))


def test_top_logprobs_of_failed_and_chosen_tokens() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [0.0, -torch.inf, -torch.inf, -torch.inf]])
    ids, logprobs, ranks = top_logprobs(logits, torch.tensor([3, TOKEN_ALL_MASKED]), 3)
    assert ids.tolist() == [[3, 1, 2, 3], [0, 0, 1, 2]]
    assert ranks.tolist() == [[3, 1, 2, 3], [1, 1, 2, 3]]
    assert torch.equal(logprobs[0], logits[0].log_softmax(0)[ids[0]])
    assert logprobs[1].tolist() == [0.0, 0.0, -torch.inf, -torch.inf]


# ---- the kernels


@pytest.fixture(
    params=[
        pytest.param("triton", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.emulated),
        *["cpu 4", "cpu 8", "cpu 16"],
    ]
)
def kernel(request: pytest.FixtureRequest) -> Iterator[Callable[..., Tensor]]:
    """An implementation for GPUs, as it runs here, or that for CPUs, with vectors of so many numbers."""
    name, _, lanes = request.param.partition(" ")
    impl = next(impl for impl in SAMPLE.impls if impl.name == name)
    if name == "triton":
        yield impl.load()
        return
    if name == "cpu":
        compiled, widest = compiled_for_cpu(), next((n for n in (16, 8, 4) if has_lanes(n)), 0)
        if not widest or not has_lanes(int(lanes)):
            pytest.skip("csrc/cpu was not built, or this machine has no such vectors")
        yield impl.load()
        compiled.set_lanes(widest)  # type: ignore[union-attr]
        return
    library = request.getfixturevalue("emulated_library")
    with emulated(library):
        yield watched(library, SAMPLE, impl.load())


@pytest.mark.parametrize("case", hard_cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_rows(kernel: Callable[..., Tensor], dtype: torch.dtype, case: Case) -> None:
    assert_same(kernel, case.make(dtype))


@pytest.mark.parametrize("vocab_size", [131072, 131073 + 127])
def test_large_vocabularies(kernel: Callable[..., Tensor], vocab_size: int) -> None:
    """The second one has sub-blocks of 256 tokens. top_k = 2000 is more than there are sub-blocks."""
    logits, slots, positions, params = sample_inputs(4, vocab_size, "all", torch.float32)
    active = slots[:3]
    params.temperature[active] = torch.tensor([5.0, 0.7, 1.0], dtype=torch.float64)
    params.min_p[active] = torch.tensor([0.0, 1e-9, 0.0], dtype=torch.float64)
    params.top_k[active] = torch.tensor([vocab_size, 2000, vocab_size])
    params.top_p[active] = torch.tensor([0.999, 1.0, 0.3], dtype=torch.float64)
    assert_same(kernel, (logits, slots, positions, params))


def wide_inputs(kind: str, vocab_size: int, **cuts: float) -> tuple[Any, ...]:
    """One row whose nucleus is wide, at temperature 1, of the logits of ``kind``."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randn(1, vocab_size, generator=generator)
    if kind == "zipf 1.2":
        logits = -1.2 * torch.arange(1, vocab_size + 1).log()[torch.randperm(vocab_size, generator=generator)][None]
    else:  # the others have more tokens in one bucket of a histogram than can be kept
        logits *= {"normal": 2.2, "close": 1e-6, "two levels": 0.0}[kind]
        logits += (torch.rand(1, vocab_size, generator=generator) < 0.5) * (0.25 if kind == "two levels" else 0.0)
    params = SlotParams.off(1, vocab_size, CPU)
    params.temperature[1], params.seed_keys[1] = 1.0, sampling.seed_key(7)
    for name, value in cuts.items():
        getattr(params, name)[1] = value
    return logits, torch.tensor([1]), torch.tensor([11]), params


@contextlib.contextmanager
def reads_of(logits: Tensor, library: Any) -> Iterator[list[int]]:
    """How many bytes of ``logits`` kernels read inside, in the emulation or in Triton's interpreter."""
    read = [0]
    if library is not None:
        with Watch(library, [], []) as watch:
            watch.allow(logits, False)
            yield read
            read[0] = library.emulator.bytes_read(logits.data_ptr())
        return
    from triton.runtime.interpreter import InterpreterBuilder

    load, begin = InterpreterBuilder.create_masked_load, logits.data_ptr()

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        is_inside = (ptrs.data >= begin) & (ptrs.data < begin + logits.nbytes) & mask.data
        read[0] += int(is_inside.sum()) * logits.itemsize
        return load(self, ptrs, mask, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", create_masked_load)
        yield read


@pytest.mark.parametrize(
    "name", [pytest.param("triton", marks=pytest.mark.interpreted), pytest.param("cuda", marks=pytest.mark.emulated)]
)
@pytest.mark.parametrize(
    ("kind", "cuts", "most"),
    [
        ("zipf 1.2", {"top_p": 0.95}, 3),
        ("normal", {"top_p": 0.95}, 3),
        ("normal", {"top_k": 60000}, 3),
        ("normal", {"top_k": 60000, "top_p": 0.95}, 3),
        ("close", {"top_k": 60000, "top_p": 0.95}, 10),
        ("two levels", {"top_k": 50000, "top_p": 0.5}, 10),
    ],
)  # fmt: skip
def test_passes_over_the_logits_of_wide_nuclei(
    request: pytest.FixtureRequest, name: str, kind: str, cuts: dict[str, float], most: int
) -> None:
    """A survey and two looks, or one in Triton, which writes down what it finds; some more of what was made to be hard.

    The same token as the definition's, whatever the order.
    """
    impl = next(impl for impl in SAMPLE.impls if impl.name == name)
    library = request.getfixturevalue("emulated_library") if name == "cuda" else None
    logits, slots, positions, params = wide_inputs(kind, 65536, **cuts)
    expected = sample_(logits, slots, positions, copied(params))
    with emulated(library) if library else contextlib.nullcontext():
        with reads_of(logits, library) as read:
            if library is not None:
                for tensor in (slots, positions, *(getattr(params, f.name) for f in dataclasses.fields(params))):
                    library.emulator.allow(tensor.data_ptr(), tensor.nbytes)
            got = impl.load()(logits, slots, positions, params)
    assert got.tolist() == expected.tolist()
    assert 1 < read[0] / logits.nbytes <= (2 if name == "triton" else most)


@pytest.mark.interpreted
def test_rows_share_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_engine.kernels import logprobs as logprob_kernels
    from nemo_engine.kernels import sampling as sample_kernels

    monkeypatch.setattr(sample_kernels, "MOST_PROGRAMS", 3)
    monkeypatch.setattr(logprob_kernels, "MOST_PROGRAMS", 3)
    assert_same(sample_kernels.sample_, hard_inputs(torch.float16, "few levels", 11, 1001))
    assert_same_logprobs(torch.randn(8, 500), torch.arange(8), 9)


def assert_same_logprobs(logits: Tensor, chosen: Tensor, k: int, device: str = "cpu") -> None:
    """The same ids and ranks as the definition's; where a row has no distribution, ids that exist."""
    expected = top_logprobs(logits, chosen, k)
    got = [tensor.cpu() for tensor in TOP_LOGPROBS.impls[0].load()(logits.to(device), chosen.to(device), k)]
    best = logits.float().amax(dim=1)
    is_good = best.isfinite()
    for index in (0, 2):
        assert torch.equal(got[index][is_good], expected[index][is_good])
    # In fp64: the definition's own sum of many fp32 numbers may be further off, by the order in which a CPU adds them.
    exact = top_logprobs(logits.double(), chosen, k)[1].to(got[1].dtype)
    torch.testing.assert_close(got[1][is_good], exact[is_good], rtol=1e-6, atol=1e-5)
    assert got[1][~is_good].isnan().all() and ((got[0] >= 0) & (got[0] < logits.shape[1])).all()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab_size", [1, 7, 1001, 6144])
def test_top_logprobs(vocab_size: int, kind: str, dtype: torch.dtype) -> None:
    """Logits of few bits only where they are close: where log-probabilities round to the same number hangs on the last
    bit of their sum.
    """
    dtype = torch.bfloat16 if kind == "close" else dtype
    generator = torch.Generator().manual_seed(vocab_size)
    logits = hard_logits(kind, 4, vocab_size, generator).to(dtype)
    chosen = torch.randint(-2, vocab_size, (4,), generator=generator)
    for k in sorted({0, 1, min(5, vocab_size), min(64, vocab_size)}):
        assert_same_logprobs(logits, chosen, k)


@pytest.mark.interpreted
def test_top_logprobs_of_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(2, 131072, generator=generator) * 3).to(torch.bfloat16)
    assert_same_logprobs(logits, torch.tensor([17, 131071]), 20)


@pytest.mark.gpu
def test_noise_has_the_same_bits_on_a_gpu() -> None:
    seeds = [0, 1, 2, 12345, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1]
    keys = sampling.row_keys(torch.tensor([sampling.seed_key(seed) for seed in seeds]), torch.arange(len(seeds)))
    assert torch.equal(sampling.noise_bits(keys.cuda(), 131072).cpu(), sampling.noise_bits(keys, 131072))
    assert torch.equal(sampling.row_keys(keys.cuda(), keys.cuda()).cpu(), sampling.row_keys(keys, keys))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", SAMPLE.impls, ids=lambda impl: impl.name)
def test_kernels_on_a_gpu(impl: Impl) -> None:
    """A GPU's exponentials and logarithms end in other bits, so that in one row of thousands another token may win."""
    if reason := impl.supports(site(torch.bfloat16, "cuda")):
        pytest.skip(reason)
    function, same, total = impl.load(), 0, 0
    for case in [*SAMPLE.cases(), *hard_cases()]:
        logits, slots, positions, params = case.make(torch.bfloat16)
        there = copied(params, "cuda")
        expected = sample_(logits, slots, positions, params)
        got = function(logits.cuda(), slots.cuda(), positions.cuda(), there).cpu()
        same, total = same + int((got == expected).sum()), total + len(got)
        if torch.equal(got, expected):
            assert torch.equal(there.output_counts.cpu(), params.output_counts), case.name
    assert total - same <= 2, (same, total)
    for case in TOP_LOGPROBS.cases():
        assert_same_logprobs(*case.make(torch.bfloat16), device="cuda")
