"""Models of transformers as checkpoints hold them, the text that they read, and how well they predict it."""

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyspan.errors import WrongContent, require
from polyspan.io import ShardedState, read_json, read_members, read_text

from ._calibration import as_batches, halved_text, takes_halves
from ._compressed_files import CONFIG
from .transformers_bars import quiet_transformers

TOKENIZER = "tokenizer_config.json"
LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length", "max_target_positions")
ARRAYS = (".npz", ".safetensors")


def open_model(folder: Path, *, device_map: Any = None) -> Any:
    """Return a checkpoint's model of the class that its configuration names, its weights mapped from the files.

    Raises
    ------
    WrongContent, CorruptFile
        The folder holds no model of transformers, or a broken file.
    ValueError
        It is quantised or compressed already.
    """
    kind = check_model(folder)
    options = {} if device_map is None else {"device_map": device_map}
    with quiet_transformers():
        return kind.from_pretrained(folder, dtype="auto", **options).eval()


def check_model(folder: Path) -> Any:
    """Return the class of transformers that a checkpoint is of, without reading weights; errors as of open_model."""
    transformers = require("transformers", extra="hf", purpose="reading a checkpoint's model")
    config = read_json(folder / CONFIG)
    kinds = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(kinds, list) or not kinds or not hasattr(transformers, str(kinds[0])):
        raise WrongContent(folder / CONFIG, found=f"architectures {kinds}", expected="a class of transformers")
    if config.get("quantization_config"):
        told = config["quantization_config"].get("quant_method")
        raise ValueError(f"model must hold plain weights, got one quantised by {told}: {folder}")
    # transformers would end in the library's own error; ours names file and fault.
    ShardedState(folder)
    return getattr(transformers, kinds[0])


def longest_context(folder: Path) -> int:
    """Return how many tokens a checkpoint's model takes by its configuration and tokenizer; where neither says, all."""
    config = read_json(folder / CONFIG)
    told = [config, config.get("text_config")] if isinstance(config, dict) else []
    found = [part.get(name) for part in told if isinstance(part, dict) for name in LENGTHS]
    if (folder / TOKENIZER).is_file():
        tokenizer = read_json(folder / TOKENIZER)
        found += [tokenizer.get("model_max_length")] if isinstance(tokenizer, dict) else []
    return min((n for n in found if isinstance(n, int) and n > 0), default=sys.maxsize)


def token_ids(folder: Path | str, text: Path | str, *, limit: int | None = None) -> Tensor:
    """Return the tokens (n,) of a text file by the tokenizer in a checkpoint's folder, at most ``limit``.

    Raises
    ------
    WrongContent
        The text is empty, or the folder has no tokenizer.
    """
    transformers = require("transformers", extra="hf", purpose="reading text")
    lines = read_text(text).splitlines(keepends=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise WrongContent(folder, found="no tokenizer", expected="tokenizer.json beside the weights") from error
    found: list[int] = []
    for line in lines:
        found += tokenizer(line, add_special_tokens=False, verbose=False)["input_ids"]
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise WrongContent(text, found="no token", expected="text to calibrate on")
    return torch.tensor(found[:limit])


def calibration_batches(folder: Path, calibration: Any, *, context: int, batch_size: int) -> list[Any]:
    """Return what calibrates the model in a folder as batches: of a text, of a file of arrays, or as they are given.

    Raises
    ------
    WrongContent
        The members of a file of arrays differ in length.
    """
    if isinstance(calibration, str | Path) and Path(calibration).suffix in ARRAYS:
        members = {name: torch.from_numpy(rows) for name, rows in read_members(calibration).items()}
        lengths = {len(rows) if rows.ndim else 0 for rows in members.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise WrongContent(calibration, found=f"members of lengths {sorted(lengths)}", expected="as many rows each")
        starts = range(0, lengths.pop(), batch_size)
        return [{name: rows[i : i + batch_size] for name, rows in members.items()} for i in starts]
    if isinstance(calibration, str | Path):
        calibration = token_ids(folder, calibration)
    return as_batches(calibration, context=context, batch_size=batch_size)


def check_ids(name: str, ids: Tensor, model: Any) -> None:
    """Raise ``ValueError`` for ids that a model of transformers has no embedding of, where it says which it has."""
    try:
        known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        # Models of several parts, such as CLIP, have no one table.
        return
    if known is not None and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < known):
        raise ValueError(f"{name} must hold ids from 0 to {known - 1}, got {int(ids.min())} to {int(ids.max())}")


def perplexity(model: nn.Module, ids: Tensor, *, context: int = 128, batch_size: int = 8) -> float:
    """Return the perplexity of a model of transformers on a text (n,), in pieces of ``context`` tokens.

    Of an encoder-decoder it is that of the second half of each piece, given the first. It may be infinite or NaN.
    """
    from polyspan.nn.text_training import score_next_token

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids).logits

    device = next(p.device for p in model.parameters() if not p.is_meta)
    length = min(context, len(ids) - 1)
    if takes_halves(model):
        pieces = ids.to(device)[: len(ids) // (length + 1) * (length + 1)].view(-1, length + 1).split(batch_size)
        loss = _second_halves(model, pieces)
    else:
        loss = score_next_token(Logits(), ids.to(device), length=length, batch_size=batch_size)
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def _second_halves(model: nn.Module, pieces: Sequence[Tensor]) -> float:
    """Return the mean cross-entropy, nats a token, of the second half of each piece (b, t)."""
    was_training = model.training
    model.eval()
    total, number = 0.0, 0
    for piece in pieces:
        targets = piece[:, piece.shape[1] // 2 :].flatten()
        logits = model(**halved_text(model, piece)).logits.flatten(0, 1).float()
        total += float(F.cross_entropy(logits, targets.long(), reduction="sum"))
        number += len(targets)
    model.train(was_training)
    return total / number
