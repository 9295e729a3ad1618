import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from polyspan.linalg import grassmann_exp, grassmann_tangent, subspace_distance
from polyspan.nn import (
    GrassmannHead,
    GrassmannParameter,
    RiemannianAdam,
    RiemannianSGD,
    grassmann_groups,
    grassmann_optim,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(rank=3, d=12, n_classes=4, dtype=torch.float64, seed=0):
    head = GrassmannHead(d, n_classes, rank, generator=seeded(seed), dtype=dtype)
    x = torch.randn(40, d, generator=seeded(seed + 1), dtype=dtype)
    return head, x, torch.randint(n_classes, (40,), generator=seeded(seed + 2))


def train(head, optimiser, x, y, steps):
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


def literal_official_step(S, M, E, eta, mu, first):
    """The published step for one class, by the thin SVD of the projected momentum: S, M, E are (d, k) arrays."""
    M = E.copy() if first else mu * M + E
    U, s, Vh = np.linalg.svd(M - S @ (S.T @ M), full_matrices=False)
    return (S @ Vh.T * np.cos(-eta * s) + U * np.sin(-eta * s)) @ Vh, M


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_transport_it_is_the_published_step(dtype):
    head, x, y = problem(dtype=dtype)
    optimiser = RiemannianSGD(
        head.parameters(), lr=0.02, momentum=0.9, lr_factor=1.5, transport=False, reorthonormalise_every=0
    )
    bases = [S.T.numpy().astype(np.float64) for S in head.weight.detach().clone()]
    momenta = [np.zeros_like(S) for S in bases]
    for step in range(6):
        optimiser.zero_grad()
        nn.functional.cross_entropy(head(x), y).backward()
        gradients = [E.T.numpy().astype(np.float64) for E in head.weight.grad]
        optimiser.step()
        for c in range(4):
            bases[c], momenta[c] = literal_official_step(bases[c], momenta[c], gradients[c], 0.03, 0.9, step == 0)
    tol = 1e-12 if dtype == torch.float64 else 2e-5
    np.testing.assert_allclose(head.bases.detach().numpy(), np.stack(bases), atol=tol)


def test_one_step_follows_the_geodesic_of_the_projected_gradient():
    head, x, y = problem()
    before = head.bases.detach().clone()
    nn.functional.cross_entropy(head(x), y).backward()
    G = grassmann_tangent(before, head.weight.grad.mT)
    RiemannianSGD(head.parameters(), lr=0.01, reorthonormalise_every=0).step()
    torch.testing.assert_close(head.bases.detach(), grassmann_exp(before, -0.01 * G), atol=1e-13, rtol=0)
    torch.testing.assert_close(subspace_distance(before, head.bases.detach()), 0.01 * G.norm(dim=(1, 2)))


@pytest.mark.parametrize("nesterov", [False, True])
def test_stored_momentum_stays_tangent_to_where_it_was_last_used(nesterov):
    head, x, y = problem()
    optimiser = RiemannianSGD(head.parameters(), lr=0.01, nesterov=nesterov)
    for _ in range(4):
        before = head.weight.detach().clone()
        train(head, optimiser, x, y, 1)
        M = optimiser.state[head.weight]["momentum_buffer"]
        torch.testing.assert_close(M @ before.mT, torch.zeros(4, 3, 3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_flat_space_limit_equals_torch_sgd_with_nesterov_and_dampening():
    # Far fewer dimensions turn than there are and steps are tiny: the curved step is the flat one to second order.
    for options in ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.5, "dampening": 0.3}, {"momentum": 0.0}):
        heads = [problem()[0] for _ in range(2)]
        _, x, y = problem()
        moves = []
        for head, make in zip(heads, (RiemannianSGD, torch.optim.SGD), strict=True):
            start = head.weight.detach().clone()
            train(head, make(head.parameters(), lr=1e-7, **options), x, y, 3)
            moves.append(grassmann_tangent(start.mT, (head.weight.detach() - start).mT))
        torch.testing.assert_close(moves[0], moves[1], rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("make", [RiemannianSGD, RiemannianAdam])
def test_training_lowers_the_loss_and_keeps_every_basis_orthonormal(make):
    head, x, y = problem(dtype=torch.float32)
    losses = train(head, make(head.parameters(), lr=0.05), x, y, 150)
    assert losses[-1] < 0.3 * losses[0]
    gram = head.weight @ head.weight.mT
    torch.testing.assert_close(gram, torch.eye(3).expand_as(gram), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [RiemannianSGD, RiemannianAdam])
def test_a_run_resumed_from_its_state_goes_on_bit_by_bit(make):
    def fresh():
        head, x, y = problem(dtype=torch.float32)
        model = nn.Sequential(nn.Linear(12, 12), head)
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(12))
            model[0].bias.zero_()
        return model, make(model.parameters(), lr=0.02), x, y

    whole, optimiser, x, y = fresh()
    train(whole, optimiser, x, y, 13)
    first, optimiser, x, y = fresh()
    train(first, optimiser, x, y, 7)
    weights, state = copy.deepcopy(first.state_dict()), pickle.loads(pickle.dumps(optimiser.state_dict()))
    second, optimiser, x, y = fresh()
    second.load_state_dict(weights)
    optimiser.load_state_dict(state)
    train(second, optimiser, x, y, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))


def test_other_parameters_get_torchs_own_optimiser():
    for make, theirs, options in (
        (RiemannianSGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-2}),
        (RiemannianAdam, torch.optim.AdamW, {"weight_decay": 1e-2}),
    ):
        models = [nn.Linear(5, 3), nn.Linear(5, 3)]
        models[1].load_state_dict(models[0].state_dict())
        x, y = torch.randn(20, 5, generator=seeded()), torch.randint(3, (20,), generator=seeded())
        for model, maker in zip(models, (make, theirs), strict=True):
            train(model, maker(model.parameters(), lr=0.05, **options), x, y, 10)
        torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-6, atol=1e-7)


def test_groups_have_their_own_options_and_a_scheduler_drives_all():
    head, x, y = problem(dtype=torch.float32)
    model = nn.Sequential(nn.Linear(12, 12), head)
    optimiser = RiemannianSGD(grassmann_groups(model, weight_decay=1e-2, lr_factor=0.5), lr=0.1)
    assert [(g["manifold"], g["weight_decay"], g["lr_factor"]) for g in optimiser.param_groups] == [
        ("grassmann", 0.0, 0.5),
        ("euclidean", 1e-2, 1.0),
    ]
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 5)
    for _ in range(5):
        train(model, optimiser, x, y, 1)
        schedule.step()
    assert all(g["lr"] < 1e-9 for g in optimiser.param_groups)


def test_a_named_group_of_plain_tensors_is_kept_on_the_manifold():
    W = torch.linalg.qr(torch.randn(6, 2, generator=seeded()))[0].T.contiguous().requires_grad_()
    target = torch.randn(6, 6, generator=seeded(1))
    optimiser = RiemannianSGD([{"params": [W], "manifold": "grassmann"}], lr=0.05, maximize=True)
    for _ in range(400):
        optimiser.zero_grad()
        torch.trace(W @ (target @ target.T) @ W.T).backward()
        optimiser.step()
    top = torch.linalg.eigvalsh(target @ target.T)[-2:].sum()
    torch.testing.assert_close(torch.trace(W @ (target @ target.T) @ W.T).detach(), top, rtol=1e-4, atol=0)


def test_padding_rows_stay_exactly_zero():
    for make in (RiemannianSGD, RiemannianAdam):
        head, x, y = problem(rank=[1, 2, 3, 5], dtype=torch.float32)
        train(head, make(head.parameters(), lr=0.1), x, y, 25)
        for c, k in enumerate((1, 2, 3, 5)):
            assert not head.weight[c, k:].any()
            torch.testing.assert_close(head.weight[c, :k] @ head.weight[c, :k].T, torch.eye(k), atol=1e-5, rtol=0)


def test_a_huge_step_and_a_zero_gradient_keep_orthonormal_bases():
    head, _, _ = problem()
    head.weight.grad = 300 * torch.randn(head.weight.shape, generator=seeded(), dtype=torch.float64)
    RiemannianSGD(head.parameters(), lr=0.1, reorthonormalise_every=1).step()
    gram = head.weight @ head.weight.mT
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float64).expand_as(gram), atol=1e-10, rtol=0)
    before = head.weight.detach().clone()
    head.weight.grad = torch.zeros_like(head.weight)
    RiemannianSGD(head.parameters(), lr=0.1).step()
    torch.testing.assert_close(head.weight.detach(), before, atol=1e-14, rtol=0)


def test_reorthonormalising_never_flips_a_row():
    head, x, y = problem(dtype=torch.float32)
    every, never = copy.deepcopy(head), copy.deepcopy(head)
    train(every, RiemannianSGD(every.parameters(), lr=0.3, reorthonormalise_every=1), x, y, 30)
    train(never, RiemannianSGD(never.parameters(), lr=0.3, reorthonormalise_every=0), x, y, 30)
    assert ((every.weight * never.weight).sum(-1) > 0.9).all()


def test_the_parameter_keeps_its_class_through_copies():
    p = GrassmannParameter(torch.eye(5)[:2].contiguous())
    for copied in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert type(copied) is GrassmannParameter
        assert torch.equal(copied, p)


def test_bad_groups_are_refused():
    head = problem()[0]
    model = nn.Sequential(nn.Linear(12, 12), head)
    for params, options in (
        (head.parameters(), {"weight_decay": 0.1}),
        (model.parameters(), {"weight_decay": 0.1}),
        ([{"params": [head.weight], "weight_decay": 0.1}], {}),
    ):
        with pytest.raises(ValueError, match=r"weight_decay must be 0 for a group that holds subspaces, got 0\.1"):
            RiemannianSGD(params, **options)
    with pytest.raises(ValueError, match="momentum must be in"):
        RiemannianSGD(head.parameters(), momentum=1.5)
    with pytest.raises(ValueError, match="nesterov needs momentum"):
        RiemannianSGD(head.parameters(), momentum=0.0, nesterov=True)
    with pytest.raises(ValueError, match=r"lr must be at least 0, got -1\.0"):
        RiemannianSGD(head.parameters(), lr=-1.0)
    with pytest.raises(ValueError, match=r"\(\*b, k, d\) with k < d, got \(4, 4\)"):
        RiemannianSGD([GrassmannParameter(torch.eye(4))])
    with pytest.raises(TypeError, match="must be float32 or float64"):
        RiemannianSGD([GrassmannParameter(torch.zeros(2, 4, dtype=torch.bfloat16))])
    with pytest.raises(ValueError, match="manifold must be 'grassmann', 'euclidean' or not given, got 'sphere'"):
        RiemannianSGD([{"params": [head.weight], "manifold": "sphere"}])
    with pytest.raises(ValueError, match="must not be 'euclidean'"):
        RiemannianSGD([{"params": [head.weight], "manifold": "euclidean"}])
    with pytest.raises(ValueError, match=r"betas must be in \[0, 1\)"):
        RiemannianAdam(head.parameters(), betas=(0.9, 1.0))
    before = head.weight.detach().clone()
    head.weight.grad = torch.full_like(head.weight, float("nan"))
    with pytest.raises(ValueError, match="gradients of a Grassmann parameter must be finite"):
        RiemannianSGD(head.parameters()).step()
    assert torch.equal(head.weight, before)


@pytest.mark.parametrize("make", [RiemannianSGD, RiemannianAdam])
def test_a_gradient_that_is_not_finite_spoils_neither_the_subspaces_nor_what_comes_after(make):
    heads = [problem()[0] for _ in range(2)]
    optimisers = [make(head.parameters(), lr=0.02) for head in heads]
    weight = heads[0].weight
    gradients = torch.randn(3, *weight.shape, generator=torch.Generator().manual_seed(0), dtype=weight.dtype)
    for i, gradient in enumerate(gradients):
        for head, optimiser in zip(heads, optimisers, strict=True):
            head.weight.grad = gradient.clone()
            optimiser.step()
        spoilt = gradient.clone()
        spoilt[i, 0, i] = float("nan") if i % 2 else float("inf")
        heads[0].weight.grad = spoilt
        with pytest.raises(ValueError, match="gradients of a Grassmann parameter must be finite"):
            optimisers[0].step()
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_bases_that_are_not_orthonormal_are_refused():
    for W in (torch.randn(3, 2, 8), 1.01 * torch.eye(8)[:2].expand(3, 2, 8), torch.full((3, 2, 8), float("nan"))):
        for params in (
            [GrassmannParameter(W.clone())],
            [{"params": [nn.Parameter(W.clone())], "manifold": "grassmann"}],
        ):
            with pytest.raises(ValueError, match="must have orthonormal rows, got some that are off by"):
                RiemannianSGD(params)
    padded = torch.eye(8)[:3].clone()
    padded[1] = 0
    RiemannianAdam([GrassmannParameter(padded)])
    RiemannianSGD([GrassmannParameter(torch.empty(3, 2, 8, device="meta"))])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.0},
        {"nesterov": True},
        {"dampening": 0.3},
        {"maximize": True},
        {"transport": False},
        {"transport": False, "nesterov": True},
        {"transport": False, "momentum": 0.0},
    ],
    ids=str,
)
def test_steps_in_blocks_are_the_formula(options, monkeypatch):
    monkeypatch.setattr(grassmann_optim, "BLOCK_FLOATS", 60)
    g = torch.Generator().manual_seed(1)
    start = torch.linalg.qr(torch.randn(7, 9, 2, generator=g, dtype=torch.float64))[0].mT.contiguous()
    p, S = GrassmannParameter(start.clone()), start.mT.clone()
    optimiser = RiemannianSGD([p], lr=0.3, reorthonormalise_every=0, **options)
    assert len(grassmann_optim._blocks(start)) == 3
    mu, M = options.get("momentum", 0.9), None
    for _ in range(4):
        p.grad = torch.randn(7, 2, 9, generator=g, dtype=torch.float64)
        E = -p.grad.mT if options.get("maximize") else p.grad.mT
        optimiser.step()
        M = E if M is None else mu * M + (1 - options.get("dampening", 0.0)) * E
        G = E if not mu else E + mu * M if options.get("nesterov") else M
        G = G - S @ (S.mT @ G)
        if options.get("transport", True):
            M = M - S @ (S.mT @ M)
        U, s, Vh = torch.linalg.svd(G, full_matrices=False)
        angle = (0.3 * s).unsqueeze(-2)
        S = (S @ Vh.mT * angle.cos() - U * angle.sin()) @ Vh
    torch.testing.assert_close(p.detach().mT, S, atol=1e-12, rtol=0)
