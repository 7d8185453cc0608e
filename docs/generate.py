"""What the documentation says of the code, made from the code: ``python docs/generate.py`` writes the pages of
docs/reference that begin with "Made by", and the table of GPUs in the README. A test fails where they differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_engine.cli import build_parser, env
from nemo_engine.cli.arguments import NO_FLAGS, field_helps
from nemo_engine.config import EngineConfig
from nemo_engine.option_names import ELSEWHERE
from nemo_engine.planner.gpus import GPUS, find_gpu
from nemo_engine.planner.models import read_model
from nemo_engine.planner.plan import Load, make_plan
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.server.batch.routes import BatchRequest
from nemo_engine.server.gpu import GpuReader
from nemo_engine.server.metrics import Metrics
from nemo_engine.server.options import ServerOptions
from nemo_engine.server.protocol import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from nemo_engine.server.responses.protocol import ResponsesRequest
from nemo_engine.workload.distributions import _SHAPES
from nemo_engine.workload.generate import WorkloadSpec
from nemo_engine.workload.items import _ITEM_FIELDS, _TURN_FIELDS

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference"
MARK = "<!-- Made by docs/generate.py: change the code, then run it. -->"

# ---- the README's table of GPUs

# As sold; a GPU of that size, and the GiB that the driver has where that GPU has more.
_SIZES = (
    ("16 GB", "rtx4090", 15.6, "RTX 4080, A4000 (no FP8)"),
    ("24 GB", "rtx4090", None, "RTX 4090, L4, RTX 3090 (no FP8)"),
    ("48 GB", "l40s", None, "L40S, A40 (no FP8)"),
    ("80 GB", "h100", None, "A100 (no FP8), H100"),
    ("141 GB", "h200", None, "H200"),
)
_FORMATS: tuple[dict[str, str], ...] = ({}, {"quantization": "fp8", "kv_cache_dtype": "fp8"})
_LOAD = Load(1500, 500)


def gpu_table() -> str:
    """Which GPU NeMo 12B needs, by the planner."""
    model = read_model("nemo")
    rows = []
    for sold, name, memory_gib, examples in _SIZES:
        cells = []
        for formats in _FORMATS:
            options: dict[str, Any] = {"max_model_len": "auto", "max_num_seqs": 64, "max_num_batched_tokens": 2048}
            try:
                plan = make_plan(model, find_gpu(name, memory_gib), EngineConfig(**options, **formats), _LOAD)
            except ValueError:  # the chats are longer than what fits
                plan = None
            if plan is None or plan.shortage is not None:
                cells.append("does not fit")
            else:
                chats = plan.capacity_tokens // (_LOAD.input_tokens + _LOAD.output_tokens)
                cells.append(f"{plan.max_model_len:,} tokens, {chats} chats")
        rows.append((sold, examples, *cells))
    return _table(("memory", "for example", "bf16: longest context, chats at once", "FP8 weights and cache"), rows)


# ---- pages of docs/reference


def pages() -> dict[Path, str]:
    """Every generated page, by its file."""
    made = {
        "cli.md": _cli(),
        "engine-config.md": _fields(EngineConfig, "EngineConfig", _ENGINE),
        "sampling-params.md": _fields(SamplingParams, "SamplingParams", _SAMPLING),
        "server-options.md": _fields(ServerOptions, "Options of the server", _SERVER),
        "http-fields.md": _http(),
        "environment.md": _environment(),
        "workloads.md": _workloads(),
        "metrics.md": _metrics(),
        "gpus.md": _gpus(),
        "other-names.md": _other_names(),
    }
    return {REFERENCE / name: f"{MARK}\n\n{text.rstrip()}\n" for name, text in made.items()}


_ENGINE = """`Engine(model, ...)`, `AsyncEngine(model, ...)` and the command line take these. Names are vLLM's where it
has one. An unknown name is a `ValueError` that says what is near, or [what to use here](other-names.md)."""
_SAMPLING = """How the tokens of one request are chosen, when it ends, and what it reports. Names, defaults and the
order of operations are vLLM's. A request's noise is a function of its seed and the position, so its tokens do not
depend on what else runs. `chat` has NeMo's recommended temperature of 0.3 as its default."""
_SERVER = """What `nemo-engine serve` takes beside the [engine's options](engine-config.md), as flags, or by these names
in a file: `nemo-engine serve --config FILE`. [What the server does](server.md) stands on a page of its own."""


_CLI = """# The command line

`nemo-engine COMMAND --help` shows the common options, `--help-all` every option. Lists are written `5 10` or `5,10`,
times with a unit: `30ms`, `1s`. Exit codes: 0 well, 1 a request failed or a limit was passed, 2 bad input,
130 interrupted."""
_HTTP = """# Fields of requests

Names and meanings are OpenAI's and vLLM's; those of sampling are described under [SamplingParams](sampling-params.md).
What a running server takes, with its limits, stands in its document at `/openapi.json`. A field that would change the
answer and is not supported is refused by name; any other unknown one is listed in the header `X-Ignored-Fields`."""
_ENVIRONMENT = """# Environment variables

What the engine computes is said by arguments, not by variables. These say where things lie, on what it runs, and how it
is built."""
_WORKLOADS = """# Workload files

Lines of JSON, the same for the simulator, `nemo-engine bench`, `nemo-engine batch` and any OpenAI-compatible server.

```json
{"id": "a", "arrival_s": 0.5, "prompt_tokens": 800, "output_tokens": 200}
```"""
_MADE_UP = """## Made-up requests

A line `{{"generate": {{"requests": 1000, "input": "lognormal:800:0.8"}}}}` stands for as many requests, and
`--synthetic requests=1000,input=lognormal:800:0.8` for such a file. Lengths and times are a number or one
of {shapes}."""
_METRICS = """# Metrics

`/metrics`, for Prometheus. Names are vLLM's behind the prefix, which `--metrics-prefix vllm` makes vLLM's too. All have
the labels `model_name` and `engine`. Those of keys come with the first request of a key that has a name, those of the
GPU where there is one."""
_GPUS = """# GPUs on paper

What `nemo-engine plan --gpu NAME` reckons with. Rates are dense, with sums in fp32. The memory is what the driver gives
to a process."""
_OTHER_NAMES = """# Options of vLLM and transformers

What to use here in place of options that this engine does not have. The errors of `Engine`, `SamplingParams`, the
command line and the server say the same."""


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _marked(text: str) -> str:
    """``code`` of docstrings as Markdown, and what stands in angle brackets as text."""
    return text.replace("``", "`").replace("<", "&lt;")


def _fields(cls: type, title: str, text: str) -> str:
    taken = {field.name for field in dataclasses.fields(SamplingParams)} if cls is EngineConfig else set()
    helps = field_helps(cls)
    rows = []
    for field in dataclasses.fields(cls):
        default = repr(field.default).replace("<RequestOutputKind.CUMULATIVE: 0>", "RequestOutputKind.CUMULATIVE")
        flag = "--" + (f"engine-{field.name}" if field.name in taken else field.name).replace("_", "-")
        is_flag = cls is not SamplingParams or field.name not in NO_FLAGS
        rows.append((_code(field.name), _code(str(field.type)), _code(default), _marked(helps.get(field.name, "")),
                     _code(flag) if is_flag else ""))  # fmt: skip
    return f"# {title}\n\n{text}\n\n" + _table(("field", "type", "default", "", "flag"), rows)


_KINDS = {
    "engine_option_": "[engine options](engine-config.md)",
    "sampling_option_": "[sampling options](sampling-params.md)",
    "server_option_": "[server options](server-options.md)",
}


def _cli() -> str:
    parts = [_CLI]
    for name, parser in _commands(build_parser()):
        parts += [f"## nemo-engine {name}", *filter(None, [_opening(parser.description or "")])]
        own, kinds = [], {kind: [] for kind in _KINDS}  # type: ignore[var-annotated]
        for action in parser._actions:
            kind = next((kind for kind in _KINDS if action.dest.startswith(kind)), None)
            if kind is not None:
                kinds[kind].append(_code(action.option_strings[0]))
            elif not isinstance(action, (argparse._HelpAction, argparse._SubParsersAction)):
                if action.dest != "help_all" and action.help != argparse.SUPPRESS:
                    own.append(
                        (
                            _code(_written(action)),
                            _marked((action.help or "").replace(" (default: %(default)s)", "").replace("%%", "%")),
                        )
                    )
        if own:
            parts.append(_table(("argument", ""), own))
        parts += [f"And {_KINDS[kind]}: {', '.join(flags)}." for kind, flags in kinds.items() if flags]
    return "\n\n".join(parts)


def _commands(parser: argparse.ArgumentParser, prefix: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"{prefix}{name}", command
                yield from _commands(command, f"{prefix}{name} ")


def _opening(text: str) -> str:
    """The first paragraph, on one line; what is set line by line stays so."""
    first, _, rest = text.partition("\n\n")
    if rest.startswith("/"):
        return f"{first}\n\n```text\n{rest}\n```"
    return _marked(" ".join(first.split()))


def _written(action: argparse.Action) -> str:
    """As it is typed."""
    value = ""
    if action.nargs != 0 and not isinstance(action, argparse.BooleanOptionalAction):
        choices = "{" + ",".join(map(str, action.choices)) + "}" if action.choices is not None else ""
        value = str(action.metavar or choices or action.dest.upper())
        value += " ..." if action.nargs in ("+", "*") else ""
    return " ".join(filter(None, [", ".join(action.option_strings), value]))


_GENERATING = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponsesRequest,
}
_OTHERS = {
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
    "/abort": AbortRequest,
    "/v1/batches": BatchRequest,
}


def _http() -> str:
    schemas = {path: kind.model_json_schema()["properties"] for path, kind in (_GENERATING | _OTHERS).items()}
    names = sorted({name for path in _GENERATING for name in schemas[path]})
    rows = []
    for name in names:
        types = dict.fromkeys(_type(schemas[path][name]) for path in _GENERATING if name in schemas[path])
        rows.append(
            (_code(name), " or ".join(types), *("yes" if name in schemas[path] else "" for path in _GENERATING))
        )
    parts = [
        _HTTP,
        _table(("field", "type", *map(_code, _GENERATING)), rows),
    ]
    for path in _OTHERS:
        rows = [(_code(name), _type(shown)) for name, shown in schemas[path].items()]
        parts.append(f"## {path}\n\n" + _table(("field", "type"), rows))
    refused = "\n".join(
        f"- `{path}`: {', '.join(map(_code, sorted(kind.unsupported)))}" for path, kind in _GENERATING.items()
    )
    parts.append("## Refused, unless the value asks for nothing\n\n" + refused)
    return "\n\n".join(parts)


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_type(one) for one in schema["anyOf"] if one.get("type") != "null"))
    if "$ref" in schema:
        return "object"
    if "enum" in schema or "const" in schema:
        return ", ".join(f'"{value}"' for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        return f"list of {_type(schema.get('items', {}))}"
    bounds = [
        f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema and abs(schema[name]) < 2**31
    ]
    return " ".join([{"object": "object", None: "any"}.get(kind, str(kind)), *bounds])


_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}

_VARIABLES = {
    "NEMO_ENGINE_API_KEY": "keys of `nemo-engine serve`, `KEY` or `NAME:KEY`, with commas between",
    "NEMO_ENGINE_CUDA": "while the package is built: `0` leaves the CUDA kernels out, `1` insists on them",
    "CUDACXX": "while the package is built: the nvcc to use, before `CUDA_HOME`, `CUDA_PATH` and the PATH",
    "CUDA_HOME": "while the package is built: a folder with `bin/nvcc`",
    "CUDA_PATH": "the same, by its other name",
    "CUDA_VISIBLE_DEVICES": "the GPU to use: the first that it names",
    "HF_HOME": "where downloads of the Hub lie, and the token",
    "HF_HUB_CACHE": "where downloads of the Hub lie, before `HF_HOME`",
    "HF_TOKEN": "a token of the Hub, for gated and private repositories",
    "HF_HUB_OFFLINE": "`1`: only what the cache holds, no network",
    "HF_ENDPOINT": "a mirror of the Hub",
    "OMP_NUM_THREADS": "threads of torch and of the kernels for CPUs; without it, the cores that the process may use",
    "MKL_NUM_THREADS": "the same, for MKL's products alone",
    "OTEL_SERVICE_NAME": "the name of the service in OpenTelemetry's spans; `nemo_engine` without it",
    "PYTORCH_CUDA_ALLOC_CONF": "torch's allocator on a GPU",
    "TRITON_INTERPRET": "`1`: Triton's kernels in its interpreter, on a CPU, slowly: for tests",
}
_READ = re.compile(r"environ(?:\.get)?[\[(]\s*\"([A-Z_]+)\"")


def _environment() -> str:
    files = [*(ROOT / "nemo_engine").rglob("*.py"), ROOT / "csrc" / "build.py", ROOT / "setup.py"]
    read = {name for file in files for name in _READ.findall(file.read_text())} | {*env._SHOWN, *env._SECRET}
    assert read <= set(_VARIABLES), f"not described in docs/generate.py: {sorted(read - set(_VARIABLES))}"
    return f"{_ENVIRONMENT}\n\n" + _table(("variable", ""), ((_code(name), text) for name, text in _VARIABLES.items()))


_LINE = {
    "id": "text; the number of the line without it",
    "prompt": "the prompt as text",
    "prompt_token_ids": "the prompt as token ids",
    "messages": "the prompt as OpenAI's messages",
    "prompt_tokens": "the prompt as a number of tokens, which are made up; beside a text, how many they are",
    "output_tokens": "tokens of the answer",
    "arrival_s": "seconds from the start; where it is left out, arrivals are made up",
    "prefix": "the name of a beginning that several requests share, for prompts given as a number",
    "prefix_tokens": "its length in tokens",
    "priority": "an integer; a larger one is less urgent",
    "turns": "a list of objects with prompt, output and `think_s`, in place of one prompt and output: a conversation",
    "think_s": "of a turn: seconds from the answer before it",
}


def _workloads() -> str:
    assert set(_LINE) == _ITEM_FIELDS | _TURN_FIELDS
    helps = field_helps(WorkloadSpec)
    made = [
        (_code(field.name), _code(str(field.default) if field.default is not None else ""), _marked(helps[field.name]))
        for field in dataclasses.fields(WorkloadSpec)
    ]
    shapes = ", ".join(_code(f"{kind}:{form}") for kind, (_, _, form) in _SHAPES.items())
    return "\n\n".join(
        [
            _WORKLOADS,
            _table(("field", ""), ((_code(name), text) for name, text in _LINE.items())),
            _MADE_UP.format(shapes=shapes),
            _table(("field", "default", ""), made),
        ]
    )


def _metrics() -> str:
    stats = dict.fromkeys(
        ("num_running", "num_waiting", "num_free_pages", "total_prefix_queried_tokens", "total_prefix_hit_tokens",
         "total_preemptions"), 0) | {"num_pages": 1}  # fmt: skip
    engine: Any = SimpleNamespace(stats=lambda: SimpleNamespace(**stats))
    metrics = Metrics(engine, "nemo_engine", "model")
    metrics.key_answered("name", 200)
    metrics._key_prompt_tokens["name"] = metrics._key_generation_tokens["name"] = 1
    metrics._gpu = GpuReader()
    metrics._gpu._first_energy = 0.0
    metrics._gpu._nvml = SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlDeviceGetMemoryInfo=lambda device: SimpleNamespace(used=1, total=1),
        nvmlDeviceGetPowerUsage=lambda device: 1,
        nvmlDeviceGetTotalEnergyConsumption=lambda device: 1000,
    )
    rows = []
    for family in metrics.collect():
        name = family.name + "_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"model_name", "engine", "le"}
        rows.append((_code(name), family.type, ", ".join(map(_code, sorted(labels))), family.documentation))
    return f"{_METRICS}\n\n" + _table(("name", "type", "labels besides", ""), rows)


def _gpus() -> str:
    rows = [
        (_code(gpu.name), gpu.title, f"{gpu.memory_gib:g}", f"{gpu.bytes_per_s / 1e9:g}",
         f"{gpu.bf16_flops_per_s / 1e12:g}", f"{gpu.fp8_flops_per_s / 1e12:g}" if gpu.fp8_flops_per_s else "–",
         re.sub(r"https://(?:www\.)?([^/]+)(\S*)", r"[\1](https://\1\2)", gpu.source.replace("www.", "")))
        for gpu in GPUS.values()
    ]  # fmt: skip
    head = ("name", "", "memory, GiB", "GB/s", "bf16, TFLOP/s", "FP8, TFLOP/s", "source")
    return f"{_GPUS}\n\n" + _table(head, rows)


def _other_names() -> str:
    rows = [
        (_code(name), re.sub(r"\{(\w+)\}", lambda match: _code(match[1]), text)) for name, text in ELSEWHERE.items()
    ]
    return f"{_OTHER_NAMES}\n\n" + _table(("there", "here"), rows)


def with_gpu_table(readme: str) -> str:
    """``readme`` with the planner's table in place of the one that it has."""
    return re.sub(r"\| memory \| for example \|.*?(?=\n\n)", lambda _: gpu_table(), readme, count=1, flags=re.DOTALL)


if __name__ == "__main__":
    README = ROOT / "README.md"
    README.write_text(with_gpu_table(README.read_text()))
    for file, page in pages().items():
        file.write_text(page)
