"""Second moments of two layers kept by blocks of inputs, so that inputs can be drawn again without running them."""

import numpy as np

from polyspan.linalg import PairedMoments

ROWS_A_BLOCK = 256
"""Rows of a block that are gathered before its moments are brought up to date: a merge costs as much as many rows."""


class BlockMoments:
    r"""Moments of paired activations in blocks of inputs, half of the blocks for every second input.

    All rows of one input (positions of an image) go to one block, and inputs to the blocks of their half at random, as
    many to each. Drawing blocks again with replacement is a bootstrap over inputs whose dependent rows stay together.
    With b blocks a half it knows a variance as well as 2(b - 1) degrees of freedom do, a standard error to about
    :math:`1/\sqrt{4(b-1)}` of itself: 17 % with b = 10. Memory is that of :class:`PairedMoments` once a block.

    Parameters
    ----------
    d_in, d_out : int
    n_blocks : int
        Even, at least 2; with fewer inputs some stay empty and are left out.
    rng : numpy Generator
        Deals inputs to blocks.
    """

    def __init__(self, d_in: int, d_out: int, n_blocks: int, rng: np.random.Generator):
        self.blocks = [PairedMoments(d_in, d_out) for _ in range(n_blocks)]
        self.n_items = 0
        self._rng, self._dealt = rng, [0, 0]
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._n_waiting = 0

    def add(self, X: np.ndarray, Y: np.ndarray, items: np.ndarray | None = None) -> None:
        """Add paired activations (items, positions, units), or (tokens, 1, units) with the item of each, ascending."""
        present, own = (np.arange(len(X)),) * 2 if items is None else np.unique(items, return_inverse=True)
        n = len(present)
        half, block = (self.n_items + np.arange(n)) % 2, np.empty(n, dtype=np.int64)
        for parity in range(2):
            mine = np.flatnonzero(half == parity)
            dealt = self._dealt[parity] + self._rng.permutation(len(mine))
            block[mine] = 2 * (dealt % (len(self.blocks) // 2)) + parity
            self._dealt[parity] += len(mine)
        self.n_items += n
        self._waiting.append((X, Y, block[own]))
        self._n_waiting += X.shape[0] * X.shape[1]
        if self._n_waiting >= ROWS_A_BLOCK * len(self.blocks):
            self._flush()

    def _flush(self) -> None:
        for number, moments in enumerate(self.blocks):
            parts = [(X[block == number], Y[block == number]) for X, Y, block in self._waiting]
            sides = [np.concatenate([part[i].reshape(-1, part[i].shape[2]) for part in parts]) for i in range(2)]
            if len(sides[0]):
                moments.update(*sides)
        self._waiting, self._n_waiting = [], 0

    def halves(self) -> tuple[PairedMoments, PairedMoments]:
        """Return the moments of the even and of the odd inputs."""
        if self._waiting:
            self._flush()
        even, odd = (merged_moments(blocks, [1] * len(blocks)) for blocks in (self.blocks[::2], self.blocks[1::2]))
        return even, odd

    def redrawn(self, rng: np.random.Generator) -> tuple[PairedMoments, PairedMoments]:
        """Return moments of both halves whose blocks are drawn again, as many as there are, with replacement."""
        made = []
        for parity in range(2):
            blocks = self._used(parity)
            drawn = np.bincount(rng.integers(len(blocks), size=len(blocks)), minlength=len(blocks))
            made.append(merged_moments(blocks, drawn.tolist()))
        return made[0], made[1]

    def _used(self, parity: int) -> list[PairedMoments]:
        if self._waiting:
            self._flush()
        return [block for block in self.blocks[parity::2] if block.n_rows]

    @property
    def inflation(self) -> float:
        """By what a standard deviation over draws is too small: b drawn blocks spread by (b - 1)/b; NaN with b = 1."""
        least = min(len(self._used(parity)) for parity in range(2))
        return float(np.sqrt(least / (least - 1))) if least > 1 else float("nan")


def merged_moments(blocks: list[PairedMoments], counts: list[int]) -> PairedMoments:
    """Merge blocks, each so many times, about their common mean: nothing large is subtracted."""
    made = PairedMoments(blocks[0].d_in, blocks[0].d_out)
    taken = [(block, count) for block, count in zip(blocks, counts, strict=True) if count and block.weight]
    made.weight = float(sum(count * block.weight for block, count in taken))
    made.n_rows = sum(count * block.n_rows for block, count in taken)
    if not taken:
        return made
    shares = np.array([count * block.weight / made.weight for block, count in taken])
    made.mean_in = shares @ np.stack([block.mean_in for block, _ in taken])
    made.mean_out = shares @ np.stack([block.mean_out for block, _ in taken])
    roots = np.sqrt(shares * made.weight)[:, None]
    A, B = (
        roots * (np.stack([getattr(block, name) for block, _ in taken]) - getattr(made, name))
        for name in ("mean_in", "mean_out")
    )
    made.cov_in, made.cross, made.cov_out = A.T @ A, A.T @ B, B.T @ B
    for block, count in taken:
        for name in ("cov_in", "cross", "cov_out"):
            getattr(made, name).__iadd__(count * getattr(block, name))
    made.spread_in, made.spread_out = float(np.trace(made.cov_in)), float(np.trace(made.cov_out))
    return made
