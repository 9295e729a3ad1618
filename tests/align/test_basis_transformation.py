import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from polyspan.align import CompatibleClassifier, class_prototypes, evaluate_compatibility
from polyspan.align.basis_transformation import (
    BasisTransformationClassifier,
    BasisTransformationHead,
    BasisTransformationLoss,
    BasisTransformationOutput,
)
from polyspan.errors import WrongContent
from polyspan.run import torch_generator
from polyspan.testing import ModuleCase, check_module

SMALL = {
    "hidden": (24,),
    "embedding_dim": 6,
    "extra_dim": 4,
    "batch_size": 32,
    "random_state": 0,
    "device": "cpu",
    "learning_rate": 1e-2,
}


def small(kind=BasisTransformationClassifier, **options):
    return kind(**{**SMALL, "max_iter": 15, **options})


def blobs(seed=0, n=240, C=4, d=8):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % C
    return (3 * rng.normal(size=(C, d))[y] + rng.normal(size=(n, d))).astype(np.float32), y


def unit(X):
    return X / np.linalg.norm(X, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def chain():
    """A first model of three classes, an independent one of four, and an update that follows it."""
    X, y = blobs()
    first = small(CompatibleClassifier).fit(X[y < 3], y[y < 3])
    alone = small(CompatibleClassifier, embedding_dim=5).fit(X, y)
    return X, y, first, alone, small().fit(X, y, old=first, new=alone)


@parametrize_with_checks([BasisTransformationClassifier(hidden=(32,), max_iter=12, random_state=0, device="cpu")])
def test_scikit_learn_contract(estimator, check):
    check(estimator)


class Joined(nn.Module):
    """All outputs of a head side by side, so that every weight has a part in what is checked."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return torch.cat(self.head(x), dim=-1)


@pytest.mark.parametrize("how", ["cayley", "matrix-exp", "householder", "retraction"])
def test_the_head_keeps_the_promises_of_a_module(how):
    def inputs(batch, generator):
        return (torch.randn(batch, 9, generator=generator),)

    made = ModuleCase(lambda **kw: Joined(BasisTransformationHead(9, 5, 6, 4, 3, orthogonal_map=how, **kw)), inputs)
    check_module(made)


def head(**options):
    made = BasisTransformationHead(9, 5, 6, 4, 3, generator=torch_generator(0), **options).double()
    with torch.no_grad():
        for basis in (made.new_basis, made.old_basis):
            basis.raw.normal_(generator=torch_generator(1))
            basis.base.copy_(torch.linalg.qr(basis.base)[0])  # it was drawn in single precision
    return made


def test_the_head_is_the_papers_formula():
    made = head(scale=1.7)
    z = torch.randn(7, 9, generator=torch_generator(2), dtype=torch.float64)
    weights = {name: value.detach().numpy() for name, value in made.named_parameters()}
    P, Q = (basis.matrix().detach().numpy() for basis in (made.new_basis, made.old_basis))
    with torch.no_grad():
        out = made(z)
    for i, row in enumerate(z.numpy()):
        both = weights["projection.weight"] @ row + weights["projection.bias"]
        v = both[:6] / np.linalg.norm(both[:6])
        branch = weights["old_branch.weight"] @ np.maximum(both, 0) + weights["old_branch.bias"]
        joined = np.concatenate([branch[:3] / np.linalg.norm(branch[:3]), P @ (1.7 * v)])
        whole = np.concatenate([Q @ joined[:5], joined[5:]])
        np.testing.assert_allclose(out.compatible[i], whole[:5], atol=1e-12)
        np.testing.assert_allclose(out.embedding[i], whole / np.linalg.norm(whole), atol=1e-12)
        np.testing.assert_allclose(out.feature[i], v, atol=1e-12)
        np.testing.assert_allclose(out.logits[i], weights["classifier.weight"] @ v, atol=1e-12)


def test_nothing_of_the_feature_is_lost_and_the_length_is_constant():
    made = head(scale=2.0)
    with torch.no_grad():
        out = made(torch.randn(20, 9, generator=torch_generator(3), dtype=torch.float64))
        whole = np.sqrt(1 + 2.0**2) * out.embedding
        joined = torch.cat([whole[:, :5] @ made.old_basis.matrix(), whole[:, 5:]], dim=1)
        back = joined[:, 3:] @ made.new_basis.matrix() / 2.0
    torch.testing.assert_close(back, out.feature)
    torch.testing.assert_close(joined[:, :3].norm(dim=1), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(whole[:, :5], out.compatible)


def test_the_loss_agrees_with_loops_over_items():
    rng = np.random.default_rng(4)
    logits, compatible, old, P = (rng.normal(size=shape) for shape in ((6, 4), (6, 5), (6, 5), (4, 5)))
    feature, new, y = unit(rng.normal(size=(6, 3))), rng.normal(size=(6, 3)), [0, 1, 2, 3, 0, 1]

    def cross(scores, label):
        return np.log(np.sum(np.exp(scores))) - scores[label]

    expected = {"ce": 0.0, "new": 0.0, "bct": 0.0, "cos": 0.0}
    for i, label in enumerate(y):
        u = unit(compatible[i])
        expected["ce"] += cross(logits[i], label) / 6
        expected["new"] += (1 - feature[i] @ unit(new[i])) / 6
        expected["bct"] += cross([u @ p for p in P], label) / 6
        expected["cos"] += (1 - u @ unit(old[i])) / 6
    total = expected["ce"] + expected["new"] + 10 * expected["bct"] + 5 * expected["cos"]
    out = BasisTransformationOutput(*map(torch.tensor, (logits, compatible, feature, feature)))
    found = BasisTransformationLoss(P, dtype=torch.float64)(out, torch.tensor(y), torch.tensor(old), torch.tensor(new))
    each = BasisTransformationLoss(P, dtype=torch.float64, reduction="none")(
        out, torch.tensor(y), torch.tensor(old), torch.tensor(new)
    )
    assert float(each["total"].mean()) == pytest.approx(total, rel=1e-10)
    assert each["cos"].shape == (6,)
    assert {name: float(term) for name, term in found.items()} == pytest.approx(expected | {"total": total}, rel=1e-10)


def test_an_update_is_compatible_where_an_independent_model_is_not(chain):
    X, y, first, alone, second = chain
    old = first.transform(X)
    with_update = evaluate_compatibility(second.transform(X, width=6), old, y, y, True, reference=old)
    without = evaluate_compatibility(np.pad(alone.transform(X), ((0, 0), (0, 1))), old, y, y, True, reference=old)
    assert with_update.compatible
    assert with_update.scores.map > without.scores.map + 0.3
    assert second.transform(X).shape == (240, 5 + 4)
    np.testing.assert_allclose(np.linalg.norm(second.transform(X), axis=1), 1, atol=1e-6)
    free = small(w_new=0.0).fit(X, y, old=first, new=alone)  # nothing ties its feature's axes to the new model's
    assert second.history_[-1]["new"] < 0.5 * free.history_[-1]["new"]
    assert second.score(X, y) > 0.95


def test_a_new_model_is_trained_first_where_none_is_given(chain):
    X, y, first, _, _ = chain
    alone = small(max_iter=3, embedding_dim=6).fit(X, y)
    given, made = (small(max_iter=3).fit(X, y, old=first, new=new) for new in (alone.transform, None))
    np.testing.assert_array_equal(given.transform(X), made.transform(X))
    assert made.new_dim_ == 6
    assert alone.new_dim_ == 0


def test_without_an_old_model_it_is_the_plain_classifier():
    X, y = blobs()
    mine = small(max_iter=2, w_ce=5.0).fit(X, y)
    plain = small(CompatibleClassifier, max_iter=2, label_smoothing=0.0).fit(X, y)
    np.testing.assert_array_equal(mine.transform(X), plain.transform(X))


def test_either_kind_may_follow_the_other_and_comes_back_from_its_file(chain, tmp_path):
    X, y, _, _, second = chain
    path = second.save(tmp_path / "second.safetensors")
    back = BasisTransformationClassifier.load(path)
    np.testing.assert_array_equal(back.transform(X), second.transform(X))
    np.testing.assert_array_equal(back.predict(X), second.predict(X))
    either = CompatibleClassifier.load(path)
    assert type(either) is BasisTransformationClassifier
    np.testing.assert_array_equal(either.transform(X), second.transform(X))
    third = small(CompatibleClassifier, max_iter=1).fit(X, y, old=back)
    with pytest.raises(WrongContent, match="a fitted BasisTransformationClassifier"):
        BasisTransformationClassifier.load(third.save(tmp_path / "third.safetensors"))
    assert third.old_dim_ == 9
    fourth = small(max_iter=1).fit(X, y, old=third)
    assert (fourth.old_dim_, fourth.new_dim_) == (13, 13)


class Interrupted(nn.Module):
    """A backbone that is interrupted at one of its calls, once."""

    def __init__(self, at):
        super().__init__()
        self.linear, self.calls, self.at = nn.Linear(8, 12), 0, at

    def forward(self, x):
        if self.training:
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
        return self.linear(x)

    def extra_repr(self):
        return ""


def test_an_interrupted_fit_goes_on_and_ends_where_an_uninterrupted_one_does(chain, tmp_path):
    X, y, first, alone, _ = chain
    path = tmp_path / "state.safetensors"
    backbone = Interrupted(at=20)
    options = {"backbone": backbone, "checkpoint": path, "max_iter": 5}
    with pytest.raises(KeyboardInterrupt):
        small(**options).fit(X, y, old=first, new=alone)
    assert path.exists()
    backbone.at = 0
    with pytest.raises(ValueError, match="checkpoint must be of this data and these settings"):
        small(**options).fit(X, y, old=first, new=alone.transform(X)[::-1])
    resumed = small(**options).fit(X, y, old=first, new=alone)
    whole = small(**{**options, "checkpoint": None}).fit(X, y, old=first, new=alone)
    np.testing.assert_array_equal(resumed.transform(X), whole.transform(X))
    with pytest.raises(ValueError, match="random_state must be a whole number where there is a checkpoint"):
        small(**{**options, "random_state": None}).fit(X, y, old=first)


OLD = unit(np.random.default_rng(0).normal(size=(240, 5)))


@pytest.mark.parametrize(
    ("options", "old", "new", "words"),
    [
        ({}, None, OLD, "new must come with old, got old=None"),
        ({}, OLD, OLD[:7], r"new must have one vector a row of X \(240\), got 7"),
        ({}, OLD, 0 * OLD, "new must have no all-zero row, got one at row 0"),
        ({"extra_dim": 6}, OLD, None, "extra_dim must be between old_dim - new_dim = 0 and old_dim = 5, .* got 6"),
        ({"extra_dim": 2}, OLD, OLD[:, :2], "between old_dim - new_dim = 3 and old_dim = 5, .* got 2"),
        ({"scale": 0}, OLD, None, "scale must be positive, got 0"),
        ({"w_new": -1}, OLD, OLD, "w_new must be at least 0 and finite, got -1"),
        ({"orthogonal_map": "qr"}, OLD, OLD, "orthogonal_map must be one of .* got 'qr'"),
    ],
)
def test_bad_input_to_the_classifier_is_named(options, old, new, words):
    X, y = blobs()
    with pytest.raises(ValueError, match=words):
        small(**{"max_iter": 1, **options}).fit(X, y, old=old, new=new)


def test_vectors_that_do_not_fit_the_loss_are_named():
    P = class_prototypes(OLD, np.arange(240) % 4)
    loss = BasisTransformationLoss(P)
    out = BasisTransformationOutput(*(torch.randn(2, d) for d in (4, 5, 3, 7)))
    for old, new, words in (
        (torch.randn(2, 4), torch.randn(2, 3), r"old must have shape \(2, 5\), got \(2, 4\)"),
        (torch.randn(2, 5), torch.randn(2, 4), r"new must have shape \(2, 3\), got \(2, 4\)"),
    ):
        with pytest.raises(ValueError, match=words):
            loss(out, torch.tensor([0, 1]), old, new)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'none', got 'sum'"):
        BasisTransformationLoss(P, reduction="sum")
    with pytest.raises(ValueError, match="prototypes must be finite"):
        BasisTransformationLoss(P * np.nan)
    with pytest.raises(ValueError, match="label_smoothing must be at least 0 and below 1, got 1"):
        BasisTransformationLoss(P, label_smoothing=1)
