"Annealed Newton: every hard problem at every strength, and the answers of others"
import ot
import pytest
import torch
from problems import hard_problems

from ot_research import annealing, candidates
from ot_research.annealing import newton_sinkhorn, typical_cost
from ot_research.exact import exact
from ot_research.geometry import PointCloud
from ot_research.newton import newton
from ot_research.problem import Problem
from ot_research.products import dense_matrix
from ot_research.result import ConvergenceWarning
from ot_research.solvers import sinkhorn

HARD = hard_problems(80)
F64 = torch.float64


def clouds(n, m, d, seed=0):
    "Points with random weights"
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(k, d, generator=draw, dtype=F64) for k in (n, m))
    a, b = (torch.rand(k, generator=draw, dtype=F64) + 1e-3 for k in (n, m))
    return Problem(PointCloud(x, y), a / a.sum(), b / b.sum())


@pytest.mark.parametrize("name", HARD)
def test_hard_problems_at_every_strength(name):
    problem = HARD[name]
    unit = typical_cost(problem.geometry) or 1.0
    for strength in (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
        result = newton_sinkhorn(problem, reg=strength * unit)
        assert result.converged, f"{strength}: {result.status}"
        assert result.f.isfinite().all() and result.g.isfinite().all()


@pytest.mark.parametrize("name", HARD)
def test_hard_problems_in_float32(name):
    problem = HARD[name].to(torch.float32)
    for strength in (0.1, 1e-3, 1e-5):
        result = newton_sinkhorn(problem, reg=strength * typical_cost(problem.geometry))
        assert result.converged and result.potentials[0].dtype == torch.float32, f"{strength}: {result.status}"
        assert result.f.isfinite().all() and result.g.isfinite().all()


@pytest.mark.parametrize("weights", ["uniform", "random"])
@pytest.mark.parametrize("d", [2, 16, 64])
def test_a_thousand_points_on_all_pairs(d, weights):
    "The marginals of the plan written out, down to a millionth of the mean cost"
    problem = clouds(1000, 1000, d)
    if weights == "uniform": problem = Problem(problem.geometry)
    C, a, b = problem.geometry.cost_rows(slice(None)), problem.a, problem.b
    for strength in (0.1, 1e-2, 1e-3, 1e-5, 1e-6):
        reg = strength * C.mean().item()
        f, g = newton_sinkhorn(problem, reg=reg).potentials
        P = a[:, None] * b * ((f[:, None] + g - C) / reg).exp()
        assert (P.sum(1) - a).abs().sum() + (P.sum(0) - b).abs().sum() < 1e-6


@pytest.mark.parametrize("name", HARD)
def test_tiny_strengths_give_finite_potentials_and_an_honest_error(name):
    problem = HARD[name]
    result = newton_sinkhorn(problem, reg=1e-8 * (typical_cost(problem.geometry) or 1.0))
    assert result.f.isfinite().all() and result.g.isfinite().all() and result.marginal_error.isfinite()
    assert result.converged or result.marginal_error > result.tol


@pytest.mark.parametrize("d", [2, 16])
@pytest.mark.parametrize("strength", [0.3, 0.05, 0.01])
def test_the_potentials_are_sinkhorns(d, strength):
    problem = clouds(70, 50, d)
    reg = strength * typical_cost(problem.geometry)
    f, g = newton_sinkhorn(problem, reg=reg, tol=1e-11).potentials
    expected = sinkhorn(problem, reg=reg, tol=1e-11, max_iter=100_000).potentials
    for mine, theirs in zip((f, g), expected): torch.testing.assert_close(mine, theirs, atol=1e-8, rtol=0)


def test_the_value_approaches_the_linear_program():
    problem = clouds(60, 80, 2)
    exact = ot.emd2(problem.a.numpy(), problem.b.numpy(), problem.geometry.cost_rows(slice(None)).numpy())
    costs = [newton_sinkhorn(problem, reg=reg).plan.cost().item() for reg in (1e-2, 1e-3, 1e-5)]
    assert costs[0] > costs[1] > costs[2] > exact - 1e-6
    assert costs[2] - exact < 1e-4 * exact


def test_many_points_start_from_a_quarter_of_them():
    problem = clouds(5000, 5100, 3)
    assert newton_sinkhorn(problem, reg=1e-3).converged


@pytest.mark.parametrize("edges", [20_000, 200_000])
def test_a_plan_that_does_not_fit_in_memory_is_approached_from_below_or_by_sinkhorn(monkeypatch, edges):
    "At the strength asked for it fits; not so on the way, if the memory is small"
    monkeypatch.setattr(candidates, "_MEMORY", 64 * edges)
    monkeypatch.setattr(annealing, "_MANY", 600)
    problem = clouds(700, 800, 3)
    result = newton_sinkhorn(problem, reg=1e-4, max_iter=400)
    assert result.converged
    if edges > 100_000: assert exact(problem).converged


@pytest.mark.parametrize("reg", [0.2, 1e-5])
def test_a_walk_too_few_is_admitted(reg):
    with pytest.warns(ConvergenceWarning) as caught:
        result = newton_sinkhorn(clouds(60, 60, 2), reg=reg, tol=1e-15, max_iter=1)
    assert [str(w.message) for w in caught] == [result.status] and result.n_iter == len(result.log) == 1
    assert not result.converged and result.status.startswith("not converged") and result.f.isfinite().all()


def test_float32_is_solved_in_float64():
    problem = clouds(60, 60, 2).to(torch.float32)
    result = newton_sinkhorn(problem, reg=1e-4)
    assert result.converged and result.potentials[0].dtype == torch.float32 and "float64" in result.status


def test_points_without_mass_have_the_potential_of_the_soft_transform():
    problem = HARD["zero_weights"]
    reg = 0.01
    result = newton_sinkhorn(problem, reg=reg, tol=1e-10)
    scores = (result.g - problem.geometry.cost_rows(slice(None))) / reg
    soft = -reg * torch.logsumexp(problem.b.log() + scores, 1)
    torch.testing.assert_close(result.f, soft, atol=1e-8, rtol=0)


def test_a_kernel_that_cannot_be_balanced_ends_finite():
    half = torch.full((2,), 0.5, dtype=F64)
    solved = newton(dense_matrix(torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=F64)), half, half, 1e-6)
    assert solved.log_u.isfinite().all() and solved.log_v.isfinite().all() and solved.error > 0.1


def test_nothing_is_said(recwarn):
    newton_sinkhorn(clouds(60, 60, 2), reg=1e-3)
    assert not recwarn.list


def test_a_batch_is_its_members():
    draw = torch.Generator().manual_seed(1)
    x, y = torch.rand(2, 3, 40, 2, generator=draw, dtype=F64), torch.rand(30, 2, generator=draw, dtype=F64)
    a = torch.rand(3, 40, generator=draw, dtype=F64)
    a = a / a.sum(-1, keepdim=True)
    batch = newton_sinkhorn(Problem(PointCloud(x, y), a), reg=1e-3, tol=1e-10)
    assert batch.converged.shape == (2, 3) and batch.converged.all() and "annealed Newton" in batch.status
    for k in range(2):
        one = newton_sinkhorn(Problem(PointCloud(x[k, 1], y), a[1]), reg=1e-3, tol=1e-10)
        torch.testing.assert_close(batch.plan.dense()[k, 1], one.plan.dense(), atol=1e-9, rtol=0)


def test_a_warm_start_takes_fewer_walks():
    problem = HARD["zero_weights"]
    cold = newton_sinkhorn(problem, reg=1e-4)
    warm = newton_sinkhorn(problem, reg=1e-4, init=cold.potentials)
    assert warm.converged and warm.n_iter == 1 < cold.n_iter


@pytest.mark.parametrize("name", ["uneven_weights", "outlier", "clusters"])
def test_a_bad_warm_start_is_survived(name):
    problem = HARD[name]
    noise = torch.randn(len(problem.b), generator=torch.Generator().manual_seed(0), dtype=F64)
    result = newton_sinkhorn(problem, reg=1e-5, init=(0 * problem.a, 10 * noise))
    assert result.converged


def test_a_strength_that_rounding_eats_is_refused():
    with pytest.raises(ValueError, match="lost in the rounding"): newton_sinkhorn(clouds(9, 9, 2), reg=1e-18)
    with pytest.raises(ValueError, match="reg must be"): newton_sinkhorn(clouds(9, 9, 2), reg=0.0)
