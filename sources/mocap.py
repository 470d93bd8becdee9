"""Motion capture as more clips of the default data set: `prepare_data.py --source bvh` or `amass`.

A BVH file says which joints hang on which, how far away, and by what angles they turn in every
frame; `parse_bvh` gives their positions. An AMASS file (Mahmood et al. 2019) poses the skeleton of
SMPL, and an SMPL model, which users bring, says where its joints are. `clip_from_joints` reads the
pose of a clip (sources/motion.py) off positions: nine joint rotations, four hinges and a height. It
goes by positions alone, so it does not matter how a skeleton is built or what its zero pose is.
"""

import re
from collections.abc import Iterator
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
LARGEST = 1 << 30  # bytes of an AMASS file, unpacked: an hour at 120 per second has about 0.5 GB
MOST = 20_000_000  # positions of a BVH file
CHUNK = 4096  # frames of an AMASS file that are posed at once

# What programs call the joints, without prefix ("mixamorig:"), case and punctuation. The first that
# a file has is taken. "*" stands for the side, in full or as a letter, before or after.
NAMES = {
    "hips": ["hips", "hip", "pelvis", "root"],
    "neck": ["neck", "neck1"],
    "head": ["head"],
    "shoulder": ["*arm", "*uparm", "*upperarm", "*shldr", "*shoulder"],
    "elbow": ["*forearm", "*lowarm", "*lowerarm", "*elbow"],
    "wrist": ["*hand", "*wrist"],
    "hip": ["*upleg", "*upperleg", "*thigh", "*hip"],
    "knee": ["*leg", "*lowleg", "*lowerleg", "*shin", "*calf", "*knee"],
    "ankle": ["*foot", "*ankle"],
    "toe": ["*toebase", "*toe", "*ball"],
}
# Which of SMPL's joints they are; the right one follows the left one.
_LEFT = {"hip": 1, "knee": 4, "ankle": 7, "toe": 10, "shoulder": 16, "elbow": 18, "wrist": 20}
SMPL_JOINTS = {"hips": 0, "chest": 9, "neck": 12, "head": 15} | {
    f"{side} {joint}": left + (side == "r") for side in "lr" for joint, left in _LEFT.items()
}
# What a folder of each kind must hold, for check_folder.
WANTED = {
    "bvh": {"motion": ("motion capture, .bvh", True)},
    "amass": {
        "motion": ("AMASS's motion, *_poses.npz or *_stageii.npz, from https://amass.is.tue.mpg.de",
                   True),
        "smpl": ("an SMPL model file, .pkl or .npz, from https://smpl.is.tue.mpg.de", True),
    },
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# BVH


def parse_bvh(text: str) -> dict:
    """BVH text -> names [J], parents [J], offsets [J, 3], positions [T, J, 3] (in the file's unit
    and axes) and fps.

    End sites are joints, too, and have the name of their parent with " end". Raises ValueError,
    with one sentence, on anything else.
    """
    head, _, motion = text.partition("MOTION")
    names, parents, offsets, channels = _hierarchy(iter(head.split()))
    if None in offsets or not motion:
        raise ValueError("expected a hierarchy of joints with offsets, closed, and then MOTION")
    found = re.match(r"\s*Frames:\s*(\d+)\s*Frame Time:\s*([0-9.eE+-]+)", motion)
    if not found:
        raise ValueError("expected `Frames:` and `Frame Time:` after MOTION")
    n, total, seconds = int(found[1]), sum(map(len, channels)), float(found[2])
    if n * len(names) > MOST:
        raise ValueError(f"found {n} frames of {len(names)} joints: expected at most {MOST} "
                         "positions; split it")
    values = np.array(motion[found.end() :].split(), np.float64)
    complete = n and total and len(values) == n * total
    if not complete or not np.isfinite(values).all() or seconds <= 0:
        raise ValueError(f"expected {n} frames of {total} finite numbers, "
                         f"found {len(values)} numbers")
    offsets = np.array(offsets, np.float64)
    if not np.isfinite(offsets).all():
        raise ValueError("expected every OFFSET to be three finite numbers")
    position = _positions(parents, offsets, channels, values.reshape(n, total))
    return dict(names=names, parents=parents, offsets=offsets, positions=position, fps=1 / seconds)


def _hierarchy(words: Iterator[str]) -> tuple[list[str], list[int], list, list[list[str]]]:
    """Names, parents, offsets (None if a joint has none) and channels of the joints."""
    names, parents, offsets, channels = [], [], [], []
    open_ = []  # the joints whose brackets are open
    for word in words:
        if word in ("ROOT", "JOINT", "End"):
            name = next(words, "")
            if (word == "ROOT") != (not names) or (word != "ROOT" and not open_):
                raise ValueError("expected one ROOT and everything else inside its brackets, "
                                 f"found {word} {name}")
            names.append(f"{names[open_[-1]]} end" if word == "End" else name)
            parents.append(open_[-1] if open_ else -1)
            offsets.append(None)
            channels.append([])
        elif word == "{" and names:
            open_.append(len(names) - 1)
        elif word == "}" and open_:
            open_.pop()
        elif word == "OFFSET" and open_:
            offsets[open_[-1]] = [float(next(words, "nan")) for _ in range(3)]
        elif word == "CHANNELS" and open_:
            n = min(6, int(next(words, "0")))
            channels[open_[-1]] = [next(words, "") for _ in range(n)]
        elif word != "HIERARCHY":
            raise ValueError("expected ROOT, JOINT, End Site, OFFSET, CHANNELS or a bracket, "
                             f"found {word!r}")
    if not names or open_:
        raise ValueError("expected a hierarchy of joints with offsets, closed, and then MOTION")
    return names, parents, offsets, channels


def _positions(parents: list[int], offsets: np.ndarray, channels: list[list[str]],
               values: np.ndarray) -> np.ndarray:
    """Forward kinematics: values [T, channels of all joints in order] -> positions [T, J, 3]."""
    n = len(values)
    turn, position, column = [], np.zeros((n, len(parents), 3)), 0
    for j, parent in enumerate(parents):
        rotation, shift = np.tile([1.0, 0, 0, 0], (n, 1)), np.tile(offsets[j], (n, 1))
        for channel in channels[j]:
            kind, axis = channel[1:], "XYZ".find(channel[:1])
            if axis < 0 or kind not in ("position", "rotation"):
                raise ValueError(f"expected channels like Xposition and Zrotation, "
                                 f"found {channel!r}")
            v, column = values[:, column], column + 1
            if kind == "position":
                shift[:, axis] = v  # in place of the offset
            else:  # each channel turns about the axes that the ones before have left
                about = np.radians(v)[:, None] * np.eye(3)[axis]
                rotation = quat_mul(rotation, quat_from_rotvec(about))
        if parent >= 0:
            turned = np.einsum("nij,nj->ni", quat_to_matrix(turn[parent]), shift)
            shift = position[:, parent] + turned
            rotation = quat_mul(turn[parent], rotation)
        turn.append(rotation)
        position[:, j] = shift
    return position


def find_joints(names: list[str], parents: list[int]) -> dict[str, int]:
    """Which joint is which: hips, chest, neck, head, and shoulder .. toe with "l " or "r " before.

    Toes may be missing. Raises ValueError if anything else is.
    """
    plain = [re.sub(r"[^a-z0-9]", "", name.split(":")[-1].lower()) for name in names]

    def first(candidates: list[str]) -> int | None:
        return next((plain.index(c) for c in candidates if c in plain), None)

    found = {k: first(NAMES[k]) for k in ("hips", "neck", "head")}
    for side, letter in (("right", "r"), ("left", "l")):
        sides = [(side, ""), (letter, ""), ("", letter), ("", side)]
        for joint, candidates in NAMES.items():
            if "*" in candidates[0]:
                spelled = [before + c[1:] + after for c in candidates for before, after in sides]
                found[f"{letter} {joint}"] = first(spelled)
    missing = [k for k, j in found.items() if j is None and "toe" not in k]
    if missing:
        raise ValueError(f"found no joint for {', '.join(missing)} among {', '.join(names)}")

    def ancestors(j: int) -> list[int]:
        line = []
        while j >= 0:
            line, j = [*line, j], parents[j]
        return line

    # The chest is where the arms and the neck part, whatever it is called.
    arms = [ancestors(found[f"{side} shoulder"]) for side in "lr"]
    found["chest"] = next(j for j in ancestors(found["neck"]) if all(j in of for of in arms))
    return {k: j for k, j in found.items() if j is not None}


# --------------------------------------------------------------------------------------------------
# From positions to the pose of a clip


def unit(v):
    """Vectors [..., 3] at length 1; a vector of no length stays 0."""
    return v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), 1e-12)


def frame(up, right):
    """Rotation [T, 3, 3] with y along `up` and z as near to `right` as that allows; x = forward."""
    y = unit(up)
    z = unit(right - (right * y).sum(-1, keepdims=True) * y)
    return np.stack([np.cross(y, z), y, z], -1)


def matrix_to_quat(m):
    """Rotations [..., 3, 3] -> quaternions (w, x, y, z) with w >= 0.

    The quaternion is the eigenvector of the largest eigenvalue of a symmetric matrix (Bar-Itzhack
    2000), which works alike for every rotation.
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = np.moveaxis(m, (-2, -1), (0, 1))
    rows = [
        [xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, xx - yy - zz, yx + xy, zx + xz],
        [xz - zx, yx + xy, yy - xx - zz, zy + yz],
        [yx - xy, zx + xz, zy + yz, zz - xx - yy],
    ]
    k = np.stack([np.stack(row, -1) for row in rows], -2)
    q = np.linalg.eigh(k)[1][..., -1]
    return q * np.where(q[..., :1] < 0, -1.0, 1.0)


def clip_from_joints(p: dict[str, np.ndarray], fps: float, foot_pitch: float = 0.0) -> dict:
    """Joint positions [T, 3] by the names of `find_joints`, y up, in any unit -> a clip like
    motion.parse_clip's.

    foot_pitch says how far the line from ankle to toe points below the sole, in radians. Without
    toes, the feet keep to the shins.
    """
    root = frame(p["chest"] - p["hips"], p["r hip"] - p["l hip"])
    chest = frame(p["neck"] - p["chest"], p["r shoulder"] - p["l shoulder"])
    neck = rotation_between(chest[..., 1], unit(p["head"] - p["neck"])) @ chest
    # Rotations in the world, each after the one that it is relative to
    pairs = [(None, root), (root, chest), (chest, neck)]
    hinges = []
    for side, s in (("r", 0), ("l", 2)):
        thigh, knee = _limb(root, *(p[f"{side} {k}"] for k in ("hip", "knee", "ankle")), -1)
        arm, elbow = _limb(chest, *(p[f"{side} {k}"] for k in ("shoulder", "elbow", "wrist")), 1)
        knee, elbow = np.clip(knee, *HINGE_LIMITS[s]), np.clip(elbow, *HINGE_LIMITS[s + 1])
        shin = thigh @ quat_to_matrix(quat_from_rotvec(knee[:, None] * np.array([0.0, 0, 1])))
        foot = shin
        if f"{side} toe" in p:
            foot = _foot(shin, p[f"{side} toe"] - p[f"{side} ankle"], foot_pitch)
        pairs += [(root, thigh), (shin, foot), (chest, arm)]
        hinges += [knee, elbow]
    local = [b if a is None else np.swapaxes(a, 1, 2) @ b for a, b in pairs]

    # Heights count in lengths of the legs, and from where the feet are lowest in the whole clip.
    lowest = np.min([x[:, 1] for name, x in p.items() if "ankle" in name or "toe" in name])
    bones = [(f"{side} {a}", f"{side} {b}") for side in "lr"
             for a, b in (("hip", "knee"), ("knee", "ankle"))]
    legs = np.median([np.linalg.norm(p[a] - p[b], axis=-1) for a, b in bones], -1).sum() / 2
    return {
        "time": np.arange(len(root)) / fps,
        "period": None,
        "quats": np.stack([matrix_to_quat(m) for m in local], 1),
        "hinges": np.stack(hinges, 1),
        "height": (p["hips"][:, 1] - lowest) * CLIP_STANDING_HEIGHT / legs,
    }


def _limb(parent, a, b, c, sign):
    """Rotation [T, 3, 3] of the upper limb from a to b [T, 3], and the angle [T] of the hinge that
    leads from b to c, about its z. sign says which way the hinge bends."""
    up, low = unit(a - b), unit(b - c)
    at_rest = rotation_between(parent[..., 1], up) @ parent  # z is there without any twist
    # Where the limb bends to, as far as it is bent, tells its twist. A straight limb does not show
    # it, and a limb that is nearly straight shows it only roughly.
    forward = -sign * (low - (low * up).sum(-1, keepdims=True) * up)
    size = np.linalg.norm(forward, axis=-1, keepdims=True)
    sure = np.clip((size - 0.05) / 0.2, 0, 1)
    x = frame(up, sure * np.cross(unit(forward), up) + (1 - sure) * at_rest[..., 2])
    return x, np.arctan2(-(low * x[..., 0]).sum(-1), (low * up).sum(-1))


def _foot(shin, toe, pitch):
    """Rotation [T, 3, 3] of a foot whose line from ankle to toe is toe [T, 3]."""
    toe = unit(toe)
    z = unit(shin[..., 2] - (shin[..., 2] * toe).sum(-1, keepdims=True) * toe)
    forward = np.cos(pitch) * toe + np.sin(pitch) * np.cross(z, toe)  # lifted to the sole's
    return np.stack([forward, np.cross(z, forward), z], -1)


# --------------------------------------------------------------------------------------------------
# Files


@contextmanager
def _reading(path: Path, what: str):
    """Errors within become one sentence that names the file."""
    try:
        yield
    except (ValueError, OverflowError) as e:
        said = " ".join(str(e).split())[:300]
        raise ValueError(f"{path} is no {what} that can be used: {said}.") from e


def _stride(fps: float, key: str) -> int:
    """Every how manyth frame to take, so that about FPS a second are left. key: where the file says
    fps."""
    if not 1 <= fps <= 10_000:
        raise ValueError(f"expected {key} to mean 1 to 10,000 frames per second, found {fps:g}")
    return max(1, round(fps / FPS))


def _y_up(x):
    """Positions [..., 3] with z up -> with y up."""
    return x[..., [0, 2, 1]] * [1, 1, -1]


def _clip(x: np.ndarray, rest: np.ndarray, joints: dict[str, int], fps: float) -> dict:
    """Positions x [T, J, 3] at fps -> a clip.

    rest [J, 3], the rest pose, tells how the feet are built. Both have y up and any unit. joints
    says which of the J is which, by the names of `find_joints`.
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
    """One BVH file -> a clip. Up is the axis along which head and feet are mostly farthest apart.

    Raises ValueError, with one sentence, on anything that is not understood.
    """
    with _reading(path, "BVH file"):
        bvh = parse_bvh(path.read_text(encoding="utf-8", errors="replace"))
        joints = find_joints(bvh["names"], bvh["parents"])
        step = _stride(bvh["fps"], "Frame Time")
        x, rest = bvh["positions"], np.zeros((len(bvh["names"]), 3))
        for j, parent in enumerate(bvh["parents"]):
            rest[j] = bvh["offsets"][j] + (rest[parent] if parent >= 0 else 0)
        # CMU's files begin with a frame of the rest pose, which is no motion.
        near = 0.02 * np.ptp(rest, 0).max()
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
    """One AMASS file, for SMPL+H or SMPL-X -> a clip, whose action is unknown.

    In the file, z is up, and lengths are metres. Both models have SMPL's first 22 joints; hands and
    face are left out. Their shapes are not quite SMPL's, which hardly changes where limbs point.
    Raises ValueError, with one sentence, on anything that is not understood.
    """
    content = load_arrays(path, LARGEST)

    def array(key: str, *shape: int | None, more: bool = False) -> np.ndarray:
        """Every step-th row of a key's numbers in the given shape (None: any). more: columns may
        follow, and are cut off."""
        a, cells = content.get(key), ", ".join("any" if n is None else str(n) for n in shape)
        what = f"numbers [{cells}{' or more' * more}]" if shape else "one number"
        what = f"{key} to be {what}"
        if a is None:
            raise ValueError(f"expected {what}, found only {', '.join(content) or 'nothing'}")
        cut = a[..., : shape[-1]] if more and a.ndim else a
        fits = a.ndim == len(shape) and all(
            n in (None, m) for n, m in zip(shape, cut.shape, strict=True))
        if a.dtype.kind not in "fiu" or not fits:
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
        if "root_orient" in content:
            body = np.concatenate([array("root_orient", n, 3), array("pose_body", n, 63)], 1)
        else:
            body = array("poses", n, 66, more=True)
        pose = np.zeros((len(trans), smpl.N_JOINTS, 3))
        pose[:, :22] = body.reshape(-1, 22, 3)
        x = np.empty_like(pose)
        for i in range(0, len(x), CHUNK):
            part = slice(i, i + CHUNK)
            shapes = np.tile(shape, (len(pose[part]), 1))
            x[part] = model.posed(pose[part], shapes, trans[part])[1]
        clip = _clip(_y_up(x), model.joints(shape[None])[0], SMPL_JOINTS, fps / step)
        return clip | {"action": None}


def _recognise(path: Path, kind: str) -> str | None:
    """Which of WANTED[kind] a file is, by its name, or None."""
    stem, suffix = path.stem.lower(), path.suffix.lower()
    if stem.startswith("."):  # macOS leaves these
        return None
    if kind == "bvh":
        return "motion" if suffix == ".bvh" else None
    if re.search("smpl|basic_?model", stem) and not stem.endswith(("_poses", "_stageii")):
        return "smpl" if smpl.is_model(path.name) else None
    is_motion = suffix == ".npz" and stem != "shape" and not stem.endswith("stagei")
    return "motion" if is_motion else None


def read_folder(folder: Path | str, kind: str) -> dict[str, dict]:
    """All motion of a kind ("bvh" or "amass") in a folder and its subfolders: name -> clip.

    a/b.bvh has the name "a/b". Raises ValueError, with one sentence, if there is none, or if a file
    is not understood.
    """
    folder = Path(folder)
    found = check_folder(folder, lambda path: _recognise(path, kind), WANTED[kind])
    model = smpl.read(smpl.neutral(found["smpl"])) if kind == "amass" else None
    clips = {}
    for f in tqdm(found["motion"], desc="motion", disable=len(found["motion"]) <= 20):
        name = f.relative_to(folder).with_suffix("").as_posix()
        clips[name] = read_bvh(f) if kind == "bvh" else read_amass(f, model)
    return clips
