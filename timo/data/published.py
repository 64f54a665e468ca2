"""The published pretraining layout: `NNNNNN.npy` for each location and a CSV of their dates."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from timo.data.contract import DataError, atomic_folder, with_progress
from timo.data.dates import leading_date, parse_date, to_days
from timo.data.locations import Location, LocationSeries, RecentMaps, location_dtype
from timo.data.numpy_series import load_array
from timo.data.store import StoreSeries

_TABLE = "dates.csv"


class PublishedCorpus(LocationSeries):
    """Folder of `NNNNNN.npy` (T, C, H, W) with a CSV `loc,t1 ... tT`, read as it is.

    The published corpus holds uint8 (10, 3, 264, 264), red, green, blue; other sizes and numbers
    of bands are read alike. Frames come out in ascending order of date. For training at speed,
    turn it into a store: `timo data build-pretraining --source published`.

    Args:
        path: folder with the arrays and one CSV, or the CSV.
        bands: names of the bands in file order.
        select: names of the bands to give out, in that order; None for all.
        tile, dates, seed: as in LocationSeries.

    Raises:
        DataError: naming the file or the row of the CSV, and how many arrays are missing.
    """

    def __init__(
        self,
        path: str | Path,
        bands: Sequence[str] = ("B04", "B03", "B02"),
        select: Sequence[str] | None = None,
        tile: int | tuple[int, int] | None = None,
        dates: int | None = None,
        seed: int = 0,
    ):
        self.table = find_csv(Path(path))
        self.root = self.table.parent
        rows = _rows(self.table)
        self._locations = [location for location, _ in rows]
        self._written = [dates for _, dates in rows]
        present = {entry.name for entry in os.scandir(self.root)}
        missing = [name for name in self._locations if f"{name}.npy" not in present]
        if missing:
            raise DataError(
                f"{self.root}: {len(missing)} of the {len(rows)} arrays that {self.table.name} "
                f"lists are missing, {missing[0]}.npy the first; fetch them again or remove their "
                "rows"
            )
        first = self.root / f"{self._locations[0]}.npy"
        array = load_array(first)
        if array.ndim != 4 or 0 in array.shape or len(array) != len(self._written[0]):
            raise DataError(
                f"{first}: must be (T, C, H, W) with T = {len(self._written[0])}, the dates in "
                f"{self.table.name}, has shape {array.shape}"
            )
        if len(bands) != array.shape[1]:
            raise DataError(f"bands: must name the {array.shape[1]} bands of {first}, got {bands}")
        super().__init__(
            array.shape, location_dtype(array.dtype, first), bands, select, tile, dates, seed,
            "DN", 1.0, 0.0,
        )  # fmt: skip
        self._maps = RecentMaps()

    def __len__(self) -> int:
        return len(self._locations)

    def location(self, index: int) -> Location:
        array, days = self._maps.get_or_open(index, self._open)
        if (np.diff(days) < 0).any():
            order = np.argsort(days, kind="stable")
            array, days = np.asarray(array)[order], days[order]
        return Location(self._locations[index], array, days, None)

    def _open(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The array on disk and the days of its frames, in the order of the file."""
        path = self.root / f"{self._locations[index]}.npy"
        array = load_array(path)
        if array.shape != self.shape or array.dtype != self.dtype:
            raise DataError(
                f"{path}: holds {array.dtype} {array.shape}, the first location {self.dtype} "
                f"{self.shape}; all must agree"
            )
        return array, self._parsed(index)

    def _parsed(self, index: int) -> np.ndarray:
        try:
            return to_days([_date(text) for text in self._written[index]])
        except ValueError as error:
            raise DataError(
                f"{self.table}: location {self._locations[index]}: {error}; write the dates as "
                "YYYYMMDD"
            ) from None


def _date(text: str) -> np.datetime64:
    """Date that a field is, or begins with before a `_`."""
    date = leading_date(text.strip())
    return parse_date(text.split("_")[0]) if date is None else date


def find_csv(path: Path) -> Path:
    """The CSV that `path` is, or the only one in the folder that it is."""
    if path.suffix.lower() == ".csv":
        return path
    found = sorted(path.glob("*.csv")) if path.is_dir() else []
    if len(found) != 1:
        raise DataError(
            f"{path}: must be a folder with NNNNNN.npy and one CSV loc,t1 ..., it holds "
            f"{len(found)} CSV files; give the path of the CSV"
        )
    return found[0]


def write_published(store: StoreSeries, folder: Path) -> None:
    """Write a store in the published layout; the folder appears when it is whole.

    Locations are numbered in the order of the store. A folder with the locations and dates of the
    store stays as it is. Raises DataError where `folder` holds anything else.
    """
    _, days, _ = store.described(range(len(store)))
    rows = [
        (f"{index:06d}", [str(day).replace("-", "") for day in dates])
        for index, dates in enumerate(days.astype("datetime64[D]"))
    ]
    if _holds(folder, rows):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as partial:
        for index in with_progress(list(range(len(store))), "writing arrays"):
            np.save(partial / f"{index:06d}.npy", store.pixels(index))
        with open(partial / _TABLE, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["loc", *(f"t{i + 1}" for i in range(store.shape[0]))])
            writer.writerows((name, *dates) for name, dates in rows)


def _holds(folder: Path, rows: list[tuple[str, list[str]]]) -> bool:
    """Whether `folder` holds the layout with these rows and an array for each."""
    try:
        written = _rows(folder / _TABLE)
    except DataError:
        return False
    return written == rows and all((folder / f"{name}.npy").is_file() for name, _ in rows)


def _rows(table: Path) -> list[tuple[str, list[str]]]:
    """(location, dates as written) of every row; the location is the stem of a file."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            head, *lines = csv.reader(file)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as a CSV loc,t1 ... ({error})") from None
    columns = [name.strip().lower() for name in head]
    if columns[:1] != ["loc"] or columns[1:] != [f"t{i}" for i in range(1, len(columns))]:
        raise DataError(f"{table}: its first line must be loc,t1,t2 ..., got {','.join(head)}")
    rows, seen = [], set()
    for number, line in enumerate(filter(None, lines), 2):
        name = line[0].strip()
        name = f"{int(name):06d}" if name.isdecimal() else name
        if not name or name != os.path.basename(name) or name in (".", "..") or "\0" in name:
            raise DataError(f"{table}: row {number}: loc {line[0]!r} is no name of a location")
        if len(line) != len(columns) or not all(text.strip() for text in line):
            raise DataError(
                f"{table}: row {number}: must hold a location and {len(columns) - 1} dates, got "
                f"{line}"
            )
        if name in seen:
            raise DataError(f"{table}: row {number}: location {name} occurs twice; keep one")
        seen.add(name)
        rows.append((name, line[1:]))
    if not rows:
        raise DataError(f"{table}: lists no location")
    return rows
