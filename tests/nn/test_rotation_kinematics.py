import numpy as np
import pytest
import torch

from polyspan.nn import axis_angle_to_matrix, matrix_to_rotation6d, random_rotation, rotation6d_to_matrix
from polyspan.nn.rotation_kinematics import forward_kinematics

PARENTS = (-1, 0, 1, 1, 3, 0)


def body(seed=0, batch=(4,), dtype=np.float64):
    rng = np.random.default_rng(seed)
    R = random_rotation(rng=rng, batch=(*batch, len(PARENTS)))
    return R.astype(dtype), rng.normal(size=(len(PARENTS), 3)).astype(dtype)


def by_homogeneous_matrices(R, offsets):
    """One item: 4 x 4 matrices multiplied from the root to each joint."""
    places = []
    for i in range(len(PARENTS)):
        chain = []
        k = i
        while k >= 0:
            chain.insert(0, k)
            k = PARENTS[k]
        T = np.eye(4)
        for k in chain:
            step = np.eye(4)
            step[:3, :3], step[:3, 3] = R[k], offsets[k]
            T = T @ step
        places.append(T[:3, 3])
    return np.stack(places)


def test_positions_are_those_of_homogeneous_matrices_multiplied_along_the_limbs():
    R, offsets = body()
    made = forward_kinematics(R, offsets, PARENTS)
    np.testing.assert_allclose(made, np.stack([by_homogeneous_matrices(r, offsets) for r in R]), atol=1e-12)
    torch.testing.assert_close(
        forward_kinematics(torch.tensor(R), torch.tensor(offsets), PARENTS), torch.tensor(made), atol=1e-12, rtol=0
    )
    # Bodies of their own, and a batch that bones add.
    each = offsets * np.arange(1.0, 5.0)[:, None, None]
    np.testing.assert_allclose(
        forward_kinematics(R, each, PARENTS)[2], forward_kinematics(R[2], each[2], PARENTS), atol=1e-12
    )
    assert forward_kinematics(R[0], each, PARENTS).shape == (4, 6, 3)
    assert forward_kinematics(R[:0], offsets, PARENTS).shape == (0, 6, 3)


def test_turning_the_root_turns_the_body_and_bones_keep_their_lengths():
    R, offsets = body(1)
    turn = random_rotation(rng=np.random.default_rng(5))
    turned = R.copy()
    turned[:, 0] = turn @ R[:, 0]
    before, after = (forward_kinematics(r, offsets, PARENTS) for r in (R, turned))
    np.testing.assert_allclose(after - offsets[0], (before - offsets[0]) @ turn.T, atol=1e-12)
    for i, parent in list(enumerate(PARENTS))[1:]:
        lengths = np.linalg.norm(before[:, i] - before[:, parent], axis=-1)
        np.testing.assert_allclose(lengths, np.linalg.norm(offsets[i]), atol=1e-12)


def test_the_turn_of_a_last_joint_moves_nothing():
    R, offsets = body(2)
    moved = R.copy()
    moved[:, [2, 4, 5]] = body(3)[0][:, [2, 4, 5]]
    np.testing.assert_array_equal(forward_kinematics(R, offsets, PARENTS), forward_kinematics(moved, offsets, PARENTS))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, ">f8", np.int64])
def test_other_widths_are_computed_in_single_or_double(dtype):
    R, offsets = body(4)
    if dtype == np.int64:
        R, offsets = np.rint(R), np.rint(offsets)
    given = R.astype(dtype), offsets.astype(dtype)
    made = forward_kinematics(*given, PARENTS)
    expected = forward_kinematics(*(x.astype(np.float64) for x in given), PARENTS)
    assert made.dtype == (np.float64 if np.dtype(dtype).itemsize == 8 else dtype)
    np.testing.assert_allclose(made, expected, atol={np.float16: 2e-2, np.float32: 1e-5}.get(dtype, 1e-12))


def test_derivatives_are_true_through_representations_backward_forward_and_batched():
    _, offsets = body(6)
    x = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bones = torch.tensor(offsets)

    def places(x):
        return forward_kinematics(rotation6d_to_matrix(x, check=False), bones, PARENTS)

    assert torch.autograd.gradcheck(places, (x.requires_grad_(),), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(places, (x,), fast_mode=True)
    torch.testing.assert_close(torch.vmap(places)(x), places(x))


def test_a_pose_near_by_is_found_from_positions_by_descent():
    generator = torch.Generator().manual_seed(0)
    R, offsets = (torch.tensor(part) for part in body(7, batch=(3,)))
    goal = forward_kinematics(R, offsets, PARENTS)
    x = matrix_to_rotation6d(R) + 0.3 * torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    optimiser = torch.optim.LBFGS([x], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        found = forward_kinematics(rotation6d_to_matrix(x), offsets, PARENTS)
        total = (found - goal).square().sum()
        total.backward()
        return total

    assert loss() > 0.1
    optimiser.step(loss)
    assert loss() < 1e-6


def test_bodies_that_do_not_fit_together_are_named():
    R, offsets = body()
    for args, words in (
        ((R, offsets[:5], PARENTS), r"rotations must be \(\*b, 6, 3, 3\) and offsets \(\*b, 6, 3\) for 6 parents"),
        ((R[..., 0], offsets, PARENTS), r"got shapes \(4, 6, 3\) and \(6, 3\)"),
        ((R, offsets, ()), "for 0 parents, at least 1"),
        ((R, offsets, (0, 0, 1, 1, 3, 0)), "parents must be -1 for joint 0 .* got 0 for joint 0"),
        ((R, offsets, (-1, 0, 2, 1, 3, 0)), "an earlier joint for each other, got 2 for joint 2"),
        ((R, offsets, (-1, 0, 1, -1, 3, 0)), "got -1 for joint 3"),
    ):
        with pytest.raises(ValueError, match=words):
            forward_kinematics(*args)
    with pytest.raises(TypeError, match="expected arrays of one kind"):
        forward_kinematics(torch.tensor(R), offsets, PARENTS)
    straight = forward_kinematics(axis_angle_to_matrix(np.zeros((6, 3))), offsets, PARENTS)
    np.testing.assert_allclose(straight[4], offsets[[0, 1, 3, 4]].sum(axis=0), atol=1e-15)
