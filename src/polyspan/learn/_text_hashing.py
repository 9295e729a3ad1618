"""The 64-bit hash of texts and bytes, the same in every process, and its mixing of whole numbers."""

from typing import Any

import numpy as np

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15
FIRST, SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BLOCK = 32_768
"""Rows that are hashed at a time, so that what they need stays in the processor's cache."""
WIDE = 64
"""Bytes up to which texts are hashed side by side, filled up to one length."""
NO_DIGIT = np.array(0xC0C0C0C0C0C0C0C0, np.uint64)
"""Bits that no digit and no sign has in any of eight bytes, but every letter."""
GOLDENS = np.array(GOLDEN, np.uint64)
STEPS = [(np.array(shift, np.uint64), np.array(factor, np.uint64)) for shift, factor in ((30, FIRST), (27, SECOND))]
LAST = np.array(31, np.uint64)
"""Constants as arrays: NumPy takes as long to make one of a number as it works on a thousand rows."""


def mix(x: np.ndarray) -> np.ndarray:
    """Return the finaliser of splitmix64, a bijection of 64 bits: every bit of ``x`` moves half of the others."""
    return mix_in_place(x.copy(), np.empty_like(x))


def mix_in_place(x: np.ndarray, spare: np.ndarray, *, high_bits_only: bool = False) -> np.ndarray:
    """Return :func:`mix` of ``x`` in ``x`` itself; ``spare``, of the same shape, is overwritten.

    ``high_bits_only`` leaves out the last step, in which the highest 31 bits of ``x`` stay as they are.
    """
    for shift, factor in STEPS:
        np.right_shift(x, shift, out=spare)
        np.bitwise_xor(x, spare, out=x)
        np.multiply(x, factor, out=x)
    if high_bits_only:
        return x
    np.right_shift(x, LAST, out=spare)
    return np.bitwise_xor(x, spare, out=x)


BEGUN = mix(np.arange(WIDE + 1, dtype=np.uint64) + GOLDENS)
"""What hashes of texts begin from, by their number of bytes."""


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


def hash_texts(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return :func:`hash_bytes` of every value of an Arrow array of text or bytes, (v,) uint64, and some places.

    Those are places, ascending, among which are all texts that are a whole number in decimal and of at most
    :data:`WIDE` bytes; each text there begins with a digit or a minus sign. Nulls have any hash, and may be among them.
    """
    import pyarrow as pa

    texts = as_bytes(texts)
    bounds, data = layout(texts)
    n, hashes = len(texts), np.empty(len(texts), np.uint64)
    numeric: list[np.ndarray] = [np.zeros(0, np.int64)]
    long: list[np.ndarray] = []
    lengths, scratch = np.empty(min(BLOCK, n), bounds.dtype), np.empty(min(BLOCK, n), np.uint64)
    for at in range(0, n, BLOCK):
        edges = bounds[at : at + BLOCK + 1]
        size = np.subtract(edges[1:], edges[:-1], out=lengths[: len(edges) - 1])
        some, out = texts.slice(at, BLOCK), hashes[at : at + BLOCK]
        if size.max() <= WIDE:
            numeric.append(at + _hash_short(some, size, data[edges[0] : edges[-1]], out, scratch))
            continue
        short = np.flatnonzero(size <= WIDE)
        long.append(at + np.flatnonzero(size > WIDE))
        few, made = some.take(pa.array(short)), np.empty(len(short), np.uint64)
        places = _hash_short(few, size[short], layout(few)[1], made, scratch)
        out[short] = made
        numeric.append(at + short[places])
    if long:
        places = np.concatenate(long)
        # A long text costs more to hash than to look up.
        coded = texts.take(pa.array(places)).dictionary_encode()
        hashes[places] = _hash_long(coded.dictionary)[coded.indices.to_numpy(zero_copy_only=False)]
    return hashes, np.concatenate(numeric)


def whole_block(bounds: np.ndarray, data: np.ndarray) -> bool:
    """Whether all texts with these bounds (v + 1,) are whole numbers of 1 to 18 digits, with no sign.

    Columns of identifiers are such, and one look at all bytes together costs less than any at each text.
    """
    first, end, zero = int(bounds[0]), int(bounds[-1]), np.uint8(ord("0"))
    if int(bounds[1]) == first or (data[first : bounds[1]] - zero).max() > 9:
        return False
    size = np.diff(bounds)
    if not size.min() or size.max() > 18 or (data[first:end] - zero).max() > 9:
        return False
    return not ((data[bounds[:-1]] == zero) & (size > 1)).any()


def as_bytes(texts: Any) -> Any:
    """Return an Arrow array of text or bytes as one of bytes on the same memory, without its nulls."""
    import pyarrow as pa
    import pyarrow.types as t

    kind = texts.type
    if not (t.is_string(kind) or t.is_binary(kind) or t.is_large_string(kind) or t.is_large_binary(kind)):
        texts = texts.cast(pa.large_binary())
    wide = t.is_large_string(texts.type) or t.is_large_binary(texts.type)
    parts = [None, *texts.buffers()[1:]]
    return pa.Array.from_buffers(pa.large_binary() if wide else pa.binary(), len(texts), parts, offset=texts.offset)


def as_text(data: Any) -> Any:
    """Return an Arrow array of bytes as one of text on the same memory, whatever the bytes are.

    For functions that Arrow has for text only, though they look at bytes alone.
    """
    import pyarrow as pa

    kind = pa.large_string() if data.type == pa.large_binary() else pa.string()
    return pa.Array.from_buffers(kind, len(data), data.buffers(), offset=data.offset)


def layout(texts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds (v + 1,) of values of an Arrow array of text or bytes, and the bytes they count in, uint8."""
    import pyarrow.types as t

    wide = t.is_large_binary(texts.type) or t.is_large_string(texts.type)
    kind = np.dtype(np.int64 if wide else np.int32)
    _, offsets, data = texts.buffers()
    if not len(texts):
        return np.zeros(1, kind), np.zeros(0, np.uint8)
    bounds = np.frombuffer(offsets, kind, count=len(texts) + 1, offset=kind.itemsize * texts.offset)
    end = int(bounds[-1])
    return bounds, np.frombuffer(data, np.uint8, count=end) if end else np.zeros(0, np.uint8)


def _hash_short(texts: Any, size: np.ndarray, data: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> np.ndarray:
    """Put the hashes of Arrow bytes, none longer than :data:`WIDE`, in ``out`` (v,); return places of may-be numbers.

    ``size`` (v,) are their lengths, ``data`` the bytes of all, and ``scratch`` (at least v,) uint64 is overwritten.
    """
    n = len(size)
    if not n:
        return np.zeros(0, np.int64)
    BEGUN.take(size, out=out, mode="clip")
    least, most = int(size.min()), int(size.max())
    spare, places = scratch[:n], np.zeros(0, np.int64)
    if not most:
        return places
    for j, words in enumerate(_words(texts, least, most, data)):
        if not j:
            places = _maybe_numbers(words, size, spare)
        ended = np.flatnonzero(size <= 8 * j) if least <= 8 * j else np.zeros(0, np.int64)
        if 2 * len(ended) > n:
            going = np.flatnonzero(size > 8 * j)
            out[going] = mix((out[going] ^ words[going]) + GOLDENS)
            continue
        # All are mixed, and those that had ended are put back: that takes less time than to pick out the others.
        kept = out[ended]
        np.bitwise_xor(out, words, out=out)
        np.add(out, GOLDENS, out=out)
        mix_in_place(out, spare)
        out[ended] = kept
    return places


def _words(texts: Any, least: int, most: int, data: np.ndarray) -> np.ndarray:
    """Return the bytes of all texts, eight at a time, as numbers (words, v) uint64, filled up with zeros."""
    import pyarrow.compute as pc

    n, n_words = len(texts), -(-most // 8)
    if least < 8 * n_words:
        filled = pc.call_function("ascii_rpad", [as_text(texts)], pc.PadOptions(8 * n_words, "\0"))
        data = np.frombuffer(filled.buffers()[2], np.uint8, count=8 * n * n_words)
    return data.reshape(n, 8 * n_words).view("<u8").T


def _maybe_numbers(words: np.ndarray, size: np.ndarray, spare: np.ndarray) -> np.ndarray:
    """Return places of texts that may be whole numbers by their lengths ``size`` and first eight bytes, all (v,).

    No byte of those is a letter or beyond ASCII, and the first is a minus sign or a digit, 0 only where it is alone.
    """
    np.bitwise_and(words, NO_DIGIT, out=spare)
    if np.count_nonzero(spare) == len(words):
        return np.zeros(0, np.int64)
    heads = words.astype(np.uint8)
    like = (heads - np.uint8(ord("1")) <= 8) | (heads == ord("-")) | ((heads == ord("0")) & (size == 1))
    return np.flatnonzero(like & (spare == 0))


def _hash_long(texts: Any) -> np.ndarray:
    """Hash an Arrow array of bytes of any length, eight bytes of all that go on at a time."""
    bounds, data = layout(texts)
    starts, lengths = bounds[:-1], np.diff(bounds)
    flat = np.append(data, np.zeros(8, np.uint8))
    # Every byte offset as the start of a word: one gather takes the next eight bytes of all texts that go on.
    words = np.ndarray(shape=(len(flat) - 7,), dtype="<u8", buffer=flat, strides=(1,))
    h = mix(lengths.astype(np.uint64) + GOLDENS)
    for at in range(0, int(lengths.max(initial=0)), 8):
        going = np.flatnonzero(lengths > at)
        left = np.minimum(lengths[going] - at, 8).astype(np.uint64)
        word = words[starts[going] + at] & (np.uint64(MASK) >> (np.uint64(64) - np.uint64(8) * left))
        h[going] = mix((h[going] ^ word) + GOLDENS)
    return h
