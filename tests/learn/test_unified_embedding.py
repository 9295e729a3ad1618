import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.utils.estimator_checks import parametrize_with_checks

from polyspan.errors import CorruptFile, WrongContent
from polyspan.learn import CategoricalHasher, FeatureSpec, UnifiedEmbedding, UnifiedEmbeddingClassifier
from polyspan.learn._embedding_gather import gather_rows
from polyspan.learn._lookup_plan import SCHEMES, lookup_plan, rows_of, rows_of_tensor, salt_of
from polyspan.learn._row_adagrad import RowAdagrad
from polyspan.learn._text_hashing import BLOCK, WIDE, as_bytes, hash_bytes, layout, mix, whole_block
from polyspan.learn._value_keys import MISSING, PAD, one_key, value_keys

VECTORS = [0xE220A8397B1DCDAF, 0x5E025F9ADE9EAF3E, 0x43AEF8B2706779E6, 0x742D84A24465EF7A]
SALTS = [0x4B89B739ABDA598D, 0xD718BD3227C2F27F]
ROWS = [[546485, 493635, 238464], [177801, 96617, 922160], [183266, 73811, 266834], [478151, 44880, 558042]]
INT64 = st.integers(-(2**63) + 1, 2**63 - 1)


@parametrize_with_checks([CategoricalHasher(), CategoricalHasher(n_embeddings=64, n_lookups=3, n_shards=2)])
def test_sklearn_contract(estimator, check):
    check(estimator)


# The laws.


def test_the_hash_gives_these_numbers_for_ever():
    assert [hash_bytes(t) for t in (b"", b"a", b"embedding", "größe".encode())] == VECTORS
    assert salt_of("user", 0, 0) == SALTS[0]
    assert salt_of("user", 3, 7) == SALTS[1]
    X = {"user": ["ann", "bob", None, "12"], "item": [12, -1, 0, 2**40]}
    np.testing.assert_array_equal(CategoricalHasher(1_000_000, n_lookups={"user": 2}).fit_transform(X), ROWS)


def test_another_process_with_another_hash_seed_gives_the_same_rows():
    X = {"a": ["x", "yy", "zzz" * 9, None], "b": [3, 2, 1, 0]}
    code = (
        "from polyspan.learn import CategoricalHasher; import numpy as np;"
        f"print(CategoricalHasher(5000, n_lookups=3).fit_transform({X!r}).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == str(CategoricalHasher(5000, n_lookups=3).fit_transform(X).tolist())


def slow_key(text):
    data = text.encode() if isinstance(text, str) else text
    decimal = data.decode("ascii", "replace")
    canonical = decimal.removeprefix("-").isdecimal() and decimal.isascii() and str(int(decimal)) == decimal
    if canonical and abs(int(decimal)) < 2**63:
        return int(decimal)
    return int(np.uint64(hash_bytes(data)).astype(np.int64))


@example(["10000000000000001111"])  # an integer of more than 64 bits is a text like any other
@given(st.lists(st.text(max_size=40) | st.binary(max_size=40), min_size=1, max_size=20))
def test_texts_are_hashed_as_one_by_one(texts):
    assert value_keys(texts, "t").dense().tolist() == [slow_key(t) for t in texts]


def test_texts_of_many_lengths_are_hashed_as_one_by_one_across_blocks_slices_and_nulls():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([rng.integers(0, 30, size=BLOCK), rng.integers(WIDE - 9, 3 * WIDE, size=2_000), [0] * 9])
    data = [rng.bytes(int(length)) for length in rng.permutation(lengths)] + [b"12", b"-7", b"-", b"-07"] * 9
    column = pa.array([None if i % 7 == 0 else text for i, text in enumerate(data)]).slice(5)
    expected = [MISSING if text is None else slow_key(text) for text in column.to_pylist()]
    for kind in (pa.binary(), pa.large_binary()):
        np.testing.assert_array_equal(value_keys(column.cast(kind), "t").dense(), expected)


@example(["0", "00", "-0", "-", "--1", "-7", "07", "", "1" * 18, "9" * 19, "-" + "9" * 18, "1" * 20, "1 ", "1.0"])
@given(st.lists(st.from_regex(r"\A-{0,2}0?[0-9]{0,20}a?\Z"), min_size=1, max_size=20))
def test_texts_that_look_like_numbers_are_whole_numbers_only_in_their_one_form(texts):
    assert value_keys(texts, "t").dense().tolist() == [slow_key(t) for t in texts]


def test_blocks_of_identifiers_beside_other_texts_are_keyed_as_one_by_one():
    rng = np.random.default_rng(0)
    numbers = [str(number) for number in rng.integers(10**18, size=BLOCK)]
    strange = [["0"], ["00"], ["0" + numbers[0]], [""], ["-7"], ["9" * 19], ["12a"], [None]]
    texts = [text for odd in strange for text in (*numbers[:-1], *odd)] + ["ann"] * BLOCK + numbers[:3]
    expected = [MISSING if text is None else slow_key(text) for text in texts]
    for kind in (pa.string(), pa.large_string()):
        np.testing.assert_array_equal(value_keys(pa.array(texts, kind), "t").dense(), expected)


@pytest.mark.parametrize("odd", ["00", "01", "", "-1", "1" * 19, "1a", "١"])
def test_a_block_is_whole_where_each_text_is_digits_alone_and_only_there(odd):
    column = as_bytes(pa.array(["x", "0", "7", "1" * 18, "20"])).slice(1)
    assert whole_block(*layout(column))
    for place in range(4):
        texts = column.to_pylist()
        texts[place] = odd.encode()
        assert not whole_block(*layout(pa.array(texts)))


@pytest.mark.parametrize("width", [8, 24])
def test_texts_of_one_whole_width_are_hashed_as_one_by_one(width):
    rng = np.random.default_rng(width)
    column = pa.array([rng.bytes(width) for _ in range(300)]).slice(7)
    assert value_keys(column, "t").dense().tolist() == [slow_key(text) for text in column.to_pylist()]


def test_views_of_text_have_the_keys_of_text():
    column = pa.array(["ann", None, "12", "größe" * 20])
    np.testing.assert_array_equal(
        value_keys(column.cast(pa.string_view()), "t").dense(), value_keys(column, "t").dense()
    )


@settings(max_examples=20)
@example(keys=list(range(-9, 9)), size=2, seed=0)
@example(keys=list(range(-9, 9)), size=2**30, seed=1)
@given(keys=st.lists(INT64, min_size=1, max_size=30), size=st.integers(2, 2**31 - 1), seed=st.integers(0, 2**40))
def test_rows_agree_between_numpy_torch_and_arithmetic_of_any_width(keys, size, seed):
    plan = lookup_plan({"a": FeatureSpec(3)}, size, seed=seed)
    matrix = np.array(keys, np.int64)[:, None]
    found = rows_of(matrix, plan)
    parts = [torch.from_numpy(part) for part in plan[1:]]
    np.testing.assert_array_equal(rows_of_tensor(torch.from_numpy(matrix)[:, plan.column], *parts).numpy(), found)

    def slow(key, salt):
        x = (key ^ salt) % 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return ((x ^ (x >> 31)) >> 32) * size >> 32

    assert found.tolist() == [[slow(key, salt_of("a", c, seed)) for c in range(3)] for key in keys]


def test_rows_are_spread_evenly_and_independently_of_feature_and_lookup():
    X = {"a": np.arange(100_000), "b": np.arange(100_000)}
    rows = CategoricalHasher(64, n_lookups=2).fit_transform(X)
    counts = np.stack([np.bincount(column, minlength=64) for column in rows.T])
    # Chi-square with 63 degrees of freedom: mean 63, spread 11.
    chi = ((counts - 100_000 / 64) ** 2).sum(axis=1) / (100_000 / 64)
    assert chi.max() < 63 + 5 * 11.3
    joint = np.bincount(rows[:, 0] * 64 + rows[:, 2], minlength=64 * 64)
    assert ((joint - joint.mean()) ** 2).sum() / joint.mean() < 4095 + 5 * 90.5


def test_equal_values_of_different_features_get_different_rows_unless_they_share_a_salt():
    X = {"before": np.arange(2_000), "after": np.arange(2_000)}
    apart = CategoricalHasher(2**20).fit_transform(X)
    assert (apart[:, 0] == apart[:, 1]).mean() < 0.01
    together = CategoricalHasher(2**20, salt_groups={"before": "word", "after": "word"}).fit_transform(X)
    np.testing.assert_array_equal(together[:, 0], together[:, 1])


def test_adding_removing_and_reordering_columns_moves_no_other_columns_rows():
    rng = np.random.default_rng(0)
    X = {name: rng.integers(1000, size=50) for name in "abc"}
    hasher = CategoricalHasher(5000, n_shards=5, n_lookups=2)
    whole = hasher.fit_transform(X)
    other = CategoricalHasher(5000, n_shards=5, n_lookups=2).fit_transform({"new": X["b"], "c": X["c"], "a": X["a"]})
    np.testing.assert_array_equal(other[:, 2:4], whole[:, 4:6])
    np.testing.assert_array_equal(other[:, 4:6], whole[:, 0:2])
    # A fitted hasher goes by name, and leaves further columns out.
    np.testing.assert_array_equal(hasher.transform({"new": X["b"], **{n: X[n] for n in "cba"}}), whole)


def test_one_value_has_one_key_in_all_its_forms():
    forms = [7, 7.0, np.float32(7), np.int8(7), np.uint64(7), "7", b"7"]
    assert {one_key(form) for form in forms} == {7}
    assert one_key(True) == one_key(1)
    assert one_key("café") == one_key("café".encode())
    assert one_key(2.5) == one_key("2.5") == one_key(np.float32(2.5))
    assert one_key(2**70) == one_key(str(2**70))
    assert len({one_key(v) for v in ("7", "07", "7.0", "", " ", "-7", -0.5)}) == 7
    assert one_key(-0.0) == one_key(0) == one_key("0")


@pytest.mark.parametrize("missing", [None, float("nan"), np.nan, np.datetime64("NaT")])
def test_what_is_missing_is_one_value(missing):
    assert one_key(missing) == MISSING
    assert value_keys([missing, "a"], "c").dense()[0] == MISSING
    assert one_key("") != MISSING
    assert one_key(MISSING) != MISSING
    assert one_key(2**63 - 1) == 2**63 - 1
    assert value_keys(np.array([PAD, 1]), "c").dense()[0] != PAD


def test_every_kind_of_column_gives_the_same_keys():
    texts = ["b", "a", "b", None, "33"]
    plain = value_keys(texts, "c").dense()
    arrow = pa.array(texts)
    unused = pa.DictionaryArray.from_arrays(pa.array([0, 2, 0, None, 3]), pa.array(["b", "unused", "a", "33"]))
    for column in (
        np.array(texts, dtype=object),
        arrow,
        arrow.dictionary_encode(),
        unused,
        pa.chunked_array([arrow[:2], arrow[2:]]),
        arrow.cast(pa.large_string()),
        arrow.cast(pa.binary()),
        pa.array(["x", *texts])[1:],
    ):
        np.testing.assert_array_equal(value_keys(column, "c").dense(), plain)
    numbers = value_keys(np.array([1.0, np.nan, -3, 2.5]), "c").dense()
    np.testing.assert_array_equal(value_keys([1, None, "-3", "2.5"], "c").dense(), numbers)
    np.testing.assert_array_equal(value_keys(pa.array([1, None, -3, 2.5]), "c").dense(), numbers)
    np.testing.assert_array_equal(value_keys(pa.array([1, None, -3]), "c").dense(), numbers[:3])
    days = pa.array(["2020-01-02", None]).cast(pa.date32())
    np.testing.assert_array_equal(value_keys(days, "c").dense(), [one_key("2020-01-02"), MISSING])
    np.testing.assert_array_equal(value_keys(pa.nulls(2), "c").dense(), [MISSING, MISSING])
    np.testing.assert_array_equal(value_keys(pa.array([True, None]), "c").dense(), [1, MISSING])


# The layer against what it is said to compute.


def literal(weight, columns, features, *, seed=0):
    """The layer from its formula, one value at a time."""
    out = []
    for i in range(len(next(iter(columns.values())))):
        row = []
        for name, n_lookups in features.items():
            for c in range(n_lookups):
                key = one_key(columns[name][i]) ^ salt_of(name, c, seed)
                h = int(mix(np.array([key % 2**64], np.uint64))[0])
                row.append(weight[(h >> 32) * len(weight) >> 32])
        out.append(torch.cat(row))
    return torch.stack(out)


def test_the_layer_is_its_formula():
    columns = {"a": ["x", "y", None], "b": [1, 2, 1], "c": [0.5, float("nan"), 3.0]}
    features = {"a": 3, "b": 1, "c": 12}
    layer = UnifiedEmbedding(features, 101, 4, seed=5, generator=torch.Generator().manual_seed(0))
    keys = layer.keys(columns)
    expected = literal(layer.weight, columns, features, seed=5)
    torch.testing.assert_close(layer(keys), expected, rtol=0, atol=0)
    parts = layer.by_feature({name: keys[:, i] for i, name in enumerate(features)})
    torch.testing.assert_close(torch.cat(list(parts.values()), dim=1), expected, rtol=0, atol=0)
    assert layer.output_dim == 64
    assert layer.nbytes == 101 * 4 * 4
    assert layer.weight.abs().max() <= 0.05


def test_the_layer_reads_the_rows_that_the_hasher_says():
    rng = np.random.default_rng(0)
    columns = {"a": rng.choice(["x", "y", "z"], size=40), "b": rng.integers(9, size=40)}
    layer = UnifiedEmbedding({"a": 2, "b": FeatureSpec(3, salt_group="g")}, 300, n_shards=3, seed=9)
    hasher = CategoricalHasher(300, n_lookups={"a": 2, "b": 3}, salt_groups={"b": "g"}, n_shards=3, seed=9)
    found = hasher.fit_transform(columns)
    np.testing.assert_array_equal(layer.rows(layer.keys(columns)).numpy(), found)
    assert hasher.get_feature_names_out().tolist() == ["a_0", "a_1", "b_0", "b_1", "b_2"]
    # Neighbouring lookups of a feature lie in neighbouring shards.
    assert set((found[:, 1] // 100 - found[:, 0] // 100) % 3) == {1}


@pytest.mark.parametrize("combiner", ["mean", "sum", "none"])
def test_lists_are_combined_and_an_empty_list_is_zero(combiner):
    spec = FeatureSpec(2, max_len=3, combiner=combiner)
    layer = UnifiedEmbedding({"tags": spec, "b": 1}, 997, 4)
    alone = UnifiedEmbedding({"tags": 2}, 997, 4)
    alone.weight = layer.weight
    columns = {"tags": [["u"], [], ["u", "v", "w", "cut"], None], "b": [1, 2, 3, 4]}
    one = {v: alone(alone.keys({"tags": [v]}))[0] for v in ("u", "v", "w", None)}
    found = layer.by_feature(layer.keys(columns))["tags"]
    zero = torch.zeros(8)
    if combiner == "none":
        assert layer.output_dim == 3 * 8 + 4
        expected = [[one["u"], zero, zero], [zero] * 3, [one[v] for v in "uvw"], [one[None], zero, zero]]
        torch.testing.assert_close(found, torch.stack([torch.stack(row) for row in expected]))
    else:
        total = one["u"] + one["v"] + one["w"]
        expected = [one["u"], zero, total / 3 if combiner == "mean" else total, one[None]]
        torch.testing.assert_close(found, torch.stack(expected))
    assert layer(layer.keys(columns)).shape == (4, layer.output_dim)
    assert value_keys(columns["tags"], "tags", 3).n_truncated == 1


@pytest.mark.parametrize("scheme", [name for name, (layout, _) in SCHEMES.items() if layout == "split"])
def test_split_schemes_keep_features_in_rows_of_their_own_by_size(scheme):
    specs = {"small": FeatureSpec(1, vocabulary_size=10), "large": FeatureSpec(2, vocabulary_size=45)}
    layer = UnifiedEmbedding(specs, 1000, 4, scheme=scheme)
    keys = torch.arange(4000).repeat(2, 1).T
    rows = layer.rows(keys)
    per = rows.shape[1] // 3
    small, large = rows[:, :per], rows[:, per:]
    assert small.max() < large.min()
    # Shares are by values times width: 10 to 90, but for the least rows of each.
    assert 95 <= len(small.unique()) <= 105
    assert len(large.unique()) > 850
    if scheme == "hash":
        # The chunks of one value are found by one hash.
        assert set((large[:, 1] - large[:, 0]).tolist()) == {int(large[0, 1] - large[0, 0])}


def test_compositional_schemes_are_their_formulas():
    keys = torch.arange(50)[:, None]
    for scheme in ("multihash", "split-multihash", "qr", "split-qr"):
        layer = UnifiedEmbedding({"a": 2}, 60, 3, scheme=scheme)
        first, second = layer.weight[layer.rows(keys)[:, 0::2]], layer.weight[layer.rows(keys)[:, 1::2]]
        expected = first + second if "multihash" in scheme else first * (1 + second)
        torch.testing.assert_close(layer(keys), expected.flatten(1))
        if scheme == "qr":
            assert layer.rows(keys)[:, 0::2].max() < 30 <= layer.rows(keys)[:, 1::2].min()


def test_collisionless_gives_each_known_value_rows_of_its_own_and_the_others_one():
    layer = UnifiedEmbedding(
        {"a": 2, "b": 1}, 2, 3, scheme="collisionless", vocabularies={"a": [5, 9], "b": [-1, 4, 1000]}
    )
    rows = layer.rows(torch.tensor([[5, -1], [9, 4], [77, 1000], [78, 1001]]))
    assert rows.tolist() == [[0, 3, 6], [1, 4, 7], [2, 5, 8], [2, 5, 9]]
    assert layer.num_embeddings == 10


def test_gathering_has_the_gradient_of_an_embedding():
    rows = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: gather_rows(w, rows), weight)
    assert torch.autograd.gradgradcheck(lambda w: gather_rows(w, rows).square(), weight)
    up = torch.randn(5, 3, 4, dtype=torch.float64)
    (dense,) = torch.autograd.grad(gather_rows(weight, rows), weight, up)
    (sparse,) = torch.autograd.grad(gather_rows(weight, rows, sparse=True), weight, up)
    (theirs,) = torch.autograd.grad(torch.nn.functional.embedding(rows, weight), weight, up)
    torch.testing.assert_close(dense, theirs)
    torch.testing.assert_close(sparse.to_dense(), theirs)


@pytest.mark.parametrize("sparse", [False, True])
def test_row_adagrad_is_its_formula_and_moves_no_row_that_was_not_read(sparse):
    rows = torch.tensor([[1, 4, 1]])
    weight = torch.nn.Parameter(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    mine, total = weight.detach().clone(), torch.zeros(6)
    optimiser = RowAdagrad([weight], lr=0.1)
    for step in range(3):
        optimiser.zero_grad()
        ((step + 1) * gather_rows(weight, rows, sparse=sparse).square().sum()).backward()
        optimiser.step()
        grad = torch.zeros(6, 3)
        for i in rows[0]:
            grad[i] += 2 * (step + 1) * mine[i]
        total += grad.square().mean(dim=1)
        mine -= 0.1 * grad / (total.sqrt() + 1e-8)[:, None]
    torch.testing.assert_close(weight.detach(), mine)
    assert torch.equal(weight[[0, 2, 3, 5]], mine[[0, 2, 3, 5]])


def test_a_feature_added_after_training_moves_nothing():
    layer = UnifiedEmbedding({"a": 2, "b": 1}, 500, 4)
    columns = {"a": ["x", "y"], "b": [1, 2], "new": ["p", "q"]}
    before = layer(layer.keys(columns))
    layer.add_feature("new", 3)
    after = layer(layer.keys(columns))
    assert torch.equal(after[:, :12], before)
    assert after.shape == (2, 24)
    with pytest.raises(ValueError, match="name must be a new feature, got 'a'"):
        layer.add_feature("a")
    split = UnifiedEmbedding({"a": 1}, 500, 4, scheme="hash")
    with pytest.raises(ValueError, match="scheme must share all rows to take a feature later, got 'hash'"):
        split.add_feature("new")


def test_collisions_are_counted():
    layer = UnifiedEmbedding({"a": 1, "b": 1}, 50, 4)
    columns = {"a": np.arange(40), "b": np.arange(40)}
    report = layer.collision_report(columns)
    rows = layer.rows(layer.keys(columns)).numpy()
    counts = np.bincount(rows[:, 0], minlength=50)
    assert report["a"].n_values == 40
    assert report["a"].same_share == np.mean(counts[rows[:, 0]] > 1)
    assert report["b"].others_share == np.isin(np.unique(rows[:, 1]), rows[:, 0]).mean()
    wide = UnifiedEmbedding({"a": 4, "b": 1}, 50, 4).collision_report(columns)
    assert wide["a"].same_share == 0.0  # four lookups in one table seldom agree in all


def test_overlap_of_readers_is_the_cosine_of_single_ones_and_0_where_orthogonal():
    layer = UnifiedEmbedding({"a": 1, "b": 1, "c": 2}, 50, 2)
    weight = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9.0]])
    found = layer.reader_overlap(torch.nn.Linear(9, 1).requires_grad_(False).eval().weight.copy_(weight))
    np.testing.assert_allclose(np.diag(found), 1)
    np.testing.assert_allclose(found, found.T)
    np.testing.assert_allclose([found[0, 1], found[0, 2], found[1, 2]], [0, 1 / np.sqrt(2), 1 / np.sqrt(2)], atol=1e-7)
    with pytest.raises(ValueError, match=r"reader must have at least 8 columns, got shape \(1, 7\)"):
        layer.reader_overlap(torch.zeros(1, 7))


@pytest.mark.parametrize("scheme", ["multiplex", "collisionless"])
def test_a_layer_comes_back_from_disk(tmp_path, scheme):
    words = {"tags": [1, 2, 3], "b": [4, 5]} if scheme == "collisionless" else None
    specs = {"tags": FeatureSpec(2, "g", max_len=2, combiner="sum"), "b": 1}
    layer = UnifiedEmbedding(specs, 500, 4, seed=3, scheme=scheme, vocabularies=words)
    path = layer.save(tmp_path / "layer.safetensors")
    state = torch.random.get_rng_state()
    again = UnifiedEmbedding.load(path)
    assert torch.equal(torch.random.get_rng_state(), state)
    keys = layer.keys({"tags": [[1, 2], [3]], "b": [4, 9]})
    assert torch.equal(again(keys), layer(keys))
    assert again.config() == layer.config()
    broken = path.read_bytes()
    (tmp_path / "broken.safetensors").write_bytes(broken[:-9] + bytes([broken[-9] ^ 1]) + broken[-8:])
    with pytest.raises(CorruptFile):
        UnifiedEmbedding.load(tmp_path / "broken.safetensors")
    with pytest.raises(WrongContent, match="UnifiedEmbedding"):
        UnifiedEmbeddingClassifier.load(path)


def numpy_state():
    return str(np.random.get_state())  # noqa: NPY002 - it must stay as it is


def test_the_global_generators_stay_as_they_are():
    torch_state, before = torch.random.get_rng_state(), numpy_state()
    layer = UnifiedEmbedding({"a": 1}, 50, generator=torch.Generator().manual_seed(0))
    CategoricalHasher().fit_transform({"a": ["x"]})
    layer(layer.keys({"a": ["x"]})).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    assert numpy_state() == before


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, 10), "features must name at least one feature, got none"),
        (({"a": 0}, 10), "n_lookups must be at least 1, got 0"),
        (({"a": "x"}, 10), r"features\['a'\] must be a number of lookups or a FeatureSpec, got 'x'"),
        (({"a": True}, 10), r"features\['a'\] must be a number of lookups or a FeatureSpec, got True"),
        (({"a": 1}, 1), r"at least 2 rows a shard and fewer than 2\*\*31 rows, got 1 in 1"),
        (({"a": 1}, 10, 0), "chunk_dim must be at least 1, got 0"),
    ],
)
def test_a_layer_that_cannot_be_is_refused(arguments, message):
    # The checker of annotations would say the same less plainly.
    make = getattr(UnifiedEmbedding.__init__, "__wrapped__", UnifiedEmbedding.__init__)
    with pytest.raises(ValueError, match=message):
        make(UnifiedEmbedding.__new__(UnifiedEmbedding), *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": 0}, "init must be above 0, got 0"),
        ({"scheme": "robe"}, "scheme must be one of .*, got 'robe'"),
        ({"n_shards": 3}, "n_shards must be at least 1 and divide 10 rows, got 3"),
        ({"n_shards": 2, "scheme": "hash"}, "n_shards must be 1 with scheme 'hash', got 2"),
        ({"n_shards": 10}, "at least 2 rows a shard"),
        ({"scheme": "collisionless"}, r"vocabularies must hold the keys of every feature, missing \['a', 'b'\]"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        UnifiedEmbedding({"a": 1, "b": 1}, 10, **options)


def test_specs_tables_and_splits_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"combiner must be one of .*, got 'max'"):
        FeatureSpec(combiner="max")
    with pytest.raises(ValueError, match="max_len must be at least 1, got 0"):
        FeatureSpec(max_len=0)
    with pytest.raises(ValueError, match="num_embeddings must be at least 6 to be split, got 4"):
        UnifiedEmbedding({"a": 1, "b": 2}, 4, scheme="hash")
    with pytest.warns(UserWarning, match="the table has 4 rows for 6 lookups"):
        UnifiedEmbedding({"a": 6}, 4)


def test_keys_of_another_form_are_refused():
    layer = UnifiedEmbedding({"a": 1, "tags": FeatureSpec(max_len=2)}, 10)
    one = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"keys must hold every feature, missing \['tags'\]"):
        layer({"a": one})
    with pytest.raises(ValueError, match="keys of 'tags' must be 2 a row, got 3"):
        layer({"a": one, "tags": one.repeat(3, 1).T})
    with pytest.raises(ValueError, match="keys must have 3 columns, got 2"):
        layer(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"keys must be int64, got torch.float32; other values go through"):
        layer(torch.zeros(3, 3))
    with pytest.raises(ValueError, match="columns must hold every feature, 'tags' is missing"):
        layer.keys({"a": [1]})
    with pytest.raises(ValueError, match=r"columns must be of one length, got \[1, 2\]"):
        layer.keys({"a": [1], "tags": [[1], [2]]})
    with pytest.raises(ValueError, match="column 'a' must hold one value a row, got lists; max_len allows lists"):
        layer.keys({"a": [[1]], "tags": [[1]]})
    with pytest.raises(ValueError, match="column 'tags' must hold lists, as max_len=2 says, got int64"):
        layer.keys({"a": [1], "tags": [1]})
    with pytest.raises(ValueError, match="columns must hold every feature, 'tags' is missing"):
        layer.collision_report({"a": [1]})


@pytest.mark.parametrize("value", [{"k": 1}, object(), {1, 2}])
def test_values_that_are_no_values_are_refused(value):
    with pytest.raises(TypeError, match="column 'a' argument must be a string or a number, got"):
        CategoricalHasher().fit_transform({"a": [value, 1]})


def test_mixed_columns_and_rows_keep_their_kinds():
    hasher = CategoricalHasher(10_000)
    mixed = hasher.fit_transform({"c": [1, "x", None, 2.5, b"y", True, "1"]})[:, 0]
    assert mixed[0] == mixed[5] == mixed[6]
    assert len(set(mixed.tolist())) == 5
    rows = hasher.fit_transform([[1, "x"], [2.0, "y"]])
    columns = hasher.fit_transform({"x0": [1, 2], "x1": ["x", "y"]})
    np.testing.assert_array_equal(rows, columns)
    negative = hasher.fit_transform(np.array([[-1], [1]]))
    assert negative[0, 0] != negative[1, 0]


def test_tables_that_do_not_fit_are_refused():
    hasher = CategoricalHasher(100).fit({"a": [1], "b": [2]})
    with pytest.raises(ValueError, match=r"X must hold every column of the fit, missing \['b'\]"):
        hasher.transform({"a": [1]})
    lenient = CategoricalHasher(100, absent="missing").fit({"a": [1], "b": [2]})
    np.testing.assert_array_equal(lenient.transform({"a": [1]}), lenient.transform({"a": [1], "b": [None]}))
    twice = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"])
    with pytest.raises(ValueError, match="X must have distinct column names, got 'a' twice"):
        hasher.fit(twice)
    with pytest.raises(ValueError, match=r"columns of X must be of one length, got \[1, 2\]"):
        hasher.fit({"a": [1], "b": [1, 2]})
    with pytest.raises(ValueError, match="X must have at least one column"):
        hasher.fit({})
    with pytest.raises(ValueError, match="X must have at least one row"):
        hasher.fit({"a": []})
    with pytest.raises(ValueError, match=r"n_lookups must name columns of X, got \['z'\]"):
        CategoricalHasher(n_lookups={"z": 2}).fit({"a": [1]})
    with pytest.raises(ValueError, match="absent must be 'error' or 'missing', got 'zero'"):
        CategoricalHasher(absent="zero").fit({"a": [1]})
    with pytest.raises(ValueError, match="rows of X must be of one length, got 1 in row 1, 2 in row 0"):
        hasher.fit([[1, "a"], [2]])


def test_a_data_frame_is_taken_by_its_columns():
    class Frame:
        """What pandas and polars have in common."""

        def __init__(self, columns):
            self.data, self.columns, self.iloc = columns, list(columns), None

        def __getitem__(self, name):
            return self.data[name]

    columns = {"a": ["x", "y"], "b": [1, 2]}
    hasher = CategoricalHasher(100)
    np.testing.assert_array_equal(hasher.fit_transform(Frame(columns)), hasher.fit_transform(columns))
    np.testing.assert_array_equal(hasher.fit_transform(pa.table(columns)), hasher.fit_transform(columns))
    batch = pa.table(columns).to_batches()[0]
    np.testing.assert_array_equal(hasher.fit_transform(batch), hasher.fit_transform(columns))
    assert hasher.feature_names_in_.tolist() == ["a", "b"]
    numbered = Frame({0: columns["a"], 1: columns["b"]})
    assert hasher.fit(numbered).feature_names_in_.tolist() == ["0", "1"]
