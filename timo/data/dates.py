"""Acquisition dates: from text, from file names, from files that list them."""

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from timo.data.contract import DataError

FORMS = "YYYY, YYYYMM, YYYY-MM, YYYY_MM, YYYYMMDD, YYYY-MM-DD, YYYY_MM_DD, YYYYMMDDThhmmss"

# Longest form first: 2020_05_01 is a day, not the year 2020 followed by anything; 2020_32 is.
_FORMS = (
    r"(\d{4})(\d{2})(\d{2})T(\d{2})(\d{2})(\d{2})",
    r"(\d{4})([-_])(\d{2})\2(\d{2})",
    r"(\d{4})(\d{2})(\d{2})",
    r"(\d{4})[-_](0[1-9]|1[0-2])",
    r"(\d{4})(\d{2})",
    r"(\d{4})",
)
_YEARS = range(1900, 2200)  # 0012.tif is a number, not a year


def parse_date(text: str) -> np.datetime64:
    """Date or moment (UTC) in `text`, as datetime64[s]; raises ValueError if it is neither.

    A year alone stands for its middle, 1 July; a month alone for its 15th. Besides `FORMS`,
    ISO 8601 timestamps are read; a time zone is converted to UTC.
    """
    text = text.strip()
    for form in _FORMS:
        match = re.fullmatch(form, text)
        if match:
            return _moment([int(part) for part in match.groups() if part.isdigit()])
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is none of {FORMS}, an ISO 8601 timestamp") from None
    if moment.tzinfo:
        moment = moment.astimezone(UTC).replace(tzinfo=None)
    return _moment(
        [moment.year, moment.month, moment.day, moment.hour, moment.minute, moment.second]
    )


def is_date(text: str) -> bool:
    try:
        parse_date(text)
    except ValueError:
        return False
    return True


def leading_date(text: str) -> np.datetime64 | None:
    """Date that `text` is, or begins with before a `_`, in the longest of `FORMS`; None without.

    Raises ValueError where it is no day of a calendar.
    """
    for form in _FORMS:
        match = re.match(form + r"(?=_|$)", text)
        if match:
            return parse_date(match.group())
    return None


def date_of_name(path: Path) -> np.datetime64:
    """Date at the start of a file name, `<date>[_<anything>].<suffix>`; DataError without one."""
    reason = ""
    try:
        date = leading_date(path.stem)
        if date is not None:
            return date
    except ValueError as error:
        reason = f" ({error})"
    raise DataError(
        f"{path}: its name must begin with the acquisition date, as "
        f"<date>[_<anything>]{path.suffix}, with the date as one of {FORMS}{reason}"
    )


def read_dates(path: Path) -> list[np.datetime64]:
    """Dates of a file in the order they stand: a JSON list, or CSV or TXT with one on each line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a file of dates ({error})") from None
    if path.suffix.lower() == ".json":
        try:
            entries = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: is not JSON ({error}); it must be a list of dates") from None
        if not isinstance(entries, list):
            raise DataError(f"{path}: must be a JSON list of dates, got {type(entries).__name__}")
    else:
        entries = [line for line in text.splitlines() if line.strip()]
        if entries and entries[0].strip().lower() in ("date", "dates", "time", "timestamp"):
            entries = entries[1:]
    dates = []
    for number, entry in enumerate(entries, 1):
        try:
            dates.append(parse_date(str(entry)))
        except ValueError as error:
            raise DataError(f"{path}: entry {number}: {error}") from None
    return dates


def order_of(dates: Sequence[np.datetime64], sources: Sequence[object]) -> list[int]:
    """Positions that sort `dates`; DataError naming both `sources` where two are the same moment.

    Two acquisitions of one day (neighbouring orbits) stay apart by their time of day.
    """
    order = sorted(range(len(dates)), key=lambda i: dates[i])
    for first, second in zip(order, order[1:]):
        if dates[first] == dates[second]:
            raise DataError(
                f"{sources[first]} and {sources[second]} have the same date {dates[first]}; keep "
                "one, or state the time of day (YYYYMMDDThhmmss). Bands of one date that lie in "
                "separate files must be stacked into one (gdalbuildvrt -separate, gdal_translate)"
            )
    return order


def to_days(dates: Sequence[np.datetime64]) -> np.ndarray:
    """int64 days since 1970-01-01."""
    return np.array(dates, dtype="datetime64[s]").astype("datetime64[D]").astype(np.int64)


def _moment(parts: list[int]) -> np.datetime64:
    """datetime64[s] of (year[, month[, day[, hour, minute, second]]])."""
    if parts[0] not in _YEARS:
        raise ValueError(f"year {parts[0]} is outside {_YEARS.start} ... {_YEARS.stop - 1}")
    if len(parts) == 1:
        parts = [*parts, 7, 1]
    elif len(parts) == 2:
        parts = [*parts, 15]
    year, month, day, hour, minute, second = [*parts, 0, 0, 0][:6]
    return np.datetime64(datetime(year, month, day, hour, minute, second)).astype("datetime64[s]")
