"""The floors in pyproject.toml exclude releases with which something was seen to fail."""

from importlib.metadata import version
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

NEWEST_THAT_FAILS = {
    "accelerate": "1.14.0",
    "datasets": "4.2.0",
    "pytest": "9.1.1",
    "tensorboard": "2.16.1",
    "transformers": "5.3.0",
}


@pytest.mark.parametrize("name", NEWEST_THAT_FAILS)
def test_floors(name):
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no parser of TOML")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines = chain(project["dependencies"], *project["optional-dependencies"].values())
    (allowed,) = (line.specifier for line in map(Requirement, lines) if line.name == name)
    assert NEWEST_THAT_FAILS[name] not in allowed
    assert version(name) in allowed
