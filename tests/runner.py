"""Execute notebooks in fresh kernels: write their outputs in one canonical form, or compare with those stored

    python tests/runner.py run nbs/core/00_kernels.ipynb     execute and store the outputs
    python tests/runner.py check nbs/core/*.ipynb            execute and compare, write nothing

Tags on a cell: `nondeterministic` (timings): its outputs are not compared.
"""
import argparse
import base64
import io
import json
import math
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from queue import Empty

import nbformat
import numpy as np
from execnb.nbio import nb2str
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbdev.clean import clean_nb
from PIL import Image
from traitlets import Type, default

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
RTOL, ATOL = 1e-3, 1e-12  # for numbers in text
RMS = 4.0                 # for pictures, in gray levels of 255
TIMEOUT = 600             # seconds for a whole notebook
EXEMPT = "nondeterministic"
WIDGETS = "application/vnd.jupyter.widget-state+json"
KERNEL_OPTIONS = [
    "--log-level=50",
    "--InlineBackend.print_figure_kwargs={'bbox_inches': 'tight', 'metadata': {'Software': None}}",
    # bars that know of notebooks ignore TQDM_DISABLE: hand out the plain ones
    "--IPKernelApp.exec_lines=__import__('sys').modules['tqdm.auto'] = __import__('tqdm.std').std",
]
NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
COLOR = re.compile(r"\x1b\[[0-9;]*m")


class NotebookError(Exception):
    "A notebook raised, ran out of time, wrote to stderr, or no longer gives its stored outputs"


def notebooks() -> list[Path]:
    "Every notebook of the library"
    return sorted(p for p in NBS.rglob("*.ipynb") if not re.search(r"/[._]", p.relative_to(ROOT).as_posix()))


# --- Execution ---

class Channel(AsyncZMQSocketChannel):
    "A channel that looks again every second: what nbclient sends for a widget can swallow the signal that a reply is here"

    async def get_msg(self, timeout: float | None = None) -> dict:
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while True:
            left = max(0.0, deadline - time.monotonic())
            try:
                return await super().get_msg(min(left, 1.0))
            except Empty:
                if left <= 1.0:
                    raise


class Client(AsyncKernelClient):
    shell_channel_class = Type(Channel)


class Kernel(AsyncKernelManager):
    "A kernel of the Python that runs this file, whatever kernels are registered on the machine"

    @default("kernel_spec_manager")
    def _only_native(self): return KernelSpecManager(kernel_dirs=[])

    @default("client_factory")
    def _patient(self): return Client


def kernel_env(ipython_dir: str) -> dict:
    "One thread, small scale, no progress bars, no word from KeOps, and the package beside this file"
    threads = os.environ.get("OT_THREADS", "1")
    counts = {f"{lib}_NUM_THREADS": threads for lib in ("OMP", "MKL", "OPENBLAS")}
    policy = dict(PYTHONPATH=str(ROOT), PYTHONHASHSEED="0", TQDM_DISABLE="1", KEOPS_VERBOSE="0", MPLBACKEND="")
    return {"OT_SCALE": "small", **os.environ, **counts, **policy, "IPYTHONDIR": ipython_dir}


def execute(path: Path, timeout: float = TIMEOUT) -> dict:
    "Run the notebook in a fresh kernel, in its own folder; its canonical form"
    import matplotlib.font_manager  # noqa: F401  or the kernel would make the font cache, and say so

    nb = nbformat.read(path, as_version=4)
    deadline = time.monotonic() + timeout
    client = NotebookClient(
        nb,
        kernel_manager_class=Kernel,
        extra_arguments=KERNEL_OPTIONS,
        resources={"metadata": {"path": str(path.resolve().parent)}},
        timeout_func=lambda cell: max(1, deadline - time.monotonic()),
        record_timing=False,
        coalesce_streams=True,
    )
    with tempfile.TemporaryDirectory() as ipython_dir:
        try:
            client.execute(env=kernel_env(ipython_dir))
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            raise NotebookError(f"{path}\n{COLOR.sub('', str(error))}") from None
    for cell in nb.cells:
        for out in cell.get("outputs", []):
            if out.get("name") == "stderr":
                raise NotebookError(f"{path} writes to stderr\n{cell.source}\n{'-' * 40}\n{out.text}")
    return canonical(nb)


# --- The canonical form ---

def canonical(nb: nbformat.NotebookNode) -> dict:
    "What `nbdev_clean` leaves; widgets numbered in their order of creation, without their empty fields"
    nb.metadata["kernelspec"] = dict(display_name="python3", language="python", name="python3")
    widgets = nb.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    for widget in widgets.values():
        widget["state"] = {name: value for name, value in widget["state"].items() if value is not None}
    text = nbformat.writes(nb)
    for k, model_id in enumerate(widgets):
        text = text.replace(model_id, f"{k:032x}")
    nb = json.loads(text)
    clean_nb(nb, allowed_cell_metadata_keys=["tags"])
    return nb


def write(nb: dict, path: Path): path.write_text(nb2str(nb), encoding="utf-8")


# --- Comparison ---

def same_text(old: str, new: str, rtol: float, atol: float) -> bool:
    "Equal words, close numbers; runs of blanks count as one, since a column may be padded differently"
    if NUMBER.sub("0", " ".join(old.split())) != NUMBER.sub("0", " ".join(new.split())):
        return False
    pairs = zip(NUMBER.findall(old), NUMBER.findall(new), strict=True)
    return all(a == b or math.isclose(float(a), float(b), rel_tol=rtol, abs_tol=atol) for a, b in pairs)


def pixels(png: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"), dtype=float)


def same_image(old: str, new: str) -> bool:
    "Pictures of one size whose pixels differ little in the root mean square"
    a, b = pixels(old), pixels(new)
    return a.shape == b.shape and np.sqrt(np.mean((a - b) ** 2)) <= RMS


def same(old, new, rtol: float, atol: float, key: str = "") -> bool:
    "Compare two pieces of notebook JSON"
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(same(old[k], new[k], rtol, atol, k) for k in old)
    if isinstance(old, list) and isinstance(new, list) and all(isinstance(s, str) for s in old + new):
        return same_text("".join(old), "".join(new), rtol, atol)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(same(a, b, rtol, atol) for a, b in zip(old, new))
    if isinstance(old, str) and isinstance(new, str):
        return same_image(old, new) if key == "image/png" else same_text(old, new, rtol, atol)
    if isinstance(old, float) or isinstance(new, float):
        return math.isclose(old, new, rel_tol=rtol, abs_tol=atol)
    return old == new


def exempt(cell: dict) -> bool: return EXEMPT in cell["metadata"].get("tags", [])


def shown(outputs: list) -> str:
    "The text a reader sees"
    texts = (out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs)
    return "\n".join("".join(text).rstrip() for text in texts)


def differences(old: dict, new: dict, rtol: float = RTOL, atol: float = ATOL) -> list[str]:
    "One message for each cell whose outputs differ, and one for the widgets"
    messages = [
        f"{''.join(a['source'])}\n{'-' * 18} stored {'-' * 18}\n{shown(a['outputs'])}\n"
        f"{'-' * 19} now {'-' * 20}\n{shown(b['outputs'])}"
        for a, b in zip(old["cells"], new["cells"], strict=True)
        if a["cell_type"] == "code" and not exempt(a) and not same(a["outputs"], b["outputs"], rtol, atol)
    ]
    widgets = same(old["metadata"], new["metadata"], rtol, atol)
    return messages if widgets else [*messages, "the widgets' state, in the notebook's metadata"]


# --- The commands ---

def run(path: Path, keep: bool = False, show: str = "", timeout: float = TIMEOUT):
    "Execute and store. `keep`: where the new outputs agree with the stored ones, or need not, these stay"
    old, new = json.loads(path.read_text(encoding="utf-8")), execute(path, timeout)
    for cell in new["cells"]:
        if show and show in cell["metadata"].get("tags", []):
            print(shown(cell["outputs"]))
    if not (keep and not differences(old, new)):
        write(new, path)


def check(path: Path, rtol: float = RTOL, atol: float = ATOL, timeout: float = TIMEOUT):
    "Execute and compare with the stored outputs; raise `NotebookError` where they differ"
    old, new = json.loads(path.read_text(encoding="utf-8")), execute(path, timeout)
    if found := differences(old, new, rtol, atol):
        raise NotebookError(f"{path}: {len(found)} cells give other outputs\n" + "\n\n".join(found))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("command", choices=["run", "check"])
    add("notebooks", nargs="+", type=Path)
    add("--keep", action="store_true", help="run: leave a notebook whose outputs agree as it is")
    add("--show", default="", metavar="TAG", help="run: print the text of the cells with this tag")
    add("--rtol", type=float, default=RTOL, help="check: relative tolerance of numbers in text")
    add("--atol", type=float, default=ATOL, help="check: absolute tolerance of numbers in text")
    add("--timeout", type=float, default=TIMEOUT, help="seconds for one notebook")
    args = parser.parse_args()
    try:
        for path in args.notebooks:
            start = time.monotonic()
            if args.command == "run":
                run(path, args.keep, args.show, args.timeout)
            else:
                check(path, args.rtol, args.atol, args.timeout)
            print(f"{path}: {time.monotonic() - start:.1f} s", file=sys.stderr)
    except NotebookError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
