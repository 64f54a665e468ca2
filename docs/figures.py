"""Figures of docs/data.md: a sample of each data set, from simulated pixels.

Run in the root of the repository: `PYTHONPATH=. python docs/figures.py [name ...]`. The files are
laid out as the data set's are, filled with simulated pixels, and read by the reader; those of
MultiEarth are its own sample, which lies in `TIMO_DATA` or ../shared/data.
"""

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image

from tests.data.fixtures import kuro_siwo, mtlcc, multisenge, pastis, sen12_flood
from timo.data import IGNORE_INDEX, SimulatedSeries, StoreSeries
from timo.data.building import SeriesSource, build_store
from timo.data.page import figure
from timo.data.readers import MTLCC, KuroSiwo, MultiEarth, MultiSenGE, Pastis, Sen12Flood

OUT = Path(__file__).parent / "figures"
RGB = ("B04", "B03", "B02")


def draw_kuro_siwo(root: Path) -> list[tuple[str, np.ndarray]]:
    truth = kuro_siwo.write(root, size=224, grids=1, unlabelled=0, activations=(130,))
    (one,) = truth.values()
    scene = simulated(12, ("B04", "B08"), 224, "flood", flood=1.0)
    dry, wet = by_flooded_share(scene)[0], by_flooded_share(scene)[-1]
    noise = np.random.default_rng(0)
    for role, at in (("SL2", dry), ("SL1", dry), ("MS1", wet)):
        water = scene["mask"][at].numpy() > 0
        ground = np.where(water, 0.008, 0.02 + 0.3 * scene["image"][at, 1].numpy())
        for band, share in (("IVV", 1.0), ("IVH", 0.25)):
            speckle = noise.gamma(12, 1 / 12, ground.shape)
            overwrite(root / one["folder"], f"{role}_{band}_*", ground * share * speckle)
    overwrite(root / one["folder"], "MK0_MLU_*", scene["mask"][wet].numpy())
    overwrite(root / one["folder"], "MK0_MNA_*", np.ones((224, 224)))
    sample = KuroSiwo(root, activations=(130,))[0]
    frames = [
        (f"VV, {day}", stretched(frame[:1], 0, 0.15))
        for day, frame in zip(days(sample), sample["image"].numpy())
    ]
    return [*frames, ("mask", colored(sample["mask"]))]


def draw_sen12_flood(root: Path) -> list[tuple[str, np.ndarray]]:
    sen12_flood.write(root, size=256, sentinel1=False)
    scene = simulated(16, sen12_flood.S2_BANDS, 256, "flood", flood=1.0)
    order = by_flooded_share(scene)
    paths = sorted({path.name[:13] for path in (root / "0001").glob("S2_*")})
    for prefix, at in zip(paths, [*order[:2], *order[-2:]]):
        for band, pixels in zip(sen12_flood.S2_BANDS, scene["image"][at].numpy()):
            overwrite(root / "0001", f"{prefix}_{band}.tif", pixels * 1e4)
    dataset = Sen12Flood(root, "all", select=RGB)
    sample = dataset[dataset.names.index("0001")]
    return [
        (f"{day}: {dataset.classes[label]}", stretched(frame * 1e-4, 0, 0.25))
        for day, label, frame in zip(days(sample), sample["label"], sample["image"].numpy())
    ]


def draw_pastis(root: Path) -> list[tuple[str, np.ndarray]]:
    pastis.write(root, size=128, dates=5, folds=(1,))
    dataset = Pastis(root, "all")
    scene = simulated(5, dataset.bands, 128, "crops", years=1)
    position = next(i for i in range(len(dataset)) if len(dataset[i]["dates"]) == 5)
    name = dataset.names[position]
    np.save(root / "DATA_S2" / f"S2_{name}.npy", (scene["image"] * 1e4).short().numpy())
    crops = scene["mask"].numpy().astype(np.uint8)
    np.save(root / "ANNOTATIONS" / f"TARGET_{name}.npy", np.stack([crops] * 3))
    sample = Pastis(root, "all", select=RGB)[position]
    frames = [
        (day, stretched(frame * 1e-4, 0, 0.2))
        for day, frame in zip(days(sample), sample["image"].numpy())
    ]
    return [*frames, ("mask", colored(sample["mask"]))]


def draw_multiearth(root: Path) -> list[tuple[str, np.ndarray]]:
    root = Path(os.environ.get("TIMO_DATA", OUT.parents[2] / "shared" / "data"))
    root = root / "multiearth_amazon"
    series = MultiEarth(root, "all", select=RGB, labels=False)
    one = series[series.names.index("-55.20_-4.39")]
    shown = list(zip(days(one), one["image"].numpy()))[1:4]
    labelled = MultiEarth(root, "all", select=RGB)[0]
    shown += zip(days(labelled), labelled["image"].numpy())
    panels = [(day, stretched(frame, *np.percentile(frame, (1, 99)))) for day, frame in shown]
    return [*panels, ("mask", colored(labelled["mask"]))]


def draw_multisenge(root: Path) -> list[tuple[str, np.ndarray]]:
    multisenge.write(root, tiles=("32ULU",), dates=4)
    scene = simulated(4, multisenge.BANDS, 256, "land_cover", years=1, clearing=0.0)
    for path, frame in zip(sorted((root / "s2").iterdir()), scene["image"].numpy()):
        overwrite_all(path, frame * 1e4)
    classes = np.array([14, 2, 6, 9, 11, 11, 12])  # of water, built-up, cropland, ...
    overwrite(root / "ground_reference", "*", classes[scene["mask"].numpy()])
    sample = MultiSenGE(root, "all", select=RGB)[0]
    frames = [
        (day, stretched(frame * 1e-4, 0, 0.2))
        for day, frame in zip(days(sample), sample["image"].numpy())
    ]
    return [*frames, ("mask", colored(sample["mask"]))]


def draw_mtlcc(root: Path) -> list[tuple[str, np.ndarray]]:
    mtlcc.write(root, size=48, splits={"train_fold0": (7,), "test_fold0": (), "eval": ()})
    bands = [band for held in mtlcc.BANDS.values() for band in held]
    scene = simulated(len(mtlcc.DATES), bands, 48, "crops", years=1)
    for day, frame in zip(mtlcc.DATES, scene["image"].numpy()):
        for resolution, held in mtlcc.BANDS.items():
            factor = resolution // 10
            part = frame[[bands.index(band) for band in held]]
            part = part.reshape(len(held), 48 // factor, factor, -1, factor).mean((2, 4))
            overwrite_all(root / "data" / "7" / f"{day}_{resolution}m.tif", part * 1e4)
    crops = np.array([0, 22, 23, 5, 26, 17, 1, 16, 3])  # of background, winter wheat, ...
    overwrite(root / "data" / "7", "y.tif", crops[scene["mask"].numpy()])
    sample = MTLCC(root, "train", select=RGB)[0]
    frames = [
        (day, stretched(frame * 1e-4, 0, 0.2))
        for day, frame in zip(days(sample), sample["image"].numpy())
    ]
    return [*frames, ("mask", colored(sample["mask"]))]


def draw_corpus(root: Path) -> list[tuple[str, np.ndarray]]:
    scenes = SimulatedSeries(
        1, seed=4, dates=40, bands=RGB, size=264, target=None, output="DN", cloud_fraction=0.3
    )
    build_store(SeriesSource(scenes), root / "store")
    store = StoreSeries(root / "store")
    sample, (row,) = store[0], store.table.to_pylist()
    return [
        (f"{day}: {cloud:.0%} cloud", stretched(frame * 1e-4, 0, 0.2))
        for day, frame, cloud in zip(days(sample), sample["image"].numpy(), row["cloud"])
    ]


FIGURES: dict[str, Callable[[Path], list[tuple[str, np.ndarray]]]] = {
    "corpus": draw_corpus,
    "kuro_siwo": draw_kuro_siwo,
    "mtlcc": draw_mtlcc,
    "multiearth": draw_multiearth,
    "multisenge": draw_multisenge,
    "pastis": draw_pastis,
    "sen12_flood": draw_sen12_flood,
}


def simulated(dates: int, bands: Sequence[str], size: int, target: str, **options) -> dict:
    """A cloudless simulated sample, reflectance."""
    return SimulatedSeries(
        1, dates=dates, bands=bands, size=size, target=target, cloud_fraction=0.0, missing=0.0,
        **options,
    )[0]  # fmt: skip


def by_flooded_share(scene: dict) -> list[int]:
    """Positions of the dates of a sample with target "flood", the least flooded first."""
    return (scene["mask"] == 2).flatten(1).sum(1).sort(stable=True).indices.tolist()


def overwrite(folder: Path, pattern: str, pixels: np.ndarray) -> None:
    """Other pixels in the one raster that the pattern matches."""
    (path,) = folder.glob(pattern)
    with rasterio.open(path, "r+") as file:
        file.write(pixels.astype(file.dtypes[0]), 1)


def overwrite_all(path: Path, pixels: np.ndarray) -> None:
    """Other pixels (C, H, W) in a raster."""
    with rasterio.open(path, "r+") as file:
        file.write(pixels.astype(file.dtypes[0]))


def days(sample: dict) -> list[str]:
    return [str(np.datetime64(int(day), "D")) for day in sample["dates"]]


def stretched(bands: np.ndarray, low: float, high: float) -> np.ndarray:
    """(1 or 3, H, W) as an image (H, W, 3) of 0 ... 1."""
    image = np.clip((bands - low) / (high - low), 0, 1)
    return np.moveaxis(np.broadcast_to(image, (3, *image.shape[1:])), 0, -1)


def colored(mask) -> np.ndarray:
    """Labels as colours (H, W, 3); 255 is light grey."""
    from matplotlib import colormaps

    colors = colormaps["tab20"](mask.numpy() % 20)[..., :3]
    colors[mask.numpy() == IGNORE_INDEX] = 0.85
    return colors


def main(names: Sequence[str]) -> None:
    OUT.mkdir(exist_ok=True)
    for name in names or FIGURES:
        with tempfile.TemporaryDirectory() as root:
            panels = FIGURES[name](Path(root))
        rows = -(-len(panels) // 6)
        columns = -(-len(panels) // rows)
        drawn, axes = figure(rows, columns, 2.2 * columns, 2.5 * rows)
        for axis, (title, image) in zip(axes, panels):
            axis.imshow(image, interpolation="nearest")
            axis.set_title(title, fontsize=9)
            axis.axis("off")
        path = OUT / f"{name}.png"
        drawn.savefig(path, dpi=90)
        with Image.open(path) as image:
            image.convert("RGB").quantize(96).save(path, optimize=True)
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main(sys.argv[1:])
