"""Make a small language model smaller without training it, and see what dictionaries keep that low rank does not.

The model is trained once on Python's language reference, which comes with Python, and kept in the user's own folder.

The system is the catalogue's ``cospadi``.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from polyspan.checkpoints import compress_checkpoint, fastest_product
from polyspan.data import python_reference
from polyspan.integrations import load_compressed, small_language_model

SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "context": 48,
}  # fmt: skip


def main(steps: int = 150, tokens: int = 6000) -> None:
    transformers.logging.disable_progress_bar()
    text = python_reference()
    train, test = text[: int(0.9 * len(text))], text[int(0.9 * len(text)) :]
    model = small_language_model(train, "llama", steps=steps, **SIZES)
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    seen, held_out = (torch.tensor(tokenizer(part, verbose=False)["input_ids"])[:tokens] for part in (train, test))
    with tempfile.TemporaryDirectory() as folder:
        found = compress_checkpoint(
            model, Path(folder) / "small", calibration=seen, evaluation=held_out, ratio=0.3, context=48, max_iter=8,
            word_bytes=2, compare=("svd", "svd-llm", "wanda"),
        )  # fmt: skip
        print(f"{'':>8} {'lost of outputs':>16} {'perplexity':>11}")
        for row in found.methods:
            print(f"{row.method:>8} {row.mean_error:16.4f} {row.perplexity or 0:11.2f}")
        worst = max(found.layers, key=lambda row: row.error)
        print(f"most is lost in {worst.layer}: {worst.error:.3f}, of {worst.atoms} atoms {worst.nonzero} an output")
        small = load_compressed(Path(folder) / "small")
        for name, seconds in fastest_product(small, rows=1).items():
            ranked = sorted(seconds, key=seconds.__getitem__)
            times = seconds[ranked[-1]] / seconds[ranked[0]]
            print(f"{name}: {ranked[0]} is fastest here, {times:.0f} times as fast as {ranked[-1]}")
        written = small.generate(held_out[None, :8], max_new_tokens=24, do_sample=False, pad_token_id=0)
        print(repr(tokenizer.decode(written[0])))


if __name__ == "__main__":
    main()
