"""Claim: convolutions adapted through a Tucker core learn a new domain better than by LoRA of as many parameters."""

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.data import dataset, digits
from polyspan.errors import require

BATCH, PRETRAIN_RATE = 50, 1e-2
RATES = (1e-2, 3e-2, 1e-1)
ADAPTED = ["conv2", "conv3"]
RANKS: dict[int, dict[str, Any]] = {
    3: {"tucker": (6, 6, 2), "lora": 2, "loha": 1, "sides": 3},
    1: {"tucker": (4, 3, None), "lora": 4, "loha": 2},
}
"""By the side of the adapted kernels: 984, 992, 992 and 1,008 parameters, and 412, 448 and 448."""
RIVALS = ("LoRA", "LoHa", "LoRA of rows and columns")


class Domains(NamedTuple):
    """Grey images (n, h, w) of a domain to pretrain on and (m, h, w) of another to adapt to, with classes from 0.

    ``recipe`` (4,): the side of the kernels that are adapted, 3 or 1; passes over the first domain and over the second
    one's images; and 1 for the dearer arms as well.
    """

    source: np.ndarray
    source_labels: np.ndarray
    target: np.ndarray
    target_labels: np.ndarray
    recipe: np.ndarray


def turned(images: np.ndarray, labels: np.ndarray, seed: int, n: int, recipe: list[int]) -> Domains:
    """Pretrain on n images as they are; a quarter turn and noise of deviation 0.2 make the others the new domain."""
    rng = np.random.default_rng([seed, 1])
    rows = rng.permutation(len(labels))
    moved = np.rot90(images[rows[n:]], axes=(1, 2))
    moved = moved + 0.2 * rng.normal(size=moved.shape)
    return Domains(
        images[rows[:n]].astype(np.float32), labels[rows[:n]], moved.astype(np.float32), labels[rows[n:]],
        np.array(recipe),
    )  # fmt: skip


def on_digits(seed: int, *, side=3) -> Domains:
    """Scikit-learn's digits, 8 by 8: 900 to pretrain on; of 897 turned ones a third trains, a sixth chooses rates."""
    images, labels = digits()
    return turned(images.reshape(-1, 8, 8), labels, seed, 900, [side, 6, 10, 0])


def pointwise(seed: int) -> Domains:
    """The same with kernels of one pixel: nothing but a matrix is there to adapt."""
    return on_digits(seed, side=1)


def on_mnist(seed: int) -> Domains:
    """MNIST's test half, averaged to 14 by 14: 4,000 to pretrain on and 3,000 turned ones."""
    found = dataset("mnist-t10k")
    rows = np.random.default_rng(seed).permutation(len(found.labels))[:7000]
    images = found.images[rows].reshape(-1, 14, 2, 14, 2).mean(axis=(2, 4)) / found.scale
    return turned(images, found.labels[rows], seed, 4000, [3, 5, 15, 1])


def on_coil(seed: int) -> Domains:
    """COIL-20's objects from 72 sides, averaged to 16 by 16: half to pretrain on and half turned."""
    found = dataset("coil20")
    images = found.images.reshape(-1, 16, 2, 16, 2).mean(axis=(2, 4)) / found.scale
    return turned(images, found.labels, seed, len(images) // 2, [3, 20, 30, 1])


def network(n_classes: int, side: int, seed: int) -> Any:
    """Three convolutions of 16, 32 and 32 channels, two poolings, the mean over places, and a linear head."""
    import torch
    from torch import nn

    # Layers draw weights from torch's global generator before they are drawn again: it is put back.
    with torch.random.fork_rng(devices=[]):
        layers: dict[str, Any] = {
            "conv1": nn.Conv2d(1, 16, 3, padding=1),
            "relu1": nn.ReLU(),
            "pool1": nn.MaxPool2d(2),
            "conv2": nn.Conv2d(16, 32, side, padding=side // 2),
            "relu2": nn.ReLU(),
            "pool2": nn.MaxPool2d(2),
            "conv3": nn.Conv2d(32, 32, side, padding=side // 2),
            "relu3": nn.ReLU(),
            "mean": nn.AdaptiveAvgPool2d(1),
            "flat": nn.Flatten(),
            "head": nn.Linear(32, n_classes),
        }
    model, generator = nn.Sequential(), torch.Generator().manual_seed(seed)
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, generator=generator)
            layer.bias.data.zero_()
        model.add_module(name, layer)
    return model


def train(model: Any, X: Any, y: Any, *, passes: int, rate: float, seed: int) -> None:
    """Train what is not frozen: cross-entropy, Adam, batches of 50 in an order that the seed fixes, cosine schedule."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    steps = passes * -(-len(X) // BATCH)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    model.train()
    for _ in range(passes):
        for rows in torch.randperm(len(X), generator=generator).split(BATCH):
            optimiser.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    model.eval()


def arms(side: int, dearer: bool) -> dict[str, Callable[[Any, int], Any]]:
    """Return how each arm freezes a copy of the pretrained network and adds what it trains."""
    from polyspan.checkpoints import TuckerAdapterConfig

    peft: Any = require("peft", extra="hf", purpose="the adapters beside this one")

    r_in, r_out, r_spatial = RANKS[side]["tucker"]
    shared = {"target_modules": ADAPTED, "modules_to_save": ["head"]}

    def by(make: Callable[..., Any], **options: Any) -> Callable[[Any, int], Any]:
        def adapt(model: Any, seed: int) -> Any:
            import torch

            # peft draws from torch's global generator: it is set, and put back.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                torch.random.default_generator.manual_seed(seed)
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
                return peft.get_peft_model(model, make(**shared, **options))

        return adapt

    r, hadamard = RANKS[side]["lora"], RANKS[side]["loha"]
    made = {
        "Tucker core": by(TuckerAdapterConfig, r_in=r_in, r_out=r_out, r_spatial=r_spatial),
        "LoRA": by(peft.LoraConfig, r=r, lora_alpha=r),
        "LoHa": by(peft.LoHaConfig, r=hadamard, alpha=hadamard),
    }
    if "sides" in RANKS[side]:
        made[RIVALS[-1]] = _lora_of_sides
    if dearer:
        made["DoRA"] = by(peft.LoraConfig, r=r, lora_alpha=r, use_dora=True)
        made["all parameters"] = lambda model, _: model
        made["head alone"] = _freeze_all_but_head
    return made


def _freeze_all_but_head(model: Any, _: int) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    return model


def _lora_of_sides(model: Any, seed: int) -> Any:
    """Add a low-rank matrix (out x height, in x width), as loralib means to, but with its axes put where they belong.

    Loralib views the product as a kernel, which mixes up its indices; set right it is the better rival.
    """
    import torch
    from torch import nn
    from torch.nn.utils.parametrize import register_parametrization

    class Plus(nn.Module):
        def __init__(self, weight: Any, r: int, generator: Any):
            super().__init__()
            out, inner, height, width = weight.shape
            self.A = nn.Parameter(torch.empty(r, inner * width))
            nn.init.kaiming_uniform_(self.A, a=5**0.5, generator=generator)
            self.B = nn.Parameter(torch.zeros(out * height, r))

        def forward(self, weight: Any) -> Any:
            out, inner, height, width = weight.shape
            return weight + (self.B @ self.A).reshape(out, height, inner, width).permute(0, 2, 1, 3)

    generator = torch.Generator().manual_seed(seed)
    _freeze_all_but_head(model, seed)
    for name in ADAPTED:
        layer = getattr(model, name)
        register_parametrization(layer, "weight", Plus(layer.weight, RANKS[3]["sides"], generator))
    return model


def trial(data: Domains, seed: int) -> dict[str, float]:
    """Pretrain once; adapt by every arm at every rate on a third of the new domain; score on half of it.

    Each arm takes the rate that is best on a sixth; the baseline is the rival that is best there.
    """
    import torch

    side, before, after, dearer = (int(v) for v in data.recipe)
    X, Z = (torch.tensor(np.asarray(a)[:, None], dtype=torch.float32) for a in (data.source, data.target))
    y, labels = (torch.tensor(np.asarray(a), dtype=torch.int64) for a in (data.source_labels, data.target_labels))
    pretrained = network(int(max(y.max(), labels.max())) + 1, side, seed)
    train(pretrained, X, y, passes=before, rate=PRETRAIN_RATE, seed=seed)
    order = torch.tensor(np.random.default_rng([seed, 2]).permutation(len(labels)))
    learning, choosing, scoring = order.tensor_split([len(order) // 3, len(order) // 2])

    @torch.no_grad()
    def accuracy(model: Any, rows: Any) -> float:
        return float((model(Z[rows]).argmax(dim=-1) == labels[rows]).double().mean())

    found: dict[str, tuple[float, float, float]] = {}
    for name, adapt in arms(side, bool(dearer)).items():
        tried = []
        for rate in RATES:
            model = adapt(copy.deepcopy(pretrained), seed)
            with torch.random.fork_rng(devices=[]):  # peft's LoHa draws a number at each step, to no effect here
                train(model, Z[learning], labels[learning], passes=after, rate=rate, seed=seed)
            tried.append((accuracy(model, choosing), accuracy(model, scoring)))
        chosen = max(range(len(RATES)), key=lambda i, t=tried: t[i][0])
        # The highest rate tells how an arm bears a rate chosen too high.
        found[name] = (*tried[chosen], tried[-1][1])
    rivals = [name for name in RIVALS if name in found]
    return {
        "method": found["Tucker core"][1],
        "baseline": found[max(rivals, key=lambda name: found[name][0])][1],
        **{name: scores[1] for name, scores in found.items() if name != "Tucker core"},
        "not adapted": accuracy(pretrained, scoring),
        "Tucker core, highest rate": found["Tucker core"][2],
        "LoRA, highest rate": found["LoRA"][2],
    }


def flattened(data: Domains, seed: int) -> Domains:  # noqa: ARG001 - nothing is drawn
    """Take the sides away from the kernels: the control on a user's images."""
    return data._replace(recipe=np.array([1, *np.asarray(data.recipe)[1:]]))


CLAIM = Claim(
    slug="flora-nd",
    statement="Convolutions adapted through a Tucker core learn a new domain better than by LoRA of equal size.",
    method="Tucker core of ranks 6, 6, 2, 2 on two convolutions, and the head; the best of three learning rates",
    baseline="the best of LoRA, LoHa and LoRA of rows and columns: equal layers, parameters, steps and rates",
    metric="accuracy on held-out images of the new domain, share",
    better="higher",
    margin=0.01,
    worlds={"digits": on_digits, "mnist": on_mnist, "coil20": on_coil, "pointwise": pointwise},
    control="pointwise",
    levels={"quick": ("digits",), "standard": ("digits", "mnist", "coil20")},
    seeds={"quick": 3, "standard": 5},
    trial=trial,
    user_data=Domains,
    spoil=flattened,
    why=(
        "On turned digits the core reaches 0.63 where LoRA has 0.49, LoHa 0.56 and LoRA of rows and columns, which no "
        "library offers in this form, 0.55; the gain over the best of them ranges from 0.02 to 0.10. On MNIST it is "
        "not told from the margin (0.80 and 0.79). Kernels of one pixel leave nothing but a matrix, and there LoHa has "
        "0.42, the core 0.39 and LoRA 0.35. At the highest of three rates the core falls to chance in one seed of "
        "three, and LoRA nearly so in another: each must be tuned by itself. The verdict hangs on the rates that are "
        "tried: with 1e-2, 3e-2 and 6e-2, and two passes more, the gain was 0.005 in two seeds; the highest rate was "
        "then raised because LoHa was best at the edge."
    ),
)
