"""`timo data simulate` and `timo data check`."""

from collections.abc import Sequence
from pathlib import Path

from timo.cli.parsing import series_parser
from timo.data import SeriesDataset, SimulatedSeries, check_dataset, open_series
from timo.data.simulate import write_series


def simulate(arguments: Sequence[str]) -> int:
    """Write simulated series with dates, validity and truth, as NumPy files."""
    parser = series_parser("timo data simulate", simulate.__doc__)
    parser.add_argument("--out", type=str, required=True, help="folder to write; new or empty")
    parser.add_argument("--count", type=int, default=16, help="series to write")
    parser.add_class_arguments(SimulatedSeries, "series", skip={"length"}, instantiate=False)
    options = parser.parse_args(arguments)
    if options.count < 1:
        raise ValueError(f"count is {options.count}; it must be at least 1")
    dataset = SimulatedSeries(length=options.count, **options.series.as_dict())
    write_series(dataset, Path(options.out), options.count)
    print(f"{options.count} series are in {options.out}")
    return 0


def check(arguments: Sequence[str]) -> int:
    """Check a data set and write a page about it; exit code 1 if it is not fit for training.

    Of a store every file is compared with its checksum.
    """
    parser = series_parser("timo data check", check.__doc__)
    parser.add_argument("path", nargs="?", default=None, help="a data set that opens by its path")
    parser.add_argument("--data", type=SeriesDataset | None, help="any other, as RasterSeries")
    parser.add_argument("--out", type=str, default=None, help="HTML page to write")
    parser.add_argument("--max_samples", type=int, default=16, help="samples to read")
    options = parser.parse_args(arguments)
    if (options.path is None) == (options.data is None):
        raise ValueError("path: name one data set, by its path or with --data")
    dataset = open_series(options.path) if options.path else parser.instantiate(options).data
    report = check_dataset(dataset, options.out, max_samples=options.max_samples)
    print(report)
    return 0 if report.ok else 1
