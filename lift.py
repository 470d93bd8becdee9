"""Lift your own 2D keypoints: dense and fine 2D poses, 3D poses, pictures.

    python lift.py people.json --name quick               # people in single images
    python lift.py FOLDER --image-size 1920 1080          # a video, as OpenPose writes it
    python lift.py examples/wave.json --image-size 1000 1000

sources/keypoints.py lists the formats and layouts that are read. Needs a run with all three stages.
What comes out lies in runs/NAME/keypoints/STEM: poses.npz with all numbers, a picture for every
person in a single image, an animation for every track.
"""

import argparse
import math
import re
import shutil
from collections import defaultdict
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import PillowWriter
from torch import nn
from tqdm import tqdm

from checkpoints import stop
from evaluate import open_run, trained_on_own_data
from hipart import J_D, HiPART, J, R
from sample import PART_COLOURS, SIDE, bones, frame, solid
from sources import keypoints
from sources.keypoints import Keypoints
from train import lift, lifter_input, load_hipart, load_lifter, next_command

FEWEST = 6  # joints of a person; who shows fewer is left out
STANDING = 0.36  # standing height of a person in the training images, as a share of the image
PICTURES, FRAMES = 50, 120  # people of single images that get a picture; frames of an animation
# Bones as shares of standing height (Winter 2009, Biomechanics and Motor Control of Human Movement)
SHARES = {
    (1, 2): 0.245, (4, 5): 0.245, (2, 3): 0.246, (5, 6): 0.246, (11, 12): 0.186, (14, 15): 0.186,
    (12, 13): 0.146, (15, 16): 0.146, (0, 8): 0.288,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# From a file to what the models know: a square image with a person of the usual size


def keep_confident(k: Keypoints, min_score: float) -> tuple[Keypoints, list[str]]:
    """Joints below min_score become missing, and people with too few joints are left out; what was
    done, in words. ValueError if nobody is left."""
    conf = np.where(k.conf < min_score, 0, k.conf)
    rows = np.flatnonzero((conf > 0).sum(1) >= FEWEST)
    if not len(rows):
        raise ValueError(f"none of {len(k.name)} people has {FEWEST} joints with a score of at "
                         f"least {min_score:g}: lower --min-score")
    conf, said = conf[rows], list(k.said)
    if len(rows) < len(k.name):
        left_out = len(k.name) - len(rows)
        said.append(f"{left_out} people with fewer than {FEWEST} joints left out")
    said.append(f"{int((conf == 0).sum())} of {conf.size} joints are missing "
                f"(score below {min_score:g})")
    x_s = k.x_s[rows] * (conf > 0)[..., None]
    name, track = ([texts[i] for i in rows] for texts in (k.name, k.track))
    return Keypoints(x_s, conf, name, track, k.size[rows]), said


def standing_height(k: Keypoints) -> np.ndarray:
    """Roughly how tall each person would stand, [N] px: what the second longest bone says, since
    most bones are foreshortened and one may be wrong. A whole track has one height."""
    estimates = []
    for (a, b), share in SHARES.items():
        visible = (k.conf[:, a] > 0) & (k.conf[:, b] > 0)
        length = np.linalg.norm(k.x_s[:, a] - k.x_s[:, b], axis=1)
        estimates.append(np.where(visible, length / share, 0.0))
    height = np.sort(np.stack(estimates, 1), 1)[:, -2]
    box = np.stack([np.ptp(x[c > 0], 0).max() for x, c in zip(k.x_s, k.conf, strict=True)])
    height = np.maximum(np.where(height > 0, height, box), 1.0)
    tracks = np.array(k.track)
    for track in set(k.track) - {""}:
        height[tracks == track] = np.median(height[tracks == track])
    return height


def square_around(k: Keypoints, image_size: tuple[int, int] | None
                  ) -> tuple[np.ndarray, np.ndarray, str]:
    """The square image in which each person is seen: centre [N, 2] and side [N] in pixels, and
    what was done, in words.

    The models know square images in which a standing person takes about a third of the height. An
    image of known size is padded to a square. Where the size is unknown, a square is put around
    the person such that the usual share comes out.
    """
    size, height = np.where(k.size > 0, k.size, image_size or 0), standing_height(k)
    low, high = (np.stack([end(x[c > 0], 0) for x, c in zip(k.x_s, k.conf, strict=True)])
                 for end in (np.min, np.max))
    known = (size > 0).all(1)
    side = np.where(known, size.max(1), height / STANDING)
    said = (f"{int(known.sum())} poses in images of known size, {int((~known).sum())} with a "
            "square put around the person")
    share = np.median(height[known] / side[known]) if known.any() else STANDING
    if not 0.15 <= share <= 0.7:
        said += (f"; standing, the person would take {share:.0%} of the image, far from the "
                 f"{STANDING:.0%} that training shows: without the image's size it may do better")
    return np.where(known[:, None], size / 2, (low + high) / 2), side, said


# --------------------------------------------------------------------------------------------------
# Densify and lift


@torch.no_grad()
def lift_keypoints(k: Keypoints, centre: np.ndarray, side: np.ndarray, hipart: HiPART,
                   lifter: nn.Module, device: torch.device) -> dict[str, np.ndarray]:
    """People in squares of that centre [N, 2] and side [N] -> x_s [N, 17, 2], x_d [N, 48, 2] and
    x_f [N, 96, 2] px, conf [N, 17], and y [N, 17, 3] mm relative to the pelvis."""
    middle = torch.from_numpy(centre[:, None]).float().to(device)
    half = torch.from_numpy(side[:, None, None] / 2).float().to(device)
    conf = torch.from_numpy(k.conf).to(device)
    x_s = (torch.from_numpy(k.x_s).to(device) - middle) / half * (conf > 0)[..., None]
    x, y = [], []
    parts = zip(x_s.split(512), conf.split(512), strict=True)
    for some, c in tqdm(parts, "people, by 512", math.ceil(len(x_s) / 512), leave=False):
        x.append(lifter_input("generated", dict(x_s=some, conf=c), hipart, None))
        y.append(lift(lifter, x[-1], c))
    px = (torch.cat(x) * half + middle).cpu().numpy()
    return dict(x_s=k.x_s, conf=k.conf, x_d=px[:, J : J + J_D], x_f=px[:, J + J_D :],
                y=torch.cat(y).cpu().numpy())


# --------------------------------------------------------------------------------------------------
# Pictures


def draw_person(axes, p: dict, i: int, box: np.ndarray, reach: np.ndarray) -> None:
    """The 2D levels over one another on the left, 3D on the right. box [n, 2] px and reach [m, 3]
    mm set the limits."""
    left, right = axes
    left.clear(), right.clear()
    visible = p["conf"][i] > 0
    bones(left, p["x_s"][i], visible, lw=2, alpha=0.6)
    left.scatter(*p["x_s"][i][visible].T, c=np.array(SIDE)[visible], s=34, zorder=3)
    left.scatter(*p["x_d"][i].T, s=26, facecolor="none", edgecolor=np.repeat(PART_COLOURS, R),
                 zorder=4)
    left.scatter(*p["x_f"][i].T, s=7, c=np.repeat(PART_COLOURS, 2 * R), zorder=5)
    frame(left, box)
    left.set_title(f"{visible.sum()} of 17 joints, 48 dense (rings), 96 fine (dots)",
                   fontsize=11)
    solid(right, p["y"][i], None, reach)
    right.set_title("3D, from the side of the camera", fontsize=11)


def new_figure():
    """A figure with a flat and a solid panel."""
    fig = plt.figure(figsize=(9, 4.6), layout="constrained")
    return fig, (fig.add_subplot(1, 2, 1), fig.add_subplot(1, 2, 2, projection="3d"))


def draw_picture(path: Path, p: dict, i: int, title: str) -> None:
    """A person of a single image."""
    fig, axes = new_figure()
    box = np.concatenate([p["x_f"][i], p["x_s"][i][p["conf"][i] > 0]])
    draw_person(axes, p, i, box, p["y"][i])
    fig.suptitle(title, parse_math=False)  # a title from a file is text, whatever it holds
    fig.savefig(path, dpi=100)
    plt.close(fig)


def draw_animation(path: Path, p: dict, rows: list[int], titles: list[str]) -> None:
    """A track, with the same limits in all frames."""
    box, reach = p["x_f"][rows].reshape(-1, 2), p["y"][rows].reshape(-1, 3)
    fig, axes = new_figure()
    writer = PillowWriter(fps=15)
    with writer.saving(fig, path, dpi=80):
        for i in tqdm(rows, path.stem, leave=False):
            draw_person(axes, p, i, box, reach)
            fig.suptitle(titles[i], parse_math=False)
            writer.grab_frame()
    plt.close(fig)


def draw_keypoints(folder: Path, k: Keypoints, p: dict) -> list[str]:
    """A picture of every person in a single image, and an animation of every track; what was left
    out, in words."""
    tracks, taken, said = defaultdict(list), set(), []
    for i, track in enumerate(k.track):
        tracks[track].append(i)
    single = [i for track, rows in tracks.items() if not track or len(rows) == 1 for i in rows]
    if len(single) > PICTURES:
        said.append(f"the first {PICTURES} of {len(single)} single people are drawn")
    for i in tqdm(single[:PICTURES], "pictures", leave=False):
        draw_picture(folder / f"{free_name(k.name[i], taken)}.png", p, i, k.name[i])
    for track, rows in tracks.items():
        if track and len(rows) > 1:
            shown = rows[:: math.ceil(len(rows) / FRAMES)]
            if len(shown) < len(rows):
                said.append(f"track {track}: {len(shown)} of {len(rows)} frames are drawn")
            draw_animation(folder / f"{free_name(f'track_{track}', taken)}.gif", p, shown, k.name)
    return said


def free_name(text: str, taken: set[str]) -> str:
    """A file name made of a text from a file, unlike those that are taken; it is added to them."""
    name = free = re.sub(r"[^\w.-]+", "_", text)
    while free in taken:
        free = f"{name}_{len(taken)}"
    taken.add(free)
    return free


# --------------------------------------------------------------------------------------------------


def main() -> None:
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("keypoints", help="a file, or a folder of OpenPose's .json files")
    a.add_argument("--name", default="standard", help="the run, runs/NAME")
    a.add_argument("--layout", default="auto", choices=("auto", *keypoints.LAYOUTS),
                   help="the order of the joints; auto: as the file says")
    a.add_argument("--image-size", type=int, nargs=2, metavar=("W", "H"),
                   help="if the file does not know it")
    a.add_argument("--min-score", type=float, default=0.3,
                   help="joints with less are taken as missing")
    a.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    args = a.parse_args()
    if args.image_size and min(args.image_size) < 1:
        w, h = args.image_size
        stop(f"--image-size needs a width and a height of at least 1, found {w} {h}")
    run, stages = open_run(args.name, args.device, stage_3=["stage3_generated_0"])
    if stages < 3:
        command = next_command(trained_on_own_data(run), stages + 1)
        stop(f"{run.path} has {stages} of the three stages that lifting needs: go on with "
             f"`{command}`")
    path = Path(args.keypoints).resolve()
    try:
        k, said = keep_confident(keypoints.read(path, args.layout), args.min_score)
    except ValueError as e:
        stop(str(e) if str(e).startswith(str(path)) else f"{path}: {e}")
    centre, side, squared = square_around(k, args.image_size)
    print("\n".join([*said, squared]))
    p = lift_keypoints(k, centre, side, load_hipart(run), load_lifter(run, "generated"), run.device)

    # Made beside and renamed, all at once: what was there before is replaced as a whole.
    folder = run.path / "keypoints" / path.stem
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    np.savez_compressed(beside / "poses.npz", **p, name=np.array(k.name), track=np.array(k.track))
    said = draw_keypoints(beside, k, p)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    print("\n".join([*said, *map(str, sorted(folder.iterdir()))]))


if __name__ == "__main__":
    main()
