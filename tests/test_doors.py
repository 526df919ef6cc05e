"What the two doors promise: names, shapes, types, units, warm starts, tolerances and warnings"
import inspect
import re
import subprocess
import sys
from fractions import Fraction

import jaxtyping
import numpy as np
import pytest
import torch
from torch.testing import assert_close

import ot_research
from ot_research import solve, solve_sample
from ot_research.result import ConvergenceWarning
from ot_research.solvers import sinkhorn

N, M, D = 6, 5, 2
pytestmark = pytest.mark.usefixtures("as_installed")
POLICY = ["reg", "rho", "mass", "tol", "max_iter", "init", "check"]


def squares(x, y): return (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
def by_matrix(x, y, a=None, b=None, **policy): return solve(squares(x, y), a, b, **policy)


def problem(*batch, dtype=torch.float64) -> tuple:
    "Two clouds, weights of mass 2 with a zero on either side"
    x, y = torch.rand(*batch, N, D, dtype=dtype), torch.rand(*batch, M, D, dtype=dtype)
    a, b = torch.rand(*batch, N, dtype=dtype) + 0.1, torch.rand(*batch, M, dtype=dtype) + 0.1
    a[..., 0] = b[..., 1] = 0
    return x, y, 2 * a / a.sum(-1, keepdim=True), 2 * b / b.sum(-1, keepdim=True)


both_doors = pytest.mark.parametrize("door", [by_matrix, solve_sample])
regs = pytest.mark.parametrize("reg", [0.1, 0])


# --- Names ---

def test_the_doors_stand_at_the_top():
    assert (ot_research.solve, ot_research.solve_sample) == (solve, solve_sample)


@pytest.mark.parametrize("door, data, policy", [
    (solve, ["C", "a", "b"], POLICY),
    (solve_sample, ["x", "y", "a", "b"], ["cost", *POLICY]),
])
def test_data_first_then_policy_by_name(door, data, policy):
    kinds = {name: p.kind for name, p in inspect.signature(door).parameters.items()}
    assert list(kinds) == data + policy
    assert {name for name, kind in kinds.items() if kind is inspect.Parameter.KEYWORD_ONLY} == set(policy)


# --- Shapes and types ---

@pytest.fixture
def shapes_checked(as_installed, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", False)


@pytest.mark.usefixtures("shapes_checked")
@both_doors
@regs
@pytest.mark.parametrize("batch", [(), (2,), (2, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_part_of_a_result_has_the_shape_and_type_of_the_input(door, reg, batch, dtype):
    x, y, a, b = problem(*batch, dtype=dtype)
    result = door(x, y, a, b, reg=reg, tol=0.1)
    (f, g), (row, col), P = result.potentials, result.marginals, result.plan.dense()
    numbers = [result.value, result.value_linear, result.marginal_error]
    parts = {(): numbers, (N,): [f, row, result.plan.row], (M,): [g, col, result.plan.col], (N, M): [P],
             (N, D): [result.plan.project(y), result.plan @ y], (M, D): [result.plan.T @ x]}
    for shape, tensors in parts.items():
        for t in tensors:
            assert t.shape == (*batch, *shape) and t.dtype == dtype and t.isfinite().all()
    assert result.converged.shape == batch and result.converged.all()
    assert P[..., 0, :].eq(0).all() and P[..., 1].eq(0).all(), "zero weights are exact"
    bounds = result.certificate()
    assert bounds.lower.shape == bounds.upper.shape == batch and (bounds.lower <= bounds.upper).all()
    assert isinstance(result.n_iter, int) and isinstance(result.status, str)


@both_doors
def test_batches_broadcast(door):
    x, y, a, b = problem(3)
    together = door(x, y[0], a[0], b, reg=0.1)
    assert together.value.shape == (3,)
    for k in range(3):
        assert_close(together.value[k], door(x[k], y[0], a[0], b[k], reg=0.1).value, rtol=1e-5, atol=0)


def test_weights_alone_can_be_the_batch():
    x, y, a, b = problem()
    C, other = squares(x, y), a.flip(0)
    together = solve(C, torch.stack([a, other]), b, reg=0.1)
    assert_close(together.value[1], solve(C, other, b, reg=0.1).value, rtol=1e-5, atol=0)


def test_the_wider_type_wins():
    x, y, a, b = problem()
    assert solve_sample(x.float(), y, reg=0.1).value.dtype == torch.float64
    assert solve(squares(x, y).float(), a / 2, reg=0.1).value.dtype == torch.float64


# --- Units ---

@both_doors
@regs
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_scaling_the_cost_and_reg_scales_the_answer(door, reg, scale):
    x, y, a, b = problem()
    length = scale**0.5
    one, other = door(x, y, a, b, reg=reg), door(length * x, length * y, a, b, reg=reg * scale)
    assert other.n_iter == one.n_iter
    assert_close(other.value, scale * one.value, rtol=1e-8, atol=0)
    assert_close(other.plan.dense(), one.plan.dense(), rtol=1e-6, atol=1e-12)


@both_doors
@regs
def test_moving_both_clouds_changes_nothing(door, reg):
    x, y, a, b = problem()
    one, other = door(x, y, a, b, reg=reg), door(x + 1e4, y + 1e4, a, b, reg=reg)
    assert_close(other.value, one.value, rtol=1e-7, atol=0)


@both_doors
@regs
@pytest.mark.parametrize("mass", [1e-6, 1e6])
def test_the_mass_scales_the_cost_and_not_the_work(door, reg, mass):
    x, y, a, b = problem()
    one, other = door(x, y, a, b, reg=reg), door(x, y, mass * a, mass * b, reg=reg)
    assert other.n_iter == one.n_iter
    assert_close(other.value_linear, mass * one.value_linear, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    "reg", [1, np.float32(1), np.int64(1), np.array(1.0), torch.tensor(1), Fraction(1)], ids=repr)
def test_reg_comes_in_any_box(reg):
    x, y, a, b = problem()
    result = solve_sample(x, y, a, b, reg=reg)
    assert type(result.reg) is float and result.value == solve_sample(x, y, a, b, reg=1.0).value


# --- Stopping ---

@both_doors
@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-9])
def test_tol_bounds_the_marginal_error(door, tol):
    result = door(*problem(), reg=0.05, tol=tol)
    assert result.converged and result.marginal_error <= tol == result.tol


@both_doors
@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_tol_bounds_the_certified_gap_of_exact_transport(door, tol):
    result = door(*problem(), reg=0, tol=tol)
    assert result.converged and result.certificate().gap <= tol == result.tol
    assert result.value == result.value_linear == result.certificate().upper


@both_doors
@regs
def test_tol_0_goes_as_far_as_arithmetic_does_and_says_nothing(door, reg):
    assert door(*problem(), reg=reg, tol=0).marginal_error < 1e-12


@both_doors
@pytest.mark.parametrize("reg", [1e-3, 0])
def test_too_few_iterations_warn_once_and_the_result_says_what_to_do(door, reg):
    with pytest.warns(ConvergenceWarning) as caught:
        result = door(*problem(), reg=reg, tol=1e-9, max_iter=1)
    assert [str(w.message) for w in caught] == [result.status]
    assert not result.converged and result.n_iter <= 6
    assert "not converged" in result.status and "raise max_iter or tol" in result.status


CALLS = """
import torch
from ot_research import solve, solve_sample
from ot_research.geometry import DenseCost
from ot_research.problem import Problem
from ot_research.solvers import ipot, sinkhorn
torch.manual_seed(0)
C = torch.rand(50, 50)
solve(C, reg=0.01, tol=1e-9, max_iter=1)
solve(C, reg=0, tol=1e-9, max_iter=1)
solve_sample(C, C.sqrt(), reg=0.01, rho=1.0, tol=1e-9, max_iter=1)
sinkhorn(Problem(DenseCost(C)), reg=0.01, tol=1e-9, max_iter=1)
ipot(Problem(DenseCost(C)), beta=0.01, tol=1e-9, n_iter=1)
"""


def test_the_warning_names_the_line_of_the_caller():
    "In a process without the shape checks, whose wrappers would stand between"
    errors = subprocess.run([sys.executable, "-c", CALLS], check=True, capture_output=True, text=True).stderr
    lines = [k for k, line in enumerate(CALLS.splitlines(), 1) if "=1e-9" in line]
    assert re.findall(r"<string>:(\d+): ConvergenceWarning", errors) == [str(k) for k in lines]
    assert errors.count("ConvergenceWarning") == len(lines)


# --- Starting ---

@both_doors
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
def test_a_warm_start_is_shorter_and_ends_in_the_same_place(door, batch):
    p = problem(*batch)
    cold = door(*p, reg=0.02)
    warm = door(*p, reg=0.02, init=cold.potentials)
    assert warm.n_iter < cold.n_iter / 2
    assert_close(warm.value, cold.value, rtol=1e-5, atol=0)


def test_potentials_of_the_other_type_start_too():
    x, y, a, b = problem()
    start = solve_sample(*(t.float() for t in (x, y, a, b)), reg=0.02).potentials
    warm, cold = (solve_sample(x, y, a, b, reg=0.02, init=init) for init in (start, None))
    assert warm.n_iter <= cold.n_iter and warm.value.dtype == torch.float64


def test_an_init_from_exact_transport_will_do():
    p = problem()
    warm = solve_sample(*p, reg=0.1, init=solve_sample(*p, reg=0).potentials)
    assert_close(warm.value, solve_sample(*p, reg=0.1).value, rtol=1e-5, atol=0)


# --- Leaving the checks out ---

@both_doors
@regs
def test_without_checks_the_answer_is_the_same(door, reg):
    p = problem()
    checked, free = (door(*p, reg=reg, check=check) for check in (True, False))
    assert checked.value == free.value and checked.n_iter == free.n_iter


@pytest.mark.parametrize("far", [3, 10])
def test_a_far_pair_does_not_stop_exact_transport(far):
    x, y, *_ = problem()
    x, y = (torch.cat([t[:M], torch.full((1, D), far + k, dtype=t.dtype)]) for k, t in enumerate((x, y)))
    assert solve_sample(x, y, reg=0).converged


def test_the_doors_add_nothing_but_policy():
    "A door is its solver, with the schedule of its choice"
    result = solve_sample(*problem(), reg=0.1, tol=1e-12)
    again = sinkhorn(result.problem, reg=0.1, tol=1e-12)
    assert_close(result.plan.dense(), again.plan.dense())
