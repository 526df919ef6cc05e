"""First and second derivatives against finite differences, and identities that need no reference

Every problem of a stencil is solved to 1e-12 by Newton's method, and differences of eighth order leave an error
of a few 1e-8; the bound is 1e-6. Perturbed weights keep their mass.
"""
import pytest
import torch
from test_fake_cuda import Respelled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad

from ot_research.batches import batch_sinkhorn
from ot_research.geometry import DenseCost, PointCloud
from ot_research.implicit import attach
from ot_research.plan import Problem

WEIGHTS = torch.tensor([4 / 5, -1 / 5, 4 / 105, -1 / 280], dtype=torch.float64)  # of a difference of order 8
STEPS = torch.cat([torch.arange(1.0, 5), -torch.arange(1.0, 5)]).double()
STRENGTHS = [0.1, 0.01, 0.001]  # over the mean cost


def uniform(*shape, seed=0):
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def unit(w): return w / w.sum(-1, keepdim=True)


def solved(C, a, b, eps):
    "Potentials to 1e-12, of every problem in a batch; eps may differ"
    eps = torch.as_tensor(eps).reshape(-1, 1, 1)
    found = batch_sinkhorn(Problem(DenseCost(C.detach().reshape(-1, *C.shape[-2:]) / eps), a, b, check=False),
                           reg=1.0, tol=1e-12, max_iter=2000)
    assert found.converged.all()
    return [(eps[..., 0] * t).reshape(*C.shape[:-2], -1) for t in (found.f, found.g)]


def missed(C, a, b, eps, rho):
    "The same where marginals may be missed at a price, by Newton's method from large strengths down"
    f, g, strength = torch.zeros_like(a), torch.zeros_like(b), C.max()
    while True:
        strength = torch.maximum(strength / 2, eps)
        for _ in range(25):
            K = ((f.unsqueeze(-1) + g - C) / strength).exp()
            row, col, asked = K @ b, K.T @ a, [(-t / price).exp() for t, price in zip((f, g), rho)]
            diagonal = [sums + strength / price * wish for sums, price, wish in zip((row, col), rho, asked)]
            system = torch.cat([torch.cat([diagonal[0].diag(), K * b], 1), torch.cat([K.T * a, diagonal[1].diag()], 1)])
            step = -strength * torch.linalg.solve(system, torch.cat([row - asked[0], col - asked[1]]))
            step *= (3 * strength / step.abs().max()).clamp(max=1)
            f, g = f + step[:len(f)], g + step[len(f):]
            if step.abs().max() < 1e-13: break
        if strength == eps:
            assert max((row - asked[0]).abs().max(), (col - asked[1]).abs().max()) < 1e-10
            return f, g


def attached(geometry, a, b, eps):
    "The plan of a problem as a function of all that went into it"
    a, b = unit(a), unit(b)
    C = geometry.cost_rows(slice(None)).detach()
    return attach(geometry, a, b, eps, *solved(C, a.detach(), b.detach(), eps.detach()))


def cloud(x, y, a, b, eps): return attached(PointCloud(x, y), a, b, eps)
def matrix(C, a, b, eps): return attached(DenseCost(C), a, b, eps)


def divergence(C, x, y, a, b, eps):
    return cloud(x, y, a, b, eps).value - (cloud(x, x, a, a, eps).value + cloud(y, y, b, b, eps).value) / 2


V, W = uniform(10, 3, seed=5), uniform(12, 3, seed=6)
ATTACHED = dict(
    value=lambda found: found.value,
    cost=lambda found: found.plan.cost(),
    product=lambda found: (W * (found.plan @ V)).sum() + (V * (found.plan.T @ W)).square().sum(),
    map=lambda found: (found.plan.project(V) - W).square().sum(),
    potentials=lambda found: sum((t * torch.arange(len(t)).double().sin()).sum() for t in found.potentials))
LOSSES = dict(divergence=divergence) | {
    f"{name} of a {of.__name__}": lambda C, *inputs, loss=loss, of=of: loss(of(*inputs) if of is cloud else of(C, *inputs[2:]))
    for name, loss in ATTACHED.items() for of in (cloud, matrix)}
CASES = [(name, argument) for name in LOSSES
         for argument in (["C"] if name.endswith("matrix") else ["x", "y", "a", "b", "eps"])]


def problem(relative):
    "Twelve points and ten near three places, so that no plan is a vertex; two coincide; weights and the strength"
    places = torch.tensor([[0, 0], [1, 0], [0, 1]]).double()
    x, y = (places.repeat(4, 1)[:k] + 0.04 * uniform(k, 2, seed=k) for k in (12, 10))
    y[0] = x[0]
    C = (x.unsqueeze(-2) - y).square().sum(-1)
    a, b = unit(0.3 + uniform(12, seed=3)), unit(0.3 + uniform(10, seed=4))
    return dict(C=C, x=x, y=y, a=a, b=b, eps=relative * C.mean())


def difference(function, at, along, size):
    "Derivative along a direction, to eighth order"
    values = [function(at + size * step * along) for step in STEPS]
    return sum(w * (up - down) for w, up, down in zip(WEIGHTS, values[:4], values[4:])) / size


def checked(function, at, argument, eps):
    "Gradient and Hessian product of a function of one argument, against differences along a direction"
    along = uniform(*at.shape, seed=7) - 0.5 if at.ndim else torch.ones_like(at)
    even = (lambda t: t - t.mean()) if argument in "ab" else (lambda t: t)  # masses are kept
    along = even(along)
    size = (0.02 * at.min() if argument in "ab" else 0.03 * eps) / along.abs().max()

    def gradient(t):
        t = t.clone().requires_grad_()
        return even(grad(function(t), t)[0])

    t = at.clone().requires_grad_()
    (slope,) = grad(function(t), t, create_graph=True)
    product = even(grad(slope, t, along)[0])
    first, second = difference(function, at, along, size), difference(gradient, at, along, size)
    assert (first - (slope * along).sum()).abs() <= 1e-6 * first.abs()
    assert (second - product).norm() <= 1e-6 * second.norm()


@pytest.mark.parametrize("relative", STRENGTHS)
@pytest.mark.parametrize("name, argument", CASES, ids=str)
def test_gradient_and_hessian_product(name, argument, relative, as_installed):
    inputs = problem(relative)
    checked(lambda t: LOSSES[name](*{**inputs, argument: t}.values()), inputs[argument], argument, inputs["eps"])




@pytest.mark.parametrize("rho", [(0.5, 0.5), (torch.inf, 0.02)], ids=str)
@pytest.mark.parametrize("name", ATTACHED)
@pytest.mark.parametrize("argument", ["x", "a", "C", "eps"])
def test_marginals_that_may_be_missed(name, argument, rho, as_installed):
    inputs = problem(0.01)

    def loss(**changed):
        given = {**inputs, **changed}
        geometry = DenseCost(given["C"]) if argument == "C" else PointCloud(given["x"], given["y"])
        a, b, eps = given["a"], given["b"], given["eps"]
        constants = [t.detach() for t in (geometry.cost_rows(slice(None)), a, b, eps)]
        return ATTACHED[name](attach(geometry, a, b, eps, *missed(*constants, rho), rho))
    checked(lambda t: loss(**{argument: t}), inputs[argument], argument, inputs["eps"])
