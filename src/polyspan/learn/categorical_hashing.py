"""Categorical columns to row numbers of one hashed table: no vocabulary, the same numbers everywhere."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin

from ._lookup_plan import FeatureSpec, as_specs, check_table, lookup_plan, rows_of
from ._table_columns import read_columns
from ._value_keys import value_keys


class CategoricalHasher(TransformerMixin, BaseEstimator):
    r"""Turn columns of text, numbers and missing values into rows of one table, (n, lookups) int64, without learning.

    Lookup c of column t sends the key x of a value to :math:`\lfloor M\, g(x \oplus s_{t,c}) / 2^{64}\rfloor`: the
    rows that :class:`~polyspan.learn.UnifiedEmbedding` of the same names, table and seed reads. A number depends on the
    value, the column's name, the lookup and the seed: on no other column, on no other row, on no process. Values that
    were never seen need nothing; None, NaN and null share a row of their own in each column.

    A whole number is one value in all its forms: 1, 1.0, True and "1" (but not "01" or "1.0"). Bytes equal the text of
    the same UTF-8. A decimal, a date, a moment or a duration is one value in every scale, unit and library: 1.50 is
    1.5, midnight is its date, and moments in zones are compared in UTC. Two values of one column may share a row, the
    more so the more values there are beside M.
    Source: catalogue entry ``unified-embedding``.

    Parameters
    ----------
    n_embeddings : int, default=2**18
        Rows M of the table, from 2 to 2³¹ - 1.
    n_lookups : int or dict of str to int, default=1
        Rows a value, by column where they differ; columns not named take 1.
    salt_groups : dict of str to str, optional
        Columns of one group send equal values to equal rows.
    n_shards : int, default=1
        Ranges of equal size that lookups are spread over.
    seed : int, default=0
    absent : {"error", "missing"}, default="error"
        What to do when a column of the fit is not there later.

    Attributes
    ----------
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Names of the columns, only where they have names; columns of an array are called x0, x1, ...
    """

    def __init__(self, n_embeddings=2**18, *, n_lookups=1, salt_groups=None, n_shards=1, seed=0, absent="error"):
        self.n_embeddings = n_embeddings
        self.n_lookups = n_lookups
        self.salt_groups = salt_groups
        self.n_shards = n_shards
        self.seed = seed
        self.absent = absent

    def fit(self, X, y=None) -> "CategoricalHasher":
        """Take note of the columns; nothing is learnt from their values.

        Raises
        ------
        ValueError
            A parameter is out of its range, or a column's name stands there twice.
        """
        columns, named = read_columns(self, X, reset=True)
        self._plan(list(columns), named)
        return self

    def transform(self, X) -> np.ndarray:
        """Return row numbers, (n, lookups) int64: the lookups of the first column, then of the second.

        Raises
        ------
        TypeError
            A value is neither text nor number nor date.
        ValueError
            A column is missing and ``absent`` is "error", or holds lists.
        """
        fitted = hasattr(self, "n_features_in_")
        columns, _ = read_columns(self, X, reset=False, absent=self.absent if fitted else None)
        plan = self._plan(list(columns), False)
        parts = []
        for column, (name, values) in enumerate(columns.items()):
            mine = plan._replace(**{k: getattr(plan, k)[plan.column == column] for k in plan._fields})
            mine = mine._replace(column=np.zeros_like(mine.column))
            found = value_keys(values, name)
            keys = found.distinct.reshape(-1, 1)
            # New pages of memory cost as much as the arithmetic: one row number takes its key's place.
            rows = rows_of(keys, mine, out=keys if len(mine.salt) == 1 else None)
            # Of an encoded column each distinct value is hashed once, and its rows are handed out by code.
            parts.append(rows if found.codes is None else _handed_out(rows, found.codes))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)

    def _plan(self, names: list[str], named: bool):
        if self.absent not in ("error", "missing"):
            raise ValueError(f"absent must be 'error' or 'missing', got {self.absent!r}")
        specs = column_specs(names, self.n_lookups, self.salt_groups, strict=named)
        check_table(self.n_embeddings, self.n_shards, sum(s.n_lookups for s in specs.values()), "multiplex")
        return lookup_plan(specs, self.n_embeddings, n_shards=self.n_shards, seed=self.seed)

    def get_feature_names_out(self, input_features=None) -> np.ndarray:
        """Return ``<column>_<lookup>`` for every column of the result."""
        from sklearn.utils.validation import _check_feature_names_in

        names = [str(name) for name in _check_feature_names_in(self, input_features)]
        specs = column_specs(names, self.n_lookups, self.salt_groups)
        return np.array([f"{name}_{c}" for name, s in specs.items() for c in range(s.n_lookups)], dtype=object)

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        tags.input_tags.allow_nan = tags.input_tags.categorical = tags.input_tags.string = True
        tags.transformer_tags.preserves_dtype = []
        return tags


def _handed_out(rows: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Return ``rows[codes]``; NumPy takes single numbers several times as fast as rows of one."""
    return rows[:, 0][codes][:, None] if rows.shape[1] == 1 else rows[codes]


def column_specs(
    names: list[str],
    n_lookups: int | Mapping[str, int],
    salt_groups: Mapping[str, str] | None,
    *,
    max_len: Mapping[str, int] | None = None,
    combiner: str = "mean",
    sizes: Mapping[str, int] | None = None,
    strict: bool = True,
) -> dict[str, FeatureSpec]:
    """Return the specs of columns from parameters that are given by column.

    Raises
    ------
    ValueError
        A parameter names a column that is not there (``strict``), or is out of its range.
    """
    by_name: Mapping[str, Any] = n_lookups if isinstance(n_lookups, Mapping) else dict.fromkeys(names, n_lookups)
    for parameter, given in (("n_lookups", by_name), ("salt_groups", salt_groups or {})):
        strange = [name for name in given if name not in names]
        if strict and strange:
            raise ValueError(f"{parameter} must name columns of X, got {strange[:5]}")
    return as_specs(
        {
            name: FeatureSpec(
                by_name.get(name, 1),
                (salt_groups or {}).get(name),
                (max_len or {}).get(name),
                combiner,
                (sizes or {}).get(name),
            )
            for name in names
        }
    )
