"SPOT: stacks, the penalty, the figures, and runs that nothing changes"
import math
from functools import partial

import pytest
import torch
from torch import nn

from ot_research.continuous.spot import correlation, exact_penalty, sliced_w2, spot
from ot_research.continuous.stacked import Apart, Stacked, fold
from ot_research.training import resample

SHIFT = torch.tensor([1.0, 0.0])


def noise(count, chance): return torch.randn(count, 2, generator=chance)


def left(count, chance): return noise(count, chance) - SHIFT


def right(count, chance): return noise(count, chance) + SHIFT


def distance(*points): return sum((x - y).norm(dim=1) for x, y in zip(points, points[1:]))


def players(runs=(), marginals=2, seed=0):
    stack = partial(Stacked, marginals=marginals, runs=runs)
    return dict(generator=stack([2, 8, 2], seed=seed), noise=noise,
                critics=stack([2, 8, 1], activation=fold, lipschitz=True, seed=seed + 1))


play = partial(spot, [left, right], distance, eta=3.0, batch=8, rounds=2)


def weights(result): return [t for module in (result.generator, result.critics) for t in module.state_dict().values()]


def same(one, two):
    assert one.history == two.history
    for a, b in zip(weights(one), weights(two), strict=True): assert torch.equal(a, b)


def test_a_stack_is_its_networks_one_by_one():
    stack = Stacked([3, 4, 2], marginals=2, runs=(2, 2), activation=fold)
    x, y = torch.randn(2, 12, 3)
    made = stack(x, y)
    for run in range(4):
        alone = Stacked([3, 4, 2], marginals=2, activation=fold)
        with torch.no_grad():
            for mine, theirs in zip(alone.parameters(), stack.parameters()): mine.copy_(theirs[2 * run:2 * run + 2])
        rows = slice(3 * run, 3 * run + 3)
        for a, b in zip(alone(x[rows], y[rows]), made): torch.testing.assert_close(a, b[rows])


def test_a_residual_stack_adds_its_input():
    plain, residual = (Stacked([3, 4, 3], runs=(2,), residual=added) for added in (False, True))
    x, y = torch.randn(2, 6, 3)
    for made, start, more in zip(plain(x, y), (x, y), residual(x, y)): torch.testing.assert_close(start + made, more)


def test_critics_are_1_lipschitz_when_the_norms_are_found():
    critics = Stacked([2, 16, 16, 1], marginals=3, runs=(2,), activation=fold, lipschitz=True)
    with torch.no_grad():
        for W in critics.layers.weights: W.mul_(7)
        for _ in range(200): critics(torch.zeros(2, 2))
        x, y = torch.randn(2, 500, 2)
        for a, b in zip(critics.eval()(x), critics(y)): assert ((a - b)[:, 0].abs() <= 1.0001 * (x - y).norm(dim=1)).all()


def test_evaluation_leaves_critics_as_they_are():
    critics = Stacked([2, 8, 1], lipschitz=True).eval()
    before = critics.layers.steep.clone()
    critics(torch.randn(4, 2))
    assert torch.equal(critics.layers.steep, before)


def test_each_marginal_may_have_its_own_module_and_shape():
    images = lambda count, chance: torch.rand(count, 1, 4, 4, generator=chance)
    cost = lambda x, y: (x - y.flatten(1).mean(1, keepdim=True)).square().sum(1)
    generator = Apart(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 16), nn.Unflatten(1, (1, 4, 4))))
    normed = nn.utils.parametrizations.spectral_norm
    critics = Apart(normed(nn.Linear(2, 1)), nn.Sequential(normed(nn.Conv2d(1, 1, 4)), nn.Flatten()))
    result = spot([left, images], cost, generator=generator, critics=critics, noise=noise, steps=3, batch=8,
                  held_out=[left(20, torch.Generator()), images(20, torch.Generator())], look=1)
    x, y = result.sample(5)
    assert x.shape == (5, 2) and y.shape == (5, 1, 4, 4)
    assert result.curve("marginal 1")[1].shape == (3,)


def test_the_penalty_is_the_slope_over_what_is_seen():
    assert exact_penalty(distance, [left, right], seen=0.5) == pytest.approx(2, rel=1e-5)
    points = [draw(1000, torch.Generator().manual_seed(0)) for draw in (left, right)]
    steepest = exact_penalty(lambda x, y: 4 * x[:, 0] - 3 * y[:, 1], [left, right], seen=1)
    assert steepest == pytest.approx(4) and len(points[0]) == 1000


@pytest.mark.parametrize("settings", [dict(seen=0), dict(seen=math.nan), dict(count=0)])
def test_bad_settings_of_the_penalty_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))): exact_penalty(distance, [left, right], **settings)


def test_sliced_w2_of_a_shift_is_its_mean_projection():
    x = torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    seen = sliced_w2(x, x + 2 * SHIFT, directions=2000)
    torch.testing.assert_close(seen, torch.full((3,), 2 / math.sqrt(2), dtype=torch.float64), rtol=0.03, atol=0)
    assert sliced_w2(x, x[:, torch.randperm(50)]).max() < 1e-12
    with pytest.raises(ValueError, match="of one size and dimension"): sliced_w2(x, x[:, :-1])


def test_correlation_is_that_of_the_textbook():
    x, y = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    expected = [torch.corrcoef(torch.stack([a, b]))[0, 1] for a, b in zip(x.T, y.T)]
    torch.testing.assert_close(correlation(x, y), torch.stack(expected))


@pytest.mark.parametrize("at", [0, 4, 9, 10, 17])
def test_an_interrupted_run_ends_to_the_last_bit_as_one_that_was_not(tmp_path, at):
    def cost(x, y, calls=iter(range(100))):
        if next(calls) == at: raise KeyboardInterrupt
        return distance(x, y)
    settings = dict(steps=20, held_out=[draw(10, torch.Generator()) for draw in (left, right)], look=5)
    kept = dict(checkpoint=tmp_path / "run.pt", every=5)
    with pytest.raises(KeyboardInterrupt): spot([left, right], cost, eta=3.0, batch=8, rounds=2, **players((2,)), **settings, **kept)
    same(play(**players((2,)), **settings), play(**players((2,)), **settings, **kept))


def test_equal_seeds_give_equal_runs():
    same(play(**players(), steps=3, seed=5), play(**players(), steps=3, seed=5))
    assert play(**players(), steps=3, seed=5).history != play(**players(), steps=3, seed=6).history


def test_weights_of_the_critics_may_differ_from_run_to_run():
    twice = play(**players((2,)) | dict(eta=torch.tensor([3.0, 3e3])), steps=4)
    once = play(**players((2,)), steps=4)
    assert twice.sample(7)[0].shape == (2, 7, 2)
    assert not torch.equal(twice.sample(7)[0][1], once.sample(7)[0][1])


def test_a_cost_may_learn():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
        def forward(self, x, y): return self.scale.square() * distance(x, y)
    cost = Scaled()
    spot([left, right], cost, eta=3.0, batch=8, **players(), steps=5)
    assert cost.scale < 1


def test_what_is_made_beyond_the_marginals_goes_to_the_cost():
    class More(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.extra = Stacked([2, 8, 2]), nn.Linear(2, 1)
        def forward(self, z): return *self.pair(z), self.extra(z)[:, 0]
    seen = []
    def cost(x, y, extra): return seen.append(extra.shape) or distance(x, y) + extra
    result = spot([left, right], cost, **players() | dict(generator=More()), eta=3.0, batch=8, steps=2)
    assert seen[-1] == (8,) and len(result.sample(4)) == 3


def test_three_marginals_play_too():
    result = spot([left, noise, right], distance, **players((2,), marginals=3), eta=3.0, batch=8, steps=2)
    assert [t.shape for t in result.sample(4)] == 3 * [(2, 4, 2)]


def test_a_short_run_finds_the_shift():
    held_out = [draw(1000, torch.Generator().manual_seed(9)) for draw in (left, right)]
    result = spot([left, right], distance, eta=3.0, steps=200, lr=3e-3, lr_critics=1e-2, ema=0.98, look=200,
                  held_out=held_out, **players())
    assert result.history[-1]["cost"] == pytest.approx(2, rel=0.25)
    assert max(result.history[-1][f"marginal {k}"] for k in (0, 1)) < 0.5


def test_no_number_ends_the_run_before_a_checkpoint(tmp_path):
    def cost(x, y, calls=iter(range(100))): return distance(x, y) * (math.nan if next(calls) == 8 else 1)
    with pytest.raises(FloatingPointError, match="step 8: batch cost became nan; run.pt holds what was before step 6"):
        spot([left, right], cost, eta=3.0, batch=8, **players(), steps=20, checkpoint=tmp_path / "run.pt", every=5)
    class Blind(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, slope): return slope * math.nan
    with pytest.raises(FloatingPointError, match="step 1: gradient became nan"):
        spot([left, right], lambda x, y: Blind.apply(distance(x, y)), eta=3.0, **players(), steps=2)


@pytest.mark.parametrize("change, message", [
    (dict(eta=0.0), "eta"), (dict(eta=-1.0), "eta"), (dict(eta=math.inf), "eta"), (dict(batch=0), "batch"),
    (dict(rounds=0), "rounds"), (dict(steps=0), "steps"),
    (dict(generator=Stacked([2, 8, 3])), r"made as \[\(16, 3\), \(16, 3\)\], the data are \[\(16, 2\), \(16, 2\)\]"),
    (dict(generator=Stacked([2, 8, 2], marginals=1)), "made as"),
    (dict(critics=Stacked([2, 8, 2])), r"2 times 16 numbers, not \[32, 32\]"),
])
def test_what_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message): play(**players() | dict(steps=1) | change)


def test_costs_and_samplers_that_cannot_work_are_refused():
    with pytest.raises(ValueError, match="two marginals at least, not 1"): spot([left], distance, **players(), eta=3.0, steps=1)
    with pytest.raises(ValueError, match="one number a row"): spot([left, right], lambda x, y: x - y, **players(), eta=3.0, steps=1)
    with pytest.raises(ValueError, match="more than the 7 points"):
        spot([resample(torch.zeros(7, 2)), right], distance, **players(), eta=3.0, steps=1, batch=8)
    with pytest.raises(ValueError, match=r"eta of shape \(3,\) does not fit runs of shape \(2,\)"):
        play(**players((2,)) | dict(eta=torch.ones(3)), steps=1)
    with pytest.raises(ValueError, match="with rows for all runs"): Stacked([2, 1], runs=(3,))(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="a marginal and two widths"): Stacked([2])


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    kept = dict(steps=1, checkpoint=tmp_path / "run.pt")
    play(**players(), **kept)
    with pytest.raises(ValueError, match=r"eta=3.0, not 4.0"): play(**players() | dict(eta=4.0), **kept)
