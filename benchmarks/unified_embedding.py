"""Race one shared table against a module a feature, and hashing by column against hashing a value at a time.

Targets: forward and backward at least 3 times as fast as separate ``nn.Embedding`` modules joined by ``torch.cat``, on
50 features of 8,192 rows; a column of text hashed at least 50 times as fast as in a loop of Python that gives the same
rows.

The texts are names of 8 to 21 bytes, of two kinds: 20,000 distinct ones, each drawn many times, and all distinct, each
once. Whole numbers as text and hexadecimal digits of one length, the forms in which click logs give their values, are
raced beside them. Every kind has both loops: the literal twin, which takes each value by the formulas and ends in the
very rows that we do, which is checked; and a keyed BLAKE2b of each value, whose rows are others and whose work is C,
since Python's own ``hash`` differs from process to process. A column of text is an Arrow array, as Parquet and CSV
readers give it; turning Python's strings into one is an arm of its own.
"""

import hashlib

import numpy as np
import pyarrow as pa
import torch

from _runner import growth, race, save
from polyspan.learn import CategoricalHasher, UnifiedEmbedding
from polyspan.learn._lookup_plan import salt_of
from polyspan.learn._text_hashing import MASK, hash_bytes, mix_int

FEATURES, BATCH, DIM, ROWS = (50, 10), 8_192, 16, 50_000
TEXTS, DISTINCT, SIZE = (100_000, 1_000_000), 20_000, 2**20
ONCE = 1_000_000
NAMES = "user-{i:x}-{m:d}"
SAME, OTHER = "a loop of Python, the same rows", "a loop of BLAKE2b in C, other rows"
FORMS = {"whole numbers": "{m:d}", "8 hexadecimal digits": "{h:08x}"}


def layers(n_features, rows, *, sparse=False):
    """One step of each arm from raw whole numbers: forward, and backward of a given gradient."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(10**9, (BATCH, n_features), generator=generator)
    up = torch.randn(BATCH, n_features * DIM, generator=generator)
    shared = UnifiedEmbedding({f"f{t}": 1 for t in range(n_features)}, rows, DIM, sparse=sparse)
    own = [torch.nn.Embedding(rows // n_features, DIM, sparse=sparse) for _ in range(n_features)]

    def ours():
        shared.weight.grad = None
        shared(keys).backward(up)

    def theirs():
        for module in own:
            module.weight.grad = None
        places = keys % (rows // n_features)
        torch.cat([module(places[:, t]) for t, module in enumerate(own)], dim=1).backward(up)

    return {"polyspan, one table": ours, "a module a feature, joined": theirs}


def texts(n, distinct, form=NAMES):
    """Hash n texts: so many distinct ones drawn at random, or all of them once in random order where n are distinct."""
    rng = np.random.default_rng(0)
    names = np.array([form.format(i=i, m=i * 7919, h=i * 2654435761 % 2**32) for i in range(distinct)], dtype=object)
    values = names[rng.permutation(n) if distinct == n else rng.integers(distinct, size=n)]
    plain = pa.array(values)
    coded = plain.dictionary_encode()
    hasher = CategoricalHasher(SIZE)

    def blake2b():
        salt = b"user"
        return [
            int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8, key=salt).digest(), "little") % SIZE
            for value in values
        ]

    def the_same_rows():
        salt = salt_of("user", 0, 0)
        return [(mix_int(key_of(value) ^ salt) >> 32) * SIZE >> 32 for value in values]

    assert hasher.transform({"user": plain}).ravel().tolist() == the_same_rows()
    return {
        "polyspan, a column of text": lambda: hasher.transform({"user": plain}),
        "polyspan, an encoded column": lambda: hasher.transform({"user": coded}),
        "polyspan, Python objects": lambda: hasher.transform({"user": values}),
        SAME: the_same_rows,
        OTHER: blake2b,
    }


def key_of(text):
    """Return the key of one text in [0, 2⁶⁴): a whole number of 64 bits is its own, other text is hashed."""
    if text.removeprefix("-").isdecimal() and str(int(text)) == text and -(2**63) <= int(text) < 2**63:
        return int(text) & MASK
    return hash_bytes(text.encode())


def main(features=FEATURES, sizes=TEXTS, rows=ROWS, once=ONCE) -> None:
    torch.set_num_threads(1)
    found = [
        race("forward and backward", layers(t, rows), size={"features": t, "batch": BATCH, "rows": rows, "d": DIM})
        for t in features
    ]
    found += [
        race(
            "forward and backward, sparse gradients",
            layers(features[0], 20 * rows, sparse=True),
            size={"features": features[0], "batch": BATCH, "rows": 20 * rows, "d": DIM},
            repeats=3,
        )
    ]
    # The smaller takes milliseconds: more rounds, for a median that holds.
    hashed = [
        race("hash text", texts(n, DISTINCT), size={"n": n, "distinct": DISTINCT}, repeats=max(5, 2_000_000 // n))
        for n in sizes
    ]
    hashed += [
        race(f"hash text, {kind}", texts(sizes[-1], DISTINCT, form), size={"n": sizes[-1], "distinct": DISTINCT})
        for kind, form in FORMS.items()
    ]
    unique = race("hash text, all distinct", texts(once, once), size={"n": once, "distinct": once})
    save(
        "unified_embedding",
        [*found, *hashed, unique],
        growth_in_features=growth(found[: len(features)], "features"),
        growth_in_texts=growth(hashed[: len(sizes)], "n"),
        targets={"forward and backward": 3, "hash text": 50, "hash text, all distinct": 50},
        arms={
            SAME: "the literal twin: each value by the formulas, in Python; targets are against it",
            OTHER: "keyed BLAKE2b of each value by hashlib, which gives other rows",
        },
    )


if __name__ == "__main__":
    main()
