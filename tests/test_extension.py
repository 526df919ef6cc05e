"New points: the extension is the plan at old points, whatever the cost, the weights, the type and the batch"
import pytest
import torch
from torch.testing import assert_close

from ot_research import solve_sample
from ot_research.extension import choose_reg, held_out_bound, map_at, plan_at, potential_at, turned

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("as_installed")


def clouds(n=30, m=20, d=3, dtype=F64):
    x, y, a, b = torch.rand(n, d), torch.rand(m, d), torch.rand(n) + 0.1, torch.rand(m) + 0.1
    return [t.to(dtype) for t in (x, y, a / a.sum(), b / b.sum())]


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", "cosine", lambda x, y: torch.cdist(x, y, p=1)])
@pytest.mark.parametrize("mass", [1.0, 7.0])
def test_at_old_points_it_is_the_old_plan(cost, mass):
    x, y, a, b = clouds()
    result = solve_sample(x, y, mass * a, mass * b, cost=cost, reg=0.1, tol=1e-11)
    assert_close(plan_at(result, x).dense() * mass * a[:, None], result.plan.dense(), rtol=1e-7, atol=1e-12)
    assert_close(potential_at(result, x), result.potentials[0], rtol=0, atol=1e-9)
    assert_close(potential_at(turned(result), y), result.potentials[1], rtol=0, atol=1e-9)
    assert_close(map_at(turned(result), y), result.plan.T.project(x), rtol=1e-7, atol=1e-9)


def test_turning_twice_turns_back():
    result = solve_sample(*clouds(), reg=0.1)
    again = turned(turned(result))
    assert_close(again.plan.dense(), result.plan.dense())
    assert_close(again.value, result.value)


def test_every_new_point_carries_one_unit():
    x, y, a, b = clouds()
    b[:5] = 0
    b /= b.sum()
    plan = plan_at(solve_sample(x, y, a, b, reg=0.01), 100 * torch.rand(7, 3, dtype=F64))
    assert_close(plan.row, torch.ones(7, dtype=F64))
    assert (plan.dense()[:, :5] == 0).all()


@pytest.mark.parametrize("reg", [0.1, 1e-3])
def test_single_precision_stays_and_is_accurate(reg):
    x, y, a, b = clouds(dtype=torch.float32)
    new, result = torch.rand(5, 3), solve_sample(x, y, a, b, reg=reg, max_iter=50_000)
    wide = solve_sample(*(t.double() for t in (x, y, a, b)), reg=reg, tol=1e-4, max_iter=50_000)
    moved = map_at(result, new)
    assert moved.dtype == potential_at(result, new).dtype == torch.float32
    assert_close(moved.double(), map_at(wide, new.double()), rtol=0, atol=2e-3)


def test_a_batch_is_extended_problem_by_problem():
    x, y, new = (torch.rand(4, k, 2, dtype=F64) for k in (10, 8, 3))
    batch = map_at(solve_sample(x, y, reg=0.1, tol=1e-11), new)
    for one, *clouds, points in zip(batch, x, y, new):
        assert_close(one, map_at(solve_sample(*clouds, reg=0.1, tol=1e-11), points), rtol=0, atol=1e-8)


def test_between_gaussians_the_map_is_nearly_linear():
    x, z, new = (torch.randn(k, 2, dtype=F64) for k in (1500, 1500, 200))
    M = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    off = map_at(solve_sample(x, z @ M, reg=0.1, tol=1e-4), new) - new @ M
    assert off.square().sum(1).mean() < 0.05 * (new @ M).square().sum(1).mean()


@pytest.mark.parametrize("reg", [1.0, 0.01])
def test_what_is_proven_about_fresh_points_is_true(reg):
    x, y, *_ = clouds()
    fresh = torch.rand(25, 3, dtype=F64), torch.rand(15, 3, dtype=F64)
    truth = solve_sample(*fresh, reg=0).certificate()
    assert held_out_bound(solve_sample(x, y, reg=reg), *fresh) <= truth.upper


def test_the_rule_is_homogeneous_and_repeats():
    x, y, *_ = clouds(60, 60)
    reg = choose_reg(x, y)
    assert choose_reg(x, y) == reg
    assert choose_reg(10 * x, 10 * y) == pytest.approx(100 * reg)
