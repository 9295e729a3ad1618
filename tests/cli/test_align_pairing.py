"""Anchors of ``align fit`` and ``align score``: paired by id where both sides have ids."""

import json
import struct

import numpy as np
import pyarrow as pa
import pytest

from polyspan.align import load_aligner
from polyspan.cli import run
from polyspan.cli.align import apply, fit, score
from polyspan.io import read_array, write_array

RNG = np.random.default_rng(3)
X = RNG.normal(size=(90, 6)).astype(np.float32)
Y = (X @ np.linalg.qr(RNG.normal(size=(6, 6)))[0]).astype(np.float32)
WORDS = [f"w{i:03d}" for i in RNG.permutation(90)]
A, B = RNG.permutation(90)[:70], RNG.permutation(90)[:80]
"""Which items each side has, in its own order."""
COMMON = sorted(set(A.tolist()) & set(B.tolist()), key=A.tolist().index)


def write(path, rows, ids):
    if path.suffix == ".vec":
        path.write_text("".join(f"{i} {' '.join(map(repr, row.tolist()))}\n" for i, row in zip(ids, rows, strict=True)))
    elif path.suffix == ".bin":
        made = f"{len(rows)} {len(rows[0])}\n".encode()
        made += b"".join(i.encode() + b" " + struct.pack("<6f", *row) for i, row in zip(ids, rows, strict=True))
        path.write_bytes(made)
    elif path.suffix == ".jsonl":
        lines = ({"id": i, "v": row.tolist()} for i, row in zip(ids, rows, strict=True))
        path.write_text("\n".join(map(json.dumps, lines)))
    elif path.suffix == ".csv":
        cells = (f'{i},"{json.dumps(row.tolist())}"' for i, row in zip(ids, rows, strict=True))
        path.write_text("id,v\n" + "\n".join(cells))
    elif path.suffix == ".h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file["v"], file["words"] = rows, list(ids)
    else:
        write_array(path, rows, ids=ids)
    return path


def side(path, rows, which):
    return write(path, rows[which], [WORDS[i] for i in which])


@pytest.mark.parametrize("source", [".vec", ".bin", ".jsonl", ".csv", ".parquet", ".h5"])
@pytest.mark.parametrize("target", [".parquet", ".vec"])
def test_anchors_are_the_ids_that_both_sides_have(tmp_path, capsys, source, target):
    x, y, out = side(tmp_path / f"x{source}", X, A), side(tmp_path / f"y{target}", Y, B), tmp_path / "m.safetensors"
    options = {"source_id_column": "words"} if source == ".h5" else {}
    fit(x, y, out=out, json=True, **options)
    caught = capsys.readouterr()
    told = json.loads(caught.out)
    assert f"paired by id: {len(COMMON)} anchors are in both, of 70 rows in {x} and 80 in {y}" in caught.err
    assert (told["paired_by"], told["n_anchors"]) == ("id", len(COMMON))
    assert told["left_out"] == {"source": 70 - len(COMMON), "target": 80 - len(COMMON)}
    assert told["held_out"]["recall"]["twin@1"] == 1
    aligner, about = load_aligner(out)
    assert about["paired_by"] == "id"
    write_array(tmp_path / "cx.npy", X[COMMON])
    write_array(tmp_path / "cy.npy", Y[COMMON])
    fit(tmp_path / "cx.npy", tmp_path / "cy.npy", out=tmp_path / "n.safetensors")
    np.testing.assert_allclose(aligner.rotation_, load_aligner(tmp_path / "n.safetensors")[0].rotation_, atol=1e-5)
    capsys.readouterr()
    score(out, x, y, json=True, **options)
    scored = json.loads(capsys.readouterr().out)
    assert (scored["paired_by"], scored["n"], scored["recall"]["twin@1"]) == ("id", len(COMMON), 1)


def test_files_of_one_length_whose_ids_disagree_are_not_paired_by_row(tmp_path):
    turned = np.random.default_rng(0).permutation(90)
    x, y = side(tmp_path / "x.parquet", X, np.arange(90)), side(tmp_path / "y.parquet", Y, turned)
    fit(x, y, out=tmp_path / "m.safetensors")
    np.testing.assert_allclose(load_aligner(tmp_path / "m.safetensors")[0].transform(X[:5]) @ Y.T, (
        Y[:5] / np.linalg.norm(X[:5], axis=1, keepdims=True)) @ Y.T, atol=1e-2)  # fmt: skip


def test_without_ids_on_one_side_or_with_equal_ones_rows_are_paired_as_they_stand(tmp_path, capsys):
    x, y = side(tmp_path / "x.parquet", X, np.arange(90)), write_array(tmp_path / "y.npy", Y)
    fit(x, y, out=tmp_path / "m.safetensors", json=True)
    assert json.loads(capsys.readouterr().out)["paired_by"] == "row"
    fit(x, side(tmp_path / "y.parquet", Y, np.arange(90)), out=tmp_path / "m.safetensors")
    caught = capsys.readouterr()
    assert "paired by\tid" in caught.out
    assert caught.err == ""
    assert (
        run(
            [
                "align",
                "fit",
                str(x),
                str(write_array(tmp_path / "s.npy", Y[:80])),
                "-o",
                str(tmp_path / "n.safetensors"),
            ]
        )
        == 2
    )
    assert "one row an item, got 90 rows" in capsys.readouterr().err


def test_ids_that_cannot_pair_are_refused(tmp_path, capsys):
    x = side(tmp_path / "x.parquet", X, np.arange(90))
    other = write(tmp_path / "other.parquet", Y, [f"o{i}" for i in range(90)])
    whole = write(tmp_path / "whole.parquet", Y, list(range(90)))
    twice = write(tmp_path / "twice.parquet", Y, [*WORDS[:50], WORDS[7], *WORDS[51:]])
    out = tmp_path / "m.safetensors"
    for y, said in (
        (other, "must have at least 2 ids in common, got 0 of 90"),
        (whole, "must have ids of one kind, got text in"),
        (twice, f"must have every id once, got '{WORDS[7]}' again at row 50"),
    ):
        assert run(["align", "fit", str(x), str(y), "--out", str(out)]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not out.exists()


def test_an_all_zero_row_is_named_by_its_row_in_the_file_and_not_among_the_anchors(tmp_path, capsys):
    rows = Y.copy()
    rows[B[17]] = 0
    assert B[17] in COMMON
    x, y = side(tmp_path / "x.parquet", X, A), side(tmp_path / "y.parquet", rows, B)
    assert run(["align", "fit", str(x), str(y), "--out", str(tmp_path / "m.safetensors")]) == 2
    assert "y.parquet must have no all-zero row with --metric cosine, got one at row 17" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".vec", ".bin", ".jsonl", ".csv"])
def test_files_of_words_and_lists_are_carried_through_a_map(tmp_path, suffix):
    x, y, out = side(tmp_path / f"x{suffix}", X, A), side(tmp_path / "y.parquet", Y, B), tmp_path / "m.safetensors"
    fit(x, y, out=out)
    apply(out, x, out=tmp_path / "carried.npy", batch_rows=16)
    np.testing.assert_allclose(
        read_array(tmp_path / "carried.npy"), load_aligner(out)[0].transform(X[A]), rtol=1e-4, atol=1e-5
    )


def test_tables_of_lancedb_are_anchors_by_their_ids(tmp_path, capsys):
    lancedb = pytest.importorskip("lancedb")
    lists = pa.FixedSizeListArray.from_arrays(pa.array(X[A].ravel()), 6)
    lancedb.connect(str(tmp_path / "db")).create_table("docs", pa.table({"id": [WORDS[i] for i in A], "vector": lists}))
    y = side(tmp_path / "y.vec", Y, B)
    fit(tmp_path / "db", y, out=tmp_path / "m.safetensors", source_table="docs", json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["paired_by"], told["n_anchors"], told["held_out"]["recall"]["twin@1"]) == ("id", len(COMMON), 1)
    score(tmp_path / "m.safetensors", tmp_path / "db", y, source_table="docs", json=True)
    assert json.loads(capsys.readouterr().out)["recall"]["twin@1"] == 1


@pytest.mark.parametrize("named", [False, True])
def test_an_index_of_faiss_is_paired_by_its_ids_or_by_row(tmp_path, capsys, named):
    faiss = pytest.importorskip("faiss")
    index = faiss.IndexFlatIP(6)
    if named:
        index = faiss.IndexIDMap(index)
        index.add_with_ids(X[A], A.astype(np.int64))
    else:
        index.add(X)
    faiss.write_index(index, str(tmp_path / "x.faiss"))
    y = write(tmp_path / "y.parquet", Y[B], B.tolist()) if named else write_array(tmp_path / "y.npy", Y)
    fit(tmp_path / "x.faiss", y, out=tmp_path / "m.safetensors", metric="dot", json=True)
    told = json.loads(capsys.readouterr().out)
    assert (told["paired_by"], told["n_anchors"]) == (("id", len(COMMON)) if named else ("row", 90))
    np.testing.assert_allclose(load_aligner(tmp_path / "m.safetensors")[0].transform(X[:9]), Y[:9], atol=1e-4)


def test_places_that_a_file_does_not_have_are_refused(tmp_path, capsys):
    x, y, out = write_array(tmp_path / "x.npy", X), write_array(tmp_path / "y.npy", Y), tmp_path / "m.safetensors"
    assert run(["align", "fit", str(x), str(y), "--out", str(out), "--source-table", "docs"]) == 2
    assert "a table must be of a folder of LanceDB, got 'docs'" in capsys.readouterr().err
    assert run(["align", "fit", str(x), str(y), "--out", str(out), "--source-id-column", "id"]) == 2
    assert "column and id_column are for tables" in capsys.readouterr().err
