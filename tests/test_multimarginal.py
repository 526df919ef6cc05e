"Many marginals: costs, the program, the closed form"
import math

import pytest
import torch

from ot_research.continuous.multimarginal import barycentric, gaussian_tuples, squared_pairs, tuple_program
from ot_research.oracles import barycenter_program, gaussian_cost, linear_program

CHANCE = torch.Generator().manual_seed(0)


def normal(*shape): return torch.randn(*shape, generator=CHANCE, dtype=torch.float64)


def simplex(n):
    weights = torch.rand(n, generator=CHANCE, dtype=torch.float64) + 0.1
    return weights / weights.sum()


def covariances(m, d):
    roots = normal(m, d, d)
    return roots @ roots.mT + 0.1 * torch.eye(d, dtype=torch.float64)


def table(cost, *clouds):
    index = torch.cartesian_prod(*(torch.arange(len(x)) for x in clouds)).T
    return cost(*(x[i] for x, i in zip(clouds, index))).reshape([len(x) for x in clouds])


@pytest.mark.parametrize("m", [2, 3, 5])
def test_the_barycentric_cost_is_a_sum_over_pairs_and_the_least_over_centers(m):
    weights, points, center = simplex(m), normal(m, 7, 3), normal(7, 3)
    cost = barycentric(weights)(*points)
    torch.testing.assert_close(cost, squared_pairs(torch.outer(weights, weights))(*points))
    assert (cost <= sum(w * (x - center).square().sum(1) for w, x in zip(weights, points))).all()


def test_a_pair_of_no_weight_does_not_count():
    weights = torch.tensor([[0, 1.0, 0], [0, 0, 2], [0, 0, 0]])
    x, y, z = normal(3, 4, 2)
    torch.testing.assert_close(squared_pairs(weights)(x, y, z), (x - y).square().sum(1) + 2 * (y - z).square().sum(1))


def test_images_are_rows_too():
    x, y = normal(2, 3, 1, 4, 4)
    torch.testing.assert_close(barycentric([0.5, 0.5])(x, y), (x - y).square().sum((1, 2, 3)) / 4)


@pytest.mark.parametrize("sizes", [(6, 9), (4, 5, 6), (3, 2, 4, 3)])
def test_the_program_is_feasible_and_proves_itself(sizes):
    weights, C = [simplex(n) for n in sizes], normal(*sizes)
    value, plan, potentials = tuple_program(C, *weights)
    for axis, (w, f) in enumerate(zip(weights, potentials)):
        rest = [k for k in range(len(sizes)) if k != axis]
        torch.testing.assert_close(plan.sum(rest), w, rtol=0, atol=1e-9)
        C = C - f.reshape([-1 if k == axis else 1 for k in range(len(sizes))])
    assert plan.min() >= 0 and C.min() > -1e-8
    torch.testing.assert_close(value, sum(w @ f for w, f in zip(weights, potentials)))


def test_two_marginals_are_the_plain_program():
    a, b, C = simplex(7), simplex(5), normal(7, 5)
    torch.testing.assert_close(tuple_program(C, a, b).value, linear_program(C, a, b).value)


def test_masses_other_than_one_and_weights_of_zero_are_legal():
    a, b = torch.tensor([1.0, 0, 2]).double(), torch.tensor([3.0]).double()
    value, plan, _ = tuple_program(torch.tensor([[1.0], [5], [2]]).double(), a, b)
    assert value == pytest.approx(5) and plan[1].item() == 0


def test_the_value_is_that_of_the_barycenter():
    "Agueh and Carlier's theorem, with a support that holds all means of tuples"
    weights, grids = torch.tensor([0.25, 0.25, 0.5]).double(), [torch.arange(4.0).double()[:, None] for _ in range(3)]
    masses = [simplex(4) for _ in range(3)]
    support = torch.arange(0, 3.01, 0.25).double()
    C = (support[:, None] - grids[0].T).square()
    by_center = barycenter_program(C, torch.stack(masses), weights).value
    torch.testing.assert_close(tuple_program(table(barycentric(weights), *grids), *masses).value, by_center)


@pytest.mark.parametrize("m, d", [(2, 1), (2, 3), (3, 2), (5, 4)])
def test_maps_of_gaussians_have_the_right_marginals_and_prove_themselves(m, d):
    means, covs, weights = normal(m, d), covariances(m, d), simplex(m)
    best = gaussian_tuples(means, covs, weights, tol=1e-10)
    torch.testing.assert_close(best.maps @ best.cov @ best.maps.mT, covs)
    torch.testing.assert_close((weights[:, None, None] * best.maps).sum(0), torch.eye(d, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.linalg.eigvalsh(best.maps).min() > 0
    tuples = best.maps @ torch.linalg.cholesky(best.cov)  # of a unit normal; their expected cost, by hand
    center = (weights[:, None, None] * tuples).sum(0)
    spread = (weights * ((tuples - center).square().sum((1, 2)) + (means - best.mean).square().sum(1))).sum()
    torch.testing.assert_close(best.value, spread)


def test_two_gaussians_are_bures_and_wasserstein():
    means, covs = normal(2, 3), covariances(2, 3)
    best = gaussian_tuples(means, covs, torch.tensor([0.7, 0.3]).double())
    torch.testing.assert_close(best.value, 0.21 * gaussian_cost(means[0], covs[0], means[1], covs[1]))


@pytest.mark.parametrize("weights", [[0.5, 0.6], [1.2, -0.2], [1.0, 0.0], [math.nan, 0.5]])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="positive and of sum 1"): barycentric(weights)


def test_what_cannot_work_is_refused():
    for bad in (torch.zeros(2, 2), -torch.ones(2, 2), torch.full((2, 2), math.inf), torch.ones(1, 1)):
        with pytest.raises(ValueError, match="finite weights"): squared_pairs(bad)
    with pytest.raises(ValueError, match="2 marginals was given 3"): squared_pairs(torch.ones(2, 2))(*normal(3, 4, 2))
    with pytest.raises(ValueError, match="shorter|longer"): barycentric([0.5, 0.5])(*normal(3, 4, 2))
    a = torch.full((3,), 1 / 3)
    with pytest.raises(ValueError, match="do not fit"): tuple_program(torch.zeros(3, 4), a, a)
    with pytest.raises(ValueError, match="of one mass"): tuple_program(torch.zeros(3, 3), a, 2 * a)
    with pytest.raises(ValueError, match=">= 0"): tuple_program(torch.zeros(3, 3), a, torch.tensor([1.0, 1, -1]))
    with pytest.raises(ValueError, match="finite"): tuple_program(torch.full((3, 3), math.nan), a, a)
    means, weights = normal(2, 2), torch.tensor([0.5, 0.5]).double()
    with pytest.raises(ValueError, match="positive definite"): gaussian_tuples(means, torch.zeros(2, 2, 2).double(), weights)
    with pytest.raises(ValueError, match="raise tol"): gaussian_tuples(means, covariances(2, 2), weights, max_iter=1)
