import numpy as np
import pytest
import torch
from torch import nn

from polyspan.checkpoints import TaskVector, merge_geometry, task_arithmetic


def states(*changes, shape=(600, 700)):
    base = {"w": torch.randn(shape, generator=torch.Generator().manual_seed(0)), "steps": torch.tensor(3)}
    return base, {f"t{i}": {**base, "w": base["w"] + change} for i, change in enumerate(changes)}


def test_cosines_and_lengths_are_those_of_whole_task_vectors():
    generator = torch.Generator().manual_seed(1)
    base, tuned = states(*torch.randn(3, 600, 700, generator=generator))
    found = merge_geometry(base, tuned, task_arithmetic(base, tuned))
    vectors = [TaskVector(base, state) for state in tuned.values()]
    np.testing.assert_allclose(found.cosines, [[a.cosine(b) for b in vectors] for a in vectors], atol=1e-6)
    np.testing.assert_allclose(found.lengths[:, 0], [v.norm() for v in vectors], rtol=1e-6)
    assert (found.tasks, found.names) == (["t0", "t1", "t2"], ["w"])


def test_orthogonal_changes_are_carried_by_as_much_as_they_were_scaled():
    left, right = torch.zeros(2, 40, 30)
    left[:20], right[20:] = 1, 2
    base, tuned = states(left, right, shape=(40, 30))
    found = merge_geometry(base, tuned, task_arithmetic(base, tuned, scaling=0.5, weights=[1, 0.4]))
    np.testing.assert_allclose(found.carried[:, 0], [0.5, 0.2], atol=1e-6)
    np.testing.assert_allclose(found.cosines, np.eye(2), atol=1e-7)


def test_a_task_that_changed_nothing_has_no_angle():
    base, tuned = states(torch.zeros(4, 3), torch.ones(4, 3), shape=(4, 3))
    found = merge_geometry(base, tuned, tuned["t1"])
    assert np.isnan(found.cosines[0]).all()
    assert np.isnan(found.carried[0, 0])
    assert found.carried[1, 0] == pytest.approx(1, abs=1e-6)


def test_running_statistics_take_no_part_and_nothing_to_compare_is_an_error():
    net = nn.BatchNorm1d(3)
    assert merge_geometry(net, [net], net).names == ["weight", "bias"]
    with pytest.raises(ValueError, match="base must have floating-point weights to compare, got none"):
        merge_geometry({"n": torch.tensor(1)}, [{"n": torch.tensor(2)}], {"n": torch.tensor(1)})
    with pytest.raises(ValueError, match=r"finetuned\['merged'\] must have the names and shapes of base"):
        merge_geometry(net, [net], {})
