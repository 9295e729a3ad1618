"""Picture of an expert merge: how alike the experts of each layer are, their groups and use, and what it cost."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

from ._expert_outcome import MergedLayer
from .expert_files import ExpertCheckpoint
from .expert_merging import ExpertMerger

SHOWN = 6


def plot_expert_merge(found: ExpertCheckpoint | ExpertMerger, path: Path | str) -> Path:
    """Draw the similarity of experts, sorted by group, of up to six layers, their use, and perplexities where known.

    Parameters
    ----------
    found : ExpertCheckpoint or ExpertMerger
        What :func:`merge_expert_checkpoint` returned, or a merger after ``fit``.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one, or the merger was not fitted.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if isinstance(found, ExpertMerger) and not hasattr(found, "report_"):
        raise ValueError("found must be fitted, got an ExpertMerger without groups")
    report, similarity = (
        (found.report_, found.similarity_) if isinstance(found, ExpertMerger) else (found.report, found.similarity)
    )
    scores = {} if isinstance(found, ExpertMerger) else {**found.perplexity, **found.comparison}
    places = np.unique(np.linspace(0, len(report.layers) - 1, min(SHOWN, len(report.layers))).round().astype(int))
    layers = [report.layers[i] for i in places]
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 8}):
        figure = Figure(figsize=(max(6, 2.1 * len(layers)), 5.6 if scores else 3.6), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(2, 1.2)) if scores else [figure]
        axes = parts[0].subplots(2, len(layers), squeeze=False, height_ratios=(3, 1))
        for (top, bottom), layer in zip(axes.T, layers, strict=True):
            image = _draw_layer(top, bottom, layer, similarity[layer.name])
        parts[0].colorbar(image, ax=list(axes[0]), label="mean cosine of outputs", shrink=0.8)
        if scores:
            axis = parts[1].subplots()
            axis.barh(
                list(scores), list(scores.values()), color=["#718096" if n == "before" else "#2b6cb0" for n in scores]
            )
            axis.invert_yaxis()
            axis.margins(x=0.1)
            axis.set(xlabel="perplexity on the text for evaluation")
            for i, value in enumerate(scores.values()):
                axis.text(value, i, f" {value:.4g}", va="center")
        write_picture(figure, path)
    return path


def _draw_layer(top: Any, bottom: Any, layer: MergedLayer, gram: np.ndarray) -> Any:
    groups = np.asarray(layer.groups)
    order = np.argsort(groups, kind="stable")
    image = top.imshow(gram[np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r")
    edges = np.flatnonzero(np.diff(groups[order])) + 0.5
    for edge in edges:
        top.axhline(edge, color="black", linewidth=0.6)
        top.axvline(edge, color="black", linewidth=0.6)
    short = layer.name.replace(".mlp.experts", "").replace(".experts", "")
    error = "" if np.isnan(layer.error) else f"\nerror {layer.error:.1%}"
    top.set(title=f"{short}\n{layer.n_experts} to {layer.n_kept}{error}", xticks=[], yticks=[])
    bottom.bar(np.arange(len(order)), np.asarray(layer.frequencies)[order], color="#c05621")
    bottom.set(xticks=[], xlabel="experts, by group", ylim=(0, None))
    bottom.set_ylabel("share of tokens")
    return image
