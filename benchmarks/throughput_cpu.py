"""Offline throughput on one CPU: nemo_engine against transformers' ``generate()`` and ``generate_batch`` in one run.

The workload: prompts of mixed length cut from the standard library's sources, greedy, a fixed number of new tokens, the
end-of-sequence token ignored. The three engines take turns, round by round; medians and ratios over the rounds are
reported, with the least and the greatest. Whole calls are timed, prefill included. Needs the ``test`` extra (transformers).

    python benchmarks/throughput_cpu.py --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from nemo_engine import Engine, SamplingParams
from nemo_engine.benchmarks.provenance import append_record, provenance

TokenLists = list[list[int]]


def make_prompts(engine: Engine, count: int, shortest: int, longest: int) -> TokenLists:
    """``count`` prompts whose lengths are spread evenly over [shortest, longest] and shuffled by a fixed stride."""
    assert engine.tokenizer is not None
    stdlib = Path(os.__file__).parent
    text = "".join(
        (stdlib / name).read_text("utf-8") for name in ("argparse.py", "textwrap.py", "heapq.py", "shutil.py")
    )
    ids = engine.tokenizer.encode(text, bos=False)
    lengths = [shortest + (longest - shortest) * ((i * 7) % count) // max(1, count - 1) for i in range(count)]
    starts = [i * (len(ids) - longest) // count for i in range(count)]
    return [[1, *ids[start : start + length - 1]] for start, length in zip(starts, lengths)]


def run_ours(engine: Engine, prompts: TokenLists, new_tokens: int) -> TokenLists:
    """Our engine; token ids in, token ids out."""
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params)
    engine.reset_prefix_cache()  # the next round must not profit from this one
    return [output.outputs[0].token_ids for output in outputs]


def load_transformers(path: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The same checkpoint in transformers, with its fastest attention on a CPU."""
    from transformers import MistralForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    return MistralForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa").eval()


def run_generate(model: torch.nn.Module, prompts: TokenLists, new_tokens: int) -> TokenLists:
    """transformers ``generate()`` on one left-padded batch."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return out[:, longest:].tolist()


def run_generate_batch(model: torch.nn.Module, prompts: TokenLists, new_tokens: int) -> TokenLists:
    """transformers' own continuous batching, its cache sized for the workload."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    num_blocks = sum(-(-(len(p) + new_tokens) // 16) + 1 for p in prompts)
    batching = ContinuousBatchingConfig(
        block_size=16, num_blocks=num_blocks, max_batch_tokens=2048, max_requests_per_batch=len(prompts),
        use_cuda_graph=False, use_async_batching=False,
    )  # fmt: skip
    generation = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    out = model.generate_batch(inputs=prompts, generation_config=generation, continuous_batching_config=batching)
    return [
        list(result.generated_tokens) for _, result in sorted(out.items(), key=lambda item: int(item[0].split("_")[-1]))
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison and print a table; ``--json`` appends one line per engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nemo-tiny")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--shortest", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with Engine(args.model, dtype=args.dtype, device="cpu") as engine:
        prompts = make_prompts(engine, args.prompts, args.shortest, args.longest)
        model = load_transformers(engine.model_path, getattr(torch, args.dtype))
        runs: dict[str, Callable[[], TokenLists]] = {
            "nemo_engine": lambda: run_ours(engine, prompts, args.new_tokens),
            "transformers generate": lambda: run_generate(model, prompts, args.new_tokens),
            "transformers generate_batch": lambda: run_generate_batch(model, prompts, args.new_tokens),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        tokens: dict[str, TokenLists] = {}
        for round_index in range(args.rounds + 1):  # the first round warms up and is not counted
            for name, run in runs.items():
                start = time.perf_counter()
                tokens[name] = run()
                if round_index:
                    seconds[name].append(time.perf_counter() - start)
    total = args.prompts * args.new_tokens
    ours, baseline = seconds["nemo_engine"], tokens["nemo_engine"]
    print(
        f"{args.prompts} prompts of {args.shortest} to {args.longest} tokens, {args.new_tokens} new each, {args.dtype}"
    )
    for name, times in seconds.items():
        assert all(len(ids) == args.new_tokens for ids in tokens[name]), (
            f"{name} did not return {args.new_tokens} tokens"
        )
        ratios = [other / own for own, other in zip(ours, times)]
        equal = sum(a == b for a, b in zip(tokens[name], baseline))
        median = statistics.median(times)
        print(
            f"{name:28s} {total / median:8.0f} tokens/s  (median of {len(times)}: {median:.3f} s, {min(times):.3f} .. "
            f"{max(times):.3f})  ours/this {statistics.median(ratios):.2f}x ({min(ratios):.2f} .. {max(ratios):.2f})  "
            f"equal outputs {equal}/{args.prompts}"
        )
        append_record(args.json, {
            "benchmark": "throughput_cpu", "engine": name, "workload": {k: v for k, v in vars(args).items() if k != "json"},
            "seconds": times, "tokens_per_second": total / median, "speedup_of_nemo_engine": ratios,
            "equal_outputs": equal, "threads": torch.get_num_threads(), **provenance("torch", "transformers"),
        })  # fmt: skip


if __name__ == "__main__":
    main()
