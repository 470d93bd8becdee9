"""Anny's bodies as 19 rigid segments, their skinning, and the downloads of bodies and clips.

z up, facing -y, left = +x, metres. A body is a mesh and 19 rigid segments; a segment follows one
clip bone or lies between two of them. """

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np

from sources.dataset import SPLITS
from sources.geometry import quat_from_rotvec, quat_mul, quat_to_matrix, rotation_between, slerp
from sources.motion import (
    CHEST,
    L_ANKLE,
    L_ELBOW,
    L_HIP,
    L_KNEE,
    L_SHOULDER,
    NECK,
    R_ANKLE,
    R_ELBOW,
    R_HIP,
    R_KNEE,
    R_SHOULDER,
    ROOT,
    parse_clip,
)

N_BODIES = (45, 5, 10)  # for training, validation and testing; the unseen split shows test bodies
BODIES_VERSION = 1  # of the cached bodies

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
JOINT_SEGMENT = np.array(
    [0, 9, 10, 11, 12, 13, 14, 4, 6, 8, 8, 17, 18, 18, 15, 16, 16]
)  # that carries each H36M joint
CLIP_TO_BODY = np.array(
    [[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]]
)  # axes of the clips -> axes of the bodies


def rest_alignment(joints):
    """A [S, 19, 3, 3]: turns each segment from the body's rest pose into the clips' (upright, arms
    hanging).

    joints [S, 17, 3] in rest pose. Legs: smallest rotation of thigh and shin to straight down.
    Arms: limb and elbow axis (upper arm x forearm) onto (down, -x). Feet and spine: as they are.
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
        upper, fore = (
            unit(joints[:, shoulder + k + 1] - joints[:, shoulder + k]) for k in range(2)
        )
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
    sides = (
        (R_HIP, R_KNEE, R_ANKLE, R_SHOULDER, R_ELBOW),
        (L_HIP, L_KNEE, L_ANKLE, L_SHOULDER, L_ELBOW),
    )
    for hip, knee, ankle, shoulder, elbow in sides:
        thigh = quat_mul(root, quats[:, hip])
        shin = quat_mul(thigh, about_z[:, knee])
        arm = quat_mul(chest, quats[:, shoulder])
        out += [thigh, shin, quat_mul(shin, quats[:, ankle]), arm, quat_mul(arm, about_z[:, elbow])]
    return np.stack(out, 1)


def segment_transforms(pose, align, heads):
    """Pose -> rigid motion of the 19 segments, [N, 19, 3, 4], pelvis at the origin.

    align [N, 19, 3, 3] and heads [N, 19, 3] (where a segment starts, rest pose) are those of each
    sample's body. World orientation of a segment: G = C R_clip C^T A. """
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
    """M [P, 19, 4] = sum_v R[p, v] W[v, s] [v; 1]: linear blend skinning of regressed points
    without the mesh.

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


# --------------------------------------------------------------------------------------------------
# Downloads: clips and bodies

PYBULLET = ("pybullet==3.2.7", "5d858abf7c12a21ef3ed351cf81dac1b5e486ec25c9ab59bfc84beb89034edff")
ANNY = ("anny==0.6.2", "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2")
ANNY_NEEDS = ("roma==1.8.0", "trimesh==5.2.0", "safetensors==0.8.0", "pyyaml==6.0.3")
CLIPS_SHA256 = "9b18a73bcea3aa66a53c181c828607398cedeb6ff64f614b1058c92dba6556ef"
# The clips are data: any build of the wheel will do, so one is pinned whatever this Python is.
PYBULLET_BUILD = (
    "--platform manylinux2014_x86_64 --implementation cp --python-version 311 --abi cp311".split()
)


def fetch_wheel(requirement, wheels, cache, sha256=None, extra=()):
    """Path of a wheel: from the folder `wheels` if given, otherwise downloaded into the cache with
    pip."""
    name, version = requirement.split("==")
    folder = Path(wheels) if wheels else cache / "wheels"

    def find():
        return sorted(
            p for p in folder.glob("*.whl") if p.name.lower().startswith(f"{name}-{version}-")
        )

    if not find() and not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {requirement}")
        download = ["download", "--no-deps", "--only-binary=:all:", *extra, requirement]
        command = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            *download,
            "--dest",
            str(folder),
        ]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode or not find():
            reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise RuntimeError(
                f"pip could not download {requirement} ({reason}): fetch its wheel on another machine with "
                f"`pip {' '.join(download)}` and pass its folder with --wheels DIR."
            )
    if not find():
        raise FileNotFoundError(
            f"No wheel of {requirement} in {folder}: put it there or leave out --wheels."
        )
    path = find()[0]
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(
            f"{path} is not the expected file, whose sha256 is {sha256}: delete it and try again."
        )
    return path


def get_clips(cache, wheels=None):
    """The 15 clips, name -> parse_clip(...); read out of the pybullet wheel once, then kept in the
    cache."""
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
        raise ValueError(
            f"The clips in {folder} are not the expected ones: delete that folder and try again."
        )
    return {f.stem.removeprefix("humanoid3d_"): parse_clip(f.read_text()) for f in files}


def get_bodies(cache, seed, wheels=None, counts=N_BODIES):
    """Random adult bodies as write_data_set wants them; built with Anny once, then kept in the
    cache."""
    path = cache / f"bodies_v{BODIES_VERSION}_{ANNY[0].replace('==', '-')}_{sum(counts)}_{seed}.npz"
    if not path.is_file():
        wheel_files = [fetch_wheel(ANNY[0], wheels, cache, ANNY[1])]
        wheel_files += [fetch_wheel(r, wheels, cache) for r in ANNY_NEEDS]
        print("building the bodies with Anny (a few minutes, once)")
        # Anny's warp-lang (392 MB) is not needed for plain skinning, so its wheels are unpacked
        # instead of installed, into a folder that only this function sees.
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as site:
            for wheel in wheel_files:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)
            os.environ["ANNY_CACHE_DIR"] = str(
                Path(site) / "anny_cache"
            )  # 790 MB, deleted with the folder
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
    scale = rng.uniform(0.84, 1.0, n)[
        :, None, None
    ]  # the height phenotype distorts proportions; this does not
    with torch.no_grad():
        rest = model(phenotype_kwargs=shape)
    vertices = rest["rest_vertices"].numpy() * scale
    bone_heads = dict(
        zip(
            model.bone_labels,
            np.swapaxes(rest["rest_bone_heads"].numpy() * scale, 0, 1),
            strict=True,
        )
    )
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
