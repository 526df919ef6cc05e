"What must hold wherever mass may stay behind, at a price or within a budget"
import math
from dataclasses import replace

import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ot_research import solve, solve_sample
from ot_research.extension import map_at, potential_at, turned
from ot_research.geometry import DenseCost, PointCloud
from ot_research.marginals import Capped, Held, settled
from ot_research.problem import Problem
from ot_research.result import ConvergenceWarning
from ot_research.scaling import half_step, over_relaxed
from ot_research.solvers import ipot, sinkhorn

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("as_installed")
WAYS = [*(dict(rho=rho) for rho in (0.3, (0.05, 2.0), (None, 0.2), (0.2, math.inf))), dict(mass=0.4)]
ways = pytest.mark.parametrize("way", WAYS, ids=str)
seeds = st.integers(0, 10**6)


def problem(seed: int, *batch: int) -> tuple:
    "Clouds of up to a dozen points, source weights of sum 1 and target weights of sum 1.3, some of them 0"
    draw = torch.Generator().manual_seed(seed)
    n, m = torch.randint(2, 12, (2,), generator=draw).tolist()
    x, y = (torch.rand(*batch, k, 2, generator=draw, dtype=F64) for k in (n, m))
    a, b = (torch.rand(*batch, k, generator=draw, dtype=F64) + 0.1 for k in (n, m))
    if seed % 2: a[..., 0] = b[..., 1] = 0
    return x, y, a / a.sum(-1, keepdim=True), 1.3 * b / b.sum(-1, keepdim=True)


def squares(x, y): return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
def kl(p, q): return (torch.xlogy(p, p) - torch.xlogy(p, q) - p + q).sum()


def flipped(way: dict) -> dict:
    "The same demands with the sides exchanged"
    return {k: v[::-1] if isinstance(v, tuple) else v for k, v in way.items()}


def scaled(way: dict, **by: float) -> dict:
    "Demands in another unit"
    times = lambda v, s: v if v is None else v * s
    return {k: tuple(times(one, by.get(k, 1)) for one in v) if isinstance(v, tuple) else v * by.get(k, 1)
            for k, v in way.items()}


def objective(P, C, a, b, reg, rho=None, mass=None):
    "What is minimized, entropy included"
    if mass is not None: return (P * C).sum() + reg * (kl(P, a[:, None] * b) + P.sum() - a.sum() * b.sum())
    rho = rho if isinstance(rho, tuple) else (rho, rho)
    soft = [(r, p, w) for r, p, w in zip(rho, (P.sum(1), P.sum(0)), (a, b)) if r and r < math.inf]
    return (P * C).sum() + reg * kl(P, a[:, None] * b) + sum(r * kl(p, w) for r, p, w in soft)


# --- What a solution is ---

@ways
@settings(max_examples=25)
@given(seed=seeds, reg=st.sampled_from([1.0, 0.1, 0.02]))
def test_value_is_the_objective_of_the_plan(way, seed, reg):
    x, y, a, b = problem(seed)
    C, result = squares(x, y), solve_sample(x, y, a, b, reg=reg, tol=1e-10, max_iter=50_000, **way)
    assert_close(result.value, objective(result.plan.dense(), C, a, b, reg, **way), rtol=1e-7, atol=1e-9)
    assert_close(result.value_linear, (result.plan.dense() * C).sum(), rtol=1e-10, atol=1e-12)


@ways
@settings(max_examples=25)
@given(seed=seeds)
def test_no_plan_nearby_is_better(way, seed):
    x, y, a, b = problem(seed - seed % 2)
    C, P = squares(x, y), solve_sample(x, y, a, b, reg=0.1, tol=1e-12, max_iter=50_000, **way).plan.dense()
    draw = torch.Generator().manual_seed(seed)
    bend = 1e-3 * torch.randn(P.shape, generator=draw, dtype=F64).clamp(-1, 1) * P
    rows, cols = (isinstance(r, tuple) and (r[k] is None or r[k] == math.inf) for k, r in
                  enumerate([way.get("rho")] * 2))
    if rows or "mass" in way: bend = bend - P * (bend.sum(1) / P.sum(1))[:, None]  # keeps the rows
    if cols or "mass" in way: bend = bend - P * (bend.sum(0) / P.sum(0))           # keeps the columns
    if "mass" in way:  # and the rows again, nearly: full ones must not grow
        for _ in range(200):
            bend = bend - P * (bend.sum(1) / P.sum(1))[:, None]
            bend = bend - P * (bend.sum(0) / P.sum(0))
    here, there = (objective(p, C, a, b, 0.1, **way) for p in (P, P + bend))
    assert there >= here - 1e-12


@settings(max_examples=50)
@given(seed=seeds, mass=st.floats(0.05, 1.0))
def test_a_budget_is_used_and_no_point_gives_more_than_it_has(seed, mass):
    x, y, a, b = problem(seed)
    result = solve_sample(x, y, a, b, reg=0.05, mass=mass, tol=1e-10, max_iter=50_000)
    assert_close(result.plan.row.sum().item(), mass, rtol=1e-12, atol=0)
    assert (result.plan.row <= a * (1 + 1e-8) + 1e-9).all() and (result.plan.col <= b * (1 + 1e-12)).all()


@settings(max_examples=100)
@given(seed=seeds, mass=st.floats(1e-6, 1.0), spread=st.sampled_from([0.0, 1.0, 100.0, 1e4]),
       dtype=st.sampled_from([torch.float32, F64]))
def test_the_answer_of_a_budget_moves_it(seed, mass, spread, dtype):
    draw = torch.Generator().manual_seed(seed)
    w = torch.rand(2, 30, generator=draw, dtype=dtype) * (torch.rand(2, 30, generator=draw) < 0.7)
    w[:, 3] += 0.1
    if seed % 3 == 0: w = (w > 0).to(dtype)  # partial sums that meet the mass exactly
    free = spread * torch.randn(2, 30, generator=draw, dtype=dtype).round(decimals=seed % 3)  # with ties
    side = Capped(w, mass * w.sum(-1))
    phi = side.answer(free, 1.0)
    row = torch.where(w > 0, w * (phi - free).exp(), 0)
    digit = 100 * torch.finfo(dtype).eps
    assert (phi <= free).all() and phi.isfinite().all()
    assert_close(row.sum(-1), side.mass, rtol=digit * (1 + spread), atol=0)
    assert_close(row, torch.where(w > 0, w * side.share(phi, free, 1.0).exp(), 0), rtol=digit, atol=0)
    left, ceiling = w.sum(-1) - side.mass, phi.masked_fill(w == 0, -1e9).amax(-1)
    assert_close(side.worth(phi), (w * phi).sum(-1) - left * ceiling,
                 rtol=1e3 * digit, atol=1e3 * digit * (1 + spread))


@settings(max_examples=50)
@given(seed=seeds, rho=st.sampled_from([1e-3, 1.0, 1e3, math.inf]))
def test_worth_is_the_least_over_all_marginals(seed, rho):
    draw = torch.Generator().manual_seed(seed)
    side = Held(torch.rand(5, generator=draw, dtype=F64), rho)
    f = 0.1 * min(rho, 1.0) * torch.randn(5, generator=draw, dtype=F64)
    best = side.weight * (-f / rho).exp()
    assert_close(side.worth(f), (f * best).sum() + side.price(best), rtol=1e-9, atol=1e-12)
    for _ in range(5):
        other = best * torch.rand(5, generator=draw, dtype=F64)
        if rho < math.inf: assert side.worth(f) <= (f * other).sum() + side.price(other) + 1e-12


# --- Symmetries ---

@ways
@settings(max_examples=25)
@given(seed=seeds)
def test_exchanging_the_sides_transposes_the_plan(way, seed):
    x, y, a, b = problem(seed)
    one = solve_sample(x, y, a, b, reg=0.1, tol=1e-12, max_iter=50_000, **way)
    other = solve_sample(y, x, b, a, reg=0.1, tol=1e-12, max_iter=50_000, **flipped(way))
    assert_close(one.plan.dense(), other.plan.dense().T, rtol=1e-7, atol=1e-10)
    assert_close(one.value, other.value, rtol=1e-8, atol=1e-10)


@ways
@settings(max_examples=25)
@given(seed=seeds, unit=st.sampled_from([1e-6, 0.3, 1e6]))
def test_the_unit_of_the_cost_is_that_of_reg_and_rho(way, seed, unit):
    x, y, a, b = problem(seed)
    one = solve(squares(x, y), a, b, reg=0.1, tol=1e-11, **way)
    other = solve(unit * squares(x, y), a, b, reg=0.1 * unit, tol=1e-11, **scaled(way, rho=unit))
    assert_close(one.plan.dense(), other.plan.dense(), rtol=1e-7, atol=1e-11)
    assert_close(unit * one.value, other.value, rtol=1e-8, atol=1e-10 * unit)


@ways
@settings(max_examples=25)
@given(seed=seeds, unit=st.sampled_from([1e-4, 3.0, 1e4]))
def test_weights_in_another_unit(way, seed, unit):
    "A budget scales with the weights. With prices the shape of the plan stays, and its mass grows by a power"
    x, y, a, b = problem(seed)
    one = solve_sample(x, y, a, b, reg=0.1, tol=1e-11, **way)
    other = solve_sample(x, y, unit * a, unit * b, reg=0.1, tol=1e-11, **scaled(way, mass=unit))
    power, rho = 1.0, way.get("rho")
    if rho:
        r, s = rho if isinstance(rho, tuple) else (rho, rho)
        if None not in (r, s) and math.inf not in (r, s): power = (0.2 + r + s) / (0.1 + r + s)
    assert_close(unit**power * one.plan.dense(), other.plan.dense(), rtol=1e-6, atol=1e-11 * unit**power)


# --- Limits ---

@settings(max_examples=25)
@given(seed=seeds, reg=st.sampled_from([1.0, 0.1, 0.03]))
def test_all_of_it_or_at_any_price_is_balanced_transport(seed, reg):
    x, y, a, b = problem(seed)
    b = b / b.sum()
    given = dict(reg=reg, tol=1e-11, max_iter=50_000)
    balanced = solve_sample(x, y, a, b, **given)
    for way in (dict(mass=1), dict(rho=1e8), dict(rho=(1e8, None))):
        result = solve_sample(x, y, a, b, **way, **given)
        assert_close(result.plan.dense(), balanced.plan.dense(), rtol=1e-5, atol=1e-8)
        assert_close(result.value, balanced.value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("rho", [None, math.inf, (None, math.inf), torch.tensor(math.inf)], ids=str)
def test_exact_marginals_are_balanced_transport_to_the_last_bit(rho):
    x, y, a, b = problem(4)
    b = b / b.sum()
    one, other = (solve_sample(x, y, a, b, reg=0.05, **way) for way in ({}, dict(rho=rho)))
    assert (one.f == other.f).all() and (one.g == other.g).all() and one.value == other.value
    with pytest.raises(ValueError, match="different masses"): solve_sample(x, y, a, 2 * b, reg=0.05, rho=rho)


def test_a_dear_price_takes_no_longer_than_none():
    x, y, a, b = problem(10)
    counts = [solve_sample(x, y, a, b, reg=0.05, rho=10.0**k).n_iter for k in range(8)]
    assert max(counts[2:]) <= 1.5 * counts[2] + 5 and max(counts) < 500


def test_a_price_of_almost_nothing_moves_almost_nothing():
    x, y, a, b = problem(2)
    result = solve_sample(x, y + 2, a, b, reg=1e-3, rho=1e-3)
    assert result.converged and result.plan.row.sum() < 1e-100 and result.value.isfinite()
    assert_close(result.value.item(), 1e-3 * (1 + 1.3) + 1e-3 * 1.3, rtol=1e-9, atol=0)


# --- Input of every form ---

@ways
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-4), (F64, 1e-9)], ids=str)
def test_a_batch_is_its_members_and_a_cloud_its_matrix(way, dtype, tol):
    x, y, a, b = (t.to(dtype) for t in problem(7, 3))
    if "mass" in way: way = dict(mass=torch.tensor([0.1, 0.4, 1.0]))
    together = solve_sample(x, y, a, b, reg=0.1, tol=tol, **way)
    assert together.value.shape == together.marginal_error.shape == (3,) and together.value.dtype == dtype
    assert together.converged.all()
    for k in range(3):
        one = {"mass": way["mass"][k]} if "mass" in way else way
        alone = solve(squares(x[k], y[k]), a[k], b[k], reg=0.1, tol=tol, **one)
        assert_close(together.plan.dense()[k], alone.plan.dense(), rtol=0, atol=20 * tol)
        assert_close(together.value[k], alone.value, rtol=10 * tol, atol=10 * tol)


@ways
def test_zero_weights_are_exact(way):
    x, y, a, b = problem(3)
    result = solve_sample(x, y, a, b, reg=0.05, **way)
    P = result.plan.dense()
    assert (P[0] == 0).all() and (P[:, 1] == 0).all() and all(f.isfinite().all() for f in result.potentials)


@ways
def test_earlier_potentials_are_a_good_start(way):
    x, y, a, b = problem(12)
    cold = solve_sample(x, y, a, b, reg=0.02, **way)
    warm = solve_sample(x, y, a, b, reg=0.02, init=cold.potentials, **way)
    assert warm.n_iter <= 5 and warm.n_iter < cold.n_iter
    assert_close(warm.value, cold.value, rtol=1e-5, atol=1e-6)


@ways
def test_too_few_iterations_say_so(way):
    x, y, a, b = problem(12)
    with pytest.warns(ConvergenceWarning, match="against what the potentials ask for"):
        result = solve_sample(x, y, a, b, reg=1e-3, tol=1e-9, max_iter=20, **way)
    assert not result.converged and result.value.isfinite() and result.plan.dense().isfinite().all()


def test_the_log_holds_the_true_error_in_the_middle_of_an_iteration():
    x, y, a, b = problem(12)
    for way in WAYS:
        p = Problem(PointCloud(x, y), a, b, **way)
        result = sinkhorn(p, reg=0.05, tol=1e-9)
        t, eps, error = result.log[-1]
        psi = sinkhorn(p, reg=eps, tol=0, max_iter=t - 1).g / eps if t > 1 else torch.zeros_like(b)
        phi, psi = settled(*p.sides, half_step(p.geometry, p.b.log(), psi, eps), psi, eps)
        middle = replace(result, f=eps * phi, g=eps * psi)
        assert_close(error, middle.marginal_error.item(), rtol=1e-6, atol=1e-14)
        assert result.marginal_error <= 1e-9


@ways
@pytest.mark.parametrize("reg", [0.1, 0.01, 0.001])
def test_overshooting_changes_the_iterations_and_not_the_answer(way, reg):
    x, y, a, b = problem(12)
    p = Problem(PointCloud(x, y), a, b, **way)
    plain = sinkhorn(p, reg=reg, tol=1e-11, max_iter=100_000)
    fast = sinkhorn(p, reg=reg, tol=1e-11, predict=over_relaxed())
    assert fast.converged and fast.n_iter <= plain.n_iter
    assert_close(fast.plan.dense(), plain.plan.dense(), rtol=0, atol=1e-8)


@ways
def test_exact_transport_refuses(way):
    x, y, a, b = problem(2)
    for call in (lambda: solve_sample(x, y, a, b, reg=0, **way),
                 lambda: ipot(Problem(PointCloud(x, y), a, b, **way), beta=0.1)):
        with pytest.raises(NotImplementedError, match="moves all the mass: rho and mass need"): call()


@ways
def test_at_the_old_points_the_extension_gives_the_old_potentials_and_map(way):
    x, y, a, b = problem(9)
    result = solve_sample(x, y, a, b, reg=0.05, tol=1e-11, **way)
    f, g = result.potentials
    for one, points, others, f in ((result, x, y, f), (turned(result), y, x, g)):
        assert_close(potential_at(one, points), f, rtol=0, atol=1e-8)
        assert_close(map_at(one, points), one.plan.project(others), rtol=0, atol=1e-8)


# --- Forbidden pairs ---

def test_a_point_that_may_go_nowhere_stays_at_home_at_a_price():
    C = torch.rand(5, 4, dtype=F64)
    C[2] = math.inf
    for rho in (0.5, (0.5, None)):
        result = solve(C, reg=0.05, rho=rho)
        P = result.plan.dense()
        assert result.converged and (P[2] == 0).all() and P.isfinite().all() and result.value.isfinite()
    with pytest.raises(ValueError, match="infeasible"): solve(C, reg=0.05, rho=(None, 0.5))
    with pytest.raises(ValueError, match="infeasible"): solve(C, reg=0.05, mass=0.9)
    result = solve(C, reg=0.05, mass=0.8)
    assert result.converged and (result.plan.dense()[2] == 0).all()


@settings(max_examples=30)
@given(seed=seeds, share=st.floats(0, 1), mass=st.floats(0.1, 1))
def test_a_budget_is_refused_just_when_no_plan_can_move_it(seed, share, mass):
    draw = torch.Generator().manual_seed(seed)
    C = torch.zeros(6, 5, dtype=F64).masked_fill(torch.rand(6, 5, generator=draw) < share, math.inf)
    a, b = (torch.rand(k, generator=draw, dtype=F64).softmax(-1) for k in (6, 5))
    b = 3 * b
    stranded = ot.partial.partial_wasserstein2(a.numpy(), b.numpy(), C.isinf().double().numpy(), m=mass)
    if stranded > 1e-5:
        with pytest.raises(ValueError, match="infeasible"): Problem(DenseCost(C), a, b, mass=mass)
    elif stranded < 1e-8: Problem(DenseCost(C), a, b, mass=mass)


# --- Certificates ---

@settings(max_examples=60)
@given(seed=seeds, mass=st.floats(0.05, 0.999), reg=st.sampled_from([1.0, 0.1, 0.01]),
       n_iter=st.integers(1, 60))
def test_the_linear_program_of_partial_transport_lies_in_the_certificate(seed, mass, reg, n_iter):
    x, y, a, b = problem(seed)
    lp = ot.partial.partial_wasserstein2(a.numpy(), b.numpy(), squares(x, y).numpy(), m=mass)
    found = solve_sample(x, y, a, b, reg=reg, mass=mass, tol=0, max_iter=n_iter).certificate()
    assert found.lower - 1e-12 <= lp <= found.upper + 1e-12


@pytest.mark.parametrize("way", WAYS[:-1], ids=str)
@settings(max_examples=10)
@given(seed=seeds, n_iter=st.integers(1, 60))
def test_the_bounds_of_an_unbalanced_problem_hold_and_close(way, seed, n_iter):
    x, y, a, b = problem(seed)
    p = Problem(PointCloud(x, y), a, b, **way)
    early = sinkhorn(p, reg=0.1, tol=0, max_iter=n_iter).certificate()
    late = sinkhorn(p, reg=2e-3, tol=1e-4, max_iter=20_000).certificate()
    assert early.lower <= late.upper and late.lower <= early.upper and late.lower <= late.upper
    assert late.upper - late.lower < 0.02
