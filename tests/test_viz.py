"What the explorer draws is what the solver found; a figure is written once"
import matplotlib
import pytest
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from ot_research.data import Histograms, ipot_histograms
from ot_research.geometry import DenseCost
from ot_research.oracles import linear_program
from ot_research.problem import Problem
from ot_research.viz import SOLVERS, explore_plan, look_alike, plan_explorer, save_figure


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def cost(histograms: Histograms):
    C = (histograms.bins[:, None] - histograms.bins).square()
    return C / C.max()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("strength, n_iter", [(1.0, 1), (0.1, 200), (1e-2, 50), (1e-4, 20)])
def test_the_drawing_states_what_the_solver_found(solver, strength, n_iter):
    histograms = ipot_histograms()
    C = cost(histograms)
    found = SOLVERS[solver](Problem(DenseCost(C), histograms.blue, histograms.red), strength, n_iter)
    result, fig = explore_plan(SOLVERS[solver], strength, n_iter)
    assert result.n_iter == n_iter
    torch.testing.assert_close(result.plan.cost(), found.plan.cost())
    exact = linear_program(C, histograms.blue, histograms.red).value
    bounds = result.certificate()
    assert bounds.lower <= exact <= bounds.upper
    for number in (found.plan.cost(), bounds.lower, bounds.upper):
        assert f"{number:.6f}" in fig.get_suptitle()
    row_error = (found.plan.row - histograms.blue).abs().sum()
    assert any(f"row error {row_error:.1e}" == ax.get_title() for sub in fig.subfigs for ax in sub.axes) or row_error <= 1e-9


def test_other_histograms_can_be_explored():
    bins = torch.arange(12, dtype=torch.float64)
    result, _ = explore_plan(SOLVERS["IPOT"], 0.1, 50, Histograms(bins, torch.softmax(bins, 0), torch.softmax(-bins, 0)))
    assert result.plan.dense().shape == (12, 12)


def test_moving_a_slider_redraws(monkeypatch):
    drawn = []
    monkeypatch.setattr("ot_research.viz.explore_plan", lambda *state, **more: drawn.append((state, more)))
    explorer = plan_explorer()
    solver, strength, n_iter = explorer.children[0].children
    first = len(drawn)
    n_iter.value, strength.value, solver.value = 50, 1e-3, "Sinkhorn"
    assert first == 1 and len(drawn) == 4
    (state,), more = drawn[-1]
    assert state is SOLVERS["Sinkhorn"] and (more["strength"], more["n_iter"]) == (1e-3, 50)


def test_a_figure_that_looks_the_same_is_left_alone(tmp_path, monkeypatch):
    (tmp_path / "settings.ini").touch()
    (tmp_path / "nbs").mkdir()
    monkeypatch.chdir(tmp_path / "nbs")
    written = []
    for title in ("cost 0.123", "cost 0.123", "cost 0.124"):
        fig, ax = plt.subplots()
        ax.set_title(title)
        assert save_figure(fig, "some") == "figures/some.png"
        written.append((tmp_path / "figures/some.png").read_bytes())
    assert written[0] == written[1] != written[2]
    assert not look_alike(written[0], written[2])
