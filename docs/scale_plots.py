"""The plots of docs/design/scale.md: ``python docs/scale_plots.py benchmarks/results/scale-h200.jsonl docs/design``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

from nemo_engine.benchmarks.provenance import read_records

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

pyplot.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scale", "font.size": 9})


def routing(records: list[dict[str, Any]], path: Path) -> None:
    """TTFT's tail and the hits over the number of replicas."""
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5.5), layout="constrained")
    for column, workload in enumerate(("conversations", "documents")):
        of_workload = [record for record in records if record["study"] == "routing" and record["workload"] == workload]
        for name in dict.fromkeys(record["routing"] for record in of_workload):
            runs = sorted((r for r in of_workload if r["routing"] == name), key=lambda record: record["replicas"])
            counts = [run["replicas"] for run in runs]
            axes[0][column].plot(counts, [run["ttft"]["p99"] for run in runs], marker="o", label=name)
            axes[1][column].plot(counts, [run["prefix_hit_rate"] for run in runs], marker="o", label=name)
        axes[0][column].set(title=workload, xscale="log", yscale="log", ylabel="TTFT p99, s")
        axes[1][column].set(xscale="log", xlabel="replicas", ylabel="hits of prompt tokens", ylim=(0, 1))
    axes[0][0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


def autoscaling(records: list[dict[str, Any]], path: Path) -> None:
    """Replicas that take requests, over the morning."""
    figure, axis = pyplot.subplots(figsize=(6, 2.8), layout="constrained")
    for record in records:
        if record["study"] == "autoscaling":
            times, counts = zip(*record["up"])
            axis.step([*times, record["duration_s"]], [*counts, counts[-1]], where="post",
                      label=f"{record['policy']}: TTFT p99 {record['ttft']['p99']:.1f} s")  # fmt: skip
    axis.set(xlabel="s", ylabel="replicas")
    axis.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    found = read_records(Path(sys.argv[1]))
    routing(found, Path(sys.argv[2]) / "scale-routing.svg")
    autoscaling(found, Path(sys.argv[2]) / "scale-autoscaling.svg")
