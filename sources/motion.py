"""Clips of motion: which frames a split may show, and how training poses are varied.

A pose is a tuple of quats [N, 9, 4], hinges [N, 4] in radians and height [N] in metres, of the root
above the floor. y points up, x forward and z to the right; with all rotations at zero, the body
stands upright with its arms hanging. That is how DeepMimic (Peng et al. 2018) stores its clips.
"""

import json

import numpy as np

from sources.dataset import SPLITS
from sources.geometry import quat_from_rotvec, quat_mul, slerp

UNSEEN_CLIPS = ("dance_b", "kick")  # whole clips that training never sees
# The height of the root counts in these; in all other clips, bodies stand on the floor.
AIRBORNE_CLIPS = ("backflip", "jump", "run", "spinkick")
CLIP_STANDING_HEIGHT = 0.86  # m, of the root in the walk clip
FRAME_RATE = 60  # frames per second of sequences, as most of the clips have

# Rotations of a pose: of the root in the world, of the others relative to what they hang on.
ROOT, CHEST, NECK, R_HIP, R_ANKLE, R_SHOULDER, L_HIP, L_ANKLE, L_SHOULDER = range(9)
# Hinges turn about z: knees bend to negative angles, elbows to positive ones.
R_KNEE, R_ELBOW, L_KNEE, L_ELBOW = range(4)
HINGE_LIMITS = np.array([[-2.8, 0.0], [0.0, 2.5], [-2.8, 0.0], [0.0, 2.5]])
QUAT_COLUMNS = (4, 8, 12, 16, 21, 25, 30, 35, 39)  # of a frame in the file, where each one begins
HINGE_COLUMNS = (20, 29, 34, 43)

UPPER_QUATS, UPPER_HINGES = [CHEST, NECK, R_SHOULDER, L_SHOULDER], [R_ELBOW, L_ELBOW]
MIRROR_QUATS = [ROOT, CHEST, NECK, L_HIP, L_ANKLE, L_SHOULDER, R_HIP, R_ANKLE, R_SHOULDER]
MIRROR_HINGES = [L_KNEE, L_ELBOW, R_KNEE, R_ELBOW]
QUAT_NOISE = np.radians([4, 6, 10, 8, 10, 15, 8, 10, 15])  # standard deviations in `augment`
HINGE_NOISE = np.radians([10, 18, 10, 18])


def parse_clip(text):
    """One DeepMimic clip (JSON text) -> a dict with the time [T] of its frames in s, its poses
    (quats [T, 9, 4], hinges [T, 4], height [T]) and its period in s, or None if it does not loop.

    Raises ValueError if the frames are not what they should be.
    """
    clip = json.loads(text)
    frames = np.array(clip["Frames"], np.float64)
    if frames.ndim != 2 or frames.shape[1] != 44 or not np.isfinite(frames).all():
        raise ValueError("A clip must hold frames of 44 finite numbers, "
                         f"found an array of shape {frames.shape}.")
    lasts = frames[:, 0]  # how long each frame lasts, s
    quats = np.stack([frames[:, c : c + 4] for c in QUAT_COLUMNS], 1)
    return {
        "time": np.concatenate([[0.0], np.cumsum(lasts[:-1])]),
        "period": lasts.sum() if clip["Loop"] == "wrap" else None,
        "quats": quats / np.linalg.norm(quats, axis=-1, keepdims=True),
        "hinges": frames[:, HINGE_COLUMNS],
        "height": frames[:, 2],
    }


def split_frames(clip, every=1.2, gap=0.1):
    """Frames of a clip for training, validation and testing: {split: sorted frame indices}.

    About every 1.2 s, a stretch of 0.2 s (at most a tenth of the clip) is held out, in turn for
    testing and for validation; clips of a quarter of a second or more have both. Frames within
    `gap` seconds of a held-out frame (around the seam too, if the clip loops) belong to no split,
    since they look almost like it.
    """
    time = clip["time"]
    duration = clip["period"] or time[-1]
    n, stretch = max(2, round(duration / every)), min(0.2, duration / 10)
    start = (np.arange(n) + 0.5) * duration / n - stretch / 2
    into = time[:, None] - start  # [T, n] s
    held = (into >= 0) & (into < stretch)
    test, val = held[:, ::2].any(1), held[:, 1::2].any(1)
    away = np.abs(time[:, None] - time[held.any(1)])  # [T, held-out frames]
    if clip["period"]:
        away = np.minimum(away, clip["period"] - away)
    train = (away >= gap - 1e-9).all(1)
    return {split: np.flatnonzero(of) for split, of in
            (("train", train), ("val", val), ("test", test))}


class Motion:
    """All clips in one table of frames, and which of the frames each split may show."""

    def __init__(self, clips, unseen=UNSEEN_CLIPS):
        self.names = sorted(clips)
        in_order = [clips[name] for name in self.names]
        self.time, self.quats, self.hinges, self.height = (
            np.concatenate([clip[k] for clip in in_order])
            for k in ("time", "quats", "hinges", "height")
        )
        lengths = [len(clip["time"]) for clip in in_order]
        self.clip = np.repeat(np.arange(len(in_order)), lengths)  # of every frame
        self.airborne = np.array([name in AIRBORNE_CLIPS for name in self.names])  # of every clip
        # A clip is an action, unless it says that its action is unknown (AMASS): label -1.
        self.actions = [name for name in self.names if "action" not in clips[name]]
        self.label = np.array([self.actions.index(name) if name in self.actions else -1
                               for name in self.names])
        first = np.cumsum([0, *lengths])
        self.frames = {split: [] for split in SPLITS}  # split -> for each of its clips, its frames
        for i, (name, clip) in enumerate(zip(self.names, in_order, strict=True)):
            if name in unseen:
                self.frames["unseen"].append(np.arange(first[i], first[i + 1]))
                continue
            for split, index in split_frames(clip).items():
                if len(index):
                    self.frames[split].append(first[i] + index)

    def draw(self, split, n, rng):
        """n frames of a split. Every clip is as likely as any other, so that actions weigh the
        same."""
        clips = self.frames[split]
        which, u = rng.integers(len(clips), size=n), rng.random(n)
        sizes = np.array([len(frames) for frames in clips])
        first = np.cumsum(sizes) - sizes
        return np.concatenate(clips)[first[which] + (u * sizes[which]).astype(int)]

    def stretches(self, split):
        """The motion of a split at FRAME_RATE: for each clip, its unbroken stretches, as what the
        moments lie between (two of the frames, each [n]), how far along [n], and their numbers,
        counted from the start of the clip [n]."""
        found = []
        for frames in self.frames[split]:
            found.append([])
            for part in np.split(frames, np.flatnonzero(np.diff(frames) > 1) + 1):
                time = self.time[part]
                first, last = np.round(time[[0, -1]] * FRAME_RATE, 3)  # whatever rounding has left
                at = np.arange(np.ceil(first), np.floor(last) + 1)
                if len(part) < 2 or not len(at):
                    continue
                i = np.searchsorted(time, at / FRAME_RATE, side="right") - 1
                i = i.clip(0, len(part) - 2)
                along = (at / FRAME_RATE - time[i]) / (time[i + 1] - time[i])
                found[-1].append((part[i], part[i + 1], along.clip(0, 1), at.astype(int)))
        return [of_clip for of_clip in found if of_clip]

    def pose(self, frames):
        """The poses of frames [N], see the top of this file."""
        return self.quats[frames], self.hinges[frames], self.height[frames]


def blend(a, b, t):
    """The pose between poses a and b at t [N]: slerp of rotations, linear in hinges and height."""
    t = np.asarray(t, np.float64)
    return (
        slerp(a[0], b[0], t[:, None] * np.ones(a[0].shape[1])),
        a[1] + t[:, None] * (b[1] - a[1]),
        a[2] + t * (b[2] - a[2]),
    )


def mirror(pose):
    """Swap left and right: reflect every rotation in the plane z = 0, and exchange the limbs."""
    quats, hinges, height = pose
    reflected = quats[:, MIRROR_QUATS] * np.array([1.0, -1.0, -1.0, 1.0])
    return reflected, hinges[:, MIRROR_HINGES], height


def turn(pose, yaw):
    """Turn whole poses about the vertical axis by yaw [N] radians."""
    quats = pose[0].copy()
    about_y = quat_from_rotvec(yaw[:, None] * np.array([0.0, 1.0, 0.0]))
    quats[:, ROOT] = quat_mul(about_y, quats[:, ROOT])
    return quats, pose[1], pose[2]


def augment(motion, n, rng):
    """n varied training poses -> pose, clip [N] (of the root and the legs), action [N].

    The 15 clips hold only half a minute of motion. So poses are taken between frames; a quarter
    gets the upper body of another pose, and 15 % are blended with one; joints are moved at random;
    half of the poses are mirrored. The action is -1 where two clips are mixed.
    """
    following = _following(motion)

    def draw():
        """n random poses between a frame and the next, and the clips that they are from."""
        frames = motion.draw("train", n, rng)
        between = blend(motion.pose(frames), motion.pose(following[frames]), rng.random(n))
        return between, motion.clip[frames]

    (pose, clip), (other, other_clip) = draw(), draw()
    kind = rng.random(n)
    recombine, mix = kind < 0.25, (kind >= 0.25) & (kind < 0.40)
    quats, hinges, height = blend(pose, other, np.where(mix, rng.uniform(0.2, 0.8, n), 0.0))
    # Which way two clips head has no middle, nor has how high they are: these stay.
    quats[:, ROOT], height = pose[0][:, ROOT], pose[2]
    quats[np.ix_(recombine, UPPER_QUATS)] = other[0][np.ix_(recombine, UPPER_QUATS)]
    hinges[np.ix_(recombine, UPPER_HINGES)] = other[1][np.ix_(recombine, UPPER_HINGES)]
    action = np.where((recombine | mix) & (clip != other_clip), -1, motion.label[clip])

    return vary((quats, hinges, height), np.arange(n), rng), clip, action


def vary(pose, who, rng):
    """Move the joints of poses [N] at random, and mirror half of them. who [N] counts up from 0:
    poses of one number move alike."""
    (quats, hinges, height), n = pose, who[-1] + 1
    # Some poses stay nearly as they were captured, others move by the full standard deviation.
    amount = rng.random(n)[who, None]
    noise = rng.normal(size=(n, 9, 3))[who] * (amount * QUAT_NOISE)[..., None]
    quats = quat_mul(quats, quat_from_rotvec(noise))
    moved = hinges + rng.normal(size=(n, 4))[who] * amount * HINGE_NOISE
    hinges = np.clip(moved, *HINGE_LIMITS.T)

    flip = (rng.random(n) < 0.5)[who]
    mirrored = mirror((quats, hinges, height))
    quats[flip], hinges[flip] = mirrored[0][flip], mirrored[1][flip]
    return quats, hinges, height


def draw_sequences(motion, split, n, rng):
    """Whole stretches of a split's motion, with at least n frames in all -> pose, clip [N], action
    [N], which stretch [N], counted from 0, and the frame's number in its clip [N].

    Every clip is as likely as any other to give the next stretch. Poses for training are varied as
    in `augment`, all of a stretch alike, but they are not mixed with others.
    """
    clips, drawn, length = motion.stretches(split), [], 0
    while length < n:
        of_clip = clips[rng.integers(len(clips))]
        drawn.append(of_clip[rng.integers(len(of_clip))])
        length += len(drawn[-1][0])
    before, after, along, number = (np.concatenate(a) for a in zip(*drawn, strict=True))
    who = np.repeat(np.arange(len(drawn)), [len(stretch[0]) for stretch in drawn])
    pose = blend(motion.pose(before), motion.pose(after), along)
    clip = motion.clip[before]
    pose = vary(pose, who, rng) if split == "train" else pose
    return pose, clip, motion.label[clip], who, number


def _following(motion):
    """For every frame the one after it; itself, if that is held out or of another clip."""
    train = np.concatenate(motion.frames["train"])
    clip_of = np.append(motion.clip, -1)
    following = np.arange(len(motion.clip))
    following[train[np.isin(train + 1, train) & (clip_of[train + 1] == clip_of[train])]] += 1
    return following
