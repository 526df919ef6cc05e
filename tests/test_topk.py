"SOFT top-k: the authors' numbers, the plan it stands for, derivatives, edges"
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from ot_research import solve_sample
from ot_research.apps.topk import soft_rank, soft_sort, soft_topk, soft_topk_sorted

SIX = torch.tensor([5.0, 2, 3, 4, 1, 6], dtype=torch.float64)
CHOSEN = torch.tensor([.15886909, .84113085, .63542354, .36457655, .9414631, .05853688], dtype=torch.float64)
SLOPES = torch.tensor([.10541585, -.04306151, -.07465184, -.07465144, .04347444, .04347456]).double()
EPS = 0.05 * 36  # the authors divide costs by their largest
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def near(a, b, atol): torch.testing.assert_close(a, b, atol=atol, rtol=0)


def rows(*shape, dtype=torch.float64): return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_authors_values_and_gradients(shape, dtype):
    scores = SIX.to(dtype).expand(*shape, 6).clone().requires_grad_()
    chosen = soft_topk(scores, 3, eps=EPS, largest=False)
    slopes, = torch.autograd.grad(chosen[..., 1:4].sum(), scores)
    assert chosen.dtype == dtype
    near(chosen.detach(), CHOSEN.to(dtype).expand_as(chosen), 5e-7)
    near(slopes, SLOPES.to(dtype).expand_as(chosen), 5e-7)


def test_the_largest_are_the_smallest_of_the_opposite():
    near(soft_topk(SIX, 2, eps=EPS), soft_topk(-SIX, 2, eps=EPS, largest=False), 0)
    near(soft_topk_sorted(SIX, 2, eps=EPS), soft_topk_sorted(-SIX, 2, eps=EPS, largest=False), 0)


@pytest.mark.parametrize("eps", [0.02, 0.3, 4.0, 100.0])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_it_is_the_plan_between_two_anchors(eps, k):
    x, places = rows(2, 12), torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    b = torch.tensor([k / 12, 1 - k / 12], dtype=torch.float64)
    plan = solve_sample(x.unsqueeze(-1), places, None, b, reg=eps, tol=1e-13).plan.dense()
    near(soft_topk(x, k, eps=eps, largest=False), 12 * plan[..., 0], 1e-10)


@given(st.integers(0, 2**32), st.integers(1, 40), st.floats(-5, 4), st.floats(-3, 6))
def test_k_are_chosen_in_the_order_of_the_scores(seed, n, strength, size):
    chance = torch.Generator().manual_seed(seed)
    x = 10**size * torch.randn(n, generator=chance, dtype=torch.float64)
    if seed % 2: x = x.round()  # with ties
    for k in {0, 1, n // 2, n}:
        A = soft_topk(x, k, eps=10**strength)
        assert A.isfinite().all() and (A >= 0).all() and (A <= 1).all()
        near(A.sum(), A.new_tensor(k), 1e-10)
        assert (A[x.argsort()].diff() >= -1e-15).all()


@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(-4, 2))
def test_what_is_misplaced_is_bounded(seed, n, strength):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k, eps, best = max(1, n // 3), 10**strength, x.sort(descending=True)
    A = soft_topk(x, k, eps=eps)
    gap = best.values[k - 1] - best.values[k]
    assert (1 - A[best.indices[:k]]).sum() / n <= eps * math.log(2) / (2 * gap) + 1e-14


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("n", [1, 2, 1000, 100_000])
def test_sums_are_right_for_few_and_many(n, dtype, atol):
    x = rows(3, n, dtype=dtype)
    for eps, k in itertools.product((1e-4, 1e-2, 1.0, 100.0), (1, n // 2, n)):
        if k: near(soft_topk(x, k, eps=eps).sum(-1), x.new_full((3,), k), atol * max(k, 1))


def test_derivatives_of_both_orders():
    x, eps = rows(2, 6).requires_grad_(), torch.tensor([0.6, 2.0], dtype=torch.float64, requires_grad=True)
    for k, largest in ((1, True), (2, False), (5, True)):
        choose = lambda x, eps: soft_topk(x, k, eps=eps, largest=largest)
        assert gradcheck(choose, (x, eps))
        assert gradgradcheck(choose, (x, eps))


def test_a_third_derivative():
    x, way = rows(5), rows(5)
    f = lambda t: soft_topk(x + t * way, 2, eps=1.0).square().sum()
    second, t = torch.func.grad(torch.func.grad(f)), torch.tensor(0.1, dtype=torch.float64)
    slope = (second(t + 1e-4) - second(t - 1e-4)) / 2e-4
    near(torch.func.grad(second)(t), slope, 1e-6)


def test_derivatives_with_masks():
    x = torch.cat([rows(2, 5), torch.full((2, 2), -math.inf)], 1)
    eps = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    free = x[:, :5].clone().requires_grad_()
    padded = lambda free, eps: soft_topk(torch.cat([free, x[:, 5:]], 1), 2, eps=eps)
    assert gradcheck(padded, (free, eps)) and gradgradcheck(padded, (free, eps))
    x.requires_grad_()
    first, = torch.autograd.grad(soft_topk(x, 2, eps=eps)[:, 0].sum(), x, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (x, eps))
    assert (first[:, 5:] == 0).all() and (second[0][:, 5:] == 0).all()
    assert all(t.isfinite().all() for t in (first, *second))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own
def test_the_transforms_of_torch_func():
    x, w = rows(3, 4, 6), rows(6)
    choose = lambda x: soft_topk(x, 2, eps=0.5)
    near(torch.func.vmap(choose)(x), choose(x), 1e-14)
    near(torch.func.vmap(choose, in_dims=1)(x), choose(x.movedim(1, 0)), 1e-14)
    near(torch.func.jacrev(choose)(w), torch.func.jacfwd(choose)(w), 1e-13)
    hessian = torch.func.hessian(lambda w: choose(w).square().sum())(w)
    near(hessian, hessian.T, 1e-13)
    slopes = torch.func.vmap(torch.func.grad(lambda row: choose(row)[0]))(x[0])
    alone = x[0].clone().requires_grad_()
    near(slopes, torch.autograd.grad(choose(alone)[:, 0].sum(), alone)[0], 1e-13)
    with pytest.raises(ValueError, match="1 of the rows have NaN"):
        torch.func.vmap(choose)(torch.stack([w, w * math.nan]))


def test_a_strength_for_every_row():
    x, eps = rows(2, 3, 8), torch.rand(2, 3, dtype=torch.float64)
    together = soft_topk(x, 3, eps=eps)
    for i, j in itertools.product(range(2), range(3)):
        near(together[i, j], soft_topk(x[i, j], 3, eps=eps[i, j].item()), 1e-14)
    assert soft_topk(x[0, 0], 3, eps=torch.ones(7)).shape == (7, 8)


def test_rows_do_not_know_of_each_other():
    x = rows(3, 8)
    wild = torch.cat([x, torch.tensor([[1e12] + [-1e12] * 7], dtype=torch.float64)])
    near(soft_topk(wild, 3, eps=0.5)[:3], soft_topk(x, 3, eps=0.5), 1e-14)
    wild = wild.clamp(-1e4, 1e4)  # of one strength for all, a door can lose 16 digits
    near(soft_topk_sorted(wild, 3, eps=0.5)[:3], soft_topk_sorted(x, 3, eps=0.5), 1e-7)


@pytest.mark.parametrize("largest", [True, False])
def test_masks(largest):
    x = rows(2, 5)
    mask = torch.full((2, 2), -math.inf, dtype=torch.float64)
    padded = torch.cat([mask, x], 1)
    for k in range(6):
        A = soft_topk(padded, k, eps=0.3, largest=largest)
        assert (A[:, :2] == 0).all()
        near(A[:, 2:], soft_topk(x, k, eps=0.3, largest=largest), 1e-14)
        A = soft_topk_sorted(padded, k, eps=0.3, largest=largest)
        assert A.shape == (2, 7, k) and (A[:, :2] == 0).all()
        near(A[:, 2:], soft_topk_sorted(x, k, eps=0.3, largest=largest), 1e-7)


def test_masks_of_different_length_and_both_infinities():
    x = torch.tensor([[1.0, 2, 3, -math.inf], [1, -math.inf, 3, math.inf]], dtype=torch.float64)
    A, B = (choose(x, 2, eps=0.2, largest=False) for choose in (soft_topk, soft_topk_sorted))
    assert (A[0, 3] == 0) and (A[1] == torch.tensor([1, 0, 1, 0])).all()
    assert (B[0, 3] == 0).all() and (B[1, [1, 3]] == 0).all()
    near(A, B.sum(-1), 1e-2)


@pytest.mark.parametrize("k", [0, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_and_everything(k, dtype):
    x = SIX.to(dtype).requires_grad_()
    A = soft_topk(x, k, eps=1.0)
    assert (A == k / 6).all()
    A.sum().backward()
    assert (x.grad == 0).all()
    assert soft_topk_sorted(x.detach(), 0, eps=1.0).shape == (6, 0)


def test_ties():
    x = torch.tensor([1.0, 1, 1, 0], dtype=torch.float64, requires_grad=True)
    A = soft_topk(x, 2, eps=1e-8)
    near(A.detach(), torch.tensor([2, 2, 2, 0]).double() / 3, 1e-14)
    slopes, = torch.autograd.grad(A[0], x)
    assert slopes.isfinite().all() and (slopes[0] > 0) and (slopes[1:3] < 0).all() and slopes[3] == 0
    near(soft_topk(torch.zeros(5), 2, eps=1.0), torch.full((5,), 0.4), 1e-6)


def test_float32_far_from_zero():
    x = rows(4, 50, dtype=torch.float32) + 10_000
    near(soft_topk(x, 5, eps=0.05).double(), soft_topk(x.double(), 5, eps=0.05), 2e-6)


def test_it_becomes_hard():
    x = rows(6, 30)
    hard = torch.zeros_like(x).scatter_(-1, x.topk(4).indices, 1)
    near(soft_topk(x, 4, eps=1e-6), hard, 1e-10)
    A = soft_topk_sorted(x, 4, eps=1e-3)
    assert torch.equal(A.argmax(-2), x.topk(4).indices)


@pytest.mark.parametrize("eps", [0.05, 0.5, 5.0])
def test_the_sorted_choice_keeps_its_sums(eps):
    A = soft_topk_sorted(rows(2, 3, 9), 4, eps=eps)
    assert A.shape == (2, 3, 9, 4)
    near(A.sum(-2), torch.ones(2, 3, 4).double(), 1e-7)
    assert (A >= 0).all() and (A.sum(-1) <= 1 + 1e-7).all()


def test_a_sorted_choice_of_one_is_the_choice():
    x = rows(3, 9)
    near(soft_topk_sorted(x, 1, eps=0.4)[..., 0], soft_topk(x, 1, eps=0.4), 1e-8)


def test_derivatives_of_the_sorted_choice(as_installed):
    x = rows(2, 5).requires_grad_()
    choose = lambda x: soft_topk_sorted(x, 2, eps=1.0)
    assert gradcheck(choose, x) and gradgradcheck(choose, x)


def test_sorts_and_ranks(as_installed):
    x = rows(2, 7)
    near(soft_sort(x, eps=1e-5), x.sort().values, 1e-6)
    near(soft_sort(x, eps=1e-5, descending=True), x.sort(descending=True).values, 1e-6)
    ranks = 1.0 + x.argsort().argsort()
    near(soft_rank(x, eps=1e-5), ranks.double(), 1e-6)
    near(soft_rank(x, eps=1e-5, descending=True), 8.0 - ranks.double(), 1e-6)
    near(soft_rank(x, eps=1.0).sum(-1), torch.full((2,), 28.0).double(), 1e-6)
    near(soft_sort(x, eps=1.0).sum(-1), x.sum(-1), 1e-6)
    leaf = x[:, :4].clone().requires_grad_()
    for order in (soft_rank, soft_sort): assert gradcheck(lambda x: order(x, eps=1.0), leaf)


@pytest.mark.parametrize("choose", [soft_topk, soft_topk_sorted])
@pytest.mark.parametrize("says, scores, k, eps", [
    ("whole number from 0 to n=6, not 7", SIX, 7, 1.0),
    ("not -1", SIX, -1, 1.0),
    ("not 2.5", SIX, 2.5, 1.0),
    ("not True", SIX, True, 1.0),
    ("1 of the rows have NaN", torch.stack([SIX, SIX * math.nan]), 2, 1.0),
    ("infinite", torch.tensor([1.0, math.inf, 0.0]), 1, 1.0),
    ("not masked, in 1 of the rows", torch.tensor([1.0, -math.inf, -math.inf]), 2, 1.0),
    ("n >= 1", torch.zeros(0), 0, 1.0),
    ("n >= 1", torch.zeros(0, 3), 1, 1.0),
    ("n >= 1", torch.tensor(1.0), 1, 1.0),
    ("eps must be finite and > 0, in units of the cost, not 0.0", SIX, 2, 0.0),
    ("not -1.0", SIX, 2, -1.0),
    ("not nan", SIX, 2, math.nan),
    ("not inf", SIX, 2, math.inf),
])
def test_bad_input_is_refused(as_installed, choose, says, scores, k, eps):
    with pytest.raises(ValueError, match=says): choose(scores, k, eps=eps)


@pytest.mark.parametrize("scores", [torch.arange(4), [1.0, 2.0], torch.zeros(3, dtype=torch.complex64)])
def test_what_is_no_float_tensor_is_refused(as_installed, scores):
    with pytest.raises(TypeError): soft_topk(scores, 1, eps=1.0)


def test_masked_scores_cannot_be_sorted():
    with pytest.raises(ValueError, match="not masked"): soft_sort(torch.tensor([1.0, -math.inf]), eps=1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_devices(device):
    x = SIX.to(device).requires_grad_()
    A = soft_topk(x, 3, eps=EPS, largest=False)
    A[1:4].sum().backward()
    near(A.detach().cpu(), CHOSEN, 5e-7)
    near(x.grad.cpu(), SLOPES, 5e-7)
