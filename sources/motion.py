"""Motion-capture clips, and the variation of training poses.

A pose is (quats [N, 9, 4], hinges [N, 4] in radians, height [N] in metres): y up, x forward, z to
the right. At zero all bones stand upright, with the arms hanging. """

import json

import numpy as np

from sources.dataset import SPLITS
from sources.geometry import quat_from_rotvec, quat_mul, slerp

UNSEEN_CLIPS = ("dance_b", "kick")  # whole clips that training never sees
AIRBORNE_CLIPS = ("backflip", "jump", "run", "spinkick")  # their root's height counts
CLIP_STANDING_HEIGHT = 0.86  # m, of the root in the walk clip

ROOT, CHEST, NECK, R_HIP, R_ANKLE, R_SHOULDER, L_HIP, L_ANKLE, L_SHOULDER = range(9)  # of quats
R_KNEE, R_ELBOW, L_KNEE, L_ELBOW = range(
    4
)  # of hinges, about z: knees bend to negative, elbows to positive angles
QUAT_COLUMNS = (4, 8, 12, 16, 21, 25, 30, 35, 39)
HINGE_COLUMNS = (20, 29, 34, 43)
UPPER_QUATS, UPPER_HINGES = [CHEST, NECK, R_SHOULDER, L_SHOULDER], [R_ELBOW, L_ELBOW]
MIRROR_QUATS = [ROOT, CHEST, NECK, L_HIP, L_ANKLE, L_SHOULDER, R_HIP, R_ANKLE, R_SHOULDER]
MIRROR_HINGES = [L_KNEE, L_ELBOW, R_KNEE, R_ELBOW]
HINGE_LIMITS = np.array([[-2.8, 0.0], [0.0, 2.5], [-2.8, 0.0], [0.0, 2.5]])
QUAT_NOISE = np.radians(
    [4, 6, 10, 8, 10, 15, 8, 10, 15]
)  # sigma per joint of the training augmentation
HINGE_NOISE = np.radians([10, 18, 10, 18])


def parse_clip(text):
    """One DeepMimic clip (JSON text) -> dict: time [T] s, period (s, or None if it does not loop)
    and its poses."""
    clip = json.loads(text)
    frames = np.array(clip["Frames"], np.float64)
    if frames.ndim != 2 or frames.shape[1] != 44 or not np.isfinite(frames).all():
        raise ValueError(
            f"A clip must hold frames of 44 finite numbers, found an array of shape {frames.shape}."
        )
    quats = np.stack([frames[:, c : c + 4] for c in QUAT_COLUMNS], 1)  # [T, 9, 4]
    return {
        "time": np.concatenate(
            [[0.0], np.cumsum(frames[:-1, 0])]
        ),  # a frame's first number is how long it lasts
        "period": frames[:, 0].sum() if clip["Loop"] == "wrap" else None,
        "quats": quats / np.linalg.norm(quats, axis=-1, keepdims=True),
        "hinges": frames[:, HINGE_COLUMNS],  # [T, 4]
        "height": frames[:, 2],  # [T] of the root above the floor, m
    }


def split_frames(clip, stretch=0.2, every=1.2, gap=0.1):
    """Frames of a clip for training, validation and testing: {split: sorted frame indices}.

    Every 1.2 s a stretch of 0.2 s is held out: its first third is for validation, the rest for
    testing. Frames closer than `gap` seconds to a held-out frame (around the seam too, if the clip
    loops) belong to no split. """
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
    return {
        "train": np.flatnonzero(train),
        "val": np.flatnonzero(val),
        "test": np.flatnonzero(test),
    }


class Motion:
    """All clips in one table of frames, and which of them a split may show."""

    def __init__(self, clips, unseen=UNSEEN_CLIPS):
        self.names = sorted(clips)
        self.quats, self.hinges, self.height = (
            np.concatenate([clips[c][k] for c in self.names]) for k in ("quats", "hinges", "height")
        )
        self.clip = np.repeat(
            np.arange(len(self.names)), [len(clips[c]["time"]) for c in self.names]
        )
        self.airborne = np.array([c in AIRBORNE_CLIPS for c in self.names])
        self.actions = [
            c for c in self.names if "action" not in clips[c]
        ]  # the others' action is unknown
        self.label = np.array(
            [self.actions.index(c) if c in self.actions else -1 for c in self.names]
        )  # of every clip
        first = np.cumsum([0] + [len(clips[c]["time"]) for c in self.names])
        self.frames = {
            split: [] for split in SPLITS
        }  # per split: a list over its clips of frame indices
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
        return np.concatenate(clips)[
            (np.cumsum(sizes) - sizes)[which] + (u * sizes[which]).astype(int)
        ]

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
    return (
        quats[:, MIRROR_QUATS] * np.array([1.0, -1.0, -1.0, 1.0]),
        hinges[:, MIRROR_HINGES],
        height,
    )


def turn(pose, yaw):
    """Turn whole poses about the vertical axis by yaw [N] radians."""
    quats = pose[0].copy()
    quats[:, ROOT] = quat_mul(
        quat_from_rotvec(yaw[:, None] * np.array([0.0, 1.0, 0.0])), quats[:, ROOT]
    )
    return quats, pose[1], pose[2]


def augment(motion, n, rng):
    """Training poses: time between frames, upper/lower recombination, blends, joint noise, mirror.

    Returns pose, clip [N] (of root and legs), action [N] (-1 where two clips are mixed).
    """
    train = np.concatenate(motion.frames["train"])
    clip_of = np.append(motion.clip, -1)
    next_frame = np.arange(
        len(motion.clip)
    )  # itself where the next one is held out or of another clip
    next_frame[train[np.isin(train + 1, train) & (clip_of[train + 1] == clip_of[train])]] += 1

    def draw():
        frames = motion.draw("train", n, rng)
        return blend(
            motion.pose(frames), motion.pose(next_frame[frames]), rng.random(n)
        ), motion.clip[frames]

    (pose, clip), (other, other_clip) = draw(), draw()
    kind = rng.random(n)
    recombine, mix = kind < 0.25, (kind >= 0.25) & (kind < 0.40)
    quats, hinges, height = blend(pose, other, np.where(mix, rng.uniform(0.2, 0.8, n), 0.0))
    quats[:, ROOT], height = (
        pose[0][:, ROOT],
        pose[2],
    )  # headings of two clips have nothing to do with each other
    quats[np.ix_(recombine, UPPER_QUATS)] = other[0][np.ix_(recombine, UPPER_QUATS)]
    hinges[np.ix_(recombine, UPPER_HINGES)] = other[1][np.ix_(recombine, UPPER_HINGES)]
    action = np.where((recombine | mix) & (clip != other_clip), -1, motion.label[clip])

    amount = rng.random(n)[
        :, None
    ]  # some poses stay as they were captured, some move by the full sigma
    quats = quat_mul(
        quats, quat_from_rotvec(rng.normal(size=(n, 9, 3)) * (amount * QUAT_NOISE)[..., None])
    )
    hinges = np.clip(hinges + rng.normal(size=(n, 4)) * amount * HINGE_NOISE, *HINGE_LIMITS.T)
    flip = rng.random(n) < 0.5
    mirrored = mirror((quats, hinges, height))
    quats[flip], hinges[flip] = mirrored[0][flip], mirrored[1][flip]
    return (quats, hinges, height), clip, action
