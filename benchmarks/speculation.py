"""What speculation gains on the CPU by kind of text and number of streams: tokens a step and tokens a second, with and
without, in turns in one process; and with --vllm beside vLLM's, with and without its n-gram drafts, in the same rounds.

The texts are of kinds that people have: an edit of a document that the prompt holds, code to be continued, a summary, a
chat, JSON by examples. What a model copies decides what is gained, so beside what the model itself writes there is
``copy``: a prompt that ends in the middle of its own repetition. The two engines must give the same number of tokens;
whether they give the same tokens is told, since logits of bf16 may differ in the last bits.

    python benchmarks/speculation.py --vllm /path/to/python --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from nemo_engine import Engine, SamplingParams
from nemo_engine.benchmarks.common import resolve_model
from nemo_engine.benchmarks.peers import PeerProcess
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


OURS, VLLM = "nemo_engine", "vllm"
_VLLM_OPTIONS = {"enforce_eager": True, "max_model_len": 4096}
Run = Callable[[list[list[int]], int], tuple[float, list[list[int]]]]  # (seconds, tokens) of prompts and a length


class Ours:
    """An engine of this process."""

    def __init__(self, model: str, config: dict[str, Any] | None) -> None:
        self.engine = Engine(model, device="cpu", enable_prefix_caching=False, speculative_config=config)
        self.tokens_per_step = 1.0

    def run(self, prompts: list[list[int]], new_tokens: int) -> tuple[float, list[list[int]]]:
        """Seconds and tokens; then ``tokens_per_step`` is that of a stream in a step that decodes."""
        first = self.engine.last_step_id
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        outputs = self.engine.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        seconds = time.perf_counter() - start
        decodes = [step for step in self.engine.steps_since(first) if step.num_decodes and not step.num_prefills]
        num_rows = sum(step.num_decodes for step in decodes)
        self.tokens_per_step = sum(step.num_new_tokens for step in decodes) / max(1, num_rows)
        return seconds, [one.outputs[0].token_ids for one in outputs]


def _run_of(peer: PeerProcess) -> Run:
    return lambda prompts, new_tokens: peer.generate(prompts, [new_tokens] * len(prompts))


def measure(runs: dict[str, Run], prompts: list[list[int]], new_tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens a second of each of ``runs``, by round, which begins with another of them each time; and the tokens that
    came last.
    """
    rates: dict[str, list[float]] = {name: [] for name in runs}
    tokens: dict[str, list[list[int]]] = {}
    names = list(runs)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds, tokens[name] = runs[name](prompts, new_tokens)
            assert all(len(ids) == new_tokens for ids in tokens[name]), f"an answer of {name} is short"
            rates[name].append(len(prompts) * new_tokens / seconds)
    return {"rates": rates, "tokens": tokens}


def ratio(rates: dict[str, list[float]], name: str, other: str) -> float:
    """The median over rounds of ``name`` beside ``other``."""
    return statistics.median(one / two for one, two in zip(rates[name], rates[other], strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; ``--json`` appends one line per text and number of streams."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nemo-tiny")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--drafts", type=int, default=7)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--vllm", metavar="PYTHON", help="the Python that has vLLM")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    facts = provenance("torch")
    config = {"method": "ngram", "num_speculative_tokens": args.drafts}
    path = str(resolve_model(args.model)[0])
    with ExitStack() as stack:
        ours = {name: Ours(args.model, drafts) for name, drafts in ((OURS, None), (f"{OURS} drafting", config))}
        for one in ours.values():
            stack.enter_context(one.engine)
        runs: dict[str, Run] = {name: one.run for name, one in ours.items()}
        versions = {OURS: {"torch": facts.pop("torch")}}
        if args.vllm:
            drafts = config | {"prompt_lookup_min": 2, "prompt_lookup_max": 4}
            for name, options in ((VLLM, {}), (f"{VLLM} drafting", {"speculative_config": drafts})):
                peer = stack.enter_context(PeerProcess(VLLM, path, _VLLM_OPTIONS | options, args.vllm))
                runs[name], versions[VLLM] = _run_of(peer), peer.versions
        tokenizer = ours[OURS].engine.tokenizer
        for streams in args.streams:
            for name in args.texts:
                # Streams begin apart, or all would be one prompt in a prefix cache.
                prompts = [tokenizer.encode(f"{index}. {TEXTS[name]}") for index in range(streams)]
                for run in runs.values():
                    run(prompts, 8)
                measured = measure(runs, prompts, args.new_tokens, args.rounds)
                rates, tokens = measured["rates"], measured["tokens"]
                pairs = zip(tokens[OURS], tokens[f"{OURS} drafting"], strict=True)
                is_same = sum(one == other for one, other in pairs) / streams
                a_step = ours[f"{OURS} drafting"].tokens_per_step
                gains = {engine: ratio(rates, f"{engine} drafting", engine) for engine in versions}
                told = "  ".join(
                    f"{engine} {statistics.median(rates[engine]):.0f} to "
                    f"{statistics.median(rates[f'{engine} drafting']):.0f} tokens/s ({gain:.2f})"
                    for engine, gain in gains.items()
                )
                print(f"{name:8s} {streams:3d}: {told}  {a_step:.2f} tokens a step, {is_same:.2f} the same", flush=True)
                record = {
                    "benchmark": "speculation", "model": Path(args.model).name, "text": name, "streams": streams,
                    "prompt_tokens": len(prompts[0]), "new_tokens": args.new_tokens, "speculative_config": config,
                    "tokens_per_second": rates, "drafting_beside_not": gains, "tokens_per_step": a_step,
                    "share_of_same_texts": is_same, "versions": versions,
                }  # fmt: skip
                append_record(args.json, record | facts)


if __name__ == "__main__":
    main()
