"""Motion-capture files as more motion for the default data set: `prepare_data.py --source bvh` or `amass`.

A BVH file says which joints hang on which, how far away, and by what angles they turn in every frame; `parse_bvh` gives
their positions. An AMASS file (Mahmood et al. 2019) poses SMPL's skeleton; an SMPL model, which users bring, says where its
joints are. `clip_from_joints` reads off positions the pose of the clips in prepare_data.py: nine joint rotations, four
hinges and a height. It goes by positions alone, so it does not matter how a skeleton is built or where its zero pose is.
"""

import re
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sources import smpl
from sources.dataset import check_folder
from sources.geometry import quat_from_rotvec, quat_mul, quat_to_matrix, rotation_between
from sources.motion import CLIP_STANDING_HEIGHT, HINGE_LIMITS
from sources.safe_pickle import load_arrays

FPS = 30  # of the clips; faster recordings are thinned out
LARGEST = 1 << 30  # bytes of an AMASS file, unpacked: an hour at 120 frames per second has about 0.5 GB
MOST = 20_000_000  # positions of a BVH file
CHUNK = 4096  # frames of an AMASS file that are posed at once

# What programs call the joints, without prefix ("mixamorig:"), case and punctuation; the first that a file has is taken. "*"
# stands for the side in full and as a letter, before or after.
NAMES = {
    "hips": ["hips", "hip", "pelvis", "root"], "neck": ["neck", "neck1"], "head": ["head"],
    "shoulder": ["*arm", "*uparm", "*upperarm", "*shldr", "*shoulder"],
    "elbow": ["*forearm", "*lowarm", "*lowerarm", "*elbow"], "wrist": ["*hand", "*wrist"],
    "hip": ["*upleg", "*upperleg", "*thigh", "*hip"], "knee": ["*leg", "*lowleg", "*lowerleg", "*shin", "*calf", "*knee"],
    "ankle": ["*foot", "*ankle"], "toe": ["*toebase", "*toe", "*ball"],
}  # fmt: skip
SMPL_JOINTS = {"hips": 0, "chest": 9, "neck": 12, "head": 15} | {
    f"{side} {joint}": left + (side == "r") for side in "lr" for joint, left in (
        ("hip", 1), ("knee", 4), ("ankle", 7), ("toe", 10), ("shoulder", 16), ("elbow", 18), ("wrist", 20))}  # fmt: skip
# What a folder of each kind must hold, for check_folder.
WANTED = {
    "bvh": {"motion": ("motion capture, .bvh", True)},
    "amass": {"motion": ("AMASS's motion, *_poses.npz or *_stageii.npz, from https://amass.is.tue.mpg.de", True),
              "smpl": ("an SMPL model file, .pkl or .npz, from https://smpl.is.tue.mpg.de", True)},
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
        elif word == "{" and names:
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
    if n * len(names) > MOST:
        raise ValueError(f"found {n} frames of {len(names)} joints: expected at most {MOST} positions; split it")
    values = np.array(motion[found.end() :].split(), np.float64)
    if not n or not total or len(values) != n * total or not np.isfinite(values).all() or float(found[2]) <= 0:
        raise ValueError(f"expected {n} frames of {total} finite numbers, found {len(values)} numbers")
    values, offsets = values.reshape(n, total), np.array(offsets, np.float64)
    if not np.isfinite(offsets).all():
        raise ValueError("expected every OFFSET to be three finite numbers")
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
        line = []
        while j >= 0:
            line, j = [*line, j], parents[j]
        return line

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


@contextmanager
def _reading(path: Path, what: str):
    """Errors within become one sentence that names the file."""
    try:
        yield
    except (ValueError, OverflowError) as e:
        raise ValueError(f"{path} is no {what} that can be used: {' '.join(str(e).split())[:300]}.") from e


def _stride(fps: float, key: str) -> int:
    """Every how manyth frame to take, so that about FPS a second are left. key: where the file says fps."""
    if not 1 <= fps <= 10_000:
        raise ValueError(f"expected {key} to mean 1 to 10,000 frames per second, found {fps:g}")
    return max(1, round(fps / FPS))


def _y_up(x):
    """Positions [..., 3] with z up -> with y up."""
    return x[..., [0, 2, 1]] * [1, 1, -1]


def _clip(x: np.ndarray, rest: np.ndarray, joints: dict[str, int], fps: float) -> dict:
    """Positions x [T, J, 3] at fps, and [J, 3] of the rest pose, which tells how the feet are built -> a clip.

    Both y up, any unit. joints: which of the J is which, by the names of `find_joints`.
    """
    if len(x) < 2:
        raise ValueError(f"expected at least two frames at {FPS} per second, found {len(x)}")
    pitch = 0.0
    if "r toe" in joints:
        v = rest[joints["r toe"]] - rest[joints["r ankle"]]
        pitch = float(np.arctan2(-v[1], np.linalg.norm(v[[0, 2]])))
    with np.errstate(all="ignore"):  # what is not finite is refused
        clip = clip_from_joints({k: x[:, j] for k, j in joints.items()}, fps, pitch)
    if not all(np.isfinite(clip[k]).all() for k in ("quats", "hinges", "height")):
        raise ValueError("some of its bones have no length")
    return clip


def read_bvh(path: Path) -> dict:
    """One BVH file -> a clip. Up is the axis along which head and feet are mostly farthest apart."""
    with _reading(path, "BVH file"):
        bvh = parse_bvh(path.read_text(encoding="utf-8", errors="replace"))
        joints, step = find_joints(bvh["names"], bvh["parents"]), _stride(bvh["fps"], "Frame Time")
        x, rest = bvh["positions"], np.zeros((len(bvh["names"]), 3))
        for j, parent in enumerate(bvh["parents"]):
            rest[j] = bvh["offsets"][j] + (rest[parent] if parent >= 0 else 0)
        near = 0.02 * np.ptp(rest, 0).max()  # CMU's files begin with a frame of the rest pose, which is no motion
        at_rest = [np.abs(p - p[:1] - rest + rest[:1]).max() < near for p in x[:2]]
        x = x[int(at_rest == [True, False]) :: step]
        head, feet = x[:, joints["head"]], (x[:, joints["l ankle"]] + x[:, joints["r ankle"]]) / 2
        axis = int(np.abs(np.median(head - feet, 0)).argmax())
        if axis == 0:
            raise ValueError("expected a person who stands up along y or z")
        if axis == 2:
            x, rest = _y_up(x), _y_up(rest)
        return _clip(x, rest, joints, bvh["fps"] / step)


def read_amass(path: Path, model: smpl.SMPL) -> dict:
    """One AMASS file, for SMPL+H or SMPL-X -> a clip, whose action is unknown. z is up, metres.

    Both have SMPL's first 22 joints; hands and face are left out. Their shapes are not quite SMPL's, which hardly changes
    where limbs point.
    """
    content = load_arrays(path, LARGEST)

    def array(key: str, *shape: int | None, more: bool = False) -> np.ndarray:
        """The numbers of a key in the given shape (None: any); more: columns may follow, which are cut off."""
        a, cells = content.get(key), ", ".join("any" if n is None else str(n) for n in shape)
        what = f"{key} to be numbers [{cells}{' or more' * more}]" if shape else f"{key} to be one number"
        if a is None:
            raise ValueError(f"expected {what}, found only {', '.join(content) or 'nothing'}")
        cut = a[..., : shape[-1]] if more and a.ndim else a
        if a.dtype.kind not in "fiu" or a.ndim != len(shape) or any(
                n not in (None, m) for n, m in zip(shape, cut.shape, strict=True)):
            raise ValueError(f"expected {what}, found {a.dtype} {list(a.shape)}")
        cut = (cut[::step] if a.ndim == 2 else cut).astype(np.float64)
        if not (np.abs(cut) < 1e6).all():
            raise ValueError(f"expected {what}, finite and below a million")
        return cut

    with _reading(path, "AMASS motion"):
        key = "mocap_frame_rate" if "mocap_frame_rate" in content else "mocap_framerate"
        fps = float(array(key))
        step = _stride(fps, key)
        trans, shape = array("trans", None, 3), array("betas", smpl.N_SHAPE, more=True)
        n = len(content["trans"])  # frames of the file
        body = (np.concatenate([array("root_orient", n, 3), array("pose_body", n, 63)], 1) if "root_orient" in content
                else array("poses", n, 66, more=True))
        pose, x = np.zeros((len(trans), smpl.N_JOINTS, 3)), np.empty((len(trans), smpl.N_JOINTS, 3))
        pose[:, :22] = body.reshape(-1, 22, 3)
        for i in range(0, len(x), CHUNK):
            part = slice(i, i + CHUNK)
            x[part] = model.posed(pose[part], np.tile(shape, (len(pose[part]), 1)), trans[part])[1]
        return _clip(_y_up(x), model.joints(shape[None])[0], SMPL_JOINTS, fps / step) | {"action": None}


def _recognise(path: Path, kind: str) -> str | None:
    """What a file of a folder is, by its name: a key of WANTED[kind], or None."""
    stem, suffix = path.stem.lower(), path.suffix.lower()
    if stem.startswith("."):  # macOS leaves these
        return None
    if kind == "bvh":
        return "motion" if suffix == ".bvh" else None
    if re.search("smpl|basic_?model", stem) and not stem.endswith(("_poses", "_stageii")):
        return "smpl" if smpl.is_model(path.name) else None
    return "motion" if suffix == ".npz" and stem != "shape" and not stem.endswith("stagei") else None


def read_folder(folder: Path | str, kind: str) -> dict[str, dict]:
    """All motion of a folder and its subfolders, of a kind ("bvh" or "amass"): name -> clip. a/b.bvh has the name "a/b"."""
    folder = Path(folder)
    found = check_folder(folder, lambda path: _recognise(path, kind), WANTED[kind])
    if kind == "amass":
        model = smpl.read(smpl.neutral(found["smpl"]))
    files = tqdm(found["motion"], desc="motion", disable=len(found["motion"]) <= 20)
    return {f.relative_to(folder).with_suffix("").as_posix(): read_bvh(f) if kind == "bvh" else read_amass(f, model)
            for f in files}
