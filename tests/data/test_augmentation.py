import pytest
import torch

from timo.data import SimulatedSeries, TransformedSeries, collate_series, validate_sample
from timo.data.augmentation import BandDropout, RandomClouds, RandomResizedCrop
from timo.data.transforms import sample_generator

DTYPES = (torch.uint8, torch.uint16, torch.float32)


def make(dtype=torch.uint8, t=4, h=40, w=48):
    """Values 1 + column in band 0 and 1 + row in band 1; labels are the column."""
    image = torch.ones(t, 2, h, w)
    image[:, 0] += torch.arange(w)
    image[:, 1] += torch.arange(h)[:, None]
    return {
        "image": image.to(dtype), "dates": torch.arange(t) * 9, "name": "s",
        "valid": torch.ones(t, h, w, dtype=torch.bool),
        "mask": torch.arange(w).expand(h, w).clone(),
    }  # fmt: skip


def generator(index=0):
    return sample_generator(0, 0, index)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_date", [False, True])
def test_crops_cut_image_and_labels_alike(dtype, per_date):
    sample = make(dtype)
    if per_date:
        sample["mask"] = sample["mask"].expand(4, -1, -1).clone()
    before = sample["image"].clone()
    corners, spans = set(), set()
    for index in range(40):
        out = RandomResizedCrop(32)(sample, generator(index))
        validate_sample(out)
        assert out["image"].shape == (4, 2, 32, 32) and out["image"].dtype == dtype
        assert out["valid"].all() and out["mask"].shape[-2:] == (32, 32)
        columns = out["image"][0, 0].float()
        labels = out["mask"][0] if per_date else out["mask"]
        assert (columns - 1 - labels).abs().max() <= 1.01  # interpolated beside nearest
        rows = out["image"][0, 1].float()
        torch.testing.assert_close(rows[:, 0], rows[:, -1])
        torch.testing.assert_close(columns[0], columns[-1])
        corners.add((int(rows[0, 0]), int(columns[0, 0])))
        spans.add(int(columns[0, -1] - columns[0, 0]))
    assert len(corners) > 20 and min(spans) < 23 and max(spans) > 34
    assert torch.equal(sample["image"], before)


def test_crops_of_a_whole_sample_are_the_sample():
    sample = make(torch.uint16, h=32, w=32)
    out = RandomResizedCrop(32, area=(1, 1))(sample, generator())
    assert all(torch.equal(out[key].int(), sample[key].int()) for key in ("image", "valid", "mask"))


def test_pixels_without_data_do_not_bleed():
    sample = make(torch.float32)
    sample["valid"][1, :, 10:12] = False
    sample["image"][1, :, :, 10:12] = 0
    cut = 0
    for index in range(10):
        out = RandomResizedCrop(24)(sample, generator(index))
        good = out["valid"][1]
        assert out["valid"][0].all()
        cut += not good.all()
        assert (out["image"][1][:, ~good] == 0).all()
        assert torch.allclose(out["image"][1][:, good], out["image"][0][:, good], atol=0.01)
    assert cut >= 5


@pytest.mark.parametrize("place", [(0, 0), (39, 47), (20, 5)])
def test_crops_hold_a_valid_pixel_where_the_sample_does(place):
    sample = make()
    sample["valid"][:] = False
    sample["valid"][(2, *place)] = True
    for index in range(20):
        out = RandomResizedCrop(8)(sample, generator(index))
        validate_sample(out)
        row, col = (at[0] for at in out["valid"][2].nonzero(as_tuple=True))
        assert out["valid"].sum() == 1 and out["image"][2, :, row, col].tolist() == [
            1 + place[1], 1 + place[0]
        ]  # fmt: skip
        assert out["mask"][row, col] == place[1]
    sample["valid"][:] = False
    assert not RandomResizedCrop(8)(sample, generator())["valid"].any()


def test_clouds_leave_a_valid_pixel():
    sample = make()
    sample["valid"][:] = False
    sample["valid"][1, 3, 4] = True
    outs = [RandomClouds(1, 250)(sample, generator(index)) for index in range(10)]
    assert all(torch.equal(out["valid"], sample["valid"]) for out in outs)
    assert any(out is sample for out in outs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bands_are_lost_whole_and_one_stays(dtype):
    sample, counts = make(dtype), torch.zeros(3)
    for index in range(300):
        out = BandDropout(0.6)(sample, generator(index))
        lost = (out["image"] == 0).flatten(2).all(2)
        assert torch.equal(lost[0], lost[-1])
        kept = ~lost[0]
        assert torch.equal(out["image"][:, kept], sample["image"][:, kept])
        assert torch.equal(out["valid"], sample["valid"])
        counts[int(lost[0].sum())] += 1
    assert counts[2] == 0 and 30 < counts[0] < 80
    assert BandDropout(0)(sample, generator()) is sample


@pytest.mark.parametrize("dtype", DTYPES)
def test_clouds_brighten_and_are_not_valid(dtype):
    sample = make(dtype)
    sample["valid"][:, :3] = False
    sample["image"][:, :, :3] = 0
    sample["image"], before = sample["image"], sample["image"].clone()
    shares = []
    for index in range(40):
        out = RandomClouds(0.5, [200, 250])(sample, generator(index))
        validate_sample(out)
        lost = sample["valid"] & ~out["valid"]
        changed = (out["image"].float() != before.float()).any(1)
        assert not (changed & ~lost).any()
        assert (out["image"].float() >= before.float()).all()
        assert not out["image"][:, :, :3].any()
        shares += [one.float().mean().item() for one in lost if one.any()]
        assert torch.equal(out["mask"], sample["mask"])
    assert 50 < len(shares) < 110 and min(shares) < 0.3 and max(shares) > 0.6
    assert torch.equal(sample["image"], before)
    thick = RandomClouds(1, 250)(sample, generator(3))["image"]
    assert thick.float().max() == 250


@pytest.mark.parametrize(
    "transform", [RandomResizedCrop(16), BandDropout(0.5), RandomClouds(0.5, 6000)]
)
def test_draws_follow_epoch_and_sample_alone(transform):
    series = SimulatedSeries(4, size=24, dates=3, output="DN")
    data = TransformedSeries(series, [transform], seed=1)

    def images(order):
        return {i: data[i]["image"].int() for i in order}

    first, second = images([0, 1, 2, 3]), images([3, 1, 0, 2])
    assert all(torch.equal(first[i], second[i]) for i in range(4))
    data.set_epoch(1)
    assert any(not torch.equal(first[i], images([i])[i]) for i in range(4))
    assert len(collate_series([data[i] for i in range(4)])["name"]) == 4


@pytest.mark.parametrize(
    "make_bad",
    [
        lambda: RandomResizedCrop(0), lambda: RandomResizedCrop(8, (0, 1)),
        lambda: RandomResizedCrop(8, (0.6, 0.5)), lambda: BandDropout(1),
        lambda: RandomClouds(1.5, 1),
    ],
)  # fmt: skip
def test_arguments_out_of_range(make_bad):
    with pytest.raises(ValueError, match="must be"):
        make_bad()
