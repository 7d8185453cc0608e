"""Answer a folder of files of requests on Ray Data: each actor holds an engine, and each file gets a file of results.

    python examples/ray_data_batch.py IN_FOLDER OUT_FOLDER [--model nemo-tiny] [--actors 2]

A file is taken if its results are not there yet, so that a run that was killed is started again with the same command.
Within a file ``nemo-engine batch`` goes on where it was: a file that was half done loses nothing. Needs ``pip install
'nemo-engine[ray,server]' 'ray[data]'``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray

from nemo_engine import Engine

HALF_DONE = ".part"  # the end of the name of results until all of a file's are there


class Answerer:
    """One engine for all files that its actor gets."""

    def __init__(self, model: str, engine: dict[str, Any]) -> None:
        self.engine = Engine(model, **engine)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """``batch``: the columns "source" and "target", a path a row. Returns the column "summary"."""
        return {"summary": [self.answer(Path(str(s)), Path(str(t))) for s, t in zip(batch["source"], batch["target"])]}

    def answer(self, source: Path, target: Path) -> str:
        """Results are in place when all of them are there; those of lines that failed, in a file beside them."""
        part = target.with_name(target.name + HALF_DONE)
        summary = self.engine.batch(source, part)
        errors = Path(f"{part}.errors")
        if errors.exists():
            errors.rename(f"{target}.errors")
        part.rename(target)
        Path(f"{part}.run").unlink()
        return f"{source.name}: {summary}"


def main() -> None:
    """Answer what has no results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", default="nemo-tiny")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    args.target.mkdir(parents=True, exist_ok=True)
    pairs = [(path.resolve(), args.target.resolve() / path.name) for path in sorted(args.source.glob("*.jsonl"))]
    left = []
    for source, target in pairs:
        if target.exists():
            Path(f"{target}{HALF_DONE}.run").unlink(missing_ok=True)  # of a run that was killed right after the file
        else:
            left.append({"source": str(source), "target": str(target)})
    print(f"{len(pairs)} files, {len(pairs) - len(left)} done before")
    if not left:
        return
    engine = {"device": args.device, "num_kv_pages": 400, "max_num_seqs": 8, "max_model_len": 1024}
    files = ray.data.from_items(left, override_num_blocks=len(left))
    answered = files.map_batches(
        Answerer, batch_size=1, concurrency=args.actors, num_gpus=0 if args.device == "cpu" else 1,
        fn_constructor_kwargs={"model": args.model, "engine": engine},
    )  # fmt: skip
    for row in answered.iter_rows():
        print(row["summary"], flush=True)


if __name__ == "__main__":
    main()
