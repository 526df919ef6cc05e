"Imports point down, and exported code keeps the house rules"
import ast
from pathlib import Path

import pytest
from runner import ROOT

PACKAGE = ROOT / "ot_research"
LAYERS = [["kernels"], ["forms"], ["geometry"], ["grids", "marginals"], ["problem"], ["plan"],
          ["result", "scaling", "oracles", "products"], ["solvers", "newton", "candidates", "densities", "together"],
          ["dual", "batches", "levels", "laplacian"],
          ["annealing", "zeros"], ["exact", "stationary"], ["implicit"], ["connect"],
          ["doors", "proximal", "barycenter"],
          ["extension", "conversion", "loss", "training", "free_support"], ["continuous", "apps"]]
SIDE = ["data", "records", "viz", "explorers", "bench"]  # may import anything, and nothing above may import them
RANK = {name: rank for rank, names in enumerate([*LAYERS, SIDE]) for name in names}
MODULES = sorted(PACKAGE.rglob("[!_]*.py"))


def layer(path: Path) -> str:
    "apps/topk.py is in `apps`, plan.py in `plan`"
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def local_imports(path: Path) -> set[str]:
    "The layers a module imports, wherever in its code; a name of the package itself comes from the doors"
    package = path.relative_to(ROOT).parent.parts
    used = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = list(package[:len(package) - node.level + 1]) if node.level else []
            base = start + (node.module or "").split(".") if node.module else start
            names = [base + [alias.name] for alias in node.names]
        else:
            continue
        inside = [name[1] if len(name) > 1 else "doors" for name in names if name[0] == PACKAGE.name]
        used |= {name if name in RANK or (PACKAGE / f"{name}.py").exists() else "doors" for name in inside}
    return used


def ids(path: Path) -> str: return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_imports_point_down(path):
    assert layer(path) in RANK, f"give {layer(path)} its place in LAYERS"
    for used in local_imports(path):
        assert used in RANK, f"give {used} its place in LAYERS"
        inside = path.parent != PACKAGE and used == layer(path)  # of one folder: Python itself refuses circles
        if layer(path) not in SIDE and not inside:
            assert RANK[used] < RANK[layer(path)], f"{layer(path)} imports {used}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=ids)
def test_exported_code_has_no_star_import_assert_or_print(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        star = isinstance(node, ast.ImportFrom) and node.names[0].name == "*"
        prints = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        asserts = isinstance(node, ast.Assert)
        assert not (star or prints or asserts), f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("line, used", [
    ("from .plan import Plan", {"plan"}),
    ("from . import kernels", {"kernels"}),
    ("from ot_research.apps.topk import soft_topk", {"apps"}),
    ("import ot_research.viz", {"viz"}),
    ("from ot_research import solve", {"doors"}),
    ("import torch", set()),
])
def test_every_form_of_import_is_seen(tmp_path, monkeypatch, line, used):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "ot_research")
    path = tmp_path / "ot_research/some.py"
    path.parent.mkdir()
    path.write_text(f"def f():\n    {line}\n")
    assert local_imports(path) == used
