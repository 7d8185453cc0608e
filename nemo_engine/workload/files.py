"""Workload files: JSON lines, read one at a time so that a file may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from nemo_engine.workload.generate import WorkloadSpec, generate
from nemo_engine.workload.items import Item, as_json, parse_line


def read_workload(path: Path) -> Iterator[Item]:
    """The items of a file. A line ``{"generate": {...}}`` stands for the items of that ``WorkloadSpec``.

    Raises ``ValueError`` naming file, line, field and value of a fault, or for an empty file; ``OSError`` if the file
    cannot be read.
    """
    count, latest = 0, 0.0
    with path.open(encoding="utf-8") as file:
        lines = enumerate(file, 1)
        while True:
            try:
                number, text = next(lines)
            except StopIteration:
                break
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: is not text in UTF-8: {error}") from None
            if not text.strip():
                continue
            where = f"{path}:{number}"
            try:
                data = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where}: is not a line of JSON: {error}") from None
            if isinstance(data, dict) and "generate" in data:
                yield from _generated(data, where)
                count += 1
                continue
            item = parse_line(data, where, f"{number}")
            if item.arrival_s is not None:
                if item.arrival_s < latest:
                    raise ValueError(
                        f"{where}: arrival_s must not be before the line above ({latest}), got {item.arrival_s}"
                    )
                latest = item.arrival_s
            count += 1
            yield item
    if not count:
        raise ValueError(f"{path}: holds no request")


def _generated(data: dict[str, object], where: str) -> Iterator[Item]:
    inner = data["generate"]
    if len(data) > 1:
        other = next(name for name in data if name != "generate")
        raise ValueError(f"{where}: {other} must not stand beside generate, got {data[other]!r}")
    if not isinstance(inner, dict):
        raise ValueError(f"{where}: generate must be a JSON object, got {inner!r}")
    return generate(WorkloadSpec.parse(inner, f"{where}: generate"))


def write_workload(items: Iterable[Item], path: Path) -> int:
    """Write ``items``, a line each; returns how many."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(as_json(item), ensure_ascii=False) + "\n")
            count += 1
    return count
