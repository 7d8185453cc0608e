"""The wheel and the editable install: what they hold, and that both work without the network and without isolation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import nemo_engine
from csrc import build

ROOT = Path(__file__).parent.parent
HAS_NVCC = build.find_nvcc()[0] is not None
# All of the tree: what else lies there is made by tools.
FOLDERS = (".ci", ".github", "benchmarks", "csrc", "deploy", "docs", "examples", "kernels", "nemo_engine", "tests")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

FIND_ALL = (
    "import nemo_engine, importlib.util, pathlib\n"
    "spec = importlib.util.find_spec('nemo_engine.kernels')\n"
    "bench = importlib.util.find_spec('nemo_engine.benchmarks.peers')\n"
    "print(pathlib.Path(nemo_engine.__file__).parent, pathlib.Path(spec.origin).parent, "
    "pathlib.Path(bench.origin).parents[1], importlib.util.find_spec('kernels'))"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing behind in the checkout."""
    tree = tmp_path_factory.mktemp("tree")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, tree / path.name)
    return tree


def pip(*args: str, cwd: Path, cuda: str = "0") -> str:
    """What pip says, without the network; with or without the CUDA kernels."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    environment = os.environ | {"PIP_NO_INDEX": "1", "NEMO_ENGINE_CUDA": cuda}
    run = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)
    return run.stdout + run.stderr


def where(site: Path) -> list[str]:
    """Where the package, its kernels, its benchmarks and a stray top-level ``kernels`` are found, with ``site`` the
    only site directory.
    """
    code = f"import site; site.addsitedir({str(site)!r})\n{FIND_ALL}"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=site, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()


@pytest.fixture(scope="module")
def wheel(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built with one family of the CUDA kernels where there is nvcc: how they get into it does not depend on which."""
    folder = tmp_path_factory.mktemp("wheel")
    others = [path for path in tree.glob("csrc/*/bind.cpp") if path.parent.name != "norm"]
    setup = tree / "setup.py"
    text = setup.read_text()
    assert '"-O3"' in text
    setup.write_text(text.replace('"-O3"', '"-O0"'))  # it is imported and not timed, and compiles in a third less
    for path in others:
        path.rename(path.with_suffix(".not"))
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", str(folder))
    said = pip("wheel", "-q", *options, ".", cwd=tree, cuda="1" if HAS_NVCC else "0")
    for path in others:
        path.with_suffix(".not").rename(path)
    setup.write_text(text)
    assert not HAS_NVCC or "without its CUDA kernels" not in said
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert tops == {"nemo_engine", f"nemo_engine-{nemo_engine.__version__}.dist-info"}
    sources = {
        *(path.relative_to(ROOT) for path in (ROOT / "nemo_engine").rglob("*.py")),
        *(Path("nemo_engine") / path.relative_to(ROOT) for path in (ROOT / "kernels").rglob("*.py")),
        *(Path("nemo_engine") / path.relative_to(ROOT) for path in (ROOT / "benchmarks").rglob("*.py")),
        Path("nemo_engine/py.typed"),
        *(path.relative_to(ROOT) for path in (ROOT / "nemo_engine/assets").glob("*/*")),
        *(path.relative_to(ROOT) for path in (ROOT / "nemo_engine/server/ui/page").iterdir()),
    }
    compiled = {
        name for name in names if re.fullmatch(r"nemo_engine/_(cpu|C)\..*\.so", name)
    }  # where there is a C++ compiler, and nvcc
    assert {str(path) for path in sources} == {name for name in names if name.startswith("nemo_engine/")} - compiled
    assert len(compiled) == (shutil.which("c++") is not None) + HAS_NVCC
    assert "py3-none-any" not in wheel.name or not compiled
    assert all(zipfile.ZipFile(wheel).getinfo(name).compress_size < 8 << 20 for name in compiled)
    assert any(name.startswith("nemo_engine/kernels/") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_without_compilers_says_so(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "no-such-compiler")
    shutil.rmtree(tree / "build", ignore_errors=True)
    said = pip("wheel", "-v", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), ".", cwd=tree)
    assert "nemo-engine is built without its CUDA kernels: NEMO_ENGINE_CUDA=0" in said
    assert 'building extension "nemo_engine._cpu" failed' in said
    (path,) = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(path).namelist() if name.endswith(".so")]
    with pytest.raises(RuntimeError, match="NEMO_ENGINE_CUDA must be 0, 1 or not set, got 'yes'"):
        pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), ".", cwd=tree, cuda="yes")


def test_the_source_distribution_holds_what_building_and_testing_need(tree: Path, tmp_path: Path) -> None:
    everything = {
        str(path.relative_to(tree))
        for name in FOLDERS
        for path in (tree / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    everything |= {path.name for path in tree.iterdir() if path.is_file()}
    command = [
        sys.executable,
        "-c",
        "import setuptools.build_meta as b, sys; b.build_sdist(sys.argv[1])",
        str(tmp_path),
    ]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, env=os.environ | {"NEMO_ENGINE_CUDA": "0"})
    (path,) = tmp_path.glob("*.tar.gz")
    names = {name.split("/", 1)[1] for name in tarfile.open(path).getnames() if "/" in name}
    assert {"CMakeLists.txt", ".ci/run", "tests/conftest.py", "deploy/Dockerfile"} <= everything <= names


def test_the_installed_wheel_imports(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    assert where(tmp_path) == [
        f"{tmp_path}/nemo_engine",
        f"{tmp_path}/nemo_engine/kernels",
        f"{tmp_path}/nemo_engine/benchmarks",
        "None",
    ]


def test_an_editable_install_finds_the_kernels(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")  # what is compiled is the wheel's matter
    pip("install", "-q", "--no-build-isolation", "--no-deps", "--target", str(tmp_path), "-e", ".", cwd=tree)
    assert where(tmp_path) == [f"{tree}/nemo_engine", f"{tree}/kernels", f"{tree}/benchmarks", "None"]


def test_the_command_is_installed(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "nemo-engine = nemo_engine.cli:main" in archive.read(entry).decode()


def test_python_m_is_the_same_command() -> None:
    run = subprocess.run([sys.executable, "-m", "nemo_engine", "--version"], cwd=ROOT, capture_output=True, text=True)
    first, second = run.stdout.splitlines()
    assert run.returncode == 0 and first == f"nemo-engine {nemo_engine.__version__}"
    assert re.fullmatch(
        rf"torch {re.escape(torch.__version__)}, CUDA {torch.version.cuda or 'none'}, commit \S.*", second
    )


def test_mandatory_dependencies_are_few() -> None:
    names = {re.split(r"[ <>=!~;\[]", text)[0] for text in PROJECT["dependencies"]}
    text = {"mistral-common", "tokenizers", "tiktoken", "huggingface_hub", "jinja2"}
    assert names == {"torch", "triton", "safetensors", "numpy", *text}


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0", "2.13.0+cpu"])
def test_the_range_of_torch(version: str) -> None:
    from packaging.requirements import Requirement

    (torch,) = [Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch")]
    assert torch.specifier.contains(version)
    assert not torch.specifier.contains("2.10.0")


def test_the_change_log_names_this_version() -> None:
    assert f"## {nemo_engine.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_python_of_the_range_is_named() -> None:
    assert PROJECT["requires-python"] == ">=3.11,<3.14"
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)} <= set(PROJECT["classifiers"])


@pytest.mark.parametrize("extra", ["", "test", "dev"])
def test_missing_requirements_are_listed(extra: str, tmp_path: Path) -> None:
    """``.ci/missing.py`` in an environment that has nothing but pip lists every requirement, and none of the project's
    own.
    """
    import pip as pip_package

    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [{str(tmp_path)!r}]\n"
        f"import runpy; sys.argv[1:] = {[extra] if extra else []!r}; runpy.run_path({str(ROOT / '.ci/missing.py')!r}, "
        "run_name='__main__')"
    )
    (tmp_path / "pip").symlink_to(Path(pip_package.__file__).parent)
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    names = run.stdout.split()
    assert {"torch", "safetensors", "numpy", "mistral-common"} <= set(names)
    assert ("pytest" in names) == (extra != "") and ("ruff" in names) == (extra == "dev")
    assert PROJECT["name"] not in names and len(names) == len(set(names))
