"Regression whose rows are no pairs, in part or altogether"
import numpy as np
import pytest
import torch
from sklearn.base import clone

from ot_research.apps.shuffled_regression import ShuffledRegression, newton_path
from ot_research.apps.unpaired import sorted_matching, unpaired, unpaired_loss
from ot_research.apps.unpaired_starts import (affine, around, by_quantile, by_sorting, linear, mixture, moments,
                                              of_module, predictions, ransac, sorted_search)


def draws(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def task(n=150, d=2, seed=0, noise=0.1):
    "Inputs, outputs in order, and the truth"
    x, truth = 1 + draws(n, d, seed=seed), draws(d, seed=seed + 1)
    return x, x @ truth + noise * draws(n, seed=seed + 2), truth


def half_shuffled(y, seed=0):
    mixed, half = y.clone(), len(y) // 2
    mixed[:half] = y[torch.randperm(half, generator=torch.Generator().manual_seed(seed))]
    return mixed


@pytest.mark.parametrize("seed", range(5))
def test_no_pair_is_cheaper_than_its_potentials_and_no_matching_than_their_sum(seed):
    p, y = draws(3, 40, seed=seed), draws(40, seed=seed + 9).round()  # with ties
    found = sorted_matching(p, y)
    assert (found.f[..., None] + found.g[..., None, :] <= (p[..., None] - y).square() + 1e-12).all()
    torch.testing.assert_close(found.lower, found.value, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close((p - y[found.j]).square().mean(-1), found.value)
    assert (found.j.sort(-1).values == torch.arange(40)).all()


def test_rows_that_are_hardly_pairs_are_no_pairs():
    p, y = draws(20, 1), draws(20, 1, seed=1)
    noise, never = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(-40.0, dtype=torch.float64)
    torch.testing.assert_close(unpaired_loss(p, y, noise, never), unpaired_loss(p, y, noise))


def test_rows_that_are_pairs_surely_are_matched():
    p, y = draws(20, 1), draws(20, 1, seed=1)
    found = unpaired(p, y, torch.tensor(0.0).double(), torch.tensor(30.0).double())
    assert (found.plan.dense().diagonal() - 1 / 20).abs().max() < 1e-6


@pytest.mark.parametrize("count, foreign", [(20, 0.0), (25, 0.2), (20, 0.25)])
def test_as_many_outputs_are_left_out_as_was_said(count, foreign):
    noise = torch.tensor(0.0).double()
    P = unpaired(draws(20, 2), draws(count, 2, seed=1), noise, foreign=foreign).plan.dense()
    assert P[:20, :count].sum() == pytest.approx(1)
    assert (P.sum(0)[:count] - 1 / ((1 - foreign) * count)).abs().max() < 1e-5


def test_the_loss_has_a_unit():
    p, y, noise = draws(20, 2), draws(20, 2, seed=1), torch.tensor(0.5).double()
    small, large = (unpaired_loss(s * p, s * y, (s * noise).log(), tol=1e-9) for s in (1, 7))
    change = large - small
    torch.testing.assert_close(change, 2 * torch.tensor(7.0).double().log())


@pytest.mark.parametrize("start", [
    ransac(), ransac(by_quantile(0.4)), moments(50), sorted_search(moments(200)), around()])
def test_starts_are_rows_of_parameters_and_repeat(start):
    x, y, _ = task()
    one, two = (start(affine(linear), x, y[:, None], torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.shape[1] == 3 and one.isfinite().all() and torch.equal(one, two)


def test_a_search_ends_below_its_draws():
    x, y, _ = task(d=3)
    y = y[torch.randperm(len(y))][:, None]
    drawn = moments(200)(linear, x, y, torch.Generator().manual_seed(0))
    (found, *_) = sorted_search(moments(200))(linear, x, y, torch.Generator().manual_seed(0))
    end, least = (by_sorting(predictions(linear, x, thetas), y).min() for thetas in (found[None], drawn))
    assert end < least


def test_a_network_is_a_function_of_its_weights():
    torch.manual_seed(0)
    net, x = torch.nn.Linear(2, 1).double(), draws(5, 2)
    model = of_module(net)
    theta = model.initial(x, x[:, :1])
    torch.testing.assert_close(model.predict(x, theta), net(x).detach())
    torch.testing.assert_close(model.predict(x, 2 * theta), 2 * net(x).detach())


def test_newton_leaves_a_saddle():
    saddle = lambda t: t[0]**2 + (t[1]**2 - 1)**2
    end = newton_path(saddle, torch.tensor([1.0, 1e-3], dtype=torch.float64), tol=1e-12)[-1]
    torch.testing.assert_close(end, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("as_array", [True, False])
def test_half_of_the_pairs_are_nearly_as_good_as_all(as_array):
    x, y, truth = task()
    data = (x, half_shuffled(y))
    if as_array: data = tuple(t.numpy() for t in data)
    fit = ShuffledRegression(start=ransac(draws=300)).fit(*data)
    assert (fit.theta_ - truth).norm() < 0.1 and 0.3 < fit.paired_ < 0.7 and 0.05 < fit.noise_ < 0.2
    assert isinstance(fit.predict(data[0]), np.ndarray if as_array else torch.Tensor)
    assert fit.predict(data[0]).shape == (150,) and fit.score(x, y) > 0.9


def test_unpaired_rows_may_come_in_any_order_and_number():
    x, y, truth = task(noise=0.05)
    fit = ShuffledRegression(start=sorted_search(moments(100), keep=1), paired=0, noise=0.05)
    one, two = fit.fit(x, y.sort().values).theta_, clone(fit).fit(x.flip(0), y).theta_
    torch.testing.assert_close(one, two, atol=0.02, rtol=0)
    many = clone(fit).fit(x, torch.cat([y, y[:30]])).theta_
    assert (many - truth).norm() < 0.3


def test_steps_of_zero_keep_the_best_start():
    x, y, _ = task()
    fit = ShuffledRegression(start=sorted_search(moments(100)), paired=0, noise=1.0, steps=0).fit(x, y)
    assert len(fit.path_) == 1


def test_parameters_are_kept_by_clones():
    fit = ShuffledRegression(foreign=0.1, steps=3)
    assert clone(fit).get_params() == fit.get_params()
    assert fit.set_params(steps=4).steps == 4
    with pytest.raises(ValueError, match="step"): fit.set_params(stepps=4)


@pytest.mark.parametrize("change, message", [
    (dict(x=draws(9, 2)), "x has 9 rows and y has 10"),
    (dict(x=draws(10, 2) * torch.nan), "x has 20 entries"),
    (dict(y=draws(0)), r"y must be \(n, d\), not \(0, 1\)"),
    (dict(x=draws(2, 2), y=draws(2)), "draws 2 rows a fit and has 2"),
    (dict(paired=1.5), "paired is a share"), (dict(foreign=-1), "foreign is a share"),
    (dict(noise=0), "noise must be > 0"),
    (dict(foreign=0.2, x=draws(5, 2), paired=0, start=moments(10)), "leaves 8 outputs to 5 inputs"),
])
def test_bad_input_is_refused_by_name(change, message):
    data = {name: change.pop(name, t) for name, t in dict(x=draws(10, 2), y=draws(10)).items()}
    with pytest.raises(ValueError, match=message): ShuffledRegression(**change).fit(data["x"], data["y"])


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_mixture_weighs_rows_by_whether_they_are_pairs(outputs, noise):
    x, truth = 1 + draws(300, 3), draws(3, outputs, seed=1)
    y = x @ truth + noise * draws(300, outputs, seed=2)
    y[:100] = y[:100].roll(1, 0)
    theta, again = (mixture()(linear, x, y, torch.Generator().manual_seed(0))[0] for _ in range(2))
    torch.testing.assert_close(theta, again, rtol=1e-12, atol=1e-12)
    best = torch.linalg.lstsq(x[100:], y[100:]).solution.flatten()
    assert (theta - best).norm() < 0.02 * best.norm()


def test_a_mixture_needs_pairs_of_rows():
    with pytest.raises(ValueError, match="a mixture needs pairs of rows, not 20 and 19"):
        mixture(moments(5))(linear, draws(20, 2), draws(19, 1), torch.Generator())
