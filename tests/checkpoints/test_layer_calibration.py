import pytest
import torch
from torch import nn

from polyspan.checkpoints import SparseDictionaryCompressor, calibrate_layers
from polyspan.checkpoints.layer_calibration import whiten
from polyspan.checkpoints.transformers_bars import quiet_transformers
from polyspan.run import torch_generator


def small(width=16):
    """Embeds tokens; two layers read the same input, and a third what they make of it."""

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(30, width)
            self.q_proj, self.k_proj, self.o_proj = (nn.Linear(width, width) for _ in range(3))

        def forward(self, ids):
            x = self.words(ids)
            return self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x)))

    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        return Small().eval()


IDS = torch.randint(0, 30, (4, 40), generator=torch_generator(0))


def test_gram_matrices_are_those_of_the_inputs_that_layers_read():
    model = small()
    found = calibrate_layers(model, IDS)
    assert found.sites == [["q_proj", "k_proj"], ["o_proj"]]
    assert found.n_rows == {"q_proj": 160, "o_proj": 160}
    x = model.words(IDS).flatten(0, 1).double()
    torch.testing.assert_close(found.grams["q_proj"], x.mT @ x)
    assert found.grams["o_proj"].dtype == torch.float64


@pytest.mark.parametrize("algorithm", ["ksvd", "svd-llm", "wanda"])
def test_compressing_from_it_gives_the_bits_that_text_gives(algorithm):
    model, calibration = small(), calibrate_layers(small(), IDS)
    options = {"algorithm": algorithm, "max_iter": 3}
    by_text, by_grams = (SparseDictionaryCompressor(0.2, **options).fit(model, c) for c in (IDS, calibration))
    assert by_text.report_ == by_grams.report_
    assert by_text.n_tokens_ == by_grams.n_tokens_ == 160
    for name, layer in by_text.layers_.items():
        for mine, theirs in zip(layer.state_dict().values(), by_grams.layers_[name].state_dict().values(), strict=True):
            assert torch.equal(mine, theirs)


def test_layers_without_calibration_stay_dense_and_are_told_of():
    calibration = calibrate_layers(small(), IDS, targets=["o_proj"])
    with pytest.warns(UserWarning, match="2 layers were not reached and stay dense: q_proj"):
        found = SparseDictionaryCompressor(0.2, max_iter=1).fit(small(), calibration)
    assert list(found.layers_) == ["o_proj"]


def test_gram_matrices_of_other_models_and_of_no_numbers_are_refused():
    calibration = calibrate_layers(small(), IDS)
    with pytest.raises(ValueError, match=r"q_proj has 24 inputs, got a Gram matrix \(16, 16\)"):
        SparseDictionaryCompressor(0.2).fit(small(24), calibration)
    with pytest.raises(ValueError, match="must be text where sequential, got Gram matrices"):
        SparseDictionaryCompressor(0.2, sequential=True).fit(small(), calibration)
    calibration.grams["o_proj"][3, 3] = torch.nan
    with pytest.raises(ValueError, match="must be finite, got NaN or infinity at o_proj"):
        SparseDictionaryCompressor(0.2).fit(small(), calibration)


def test_few_tokens_are_told_of_when_they_are_gathered():
    with pytest.warns(UserWarning, match="fewer tokens than inputs in 2 layers: 7 tokens"):
        calibrate_layers(small(), IDS[:1, :7])


def test_whitening_factors_a_gram_matrix():
    gram = calibrate_layers(small(), IDS).grams["q_proj"]
    factor, ridge = whiten(gram)
    assert ridge == 0
    torch.testing.assert_close(factor @ factor.mT, gram)


@pytest.mark.parametrize("shown", [True, False])
def test_the_bars_of_transformers_are_as_they_were_afterwards(shown):
    logging = pytest.importorskip("transformers.utils.logging")
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with quiet_transformers():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == shown
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()
