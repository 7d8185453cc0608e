"""Host cost of structured outputs: microseconds of a mask and of a token's acceptance, at NeMo's vocabulary, without a
model.

Each form is walked along one of its texts, as the tokenizer writes it. ``first`` is the first compilation, for json,
regex and choice in this process and for grammar in a process of its own before. The last rows are the upload and the
masking of logits, on the CPU.

    python benchmarks/structured.py --tokenizer tekken.json --json benchmarks/results/NAME.jsonl
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.runner.logit_edits import apply_masks_, mask_table
from nemo_engine.structured_outputs import StructuredOutputsParams
from nemo_engine.text import load_tokenizer
from nemo_engine.text.grammar import GrammarCompiler

_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {
            "type": "object",
            "properties": {"street": {"type": "string"}, "city": {"type": "string"}},
            "required": ["city"],
        },
    },
    "required": ["name", "age", "address"],
}
_TEXT = (
    '{"name": "Ada Lovelace", "age": 36, "tags": ["mathematics", "the analytical engine"], "address": {"city": '
    '"London"}}'
)
FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "json schema": ({"json": _PERSON}, _TEXT),
    "json object": ({"json_object": True}, _TEXT),
    "regex": ({"regex": r"\d{4}-\d{2}-\d{2}T[a-z ]+"}, "2026-10-01Tsome more words in lower case letters"),
    "choice of 1000": ({"choice": [f"option {index}" for index in range(1000)]}, "option 723"),
    "grammar": (
        {"grammar": 'start: item ("," item)*\nitem: /[a-z]+/ "=" /[0-9]+/'},
        "one=1,two=22,three=333,four=4444",
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Print a table; ``--json`` appends one line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(args.tokenizer)
    assert tokenizer is not None
    vocab_size = tokenizer.vocab_size
    start = time.perf_counter()
    compiler = GrammarCompiler(tokenizer, vocab_size, [tokenizer.eos_id])
    compiler.compile(StructuredOutputsParams(choice=["a"]))
    loading = time.perf_counter() - start
    facts = {**provenance("llguidance", "torch"), "vocab_size": vocab_size, "load_s": loading}
    print(
        f"vocabulary of {vocab_size}, loaded in {loading:.2f} s\nform             first ms  mask us: median  p99  "
        "accept us"
    )
    records: list[dict[str, Any]] = []
    for name, (form, text) in FORMS.items():
        start = time.perf_counter()
        compiler.compile(StructuredOutputsParams(**form))
        first = (time.perf_counter() - start) * 1e3
        masks, accepts = [], []
        for _ in range(args.rounds):
            grammar = compiler.compile(StructuredOutputsParams(**form))
            for token_id in tokenizer.encode(text, bos=False):
                start = time.perf_counter()
                mask = grammar.mask()
                middle = time.perf_counter()
                assert mask[token_id // 8] >> token_id % 8 & 1, (name, token_id)
                begin = time.perf_counter()
                grammar.accept(token_id)
                accepts.append((time.perf_counter() - begin) * 1e6)
                masks.append((middle - start) * 1e6)
        masks.sort()
        median, p99, accept = statistics.median(masks), masks[len(masks) * 99 // 100], statistics.median(accepts)
        print(f"{name:16s} {first:8.1f} {median:15.1f} {p99:4.0f} {accept:10.1f}")
        records.append({"form": name, "first_ms": first, "mask_us": median, "mask_p99_us": p99, "accept_us": accept})
    print("rows  mask logits us, median")
    table = mask_table(torch.device("cpu"))
    for rows in args.rows:
        logits, masks_of = torch.zeros(rows, vocab_size), [mask] * rows
        times = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            apply_masks_(logits, range(rows), masks_of, table)
            times.append((time.perf_counter() - start) * 1e6)
        print(f"{rows:4d} {statistics.median(times):10.0f}")
        records.append({"rows": rows, "apply_us": statistics.median(times)})
    for record in records:
        append_record(args.json, {"benchmark": "structured", **record, **facts})


if __name__ == "__main__":
    main()
