"""Picture of a table that was learnt: losses by pass, where each kind of table ends, and the rows that columns use."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from polyspan.io import picture_path, write_picture

from ._lookup_plan import SCHEMES
from ._value_keys import PAD
from .unified_embedding import Collisions

SHOWN = 40
COLOURS = ("#2b6cb0", "#c05621", "#4a5568")


class LearntTable(NamedTuple):
    """How one kind of table was learnt: losses on rows held out and on those trained on, a pass, and its bytes."""

    held_out: Sequence[float]
    trained: Sequence[float]
    nbytes: int


def learnt_table(model: Any) -> LearntTable:
    """Return what is to be drawn of a classifier or regressor that a file was fitted to."""
    held = list(model.validation_losses_)
    passes = np.array_split(np.asarray(model.loss_curve_, float), max(1, len(held) or model.n_iter_))
    embedding = model.network_.embedding
    trained = [float(part.mean()) for part in passes if len(part)]
    return LearntTable(held, trained, 0 if embedding is None else embedding.nbytes)


def rows_used(embedding: Any, columns: Mapping[str, Any]) -> dict[str, int]:
    """Return how many distinct rows of a :class:`UnifiedEmbedding` the values in ``columns`` read, by feature."""
    keys = embedding.keys(columns)
    rows = embedding.rows(keys)
    step = 1 if SCHEMES[embedding.scheme][1] == "hash" else 2
    found, column, at = {}, 0, 0
    for name, spec in embedding.features.items():
        width = spec.length * spec.n_lookups * step
        here = keys[:, column : column + spec.length] != PAD
        mine = rows[:, at : at + width].unflatten(1, (spec.length, -1))
        found[name] = len(mine[here].unique())
        column, at = column + spec.length, at + width
    return found


def plot_learnt_tables(
    tables: Mapping[str, LearntTable],
    path: Path | str,
    *,
    used: Mapping[str, int] | None = None,
    collisions: Mapping[str, Collisions] | None = None,
) -> Path:
    """Draw losses by pass, the least loss held out of each kind of table, and rows used and shared by feature.

    Parameters
    ----------
    tables : mapping of str to LearntTable
        By what they are called.
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    used : mapping of str to int, optional
        Of :func:`rows_used`; the first 40 features are shown.
    collisions : mapping of str to Collisions, optional
        Of ``collision_report``, of the same features.

    Raises
    ------
    ValueError
        The suffix is another one, there is no table, or features differ.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    path = picture_path(path)
    if not tables:
        raise ValueError("tables must be at least one, got none")
    if list(used or {}) != list(collisions or {}):
        raise ValueError(
            f"collisions must be of the features of used, {list(used or {})}, got {list(collisions or {})}"
        )
    names = list(used or {})[:SHOWN]
    wanted = ["losses", *["kinds"] * (len(tables) > 1), *["rows", "shared"] * bool(names)]
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(4.2 * len(wanted), 1.6 + 0.28 * max(len(names), 8)), layout="constrained")
        axes = dict(zip(wanted, np.atleast_1d(figure.subplots(1, len(wanted))), strict=True))
        colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(tables)}
        for name, table in tables.items():
            for values, style, what in ((table.trained, ":", "trained on"), (table.held_out, "-", "held out")):
                if len(values):
                    passes = np.arange(1, len(values) + 1)
                    label = f"{name}, {what}"
                    axes["losses"].plot(passes, values, style, marker=".", color=colours[name], label=label)
        axes["losses"].set(title="Loss by pass", xlabel="pass over the file", ylabel="mean loss")
        axes["losses"].xaxis.get_major_locator().set_params(integer=True)
        axes["losses"].legend(fontsize=7)
        if len(tables) > 1:
            least = [min(table.held_out, default=np.nan) for table in tables.values()]
            labels = [f"{name}\n{table.nbytes / 2**20:.2f} MiB" for name, table in tables.items()]
            axes["kinds"].bar(labels, least, color=[colours[name] for name in tables])
            axes["kinds"].set(title="Least loss held out", ylabel="mean loss")
            axes["kinds"].tick_params(axis="x", labelsize=7)
        if names and used is not None and collisions is not None:
            places = np.arange(len(names))
            axes["rows"].barh(
                places - 0.2, [collisions[n].n_values for n in names], 0.4, color="#a0aec0", label="values"
            )
            axes["rows"].barh(places + 0.2, [used[n] for n in names], 0.4, color="#2b6cb0", label="rows used")
            axes["rows"].set(
                title="Values and rows, by feature",
                xlabel="number",
                xscale="log",
                xlim=(0.8, None),
                yticks=places,
                yticklabels=names,
            )
            own, others = ([getattr(collisions[n], f"{kind}_share") for n in names] for kind in ("same", "others"))
            axes["shared"].barh(places - 0.2, own, 0.4, color="#c05621", label="among its own values")
            axes["shared"].barh(places + 0.2, others, 0.4, color="#a0aec0", label="with other features")
            axes["shared"].set(title="Rows shared, by feature", xlabel="share", xlim=(0, 1), yticks=places)
            axes["shared"].set_yticklabels(names)
            for part in ("rows", "shared"):
                axes[part].invert_yaxis()
                axes[part].legend(loc="lower right", fontsize=7)
        return write_picture(figure, path)
