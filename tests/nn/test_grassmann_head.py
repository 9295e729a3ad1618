import copy
import pickle
import subprocess
import sys

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import nn

from polyspan.linalg import principal_angles, projector
from polyspan.nn import GrassmannHead, GrassmannParameter, RiemannianSGD, replace_head, with_grassmann_head
from polyspan.testing import ModuleCase, check_module


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def features(n=30, d=10, seed=0, dtype=torch.float32):
    return torch.randn(n, d, generator=seeded(seed), dtype=dtype)


@pytest.mark.parametrize("rank", [1, 3, [1, 2, 3, 4]])
@pytest.mark.parametrize("normalize", [True, False])
def test_module_contract(rank, normalize):
    def make(**factory):
        generator = None if factory["device"] == "meta" else seeded()
        return GrassmannHead(10, 4, rank, normalize=normalize, generator=generator, **factory)

    check_module(ModuleCase(make=make, inputs=lambda batch, generator: (torch.randn(batch, 10, generator=generator),)))


def test_logits_are_the_lengths_of_shadows():
    head = GrassmannHead(10, 4, [1, 2, 3, 4], generator=seeded(), dtype=torch.float64)
    x = features(dtype=torch.float64)
    for c, k in enumerate(head.ranks):
        shadow = projector(head.bases[c, :, :k].detach()) @ (x / x.norm(dim=1, keepdim=True)).T
        torch.testing.assert_close(head(x)[:, c].detach(), 25 * shadow.norm(dim=0))
    torch.testing.assert_close(head(-3 * x), head(x))
    torch.testing.assert_close(25 * head.project(x).norm(dim=-1), head(x))
    torch.testing.assert_close(head.residual(x) ** 2 + (head(x) / 25) ** 2, torch.ones_like(head(x)))


def test_residual_is_0_inside_and_1_across():
    head = GrassmannHead(10, 2, 3, generator=seeded(), dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.eye(10, dtype=torch.float64)[:6].reshape(2, 3, 10))
    x = torch.tensor([[1.0, 2, 3, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(head.residual(x), torch.tensor([[0.0, 1.0]], dtype=torch.float64), atol=1e-7, rtol=0)


def test_angles_between_classes_agree_with_linalg_and_are_nan_beyond_the_smaller_rank():
    head = GrassmannHead(10, 3, [1, 3, 3], generator=seeded(), dtype=torch.float64)
    angles, bases = head.principal_angles(), head.bases.detach()
    torch.testing.assert_close(angles[1, 2], principal_angles(bases[1], bases[2]))
    torch.testing.assert_close(angles[0, 1, :1], principal_angles(bases[0, :, :1], bases[1]))
    assert torch.isnan(angles[0, 1, 1:]).all()
    assert not torch.isnan(angles[1:, 1:]).any()


def test_the_gradient_is_true_and_0_where_the_shadow_is_0():
    head = GrassmannHead(6, 3, 2, generator=seeded(), dtype=torch.float64)
    x = features(4, 6, dtype=torch.float64)

    def logits(x, weight):
        return torch.func.functional_call(head, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(logits, (x.requires_grad_(), head.weight.detach().clone().requires_grad_()))
    with torch.no_grad():
        head.weight.copy_(torch.eye(6, dtype=torch.float64).reshape(3, 2, 6))
    one = torch.eye(6, dtype=torch.float64)[:1].requires_grad_()
    head(one)[0, 1:].sum().backward()
    assert not one.grad.any()
    assert not head.weight.grad.any()


def test_pca_start_spans_each_class_and_reads_every_kind_of_rows():
    basis = torch.linalg.qr(torch.randn(3, 10, 2, generator=seeded()))[0]
    y = torch.arange(90) % 3
    x = torch.einsum("ndk,nk->nd", basis[y], torch.randn(90, 2, generator=seeded(1)))
    for rows, labels in ((x, y), (x.numpy(), y.numpy()), (scipy.sparse.csr_array(x.numpy()), y.numpy())):
        head = GrassmannHead(10, 3, 2, init="pca")
        with pytest.raises(RuntimeError, match="needs reset_from_features"):
            head(x)
        head.reset_from_features(rows, labels, block_rows=7)
        torch.testing.assert_close(projector(head.bases.detach()), projector(basis), atol=1e-5, rtol=0)
        assert (head(x).argmax(1) == y).all()


def test_a_class_with_few_features_is_completed_and_told():
    x, y = features(7), torch.tensor([0, 0, 0, 0, 0, 1, 1])
    head = GrassmannHead(10, 3, 4, init="pca")
    with pytest.warns(UserWarning, match=r"classes \[1, 2\] have fewer independent features"):
        head.reset_from_features(x, y, generator=seeded())
    gram = head.weight @ head.weight.mT
    torch.testing.assert_close(gram, torch.eye(4).expand_as(gram), atol=1e-5, rtol=0)
    torch.testing.assert_close(head(x)[5:, 1], torch.full((2,), 25.0))


def test_one_generator_gives_one_head():
    one, two = (GrassmannHead(10, 4, 3, generator=seeded(5)) for _ in range(2))
    assert torch.equal(one.weight, two.weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features_keep_float32_bases(dtype):
    head, x = GrassmannHead(10, 4, 3, generator=seeded()), features()
    low = copy.deepcopy(head).to(dtype)
    assert torch.equal(low.weight, head.weight)
    assert low(x.to(dtype)).dtype == dtype
    torch.testing.assert_close(low(x.to(dtype)).float(), head(x), atol=0.15, rtol=0.01)
    assert GrassmannHead(10, 4, 3, dtype=dtype).weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(head(x), head(x.double()).float(), atol=0.15, rtol=0.02)


def test_the_parameter_keeps_its_class_through_every_way_of_copying_and_loading():
    head = GrassmannHead(10, 4, 3, generator=seeded())
    meta = GrassmannHead(10, 4, 3, device="meta").to_empty(device="cpu")
    meta.load_state_dict(head.state_dict())
    assigned = GrassmannHead(10, 4, 3)
    assigned.load_state_dict(head.state_dict(), assign=True)
    plain = GrassmannHead(10, 4, 3)
    plain.weight = nn.Parameter(head.weight.detach().clone())
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), meta, assigned, plain, head.double().float()):
        assert isinstance(other.weight, GrassmannParameter)
        assert torch.equal(other.weight, head.weight)


def test_a_checkpoint_that_is_not_orthonormal_is_repaired_with_a_warning():
    head = GrassmannHead(10, 4, [2, 3, 3, 3], generator=seeded())
    state = {"weight": head.weight.detach().clone()}
    state["weight"][1, 0] *= 1.5
    state["weight"][0, 2] = 0.1
    fresh = GrassmannHead(10, 4, [2, 3, 3, 3])
    with pytest.warns(UserWarning, match="2 of 4 class bases were not orthonormal"):
        fresh.load_state_dict(state)
    torch.testing.assert_close(fresh.weight, head.weight, atol=1e-6, rtol=0)
    state["weight"][2, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match="weight must be finite"):
        GrassmannHead(10, 4, [2, 3, 3, 3]).load_state_dict(state)


def test_features_of_zeros_are_refused_by_row_or_let_pass():
    x = features(5)
    x[2], x[4, 0] = 0, float("inf")
    with pytest.raises(ValueError, match=r"all-zero or non-finite feature row, got 2, at rows \[2, 4\]"):
        GrassmannHead(10, 4, 3)(x)
    head = GrassmannHead(10, 4, 3, zero_features="ignore")
    x = x[:4].requires_grad_()
    logits = head(x)
    assert not logits[2].any()
    nn.functional.cross_entropy(logits, torch.zeros(4, dtype=torch.long)).backward()
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(head.weight.grad).all()


@pytest.mark.parametrize("method", ["polar", "qr"])
@pytest.mark.parametrize("rank", [3, [1, 2, 3, 4]])
def test_a_parametrised_head_trains_under_a_plain_optimiser(method, rank):
    head = GrassmannHead(10, 4, rank, generator=seeded())
    x, y = features(), torch.arange(30) % 4
    before = head(x).detach()
    head.parametrize_(method)
    torch.testing.assert_close(head(x).detach(), before, atol=1e-4, rtol=0)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    trained = head(x).detach()
    nn.utils.parametrize.remove_parametrizations(head, "weight")
    assert isinstance(head.weight, GrassmannParameter)
    assert not head.repair_()
    torch.testing.assert_close(head(x).detach(), trained)


def test_a_linear_head_gives_the_first_directions():
    linear = nn.Linear(10, 4, bias=False)
    head = GrassmannHead.from_linear(linear, 3, generator=seeded())
    w = linear.weight.detach() - linear.weight.detach().mean(0)
    torch.testing.assert_close(head.weight[:, 0].detach(), w / w.norm(dim=1, keepdim=True), atol=1e-6, rtol=0)
    with pytest.warns(UserWarning, match="bias of the linear head is dropped"):
        GrassmannHead.from_linear(nn.Linear(10, 4), 3)


def test_replacing_the_head_of_a_torch_model():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.ModuleDict({"out": nn.Linear(10, 4)})["out"])
    head = replace_head(model, rank=3, zero_features="ignore", generator=seeded())
    assert model[2] is head
    x, y = features(30, 6), torch.arange(30) % 4
    optimiser = RiemannianSGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(80):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    again = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 4))
    hidden = again[0](x).detach()
    again = replace_head(again, "1", rank=2, features=hidden, labels=y)
    assert (again(hidden).argmax(1) == y).float().mean() > 0.3
    with pytest.raises(ValueError, match=r"name must be an nn\.Linear, got a ReLU at '1'"):
        replace_head(model, "1")
    with pytest.raises(ValueError, match="name must be a submodule, got 'nowhere'; linear layers"):
        replace_head(model, "nowhere")
    with pytest.raises(ValueError, match="features and labels must be given for start='pca'"):
        replace_head(model, "0", start="pca")
    with pytest.raises(ValueError, match=r"must have an nn\.Linear to replace"):
        replace_head(nn.Sequential(nn.ReLU()))


def test_a_hugging_face_model_keeps_its_head_through_save_and_load(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=3
    )
    model = transformers.BertForSequenceClassification(config).eval()
    head = replace_head(model, rank=[1, 2, 4], gamma=10.0, generator=seeded())
    assert model.classifier is head
    tokens = torch.arange(12).reshape(2, 6)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = with_grassmann_head(transformers.BertForSequenceClassification).from_pretrained(tmp_path).eval()
    assert isinstance(loaded.classifier.weight, GrassmannParameter)
    assert loaded.classifier.ranks == (1, 2, 4)
    assert torch.equal(loaded(tokens).logits, expected)
    with pytest.raises(ValueError, match="config must have grassmann_head"):
        with_grassmann_head(transformers.BertForSequenceClassification)(transformers.BertConfig())


DISTRIBUTED = """
import os, sys, torch
from torch import nn
from polyspan.nn import GrassmannHead, RiemannianSGD
torch.distributed.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
model = nn.parallel.DistributedDataParallel(nn.Sequential(GrassmannHead(10, 4, 3)))
before = model.module[0].weight.detach().clone()
optimiser = RiemannianSGD(model.parameters(), lr=0.1)
assert optimiser.param_groups[0]["manifold"] == "grassmann"
nn.functional.cross_entropy(model(torch.randn(30, 10)), torch.arange(30) % 4).backward()
optimiser.step()
assert not torch.equal(model.module[0].weight, before)
assert not model.module[0].repair_()
print("trained", flush=True)
# Taking a gloo group down can wait for ever, for a thread that wants the interpreter's lock.
os._exit(0)
"""


def test_a_distributed_wrapper_keeps_the_head_trainable(tmp_path):
    command = [sys.executable, "-c", DISTRIBUTED, str(tmp_path / "meet")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="rank must be at least 1 and below in_features=8, got 8"):
        GrassmannHead(8, 3, 8)
    with pytest.raises(ValueError, match="rank must be one int or one for each of num_classes=3, got 2"):
        GrassmannHead(8, 3, [1, 2])
    with pytest.warns(UserWarning, match="rank=5 is more than half of in_features=8"):
        GrassmannHead(8, 3, 5)
    for gamma in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=f"gamma must be positive and finite, got {gamma}"):
            GrassmannHead(8, 3, 2, gamma=gamma)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        GrassmannHead(8, 0, 2)
    head = GrassmannHead(8, 3, 2)
    with pytest.raises(ValueError, match=r"X must be \(n, 8\) and y \(n,\), got \(4, 7\) and \(4,\)"):
        head.reset_from_features(np.ones((4, 7)), np.zeros(4, dtype=int))
    with pytest.raises(ValueError, match=r"y must hold integers in \[0, 3\)"):
        head.reset_from_features(np.ones((4, 8)), np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"y must hold integers in \[0, 3\)"):
        head.reset_from_features(np.ones((4, 8)), np.zeros(4))
    with pytest.raises(ValueError, match=r"x must be real \(\*batch, 8\), got torch.float32 of shape \(4, 7\)"):
        head(torch.ones(4, 7))
    X = np.ones((30, 8))
    X[[3, 20], 5] = np.nan, np.inf
    with pytest.raises(ValueError, match=r"X must be finite, got NaN or infinity in 2 rows, such as \[3, 20\]"):
        head.reset_from_features(X, np.arange(30) % 3, block_rows=7)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_whole_numbers_are_features_too(dtype):
    head = GrassmannHead(10, 4, 3, generator=seeded())
    x = (10 * features()).abs().to(dtype)
    for call in (head, head.project, head.residual):
        torch.testing.assert_close(call(x), call(x.float()), rtol=0, atol=0)
        assert call(x).dtype == torch.float32


@pytest.mark.parametrize("size", [1e-40, 1e-25, 1e25, 1e37])
def test_rows_of_any_length_have_the_logits_of_their_direction(size):
    head = GrassmannHead(10, 4, 3, generator=seeded())
    x = features().sign() * torch.arange(1.0, 11.0) / 16
    mixed = x.clone()
    mixed[::2] = (mixed[::2].double() * size).float()
    tolerance = {"atol": 1e-3 if size < 1e-38 else 1e-5, "rtol": 0}
    torch.testing.assert_close(head(mixed), head(x), **tolerance)
    torch.testing.assert_close(head.project(mixed), head.project(x), **tolerance)
    mixed[5] = 0
    with pytest.raises(ValueError, match=r"no all-zero or non-finite feature row, got 1, at rows \[5\]"):
        head(mixed)


def test_second_derivatives_are_finite_where_a_shadow_or_a_feature_is_zero():
    head = GrassmannHead(5, 3, 2, zero_features="ignore", dtype=torch.float64, generator=seeded())
    with torch.no_grad():
        head.weight[0] = torch.eye(5, dtype=torch.float64)[:2]
    across = torch.eye(5, dtype=torch.float64)[4:]
    x = torch.cat([across, torch.zeros(1, 5, dtype=torch.float64), features(2, 5, dtype=torch.float64)])
    assert head(x)[0, 0] == 0

    def loss(x):
        return head(x).sin().sum()

    both = torch.autograd.functional.hessian(loss, x)
    assert torch.isfinite(both).all()
    torch.testing.assert_close(torch.func.hessian(loss)(x), both)
    torch.testing.assert_close(both[2:, :, 2:], torch.autograd.functional.hessian(loss, x[2:]))
    leaf = x.clone().requires_grad_()
    slope = torch.autograd.grad(loss(leaf), leaf, create_graph=True)[0]
    slope.square().sum().backward()
    assert torch.isfinite(head.weight.grad).all()


def test_a_state_in_half_precision_that_is_assigned_becomes_float32():
    head = GrassmannHead(8, 3, 2, generator=seeded())
    state = {"weight": head.weight.detach().half()}
    head.load_state_dict(state, assign=True)
    assert head.weight.dtype == torch.float32
    assert type(head.weight) is GrassmannParameter
    torch.testing.assert_close(head.weight @ head.weight.mT, torch.eye(2).expand(3, 2, 2), atol=2e-3, rtol=0)
    RiemannianSGD(head.parameters())
