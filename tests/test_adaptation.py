"Adaptation: what a learned cost trains, what it never sees, and that an interruption changes nothing"
import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from ot_research.continuous.adaptation import LabelledCost, accuracy, fit_labels, information
from ot_research.continuous.spot import spot
from ot_research.continuous.stacked import Apart, Stacked, fold
from ot_research.training import resample


def clusters(shift, seed=0):
    "Two clusters, above and below"
    chance, labels = torch.Generator().manual_seed(seed), torch.arange(80) % 2
    return torch.stack([torch.full((80,), shift), 2.0 * labels - 1], 1) + 0.2 * torch.randn(80, 2, generator=chance), labels


def classifier(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))


def play(cost, **settings):
    torch.manual_seed(5)
    branch = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), Apart(branch, deepcopy(branch)))
    noise = lambda count, chance: torch.randn(count, 2, generator=chance)
    return spot([resample(clusters(-1.0)[0]), resample(clusters(1.0)[0])], cost, generator=generator, noise=noise, eta=1.0,
                critics=Stacked([2, 8, 1], activation=fold, lipschitz=True), batch=16, rounds=2, **settings)


def learned(**settings):
    cost = LabelledCost(*clusters(-1.0), classifier(), classifier(1), sure=0.0)
    return cost, play(cost, steps=7, **settings)


def test_classifiers_learn_along_with_the_plan():
    cost, _ = learned()
    for network, seed in ((cost.classify_x, 0), (cost.classify_y, 1)):
        for now, then in zip(network[::2].parameters(), classifier(seed)[::2].parameters(), strict=True): assert not torch.equal(now, then)


def test_an_interruption_changes_nothing(tmp_path):
    whole, coupling = learned()
    with pytest.raises(RuntimeError, match="stop"):
        cost, calls = LabelledCost(*clusters(-1.0), classifier(), classifier(1), sure=0.0), iter(range(9))
        cost.register_forward_hook(lambda *_: stop() if next(calls) == 5 else None)
        play(cost, steps=7, checkpoint=tmp_path / "run.pt", every=2)
    again, resumed = learned(checkpoint=tmp_path / "run.pt", every=2)
    assert resumed.history == coupling.history
    for a, b in zip(whole.parameters(), again.parameters(), strict=True): assert torch.equal(a, b)


def stop(): raise RuntimeError("stop")


def test_the_label_carried_over_trains_the_target_and_not_the_source():
    cost = LabelledCost(*clusters(-1.0), classifier(), classifier(1), transport=1e-12, known=1e-12, sure=0.0)
    cost(clusters(-1.0)[0], clusters(1.0)[0]).sum().backward()
    size = lambda network: sum(p.grad.abs().sum().item() for p in network.parameters())
    assert size(cost.classify_y) > 1 and size(cost.classify_x) < 1e-6


def test_one_network_for_both_domains_is_stored_and_trained_once():
    one = classifier()
    cost = LabelledCost(*clusters(-1.0), one, one)
    assert len([*cost.parameters()]) == len([*one.parameters()])
    assert not any(name.startswith(("points", "labels")) for name in cost.state_dict())


def test_labels_are_fitted_the_same_way_twice():
    points, labels = clusters(0.0)
    first, second = classifier(), classifier()
    assert fit_labels(first, points, labels, steps=150, batch=16, lr=1e-2) == fit_labels(second, points, labels, steps=150, batch=16, lr=1e-2)
    assert accuracy(first, points, labels) > 0.95


def test_information_lies_between_nothing_and_the_logarithm_of_the_classes():
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    assert all(0 <= information(classifier(seed), points) <= math.log(2) for seed in range(5))


def test_what_does_not_fit_is_refused():
    points, labels = clusters(0.0)
    with pytest.raises(ValueError, match="80 points and 79 labels"): LabelledCost(points, labels[1:], classifier(), classifier())
    with pytest.raises(ValueError, match="known must be"): LabelledCost(points, labels, classifier(), classifier(), known=-1.0)
