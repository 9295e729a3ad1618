"""What an upgrade remembers in its folder, and its plan: the sample, the maps, and what they are predicted to give."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import clone

from polyspan.align import Aligner, ForwardCompatibleMap, ResidualMLPMap, default_candidates, plan_upgrade
from polyspan.align.orthogonal_map import few_anchors_unsaid
from polyspan.align.upgrade_plan import StrategyRow, UpgradePlan, recommend
from polyspan.io import digest_array, make_folder, read_json, read_members, write_array, write_json, write_members
from polyspan.run import progress

from ._next_rows import AGREES, plain_keys, row_distances
from .encoders import Encoder, digest_texts
from .vector_tables import TableBatch, TableFacts, VectorTable

NETWORKS = (ResidualMLPMap, ForwardCompatibleMap)
"""Maps that are not affine, which the queries of an index cannot go through."""
ASKED_AGAIN = 4
"""So many of a sample that was embedded before are embedded again, to see whether the encoder is still the same."""
METRICS = {"dot": "dot", "l2": "euclidean"}
"""By what neighbours are looked for, for what a store says of itself; else by cosine."""


class PlannedUpgrade:
    """The plan of an upgrade, and what its other steps need of it; see :class:`polyspan.integrations.Upgrade`."""

    def __init__(
        self,
        folder: Path | str,
        table: VectorTable,
        *,
        encoder: Encoder | None = None,
        texts: Mapping[Any, str] | Sequence[str] | None = None,
    ):
        self.folder, self.table, self.encoder, self.texts = make_folder(folder), table, encoder, texts

    # What is remembered

    def _read(self, name: str) -> dict[str, Any]:
        place = self.folder / name
        return read_json(place) if place.exists() else {}

    def _remember(self, **facts: Any) -> None:
        write_json(self.folder / "upgrade.json", self._read("upgrade.json") | facts)

    @property
    def steps(self) -> dict[str, str]:
        """When each step was done, by name."""
        return self._read("upgrade.json").get("steps", {})

    def _done(self, step: str) -> None:
        self._remember(steps=self.steps | {step: datetime.now(UTC).isoformat(timespec="seconds")})

    def _strategy(self) -> str:
        found = self._read("upgrade.json").get("strategy")
        if found is None:
            raise ValueError(f"{self.folder} must hold an upgrade that was begun, got none; begin with a strategy")
        return found

    # Plan

    def plan(
        self,
        *,
        n_anchors: int = 2000,
        k: int = 10,
        old_model: str | None = None,
        labels: Any = None,
        seed: int = 0,
        **options: Any,
    ) -> UpgradePlan:
        """Embed a sample of the store by the new model, fit every map both ways, and predict what each way gives.

        Nothing is written to the store. Sample and best maps are kept in the folder.

        Parameters
        ----------
        n_anchors : int
            Rows that are drawn and embedded; a sample of the same seed that was embedded before is used again.
        k : int
            Recall is measured at so many, by the store's own metric where it says one, else by cosine.
        old_model : str, optional
            What the vectors in use were made by, where the store has no stamp that says it.
        labels : array of shape (n_rows,), optional
            Classes of all rows in the order in which the store yields them; kept in the folder, since a backfill then
            embeds the items again that lie farthest from the mean of their class.
        seed : int
        options
            See :func:`polyspan.align.plan_upgrade`.

        Raises
        ------
        ValueError
            The store is stamped as another model's, there are too few rows, a text is missing, or an upgrade of the
            store that was begun in this folder has not ended: its maps and its sample would be lost.
        """
        encoder = self._needed_encoder("plan")
        facts = self.table.facts()
        begun = self._read("upgrade.json").get("strategy", "query")
        if facts.next_dim is not None and begun != "query":
            raise ValueError(
                f"{self.folder} must hold no upgrade that is under way, got one by strategy {begun}; end it, forget "
                "it, or plan in another folder"
            )
        space = self._old_space(facts, old_model)
        if facts.n_rows < 12:
            raise ValueError(f"the store must hold at least 12 rows to plan from, got {facts.n_rows}")
        self._check_texts(facts.n_rows)
        old, new, sampled = self._anchors(facts, min(n_anchors, facts.n_rows), seed)
        codes = None
        if labels is not None:
            labels = np.asarray(labels)
            if labels.shape != (facts.n_rows,):
                raise ValueError(f"labels must have one entry a row, ({facts.n_rows},), got shape {labels.shape}")
            codes = np.unique(labels, return_inverse=True)[1].astype(np.int64)
            options["labels"] = codes[sampled]
        options.setdefault("seconds_per_item", encoder.seconds_per_item)
        options.setdefault("renormalize", True)
        options.setdefault("metric", METRICS.get(facts.metric, "cosine"))
        tried = options.pop("candidates", None) or default_candidates(old.shape[1], new.shape[1], len(old), seed)
        made = plan_upgrade(old, new, n_rows=facts.n_rows, k=k, candidates=tried, random_state=seed, **options)
        made = self._offered(made, old, new, tried, options.get("loss", 0.05))
        said = list(made.warnings)
        if not self._rewritable():
            said.append("the index holds codes: vectors are read approximately, and only queries can be carried to it")
        if facts.unit:
            said.append("the store keeps directions only: maps are fitted on vectors of length 1")
        if encoder.name == space["model"]:
            said.append(f"the store is stamped as this encoder's already: {encoder.name}")
        made = made._replace(warnings=said)
        for direction, aligner in made.aligners.items():
            pair = (space, encoder.space) if direction == "gallery" else (encoder.space, space)
            aligner.save(self._map_path(direction), about={"source": pair[0], "target": pair[1]})
        told = {
            "old_space": space,
            "new_space": encoder.space,
            "state": dict(facts.state),
            "k": k,
            "metric": options["metric"],
            "seed": seed,
            "n_splits": options.get("n_splits", 3),
            "labels": None if codes is None else codes[sampled].tolist(),
            "labels_sha256": None if codes is None else digest_array(codes),
            "n_anchors": len(sampled),
            "n_rows": facts.n_rows,
            "recommended": made.recommended,
            "reason": made.reason,
            "warnings": said,
            "table": [row._asdict() for row in made.table],
        }
        if codes is not None:
            write_array(self.folder / "plan_labels.npy", codes)
        write_json(self.folder / "plan.json", told)
        return made

    def _rewritable(self) -> bool:
        return getattr(self.table, "rewritable", True)

    def _offered(
        self, made: UpgradePlan, old: np.ndarray, new: np.ndarray, tried: Mapping[str, Aligner], loss: float
    ) -> UpgradePlan:
        """Leave in a plan what can be done: one map carries the gallery; codes stay; FAISS takes affine maps alone."""
        carried = next((row.aligner for row in made.table if row.strategy == "gallery"), "")
        affine = getattr(self.table, "affine_queries", False)

        def can(row: StrategyRow) -> bool:
            if row.strategy == "query":
                return not (affine and isinstance(tried[row.aligner], NETWORKS))
            return row.strategy == "stay" or (
                self._rewritable() and (row.strategy != "backfill" or row.aligner == carried)
            )

        if affine and all(isinstance(candidate, NETWORKS) for candidate in tried.values()):
            raise ValueError(f"candidates must hold an affine map, for queries of an index, got {', '.join(tried)}")
        rows, wanted = [row for row in made.table if can(row)], made.table[made.recommended]
        aligners = dict(made.aligners) if self._rewritable() else {"query": made.aligners["query"]}
        asking = next(row.aligner for row in rows if row.strategy == "query")
        if asking != next(row.aligner for row in made.table if row.strategy == "query"):
            with few_anchors_unsaid():
                # The plan's warnings say it.
                aligners["query"] = clone(tried[asking]).fit(new, old)
        if wanted in rows:
            return made._replace(table=rows, recommended=rows.index(wanted), aligners=aligners)
        chosen, reason = recommend(rows, loss)
        return made._replace(table=rows, recommended=chosen, reason=reason, aligners=aligners)

    def _old_space(self, facts: TableFacts, old_model: str | None) -> dict[str, Any]:
        stamped = facts.space
        if stamped is None:
            return {"model": old_model or "unnamed", "dim": facts.dim, "normalized": facts.unit}
        if old_model is not None and stamped["model"] != old_model:
            raise ValueError(f"the store must hold vectors of {old_model}, got vectors stamped {stamped['model']}")
        if stamped["dim"] != facts.dim:
            raise ValueError(
                f"the store must have the {stamped['dim']} dimensions of its stamp, {stamped['model']}, got {facts.dim}"
            )
        return dict(stamped)

    def _needed_encoder(self, what: str) -> Encoder:
        if self.encoder is None:
            raise ValueError(f"an encoder must be given to {what}, got None")
        return self.encoder

    def _anchors(self, facts: TableFacts, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return a seeded sample of old vectors, the new ones of the same items, and their row numbers."""
        encoder = self._needed_encoder("plan")
        picked = np.sort(np.random.default_rng(seed).choice(facts.n_rows, size=n, replace=False))
        keys, rows, texts, first = [], [], [], 0
        for batch in self.table.rows():
            mine = picked[(picked >= first) & (picked < first + len(batch.keys))] - first
            first += len(batch.keys)
            if len(mine):
                drawn = batch.part(mine)
                keys += plain_keys(drawn.keys)
                rows.append(drawn.rows)
                texts += self._texts(drawn)
        old = np.concatenate(rows)
        wanted = {
            "n": n,
            "seed": seed,
            "encoder": encoder.name,
            "old_sha256": digest_array(old),
            "texts_sha256": digest_texts(texts),
        }
        new = self._embedded_before(wanted, texts)
        if new is None:
            made = [encoder(texts[at : at + 256]) for at in progress(range(0, n, 256), label="embedding the sample")]
            new = np.concatenate(made)
            write_members(self.folder / "anchors.npz", {"old": old, "new": new})
            facts_of_it = {
                "keys": keys,
                "dim": encoder.dim,
                "normalized": encoder.normalized,
                "seconds": encoder.seconds,
            }
            write_json(self.folder / "anchors.json", wanted | facts_of_it)
        return old, new, picked

    def _embedded_before(self, wanted: Mapping[str, Any], texts: list[str]) -> np.ndarray | None:
        """Return what was made of this very sample, if the encoder still makes the same of its first few, else None."""
        encoder, kept = self._needed_encoder("plan"), self._read("anchors.json")
        if not kept or {name: kept.get(name) for name in wanted} != dict(wanted):
            return None
        new = read_members(self.folder / "anchors.npz", ["new"])["new"]
        fresh = encoder(texts[:ASKED_AGAIN])
        if fresh.shape[1] != new.shape[1] or (row_distances(fresh, new[:ASKED_AGAIN], unit=False) > AGREES).any():
            return None
        encoder.normalized, encoder.seconds, encoder.n_encoded = kept["normalized"], kept["seconds"], wanted["n"]
        return new

    def _planned_encoder(self, what: str) -> Encoder:
        """Return the encoder, which must be the one that was planned for: two models must not mix."""
        encoder, planned = self._needed_encoder(what), self._read("plan.json")["new_space"]["model"]
        if encoder.name != planned:
            raise ValueError(f"encoder must be {planned}, which was planned for, to {what}, got {encoder.name}")
        return encoder

    def _check_texts(self, n_rows: int) -> None:
        """Refuse a list of texts where rows have no numbers, or where there is not one a row."""
        if self.texts is None or isinstance(self.texts, Mapping):
            return
        if not getattr(self.table, "numbered", False):
            raise ValueError("texts must be a mapping by id for a store whose rows have no numbers, got a list")
        if len(self.texts) != n_rows:
            raise ValueError(f"texts must have one a row, {n_rows}, got {len(self.texts)}")

    def _texts(self, batch: TableBatch) -> list[str]:
        if self.texts is not None:
            if not isinstance(self.texts, Mapping):
                return [self.texts[row] for row in batch.keys.tolist()]
            names = plain_keys(batch.keys if batch.ids is None else batch.ids)
            missing = [name for name in names if name not in self.texts]
            if missing:
                raise ValueError(f"texts must have one for every row, got none for {missing[0]!r}")
            return [self.texts[name] for name in names]
        if batch.texts is None:
            raise ValueError("the text that was embedded must be given (a text column, or texts by key), got neither")
        return batch.texts

    def _map_path(self, direction: str) -> Path:
        return self.folder / f"{direction}_map.safetensors"
