"""Fewer experts in the place of many, each token sent on to the group of the expert that it chose."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._expert_combining import LowRank
from ._expert_layout import ExpertStack


class MergedExperts(nn.Module):
    r"""Fewer experts behind the router of more: token weights :math:`G_i` of a group's members are added.

    Takes the place of an experts module of transformers, ``forward(hidden_states, top_k_index, top_k_weights)``, and
    gives :math:`\sum_g (\sum_{i\in g} G_i(x)) E_g(x)`. The router stays as it was, so routing is exact.
    Source: catalogue entry ``sub-moe``.

    Parameters
    ----------
    num_experts : int
        n, that the router knows.
    num_groups : int
        k experts that there are.
    hidden_size, intermediate_size : int
    activation : callable
        ``activation(gate, up)`` of two tensors (..., I); SwiGLU where not given.
    gated : bool
        Whether experts have a gate; ``activation`` gets None for it otherwise.
    bias : bool
        Whether the maps have biases.
    ranks : mapping of str to int, optional
        Of "gate", "up" and "down", where maps are kept as two factors.
    """

    def __init__(
        self,
        num_experts: int,
        num_groups: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Callable[[Tensor | None, Tensor], Tensor] | None = None,
        gated: bool = True,
        bias: bool = False,
        ranks: Mapping[str, int] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not 1 <= num_groups <= num_experts:
            raise ValueError(f"num_groups must be between 1 and num_experts={num_experts}, got {num_groups}")
        self.num_experts, self.num_groups = num_experts, num_groups
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.gated, self.bias, self.ranks = gated, bias, None if ranks is None else dict(ranks)
        self.activation = swiglu if activation is None else activation
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.maps = ("gate", "up", "down") if gated else ("up", "down")
        for name in self.maps:
            out, fan_in = (hidden_size, intermediate_size) if name == "down" else (intermediate_size, hidden_size)
            if ranks is None:
                self.register_parameter(name, nn.Parameter(torch.empty(num_groups, out, fan_in, **factory)))
            else:
                self.register_parameter(
                    f"{name}_left", nn.Parameter(torch.empty(num_groups, out, ranks[name], **factory))
                )
                self.register_parameter(
                    f"{name}_right", nn.Parameter(torch.empty(num_groups, ranks[name], fan_in, **factory))
                )
            if bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(num_groups, out, **factory)))
        self.register_buffer("groups", torch.arange(num_experts, device=device) % num_groups)
        self.groups: Tensor
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim == 3:
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
            else:
                nn.init.zeros_(parameter)

    @classmethod
    def from_stack(
        cls,
        stack: ExpertStack,
        groups: Sequence[int],
        factors: LowRank | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> "MergedExperts":
        """Make the module of a stack of k experts, and of the factors of its maps where they are kept as such."""
        parts = {k: v for k, v in stack.parts.items() if factors is None or k.endswith("bias")}
        if factors is not None:
            parts |= {
                f"{name}_{side}": part
                for side, held in zip(("left", "right"), factors, strict=True)
                for name, part in held.items()
            }
        made = cls(
            len(groups), len(stack), stack.down.shape[1], stack.up.shape[1], activation=stack.activation,
            gated=stack.gate is not None, bias=stack.down_bias is not None, device="meta",
            ranks=None if factors is None else {name: left.shape[-1] for name, left in factors.left.items()},
        )  # fmt: skip
        state = {name: part.to(dtype or part.dtype).contiguous() for name, part in parts.items()}
        state["groups"] = torch.as_tensor(groups, dtype=torch.long, device=stack.up.device)
        made.load_state_dict(state, assign=True)
        return made

    def stack(self) -> ExpertStack:
        """Return the k experts as a stack; factors are multiplied out."""
        parts: dict[str, Any] = {"gate": None, **{name: self._weight(name) for name in self.maps}}
        if self.bias:
            parts |= {f"{name}_bias": getattr(self, f"{name}_bias").detach() for name in self.maps}
        return ExpertStack(activation=self.activation, **parts)

    def _weight(self, name: str) -> Tensor:
        if self.ranks is None:
            return getattr(self, name).detach()
        return (getattr(self, f"{name}_left") @ getattr(self, f"{name}_right")).detach()

    def _apply_map(self, name: str, group: int, x: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias")[group] if self.bias else None
        if self.ranks is None:
            return nn.functional.linear(x, getattr(self, name)[group], bias)
        inner = nn.functional.linear(x, getattr(self, f"{name}_right")[group])
        return nn.functional.linear(inner, getattr(self, f"{name}_left")[group], bias)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sums (m, H) of the groups' outputs for tokens (m, H)."""
        places = self.groups[top_k_index]
        chosen = torch.zeros(len(places), self.num_groups, dtype=torch.bool, device=places.device)
        chosen.scatter_(1, places, True)
        # Routers may give float32 to a wider model: sums of weights are to be as wide as sums of outputs would be.
        wide = torch.promote_types(top_k_weights.dtype, hidden_states.dtype)
        weights = torch.zeros(chosen.shape, dtype=wide, device=places.device)
        weights = weights.scatter_add(1, places, top_k_weights.to(wide))
        out = torch.zeros_like(hidden_states)
        # All groups' tokens at once: two waits for the device, however many groups there are.
        by_group = chosen.mT.nonzero()[:, 1].split(chosen.sum(dim=0).tolist())
        for group, tokens in enumerate(by_group):
            if not len(tokens):
                continue
            x = hidden_states[tokens]
            gate = self._apply_map("gate", group, x) if self.gated else None
            made = self._apply_map("down", group, self.activation(gate, self._apply_map("up", group, x)))
            out.index_add_(0, tokens, (made * weights[tokens, group].unsqueeze(-1)).to(out.dtype))
        return out

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts in {self.num_groups} groups, ranks={self.ranks}"


def swiglu(gate: Tensor | None, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, or ``silu(up)`` without a gate."""
    return nn.functional.silu(up) if gate is None else nn.functional.silu(gate) * up
