"""The whole engine with random weights: milliseconds of a decode step by batch size, throughput of many requests, and the roofline of both.

A step must at least read every weight but the embeddings, and every key and value of its requests: that is the roofline of decoding,
over the copy bandwidth measured in the same run. For throughput the matrix operations of the prompts come on top.

    python benchmarks/bench_engine.py --json benchmarks/results/NAME.jsonl
    python benchmarks/bench_engine.py --option kv_cache_gib=40 --option enforce_eager=true
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_engine import Engine, SamplingParams
from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.benchmarks.timing import Ceilings, measure_ceilings, timer_for
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import RequestOutputKind

_COMMON = {
    "architectures": ["MistralForCausalLM"], "rope_theta": 1e6, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {  # contents of a config.json
    "nemo": {
        **_COMMON, "hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 14336, "vocab_size": 131072, "max_position_embeddings": 131072,
    },
    "tiny": {
        **_COMMON, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 128, "vocab_size": 512, "max_position_embeddings": 4096,
    },
}  # fmt: skip
_SETTLING_STEPS = 5  # after the last prefill, before decode steps are timed
Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Footprint:
    """What steps must read and compute."""

    weight_bytes: float  # read by every step: all weights but the embedding table, of which a step reads a few rows
    kv_bytes_per_token: float
    flops_per_token: float  # of the layers' matrix products, 2 per weight

    @classmethod
    def of(cls, engine: Engine) -> Footprint:
        """From the start-up ledger, so that it holds for every format of weights, keys and values."""
        config = engine.model_config
        num_bytes = {row.name: row.num_bytes for row in engine.ledger.rows}
        dtype = getattr(torch, config.dtype if engine.config.dtype == "auto" else engine.config.dtype)
        embeddings = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize
        kv_tokens = (engine.stats().num_pages + 1) * engine.config.page_size
        per_layer = config.hidden_size * (2 * config.q_size + 2 * config.kv_size + 3 * config.intermediate_size)
        return cls(
            num_bytes["make dummy weights"] - embeddings,
            num_bytes["allocate KV cache"] / kv_tokens,
            2.0 * config.num_layers * per_layer,
        )

    def decode_bytes(self, batch: int, context: float) -> float:
        """Bytes that a step reads in which ``batch`` requests of ``context`` tokens decode."""
        return self.weight_bytes + batch * context * self.kv_bytes_per_token

    def least_decode_seconds(self, batch: int, context: float, ceilings: Ceilings) -> float:
        """The least time of such a step."""
        return self.decode_bytes(batch, context) / ceilings.bytes_per_s

    def least_total_seconds(self, count: int, batch: int, num_in: int, num_out: int, ceilings: Ceilings) -> float:
        """The least time of ``count`` requests of which ``batch`` run at once: prompts, then steps of full batches."""
        prefill = count * num_in * self.flops_per_token / ceilings.bf16_flops_per_s
        steps = count * num_out / batch
        return prefill + steps * self.least_decode_seconds(batch, num_in + num_out / 2, ceilings)


class Workload:
    """Requests of random token ids that never end early; no two prompts share a page."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._rng = random.Random(0)
        self._count = 0
        self._open: list[str] = []

    def prompt(self, length: int) -> dict[str, list[int]]:
        """``length`` token ids."""
        return {"prompt_token_ids": self._rng.choices(range(3, self.engine.model_config.vocab_size), k=length)}

    def add(self, num_in: int, num_out: int) -> None:
        """Queue one request, whose output comes token by token."""
        self._open.append(f"bench-{self._count}")
        self._count += 1
        self.engine.add_request(self._open[-1], self.prompt(num_in), params(num_out, RequestOutputKind.DELTA))

    def abort_all(self) -> None:
        """End what ``add`` queued, and take what is still to come."""
        self.engine.abort(self._open)
        self._open.clear()
        while self.engine.has_unfinished_requests():
            self.engine.step()


def params(num_out: int, kind: RequestOutputKind) -> SamplingParams:
    """Greedy, of exactly ``num_out`` tokens, without text."""
    return SamplingParams(temperature=0.0, max_tokens=num_out, ignore_eos=True, detokenize=False, output_kind=kind)


def count_tokens(outputs: Sequence[RequestOutput]) -> int:
    """The tokens of ``outputs``. Raises ``RuntimeError`` if a request failed: its time would mean nothing."""
    completions = [completion for output in outputs for completion in output.outputs]
    for completion in completions:
        if completion.finish_reason == "error":
            raise RuntimeError(f"a request failed: {completion.error}")
    return sum(len(completion.token_ids) for completion in completions)


def decode_latency(workload: Workload, batch: int, context: int, steps: int) -> Record:
    """Times of ``steps`` steps in which ``batch`` requests decode; their contexts are ``context`` tokens, or a little more.

    The more they are, the longer the first ones decode while the last prompts are computed; the record has the true mean.
    """
    engine = workload.engine
    num_in = max(1, context - _SETTLING_STEPS - steps // 2)
    preemptions = engine.stats().total_preemptions
    for _ in range(batch):
        workload.add(num_in, steps + _SETTLING_STEPS + 2 * batch + 8)  # none ends before the last is measured
    started: set[str] = set()
    tokens_before, settled = 0, 0
    while settled < _SETTLING_STEPS:
        outputs = engine.step()
        settled += len(started) == batch
        tokens_before += count_tokens(outputs)
        started.update(output.request_id for output in outputs)
    times, tokens = [], 0
    for _ in range(steps):
        start = time.perf_counter()
        outputs = engine.step()
        times.append(time.perf_counter() - start)
        tokens += count_tokens(outputs)
    if tokens != batch * steps or engine.stats().total_preemptions != preemptions:
        raise RuntimeError(f"{steps} steps of {batch} requests gave {tokens} tokens: the KV cache does not hold them")
    return {
        "what": "decode", "batch": batch, "context": num_in + tokens_before / batch + steps / 2, "steps": steps,
        "ms_per_step": statistics.median(times) * 1e3, "mean_ms_per_step": statistics.fmean(times) * 1e3,
        "tokens_per_s": tokens / sum(times),
    }  # fmt: skip


def throughput(workload: Workload, count: int, num_in: int, num_out: int) -> Record:
    """Seconds of one ``generate`` of ``count`` requests, prompts included."""
    engine = workload.engine
    prompts = [workload.prompt(num_in) for _ in range(count)]
    preemptions = engine.stats().total_preemptions
    start = time.perf_counter()
    outputs = engine.generate(prompts, params(num_out, RequestOutputKind.FINAL_ONLY))
    seconds = time.perf_counter() - start
    tokens = count_tokens(outputs)
    assert tokens == count * num_out, (tokens, count, num_out)
    return {
        "what": "throughput", "requests": count, "input_tokens": num_in, "output_tokens": num_out, "seconds": seconds,
        "tokens_per_s": tokens / seconds, "total_tokens_per_s": count * (num_in + num_out) / seconds,
        "preemptions": engine.stats().total_preemptions - preemptions,
    }  # fmt: skip


def measure(engine: Engine, args: argparse.Namespace, ceilings: Ceilings) -> Iterator[Record]:
    """All measurements; each record has its roofline and the fraction of it that was reached, or an error."""
    footprint, workload = Footprint.of(engine), Workload(engine)
    for batch in args.batches:
        try:
            record = decode_latency(workload, batch, args.context, args.steps)
        except RuntimeError as error:
            yield {"what": "decode", "batch": batch, "error": str(error).splitlines()[0]}
            continue
        finally:
            workload.abort_all()
        least_ms = footprint.least_decode_seconds(batch, record["context"], ceilings) * 1e3
        yield record | {
            "gb_per_step": footprint.decode_bytes(batch, record["context"]) / 1e9, "roofline_ms": least_ms,
            "fraction": least_ms / record["ms_per_step"],
        }  # fmt: skip
    if args.requests:
        try:
            record = throughput(workload, args.requests, args.input_len, args.output_len)
        except RuntimeError as error:
            yield {"what": "throughput", "requests": args.requests, "error": str(error).splitlines()[0]}
            return
        held = engine.stats().num_pages * engine.config.page_size // (args.input_len + args.output_len)
        batch = max(1, min(args.requests, engine.config.max_num_seqs, held))
        least = footprint.least_total_seconds(args.requests, batch, args.input_len, args.output_len, ceilings)
        yield record | {"roofline_seconds": least, "fraction": least / record["seconds"]}


def parse_option(text: str) -> tuple[str, Any]:
    """``name=value`` of an engine option; a value that is not JSON is text."""
    name, found, value = text.partition("=")
    if not found:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", type=Path, help="a directory with a config.json; its weights are not read")
    model.add_argument("--config", choices=list(CONFIGS), default="nemo", help="a built-in configuration")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--context", type=int, default=1024, help="tokens of each decoding request, on average")
    parser.add_argument("--steps", type=int, default=50, help="timed decode steps of each batch size")
    parser.add_argument("--requests", type=int, default=256, help="requests of the throughput run, 0 for none")
    parser.add_argument("--input-len", type=int, default=1000)
    parser.add_argument("--output-len", type=int, default=1000)
    parser.add_argument("--option", type=parse_option, action="append", default=[], metavar="NAME=VALUE",
                        help="a field of EngineConfig; may be repeated")  # fmt: skip
    parser.add_argument("--json", type=Path, help="append a line per measurement")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run all measurements, print each, and append them to ``--json``. Returns 1 if any failed."""
    args = make_parser().parse_args(argv)
    name = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cpu":
        print("on a CPU: these times mean nothing for GPUs")
    ceilings = measure_ceilings(timer_for(device), device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine takes for its KV cache what is free
    with tempfile.TemporaryDirectory() as folder:
        path = args.model
        if path is None:
            path = Path(folder)
            (path / "config.json").write_text(json.dumps(CONFIGS[args.config]))
        options = {
            "load_format": "dummy", "skip_tokenizer_init": True, "dtype": "bfloat16", "device": name,
            "max_num_seqs": max([*args.batches, min(args.requests, 256), 1]), **dict(args.option),
        }  # fmt: skip
        facts = provenance("torch") | {
            "gpu": torch.cuda.get_device_name() if device.type == "cuda" else None,
            "copy_gb_per_s": ceilings.bytes_per_s / 1e9, "bf16_tflop_per_s": ceilings.bf16_flops_per_s / 1e12,
            "model": args.config if args.model is None else str(path), "options": options,
        }  # fmt: skip
        has_failed = False
        with Engine(path, **options) as engine:
            print(engine.ledger.format())
            print(f"copy {facts['copy_gb_per_s']:.0f} GB/s, bf16 products {facts['bf16_tflop_per_s']:.1f} TFLOP/s")
            for record in measure(engine, args, ceilings):
                has_failed |= "error" in record
                print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()))
                append_record(args.json, {"benchmark": "bench_engine", **record, **facts})
    return int(has_failed)


if __name__ == "__main__":
    sys.exit(main())
