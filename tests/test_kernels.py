"Every way to attend gives what the definition gives, in float64, on the same input"
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from ot_research import kernels
from ot_research.kernels import attend, attend_blocks, attend_fused, bilinear_scores, max_blocks

FLOATS = [torch.float32, torch.float64]


def by_blocks(query, key, bias, value):
    return attend_blocks(bilinear_scores(query, key, bias), (*query.shape[:-1], key.shape[-2]), value)


def dense(query, key, bias, value):
    "The definition; a row that sees nothing averages all values alike"
    scores = query.double() @ key.double().mT + bias.double().unsqueeze(-2)
    blind = scores.isneginf().all(-1, keepdim=True)
    return scores.masked_fill(blind, 0).softmax(-1) @ value.double(), scores.logsumexp(-1)


def draw(dtype, batch, n, m, d, k, size, hidden, seed):
    "Random arguments of `attend` whose scores are about `size`, with a share of the keys hidden"
    torch.manual_seed(seed)
    query, key = torch.randn(*batch, n, d, dtype=dtype) * size / d**0.5, torch.randn(*batch, m, d, dtype=dtype)
    bias = torch.randn(*batch, m, dtype=dtype).mul(size).masked_fill(torch.rand(*batch, m) < hidden, -torch.inf)
    return query, key, bias, torch.randn(*batch, m, k, dtype=dtype)


def assert_agrees(found, arguments):
    "To a few roundings of the largest score"
    query, key, bias, value = arguments
    mean, lse = dense(*arguments)
    largest = 1 + query.abs().max() * key.abs().max() * query.shape[-1] + bias[bias.isfinite()].abs().sum().clamp(max=1e9)
    atol = 8 * torch.finfo(query.dtype).eps * largest.item()
    assert found[0].dtype == found[1].dtype == query.dtype
    torch.testing.assert_close(found[1].double(), lse, atol=atol, rtol=0)
    torch.testing.assert_close(found[0].double(), mean, atol=atol * (1 + value.abs().sum(-2).max().item() if value.numel() else 1), rtol=0)


@pytest.mark.parametrize("way", [attend, attend_fused, by_blocks])
@given(
    dtype=st.sampled_from(FLOATS), batch=st.sampled_from([(), (1,), (3,), (2, 3)]),
    n=st.integers(1, 40), m=st.integers(1, 40), d=st.sampled_from([1, 2, 3, 15, 16, 33]), k=st.sampled_from([0, 1, 16, 17, 100]),
    size=st.sampled_from([0.0, 1.0, 300.0]), hidden=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 9))
def test_every_way_to_attend_agrees_with_dense_float64(way, hidden, **choice):
    arguments = draw(hidden=hidden, **choice)
    assert_agrees(way(*arguments), arguments)


@pytest.mark.parametrize("way", [attend, attend_fused, by_blocks])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_row_that_sees_nothing_has_log_sum_exp_minus_infinity_and_a_finite_mean(way, dtype):
    mean, lse = way(*draw(dtype, (2,), 5, 7, 3, 4, 1.0, 1.0, 0))
    assert lse.isneginf().all() and mean.isfinite().all()


@pytest.mark.parametrize("way", [attend, by_blocks])
def test_scores_of_1e8_are_averaged_to_the_digits_they_have(way):
    arguments = draw(torch.float64, (), 50, 60, 3, 2, 1e8, 0.0, 0)
    mean, lse = dense(*arguments)
    found = way(*arguments)
    torch.testing.assert_close(found[1], lse, atol=0, rtol=1e-14)
    torch.testing.assert_close(found[0], mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(37, 11), (2, 5, 11), (2, 3, 5, 11)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_the_size_of_a_block_does_not_matter(monkeypatch, shape, dtype):
    *batch, n, m = shape
    arguments = draw(dtype, tuple(batch), n, m, 3, 2, 10.0, 0.3, 0)
    scores = bilinear_scores(*arguments[:3])
    for block, rows in ((1, 1), (4 * m, 1), (1, 16), (2**17, 16)):
        monkeypatch.setattr(kernels, "BLOCK", block)
        monkeypatch.setattr(kernels, "ROWS", rows)
        assert_agrees(by_blocks(*arguments), arguments)
        exact = (arguments[0].double() @ arguments[1].double().mT + arguments[2].double().unsqueeze(-2)).amax(-1)
        torch.testing.assert_close(max_blocks(scores, shape, arguments[0]).double(), exact, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_adding_to_the_bias_adds_to_the_log_sum_exp_and_leaves_the_mean(dtype):
    query, key, bias, value = draw(dtype, (2,), 30, 20, 3, 4, 5.0, 0.2, 0)
    mean, lse = attend(query, key, bias, value)
    shifted_mean, shifted = attend(query, key, bias + 2, value)
    torch.testing.assert_close(shifted, lse + 2)
    torch.testing.assert_close(shifted_mean, mean)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("dtype", FLOATS)
def test_flex_attention_agrees(dtype):
    query, key, bias, value = draw(dtype, (2, 1), 30, 40, 16, 16, 3.0, 0.3, 0)
    add_bias = lambda score, b, h, i, j: score + bias[b, h, j]
    mean, aux = flex_attention(query, key, value, score_mod=add_bias, scale=1.0, return_aux=AuxRequest(lse=True))
    assert_agrees((mean, aux.lse), (query, key, bias, value))
    torch.testing.assert_close(attend(query, key, bias, value)[1], aux.lse, atol=1e-4, rtol=0)
