"""Draw what a run does: densified 2D poses, lifted 3D poses, its codebooks, and what single tokens stand for.

    python sample.py                              # runs/standard on data/demo, test split
    python sample.py --name quick --split unseen --n 6
    python sample.py --tokens random --without no_local      # Fig. 14, beside runs/no_local (`--lambda_l 0`)
    python sample.py --keypoints FILE_OR_FOLDER              # your own 2D keypoints (keypoints.py lists the formats)

Writes PNG files to runs/NAME/figures, and what it makes of your keypoints to runs/NAME/keypoints; needs no display.

    overview.png      one occluded person: detection -> 48 dense -> 96 fine points -> 3D
    poses_random.png  random samples, poses_worst.png the worst of the pool           Fig. 2, 13, 15
    similarity.png    cosine similarity of the codes, and of parts                    Fig. 7, 14
    swap.png          what moves when one token is swapped                            Fig. 8
"""

import argparse
import math
import os
import re
import shutil
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import keypoints
from evaluate import alignment, mpjpe, open_run
from hipart import (
    J_D,
    J_S,
    JOINT_NAMES,
    LEFT,
    MSST,
    PARENTS,
    PART_JOINT,
    RIGHT,
    SCALE,
    Config,
    HiPART,
    J,
    R,
    detected_pelvis,
    from_model_frame,
    to_model_frame,
    to_pixels,
)
from keypoints import Keypoints
from train import Split, feed, load_checkpoint, load_finished, load_hipart, new_lifter, stop

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.animation import PillowWriter  # noqa: E402
from matplotlib.collections import LineCollection  # noqa: E402

POOL = 1000  # random samples of the split, from which the figures choose
BLUE, ORANGE, DARK, LIGHT, RING = "#0072B2", "#D55E00", "#444444", "#BBBBBB", "#CC79A7"  # Okabe-Ito and greys
SIDE = [BLUE if j in LEFT else ORANGE if j in RIGHT else DARK for j in range(J)]  # colour of each joint
PART_COLOURS = [SIDE[j] for j in PART_JOINT]
PART_NAMES = [JOINT_NAMES[j] for j in PART_JOINT]


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@torch.no_grad()
def predict(split: Split, hipart: HiPART, lifter, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Densify and lift samples `rows` of a split: pixels and millimetres.

    x_s [n, 17, 2] as detected, conf [n, 17], x_d [n, 48, 2] and x_f [n, 96, 2] generated, y [n, 17, 3] predicted; the
    truth of each with `true_` before its name; px [n] error of the fine points, mm [n] MPJPE, action [n].
    """
    block, clean = split.read(rows), split.read(rows, clean=True)
    x = feed("generated", block, hipart, None)
    y = torch.cat([lifter(*p) for p in zip(x.split(1024), block["conf"].split(1024), strict=True)])
    out = dict(x_s=x[:, :J], x_d=x[:, J : J + J_D], x_f=x[:, J + J_D :])
    out |= {f"true_{k}": clean[k] for k in ("x_s", "x_d", "x_f")}
    out = {k: to_pixels(v, split.w, split.h) for k, v in out.items()} | dict(y=y, true_y=block["y"])
    out = {k: v.cpu().numpy() for k, v in (out | {k: block[k] for k in ("conf", "action")}).items()}
    height = block["height_px"].cpu().numpy()
    for level in "sdf":
        error = np.linalg.norm(out[f"x_{level}"] - out[f"true_x_{level}"], axis=-1)
        seen = out["conf"] > 0 if level == "s" else np.ones_like(error, bool)
        out[f"px_{level}"] = (error * seen).sum(1) / seen.sum(1)
    return out | dict(mm=mpjpe(out["y"], out["true_y"]), percent=out["px_f"] / height * 100)


@torch.no_grad()
def swaps(msst: MSST, x_f: Tensor) -> tuple[np.ndarray, dict]:
    """Swap one token of true poses x_f [n, 96, 2] (model frame) for the one that the next pose has in its place.

    Returns moved [2, n, 16, 16]: how far the fine points of part k (last axis) move when a sparse token (first axis 0) or
    the first dense token (1) of part i is swapped; and poses {"kept" or (level, i): [n, 96, 2]}. All in the model frame.
    """
    q_s, q_d = msst.encode(x_f)
    poses = {"kept": msst.decode(q_s, q_d)[1]}
    for level, q in enumerate((q_s, q_d)):
        for i in range(J_S):
            at, new = i * (1, R)[level], q.clone()
            new[:, at] = q[:, at].roll(1)
            poses[level, i] = msst.decode(*((new, q_d) if level == 0 else (q_s, new)))[1]
    moved = [[(poses[level, i] - poses["kept"]).norm(dim=-1).unflatten(1, (J_S, -1)).mean(2) for i in range(J_S)]
             for level in (0, 1)]  # each [n, 16]
    moved = torch.stack([torch.stack(m, 1) for m in moved])
    return moved.cpu().numpy(), {k: v.cpu().numpy() for k, v in poses.items()}


@torch.no_grad()
def similarities(msst: MSST, x_f: Tensor, tokens: str) -> dict:
    """Cosine similarities: among 100 sparse codes, among 100 dense codes and across (the paper's Fig. 7), and of parts of
    true poses x_f (model frame): sparse embedding of part i (row) with the mean dense embedding of part k, [16, 16]."""
    codes = []
    for quantizer in (msst.Q_s, msst.Q_d):
        C = F.normalize(quantizer.codebook, dim=-1).cpu()
        order = torch.randperm(len(C), generator=torch.Generator().manual_seed(0)) if tokens == "random" else slice(None)
        codes.append(C[order][:100])
    o = msst(x_f)
    part = F.normalize(o["zh_d"].unflatten(1, (J_S, R)).mean(2), dim=-1)
    parts = (F.normalize(o["zh_s"], dim=-1) @ part.transpose(1, 2)).mean(0)  # [16, 16]
    C_s, C_d = codes
    return dict(sparse=(C_s @ C_s.T).numpy(), dense=(C_d @ C_d.T).numpy(), across=(C_d @ C_s.T).numpy(),
                parts=parts.cpu().numpy(), alignment=float(alignment(o["zh_s"], o["zh_d"]).mean()))


# ----------------------------------------------------------------------------------------------------------------------
# Pieces of pictures


def bones(ax, x: np.ndarray, seen=None, colours=SIDE, **style) -> None:
    """Skeleton x [17, 2 or 3]; bones with an unseen end are left out."""
    for j in range(1, J):
        if seen is None or (seen[j] and seen[PARENTS[j]]):
            colour = colours[j] if isinstance(colours, list) else colours
            ax.plot(*zip(x[PARENTS[j]], x[j], strict=True), color=colour, **style)


def detection(ax, p: dict, i: int) -> None:
    """What the detector gave, over the true skeleton; rings where it gave nothing."""
    seen = p["conf"][i] > 0
    bones(ax, p["true_x_s"][i], colours=LIGHT, lw=5, solid_capstyle="round")
    bones(ax, p["x_s"][i], seen, lw=2)
    ax.scatter(*p["x_s"][i][seen].T, c=np.array(SIDE)[seen], s=22, zorder=3)
    ax.scatter(*p["true_x_s"][i][~seen].T, s=130, facecolor="none", edgecolor=RING, lw=2.2, zorder=4)


def points(ax, x: np.ndarray, true: np.ndarray) -> None:
    """Generated points, by side of the body; grey rings: the true ones, each tied to its own."""
    ax.add_collection(LineCollection(np.stack([x, true], 1), colors=LIGHT, lw=1, zorder=1))
    ax.scatter(*true.T, s=22, facecolor="none", edgecolor="#888888", lw=0.9, zorder=2)
    ax.scatter(*x.T, s=13, c=np.repeat(PART_COLOURS, len(x) // J_S), zorder=3)


def flat(ax, p: dict, i: int) -> None:
    """Image axes (y down), equal scale, all panels of a sample alike."""
    x = np.concatenate([p["true_x_f"][i], p["true_x_s"][i], p["x_f"][i]])
    middle, half = (x.max(0) + x.min(0)) / 2, 0.55 * np.ptp(x, 0).max()
    ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] + half, middle[1] - half), aspect="equal")
    ax.set_xticks([]), ax.set_yticks([])


def solid(ax, y: np.ndarray, under: np.ndarray | None, box: np.ndarray) -> None:
    """Skeleton y [17, 3] mm (camera frame: x right, y down, z forward) standing upright, seen from 50 degrees to the side
    of the camera; `under` in grey below it; `box` [n, 3] sets the limits."""

    def upright(a):
        return np.stack([a[:, 0], a[:, 2], -a[:, 1]], 1)

    if under is not None:
        bones(ax, upright(under), colours=LIGHT, lw=5, solid_capstyle="round")
    bones(ax, upright(y), lw=2.4, solid_capstyle="round")
    box = upright(box)
    middle, half, floor = (box.max(0) + box.min(0)) / 2, 0.5 * np.ptp(box, 0).max(), box[:, 2].min()
    ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half),
           zlim=(floor, floor + 2 * half), xticklabels=[], yticklabels=[], zticklabels=[])
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.line.set_color("none")
        axis.set_tick_params(color="none")
    ax.set_box_aspect((1, 1, 1), zoom=1.3)
    ax.view_init(elev=12, azim=-40)


def save(fig, path: Path) -> None:
    """Beside and renamed: a reader sees the old picture or the new one."""
    beside = path.with_name(path.stem + ".tmp.png")
    fig.savefig(beside, dpi=100)
    plt.close(fig)
    os.replace(beside, path)
    print(path)


# ----------------------------------------------------------------------------------------------------------------------
# Figures


def draw_poses(path: Path, p: dict, rows, names: list[str], title: str) -> None:
    """Fig. 2, 13, 15: a sample per row: detected, dense, fine, predicted 3D, true 3D."""
    fig = plt.figure(figsize=(12, 0.8 + 2.3 * len(rows)), layout="constrained")
    for r, i in enumerate(rows):
        axes = [fig.add_subplot(len(rows), 5, 5 * r + k + 1, projection="3d" if k > 2 else None) for k in range(5)]
        detection(axes[0], p, i)
        points(axes[1], p["x_d"][i], p["true_x_d"][i])
        points(axes[2], p["x_f"][i], p["true_x_f"][i])
        for ax in axes[:3]:
            flat(ax, p, i)
        both = np.concatenate([p["y"][i], p["true_y"][i]])
        solid(axes[3], p["y"][i], p["true_y"][i], both)
        solid(axes[4], p["true_y"][i], None, both)
        gone = int((p["conf"][i] == 0).sum())
        axes[0].set_ylabel(("unknown", *names)[p["action"][i] + 1], fontsize=12)
        for ax, text in zip(axes, (f"detected: {p['px_s'][i]:.0f} px off" + (f", {gone} missing" if gone else ""),
                                   f"48 dense: {p['px_d'][i]:.0f} px off",
                                   f"96 fine: {p['px_f'][i]:.0f} px ({p['percent'][i]:.1f} %)",
                                   f"3D: {p['mm'][i]:.0f} mm off", "3D: ground truth"), strict=True):
            ax.set_title(text, fontsize=11)
    fig.suptitle(f"{title}. Blue: left, orange: right, grey: truth, pink ring: joint that the detector missed, "
                 "3D: from the side", fontsize=12)
    save(fig, path)


def draw_overview(path: Path, p: dict, i: int) -> None:
    """One person from detection to 3D, large; the true skeleton in grey under everything."""
    fig = plt.figure(figsize=(12, 3.7), layout="constrained")
    axes = [fig.add_subplot(1, 4, k + 1, projection="3d" if k == 3 else None) for k in range(4)]
    detection(axes[0], p, i)
    for ax, level in zip(axes[1:3], "df", strict=True):
        bones(ax, p["true_x_s"][i], colours=LIGHT, lw=5, solid_capstyle="round")
        x = p[f"x_{level}"][i]
        ax.scatter(*x.T, s=30, c=np.repeat(PART_COLOURS, len(x) // J_S), zorder=3)
    for ax in axes[:3]:
        flat(ax, p, i)
    solid(axes[3], p["y"][i], p["true_y"][i], np.concatenate([p["y"][i], p["true_y"][i]]))
    for ax, text in zip(axes, (f"detected ({int((p['conf'][i] == 0).sum())} joints missing)",
                               f"→ 48 dense points ({p['px_d'][i]:.0f} px off)",
                               f"→ 96 fine points ({p['px_f'][i]:.0f} px off)",
                               f"→ 3D pose ({p['mm'][i]:.0f} mm off)"), strict=True):
        ax.set_title(text, fontsize=13)
    save(fig, path)


def draw_similarity(path: Path, runs: dict[str, dict]) -> None:
    """Fig. 7 and 14: a row per run."""
    fig, axes = plt.subplots(len(runs), 4, figsize=(12, 0.5 + 2.9 * len(runs)), layout="constrained", squeeze=False)
    for row, (name, s) in zip(axes, runs.items(), strict=True):
        panels = {"sparse": ("among sparse codes", "sparse code", "sparse code"),
                  "dense": ("among dense codes", "dense code", "dense code"),
                  "across": ("sparse with dense codes", "sparse code", "dense code"),
                  "parts": (f"parts: own - others = {s['alignment']:.2f}", "dense tokens of part", "sparse token of part")}
        for ax, (key, (title, x, y)) in zip(row, panels.items(), strict=True):
            image = ax.imshow(s[key], vmin=-1, vmax=1, cmap="PuOr_r", interpolation="nearest")
            ax.set(xlabel=x, ylabel=y, xticks=(), yticks=())
            ax.set_title(title, fontsize=11)
        row[0].set_ylabel(f"{name}\n\nsparse code")
    fig.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity")
    save(fig, path)


def draw_swap(path: Path, moved: np.ndarray, poses: dict, x_s: np.ndarray) -> None:
    """Fig. 8: a sparse and a dense token swapped in two examples, and the mean over all poses; x_s [n, 17, 2] in px."""
    fig, axes = plt.subplots(2, 3, figsize=(12, 7.4), layout="constrained", width_ratios=(1, 1, 1.25))
    top = moved.mean(1).max()
    for level, (row, name) in enumerate(zip(axes, ("sparse", "dense"), strict=True)):
        for ax, i in zip(row, (PART_NAMES.index("left wrist"), PART_NAMES.index("right knee")), strict=False):
            # A clear case for the sparse token that is easy to read: the tallest of those that move a lot, not the most.
            order = moved[0, :, i, i].argsort()
            clear = order[7 * len(order) // 10 : 9 * len(order) // 10 + 1]
            n = int(clear[np.ptp(x_s[clear, :, 1], axis=1).argmax()])  # the dense token is swapped in the same pose
            kept, new, mine = poses["kept"][n], poses[level, i][n], np.arange(len(poses["kept"][n])) // (2 * R) == i
            bones(ax, x_s[n], colours="#DDDDDD", lw=4, solid_capstyle="round")
            ax.add_collection(LineCollection(np.stack([kept, new], 1), colors=ORANGE, lw=1.2, zorder=2))
            ax.scatter(*kept.T, s=16, c=np.where(mine, "black", "#999999"), zorder=3)
            ax.scatter(*new[mine].T, s=36, c=ORANGE, edgecolor="white", lw=0.8, zorder=4)
            middle, half = (kept.max(0) + kept.min(0)) / 2, 0.58 * np.ptp(kept, 0).max()
            ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] + half, middle[1] - half), aspect="equal")
            ax.set_xticks([]), ax.set_yticks([])
            shift = moved[level, n, i]
            ax.set_title(f"{name} token, {PART_NAMES[i]}:\n{shift[i]:.0f} px there, elsewhere "
                         f"{np.delete(shift, i).mean():.1f} px", fontsize=11)
        mean = moved[level].mean(0)
        own, other = np.diag(mean).mean(), mean[~np.eye(J_S, dtype=bool)].mean()
        image = row[2].imshow(mean, cmap="cividis", vmin=0, vmax=top)
        row[2].set_yticks(range(J_S), PART_NAMES, fontsize=9)
        row[2].set(xlabel="moves the points of this part (same order)", ylabel=f"{name} token swapped", xticks=())
        row[2].set_title(f"mean of {moved.shape[1]} poses:\nown part {own:.1f} px, others {other:.1f} px", fontsize=11)
    fig.colorbar(image, ax=axes[:, 2], shrink=0.6, label="mean shift, px")
    fig.suptitle("One token swapped for another pose's. Black: the points of its part before, orange: after. "
                 "Lines: all that moves", fontsize=12)
    save(fig, path)


# ----------------------------------------------------------------------------------------------------------------------
# A user's own keypoints

SEEN = 6  # a person with fewer joints is left out
STANDING = 0.36  # standing height of a person in the training images, as a share of the image
PICTURES, FRAMES = 50, 120  # single people that get a picture, frames of an animation, at most
# Bones as shares of standing height (Winter 2009, Biomechanics and Motor Control of Human Movement)
SHARES = {(1, 2): 0.245, (4, 5): 0.245, (2, 3): 0.246, (5, 6): 0.246, (11, 12): 0.186, (14, 15): 0.186, (12, 13): 0.146,
          (15, 16): 0.146, (0, 8): 0.288}  # fmt: skip


def standing_height(k: Keypoints) -> np.ndarray:
    """Roughly how tall each person would stand, [N] px: what the second longest bone says, since most are foreshortened
    and one may be wrong; one height for a whole track."""
    says = []
    for (a, b), share in SHARES.items():
        seen = (k.conf[:, a] > 0) & (k.conf[:, b] > 0)
        says.append(np.where(seen, np.linalg.norm(k.x_s[:, a] - k.x_s[:, b], axis=1) / share, 0.0))
    height = np.sort(np.stack(says, 1), 1)[:, -2]
    box = np.stack([np.ptp(x[c > 0], 0).max() for x, c in zip(k.x_s, k.conf, strict=True)])
    height = np.maximum(np.where(height > 0, height, box), 1.0)
    tracks = np.array(k.track)
    for track in set(k.track) - {""}:
        height[tracks == track] = np.median(height[tracks == track])
    return height


def square_around(k: Keypoints, image_size: tuple[int, int] | None) -> tuple[np.ndarray, np.ndarray, str]:
    """The square image that each person is seen in: centre [N, 2] and side [N] in pixels, and what was done, in words.

    The models know square images in which a standing person takes about a third of the height. An image of known size is
    padded to a square; where the size is unknown, a square is put around the person such that the usual share comes out.
    """
    size, height = np.where(k.size > 0, k.size, image_size or 0), standing_height(k)
    corners = [np.stack([f(x[c > 0], 0) for x, c in zip(k.x_s, k.conf, strict=True)]) for f in (np.min, np.max)]
    known = (size > 0).all(1)
    side = np.where(known, size.max(1), height / STANDING)
    share = height[known] / side[known]
    said = f"{int(known.sum())} poses in images of known size, {int((~known).sum())} with a square put around the person"
    if len(share) and not 0.15 <= np.median(share) <= 0.7:
        said += (f"; standing, the person would take {np.median(share):.0%} of the image, far from the {STANDING:.0%} that "
                 "training shows: without the image's size it may do better")
    return np.where(known[:, None], size / 2, sum(corners) / 2), side, said


@torch.no_grad()
def lift_keypoints(k: Keypoints, centre: np.ndarray, side: np.ndarray, hipart: HiPART, lifter, device) -> dict:
    """x_s [N, 17, 2], x_d [N, 48, 2], x_f [N, 96, 2] px, conf [N, 17], y [N, 17, 3] mm relative to the pelvis."""
    middle, half = (torch.from_numpy(a).float().to(device) for a in (centre[:, None], side[:, None, None] / 2))
    conf = torch.from_numpy(k.conf).to(device)
    x_s = (torch.from_numpy(k.x_s).to(device) - middle) / half * (conf > 0)[..., None]
    x_d, x_f, y = [], [], []
    for some, c in zip(tqdm(x_s.split(512), desc="people, by 512", leave=False), conf.split(512), strict=True):
        d, f = hipart.densify(some, c)
        x_d.append(d), x_f.append(f), y.append(lifter(torch.cat([some, d, f], 1), c))
    out = dict(x_d=torch.cat(x_d) * half + middle, x_f=torch.cat(x_f) * half + middle, y=torch.cat(y))
    return {name: v.cpu().numpy() for name, v in out.items()} | dict(x_s=k.x_s, conf=k.conf)


def draw_person(axes, p: dict, i: int, box: np.ndarray, reach: np.ndarray) -> None:
    """2D levels over one another on the left, 3D on the right."""
    left, right = axes
    left.clear(), right.clear()
    seen = p["conf"][i] > 0
    bones(left, p["x_s"][i], seen, lw=2, alpha=0.6)
    left.scatter(*p["x_s"][i][seen].T, c=np.array(SIDE)[seen], s=34, zorder=3)
    left.scatter(*p["x_d"][i].T, s=26, facecolor="none", edgecolor=np.repeat(PART_COLOURS, R), zorder=4)
    left.scatter(*p["x_f"][i].T, s=7, c=np.repeat(PART_COLOURS, 2 * R), zorder=5)
    middle, half = (box.max(0) + box.min(0)) / 2, 0.55 * max(np.ptp(box, 0).max(), 1.0)
    left.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] + half, middle[1] - half), aspect="equal",
             xticks=(), yticks=())
    left.set_title(f"{seen.sum()} of 17 joints seen; 48 dense (rings), 96 fine (dots)", fontsize=11)
    solid(right, p["y"][i], None, reach)
    right.set_title("3D, from the side of the camera", fontsize=11)


def keypoint_figure():
    fig = plt.figure(figsize=(9, 4.6), layout="constrained")
    return fig, (fig.add_subplot(1, 2, 1), fig.add_subplot(1, 2, 2, projection="3d"))


def draw_keypoints(folder: Path, k: Keypoints, p: dict) -> list[str]:
    """A picture of every person in a single image, an animation of every track; what was drawn, in words."""
    tracks, taken, said = defaultdict(list), set(), []
    for i, track in enumerate(k.track):
        tracks[track].append(i)

    def free(name: str) -> str:
        name = taken_name = re.sub(r"[^\w.-]+", "_", name)
        while taken_name in taken:
            taken_name = f"{name}_{len(taken)}"
        taken.add(taken_name)
        return taken_name

    single = [i for track, rows in tracks.items() if not track or len(rows) == 1 for i in rows]
    if len(single) > PICTURES:
        said.append(f"the first {PICTURES} of {len(single)} single people are drawn")
    for i in tqdm(single[:PICTURES], desc="pictures", leave=False):
        fig, axes = keypoint_figure()
        draw_person(axes, p, i, np.concatenate([p["x_f"][i], p["x_s"][i][p["conf"][i] > 0]]), p["y"][i])
        fig.suptitle(k.name[i], parse_math=False)
        fig.savefig(folder / f"{free(k.name[i])}.png", dpi=100)
        plt.close(fig)
    for track, rows in tracks.items():
        if track and len(rows) > 1:
            shown = rows[:: math.ceil(len(rows) / FRAMES)]
            said += [f"track {track}: {len(shown)} of {len(rows)} frames are drawn"] * (len(shown) < len(rows))
            box, reach = p["x_f"][shown].reshape(-1, 2), p["y"][shown].reshape(-1, 3)
            fig, axes = keypoint_figure()
            writer = PillowWriter(fps=15)
            with writer.saving(fig, folder / f"{free(f'track_{track}')}.gif", dpi=80):
                for i in tqdm(shown, desc=f"track {track}", leave=False):
                    draw_person(axes, p, i, box, reach)
                    fig.suptitle(k.name[i], parse_math=False)
                    writer.grab_frame()
            plt.close(fig)
    return said


def own_keypoints(args, run, hipart: HiPART, lifter) -> None:
    """The whole way from a keypoint file to an .npz, pictures and animations: made beside and renamed, all at once."""
    path = Path(args.keypoints).resolve()
    try:
        k = keypoints.read(path, args.layout)
    except ValueError as e:
        stop(str(e))
    k.conf[k.conf < args.min_score] = 0
    rows = np.flatnonzero((k.conf > 0).sum(1) >= SEEN)
    if not len(rows):
        stop(f"{path}: none of {len(k.name)} people has {SEEN} joints with a score of at least {args.min_score:g}: "
             "lower --min-score")
    left_out = [f"{len(k.name) - len(rows)} people with fewer than {SEEN} joints left out"] * (len(rows) < len(k.name))
    k = Keypoints(k.x_s[rows] * (k.conf[rows] > 0)[..., None], k.conf[rows], [k.name[i] for i in rows],
                  [k.track[i] for i in rows], k.size[rows], k.said)
    centre, side, squared = square_around(k, args.image_size)
    missing = f"{int((k.conf == 0).sum())} of {k.conf.size} joints are missing (score below {args.min_score:g})"
    print("\n".join([*k.said, *left_out, missing, squared]))
    p = lift_keypoints(k, centre, side, hipart, lifter, run.device)
    folder = run.path / "keypoints" / path.stem
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    np.savez_compressed(beside / "poses.npz", **p, name=np.array(k.name), track=np.array(k.track))
    said = draw_keypoints(beside, k, p)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    print("\n".join([*said, *map(str, sorted(folder.iterdir()))]))


# ----------------------------------------------------------------------------------------------------------------------


def typical_occlusion(p: dict) -> int:
    """A sample that shows the idea, of typical quality: one arm or leg is missing (two or more of its joints, four joints
    in all at most; any sample, if there is no such one), the 3D error is in the middle fifth of such samples, and the
    person stands the tallest among those."""
    gone, limbs = p["conf"] == 0, np.array([[1, 2, 3], [4, 5, 6], [11, 12, 13], [14, 15, 16]])
    rows = np.flatnonzero(((gone[:, limbs].sum(-1) >= 2).sum(1) == 1) & (gone.sum(1) <= 4))
    rows = rows if len(rows) else np.arange(len(p["mm"]))
    rows = rows[p["mm"][rows].argsort()]
    middle = rows[2 * len(rows) // 5 : 3 * len(rows) // 5 + 1]
    return int(middle[np.ptp(p["true_x_s"][middle, :, 1], axis=1).argmax()])


def main() -> None:
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--name", default="standard", help="the run, runs/NAME")
    a.add_argument("--data", default="data/demo", help="folder of the data set")
    a.add_argument("--split", default="test", help="of the data; default test")
    a.add_argument("--n", type=int, default=4, help="samples in poses_random.png and poses_worst.png")
    a.add_argument("--seed", type=int, default=0, help="which samples are drawn")
    a.add_argument("--tokens", default="first", choices=("first", "random"), help="which 100 codes similarity.png shows")
    a.add_argument("--without", help="a second run for similarity.png, trained with --lambda_l 0; stage 1 is enough")
    a.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    own = a.add_argument_group("your own keypoints, instead of the figures")
    own.add_argument("--keypoints", help="file, or folder of OpenPose's .json files")
    own.add_argument("--layout", default="auto", choices=("auto", *keypoints.LAYOUTS), help="order of the joints in it")
    own.add_argument("--image-size", type=int, nargs=2, metavar=("W", "H"), help="if the file does not know it")
    own.add_argument("--min-score", type=float, default=0.3, help="joints with less are taken as missing")
    args = a.parse_args()
    if args.n < 1:
        stop(f"--n must be at least 1, found {args.n}")
    if args.image_size and min(args.image_size) < 1:
        stop(f"--image-size needs a width and a height of at least 1, found {args.image_size[0]} {args.image_size[1]}")
    run = open_run(args)
    device, hipart = run.device, load_hipart(run)
    saved = load_finished(run, "stage3_generated_0")
    lifter = new_lifter(Config(**saved["config"]), "generated").to(device).eval()
    lifter.load_state_dict(saved["model"])
    if args.keypoints:
        return own_keypoints(args, run, hipart, lifter)
    split = run.split(args.split, fitted=True)
    if not split.n:
        print(f"nothing is drawn: no sample of {args.data}, {args.split} has true dense and fine points")
        return
    tokenizers = {args.name: hipart.msst}
    if args.without:
        path = Path("runs") / args.without / "stage1.pt"
        if not path.exists():
            stop(f"{path} is not there: run `python train.py --name {args.without} --stage 1 --lambda_l 0` first")
        other = load_checkpoint(path, device)
        tokenizers[args.without] = MSST(Config(**other["config"])).to(device).eval()
        tokenizers[args.without].load_state_dict(other["model"])

    rows = np.random.default_rng(args.seed).permutation(split.n)[:POOL]
    p, block = predict(split, hipart, lifter, rows), split.read(rows)
    pelvis = detected_pelvis(block["x_s"], block["conf"])
    x_f = to_model_frame(block["x_f"], pelvis)
    figures, actions = run.path / "figures", split.meta["actions"]
    figures.mkdir(parents=True, exist_ok=True)
    draw_overview(figures / "overview.png", p, typical_occlusion(p))
    few, worst = range(min(args.n, len(rows))), p["mm"].argsort()[::-1][: args.n]
    draw_poses(figures / "poses_random.png", p, few, actions, f"Random samples of `{args.split}`")
    draw_poses(figures / "poses_worst.png", p, worst, actions, f"Worst 3D of {len(rows)} samples of `{args.split}`")
    draw_similarity(figures / "similarity.png", {f"{name} (λ_l = {m.config.lambda_l:g})": similarities(m, x_f, args.tokens)
                                                 for name, m in tokenizers.items()})
    moved, poses = swaps(hipart.msst, x_f)

    def px(x: np.ndarray) -> np.ndarray:
        x = from_model_frame(torch.from_numpy(x).to(device), pelvis)
        return to_pixels(x, split.w, split.h).cpu().numpy()

    draw_swap(figures / "swap.png", moved * SCALE * split.w / 2, {k: px(x) for k, x in poses.items()}, p["true_x_s"])


if __name__ == "__main__":
    main()
