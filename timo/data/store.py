"""The pretraining store: NumPy shards of locations under one Arrow index.

```
<store>/store.json            what the store holds, sizes and SHA-256 of all its files; written last
        index.arrow           a row for each location (Arrow IPC, memory-mapped)
        shards/00000.npy ...  (locations, T, C, H, W) uint8 or uint16, plain NumPy files
        report.json           counts of what the build took and rejected
        rejected.csv          every rejected scene and location, with the reason
```

Files appear under temporary names and take their own by `os.replace`, `store.json` after all
others: a folder with `store.json` is a whole store.
"""

import hashlib
import json
import math
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from timo.data.contract import DataError, with_progress
from timo.data.locations import Location, LocationSeries, RecentMaps, location_dtype

FORMAT = "timo-store-1"
MANIFEST, INDEX, REPORT, REJECTED = "store.json", "index.arrow", "report.json", "rejected.csv"
_REMEDY = "fetch the store again, or remove its folder and build it again"


class StoreSeries(LocationSeries):
    """A store of `timo data build-pretraining` as a dataset; see LocationSeries.

    Opening reads the index, not the shards, and compares its SHA-256; `verify` compares those of
    the shards. A process maps at most 512 shards at a time (the pages are the system's cache, not
    its own memory), whatever the size of the corpus.

    Args:
        path: the store's folder.
        select: names of the bands to give out, in that order; None for all.
        tile, dates, seed: as in LocationSeries.

    Raises:
        DataError: naming the file that is missing, cut short or altered.
    """

    def __init__(
        self,
        path: str | Path,
        select: Sequence[str] | None = None,
        tile: int | tuple[int, int] | None = None,
        dates: int | None = None,
        seed: int = 0,
    ):
        self.path = Path(path)
        self.manifest = manifest = read_manifest(self.path)
        super().__init__(
            tuple(manifest["shape"]), location_dtype(manifest["dtype"], self.path / MANIFEST),
            manifest["bands"], select, tile, dates, seed,
            manifest["units"], manifest["scale"], manifest["offset"],
        )  # fmt: skip
        check_sizes(self.path, manifest)
        self._open_index()
        self._maps = RecentMaps()

    def __len__(self) -> int:
        return len(self._shards)

    def __getstate__(self) -> dict:
        kept = dict(self.__dict__)
        for name in ("table", "_names", "_shards", "_slots", "_dates", "valid_share"):
            del kept[name]
        return kept

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open_index()

    def verify(self) -> list[str]:
        """Compare every file with its SHA-256; what differs, a sentence each."""
        wrong = []
        for name, file in with_progress(sorted(self.manifest["files"].items()), "verifying"):
            path = self.path / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                wrong.append(f"{path}: is missing or not of {file['bytes']} bytes; {_REMEDY}")
            elif sha256(path) != file["sha256"]:
                wrong.append(f"{path}: its content has changed (SHA-256 differs); {_REMEDY}")
        return wrong

    def _open_index(self) -> None:
        path = self.path / INDEX
        table = read_index(path)
        t, shards = self.shape[0], self.manifest["shards"]
        try:
            self._names = table["name"]
            self._shards = _numbers(table["shard"])
            self._slots = _numbers(table["slot"])
            self._dates = _numbers(table["dates"]).reshape(-1, t)
            self.valid_share = _numbers(table["valid"]).reshape(-1, t)
            held = np.array(shards, np.int64)
            whole = (
                len(table) == held.sum()
                and (len(table) == 0 or self._shards.max() < len(held))
                and bool((self._slots < held[self._shards]).all())
                and bool((np.diff(self._dates, axis=1) > 0).all())
            )
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{path}: is no index of a store ({error}); {_REMEDY}") from None
        if not whole:
            raise DataError(f"{path}: does not belong to the shards beside it; {_REMEDY}")
        self.table = table

    def location(self, index: int) -> Location:
        (name,), days, complete = self.described([index])
        return Location(name, self.pixels(index), days[0], complete[0])

    def pixels(self, index: int) -> np.ndarray:
        shard = self._maps.get_or_open(int(self._shards[index]), self._open_shard)
        return shard[self._slots[index]]

    def described(self, indices: Sequence[int]) -> tuple[list[str], np.ndarray, np.ndarray]:
        rows = np.asarray(indices)
        names = self._names.take(rows).to_pylist()
        return names, self._dates[rows], self.valid_share[rows] == 1

    def _open_shard(self, number: int) -> np.ndarray:
        path = self.path / shard_name(number)
        shape = (self.manifest["shards"][number], *self.shape)
        header = shard_header(shape, self.dtype)
        try:
            with open(path, "rb") as file:
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
            raise DataError(f"{path}: cannot be read ({error}); {_REMEDY}") from None
        if len(content) != shard_bytes(shape, self.dtype) or content[: len(header)] != header:
            raise DataError(f"{path}: does not hold {self.dtype} {shape}; {_REMEDY}")
        return np.frombuffer(content, self.dtype, offset=len(header)).reshape(shape)


def shard_name(number: int) -> str:
    return f"shards/{number:05d}.npy"


def shard_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Header of the `.npy` file of a shard; its length does not depend on the first dimension."""
    description = np.lib.format.dtype_to_descr(np.dtype(dtype).newbyteorder("<"))
    text = f"{{'descr': '{description}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("latin1")


def shard_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return len(shard_header(shape, dtype)) + math.prod(shape) * np.dtype(dtype).itemsize


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settle(partial: Path, path: Path) -> None:
    """Give a finished file its name, so that after a crash it is there whole or not at all."""
    with open(partial, "rb") as file:
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_manifest(root: Path, manifest: dict) -> None:
    """Write store.json with its own checksum, at last."""
    record = manifest | {"checksum": _checksum(manifest)}
    partial = root / f".{MANIFEST}.partial"
    partial.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    settle(partial, root / MANIFEST)


def read_manifest(root: Path) -> dict:
    """store.json, checked; DataError where it is no whole store."""
    path = root / MANIFEST
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(
            f"{root}: is no finished store (it has no {MANIFEST}); build it with `timo data "
            "build-pretraining`, which goes on where a build was stopped"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); {_REMEDY}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise DataError(f"{path}: is not of the format {FORMAT}; {_REMEDY}")
    if record.pop("checksum", None) != _checksum(record):
        raise DataError(f"{path}: its content has changed (checksum differs); {_REMEDY}")
    shards = {shard_name(i) for i, count in enumerate(record["shards"]) if count}
    if set(record["files"]) != {INDEX, REPORT, REJECTED} | shards:
        raise DataError(f"{path}: lists files that are not those of a store; {_REMEDY}")
    return record


def read_index(path: Path):
    """The index as a pyarrow table over its memory map."""
    pyarrow = import_pyarrow()
    try:
        with pyarrow.memory_map(str(path)) as source:
            return pyarrow.ipc.open_file(source).read_all()
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read as an index ({error}); {_REMEDY}") from None


def write_index(path: Path, rows: Sequence[dict], dates: int) -> None:
    """Write the rows of all locations; not yet durable (see `settle`)."""
    pyarrow = import_pyarrow()

    def each(kind):
        return pyarrow.list_(kind, dates)

    schema = pyarrow.schema([
        ("name", pyarrow.string()),
        ("shard", pyarrow.uint32()),
        ("slot", pyarrow.uint32()),
        ("dates", each(pyarrow.int32())),  # days since 1970-01-01
        ("longitude", pyarrow.float64()),  # degrees of the centre, NaN where not known
        ("latitude", pyarrow.float64()),
        ("valid", each(pyarrow.float32())),  # share of pixels with data
        ("cloud", each(pyarrow.float32())),  # share of pixels lost to clouds
        ("source", each(pyarrow.string())),  # where each date comes from, below the source's root
    ])  # fmt: skip
    columns = [[row[name] for row in rows] for name in schema.names]
    arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, schema)]
    table = pyarrow.Table.from_arrays(arrays, schema=schema)
    with pyarrow.OSFile(str(path), "wb") as sink:
        with pyarrow.ipc.new_file(sink, schema) as writer:
            writer.write_table(table)


def import_pyarrow():
    """pyarrow with its ipc module; ImportError naming the extra that brings it."""
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise ImportError("stores need pyarrow: pip install timo[geo]") from error
    return pyarrow


def check_sizes(root: Path, manifest: dict) -> None:
    """DataError where files of the store are missing or cut short, or the index has changed."""
    wrong = []
    for name, file in manifest["files"].items():
        try:
            good = os.stat(root / name).st_size == file["bytes"]
        except OSError:
            good = False
        if not good:
            wrong.append(name)
    if wrong:
        raise DataError(
            f"{root}: {len(wrong)} of {len(manifest['files'])} files are missing or not of their "
            f"size, {sorted(wrong)[0]} the first; {_REMEDY}"
        )
    if sha256(root / INDEX) != manifest["files"][INDEX]["sha256"]:
        raise DataError(f"{root / INDEX}: its content has changed (SHA-256 differs); {_REMEDY}")


def _checksum(manifest: dict) -> str:
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _numbers(column) -> np.ndarray:
    """A column, or a column of lists end to end, without a copy."""
    (values,) = column.chunks
    values = values.flatten() if hasattr(values, "flatten") else values
    return values.to_numpy(zero_copy_only=True)
