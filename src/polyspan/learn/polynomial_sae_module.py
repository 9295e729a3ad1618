"""The network of a sparse autoencoder whose decoder multiplies features, as a torch module."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from polyspan.linalg import nearest_isometry, random_stiefel

from ._cholesky_qr import cholesky_qr, cholesky_qr_
from ._sae_codes import SparseCodes, above, batch_top_k, encoded, gradients_by_hand, jump, polynomial, top_k

ACTIVATIONS = ("topk", "batchtopk", "matryoshka", "jumprelu")
RETRACTIONS = ("qr", "polar")
SMALL = 0.1
"""Of a tied start, quadratic and cubic factors beside a kaiming draw; of the published start, the encoder's columns."""


def full_ranks(
    ranks: Sequence[int | None] | None, order: int, in_features: int, num_latents: int, shared: bool = True
) -> tuple[int, ...]:
    """Return ranks (R1, R2, R3) after filling in defaults; R2 and R3 are 0 where the order is lower.

    Raises
    ------
    ValueError
        Ranks increase, are negative, R1 is 0, or there are fewer latents than R1.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")
    given: Sequence[int | None] = (None, None, None) if ranks is None else ranks
    if len(given) != 3:
        raise ValueError(f"ranks must be three, (R1, R2, R3), got {tuple(given)}")
    first = min(in_features, num_latents) if given[0] is None else int(given[0])
    high = min(64, math.ceil(in_features / 4), first, num_latents if shared else num_latents // order)
    second = 0 if order < 2 else high if given[1] is None else int(given[1])
    third = 0 if order < 3 else min(high, second) if given[2] is None else int(given[2])
    if not first >= second >= third >= 0 or first < 1:
        raise ValueError(f"ranks must not increase, with R1 at least 1 and none negative, got {first, second, third}")
    if first > num_latents:
        raise ValueError(
            f"ranks must have R1 of at most the {num_latents} latents, whose rows have R1 orthonormal columns, got "
            f"{first}"
        )
    return first, second, third


class PolynomialSAEModule(nn.Module):
    r"""Sparse codes of activations (\*batch, d) by a linear encoder, and a decoder in which they multiply.

    :math:`z = S\big((x - b_{dec}) W_{enc} + b_{enc}\big)` with few non-zeros among m latents, and with orthonormal
    columns U, :math:`a = zU`,

    .. math:: \hat x = b_{dec} + a C_1^\top + \lambda_2\, a_{:R_2}^{\circ 2} C_2^\top
              + \lambda_3\, a_{:R_3}^{\circ 3} C_3^\top .

    So a pair of latents adds :math:`B_{ij} = 2\lambda_2 \sum_r U_{ir} U_{jr} C_{2,:r}` times :math:`z_i z_j` to what
    each adds alone. Call :meth:`retract_` after each step of an optimiser.

    Where it is limited: with R1 = d and the shared U, all of :math:`\hat x` is a polynomial of the linear part
    :math:`a C_1^\top` alone, so that two pairs with equal sums cannot mean different things. R1 > d or
    ``shared=False`` lift that. Squares of single latents are part of it unless ``cross_only``.
    Source: catalogue entry ``polysae``.

    Parameters
    ----------
    in_features : int
        Width d of activations.
    num_latents : int
        m.
    k : int
        Latents that fire for a row: exactly at most ("topk"), on average over a batch ("batchtopk", "matryoshka"), or
        in tendency ("jumprelu").
    ranks : (int, int, int), optional
        (R1, R2, R3), which must not increase; ``None`` for R1 is d (or m where that is less), for the others the least
        of 64, d/4 and R1. With R2 or R3 = 0 there is no such term.
    order : {1, 2, 3}
        1 is the linear sparse autoencoder, whose decoder is one free matrix ``W_dec``. (A linear decoder in factors is
        ``ranks=(R1, 0, 0)``.)
    shared : bool
        One U for all orders; otherwise a product of :math:`zU_1, zU_2, zU_3` stands for the powers, with the
        first columns (as many as the least rank) of all three orthonormal together.
    activation : {"topk", "batchtopk", "matryoshka", "jumprelu"}
        In eval mode, "batchtopk" and "matryoshka" compare with a threshold that training keeps track of, so that a
        row's codes do not depend on its batch. "jumprelu" learns a threshold a latent.
    cross_only : bool
        Count products of distinct latents only: no squares or cubes of one.
    prefixes : sequence of int, optional
        Of "matryoshka": numbers of leading latents that shall do alone; (m/32, m/8) where not given.
    init : {"tied", "official"}
        "tied" starts as a linear autoencoder whose encoder is the decoder's transpose, with small higher orders;
        "official" draws encoder and decoder apart, as the published code does.
    lambda_init : (float, float)
        :math:`\lambda_2, \lambda_3` at the start.
    generator : torch.Generator, optional
        Source of the start; torch's global one where not given.

    Attributes
    ----------
    ranks : tuple of int
    width_limits : tuple of int
        Prefixes of "matryoshka", empty otherwise.
    """

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    W_dec: Tensor
    U_shared: Tensor
    U2: Tensor
    U3: Tensor
    C1: Tensor
    C2: Tensor
    C3: Tensor
    lambda2: Tensor
    lambda3: Tensor
    threshold: Tensor
    bandwidth: Tensor

    def __init__(
        self,
        in_features: int,
        num_latents: int,
        k: int = 32,
        ranks: Sequence[int | None] | None = None,
        *,
        order: int = 3,
        shared: bool = True,
        activation: str = "topk",
        cross_only: bool = False,
        prefixes: Sequence[int] | None = None,
        init: str = "tied",
        lambda_init: Sequence[float | int] = (-0.5, 0.5),
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if in_features < 1 or num_latents < 1:
            raise ValueError(f"in_features and num_latents must be at least 1, got {in_features} and {num_latents}")
        if not 1 <= k <= num_latents:
            raise ValueError(f"k must be between 1 and the {num_latents} latents, got {k}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
        if init not in ("tied", "official"):
            raise ValueError(f"init must be 'tied' or 'official', got {init!r}")
        if len(lambda_init) != 2 or not all(math.isfinite(v) for v in lambda_init):
            raise ValueError(f"lambda_init must be two finite numbers, got {tuple(lambda_init)}")
        self.ranks = full_ranks(ranks, order, in_features, num_latents, shared)
        self.in_features, self.num_latents, self.k, self.order = in_features, num_latents, k, order
        self.shared, self.activation, self.cross_only, self.init = shared, activation, cross_only, init
        self.lambda_init = float(lambda_init[0]), float(lambda_init[1])
        if not shared and len(self._tables) * self._joint > num_latents:
            raise ValueError(
                f"ranks must leave room for {len(self._tables)} times {self._joint} orthonormal columns among "
                f"{num_latents} latents when shared=False, got {self.ranks}"
            )
        self.width_limits = _prefixes(prefixes, num_latents) if activation == "matryoshka" else ()
        d, m = in_features, num_latents
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, **factory))

        self.W_enc, self.b_enc, self.b_dec = empty(d, m), empty(m), empty(d)
        if order == 1:
            self.W_dec = empty(m, d)
        else:
            for name, rank in self._tables.items():
                self.register_parameter(name, empty(m, rank))
            for i, rank in enumerate(self.ranks, start=1):
                if rank:
                    self.register_parameter(f"C{i}", empty(d, rank))
            for i, rank in enumerate(self.ranks[1:], start=2):
                if rank:
                    self.register_parameter(f"lambda{i}", empty())
        if activation == "jumprelu":
            self.threshold = empty(m)
            self.register_buffer("bandwidth", torch.empty((), **factory))
        elif activation != "topk":
            self.register_buffer("threshold", torch.empty((), **factory))
        self.reset_parameters(generator)

    @property
    def _tables(self) -> dict[str, int]:
        """Names and ranks of the factors over latents."""
        if self.shared:
            return {"U_shared": self.ranks[0]}
        return {f"U{i}": rank for i, rank in enumerate(self.ranks, start=1) if rank}

    @property
    def _joint(self) -> int:
        """How many first columns of all factors are orthonormal together, when not shared."""
        return min(rank for rank in self.ranks if rank)

    def _factor(self, i: int) -> Tensor:
        return self.U_shared if self.shared else getattr(self, f"U{i}")

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the start anew."""
        if self.W_enc.is_meta:
            return
        d, m, R = self.in_features, self.num_latents, self.ranks
        at, dtype = self.W_enc.device, torch.promote_types(self.W_enc.dtype, torch.float32)
        draws: Any = {"generator": generator or torch.default_generator, "dtype": dtype}
        draws["device"] = draws["generator"].device
        rows = nn.functional.normalize(torch.randn(m, d, **draws).to(at), dim=1)
        if self.init == "official":
            rows = SMALL * rows
        self.b_enc.zero_()
        self.b_dec.zero_()
        if self.order == 1:
            self.W_dec.copy_(rows)
        else:
            for name, rank in self._tables.items():
                getattr(self, name).copy_(random_stiefel(m, rank, rng=draws["generator"], dtype=dtype).to(at))
            for i, rank in enumerate(R, start=1):
                if rank:
                    spread = math.sqrt(6 / rank)
                    getattr(self, f"C{i}").copy_(spread * (2 * torch.rand(d, rank, **draws).to(at) - 1))
                    if i > 1:
                        getattr(self, f"lambda{i}").fill_(self.lambda_init[i - 2])
            if self.init == "tied":
                first, C1 = _factored(rows, R[0], self._factor(1).to(dtype))
                self._factor(1).copy_(first)
                self.C1.copy_(C1)
                rows = first @ C1.T
                for i in (2, 3):
                    if R[i - 1]:
                        getattr(self, f"C{i}").mul_(SMALL)
            self.retract_()
        self.W_enc.copy_(rows.T)
        if self.activation == "jumprelu":
            self.threshold.fill_(SMALL)
            self.bandwidth.fill_(SMALL)
        elif self.activation != "topk":
            self.threshold.zero_()

    # Codes.

    def pre_activations(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch m"]:
        """Return what the encoder says of every latent, before any is chosen."""
        return torch.addmm(self.b_enc, (x - self.b_dec).reshape(-1, self.in_features), self.W_enc).reshape(
            *x.shape[:-1], self.num_latents
        )

    def choose(self, pre: Tensor) -> SparseCodes:
        """Return the codes of pre-activations (b, m): those of training in train mode, otherwise of inference."""
        if self.activation == "topk":
            return top_k(pre, self.k)
        if self.activation == "jumprelu":
            return above(pre, self.threshold.clamp(min=0))
        return batch_top_k(pre, self.k) if self.training else above(pre, self.threshold)

    def train_codes(self, x: Float[Tensor, "b d"]) -> tuple[SparseCodes, Tensor | None]:
        """Return codes for a step of training, with a gradient that touches the latents chosen only.

        Also, for "jumprelu", the mean number of latents that fire, with its gradient.
        """
        with torch.no_grad():
            pre = self.pre_activations(x)
            if self.activation == "jumprelu":
                codes = above(pre, self.threshold.clamp(min=0) - self.bandwidth / 2)
            else:
                codes = self.choose(pre)
        values = encoded(codes, x, self.W_enc, self.b_enc, self.b_dec)
        if self.activation == "jumprelu":
            return jump(codes, values, self.threshold.clamp(min=0), self.bandwidth)
        return codes._replace(values=values.relu()), None

    def sparse_encode(self, x: Float[Tensor, "b d"]) -> SparseCodes:
        """Return codes of rows in sparse form."""
        if self.training and torch.is_grad_enabled():
            return self.train_codes(x)[0]
        return self.choose(self.pre_activations(x))

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch m"]:
        """Return codes, mostly zeros."""
        flat = self.sparse_encode(x.reshape(-1, self.in_features)).dense(self.num_latents)
        return flat.reshape(*x.shape[:-1], self.num_latents)

    # Reconstruction.

    def sparse_decode(self, codes: SparseCodes) -> tuple[Tensor, Tensor]:
        """Return reconstructions (b, d) and the coordinates a = zU (b, R1), at k R1 operations a row."""
        if self.order == 1:
            return codes.weigh(self.W_dec) + self.b_dec, codes.values
        _, second, third = self.ranks
        a = codes.weigh(self._factor(1))
        if second and self.shared and not self.cross_only and gradients_by_hand(a):
            higher = [(self.lambda2, self.C2), (self.lambda3, self.C3)] if third else [(self.lambda2, self.C2)]
            return polynomial(a, self.b_dec, self.C1, higher), a
        y = torch.addmm(self.b_dec, a, self.C1.T)
        if not second:
            return y, a
        b = a if self.shared else codes.weigh(self.U2)
        pairs = a[:, :second] * b[:, :second]
        own = codes.weigh(self._factor(1)[:, :second] * self._factor(2)[:, :second], 2) if self.cross_only else None
        y = y + self.lambda2 * ((pairs if own is None else pairs - own) @ self.C2.T)
        if third:
            c = a if self.shared else codes.weigh(self.U3)
            triples = pairs[:, :third] * c[:, :third]
            if own is not None:
                triples = triples - self._repeated(codes, own[:, :third], (a, b, c), third)
            y = y + self.lambda3 * (triples @ self.C3.T)
        return y, a

    def _repeated(self, codes: SparseCodes, own: Tensor, abc: tuple[Tensor, ...], rank: int) -> Tensor:
        """Part of the products of three sums that has a latent twice or three times."""
        a, b, c = (part[:, :rank] for part in abc)
        U, V, W = (self._factor(i)[:, :rank] for i in (1, 2, 3))
        if self.shared:
            return 3 * a * own - 2 * codes.weigh(U * U * U, 3)
        both = c * own + b * codes.weigh(U * W, 2) + a * codes.weigh(V * W, 2)
        return both - 2 * codes.weigh(U * V * W, 3)

    def decode(self, codes: Float[Tensor, "*batch m"]) -> Float[Tensor, "*batch d"]:
        """Return the reconstruction of dense codes."""
        flat = codes.reshape(-1, self.num_latents)
        chosen = (flat != 0).reshape(-1).nonzero()[:, 0]
        starts = torch.arange(len(flat), device=flat.device) * self.num_latents
        offsets = torch.searchsorted(chosen, starts)
        sparse = SparseCodes(chosen % self.num_latents, flat.reshape(-1)[chosen], offsets)
        return self.sparse_decode(sparse)[0].reshape(*codes.shape[:-1], self.in_features)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Return reconstructions."""
        y, _ = self.sparse_decode(self.sparse_encode(x.reshape(-1, self.in_features)))
        return y.reshape(x.shape)

    # What it has learnt.

    def linear_decoder(self) -> Float[Tensor, "m d"]:
        """Return what a unit of each latent adds by the linear term."""
        return self.W_dec if self.order == 1 else self._factor(1) @ self.C1.T

    def pair_directions(self, pairs: Int[Tensor, "p 2"]) -> Float[Tensor, "p d"]:
        """Return what the product of the codes of two latents adds; twice the same one: its square."""
        rank = self.ranks[1]
        if not rank:
            return self.b_dec.new_zeros(len(pairs), self.in_features)
        U, V = (self._factor(i)[:, :rank] for i in (1, 2))
        i, j = pairs[:, 0], pairs[:, 1]
        same = (i == j)[:, None]
        both = torch.where(same, 0.0 if self.cross_only else U[i] * V[j], U[i] * V[j] + U[j] * V[i])
        return self.lambda2 * (both @ self.C2.T)

    def triple_directions(self, triples: Int[Tensor, "p 3"]) -> Float[Tensor, "p d"]:
        """Return what the product of the codes of three distinct latents adds."""
        rank = self.ranks[2]
        if not rank:
            return self.b_dec.new_zeros(len(triples), self.in_features)
        U, V, W = (self._factor(i)[:, :rank] for i in (1, 2, 3))
        i, j, h = triples.T
        total = U[i] * (V[j] * W[h] + V[h] * W[j]) + U[j] * (V[i] * W[h] + V[h] * W[i])
        return self.lambda3 * ((total + U[h] * (V[i] * W[j] + V[j] * W[i])) @ self.C3.T)

    @torch.no_grad()
    def retract_(self, method: str = "qr") -> None:
        """Make the columns of the factors over latents orthonormal again, after a step, and thresholds not negative.

        ``"qr"`` keeps the span of the first columns, for every number of them; ``"polar"`` moves all as little as can
        be, at the price of an SVD.

        Raises
        ------
        ValueError
            There is no such method, or a factor is not finite.
        """
        if method not in RETRACTIONS:
            raise ValueError(f"method must be one of {RETRACTIONS}, got {method!r}")
        if self.activation == "jumprelu":
            self.threshold.clamp_(min=0)
        if self.order == 1:
            return
        tables = [getattr(self, name) for name in self._tables]
        if len(tables) > 1:
            r = self._joint
            whole = _orthonormal(torch.cat([table[:, :r] for table in tables], dim=1), method)
            for table, part in zip(tables, whole.split(r, dim=1), strict=True):
                table[:, :r] = part
        for table in tables:
            # The first columns are orthonormal already and stay: a QR keeps them, and so the frame that they share.
            if len(tables) == 1 or table.shape[1] > self._joint:
                _make_orthonormal(table, method if len(tables) == 1 else "qr")

    def config(self) -> dict[str, Any]:
        """Return what makes this module again, in JSON types."""
        return {
            "in_features": self.in_features,
            "num_latents": self.num_latents,
            "k": self.k,
            "ranks": list(self.ranks),
            "order": self.order,
            "shared": self.shared,
            "activation": self.activation,
            "cross_only": self.cross_only,
            "prefixes": list(self.width_limits) or None,
            "init": self.init,
            "lambda_init": list(self.lambda_init),
        }

    def extra_repr(self) -> str:
        """Describe the sizes."""
        return (
            f"{self.in_features}, num_latents={self.num_latents}, k={self.k}, ranks={self.ranks}, order={self.order}, "
            f"activation={self.activation!r}"
        )


def _orthonormal(X: Tensor, method: str) -> Tensor:
    wide = X.to(torch.promote_types(X.dtype, torch.float32))
    return cholesky_qr(wide) if method == "qr" else nearest_isometry(wide)


def _make_orthonormal(X: Tensor, method: str) -> None:
    if method == "qr" and X.dtype in (torch.float32, torch.float64) and X.is_contiguous():
        cholesky_qr_(X.detach())
    else:
        X.copy_(_orthonormal(X, method))


def _factored(rows: Tensor, rank: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Return U (m, rank) with orthonormal columns and C1 (d, rank) with U C1' = rows, or the nearest of that rank.

    Columns beyond those that the rows need are the spare ones, orthonormalised, with zeros in C1.
    """
    d = rows.shape[1]
    if rank < d:
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        return left[:, :rank].contiguous(), (right[:rank].T * values[:rank]).contiguous()
    U = cholesky_qr(torch.cat([rows, spare[:, : rank - d]], dim=1))
    C1 = torch.cat([(U[:, :d].T @ rows).triu().T, rows.new_zeros(d, rank - d)], dim=1)
    return U, C1.contiguous()


def _prefixes(given: Sequence[int] | None, num_latents: int) -> tuple[int, ...]:
    made = sorted({max(1, num_latents // 32), max(1, num_latents // 8)}) if given is None else [int(w) for w in given]
    made = [width for width in made if width != num_latents]
    if any(not 1 <= width < num_latents for width in made) or sorted(set(made)) != made:
        raise ValueError(
            f"prefixes must be increasing numbers from 1 to below the {num_latents} latents, got {list(given or made)}"
        )
    return tuple(made)
