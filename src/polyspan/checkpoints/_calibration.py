"""What calibration tells a layer: the Gram matrix of its inputs, gathered by hooks, and the whitening it gives."""

import fnmatch
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.run import progress

from ._compressed_layers import LowRankLinear, SparseDictionaryLinear

TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "qkv_proj", "gate_proj", "up_proj", "down_proj",
    "gate_up_proj", "c_attn", "c_proj", "c_fc", "fc1", "fc2", "fc_in", "fc_out", "query_key_value", "dense",
    "dense_h_to_4h", "dense_4h_to_h", "query", "key", "value", "q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo", "w1",
    "w2", "w3",
)  # fmt: skip
# Layers of transformers that compute what nn.Linear does, besides it.
LINEAR_KINDS = (
    ("transformers.pytorch_utils", "Conv1D"),
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
)
FIRST_EPS, LAST_EPS = 1e-6, 1.0


class TargetLayer(NamedTuple):
    """A linear layer that is to be compressed; ``block`` is its place in the model's stack, ``role`` its name there."""

    name: str
    d_in: int
    d_out: int
    transposed: bool
    block: int
    role: str
    tied_to: str | None


class Whitening(NamedTuple):
    r"""Lower triangular C of :math:`G + \epsilon\,\overline{\operatorname{diag} G}\,I = CC^\top`, and ε."""

    factor: Tensor
    eps: float


def find_layers(model: nn.Module, targets: Sequence[str] | None = None) -> list[TargetLayer]:
    """Return the linear layers of a model that ``targets`` name, in its order.

    A target is the last part of a layer's name, or a pattern of whole names. ``None`` stands for the usual names of
    projections in transformers; embeddings and heads are not among them.

    Raises
    ------
    ValueError
        There is none, or one is quantised, carries an adapter, is tied to an embedding or is compressed already.
    """
    if isinstance(targets, str):
        raise ValueError(f"targets must be a list of names, got the string {targets!r}")
    if getattr(model, "is_quantized", False):
        raise ValueError("model must hold plain weights, got a quantised or compressed one: load it without")
    wanted = TARGETS if targets is None else tuple(targets)
    found: list[TargetLayer] = []
    owners: dict[int, str] = {}
    others: list[str] = []
    tables: dict[int, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            tables.setdefault(id(module.weight), name)
    for name, module in model.named_modules():
        if not _is_wanted(name, wanted):
            others += [name] if _is_linear(module) else []
            continue
        _refuse(name, module)
        if not _is_linear(module):
            continue
        if id(module.weight) in tables:
            raise ValueError(
                f"targets must name layers with weights of their own, got {name}, tied to {tables[id(module.weight)]}: "
                "the embedding would stay as large as it is"
            )
        transposed = not isinstance(module, nn.Linear)
        d_out, d_in = reversed(module.weight.shape) if transposed else module.weight.shape
        owner = owners.setdefault(id(module.weight), name)
        numbers = re.findall(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name)
        found.append(
            TargetLayer(
                name, d_in, d_out, transposed, int(numbers[0]) if numbers else -1,
                re.sub(r"(^|\.)\d+\.", r"\1*.", name, count=1), None if owner == name else owner,
            )
        )  # fmt: skip
    if not found:
        shown = ", ".join(others[:10]) or "none at all"
        raise ValueError(f"targets must name linear layers of the model, got {list(wanted)[:10]}; it has {shown}")
    return found


def _is_wanted(name: str, wanted: Sequence[str]) -> bool:
    last = name.rsplit(".", 1)[-1]
    return any(last == target or fnmatch.fnmatchcase(name, target) for target in wanted)


def _is_linear(module: nn.Module) -> bool:
    kind = type(module)
    return kind is nn.Linear or (kind.__module__, kind.__name__) in LINEAR_KINDS


def _refuse(name: str, module: nn.Module) -> None:
    """Raise where a wanted layer is something that a plain weight was made into."""
    if isinstance(module, SparseDictionaryLinear | LowRankLinear):
        raise ValueError(f"model must hold plain weights, got {name}, which is compressed already")
    if hasattr(module, "base_layer"):
        raise ValueError(f"model must hold plain weights, got an adapter on {name}: merge it first")
    weight = getattr(module, "weight", None)
    strange = hasattr(module, "qweight") or (isinstance(module, nn.Linear) and not _is_linear(module))
    if strange or (_is_linear(module) and weight is not None and not weight.is_floating_point()):
        raise ValueError(
            f"model must hold plain weights, got {name}, a {type(module).__name__}: load it unquantised, or leave it "
            "out of targets"
        )


def weight_dtypes(model: Any, layers: Sequence[TargetLayer]) -> dict[str, torch.dtype]:
    """Return the dtype of each layer's weight by name."""
    return {layer.name: model.get_submodule(layer.name).weight.dtype for layer in layers}


def weight_of(model: nn.Module, layer: TargetLayer) -> Tensor:
    """Return a layer's weight with outputs as columns, (d_in, d_out); one that accelerate keeps elsewhere is fetched.

    Raises
    ------
    ValueError
        It is on the meta device and nothing says where its numbers are, or they are not finite.
    """
    module: Any = model.get_submodule(layer.name)
    weight = module.weight.detach()
    if weight.is_meta:
        kept = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if kept is None:
            raise ValueError(f"model must have weights, got {layer.name} on the meta device without an offload")
        weight = kept["weight"]
    # A minimum and a maximum carry NaN along and need no memory of the weight's size.
    if not all(bool(torch.isfinite(end)) for end in weight.aminmax()):
        raise ValueError(f"model must have finite weights, got NaN or infinity in {layer.name}")
    return weight if layer.transposed else weight.mT


def as_batches(calibration: Any, *, context: int = 128, batch_size: int = 8) -> list[Any]:
    """Return calibration as batches for the model: rows of ids (b, t), or keyword arguments.

    One row of ids is cut into pieces of ``context``; what is left over at the end is not used, unless it is all.

    Raises
    ------
    ValueError
        There is nothing, or something else.
    """
    if isinstance(calibration, Tensor) and calibration.ndim == 1:
        length = min(context, len(calibration))
        pieces = len(calibration) // length if length else 0
        calibration = calibration[: pieces * length].view(pieces, length) if length else calibration.view(0, 1)
    if isinstance(calibration, Tensor):
        if calibration.ndim != 2 or calibration.is_floating_point():
            raise ValueError(
                f"calibration must be token ids (n,) or (b, t), got {calibration.dtype}, {tuple(calibration.shape)}"
            )
        calibration = calibration.split(batch_size) if len(calibration) else []
    if isinstance(calibration, str) or not isinstance(calibration, Iterable):
        raise ValueError(f"calibration must be token ids or batches of them, got {type(calibration).__name__}")
    batches = list(calibration)
    if not batches:
        raise ValueError("calibration must hold at least one token, got none")
    for batch in batches:
        if not isinstance(batch, Tensor | Mapping):
            raise ValueError(f"calibration must hold tensors or keyword arguments, got {type(batch).__name__}")
    return batches


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run the model on one batch, on the device of its embeddings or first weights, and in their float dtype."""
    first = next((p for p in model.parameters() if not p.is_meta), torch.empty(0))
    if isinstance(batch, Tensor):
        ids = batch.to(first.device)
        return model(**halved_text(model, ids)) if takes_halves(model) else model(ids)
    given = {name: part for name, part in batch.items() if name != "labels"}
    for name, part in given.items():
        if isinstance(part, Tensor):
            given[name] = part.to(first.device, first.dtype if part.is_floating_point() else part.dtype)
    return model(**given)


def takes_halves(model: Any) -> bool:
    """Tell whether a model is an encoder-decoder, to which a text is given in two halves."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def halved_text(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Return the arguments of an encoder-decoder for pieces of text (b, t).

    It gets the first half of each, and its decoder a token to begin with and the rest but the last.

    Raises
    ------
    ValueError
        The pieces have one token.
    """
    config = model.config
    half = ids.shape[1] // 2
    if not half:
        raise ValueError(f"ids must be pieces of 2 tokens or more for an encoder-decoder, got {tuple(ids.shape)}")
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    begin = next((n for n in (getattr(config, name, None) for name in names) if n is not None), 0)
    return {"input_ids": ids[:, :half], "decoder_input_ids": F.pad(ids[:, half:-1], (1, 0), value=begin)}


@contextmanager
def _watched(model: nn.Module, names: Iterable[str], see: Callable[[str, Tensor], None]):
    """Let ``see`` know each input of the named modules."""
    handles = []
    try:
        for name in names:

            def hook(_, args, kwargs, name=name):
                see(name, args[0] if args else next(iter(kwargs.values())))

            handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def trace_sites(model: nn.Module, layers: Sequence[TargetLayer], batches: Sequence[Any]) -> list[list[str]]:
    """Return the layers that are reached, in order, those of the same input together: they share one Gram matrix.

    Batches are tried until every layer has been reached; mostly the first will do.
    """
    sites: list[list[str]] = []
    seen: set[str] = set()
    last: list[Tensor] = []

    def see(name: str, x: Tensor) -> None:
        if name not in seen:
            if last and last[0] is x:
                sites[-1].append(name)
            else:
                sites.append([name])
            seen.add(name)
        last[:] = [x]

    was_training = model.training
    model.eval()
    with _watched(model, (layer.name for layer in layers), see):
        for batch in batches:
            call_model(model, batch)
            last.clear()
            if len(seen) == len(layers):
                break
    model.train(was_training)
    return sites


class InputGrams:
    """Gram matrices XᵀX of the inputs of layers, in float64, added up where the activations are.

    Not centred: a layer's error is that of its outputs, to which the mean of its inputs adds as any direction does.

    Parameters
    ----------
    widths : mapping of str to int
        Number of inputs of each layer, by name.
    skip_bad : bool
        Leave out batches with NaN or infinity, and count them, instead of raising.

    Attributes
    ----------
    grams : dict of str to Tensor of shape (d, d)
    n_rows : dict of str to int
        Tokens seen.
    n_bad : int
        Inputs left out.
    """

    def __init__(self, widths: Mapping[str, int], *, skip_bad: bool = False):
        self.widths, self.skip_bad = dict(widths), skip_bad
        self.grams: dict[str, Tensor] = {}
        self.n_rows = dict.fromkeys(self.widths, 0)
        self.n_bad = 0

    def add(self, name: str, x: Tensor, real: Tensor | None = None) -> None:
        """Add inputs ``x`` (*b, d) of a layer; ``real`` (b, t) marks tokens that are no padding.

        Raises
        ------
        ValueError
            NaN or infinity is among them.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        if real is not None and real.shape == x.shape[:-1]:
            rows = rows[real.reshape(-1).bool().to(rows.device)]
        if not len(rows):
            return
        # Apple's GPUs have no float64.
        rows = (rows.cpu() if rows.device.type == "mps" else rows).double()
        if not bool(rows.isfinite().all()):
            self.n_bad += 1
            if not self.skip_bad:
                raise ValueError(
                    f"calibration must give finite inputs, got NaN or infinity at {name}; "
                    "skip_bad_batches leaves such batches out"
                )
            return
        if name not in self.grams:
            self.grams[name] = rows.new_zeros(self.widths[name], self.widths[name])
        self.grams[name].addmm_(rows.mT, rows)
        self.n_rows[name] += len(rows)


@torch.no_grad()
def gather_grams(
    model: nn.Module,
    widths: Mapping[str, int],
    batches: Sequence[Any],
    *,
    skip_bad: bool = False,
    label: str = "",
) -> InputGrams:
    """Run all batches through the model and return the Gram matrices of the named layers' inputs."""
    found = InputGrams(widths, skip_bad=skip_bad)
    real: list[Tensor | None] = [None]
    was_training = model.training
    model.eval()
    try:
        with _watched(model, widths, lambda name, x: found.add(name, x, real[0])):
            for batch in progress(batches, label=label, enabled=bool(label)):
                mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                real[0] = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
                call_model(model, batch)
    except ValueError as error:
        held = ((name, p) for name, p in model.named_parameters() if not p.is_meta)
        bad = next((name for name, p in held if not bool(torch.isfinite(p).all())), None)
        if bad is not None:
            raise ValueError(f"{error}; the model's own {bad} is not finite") from error
        raise
    finally:
        model.train(was_training)
    return found


def warn_of_few(found: InputGrams) -> None:
    """Warn where a layer saw fewer tokens than it has inputs."""
    few = [name for name, rows in found.n_rows.items() if 0 < rows < found.widths[name]]
    if few:
        name = min(few, key=lambda n: found.n_rows[n] / found.widths[n])
        rank = int(torch.linalg.matrix_rank(found.grams[name], hermitian=True))
        warnings.warn(
            f"calibration has fewer tokens than inputs in {len(few)} layers: {found.n_rows[name]} tokens, of rank "
            f"{rank}, for {found.widths[name]} inputs of {name}; give more text",
            UserWarning,
            stacklevel=3,
        )
    if found.n_bad:
        warnings.warn(f"{found.n_bad} inputs with NaN or infinity were left out", UserWarning, stacklevel=3)


def whiten(gram: Tensor) -> Whitening:
    """Return a Cholesky factor of a Gram matrix (d, d) plus the least ridge, of 1e-6, 1e-5, …, 1, that allows one.

    The ridge is a share of the mean of the diagonal, so that it does not depend on the scale of activations; a
    matrix that is positive definite as it is gets none. A matrix of zeros gives the identity.

    Raises
    ------
    ValueError
        The matrix is not positive semidefinite.
    """
    mean = gram.diagonal().mean()
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    if not float(mean) > 0:
        return Whitening(eye, 0.0)
    eps = 0.0
    while True:
        factor, info = torch.linalg.cholesky_ex(gram + eps * mean * eye)
        least = float(factor.diagonal().min()) if int(info) == 0 else 0.0
        # A factor that exists by rounding alone would blow up noise when it is solved with.
        if least**2 > len(gram) * torch.finfo(gram.dtype).eps * float(gram.diagonal().max()):
            return Whitening(factor, eps)
        if eps >= LAST_EPS:
            raise ValueError("gram must be positive semidefinite, got a matrix that is not")
        eps = FIRST_EPS if eps == 0 else 10 * eps
