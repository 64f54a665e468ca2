"""Tasks and data modules below the commands."""

import csv
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from tests.data.corpora import write_published_layout
from tests.data.writers import frames, write_rasters, write_tif
from timo.data import (
    DataError,
    RasterSeries,
    SimulatedSeries,
    open_series,
    open_water,
    random_flip,
    random_rotate90,
)  # fmt: skip
from timo.data.building import SeriesSource, build_store
from timo.data.collate import collate_series
from timo.data.transforms import sample_generator
from timo.models.masking import least_usable, usable_units
from timo.tasks import PretrainingTask, SegmentationTask, SeriesData
from timo.tasks.data import SeededShuffle, compact_valid
from timo.tasks.prediction import change_codes, predict_strips
from timo.tasks.runs import fit, save_model

SMALL = {"embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1]}
UNITS = {"mean": [0.2, 0.3], "deviation": [0.1, 0.2], "scale": [1.0, 1.0], "offset": [0.0, 0.0]}


def segmentation(**options) -> SegmentationTask:
    options = {"model_options": SMALL, "classes": ("a", "b", "c"), **options}
    return SegmentationTask(("x", "y"), **UNITS, model="timo_tiny", **options)


def test_compact_valid_is_the_cheapest_equal_form():
    valid = torch.ones(2, 3, 4, 5, dtype=torch.bool)
    assert compact_valid(valid) is None
    valid[0, 1] = False
    assert torch.equal(compact_valid(valid), torch.tensor([[1, 0, 1], [1, 1, 1]]).bool())
    valid[1, 2, 0, 0] = False
    assert compact_valid(valid) is valid


def test_forms_of_validity_give_one_result():
    torch.manual_seed(0)
    task = segmentation(per_frame=True).eval()
    valid = torch.ones(2, 3, 32, 32, dtype=torch.bool)
    valid[0, 1] = False
    batch = {"image": torch.randn(2, 3, 2, 32, 32), "dates": torch.arange(6).view(2, 3)}
    with torch.no_grad():
        full = task(batch | {"valid": valid})
        short = task(batch | {"valid": compact_valid(valid)})
    torch.testing.assert_close(full[valid[:, :, 0, 0]], short[valid[:, :, 0, 0]])


def test_normalisation_is_of_physical_values():
    """The same reflectance gives the same input, whatever raw units it is stored in."""
    torch.manual_seed(0)
    task = segmentation().eval()
    reflectance = SimulatedSeries(1, bands=("B03", "B04"), size=32, dates=2, output="reflectance")
    numbers = SimulatedSeries(1, bands=("B03", "B04"), size=32, dates=2, output="DN")
    out = []
    for dataset in (reflectance, numbers):
        task.bands = dataset.bands
        task.read_from(dataset)
        sample = dataset[0]
        batch = {k: sample[k][None] for k in ("image", "dates", "valid")}
        with torch.no_grad():
            out.append(task(batch))
    torch.testing.assert_close(out[0], out[1], atol=5e-3, rtol=0)
    assert out[0].std() > 2e-2, "the comparison above would pass for any input"
    task.bands = ("B04", "B03")
    with pytest.raises(DataError, match=r"bands \('B03', 'B04'\).*reads \('B04', 'B03'\)"):
        task.read_from(reflectance)


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0], [1, 2, 4]])
def test_loss_ignores_255(weights):
    task = segmentation(class_weights=weights)
    logits, mask = torch.randn(2, 3, 8, 8), torch.randint(0, 3, (2, 8, 8))
    mask[0, :4] = 255
    expected = F.cross_entropy(
        logits, mask, None if weights is None else torch.tensor(weights).float(), ignore_index=255
    )
    torch.testing.assert_close(task.loss(logits, mask), expected)
    assert task.loss(logits, torch.full_like(mask, 255)) == 0


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0]])
def test_validation_loss_is_that_of_all_labels_at_once(weights):
    """Whatever the batches: one without a label weighs nothing, and NaN is not passed over."""
    task, logged = segmentation(class_weights=weights), {}
    task.log = lambda name, value, **options: logged.update({name: value})
    logits, mask = torch.randn(5, 3, 8, 8), torch.randint(0, 3, (5, 8, 8))
    mask[0, 1:], mask[1] = 255, 255
    task.forward = lambda batch: batch["logits"]

    def validate(logits, *parts):
        for part in parts:
            batch = {"valid": None, "mask": mask[part], "logits": logits[part]}
            task.validation_step(batch, 0)
        task.on_validation_epoch_end()
        return logged["val/loss"]

    for _ in range(2):  # nothing is left over for the next epoch
        loss = validate(logits, slice(0, 1), slice(1, 2), slice(2, 5))
        torch.testing.assert_close(loss, task.loss(logits, mask))
    assert validate(logits * torch.nan, slice(0, 5)).isnan()
    assert validate(logits, slice(1, 2)).isnan()


@pytest.mark.parametrize("form", ["none", "dates", "pixels"])
def test_labels_count_where_a_pixel_is_valid(form):
    """At that date, or at any date of the series: where `timo predict` maps."""
    valid = torch.ones(2, 3, 4, 5, dtype=torch.bool)
    if form != "none":
        valid[0, 1], valid[1] = False, False
    if form == "pixels":
        valid[0, :2, 0, 0], valid[0, 2, 3] = False, False
    batch = {"valid": compact_valid(valid), "mask": torch.ones(2, 3, 4, 5).long()}
    task = segmentation()
    assert torch.equal(task.labels_of(batch) == 1, valid)
    batch["mask"] = batch["mask"][:, 0]
    assert torch.equal(task.labels_of(batch) == 1, valid.any(1))


def test_only_pretraining_refuses_a_sample_without_a_valid_pixel(tmp_path):
    pixels = frames(2, bands=2, height=32, width=64, dtype="uint8")
    pixels[..., :32] = 0
    write_rasters(tmp_path, ["2001", "2002"], pixels, nodata=0)
    write_tif(tmp_path / "mask.tif", np.ones((32, 64), "uint8"))
    data = SeriesData(RasterSeries(tmp_path, tile=32), batch_size=2)
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(DataError, match="no valid pixel at any date; leave such windows out"):
        data.on_before_batch_transfer(batch, 0)
    task = segmentation()
    data.trainer = SimpleNamespace(lightning_module=task)
    ready = data.on_before_batch_transfer(batch, 0)
    assert "units" not in ready  # of visible units, which fine-tuning does not draw
    loss = task.loss(task(ready), task.labels_of(ready))
    loss.backward()
    assert loss > 0 and all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


@pytest.mark.parametrize("region", [None, (3, 5, 60, 90)])
def test_every_pixel_is_measured_once(tmp_path, region):
    for name in ("a", "b"):
        pixels = frames(2, bands=2, height=70, width=95, dtype="uint8")
        write_rasters(tmp_path / name, ["2001", "2002"], pixels)
        write_tif(tmp_path / name / "mask.tif", np.ones((70, 95), "uint8"))
    expected = np.ones((70, 95), int)
    if region:
        expected[:] = 0
        expected[3:60, 5:90] = 1
    for tile, stride in ((32, None), (32, 20), (64, 1000), (200, None)):
        dataset = RasterSeries(tmp_path, tile=tile, stride=stride, region=region)
        count = {name: np.zeros((400, 400), int) for name in ("a", "b")}
        for batch in SeriesData(test=dataset, batch_size=3).test_dataloader():
            for name, mask, (row, col) in zip(batch["name"], batch["mask"], batch["window"]):
                count[name][row : row + tile, col : col + tile] += (mask != 255).numpy()
        assert all((one[:70, :95] == expected).all() for one in count.values())


def test_mask_and_model_must_agree_on_frames():
    frames, one = torch.randn(1, 2, 3, 8, 8), torch.zeros(1, 8, 8).long()
    with pytest.raises(ValueError, match="one for every date"):
        segmentation().loss(frames, one)
    with pytest.raises(ValueError, match="model gives one for the series .per_frame=False"):
        segmentation().loss(frames[:, 0], one.expand(1, 2, 8, 8))


def test_classes_and_units_are_checked():
    with pytest.raises(ValueError, match="every name must be another"):
        segmentation(classes=("a", "b", "a"))
    units = {"mean": [0.0] * 2, "deviation": [1.0] * 2, "scale": [1.0] * 2, "offset": [0.0] * 2}
    for name, wrong in (("mean", [0.0]), ("deviation", [1.0, 0.0]), ("scale", [1.0] * 3)):
        with pytest.raises(ValueError, match=f"{name} is .*a number for each of the bands"):
            PretrainingTask(("x", "y"), **units | {name: wrong}, model_options=SMALL)


def test_schedule():
    task = segmentation(warmup=0.1, schedule="cosine")
    factors = [task._factor(step, 100) for step in range(101)]
    assert 0 < factors[0] < factors[5] < 1 and factors[10] == 1
    assert factors[55] == pytest.approx(0.5, abs=1e-6) and factors[100] == pytest.approx(0)
    assert all(f == 1 for f in (segmentation()._factor(s, 100) for s in range(100)))
    for bad, words in (({"schedule": "linear"}, "schedule"), ({"warmup": 1.0}, "warmup"),
                       ({"class_weights": [1.0]}, "class_weights")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            segmentation(**bad)


def test_the_best_checkpoint_is_that_of_the_least_validation_loss(tmp_path):
    """Not that of the greatest overall accuracy, which one frequent class decides."""
    part = [SimulatedSeries(4, size=32, dates=2, target="land_cover", seed=seed) for seed in (0, 1)]
    data = SeriesData(part[0], val=part[1], batch_size=2)
    task = SegmentationTask(
        part[0].bands, **data.normalisation(), classes=part[0].classes, model="timo_tiny",
        model_options=SMALL, learning_rate=3e-3,
    )  # fmt: skip
    trainer = fit(task, data, tmp_path, max_epochs=3, accelerator="cpu")
    assert [c.monitor for c in trainer.checkpoint_callbacks] == [None, "val/loss"]
    with open(tmp_path / "logs" / "metrics.csv") as file:
        losses = [float(row["val/loss"]) for row in csv.DictReader(file) if row["val/loss"]]
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert len(losses) == 3 and best["epoch"] == losses.index(min(losses))
    assert json.loads((tmp_path / "task.json").read_text())["units"] == "reflectance"


def test_pretrained_weights_are_of_the_same_bands(tmp_path):
    def task(*bands, **options):
        return SegmentationTask(
            bands, [0.0] * len(bands), [1.0] * len(bands), [1.0] * len(bands), [0.0] * len(bands),
            ("a", "b"), model="timo_tiny", model_options=SMALL, **options,
        )  # fmt: skip

    save_model(task("B04", "B03", "band3"), tmp_path)
    weights = str(tmp_path / "model.safetensors")
    for bands in (("B04", "B03", "NIR"), ("band1", "B03", "band7")):  # as far as names are known
        assert task(*bands, pretrained=weights).pretrained_report.mapped
    (tmp_path / "checkpoints").mkdir()
    below = shutil.copy(weights, tmp_path / "checkpoints")
    for bands in (("B03", "B04", "B02"), ("B04", "B08", "B02"), ("B04", "B03")):
        for path in (weights, below):
            with pytest.raises(DataError, match=r"reads the bands \('B04'.*, the data has \('B0"):
                task(*bands, pretrained=path)
            for part in ("stage1.embed.conv", "encoder.stage1", "encoder"):
                fresh = task(*bands, pretrained=path, fresh=[part, "classifier"])
                reasons = fresh.pretrained_report.missing_expected
                assert reasons["encoder.stage1.embed.conv.weight"] == "named in fresh"
            with pytest.raises(DataError, match="let task.fresh hold stage1.embed.conv"):
                task(*bands, pretrained=path, fresh=["classifier"])
    with pytest.raises(ValueError, match="fresh is .* without pretrained"):
        task("B04", "B03", fresh=["classifier"])
    (tmp_path / "task.json").unlink()
    task("B03", "B04", "B02", pretrained=weights)


def test_shuffling_depends_on_seed_and_epoch():
    sampler = SeededShuffle(20, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(20)) and first == list(SeededShuffle(20, 3))
    sampler.set_epoch(1)
    assert list(sampler) != first and list(SeededShuffle(20, 4)) != first


def test_workers_change_nothing():
    batches = []
    for workers in (0, 2):
        series = SimulatedSeries(8, size=32, dates=4)
        data = SeriesData(series, batch_size=4, dates=2, workers=workers, seed=5)
        loader = data.train_dataloader()
        data.set_epoch(2)
        batches.append(list(loader))
    for a, b in zip(*batches):
        assert all(torch.equal(a[k], b[k]) for k in ("image", "dates", "valid", "mask"))
        assert a["name"] == b["name"]


def test_datasets_must_match():
    train = SimulatedSeries(4, bands=("B03", "B04"))
    with pytest.raises(DataError, match="val: has bands"):
        SeriesData(train, SimulatedSeries(4, bands=("B04", "B03")))
    with pytest.raises(DataError, match="val: has scale"):
        SeriesData(train, SimulatedSeries(4, bands=("B03", "B04"), output="DN"))
    with pytest.raises(ValueError, match="batch_size is 0"):
        SeriesData(train, batch_size=0)
    empty = SeriesData(clouds=0.5)
    for needs in (empty.normalisation, empty.train_dataloader, lambda: empty.set_epoch(1)):
        with pytest.raises(ValueError, match="train is None; pass"):
            needs()
    with pytest.raises(ValueError, match="test is None; pass"):
        empty.test_dataloader()


def test_prediction_joins_windows_and_keeps_nodata(tmp_path):
    """A model that tells dark from bright gives the same map whole and in windows."""
    pixels = frames(2, bands=2, height=70, width=90, dtype="uint8")
    pixels[0, :, 10:20, 10:30] = 0  # nodata at one date
    pixels[:, :, 40:50] = 0  # nodata at both
    write_rasters(tmp_path, ["2001", "2002"], pixels, nodata=0)

    class Threshold(torch.nn.Module):
        def forward(self, batch):
            bright = batch["image"][:, :, :1].float() - 100
            return torch.cat([-bright, bright], 2)

    task = Threshold()
    task.per_frame, task.device = True, torch.device("cpu")
    expected = torch.from_numpy((pixels[:, 0] > 100).astype("uint8"))
    expected[torch.from_numpy(pixels[:, 0] == 0)] = 255
    for tile, overlap in ((96, 0), (32, 0), (40, 16)):
        dataset = RasterSeries(tmp_path, tile=tile, stride=tile - overlap)
        strips = list(predict_strips(task, dataset, 0, overlap))
        rows, labels, logits = zip(*strips)
        assert list(rows) == sorted(rows)
        assert torch.equal(torch.cat(labels, 1), expected)
        bright = torch.cat(logits, 2)[:, 1]
        assert torch.equal(bright.isnan(), expected == 255)
        assert torch.equal(bright > 0, expected == 1)


def test_real_segmenter_never_gives_nan_where_nothing_is_valid(tmp_path):
    pixels = frames(2, bands=2, height=32, width=64, dtype="uint8")
    pixels[..., :32] = 0
    write_rasters(tmp_path, ["2001", "2002"], pixels, nodata=0)
    dataset = RasterSeries(tmp_path, tile=32, stride=32)
    for per_frame in (False, True):
        torch.manual_seed(0)
        task = segmentation(per_frame=per_frame).eval()
        ((_, labels, _),) = predict_strips(task, dataset, 0, 0)
        assert labels.shape == (2 if per_frame else 1, 32, 64)
        assert (labels[..., :32] == 255).all() and (labels[..., 32:] < 3).all()


def test_a_series_smaller_than_a_window_is_mapped_as_it_is(tmp_path):
    write_rasters(
        tmp_path, ["2001", "2002"], frames(2, bands=2, height=40, width=70, dtype="uint8")
    )
    torch.manual_seed(0)
    task = segmentation(per_frame=True).eval()
    whole = collate_series([RasterSeries(tmp_path)[0]])
    with torch.no_grad():
        expected = task(whole)[0]
    windows = RasterSeries(tmp_path, tile=128, stride=96)
    ((row, labels, logits),) = predict_strips(task, windows, 0, 32)
    assert row == 0 and torch.equal(labels, expected.argmax(1).to(torch.uint8))
    torch.testing.assert_close(logits, expected)
    with torch.no_grad():
        padded = task(collate_series([windows[0]]))[0, :, :, :40, :70]
    assert not torch.allclose(padded, expected), "padding would not have mattered"


def test_change_codes():
    first, last = torch.tensor([0, 0, 1, 1, 255, 0]), torch.tensor([0, 1, 0, 1, 1, 255])
    assert change_codes(first, last, 2).tolist() == [0, 1, 2, 3, 255, 255]


def test_pretraining_task_reads_raw_integers(tmp_path):
    pixels = frames(3, bands=2, height=64, width=64, dtype="uint16")
    write_rasters(tmp_path, ["2001", "2002", "2003"], pixels)
    dataset = RasterSeries(tmp_path, tile=64)
    data = SeriesData(dataset, batch_size=1)
    options = SMALL | {"decoder_embed_dim": 16, "decoder_num_heads": 2, "decoder_depth": 1}
    task = PretrainingTask(
        dataset.bands, **data.normalisation(), model="timo_tiny", model_options=options
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == torch.uint16
    result = task(data.on_before_batch_transfer(batch, 0))
    assert result.loss.isfinite() and result.pred.shape[1] == 9


def test_water_labels_on_the_fly(tmp_path):
    pixels = frames(1, bands=2, height=32, width=32, dtype="uint8")
    write_tif(tmp_path / "2001.tif", pixels[0])
    dataset = RasterSeries(tmp_path, bands=("Green", "SWIR1"), labels=open_water)
    sample = dataset[0]
    wet = sample["image"][:, 0].int() > sample["image"][:, 1].int()
    assert torch.equal(sample["mask"], wet.long())


@pytest.mark.parametrize("workers", [0, 2])
def test_pretraining_reads_a_store(tmp_path, workers):
    """Batches of the loader reach the task turned, with the draws of their own samples."""
    corpus = write_published_layout(tmp_path / "in", locations=6, size=40)
    build_store(SeriesSource(open_series(corpus)), tmp_path / "store")
    store = open_series(tmp_path / "store", tile=32, dates=3)
    data = SeriesData(store, batch_size=2, workers=workers, seed=3)
    task = PretrainingTask(
        store.bands, **data.normalisation(), model="timo_tiny", model_options=SMALL
    )
    seen = []
    task.training_step = lambda batch, index, real=task.training_step: (
        seen.append({k: batch[k] for k in ("image", "name")}), real(batch, index)
    )[1]  # fmt: skip
    trainer = Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(task, datamodule=data)
    assert len(seen) == 6 and trainer.callback_metrics["train/loss"].isfinite()
    turned = 0
    for epoch in range(2):
        store.set_epoch(epoch)
        part = seen[3 * epoch : 3 * epoch + 3]
        assert sorted(name for batch in part for name in batch["name"]) == list(
            f"{i:06d}" for i in range(6)
        )
        for batch in part:
            for index, image in zip(map(int, batch["name"]), batch["image"]):
                sample = store[index]
                generator = sample_generator(3, epoch, index)
                for transform in (random_flip, random_rotate90):
                    sample = transform(sample, generator)
                assert torch.equal(image, sample["image"])
                turned += not torch.equal(image, store[index]["image"])
    assert turned > 6


def test_dates_of_a_store_are_stated_with_the_store(tmp_path):
    corpus = open_series(write_published_layout(tmp_path / "in", locations=2))
    with pytest.raises(ValueError, match="dates: state --data.train.dates"):
        SeriesData(corpus, dates=3)


def test_batches_hold_series_of_similar_length():
    lengths = torch.randint(20, 61, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    shuffle = SeededShuffle(500, seed=0, lengths=lengths, batch=8)
    plain = SeededShuffle(500, seed=0)

    def padding(order):
        batches = [order[i : i + 8] for i in range(0, 500, 8)]
        return sum(
            max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches
        )

    order = list(shuffle)
    assert sorted(order) == list(range(500)) and order == list(shuffle)
    assert padding(order) < 0.2 * padding(list(plain))
    firsts = [lengths[i] for i in order[::8]]
    assert firsts != sorted(firsts)
    shuffle.set_epoch(1)
    assert list(shuffle) != order and padding(list(shuffle)) < 0.2 * padding(list(plain))


def test_rasters_of_unequal_length_are_batched_by_length(tmp_path):
    years = [str(year) for year in range(2001, 2009)]
    for number, t in enumerate([2, 8, 2, 8, 2, 8, 2, 8]):
        pixels = frames(t, height=32, width=32, seed=number)
        write_rasters(tmp_path / str(number), years[:t], pixels)
    data = SeriesData(RasterSeries(tmp_path), batch_size=4, augment=False)
    assert sorted(len(batch["dates"][0]) for batch in data.train_dataloader()) == [2, 8]
    assert all(b["valid"].all() for b in data.train_dataloader())
    capped = SeriesData(RasterSeries(tmp_path), batch_size=4, dates=2)
    capped.train_dataloader()
    assert capped._sampler.lengths is None


def test_augmented_batches(tmp_path):
    corpus = open_series(write_published_layout(tmp_path / "in", locations=4, size=40))
    data = SeriesData(corpus, batch_size=4, crop=32, band_dropout=0.5, clouds=0.5, workers=1)
    (batch,) = data.train_dataloader()
    assert batch["image"].shape == (4, 10, 3, 32, 32) and batch["image"].dtype == torch.uint8
    assert not batch["valid"].all() and (batch["image"] == 0).flatten(3).all(3).any()
    bare = SimulatedSeries(1, size=32)
    bare.units = "DN"
    with pytest.raises(ValueError, match="clouds: how bright one is"):
        SeriesData(bare, clouds=0.5)


def test_turning_changes_what_units_are_usable_where_they_do_not_fill_the_frame(tmp_path):
    """Data in columns 28 ... 35 of 40 lie in two columns of units, mirrored in one."""
    root = write_published_layout(tmp_path / "in", locations=4, size=40)
    for path in root.glob("*.npy"):
        pixels = np.load(path)
        pixels[..., :28], pixels[..., 36:] = 0, 0
        np.save(path, pixels)
    data = SeriesData(open_series(root), batch_size=1)
    data.trainer = SimpleNamespace(training=True)
    counted = set()
    for epoch in range(8):
        (loader := data.train_dataloader()), data.set_epoch(epoch)
        for batch in loader:
            batch = data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)
            usable = usable_units(batch["image"], batch["valid"])
            assert torch.equal(batch["valid"], (batch["image"] != 0).any(2))
            assert batch["units"] == least_usable(batch["image"], usable)
            counted.add(batch["units"])
    assert counted == {20, 40}
