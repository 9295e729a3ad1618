"""Train a segmentation network on images and binary masks, measure it, keep it, and take over the authors' weights."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from polyspan.errors import WrongContent
from polyspan.io import load_fitted, save_fitted

from .image_training import Batches, ImageTraining, Recipe
from .scan_unet import MHSUNet

KIND = "Segmenter"


def bce_dice_loss(
    logits: Float[Tensor, "b *sides"], masks: Shaped[Tensor, "b *sides"], smooth: float | int = 1.0
) -> Tensor:
    r"""Binary cross-entropy of the pixels plus one minus each image's Dice coefficient, averaged.

    :math:`1 - (2 \sum p m + s) / (\sum p + \sum m + s)` with probabilities p; ``smooth`` s makes it defined, and 0, for
    an empty mask and an empty answer. In float32 or wider.
    Source: catalogue entry ``mhs-vm``.

    Parameters
    ----------
    logits : Tensor of shape (b, ...)
    masks : Tensor of the same shape, in [0, 1]
    smooth : float, default=1.0
        In pixels, above 0.

    Raises
    ------
    ValueError
        The shapes differ, or ``smooth`` is out of range.
    """
    if smooth <= 0:
        raise ValueError(f"smooth must be above 0, got {smooth}")
    if logits.shape != masks.shape:
        raise ValueError(f"masks must be {tuple(logits.shape)}, as the logits, got {tuple(masks.shape)}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(1)
    m = masks.to(logits.dtype).flatten(1)
    p = logits.sigmoid()
    dice = (2 * (p * m).sum(dim=1) + smooth) / (p.sum(dim=1) + m.sum(dim=1) + smooth)
    return F.binary_cross_entropy_with_logits(logits, m) + 1 - dice.mean()


class SegmentationScores(NamedTuple):
    """How well masks are predicted.

    Attributes
    ----------
    dice, iou : float
        Of all pixels of all images together, as the source measures: 2TP / (2TP + FP + FN), and TP / (TP + FP + FN).
    image_dice, image_iou : ndarray of shape (n,)
        Of each image by itself; 1 where mask and answer are both empty.
    """

    dice: float
    iou: float
    image_dice: np.ndarray
    image_iou: np.ndarray


def segmentation_scores(masks: Any, predicted: Any) -> SegmentationScores:
    """Compare binary masks (n, h, w) with predicted masks, or with probabilities cut at 0.5.

    Raises
    ------
    ValueError
        Shapes differ, there is no image, a mask is not binary, or an answer is NaN.
    """
    true, found = (np.asarray(part) for part in (masks, predicted))
    if true.shape != found.shape or true.ndim != 3 or not true.size:
        raise ValueError(
            f"masks and predicted must both be (n, h, w), of at least one pixel, got {true.shape} and {found.shape}"
        )
    true = binary_masks(true)
    if found.dtype.kind == "f" and (bad := np.isnan(found).any(axis=(1, 2))).any():
        raise ValueError(f"predicted must hold numbers, got NaN in image {int(bad.argmax())}")
    found = found >= 0.5 if found.dtype.kind == "f" else found > 0
    hit = (true & found).sum(axis=(1, 2))
    size, union = true.sum(axis=(1, 2)) + found.sum(axis=(1, 2)), (true | found).sum(axis=(1, 2))

    def share(part: Any, whole: Any) -> Any:
        return np.where(whole > 0, part / np.maximum(whole, 1), 1.0)

    return SegmentationScores(
        float(share(2 * hit.sum(), size.sum())), float(share(hit.sum(), union.sum())), share(2 * hit, size),
        share(hit, union),
    )  # fmt: skip


def binary_masks(masks: np.ndarray) -> np.ndarray:
    """Return masks of 0 and 1, or of 0 and 255, as bool; they are read a few at a time."""
    parts = [np.unique(masks[s : s + 64]) for s in range(0, len(masks), 64)]
    values = np.unique(np.concatenate(parts)) if parts else np.empty(0)
    if len(values) > 2 or not np.isin(values, [0, 1, 255]).all() or {1, 255} <= set(values.tolist()):
        raise ValueError(f"masks must be binary, of 0 and 1 or of 0 and 255, got values {values[:4].tolist()}")
    return masks > 0


class Segmenter(NamedTuple):
    """A trained network with the scale of the images that it expects.

    Attributes
    ----------
    model : MHSUNet
    mean, spread : float
        Of the pixels it was trained on.
    losses : list of float
        Of each training step.
    """

    model: MHSUNet
    mean: float
    spread: float
    losses: list[float]

    def predict(self, images: Any, batch_size: int = 16) -> np.ndarray:
        """Return the probability (n, h, w), float32, that a pixel of images (n, h, w) or (n, c, h, w) belongs.

        Images are read a batch at a time: a memory map of any length will do.

        Raises
        ------
        ValueError
            The images have another shape, or hold NaN or infinity, ``batch_size`` is below 1, or the network has
            several classes.
        """
        images = _as_images(images, self.model)
        if self.model.num_classes != 1:
            raise ValueError(f"model must have one class, got {self.model.num_classes}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model.eval()
        like = next(self.model.parameters())
        found = np.empty((len(images), *images.shape[-2:]), dtype=np.float32)
        with torch.inference_mode():
            for s in range(0, len(images), batch_size):
                raw = np.asarray(images[s : s + batch_size], dtype=np.float32)
                _check_finite(raw, s)
                raw = raw[:, None] if raw.ndim == 3 else raw
                x = torch.as_tensor((raw - np.float32(self.mean)) / np.float32(self.spread)).to(like)
                found[s : s + len(raw)] = self.model(x)[:, 0].float().sigmoid().cpu().numpy()
        return found

    def save(self, path: Path | str) -> Path:
        """Write it to one .safetensors file, atomically; bfloat16 weights are widened."""
        arrays = {
            name: (value.float() if value.dtype == torch.bfloat16 else value).detach().cpu().numpy()
            for name, value in self.model.state_dict().items()
        }
        params = {"config": self.model.config, "mean": self.mean, "spread": self.spread, "losses": self.losses}
        return save_fitted(Path(path), kind=KIND, arrays=arrays, params=params)

    @staticmethod
    def load(path: Path | str) -> "Segmenter":
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileError
            One of its five kinds; ``WrongContent`` where the file holds something else.
        """
        found = load_fitted(Path(path), kind=KIND)
        config = dict(found.params["config"])
        if "patterns" in config:
            config["patterns"] = tuple(config["patterns"])
        model = MHSUNet(**config)
        state = {name: torch.as_tensor(np.array(value)) for name, value in found.arrays.items()}
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise WrongContent(path, found=str(error), expected="the weights that its configuration asks for") from None
        return Segmenter(model.eval(), found.params["mean"], found.params["spread"], found.params["losses"])


class _MaskTraining(ImageTraining):
    """Training with the loss of masks, and flips in the place of shifts."""

    def _step(self, x: Tensor, y: Tensor) -> float:
        recipe, done = self.recipe, len(self.losses)
        schedule = 0.5 + 0.5 * np.cos(np.pi * done / recipe.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.rate * (0.01 + 0.99 * schedule)
        y = y.to(x.device)
        for side in (-1, -2):
            flip = torch.rand(len(x), 1, 1, generator=self.generator).to(x.device) < 0.5
            x, y = torch.where(flip.unsqueeze(1), x.flip(side), x), torch.where(flip, y.flip(side), y)
        loss = bce_dice_loss(self.model(x)[:, 0], y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def train_segmentation(
    model: MHSUNet,
    images: Any,
    masks: Any,
    *,
    max_iter: int = 1000,
    batch_size: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    checkpoint: Path | None = None,
    save_every: int = 100,
    generator: torch.Generator | None = None,
    verbose: bool = False,
) -> Segmenter:
    """Train a network of one class on images and binary masks; it is changed in place and returned with its scale.

    Binary cross-entropy plus Dice, AdamW, a cosine from ``learning_rate`` to a hundredth of it, flips in both
    directions. Keep images aside to measure it on: nothing is held out here.
    Source: catalogue entry ``mhs-vm``.

    Parameters
    ----------
    model : MHSUNet
    images : ndarray or memory map of shape (n, h, w) or (n, c, h, w)
        Finite numbers of any scale; they are read a batch at a time.
    masks : ndarray of shape (n, h, w)
        0 and 1, 0 and 255, or bool.
    max_iter : int, default=1000
        Steps.
    batch_size : int, default=8
    learning_rate : float, default=1e-3
    weight_decay : float, default=0.01
    checkpoint : Path, optional
        A .safetensors file, written every ``save_every`` steps: a run that was stopped goes on from there.
    save_every : int, default=100
    generator : torch.Generator, optional
        Order of the images and flips; a fixed one where not given.
    verbose : bool, default=False

    Raises
    ------
    ValueError
        Shapes do not fit, a mask is not binary, all are empty, an image holds NaN or infinity, or a number is out of
        range.
    NotConverged
        The loss is no longer finite.
    """
    images = _as_images(images, model)
    shape = images.shape
    if not len(images):
        raise ValueError(f"images must be at least one, got shape {shape}")
    masks = np.asarray(masks)
    if masks.shape != (shape[0], *shape[-2:]):
        raise ValueError(f"masks must be {(shape[0], *shape[-2:])}, one an image, got {masks.shape}")
    if model.num_classes != 1:
        raise ValueError(f"model must have one class, got {model.num_classes}")
    if max_iter < 1 or batch_size < 1 or save_every < 1:
        raise ValueError(
            f"max_iter, batch_size and save_every must be at least 1, got {max_iter}, {batch_size}, {save_every}"
        )
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, got {value}")
    masks = binary_masks(masks)
    if not masks.any():
        raise ValueError("masks must not all be empty, got no pixel that belongs")
    mean, spread = _scale(images)
    channels = 1 if len(shape) == 3 else shape[1]
    recipe = Recipe(
        steps=max_iter, batch=batch_size, rate=learning_rate, decay=weight_decay, checkpoint=checkpoint,
        every=save_every, signature={
            "steps": max_iter, "batch": batch_size, "rate": learning_rate, "decay": weight_decay, "n": shape[0],
            "masks": int(masks.sum()), "model": {key: repr(value) for key, value in model.config.items()},
            "mean": mean, "spread": spread,
        },
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    training = _MaskTraining(model, recipe, generator, label="segmentation" if verbose else "")
    device = next(model.parameters()).device
    losses = training.run(Batches(images, (channels, *shape[-2:]), mean, spread, device), masks)
    return Segmenter(model, mean, spread, losses)


def _as_images(images: Any, model: MHSUNet) -> np.ndarray:
    """Return images as an array, a memory map as it is, after looking at its shape and kind."""
    images = np.asanyarray(images)
    if images.ndim not in (3, 4):
        raise ValueError(f"images must be (n, h, w) or (n, c, h, w), got shape {images.shape}")
    if 0 in images.shape[1:]:
        raise ValueError(f"images must have at least one pixel, got shape {images.shape}")
    if images.dtype.kind not in "biuf":
        raise ValueError(f"images must hold real numbers, got {images.dtype}")
    channels = images.shape[1] if images.ndim == 4 else 1
    wanted = model.in_channels
    if channels != wanted and not (channels == 1 and wanted == 3):
        raise ValueError(f"images must have {wanted} channel{'s' * (wanted > 1)}, as the network, got {channels}")
    return images


def _scale(images: Any) -> tuple[float, float]:
    """Mean and spread of all pixels, in one pass of a few images at a time."""
    count, total, square = 0, 0.0, 0.0
    for s in range(0, len(images), 64):
        part = np.asarray(images[s : s + 64], dtype=np.float64)
        _check_finite(part, s)
        count, total, square = count + part.size, total + part.sum(), square + np.square(part).sum()
    mean = total / count
    spread = float(np.sqrt(max(square / count - mean * mean, 0.0)))
    return float(mean), spread if spread > 0 else 1.0


def _check_finite(part: np.ndarray, start: int) -> None:
    bad = ~np.isfinite(part.reshape(len(part), -1)).all(axis=1)
    if bad.any():
        raise ValueError(f"images must hold finite numbers, got NaN or infinity in image {start + int(bad.argmax())}")


HEADS = "CXSZ"
BLOCK = {
    "ln_1": "input_norm", "self_attention.in_proj": "input", "self_attention.conv2d": "conv",
    "self_attention.out_norm": "norm", "self_attention.mhs.x_ssproj": "mix.to_subspaces",
    "self_attention.mhs.cat_norm": "mix.norm", "self_attention.mhs.y_proj": "mix.output",
}  # fmt: skip
SCAN = {
    "x_proj_weight": "input_weight", "dt_projs_weight": "step_weight", "dt_projs_bias": "step_bias",
    "A_logs": "log_rates", "Ds": "bypass",
}  # fmt: skip


def convert_mhs_vm(state: Mapping[str, Any], *, threshold: float | int = 0.5) -> MHSUNet:
    """Make a network from weights of the authors' code.

    Widths, depths, heads and classes are told from the names and shapes. Names may begin with ``module.`` or
    ``vmunet.``; the projection that their files hold twice is taken once.

    Parameters
    ----------
    state : mapping of str to tensor
        As ``torch.load(file, weights_only=True)`` gives them; the .pth files themselves are not read here, since
        reading them can run code.
    threshold : float, default=0.5
        Of the gate, which no weight tells: 0.5 where training was on ISIC 2018, 0 on ISIC 2017.

    Raises
    ------
    ValueError
        These are no weights of such a network; the message names what is missing.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state must map names to weights, got {type(state).__name__}")
    left = {re.sub(r"^(module\.)?(vmunet\.)?", "", name): torch.as_tensor(value) for name, value in state.items()}
    left = {name: value for name, value in left.items() if not name.endswith("mhs.x_ssproj_W")}

    def counts(group: str) -> list[int]:
        found: dict[int, int] = {}
        for name in left:
            if match := re.match(rf"{group}\.(\d+)\.blocks\.(\d+)\.", name):
                found[int(match[1])] = max(found.get(int(match[1]), 0), int(match[2]) + 1)
        return [found[i] for i in sorted(found)]

    depths, decoder_depths = counts("layers"), counts("layers_up")
    first = "layers.0.blocks.0.self_attention.mhs."
    for name in ("patch_embed.proj.weight", f"{first}scanhead_C.mambaeng.A_logs", "final_conv.weight"):
        if name not in left:
            raise ValueError(f"state must hold the weights of an MHS-VM network, got none called {name!r}")
    embedding, rates = left["patch_embed.proj.weight"], left[f"{first}scanhead_C.mambaeng.A_logs"]
    heads = [letter for letter in HEADS if f"{first}scanhead_{letter}.mambaeng.Ds" in left]
    model = MHSUNet(
        embedding.shape[1], left["final_conv.weight"].shape[0], depths,
        [left[f"layers.{i}.blocks.0.ln_1.weight"].shape[0] for i in range(len(depths))], decoder_depths,
        patch_size=embedding.shape[-1], num_heads=len(heads), d_state=rates.shape[1], threshold=threshold,
        with_proj=f"{first}cat_norm.weight" in left, device="meta",
    )  # fmt: skip
    wanted = {name: _official(name, left, heads, value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(wanted, assign=True)
    if left:
        raise ValueError(f"state must hold nothing but the network, got {sorted(left)[:3]} as well")
    return model.requires_grad_().eval()


def _official(name: str, left: dict[str, Tensor], heads: list[str], shape: Any) -> Tensor:
    """Take the tensor out of the authors' weights that is called ``name`` here."""

    def take(old: str) -> Tensor:
        if old not in left:
            raise ValueError(f"state must hold {old!r}, got no such weight")
        return left.pop(old)

    if match := re.match(r"(encoder|decoder)\.(\d+)\.(\d+)\.(.*)", name):
        stem = f"{'layers' if match[1] == 'encoder' else 'layers_up'}.{match[2]}.blocks.{match[3]}."
        rest = match[4]
        if rest.startswith("mix.scan."):
            old = {new: old for old, new in SCAN.items()}[rest.removeprefix("mix.scan.")]
            parts = [take(f"{stem}self_attention.mhs.scanhead_{letter}.mambaeng.{old}") for letter in heads]
            found = torch.cat([part.reshape(-1, *shape[1:]) for part in parts])
        else:
            module, _, kind = rest.rpartition(".")
            found = take(stem + {new: old for old, new in BLOCK.items()}[module] + f".{kind}")
    elif match := re.match(r"(merges|expands)\.(\d+)\.(norm|linear)\.(.*)", name):
        if match[1] == "merges":
            stem, linear = f"layers.{match[2]}.downsample", "reduction"
        else:
            stem, linear = f"layers_up.{int(match[2]) + 1}.upsample", "expand"
        found = take(f"{stem}.{linear if match[3] == 'linear' else 'norm'}.{match[4]}")
    else:
        module, _, kind = name.rpartition(".")
        outer = {
            "embedding": "patch_embed.proj", "embedding_norm": "patch_embed.norm", "final.linear": "final_up.expand",
            "final.norm": "final_up.norm", "classes": "final_conv",
        }  # fmt: skip
        found = take(f"{outer[module]}.{kind}")
    if found.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(found.shape)}")
    return found
