"""Motion capture as more clips of the default data set: `prepare_data.py --source bvh` or `amass`.

A BVH file says by itself where joints are (sources/bvh.py). An AMASS file (Mahmood et al. 2019)
poses the skeleton of SMPL, and an SMPL model, which users bring, says where its joints are.
`clip_from_joints` reads the pose of a clip (sources/motion.py) off positions: nine joint rotations,
four hinges and a height. It goes by positions alone, so it does not matter how a skeleton is built
or what its zero pose is.
"""

import re
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sources import smpl
from sources.bvh import LIMBS, find_joints, parse_bvh, positions
from sources.dataset import check_folder
from sources.files import open_regular, shown
from sources.geometry import quat_from_rotvec, quat_to_matrix, rotation_between
from sources.motion import CLIP_STANDING_HEIGHT, HINGE_LIMITS
from sources.safe_pickle import load_arrays

FPS = 30  # of the clips; faster recordings are thinned out
LARGEST = 384 << 20  # bytes of a file, unpacked: 40 minutes of AMASS at 120 per second
MOST_FRAMES = 200_000  # of a file that are left at FPS: nearly two hours
FAR = 1e9  # in any unit; no joint is that far from the origin
CHUNK = 4096  # frames that are posed at once
SKELETONS = 20  # whose joints are printed
LEG, ARM = LIMBS[:4], LIMBS[4:]
# What must lie apart for a pose to be read; the toes, if there are any.
BONES = [("hips", "chest"), ("chest", "neck"), ("neck", "head"),
         ("l hip", "r hip"), ("l shoulder", "r shoulder"),
         *((f"{s} {a}", f"{s} {b}") for s in "lr" for a, b in (*pairwise(LEG), *pairwise(ARM)))]
# The shin of a person who stands leans forward by 0 to 7 degrees in the skeletons that we know.
LEAN = np.radians(4)
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
        with np.errstate(all="ignore"):  # what is not finite is refused in the end
            yield
    except (ValueError, OSError) as e:
        said = shown(str(getattr(e, "strerror", None) or e), 600)
        raise ValueError(f"{shown(path, 4096)} is no {what} that can be used: {said}.") from e


def _stride(fps: float, key: str) -> int:
    """Every how manyth frame to take, so that about FPS a second are left. key: where the file says
    fps."""
    if not 1 <= fps <= 10_000:
        raise ValueError(f"expected {key} to mean 1 to 10,000 frames per second, found {fps:g}")
    return max(1, round(fps / FPS))


def _thinned(frames: np.ndarray, step: int) -> np.ndarray:
    """Every step-th of the frames, counted before anything is made of them."""
    n = len(frames[::step])
    if not 2 <= n <= MOST_FRAMES:
        raise ValueError(f"expected 2 to {MOST_FRAMES:,} frames at {FPS} per second, found {n}")
    return frames[::step]


def _y_up(x):
    """Positions [..., 3] with z up -> with y up."""
    return x[..., [0, 2, 1]] * [1, 1, -1]


def upright(rest: dict[str, np.ndarray]) -> np.ndarray | None:
    """Up [3] in a rest pose [3] in which somebody stands, with trunk and legs along one axis; None
    in others, where bones may lie in any way."""
    trunk = unit(rest["neck"] - rest["hips"])
    k = np.abs(trunk).argmax()
    up = np.eye(3)[k] * np.sign(trunk[k])
    legs = [rest[f"{s} {a}"] - rest[f"{s} {b}"] for s in "lr" for a, b in pairwise(LEG[:3])]
    return up if min(up @ unit(v) for v in (trunk, *legs)) > np.cos(np.radians(25)) else None


def up_axis(p: dict[str, np.ndarray], rest: dict[str, np.ndarray]) -> int:
    """Which axis of posed joints p [T, 3] points up, 1 or 2; rest: those of the rest pose [3].

    It is the one along which head and feet are mostly farthest apart: people stand. But somebody
    who stands in the rest pose along another axis, and whose lowest joint along that one is on a
    floor at 0, while it is far from 0 along the former, is lying down.
    """
    standing = np.median(p["head"] - (p["l ankle"] + p["r ankle"]) / 2, 0)
    axis, up = int(np.abs(standing).argmax()), upright(rest)
    lowest = np.min([x.min(0) for x in p.values()], 0) / max(np.linalg.norm(standing), 1e-12)
    other = axis if up is None else int(np.abs(up).argmax())
    if other != axis and -0.03 < lowest[other] < 0.15 and abs(lowest[axis]) > 0.25:
        axis = other
    if axis == 0:
        raise ValueError("expected a person who stands up along y or z, found one along x")
    return axis


def foot_pitch(p: dict[str, np.ndarray], rest: dict[str, np.ndarray]) -> float:
    """How far the lines from ankles to toes point below the soles, in radians; 0 without toes.

    p: posed joints [T, 3]; rest: those of the rest pose [3], in any axes. Where somebody stands in
    the rest pose, with trunk and legs upright and feet forward, soles are flat. But many rest poses
    are none that a person takes: all bones lie along one axis. Then the posed joints have to tell.
    In the half of the frames in which legs are straightest, feet are taken to be mostly at that
    angle to the shin at which a standing person's are (LEAN), on a floor or not. The feet of
    DeepMimic's 15 clips come out within 7 degrees that way, on average, and 26 at worst.
    """
    sides = [side for side in "lr" if f"{side} toe" in p]
    if not sides:
        return 0.0

    def leg(of: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Directions of thighs, shins and feet, [sides, ..., 3] each."""
        return [unit(np.stack([of[f"{s} {b}"] - of[f"{s} {a}"] for s in sides]))
                for a, b in pairwise(LEG)]

    up = upright(rest)
    dip = np.arcsin(-leg(rest)[2] @ up) if up is not None else np.array(np.nan)
    if (np.abs(dip - np.radians(25)) < np.radians(35)).all():
        return float(dip.mean())
    thigh, shin, foot = leg(p)
    straight, dip = (thigh * shin).sum(-1), np.arcsin(np.clip((shin * foot).sum(-1), -1, 1))
    return float(np.median(dip[straight >= np.median(straight)]) + LEAN)


def _clip(p: dict[str, np.ndarray], rest: dict[str, np.ndarray], fps: float) -> dict:
    """Joint positions p [T, 3] at fps, with y up, and those of the rest pose [3] -> a clip. Keys
    are those of `find_joints`."""
    if not all((np.abs(v) < FAR).all() for v in p.values()):
        raise ValueError(f"expected positions below {FAR:g}, found larger ones")
    for a, b in BONES:
        if a in p and b in p and not np.linalg.norm(p[a] - p[b], axis=-1).min() > 0:
            raise ValueError(f"expected {a} and {b} to lie apart, found them in one place")
    clip = clip_from_joints(p, fps, foot_pitch(p, rest))
    if not all(np.isfinite(clip[k]).all() for k in ("quats", "hinges", "height")):
        raise ValueError("expected poses of a body, found a limb that points straight through it")
    return clip


def read_bvh(path: Path) -> dict:
    """One BVH file -> a clip; its "taken" says what each of our joints is called in the file, and
    which axis points up. Raises ValueError, with one sentence, on anything that is not understood.
    """
    with _reading(path, "BVH file"), open_regular(path, LARGEST) as f:
        bvh = parse_bvh(f)
        step = _stride(bvh.fps, "Frame Time")
        joints = find_joints(bvh.names, bvh.parents, bvh.offsets)
        wanted = list(joints.values())
        rest = bvh.offsets.copy()
        for j, parent in enumerate(bvh.parents[1:], 1):
            rest[j] += rest[parent]
        rest = rest[wanted]
        # CMU's files begin with a frame of the rest pose, which is no motion.
        near = 0.02 * np.ptp(rest, 0).max()
        at_rest = [np.abs(x - x[0] - rest + rest[0]).max() < near
                   for x in positions(bvh, bvh.values[:2], wanted)]
        values = _thinned(bvh.values[int(at_rest == [True, False]) :], step)
        parts = [values[i : i + CHUNK] for i in range(0, len(values), CHUNK)]
        x = np.concatenate([positions(bvh, part, wanted) for part in parts])
        p = dict(zip(joints, np.moveaxis(x, 1, 0), strict=True))
        rest = dict(zip(joints, rest, strict=True))
        up = up_axis(p, rest)
        p = {key: _y_up(v) for key, v in p.items()} if up == 2 else p
        clip = _clip(p, rest, bvh.fps / step)
        taken = {key: bvh.names[j] for key, j in joints.items()}
        return clip | {"taken": taken | {"up": "xyz"[up]}}


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
            keys = shown(", ".join(content)) or "nothing"
            raise ValueError(f"expected {what}, found only {keys}")
        cut = a[..., : shape[-1]] if more and a.ndim else a
        fits = a.ndim == len(shape) and all(
            n in (None, m) for n, m in zip(shape, cut.shape, strict=True))
        if a.dtype.kind not in "fiu" or not fits:
            raise ValueError(f"expected {what}, found {shown(f'{a.dtype} {list(a.shape)}')}")
        cut = (_thinned(cut, step) if a.ndim == 2 else cut).astype(np.float64)
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
        p = {key: _y_up(x[:, j]) for key, j in SMPL_JOINTS.items()}
        rest = model.joints(shape[None])[0]
        clip = _clip(p, {key: rest[j] for key, j in SMPL_JOINTS.items()}, fps / step)
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


def _in_a_line(taken: dict[str, str]) -> str:
    """The axis that points up, and what our joints were taken from, left and right together."""
    cells = [f"{key} {shown(taken[key])}" for key in ("up", "hips", "chest", "neck", "head")]
    for limb in LIMBS:
        names = [shown(taken.get(f"{side} {limb}", "NOT FOUND")) for side in "lr"]
        cells.append(f"{limb} {', '.join(names)}")
    if "l toe" not in taken or "r toe" not in taken:
        cells.append("a foot without a toe keeps to its shin")
    return " | ".join(cells)


def read_folder(folder: Path | str, kind: str) -> dict[str, dict]:
    """All motion of a kind ("bvh" or "amass") in a folder and its subfolders: name -> clip.

    a/b.bvh has the name "a/b". A file that is not understood is left out, and it is printed why.
    For every skeleton it is printed which joints were taken. Raises ValueError, with one sentence,
    if there is no motion, or none that is understood.
    """
    folder = Path(folder)
    found = check_folder(folder, lambda path: _recognise(path, kind), WANTED[kind])
    model = smpl.read(smpl.neutral(found["smpl"])) if kind == "amass" else None
    clips, skeletons, bad = {}, {}, []
    for path in tqdm(found["motion"], desc="motion", disable=len(found["motion"]) <= 20):
        name = shown(path.relative_to(folder).with_suffix("").as_posix(), 4096)
        try:
            if name in clips:
                raise ValueError(f"{shown(path, 4096)} has the name of another file: rename it.")
            clips[name] = read_bvh(path) if kind == "bvh" else read_amass(path, model)
        except ValueError as e:
            bad.append(shown(str(e), 5000))
        else:
            if kind == "bvh":
                skeletons.setdefault(_in_a_line(clips[name].pop("taken")), []).append(name)
    if not clips:
        raise ValueError(bad[0] if len(bad) == 1 else
                         f"None of {len(bad)} files can be used; of the first one: {bad[0]}")
    for line, names in list(skeletons.items())[:SKELETONS]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"  joints of {names[0]}{more}: {line}")
    if len(skeletons) > SKELETONS:
        print(f"  joints of {len(skeletons) - SKELETONS} more skeletons are not shown")
    if bad:
        print(f"  left out, {len(bad)} of {len(found['motion'])} files:", *bad, sep="\n    ")
    return clips
