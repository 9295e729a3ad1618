"""Race the conversions of rotations against RoMa, SciPy and batched SVD, at two sizes.

Ours look at what they are given (finite, well defined, a rotation) unless it says otherwise; the others do not. The
errors of distances at both ends are kept as well: it is there that formulas for them differ.

The system is the catalogue's ``rotation-continuity``.
"""

import numpy as np
import roma
import torch
from scipy.spatial.transform import Rotation

from _runner import growth, peaks, race, save
from polyspan.nn import (
    axis_angle_to_matrix,
    chordal_loss,
    euler_to_matrix,
    geodesic_distance,
    matrix_to_axis_angle,
    matrix_to_euler,
    matrix_to_quaternion,
    matrix_to_rotation6d,
    random_rotation,
    rotation6d_to_matrix,
    rotation9d_to_matrix,
)

SIZES = (20_000, 200_000)
# Calls of a tenth of a millisecond settle after some ten; every arm is given them.
ROUNDS = {"repeats": 15, "warmup": 10}


def literal_6d(x):
    """The published map with its clamp, step by step."""
    a, b = x[:, :3], x[:, 3:]
    first = a / a.norm(dim=1, keepdim=True).clamp(min=1e-8)
    third = torch.linalg.cross(first, b)
    third = third / third.norm(dim=1, keepdim=True).clamp(min=1e-8)
    return torch.stack([first, torch.linalg.cross(third, first), third], dim=-1)


def svd_rotation(M):
    U, _, Vh = torch.linalg.svd(M)
    sign = torch.linalg.det(U @ Vh)
    return torch.cat([U[..., :-1], U[..., -1:] * sign[:, None, None]], dim=-1) @ Vh


def numpy_svd_rotation(M):
    U, _, Vh = np.linalg.svd(M)
    U[..., -1] *= np.linalg.det(U @ Vh)[:, None]
    return U @ Vh


def backward(function, x, target):
    def run():
        free = x.clone().requires_grad_()
        chordal_loss(function(free), target).backward()
        return free.grad

    return run


def training(n):
    """Loss and gradient from 6D by every way."""
    g = torch.Generator().manual_seed(0)
    x, R = torch.randn(n, 6, generator=g), random_rotation(rng=g, batch=(n,))
    return gradients(x, R)


def gradients(x, R):
    return {
        "ours": backward(rotation6d_to_matrix, x, R),
        "RoMa": backward(lambda y: roma.special_gramschmidt(y.reshape(len(y), 2, 3).mT), x, R),
        "published": backward(literal_6d, x, R),
    }


def torch_races(n):
    g = torch.Generator().manual_seed(0)
    size = {"rotations": n}
    x, M = torch.randn(n, 6, generator=g), torch.randn(n, 3, 3, generator=g)
    R, S = (random_rotation(rng=g, batch=(n,)) for _ in range(2))
    columns = x.reshape(n, 2, 3).mT
    return [
        race(
            "6D to matrix, torch",
            {
                "ours": lambda: rotation6d_to_matrix(x),
                "ours, without looking": lambda: rotation6d_to_matrix(x, check=False),
                "RoMa": lambda: roma.special_gramschmidt(columns),
                "published": lambda: literal_6d(x),
            },
            size=size,
            **ROUNDS,
        ),
        race(
            "6D to matrix, loss and gradient, torch",
            gradients(x, R),
            size=size,
            **ROUNDS,
        ),
        race(
            "nearest rotation, torch",
            {
                "ours": lambda: rotation9d_to_matrix(M.flatten(1)),
                "RoMa": lambda: roma.special_procrustes(M),
                "batched SVD": lambda: svd_rotation(M),
            },
            size=size,
            **ROUNDS,
        ),
        race(
            "matrix to quaternion, torch",
            {
                "ours": lambda: matrix_to_quaternion(R, order="xyzw", check=False),
                "RoMa": lambda: roma.rotmat_to_unitquat(R),
            },
            size=size,
            **ROUNDS,
        ),
        race(
            "matrix to axis-angle, torch",
            {
                "ours": lambda: matrix_to_axis_angle(R, check=False),
                "RoMa": lambda: roma.rotmat_to_rotvec(R),
            },
            size=size,
            **ROUNDS,
        ),
        race(
            "distance, torch",
            {
                "ours": lambda: geodesic_distance(R, S),
                "RoMa": lambda: roma.rotmat_geodesic_distance(R, S),
                "arc cosine of the trace": lambda: torch.acos((((R * S).sum((-2, -1)) - 1) / 2).clamp(-1, 1)),
            },
            size=size,
            **ROUNDS,
        ),
    ]


def numpy_races(n):
    size = {"rotations": n}
    rng = np.random.default_rng(0)
    R = random_rotation(rng=rng, batch=(n,))
    x, M = matrix_to_rotation6d(R), rng.normal(size=(n, 3, 3)).astype(np.float32)
    angles = matrix_to_euler(R, sequence="XYZ")
    return [
        race(
            "matrix to quaternion, NumPy",
            {
                "ours": lambda: matrix_to_quaternion(R, order="xyzw"),
                "SciPy": lambda: Rotation.from_matrix(R).as_quat(),
            },
            size=size,
            **ROUNDS,
        ),
        race(
            "matrix to Euler angles, NumPy",
            {
                "ours": lambda: matrix_to_euler(R, sequence="XYZ"),
                "SciPy": lambda: Rotation.from_matrix(R).as_euler("XYZ"),
            },
            size=size,
            **ROUNDS,
        ),
        race(
            "Euler angles to matrix, NumPy",
            {
                "ours": lambda: euler_to_matrix(angles, sequence="XYZ"),
                "SciPy": lambda: Rotation.from_euler("XYZ", angles).as_matrix(),
            },
            size=size,
            **ROUNDS,
        ),
        race(
            "6D to matrix, NumPy",
            {
                "ours": lambda: rotation6d_to_matrix(x),
                "batched QR": lambda: np.linalg.qr(x.reshape(n, 2, 3).swapaxes(1, 2)),
            },
            size=size,
            **ROUNDS,
        ),
        race(
            "nearest rotation, NumPy float32",
            {
                "ours": lambda: rotation9d_to_matrix(M.reshape(n, 9)),
                "batched SVD": lambda: numpy_svd_rotation(M),
            },
            size=size,
            **ROUNDS,
        ),
    ]


def small_angle_error():
    """Relative error of a float32 distance at one hundredth of a degree, ours and by the arc cosine."""
    angle = np.deg2rad(0.01)
    R = random_rotation(rng=np.random.default_rng(0), batch=(1000,))
    c, s = np.cos(angle), np.sin(angle)
    S = (R @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])).astype(np.float32)
    R = R.astype(np.float32)
    cosine = np.clip(((R * S).sum((-2, -1)) - 1) / 2, -1, 1)
    return {
        "ours": float(np.abs(geodesic_distance(R, S) / angle - 1).max()),
        "arc cosine": float(np.abs(np.arccos(cosine) / angle - 1).max()),
    }


def half_turn_error():
    """Largest error, in radians, of float32 distances from 2.1 to half a turn, ours and from the chord alone."""
    angles = np.pi - np.logspace(-6, 0, 10_000)
    rng = np.random.default_rng(0)
    R, axes = random_rotation(rng=rng, batch=(10_000,)), rng.normal(size=(10_000, 3))
    axes = axes / np.linalg.norm(axes, axis=1, keepdims=True)
    S = torch.tensor(R @ axis_angle_to_matrix(angles[:, None] * axes)).float()
    R = torch.tensor(R).float()
    return {
        "ours": float((geodesic_distance(R, S) - torch.tensor(angles)).abs().max()),
        "RoMa": float((roma.rotmat_geodesic_distance(R, S) - torch.tensor(angles)).abs().max()),
    }


def main():
    torch.set_num_threads(1)
    by_size = [torch_races(n) + numpy_races(n) for n in SIZES]
    save(
        "rotation",
        [record for records in by_size for record in records],
        growth={pair[0]["name"]: growth(pair, "rotations") for pair in zip(*by_size, strict=True)},
        peak_bytes_of_loss_and_gradient={
            str(n): peaks(f"from rotation import training\narms = training({n})") for n in SIZES
        },
        small_angle_error=small_angle_error(),
        half_turn_error=half_turn_error(),
    )


if __name__ == "__main__":
    main()
