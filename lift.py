"""Lift your own 2D keypoints: dense and fine 2D poses, 3D poses, pictures.

    python lift.py people.json --name quick     # people in single images
    python lift.py FOLDER                       # a video, as OpenPose writes it
    python lift.py examples/wave.json

docs/data.md lists the formats that are read. Without --name, runs/standard is taken, or else the
models in weights/. What comes out lies in a folder under runs/NAME/keypoints that has the name of
the file: poses.npz with all numbers, pictures of people in single images, animations of tracks.

Beside the one answer, HYPOTHESES others are drawn for each person, at the temperature that
hypotheses.py has found for the run (1, if it has not been run). How far they lie apart tells how
sure each dense and fine point is. Where a joint is missing or doubtful, the pictures show three.
"""

import argparse
import math
import os
import shutil
import signal
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while modules are imported says nothing
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import PillowWriter
from torch import nn
from tqdm import tqdm

from evaluate import open_run, trained_on_own_data
from hipart import J_D, HiPART, J, R
from hypotheses import best_temperature
from sample import PART_COLOURS, SIDE, bones, frame, solid
from sources.files import safe_name, shown
from sources.keypoints import PROBABLE, Keypoints, read
from sources.layouts import LAYOUTS
from survival import Watch, locked, stop
from tables import LOW_CONF
from train import lift, lifter_input, load_hipart, load_lifter, next_command

FEWEST = 6  # joints of a person; who shows fewer is left out
STANDING = 0.343  # what standing_height says of training images, in the median, as a share of them
AROUND = 15  # frames before and after one that tell the size of a person in a track
HYPOTHESES = 5  # of each person: they take five times as long as the one answer
SHOWN = ("#009E73", "#CC79A7", "#E69F00")  # colours of the first of them
PICTURES = 50  # of single people
ANIMATIONS, FRAMES = 5, 120  # of tracks, and frames of each
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
        could = ((k.conf > 0).sum(1) >= FEWEST).any()
        raise ValueError(f"none of {len(k.name)} people has {FEWEST} joints that are seen" + (
            f" with a score of at least {min_score:g}: lower --min-score" if could else ""))
    conf, said = conf[rows], list(k.said)
    if len(rows) < len(k.name):
        left_out = len(k.name) - len(rows)
        said.append(f"{left_out} people with fewer than {FEWEST} joints left out")
    said.append(f"{int((conf == 0).sum())} of {conf.size} joints are missing "
                f"(score below {min_score:g})")
    x_s = k.x_s[rows] * (conf > 0)[..., None]
    name, track = ([texts[i] for i in rows] for texts in (k.name, k.track))
    return Keypoints(x_s, conf, name, track, min_score), said


def standing_height(k: Keypoints) -> np.ndarray:
    """Roughly how tall each person would stand, [N] px, from the longest bones, since most bones
    are foreshortened. A wrong joint makes two of them wrong, so it is the third longest that says
    so, if six or more are seen, and the second of three or more. In a track it is the median over
    the frames around, so that a person may come nearer."""
    estimates = []
    for (a, b), share in SHARES.items():
        visible = (k.conf[:, a] > 0) & (k.conf[:, b] > 0)
        length = np.linalg.norm(k.x_s[:, a] - k.x_s[:, b], axis=1)
        estimates.append(np.where(visible, length / share, 0.0))
    estimates = np.sort(np.stack(estimates, 1), 1)
    seen = (estimates > 0).sum(1)
    height = estimates[np.arange(len(seen)), -1 - (seen >= 3) - (seen >= 6)]
    box = np.stack([np.ptp(x[c > 0], 0).max() for x, c in zip(k.x_s, k.conf, strict=True)])
    height = np.maximum(np.where(height > 0, height, box), 1.0)
    for track, rows in rows_of_tracks(k).items():
        if track:
            around = np.pad(height[rows], AROUND, mode="edge")
            windows = np.lib.stride_tricks.sliding_window_view(around, 2 * AROUND + 1)
            height[rows] = np.median(windows, 1)
    return height


def rows_of_tracks(k: Keypoints) -> dict[str, list[int]]:
    """The people of each track, in time; those of single images under ""."""
    tracks = defaultdict(list)
    for i, track in enumerate(k.track):
        tracks[track].append(i)
    return tracks


def square_around(k: Keypoints) -> tuple[np.ndarray, np.ndarray]:
    """The square in which each person is seen: centre [N, 2] and side [N] in pixels.

    The models know square images in which a standing person takes about a third of the height. So a
    camera is made up that looks at the person, from where they have that size: whether they fill
    the photo or are far away, they come out alike. The size of the photo plays no part.
    """
    low, high = (np.stack([end(x[c > 0], 0) for x, c in zip(k.x_s, k.conf, strict=True)])
                 for end in (np.min, np.max))
    return (low + high) / 2, standing_height(k) / STANDING


# --------------------------------------------------------------------------------------------------
# Densify and lift


@torch.no_grad()
def lift_keypoints(k: Keypoints, centre: np.ndarray, side: np.ndarray, hipart: HiPART,
                   lifter: nn.Module, device: torch.device, temperature: float = 1.0
                   ) -> dict[str, np.ndarray]:
    """People in squares of that centre [N, 2] and side [N] -> x_s [N, 17, 2], x_d [N, 48, 2] and
    x_f [N, 96, 2] px, conf [N, 17], and y [N, 17, 3] mm relative to the pelvis.

    spread_d [N, 48] and spread_f [N, 96] px are the mean distances of a point in the hypotheses to
    its mean; the first hypotheses are others_f [N, 3, 96, 2] px and others_y [N, 3, 17, 3] mm.
    doubtful [N]: whether a joint is missing or has a low score.
    """
    middle = torch.from_numpy(centre[:, None]).float().to(device)
    half = torch.from_numpy(side[:, None, None] / 2).float().to(device)
    conf = torch.from_numpy(k.conf).to(device)
    x_s = (torch.from_numpy(k.x_s).to(device) - middle) / half * (conf > 0)[..., None]
    x, y, apart, others, others_y = [], [], [], [], []
    generator, n = torch.Generator(device).manual_seed(0), len(SHOWN)
    parts = zip(x_s.split(512), conf.split(512), strict=True)
    for some, c in tqdm(parts, "people, by 512", math.ceil(len(x_s) / 512), leave=False):
        x.append(lifter_input("generated", dict(x_s=some, conf=c), hipart, None))
        y.append(lift(lifter, x[-1], c))
        x_d, x_f, _ = hipart.sample(some, c, HYPOTHESES, temperature, generator=generator)
        points = torch.cat([x_d, x_f], 2)  # [B, HYPOTHESES, 144, 2]
        apart.append((points - points.mean(1, keepdim=True)).norm(dim=-1).mean(1))
        others.append(x_f[:, :n])
        given = torch.cat([some[:, None].expand(-1, n, -1, -1), points[:, :n]], 2).flatten(0, 1)
        others_y.append(lift(lifter, given, c.repeat_interleave(n, 0)).unflatten(0, (-1, n)))
    px, spread = torch.cat(x) * half + middle, torch.cat(apart) * half[:, 0]
    others = torch.cat(others) * half[:, None] + middle[:, None]
    found = dict(x_d=px[:, J : J + J_D], x_f=px[:, J + J_D :], y=torch.cat(y),
                 spread_d=spread[:, :J_D], spread_f=spread[:, J_D:], others_f=others,
                 others_y=torch.cat(others_y))
    # min_score tells the scale of the scores.
    doubtful = (k.conf <= max(0, k.min_score) * LOW_CONF / PROBABLE).any(1)
    return dict(x_s=k.x_s, conf=k.conf, doubtful=doubtful,
                **{name: value.cpu().numpy() for name, value in found.items()})


# --------------------------------------------------------------------------------------------------
# Pictures


def draw_person(axes, p: dict, i: int, box: np.ndarray, reach: np.ndarray) -> None:
    """The 2D levels over one another on the left, 3D on the right, and thin beneath them other
    hypotheses, if a joint is missing or doubtful. box [n, 2] px and reach [m, 3] mm set the
    limits."""
    left, right = axes
    left.clear(), right.clear()
    visible = p["conf"][i] > 0
    bones(left, p["x_s"][i], visible, lw=2, alpha=0.6)
    left.scatter(*p["x_s"][i][visible].T, c=np.array(SIDE)[visible], s=34, zorder=3)
    left.scatter(*p["x_d"][i].T, s=26, facecolor="none", edgecolor=np.repeat(PART_COLOURS, R),
                 zorder=4)
    left.scatter(*p["x_f"][i].T, s=7, c=np.repeat(PART_COLOURS, 2 * R), zorder=5)
    others = dict(zip(SHOWN, p["others_y"][i], strict=True)) if p["doubtful"][i] else {}
    for colour, x in zip(others, p["others_f"][i], strict=False):
        left.scatter(*x.T, s=3, c=colour, zorder=2)
    frame(left, box)
    left.set_title(f"{visible.sum()} of 17 joints, 48 dense (rings), 96 fine (dots)",
                   fontsize=11)
    solid(right, p["y"][i], None, reach, others)
    right.set_title("3D, from the side of the camera"
                    + f"; thin: {len(others)} other hypotheses" * bool(others), fontsize=11)


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
    """Pictures of people in single images, and animations of the longest tracks; what was left out,
    in words."""
    tracks, taken, said = rows_of_tracks(k), set(), []
    single = [i for track, rows in tracks.items() if not track or len(rows) == 1 for i in rows]
    moving = [track for track, rows in tracks.items() if track and len(rows) > 1]
    moving.sort(key=lambda track: -len(tracks[track]))
    for what, all_of_them, most in (("single people", single, PICTURES),
                                    ("tracks, the longest,", moving, ANIMATIONS)):
        if len(all_of_them) > most:
            said.append(f"{most} of {len(all_of_them)} {what} are drawn; poses.npz has all")

    def free(text: str, ending: str) -> Path:
        name = safe_name(text, taken)
        taken.add(name)
        return folder / (name + ending)

    for i in tqdm(single[:PICTURES], "pictures", leave=False):
        draw_picture(free(k.name[i], ".png"), p, i, k.name[i])
    for track in tqdm(moving[:ANIMATIONS], "animations", leave=False):
        rows = tracks[track]
        some = rows[:: math.ceil(len(rows) / FRAMES)]
        if len(some) < len(rows):
            said.append(f"track {shown(track)}: {len(some)} of {len(rows)} frames are drawn")
        draw_animation(free(f"track_{track}", ".gif"), p, some, k.name)
    return said


# --------------------------------------------------------------------------------------------------
# The folder of the results


@contextmanager
def new_folder(parent: Path) -> Iterator[Path]:
    """An empty folder to work in, below `parent`; it is gone in the end. What killed processes have
    left there goes at once: it is locked no more."""
    with ExitStack() as held:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with locked(parent):
                for left in parent.glob(".new.*"):
                    with suppress(OSError), locked(left, wait=False) as ours:  # it may just go
                        if ours:
                            shutil.rmtree(left, ignore_errors=True)
                folder = Path(tempfile.mkdtemp(prefix=".new.", dir=parent))
                held.callback(shutil.rmtree, folder, ignore_errors=True)
                held.enter_context(locked(folder))
        except OSError as e:
            stop(f"{parent} cannot be written to ({e.strerror}): mend that, or use another run")
        yield folder


def put_in_place(made: Path, parent: Path, stem: str, source: str) -> Path:
    """Give the finished folder `made` its name -> where it is now.

    The results of an earlier call for the same file are replaced. Anything else stays: what another
    file, or a person, has put there is never touched, and the name gets a number.
    """
    taken = set()
    while True:
        folder = parent / safe_name(stem, taken)
        if not os.path.lexists(folder):
            made.rename(folder)
            return folder
        if is_made_from(folder, source):
            old = made.with_name("old")
            folder.rename(old)
            try:
                made.rename(folder)
            except BaseException:
                old.rename(folder)
                raise
            return folder
        taken.add(folder.name)


def is_made_from(folder: Path, source: str) -> bool:
    """Whether a folder is this script's work on that file, and nothing else lies in it."""
    if folder.is_symlink() or not (folder / "poses.npz").is_file():
        return False
    try:
        with np.load(folder / "poses.npz", allow_pickle=False) as z:
            return z["source"] == source and set(z["made"]) == {f.name for f in folder.iterdir()}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def main() -> None:
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("keypoints", help="a file, or a folder with one for every image")
    a.add_argument("--name", help="the run, runs/NAME; default: standard, or without such a run "
                   "the models that come with the project")
    a.add_argument("--layout", default="auto", choices=("auto", *LAYOUTS),
                   help="the order of the joints; auto: as the file says")
    a.add_argument("--image-size", type=int, nargs=2, metavar=("W", "H"),
                   help="px, for a file with shares of the image in the place of pixels")
    a.add_argument("--min-score", type=float,
                   help="joints with less are taken as missing; default: 0.3, or what fits the "
                   "scale of the scores")
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
    path = Path(args.keypoints).absolute()
    source = shown(path, 4096)
    try:
        k = read(path, args.layout, args.image_size)
        k, said = keep_confident(k, k.min_score if args.min_score is None else args.min_score)
    except ValueError as e:
        stop(str(e) if str(e).startswith(source) else f"{source}: {e}")
    print("\n".join(said))
    hipart, lifter = load_hipart(run), load_lifter(run, "generated")
    p = lift_keypoints(k, *square_around(k), hipart, lifter, run.device, best_temperature(run))

    parent = Path("runs", run.path.name, "keypoints")
    with new_folder(parent) as temporary:
        made = temporary / "new"
        made.mkdir()
        said = draw_keypoints(made, k, p)
        files = [f.name for f in made.iterdir()] + ["poses.npz"]
        np.savez_compressed(made / "poses.npz", **p, name=np.array(k.name),
                            track=np.array(k.track), source=source, made=files)
        stem = path.name if path.is_dir() else path.stem
        with locked(parent):
            folder = put_in_place(made, parent, stem, source)
    print("\n".join([*said, *map(str, sorted(folder.iterdir()))]))


if __name__ == "__main__":
    with Watch().listening():
        main()
