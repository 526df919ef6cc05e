"""Start a notebook, and turn notebooks into pages

    python tests/authoring.py new core/10_foo     nbs/core/10_foo.ipynb from nbs/_template.ipynb
    python tests/authoring.py readme              README.md from nbs/index.ipynb
    python tests/authoring.py docs                _proc, the notebooks as the site shows them
"""
import json
import re
import sys
from pathlib import Path

from execnb.nbio import nb2str

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
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
    parts = [p for c in cells for p in (code(c) if c["cell_type"] == "code" else [from_root("".join(c["source"]))])]
    return MADE + "\n\n".join(parts) + "\n"


def main():
    match sys.argv[1:]:
        case ["new", name]: new(name)
        case ["readme"]: (ROOT / "README.md").write_text(readme(), encoding="utf-8")
        case _: sys.exit(__doc__)


if __name__ == "__main__":
    main()
