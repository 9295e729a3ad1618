import pytest
import torch
from torch import nn

from polyspan.nn import replace_attention
from polyspan.run import torch_generator


def encoder(batch_first=True):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def replaced(*args, **options):
    with pytest.warns(UserWarning, match="layers now have random weights: the network has to be trained again"):
        return replace_attention(*args, generator=torch_generator(0), r=4, offsets=(1, 2), **options)


def draw(*shape):
    return torch.randn(*shape, generator=torch_generator(1))


@pytest.mark.parametrize("train", [True, False])
def test_an_encoder_is_causal_afterwards_in_training_and_on_the_fast_path_of_evaluation(train):
    model, x = encoder().train(train), draw(2, 9, 8)
    assert replaced(model, dropout=0.0) == ["layers.0.self_attn", "layers.1.self_attn"]
    other = x.clone()
    other[:, 5:] += 1
    with torch.no_grad():
        assert torch.equal(model(x)[:, :5], model(other)[:, :5])
        assert not torch.equal(model(x)[:, 5:], model(other)[:, 5:])
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.layers[0].self_attn.parameters())


def test_time_first_and_padding_are_understood():
    model, x = encoder(batch_first=False).eval(), draw(9, 2, 8)
    replaced(model, causal=False)
    padded = torch.cat([x, draw(3, 2, 8)])
    mask = torch.arange(12).expand(2, 12) >= 9
    found = model(padded, src_key_padding_mask=mask)[:9]
    torch.testing.assert_close(found, model(x))
    assert not torch.allclose(model(padded)[:9], model(x))


def test_only_the_named_layers_are_replaced():
    model = encoder()
    before = model.layers[0].self_attn
    assert replaced(model, ["layers.1.self_attn"]) == ["layers.1.self_attn"]
    assert model.layers[0].self_attn is before


def test_what_cannot_be_replaced_is_refused():
    with pytest.raises(ValueError, match=r"layers must be among .*layers.0.self_attn.* got \['layers.7'\]"):
        replace_attention(encoder(), ["layers.7"])
    with pytest.raises(ValueError, match=r"model must hold an nn.MultiheadAttention, got none in Linear"):
        replace_attention(nn.Linear(2, 2))
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    replaced(model)
    x = draw(5, 2, 8)
    with pytest.raises(ValueError, match="key and value must be the query itself"):
        model[0](x, x.clone(), x)
