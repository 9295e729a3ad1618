"""Decimals, dates, times and durations as keys: one value has one key, whatever column it stands in."""

import datetime
from decimal import Decimal
from itertools import product

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.learn._value_keys import MISSING, PAD, one_key, value_keys
from polyspan.learn._value_texts import arrow_texts, decimal_text, numpy_texts

DATED = [2683203442082522018, -9016871187538156496, 8179295550086691396, -3707212793478853257, -620712014054257584]
UTC, LATER = datetime.UTC, datetime.timezone(datetime.timedelta(hours=5))
NOON = datetime.datetime(2020, 1, 2, 12)
TEXTS = {
    Decimal("1.50"): "1.5",
    Decimal("-12"): "-12",
    Decimal("0.00"): "0",
    Decimal("0.000150"): "0.00015",
    Decimal("-0.000015"): "-1.5e-05",
    Decimal("1E+20"): "1" + 20 * "0",
    Decimal("1E-120"): "1e-120",
    Decimal("-Infinity"): "-inf",
    datetime.date(1969, 12, 31): "1969-12-31",
    NOON: "2020-01-02 12:00:00",
    NOON.replace(hour=0): "2020-01-02",
    NOON.replace(microsecond=250_000): "2020-01-02 12:00:00.25",
    NOON.replace(hour=0, tzinfo=UTC): "2020-01-02 00:00:00Z",
    datetime.datetime(1, 1, 1, tzinfo=LATER): "0000-12-31 19:00:00Z",
    np.datetime64("12345-06-07T08"): "12345-06-07 08:00:00",
    np.datetime64("-50000", "Y"): "-50000-01-01",
    np.datetime64("1969-12-31T23:59:59.999999999999"): "1969-12-31 23:59:59.999999999999",
    datetime.time(3, 4): "03:04:00",
    datetime.time(3, 4, 5, 600_000): "03:04:05.6",
    datetime.timedelta(seconds=90): "90 s",
    -datetime.timedelta(microseconds=500_000): "-0.5 s",
    datetime.timedelta.min: "-86399999913600 s",
    np.timedelta64(3, "h"): "10800 s",
}


@pytest.mark.parametrize(("value", "text"), TEXTS.items(), ids=[repr(value) for value in TEXTS])
def test_decimals_and_dates_have_the_key_of_one_text_alone_and_in_columns(value, text):
    assert one_key(value) == one_key(text)
    assert value_keys([value, value], "c").dense().tolist() == [one_key(text)] * 2


def test_the_keys_of_decimals_and_dates_are_these_numbers_for_ever():
    found = [one_key(v) for v in (Decimal("1.5"), NOON.date(), NOON, NOON.replace(tzinfo=UTC), NOON - NOON.min)]
    assert found == DATED


def test_a_decimal_has_one_key_in_every_scale_and_width():
    for text in ("1.5", "-3", "0.25", "0.00001", "-0"):
        value = Decimal(text)
        kinds = [pa.decimal128(10, 5), pa.decimal128(38, 20), pa.decimal256(60, 40)]
        kinds += [kind(digits, 5) for kind, digits in ((pa.decimal32, 9), (pa.decimal64, 18))]
        columns = [pa.array([None, value], kind).slice(1) for kind in kinds]
        columns += [[value], [value * Decimal("1.000")], [value, Decimal("0.123456789")], [value, Decimal("1E+90")]]
        assert {int(value_keys(column, "c").dense()[0]) for column in columns} == {one_key(float(text))}
    assert one_key(Decimal("1500")) == value_keys(pa.array([Decimal("1500")], pa.decimal128(5, -2)), "c").dense()[0]
    assert value_keys(pa.array([None, Decimal("0.5")], pa.decimal128(3, 1)), "c").dense().tolist()[0] == MISSING


@given(digits=st.integers(-(10**15), 10**15), scale=st.integers(0, 20))
def test_the_text_of_a_decimal_is_that_of_a_float_of_its_digits(digits, scale):
    value = Decimal(digits).scaleb(-scale)
    text = str(int(value)) if value == int(value) else repr(float(value))
    assert decimal_text(value) == text
    assert arrow_texts(pa.array([value], pa.decimal128(38, 20)))[0].as_py() == text


@settings(max_examples=30)
@given(st.datetimes(datetime.datetime(1700, 1, 1), datetime.datetime(2200, 1, 1)))
def test_a_moment_has_one_key_in_every_unit_and_library(moment):
    moment = moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    key = one_key(
        str(moment.date() if moment.time() == datetime.time() else moment).rstrip("0" if moment.microsecond else "")
    )
    for unit in ("ms", "us", "ns"):
        column = np.array([moment, None], f"M8[{unit}]")
        assert value_keys(column, "c").dense().tolist() == [key, MISSING]
        assert value_keys(column.astype(column.dtype.newbyteorder()), "c").dense()[0] == key
        assert value_keys(pa.array(column), "c").dense().tolist() == [key, MISSING]
        assert one_key(column[0]) == key
        zoned = pa.array([moment.replace(tzinfo=UTC)], pa.timestamp(unit, "Asia/Tokyo"))
        assert value_keys(zoned, "c").dense()[0] == one_key(moment.replace(tzinfo=UTC)) != key
        assert one_key(moment.replace(tzinfo=LATER) + LATER.utcoffset(None)) == one_key(moment.replace(tzinfo=UTC))
    assert one_key(moment) == value_keys([moment], "c").dense()[0] == key


def test_dates_and_times_have_one_key_in_every_unit():
    day = datetime.date(1969, 7, 20)
    units = ("D", "h", "m", "s", "ms", "us", "ns", "5s")
    found = {int(value_keys(np.array([day], "M8[D]").astype(f"M8[{unit}]"), "c").dense()[0]) for unit in units}
    for kind in (pa.date32(), pa.date64(), pa.timestamp("s")):
        found |= set(value_keys(pa.array([day], pa.date32()).cast(kind), "c").dense().tolist())
    found |= set(value_keys(pa.array([day]).dictionary_encode(), "c").dense().tolist())
    assert found == {one_key("1969-07-20")} == {one_key(day)}
    assert {one_key(np.datetime64("1969", u)) for u in "YMDhms"} == {one_key("1969-01-01")}
    kinds = (pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns"))
    times = {int(value_keys(pa.array([datetime.time(3, 4, 5)], kind), "c").dense()[0]) for kind in kinds}
    assert times == {one_key("03:04:05")}
    spans = [value_keys(np.array([2, "NaT"], "m8[h]").astype(f"m8[{u}]"), "c").dense().tolist() for u in units[1:-1]]
    spans += [value_keys(pa.array([7200, None], pa.duration("s")), "c").dense().tolist()]
    assert spans == [[one_key("7200 s"), MISSING]] * len(spans)
    assert {one_key(np.timedelta64("NaT")), one_key(np.datetime64("NaT", "ns"))} == {MISSING}


def test_the_key_of_a_value_does_not_depend_on_its_neighbours():
    values = [1, 0.5, True, None, float("nan"), np.float32(0.1), 0.1, "a", b"b", 2**70, Decimal("0.10"), Decimal("NaN")]
    values += [NOON.date(), NOON, NOON.replace(tzinfo=UTC), NOON.replace(tzinfo=LATER), NOON.time(), NOON - NOON.min]
    values += [np.datetime64(NOON), np.datetime64("2020", "Y"), np.timedelta64(5, "h"), Decimal("1E+99")]
    for pair in product(values, values):
        assert value_keys(list(pair), "c").dense().tolist() == [one_key(v) for v in pair], pair
        listed = value_keys([list(pair), None], "c", 2).dense()
        assert listed.tolist() == [[one_key(v) for v in pair], [MISSING, PAD]], pair


class Nanoseconds(datetime.datetime):
    """A moment that knows more than its class says, as pandas has them."""

    def to_datetime64(self):
        return np.datetime64(self.replace(tzinfo=None)).astype("M8[ns]") + np.timedelta64(7, "ns")


def test_moments_of_pandas_keep_their_nanoseconds():
    moment = Nanoseconds(2020, 1, 2, 12)
    expected = one_key("2020-01-02 12:00:00.000000007")
    assert one_key(moment) == value_keys([moment], "c").dense()[0] == expected
    assert value_keys([moment, None, NOON], "c").dense().tolist() == [expected, MISSING, one_key(NOON)]


@pytest.mark.parametrize(
    "column",
    [
        np.array([5], "m8[M]"),
        np.array([1j]),
        [1j],
        [np.complex64(1)],
        [datetime.time(3, tzinfo=UTC)],
        pa.array([(1, 2, 3)], pa.month_day_nano_interval()),
        [{"a": 1}],
        ["a", object()],
    ],
    ids=["months", "complex array", "complex", "NumPy complex", "zoned time", "interval", "mapping", "object"],
)
def test_values_without_a_key_are_refused_by_name(column):
    with pytest.raises(TypeError, match="a value of column 'c'"):
        value_keys(column, "c")


@pytest.mark.parametrize("column", [["ann", "\ud800"], [1, "\ud800"]], ids=["text", "mixed"])
def test_a_text_that_is_no_unicode_is_refused_by_name(column):
    with pytest.raises(ValueError, match=r"a value of column 'c' must be text that UTF-8 can hold, got '\\ud800'"):
        value_keys(column, "c")


def test_dates_beyond_reckoning_and_decimals_of_endless_digits_are_refused():
    with pytest.raises(ValueError, match="within 2"):
        numpy_texts(np.array([2**60], "M8[Y]"))
    with pytest.raises(ValueError, match="exponents of at most 1000"):
        one_key(Decimal("1E+999999"))
