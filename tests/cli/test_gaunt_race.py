import importlib.util
import json
import math
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from cyclopts import App

from polyspan import nn
from polyspan.cli.gaunt import race
from polyspan.errors import MissingExtra

SMALL = "2x0e+2x1o"
installed = pytest.mark.skipif(importlib.util.find_spec("e3nn") is None, reason="e3nn is not installed")


FORWARD = nn.GauntTensorProduct.forward


class Twin(torch.nn.Module):
    """In place of e3nn's product, which takes a second to build: our own, changed as a test wants it."""

    def __init__(self, product, scale=1.0, called=lambda: None):
        super().__init__()
        self.product, self.scale, self.called = product, scale, called
        for name in ("irreps_in1", "irreps_in2", "irreps_out"):
            parts = [part.partition("x") for part in getattr(product, name).split("+")]
            dim = sum(int(mul) * (2 * int(irrep[:-1]) + 1) for mul, _, irrep in parts)
            setattr(self, name, SimpleNamespace(dim=dim))

    def forward(self, x, y):
        self.called()
        return self.scale * FORWARD(self.product, x, y)


def changed(monkeypatch, **how):
    monkeypatch.setattr(nn, "equivalent_e3nn_product", lambda product: Twin(product, **how))


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for one another on a busy machine take longer than these small products."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only where it is said to."""
    passed = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: passed[0])

    def spend(seconds):
        passed[0] += seconds

    return spend


@installed
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-12)])
@pytest.mark.parametrize("paths", ["even", "all"])
def test_products_that_are_equal_are_timed(capsys, dtype, tolerance, paths):
    methods = ["dense", "separable"]
    code = race(SMALL, SMALL, method=methods, paths=paths, dtype=dtype, rows=3, repeats=2, json=True)
    said = json.loads(capsys.readouterr().out)
    assert code == 0
    assert (said["rows"], said["dtype"], said["device"]) == (3, dtype, "cpu")
    assert [row["method"] for row in said["races"]] == methods
    for row in said["races"]:
        assert row["degree"] == 1
        assert row["irreps_out"] == nn.GauntTensorProduct(SMALL, SMALL, paths=paths).irreps_out
        assert row["difference"] <= tolerance
        for kind in ("forward", "forward_and_backward"):
            timed = row[kind]
            assert timed["ours_s"] > 0
            assert timed["e3nn_s"] > 0
            assert timed["least_ratio"] <= timed["ratio"] <= timed["greatest_ratio"]


def test_a_product_that_differs_from_e3nns_is_said_and_not_timed(capsys, monkeypatch):
    changed(monkeypatch, scale=1.001)
    assert race(SMALL, SMALL, "2x0e", rows=3, repeats=1, json=True) == 1
    told = capsys.readouterr()
    (row,) = json.loads(told.out)["races"]
    assert row["difference"] == pytest.approx(0.001 / 1.001, rel=0.01)
    assert not row["equal"]
    assert "forward" not in row
    assert "differs from e3nn by more than 1e-05 and was not timed: auto at degree 1" in told.err
    assert race(SMALL, SMALL, "2x0e", rows=3, repeats=1) == 1
    assert capsys.readouterr().out.splitlines()[1].split("\t")[3:] == ["-"] * 6


@pytest.mark.parametrize("factor", [0.5, torch.nan])
def test_a_gradient_that_differs_is_found_too(capsys, monkeypatch, factor):
    changed(monkeypatch)

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            return factor * grads[0]

    monkeypatch.setattr(nn.GauntTensorProduct, "forward", lambda self, x, y: FORWARD(self, Scaled.apply(x), y))
    assert race(SMALL, SMALL, rows=3, repeats=1, json=True) == 1
    (row,) = json.loads(capsys.readouterr().out)["races"]
    assert row["difference"] == (None if math.isnan(factor) else pytest.approx(0.5, rel=0.01))
    assert not row["equal"]


def test_a_ratio_is_the_time_of_e3nn_over_ours(capsys, monkeypatch, clock):
    changed(monkeypatch, called=lambda: clock(3.0))
    monkeypatch.setattr(nn.GauntTensorProduct, "forward", lambda self, x, y: (clock(2.0), FORWARD(self, x, y))[1])
    race(SMALL, SMALL, rows=3, repeats=2, json=True)
    (row,) = json.loads(capsys.readouterr().out)["races"]
    expected = {"ours_s": 2.0, "e3nn_s": 3.0, "ratio": 1.5, "least_ratio": 1.5, "greatest_ratio": 1.5}
    assert row["forward"] == row["forward_and_backward"] == expected
    race(SMALL, SMALL, rows=3, repeats=2)
    lines = capsys.readouterr().out.splitlines()
    names, cells = lines[0].split("\t"), lines[1].split("\t")
    assert len(set(names)) == len(names) == len(cells)
    assert cells[3:6] == cells[6:] == ["2000.000", "3000.000", "1.50 (1.50 to 1.50)"]


@pytest.mark.parametrize("out", [None, "2x0e+2x2e"])
def test_by_degree_it_is_said_from_which_degree_a_method_is_faster(capsys, monkeypatch, clock, out):
    """Ours takes 5, 3 and 1 s at degrees 0, 1 and 2, or, separable, always 5; e3nn takes 4 s."""
    irreps = "2x0e+2x1o+2x2e"
    changed(monkeypatch, called=lambda: clock(4.0))

    def forward(self, x, y):
        degree = self.irreps_in1.count("+")
        clock(5.0 if self.methods[0] == "separable" else 5.0 - 2 * degree)
        return FORWARD(self, x, y)

    monkeypatch.setattr(nn.GauntTensorProduct, "forward", forward)
    how = {"method": ["dense", "separable"], "by_degree": True, "rows": 3, "repeats": 1}
    race(irreps, irreps, out, json=True, **how)
    said = json.loads(capsys.readouterr().out)
    assert [(row["degree"], row["method"]) for row in said["races"]] == [
        (degree, method) for degree in range(3) for method in how["method"]
    ]
    assert [row["irreps_in1"] for row in said["races"][::2]] == ["2x0e", SMALL, irreps]
    outputs = ["2x0e", "2x0e+2x1o+2x2e", "2x0e+2x1o+2x2e+2x3o+2x4e"] if out is None else ["2x0e", out, out]
    assert [row["irreps_out"] for row in said["races"][::2]] == outputs
    expected = {"dense": 1, "separable": None}
    assert said["faster_from_degree"] == {"forward": expected, "forward_and_backward": expected}
    race(irreps, irreps, out, **how)
    lines = capsys.readouterr().out.splitlines()
    assert "dense faster both ways\tfrom degree 1" in lines
    assert "separable faster forward\tat no degree" in lines


@pytest.mark.parametrize(
    ("given", "how", "message"),
    [
        (("2y0e", SMALL), {}, "irreps_in1 must be irreps such as '8x0e.8x1o', got '2y0e'"),
        ((SMALL, "2x0e+3x1o"), {}, "irreps_in2 must have one multiplicity for all irreps, got 3x1o beside 2x0e"),
        ((SMALL, "3x0e"), {}, "irreps_in2 must have the multiplicity of irreps_in1, 2, .* got 3"),
        ((SMALL, "1x0e"), {}, "irreps_in1 and irreps_in2 must have one multiplicity, got 2 and 1"),
        ((SMALL, SMALL, "2x1e"), {}, "irreps_out .*1e"),
        ((SMALL, SMALL), {"rows": 0}, "--rows must be at least 1, got 0"),
        ((SMALL, SMALL), {"repeats": 0}, "--repeats must be at least 1, got 0"),
        ((SMALL, SMALL), {"device": "moon"}, "device must be 'auto' or one that torch knows, .* got 'moon'"),
    ],
)
def test_what_cannot_be_raced_is_told(given, how, message):
    with pytest.raises(ValueError, match=message):
        race(*given, **how)


def test_without_e3nn_it_is_said_how_to_get_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "e3nn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "e3nn", None)
    with pytest.raises(MissingExtra, match=r'the product of e3nn needs e3nn.o3; run: pip install "polyspan\[equi'):
        race(SMALL, SMALL)


@installed
def test_the_command_line_knows_the_options_by_their_names(capsys):
    app = App()
    app.command(race, name="race")
    words = ["race", SMALL, SMALL, "2x0e", "--method", "dense", "--by-degree", "--rows", "2", "--repeats", "1"]
    assert app(words, exit_on_error=False, print_error=False, result_action="return_value") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[:2] for line in lines[:3]] == [["degree", "method"], ["0", "dense"], ["1", "dense"]]
    assert "irreps out\t2x0e" in lines
