"What every solver must give, and what an answer may not depend on"
import math
import warnings
from dataclasses import replace

import geomloss
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import hard_problems

from ot_research.geometry import DenseCost, PointCloud
from ot_research.plan import Plan
from ot_research.problem import Problem
from ot_research.result import ConvergenceWarning
from ot_research.scaling import (
    Iterate, annealed, constant, half_step, learned, over_relaxed, proportional, scale)
from ot_research.solvers import ipot, sinkhorn

F64 = torch.float64
SEEDS = st.integers(0, 10**6)
HARD = hard_problems(40)
pytestmark = pytest.mark.usefixtures("as_installed")
SOLVERS = [
    pytest.param(lambda problem, scale=1.0: sinkhorn(problem, reg=0.1 * scale, tol=1e-10), id="sinkhorn"),
    pytest.param(lambda problem, scale=1.0: ipot(problem, beta=0.3 * scale, n_iter=20, inner=2), id="ipot")]
both = pytest.mark.parametrize("solve", SOLVERS)


def close(a, b, tol=1e-9): torch.testing.assert_close(a, b, atol=tol, rtol=0)


def clouds(seed: int, n: int = 9, m: int = 7, d: int = 2):
    "Points and weights, both of mass 1"
    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.rand(k, d, generator=draw, dtype=F64) for k in (n, m))
    a, b = (torch.rand(k, generator=draw, dtype=F64) + 0.05 for k in (n, m))
    return x, y, a / a.sum(), b / b.sum()


def quiet(solver, *args, **settings):
    "The result, and the warnings given on the way"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return solver(*args, **settings), [w.category for w in caught]


# --- What an answer may not depend on ---

@both
@settings(max_examples=6)
@given(seed=SEEDS, shift=st.floats(-1e4, 1e4))
def test_moving_both_clouds_moves_nothing(solve, seed, shift):
    x, y, a, b = clouds(seed)
    here, there = (solve(Problem(PointCloud(x + s, y + s), a, b)) for s in (0, shift))
    close(here.plan.dense(), there.plan.dense())
    close(here.value, there.value)


@both
@settings(max_examples=6)
@given(seed=SEEDS, scale=st.floats(-6, 6).map(lambda k: 10.0**k))
def test_the_unit_of_cost_is_only_a_unit(solve, seed, scale):
    x, y, a, b = clouds(seed)
    C = PointCloud(x, y).cost_rows(slice(None))
    one, other = solve(Problem(DenseCost(C), a, b)), solve(Problem(DenseCost(scale * C), a, b), scale)
    close(one.plan.dense(), other.plan.dense())
    close(other.value / scale, one.value)
    close(other.certificate().lower / scale, one.certificate().lower)


@both
@settings(max_examples=6)
@given(seed=SEEDS, mass=st.floats(1e-6, 1e6))
def test_the_unit_of_mass_is_only_a_unit(solve, seed, mass):
    x, y, a, b = clouds(seed)
    one, other = (solve(Problem(PointCloud(x, y), k * a, k * b)) for k in (1.0, mass))
    close(other.plan.dense() / mass, one.plan.dense())
    close(other.value_linear / mass, one.value_linear)


@both
@settings(max_examples=6)
@given(seed=SEEDS)
def test_the_order_of_points_is_only_an_order(solve, seed):
    x, y, a, b = clouds(seed)
    i, j = torch.randperm(9), torch.randperm(7)
    straight = solve(Problem(PointCloud(x, y), a, b))
    mixed = solve(Problem(PointCloud(x[i], y[j]), a[i], b[j]))
    close(straight.plan.dense()[i][:, j], mixed.plan.dense())


@settings(max_examples=6)
@given(seed=SEEDS)
def test_swapping_the_clouds_transposes_sinkhorns_plan(seed):
    x, y, a, b = clouds(seed)
    there, back = (sinkhorn(p, reg=0.1, tol=1e-11)
                   for p in (Problem(PointCloud(x, y), a, b), Problem(PointCloud(y, x), b, a)))
    close(there.plan.dense(), back.plan.dense().T)
    close(there.value, back.value)
    for f, g in zip(there.potentials, reversed(back.potentials)): close(f, g, 1e-8)


def test_swapping_the_clouds_transposes_ipots_plan_in_the_limit():
    x, y, a, b = clouds(1)
    off = []
    for n_iter in (5, 50, 500):
        there = ipot(Problem(PointCloud(x, y), a, b), beta=0.5, n_iter=n_iter).plan.dense()
        back = ipot(Problem(PointCloud(y, x), b, a), beta=0.5, n_iter=n_iter).plan.dense()
        off.append((there - back.T).abs().sum().item())
    assert off[0] > 10 * off[1] > 100 * off[2]


@both
@settings(max_examples=6)
@given(seed=SEEDS, drop=st.sets(st.integers(0, 8), max_size=8))
def test_points_without_mass_might_as_well_not_be_there(solve, seed, drop):
    x, y, a, b = clouds(seed)
    keep = torch.tensor([i not in drop for i in range(9)])
    a = a * keep / (a * keep).sum()
    whole, part = solve(Problem(PointCloud(x, y), a, b)), solve(Problem(PointCloud(x[keep], y), a[keep], b))
    close(whole.plan.dense()[keep], part.plan.dense())
    close(whole.value, part.value)
    assert (whole.plan.dense()[~keep] == 0).all()


@both
@settings(max_examples=6)
@given(seed=SEEDS, share=st.floats(0.01, 0.99))
def test_a_point_in_two_pieces_is_one_point(solve, seed, share):
    x, y, a, b = clouds(seed)
    pieces = torch.cat([a[:1] * share, a[:1] * (1 - share), a[1:]])
    whole = solve(Problem(PointCloud(x, y), a, b))
    split = solve(Problem(PointCloud(x[[0, *range(9)]], y), pieces, b))
    P = split.plan.dense()
    close(whole.plan.dense(), torch.cat([P[:2].sum(0, keepdim=True), P[2:]]))
    close(whole.value_linear, split.value_linear)


@both
def test_a_batch_is_its_members(solve):
    x, y, a, b = zip(*(clouds(seed) for seed in range(4)))
    batch = Problem(PointCloud(torch.stack(x), torch.stack(y)), torch.stack(a), torch.stack(b))
    together = solve(batch)
    for k, members in enumerate(zip(x, y, a, b)):
        alone = solve(Problem(PointCloud(*members[:2]), *members[2:]))
        close(together.plan.dense()[k], alone.plan.dense())
        close(together.value[k], alone.value)
        assert alone.n_iter <= together.n_iter


# --- Any strength, either type ---

@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("solver", ["fixed", "annealed", "ipot"])
def test_any_strength_gives_a_plan_of_the_right_mass_or_says_why(dtype, batch, solver):
    x, y = torch.rand(*batch, 30, 2, dtype=dtype), torch.rand(*batch, 25, 2, dtype=dtype)
    a = torch.rand(30, dtype=dtype)
    a[:5] = 0
    problem = Problem(PointCloud(x, y), a / a.sum())
    mean = problem.geometry.cost_rows(slice(None)).mean().item()
    for k in range(9):
        reg = 10.0**-k * mean
        if solver == "ipot": result, given = quiet(ipot, problem, beta=reg, n_iter=100, tol=1e-3)
        else:
            schedule = annealed(reg, start=4 * mean) if solver == "annealed" else None
            result, given = quiet(sinkhorn, problem, reg=reg, schedule=schedule, max_iter=100)
        P = result.plan.dense()
        assert all(t.isfinite().all() for t in (P, result.value, result.certificate().gap))
        assert all(math.isfinite(error) for _, _, error in result.log)
        close(P.sum((-1, -2)), torch.ones(batch, dtype=dtype), 1e-5)
        assert given == ([] if result.converged.all() else [ConvergenceWarning])


@pytest.mark.parametrize("share", [1, 0.1, 0.02, 0.005, 0.001])
def test_single_precision_gives_the_answer_of_double(share):
    x, y = torch.rand(80, 16), torch.rand(60, 16)
    single = Problem(PointCloud(x, y))
    reg = share * single.geometry.cost_rows(slice(None)).mean().item()
    one, two = (quiet(sinkhorn, p, reg=reg, tol=1e-4, max_iter=500)[0] for p in (single, single.to(F64)))
    close(one.value.double() / two.value, torch.tensor(1.0, dtype=F64), 1e-6)
    close(one.plan.dense().double(), two.plan.dense(), 1e-6)


def test_float32_reaches_its_tolerance_wherever_it_is_not_widened():
    for seed in range(20):
        x, y, a, b = (t.float() for t in clouds(seed, 60, 50, 1 + seed))
        problem = Problem(PointCloud(x, y), a, b)
        reg = problem.geometry.survey.largest.item() / (50 + 40 * seed)
        result = sinkhorn(problem, reg=reg, max_iter=20_000, schedule=annealed(reg, start=1.0))
        assert result.converged and not result.note


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_tolerance_below_rounding_is_not_reached_and_that_is_all(dtype):
    x, y, a, b = (t.to(dtype) for t in clouds(0))
    result, given = quiet(sinkhorn, Problem(PointCloud(x, y), a, b), reg=0.1, tol=1e-19, max_iter=200)
    assert not result.converged and given == [ConvergenceWarning] and result.marginal_error < 1e-14
    assert result.plan.dense().isfinite().all()


@pytest.mark.parametrize("solver, settings", [
    (sinkhorn, dict(reg=0.01, max_iter=1)), (ipot, dict(beta=0.01, n_iter=1))])
def test_one_iteration_is_a_result(solver, settings):
    x, y, a, b = clouds(0)
    result, _ = quiet(solver, Problem(PointCloud(x, y), a, b), **settings)
    assert result.n_iter == 1 and result.plan.dense().isfinite().all() and result.value.isfinite()
    close(result.plan.col, b, 1e-14)


@pytest.mark.parametrize("settings, message", [
    (dict(reg=0), "reg"), (dict(reg=-1.0), "reg"), (dict(reg=math.nan), "reg"), (dict(reg=math.inf), "reg"),
    (dict(reg="0.1"), "reg"), (dict(reg=0.1, max_iter=0), "max_iter"), (dict(reg=1e-18), "rounding")])
def test_settings_that_mean_nothing_are_refused(settings, message):
    x, y, a, b = clouds(0)
    with pytest.raises(ValueError, match=message): sinkhorn(Problem(PointCloud(x, y), a, b), **settings)


@pytest.mark.parametrize("settings", [
    dict(beta=0), dict(beta=-1), dict(beta=math.nan), dict(beta=1, n_iter=0), dict(beta=1, inner=0)])
def test_proximal_settings_that_mean_nothing_are_refused(settings):
    x, y, a, b = clouds(0)
    problem = Problem(PointCloud(x, y), a, b)
    with pytest.raises(ValueError, match="must be a finite number > 0"): ipot(problem, **settings)


# --- Small and odd ---

def odd_problems(dtype):
    "Some of everything that is small, flat, empty or the same"
    x, y, a, _ = (t.to(dtype) for t in clouds(0))
    alone = torch.eye(9, dtype=dtype)[4]
    flat, slope = torch.ones(9, 7, dtype=dtype), torch.linspace(0, 1, 63, dtype=dtype).reshape(9, 7)
    costs = {
        "zero": 0 * flat, "constant": flat, "negative": -slope,
        "forbidden pairs": slope.masked_fill(torch.eye(9, 7) > 0, math.inf)}
    clouds_ = {
        "one against one": (x[:1], y[:1]), "one against many": (x[:1], y), "many against one": (x, y[:1]),
        "a point many times": (x[:1].expand(9, 2), y), "all on one point": (x, y, alone),
        "one point to one": (x, x, alone, alone), "a cloud and itself": (x, x, a, a)}
    forbidden_row = DenseCost(flat.masked_fill(torch.arange(9)[:, None] == 2, math.inf))
    return {name: Problem(DenseCost(C)) for name, C in costs.items()} | {
        name: Problem(PointCloud(x, y), *weights) for name, (x, y, *weights) in clouds_.items()} | {
        "a forbidden row without mass": Problem(forbidden_row, alone)}


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", odd_problems(F64))
def test_odd_problems_need_no_special_case(name, dtype):
    problem = odd_problems(dtype)[name]
    entropic, exact = sinkhorn(problem, reg=0.05), ipot(problem, beta=0.02, n_iter=5000, tol=1e-4)
    p = problem.to(F64)
    C = p.geometry.cost_rows(slice(None)).clamp(max=100).contiguous()
    W = ot.emd2(p.a.numpy(), p.b.numpy(), C.numpy())
    for result in (entropic, exact):
        assert result.converged and result.value.isfinite() and not result.plan.dense().isnan().any()
        assert result.certificate().lower <= W + 1e-12 and W <= result.certificate().upper + 1e-12
        assert all(f.isfinite().all() for f in result.potentials)
    assert abs(exact.value.item() - W) <= 1e-4 * abs(W) + 1e-6


# --- Against others, and against the published loop ---

def test_the_plan_is_that_of_pot():
    x, y, a, b = clouds(3, 40, 30)
    problem = Problem(PointCloud(x, y), a, b)
    C = problem.geometry.cost_rows(slice(None))
    for reg in (0.5, 0.05):
        theirs = ot.sinkhorn(a.numpy(), b.numpy(), C.numpy(), reg, stopThr=1e-13, numItermax=20_000)
        ours = sinkhorn(problem, reg=reg, tol=1e-12, max_iter=20_000)
        close(ours.plan.dense(), torch.as_tensor(theirs), 1e-12)


@pytest.mark.parametrize("blur", [0.1, 0.3])
def test_the_value_is_twice_that_of_geomloss(blur):
    x, y, a, b = clouds(3, 40, 30)
    theirs = 2 * geomloss.SamplesLoss("sinkhorn", p=2, blur=blur, debias=False, scaling=0.998)(a, x, b, y)
    ours = sinkhorn(Problem(PointCloud(x, y), a, b), reg=2 * blur**2, tol=1e-11, max_iter=20_000).value
    close(ours / theirs, torch.tensor(1.0, dtype=F64), 1e-5)


def published(C, a, b, beta, n_iter, L):
    "[Xie et al. 2020, Alg. 1] as printed, with the plan as a matrix"
    gamma, b_ = torch.ones_like(C), torch.full_like(b, 1 / len(b))
    for _ in range(n_iter):
        Q = torch.exp(-C / beta) * gamma
        for _ in range(L):
            a_ = a / (Q @ b_)
            b_ = b / (Q.T @ a_)
        gamma = a_[:, None] * Q * b_
    return gamma


@pytest.mark.parametrize("L", [1, 3])
@pytest.mark.parametrize("beta", [0.02, 0.1, 1.0])
def test_two_vectors_are_the_published_proximal_points(L, beta):
    x, y, a, b = clouds(0, 40, 30)
    C = PointCloud(x, y).cost_rows(slice(None))
    ours = ipot(Problem(DenseCost(C), a, b), beta=beta, n_iter=500, inner=L)
    close(ours.plan.dense(), published(C, a, b, beta, 500, L), 1e-12)


@pytest.mark.parametrize("L", [1, 3])
def test_a_proximal_point_is_the_entropic_plan_between_its_own_marginals(L):
    x, y, a, b = clouds(0, 20, 15)
    now = ipot(Problem(PointCloud(x, y), a, b), beta=1.0, n_iter=50, inner=L)
    between = Problem(PointCloud(x, y), *now.marginals)
    close(sinkhorn(between, reg=now.eps, tol=1e-14, max_iter=20_000).plan.dense(), now.plan.dense(), 1e-13)


def test_solved_to_the_end_a_proximal_point_is_sinkhorns_plan():
    x, y, a, b = clouds(0, 20, 15)
    problem = Problem(PointCloud(x, y), a, b)
    proximal, entropic = ipot(problem, beta=1.0, n_iter=10, inner=100), sinkhorn(problem, reg=0.1, tol=1e-13)
    close(proximal.plan.dense(), entropic.plan.dense(), 1e-12)


# --- When it stops, and what it says ---

def test_the_error_in_the_log_is_that_of_the_plan_halfway():
    x, y, a, b = clouds(2, 30, 20)
    problem = Problem(PointCloud(x, y), a, b)
    log = sinkhorn(problem, reg=0.02, max_iter=5000).log
    for t, eps, error in log[1::20]:
        before = sinkhorn(problem, reg=eps, tol=0, max_iter=t - 1)
        middle = replace(before, f=eps * half_step(problem.geometry, b.log(), before.g / eps, eps))
        assert abs(middle.marginal_error - error) < 1e-14
        assert sinkhorn(problem, reg=eps, tol=0, max_iter=t).marginal_error <= error + 1e-14
    assert all(now <= before * (1 + 1e-9) for (*_, before), (*_, now) in zip(log, log[1:]))


# --- Overshooting ---

@pytest.mark.parametrize("name", HARD)
def test_overshooting_is_never_slower_on_hard_problems(name):
    problem = HARD[name]
    cost = problem.geometry.cost_rows(slice(None))
    cost = cost[cost.isfinite()]
    unit = (cost.mean() - cost.min()).item() or 1.0
    for strength in (1.0, 0.1, 0.01):
        settings = dict(reg=strength * unit, schedule=annealed(strength * unit, start=unit), max_iter=3000)
        (plain, _), (fast, _) = (quiet(sinkhorn, problem, predict=predict, **settings)
                                 for predict in (proportional, over_relaxed()))
        assert fast.converged and fast.n_iter <= plain.n_iter
        assert not plain.converged or abs(fast.value - plain.value) < 1e-5 * unit * problem.mass


def test_each_problem_of_a_batch_learns_its_own_factor():
    x, y, a, b = clouds(4, 30, 20)
    scales = torch.tensor([1.0, 3.0, 10.0], dtype=F64)[:, None, None]
    batch = Problem(PointCloud(scales * x, scales * y), a, b)
    together = sinkhorn(batch, reg=0.3, tol=1e-10, predict=over_relaxed())
    alone = [sinkhorn(Problem(PointCloud(s * x, s * y), a, b), reg=0.3, tol=1e-10, predict=over_relaxed())
             for s in scales[:, 0, 0]]
    assert together.n_iter == max(one.n_iter for one in alone)
    close(together.value, torch.stack([one.value for one in alone]), 1e-8)


def test_a_factor_that_makes_errors_grow_is_dropped():
    omega = torch.tensor([1.0, 1.5, 1.5, 1.5], dtype=F64)
    found = learned(omega, torch.tensor([0.99, 0.5, 0.9, 1.1], dtype=F64))
    close(found[[1, 3]], torch.tensor([1.5, 1.0], dtype=F64))
    assert abs(found[0] - 2 / (1 + 0.1)) < 1e-12 and found[2] > 1.5


def test_an_annealed_run_ends_where_a_constant_one_does():
    x, y, a, b = clouds(2, 30, 20)
    problem = Problem(PointCloud(x, y), a, b)
    plain, down = (sinkhorn(problem, reg=0.01, tol=1e-10, max_iter=50_000, schedule=schedule)
                   for schedule in (None, annealed(0.01, start=2.0)))
    close(plain.plan.dense(), down.plan.dense())


def test_an_earlier_answer_is_a_good_beginning():
    x, y, a, b = clouds(2, 30, 20)
    problem = Problem(PointCloud(x, y), a, b)
    first = sinkhorn(problem, reg=0.02)
    assert sinkhorn(problem, reg=0.02, init=first.potentials).n_iter == 1
    assert sinkhorn(problem, reg=0.018, init=first.potentials).n_iter < sinkhorn(problem, reg=0.018).n_iter


def test_who_asks_for_a_number_of_iterations_gets_them_in_silence():
    x, y, a, b = clouds(2)
    for check in (True, False):
        problem = Problem(PointCloud(x, y), a, b, check=check)
        for result in (sinkhorn(problem, reg=0.001, tol=0, max_iter=7), ipot(problem, beta=0.001, n_iter=7)):
            assert result.n_iter == 7 and result.log == () and not result.converged
            assert "not converged" in result.status


def test_exact_transport_stops_at_a_proven_gap():
    x, y, a, b = clouds(2, 20, 15)
    problem = Problem(PointCloud(x, y), a, b)
    result = ipot(problem, beta=0.02, n_iter=20_000, tol=3e-3)
    W = ot.emd2(a.numpy(), b.numpy(), problem.geometry.cost_rows(slice(None)).numpy())
    assert result.converged and result.n_iter < 20_000 and result.certificate().gap <= 3e-3
    assert result.value == result.value_linear and W - 1e-12 <= result.value <= W * (1 + 4e-3)


def test_the_loop_goes_on_as_long_as_it_is_asked():
    x, y, a, b = clouds(2)
    problem = Problem(PointCloud(x, y), a, b)
    start = Iterate(0, 0.1, None, torch.zeros(7, dtype=F64))
    iterates = scale(problem, constant(0.1), before=start, last=start)
    for k, now in zip(range(1, 300), iterates): assert now.t == k
    plan = Plan(problem.geometry, a.log() + now.phi, b.log() + now.psi, 0.1, F64)
    close(plan.row, a, 1e-10)


def test_code_without_a_module_name_may_miss_a_tolerance_too():
    problem = Problem(DenseCost(torch.rand(5, 6, dtype=torch.float64)))
    space = {"sinkhorn": sinkhorn, "problem": problem}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec("sinkhorn(problem, reg=1e-3, max_iter=1)", space)
    assert [w.category for w in caught] == [ConvergenceWarning]
