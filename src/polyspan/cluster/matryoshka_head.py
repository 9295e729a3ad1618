"""Prototype heads at nested widths of a feature vector, and the losses that train them without labels."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.linalg import sinkhorn

NESTINGS = ("slice", "linear")


class PrototypeLayer(nn.Module):
    """Logits of prototypes: a linear layer whose rows are ``weight_g`` times the unit rows of ``weight_v``."""

    def __init__(self, in_features: int, num_prototypes: int, *, train_gain: bool, device=None, dtype=None):
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(num_prototypes, 1, device=device, dtype=dtype), train_gain)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, in_features, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class NestedMatryoshkaHead(nn.Module):
    r"""Score a feature vector against prototypes at several widths, so that its first coordinates are of use alone.

    Level l of width :math:`m_1 < \dots < m_L` sees :math:`z_{1..m_l}` and has an MLP and
    :math:`K_l = \lfloor K m_l / m_L \rfloor` prototypes of its own: coarse groups from few coordinates, fine ones from
    all. Train it with :func:`prototype_targets` and :func:`prototype_loss`.

    With ``nesting="linear"``, which is what the published code does, each level sees a learned map of the whole z
    instead: then no prefix is ever trained, and prefixes are worth little more than without levels. Without
    ``normalize``, also as published, logits are unbounded and training leans on clipping and low rates.

    Source: catalogue entry ``franca``.

    Parameters
    ----------
    in_dim : int
        Width D of the features.
    num_prototypes : int
        K of a level of the largest width.
    widths : sequence of int, optional
        Increasing, within 1 .. D; left out, D/16, D/8, D/4, D/2 and D, as far as they hold 2 prototypes.
    nesting : {"slice", "linear"}, default="slice"
    hidden, bottleneck : int
        Widths of the MLPs within and at their end.
    num_layers : int
        Linear maps of an MLP, at least 1.
    normalize : bool
        Bring the bottleneck to length 1 and fix the lengths of the prototypes: logits are cosines. Otherwise the MLPs
        end in a GELU, and lengths are trained from 1 on.
    generator : Generator, optional
        Of the first weights; left out, torch's own.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        widths: Sequence[int] | None = None,
        nesting: str = "slice",
        hidden: int = 2048,
        bottleneck: int = 384,
        num_layers: int = 3,
        normalize: bool = True,
        *,
        generator: torch.Generator | None = None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value in (
            ("in_dim", in_dim),
            ("hidden", hidden),
            ("bottleneck", bottleneck),
            ("num_layers", num_layers),
        ):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if nesting not in NESTINGS:
            raise ValueError(f"nesting must be one of {NESTINGS}, got {nesting!r}")
        self.widths = nested_widths(in_dim, num_prototypes, widths)
        self._num_prototypes = tuple(num_prototypes * m // self.widths[-1] for m in self.widths)
        self.in_dim, self.nesting, self.normalize = in_dim, nesting, normalize
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.matryoshka_projections = nn.ModuleList(
            nn.Linear(in_dim, m, **factory) for m in (self.widths if nesting == "linear" else ())
        )
        self.mlps = nn.ModuleList(self._mlp(m, hidden, bottleneck, num_layers, factory) for m in self.widths)
        self.last_layers = nn.ModuleList(
            PrototypeLayer(bottleneck, k, train_gain=not normalize, **factory) for k in self._num_prototypes
        )
        self.reset_parameters(generator)

    def _mlp(self, width: int, hidden: int, bottleneck: int, num_layers: int, factory: dict[str, Any]) -> nn.Sequential:
        sides = [width, *[hidden] * (num_layers - 1), bottleneck]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sides):
            layers += [nn.Linear(a, b, **factory), nn.GELU()]
        return nn.Sequential(*(layers[:-1] if self.normalize else layers))

    @property
    def num_prototypes(self) -> tuple[int, ...]:
        """Prototypes of every level."""
        return self._num_prototypes

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw truncated normals of deviation 0.02, zero biases, and prototypes of random directions and length 1."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02, generator=generator)
                nn.init.zeros_(part.bias)
            elif isinstance(part, PrototypeLayer):
                nn.init.normal_(part.weight_v, generator=generator)
                nn.init.ones_(part.weight_g)

    def forward(self, z: Float[Tensor, "*batch d"]) -> tuple[Tensor, ...]:
        """Return logits (*batch, K_l) of every level, the narrowest first."""
        return tuple(self.level(z, number) for number in range(len(self.widths)))

    def level(self, z: Tensor, number: int) -> Tensor:
        """Return the logits of one level."""
        part = z[..., : self.widths[number]]
        if self.nesting == "linear":
            part = self.matryoshka_projections[number](z)
        made = self.mlps[number](part)
        if self.normalize:
            # Squares of half precision would leave too little of a small row.
            wide = made.to(torch.promote_types(made.dtype, torch.float32))
            made = F.normalize(wide, dim=-1).to(made.dtype)
        return self.last_layers[number](made)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], *, prefix: str | None = None) -> "NestedMatryoshkaHead":
        """Build the head of a published checkpoint, whose layout says all of its sizes.

        Parameters
        ----------
        state : mapping
            Keys ``matryoshka_projections.i.*``, ``mlps.i.j.*`` and ``last_layers.i.weight_g`` / ``weight_v``, or
            ``last_layers.i.parametrizations.weight.original0`` / ``original1``, after ``prefix``. Without projections
            levels are slices.
        prefix : str, optional
            Such as ``"teacher.dino_head."``; left out, the only one that is there.

        Raises
        ------
        ValueError
            There is no such head, there are several, or keys are missing or left over; they are named.
        """
        found = sorted({key[: key.index("last_layers.")] for key in state if "last_layers." in key})
        if prefix is None:
            if len(found) != 1:
                raise ValueError(f"prefix must name one head where the state holds {len(found)}: {found}")
            prefix = found[0]
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        names = {"original0": "weight_g", "original1": "weight_v"}
        own = {
            re.sub(r"parametrizations\.weight\.(original[01])$", lambda m: names[m[1]], key): value
            for key, value in own.items()
        }
        levels = sorted({int(key.split(".")[1]) for key in own if key.startswith("last_layers.")})
        try:
            firsts = [own[f"mlps.{i}.0.weight"] for i in levels]
            protos = [own[f"last_layers.{i}.weight_v"] for i in levels]
        except KeyError as error:
            raise ValueError(f"state must hold {prefix}{error.args[0]}, got {sorted(own)[:20]}") from None
        if not levels:
            raise ValueError(f"state must hold {prefix}last_layers.*, got {sorted(state)[:20]}")
        linear = "matryoshka_projections.0.weight" in own
        widths = [int(weight.shape[1]) for weight in firsts]
        in_dim = int(own["matryoshka_projections.0.weight"].shape[1]) if linear else widths[-1]
        layers = len({key for key in own if re.fullmatch(r"mlps\.0\.\d+\.weight", key)})
        made = cls(
            in_dim,
            int(protos[-1].shape[0]),
            widths,
            "linear" if linear else "slice",
            hidden=int(firsts[0].shape[0]),
            bottleneck=int(protos[0].shape[1]),
            num_layers=layers,
            normalize=False,
            device="meta",
        )
        wanted = made.state_dict()
        missing, strange = sorted(set(wanted) - set(own)), sorted(set(own) - set(wanted))
        if missing or strange:
            raise ValueError(f"state must hold exactly the keys of a head: missing {missing}, left over {strange}")
        other = [key for key, value in wanted.items() if value.shape != own[key].shape]
        if other:
            raise ValueError(
                f"state must have {other[0]} of shape {tuple(wanted[other[0]].shape)}, got {tuple(own[other[0]].shape)}"
            )
        made = made.to_empty(device="cpu").to(protos[0].dtype)
        made.load_state_dict(own)
        return made


def nested_widths(in_dim: int, num_prototypes: int, widths: Any) -> tuple[int, ...]:
    """Return the widths of the levels, checked: increasing, within D, each with 2 prototypes at least."""
    if num_prototypes < 2:
        raise ValueError(f"num_prototypes must be at least 2, got {num_prototypes}")
    if widths is None:
        halves = sorted({in_dim // 2**k for k in range(5)} - {0})
        return tuple(m for m in halves if num_prototypes * m // in_dim >= 2)
    if isinstance(widths, str) or not isinstance(widths, Iterable):
        raise ValueError(f"widths must be a sequence of whole numbers, got {widths!r}")
    sides = tuple(int(m) for m in widths)
    if not sides or sides[0] < 1 or sides[-1] > in_dim or any(a >= b for a, b in itertools.pairwise(sides)):
        raise ValueError(f"widths must increase within 1 .. in_dim={in_dim}, got {list(widths)}")
    few = [m for m in sides if num_prototypes * m // sides[-1] < 2]
    if few:
        raise ValueError(
            f"num_prototypes must leave every level 2 prototypes, got {num_prototypes} for widths {list(sides)}, "
            f"which leaves width {few[0]} {num_prototypes * few[0] // sides[-1]}"
        )
    return sides


@torch.no_grad()
def prototype_targets(
    logits: Float[Tensor, "b k"], *, temperature: float | int = 0.07, rounds: int = 3
) -> Float[Tensor, "b k"]:
    r"""Return the teacher's targets: rows that sum to 1, with prototypes used about equally over the batch.

    Sinkhorn-Knopp on :math:`\exp(\mathrm{logit}/T)`, columns first and rows last, in the log domain. With few rounds,
    three as published, columns are equal only roughly. Where prototypes are many more than rows most of them stand for
    fractions of one row: keep their number near that of the rows.

    Source: catalogue entry ``franca``.

    Parameters
    ----------
    logits : tensor of shape (b, K)
    temperature : float
        T > 0, in units of the logits.
    rounds : int
        Rounds of scaling.

    Raises
    ------
    ValueError
        There is one row only, whose target would be the same whatever it shows.
    """
    if len(logits) < 2:
        raise ValueError(f"logits must have at least 2 rows, got {len(logits)}: one row alone takes all prototypes")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    rows = torch.ones(len(logits), dtype=wide.dtype, device=wide.device)
    plan = sinkhorn(wide, rows, temperature=float(temperature), max_iter=int(rounds), tol=None)
    # Potentials of large logits are rounded coarsely: sums of rows are made exact by division.
    return plan / plan.sum(dim=1, keepdim=True)


def prototype_loss(
    logits: Float[Tensor, "b k"], targets: Float[Tensor, "b k"], *, temperature: float | int = 0.1
) -> Float[Tensor, "b"]:
    r"""Return the cross entropy of every row, :math:`-\sum_k q_k \log\mathrm{softmax}(s/T)_k`, in nats.

    Source: catalogue entry ``franca``.

    Parameters
    ----------
    logits : tensor of shape (b, K)
        The student's.
    targets : tensor of shape (b, K)
        From :func:`prototype_targets` of another view of the same rows.
    temperature : float
        T > 0.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -torch.linalg.vecdot(targets.to(wide.dtype), F.log_softmax(wide / temperature, dim=1))


def koleo_loss(x: Float[Tensor, "b d"], *, eps: float = 1e-8) -> Float[Tensor, ""]:
    r"""Return what spreads unit rows: :math:`-\mathrm{mean}_i \log(\lVert x_i - x_{nn(i)}\rVert + \epsilon)`.

    Source: catalogue entry ``franca``.

    Parameters
    ----------
    x : tensor of shape (b, d)
        At least 2 rows; they are scaled to length 1.
    eps : float
        Keeps equal rows finite.
    """
    if len(x) < 2:
        raise ValueError(f"x must have at least 2 rows, got {len(x)}")
    unit = F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)
    with torch.no_grad():
        near = (unit @ unit.T).fill_diagonal_(-2).argmax(dim=1)
    return -torch.log(torch.linalg.vector_norm(unit - unit[near], dim=1) + eps).mean()
