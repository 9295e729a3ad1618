"""Move a vector store to another embedding model: plan, stamp, fill, check, cut over, roll back."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from sklearn.model_selection import KFold

from polyspan.align import Aligner, backfill_distances, load_aligner
from polyspan.align.upgrade_plan import StrategyRow
from polyspan.io import digest_array, digest_file, read_array, read_members, remove_file, write_array
from polyspan.linalg import label_hits, recall_at_k, top_k
from polyspan.run import Interrupt, Journal, Progress, first_interrupt_finishes

from ._next_rows import AGREES, Chosen, Maker, key_numbers, plain_keys, row_distances
from ._upgrade_planning import PlannedUpgrade
from .vector_tables import BATCH_ROWS, ENCODED_ROWS

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


class Upgrade(PlannedUpgrade):
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
        A store whose ``facts`` look at a sample alone has ``digest()`` as well, which reads all: it is called at the
        check and at the cut-over. One that can keep writers out, or see that there were some, has
        ``cut_over_if(unchanged)``: it calls ``unchanged()``, which raises ``ValueError`` where the store is not as it
        was at the check and returns that digest (or None), and cuts over. One whose keys are row numbers says
        ``numbered = True``.
    encoder : Encoder, optional
        The new model; needed to plan, and to fill where items are embedded again.
    texts : mapping of id to str, or sequence of str, optional
        What was embedded, where the store does not hold it. The ids of a file are those of its id column, or of an
        index with ids of its own; where it has none, they are row numbers. A sequence has one a row, for files alone.

    Source: catalogue entry ``canonicalize``; the order of a backfill after ``lambda-orthogonality``.
    """

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
                work["map_sha256"] = facts_of_it["map_sha256"] = digest_file(self._map_path("gallery"))
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
                numbers.append(key_numbers(batch.keys, seed))
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
            Nothing to fill, the map or the store has changed, or the encoder is not the one that was planned for.
        """
        strategy = self._strategy()
        if strategy == "query":
            raise ValueError("nothing is filled where queries are carried, got strategy 'query'; see carry_queries")
        facts = self.table.facts()
        if facts.next_dim is None:
            if facts.has_before:
                return 0
            raise ValueError("the store must have room for next vectors, got none; begin again")
        self._check_texts(facts.n_rows)
        made, own = 0, ENCODED_ROWS if strategy == "re-embed" else BATCH_ROWS
        make, kept = self._maker(strategy), self._backfilled() if strategy == "backfill" else None
        # Rows that changed after they were embedded are carried first, and embedded again after that.
        done, stale = _journalled(kept), set()
        try:
            with first_interrupt_finishes() as stop, Progress("filling", facts.n_pending, enabled=verbose) as bar:
                for batch in self.table.pending(batch_rows or own):
                    self.table.fill(batch, make(batch))
                    if strategy == "re-embed":
                        # What an encoder made is not made twice: a store may keep much in memory until then.
                        self.table.sync()
                    made += len(batch.keys)
                    stale |= done.intersection(plain_keys(batch.keys)) if done else set()
                    bar.advance(len(batch.keys))
                    if stop.requested:
                        raise KeyboardInterrupt
                if kept is not None:
                    made += self._backfill(kept, done - stale, batch_rows or BATCH_ROWS, stop)
            self.table.seal()
        finally:
            self.table.sync()
        self._remember(checked=None)
        self._done("filled")
        return made

    def _maker(self, strategy: str) -> "Maker":
        """Return what makes next vectors of a batch: the map, or the encoder."""
        encoder = self._planned_encoder("fill") if strategy == "re-embed" else None
        return Maker(self._kept_map(strategy), encoder, self._texts, self._read("upgrade.json")["renormalize"])

    def _kept_map(self, strategy: str) -> Aligner | None:
        """Return the map that carries the gallery, which must be the one that the upgrade was begun with."""
        if strategy == "re-embed":
            return None
        place, begun = self._map_path("gallery"), self._read("upgrade.json").get("map_sha256")
        if begun is not None and digest_file(place) != begun:
            raise ValueError(
                f"{place} must hold the map that the upgrade was begun with, got another; forget and begin"
            )
        return load_aligner(place)[0]

    def _chosen(self) -> "Chosen":
        told = self._read("upgrade.json")
        if told["strategy"] == "gallery":
            return Chosen(0.0, told["seed"])
        if told.get("farthest_first"):
            kept = read_array(self.folder / "backfill_keys.npy", ndim=1, dtype=np.int64)
            return Chosen(told["share"], told["seed"], kept)
        return Chosen(1.0 if told["strategy"] == "re-embed" else told["share"], told["seed"])

    def _backfilled(self) -> Journal:
        """Return the journal of what was embedded again: entries of keys."""
        chosen, encoder = self._chosen(), self._planned_encoder("backfill")
        return Journal(
            self.folder / "backfill.jsonl", {"share": chosen.share, "seed": chosen.seed, "model": encoder.name}
        )

    def _backfill(self, kept: Journal, done: set[Any], batch_rows: int, stop: Interrupt) -> int:
        """Embed the chosen share of the items again, over the carried vectors; the journal holds what is done."""
        encoder, chosen, made = self._needed_encoder("backfill"), self._chosen(), 0
        maker = Maker(None, encoder, self._texts, self._read("upgrade.json")["renormalize"])
        for batch in self.table.rows(batch_rows):
            which = np.flatnonzero(chosen(batch.keys))
            which = which[[key not in done for key in plain_keys(batch.keys[which])]] if len(which) else which
            for part in np.array_split(which, max(1, -(-len(which) // 512))):
                if len(part):
                    small = batch.part(part)
                    self.table.fill(small, maker(small))
                    kept.record(str(len(kept.done)), plain_keys(small.keys))
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

        Raises
        ------
        ValueError
            There are no next vectors, a number is out of range, the map has changed, or the encoder is not the one that
            was planned for.
        """
        strategy = self._strategy()
        if n_embedded < 0:
            raise ValueError(f"n_embedded must be at least 0, got {n_embedded}")
        if tol is not None and not tol >= 0:
            raise ValueError(f"tol must be at least 0, got {tol}")
        if bound is not None and not 0 <= bound <= 1:
            raise ValueError(f"bound must lie in [0, 1], got {bound}")
        told, plan = self._read("upgrade.json"), self._read("plan.json")
        facts = self.table.facts()
        if facts.next_dim is None:
            raise ValueError("the store must have next vectors to check, got none")
        tol, problems = AGREES if tol is None else tol, []
        asked = self.encoder is not None and n_embedded > 0 and strategy in ("backfill", "re-embed")
        encoder = self._planned_encoder("check") if asked else None
        chosen = self._chosen()
        maker = Maker(self._kept_map(strategy), encoder, self._texts, told["renormalize"])
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
                for i, key in enumerate(plain_keys(batch.keys)):
                    if key in place:
                        found[place[key]] = rows[i]
                there = np.isfinite(rows).all(axis=1)
                n_missing += int((~there).sum())
                embedded = chosen(batch.keys)
                expected = []
                if maker.aligner is not None:
                    which = np.flatnonzero(there & ~embedded)
                    expected.append((which, maker(batch.part(which)) if len(which) else None))
                if maker.encoder is not None and n_again < n_embedded:
                    which = np.flatnonzero(there & embedded)[: n_embedded - n_again]
                    n_again += len(which)
                    expected.append((which, maker.embed(self._texts(batch.part(which))) if len(which) else None))
                for which, wanted in expected:
                    if wanted is not None:
                        off = row_distances(rows[which], wanted, facts.unit)
                        n_compared += len(which)
                        n_wrong += int((off > tol).sum())
                        worst = max(worst, float(off.max()))
                bar.advance(len(batch.keys))
        if "filled" not in self.steps:
            problems.append("the fill has not come to its end: fill again")
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
        # Plans made before metrics were kept are by cosine.
        scores, metric = [], plan.get("metric", "cosine")
        for _, held in KFold(plan["n_splits"], shuffle=True, random_state=plan["seed"]).split(new):
            own, k = np.arange(len(held)), min(plan["k"], len(held) - 1)
            queries = new[held]
            hits = top_k(queries, found[held].astype(new.dtype), k, metric=metric, exclude=own).indices
            if labels is None:
                scores.append(recall_at_k(hits, top_k(queries, queries, k, metric=metric, exclude=own).indices))
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
        facts = self.table.facts()
        guarded = getattr(self.table, "cut_over_if", None)
        if facts.has_before and facts.next_dim is None:
            self.table.switch("cut over")
        elif guarded is not None:
            guarded(self._refuse_changes)
        else:
            self._refuse_changes()
            self.table.switch("cut over")
        self._done("cut over")

    def _refuse_changes(self) -> str | None:
        """Raise where the store is not as it was at a check that was good; return the digest of its contents."""
        checked, facts = self._read("upgrade.json").get("checked"), self.table.facts()
        if not checked or not checked["ok"]:
            raise ValueError("next vectors must have passed a check before they come in use, got none that passed")
        same = checked["state"] == dict(facts.state) and not facts.n_pending
        contents = self._contents() if same else None
        if not same or checked.get("contents") != contents:
            raise ValueError(
                "the store must not change between check and cut-over, got other contents; fill and check again"
            )
        return contents

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


def _journalled(kept: Journal | None) -> set[Any]:
    """Return the keys that a journal of a backfill holds."""
    return set() if kept is None else {key for keys in kept.done.values() for key in keys}


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
