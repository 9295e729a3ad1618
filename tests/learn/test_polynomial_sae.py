import copy
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.errors import NotConverged
from polyspan.learn import ActivationStore, PolynomialSAEModule, PolySAE
from polyspan.learn._cholesky_qr import NEAR, _divide, _gram, cholesky_qr, cholesky_qr_
from polyspan.learn._sae_codes import SparseCodes, above, batch_top_k, jump, top_k
from polyspan.learn._sae_interactions import co_firing
from polyspan.learn._sae_training import WINDOW, Trainer, mean_norm_scale, set_start, step_loss
from polyspan.learn.polynomial_sae_plots import plot_interactions, plot_training
from polyspan.linalg import orthonormal_basis
from polyspan.testing import ModuleCase, check_module

SMALL = {"n_components": 24, "k": 3, "ranks": (8, 4, 2), "batch_size": 64, "max_tokens": 64 * 40, "random_state": 0}


@parametrize_with_checks(
    [
        PolySAE(max_tokens=200),
        PolySAE(order=1, activation="batchtopk", max_tokens=200),
        PolySAE(shared=False, activation="matryoshka", cross_only=True, max_tokens=200),
        PolySAE(activation="jumprelu", ranks=(None, 1, 0), max_tokens=200),
    ]
)
def test_sklearn_contract(estimator, check):
    check(estimator)


MODULES = [
    {},
    {"order": 1},
    {"shared": False},
    {"cross_only": True},
    {"cross_only": True, "shared": False, "ranks": (8, 5, 2)},
    {"ranks": (10, 5, 2)},
    {"ranks": (6, 3, 0), "init": "official"},
    {"activation": "batchtopk"},
    {"activation": "jumprelu", "init": "official"},
    {"activation": "matryoshka", "shared": False, "ranks": (8, 4, 0)},
]


def module(generator=0, d=8, m=24, **options):
    options = {"k": 3, "ranks": (8, 4, 4), **options}
    return PolynomialSAEModule(d, m, generator=torch.Generator().manual_seed(generator), **options)


@pytest.mark.parametrize("options", MODULES, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_module_contract(options):
    case = ModuleCase(
        make=lambda **factory: module(**options, **factory),
        inputs=lambda batch, generator: (torch.randn(batch, 8, generator=generator),),
        # Which latents lie above a threshold is known only at run time: the capture of fixed shapes cannot hold it.
        compiles=options.get("activation", "topk") == "topk",
    )
    check_module(case)


def activations(n=600, d=8, seed=0, bound=True):
    """Sums of two of 12 directions, and for four pairs one more direction times the product."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(99)
    atoms, more = fixed.normal(size=(12, d)), fixed.normal(size=(4, d))
    chosen = np.argsort(rng.random((n, 12)), axis=1)[:, :2]
    pair = rng.integers(8, size=n)
    chosen[pair < 4] = 2 * pair[pair < 4, None] + np.arange(2)
    z = rng.uniform(0.75, 1.25, size=(n, 2))
    X = (z[:, :, None] * atoms[chosen]).sum(axis=1)
    if bound:
        X[pair < 4] += (z[:, :1] * z[:, 1:] * more[np.minimum(pair, 3)])[pair < 4]
    return X.astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    return PolySAE(**SMALL, learning_rate=3e-3).fit(activations())


# The retraction.


@settings(deadline=None)
@given(d=st.integers(1, 40), share=st.floats(0, 1), size=st.floats(0, 2), seed=st.integers(0, 2**32 - 1))
def test_cholesky_qr_is_the_q_of_a_qr_with_positive_diagonal(d, share, size, seed):
    generator = torch.Generator().manual_seed(seed)
    k = max(1, round(share * d))
    X = torch.linalg.qr(torch.randn(d, k, generator=generator, dtype=torch.float64))[0]
    X = X + size * torch.randn(d, k, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(cholesky_qr(X), orthonormal_basis(X), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [5, 120])
def test_cholesky_qr_is_orthonormal_for_any_columns(dtype, k):
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(300, k, generator=generator, dtype=dtype)
    ill = X * 10.0 ** -torch.linspace(0, 5, k, dtype=dtype)
    repeated = X.clone()
    repeated[:, 1] = repeated[:, 0]
    near = repeated.clone()
    near[:, 1] += torch.finfo(dtype).eps * X[:, 2]
    for case in (X, ill, repeated, near, torch.zeros_like(X), 1e-20 * X, 1e15 * X):
        before = case.clone()
        Q = cholesky_qr(case)
        assert torch.equal(case, before)
        torch.testing.assert_close(Q.T @ Q, torch.eye(k, dtype=dtype), rtol=0, atol=40 * torch.finfo(dtype).eps)
        assert Q.is_contiguous()
    torch.testing.assert_close(cholesky_qr(ill), orthonormal_basis(ill), rtol=0, atol=1e4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("k", [1, 5, 120])
@pytest.mark.parametrize("size", [1e-3, 0.3, 1e6])
def test_cholesky_qr_in_place_is_cholesky_qr(k, size):
    generator = torch.Generator().manual_seed(k)
    X = torch.linalg.qr(torch.randn(300, k, generator=generator))[0].contiguous()
    X = X + size * torch.randn(300, k, generator=generator)
    expected, place = cholesky_qr(X), X.data_ptr()
    assert cholesky_qr_(X).data_ptr() == place
    torch.testing.assert_close(X, expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="X must be finite"):
        cholesky_qr_(X.fill_(torch.nan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_pass_moves_a_matrix_in_whatever_order_it_lies(dtype):
    generator = torch.Generator().manual_seed(0)
    X = torch.linalg.qr(torch.randn(40, 7, generator=generator, dtype=torch.float64))[0]
    X = (X + 1e-2 * torch.randn(X.shape, generator=generator, dtype=torch.float64)).to(dtype)
    wanted, R = torch.linalg.qr(X.double())
    wanted = wanted * torch.sign(torch.diag(R))
    wide = torch.zeros(80, 14, dtype=dtype)
    lies = {"rows": X.contiguous(), "columns": X.T.contiguous().T, "strided": wide[::2, ::2].copy_(X)}
    for order, Q in lies.items():
        gram, distance = _gram(Q)
        assert distance <= NEAR
        assert _divide(Q, gram), order
        torch.testing.assert_close(Q.double(), wanted, rtol=0, atol=20 * torch.finfo(dtype).eps, msg=order)


def test_many_columns_after_a_small_step_are_seen_to_be_near_and_need_one_pass():
    generator = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(1200, 600, generator=generator, dtype=torch.float64))[0]
    U += 1e-3 * torch.randn(U.shape, generator=generator, dtype=torch.float64)
    gram, distance = _gram(U)
    exact = torch.linalg.matrix_norm(gram - torch.eye(600, dtype=torch.float64), ord=2)
    assert exact <= distance <= NEAR
    Q = cholesky_qr_(U.clone())
    torch.testing.assert_close(Q.T @ Q, torch.eye(600, dtype=torch.float64), rtol=0, atol=1e-14)


def test_cholesky_qr_refuses_what_has_no_frame():
    with pytest.raises(ValueError, match=r"X must be a matrix \(d, k\) with k <= d, got shape \(2, 3\)"):
        cholesky_qr(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="X must be finite"):
        cholesky_qr(torch.full((3, 2), torch.nan))


@pytest.mark.parametrize("method", ["qr", "polar"])
@pytest.mark.parametrize("ranks", [(8, 4, 4), (8, 8, 8), (8, 5, 2), (8, 5, 0), (8, 0, 0)])
@pytest.mark.parametrize("shared", [True, False])
def test_retraction_makes_the_factors_orthonormal_and_the_first_columns_so_together(method, ranks, shared):
    made = module(ranks=ranks, shared=shared)
    generator = torch.Generator().manual_seed(1)
    names = [name for name in made.state_dict() if name.startswith("U")]
    with torch.no_grad():
        for name in names:
            getattr(made, name).add_(0.1 * torch.randn(getattr(made, name).shape, generator=generator))
    made.retract_(method)
    tables = [getattr(made, name).detach() for name in names]
    for table in tables:
        torch.testing.assert_close(table.T @ table, torch.eye(table.shape[1]), rtol=0, atol=2e-6)
    least = min(rank for rank in ranks if rank)
    first = torch.cat([table[:, :least] for table in tables], dim=1)
    torch.testing.assert_close(first.T @ first, torch.eye(first.shape[1]), rtol=0, atol=2e-6)
    again = copy.deepcopy(made)
    again.retract_(method)
    for name in names:
        torch.testing.assert_close(getattr(again, name), getattr(made, name), rtol=0, atol=2e-6)


# Which latents fire.


def test_topk_takes_the_k_largest_and_of_those_the_positive():
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-3.0, -1.0, -2.0, 5.0]])
    assert top_k(pre, 2).dense(4).tolist() == [[3, 0, 2, 0], [0, 0, 0, 5]]
    assert top_k(pre, 4).dense(4).tolist() == [[3, 0, 2, 1], [0, 0, 0, 5]]


def test_topk_takes_k_a_row_where_entries_are_equal_or_not_numbers():
    pre = torch.randn(300, 1_000, generator=torch.Generator().manual_seed(0))
    found = top_k(pre, 7)
    expected = pre.topk(7).indices.sort(dim=1).values
    assert torch.equal(found.indices.reshape(300, 7).sort(dim=1).values, expected)
    torch.testing.assert_close(found.values, pre.gather(1, found.indices.reshape(300, 7)).reshape(-1).relu())
    equal = torch.tensor([[1.0, 2, 2, 2], [4, 3, 2, 1], [0, 0, 0, 0]])
    assert top_k(equal, 2).dense(4).sum(dim=1).tolist() == [4, 7, 0]
    # One row has none that is as large as its second, another two too many.
    odd = torch.tensor([[torch.nan, torch.nan, 0, 1], [2, 2, 2, 2]])
    assert top_k(odd, 2).dense(4)[1].sort().values.tolist() == [0, 0, 2, 2]
    assert torch.isnan(top_k(odd, 2).dense(4)[0]).sum() == 2


def test_batchtopk_takes_k_a_row_on_average():
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-3.0, 0.5, -2.0, 0.7]])
    assert batch_top_k(pre, 2).dense(4).tolist() == [[3, 0, 2, 1], [0, 0, 0, torch.tensor(0.7).item()]]
    assert batch_top_k(-pre.abs(), 2).dense(4).abs().sum() == 0
    assert above(pre, 1.5).dense(4).tolist() == [[3, 0, 2, 0], [0, 0, 0, 0]]


@settings(deadline=None)
@given(b=st.integers(1, 6), m=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_sparse_codes_are_their_dense_form(b, m, seed):
    generator = torch.Generator().manual_seed(seed)
    pre, table = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((b, m), (m, 3)))
    for codes in (top_k(pre, max(1, m // 2)), batch_top_k(pre, max(1, m // 3)), above(pre, 0.3), above(pre, 99.0)):
        dense = codes.dense(m)
        torch.testing.assert_close(codes.weigh(table), dense @ table)
        torch.testing.assert_close(codes.weigh(table, 2), dense**2 @ table)
        np.testing.assert_array_equal(codes.csr(m).toarray(), dense.numpy())
        cut = dense.clone()
        cut[:, m // 2 :] = 0
        torch.testing.assert_close(codes.below(m // 2).weigh(table), cut @ table)


def test_jumprelu_estimates_the_gradient_of_thresholds_by_a_box():
    pre = torch.tensor([[1.0, 0.4, 0.6, 3.0]])
    threshold = torch.full((4,), 0.5, requires_grad=True)
    chosen = above(pre, 0.5 - 0.4 / 2)
    values = chosen.values.clone().requires_grad_()
    codes, count = jump(chosen, values, threshold, torch.tensor(0.4))
    assert codes.dense(4).tolist() == [[1, 0, torch.tensor(0.6).item(), 3]]
    assert count.item() == 3
    codes.dense(4).sum().backward()
    assert values.grad.tolist() == [1, 0, 1, 1]
    torch.testing.assert_close(threshold.grad, torch.tensor([0, -0.5 / 0.4, -0.5 / 0.4, 0]))
    threshold.grad = None
    jump(chosen, values, threshold, torch.tensor(0.4))[1].backward()
    torch.testing.assert_close(threshold.grad, torch.tensor([0, -1 / 0.4, -1 / 0.4, 0]))


@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_the_sparse_gradient_of_the_encoder_is_the_dense_one(activation, wants_x):
    made = module(activation=activation, dtype=torch.float64).train()
    generator = torch.Generator().manual_seed(0)
    x, up = (torch.randn(20, n, generator=generator, dtype=torch.float64) for n in (8, 24))
    x.requires_grad_(wants_x)
    wanted = [*([x] if wants_x else []), made.W_enc, made.b_enc, made.b_dec]
    sparse = torch.autograd.grad((made.train_codes(x)[0].dense(24) * up).sum(), wanted)
    dense = torch.autograd.grad((made.choose(made.pre_activations(x)).dense(24) * up).sum(), wanted)
    for mine, theirs in zip(sparse, dense, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "matryoshka", "jumprelu"])
def test_about_k_latents_fire_and_a_row_is_coded_alike_in_any_company(activation):
    X = activations(2000)
    model = PolySAE(**{**SMALL, "activation": activation, "learning_rate": 3e-3, "max_tokens": 64 * 300}).fit(X)
    codes = model.transform(X.astype(np.float64))
    active = (codes > 0).sum(axis=1).mean()
    assert active <= 3 if activation == "topk" else 2 < active < 4
    np.testing.assert_allclose(model.transform(X[:7].astype(np.float64)), codes[:7], atol=1e-12)
    assert model.score(X) > 0.7


# The decoder.


def slow_decode(made, z):
    """The formula, by sums over latents."""
    factor = [made.U_shared] * 3 if made.shared else [getattr(made, f"U{i}", None) for i in (1, 2, 3)]
    y = made.b_dec + sum(z[i] * made.C1 @ factor[0][i] for i in range(len(z)))
    m = range(len(z))
    if made.ranks[1]:
        for i in m:
            for j in m:
                if not (made.cross_only and i == j):
                    r = made.ranks[1]
                    y = y + made.lambda2 * z[i] * z[j] * made.C2 @ (factor[0][i, :r] * factor[1][j, :r])
    if made.ranks[2]:
        for i in m:
            for j in m:
                for h in m:
                    if not (made.cross_only and len({i, j, h}) < 3):
                        r = made.ranks[2]
                        product = factor[0][i, :r] * factor[1][j, :r] * factor[2][h, :r]
                        y = y + made.lambda3 * z[i] * z[j] * z[h] * made.C3 @ product
    return y


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cross_only", [True, False])
@pytest.mark.parametrize("ranks", [(3, 2, 1), (3, 2, 2), (3, 3, 0), (2, 0, 0)])
def test_the_decoder_is_its_formula(shared, cross_only, ranks):
    made = module(d=3, m=9, ranks=ranks, shared=shared, cross_only=cross_only, init="official", dtype=torch.float64)
    z = torch.zeros(2, 9, dtype=torch.float64)
    z[0, [1, 4, 7]] = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    z[1, [0, 8]] = torch.tensor([3.0, -1.0], dtype=torch.float64)
    expected = torch.stack([slow_decode(made, row) for row in z])
    torch.testing.assert_close(made.decode(z), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("ranks", [(8, 4, 2), (10, 5, 5), (8, 3, 0), (5, 0, 0)])
def test_the_sparse_gradient_of_the_decoder_is_that_of_dense_codes(ranks, shared, dtype):
    made = module(ranks=ranks, shared=shared, m=40, init="official", dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    x, up = (torch.randn(20, 8, generator=generator, dtype=dtype) for _ in range(2))
    codes = made.sparse_encode(x)
    values = codes.values.detach().requires_grad_()
    factors = [made._factor(i) for i in range(1, 2 + (ranks[1] > 0) + (ranks[2] > 0))]
    wanted = [values, *(p for name, p in made.named_parameters() if name[:2] != "W_" and name != "b_enc")]
    sparse = torch.autograd.grad((made.sparse_decode(codes._replace(values=values))[0] * up).sum(), wanted)
    sums = [codes._replace(values=values).dense(40) @ factor for factor in factors]
    dense, product = made.b_dec + sums[0] @ made.C1.T, sums[0]
    for i, (part, rank) in enumerate(zip(sums[1:], ranks[1:], strict=False), start=2):
        product = product[:, :rank] * part[:, :rank]
        dense = dense + getattr(made, f"lambda{i}") * product @ getattr(made, f"C{i}").T
    for mine, theirs in zip(sparse, torch.autograd.grad((dense * up).sum(), wanted), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4 if dtype == torch.float32 else 1e-9, atol=1e-4)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("cross_only", [True, False])
def test_pairs_and_triples_add_what_they_are_said_to(shared, cross_only):
    made = module(
        d=4, m=12, ranks=(4, 3, 2), shared=shared, cross_only=cross_only, init="official", dtype=torch.float64
    )

    def y(*latents):
        z = torch.zeros(1, 12, dtype=torch.float64)
        z[0, list(latents)] = 1
        return made.decode(z)[0]

    only_pairs = copy.deepcopy(made)
    with torch.no_grad():
        only_pairs.lambda3.zero_()

    def p(*latents):
        z = torch.zeros(1, 12, dtype=torch.float64)
        z[0, list(latents)] = 1
        return only_pairs.decode(z)[0]

    pair = made.pair_directions(torch.tensor([[2, 5], [5, 2], [3, 3]]))
    torch.testing.assert_close(pair[0], p(2, 5) - p(2) - p(5) + p())
    torch.testing.assert_close(pair[1], pair[0])
    own = p(3) - p() - made.linear_decoder()[3]
    torch.testing.assert_close(pair[2], own)
    third = y(1, 2, 5) - y(1, 2) - y(1, 5) - y(2, 5) + y(1) + y(2) + y(5) - y()
    for order in permutations((1, 2, 5)):
        torch.testing.assert_close(made.triple_directions(torch.tensor([order]))[0], third)


def test_the_shared_form_with_full_rank_is_a_polynomial_of_its_linear_part():
    made = module(m=40, ranks=(8, 4, 2), init="official", dtype=torch.float64)
    z = torch.rand(5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    linear = z @ made.linear_decoder()
    a = linear @ torch.linalg.inv(made.C1).T
    expected = made.b_dec + linear + made.lambda2 * a[:, :4] ** 2 @ made.C2.T + made.lambda3 * a[:, :2] ** 3 @ made.C3.T
    torch.testing.assert_close(made.decode(z), expected)


@pytest.mark.parametrize("ranks", [(8, 4, 2), (12, 4, 2), (5, 2, 0)])
def test_a_tied_start_decodes_by_the_encoders_transpose(ranks):
    made = module(ranks=ranks, dtype=torch.float64)
    torch.testing.assert_close(made.linear_decoder(), made.W_enc.T)
    lengths = made.linear_decoder().norm(dim=1)
    if ranks[0] >= 8:
        torch.testing.assert_close(lengths, torch.ones_like(lengths))
    official = module(ranks=ranks, init="official")
    torch.testing.assert_close(official.W_enc.norm(dim=0), torch.full((24,), 0.1))
    assert (official.linear_decoder() - official.W_enc.T).norm() > 1


def test_an_order_of_one_is_the_linear_autoencoder_and_zero_ranks_lower_the_order():
    linear = module(order=1)
    assert set(linear.state_dict()) == {"W_enc", "b_enc", "b_dec", "W_dec"}
    z = torch.rand(3, 24, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear.decode(z), z @ linear.W_dec)
    assert linear.pair_directions(torch.tensor([[0, 1]])).abs().sum() == 0
    assert set(module(ranks=(8, 4, 0)).state_dict()) == {
        "W_enc", "b_enc", "b_dec", "U_shared", "C1", "C2", "lambda2",
    }  # fmt: skip
    assert module(order=2).ranks == (8, 4, 0)
    assert module(ranks=None, d=100, m=200).ranks == (100, 25, 25)
    assert module(ranks=(None, 0, None)).ranks == (8, 0, 0)
    assert module(ranks=None, m=5).ranks == (5, 2, 2)
    assert module(ranks=None, m=5, shared=False).ranks == (5, 1, 1)


def test_nothing_is_a_parameter_that_decoding_does_not_use():
    for options in MODULES:
        made = module(**options)
        made.train()
        x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        step_loss(made, x, torch.zeros(24, dtype=torch.bool)).total.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters()), options


# The loss.


def test_prefixes_are_decoded_by_the_rows_of_the_prefix():
    made = module(activation="matryoshka", prefixes=(5, 11), dtype=torch.float64).train()
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = step_loss(made, x, torch.zeros(24, dtype=torch.bool))
    z = found.codes.dense(24)
    expected = 0.0
    for width in (5, 11, 24):
        part = z.clone()
        part[:, width:] = 0
        expected = expected + (x - made.decode(part)).square().sum(dim=1).mean()
    torch.testing.assert_close(found.total, expected)
    # What lies beyond a prefix gets no gradient from its loss.
    codes = SparseCodes(found.codes.indices, found.codes.values, found.codes.offsets)
    y, _ = made.sparse_decode(codes.below(5))
    (grad,) = torch.autograd.grad((x - y).square().sum(), made.U_shared)
    assert grad[:5].abs().sum() > 0
    assert grad[5:].abs().sum() == 0


def test_dead_latents_learn_what_the_others_leave():
    made = module(m=40, dtype=torch.float64).train()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    dead = torch.zeros(40, dtype=torch.bool)
    dead[[3, 9, 30]] = True
    plain, found = step_loss(made, x, ~dead & dead), step_loss(made, x, dead, aux_coef=0.5)
    pre = made.pre_activations(x)
    made_by_dead = pre[:, dead] @ made.linear_decoder()[dead]
    residual = (x - made.decode(made.encode(x))).detach()
    expected = 0.5 * (3 / 4) * (made_by_dead - residual).square().sum(dim=1).mean()
    torch.testing.assert_close(found.total - plain.total, expected)
    many = torch.arange(40) < 20
    top = pre[:, :20].topk(4, dim=1)
    by_four = torch.zeros(16, 20, dtype=torch.float64).scatter(1, top.indices, top.values) @ made.linear_decoder()[:20]
    expected = (by_four - residual).square().sum(dim=1).mean()
    torch.testing.assert_close(step_loss(made, x, many).total - plain.total, expected)


def test_latents_that_died_are_revived():
    X = activations(1000)

    def share_alive(aux_coef):
        model = PolySAE(
            **{**SMALL, "max_tokens": 64}, learning_rate=1e-2, dead_after=20, aux_coef=aux_coef
        ).fit(X)  # fmt: skip
        with torch.no_grad():
            model.module_.b_enc[:12] = -4
        for _ in range(20):
            model.partial_fit(X)
        return (model.transform(X)[:, :12] > 0).any(axis=0).mean()

    assert share_alive(0.0) == 0
    assert share_alive(1.0) > 0.5


def test_a_long_training_with_most_latents_dead_says_so():
    X = activations(200)
    model = PolySAE(n_components=100, k=1, ranks=(8, 2, 0), aux_coef=0, dead_after=2, max_tokens=200 * 8)
    with pytest.warns(UserWarning, match=r"% of the latents have not fired for 2 steps: raise aux_coef"):
        model.fit(X)
    assert model.dead_share_ > 0.5


# The estimator.


def test_products_learn_what_pairs_mean_beyond_their_sum():
    """Orthonormal directions, four pairs of which add a direction of their own; decoders start at the directions."""
    basis = np.linalg.qr(np.random.default_rng(99).normal(size=(16, 16)))[0].astype(np.float32)

    def compounds(n, seed):
        rng = np.random.default_rng(seed)
        chosen, pair = np.argsort(rng.random((n, 12)), axis=1)[:, :2], rng.integers(8, size=n)
        chosen[pair < 4] = 2 * pair[pair < 4, None] + np.arange(2)
        z = rng.uniform(0.75, 1.25, size=(n, 2))
        X = (z[:, :, None] * basis[chosen]).sum(axis=1)
        X[pair < 4] += (z.prod(axis=1, keepdims=True) * basis[12 + np.minimum(pair, 3)])[pair < 4]
        return X.astype(np.float32)

    X, rows, missing = compounds(1000, 0), torch.from_numpy(basis[:12]), {}
    for order, cross_only in ((1, False), (3, False), (3, True)):
        model = PolySAE(
            12, 2, ranks=(12, 12, 0), order=order, cross_only=cross_only, batch_size=100, max_tokens=100,
            learning_rate=1e-2, random_state=0,
        ).fit(X)  # fmt: skip
        made = model.module_
        with torch.no_grad():
            made.W_enc.copy_(rows.T)
            made.b_dec.zero_()
            if order == 1:
                made.W_dec.copy_(rows)
            else:
                made.U_shared.copy_(torch.eye(12))
                made.C1.copy_(rows.T)
        for _ in range(20):
            model.partial_fit(X)
        missing[order, cross_only] = model.report(compounds(500, 1)).unexplained
    assert missing[3, False] < 0.5 * missing[1, False]
    assert missing[3, True] < 0.5 * missing[1, False]


def test_float32_stays_float32_and_codes_may_be_sparse(fitted):
    X = activations(40, seed=2)
    codes = fitted.transform(X)
    assert codes.dtype == fitted.inverse_transform(codes).dtype == np.float32
    wide = fitted.transform(X.astype(np.float64))
    assert wide.dtype == np.float64
    np.testing.assert_allclose(codes, wide, atol=1e-4)
    sparse = copy.copy(fitted).set_params(sparse_output=True).transform(X)
    assert isinstance(sparse, csr_array)
    np.testing.assert_array_equal(sparse.toarray(), codes)
    np.testing.assert_allclose(fitted.inverse_transform(sparse), fitted.inverse_transform(codes), atol=1e-6)
    with torch.no_grad():
        direct = fitted.module_(torch.from_numpy(X) * fitted.scale_) / fitted.scale_
    np.testing.assert_allclose(fitted.inverse_transform(codes), direct.numpy(), atol=1e-5)


def test_the_report_counts_what_it_says(fitted):
    X = activations(300, seed=3)
    codes = fitted.transform(X)
    made = fitted.inverse_transform(codes)
    found = fitted.report(X)
    assert found.unexplained == pytest.approx(((X - made) ** 2).sum() / ((X - X.mean(axis=0)) ** 2).sum(), rel=1e-4)
    assert found.mse == pytest.approx(((X - made) ** 2).sum(axis=1).mean(), rel=1e-4)
    assert found.n_active == pytest.approx((codes > 0).sum(axis=1).mean())
    assert found.silent_share == pytest.approx((~(codes > 0).any(axis=0)).mean())
    cosine = (X * made).sum(axis=1) / np.linalg.norm(X, axis=1) / np.linalg.norm(made, axis=1)
    assert found.cosine == pytest.approx(cosine.mean(), rel=1e-4)
    streamed = fitted.report(ActivationStore.from_array(X, block_rows=7, buffer_rows=50))
    np.testing.assert_allclose(streamed, found, rtol=1e-4)
    assert fitted.score(X) == pytest.approx(1 - found.unexplained)
    assert fitted.report(np.ones((3, 8), np.float32)).unexplained == 1.0


def test_components_are_unit_directions_of_the_linear_part(fitted):
    np.testing.assert_allclose(np.linalg.norm(fitted.components_, axis=1), 1, atol=1e-6)
    directions = fitted.module_.linear_decoder().detach().numpy()
    np.testing.assert_allclose(
        (fitted.components_ * directions).sum(axis=1), np.linalg.norm(directions, axis=1), rtol=1e-5
    )
    assert fitted.get_feature_names_out()[:2].tolist() == ["polysae0", "polysae1"]


def test_two_fits_of_one_seed_are_equal_and_no_global_state_moves():
    X = activations(200)
    state = torch.random.get_rng_state()
    one, two = (PolySAE(**SMALL).fit(X).transform(X) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert np.abs(PolySAE(**{**SMALL, "random_state": 1}).fit(X).transform(X) - one).max() > 1e-3
    assert torch.equal(torch.random.get_rng_state(), state)


def test_scale_is_a_power_of_two_that_brings_lengths_near_the_root_of_the_width():
    X = 700 * activations(100)
    scale = mean_norm_scale(X)
    assert np.log2(scale) == round(np.log2(scale))
    assert 2**-0.5 <= scale * np.linalg.norm(X, axis=1).mean() / 8**0.5 <= 2**0.5
    assert mean_norm_scale(np.zeros((3, 4))) == 1.0
    model = PolySAE(**SMALL).fit(X)
    assert model.scale_ == scale
    assert model.score(X) > 0.3
    plain = PolySAE(**SMALL, normalize=False).fit(activations(100))
    assert plain.scale_ == 1.0


def test_a_start_takes_the_mean_and_thresholds_from_rows():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + 3
    made = module(activation="jumprelu")
    set_start(made, x)
    torch.testing.assert_close(made.b_dec, x.mean(dim=0))
    assert ((made.encode(x) > 0).sum(dim=1).float().mean() - 3).abs() < 0.01
    official = module(init="official")
    set_start(official, x)
    assert official.b_dec.abs().sum() == 0


def test_a_cosine_ends_at_rate_zero_and_gradients_are_clipped():
    X = activations(640)
    options = {**SMALL, "batch_size": 64, "learning_rate": 1e-2}
    before = PolySAE(**{**options, "max_tokens": 64 * 99}, schedule="cosine").fit(X)
    assert before._trainer.optimizer.param_groups[0]["lr"] < 1e-2 * 1e-3
    free, clipped = (PolySAE(**options, clip_norm=clip).fit(X) for clip in (0, 1e-9))
    # Adam does not see the size of gradients until it is that of its own floor.
    assert clipped.loss_curve_[-1] > 1.1 * free.loss_curve_[-1]


@pytest.mark.parametrize("options", [{"retraction": "polar"}, {"retract_every": 7}])
def test_other_retractions_train_as_well(options):
    X = activations()
    model = PolySAE(**{**SMALL, "learning_rate": 3e-3, "max_tokens": 64 * 42}, **options).fit(X)
    U = model.module_.U_shared.detach()
    torch.testing.assert_close(U.T @ U, torch.eye(8), rtol=0, atol=1e-5)
    assert model.loss_curve_[-1] < 0.6 * model.loss_curve_[0]


def test_partial_fit_goes_through_the_rows_once_and_goes_on():
    X = activations(200)
    model = PolySAE(**SMALL).partial_fit(X)
    assert (model.n_iter_, model.n_tokens_) == (4, 200)
    model.partial_fit(X[:30])
    assert (model.n_iter_, model.n_tokens_) == (5, 230)


# Interactions.


@pytest.mark.parametrize("degree", [2, 3])
def test_co_firing_sets_are_those_of_a_loop(degree):
    rng = np.random.default_rng(0)
    Z = rng.random((40, 9)) * (rng.random((40, 9)) < 0.3)
    Z[3] = 0
    found = co_firing(iter([csr_array(Z[:17]), csr_array(Z[17:])]), degree)
    expected = {}
    for row in Z:
        for chosen in combinations(np.flatnonzero(row), degree):
            count, total = expected.get(chosen, (0, 0.0))
            expected[chosen] = count + 1, total + np.prod(row[list(chosen)])
    assert [tuple(row) for row in found.latents] == sorted(expected)
    assert found.counts.tolist() == [expected[key][0] for key in sorted(expected)]
    np.testing.assert_allclose(found.sums, [expected[key][1] for key in sorted(expected)])


@pytest.mark.parametrize("degree", [2, 3])
def test_interactions_rank_what_fires_together(fitted, degree):
    X = activations(300, seed=4)
    found = fitted.interactions(X, top=5, degree=degree)
    codes = fitted.transform(X).astype(np.float64)
    assert len(found.latents) == min(5, found.n_sets)
    assert (np.diff(found.strengths) <= 0).all()
    read = fitted.module_.pair_directions if degree == 2 else fitted.module_.triple_directions
    for latents, strength, norm, share in zip(*found[:4], strict=True):
        product = codes[:, latents].prod(axis=1)
        expected = read(torch.from_numpy(latents[None])).norm().item() / fitted.scale_
        assert norm == pytest.approx(expected, rel=1e-5)
        assert strength == pytest.approx(expected * product.mean(), rel=1e-5)
        assert share == pytest.approx((product > 0).mean())
    by_norm = fitted.interactions(X, by="norm", degree=degree)
    assert (np.diff(by_norm.norms) <= 0).all()
    assert by_norm.n_sets == found.n_sets == len(by_norm.latents)
    sparse = fitted.interactions(csr_array(codes), top=5, degree=degree)
    np.testing.assert_array_equal(sparse.latents, found.latents)
    assert -1 <= found.correlation <= 1


def test_no_pair_fires_where_one_latent_does():
    model = PolySAE(**{**SMALL, "k": 1}).fit(activations(100))
    found = model.interactions(activations(100))
    assert found.latents.shape == (0, 2)
    assert found.n_sets == 0
    assert np.isnan(found.correlation)


def test_a_direction_is_the_sum_and_what_the_products_add(fitted):
    linear = fitted.module_.linear_decoder().detach().numpy() / fitted.scale_
    np.testing.assert_allclose(fitted.direction(3), linear[3], rtol=1e-6)
    np.testing.assert_allclose(fitted.direction([3, 4], interaction=False), linear[3] + linear[4], rtol=1e-6)
    pair = fitted.module_.pair_directions(torch.tensor([[3, 4]]))[0].detach().numpy() / fitted.scale_
    np.testing.assert_allclose(fitted.direction([3, 4]), linear[3] + linear[4] + pair, rtol=1e-5, atol=1e-7)
    for wrong in ([], [1, 1], [0, 24], [1, 2, 3, 4]):
        with pytest.raises(ValueError, match="latents must be one to three distinct numbers from 0 to 23, got"):
            fitted.direction(wrong)


# Bad input.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"k": 25}, "k must be between 1 and the 24 latents, got 25"),
        ({"k": 0}, "k must be at least 1, or None, got 0"),
        ({"ranks": (4, 5, 2)}, r"ranks must not increase, with R1 at least 1 and none negative, got \(4, 5, 2\)"),
        ({"ranks": (0, 0, 0)}, "ranks must not increase"),
        ({"ranks": (8, 2)}, r"ranks must be three, \(R1, R2, R3\), got \(8, 2\)"),
        ({"ranks": (25, 2, 2)}, "ranks must have R1 of at most the 24 latents, .*, got 25"),
        ({"ranks": (9, 9, 9), "shared": False}, "ranks must leave room for 3 times 9 orthonormal columns among 24"),
        ({"order": 4}, "order must be 1, 2 or 3, got 4"),
        ({"activation": "relu"}, "activation must be one of .*, got 'relu'"),
        ({"init": "zeros"}, "init must be 'tied' or 'official', got 'zeros'"),
        ({"lambda_init": (1.0,)}, r"lambda_init must be two finite numbers, got \(1.0,\)"),
        (
            {"activation": "matryoshka", "prefixes": (9, 3)},
            "prefixes must be increasing numbers from 1 to below the 24",
        ),
        ({"activation": "matryoshka", "prefixes": (30,)}, "prefixes must be increasing numbers"),
        ({"learning_rate": 0}, "learning_rate must be above 0, got 0"),
        ({"aux_coef": -1}, "aux_coef must be at least 0, got -1"),
        ({"dead_after": 0}, "dead_after must be at least 1, got 0"),
        ({"schedule": "linear"}, "schedule must be 'constant' or 'cosine', got 'linear'"),
        ({"retraction": "svd"}, "retraction must be 'qr' or 'polar', got 'svd'"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, or None, got 0"),
    ],
)
def test_parameters_that_cannot_be_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        PolySAE(**{**SMALL, **options}).fit(activations(100))


def test_rows_that_cannot_be_are_refused(fitted):
    X = activations(50)
    X[30, 2] = np.nan
    with pytest.raises(ValueError, match="X must be finite, got NaN or infinity in 1 rows, first in row 30"):
        PolySAE(**SMALL).fit(X)
    with pytest.raises(ValueError, match="X has 5 features, but PolySAE is expecting 8"):
        fitted.transform(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="X must have 8 features, as at the fit, got 5"):
        fitted.report(ActivationStore.from_array(np.zeros((3, 5))))
    with pytest.raises(ValueError, match="Z must have one column for each of 24 latents, got 5"):
        fitted.inverse_transform(np.zeros((3, 5)))
    with pytest.raises(ValueError, match="X must hold codes of 24 latents, got 5 columns"):
        fitted.interactions(csr_array((3, 5)))
    for options, said in (
        ({"degree": 4}, "degree must be 2 or 3, got 4"),
        ({"by": "size"}, "by must be 'data' or 'norm', got 'size'"),
        ({"top": 0}, "top must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            fitted.interactions(X, **options)
    linear = PolySAE(**SMALL, order=1).fit(activations(100))
    with pytest.raises(ValueError, match=r"degree must be one that the decoder has, with ranks \(8, 0, 0\), got 2"):
        linear.interactions(activations(100))
    with pytest.raises(ValueError, match="method must be one of"):
        fitted.module_.retract_("svd")


def test_fewer_rows_than_latents_are_warned_of():
    with pytest.warns(UserWarning, match="20 rows are fewer than the 24 latents"):
        PolySAE(**SMALL).fit(activations(20))


def test_powers_of_large_numbers_are_warned_of_and_a_loss_that_explodes_stops_the_training():
    X = 300 * activations(100)
    with pytest.warns(
        UserWarning, match=r"\|zU\| reaches .*, more than 50: its powers may explode; set normalize=True"
    ):
        PolySAE(**SMALL, normalize=False).fit(X)
    huge = 1e13 * activations(100).astype(np.float64)
    with pytest.raises(NotConverged, match=r"the loss is .* at step 0: the largest \|zU\| was"):
        PolySAE(**SMALL, normalize=False).fit(huge)


def test_losses_are_read_once_a_window_and_the_step_that_was_not_finite_is_named_and_left_out():
    good = activations(64)
    model = PolySAE(**SMALL).partial_fit(good)
    trainer = model._trainer
    reads = []

    class Counted(Trainer):
        def _read(self):
            reads.append(self.n_steps)
            super()._read()

    trainer.__class__ = Counted
    for _ in range(2 * WINDOW):
        trainer.step(good)
    assert reads == [WINDOW, 2 * WINDOW]
    for _ in range(3):
        trainer.step(good)
    before = copy.deepcopy(trainer.module.state_dict())
    trainer.step(np.full_like(good, 1e30))
    for name, value in trainer.module.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)
    trainer.step(good)
    with pytest.raises(NotConverged, match=rf"the loss is (inf|nan) at step {2 * WINDOW + 4}: the largest"):
        _ = trainer.losses
    assert len(trainer.losses) == trainer.n_steps == 2 * WINDOW + 5
    assert np.isfinite(model.partial_fit(good).loss_curve_).all()


# Pictures.


def test_pictures_repeat_byte_for_byte(fitted, tmp_path):
    found = fitted.interactions(activations(200), top=6)
    curves = {"polynomial": fitted.loss_curve_, "linear": fitted.loss_curve_[:20]}
    for name, draw in (
        ("t", lambda path: plot_training(curves, path)),
        ("i", lambda path: plot_interactions(found, path)),
    ):
        for suffix in (".svg", ".png", ".pdf"):
            one, two = (draw(tmp_path / f"{name}{i}{suffix}").read_bytes() for i in (1, 2))
            assert one == two
    assert "latent" in (tmp_path / "i1.svg").read_text()
    with pytest.raises(ValueError, match=r"path must end in .svg, .png or .pdf"):
        plot_training(curves, tmp_path / "a.gif")
    with pytest.raises(ValueError, match="curves must be at least one, got none"):
        plot_training({}, tmp_path / "a.svg")
    empty = found._replace(latents=found.latents[:0], strengths=found.strengths[:0])
    with pytest.raises(ValueError, match="interactions must be at least one, got none"):
        plot_interactions(empty, tmp_path / "a.svg")


@pytest.mark.parametrize("place", [0, 31, 63])
def test_a_row_that_is_not_finite_is_named(place):
    X = np.random.default_rng(0).normal(size=(64, 6))
    sae = PolySAE(8, 2, max_tokens=128, random_state=0).fit(X)
    X[place, 3] = np.nan
    for call in (sae.fit, sae.partial_fit, sae.transform, sae.report):
        with pytest.raises(ValueError, match=f"NaN or infinity in 1 rows, first in row {place}$"):
            call(X)


@pytest.mark.parametrize("scale", [1e200, 1e-200])
def test_numbers_that_float32_does_not_hold_are_refused(scale):
    with pytest.raises(ValueError, match="float32"):
        PolySAE(8, 2).fit(scale * np.random.default_rng(0).normal(size=(64, 6)))


def test_dates_are_no_activations():
    with pytest.raises(ValueError, match="got datetime64"):
        PolySAE(8, 2).fit(np.zeros((64, 6), "M8[s]"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_of_any_precision_are_taken_as_their_rows(dtype):
    X = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    rows = X.detach().float().numpy()
    options = {"k": 2, "max_tokens": 240, "batch_size": 40, "random_state": 0}
    mine, plain = (PolySAE(12, **options).fit(given) for given in (X, rows))
    found = mine.transform(X)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, plain.transform(rows))
    np.testing.assert_array_equal(np.concatenate(list(ActivationStore.from_array(X).batches(99, shuffle=False))), rows)
    if dtype == torch.float16:
        np.testing.assert_array_equal(mine.transform(rows.astype(np.float16)), found)
