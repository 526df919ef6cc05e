"What a plan and a certificate must be, whoever made them"
import math
from dataclasses import replace

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ot_research.geometry import DenseCost, PointCloud
from ot_research.plan import Certificate, Plan, dual_bound, rounded_cost
from ot_research.problem import Problem
from ot_research.result import OTResult
from ot_research.scaling import annealed
from ot_research.solvers import ipot, sinkhorn

F64 = torch.float64
as_installed = pytest.mark.usefixtures("as_installed")


def close(a, b, tol): torch.testing.assert_close(a, b, atol=tol, rtol=0)


def random_problem(seed: int, cost=None) -> Problem:
    "Uniform clouds in 1 to 16 dimensions, n != m, a third of the weights zero in every other one"
    draw = torch.Generator().manual_seed(seed)
    n, m = torch.randint(1, 40, (2,), generator=draw).tolist()
    x, y = (torch.rand(k, 1 + seed % 16, generator=draw, dtype=F64) for k in (n, m + (n == m)))
    a, b = (torch.rand(len(t), generator=draw, dtype=F64) for t in (x, y))
    if seed % 2: a, b = (w * (torch.arange(len(w)) % 3 < 2) for w in (a, b))
    geometry = PointCloud(x, y) if cost is None else DenseCost(cost(n, len(y), draw))
    return Problem(geometry, a / a.sum(), b / b.sum())


def random_result(seed: int) -> OTResult:
    "From nearly converged to hardly begun"
    problem = random_problem(seed)
    mean = problem.geometry.cost_rows(slice(None)).mean().item()
    if seed % 4 == 0: return ipot(problem, beta=0.03 * mean, n_iter=10 + seed // 4)
    return sinkhorn(problem, reg=10.0 ** -(seed % 4) * mean, tol=0, max_iter=1 + seed % 64)


def linear_program(problem: Problem) -> float:
    cost = problem.geometry.cost_rows(slice(None)).contiguous()
    return ot.emd2(problem.a.numpy(), problem.b.numpy(), cost.numpy(), numItermax=10**6)


def bounds(problem: Problem, f, g, eps: float) -> Certificate:
    return OTResult(problem, f, g, eps, reg=0.0, tol=1e-4, n_iter=0).certificate()


# --- Certificates ---

@as_installed
def test_the_linear_program_lies_inside_the_certificate_of_200_problems():
    for seed in range(200):
        result = random_result(seed)
        W, found = linear_program(result.problem), result.certificate()
        assert found.lower - 1e-12 <= W <= found.upper + 1e-12, seed


def test_costs_of_both_signs_are_bounded_too():
    for seed in range(20):
        problem = random_problem(seed, lambda n, m, draw: torch.randn(n, m, generator=draw, dtype=F64))
        found = sinkhorn(problem, reg=0.1, tol=0, max_iter=20).certificate()
        assert found.lower - 1e-12 <= linear_program(problem) <= found.upper + 1e-12


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e3))
def test_any_potentials_are_repaired_to_bounds(seed, scale):
    problem = random_problem(seed)
    draw = torch.Generator().manual_seed(seed)
    f, g = (scale * torch.randn(w.shape, generator=draw, dtype=F64) for w in (problem.a, problem.b))
    found = bounds(problem, f, g, 0.5)
    assert found.lower - 1e-9 * scale <= linear_program(problem) <= found.upper * (1 + 1e-9)


def test_the_certificate_does_not_feel_the_gauge():
    result = sinkhorn(random_problem(3), reg=0.02, tol=1e-9)
    moved = replace(result, f=result.f + 1e4, g=result.g - 1e4)
    close(moved.certificate().lower, result.certificate().lower, 1e-10)
    close(moved.certificate().upper, result.certificate().upper, 1e-9)


def test_rounding_makes_a_plan_with_both_marginals_and_prices_it():
    for seed in range(20):
        result = random_result(seed)
        a, b, P = result.problem.a, result.problem.b, result.plan.dense()
        P = P * torch.where(a > 0, a / P.sum(1), 0).clamp(max=1)[:, None]
        P = P * torch.where(b > 0, b / P.sum(0), 0).clamp(max=1)
        r, s = a - P.sum(1), b - P.sum(0)
        if s.sum() > 1e-14: P = P + r[:, None] * s / s.sum()
        close(P.sum(1), a, 1e-13)
        close(P.sum(0), b, 1e-13)
        price = (P * result.problem.geometry.cost_rows(slice(None))).sum()
        close(rounded_cost(result.problem, result.plan), price, 1e-12)


def test_one_more_c_transform_never_lowers_the_lower_bound():
    problem = random_problem(8)
    g = torch.randn(problem.b.shape, dtype=F64)
    f = problem.geometry.hardmin(g.masked_fill(problem.b == 0, -math.inf))
    assert dual_bound(problem, g) >= (problem.a * f).sum() + (problem.b * g).sum() - 1e-12


def test_an_unrounded_price_can_lie_below_the_optimum():
    x, y = torch.rand(30, 2, dtype=F64), torch.rand(20, 2, dtype=F64) + 0.5
    early = sinkhorn(Problem(PointCloud(x, y)), reg=1e-3, tol=0, max_iter=3)
    assert early.value_linear < early.certificate().lower < early.certificate().upper


def test_an_infinite_upper_bound_has_an_infinite_gap():
    lower, upper = torch.tensor([0.5, 1.0]), torch.tensor([math.inf, 1.0])
    assert Certificate(lower, upper).gap.tolist() == [math.inf, 0.0]


def test_the_certificate_of_a_batch_is_that_of_its_members():
    C = torch.rand(3, 12, 9, dtype=F64)
    together = ipot(Problem(DenseCost(C)), beta=0.05, n_iter=40).certificate()
    for k in range(3):
        alone = ipot(Problem(DenseCost(C[k])), beta=0.05, n_iter=40).certificate()
        close(together.lower[k], alone.lower, 1e-13)
        close(together.upper[k], alone.upper, 1e-13)


# --- Plans ---

@settings(max_examples=40)
@given(seed=st.integers(0, 10**6), batch=st.sampled_from([(), (2,), (2, 3)]), dense=st.booleans(),
       eps=st.sampled_from([10.0, 0.1, 0.01]), dtype=st.sampled_from([torch.float32, F64]))
def test_a_plan_does_what_its_matrix_does(seed, batch, dense, eps, dtype):
    draw = torch.Generator().manual_seed(seed)
    n, m, k = torch.randint(1, 12, (3,), generator=draw).tolist()
    new = lambda *shape: torch.rand(*batch, *shape, generator=draw, dtype=dtype)
    geometry = DenseCost(new(n, m)) if dense else PointCloud(new(n, 3), new(m, 3))
    log_u, log_v = new(n), new(m)
    log_v[..., 1:] = log_v[..., 1:].masked_fill(new(m - 1) < 0.3, -math.inf)
    plan, V, A, B = Plan(geometry, log_u, log_v, eps, dtype), new(m, k), new(n, 2), new(m, 2)
    P, C = plan.dense(), geometry.cost_rows(slice(None))
    tol = 3e-4 if dtype == torch.float32 else 1e-12

    def same(ours, theirs): torch.testing.assert_close(ours, theirs, atol=tol, rtol=tol)
    same(plan @ V, P @ V)
    same(plan.T @ A, P.mT @ A)
    same(plan.row, P.sum(-1))
    same(plan.col, P.sum(-2))
    same(plan.cost(), (P * C).sum((-1, -2)))
    same(plan.weighted(A, B, V), (P * (A @ B.mT)) @ V)
    same(plan.project(V) * plan.row.unsqueeze(-1), P @ V)
    if not batch: same(plan @ V[:, 0], P @ V[:, 0])


def test_absent_mass_is_absent_to_the_last_bit():
    x, y, a, b = torch.rand(20, 2), torch.rand(15, 2), torch.rand(20, dtype=F64), torch.rand(15, dtype=F64)
    a[::3], b[::4] = 0, 0
    problem = Problem(PointCloud(x, y), a / a.sum(), b / b.sum())
    for result in (sinkhorn(problem, reg=0.01), ipot(problem, beta=0.05)):
        P, one = result.plan.dense(), torch.eye(15, dtype=F64)
        assert (P[::3] == 0).all() and (P[:, ::4] == 0).all()
        assert (result.plan.row[::3] == 0).all() and ((result.plan @ one)[:, ::4] == 0).all()
        assert all(f.isfinite().all() for f in result.potentials)


def test_a_product_has_a_gradient_in_what_it_multiplies():
    plan = sinkhorn(Problem(DenseCost(torch.rand(6, 5, dtype=F64))), reg=0.1).plan
    V = torch.rand(5, 2, dtype=F64, requires_grad=True)
    (plan @ V).sum().backward()
    close(V.grad, plan.col.unsqueeze(-1).expand(5, 2), 1e-12)


# --- Results ---

def test_value_is_cost_plus_entropy_at_convergence():
    problem = random_problem(4)
    result = sinkhorn(problem, reg=0.1, tol=1e-12)
    P, ab = result.plan.dense(), problem.a[:, None] * problem.b
    close(result.value, result.value_linear + 0.1 * torch.special.xlogy(P, P / ab).sum(), 1e-11)


def test_value_needs_no_unit_mass():
    C, a, b = torch.rand(8, 6, dtype=F64), torch.rand(8, dtype=F64), torch.rand(6, dtype=F64)
    a, b = 5 * a / a.sum(), 5 * b / b.sum()
    five, one = (sinkhorn(Problem(DenseCost(C), a / k, b / k), reg=0.1, tol=1e-12) for k in (1, 5))
    P = five.plan.dense()
    close(five.value_linear, 5 * one.value_linear, 1e-11)
    close(five.value, five.value_linear + 0.1 * (P * (P / (a[:, None] * b)).log()).sum(), 1e-11)


def test_potentials_are_balanced_and_make_the_plan():
    for seed in (1, 2, 3):
        result = sinkhorn(random_problem(seed), reg=0.05, tol=1e-10)
        (f, g), p = result.potentials, result.problem
        close((p.a * f).sum(), (p.b * g).sum(), 1e-13)
        C = p.geometry.cost_rows(slice(None))
        close(p.a[:, None] * p.b * ((f[:, None] + g - C) / 0.05).exp(), result.plan.dense(), 1e-12)


def test_potentials_of_massless_points_are_soft_c_transforms():
    problem = random_problem(5)
    result = sinkhorn(problem, reg=0.05, tol=1e-11)
    f, g = result.potentials
    scores = problem.b.log() + (g - problem.geometry.cost_rows(slice(None))) / 0.05
    assert (problem.a == 0).any()
    close(f, -0.05 * scores.logsumexp(1), 1e-9)


def test_marginal_error_is_relative_to_the_mass():
    cost, a, b = DenseCost(torch.rand(8, 6)), torch.ones(8, dtype=F64) / 8, torch.ones(6, dtype=F64) / 6
    one, ten = (sinkhorn(Problem(cost, k * a, k * b), reg=0.05, tol=0, max_iter=5) for k in (1, 10))
    close(one.marginal_error, ten.marginal_error, 1e-14)
    close(one.marginal_error, (one.plan.row - 1 / 8).abs().sum() + (one.plan.col - 1 / 6).abs().sum(), 1e-14)


def test_results_have_the_type_and_shape_of_the_input():
    problem = Problem(DenseCost(torch.rand(2, 3, 8, 6)))
    for result in (sinkhorn(problem, reg=1e-4, tol=0, max_iter=9), ipot(problem, beta=0.1)):
        assert "float64" in result.note and result.f.dtype == F64
        given = (result.value, result.value_linear, result.marginal_error, result.plan.dense())
        assert {t.dtype for t in (*given, *result.potentials, *result.marginals)} == {torch.float32}
        assert result.value.shape == result.converged.shape == result.certificate().gap.shape == (2, 3)


def test_a_result_at_another_strength_is_not_converged():
    problem = random_problem(4)
    early = sinkhorn(problem, reg=1e-3, schedule=annealed(1e-3, start=1.0), tol=0, max_iter=10)
    early = replace(early, tol=10.0)
    assert early.eps > early.reg and early.marginal_error <= early.tol and not early.converged
    assert "only came down to" in early.status


@pytest.mark.parametrize("C", [torch.zeros(5, 4), torch.ones(5, 4), torch.zeros(5, 4, dtype=F64)])
def test_a_constant_cost_is_certified(C):
    exact = ipot(Problem(DenseCost(C)), beta=0.1, n_iter=50)
    W = (exact.problem.a.double().sum() * C[0, 0]).item()
    assert exact.converged and exact.certificate().lower <= W <= exact.certificate().upper


# --- Problems ---

def test_a_batch_of_weights_shares_the_cost_without_a_copy():
    C = torch.rand(7, 5)
    problem = Problem(DenseCost(C), torch.rand(100, 7).softmax(-1))
    assert problem.geometry.C.data_ptr() == C.data_ptr() and problem.geometry.shape == (100, 7, 5)
    assert problem.b.shape == (100, 5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_masses_agree_to_the_last_digit(dtype):
    a, b = torch.rand(50, 30, dtype=dtype).softmax(-1), torch.rand(20, dtype=dtype).softmax(-1)
    problem = Problem(DenseCost(torch.rand(30, 20, dtype=dtype)), 3 * a, 3 * b * (1 + 1e-7))
    close(problem.a.sum(-1), problem.b.sum(-1), 8 * torch.finfo(dtype).eps)


@as_installed
def test_batches_that_do_not_broadcast_are_refused_by_name():
    with pytest.raises(ValueError, match=r"a \(2, 7\), b \(3, 5\) and the cost \(7, 5\) do not broadcast"):
        Problem(DenseCost(torch.rand(7, 5)), torch.full((2, 7), 1 / 7), torch.full((3, 5), 1 / 5))


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_forbidden_pairs_are_refused_just_when_no_plan_avoids_them(seed, share):
    draw = torch.Generator().manual_seed(seed)
    C = torch.zeros(6, 5, dtype=F64).masked_fill(torch.rand(6, 5, generator=draw) < share, math.inf)
    a, b = (torch.rand(k, generator=draw, dtype=F64).softmax(-1) for k in (6, 5))
    stranded = ot.emd2(a.numpy(), b.numpy(), C.isinf().double().numpy())
    if stranded > 1e-6:
        with pytest.raises(ValueError, match="infeasible"): Problem(DenseCost(C), a, b)
    else: Problem(DenseCost(C), a, b)
