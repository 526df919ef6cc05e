"Robust transport, with marginals in balls"
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from ot_research import solve
from ot_research.apps.ball_marginals import ball_transport
from ot_research.geometry import DenseCost, PointCloud

f64 = torch.float64


def draws(*shape, seed=0):
    return torch.rand(*shape, dtype=f64, generator=torch.Generator().manual_seed(seed))


def weights(n, seed):
    w = draws(n, seed=seed) + 0.5
    return w / w.sum()


@pytest.mark.parametrize("reg", [0.3, 0.02])
@pytest.mark.parametrize("ball", [0.0, 1e-4, (None, 1e-2), (1e-3, 0), 10.0])
def test_marginals_lie_in_their_balls_and_no_other_plan_in_them_is_better(reg, ball):
    C, a, b = draws(12, 9), weights(12, 1), weights(9, 2)
    found = ball_transport(DenseCost(C), a, b, reg=reg, ball=ball)
    assert found.converged
    pair = ball if isinstance(ball, tuple) else (ball, ball)
    for total, w, rho in zip(found.marginals, (a, b), pair):
        assert total.sum() == pytest.approx(1) and (total - w).square().sum() <= (rho or 0) * (1 + 1e-6) + 1e-12
    P = found.plan.dense()
    price = (P * C).sum() + reg * (P * (P / (a[:, None] * b)).log()).sum()
    soft = 1e-4 * reg * sum((rho or 0)**0.5 for rho in pair)  # the rounded tip
    torch.testing.assert_close(found.value, price, rtol=0, atol=1e-9 + soft)
    r, c = (total / total.sum() for total in found.marginals)
    held = solve(C, r, c, reg=reg, tol=1e-10).plan.dense()
    torch.testing.assert_close(P, held, rtol=0, atol=1e-6)


def test_a_larger_ball_is_cheaper_and_none_is_balanced():
    C = draws(20, 15)
    values = [ball_transport(DenseCost(C), reg=0.05, ball=rho).value for rho in (0, 1e-4, 1e-3, 1e-2, 1)]
    assert all(more < less + 1e-9 for less, more in zip(values, values[1:]))
    torch.testing.assert_close(values[0], solve(C, reg=0.05, tol=1e-11).value)


@pytest.mark.parametrize("ball", [1e-3, (None, 5e-3), 10.0])
def test_derivatives(ball):
    x, y, a = draws(5, 2).requires_grad_(), draws(4, 2, seed=1).requires_grad_(), weights(5, 3).requires_grad_()

    def answer(x, y, a):
        found = ball_transport(PointCloud(x, y), a / a.sum(), reg=0.2, ball=ball, tol=1e-10)
        return found.value, found.value_linear
    for k in (0, 1):
        one = lambda *at: answer(*at)[k]
        assert gradcheck(one, (x, y, a), rtol=1e-2, atol=1e-4) and gradgradcheck(one, (x, y, a), rtol=1e-2, atol=1e-3)


def test_an_earlier_answer_is_a_start():
    C = draws(40, 30)
    first = ball_transport(DenseCost(C), reg=0.01, ball=1e-3)
    again = ball_transport(DenseCost(C + 1e-3 * draws(40, 30, seed=5)), reg=0.01, ball=1e-3, init=first.potentials)
    assert again.converged and again.n_iter < first.n_iter / 2


@pytest.mark.parametrize("size", [1, 20])
def test_a_bad_start_does_no_harm(size):
    C = draws(40, 30).square()
    start = size * draws(40, seed=1), size * draws(30, seed=2)
    good, bad = (ball_transport(DenseCost(C), reg=0.01, ball=1e-3, init=init) for init in (None, start))
    assert bad.converged
    torch.testing.assert_close(bad.value, good.value, rtol=1e-9, atol=1e-9)


def test_mass_is_kept_and_forbidden_pairs_stay_empty():
    C = draws(6, 5)
    C[0, :4] = torch.inf
    a, b = 3 * weights(6, 1), 3 * weights(5, 2)
    found = ball_transport(DenseCost(C), a, b, reg=0.1, ball=1e-2)
    assert found.plan.dense().sum() == pytest.approx(3) and not found.plan.dense()[0, :4].any()


@pytest.mark.usefixtures("as_installed")
@pytest.mark.parametrize("ball, says", [(-1.0, "not -1.0"), ((1, 2, 3), "not \\(1, 2, 3\\)"), ("wide", "not 'wide'"),
                                        (float("inf"), "not inf"), (True, "not True")])
def test_a_ball_that_is_none_is_refused(ball, says):
    with pytest.raises(ValueError, match=says):
        ball_transport(DenseCost(draws(3, 3)), reg=0.1, ball=ball)


def test_stopping_early_warns():
    with pytest.warns(UserWarning, match="wrong place"):
        found = ball_transport(DenseCost(draws(9, 9)), reg=0.01, ball=1e-3, max_iter=1)
    assert not found.converged
