"""Claim: experts merged by clusters of their outputs keep more of a model than dropping the least used ones does."""

from typing import Any, NamedTuple

import numpy as np

from polyspan.claims import Claim
from polyspan.data import dataset, python_reference
from polyspan.errors import require
from polyspan.run import numpy_generator, thread_limits

# Seeds of models and of drawn pieces; no other were looked at before.
FIRST_SEED = 10
KEPT = (6, 4)
QUICK: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "context": 48,
}  # fmt: skip
STANDARD: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 4, "vocab_size": 1024, "context": 96,
}  # fmt: skip
STEPS = {"quick": (300, 100), "standard": (1500, 450)}
PIECES = {"quick": (128, 48), "standard": (64, 96)}


class Text(NamedTuple):
    """Text to train on and to score, as UTF-8 bytes (n,) uint8; a part of the first calibrates.

    One number each, (1,): ``upcycled`` says whether experts begin as copies of a dense model's MLP, ``equal`` whether
    all experts of a layer are made the same before any is merged, ``recommended`` which procedure is judged, and
    ``large`` which size of model and training is taken.
    """

    train: np.ndarray
    test: np.ndarray
    upcycled: np.ndarray
    equal: np.ndarray
    recommended: np.ndarray
    large: np.ndarray


def _text(
    train: str,
    test: str,
    *,
    upcycled: bool = False,
    equal: bool = False,
    recommended: bool = False,
    large: bool = False,
) -> Text:
    told = (np.frombuffer(part.encode(), np.uint8).copy() for part in (train, test))
    return Text(*told, *(np.array([flag]) for flag in (upcycled, equal, recommended, large)))


def on_reference(seed: int, **flags: bool) -> Text:  # noqa: ARG001 - the trial draws
    """Python's language reference; its last tenth is scored."""
    text = python_reference()
    cut = int(0.9 * len(text))
    return _text(text[:cut], text[cut:], **flags)


def on_wikitext(seed: int, **flags: bool) -> Text:  # noqa: ARG001
    """WikiText-2, on models of twice the width and five times the steps."""
    found = dataset("wikitext-2")
    return _text(found.train, found.test, large=True, **flags)


def all_equal(data: Text, seed: int) -> Text:  # noqa: ARG001
    """Return the same text, for a model whose experts will all do the same."""
    return data._replace(equal=np.array([True]))


def prepare(data: Text, seed: int) -> tuple[Any, Any, Any]:
    """Train a model of eight experts, and draw pieces (b, t) that calibrate and that are scored."""
    import torch

    from polyspan.checkpoints.transformers_bars import quiet_transformers
    from polyspan.integrations import small_language_model

    transformers: Any = require("transformers", extra="hf", purpose="a small language model")
    level = "standard" if data.large.all() else "quick"
    sizes, (steps, further) = (STANDARD if data.large.all() else QUICK), STEPS[level]
    train, test = (bytes(np.asarray(part, np.uint8)).decode("utf-8", "replace") for part in (data.train, data.test))
    with quiet_transformers():
        initial = None
        if data.upcycled.all():
            initial = small_language_model(train, "llama", steps=steps, seed=FIRST_SEED + seed, **sizes)
        path = small_language_model(
            train, "mixtral", steps=further if initial else steps, seed=FIRST_SEED + seed, initial=initial, **sizes
        )
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(path)
    model.eval()
    if data.equal.all():
        with torch.no_grad():
            for name, part in model.named_parameters():
                if ".experts." in name:
                    part.copy_(part[:1].expand_as(part))
    context = sizes["context"]
    rng = numpy_generator(FIRST_SEED + seed)
    drawn = []
    for text, count in zip((train, test), PIECES[level], strict=True):
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
        pieces = ids[: len(ids) // context * context].view(-1, context)
        drawn.append(pieces[np.sort(rng.permutation(len(pieces))[:count])])
    return model, drawn[0], drawn[1]


def cross_entropy(model: Any, ids: Any) -> float:
    """Mean over next tokens of pieces (b, t), in nats."""
    import torch
    from torch.nn import functional as F

    with torch.no_grad():
        logits = model(ids).logits
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


def trial(data: Text, seed: int) -> dict[str, float]:
    """Train, merge to six and to four of eight experts in every way, and score what each lost.

    The recommended procedure and pruning are told for each number of experts too.
    """
    import torch  # noqa: F401 - its threads can only be limited once it is there

    # Networks this small are slower on several threads than on one.
    with thread_limits(1):
        return _scores(data, seed)


def _scores(data: Text, seed: int) -> dict[str, float]:
    import warnings

    from polyspan.checkpoints import ExpertMerger, calibrate_experts
    from polyspan.checkpoints.expert_merging import RIVALS

    model, calibrating, scored = prepare(data, seed)
    before = cross_entropy(model, scored)
    losses: dict[str, float] = dict.fromkeys(RIVALS, 0.0)
    by_number: dict[str, float] = {}
    with warnings.catch_warnings():
        # Experts that no token chose are for pruning to find.
        warnings.simplefilter("ignore", UserWarning)
        calibration = calibrate_experts(model, calibrating)
        for name, settings in RIVALS.items():
            for kept in KEPT:
                merger = ExpertMerger(kept, random_state=seed, **settings).fit(model, calibration)
                lost = cross_entropy(merger.merge(model), scored) - before
                losses[name] += lost / len(KEPT)
                if name in ("recommended", "frequency pruning"):
                    by_number[f"{name}, to {kept}"] = lost
    judged = "recommended" if data.recommended.all() else "published"
    others = {name: loss for name, loss in losses.items() if name not in (judged, "frequency pruning")}
    others |= {**by_number, "unmerged, in all": before}
    return {"method": losses[judged], "baseline": losses["frequency pruning"], **others}


CLAIM = Claim(
    slug="sub-moe",
    statement=(
        "Experts merged by clusters of their outputs, averaged by frequency, keep more of a language model than "
        "dropping the least used experts does."
    ),
    method="k-means on the mean cosine of outputs, groups averaged by frequency, as published",
    baseline="frequency pruning: the least used experts and their router rows are dropped, on the same tokens",
    metric="cross-entropy on held-out text above the unmerged model's, nats a token, mean of 8 to 6 and 8 to 4 experts",
    better="lower",
    margin=0.01,
    worlds={
        "scratch": on_reference,
        "upcycled": lambda seed: on_reference(seed, upcycled=True),
        "recommended": lambda seed: on_reference(seed, recommended=True),
        "equal": lambda seed: on_reference(seed, equal=True),
        "wikitext": on_wikitext,
        "wikitext-upcycled": lambda seed: on_wikitext(seed, upcycled=True),
        "wikitext-recommended": lambda seed: on_wikitext(seed, recommended=True),
    },
    control="equal",
    levels={
        "quick": ("scratch", "recommended"),
        "standard": ("wikitext", "wikitext-upcycled", "wikitext-recommended"),
    },
    seeds={"quick": 3, "standard": 3},
    trial=trial,
    user_data=Text,
    spoil=all_equal,
    why=(
        "Averages lose: hidden neurons of experts trained from scratch have no common order, and their mean is the "
        "expert of no one. In the quick world groups by output similarity lose 0.50 nats, groups drawn at random 0.48, "
        "a group's most used expert, kept as it is, 0.17, and dropping the least used experts 0.09. On WikiText-2, "
        "with models trained for longer, they lose 1.35, 1.64, 0.68 and 0.40. With neurons matched before averaging "
        "and the down map fitted after it (the recommended procedure; worlds of its own) 0.06 and 0.31 are lost: less "
        "than by pruning on each quick seed and on two of three of WikiText-2, where that stays open. It is owed to "
        "four experts: with six, pruning loses less on two of three quick seeds. Where experts were copied from one "
        "dense MLP and trained on for a little they are alike, little is lost by any way, and the published procedure "
        "is on a par with pruning or a little behind. Where all experts of a layer are equal (control) neither loses "
        "anything."
    ),
)
