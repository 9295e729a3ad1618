import pytest
import torch
from torch.utils.checkpoint import checkpoint

from polyspan.nn import GrassmannLM
from polyspan.run import torch_generator


def plain(function, *arguments, **options):
    """Call past the checks of shapes, which are made in tests alone."""
    return getattr(function, "__wrapped__", function)(*arguments, **options)


def tokens(*shape, seed=0):
    return torch.randint(0, 11, shape, generator=torch_generator(seed))


def lm(dropout=0.0, **options):
    options = {"max_length": 40, "dtype": torch.float64, "generator": torch_generator(0), **options}
    made = GrassmannLM(11, 8, 3, 4, (1, 2, 3), dropout, **options)
    with torch.no_grad():
        for p in made.parameters():
            if p.ndim > 1:
                p.mul_(10)
    return made


def gradients(model, ids, mask=None, state=None, **options):
    model.zero_grad()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = model(ids, mask, state, **options)
        logits = found if state is None else found[0]
        (logits.square().sum() + (0 if state is None else found[1].layers[0].past.square().sum())).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def recompute(model, function=None):
    for block in model.blocks:
        block.gradient_checkpointing = True
        if function is not None:
            block.checkpoint_function = function
    return model


@pytest.mark.parametrize("positions", ["learned", "none"])
def test_vectors_of_tokens_give_the_bits_that_the_tokens_give(positions):
    model, ids = lm(positions=positions).eval(), tokens(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    rows = model.embedding(ids)
    assert torch.equal(model(embeddings=rows), model(ids))
    assert torch.equal(model(None, mask, embeddings=rows), model(ids, mask))
    whole, state = model(ids, None, model.init_state(2))
    parts, state_a = model(None, None, model.init_state(2), embeddings=rows[:, :5])
    more, state_b = model(ids[:, 5:], None, state_a)
    torch.testing.assert_close(torch.cat([parts, more], dim=1), whole, rtol=1e-10, atol=1e-12)
    assert torch.equal(state_b.position, state.position)
    assert state_b.length == state.length == 9


def test_vectors_that_are_no_token_are_read_and_have_gradients():
    model = lm().eval()
    rows = model.embedding(tokens(1, 6)).detach().requires_grad_()
    model(embeddings=rows)[0, 3].square().sum().backward()
    reached = rows.grad[0].abs().sum(dim=1) > 0
    assert reached.tolist() == [True] * 4 + [False] * 2


def test_what_is_seen_is_what_blocks_are_given_and_what_the_logits_are_made_of():
    model, ids, seen = lm().eval(), tokens(2, 7), []
    logits = model(ids, seen=seen)
    h, expected = model.embedding(ids) + model.positions.weight[:7], []
    for block in model.blocks:
        expected.append(h)
        h = block(h)
    expected.append(model.norm(h))
    assert len(seen) == len(expected) == 4
    for found, wanted in zip(seen, expected, strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(model.logits(seen[-1]), logits)
    streamed = []
    model(ids, None, model.init_state(2), seen=streamed)
    for found, wanted in zip(streamed, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_computing_blocks_again_changes_no_bit_of_the_gradients(norm_first, reentrant):
    """Dropout is drawn again as it was, also behind a mask and behind a state that has gradients of its own."""
    model, ids = lm(0.3, norm_first=norm_first).train(), tokens(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1] * 9])
    cases = [(ids, None, None), (ids, mask, None), (ids[:, 4:], None, model(ids[:, :4], None, model.init_state(2))[1])]
    cases[2] = (*cases[2][:2], cases[2][2]._replace(layers=tuple(
        layer._replace(past=layer.past.detach()) for layer in cases[2][2].layers
    )))  # fmt: skip
    entered = []
    for block in model.blocks:
        block.mixing.register_forward_pre_hook(lambda *_: entered.append(1))
    before = [gradients(model, *case) for case in cases]
    function = None if reentrant is None else lambda *a: checkpoint(*a, use_reentrant=reentrant)
    recompute(model, function)
    for case, expected in zip(cases, before, strict=True):
        found = gradients(model, *case)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            assert torch.equal(gradient, expected[name]), name
    # Three blocks ran once for each of three cases, and then twice.
    assert len(entered) == 9 + 18


def test_blocks_are_computed_again_in_training_only_and_keep_less():
    model, ids = recompute(lm()), tokens(2, 9)
    entered = []
    for block in model.blocks:
        block.mixing.register_forward_pre_hook(lambda *_: entered.append(1))

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(ids).square().sum()
        loss.backward()
        return sum(sizes)

    less, calls = kept(), len(entered)
    assert calls == 6
    model.eval()
    more, calls = kept(), len(entered) - calls
    assert calls == 3
    assert less < more / 2
    entered.clear()
    with torch.no_grad():
        model.train()(ids)
    assert len(entered) == 3


def test_ids_and_vectors_are_given_one_at_a_time_and_fit():
    model, ids = lm(), tokens(2, 5)
    rows = model.embedding(ids)
    with pytest.raises(ValueError, match="exactly one of ids and embeddings must be given, got neither"):
        model()
    with pytest.raises(ValueError, match="exactly one of ids and embeddings must be given, got both"):
        model(ids, embeddings=rows)
    for wrong, said in (
        (rows[0], r"shape \(5, 8\) of torch.float64"),
        (rows[..., :7], r"shape \(2, 5, 7\) of torch.float64"),
        (rows.long(), r"shape \(2, 5, 8\) of torch.int64"),
    ):
        with pytest.raises(ValueError, match=rf"embeddings must be floats of shape \(b, t, 8\), got {said}"):
            plain(GrassmannLM.forward, model, embeddings=wrong)
    with pytest.raises(ValueError, match=r"embeddings must end within max_length=40 positions, got 0 and 41 more"):
        model(embeddings=rows[:, :1].expand(2, 41, 8))
    with pytest.raises(ValueError, match=r"state must be of 2 texts, as ids, got one of 3"):
        model(None, None, model.init_state(3), embeddings=rows)
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(2, 5\)"):
        model(None, torch.ones(2, 4), embeddings=rows)


@pytest.mark.parametrize("t", [0, 1])
def test_no_vector_and_one_vector_are_texts_too(t):
    model = lm().eval()
    assert torch.equal(model(embeddings=model.embedding(tokens(2, t))), model(tokens(2, t)))
