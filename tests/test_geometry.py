"""sources/geometry.py: rotations, cameras, projection."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sources.geometry import (
    make_cameras,
    project,
    quat_from_rotvec,
    quat_mul,
    quat_to_matrix,
    rotation_between,
    slerp,
)

CAMERAS = make_cameras(np.random.default_rng(0))
seeds = st.integers(0, 10_000)


def random_quats(rng, *shape):
    q = rng.normal(size=(*shape, 4))
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda c: c["id"])
def test_projection_equals_a_formula_written_point_by_point(camera):
    (k1, k2, k3), (p1, p2), (fx, fy), (cx, cy) = camera["k"], camera["p"], camera["f"], camera["c"]
    rng = np.random.default_rng(0)
    points = rng.uniform([-1500, -1500, 3000], [1500, 1500, 7000], (50, 3))
    for (X, Y, Z), (u, v) in zip(points, project(points, camera), strict=True):
        x, y = X / Z, Y / Z
        r2 = x**2 + y**2
        factor = 1 + k1 * r2 + k2 * r2**2 + k3 * r2**3 + p1 * x + p2 * y
        assert u == pytest.approx(fx * (x * factor + p1 * r2) + cx, abs=1e-9)
        assert v == pytest.approx(fy * (y * factor + p2 * r2) + cy, abs=1e-9)


def test_cameras_look_at_the_person_from_where_human36m_does():
    for camera in CAMERAS:
        R, t = np.array(camera["R"]), np.array(camera["t"])
        assert np.allclose(R @ R.T, np.eye(3)) and np.linalg.det(R) == pytest.approx(1)
        x, y, height = -R.T @ t
        assert 4700 <= np.hypot(x, y) <= 5500 and 1400 <= height <= 1700
        head, feet = (project(R @ [0, 0, z] + t, camera) for z in (1700.0, 0.0))
        assert feet[1] > head[1] + 300  # y points down in the image
        assert project(R @ [0, 0, 900.0] + t, camera) == pytest.approx(camera["c"], abs=1)


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0, 1))
def test_slerp_moves_evenly_along_the_shorter_arc(seed, t):
    a, b = random_quats(np.random.default_rng(seed), 2)

    def angle(p, q):
        return 2 * np.arccos(min(1, abs(p @ q)))

    q = slerp(a, b, t)
    assert np.linalg.norm(q) == pytest.approx(1)
    assert angle(a, q) == pytest.approx(t * angle(a, b), abs=1e-5)
    assert angle(q, b) == pytest.approx((1 - t) * angle(a, b), abs=1e-5)
    assert np.allclose(slerp(a, -b, t), slerp(a, b, t))  # b and -b are one rotation
    assert np.allclose(slerp(a, a, t), a)


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_quaternions_multiply_like_their_matrices(seed):
    rng = np.random.default_rng(seed)
    a, b = random_quats(rng, 2)
    A, B = quat_to_matrix(a), quat_to_matrix(b)
    assert np.allclose(A @ A.T, np.eye(3)) and np.linalg.det(A) == pytest.approx(1)
    assert np.allclose(quat_to_matrix(quat_mul(a, b)), A @ B)
    v = rng.normal(size=3)  # a rotation vector is the axis, and its length the angle
    R = quat_to_matrix(quat_from_rotvec(v))
    assert np.allclose(R @ v, v) and np.trace(R) == pytest.approx(1 + 2 * np.cos(np.linalg.norm(v)))


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_rotation_between_is_the_smallest_that_turns_a_onto_b(seed):
    a, b = np.random.default_rng(seed).normal(size=(2, 3))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    R = rotation_between(a, b)
    assert np.allclose(R @ a, b) and np.allclose(R @ R.T, np.eye(3))
    assert np.trace(R) == pytest.approx(1 + 2 * a @ b)  # its angle is the one between them
    assert np.allclose(rotation_between(a, a), np.eye(3))
