"""A tiny body and tiny clips, so that no test needs a download; a body of SMPL's shapes."""

import json
import os
import pickle
import sys
import types

# Of tests and of the scripts that they start: more threads do nothing for tensors as small as
# these, and spend their time in waiting for one another. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

import prepare_data  # noqa: E402
import train  # noqa: E402
from hipart import PART_JOINT, RIGHT  # noqa: E402
from sources.coarsening import coarsen  # noqa: E402
from sources.geometry import quat_from_rotvec  # noqa: E402
from sources.layouts import LAYOUTS  # noqa: E402
from sources.motion import HINGE_COLUMNS, QUAT_COLUMNS, parse_clip  # noqa: E402

FUZZ = int(os.environ.get("FUZZ", 1))  # how many times as long readers are fed with mutated files
TINY_SIZES = {"train": 64, "val": 32, "test": 32, "unseen": 32}
TOE = np.array([0.0, -0.16, -0.06])


# A person from the front: right of the image, and up, in metres, for the left side (x mirrored for
# the right one) and the middle. The names are those of sources/layouts.py.
FRONT = {
    "pelvis": (0, 0.93), "spine": (0, 1.18), "thorax": (0, 1.42), "neck": (0, 1.43),
    "middle of the shoulders": (0, 1.42), "upper neck": (0, 1.5), "nose": (0, 1.58),
    "head top": (0, 1.76), "eye": (0.03, 1.63), "eye inner": (0.02, 1.63),
    "eye outer": (0.04, 1.63), "ear": (0.08, 1.61), "mouth": (0.02, 1.54),
    "shoulder": (0.18, 1.42), "elbow": (0.27, 1.15),
    "wrist": (0.3, 0.9), "pinky": (0.32, 0.83), "index": (0.3, 0.82), "thumb": (0.27, 0.84),
    "hip": (0.12, 0.93), "knee": (0.13, 0.5), "ankle": (0.13, 0.09), "heel": (0.13, 0.04),
    "big toe": (0.15, 0.02), "small toe": (0.19, 0.03), "foot index": (0.16, 0.02),
}  # fmt: skip


def person(layout, seed=0, height=300.0, at=(320.0, 240.0)):
    """Points [K, 3] (px, px, score) in a layout of somebody who faces the camera, about `height` px
    tall: limbs swing a little, so that people of different seeds differ."""
    rng = np.random.default_rng(seed)
    swing = {(joint, side): rng.normal(0, 0.03, 2) for joint in FRONT for side in ("l", "r", "")}
    points = []
    for name in LAYOUTS[layout]:
        side, joint = (name[0], name[2:]) if name[:2] in ("l ", "r ") else ("", name)
        x, y = FRONT[joint] + swing[joint, side] * (joint in ("elbow", "wrist", "knee", "ankle"))
        x = -x if side == "r" else x
        points.append([at[0] + x * height / 1.76, at[1] + (0.9 - y) * height / 1.76, 0.9])
    return np.array(points).round(3)


def rest_joints():
    """Human3.6M's joints of a 1.8 m person in A-pose, [17, 3] m: z up, facing -y, left = +x."""
    joints = np.zeros((17, 3))
    joints[[0, 7, 8]] = [0, 0, 0.95], [0, 0, 1.2], [0, 0, 1.45]
    joints[[9, 10]] = [0, -0.06, 1.6], [0, 0, 1.75]
    joints[[4, 5, 6]] = [0.1, 0, 0.95], [0.12, 0, 0.52], [0.13, 0.02, 0.09]
    joints[[11, 12, 13]] = [0.18, 0, 1.4], [0.38, 0, 1.2], [0.52, -0.08, 1.02]
    joints[list(RIGHT)] = joints[[4, 5, 6, 11, 12, 13]] * [-1, 1, 1]
    return joints


def make_bodies(counts=(4, 2, 2), voxel=0.05):
    """Bodies of capsules as write_data_set wants them: the surface of the voxels that lie in the
    capsules, a closed mesh. As with Anny's, the origin is not on the floor."""
    joints = rest_joints()
    spine = [joints[0] + (joints[7] - joints[0]) * f for f in (0.2, 0.5, 0.8)]
    neck = [joints[7], joints[[7, 8]].mean(0), joints[8], joints[[8, 9]].mean(0), joints[9]]
    heads = np.array([joints[0], *spine, *neck, *joints[[1, 2, 3, 4, 5, 6, 14, 15, 11, 12]]])
    right, left = ([*joints[[a, b]], joints[b] + TOE] for a, b in ((2, 3), (5, 6)))
    ends = [joints[0], *heads[2:9], joints[10], *right, *left, *joints[[15, 16, 12, 13]]]
    ends = np.array(ends)
    radius = [0.14] * 6 + [0.07] * 2 + [0.1] + [0.09, 0.07, 0.06] * 2 + [0.06] * 4

    def distance(p):  # [V, 19] to the surface of each segment's capsule
        d = ends - heads
        t = np.einsum("vsk,sk->vs", p[:, None] - heads, d) / np.maximum((d * d).sum(1), 1e-9)
        away = p[:, None] - heads - np.clip(t, 0, 1)[..., None] * d
        return np.linalg.norm(away, axis=-1) - np.array(radius)

    sides = (np.arange(a, b) for a, b in ((-16, 16), (-8, 8), (-2, 42)))
    grid = np.stack(np.meshgrid(*sides, indexing="ij"), -1)
    inside = distance((grid.reshape(-1, 3) + 0.5) * voxel).min(1) < 0
    inside = inside.reshape(grid.shape[:3])
    quads, axes = [], np.eye(3, dtype=int)
    for axis in range(3):
        for sign in (1, -1):
            bare = grid[inside & ~np.roll(inside, -sign, axis)]
            u, v = axes[(axis + 1) % 3], axes[(axis + 2) % 3]
            corner = bare + (axes[axis] if sign > 0 else 0)
            quad = np.stack([corner, corner + u, corner + u + v, corner + v], 1)
            quads.append(quad if sign > 0 else quad[:, ::-1])
    corners = np.concatenate(quads).reshape(-1, 3)
    corners, index = np.unique(corners, axis=0, return_inverse=True)
    index = index.reshape(-1, 4)
    faces = np.concatenate([index[:, [0, 1, 2]], index[:, [0, 2, 3]]])
    vertices = corners * voxel
    weights = np.exp(-np.maximum(distance(vertices), 0) / 0.02)
    weights /= weights.sum(1, keepdims=True)
    scale = np.linspace(0.9, 1.05, sum(counts))[:, None, None]
    joints, heads, vertices = (a - [0, 0, 0.7] for a in (joints, heads, vertices))
    return {
        "vertices": vertices * scale, "faces": faces, "weights": weights,
        "heads": heads * scale, "joints": joints * scale,
        "stature": np.ptp(vertices[:, 2]) * scale[:, 0, 0], "split_sizes": counts,
    }  # fmt: skip


@pytest.fixture(scope="session")
def bodies():
    return make_bodies()


@pytest.fixture(scope="session")
def levels(bodies):
    joints = bodies["joints"][0][list(PART_JOINT)]
    return coarsen(bodies["vertices"][0], bodies["faces"], joints)


def clip_text(seed, frames=60, dt=1 / 30, loop="wrap"):
    """A smooth random clip in DeepMimic's format."""
    rng, phase = np.random.default_rng(seed), np.linspace(0, 2 * np.pi, frames, endpoint=False)
    table = np.zeros((frames, 44))
    table[:, 0], table[:, 2] = dt, 0.85 + 0.05 * np.sin(phase)
    for column in QUAT_COLUMNS:
        rotvec = rng.normal(size=3) * 0.4 * np.sin(phase + rng.uniform(0, 6))[:, None]
        table[:, column : column + 4] = quat_from_rotvec(rotvec)
    for column, sign in zip(HINGE_COLUMNS, (-1, 1, -1, 1), strict=True):
        table[:, column] = sign * (0.6 + 0.5 * np.sin(phase + rng.uniform(0, 6)))
    return json.dumps({"Loop": loop, "Frames": table.tolist()})


def make_clips():
    names = ("jump", "kick", "punch", "walk")
    clips = {name: parse_clip(clip_text(i)) for i, name in enumerate(names)}
    clips["jump"]["height"] += 0.5  # high in the air, all the time
    return clips


def random_pose(rng, n):
    """A pose of the clips: quats, hinges and height of n people."""
    quats = quat_from_rotvec(rng.normal(size=(n, 9, 3)) * 0.5)
    return quats, rng.uniform(0, 1.5, (n, 4)) * [-1, 1, -1, 1], np.full(n, 0.86)


def write_tiny(folder, sizes=TINY_SIZES, seed=0, **options):
    return prepare_data.write_data_set(folder, make_clips(), make_bodies(), sizes, seed,
                                       {"clips": "synthetic"}, unseen=("kick",), **options)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data root that holds the set 'tiny': 64 train, 32 val, 32 test, 32 unseen samples. Do not
    write to it."""
    root = tmp_path_factory.mktemp("data")
    write_tiny(root / "tiny")
    return root


@pytest.fixture(scope="session")
def tiny_sequences(tmp_path_factory):
    """A data root that holds the same as sequences, with more frames to train on, in 'sequences';
    and in 'correlated', with errors that last 30 frames. Do not write to it."""
    root, sizes = tmp_path_factory.mktemp("sequences"), TINY_SIZES | {"train": 256}
    write_tiny(root / "sequences", sizes, time=0)
    write_tiny(root / "correlated", sizes, time=30)
    return root


# Sizes of a run that trains in seconds, for the scripts that read one.
RUN_SIZES = dict(
    D=8, K_s=16, K_d=24, encoder_blocks=1, encoder_width=12, decoder_width=12, token_hidden=8,
    width=16, heads=2, mlp_ratio=2, gcsab_blocks=2, ph_blocks=1, dropout=0.1, lifter="mlp",
    lifter_width=16, lifter_blocks=1, warmup_free=4, epochs_1=3, batch_1=16, epochs_2=2, batch_2=16,
    epochs_3=2, batch_3=32, passes_3=2, epochs_equal=2, regressor_width=32,
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tmp_path_factory):
    """A folder that holds runs/tiny: all stages, two lifters per input, trained on the set 'tiny'.
    Do not write to it."""
    folder, precision = tmp_path_factory.mktemp("run"), torch.get_float32_matmul_precision()
    sizes = [part for k, v in RUN_SIZES.items() for part in (f"--{k}", str(v))]
    options = ["--preset", "paper", "--name", "tiny", "--data", f"{tiny_data}/tiny"]
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        m.setattr(train, "script", lambda *command: None)  # no tables and figures
        for stage in "123":
            m.setattr("sys.argv", ["train.py", *options, "--stage", stage, "--seeds", "2",
                                   "--device", "cpu", *sizes])
            train.main()
    torch.set_float32_matmul_precision(precision)
    return folder


# --------------------------------------------------------------------------------------------------
# A body of SMPL's shapes, since the real one is licensed: an ellipsoid of 6890 vertices (or fewer)
# with made-up joints.

SMPL_PARENTS = [-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19, 20, 21]
_MIDDLE = {0: (0, 0, 0), 3: (0, 0.11, -0.03), 6: (0, 0.25, 0), 9: (0, 0.3, 0),
           12: (0, 0.51, -0.03), 15: (0, 0.58, 0.03)}  # fmt: skip
_LEFT = {1: (0.07, -0.09, 0), 4: (0.1, -0.47, 0), 7: (0.09, -0.87, -0.04), 10: (0.12, -0.92, 0.1),
         13: (0.08, 0.42, 0), 16: (0.19, 0.44, -0.03), 18: (0.45, 0.43, -0.05),
         20: (0.7, 0.44, -0.05), 22: (0.78, 0.43, -0.06)}  # fmt: skip
_RIGHT = {j + 1: (-x, y, z) for j, (x, y, z) in _LEFT.items()}
# T-pose, m: y up, facing z, left = +x
SMPL_JOINTS = np.array([(_MIDDLE | _LEFT | _RIGHT)[j] for j in range(24)])
H36M_OF_SMPL = [0, 2, 5, 8, 1, 4, 7, 6, 12, 15, 15, 16, 18, 20, 17, 19, 21]


def regressor_onto(points, vertices):
    """Rows [P, V] that sum to 1 and take the vertices to the points (the smallest such)."""
    v1, p1 = (np.concatenate([a, np.ones((len(a), 1))], 1) for a in (vertices, points))
    return np.linalg.lstsq(v1.T, p1.T, rcond=None)[0].T


def smpl_content(rings=84, around=82, seed=0):
    """The arrays of an SMPL file, plain: 2 + rings * around vertices (6890 as they are)."""
    rng = np.random.default_rng(seed)
    polar = np.pi * (np.arange(rings) + 1)[:, None] / (rings + 1)
    azimuth = 2 * np.pi * np.arange(around)[None] / around
    x, z = np.sin(polar) * np.cos(azimuth), np.sin(polar) * np.sin(azimuth)
    sphere = np.stack(np.broadcast_arrays(x, np.cos(polar), z), -1)
    v = np.concatenate([[[0, 1, 0]], sphere.reshape(-1, 3), [[0, -1, 0]]]) * [0.8, 0.95, 0.15]
    index = 1 + np.arange(rings * around).reshape(rings, around)
    right, first, last = np.roll(index, -1, 1), 0 * index[0], 0 * index[0] + len(v) - 1
    quads = np.stack([index[:-1], right[:-1], right[1:], index[1:]], -1).reshape(-1, 4)
    faces = np.concatenate([
        quads[:, [0, 1, 2]], quads[:, [0, 2, 3]],
        np.stack([first, right[0], index[0]], -1), np.stack([last, index[-1], right[-1]], -1),
    ])  # fmt: skip
    near = np.exp(-np.linalg.norm(v[:, None] - SMPL_JOINTS, axis=-1) / 0.05)
    return {
        "v_template": v, "f": faces.astype(np.uint32),
        "weights": near / near.sum(1, keepdims=True),
        "shapedirs": rng.normal(size=(len(v), 3, 10)) * 0.01,
        "posedirs": rng.normal(size=(len(v), 3, 207)) * 0.002,
        "J_regressor": regressor_onto(SMPL_JOINTS, v), "bs_type": "lrotmin",
        "kintree_table": np.array([[4294967295, *SMPL_PARENTS[1:]], range(24)], np.int64),
    }  # fmt: skip


def write_smpl_pkl(path, content):
    """As the official files are: a Python-2 pickle with arrays of chumpy and a sparse matrix of
    SciPy (fakes of both)."""
    fakes, before = {}, dict(sys.modules)
    for module, name in (("chumpy.ch", "Ch"), ("chumpy.reordering", "Select"),
                         ("scipy.sparse.csc", "csc_matrix")):
        fakes[name] = type(name, (), {"__module__": module})
        parts = module.split(".")
        for k in range(len(parts)):
            sys.modules[".".join(parts[: k + 1])] = types.ModuleType(parts[k])
        setattr(sys.modules[module], name, fakes[name])

    def fake(name, **state):
        made = fakes[name]()
        made.__dict__.update(state)
        return made

    J, shapedirs = content["J_regressor"], content["shapedirs"]
    indices = np.tile(np.arange(len(J)), J.shape[1])
    made = content | {
        "v_template": fake("Ch", x=content["v_template"]),
        "posedirs": fake("Ch", x=content["posedirs"], label=None),
        "shapedirs": fake("Select", a=fake("Ch", x=np.concatenate([shapedirs.ravel(), [7.0]])),
                          idxs=np.arange(shapedirs.size), preferred_shape=shapedirs.shape),
        "J_regressor": fake("csc_matrix", _shape=J.shape, data=J.T.ravel(), indices=indices,
                            indptr=np.arange(0, J.size + 1, len(J)), format="csc"),
    }  # fmt: skip
    try:
        path.write_bytes(pickle.dumps(made, protocol=2))
    finally:
        for module in set(sys.modules) - set(before):
            del sys.modules[module]
        sys.modules.update(before)
