"""Random models, engines and requests against the reference: python tests/fuzz/run.py --minutes 60, or one case again
by its seed.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch  # noqa: E402
from fuzz.cases import EngineCase, engine_case  # noqa: E402
from fuzz.checks import Wrong  # noqa: E402
from fuzz.play import play  # noqa: E402

ENGINES = 3  # per model


def cases_of(seed: int, number: int | None = None, only: list[int] | None = None) -> list[EngineCase]:
    """The engines of ``seed``, or the ``number``-th alone, with all of its requests or ``only`` these."""
    cases = [engine_case(seed, one) for one in (range(ENGINES) if number is None else [number])]
    for case in cases:
        case.requests = [one for one in case.requests if only is None or one.index in only]
    return cases


def failure(seed: int, number: int, only: list[int] | None = None) -> BaseException | None:
    """What goes wrong with one engine, None if nothing does."""
    try:
        play(cases_of(seed, number, only))
    except Exception as error:
        return error
    return None


def shrunk(seed: int, number: int) -> tuple[list[int], BaseException | None]:
    """The requests that it takes, and how it fails with these alone."""
    only = [one.index for one in engine_case(seed, number).requests]
    found = failure(seed, number, only)
    for index in list(only):
        rest = [one for one in only if one != index]
        error = failure(seed, number, rest) if rest else None
        if error is not None:
            only, found = rest, error
    return only, found


def described(error: BaseException) -> str:
    """What went wrong, with a trace where it was not the reference that noticed."""
    return f"{error}" if isinstance(error, Wrong) else "".join(traceback.format_exception(error))


def try_seed(seed: int) -> Counter[str]:
    """Play all engines of ``seed``; an ``AssertionError`` has the shortest case found and the command that repeats
    it.
    """
    counts: Counter[str] = Counter()
    for number in range(ENGINES):
        try:
            counts.update(play(cases_of(seed, number)))
        except Exception as whole:
            only, error = shrunk(seed, number)
            what = described(whole if error is None else error)
            command = f"python tests/fuzz/run.py --seed {seed} --engine {number} --requests {','.join(map(str, only))}"
            raise AssertionError(f"{what}\nagain: {command}") from None
    counts["models"] = 1
    return counts


def prepare() -> None:
    """One thread, no log, and what is loaded already is not looked at by the garbage collector again."""
    torch.set_num_threads(1)
    logging.getLogger("nemo_engine").setLevel(logging.CRITICAL + 1)
    gc.collect()
    gc.freeze()


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="the first, or with --engine the only one [by the clock]")
    parser.add_argument("--count", type=int, help="how many seeds, instead of --minutes")
    parser.add_argument("--engine", type=int)
    parser.add_argument("--requests")
    parser.add_argument("--keep-going", action="store_true", help="report failures and go on")
    args = parser.parse_args()
    prepare()
    if args.engine is not None:
        only = None if args.requests is None else [int(part) for part in args.requests.split(",")]
        print(dict(play(cases_of(args.seed, args.engine, only))))
        return 0
    seed = int(time.time()) * 1000 if args.seed is None else args.seed
    end, counts, num_failed = time.monotonic() + 60 * args.minutes, Counter[str](), 0
    first = seed
    while (seed < first + args.count) if args.count else (time.monotonic() < end):
        try:
            counts.update(try_seed(seed))
        except AssertionError as error:
            print(f"seed {seed}: {error}\n", flush=True)
            num_failed += 1
            if not args.keep_going:
                break
        seed += 1
    print(
        f"seeds {first} to {seed}, {num_failed} failed; "
        + ", ".join(f"{name} {n}" for name, n in sorted(counts.items()))
    )
    return int(num_failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
