"Names for boxes, frame by frame"
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from ot_research.apps.tracking import Motion, bridge, learn_motion, link, track

f64 = torch.float64
HAND = Motion(torch.ones(4, dtype=f64), torch.full((4,), 0.05, dtype=f64), torch.tensor(1.0, dtype=f64))


def walkers(people=4, frames=20, seed=0, gone=None):
    "Boxes of people far apart who walk straight on, rows in any order; `gone` are frames without the first"
    chance = torch.Generator().manual_seed(seed)
    t, who = torch.meshgrid(torch.arange(1, frames + 1).double(), torch.arange(1, people + 1).double(), indexing="ij")
    left = 300 * who + 3 * t * torch.where(who % 2 == 1, 1, -1) + torch.rand(t.shape, generator=chance, dtype=f64)
    boxes = torch.stack([t, who, left, 10 * who, 0 * t + 40, 0 * t + 100], -1).reshape(-1, 6)
    if gone: boxes = boxes[~((boxes[:, 1] == 1) & torch.isin(boxes[:, 0], torch.tensor(gone, dtype=f64)))]
    return boxes[torch.randperm(len(boxes), generator=chance)]


def names(boxes, **asked):
    "Pairs of a true name and a given one"
    found = track(boxes, **(dict(motion=HAND, price=2.0, memory=10) | asked))
    return {(int(a), int(b)) for a, b in zip(boxes[:, 1], found[:, 1])}


@pytest.mark.parametrize("reg", [0, 0.1, 1.0])
def test_who_walks_alone_keeps_a_name(reg):
    assert len(names(walkers(), match=link(reg))) == 4


def test_memory_is_the_number_of_frames_one_may_be_gone():
    boxes = walkers(gone=[8, 9, 10])
    assert len(names(boxes, memory=3)) == 4 and len(names(boxes, memory=2)) == 5


def test_neither_the_order_of_rows_nor_the_unit_of_length_nor_old_names_matter():
    boxes = walkers(gone=[5])
    found = track(boxes, motion=HAND, price=2.0, memory=10)
    other = boxes * torch.tensor([1.0, 0, 7, 7, 7, 7], dtype=f64)
    assert torch.equal(track(other, motion=HAND, price=2.0, memory=10)[:, 1], found[:, 1])
    order = torch.randperm(len(boxes))
    again = track(boxes[order], motion=HAND, price=2.0, memory=10)[:, 1]
    assert len(set(zip(found[order, 1].tolist(), again.tolist()))) == 4


@pytest.mark.parametrize("n, m, seed", [(1, 1, 0), (1, 5, 1), (6, 3, 2), (8, 8, 3)])
def test_exact_links_are_the_assignment_with_a_gate(n, m, seed):
    costs = 10 * torch.rand(n, m, dtype=f64, generator=torch.Generator().manual_seed(seed))
    rows, cols = linear_sum_assignment((costs - 6).clamp(max=0))
    best = torch.zeros_like(costs)
    best[rows, cols] = (costs[rows, cols] < 6).double()
    assert torch.equal((link(0)(costs, 6.0) > 0.5).double(), best)


@pytest.mark.parametrize("reg", [0.2, 1.0, 5.0])
def test_a_pair_on_its_own_has_the_odds_of_its_cost(reg):
    odds = link(reg)(torch.tensor([[1.0]], dtype=f64), 2.0).logit()
    assert odds.item() == pytest.approx(1 / (2 * reg), abs=1e-4)


def test_no_track_and_no_box_has_more_than_one_link_and_dear_pairs_have_none():
    links = link(1.0)(torch.tensor([[0.0, 0.1], [0.1, 1e9], [1e9, 1e9]], dtype=f64), 4.0)
    assert (links.sum(0) < 1 + 1e-5).all() and (links.sum(1) < 1 + 1e-5).all()
    assert links[2].max() < 1e-6 and links[1, 1] < 1e-6


def test_expected_boxes_follow_the_carry():
    motion = Motion(torch.tensor([0.5, 1, 1, 0], dtype=f64), HAND.noise, HAND.growth)
    after = motion.after(torch.zeros(1, 4, dtype=f64), torch.ones(1, 4, dtype=f64), torch.tensor([3]))
    torch.testing.assert_close(after, torch.tensor([[0.875, 3, 3, 0]], dtype=f64))


def test_a_perfect_hit_has_the_density_at_the_mode():
    box = torch.tensor([[0.0, 0, 40, 100]], dtype=f64)
    hit = HAND.surprise(box, 0 * box, torch.tensor([1]), box)
    assert hit.item() == pytest.approx(4 * math.log(0.05) + math.log(4 * math.pi**2 / 3))


def test_bridges_fill_gaps_and_nothing_else():
    boxes = walkers(gone=[8, 9, 10])
    whole = bridge(boxes)
    assert len(whole) == 80 and len(bridge(walkers())) == 80
    first = whole[whole[:, 1] == 1]
    assert first[:, 0].tolist() == list(range(1, 21))
    torch.testing.assert_close(first[7:10, 2].diff(), first[6:8, 2].diff().expand(2))
    assert len(bridge(boxes[:1])) == 1


def test_learned_motion_is_narrow_and_still_tracks():
    boxes = walkers(frames=40)
    boxes[:, 2:] += torch.randn(len(boxes), 4, generator=torch.Generator().manual_seed(1), dtype=f64) / 2
    learned = learn_motion(boxes, HAND, price=2.0, memory=3, gaps=(1, 2))
    assert (learned.noise < HAND.noise).all()
    assert len(names(boxes, motion=learned)) == 4


@pytest.mark.parametrize("change, asked, contains", [
    (lambda t: t[:, :5], {}, "boxes must be"),
    (lambda t: t[:0], {}, "boxes must be"),
    (lambda t: t / 0, {}, "NaN or infinite"),
    (lambda t: -t, {}, "not positive"),
    (lambda t: t, dict(memory=-1), "memory is a number of frames"),
    (lambda t: t, dict(gain=0.0), "gain is a share"),
])
def test_what_cannot_be_tracked_is_refused(as_installed, change, asked, contains):
    with pytest.raises(ValueError, match=contains):
        track(change(walkers()), **(dict(motion=HAND, price=2.0, memory=10) | asked))


def test_one_frame_teaches_nothing():
    with pytest.raises(ValueError, match="nothing to learn from"):
        learn_motion(walkers(frames=1), HAND, price=2.0, memory=3)
