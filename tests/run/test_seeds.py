import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyspan.run import layers_draw_from, numpy_generator, spawn_seeds, torch_generator


@settings(max_examples=20)
@given(seed=st.integers(0, 2**40), n=st.integers(1, 40), more=st.integers(0, 40))
def test_seeds_are_those_of_seed_sequence_and_more_of_them_begin_the_same(seed, n, more):
    literal = [int(child.generate_state(1, np.uint32)[0]) for child in np.random.SeedSequence(seed).spawn(n)]
    assert spawn_seeds(seed, n) == literal
    assert spawn_seeds(seed, n + more)[:n] == literal


def test_neighbouring_seeds_share_no_child_and_all_fit_scikit_learn():
    first, second = spawn_seeds(0, 500), spawn_seeds(1, 500)
    assert len({*first, *second}) == 1000
    assert all(0 <= seed < 2**32 for seed in first + second)


def test_generators_repeat_and_leave_the_global_ones_alone():
    numpy_before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    assert numpy_generator(3).random() == numpy_generator(3).random() != numpy_generator(4).random()
    draws = [torch.rand(4, generator=torch_generator(seed)) for seed in (3, 3, 4)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_before)


def test_a_generator_passes_through():
    rng = np.random.default_rng(0)
    assert numpy_generator(rng) is rng


def test_no_seeds_are_no_seeds_and_negative_numbers_are_refused():
    assert spawn_seeds(0, 0) == []
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        spawn_seeds(-1, 2)
    with pytest.raises(ValueError, match="n must be at least 0, got -2"):
        spawn_seeds(1, -2)


def test_layers_draw_from_a_generator_that_goes_on_and_the_global_one_is_as_before():
    before = torch.get_rng_state()
    generator, twin = torch_generator(5), torch_generator(5)
    with layers_draw_from(generator):
        first, second = torch.nn.Linear(3, 2).weight, torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)
    with layers_draw_from(twin):
        assert torch.equal(torch.nn.Linear(3, 2).weight, first)
    assert torch.equal(torch.rand(4, generator=twin), second)
    assert torch.equal(generator.get_state(), twin.get_state())
    with pytest.raises(RuntimeError, match="stop"), layers_draw_from(generator):
        raise RuntimeError("stop")
    assert torch.equal(torch.get_rng_state(), before)
