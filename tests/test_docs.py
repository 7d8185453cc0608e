"""The README and the pages of docs/: links lead somewhere, what is made from the code is as the code is, and every
snippet runs.

Snippets run as they stand, but for this: MODEL and a reader's own folders are nemo-tiny, addresses of a server are that
of one which runs here, simulated workloads are short, and output goes to a temporary folder. Commands that would serve
until they are stopped, or take minutes (``bench``, ``verify``, ``quantize``), are parsed and not run; of ``make``,
``pip``, ``docker`` and Ray's commands, the targets, extras and files must exist.
"""

from __future__ import annotations

import ast
import gzip
import io
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from starlette.testclient import TestClient

from nemo_engine import AsyncEngine
from nemo_engine.cli import build_parser, main
from nemo_engine.config import ModelConfig
from tests.helpers.checkpoints import random_adapter, write_adapter
from tests.server.live import LiveServer

ROOT = Path(__file__).parent.parent
NAMES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "deploy/README.md")
PAGES = [ROOT / name for name in NAMES] + sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """The fragments by which headings are linked."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# What a line of a command in a docstring begins with; what goes on is indented further, after a backslash.
COMMANDS = ("python ", "nemo-engine ", "pip ", "mkdir ", "tar ", "compute-sanitizer ")


@pytest.mark.parametrize("folder", ["nemo_engine", "benchmarks", "examples", "csrc", "docs"])
def test_commands_in_docstrings_stand_one_a_line(folder: str) -> None:
    """A formatter of paragraphs would join them."""
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            blocks = re.findall(r"^(?:    .*\n?)+", ast.get_docstring(node) or "", re.MULTILINE)
            for block in blocks:
                lines = [line[4:] for line in block.splitlines()]
                if lines[0].startswith(COMMANDS):
                    assert all(line.startswith((*COMMANDS, " ", "#")) for line in lines), f"{file}: {block}"
                    assert not any(
                        re.search(r"\S (python|nemo-engine) (\S+\.py|bench|serve)\b", x) for x in lines if "'" not in x
                    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if not target.startswith(("http://", "https://")):
            name, _, fragment = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            assert file.is_file(), f"{page.name}: {target}"
            assert not fragment or fragment in anchors(file), f"{page.name}: {target}"


def test_every_page_is_linked_and_in_the_site() -> None:
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in LINK.findall(page.read_text())
    }
    site = (ROOT / "mkdocs.yml").read_text()
    for page in PAGES:
        if page.parent != ROOT and page.is_relative_to(ROOT / "docs"):
            assert f": {page.relative_to(ROOT / 'docs')}\n" in site, page
        assert page.name in NAMES or page in linked or "docs/reference" in str(page), page


# ---- what is made from the code


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = spec_from_file_location("generate_docs", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_the_codes(made: ModuleType) -> None:
    pages = made.pages()
    stale = [path.name for path, text in pages.items() if not path.exists() or path.read_text() != text]
    assert not stale, "run: python docs/generate.py"
    marked = {path for path in (ROOT / "docs").rglob("*.md") if path.read_text().startswith(made.MARK)}
    assert marked == set(pages)


def test_the_readme_is_short_and_its_table_is_the_planners(made: ModuleType) -> None:
    readme = (ROOT / "README.md").read_text()
    assert readme.count("\n") <= 120
    assert made.gpu_table() in readme


def test_pictures_load_nothing_and_are_small() -> None:
    recording = (ROOT / "docs" / "demo.svg").read_text()
    assert len(recording) < 60_000 and "tokens/s" in recording
    assert set(re.findall(r"https?://[^\"<]*", recording)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<(script|image|foreignObject)|@import|url\(", recording)


# ---- snippets


def snippets(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each: fences with a language, and what is indented by four, which is for a shell."""
    rest = []
    for part in re.split(r"(^```\w*\n.*?^```$)", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        fence = re.fullmatch(r"```(\w*)\n(.*?)```", part, re.DOTALL)
        if fence is None:
            rest.append(part)
        elif fence[1] not in ("", "text"):
            yield fence[1], fence[2]
    for found in re.finditer(r"(?<=\n\n)((?: {4}.*\n)+)", "\n\n".join(rest)):
        yield "sh", re.sub(r"^ {4}", "", found[1], flags=re.MULTILINE)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell's lines; pipes stand between them as words."""
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        at = [i for i, word in enumerate(words) if word.endswith(";")]
        for begin, end in zip([0, *(i + 1 for i in at)], [*(i + 1 for i in at), len(words)]):
            if words[begin:end]:
                yield [word.removesuffix(";") for word in words[begin:end]]


class Reader:
    """Does in a temporary folder what a page says."""

    def __init__(self, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url = url
        self.folder = folder
        self.monkeypatch = monkeypatch
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        request = json.dumps({"prompt": "A list is", "max_tokens": 3}) + "\n"
        (folder / "in.jsonl").write_text(request)
        (folder / "in.gz").write_bytes(gzip.compress(request.encode()))
        (folder / "requests.jsonl").write_text(json.dumps({"prompt_tokens": 300, "output_tokens": 20}) + "\n")
        (folder / "keys.txt").write_text("me:secret\n")
        tiny = json.loads((ROOT / "nemo_engine/assets/nemo-tiny/config.json").read_text())
        write_adapter(folder / "my-adapter", random_adapter(ModelConfig.from_hf(tiny)))
        monkeypatch.chdir(folder)

    def python(self, text: str) -> None:
        text = text.replace("my-nemo", "nemo-tiny").replace("http://localhost:8000", self.url)
        exec(compile(text, "snippet", "exec"), self.namespace)

    def shell(self, words: list[str]) -> None:
        if "|" in words:
            at = words.index("|")
            shown = subprocess.run(words[:at], capture_output=True, check=True).stdout
            self.monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(shown)))
            words = words[at + 1 :]
        rule = {
            "nemo-engine": self.nemo_engine,
            "make": self.make,
            "pip": self.pip,
            "curl": self.curl,
            "uvicorn": self.uvicorn,
        }
        if words[0] in rule:
            rule[words[0]](words[1:])
        elif words[0] in ("docker", "serve", "python", ".ci/run"):
            files = [word for word in words if re.fullmatch(r"(?!out/)[\w.-]+/[\w./-]+", word)]
            assert files or "docker run" in " ".join(words) or "nemo_engine.ray:build_app" in words, words
            assert all((ROOT / name).exists() for name in files), words
        else:
            assert words[:2] == [".", ".venv/bin/activate"], f"no rule for {words}"

    def nemo_engine(self, words: list[str]) -> None:
        words = [re.sub(r"requests=\d+", "requests=20", word) for word in words if not re.match(r"\[|ADAPTER", word)]
        words = ["nemo-tiny" if word in ("MODEL", "my-nemo", "IN") else word for word in words]
        args = build_parser().parse_args(words)
        if words[0] in ("bench", "verify", "quantize", "serve"):
            return
        if words[0] == "chat":
            self.monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n/quit\n"))
        assert args.run and main(words) == 0, words

    def make(self, words: list[str]) -> None:
        target = words[0]
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
        for variable in (word.partition("=")[0] for word in words[1:]):
            assert f"$({variable})" in (ROOT / "Makefile").read_text(), words

    def pip(self, words: list[str]) -> None:
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[0] == "install"
        extras = [extra for word in words[1:] for extra in re.findall(r"\[(.*)\]", word)]
        assert {name for extra in extras for name in extra.split(",")} <= set(known), words

    def curl(self, words: list[str]) -> None:
        address = [word.replace("http://127.0.0.1:8000", self.url) for word in words]
        answer = json.loads(subprocess.run(["curl", "-sf", *address], capture_output=True, check=True).stdout)
        assert answer["choices"][0]["message"]["content"]

    def uvicorn(self, words: list[str]) -> None:
        with TestClient(self.namespace[words[0].partition(":")[2]]) as client:
            assert len(client.get("/story", params={"about": "lists"}).text) > 20
            assert client.get("/title", params={"of": "a book"}).json()["title"]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with AsyncEngine("nemo-tiny", max_model_len=2048) as engine, LiveServer(engine) as live:
        yield live.url


@pytest.mark.parametrize("page", [page for page in PAGES if any(snippets(page))], ids=name_of)
def test_snippets_run(page: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = Reader(url, tmp_path, monkeypatch)
    for language, text in snippets(page):
        if language == "json":
            json.loads(text)
        elif language == "python":
            reader.python(text)
        else:
            assert language == "sh", f"no rule for {language}"
            for words in commands(text):
                reader.shell(words)
