"""Small language models in Hugging Face's classes, trained once on a text and kept, to try methods for checkpoints."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from polyspan.errors import require
from polyspan.io import atomic_directory, check_directory, digest_array, digest_file, make_folder
from polyspan.nn import train_next_token
from polyspan.run import layers_draw_from, torch_generator, user_folder

# What a changed recipe would be: kept models of another one are not taken for those of this one.
RECIPE = 1
UNKNOWN = "<unk>"


def small_language_model(
    text: str,
    architecture: str = "llama",
    *,
    hidden_size: int = 96,
    intermediate_size: int = 256,
    num_layers: int = 3,
    num_heads: int = 4,
    num_experts: int = 8,
    experts_per_token: int = 2,
    vocab_size: int = 1024,
    context: int = 96,
    steps: int = 1300,
    batch_size: int = 16,
    learning_rate: float = 4e-3,
    balance: float = 0.01,
    initial: Path | str | None = None,
    initial_noise: float = 0.1,
    seed: int = 0,
    folder: Path | str | None = None,
) -> Path:
    """Return the folder of a small language model of a text: trained at the first call, found again at later ones.

    It is a real checkpoint, weights and tokenizer: ``AutoModelForCausalLM.from_pretrained`` and
    ``AutoTokenizer.from_pretrained`` read it. The tokenizer is a byte-level BPE of the same text; input and output
    embeddings are tied; training is AdamW with a warm-up and a cosine to zero.

    Parameters
    ----------
    text : str
        Trained on, tokenizer included: score on another.
    architecture : {"llama", "mixtral"}
        A dense model, or one with ``num_experts`` experts a layer of which a token uses ``experts_per_token``.
    hidden_size, intermediate_size, num_layers, num_heads, vocab_size, context : int
        Sizes; those of the MLP are those of each expert. ``context`` is counted in tokens.
    steps, batch_size, learning_rate
        Of the training: ``batch_size`` pieces of ``context`` tokens a step.
    balance : float, default=0.01
        Weight of the load-balancing loss, where there are experts.
    initial : path-like, optional
        A llama of the same sizes, to which a mixtral is upcycled: its tokenizer and weights are taken over, and every
        expert begins as its MLP with ``initial_noise`` of the weights' standard deviation added.
    seed : int, default=0
    folder : path-like, optional
        Where models are kept, by digest of all of the above and of the versions of torch and transformers;
        ``models`` in the user's own folder where not given.

    Raises
    ------
    ValueError
        ``initial`` with a llama, or of other sizes; or the text is shorter than a piece.
    FileError
        The kept model was changed.
    MissingExtra
        transformers is not installed.
    """
    if architecture not in ("llama", "mixtral"):
        raise ValueError(f"architecture must be 'llama' or 'mixtral', got {architecture!r}")
    if initial is not None and architecture != "mixtral":
        raise ValueError(f"initial must go with architecture 'mixtral', got {architecture!r}")
    transformers: Any = require("transformers", extra="hf", purpose="a small language model")
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }
    if architecture == "mixtral":
        sizes |= {"num_local_experts": num_experts, "num_experts_per_tok": experts_per_token}
    training = (steps, batch_size, learning_rate, balance, initial_noise if initial else None, seed)
    source = digest_file(Path(initial) / "model.safetensors") if initial else None
    versions = (RECIPE, torch.__version__, transformers.__version__)
    key = repr((architecture, sorted(sizes.items()), vocab_size, training, source, versions, text)).encode()
    digest = digest_array(np.frombuffer(key, np.uint8))[:24]
    kept = (Path(folder) if folder is not None else user_folder("models")) / f"{architecture}-{digest}"
    if kept.is_dir():
        check_directory(kept)
        return kept
    tokenizer = (
        transformers.AutoTokenizer.from_pretrained(initial)
        if initial
        else _tokenizer(transformers, text, vocab_size, context)
    )
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    with layers_draw_from(torch_generator(seed)):
        model = _untrained(transformers, architecture, sizes | {"vocab_size": len(tokenizer)}, balance)
        if initial is not None:
            _upcycle(transformers, model, initial, initial_noise, torch_generator(seed))
    balanced = None if architecture == "llama" else lambda out: balance * out.aux_loss
    train_next_token(
        model,
        ids,
        steps=steps,
        length=context - 1,
        batch_size=batch_size,
        learning_rate=learning_rate,
        penalty=balanced,
        generator=torch_generator(seed),
    )
    if architecture == "mixtral":
        model.config.output_router_logits = False
    make_folder(kept.parent)
    with atomic_directory(kept, replace=True) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return kept


def _tokenizer(transformers: Any, text: str, vocab_size: int, context: int) -> Any:
    tokenizers: Any = require("tokenizers", extra="hf", purpose="a small language model")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([text], vocab_size=vocab_size, special_tokens=[UNKNOWN], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=UNKNOWN, model_max_length=context)


def _untrained(transformers: Any, architecture: str, sizes: dict[str, Any], balance: float) -> Any:
    if architecture == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=balance)
    )


@torch.no_grad()
def _upcycle(transformers: Any, model: Any, initial: Path | str, noise: float, generator: torch.Generator) -> None:
    """Begin from a dense model: its weights where names agree, and its MLP, disturbed, in every expert."""
    dense = transformers.LlamaForCausalLM.from_pretrained(initial).state_dict()
    for name, own in model.state_dict().items():
        layer = name.partition(".mlp.")[0]
        if name.endswith("experts.gate_up_proj"):
            taken = torch.cat([dense[f"{layer}.mlp.gate_proj.weight"], dense[f"{layer}.mlp.up_proj.weight"]])
        elif name.endswith("experts.down_proj"):
            taken = dense[f"{layer}.mlp.down_proj.weight"]
        elif name in dense:
            taken = dense[name]
        else:
            continue
        experts = own.ndim == taken.ndim + 1
        if own.shape[int(experts) :] != taken.shape:
            raise ValueError(f"initial must have the sizes of the model, got {tuple(taken.shape)} for {name}")
        own.copy_(taken)
        if experts:
            own.add_(noise * taken.std() * _normal(own.shape, generator))


def _normal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)
