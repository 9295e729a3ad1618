"""Under the Hugging Face Trainer compatible training is the plain loop, and reports compatibility as it goes."""

import numpy as np
import pytest
import torch
from torch import nn

from polyspan.align import (
    OrthogonalCompatibleHead,
    OrthogonalCompatibleLoss,
    class_prototypes,
    evaluate_compatibility,
)

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from polyspan.integrations.compatible_trainer import (  # noqa: E402
    CompatibilityMetrics,
    CompatibleEncoder,
    CompatibleTrainerLoss,
    RetractionCallback,
    keep_embedding,
)

C, D, E, N = 4, 6, 3, 24


class Rows(torch.utils.data.Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def text_rows(seed=0):
    """Sentences of 6 tokens, the last two hidden in some, whose class decides half of the tokens."""
    g = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(N):
        y = i % C
        ids = torch.randint(4, 20, (6,), generator=g)
        ids[:3] = torch.tensor([4 + y, 8 + y, 12 + y])
        mask = torch.tensor([1, 1, 1, 1, 1, 1] if i % 3 else [1, 1, 1, 1, 0, 0])
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": y, "text_of_row": "dropped by the Trainer"})
    return rows


def text_encoder():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def model_of(orthogonal_map="cayley"):
    g = torch.Generator().manual_seed(1)
    head = OrthogonalCompatibleHead(12, D, C, extra_dim=E, orthogonal_map=orthogonal_map, generator=g)
    return CompatibleEncoder(text_encoder(), head)


def old_world(seed=3):
    """Old vectors of the rows: noisy classes."""
    rng = np.random.default_rng(seed)
    y = np.arange(N) % C
    old = np.eye(C, D)[y] + 0.6 * rng.standard_normal((N, D))
    old /= np.linalg.norm(old, axis=1, keepdims=True)
    return old, y, class_prototypes(old, y, C)


def arguments(folder, **more):
    settings = {
        "output_dir": str(folder),
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": False,
    }
    return transformers.TrainingArguments(**settings | more)


def batch_of(rows):
    return {n: torch.stack([torch.as_tensor(r[n]) for r in rows]) for n in ("input_ids", "attention_mask", "labels")}


def plain_loop(model, loss, rows, size, epochs, retract=False):
    """Train without the Trainer; return the loss of every step."""
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=1e-2), []
    for _ in range(epochs):
        for start in range(0, len(rows), size):
            batch = batch_of(rows[start : start + size])
            hidden = model.encoder(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
            weight = batch["attention_mask"][..., None]
            terms = loss(model.head((hidden * weight).sum(1) / weight.sum(1)), batch["labels"])
            optimizer.zero_grad()
            terms["total"].backward()
            optimizer.step()
            if retract:
                model.head.retract_()
            seen.append(float(terms["total"].detach()))
    return seen


@pytest.mark.parametrize(
    ("orthogonal_map", "size", "accumulated", "plain_size"),
    [("cayley", 8, 1, 8), ("retraction", 8, 1, 8), ("cayley", 5, 5, 24)],
)
def test_the_trainer_is_the_plain_loop(tmp_path, orthogonal_map, size, accumulated, plain_size):
    # the third case: five batches of 5, 5, 5, 5 and 4 make one step of 24
    rows, (_, _, P) = text_rows(), old_world()
    model, other = model_of(orthogonal_map), model_of(orthogonal_map)
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulated),
        train_dataset=Rows(rows),
        compute_loss_func=CompatibleTrainerLoss(OrthogonalCompatibleLoss(P)),
        callbacks=[RetractionCallback()],
    )
    trainer.train()
    expected = plain_loop(
        other.train(), OrthogonalCompatibleLoss(P), rows, plain_size, 2, retract=orthogonal_map == "retraction"
    )
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(logged, expected, rtol=1e-5)
    assert abs(expected[-1] - expected[0]) > 1e-3
    for (name, value), wanted in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5, msg=name)


def test_compatibility_is_reported_at_each_evaluation(tmp_path):
    rows, (old, y, P) = text_rows(), old_world()
    model = model_of()
    trainer = transformers.Trainer(
        model=model,
        args=arguments(tmp_path, num_train_epochs=30, eval_strategy="steps", eval_steps=45, optim="adamw_torch"),
        train_dataset=Rows(rows),
        eval_dataset=Rows(rows),
        compute_loss_func=CompatibleTrainerLoss(OrthogonalCompatibleLoss(P)),
        compute_metrics=CompatibilityMetrics(old, y),
        preprocess_logits_for_metrics=keep_embedding,
    )
    first = trainer.evaluate()
    trainer.train()
    seen = [entry for entry in trainer.state.log_history if "eval_gain_map" in entry]
    assert [entry["step"] for entry in seen] == [45, 90]
    model.eval()
    batch = batch_of(rows)
    with torch.no_grad():
        new = model.embed(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).numpy()
    wanted = evaluate_compatibility(new, old, y, y, True, reference=old, widths="truncate")
    assert wanted.reference is not None
    last = seen[-1]
    assert last["eval_cross_map"] == pytest.approx(wanted.scores.map)
    assert last["eval_old_map"] == pytest.approx(wanted.reference.map)
    assert last["eval_gain_map"] == pytest.approx(wanted.scores.map - wanted.reference.map)
    assert last["eval_self_top-1"] == pytest.approx(evaluate_compatibility(new, new, y, y, True).scores.cmc[1])
    # untrained vectors say nothing in the old gallery, trained ones find more there than the old ones do
    assert first["eval_compatible"] == 0.0
    assert last["eval_compatible"] == 1.0


def test_images_and_other_poolings():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    encoder = transformers.ViTModel(config, add_pooling_layer=True).eval()
    head, pixels = OrthogonalCompatibleHead(12, D, C, extra_dim=E), torch.randn(3, 3, 8, 8)
    found = encoder(pixel_values=pixels)
    for pooling, features in (
        ("first", found.last_hidden_state[:, 0]),
        ("mean", found.last_hidden_state.mean(1)),
        ("pooler", found.pooler_output),
        (lambda output, mask: output.last_hidden_state[:, 1], found.last_hidden_state[:, 1]),
    ):
        made = CompatibleEncoder(encoder, head, pooling=pooling)
        torch.testing.assert_close(made(pixel_values=pixels).logits, head(features).logits)
        torch.testing.assert_close(made.embed(pixel_values=pixels), head.embed(features))


def test_errors_name_what_was_wrong():
    head, (old, y, P) = OrthogonalCompatibleHead(12, D, C, extra_dim=E), old_world()
    with pytest.raises(ValueError, match="head must be an OrthogonalCompatibleHead, got Linear"):
        CompatibleEncoder(text_encoder(), nn.Linear(12, 4))
    with pytest.raises(ValueError, match="pooling must be one of"):
        CompatibleEncoder(text_encoder(), head, pooling="max")
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="must find pooler_output"):
        CompatibleEncoder(text_encoder(), head, pooling="pooler")(input_ids=ids)
    with pytest.raises(ValueError, match=r"features \(b, 9\) like head, got \(2, 12\)"):
        CompatibleEncoder(text_encoder(), OrthogonalCompatibleHead(9, D, C))(input_ids=ids)
    with pytest.raises(ValueError, match="reduction='mean'"):
        CompatibleTrainerLoss(OrthogonalCompatibleLoss(P, reduction="none"))
    with pytest.raises(ValueError, match="labels must be given"):
        CompatibleTrainerLoss(OrthogonalCompatibleLoss(P))(model_of()(input_ids=ids), None)
    metrics, new = CompatibilityMetrics(old, y), np.ones((N, D + E))
    for rows, labels, message in (
        (new[1:], y[1:], "got 24 for 23 items"),
        (new, y[::-1], "in its order, got 24 others"),
        (new[:, :2], y, "at least the 6 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            metrics(transformers.EvalPrediction(predictions=rows, label_ids=labels))
    with pytest.raises(ValueError, match=r"shapes \(n, d\) and \(n,\)"):
        CompatibilityMetrics(old, y[1:])


def test_what_the_trainer_saves_is_read_back(tmp_path):
    from safetensors.torch import load_file

    rows, (_, _, P) = text_rows(), old_world()
    model, other = model_of(), model_of()
    loss = CompatibleTrainerLoss(OrthogonalCompatibleLoss(P))
    trainer = transformers.Trainer(
        model=model, args=arguments(tmp_path), train_dataset=Rows(rows), compute_loss_func=loss
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    other.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"))
    batch = batch_of(rows)
    del batch["labels"]
    assert torch.equal(other.eval().embed(**batch), model.eval().embed(**batch))
    terms = loss.terms
    assert terms["total"] == pytest.approx(5 * terms["ce"] + 10 * terms["bct"] + 5 * terms["cos"])
