"""BVH files: parsed as an independent reading has them, and turned into clips that stand as the file's person stands."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mocap
import prepare_data as P

# A person in CMU's names, facing +z, left = +x, arms to the sides; centimetres. (name, parent, offset)
SKELETON = [
    ("Hips", None, (0, 0, 0)), ("RightUpLeg", "Hips", (-9, -4, 0)), ("RightLeg", "RightUpLeg", (0, -42, 0)),
    ("RightFoot", "RightLeg", (0, -41, 0)), ("RightToeBase", "RightFoot", (0, -7, 14)),
    ("LeftUpLeg", "Hips", (9, -4, 0)), ("LeftLeg", "LeftUpLeg", (0, -42, 0)), ("LeftFoot", "LeftLeg", (0, -41, 0)),
    ("LeftToeBase", "LeftFoot", (0, -7, 14)), ("Spine", "Hips", (0, 12, 0)), ("Spine1", "Spine", (0, 20, 0)),
    ("Neck", "Spine1", (0, 22, 0)), ("Head", "Neck", (0, 10, 2)), ("RightShoulder", "Spine1", (-4, 18, 0)),
    ("RightArm", "RightShoulder", (-13, 0, 0)), ("RightForeArm", "RightArm", (-28, 0, 0)),
    ("RightHand", "RightForeArm", (-25, 0, 0)), ("LeftShoulder", "Spine1", (4, 18, 0)),
    ("LeftArm", "LeftShoulder", (13, 0, 0)), ("LeftForeArm", "LeftArm", (28, 0, 0)), ("LeftHand", "LeftForeArm", (25, 0, 0)),
]  # fmt: skip
NAMES = [n for n, _, _ in SKELETON]
PARENTS = [NAMES.index(p) if p else -1 for _, p, _ in SKELETON]


def bvh_text(angles, order="ZXY", prefix="", z_up=False, positions=None, frame_time=1 / 30):
    """angles [T, 21, 3] degrees in channel order; positions [T, 3] of the root."""
    def swap(v):
        return (v[0], -v[2], v[1]) if z_up else v

    def joint(j, depth):
        pad = "  " * depth
        kind = "JOINT" if depth else "ROOT"
        rotations = " ".join(f"{axis}rotation" for axis in order)
        channels = f"6 Xposition Yposition Zposition {rotations}" if not depth else f"3 {rotations}"
        offset = " ".join(f"{v:.6f}" for v in swap(SKELETON[j][2]))
        children = [k for k, p in enumerate(PARENTS) if p == j]
        inside = "".join(joint(k, depth + 1) for k in children) or f"{pad}  End Site\n{pad}  {{ OFFSET 0 -5 0 }}\n"
        own = f"{pad}  OFFSET {offset}\n{pad}  CHANNELS {channels}\n"
        return f"{pad}{kind} {prefix}{NAMES[j]}\n{pad}{{\n{own}{inside}{pad}}}\n"

    def depth_first(j):
        return [j, *(d for k, p in enumerate(PARENTS) if p == j for d in depth_first(k))]

    T = len(angles)
    positions = np.zeros((T, 3)) + [0, 90, 0] if positions is None else positions
    rows = [" ".join(f"{v:.6f}" for v in (*swap(positions[t]), *angles[t, depth_first(0)].ravel())) for t in range(T)]
    return f"HIERARCHY\n{joint(0, 0)}MOTION\nFrames: {T}\nFrame Time: {frame_time:.8f}\n" + "\n".join(rows) + "\n"


def rotation(axis, degrees):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = {"X": (1, 2), "Y": (2, 0), "Z": (0, 1)}[axis]
    m = np.eye(3)
    m[i, i] = m[j, j] = c
    m[i, j], m[j, i] = -s, s
    return m


def second_reading(angles, order, root):
    """Positions [21, 3] of one frame by 4 x 4 matrices: an implementation of its own."""
    world = []
    for j, (_, _, offset) in enumerate(SKELETON):
        m = np.eye(4)
        m[:3, 3] = root if PARENTS[j] < 0 else offset
        for axis, degrees in zip(order, angles[j], strict=True):
            turn = np.eye(4)
            turn[:3, :3] = rotation(axis, degrees)
            m = m @ turn
        world.append(m if PARENTS[j] < 0 else world[PARENTS[j]] @ m)
    return np.stack([m[:3, 3] for m in world])


@pytest.mark.parametrize("order", ["ZXY", "ZYX", "XYZ"])
def test_positions_equal_a_second_reading(order):
    rng = np.random.default_rng(0)
    angles, root = rng.uniform(-170, 170, (3, 21, 3)).round(4), rng.uniform(-100, 100, (3, 3)).round(4)
    bvh = mocap.parse_bvh(bvh_text(angles, order, positions=root))
    index = [bvh["names"].index(n) for n in NAMES]
    for t in range(3):
        np.testing.assert_allclose(bvh["positions"][t, index], second_reading(angles[t], order, root[t]), atol=1e-4)
    assert bvh["fps"] == pytest.approx(30) and sum(n.endswith(" end") for n in bvh["names"]) == 5


def clip_of(tmp_path, angles, **options):
    (tmp_path / "a.bvh").write_text(bvh_text(angles, **options))
    return mocap.read_bvh(tmp_path / "a.bvh")


def directions(clip):
    """Of thighs, shins, feet, arms and forearms, trunk and head: as the clip poses a body, in its own axes (y up)."""
    m = P.quat_to_matrix(P.bone_orientations((clip["quats"], clip["hinges"], clip["height"])))
    columns = {"root": 1, "chest": 1, "neck": 1, "r_foot": 0, "l_foot": 0}
    return {b: m[:, i, :, columns.get(b, 1)] * (1 if b in columns else -1) for i, b in enumerate(P.BONES)}


def true_directions(angles, order="ZXY"):
    out = []
    for frame in angles:
        x = dict(zip(NAMES, second_reading(frame, order, np.zeros(3)), strict=True))
        pairs = {"chest": ("Spine1", "Neck"), "neck": ("Neck", "Head")}
        for letter, side in (("r", "Right"), ("l", "Left")):
            for bone, a, b in (("thigh", "UpLeg", "Leg"), ("shin", "Leg", "Foot"), ("arm", "Arm", "ForeArm"),
                               ("forearm", "ForeArm", "Hand")):
                pairs[f"{letter}_{bone}"] = side + a, side + b
        out.append({b: mocap.unit(x[q] - x[p]) for b, (p, q) in pairs.items()})
    return {b: np.stack([o[b] for o in out]) for b in out[0]}


def moving(T=40, seed=0):
    """Random poses that a person could take: knees and elbows bend one way, by anything up to 120 degrees."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-25, 25, (T, 21, 3))  # channels Z, X, Y
    angles[:, 0, 2] = rng.uniform(-180, 180, T)
    for name in ("Spine", "RightFoot", "LeftFoot", "RightShoulder", "LeftShoulder"):
        angles[:, NAMES.index(name)] *= 0.2
    for knee in ("RightLeg", "LeftLeg"):
        angles[:, NAMES.index(knee)] = np.stack([np.zeros(T), rng.uniform(0, 120, T), np.zeros(T)], 1)
    for elbow, way in (("RightForeArm", 1), ("LeftForeArm", -1)):  # arms to the sides: elbows bend forward about y
        angles[:, NAMES.index(elbow)] = np.stack([np.zeros(T), np.zeros(T), way * rng.uniform(0, 120, T)], 1)
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
        # a limb that is all but straight does not show its twist, so its small bend may go a little astray
        most = 3 if bone[2:] in ("shin", "forearm") else 0.05
        assert np.median(angle) < 0.01 and angle.max() < most, (bone, angle.max())


def test_standing_straight_is_the_clips_zero_pose(tmp_path):
    """Arms down, facing anywhere: no rotation anywhere but about the vertical axis, and 0.86 m high."""
    angles = np.zeros((3, 21, 3))
    angles[:, NAMES.index("RightArm"), 0], angles[:, NAMES.index("LeftArm"), 0] = 90, -90
    angles[:, 0, 2] = 0, 50, -120
    clip = clip_of(tmp_path, angles)
    still = [i for i in range(9) if i not in (P.ROOT, P.NECK)]
    assert np.abs(clip["quats"][:, still, 0]).min() > np.cos(np.radians(1)) and np.abs(clip["hinges"]).max() < 0.02
    forward = P.quat_to_matrix(clip["quats"][:, P.ROOT])[..., 0]
    np.testing.assert_allclose(forward, [[np.sin(a), 0, np.cos(a)] for a in np.radians([0, 50, -120])], atol=1e-6)
    assert clip["height"] == pytest.approx(np.full(3, P.CLIP_STANDING_HEIGHT), rel=0.15)


def test_z_up_files_are_turned_upright(tmp_path):
    """The same rest pose, written with z up."""
    angles = np.zeros((2, 21, 3))
    up, z = clip_of(tmp_path, angles), clip_of(tmp_path, angles, z_up=True)
    np.testing.assert_allclose(np.abs((up["quats"] * z["quats"]).sum(-1)), 1, atol=1e-6)


@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_quaternions_of_matrices(seed):
    q = mocap.unit(np.random.default_rng(seed).normal(size=(20, 4)))
    q[0], q[1] = [1, 0, 0, 0], [0, 1, 0, 0]
    back = mocap.matrix_to_quat(P.quat_to_matrix(q))
    np.testing.assert_allclose(np.abs((back * q).sum(-1)), 1, atol=1e-9)
    assert (back[:, 0] >= 0).all()


@pytest.mark.parametrize("change, expected", [
    (lambda t: t.replace("MOTION", ""), "found .Frames:."), (lambda t: t[:400], "then MOTION"),
    (lambda t: "", "then MOTION"),
    (lambda t: t.replace("Frames: 3", "Frames: 4"), "expected 4 frames"), (lambda t: t[:-30], "finite numbers"),
    (lambda t: t.replace("Frame Time:", "Time:"), "Frame Time"), (lambda t: t.replace("Zrot", "Wrot"), "Wrotation"),
    (lambda t: t.replace("90.000000", "nan"), "finite"), (lambda t: t.replace("RightUpLeg", "R2"), "no joint for r hip"),
    (lambda t: t.replace("OFFSET", "OFFSETS"), "found 'OFFSETS'"),
])  # fmt: skip
def test_bad_files_get_one_sentence(tmp_path, change, expected):
    path = tmp_path / "a.bvh"
    path.write_text(change(bvh_text(np.zeros((3, 21, 3)))))
    with pytest.raises(ValueError, match=expected) as e:
        mocap.read_bvh(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(ValueError, match="no .bvh file"):
        (tmp_path / "empty").mkdir()
        mocap.read_folder(tmp_path / "empty")


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_files_are_read_or_refused(tmp_path_factory, data):
    text = bvh_text(np.zeros((3, 21, 3)))
    for _ in range(data.draw(st.integers(1, 3))):
        a = data.draw(st.integers(0, len(text)))
        b = a + data.draw(st.integers(0, 60))
        text = text[:a] + data.draw(st.one_of(st.text(max_size=5), st.just(text[a:b] * 2), st.sampled_from(
            ["}", "{", "JOINT x", "End Site", "-1", "1e999", "CHANNELS 99999", "Frames: 0", "OFFSET"]))) + text[b:]
    path = tmp_path_factory.getbasetemp() / "mutated.bvh"
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        clip = mocap.read_bvh(path)
    except ValueError as e:
        assert str(path) in str(e)
    else:
        assert np.isfinite(clip["quats"]).all() and clip["quats"].shape[1:] == (9, 4)
