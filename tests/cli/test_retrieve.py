import json

import numpy as np
import pytest

from polyspan.align import InverseGraphConvolution, hubness
from polyspan.align.retrieval_report import compare_corrections, default_corrections
from polyspan.claims.invgc import planted
from polyspan.cli.retrieve import debias
from polyspan.errors import WrongContent
from polyspan.io import EmbeddingReader, read_array, write_array, write_members


@pytest.fixture(scope="module")
def world():
    return type(planted(0))(*(part.astype(np.float32) for part in planted(0)))


@pytest.fixture
def files(world, tmp_path):
    for name, rows in world._asdict().items():
        write_array(tmp_path / f"{name}.npy", rows)
    return tmp_path


def banks(files):
    return {"bank_gallery": files / "bank_gallery.npy", "bank_queries": files / "bank_queries.npy"}


def tuning(files):
    return {"tune_gallery": files / "tune_gallery.npy", "tune_queries": files / "tune_queries.npy"}


def test_the_file_holds_what_transform_gives_and_the_report_is_true(files, world, capsys):
    options = {"rate_gallery": 0.0, "rate_query": 2.0, "adjacency": "local", "pool_share": 0.1}
    source, asked = files / "gallery.npy", files / "queries.npy"
    debias(source, out=files / "out.npy", **banks(files), queries=asked, **options, json=True)
    told = json.loads(capsys.readouterr().out)
    fitted = InverseGraphConvolution(**options).fit(world.bank_gallery, queries=world.bank_queries)
    made = read_array(files / "out.npy")
    np.testing.assert_allclose(made, fitted.transform(world.gallery), atol=1e-6)
    assert made.dtype == np.float32
    assert told["hubness"]["before"]["skewness"] == pytest.approx(hubness(world.queries, world.gallery).skewness)
    assert told["hubness"]["after"]["skewness"] == pytest.approx(hubness(world.queries, np.asarray(made)).skewness)
    assert told["hubness"]["after"]["skewness"] < told["hubness"]["before"]["skewness"] - 2
    assert told["rate_limit_query"] is None
    assert json.loads((files / "out.npy.debias.json").read_text()) == told


def test_tuning_takes_the_rates_that_find_most_and_a_saved_correction_repeats_them(files, world, capsys):
    options = {"adjacency": "local", "pool_share": 0.1, "save": files / "fit.safetensors"}
    debias(files / "gallery.npy", out=files / "out.npy", **banks(files), **tuning(files), **options)
    shown = capsys.readouterr().out
    assert "tuned\trecall@1 0.6" in shown
    assert "adjacency\tlocal" in shown
    fitted = InverseGraphConvolution.load(files / "fit.safetensors")
    assert {fitted.rate_gallery, fitted.rate_query} == {0.0, 2.0}
    np.testing.assert_allclose(fitted.transform(world.gallery), read_array(files / "out.npy"), atol=1e-6)


def test_a_result_is_not_corrected_twice_unless_it_is_changed_or_asked_for(files):
    debias(files / "gallery.npy", out=files / "out.npy", **banks(files))
    with pytest.raises(ValueError, match="must not be corrected twice"):
        debias(files / "out.npy", out=files / "twice.npy", **banks(files))
    debias(files / "out.npy", out=files / "twice.npy", **banks(files), again=True)
    write_array(files / "out.npy", np.asarray(read_array(files / "gallery.npy")))
    debias(files / "out.npy", out=files / "other.npy", **banks(files))


def test_batches_do_not_change_the_result_and_the_gallerys_mean_is_taken_over_all_of_it(files, world):
    for mean, official in (("bank", "bank"), ("gallery", "gallery"), ("none", None)):
        debias(files / "gallery.npy", out=files / f"made-{mean}.npy", **banks(files), mean=mean, batch_rows=37)
        fitted = InverseGraphConvolution(mean=official).fit(world.bank_gallery, queries=world.bank_queries)
        np.testing.assert_allclose(read_array(files / f"made-{mean}.npy"), fitted.transform(world.gallery), atol=1e-6)


def test_without_banks_the_gallery_is_its_own_and_ids_of_a_table_stay(files, world, capsys):
    ids = [f"item-{i}" for i in range(len(world.gallery))]
    write_array(files / "gallery.parquet", world.gallery, ids=ids, column="vector")
    debias(files / "gallery.parquet", out=files / "out.parquet", mean="none", json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["measured"]["queries"] == "gallery"
    assert told["rate_query"] is None
    assert told["mean_cosine"]["after"] < told["mean_cosine"]["before"] - 0.1
    batches = list(EmbeddingReader(files / "out.parquet").batches())
    assert np.concatenate([b.ids for b in batches]).tolist() == ids


def test_a_gallery_among_other_members_is_named(files, world):
    write_members(files / "all.npz", {"gallery": world.gallery, "other": world.queries})
    debias(files / "all.npz", out=files / "out.npy", member="gallery", **banks(files))
    debias(files / "gallery.npy", out=files / "same.npy", **banks(files))
    np.testing.assert_array_equal(read_array(files / "out.npy"), read_array(files / "same.npy"))


def test_warnings_go_to_stderr_and_into_the_report(files, capsys):
    same = {"bank_gallery": files / "bank_gallery.npy", "bank_queries": files / "bank_gallery.npy"}
    debias(files / "gallery.npy", out=files / "out.npy", **same, rate_gallery=9.0, mean="none", json=True)
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert len(told["warnings"]) == 3
    assert told["warnings"][2].startswith("hubs are worse than before by")
    assert "above twice its limit" in shown.err
    assert "same file as the gallery's bank" in shown.err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"bank_queries": "gallery"}, "the bank of queries is the gallery itself"),
        ({"tune_gallery": "gallery", "tune_queries": "queries"}, "rates are tuned on the gallery itself"),
        ({"tune_gallery": "bank_gallery", "tune_queries": "bank_queries"}, "rates are tuned on the bank"),
        (
            {"tune_gallery": "tune_gallery", "tune_queries": "tune_gallery"},
            "rates are tuned on a gallery that asks for itself",
        ),
        (
            {"tune_gallery": "tune_gallery", "tune_queries": "tune_queries", "queries": "tune_queries"},
            "rates are tuned on the queries that measure them",
        ),
    ],
)
def test_files_that_are_given_for_two_things_are_told_of(files, capsys, options, text):
    given = banks(files) | {name: files / f"{stem}.npy" for name, stem in options.items()}
    debias(files / "gallery.npy", out=files / "out.npy", **given, json=True)
    shown = capsys.readouterr()
    assert text in shown.err
    assert any(text in told for told in json.loads(shown.out)["warnings"])


def test_a_gallery_that_is_its_own_bank_is_not_pushed_off_itself(files):
    write_array(files / "copy.npy", read_array(files / "gallery.npy"))
    for bank in ("gallery.npy", "copy.npy"):
        with pytest.raises(ValueError, match="must hold other items than the gallery for --adjacency local"):
            debias(files / "gallery.npy", out=files / "out.npy", bank_gallery=files / bank, adjacency="local")
    assert not (files / "out.npy").exists()


def test_pictures_have_equal_bytes_for_equal_input(files):
    for name in ("one.svg", "two.svg", "three.png"):
        debias(files / "gallery.npy", out=files / "out.npy", **banks(files), plot=files / name)
    assert (files / "one.svg").read_bytes() == (files / "two.svg").read_bytes()
    assert b"<svg" in (files / "one.svg").read_bytes()
    assert (files / "three.png").read_bytes().startswith(b"\x89PNG")


def test_all_corrections_are_compared_on_queries_that_did_not_tune_them(tmp_path, world, capsys):
    few = type(world)(*(part[:90] for part in world))
    for name, rows in few._asdict().items():
        write_array(tmp_path / f"{name}.npy", rows)
    given = {**banks(tmp_path), **tuning(tmp_path), "mean": "none", "compare": True, "seed": 3, "k": 7}
    debias(tmp_path / "gallery.npy", out=tmp_path / "out.npy", **given, plot=tmp_path / "all.svg")
    told = json.loads((tmp_path / "out.npy.debias.json").read_text())
    rows = compare_corrections(
        few.bank_gallery,
        few.bank_queries,
        few.tune_gallery,
        few.tune_queries,
        corrections=default_corrections(90, 90, mean=None),
        hub_k=7,
        random_state=3,
    )
    assert [row["correction"] for row in told["compared"]] == [row.name for row in rows]
    for mine, row in zip(told["compared"], rows, strict=True):
        assert [mine[f"recall@{k}"] for k in (1, 5, 10)] == list(row.report.recall.values())
        assert mine["skewness"] == row.report.hubness.skewness
        assert mine["setting"] == row.params
        assert mine["n_queries"] == 45
        assert mine["seconds"] > 0
    assert told["tuning"]["settings"] == 64
    assert b"dynamic inverted softmax" in (tmp_path / "all.svg").read_bytes()
    shown = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    table = shown[next(i for i, line in enumerate(shown) if line[0] == "correction") :]
    assert table[0][3:] == ["recall@1", "recall@5", "recall@10", "skewness", "seconds", "MiB"]
    assert [line[3] for line in table[1:]] == [f"{row.report.recall[1]:.4f}" for row in rows]
    assert table[1][:3] == ["no correction", "nothing", "-"]


def test_several_right_rows_a_query_are_read_from_a_file(files, world, capsys):
    # Queries in another order than the items, each with its item and the one after it.
    order = np.random.default_rng(0).permutation(250)[:100]
    answers = np.stack([order, (order + 1) % 250], axis=1)
    write_array(files / "asking.npy", world.tune_queries[order])
    write_array(files / "answers.npy", answers)
    given = {**banks(files), "tune_gallery": files / "tune_gallery.npy", "tune_queries": files / "asking.npy"}
    debias(files / "gallery.npy", out=files / "out.npy", **given, tune_answers=files / "answers.npy", json=True)
    told = json.loads(capsys.readouterr().out)
    fitted = InverseGraphConvolution().fit(world.bank_gallery, queries=world.bank_queries)
    choice = fitted.tune(world.tune_gallery, world.tune_queries[order], answers)
    assert told["tuning"]["recall@1"] == choice.score
    assert (told["rate_gallery"], told["rate_query"]) == choice[:2]
    write_array(files / "beyond.npy", answers + 250)
    write_array(files / "halves.npy", answers / 2)
    write_array(files / "short.npy", answers[:50])
    for name, message in (
        (None, "--tune-queries must hold 250 rows like --tune-gallery, or go with --tune-answers, got 100"),
        ("beyond.npy", "--tune-answers must hold rows of --tune-gallery, 0 to 249, or -1, got 25"),
        ("short.npy", r"--tune-answers must hold 100 rows, one a query, got shape \(50, 2\)"),
        ("halves.npy", "whole"),
    ):
        with pytest.raises((ValueError, WrongContent), match=message):
            debias(
                files / "gallery.npy",
                out=files / "no.npy",
                **given,
                tune_answers=None if name is None else files / name,
            )
    write_array(files / "wide.npy", np.ones((100, 3), dtype=np.float32))
    with pytest.raises(
        ValueError, match=r"--tune-queries must have 48 components like the banks, got 3 in .*wide\.npy"
    ):
        debias(files / "gallery.npy", out=files / "no.npy", **given | {"tune_queries": files / "wide.npy"})
    assert not (files / "no.npy").exists()


def test_without_a_comparison_the_report_has_none(files, capsys):
    debias(files / "gallery.npy", out=files / "out.npy", **banks(files), json=True)
    assert "compared" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjacency": "local", "bank_gallery": None}, "--bank-gallery must be given for --adjacency local"),
        ({"tune_gallery": "tune_gallery.npy"}, "must be given together"),
        ({"tune_answers": "queries.npy"}, "--tune-answers must go with --tune-gallery and --tune-queries, got neither"),
        ({"sample": 0}, "--sample must be at least 1, got 0"),
        ({"plot": "x.txt"}, "--plot must end in .svg, .png or .pdf, got 'x.txt'"),
        ({"rate_query": -1.0}, "rate_query must be at least 0"),
        ({"pool_share": 0.1}, "--pool-share must go with --adjacency local, got 0.1 with --adjacency full"),
        ({"pool_share": 0.01}, "--pool-share must go with --adjacency local, got 0.01 with --adjacency full"),
        ({"adjacency": "local", "mean": "bank"}, "--mean must go with --adjacency full, got bank with"),
        (
            {"bank_queries": None, "rate_query": 1.0},
            "--rate-query must go with --bank-queries, got 1 and no bank of queries",
        ),
        (
            {"tune_gallery": "tune_gallery.npy", "tune_queries": "tune_queries.npy", "rate_gallery": 0.5},
            "--rate-gallery must be left out with --tune-gallery, which chooses it, got 0.5",
        ),
        (
            {"tune_gallery": "tune_gallery.npy", "tune_queries": "tune_queries.npy", "rate_query": 0.0},
            "--rate-query must be left out with --tune-gallery, which chooses it, got 0",
        ),
        ({"compare": True}, "--compare must go with .*, got no --tune-gallery and no --tune-queries"),
        (
            {
                "compare": True,
                "bank_queries": None,
                "tune_gallery": "tune_gallery.npy",
                "tune_queries": "tune_queries.npy",
            },
            "--compare must go with .*, got no --bank-queries",
        ),
    ],
)
def test_wrong_use_is_said_and_nothing_is_written(files, options, message):
    before = {path.name for path in files.iterdir()}
    paths = {key: files / value if isinstance(value, str) and "." in value else value for key, value in options.items()}
    with pytest.raises(ValueError, match=message):
        debias(files / "gallery.npy", out=files / "out.npy", **(banks(files) | paths))
    assert {path.name for path in files.iterdir()} == before


def test_what_cannot_be_measured_is_said_before_anything_is_written(files):
    write_array(files / "one.npy", np.ones((1, 4), dtype=np.float32))
    write_array(files / "wide.npy", np.ones((5, 3), dtype=np.float32))
    before = {path.name for path in files.iterdir()}
    with pytest.raises(ValueError, match="gallery must hold at least 2 rows to be measured by its own rows, got 1"):
        debias(files / "one.npy", out=files / "out.npy")
    with pytest.raises(
        ValueError, match=r"--queries must have \d+ components like .*gallery\.npy, got 3 in .*wide\.npy"
    ):
        debias(files / "gallery.npy", out=files / "out.npy", queries=files / "wide.npy")
    assert {path.name for path in files.iterdir()} == before
