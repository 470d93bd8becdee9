"""Motion-capture files as more motion for the default data set: `python prepare_data.py --motion FOLDER --name more`.

A BVH file says which joints hang on which, how far away, and by what angles they turn in every frame. `parse_bvh` gives
their positions; `clip_from_joints` reads off them the pose of the clips in prepare_data.py: nine joint rotations, four
hinges and a height. It goes by positions alone, so it does not matter how a skeleton is built or where its zero pose is.
"""

import re
from pathlib import Path

import numpy as np

from prepare_data import (
    CLIP_STANDING_HEIGHT,
    HINGE_LIMITS,
    quat_from_rotvec,
    quat_mul,
    quat_to_matrix,
    rotation_between,
)

FPS = 30  # of the clips; faster recordings are thinned out

# What programs call the joints, without prefix ("mixamorig:"), case and punctuation; the first that a file has is taken. "*"
# stands for the side in full and as a letter, before or after.
NAMES = {
    "hips": ["hips", "hip", "pelvis", "root"], "neck": ["neck", "neck1"], "head": ["head"],
    "shoulder": ["*arm", "*uparm", "*upperarm", "*shldr", "*shoulder"],
    "elbow": ["*forearm", "*lowarm", "*lowerarm", "*elbow"], "wrist": ["*hand", "*wrist"],
    "hip": ["*upleg", "*upperleg", "*thigh", "*hip"], "knee": ["*leg", "*lowleg", "*lowerleg", "*shin", "*calf", "*knee"],
    "ankle": ["*foot", "*ankle"], "toe": ["*toebase", "*toe", "*ball"],
}  # fmt: skip


def parse_bvh(text: str) -> dict:
    """BVH text -> names [J], parents [J], offsets [J, 3], positions [T, J, 3] (the file's unit and axes) and fps.

    End sites are joints too, named after their parent with " end". ValueError with one sentence on anything else.
    """
    head, _, motion = text.partition("MOTION")
    names, parents, offsets, channels, open_ = [], [], [], [], []
    words = iter(head.split())
    for word in words:
        if word in ("ROOT", "JOINT", "End"):
            name = next(words, "")
            if (word == "ROOT") != (not names) or (word != "ROOT" and not open_):
                raise ValueError(f"expected one ROOT and everything else inside its brackets, found {word} {name}")
            names.append(f"{names[open_[-1]]} end" if word == "End" else name)
            parents.append(open_[-1] if open_ else -1)
            offsets.append(None), channels.append([])
        elif word == "{":
            open_.append(len(names) - 1)
        elif word == "}" and open_:
            open_.pop()
        elif word == "OFFSET" and open_:
            offsets[open_[-1]] = [float(next(words, "nan")) for _ in range(3)]
        elif word == "CHANNELS" and open_:
            channels[open_[-1]] = [next(words, "") for _ in range(min(6, int(next(words, "0"))))]
        elif word != "HIERARCHY":
            raise ValueError(f"expected ROOT, JOINT, End Site, OFFSET, CHANNELS or a bracket, found {word!r}")
    if not names or open_ or None in offsets or not motion:
        raise ValueError("expected a hierarchy of joints with offsets, closed, and then MOTION")
    found = re.match(r"\s*Frames:\s*(\d+)\s*Frame Time:\s*([0-9.eE+-]+)", motion)
    if not found:
        raise ValueError("expected `Frames:` and `Frame Time:` after MOTION")
    n, total = int(found[1]), sum(map(len, channels))
    values = np.array(motion[found.end() :].split(), np.float64)
    if not n or not total or len(values) != n * total or not np.isfinite(values).all() or float(found[2]) <= 0:
        raise ValueError(f"expected {n} frames of {total} finite numbers, found {len(values)} numbers")
    values, offsets = values.reshape(n, total), np.array(offsets, np.float64)
    turn, position, column = [], np.zeros((n, len(names), 3)), 0
    for j, parent in enumerate(parents):
        rotation, shift = np.tile([1.0, 0, 0, 0], (n, 1)), np.tile(offsets[j], (n, 1))
        for channel in channels[j]:
            kind, axis = channel[1:], "XYZ".find(channel[:1])
            if axis < 0 or kind not in ("position", "rotation"):
                raise ValueError(f"expected channels like Xposition and Zrotation, found {channel!r}")
            v, column = values[:, column], column + 1
            if kind == "position":
                shift[:, axis] = v  # in place of the offset
            else:  # channels turn one after another, each about the axes that the ones before have left
                rotation = quat_mul(rotation, quat_from_rotvec(np.radians(v)[:, None] * np.eye(3)[axis]))
        if parent >= 0:
            shift = position[:, parent] + np.einsum("nij,nj->ni", quat_to_matrix(turn[parent]), shift)
            rotation = quat_mul(turn[parent], rotation)
        turn.append(rotation)
        position[:, j] = shift
    return dict(names=names, parents=parents, offsets=offsets, positions=position, fps=1 / float(found[2]))


def find_joints(names: list[str], parents: list[int]) -> dict[str, int]:
    """Which joint is which: hips, chest, neck, head, and shoulder .. toe with "l " or "r " before; toes may be missing."""
    plain = [re.sub(r"[^a-z0-9]", "", name.split(":")[-1].lower()) for name in names]

    def first(candidates: list[str]) -> int | None:
        return next((plain.index(c) for c in candidates if c in plain), None)

    found = {k: first(NAMES[k]) for k in ("hips", "neck", "head")}
    for side, letter in (("right", "r"), ("left", "l")):
        for joint, candidates in NAMES.items():
            if "*" in candidates[0]:
                sides = [(side, ""), (letter, ""), ("", letter), ("", side)]
                found[f"{letter} {joint}"] = first([before + c[1:] + after for c in candidates for before, after in sides])
    missing = [k for k, j in found.items() if j is None and "toe" not in k]
    if missing:
        raise ValueError(f"found no joint for {', '.join(missing)} among {', '.join(names)}")

    def ancestors(j: int) -> list[int]:
        return [j, *ancestors(parents[j])] if j >= 0 else []

    common = [j for j in ancestors(found["neck"]) if all(j in ancestors(found[f"{s} shoulder"]) for s in "lr")]
    found["chest"] = common[0]  # where the arms and the neck part
    return {k: j for k, j in found.items() if j is not None}


def unit(v):
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)


def frame(up, right):
    """Rotation [T, 3, 3] with y along `up` and z as near to `right` as that allows; x = forward."""
    y = unit(up)
    z = unit(right - (right * y).sum(-1, keepdims=True) * y)
    return np.stack([np.cross(y, z), y, z], -1)


def matrix_to_quat(m):
    """Rotations [..., 3, 3] -> quaternions (w, x, y, z) with w >= 0."""
    k = np.stack([
        np.stack([m[..., 0, 0] + m[..., 1, 1] + m[..., 2, 2], m[..., 2, 1] - m[..., 1, 2], m[..., 0, 2] - m[..., 2, 0],
                  m[..., 1, 0] - m[..., 0, 1]], -1),
        np.stack([m[..., 2, 1] - m[..., 1, 2], m[..., 0, 0] - m[..., 1, 1] - m[..., 2, 2], m[..., 1, 0] + m[..., 0, 1],
                  m[..., 2, 0] + m[..., 0, 2]], -1),
        np.stack([m[..., 0, 2] - m[..., 2, 0], m[..., 1, 0] + m[..., 0, 1], m[..., 1, 1] - m[..., 0, 0] - m[..., 2, 2],
                  m[..., 2, 1] + m[..., 1, 2]], -1),
        np.stack([m[..., 1, 0] - m[..., 0, 1], m[..., 2, 0] + m[..., 0, 2], m[..., 2, 1] + m[..., 1, 2],
                  m[..., 2, 2] - m[..., 0, 0] - m[..., 1, 1]], -1)], -2)
    q = np.linalg.eigh(k)[1][..., -1]  # Bar-Itzhack 2000: the eigenvector of the largest eigenvalue
    return q * np.where(q[..., :1] < 0, -1.0, 1.0)


def clip_from_joints(p: dict[str, np.ndarray], fps: float, foot_pitch: float = 0.0) -> dict:
    """Joint positions [T, 3] by the names of `find_joints`, y up, any unit -> a clip like prepare_data.parse_clip's.

    foot_pitch: how far the line from ankle to toe points below the sole, radians. Without toes the feet keep to the shins.
    """
    root = frame(p["chest"] - p["hips"], p["r hip"] - p["l hip"])
    chest = frame(p["neck"] - p["chest"], p["r shoulder"] - p["l shoulder"])
    neck = rotation_between(chest[..., 1], unit(p["head"] - p["neck"])) @ chest
    quats, hinges = [matrix_to_quat(m) for m in (root, np.swapaxes(root, 1, 2) @ chest, np.swapaxes(chest, 1, 2) @ neck)], []

    def limb(parent, a, b, c, sign):
        """Rotation of the upper limb, and the hinge angle of the lower about its z; sign: which way the hinge bends."""
        up, low = unit(p[a] - p[b]), unit(p[b] - p[c])
        at_rest = rotation_between(parent[..., 1], up) @ parent  # where z would be if the limb had not twisted
        forward = -sign * (low - (low * up).sum(-1, keepdims=True) * up)  # of the limb, as far as it is bent
        size = np.linalg.norm(forward, axis=-1, keepdims=True)
        sure = np.clip((size - 0.05) / 0.2, 0, 1)  # a straight limb does not show its twist
        x = frame(up, sure * np.cross(unit(forward), up) + (1 - sure) * at_rest[..., 2])
        return x, np.arctan2(-(low * x[..., 0]).sum(-1), (low * up).sum(-1))

    for side, s in (("r", 0), ("l", 2)):
        thigh, knee = limb(root, f"{side} hip", f"{side} knee", f"{side} ankle", -1)
        arm, elbow = limb(chest, f"{side} shoulder", f"{side} elbow", f"{side} wrist", 1)
        knee, elbow = np.clip(knee, *HINGE_LIMITS[s]), np.clip(elbow, *HINGE_LIMITS[s + 1])
        shin = thigh @ quat_to_matrix(quat_from_rotvec(knee[:, None] * np.array([0.0, 0, 1])))
        foot = shin
        if f"{side} toe" in p:
            toe = unit(p[f"{side} toe"] - p[f"{side} ankle"])
            z = unit(shin[..., 2] - (shin[..., 2] * toe).sum(-1, keepdims=True) * toe)
            toe = np.cos(foot_pitch) * toe + np.sin(foot_pitch) * np.cross(z, toe)  # lifted to the sole's direction
            foot = np.stack([toe, np.cross(z, toe), z], -1)
        quats += [matrix_to_quat(np.swapaxes(a, 1, 2) @ b) for a, b in ((root, thigh), (shin, foot), (chest, arm))]
        hinges += [knee, elbow]
    T, lowest = len(root), np.min([p[k][:, 1] for k in p if "ankle" in k or "toe" in k], 0)
    legs = np.median([np.linalg.norm(p[f"{s} {a}"] - p[f"{s} {b}"], axis=-1) for s in "lr"
                      for a, b in (("hip", "knee"), ("knee", "ankle"))], -1).sum() / 2
    return {"time": np.arange(T) / fps, "period": None, "quats": np.stack(quats, 1), "hinges": np.stack(hinges, 1),
            "height": (p["hips"][:, 1] - lowest.min()) * CLIP_STANDING_HEIGHT / legs}  # fmt: skip


def read_bvh(path: Path) -> dict:
    """One BVH file -> a clip. Up is the axis along which head and feet are farthest apart at the start."""
    try:
        bvh = parse_bvh(path.read_text(encoding="utf-8", errors="replace"))
        joints = find_joints(bvh["names"], bvh["parents"])
        x = bvh["positions"][:: max(1, round(bvh["fps"] / FPS))]
        if len(x) < 2:
            raise ValueError(f"expected at least two frames at {FPS} per second, found {len(x)}")
        head, feet = x[:, joints["head"]], (x[:, joints["l ankle"]] + x[:, joints["r ankle"]]) / 2
        axis = int(np.abs(np.median(head - feet, 0)).argmax())
        if axis == 0:
            raise ValueError("expected a person who stands up along y or z")
        x = x if axis == 1 else x[..., [0, 2, 1]] * [1, 1, -1]  # z up -> y up
        rest = np.zeros((len(bvh["names"]), 3))
        for j, parent in enumerate(bvh["parents"]):
            rest[j] = bvh["offsets"][j] + (rest[parent] if parent >= 0 else 0)
        rest = rest if axis == 1 else rest[:, [0, 2, 1]] * [1, 1, -1]
        pitch = 0.0
        if "r toe" in joints:
            v = rest[joints["r toe"]] - rest[joints["r ankle"]]
            pitch = float(np.arctan2(-v[1], np.linalg.norm(v[[0, 2]])))
        fps = bvh["fps"] / max(1, round(bvh["fps"] / FPS))
        clip = clip_from_joints({k: x[:, j] for k, j in joints.items()}, fps, pitch)
    except (ValueError, OverflowError) as e:
        raise ValueError(f"{path} is no BVH file that can be used: {' '.join(str(e).split())[:300]}.") from e
    if not all(np.isfinite(clip[k]).all() for k in ("quats", "hinges", "height")):
        raise ValueError(f"{path} is no BVH file that can be used: some of its bones have no length.")
    return clip


def read_folder(folder: Path | str) -> dict[str, dict]:
    """All .bvh files of a folder, name -> clip."""
    files = sorted(Path(folder).glob("*.bvh"))
    if not files:
        raise ValueError(f"{folder} holds no .bvh file.")
    return {f.stem: read_bvh(f) for f in files}
