"""Labels of series, or of their dates, from a table."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from timo.data.contract import IGNORE_INDEX, DataError
from timo.data.dates import parse_date, to_days

LABELS = "labels.csv"
_OF_SERIES, _OF_DATES = ["name", "label"], ["name", "date", "label"]


def read_labels(path: Path, days: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Labels of series, int64 () of columns name, label, or (T,) of name, date, label.

    Labels are 0 ... 254, or 255 for none; a date that is not listed has 255. Names that are no
    series are passed over, for a data set may be a part of what is listed.

    Args:
        path: the table.
        days: days since 1970-01-01 of every series, by its name.

    Raises:
        DataError: the file cannot be read or has other columns; a line has no label or date, is
            double, or is of a date that its series has not; or a series is not listed.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = [[cell.strip() for cell in row] for row in csv.reader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error})") from None
    columns = rows[0] if rows else []
    if columns not in (_OF_SERIES, _OF_DATES):
        raise DataError(
            f"{path}: its first line is {','.join(columns)!r}; it must be {','.join(_OF_SERIES)}, "
            f"for labels of series, or {','.join(_OF_DATES)}, for labels of dates"
        )
    found: dict[str, dict[int, int]] = {name: {} for name in days}  # label by day, or by 0
    for line, row in enumerate(rows[1:], 2):
        if not row or row[0] not in days:
            continue
        labels = found[row[0]]
        try:
            day, label = _entry(row, columns, days[row[0]])
            if day in labels:
                raise ValueError(f"{' '.join(row[:-1])} was listed before")
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
        labels[day] = label
    if missing := [name for name, labels in found.items() if not labels]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DataError(
            f"{path}: does not list the series {', '.join(missing[:3])}{more}; add them, with "
            f"label {IGNORE_INDEX} where it is unknown, or remove the file"
        )
    if columns == _OF_SERIES:
        return {name: torch.tensor(labels[0]) for name, labels in found.items()}
    return {
        name: torch.tensor([labels.get(int(day), IGNORE_INDEX) for day in days[name]])
        for name, labels in found.items()
    }


def _entry(row: list[str], columns: list[str], days: Sequence[int]) -> tuple[int, int]:
    """Day (0 without a column of dates) and label of a line; ValueError says what is wrong."""
    if len(row) != len(columns):
        raise ValueError(f"it has {len(row)} entries, the first line {len(columns)}")
    day, label = 0, row[-1]
    if columns == _OF_DATES:
        day = int(to_days([parse_date(row[1])])[0])
        if day not in days:
            raise ValueError(f"series {row[0]!r} has no acquisition of {row[1]}")
    if not (label.isdecimal() and int(label) <= IGNORE_INDEX):
        raise ValueError(
            f"label {label!r} is no number in 0 ... {IGNORE_INDEX}; number the classes, and name "
            "them in that order where they are asked for (task.classes)"
        )
    return day, int(label)
