"""Samples per second from the store, `.npy` files and GeoTIFF, beside a plain copy of the bytes.

Usage: python -m benchmarks.loader [--work FOLDER] [--out benchmarks/results] [--locations 512]
Makes a corpus of random pixels in `work` (4 GB at 512 locations), or uses the one that is there,
and writes loader.json, loader.md and loader.png. Batches are (64, 3, 3, 224, 224) uint8: 3 of 10
dates, windows at random places.

`copy` is the floor: the same windows copied by NumPy from the store's memory-mapped shards, by as
many processes (one where the loader has none), each into two batches in turn: one is in use while
the next is filled, and memory that comes round more often stays in the caches. It and the loader
take turns, and a share is the median over the turns of one rate over the other. Starting and
ending the processes counts for neither. Cold: the system has forgotten the files' pages, and every
location is read once.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from timo.data import (
    LocationLoader,
    PublishedCorpus,
    RasterSeries,
    StoreSeries,
    TemporalSubset,
    TransformedSeries,
    collate_series,
)
from timo.data.building import RasterSource, build_store
from timo.data.locations import Location, LocationSeries
from timo.data.published import write_published

from .harness import environment

SHAPE, TILE, DATES, BATCH, SLOW_BATCH = (10, 3, 264, 264), 224, 3, 64, 8
SAMPLE_BYTES = DATES * 3 * TILE * TILE
WORKERS = (0, 1, 2)
BANDS = ("B04", "B03", "B02")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/loader"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--locations", type=int, default=512)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment(torch.device("cpu"))  # the code is loaded: what changes later has no part
    make_corpus(options.work, options.locations)
    rows = []
    for cold in (False, True):
        for workers in WORKERS:
            for layout in LAYOUTS:
                rows.append(compare(layout, options.work, workers, cold, options.turns))
                print(" | ".join(cells(rows[-1])), flush=True)
    building = [build_rates(options.work, workers) for workers in (0, 2)]
    record = {
        "environment": facts, "locations": options.locations,
        "batch": [BATCH, DATES, 3, TILE, TILE], "rows": rows, "building": building,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "loader.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "loader.md").write_text(markdown(record))
    plot(rows, options.out / "loader.png")
    print(markdown(record))


def make_corpus(work: Path, count: int) -> None:
    """The same random pixels as GeoTIFF, store, published layout and Zarr."""
    import rasterio
    import zarr

    if (work / "complete").exists() and (work / "complete").read_text() == str(count):
        return
    shutil.rmtree(work, ignore_errors=True)
    rng = np.random.default_rng(0)
    dates = [f"{2016 + k // 2}{1 + 6 * (k % 2):02d}15" for k in range(SHAPE[0])]
    for index in range(count):
        folder = work / "rasters" / f"{index:06d}"
        folder.mkdir(parents=True)
        for date, pixels in zip(dates, rng.integers(1, 150, SHAPE, np.uint8)):
            with rasterio.open(
                folder / f"{date}.tif", "w", driver="GTiff", count=3, height=264, width=264,
                dtype="uint8", crs="EPSG:32632",
                transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6),
            ) as file:  # fmt: skip
                file.write(pixels)
    build_store(RasterSource(work / "rasters", 264, BANDS), work / "store")
    store = StoreSeries(work / "store")
    write_published(store, work / "npy")
    array = zarr.create_array(
        work / "zarr", shape=(count, *SHAPE), dtype="uint8", chunks=(1, 1, *SHAPE[1:]),
        shards=(16, *SHAPE), compressors=None,
    )  # fmt: skip
    for start in range(0, count, 16):
        block = [store.location(i).pixels for i in range(start, min(start + 16, count))]
        array[start : start + len(block)] = np.stack(block)
    (work / "complete").write_text(str(count))


class ZarrLocations(LocationSeries):
    """The corpus as a Zarr v3 array: what the store was chosen against."""

    def __init__(self, path: Path, count: int):
        super().__init__(SHAPE, np.dtype("uint8"), BANDS, None, TILE, DATES, 0, "DN", 1.0, 0.0)
        self.path, self.count = path, count
        self._array: Any = None

    def __len__(self) -> int:
        return self.count

    def location(self, index: int) -> Location:
        import zarr

        if self._array is None:
            self._array = zarr.open_array(self.path, mode="r")
        pixels: Any = _Part(self._array, index)
        return Location(str(index), pixels, np.arange(10), np.ones(10, bool))


class _Part:
    def __init__(self, array, index: int):
        self.array, self.index = array, index

    def __getitem__(self, key):
        return self.array[(self.index, *key)]


@cache
def raster_series(root: Path) -> TransformedSeries:
    series = RasterSeries(root, bands=BANDS, region=(20, 20, 20 + TILE, 20 + TILE), tile=TILE)
    return TransformedSeries(series, [TemporalSubset(DATES)])


def store_loader(work: Path, order: list, workers: int) -> DataLoader:
    return LocationLoader(StoreSeries(work / "store", None, TILE, DATES), BATCH, order, workers)


def npy_loader(work: Path, order: list, workers: int) -> DataLoader:
    series = PublishedCorpus(work / "npy", tile=TILE, dates=DATES)
    return LocationLoader(series, BATCH, order, workers)


def zarr_loader(work: Path, order: list, workers: int) -> DataLoader:
    series = ZarrLocations(work / "zarr", len(StoreSeries(work / "store")))
    return LocationLoader(series, BATCH, order, workers)


def raster_loader(work: Path, order: list, workers: int) -> DataLoader:
    return DataLoader(
        raster_series(work / "rasters"), SLOW_BATCH, sampler=order, num_workers=workers,
        collate_fn=collate_series,
    )  # fmt: skip


# Layout -> (loader, folder, most samples of a turn, batch size); slow layouts get fewer.
LAYOUTS: dict[str, tuple[Callable, str, int, int]] = {
    "store": (store_loader, "store/shards", 64 * BATCH, BATCH),
    ".npy": (npy_loader, "npy", 16 * BATCH, BATCH),
    "Zarr v3": (zarr_loader, "zarr", 4 * BATCH, BATCH),
    "GeoTIFF": (raster_loader, "rasters", BATCH, SLOW_BATCH),
}


def compare(layout: str, work: Path, workers: int, cold: bool, turns: int) -> dict:
    """Rates of a loader and of the plain copy, in turns."""
    loader, folder, samples, batch = LAYOUTS[layout]
    count = len(StoreSeries(work / "store"))
    rng = np.random.default_rng(1)
    loaded: list[float] = []
    copied: list[float] = []
    for _ in range(turns if not cold else 2):
        order = np.concatenate(
            [1 + rng.permutation(count - 1) for _ in range(1 + samples // count)]
        )
        order = order[: min(count - 1, samples) if cold else samples].tolist()
        for rates, measure, files in (
            (copied, lambda o=order: copy_rate(work / "store", o, workers), "store/shards"),
            (loaded, lambda o=order: load_rate(loader, work, o, workers, batch), folder),
        ):
            if cold:
                forget(work / files)
            rates.append(measure())
    return {
        "layout": layout, "workers": workers, "cold": cold,
        "samples_per_second": statistics.median(loaded),
        "megabytes_per_second": statistics.median(loaded) * SAMPLE_BYTES / 1e6,
        "copy_megabytes_per_second": statistics.median(copied) * SAMPLE_BYTES / 1e6,
        "share_of_copy": statistics.median(a / b for a, b in zip(loaded, copied)),
    }  # fmt: skip


def load_rate(make: Callable, work: Path, order: list[int], workers: int, batch: int) -> float:
    """Samples per second between start and end of the workers, which the copy leaves out too.

    Batches of location 0 come first, as many as workers prepare ahead, so that the clock starts
    when the first batch of `order` is asked for. It stops when the last is here.
    """
    ahead = 2 * workers
    loader = iter(make(work, [0] * batch * (ahead + 2) + order, workers))
    next(loader), next(loader)
    time.sleep(0.2 if workers else 0)
    started = time.perf_counter()
    for _ in range(ahead + -(-len(order) // batch)):
        next(loader)
    elapsed = time.perf_counter() - started
    assert next(loader, None) is None
    return len(order) / elapsed


def copy_rate(store: Path, order: list[int], workers: int) -> float:
    """Samples per second that NumPy copies from the shards, by `workers` processes or this one."""
    if workers == 0:
        return len(order) / copy(store, order, None)
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(workers), context.SimpleQueue()
    runs = [
        context.Process(target=lambda w=w: results.put(copy(store, order[w::workers], start)))
        for w in range(workers)
    ]
    for run in runs:
        run.start()
    elapsed = max(results.get() for _ in runs)
    for run in runs:
        run.join()
    return len(order) / elapsed


def copy(store: Path, order: list[int], start) -> float:
    shards = [np.load(path, mmap_mode="r") for path in sorted((store / "shards").iterdir())]
    per_shard = len(shards[0])
    rng = np.random.default_rng(2)
    corners = rng.integers(0, 264 - TILE + 1, (len(order), 2)).tolist()
    frames = [sorted(rng.permutation(10)[:DATES].tolist()) for _ in order]
    places = np.ones((2 * BATCH, DATES, 3, TILE, TILE), np.uint8)
    if start:
        start.wait()
    started = time.perf_counter()
    for k, (index, (row, col), dates) in enumerate(zip(order, corners, frames)):
        pixels = shards[index // per_shard][index % per_shard]
        for t, frame in enumerate(dates):
            places[k % len(places), t] = pixels[frame, :, row : row + TILE, col : col + TILE]
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Drop the pages of all files below `folder` from the system's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fsync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def build_rates(work: Path, workers: int) -> dict:
    """Megabytes of pixels per second read by rasterio alone, and built into a store, in turns."""
    rates: dict[str, list[float]] = {"read": [], "build": []}
    source = RasterSource(work / "rasters", 264, BANDS)
    names = source.names()
    size = len(names) * np.prod(SHAPE) / 1e6
    read_only(work, names)  # into the system's cache, for every turn alike
    for _ in range(5):
        started = time.perf_counter()
        if workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["timo.data.building"])
            with context.Pool(workers) as pool:
                parts = [(work, names[i : i + 16]) for i in range(0, len(names), 16)]
                pool.starmap(read_only, parts, chunksize=1)
        else:
            read_only(work, names)
        rates["read"].append(size / (time.perf_counter() - started))
        shutil.rmtree(work / "built", ignore_errors=True)
        started = time.perf_counter()
        build_store(source, work / "built", workers=workers)
        rates["build"].append(size / (time.perf_counter() - started))
    shutil.rmtree(work / "built")
    return {
        "workers": workers,
        "read_megabytes_per_second": statistics.median(rates["read"]),
        "build_megabytes_per_second": statistics.median(rates["build"]),
        "share": statistics.median(b / r for b, r in zip(rates["build"], rates["read"])),
    }


def read_only(work: Path, names: list[str]) -> None:
    import rasterio

    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
        for name in names:
            for path in sorted((work / "rasters" / name).iterdir()):
                with rasterio.open(path) as file:
                    file.read()


def cells(row: dict) -> list[str]:
    return [
        "cold" if row["cold"] else "warm", row["layout"], str(row["workers"]),
        f"{row['samples_per_second']:.0f}", f"{row['megabytes_per_second']:.0f}",
        f"{row['copy_megabytes_per_second']:.0f}", f"{row['share_of_copy']:.0%}",
    ]  # fmt: skip


def markdown(record: dict) -> str:
    facts = record["environment"]
    head = ["pages", "layout", "workers", "samples/s", "MB/s", "copy MB/s", "share of copy"]
    lines = [
        "# Loading pretraining batches", "",
        f"`python -m benchmarks.loader`: {record['locations']} locations, batches "
        f"{tuple(record['batch'])} uint8; {facts['cores']} cores, torch {facts['torch']}, "
        f"commit {str(facts['commit'])[:10]}.", "",
        "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
        *("| " + " | ".join(cells(row)) + " |" for row in record["rows"]), "",
        "Building from GeoTIFF (one file with three bands for each date), beside reading alone:",
        "", "| workers | read MB/s | build MB/s | share |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in record["building"]:
        lines.append(
            f"| {row['workers']} | {row['read_megabytes_per_second']:.0f} | "
            f"{row['build_megabytes_per_second']:.0f} | {row['share']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, cold in zip(drawn.subplots(1, 2), (False, True)):
        some = [row for row in rows if row["cold"] == cold]
        for layout in LAYOUTS:
            of = [row for row in some if row["layout"] == layout]
            workers = [row["workers"] for row in of]
            axis.plot(workers, [r["megabytes_per_second"] for r in of], "o-", label=layout)
        of = [row for row in some if row["layout"] == "store"]
        copied = [row["copy_megabytes_per_second"] for row in of]
        axis.plot(workers, copied, "k--", label="plain copy")
        axis.set(title="cold" if cold else "warm", xlabel="workers", xticks=WORKERS, yscale="log")
        axis.set_ylabel("MB/s")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    drawn.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
