"""What FP8 costs nemo-tiny on this machine, kept with its provenance: benchmarks/results/verify-nemo-tiny.json and
.svg.

python benchmarks/accuracy.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from nemo_engine.benchmarks.provenance import provenance
from nemo_engine.verify import Limits, as_json, plot, report, verify

RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Measure, print, store. Exit status 1 past the limits."""
    results = verify("nemo-tiny", against="bfloat16", limits=Limits())
    print(report(results))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    (RESULTS / "verify-nemo-tiny.json").write_text(as_json(results, provenance("torch") | {"gpu": gpu}))
    plot(results, RESULTS / "verify-nemo-tiny.svg")
    return int(any(result.faults for result in results))


if __name__ == "__main__":
    sys.exit(main())
