"Ragged lists and converted potentials are the same problems"
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from ot_research import solve, solve_sample
from ot_research.conversion import from_ott, padded_clouds, padded_costs, reg_from_blur, to_ott, unpadded

F64 = torch.float64
SIZES = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4)


def weights(n):
    w = torch.rand(n, dtype=F64) + 0.1
    return w / w.sum()


@settings(max_examples=20)
@given(SIZES)
def test_a_list_of_clouds_is_solved_one_by_one(sizes):
    n, m = map(list, zip(*sizes))
    xs, ys = ([torch.rand(k, 2, dtype=F64) + 100 for k in side] for side in (n, m))
    a, b = ([weights(k) for k in side] for side in (n, m))
    (x, a_batch), (y, b_batch) = padded_clouds(xs, a), padded_clouds(ys, b)
    batch = solve_sample(x, y, a_batch, b_batch, reg=0.1, tol=1e-10)
    plans = unpadded(batch.plan.dense(), n, m)
    for *problem, plan, f in zip(xs, ys, a, b, plans, unpadded(batch.potentials[0], n)):
        alone = solve_sample(*problem, reg=0.1, tol=1e-10)
        assert_close(plan, alone.plan.dense(), rtol=1e-6, atol=1e-10)
        assert_close(f, alone.potentials[0], rtol=0, atol=1e-6)


@settings(max_examples=20)
@given(SIZES)
def test_a_list_of_costs_is_solved_one_by_one(sizes):
    costs = [torch.rand(*size, dtype=F64) for size in sizes]
    batch = solve(*padded_costs(costs), reg=0.1, tol=1e-10)
    for cost, value in zip(costs, batch.value):
        assert_close(value, solve(cost, reg=0.1, tol=1e-10).value, rtol=0, atol=1e-8)


def test_what_was_padded_can_be_cut():
    costs = [torch.rand(2, 3), torch.rand(4, 1)]
    for cost, back in zip(costs, unpadded(padded_costs(costs)[0], [2, 4], [3, 1])): assert_close(back, cost)


def test_weights_must_fit_their_clouds():
    with pytest.raises(ValueError, match=r"lengths \[3\], the problems \[2\]"):
        padded_clouds([torch.rand(2, 2)], [torch.rand(3)])


@pytest.mark.parametrize("reg", [1.0, 0.01])
def test_there_and_back(reg):
    C, a, b = torch.rand(6, 5, dtype=F64), weights(6), weights(5)
    result = solve(C, a, b, reg=reg)
    for back, potential in zip(from_ott(*to_ott(result), a, b, reg), result.potentials):
        assert_close(back, potential, rtol=0, atol=1e-12)


def test_a_blur_has_the_dimension_of_its_cost():
    assert reg_from_blur(0.5, 1) == 0.5
    assert reg_from_blur(0.1) == pytest.approx(0.02)
