"""Irreps strings as e3nn writes them, read without e3nn."""

import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

SYNTAX = re.compile(r"(?:(\d+)x)?(\d+)([eo])")


class Irrep(NamedTuple):
    """``mul`` copies of the representation of degree ``l`` and parity ``p`` (1 or -1)."""

    mul: int
    l: int
    p: int

    @property
    def natural(self) -> int:
        """1 where the parity is that of the spherical harmonics, (-1)^l; -1 for pseudo-tensors."""
        return self.p * (-1) ** self.l

    @property
    def name(self) -> str:
        """Degree and parity, such as "1o"."""
        return f"{self.l}{'e' if self.p == 1 else 'o'}"


def read_irreps(irreps: Any, argument: str) -> tuple[Irrep, ...]:
    """Read "8x0e+8x1o", or anything whose str() is such a text, as e3nn's Irreps.

    Raises
    ------
    ValueError
        It is no list of irreps, or it is empty.
    """
    found = []
    text = re.sub(r"\s", "", str(irreps))
    for part in text.split("+"):
        match = SYNTAX.fullmatch(part)
        if match is None:
            raise ValueError(f"{argument} must be irreps such as '8x0e+8x1o', got {part!r} in {str(irreps)!r}")
        mul, l, parity = match.groups()
        if mul is None or int(mul) > 0:
            found.append(Irrep(int(mul or 1), int(l), 1 if parity == "e" else -1))
    if not found:
        raise ValueError(f"{argument} must hold at least one irrep, got {str(irreps)!r}")
    return tuple(found)


def write_irreps(irreps: Iterable[Irrep]) -> str:
    """Return the text that e3nn reads back."""
    return "+".join(f"{part.mul}x{part.name}" for part in irreps)


def check_channels(irreps: Sequence[Irrep], argument: str, *, pseudo: bool) -> int:
    """Return the multiplicity that all irreps share, or say which one is in the way.

    Raises
    ------
    ValueError
        Multiplicities differ, an irrep stands twice, or a pseudo-tensor is there and ``pseudo`` is False.
    """
    first, seen = irreps[0], set()
    for part in irreps:
        if part.mul != first.mul:
            raise ValueError(
                f"{argument} must have one multiplicity for all irreps, got {part.mul}x{part.name} "
                f"beside {first.mul}x{first.name}"
            )
        if part.name in seen:
            raise ValueError(f"{argument} must name an irrep once, got {part.name} twice; add it to its multiplicity")
        seen.add(part.name)
        if not pseudo and part.natural < 0:
            raise ValueError(
                f"{argument} must have parity (-1)^l, the only one that products of functions on the sphere have, "
                f"got the pseudo-tensor {part.name}; paths='all' makes and takes it"
            )
    return first.mul


def width(irreps: Sequence[Irrep]) -> int:
    """Return the number of components of one channel."""
    return sum(2 * part.l + 1 for part in irreps)
