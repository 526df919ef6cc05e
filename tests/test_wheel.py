"""The built wheel imports with its run-time requirements alone

Installing PyTorch again would cost a minute. The empty environment sees, through links, exactly the packages
that the wheel's own metadata require, taken from the environment that runs the tests.
"""
import shutil
import subprocess
import sys
import venv
from importlib.metadata import PathDistribution, distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from runner import ROOT
from test_layers import LAYERS, PACKAGE


def required(dist, seen: dict) -> dict:
    "What a distribution requires without extras, and what that requires"
    for text in dist.requires or []:
        requirement = Requirement(text)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if wanted and requirement.name not in seen:
            seen[requirement.name] = distribution(requirement.name)
            required(seen[requirement.name], seen)
    return seen


def link(dist, site: Path):
    "Show one installed distribution in another environment"
    for top in {file.parts[0] for file in dist.files} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(dist.locate_file(top))


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    "The Python of an environment that holds the wheel and its requirements"
    tmp = tmp_path_factory.mktemp("wheel")
    source = tmp / "source"  # building writes beside the sources
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp, source], check=True)

    venv.create(tmp / "env", with_pip=False)
    (site,) = (tmp / "env").glob("lib/python*/site-packages")
    with ZipFile(*tmp.glob("*.whl")) as wheel:
        wheel.extractall(site)
    for dist in required(PathDistribution(*site.glob("ot_research*.dist-info")), {}).values():
        link(dist, site)
    return tmp / "env/bin/python"


def run(python: Path, code: str):
    subprocess.run([python, "-I", "-W", "error", "-c", code], cwd="/", check=True)


def test_the_core_imports(python):
    core = [name for names in LAYERS[:-1] for name in names if (PACKAGE / f"{name}.py").exists()]
    run(python, "\n".join(["import ot_research", *(f"import ot_research.{name}" for name in core)]))


@pytest.mark.parametrize("extra", ["matplotlib", "ipywidgets", "nbdev", "geomloss", "ot", "sklearn"])
def test_the_environment_is_bare(python, extra):
    run(python, f"import importlib.util as u; raise SystemExit(u.find_spec('{extra}') is not None)")
