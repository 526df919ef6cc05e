"Many small problems at once: every hard problem at every strength, alone, together and padded"
import warnings

import ot
import pytest
import torch
from problems import hard_problems
from torch.testing import assert_close

from ot_research.batches import batch_sinkhorn
from ot_research.conversion import padded_costs
from ot_research.geometry import DenseCost, PointCloud
from ot_research.problem import Problem
from ot_research.result import ConvergenceWarning
from ot_research.solvers import sinkhorn

F64 = torch.float64
HARD = hard_problems(60)
pytestmark = pytest.mark.usefixtures("as_installed")


def typical_cost(problem: Problem) -> float:
    "Mean of the finite costs above the least of them"
    cost = problem.geometry.cost_rows(slice(None))
    finite = cost[cost.isfinite()]
    return (finite.mean() - finite.min()).item() or 1.0


def together(problems) -> Problem:
    "Problems of all sizes as one, in units of their typical costs"
    costs, a, b = zip(*((p.geometry.cost_rows(slice(None)) / typical_cost(p), p.a / p.mass, p.b / p.mass) for p in problems))
    C, a, b = padded_costs(list(costs), list(a), list(b))
    return Problem(DenseCost(C), a, b)


def clouds(batch, n, m, d=2, seed=0) -> Problem:
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(*batch, k, d, generator=draw, dtype=F64) for k in (n, m))
    a, b = (torch.rand(*batch, k, generator=draw, dtype=F64) + 1e-3 for k in (n, m))
    return Problem(PointCloud(x, y), a / a.sum(-1, keepdim=True), b / b.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", HARD)
def test_hard_problems_at_every_strength(name):
    problem = HARD[name]
    for strength in (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        result = batch_sinkhorn(problem, reg=strength * typical_cost(problem))
        assert result.converged and result.marginal_error < 1e-6, f"{strength}: {result.status}"
        assert result.f.isfinite().all() and result.g.isfinite().all()


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("strength", [1e-8, 1e-10])
@pytest.mark.filterwarnings("ignore::ot_research.result.ConvergenceWarning")
def test_tiny_strengths_give_finite_potentials_and_an_honest_error(name, strength):
    problem = HARD[name]
    result = batch_sinkhorn(problem, reg=strength * typical_cost(problem))
    assert result.f.isfinite().all() and result.g.isfinite().all() and result.marginal_error.isfinite()
    assert result.converged == (result.marginal_error <= result.tol)


def test_hard_problems_of_all_sizes_in_one_batch():
    batch = together(HARD.values())
    for strength in (0.1, 1e-3, 1e-6):
        found = batch_sinkhorn(batch, reg=strength)
        assert found.converged.all() and found.value.shape == (len(HARD),)
        alone = torch.cat([batch_sinkhorn(together([one]), reg=strength).value for one in HARD.values()])
        assert_close(found.value, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("d, strength", [(2, 0.3), (2, 0.03), (16, 0.1), (16, 0.03)])
def test_the_potentials_are_sinkhorns(d, strength):
    problem = clouds((5,), 30, 24, d)
    reg = strength * typical_cost(problem)
    ours, theirs = batch_sinkhorn(problem, reg=reg, tol=1e-12), sinkhorn(problem, reg=reg, tol=1e-12, max_iter=100_000)
    for mine, other in zip(ours.potentials, theirs.potentials): assert_close(mine, other, atol=1e-8, rtol=0)
    assert_close(ours.plan.dense(), theirs.plan.dense(), atol=1e-10, rtol=0)


def test_pots_plans():
    problem = clouds((4,), 30, 40)
    cost = problem.geometry.cost_rows(slice(None))
    ours = batch_sinkhorn(problem, reg=0.02, tol=1e-12).plan.dense()
    for P, a, b, C in zip(ours, problem.a, problem.b, cost):
        assert_close(P, ot.sinkhorn(a, b, C, 0.02, stopThr=1e-13, numItermax=100_000), atol=1e-10, rtol=0)


def test_smallest_strengths_reach_the_linear_program():
    problem = clouds((8,), 30, 40)
    found = batch_sinkhorn(problem, reg=1e-7)
    exact = [ot.emd2(a, b, C) for a, b, C in zip(problem.a, problem.b, problem.geometry.cost_rows(slice(None)))]
    assert_close(found.value_linear, torch.stack(exact), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3), (2, 1, 2)])
@pytest.mark.parametrize("n, m", [(9, 5), (5, 9), (1, 4), (4, 1), (1, 1)])
def test_any_batch_and_either_side_larger(batch, n, m):
    problem = clouds(batch, n, m)
    result = batch_sinkhorn(problem, reg=0.01)
    assert result.f.shape == (*batch, n) and result.g.shape == (*batch, m)
    assert result.converged.shape == batch and result.converged.all()
    assert_close(result.plan.row, problem.a, atol=1e-6, rtol=0)
    assert_close(result.plan.col, problem.b, atol=1e-6, rtol=0)


def test_one_cost_shared_by_many_weights():
    problem = clouds((), 20, 15)
    a = torch.rand(6, 20, dtype=F64)
    result = batch_sinkhorn(Problem(problem.geometry, a / a.sum(-1, keepdim=True), problem.b), reg=0.01)
    dense = DenseCost(problem.geometry.cost_rows(slice(None)))
    again = batch_sinkhorn(Problem(dense, a / a.sum(-1, keepdim=True), problem.b), reg=0.01)
    assert result.converged.all()
    assert_close(result.value, again.value, atol=1e-12, rtol=0)


def test_a_batch_is_its_members_whatever_the_portions(monkeypatch):
    problem, reg = clouds((7,), 20, 15), 1e-3
    whole = batch_sinkhorn(problem, reg=reg, tol=1e-11)
    monkeypatch.setattr("ot_research.batches.PORTION", {"cpu": 2 * 20 * 15})
    assert_close(batch_sinkhorn(problem, reg=reg, tol=1e-11).plan.dense(), whole.plan.dense(), atol=1e-10, rtol=0)
    for k in range(7):
        one = Problem(problem.geometry[k], problem.a[k], problem.b[k])
        assert_close(batch_sinkhorn(one, reg=reg, tol=1e-11).plan.dense(), whole.plan.dense()[k], atol=1e-10, rtol=0)


def test_masses_costs_and_origins_do_not_matter():
    problem = clouds((3,), 20, 15)
    plan = batch_sinkhorn(problem, reg=0.01, tol=1e-11).plan.dense()
    heavy = Problem(problem.geometry, 7 * problem.a, 7 * problem.b)
    assert_close(batch_sinkhorn(heavy, reg=0.01, tol=1e-11).plan.dense(), 7 * plan, atol=1e-9, rtol=0)
    dear = DenseCost(100 * problem.geometry.cost_rows(slice(None)) - 3)
    found = batch_sinkhorn(Problem(dear, problem.a, problem.b), reg=1.0, tol=1e-11)
    assert_close(found.plan.dense(), plan, atol=1e-9, rtol=0)


def test_float32_comes_and_goes():
    problem = clouds((3,), 20, 15)
    single = Problem(PointCloud(problem.geometry.x.float(), problem.geometry.y.float()), problem.a.float(), problem.b.float())
    found = batch_sinkhorn(single, reg=1e-4)
    assert found.converged.all() and found.value.dtype == torch.float32 and "float64" in found.status
    assert_close(found.value.double(), batch_sinkhorn(problem, reg=1e-4).value, atol=1e-5, rtol=0)


def test_a_good_beginning_saves_steps_and_a_bad_one_does_not_hurt():
    problem, reg = clouds((5,), 40, 40), 1e-4
    cold = batch_sinkhorn(problem, reg=reg)
    near = batch_sinkhorn(problem, reg=0.95 * reg, init=cold.potentials)
    assert near.converged.all() and near.n_iter < cold.n_iter / 3
    bad = batch_sinkhorn(problem, reg=reg, init=(torch.randn_like(cold.f), 100 * torch.randn_like(cold.g)))
    assert bad.converged.all()


def test_members_that_do_not_converge_are_named():
    batch = together([HARD["random_cost_weights"], HARD["one_to_many"]])
    with pytest.warns(ConvergenceWarning, match="not converged"):
        result = batch_sinkhorn(batch, reg=1e-4, max_iter=6)
    assert result.converged.tolist() == [False, True]


@pytest.mark.parametrize("bad", [dict(reg=0.0), dict(reg=-1.0), dict(reg=float("nan")), dict(reg=1.0, max_iter=0)])
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError): batch_sinkhorn(clouds((), 5, 5), **bad)


def test_no_warning_when_all_is_well():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch_sinkhorn(clouds((5,), 20, 20), reg=1e-3)


def test_mass_that_may_stay_behind_is_refused():
    problem = clouds((), 5, 5)
    for free in (dict(rho=1.0), dict(mass=0.5)):
        with pytest.raises(NotImplementedError, match="moves all the mass"):
            batch_sinkhorn(Problem(problem.geometry, problem.a, problem.b, **free), reg=0.1)
