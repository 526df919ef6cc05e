"Training: repeatable, interruptible, with any loss"
from functools import partial

import pytest
import torch
from torch import nn

from ot_research.apps.generative import Critic, held_plan, train
from ot_research.geometry import PointCloud
from ot_research.loss import ot_value, sinkhorn_divergence
from ot_research.solvers import ipot
from ot_research.training import resample

entropic = partial(sinkhorn_divergence, reg=1.0)


def noise(count, chance): return torch.randn(count, 2, generator=chance)


def data(count, chance): return 1 + 0.1 * torch.randn(count, 2, generator=chance)


def network(out=2, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, out))


def critic(): return Critic(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1)), seed=3)


def ends(generator, loss, **settings):
    "Everything a run leaves behind"
    history = train(generator, loss, data, noise=noise, batch=16, **settings)
    left = list(generator.state_dict().values())
    return history, left + list(loss.net.state_dict().values()) if hasattr(loss, "net") else left


def same(one, two):
    assert one[0] == two[0]
    for a, b in zip(one[1], two[1], strict=True): assert torch.equal(a, b)


class Interrupted(BaseException): "Not an Exception, as KeyboardInterrupt is not"


def failing(loss, at):
    "A loss with all that belongs to it, which is interrupted at one call, after the critic has moved"
    class Failing(type(loss)):
        def __call__(self, fake, real):
            value = super().__call__(fake, real)
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls == at: raise Interrupted
            return value
    loss.__class__ = Failing
    return loss


@pytest.mark.parametrize("at", [1, 2, 10, 11, 15, 24, 25])
def test_an_interrupted_run_ends_to_the_last_bit_as_one_that_was_not(tmp_path, at):
    torch.manual_seed(0)
    first, second, third = critic(), critic(), critic()
    for other in (second, third): other.net.load_state_dict(first.net.state_dict())
    whole = ends(network(dropout=0.3), first, steps=25)
    settings = dict(steps=25, checkpoint=tmp_path / "run.pt", every=5)
    generator = network(dropout=0.3)
    with pytest.raises(Interrupted): ends(generator, failing(second, at), **settings)
    same(whole, ends(generator, third, **settings))           # in the same process, the generator half trained
    same(whole, ends(network(dropout=0.3), critic(), **settings))  # in a new one: all comes from the file


def test_an_interruption_while_writing_leaves_the_last_good_file(tmp_path, monkeypatch):
    whole = ends(network(), entropic, steps=12)
    settings = dict(steps=12, checkpoint=tmp_path / "run.pt", every=4)
    write, calls = torch.save, iter(range(3))

    def half(state, path):
        if next(calls, None) is not None: return write(state, path)
        path.write_bytes(b"half a file")
        raise OSError("no space left")
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="no space"): ends(network(), entropic, **settings)
    monkeypatch.undo()
    assert len(torch.load(tmp_path / "run.pt", weights_only=True)["history"]) == 8
    same(whole, ends(network(), entropic, **settings))


def test_a_finished_run_can_be_continued(tmp_path):
    path = tmp_path / "run.pt"
    ends(network(), entropic, steps=7, checkpoint=path)
    same(ends(network(), entropic, steps=12), ends(network(), entropic, steps=12, checkpoint=path))
    with pytest.raises(ValueError, match="holds 12 steps, more than 7"):
        ends(network(), entropic, steps=7, checkpoint=path)


def test_equal_seeds_give_equal_runs_and_leave_the_global_seed_alone():
    one = ends(network(dropout=0.3), entropic, steps=5, seed=1)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    generator = network(dropout=0.3)
    torch.set_rng_state(before)
    same(one, ends(generator, entropic, steps=5, seed=1))
    assert torch.equal(before, torch.get_rng_state())
    assert one[0] != ends(network(dropout=0.3), entropic, steps=5, seed=2)[0]


@pytest.mark.parametrize("change, message", [
    (dict(seed=1), "run.pt is of a run with seed=0, not 1"),
    (dict(optimizer=partial(torch.optim.Adam, lr=0.5)), "optimizer"),
])
def test_the_checkpoint_of_another_run_is_refused(tmp_path, change, message):
    path = tmp_path / "run.pt"
    ends(network(), entropic, steps=1, checkpoint=path)
    with pytest.raises(ValueError, match=message): ends(network(), entropic, steps=2, checkpoint=path, **change)


def test_a_loss_with_a_memory_is_not_confused_with_one_without(tmp_path):
    path = tmp_path / "run.pt"
    ends(network(), entropic, steps=1, checkpoint=path)
    with pytest.raises(ValueError, match="parts"): ends(network(), critic(), steps=2, checkpoint=path)


@pytest.mark.parametrize("loss, error, message", [
    (lambda x, y: (x - y).norm(dim=1), ValueError, r"not of shape \(16,\)"),
    (lambda x, y: entropic(x.detach(), y), ValueError, "requires_grad=False"),
    (lambda x, y: x.sum() / 0, FloatingPointError, "the loss became -?inf"),
])
def test_a_bad_loss_is_refused_before_the_weights_move(loss, error, message):
    generator = nn.Linear(2, 2)
    weight = generator.weight.detach().clone()
    with pytest.raises(error, match=message): ends(generator, loss, steps=3)
    assert torch.equal(weight, generator.weight)


@pytest.mark.parametrize("settings, message", [(dict(steps=0), "steps"), (dict(steps=1, every=0), "every")])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message): ends(network(), entropic, **settings)


def test_points_of_another_shape_and_batches_too_large_are_refused():
    with pytest.raises(ValueError, match=r"generated as \(3,\), the data are \(2,\)"):
        ends(network(out=3), entropic, steps=1)
    few = resample(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="a batch of 16 asks for more than the 3 points"):
        train(network(), entropic, few, noise=noise, steps=1, batch=16)


def test_a_held_plan_has_the_gradient_of_the_entropic_value():
    chance = torch.Generator().manual_seed(0)
    x, y = (draw(20, chance).double() for draw in (noise, data))
    x.requires_grad_()
    by_theorem = held_plan(lambda problem: ot_plan(problem, 0.5))
    (held,) = torch.autograd.grad(by_theorem(x, y), x)
    (exact,) = torch.autograd.grad(ot_value(PointCloud(x, y), reg=0.5, tol=1e-9), x)
    torch.testing.assert_close(held, exact, rtol=1e-6, atol=1e-8)


def ot_plan(problem, reg):
    from ot_research.solvers import sinkhorn
    return sinkhorn(problem, reg=reg, tol=1e-10).plan


def test_a_held_plan_may_be_a_table_and_is_priced_as_one():
    chance = torch.Generator().manual_seed(0)
    x, y = noise(12, chance) + 50, data(12, chance) + 50
    find = lambda problem: ipot(problem, beta=0.5, n_iter=50).plan
    as_table = held_plan(lambda problem: find(problem).dense())(x, y)
    torch.testing.assert_close(held_plan(find)(x, y), as_table, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(as_table, find_cost(x, y, find), rtol=1e-3, atol=1e-3)


def find_cost(x, y, find):
    from ot_research.problem import Problem
    return (find(Problem(PointCloud(x, y))).dense() * torch.cdist(x, y).square()).sum()
