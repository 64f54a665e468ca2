"""Readers of published data sets, in the layouts in which they are published; see docs/data.md."""

from pathlib import Path

from timo.data.readers.common import PublishedSeries
from timo.data.readers.kuro_siwo import KuroSiwo
from timo.data.readers.mtlcc import MTLCC
from timo.data.readers.multiearth import MultiEarth
from timo.data.readers.multisenge import MultiSenGE
from timo.data.readers.pastis import Pastis
from timo.data.readers.sen12_flood import Sen12Flood

# Every reader takes (root, split, ...).
READERS: dict[str, type[PublishedSeries]] = {
    "kuro_siwo": KuroSiwo,
    "mtlcc": MTLCC,
    "multiearth": MultiEarth,
    "multisenge": MultiSenGE,
    "pastis": Pastis,
    "sen12_flood": Sen12Flood,
}


def open_dataset(name: str, root: str | Path, split: str = "train", **options) -> PublishedSeries:
    """The data set called `name` (a key of `READERS`), as it lies in the folder `root`.

    `options` go to its class. Raises ValueError for an unknown name, DataError for what `root`
    lacks.
    """
    if name not in READERS:
        raise ValueError(f"name: must be one of {', '.join(READERS)}, got {name!r}")
    return READERS[name](root, split=split, **options)
