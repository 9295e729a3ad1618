"""Errors of the Grassmann layers name the argument, what was expected and what came."""

import inspect

import numpy as np
import pytest
import torch

from polyspan.errors import NotConverged
from polyspan.nn import (
    CausalGrassmannMixing,
    GrassmannLM,
    GrassmannPairHead,
    GrassmannSequenceClassifier,
    MixingState,
    plane_angles,
    plucker_coordinates,
    plucker_relations_residual,
    score_next_token,
    train_next_token,
)
from polyspan.nn.grassmann_mixing import check_offsets
from polyspan.run import torch_generator


def plain(function, *arguments, **options):
    """Call without the tests' own check of shapes, which would answer first."""
    return inspect.unwrap(function)(*arguments, **options)


def normal(*shape):
    return torch.randn(*shape, generator=torch_generator(0))


def tokens(*shape):
    return torch.randint(11, shape, generator=torch_generator(0))


def lm(**options):
    return GrassmannLM(11, 8, 2, 4, (1, 2), 0.0, max_length=10, generator=torch_generator(0), **options).eval()


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        (3, "offsets must be distinct integers of at least 1, one or more, got 3"),
        ((1, True), r"offsets must be .*, got \(1, True\)"),
        ((1.0,), r"offsets must be .*, got \(1.0,\)"),
        (np.array([2, 2]), r"offsets must be .*, got \[2 2\]"),
    ],
    ids=["number", "truth", "float", "equal"],
)
def test_offsets_that_are_no_distinct_integers_are_refused(offsets, message):
    with pytest.raises(ValueError, match=message):
        plain(check_offsets, offsets)


def test_offsets_of_numpy_and_ranges_are_as_good_as_plain_ones():
    for given in (np.array([1, 4]), [np.int64(1), 4], range(1, 5, 3)):
        found = plain(check_offsets, given)
        assert found == (1, 4)
        assert {type(o) for o in found} == {int}


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (tokens(5), r"ids must be integers of shape \(b, t\), got shape \(5,\) of torch.int64"),
        (tokens(1, 2, 5), r"ids must be .*, got shape \(1, 2, 5\) of torch.int64"),
        (tokens(2, 5).float(), r"ids must be .*, got shape \(2, 5\) of torch.float32"),
        (tokens(2, 5).bool(), r"ids must be .*, got shape \(2, 5\) of torch.bool"),
    ],
    ids=["row", "three", "float", "bool"],
)
def test_ids_that_are_no_rows_of_integers_are_refused_by_every_method(ids, message):
    model = lm()
    for method in (model.hidden, model.loss, model.generate):
        with pytest.raises(ValueError, match=message):
            plain(method.__func__, model, ids, *([1] if method == model.generate else []))
    with pytest.raises(ValueError, match=message):
        next(plain(GrassmannLM.stream, model, ids))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_narrow_integers_are_ids_too(dtype):
    model, ids = lm(), tokens(2, 6)
    assert torch.equal(model(ids.to(dtype)), model(ids))
    assert torch.equal(model.loss(ids.to(dtype)), model.loss(ids))
    found = model.generate(ids.to(dtype), 3, temperature=0)
    assert found.dtype == dtype
    assert torch.equal(found.long(), model.generate(ids, 3, temperature=0))


def test_a_state_of_another_batch_or_network_is_refused():
    model, ids = lm(), tokens(2, 5)
    with pytest.raises(ValueError, match=r"state must be of 2 texts, as ids, got one of 3"):
        model(ids, state=model.init_state(3))
    other = GrassmannLM(11, 8, 1, 4, (1, 2)).init_state(2)
    with pytest.raises(ValueError, match="state must hold 2 layers, got 1"):
        model(ids, state=other)
    mixing = CausalGrassmannMixing(8, 4, (1, 2), generator=torch_generator(0))
    state = mixing.init_state(2)
    with pytest.raises(ValueError, match=r"state must mark a past of shape \(2, 2\), got \(2, 3\)"):
        mixing(normal(2, 5, 8), state=MixingState(state.past, torch.zeros(2, 3, dtype=torch.bool)))


def test_a_dropout_out_of_range_is_named_by_the_language_model_too():
    with pytest.raises(ValueError, match=r"dropout must be at least 0 and below 1, got 2.0"):
        GrassmannLM(9, 8, 1, 4, dropout=2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: (a, a[:1]), r"first and second must be as large as each other, got shapes \(3, 6\) and \(1, 6\)"),
        (lambda a: (a, a[0]), r"first and second must be .*, got shapes \(3, 6\) and \(6,\)"),
        (lambda a: (a[:, :5], a[:, :5]), "first and second must have width 6, got 5"),
    ],
    ids=["batch", "one", "width"],
)
def test_embeddings_that_make_no_pairs_are_refused(call, message):
    head = GrassmannPairHead(6, 3, 8, 4, generator=torch_generator(0))
    with pytest.raises(ValueError, match=message):
        plain(GrassmannPairHead.forward, head, *call(normal(3, 6)))


def test_a_single_vector_is_no_sequence():
    mixing = CausalGrassmannMixing(8, 4, (1, 2), generator=torch_generator(0))
    with pytest.raises(ValueError, match=r"x must be \(\*batch, t, 8\), got shape \(8,\)"):
        plain(CausalGrassmannMixing.forward, mixing, normal(8))
    head = GrassmannSequenceClassifier(8, 3, 8, 8, offsets=(1,), ffn=8)
    with pytest.raises(ValueError, match=r"x must be \(\*batch, t, 8\), got shape \(8,\)"):
        plain(GrassmannSequenceClassifier.forward, head, normal(8))


def test_vectors_that_span_no_planes_together_are_refused():
    u = normal(3, 4)
    with pytest.raises(ValueError, match=r"u and v must go together, got shapes \(3, 4\) and \(2, 4\)"):
        plain(plucker_coordinates, u, u[:2])
    with pytest.raises(ValueError, match="u must have at least 2 coordinates, got a number"):
        plain(plucker_coordinates, u[0, 0], u[0, 0])
    with pytest.raises(ValueError, match=r"p must have r \(r - 1\) / 2 coordinates for some r, got a number"):
        plain(plucker_relations_residual, u[0, 0])
    for pairs in ((u, u[:, :3], u, u), (u, u, u[:2], u[:2])):
        with pytest.raises(ValueError, match=r"all four vectors must have one shape, got \[\(3, 4\), "):
            plain(plane_angles, *pairs)
    with pytest.raises(ValueError, match="u must have at least 2 coordinates, got 1"):
        plain(plane_angles, *[u[:, :1]] * 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be positive and finite, got -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0 and finite, got -1.0"),
        ({"clip": 0.0}, "clip must be positive, got 0.0"),
        ({"counted": torch.ones(50)}, "counted must be bool, got torch.float32"),
        ({"ids": torch.ones(50, dtype=torch.bool)}, r"ids must be one row of integers, got .* of torch.bool"),
    ],
)
def test_numbers_out_of_range_are_told_before_training(options, message):
    model = lm()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        train_next_token(model, **{"ids": tokens(50), "steps": 1, "length": 5} | options)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_score_of_no_pieces_at_once_is_refused():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_next_token(lm(), tokens(50), length=5, batch_size=0)


def test_a_text_of_bytes_is_learnt_as_it_is():
    how = {"steps": 3, "length": 5, "batch_size": 2}
    first, second = lm(), lm()
    wide = train_next_token(first, tokens(50), **how, generator=torch_generator(1))
    narrow = train_next_token(second, tokens(50).to(torch.uint8), **how, generator=torch_generator(1))
    assert wide == narrow
    assert score_next_token(first, tokens(50).to(torch.uint8), length=5) == score_next_token(
        second, tokens(50), length=5
    )


def test_a_loss_that_is_no_longer_finite_ends_the_training():
    with pytest.raises(NotConverged, match=r"the loss is no longer finite after [0-9]+ updates; lower learning_rate"):
        train_next_token(lm(), tokens(50), steps=6, length=5, learning_rate=1e30, warmup=0)


def test_a_mask_that_is_added_to_logits_is_told_from_one_of_real_tokens():
    x, real = normal(1, 5, 8), torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0]])
    layer = CausalGrassmannMixing(8, 4, (1, 2), generator=torch_generator(0)).eval()
    with pytest.raises(ValueError, match="attention_mask must be 1 where a token is real and 0 elsewhere, got -inf"):
        layer(x, torch.where(real > 0, 0.0, -torch.inf))
    torch.testing.assert_close(layer(x, real), layer(x, real.bool()), rtol=0, atol=0)
