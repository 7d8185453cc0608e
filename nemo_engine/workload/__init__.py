"""Workloads: requests with their arrivals, from a file or generated, for benchmarks of any server and for the simulator
alike.

A workload file has a JSON object a line, see ``items.parse_line``. Must not know engines, schedulers or tokenizers.
"""

from nemo_engine.workload.arrivals import Arrivals
from nemo_engine.workload.content import prompt_messages, prompt_token_ids
from nemo_engine.workload.distributions import Distribution
from nemo_engine.workload.files import read_workload, write_workload
from nemo_engine.workload.generate import WorkloadSpec, generate
from nemo_engine.workload.items import Item, Turn, as_json, parse_line
from nemo_engine.workload.limits import Limits
from nemo_engine.workload.traces import estimate_tokens, is_sharegpt, read_sharegpt

__all__ = [
    "Arrivals",
    "Distribution",
    "Item",
    "Limits",
    "Turn",
    "WorkloadSpec",
    "as_json",
    "estimate_tokens",
    "generate",
    "is_sharegpt",
    "parse_line",
    "prompt_messages",
    "prompt_token_ids",
    "read_sharegpt",
    "read_workload",
    "write_workload",
]
