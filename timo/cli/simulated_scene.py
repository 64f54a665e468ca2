"""A simulated series as rasters, for the demonstration where the real one is absent."""

from pathlib import Path
from typing import Any

import numpy as np

from timo.data import GeoTiffWriter, SimulatedSeries
from timo.data.windows import import_rasterio

BANDS = ("B11", "B08", "B04", "B03")  # SWIR1, NIR, Red, Green
SHAPE = (384, 704)


def write_scene(folder: Path) -> Path:
    """Write eight dates of one landscape with a river as `<date>.tif`; returns the folder."""
    rasterio = import_rasterio()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.tif"):
        old.unlink()
    series = SimulatedSeries(
        length=1, seed=4, dates=8, bands=BANDS, size=SHAPE, cloud_fraction=0.1, missing=0.0,
        flood=1.0, target=None,
    )  # fmt: skip
    sample = series[0]
    image = np.clip(sample["image"].numpy() * 500, 1, 255)  # 0 is nodata
    image *= sample["valid"].numpy()[:, None]
    transform = rasterio.Affine(10, 0, 500_000, 0, -10, 9_080_000)
    for date, frame in zip(sample["dates"].numpy().astype("datetime64[D]"), image):
        path = folder / f"{str(date).replace('-', '')}.tif"
        georeference: dict[str, Any] = {"crs": "EPSG:32718", "transform": transform, "nodata": 0}
        with GeoTiffWriter(path, (len(BANDS), *SHAPE), "uint8", **georeference) as file:
            file.write(frame.round().astype(np.uint8), 0)
    return folder
