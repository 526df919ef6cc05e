"""Losses and doors, from the public names: derivatives in every argument, bounds, transforms

How precise they are at small strengths is the matter of test_implicit.
"""
import pytest
import torch
from torch.autograd import grad, gradcheck, gradgradcheck

from ot_research import solve, solve_sample
from ot_research.geometry import DenseCost, PointCloud
from ot_research.loss import hessian, hvp, ot_value, sinkhorn_divergence, transport_cost

EXACTLY = dict(tol=1e-12)
SOLVERS = dict(balanced={}, priced=dict(rho=0.3, max_iter=20_000), one_side=dict(rho=(None, 0.3), max_iter=20_000))


def uniform(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(w): return w / w.sum(-1, keepdim=True)


x, y, V, W = uniform(7, 2, seed=1), uniform(6, 2, seed=2), uniform(6, 2, seed=3), uniform(7, 2, seed=4)
a, b, eps = unit(0.2 + uniform(7, seed=5)), unit(0.2 + uniform(6, seed=6)), torch.tensor(0.05).double()
LOSSES = dict(
    value=lambda C, *rest: ot_value(C, *rest[:2], reg=rest[2], **EXACTLY),
    cost=lambda C, *rest: transport_cost(C, *rest[:2], reg=rest[2], **EXACTLY))
ANSWERS = dict(
    value=lambda found: found.value,
    value_linear=lambda found: found.value_linear,
    potentials=lambda found: sum(t.sin().sum() for t in found.potentials),
    products=lambda found: (W * (found.plan @ V)).sum() + (found.plan.T @ W).square().sum(),
    map=lambda found: found.plan.project(V).square().sum(),
    sums=lambda found: found.plan.row.square().sum() + found.plan.col.sin().sum(),
    weighted=lambda found: found.plan.weighted(W, V, V).square().sum(),
    dense=lambda found: found.plan.dense().square().sum())


def passes(function, *leaves):
    leaves = [t.clone().requires_grad_() for t in leaves]
    assert gradcheck(function, leaves, fast_mode=True, nondet_tol=1e-9)
    assert gradgradcheck(function, leaves, fast_mode=True, atol=1e-4, nondet_tol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("cost", ["sqeuclidean", "cosine", "euclidean", "dense"])
def test_losses_in_every_argument(name, cost, as_installed):
    if cost == "dense":
        passes(lambda C, a, b, eps: LOSSES[name](DenseCost(C), unit(a), unit(b), eps), uniform(7, 6), a, b, eps)
    else:
        passes(lambda x, y, a, b, eps: LOSSES[name](PointCloud(x, y, cost), unit(a), unit(b), eps), x, y, a, b, eps)


def test_the_divergence_in_every_argument(as_installed):
    passes(lambda x, y, a, b, eps: sinkhorn_divergence(x, y, unit(a), unit(b), reg=eps, **EXACTLY), x, y, a, b, eps)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("way", SOLVERS)
def test_what_the_doors_return(answer, way, as_installed):
    def function(x, y, a, b, eps):
        a, b = (unit(a), unit(b)) if way == "balanced" else (a, b)
        return ANSWERS[answer](solve_sample(x, y, a, b, reg=eps, **EXACTLY, **SOLVERS[way]))
    passes(function, x, y, a, b, eps)


@pytest.mark.parametrize("answer", ["value", "value_linear", "products", "map"])
def test_the_answers_are_those_without_a_gradient(answer):
    plain, differs = (solve_sample(t, y, reg=0.05) for t in (x, x.clone().requires_grad_()))
    torch.testing.assert_close(ANSWERS[answer](differs).detach(), ANSWERS[answer](plain), atol=1e-12, rtol=1e-10)
    assert differs.marginal_error == plain.marginal_error and differs.status == plain.status
    assert differs.certificate().lower == plain.certificate().lower


def test_where_no_gradient_is_recorded_there_is_none():
    z = x.clone().requires_grad_()
    with torch.no_grad(): assert not solve_sample(z, y, reg=0.05).value.requires_grad
    found = solve_sample(z, y, reg=0.05)
    with torch.no_grad(): found.value, found.plan, found.potentials
    assert grad((found.plan @ V).sum() + found.value, z)[0].abs().sum() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_and_its_members(dtype):
    many = torch.stack([x, 2 * x, x + 1]).to(dtype).requires_grad_()
    found = solve_sample(many, y.to(dtype), reg=0.1)
    assert found.value.shape == (3,) and found.value.dtype == dtype
    (slope,) = grad(found.value_linear.sum(), many)
    for one, whole in zip(many, slope):
        z = one.detach().requires_grad_()
        (alone,) = grad(solve_sample(z, y.to(dtype), reg=0.1).value_linear, z)
        torch.testing.assert_close(whole, alone, atol=1e-3 if dtype == torch.float32 else 1e-5, rtol=1e-3)


def test_exact_transport_has_a_gradient(as_installed):
    exactly = dict(reg=0, tol=1e-10)
    assert gradcheck(lambda x, y: solve_sample(x, y, a, b, **exactly).value,
                     [t.clone().requires_grad_() for t in (x, y)], fast_mode=True)
    assert gradcheck(lambda a, b: solve_sample(x, y, unit(a), unit(b), **exactly).value_linear,
                     [t.clone().requires_grad_() for t in (a, b)], fast_mode=True)
    C = uniform(2, 7, 6).requires_grad_()
    found = solve(C, a, b, **exactly)
    torch.testing.assert_close(grad(found.value.sum(), C)[0], found.plan.dense().detach())


def test_a_thousand_divergences_are_not_negative():
    near = 10 ** (6 * uniform(1000, 1, 1, seed=8) - 6)
    one = uniform(1000, 8, 2, seed=9)
    other = one + near * (uniform(1000, 8, 2, seed=10) - 0.5)
    found = sinkhorn_divergence(one, other, unit(uniform(1000, 8, seed=11)), reg=0.1, tol=1e-10)
    same = sinkhorn_divergence(one, other, reg=0.1, tol=1e-10)
    assert min(found.min(), same.min()) >= -1e-12
    assert sinkhorn_divergence(one, one, reg=0.1, tol=1e-10).abs().max() <= 1e-12
    torch.testing.assert_close(sinkhorn_divergence(other, one, reg=0.1, tol=1e-10), same, atol=1e-12, rtol=0)


def test_products_with_the_hessian_and_the_hessian():
    for loss in (lambda x: ot_value(PointCloud(x, y), reg=0.05, **EXACTLY),
                 lambda x: sinkhorn_divergence(x, y, reg=0.05, **EXACTLY)):
        H = hessian(loss, x)
        torch.testing.assert_close(hvp(loss, x, W), (H * W).sum((2, 3)))
        torch.testing.assert_close(torch.autograd.functional.hessian(loss, x), H)
        torch.testing.assert_close(H, H.permute(2, 3, 0, 1), atol=1e-10, rtol=0)


def test_the_hessian_in_a_number_is_a_number():
    def loss(reg): return ot_value(PointCloud(x, y), reg=reg, **EXACTLY)
    step = 1e-3
    differences = (loss(eps + step) - 2 * loss(eps) + loss(eps - step)) / step**2
    torch.testing.assert_close(hessian(loss, eps), differences, atol=0, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own
@pytest.mark.parametrize("name", LOSSES)
def test_function_transforms(name):
    def loss(x): return LOSSES[name](PointCloud(x, y), None, None, 0.05)
    H = hessian(loss, x)
    torch.testing.assert_close(torch.func.hessian(loss)(x), H)
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(loss), (x,), (W,))[1], hvp(loss, x, W))
    many = torch.stack([x, x.flip(0), x + 1])
    slopes = torch.func.vmap(torch.func.grad(loss))(many)
    torch.testing.assert_close(slopes[0], torch.func.grad(loss)(x))
    torch.testing.assert_close(slopes[1].flip(0), slopes[0])
    torch.testing.assert_close(torch.func.vmap(loss)(many)[0], loss(x))
    strength = torch.func.grad(lambda reg: LOSSES[name](PointCloud(x, y), None, None, reg))(eps)
    assert strength.isfinite()
