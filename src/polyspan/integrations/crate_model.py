"""Rate-reduction transformers as Hugging Face models: importing this registers them with the Auto classes."""

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from polyspan.errors import require
from polyspan.nn import CRATE, CRATEMAE, SparsifyingISTA

transformers: Any = require("transformers", extra="hf", purpose="CRATE as a Hugging Face model")
outputs: Any = require("transformers.modeling_outputs", extra="hf")
init: Any = require("transformers.initialization", extra="hf")

MODEL_TYPE = "polyspan-crate"


class CrateConfig(transformers.PreTrainedConfig):
    """Sizes and options of a network, in Hugging Face's words.

    Parameters
    ----------
    image_size, patch_size : int or list of int
        In pixels.
    num_channels : int
    hidden_size, num_hidden_layers, num_attention_heads : int
    head_dim : int, optional
    step, tied_output, eta, lambd, dict_size, n_steps : optional
        Of :class:`polyspan.nn.CRATEBlock`.
    pool : {"cls", "mean"}
    patch_norm, embedding_norm : bool
        Always false in the masked auto-encoder, and in what is loaded from one.
    hidden_dropout_prob, attention_probs_dropout_prob : float
        After the positions; in attention.
    decoder_num_hidden_layers : int, optional
        Of the masked auto-encoder; as many as in the encoder where not given.
    mask_ratio : float
    norm_pix_loss : bool
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        image_size: Any = 224,
        patch_size: Any = 16,
        num_channels: int = 3,
        hidden_size: int = 384,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        head_dim: int | None = None,
        step: str = "published",
        tied_output: bool = False,
        eta: float = 0.1,
        lambd: float = 0.1,
        dict_size: int | None = None,
        n_steps: int = 1,
        pool: str = "cls",
        patch_norm: bool = True,
        embedding_norm: bool = True,
        hidden_dropout_prob: float = 0.0,
        attention_probs_dropout_prob: float = 0.0,
        decoder_num_hidden_layers: int | None = None,
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = False,
        **options: Any,
    ):
        self.image_size, self.patch_size, self.num_channels = image_size, patch_size, num_channels
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.head_dim = num_attention_heads, head_dim
        self.step, self.tied_output, self.eta, self.lambd = step, tied_output, eta, lambd
        self.dict_size, self.n_steps, self.pool = dict_size, n_steps, pool
        self.patch_norm, self.embedding_norm = patch_norm, embedding_norm
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.decoder_num_hidden_layers = decoder_num_hidden_layers
        self.mask_ratio, self.norm_pix_loss = mask_ratio, norm_pix_loss
        super().__init__(**options)

    def block(self) -> dict[str, Any]:
        """Return the arguments of the layers."""
        names = ("step", "tied_output", "eta", "dict_size", "n_steps")
        return {name: getattr(self, name) for name in names}

    def network(self, num_classes: int = 0) -> CRATE:
        """Make the network that this describes."""
        return CRATE(
            self.image_size, self.patch_size, num_classes, self.hidden_size, self.num_hidden_layers,
            self.num_attention_heads, head_dim=self.head_dim, channels=self.num_channels, pool=self.pool,
            dropout=self.attention_probs_dropout_prob, emb_dropout=self.hidden_dropout_prob,
            patch_norm=self.patch_norm, embedding_norm=self.embedding_norm, block=self.block() | {"lambd": self.lambd},
        )  # fmt: skip


class CratePreTrainedModel(transformers.PreTrainedModel):
    """What the models share: how weights start, and which words of Hugging Face they understand."""

    config_class = CrateConfig
    base_model_prefix = "crate"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ("CRATEBlock", "CRATEDecoderBlock")
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw what a file did not bring; transformers' own functions leave alone what it did."""
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, SparsifyingISTA):
            bound = math.sqrt(6 / module.dict_size)
            init.uniform_(module.weight, -bound, bound)
        elif isinstance(module, CRATE):
            init.normal_(module.positions)
            init.normal_(module.cls_token)
        elif isinstance(module, CRATEMAE):
            init.normal_(module.cls_token, std=0.02)
            init.normal_(module.mask_token, std=0.02)
            for layer in module.modules():
                if isinstance(layer, nn.Linear):
                    init.xavier_uniform_(layer.weight)
                    if layer.bias is not None:
                        init.zeros_(layer.bias)


class CrateModel(CratePreTrainedModel):
    """The network without a head: tokens of the last layer, and normalised pooled features.

    Parameters
    ----------
    config : CrateConfig
    """

    def __init__(self, config: CrateConfig):
        super().__init__(config)
        self.network = config.network()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.network.patch_embedding

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Return ``last_hidden_state`` (B, 1 + N, d), ``pooler_output`` (B, d) and, asked for, states and attentions.

        ``hidden_states`` has ``num_hidden_layers + 1`` entries, the embedded tokens first. ``bool_masked_pos`` is true
        for patches that are to be left out.
        """
        wants = _wants(self.config, output_attentions, output_hidden_states)
        mask = None if bool_masked_pos is None else ~bool_masked_pos.bool()
        net, options = self.network, {"interpolate_pos_encoding": interpolate_pos_encoding}
        if any(wants):
            states = net.forward_states(pixel_values, mask, **options)
            tokens, hidden = states.outputs[-1], tuple(states.outputs)
        else:
            tokens, hidden = net.forward_features(pixel_values, mask, **options), ()
        maps = _maps(net.blocks, hidden, net._with_cls(mask)) if wants[0] else None
        made = outputs.BaseModelOutputWithPooling(
            last_hidden_state=tokens,
            pooler_output=net.forward_head(tokens, mask),
            hidden_states=hidden if wants[1] else None,
            attentions=maps,
        )
        return made.to_tuple() if return_dict is False else made


class CrateForImageClassification(CratePreTrainedModel):
    """The network with a linear head on its normalised pooled features.

    Parameters
    ----------
    config : CrateConfig
        ``num_labels`` or ``id2label`` say how many classes.
    """

    def __init__(self, config: CrateConfig):
        super().__init__(config)
        self.crate = CrateModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Return ``logits`` (B, num_labels) and, where ``labels`` (B,) are given, their cross-entropy as ``loss``."""
        base = self.crate(
            pixel_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            interpolate_pos_encoding=interpolate_pos_encoding,
        )
        logits = self.classifier(base.pooler_output)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        made = outputs.ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=base.hidden_states, attentions=base.attentions
        )
        return made.to_tuple() if return_dict is False else made


class _Encoding(nn.Module):
    """An auto-encoder where :class:`CrateModel` has its network, so that the names of weights are the same."""

    def __init__(self, network: CRATEMAE):
        super().__init__()
        self.network = network


class CrateForMaskedImageModeling(CratePreTrainedModel):
    """The masked auto-encoder: predicts the pixels of hidden patches.

    Its encoder is what :class:`CrateModel` and :class:`CrateForImageClassification` load from its files; the latter
    begins with a new head.

    Parameters
    ----------
    config : CrateConfig
        The authors' encoders have ``lambd=0.5``. Copied, with ``patch_norm`` and ``embedding_norm`` false.
    """

    def __init__(self, config: CrateConfig):
        config = copy.deepcopy(config)
        config.patch_norm = config.embedding_norm = False
        super().__init__(config)
        network = CRATEMAE(
            config.image_size, config.patch_size, config.hidden_size, config.num_hidden_layers,
            config.num_attention_heads, decoder_depth=config.decoder_num_hidden_layers, head_dim=config.head_dim,
            channels=config.num_channels, mask_ratio=config.mask_ratio, norm_pixels=config.norm_pix_loss,
            lambd=config.lambd, block=config.block(),
        )  # fmt: skip
        self.crate = _Encoding(network)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        return_dict: bool | None = None,
        **_: Any,
    ) -> Any:
        """Return ``reconstruction`` (B, N, p p c), the predicted pixels of each patch, and ``loss`` on hidden ones.

        Without ``bool_masked_pos`` (B, N) patches are hidden at random, from torch's global generator, as models of
        this kind do everywhere in Hugging Face's library.
        """
        net, options = self.crate.network, {"interpolate_pos_encoding": interpolate_pos_encoding}
        if bool_masked_pos is None:
            p, q = net.patch_size
            n = (pixel_values.shape[-2] // p) * (pixel_values.shape[-1] // q)
            bool_masked_pos = net.draw_mask(len(pixel_values), num_patches=n)
        mask = bool_masked_pos.bool()
        made = net(pixel_values, mask, **options)
        told = outputs.MaskedImageModelingOutput(loss=net.loss(pixel_values, mask, predicted=made), reconstruction=made)
        return told.to_tuple() if return_dict is False else told


def _wants(config: Any, attentions: bool | None, states: bool | None) -> tuple[bool, bool]:
    return (
        bool(config.output_attentions if attentions is None else attentions),
        bool(config.output_hidden_states if states is None else states),
    )


def _maps(blocks: nn.ModuleList, hidden: tuple[Tensor, ...], mask: Tensor | None) -> tuple[Tensor, ...]:
    """Attention weights of each layer, computed again: the fused kernel of the forward pass does not keep them."""
    pairs: Any = zip(blocks, hidden, strict=False)
    return tuple(block.attention.attention_map(block.attention_norm(x), mask) for block, x in pairs)


def to_hugging_face(model: CRATE | CRATEMAE) -> Any:
    """Return a network of :mod:`polyspan.nn`, such as one from ``convert_official``, as a Hugging Face model.

    A :class:`~polyspan.nn.CRATE` with a head becomes :class:`CrateForImageClassification`, one without
    :class:`CrateModel`, a :class:`~polyspan.nn.CRATEMAE` :class:`CrateForMaskedImageModeling`. Weights are copied.

    Raises
    ------
    ValueError
        The network has options that the configuration cannot say.
    """
    block = model.blocks[0]
    attention: Any = block.attention
    ista: Any = block.ista
    shared: dict[str, Any] = {
        "image_size": list(model.image_size), "patch_size": list(model.patch_size), "num_channels": model.channels,
        "hidden_size": attention.dim, "num_hidden_layers": len(model.blocks),
        "num_attention_heads": attention.num_heads, "head_dim": attention.head_dim, "step": attention.step,
        "tied_output": attention.tied_output, "eta": ista.eta, "lambd": ista.lambd, "n_steps": ista.n_steps,
        "dict_size": None if ista.readout is None else ista.dict_size,
    }  # fmt: skip
    if isinstance(model, CRATEMAE):
        config = CrateConfig(
            **shared, decoder_num_hidden_layers=len(model.decoder_blocks), mask_ratio=model.mask_ratio,
            norm_pix_loss=model.norm_pixels,
        )  # fmt: skip
        made = CrateForMaskedImageModeling(config)
        if other := _differing(model, made.crate.network):
            raise ValueError(f"model must have no options beyond those of CrateConfig, got another {other}")
        made.crate.network.load_state_dict(model.state_dict())
        return made.eval()
    said = set(model.config["block"]) - {"step", "tied_output", "eta", "lambd", "n_steps", "dict_size"}
    if said or model.causal:
        raise ValueError(f"model must have no options beyond those of CrateConfig, got {sorted(said) or 'causal=True'}")
    shared |= {
        "pool": model.pool, "patch_norm": isinstance(model.patch_norm, nn.LayerNorm),
        "embedding_norm": isinstance(model.embedding_norm, nn.LayerNorm),
        "hidden_dropout_prob": model.emb_dropout, "attention_probs_dropout_prob": attention.dropout,
    }  # fmt: skip
    state = model.state_dict()
    if not model.num_classes:
        made = CrateModel(CrateConfig(**shared))
        made.network.load_state_dict(state)
        return made.eval()
    made = CrateForImageClassification(CrateConfig(**shared, num_labels=model.num_classes))
    head = {name.removeprefix("head."): state.pop(name) for name in ("head.weight", "head.bias")}
    made.classifier.load_state_dict(head)
    made.crate.network.load_state_dict(state)
    return made.eval()


def _differing(model: CRATEMAE, made: CRATEMAE) -> list[str]:
    """Return the options, and the weights, in which the encoders' first layers differ; decoders have none of their own.

    An auto-encoder keeps no list of its arguments, so that layers are looked at.
    """
    found: list[str] = []
    for part in ("attention", "ista"):
        own, other = (getattr(net.blocks[0], part) for net in (model, made))
        plain = [name for name in vars(own) if name[0] != "_" and name != "training"]
        found += [name for name in plain if getattr(own, name) != getattr(other, name)]
        found += sorted(set(own.state_dict()) ^ set(other.state_dict()))
    return found + ["residual"] * (model.blocks[0].residual != made.blocks[0].residual)


def register_crate() -> None:
    """Let the Auto classes know the models; done on import, and harmless to repeat."""
    transformers.AutoConfig.register(MODEL_TYPE, CrateConfig, exist_ok=True)
    for auto, kind in (
        (transformers.AutoModel, CrateModel),
        (transformers.AutoModelForImageClassification, CrateForImageClassification),
        (transformers.AutoModelForMaskedImageModeling, CrateForMaskedImageModeling),
    ):
        auto.register(CrateConfig, kind, exist_ok=True)


register_crate()
