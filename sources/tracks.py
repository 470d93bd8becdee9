"""Who is the same person from frame to frame, in 2D keypoints of a video.

A file may say so, with an id for every person. Otherwise people are followed where images are
frames of one sequence, which their names tell: one stem and numbers that rise in even steps. In
such a sequence a person is linked to one of the frames before if the movement between them is one
that a person can make.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection
from typing import NamedTuple

import numpy as np

GAP = 10  # frames in which a person may be missed
CROWD = 50  # people of one frame; in a sequence that shows more, nobody is followed
REMEMBERED = 100  # tracks at a time, the last seen first
LARGEST = 1 << 62  # number of a frame
# What a person can change from one frame to the next, in diagonals of the box around the joints:
# the pose, as the mean way of a joint within the person; the place of the whole person, since
# cameras turn, too; and the size, as a factor. After a gap it may be up to three times as much.
POSE, PLACE, SIZE = 0.12, 0.4, 1.3
LONGEST_GAP = 3


class Frame(NamedTuple):
    """Which frame of which sequence an image is."""

    sequence: str
    number: int


def frames_of(images: Collection[str]) -> dict[str, Frame | None]:
    """Which frame each image is by its name, as in "clip_0012.jpg" or "a/b_3_keypoints"; None if
    the name, without its folder, has no number.

    Among names that differ in their numbers only, the last number that is not always the same
    counts the frames: in clip_0_1080p.jpg, clip_1_1080p.jpg it is the first.
    """
    kinds, frames = defaultdict(dict), dict.fromkeys(images)
    for image in frames:
        folder, slash, name = re.sub(r"\.[A-Za-z]\w{0,4}$", "", image).rpartition("/")
        parts = re.split("([0-9]+)", name)
        kinds[(folder + slash, *parts[::2])][image] = parts[1::2]
    for (folder, *texts), named in kinds.items():
        columns = list(zip(*named.values(), strict=True))
        rising = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        if not columns:
            continue
        at = (rising or [len(columns) - 1])[-1]
        for image, numbers in named.items():
            others = [*numbers[:at], "", *numbers[at + 1 :], ""]
            rest = "".join(text + n for text, n in zip(texts, others, strict=True))
            frames[image] = Frame(folder + rest, min(int(numbers[at]), LARGEST))
    return frames


def follow(points: list[np.ndarray], frames: list[Frame | None], ids: list[str]) -> list[str]:
    """For every person the name of a track, or "".

    points [K, 3] px and score of each; their frames, those of a sequence in order; and the ids that
    the file gives, or "".
    """
    track, sequences = [""] * len(points), defaultdict(list)
    for i, frame in enumerate(frames):
        if frame:
            sequences[frame.sequence].append(i)
    film = {s: rows for s, rows in sequences.items() if len({frames[i].number for i in rows}) > 1}
    for sequence, rows in film.items():
        numbers = [frames[i].number for i in rows]
        if {ids[i] for i in rows} - {"", "0"}:  # AlphaPose writes 0 for all where it did not track
            names = _told(numbers, [ids[i] for i in rows])
        elif step := _even_step(numbers):
            names = _linked(np.stack([points[i] for i in rows]), [round(n / step) for n in numbers])
        else:
            continue
        for i, name in zip(rows, names, strict=True):
            track[i] = f"{sequence} {name}" if len(film) > 1 and name else name
    return track


def _told(numbers: list[int], ids: list[str]) -> list[str]:
    """The ids as tracks. Who has none, or one that another has in the same frame, has no track."""
    once = Counter(zip(numbers, ids, strict=True))
    return [of if once[number, of] == 1 else "" for number, of in zip(numbers, ids, strict=True)]


def _even_step(numbers: list[int]) -> int:
    """The step from frame to frame, if most steps are the same; otherwise 0. Photos have numbers,
    too, but with gaps of any size."""
    steps = Counter(np.diff(sorted(set(numbers))).tolist())
    step, times = min(steps.items(), key=lambda item: (-item[1], item[0]))
    return step if 2 * times >= sum(steps.values()) else 0


def _linked(points: np.ndarray, times: list[int]) -> list[str]:
    """The tracks of people by movement alone, "" for all if there are too many in a frame."""
    if max(Counter(times).values()) > CROWD:
        return [""] * len(points)
    visible, sizes = points[..., 2] > 0, _diagonal(points)
    at = np.where(visible, points[..., 0] + 1j * points[..., 1], 0)
    track, made, alive = [""] * len(points), 0, []  # alive: the last person of each track
    frames = defaultdict(list)
    for i, time in enumerate(times):
        frames[time].append(i)
    for time, rows in frames.items():
        alive = [i for i in alive if time - times[i] <= GAP][-REMEMBERED:]
        if alive:
            gaps = np.minimum([time - times[i] for i in alive], LONGEST_GAP)
            a, b, effort = _efforts(*((x[rows], x[alive]) for x in (at, visible, sizes)), gaps)
            # The easiest movement first, and each person and each track once.
            easiest = np.argsort(effort, kind="stable")
            for person, last in zip(a[easiest].tolist(), b[easiest].tolist(), strict=True):
                if not track[rows[person]] and alive[last] is not None:
                    track[rows[person]], alive[last] = track[alive[last]], None
        for i in rows:
            if not track[i]:
                track[i], made = str(made), made + 1
        alive = [i for i in alive if i is not None] + rows
    return track


def _efforts(at, visible, sizes, gaps: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How hard it is to get from people of earlier frames to people of this one: the pairs that a
    person can do, as places among the latter and the former, and the effort, below 1.

    Each of at [n, K] (x + iy px), visible [n, K] and sizes [n] px is a pair, (here, before). gaps
    [m]: how many frames lie between. The place of the whole costs little and is compared for all
    pairs, the pose only for those that are near.
    """
    here, before = (x.astype(np.float64) for x in visible)
    count = here @ before.T
    place = (at[0] @ before.T - here @ at[1].T) / np.maximum(count, 1)
    size = np.sqrt(np.multiply.outer(*sizes))
    growth = np.abs(np.subtract.outer(*map(np.log, sizes))) * (count == here.shape[1])
    effort = np.maximum(np.abs(place) / size / PLACE, growth / np.log(SIZE)) / gaps
    a, b = np.nonzero((count >= 2) & (effort < 1))
    way = at[0][a] - at[1][b] - place[a, b, None]
    way = np.sqrt(way.real**2 + way.imag**2) * (visible[0][a] & visible[1][b])
    pose = way.sum(1) / count[a, b] / size[a, b] / POSE / gaps[b]
    able = pose < 1
    return a[able], b[able], np.maximum(effort[a, b], pose)[able]


def _diagonal(people: np.ndarray) -> np.ndarray:
    """The diagonal of the box around the visible joints of people [n, K, 3], at least 1 px."""
    visible = people[..., 2:] > 0
    low = np.where(visible, people[..., :2], np.inf).min(1)
    high = np.where(visible, people[..., :2], -np.inf).max(1)
    size = np.linalg.norm(high - low, axis=-1)
    return np.maximum(np.where(np.isfinite(size), size, 1), 1)
