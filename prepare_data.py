"""Prepare the default data set: open Anny bodies x real motion capture, seen by Human3.6M-like cameras.

    python prepare_data.py                                # writes data/demo: 40,000 / 2,500 / 5,000 / 2,500 samples
    python prepare_data.py --train 2000 --name small      # another size under another name
    python prepare_data.py --wheels DIR                   # take the downloads from a folder instead of from pip
    python prepare_data.py --source bvh --folder DIR      # your own motion capture as further clips; or amass (mocap.py)
    python prepare_data.py --source h36m --folder DIR     # Human3.6M, with SMPL fits (human36m.py); or 3dpw (threedpw.py)

Human3.6M is licence-gated, so the default data need no account. Two packages are downloaded with pip, unpacked
privately and never installed: the body model `anny` (Apache-2.0; its shapes are CC0) and 15 motion-capture clips
(DeepMimic) out of the wheel of `pybullet`. The data flow one way (HiPART section 3, appendix B):

    clips -> (augment) -> retarget -> skin 17 + 48 + 96 points -> cameras -> data/NAME/{meta.json, SPLIT/*.npy}

`load(NAME, SPLIT)` reads it back; `detect` simulates the 2D detector; `coarsen` makes the 96 and 48 points out of
any triangle mesh.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import networkx as nx
import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot: needs no display
from tqdm import tqdm

from hipart import JOINT_NAMES, LEFT, PARENTS, PART_JOINT, RIGHT

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test", "unseen")
N_BODIES = (45, 5, 10)  # for training, validation and testing; the unseen split shows test bodies
UNSEEN_CLIPS = ("dance_b", "kick")  # whole clips that training never sees
AIRBORNE_CLIPS = ("backflip", "jump", "run", "spinkick")  # the clip's root height counts; all others stand on the floor
CLIP_STANDING_HEIGHT = 0.86  # m, of the root in the walk clip
LEAP = 0.8  # m: every other training pose of an airborne clip is lifted by up to this much more
IMAGE_SIZE = (1000, 1000)

# Everything that detect() needs; lengths are fractions of the person's projected standing height.
NOISE = {
    "sigma": 0.0079,  # Gaussian error per axis (about CPN's on Human3.6M), times this for each joint:
    "sigma_scale": [1.0, 1.0, 1.1, 1.3, 1.0, 1.1, 1.3, 1.0, 1.0, 1.0, 1.2, 1.0, 1.2, 1.4, 1.0, 1.2, 1.4],
    "p_box": 0.43,  # share of samples with a box in front of the person (some boxes cover no joint)
    "box_half_size": [0.10, 0.24],  # half width and half height of the box, each uniform
    "box_offset": 0.06,  # the box is centred on a random joint, off by this sigma
    "p_missing": 0.27,  # a joint behind the box is missing (conf 0); otherwise its error is
    "sigma_common": 0.065,  # a displacement common to all joints behind the box, plus
    "sigma_single": 0.05,  # one of its own
    "p_swap": 0.02,  # share of samples in which one arm or leg pair is swapped left/right
    "conf": {"visible": 2.3, "occluded": 0.6, "per_error": 6.0, "sigma": 0.9},  # logit of conf, see detect()
}

# name: (shape after N, dtype). With a simulated detector, x_s_det and conf are stored for every split but train, whose noise
# is drawn afresh. Where not every pose has dense and fine points, fit says which have; the others' x_d and x_f are 0.
ARRAYS = {
    "x_s": ((17, 2), "float32"), "x_d": ((48, 2), "float32"), "x_f": ((96, 2), "float32"),
    "y": ((17, 3), "float32"), "root": ((3,), "float32"), "height_px": ((), "float32"),
    "action": ((), "int64"), "subject": ((), "int64"), "camera": ((), "int64"),
    "x_s_det": ((17, 2), "float32"), "conf": ((17,), "float32"), "fit": ((), "bool"),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Rotations. Quaternions are (w, x, y, z), unit, in the last axis.


def quat_mul(a, b):
    """Hamilton product of quaternions [..., 4]: first b, then a."""
    aw, ax, ay, az = np.moveaxis(a, -1, 0)
    bw, bx, by, bz = np.moveaxis(b, -1, 0)
    return np.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ],
        -1,
    )


def quat_from_rotvec(v):
    """Rotation vectors [..., 3] (axis times angle, radians) -> quaternions [..., 4]."""
    half = 0.5 * np.linalg.norm(v, axis=-1, keepdims=True)
    return np.concatenate([np.cos(half), 0.5 * np.sinc(half / np.pi) * v], -1)


def quat_to_matrix(q):
    """Unit quaternions [..., 4] -> rotation matrices [..., 3, 3]."""
    w, x, y, z = np.moveaxis(q, -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(r, -1) for r in rows], -2)


def slerp(a, b, t):
    """Shortest-arc interpolation of quaternions a, b [..., 4] at t [...] in [0, 1]."""
    dot = np.sum(a * b, -1, keepdims=True)
    b = np.where(dot < 0, -b, b)
    angle = np.arccos(np.clip(np.abs(dot), 0, 1))
    t, near = np.asarray(t)[..., None], angle < 1e-4
    s = np.where(near, 1.0, np.sin(angle))  # near 0 the arc is a chord: interpolate linearly
    wa = np.where(near, 1 - t, np.sin((1 - t) * angle) / s)
    wb = np.where(near, t, np.sin(t * angle) / s)
    q = wa * a + wb * b
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def rotation_between(a, b):
    """Smallest rotation [..., 3, 3] that turns unit vectors a onto b [..., 3] (undefined for opposite vectors)."""
    v, c = np.cross(a, b), np.sum(a * b, -1)[..., None, None]
    k = np.zeros(v.shape + (3,))
    k[..., 0, 1], k[..., 0, 2], k[..., 1, 2] = -v[..., 2], v[..., 1], -v[..., 0]
    k = k - np.swapaxes(k, -1, -2)
    return np.eye(3) + k + k @ k / (1 + c)


# ---------------------------------------------------------------------------------------------------------------------
# Clips. A pose is (quats [N, 9, 4], hinges [N, 4] radians, height [N]): y up, x forward, z to the right, and at
# zero all bones stand upright with the arms hanging.

ROOT, CHEST, NECK, R_HIP, R_ANKLE, R_SHOULDER, L_HIP, L_ANKLE, L_SHOULDER = range(9)  # of quats
R_KNEE, R_ELBOW, L_KNEE, L_ELBOW = range(4)  # of hinges, about z: knees bend to negative, elbows to positive angles
QUAT_COLUMNS = (4, 8, 12, 16, 21, 25, 30, 35, 39)
HINGE_COLUMNS = (20, 29, 34, 43)
UPPER_QUATS, UPPER_HINGES = [CHEST, NECK, R_SHOULDER, L_SHOULDER], [R_ELBOW, L_ELBOW]
MIRROR_QUATS = [ROOT, CHEST, NECK, L_HIP, L_ANKLE, L_SHOULDER, R_HIP, R_ANKLE, R_SHOULDER]
MIRROR_HINGES = [L_KNEE, L_ELBOW, R_KNEE, R_ELBOW]
HINGE_LIMITS = np.array([[-2.8, 0.0], [0.0, 2.5], [-2.8, 0.0], [0.0, 2.5]])
QUAT_NOISE = np.radians([4, 6, 10, 8, 10, 15, 8, 10, 15])  # sigma per joint of the training augmentation
HINGE_NOISE = np.radians([10, 18, 10, 18])


def parse_clip(text):
    """One DeepMimic clip (JSON text) -> dict: time [T] s, period (s, or None if it does not loop) and its poses."""
    clip = json.loads(text)
    frames = np.array(clip["Frames"], np.float64)
    if frames.ndim != 2 or frames.shape[1] != 44 or not np.isfinite(frames).all():
        raise ValueError(f"A clip must hold frames of 44 finite numbers, found an array of shape {frames.shape}.")
    quats = np.stack([frames[:, c : c + 4] for c in QUAT_COLUMNS], 1)  # [T, 9, 4]
    return {
        "time": np.concatenate([[0.0], np.cumsum(frames[:-1, 0])]),  # a frame's first number is how long it lasts
        "period": frames[:, 0].sum() if clip["Loop"] == "wrap" else None,
        "quats": quats / np.linalg.norm(quats, axis=-1, keepdims=True),
        "hinges": frames[:, HINGE_COLUMNS],  # [T, 4]
        "height": frames[:, 2],  # [T] of the root above the floor, m
    }


def split_frames(clip, stretch=0.2, every=1.2, gap=0.1):
    """Frames of a clip for training, validation and testing: {split: sorted frame indices}.

    Every 1.2 s a stretch of 0.2 s is held out: its first third is for validation, the rest for testing. Frames
    closer than `gap` seconds to a held-out frame (around the seam too, if the clip loops) belong to no split.
    """
    time = clip["time"]
    duration = clip["period"] or time[-1]
    n = max(1, round(duration / every))
    start = (np.arange(n) + 0.5) * duration / n - stretch / 2
    into = (time[:, None] - start) / stretch  # [T, n] 0..1 inside a stretch
    held = (into >= 0) & (into < 1)
    val, test = (held & (into < 1 / 3)).any(1), (held & (into >= 1 / 3)).any(1)
    away = np.abs(time[:, None] - time[held.any(1)])  # [T, held]
    if clip["period"]:
        away = np.minimum(away, clip["period"] - away)
    train = (away >= gap - 1e-9).all(1)
    return {"train": np.flatnonzero(train), "val": np.flatnonzero(val), "test": np.flatnonzero(test)}


class Motion:
    """All clips in one table of frames, and which of them a split may show."""

    def __init__(self, clips, unseen=UNSEEN_CLIPS):
        self.names = sorted(clips)
        self.quats, self.hinges, self.height = (
            np.concatenate([clips[c][k] for c in self.names]) for k in ("quats", "hinges", "height")
        )
        self.clip = np.repeat(np.arange(len(self.names)), [len(clips[c]["time"]) for c in self.names])
        self.airborne = np.array([c in AIRBORNE_CLIPS for c in self.names])
        self.actions = [c for c in self.names if "action" not in clips[c]]  # the others' action is unknown
        self.label = np.array([self.actions.index(c) if c in self.actions else -1 for c in self.names])  # of every clip
        first = np.cumsum([0] + [len(clips[c]["time"]) for c in self.names])
        self.frames = {split: [] for split in SPLITS}  # per split: a list over its clips of frame indices
        for i, c in enumerate(self.names):
            if c in unseen:
                self.frames["unseen"].append(np.arange(first[i], first[i + 1]))
            else:
                for split, index in split_frames(clips[c]).items():
                    if len(index):
                        self.frames[split].append(first[i] + index)

    def draw(self, split, n, rng):
        """n frames of a split: each clip equally often, so that actions weigh the same."""
        clips = self.frames[split]
        which, u = rng.integers(len(clips), size=n), rng.random(n)
        sizes = np.array([len(f) for f in clips])
        return np.concatenate(clips)[(np.cumsum(sizes) - sizes)[which] + (u * sizes[which]).astype(int)]

    def pose(self, frames):
        return self.quats[frames], self.hinges[frames], self.height[frames]


def blend(a, b, t):
    """Pose between poses a and b at t [N]: slerp of joints, linear hinges and height."""
    t = np.asarray(t, np.float64)
    return (
        slerp(a[0], b[0], t[:, None] * np.ones(a[0].shape[1])),
        a[1] + t[:, None] * (b[1] - a[1]),
        a[2] + t * (b[2] - a[2]),
    )


def mirror(pose):
    """Swap left and right: reflect every rotation in the plane z = 0 and exchange the limbs."""
    quats, hinges, height = pose
    return quats[:, MIRROR_QUATS] * np.array([1.0, -1.0, -1.0, 1.0]), hinges[:, MIRROR_HINGES], height


def turn(pose, yaw):
    """Turn whole poses about the vertical axis by yaw [N] radians."""
    quats = pose[0].copy()
    quats[:, ROOT] = quat_mul(quat_from_rotvec(yaw[:, None] * np.array([0.0, 1.0, 0.0])), quats[:, ROOT])
    return quats, pose[1], pose[2]


def augment(motion, n, rng):
    """Training poses: time between frames, upper/lower recombination, blends, joint noise, mirror.

    Returns pose, clip [N] (of root and legs), action [N] (-1 where two clips are mixed).
    """
    train = np.concatenate(motion.frames["train"])
    clip_of = np.append(motion.clip, -1)
    next_frame = np.arange(len(motion.clip))  # itself where the next one is held out or of another clip
    next_frame[train[np.isin(train + 1, train) & (clip_of[train + 1] == clip_of[train])]] += 1

    def draw():
        frames = motion.draw("train", n, rng)
        return blend(motion.pose(frames), motion.pose(next_frame[frames]), rng.random(n)), motion.clip[frames]

    (pose, clip), (other, other_clip) = draw(), draw()
    kind = rng.random(n)
    recombine, mix = kind < 0.25, (kind >= 0.25) & (kind < 0.40)
    quats, hinges, height = blend(pose, other, np.where(mix, rng.uniform(0.2, 0.8, n), 0.0))
    quats[:, ROOT], height = pose[0][:, ROOT], pose[2]  # headings of two clips have nothing to do with each other
    quats[np.ix_(recombine, UPPER_QUATS)] = other[0][np.ix_(recombine, UPPER_QUATS)]
    hinges[np.ix_(recombine, UPPER_HINGES)] = other[1][np.ix_(recombine, UPPER_HINGES)]
    action = np.where((recombine | mix) & (clip != other_clip), -1, motion.label[clip])

    amount = rng.random(n)[:, None]  # some poses stay as they were captured, some move by the full sigma
    quats = quat_mul(quats, quat_from_rotvec(rng.normal(size=(n, 9, 3)) * (amount * QUAT_NOISE)[..., None]))
    hinges = np.clip(hinges + rng.normal(size=(n, 4)) * amount * HINGE_NOISE, *HINGE_LIMITS.T)
    flip = rng.random(n) < 0.5
    mirrored = mirror((quats, hinges, height))
    quats[flip], hinges[flip] = mirrored[0][flip], mirrored[1][flip]
    return (quats, hinges, height), clip, action


# ---------------------------------------------------------------------------------------------------------------------
# Bodies. z up, facing -y, left = +x, metres. A body is a mesh and 19 rigid segments; a segment follows one clip bone
# or lies between two of them.

BONES = ["root", "chest", "neck", "r_thigh", "r_shin", "r_foot", "r_arm", "r_forearm",
         "l_thigh", "l_shin", "l_foot", "l_arm", "l_forearm"]  # fmt: skip
SEGMENTS = [  # Anny bone that starts it, parent segment, clip bones a and b, how far from a to b
    ("root", -1, "root", "root", 0),
    ("spine05", 0, "root", "chest", 0.2), ("spine04", 1, "root", "chest", 0.4), ("spine03", 2, "root", "chest", 0.6),
    ("spine02", 3, "root", "chest", 0.8), ("spine01", 4, "chest", "chest", 0),
    ("neck01", 5, "chest", "neck", 1 / 3), ("neck02", 6, "chest", "neck", 2 / 3), ("neck03", 7, "neck", "neck", 0),
    ("upperleg01.R", 0, "r_thigh", "r_thigh", 0), ("lowerleg01.R", 9, "r_shin", "r_shin", 0),
    ("foot.R", 10, "r_foot", "r_foot", 0),
    ("upperleg01.L", 0, "l_thigh", "l_thigh", 0), ("lowerleg01.L", 12, "l_shin", "l_shin", 0),
    ("foot.L", 13, "l_foot", "l_foot", 0),
    ("upperarm01.R", 5, "r_arm", "r_arm", 0), ("lowerarm01.R", 15, "r_forearm", "r_forearm", 0),
    ("upperarm01.L", 5, "l_arm", "l_arm", 0), ("lowerarm01.L", 17, "l_forearm", "l_forearm", 0),
]  # fmt: skip
JOINT_SEGMENT = np.array([0, 9, 10, 11, 12, 13, 14, 4, 6, 8, 8, 17, 18, 18, 15, 16, 16])  # that carries each H36M joint
CLIP_TO_BODY = np.array([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]])  # axes of the clips -> axes of the bodies


def rest_alignment(joints):
    """A [S, 19, 3, 3]: turns each segment from the body's rest pose into the clips' (upright, arms hanging).

    joints [S, 17, 3] in rest pose. Legs: smallest rotation of thigh and shin to straight down. Arms: limb and elbow
    axis (upper arm x forearm) onto (down, -x). Feet and spine: as they are.
    """

    def unit(v):
        return v / np.linalg.norm(v, axis=-1, keepdims=True)

    align = np.tile(np.eye(3), (len(joints), len(SEGMENTS), 1, 1))
    down, axis = np.array([0.0, 0, -1]), np.array([-1.0, 0, 0])
    target = np.stack([down, axis, np.cross(down, axis)], -1)
    for hip, segment in ((1, 9), (4, 12)):
        for k in range(2):
            limb = unit(joints[:, hip + k + 1] - joints[:, hip + k])
            align[:, segment + k] = rotation_between(limb, np.broadcast_to(down, limb.shape))
    for shoulder, segment in ((14, 15), (11, 17)):
        upper, fore = (unit(joints[:, shoulder + k + 1] - joints[:, shoulder + k]) for k in range(2))
        elbow = unit(np.cross(upper, fore))
        for k, limb in enumerate((upper, fore)):
            frame = np.stack([limb, elbow, np.cross(limb, elbow)], -1)  # columns, right-handed
            align[:, segment + k] = target @ np.swapaxes(frame, -1, -2)
    return align


def bone_orientations(pose):
    """World orientation of the 13 clip bones [N, 13, 4] in the clips' axes (forward kinematics)."""
    quats, hinges, _ = pose
    about_z = quat_from_rotvec(hinges[..., None] * np.array([0.0, 0, 1]))  # [N, 4, 4]
    root = quats[:, ROOT]
    chest = quat_mul(root, quats[:, CHEST])
    out = [root, chest, quat_mul(chest, quats[:, NECK])]
    sides = ((R_HIP, R_KNEE, R_ANKLE, R_SHOULDER, R_ELBOW), (L_HIP, L_KNEE, L_ANKLE, L_SHOULDER, L_ELBOW))
    for hip, knee, ankle, shoulder, elbow in sides:
        thigh = quat_mul(root, quats[:, hip])
        shin = quat_mul(thigh, about_z[:, knee])
        arm = quat_mul(chest, quats[:, shoulder])
        out += [thigh, shin, quat_mul(shin, quats[:, ankle]), arm, quat_mul(arm, about_z[:, elbow])]
    return np.stack(out, 1)


def segment_transforms(pose, align, heads):
    """Pose -> rigid motion of the 19 segments, [N, 19, 3, 4], pelvis at the origin.

    align [N, 19, 3, 3] and heads [N, 19, 3] (where a segment starts, rest pose) are those of each sample's body.
    World orientation of a segment: G = C R_clip C^T A.
    """
    bones = bone_orientations(pose)
    a, b = (np.array([BONES.index(s[k]) for s in SEGMENTS]) for k in (2, 3))
    between = slerp(bones[:, a], bones[:, b], np.array([s[4] for s in SEGMENTS]))
    turn = CLIP_TO_BODY @ quat_to_matrix(between) @ CLIP_TO_BODY.T @ align  # [N, 19, 3, 3]
    start = np.zeros_like(heads)
    for i, (_, parent, *_) in enumerate(SEGMENTS[1:], 1):
        offset = heads[:, i] - heads[:, parent]
        start[:, i] = start[:, parent] + np.einsum("nij,nj->ni", turn[:, parent], offset)
    shift = start - np.einsum("nsij,nsj->nsi", turn, heads)
    return np.concatenate([turn, shift[..., None]], -1)


def skin_weights_of_points(regressor, weights, vertices):
    """M [P, 19, 4] = sum_v R[p, v] W[v, s] [v; 1]: linear blend skinning of regressed points without the mesh.

    With it, a regressor R [P, V] applied to the skinned mesh is sum_s T_s M[p, s], exactly.
    """
    v1 = np.concatenate([vertices, np.ones((len(vertices), 1))], 1)
    table = (weights[:, :, None] * v1[:, None, :]).reshape(len(vertices), -1)
    return (regressor @ table).reshape(len(regressor), weights.shape[1], 4)


def pose_points(transforms, points):
    """transforms [N, 19, 3, 4], points M [P, 19, 4] of one body -> [N, P, 3]."""
    n, p = len(transforms), len(points)
    flat = np.swapaxes(transforms, 1, 2).reshape(n * 3, -1)  # [N*3, 19*4]
    return np.swapaxes((flat @ points.reshape(p, -1).T).reshape(n, 3, p), 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Coarsening (paper section 3, appendix B and Fig. 9)


def vertex_areas(vertices, faces):
    """Each vertex's third of its triangles' areas, [V]."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
    return np.bincount(faces.ravel(), np.repeat(area / 3, 3), minlength=len(vertices))


def mesh_edges(faces):
    """Undirected edges [E, 2] of a triangle mesh, each once."""
    return np.unique(np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1), axis=0)


def contract(edges, weight, label):
    """Merge the nodes of a graph that share a label; parallel edges add up, loops go."""
    e = np.sort(label[edges], axis=1)
    keep = e[:, 0] != e[:, 1]
    e, index = np.unique(e[keep], axis=0, return_inverse=True)
    return e, np.bincount(index.ravel(), weight[keep], minlength=len(e))


def match_pass(edges, weight, mass, order, target, cap):
    """One pass of Heavy Edge Matching -> label [n] of the merged nodes; stops when `target` nodes are left.

    A node is merged with the free neighbour of largest normalised cut weight w_ij (1/m_i + 1/m_j), if the two
    together stay below `cap`.
    """
    neighbours = [[] for _ in mass]
    for (i, j), w in zip(edges.tolist(), weight.tolist(), strict=True):
        neighbours[i].append((j, w))
        neighbours[j].append((i, w))
    mass, label, left = mass.tolist(), list(range(len(mass))), len(mass)
    free = [True] * left
    for i in order:
        if left == target:
            break
        if free[i]:
            options = [(w * (1 / mass[i] + 1 / mass[j]), j) for j, w in neighbours[i]
                       if free[j] and mass[i] + mass[j] <= cap]  # fmt: skip
            if options:
                j = max(options)[1]
                free[i] = free[j] = False
                label[j] = i
                left -= 1
    return np.unique(label, return_inverse=True)[1]


def coarsen(vertices, faces, joints, sizes=(192, 96, 48), weighting="joint", tries=6):
    """Coarsen a mesh into nested clusters and tie them to joints (paper section 3, Fig. 9; Graclus, Pose2Mesh).

    vertices [V, 3], faces [F, 3], joints [16, 3]: the joints that own parts, in part order, all in rest pose.
    Heavy Edge Matching is repeated until exactly sizes[0], sizes[1], ... clusters are left; the last level pairs the
    one before it by a maximum-weight perfect matching, because no pass of matching lands on it.
    weighting "plain": Graclus as it is: mass = degree, nodes visited at random (good for SMPL's even mesh).
    weighting "joint": mass = area / area of the region nearest to the same joint, lightest first, clusters at most
    1.5 x the mean: every joint gets its share, however densely its hands or face are meshed (the open body needs it).
    The best of `tries` seeds by assignment distance is kept.

    Returns a dict: size -> label [V] (row of that level's point, -1 outside the largest component), and
    "distance": mean distance from a point of the last level to its joint. Rows: the r points of joint i are r*i,
    ..., r*i + r - 1 in the last level; the two halves of its point k are 2k and 2k + 1 in the level before.
    """
    if weighting not in ("joint", "plain"):
        raise ValueError(f"weighting must be 'joint' or 'plain', found {weighting!r}.")
    if sizes[-1] * 2 != sizes[-2] or sizes[-1] % len(joints):
        raise ValueError(f"The last of sizes {sizes} must be half the one before it and a multiple of {len(joints)}.")
    edges = mesh_edges(faces)
    used = np.array(sorted(max(nx.connected_components(nx.Graph(edges.tolist())), key=len)))
    if len(used) < sizes[0]:
        raise ValueError(f"The largest component has {len(used)} vertices, too few for {sizes[0]} clusters.")
    new = np.full(len(vertices), -1)
    new[used] = np.arange(len(used))
    edges = new[edges[new[edges[:, 0]] >= 0]]
    points = vertices[used]
    area = np.maximum(vertex_areas(vertices, faces)[used], 1e-12)
    if weighting == "joint":
        nearest = np.linalg.norm(points[:, None] - joints, axis=-1).argmin(1)
        mass = area / np.bincount(nearest, area, minlength=len(joints))[nearest]
    else:
        mass = np.bincount(edges.ravel(), minlength=len(used)).astype(float)

    best = None
    for seed in range(tries):
        levels = _cluster(edges, mass, sizes, weighting, np.random.default_rng(seed))
        if levels is None:
            continue
        centre = np.stack([np.bincount(levels[-1], area * points[:, k]) for k in range(3)], 1)
        centre /= np.bincount(levels[-1], area)[:, None]
        distance = np.linalg.norm(centre[:, None] - joints, axis=-1)  # [48, 16]
        part = assign_parts(distance)
        mean = distance[np.arange(len(part)), part].mean()
        if best is None or mean < best[0]:
            best = mean, levels, part, centre
    if best is None:
        raise ValueError(f"No perfect pairing of {sizes[-2]} clusters was found in {tries} tries: raise `tries`.")

    mean, levels, part, centre = best
    rank = np.lexsort((-centre[:, 2], part))  # by part, then from top to bottom
    row = np.argsort(rank)[levels[-1]]  # of every vertex in the last level
    result = {"distance": float(mean)}
    for size, level in zip(sizes[::-1], levels[::-1], strict=True):
        pairs, index = np.unique(np.stack([row, level], 1), axis=0, return_inverse=True)
        row = index.ravel()  # sorted by the coarser level's row: nested levels stay side by side
        assert len(pairs) == size
        result[size] = np.full(len(vertices), -1)
        result[size][used] = row
    return result


def _cluster(edges, mass, sizes, weighting, rng):
    """Labels of every vertex at each level, or None if the last level has no perfect matching."""
    n_vertices, weight = len(mass), np.ones(len(edges))
    label, levels = np.arange(n_vertices), []
    for size in sizes[:-1]:
        slack = 1.5
        while len(mass) > size:
            if weighting == "joint":
                order = np.argsort(mass * rng.uniform(0.9, 1.1, len(mass)))
                cap = slack * mass.sum() / max(size, len(mass) // 2)
            else:
                order, cap = rng.permutation(len(mass)), np.inf
            merged = match_pass(edges, weight, mass, order.tolist(), size, cap)
            if merged.max() + 1 > 0.95 * len(mass):
                slack *= 1.2  # stuck: the light neighbours are used up
            edges, weight = contract(edges, weight, merged)
            mass, label = np.bincount(merged, mass), merged[label]
        levels.append(label)
    graph = nx.Graph()
    graph.add_weighted_edges_from(
        (i, j, w * (1 / mass[i] + 1 / mass[j])) for (i, j), w in zip(edges.tolist(), weight.tolist(), strict=True)
    )
    pairs = sorted(tuple(sorted(p)) for p in nx.max_weight_matching(graph, maxcardinality=True))
    if len(pairs) != sizes[-1]:
        return None
    half = np.empty(sizes[-2], int)
    for k, (i, j) in enumerate(pairs):
        half[i] = half[j] = k
    return [*levels, half[label]]


def level_matrix(label, vertex_weight):
    """The level as a matrix R [J, V] with one entry a column: rows are weighted means of their clusters' vertices."""
    matrix = np.zeros((label.max() + 1, len(label)))
    used = np.flatnonzero(label >= 0)
    matrix[label[used], used] = vertex_weight[used]
    return matrix / matrix.sum(1, keepdims=True)


def assign_parts(cost):
    """Balanced assignment: cost [n, m] -> owner [n] in 0..m-1, each exactly n/m times, minimum total cost.

    A min-cost flow: every row sends one unit, every column takes n/m; integer costs (9 digits) make it exact.
    """
    n, m = cost.shape
    if n % m:
        raise ValueError(f"{n} points cannot be shared equally among {m} joints.")
    integer = np.rint(cost / np.abs(cost).max() * 10**9).astype(int)
    graph = nx.DiGraph()
    graph.add_nodes_from((i, {"demand": -1}) for i in range(n))
    graph.add_nodes_from((n + j, {"demand": n // m}) for j in range(m))
    graph.add_weighted_edges_from((i, n + j, int(integer[i, j])) for i in range(n) for j in range(m))
    flow = nx.min_cost_flow(graph)
    return np.array([next(j for j in range(m) if flow[i][n + j]) for i in range(n)])


# ---------------------------------------------------------------------------------------------------------------------
# Cameras

H36M_INTRINSICS = {  # id: focal length fx fy, centre cx cy, radial k1 k2 k3, tangential p1 p2 (VideoPose3D's order)
    "54138969": ((1145.0494384765625, 1143.7811279296875), (512.54150390625, 515.4514770507812),
                 (-0.20709891617298126, 0.24777518212795258, -0.0030751503072679043),
                 (-0.0009756988729350269, -0.00142447161488235)),
    "55011271": ((1149.6756591796875, 1147.5916748046875), (508.8486328125, 508.0649108886719),
                 (-0.1942136287689209, 0.2404085397720337, 0.006819975562393665),
                 (-0.0016190266469493508, -0.0027408944442868233)),
    "58860488": ((1149.1407470703125, 1148.7989501953125), (519.8158569335938, 501.40264892578125),
                 (-0.2083381861448288, 0.25548800826072693, -0.0024604974314570427),
                 (0.0014843869721516967, -0.0007599993259645998)),
    "60457274": ((1145.5113525390625, 1144.77392578125), (514.9682006835938, 501.88201904296875),
                 (-0.198384091258049, 0.21832367777824402, -0.008947807364165783),
                 (-0.0005872055771760643, -0.0018133620033040643)),
}  # fmt: skip


def make_cameras(rng):
    """Four cameras around the room's centre, one in each quadrant: H36M intrinsics, R and t (mm) of x = R X + t."""
    cameras = []
    for k, (name, (f, c, radial, tangential)) in enumerate(H36M_INTRINSICS.items()):
        azimuth = np.pi / 4 + k * np.pi / 2 + rng.uniform(-0.3, 0.3)
        distance, height = rng.uniform(4700, 5500), rng.uniform(1400, 1700)
        centre = np.array([distance * np.cos(azimuth), distance * np.sin(azimuth), height])
        forward = np.array([0, 0, 900.0]) - centre
        forward /= np.linalg.norm(forward)
        right = np.cross(forward, [0, 0, 1.0])
        right /= np.linalg.norm(right)
        rotation = np.stack([right, np.cross(forward, right), forward])  # rows: x right, y down, z forward
        cameras.append({"id": name, "f": list(f), "c": list(c), "k": list(radial), "p": list(tangential),
                        "R": rotation.tolist(), "t": (-rotation @ centre).tolist()})  # fmt: skip
    return cameras


def project(points, camera):
    """Camera-frame points [..., 3] -> pixels [..., 2] with Human3.6M's distortion, as VideoPose3D writes it."""
    k, p = camera["k"], np.array(camera["p"])
    m = np.clip(points[..., :2] / points[..., 2:], -1, 1)
    r2 = np.sum(m * m, -1, keepdims=True)
    radial = 1 + r2 * (k[0] + r2 * (k[1] + r2 * k[2]))
    tangential = np.sum(m * p, -1, keepdims=True)
    return (m * (radial + tangential) + p * r2) * np.array(camera["f"]) + np.array(camera["c"])


# ---------------------------------------------------------------------------------------------------------------------
# The simulated detector

SWAPS = np.array([[[1, 2, 3], [4, 5, 6]], [[14, 15, 16], [11, 12, 13]]])  # legs, arms: right, left


def detect(x_s, height_px, rng, noise=NOISE):
    """What a 2D detector makes of clean joints: x_s [N, 17, 2] px, height_px [N] px -> x_det [N, 17, 2], conf [N, 17].

    Gaussian error in proportion to the person's size; in some samples a box hides neighbouring joints, which are
    then missing (conf 0, coordinates 0) or carry a large error that they partly share; rarely an arm or leg pair is
    swapped. conf only correlates with the error: swaps leave no trace in it, and visible joints can score low.
    """
    n, f32 = len(x_s), np.float32
    h = np.asarray(height_px, f32)[:, None]

    def normal(*shape):
        return rng.standard_normal(shape, dtype=f32)

    error = normal(n, 17, 2) * (noise["sigma"] * h * np.array(noise["sigma_scale"], f32))[..., None]
    behind = behind_a_box(x_s, h, rng, noise)
    together = noise["sigma_common"] * normal(n, 1, 2) + noise["sigma_single"] * normal(n, 17, 2)
    error += behind[..., None] * together * h[..., None]
    x_det = x_s + error

    swapped = np.flatnonzero(rng.random(n, dtype=f32) < noise["p_swap"])
    right, left = np.moveaxis(SWAPS[rng.integers(2, size=len(swapped))], 1, 0)  # [n', 3] each
    x_det[swapped[:, None], right], x_det[swapped[:, None], left] = (
        x_det[swapped[:, None], left], x_det[swapped[:, None], right])  # fmt: skip

    c = noise["conf"]
    logit = np.where(behind, f32(c["occluded"]), f32(c["visible"])) + c["sigma"] * normal(n, 17)
    logit -= c["per_error"] * np.sqrt(np.square(error).sum(-1)) / h
    conf = np.clip(1 / (1 + np.exp(-logit)), 1e-3, 1)
    missing = behind & (rng.random((n, 17), dtype=f32) < noise["p_missing"])
    missing &= ~missing.all(1, keepdims=True)  # a person with no joint at all would not have been detected
    x_det[missing], conf[missing] = 0, 0
    return x_det.astype(f32), conf.astype(f32)


def behind_a_box(x_s, h, rng, noise=NOISE):
    """Joints that a box in front of the person covers: x_s [N, 17, 2], height h [N, 1], same unit -> [N, 17]."""
    n = len(x_s)
    joint, off = rng.integers(17, size=n), rng.standard_normal((n, 2), dtype=np.float32)
    centre = x_s[np.arange(n), joint] + noise["box_offset"] * h * off
    half = rng.uniform(*noise["box_half_size"], size=(n, 2)).astype(np.float32) * h
    behind = (np.abs(x_s - centre[:, None]) < half[:, None]).all(-1)
    return behind & (rng.random(n, dtype=np.float32) < noise["p_box"])[:, None]


def drop_joints(x_det, conf, height_px, rng):
    """Joint dropout for real detections, which seldom lack joints: as many go missing, behind the same boxes, as with
    `detect`, so that a model learns what a missing joint is. x_det [N, 17, 2] px, conf [N, 17] -> the same."""
    behind = behind_a_box(x_det, np.asarray(height_px, np.float32)[:, None], rng)
    gone = behind & (rng.random(conf.shape, dtype=np.float32) < NOISE["p_missing"])
    gone &= ((conf > 0) & ~gone).any(1, keepdims=True)
    return x_det * ~gone[..., None], conf * ~gone


# ---------------------------------------------------------------------------------------------------------------------
# Samples


def collides(joints):
    """Crude self-collision of joints [N, 17, 3] mm: limbs in the trunk, a hand or foot in the head, crossed shins."""

    def to_line(p, a, b):  # distance of points p [N, K, 3] from the segments a-b [N, 3]
        d, ap = (b - a)[:, None], p - a[:, None]
        t = np.clip(np.sum(ap * d, -1) / np.maximum(np.sum(d * d, -1), 1e-9), 0, 1)
        return np.linalg.norm(ap - t[..., None] * d, axis=-1)

    tips = joints[:, [13, 16, 3, 6]]
    limbs = np.concatenate([tips, (tips + joints[:, [12, 15, 2, 5]]) / 2], 1)
    hit = (to_line(limbs, joints[:, 7], joints[:, 8]) < 70).any(1)
    hit |= (to_line(tips, joints[:, 9], joints[:, 10]) < 70).any(1)
    for a, b in (((2, 3), 5), ((5, 6), 2)):
        shin = np.stack([joints[:, b], joints[:, b + 1], (joints[:, b] + joints[:, b + 1]) / 2], 1)
        hit |= (to_line(shin, joints[:, a[0]], joints[:, a[1]]) < 55).any(1)
    return hit


def point_tables(bodies, level_96, level_48, area):
    """What each body needs for posing: M [S, 17 + 48 + 96, 19, 4] and the rest alignment A [S, 19, 3, 3]."""
    regressor = np.concatenate([level_matrix(level_48, area), level_matrix(level_96, area)])
    tables = []
    for vertices, joints in zip(bodies["vertices"], bodies["joints"], strict=True):
        table = np.zeros((17, len(SEGMENTS), 4))
        table[np.arange(17), JOINT_SEGMENT, :3] = joints
        table[np.arange(17), JOINT_SEGMENT, 3] = 1
        table = np.concatenate([table, skin_weights_of_points(regressor, bodies["weights"], vertices)])
        tables.append(table)
    return np.stack(tables), rest_alignment(bodies["joints"])


def make_split(split, n, motion, bodies, tables, align, subjects, cameras, rng, bar):
    """Draw n samples of a split -> arrays as stored (see ARRAYS)."""
    hip_height = bodies["joints"][:, 0, 2] - bodies["vertices"][..., 2].min(1)  # [S] m, standing
    parts, done = [], 0
    while done < n:
        m = min(4096, n - done)
        if split == "train":
            pose, clip, action = augment(motion, m, rng)
        else:
            frames = motion.draw(split, m, rng)
            pose, clip = motion.pose(frames), motion.clip[frames]
            action = motion.label[clip]
        pose = turn(pose, rng.uniform(-np.pi, np.pi, m))
        subject, camera = rng.choice(subjects, m), rng.integers(len(cameras), size=m)
        spot = rng.uniform(-400, 400, (m, 2))  # where in the room, mm
        size, leap = np.ones(m), np.zeros(m)
        if split == "train":
            # Any body in the stature of any other, or a network would learn by heart how tall each of them is; and leaps of
            # any height, as the tops of the clips' own may lie in the stretches that are held out.
            size = bodies["stature"][rng.choice(subjects, m)] / bodies["stature"][subject]
            leap = rng.uniform(0, LEAP, m) * (rng.random(m) < 0.5)

        transforms = segment_transforms(pose, align[subject], bodies["heads"][subject])
        points = np.empty((m, 161, 3))
        for s in np.unique(subject):
            points[subject == s] = pose_points(transforms[subject == s], tables[s])
        points *= 1000 * size[:, None, None]  # m -> mm
        # Feet, or whatever is lowest, on the floor; in the air at the clip's height, scaled by the length of the legs.
        floor = -points[..., 2].min(1)
        lift = np.maximum(pose[2] / CLIP_STANDING_HEIGHT * 1000 * hip_height[subject] * size, floor) + 1000 * leap
        points += np.concatenate([spot, np.where(motion.airborne[clip], lift, floor)[:, None]], 1)[:, None]

        x, seen = np.empty((m, 161, 2)), np.empty((m, 161, 3))
        for c, cam in enumerate(cameras):
            mine = camera == c
            seen[mine] = points[mine] @ np.array(cam["R"]).T + cam["t"]
            x[mine] = project(seen[mine], cam)
        root = seen[:, 0]
        focal = np.array([cam["f"][1] for cam in cameras])[camera]
        good = ((x >= 0) & (x <= IMAGE_SIZE)).all((1, 2))
        if split == "train":
            good &= ~collides(seen[:, :17])
        batch = {
            "x_s": x[:, :17], "x_d": x[:, 17:65], "x_f": x[:, 65:], "y": seen[:, :17] - root[:, None], "root": root,
            "height_px": focal * bodies["stature"][subject] * size * 1000 / root[:, 2],
            "action": action, "subject": subject, "camera": camera,
        }  # fmt: skip
        parts.append({k: v[good].astype(ARRAYS[k][1]) for k, v in batch.items()})
        done += int(good.sum())
        bar.update(int(good.sum()))
    arrays = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    if split != "train":
        arrays["x_s_det"], arrays["conf"] = detect(arrays["x_s"], arrays["height_px"], rng)
    return arrays


@contextmanager
def new_data_set(folder, overwrite=False):
    """A temporary folder beside data/NAME, which takes its place at the end; if anything fails, nothing is left of it."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists already: choose another --name or add --overwrite.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.????????"):
        print(f"{left} belongs to another preparation: delete it, unless that still runs")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)


def create_split(folder, n):
    """Files of all arrays of a split with room for n samples, which `append_samples` fills: any n takes the same memory."""
    folder.mkdir()
    for name, (shape, dtype) in ARRAYS.items():
        with open(folder / f"{name}.npy", "wb") as f:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (n, *shape)}
            np.lib.format.write_array_header_1_0(f, header)


def append_samples(folder, arrays):
    """The next samples of a split: arrays as in ARRAYS, or one value for all of them; what is not given is 0."""
    n = len(arrays["y"])
    for name, (shape, dtype) in ARRAYS.items():
        with open(folder / f"{name}.npy", "ab") as f:
            f.write(np.broadcast_to(arrays.get(name, 0), (n, *shape)).astype(dtype).tobytes())


def base_meta(folder, source):
    """What the meta.json of every data set holds."""
    return {
        "source": source, "format_version": FORMAT_VERSION, "name": Path(folder).name, "joint_names": list(JOINT_NAMES),
        "parents": list(PARENTS), "part_joint": list(PART_JOINT),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "networkx": nx.__version__},
    }  # fmt: skip


def check_folder(folder, recognise, wanted):
    """Look through a user's folder before any work -> {kind: its files}, and print what each file was recognised as.

    recognise(path) -> a key of `wanted`, or None. wanted: kind -> (what it is and where it comes from, needed or not).
    """
    folder, found, other = Path(folder), {kind: [] for kind in wanted}, []
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: --folder must name the folder with your files.")
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):  # people link to where data lie
        if os.path.realpath(root) in seen:
            folders.clear()  # a loop
        else:
            seen.add(os.path.realpath(root))
            files += [Path(root, name) for name in names if Path(root, name).is_file()]
    for path in sorted(files):
        found.get(recognise(path), other).append(path)

    def some(paths):
        more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
        return ", ".join(str(p.relative_to(folder)) for p in paths[:4]) + more

    print(f"{folder}:")
    for kind, (what, needed) in wanted.items():
        state = some(found[kind]) if found[kind] else "MISSING" if needed else "none (not needed)"
        print(f"  {kind}: {state}" + ("" if found[kind] else f"; {what}"))
    if other:
        print(f"  not used: {some(other)}")
    missing = [f"{kind} ({what})" for kind, (what, needed) in wanted.items() if needed and not found[kind]]
    if missing:
        raise ValueError(f"{folder} lacks {'; '.join(missing)}.")
    return found


def write_data_set(folder, clips, bodies, sizes, seed, sources, unseen=UNSEEN_CLIPS, overwrite=False, source="demo"):
    """Draw all splits and write them to `folder` (data/NAME). Nothing is left behind if this is interrupted.

    clips: name -> parse_clip(...). bodies: dict with vertices [S, V, 3] m, faces [F, 3], weights [V, 19] (skinning),
    heads [S, 19, 3] (where segments start), joints [S, 17, 3], stature [S] m, and "split_sizes" like N_BODIES; body 0
    is also the one that is coarsened. sizes: split -> number of samples. Each split has a random stream of its own, so
    that one split's size does not change another.
    """
    folder = Path(folder)
    with new_data_set(folder, overwrite) as temporary:
        motion = Motion(clips, unseen)
        stream = {name: np.random.default_rng([seed, i]) for i, name in enumerate((*SPLITS, "cameras"))}
        cameras = make_cameras(stream["cameras"])
        rest, faces = bodies["vertices"][0], bodies["faces"]
        area = vertex_areas(rest, faces)
        levels = coarsen(rest, faces, bodies["joints"][0][list(PART_JOINT)])
        tables, align = point_tables(bodies, levels[96], levels[48], area)
        n_train, n_val, n_test = bodies["split_sizes"]
        ids = np.arange(n_train + n_val + n_test)
        test_bodies = ids[n_train + n_val :]
        subjects = dict(train=ids[:n_train], val=ids[n_train : n_train + n_val], test=test_bodies, unseen=test_bodies)
        meta = base_meta(folder, source) | {
            "actions": motion.actions, "image_size": IMAGE_SIZE,
            "cameras": cameras, "splits": {s: {"n": sizes[s]} for s in SPLITS}, "noise": NOISE,
            "coarsening": {"sizes": [192, 96, 48], "weighting": "joint", "points": "area-weighted means",
                           "assignment_mm": 1000 * levels["distance"]},
            "subjects": {s: subjects[s].tolist() for s in SPLITS}, "stature_mm": (1000 * bodies["stature"]).tolist(),
            "unseen_actions": list(unseen), "sources": sources, "seed": seed,
            "training": {"leap_m": LEAP, "stature": "any training body's"},
        }  # fmt: skip
        with tqdm(total=sum(sizes.values()), desc=f"samples of {folder.name}", unit_scale=True) as bar:
            for split in SPLITS:
                arrays = make_split(
                    split, sizes[split], motion, bodies, tables, align, subjects[split], cameras, stream[split], bar
                )
                (temporary / split).mkdir()
                for name, array in arrays.items():
                    np.save(temporary / split / f"{name}.npy", array)
                if split == "test":
                    draw_samples(temporary / "samples.png", arrays, meta)
        draw_coarsening(temporary / "coarsening.png", rest, faces, bodies["joints"][0], levels, area)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    return folder


def load(name, split, root="data"):
    """Read one split of data/NAME -> (arrays: dict of memory-mapped, read-only arrays as in ARRAYS, meta: dict).

    Everything is checked, a chunk at a time, so that any size takes the same memory.
    """
    folder = Path(root) / name
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(
            f"No data set in {folder}: make it with `python prepare_data.py --name {name} --out {root}`."
        )
    again = f"make it again with `python prepare_data.py --name {name} --out {root} --overwrite`"
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'meta.json'} is not valid JSON ({error}): {again}.") from None
    if meta.get("source", "demo") != "demo":
        again = again.replace("--name", f"--source {meta['source']} --folder DIR --name")
    if meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version")
        raise ValueError(f"{folder} has format version {found}, expected {FORMAT_VERSION}: {again}.")
    if split not in meta["splits"]:
        raise ValueError(f"{folder} has no split {split!r}, only {', '.join(meta['splits'])}.")
    n, arrays = meta["splits"][split]["n"], {}
    for key, (shape, dtype) in ARRAYS.items():
        if (split == "train" and key in ("x_s_det", "conf") and meta["noise"]) or (
                key == "fit" and "fits" not in meta["splits"][split]):  # fmt: skip
            continue
        path = folder / split / f"{key}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {again}.")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} cannot be read, it is truncated or no plain array ({error}): {again}.") from None
        if array.shape != (n, *shape) or array.dtype != dtype:
            raise ValueError(f"{path} holds {array.dtype} {array.shape}, expected {dtype} {(n, *shape)}: {again}.")
        if not all(np.isfinite(array[i : i + 65536]).all() for i in range(0, n, 65536)):
            raise ValueError(f"{path} holds NaN or infinite values: {again}.")
        arrays[key] = array
    return arrays, meta


# ---------------------------------------------------------------------------------------------------------------------
# Figures

BONE_COLOURS = {"left": "#0072B2", "right": "#D55E00", "middle": "#444444"}  # Okabe-Ito: safe for the colour-blind


def draw_coarsening(path, vertices, faces, joints, levels, area):
    """The paper's Fig. 9: the mesh, its 96 and 48 points, and the 16 joints, coloured by part; front view."""
    colours = colormaps["tab20"](np.arange(16))  # of parts
    fig = Figure(figsize=(18, 8))
    axes = fig.subplots(1, 4, sharex=True, sharey=True)
    for ax, size in zip(axes, (None, 96, 48, 16), strict=True):
        used = levels[48] >= 0
        part = levels[48][used] // 3
        ax.scatter(*vertices[used][:, [0, 2]].T, s=1.5, color=colours[part], alpha=0.9 if size is None else 0.15)
        if size == 16:
            ax.scatter(*joints[list(PART_JOINT)][:, [0, 2]].T, s=150, color=colours, edgecolor="k", zorder=3)
            for i, joint in enumerate(PART_JOINT):
                text = f"{i} {JOINT_NAMES[joint]}"
                ax.annotate(text, joints[joint, [0, 2]], (7, 7), textcoords="offset points", fontsize=8, zorder=4)
        elif size:
            points = level_matrix(levels[size], area) @ vertices
            part = np.arange(size) // (size // 16)
            for p, i in zip(points, part, strict=True):
                ax.plot(*np.stack([p, joints[PART_JOINT[i]]])[:, [0, 2]].T, color=colours[i], lw=1)
            ax.scatter(*points[:, [0, 2]].T, s=50, color=colours[part], edgecolor="k", zorder=3)
        titles = {None: f"{used.sum()} vertices, by part", 16: "16 parts and their joints"}
        ax.set_title(titles.get(size, f"{size} points"))
        ax.set_aspect("equal")
        ax.axis("off")
    fig.suptitle(f"Coarsening: mean distance of the 48 points from their joint {1000 * levels['distance']:.0f} mm")
    fig.tight_layout()
    fig.savefig(path, dpi=70)


def draw_samples(path, arrays, meta):
    """Random samples: clean skeleton (left blue, right orange), 96 fine points by part, simulated detections."""
    colours = colormaps["tab20"](np.arange(16))  # of parts
    rng = np.random.default_rng(meta["seed"])
    pick = rng.permutation(len(arrays["x_s"]))[:12]
    fig = Figure(figsize=(20, 7.6))
    axes = fig.subplots(2, 6)
    for ax, i in zip(axes.flat, pick, strict=False):
        x_s, x_f, x_det, seen = (arrays[k][i] for k in ("x_s", "x_f", "x_s_det", "conf"))
        ax.scatter(*x_f.T, s=16, color=colours[np.arange(96) // 6])
        for joint, parent in enumerate(PARENTS[1:], 1):
            side = "left" if joint in LEFT else "right" if joint in RIGHT else "middle"
            ax.plot(*x_s[[joint, parent]].T, color=BONE_COLOURS[side], lw=2)
        seen = seen > 0
        for joint in np.flatnonzero(seen):
            ax.plot(*np.stack([x_s[joint], x_det[joint]]).T, color="k", lw=0.7)
        ax.scatter(*x_det[seen].T, marker="x", s=22, c="k")
        ax.scatter(*x_s[~seen].T, marker="o", s=60, facecolor="none", edgecolor="#CC0000")
        middle, half = (x_s.max(0) + x_s.min(0)) / 2, 0.6 * max(np.ptp(x_s, 0).max(), 150)
        ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] + half, middle[1] - half), aspect="equal")
        ax.set_xticks([]), ax.set_yticks([])
        action, body, camera = (arrays[k][i] for k in ("action", "subject", "camera"))
        ax.set_title(f"{('unknown', *meta['actions'])[action + 1]}, body {body}, camera {camera}", fontsize=11)
    fig.suptitle(
        "Test samples: skeleton (left blue, right orange), 96 fine points by part, detected joints (x), "
        "missing joints (red rings)"
    )
    fig.tight_layout()
    fig.savefig(path, dpi=70)


# ---------------------------------------------------------------------------------------------------------------------
# Downloads: clips and bodies

PYBULLET = ("pybullet==3.2.7", "5d858abf7c12a21ef3ed351cf81dac1b5e486ec25c9ab59bfc84beb89034edff")
ANNY = ("anny==0.6.2", "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2")
ANNY_NEEDS = ("roma==1.8.0", "trimesh==5.2.0", "safetensors==0.8.0", "pyyaml==6.0.3")
CLIPS_SHA256 = "9b18a73bcea3aa66a53c181c828607398cedeb6ff64f614b1058c92dba6556ef"
# The clips are data: any build of the wheel will do, so one is pinned whatever this Python is.
PYBULLET_BUILD = "--platform manylinux2014_x86_64 --implementation cp --python-version 311 --abi cp311".split()


def fetch_wheel(requirement, wheels, cache, sha256=None, extra=()):
    """Path of a wheel: from the folder `wheels` if given, otherwise downloaded into the cache with pip."""
    name, version = requirement.split("==")
    folder = Path(wheels) if wheels else cache / "wheels"

    def find():
        return sorted(p for p in folder.glob("*.whl") if p.name.lower().startswith(f"{name}-{version}-"))

    if not find() and not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {requirement}")
        download = ["download", "--no-deps", "--only-binary=:all:", *extra, requirement]
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *download, "--dest", str(folder)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode or not find():
            reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise RuntimeError(
                f"pip could not download {requirement} ({reason}): fetch its wheel on another machine with "
                f"`pip {' '.join(download)}` and pass its folder with --wheels DIR."
            )
    if not find():
        raise FileNotFoundError(f"No wheel of {requirement} in {folder}: put it there or leave out --wheels.")
    path = find()[0]
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is not the expected file, whose sha256 is {sha256}: delete it and try again.")
    return path


def get_clips(cache, wheels=None):
    """The 15 clips, name -> parse_clip(...); read out of the pybullet wheel once, then kept in the cache."""
    folder = cache / "clips"
    if not folder.is_dir():
        wheel = fetch_wheel(PYBULLET[0], wheels, cache, PYBULLET[1], PYBULLET_BUILD)
        temporary = Path(tempfile.mkdtemp(dir=cache))
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.startswith("pybullet_data/data/motions/humanoid3d_"):
                    (temporary / Path(member).name).write_bytes(archive.read(member))
        temporary.chmod(0o755)  # mkdtemp's are private
        os.replace(temporary, folder)
        if not wheels:
            wheel.unlink()  # 103 MB for 1.2 MB of clips
    files = sorted(folder.glob("humanoid3d_*.txt"))
    if hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest() != CLIPS_SHA256:
        raise ValueError(f"The clips in {folder} are not the expected ones: delete that folder and try again.")
    return {f.stem.removeprefix("humanoid3d_"): parse_clip(f.read_text()) for f in files}


def get_bodies(cache, seed, wheels=None, counts=N_BODIES):
    """Random adult bodies as write_data_set wants them; built with Anny once, then kept in the cache."""
    path = cache / f"bodies_v{FORMAT_VERSION}_{ANNY[0].replace('==', '-')}_{sum(counts)}_{seed}.npz"
    if not path.is_file():
        wheel_files = [fetch_wheel(ANNY[0], wheels, cache, ANNY[1])]
        wheel_files += [fetch_wheel(r, wheels, cache) for r in ANNY_NEEDS]
        print("building the bodies with Anny (a few minutes, once)")
        # Anny's warp-lang (392 MB) is not needed for plain skinning, so its wheels are unpacked instead of installed,
        # into a folder that only this function sees.
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as site:
            for wheel in wheel_files:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)
            os.environ["ANNY_CACHE_DIR"] = str(Path(site) / "anny_cache")  # 790 MB, deleted with the folder
            sys.path.insert(0, site)
            try:
                arrays = _build_bodies(np.random.default_rng([seed, len(SPLITS) + 1]), sum(counts))
            finally:
                sys.path.remove(site)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **arrays)
        os.replace(temporary, path)
    with np.load(path, allow_pickle=False) as stored:
        return {**{k: stored[k] for k in stored.files}, "split_sizes": counts}


def _build_bodies(rng, n):
    """n random Anny bodies, reduced to 19 segments and H36M joints."""
    import torch
    from anny import Anny

    model = Anny(skinning_method="lbs")
    low_high = {"gender": (0, 1), "age": (0.6, 0.9), "muscle": (0.3, 0.8), "weight": (0.25, 0.8),
                "height": (0.42, 0.58), "proportions": (0.3, 0.8)}  # fmt: skip
    shape = {k: torch.tensor(rng.uniform(*v, n), dtype=model.dtype) for k, v in low_high.items()}
    scale = rng.uniform(0.84, 1.0, n)[:, None, None]  # the height phenotype distorts proportions; this does not
    with torch.no_grad():
        rest = model(phenotype_kwargs=shape)
    vertices = rest["rest_vertices"].numpy() * scale
    bone_heads = dict(zip(model.bone_labels, np.swapaxes(rest["rest_bone_heads"].numpy() * scale, 0, 1), strict=True))
    starts = [s[0] for s in SEGMENTS]
    segment = []  # of every bone: its own, or its parent's
    for bone, parent in zip(model.bone_labels, model.bone_parents, strict=True):
        segment.append(starts.index(bone) if bone in starts else segment[parent])
    weights = model.dense_vertex_bone_weights.numpy() @ np.eye(len(SEGMENTS))[segment]

    head = bone_heads["head"]
    limbs = {1: "upperleg01.R", 2: "lowerleg01.R", 3: "foot.R", 4: "upperleg01.L", 5: "lowerleg01.L", 6: "foot.L",
             7: "spine02", 8: "neck01", 11: "upperarm01.L", 12: "lowerarm01.L", 13: "wrist.L",
             14: "upperarm01.R", 15: "lowerarm01.R", 16: "wrist.R"}  # fmt: skip
    joints = np.empty((n, 17, 3))
    for joint, bone in limbs.items():
        joints[:, joint] = bone_heads[bone]
    joints[:, 0] = (joints[:, 1] + joints[:, 4]) / 2
    joints[:, 9] = (head + (bone_heads["eye.L"] + bone_heads["eye.R"]) / 2) / 2
    top = np.argsort(-vertices[:, :, 2], axis=1)[:, :40]
    joints[:, 10] = np.take_along_axis(vertices, top[..., None], 1).mean(1)
    heads = np.stack([bone_heads[s] for s in starts], 1)
    heads[:, 0] = joints[:, 0]  # the root turns about the pelvis joint
    return {
        "vertices": vertices.astype(np.float32), "faces": model.get_triangular_faces().numpy(),
        "weights": weights.astype(np.float32), "heads": heads, "joints": joints,
        "stature": np.ptp(vertices[:, :, 2], axis=1),
    }  # fmt: skip


def prepare_demo(folder, sizes, seed=0, wheels=None, overwrite=False, kind="demo", motion=None):
    """Write the default data set to `folder`; sizes: split -> number of samples. The cache is kept beside it.

    motion: a folder with files of `kind` (bvh or amass); each is one more clip. A .bvh file is also one more action.
    """
    folder, more = Path(folder), {}
    if folder.exists() and not overwrite:  # before any download
        raise ValueError(f"{folder} exists already: choose another --name or add --overwrite.")
    if motion:
        import mocap  # which builds on this module

        more = mocap.read_folder(motion, kind)
        seconds = [clip["time"][-1] for clip in more.values()]
        print(f"{len(more)} clips of {min(seconds):.1f} to {max(seconds):.1f} s, {sum(seconds) / 60:.1f} min in all")
    cache = folder.parent / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    clips, bodies = get_clips(cache, wheels), get_bodies(cache, seed, wheels)
    if set(clips) & set(more):
        raise ValueError(f"{motion}: {', '.join(sorted(set(clips) & set(more)))} are clips already: rename the files.")
    clips |= more
    sources = {"clips": PYBULLET[0], "clips_sha256": CLIPS_SHA256, "bodies": ANNY[0], "motion": {kind: sorted(more)}}
    return write_data_set(folder, clips, bodies, sizes, seed, sources, overwrite=overwrite, source=kind)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = dict(zip(SPLITS, (40_000, 2_500, 5_000, 2_500), strict=True))
    for split, n in default.items():
        parser.add_argument(f"--{split}", type=int, help=f"samples of the {split} split (default {n})")
    parser.add_argument("--source", choices=("demo", "bvh", "amass", "h36m", "3dpw"), default="demo")
    parser.add_argument("--folder", help="your files, for every source but demo; it is said what was found there")
    parser.add_argument("--name", help="name of the data set (default: that of the source)")
    parser.add_argument("--out", default="data", help="folder of the data sets (default data)")
    parser.add_argument("--seed", type=int, help="of all that is drawn (default 0)")
    parser.add_argument("--detections", help="h36m: which data_2d_h36m_NAME.npz, if there are several")
    parser.add_argument("--without-shifted", action="store_true", help="h36m: leave out S9's three shifted sequences")
    parser.add_argument("--wheels", help="folder with the wheels, if you have downloaded them yourself")
    parser.add_argument("--overwrite", action="store_true", help="replace a data set of that name")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that it, too, leaves nothing behind
    started = time.time()
    try:
        given = {split: getattr(args, split) for split in SPLITS if getattr(args, split) is not None}
        sizes = default | given
        given |= {k: v for k, v in (("seed", args.seed), ("wheels", args.wheels)) if v is not None}
        if args.source in ("h36m", "3dpw") and given:
            raise ValueError(f"--{' --'.join(given)} has no meaning for --source {args.source}, which draws nothing.")
        if min(sizes.values()) < 1:
            raise ValueError(f"Every split needs at least one sample, found {sizes}.")
        folder = Path(args.out) / (args.name or args.source)
        if (args.source == "demo") != (args.folder is None):
            raise ValueError("--folder DIR is needed for every --source but demo, and only there.")
        if args.source != "h36m" and (args.detections or args.without_shifted):
            raise ValueError("--detections and --without-shifted go with --source h36m.")
        if args.source == "h36m":
            import human36m  # like threedpw, it builds on this module

            human36m.prepare(Path(args.folder), folder, args.detections, args.without_shifted, args.overwrite)
        elif args.source == "3dpw":
            import threedpw

            threedpw.prepare(Path(args.folder), folder, args.overwrite)
        else:
            prepare_demo(folder, sizes, args.seed or 0, args.wheels, args.overwrite, args.source, args.folder)
            print(", ".join(f"{n} {split}" for split, n in sizes.items()))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{folder} after {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
