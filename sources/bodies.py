"""Open bodies (Anny, Brégier et al. 2025), how clips move them, and where both come from.

Bodies have z up, face -y, have their left at +x, and are in metres. A body is a mesh and 19 rigid
segments. A segment turns with one of the 13 bones of the clips, or lies between two of them.
Two packages are downloaded with pip, unpacked privately and never installed: `anny` (Apache-2.0,
its shapes CC0) and, for the 15 clips of DeepMimic that it contains, `pybullet`.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from sources.coarsening import level_matrix
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
from sources.safe_pickle import load_arrays

N_BODIES = (45, 5, 10)  # for training, validation and testing; the unseen split shows test bodies

BONES = ["root", "chest", "neck",
         "r_thigh", "r_shin", "r_foot", "r_arm", "r_forearm",
         "l_thigh", "l_shin", "l_foot", "l_arm", "l_forearm"]  # fmt: skip
SEGMENTS = [  # Anny's bone that starts it, parent segment, clip bones a and b, how far from a to b
    ("root", -1, "root", "root", 0),
    ("spine05", 0, "root", "chest", 0.2),
    ("spine04", 1, "root", "chest", 0.4),
    ("spine03", 2, "root", "chest", 0.6),
    ("spine02", 3, "root", "chest", 0.8),
    ("spine01", 4, "chest", "chest", 0),
    ("neck01", 5, "chest", "neck", 1 / 3),
    ("neck02", 6, "chest", "neck", 2 / 3),
    ("neck03", 7, "neck", "neck", 0),
    ("upperleg01.R", 0, "r_thigh", "r_thigh", 0),
    ("lowerleg01.R", 9, "r_shin", "r_shin", 0),
    ("foot.R", 10, "r_foot", "r_foot", 0),
    ("upperleg01.L", 0, "l_thigh", "l_thigh", 0),
    ("lowerleg01.L", 12, "l_shin", "l_shin", 0),
    ("foot.L", 13, "l_foot", "l_foot", 0),
    ("upperarm01.R", 5, "r_arm", "r_arm", 0),
    ("lowerarm01.R", 15, "r_forearm", "r_forearm", 0),
    ("upperarm01.L", 5, "l_arm", "l_arm", 0),
    ("lowerarm01.L", 17, "l_forearm", "l_forearm", 0),
]
# The segment that carries each of Human3.6M's 17 joints.
JOINT_SEGMENT = np.array([0, 9, 10, 11, 12, 13, 14, 4, 6, 8, 8, 17, 18, 18, 15, 16, 16])
CLIP_TO_BODY = np.array([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]])  # the clips' axes -> the bodies'
ARRAYS = {"vertices", "faces", "weights", "heads", "joints", "stature"}  # of bodies


# --------------------------------------------------------------------------------------------------
# From a pose to points


def rest_alignment(joints):
    """A [S, 19, 3, 3], which turns each segment from its body's rest pose into the clips' zero
    pose: upright, with the arms hanging. joints [S, 17, 3]: of the bodies' rest poses.

    Thighs and shins make the smallest rotation to straight down. Arms bring the limb and the axis
    of the elbow (upper arm x forearm) onto down and -x. Feet and spine stay as they are.
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
        upper = unit(joints[:, shoulder + 1] - joints[:, shoulder])
        fore = unit(joints[:, shoulder + 2] - joints[:, shoulder + 1])
        elbow = unit(np.cross(upper, fore))
        for k, limb in enumerate((upper, fore)):
            frame = np.stack([limb, elbow, np.cross(limb, elbow)], -1)  # columns, right-handed
            align[:, segment + k] = target @ np.swapaxes(frame, -1, -2)
    return align


def bone_orientations(pose):
    """Forward kinematics: how the clips' 13 bones stand in the world, [N, 13, 4], in their axes."""
    quats, hinges, _ = pose
    about_z = quat_from_rotvec(hinges[..., None] * np.array([0.0, 0, 1]))  # [N, 4, 4]
    root = quats[:, ROOT]
    chest = quat_mul(root, quats[:, CHEST])
    out = [root, chest, quat_mul(chest, quats[:, NECK])]
    right = (R_HIP, R_KNEE, R_ANKLE, R_SHOULDER, R_ELBOW)
    left = (L_HIP, L_KNEE, L_ANKLE, L_SHOULDER, L_ELBOW)
    for hip, knee, ankle, shoulder, elbow in (right, left):
        thigh = quat_mul(root, quats[:, hip])
        shin = quat_mul(thigh, about_z[:, knee])
        foot = quat_mul(shin, quats[:, ankle])
        arm = quat_mul(chest, quats[:, shoulder])
        out += [thigh, shin, foot, arm, quat_mul(arm, about_z[:, elbow])]
    return np.stack(out, 1)


def segment_transforms(pose, align, heads):
    """Pose -> the rigid motion of the 19 segments, [N, 19, 3, 4], with the pelvis at the origin.

    align [N, 19, 3, 3] and heads [N, 19, 3] (where a segment starts in the rest pose) are those of
    each sample's body. A segment is turned by G = C R C^T A: its body's rest alignment A, then the
    clip's rotation R, in the bodies' axes (C is CLIP_TO_BODY).
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
    """Linear blend skinning of points without the mesh: M [P, 19, 4].

    regressor R [P, V] makes points out of vertices [V, 3], and weights W [V, 19] hang these on the
    segments. Skinning is linear, so a point of the skinned mesh is exactly sum_s T_s M[p, s], with
    M[p, s] = sum_v R[p, v] W[v, s] [v; 1] and T the transforms of the segments.
    """
    v1 = np.concatenate([vertices, np.ones((len(vertices), 1))], 1)
    table = (weights[:, :, None] * v1[:, None, :]).reshape(len(vertices), -1)
    return (regressor @ table).reshape(len(regressor), weights.shape[1], 4)


def point_tables(bodies, levels, area):
    """What posing needs of each body: M [S, 17 + 48 + 96 + 192, 19, 4], from which `pose_points`
    makes joints, dense and fine points and those of the third level, and the alignment
    A [S, 19, 3, 3] of its rest pose. levels: what `coarsen` returns."""
    regressor = np.concatenate([level_matrix(levels[size], area) for size in (48, 96, 192)])
    tables = []
    for vertices, joints in zip(bodies["vertices"], bodies["joints"], strict=True):
        table = np.zeros((17, len(SEGMENTS), 4))  # a joint hangs on one segment
        table[np.arange(17), JOINT_SEGMENT, :3] = joints
        table[np.arange(17), JOINT_SEGMENT, 3] = 1
        skinned = skin_weights_of_points(regressor, bodies["weights"], vertices)
        tables.append(np.concatenate([table, skinned]))
    return np.stack(tables), rest_alignment(bodies["joints"])


def pose_points(transforms, points):
    """transforms [N, 19, 3, 4], points M [P, 19, 4] of one body -> [N, P, 3]."""
    n, p = len(transforms), len(points)
    # The sums over segments and coordinates as one product of matrices
    flat = np.swapaxes(transforms, 1, 2).reshape(n * 3, -1)  # [N * 3, 19 * 4]
    return np.swapaxes((flat @ points.reshape(p, -1).T).reshape(n, 3, p), 1, 2)


# --------------------------------------------------------------------------------------------------
# Downloads

PYBULLET = ("pybullet==3.2.7", "5d858abf7c12a21ef3ed351cf81dac1b5e486ec25c9ab59bfc84beb89034edff")
ANNY = ("anny==0.6.2", "bad70bdc2be0dfa9880d60129c3a1339678f08f493184f637dc2825c3e27b8d2")
ANNY_NEEDS = ("roma==1.8.0", "trimesh==5.2.0", "safetensors==0.8.0", "pyyaml==6.0.3")
CLIPS_SHA256 = "9b18a73bcea3aa66a53c181c828607398cedeb6ff64f614b1058c92dba6556ef"
# The clips are data, so any build of the wheel will do: one is pinned, whatever this Python is.
PYBULLET_BUILD = ("--platform", "manylinux2014_x86_64", "--implementation", "cp",
                  "--python-version", "311", "--abi", "cp311")  # fmt: skip


def fetch_wheel(requirement, wheels, cache, sha256=None, extra=()):
    """The path of a wheel: in the folder `wheels`, if given, else downloaded into the cache.

    Raises RuntimeError if pip fails, FileNotFoundError if `wheels` lacks it, and ValueError if it
    is another file than the one of `sha256`; each says what to do.
    """
    name, version = requirement.split("==")
    folder = Path(wheels) if wheels else cache / "wheels"

    def find():
        start = f"{name}-{version}-"
        return sorted(p for p in folder.glob("*.whl") if p.name.lower().startswith(start))

    if not find() and not wheels:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"downloading {requirement}")
        download = ["download", "--no-deps", "--only-binary=:all:", *extra, requirement]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        run = subprocess.run([*pip, *download, "--dest", str(folder)],
                             capture_output=True, text=True)
        if run.returncode or not find():
            reason = (run.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            raise RuntimeError(f"pip could not download {requirement} ({reason}): fetch its wheel "
                               f"on another machine with `pip {' '.join(download)}` and pass its "
                               "folder with --wheels DIR.")
    if not find():
        raise FileNotFoundError(f"No wheel of {requirement} in {folder}: "
                                "put it there or leave out --wheels.")
    path = find()[0]
    if sha256 and hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise ValueError(f"{path} is not the expected file, whose sha256 is {sha256}: "
                         "delete it and try again.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no wheel: delete it and try again.")
    return path


def get_clips(cache, wheels=None):
    """The 15 clips, name -> parse_clip(...). They are read out of the wheel once, and then kept in
    the cache (a Path). Raises what `fetch_wheel` raises."""
    folder = cache / "clips"
    if not folder.is_dir():
        wheel = fetch_wheel(PYBULLET[0], wheels, cache, PYBULLET[1], PYBULLET_BUILD)
        temporary = Path(tempfile.mkdtemp(dir=cache))
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if member.startswith("pybullet_data/data/motions/humanoid3d_"):
                    (temporary / Path(member).name).write_bytes(archive.read(member))
        temporary.chmod(0o755)  # what mkdtemp makes is private
        os.replace(temporary, folder)
        if not wheels:
            wheel.unlink()  # 103 MB for 1.2 MB of clips
    files = sorted(folder.glob("humanoid3d_*.txt"))
    if hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest() != CLIPS_SHA256:
        raise ValueError(f"The clips in {folder} are not the expected ones: "
                         "delete that folder and try again.")
    return {f.stem.removeprefix("humanoid3d_"): parse_clip(f.read_text()) for f in files}


def get_bodies(cache, seed, wheels=None, counts=N_BODIES):
    """Random adult bodies as prepare_data.write_data_set wants them. They are built with Anny once,
    and then kept in the cache (a Path). Raises what `fetch_wheel` raises."""
    path = cache / f"bodies_v1_{ANNY[0].replace('==', '-')}_{sum(counts)}_{seed}.npz"
    if not path.is_file():
        wheel_files = [fetch_wheel(ANNY[0], wheels, cache, ANNY[1])]
        wheel_files += [fetch_wheel(r, wheels, cache) for r in ANNY_NEEDS]
        print("building the bodies with Anny (a few minutes, once)")
        # Installing Anny would bring warp-lang (392 MB), which plain skinning does not need. So the
        # wheels are only unpacked, into a folder that nothing but this function sees.
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as site:
            for wheel in wheel_files:
                with zipfile.ZipFile(wheel) as archive:
                    archive.extractall(site)
            # Anny keeps 790 MB of its own, which are deleted with the folder.
            os.environ["ANNY_CACHE_DIR"] = str(Path(site) / "anny_cache")
            sys.path.insert(0, site)
            try:
                arrays = _build_bodies(np.random.default_rng([seed, len(SPLITS) + 1]), sum(counts))
            finally:
                sys.path.remove(site)
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, **arrays)
        os.replace(temporary, path)
    try:
        bodies = load_arrays(path)
        if missing := ARRAYS - set(bodies):
            raise ValueError(f"{', '.join(sorted(missing))} are missing")
    except ValueError as e:
        raise ValueError(f"{path} holds damaged bodies: delete it and try again.") from e
    return bodies | {"split_sizes": counts}


def _build_bodies(rng, n):
    """n random bodies, reduced to 19 segments and Human3.6M's joints."""
    from anny import Anny  # never installed: see get_bodies

    model = Anny(skinning_method="lbs")
    low_high = {"gender": (0, 1), "age": (0.6, 0.9), "muscle": (0.3, 0.8), "weight": (0.25, 0.8),
                "height": (0.42, 0.58), "proportions": (0.3, 0.8)}  # fmt: skip
    shape = {k: torch.tensor(rng.uniform(*v, n), dtype=model.dtype) for k, v in low_high.items()}
    # Statures vary by scaling, too, since Anny's own height changes the proportions with them.
    scale = rng.uniform(0.84, 1.0, n)[:, None, None]
    with torch.no_grad():
        rest = model(phenotype_kwargs=shape)
    vertices = rest["rest_vertices"].numpy() * scale
    heads = np.swapaxes(rest["rest_bone_heads"].numpy() * scale, 0, 1)
    bone_heads = dict(zip(model.bone_labels, heads, strict=True))

    # A bone belongs to the segment that starts with it, or else to that of its parent.
    starts, segment = [s[0] for s in SEGMENTS], []
    for bone, parent in zip(model.bone_labels, model.bone_parents, strict=True):
        segment.append(starts.index(bone) if bone in starts else segment[parent])
    weights = model.dense_vertex_bone_weights.numpy() @ np.eye(len(SEGMENTS))[segment]

    joints = _joints(bone_heads, vertices)
    heads = np.stack([bone_heads[s] for s in starts], 1)
    heads[:, 0] = joints[:, 0]  # the root turns about the pelvis joint
    return {
        "vertices": vertices.astype(np.float32),
        "faces": model.get_triangular_faces().numpy(),
        "weights": weights.astype(np.float32),
        "heads": heads,
        "joints": joints,
        "stature": np.ptp(vertices[:, :, 2], axis=1),
    }


def _joints(bone_heads, vertices):
    """Human3.6M's joints [S, 17, 3] of bodies with vertices [S, V, 3]."""
    starts = {1: "upperleg01.R", 2: "lowerleg01.R", 3: "foot.R",
              4: "upperleg01.L", 5: "lowerleg01.L", 6: "foot.L", 7: "spine02", 8: "neck01",
              11: "upperarm01.L", 12: "lowerarm01.L", 13: "wrist.L",
              14: "upperarm01.R", 15: "lowerarm01.R", 16: "wrist.R"}  # fmt: skip
    joints = np.empty((len(vertices), 17, 3))
    for joint, bone in starts.items():
        joints[:, joint] = bone_heads[bone]
    joints[:, 0] = (joints[:, 1] + joints[:, 4]) / 2
    eyes = (bone_heads["eye.L"] + bone_heads["eye.R"]) / 2
    joints[:, 9] = (bone_heads["head"] + eyes) / 2
    top = np.argsort(-vertices[:, :, 2], axis=1)[:, :40]  # the head's 40 highest vertices
    joints[:, 10] = np.take_along_axis(vertices, top[..., None], 1).mean(1)
    return joints
