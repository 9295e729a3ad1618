"""Output layer that turns features into rotations through a continuous representation."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from . import rotation
from .rotation import Convention

Representation = Literal["6d", "5d", "9d", "quaternion", "axis-angle", "euler"]
SIZES = {"6d": 6, "5d": 5, "9d": 9, "quaternion": 4, "axis-angle": 3, "euler": 3}


class RotationHead(nn.Module):
    r"""Linear layer whose output is a rotation (\*batch, n, n), for networks that predict poses.

    Drop-in for the ``nn.Linear`` before the hand-made conversion. With "6d", "5d" and "9d" the numbers that the network
    has to output depend continuously on the rotation; with "quaternion", "axis-angle" and "euler" no continuous choice
    exists, and a network errs by up to 180 degrees near the break. Those three serve as baselines, and where all
    targets lie well within a half turn of one rotation.

    A continuous output does not help where the target itself is ambiguous, as with symmetric objects. Train with
    :func:`~polyspan.nn.chordal_loss` or :func:`~polyspan.nn.geodesic_loss`.
    Source: catalogue entry ``rotation-continuity``.

    Parameters
    ----------
    in_features : int
    representation : {"6d", "5d", "9d", "quaternion", "axis-angle", "euler"}, default="6d"
        "9d" is the nearest rotation to a free matrix: slower, often a little more accurate. All have derivatives of
        every order, backward, forward and mixed.
    n : int, default=3
        Dimension of the rotations; other than 3, only "6d" (n(n-1) numbers) and "9d" (n² numbers) are possible.
    convention : {"columns", "rows", "interleaved"}, default="columns"
        Order of the six numbers, which matters only to weights trained elsewhere.
    sequence : str, default="XYZ"
        Of the Euler angles.
    bias_init : {"identity", "uniform"}, default="identity"
        Whether an untrained head turns the zero feature into the identity, or has the bias of ``nn.Linear``.
    check : bool, default=True
        Refuse outputs that are not finite, warn of degenerate ones; waits for an accelerator at each call, is left out
        of compiled and exported graphs, and must be off inside ``torch.vmap``.
    generator : torch.Generator, optional
        Source of the weights; torch's global one where not given.
    """

    def __init__(
        self,
        in_features: int,
        representation: Representation = "6d",
        *,
        n: int = 3,
        convention: Convention = "columns",
        sequence: str = "XYZ",
        bias_init: Literal["identity", "uniform"] = "identity",
        check: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if in_features < 1:
            raise ValueError(f"in_features must be at least 1, got {in_features}")
        if representation not in SIZES:
            raise ValueError(f"representation must be one of {tuple(SIZES)}, got {representation!r}")
        if n < 2 or (n != 3 and representation not in ("6d", "9d")):
            raise ValueError(f"n must be 3, or at least 2 with '6d' and '9d', got {n} with {representation!r}")
        if n != 3 and convention != "columns":
            raise ValueError(f"convention must be 'columns' where n is not 3, got {convention!r}")
        if bias_init not in ("identity", "uniform"):
            raise ValueError(f"bias_init must be 'identity' or 'uniform', got {bias_init!r}")
        self.in_features, self.representation, self.n, self.check = in_features, representation, n, check
        self.convention, self.sequence, self.bias_init = convention, sequence, bias_init
        size = SIZES[representation] if n == 3 else n * (n - 1) if representation == "6d" else n * n
        self.weight = nn.Parameter(torch.empty(size, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size, device=device, dtype=dtype))
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights as ``nn.Linear`` does, and set the bias as ``bias_init`` says."""
        bound = 1 / math.sqrt(self.in_features)
        self.weight.uniform_(-bound, bound, generator=generator)
        self.bias.uniform_(-bound, bound, generator=generator)
        if self.bias_init == "identity":
            self.bias.copy_(self._numbers_of_identity())

    def _numbers_of_identity(self) -> Tensor:
        eye = torch.eye(self.n, dtype=torch.float64)
        match self.representation:
            case "6d" if self.n != 3:
                return rotation.matrix_to_rotationnd(eye)
            case "6d":
                return rotation.matrix_to_rotation6d(eye, convention=self.convention)
            case "9d":
                return eye.flatten()
            case "quaternion":
                return rotation.matrix_to_quaternion(eye, order="wxyz")
            case "euler":
                return rotation.matrix_to_euler(eye, sequence=self.sequence, check=False)
            case "5d":
                return rotation.matrix_to_rotation5d(eye)
            case _:
                return rotation.matrix_to_axis_angle(eye)

    def numbers(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch p"]:
        """Return the numbers that stand for the rotations, before they are turned into matrices."""
        return F.linear(x, self.weight, self.bias)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch n n"]:
        """Return one rotation for each row of features."""
        raw = self.numbers(x)
        match self.representation:
            case "6d" if self.n != 3:
                return rotation.rotationnd_to_matrix(raw, check=self.check)
            case "6d":
                return rotation.rotation6d_to_matrix(raw, convention=self.convention, check=self.check)
            case "5d":
                return rotation.rotation5d_to_matrix(raw, check=self.check)
            case "9d":
                return rotation._procrustes(raw, self.n, self.check)
            case "quaternion":
                return rotation.quaternion_to_matrix(raw, order="wxyz", check=self.check)
            case "euler":
                return rotation.euler_to_matrix(raw, sequence=self.sequence, check=self.check)
            case _:
                return rotation.axis_angle_to_matrix(raw, check=self.check)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, representation={self.representation!r}, n={self.n}"
