"""Values of any column as 64-bit keys, the same in every process: whole numbers are their own, text is hashed.

The key of a value depends on its canonical form alone:

- a whole number in int64 is its own key, whether it came as an int, a float, a bool or its decimal text ("12");
- other text is hashed over its UTF-8 bytes, and bytes over themselves; other numbers over their shortest decimal text,
  whole ones beyond int64 over all their digits;
- decimals, dates, times and durations have the key of the one text that :mod:`~._value_texts` gives them, whatever the
  scale or unit of their column;
- None, NaN, NaT and nulls share :data:`MISSING`; the empty text is a value of its own;
- :data:`PAD` stands where a list has no further item.
"""

import datetime
from decimal import Decimal
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ._tensors import as_array
from ._text_hashing import BLOCK, as_bytes, as_text, hash_bytes, hash_texts, layout, whole_block
from ._value_texts import arrow_texts, decimal_text, numpy_texts

PAD = -(2**63)
MISSING = -0x61C8864680B583EB
"""Two keys that no value has but by a chance of 2⁻⁶⁴; as whole numbers they are given the key of their text."""
REFUSED = OverflowError, TypeError, ValueError, NotImplementedError
"""What Arrow raises of values that have no one type, or of text that is no Unicode; its own errors are among these."""


class Keys(NamedTuple):
    """Keys of values, (v,) int64 in memory of their own, and which of them each row has, (n,) or (n, length).

    Without codes there is one a row, in order.
    """

    distinct: np.ndarray
    codes: np.ndarray | None
    n_truncated: int = 0

    def dense(self) -> np.ndarray:
        """Return one key a cell."""
        return self.distinct if self.codes is None else self.distinct[self.codes]


def value_keys(column: Any, name: str, max_len: int | None = None) -> Keys:
    """Return the keys of a column: NumPy, Arrow, a tensor, a DataFrame's series or a list of values.

    Parameters
    ----------
    name : str
        What errors call the column.
    max_len : int, optional
        For a column of lists: its first ``max_len`` items count, shorter lists are filled with :data:`PAD`. A null list
        is the list of one missing value.

    Raises
    ------
    TypeError
        A value is neither text nor number nor date.
    ValueError
        A column of lists came where single values were expected, or the reverse; a text is no Unicode, but half of a
        surrogate pair.
    """
    column = as_array(column)
    plain = np.asarray(column) if isinstance(column, np.ndarray) else None
    if plain is not None and plain.dtype.kind in "iufb" and max_len is None:
        return Keys(_number_keys(plain), None)
    if plain is not None and plain.dtype.kind in "mM" and max_len is None:
        return _moment_keys(plain, name)
    array = _arrow(column)
    if array is None:
        values = list(column)
        return _mixed_keys(values, name) if max_len is None else _mixed_list_keys(values, name, max_len)
    return _list_keys(array, name, max_len) if _is_list(array.type) else _flat_keys(array, name, max_len)


def _moment_keys(x: np.ndarray, name: str, *, zoned: bool = False) -> Keys:
    """Return keys of datetime64 or timedelta64 (n,) of any unit; ``zoned`` ones are moments in UTC."""
    import pyarrow as pa

    x = x.astype(x.dtype.newbyteorder("="))
    coded = pa.array(x.view(np.int64)).dictionary_encode()
    distinct = coded.dictionary.to_numpy().view(x.dtype)
    full = ~np.isnat(distinct)
    keys = np.full(len(distinct), MISSING)
    if full.any():
        try:
            keys[full] = _text_keys(numpy_texts(distinct[full], zoned=zoned))
        except TypeError as error:
            raise _refuse(name, error) from None
    return _by_codes(keys, coded.indices)


def _number_keys(x: np.ndarray) -> np.ndarray:
    """Return keys of plain numbers (any shape): whole ones are their own, others are hashed by their shortest text."""
    if x.dtype.kind in "ib":
        keys = x.astype(np.int64)
        odd = (keys == PAD) | (keys == MISSING)
    elif x.dtype.kind == "u":
        keys = x.astype(np.int64)
        odd = (keys < 0) if x.dtype.itemsize == 8 else np.zeros(x.shape, bool)
    else:
        with np.errstate(invalid="ignore"):
            whole = (x == np.trunc(x)) & (np.abs(x) < 2.0**63)
        keys = np.where(whole, x, 0).astype(np.int64)
        keys[np.isnan(x)] = MISSING
        odd = ~whole & ~np.isnan(x)
    if odd.any():
        values, codes = np.unique(x[odd], return_inverse=True)
        texts = [str(int(v) if np.isfinite(v) and v == np.trunc(v) else v) for v in values]
        keys[odd] = np.array([hash_bytes(text.encode()) for text in texts], np.uint64).view(np.int64)[codes]
    return keys


def _arrow(column: Any) -> Any:
    """Return the column as one Arrow array, or None where its values are of several kinds."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.Array):
        return column
    made = _texts(column)
    if made is None:
        if _bends(column):
            return None
        try:
            made = pa.array(column, from_pandas=True)
        except REFUSED:
            return None
    return made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made


def _texts(column: Any) -> Any:
    """Return Python objects that are all text, bytes or missing, as Arrow's text, or None of others.

    What begins with a text mostly is. Arrow then reads it once, where finding out the kinds takes half as long again.
    """
    import pyarrow as pa

    if getattr(column, "dtype", None) not in (None, object):
        return None
    if not isinstance(next((value for value in column if value is not None), None), str):
        return None
    try:
        return pa.array(column, pa.string(), from_pandas=True)
    except REFUSED:
        return None


MOMENTS = {datetime.datetime, datetime.date, datetime.time, datetime.timedelta}


def _bends(column: Any) -> bool:
    """Whether Arrow, to give Python objects one type, would change some of them by the kinds of the others.

    Beside a date it takes a moment for a date and a float for days; beside a NumPy date some numbers end the process.
    """
    if getattr(column, "dtype", None) not in (None, object):
        return False
    values, kinds = column, set(map(type, column))
    if kinds & {list, tuple, np.ndarray}:
        values = [value for row in column if isinstance(row, list | tuple | np.ndarray) for value in row]
        kinds = set(map(type, values))
    kinds -= {type(None)}
    dates = {kind for kind in kinds if issubclass(kind, (*MOMENTS, np.datetime64, np.timedelta64))}
    if not dates:
        return bool(kinds & {np.float32, np.float16}) and len(kinds) > 1
    if len(kinds) > 1 or not dates <= MOMENTS:
        return True
    if kinds & {datetime.datetime, datetime.time}:
        # A moment without a zone is taken for UTC beside one that has a zone, and a time loses its zone.
        zoned = {value.tzinfo is not None for value in values if value is not None}
        return len(zoned) > 1 or (True in zoned and datetime.time in kinds)
    return False


def _is_list(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_list(kind) or t.is_large_list(kind) or t.is_fixed_size_list(kind)


def _refuse(name: str, what: Any) -> TypeError:
    return TypeError(f"a value of column {name!r} argument must be a string or a number, got {what}")


def _flat_keys(array: Any, name: str, max_len: int | None) -> Keys:
    if max_len is not None:
        raise ValueError(f"column {name!r} must hold lists, as max_len={max_len} says, got {array.type}")
    import pyarrow as pa
    import pyarrow.types as t

    kind = array.type
    if t.is_null(kind):
        return Keys(np.full(len(array), MISSING), None)
    if t.is_dictionary(kind):
        inner = _flat_keys(array.dictionary, name, None).dense()
        return _by_codes(inner, array.indices)
    if t.is_boolean(kind):
        array, kind = array.cast(pa.int8()), pa.int8()
    if t.is_integer(kind) or t.is_floating(kind):
        gaps = array.null_count
        missing = array.is_null().to_numpy(zero_copy_only=False) if gaps else None
        numbers = (array.fill_null(0) if gaps else array).to_numpy(zero_copy_only=False)
        keys = _number_keys(numbers)
        if missing is not None:
            keys[missing] = MISSING
        return Keys(keys, None)
    if t.is_temporal(kind) or t.is_decimal(kind):
        if t.is_decimal(kind) and kind.bit_width < 128:
            array = array.cast(pa.decimal128(kind.precision, kind.scale))
        coded = array.dictionary_encode()
        try:
            texts = arrow_texts(coded.dictionary)
        except TypeError as error:
            raise _refuse(name, error) from None
        return _by_codes(_text_keys(texts), coded.indices)
    if not (_is_text(kind) or t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind)):
        raise _refuse(name, kind)
    keys = _text_keys(array)
    if array.null_count:
        keys[array.is_null().to_numpy(zero_copy_only=False)] = MISSING
    return Keys(keys, None)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)


def _text_keys(texts: Any) -> np.ndarray:
    """Return keys of texts: those that are a whole number in decimal have that number's key."""
    texts = as_bytes(texts)
    bounds, data = layout(texts)
    whole = [whole_block(bounds[at : at + BLOCK + 1], data) for at in range(0, len(texts), BLOCK)]
    keys, at = [np.zeros(0, np.int64)], 0
    for numbers, blocks in groupby(whole):
        n = BLOCK * sum(1 for _ in blocks)
        keys.append(_number_text_keys(texts.slice(at, n)) if numbers else _hashed_keys(texts.slice(at, n)))
        at += n
    return keys[-1] if len(keys) <= 2 else np.concatenate(keys)


def _number_text_keys(texts: Any) -> np.ndarray:
    """Return keys of Arrow bytes that are all whole numbers of at most 18 digits: those numbers."""
    import pyarrow as pa

    return as_text(texts).cast(pa.int64()).to_numpy().copy()


def _hashed_keys(texts: Any) -> np.ndarray:
    """Return keys of Arrow bytes of which some may be whole numbers."""
    import pyarrow as pa

    hashes, at = hash_texts(texts)
    keys = hashes.view(np.int64)
    if not len(at):
        return keys
    some = texts if len(at) == len(texts) else texts.take(pa.array(at))
    sure, perhaps = _whole_numbers(some)
    if sure.any():
        whole = some if sure.all() else some.filter(pa.array(sure))
        keys[at[sure]] = as_text(whole).cast(pa.int64()).to_numpy()
    for i in np.flatnonzero(perhaps):
        value = int(some[int(i)].as_py())
        if -(2**63) < value < 2**63 and value != MISSING:
            keys[at[i]] = value
    return keys


def _whole_numbers(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return which of Arrow bytes (v,), each beginning with a digit or a minus sign, are a whole number in decimal.

    That is "0", or digits of which the first is not 0, with a minus sign or without: of at most 18 digits, which are in
    int64 for sure, and of 19, which may be.
    """
    import pyarrow.compute as pc

    bounds, data = layout(texts)
    lengths = np.diff(bounds)
    signed = data[bounds[:-1]] == ord("-")
    digits = as_text(texts)
    if signed.any():
        digits = pc.call_function("ascii_ltrim", [digits], pc.TrimOptions("-"))
    bounds, data = layout(digits)
    n_digits = np.diff(bounds)
    decimal = pc.call_function("ascii_is_decimal", [digits]).to_numpy(zero_copy_only=False)
    # Nothing is left of texts that are minus signs alone, and no byte may stand where the last of them begins.
    first = np.append(data, np.uint8(0))[bounds[:-1]] if signed.any() else data[bounds[:-1]]
    canonical = decimal & (n_digits + signed == lengths) & ((first != ord("0")) | (lengths == 1))
    return canonical & (n_digits <= 18), canonical & (n_digits == 19)


def _by_codes(distinct: np.ndarray, indices: Any) -> Keys:
    """Join the keys of distinct values with the row's codes; a null code becomes the missing value."""
    codes = indices.fill_null(len(distinct)) if indices.null_count else indices
    if indices.null_count:
        distinct = np.append(distinct, MISSING)
    return Keys(distinct, codes.to_numpy(zero_copy_only=False).astype(np.int64, copy=False))


def _list_keys(array: Any, name: str, max_len: int | None) -> Keys:
    if max_len is None:
        raise ValueError(f"column {name!r} must hold one value a row, got lists; max_len allows lists")
    import pyarrow.compute as pc

    lengths = (
        pc.call_function("list_value_length", [array]).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    gaps = array.is_null().to_numpy(zero_copy_only=False)
    return _placed(value_keys(array.flatten(), name), lengths, gaps, max_len)


def _mixed_list_keys(rows: list[Any], name: str, max_len: int) -> Keys:
    """Return keys of lists whose values are of several Python kinds."""
    strange = [type(row).__name__ for row in rows if not (row is None or isinstance(row, list | tuple | np.ndarray))]
    if strange:
        raise ValueError(f"column {name!r} must hold lists, as max_len={max_len} says, got {strange[0]}")
    flat = _mixed_keys([value for row in rows if row is not None for value in row], name)
    lengths = np.array([0 if row is None else len(row) for row in rows], np.int64)
    return _placed(flat, lengths, np.array([row is None for row in rows], bool), max_len)


def _placed(flat: Keys, lengths: np.ndarray, gaps: np.ndarray, max_len: int) -> Keys:
    """Put the keys of all items into rows of ``max_len``, by the lengths (n,) of the lists; ``gaps`` (n,) are null."""
    n = len(lengths)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if n else np.zeros(0, np.int64)
    at = starts[:, None] + np.arange(max_len)
    inside = np.arange(max_len) < lengths[:, None]
    pad = len(flat.distinct)
    here = np.arange(pad) if flat.codes is None else flat.codes
    codes = np.full((n, max_len), pad)
    codes[inside] = here[at[inside]]
    codes[gaps, 0] = pad + 1
    return Keys(np.append(flat.distinct, [PAD, MISSING]), codes, int(np.maximum(lengths - max_len, 0).sum()))


def _mixed_keys(values: list[Any], name: str) -> Keys:
    """Return keys of a column whose values are of several Python kinds, one distinct value at a time."""
    known: dict[Any, int] = {}
    codes = np.empty(len(values), np.int64)
    keys: list[int] = []
    for i, value in enumerate(values):
        try:
            label = (type(value), value)
            code = known.get(label)
        except TypeError:
            raise _refuse(name, type(value).__name__) from None
        if code is None:
            code = known[label] = len(keys)
            keys.append(one_key(value, name))
        codes[i] = code
    return Keys(np.array(keys, np.int64).reshape(-1), codes)


def one_key(value: Any, name: str = "value") -> int:
    """Return the key of one Python value, by the rules of this module."""
    if value is None:
        return MISSING
    if isinstance(value, bool | int | float | np.number | np.bool_) and np.asarray(value).dtype.kind in "iufbO":
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return one_key(str(int(value)))
        return int(_number_keys(np.atleast_1d(np.asarray(value)))[0])
    if isinstance(value, str | bytes):
        import pyarrow as pa

        try:
            return int(_text_keys(pa.array([value]))[0])
        except UnicodeEncodeError:
            raise ValueError(
                f"a value of column {name!r} must be text that UTF-8 can hold, got {value!r:.80}"
            ) from None
    if isinstance(value, Decimal):
        return MISSING if value.is_nan() else one_key(decimal_text(value))
    moment, zoned = _moment(value)
    if moment is not None:
        return int(_moment_keys(np.atleast_1d(moment), name, zoned=zoned).dense()[0])
    if isinstance(value, datetime.timedelta):
        # Some are longer than 2⁶³ microseconds, which NumPy and Arrow count.
        return one_key(decimal_text(Decimal(f"{value // datetime.timedelta(microseconds=1)}E-6")) + " s")
    array = _arrow([value])
    if array is None or _is_list(array.type):
        raise _refuse(name, type(value).__name__)
    return int(_flat_keys(array, name, None).dense()[0])


def _moment(value: Any) -> tuple[Any, bool]:
    """Return a date, moment or duration as datetime64 or timedelta64, and whether it has a zone; others as None."""
    if isinstance(value, np.datetime64 | np.timedelta64):
        return value, False
    zoned = getattr(value, "tzinfo", None) is not None
    if hasattr(value, "to_datetime64"):  # pandas, which keeps nanoseconds, and gives UTC
        return value.to_datetime64(), zoned
    if hasattr(value, "to_timedelta64"):
        return value.to_timedelta64(), False
    if isinstance(value, datetime.datetime):
        moment = np.datetime64(value.replace(tzinfo=None))
        return (moment - np.timedelta64(value.utcoffset()), True) if zoned else (moment, False)
    return (np.datetime64(value) if isinstance(value, datetime.date) else None), False
