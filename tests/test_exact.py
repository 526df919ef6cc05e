"Certified exact transport: the optimum lies between the bounds, whatever the problem"
import ot
import pytest
import torch
from problems import hard_problems

from ot_research.exact import exact
from ot_research.geometry import DenseCost, PointCloud
from ot_research.oracles import assignment
from ot_research.plan import Transport
from ot_research.problem import Problem
from ot_research.result import ConvergenceWarning

HARD = hard_problems(80)
F64 = torch.float64


def optimum(problem: Problem) -> float:
    "By POT's network simplex; forbidden pairs cost too much"
    C = problem.geometry.cost_rows(slice(None))
    C = C.clamp(max=1e3 * C[C.isfinite()].abs().max().item() + 1)
    a, b = ((w / problem.mass).numpy() for w in (problem.a, problem.b))
    return ot.emd2(a, b, C.numpy(), numItermax=10**7) * problem.mass.item()


def holds(problem: Problem, found) -> None:
    "The optimum is between the bounds, and the plan is feasible and has its price"
    truth, scale = optimum(problem), problem.geometry.survey.largest.item() * problem.mass.item()
    bounds = found.certificate()
    plan = bounds.plan
    assert bounds.lower <= truth + 1e-13 * scale and truth <= bounds.upper + 1e-13 * scale
    for sums, weights in ((plan.row, problem.a), (plan.col, problem.b)):
        torch.testing.assert_close(sums, weights, atol=1e-13 * problem.mass.item(), rtol=0)
    price = (plan.dense() * problem.geometry.cost_rows(slice(None))).nan_to_num(nan=0).sum().item()
    assert abs(price - bounds.upper) < 1e-12 * scale


@pytest.mark.parametrize("name", HARD)
def test_hard_problems(name):
    found = exact(HARD[name])
    assert found.converged and found.f.isfinite().all() and found.g.isfinite().all()
    holds(HARD[name], found)


@pytest.mark.parametrize("tol", [1e-7, 1e-10])
@pytest.mark.parametrize("name", ["rectangular", "wide", "uneven_weights", "clusters"])
def test_narrow_gaps(name, tol):
    found = exact(HARD[name], tol=tol)
    assert found.converged
    holds(HARD[name], found)


def clusters(draw, x, y):
    "A third of the sources is elsewhere, and two thirds of the targets"
    for points, share in ((x, 0.3), (y, 0.6)): points += 3 * (torch.rand(len(points), 1, generator=draw) < share)
    return PointCloud(x, y)


def duplicates(draw, x, y):
    return PointCloud(*(z[torch.randint(1 + len(z) // 5, (len(z),), generator=draw)] for z in (x, y)))


def costs(change):
    "A matrix of costs, made from that between the points"
    return lambda draw, x, y: DenseCost(change(PointCloud(x, y).cost_rows(slice(None)), draw))


def ties(C, draw): return torch.randint(5, C.shape, generator=draw).to(C)


def barred(C, draw):
    "Three pairs in ten, but for a staircase of pairs that will do for uniform weights"
    n, m = C.shape
    k = torch.arange(n * m)
    closed = torch.rand(C.shape, generator=draw) < 0.3
    closed[k // m, k // n] = False
    return C.masked_fill(closed, torch.inf)


SORTS = dict(
    uniform=lambda draw, x, y: PointCloud(x, y),
    gaussian=lambda draw, x, y: PointCloud(torch.special.ndtri(x), torch.special.ndtri(y) + 1),
    noise=lambda draw, x, y: PointCloud(x[: len(y)], x[: len(y)] + 0.02 * y[: len(x)]),
    clusters=clusters, duplicates=duplicates,
    outlier=lambda draw, x, y: PointCloud(x, torch.cat([y[1:], y[:1] + 1e3])),
    heavy_tails=lambda draw, x, y: PointCloud(1 / x, 1 / y),
    grid=lambda draw, x, y: PointCloud((5 * x[:, :2]).round(), (5 * y[:, :2]).round()),
    random_cost=costs(lambda C, draw: torch.rand(C.shape, generator=draw, dtype=F64)),
    ties=costs(ties), offset=costs(lambda C, draw: C + 1e3),
    tiny=costs(lambda C, draw: 1e-6 * C), huge=costs(lambda C, draw: 1e6 * C), forbidden=costs(barred),
)


@pytest.mark.parametrize("seed", range(17))
@pytest.mark.parametrize("sort", SORTS)
def test_random_problems(sort, seed):
    "Of few points and of some, as many on both sides or not, uniform weights and others, one to sixteen coordinates"
    draw = torch.Generator().manual_seed(seed)
    most = (3, 20, 60, 60, 120)[seed % 5]
    n, m, d = (int(torch.randint(1, top, (), generator=draw)) for top in (most, most, 17))
    geometry = SORTS[sort](draw, *(torch.rand(k, d, generator=draw, dtype=F64) for k in (n, m)))
    a, b = (torch.rand(k, generator=draw, dtype=F64).pow(3) + 1e-9 for k in geometry.shape)
    uniform = seed % 3 == 0 or sort == "forbidden"
    problem = Problem(geometry) if uniform else Problem(geometry, a / a.sum(), b / b.sum())
    found = exact(problem)
    assert found.converged and found.f.isfinite().all() and found.g.isfinite().all()
    holds(problem, found)


def test_looks_too_few_are_admitted():
    with pytest.warns(ConvergenceWarning): found = exact(HARD["wide"], tol=1e-12, max_iter=1)
    assert not found.converged and len(found.log) == 1
    holds(HARD["wide"], found)


def test_a_matching_is_the_best_one():
    draw = torch.Generator().manual_seed(0)
    C = torch.rand(120, 120, generator=draw, dtype=F64)
    permutation = exact(Problem(DenseCost(C)), tol=1e-9).plan.assignment()
    assert torch.equal(permutation, assignment(C))


def test_a_matching_needs_a_square():
    with pytest.raises(ValueError, match="not 40 and 80"): exact(HARD["rectangular"]).plan.assignment()


def test_thousands_of_points_within_the_bounds():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.rand(5000, 3, generator=draw, dtype=F64) for _ in range(2))
    problem = Problem(PointCloud(x, y))
    found = exact(problem)
    assert found.converged and len(found.plan.edges) < 100 * 5000
    holds(problem, found)


def test_many_copies_of_few_points():
    "Colors on a coarse lattice, thousands of points on some dozens of places: a sparse plan, feasible and as cheap"
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(k, 3, generator=draw, dtype=F64).round() for k in (2000, 1500))
    a, b = (torch.rand(len(t), generator=draw, dtype=F64) for t in (x, y))
    a[::7] = 0
    problem = Problem(PointCloud(x, y), a / a.sum(), b / b.sum())
    found = exact(problem, tol=1e-8)
    assert found.converged and len(found.plan.edges) < 3 * (2000 + 1500)
    holds(problem, found)
    f, places = found.f[a > 0], x[a > 0].unique(dim=0, return_inverse=True)[1]
    first = torch.zeros(places.max() + 1, dtype=F64).scatter_(0, places, f)
    assert torch.equal(first[places], f)


def test_all_points_the_same():
    found = exact(Problem(PointCloud(torch.ones(50, 2), torch.ones(30, 2))))
    assert found.converged and abs(found.value) < 1e-6 and len(found.plan.edges) <= 80


def test_the_result_is_an_ordinary_one():
    problem = HARD["zero_weights"]
    result = exact(problem)
    bounds, plan, C = result.certificate(), result.plan, problem.geometry.cost_rows(slice(None))
    assert isinstance(plan, Transport) and bounds.plan is not None and result.reg == 0 and result.tol == 1e-4
    assert bounds.gap <= 1e-4 and result.value == result.value_linear == bounds.upper
    assert result.marginal_error < 1e-14 and result.n_iter == len(result.log) and "converged" in result.status
    f, g = result.potentials
    torch.testing.assert_close(problem.a @ f, problem.b @ g)
    y = problem.geometry.y
    torch.testing.assert_close(plan @ y, plan.project(y) * plan.row[:, None])
    nobody = problem.a == 0   # goes to where it is cheapest, at the prices g
    cheapest = (C - torch.where(problem.b > 0, result.g, -torch.inf)).argmin(1)
    torch.testing.assert_close(plan.project(y)[nobody], y[cheapest][nobody])
    assert (plan.dense()[nobody] == 0).all() and (plan.T.project(y[:, :1]).isfinite()).all()


def test_a_point_that_may_go_nowhere():
    C = torch.tensor([[1.0, 2.0], [torch.inf, torch.inf]], dtype=F64)
    result = exact(Problem(DenseCost(C), torch.tensor([1.0, 0.0], dtype=F64)))
    assert result.converged and abs(result.value - 1.5) < 1e-12
    assert result.f.isfinite().all()
    assert result.plan.project(torch.ones(2, 1, dtype=F64)).tolist() == [[1.0], [0.0]]


def test_float32_comes_back():
    wide = HARD["rectangular"]
    result = exact(wide.to(torch.float32))
    given = (result.value, result.plan.row, result.plan.dense(), *result.potentials)
    assert {t.dtype for t in given} == {torch.float32}
    assert result.converged and result.certificate().lower.dtype == F64
    holds(wide.to(torch.float32).to(F64), result)


def test_a_batch_is_its_members():
    draw = torch.Generator().manual_seed(0)
    C, a = torch.rand(2, 3, 20, 15, generator=draw, dtype=F64), torch.rand(20, generator=draw, dtype=F64)
    batch = exact(Problem(DenseCost(C), a / a.sum()))
    bounds, P = batch.certificate(), batch.plan.dense()
    assert batch.converged.shape == (2, 3) and batch.converged.all()
    for k in range(3):
        one = exact(Problem(DenseCost(C[1, k]), a / a.sum()))
        assert bounds.lower[1, k] == one.certificate().lower and bounds.upper[1, k] == one.certificate().upper
        torch.testing.assert_close(P[1, k], one.plan.dense())
    assert batch.plan.row.shape == (2, 3, 20) and (batch.plan.row - a / a.sum()).abs().max() < 1e-14


def test_an_assignment_in_a_batch():
    C = torch.rand(3, 30, 30, generator=torch.Generator().manual_seed(0), dtype=F64)
    assert torch.equal(exact(Problem(DenseCost(C)), tol=1e-9).plan.assignment(), assignment(C))
    weights = torch.arange(1.0, 31, dtype=F64)
    uneven = exact(Problem(DenseCost(C), weights / weights.sum()))
    with pytest.raises(ValueError, match="uniform"): uneven.plan.assignment()
