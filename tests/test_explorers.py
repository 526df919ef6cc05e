"What explorers draw is what the methods found, and sliders redraw it"
import matplotlib
import pytest
import torch

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from ot_research import explorers
from ot_research.apps.shuffled_regression import ShuffledRegression
from ot_research.apps.topk import soft_topk
from ot_research.apps.unpaired_starts import ransac

SCORES = torch.tensor([5.0, 2, 3, 4, 1, 6], dtype=torch.float64)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def regression():
    chance = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(60, 2, dtype=torch.float64, generator=chance)
    y = x.sum(1, keepdim=True) + 0.1 * torch.randn(60, 1, dtype=torch.float64, generator=chance)
    y = y.index_copy(0, torch.arange(30), y[:30].flip(0))
    return ShuffledRegression(start=ransac(draws=100), steps=3).fit(x, y), x, y


@pytest.mark.parametrize("k", [0, 2, 6])
def test_the_temperature_shows_what_is_chosen(k):
    A, fig = explorers.explore_temperature(SCORES, k, 0.5)
    assert torch.equal(A, soft_topk(SCORES, k, eps=0.5))
    assert f"k = {k}, ε = 0.5" in fig.axes[0].get_title() and fig.axes[0].get_xlabel() == "score"


@pytest.mark.parametrize("along, up, weights", [(0.5, 1 / 3, [1 / 3] * 3), (1.0, 0.0, [0, 1, 0]), (0.3, 1.0, [0, 0, 1])])
def test_a_point_of_the_triangle_has_its_weights(along, up, weights):
    images = torch.zeros(3, 8, 8, dtype=torch.float64)
    for k in range(3): images[k, 2 * k:2 * k + 2, 3:5] = 1
    answer, fig = explorers.explore_triangle(images, along, up, n_iter=5)
    torch.testing.assert_close(answer.weights, torch.tensor(weights, dtype=torch.float64))
    assert f"{weights[2]:.2f}" in fig.axes[1].get_title()


def test_every_step_of_unshuffling_is_drawn(regression):
    fitted, x, y = regression
    for step in range(len(fitted.path_)):
        likely, fig = explorers.explore_unshuffling(fitted, x, y, step)
        assert likely.shape == (60,) and 0 <= likely.min() and likely.max() <= 1 + 1e-6 and len(fig.axes) == 3


def test_sliders_redraw_and_are_named_by_what_they_set(regression, monkeypatch):
    drawn = []
    for name in ("temperature", "triangle", "unshuffling"):
        monkeypatch.setattr(explorers, f"explore_{name}", lambda *given, **state: drawn.append(state))
    fitted, x, y = regression
    boxes = [explorers.temperature_explorer(SCORES), explorers.triangle_explorer(torch.ones(3, 4, 4)),
             explorers.unshuffling_explorer(fitted, x, y)]
    controls = [box.children[0].children for box in boxes]
    assert [[c.description for c in row] for row in controls] == [["k", "eps"], ["along", "up"], ["step"]]
    assert drawn == [dict(k=1, eps=0.3), dict(along=0.5, up=0.35), dict(step=len(fitted.path_) - 1)]
    controls[0][0].value, controls[1][1].value = 3, 0.5
    assert drawn[3:] == [dict(k=3, eps=0.3), dict(along=0.5, up=0.5)]
