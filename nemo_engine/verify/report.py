"""What verification found, as a table, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_engine.verify.measure import Measured


def report(results: SequenceOf[Measured]) -> str:
    """A table, a configuration a line, and what is beyond the limits."""
    contexts = sorted({context for result in results for context in result.retrieval})
    heads = ["configuration", "max error", "mean error", "max KL", "mean KL", "top-1", "perplexity", "change",
             *(f"found at {context}" for context in contexts)]  # fmt: skip
    rows = [heads]
    for result in results:
        rows.append([
            result.name, f"{result.max_error:.3f}", f"{result.mean_error:.4f}", f"{result.max_kl:.4f}",
            f"{result.mean_kl:.5f}", f"{result.top1:.4f}", f"{result.perplexity:.3f}",
            f"{result.perplexity_change:+.2f} %",
            *(f"{result.retrieval.get(context, math.nan):.2f}" for context in contexts),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    found_at = "; found at: mean log-probability of a number named once in a context of that many" if contexts else ""
    lines.append(f"over {max(result.num_tokens for result in results)} tokens{found_at}")
    lines += [f"FAILED {result.name}: {fault}" for result in results for fault in result.faults]
    return "\n".join(lines)


def as_json(results: SequenceOf[Measured], facts: dict[str, Any]) -> str:
    """What ``verify`` found, with ``facts`` about the run; null where a number is not finite."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(facts | {"configurations": [finite(asdict(result)) for result in results]}, indent=2) + "\n"


def plot(results: SequenceOf[Measured], path: Path) -> None:
    """Change of perplexity, disagreement, KL divergence and retrieval, as PNG or SVG by the name of ``path``.

    Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4), layout="constrained")
    names = [result.name for result in results[1:]]
    for axis, title, values in (
        (axes[0], "perplexity, change in %", [result.perplexity_change for result in results[1:]]),
        (axes[1], "top-1 disagreement, %", [100 * (1 - result.top1) for result in results[1:]]),
        (axes[2], "mean KL divergence, nats", [result.mean_kl for result in results[1:]]),
    ):
        axis.bar(range(len(names)), values, tick_label=[name.replace(", ", ",\n") for name in names])
        axis.set_title(title)
        axis.tick_params(axis="x", labelsize=7)
    for result in results:
        axes[3].plot(list(result.retrieval), list(result.retrieval.values()), marker="o", label=result.name)
    axes[3].set_title("log-probability of a number named once")
    axes[3].set_xlabel("context, tokens")
    axes[3].set_xscale("log", base=2)
    axes[3].legend(fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)
