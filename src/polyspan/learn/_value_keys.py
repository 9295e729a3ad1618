"""Values of any column as 64-bit keys, the same in every process: whole numbers are their own, text is hashed.

The key of a value depends on its canonical form alone:

- a whole number in int64 is its own key, whether it came as an int, a float, a bool or its decimal text ("12");
- other text is hashed over its UTF-8 bytes, and bytes over themselves; other numbers over their shortest decimal text;
  dates, times and decimals over Arrow's text for them;
- None, NaN, NaT and nulls share :data:`MISSING`; the empty text is a value of its own;
- :data:`PAD` stands where a list has no further item.
"""

from typing import Any, NamedTuple

import numpy as np

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
PAD = -(2**63)
MISSING = -0x61C8864680B583EB
"""Two keys that no value has but by a chance of 2⁻⁶⁴; as whole numbers they are given the key of their text."""
WHOLE_TEXT, LONGEST_TEXT = r"^(0|-?[1-9][0-9]{0,17})$", r"^-?[1-9][0-9]{18}$"
"""Decimal text of a whole number: one that is in int64 for sure, and one that may be."""


class Keys(NamedTuple):
    """Keys of the distinct values, (v,) int64, and which of them each row has, (n,) or (n, length); None is all."""

    distinct: np.ndarray
    codes: np.ndarray | None
    n_truncated: int = 0

    def dense(self) -> np.ndarray:
        """Return one key a cell."""
        return self.distinct if self.codes is None else self.distinct[self.codes]


def mix(x: np.ndarray) -> np.ndarray:
    """Return the finaliser of splitmix64, a bijection of 64 bits: every bit of ``x`` moves half of the others."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(SECOND)
    return x ^ (x >> np.uint64(31))


def mix_int(x: int) -> int:
    """Return what :func:`mix` gives of one number in [0, 2⁶⁴)."""
    x = ((x ^ (x >> 30)) * FIRST) & MASK
    x = ((x ^ (x >> 27)) * SECOND) & MASK
    return x ^ (x >> 31)


def hash_bytes(data: bytes) -> int:
    """Return the 64-bit hash of one byte string, in [0, 2⁶⁴).

    It starts from the mixed length, and takes in eight bytes at a time, little-endian, the last filled up with zeros.
    """
    h = mix_int((len(data) + GOLDEN) & MASK)
    for at in range(0, len(data), 8):
        h = mix_int(((h ^ int.from_bytes(data[at : at + 8], "little")) + GOLDEN) & MASK)
    return h


def hash_texts(texts: Any) -> np.ndarray:
    """Return :func:`hash_bytes` of every value of an Arrow array of text or bytes without nulls, (v,) uint64."""
    import pyarrow as pa

    texts = texts.cast(pa.large_binary())
    n = len(texts)
    _, offsets, data = texts.buffers()
    bounds = np.frombuffer(offsets, np.int64, count=n + 1, offset=8 * texts.offset)
    starts, lengths = bounds[:-1], np.diff(bounds)
    flat = np.zeros(int(bounds[-1]) + 8, np.uint8)
    if data is not None:
        flat[: bounds[-1]] = np.frombuffer(data, np.uint8, count=int(bounds[-1]))
    # Every byte offset as the start of a word: one gather takes the next eight bytes of all texts that go on.
    words = np.ndarray(shape=(len(flat) - 7,), dtype="<u8", buffer=flat, strides=(1,))
    h = mix(lengths.astype(np.uint64) + np.uint64(GOLDEN))
    for at in range(0, int(lengths.max(initial=0)), 8):
        going = np.flatnonzero(lengths > at)
        left = np.minimum(lengths[going] - at, 8).astype(np.uint64)
        word = words[starts[going] + at] & (np.uint64(MASK) >> (np.uint64(64) - np.uint64(8) * left))
        h[going] = mix((h[going] ^ word) + np.uint64(GOLDEN))
    return h


def value_keys(column: Any, name: str, max_len: int | None = None) -> Keys:
    """Return the keys of a column: NumPy, Arrow, a DataFrame's series or a list of values.

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
        A column of lists came where single values were expected, or the reverse.
    """
    plain = np.asarray(column) if isinstance(column, np.ndarray) else None
    if plain is not None and plain.dtype.kind in "iufb" and max_len is None:
        return Keys(_number_keys(plain), None)
    array = _arrow(column)
    if array is None:
        return _mixed_keys(list(column), name)
    return _list_keys(array, name, max_len) if _is_list(array.type) else _flat_keys(array, name, max_len)


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
        keys[odd] = np.array([hash_bytes(str(v).encode()) for v in values], np.uint64).view(np.int64)[codes]
    return keys


def _arrow(column: Any) -> Any:
    """Return the column as one Arrow array, or None where its values are of several kinds."""
    import pyarrow as pa

    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
        return pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    if isinstance(column, pa.Array):
        return column
    try:
        made = pa.array(column, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        return None
    return made.combine_chunks() if isinstance(made, pa.ChunkedArray) else made


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
        array = array.cast(pa.string())
    elif not (_is_text(kind) or t.is_binary(kind) or t.is_large_binary(kind) or t.is_fixed_size_binary(kind)):
        raise _refuse(name, kind)
    coded = array.dictionary_encode()
    return _by_codes(_text_keys(coded.dictionary), coded.indices)


def _is_text(kind: Any) -> bool:
    import pyarrow.types as t

    return t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)


def _text_keys(texts: Any) -> np.ndarray:
    """Return keys of distinct texts: those that are a whole number in decimal have that number's key."""
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = hash_texts(texts).view(np.int64)
    if not _is_text(texts.type):
        texts = texts.cast(pa.large_binary())
    found = pc.call_function("match_substring_regex", [texts], pc.MatchSubstringOptions(WHOLE_TEXT))
    whole = texts.filter(found)
    if len(whole):
        whole = whole if _is_text(whole.type) else whole.cast(pa.large_string())
        keys[found.to_numpy(zero_copy_only=False)] = whole.cast(pa.int64()).to_numpy(zero_copy_only=False)
    longest = pc.call_function("match_substring_regex", [texts], pc.MatchSubstringOptions(LONGEST_TEXT))
    for i in np.flatnonzero(longest.to_numpy(zero_copy_only=False)):
        value = int(texts[int(i)].as_py())
        if -(2**63) < value < 2**63 and value != MISSING:
            keys[i] = value
    return keys


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

    n = len(array)
    lengths = (
        pc.call_function("list_value_length", [array]).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    )
    gaps = array.is_null().to_numpy(zero_copy_only=False)
    flat = value_keys(array.flatten(), name)
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
    if value is None or (isinstance(value, np.datetime64 | np.timedelta64) and np.isnat(value)):
        return MISSING
    if isinstance(value, bool | int | float | np.number | np.bool_):
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return one_key(str(int(value)))
        return int(_number_keys(np.atleast_1d(np.asarray(value)))[0])
    if isinstance(value, str | bytes):
        import pyarrow as pa

        return int(_text_keys(pa.array([value]))[0])
    array = _arrow([value])
    if array is None:
        raise _refuse(name, type(value).__name__)
    return int(_flat_keys(array, name, None).dense()[0])
