"Color transfer on images of any shape"
from functools import partial

import pytest
import torch

from ot_research.apps.color_transfer import (channel_levels, channel_problem, channel_transfer, palette,
                                             palette_transfer)
from ot_research.solvers import ipot, sinkhorn

quick = partial(ipot, beta=0.3, n_iter=200)


def image(*shape, seed=0, dtype=torch.float32):
    "Random colors of 8 bits"
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed)).to(dtype) / 255


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(20, 30, 3), (50, 3), (8, 9, 1), (2, 5, 6, 4)])
def test_shape_and_type_follow_the_source(shape, dtype):
    source, target = image(*shape, dtype=dtype), image(40, shape[-1], seed=1, dtype=dtype)
    for moved in (channel_transfer(source, target, quick), palette_transfer(source, target, quick, k=16)):
        assert moved.shape == source.shape and moved.dtype == dtype
        assert 0 <= moved.min() and moved.max() <= 1


def test_an_image_onto_itself_stays_as_it_is():
    source = image(60, 50, 3).square()
    torch.testing.assert_close(channel_transfer(source, source), source, atol=2 / 255, rtol=0)
    torch.testing.assert_close(palette_transfer(source, source, k=64), source, atol=2 / 255, rtol=0)


def test_each_channel_keeps_its_order():
    source, target = image(500, 3), image(400, 3, seed=1).square()
    moved = channel_transfer(source, target, partial(sinkhorn, reg=1e-2))
    for before, after in zip(source.T, moved.T):
        assert (after[before.argsort()].diff() >= -1e-6).all()


def test_one_color_takes_all_of_the_mean():
    target = image(400, 3)
    moved = channel_transfer(torch.full((5, 3), 0.2), target, quick)
    torch.testing.assert_close(moved, target.mean(0).expand(5, 3), atol=1e-3, rtol=0)


def test_a_palette_stands_for_all_pixels_and_is_the_same_for_the_same_seed():
    source = image(300, 3)
    one, two, other = palette(source, 32), palette(source, 32), palette(source, 32, seed=1)
    assert one.weights.sum() == pytest.approx(1) and (one.weights > 0).all() and len(one.colors) <= 32
    assert torch.equal(one.colors, two.colors) and not torch.equal(one.colors, other.colors)


@pytest.mark.parametrize("bad, message", [
    (torch.full((4, 3), float("nan")), "nan"),
    (torch.full((4, 3), -0.1), "colors from -0.1"),
    (torch.full((4, 3), 255.0), "perhaps by 1/255"),
    (torch.zeros(3), r"must be \(..., channels\)"),
    (torch.zeros(0, 3), "must be"),
])
def test_bad_colors_are_refused_by_name(bad, message):
    good = torch.rand(5, 3)
    with pytest.raises(ValueError, match=message): channel_levels(bad)
    with pytest.raises(ValueError, match="target"): channel_problem(good, bad)
    with pytest.raises(ValueError): palette_transfer(bad, good)
