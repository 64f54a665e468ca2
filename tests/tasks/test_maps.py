"""Maps of embeddings: tokens of whole series from windows, and where they lie."""

import numpy as np
import pytest
import rasterio
import torch

from tests.data.writers import TRANSFORM, frames, write_numpy, write_rasters, write_tif
from timo.data import DataError, NumpySeries, RasterSeries, physical
from timo.tasks import PretrainingTask, embed_map
from timo.tasks.maps import embed_strips
from timo.tasks.pictures import components_picture

SMALL = {
    "embed_dims": [8, 8, 16, 16], "num_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1],
    "decoder_embed_dim": 16, "decoder_num_heads": 2, "decoder_depth": 1,
}  # fmt: skip
STRIDES = (4, 8, 16, 32)


def encoder_task(dataset) -> PretrainingTask:
    torch.manual_seed(0)
    units = [90.0] * 3, [60.0] * 3, [1.0] * 3, [0.0] * 3
    return PretrainingTask(dataset.bands, *units, model="timo_tiny", model_options=SMALL).eval()


def clouded(tmp_path, height=70, width=90):
    """Three dates, one of them clouded in a corner that no other date sees either."""
    pixels = frames(3, height=height, width=width)
    valid = np.ones((3, height, width), bool)
    valid[1, 5:, :] = False
    valid[:, :33, :65] = False
    write_numpy(tmp_path / "a", frames(2), ["2020-01-01", "2020-02-01"])
    write_numpy(tmp_path / "b", pixels, ["2020-01-01", "2020-02-01", "2020-03-01"], valid)
    return NumpySeries(tmp_path)


def stitched(*arguments, **options) -> np.ndarray:
    strips = list(embed_strips(*arguments, **options))
    starts = np.cumsum([0, *(values.shape[1] for _, values in strips)])
    assert [row for row, _ in strips] == starts[:-1].tolist()
    return torch.cat([values for _, values in strips], 1).numpy()


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_one_window_is_the_mean_of_the_encoder_over_valid_dates(tmp_path, stage):
    dataset = clouded(tmp_path)
    task, sample, s = encoder_task(dataset), dataset[1], STRIDES[stage - 1]
    found = stitched(task, dataset, 1, stage, tile=96, overlap=0)
    usable = sample["valid"]
    image = physical(sample["image"], *task.input_units())
    with torch.no_grad():
        x = task.model.encoder(image[None], sample["dates"][None], usable[None])[stage - 1][0]
    h, w = x.shape[2:]
    padded = torch.zeros(3, h * s, w * s, dtype=torch.bool)
    padded[:, :70, :90] = usable
    seen = padded.unflatten(2, (w, s)).unflatten(1, (h, s)).any(4).any(2)  # [T, h, w]
    mean = (x * seen[:, None]).sum(0) / seen.sum(0)
    assert seen.sum(0).unique().tolist() == [0, 2, 3] and mean.isnan().any()
    np.testing.assert_allclose(found, mean.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage, tile, overlap", [
    (1, 32, 8), (2, 64, 24), (3, 32, 16), (4, 64, 32), (4, 32, 0),
])  # fmt: skip
def test_tokens_of_windows_lie_where_they_belong(tmp_path, monkeypatch, stage, tile, overlap):
    dataset = clouded(tmp_path)
    task = encoder_task(dataset)
    s = STRIDES[stage - 1]

    def features(image, dates, valid):  # the largest pixel of each token: no context matters
        usable = torch.ones(image.shape[:2] + image.shape[3:], dtype=torch.bool)
        usable = usable if valid is None else valid.view(*valid.shape, *(1,) * (4 - valid.ndim))
        usable = usable.expand(image.shape[:2] + image.shape[3:])
        values = image.where(usable[:, :, None], -99)
        x = torch.nn.functional.max_pool2d(values.flatten(0, 1), s).unflatten(0, image.shape[:2])
        seen = torch.nn.functional.max_pool2d(usable.float(), s) > 0
        return [x * seen[:, :, None]] * 4, [seen] * 4

    monkeypatch.setattr(task.model.encoder, "features", features)
    found = stitched(task, dataset, 1, stage, tile, overlap)
    sample = dataset.cut(1, 0, 0, 96, 96)
    x, seen = features(
        physical(sample["image"], *task.input_units())[None], None, sample["valid"][None]
    )
    mean = (x[0].sum(1) / seen[0].sum(1)[:, None])[0]
    h, w = -(-70 // s), -(-90 // s)
    np.testing.assert_allclose(found, mean[:, :h, :w], rtol=1e-4, atol=1e-5)


def test_a_file_for_a_series(tmp_path):
    write_rasters(tmp_path / "r", ["2020", "2021"], frames(2, height=50, width=75))
    dataset = RasterSeries(tmp_path / "r", tile=16)
    task = encoder_task(dataset)
    out, picture = tmp_path / "out.tif", tmp_path / "out.png"
    embed_map(task, dataset, out, stage=2, tile=32, overlap=8, batch_size=3, picture=picture)
    with rasterio.open(out) as file:
        assert file.shape == (7, 10) and file.count == 8 and np.isnan(file.nodata)
        assert file.crs.to_epsg() == 32718
        assert file.transform.to_gdal() == (500_000, 80, 0, 9_000_000, 0, -80)
        assert file.descriptions[0] == "channel 1"
        np.testing.assert_array_equal(file.read(), stitched(task, dataset, 0, 2, 32, 8))
    assert picture.read_bytes().startswith(b"\x89PNG") and TRANSFORM.a == 10


@pytest.mark.parametrize("options, words", [
    ({"stage": 0}, "stage is 0; it must be 1, 2, 3 or 4"),
    ({"stage": 5}, "stage is 5"),
    ({"tile": 40}, "tile is 40; it must be a multiple of 32"),
    ({"overlap": 16}, "overlap is 16; it must be a multiple of 32, the pixels of a token of stage"),
    ({"overlap": 96}, "overlap is 96; it must be a multiple of 32"),
    ({"batch_size": 0}, "batch_size is 0"),
])  # fmt: skip
def test_sizes_that_do_not_fit(tmp_path, options, words):
    write_tif(tmp_path / "r" / "2020.tif", frames(1)[0])
    dataset = RasterSeries(tmp_path / "r")
    with pytest.raises(ValueError, match=words):
        embed_map(encoder_task(dataset), dataset, tmp_path / "out.tif", **options)
    other = RasterSeries(tmp_path / "r", bands=["x", "y", "z"])
    with pytest.raises(DataError, match="this model reads"):
        embed_map(encoder_task(dataset), other, tmp_path / "out.tif")
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_components_are_colours():
    rng = np.random.default_rng(0)
    values = np.zeros((5, 20, 30), np.float32)
    for channel, size in ((3, 100), (0, 10), (4, 1)):
        values[channel] = size * rng.standard_normal((20, 30))
    values[:, 2, 3] = np.nan
    shown = np.array(components_picture(values, "x").axes[0].images[0].get_array())
    assert (shown[2, 3] == 1).all() and shown.min() == 0 and shown.max() == 1
    known = np.isfinite(values[0])
    for colour, channel in enumerate((3, 0, 4)):
        related = np.corrcoef(shown[known][:, colour], values[channel][known])[0, 1]
        assert abs(related) > 0.95
    for few in (values[:1], values[:2], values[:, 2:3, 3:4], values[:, :1, :1]):
        assert np.isfinite(components_picture(few, "x").axes[0].images[0].get_array()).all()
