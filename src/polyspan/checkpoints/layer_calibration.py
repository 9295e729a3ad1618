"""What calibration text tells of the inputs of a model's layers, gathered once for any number of compressions."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ._calibration import (
    TargetLayer,
    Whitening,
    as_batches,
    find_layers,
    gather_grams,
    trace_sites,
    warn_of_few,
    whiten,
)

__all__ = ["LayerCalibration", "Whitening", "calibrate_layers", "whiten"]


class LayerCalibration(NamedTuple):
    """Gram matrices of the inputs of a model's linear layers, as :func:`calibrate_layers` gathers them.

    Attributes
    ----------
    sites : list of list of str
        Names of layers in the order in which the model comes to them; those that read the same input stand together.
    grams : dict of str to Tensor of shape (d_in, d_in)
        XᵀX in float64, not centred, by the first layer of each site.
    n_rows : dict of str to int
        Tokens that each site saw.
    """

    sites: list[list[str]]
    grams: dict[str, Tensor]
    n_rows: dict[str, int]

    def check(self, layers: Sequence[TargetLayer]) -> None:
        """Refuse another model's Gram matrices for ``layers``.

        Raises
        ------
        ValueError
            A matrix is not of its layer's width, or not finite.
        """
        widths = {layer.name: layer.d_in for layer in layers}
        for name, gram in self.grams.items():
            if name in widths and gram.shape != (widths[name], widths[name]):
                raise ValueError(
                    f"calibration must be of this model: {name} has {widths[name]} inputs, got a Gram matrix "
                    f"{tuple(gram.shape)}"
                )
            if not bool(gram.isfinite().all()):
                raise ValueError(f"calibration must be finite, got NaN or infinity at {name}")


def calibrate_layers(
    model: nn.Module, calibration: Any, *, targets: Sequence[str] | None = None, skip_bad_batches: bool = False
) -> LayerCalibration:
    """Run calibration text through a model once, and keep the Gram matrix of every layer's inputs.

    Compressions at several ratios or by several methods then share it, where each would run the text again. All
    matrices are held at a time: 8 d² bytes a site.
    Source: catalogue entry ``cospadi``.

    Parameters
    ----------
    model, calibration
        As of :meth:`SparseDictionaryCompressor.fit`.
    targets, skip_bad_batches
        As of :class:`SparseDictionaryCompressor`.

    Raises
    ------
    ValueError
        No layer is named by ``targets``, layers are quantised or compressed already, or activations are not finite.

    Warns
    -----
    UserWarning
        Layers saw fewer tokens than they have inputs.
    """
    batches = as_batches(calibration)
    layers = find_layers(model, targets)
    sites = trace_sites(model, layers, batches)
    widths = {layer.name: layer.d_in for layer in layers}
    found = gather_grams(model, {site[0]: widths[site[0]] for site in sites}, batches, skip_bad=skip_bad_batches)
    warn_of_few(found)
    return LayerCalibration(sites, found.grams, found.n_rows)
