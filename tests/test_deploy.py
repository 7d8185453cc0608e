"""The files of deploy/ and .github/: what they name exists, and what they run is understood."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

import nemo_engine
from nemo_engine.cli import arguments, build_parser
from nemo_engine.cli.config_file import with_config
from nemo_engine.server.access import OPEN_PATHS
from nemo_engine.server.options import ServerOptions

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DRAIN = ServerOptions().drain_timeout


def served(words: list[str]) -> argparse.Namespace:
    """What ``nemo-engine WORDS`` means."""
    return build_parser().parse_args(words)


def manifest(kind: str) -> Any:
    (found,) = [each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()) if each["kind"] == kind]
    return found


def test_the_file_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    args = with_config(served(["serve"]), DEPLOY / "serve.yaml")
    assert args.model and arguments.server_options(args)["host"] == "127.0.0.1"
    text = re.sub(r"(?m)^# (?=[\w-]+: )", "", (DEPLOY / "serve.yaml").read_text())  # what is commented out is right too
    assert {"quantization", "kv-cache-dtype", "api-key-file"} <= yaml.safe_load(text).keys()


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_images(target: str) -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stage = re.search(rf"^FROM \S+ AS {target}\n(.*?)(?=^FROM|\Z)", text, re.M | re.S)[1]
    command = json.loads(re.search(r"^ENTRYPOINT (.*)$", stage, re.M)[1]) + json.loads(
        re.search(r"^CMD (.*)$", stage, re.M)[1]
    )
    assert served(command[1:]).model
    user = re.search(r"^USER (\d+)$", stage, re.M)[1]
    assert int(user) > 0 and f"--uid {user}" in stage
    health = re.search(r"urlopen\('http://127.0.0.1:8000([^']+)'", stage)[1]
    assert health in OPEN_PATHS
    extras = re.search(r'"\.\[([\w,]+)\]"', text)[1].split(",")
    declared = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M)
    assert set(extras) <= set(declared)


def test_compose() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    engine = services["engine"]
    assert served(["serve", *engine["command"]]).model
    assert int(engine["stop_grace_period"].rstrip("s")) > DRAIN
    assert all(port.startswith("127.0.0.1:") for service in services.values() for port in service["ports"])
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).exists()
    scrape = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())["scrape_configs"][0]
    assert scrape["static_configs"][0]["targets"] == ["engine:8000"] and scrape["metrics_path"] in OPEN_PATHS


def test_the_manifest_has_the_three_probes() -> None:
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert paths == {"startup": "/health", "readiness": "/v1/health/ready", "liveness": "/v1/health/live"}
    assert set(paths.values()) <= OPEN_PATHS
    assert served(["serve", *container["args"]]).model
    assert pod["securityContext"]["runAsNonRoot"] and pod["terminationGracePeriodSeconds"] > DRAIN
    assert {volume["name"] for volume in pod["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}
    service = manifest("Service")["spec"]
    assert service["selector"].items() <= manifest("Deployment")["spec"]["template"]["metadata"]["labels"].items()


def test_the_unit() -> None:
    text = (DEPLOY / "nemo-engine.service").read_text()
    command = shlex.split(re.search(r"^ExecStart=(.*)$", text, re.M)[1])
    assert served(command[1:]).config == Path("/etc/nemo-engine/serve.yaml")
    assert int(re.search(r"^TimeoutStopSec=(\d+)$", text, re.M)[1]) > DRAIN


def test_the_site_that_is_published_is_the_one_that_is_built_here() -> None:
    pages = yaml.safe_load((ROOT / ".github/workflows/pages.yaml").read_text())["jobs"]
    steps = pages["build"]["steps"]
    assert any(step.get("run") == "make docs" for step in steps) and pages["deploy"]["needs"] == "build"
    (uploaded,) = [step["with"]["path"] for step in steps if "upload-pages-artifact" in step.get("uses", "")]
    assert f"site_dir: {uploaded}\n" in (ROOT / "mkdocs.yml").read_text()


def test_the_workflow_runs_what_is_run_here() -> None:
    job = yaml.safe_load((ROOT / ".github/workflows/ci.yaml").read_text())["jobs"]["run"]
    assert any(step.get("run") == ".ci/run" for step in job["steps"])
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert job["strategy"]["matrix"]["python"] == named
    torch = re.search(r"^TORCH +\?= (\S+)", (ROOT / "Makefile").read_text(), re.M)[1]
    step = next(step for step in job["steps"] if "env" in step)
    assert step["env"]["TORCH"].split()[0] == torch
    assert set(re.findall(r'^ARG TORCH="(\S+)"$', (DEPLOY / "Dockerfile").read_text(), re.M)) == {torch}


def test_the_citation_is_of_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == nemo_engine.__version__
