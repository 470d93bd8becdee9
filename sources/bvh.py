"""BVH files, the common format of motion capture: which joints there are, and where they are.

A BVH file says which joints hang on which, how far away, and by what angles they turn in every
frame. `parse_bvh` reads it, `find_joints` tells from names and hierarchy which joint is which, and
`positions` says where they are. What a file asks for is counted before anything of that size is
made, and no step takes more than linear time.
"""

import re
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from typing import BinaryIO

import numpy as np

from sources.files import shown
from sources.geometry import quat_from_rotvec, quat_mul, quat_to_matrix

HEADER = 4 << 20  # bytes of a file, before its motion
MOST_JOINTS = 1000  # end sites included
MOST_NUMBERS = 40_000_000  # of the motion
BLOCK = 1 << 20  # bytes of the motion that are read at once
CHANNELS = {axis + kind for axis in "XYZ" for kind in ("position", "rotation")}

# What programs call the joints, without prefix ("mixamorig:"), side, case and punctuation: the more
# specific names first. Joints are taken in this order, and once each: "leg" is the hip where there
# is a "shin", "foot" the toe where there is an "ankle", and "arm" the elbow where there is "uparm".
NAMES = {
    "hips": ["hips", "hip", "pelvis"],
    "neck": ["neck", "lowerneck", "necklower", "necktwist", "spine4"],  # the last is Rigify's
    "head": ["head", "spine6"],
    "knee": ["knee", "lowerleg", "lowleg", "shin", "calf", "tibia", "leg"],
    "hip": ["upleg", "upperleg", "thigh", "femur", "hip", "leg"],
    "ankle": ["ankle", "foot"],
    "toe": ["toebase", "toe31", "toe", "toes", "ball", "foot"],  # toe3-1: MakeHuman's middle toe
    "shoulder": ["upperarm", "uparm", "uarm", "humerus", "arm", "shldr", "shoulder"],
    "elbow": ["elbow", "forearm", "lowerarm", "lowarm", "farm", "radius", "arm"],
    "wrist": ["wrist", "hand"],
}
LIMBS = ("hip", "knee", "ankle", "toe", "shoulder", "elbow", "wrist")  # with "l " or "r " before
# The joint on which each end hangs. An end whose name is not known is all that hangs there.
ENDS = {"head": "neck", "wrist": "elbow", "toe": "ankle"}
SIDES = {"l": "l", "left": "l", "r": "r", "right": "r"}
WORDS = re.compile("[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")  # of a name
IDLE = {"c", "m", "joint", "jnt", "bone", "bend"}  # words that say nothing; c and m: in the middle
_KNOWN = "|".join(sorted({re.sub("[0-9]", "", n) for names in NAMES.values() for n in names}))
_KNOWN = re.compile(f"(left|right|l|r)?({_KNOWN})(left|right|l|r)?")


@dataclass
class BVH:
    """A file of J joints, in its own unit and axes. End sites are joints, too, and have the name of
    their parent with " end"."""

    names: list[str]
    parents: list[int]  # -1 for the root
    offsets: np.ndarray  # [J, 3]
    channels: list[list[str]]  # of every joint, such as Xposition or Zrotation
    values: np.ndarray  # [T, channels of all joints]
    fps: float


# --------------------------------------------------------------------------------------------------
# Reading


def parse_bvh(f: BinaryIO) -> BVH:
    """Read a file from its beginning. Raises ValueError, with half a sentence, on anything that is
    not understood."""
    head = f.read(HEADER)
    found = re.search(rb"\bMOTION\s+Frames:\s*(\d{1,15})\s+Frame Time:\s*(\S{1,40})", head)
    if not found:
        raise ValueError("expected a hierarchy of joints and then MOTION, Frames: and Frame Time:, "
                         f"found no such lines in the first {HEADER >> 20} MB")
    hierarchy = _hierarchy(head[: found.start()].decode("utf-8-sig", "replace"))
    n, seconds = int(found[1]), _number(found[2])
    total = sum(len(channels) for channels in hierarchy[-1])
    if n * total > MOST_NUMBERS:
        raise ValueError(f"expected at most {MOST_NUMBERS:,} numbers, found {n} frames of {total}; "
                         "split it")
    if not seconds > 0:
        raise ValueError("expected Frame Time to be a number above 0")
    f.seek(found.end())
    # The text in words would take many times the memory of its numbers, so it is read in blocks.
    values, filled = np.empty(n * total), 0
    while words := (f.read(BLOCK) + f.readline(BLOCK)).split():
        block = [_number(word) for word in words]
        if filled + len(block) > len(values) or not np.isfinite(block).all():
            raise ValueError(f"expected {n} frames of {total} finite numbers, found more than that "
                             "or no finite numbers")
        values[filled : filled + len(block)] = block
        filled += len(block)
    if not filled or filled < len(values):
        raise ValueError(f"expected {n} frames of {total} finite numbers, found only {filled}")
    return BVH(*hierarchy, values.reshape(n, total), 1 / seconds)


def _number(word: str | bytes) -> float:
    """A word of a file as a number; NaN if it is none."""
    try:
        return float(word)
    except ValueError:
        return np.nan


def _hierarchy(text: str) -> tuple[list[str], list[int], np.ndarray, list[list[str]]]:
    """Names, parents, offsets [J, 3] and channels of the joints."""
    names, parents, offsets, channels = [], [], [], []
    open_, bare = [], False  # joints whose brackets are open; whether the newest one lacks its own
    # A name may hold spaces, and goes to the end of its line.
    words = re.finditer(r"(?:ROOT|JOINT|End)\s+[^{}\r\n]*|[{}]|[^\s{}]+", text)

    def following(n: int) -> list[str]:
        return [m[0] for m in islice(words, n)]

    for match in words:
        word, *name = match[0].split(None, 1)
        if word == "{" and bare:
            open_.append(len(names) - 1)
            bare = False
        elif bare:
            raise _not_understood(match)
        elif (word == "ROOT" and not names) or (word in ("JOINT", "End") and open_):
            if len(names) == MOST_JOINTS:
                raise ValueError(f"expected at most {MOST_JOINTS} joints, found more; leave out "
                                 "those of fingers, face, hair and clothes")
            parents.append(open_[-1] if open_ else -1)
            names.append(f"{names[parents[-1]]} end" if word == "End" else "".join(name).strip())
            offsets.append([np.nan])
            channels.append([])
            bare = True
        elif word == "}" and open_:
            open_.pop()
        elif word == "OFFSET" and open_:
            offsets[open_[-1]] = [_number(v) for v in following(3)]
        elif word == "CHANNELS" and open_:
            n = _number("".join(following(1)))
            channels[open_[-1]] = following(int(n)) if 0 <= n <= 6 else [""]
            if not CHANNELS.issuperset(channels[open_[-1]]):
                raise _not_understood(match)
        elif word != "HIERARCHY":
            raise _not_understood(match)
    if not names or open_ or not all(len(v) == 3 and np.isfinite(v).all() for v in offsets):
        raise ValueError("expected a hierarchy of joints that is complete, with every OFFSET three "
                         "finite numbers")
    return names, parents, np.array(offsets), channels


def _not_understood(match: re.Match) -> ValueError:
    line = match.string.count("\n", 0, match.start()) + 1
    return ValueError(f"line {line} is not understood: expected ROOT once, JOINT and End Site "
                      "within its brackets, and in the brackets of each OFFSET with three numbers "
                      "and CHANNELS such as 3 Zrotation Xrotation Yrotation")


def positions(bvh: BVH, values: np.ndarray, wanted: list[int]) -> np.ndarray:
    """Forward kinematics: values [T, channels of all joints] -> where the wanted joints are,
    [T, wanted, 3]."""
    column = np.cumsum([0, *map(len, bvh.channels)])  # the first one of each joint
    still = np.tile([1.0, 0, 0, 0], (len(values), 1))
    turn, place = {-1: still}, {-1: np.zeros(3)}
    for j in sorted({a for joint in wanted for a in line_to_root(joint, bvh.parents)}):
        rotation, shift = still, np.tile(bvh.offsets[j], (len(values), 1))
        for k, channel in enumerate(bvh.channels[j], column[j]):
            axis = "XYZ".index(channel[0])
            if channel.endswith("position"):
                shift[:, axis] = values[:, k]  # in place of the offset
            else:  # each channel turns about the axes that the ones before have left
                about = np.radians(values[:, k, None]) * np.eye(3)[axis]
                rotation = quat_mul(rotation, quat_from_rotvec(about))
        parent = bvh.parents[j]
        shift = np.einsum("nij,nj->ni", quat_to_matrix(turn[parent]), shift)
        turn[j], place[j] = quat_mul(turn[parent], rotation), place[parent] + shift
    return np.stack([place[j] for j in wanted], 1)


# --------------------------------------------------------------------------------------------------
# Which joint is which


def find_joints(names: list[str], parents: list[int], offsets: np.ndarray) -> dict[str, int]:
    """Which joint is which: hips, chest, neck, head, and hip .. wrist with "l " or "r " before.

    Toes may be missing. Raises ValueError, with half a sentence, if anything else is.
    """
    parts = [take_apart(name) for name in names]
    common = Counter(part[0] for part in parts if part)  # most joints have the rig's own prefix
    length = np.linalg.norm(offsets, axis=1)
    apart = length > 1e-3 * np.median(length)  # from what each of them hangs on
    found = {}
    for side, ours in [(s, k) for k in NAMES for s in ("lr" if k in LIMBS else [""])]:
        key = f"{side} {ours}".strip()
        fits = []
        for j, part in enumerate(parts):
            if part and part[1] == side and j not in found.values():
                prefix, _, known, numbers = part
                spelled = (known, known + "".join(map(str, numbers)))
                fits += [(-common[prefix], rank, numbers, j)
                         for rank, name in enumerate(NAMES[ours]) if name in spelled]
        fits = [j for *_, j in sorted(fits)]
        above = found.get(key.replace(ours, ENDS.get(ours, ours)))
        if above is not None:
            hanging = [j for j, parent in enumerate(parents) if parent == above and apart[j]]
            if ours == "toe":  # an end site of an ankle may lie anywhere
                hanging = [j for j in hanging if not names[j].endswith(" end")]
                fits = [j for j in fits if apart[j] and above in line_to_root(j, parents)]
            fits += hanging if len(hanging) == 1 else []
        if fits:
            found[key] = fits[0]

    def meet(*keys: str) -> list[int]:
        """What all of these joints are or hang on, the nearest first."""
        lines = [line_to_root(found.get(key, -1), parents) for key in keys]
        return [j for j in lines[0] if all(j in line for line in lines)]

    # Hips are where the legs part, if no name tells. The chest is where the arms and the neck part,
    # whatever its name; if that is in the place of the neck, then what it hangs on.
    line = line_to_root(found.get("neck", -1), parents)
    chest = [j for j in meet("neck", "l shoulder", "r shoulder")
             if apart[line[: line.index(j)]].any()]
    for key, joints in (("hips", meet("l hip", "r hip")), ("chest", chest)):
        if joints:
            found.setdefault(key, joints[0])
    needed = ["hips", "chest", "neck", "head", *(f"{s} {k}" for s in "lr" for k in LIMBS)]
    if missing := [key for key in needed if key not in found and "toe" not in key]:
        raise ValueError(f"expected joints for {', '.join(missing)}, found only "
                         f"{shown(', '.join(names))}; call them what CMU or Mixamo do")
    return found


def take_apart(name: str) -> tuple[str, str, str, list[int]] | None:
    """The name "Bip01 L Toe0" -> its prefix "bip01", side "l", known name "toe" and numbers [0];
    None if it ends in nothing that is known."""
    words = WORDS.findall(re.split("[:|]", name[:100])[-1])
    words = [word for word in map(str.lower, words) if word not in IDLE]
    side = next((SIDES[word] for word in words if word in SIDES), "")
    words, numbers = [word for word in words if word not in SIDES], []
    while words and words[-1].isdigit():
        numbers.insert(0, int(words.pop()))
    for i in range(len(words)):
        if match := _KNOWN.fullmatch("".join(words[i:])):  # may hold the side, as "lfemur" does
            before, known, after = match.groups()
            return "".join(words[:i]), side or SIDES.get(before or after, ""), known, numbers
    return None


def line_to_root(j: int, parents: list[int]) -> list[int]:
    """A joint and all that it hangs on."""
    line = []
    while j >= 0:
        line.append(j)
        j = parents[j]
    return line
