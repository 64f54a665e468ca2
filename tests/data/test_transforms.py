import pytest
import torch
from torch.utils.data import DataLoader

from tests.data.corpora import write_published_layout
from timo.data import (
    PublishedCorpus,
    SeriesDataset,
    TemporalSubset,
    TransformedSeries,
    collate_series,
    random_flip,
    random_rotate90,
    validate_sample,
)
from timo.data.transforms import sample_generator


def make(t=4, h=6, w=6, dtype=torch.uint16, per_date=True):
    """Image, validity and mask all computed from the same pixel numbers."""
    pixels = torch.arange(t * h * w).reshape(t, h, w)
    return {
        "image": torch.stack([pixels, pixels + 1000], 1).to(dtype),
        "dates": torch.arange(t) * 7,
        "valid": pixels % 3 > 0,
        "mask": pixels % 255 if per_date else pixels[0] % 255,
        "name": "s",
    }


def agree(sample):
    """The fields still belong to one another pixel by pixel."""
    pixels = sample["image"][..., 0, :, :].long()
    mask = pixels if sample["mask"].ndim == pixels.ndim else pixels[..., 0, :, :]
    return (
        torch.equal(sample["image"][..., 1, :, :].long(), pixels + 1000)
        and torch.equal(sample["valid"], pixels % 3 > 0)
        and torch.equal(sample["mask"], mask % 255)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
@pytest.mark.parametrize("per_date", [False, True])
@pytest.mark.parametrize("transform", [random_flip, random_rotate90])
def test_fields_move_together_and_every_orientation_occurs(transform, per_date, dtype):
    sample = make(t=1, dtype=dtype, per_date=per_date)
    sample["image"] = sample["image"].to(dtype)
    before = {k: v.clone() for k, v in sample.items() if k != "name"}
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(60):
        out = transform(sample, generator)
        assert out["image"].dtype == dtype
        # First pixels of the first two rows tell the eight orientations apart.
        corner = out["image"][0, 0, 0, 0].item(), out["image"][0, 0, 0, 1].item()
        seen.add(corner)
        if dtype != torch.uint8:
            assert agree(out)
    assert len(seen) == 4
    assert all(torch.equal(sample[k], v) for k, v in before.items())


def test_both_together_reach_all_eight_orientations():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        out = random_rotate90(random_flip(make(t=1), generator), generator)
        seen.add(tuple(out["image"][0, 0].long().flatten().tolist()))
    assert len(seen) == 8


def test_samples_of_a_batch_are_drawn_apart_and_others_kept():
    batch = collate_series([make() for _ in range(32)])
    generator = torch.Generator().manual_seed(1)
    out = random_rotate90(random_flip(batch, generator), generator)
    assert agree(out) and torch.equal(out["dates"], batch["dates"])
    assert len({tuple(image.long().flatten().tolist()) for image in out["image"]}) == 8


def test_pictures_that_are_not_square_keep_their_shape():
    generator = torch.Generator().manual_seed(2)
    seen = set()
    for _ in range(30):
        out = random_rotate90(make(h=4, w=6), generator)
        assert out["image"].shape == (4, 2, 4, 6) and agree(out)
        seen.add(out["image"][0, 0, 0, 0].item())
    assert seen == {0, 23}


@pytest.mark.parametrize("per_date", [False, True])
def test_temporal_subset(per_date):
    sample = make(t=9, per_date=per_date)
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(200):
        out = TemporalSubset(3)(sample, generator)
        validate_sample(out)
        days = out["dates"].tolist()
        assert days == sorted(set(days)) and len(days) == 3
        kept = [d // 7 for d in days]
        for key in ("image", "valid"):
            assert torch.equal(out[key], sample[key][kept])
        mask = sample["mask"][kept] if per_date else sample["mask"]
        assert torch.equal(out["mask"], mask)
        seen.update(kept)
    assert seen == set(range(9))
    assert TemporalSubset(9)(sample, generator) is sample
    with pytest.raises(ValueError, match="count: must be at least 1, got 0"):
        TemporalSubset(0)


def test_a_temporal_subset_keeps_a_date_with_a_valid_pixel():
    generator, sample = torch.Generator().manual_seed(0), make(t=9)
    sample["valid"][:7] = False
    seen = set()
    for _ in range(60):
        out = TemporalSubset(2)(sample, generator)
        validate_sample(out)
        kept = [d // 7 for d in out["dates"].tolist()]
        assert len(set(kept)) == 2 and kept == sorted(kept) and max(kept) >= 7
        assert torch.equal(out["image"], sample["image"][kept])
        seen.update(kept)
    assert seen == set(range(9))
    sample["valid"][:] = False
    assert not TemporalSubset(2)(sample, generator)["valid"].any()


class Repeated(SeriesDataset):
    def __init__(self):
        super().__init__(bands=("a", "b"))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return make(t=12)


def drawn(loader):
    return [sample["dates"].tolist() for sample in loader]


def test_draws_depend_on_seed_epoch_and_index_alone():
    data = TransformedSeries(Repeated(), [TemporalSubset(4), random_flip], seed=3)
    assert data.bands == ("a", "b") and len(data) == 8
    epochs = []
    for epoch in range(3):
        data.set_epoch(epoch)
        epochs.append([data[i]["dates"].tolist() for i in range(8)])
    assert len({tuple(map(tuple, e)) for e in epochs}) == 3
    assert len(set(map(tuple, epochs[0]))) > 4
    for workers in (0, 1, 2):
        loader = DataLoader(
            data, batch_size=None, num_workers=workers, persistent_workers=workers > 0
        )
        for epoch in (0, 2, 1):  # the same workers live on through the epochs
            data.set_epoch(epoch)
            assert drawn(loader) == epochs[epoch]
    other = TransformedSeries(Repeated(), [TemporalSubset(4)], seed=4)
    assert [other[i]["dates"].tolist() for i in range(8)] != epochs[0]


def test_generators_of_neighbours_are_unrelated():
    keys = [(s, e, i) for s in range(4) for e in range(4) for i in range(4)]
    first = torch.stack([torch.rand(64, generator=sample_generator(*key)) for key in keys])
    assert len(first[:, 0].unique()) == len(keys)
    correlation = torch.corrcoef(first) - torch.eye(len(keys))
    assert correlation.abs().max() < 0.6  # 2016 pairs of 64 numbers: 5 sigma


def test_temporal_subset_takes_the_labels_of_its_dates():
    sample = make(t=6)
    sample["label"] = torch.arange(6)
    out = TemporalSubset(3)(sample, torch.Generator().manual_seed(0))
    kept = [sample["dates"].tolist().index(day) for day in out["dates"].tolist()]
    assert out["label"].tolist() == kept
    assert TemporalSubset(3)(sample | {"label": torch.tensor(2)}, torch.Generator())["label"] == 2


def darkened(sample, generator):
    return sample | {"image": torch.zeros_like(sample["image"])}


@pytest.mark.parametrize("locations", [False, True])
def test_transforms_of_transformed_series_all_act(tmp_path, locations):
    plain = PublishedCorpus(write_published_layout(tmp_path)) if locations else Repeated()
    assert plain[0]["image"].any()
    inner = TransformedSeries(plain, [darkened])
    for outer in (TransformedSeries(inner, []), TransformedSeries(inner, [random_flip])):
        assert not outer[1]["image"].any()
        batch = collate_series(outer.__getitems__([0, 1]))
        assert batch["image"].shape[0] == 2 and not batch["image"].any()
        with pytest.raises(ValueError, match="dataset: whole batches come from a LocationSeries"):
            outer.batch([0])
    bare = TransformedSeries(TransformedSeries(plain, []), [])
    assert bare.whole == locations
    assert torch.equal(collate_series(bare.__getitems__([1]))["image"][0], plain[1]["image"])
