"""Claim: mixing by planes models text as well as attention, at equal size, tokens and tuning."""

import math
from typing import Any, NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.data import data_folder
from polyspan.io import read_text

RATES = (4e-3, 1.2e-2)
HEADS = 4
CHOOSING = 20_000
KEYS = b"01234567"


class Text(NamedTuple):
    """Bytes of a text to train on and of one to test on, (n,) uint8 each, and how to train.

    ``recipe`` (8,): width, layers, reduced width, bytes a piece, pieces an update, updates, 1 for the dearer arms as
    well, 1 where only the last byte of each piece counts.
    """

    train: np.ndarray
    test: np.ndarray
    recipe: np.ndarray


SMALL = np.array([32, 2, 8, 64, 8, 160, 0, 0])
MEDIUM = np.array([64, 3, 16, 128, 8, 500, 1, 0])
LONGER = np.array([64, 3, 16, 128, 8, 1200, 0, 0])
OFFSETS = (1, 2, 4, 8, 12, 16)


def planted(seed: int, *, n_words=120, n_follow=6, length=60_000) -> Text:
    """A language with a lexicon of made-up words, each of which only a few others follow."""
    rng = np.random.default_rng(seed)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8)
    words = [bytes(rng.choice(letters, size=rng.integers(2, 8))) + b" " for _ in range(n_words)]
    follow = rng.integers(n_words, size=(n_words, n_follow))
    text, word = bytearray(), 0
    while len(text) < length:
        word = follow[word, rng.integers(n_follow)]
        text += words[word]
    made = np.frombuffer(bytes(text), np.uint8)
    return Text(made[: length * 5 // 6], made[length * 5 // 6 :], SMALL)


def python_help(seed: int) -> Text:
    """Python's own help texts on the language, as its installation brings them; a tenth of the topics is tested on."""
    from pydoc_data.topics import topics

    order = np.random.default_rng(seed).permutation(len(topics))
    texts = [topics[name].encode() for name in sorted(topics)]
    cut = len(texts) // 10
    test, train = (b"\n".join(texts[i] for i in rows) for rows in (order[:cut], order[cut:]))
    return Text(np.frombuffer(train, np.uint8), np.frombuffer(test, np.uint8), SMALL)


def wikitext(seed: int, *, recipe=MEDIUM) -> Text:  # noqa: ARG001 - the split is fixed; the trial draws weights and pieces
    """WikiText-2's test half and nine tenths of the lines of its validation half; the other tenth is tested on."""
    folder = data_folder("wikitext-2")
    lines = read_text(folder / "valid.txt").splitlines(keepends=True)
    cut = len(lines) * 9 // 10
    train = read_text(folder / "test.txt") + "".join(lines[:cut])
    test = "".join(lines[cut:])[:60_000]
    return Text(np.frombuffer(train.encode(), np.uint8), np.frombuffer(test.encode(), np.uint8), recipe)


def far_recall(data: Text, seed: int) -> Text:
    """Let all that counts depend on what is out of reach: each piece begins with a random byte, thrice, and ends in it.

    Pieces are a little longer than the planes reach, and so many that an update sees as many bytes as before; it takes
    fewer updates.
    """
    rng = np.random.default_rng(seed)
    piece = max(OFFSETS) * int(data.recipe[1]) + 8

    def ask(text: np.ndarray) -> np.ndarray:
        rows = np.array(text[: len(text) // piece * piece]).reshape(-1, piece)
        rows[:, [0, 1, 2, -1]] = rng.choice(np.frombuffer(KEYS, np.uint8), size=(len(rows), 1))
        return rows.ravel()

    recipe = np.array(data.recipe)
    recipe[3], recipe[4], recipe[7] = piece, round(data.recipe[4] * data.recipe[3] / piece), 1
    recipe[5] = -(-data.recipe[5] * 3 // 4)
    return Text(ask(data.train), ask(data.test), recipe)


def network(vocabulary: int, recipe: Any, mixer: str, generator: Any) -> Any:
    """One language model; all are alike but for what mixes the tokens in their blocks."""
    from polyspan.nn import GrassmannLM
    from polyspan.nn._rival_mixers import replace_mixing

    width, layers, r, length, *_ = (int(v) for v in recipe)
    model = GrassmannLM(vocabulary, width, layers, r, OFFSETS, 0.0, max_length=length, check=False, generator=generator)
    if mixer != "grassmann":
        replace_mixing(model.blocks, mixer, num_heads=HEADS, generator=generator)
    return model


def trial(data: Text, seed: int) -> dict[str, float]:
    """Train each arm at two rates on the same pieces, choose by 20,000 bytes kept from training, score the test."""
    import torch

    from polyspan.nn import score_next_token, train_next_token

    recipe = np.asarray(data.recipe).ravel()
    if len(recipe) != 8:
        raise ValueError(f"recipe must hold 8 numbers, as Text says, got {len(recipe)}")
    _, _, _, length, batch, steps, dear, last_only = (int(v) for v in recipe)
    known = np.unique(data.train)

    def coded(text: np.ndarray) -> Any:
        places = np.searchsorted(known, text).clip(max=len(known) - 1)
        return torch.as_tensor(np.where(known[places] == text, places, len(known)))

    cut = len(data.train) * 9 // 10 // length * length
    text, choosing, test = coded(data.train[:cut]), coded(data.train[cut:][:CHOOSING]), coded(data.test)

    def counted(ids: Any) -> Any:
        return torch.arange(len(ids)) % length == length - 1 if last_only else None

    arms = {"method": "grassmann", "baseline": "attention"}
    if dear:
        arms |= {"concatenation, same offsets": "concatenation", "no mixing": "none"}
    found: dict[str, float] = {}
    for name, mixer in arms.items():
        scores = []
        for rate in RATES:
            model = network(len(known) + 1, recipe, mixer, torch.Generator().manual_seed(seed))
            train_next_token(
                model, text, steps=steps, length=length, batch_size=batch, learning_rate=rate, warmup=steps // 10,
                stride=length if last_only else 1, counted=counted(text),
                generator=torch.Generator().manual_seed(seed + 1),
            )  # fmt: skip
            chosen = score_next_token(model, choosing, length=length, counted=counted(choosing))
            scores.append((chosen, score_next_token(model, test, length=length, counted=counted(test))))
        found[name] = min(scores)[1]
        found[f"{name}, parameters"] = float(sum(p.numel() for p in model.parameters()))
    return found


CLAIM = Claim(
    slug="grassmann-mixing",
    statement=(
        "A small language model of bytes that mixes tokens by planes has a loss at most 0.025 nats a byte above that "
        "of a causal transformer of equal size, trained on the same pieces."
    ),
    method="blocks with causal Grassmann mixing at offsets 1, 2, 4, 8, 12 and 16; the better of two learning rates",
    baseline="the same blocks with causal attention of four heads; the same pieces, updates and two learning rates",
    metric="cross-entropy on text left out, nats a byte",
    better="lower",
    # 15 percent of perplexity a word, the paper's own distance, at 5.6 bytes a word.
    margin=-round(math.log(1.15) / 5.6, 3),
    worlds={
        "python-help": python_help,
        "planted-language": planted,
        "wikitext-2": wikitext,
        "wikitext-2-longer": lambda seed: wikitext(seed, recipe=LONGER),
        "far-recall": lambda seed: far_recall(python_help(seed), seed),
    },
    control="far-recall",
    levels={"quick": ("python-help",), "standard": ("wikitext-2", "wikitext-2-longer")},
    seeds={"quick": 3, "standard": 3},
    trial=trial,
    user_data=Text,
    spoil=far_recall,
    why=(
        "It depends on how long both are trained. Planes at fixed offsets need not learn where to look, and lead "
        "early: by about 0.2 nats after 160 updates on Python's help texts. After 500 on WikiText-2 attention has "
        "overtaken them, 2.14 against 2.19, and after 1,200 by far, 1.86 against 2.09 (3 seeds each), so that the "
        "paper's distance of 15 percent of perplexity a word is not kept. Mixing the same offsets without planes, by "
        "a matrix on both tokens side by side, gives 2.22 after 500 updates, and no mixing 2.32: the planes add a "
        "little to what the offsets do. Where the answer lies out of reach (control), planes stay at chance, and "
        "attention recalls it."
    ),
)
