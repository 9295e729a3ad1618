"""What an upgrade needs of a vector store, whatever keeps it."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from polyspan.errors import WrongContent

BATCH_ROWS = 65_536
ENCODED_ROWS = 1024
"""Rows between two points from which a fill goes on, where a map makes them and where an encoder does."""
VERBS = ("cut over", "roll back", "forget")


class TableFacts(NamedTuple):
    """What a store says of itself.

    ``n_rows``, ``dim`` of the vectors in use; ``metric``: ``"cosine"``, ``"dot"``, ``"l2"`` or None where nothing says
    it; ``exact``: whether vectors come back as they were put in; ``unit``: whether the store keeps directions only;
    ``space``: the stamp of the vectors in use, or None; ``next_dim``, ``n_pending`` and ``next_space`` of the vectors
    that are being filled in, or None where there are none; ``has_before``: whether an upgrade was cut over whose old
    vectors still stand; ``state``: JSON types that change when the vectors in use do, as far as the store can tell.
    """

    n_rows: int
    dim: int
    metric: str | None
    exact: bool
    unit: bool
    space: Mapping[str, Any] | None
    next_dim: int | None
    n_pending: int | None
    next_space: Mapping[str, Any] | None
    has_before: bool
    state: Mapping[str, Any]


class TableBatch(NamedTuple):
    """Some rows of a store, all of them different ones.

    ``keys`` (b,): the store's own names of the rows; ``rows`` (b, d); ``texts``: b strings, or None; ``ids`` (b,): by
    what users know the rows where keys are row numbers, or None.
    """

    keys: np.ndarray
    rows: np.ndarray
    texts: list[str] | None = None
    ids: np.ndarray | None = None

    def part(self, which: np.ndarray) -> "TableBatch":
        """Return the rows at these places, (m,), with all that is known of them."""
        texts = None if self.texts is None else [self.texts[i] for i in which]
        return TableBatch(self.keys[which], self.rows[which], texts, None if self.ids is None else self.ids[which])


@runtime_checkable
class VectorTable(Protocol):
    """A store of vectors beside which another set of vectors can be filled in and then put in their place.

    Three sets: the vectors in use, *next* while an upgrade runs, and *before* once it is cut over. The vectors in use
    are never written to. Each call may be repeated after a kill and then ends what was begun.
    """

    def facts(self) -> TableFacts:
        """Look at the store; writes nothing."""
        ...

    def stamp(self, space: Mapping[str, Any]) -> None:
        """Keep with the vectors in use what space they are of: ``model``, ``dim``, ``metric``, ``normalized``."""
        ...

    def prepare(self, dim: int, space: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        """Make room for the next vectors, stamped; ``work`` says how they are made, and other work is refused."""
        ...

    def rows(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield the rows in use."""
        ...

    def pending(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield rows in use that have no next vector yet, each once."""
        ...

    def fill(self, batch: TableBatch, rows: np.ndarray) -> None:
        """Write the next vectors (b, dim) of a batch, or write them anew."""
        ...

    def seal(self) -> None:
        """Put the next vectors on the disk in the form in which they will be used.

        Raises ``ValueError`` where a row has none, or the vectors in use have changed meanwhile.
        """
        ...

    def pairs(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[TableBatch, np.ndarray]]:
        """Yield every row in use with its next vector; a row without one has NaN."""
        ...

    def sync(self) -> None:
        """Put what was filled on the disk, and let another run go on from there."""
        ...

    def switch(self, verb: str) -> None:
        """Do one of three atomic acts.

        ``"cut over"``: next vectors come in use, those in use become *before*; ``"roll back"``: the reverse;
        ``"forget"``: *before*, or *next* where nothing was cut over, is removed.
        """
        ...


def check_finite_rows(place: Any, names: np.ndarray, rows: np.ndarray) -> None:
    """Refuse vectors (b, d) with NaN or infinity, by the name of the first; ``place`` is the store's."""
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        bad = names[int(finite.argmin())]
        raise WrongContent(place, found="NaN or infinity", expected="finite numbers", where=f"the vector of {bad}")


def check_verb(verb: str) -> None:
    """Refuse what :meth:`VectorTable.switch` does not know."""
    if verb not in VERBS:
        raise ValueError(f"verb must be one of {', '.join(VERBS)}, got {verb!r}")
