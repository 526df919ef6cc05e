"""First and second derivatives against finite differences, and identities that need no reference

Every problem of a stencil is solved to 1e-12 by Newton's method, and differences of eighth order leave an error
of a few 1e-8; the bound is 1e-6. Perturbed weights keep their mass.
"""
import pytest
import torch
from test_fake_cuda import Respelled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad, gradcheck, gradgradcheck

from ot_research import implicit, laplacian
from ot_research.batches import batch_sinkhorn
from ot_research.geometry import DenseCost, PointCloud
from ot_research.implicit import attach
from ot_research.plan import Transport
from ot_research.problem import Problem
from ot_research.solvers import ipot

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


@pytest.mark.parametrize("relative", [0.5, 0.05, 5e-3, 5e-4, 5e-5])
@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("n", [20, 80, 300])
def test_moving_all_points_together(n, same, relative, as_installed):
    "The Hessian of the value takes a translation to 2 a: sum_s T[k, :, s, :] = 2 a_k I [Li et al. 2024]"
    x = uniform(n, 2, seed=n)
    y, w = x if same else uniform(n, 2, seed=n + 1), torch.full((n,), 1 / n).double()
    C = (x.unsqueeze(-2) - y).square().sum(-1)
    eps = (relative * C.mean()).item()
    z = x.clone().requires_grad_()
    found = attach(PointCloud(z, y), w, w, eps, *solved(C, w, w, eps))
    (slope,) = grad(found.value, z, create_graph=True)
    moved = [grad(slope, z, torch.eye(2)[k].double().expand_as(z), retain_graph=True)[0] for k in range(2)]
    row = found.plan.row.detach().view(-1, 1, 1)
    torch.testing.assert_close(torch.stack(moved, 1) / (2 * row), torch.eye(2).double().expand(n, 2, 2), atol=1e-9, rtol=0)


@pytest.mark.parametrize("relative", STRENGTHS)
def test_the_gradient_of_the_cost_has_the_marginals(relative):
    inputs = problem(relative)
    C = inputs["C"].requires_grad_()
    (slope,) = grad(matrix(C, *(inputs[k] for k in ("a", "b", "eps"))).plan.cost(), C)
    torch.testing.assert_close(slope.sum(1), inputs["a"], atol=1e-10, rtol=0)
    torch.testing.assert_close(slope.sum(0), inputs["b"], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", ATTACHED)
@pytest.mark.parametrize("kept", [(4000, 2**23), (0, 2**23), (0, 0)], ids=["all", "few", "none"])
def test_zero_weights_and_coincident_points(name, kept, monkeypatch, as_installed):
    "However the entries are kept; weights are moved where they are positive"
    monkeypatch.setattr(implicit, "LARGEST", kept[0])
    monkeypatch.setattr(laplacian, "LARGEST", kept[0])
    monkeypatch.setattr(implicit, "FEW", kept[1])
    inputs = problem(0.1)
    x, y, a = inputs["x"], inputs["y"], inputs["a"].index_fill(0, torch.tensor([1, 4]), 0)
    b = inputs["b"].index_fill(0, torch.tensor(2), 0)

    def function(x, y, part):
        whole = torch.zeros_like(a).masked_scatter(a > 0, part)
        C = (x.unsqueeze(-2) - y).square().sum(-1).detach()
        f, g = solved(C, unit(whole).detach(), unit(b), 0.05)
        return ATTACHED[name](attach(PointCloud(x, y), unit(whole), unit(b), 0.05, f, g))
    leaves = [t.clone().requires_grad_() for t in (x, y, a[a > 0])]
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True, atol=1e-4)


def test_forbidden_pairs():
    inputs = problem(0.1)
    forbidden = (uniform(12, 10, seed=8) < 0.3) & (torch.arange(12).unsqueeze(1) % 10 != torch.arange(10))
    free = (~forbidden).nonzero(as_tuple=True)

    def function(part):
        C = torch.full_like(inputs["C"], torch.inf).index_put(free, part)
        a, b, eps = (inputs[k] for k in ("a", "b", "eps"))
        found = attach(DenseCost(C), a, b, eps, *solved(C, a, b, eps))
        return found.plan.cost() + found.value
    try:
        assert gradgradcheck(function, inputs["C"][free].requires_grad_(), fast_mode=True, atol=1e-4)
    except ValueError as error:
        pytest.skip(str(error))


def test_a_proximal_plan_is_entropic_at_its_last_strength():
    inputs = problem(0.1)
    x, y = inputs["x"], inputs["y"]
    found = ipot(Problem(PointCloud(x, y), inputs["a"], inputs["b"]), beta=0.05, n_iter=200, tol=0.0)
    z = x.clone().requires_grad_()
    entropic = attach(PointCloud(z, y), inputs["a"], inputs["b"], found.eps, found.f, found.g)
    assert found.eps < 0.05 / 100
    torch.testing.assert_close(entropic.plan.dense().detach(), found.plan.dense(), atol=1e-12, rtol=1e-9)
    (slope,) = grad(entropic.value, z)
    torch.testing.assert_close(slope, 2 * (found.plan.row.unsqueeze(-1) * x - found.plan @ y), atol=1e-9, rtol=0)


def test_a_batch_is_attached_as_a_whole():
    inputs = problem(0.1)
    x, y, a, b = (torch.stack([inputs[k], inputs[k].flip(0)]) for k in ("x", "y", "a", "b"))
    for name, loss in ATTACHED.items():
        if name == "potentials": continue
        z = x.clone().requires_grad_()
        (whole,) = grad(sum(loss_of_one(loss, z, y, a, b, inputs["eps"], k) for k in range(2)), z)
        C = (x.unsqueeze(-2) - y.unsqueeze(-3)).square().sum(-1)
        found = attach(PointCloud(z, y), a, b, inputs["eps"], *solved(C, a, b, inputs["eps"]))
        assert isinstance(found.plan, Transport)
        (together,) = grad(loss(found).sum(), z)
        torch.testing.assert_close(together, whole, atol=1e-9, rtol=1e-9)


def loss_of_one(loss, x, y, a, b, eps, k): return loss(attached(PointCloud(x[k], y[k]), a[k], b[k], eps))


@pytest.mark.parametrize("name, argument", CASES, ids=str)
def test_third_derivatives_are_refused(name, argument):
    inputs = problem(0.1)
    t = inputs[argument].requires_grad_()
    (slope,) = grad(LOSSES[name](*inputs.values()), t, create_graph=True)
    (curved,) = grad(slope.sum(), t, create_graph=True)
    with pytest.raises(NotImplementedError, match="third derivatives"): curved.square().sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own
@pytest.mark.parametrize("name", ATTACHED)
def test_function_transforms(name):
    inputs = problem(0.1)
    y, a, b, eps = (inputs[k] for k in ("y", "a", "b", "eps"))
    f, g = solved(inputs["C"], a, b, eps)
    def function(x): return ATTACHED[name](attach(PointCloud(x, y), a, b, float(eps), f, g))
    x, way = inputs["x"], uniform(12, 2, seed=9)
    hessian = torch.func.hessian(function)(x)
    slope = torch.func.grad(function)(x)
    torch.testing.assert_close(torch.func.vjp(function, x)[1](torch.ones(()).double())[0], slope)
    torch.testing.assert_close(torch.func.jvp(function, (x,), (way,))[1], (slope * way).sum())
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacrev(function))(x), hessian, atol=1e-8, rtol=1e-7)
    torch.testing.assert_close(torch.func.jacrev(torch.func.jacfwd(function))(x), hessian, atol=1e-8, rtol=1e-7)
    many = torch.stack([x, x])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(function))(many)[1], slope)
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(function))(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("cost", ["dense", "sqeuclidean", "cosine"])
def test_nothing_strays_from_the_device(dtype, batch, cost):
    with FakeTensorMode(), Respelled():
        tensor = lambda *shape: torch.empty(*batch, *shape, dtype=dtype, device="cuda")
        geometry = DenseCost(tensor(6, 5)) if cost == "dense" else PointCloud(tensor(6, 3), tensor(5, 3), cost)
        found = attach(geometry, tensor(6), tensor(5), 0.1, tensor(6), tensor(5))
        outputs = [found.value, *found.potentials, found.plan.cost(), found.plan @ tensor(5, 2), found.plan.T.project(tensor(6, 2))]
        factor = laplacian.factorize(laplacian.Joint(found.K, found.a, found.b, tensor(6), None))
        for t in (*outputs, factor(tensor(5, 1))): assert t.device.type == "cuda" and t.dtype == dtype
