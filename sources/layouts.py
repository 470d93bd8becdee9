"""Orders of 2D joints that other programs use, and the way from each to Human3.6M's 17.

A layout is a list of joints by name. RECIPES makes Human3.6M's joints of whatever a layout has.
Human3.6M's own joints sit a little elsewhere (hips lower and wider, head higher), so this costs
accuracy.
"""

import re

import numpy as np

from hipart import JOINT_NAMES, PARENTS

_PAIRS = "shoulder elbow wrist hip knee ankle".split()
_FACE = ["nose", "l eye", "r eye", "l ear", "r ear"]
_COCO = [*_FACE, *(f"{side} {joint}" for joint in _PAIRS for side in "lr")]


def _limbs(*limbs: str) -> list[str]:
    """"r arm" -> the joints of the right arm, from the shoulder on; "leg" likewise."""
    joints = {"arm": _PAIRS[:3], "leg": _PAIRS[3:]}
    return [f"{limb[0]} {joint}" for limb in limbs for joint in joints[limb[2:]]]


def _each(*joints: str) -> list[str]:
    """The left one and the right one of every joint."""
    return [f"{side} {joint}" for joint in joints for side in "lr"]


_FEET = [f"{side} {part}" for side in "lr" for part in ("big toe", "small toe", "heel")]
_MPII_LEGS, _MPII_ARMS = _limbs("r leg")[::-1] + _limbs("l leg"), _limbs("r arm")[::-1]
_OPENPOSE_FACE = ["r eye", "l eye", "r ear", "l ear"]

LAYOUTS = {
    "h36m17": ["pelvis", *_limbs("r leg", "l leg"), "spine", "thorax", "nose", "head top",
               *_limbs("l arm", "r arm")],
    "coco17": _COCO,
    # OpenPose's neck is the middle of the shoulders, and is made anew of them.
    "coco18": ["nose", "middle of the shoulders", *_limbs("r arm", "l arm", "r leg", "l leg"),
               *_OPENPOSE_FACE],
    "body25": ["nose", "neck", *_limbs("r arm", "l arm"), "pelvis", *_limbs("r leg", "l leg"),
               *_OPENPOSE_FACE, *_FEET],
    "body25b": [*_COCO, "upper neck", "head top", *_FEET],
    "halpe26": [*_COCO, "head top", "neck", "pelvis", *_each("big toe", "small toe", "heel")],
    "mpii16": [*_MPII_LEGS, "pelvis", "thorax", "upper neck", "head top", *_MPII_ARMS,
               *_limbs("l arm")],
    # Stacked Hourglass fine-tuned on Human3.6M has MPII's places, but spine, thorax and head in
    # those of thorax, neck and head.
    "sh16": [*_MPII_LEGS, "pelvis", "spine", "thorax", "head top", *_MPII_ARMS, *_limbs("l arm")],
    "posetrack17": ["nose", "upper neck", "head top", *_COCO[3:]],
    "crowdpose14": [*_COCO[5:], "head top", "neck"],
    "aic14": [*_limbs("r arm", "l arm", "r leg", "l leg"), "head top", "neck"],
    "mediapipe33": ["nose", "l eye inner", "l eye", "l eye outer", "r eye inner", "r eye",
                    "r eye outer", "l ear", "r ear", "l mouth", "r mouth",
                    *_each("shoulder", "elbow", "wrist", "pinky", "index", "thumb", "hip", "knee",
                           "ankle", "heel", "foot index")],
}  # fmt: skip
# Halpe's 136 joints begin with Halpe-26, COCO-WholeBody's 133 with COCO-17.
LARGER = {136: "halpe26", 133: "coco17"}

# How Human3.6M's joints on the middle line are made: the mean of the first of these sets that a
# layout has. The others have the same names everywhere.
RECIPES = {
    0: [["pelvis"], ["l hip", "r hip"]],
    7: [["spine"], ["neck", "pelvis"], ["thorax", "pelvis"],
        ["l shoulder", "r shoulder", "l hip", "r hip"]],
    8: [["thorax"], ["neck"], ["l shoulder", "r shoulder"]],
    9: [["nose"], ["upper neck"], ["thorax", "head top"], ["neck", "head top"]],
    10: [["head top"], ["l eye", "r eye"]],
}  # fmt: skip
# Names that files use for the same joints, once they are plain.
SAME = {"head bottom": "upper neck", "top head": "head top", "head": "head top", "hip": "pelvis",
        "mid hip": "pelvis", "root": "pelvis", "neck base": "nose", "neck nose": "nose",
        "middle of the shoulders": "neck", "l foot": "l ankle", "r foot": "r ankle"}  # fmt: skip

FAR = 1e6  # px; a larger coordinate is no coordinate
# What speaks against a layout, each counted in the largest value that poses in the right order
# show (measured on the test splits of the default data set, whose medians are 0.14 to 0.15 where
# the order is right, and 0.21 to 0.22 where COCO's and Human3.6M's are confused): the mean length
# of a bone, in diagonals of the box, and the distance of the eyes, in lengths of the trunk.
BONE, EYES = 0.19, 0.35


def joint_table(layout: str) -> dict[int, list[int]]:
    """For each of Human3.6M's 17 joints the joints of a layout whose mean it is."""
    names = LAYOUTS[layout]
    made = {j: next(r for r in RECIPES[j] if set(r) <= set(names)) if j in RECIPES else [name]
            for j, name in enumerate(LAYOUTS["h36m17"])}
    return {j: [names.index(name) for name in sources] for j, sources in made.items()}


def layout_of(names: list[str]) -> str | None:
    """The layout whose joints have these names, in this order, or None."""
    if len(names) not in {len(ours) for ours in LAYOUTS.values()} | set(LARGER):
        return None
    found = [_plain(name) for name in names]
    for layout, ours in LAYOUTS.items():
        ours = [_plain(name) for name in ours]
        if found == ours or len(found) in LARGER and LARGER[len(found)] == layout and (
                found[: len(ours)] == ours):
            return layout
    return "h36m17" if found == [_plain(name) for name in JOINT_NAMES] else None


def _plain(name: str) -> str:
    """left_shoulder, LShoulder, RIGHT-hip, Rknee -> l shoulder, l shoulder, r hip, r knee."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[LR])(?=[A-Z][a-z])", " ", name[:100]).lower()
    words = re.sub(r"\b([lr])(?=(eye|ear|shoulder|elbow|wrist|hip|knee|ankle)\b)", r"\1 ", words)
    words = [{"left": "l", "right": "r"}.get(w, w) for w in re.findall("[a-z]+", words)]
    words.sort(key=lambda w: w not in ("l", "r"))  # the side first
    plain = " ".join(words)
    return SAME.get(plain, plain)


def to_h36m(points: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """points [N, K, 3] (x, y, score) in `layout` -> x_s [N, 17, 2] px, conf [N, 17], the least
    score of a joint's sources.

    What is missing is never averaged: a joint is missing (0) if any of its sources is. Only the
    head, where it is the mean of the eyes, is content with one of them, since a profile shows no
    more. A source is missing if its score is 0 or less, if it is at (0, 0) or (-1, -1), or if a
    number is not finite or larger than FAR.
    """
    if points.ndim != 3 or points.shape[1:] != (len(LAYOUTS[layout]), 3):
        raise ValueError(f"{layout} needs points [N, {len(LAYOUTS[layout])}, 3], "
                         f"found {list(points.shape)}")
    missing = is_missing(points)
    points = np.where(missing[..., None], 0.0, points)
    xy, score = points[..., :2], np.minimum(points[..., 2], 100.0)
    x_s = np.zeros((len(points), 17, 2), np.float32)
    conf = np.zeros((len(points), 17), np.float32)
    for j, sources in joint_table(layout).items():
        visible = score[:, sources] > 0
        enough = visible.sum(1) >= (1 if j == 10 else len(sources))
        least = np.where(visible, score[:, sources], np.inf).min(1)
        conf[:, j] = np.where(enough, least, 0.0)
        total = (xy[:, sources] * visible[..., None]).sum(1)
        mean = total / np.maximum(visible.sum(1), 1)[:, None]
        x_s[:, j] = mean * (conf[:, j] > 0)[:, None]
    return x_s, conf


def is_missing(points: np.ndarray) -> np.ndarray:
    """Which joints of points [..., 3] are no joints (see to_h36m)."""
    xy, score = points[..., :2], points[..., 2]
    with np.errstate(invalid="ignore"):
        return (~np.isfinite(points).all(-1) | (np.abs(xy) > FAR).any(-1) | (score <= 0)
                | (xy == 0).all(-1) | (xy == -1).all(-1))


def misfit(points: np.ndarray, layout: str) -> float:
    """How badly points [N, K, 3] look like people in `layout`: above 1, they hardly do.

    Bones that are long against the box around a person cross it, as in no body. Eyes are close
    together. And in most pictures heads are above hips, and hips above ankles.
    """
    x, conf = to_h36m(points[:: len(points) // 2000 + 1], layout)
    low = np.where(conf[..., None] > 0, x, np.inf).min(1)
    high = np.where(conf[..., None] > 0, x, -np.inf).max(1)
    enough = (conf > 0).sum(1) >= 8
    if not enough.any():
        return 0.0
    x, conf = x[enough], conf[enough]
    box = np.maximum(np.linalg.norm((high - low)[enough], axis=1), 1e-9)
    joint, parent = np.arange(1, 17), list(PARENTS[1:])
    bones = np.linalg.norm(x[:, joint] - x[:, parent], axis=2)
    seen = (conf[:, joint] > 0) & (conf[:, parent] > 0)
    against = [np.median((bones * seen).sum(1) / np.maximum(seen.sum(1), 1) / box) / BONE]
    names = LAYOUTS[layout]
    if "l eye" in names:
        eyes = points[:: len(points) // 2000 + 1][enough][:, [names.index("l eye"),
                                                              names.index("r eye")]]
        both = ~is_missing(eyes).any(1) & (conf[:, [0, 8]] > 0).all(1)
        trunk = np.linalg.norm(x[:, 8] - x[:, 0], axis=1)
        apart = np.linalg.norm(eyes[:, 0, :2] - eyes[:, 1, :2], axis=1) / np.maximum(trunk, 1e-9)
        against += [np.median(apart[both]) / EYES] if both.any() else []
    whole = (conf[:, [0, 3, 6, 10]] > 0).all(1)
    head, hips, ankles = x[whole, 10, 1], x[whole, 0, 1], x[whole][:, [3, 6], 1].mean(1)
    if len(head) and np.mean((head > hips) & (hips > ankles)) > 0.5:
        against.append(2.0)  # upside down
    return float(max(against))
