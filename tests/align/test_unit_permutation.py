"""A network whose units change places computes the same, and changes back bit by bit."""

import numpy as np
import pytest
import torch
from torch import nn

from polyspan.align import match_units
from polyspan.align.unit_permutation import UnitAxis, complete_matching, permute_network, sequential_unit_spec


def mlp():
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Sequential(nn.Linear(7, 6), nn.PReLU(6)), nn.Linear(6, 3)
    )


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        nn.MaxPool2d(2),
        nn.ConvTranspose2d(6, 5, 2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * 5 * 4, 8),
        nn.LayerNorm(8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )


NETWORKS = {"mlp": (mlp, (4, 5)), "convnet": (convnet, (4, 2, 8, 6))}


def trained(make, shape, seed=0):
    """Return a network with statistics and scales of batch norm that differ from unit to unit."""
    torch.manual_seed(seed)
    model = make().double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    model(torch.randn(16, *shape[1:], dtype=torch.float64))
    return model.eval()


def orders_of(model, spec, seed=1):
    rng, state = np.random.default_rng(seed), model.state_dict()
    return {name: rng.permutation(state[axes[0].tensor].shape[axes[0].axis]) for name, axes in spec.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_the_inverse_gives_back_the_bits(name):
    make, shape = NETWORKS[name]
    model, other = trained(make, shape), trained(make, shape, seed=5)
    X = torch.randn(shape, dtype=torch.float64)
    spec = sequential_unit_spec(model)
    orders = orders_of(model, spec)
    permuted = permute_network(model.state_dict(), spec, orders)
    moved = {n for n, v in model.state_dict().items() if not torch.equal(v, permuted[n])}
    assert {axis.tensor for axes in spec.values() for axis in axes} == moved
    other.load_state_dict(permuted)
    torch.testing.assert_close(other(X), model(X), rtol=1e-12, atol=1e-12)
    back = permute_network(permuted, spec, {n: np.argsort(o) for n, o in orders.items()})
    for n, value in model.state_dict().items():
        assert torch.equal(back[n], value), n
    # every axis counts: with one left out the function is another
    for group, axes in spec.items():
        for left_out in axes:
            partial = {**spec, group: [axis for axis in axes if axis != left_out]}
            other.load_state_dict(permute_network(model.state_dict(), partial, orders))
            assert (other(X) - model(X)).abs().max() > 1e-6, left_out


def test_units_come_in_the_order_of_the_first_network_and_numpy_agrees():
    model = trained(*NETWORKS["mlp"])
    spec = sequential_unit_spec(model)
    assert list(spec) == ["0", "3.0"]
    state = {n: v.numpy() for n, v in model.state_dict().items()}
    orders = orders_of(model, spec)
    shuffled = permute_network(state, spec, orders)
    X = np.random.default_rng(2).standard_normal((50, 5))
    A, B = (X @ s["0.weight"].T + s["0.bias"] for s in (state, shuffled))
    matching = match_units(np.corrcoef(A.T, B.T)[:7, 7:])
    found = permute_network(shuffled, {"0": spec["0"]}, matching)
    np.testing.assert_array_equal(found["0.weight"], state["0.weight"])
    np.testing.assert_array_equal(found["1.running_var"], state["1.running_var"])
    np.testing.assert_array_equal(found["3.0.bias"], shuffled["3.0.bias"])
    torch_side = permute_network(model.state_dict(), spec, orders)
    for n, value in shuffled.items():
        np.testing.assert_array_equal(value, torch_side[n].numpy())


def test_dead_units_are_paired_with_what_is_left():
    between = np.array([[0.1, 0.9, np.nan], [np.nan] * 3, [0.8, 0.2, np.nan]])
    matching = match_units(between)
    np.testing.assert_array_equal(matching.indices, [1, -1, 0])
    np.testing.assert_array_equal(complete_matching(matching), [1, 2, 0])
    with pytest.raises(ValueError, match="one to one"):
        complete_matching([0, 0, -1])
    with pytest.raises(ValueError, match=r"in 0\.\.2, got 0 to 3"):
        complete_matching([0, 3, 1])


def test_tied_tensors_move_once_and_stay_tied():
    W = np.arange(6.0).reshape(3, 2)
    state = {"a": W, "b": W, "c": np.arange(3.0)}
    both = permute_network(state, {"u": [("a", 0), ("b", 0), ("c", 0)]}, [2, 0, 1])
    assert both["a"] is both["b"]
    np.testing.assert_array_equal(both["a"], W[[2, 0, 1]])
    for spec in ({"u": [("a", 0)], "v": [("b", 0)]}, {"u": [("a", 0), ("c", 0)]}):
        with pytest.raises(ValueError, match="tied tensors 'a' and 'b'"):
            permute_network(state, spec, {"u": [2, 0, 1]})
    shared = nn.Linear(4, 4)
    twice = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r"tied tensors '0.weight' and '2.weight'"):
        permute_network(twice.state_dict(), sequential_unit_spec(twice), {"0": [1, 0, 2, 3]})


STATE = {"w": np.zeros((3, 2)), "b": np.zeros(3), "v": np.zeros((2, 6))}
AXES = [("w", 0), ("b", 0), ("v", 1, 2)]
BAD = {
    "partial": (AXES, [0, -1, 2], "got 1 of 3 without"),
    "shared partner": (AXES, [0, 0, 2], "permutation of 0..2, got 2 different"),
    "short": (AXES, [1, 0], "one index a unit, got 2 for axis 0 of 'w' with 3"),
    "floats": (AXES, [0.0, 1.0, 2.0], "int array"),
    "size": ([("w", 0), ("v", 1)], [0, 1, 2], "must all have 3 units, got 6 entries in blocks of 1"),
    "block": ([("w", 0), ("v", 1, 4)], [0, 1, 2], "got 6 entries in blocks of 4"),
    "missing": ([("w", 0), ("x", 0)], [0, 1, 2], "names tensor 'x' in 'u', which state does not hold"),
    "axis": ([("b", 1)], [0, 1, 2], r"fit its shape \(3,\), got 1"),
    "twice": ([("b", 0), ("b", -1)], [0, 1, 2], "axis 0 of 'b' once"),
    "unknown layer": (AXES, {"z": [0, 1, 2]}, "must name layers of spec"),
    "no axis": ([("b",)], [0, 1, 2], "must hold"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_what_was_wrong(name):
    axes, matching, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        permute_network(STATE, {"u": axes}, matching)


def test_spec_of_layers_that_are_not_known():
    for layers, message in (
        ([nn.Linear(2, 4), nn.GroupNorm(2, 4)], "units are known"),
        ([nn.Conv2d(2, 4, 1, groups=2)], "groups=1 or be depthwise"),
        ([nn.Conv2d(2, 4, 1), nn.Linear(4, 2)], "flatten"),
        ([nn.Linear(2, 4), nn.Linear(5, 2)], "must take 4 entries of '0', got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            sequential_unit_spec(nn.Sequential(*layers))
    with pytest.raises(ValueError, match=r"nn\.Sequential, got Linear"):
        sequential_unit_spec(nn.Linear(2, 2))
    spec = sequential_unit_spec(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2)), prefix="encoder.")
    assert spec == {"encoder.0": [("encoder.0.weight", 0, 1), ("encoder.0.bias", 0, 1), ("encoder.1.weight", 1, 1)]}
    assert isinstance(spec["encoder.0"][0], UnitAxis)
