"""Windows of frames, for lifters of sequences: which rows of a split a window holds.

Frames that follow one another in time are a *stretch*; begins [n] is True where one begins. A
window that reaches beyond its stretch repeats the frame at the end, as VideoPose3D does.
"""

import numpy as np


def begins(sequence, frame):
    """Which samples do not show the moment after the one before them: sequence [n] and frame [n]
    are numbers -> [n]."""
    new = np.ones(len(sequence), bool)
    new[1:] = (np.diff(sequence) != 0) | (np.diff(frame) != 1)
    return new


def run_ends(begins):
    """The first and the last frame of the run of every frame, each [n]."""
    first = np.flatnonzero(np.append(True, begins[1:]))
    last = np.append(first[1:], len(begins)) - 1
    run = np.searchsorted(first, np.arange(len(begins)), side="right") - 1
    return first[run], last[run]


def windows(ends, centres, frames):
    """The windows around the frames `centres` [W] -> rows [W, frames], and where they are frames of
    their own and not repeated ones [W, frames]. ends: as of `run_ends`."""
    first, last = ends
    wanted = centres[:, None] + np.arange(frames) - frames // 2
    rows = np.clip(wanted, first[centres, None], last[centres, None])
    return rows, rows == wanted


def windows_for_all(begins, frames, every):
    """The windows in which a lifter sees every frame once as one that it gives the pose of.

    every: whether it gives all poses of a window, or that of its centre alone. -> rows [W, frames],
    and which of them count [W, frames].
    """
    first, last = ends = run_ends(begins)
    at, half = np.arange(len(begins)) - first, frames // 2
    if not every:
        rows, _ = windows(ends, np.arange(len(begins)), frames)
        return rows, np.tile(np.arange(frames) == half, (len(rows), 1))
    # Side by side. What that leaves at the end of a run is in a window around the last frame.
    left = (at == last - first) & (at % frames < half)
    centres = np.flatnonzero((at % frames == half) | left)
    rows, own = windows(ends, centres, frames)
    return rows, own & (at[rows] // frames == at[centres, None] // frames)
