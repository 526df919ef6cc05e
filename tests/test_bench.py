"Timings have both clocks, a rival cannot take us down with it, and results name no computer"
import json
import platform
import sys
import time
from pathlib import Path

import pytest
import torch

from ot_research import bench
from runner import ROOT

RESULTS = sorted((ROOT / "nbs/benchmarks/results").glob("*.json"))


def counting(upto, pause):
    for k in range(upto):
        yield dict(k=k)
        time.sleep(pause)


def twice(k): return 2 * k


def doubled(k):
    yield dict(doubled=twice(k), threads=torch.get_num_threads(), libraries=os.environ["OPENBLAS_NUM_THREADS"])  # noqa: F821


def missing():
    import a_library_nobody_wrote  # noqa: F401
    yield {}


def never(): raise RuntimeError("measured")


def spins():
    torch.eye(12_000).matmul(torch.ones(12_000, 12_000))  # seconds within one call
    yield {}


def test_a_timing_has_both_clocks():
    timing = bench.timed(lambda: sum(range(10_000)), runs=5, at_least=0.0)
    assert timing.runs == 5 and 0 < timing.cpu < 1 and 0 < timing.wall
    assert bench.timed(lambda: time.sleep(0.02), runs=1, at_least=0.0).cpu < 0.02


def test_short_calls_are_repeated():
    calls = []
    bench.timed(lambda: calls.append(1), runs=2, at_least=0.01, warm_up=3)
    assert len(calls) > 100


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux")
def test_extra_memory_is_that_of_the_call():
    keep = torch.ones(2**22)
    assert bench.extra_memory(lambda: keep + 1) == pytest.approx(2**24, rel=0.1)
    assert bench.extra_memory(lambda: keep.sum()) < 2**20


def test_helpers_and_threads_reach_the_child(monkeypatch):
    monkeypatch.delenv("OT_THREADS", raising=False)
    assert bench.isolated(doubled, twice, k=21).rows == [dict(doubled=42, threads=1, libraries="1")]


def test_a_rival_out_of_time_keeps_what_it_finished():
    run = bench.isolated(counting, upto=2, pause=60, limit=0.2)
    assert (run.rows, run.status) == ([dict(k=0)], "stopped after 0.2 s")


def test_the_limit_holds_inside_compiled_code():
    assert bench.isolated(spins, limit=0.3).status == "stopped after 0.3 s"


def test_a_rival_that_is_not_installed_says_so():
    run = bench.isolated(missing)
    assert run.rows == [] and run.status == "ModuleNotFoundError: No module named 'a_library_nobody_wrote'"


def test_the_end_of_a_process_is_told_without_paths():
    assert bench.outcome(-9, "") == "ended by signal 9"
    assert bench.outcome(1, f"Traceback\nOSError: cannot read '{sys.prefix}/x'") == "OSError: cannot read …"


def test_results_come_back_with_their_origin(tmp_path, monkeypatch):
    path = tmp_path / "some.json"
    monkeypatch.setenv("OT_BENCH", "some")
    assert bench.recorded(path, lambda: [dict(t=1 / 3, error=float("nan"))])["results"] == [dict(t=0.3333333333, error=None)]
    monkeypatch.setenv("OT_BENCH", "another")
    saved = bench.recorded(path, never)
    assert list(saved) == ["machine", "date", "command", "results"] and saved["command"] == "make bench"


def test_what_was_never_measured_says_how(tmp_path, monkeypatch):
    monkeypatch.delenv("OT_BENCH", raising=False)
    with pytest.raises(FileNotFoundError, match="some.json was never measured; OT_BENCH=1"):
        bench.recorded(tmp_path / "some.json", never)


@pytest.mark.parametrize("where", [platform.node(), sys.prefix, str(Path.home())])
def test_results_that_name_the_computer_are_not_written(tmp_path, where):
    with pytest.raises(ValueError, match="name this computer"):
        bench.save(tmp_path / "some.json", dict(note=f"at {where}"), command="make bench")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_saved_results_say_on_what_and_nothing_of_whose(path):
    text = path.read_text(encoding="utf-8")
    saved = json.loads(text)
    assert list(saved) == ["machine", "date", "command", "results"]
    assert {"device", "gpu", "cpu", "cores", "threads", "capability", "torch"} <= saved["machine"].keys()
    assert not bench.private_words(text)
    assert '"/' not in text and "://" not in text
