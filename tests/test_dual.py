"L-BFGS on the semi-dual: every hard problem at every strength, and the answers of others"
import warnings

import ot
import pytest
import torch
from problems import hard_problems
from torch.testing import assert_close

from ot_research.dual import hill, lbfgs_sinkhorn, walk
from ot_research.geometry import DenseCost, PointCloud
from ot_research.problem import Problem
from ot_research.result import ConvergenceWarning
from ot_research.solvers import sinkhorn

F64 = torch.float64
HARD = hard_problems(40)
pytestmark = pytest.mark.usefixtures("as_installed")


def typical_cost(problem: Problem) -> float:
    "Mean of the finite costs above the least of them"
    cost = problem.geometry.cost_rows(slice(None))
    finite = cost[cost.isfinite()]
    return (finite.mean() - finite.min()).item() or 1.0


def clouds(batch, n, m, d=2, cost="sqeuclidean", seed=0) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(*batch, k, d, generator=draw, dtype=F64) for k in (n, m))
    a, b = (torch.rand(*batch, k, generator=draw, dtype=F64) + 1e-3 for k in (n, m))
    return Problem(PointCloud(x, y, cost), a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", HARD)
def test_hard_problems_at_every_strength(name):
    problem = HARD[name]
    for strength in (1.0, 0.1, 1e-2, 1e-3):
        result = lbfgs_sinkhorn(problem, reg=strength * typical_cost(problem))
        assert result.converged and result.marginal_error < 1e-6, f"{strength}: {result.status}"
        assert result.f.isfinite().all() and result.g.isfinite().all()


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("strength", [1e-5, 1e-8])
@pytest.mark.filterwarnings("ignore::ot_research.result.ConvergenceWarning")
def test_tiny_strengths_give_finite_potentials_and_an_honest_error(name, strength):
    problem = HARD[name]
    result = lbfgs_sinkhorn(problem, reg=strength * typical_cost(problem), max_iter=1000)
    assert result.f.isfinite().all() and result.g.isfinite().all() and result.marginal_error.isfinite()
    assert result.converged == (result.marginal_error <= result.tol)


@pytest.mark.parametrize("batch", [(), (3,), (2, 1)])
@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1)])
def test_a_walk_is_a_plan_with_exact_rows(batch, cost):
    problem = clouds(batch, 9, 7, 3, cost)
    psi = torch.randn(*batch, 7, dtype=F64)
    phi, col = walk(problem, psi, 0.3)
    P = problem.a[..., None] * problem.b[..., None, :] * (
        phi[..., None] + psi[..., None, :] - problem.geometry.cost_rows(slice(None)) / 0.3).exp()
    assert_close(P.sum(-1), problem.a, atol=1e-14, rtol=1e-12)
    assert_close(P.sum(-2), col, atol=1e-14, rtol=1e-12)


def test_the_slope_is_the_derivative_of_the_height():
    here = hill(clouds((2,), 9, 7), 0.1)
    z, along = torch.randn(2, 7, dtype=F64), torch.randn(2, 7, dtype=F64)
    rise = here.look(z + 1e-5 * along).height - here.look(z - 1e-5 * along).height
    assert_close(rise / 2e-5, (here.look(z).slope * along).sum(-1), atol=1e-8, rtol=0)


@pytest.mark.parametrize("d, strength", [(2, 0.3), (2, 0.03), (16, 0.1), (16, 0.03)])
def test_the_potentials_are_sinkhorns(d, strength):
    problem = clouds((3,), 30, 24, d)
    reg = strength * typical_cost(problem)
    ours, theirs = lbfgs_sinkhorn(problem, reg=reg, tol=1e-12), sinkhorn(problem, reg=reg, tol=1e-12, max_iter=100_000)
    for mine, other in zip(ours.potentials, theirs.potentials): assert_close(mine, other, atol=1e-8, rtol=0)
    assert_close(ours.value, theirs.value, atol=1e-11, rtol=0)


def test_pots_plan():
    problem = clouds((), 30, 40)
    ours = lbfgs_sinkhorn(problem, reg=0.02, tol=1e-12).plan.dense()
    cost = problem.geometry.cost_rows(slice(None))
    peer = ot.sinkhorn(problem.a, problem.b, cost, 0.02, stopThr=1e-13, numItermax=100_000)
    assert_close(ours, peer, atol=1e-10, rtol=0)


@pytest.mark.parametrize("n, m", [(9, 5), (5, 9), (1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_shapes(batch, n, m):
    result = lbfgs_sinkhorn(clouds(batch, n, m), reg=0.01)
    assert result.f.shape == (*batch, n) and result.g.shape == (*batch, m)
    assert result.converged.shape == batch and result.converged.all()


def test_masses_costs_and_origins_do_not_matter():
    problem = clouds((), 20, 15)
    plan = lbfgs_sinkhorn(problem, reg=0.01, tol=1e-11).plan.dense()
    heavy = Problem(problem.geometry, 7 * problem.a, 7 * problem.b)
    assert_close(lbfgs_sinkhorn(heavy, reg=0.01, tol=1e-11).plan.dense(), 7 * plan, atol=1e-9, rtol=0)
    dear = DenseCost(100 * problem.geometry.cost_rows(slice(None)) - 3)
    found = lbfgs_sinkhorn(Problem(dear, problem.a, problem.b), reg=1.0, tol=1e-11)
    assert_close(found.plan.dense(), plan, atol=1e-9, rtol=0)


def test_too_few_steps_are_said_once():
    with pytest.warns(ConvergenceWarning, match="not converged") as caught:
        result = lbfgs_sinkhorn(clouds((), 30, 30), reg=1e-5, max_iter=20)
    assert len(caught) == 1 and not result.converged and result.marginal_error.isfinite()


@pytest.mark.parametrize("bad", [dict(reg=0.0), dict(reg=-1.0), dict(reg=float("nan")), dict(reg=1.0, max_iter=0)])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError): lbfgs_sinkhorn(clouds((), 5, 5), **bad)


def test_mass_that_may_stay_behind_is_refused():
    problem = clouds((), 5, 5)
    for free in (dict(rho=1.0), dict(mass=0.5)):
        with pytest.raises(NotImplementedError, match="moves all the mass"):
            lbfgs_sinkhorn(Problem(problem.geometry, problem.a, problem.b, **free), reg=0.1)


def test_no_warning_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lbfgs_sinkhorn(clouds((5,), 20, 20), reg=1e-2)
