"""Pictures of a low-rank mixture and of a denoiser: spectra, ranks along the noise, agreement of halves."""

from pathlib import Path
from typing import Any

import numpy as np

from polyspan.io import picture_path, write_picture

from .denoiser_jacobian import RankProfile
from .low_rank_sufficiency import Sufficiency


def plot_low_rank(
    path: Path | str,
    *,
    mixture: Any = None,
    profile: RankProfile | None = None,
    sufficiency: Sufficiency | None = None,
) -> Path:
    """Draw what is given: variances of the components, ranks of the Jacobian by noise level, agreement of two halves.

    Parameters
    ----------
    path : path
        .svg, .png or .pdf; written atomically, with equal bytes for equal input.
    mixture : LowRankGaussianMixture, optional
        Fitted.
    profile : RankProfile, optional
    sufficiency : Sufficiency, optional

    Raises
    ------
    ValueError
        Nothing is given, or the suffix is another one.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = picture_path(path)
    parts: tuple[tuple[Any, Any], ...] = (
        (draw_spectra, mixture),
        (draw_profile, profile),
        (draw_halves, sufficiency),
    )
    given: list[tuple[Any, Any]] = [(draw, what) for draw, what in parts if what is not None]
    if not given:
        raise ValueError("one of mixture, profile and sufficiency must be given, got none")
    with mpl.rc_context({"svg.hashsalt": "polyspan", "font.size": 9}):
        figure = Figure(figsize=(4.2 * len(given), 3.4), layout="constrained", dpi=120)
        FigureCanvasAgg(figure)
        for axes, (draw, what) in zip(figure.subplots(1, len(given), squeeze=False)[0], given, strict=True):
            draw(axes, what)
        write_picture(figure, path)
    return path


def draw_spectra(axes: Any, mixture: Any) -> None:
    """Draw the variances of each component along its directions, and its white one."""
    for k, rank in enumerate(mixture.ranks_):
        total = mixture.spectra_[k, :rank] + mixture.noise_variance_[k]
        (line,) = axes.plot(np.arange(1, rank + 1), total, marker=".", label=f"component {k}")
        axes.axhline(mixture.noise_variance_[k], color=line.get_color(), linewidth=0.8, linestyle=":")
    axes.set(title="Variances; dotted: white", xlabel="direction", ylabel="variance", yscale="log")
    if len(mixture.ranks_) <= 10:
        axes.legend(fontsize=7)


def draw_profile(axes: Any, profile: RankProfile) -> None:
    """Draw the directions of the Jacobian by noise level, of each trajectory and on average."""
    axes.plot(profile.sigmas, profile.ranks.T, color="#a0aec0", linewidth=0.7)
    axes.plot(profile.sigmas, profile.ranks.mean(axis=0), color="#2f855a", label="mean rank")
    axes.axhline(profile.intrinsic_dimension, color="tab:red", linewidth=0.8, linestyle="--")
    title = f"Least mean rank {profile.intrinsic_dimension:.1f}"
    axes.set(title=title, xlabel="noise level", ylabel="rank of the Jacobian", xscale="log", ylim=(0, None))
    axes.legend()


def draw_halves(axes: Any, found: Sufficiency) -> None:
    """Draw how far subspaces of two halves agree, by the rows of a half."""
    repeats = np.repeat(found.per_dimension, found.trials.shape[1])
    axes.plot(repeats, found.trials.ravel(), ".", color="#a0aec0")
    axes.plot(found.per_dimension, found.agreement, color="#2f855a", label="mean of pairs")
    axes.axhline(found.chance, color="black", linewidth=0.8, linestyle=":", label="random subspaces")
    axes.axvline(1, color="tab:red", linewidth=0.8, linestyle="--", label="rows = dimensions")
    axes.set(
        title="Agreement of two halves", xlabel="rows a dimension", ylabel="agreement", xscale="log", ylim=(0, 1.02)
    )
    axes.legend(fontsize=7)
