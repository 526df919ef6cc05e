"Every link to a file of the repository, in a page or a notebook, leads somewhere"
import json
import re

import pytest
import runner

LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
PAGES = [*runner.notebooks(), *sorted(runner.ROOT.glob("*.md"))]


def prose(path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(runner.ROOT).as_posix())
def test_links_lead_somewhere(path):
    links = LINK.findall(prose(path))
    assert not [link for link in links if not (path.parent / link).exists()]


def test_the_readme_links_to_every_notebook():
    links = {(runner.ROOT / link).resolve() for link in LINK.findall(prose(runner.ROOT / "README.md"))}
    missing = {*runner.notebooks()} - links - {runner.NBS / "index.ipynb"}
    assert not missing, f"give {sorted(p.stem for p in missing)} a line in the table of nbs/index.ipynb"
