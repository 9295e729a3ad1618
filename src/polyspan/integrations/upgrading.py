"""Move a vector store to another embedding model: plan, stamp, fill, check, cut over, roll back."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import KFold

from polyspan.align import (
    Aligner,
    ResidualMLPMap,
    backfill_distances,
    default_candidates,
    load_aligner,
    plan_upgrade,
)
from polyspan.align.upgrade_plan import StrategyRow, UpgradePlan, recommend
from polyspan.io import (
    digest_array,
    digest_file,
    make_folder,
    read_array,
    read_json,
    read_members,
    remove_file,
    write_array,
    write_json,
    write_members,
)
from polyspan.linalg import label_hits, recall_at_k, top_k
from polyspan.run import Interrupt, Journal, Progress, first_interrupt_finishes, progress

from .encoders import Encoder
from .vector_tables import BATCH_ROWS, ENCODED_ROWS, TableBatch, TableFacts, VectorTable

FILLED = ("gallery", "backfill", "re-embed")
SLACK = 0.02
"""By how much recall on the anchors may lie below the predicted interval; the sample is the same, the store is not."""


class UpgradeCheck(NamedTuple):
    """What was seen of the next vectors: all of them counted and compared, none assumed.

    ``n_rows`` in use; ``n_missing`` without a next vector; ``n_wrong`` that are not what the map or the encoder makes
    (``worst``: the largest distance from it, as a share of the vector's length); ``n_compared``; ``recall`` at k of the
    anchors, NaN without a plan, and ``bound``, below which it must not fall; ``ok``; ``problems`` in words.
    """

    n_rows: int
    n_missing: int
    n_wrong: int
    n_compared: int
    worst: float
    recall: float
    bound: float
    ok: bool
    problems: list[str]


class Upgrade:
    """One upgrade of one store, remembered in a folder, so that any step may be killed and called again.

    :meth:`plan` embeds a sample and predicts; it writes into the folder alone. :meth:`begin` stamps the store and makes
    room for next vectors; :meth:`fill` makes them; :meth:`check` looks at every one; :meth:`cut_over` puts them in use
    if the check was good and nothing changed since; :meth:`roll_back` undoes that; :meth:`forget` removes what is no
    longer in use. Vectors in use are never written to.

    Parameters
    ----------
    folder : path-like
        Made where it does not exist.
    table : VectorTable
        A store whose ``facts`` look at a sample alone has ``digest()`` as well, which reads all: it is called once at
        the check and once at the cut-over.
    encoder : Encoder, optional
        The new model; needed to plan, and to fill where items are embedded again.
    texts : mapping of key to str, optional
        What was embedded, where the store does not hold it.

    Source: catalogue entry ``canonicalize``; the order of a backfill after ``lambda-orthogonality``.
    """

    def __init__(
        self,
        folder: Path | str,
        table: VectorTable,
        *,
        encoder: Encoder | None = None,
        texts: Mapping[Any, str] | None = None,
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
            The store is stamped as another model's, there are too few rows, or a text is missing.
        """
        encoder = self._needed_encoder("plan")
        facts = self.table.facts()
        space = self._old_space(facts, old_model)
        if facts.n_rows < 12:
            raise ValueError(f"the store must hold at least 12 rows to plan from, got {facts.n_rows}")
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
                return not (affine and isinstance(tried[row.aligner], ResidualMLPMap))
            return row.strategy == "stay" or (
                self._rewritable() and (row.strategy != "backfill" or row.aligner == carried)
            )

        if affine and all(isinstance(candidate, ResidualMLPMap) for candidate in tried.values()):
            raise ValueError(f"candidates must hold an affine map, for queries of an index, got {', '.join(tried)}")
        rows, wanted = [row for row in made.table if can(row)], made.table[made.recommended]
        aligners = dict(made.aligners) if self._rewritable() else {"query": made.aligners["query"]}
        asking = next(row.aligner for row in rows if row.strategy == "query")
        if asking != next(row.aligner for row in made.table if row.strategy == "query"):
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
        wanted = {"state": dict(facts.state), "n": n, "seed": seed, "encoder": encoder.name}
        picked = np.sort(np.random.default_rng(seed).choice(facts.n_rows, size=n, replace=False))
        kept = self._read("anchors.json")
        if kept and {name: kept[name] for name in wanted} == wanted:
            found = read_members(self.folder / "anchors.npz", ["old", "new"])
            encoder.dim, encoder.normalized = kept["dim"], kept["normalized"]
            encoder.seconds, encoder.n_encoded = kept["seconds"], n
            return found["old"], found["new"], picked
        keys, rows, texts, first = [], [], [], 0
        for batch in self.table.rows():
            mine = picked[(picked >= first) & (picked < first + len(batch.keys))] - first
            first += len(batch.keys)
            if len(mine):
                keys += _plain(batch.keys[mine])
                rows.append(batch.rows[mine])
                texts += self._texts(batch, mine)
        old = np.concatenate(rows)
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

    def _texts(self, batch: TableBatch, which: np.ndarray) -> list[str]:
        if self.texts is not None:
            missing = [key for key in _plain(batch.keys[which]) if key not in self.texts]
            if missing:
                raise ValueError(f"texts must have one for every row, got none for {missing[0]!r}")
            return [self.texts[key] for key in _plain(batch.keys[which])]
        if batch.texts is None:
            raise ValueError("the text that was embedded must be given (a text column, or texts by key), got neither")
        return [batch.texts[i] for i in which]

    def _map_path(self, direction: str) -> Path:
        return self.folder / f"{direction}_map.safetensors"

    # Stamp

    def begin(
        self, strategy: str | None = None, *, share: float | None = None, seed: int = 0, renormalize: bool | None = None
    ) -> str:
        """Choose a strategy, stamp the store and make room for next vectors; return the strategy.

        Parameters
        ----------
        strategy : str, optional
            ``"query"``, ``"gallery"``, ``"backfill"`` or ``"re-embed"``; left out, what the plan recommends.
        share : float, optional
            Of the items that a backfill embeds again; left out, the one that the plan recommends, or else the best that
            was planned. They are those farthest from the mean of their class where the plan had labels.
        seed : int
            Draws them where there are no labels.
        renormalize : bool, optional
            Bring carried vectors to length 1; left out, if the new model's are.

        Raises
        ------
        ValueError
            There is no plan, the store has changed since, it holds another space than the plan's, or another upgrade
            is under way.
        """
        plan = self._read("plan.json")
        if not plan:
            raise ValueError(f"{self.folder} must hold a plan, got none; plan first")
        table = [StrategyRow(**row) for row in plan["table"]]
        best = table[plan["recommended"]]
        strategy = strategy or best.strategy
        if strategy not in ("query", *FILLED):
            raise ValueError(f"strategy must be one of query, {', '.join(FILLED)}, got {strategy!r}")
        if strategy != "query" and not self._rewritable():
            raise ValueError(f"strategy must be query for an index of codes, got {strategy!r}")
        facts = self.table.facts()
        self._old_space(facts, plan["old_space"]["model"])
        if dict(facts.state) != plan["state"] and not facts.next_dim:
            raise ValueError("the store must be the one that was planned for, got other contents; plan again")
        rows = [r for r in table if r.strategy == strategy]
        if strategy == "backfill":
            # One map is kept: what other maps would give is no prediction.
            rows = [r for r in rows if r.aligner == _gallery_map(table)]
        row = best if best in rows else rows[0]
        if strategy == "backfill" and share is not None:
            row = min(rows, key=lambda r: abs(r.share - share))
        elif strategy == "backfill":
            share = row.share
        if share is not None and not (strategy == "backfill" and 0 < share < 1):
            raise ValueError(
                f"share must lie in (0, 1) and goes with strategy='backfill', got {share} and {strategy!r}"
            )
        if self.table.facts().space is None:
            self.table.stamp(plan["old_space"])
        if facts.next_dim is None and not facts.has_before:
            # Steps of an upgrade before this one say nothing of this one.
            self._remember(steps={}, rolling=False)
        unit = plan["new_space"]["normalized"] if renormalize is None else renormalize
        facts_of_it = {
            "strategy": strategy,
            "share": share,
            "seed": seed,
            "renormalize": unit,
            "predicted": row._asdict(),
            "bound": _lowest(table, row, share) - SLACK,
            "farthest_first": strategy == "backfill" and plan["labels"] is not None,
        }
        if strategy != "query":
            work = {"strategy": strategy, "renormalize": unit, "share": share, "seed": seed}
            if strategy != "re-embed":
                work["map_sha256"] = digest_file(self._map_path("gallery"))
            if facts_of_it["farthest_first"]:
                work["labels_sha256"] = plan.get("labels_sha256")
            if facts.next_dim is None:
                # What an upgrade before this one embedded is none of this one's.
                remove_file(self.folder / "backfill.jsonl")
                if facts_of_it["farthest_first"]:
                    self._keep_farthest(plan, share, seed)
            space = plan["new_space"] | {"normalized": unit, "by": strategy}
            self.table.prepare(plan["new_space"]["dim"], space, work)
        self._remember(**facts_of_it, checked=None)
        self._done("stamped")
        return strategy

    def _keep_farthest(self, plan: Mapping[str, Any], share: float | None, seed: int) -> None:
        """Find the items farthest from the mean of their class, in two passes over the store, and keep which they are.

        Distances are those of carried vectors as the map makes them, which is what the plan was predicted for.
        """
        assert share is not None
        place = self.folder / "plan_labels.npy"
        codes = read_array(place, ndim=1, dtype=np.int64) if place.exists() else None
        if codes is None or digest_array(codes) != plan.get("labels_sha256"):
            raise ValueError(f"{place} must hold the labels of the plan, got others or none; plan again")
        aligner, numbers = load_aligner(self._map_path("gallery"))[0], []

        def carried() -> Iterator[np.ndarray]:
            numbers.clear()
            for batch in self.table.rows():
                numbers.append(_numbers(batch.keys, seed))
                yield aligner.transform(batch.rows)

        distances = backfill_distances(carried, codes)
        farthest = np.argsort(-distances, kind="stable")[: round(share * len(codes))]
        write_array(self.folder / "backfill_keys.npy", np.sort(np.concatenate(numbers)[farthest]))

    # Fill

    def fill(self, *, batch_rows: int | None = None, verbose: bool = True) -> int:
        """Make every next vector that is not there yet, seal them, and return how many were made now.

        The first Ctrl-C ends after the batch at hand; the same call goes on from there.

        Parameters
        ----------
        batch_rows : int, optional
            Rows between two points from which it can go on; left out, 65,536, or 1,024 that an encoder makes.
        verbose : bool
            Show progress on stderr.

        Raises
        ------
        ValueError
            Nothing to fill, or the map or the store has changed.
        """
        strategy = self._strategy()
        if strategy == "query":
            raise ValueError("nothing is filled where queries are carried, got strategy 'query'; see carry_queries")
        facts = self.table.facts()
        if facts.next_dim is None:
            if facts.has_before:
                return 0
            raise ValueError("the store must have room for next vectors, got none; begin again")
        made, own = 0, ENCODED_ROWS if strategy == "re-embed" else BATCH_ROWS
        make = self._maker(strategy)
        try:
            with first_interrupt_finishes() as stop, Progress("filling", facts.n_pending, enabled=verbose) as bar:
                for batch in self.table.pending(batch_rows or own):
                    self.table.fill(batch, make(batch))
                    made += len(batch.keys)
                    bar.advance(len(batch.keys))
                    if stop.requested:
                        raise KeyboardInterrupt
                if strategy == "backfill":
                    made += self._backfill(batch_rows or BATCH_ROWS, stop)
            self.table.seal()
        finally:
            self.table.sync()
        self._remember(checked=None)
        self._done("filled")
        return made

    def _maker(self, strategy: str) -> "Maker":
        """Return what makes next vectors of a batch: the map, or the encoder."""
        told = self._read("upgrade.json")
        if strategy == "re-embed":
            encoder = self._needed_encoder("fill")
            return Maker(None, encoder, self._texts, told["renormalize"])
        aligner, _ = load_aligner(self._map_path("gallery"))
        return Maker(aligner, self.encoder, self._texts, told["renormalize"])

    def _chosen(self) -> "Chosen":
        told = self._read("upgrade.json")
        if told["strategy"] == "gallery":
            return Chosen(0.0, told["seed"])
        if told.get("farthest_first"):
            kept = read_array(self.folder / "backfill_keys.npy", ndim=1, dtype=np.int64)
            return Chosen(told["share"], told["seed"], kept)
        return Chosen(1.0 if told["strategy"] == "re-embed" else told["share"], told["seed"])

    def _backfill(self, batch_rows: int, stop: Interrupt) -> int:
        """Embed the chosen share of the items again, over the carried vectors; a journal holds what is done."""
        encoder, chosen, made = self._needed_encoder("backfill"), self._chosen(), 0
        kept = Journal(
            self.folder / "backfill.jsonl", {"share": chosen.share, "seed": chosen.seed, "model": encoder.name}
        )
        done = {key for keys in kept.done.values() for key in keys}
        maker = Maker(None, encoder, self._texts, self._read("upgrade.json")["renormalize"])
        for batch in self.table.rows(batch_rows):
            which = np.flatnonzero(chosen(batch.keys))
            which = which[[key not in done for key in _plain(batch.keys[which])]] if len(which) else which
            for part in np.array_split(which, max(1, -(-len(which) // 512))):
                if len(part):
                    small = TableBatch(batch.keys[part], batch.rows[part], self._texts(batch, part))
                    self.table.fill(small, maker(small))
                    kept.record(str(len(kept.done)), _plain(small.keys))
                    made += len(part)
                if stop.requested:
                    raise KeyboardInterrupt
        return made

    # Check

    def check(
        self,
        *,
        batch_rows: int = BATCH_ROWS,
        n_embedded: int = 256,
        tol: float | None = None,
        bound: float | None = None,
    ) -> UpgradeCheck:
        """Compare every next vector with what the map makes of the vector in use, and some with the encoder's.

        Parameters
        ----------
        n_embedded : int
            Of the vectors that an encoder made, so many are made again; without an encoder none are.
        tol : float, optional
            Largest distance from what is expected, as a share of its length; left out, 2e-3, which float16 needs.
        bound : float, optional
            Recall@k of the anchors, in their predicted sense, below which the check fails; left out, what was predicted
            less 0.02: of a share between two that were planned, the lower of both.
        """
        self._strategy()
        told, plan = self._read("upgrade.json"), self._read("plan.json")
        facts = self.table.facts()
        if facts.next_dim is None:
            raise ValueError("the store must have next vectors to check, got none")
        tol, problems = 2e-3 if tol is None else tol, []
        chosen, maker = self._chosen(), self._maker(told["strategy"])
        # Taken before the vectors are compared, so that what changes meanwhile is seen at the cut-over.
        contents = self._contents()
        anchors = self._read("anchors.json")
        place = {key: i for i, key in enumerate(anchors["keys"])}
        found = np.full((len(place), facts.next_dim), np.nan, dtype=np.float32)
        n = n_missing = n_wrong = n_compared = n_again = 0
        worst = 0.0
        with Progress("checking", facts.n_rows) as bar:
            for batch, rows in self.table.pairs(batch_rows):
                n += len(batch.keys)
                for i, key in enumerate(_plain(batch.keys)):
                    if key in place:
                        found[place[key]] = rows[i]
                there = np.isfinite(rows).all(axis=1)
                n_missing += int((~there).sum())
                embedded = chosen(batch.keys)
                expected = []
                if maker.aligner is not None:
                    which = np.flatnonzero(there & ~embedded)
                    expected.append(
                        (which, maker(TableBatch(batch.keys[which], batch.rows[which])) if len(which) else None)
                    )
                if maker.encoder is not None and n_again < n_embedded:
                    which = np.flatnonzero(there & embedded)[: n_embedded - n_again]
                    n_again += len(which)
                    expected.append((which, maker.embed(self._texts(batch, which)) if len(which) else None))
                for which, wanted in expected:
                    if wanted is not None:
                        off = _distance(rows[which], wanted, facts.unit)
                        n_compared += len(which)
                        n_wrong += int((off > tol).sum())
                        worst = max(worst, float(off.max()))
                bar.advance(len(batch.keys))
        if n != facts.n_rows:
            problems.append(f"{n} rows were read of {facts.n_rows}")
        if n_missing:
            problems.append(f"{n_missing} rows have no next vector: fill again")
        if n_wrong:
            problems.append(
                f"{n_wrong} of {n_compared} next vectors are not what is expected (off by up to {worst:.2g})"
            )
        recall, wanted = self._anchor_recall(found, plan), bound
        if wanted is None:
            # Work begun before bounds were kept has its row alone.
            wanted = told["bound"] if "bound" in told else told["predicted"]["interval"][0] - SLACK
        if not np.isnan(recall) and recall < wanted:
            problems.append(f"recall@{plan['k']} of the anchors is {recall:.3f}, below the bound of {wanted:.3f}")
        seen = UpgradeCheck(n, n_missing, n_wrong, n_compared, worst, recall, float(wanted), not problems, problems)
        self._remember(
            checked=seen._asdict()
            | {"state": dict(facts.state), "contents": contents, "recall": None if np.isnan(recall) else recall}
        )
        if seen.ok:
            self._done("checked")
        return seen

    def _contents(self) -> str | None:
        """Return a digest of all that is in use, of a store whose facts look at a sample alone; else None."""
        whole = getattr(self.table, "digest", None)
        return None if whole is None else whole()

    def _anchor_recall(self, found: np.ndarray, plan: Mapping[str, Any]) -> float:
        """Return recall@k among the next vectors of the anchors, in the sense and in folds of the plan's size."""
        new = read_members(self.folder / "anchors.npz", ["new"])["new"]
        if not np.isfinite(found).all():
            return float("nan")
        labels = np.asarray(plan["labels"]) if plan["labels"] else None
        scores = []
        for _, held in KFold(plan["n_splits"], shuffle=True, random_state=plan["seed"]).split(new):
            own, k = np.arange(len(held)), min(plan["k"], len(held) - 1)
            queries = new[held]
            hits = top_k(queries, found[held].astype(new.dtype), k, exclude=own).indices
            if labels is None:
                scores.append(recall_at_k(hits, top_k(queries, queries, k, exclude=own).indices))
            else:
                scores.append(float(label_hits(labels[held], labels[held], hits).any(axis=1).mean()))
        return float(np.mean(scores))

    # Switch

    def cut_over(self) -> None:
        """Put the next vectors in use, after a check that was good and with nothing changed since.

        Raises
        ------
        ValueError
            There was no such check, or the store has changed.
        """
        checked, facts = self._read("upgrade.json").get("checked"), self.table.facts()
        if not (facts.has_before and facts.next_dim is None):
            if not checked or not checked["ok"]:
                raise ValueError("next vectors must have passed a check before they come in use, got none that passed")
            same = checked["state"] == dict(facts.state) and not facts.n_pending
            if not same or checked.get("contents") != self._contents():
                raise ValueError(
                    "the store must not change between check and cut-over, got other contents; fill and check again"
                )
        self.table.switch("cut over")
        self._done("cut over")

    def roll_back(self) -> None:
        """Put the old vectors in use again; done once, it does nothing."""
        begun = self._read("upgrade.json").get("rolling", False)
        if not begun or self.table.facts().has_before:
            if self.table.facts().has_before:
                # Killed after the switch, a repeat finds nothing to undo and must know why.
                self._remember(rolling=True)
            self.table.switch("roll back")
        self._remember(checked=None)
        self._done("rolled back")

    def forget(self) -> None:
        """Remove the vectors that are not in use: the old ones after a cut-over, else the next ones."""
        self.table.switch("forget")
        for name in ("backfill.jsonl", "backfill_keys.npy", "upgrade.json"):
            remove_file(self.folder / name)

    def carry_queries(self) -> Aligner:
        """Return the map from the new space to the old one, for strategy ``"query"``: queries go through it."""
        return load_aligner(self._map_path("query"))[0]


class Maker:
    """Makes next vectors of a batch: by the map where there is one, else by the encoder."""

    def __init__(self, aligner: Aligner | None, encoder: Encoder | None, texts: Any, unit: bool):
        self.aligner, self.encoder, self._texts, self._unit = aligner, encoder, texts, unit

    def __call__(self, batch: TableBatch) -> np.ndarray:
        """Return next vectors (b, dim) in the float width of the batch."""
        if self.aligner is None:
            return self.embed(self._texts(batch, np.arange(len(batch.keys))))
        return self._scaled(self.aligner.transform(batch.rows))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return what the encoder makes of texts, (b, dim)."""
        assert self.encoder is not None
        return self._scaled(self.encoder(texts))

    def _scaled(self, rows: np.ndarray) -> np.ndarray:
        if not self._unit:
            return rows
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        return rows / np.where(norms > 0, norms, 1)


class Chosen:
    """Which items are embedded again: a share of all keys by a hash of the key, or those of ``kept`` hashes, sorted."""

    def __init__(self, share: float, seed: int, kept: np.ndarray | None = None):
        self.share, self.seed, self._kept = share, seed, kept

    def __call__(self, keys: np.ndarray) -> np.ndarray:
        """Return whether each key (b,) is among them."""
        if self._kept is not None:
            numbers = _numbers(keys, self.seed)
            at = np.searchsorted(self._kept, numbers)
            return np.append(self._kept, -1)[at] == numbers
        if self.share in (0.0, 1.0):
            return np.full(len(keys), bool(self.share))
        return _numbers(keys, self.seed) < self.share * 2**56


def _numbers(keys: np.ndarray, seed: int) -> np.ndarray:
    """Return a whole number below 2^56 for each key (b,) that hangs on key and seed alone."""
    digests = (hashlib.blake2b(json.dumps([seed, key]).encode(), digest_size=7).digest() for key in _plain(keys))
    return np.fromiter((int.from_bytes(digest) for digest in digests), np.int64, len(keys))


def _gallery_map(table: Sequence[StrategyRow]) -> str:
    """Return the family of the map that is kept to carry the gallery."""
    return next(row.aligner for row in table if row.strategy == "gallery")


def _lowest(table: Sequence[StrategyRow], row: StrategyRow, share: float | None) -> float:
    """Return the lower end of what was predicted: of a share between two planned ones, the lower of theirs."""
    if share is None or share == row.share:
        return row.interval[0]
    planned = [
        r
        for r in table
        if (r.strategy in ("gallery", "backfill") and r.aligner == row.aligner) or r.strategy == "re-embed"
    ]
    below = max((r for r in planned if r.share <= share), key=lambda r: r.share)
    above = min((r for r in planned if r.share >= share), key=lambda r: r.share)
    return min(below.interval[0], above.interval[0])


def _plain(keys: np.ndarray) -> list[Any]:
    """Return keys as ints or text, which JSON can say."""
    return [key if isinstance(key, int | str) else str(key) for key in keys.tolist()]


def _distance(rows: np.ndarray, wanted: np.ndarray, unit: bool) -> np.ndarray:
    """Return how far rows lie from what is wanted, as a share of its length; of directions where lengths are gone."""
    wanted = np.asarray(wanted, dtype=np.float64)
    norms = np.linalg.norm(wanted, axis=1)
    rows = np.asarray(rows, dtype=np.float64)
    if unit:
        wanted = wanted / np.where(norms > 0, norms, 1)[:, None]
        norms = np.ones(len(wanted))
    return np.linalg.norm(rows - wanted, axis=1) / np.where(norms > 0, norms, 1)
