"The loop: what a step returns, what it breaks, what a checkpoint refuses"
import math

import pytest
import torch
from torch import nn

from ot_research.training import resample, resumable


def counting(breaks=None, spoils=None):
    "A step that adds chance to a number, and the part that holds it"
    held, calls = nn.Linear(1, 1), iter(range(1, 1000))
    with torch.no_grad(): held.weight.fill_(0)

    def step(chance):
        if (call := next(calls)) == breaks: raise KeyboardInterrupt
        with torch.no_grad(): held.weight.add_(torch.rand(1, generator=chance) + torch.rand(1))
        return dict(total=held.weight.item()) | ({"late": math.nan} if call == spoils else {})
    return step, dict(held=held)


def test_figures_may_come_and_go():
    step = lambda chance, seen=iter(range(9)): {"even": 1.0} if next(seen) % 2 == 0 else {}
    assert resumable(step, {}, steps=3) == [{"even": 1.0}, {}, {"even": 1.0}]


@pytest.mark.parametrize("breaks", [1, 4, 5, 9])
def test_interruptions_change_nothing(tmp_path, breaks):
    whole = resumable(*counting(), steps=9, seed=3)
    settings = dict(steps=9, seed=3, checkpoint=tmp_path / "run.pt", every=4)
    with pytest.raises(KeyboardInterrupt): resumable(*counting(breaks=breaks), **settings)
    assert resumable(*counting(), **settings) == whole


def test_what_is_no_number_names_its_step_and_leaves_the_last_good_checkpoint(tmp_path):
    settings = dict(steps=9, checkpoint=tmp_path / "run.pt", every=4)
    with pytest.raises(FloatingPointError, match="step 7: late became nan; run.pt holds what was before step 5"):
        resumable(*counting(spoils=7), **settings)
    assert len(torch.load(tmp_path / "run.pt", weights_only=True)["history"]) == 4
    assert resumable(*counting(), **settings) == resumable(*counting(), steps=9)
    with pytest.raises(FloatingPointError, match="step 2: late became nan$"): resumable(*counting(spoils=2), steps=9)


@pytest.mark.parametrize("then, now, message", [
    (dict(rate=1), dict(rate=2), "rate=1, not 2"), (dict(rate=1), {}, "rate=1, not None"), ({}, dict(rate=1), "rate=None"),
])
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, then, now, message):
    settings = dict(steps=2, checkpoint=tmp_path / "run.pt")
    resumable(*counting(), asked=then, **settings)
    with pytest.raises(ValueError, match=message): resumable(*counting(), asked=now, **settings)


def test_a_folder_that_is_not_there_is_made(tmp_path):
    resumable(*counting(), steps=1, checkpoint=tmp_path / "new/folder/run.pt")
    assert (tmp_path / "new/folder/run.pt").exists()


def test_labels_are_drawn_as_points_are():
    points, labels = torch.arange(9.0)[:, None], torch.arange(9)
    drawn = [resample(t)(5, torch.Generator().manual_seed(2)) for t in (points, labels)]
    assert drawn[1].dtype == torch.int64 and torch.equal(drawn[0][:, 0].long(), drawn[1])
