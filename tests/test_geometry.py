"Whatever the form of a cost, its answers are those of the matrix it stands for"
import gc
import weakref

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ot_research.geometry import DenseCost, PointCloud

FLOATS = [torch.float32, torch.float64]
ALL = slice(None)


def taxicab(x, y): return (x.unsqueeze(-2) - y.unsqueeze(-3)).abs().sum(-1)


COSTS = ["sqeuclidean", "euclidean", "cosine", taxicab]


def written_out(x, y, cost):
    "The matrix of costs in float64, from the definition"
    x, y = x.double().unsqueeze(-2), y.double().unsqueeze(-3)
    if cost == "cosine": return 1 - torch.cosine_similarity(x, y, dim=-1)
    if cost == "euclidean": return (x - y).norm(dim=-1)
    return (x - y).square().sum(-1) if cost == "sqeuclidean" else (x - y).abs().sum(-1)


def assert_answers(geometry, C, eps=0.3):
    "All five questions, against the definitions in float64"
    *batch, n, m = C.shape
    log_v, value = torch.randn(*batch, m, dtype=geometry.dtype), torch.randn(*batch, m, 3, dtype=geometry.dtype)
    close = dict(atol=400 * torch.finfo(geometry.dtype).eps * (1 + C[C.isfinite()].abs().max().item() / eps), rtol=0)
    scores = log_v.double().unsqueeze(-2) - C / eps
    P, finite = scores.softmax(-1), C.masked_fill(C.isinf(), 0)
    mean, lse = geometry.attend(log_v, eps, value)
    answers = [
        (mean, P @ value.double()), (lse, scores.logsumexp(-1)), (geometry.cost_rows(ALL), C),
        (geometry.mean_cost(log_v, eps), (P * finite).sum(-1)),
        (geometry.hardmin(log_v), (C - log_v.double().unsqueeze(-2)).amin(-1))]
    if C.isfinite().all(): answers.append((geometry.matvec(log_v), (C @ log_v.double().unsqueeze(-1)).squeeze(-1)))
    for found, exact in answers: torch.testing.assert_close(found.double(), exact, **close)
    assert geometry.shape == C.shape and (geometry.survey.largest.double() >= finite.abs().amax((-2, -1)) - close["atol"]).all()
    assert geometry.survey.forbids == C.isinf().any() and not any(flaw.found for flaw in geometry.flaws())


@given(cost=st.sampled_from(COSTS), dtype=st.sampled_from(FLOATS), batch=st.sampled_from([(), (1,), (2,), (2, 3)]),
       n=st.integers(1, 20), m=st.integers(1, 20), d=st.sampled_from([1, 2, 3, 17]), shared=st.booleans(), seed=st.integers(0, 9))
def test_points_answer_like_their_matrix(cost, dtype, batch, n, m, d, shared, seed):
    torch.manual_seed(seed)
    x, y = torch.rand(*(() if shared else batch), n, d, dtype=dtype) + 0.1, torch.rand(*batch, m, d, dtype=dtype) + 0.1
    C = written_out(x, y, cost)
    assert_answers(PointCloud(x, y, cost), C)
    assert_answers(PointCloud(x, y, cost).T, C.mT)


@given(dtype=st.sampled_from(FLOATS), batch=st.sampled_from([(), (2,), (2, 3)]), n=st.integers(1, 20), m=st.integers(2, 20),
       forbid=st.booleans(), seed=st.integers(0, 9))
def test_matrices_answer_as_written_also_where_pairs_are_forbidden(dtype, batch, n, m, forbid, seed):
    torch.manual_seed(seed)
    C = torch.randn(*batch, n, m, dtype=dtype)
    if forbid: C[..., 0, 0] = torch.inf
    assert_answers(DenseCost(C), C.double())
    if n > 1: assert_answers(DenseCost(C).T, C.double().mT)


@pytest.mark.parametrize("cost", ["sqeuclidean", "euclidean", taxicab])
def test_translation_changes_nothing_and_scaling_changes_units(cost):
    x, y, log_v = torch.rand(30, 3).double(), torch.rand(20, 3).double(), torch.randn(20).double()
    power = 2 if cost == "sqeuclidean" else 1
    here = PointCloud(x, y, cost).attend(log_v, 0.1, y)[1]
    for offset, size in ((1e4, 1.0), (0.0, 1e6), (0.0, 1e-6)):
        there = PointCloud(size * x + offset, size * y + offset, cost).attend(log_v, 0.1 * size**power, y)[1]
        torch.testing.assert_close(there, here, atol=1e-9, rtol=1e-9)


def test_float32_far_from_the_origin_is_as_exact_as_its_points():
    x, y = torch.rand(30, 3) + 1e4, torch.rand(20, 3) + 1e4
    zero = torch.zeros(20)
    found = PointCloud(x, y).attend(zero, 0.01, y)[1]
    exact = PointCloud(x.double(), y.double()).attend(zero.double(), 0.01, y.double())[1]
    torch.testing.assert_close(found.double(), exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize("geometry", [DenseCost(torch.rand(4, 3)), PointCloud(torch.rand(4, 2), torch.rand(3, 2), taxicab)])
def test_a_geometry_is_let_go_with_its_last_name(geometry):
    copy = geometry.to(torch.float64)
    copy.survey, copy.T.survey
    gone = weakref.ref(copy)
    gc.disable()
    del copy
    gc.enable()
    assert gone() is None


@pytest.mark.parametrize("C, sentence", [
    (torch.tensor([[0.0, torch.nan]]), "C has 1 entries that are NaN or -inf"),
    (torch.tensor([[[0.0, 1.0]], [[-torch.inf, 0.0]]]), "C has 1 entries that are NaN or -inf"),
    (torch.tensor([[0.0, 1e35]]), "the cost of some pairs is NaN, or overflows torch.float32: it reaches 1.0e+35"),
])
def test_a_matrix_confesses_its_flaws(C, sentence):
    assert sentence in [flaw.explain() for flaw in DenseCost(C).flaws() if flaw.found]


@pytest.mark.parametrize("bad, cost, sentence", [
    (torch.nan, "sqeuclidean", "x has 2 coordinates that are NaN or infinite"),
    (torch.inf, "euclidean", "x has 2 coordinates that are NaN or infinite"),
    (0.0, "cosine", "x has a zero row, which has no direction for the cosine cost"),
    (1e30, "sqeuclidean", "the cost of some pairs is NaN, or overflows torch.float32: it reaches inf"),
    (1.0, lambda x, y: torch.full((len(x), len(y)), torch.nan), "the cost of some pairs is NaN, or overflows torch.float32: it reaches nan"),
])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_points_confess_their_flaws(batch, bad, cost, sentence):
    x = torch.rand(*batch, 4, 2)
    x[..., -1, :] = bad
    sentence = sentence.replace("2 coo", "4 coo") if batch else sentence
    if callable(cost) and batch: return
    assert sentence in [flaw.explain() for flaw in PointCloud(x, torch.rand(3, 2), cost).flaws() if flaw.found]


@pytest.mark.parametrize("wrong", [
    lambda x, y: y[..., 0], lambda x, y: torch.zeros(len(y), len(x)), lambda x, y: torch.zeros(len(x), 1)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_cost_function_of_the_wrong_shape_is_refused_with_both_shapes(wrong, turned):
    geometry = PointCloud(torch.rand(6, 2), torch.rand(5, 2), wrong)
    with pytest.raises(ValueError, match=r"must have shape \(6, 5\) for x \(6, 2\) and y \(5, 2\), not \("):
        (geometry.T if turned else geometry).hardmin(torch.zeros(6 if turned else 5))


def test_points_on_a_line_are_told_what_to_do(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # the shape checks would come first
    with pytest.raises(ValueError, match=r"for points on a line pass y\[:, None\]"):
        PointCloud(torch.rand(4, 1), torch.rand(4))
