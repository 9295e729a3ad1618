"""Compress the linear layers of a transformer by calibrated sparse dictionaries."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from polyspan.run import Progress, pick_device

from ._calibration import (
    TargetLayer,
    as_batches,
    find_layers,
    gather_grams,
    trace_sites,
    warn_of_few,
    weight_dtypes,
    weight_of,
)
from ._compressed_layers import LowRankLinear, SparseDictionaryLinear, fastest_product
from ._compression import (
    LayerReport,
    Unit,
    install,
    layer_reports,
    module_bytes,
    plan_units,
    put,
    site_names,
    unit_grams,
    windows,
)
from ._layer_methods import Settings, check_settings, compress_unit, group_size, named_method
from .layer_calibration import LayerCalibration

__all__ = ["LayerReport", "LowRankLinear", "SparseDictionaryCompressor", "SparseDictionaryLinear", "fastest_product"]


class SparseDictionaryCompressor:
    r"""Make a trained model smaller without training: each projection W becomes a dictionary times sparse columns.

    Minimises :math:`\lVert XW - XDS\rVert_F^2` with at most s non-zeros in each column of S, where X are the layer's
    inputs on calibration text. With :math:`X^\top X = CC^\top` that is ordinary dictionary learning of
    :math:`C^\top W`, and :math:`D = C^{-\top}\tilde D`. Each output chooses its own s of the k atoms, so that at equal
    bytes the outputs live in a union of subspaces where those of a truncated SVD share one.

    It gains least where one subspace is right: weights whose whitened spectrum ends. Inputs that calibration never
    shows are fitted by nothing: text should be like the text to come, with more tokens than a layer has inputs.

    Source: catalogue entry ``cospadi``.

    Parameters
    ----------
    ratio : float or mapping of str to float, default=0.3
        Share of bytes to save in each layer, in (0, 1); or by last part of the name or pattern of names, the first
        that fits. Layers that no pattern fits stay dense.
    rho : float, default=2.0
        Atoms over non-zeros k / s.
    groups : int, default=1
        Layers of one role in so many consecutive blocks share a dictionary.
    algorithm : str, default="ksvd"
        "ksvd", "orthogonal" (several times faster) or "threshold" (one pass). For comparison also "svd", "svd-llm"
        (truncated in the same metric), "asvd", "basis-sharing" (grouped "svd-llm"), "wanda" and "magnitude" (pruning,
        bit mask counted).
    targets : sequence of str, optional
        Last parts of layers' names, or patterns of whole names. The usual projections of transformers where not given.
    index_cost : {"bitmask", "coo", "none"}
        What the places of coefficients count in the budget; "none" is the published account without them.
    coef_dtype : {"float32", "bfloat16", "float16", "int8"}, optional
        Of stored coefficients.
    sequential : bool
        Calibrate each layer on the model compressed so far: usually better, one pass over the text for each input.
    max_iter : int, default=20
        Sweeps.
    pursuit : {"exchange", "omp"}
        As of :class:`~polyspan.checkpoints.dictionary_learning.SparseDictionary`; "omp" is the published form.
    word_bytes : {2, 4, 8}, optional
        Count numbers as of this width, as if a float32 model were to be stored in 16 bits.
    skip_bad_batches : bool
        Leave out inputs with NaN or infinity instead of raising.
    memory_bytes : int, default=2**32
        Gram matrices in memory at a time; more passes over the text are made where all need more.
    device : device or "auto", optional
        Where layers are fitted; where they are, if not given.
    seed : int
    verbose : bool

    Attributes
    ----------
    report_ : list of LayerReport
    layers_ : dict of str to nn.Module
        Compressed layers by name.
    n_tokens_ : int
        Tokens that the first layer saw.
    """

    report_: list[LayerReport]
    layers_: dict[str, nn.Module]

    def __init__(
        self,
        ratio: float | int | Mapping[str, float] = 0.3,
        *,
        rho: float | int = 2.0,
        groups: int = 1,
        algorithm: str = "ksvd",
        targets: Sequence[str] | None = None,
        index_cost: str = "bitmask",
        coef_dtype: str | None = None,
        sequential: bool = False,
        max_iter: int = 20,
        pursuit: str = "exchange",
        word_bytes: int | None = None,
        skip_bad_batches: bool = False,
        memory_bytes: int = 2**32,
        device: Any = None,
        seed: int = 0,
        verbose: bool = False,
    ):
        self.settings = Settings(
            named_method(algorithm), float(rho), pursuit, index_cost, coef_dtype, word_bytes, max_iter, seed=seed
        )
        check_settings(self.settings)
        self.ratio, self.groups, self.targets, self.sequential = ratio, groups, targets, sequential
        self.skip_bad_batches, self.memory_bytes = skip_bad_batches, memory_bytes
        self.device, self.verbose = device, verbose

    def fit(self, model: nn.Module, calibration: Any) -> "SparseDictionaryCompressor":
        """Compress every layer, leaving the model as it is; :meth:`compress` then changes it.

        Parameters
        ----------
        model : nn.Module
            Takes token ids, or keyword arguments where batches are mappings. Weights may be offloaded by accelerate.
        calibration : Tensor of ids (n,) or (b, t), or sequence of such (b, t) or of mappings
            One row of ids is cut into pieces of 128. An ``attention_mask`` in a mapping leaves padding out. Or what
            :func:`calibrate_layers` found, which is not for ``sequential``.

        Raises
        ------
        ValueError
            An option is out of range or does not suit a layer, which is named; layers are quantised, carry adapters,
            or are compressed already; or activations are not finite.

        Warns
        -----
        UserWarning
            Layers saw fewer tokens than they have inputs, or none.
        """
        layers = find_layers(model, self.targets)
        if isinstance(calibration, LayerCalibration):
            if self.sequential:
                raise ValueError("calibration must be text where sequential, got Gram matrices of the model as it was")
            calibration.check(layers)
            batches, sites = [], calibration.sites
        else:
            batches = as_batches(calibration)
            sites = trace_sites(model, layers, batches)
        dtypes = weight_dtypes(model, layers)
        groups = group_size(self.settings.method, self.groups)
        units = plan_units(layers, sites, self.settings, self.ratio, groups, dtypes)
        needed = site_names(sites, layers)
        widths = {layer.name: layer.d_in for layer in layers}
        tied = [layer for layer in layers if layer.tied_to is not None]
        todo = [unit for unit in units if unit.sizes is not None]
        reports = {unit.name: self._left(unit, dtypes) for unit in units if unit.sizes is None}
        before: dict[str, nn.Module] = {}
        self.layers_, self._configs, self.n_tokens_ = {}, {}, 0
        try:
            with Progress("compressing layers", len(todo), enabled=self.verbose) as shown:
                for part, names in windows(
                    todo,
                    lambda unit: [site for layer in unit.layers for site in needed[layer.name]],
                    widths,
                    self.memory_bytes,
                    sequential=self.sequential,
                ):
                    if isinstance(calibration, LayerCalibration):
                        found = calibration
                    else:
                        found = gather_grams(
                            model, {name: widths[name] for name in names}, batches, skip_bad=self.skip_bad_batches
                        )
                        warn_of_few(found)
                    self.n_tokens_ = self.n_tokens_ or next(iter(found.n_rows.values()))
                    made = [self._compress(model, unit, unit_grams(unit, needed, found), dtypes) for unit in part]
                    for unit, (modules, report) in zip(part, made, strict=True):
                        reports[unit.name] = report
                        if modules:
                            told = install(model, unit, modules, tied)
                            before |= told.pop("")
                            self._configs |= told
                        shown.advance()
                    if not self.sequential:
                        self._take_out(model, before)
        finally:
            self._take_out(model, before)
        self.report_ = [row for unit in units for row in reports[unit.name]]
        lost = [row.layer for row in self.report_ if "calibration" in row.note]
        if lost:
            warnings.warn(f"{len(lost)} layers were not reached and stay dense: {lost[0]}", UserWarning, stacklevel=2)
        return self

    def _take_out(self, model: nn.Module, before: dict[str, nn.Module]) -> None:
        """Put the model's own layers back and keep the compressed ones."""
        for name, module in before.items():
            self.layers_[name] = put(model, name, module)
        before.clear()

    def _left(self, unit: Unit, dtypes: Mapping[str, torch.dtype]) -> list[LayerReport]:
        sizes = [_weight_bytes(layer, dtypes) for layer in unit.layers]
        return layer_reports(unit, "", sizes, sizes, [0.0] * len(sizes))

    def _compress(
        self, model: nn.Module, unit: Unit, grams: list[Tensor] | None, dtypes: Mapping[str, torch.dtype]
    ) -> tuple[list[nn.Module], list[LayerReport]]:
        """Return a unit's compressed modules with their report; none where calibration shows nothing."""
        if grams is None:
            return [], self._left(unit._replace(sizes=None, note="calibration shows it zeros only"), dtypes)
        assert unit.sizes is not None
        weights = [weight_of(model, layer) for layer in unit.layers]
        device = grams[0].device if self.device is None else pick_device(self.device)
        found = compress_unit(
            [w.to(device) for w in weights], [g.to(device) for g in grams], unit.sizes, self.settings,
            dtypes[unit.name],
        )  # fmt: skip
        modules = [layer.module for layer in found.layers]
        return modules, layer_reports(
            unit, self.settings.method, [_weight_bytes(layer, dtypes) for layer in unit.layers],
            [module_bytes(module, shared=number > 0) for number, module in enumerate(modules)],
            [layer.error for layer in found.layers], ridge=found.eps, sweeps=found.sweeps,
        )  # fmt: skip

    def compress(self, model: nn.Module, *, product: str = "auto") -> nn.Module:
        """Put the compressed layers into ``model``, the one that was fitted or an equal one, and return it.

        Saving it is :func:`polyspan.integrations.save_compressed`; ``to_linear`` of each layer gives dense ones.

        Parameters
        ----------
        product : str
            How coefficients are multiplied; see :class:`SparseDictionaryLinear`.

        Raises
        ------
        ValueError
            ``fit`` comes first, or a layer is missing in ``model``.
        """
        if not hasattr(self, "report_"):
            raise ValueError("fit must come before compress")
        names = {name for name, _ in model.named_modules()}
        missing = [name for name in self.layers_ if name not in names]
        if missing:
            raise ValueError(f"model must have the layers that were fitted, got none called {missing[0]}")
        for name, module in self.layers_.items():
            if isinstance(module, SparseDictionaryLinear):
                module.product = product
            put(model, name, module)
        return model


def _weight_bytes(layer: TargetLayer, dtypes: Mapping[str, torch.dtype]) -> int:
    return layer.d_in * layer.d_out * dtypes[layer.name].itemsize
