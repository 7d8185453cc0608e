"""The engine says where [TOOL_CALLS] stood: in deltas, cumulative and final outputs alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from nemo_engine import Engine, SamplingParams
from nemo_engine.outputs import CompletionOutput
from nemo_engine.sampling_params import RequestOutputKind
from nemo_engine.text import AnswerParser, parse_answer
from nemo_engine.text.tool_calls import merge_events

CALLS = 9  # [TOOL_CALLS]
HALF = 1226  # the first byte of é's two, in nemo-tiny
ALLOWED = [CALLS, 1097, 1098, HALF]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("nemo-tiny", device="cpu", num_kv_pages=64, max_model_len=512) as engine:
        yield engine


def params(seed: int, shows: bool, stop: list[str], **more: object) -> SamplingParams:
    """Short answers out of "a", "b", half a character and [TOOL_CALLS]."""
    return SamplingParams(
        temperature=2.0,
        seed=seed,
        max_tokens=12,
        allowed_token_ids=ALLOWED,
        logit_bias={CALLS: 15.0, HALF: 11.0},  # made about as likely as the letters
        ignore_eos=True,
        skip_special_tokens=not shows,
        stop=stop,
        **more,  # type: ignore[arg-type]
    )


def expected_start(engine: Engine, output: CompletionOutput, shows: bool) -> int | None:
    assert engine.tokenizer is not None
    if CALLS not in output.token_ids:
        return None
    before = output.token_ids[: output.token_ids.index(CALLS)]
    start = len(engine.tokenizer.decode(before, skip_special_tokens=not shows))
    return start if start <= len(output.text) else None  # a stop string cut the text in front of it


@pytest.mark.parametrize("shows", [False, True])
@pytest.mark.parametrize("stop", [[], ["ba"], ["zzz"]])
def test_deltas_cumulative_and_final_agree(engine: Engine, shows: bool, stop: list[str]) -> None:
    many = [params(seed, shows, stop) for seed in range(12)]
    finals = [output.outputs[0] for output in engine.generate(["x"] * 12, many)]
    starts = [final.tool_calls_start for final in finals]
    assert starts == [expected_start(engine, final, shows) for final in finals]
    assert len({start for start in starts if start is not None}) > 2
    parsers = [AnswerParser(seed=0, shows_special=shows) for _ in many]
    events = [[] for _ in many]
    texts = [""] * 12
    for output in engine.stream(["x"] * 12, many):
        index = int(output.request_id)
        for one in output.outputs:
            texts[index] += one.text
            assert one.tool_calls_start in (None, starts[index])
            events[index] += parsers[index].feed(one.text, one.tool_calls_start)
            if output.finished:
                assert one.tool_calls_start == starts[index]
    assert texts == [final.text for final in finals]
    for index, final in enumerate(finals):
        content, calls = merge_events(events[index] + parsers[index].finish())
        assert (content, calls) == parse_answer(final.text, final.tool_calls_start, seed=0, shows_special=shows)
    for index, one_params in enumerate(many):
        cumulative = dataclasses.replace(one_params, output_kind=RequestOutputKind.CUMULATIVE)
        engine.add_request(str(index), "x", cumulative)
    while engine.has_unfinished_requests():
        for output in engine.step():
            start = starts[int(output.request_id)]
            for one in output.outputs:
                assert one.tool_calls_start in (None, start)
                assert one.tool_calls_start is not None or start is None or len(one.text) <= start
                assert not output.finished or one.tool_calls_start == start


def test_no_text_no_place(engine: Engine) -> None:
    (output,) = engine.generate("x", params(0, False, [], detokenize=False))
    assert CALLS in output.outputs[0].token_ids and output.outputs[0].tool_calls_start is None


def test_the_system_text_first_stays_cached(engine: Engine) -> None:
    """A turn finds all full pages of the turn before; by the format's own rule it finds only those before the system
    text.
    """
    system = {"role": "system", "content": "You explain Python's standard library. " * 20}
    first = [system, {"role": "user", "content": "What does os.path.join do?"}]
    second = [*first, {"role": "assistant", "content": "It joins paths."}, {"role": "user", "content": "And split?"}]
    cached = {}
    for placement in ("last", "first"):
        engine.reset_prefix_cache()
        outputs = [
            engine.chat(turn, SamplingParams(max_tokens=1), system_placement=placement)[0] for turn in (first, second)
        ]
        cached[placement] = outputs[1].num_cached_tokens
        assert len(outputs[0].prompt_token_ids) > 128
    assert cached["last"] == 0 and cached["first"] >= 128
