"""Picture of a compression: what each layer lost and weighs, and how the methods compare."""

import math
from collections.abc import Sequence
from pathlib import Path

from polyspan.io import picture_path, write_picture

from ._compression import LayerReport
from .compress_files import CompressedFiles

OURS, OTHERS = "#2b6cb0", "#a0aec0"


def errors_by_role(layers: Sequence[LayerReport]) -> dict[str, tuple[list[int], list[float]]]:
    """Return of each role the numbers of its compressed layers' blocks, and their errors.

    A role is the last part of layers' names, after the first part where several stacks have it; the number is the first
    in a name, and where there is none, layers are counted from 0.
    """
    found: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
    for row in layers:
        if row.method:
            *parts, role = row.layer.split(".")
            places = [i for i, part in enumerate(parts) if part.isdigit()]
            stack = ".".join(parts[: places[0]]) if places else ""
            blocks, errors = found.setdefault((stack, role), ([], []))
            blocks.append(int(parts[places[0]]) if places else len(blocks))
            errors.append(row.error)
    several = len({stack for stack, _ in found}) > 1
    return {f"{stack} {role}".lstrip() if several else role: line for (stack, role), line in found.items()}


def plot_compression(found: CompressedFiles, path: Path | str) -> Path:
    """Draw the lost share of each layer's outputs by role and depth, and added perplexity (or mean error) by method.

    Parameters
    ----------
    found : CompressedFiles
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.

    Raises
    ------
    ValueError
        The suffix is another one.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    path = picture_path(path)
    roles = errors_by_role(found.layers)
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for role, (blocks, errors) in roles.items():
            left.plot(blocks, errors, marker="o", markersize=3, label=role)
        left.set(
            title="Lost share of outputs, by layer",
            xlabel="block, as in layers' names",
            ylabel="relative squared error",
        )
        left.set_ylim(bottom=0)
        left.xaxis.set_major_locator(MaxNLocator(integer=True))
        if roles:
            left.legend(fontsize=7, ncols=2)
        dense, rows = found.methods[0].perplexity, found.methods[1:]
        added = []
        if dense is not None:
            added = [math.nan if row.perplexity is None else row.perplexity - dense for row in rows]
        values = added or [row.mean_error for row in rows]
        colours = [OURS if row is rows[0] else OTHERS for row in rows]
        right.bar(range(len(rows)), values, color=colours)
        right.set_xticks(range(len(rows)), [row.method for row in rows], rotation=30, ha="right")
        if dense is not None:
            right.set(title=f"Added to the dense model's perplexity of {dense:.2f}", ylabel="perplexity")
        else:
            right.set(title="Mean lost share of outputs", ylabel="relative squared error")
        figure.suptitle(f"{rows[0].method}: {found.bytes_before:,} to {found.bytes_after:,} bytes")
        write_picture(figure, path)
    return path
