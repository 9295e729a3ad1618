"""Merge eight experts a layer into four, in a checkpoint on disk, and read it back.

The text is Python's language reference, which comes with Python. A small Mixtral is trained on it once and kept; a
checkpoint of your own, or a name on the Hub, goes in its place.

The system is the catalogue's ``sub-moe``.
"""

import math
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from polyspan.checkpoints import merge_expert_checkpoint
from polyspan.data import python_reference
from polyspan.integrations import load_merged_experts, small_language_model
from polyspan.nn import score_next_token


def main(steps: int = 300) -> None:
    disable_progress_bar()
    text = python_reference()
    train, test = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    model = small_language_model(
        train, "mixtral", hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, vocab_size=512, context=48,
        steps=steps,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration, evaluation = (
        ids[: len(ids) // 48 * 48].view(-1, 48)[:128]
        for ids in (torch.tensor(tokenizer(part, verbose=False)["input_ids"]) for part in (train, test))
    )
    with tempfile.TemporaryDirectory() as folder:
        found = merge_expert_checkpoint(
            model, Path(folder) / "merged", experts=4, calibration=calibration, evaluation=evaluation, compare=True
        )
        for layer in found.report.layers:
            print(f"{layer.name}: groups {layer.groups}, mean cosine {layer.similarity:.2f}, error {layer.error:.0%}")
        print(f"{found.parameters:,} parameters became {found.parameters_after:,}; perplexity on other pages:")
        for name, value in {**found.perplexity, **found.comparison}.items():
            print(f"  {name:>20}  {value:.1f}")
        merged = load_merged_experts(found.path)
        again = score_next_token(merged, evaluation.flatten(), length=47)
    print(f"read back, over all those pages in a row: {math.exp(again):.1f}")


if __name__ == "__main__":
    main()
