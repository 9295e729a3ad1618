"""A Qdrant collection as a store that can be upgraded: next vectors are a collection beside the old one."""

import hashlib
import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from polyspan.errors import UnreadableFile, WrongContent, require

from .vector_tables import BATCH_ROWS, TableBatch, TableFacts, check_finite_rows, check_verb

STAMP, NEXT, BEFORE = "polyspan", "__next", "polyspan_before"
PAGE = 512
PLACES, SAMPLED = 16, 16
"""Where :meth:`QdrantTable.facts` looks into the order of the ids, and how many points it reads at each place."""


class QdrantTable:
    """A collection of Qdrant behind an alias; keys are point ids, payloads are carried along.

    Next vectors stand in the collection ``NAME__next``, with the payload and the other vectors (named or sparse) of
    their points. The switch of the alias is the cut-over, so that readers must ask for the alias; a collection that
    is addressed by its own name can be filled and checked, but not cut over. Collections of cosine distance keep
    directions only: the lengths of the vectors are gone.

    Points whose payload changed since they were filled are found to be pending. A collection has no version that could
    be asked for. So :meth:`facts` takes the count and the kind of the vectors from the server and reads the ids,
    vectors and payloads of at most 752 points, spread over the order of the ids: another number of points is seen
    there, and a point that changes if it is among these. :meth:`digest` reads the whole collection; an upgrade calls
    it at the check, before the switch of the alias and after it (:meth:`cut_over_if`), and whatever changes between
    these is seen. Not seen are other vectors of a point (not the one that is upgraded) that change between fill and
    check, writes of others to the next collection after the check, and writes that reach the old collection, under its
    own name or late, after it was read the last time: a server has no lock that would keep them out. Indexes of payload
    fields, aliases of other names and the number of shards and replicas are not carried: set them on the new collection
    before the cut-over.

    Parameters
    ----------
    address : str
        Folder of a local Qdrant, of which one process at a time may have one, or ``http`` address of a server.
    name : str
        Alias or collection.
    vector : str, optional
        Which named vector, where a point has several.
    text_field : str, optional
        Payload field that holds the text that was embedded.
    client : QdrantClient, optional
        Use this one instead of opening the address.
    """

    def __init__(
        self,
        address: str,
        name: str,
        *,
        vector: str | None = None,
        text_field: str | None = None,
        client: Any = None,
    ):
        qdrant = require("qdrant_client", extra="vectors", purpose="a Qdrant collection")
        self._models = qdrant.models
        if client is None:
            try:
                local = not address.startswith(("http:", "https:"))
                client = qdrant.QdrantClient(path=address) if local else qdrant.QdrantClient(url=address)
            except RuntimeError as error:
                raise UnreadableFile(
                    address, found=str(error)[:200], expected="a folder that no one has open"
                ) from error
        self.client, self.name, self.vector, self.text_field = client, name, vector, text_field
        self.place = f"{address}:{name}"
        if not (name in self._aliases() or client.collection_exists(name)):
            raise UnreadableFile(address, found=f"no collection {name}", expected="a collection or alias of that name")

    def close(self) -> None:
        """Let go of the folder."""
        self.client.close()

    def _aliases(self) -> dict[str, str]:
        return {a.alias_name: a.collection_name for a in self.client.get_aliases().aliases}

    @property
    def collection(self) -> str:
        """The collection in use."""
        return self._aliases().get(self.name, self.name)

    def _settings(self, collection: str) -> Any:
        """Return size and distance of the vectors of a collection."""
        found = self.client.get_collection(collection).config.params.vectors
        if isinstance(found, Mapping):
            if self.vector is None and len(found) != 1:
                raise WrongContent(
                    self.place, found=f"named vectors {', '.join(found)}", expected="one, or column= naming it"
                )
            self.vector = self.vector or next(iter(found))
            if self.vector not in found:
                raise WrongContent(self.place, found=f"vectors {', '.join(found)}", expected=f"a vector {self.vector}")
            found = found[self.vector]
        return found

    def _note(self, collection: str) -> dict[str, Any]:
        return (self.client.get_collection(collection).config.metadata or {}).get(STAMP, {})

    def _put_note(self, collection: str, note: Mapping[str, Any]) -> None:
        kept = dict(self.client.get_collection(collection).config.metadata or {})
        self.client.update_collection(collection, metadata=kept | {STAMP: dict(note)})

    def _next(self) -> str | None:
        """Return the collection that is being filled: a second name is needed where an upgrade took the first."""
        taken = (self.collection, self._before())
        return next((c for c in self._places() if c not in taken and self.client.collection_exists(c)), None)

    def _places(self) -> tuple[str, str]:
        return self.name + NEXT, self.name + NEXT + "2"

    def facts(self) -> TableFacts:
        """Look at the collection."""
        own, coming = self.collection, self._next()
        note, before = self._note(own), self._before()
        settings = self._settings(own)
        n = self.client.count(own, exact=True).count
        distance = {"Cosine": "cosine", "Dot": "dot", "Euclid": "l2"}.get(settings.distance.value)
        there = None if coming is None else self.client.count(coming, exact=True).count
        return TableFacts(
            n_rows=n,
            dim=settings.size,
            metric=distance,
            exact=True,
            unit=distance == "cosine",
            space=note.get("space"),
            next_dim=None if coming is None else self._settings(coming).size,
            n_pending=None if there is None else max(n - there, 0),
            next_space=None if coming is None else self._note(coming).get("space"),
            has_before=before is not None,
            state={
                "n_rows": n,
                "collection": own,
                "vectors": settings.model_dump(mode="json", include={"size", "distance", "datatype"}),
                "sampled": _digest(self._sample(own, n)),
            },
        )

    def digest(self) -> str:
        """Return a digest of ids, vectors and payloads of the whole collection in use, in the order of its ids."""
        return self._whole(self.collection)

    def _whole(self, collection: str) -> str:
        return _digest(self._scroll(collection, PAGE, vectors=True))

    def _sample(self, collection: str, n: int) -> Iterator[list[Any]]:
        """Yield points from places that depend on n alone.

        These are even steps through the numbers below n, through all numbers and through all UUIDs, which come after
        the numbers: whether ids are counted or drawn, they are spread over the points.
        """
        counted = [i * n // PLACES for i in range(PLACES)]
        drawn = [i * 2**64 // PLACES for i in range(1, PLACES)]
        unique = [str(uuid.UUID(int=i * 2**128 // PLACES)) for i in range(PLACES)]
        for offset in sorted({*counted, *drawn}) + unique:
            yield self.client.scroll(collection, limit=SAMPLED, offset=offset, with_vectors=True, with_payload=True)[0]

    def _before(self) -> str | None:
        name = self._note(self.collection).get(BEFORE)
        return name if name and self.client.collection_exists(name) else None

    def stamp(self, space: Mapping[str, Any]) -> None:
        """Keep with the vectors in use what space they are of, as metadata of the collection."""
        self._put_note(self.collection, self._note(self.collection) | {"space": dict(space)})

    def prepare(self, dim: int, space: Mapping[str, Any], work: Mapping[str, Any]) -> None:
        """Make the next collection, stamped; other work than that under way is refused."""
        wanted = {"space": dict(space), "work": dict(work)}
        if self._before() is not None:
            raise ValueError(f"{self.place} must have no upgrade that is cut over and not forgotten, got one")
        coming = self._next()
        if coming is None:
            old = self._settings(self.collection)
            if old.multivector_config is not None:
                raise WrongContent(
                    self.place,
                    found=f"several vectors a point in {self.vector or 'the collection'}",
                    expected="one vector a point where it is to be upgraded",
                )
            params = old.model_copy(update={"size": dim})
            config = self.client.get_collection(self.collection).config
            coming = next(c for c in self._places() if not self.client.collection_exists(c))
            self.client.create_collection(
                coming,
                vectors_config=params if self.vector is None else {**config.params.vectors, self.vector: params},
                sparse_vectors_config=config.params.sparse_vectors,
                hnsw_config=self._models.HnswConfigDiff(**config.hnsw_config.model_dump()),
                quantization_config=config.quantization_config,
                on_disk_payload=config.params.on_disk_payload,
                metadata={STAMP: wanted},
            )
        elif self._note(coming) != wanted:
            raise ValueError(f"{self.place} is being upgraded in another way; forget that upgrade first")

    def _scroll(self, collection: str, batch_rows: int, vectors: bool | list[str] | None = None) -> Iterator[list[Any]]:
        """Yield points with their payload and the vector that is upgraded, or the vectors that are asked for."""
        offset, held = None, []
        if vectors is None:
            vectors = True if self.vector is None else [self.vector]
        while True:
            points, offset = self.client.scroll(
                collection, limit=min(batch_rows, PAGE), offset=offset, with_vectors=vectors, with_payload=True
            )
            held += points
            while len(held) >= batch_rows or (offset is None and held):
                yield held[:batch_rows]
                held = held[batch_rows:]
            if offset is None:
                return

    def _vector_of(self, point: Any) -> Any:
        # Where sparse vectors stand beside it, the vector without a name comes under the name "".
        found = point.vector.get(self.vector or "") if isinstance(point.vector, Mapping) else point.vector
        if found is None:
            raise WrongContent(self.place, found="a point without a vector", expected="one", where=f"id {point.id}")
        return found

    def _read(self, points: list[Any]) -> TableBatch:
        texts = None
        if self.text_field is not None:
            for point in points:
                if not isinstance((point.payload or {}).get(self.text_field), str):
                    raise WrongContent(
                        self.place,
                        found="no text",
                        expected=f"a payload field {self.text_field}",
                        where=f"id {point.id}",
                    )
            texts = [point.payload[self.text_field] for point in points]
        keys = np.array([point.id for point in points], dtype=object)
        rows = np.array([self._vector_of(p) for p in points], dtype=np.float32)
        check_finite_rows(self.place, keys, rows)
        return TableBatch(keys, rows, texts)

    def _there(self, collection: str, keys: Any) -> dict[Any, Any]:
        vectors = True if self.vector is None else [self.vector]
        found = self.client.retrieve(collection, list(keys), with_vectors=vectors, with_payload=False)
        return {point.id: self._vector_of(point) for point in found}

    def rows(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield the points in use."""
        for points in self._scroll(self.collection, batch_rows):
            yield self._read(points)

    def sync(self) -> None:
        """Every write is on the disk already."""

    def pending(self, batch_rows: int = BATCH_ROWS) -> Iterator[TableBatch]:
        """Yield points that the next collection lacks or has with another payload."""
        coming = self._coming()
        for points in self._scroll(self.collection, batch_rows):
            there = self._payloads(coming, points)
            left = [point for point in points if not _is_carried(point, there)]
            if left:
                yield self._read(left)

    def _payloads(self, collection: str, points: list[Any]) -> dict[Any, Any]:
        """Return the payloads of those of the points that a collection holds, by id."""
        found = self.client.retrieve(collection, [p.id for p in points], with_payload=True, with_vectors=False)
        return {point.id: point.payload or {} for point in found}

    def _coming(self) -> str:
        coming = self._next()
        if coming is None:
            raise ValueError(f"{self.place} must be prepared for an upgrade first, got none under way")
        return coming

    def fill(self, batch: TableBatch, rows: np.ndarray) -> None:
        """Write points with their next vectors, and the payload and other vectors that they have now."""
        m, coming = self._models, self._coming()
        found = {
            point.id: point
            for point in self.client.retrieve(self.collection, list(batch.keys), with_payload=True, with_vectors=True)
        }
        points = []
        for key, row in zip(batch.keys, rows, strict=True):
            if key not in found:
                # Removed since it was read: what is not in use needs no next vector.
                continue
            others = found[key].vector
            vector = {**others, self.vector or "": row.tolist()} if isinstance(others, Mapping) else row.tolist()
            points.append(m.PointStruct(id=key, vector=vector, payload=found[key].payload))
        for at in range(0, len(points), PAGE):
            self.client.upsert(coming, points[at : at + PAGE], wait=True)

    def seal(self) -> None:
        """Look for points without a next vector: others may have added some."""
        left = sum(len(batch.keys) for batch in self.pending(PAGE))
        if left:
            raise ValueError(f"every row must have a next vector, got {left} rows without one")

    def pairs(self, batch_rows: int = BATCH_ROWS) -> Iterator[tuple[TableBatch, np.ndarray]]:
        """Yield every point with its next vector, or NaN where there is none or its payload has changed."""
        coming = self._coming()
        d = self._settings(coming).size
        for points in self._scroll(self.collection, batch_rows):
            payloads = self._payloads(coming, points)
            there = self._there(coming, [point.id for point in points if _is_carried(point, payloads)])
            made = [there.get(point.id, [np.nan] * d) for point in points]
            yield self._read(points), np.array(made, dtype=np.float32)

    def switch(self, verb: str) -> None:
        """Cut over or roll back by one change of the alias; forget by removing a collection."""
        check_verb(verb)
        own, before = self.collection, self._before()
        if verb == "cut over":
            if before is not None:
                return
            if self.name not in self._aliases():
                raise ValueError(
                    f"{self.place} must be an alias to be cut over, got a collection's own name; make an alias, let "
                    "your readers ask for it, and name it here"
                )
            coming = self._coming()
            self._put_note(coming, self._note(coming) | {BEFORE: own})
            self._point_to(coming)
        elif verb == "roll back":
            if before is None:
                raise ValueError(f"{self.place} must have been cut over and not forgotten, got no collection before it")
            self._point_to(before)
            self._put_note(own, {k: v for k, v in self._note(own).items() if k != BEFORE})
        elif before is not None:
            self.client.delete_collection(before)
            self._put_note(own, {k: v for k, v in self._note(own).items() if k != BEFORE})
        elif (coming := self._next()) is not None:
            self.client.delete_collection(coming)

    def cut_over_if(self, unchanged: Callable[[], Any]) -> None:
        """Cut over as ``unchanged`` finds the collection; it returns the :meth:`digest` that it was found to have.

        Once the alias names the new collection, the old one is read again: what came in between is not in the new one.

        Raises
        ------
        ValueError
            Something did; the alias then names the old collection again. What was written under the alias to the new
            collection in the meantime stays there.
        """
        own, contents = self.collection, unchanged()
        self.switch("cut over")
        if self._whole(own) != contents:
            self.switch("roll back")
            raise ValueError(
                f"{self.place} must not be written to while it is cut over, got other contents; fill again"
            )

    def _point_to(self, collection: str) -> None:
        m = self._models
        self.client.update_collection_aliases(
            [
                m.DeleteAliasOperation(delete_alias=m.DeleteAlias(alias_name=self.name)),
                m.CreateAliasOperation(create_alias=m.CreateAlias(collection_name=collection, alias_name=self.name)),
            ]
        )


def _is_carried(point: Any, payloads: Mapping[Any, Any]) -> bool:
    """Tell whether a point stands in the next collection with the payload that it has now."""
    return point.id in payloads and payloads[point.id] == (point.payload or {})


def _digest(pages: Iterable[list[Any]]) -> str:
    """Return a digest of ids, vectors and payloads of points, in the order in which they come."""
    made = hashlib.sha256()
    for points in pages:
        for point in points:
            vectors = point.vector if isinstance(point.vector, Mapping) else {"": point.vector}
            named = {name: _plain(vector) for name, vector in vectors.items()}
            made.update(json.dumps([point.id, named, point.payload], sort_keys=True, default=str).encode())
    return made.hexdigest()


def _plain(vector: Any) -> Any:
    """Return a dense, sparse or multiple vector in JSON types."""
    return vector.model_dump() if hasattr(vector, "model_dump") else vector
