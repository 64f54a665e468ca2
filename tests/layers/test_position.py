"""Positional codes against the formula, entry by entry."""

import math

import pytest
import torch

from timo.layers.position import grid_code, months_since_first, sincos, unit_code


def entry(position, dim, channel):
    half = dim // 2
    angle = position * 10000 ** (-(channel % half) / half)
    return math.sin(angle) if channel < half else math.cos(angle)


def test_one_dimensional_code():
    code = sincos(torch.tensor([0, 1, 17, 300]), 12)
    exact = [[entry(p, 12, c) for c in range(12)] for p in (0, 1, 17, 300)]
    assert torch.allclose(code, torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-13)


def test_the_table_is_an_op():
    for position in (torch.arange(5), torch.tensor([[0.5, 2.0, 31.25]], dtype=torch.float64)):
        torch.library.opcheck(torch.ops.timo.sincos, (position, 12))


@pytest.mark.parametrize("per_sample", [False, True])
def test_date_then_column_then_row(per_sample):
    time = torch.tensor([[0.0, 2.5], [1.0, 7.0]], dtype=torch.float64)
    time = time if per_sample else torch.arange(2)
    code = grid_code(time, 3, 5, 16)
    assert code.shape == ((2,) if per_sample else ()) + (2, 3, 5, 16)
    for *sample, t, y, x in [(1, 1, 2, 4), (0, 0, 1, 3)]:
        index = (*sample, t) if per_sample else (t,)
        exact = [entry(float(time[index]), 8, c) for c in range(8)]
        exact += [entry(x, 4, c) for c in range(4)] + [entry(y, 4, c) for c in range(4)]
        got = code[(*index, y, x)]
        assert torch.allclose(got, torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize("per_sample", [False, True])
def test_units_read_the_code_of_the_full_frame(per_sample):
    rows, columns, side = 3, 2, 4
    time = torch.rand(2, 5, dtype=torch.float64) if per_sample else torch.arange(5)
    ids = torch.stack([torch.randperm(30)[:7].sort().values for _ in range(2)])
    got = unit_code(time, ids, (rows, columns), side, 16)
    whole = grid_code(time, rows * side, columns * side, 16).expand(2, -1, -1, -1, -1)
    for b in range(2):
        for k, u in enumerate(ids[b].tolist()):
            t, i, j = u // 6, u // 2 % 3, u % 2
            exact = whole[b, t, i * side : i * side + side, j * side : j * side + side]
            assert torch.equal(got[b, k], exact)


def test_months_count_from_the_earliest_valid_date():
    dates = torch.tensor([[50, 20, 10, 80], [7, 9, 8, 30]])
    valid = torch.tensor([[True, True, False, True], [False] * 4])
    days = torch.tensor([[30, 0, -10, 60], [0, 2, 1, 23]], dtype=torch.float64)
    pixels = torch.zeros(2, 4, 3, 3, dtype=torch.bool)
    pixels[..., 1, 2] = valid
    for given in (valid, pixels):
        assert torch.equal(months_since_first(dates, given), days / 30.4375)
    every = months_since_first(dates, None)
    assert torch.equal(every[0], torch.tensor([40, 10, 0, 70], dtype=torch.float64) / 30.4375)
