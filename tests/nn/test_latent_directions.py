import copy
import math
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from polyspan.errors import CorruptFile, WrongContent
from polyspan.io import write_members
from polyspan.nn import (
    Directions,
    HouseholderProjector,
    LowRankOrthogonal,
    StyleAutoencoder,
    StyleGenerator,
    direction_strengths,
    discover_directions,
    interpretable_path_length,
    load_directions,
    merge_projections,
    perceptual_path_length,
    project_model,
    project_weights,
    save_directions,
    train_autoencoder,
    traverse,
)
from polyspan.nn.projector_surgery import projections
from polyspan.nn.traversal_plots import plot_traversals

LAYER = "layers.1.affine"


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def generator(seed=0, dtype=torch.float64):
    return StyleGenerator((5, 4), 6, 12, 3, generator=gen(seed), dtype=dtype)


def latents(n=20, d=6, seed=1):
    return torch.randn(n, d, generator=gen(seed), dtype=torch.float64)


class Equalised(nn.Module):
    """A linear layer of another class, with a factor of its own."""

    def __init__(self, d, p):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(p, d, generator=gen(), dtype=torch.float64))

    def forward(self, x):
        return x @ self.weight.T / 2


def holding(module):
    return nn.ModuleDict({"affine": module})


def test_surgery_replaces_the_layers_of_that_name_and_reports_what_the_rank_keeps():
    model = generator()
    before = {name: m.weight.detach().clone() for name, m in model.named_modules() if name.endswith("affine")}
    report = project_model(model, rank=3)
    assert [layer.name for layer in report.layers] == [f"layers.{i}.affine" for i in range(3)]
    for layer in report.layers:
        s = torch.linalg.svdvals(before[layer.name])
        made = model.get_submodule(layer.name)
        assert isinstance(made, HouseholderProjector)
        assert layer.shape == (12, 6)
        assert layer.kept_share == pytest.approx(float(s[:3].square().sum() / s.square().sum()))
        assert layer.spread == pytest.approx(float(s[0] / s[2]))
        assert layer.gain == pytest.approx(float(s[:3].mean())) == pytest.approx(float(made.gain))
    assert max(report.drift().values()) < 1e-7


def test_drift_is_the_largest_angle_that_the_directions_have_turned():
    model = generator()
    report = project_model(model, "layers.0.affine", rank=2)
    old, other = report.layers[0].start, latents(1)[0]
    other = other - old.mT @ (old @ other)
    turned = torch.stack([old[0], old[1] * np.cos(0.3) + other / other.norm() * np.sin(0.3)])
    model.layers[0].affine.set_weight_(model.layers[0].affine.responses.detach().mT @ turned)
    assert report.drift()["layers.0.affine"] == pytest.approx(0.3)


def test_at_full_rank_with_equal_singular_values_surgery_changes_nothing():
    model = generator()
    with torch.no_grad():
        for layer in model.layers:
            layer.affine.weight.copy_(torch.linalg.qr(layer.affine.weight)[0] * 0.7)
    expected = model(latents()).detach()
    project_model(model, rank=6)
    torch.testing.assert_close(model(latents()).detach(), expected, atol=1e-10, rtol=0)


def test_undo_puts_the_old_layers_back_and_merging_makes_plain_ones_of_the_same_effect():
    model = generator()
    model.layers[2].affine = Equalised(6, 12)
    expected, names = model(latents()).detach(), sorted(model.state_dict())
    report = project_model(model, rank=3)
    changed = model(latents()).detach()
    assert (changed - expected).abs().max() > 1e-3
    merged = merge_projections(copy.deepcopy(model))
    torch.testing.assert_close(merged(latents()).detach(), changed, atol=1e-10, rtol=0)
    assert sorted(merged.state_dict()) == names
    assert projections(merged) == {}
    report.undo()
    report.undo()
    assert torch.equal(model(latents()).detach(), expected)
    assert sorted(model.state_dict()) == names
    with pytest.raises(ValueError, match=r"but not layers\.0\.affine, layers\.1\.affine, layers\.2\.affine any more"):
        report.drift()


def test_a_report_outlives_the_merging_of_its_model():
    model = generator()
    model.layers[2].affine = Equalised(6, 12)
    expected = model(latents()).detach()
    report = project_model(model, rank=3)
    merge_projections(model)
    with pytest.raises(ValueError, match=r"still is projected, but not layers\.0\.affine, "):
        report.drift()
    report.undo()
    assert torch.equal(model(latents()).detach(), expected)


def test_a_layer_of_another_class_is_parametrised_and_keeps_its_own_factor():
    model = holding(Equalised(6, 9))
    s = torch.linalg.svdvals(model["affine"].weight.detach())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = project_model(model, "affine", rank=4, gain="learned")
    assert isinstance(model["affine"].parametrizations.weight[0], LowRankOrthogonal)
    found = projections(model)["affine"]
    assert report.layers[0].gain == pytest.approx(float(found[1].detach())) == pytest.approx(float(s[:4].mean()))
    V = found[0].detach()
    moved = torch.stack([model["affine"](v) for v in V]).detach()
    torch.testing.assert_close(moved.norm(dim=1), (s[:4].mean() / 2).expand(4))
    torch.testing.assert_close(V @ V.T, torch.eye(4, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_convolution_is_projected_only_where_its_kernel_may_be_flattened():
    model = holding(nn.Conv2d(3, 6, 2))
    with pytest.raises(ValueError, match=r"affine: weight must be a matrix of floats, got shape \(6, 3, 2, 2\)"):
        project_model(model, rank=2)
    assert not parametrize.is_parametrized(model["affine"])
    project_model(model, rank=2, flatten=True)
    values = torch.linalg.svdvals(model["affine"].weight.detach().flatten(1))
    assert float(values[1] / values[0]) == pytest.approx(1, abs=1e-5)
    assert float(values[2]) < 1e-5


def test_weights_of_a_checkpoint_are_projected_as_those_of_its_model():
    model = generator()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    made, directions = project_weights(state, "*.affine.weight", 3)
    project_model(model, rank=3)
    for i in range(3):
        name = f"layers.{i}.affine"
        torch.testing.assert_close(made[f"{name}.weight"], model.get_submodule(name).weight.detach())
        torch.testing.assert_close(directions[f"{name}.weight"], model.get_submodule(name).directions.detach())
    assert all(torch.equal(state[name], made[name]) for name in state if "affine.weight" not in name)
    assert torch.equal(state["layers.0.affine.weight"], generator().layers[0].affine.weight)


def test_where_a_layer_is_refused_the_model_stays_as_it_was():
    model = generator()
    with torch.no_grad():
        model.layers[2].affine.weight[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"layers\.2\.affine: weight must be finite"):
        project_model(model, rank=2)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) or "2.affine" in name for name in before)


def test_bad_patterns_and_layers_are_named():
    model = generator()
    with pytest.raises(ValueError, match=r"got '\*\.modulation'; candidates are layers\.0\.affine, layers\.0\.mix"):
        project_model(model, "*.modulation")
    with pytest.raises(ValueError, match=r"layers\.0\.norm: must have a weight, got LayerNorm"):
        project_model(model, "layers.0.norm", 1)
    with pytest.raises(ValueError, match=r"layers\.0\.affine: rank must be between 1 and 6"):
        project_model(model, rank=7)
    with pytest.raises(ValueError, match=r"got 'nothing'; candidates are .*layers\.0\.affine\.weight"):
        project_weights(model.state_dict(), "nothing")
    with pytest.raises(ValueError, match=r"constant: weight must be a matrix of floats"):
        project_weights(model.state_dict(), "constant")
    with pytest.raises(ValueError, match=r"q: weight must be a matrix of floats, got .* torch\.int8"):
        project_weights({"q": torch.ones(4, 4, dtype=torch.int8)}, "q", 2)
    project_model(model, rank=2)
    with pytest.raises(ValueError, match=r"layers\.0\.affine: its weight must be free, but it is parametrised already"):
        project_model(model, rank=2)


def test_a_weight_that_two_layers_share_is_refused():
    model = nn.ModuleDict({"affine": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    model["other"].weight = model["affine"].weight
    with pytest.raises(ValueError, match="affine: its weight must be its own, but other use it, too"):
        project_model(model, rank=2)


def test_all_methods_give_orthonormal_directions_of_their_own_meaning():
    model = generator()
    free = {
        m: discover_directions(model, LAYER, m, latents=latents())[LAYER] for m in ("sefa", "ganspace-pca", "jacobian")
    }
    _, s, Vh = torch.linalg.svd(model.layers[1].affine.weight.detach(), full_matrices=False)
    torch.testing.assert_close(free["sefa"].values, s)
    torch.testing.assert_close((free["sefa"].vectors * Vh).sum(dim=1).abs(), torch.ones(6, dtype=torch.float64))
    np.testing.assert_allclose(
        free["ganspace-pca"].values[0] ** 2, np.linalg.eigvalsh(np.cov(latents().numpy().T))[-1], rtol=1e-10
    )
    project_model(model, rank=3)
    for method in ("householder", "jacobian"):
        free[f"{method}, projected"] = discover_directions(model, method=method, latents=latents())[LAYER]
    for name, found in free.items():
        gram = found.vectors.detach() @ found.vectors.detach().T
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-9, rtol=0, msg=name)
        assert found.values.shape == (len(gram),)
        assert (found.values.diff() <= 1e-12).all(), name


def test_directions_by_the_jacobian_stay_in_the_projectors_space_and_change_pictures_independently():
    model = generator()
    project_model(model, rank=3)
    plain = discover_directions(model)[LAYER].vectors.detach()
    found = discover_directions(model, LAYER, "jacobian", latents=latents())[LAYER]
    torch.testing.assert_close(found.vectors @ plain.T @ plain, found.vectors, atol=1e-10, rtol=0)
    h = 1e-4
    changes = torch.stack(
        [(traverse(model, latents(), v, [h], LAYER) - traverse(model, latents(), v, [-h], LAYER)).flatten() / (2 * h)
         for v in found.vectors]
    )  # fmt: skip
    gram = changes @ changes.T / len(latents())
    torch.testing.assert_close(gram, found.values.square().diag(), atol=1e-6, rtol=1e-6)


def test_only_the_directions_of_a_projector_change_pictures():
    free, model = generator(), generator()
    project_model(model, rank=3)
    for made, moving in ((free, 6), (model, 3)):
        V = discover_directions(made, LAYER, "sefa")[LAYER].vectors
        everything = Directions(torch.linalg.qr(V.mT)[0].mT, torch.ones(6))
        if made is model:
            inside = discover_directions(model)[LAYER].vectors.detach()
            everything = Directions(torch.linalg.svd(inside)[2], torch.ones(6))
        strengths = direction_strengths(made, LAYER, everything, latents())
        assert int((strengths > 1e-10).sum()) == moving


def test_traversal_moves_the_latent_of_one_layer_only():
    model, w, v = generator(), latents(3), latents(1)[0]
    made = traverse(model, w, v, [-1.0, 0.0, 2.0], LAYER)
    assert torch.equal(made[1], model(w))
    h = model.constant
    for i, layer in enumerate(model.layers):
        h = layer.mix(h * layer.affine(w + 2 * v if i == 1 else w))
        h = nn.functional.leaky_relu(layer.norm(h), 0.2)
    torch.testing.assert_close(made[2], model.output(h).unflatten(-1, (5, 4)).detach())
    everywhere = traverse(model, w, v, [2.0])
    assert torch.equal(everywhere[0], model(w + 2 * v))
    assert not model._forward_pre_hooks
    assert not model.layers[1].affine._forward_pre_hooks


class Straight(nn.Module):
    """Pictures that are the latents, scaled: path lengths are known."""

    def __init__(self, scale):
        super().__init__()
        self.affine = nn.Linear(4, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.affine.weight.copy_(scale * torch.eye(4))

    def forward(self, w):
        return self.affine(w)


def test_path_lengths_of_a_linear_generator_are_known():
    model, w = Straight(3.0), torch.cat([torch.zeros(30, 4), torch.ones(30, 4)]).double()
    along = {"affine": Directions(torch.eye(4, dtype=torch.float64), torch.ones(4))}
    assert interpretable_path_length(model, along, w, rng=gen()) == pytest.approx(9 / 4)
    assert interpretable_path_length(model, along, w, rng=gen(), eps=1.0) == pytest.approx(9 / 4)
    pairs = torch.stack([torch.zeros(4), torch.ones(4)]).double()
    assert perceptual_path_length(model, pairs, rng=gen()) == pytest.approx(9)
    absolute = perceptual_path_length(model, pairs, rng=gen(), distance=lambda a, b: (a - b).abs().sum(1), eps=0.5)
    assert absolute == pytest.approx(12 * 0.5 / 0.25)
    ours = [perceptual_path_length(generator(), latents(), rng=gen(seed)) for seed in (0, 0, 1)]
    assert ours[0] == ours[1] != ours[2]


def test_bad_input_of_walks_and_searches_is_named():
    model, w = generator(), latents()
    for call, words in (
        (lambda: discover_directions(model, LAYER, "closed"), r"method must be one of .*, got 'closed'"),
        (lambda: discover_directions(model), "layers must be named where the model has no low-rank orthogonal layer"),
        (lambda: discover_directions(model, "layers.9"), r"layers must name modules of the model, got 'layers\.9'"),
        (lambda: discover_directions(model, LAYER), "layers must be low-rank orthogonal for 'householder'"),
        (lambda: discover_directions(model, "layers.0", "sefa"), "must have a matrix for a weight for 'sefa'"),
        (lambda: discover_directions(model, LAYER, "jacobian"), r"latents must hold a sample .*, got None"),
        (lambda: discover_directions(model, LAYER, "ganspace-pca", latents=w[:1]), r"got \(1, 6\)"),
        (
            lambda: discover_directions(model, LAYER, "sefa", num_directions=7),
            "num_directions must be between 1 and 6, got 7",
        ),
        (lambda: traverse(model, w, w[0], [1.0], "layers.9"), r"layer must name a module of the generator"),
        (lambda: traverse(model, w, w[0, :5], [1.0]), "direction must have the size 6 of the latents, got 5"),
        (lambda: traverse(model, w, w[0], []), "amounts must hold at least one number"),
        (lambda: perceptual_path_length(model, w[:1], rng=gen()), "latents must be a sample of at least two, got 1"),
        (lambda: perceptual_path_length(model, w, rng=gen(), eps=0.0), "eps must be above 0 and finite"),
        (lambda: interpretable_path_length(model, {}, w, rng=gen()), "directions must hold at least one layer"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    model.unused = nn.Linear(6, 2)
    with pytest.raises(ValueError, match="layer must run when the generator does, got 'unused'"):
        traverse(model, w, w[0], [1.0], "unused")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_directions_come_back_from_their_file(tmp_path, suffix):
    model = generator()
    project_model(model, rank=3)
    found = discover_directions(model)
    back = load_directions(save_directions(found, tmp_path / f"directions{suffix}"))
    assert list(back) == list(found)
    for name in found:
        assert torch.equal(back[name].vectors, found[name].vectors)
        assert torch.equal(back[name].values, found[name].values)


def test_a_file_of_something_else_is_refused(tmp_path):
    other = write_members(tmp_path / "other.npz", {"x": np.ones(3)})
    with pytest.raises(WrongContent, match="<layer>/vectors and <layer>/values"):
        load_directions(other)
    torn = tmp_path / "torn.npz"
    torn.write_bytes(other.read_bytes()[:40])
    with pytest.raises(CorruptFile):
        load_directions(torn)


@pytest.mark.parametrize("shape", [(5, 4), (1, 5, 4), (3, 5, 4)])
def test_a_picture_of_traversals_is_written_with_equal_bytes(tmp_path, shape):
    model = StyleGenerator(shape, 6, 12)
    directions = Directions(torch.eye(6)[:2], torch.ones(2))
    paths = [
        plot_traversals(model, torch.zeros(6), directions, tmp_path / f"{i}.svg", layer=LAYER, amounts=(-1, 0, 1))
        for i in range(2)
    ]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert paths[0].read_text().count("<image") == 2 * 4


def test_pictures_of_other_kinds_and_shapes_are_refused(tmp_path):
    directions = Directions(torch.eye(6)[:2], torch.ones(2))
    with pytest.raises(ValueError, match=r"path must end in \.svg, \.png or \.pdf"):
        plot_traversals(StyleGenerator((5, 4), 6, 12), torch.zeros(6), directions, tmp_path / "x.gif")
    with pytest.raises(ValueError, match=r"generator must make pictures .*, got \(7,\)"):
        plot_traversals(StyleGenerator((7,), 6, 12), torch.zeros(6), directions, tmp_path / "x.png")


def test_training_lowers_the_error_repeats_and_leaves_global_chance_alone():
    X = torch.rand(40, 3, generator=gen()) @ torch.rand(3, 12, generator=gen(1))
    images = X.reshape(40, 4, 3)
    model = StyleAutoencoder((4, 3), 3, 16, generator=gen(3))
    other, start = copy.deepcopy(model), float((model(images) - images).square().mean().detach())
    state = torch.random.get_rng_state()
    for made in (model, other):
        train_autoencoder(made, images, 60, generator=gen(2), learning_rate=5e-3)
    assert torch.equal(torch.random.get_rng_state(), state)
    end = float((model(images) - images).square().mean().detach())
    assert end < 0.3 * start
    assert torch.equal(model(images), other(images))


def test_bad_training_is_refused():
    model = StyleAutoencoder((4, 3), 3, 16)
    for images, steps, words in (
        (torch.ones(0, 4, 3), 1, "images must hold at least one picture, got none"),
        (torch.ones(5, 3, 4), 1, r"images must be of shape \(n, \*\(4, 3\)\), got \(5, 3, 4\)"),
        (torch.ones(5, 4, 3), -1, "steps must be at least 0, got -1"),
        (torch.full((5, 4, 3), torch.nan), 2, "must give a finite loss, got nan after 2 steps"),
    ):
        with pytest.raises(ValueError, match=words):
            train_autoencoder(model, images, steps, generator=gen())
    with pytest.raises(ValueError, match="latent_dim must be at least 1, got 0"):
        StyleGenerator((4, 3), 0)


class Lively(nn.Module):
    """A generator that is random, and counts, in training mode."""

    def __init__(self):
        super().__init__()
        self.affine, self.norm = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(8, 9)
        with torch.no_grad():
            for i, parameter in enumerate(self.parameters()):
                parameter.normal_(generator=gen(i))

    def forward(self, w):
        return self.out(self.drop(self.norm(self.affine(w)))).unflatten(-1, (3, 3))


def test_a_generator_in_training_is_looked_at_as_in_evaluation_and_left_as_it_was():
    generator = Lively()
    project_model(generator, "affine", 3)
    generator.train()
    generator.drop.eval()
    still = copy.deepcopy(generator).eval()
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    latents = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    direction = torch.eye(6)[0]

    def seen(model):
        found = discover_directions(model, method="jacobian", latents=latents)
        yield found["affine"].vectors
        yield traverse(model, latents, direction, [0.0, 1.0], "affine")
        yield direction_strengths(model, "affine", found["affine"], latents)
        for measure in (perceptual_path_length, partial(interpretable_path_length, directions=found)):
            yield torch.tensor(measure(model, latents=latents, rng=torch.Generator().manual_seed(2)))

    for mine, expected in zip(seen(generator), seen(still), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    assert [module.training for module in generator.modules()] == [m is not generator.drop for m in generator.modules()]
    for name, value in generator.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_latents_that_are_not_finite_and_gains_that_are_none_are_refused():
    model = Lively().eval()
    project_model(model, "affine", 3)
    latents = torch.zeros(4, 6)
    latents[2, 1] = float("nan")
    found = discover_directions(model)
    for call in (
        lambda: discover_directions(model, "affine", "jacobian", latents=latents),
        lambda: discover_directions(model, "affine", "ganspace-pca", latents=latents),
        lambda: perceptual_path_length(model, latents, rng=torch.Generator()),
        lambda: interpretable_path_length(model, found, latents, rng=torch.Generator()),
    ):
        with pytest.raises(ValueError, match="latents must be finite, got NaN or infinity"):
            call()
    state = {"affine.weight": torch.randn(8, 6, generator=torch.Generator().manual_seed(0))}
    for gain in (-1.0, 0.0, math.inf, "median"):
        with pytest.raises(ValueError, match="gain must be 'mean', 'learned' or a finite number above 0"):
            project_weights(state, "*", 2, gain=gain)
    with pytest.raises(ValueError, match=r"affine\.weight: weight must be dequantised first, got torch\.float8"):
        project_weights({"affine.weight": torch.ones(8, 6).to(torch.float8_e4m3fn)}, "*", 2)
