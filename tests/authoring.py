"""Start a notebook, and turn notebooks into pages

    python tests/authoring.py new core/10_foo     nbs/core/10_foo.ipynb from nbs/_template.ipynb
    python tests/authoring.py readme              README.md from nbs/index.ipynb
    python tests/authoring.py docs                _proc, the notebooks as the site shows them
"""
import json
import re
import sys
from pathlib import Path

import yaml
from execnb.nbio import nb2str
from fastcore.xtras import rtoken_hex
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parents[1]
CONF = """\
project = "ot_research"
extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_dmath_double_inline = True
suppress_warnings = ["myst.header", "myst.xref_missing", "docutils"]  # links to files, rules after functions
html_theme = "pydata_sphinx_theme"
html_theme_options = {"navbar_align": "left", "secondary_sidebar_items": ["page-toc"]}
html_show_copyright = False
"""
NBS = ROOT / "nbs"
FOLDERS = ["core", "continuous", "apps", "experiments", "benchmarks", "side"]  # the order of the site
MADE = "<!-- made from nbs/index.ipynb by `make readme` -->\n\n"


def new(name: str):
    "`core/10_foo` becomes nbs/core/10_foo.ipynb, titled Foo, exporting ot_research.foo"
    path = NBS / f"{name.removesuffix('.ipynb')}.ipynb"
    if path.exists():
        sys.exit(f"{path} exists")
    stem = re.sub(r"^\w*?\d+_", "", path.stem)
    module = f"{path.parent.name}.{stem}" if path.parent.name in ("apps", "continuous") else stem
    text = (NBS / "_template.ipynb").read_text(encoding="utf-8")
    text = text.replace("TITLE", stem.replace("_", " ").capitalize()).replace("MODULE", module)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    print(path.relative_to(ROOT))


def fenced(text: str, language: str = "") -> str: return f"```{language}\n{text.strip()}\n```"


def from_root(text: str) -> str:
    "Links written for nbs/, as seen from the root"
    text = re.sub(r"(\]\(|src=\")(?!\w+:|#|\.\./)", r"\1nbs/", text)
    return re.sub(r"(\]\(|src=\")\.\./", r"\1", text)


def code(cell: dict) -> list[str]:
    "A code cell and the text it shows; cells with `#| hide` stay behind, as do pictures and widgets"
    source = "".join(cell["source"])
    if re.search(r"^#\| *hide", source, re.M):
        return []
    parts = [fenced(re.sub(r"^#\|.*\n?", "", source, flags=re.M), "python")]
    for out in cell["outputs"]:
        data = out.get("data", {})
        if "text" in out or data.keys() <= {"text/plain", "text/html"}:
            parts.append(fenced("".join(out.get("text") or data["text/plain"])))
    return [part for part in parts if part != fenced("", "python")]


def readme() -> str:
    "The text of README.md"
    cells = json.loads((NBS / "index.ipynb").read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        parts += code(cell) if cell["cell_type"] == "code" else [from_root("".join(cell["source"]))]
    return MADE + "\n\n".join(parts) + "\n"


def markdown(source: str) -> dict:
    return dict(cell_type="markdown", id=rtoken_hex(4), metadata={}, source=source)


def contents(pages: list[str], option: str = "") -> str:
    return "\n".join(["```{toctree}", option, "", *pages, "```"])


def page(nb: dict) -> dict:
    "A processed notebook with its title back, and without the calls that drew the signatures"
    head = yaml.safe_load("".join(nb["cells"][0]["source"]).strip("-\n"))
    nb["cells"][0] = markdown(f"# {head['title']}\n\n> {head['description']}")
    for cell in nb["cells"]:
        if "".join(cell["source"]).startswith("#| echo: false"):
            cell["metadata"]["tags"] = ["remove-input"]
    return nb


def docs():
    "Notebooks with their functions' signatures, a contents page for each folder, the settings of Sphinx"
    proc = proc_nbs(force=True)
    folders = [name for name in FOLDERS if (proc / name).exists()]
    for name in folders:
        pages = sorted(path.stem for path in (proc / name).glob("*.ipynb"))
        text = f"# {name.capitalize()}\n\n{contents(pages)}\n"
        (proc / name / "index.md").write_text(text, encoding="utf-8")
    for path in proc.rglob("*.ipynb"):
        nb = page(json.loads(path.read_text(encoding="utf-8")))
        if path == proc / "index.ipynb":
            alone = sorted({p.stem for p in proc.glob("*.ipynb")} - {"index"})
            pages = [f"{name}/index" for name in folders] + alone
            nb["cells"].append(markdown(contents(pages, ":hidden:")))
        path.write_text(nb2str(nb), encoding="utf-8")
    (proc / "conf.py").write_text(CONF, encoding="utf-8")


def main():
    match sys.argv[1:]:
        case ["new", name]: new(name)
        case ["readme"]: (ROOT / "README.md").write_text(readme(), encoding="utf-8")
        case ["docs"]: docs()
        case _: sys.exit(__doc__)


if __name__ == "__main__":
    main()
