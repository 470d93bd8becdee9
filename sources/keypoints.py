"""Read 2D keypoints that other programs wrote, and bring them to Human3.6M's 17 joints.

    k = read("alphapose-results.json")      # Keypoints: x_s [N, 17, 2] px, conf [N, 17], tracks

keypoint_files.py knows the files, layouts.py the orders of joints, and tracks.py who is who in a
video. Here it is decided what the numbers mean: the order of the joints, the scale of the scores,
pixels or shares of the image. What is recognised by the file itself is said; what is only likely is
checked; and what is open is asked for, never guessed. docs/data.md lists the formats.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hipart import JOINT_NAMES
from sources.files import shown
from sources.keypoint_files import Found, read_people, reason
from sources.layouts import LARGER, LAYOUTS, is_missing, joint_table, misfit, to_h36m
from sources.tracks import follow

SMALLEST = 8  # px; people smaller than this are not in pixels, but in shares of the image
PROBABLE = 0.3  # the score that a joint needs if scores are probabilities
CLEAR = 1.25  # a misfit from which no other layout needs to fit better


@dataclass
class Keypoints:
    """N people found in a file, in the order of the file, those of a video in the order of time."""

    x_s: np.ndarray  # [N, 17, 2] px
    conf: np.ndarray  # [N, 17], the score of the joint; 0: missing
    name: list[str]  # N names
    track: list[str]  # N; the people of a track follow one another in time; "": single images
    min_score: float = PROBABLE  # a fitting one: joints with less are as good as missing
    said: list[str] = field(default_factory=list)  # what was read and assumed, in sentences


def read(path: Path | str, layout: str = "auto", image_size: tuple[int, int] | None = None
         ) -> Keypoints:
    """Everything in `path`. layout: a key of LAYOUTS, or "auto", as the file says. image_size: px,
    for a file that has shares of the image and not its size. Raises ValueError, with one sentence,
    on what is not understood."""
    path, name = Path(path), shown(path, 4096)
    if not path.exists():
        raise ValueError(f"{name} is not there: give a keypoint file, or a folder of OpenPose's "
                         ".json files")
    try:
        return _understood(name, read_people(path), layout, image_size)
    except Exception as e:  # a broken file can raise nearly anything
        what = reason(e)
        raise ValueError(what if what.startswith(name) else
                         f"{name} could not be read as keypoints: {what}") from e


def _understood(name: str, found: Found, layout: str, image_size) -> Keypoints:
    """What the numbers of a file mean."""
    people, program = found.people, found.program
    if not people:
        raise ValueError("it holds no person; expected at least one with keypoints")
    chosen, assumed = _layout(found, layout)
    points = np.stack([p.points[: len(LAYOUTS[chosen])] for p in people])
    min_score, scale = _scores(points)
    points = np.where(is_missing(points)[..., None], 0.0, points)
    points, unit = _in_pixels(points, np.array([p.size for p in people]), image_size)
    if assumed:
        _check_order(points, chosen, program)
    x_s, conf = to_h36m(points, chosen)
    track = follow(list(points), [p.frame for p in people], [p.id for p in people])
    order = f"{chosen}{', the usual order of this program' * assumed}"
    said = [f"{name}: {program}, {len(people)} poses, {len(set(track) - {''})} tracks, "
            f"joints {order}", *unit, *scale]
    if chosen != "h36m17":
        made = [JOINT_NAMES[j] for j, of in joint_table(chosen).items() if len(of) > 1]
        said.append(f"joints brought from {chosen} to Human3.6M's order; means of others: "
                    f"{', '.join(made)}; these and the hips and the head sit a little elsewhere "
                    "than Human3.6M's, which costs accuracy")
    if chosen == "mediapipe33":
        said.append("of more than two numbers for each landmark, the third is taken as z, which is "
                    "not used, and the fourth as the visibility")
    return Keypoints(x_s, conf, [shown(p.name) for p in people], track, min_score, said)


def _layout(found: Found, asked: str) -> tuple[str, bool]:
    """The layout: what the user asks for, else what the file tells, else what the number of joints
    leaves; and whether nobody has told it."""
    if asked != "auto" and asked not in LAYOUTS:
        raise ValueError(f"--layout must be auto or one of {', '.join(LAYOUTS)}, "
                         f"found {shown(asked)!r}")
    counts = sorted({len(p.points) for p in found.people})
    if len(counts) > 1:
        raise ValueError(f"it ({found.program}) mixes people of "
                         f"{shown(', '.join(map(str, counts)))} joints: expected one kind")
    n = counts[0]
    has = f"it ({found.program}) has {n} joints per person"
    if asked == "auto" and found.unknown:
        raise ValueError(found.unknown)
    known = found.layout if asked == "auto" else asked
    known = known or LARGER.get(n)
    possible = [layout for layout, names in LAYOUTS.items() if len(names) == n]
    if known is None and not possible:
        each = ", ".join(f"{len(names)} ({layout})" for layout, names in LAYOUTS.items())
        raise ValueError(f"{has}: expected one of {each}")
    if known is None and len(possible) > 1:
        points = np.stack([p.points for p in found.people])
        likely = [layout for layout in possible if misfit(points, layout) < 1]
        hint = f"; {' and '.join(likely)} would fit these poses" if likely else ""
        raise ValueError(f"{has}, which may be {', '.join(possible[:-1])} or {possible[-1]}: say "
                         f"which with --layout{hint}")
    known = known or possible[0]
    k = len(LAYOUTS[known])
    if n != k and LARGER.get(n) != known:
        raise ValueError(f"{has}, and {known} has {k}: choose another --layout")
    return known, asked == "auto" and (found.assumed or found.layout is None)


def _check_order(points: np.ndarray, layout: str, program: str) -> None:
    """An order that is only assumed must give bodies. ValueError if it clearly does not."""
    bad = misfit(points, layout)
    better = {other: misfit(points, other) for other, names in LAYOUTS.items()
              if len(names) == points.shape[1] and other != layout}
    better = [other for other, value in better.items() if value < min(1, 0.8 * bad)]
    if bad > 1 and (better or bad > CLEAR):
        hint = (f"{' and '.join(better)} would fit" if better else
                "no other order fits better, and y may point up in this file")
        raise ValueError(f"its people do not look like people in {layout}, the usual order of "
                         f"{program}: {hint}; say the order with --layout")


def _scores(points: np.ndarray) -> tuple[float, list[str]]:
    """The score that a joint needs to count as seen, by the scale of all scores, and what was
    assumed, in words. Scores that are COCO's v, 0, 1 or 2, keep their meaning: 0 is missing."""
    there = ~is_missing(np.concatenate([points[..., :2], np.ones_like(points[..., :1])], -1))
    score = points[..., 2][there]
    if len(score) and (score == 0).all():
        raise ValueError("all its scores are 0, so that every joint counts as missing: write 1 "
                         "for the joints that are there, or leave the scores out")
    if len(score) and np.mean(score < 0) > 0.2:
        raise ValueError("many of its scores are below 0, so they are no scores: leave the third "
                         "column out")
    score = score[np.isfinite(score) & (score > 0)]
    # One in ten may be odd.
    large, median = np.quantile(score, (0.9, 0.5)) if len(score) else (1.0, 1.0)
    if 0.5 <= large <= 1.05 or np.isin(score, (1, 2)).all():
        return PROBABLE, []
    scale, least = ("percent", 100 * PROBABLE) if median > 10 and large <= 100 else (
        "heights of peaks in heat maps", float(median) / 10)
    return least, [f"scores go up to {score.max():.3g}, with a median of {median:.2g}, so they are "
                   f"taken as {scale}: joints below {least:.2g} count as missing"]


def _in_pixels(points: np.ndarray, sizes: np.ndarray, image_size) -> tuple[np.ndarray, list[str]]:
    """points in pixels, and what was done. They may be shares of the image, whose size [N, 2] is
    then needed."""
    visible = [p[p[:, 2] > 0, :2] for p in points]
    extent = [np.ptp(xy, 0).max() for xy in visible if len(xy) > 1]
    if not extent or np.median(extent) >= SMALLEST:
        return points, ["the file has pixels: --image-size is not used"] * bool(image_size)
    middle = np.median(np.concatenate(visible), 0)
    if not ((middle > 0) & (middle < 1)).all():
        raise ValueError(f"it shows people {np.median(extent):.3g} px large round {middle[0]:.3g}, "
                         f"{middle[1]:.3g}: expected pixels, or shares of the image from 0 to 1")
    sizes = np.where(sizes > 0, sizes, image_size or 0)
    if (sizes <= 0).any():
        raise ValueError(f"it shows people {np.median(extent):.3g} px large, which look normalised "
                         "to shares of the image: say its size with --image-size W H")
    scaled = points.copy()
    scaled[..., :2] *= sizes[:, None]
    return scaled, ["coordinates are taken as shares of the image"]
