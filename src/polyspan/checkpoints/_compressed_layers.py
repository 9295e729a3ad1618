"""Linear layers in compressed form: a dictionary with sparse coefficients, or two narrow factors."""

import math
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ._sparse_storage import (
    COEF_DTYPES,
    index_dtype,
    pack_support,
    support_indices,
    to_coefficients,
    to_values,
    unpack_support,
)

PRODUCTS = ("auto", "packed", "gather", "csr", "factored", "expanded")
DICTIONARIES = ("own", "shared", "none")
FEW_ROWS = 16
TRIALS = 3


def _beside(shared: Any, own: Tensor) -> Any:
    """Return a shared parameter itself, or, where its owner computes on another device, a copy on that of ``own``."""
    if shared is None or shared.device == own.device or own.is_meta or shared.is_meta:
        return shared
    return nn.Parameter(shared.detach().to(own.device), requires_grad=shared.requires_grad)


def dense_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Return a layer with a copy of ``weight`` (d_out, d_in) and ``bias``."""
    d_out, d_in = weight.shape
    dense = nn.Linear(d_in, d_out, bias is not None, dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        dense.weight.copy_(weight)
        if bias is not None:
            dense.bias.copy_(bias)
    return dense


class SparseDictionaryLinear(nn.Module):
    r"""A linear layer whose weight is a small dictionary times sparse coefficients: :math:`y = (x D) S + b`.

    D is (in_features, num_atoms); each output has its own ``num_nonzero`` atoms. Outputs therefore lie in a union of
    subspaces, where those of a low-rank layer all lie in one. Drop-in for ``nn.Linear`` at inference; code that reads
    its ``weight`` gets what :meth:`weight_matrix` makes, anew each time. :meth:`to_linear` makes the dense layer.

    How S is multiplied is chosen by :attr:`product`; results differ by rounding only:

    - ``"packed"``: S is unpacked from values and bit mask at each call. No memory beyond what is stored.
    - ``"gather"``: for each output the products with its atoms are gathered and summed.
    - ``"csr"``: torch's sparse product; on a CPU, float32 and float64 only.
    - ``"factored"``: S is kept dense; as fast as two dense layers, as large too.
    - ``"expanded"``: D S is kept: speed and memory of the dense layer.
    - ``"auto"``: "csr" up to 16 rows of float32 or float64, else "gather". :func:`fastest_product` measures instead.

    Where gradients are asked for, "packed" is taken; "factored" and "expanded" stay where only those of x are.
    Source: catalogue entry ``cospadi``.

    Parameters
    ----------
    in_features, out_features, num_atoms : int
    num_nonzero : int
        Coefficients an output, 1 to ``num_atoms``.
    bias : bool
    coef_dtype : {"float32", "bfloat16", "float16", "int8"}, optional
        Of stored coefficients; that of the dictionary where not given. int8 has a scale for each output.
    index_cost : {"bitmask", "coo", "none"}
        Whether places are stored as one bit each ("bitmask", "none") or as an integer a coefficient ("coo").
    dictionary : {"own", "shared", "none"}
        "shared" takes it from another layer by :meth:`share_dictionary`; "none" is the identity, which makes the layer
        a pruned one: ``num_atoms`` is then ``in_features``.
    product : str

    Attributes
    ----------
    dictionary : Parameter of shape (in_features, num_atoms), or None
    values : Parameter, or buffer of int8, of shape (out_features, num_nonzero)
    scales : Tensor of shape (out_features, 1), or None
    mask : Tensor of shape (ceil(out_features * num_atoms / 8),), uint8, or None
    indices : Tensor of shape (out_features, num_nonzero), or None
        Only with ``index_cost="coo"``.
    bias : Parameter of shape (out_features,), or None
    transposed : bool
        Whether the layer that this one stands for keeps outputs as columns, as GPT-2's Conv1D does.
    """

    dictionary: Any
    values: Tensor
    scales: Any
    mask: Any
    indices: Any
    bias: Any
    _like: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_atoms: int,
        num_nonzero: int,
        bias: bool = True,
        *,
        coef_dtype: str | None = None,
        index_cost: str = "bitmask",
        dictionary: str = "own",
        product: str = "auto",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(in_features, out_features, num_atoms) < 1 or not 1 <= num_nonzero <= num_atoms:
            raise ValueError(
                "in_features, out_features and num_atoms must be at least 1 and num_nonzero between 1 and num_atoms, "
                f"got {in_features}, {out_features}, {num_atoms} and {num_nonzero}"
            )
        if coef_dtype is not None and coef_dtype not in COEF_DTYPES:
            raise ValueError(f"coef_dtype must be one of {tuple(COEF_DTYPES)}, got {coef_dtype!r}")
        if dictionary not in DICTIONARIES or (dictionary == "none" and num_atoms != in_features):
            raise ValueError(
                f"dictionary must be one of {DICTIONARIES}, 'none' with num_atoms = in_features = {in_features}, "
                f"got {dictionary!r} with {num_atoms}"
            )
        self.in_features, self.out_features = in_features, out_features
        self.num_atoms, self.num_nonzero = num_atoms, num_nonzero
        self.coef_dtype, self.index_cost, self.dictionary_kind = coef_dtype, index_cost, dictionary
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        own = nn.Parameter(torch.zeros(in_features, num_atoms, **options)) if dictionary == "own" else None
        self.register_parameter("dictionary", own)
        kind = dtype if coef_dtype is None else COEF_DTYPES[coef_dtype]
        values = torch.zeros(out_features, num_nonzero, device=device, dtype=kind)
        if kind == torch.int8:
            self.register_buffer("values", values)
        else:
            self.values = nn.Parameter(values)
        # What a form does not have is no buffer of None: torch.export counts those.
        self.scales = self.indices = self.mask = None
        if kind == torch.int8:
            del self.scales
            self.register_buffer("scales", torch.ones(out_features, 1, device=device))
        first = torch.arange(num_nonzero, device=device).expand(out_features, num_nonzero)
        if index_cost == "coo":
            del self.indices
            self.register_buffer("indices", first.to(index_dtype(num_atoms)))
        else:
            del self.mask
            self.register_buffer("mask", pack_support(first, num_atoms))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **options)) if bias else None)
        # Follows the layer's casts where neither dictionary nor bias does, and is never saved.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device="cpu"), persistent=False)
        self.transposed = False
        self._made: dict[str, Any] = {}
        self.product = product

    @property
    def product(self) -> str:
        """How S is multiplied."""
        return self._product

    @product.setter
    def product(self, product: str) -> None:
        if product not in PRODUCTS:
            raise ValueError(f"product must be one of {PRODUCTS}, got {product!r}")
        self._product = product
        self._made.clear()

    @classmethod
    def from_codes(
        cls,
        dictionary: Tensor | None,
        codes: Tensor,
        num_nonzero: int,
        bias: Tensor | None = None,
        *,
        coef_dtype: str | None = None,
        index_cost: str = "bitmask",
        dtype: torch.dtype | None = None,
    ) -> "SparseDictionaryLinear":
        """Make a layer of D (d_in, m), or None for the identity, and Sᵀ (d_out, m), rounded to ``dtype``."""
        kept = to_coefficients(codes, num_nonzero, COEF_DTYPES.get(coef_dtype or "", dtype or codes.dtype))
        m = codes.shape[1]
        layer = cls(
            m if dictionary is None else dictionary.shape[0], len(codes), m, num_nonzero, bias is not None,
            coef_dtype=coef_dtype, index_cost=index_cost, dictionary="none" if dictionary is None else "own",
            dtype=dtype or codes.dtype, device=codes.device,
        )  # fmt: skip
        with torch.no_grad():
            if dictionary is not None:
                layer.dictionary.copy_(dictionary)
            layer.values.copy_(kept.values)
            if kept.scales is not None:
                layer.scales.copy_(kept.scales)
            if bias is not None:
                layer.bias.copy_(bias)
        if index_cost == "coo":
            layer.indices.copy_(kept.indices)
        else:
            layer.mask.copy_(pack_support(kept.indices, m))
        return layer

    def share_dictionary(self, owner: "SparseDictionaryLinear") -> None:
        """Take the dictionary of another layer, which has as many inputs and atoms; it stays one in memory."""
        if (owner.in_features, owner.num_atoms) != (self.in_features, self.num_atoms):
            raise ValueError(
                f"owner must have {self.in_features} inputs and {self.num_atoms} atoms, "
                f"got {owner.in_features} and {owner.num_atoms}"
            )
        self.dictionary = _beside(owner.dictionary, self.values)
        self._made.clear()

    def share_coefficients(self, owner: "SparseDictionaryLinear") -> None:
        """Take all of another layer of the same sizes but its bias: the tie of two weights that were one."""
        for name in ("values", "scales", "indices", "mask"):
            setattr(self, name, getattr(owner, name))
        self.share_dictionary(owner)

    def support(self) -> Tensor:
        """Return which atoms each output uses, (out_features, num_atoms), bool."""
        if self.mask is not None:
            return unpack_support(self.mask, self.out_features, self.num_atoms)
        empty = torch.zeros(self.out_features, self.num_atoms, dtype=torch.bool, device=self.indices.device)
        return empty.scatter_(1, self.indices.long(), True)

    def places(self) -> Tensor:
        """Return the indices (out_features, num_nonzero) of each output's atoms, rising."""
        if self.indices is not None:
            return self.indices.long()
        return support_indices(self.support(), self.num_nonzero)

    def coefficients(self) -> Tensor:
        """Return Sᵀ, (out_features, num_atoms), dense, in the dtype of the layer."""
        values = to_values(self.values, self.scales, self.weight_dtype())
        empty = values.new_zeros(self.out_features, self.num_atoms)
        return empty.masked_scatter(self.support(), values)

    def weight_matrix(self) -> Tensor:
        """Return what stands for the weight of ``nn.Linear``, (out_features, in_features)."""
        wide = torch.promote_types(self.weight_dtype(), torch.float32)
        S = to_values(self.values, self.scales, wide)
        S = S.new_zeros(self.out_features, self.num_atoms).masked_scatter(self.support(), S)
        return (S if self.dictionary_kind == "none" else S @ self._atoms().to(wide).mT).to(self.weight_dtype())

    def to_linear(self) -> nn.Linear:
        """Return the dense layer that this one equals."""
        return dense_linear(self.weight_matrix(), self.bias)

    def resident_bytes(self) -> int:
        """Return the bytes that this layer holds now, kept products included; a shared dictionary counts each time."""
        held = [*self.parameters(recurse=False), *self.buffers(recurse=False)]
        for part in self._made.values():
            sparse = part.layout == torch.sparse_csr
            held += [part.crow_indices(), part.col_indices(), part.values()] if sparse else [part]
        return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in held}.values())

    def __getattr__(self, name: str) -> Any:
        return self.weight_matrix() if name == "weight" else super().__getattr__(name)

    def weight_dtype(self) -> torch.dtype:
        """Return the dtype of the weight that this layer stands for."""
        return self._like.dtype

    def _atoms(self) -> Tensor:
        if self.dictionary is None:
            raise ValueError("dictionary must come from another layer: call share_dictionary first")
        return self.dictionary

    def _apply(self, fn, recurse=True):
        self._made.clear()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._made.clear()
        return super()._load_from_state_dict(*args, **kwargs)

    def _kept(self, name: str) -> Tensor:
        """Return what a product keeps between calls, made at the first."""
        if name not in self._made:
            with torch.no_grad():
                self._made[name] = {
                    "places": lambda: self.places().int(),
                    "numbers": lambda: to_values(self.values, self.scales, self.weight_dtype()).detach(),
                    "csr": self._make_csr,
                    "factored": self.coefficients,
                    "expanded": self.weight_matrix,
                }[name]()
        return self._made[name]

    def _make_csr(self) -> Tensor:
        s, places = self.num_nonzero, self._kept("places").flatten()
        starts = torch.arange(0, self.out_features * s + 1, s, dtype=torch.int32, device=places.device)
        values = self._kept("numbers").flatten()
        with warnings.catch_warnings():
            # torch calls its sparse tensors a beta, once a process.
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
            return torch.sparse_csr_tensor(
                starts, places, values, (self.out_features, self.num_atoms), check_invariants=False
            )

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        product = self._product
        if torch.is_grad_enabled():
            own = any(p.requires_grad for p in self.parameters(recurse=False))
            if own or (x.requires_grad and product not in ("factored", "expanded")):
                product = "packed"
        if product == "expanded":
            return F.linear(x, self._kept("expanded"), self.bias)
        h = x if self.dictionary_kind == "none" else x @ self._atoms()
        if product in ("packed", "factored"):
            return F.linear(h, self.coefficients() if product == "packed" else self._kept("factored"), self.bias)
        rows = h.reshape(-1, self.num_atoms)
        if product == "auto":
            exact = h.dtype in (torch.float32, torch.float64)
            product = "csr" if exact and len(rows) <= FEW_ROWS else "gather"
        if product == "csr":
            y = (self._kept("csr") @ rows.mT).mT
        else:
            places, numbers = self._kept("places"), self._kept("numbers")
            y = F.embedding_bag(places, rows.mT.contiguous(), per_sample_weights=numbers, mode="sum").mT
        # As nn.Linear gives it: some models look at the numbers of an output where they lie.
        y = y.contiguous().view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_atoms={self.num_atoms}, num_nonzero={self.num_nonzero}, "
            f"bias={self.bias is not None}, dictionary={self.dictionary_kind!r}, product={self._product!r}"
        )


class LowRankLinear(nn.Module):
    r"""A linear layer whose weight is two narrow factors: :math:`y = (x L) R + b`.

    Parameters
    ----------
    in_features, out_features, rank : int
    bias : bool
    shared : bool
        L comes from another layer by :meth:`share_left`.

    Attributes
    ----------
    left : Parameter of shape (in_features, rank), or None
    right : Parameter of shape (rank, out_features)
    bias : Parameter of shape (out_features,), or None
    transposed : bool
        Whether the layer that this one stands for keeps outputs as columns, as GPT-2's Conv1D does.
    """

    left: Any
    bias: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        shared: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if min(in_features, out_features, rank) < 1:
            raise ValueError(
                f"in_features, out_features and rank must be at least 1, got {in_features}, {out_features} and {rank}"
            )
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.in_features, self.out_features, self.rank, self.shared = in_features, out_features, rank, shared
        self.register_parameter("left", None if shared else nn.Parameter(torch.zeros(in_features, rank, **options)))
        self.transposed = False
        self.right = nn.Parameter(torch.zeros(rank, out_features, **options))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **options)) if bias else None)

    def __getattr__(self, name: str) -> Any:
        return self.weight_matrix() if name == "weight" else super().__getattr__(name)

    def weight_dtype(self) -> torch.dtype:
        """Return the dtype of the weight that this layer stands for."""
        return self.right.dtype

    def share_left(self, owner: "LowRankLinear") -> None:
        """Take the left factor of another layer of as many inputs and the same rank."""
        if (owner.in_features, owner.rank) != (self.in_features, self.rank):
            raise ValueError(
                f"owner must have {self.in_features} inputs and rank {self.rank}, "
                f"got {owner.in_features} and {owner.rank}"
            )
        self.left = _beside(owner.left, self.right)

    def weight_matrix(self) -> Tensor:
        """Return what stands for the weight of ``nn.Linear``, (out_features, in_features)."""
        wide = torch.promote_types(self.right.dtype, torch.float32)
        return (self.left.to(wide) @ self.right.to(wide)).mT.to(self.right.dtype)

    def to_linear(self) -> nn.Linear:
        """Return the dense layer that this one equals."""
        return dense_linear(self.weight_matrix(), self.bias)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        y = (x @ self.left) @ self.right
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, rank={self.rank}, bias={self.bias is not None}"


def fastest_product(
    model: nn.Module, *, rows: int = 1, among: Sequence[str] = PRODUCTS[1:], set_: bool = True
) -> dict[str, dict[str, float]]:
    """Measure on this machine how each shape of :class:`SparseDictionaryLinear` in a model is multiplied fastest.

    Parameters
    ----------
    rows : int
        Tokens a call: 1 for writing text one by one, hundreds for reading it.
    among : sequence of str
        Products to choose from; leave out "expanded" and "factored" where memory counts.
    set_ : bool
        Give every layer the fastest.

    Returns
    -------
    dict
        Seconds a call by product, for the name of the first layer of each shape; products that this device does not
        have are left out.

    Raises
    ------
    ValueError
        The model has no such layer, or none of the products runs.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, SparseDictionaryLinear)}
    if not layers:
        raise ValueError("model must hold a SparseDictionaryLinear, got none")
    found: dict[str, dict[str, float]] = {}
    first: dict[tuple, str] = {}
    for name, layer in layers.items():
        shape = (layer.in_features, layer.out_features, layer.num_atoms, layer.num_nonzero)
        before = layer.product
        if shape not in first:
            first[shape] = name
            found[name] = _seconds(layer, rows, among)
        if set_:
            layer.product = min(found[first[shape]], key=found[first[shape]].__getitem__)
        else:
            layer.product = before
    return found


def _seconds(layer: SparseDictionaryLinear, rows: int, among: Sequence[str]) -> dict[str, float]:
    x = torch.ones(rows, layer.in_features, dtype=layer.weight_dtype(), device=layer.values.device)
    found = {}
    for product in among:
        layer.product = product
        best = math.inf
        with torch.no_grad():
            try:
                layer(x)
            except (RuntimeError, NotImplementedError):
                # A dtype or device for which torch has no such product.
                continue
            for _ in range(TRIALS):
                started = time.perf_counter()
                _wait(layer(x))
                best = min(best, time.perf_counter() - started)
        found[product] = best
    if not found:
        raise ValueError(f"among must hold a product that runs here, got {tuple(among)}")
    return found


def _wait(y: Tensor) -> None:
    """Let an accelerator finish."""
    if y.device.type != "cpu":
        y.flatten()[:1].cpu()
