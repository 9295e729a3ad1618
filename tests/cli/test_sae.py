import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from polyspan.cli.sae import interactions, probe, steer, train
from polyspan.errors import CorruptFile, WrongContent
from polyspan.integrations import small_language_model
from polyspan.io import read_members, write_members
from polyspan.learn import ActivationStore, PolySAE, UnifiedEmbedding

OPTIONS = {"latents": 20, "k": 3, "ranks": (6, 3, 2), "batch": 50, "tokens": 3000, "learning_rate": 3e-3}
LINES = [f"the {a} of the {b} goes to the {c}" for a in ["cow", "dog", "hen"] for b in ["hill", "sea"]
         for c in ["town", "farm", "mill"]]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acts")
    rng, fixed = np.random.default_rng(0), np.random.default_rng(99)
    y = rng.integers(2, size=500)
    Z = rng.random((500, 10)) * (rng.random((500, 10)) < 0.3)
    Z[:, 4] = y * rng.uniform(1, 2, size=500)
    np.save(folder / "acts.npy", (Z @ fixed.normal(size=(10, 6))).astype(np.float16))
    np.save(folder / "acts.tokens.npy", y)
    return folder


@pytest.fixture(scope="module")
def sae(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("sae") / "sae.safetensors"
    train(data / "acts.npy", out=out, **OPTIONS)
    return out


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    return small_language_model(
        "\n".join(LINES * 3), hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2, vocab_size=280,
        context=32, steps=3, folder=tmp_path_factory.mktemp("models"),
    )  # fmt: skip


def test_train_compares_draws_and_writes_both_kinds_of_files(data, tmp_path, capsys):
    out, picture, folder = tmp_path / "sae.safetensors", tmp_path / "t.svg", tmp_path / "sae"
    train(data, out=out, compare=True, plot=picture, saelens=folder, json=True, **OPTIONS)
    said = json.loads(capsys.readouterr().out)
    assert set(said["report"]) == {"polynomial", "linear"}
    assert said["ranks"] == [6, 3, 2]
    assert said["steps"] == 60
    sae = PolySAE.load(out)
    X = np.load(data / "acts.npy").astype(np.float32)
    assert said["report"]["polynomial"]["unexplained"] == pytest.approx(sae.report(X).unexplained, rel=1e-4)
    assert said["report"]["polynomial"]["unexplained"] < 0.5
    np.testing.assert_array_equal(PolySAE.from_saelens(folder).transform(X), sae.transform(X))
    assert "linear" in picture.read_text()
    train(data, out=out, order=1, latents=20, k=3, tokens=500)
    assert "linear: unexplained\t" in capsys.readouterr().out


def test_training_goes_on_from_a_checkpoint(data, tmp_path):
    one, two, kept = tmp_path / "1.safetensors", tmp_path / "2.safetensors", tmp_path / "kept.safetensors"
    options = {**OPTIONS, "activation": "batchtopk", "separate": True}
    train(data / "acts.npy", out=one, **{**options, "tokens": 1000}, checkpoint=kept, every=7)
    train(data / "acts.npy", out=one, **options, checkpoint=kept, every=7)
    train(data / "acts.npy", out=two, **options)
    assert PolySAE.load(one).loss_curve_ == PolySAE.load(two).loss_curve_


def test_probe_names_the_latents_that_tell_labels(data, sae, tmp_path, capsys):
    other = tmp_path / "linear.safetensors"
    train(data / "acts.npy", out=other, order=1, latents=20, k=3, tokens=1000)
    capsys.readouterr()
    labels = data / "acts.tokens.npy"
    picture = tmp_path / "p.svg"
    probe(sae, data / "acts.npy", labels=labels, against=[other], top=2, json=True, plot=picture)
    said = json.loads(capsys.readouterr().out)
    assert all(f"<!-- {name} -->" in picture.read_text() for name in ("activations", sae.stem, other.stem, "F1"))
    with pytest.raises(ValueError, match=r"--plot must end in \.svg, \.png or \.pdf, got 'p\.gif'"):
        probe(sae, data / "acts.npy", labels=labels, plot=tmp_path / "p.gif")
    assert list(said["probes"]) == sorted([str(sae), str(other), "activations"])
    assert all(0.6 < p["f1"] <= 1 for p in said["probes"].values())
    assert len(said["latents"]["1"]) == 2
    assert said["latents"]["1"][0]["distance"] >= said["latents"]["1"][1]["distance"]
    probe(sae, data / "acts.npy", labels=labels, k=2)
    assert "activations\t" in capsys.readouterr().out
    np.save(tmp_path / "few.npy", np.arange(3))
    with pytest.raises(ValueError, match="--labels must be one a row, 500, got 3"):
        probe(sae, data / "acts.npy", labels=tmp_path / "few.npy")
    with pytest.raises(ValueError, match="--top must be at least 1, got 0"):
        probe(sae, data / "acts.npy", labels=labels, top=0)


def test_interactions_are_ranked_and_drawn(data, sae, tmp_path, capsys):
    picture = tmp_path / "i.svg"
    interactions(sae, data / "acts.npy", top=4, plot=picture, json=True)
    said = json.loads(capsys.readouterr().out)
    X = np.load(data / "acts.npy").astype(np.float32)
    found = PolySAE.load(sae).interactions(X, top=4)
    assert [e["latents"] for e in said["interactions"]] == found.latents.tolist()
    assert said["n_sets"] == found.n_sets
    assert "<svg" in picture.read_text()
    interactions(sae, data / "acts.npy", top=3, degree=3)
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "latents\tstrength\tlength\tshare of rows"
    assert len(rows) == 3


def test_a_models_activations_are_taken_trained_on_and_steered(language_model, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "sae.safetensors"
    text.write_text("\n".join(LINES * 3) + "\n")
    options = {"model": str(language_model), "layer": "model.layers.0", "latents": 32, "k": 4, "tokens": 2000}
    train(text, out=out, context=32, saelens=tmp_path / "lens", **options)
    kept = tmp_path / "sae.activations.npy"
    assert np.load(kept).dtype == np.float16
    assert len(ActivationStore.tokens(kept)) == len(np.load(kept))
    config = json.loads((tmp_path / "lens" / "cfg.json").read_text())
    assert config["metadata"] == {"model_name": str(language_model), "hook_name": "model.layers.0"}
    lines = tmp_path / "text.jsonl"
    lines.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES * 3))
    before = kept.stat().st_mtime_ns
    train(lines, out=out, context=32, activations=kept, **options)
    assert kept.stat().st_mtime_ns == before
    capsys.readouterr()
    common = {"model": str(language_model), "layer": "model.layers.0", "prompt": "the cow", "tokens": 5}
    steer(out, latents=[3, 4], strength=1000.0, json=True, **common)
    strong = json.loads(capsys.readouterr().out)
    steer(tmp_path / "lens", latents=[3], strength=0.0, json=True, **common)
    none = json.loads(capsys.readouterr().out)
    assert none["steered"] == none["plain"] == strong["plain"] != strong["steered"]
    steer(out, latents=[3, 4], sum_only=True, **common)
    assert capsys.readouterr().out.startswith("plain\t")
    with pytest.raises(ValueError, match="--tokens must be at least 1, got 0"):
        steer(out, latents=[3], **{**common, "tokens": 0})


def test_perplexity_is_told_as_it_is_and_with_reconstructions(language_model, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "sae.safetensors"
    text.write_text("\n".join(LINES * 3) + "\n")
    options = {"layer": "model.layers.0", "latents": 32, "k": 4, "tokens": 2000, "context": 8}
    train(text, out=out, model=str(language_model), eval=text, compare=True, json=True, **options)
    said = json.loads(capsys.readouterr().out)
    assert said["file_bytes"] == out.stat().st_size
    assert said["report"]["linear"]["bytes"] == 4 * said["report"]["linear"]["parameters"]
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(language_model).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(language_model)
    ids = [i for line in LINES * 3 for i in tokenizer(line + "\n", add_special_tokens=False)["input_ids"]]
    sae = PolySAE.load(out)

    def literal():
        total = count = 0
        for start in range(0, len(ids) - 8, 8):
            piece = torch.tensor(ids[start : start + 9])
            with torch.no_grad():
                logits = model(piece[None, :-1]).logits[0].double()
            total -= float(logits.log_softmax(-1)[torch.arange(8), piece[1:]].sum())
            count += 8
        return np.exp(total / count)

    def put(module, inputs, output):
        x = output[0] if isinstance(output, tuple) else output
        made = sae.inverse_transform(sae.transform(x.detach().flatten(0, -2).numpy()))
        made = torch.from_numpy(made).view(x.shape)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    assert said["perplexity"]["model"] == pytest.approx(literal(), rel=1e-4)
    handle = model.model.layers[0].register_forward_hook(put)
    assert said["perplexity"]["polynomial"] == pytest.approx(literal(), rel=1e-3)
    handle.remove()
    assert said["perplexity"]["polynomial"] != pytest.approx(said["perplexity"]["model"], rel=1e-3)
    assert said["perplexity"].keys() == {"model", "polynomial", "linear"}


def test_every_command_that_runs_an_autoencoder_takes_a_device(data, sae, language_model):
    told = "device must be 'auto' or one that torch knows, such as 'cuda:0', got 'nowhere'"
    common = {"model": str(language_model), "layer": "model.layers.0", "prompt": "the cow", "latents": [3]}
    with pytest.raises(ValueError, match=told):
        steer(sae, device="nowhere", **common)
    with pytest.raises(ValueError, match=told):
        probe(sae, data / "acts.npy", labels=data / "acts.tokens.npy", device="nowhere")
    with pytest.raises(ValueError, match=told):
        interactions(sae, data / "acts.npy", device="nowhere")
    if torch.cuda.is_available():
        steer(sae, device="cuda:0", tokens=2, **{**common, "latents": [0]})
        interactions(sae, data / "acts.npy", device="cuda:0")


def test_what_does_not_fit_is_said(data, sae, tmp_path):
    out = tmp_path / "o.safetensors"
    with pytest.raises(ValueError, match="--model and --layer must be given together"):
        train(data, out=out, model="m")
    with pytest.raises(ValueError, match="--activations is for --model"):
        train(data, out=out, activations=tmp_path / "a.npy")
    with pytest.raises(ValueError, match=r"source must end in .txt or .jsonl with --model, got 'acts.npy'"):
        train(data / "acts.npy", out=out, model="m", layer="l")
    text = tmp_path / "t.txt"
    text.write_text("a\n")
    with pytest.raises(ValueError, match="--model must be a folder or an id of a transformers model, got '/nowhere'"):
        train(text, out=out, model="/nowhere", layer="l")
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"text": "a"}\n{"txt": "b"}\n')
    with pytest.raises(ValueError, match=r'source must hold {"text": ...} in every line, got another thing in entry 2'):
        train(lines, out=out, model="m", layer="l")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="source must hold files of activations"):
        train(empty, out=out)
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1, 2]}), table)
    with pytest.raises(WrongContent):
        train(table, out=out)
    other = UnifiedEmbedding({"a": 1}, 10).save(tmp_path / "u.safetensors")
    with pytest.raises(WrongContent, match="expected a fitted PolySAE"):
        interactions(other, data / "acts.npy")
    broken = tmp_path / "b.npy"
    broken.write_bytes((data / "acts.npy").read_bytes()[:-10])
    with pytest.raises(CorruptFile):
        interactions(sae, broken)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"out": "x.npz"}, r"--out must end in \.safetensors, got 'x.npz'"),
        ({"plot": "p.foo"}, r"--plot must end in \.svg"),
        ({"saelens": "."}, "--saelens must be a new folder"),
        ({"checkpoint": "c.npz"}, r"--checkpoint must end in \.safetensors"),
    ],
)
def test_places_are_looked_at_before_training(tmp_path, options, told):
    given = {"out": "x.safetensors", **options}
    with pytest.raises(ValueError, match=told):
        train(tmp_path / "none.npy", **{name: tmp_path / value for name, value in given.items()})


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"eval": Path("t.txt")}, "--eval must go with --model, got t.txt without one"),
        ({"context": 64}, "--context must go with --model, got 64 without one"),
        ({"order": 1, "compare": True}, "--compare must go with --order 2 or 3, got 1"),
        ({"model": "m", "layer": "l", "column": "c"}, "--column and --member must go with files of activations"),
        ({"model": "m", "layer": "l", "member": "c"}, "--column and --member must go with files of activations"),
    ],
)
def test_options_that_nothing_would_look_at_are_refused(data, tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        train(data / "acts.npy", out=tmp_path / "sae.safetensors", **options)


def test_activations_and_checkpoints_are_not_written_over(data, tmp_path):
    acts = tmp_path / "acts.safetensors"
    write_members(acts, {"x": np.load(data / "acts.npy").astype(np.float32)})
    before = acts.read_bytes()
    for given in ({"out": acts}, {"out": tmp_path / "sae.safetensors", "checkpoint": acts}):
        with pytest.raises(ValueError, match=r"must be another file than a file that is read"):
            train(acts, **given, **OPTIONS)
    assert acts.read_bytes() == before
    out = tmp_path / "sae.safetensors"
    with pytest.raises(ValueError, match="--checkpoint must be another file than that of --out"):
        train(acts, out=out, checkpoint=out, **OPTIONS)


def test_a_model_whose_weights_are_a_pickle_is_not_read(language_model, tmp_path):
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    text.write_text("\n".join(LINES) + "\n")
    for path in language_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).parent.mkdir(exist_ok=True)
            (folder / path.name).write_bytes(path.read_bytes())
    weights = {n: torch.from_numpy(x) for n, x in read_members(language_model / "model.safetensors").items()}
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="--model must be a folder or an id of a transformers model"):
        train(text, out=tmp_path / "sae.safetensors", model=str(folder), layer="model.layers.0", **OPTIONS)


def test_a_push_of_no_finite_strength_is_refused(sae, language_model):
    common = {"model": str(language_model), "layer": "model.layers.0", "prompt": "the cow"}
    with pytest.raises(ValueError, match="strength must be finite, got nan"):
        steer(sae, latents=[3], strength=float("nan"), **common)
