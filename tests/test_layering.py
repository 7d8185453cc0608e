"""The import rules of ARCHITECTURE.md, and the limits on the size of a file, a class and a function."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nemo_engine"

# ---- the table: what each part may import of nemo_engine, and of other distributions

CONTRACTS = {
    "checks",
    "config",
    "config_reader",
    "option_names",
    "sampling_params",
    "structured_outputs",
    "outputs",
    "scaling",
    "step",
    "startup_log",
}
ROW_1 = CONTRACTS | {"text"}

TORCH_FREE_CHECKPOINT = {
    f"checkpoint.{name}" for name in ("checkpoint", "hub", "inventory", "layout", "lora", "quant_config")
}

MAY_IMPORT: dict[str, set[str]] = {
    # Row 7. `chat` shows the defaults that the input processor fills in; `info` reads a checkpoint's headers without
    # loading it; `env` tells the cores that a process gets.
    "cli": {
        "engine.engine",
        "engine.input_processor",
        "memory_plan",
        "quantize",
        "verify",
        "server",
        "batch",
        "planner",
        "simulator",
        "workload",
        "benchmarks",
        "checkpoint.checkpoint",
        "checkpoint.hub",
        "checkpoint.inventory",
        "checkpoint.layout",
        "runner.threads",
        *ROW_1,
    },
    # `engine` imports it when `Engine.batch` is called.
    "server": {"batch", "engine.async_engine", "engine.base", "engine.input_processor", *ROW_1},
    "ray": {"engine.async_engine", "server", *ROW_1},
    "__main__": {"cli"},
    # Row 6. `quantize` and `verify` work on a model without an engine.
    "quantize": {"checkpoint", "model", "ops", "runner", *ROW_1},
    "verify": {"checkpoint", "model", "ops", "runner", *ROW_1},
    "engine.__init__": set(),
    "engine.async_engine": {
        "engine.engine_task",
        "engine.engine_thread",
        "engine.base",
        "engine.input_processor",
        "scheduler",
        *ROW_1,
    },
    "engine.engine_thread": {"engine.base", *ROW_1},
    "engine.engine_task": {"engine.engine_thread", "engine.base", *ROW_1},
    "engine.engine": {"engine.base", "engine.input_processor", "server.batch", "batch", *ROW_1},
    "engine.base": {
        "engine.core",
        "engine.input_processor",
        "engine.output_processor",
        "engine.user_request",
        "scheduler",
        *ROW_1,
    },
    "engine.input_processor": {"scheduler", *ROW_1},
    "engine.output_processor": {"engine.user_request", "scheduler", *ROW_1},
    "engine.user_request": {"engine.input_processor", "scheduler", *ROW_1},
    # Row 5
    "engine.core": {"scheduler", "runner", *CONTRACTS},
    # Row 5
    "simulator": {"scheduler", "planner", "workload", *CONTRACTS},
    # Row 4
    "scheduler": CONTRACTS,
    "runner": {"checkpoint", "model", "ops", "memory_plan", *CONTRACTS},
    "planner": {*TORCH_FREE_CHECKPOINT, "memory_plan", "workload", *CONTRACTS},
    # Row 3
    "checkpoint": {"model", "ops", *CONTRACTS},
    "memory_plan": {*TORCH_FREE_CHECKPOINT, *CONTRACTS},
    "model": {*TORCH_FREE_CHECKPOINT, "ops", *CONTRACTS},
    # Row 2
    "ops": CONTRACTS,
    # Row 1
    **{part: CONTRACTS for part in ROW_1},
    "workload": set(),
    "batch": {"workload"},
    # The package's front door resolves its names when they are used.
    "__init__": {"engine.engine", "engine.async_engine", *CONTRACTS},
}

TORCH = {"torch", "numpy", "safetensors", "triton"}
TOKENIZERS = {"mistral_common", "tokenizers", "tiktoken", "sentencepiece", "llguidance", "jinja2"}
MAY_USE: dict[str, set[str]] = {
    "cli": {"torch", "tqdm", "shtab", "yaml"},
    "engine.engine": {"tqdm"},
    "batch": {"tqdm"},
    "ray": {"ray"},
    "server": {
        "fastapi",
        "starlette",
        "pydantic",
        "pydantic_core",
        "uvicorn",
        "httptools",
        "uvloop",
        "prometheus_client",
        "python_multipart",
        "pynvml",
        "opentelemetry",
    },
    "quantize": {"torch"},
    "verify": {"torch", "matplotlib"},
    "simulator": {"matplotlib"},
    "runner": {"torch", "numpy"},
    "checkpoint": {*TORCH, "huggingface_hub", "tqdm"},
    "model": {"torch"},
    "ops": TORCH,
    "text": {*TOKENIZERS, "numpy"},
}

# ---- the size that reads like a book

MAX_FILE_LINES = 400
MAX_CLASS_LINES = 250
MAX_FUNCTION_LINES = 80


PACKAGE_FILES = sorted(PACKAGE.rglob("*.py"))
KERNEL_FILES = sorted((ROOT / "kernels").rglob("*.py"))


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def part_of(path: Path) -> str:
    """The row-table name of a file: its first folder, or its own stem at the top level; in ``engine`` both."""
    first, *rest = path.relative_to(PACKAGE).with_suffix("").parts
    return f"{first}.{rest[0]}" if first == "engine" else first


def imported_modules(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import, wherever in the file it stands; ``from a import b`` gives
    ``a.b``.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def is_allowed(module: str, part: str) -> bool:
    """Whether a file of ``part`` may import ``module``."""
    top, *rest = module.split(".")
    if top in sys.stdlib_module_names:
        return True
    if top != "nemo_engine":
        return top in MAY_USE.get(part, set())
    if not rest or rest == ["__version__"] or rest[: len(part.split("."))] == part.split("."):
        return True
    return any(rest[: len(allowed.split("."))] == allowed.split(".") for allowed in MAY_IMPORT[part])


def violations(path: Path) -> list[str]:
    part = part_of(path)
    if part not in MAY_IMPORT:
        return [f"{path.relative_to(ROOT)}: {part!r} is not in the table of layers"]
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    return [
        f"{path.relative_to(ROOT)}:{line}: {part} may not import {module}"
        for line, module in imported_modules(parsed(path), package)
        if not is_allowed(module, part)
    ]


def test_imports_go_only_downwards() -> None:
    assert [fault for path in PACKAGE_FILES for fault in violations(path)] == []


def test_kernels_know_nothing_of_the_engine() -> None:
    # nemo_engine.kernels is their own installed name, by which one kernel may use another.
    foreign = [
        f"{path.name}:{line}: {module}"
        for path in KERNEL_FILES
        for line, module in imported_modules(parsed(path), "nemo_engine.kernels")
        if module.split(".")[0] not in {"torch", "triton", *sys.stdlib_module_names}
        and not module.startswith("nemo_engine.kernels")
    ]
    assert foreign == []


@pytest.mark.parametrize(
    ("part", "module", "allowed"),
    [
        ("scheduler", "torch", False),
        ("scheduler", "nemo_engine.text.Tokenizer", False),
        ("scheduler", "nemo_engine.step.StepPlan", True),
        ("runner", "nemo_engine.scheduler", False),
        ("model", "nemo_engine.runner.batch", False),
        ("ops", "nemo_engine.model", False),
        ("ops", "nemo_engine.kernels.norm", False),
        ("engine.core", "nemo_engine.text", False),
        ("engine.engine", "nemo_engine.runner", False),
        ("cli", "nemo_engine.scheduler", False),
        ("cli", "nemo_engine.checkpoint.checkpoint.open_checkpoint", True),
        ("cli", "nemo_engine.model.weights", False),
        ("step", "nemo_engine.scheduler", False),
        ("runner", "nemo_engine.memory_plan.plan_memory", True),
        ("runner", "nemo_engine.planner.models", False),
        ("planner", "nemo_engine.checkpoint.layout", True),
        ("planner", "nemo_engine.model.weights", False),
        ("planner", "torch", False),
        ("simulator", "nemo_engine.scheduler.Scheduler", True),
        ("simulator", "nemo_engine.runner", False),
        ("simulator", "torch", False),
        ("scheduler", "nemo_engine.simulator", False),
        ("workload", "nemo_engine.config", False),
        ("config", "numpy", False),
    ],
)
def test_the_table_itself(part: str, module: str, allowed: bool) -> None:
    assert is_allowed(module, part) is allowed


def test_the_table_of_architecture_md_is_this_one() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    lines = re.findall(r"^\| (\d) \| (.*?) \|", text[text.index("## Layers") : text.index("## Who owns")], re.MULTILINE)
    row_of = {name: int(row) for row, names in lines for name in re.findall(r"`([\w.]+)`", names)}
    parts = {part for part in MAY_IMPORT if "__" not in part}
    assert parts | {"benchmarks", "kernels", "csrc"} == set(row_of)
    for part in parts:
        for allowed in MAY_IMPORT[part]:
            target = allowed if allowed in row_of else allowed.split(".")[0]
            may_be_lazy = part == "engine.engine" and target in ("server", "batch")
            assert may_be_lazy or row_of[target] <= row_of[part], f"{part} (row {row_of[part]}) may import {allowed}"


def test_imports_are_found_wherever_they_stand() -> None:
    source = "import a.b\ndef f():\n    from . import c\n    from ..d import e\n    if x:\n        import g as h\n"
    found = {module for _, module in imported_modules(ast.parse(source), "nemo_engine.ops")}
    assert found == {"a.b", "nemo_engine.ops.c", "nemo_engine.d.e", "g"}


def loaded_after(statement: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after ``statement``."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import nemo_engine; dir(nemo_engine)",
        "import nemo_engine.scheduler",
        "from nemo_engine import SamplingParams, EngineConfig, ModelConfig, RequestOutput; EngineConfig(); "
        "SamplingParams()",
        "import nemo_engine.step, nemo_engine.startup_log",
        "import nemo_engine.cli",
        "import nemo_engine.planner.plan, nemo_engine.simulator, nemo_engine.workload",
    ],
)
def test_the_host_half_needs_no_torch(statement: str) -> None:
    assert loaded_after(statement) & {*TORCH, *TOKENIZERS, "huggingface_hub", "transformers", "tqdm"} == set()


def test_text_libraries_come_with_text() -> None:
    loaded = loaded_after("import nemo_engine.engine.engine, nemo_engine.runner.startup")
    assert "torch" in loaded
    assert loaded & {*TOKENIZERS, "huggingface_hub", "transformers"} == set()


def test_token_ids_alone_need_no_text_libraries() -> None:
    loaded = loaded_after(
        "from nemo_engine import Engine, SamplingParams\n"
        "with Engine('nemo-tiny', device='cpu', skip_tokenizer_init=True, num_kv_pages=16, max_model_len=64) as "
        "engine:\n"
        "    engine.generate({'prompt_token_ids': [1, 1044, 1045]}, SamplingParams(max_tokens=2, ignore_eos=True))"
    )
    assert loaded & {*TOKENIZERS, "transformers", "tiktoken"} == set()


def test_unknown_name_of_the_package() -> None:
    import nemo_engine

    with pytest.raises(AttributeError, match="no attribute 'Engin'"):
        nemo_engine.Engin  # noqa: B018
    assert set(nemo_engine.__all__) <= set(dir(nemo_engine))
    for name in nemo_engine.__all__:
        assert getattr(nemo_engine, name) is not None


def too_long(path: Path) -> Iterator[str]:
    name, lines = path.relative_to(ROOT), path.read_text().count("\n")
    if lines > MAX_FILE_LINES:
        yield f"{name}: {lines} lines, at most {MAX_FILE_LINES}"
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = MAX_CLASS_LINES if isinstance(node, ast.ClassDef) else MAX_FUNCTION_LINES
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > limit:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, at most {limit}"


def test_lines_of_cuda_are_no_longer_than_those_of_python() -> None:
    found = [path for ending in ("cuh", "cu", "h", "cpp") for path in (ROOT / "csrc").rglob(f"*.{ending}")]
    kernels = [path for path in found if "cpu" not in path.parts]
    assert len(kernels) > 40
    long = [(path.name, line) for path in kernels for line in path.read_text().splitlines() if len(line) > 120]
    assert long == []


def test_files_classes_and_functions_stay_small() -> None:
    assert [fault for path in (*PACKAGE_FILES, *KERNEL_FILES) for fault in too_long(path)] == []


def test_modules_open_with_a_docstring_and_none_begins_in_the_middle() -> None:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in PACKAGE_FILES:
        assert ast.get_docstring(parsed(path)), path
        texts = [ast.get_docstring(node) or "" for node in ast.walk(parsed(path)) if isinstance(node, documented)]
        assert [text for text in texts if re.match(r"(Of|Those|That of|Whom)\b", text)] == [], path


def names_in(tree: ast.Module) -> set[str]:
    """Identifiers of a file, and the words of its strings; docstrings are no source of names."""
    names: set[str] = set()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname"):
            names.update(re.findall(r"\w+", getattr(node, field, None) or ""))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            names.update(re.findall(r"\w+", node.value))
    return names


def unknown_names(path: Path, defined: set[str]) -> Iterator[str]:
    """Names in the docstrings of functions that neither the file has nor the package defines."""
    names = names_in(parsed(path)) | defined
    for node in ast.walk(parsed(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for name in re.findall(r"``([a-z_]\w*)``", ast.get_docstring(node) or ""):
                if name not in names:
                    yield f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} speaks of {name}"


def test_docstrings_name_what_is_there() -> None:
    """A parameter that is renamed leaves its old name in no docstring."""
    # Names of transformers and mistral-common, fields of a line of OpenAI's batches, and an option of the engine.
    defined = {"rotate_half", "instruct_tokenizer", "custom_id", "method", "url", "body", "pipeline_depth"}
    defined.update(part for path in PACKAGE_FILES for part in path.relative_to(ROOT).with_suffix("").parts)
    for path in PACKAGE_FILES:  # what other files may be spoken of: modules, classes, functions
        defined.update(n.name for n in parsed(path).body if isinstance(n, (ast.ClassDef, ast.FunctionDef)))
    assert [fault for path in PACKAGE_FILES for fault in unknown_names(path, defined)] == []
