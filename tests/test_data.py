"""prepare_data.py: geometry, coarsening, motion, detector, storage. Bodies and clips are those of conftest.py."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
from conftest import TINY_SIZES, clip_text, make_bodies, make_clips, rest_joints, write_tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import prepare_data as P

CAMERAS = P.make_cameras(np.random.default_rng(0))
seeds = st.integers(0, 10_000)


def random_quats(rng, *shape):
    q = rng.normal(size=(*shape, 4))
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def bodies():
    return make_bodies()


@pytest.fixture(scope="module")
def levels(bodies):
    return P.coarsen(bodies["vertices"][0], bodies["faces"], bodies["joints"][0][list(P.PART_JOINT)])


# ---------------------------------------------------------------------------------------------------------------------
# Geometry


@pytest.mark.parametrize("camera", CAMERAS, ids=lambda c: c["id"])
def test_projection_equals_a_formula_written_point_by_point(camera):
    (k1, k2, k3), (p1, p2), (fx, fy), (cx, cy) = camera["k"], camera["p"], camera["f"], camera["c"]
    points = np.random.default_rng(0).uniform([-1500, -1500, 3000], [1500, 1500, 7000], (50, 3))
    for (X, Y, Z), (u, v) in zip(points, P.project(points, camera), strict=True):
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
        head, feet = (P.project(R @ [0, 0, z] + t, camera) for z in (1700.0, 0.0))
        assert feet[1] > head[1] + 300  # y points down in the image
        assert P.project(R @ [0, 0, 900.0] + t, camera) == pytest.approx(camera["c"], abs=1)


@settings(deadline=None, max_examples=50)
@given(seeds, st.floats(0, 1))
def test_slerp_moves_evenly_along_the_shorter_arc(seed, t):
    a, b = random_quats(np.random.default_rng(seed), 2)

    def angle(p, q):
        return 2 * np.arccos(min(1, abs(p @ q)))

    q = P.slerp(a, b, t)
    assert np.linalg.norm(q) == pytest.approx(1)
    assert angle(a, q) == pytest.approx(t * angle(a, b), abs=1e-5)
    assert angle(q, b) == pytest.approx((1 - t) * angle(a, b), abs=1e-5)
    assert np.allclose(P.slerp(a, -b, t), P.slerp(a, b, t))  # b and -b are one rotation
    assert np.allclose(P.slerp(a, a, t), a)


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_quaternions_multiply_like_their_matrices(seed):
    rng = np.random.default_rng(seed)
    a, b = random_quats(rng, 2)
    A, B = P.quat_to_matrix(a), P.quat_to_matrix(b)
    assert np.allclose(A @ A.T, np.eye(3)) and np.linalg.det(A) == pytest.approx(1)
    assert np.allclose(P.quat_to_matrix(P.quat_mul(a, b)), A @ B)
    v = rng.normal(size=3)  # a rotation vector is the axis, and its length the angle
    R = P.quat_to_matrix(P.quat_from_rotvec(v))
    assert np.allclose(R @ v, v) and np.trace(R) == pytest.approx(1 + 2 * np.cos(np.linalg.norm(v)))


@settings(deadline=None, max_examples=50)
@given(seeds)
def test_rotation_between_is_the_smallest_that_turns_a_onto_b(seed):
    a, b = np.random.default_rng(seed).normal(size=(2, 3))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    R = P.rotation_between(a, b)
    assert np.allclose(R @ a, b) and np.allclose(R @ R.T, np.eye(3))
    assert np.trace(R) == pytest.approx(1 + 2 * a @ b)  # its angle is the one between them
    assert np.allclose(P.rotation_between(a, a), np.eye(3))


def random_pose(rng, n):
    quats = P.quat_from_rotvec(rng.normal(size=(n, 9, 3)) * 0.5)
    return quats, rng.uniform(0, 1.5, (n, 4)) * [-1, 1, -1, 1], np.full(n, 0.86)


def test_skinning_shortcut_equals_a_loop_over_all_vertices(bodies, levels):
    rng, body = np.random.default_rng(0), 3
    vertices, weights = bodies["vertices"][body], bodies["weights"]
    area = P.vertex_areas(bodies["vertices"][0], bodies["faces"])
    tables, align = P.point_tables(bodies, levels[96], levels[48], area)
    transforms = P.segment_transforms(random_pose(rng, 2), align[[body] * 2], bodies["heads"][[body] * 2])
    fast = P.pose_points(transforms, tables[body])  # [2, 17 + 48 + 96, 3]
    for n in range(2):
        total, mass = np.zeros((96, 3)), np.zeros(96)
        for v, (x, w) in enumerate(zip(vertices, weights, strict=True)):
            moved = sum(w[s] * (transforms[n, s, :, :3] @ x + transforms[n, s, :, 3]) for s in range(len(w)))
            total[levels[96][v]] += area[v] * moved
            mass[levels[96][v]] += area[v]
        assert np.allclose(fast[n, 65:], total / mass[:, None], atol=1e-9)
        both = mass.reshape(48, 2).sum(1, keepdims=True)  # a dense point is the union of its two fine points
        assert np.allclose(fast[n, 17:65], total.reshape(48, 2, 3).sum(1) / both, atol=1e-9)


def test_posing_keeps_bone_lengths_and_bends_joints_the_right_way(bodies, levels):
    rest = bodies["joints"][:1]
    tables, align = P.point_tables(bodies, levels[96], levels[48], np.ones(len(bodies["weights"])))

    def posed(pose):
        n = len(pose[0])
        points = P.pose_points(P.segment_transforms(pose, align[[0] * n], bodies["heads"][[0] * n]), tables[0])
        return points[:, :17]

    limbs = [(a, b) for a, b in enumerate(P.PARENTS) if b >= 0 and a not in (7, 8, 9, 11, 14)]  # the spine bends
    joints = posed(random_pose(np.random.default_rng(1), 20))
    for a, b in limbs:
        length = np.linalg.norm(rest[0, a] - rest[0, b])
        assert np.allclose(np.linalg.norm(joints[:, a] - joints[:, b], axis=-1), length)
    assert np.allclose(joints[:, 0], 0)

    still = np.zeros((1, 9, 4))
    still[..., 0] = 1
    upright = posed((still, np.zeros((1, 4)), np.ones(1)))[0]
    for a, b in ((2, 1), (3, 2), (5, 4), (6, 5), (12, 11), (13, 12), (15, 14), (16, 15)):  # in clips all limbs hang
        down = upright[a] - upright[b]
        assert np.allclose(down / np.linalg.norm(down), [0, 0, -1])
    bent = posed((still, np.array([[-1.0, 1, -1, 1]]), np.ones(1)))[0]
    assert (bent[[3, 6], 1] > upright[[3, 6], 1] + 0.2).all()  # knees take the feet back (bodies face -y)
    assert (bent[[13, 16], 1] < upright[[13, 16], 1] - 0.15).all()  # elbows take the hands forward
    assert (upright[list(P.LEFT), 0] > 0).all() and (upright[list(P.RIGHT), 0] < 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# Coarsening


@pytest.mark.parametrize("weighting", ["joint", "plain"])
def test_coarsening_is_exact_nested_complete_and_connected(bodies, weighting):
    vertices, faces = bodies["vertices"][0], bodies["faces"]
    extra = np.array([[9.0, 9, 9], [9, 9, 8], [9, 8, 8]])  # a loose triangle, as Anny's eyes are
    faces = np.concatenate([faces, [len(vertices) + np.arange(3)]])
    vertices = np.concatenate([vertices, extra])
    levels = P.coarsen(vertices, faces, bodies["joints"][0][list(P.PART_JOINT)], weighting=weighting, tries=3)
    graph = nx.Graph(P.mesh_edges(faces).tolist())
    for size in (192, 96, 48):
        label = levels[size]
        assert (label[-3:] == -1).all() and (label[:-3] >= 0).all()
        assert set(label[:-3]) == set(range(size))
        for k in range(size):
            assert nx.is_connected(graph.subgraph(np.flatnonzero(label == k).tolist()))
        matrix = P.level_matrix(label, np.ones(len(label)))
        assert np.allclose(matrix.sum(1), 1) and ((matrix > 0).sum(0)[:-3] == 1).all()
        assert np.allclose(matrix[5] @ vertices, vertices[label == 5].mean(0))
    assert np.array_equal(levels[96][:-3] // 2, levels[48][:-3])  # fine rows 2k, 2k + 1 are dense row k
    for k in range(192):
        assert len(set(levels[96][levels[192] == k])) == 1


def test_joint_weighting_ties_points_to_nearby_joints(bodies, levels):
    joints = bodies["joints"][0][list(P.PART_JOINT)]
    matrix = P.level_matrix(levels[48], P.vertex_areas(bodies["vertices"][0], bodies["faces"]))
    distance = np.linalg.norm((matrix @ bodies["vertices"][0])[:, None] - joints, axis=-1)
    own = distance[np.arange(48), np.arange(48) // 3]
    assert own.mean() == pytest.approx(levels["distance"])
    best = P.assign_parts(distance)  # rows 3i, 3i + 1, 3i + 2 belong to part i already
    assert distance[np.arange(48), best].sum() == pytest.approx(own.sum())


def test_match_pass_takes_the_heaviest_normalised_edge_and_stops_on_target():
    edges, weight = np.array([[0, 1], [1, 2], [2, 3]]), np.array([1.0, 5.0, 1.0])
    ones = np.ones(4)
    assert P.match_pass(edges, weight, ones, [1, 0, 2, 3], 2, np.inf).tolist() == [0, 1, 1, 2]  # 0, 3 alone
    assert P.match_pass(edges, weight, ones, [0, 3, 1, 2], 2, np.inf).tolist() == [0, 0, 1, 1]
    assert P.match_pass(edges, weight, ones, [0, 3, 1, 2], 3, np.inf).max() == 2
    assert P.match_pass(edges, weight, ones, [0, 1, 2, 3], 2, 1.5).tolist() == [0, 1, 2, 3]  # too heavy together
    light_end = np.array([0.1, 1.0, 1.0, 1.0])  # 1 * (1/0.1 + 1) beats 5 * (1 + 1)
    assert P.match_pass(edges, weight, light_end, [1, 2, 3, 0], 2, np.inf).tolist() == [0, 0, 1, 1]


def test_contract_adds_parallel_edges_and_drops_loops():
    edges, weight = P.contract(np.array([[0, 1], [0, 2], [1, 3], [2, 3]]), np.ones(4), np.array([0, 0, 1, 1]))
    assert edges.tolist() == [[0, 1]] and weight.tolist() == [2.0]


@settings(deadline=None, max_examples=40)
@given(seeds, st.sampled_from([(2, 1), (3, 3), (4, 2), (6, 2), (6, 3)]))
def test_assignment_is_optimal_against_brute_force(seed, shape):
    n, m = shape
    cost = np.random.default_rng(seed).random(shape)
    owner = P.assign_parts(cost)
    assert np.bincount(owner, minlength=m).tolist() == [n // m] * m
    best = min(cost[range(n), o].sum() for o in set(itertools.permutations(np.arange(m).repeat(n // m))))
    assert cost[range(n), owner].sum() == pytest.approx(best)


def test_coarsening_refuses_what_it_cannot_do(bodies):
    vertices, faces, joints = bodies["vertices"][0], bodies["faces"], bodies["joints"][0][list(P.PART_JOINT)]
    with pytest.raises(ValueError, match="weighting must be"):
        P.coarsen(vertices, faces, joints, weighting="area")
    with pytest.raises(ValueError, match="half the one before"):
        P.coarsen(vertices, faces, joints, sizes=(192, 96, 40))
    with pytest.raises(ValueError, match="too few for 192 clusters"):
        P.coarsen(vertices, faces[:50], joints)
    with pytest.raises(ValueError, match="cannot be shared equally"):
        P.assign_parts(np.ones((5, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Motion


@pytest.mark.parametrize("loop", ["wrap", "none"])
@settings(deadline=None, max_examples=25)
@given(duration=st.floats(0.8, 4), dt=st.sampled_from([1 / 60, 1 / 30, 1 / 24, 1 / 16]))
def test_held_out_frames_are_a_tenth_of_a_second_away_from_training(loop, duration, dt):
    frames = int(duration / dt)
    clip = P.parse_clip(clip_text(0, frames, dt, loop))
    parts = P.split_frames(clip)
    time = clip["time"]
    held = np.concatenate([parts["val"], parts["test"]])
    assert len(parts["train"]) > len(held) > 0 and not set(parts["val"]) & set(parts["test"])
    away = np.abs(time[parts["train"]][:, None] - time[held])
    if loop == "wrap":
        away = np.minimum(away, frames * dt - away)
    assert away.min() >= 0.1 - 1e-9


def test_training_never_sees_held_out_frames_or_unseen_clips():
    motion = P.Motion(make_clips(), unseen=("kick",))
    train, val, test, unseen = (set(np.concatenate(motion.frames[s])) for s in P.SPLITS)
    assert not train & val and not train & test and not val & test and not unseen & (train | val | test)
    assert {motion.names[c] for c in motion.clip[list(unseen)]} == {"kick"}
    for split in P.SPLITS:
        drawn = motion.draw(split, 2000, np.random.default_rng(0))
        assert set(drawn) <= {"train": train, "val": val, "test": test, "unseen": unseen}[split]
    count = np.bincount(motion.clip[motion.draw("train", 3000, np.random.default_rng(0))], minlength=4)
    assert count[1] == 0 and (abs(count[[0, 2, 3]] - 1000) < 120).all()


def test_augmented_poses_lie_between_training_frames(monkeypatch):
    """Without joint noise and mixing, every training pose lies on the arc between two neighbouring training frames."""
    monkeypatch.setattr(P, "QUAT_NOISE", P.QUAT_NOISE * 0)
    monkeypatch.setattr(P, "HINGE_NOISE", P.HINGE_NOISE * 0)
    motion = P.Motion(make_clips(), unseen=("kick",))
    (_, hinges, _), clip, action = P.augment(motion, 400, np.random.default_rng(0))
    train = np.concatenate(motion.frames["train"])
    pairs = [(f, f + 1) for f in train if f + 1 in train and motion.clip[f] == motion.clip[f + 1]]
    a, b = motion.hinges[[p[0] for p in pairs]], motion.hinges[[p[1] for p in pairs]]
    a, b = (np.concatenate([h, h[:, P.MIRROR_HINGES]]) for h in (a, b))
    d = b - a
    t = np.clip(np.einsum("nk,pk->np", hinges, d) - (a * d).sum(1), 0, (d * d).sum(1)) / (d * d).sum(1)
    near = np.linalg.norm(hinges[:, None] - a - t[..., None] * d, axis=-1).min(1) < 1e-6
    assert (action == clip).mean() == pytest.approx(0.73, abs=0.1)  # the others mix two clips
    assert near.mean() == pytest.approx(0.6, abs=0.1)  # neither recombined nor blended
    assert set(action) == {-1, 0, 2, 3}


def test_mirror_swaps_sides_and_undoes_itself(bodies, levels):
    pose = random_pose(np.random.default_rng(3), 10)
    for once, twice in zip(pose, P.mirror(P.mirror(pose)), strict=True):
        assert np.allclose(once, twice)
    tables, align = P.point_tables(bodies, levels[96], levels[48], np.ones(len(bodies["weights"])))

    def joints(pose):
        transforms = P.segment_transforms(pose, align[[0] * 10], bodies["heads"][[0] * 10])
        return P.pose_points(transforms, tables[0])[:, :17]

    swap = np.arange(17)
    swap[list(P.LEFT)], swap[list(P.RIGHT)] = [1, 2, 3, 14, 15, 16], [4, 5, 6, 11, 12, 13]
    assert np.allclose(joints(P.mirror(pose)), joints(pose)[:, swap] * [-1, 1, 1], atol=1e-9)
    turned = joints(P.turn(pose, np.full(10, np.pi / 2)))  # left a quarter: -y becomes +x
    assert np.allclose(turned, joints(pose) @ np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]).T, atol=1e-9)


def test_augmentation_keeps_hinges_within_their_limits():
    motion = P.Motion(make_clips(), unseen=("kick",))
    (quats, hinges, _), _, _ = P.augment(motion, 1000, np.random.default_rng(0))
    assert np.allclose(np.linalg.norm(quats, axis=-1), 1)
    assert (hinges >= P.HINGE_LIMITS[:, 0]).all() and (hinges <= P.HINGE_LIMITS[:, 1]).all()


def test_collisions_are_found():
    joints = np.repeat(rest_joints()[None] * 1000, 4, 0)
    joints[1, 13] = [0, 0, 1300]  # a hand in the chest
    joints[2, 16] = joints[2, 10]  # a hand in the head
    joints[3, 3] = (joints[3, 5] + joints[3, 6]) / 2  # a foot in the other shin
    assert P.collides(joints).tolist() == [False, True, True, True]


def test_a_damaged_clip_is_refused():
    with pytest.raises(ValueError, match="frames of 44 finite numbers"):
        P.parse_clip(json.dumps({"Loop": "wrap", "Frames": [[0.1] * 43]}))


# ---------------------------------------------------------------------------------------------------------------------
# Detector


def test_detector_statistics():
    rng = np.random.default_rng(0)
    rest = rest_joints()[:, [0, 2]] * [1, -1] * 210 + [500, 700]  # a person 380 px tall
    x_s, height = np.repeat(rest[None], 8000, 0).astype(np.float32), np.full(8000, 380, np.float32)
    x_det, conf = P.detect(x_s, height, rng)
    assert x_det.shape == (8000, 17, 2) and conf.shape == (8000, 17) and x_det.dtype == conf.dtype == np.float32
    missing = conf == 0
    assert (x_det[missing] == 0).all() and (conf[~missing] > 0).all() and conf.max() <= 1 and not missing.all(1).any()
    error = np.linalg.norm(x_det - x_s, axis=-1)
    assert 0.02 < missing.mean() < 0.06 and 6 < error[~missing].mean() < 10
    assert 3 < np.median(error[~missing]) < 5  # most joints have the Gaussian error only, about 1.1% of the height
    correlation = np.corrcoef(conf[~missing], error[~missing])[0, 1]
    assert -0.8 < correlation < -0.3  # a hint, not an oracle

    only = {**P.NOISE, "p_box": 1.0, "p_missing": 0.0, "p_swap": 0.0, "sigma": 0.0}
    moved = P.detect(x_s, height, rng, only)[0] - x_s
    hidden = (moved != 0).any(-1)
    both = moved[hidden[:, 11] & hidden[:, 8]][:, [8, 11], 0]
    assert 0.4 < np.corrcoef(both.T)[0, 1] < 0.85  # joints behind one box move together
    assert hidden[hidden.any(1)].sum(1).mean() > 2

    swap = {**only, "p_box": 0.0, "p_swap": 1.0}
    swapped = P.detect(x_s, height, rng, swap)[0]
    legs = np.isclose(swapped[:, 1:7], x_s[:, [4, 5, 6, 1, 2, 3]]).all((1, 2))
    arms = np.isclose(swapped[:, 11:17], x_s[:, [14, 15, 16, 11, 12, 13]]).all((1, 2))
    assert (legs ^ arms).all() and 0.4 < legs.mean() < 0.6


def test_detector_scales_with_the_person_and_repeats_itself(tiny_data):
    arrays, meta = P.load("tiny", "train", tiny_data)
    x_s, height = arrays["x_s"], arrays["height_px"]
    a, b = (P.detect(x_s, height, np.random.default_rng(7), meta["noise"]) for _ in range(2))
    assert all(np.array_equal(p, q) for p, q in zip(a, b, strict=True))
    double = P.detect(x_s * 2, height * 2, np.random.default_rng(7), meta["noise"])
    assert np.allclose(double[0], 2 * a[0], atol=1e-2) and np.allclose(double[1], a[1], atol=1e-5)
    assert not np.array_equal(P.detect(x_s, height, np.random.default_rng(8), meta["noise"])[0], a[0])


# ---------------------------------------------------------------------------------------------------------------------
# Storage


@pytest.mark.parametrize("split", P.SPLITS)
def test_a_data_set_is_what_it_says(tiny_data, split):
    arrays, meta = P.load("tiny", split, tiny_data)
    n = TINY_SIZES[split]
    assert ("x_s_det" in arrays) == ("conf" in arrays) == (split != "train")
    assert all(isinstance(a, np.memmap) and len(a) == n for a in arrays.values())
    assert (arrays["y"][:, 0] == 0).all()
    for i in range(n):  # y + root, seen by the sample's camera, is x_s
        x = P.project(arrays["y"][i].astype(float) + arrays["root"][i], meta["cameras"][arrays["camera"][i]])
        assert np.allclose(x, arrays["x_s"][i], atol=1e-2)
    assert set(arrays["subject"]) <= set(meta["subjects"][split])
    points = np.concatenate([arrays[k] for k in ("x_s", "x_d", "x_f")], 1)
    assert points.min() >= 0 and points.max() <= 1000
    pairs = arrays["x_f"].reshape(n, 48, 2, 2)  # a dense point lies between its two fine points
    gap = np.linalg.norm(pairs[:, :, 0] - pairs[:, :, 1], axis=-1)
    way = np.linalg.norm(pairs - arrays["x_d"][:, :, None], axis=-1).sum(-1)
    assert (way < gap + 0.5).all()
    focal, stature = [meta["cameras"][c]["f"][1] for c in arrays["camera"]], np.array(meta["stature_mm"])
    shown = arrays["height_px"] * arrays["root"][:, 2] / focal
    if split == "train":  # any body in the stature of any other
        stature = stature[meta["subjects"]["train"]]
        assert np.allclose(np.abs(shown[:, None] - stature).min(1), 0, atol=0.1)
        assert not np.allclose(shown, np.array(meta["stature_mm"])[arrays["subject"]], atol=1)
        thigh = np.linalg.norm(arrays["y"][:, 2] - arrays["y"][:, 1], axis=-1) / shown
        assert all(np.ptp(thigh[arrays["subject"] == body]) < 1e-4 for body in meta["subjects"]["train"])
    else:
        assert np.allclose(shown, stature[arrays["subject"]])
    allowed = {"train": {-1, 0, 2, 3}, "unseen": {1}}.get(split, {0, 2, 3})  # 1 is kick; -1 is a mixture of clips
    assert set(arrays["action"]) == allowed and meta["actions"] == ["jump", "kick", "punch", "walk"]


def test_bodies_stand_on_the_floor_and_leave_it_only_in_airborne_clips(tiny_data):
    arrays, meta = P.load("tiny", "test", tiny_data)
    for i in range(len(arrays["y"])):
        camera = meta["cameras"][arrays["camera"][i]]
        world = (arrays["y"][i] + arrays["root"][i] - camera["t"]) @ np.array(camera["R"])
        if meta["actions"][arrays["action"][i]] == "jump":  # 0.5 m up
            assert 400 < world[:, 2].min() < 900  # and no leap of the training poses on top
        else:
            assert -50 < world[:, 2].min() < 150 and world[:, 2].max() < 2200


def test_training_leaps_reach_higher_and_everything_else_stays_on_the_floor(tiny_data):
    arrays, meta = P.load("tiny", "train", tiny_data)
    where = [meta["cameras"][c] for c in arrays["camera"]]
    world = [(y + r - c["t"]) @ np.array(c["R"]) for y, r, c in zip(arrays["y"], arrays["root"], where, strict=True)]
    lowest = np.array(world)[:, :, 2].min(1)
    jump, walk = (lowest[arrays["action"] == meta["actions"].index(a)] for a in ("jump", "walk"))
    assert len(jump) > 3 and len(walk) > 3 and walk.max() < 250
    own = 900  # mm, at most: the clip's own half a metre for legs of any length, and the joints' way to the sole
    assert (jump > 400).all() and own < jump.max() < own + 1000 * P.LEAP and 0.2 < (jump < own).mean() < 0.9
    assert meta["training"] == {"leap_m": P.LEAP, "stature": "any training body's"}  # so that old data has another name


def test_bodies_of_the_splits_are_apart(tiny_data):
    subjects = P.load("tiny", "val", tiny_data)[1]["subjects"]
    assert not set(subjects["train"]) & set(subjects["val"]) and not set(subjects["train"]) & set(subjects["test"])
    assert not set(subjects["val"]) & set(subjects["test"]) and subjects["unseen"] == subjects["test"]


def test_the_same_seed_gives_the_same_data_whatever_the_other_splits_sizes(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(P, "draw_samples", lambda *args: None)
    monkeypatch.setattr(P, "draw_coarsening", lambda *args: None)
    write_tiny(tmp_path / "other", {**TINY_SIZES, "train": 20, "val": 7})
    for split in ("test", "unseen"):
        mine, theirs = P.load("tiny", split, tiny_data)[0], P.load("other", split, tmp_path)[0]
        assert all(np.array_equal(mine[k], theirs[k]) for k in mine)
    write_tiny(tmp_path / "other", {**TINY_SIZES, "train": 20, "val": 7}, seed=1, overwrite=True)
    theirs = P.load("other", "test", tmp_path)[0]
    assert not np.array_equal(P.load("tiny", "test", tiny_data)[0]["y"], theirs["y"])


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(P, "draw_coarsening", interrupt)  # the last thing before the rename
    with pytest.raises(KeyboardInterrupt):
        write_tiny(tmp_path / "tiny")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="python prepare_data.py --name tiny"):
        P.load("tiny", "test", tmp_path)


def test_an_existing_set_is_not_overwritten(tiny_data):
    with pytest.raises(ValueError, match="exists already: choose another --name or add --overwrite"):
        write_tiny(tiny_data / "tiny")
    command = [sys.executable, "prepare_data.py", "--name", "tiny", "--out", str(tiny_data)]
    run = subprocess.run(command, cwd=Path(P.__file__).parent, capture_output=True, text=True)
    assert run.returncode == 2 and "exists already" in run.stderr and "Traceback" not in run.stderr


def damage_version(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))


def damage_json(folder):
    (folder / "meta.json").write_text("{")


def damage_truncate(folder):
    os.truncate(folder / "test" / "y.npy", 2000)


def damage_empty(folder):
    os.truncate(folder / "test" / "y.npy", 0)


def replace_y(change):
    def damage(folder):
        np.save(folder / "test" / "y.npy", change(np.load(folder / "test" / "y.npy")), allow_pickle=True)

    return damage


def set_nan(y):
    y[5, 3, 1] = np.nan
    return y


@pytest.mark.parametrize(
    "damage, error, message",
    [
        (shutil.rmtree, FileNotFoundError, "No data set in .*prepare_data.py --name tiny"),
        (lambda f: (f / "test" / "x_f.npy").unlink(), FileNotFoundError, "x_f.npy is missing: make it again"),
        (damage_version, ValueError, "format version 99, expected 1"),
        (damage_json, ValueError, "not valid JSON"),
        (damage_truncate, ValueError, "cannot be read, it is truncated"),
        (damage_empty, ValueError, "cannot be read, it is truncated"),
        (replace_y(lambda y: y[:, :16]), ValueError, r"float32 \(32, 16, 3\), expected float32 \(32, 17, 3\)"),
        (replace_y(lambda y: y[:31]), ValueError, r"float32 \(31, 17, 3\), expected"),
        (replace_y(lambda y: y.astype(np.float64)), ValueError, "float64 .*, expected float32"),
        (replace_y(set_nan), ValueError, "NaN or infinite"),
        (replace_y(lambda y: y.astype(object)), ValueError, "cannot be read"),
    ],
)
def test_load_refuses_in_one_sentence(tiny_data, tmp_path, damage, error, message):
    shutil.copytree(tiny_data / "tiny", tmp_path / "tiny")
    damage(tmp_path / "tiny")
    with pytest.raises(error, match=message) as caught:
        P.load("tiny", "test", tmp_path)
    assert "\n" not in str(caught.value)


def test_load_refuses_an_unknown_split(tiny_data):
    with pytest.raises(ValueError, match="no split 'dev', only train, val, test, unseen"):
        P.load("tiny", "dev", tiny_data)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads


def test_a_missing_wheel_is_said_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="No wheel of pybullet==3.2.7"):
        P.get_clips(tmp_path, wheels=tmp_path)


def test_a_wrong_wheel_is_refused(tmp_path):
    (tmp_path / "pybullet-3.2.7-cp311-none-any.whl").write_bytes(b"not it")
    with pytest.raises(ValueError, match="not the expected file, whose sha256 is 5d858abf"):
        P.get_clips(tmp_path, wheels=tmp_path)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: no route\nERROR: No matching distribution found\n")
    monkeypatch.setattr(P.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(RuntimeError, match="No matching distribution found.*pip download.*--wheels DIR") as caught:
        P.get_clips(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.download
def test_real_clips_and_bodies_make_samples(tmp_path):
    """With the parts in data/.cache if they are there, otherwise from the wheels in $HIPART_WHEELS or a download."""
    cache = Path(P.__file__).parent / "data" / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    wheels = os.environ.get("HIPART_WHEELS")
    clips, bodies = P.get_clips(cache, wheels), P.get_bodies(cache, 0, wheels)
    assert len(clips) == 15 and sum(len(c["time"]) for c in clips.values()) == 1620
    assert bodies["vertices"].shape == (60, 13718, 3) and 1.4 < bodies["stature"].min() < bodies["stature"].max() < 2.0
    assert np.allclose(bodies["weights"].sum(1), 1, atol=1e-5)
    P.write_data_set(tmp_path / "real", clips, bodies, dict.fromkeys(P.SPLITS, 200), 0, {})
    for split in P.SPLITS:
        arrays, meta = P.load("real", split, tmp_path)
        assert 250 < arrays["height_px"].mean() < 500 and len(meta["actions"]) == 15
    assert meta["coarsening"]["assignment_mm"] < 110
    assert {meta["actions"][a] for a in arrays["action"]} == {"kick", "dance_b"}


def test_folders_are_searched_through_links_and_loops(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("")
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/a.txt").write_text("")
    (tmp_path / "in/sub/other.bin").write_text("")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/sub/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/gone.txt").symlink_to(tmp_path / "nowhere")
    wanted = {"text": ("a text", True), "more": ("more of it", False)}
    found = P.check_folder(tmp_path / "in", lambda p: "text" if p.suffix == ".txt" else None, wanted)
    assert [p.name for p in found["text"]] == ["a.txt", "b.txt"] and found["more"] == []
    out = capsys.readouterr().out
    for line in ("text: a.txt, link/b.txt", "more: none (not needed); more of it", "not used: sub/other.bin"):
        assert line in out
    with pytest.raises(ValueError, match="in lacks music [(]a tune[)]"):
        P.check_folder(tmp_path / "in", lambda p: None, {"music": ("a tune", True)})
    with pytest.raises(ValueError, match="nowhere is not there"):
        P.check_folder(tmp_path / "nowhere", lambda p: None, {})


def test_another_preparation_is_named_and_a_failed_one_gives_back(tmp_path, monkeypatch, capsys):
    (tmp_path / ".set.abcd1234/new").mkdir(parents=True)  # of one that was killed, or still runs
    (tmp_path / ".set.abc").mkdir()  # something else
    (tmp_path / "set").mkdir()
    (tmp_path / "set/meta.json").write_text("earlier")
    replace = P.os.replace

    def fail(a, b):
        if str(b) == str(tmp_path / "set") and "new" in str(a):
            raise OSError("no space")
        replace(a, b)

    monkeypatch.setattr(P.os, "replace", fail)
    with pytest.raises(OSError, match="no space"), P.new_data_set(tmp_path / "set", overwrite=True) as folder:
        (folder / "meta.json").write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".set.abc", ".set.abcd1234", "set"]
    assert capsys.readouterr().out.count("belongs to another preparation") == 1
    assert (tmp_path / "set/meta.json").read_text() == "earlier"
