import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from polyspan.cli.embed_table import predict, report, train
from polyspan.errors import WrongContent
from polyspan.learn import FeatureSpec, UnifiedEmbedding, UnifiedEmbeddingClassifier, UnifiedEmbeddingRegressor
from polyspan.learn.unified_embedding_training_plots import learnt_table, plot_learnt_tables, rows_used


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    rng = np.random.default_rng(0)
    n = 1200
    user, item = rng.integers(30, size=n), rng.integers(20, size=n)
    taste = rng.normal(size=(30, 20))
    names = np.array([f"u{i}" for i in range(30)])[user]
    price = rng.normal(size=n)
    path = tmp_path_factory.mktemp("embed") / "clicks.parquet"
    columns = {"user": names, "item": item, "price": price, "click": (taste[user, item] > 0).astype(int)}
    pq.write_table(pa.table({**columns, "score": 3 * price + 1}), path)
    return path


def test_train_compares_and_writes_and_predict_and_report_follow(table, tmp_path, capsys):
    out, picture, answers = tmp_path / "m.safetensors", tmp_path / "c.svg", tmp_path / "answers.parquet"
    options = {"columns": ["user", "item", "price"], "budget_mb": 0.01, "width": 4, "epochs": 2}
    drawn = tmp_path / "t.svg"
    train(table, target="click", out=out, compare=True, plot=drawn, json=True, **options)
    for words in ("Loss by pass", "Least loss held out", "Rows shared, by feature", "a table a column, held out"):
        assert words in drawn.read_text()
    said = json.loads(capsys.readouterr().out)
    assert said["file_bytes"] == out.stat().st_size
    assert said["embedded"] == ["user", "item"]
    assert said["numbers"] == ["price"]
    assert set(said["loss_held_out"]) == {"multiplex", "hash", "collisionless"}
    assert said["table_bytes"]["multiplex"] == said["table_bytes"]["hash"] == int(0.01 * 2**20 / 16) * 16
    model = UnifiedEmbeddingClassifier.load(out)
    assert said["parameters"] == sum(p.numel() for p in model.network_.parameters())
    assert said["loss_held_out"]["multiplex"] < 0.8
    predict(out, table, out=answers, batch_rows=500)
    found = pq.read_table(answers)
    whole = pq.read_table(table)
    expected = model.predict_proba({n: whole[n] for n in ("user", "item", "price")})
    np.testing.assert_allclose(found["probability of 1"].to_numpy(), expected[:, 1], atol=1e-6)
    assert found["prediction"].to_pylist() == model.classes_[expected.argmax(axis=1)].tolist()
    report(out, table, plot=picture, json=True)
    said = json.loads(capsys.readouterr().out)
    assert said["collisions"]["item"]["n_values"] == 20
    assert np.shape(said["reader_overlap"]) == (2, 2)
    assert "<svg" in picture.read_text()
    report(out, table)
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.startswith("column\tvalues\t")
    assert first.startswith("user\t30\t")


def test_what_is_drawn_of_a_training_is_what_it_was(table, tmp_path):
    out, picture = tmp_path / "m.safetensors", tmp_path / "p.svg"
    options = {"target": "click", "out": out, "columns": ["price"], "epochs": 1}
    sizes = {"n_embeddings": 65, "chunk_dim": 4, "max_epochs": 2, "early_stopping": True, "random_state": 0}
    model = UnifiedEmbeddingClassifier(**sizes).fit_file(table, "click", columns=["user", "item", "price"])
    columns = {name: pq.read_table(table)[name] for name in ("user", "item")}
    embedding = model.network_.embedding
    rows = embedding.rows(embedding.keys(columns)).tolist()
    expected = {"user": len({row[0] for row in rows}), "item": len({row[1] for row in rows})}
    assert rows_used(embedding, columns) == expected
    assert expected["user"] < 30, "no value shares a row"
    learnt = learnt_table(model)
    assert learnt.nbytes == 65 * 4 * 4
    assert list(learnt.held_out) == model.validation_losses_
    half = len(model.loss_curve_) // 2
    assert learnt.trained == pytest.approx([np.mean(model.loss_curve_[:half]), np.mean(model.loss_curve_[half:])])
    train(table, plot=picture, **options)
    text = picture.read_text()
    assert "Loss by pass" in text
    assert "by feature" not in text
    one, two = (plot_learnt_tables({"a": learnt}, tmp_path / f"{n}.svg").read_bytes() for n in "ab")
    assert one == two
    with pytest.raises(ValueError, match=r"--plot must end in \.svg, \.png or \.pdf, got 'p.gif'"):
        train(table, plot=tmp_path / "p.gif", **options)
    with pytest.raises(ValueError, match="tables must be at least one, got none"):
        plot_learnt_tables({}, picture)
    with pytest.raises(ValueError, match=r"collisions must be of the features of used, \['a'\], got \[\]"):
        plot_learnt_tables({"a": learnt}, picture, used={"a": 1})
    with pytest.raises(ValueError, match="device must be"):
        train(table, device="nowhere", **options)


def test_rows_of_lists_are_counted_without_what_fills_them_up():
    columns = {"tags": pa.array([["a", "b"], ["c"], []]), "one": pa.array(["a", "b", "a"])}
    layer = UnifiedEmbedding({"tags": FeatureSpec(n_lookups=2, max_len=3), "one": 1}, 1000, 4)
    rows = layer.rows(layer.keys(columns))
    own = {*rows[0, :4].tolist(), *rows[1, :2].tolist()}
    assert rows_used(layer, columns) == {"tags": len(own), "one": len(set(rows[:, 6].tolist()))}
    assert len(own) == 6


def test_a_report_looks_at_as_many_rows_as_it_is_told_whatever_the_groups_of_the_file(table, tmp_path, capsys):
    out, pieces = tmp_path / "m.safetensors", tmp_path / "pieces.parquet"
    pq.write_table(pq.read_table(table), pieces, row_group_size=10)
    train(table, target="click", out=out, columns=["user", "item"], budget_mb=0.01, width=4, epochs=1)
    capsys.readouterr()
    said = []
    for source, rows in ((table, 1200), (pieces, 1200), (table, 25), (pieces, 25)):
        report(out, source, batch_rows=rows, json=True)
        said.append(json.loads(capsys.readouterr().out)["collisions"])
    assert said[0]["user"]["n_values"] == 30
    assert said[2]["user"]["n_values"] < 25
    assert said[1::2] == said[::2]


def test_numbers_are_learnt_from_text_tables_and_training_goes_on(table, tmp_path, capsys):
    data = pq.read_table(table)
    path, out, kept = tmp_path / "t.csv", tmp_path / "m.safetensors", tmp_path / "k.safetensors"
    lines = [
        "user,price,score",
        *(f"{u},{p},{s}" for u, p, s in zip(*(data[c].to_pylist() for c in ("user", "price", "score")), strict=True)),
    ]
    path.write_text("\n".join(lines) + "\n")
    options = {"target": "score", "out": out, "task": "regression", "checkpoint": kept, "budget_mb": 0.01}
    train(path, epochs=1, **options)
    assert UnifiedEmbeddingRegressor.load(out).n_iter_ == 1
    train(path, epochs=3, **options)
    assert "passes\t3" in capsys.readouterr().out
    predict(out, path, out=tmp_path / "p.csv")
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 1201


def test_what_does_not_fit_is_said(table, tmp_path):
    out = tmp_path / "m.safetensors"
    with pytest.raises(ValueError, match="--task must be 'classification' or 'regression', got 'ranking'"):
        train(table, target="click", out=out, task="ranking")
    with pytest.raises(ValueError, match="--budget-mb must be above 0 and finite, got 0"):
        train(table, target="click", out=out, budget_mb=0.0)
    with pytest.raises(ValueError, match="--budget-mb must be above 0 and finite, got inf"):
        train(table, target="click", out=out, budget_mb=float("inf"))
    with pytest.raises(ValueError, match=r"columns must be named once each, got \['user', 'user'\]"):
        train(table, target="click", out=out, columns=["user", "user"])
    with pytest.raises(ValueError, match="--checkpoint must be another file than that of --out"):
        train(table, target="click", out=out, checkpoint=out)
    with pytest.raises(ValueError, match="--width must be at least 1, got 0"):
        train(table, target="click", out=out, width=0)
    with pytest.raises(ValueError, match=r"columns must be of clicks.parquet, which has .*, got \['x'\]"):
        train(table, target="x", out=out)
    other = UnifiedEmbedding({"a": 1}, 10).save(tmp_path / "layer.safetensors")
    with pytest.raises(WrongContent, match="UnifiedEmbeddingClassifier or UnifiedEmbeddingRegressor"):
        predict(other, table, out=tmp_path / "p.csv")


def test_predictions_do_not_take_the_place_of_the_table(table, tmp_path):
    out, copied, empty = (tmp_path / name for name in ("m.safetensors", "copy.parquet", "empty.parquet"))
    train(table, target="click", out=out, columns=["user"], budget_mb=0.01, width=4, epochs=1)
    copied.write_bytes(table.read_bytes())
    with pytest.raises(ValueError, match="--out must be another file than a file that is read"):
        predict(out, copied, out=copied)
    assert copied.read_bytes() == table.read_bytes()
    with pytest.raises(ValueError, match=r"--out must end in \.parquet or .*, got 'answers.txt'"):
        predict(out, copied, out=tmp_path / "answers.txt")
    pq.write_table(pq.read_table(table).slice(0, 0), empty)
    with pytest.raises(ValueError, match=r"source must have at least one row, got 0 in .*empty.parquet"):
        predict(out, empty, out=tmp_path / "answers.csv")
