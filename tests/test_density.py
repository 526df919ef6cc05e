"Flows with their density, and the entropic plan recovered as one"
import math
from functools import partial

import pytest
import torch

from ot_research.continuous.density import Critics, Multipliers, recover
from ot_research.continuous.flow import Flow, PlanDensity, Steps, Velocity


def clouds(dim=1, count=300):
    chance = torch.Generator().manual_seed(0)
    return torch.randn(count, dim, generator=chance), 2 + 0.7 * torch.randn(count, dim, generator=chance)


def strong(dim, factor=8.0):
    torch.manual_seed(0)
    velocity = Velocity(dim).double()
    with torch.no_grad():
        for weight in velocity.layers[-1].parameters(): weight.mul_(factor)
    return velocity


def numeric_volume(rule, velocity, z, h=1e-5):
    steps = h * torch.eye(z.shape[1], dtype=z.dtype)
    columns = [(rule.push(velocity, z + e).points - rule.push(velocity, z - e).points) / (2 * h) for e in steps]
    return torch.stack(columns, 2).det().abs().log()


@pytest.mark.parametrize("rule, tol", [(Steps(1), 1e-7), (Steps(4), 1e-7), (Flow(tol=1e-9), 1e-5)])
@pytest.mark.parametrize("dim", [1, 2, 6])
def test_the_volume_is_that_of_a_numerical_jacobian_and_the_way_back_is_the_way_back(rule, tol, dim):
    velocity, z = strong(dim), torch.randn(20, dim, dtype=torch.float64)
    carried = rule.push(velocity, z)
    torch.testing.assert_close(carried.log_volume, numeric_volume(rule, velocity, z), atol=tol, rtol=0)
    back = rule.pull(velocity, carried.points)
    torch.testing.assert_close(back.points, z, atol=tol, rtol=0)
    torch.testing.assert_close(back.log_volume, carried.log_volume, atol=tol, rtol=0)


@pytest.mark.parametrize("rule", [Steps(3), Flow(tol=1e-9)])
def test_the_slope_of_the_log_density_is_that_of_finite_differences(rule):
    plan = PlanDensity(*clouds(), rule=rule).double()
    plan.velocity = strong(2)
    x, y = (torch.randn(5, 1, dtype=torch.float64).requires_grad_() for _ in range(2))
    slopes = torch.autograd.grad(plan.log_density(x, y).sum(), (x, y))
    h = 1e-5
    with torch.no_grad():
        by_x = (plan.log_density(x + h, y) - plan.log_density(x - h, y)) / (2 * h)
        by_y = (plan.log_density(x, y + h) - plan.log_density(x, y - h)) / (2 * h)
    torch.testing.assert_close(torch.cat(slopes, 1), torch.stack([by_x, by_y], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dx, dy", [(1, 1), (2, 1), (1, 2)])
def test_made_pairs_have_the_density_that_was_asked_for(dx, dy):
    x, y = clouds(dx)[0], clouds(dy)[1]
    plan = PlanDensity(x, y)
    drawn = plan(torch.randn(50, dx + dy))
    torch.testing.assert_close(plan.log_density(drawn.x, drawn.y), drawn.log_density, atol=1e-4, rtol=1e-4)
    assert plan.log_marginal(x[:3]).shape == plan.log_marginal(y[:3], side=1).shape == (3,)


def test_a_map_that_folds_says_so():
    velocity = strong(2, 2000.0)
    with pytest.raises(FloatingPointError, match="cannot be undone"):
        Steps(1).pull(velocity, torch.randn(50, 2, dtype=torch.float64))


quick = partial(recover, *clouds(), reg=0.5, batch=40)


class Interrupted(BaseException): "Not an Exception, as KeyboardInterrupt is not"


def broken_at(call, hold, error):
    "A hold that ends its run, or its sense, at a call"
    class Broken(hold):
        def __call__(self, x, y, chance):
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == call: return error()
            return super().__call__(x, y, chance)
    return Broken


def interrupt(): raise Interrupted


@pytest.mark.parametrize("hold", [Multipliers, Critics])
def test_an_interrupted_run_ends_to_the_last_bit_as_one_that_was_not(tmp_path, hold):
    whole, file = quick(steps=9, hold=hold), dict(checkpoint=tmp_path / "run.pt", every=3)
    with pytest.raises(Interrupted): quick(steps=9, hold=broken_at(6, hold, interrupt), **file)
    resumed = quick(steps=9, hold=hold, **file)
    assert whole.history == resumed.history
    for a, b in zip(whole.plan.parameters(), resumed.plan.parameters(), strict=True): assert torch.equal(a, b)


def test_a_nan_names_the_step_and_leaves_the_last_good_checkpoint(tmp_path):
    nan = lambda: torch.tensor(math.nan, requires_grad=True)
    with pytest.raises(FloatingPointError, match="step 5: hold became nan"):
        quick(steps=9, hold=broken_at(5, Multipliers, nan), checkpoint=tmp_path / "run.pt", every=2)
    assert len(torch.load(tmp_path / "run.pt", weights_only=True)["history"]) == 4


def test_equal_seeds_give_equal_plans_and_leave_the_global_seed_alone():
    before = torch.get_rng_state()
    one, two, other = (quick(steps=2, seed=seed).history for seed in (1, 1, 2))
    assert one == two != other
    assert torch.equal(before, torch.get_rng_state())


def test_a_short_run_comes_near_the_closed_form():
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(5000, 1, generator=chance), 2 + 0.5**0.5 * torch.randn(5000, 1, generator=chance)
    plan, _ = recover(x, y, reg=1.0, steps=120, batch=150, hold=partial(Multipliers, count=500, kernels=1000, real=300))
    cov = -0.25 + (0.5 + 1 / 16) ** 0.5
    truth = torch.distributions.MultivariateNormal(torch.tensor([0.0, 2.0]), torch.tensor([[1, cov], [cov, 0.5]]))
    pairs = truth.mean + torch.randn(2000, 2, generator=chance) @ truth.scale_tril.T
    with torch.no_grad(): gap = truth.log_prob(pairs) - plan.log_density(*pairs.split(1, 1))
    assert gap.mean() < 0.05


@pytest.mark.parametrize("settings, message", [
    (dict(reg=0.0), "reg must be"), (dict(batch=0), "batch must be"), (dict(lr=math.inf), "lr must be"),
    (dict(steps=0), "steps must be"),
])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message): quick(**dict(steps=1) | settings)


@pytest.mark.parametrize("x, y, message", [
    (torch.full((50, 1), math.nan), torch.rand(50, 1), "x has 50 entries that are not finite"),
    (torch.zeros(50, 1), torch.rand(50, 1), "x does not vary in coordinate 0"),
])
def test_bad_points_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message): recover(x, y, reg=1.0, steps=1)
