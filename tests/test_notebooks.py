"Every notebook, executed in a fresh kernel, still gives the outputs stored in it"
import asyncio
import json
from queue import Empty

import pytest
import runner

NOTEBOOKS = runner.notebooks()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(runner.NBS).as_posix())
def test_notebook(path): runner.check(path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(runner.NBS).as_posix())
def test_outputs_are_stored_and_none_is_an_error(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    kinds = {out["output_type"] for cell in cells for out in cell.get("outputs", [])}
    assert kinds and "error" not in kinds


def notebook(text: str, *tags: str) -> dict:
    "One cell that printed a text"
    out = dict(output_type="stream", name="stdout", text=[text])
    cell = dict(cell_type="code", source=["x"], metadata=dict(tags=list(tags)), outputs=[out])
    return dict(cells=[cell], metadata={})


@pytest.mark.parametrize("new, differs", [
    ("error  1.2345e-05 after 12", False),
    ("error 1.2346e-05 after 12", False),
    ("error 1.24e-05 after 12", True),
    ("error 1.2345e-05 after 13", True),
    ("Error 1.2345e-05 after 12", True),
])
def test_words_are_compared_exactly_and_numbers_closely(new, differs):
    assert bool(runner.differences(notebook("error 1.2345e-05 after 12"), notebook(new))) == differs


def test_nondeterministic_cells_are_exempt():
    assert not runner.differences(notebook("1 s", runner.EXEMPT), notebook("2 s", runner.EXEMPT))


def write(path, source: str):
    code = dict(cell_type="code", id="a", metadata={}, source=[source], outputs=[], execution_count=None)
    runner.write(dict(cells=[code], metadata={}, nbformat=4, nbformat_minor=5), path)


def test_two_runs_write_the_same_bytes(tmp_path):
    path = tmp_path / "explorer.ipynb"
    write(path, """
from ipywidgets import interact
from matplotlib import pyplot as plt
from tqdm.auto import tqdm

def draw(n):
    plt.plot(range(n))
    plt.show()
    print(sum(tqdm(range(n))))

interact(draw, n=(1, 5))
""")
    texts = [runner.run(path) or path.read_bytes() for _ in range(2)]
    assert texts[0] == texts[1] and b"image/png" in texts[0]


@pytest.mark.parametrize("source, message", [
    ("1 / 0", "ZeroDivisionError"),
    ("import warnings; warnings.warn('careful')", "writes to stderr"),
    ("import time; time.sleep(60)", "timed out"),
])
def test_a_notebook_that_fails_says_which_cell(tmp_path, source, message):
    path = tmp_path / "bad.ipynb"
    write(path, source)
    with pytest.raises(runner.NotebookError, match=message) as error:
        runner.check(path, timeout=10 if "sleep" not in source else 2)
    assert source in str(error.value)


@pytest.mark.parametrize("silent, timeout, found", [(2, 60, True), (2, None, True), (9, 0.5, False)])
def test_a_reply_whose_signal_was_lost_is_looked_for_again(monkeypatch, silent, timeout, found):
    looks = []

    async def look(channel, timeout):
        looks.append(timeout)
        if len(looks) <= silent: raise Empty
        return "reply"

    monkeypatch.setattr(runner.AsyncZMQSocketChannel, "get_msg", look)
    waiting = runner.Channel.get_msg(object.__new__(runner.Channel), timeout)
    if found:
        assert asyncio.run(waiting) == "reply" and len(looks) == 3 and max(looks) <= 1
    else:
        with pytest.raises(Empty): asyncio.run(waiting)
