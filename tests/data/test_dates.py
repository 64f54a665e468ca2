from pathlib import Path

import numpy as np
import pytest

from timo.data.contract import DataError
from timo.data.dates import date_of_name, order_of, parse_date, read_dates, to_days


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2020", "2020-07-01"),
        ("202002", "2020-02-15"),
        ("2020-02", "2020-02-15"),
        ("20200229", "2020-02-29"),
        ("2020-02-29", "2020-02-29"),
        ("2020_02_29", "2020-02-29"),
        ("20200229T235959", "2020-02-29T23:59:59"),
        ("2015-07-11T10:00:08", "2015-07-11T10:00:08"),
        ("2015-07-11 10:00:08.731", "2015-07-11T10:00:08"),
        ("2015-07-11T23:30:00-02:00", "2015-07-12T01:30:00"),
        ("2015-07-11T10:00:08Z", "2015-07-11T10:00:08"),
    ],
)
def test_forms(text, moment):
    assert parse_date(text) == np.datetime64(moment, "s")


@pytest.mark.parametrize("text", ["", "20", "20201301", "20200230", "0012", "late", "2020/01/02"])
def test_unreadable(text):
    with pytest.raises(ValueError):
        parse_date(text)


def test_days_count_from_1970_in_both_directions():
    dates = [parse_date(t) for t in ("1970-01-01", "1969-12-31T23:00:00", "2000-03-01T12:00:00")]
    assert to_days(dates).tolist() == [0, -1, 11017]


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("1985.tif", "1985-07-01"),
        ("198503_NIR.tif", "1985-03-15"),
        ("20200229_10m.tif", "2020-02-29"),
        ("2020_10m.tif", "2020-07-01"),
        ("2019_12.tif", "2019-12-15"),
        ("2019-12_x.tif", "2019-12-15"),
        ("2019_32.tif", "2019-07-01"),  # 32 is no month: the year, followed by anything
        ("2019_32_x.tif", "2019-07-01"),
        ("2020_02_29.tif", "2020-02-29"),
        ("2020-02-29_S2_x.tif", "2020-02-29"),
        ("20200229T101010_L2A.tif", "2020-02-29T10:10:10"),
    ],
)
def test_date_of_name(name, day):
    assert date_of_name(Path(name)) == np.datetime64(day, "s")


@pytest.mark.parametrize(
    "name",
    ["dem.tif", "S2_20200101.tif", "0001.tif", "20201350.tif", "2020_02_30.tif", "2019-13.tif"],
)
def test_name_without_date(name):
    with pytest.raises(DataError, match=f"x/{name}.*YYYYMMDD"):
        date_of_name(Path("x") / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.json", '["2020-01-02", 20210304]'),
        ("d.txt", "2020-01-02\n\n20210304\n"),
        ("d.csv", "date\n2020-01-02\n20210304"),
    ],
)
@pytest.mark.parametrize("mark", ["", "\ufeff"])  # spreadsheets begin files with a mark
def test_files_of_dates(tmp_path, name, text, mark):
    (tmp_path / name).write_text(mark + text, encoding="utf-8")
    assert to_days(read_dates(tmp_path / name)).tolist() == [18263, 18690]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("d.json", '["2020-01-02", "soon"]', r"d\.json: entry 2: 'soon' is none of YYYY"),
        ("d.json", "{", r"d\.json: is not JSON"),
        ("d.json", '{"a": 1}', r"d\.json: must be a JSON list of dates, got dict"),
        ("d.txt", "2020-01-02,7", r"d\.txt: entry 1: '2020-01-02,7' is none of"),
    ],
)
def test_bad_files_of_dates(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_dates(tmp_path / name)


def test_two_acquisitions_of_a_day_are_ordered_and_one_twice_is_not():
    dates = [parse_date(t) for t in ("2020-01-02T10:11:00", "2020-01-02T10:04:00", "2019")]
    assert order_of(dates, "abc") == [2, 1, 0]
    with pytest.raises(DataError, match="a and c have the same date 2020.*keep one"):
        order_of([dates[0], dates[1], dates[0]], "abc")
