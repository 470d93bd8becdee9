"""sources/mocap.py: BVH and AMASS files as an independent reading has them, and turned into clips
that stand as the file's person stands."""

import os
import re
import tracemalloc

import numpy as np
import pytest
from conftest import FUZZ, SMPL_JOINTS, SMPL_PARENTS, smpl_content, write_smpl_pkl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_bvh import NAMES, OFFSETS, PARENTS, bvh_text, rotation, second_reading
from test_smpl import rodrigues

from sources import mocap, smpl
from sources.bodies import BONES, bone_orientations
from sources.geometry import quat_to_matrix
from sources.motion import CHEST, CLIP_STANDING_HEIGHT, NECK, ROOT


def clip_of(tmp_path, angles, **options):
    (tmp_path / "a.bvh").write_text(bvh_text(angles, **options))
    return mocap.read_bvh(tmp_path / "a.bvh")


def directions(clip):
    """Of thighs, shins, feet, arms and forearms, trunk and head: as the clip poses a body, in its
    own axes (y up)."""
    m = quat_to_matrix(bone_orientations((clip["quats"], clip["hinges"], clip["height"])))
    columns = {"root": 1, "chest": 1, "neck": 1, "r_foot": 0, "l_foot": 0}
    return {b: m[:, i, :, columns.get(b, 1)] * (1 if b in columns else -1)
            for i, b in enumerate(BONES)}


def true_directions(angles, order="ZXY"):
    out = []
    for frame in angles:
        x = dict(zip(NAMES, second_reading(frame, order, np.zeros(3)), strict=True))
        pairs = {"chest": ("Spine1", "Neck"), "neck": ("Neck", "Head")}
        for letter, side in (("r", "Right"), ("l", "Left")):
            for bone, a, b in (("thigh", "UpLeg", "Leg"), ("shin", "Leg", "Foot"),
                               ("arm", "Arm", "ForeArm"), ("forearm", "ForeArm", "Hand")):
                pairs[f"{letter}_{bone}"] = side + a, side + b
        out.append({b: mocap.unit(x[q] - x[p]) for b, (p, q) in pairs.items()})
    return {b: np.stack([o[b] for o in out]) for b in out[0]}


def moving(T=40, seed=0):
    """Random poses that a person could take: knees and elbows bend one way, by anything up to 120
    degrees."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-25, 25, (T, 21, 3))  # channels Z, X, Y
    angles[:, 0, 2] = rng.uniform(-180, 180, T)
    for name in ("Spine", "RightFoot", "LeftFoot", "RightShoulder", "LeftShoulder"):
        angles[:, NAMES.index(name)] *= 0.2
    for name in ("RightLeg", "LeftLeg", "RightForeArm", "LeftForeArm"):
        angles[:, NAMES.index(name)] = 0
    for knee in ("RightLeg", "LeftLeg"):
        angles[:, NAMES.index(knee), 1] = rng.uniform(0, 120, T)
    # The arms are at the sides, so elbows bend forward about y.
    for elbow, way in (("RightForeArm", 1), ("LeftForeArm", -1)):
        angles[:, NAMES.index(elbow), 2] = way * rng.uniform(0, 120, T)
    return angles.round(4)


@pytest.mark.parametrize("options", [{}, dict(prefix="mixamorig:"), dict(frame_time=1 / 120)])
def test_limbs_point_where_the_files_do(tmp_path, options):
    angles = moving(80)
    clip = clip_of(tmp_path, angles, **options)
    step = 4 if "frame_time" in options else 1
    assert len(clip["time"]) == len(angles[::step]) and clip["time"][1] == pytest.approx(1 / 30)
    ours, true = directions(clip), true_directions(angles[::step])
    for bone, expected in true.items():
        angle = np.degrees(np.arccos(np.clip((ours[bone] * expected).sum(-1), -1, 1)))
        # A limb that is all but straight does not show its twist, so its small bend may go a
        # little astray.
        most = 3 if bone[2:] in ("shin", "forearm") else 0.05
        assert np.median(angle) < 0.01 and angle.max() < most, (bone, angle.max())


def test_standing_straight_is_the_clips_zero_pose(tmp_path):
    """Arms down, facing anywhere: no rotation anywhere but about the vertical axis, and 0.86 m
    high."""
    angles = np.zeros((3, 21, 3))
    angles[:, NAMES.index("RightArm"), 0], angles[:, NAMES.index("LeftArm"), 0] = 90, -90
    angles[:, 0, 2] = 0, 50, -120
    clip = clip_of(tmp_path, angles)
    still = [i for i in range(9) if i not in (ROOT, NECK)]
    assert np.abs(clip["quats"][:, still, 0]).min() > np.cos(np.radians(1))
    assert np.abs(clip["hinges"]).max() < 0.02
    forward = quat_to_matrix(clip["quats"][:, ROOT])[..., 0]
    expected = [[np.sin(a), 0, np.cos(a)] for a in np.radians([0, 50, -120])]
    np.testing.assert_allclose(forward, expected, atol=1e-6)
    assert clip["height"] == pytest.approx(np.full(3, CLIP_STANDING_HEIGHT), rel=0.15)


def test_z_up_files_are_turned_upright(tmp_path):
    """The same motion, written with z up: what was y is z, and what was z is -y."""
    angles = moving(20)
    y_up = clip_of(tmp_path, angles)
    z_up = clip_of(tmp_path, angles * [-1, 1, 1], order="YXZ", z_up=True)
    np.testing.assert_allclose(np.abs((y_up["quats"] * z_up["quats"]).sum(-1)), 1, atol=1e-6)
    np.testing.assert_allclose(z_up["hinges"], y_up["hinges"], atol=1e-5)


@pytest.mark.parametrize("turn, head", [
    ((0, -90, 0), 2), ((0, 90, 0), 2), ((90, 0, 90), 0), ((90, 0, -90), 0),
])  # fmt: skip
def test_somebody_who_lies_on_the_floor_all_the_time(tmp_path, turn, head):
    """y is up: the rest pose stands along it, and the lowest joint stays on the floor."""
    angles = moving(20) * 0.2
    angles[:, 0] = turn
    clip = clip_of(tmp_path, angles, positions=np.zeros((20, 3)) + [0, 22, 0])
    assert clip["taken"]["up"] == "y"
    trunk = directions(clip)["root"]  # the clip's axes are the file's
    assert (np.abs(trunk[:, 1]) < 0.3).all() and (np.abs(trunk[:, head]) > 0.8).all()
    assert clip["height"].max() < 0.5 * CLIP_STANDING_HEIGHT


@pytest.mark.parametrize("position", [(0, 0, 90), (0, 0, 0), (30, 50, 90)])
def test_somebody_who_stands_along_z_with_a_rest_pose_along_y(tmp_path, position):
    """As files made of SMPL's poses are: the root turns the person upright."""
    angles = moving(20) * 0.2
    angles[:, 0] = 0, 90, 0
    clip = clip_of(tmp_path, angles, positions=np.zeros((20, 3)) + position)
    assert clip["taken"]["up"] == "z" and (directions(clip)["root"][:, 1] > 0.9).all()


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_quaternions_of_matrices(seed):
    q = mocap.unit(np.random.default_rng(seed).normal(size=(20, 4)))
    q[0], q[1] = [1, 0, 0, 0], [0, 1, 0, 0]
    back = mocap.matrix_to_quat(quat_to_matrix(q))
    np.testing.assert_allclose(np.abs((back * q).sum(-1)), 1, atol=1e-9)
    assert (back[:, 0] >= 0).all()


@pytest.mark.parametrize("change, expected", [
    (lambda t: t.replace("MOTION", ""), "then MOTION"), (lambda t: t[:400], "then MOTION"),
    (lambda t: "", "then MOTION"),
    (lambda t: t.replace("Frames: 3", "Frames: 4"), "expected 4 frames"),
    (lambda t: t[:-30], "finite numbers"),
    (lambda t: t.replace("HIERARCHY", "HIERARCHY {"), "line 1 is not understood"),
    (lambda t: t.replace("Frame Time:", "Time:"), "Frame Time"),
    (lambda t: t.replace("Zrot", "Wrot"), "line 5 is not understood"),
    (lambda t: t.replace("90.000000", "nan"), "finite"),
    (lambda t: t.replace("RightUpLeg", "R2"), "joints for r hip, found only Hips, R2"),
    (lambda t: t.replace("OFFSET", "OFFSETS"), "line 4 is not understood"),
    (lambda t: t.replace("Time: 0.0", "Time: 1e9"), "Frame Time to mean 1 to 10,000"),
    (lambda t: t.replace("Time: 0.03", "Time: 0.0003"), "expected 2 to 200,000 frames"),
    (lambda t: t.replace("-42.000000", "0"), "l hip and l knee to lie apart"),
    (lambda t: t.replace("-42.000000", "1e300"), "positions below 1e.09"),
    (lambda t: t.replace("-42.000000", "inf"), "OFFSET three finite numbers"),
])  # fmt: skip
def test_bad_files_get_one_sentence(tmp_path, change, expected):
    path = tmp_path / "a.bvh"
    path.write_text(change(bvh_text(np.zeros((3, 21, 3)))))
    with pytest.raises(ValueError, match=expected) as e:
        mocap.read_bvh(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="empty lacks motion"):
        (tmp_path / "empty").mkdir()
        mocap.read_folder(tmp_path / "empty", "bvh")


@given(st.data())
@settings(max_examples=150 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_files_are_read_or_refused(tmp_path_factory, data):
    text = bvh_text(np.zeros((3, 21, 3)))
    for _ in range(data.draw(st.integers(1, 3))):
        a = data.draw(st.integers(0, len(text)))
        b = a + data.draw(st.integers(0, 60))
        words = st.sampled_from(["}", "{", "JOINT x", "End Site", "-1", "1e999", "CHANNELS 99999",
                                 "Frames: 0", "OFFSET"])
        new = data.draw(st.one_of(st.text(max_size=5), st.just(text[a:b] * 2), words))
        text = text[:a] + new + text[b:]
    path = tmp_path_factory.getbasetemp() / "mutated.bvh"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        clip = mocap.read_bvh(path)
    except ValueError as e:
        assert str(path) in str(e)
    else:
        assert np.isfinite(clip["quats"]).all() and clip["quats"].shape[1:] == (9, 4)


# --------------------------------------------------------------------------------------------------
# AMASS

BODY = smpl_content(10, 8)
LIMBS = {"root": (0, 9), "chest": (9, 12), "neck": (12, 15),
         "l_thigh": (1, 4), "l_shin": (4, 7), "r_thigh": (2, 5), "r_shin": (5, 8),
         "l_arm": (16, 18), "l_forearm": (18, 20),
         "r_arm": (17, 19), "r_forearm": (19, 21)}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("smpl") / "SMPL_NEUTRAL.pkl"
    write_smpl_pkl(path, BODY)
    return smpl.read(path)


def body_rotations(T, seed=0):
    """Axis-angle [T, 22, 3] of somebody upright in a world with z up, with knees and elbows bent by
    30 to 110 degrees."""
    rng = np.random.default_rng(seed)
    v = rng.normal(size=(T, 22, 3)) * 0.15
    v[:, 0] = rng.normal(size=(T, 3)) * 0.3 + [np.pi / 2, 0, 0]
    v[:, [1, 2, 16, 17]] *= 3
    bend = np.radians(rng.uniform(30, 110, (T, 4)))
    v[:, [4, 5]] = bend[:, :2, None] * [1, 0, 0]
    v[:, [18, 19]] = bend[:, 2:, None] * np.array([[0, -1, 0], [0, 1, 0]])
    return v


def amass(v, style="smplh", fps=120.0, **other):
    """The arrays of an AMASS file with the rotations v [T, 22, 3]; with random hands, and shapes
    that SMPL lacks."""
    T, rng = len(v), np.random.default_rng(1)
    hands = rng.normal(size=(T, 90))
    betas = np.concatenate([rng.normal(size=10), np.full(6, 100.0)])
    trans = rng.normal(size=(T, 3)) + [0, 0, 1]
    if style == "smplh":
        poses = np.concatenate([v.reshape(T, 66), hands], 1)
        made = dict(poses=poses, mocap_framerate=fps, dmpls=np.zeros((T, 8)))
    else:
        made = dict(root_orient=v[:, 0], pose_body=v[:, 1:].reshape(T, 63), pose_hand=hands,
                    mocap_frame_rate=fps, surface_model_type="smplx")
    return made | dict(trans=trans, betas=betas, gender="female") | other


def read_amass(tmp_path, model, content):
    np.savez(tmp_path / "a_poses.npz", **content)
    return mocap.read_amass(tmp_path / "a_poses.npz", model)


def second_body(v, betas, trans):
    """Joints [22, 3] of one frame in the clips' axes, and [24, 3] in rest: 4 x 4 matrices, an
    implementation of its own."""
    rest, world = BODY["J_regressor"] @ (BODY["v_template"] + BODY["shapedirs"] @ betas[:10]), []
    for j, parent in enumerate(SMPL_PARENTS[:22]):
        m = np.eye(4)
        m[:3, :3], m[:3, 3] = rodrigues(v[j]), rest[j] - rest[parent] if j else rest[0] + trans
        world.append(world[parent] @ m if j else m)
    x, y, z = np.stack([m[:3, 3] for m in world], 1)
    return np.stack([x, z, -y], 1), rest


@pytest.mark.parametrize("fps, step", [(120, 4), (100, 3), (25, 1)])
@pytest.mark.parametrize("style", ["smplh", "smplx"])
def test_amass_limbs_point_where_the_files_do(tmp_path, model, style, fps, step, monkeypatch):
    monkeypatch.setattr(mocap, "CHUNK", 7)
    v = body_rotations(121)
    content = amass(v, style, float(fps))
    clip = read_amass(tmp_path, model, content)
    assert clip["action"] is None and clip["period"] is None
    np.testing.assert_allclose(clip["time"], np.arange(len(v[::step])) * step / fps)
    every = zip(v, [content["betas"]] * len(v), content["trans"], strict=True)
    bodies = [second_body(*frame) for frame in every]
    x, rest = np.stack([b[0] for b in bodies])[::step], bodies[0][1]
    ours = directions(clip)

    def degrees(bone, a, b):
        cosine = (ours[bone] * mocap.unit(x[:, b] - x[:, a])).sum(-1)
        return np.degrees(np.arccos(np.clip(cosine, -1, 1)))

    assert max(degrees(bone, *ends).max() for bone, ends in LIMBS.items()) < 0.01
    # The foot points as far above the line from ankle to toe as it does in the rest pose.
    soles = mocap.unit(rest[[10, 11]] - rest[[7, 8]])
    pitch = np.degrees(np.arcsin(-soles[:, 1])).mean()
    for bone, ends in (("l_foot", (7, 10)), ("r_foot", (8, 11))):
        np.testing.assert_allclose(degrees(bone, *ends), pitch, atol=0.01)
    floor = x[:, [7, 8, 10, 11], 1].min()
    thigh, shin = (np.median([np.linalg.norm(x[:, a] - x[:, b], axis=-1) for a, b in ends])
                   for ends in (((1, 4), (2, 5)), ((4, 7), (5, 8))))
    height = (x[:, 0, 1] - floor) * CLIP_STANDING_HEIGHT / (thigh + shin)
    np.testing.assert_allclose(clip["height"], height, rtol=1e-3)


def test_amass_t_pose_stands_and_faces_as_known(tmp_path, model):
    """Upright in z up: body y -> world z, so that the T-pose faces -y; then turned by 90 degrees,
    to x; then in the air."""
    v = np.zeros((3, 22, 3))
    v[:, 0] = [np.pi / 2, 0, 0], np.full(3, 2 * np.pi / 3 / 3**0.5), [np.pi / 2, 0, 0]
    trans = np.array([[0, 0, 0], [5, 5, 0], [0, 0, 0.3]])
    clip = read_amass(tmp_path, model, amass(v, fps=30, betas=np.zeros(10), trans=trans))
    forward = quat_to_matrix(clip["quats"][:, ROOT])[..., 0]
    np.testing.assert_allclose(forward, [[0, 0, 1], [1, 0, 0], [0, 0, 1]], atol=1e-6)
    assert np.abs(clip["hinges"]).max() < np.radians(12)  # legs and arms are straight
    rise = np.diff(clip["height"]) / clip["height"][0]
    np.testing.assert_allclose(rise, [0, 0.3 / 0.92], atol=1e-6)
    # Feet are flat on the floor, though the line to the toe goes down.
    assert np.abs(directions(clip)["r_foot"][:, 1]).max() < 0.05
    # The left arm lies along x, then along the world's y.
    x, y, z = mocap.unit(SMPL_JOINTS[18] - SMPL_JOINTS[16])
    expected = [[x, y, z], [z, y, -x], [x, y, z]]
    np.testing.assert_allclose(directions(clip)["l_arm"], expected, atol=1e-6)


@pytest.mark.parametrize("gender", [
    np.array("male"), np.array(b"male"), np.array("neutral", object), np.array(b"male", object),
    np.array(["male"], object),
], ids=["str", "bytes", "object", "object bytes", "list"])  # fmt: skip
def test_amass_gender_and_shapes_of_any_kind(tmp_path, model, gender):
    v = body_rotations(9)
    first = read_amass(tmp_path, model, amass(v, poses=amass(v)["poses"].astype(np.float32)))
    betas = amass(v)["betas"][:10].astype(np.float32)
    labels = np.array([["a"], {}], object)
    content = amass(v, "smplx", gender=gender, betas=betas, labels=labels)
    second = read_amass(tmp_path, model, content)
    np.testing.assert_allclose(np.abs((first["quats"] * second["quats"]).sum(-1)), 1, atol=1e-6)


WITHOUT = object()


@pytest.mark.parametrize("style, change, expected", [
    ("smplh", dict(poses=WITHOUT),
     r"expected poses to be numbers \[9, 66 or more\], found only mocap_framerate, dmpls"),
    ("smplh", dict(poses=np.zeros((9, 65))), r"poses .*66 or more\], found float64 \[9, 65\]"),
    ("smplh", dict(poses=np.zeros((8, 156))),
     r"poses .*\[9, 66 or more\], found float64 \[8, 156\]"),
    ("smplh", dict(poses=np.zeros((9, 52, 3))), "poses .*found float64"),
    ("smplh", dict(poses=np.full((9, 156), np.nan)), "poses .*finite and below a million"),
    ("smplh", dict(poses=np.array(3.0)), "expected poses"),
    ("smplh", dict(poses=np.full((9, 156), "a")), "found <U1"),
    ("smplx", dict(pose_body=WITHOUT),
     r"expected pose_body to be numbers \[9, 63\], found only root_orient"),
    ("smplx", dict(pose_body=np.zeros((9, 66))), r"pose_body .*\[9, 63\], found float64 \[9, 66\]"),
    ("smplx", dict(root_orient=np.zeros((8, 3))), "expected root_orient"),
    ("smplh", dict(trans=WITHOUT), r"expected trans to be numbers \[any, 3\]"),
    ("smplh", dict(trans=np.full((9, 3), np.inf)), "trans .*finite"),
    ("smplh", dict(trans=np.zeros((9, 2))), "expected trans"),
    ("smplh", dict(betas=WITHOUT), r"expected betas to be numbers \[10 or more\]"),
    ("smplh", dict(betas=np.zeros(9)), r"betas .*found float64 \[9\]"),
    ("smplh", dict(betas=np.zeros((1, 16))), "betas"),
    ("smplh", dict(betas=np.array(None)), "found object"),
    ("smplh", dict(betas=np.full(10, 1e300)), "betas .*million"),
    ("smplh", dict(mocap_framerate=WITHOUT),
     "expected mocap_framerate to be one number, found only"),
    ("smplh", dict(mocap_framerate=0),
     "expected mocap_framerate to mean 1 to 10,000 frames per second, found 0"),
    ("smplh", dict(mocap_framerate=-120.0), "found -120"),
    ("smplh", dict(mocap_framerate=np.nan), "framerate .*finite"),
    ("smplh", dict(mocap_framerate="120"), "mocap_framerate to be one number, found <U3"),
    ("smplx", dict(mocap_frame_rate=np.zeros(2)),
     r"mocap_frame_rate to be one number, found float64 \[2\]"),
    ("smplh", dict(mocap_framerate=2000.0), "2 to 200,000 frames at 30 per second, found 1"),
    ("smplh", dict(trans=np.zeros((0, 3)), poses=np.zeros((0, 156))), "2 to 200,000 .* found 0"),
])  # fmt: skip
def test_bad_amass_files_get_one_sentence(tmp_path, model, style, change, expected):
    content = amass(body_rotations(9), style) | change
    content = {k: a for k, a in content.items() if a is not WITHOUT}
    with pytest.raises(ValueError, match=expected) as e:
        read_amass(tmp_path, model, content)
    assert str(tmp_path / "a_poses.npz") in str(e.value) and "\n" not in str(e.value)


@given(st.data())
@settings(max_examples=100 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_amass_files_are_read_or_refused(tmp_path_factory, model, data):
    content = amass(body_rotations(9), data.draw(st.sampled_from(["smplh", "smplx"])))
    path = tmp_path_factory.getbasetemp() / "mutated_poses.npz"
    odd = [
        np.array(0), np.array(1e30), np.array([]), np.array(None), np.array("x"),
        np.zeros((2, 3), np.float16), np.full((9, 66), 1e5), np.full((9, 3), -1e5),
        np.zeros((9, 156), bool), np.full(10, 1e5), np.full(16, 7, np.int8),
    ]  # fmt: skip
    for _ in range(data.draw(st.integers(0, 2))):
        key = data.draw(st.sampled_from(sorted(content)))
        content[key] = data.draw(st.sampled_from(odd))
        if data.draw(st.booleans()):
            del content[key]
        if not content:
            return
    np.savez(path, **content)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        a = data.draw(st.integers(0, len(raw)))
        raw[a : a + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=8))
    path.write_bytes(raw)
    try:
        clip = mocap.read_amass(path, model)
    except ValueError as e:
        assert str(path) in str(e) and "\n" not in str(e)
    else:
        assert all(np.isfinite(clip[k]).all() for k in ("time", "quats", "hinges", "height"))


def test_a_folder_of_amass_files(tmp_path, capsys):
    def write(name, **content):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        np.savez(tmp_path / name, **content)

    v = body_rotations(9)
    lacks = "lacks motion .*amass.is.tue.mpg.de.*; smpl .*smpl.is.tue.mpg.de"
    with pytest.raises(ValueError, match=lacks):
        mocap.read_folder(tmp_path, "amass")
    write("CMU/01/01_01_poses.npz", **amass(v))
    write("KIT/smplx walk_stageii.npz", **amass(v, "smplx"))
    write("own.npz", **amass(v))
    write("CMU/01/shape.npz", betas=np.zeros(16))
    write("KIT/neutral_stagei.npz", betas=np.zeros(16))
    write("SMPLX_NEUTRAL.npz", f=np.zeros(3))
    write("SMPL_FEMALE.npz", f=np.zeros(3))
    with pytest.raises(ValueError, match="SMPL_FEMALE.npz is no SMPL model"):
        mocap.read_folder(tmp_path, "amass")
    write_smpl_pkl(tmp_path / "basicmodel_neutral_lbs_10_207_0_v1.1.0.pkl", BODY)
    capsys.readouterr()
    clips = mocap.read_folder(str(tmp_path), "amass")
    assert set(clips) == {"CMU/01/01_01_poses", "KIT/smplx walk_stageii", "own"}
    assert not capsys.readouterr().err
    for i in range(18):
        write(f"more/{i}_poses.npz", **amass(v))
    assert len(mocap.read_folder(tmp_path, "amass")) == 21 and "21/21" in capsys.readouterr().err


def test_a_folder_of_bvh_files(tmp_path, capsys):
    (tmp_path / "01").mkdir()
    for name in ("walk.bvh", "01/01_02.BVH"):
        (tmp_path / name).write_text(bvh_text(np.zeros((3, 21, 3))))
    (tmp_path / "other.bvh").write_text(bvh_text(np.zeros((3, 21, 3)), prefix="mixamorig:"))
    clips = mocap.read_folder(tmp_path, "bvh")
    assert set(clips) == {"walk", "01/01_02", "other"}
    assert not {"action", "taken"} & clips["walk"].keys()
    # One line for every skeleton, not for every file
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("  joints of ")]
    assert lines[0] == (
        "  joints of 01/01_02 and 1 more: up y | hips Hips | chest Spine1 | neck Neck | head Head"
        " | hip LeftUpLeg, RightUpLeg | knee LeftLeg, RightLeg | ankle LeftFoot, RightFoot"
        " | toe LeftToeBase, RightToeBase | shoulder LeftArm, RightArm"
        " | elbow LeftForeArm, RightForeArm | wrist LeftHand, RightHand")
    assert len(lines) == 2 and "other: up y | hips mixamorig:Hips | chest" in lines[1]


def test_toes_that_are_not_found_are_said(tmp_path, capsys):
    """An ankle that carries two unknown joints: neither is surely the toe."""
    text = bvh_text(np.zeros((3, 21, 3)))
    end = "End Site\n          { OFFSET 0 -5 0 }"
    assert text.count(end) > 2
    two = "JOINT {}\n{{\nOFFSET 0 1 0\nEnd Site\n{{\nOFFSET 0 1 0\n}}\n}}\n"
    text = re.sub(r"(JOINT LeftFoot\n.*\n.*\n.*\n)", r"\1" + two.format("x") + two.format("y"),
                  text.replace("LeftToeBase", "z"))
    (tmp_path / "a.bvh").write_text(text)
    mocap.read_folder(tmp_path, "bvh")
    said = capsys.readouterr().out
    assert " | toe NOT FOUND, RightToeBase | " in said
    assert said.rstrip().endswith("| a foot without a toe keeps to its shin")


@pytest.mark.parametrize("kind", ["bvh", "amass"])
def test_one_bad_file_stops_no_folder(tmp_path, kind, capsys):
    folder, end = tmp_path / "motion", {"bvh": ".bvh", "amass": "_poses.npz"}[kind]
    folder.mkdir()
    for name in ("bad\x1b[31m", "worse"):
        (folder / f"{name}{end}").write_bytes(b"secret")
    if kind == "amass":
        write_smpl_pkl(folder / "SMPL_NEUTRAL.pkl", BODY)
    with pytest.raises(ValueError, match="^None of 2 files can be used; of the first one: .*bad"):
        mocap.read_folder(folder, kind)
    if kind == "bvh":
        (folder / f"good{end}").write_text(bvh_text(np.zeros((3, 21, 3))))
    else:
        np.savez(folder / f"good{end}", **amass(body_rotations(9)))
    capsys.readouterr()
    assert list(mocap.read_folder(folder, kind)) == [f"good{end}".rpartition(".")[0]]
    said = capsys.readouterr().out
    title, first, second = said[said.index("  left out, ") :].splitlines()
    assert title == "  left out, 2 of 3 files:" and "secret" not in said
    assert "bad\\x1b[31m" in first and "\x1b" not in first and "worse" in second


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.bvh")
    os.symlink("/dev/zero", tmp_path / "zero.bvh")
    for name in ("pipe.bvh", "zero.bvh"):
        with pytest.raises(ValueError, match=f"{name} is no BVH file .*: it is no regular file"):
            mocap.read_bvh(tmp_path / name)
    with pytest.raises(ValueError, match="gone.bvh is no BVH file .*: No such file or directory"):
        mocap.read_bvh(tmp_path / "gone.bvh")


def test_files_of_one_name(tmp_path):
    for name in ("a.bvh", "a.BVH", "b.bvh"):
        (tmp_path / name).write_text(bvh_text(np.zeros((3, 21, 3))))
    assert set(mocap.read_folder(tmp_path, "bvh")) == {"a", "b"}


def test_a_first_frame_in_the_rest_pose_is_left_out(tmp_path):
    angles = moving(T=8)
    angles[0] = 0
    assert len(clip_of(tmp_path, angles)["time"]) == 7  # as in CMU's files
    assert len(clip_of(tmp_path, moving(T=8))["time"]) == 8
    angles[1] = 0  # somebody who stands at rest
    assert len(clip_of(tmp_path, angles)["time"]) == 8
    angles[:] = moving(T=8)
    lying = lying_rest(angles, np.array([1.0, 0, 0]))
    lying["angles"][0] = 0
    assert len(clip_of(tmp_path, **lying)["time"]) == 7


def lying_rest(angles, axis):
    """The same motion as bvh_text's, but in the rest pose the bones lie along an axis."""

    def basis(v):
        v = mocap.unit(v)
        w = mocap.unit(np.cross(v, np.eye(3)[np.abs(v).argmin()]))
        return np.stack([v, w, np.cross(v, w)], -1)

    children = [[k for k, p in enumerate(PARENTS) if p == j] for j in range(len(NAMES))]
    turn = [basis(OFFSETS[c[0]]) @ basis(axis).T if len(c) == 1 else np.eye(3) for c in children]
    offsets, turned = OFFSETS.copy(), angles.copy()
    for j, parent in enumerate(PARENTS):
        before = turn[parent] if parent >= 0 else np.eye(3)
        offsets[j] = before.T @ OFFSETS[j]
        for t, (z, x, y) in enumerate(angles[:, j]):
            m = rotation("Z", z) @ rotation("X", x) @ rotation("Y", y)
            m = before.T @ m @ turn[j]
            turned[t, j] = np.degrees([np.arctan2(-m[0, 1], m[1, 1]), np.arcsin(m[2, 1]),
                                       np.arctan2(-m[2, 0], m[2, 2])])
    return dict(angles=turned, offsets=offsets)


@pytest.mark.parametrize("axis", [*np.eye(3), *-np.eye(3)], ids=lambda axis: str(axis.astype(int)))
def test_a_rest_pose_that_nobody_takes(tmp_path, axis):
    """Soles come out within 4 degrees, which is how far this person's shins are from leaning as
    most people's do, and all else as if the rest pose were upright."""
    angles = moving(80)
    angles[:, [NAMES.index("RightFoot"), NAMES.index("LeftFoot")]] = 0
    upright, lying = clip_of(tmp_path, angles), clip_of(tmp_path, **lying_rest(angles, axis))
    for ours, expected in zip(directions(lying).items(), directions(upright).values(), strict=True):
        bone, ours = ours
        angle = np.degrees(np.arccos(np.clip((ours * expected).sum(-1), -1, 1)))
        assert angle.max() < (4.01 if "foot" in bone else 0.01), bone
    np.testing.assert_allclose(lying["height"], upright["height"], rtol=1e-5)


def test_a_neck_in_the_place_of_the_chest(tmp_path):
    """As in CMU's files: then the chest is what that hangs on, and the trunk still points right."""
    angles, offsets = moving(20), OFFSETS.copy()
    offsets[NAMES.index("Neck")] = 0
    text = bvh_text(angles, offsets=offsets)
    (tmp_path / "a.bvh").write_text(text)
    clip = mocap.read_bvh(tmp_path / "a.bvh")
    assert clip["taken"]["chest"] == "Spine" and clip["taken"]["neck"] == "Neck"
    m = quat_to_matrix(clip["quats"])
    np.testing.assert_allclose(np.linalg.norm(clip["quats"], axis=-1), 1, atol=1e-9)
    expected = []
    for frame in angles:
        x = dict(zip(NAMES, second_reading(frame, "ZXY", np.zeros(3)), strict=True))
        expected.append(mocap.unit(x["Spine1"] - x["Spine"]))
    trunk = (m[:, ROOT] @ m[:, CHEST])[..., 1]
    np.testing.assert_allclose(trunk, expected, atol=1e-5)


@pytest.mark.parametrize("toe", ["Toes_@", "Toe.@", "ball_@", "@_toe_01", "Zehe_@"])
def test_toes_of_any_name(tmp_path, toe):
    angles = moving(8)
    names = [toe.replace("@", n[0]) if "ToeBase" in n else n for n in NAMES]
    a, b = clip_of(tmp_path, angles), clip_of(tmp_path, angles, names=names)
    np.testing.assert_array_equal(a["quats"], b["quats"])


def test_frames_are_counted_before_anything_is_made(tmp_path, model, monkeypatch):
    """int8 takes an eighth of the memory of the numbers that are made of it."""
    monkeypatch.setattr(mocap, "MOST_FRAMES", 1000)
    content = amass(body_rotations(9), fps=30) | dict(
        trans=np.zeros((500_000, 3), np.int8), poses=np.zeros((500_000, 66), np.int8))
    np.savez_compressed(tmp_path / "a_poses.npz", **content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="expected 2 to 1,000 frames at 30 .*found 500000"):
        mocap.read_amass(tmp_path / "a_poses.npz", model)
    assert tracemalloc.get_traced_memory()[1] < 150 << 20
    tracemalloc.stop()
    with pytest.raises(ValueError, match="expected 2 to 1,000 frames at 30 .*found 1001"):
        clip_of(tmp_path, np.zeros((1001, 21, 3)))
