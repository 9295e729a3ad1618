"""Language models of planes as Hugging Face models: importing this registers them with the Auto classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from polyspan.errors import require
from polyspan.nn import CausalGrassmannMixing, GrassmannLM, LMState, MixingState

transformers: Any = require("transformers", extra="hf", purpose="a Grassmann language model as a Hugging Face model")
outputs: Any = require("transformers.modeling_outputs", extra="hf")
init: Any = require("transformers.initialization", extra="hf")

MODEL_TYPE = "polyspan-grassmann-lm"


class GrassmannLMConfig(transformers.PreTrainedConfig):
    """Sizes and options of a language model of planes, in Hugging Face's words.

    Parameters
    ----------
    vocab_size, hidden_size, num_hidden_layers, intermediate_size, max_position_embeddings : int
    reduced_size : int
        Reduced width r of the mixing.
    offsets : list of int, or one such list a layer
    positions : {"learned", "none"}
    norm_first : bool
    mixing : dict, optional
        Further arguments of :class:`polyspan.nn.CausalGrassmannMixing`.
    hidden_dropout_prob : float
    tie_word_embeddings : bool
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        vocab_size: int = 30_522,
        hidden_size: int = 256,
        num_hidden_layers: int = 6,
        reduced_size: int = 32,
        offsets: Sequence[Any] = (1, 2, 4, 8, 12, 16),
        intermediate_size: int | None = None,
        max_position_embeddings: int = 256,
        positions: str = "learned",
        norm_first: bool = True,
        mixing: dict[str, Any] | None = None,
        hidden_dropout_prob: float = 0.1,
        tie_word_embeddings: bool = True,
        **options: Any,
    ):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.reduced_size, self.offsets = reduced_size, list(offsets)
        self.intermediate_size, self.max_position_embeddings = intermediate_size, max_position_embeddings
        self.positions, self.norm_first, self.mixing = positions, norm_first, dict(mixing or {})
        self.hidden_dropout_prob, self.tie_word_embeddings = hidden_dropout_prob, tie_word_embeddings
        super().__init__(**options)

    def network(self) -> GrassmannLM:
        """Make the model that this describes."""
        return GrassmannLM(
            self.vocab_size, self.hidden_size, self.num_hidden_layers, self.reduced_size, self.offsets,
            self.hidden_dropout_prob, ffn=self.intermediate_size, max_length=self.max_position_embeddings,
            positions=self.positions, norm_first=self.norm_first, mixing=self.mixing, tied=self.tie_word_embeddings,
        )  # fmt: skip


@dataclass
class GrassmannLMOutput(outputs.ModelOutput):
    """Logits (b, t, vocabulary), the loss where labels were given, and the state after the last token.

    ``hidden_states``, where asked for: what each block was given, and last what the logits are made of, (b, t, d) each.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: LMState | None = None
    hidden_states: tuple[Tensor | None, ...] | None = None


class GrassmannPreTrainedModel(transformers.PreTrainedModel):
    """What the models share: how weights start, what goes in, and which blocks are computed again on the way back."""

    config_class = GrassmannLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("GrassmannBlock",)
    _is_stateful = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a file did not bring; transformers' own functions leave alone what it did."""
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, CausalGrassmannMixing) and module.offset_weight is not None:
            init.ones_(module.offset_weight)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        """Tell the blocks what transformers would tell layers of its own: all of them, or each n-th."""
        blocks: Any = self.model.blocks
        for i, block in enumerate(blocks):
            block.gradient_checkpointing = enable and i % every_n_layers == 0
            block.checkpoint_function = gradient_checkpointing_func

    def _wanted(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, asked: Any
    ) -> tuple[Tensor, list[Tensor] | None]:
        """Return what goes in, and where hidden states are collected: None unless asked for, here or in the config."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "exactly one of input_ids and inputs_embeds must be given, got "
                f"{'neither' if input_ids is None else 'both'}"
            )
        given: Any = inputs_embeds if input_ids is None else input_ids
        asked = self.config.output_hidden_states if asked is None else asked
        return given, [] if asked else None

    def _told(self, made: Any, seen: list[Tensor] | None, asked: Any, return_dict: bool | None) -> Any:
        """Return a result with its hidden states, all or those whose numbers were asked for, as dict or as tuple."""
        if seen is not None:
            asked = self.config.output_hidden_states if asked is None else asked
            if not isinstance(asked, bool):
                numbers = {
                    i % len(seen) for i in ([asked] if isinstance(asked, int) else asked) if -len(seen) <= i < len(seen)
                }
                made["hidden_states"] = tuple(h if i in numbers else None for i, h in enumerate(seen))
            else:
                made["hidden_states"] = tuple(seen)
        return made if (self.config.return_dict if return_dict is None else return_dict) else made.to_tuple()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **options: Any) -> Any:
        """Read a model as every Hugging Face model is read, but refuse weights that are all another network's.

        Raises
        ------
        ValueError
            The folder holds weights, and none of them is the network's; missing and unexpected names are listed.
        """
        model, told = super().from_pretrained(*args, output_loading_info=True, **options)
        missing, unexpected = (sorted(told[f"{kind}_keys"]) for kind in ("missing", "unexpected"))
        own = {name for name in model.state_dict() if name.startswith("model.")}
        if unexpected and own <= {*missing, *(getattr(model, "all_tied_weights_keys", None) or {})}:
            raise ValueError(
                f"{args[0] if args else options} must hold a language model of planes, missing {missing}, "
                f"unexpected {unexpected}"
            )
        return (model, told) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embedding = value
        self.model.config["vocab_size"] = self.model.vocab_size


class GrassmannForCausalLM(GrassmannPreTrainedModel, transformers.GenerationMixin):
    """The language model with Hugging Face's ``generate``, which reads on with a state of constant size.

    Parameters
    ----------
    config : GrassmannLMConfig
    """

    def __init__(self, config: GrassmannLMConfig):
        super().__init__(config)
        self.model = config.network()
        self.post_init()

    def get_output_embeddings(self) -> nn.Module | None:
        """Return the matrix of the logits, None where it is that of the embeddings."""
        return self.model.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.head = value

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        state: LMState | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: Any = None,
        **_: Any,
    ) -> Any:
        """Return logits and, where asked for, the loss, the state and the hidden states.

        Parameters
        ----------
        input_ids : Tensor of shape (b, t)
        attention_mask : Tensor of shape (b, t), optional
        state : LMState, optional
            Go on from it.
        labels : Tensor of shape (b, t), optional
            Shifted here; -100 is left out.
        use_cache : bool, optional
            Return the state after the last token.
        return_dict : bool, optional
            False gives a tuple; the configuration's where not given.
        inputs_embeds : Tensor of shape (b, t, d), optional
            In the place of input_ids; positions are added to it.
        output_hidden_states : bool, int or list of int, optional
            Which of the num_hidden_layers + 1 to return, or all; the configuration's where not given.

        Raises
        ------
        ValueError
            Neither or both of input_ids and inputs_embeds are given, or a shape does not fit.
        """
        given, seen = self._wanted(input_ids, inputs_embeds, output_hidden_states)
        if use_cache and state is None:
            state = self.model.init_state(len(given))
        found = self.model(input_ids, attention_mask, state, embeddings=inputs_embeds, seen=seen)
        logits, after = (found, None) if state is None else found
        loss = None
        if labels is not None:
            if labels.shape != given.shape[:2]:
                name = "input_ids" if inputs_embeds is None else "inputs_embeds"
                raise ValueError(
                    f"labels must have shape {tuple(given.shape[:2])}, as {name}, got {tuple(labels.shape)}"
                )
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        made = GrassmannLMOutput(loss=loss, logits=logits, state=after)
        return self._told(made, seen, output_hidden_states, return_dict)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        state: LMState | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Leave the last token only where a state holds the others; what was given as vectors starts the text."""
        made: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if state is not None:
            made["input_ids"] = input_ids[:, -1:]
            made["attention_mask"] = None if attention_mask is None else attention_mask[:, -1:]
        elif inputs_embeds is not None:
            made |= {"input_ids": None, "inputs_embeds": inputs_embeds}
        return made | {"state": state, "use_cache": use_cache, "output_hidden_states": output_hidden_states}

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **options: Any
    ) -> dict[str, Any]:
        model_kwargs["state"] = outputs.get("state")
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **options)

    def _reorder_cache(self, state: LMState | None, beam_idx: Tensor) -> LMState | None:
        """Let each beam go on from the state of the beam that it continues."""
        if state is None:
            return None
        layers = tuple(MixingState(*(part[beam_idx] for part in layer)) for layer in state.layers)
        return LMState(layers, state.position[beam_idx], state.length)


class GrassmannForSequenceClassification(GrassmannPreTrainedModel):
    """The language model with a linear head on the mean of its last hidden states over real tokens.

    Parameters
    ----------
    config : GrassmannLMConfig
        ``num_labels`` or ``id2label`` say how many classes.
    """

    def __init__(self, config: GrassmannLMConfig):
        super().__init__(config)
        self.model = config.network()
        self.model.head = None
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: Any = None,
        **_: Any,
    ) -> Any:
        """Return ``logits`` (b, num_labels) and, where ``labels`` (b,) are given, their cross-entropy as ``loss``.

        All else as for :class:`GrassmannForCausalLM`.
        """
        given, seen = self._wanted(input_ids, inputs_embeds, output_hidden_states)
        h: Any = self.model.hidden(input_ids, attention_mask, embeddings=inputs_embeds, seen=seen)
        real = given.new_ones(given.shape[:2]) if attention_mask is None else attention_mask
        weight = real.unsqueeze(-1).to(h.dtype)
        logits = self.classifier((h * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1))
        loss = None
        if labels is not None:
            if labels.shape != logits.shape[:1]:
                raise ValueError(
                    f"labels must have shape {tuple(logits.shape[:1])}, one a text, got {tuple(labels.shape)}"
                )
            loss = nn.functional.cross_entropy(logits, labels)
        made = outputs.SequenceClassifierOutput(loss=loss, logits=logits)
        return self._told(made, seen, output_hidden_states, return_dict)


def grassmann_to_hugging_face(model: GrassmannLM) -> GrassmannForCausalLM:
    """Return a :class:`~polyspan.nn.GrassmannLM` as a Hugging Face model; weights are copied."""
    said = model.config
    made = GrassmannForCausalLM(
        GrassmannLMConfig(
            said["vocab_size"], said["d_model"], said["num_layers"], said["r"], said["offsets"], said["ffn"],
            said["max_length"], said["positions"], said["norm_first"], said["mixing"], said["dropout"], said["tied"],
        )
    )  # fmt: skip
    made.model.load_state_dict(model.state_dict())
    return made.eval()


def register_grassmann_lm() -> None:
    """Let the Auto classes know the models; done on import, and harmless to repeat."""
    transformers.AutoConfig.register(MODEL_TYPE, GrassmannLMConfig, exist_ok=True)
    for auto, kind in (
        (transformers.AutoModelForCausalLM, GrassmannForCausalLM),
        (transformers.AutoModelForSequenceClassification, GrassmannForSequenceClassification),
    ):
        auto.register(GrassmannLMConfig, kind, exist_ok=True)


register_grassmann_lm()
