"The doors agree with answers found by hand, by a closed form and by three other libraries"
import math
import warnings

import ot
import pytest
import torch
from geomloss import SamplesLoss
from scipy.optimize import linear_sum_assignment
from torch.testing import assert_close

from ot_research import solve, solve_sample
from ot_research.oracles import gaussian_cost
from ot_research.result import ConvergenceWarning

F64 = torch.float64
pytestmark = pytest.mark.usefixtures("as_installed")


def weights(n: int) -> torch.Tensor:
    w = torch.rand(n, dtype=F64) + 0.1
    return w / w.sum()


def clouds(n=40, m=30, d=3):
    "Points and weights, and the squared distances between them"
    x, y = torch.rand(n, d, dtype=F64), torch.rand(m, d, dtype=F64)
    return x, y, weights(n), weights(m), (x[:, None] - y).square().sum(-1)


# --- By hand ---

@pytest.mark.parametrize("reg", [0, 1e-3, 1.0, 1e3])
def test_one_point_has_one_plan(reg):
    result = solve(torch.full((1, 1), 2.5, dtype=F64), reg=reg)
    assert_close(result.plan.dense(), torch.ones(1, 1, dtype=F64))
    assert_close(torch.stack([result.value, result.value_linear]), torch.full((2,), 2.5, dtype=F64))


@pytest.mark.parametrize("reg", [0.05, 0.3, 1.0, 10.0])
def test_two_points_that_may_swap(reg):
    "C = 1 - I: staying has the odds e^(1/reg)"
    stay = 0.5 / (1 + math.exp(-1 / reg))
    result = solve(1 - torch.eye(2, dtype=F64), reg=reg, tol=1e-12)
    assert_close(result.plan.dense(), torch.tensor([[stay, 0.5 - stay], [0.5 - stay, stay]], dtype=F64))
    assert_close(result.value_linear.item(), 1 - 2 * stay)
    assert_close(result.value.item(), -reg * math.log((1 + math.exp(-1 / reg)) / 2))


def test_two_points_that_may_swap_exactly():
    result = solve(1 - torch.eye(2, dtype=F64), reg=0)
    assert_close(result.plan.dense(), torch.eye(2, dtype=F64) / 2)
    assert result.value == result.value_linear and result.value.abs() < 1e-12 and result.converged


@pytest.mark.parametrize("reg", [0, 1.0, 10.0])
def test_three_points_on_a_line(reg):
    "From 0, 1, 2 to 1, 2, 3: every monotone plan costs 1 a unit, and at reg=0 none is cheaper"
    x = torch.arange(3, dtype=F64)[:, None]
    result = solve_sample(x, x + 1, reg=reg)
    assert result.value_linear >= 1 - 1e-6
    if reg == 0:
        assert_close(result.value.item(), 1.0, atol=1e-4, rtol=0)


@pytest.mark.parametrize("reg", [0, 0.1, 1.0])
def test_a_cost_that_is_the_same_everywhere(reg):
    "The plan is a b' / mass, whose relative entropy against a b' is -mass log mass"
    a, b = 3 * weights(4), 3 * weights(5)
    result = solve(torch.full((4, 5), 2.0, dtype=F64), a, b, reg=reg)
    assert_close(result.plan.dense(), a[:, None] * b / 3)
    assert_close(result.value_linear.item(), 6.0)
    assert_close(result.value.item(), 6 - reg * 3 * math.log(3))


def test_much_entropy_makes_the_sides_independent():
    x, y, a, b, C = clouds()
    result = solve_sample(x, y, a, b, reg=1e6)
    assert_close(result.plan.dense(), a[:, None] * b, rtol=1e-5, atol=0)
    assert_close(result.value, a @ C @ b, rtol=1e-5, atol=0)


# --- POT ---

@pytest.mark.parametrize("relative", [1.0, 0.1, 0.02])
def test_pot_sinkhorn(relative):
    x, y, a, b, C = clouds()
    reg = relative * C.mean().item()
    peer = ot.solve(C, a, b, reg=reg, reg_type="KL", max_iter=100_000, tol=1e-12)
    for ours in (solve(C, a, b, reg=reg, tol=1e-11), solve_sample(x, y, a, b, reg=reg, tol=1e-11)):
        assert_close(ours.plan.dense(), peer.plan, rtol=1e-6, atol=1e-10)
        assert_close(ours.value, peer.value, rtol=1e-8, atol=0)
        assert_close(ours.value_linear, peer.value_linear, rtol=1e-8, atol=0)


@pytest.mark.parametrize("d", [2, 16])
def test_pot_emd(d):
    x, y, a, b, C = clouds(20, 15, d)
    exact = ot.emd2(a, b, C)
    for ours in (solve(C, a, b, reg=0), solve_sample(x, y, a, b, reg=0)):
        bounds = ours.certificate()
        assert ours.converged and bounds.lower <= exact <= bounds.upper
        assert_close(ours.value, exact, rtol=1e-4, atol=0)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "cityblock"])
def test_pot_metrics(metric):
    x, y, a, b, _ = clouds()
    peer = ot.solve_sample(x, y, a, b, metric=metric, reg=0.1, reg_type="KL", max_iter=100_000, tol=1e-12)
    cost = metric if metric != "cityblock" else lambda x, y: torch.cdist(x, y, p=1)
    ours = solve_sample(x, y, a, b, cost=cost, reg=0.1, tol=1e-11)
    assert_close(ours.plan.dense(), peer.plan, rtol=1e-6, atol=1e-10)
    assert_close(ours.value, peer.value, rtol=1e-8, atol=0)


# --- SciPy ---

@pytest.mark.parametrize("d", [2, 16])
def test_scipy_assignment(d):
    x, y, *_, C = clouds(30, 30, d)
    exact = C[linear_sum_assignment(C)].mean()
    bounds = (result := solve_sample(x, y, reg=0)).certificate()
    assert result.converged and bounds.lower <= exact <= bounds.upper


# --- GeomLoss ---

@pytest.mark.parametrize("blur", [0.5, 0.2, 0.1])
def test_geomloss(blur):
    "Its cost is |x - y|^2 / 2: reg is 2 blur^2 here, and the value twice its own; it stops on a schedule"
    x, y, a, b, _ = clouds()
    loss = SamplesLoss("sinkhorn", p=2, blur=blur, scaling=0.99, debias=False, backend="tensorized")
    assert_close(solve_sample(x, y, a, b, reg=2 * blur**2).value, 2 * loss(a, x, b, y), rtol=1e-3, atol=0)


# --- Mass that stays behind ---

@pytest.mark.parametrize("reg", [0.1, 0.02])
@pytest.mark.parametrize("rho", [0.05, 1.0, 50.0, (0.3, math.inf), (0.1, 2.0)], ids=str)
def test_pot_sinkhorn_unbalanced(reg, rho):
    "Its reg_m is rho, with inf for a marginal that is exact"
    x, y, a, b, C = clouds()
    b = 1.5 * b
    peer = ot.unbalanced.sinkhorn_unbalanced(a, b, C, reg, rho, stopThr=1e-15, numItermax=200_000)
    given = dict(reg=reg, rho=rho, tol=1e-11, max_iter=20_000)
    for ours in (solve(C, a, b, **given), solve_sample(x, y, a, b, **given)):
        assert_close(ours.plan.dense(), peer, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("rho", [0.1, 2.0])
def test_pot_solve_unbalanced(rho):
    "Its plan and cost; its `value` is left out, which is the last error of its loop in version 0.9.7"
    x, y, a, b, C = clouds()
    peer = ot.solve(C, a, 1.5 * b, reg=0.1, reg_type="KL", unbalanced=rho, unbalanced_type="KL",
                    method="sinkhorn", max_iter=100_000, tol=1e-14)
    ours = solve(C, a, 1.5 * b, reg=0.1, rho=rho, tol=1e-11)
    assert_close(ours.plan.dense(), peer.plan, rtol=1e-6, atol=1e-10)
    assert_close(ours.value_linear, peer.value_linear, rtol=1e-7, atol=0)


def test_pot_documentation_of_unbalanced_transport():
    half, swap = torch.tensor([0.5, 0.5], dtype=F64), 1 - torch.eye(2, dtype=F64)
    printed = torch.tensor([[0.3220536, 0.1184769], [0.1184769, 0.3220536]], dtype=F64)
    assert_close(solve(swap, half, half, reg=1, rho=1, tol=1e-12).plan.dense(), printed, rtol=0, atol=6e-8)
    light = torch.tensor([0.5, 0.1], dtype=F64)
    cost = solve(swap, light, half, reg=1, rho=1, tol=1e-12).value_linear
    assert_close(cost.item(), 0.19600125, rtol=0, atol=1e-6)


SLOWLY = dict(scaling=0.9999, backend="tensorized")

@pytest.mark.parametrize("p, blur, reach", [(2, 0.1, 0.3), (2, 0.05, 0.5), (2, 0.2, 1.0), (1, 0.1, 0.5)])
def test_geomloss_reach(p, blur, reach):
    "For p=2 its cost is |x - y|^2 / 2, so everything is twice its own; it starts near its end, to stay there"
    x, y, a, b, _ = clouds()
    unit, cost = (2, "sqeuclidean") if p == 2 else (1, "euclidean")
    loss = SamplesLoss("sinkhorn", p=p, blur=blur, reach=reach, debias=False, **SLOWLY, diameter=1.05 * blur)
    strengths = dict(reg=unit * blur**p, rho=unit * reach**p)
    ours = solve_sample(x, y, a, b, cost=cost, **strengths, tol=1e-10, max_iter=20_000)
    assert_close(ours.value, unit * loss(a, x, b, y), rtol=0, atol=1e-6)


def test_geomloss_value_of_masses_other_than_one():
    "It leaves out reg (|a| |b| - (|a| + |b|) / 2)"
    x, y, a, b, _ = clouds()
    a, b = 2 * a, 0.5 * b
    loss = SamplesLoss("sinkhorn", p=2, blur=0.2, reach=0.5, debias=False, **SLOWLY, diameter=0.21)
    ours = solve_sample(x, y, a, b, reg=0.08, rho=0.5, tol=1e-10)
    assert_close(ours.value - 0.08 * (1.0 - 1.25), 2 * loss(a, x, b, y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("reg", [1.0, 0.1, 0.02])
@pytest.mark.parametrize("mass", [0.1, 0.5, 0.9])
def test_pot_entropic_partial(reg, mass):
    "Its entropy is measured from the uniform plan: reg log(a b') on the cost makes up for it"
    x, y, a, b, C = clouds()
    b = 1.5 * b
    uniform = C + reg * (a[:, None] * b).log()
    arrays = (t.numpy() for t in (a, b, C))
    peer = torch.as_tensor(ot.partial.entropic_partial_wasserstein(
        *arrays, reg, m=mass, numItermax=20_000, stopThr=1e-15))
    assert_close(solve(uniform, a, b, reg=reg, mass=mass, tol=1e-11).plan.dense(), peer, rtol=1e-6, atol=1e-9)


# --- A closed form ---

@pytest.mark.parametrize("reg, cost", [(0.1, 4.13490), (0.5, 4.31386), (1.0, 4.5)])
def test_gaussians(reg, cost):
    "N(0, 1) to N(2, 1/2), second number a variance [Janati et al. 2020], on a fine grid"
    one = torch.ones(1, dtype=F64)
    closed = gaussian_cost(0 * one, one[None], 2 * one, one[None] / 2, reg=reg)
    grid = torch.linspace(-5, 7, 240, dtype=F64)
    a, b = (torch.softmax(-(grid - mean).square() / (2 * var), 0) for mean, var in ((0, 1.0), (2, 0.5)))
    result = solve_sample(grid[:, None], grid[:, None], a, b, reg=reg)
    assert_close(closed.item(), cost, rtol=0, atol=5e-6)
    assert_close(result.value_linear, closed, rtol=1e-4, atol=0)


# --- With itself, wherever it can be asked ---

@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("door", [solve, solve_sample])
def test_every_strength_gives_a_plan(door, dtype):
    "From 1 to 1e-8 of the mean cost: converged or not, a finite plan of the right mass, and bounds that hold"
    x, y, a, b, C = (t.to(dtype) for t in clouds(25, 20, 2))
    exact, above = ot.emd2(*(t.double() for t in (a, b, C))), math.inf
    rounding = 1e-5 if dtype == torch.float32 else 1e-9
    for k in range(9):
        reg = 10.0**-k * C.mean().item()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = door(*((C,) if door is solve else (x, y)), a, b, reg=reg, max_iter=200)
        assert [w.category for w in caught] == [] if result.converged else [ConvergenceWarning]
        assert result.plan.dense().isfinite().all() and result.value.isfinite()
        assert_close(result.plan.dense().sum().item(), 1.0, rtol=0, atol=max(1e-6, rounding))
        bounds = result.certificate()
        assert bounds.lower <= exact + rounding and exact <= bounds.upper + rounding
        if not result.converged: continue
        assert result.value <= above + 1e-5 * C.mean(), "more entropy costs more"
        above = result.value


@pytest.mark.parametrize("relative", [1.0, 0.1, 1e-2, 1e-4])
def test_float32_is_float64_on_the_same_numbers(relative):
    x, y, a, b, C = (t.float() for t in clouds(25, 20, 2))
    reg, tol = relative * C.mean().item(), 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        single, double = (solve_sample(*(t.to(dtype) for t in (x, y, a, b)), reg=reg, tol=tol, max_iter=3000)
                          for dtype in (torch.float32, F64))
    assert_close(single.value.double(), double.value, rtol=1e-5, atol=0)
    assert_close(single.value_linear.double(), double.value_linear, rtol=1e-4, atol=0)
    assert_close(single.plan.row.double(), double.plan.row, rtol=0, atol=1e-4)
