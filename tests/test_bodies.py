"""sources/bodies.py: posing the capsule bodies of conftest.py, and the downloads."""

import subprocess

import numpy as np
import pytest
from conftest import random_pose

from hipart import LEFT, PARENTS, RIGHT
from sources import bodies as B
from sources.coarsening import vertex_areas


def test_skinning_shortcut_equals_a_loop_over_all_vertices(bodies, levels):
    rng, body = np.random.default_rng(0), 3
    vertices, weights = bodies["vertices"][body], bodies["weights"]
    area = vertex_areas(bodies["vertices"][0], bodies["faces"])
    tables, align = B.point_tables(bodies, levels, area)
    heads = bodies["heads"][[body] * 2]
    transforms = B.segment_transforms(random_pose(rng, 2), align[[body] * 2], heads)
    fast = B.pose_points(transforms, tables[body])  # [2, 17 + 48 + 96 + 192, 3]
    fine, third = slice(65, 161), slice(161, 353)
    for n, size, own in ((0, 96, fine), (1, 96, fine), (0, 192, third)):
        total, mass = np.zeros((size, 3)), np.zeros(size)
        turns, shifts = transforms[n, :, :, :3], transforms[n, :, :, 3]
        for v, (x, w) in enumerate(zip(vertices, weights, strict=True)):
            moved = sum(w[s] * (turns[s] @ x + shifts[s]) for s in range(len(w)))
            total[levels[size][v]] += area[v] * moved
            mass[levels[size][v]] += area[v]
        assert np.allclose(fast[n, own], total / mass[:, None], atol=1e-9)
        if size == 192:
            continue
        both = mass.reshape(48, 2).sum(1, keepdims=True)
        union = total.reshape(48, 2, 3).sum(1) / both  # a dense point is that of two fine points
        assert np.allclose(fast[n, 17:65], union, atol=1e-9)


def test_posing_keeps_bone_lengths_and_bends_joints_the_right_way(bodies, levels):
    rest, area = bodies["joints"][:1], np.ones(len(bodies["weights"]))
    tables, align = B.point_tables(bodies, levels, area)

    def posed(pose):
        same = [0] * len(pose[0])
        transforms = B.segment_transforms(pose, align[same], bodies["heads"][same])
        return B.pose_points(transforms, tables[0])[:, :17]

    spine = (7, 8, 9, 11, 14)  # it bends
    limbs = [(a, b) for a, b in enumerate(PARENTS) if b >= 0 and a not in spine]
    joints = posed(random_pose(np.random.default_rng(1), 20))
    for a, b in limbs:
        length = np.linalg.norm(rest[0, a] - rest[0, b])
        assert np.allclose(np.linalg.norm(joints[:, a] - joints[:, b], axis=-1), length)
    assert np.allclose(joints[:, 0], 0)

    still = np.zeros((1, 9, 4))
    still[..., 0] = 1
    upright = posed((still, np.zeros((1, 4)), np.ones(1)))[0]
    hanging = ((2, 1), (3, 2), (5, 4), (6, 5), (12, 11), (13, 12), (15, 14), (16, 15))
    for a, b in hanging:  # in the clips' zero pose all limbs hang
        down = upright[a] - upright[b]
        assert np.allclose(down / np.linalg.norm(down), [0, 0, -1])
    bent = posed((still, np.array([[-1.0, 1, -1, 1]]), np.ones(1)))[0]
    back, front = bent[[3, 6], 1] - upright[[3, 6], 1], upright[[13, 16], 1] - bent[[13, 16], 1]
    assert (back > 0.2).all()  # knees take the feet back (bodies face -y)
    assert (front > 0.15).all()  # elbows take the hands forward
    assert (upright[list(LEFT), 0] > 0).all() and (upright[list(RIGHT), 0] < 0).all()


# --------------------------------------------------------------------------------------------------
# Downloads


def test_a_missing_wheel_is_said_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="No wheel of pybullet==3.2.7"):
        B.get_clips(tmp_path, wheels=tmp_path)


def test_a_wrong_wheel_is_refused(tmp_path):
    (tmp_path / "pybullet-3.2.7-cp311-none-any.whl").write_bytes(b"not it")
    with pytest.raises(ValueError, match="not the expected file, whose sha256 is 5d858abf"):
        B.get_clips(tmp_path, wheels=tmp_path)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    said = "WARNING: no route\nERROR: No matching distribution found\n"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr(B.subprocess, "run", lambda *args, **kwargs: failed)
    message = "No matching distribution found.*pip download.*--wheels DIR"
    with pytest.raises(RuntimeError, match=message) as caught:
        B.get_clips(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_bodies_are_said_in_one_sentence(tmp_path, bodies):
    path = tmp_path / "bodies_v1_anny-0.6.2_8_0.npz"
    arrays = {k: v for k, v in bodies.items() if k != "split_sizes"}
    np.savez(path, **arrays)
    whole = path.read_bytes()
    found = B.get_bodies(tmp_path, 0, counts=(4, 2, 2))
    assert found.keys() == bodies.keys()
    np.testing.assert_array_equal(found["vertices"], bodies["vertices"])
    half, other = len(whole) // 2, bytes(9)
    for damaged in (b"", whole[:half], whole[:half] + other + whole[half + 9 :], b"no archive"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="holds damaged bodies: delete it and try"):
            B.get_bodies(tmp_path, 0, counts=(4, 2, 2))
    np.savez(path, **{k: v for k, v in arrays.items() if k != "stature"})
    with pytest.raises(ValueError, match="holds damaged bodies: delete it"):
        B.get_bodies(tmp_path, 0, counts=(4, 2, 2))


def test_a_damaged_wheel_is_said_in_one_sentence(tmp_path):
    (tmp_path / "roma-1.8.0-py3-none-any.whl").write_bytes(b"PK and nothing else")
    with pytest.raises(ValueError, match="roma-1.8.0.* is no wheel: delete it and try again"):
        B.fetch_wheel("roma==1.8.0", tmp_path, tmp_path)
