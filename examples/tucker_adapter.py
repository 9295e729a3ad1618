"""Adapt a small convolutional network to turned digits, keep the adapter as a file, and merge it.

The network is trained on upright digits of scikit-learn; the new domain shows them after a quarter turn. The adapter
trains a tenth of the parameters, and its file is all that has to be kept beside the network.

The system is the catalogue's ``flora-nd``.
"""

import copy
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
from torch import nn

from polyspan.checkpoints import TuckerAdapterConfig
from polyspan.data import digits
from polyspan.run import torch_generator


def network(seed: int) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
    )  # fmt: skip
    generator = torch_generator(seed)
    for layer in model:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, generator=generator)
    return model


def train(model: nn.Module, X: torch.Tensor, y: torch.Tensor, *, passes: int, rate: float) -> None:
    generator = torch_generator(0)
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(passes):
        for rows in torch.randperm(len(X), generator=generator).split(50):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
            optimiser.step()


def accuracy(model: nn.Module, X: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(X).argmax(dim=-1) == y).double().mean())


def main(passes: int = 6) -> None:
    pixels, labels = digits()
    images = pixels.reshape(-1, 1, 8, 8)
    X, turned = torch.tensor(images), torch.tensor(np.rot90(images, axes=(2, 3)).copy())
    y = torch.tensor(labels)
    old, new, test = slice(0, 900), slice(900, 1300), slice(1300, None)
    model = network(0)
    train(model, X[old], y[old], passes=passes, rate=1e-2)
    print(
        f"upright digits {accuracy(model, X[test], y[test]):.1%}, turned {accuracy(model, turned[test], y[test]):.1%}"
    )

    base = copy.deepcopy(model)
    config = TuckerAdapterConfig(r_in=6, r_out=6, target_modules=["3", "6"], modules_to_save=["10"], seed=0)
    adapted = peft.get_peft_model(model, config)
    adapted.print_trainable_parameters()
    train(adapted, turned[new], y[new], passes=3 * passes, rate=1e-2)
    print(f"with the adapter, turned digits {accuracy(adapted, turned[test], y[test]):.1%}")
    with adapted.disable_adapter():
        print(f"switched off, upright digits {accuracy(adapted, X[test], y[test]):.1%}")

    with tempfile.TemporaryDirectory() as folder:
        adapted.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        again = peft.PeftModel.from_pretrained(base, folder)
    merged = again.merge_and_unload()
    print(f"read from a file of {size / 1024:.1f} KiB and merged {accuracy(merged, turned[test], y[test]):.1%}")


if __name__ == "__main__":
    main()
