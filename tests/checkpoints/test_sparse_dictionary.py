import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from polyspan.checkpoints import SparseDictionaryCompressor, SparseDictionaryLinear, fastest_product
from polyspan.checkpoints._calibration import InputGrams, as_batches, find_layers, trace_sites, weight_of, whiten
from polyspan.checkpoints._compressed_layers import LowRankLinear
from polyspan.checkpoints._layer_methods import METHODS, Settings, Sizes, compress_unit, functional_error, unit_sizes
from polyspan.checkpoints._sparse_storage import (
    largest_dictionary,
    mask_bytes,
    pack_support,
    stored_bytes,
    support_indices,
    to_coefficients,
    to_values,
    unpack_support,
)
from polyspan.run import torch_generator
from polyspan.testing import ModuleCase, check_module

transformers = pytest.importorskip("transformers")
QKV = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]


def llama(seed=0, layers=2, hidden=32, **options):
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, vocab_size=60, max_position_embeddings=64, **options,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 2:
                    p.mul_(6)
    return model


def tokens(n=1200, seed=1):
    return torch.randint(0, 60, (n,), generator=torch_generator(seed))


def codes(d_out, m, s, seed=0):
    generator = torch_generator(seed)
    values = torch.randn(d_out, m, generator=generator)
    kept = torch.rand(d_out, m, generator=generator).topk(s, dim=1).indices
    return torch.zeros(d_out, m).scatter_(1, kept, values.gather(1, kept))


def layer(d_in=12, d_out=9, m=10, s=4, seed=0, **options):
    D = torch.randn(d_in, m, generator=torch_generator(seed + 1)) / math.sqrt(d_in)
    bias = torch.randn(d_out, generator=torch_generator(seed + 2))
    return SparseDictionaryLinear.from_codes(D, codes(d_out, m, s, seed), s, bias, **options)


def decaying(n, d, seed=0):
    """Inputs whose covariance decays 10:1, turned."""
    generator = torch_generator(seed)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return rows * torch.logspace(0, -0.5, d, dtype=torch.float64) @ turn


def made(product):
    def make(**factory):
        made = SparseDictionaryLinear(12, 9, 10, 4, product=product)
        made.load_state_dict(layer().state_dict())
        return made.to(**factory)

    return make


@pytest.mark.parametrize("product", ["packed", "factored", "expanded"])
def test_the_layer_is_a_drop_in_one(product):
    def inputs(batch, generator):
        return (torch.randn(batch, 12, generator=generator),)

    check_module(ModuleCase(made(product), inputs, compiles=product == "packed"))


@pytest.mark.parametrize("index_cost", ["bitmask", "coo"])
@pytest.mark.parametrize("coef_dtype", [None, "float16", "bfloat16", "int8"])
def test_every_product_is_x_times_dictionary_times_coefficients(index_cost, coef_dtype):
    ours = layer(index_cost=index_cost, coef_dtype=coef_dtype)
    D, S = ours.dictionary, ours.coefficients().mT
    tolerance = {None: 1e-6, "float16": 2e-3, "bfloat16": 2e-2, "int8": 2e-2}[coef_dtype]
    torch.testing.assert_close(S.mT, codes(9, 10, 4), atol=tolerance, rtol=tolerance)
    for shape in ((12,), (3, 12), (2, 20, 12)):
        x = torch.randn(shape, generator=torch_generator(5))
        expected = x @ D @ S + ours.bias
        for product in ("auto", "packed", "gather", "csr", "factored", "expanded"):
            ours.product = product
            with torch.no_grad():
                torch.testing.assert_close(ours(x), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.to_linear()(x), expected, atol=1e-5, rtol=1e-5)


def test_gradients_reach_inputs_dictionary_and_coefficients():
    ours = layer().double()
    x = torch.randn(3, 12, dtype=torch.float64, generator=torch_generator(0)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, D, v: torch.func.functional_call(ours, {"dictionary": D, "values": v}, (x,)),
        (x, ours.dictionary.detach().requires_grad_(), ours.values.detach().requires_grad_()),
    )


def test_products_follow_when_the_layer_is_loaded_cast_or_moved():
    ours, other = layer(), layer(seed=7)
    x = torch.randn(2, 12, generator=torch_generator(0))
    with torch.no_grad():
        for product in ("csr", "gather", "factored", "expanded"):
            ours.product = product
            ours(x)
            ours.load_state_dict(other.state_dict())
            torch.testing.assert_close(ours(x), other(x), atol=1e-5, rtol=1e-5)
            assert ours.double()(x.double()).dtype == torch.float64
            ours.float().load_state_dict(layer().state_dict())


def test_16_bit_layers_multiply_in_16_bits():
    ours = layer(dtype=torch.bfloat16)
    x = torch.randn(5, 12, generator=torch_generator(0)).bfloat16()
    expected = ours.to_linear().float()(x.float())
    with torch.no_grad():
        for product in ("auto", "packed", "gather", "factored", "expanded"):
            ours.product = product
            assert ours(x).dtype == torch.bfloat16
            torch.testing.assert_close(ours(x).float(), expected.detach(), atol=0.06, rtol=0.05)


@pytest.mark.parametrize("coef_dtype", ["bfloat16", "int8"])
def test_pruned_layers_of_narrow_coefficients_compute_as_wide_as_their_model(coef_dtype):
    kept = codes(9, 12, 4)
    ours = SparseDictionaryLinear.from_codes(None, kept, 4, coef_dtype=coef_dtype)
    x = torch.randn(3, 12, generator=torch_generator(0))
    with torch.no_grad():
        for product in ("auto", "packed", "gather", "csr", "factored", "expanded"):
            ours.product = product
            torch.testing.assert_close(ours(x), x @ ours.weight_matrix().mT, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.weight_matrix(), kept, atol=0.02, rtol=0.02)
        assert ours.double()(x.double()).dtype == torch.float64


def test_resident_bytes_are_those_of_tensors_held_and_packed_holds_the_fewest():
    ours = layer(64, 96, 40, 20)
    stored = sum(t.numel() * t.element_size() for t in ours.state_dict().values())
    x = torch.zeros(1, 64)
    held = {}
    for product in ("packed", "gather", "csr", "factored", "expanded"):
        ours.product = product
        with torch.no_grad():
            ours(x)
        held[product] = ours.resident_bytes()
    assert held["packed"] == stored == min(held.values())
    assert held["gather"] == stored + 4 * 96 * 20
    assert held["csr"] == held["gather"] + 4 * 97
    ours.product = "auto"
    with torch.no_grad():
        ours(x)
        ours(x.expand(50, 64))
    assert ours.resident_bytes() == held["csr"]
    assert held["factored"] == stored + 4 * 96 * 40
    assert held["expanded"] == stored + 4 * 96 * 64


def test_a_model_is_given_the_fastest_product_of_each_shape():
    model = nn.Sequential(layer(), layer(seed=3), layer(16, 8, 12, 3))
    found = fastest_product(model, rows=3, among=("packed", "factored"))
    assert set(found) == {"0", "2"}
    assert set(found["0"]) == {"packed", "factored"}
    assert model[0].product == model[1].product == min(found["0"], key=found["0"].get)
    assert fastest_product(model, among=("packed",), set_=False).keys() == {"0", "2"}
    with pytest.raises(ValueError, match="model must hold a SparseDictionaryLinear, got none"):
        fastest_product(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="among must hold a product that runs here, got"):
        fastest_product(nn.Sequential(layer(dtype=torch.bfloat16)), among=("csr",))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SparseDictionaryLinear(4, 4, 3, 4), "num_nonzero between 1 and num_atoms, got 4, 4, 3 and 4"),
        (lambda: SparseDictionaryLinear(4, 4, 3, 2, coef_dtype="int4"), "coef_dtype must be one of .* got 'int4'"),
        (lambda: SparseDictionaryLinear(4, 4, 3, 2, dictionary="none"), "'none' with num_atoms = in_features = 4"),
        (lambda: SparseDictionaryLinear(4, 4, 3, 2, product="fft"), "product must be one of .* got 'fft'"),
        (lambda: layer().share_dictionary(layer(d_in=13)), "owner must have 12 inputs and 10 atoms, got 13 and 10"),
        (lambda: SparseDictionaryLinear(4, 4, 3, 2, dictionary="shared")(torch.zeros(1, 4)), "call share_dictionary"),
        (lambda: LowRankLinear(4, 4, 0), "in_features, out_features and rank must be at least 1, got 4, 4 and 0"),
        (lambda: LowRankLinear(4, 4, 2).share_left(LowRankLinear(4, 4, 3)), "4 inputs and rank 2, got 4 and 3"),
    ],
)
def test_sizes_that_do_not_fit_are_named(make, told):
    with pytest.raises(ValueError, match=told):
        make()


def test_masks_hold_one_bit_a_place_and_come_back():
    for n, m, s in ((5, 7, 3), (1, 1, 1), (4, 16, 16), (9, 13, 1)):
        support = codes(n, m, s, seed=n) != 0
        packed = pack_support(support_indices(support, s), m)
        assert len(packed) == mask_bytes(n, m) == -(-n * m // 8)
        np.testing.assert_array_equal(packed.numpy(), np.packbits(support.numpy().ravel(), bitorder="little"))
        assert torch.equal(unpack_support(packed, n, m), support)
    broken = support.clone()
    broken[2] = False
    with pytest.raises(ValueError, match="mask must mark 1 coefficients of each output, got 0 in row 2"):
        support_indices(broken, 1)


def test_int8_coefficients_are_off_by_half_a_step_of_their_row_and_zero_rows_stay():
    given = codes(6, 8, 3).double()
    given[2] = 0
    kept = to_coefficients(given, 3, torch.int8)
    back = to_values(kept.values, kept.scales, torch.float64)
    step = given.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((back - given.gather(1, kept.indices)).abs() <= 0.5 * step + 1e-7).all())
    assert not kept.values[2].any()
    with pytest.raises(ValueError, match=r"coef_dtype must hold coefficients up to 1e\+06, got torch.float16"):
        to_coefficients(given + 1e6, 3, torch.float16)


@pytest.mark.parametrize("index_cost", ["bitmask", "coo", "none"])
def test_the_largest_dictionary_is_the_one_of_the_formula(index_cost):
    d_in, d_out, ratio, rho = 96, 256, 0.3, 2.0
    budget = (1 - ratio) * d_in * d_out * 2
    m, s = largest_dictionary(d_in, d_out, budget, rho, word=2, coef=torch.bfloat16, index_cost=index_cost)
    marks = {"bitmask": d_out / 16, "coo": d_out / rho, "none": 0}[index_cost]
    exact = (1 - ratio) * d_in * d_out / (d_in + d_out / rho + marks)
    assert exact - 2 < m <= exact + 2
    assert s == m // 2
    options = {"word": 2, "coef": torch.bfloat16, "index_cost": index_cost}
    assert stored_bytes(d_in, d_out, m, s, **options) <= budget
    assert stored_bytes(d_in, d_out, m + 2, (m + 2) // 2, **options) > budget


def test_whitening_is_a_factor_that_needs_no_scale_and_adds_only_what_it_must():
    X = decaying(200, 16)
    for scale in (1e-6, 1.0, 1e6):
        gram = scale * X.mT @ X
        factor, eps = whiten(gram)
        assert eps == 0
        torch.testing.assert_close(factor @ factor.mT, gram)
        low = scale * X[:5].mT @ X[:5]
        factor, eps = whiten(low)
        assert eps == 1e-6
        torch.testing.assert_close(
            factor @ factor.mT, low + eps * low.diagonal().mean() * torch.eye(16, dtype=torch.float64)
        )
    assert torch.equal(whiten(torch.zeros(3, 3, dtype=torch.float64)).factor, torch.eye(3, dtype=torch.float64))
    with pytest.raises(ValueError, match="gram must be positive semidefinite"):
        whiten(torch.diag(torch.tensor([1.0, -9.0], dtype=torch.float64)) + 5 * torch.eye(2, dtype=torch.float64))


def test_the_functional_error_is_that_of_the_outputs():
    X, W = decaying(300, 10), torch.randn(10, 7, generator=torch_generator(3), dtype=torch.float64)
    V = W + 0.1 * torch.randn(10, 7, generator=torch_generator(4), dtype=torch.float64)
    exact = float((X @ (W - V)).square().sum() / (X @ W).square().sum())
    assert functional_error(W, V, X.mT @ X) == pytest.approx(exact, rel=1e-10)


def test_dictionaries_lose_less_than_the_truncated_svd_of_the_same_bytes():
    X, W = decaying(600, 64), torch.randn(64, 128, generator=torch_generator(1), dtype=torch.float64)
    gram = X.mT @ X
    for ratio in (0.2, 0.4):
        error = {}
        for method in METHODS:
            settings = Settings(method=method, word_bytes=2, max_iter=10)
            sizes = unit_sizes(settings, "w", 64, 128, 1, ratio, torch.float32)
            error[method] = compress_unit([W.float()], [gram], sizes, settings, torch.float32).layers[0].error
        assert error["ksvd"] < error["orthogonal"] < error["threshold"] < error["svd-llm"] < error["asvd"]
        assert error["asvd"] < error["svd"]
        assert error["wanda"] < error["magnitude"]
        assert error["ksvd"] < 0.6 * error["svd-llm"]


def test_truncation_in_the_inputs_metric_is_the_best_of_its_rank():
    X, W = decaying(300, 12), torch.randn(12, 20, generator=torch_generator(1), dtype=torch.float64)
    settings = Settings(method="svd-llm")
    found = compress_unit([W], [X.mT @ X], Sizes(4, 0), settings, torch.float64).layers[0]
    values = torch.linalg.svdvals(X @ W)
    assert found.error == pytest.approx(float(values[4:].square().sum() / values.square().sum()), rel=1e-9)


def test_wanda_keeps_of_each_output_the_largest_weights_times_input_norms():
    X, W = decaying(300, 12), torch.randn(12, 5, generator=torch_generator(1), dtype=torch.float64)
    found = compress_unit([W], [X.mT @ X], Sizes(12, 4), Settings(method="wanda"), torch.float64).layers[0].module
    scores = W.mT.abs() * torch.linalg.vector_norm(X, dim=0)
    for row, kept, dense in zip(scores, found.weight_matrix(), W.mT, strict=True):
        chosen = row.argsort(descending=True)[:4]
        assert set(kept.nonzero()[:, 0].tolist()) == set(chosen.tolist())
        assert torch.equal(kept[chosen], dense[chosen])


def test_coefficients_are_fitted_to_the_dictionary_as_it_is_rounded():
    X, W = decaying(300, 24), torch.randn(24, 40, generator=torch_generator(1))
    settings = Settings()
    unit = compress_unit([W], [X.mT @ X], Sizes(18, 9), settings, torch.bfloat16)
    exact = compress_unit([W], [X.mT @ X], Sizes(18, 9), settings, torch.float32)
    assert unit.layers[0].module.dictionary.dtype == torch.bfloat16
    assert unit.layers[0].error < exact.layers[0].error + 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_zero_and_rank_1_weights_and_dead_inputs_do_no_harm(method):
    X = decaying(300, 16)
    X[:, 3] = 0
    one = torch.outer(torch.ones(16), torch.linspace(-1, 1, 24))
    settings = Settings(method=method, word_bytes=2)
    sizes = unit_sizes(settings, "w", 16, 24, 1, 0.4, torch.float32)
    for W in (torch.zeros(16, 24), one):
        found = compress_unit([W], [X.mT @ X], sizes, settings, torch.float32).layers[0]
        assert bool(found.module.weight_matrix().isfinite().all())
        if not W.any():
            assert not found.module.weight_matrix().any()
        elif method not in ("wanda", "magnitude"):
            assert found.error < 1e-4


def test_inputs_that_are_one_tensor_share_a_gram_and_padding_is_left_out():
    model = llama()
    layers = find_layers(model)
    sites = trace_sites(model, layers, [tokens(40).view(2, 20)])
    assert [len(site) for site in sites] == [3, 1, 2, 1] * 2
    assert sites[0] == QKV
    found = InputGrams({"w": 4})
    x = decaying(10, 4).float()
    found.add("w", x.view(2, 5, 4), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    kept = x[[0, 1, 2, 5, 6, 7, 8, 9]].double()
    torch.testing.assert_close(found.grams["w"], kept.mT @ kept)
    assert found.n_rows == {"w": 8}


def test_padding_of_a_batch_changes_nothing():
    ids = tokens(60).view(3, 20)
    padded = torch.cat([ids, tokens(15, seed=9).view(3, 5)], dim=1)
    batch = {"input_ids": padded, "attention_mask": (torch.arange(25) < 20).long().expand(3, 25)}
    options = {"targets": QKV, "max_iter": 4}
    one = SparseDictionaryCompressor(**options).fit(llama(), ids)
    two = SparseDictionaryCompressor(**options).fit(llama(), [batch])
    for a, b in zip(one.report_, two.report_, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-3)


@pytest.fixture(scope="module")
def fitted():
    model, ids = llama(), tokens()
    return model, ids, SparseDictionaryCompressor(0.3, max_iter=6, word_bytes=2).fit(model, ids)


def test_fitting_leaves_the_model_alone_and_compressing_changes_its_projections_only(fitted):
    model, ids, compressor = fitted
    assert not any(isinstance(m, SparseDictionaryLinear) for m in model.modules())
    small = compressor.compress(copy.deepcopy(model))
    changed = {name for name, m in small.named_modules() if isinstance(m, SparseDictionaryLinear)}
    assert len(changed) == 14 == len(compressor.report_)
    assert isinstance(small.lm_head, nn.Linear)
    with torch.no_grad():
        a, b = (net(ids[None, :30]).logits.flatten() for net in (small, model))
        assert float(torch.corrcoef(torch.stack([a, b]))[0, 1]) > 0.6
    for row in compressor.report_:
        assert row.bytes_after <= 0.7 * row.bytes_before * 1.35
        assert 0 < row.error < 0.3
        assert row.atoms // 2 == row.nonzero


def test_the_reported_error_is_that_of_the_layers_outputs_on_the_calibration_text(fitted):
    model, ids, compressor = fitted
    batches, seen = as_batches(ids), []
    name = "model.layers.1.mlp.down_proj"
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        for batch in batches:
            model(batch)
        handle.remove()
        x = torch.cat(seen)
        small = compressor.layers_[name]
        exact = float((module(x) - small(x)).square().sum() / module(x).square().sum())
    row = next(row for row in compressor.report_ if row.layer == name)
    assert row.error == pytest.approx(exact, rel=1e-3)
    assert row.shape == (64, 32)


def test_the_budget_in_bytes_is_kept_in_every_account():
    model, ids = llama(), tokens()
    for options in (
        {},
        {"coef_dtype": "int8"},
        {"coef_dtype": "bfloat16"},
        {"index_cost": "coo"},
        {"algorithm": "wanda"},
        {"algorithm": "wanda", "coef_dtype": "int8"},
    ):
        found = SparseDictionaryCompressor(0.35, max_iter=2, **options).fit(model, ids)
        for row in found.report_:
            assert row.bytes_after <= 0.65 * row.bytes_before
            assert row.bytes_after > 0.5 * row.bytes_before or row.nonzero == row.atoms


def test_layers_of_a_group_share_one_dictionary_in_memory():
    model, ids = llama(layers=3), tokens()
    found = SparseDictionaryCompressor(0.3, groups=2, max_iter=3).fit(model, ids)
    small = found.compress(model)
    q = [small.model.layers[i].self_attn.q_proj for i in range(3)]
    assert q[0].dictionary is q[1].dictionary
    assert q[2].dictionary is not q[0].dictionary
    rows = {row.layer: row for row in found.report_}
    first, second, last = (rows[f"model.layers.{i}.self_attn.q_proj"] for i in range(3))
    assert second.bytes_after < first.bytes_after
    assert first.bytes_after + second.bytes_after <= 0.7 * 2 * first.bytes_before
    assert first.atoms > last.atoms


def test_a_shared_dictionary_is_fitted_to_the_sum_of_the_grams():
    X, Z = decaying(200, 16), decaying(100, 16, seed=5)
    W = [torch.randn(16, 12, generator=torch_generator(i), dtype=torch.float64) for i in range(2)]
    grams = [X.mT @ X, Z.mT @ Z]
    settings = Settings(max_iter=5)
    both = compress_unit(W, grams, Sizes(12, 5), settings, torch.float64)
    whole = compress_unit([torch.cat(W, dim=1)], [grams[0] + grams[1]], Sizes(12, 5), settings, torch.float64)
    made = torch.cat([layer.module.weight_matrix() for layer in both.layers])
    torch.testing.assert_close(made, whole.layers[0].module.weight_matrix())
    assert both.layers[0].module.dictionary is both.layers[1].module.dictionary


def test_sequential_calibration_sees_the_model_compressed_so_far():
    model, ids = llama(), tokens()
    found = SparseDictionaryCompressor(0.5, sequential=True, algorithm="threshold").fit(model, ids)
    assert not any(isinstance(m, SparseDictionaryLinear) for m in model.modules())
    plain = SparseDictionaryCompressor(0.5, algorithm="threshold").fit(model, ids)
    same = {a.layer for a, b in zip(found.report_, plain.report_, strict=True) if a.error == b.error}
    assert same == set(QKV)


def test_grams_in_several_passes_give_the_same_layers(fitted):
    model, ids, whole = fitted
    found = SparseDictionaryCompressor(0.3, max_iter=6, word_bytes=2, memory_bytes=20_000).fit(model, ids)
    assert found.report_ == whole.report_


def test_ratios_by_name_leave_the_others_dense():
    model, ids = llama(), tokens()
    found = SparseDictionaryCompressor(
        {"q_proj": 0.5, "model.layers.1.mlp.*": 0.2}, algorithm="orthogonal", max_iter=2
    ).fit(model, ids)
    rows = {row.layer: row for row in found.report_}
    assert rows["model.layers.0.self_attn.q_proj"].atoms < rows["model.layers.1.mlp.up_proj"].atoms
    assert rows["model.layers.0.mlp.up_proj"].note == "no ratio given"
    assert len(found.layers_) == 5


def test_targets_are_names_or_patterns(fitted):
    model, _, _ = fitted
    assert [layer.name for layer in find_layers(model, ["*.0.*.q_proj"])] == [QKV[0]]
    assert len(find_layers(model, ["down_proj"])) == 2
    with pytest.raises(
        ValueError, match=r"targets must name linear layers of the model, got \['conv'\]; it has model.lay"
    ):
        find_layers(model, ["conv"])
    with pytest.raises(ValueError, match="targets must be a list of names, got the string 'q_proj'"):
        find_layers(model, "q_proj")


def test_transposed_layers_of_gpt2_are_read_and_written_as_they_are():
    config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=60, n_positions=128)
    model = transformers.GPT2LMHeadModel(config).eval()
    found = SparseDictionaryCompressor(0.3, max_iter=4).fit(model, tokens())
    rows = {row.layer.rsplit(".", 2)[-2] + "." + row.layer.rsplit(".", 1)[-1]: row for row in found.report_}
    assert rows["attn.c_attn"].shape == (32, 96)
    assert all(layer.transposed for layer in found.layers_.values())
    x = torch.randn(5, 32, generator=torch_generator(0))
    dense, small = model.transformer.h[0].attn.c_attn, found.layers_["transformer.h.0.attn.c_attn"]
    with torch.no_grad():
        off = (dense(x) - small(x)).square().sum() / dense(x).square().sum()
    assert float(off) < 0.5
    assert torch.equal(small.bias, dense.bias)


def test_tied_weights_are_compressed_once_and_stay_tied():
    model = llama()
    blocks = model.model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    found = SparseDictionaryCompressor(0.3, max_iter=3).fit(model, tokens())
    assert len(found.report_) == 13
    small = found.compress(model)
    one, two = (block.mlp.up_proj for block in small.model.layers)
    assert one is not two
    assert one.values is two.values
    assert one.dictionary is two.dictionary


def test_a_module_that_stands_in_two_places_is_replaced_in_both():
    model = llama()
    model.model.layers[1] = model.model.layers[0]
    small = SparseDictionaryCompressor(0.3, max_iter=2).fit(model, tokens()).compress(model)
    assert isinstance(small.model.layers[1].mlp.up_proj, SparseDictionaryLinear)


def test_offloaded_weights_are_fetched_layer_by_layer(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    ids, options = tokens(), {"algorithm": "orthogonal", "max_iter": 2}
    plain = SparseDictionaryCompressor(**options).fit(llama(), ids)
    model = accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert SparseDictionaryCompressor(**options).fit(model, ids).report_ == plain.report_
    biased = [llama(attention_bias=True) for _ in range(2)]
    nn.init.ones_(biased[0].model.layers[0].self_attn.q_proj.bias)
    nn.init.ones_(biased[1].model.layers[0].self_attn.q_proj.bias)
    biased[1] = accelerate.cpu_offload(biased[1], execution_device=torch.device("cpu"))
    with torch.no_grad():
        one, two = (
            SparseDictionaryCompressor(**options).fit(m, ids).compress(m)(ids[None, :20]).logits for m in biased
        )
    torch.testing.assert_close(one, two)
    bare = nn.Sequential(nn.Linear(4, 4, device="meta"))
    with pytest.raises(ValueError, match="model must have weights, got 0 on the meta device without an offload"):
        weight_of(bare, find_layers(bare, ["0"])[0])


def test_a_ratio_out_of_range_names_the_layer_and_the_largest_that_is_possible():
    ids = tokens(200)
    for ratio in (0.0, 1.0, -0.2):
        with pytest.raises(ValueError, match=rf"ratio must be in \(0, 1\), got {ratio} for model.layers.0"):
            SparseDictionaryCompressor(ratio).fit(llama(), ids)
    with pytest.raises(
        ValueError, match=r"for model.layers.0.self_attn.q_proj \(32 x 32\) it is at most 0\.9\d+, got 0.99"
    ):
        SparseDictionaryCompressor(0.99).fit(llama(), ids)
    assert unit_sizes(Settings(), "w", 2, 3, 1, 0.3, torch.float32) is None
    for method in METHODS:
        assert unit_sizes(Settings(method=method), "w", 1, 6, 1, 0.3, torch.float16) is None


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"algorithm": "lora"}, "method must be one of .* got 'lora'"),
        ({"rho": 0.5}, "rho must be at least 1, got 0.5"),
        ({"pursuit": "x"}, "pursuit must be one of .* got 'x'"),
        ({"index_cost": "csr"}, "index_cost must be one of .* got 'csr'"),
        ({"coef_dtype": "int4"}, "coef_dtype must be one of .* got 'int4'"),
        ({"max_iter": 0}, "max_iter must be at least 1, got 0"),
        ({"word_bytes": 3}, "word_bytes must be 2, 4 or 8, got 3"),
        ({"groups": 0}, "groups must be at least 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(options, told):
    with pytest.raises(ValueError, match=told):
        SparseDictionaryCompressor(**options).fit(llama(layers=1), tokens(300))


def test_nan_activations_are_an_error_or_left_out_and_counted():
    model, good = llama(layers=1), tokens(400).view(-1, 20)
    with torch.no_grad():
        model.model.embed_tokens.weight[59] = math.nan
    good[good == 59] = 0
    bad = good.clone()
    bad[1, 3] = 59
    batches = [good[:10], bad[:10], good[10:]]
    with pytest.raises(ValueError, match=r"finite inputs, got NaN or infinity at model.layers.0.self_attn.q_proj"):
        SparseDictionaryCompressor(0.3, max_iter=2).fit(model, batches)
    with pytest.warns(UserWarning, match="4 inputs with NaN or infinity were left out"):
        found = SparseDictionaryCompressor(0.3, max_iter=2, skip_bad_batches=True).fit(model, batches)
    kept = SparseDictionaryCompressor(0.3, max_iter=2).fit(model, [good[:10], good[10:]])
    assert found.report_ == kept.report_


def test_too_little_text_is_told_with_its_rank_and_still_compresses():
    with pytest.warns(UserWarning, match="fewer tokens than inputs in 8 layers: 20 tokens, of rank 20, for 64 inputs"):
        found = SparseDictionaryCompressor(0.3, max_iter=2).fit(llama(), tokens(20))
    assert all(row.ridge == 1e-6 for row in found.report_)
    with pytest.warns(UserWarning, match="1 tokens, of rank 1"):
        SparseDictionaryCompressor(0.3, max_iter=1).fit(llama(layers=1), tokens(1))


def test_layers_that_calibration_never_reaches_stay_dense_and_are_named():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc1, self.fc2 = nn.Embedding(60, 16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, ids):
            return self.fc1(self.embed(ids))

    with pytest.warns(UserWarning, match="1 layers were not reached and stay dense: fc2"):
        found = SparseDictionaryCompressor(0.3, max_iter=1).fit(Skipping(), tokens(300))
    assert found.report_[1].note == "not reached by calibration"
    dead = Skipping()
    nn.init.zeros_(dead.embed.weight)
    with pytest.warns(UserWarning, match="2 layers were not reached"):
        found = SparseDictionaryCompressor(0.3, max_iter=1).fit(dead, tokens(300))
    assert found.report_[0].note == "calibration shows it zeros only"
    assert not found.layers_


def test_layers_that_only_later_text_or_a_tied_twin_reaches_are_compressed():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc1, self.fc2, self.wo = nn.Embedding(60, 16), *(nn.Linear(16, 16) for _ in range(3))
            self.wi = nn.Linear(16, 16)
            self.wi.weight = self.wo.weight

        def forward(self, ids):
            x = self.embed(ids)
            return self.wi(self.fc2(x) if ids[0, 0] else self.fc1(x))

    ids = tokens(400).view(20, 20)
    ids[:8, 0], ids[8:, 0] = 1, 0
    found = SparseDictionaryCompressor(0.3, max_iter=1).fit(Routed(), ids)
    assert not any(row.note for row in found.report_)
    assert found.layers_["wi"].values is found.layers_["wo"].values
    assert len(found.report_) == 3


def test_quantised_adapted_and_compressed_models_are_refused(fitted):
    model, _, compressor = fitted
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), peft.LoraConfig(target_modules=["q_proj"])
    )
    with pytest.raises(ValueError, match=r"got an adapter on .*q_proj: merge it first"):
        find_layers(adapted)
    small = compressor.compress(copy.deepcopy(model))
    with pytest.raises(ValueError, match=r"got model.layers.0.self_attn.q_proj, which is compressed already"):
        find_layers(small)

    class Linear4bit(nn.Linear):
        pass

    with pytest.raises(ValueError, match="got q_proj, a Linear4bit: load it unquantised"):
        find_layers(nn.ModuleDict({"q_proj": Linear4bit(4, 4)}))
    packed = nn.Linear(4, 4)
    packed.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="got q_proj, a Linear: load it unquantised"):
        find_layers(nn.ModuleDict({"q_proj": packed}))
    broken = nn.Linear(4, 4)
    nn.init.constant_(broken.weight, math.inf)
    holder = nn.ModuleDict({"q_proj": broken})
    with pytest.raises(ValueError, match="finite weights, got NaN or infinity in q_proj"):
        weight_of(holder, find_layers(holder)[0])


@pytest.mark.parametrize(
    ("calibration", "told"),
    [
        (torch.zeros(0, dtype=torch.long), "calibration must hold at least one token, got none"),
        ([], "calibration must hold at least one token, got none"),
        (torch.zeros(4), r"calibration must be token ids .* got torch.float32"),
        ("text", "calibration must be token ids or batches of them, got str"),
        ([3], "calibration must hold tensors or keyword arguments, got int"),
    ],
)
def test_calibration_that_is_none_is_named(calibration, told):
    with pytest.raises(ValueError, match=told):
        as_batches(calibration)


def test_compressing_needs_a_fit_and_the_same_layers(fitted):
    _, _, compressor = fitted
    with pytest.raises(ValueError, match="fit must come before compress"):
        SparseDictionaryCompressor().compress(llama())
    with pytest.raises(ValueError, match=r"got none called model.layers.1"):
        compressor.compress(llama(layers=1))
