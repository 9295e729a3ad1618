"""Decimals, dates, times and durations as one text each, whatever the scale, unit or zone of their column.

- A decimal has its digits without zeros at the end ("1.5", "-0.001"), below 0.0001 with an exponent ("1.5e-05"): the
  text of a float of these digits. A whole one has the text of that integer.
- A moment without a zone is "2020-01-02 03:04:05.5", its fraction without zeros at the end; at midnight it is its
  date, "2020-01-02". A moment in a zone is the same moment in UTC, with a "Z" at the end, at midnight too.
- A time of day is "03:04:05.5", and a duration its seconds as a decimal, "90 s" or "0.5 s".
"""

from decimal import Decimal
from typing import Any

import numpy as np

PLACES = {"s": 0, "ms": 3, "us": 6, "ns": 9, "ps": 12, "fs": 15, "as": 18}
"""Decimal places of a second that a unit counts."""
DAY = 86_400
WRITTEN = -62_167_219_200, 253_402_300_799
"""Seconds from 1970 of the years 0 to 9999, which Arrow writes."""
LARGEST_EXPONENT = 1_000


def arrow_texts(values: Any) -> Any:
    """Return texts (v,) of an Arrow array of decimals of 128 or 256 bits, dates, times, moments or durations.

    Nulls have any text.

    Raises
    ------
    TypeError
        The array holds something else, such as intervals of months and days.
    """
    import pyarrow as pa
    import pyarrow.types as t

    kind = values.type
    if t.is_decimal(kind):
        whole = pa.decimal128(38, 0) if kind.bit_width == 128 else pa.decimal256(76, 0)
        counts = pa.Array.from_buffers(whole, len(values), values.buffers(), offset=values.offset)
        return decimal_texts(counts.cast(pa.string()), kind.scale)
    counts = values.fill_null(0) if values.null_count else values
    if t.is_date(kind):
        days = counts.cast(pa.date32()).view(pa.int32()).to_numpy().astype(np.int64)
        return _moment_texts(days * DAY, np.zeros_like(days), 0)
    if not (t.is_timestamp(kind) or t.is_time(kind) or t.is_duration(kind)):
        raise TypeError(str(kind))
    counts = counts.view(pa.int32() if t.is_time32(kind) else pa.int64()).to_numpy().astype(np.int64)
    places = PLACES[kind.unit]
    if t.is_duration(kind):
        return _duration_texts(counts, places)
    seconds, fraction = np.divmod(counts, 10**places)
    if t.is_time(kind):
        return _moment_texts(seconds, fraction, places, dated=False)
    return _moment_texts(seconds, fraction, places, zoned=kind.tz is not None)


def numpy_texts(values: np.ndarray, *, zoned: bool = False) -> Any:
    """Return texts of datetime64 or timedelta64 (v,) of any unit, without NaT.

    Raises
    ------
    TypeError
        Durations count years or months, which have no one length.
    ValueError
        Values lie beyond 2⁶³ seconds.
    """
    letter, unit = values.dtype.kind, np.datetime_data(values.dtype)[0]
    if letter == "m" and unit in ("Y", "M", "generic"):
        raise TypeError(f"{values.dtype}")
    unit = unit if unit in PLACES else "s"
    counts = values.astype(f"{letter}8[{unit}]")
    if (counts.astype(values.dtype) != values).any():
        raise ValueError(f"dates and durations must be within 2**63 seconds, got {values.dtype} beyond them")
    places, numbers = PLACES[unit], counts.view(np.int64)
    if letter == "m":
        return _duration_texts(numbers, places)
    return _moment_texts(*np.divmod(numbers, 10**places), places, zoned=zoned)


def decimal_text(value: Decimal) -> str:
    """Return the text of one decimal, infinite ones too.

    Raises
    ------
    ValueError
        It is larger than 10¹⁰⁰⁰, or smaller than its inverse.
    """
    import pyarrow as pa

    if value.is_infinite():
        return str(float(value))
    if value and abs(value.adjusted()) > LARGEST_EXPONENT:
        raise ValueError(f"decimals must have exponents of at most {LARGEST_EXPONENT}, got {value:.3E}")
    sign, digits, exponent = value.as_tuple() if value else (0, (0,), 0)
    text = "".join(map(str, digits))
    short = text.rstrip("0") or "0"
    scale = -int(exponent) - (len(text) - len(short) if value else 0)
    return decimal_texts(pa.array(["-" * sign + short]), scale)[0].as_py()


def decimal_texts(digits: Any, scale: int) -> Any:
    """Return texts of whole numbers, an Arrow array of decimal text, divided by ten to the power ``scale``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    def call(name: str, *values: Any, options: Any = None) -> Any:
        return pc.call_function(name, list(values), options)

    def part(texts: Any, start: int, stop: int | None = None) -> Any:
        return call("utf8_slice_codeunits", texts, options=pc.SliceOptions(start, stop))

    def joined(*parts: Any) -> Any:
        return call("binary_join_element_wise", *parts, pa.scalar(""))

    if not len(digits):
        return digits
    negative = call("starts_with", digits, options=pc.MatchSubstringOptions("-"))
    digits = call("ascii_ltrim", digits, options=pc.TrimOptions("-"))
    if scale <= 0:
        zero = call("equal", digits, pa.scalar("0"))
        made = call("if_else", zero, digits, joined(digits, pa.scalar("0" * -scale)))
    else:
        digits = call("ascii_lpad", digits, options=pc.PadOptions(scale + 1, "0"))
        whole, fraction = part(digits, 0, -scale), part(digits, -scale)
        fraction = call("ascii_rtrim", fraction, options=pc.TrimOptions("0"))
        ends = call("equal", fraction, pa.scalar(""))
        made = call("if_else", ends, whole, joined(whole, pa.scalar("."), fraction))
        small = call("starts_with", made, options=pc.MatchSubstringOptions("0.0000"))
        if call("any", small).as_py():
            first = call("ascii_ltrim", fraction, options=pc.TrimOptions("0"))
            zeros = call("subtract", call("binary_length", fraction), call("binary_length", first))
            exponent = call("cast", call("add", zeros, pa.scalar(1, zeros.type)), options=pc.CastOptions(pa.string()))
            exponent = call("ascii_lpad", exponent, options=pc.PadOptions(2, "0"))
            rest = part(first, 1)
            point = call("if_else", call("equal", rest, pa.scalar("")), pa.scalar(""), pa.scalar("."))
            made = call("if_else", small, joined(part(first, 0, 1), point, rest, pa.scalar("e-"), exponent), made)
    return call("if_else", negative, joined(pa.scalar("-"), made), made)


def _duration_texts(counts: np.ndarray, places: int) -> Any:
    import pyarrow as pa
    import pyarrow.compute as pc

    seconds = decimal_texts(pa.array(counts).cast(pa.string()), places)
    return pc.call_function("binary_join_element_wise", [seconds, pa.scalar("s"), pa.scalar(" ")])


def _moment_texts(
    seconds: np.ndarray, fraction: np.ndarray, places: int, *, zoned: bool = False, dated: bool = True
) -> Any:
    """Return texts of moments: seconds from 1970 (v,) int64, and parts of one (v,) in units of 10 to -``places``."""
    import pyarrow as pa
    import pyarrow.compute as pc

    far = (seconds < WRITTEN[0]) | (seconds > WRITTEN[1])
    made = pa.array(np.where(far, 0, seconds).view("M8[s]")).cast(pa.string())
    if far.any():
        # Arrow's calendar ends with the year 32767.
        far_texts = np.char.replace(np.datetime_as_string(seconds[far].view("M8[s]")), "T", " ")
        made = pc.call_function("replace_with_mask", [made, pa.array(far), pa.array(far_texts.tolist(), pa.string())])
    if not dated:
        made = pc.call_function("utf8_slice_codeunits", [made], pc.SliceOptions(-8))
    if fraction.any():
        digits = pa.array(fraction).cast(pa.string())
        digits = pc.call_function("ascii_lpad", [digits], pc.PadOptions(places, "0"))
        digits = pc.call_function("ascii_rtrim", [digits], pc.TrimOptions("0"))
        longer = pc.call_function("binary_join_element_wise", [made, digits, pa.scalar(".")])
        made = pc.call_function("if_else", [pa.array(fraction != 0), longer, made])
    if zoned:
        return pc.call_function("binary_join_element_wise", [made, pa.scalar("Z"), pa.scalar("")])
    midnight = (seconds % DAY == 0) & (fraction == 0)
    if dated and midnight.any():
        dates = pc.call_function("utf8_slice_codeunits", [made], pc.SliceOptions(0, -9))
        made = pc.call_function("if_else", [pa.array(midnight), dates, made])
    return made
