"""Which outputs of the stem enter its statistics: each that sees a visible unit, once."""

import pytest
import torch
import torch.nn.functional as F

from timo.models.masking import draw_units
from timo.models.statistics import HALO, RING, first_seen

GRID = (2, 3, 4)  # dates, rows and columns of units
B, HEIGHT, WIDTH = 3, 48, 64  # samples, and outputs of a frame


def usable_pixels(which):
    generator = torch.Generator().manual_seed(2)
    if which == "dates":
        return torch.tensor([[True, False], [True, True], [False, False]])
    return torch.rand(B, 2, 2 * HEIGHT, 2 * WIDTH, generator=generator) > 0.6


@pytest.mark.parametrize("keep", [1, 3, 9, 23])
@pytest.mark.parametrize("which", [None, "dates", "pixels"])
def test_every_output_is_counted_once(keep, which):
    ids = draw_units(torch.arange(B), GRID, keep)
    valid = None if which is None else usable_pixels(which)
    seen, count = first_seen(ids, GRID, valid)
    assert seen.shape == (B, keep, 19, 19)
    units = torch.zeros(B, 24).scatter(1, ids, 1).view(B * 2, 1, 3, 4)
    pixels = units.repeat_interleave(32, 2).repeat_interleave(32, 3)
    expected = F.conv2d(pixels, torch.ones(1, 1, 7, 7), stride=2, padding=3).squeeze(1) > 0
    usable = torch.ones(B * 2, HEIGHT, WIDTH, dtype=torch.bool)
    if which is not None:
        full = valid.view(*valid.shape[:2], *valid.shape[2:] or (1, 1))
        full = full.expand(B, 2, 2 * HEIGHT, 2 * WIDTH).flatten(0, 1)
        usable = full.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).any(3)
    times = torch.zeros(B * 2, HEIGHT + 3, WIDTH + 3)  # with what tiles have outside the frame
    for b, k in torch.cartesian_prod(torch.arange(B), torch.arange(keep)).tolist():
        t, i, j = ids[b, k] // 12, ids[b, k] // 4 % 3 * 16, ids[b, k] % 4 * 16
        times[b * 2 + t, i : i + 19, j : j + 19] += seen[b, k]
    before, after = RING
    outside = times.clone()
    outside[:, before:-after, before:-after] = 0
    assert outside.sum() == 0
    assert torch.equal(times[:, before:-after, before:-after], (expected & usable).float())
    assert count == usable.sum()


def test_the_halo_is_what_the_ring_reads():
    assert 32 + sum(HALO) == 2 * (16 + sum(RING) - 1) + 7
    assert HALO[0] == 2 * RING[0] + 3
