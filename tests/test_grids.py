"A grid answers like the matrix of costs between its pixels, whatever the strength"
import math

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ot_research.doors import transport
from ot_research.geometry import DenseCost, Geometry
from ot_research.grids import Grid
from ot_research.problem import Problem
from ot_research.solvers import ipot, sinkhorn

ALL = slice(None)
SIDES = [(7,), (1,), (40,), (5, 8), (30, 9), (3, 4, 5), (1, 12, 2)]


def written_out(sides, p, spacing):
    "The matrix of costs in float64, from the definition"
    spacing = spacing if isinstance(spacing, tuple) else (spacing,) * len(sides)
    steps = [s * torch.arange(k, dtype=torch.float64) for k, s in zip(sides, spacing)]
    x = torch.stack(torch.meshgrid(*steps, indexing="ij"), -1).reshape(-1, len(sides))
    return (x[:, None] - x).abs().pow(p).sum(-1)


def biases(*shape, size=1.0, gaps=0.3):
    "Biases, of which some are -inf, but not all of a histogram"
    log_v = size * torch.randn(shape, dtype=torch.float64)
    hidden = torch.rand(shape) < gaps
    hidden[..., 0] = False
    return log_v.masked_fill(hidden, -torch.inf)


@given(sides=st.sampled_from(SIDES), p=st.sampled_from([1, 1.5, 2]), spacing=st.sampled_from([1.0, 0.01, 30.0]), share=st.sampled_from([1.0, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9]),
       batch=st.sampled_from([(), (1,), (3,), (2, 2)]), dtype=st.sampled_from([torch.float64, torch.float32]), size=st.sampled_from([1.0, 1e3]), seed=st.integers(0, 9))
def test_a_grid_answers_like_its_matrix_at_any_strength(sides, p, spacing, share, batch, dtype, size, seed):
    torch.manual_seed(seed)
    C, n = written_out(sides, p, spacing), math.prod(sides)
    eps = share * (C.max().item() or 1.0)
    log_v, value = biases(*batch, n, size=size).to(dtype), torch.randn(*batch, n, 2, dtype=dtype)
    grid = Grid(sides, p, spacing)
    scores = log_v.double().unsqueeze(-2) - C / eps
    P = scores.softmax(-1)
    mean, lse = grid.attend(log_v, eps, value)
    tight = {torch.float64: 1e-12, torch.float32: 2e-5}[dtype]
    sharp = tight * (1 + size + 1 / share)  # what rounding of a score does to a softmax
    assert lse.dtype == mean.dtype == dtype
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=tight, atol=tight * (1 + size))
    torch.testing.assert_close(mean.double(), P @ value.double(), rtol=0, atol=min(sharp, 20))
    price = grid.mean_cost(log_v, eps).double()
    torch.testing.assert_close(price, (P * C).sum(-1), rtol=0, atol=C.max().item() * min(sharp, 1) + 1e-300)
    least = (C - eps * log_v.double().unsqueeze(-2)).amin(-1)
    torch.testing.assert_close(grid.hardmin(eps * log_v).double(), least, rtol=tight, atol=tight * eps * (1 + size))
    w = value[..., 0]
    torch.testing.assert_close(grid.matvec(w).double(), (C @ w.double().unsqueeze(-1)).squeeze(-1), rtol=0, atol=tight * 10 * n * C.max().item() + 1e-300)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("p", [1, 2])
def test_a_grid_is_a_geometry(sides, p):
    C, grid = written_out(sides, p, 0.5), Grid(sides, p, 0.5).to(torch.float64)
    assert isinstance(grid, Geometry) and grid.shape == C.shape and grid.T is grid and not grid.requires_grad
    torch.testing.assert_close(grid.cost_rows(ALL), C, atol=1e-11, rtol=0)
    i, j = torch.randint(len(C), (2, 50))
    torch.testing.assert_close(grid.cost_at(i, j), C[i, j], atol=1e-11, rtol=0)
    torch.testing.assert_close(grid.part(i, j).cost_rows(ALL), C[i][:, j], atol=1e-11, rtol=0)
    torch.testing.assert_close(grid.survey.largest, C.max())
    assert not grid.survey.forbids and not any(flaw.found for flaw in grid.flaws())
    many = grid.expand((2, 3))
    assert many.shape == (2, 3, *C.shape) and many[0].shape == (3, *C.shape) and many[0, 1].shape == C.shape
    assert grid[None].shape == (1, *C.shape) and many[torch.tensor([0, 1]), torch.tensor([2, 2])].shape == (2, *C.shape)
    torch.testing.assert_close(many.cost_rows(slice(0, 1))[1, 2], C[:1], atol=1e-11, rtol=0)
    assert many.attend(torch.zeros(len(C), dtype=torch.float64), 1.0, torch.zeros(len(C), 1, dtype=torch.float64))[0].shape == (2, 3, len(C), 1)


def test_pixels_that_nobody_can_see_are_not_nan():
    for eps in (1.0, 1e-3, 1e-9):
        mean, lse = Grid((6, 7)).attend(torch.full((2, 42), -torch.inf), eps, torch.ones(2, 42, 1))
        assert (lse == -torch.inf).all() and mean.isfinite().all()


@pytest.mark.parametrize("spacing", [(1.0, 2.0, 0.5), 0.1])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_solvers_find_the_same_on_a_grid_and_on_its_matrix(p, spacing, dtype, atol):
    torch.manual_seed(0)
    C = written_out((4, 5, 6), p, spacing)
    a, b = torch.rand(2, 120, dtype=dtype), torch.rand(2, 120, dtype=dtype)
    a[0, :50], b[1, 60:] = 0, 0
    a[1] = torch.nn.functional.one_hot(torch.tensor(7), 120)
    a, b = (w / w.sum(-1, keepdim=True) for w in (a, b))
    top = C.max().item()
    for solve in (lambda g: sinkhorn(Problem(g, a, b), reg=0.02 * top, max_iter=50, tol=0.0),
                  lambda g: ipot(Problem(g, a, b), beta=top, n_iter=60)):
        grid, dense = solve(Grid((4, 5, 6), p, spacing)), solve(DenseCost(C.to(dtype)))
        close = lambda x, y, unit: torch.testing.assert_close(x, y, rtol=0, atol=atol * unit)
        assert grid.f.dtype == dense.f.dtype
        for x, y in zip((*grid.potentials, grid.value_linear, grid.value), (*dense.potentials, dense.value_linear, dense.value)): close(x, y, top)
        close(grid.plan.dense(), dense.plan.dense(), 1.0)
        V = torch.randn(2, 120, 3, dtype=dtype)
        close(grid.plan @ V, dense.plan @ V, 1.0)
        close(grid.plan.row, dense.plan.row, 1.0)
        close(grid.plan.col, dense.plan.col, 1.0)
        close(grid.certificate().lower, dense.certificate().lower, 100 * top if dtype == torch.float32 else top)
        close(grid.certificate().upper, dense.certificate().upper, 100 * top if dtype == torch.float32 else top)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("asked", [dict(reg=0.5), dict(reg=0.0), dict(reg=0.5, rho=3.0), dict(reg=0.5, mass=0.7), dict(reg=1e-2)])
def test_the_door_opens_for_grids(p, asked):
    torch.manual_seed(1)
    a, b = torch.rand(2, 180, dtype=torch.float64)
    a[:40] = 0
    a, b = a / a.sum(), b / b.sum()
    grid, dense = (transport(g, a, b, **asked) for g in (Grid((15, 12), p), DenseCost(written_out((15, 12), p, 1.0))))
    assert grid.converged and dense.converged
    torch.testing.assert_close(grid.value, dense.value, rtol=2e-4 if asked["reg"] == 0 else 1e-6, atol=1e-8)


def test_derivatives_in_weights_and_strength_are_those_of_the_matrix():
    torch.manual_seed(2)
    a, b = torch.rand(2, 60, dtype=torch.float64)
    a, b = (a / a.sum()).requires_grad_(), b / b.sum()
    reg = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    slopes = [torch.autograd.grad(transport(g, a, b, reg=reg, tol=1e-10).value, (a, reg)) for g in (Grid((6, 10)), DenseCost(written_out((6, 10), 2, 1.0)))]
    for one, other in zip(*slopes): torch.testing.assert_close(one - one.mean() * (one.ndim > 0), other - other.mean() * (other.ndim > 0), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("asked, sentence", [
    (dict(sides=50), "pixels along each axis"), (dict(sides=()), "pixels along each axis"), (dict(sides=(5, 0)), "pixels along each axis"),
    (dict(sides=(5.5, 2)), "pixels along each axis"), (dict(sides=(5, 2), p=3), "from 1 to 2"), (dict(sides=(5, 2), p=math.nan), "from 1 to 2"),
    (dict(sides=(5, 2), spacing=0.0), "spacing"), (dict(sides=(5, 2), spacing=(1.0,)), "spacing"), (dict(sides=(5, 2), spacing=(1.0, math.inf)), "spacing")])
def test_a_grid_that_cannot_be_is_refused(asked, sentence, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the type checks would come first
    with pytest.raises(ValueError, match=sentence): Grid(**asked)
