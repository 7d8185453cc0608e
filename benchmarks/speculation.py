"""What speculation gains on the CPU by kind of text and number of streams: tokens a step and tokens a second, with and
without, in turns in one process.

The texts are of kinds that people have: an edit of a document that the prompt holds, code to be continued, a summary, a
chat, JSON by examples. What a model copies decides what is gained, so beside what the model itself writes there is
``copy``: a prompt that ends in the middle of its own repetition. The two engines must give the same number of tokens;
whether they give the same tokens is told, since logits of bf16 may differ in the last bits.

    python benchmarks/speculation.py --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from nemo_engine import Engine, SamplingParams
from nemo_engine.benchmarks.provenance import append_record, provenance

_STORY = (
    "Once upon a time there was a little girl named Lily. She had a red ball and a small dog called Max. One day Lily "
    "took the ball to the park, and Max ran behind her. A big boy wanted to play too. Lily gave him the ball, and the "
    "three of them played until the sun went down. Then Lily went home and told her mother about her new friend. "
)
_CODE = """def area(width, height):
    return width * height


def volume(width, height, depth):
    return area(width, height) * depth


def test_area():
    assert area(2, 3) == 6
    assert area(1, 1) == 1


def test_volume():
"""
_JSON = "".join(
    f'{{"id": {index}, "name": "user {index}", "email": "user{index}@example.com", "active": true}}\n'
    for index in range(6)
)
TEXTS = {
    "edit": f"{_STORY}\n\nThe same story, but the ball is blue:\n\nOnce upon a time there was a girl named Lily.",
    "code": _CODE,
    "summary": f"{_STORY}\n\nIn short:",
    "chat": "[INST] Hello! Can you tell me a story about a dog and a ball? [/INST]",
    "json": _JSON,
    "copy": f"{_STORY}{_STORY[:60]}",
}


def run(engine: Engine, text: str, streams: int, new_tokens: int) -> tuple[float, float, list[list[int]]]:
    """Tokens a second, tokens of a stream in a step that decodes, and the tokens."""
    first = engine.last_step_id
    # Streams begin apart, or all would be one prompt in the prefix cache.
    prompts = [f"{index}. {text}" for index in range(streams)]
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    start = time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    decodes = [step for step in engine.steps_since(first) if step.num_decodes and not step.num_prefills]
    a_step = sum(step.num_new_tokens for step in decodes) / max(1, sum(step.num_decodes for step in decodes))
    ids = [one.outputs[0].token_ids for one in outputs]
    assert all(len(one) == new_tokens for one in ids), "an answer is short"
    return streams * new_tokens / seconds, a_step, ids


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; ``--json`` appends one line per text and number of streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nemo-tiny")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drafts", type=int, default=7)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    facts = provenance("torch")
    config = {"method": "ngram", "num_speculative_tokens": args.drafts}
    print("text      streams  tokens/s without     with  ratio (rounds)           tokens a step  same tokens")
    with (
        Engine(args.model, device="cpu", enable_prefix_caching=False) as plain,
        Engine(args.model, device="cpu", enable_prefix_caching=False, speculative_config=config) as speculating,
    ):
        for engine in (plain, speculating):
            run(engine, _STORY, max(args.streams), 16)
        for streams in args.streams:
            for name in args.texts:
                rates: tuple[list[float], list[float]] = [], []
                for _ in range(args.rounds):
                    without, _, expected = run(plain, TEXTS[name], streams, args.new_tokens)
                    rate, a_step, got = run(speculating, TEXTS[name], streams, args.new_tokens)
                    rates[0].append(without)
                    rates[1].append(rate)
                ratios = [one / other for one, other in zip(rates[1], rates[0], strict=True)]
                is_same = sum(one == other for one, other in zip(expected, got, strict=True)) / streams
                told = " ".join(f"{ratio:.2f}" for ratio in ratios)
                print(
                    f"{name:10s}{streams:7d}{statistics.median(rates[0]):17.0f}{statistics.median(rates[1]):9.0f}"
                    f"  {statistics.median(ratios):.2f} ({told}){a_step:14.2f}{is_same:13.2f}",
                    flush=True,
                )
                record = {
                    "benchmark": "speculation", "model": Path(args.model).name, "text": name, "streams": streams,
                    "new_tokens": args.new_tokens, "speculative_config": config, "tokens_per_second": rates[1],
                    "tokens_per_second_without": rates[0], "tokens_per_step": a_step, "share_of_same_texts": is_same,
                    "versions": {"torch": facts["torch"]},
                }  # fmt: skip
                append_record(args.json, {**record, **{key: facts[key] for key in facts if key != "torch"}})


if __name__ == "__main__":
    main()
