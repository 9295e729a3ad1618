"""Picture of an extracted adapter: what each layer leaves out, beside LoRA, and what files and models are worth."""

from pathlib import Path

import numpy as np

from polyspan.io import picture_path, write_picture

from .tucker_files import Extraction

SHOWN = 40
COLOURS = {"base": "#a0aec0", "tuned": "#4a5568", "adapter": "#2f855a", "base with adapter": "#2f855a"}
LORA = "#c05621"


def plot_extraction(found: Extraction, path: Path | str) -> Path:
    """Draw the share that each layer leaves out, of LoRA too where it was compared; bytes; and perplexities, if any.

    Parameters
    ----------
    found : Extraction
        The first 40 layers are shown.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    layers = found.layers[:SHOWN]
    compared = all(layer.lora_error is not None for layer in layers)
    places = np.arange(len(layers))
    panels = 3 if found.perplexity else 2
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        height = 1.8 + 0.28 * max(len(layers), 6)
        figure = Figure(figsize=(4.5 + 2.2 * panels, height), layout="constrained")
        left, *others = figure.subplots(1, panels, width_ratios=[3, *[1] * (panels - 1)])
        high = 0.4 if compared else 0.8
        shift = high / 2 if compared else 0.0
        left.barh(places - shift, [row.error for row in layers], high, color=COLOURS["adapter"], label="Tucker core")
        if compared:
            left.barh(places + shift, [row.lora_error or 0.0 for row in layers], high, color=LORA, label="LoRA")
            left.legend(loc="lower right")
        left.set(title="Share of the update left out", xlim=(0, 1), yticks=places)
        left.set_yticklabels([f"{row.name} ({row.parameters:,})" for row in layers])
        left.set_ylabel("layer (parameters of the adapter)")
        left.invert_yaxis()
        sizes = {name: size.bytes for name, size in found.sizes.items()}
        others[0].bar(list(sizes), list(sizes.values()), color=[COLOURS[name] for name in sizes])
        others[0].set(title="Files", ylabel="bytes", yscale="log")
        if found.perplexity:
            told = {name: value for name, value in found.perplexity.items() if np.isfinite(value)}
            others[1].bar(list(told), list(told.values()), color=[COLOURS.get(name, LORA) for name in told])
            others[1].set(title="Held-out text", ylabel="perplexity")
        for axis in others:
            axis.tick_params(axis="x", rotation=60)
        return write_picture(figure, path)
