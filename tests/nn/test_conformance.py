"""Every public torch module keeps the promises of a drop-in layer; a new one without a case fails here."""

import pytest
import torch

from polyspan.align import (
    BasisTransformationHead,
    BasisTransformationLoss,
    BasisTransformationOutput,
    CompatibleOutput,
    OrthogonalCompatibleHead,
    OrthogonalCompatibleLoss,
    PointNetEncoder,
    RelaxedOrthogonalLinear,
)
from polyspan.checkpoints import MergedExperts, SparseDictionaryLinear, TuckerAdapterConfig, TuckerAdapterModel
from polyspan.cluster import (
    CodingRate,
    DoublyStochastic,
    LowRankDenoiser,
    NestedMatryoshkaHead,
    RateReductionLoss,
    TotalCodingRateLoss,
)
from polyspan.learn import FeatureSpec, PolynomialSAEModule, UnifiedEmbedding
from polyspan.nn import (
    CRATE,
    CRATEMAE,
    ULSAM,
    CausalGrassmannMixing,
    CRATEBlock,
    CRATEDecoderBlock,
    GauntConvolution,
    GauntManyBody,
    GauntTensorProduct,
    GrassmannBlock,
    GrassmannHead,
    GrassmannLM,
    GrassmannPairHead,
    GrassmannSequenceClassifier,
    HouseholderProjector,
    LowRankOrthogonal,
    MHSBlock,
    MHSUNet,
    MultiHeadScan2d,
    RotationHead,
    SparseRateReductionLoss,
    SparsifyingISTA,
    SphericalTransform,
    SS2DBlock,
    StyleAutoencoder,
    StyleGenerator,
    SubspaceSelfAttention,
)
from polyspan.testing import ModuleCase, check_module, public_modules


def normal(*shape):
    return lambda batch, generator: (torch.randn(batch, *shape, generator=generator),)


def normals(*shapes):
    return lambda batch, generator: tuple(torch.randn(batch, *shape, generator=generator) for shape in shapes)


def unit(*shape, n=1):
    def draw(batch, generator):
        return tuple(
            torch.nn.functional.normalize(torch.randn(batch, *shape, generator=generator), dim=-1) for _ in range(n)
        )

    return draw


def with_memberships(batch, generator):
    return torch.randn(batch, 6, 4, generator=generator), torch.rand(batch, 6, 3, generator=generator)


def tokens_and_bases(batch, generator):
    return (torch.randn(batch, 6, 8, generator=generator), torch.randn(batch, 2, 8, 4, generator=generator))


def adapted(**factory):
    layers = torch.nn.Sequential(
        torch.nn.Conv1d(2, 6, 3, padding=1, **factory),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(30, 3, **factory),
    )
    model = TuckerAdapterModel(
        layers, TuckerAdapterConfig(r_in=2, r_out=2, target_modules=["0", "3"], seed=0), "default"
    )
    for name, parameter in model.named_parameters():
        if "core" in name:
            torch.nn.init.constant_(parameter, 0.5)
    return model


def sparse_dictionary(**factory):
    generator = torch.Generator().manual_seed(0)
    D, codes = torch.randn(12, 10, generator=generator), torch.randn(9, 10, generator=generator)
    made = SparseDictionaryLinear.from_codes(D, codes, 4, torch.ones(9))
    made.product = "packed"
    return made.to(**factory)


class RoutedExperts(torch.nn.Module):
    """Experts behind a choice by scores: the checks draw no indices."""

    def __init__(self, **options):
        super().__init__()
        self.experts = MergedExperts(5, 3, 8, 6, **options)

    def forward(self, x, scores):
        top, index = scores.softmax(-1).topk(2)
        return self.experts(x, index, top)


class CompatibleTotal(OrthogonalCompatibleLoss):
    """The loss of tensors alone, one number an item, against each item's likeliest class."""

    def forward(self, logits, compatible):
        out = CompatibleOutput(logits, compatible, logits, compatible)
        return super().forward(out, logits.detach().argmax(dim=-1))["total"]


class BasisTotal(BasisTransformationLoss):
    """The loss of tensors alone, one number an item, against each item's likeliest class."""

    def forward(self, logits, compatible):
        v = compatible[:, :3] / compatible[:, :3].norm(dim=-1, keepdim=True)
        out = BasisTransformationOutput(logits, compatible, v, compatible)
        old = torch.ones_like(compatible)
        return super().forward(out, logits.detach().argmax(dim=-1), old, old[:, :3])["total"]


def logits_and_vectors(batch, generator):
    return torch.randn(batch, 4, generator=generator), torch.randn(batch, 5, generator=generator)


def at_noise(batch, generator):
    return torch.randn(batch, 12, generator=generator), torch.rand(batch, generator=generator) + 0.2


def low_rank_bases():
    return torch.linalg.qr(torch.randn(3, 12, 4, generator=torch.Generator().manual_seed(0)))[0]


def low_rank_layer(rank, *, gain="mean", **kw):
    layer = torch.nn.Linear(9, 7, **kw)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", LowRankOrthogonal(rank, gain=gain))
    return layer


class Joined(torch.nn.Module):
    """A module whose outputs are a tuple, side by side: the checks look at one output."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return torch.cat(self.module(x), dim=-1)


class OfTokens(torch.nn.Module):
    """A module of token ids, fed by floats: the checks draw floats."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module((5 * x.detach()).long().remainder(7))


CASES = {
    "checkpoints.MergedExperts": [ModuleCase(RoutedExperts, normals((8,), (5,)), compiles=False)],
    "checkpoints.SparseDictionaryLinear": [ModuleCase(sparse_dictionary, normal(4, 12))],
    "checkpoints.TuckerAdapterModel": [ModuleCase(adapted, normal(2, 5))],
    "align.BasisTransformationHead": [
        ModuleCase(
            lambda how=how, **kw: Joined(BasisTransformationHead(9, 5, 6, 4, 3, orthogonal_map=how, **kw)), normal(9)
        )
        for how in ("cayley", "matrix-exp", "householder", "retraction")
    ],
    "align.BasisTransformationLoss": [
        ModuleCase(lambda **kw: BasisTotal(torch.eye(5)[:4], reduction="none", **kw), logits_and_vectors)
    ],
    "align.OrthogonalCompatibleHead": [
        ModuleCase(lambda how=how, **kw: OrthogonalCompatibleHead(9, 5, 4, 3, orthogonal_map=how, **kw), normal(9))
        for how in ("cayley", "matrix-exp", "householder", "retraction")
    ],
    "align.OrthogonalCompatibleLoss": [
        ModuleCase(lambda **kw: CompatibleTotal(torch.eye(5)[:4], reduction="none", **kw), logits_and_vectors)
    ],
    "align.PointNetEncoder": [
        ModuleCase(lambda **kw: PointNetEncoder(embedding_dim=5, widths=(6, 8), **kw), normal(7, 3))
    ],
    "align.RelaxedOrthogonalLinear": [
        ModuleCase(lambda **kw: RelaxedOrthogonalLinear(12, 5, **kw), normal(12)),
        ModuleCase(lambda **kw: RelaxedOrthogonalLinear(5, 12, bias=False, **kw), normal(4, 5)),
    ],
    "cluster.CodingRate": [ModuleCase(lambda **kw: CodingRate(**kw), normal(6, 4))],
    "cluster.DoublyStochastic": [ModuleCase(lambda **kw: DoublyStochastic(**kw), unit(6, 4), compiles=False)],
    "cluster.LowRankDenoiser": [
        ModuleCase(lambda **kw: LowRankDenoiser(low_rank_bases(), **kw), at_noise),
        ModuleCase(lambda **kw: LowRankDenoiser(low_rank_bases(), noise_variance=torch.ones(3), **kw), at_noise),
    ],
    "cluster.NestedMatryoshkaHead": [
        ModuleCase(lambda **kw: Joined(NestedMatryoshkaHead(16, 32, hidden=8, bottleneck=6, **kw)), normal(16)),
        ModuleCase(
            lambda **kw: Joined(
                NestedMatryoshkaHead(8, 9, [2, 8], "linear", 8, 6, num_layers=2, normalize=False, **kw)
            ),
            normal(5, 8),
        ),
    ],
    "cluster.RateReductionLoss": [
        ModuleCase(lambda **kw: RateReductionLoss(**kw), with_memberships),
        ModuleCase(lambda **kw: RateReductionLoss(top=3, frobenius=0.1, **kw), with_memberships),
    ],
    "cluster.TotalCodingRateLoss": [ModuleCase(lambda **kw: TotalCodingRateLoss(**kw), unit(6, 4, n=2))],
    "learn.PolynomialSAEModule": [
        ModuleCase(lambda **kw: PolynomialSAEModule(8, 24, 3, (8, 4, 4), **kw), normal(8)),
        ModuleCase(lambda **kw: PolynomialSAEModule(6, 9, 2, order=1, **kw), normal(3, 6)),
    ],
    "learn.UnifiedEmbedding": [
        ModuleCase(lambda **kw: OfTokens(UnifiedEmbedding({"a": 2, "b": 1}, 50, 4, **kw)), normal(2), gradient=False),
        ModuleCase(
            lambda **kw: OfTokens(UnifiedEmbedding({"a": FeatureSpec(2, max_len=3), "b": 1}, 50, 4, scheme="qr", **kw)),
            normal(4),
            gradient=False,
        ),
    ],
    "nn.CRATE": [
        ModuleCase(lambda **kw: CRATE((6, 4), 2, 3, 8, 2, 2, channels=1, **kw), normal(1, 6, 4)),
        ModuleCase(lambda **kw: CRATE(4, 2, 0, 8, 1, 2, pool="mean", causal=True, **kw), normal(3, 4, 4)),
        ModuleCase(
            lambda **kw: CRATE(4, 2, 3, 8, 2, 2, block={"step": "exact", "tied_output": True}, **kw), normal(3, 4, 4)
        ),
    ],
    "nn.CRATEBlock": [
        ModuleCase(lambda **kw: CRATEBlock(8, 2, **kw), normal(5, 8)),
        ModuleCase(lambda **kw: CRATEBlock(8, 2, step="eq10", dict_size=12, residual=True, **kw), normal(5, 8)),
    ],
    "nn.CRATEDecoderBlock": [ModuleCase(lambda **kw: CRATEDecoderBlock(8, 2, **kw), normal(5, 8))],
    "nn.CRATEMAE": [ModuleCase(lambda **kw: CRATEMAE((4, 6), 2, 8, 2, 2, channels=1, **kw), normal(1, 4, 6))],
    "nn.GauntConvolution": [
        ModuleCase(lambda **kw: GauntConvolution("2x0e+2x1o", 2, **kw), normals((8,), (3,))),
        ModuleCase(
            lambda **kw: GauntConvolution("2x0e+2x1o", 1, paths="all", weights="shared", **kw), normals((8,), (3,))
        ),
    ],
    "nn.GauntManyBody": [
        ModuleCase(lambda **kw: GauntManyBody("2x0e+2x1o", correlation=2, **kw), normal(8)),
        ModuleCase(lambda **kw: GauntManyBody("2x0e+2x1o", method="separable", weights="none", **kw), normal(8)),
    ],
    "nn.GauntTensorProduct": [
        ModuleCase(lambda **kw: GauntTensorProduct("2x0e+2x1o", "2x1o+2x2e", **kw), normals((8,), (16,))),
        ModuleCase(
            lambda **kw: GauntTensorProduct("2x0e+2x1o+2x1e", "1x1o", paths="all", weights="per_degree", **kw),
            normals((14,), (3,)),
        ),
        ModuleCase(lambda **kw: GauntTensorProduct("2x2e", "2x1o", method="separable", **kw), normals((10,), (6,))),
        ModuleCase(lambda **kw: GauntTensorProduct("2x2e", "2x1o", method="fourier", **kw), normals((10,), (6,))),
    ],
    "nn.CausalGrassmannMixing": [
        ModuleCase(lambda **kw: CausalGrassmannMixing(8, 4, (1, 3), **kw), normal(5, 8)),
        ModuleCase(lambda **kw: CausalGrassmannMixing(8, 4, (1, 3), norm="none", gate="none", **kw), normal(40, 8)),
        ModuleCase(
            lambda **kw: CausalGrassmannMixing(
                8, 6, (2,), 0.0, "l2", out_proj=True, causal=False, num_heads=2, per_offset_weight=True, **kw
            ),
            normal(6, 8),
        ),
    ],
    "nn.GrassmannBlock": [
        ModuleCase(lambda **kw: GrassmannBlock(8, 4, (1, 2), **kw), normal(5, 8)),
        ModuleCase(lambda **kw: GrassmannBlock(8, 4, (1, 2), norm_first=False, **kw), normal(5, 8)),
    ],
    "nn.GrassmannHead": [
        ModuleCase(lambda **kw: GrassmannHead(12, 5, 3, **kw), normal(12)),
        ModuleCase(lambda **kw: GrassmannHead(12, 5, 3, **kw), normal(4, 12)),
    ],
    "nn.GrassmannLM": [
        ModuleCase(lambda **kw: OfTokens(GrassmannLM(7, 8, 2, 4, (1, 2), **kw)), normal(5), gradient=False),
        ModuleCase(
            lambda **kw: OfTokens(GrassmannLM(7, 8, 2, 4, ((1,), (2,)), positions="none", tied=False, **kw)),
            normal(5),
            gradient=False,
        ),
    ],
    "nn.GrassmannPairHead": [ModuleCase(lambda **kw: GrassmannPairHead(6, 3, 8, 4, **kw), normals((6,), (6,)))],
    "nn.GrassmannSequenceClassifier": [
        ModuleCase(lambda **kw: GrassmannSequenceClassifier(6, 3, 8, 8, offsets=(1, 2), ffn=8, **kw), normal(5, 6)),
    ],
    "nn.HouseholderProjector": [
        ModuleCase(lambda **kw: HouseholderProjector(9, 7, 3, **kw), normal(9)),
        ModuleCase(lambda **kw: HouseholderProjector(5, 5, 5, False, "learned", "random", **kw), normal(4, 5)),
        ModuleCase(lambda **kw: HouseholderProjector(4, 12, 2, gain=0.5, **kw), normal(4)),
    ],
    "nn.LowRankOrthogonal": [
        ModuleCase(lambda **kw: low_rank_layer(3, **kw), normal(9)),
        ModuleCase(lambda **kw: low_rank_layer(7, gain="learned", **kw), normal(4, 9)),
    ],
    "nn.MHSBlock": [
        ModuleCase(lambda **kw: MHSBlock(8, num_heads=2, d_state=3, **kw), normal(3, 4, 8)),
        ModuleCase(lambda **kw: MHSBlock(8, d_state=2, merge="attention", **kw), normal(4, 3, 8)),
    ],
    "nn.MHSUNet": [
        ModuleCase(lambda **kw: MHSUNet(2, 3, (1, 1), (12, 8), d_state=2, drop_path=0.0, **kw), normal(2, 9, 7)),
    ],
    "nn.MultiHeadScan2d": [
        ModuleCase(lambda **kw: MultiHeadScan2d(8, d_state=3, **kw), normal(4, 3, 8)),
        ModuleCase(
            lambda **kw: MultiHeadScan2d(
                7, 2, ("hilbert", "morton"), 2, learn_threshold=True, channels_last=False, uneven="pad", **kw
            ),
            normal(7, 3, 5),
        ),
        ModuleCase(lambda **kw: MultiHeadScan2d(4, 2, merge="sum", with_proj=False, **kw), normal(1, 1, 4)),
    ],
    "nn.SS2DBlock": [ModuleCase(lambda **kw: SS2DBlock(4, d_state=3, **kw), normal(3, 4, 4))],
    "nn.RotationHead": [
        ModuleCase(lambda **kw: RotationHead(12, **kw), normal(12)),
        ModuleCase(lambda **kw: RotationHead(12, "5d", **kw), normal(4, 12)),
        ModuleCase(lambda **kw: RotationHead(12, "9d", **kw), normal(12)),
        ModuleCase(lambda **kw: RotationHead(12, "quaternion", **kw), normal(12)),
        ModuleCase(lambda **kw: RotationHead(12, n=4, **kw), normal(12)),
    ],
    "nn.SparseRateReductionLoss": [
        ModuleCase(lambda **kw: SparseRateReductionLoss(eps2=0.5, **kw), tokens_and_bases),
    ],
    "nn.SparsifyingISTA": [
        ModuleCase(lambda **kw: SparsifyingISTA(8, **kw), normal(5, 8)),
        ModuleCase(lambda **kw: SparsifyingISTA(8, 20, n_steps=2, nonneg=False, residual=True, **kw), normal(5, 8)),
    ],
    "nn.SphericalTransform": [
        ModuleCase(lambda **kw: SphericalTransform(2, **kw), normal(9)),
        ModuleCase(lambda **kw: SphericalTransform(2, 7, method="separable", **kw), normal(3, 9)),
    ],
    "nn.StyleAutoencoder": [ModuleCase(lambda **kw: StyleAutoencoder((4, 3), 5, 8, 2, **kw), normal(4, 3))],
    "nn.StyleGenerator": [ModuleCase(lambda **kw: StyleGenerator((4, 3), 5, 8, 2, **kw), normal(5))],
    "nn.SubspaceSelfAttention": [
        ModuleCase(lambda **kw: SubspaceSelfAttention(8, 2, **kw), normal(5, 8)),
        ModuleCase(lambda **kw: SubspaceSelfAttention(8, 2, 3, step="eq10", causal=True, **kw), normal(5, 8)),
        ModuleCase(lambda **kw: SubspaceSelfAttention(8, 2, 3, step="exact", **kw), normal(5, 8)),
        ModuleCase(lambda **kw: SubspaceSelfAttention(8, 1, 8, tied_output=True, scale=1.0, **kw), normal(3, 8)),
    ],
    "nn.ULSAM": [
        ModuleCase(lambda **kw: ULSAM(12, 3, **kw), normal(12, 5, 4)),
        ModuleCase(lambda **kw: ULSAM(12, 4, bias=True, residual=False, dims=1, **kw), normal(12, 9)),
        ModuleCase(lambda **kw: ULSAM(12, 2, kernel_size=5, norm=False, **kw), normal(12, 6, 6)),
    ],
}


def test_every_module_has_a_case():
    assert set(public_modules()) == set(CASES)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_a_module_keeps_the_promises_of_a_layer(name, case):
    check_module(case)


LAYERS = [(name, case) for name, cases in CASES.items() for case in cases if name.startswith("nn.")]


@pytest.mark.parametrize(("name", "case"), LAYERS)
def test_a_layer_on_meta_makes_what_it_makes_of_numbers(name, case):
    """Shapes and dtype of it are all there is on "meta", where networks are laid out and counted before they exist."""

    def made(device):
        out = case.make(device=device, dtype=torch.float32).eval()(
            *(x.to(device, torch.float32) for x in case.inputs(2, torch.Generator().manual_seed(2)))
        )
        first = out[0] if isinstance(out, tuple) else out
        return first.device.type, first.shape, first.dtype

    with torch.random.fork_rng(devices=[]):
        assert made("meta") == ("meta", *made("cpu")[1:])
