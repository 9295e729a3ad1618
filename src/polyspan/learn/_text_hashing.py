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


def mix(x: np.ndarray) -> np.ndarray:
    """Return the finaliser of splitmix64, a bijection of 64 bits: every bit of ``x`` moves half of the others."""
    return mix_in_place(x.copy(), np.empty_like(x))


def mix_in_place(x: np.ndarray, spare: np.ndarray, *, high_bits_only: bool = False) -> np.ndarray:
    """Return :func:`mix` of ``x`` in ``x`` itself; ``spare``, of the same shape, is overwritten.

    ``high_bits_only`` leaves out the last step, in which the highest 31 bits of ``x`` stay as they are.
    """
    for shift, factor in ((30, FIRST), (27, SECOND)):
        np.right_shift(x, np.uint64(shift), out=spare)
        np.bitwise_xor(x, spare, out=x)
        np.multiply(x, np.uint64(factor), out=x)
    if high_bits_only:
        return x
    np.right_shift(x, np.uint64(31), out=spare)
    return np.bitwise_xor(x, spare, out=x)


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

    Those are the places, ascending, of all texts of at most :data:`WIDE` bytes that begin like a whole number: with a
    digit or a minus sign. Nulls have any hash, and may be among the places.
    """
    import pyarrow as pa

    texts = as_bytes(texts)
    bounds, data = layout(texts)
    n, hashes = len(texts), np.empty(len(texts), np.uint64)
    numeric: list[np.ndarray] = [np.zeros(0, np.int64)]
    long: list[np.ndarray] = []
    lengths, scratch = np.empty(min(BLOCK, n), bounds.dtype), np.empty((2, min(BLOCK, n)), np.uint64)
    for at in range(0, n, BLOCK):
        edges = bounds[at : at + BLOCK + 1]
        size = np.subtract(edges[1:], edges[:-1], out=lengths[: len(edges) - 1])
        some, out = texts.slice(at, BLOCK), hashes[at : at + BLOCK]
        if size.max() <= WIDE:
            heads = _hash_short(some, size, data[edges[0] : edges[-1]], out, scratch)
            numeric.append(at + np.flatnonzero(_like_numbers(heads)))
            continue
        short = np.flatnonzero(size <= WIDE)
        long.append(at + np.flatnonzero(size > WIDE))
        few, made = some.take(pa.array(short)), np.empty(len(short), np.uint64)
        heads = _hash_short(few, size[short], layout(few)[1], made, scratch)
        out[short] = made
        numeric.append(at + short[_like_numbers(heads)])
    if long:
        places = np.concatenate(long)
        # A long text costs more to hash than to look up.
        coded = texts.take(pa.array(places)).dictionary_encode()
        hashes[places] = _hash_long(coded.dictionary)[coded.indices.to_numpy(zero_copy_only=False)]
    return hashes, np.concatenate(numeric)


def _like_numbers(heads: np.ndarray) -> np.ndarray:
    """Return where first bytes (v,) are digits or a minus sign."""
    return (heads - np.uint8(ord("0")) <= 9) | (heads == ord("-"))


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
    """Put the hashes of Arrow bytes, none longer than :data:`WIDE`, in ``out`` (v,); return first bytes, (v,) uint8.

    ``size`` (v,) are their lengths, ``data`` the bytes of all, and ``scratch`` (2, at least v) uint64 is overwritten.
    """
    import pyarrow.compute as pc

    n = len(size)
    if not n:
        return np.zeros(0, np.uint8)
    begun = mix(np.arange(WIDE + 1, dtype=np.uint64) + np.uint64(GOLDEN))
    begun.take(size, out=out, mode="clip")
    least, most = int(size.min()), int(size.max())
    if not most:
        return np.zeros(n, np.uint8)
    n_words = -(-most // 8)
    if least < 8 * n_words:
        filled = pc.call_function("ascii_rpad", [as_text(texts)], pc.PadOptions(8 * n_words, "\0"))
        data = np.frombuffer(filled.buffers()[2], np.uint8, count=8 * n * n_words)
    rows = data.reshape(n, 8 * n_words)
    spare, before = scratch[:, :n]
    for j, words in enumerate(rows.view("<u8").T):
        ended = size <= 8 * j if least <= 8 * j else None
        if ended is not None and 2 * np.count_nonzero(ended) > n:
            going = np.flatnonzero(~ended)
            out[going] = mix((out[going] ^ words[going]) + np.uint64(GOLDEN))
            continue
        if ended is not None:
            np.copyto(before, out)
        np.bitwise_xor(out, words, out=out)
        np.add(out, np.uint64(GOLDEN), out=out)
        mix_in_place(out, spare)
        if ended is not None:
            # All were mixed, and those that had ended are put back: that takes less time than to pick out the others.
            np.putmask(out, ended, before)
    return rows[:, 0]


def _hash_long(texts: Any) -> np.ndarray:
    """Hash an Arrow array of bytes of any length, eight bytes of all that go on at a time."""
    bounds, data = layout(texts)
    starts, lengths = bounds[:-1], np.diff(bounds)
    flat = np.append(data, np.zeros(8, np.uint8))
    # Every byte offset as the start of a word: one gather takes the next eight bytes of all texts that go on.
    words = np.ndarray(shape=(len(flat) - 7,), dtype="<u8", buffer=flat, strides=(1,))
    h = mix(lengths.astype(np.uint64) + np.uint64(GOLDEN))
    for at in range(0, int(lengths.max(initial=0)), 8):
        going = np.flatnonzero(lengths > at)
        left = np.minimum(lengths[going] - at, 8).astype(np.uint64)
        word = words[starts[going] + at] & (np.uint64(MASK) >> (np.uint64(64) - np.uint64(8) * left))
        h[going] = mix((h[going] ^ word) + np.uint64(GOLDEN))
    return h
