"""Embed the engine in your own loop: requests join while others run, one is aborted, outputs come step by step.

python examples/step_loop.py [MODEL]
"""

from __future__ import annotations

import sys

from nemo_engine import Engine, RequestOutputKind, SamplingParams


def main(model: str) -> None:
    """Run three requests, the second of which joins after five steps and the third of which is aborted."""
    params = SamplingParams(temperature=0.0, max_tokens=24, output_kind=RequestOutputKind.DELTA)
    with Engine(model, max_num_seqs=8) as engine:
        engine.add_request("first", "The heapq module provides", params)
        engine.add_request("aborted", "def main():", params)
        num_steps = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                for completion in output.outputs:
                    print(
                        f"step {num_steps:3}  {output.request_id:8} {completion.text!r} "
                        f"{completion.finish_reason or ''}"
                    )
            num_steps += 1
            if num_steps == 5:
                engine.add_request("second", "A list is a mutable", params)
            if num_steps == 8:
                engine.abort("aborted")
        stats = engine.stats()
        print(f"{num_steps} steps, {stats.peak_used_pages} of {stats.num_pages} KV pages used at the peak")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "nemo-tiny")
