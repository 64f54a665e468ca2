import os
import resource
import signal

import numpy as np
import pytest
import rasterio
import torch

from tests.data.writers import TRANSFORM
from timo.data import DataError, GeoTiffWriter, blend, grid_windows


@pytest.mark.parametrize("size", [(8, 8), (9, 20), (30, 31), (5, 40)])
@pytest.mark.parametrize("stride", [8, 5, 1])
def test_grid_covers_everything_and_stays_inside(size, stride):
    seen = np.zeros(size, int)
    windows = grid_windows(*size, (8, 8), (stride, stride))
    for row, col in windows:
        assert 0 <= row <= max(0, size[0] - 8) and 0 <= col <= size[1] - 8
        seen[row : row + 8, col : col + 8] += 1
    assert seen.min() >= 1 and windows == sorted(set(windows))


def predictions(whole, tile, overlap, change=lambda values: values):
    """What a model that reproduces `whole` says of each window."""
    h, w = whole.shape[-2:]
    for row, col in grid_windows(h, w, (tile, tile), (tile - overlap, tile - overlap)):
        values = whole.new_full((*whole.shape[:-2], tile, tile), 1e9)  # beyond the raster
        part = whole[..., row : row + tile, col : col + tile]
        values[..., : part.shape[-2], : part.shape[-1]] = part
        yield row, col, change(values)


@pytest.mark.parametrize("size", [(37, 53), (16, 16), (11, 70), (9, 9)])
@pytest.mark.parametrize("overlap", [0, 4, 9])
def test_blending_equal_predictions_gives_them_back(size, overlap):
    whole = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    strips = list(blend(predictions(whole, 16, overlap), *size, overlap))
    rows = [row for row, _ in strips]
    assert rows == np.cumsum([0, *(s.shape[-2] for _, s in strips[:-1])]).tolist()
    torch.testing.assert_close(torch.cat([s for _, s in strips], -2), whole)


def test_blending_weights_fall_towards_the_border():
    # Two windows of 8 that share 3 columns: one says 0, the other 1.
    halves = [(0, 0, torch.zeros(1, 8, 8)), (0, 5, torch.ones(1, 8, 8))]
    ((row, strip),) = blend(halves, 8, 13, 3)
    assert row == 0
    expected = torch.tensor([0.0] * 5 + [0.25, 0.5, 0.75] + [1.0] * 5)
    torch.testing.assert_close(strip, expected.expand(1, 8, 13))


def test_blending_holds_one_row_of_windows():
    # A strip comes out as soon as the next row begins, before later windows are asked for.
    asked = []

    def watched():
        for item in predictions(torch.ones(1, 40, 8), 8, 0):
            asked.append(item[0])
            yield item

    strips = blend(watched(), 40, 8, 0)
    next(strips)
    assert asked == [0, 8]


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ([(0, 0), (0, 8), (8, 0), (8, 8), (0, 8)], "row 0 comes after row 8"),
        ([(0, 0)], "leave pixels uncovered"),
        ([(0, 0), (0, 8)], "leave pixels uncovered"),
        ([(0, 0), (0, 8), (9, 0), (9, 8)], "leave pixels uncovered"),
    ],
)
def test_blending_refuses_holes_and_disorder(windows, message):
    parts = [(row, col, torch.zeros(1, 8, 8)) for row, col in windows]
    with pytest.raises(ValueError, match="predictions: .*" + message):
        list(blend(parts, 17, 16, 0))


@pytest.mark.parametrize("dtype", ["uint8", "float32", "int16"])
def test_writer(tmp_path, dtype):
    path = tmp_path / "out.tif"
    whole = np.random.default_rng(0).integers(0, 100, (2, 300, 270)).astype(dtype)
    names = ["2020-01-01", "2021-01-01"]
    with GeoTiffWriter(
        path, whole.shape, dtype, "EPSG:32718", TRANSFORM, nodata=99, descriptions=names
    ) as file:
        for row, col in grid_windows(300, 270, (128, 128), (128, 128)):
            part = whole[:, row : row + 128, col : col + 128]
            file.write(torch.from_numpy(part) if row else part, row, col)
        assert not path.exists()
    assert list(tmp_path.iterdir()) == [path]
    with rasterio.open(path) as file:
        assert np.array_equal(file.read(), whole) and file.dtypes[0] == dtype
        assert file.crs.to_epsg() == 32718 and file.transform == TRANSFORM
        assert file.nodata == 99 and file.descriptions == tuple(names)
        predictor = "3" if dtype == "float32" else "2"
        assert file.tags(ns="IMAGE_STRUCTURE")["PREDICTOR"] == predictor
        assert file.compression.name == "deflate" and file.block_shapes[0] == (256, 256)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
def test_classes_are_no_picture(tmp_path, bands):
    """Three or four bands of bytes are no red, green, blue and alpha."""
    path = tmp_path / "x.tif"
    with GeoTiffWriter(path, (bands, 4, 5), "uint8", nodata=255) as file:
        file.write(np.full((bands, 4, 5), 7, np.uint8), 0)
    with rasterio.open(path) as file:
        assert [kind.name for kind in file.colorinterp] == ["gray", *["undefined"] * (bands - 1)]
        assert (file.read() == 7).all() and (file.read_masks() == 255).all()


@pytest.mark.parametrize(
    "bands, dtype, count", [(2, "uint8", 2), (1, "uint16", 2), (1, "uint8", 300)]
)
def test_colours_are_of_one_band_of_bytes(tmp_path, bands, dtype, count):
    colours = [(1, 2, 3)] * count
    with pytest.raises(ValueError, match=f"colours: must be .* got {count} of {bands} bands of"):
        GeoTiffWriter(tmp_path / "x.tif", (bands, 4, 5), dtype, colours=colours)


@pytest.mark.filterwarnings("error")
def test_pixels_without_georeference_are_written_without_a_warning(tmp_path):
    with GeoTiffWriter(tmp_path / "out.tif", (1, 20, 20), "uint8") as file:
        file.write(np.ones((20, 20), "uint8"), 0)


def test_writer_leaves_the_old_file_after_an_exception(tmp_path):
    path = tmp_path / "out.tif"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), GeoTiffWriter(path, (1, 20, 20), "uint8") as file:
        file.write(np.ones((20, 20), "uint8"), 0)
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="descriptions: must name 1 bands, got 2"):
        GeoTiffWriter(path, (1, 20, 20), "uint8", descriptions=["a", "b"])
    with (
        pytest.raises(ValueError, match=r"pixels: \(1, 20, 20\) at row 5.*out.tif"),
        GeoTiffWriter(path, (1, 20, 20), "uint8") as file,
    ):
        file.write(np.ones((20, 20), "uint8"), 5)
    with (
        pytest.raises(Exception, match="WKT could not be parsed"),
        GeoTiffWriter(path, (1, 20, 20), "uint8", crs="nowhere"),
    ):
        pass
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with (
        pytest.raises(DataError, match="its folder does not exist"),
        GeoTiffWriter(tmp_path / "none" / "out.tif", (1, 20, 20), "uint8"),
    ):
        pass


def write_within(limit, path, whole, rows):
    """Exit status of a child that may not write files beyond `limit` bytes: 7 for DataError."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            with GeoTiffWriter(path, whole.shape, "uint8", None, TRANSFORM) as file:
                for row in range(0, whole.shape[1], rows):
                    file.write(whole[:, row : row + rows], row)
                hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            status = 0
        except DataError as error:
            status = 7 if f"{path}: could not be written whole" in str(error) else 8
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Strips of 100 rows leave blocks of 256 that GDAL writes when it closes the file.
@pytest.mark.parametrize("rows", [100, 512])
@pytest.mark.parametrize("limit", [50_000, 200_000])
def test_writer_leaves_the_old_file_where_the_disk_is_full(tmp_path, limit, rows):
    path = tmp_path / "out.tif"
    path.write_bytes(b"old")
    whole = np.random.default_rng(0).integers(0, 255, (1, 512, 512)).astype("uint8")
    assert write_within(limit, path, whole, rows) == 7
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    assert write_within(400_000, path, whole, rows) == 0
    with rasterio.open(path) as file:
        assert np.array_equal(file.read(), whole)
