"""Simulated series: the same from a seed, at one with their truth, written whole or not at all."""

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from timo.data import DataError, NumpySeries, physical, validate_sample
from timo.data.simulate import (
    CROP_CLASSES,
    FLOOD_CLASSES,
    LAND_COVER_CLASSES,
    SENTINEL2_BANDS,
    SimulatedSeries,
    write_series,
)
from timo.data.simulate.seasons import draw_rotation
from timo.data.simulate.spectra import ALFALFA

BLUE, GREEN, RED, NIR = range(4)  # places of the default bands


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors here are small: threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key]
        for key in a
    )


def index_of(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b) / (a + b)


def test_sample_depends_on_seed_and_index_alone():
    dataset = SimulatedSeries(6, seed=3, size=32)
    forward = [dataset[i] for i in range(6)]
    backward = [dataset[i] for i in reversed(range(6))][::-1]
    assert all(map(same, forward, backward))
    assert same(forward[2], SimulatedSeries(100, seed=3, size=32)[2])
    assert same(forward[2], pickle.loads(pickle.dumps(dataset))[2])
    assert same(forward[-1], dataset[-1])
    forward.append(SimulatedSeries(6, seed=4, size=32)[0])
    for i, sample in enumerate(forward):
        for key in ("image", "dates", "valid", "mask"):
            assert not any(torch.equal(sample[key], other[key]) for other in forward[:i])


def test_workers_change_nothing():
    dataset = SimulatedSeries(8, seed=5, size=32, target="flood")
    alone, together = (
        list(DataLoader(dataset, batch_size=3, num_workers=workers)) for workers in (0, 2)
    )
    assert len(alone) == len(together) == 3
    assert all(map(same, alone, together))


def test_global_generators_are_neither_read_nor_moved():
    dataset = SimulatedSeries(2, size=32)
    np.random.seed(1)
    torch.manual_seed(1)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = dataset[0]
    assert (np.random.get_state()[1] == states[0]).all()
    assert torch.equal(torch.get_rng_state(), states[1])
    np.random.seed(2)
    torch.manual_seed(2)
    assert same(first, dataset[0])


def test_bands_target_and_output_change_no_other_part():
    reference = SimulatedSeries(3, seed=7, size=32)[1]
    only = SimulatedSeries(3, seed=7, size=32, bands=("B08", "B02"), target="crops")[1]
    assert torch.equal(only["image"], reference["image"][:, [NIR, BLUE]])
    assert torch.equal(only["valid"], reference["valid"])
    digital = SimulatedSeries(3, seed=7, size=32, output="DN")
    raw = digital[1]["image"]
    assert raw.dtype == torch.uint16
    restored = physical(raw, digital.scale, digital.offset)
    torch.testing.assert_close(restored, reference["image"], rtol=0, atol=0.51e-4)
    assert (raw.int() > 0)[digital[1]["valid"][:, None].expand_as(raw)].all()


@pytest.mark.parametrize(
    "arguments, shape",
    [
        ({}, (10, 4, 64, 64)),
        ({"dates": 1, "size": 8, "bands": ("B11",)}, (1, 1, 8, 8)),
        ({"dates": 3, "size": (33, 71), "bands": tuple(SENTINEL2_BANDS)}, (3, 13, 33, 71)),
        ({"dates": 40, "size": (17, 9), "years": 1, "start": "2019-03-01"}, (40, 4, 17, 9)),
        ({"dates": 365, "size": 8, "years": 1, "bands": ["B8A"]}, (365, 1, 8, 8)),
    ],
)
@pytest.mark.parametrize("target", ["land_cover", "crops", "deforestation", "flood", None])
def test_samples_keep_the_contract(arguments, shape, target):
    dataset = SimulatedSeries(3, seed=11, target=target, clearing=1, flood=1, **arguments)
    for index in range(3):
        sample = dataset[index]
        validate_sample(sample, dataset.bands)
        assert sample["image"].shape == shape
        assert (sample["dates"].diff() > 0).all()
        first = np.datetime64(arguments.get("start", "2016-01-01")).astype(int)
        assert first <= sample["dates"][0]
        assert sample["dates"][-1] < first + 365.25 * arguments.get("years", 5)
        usable = sample["image"].movedim(1, -1)[sample["valid"]]
        assert usable.numel() == 0 or 0 < usable.min() <= usable.max() <= 1.2
        if target is None:
            assert "mask" not in sample and dataset.classes == ()
        else:
            labels = sample["mask"][sample["mask"] != 255]
            assert labels.numel() == 0 or labels.max() < len(dataset.classes)


def test_dates_are_irregular_passes():
    for index in range(5):
        gaps = SimulatedSeries(5, size=8)[index]["dates"].diff()
        assert (gaps % 5 == 0).all() and gaps.unique().numel() > 3


def test_every_class_occurs():
    dataset = SimulatedSeries(60, seed=1)
    counts = {
        "land_cover": torch.zeros(len(LAND_COVER_CLASSES), dtype=torch.int64),
        "crops": torch.zeros(len(CROP_CLASSES), dtype=torch.int64),
        "flood": torch.zeros(len(FLOOD_CLASSES), dtype=torch.int64),
        "deforestation": torch.zeros(2, dtype=torch.int64),
    }
    for index in range(60):
        truth = dataset.truth(index)
        for name, count in counts.items():
            count += torch.bincount(truth[name].flatten(), minlength=len(count))
    for name, count in counts.items():
        assert (count > 0.003 * count.sum()).all(), f"{name}: {count.tolist()}"


def test_mask_is_the_truth_of_its_target():
    for target in ("land_cover", "crops", "deforestation"):
        dataset = SimulatedSeries(4, seed=2, size=32, target=target)
        assert all(torch.equal(dataset[i]["mask"], dataset.truth(i)[target]) for i in range(4))
    dataset = SimulatedSeries(4, seed=2, size=32, target="flood")
    for index in range(4):
        sample, truth = dataset[index], dataset.truth(index)["flood"]
        assert torch.equal(sample["mask"], truth.where(sample["valid"], torch.tensor(255)))


def test_truths_agree_with_one_another():
    dataset = SimulatedSeries(20, seed=6, clearing=1, flood=1)
    water, built, cropland, grassland, _, _, bare = range(len(LAND_COVER_CLASSES))
    for index in range(20):
        truth, days = dataset.truth(index), dataset[index]["dates"]
        cover = truth["land_cover"]
        assert torch.equal(cover == cropland, truth["crops"] > 0)
        assert ((truth["flood"] == 1) == (cover == water)).all()
        cleared = truth["deforestation"] == 1
        assert ((cover == bare) | (cover == grassland))[cleared].all()
        assert cleared[cover == bare].all()
        felled = truth["cleared_on"]
        assert torch.equal(felled > 0, cleared)
        assert ((felled[cleared] > days[0]) & (felled[cleared] <= days[-1])).all()


def test_events_occur_as_often_as_asked():
    for probability in (0.0, 1.0):
        dataset = SimulatedSeries(20, size=48, clearing=probability, flood=probability)
        truths = [dataset.truth(i) for i in range(20)]
        cleared = sum(bool(t["deforestation"].any()) for t in truths)
        flooded = sum(bool((t["flood"] == 2).any()) for t in truths)
        if probability == 0:
            assert cleared == flooded == 0
        else:
            assert cleared >= 18 and flooded >= 17
    single = SimulatedSeries(5, dates=1, clearing=1)
    assert not any(single.truth(i)["deforestation"].any() for i in range(5))


def test_clearing_takes_the_green_away():
    dataset = SimulatedSeries(30, seed=8, clearing=1, flood=0, cloud_fraction=0, missing=0)
    drops, steady = [], []
    for index in range(30):
        sample, truth = dataset[index], dataset.truth(index)
        ndvi = index_of(sample["image"][:, NIR], sample["image"][:, RED])
        forest = (truth["land_cover"] == 4) | (truth["land_cover"] == 5)
        for day in truth["cleared_on"].unique()[1:]:
            after = int(torch.searchsorted(sample["dates"], day))
            where = truth["cleared_on"] == day
            if where.sum() < 20 or forest.sum() < 100:
                continue
            # Against the forest that stayed, so that autumn does not pass for a clearing.
            before_gap = ndvi[after - 1][forest].mean() - ndvi[after - 1][where].mean()
            after_gap = ndvi[after][forest].mean() - ndvi[after][where].mean()
            drops.append(float(after_gap - before_gap))
            steady.append(abs(float(before_gap)))
    assert len(drops) > 15
    assert np.mean(np.array(drops) > 0.1) > 0.9 and np.median(drops) > 0.25
    assert np.median(steady) < 0.1  # before the clearing it looked like forest


def test_flood_is_water_where_and_when_the_truth_says():
    dataset = SimulatedSeries(20, seed=9, flood=1, clearing=0, missing=0)
    wet, dry, permanent = [], [], []
    for index in range(20):
        sample, flood = dataset[index], dataset.truth(index)["flood"]
        ndwi = index_of(sample["image"][:, GREEN], sample["image"][:, NIR])
        valid = sample["valid"]
        ever = (flood == 2).any(0, keepdim=True)
        wet.append(ndwi[valid & (flood == 2)])
        dry.append(ndwi[valid & (flood == 0) & ever])
        permanent.append(ndwi[valid & (flood == 1)])
    wet, dry, permanent = map(torch.cat, (wet, dry, permanent))
    assert len(wet) > 4000 and (wet > 0).float().mean() > 0.9
    assert len(dry) > 5000 and (dry < 0).float().mean() > 0.95
    # Banks of narrow rivers share their pixels with trees and grass.
    assert (permanent > 0).float().mean() > 0.75


def test_crops_have_their_seasons():
    """In May of the mask's year wheat is green and maize bare ground; in August the reverse."""
    dataset = SimulatedSeries(
        12, seed=10, dates=110, years=2, size=48, target="crops",
        cloud_fraction=0, missing=0, clearing=0, flood=0,
    )  # fmt: skip
    ndvi = {name: {"may": [], "august": []} for name in ("winter wheat", "maize")}
    for sample in (dataset[i] for i in range(12)):
        month = sample["dates"].numpy().astype("datetime64[D]").astype("datetime64[M]")
        year = month.astype("datetime64[Y]")
        value = index_of(sample["image"][:, NIR], sample["image"][:, RED])
        for name, seasons in ndvi.items():
            field = sample["mask"] == CROP_CLASSES.index(name)
            for season, number in (("may", 4), ("august", 7)):
                frames = torch.from_numpy((year == year[-1]) & (month.astype(int) % 12 == number))
                seasons[season].append(value[frames][:, field].flatten())
    mean = {k: {s: torch.cat(v).mean() for s, v in seasons.items()} for k, seasons in ndvi.items()}
    assert mean["winter wheat"]["may"] > 0.6 > 0.45 > mean["maize"]["may"]
    assert mean["maize"]["august"] > 0.6 > 0.5 > mean["winter wheat"]["august"]


def test_crops_rotate():
    rotation = draw_rotation(np.random.default_rng(0), 6, 400)
    assert rotation.min() == 1 and rotation.max() == len(CROP_CLASSES) - 1
    repeated = rotation[1:] == rotation[:-1]
    assert (rotation[1:][repeated] == ALFALFA).all() and repeated.any()
    assert (rotation != rotation[0]).any(0).mean() > 0.95


@pytest.mark.parametrize("fraction", [0.0, 0.2, 0.6, 1.0])
def test_share_of_valid_pixels_is_as_asked(fraction):
    dataset = SimulatedSeries(60, size=24, cloud_fraction=fraction, missing=0, clearing=0, flood=0)
    share = np.mean([dataset[i]["valid"].float().mean().item() for i in range(60)])
    # 600 dates of a law whose standard deviation is below 0.4: 3.5 standard errors.
    assert share == pytest.approx(1 - fraction, abs=0.06 if 0 < fraction < 1 else 0)


def test_missing_dates_are_zero_and_invalid_and_never_all():
    dataset = SimulatedSeries(100, dates=5, size=8, missing=0.5, cloud_fraction=0)
    absent = []
    for sample in (dataset[i] for i in range(100)):
        valid = sample["valid"].flatten(1)
        assert torch.equal(valid.any(1), valid.all(1))
        assert valid.any()
        assert not sample["image"][~valid.any(1)].any()
        absent.append((~valid.any(1)).float().mean().item())
    assert np.mean(absent) == pytest.approx(0.5, abs=0.1)
    assert SimulatedSeries(5, dates=1, size=8, missing=0.99, cloud_fraction=0)[0]["valid"].all()


def test_clouds_are_bright_and_shadows_dark():
    cloudy = SimulatedSeries(20, seed=12, cloud_fraction=0.4, missing=0)
    clear = SimulatedSeries(20, seed=12, cloud_fraction=0, missing=0)
    bright, dark, covered = 0, 0, 0
    for index in range(20):
        a, b = cloudy[index], clear[index]
        assert b["valid"].all() and torch.equal(a["mask"], b["mask"])
        difference = (a["image"][:, BLUE] - b["image"][:, BLUE])[~a["valid"]]
        nir = (a["image"][:, NIR] / b["image"][:, NIR])[~a["valid"]]
        covered += len(difference)
        bright += int((difference > 0.1).sum())
        dark += int(((difference <= 0.1) & (nir < 0.8)).sum())
        # Where valid, little is left of clouds.
        seen = (a["image"] - b["image"]).abs().amax(1)[a["valid"]]
        assert len(seen) == 0 or seen.mean() < 0.04
    assert bright > 0.5 * covered and dark > 0.05 * covered


def test_statistics_are_those_of_reflectance():
    mean, std = SimulatedSeries(20, size=32).statistics()
    again, _ = SimulatedSeries(20, size=32, output="DN").statistics()
    torch.testing.assert_close(mean, again, rtol=1e-3, atol=0)
    assert (mean > 0.02).all() and (mean < 0.4).all() and (std > 0.01).all()
    assert mean[NIR] > 2 * mean[RED]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"length": -1}, "length must be an integer of at least 0, got -1"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an integer"),
        ({"dates": 0}, "dates must be an integer of at least 1, got 0"),
        ({"dates": 400, "years": 1}, "dates must be at most the 365 days"),
        ({"years": 0}, "years must be an integer of at least 1"),
        ({"bands": ("B02", "B99")}, "bands must be distinct names out of B01.*B99"),
        ({"bands": ("B02", "B02")}, "bands must be distinct names"),
        ({"bands": ()}, "bands must be distinct names"),
        ({"bands": "B02"}, "bands must be distinct names"),
        ({"size": 7}, "size must be an integer or a pair .* of at least 8, got 7"),
        ({"size": (64, 64, 64)}, "size must be"),
        ({"size": 64.0}, "size must be"),
        ({"start": "yesterday"}, "start must be a date YYYY-MM-DD, got 'yesterday'"),
        ({"start": ""}, "start must be a date"),
        ({"target": "trees"}, "target must be one of land_cover.*got 'trees'"),
        ({"cloud_fraction": 1.1}, r"cloud_fraction must lie in \[0, 1\], got 1.1"),
        ({"cloud_fraction": float("nan")}, "cloud_fraction must lie in"),
        ({"missing": 1}, r"missing must lie in \[0, 1\), got 1"),
        ({"clearing": -0.1}, "clearing must lie in"),
        ({"flood": 2}, "flood must lie in"),
        ({"output": "uint8"}, "output must be 'reflectance' or 'DN', got 'uint8'"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        SimulatedSeries(**arguments)


def test_index_beyond_the_length():
    dataset = SimulatedSeries(3, size=8)
    assert len(dataset) == 3 and len(list(dataset)) == 3
    for index in (3, -4):
        with pytest.raises(IndexError, match=f"sample {index} of a simulated series of 3"):
            dataset[index]
        with pytest.raises(IndexError):
            dataset.truth(index)


@pytest.mark.parametrize("target", ["crops", "flood", None])
def test_written_series_are_the_samples(tmp_path, target):
    dataset = SimulatedSeries(4, seed=13, size=(24, 32), target=target, output="DN")
    folder = write_series(dataset, tmp_path / "series", 3)
    assert [path.name for path in tmp_path.iterdir()] == ["series"]
    config = json.loads((folder / "config.json").read_text())
    assert config["samples"] == 3 and config["classes"] == list(dataset.classes)
    again = SimulatedSeries(**config["simulation"])
    read = NumpySeries(folder)
    assert len(read) == 3 and read.classes == dataset.classes
    assert (read.bands, read.units) == (dataset.bands, "reflectance")
    assert torch.equal(read.scale, dataset.scale) and torch.equal(read.offset, dataset.offset)
    for index in range(3):
        assert same(again[index], dataset[index])
        held = np.load(folder / dataset[index]["name"] / "series.npy", allow_pickle=False)
        assert torch.equal(torch.from_numpy(held), dataset[index]["image"])
        for key, value in dataset[index].items():
            got = read[index][key]
            assert torch.equal(got, value) if key != "name" else got == value
        assert ("mask" in read[index]) == (target is not None)


def test_nothing_half_written(tmp_path, monkeypatch):
    dataset = SimulatedSeries(4, size=8)
    draw = SimulatedSeries.__getitem__

    def fail_at_two(self, index):
        if index == 2:
            raise OSError("no space left on device")
        return draw(self, index)

    monkeypatch.setattr(SimulatedSeries, "__getitem__", fail_at_two)
    with pytest.raises(OSError, match="no space"):
        write_series(dataset, tmp_path / "series")
    assert list(tmp_path.iterdir()) == []


def test_writing_refuses_what_it_would_destroy(tmp_path):
    dataset = SimulatedSeries(2, size=8)
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="full: exists and is not an empty folder"):
        write_series(dataset, full)
    with pytest.raises(DataError, match="notes.txt: exists"):
        write_series(dataset, full / "notes.txt")
    assert [path.name for path in full.iterdir()] == ["notes.txt"]
    with pytest.raises(DataError, match="its parent does not exist"):
        write_series(dataset, tmp_path / "absent" / "series")
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"count must lie in 1 ... 2.*got {count}"):
            write_series(dataset, tmp_path / "series", count)
    (tmp_path / "empty").mkdir()
    assert len(list(write_series(dataset, tmp_path / "empty").glob("*/series.npy"))) == 2
