"""One embedding table for all categorical features: each reads it through a hash of its own."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from polyspan.io import load_fitted, save_fitted

from ._embedding_gather import gather_rows
from ._lookup_plan import SCHEMES, FeatureSpec, as_specs, check_table, lookup_plan, rows_of_tensor
from ._older_files import all_entries, check_names
from ._value_keys import PAD, value_keys


class Collisions(NamedTuple):
    """How often the values of one feature share rows, over a sample of its distinct values.

    ``n_values`` are the distinct values. ``same_share`` in [0, 1] are those whose rows, all of them, another value of
    the feature has as well: no reader can tell these apart. ``others_share`` in [0, 1] are rows read by this feature
    that another feature reads too: a reader of the feature's own can learn to look past those.
    """

    n_values: int
    same_share: float
    others_share: float


class UnifiedEmbedding(nn.Module):
    r"""Embed many categorical features, (\*batch, columns) keys to (\*batch, output_dim), from one table of M rows.

    Feature t with L_t lookups reads rows :math:`h_{t,c}(x) = \lfloor M\, g(x \oplus s_{t,c}) / 2^{64} \rfloor` for
    c < L_t, where g mixes 64 bits and the salt s comes from the feature's name; the rows stand side by side. So there
    is no vocabulary, new values need nothing, and a feature gets width by its number of lookups:

    .. math:: e(x_1..x_T) = \big[\, E[h_{1,0}(x_1)], \ldots, E[h_{1,L_1-1}(x_1)],\; E[h_{2,0}(x_2)], \ldots \big].

    Values of different features that meet in a row do little harm as long as each feature has **readers of its own**:
    a linear or cross layer over the concatenation turns their weights apart until one does not see the other. It breaks
    where features share a reader: embeddings that are summed, second-order factorisation machines, attention with
    shared projections. Values of one feature that share all rows can never be told apart, as in any hashed table.

    Keys are int64: whole numbers stand for themselves, other values go through
    :class:`~polyspan.learn.CategoricalHasher` or :meth:`keys`. Features of one ``salt_group`` send equal keys to equal
    rows, which shares what is learnt between columns of one vocabulary.
    Source: catalogue entry ``unified-embedding``.

    Parameters
    ----------
    features : mapping of str to int or FeatureSpec
        Names and numbers of lookups, in the order of the output.
    num_embeddings : int
        Rows M of the table, from 2 to 2³¹ - 1; ignored by "collisionless".
    chunk_dim : int, default=16
        Width d of a row.
    n_shards : int, default=1
        Ranges of equal size that lookups are spread over, for tables that are cut up between machines.
    seed : int, default=0
        Of the hashes.
    sparse : bool, default=False
        Give the table sparse gradients, for SparseAdam and the like.
    init : float, default=0.05
        Rows start uniform in (-init, init). A spread near 1 costs accuracy.
    scheme : str, default="multiplex"
        "multiplex" shares all rows. "hash" gives each feature rows in proportion to its vocabulary, and
        "collisionless" a row a value: the two that it is compared with. "multihash" adds two rows, "qr" multiplies a
        row of the first half by one plus a row of the second; "split-multihash" and "split-qr" do so in rows of the
        feature's own.
    vocabularies : mapping of str to array of int64, optional
        Keys of each feature, for "collisionless"; any other key shares one more row.
    generator : torch.Generator, optional
        Source of the rows; torch's global one where not given.

    Attributes
    ----------
    weight : Parameter of shape (num_embeddings, chunk_dim)
    output_dim : int
    """

    column: Tensor
    salt: Tensor
    size: Tensor
    offset: Tensor

    def __init__(
        self,
        features: Mapping[str, int | FeatureSpec],
        num_embeddings: int,
        chunk_dim: int = 16,
        *,
        n_shards: int = 1,
        seed: int = 0,
        sparse: bool = False,
        init: float | int = 0.05,
        scheme: str = "multiplex",
        vocabularies: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.features = as_specs(features)
        if chunk_dim < 1:
            raise ValueError(f"chunk_dim must be at least 1, got {chunk_dim}")
        if not init > 0:
            raise ValueError(f"init must be above 0, got {init}")
        self.vocabularies: dict[str, np.ndarray] = {}
        if scheme == "collisionless":
            missing = [name for name in self.features if name not in (vocabularies or {})]
            if missing or vocabularies is None:
                raise ValueError(f"vocabularies must hold the keys of every feature, missing {missing[:5]}")
            self.vocabularies = {name: np.unique(np.asarray(vocabularies[name], np.int64)) for name in self.features}
            num_embeddings = sum(
                (len(self.vocabularies[name]) + 1) * spec.n_lookups for name, spec in self.features.items()
            )
        check_table(num_embeddings, n_shards, sum(s.n_lookups for s in self.features.values()), scheme)
        self.num_embeddings, self.chunk_dim, self.n_shards, self.seed = num_embeddings, chunk_dim, n_shards, seed
        self.sparse, self.init, self.scheme = sparse, float(init), scheme
        self.weight = nn.Parameter(torch.empty(num_embeddings, chunk_dim, device=device, dtype=dtype))
        for name in ("column", "salt", "size", "offset"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64, device=device), persistent=False)
        self._lay_out()
        self.reset_parameters(generator)

    def _lay_out(self) -> None:
        """Put the plan of all lookups where the table is; it follows from the names, and is not part of the state."""
        at = self.weight.device
        self._column_names = [name for name, spec in self.features.items() for _ in range(spec.length)]
        self._listed = any(spec.max_len is not None for spec in self.features.values())
        if self.scheme == "collisionless":
            start = 0
            for i, (name, spec) in enumerate(self.features.items()):
                vocabulary = torch.as_tensor(self.vocabularies[name]).to(at)
                self.register_buffer(f"vocabulary_{i}", vocabulary, persistent=False)
                starts = start + torch.arange(spec.n_lookups, device=at) * (len(vocabulary) + 1)
                self.register_buffer(f"starts_{i}", starts, persistent=False)
                start += spec.n_lookups * (len(vocabulary) + 1)
            return
        plan = lookup_plan(
            self.features, self.num_embeddings, scheme=self.scheme, n_shards=self.n_shards, seed=self.seed
        )
        for name, part in plan._asdict().items():
            setattr(self, name, torch.as_tensor(part).to(at))
        # One lookup a column, as mostly: the keys are read as they stand.
        self._in_order = np.array_equal(plan.column, np.arange(self.num_columns))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw every row anew."""
        self.weight.uniform_(-self.init, self.init, generator=generator)

    @property
    def num_columns(self) -> int:
        """Columns of a matrix of keys: one a feature, ``max_len`` for lists."""
        return len(self._column_names)

    @property
    def widths(self) -> dict[str, int]:
        """Width of each feature's part of the output."""
        return {
            name: spec.n_lookups * self.chunk_dim * (spec.length if spec.combiner == "none" else 1)
            for name, spec in self.features.items()
        }

    @property
    def output_dim(self) -> int:
        """Width of the output."""
        return sum(self.widths.values())

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return self.weight.numel() * self.weight.element_size()

    def keys(self, columns: Mapping[str, Any]) -> Tensor:
        """Return the matrix of keys, (n, num_columns) int64 on the table's device, of columns of raw values.

        Parameters
        ----------
        columns : mapping of str to array, list, Arrow column or series
            More columns than the features are ignored; a DataFrame or an Arrow table is such a mapping.

        Raises
        ------
        ValueError
            A feature is missing, or columns differ in length.
        """
        made = []
        for name, spec in self.features.items():
            try:
                values = columns[name]
            except KeyError:
                raise ValueError(f"columns must hold every feature, {name!r} is missing") from None
            found = value_keys(values, name, spec.max_len).dense()
            made.append(found.reshape(len(found), spec.length))
        if len({len(part) for part in made}) > 1:
            raise ValueError(f"columns must be of one length, got {[len(part) for part in made]}")
        return torch.from_numpy(np.concatenate(made, axis=1)).to(self.weight.device)

    def _matrix(self, keys: Mapping[str, Tensor] | Tensor) -> Tensor:
        if isinstance(keys, Tensor):
            matrix = keys
        else:
            missing = [name for name in self.features if name not in keys]
            if missing:
                raise ValueError(f"keys must hold every feature, missing {missing[:5]}")
            parts = [keys[name] if spec.max_len else keys[name].unsqueeze(-1) for name, spec in self.features.items()]
            for (name, spec), part in zip(self.features.items(), parts, strict=True):
                if part.shape[-1] != spec.length:
                    raise ValueError(f"keys of {name!r} must be {spec.length} a row, got {part.shape[-1]}")
            matrix = torch.cat(parts, dim=-1)
        if matrix.shape[-1] != self.num_columns:
            raise ValueError(f"keys must have {self.num_columns} columns, got {matrix.shape[-1]}")
        if matrix.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"keys must be int64, got {matrix.dtype}; other values go through CategoricalHasher")
        return matrix.long()

    def rows(self, keys: Mapping[str, Tensor] | Tensor) -> Tensor:
        r"""Return which rows are read, (\*batch, s) int64: by feature, place in its list, lookup, row of the lookup."""
        matrix = self._matrix(keys)
        if self.scheme != "collisionless":
            keys = matrix if self._in_order else matrix[..., self.column]
            return rows_of_tensor(keys, self.salt, self.size, self.offset)
        parts, at = [], 0
        for i, spec in enumerate(self.features.values()):
            known, starts = getattr(self, f"vocabulary_{i}"), getattr(self, f"starts_{i}")
            mine = matrix[..., at : at + spec.length].contiguous()
            at += spec.length
            place = torch.searchsorted(known, mine)
            seen = torch.cat([known, known.new_zeros(1)])[place] == mine
            place = torch.where(seen & (place < len(known)), place, len(known))
            parts.append((place.unsqueeze(-1) + starts).flatten(-2))
        return torch.cat(parts, dim=-1)

    def _chunks(self, matrix: Tensor) -> Tensor:
        r"""Return one chunk a lookup, (\*batch, lookups, chunk_dim)."""
        found = gather_rows(self.weight, self.rows(matrix), sparse=self.sparse)
        base = SCHEMES[self.scheme][1]
        if base == "sum":
            return found[..., 0::2, :] + found[..., 1::2, :]
        return found[..., 0::2, :] * (1 + found[..., 1::2, :]) if base == "product" else found

    def by_feature(self, keys: Mapping[str, Tensor] | Tensor) -> dict[str, Tensor]:
        r"""Return each feature's embedding, (\*batch, width), or (\*batch, max_len, width) of uncombined lists."""
        matrix = self._matrix(keys)
        chunks = self._chunks(matrix)
        made, column, at = {}, 0, 0
        for name, spec in self.features.items():
            mine = chunks[..., at : at + spec.length * spec.n_lookups, :]
            at += spec.length * spec.n_lookups
            if spec.max_len is None:
                made[name] = mine.flatten(-2)
            else:
                here = matrix[..., column : column + spec.length] != PAD
                values = mine.unflatten(-2, (spec.length, spec.n_lookups)).flatten(-2) * here.unsqueeze(-1)
                if spec.combiner == "none":
                    made[name] = values
                else:
                    total = values.sum(dim=-2)
                    count = here.sum(dim=-1, keepdim=True).clamp(min=1)
                    made[name] = total / count if spec.combiner == "mean" else total
            column += spec.length
        return made

    def forward(self, keys: Mapping[str, Tensor] | Tensor) -> Float[Tensor, "*batch D"]:
        r"""Return all embeddings side by side.

        Parameters
        ----------
        keys : mapping of str to int64 tensor, or int64 tensor of shape (\*batch, num_columns)
            Of a mapping: (\*batch,) for a single value, (\*batch, max_len) for a list, filled up with
            ``torch.iinfo(torch.int64).min``. An empty list gives zeros.

        Raises
        ------
        ValueError
            A feature is missing, a width is another, or keys are no integers.
        """
        if self._listed:
            specs = self.features
            parts = self.by_feature(keys)
            return torch.cat(
                [part.flatten(-2) if specs[n].combiner == "none" else part for n, part in parts.items()], dim=-1
            )
        return self._chunks(self._matrix(keys)).flatten(-2)

    def add_feature(self, name: str, spec: int | FeatureSpec = 1) -> None:
        """Let one more feature read the table; it stands last, and no row of another feature moves.

        Raises
        ------
        ValueError
            There is such a feature already, or the scheme gives features rows of their own.
        """
        if name in self.features:
            raise ValueError(f"name must be a new feature, got {name!r}")
        if SCHEMES[self.scheme][0] != "shared":
            raise ValueError(f"scheme must share all rows to take a feature later, got {self.scheme!r}")
        self.features |= as_specs({name: spec})
        self._lay_out()

    def collision_report(self, columns: Mapping[str, Any]) -> dict[str, Collisions]:
        """Say for each feature how many of the values in ``columns`` share rows; values are as for :meth:`keys`."""
        rows: dict[str, np.ndarray] = {}
        step = 1 if SCHEMES[self.scheme][1] == "hash" else 2
        at = 0
        for name, spec in self.features.items():
            if name not in columns:
                raise ValueError(f"columns must hold every feature, {name!r} is missing")
            distinct = np.unique(value_keys(columns[name], name, spec.max_len).dense())
            matrix = torch.zeros(len(distinct), self.num_columns, dtype=torch.int64, device=self.weight.device)
            start = self._column_names.index(name)
            distinct = distinct[distinct != PAD]
            matrix = matrix[: len(distinct)]
            matrix[:, start] = torch.from_numpy(distinct).to(matrix)
            width = spec.n_lookups * step
            rows[name] = self.rows(matrix)[:, at : at + width].cpu().numpy()
            at += spec.length * width
        return {
            name: Collisions(
                len(mine), _repeated_share(mine), _met_share(mine, [r for n, r in rows.items() if n != name])
            )
            for name, mine in rows.items()
        }

    def reader_overlap(self, reader: nn.Linear | Tensor) -> np.ndarray:
        r"""Return how much the features' readers see of one another, (T, T) in [0, 1] with ones on the diagonal.

        The reader's weight, (out, at least output_dim), is cut into blocks :math:`A_t` of d columns, one below the
        other where a feature has several chunks. The overlap of t and u is :math:`\lVert A_t A_u^\top\rVert_F` over
        the geometric mean of :math:`\lVert A_t A_t^\top\rVert_F` and :math:`\lVert A_u A_u^\top\rVert_F`: the
        absolute cosine for readers of one row. Near 0, neither sees what the other writes into a shared row.

        Raises
        ------
        ValueError
            The reader has too few columns.
        """
        weight = (reader.weight if isinstance(reader, nn.Linear) else reader).detach().double().cpu()
        if weight.ndim != 2 or weight.shape[1] < self.output_dim:
            raise ValueError(f"reader must have at least {self.output_dim} columns, got shape {tuple(weight.shape)}")
        cut = torch.split(weight[:, : self.output_dim], list(self.widths.values()), dim=1)
        blocks = [part.reshape(-1, self.chunk_dim) for part in cut]
        grams = torch.stack([(block.T @ block) for block in blocks]).flatten(1)
        # ‖A Bᵀ‖² is the inner product of AᵀA and BᵀB.
        inner = (grams @ grams.T).clamp(min=0)
        own = inner.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
        return (inner / (own[:, None] * own[None, :]).sqrt()).sqrt().numpy()

    def config(self) -> dict[str, Any]:
        """Return what makes this layer again, in JSON types; features are a list, because their order counts."""
        return {
            "features": [[name, asdict(spec)] for name, spec in self.features.items()],
            "num_embeddings": self.num_embeddings,
            "chunk_dim": self.chunk_dim,
            "n_shards": self.n_shards,
            "seed": self.seed,
            "sparse": self.sparse,
            "init": self.init,
            "scheme": self.scheme,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **options: Any) -> "UnifiedEmbedding":
        """Make a layer from :meth:`config`; ``options`` are vocabularies, generator, device and dtype."""
        features = {name: FeatureSpec(**spec) for name, spec in config["features"]}
        arguments: dict[str, Any] = {**config, "features": features, **options}
        return cls(**arguments)

    def save(self, path: Path | str) -> Path:
        """Write table and configuration to one .safetensors file, atomically."""
        arrays = {f"vocabulary {i}": v for i, v in enumerate(self.vocabularies.values())}
        arrays["weight"] = self.weight.detach().cpu().numpy()
        return save_fitted(Path(path), kind=type(self).__name__, arrays=arrays, params=self.config())

    @classmethod
    def load(cls, path: Path | str) -> "UnifiedEmbedding":
        """Read a layer that :meth:`save` wrote.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        found = load_fitted(Path(path), kind=cls.__name__)
        with all_entries(Path(path), found.header):
            names = [name for name, _ in found.params["features"]]
            every = {n: found.arrays.get(f"vocabulary {i}") for i, n in enumerate(names)}
            words = {name: keys for name, keys in every.items() if keys is not None}
            weight = torch.from_numpy(np.array(found.arrays["weight"]))
            made = cls.from_config(found.params, vocabularies=words or None, device="meta", dtype=weight.dtype)
            check_names({"weight": made.weight}, {"weight": weight})
        made.weight = nn.Parameter(weight)
        made._lay_out()
        return made

    def extra_repr(self) -> str:
        return (
            f"{len(self.features)} features, num_embeddings={self.num_embeddings}, chunk_dim={self.chunk_dim}, "
            f"scheme={self.scheme!r}"
        )


def _repeated_share(rows: np.ndarray) -> float:
    """Share of rows (v, k) that stand there more than once."""
    if not len(rows):
        return 0.0
    _, place, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    return float(np.mean(counts[place.reshape(-1)] > 1))


def _met_share(rows: np.ndarray, others: Sequence[np.ndarray]) -> float:
    """Share of the distinct rows that are among the others' as well."""
    mine = np.unique(rows)
    if not (len(mine) and others):
        return 0.0
    return float(np.isin(mine, np.concatenate([other.reshape(-1) for other in others])).mean())
