"""`timo data build-pretraining`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from timo.cli.parsing import series_parser
from timo.data import PublishedCorpus, SimulatedSeries, StoreSeries
from timo.data.building import RasterSource, SecoSource, SeriesSource, Source, build_store
from timo.data.published import write_published
from timo.data.store import REJECTED


def build_pretraining(arguments: Sequence[str]) -> int:
    """Build the store that pretraining reads; run it again to go on after a stop."""
    parser = series_parser("timo data build-pretraining", build_pretraining.__doc__)
    kinds = Literal["seco", "rasters", "published", "simulated"]
    parser.add_argument("--source", type=kinds, required=True, help="layout of root; docs/data.md")
    parser.add_argument("--root", type=str, default=None, help="folder (or CSV) to read")
    parser.add_argument("--out", type=str, required=True, help="folder of the store")
    parser.add_argument("--bands", type=list[str] | None, help="names; default B04, B03, B02")
    parser.add_argument("--dtype", type=str | None, help="of the rasters; default of the first")
    parser.add_argument("--size", type=int, default=264, help="pixels of a side of a location")
    parser.add_argument("--dates", type=int, default=10, help="dates of a location")
    parser.add_argument("--max_cloud", type=float, default=0.5, help="largest share of clouds")
    parser.add_argument("--max_nodata", type=float, default=0.2, help="largest share without data")
    parser.add_argument("--bright", type=float | None, help="raw value that looks like cloud")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--published", type=str | None, help="also write NNNNNN.npy + CSV here")
    simulation = {"bands", "size", "dates", "target", "output"}
    parser.add_class_arguments(SimulatedSeries, "simulation", skip=simulation, instantiate=False)
    options = parser.parse_args(arguments)
    report = build_store(
        _source(options), Path(options.out), options.dates, options.max_cloud,
        options.max_nodata, options.bright, options.workers,
    )  # fmt: skip
    for what, counts in report.items():
        listed = ", ".join(f"{n} {why}" for why, n in sorted(counts.items()))
        print(f"{what}: {listed}")
    print(f"the store is {options.out}; {Path(options.out) / REJECTED} says what was rejected")
    if options.published:
        write_published(StoreSeries(options.out), Path(options.published))
        print(f"the published layout is {options.published}")
    return 0


def _source(options) -> Source:
    if options.size < 1:
        raise ValueError(f"size is {options.size}; it must be at least 1")
    if options.source == "simulated":
        return SeriesSource(SimulatedSeries(
            bands=options.bands or ("B04", "B03", "B02"), size=options.size,
            dates=2 * options.dates, target=None, output="DN", **options.simulation.as_dict(),
        ))  # fmt: skip
    if options.root is None:
        raise ValueError(f"root is missing; --source {options.source} reads a folder")
    root = Path(options.root)
    if options.source == "published":
        bands = {"bands": options.bands} if options.bands else {}
        return SeriesSource(PublishedCorpus(root, **bands))
    kind = SecoSource if options.source == "seco" else RasterSource
    return kind(root, options.size, options.bands, options.dtype)
