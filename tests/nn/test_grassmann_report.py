import pytest
import torch

from polyspan.nn import GrassmannLM, layer_plane_angles, plane_angles, token_influence
from polyspan.nn.grassmann_mixing_plots import plot_losses, plot_reach
from polyspan.run import torch_generator


def model(**options):
    return GrassmannLM(7, 8, 2, 4, (1, 3), 0.0, max_length=40, generator=torch_generator(0), **options)


def tokens(b=2, t=14):
    return torch.randint(7, (b, t), generator=torch_generator(1))


def test_influence_ends_with_the_receptive_field_and_matches_finite_differences():
    made = model(dtype=torch.float64).eval()
    found = token_influence(made, tokens())
    # 3 + 3, 3 + 1, 3, 1 + 1, 1 and 0 tokens back: what sums of at most one offset a layer reach.
    assert [n for n in range(14) if found[0, 13 - n] > 0] == [0, 1, 2, 3, 4, 6]
    assert made.receptive_field == 6

    def likeliest(shift):
        handle = made.embedding.register_forward_hook(lambda m, i, out: out + shift)
        try:
            return made(tokens(1))[0, -1].log_softmax(-1).amax().item()
        finally:
            handle.remove()

    slope = torch.zeros(8, dtype=torch.float64)
    for n in range(8):
        shift = torch.zeros(1, 14, 8, dtype=torch.float64)
        shift[0, 10, n] = 1e-6
        slope[n] = (likeliest(shift) - likeliest(-shift)) / 2e-6
    torch.testing.assert_close(token_influence(made, tokens(1))[0, 10], slope.norm(), rtol=1e-5, atol=1e-9)
    assert all(p.grad is None for p in made.parameters())


def test_angles_are_those_of_the_planes_of_the_first_layer():
    made = model(dtype=torch.float64).eval()
    ids = tokens()
    block = made.blocks[0]
    h = made.embedding(ids) + made.positions(torch.arange(14))
    z = block.mixing.reduction(block.mixing_norm(h))
    found = layer_plane_angles(made, ids)
    assert [layer.offsets for layer in found] == [(1, 3)] * 2
    for row, o in enumerate((1, 3)):
        expected = [plane_angles(z[:, t], z[:, t - o], z[:, t + 1], z[:, t + 1 - o])[:, 1] for t in range(3, 13)]
        torch.testing.assert_close(found[0].angles[row], torch.stack(expected, dim=1).flatten())


def test_looking_leaves_the_model_as_it_was():
    made = model()
    token_influence(made, tokens())
    layer_plane_angles(made, tokens())
    assert made.training
    assert not made.embedding._forward_hooks
    with pytest.raises(ValueError, match="ids must hold at least 5 tokens a text, got 4"):
        layer_plane_angles(made, tokens(t=4))


@pytest.mark.parametrize("suffix", [".svg", ".png", ".pdf"])
def test_pictures_are_the_same_bytes_for_the_same_model(tmp_path, suffix):
    made = model()
    pairs = [
        (plot_reach(made, tokens(), tmp_path / f"reach{n}{suffix}"),
         plot_losses({"planes": [3, 2, 1], "attention": [3, 2.5]}, tmp_path / f"loss{n}{suffix}"))
        for n in range(2)
    ]  # fmt: skip
    for first, second in zip(*pairs, strict=True):
        assert first.read_bytes() == second.read_bytes()
        assert first.stat().st_size > 3000
    with pytest.raises(ValueError, match="losses must hold at least one loss a model"):
        plot_losses({"nothing": []}, tmp_path / "no.svg")
