import os
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from timo.data import DataError, SeriesDataset, collate_series, physical, validate_sample
from timo.data.contract import atomic_output, evenly_spaced, select_bands


class Listed(SeriesDataset):
    """Samples held in memory."""

    def __init__(self, samples, **info):
        super().__init__(**info)
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


def make(t=3, c=2, h=5, w=4, dtype=torch.uint16, seed=0, **extra):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 60_000, (t, c, h, w), generator=generator)
    return {
        "image": image.to(dtype),
        "dates": torch.arange(t) * 10,
        "valid": torch.rand(t, h, w, generator=generator) < 0.7,
        "name": f"s{seed}",
        **extra,
    }


def test_statistics_against_all_pixels_at_once():
    samples = [make(t=t, seed=t) for t in (2, 3, 5)]
    samples.append(make(seed=9) | {"valid": torch.zeros(3, 5, 4, dtype=torch.bool)})
    data = Listed(samples, bands=("a", "b"), scale=[1e-4, 2.0], offset=[-0.1, 1e6])
    pixels = torch.cat(
        [s["image"].double().movedim(1, 0).flatten(1)[:, s["valid"].flatten()] for s in samples], 1
    )
    pixels = pixels * torch.tensor([[1e-4], [2.0]]).double() + torch.tensor([[-0.1], [1e6]])
    mean, std = data.statistics()
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, pixels.mean(1).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(std, pixels.std(1, correction=0).float(), rtol=1e-4, atol=0)


def test_statistics_of_a_small_spread_on_a_large_mean():
    image = 1e7 + torch.tensor([-1.0, 1.0]).repeat(10).reshape(1, 1, 4, 5)
    sample = make(1, 1, 4, 5) | {"image": image, "valid": torch.ones(1, 4, 5, dtype=torch.bool)}
    mean, std = Listed([sample] * 50, bands=("a",)).statistics()
    assert mean.item() == 1e7 and std.item() == pytest.approx(1)


def test_statistics_without_valid_pixels():
    sample = make() | {"valid": torch.zeros(3, 5, 4, dtype=torch.bool)}
    with pytest.raises(DataError, match="none of the 1 samples read has a valid pixel"):
        Listed([sample], bands=("a", "b")).statistics()


def test_statistics_read_at_most_so_many_samples():
    samples = [make(seed=i) for i in range(9)]
    few = Listed(samples, bands=("a", "b")).statistics(max_samples=3)
    same = Listed([samples[i] for i in (0, 4, 8)], bands=("a", "b")).statistics()
    assert torch.equal(few[0], same[0]) and torch.equal(few[1], same[1])
    assert evenly_spaced(10, 1) == [0] and evenly_spaced(2, 5) == [0, 1]


def test_physical_values_of_integers():
    image = torch.tensor([0, 65_535]).to(torch.uint16).reshape(1, 2, 1, 1)
    values = physical(image, torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.5]))
    assert values.flatten().tolist() == [-3.0, 131_070.5]


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"bands": ("a", "a")}, "bands: names must differ"),
        ({"bands": ("a", "b"), "scale": [1.0]}, "scale: must be one finite number, or one for "),
        ({"bands": ("a",), "scale": 0.0}, "scale: must not be 0"),
        ({"bands": ("a",), "offset": float("nan")}, "offset: must be one finite number"),
    ],
)
def test_bad_band_information(info, message):
    with pytest.raises(ValueError, match=message):
        Listed([], **info)


def test_bands_are_selected_by_name():
    assert select_bands(("R", "G", "B"), ("B", "R")) == [2, 0]
    with pytest.raises(DataError, match="no band named N; the files hold R, G.*bands="):
        select_bands(("R", "G"), ("N",))


CONTRACT_BREAKS = [
    ({"name": 3}, r"sample\['name'\] must be a str"),
    ({"image": None}, "image must be a tensor, got NoneType"),
    ({"image": torch.zeros(3, 5, 4)}, r"image must be \(T, C, H, W\).*\(3, 5, 4\)"),
    ({"image": torch.zeros(0, 2, 5, 4)}, r"none 0, got \(0, 2, 5, 4\)"),
    ({"image": torch.zeros(3, 2, 5, 4).double()}, "image must be float32, uint8 or uint16"),
    ({"image": torch.full((3, 2, 5, 4), torch.nan)}, "image must be finite"),
    ({"image": torch.zeros(3, 9, 5, 4)}, r"image must be of 2 channels \('a', 'b'\), got 9"),
    ({"dates": torch.arange(3).int()}, "dates must be int64"),
    ({"dates": torch.arange(4)}, r"dates must be \(3,\), one for each frame"),
    ({"dates": torch.tensor([0, 5, 4])}, r"dates must be ascending, got \[0, 5, 4\]"),
    ({"valid": torch.ones(3, dtype=torch.bool)}, r"valid must be \(3, 5, 4\)"),
    ({"valid": torch.ones(3, 5, 4)}, "valid must be bool"),
    ({"mask": torch.zeros(5, 4)}, "mask must be an int64 tensor, got torch.float32"),
    ({"mask": torch.zeros(4, 5).long()}, r"mask must be \(5, 4\) or \(3, 5, 4\)"),
    ({"mask": torch.full((5, 4), -1)}, r"mask must be in 0 ... 255, got -1 ... -1"),
    ({"label": torch.zeros(3)}, "label must be an int64 tensor, got torch.float32"),
    ({"label": torch.zeros(4).long()}, r"label must be \(\) or \(3,\), got \(4,\)"),
    ({"label": torch.tensor(300)}, "label must be in 0 ... 255, got 300"),
]


@pytest.mark.parametrize(("change", "message"), CONTRACT_BREAKS)
def test_a_broken_sample_is_named(change, message):
    validate_sample(make(mask=torch.zeros(5, 4).long()), ("a", "b"))
    with pytest.raises(DataError, match=message):
        validate_sample(make() | change, ("a", "b"))


def test_collate_pads_time():
    per_date = torch.ones(2, 5, 4).long(), torch.ones(4, 5, 4).long()
    a, b = make(t=2, seed=1, mask=per_date[0]), make(t=4, seed=2, mask=per_date[1])
    batch = collate_series([a, b])
    assert batch["image"].shape == (2, 4, 2, 5, 4) and batch["image"].dtype == torch.uint16
    assert torch.equal(batch["image"][0, :2], a["image"]) and not batch["image"][0, 2:].int().any()
    assert batch["dates"].tolist() == [[0, 10, 10, 10], [0, 10, 20, 30]]
    assert torch.equal(batch["valid"][0, :2], a["valid"]) and not batch["valid"][0, 2:].any()
    assert torch.equal(batch["valid"][1], b["valid"])
    assert (batch["mask"][0, 2:] == 255).all() and (batch["mask"][1] == 1).all()
    assert batch["name"] == ["s1", "s2"]


def test_collate_stacks_masks_of_the_series_and_lists_windows():
    mask = torch.arange(20).reshape(5, 4)
    batch = collate_series([make(t=t, mask=mask, window=(t, 0)) for t in (1, 3)])
    assert torch.equal(batch["mask"], torch.stack([mask, mask]))
    assert batch["window"] == [(1, 0), (3, 0)]


def test_labels_of_dates_are_padded_and_those_of_series_stacked():
    a, b = make(t=2, label=torch.tensor([0, 1])), make(t=3, label=torch.tensor([1, 1, 0]))
    for sample in (a, b, make(label=torch.tensor(4))):
        validate_sample(sample)
    assert collate_series([a, b])["label"].tolist() == [[0, 1, 255], [1, 1, 0]]
    series = [make(t=t, label=torch.tensor(t)) for t in (1, 2)]
    assert collate_series(series)["label"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (make(h=6), r"\(2, 5, 4\) and \(2, 6, 4\) do not batch.*tile="),
        (make(c=3), r"\(2, 5, 4\) and \(3, 5, 4\) do not batch; select="),
        (make(dtype=torch.float32), "torch.uint16 and torch.float32 do not batch"),
        (make(mask=torch.zeros(5, 4).long()), "must hold the same"),
    ],
)
def test_collate_refuses_what_does_not_fit(other, message):
    with pytest.raises(DataError, match="'s0' and 's0'.*" + message):
        collate_series([make(), other])


@pytest.mark.parametrize("workers", [0, 2])
def test_loader(workers):
    data = Listed([make(t=t, seed=t) for t in (1, 2, 3, 4)], bands=("a", "b"))
    loader = DataLoader(data, batch_size=2, collate_fn=collate_series, num_workers=workers)
    assert [tuple(b["image"].shape) for b in loader] == [(2, 2, 2, 5, 4), (2, 4, 2, 5, 4)]


def test_atomic_output(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_output(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    os.link(path, tmp_path / "link")  # shares the old file, which must not be written into
    with atomic_output(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and (tmp_path / "link").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt", "link"]
    with (
        pytest.raises(DataError, match="create .*none first"),
        atomic_output(tmp_path / "none" / "a.txt"),
    ):
        pass


def test_import_needs_no_raster_library(tmp_path):
    (tmp_path / "2020.tif").write_bytes(b"")
    script = f"""
import sys
sys.modules["rasterio"] = sys.modules["matplotlib"] = None
import timo.data
assert not {{"lightning", "torchvision", "torchmetrics", "rich"}} & set(sys.modules)
try:
    timo.data.RasterSeries({str(tmp_path)!r})
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.stdout == "reading and writing rasters needs rasterio: pip install timo[geo]\n", (
        run.stderr
    )


def test_bases_are_no_datasets():
    with pytest.raises(TypeError, match="abstract.*__len__"):
        SeriesDataset(["red"], "DN", 1.0, 0.0)
