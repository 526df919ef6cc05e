"""Nothing strays from the device of its input

Fake tensors carry a shape, a type and a device and no numbers: with `device="cuda"` they need no GPU, and
they refuse to meet a tensor of another device. What looks at values (validation, tolerances) cannot run so.

A build of PyTorch without CUDA has no guard for its devices, and three methods ask for one before they would
be faked: indexing, `contiguous` and `copy_`. `Respelled` writes them in other words.
"""
from itertools import islice

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from ot_research.dual import hill, walk
from ot_research.geometry import DenseCost, PointCloud
from ot_research.plan import Plan, dual_bound, rounded_cost
from ot_research.problem import Problem
from ot_research.scaling import (
    Iterate, annealed, constant, half_step, harmonic, over_relaxed, proportional, scale, secant)
from ot_research.solvers import ipot, sinkhorn
from ot_research.together import Kernels, factored, kernel, scaled, soft_minimum, system

N, M, D, K = 6, 5, 3, 2
DTYPES = [torch.float32, torch.float64]
COSTS = ["sqeuclidean", "cosine", "euclidean", lambda x, y: (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1)]
CASES = [(dtype, batch, cost) for dtype in DTYPES for batch in [(), (2,)] for cost in ["dense", *COSTS]]


def name(case) -> str:
    dtype, batch, cost = case
    cost = cost if isinstance(cost, str) else "callable"
    return "-".join([str(dtype)[6:], "batch" if batch else "one", cost])


def view(t: torch.Tensor, index):
    "`t[index]` for slices, numbers, None and one ellipsis"
    dim, index = 0, index if isinstance(index, tuple) else (index,)
    for k, part in enumerate(index):
        if part is None:
            t, dim = t.unsqueeze(dim), dim + 1
        elif part is Ellipsis:
            dim = t.ndim - sum(later is not None for later in index[k + 1:])
        elif isinstance(part, slice):
            t, dim = torch.ops.aten.slice(t, dim, part.start, part.stop, part.step or 1), dim + 1
        else:
            t = t.select(dim, part)
    return t


class Respelled(TorchFunctionMode):
    "Indexing, `contiguous` and `copy_` in words that need no device guard"
    words = {
        torch.Tensor.__getitem__: view,
        torch.Tensor.__setitem__: lambda t, index, value: torch.ops.aten.copy_(view(t, index), value),
        torch.Tensor.contiguous: lambda t: t.clone(memory_format=torch.contiguous_format),
        torch.Tensor.copy_: torch.ops.aten.copy_,
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.words.get(func, func)(*args, **kwargs or {})


class Fake:
    "A problem on a GPU that is not there, and tensors to go with it"

    def __init__(self, dtype, batch, cost):
        self.dtype, self.batch = dtype, batch
        clouds = self.tensor(N, D), self.tensor(M, D)
        geometry = DenseCost(self.tensor(N, M)) if cost == "dense" else PointCloud(*clouds, cost)
        self.problem = Problem(geometry, self.tensor(N), self.tensor(M), check=False)
        self.plan = Plan(self.problem.geometry, self.tensor(N), self.tensor(M), 0.1, dtype)

    def tensor(self, *shape): return torch.empty(*self.batch, *shape, dtype=self.dtype, device="cuda")

    def check(self, **outputs):
        "Every output has the dtype and the device of the input; the keyword spells its shape"
        sizes = dict(n=N, m=M, k=K, d=D)
        for shape, tensors in outputs.items():
            for t in tensors:
                assert t.device.type == "cuda" and t.dtype == self.dtype
                assert t.shape == (*self.batch, *(sizes[letter] for letter in shape.removeprefix("one")))


@pytest.fixture(params=CASES, ids=name)
def fake(request):
    with FakeTensorMode(), Respelled():
        yield Fake(*request.param)


def test_half_step(fake):
    geometry, (a, b) = fake.problem.geometry, (fake.problem.a, fake.problem.b)
    fake.check(n=[half_step(geometry, b.log(), b, 0.1)], m=[half_step(geometry.T, a.log(), a, 0.1)])


def test_hard_c_transform(fake):
    geometry = fake.problem.geometry
    fake.check(n=[geometry.hardmin(fake.tensor(M))], m=[geometry.T.hardmin(fake.tensor(N))])


def test_products_an_adjoint_needs(fake):
    plan, V, W = fake.plan, fake.tensor(M, K), fake.tensor(N, K)
    A, B = fake.tensor(N, D), fake.tensor(M, D)
    fake.check(nk=[plan @ V, plan.project(V), plan.weighted(A, B, V)])
    fake.check(mk=[plan.T @ W, plan.T.project(W), plan.T.weighted(B, A, W)])
    fake.check(n=[plan.row], m=[plan.col], nm=[plan.dense()], one=[plan.cost()])


def test_certificate(fake):
    fake.check(one=[dual_bound(fake.problem, fake.tensor(M)), rounded_cost(fake.problem, fake.plan)])


@pytest.mark.parametrize("loop", ["sinkhorn", "overshooting", "annealed", "ipot"])
def test_the_loop(fake, loop):
    psi = fake.tensor(M)
    start = dict(before=Iterate(-1, -1.0, None, psi), last=Iterate(0, torch.inf, None, psi))
    step = dict(sinkhorn=(constant(0.1), proportional), overshooting=(constant(0.1), over_relaxed(3)), annealed=(annealed(0.1, start=1.0), proportional),
                ipot=(harmonic(1.0), secant))[loop]
    *_, last = islice(scale(fake.problem, *step, inner=2, **start), 6)
    fake.check(n=[last.phi], m=[last.psi, last.start], one=[last.error])


@pytest.mark.parametrize("way", [dict(rho=0.5), dict(rho=(None, 0.5)), dict(mass=0.5)], ids=str)
def test_mass_may_stay_behind(fake, way):
    p = fake.problem
    problem = Problem(p.geometry, p.a, p.b, **way, check=False)
    result = sinkhorn(problem, reg=0.1, tol=0.0, max_iter=3)
    fake.check(n=[result.f, result.plan.row], m=[result.g, result.plan.col])
    fake.check(one=[result.value, result.marginal_error, dual_bound(problem, fake.tensor(M))])


def test_solvers(fake):
    entropic = sinkhorn(fake.problem, reg=0.1, tol=0.0, max_iter=5)
    exact = ipot(fake.problem, beta=0.1, n_iter=5)
    for result in (entropic, exact):
        f, g = result.potentials
        fake.check(n=[result.f, result.plan.row, f], m=[result.g, result.plan.col, g])
    fake.check(one=[entropic.value, entropic.value_linear, entropic.marginal_error])


def test_a_walk(fake):
    fake.check(**dict(zip("nm", ([t] for t in walk(fake.problem, fake.tensor(M), 0.1)))))
    look = hill(fake.problem, 0.1).look(fake.tensor(M))
    fake.check(m=[look.z, look.slope], one=[look.height, look.error])


def test_a_dense_newton_step(fake):
    cost, a, b = (t.reshape(-1, *shape) for t, shape in (
        (fake.problem.geometry.cost_rows(slice(None)), (N, M)), (fake.problem.a, (N,)), (fake.problem.b, (M,))))
    eps = torch.full_like(a[:, 0], 0.1)
    f, K = kernel(cost, b.log(), b, eps)
    kernels = Kernels(a, b, K, K.mT.contiguous())
    at = scaled(kernels, b)
    x = factored(kernels, system(kernels, at), b, torch.float32)
    rows, columns = (f, at.u, soft_minimum(cost, b.log(), b, eps)), (at.col, x)
    fake.check(n=[t.reshape(*fake.batch, N) for t in rows], m=[t.reshape(*fake.batch, M) for t in columns])


def test_the_mode_would_notice(fake):
    with pytest.raises(RuntimeError, match="device"):
        fake.tensor(N) + torch.ones(N)
