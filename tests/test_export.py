"What is made from the notebooks is what the notebooks would make now"
import shutil
import subprocess
import sys
from pathlib import Path

import authoring
import pytest
from runner import ROOT

BIN = Path(sys.executable).parent


@pytest.fixture
def copy(tmp_path) -> Path:
    "The notebooks and the package, to be changed freely"
    shutil.copy(ROOT / "settings.ini", tmp_path)
    for folder in ("nbs", "ot_research"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    return tmp_path


def texts(folder: Path, pattern: str) -> dict:
    files = (p for p in folder.rglob(pattern) if not p.relative_to(folder).parts[0].startswith("."))
    return {p.relative_to(folder).as_posix(): p.read_text(encoding="utf-8") for p in files}


def test_the_package_is_the_export_of_the_notebooks(copy):
    for path in (copy / "ot_research").rglob("*.py"):
        if path != copy / "ot_research/__init__.py":  # nbdev keeps its lines
            path.unlink()
    subprocess.run([BIN / "nbdev_export"], cwd=copy, check=True)
    assert texts(copy / "ot_research", "*.py") == texts(ROOT / "ot_research", "*.py"), "run `make export`"


def test_notebooks_are_clean(copy):
    subprocess.run([BIN / "nbdev_clean"], cwd=copy, check=True)
    assert texts(copy / "nbs", "*.ipynb") == texts(ROOT / "nbs", "*.ipynb"), "run `make export`"


def test_readme_is_made_from_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == authoring.readme(), "run `make readme`"
