"Beam search: the likeliest path, the limits of the soft one, derivatives, bad input"
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck

from ot_research.apps.beam_search import beam_search, hard_topk, ordered_topk, soft_beam_loss
from ot_research.apps.topk import soft_topk

START, STOP, SYMBOLS = 0, 1, 4


def near(a, b, atol=1e-10): torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.fixture
def table(): return (2 * torch.randn(SYMBOLS, SYMBOLS, dtype=torch.float64)).log_softmax(-1)


def search(table, batch=2, aging=0.0, **settings):
    "A model whose next symbol depends on the last, and on the time if it ages: then no two paths tie"
    step = lambda last, state: ((1 + aging * state[:, :1]) * (last @ table), state + 1)
    settings = dict(start=START, stop=STOP, width=3, steps=5) | settings
    return beam_search(step, torch.eye(SYMBOLS).to(table), torch.zeros(batch, 2).to(table), **settings)


@pytest.mark.parametrize("eps", [1e-3, 0.3, 5.0])
def test_the_ordered_choice_adds_up_to_the_unordered(eps):
    scores = torch.randn(2, 3, 9, dtype=torch.float64)
    A = ordered_topk(scores, 4, eps=eps)
    assert A.shape == (2, 3, 9, 4) and (A > -1e-12).all()
    near(A.sum(-2), torch.ones(2, 3, 4).double())
    for j in range(1, 5): near(A[..., :j].sum(-1), soft_topk(scores, j, eps=eps))


def test_the_ordered_choice_becomes_hard():
    scores = torch.randperm(12).double().view(2, 6)
    near(ordered_topk(scores, 3, eps=0.01), hard_topk(scores, 3))


def test_with_enough_beams_it_is_dynamic_programming(table):
    best = table[START].clone()
    table = table.clone()
    table[STOP] = torch.where(torch.arange(SYMBOLS) == STOP, 0.0, -torch.inf)
    for _ in range(4): best = (best[:, None] + table).amax(0)
    near(search(table.clamp(min=-700), width=256).scores[:, 0], best.max().expand(2))


def test_scores_are_the_likelihoods_of_the_paths(table):
    found = search(table)
    last = torch.full_like(found.tokens[..., 0], START)
    total, live = torch.zeros_like(found.scores), torch.ones_like(found.scores)
    for token in found.tokens.unbind(-1):
        total, live, last = total + live * table[last, token], live * (token != STOP), token
    near(found.scores, total)
    assert (found.scores.diff(dim=1) <= 0).all()


def test_what_has_ended_stays_so_and_rows_do_not_meet(table):
    table[:, STOP] += 9
    found = search(table.log_softmax(-1), width=1, steps=7)
    assert found.paths.shape == (2, 1, 7, SYMBOLS) and (found.tokens == STOP).all()
    near(search(table, batch=5).paths[0], search(table, batch=1).paths[0])


def test_the_soft_search_becomes_the_hard_one(table):
    near(search(table, aging=0.1, choose=partial(ordered_topk, eps=1e-5)).paths, search(table, aging=0.1).paths, 1e-8)
    softly = search(table, choose=partial(ordered_topk, eps=1.0)).paths
    near(softly.sum(-1), torch.ones(2, 3, 5).double())


def test_derivatives(table):
    target = torch.tensor([[2, 3, STOP], [3, STOP, STOP]])
    def loss(table): return soft_beam_loss(search(table.log_softmax(-1), choose=partial(ordered_topk, eps=0.7)), target)
    assert gradcheck(loss, table.requires_grad_())


def test_the_loss_is_nothing_where_all_beams_are_right(table):
    found = search(table, width=1)
    near(soft_beam_loss(found, found.tokens[:, 0]), torch.zeros(2).double())
    near(soft_beam_loss(found, (found.tokens[:, 0] + 1) % SYMBOLS), torch.full((2,), 5.0).double())


@pytest.mark.parametrize("settings, says", [
    (dict(width=0), "width must be a whole number > 0, not 0"), (dict(steps=True), "not True"),
    (dict(candidates=2), "3 beams need at least as many candidates, not 2"),
])
def test_bad_input(table, settings, says):
    with pytest.raises(ValueError, match=says): search(table, **settings)


def test_targets_that_do_not_fit(table):
    with pytest.raises(ValueError, match="do not fit"): soft_beam_loss(search(table), torch.zeros(2, 6, dtype=torch.long))
