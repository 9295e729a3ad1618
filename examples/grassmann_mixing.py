"""Train two small language models of bytes, one of planes and one of attention, on Python's own help texts.

Both see the same pieces in the same order. Then the model of planes reads on with a state of constant size, and says
how far back its prediction depends on the text.
"""

import time

import torch

from polyspan.claims.grassmann_mixing import network, python_help
from polyspan.nn import score_next_token, token_influence, train_next_token

RECIPE = (48, 2, 12, 64)  # width, layers, reduced width, bytes a piece


def trained(text: torch.Tensor, mixer: str, steps: int):
    model = network(128, RECIPE, mixer, torch.Generator().manual_seed(0))
    train_next_token(
        model, text, steps=steps, length=64, learning_rate=8e-3, warmup=20, generator=torch.Generator().manual_seed(1)
    )
    return model


def main(steps: int = 150) -> None:
    data = python_help(0)
    text, test = (torch.tensor(part[part < 128]).long() for part in (data.train, data.test[:16_000]))
    made = {name: trained(text, name, steps) for name in ("grassmann", "attention")}
    for name, model in made.items():
        print(f"{name:>9}: {score_next_token(model, test, length=64):.3f} nats a byte on topics left out")
    model = made["grassmann"]
    start = torch.tensor(list(b"The following statement "))[None]
    source = model.stream(start, temperature=0.5, generator=torch.Generator().manual_seed(2), truncate=True)
    began = time.perf_counter()
    written = bytes(int(next(source)) for _ in range(120)).decode()
    each = (time.perf_counter() - began) / 120
    state = sum(part.numel() for layer in model.init_state().layers for part in layer)
    print(f"it goes on, {each * 1e3:.1f} ms a byte, with {state:,} numbers kept: {written!r}")
    influence = token_influence(model, test[None, :64])[0]
    back = 63 - int(influence.nonzero().min())
    print(f"the last of 64 predictions depends on {back} bytes before it; reach {model.receptive_field}")


if __name__ == "__main__":
    main()
