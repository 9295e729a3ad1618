import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from polyspan.errors import CorruptFile, UnreadableFile, WrongContent
from polyspan.io import check_directory, load_fitted, save_fitted
from polyspan.learn import ActivationStore, PolySAE

SMALL = {"n_components": 20, "k": 3, "ranks": (6, 3, 2), "batch_size": 50, "random_state": 0, "learning_rate": 3e-3}


def activations(n=400, d=6, seed=0):
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    Z = rng.random((n, 10)) * (rng.random((n, 10)) < 0.3)
    return (20 * Z @ fixed.normal(size=(10, d)) + 3).astype(np.float32)


def fit(**options):
    return PolySAE(**{**SMALL, "max_tokens": 50 * 60, **options}).fit(activations())


KINDS = [
    {},
    {"shared": False},
    {"order": 1},
    {"ranks": (6, 3, 0)},
    {"activation": "batchtopk"},
    {"activation": "batchtopk", "shared": False},
    {"activation": "matryoshka"},
    {"activation": "jumprelu"},
    {"activation": "batchtopk", "order": 1},
]


def name(options):
    return ",".join(f"{k}={v}" for k, v in options.items())


# Resuming.


@pytest.mark.parametrize("options", KINDS, ids=name)
def test_an_autoencoder_comes_back_from_disk_and_its_training_goes_on(options, tmp_path):
    X = activations()
    model = fit(**options)
    again = PolySAE.load(model.save(tmp_path / "sae.safetensors"))
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    np.testing.assert_array_equal(again.components_, model.components_)
    assert again.get_params() == model.get_params()
    for name in ("loss_curve_", "n_iter_", "n_tokens_", "dead_share_", "scale_"):
        assert getattr(again, name) == getattr(model, name)
    for one in (model, again):
        one.partial_fit(X[:120])
    np.testing.assert_array_equal(again.transform(X), model.transform(X))


def rewritten(path, change):
    """Write a fitted file again with other arrays, as another version would have."""
    found = load_fitted(path)
    arrays = dict(found.arrays)
    change(arrays, found.params)
    return save_fitted(path, kind=found.kind, arrays=arrays, params=found.params)


def test_files_of_before_dead_latents_were_kept_are_read(tmp_path):
    # A rate at which latents die, and few steps until they count as dead.
    model = fit(dead_after=20, learning_rate=0.1, aux_coef=0.0)
    silent = np.flatnonzero(model._trainer.since_fired.numpy() >= 20)
    assert len(silent)
    path = rewritten(model.save(tmp_path / "old.safetensors"), lambda arrays, _: arrays.pop("dead"))
    again = PolySAE.load(path)
    np.testing.assert_array_equal(again._trainer.dead.numpy(), silent)
    np.testing.assert_array_equal(again.transform(activations()), model.transform(activations()))
    again.partial_fit(activations())
    assert np.isfinite(again.loss_curve_).all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda arrays, _: arrays.pop("since fired"), "since fired"),
        (lambda arrays, _: arrays.pop("module C2"), "C2"),
        (lambda arrays, _: arrays.update({"module C2": arrays["module C1"]}), "C2"),
        (lambda arrays, params: params.pop("scale"), "scale"),
        (lambda arrays, params: params["init"].update(novelty=1), "novelty"),
    ],
    ids=["an array", "a tensor", "a shape", "a parameter", "a parameter of later"],
)
def test_a_file_with_other_entries_names_the_version_that_wrote_it(tmp_path, change, said):
    path = rewritten(fit().save(tmp_path / "old.safetensors"), change)
    with pytest.raises(WrongContent, match=rf"polyspan [\d.]+ wrote.*{said}"):
        PolySAE.load(path)


@pytest.mark.parametrize(
    "options",
    # Of the last, many latents are dead, and the checkpoint lies between two looks at which.
    [{}, {"activation": "batchtopk", "schedule": "cosine"}, {"k": 1, "dead_after": 4}],
    ids=name,
)
def test_a_training_that_was_stopped_goes_on_to_the_same_bits(options, tmp_path, monkeypatch):
    from polyspan.learn import _sae_training

    X, kept = activations(430), tmp_path / "kept.safetensors"
    made = {**SMALL, "max_tokens": 50 * 61, **options}
    whole = PolySAE(**made).fit(X)
    step = _sae_training.Trainer.step

    def stops(self, *args):
        if len(self.losses) == 33:  # in the middle of a pass, and three steps after the last checkpoint
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(_sae_training.Trainer, "step", stops)
    with pytest.raises(KeyboardInterrupt):
        PolySAE(**made).fit(X, checkpoint=kept, checkpoint_every=10)
    monkeypatch.setattr(_sae_training.Trainer, "step", step)
    assert PolySAE.load(kept).n_iter_ == 30
    model = PolySAE(**made).fit(X, checkpoint=kept, checkpoint_every=10)
    assert model.loss_curve_ == whole.loss_curve_
    for mine, theirs in zip(model.module_.state_dict().values(), whole.module_.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)
    assert PolySAE.load(kept).loss_curve_ == whole.loss_curve_
    # A finished training is read, and not trained again.
    monkeypatch.setattr(_sae_training.Trainer, "step", stops)
    assert PolySAE(**made).fit(X, checkpoint=kept).n_iter_ == 61


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {here!r})
    import test_sae_files as t
    from polyspan.learn import _sae_training

    step = _sae_training.Trainer.step

    def dies(self, *args):
        if len(self.losses) == 27:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    _sae_training.Trainer.step = dies
    t.PolySAE(**t.SMALL, max_tokens=50 * 40).fit(t.ActivationStore.from_files({data!r}), checkpoint={kept!r},
                                                 checkpoint_every=10)
"""


def test_a_killed_process_leaves_a_checkpoint_that_is_gone_on_from(tmp_path):
    data, kept = tmp_path / "acts.npy", tmp_path / "kept.safetensors"
    np.save(data, activations().astype(np.float16))
    code = textwrap.dedent(KILLED).format(here=os.path.dirname(__file__), data=str(data), kept=str(kept))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert PolySAE.load(kept).n_iter_ == 20
    options = {**SMALL, "max_tokens": 50 * 40}
    whole = PolySAE(**options).fit(ActivationStore.from_files(data))
    model = PolySAE(**options).fit(ActivationStore.from_files(data), checkpoint=kept)
    # Two processes may differ in their threads, and so in the last bits.
    np.testing.assert_allclose(model.loss_curve_, whole.loss_curve_, rtol=1e-4)


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    kept = tmp_path / "kept.safetensors"
    X = activations()
    PolySAE(**SMALL, max_tokens=500).fit(X, checkpoint=kept)
    with pytest.raises(ValueError, match=r"checkpoint must be of this training, got kept.safetensors with k=3"):
        PolySAE(**{**SMALL, "k": 4}, max_tokens=500).fit(X, checkpoint=kept)
    with pytest.raises(ValueError, match="with other data"):
        PolySAE(**SMALL, max_tokens=500).fit(X[1:], checkpoint=kept)
    with pytest.raises(ValueError, match="checkpoint_every must be at least 1, got 0"):
        PolySAE(**SMALL).fit(X, checkpoint=kept, checkpoint_every=0)
    longer = PolySAE(**SMALL, max_tokens=1000).fit(X, checkpoint=kept)
    assert longer.n_iter_ == 20
    cosine = {**SMALL, "schedule": "cosine"}
    PolySAE(**cosine, max_tokens=500).fit(X, checkpoint=tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="with max_tokens=500"):
        PolySAE(**cosine, max_tokens=600).fit(X, checkpoint=tmp_path / "c.safetensors")


def test_broken_files_are_told(tmp_path):
    path = fit().save(tmp_path / "sae.safetensors")
    data = path.read_bytes()
    path.write_bytes(data[:-200])
    with pytest.raises(CorruptFile):
        PolySAE.load(path)
    flipped = bytearray(data)
    flipped[-100] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(CorruptFile, match="SHA-256"):
        PolySAE.load(path)
    with pytest.raises(UnreadableFile):
        PolySAE.load(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"path must end in .safetensors"):
        fit().save(tmp_path / "sae.bin")


# Files of SAELens and PolySAE.


@pytest.mark.parametrize("options", KINDS, ids=name)
def test_an_export_gives_the_same_codes_to_the_bit(options, tmp_path):
    X = activations(seed=1)
    model = fit(**options)
    assert model.scale_ not in (0, 1)
    folder = model.export(tmp_path / "sae", metadata={"model_name": "tiny"})
    assert check_directory(folder) == ["cfg.json", "sae_weights.safetensors"]
    again = PolySAE.from_saelens(folder)
    assert again.scale_ == 1
    codes = model.transform(X)
    np.testing.assert_array_equal(again.transform(X), codes)
    np.testing.assert_array_equal(again.inverse_transform(codes), model.inverse_transform(codes))
    np.testing.assert_allclose(again.components_, model.components_, rtol=1e-6, atol=1e-7)
    if options.get("order") != 1:
        ours, theirs = model.interactions(X, top=5), again.interactions(X, top=5)
        np.testing.assert_array_equal(ours.latents, theirs.latents)
        np.testing.assert_allclose(ours.strengths, theirs.strengths, rtol=1e-5)
        np.testing.assert_allclose(again.direction([1, 2]), model.direction([1, 2]), rtol=1e-5)


def slow_sae(config, W, X):
    """What the formats mean, written out."""
    pre = (X - W["b_dec"]) @ W["W_enc"] + W["b_enc"]
    if config["architecture"].endswith("topk"):
        z = np.zeros_like(pre)
        best = np.argsort(-pre, axis=1)[:, : config["k"]]
        np.put_along_axis(z, best, np.maximum(np.take_along_axis(pre, best, axis=1), 0), axis=1)
    else:
        z = np.where((pre > W["threshold"]) & (pre > 0), pre, 0)
    if not config["architecture"].startswith("poly_"):
        return z, z @ W["W_dec"] + W["b_dec"]
    _, R2, R3 = config["poly_ranks"]
    U = [W["U_shared"]] * 3 if config["shared_u"] else [W.get(f"U{i}") for i in (1, 2, 3)]
    a = z @ U[0]
    y = W["b_dec"] + a @ W["C1"].T
    if config["poly_order"] > 1:
        y = y + W["lambda2"] * (a[:, :R2] * (z @ U[1])[:, :R2]) @ W["C2"].T
    if config["poly_order"] > 2:
        y = y + W["lambda3"] * (a[:, :R3] * (z @ U[1])[:, :R3] * (z @ U[2])[:, :R3]) @ W["C3"].T
    return z, y


@pytest.mark.parametrize("options", KINDS, ids=name)
def test_an_export_means_what_it_says(options, tmp_path):
    X = activations(seed=1)
    model = fit(**options)
    folder = model.export(tmp_path / "sae")
    config = json.loads((folder / "cfg.json").read_text())
    arrays = load_file(folder / "sae_weights.safetensors")
    z, y = slow_sae(config, {n: v.astype(np.float64) for n, v in arrays.items()}, X.astype(np.float64))
    wide = model.transform(X.astype(np.float64))
    # The codes are in units of the scale, which only the decoder undoes.
    np.testing.assert_allclose(wide, z, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(model.inverse_transform(wide), y, rtol=1e-5, atol=1e-6)
    for key in ("d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations", "metadata"):
        assert key in config
    # No decoder that nothing reads.
    assert ("W_dec" in arrays) == (options.get("order") == 1)
    assert sum(v.size for v in arrays.values()) < 20 * 6 * 2 + 20 * 12 + 6 * 12 + 60


def test_the_published_loaders_placeholders_are_there_when_asked_for(tmp_path):
    model = fit()
    arrays = load_file(model.export(tmp_path / "sae", placeholders=True) / "sae_weights.safetensors")
    assert {"W_dec", "U1", "U2", "U3", "U_shared", "C1", "C2", "C3", "lambda2", "lambda3"} <= set(arrays)
    np.testing.assert_allclose(arrays["W_dec"], model.components_)
    assert np.abs(arrays["U1"]).sum() == 0
    assert arrays["U3"].shape == (20, 2)
    again = PolySAE.from_saelens(tmp_path / "sae")
    np.testing.assert_array_equal(again.transform(activations()), model.transform(activations()))


def written(folder, config, arrays):
    folder.mkdir()
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(arrays, folder / "sae_weights.safetensors")
    return folder


def foreign(seed=0, **more):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (6, 20), "b_enc": (20,), "b_dec": (6,), "W_dec": (20, 6), **more}
    arrays = {n: rng.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}
    config = {"d_in": 6, "d_sae": 20, "normalize_activations": "none", "architecture": "topk", "k": 3}
    return config, arrays


def test_files_of_saelens_are_read(tmp_path):
    X = activations(50).astype(np.float64)
    config, arrays = foreign()
    wide = {n: v.astype(np.float64) for n, v in arrays.items()}
    z, y = slow_sae(config, wide, X)
    model = PolySAE.from_saelens(written(tmp_path / "a", config, arrays))
    np.testing.assert_allclose(model.transform(X), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.inverse_transform(z), y, rtol=1e-4, atol=1e-3)
    # Before version 6 the activation stood apart.
    del config["k"]
    config |= {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    again = PolySAE.from_saelens(written(tmp_path / "b", config, arrays))
    np.testing.assert_array_equal(again.transform(X), model.transform(X))
    # Plain ReLU, and an input that is not centred.
    config = {**foreign()[0], "architecture": "standard", "apply_b_dec_to_input": False}
    plain = PolySAE.from_saelens(written(tmp_path / "c", config, arrays))
    np.testing.assert_allclose(
        plain.transform(X), np.maximum(X @ wide["W_enc"] + wide["b_enc"], 0), rtol=1e-4, atol=1e-4
    )
    assert plain.partial_fit(X).n_iter_ == 1


def test_codes_rescaled_by_decoder_norms_are_folded(tmp_path):
    X = activations(50).astype(np.float64)
    config, arrays = foreign()
    wide = {n: v.astype(np.float64) for n, v in arrays.items()}
    norms = np.linalg.norm(wide["W_dec"], axis=1)
    pre = ((X - wide["b_dec"]) @ wide["W_enc"] + wide["b_enc"]) * norms
    best = np.argsort(-pre, axis=1)[:, :3]
    z = np.zeros_like(pre)
    np.put_along_axis(z, best, np.maximum(np.take_along_axis(pre, best, axis=1), 0), axis=1)
    config["rescale_acts_by_decoder_norm"] = True
    model = PolySAE.from_saelens(written(tmp_path / "a", config, arrays))
    np.testing.assert_allclose(model.transform(X), z, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(
        model.inverse_transform(z), z / norms @ wide["W_dec"] + wide["b_dec"], rtol=1e-4, atol=1e-4
    )


def test_files_of_polysae_with_its_unused_decoder_are_read(tmp_path):
    config, arrays = foreign(
        U_shared=(20, 6), U1=(20, 6), U2=(20, 3), U3=(20, 2), C1=(6, 6), C2=(6, 3), C3=(6, 2), lambda2=(), lambda3=()
    )
    config |= {"architecture": "poly_topk", "poly_ranks": [6, 3, 2], "poly_order": 3, "shared_u": True}
    X = activations(50).astype(np.float64)
    z, y = slow_sae(config, {n: v.astype(np.float64) for n, v in arrays.items()}, X)
    model = PolySAE.from_saelens(written(tmp_path / "a", config, arrays))
    np.testing.assert_allclose(model.transform(X), z, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.inverse_transform(z), y, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architecture": "gated"}, "found architecture = 'gated'; expected poly_topk, poly_jumprelu, topk"),
        ({"normalize_activations": "layer_norm"}, "found normalize_activations = 'layer_norm'; expected 'none'"),
        ({"d_in": 7}, r"tensor W_enc: found shape \(6, 20\); expected \(7, 20\)"),
        ({"d_sae": "20"}, "found d_sae = '20'; expected a whole number from 1 on"),
        ({"k": 0}, "found k = 0; expected a whole number from 1 on"),
        ({"k": 21}, "found k must be between 1 and the 20 latents, got 21"),
        ({"architecture": "jumprelu"}, "expected a tensor threshold"),
        ({"architecture": "poly_topk", "poly_order": 3, "poly_ranks": [6, 3]}, r"found poly_ranks = \[6, 3\]"),
        ({"architecture": "poly_topk", "poly_order": 4, "poly_ranks": [6, 3, 2]}, "found poly_order = 4"),
        ({"architecture": "poly_topk", "poly_order": 3, "poly_ranks": [6, 3, 2]}, "expected a tensor U1"),
        ({"architecture": "poly_topk", "poly_order": 3, "poly_ranks": [2, 3, 2]}, "found ranks must not increase"),
    ],
)
def test_foreign_files_that_do_not_fit_are_told(tmp_path, change, said):
    config, arrays = foreign()
    with pytest.raises(WrongContent, match=said):
        PolySAE.from_saelens(written(tmp_path / "a", {**config, **change}, arrays))


def test_what_an_export_cannot_say_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cross_only must be False for cfg.json and sae_weights.safetensors"):
        fit(cross_only=True).export(tmp_path / "a")
    model = fit()
    model.export(tmp_path / "b")
    with pytest.raises(UnreadableFile, match="found something of that name; expected a new name"):
        model.export(tmp_path / "b")
    config, arrays = foreign(threshold=(20,))
    arrays["threshold"] = -np.abs(arrays["threshold"])
    with pytest.raises(WrongContent, match="found a negative threshold; expected none"):
        PolySAE.from_saelens(written(tmp_path / "c", {**config, "architecture": "jumprelu"}, arrays))
    (tmp_path / "c" / "cfg.json").write_text("[]")
    with pytest.raises(WrongContent, match="found list; expected an object"):
        PolySAE.from_saelens(tmp_path / "c")
    with pytest.raises(UnreadableFile):
        PolySAE.from_saelens(tmp_path / "none")
