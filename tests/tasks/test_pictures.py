"""Pictures of maps and of confusion, and the colours that they share with GeoTIFFs."""

import numpy as np
import pytest
import rasterio

from tests.data.writers import write_tif
from timo.data import RasterSeries
from timo.tasks import SegmentationTask, prediction
from timo.tasks.pictures import change_colours, class_colours, confusion_picture, map_picture


@pytest.mark.parametrize("count", [1, 2, 10, 11, 20, 21, 200])
def test_classes_have_colours_of_their_own(count):
    colours = class_colours(count)
    assert len({*colours}) == len(colours) == count
    assert all(0 <= x <= 255 and isinstance(x, int) for colour in colours for x in colour)


def test_change_has_the_colour_of_what_came():
    one, two, three = class_colours(3)
    changes = change_colours(3)
    assert len(changes) == 9
    assert [changes[first * 3 + 1] for first in (0, 2)] == [two, two]
    assert changes[2 * 3 + 0] == one and changes[0 * 3 + 2] == three
    for i, colour in enumerate((one, two, three)):
        assert all(pale > x or pale == x == 255 for pale, x in zip(changes[i * 3 + i], colour))


def test_a_map_is_drawn_in_the_colours_of_its_classes():
    panels = np.array([[[0, 1], [255, 1]], [[3, 0], [0, 0]]], np.uint8)
    colours = class_colours(4)
    drawn = map_picture(panels, ["one", "two"], ["a", "b", "c", "d"], colours)
    for axes, panel, title in zip(drawn.axes, panels, ("one", "two")):
        shown = np.array(axes.images[0].get_array())
        white = [(255, 255, 255)] * (256 - 4)
        assert (shown == np.array([*colours, *white])[panel]).all() and axes.get_title() == title
    assert [text.get_text() for text in drawn.legends[0].get_texts()] == ["a", "b", "d"]
    assert not map_picture(panels * 0 + 255, ["one", "two"], ["a"], colours).legends


def test_names_are_no_formulas_and_all_are_listed():
    names = ["$a_$", "a$b$c", "x" * 200, *(f"class {i}" for i in range(3, 60))]
    panels = np.arange(60, dtype=np.uint8)[None, None]
    drawn = map_picture(panels, ["one"], names, class_colours(60))
    drawn.canvas.draw()
    (legend,) = drawn.legends
    box = legend.get_window_extent()
    assert 0 <= box.x0 and 0 <= box.y0
    assert box.x1 <= drawn.bbox.width and box.y1 <= drawn.bbox.height
    shown = [text.get_text() for text in legend.get_texts()]
    assert len(shown) == 60 and shown[0] == r"\$a_\$" and len(shown[2]) == 40
    confusion_picture(np.eye(60), names).canvas.draw()


def test_the_picture_of_a_series_is_its_map_made_small(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for year in range(2001, 2006):
        pixels = rng.integers(1, 255, (2, 70, 90), np.uint8)
        pixels[:, :20, :30] = 0
        write_tif(tmp_path / "river" / f"{year}.tif", pixels)
    dataset = RasterSeries(tmp_path / "river", nodata=0, tile=32, stride=24)
    options = {"embed_dims": [8] * 4, "depths": [1] * 4, "num_heads": [1] * 4}
    task = SegmentationTask(
        dataset.bands, [100.0] * 2, [60.0] * 2, [1.0] * 2, [0.0] * 2, ["a", "b", "c"], True,
        "timo_tiny", options,
    ).eval()  # fmt: skip
    drawn = []

    def draw(panels, titles, names, colours):
        drawn.append((panels, titles))
        return map_picture(panels, titles, names, colours)

    monkeypatch.setattr(prediction, "map_picture", draw)
    monkeypatch.setattr(prediction, "PIXELS", 27)  # of 90: every fourth
    monkeypatch.setattr(prediction, "MAPS", 3)
    out, picture = tmp_path / "map.tif", tmp_path / "map.png"
    prediction.predict_series(task, dataset, out, overlap=8, picture=picture)
    ((panels, titles),) = drawn
    assert titles == ["2001-07-01", "2003-07-01", "2005-07-01"]
    with rasterio.open(out) as file:
        labels = file.read()
    assert (panels == labels[::2, ::4, ::4]).all() and len(np.unique(panels)) > 2
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_confusion_is_shown_by_shares_of_labels():
    counts = np.array([[3, 1, 0], [0, 0, 0], [0, 5, 5]])
    drawn = confusion_picture(counts, ["a", "b", "c"])
    shown = np.ma.filled(drawn.axes[0].images[0].get_array(), np.nan)
    np.testing.assert_equal(shown, [[0.75, 0.25, 0], [np.nan] * 3, [0, 0.5, 0.5]])
    written = {(t.get_position(), t.get_text()) for t in drawn.axes[0].texts}
    assert written == {((0, 0), "75%"), ((1, 0), "25%"), ((1, 2), "50%"), ((2, 2), "50%")}
    assert not confusion_picture(np.eye(21), [str(i) for i in range(21)]).axes[0].texts
