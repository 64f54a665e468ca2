import pytest
import torch

from timo.data import DataError, mndwi, normalized_difference, open_water

BANDS = ("SWIR1", "Green")


def image(*pixels):
    """(1, 2, 1, n) of (SWIR1, Green) pairs."""
    return torch.tensor(pixels).T.reshape(1, 2, 1, -1)


def test_bands_are_found_by_name_and_0_over_0_is_0():
    x = image((30, 10), (0, 0), (0, 5))
    assert mndwi(x, BANDS).flatten().tolist() == [-0.5, 0, 1]
    assert mndwi(x.flip(1), ("Green", "SWIR1")).flatten().tolist() == [-0.5, 0, 1]
    same = normalized_difference(x.to(torch.uint16), BANDS, "SWIR1", "Green")
    assert same.flatten().tolist() == [0.5, 0, -1]
    with pytest.raises(DataError, match=r"needs Green and|needs SWIR1|Green.*got \('SWIR1', 'x'\)"):
        mndwi(x, ("SWIR1", "x"))


def test_open_water():
    x = image((30, 10), (10, 30), (10, 30), (20, 21))
    valid = torch.tensor([True, True, False, True]).reshape(1, 1, 4)
    assert open_water(x, valid, BANDS).flatten().tolist() == [0, 1, 255, 1]
    assert open_water(x, valid, BANDS, threshold=0.3).flatten().tolist() == [0, 1, 255, 0]
    assert open_water(x, valid, BANDS).dtype == torch.int64
