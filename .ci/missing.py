"""Print the project's requirements that this environment lacks, one per line: ``missing.py [EXTRA]``.

Uses only the standard library and what pip carries inside itself, so that it runs in a bare virtual environment.
"""

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement


def requirements(extra: str) -> list[Requirement]:
    """The project's own requirements and those of ``extra`` ("" for none), extras of extras unfolded."""
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    found = [Requirement(text) for text in project["dependencies"]]
    todo = [extra] if extra else []
    while todo:
        for requirement in map(Requirement, project["optional-dependencies"][todo.pop()]):
            if requirement.name == project["name"]:
                todo.extend(requirement.extras)
            else:
                found.append(requirement)
    return [requirement for requirement in found if requirement.marker is None or requirement.marker.evaluate()]


def is_met(requirement: Requirement) -> bool:
    """Whether an installed distribution satisfies ``requirement``."""
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    for requirement in requirements(sys.argv[1] if len(sys.argv) > 1 else ""):
        if not is_met(requirement):
            print(requirement.name)
