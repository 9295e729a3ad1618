"""The catalogue: one TOML a system, read from the package itself."""

import difflib
import math
import tomllib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date as Date
from functools import cache
from importlib import resources
from typing import Any

FAMILIES = ("align", "cluster", "checkpoints", "nn", "learn", "scenes", "symbols", "sketch")
STATUSES = ("working", "planned")
WEIGHTS = {"aliases": 3.0, "title": 3.0, "names": 2.0, "object": 2.0, "summary": 1.0, "family": 1.0}
COMMON = {
    "a", "an", "and", "are", "as", "at", "be", "by", "do", "for", "from", "in", "into", "is", "it", "my", "of", "on",
    "or", "that", "the", "to", "with", "without",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One system: the paper it comes from, what it does for a user, where it is.

    ``date`` is the paper's first version; ``authors`` may be empty where only their number ``n_authors`` is known;
    ``arxiv`` and ``code`` may be empty; ``status`` is ``"working"`` or ``"planned"``; ``snippet`` and ``command`` are
    what the gallery shows, and run in the tests.
    """

    slug: str
    title: str
    authors: tuple[str, ...]
    n_authors: int
    date: Date
    arxiv: str
    code: str
    family: str
    module: str
    names: tuple[str, ...]
    summary: str
    aliases: tuple[str, ...]
    object: str
    commands: tuple[str, ...]
    extras: tuple[str, ...]
    status: str
    snippet: str = ""
    command: str = ""


@cache
def _all() -> tuple[Entry, ...]:
    folder = resources.files("polyspan.catalog")
    found = []
    for name in sorted(f.name for f in folder.iterdir() if f.name.endswith(".toml")):
        facts: dict[str, Any] = tomllib.loads(folder.joinpath(name).read_text("utf-8"))
        facts |= {key: tuple(value) for key, value in facts.items() if isinstance(value, list)}
        made = Entry(**facts)
        if made.slug + ".toml" != name or made.family not in FAMILIES or made.status not in STATUSES:
            raise ValueError(
                f"{name} must hold its own slug, one of the families {FAMILIES} and one of {STATUSES}, "
                f"got {made.slug!r}, {made.family!r} and {made.status!r}"
            )
        found.append(made)
    return tuple(sorted(found, key=lambda e: (-e.date.toordinal(), e.slug)))


def entries() -> list[Entry]:
    """Return all systems, the newest paper first."""
    return list(_all())


@cache
def _by_name() -> dict[str, Entry]:
    """Map all that a system is called to it; a slug goes before an alias, an alias before a title, a class last."""
    known: dict[str, Entry] = {}
    for kind in ("slug", "aliases", "title", "names"):
        for found in _all():
            called = getattr(found, kind)
            for name in (called,) if isinstance(called, str) else called:
                known.setdefault(_key(name), found)
    return known


def entry(name: str) -> Entry:
    """Return one system by its slug, an alias, its title or a class of it.

    Case, accents and punctuation do not matter. Where two systems share a class name, the newer one answers.

    Raises
    ------
    ValueError
        No system is called that; the message holds the nearest slugs.
    """
    known, wanted = _by_name(), _key(name)
    if wanted in known:
        return known[wanted]
    near = difflib.get_close_matches(wanted, known, n=3, cutoff=0.6)
    nearest = list(dict.fromkeys(known[key].slug for key in near)) or [e.slug for e in search(name)[:3]]
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "; polyspan list shows all"
    raise ValueError(f"name must be a slug, alias, title or class of a system, got {name!r}{hint}")


def search(words: str, encoder: Callable[[list[str]], Any] | None = None) -> list[Entry]:
    r"""Return the systems that match some words, best first.

    A query word w that begins a word of the entry adds :math:`f \log(N / N_w)`, where N_w of all N systems hold it
    and f is the weight of the best field that does (alias or title 3, name or object 2, summary or family 1), halved
    where w, of three letters or more, is only the beginning. A plural finds its singular; case and accents do not
    matter; articles and prepositions do not count. It knows no synonyms: an ``encoder`` does.

    Parameters
    ----------
    words : str
        What you are looking for, in your own words; systems that match none of them are left out.
    encoder : callable, optional
        ``encoder(texts) -> (n, d)`` sentence embeddings: ranks all systems by the cosine with ``words`` instead.

    Raises
    ------
    ValueError
        The encoder does not return one vector a text.
    """
    if encoder is not None:
        return _by_meaning(words, encoder)
    scores = dict.fromkeys(_all(), 0.0)
    for word in dict.fromkeys(w for w in _words(words) if w not in COMMON):
        hits = {found: hit for found, fields in _field_words().items() if (hit := _hit(word, fields))}
        for found, hit in hits.items():
            scores[found] += hit * math.log(len(scores) / len(hits))
    return [found for found in sorted(scores, key=lambda e: -scores[e]) if scores[found] > 0]


@cache
def _field_words() -> dict[Entry, dict[str, frozenset[str]]]:
    return {found: {field: frozenset(_words(_text(found, field))) for field in WEIGHTS} for found in _all()}


def _hit(word: str, fields: dict[str, frozenset[str]]) -> float:
    """Return the weight of the best field with a word that ``word``, or its singular, is or begins; else 0."""
    singular = word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
    best = 0.0
    for field, known in fields.items():
        if word in known or singular in known:
            best = max(best, WEIGHTS[field])
        elif len(singular) >= 3 and any(k.startswith(singular) for k in known):
            best = max(best, WEIGHTS[field] / 2)
    return best


def _by_meaning(words: str, encoder: Callable[[list[str]], Any]) -> list[Entry]:
    texts = [f"{e.title}. {e.summary} {', '.join(e.aliases)}" for e in _all()]
    vectors = [[float(x) for x in row] for row in encoder([*texts, words])]
    if len(vectors) != len(texts) + 1 or len({len(v) for v in vectors}) != 1:
        raise ValueError(
            f"encoder must return one vector of one width a text, {len(texts) + 1} in all, got {len(vectors)}"
        )
    *known, query = vectors

    def cosine(vector):
        norms = math.hypot(*vector) * math.hypot(*query)
        return sum(a * b for a, b in zip(vector, query, strict=True)) / norms if norms else 0.0

    order = sorted(zip(known, _all(), strict=True), key=lambda pair: -cosine(pair[0]))
    return [found for _, found in order]


def _text(found: Entry, field: str) -> str:
    value = getattr(found, field)
    joined = value if isinstance(value, str) else " ".join(value)
    return f"{joined} {found.slug}" if field == "aliases" else joined


def _fold(text: str) -> str:
    plain = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in plain if not unicodedata.combining(c))


def _words(text: str) -> list[str]:
    return "".join(c if c.isalnum() else " " for c in _fold(text)).split()


def _key(text: str) -> str:
    return "".join(c for c in _fold(text) if c.isalnum())
