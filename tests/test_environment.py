"One set of requirements, written three times: ranges, exact versions, and for conda"
from configparser import ConfigParser
from importlib.metadata import version

import pytest
import rattler
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from runner import ROOT

ini = ConfigParser(delimiters=["="])
ini.read(ROOT / "settings.ini", encoding="utf-8")
SUFFIX = "requirements"
RANGES = {key.removesuffix(SUFFIX): [Requirement(r) for r in value.split()]
          for key, value in ini["DEFAULT"].items() if key.endswith(SUFFIX)}
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINS = dict(line.split("==") for line in LINES if line and not line.startswith("#"))
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
INSTALLED = [r for key in ("", "notebooks_", "data_", "test_") for r in RANGES[key]]


@pytest.mark.parametrize("requirement", sum(RANGES.values(), []), ids=str)
def test_every_requirement_is_pinned_inside_its_range(requirement):
    assert requirement.specifier.contains(PINS[requirement.name])


@pytest.mark.parametrize("requirement", INSTALLED, ids=str)
def test_the_pinned_version_is_installed(requirement):
    assert Version(version(requirement.name)).public == PINS[requirement.name]


def test_conda_reads_its_specifications():
    *conda, pip = CONDA["dependencies"]
    specs = {spec.name.normalized: spec for spec in map(rattler.MatchSpec, conda)}
    assert specs.keys() == {"python", "pip", "make", "git"} and pip.keys() == {"pip"}
    assert specs["python"].version == f"{ini['DEFAULT']['min_python']}.*"


def test_conda_installs_the_pinned_versions_and_the_library():
    constraints, library, *pinned = CONDA["dependencies"][-1]["pip"]
    assert constraints == "-c constraints.txt" and library == "-e .[notebooks,data,test]"
    assert set(pinned) == {f"{r.name}=={PINS[r.name]}" for r in INSTALLED}


def test_the_named_tools_are_in_the_environment():
    named = {"jupyterlab", "nbdev", "torch", "geomloss", "matplotlib", "ipywidgets"}
    assert named <= {r.name for r in INSTALLED}
