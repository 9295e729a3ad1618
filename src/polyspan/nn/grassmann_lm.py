"""A small language model that mixes tokens by planes, and reads on with a state of constant size."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.errors import WrongContent
from polyspan.io import load_fitted, save_fitted

from .grassmann_mixing import OFFSETS, GrassmannBlock, MixingState, check_dropout, check_mask, reset_linears

POSITIONS = ("learned", "none")


class LMState(NamedTuple):
    """What the model keeps of the text read so far; its size does not depend on how much that was.

    ``layers`` holds the state of each layer, ``position`` (b,) how many real tokens were read, ``length`` how many in
    all.
    """

    layers: tuple[MixingState, ...]
    position: Tensor
    length: int


def offsets_by_layer(offsets: Sequence[Any], num_layers: int) -> list[tuple[int, ...]]:
    """Return each layer's offsets, from one sequence for all layers or a sequence of sequences."""
    if any(isinstance(o, Sequence) for o in offsets):
        if len(offsets) != num_layers or not all(isinstance(o, Sequence) for o in offsets):
            raise ValueError(f"offsets must be integers, or num_layers={num_layers} sequences of them, got {offsets}")
        return [tuple(o) for o in offsets]
    return [tuple(offsets)] * num_layers


def as_ids(ids: Tensor) -> Tensor:
    """Return token ids (b, t) as int64; of any width of integers, and of no other kind."""
    if ids.ndim != 2 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"ids must be integers of shape (b, t), got shape {tuple(ids.shape)} of {ids.dtype}")
    return ids.long()


class GrassmannLM(nn.Module):
    """Language model in the manner of GPT, with :class:`CausalGrassmannMixing` in the place of attention.

    Embeddings of tokens and positions, blocks, a last LayerNorm, and the transposed token embedding for the logits of
    the next token. Time grows linearly with the text, and reading on with a state takes the same time and memory at
    every token: see :meth:`init_state` and :meth:`stream`.

    Breaks: a logit depends on ``receptive_field`` tokens before its own and on no other, so nothing is recalled from
    further back. Learned positions end at ``max_length``; with ``positions="none"`` a text can go on for ever.
    Source: catalogue entry ``grassmann-mixing``.

    Parameters
    ----------
    vocab_size : int
        At least 2.
    d_model : int, default=256
    num_layers : int, default=6
    r : int, default=32
    offsets : sequence of int, or one such sequence a layer, default=(1, 2, 4, 8, 12, 16)
    dropout : float, default=0.1
    ffn : int, optional
        Four times d_model where not given.
    max_length : int, default=256
        Size of the table of positions, in tokens.
    positions : {"learned", "none"}, default="learned"
    norm_first, mixing
        Of :class:`GrassmannBlock`.
    tied : bool, default=True
        Otherwise the logits have a matrix of their own.
    check : bool, default=True
        Refuse token ids out of range, which waits for an accelerator at each call; left out of compiled graphs.
    generator : torch.Generator, optional

    Attributes
    ----------
    receptive_field : int
        How many tokens back a logit can depend on, beside its own.
    config : dict
        All arguments, as JSON types.

    Raises
    ------
    ValueError
        An argument is out of range.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int = 256,
        num_layers: int = 6,
        r: int = 32,
        offsets: Sequence[Any] = OFFSETS,
        dropout: float | int = 0.1,
        *,
        ffn: int | None = None,
        max_length: int = 256,
        positions: str = "learned",
        norm_first: bool = True,
        mixing: dict[str, Any] | None = None,
        tied: bool = True,
        check: bool = True,
        generator: torch.Generator | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if vocab_size < 2:
            raise ValueError(f"vocab_size must be at least 2, got {vocab_size}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {positions!r}")
        check_dropout(dropout)
        if mixing and not mixing.get("causal", True):
            raise ValueError("mixing must be causal in a language model, got causal=False")
        place: dict[str, Any] = {"device": torch.get_default_device() if device is None else device, "dtype": dtype}
        layers = offsets_by_layer(offsets, num_layers)
        self.d_model, self.max_length, self.check = d_model, max_length, check
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size, "d_model": d_model, "num_layers": num_layers, "r": r,
            "offsets": [list(o) for o in layers], "dropout": float(dropout), "ffn": ffn, "max_length": max_length,
            "positions": positions, "norm_first": norm_first, "mixing": dict(mixing or {}), "tied": tied,
            "check": check,
        }  # fmt: skip
        self.embedding = nn.utils.skip_init(nn.Embedding, vocab_size, d_model, **place)
        self.positions = (
            nn.utils.skip_init(nn.Embedding, max_length, d_model, **place) if positions == "learned" else None
        )
        self.dropout = nn.Dropout(dropout)
        block: dict[str, Any] = {"ffn": ffn, "norm_first": norm_first, "mixing": mixing, "generator": generator}
        self.blocks = nn.ModuleList(GrassmannBlock(d_model, r, o, dropout, **block, **place) for o in layers)
        self.norm = nn.LayerNorm(d_model, **place)
        self.head = None if tied else nn.utils.skip_init(nn.Linear, d_model, vocab_size, bias=False, **place)
        for part in (self.embedding, self.positions, self.head):
            if part is not None:
                reset_linears(part, generator)
        self.receptive_field = sum(max(o) for o in layers)

    @property
    def vocab_size(self) -> int:
        """How many tokens there are: rows of the embedding."""
        return self.embedding.num_embeddings

    def init_state(self, batch: int = 1) -> LMState:
        """Return the state before the first token, for so many texts."""
        blocks: Any = self.blocks
        layers = tuple(block.mixing.init_state(batch) for block in blocks)
        return LMState(layers, torch.zeros(batch, dtype=torch.long, device=self.embedding.weight.device), 0)

    def hidden(
        self,
        ids: Integer[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        state: LMState | None = None,
        *,
        embeddings: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> Float[Tensor, "b t d"] | tuple[Float[Tensor, "b t d"], LMState]:
        """Return what the logits are made of, after the last LayerNorm; arguments as of :meth:`forward`."""
        if (ids is None) == (embeddings is None):
            raise ValueError(
                f"exactly one of ids and embeddings must be given, got {'neither' if ids is None else 'both'}"
            )
        if ids is not None:
            ids = as_ids(ids)
        else:
            self._check_embeddings(embeddings)
        given: Any = embeddings if ids is None else ids
        shape, past = given.shape[:2], 0 if state is None else state.length
        t = shape[1]
        if state is not None:
            self._check_state(state, shape[0])
        if self.positions is not None and past + t > self.max_length:
            raise ValueError(
                f"{'embeddings' if ids is None else 'ids'} must end within max_length={self.max_length} positions, "
                f"got {past} and {t} more"
            )
        if ids is not None and self.check and not torch.compiler.is_compiling() and not ids.is_meta and ids.numel():
            low, high = (int(v) for v in ids.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(f"ids must lie in 0..{self.vocab_size - 1}, got {low if low < 0 else high}")
        real = check_mask(attention_mask, given, shape)
        if attention_mask is None:
            place = torch.arange(t, device=given.device).expand(shape)
        else:
            place = (real.cumsum(dim=1) - 1).clamp(min=0)
        h = given if ids is None else self.embedding(ids)
        if self.positions is not None:
            h = h + self.positions(place if state is None else place + state.position.unsqueeze(1))
        h = self.dropout(h)
        after = []
        for i, block in enumerate(self.blocks):
            if seen is not None:
                seen.append(h)
            if state is None:
                h = block(h, attention_mask)
            else:
                h, left = block(h, attention_mask, state.layers[i])
                after.append(left)
        h = self.norm(h)
        if seen is not None:
            seen.append(h)
        return h if state is None else (h, LMState(tuple(after), state.position + real.sum(dim=1), past + t))

    def _check_embeddings(self, embeddings: Any) -> None:
        if embeddings.ndim != 3 or embeddings.shape[2] != self.d_model or not embeddings.is_floating_point():
            raise ValueError(
                f"embeddings must be floats of shape (b, t, {self.d_model}), got shape {tuple(embeddings.shape)} of "
                f"{embeddings.dtype}"
            )

    def _check_state(self, state: LMState, batch: int) -> None:
        if len(state.layers) != len(self.blocks):
            raise ValueError(f"state must hold {len(self.blocks)} layers, got {len(state.layers)}")
        if len(state.position) != batch:
            raise ValueError(f"state must be of {batch} texts, as ids, got one of {len(state.position)}")

    def logits(self, hidden: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch vocab"]:
        """Turn what :meth:`hidden` returns into logits of the next token."""
        return F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)

    def forward(
        self,
        ids: Integer[Tensor, "b t"] | None = None,
        attention_mask: Tensor | None = None,
        state: LMState | None = None,
        *,
        embeddings: Tensor | None = None,
        seen: list[Tensor] | None = None,
    ) -> Float[Tensor, "b t vocab"] | tuple[Float[Tensor, "b t vocab"], LMState]:
        """Return logits of the token after each; with a state, go on from it and return the state after, too.

        Parameters
        ----------
        ids : Tensor of shape (b, t), integers
        attention_mask : Tensor of shape (b, t), optional
            True or 1 where a token is real; padding may stand left or right.
        state : LMState, optional
        embeddings : Tensor of shape (b, t, d_model), floats, optional
            In the place of ids: what stands in the table of tokens or anything else, without positions.
        seen : list, optional
            Takes in what each block was given, and last what the logits are made of: num_layers + 1 tensors (b, t, d).

        Raises
        ------
        ValueError
            An id is out of range, a shape does not fit, the text is longer than the table of positions, or ids and
            embeddings are both given, or neither.
        """
        found: Any = self.hidden(ids, attention_mask, state, embeddings=embeddings, seen=seen)
        if state is None:
            return self.logits(found)
        h, after = found
        return self.logits(h), after

    def loss(self, ids: Integer[Tensor, "b t"], attention_mask: Tensor | None = None) -> Float[Tensor, ""]:
        """Return the mean cross-entropy, in nats, of every real token after the first given those before it."""
        ids = as_ids(ids)
        if ids.shape[1] < 2:
            raise ValueError(f"ids must hold at least 2 tokens a text, got {ids.shape[1]}")
        real = check_mask(attention_mask, ids, ids.shape)
        logits = self(ids, attention_mask)[:, :-1]
        each = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        counted = (real[:, 1:] & real[:, :-1]).flatten()
        return (each * counted).sum() / counted.sum().clamp(min=1)

    @torch.no_grad()
    def stream(
        self,
        ids: Integer[Tensor, "b t"],
        attention_mask: Tensor | None = None,
        *,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
        truncate: bool = False,
    ) -> Iterator[Integer[Tensor, "b"]]:
        """Yield one next token (b,) a text after another, without end where ``positions`` is "none".

        Each costs the same, whatever was read before. Dropout is off between the start and each token.

        Parameters
        ----------
        ids : Tensor of shape (b, t)
            What is there already, at least one token a text.
        attention_mask : Tensor of shape (b, t), optional
            Padding must stand left.
        temperature : float, default=1.0
            Logits are divided by it; 0 takes the likeliest token.
        top_k : int, optional
            Draw among the k likeliest only.
        generator : torch.Generator, optional
            torch's global one where not given.
        truncate : bool, default=False
            Where the positions end, go on from the last half of the table instead of ending in an error; a start longer
            than the table loses its first tokens.

        Raises
        ------
        ValueError
            An argument is out of range, or the positions end.
        """
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature must be at least 0 and finite, got {temperature}")
        if top_k is not None and not 1 <= top_k <= self.vocab_size:
            raise ValueError(f"top_k must be between 1 and {self.vocab_size}, got {top_k}")
        ids = as_ids(ids)
        if ids.shape[1] < 1:
            raise ValueError("ids must hold at least one token a text, got none")
        real = check_mask(attention_mask, ids, ids.shape)
        if not bool(real[:, -1].all()):
            raise ValueError("attention_mask must end in real tokens, so that padding stands left, got padding there")
        limit = self.max_length if self.positions is not None and truncate else None
        if limit is not None:
            ids, real = ids[:, -limit:], real[:, -limit:]
        state, new = self.init_state(len(ids)), ids
        mask: Tensor | None = real if attention_mask is not None else None
        kept = ids
        while True:
            if limit is not None and state.length + new.shape[1] > limit:
                # Positions are used up: read the last half again, from position 0 on.
                state, new, mask = self.init_state(len(ids)), kept[:, -max(1, limit // 2) :], None
            was_training = self.training
            self.eval()
            try:
                h, state = self.hidden(new, mask, state)
            finally:
                self.train(was_training)
            token = self._draw(self.logits(h[:, -1]), temperature, top_k, generator)
            new, mask = token.unsqueeze(1), None
            if limit is not None:
                kept = torch.cat([kept, new], dim=1)[:, -limit:]
            yield token

    def generate(
        self, ids: Integer[Tensor, "b t"], num_tokens: int, attention_mask: Tensor | None = None, **options: Any
    ) -> Integer[Tensor, "b longer"]:
        """Return the texts with so many tokens more; options as of :meth:`stream`."""
        as_ids(ids)
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
        source = self.stream(ids, attention_mask, **options)
        new = [next(source).to(ids.dtype) for _ in range(num_tokens)]
        return torch.cat([ids, *(token.unsqueeze(1) for token in new)], dim=1)

    @staticmethod
    def _draw(logits: Tensor, temperature: float | int, top_k: int | None, generator: torch.Generator | None) -> Tensor:
        if temperature == 0:
            return logits.argmax(dim=-1)
        logits = logits.float() / temperature
        if top_k is not None:
            logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
        return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)

    def save(self, path: Path | str) -> Path:
        """Write the model to one .safetensors file, atomically; bfloat16 weights are widened."""
        arrays = {
            name: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
            for name, value in self.state_dict().items()
        }
        return save_fitted(Path(path), kind="GrassmannLM", arrays=arrays, params={"config": self.config})

    @classmethod
    def load(cls, path: Path | str) -> "GrassmannLM":
        """Read a model that :meth:`save` wrote, ready to evaluate.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds another kind of model, or weights are missing
            or left over, which are listed.
        """
        found = load_fitted(Path(path), kind="GrassmannLM")
        model = cls(**found.params["config"], device="meta")
        state = {name: torch.as_tensor(np.array(value)) for name, value in found.arrays.items()}
        try:
            model.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise WrongContent(path, found=str(error), expected="the weights that its configuration asks for") from None
        return model.requires_grad_().eval()
