"""Generated workloads: lengths drawn from distributions, shared prefixes, conversations.

They depend on the specification alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

from nemo_engine.workload.distributions import Distribution
from nemo_engine.workload.items import MOST_TOKENS, Item, Turn

_COUNTS = ("requests", "prefixes", "prefix_tokens", "seed")
_ONE = Distribution("constant", (1.0,))
_ZERO = Distribution("constant", (0.0,))


@dataclass(frozen=True, slots=True)
class WorkloadSpec:
    """requests: number of items, each of one or more turns. input, output: tokens of each turn. prefixes: number of
    different beginnings in front of ``input``, of which every item has one. prefix_tokens: the length of each.
    prefix_skew: with 0 all are equally frequent, with 1 the k-th is 1/k as frequent as the first. turns: number of
    turns of an item. think_s: seconds between an answer and the next turn. seed: for all draws.
    """

    requests: int = 1000
    input: Distribution = Distribution("constant", (1000.0,))
    output: Distribution = Distribution("constant", (200.0,))
    prefixes: int = 0
    prefix_tokens: int = 0
    prefix_skew: float = 0.0
    turns: Distribution = _ONE
    think_s: Distribution = _ZERO
    seed: int = 0

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str) -> WorkloadSpec:
        """Make a specification from JSON. Raises ``ValueError`` that begins with ``where`` and names the field."""
        known = {field.name for field in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in data.items():
            if name not in known:
                raise ValueError(
                    f"{where}: {name} is not a field here (those are {', '.join(sorted(known))}), got {value!r}"
                )
            if name in _COUNTS:
                low = 1 if name == "requests" else 0
                if isinstance(value, bool) or not isinstance(value, int) or value < low:
                    raise ValueError(f"{where}: {name} must be an integer of at least {low}, got {value!r}")
            elif name == "prefix_skew":
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 10:
                    raise ValueError(f"{where}: {name} must be a number from 0 to 10, got {value!r}")
            else:
                value = Distribution.parse(value, f"{where}: {name}")
            values[name] = value
        spec = cls(**values)
        if (spec.prefixes == 0) != (spec.prefix_tokens == 0):
            raise ValueError(
                f"{where}: prefixes and prefix_tokens go together, got {spec.prefixes} and {spec.prefix_tokens}"
            )
        return spec

    @classmethod
    def parse_text(cls, text: str, where: str) -> WorkloadSpec:
        """Parse a text such as ``input=uniform:100:2000,output=200,requests=1000``."""
        data: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, value = part.partition("=")
            if not (name and equals and value):
                raise ValueError(f"{where}: NAME=VALUE,... is needed, got {part!r}")
            if name in data:
                raise ValueError(f"{where}: {name} is given twice, got {value!r}")
            if name in (*_COUNTS, "prefix_skew"):
                try:
                    data[name] = float(value) if name == "prefix_skew" else int(value)
                except ValueError:
                    raise ValueError(f"{where}: {name} must be a number, got {value!r}") from None
            else:
                data[name] = value
        return cls.parse(data, where)


def generate(spec: WorkloadSpec) -> Iterator[Item]:
    """The items of ``spec``, one at a time, without arrivals."""
    rng = random.Random(f"workload {spec.seed}")
    names = [f"prefix-{index}" for index in range(spec.prefixes)]
    weights = list(accumulate((index + 1) ** -spec.prefix_skew for index in range(spec.prefixes)))
    for index in range(spec.requests):
        prefix = rng.choices(names, cum_weights=weights)[0] if names else None
        turns = []
        for position in range(spec.turns.draw_count(rng)):
            num_in = min(spec.input.draw_count(rng), MOST_TOKENS)
            num_out = min(spec.output.draw_count(rng), MOST_TOKENS)
            turns.append(Turn(num_in, num_out, num_in, spec.think_s.draw(rng) if position else 0.0))
        yield Item(f"{index}", tuple(turns), None, prefix, spec.prefix_tokens if prefix else 0)
