"""Draw what a run does: its codebooks, densified 2D poses, lifted 3D poses.

    python sample.py                                    # runs/standard, or else weights/; test
    python sample.py --name quick --split unseen --n 6
    python sample.py --tokens random --without no_local # Fig. 14: beside a run with --lambda_l 0
    python sample.py --tokens parts --split val         # codes by the part that uses them most

Writes PNG files to runs/NAME/figures and needs no display. A run gets the figures of the stages
that it has been trained for:

    stage 1   reconstruction.png   true poses, encoded to tokens and decoded again
              similarity.png       cosine similarity of codes, and of parts           Fig. 7, 14
              swap.png             what moves when one token is swapped               Fig. 8
    stage 2   densified.png        random samples: detected, dense and fine points
              order.png            which points each of the 16 steps makes
    stage 3   curves.png           errors against training time, and against samples seen
              overview.png         one occluded person, from the detection to 3D
              poses_random.png     random samples, and in poses_worst.png those with the
                                   largest 3D error                                   Fig. 2, 13, 15

lift.py does the same for your own keypoints.
"""

import argparse
import io
import math
import signal
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while modules are imported says nothing
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import Run, stop
from curves import learning_curves
from evaluate import alignment, left_out, mean_where, mpjpe, open_run, part_cosines
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
    HiPART,
    J,
    R,
    detected_pelvis,
    from_model_frame,
    to_model_frame,
    to_pixels,
)
from sources.dataset import Split
from survival import Watch, write
from train import lift, lifter_input, load_hipart, load_lifter, load_msst

matplotlib.use("Agg")  # draws into files, with or without a display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.collections import LineCollection  # noqa: E402

POOL = 1000  # random samples of the split, from which the figures choose
BLUE, ORANGE, DARK, LIGHT, RING = "#0072B2", "#D55E00", "#444444", "#BBBBBB", "#CC79A7"
SIDE = [BLUE if j in LEFT else ORANGE if j in RIGHT else DARK for j in range(J)]  # of each joint
PART_COLOURS = [SIDE[j] for j in PART_JOINT]
PART_NAMES = [JOINT_NAMES[j] for j in PART_JOINT]


# --------------------------------------------------------------------------------------------------
# Numbers


@torch.no_grad()
def predict(split: Split, rows: np.ndarray, msst: MSST, hipart: HiPART | None = None,
            lifter: nn.Module | None = None) -> dict[str, np.ndarray]:
    """Samples `rows` of a split, and what the models make of them, in pixels and millimetres.

    x_s [n, 17, 2] as detected, conf [n, 17], action [n], and rebuilt [n, 96, 2]: the true fine
    points, encoded and decoded. With hipart x_d [n, 48, 2] and x_f [n, 96, 2] as generated; with
    the lifter of the input `generated` also y [n, 17, 3]. The truth of each has `true_` before its
    name. px_s, px_rebuilt, px_d, px_f [n] are mean 2D errors, percent [n] is px_f in percent of
    the standing height, mm [n] is MPJPE.
    """
    block, clean = split.read(rows), split.read(rows, clean=True)
    pelvis = detected_pelvis(block["x_s"], block["conf"])
    rebuilt = [msst(some)["x_f"] for some in to_model_frame(block["x_f"], pelvis).split(256)]
    p = {f"true_{name}": clean[name] for name in ("x_s", "x_d", "x_f")}
    p |= dict(x_s=block["x_s"], rebuilt=from_model_frame(torch.cat(rebuilt), pelvis))
    if hipart:
        x = lifter_input("generated", block, hipart, None)
        p |= dict(x_d=x[:, J : J + J_D], x_f=x[:, J + J_D :])
    p = {name: to_pixels(x_px, split.w, split.h) for name, x_px in p.items()}
    if lifter:
        p |= dict(y=lift(lifter, x, block["conf"]), true_y=block["y"])
    p |= {name: block[name] for name in ("conf", "action")}
    p = {name: value.cpu().numpy() for name, value in p.items()}

    visible = p["conf"] > 0
    off = np.linalg.norm(p["x_s"] - p["true_x_s"], axis=-1)
    p["px_s"] = (off * visible).sum(1) / visible.sum(1)
    p["px_rebuilt"] = np.linalg.norm(p["rebuilt"] - p["true_x_f"], axis=-1).mean(1)
    if hipart:
        for level in "df":
            off = np.linalg.norm(p[f"x_{level}"] - p[f"true_x_{level}"], axis=-1)
            p[f"px_{level}"] = off.mean(1)
        p["percent"] = p["px_f"] / block["height_px"].cpu().numpy() * 100
    if lifter:
        p["mm"] = mpjpe(p["y"], p["true_y"])
    return p


@torch.no_grad()
def similarities(msst: MSST, x_f: Tensor, tokens: str) -> dict:
    """Cosine similarities: among sparse codes, among dense codes and across (Fig. 7), and of parts
    of true poses x_f [n, 96, 2] (model frame): the sparse embedding of part i (row) with the mean
    dense embedding of part k, [16, 16].

    tokens: the "first" or "random" 100 codes of each codebook, or "parts": all that x_f uses, in
    the order of the part that uses each most. Then starts holds where each part's codes begin,
    [16] for both codebooks, and apart says how much closer codes of the same part are than others.
    """
    codes, owners, o = [], [], msst(x_f)
    for quantizer, q in ((msst.Q_s, o["q_s"]), (msst.Q_d, o["q_d"])):
        C = F.normalize(quantizer.codebook, dim=-1).cpu()
        if tokens == "parts":
            order, owner = codes_by_part(q.cpu(), len(C))
            owners.append(owner)
        elif tokens == "random":
            order = torch.randperm(len(C), generator=torch.Generator().manual_seed(0))[:100]
        else:
            order = torch.arange(len(C))[:100]
        codes.append(C[order])
    C_s, C_d = codes
    cosines = dict(sparse=C_s @ C_s.T, dense=C_d @ C_d.T, across=C_d @ C_s.T,
                   parts=part_cosines(o["zh_s"], o["zh_d"]).mean(0).cpu())
    found = {name: cosine.numpy() for name, cosine in cosines.items()}
    found["alignment"] = float(alignment(o["zh_s"], o["zh_d"]).mean())
    if tokens == "parts":
        s, d = owners
        found["starts"] = [np.searchsorted(owner, np.arange(J_S)) for owner in (s, d)]
        found["apart"] = {name: own_minus_others(found[name], *pair) for name, pair in
                          dict(sparse=(s, s), dense=(d, d), across=(d, s)).items()}
    return found


def codes_by_part(q: Tensor, K: int) -> tuple[Tensor, np.ndarray]:
    """Tokens q [n, 16 or 48] of K codes -> the codes that are used, ordered by the part that uses
    each most, and that part of each."""
    part = torch.arange(q.shape[1]) // (q.shape[1] // J_S)
    uses = torch.bincount((part * K + q).flatten(), minlength=J_S * K).view(J_S, K)
    used = uses.sum(0).nonzero().squeeze(1)
    owner, order = uses[:, used].argmax(0).sort(stable=True)
    return used[order], owner.numpy()


def own_minus_others(cosine: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """The mean of cosine [n, m] where row and column belong to the same part, minus the mean of the
    rest. A code is not compared with itself."""
    same = rows[:, None] == columns
    counts = ~np.eye(len(rows), dtype=bool) if rows is columns else np.ones_like(same)
    return float(mean_where(cosine.ravel(), (same & counts).ravel())
                 - mean_where(cosine.ravel(), ~same.ravel()))


@torch.no_grad()
def swaps(msst: MSST, x_f: Tensor) -> tuple[np.ndarray, dict]:
    """Swap one token of true poses x_f [n, 96, 2] (model frame) for the one that the next pose has
    in its place.

    Returns moved [2, n, 16, 16]: how far the fine points of part k (last axis) move when a sparse
    token (first axis 0) or the first dense token (1) of part i is swapped; and the poses, {"kept"
    or (level, i): [n, 96, 2]}. All in the model frame.
    """
    q_s, q_d = msst.encode(x_f)
    _, kept = msst.decode(q_s, q_d)
    poses, moved = {"kept": kept}, []
    for level, q in enumerate((q_s, q_d)):
        shifts = []
        for i in range(J_S):
            at, new = i * (1, R)[level], q.clone()
            new[:, at] = q[:, at].roll(1)
            _, poses[level, i] = msst.decode(*((new, q_d) if level == 0 else (q_s, new)))
            shift = (poses[level, i] - kept).norm(dim=-1)  # [n, 96]
            shifts.append(shift.unflatten(1, (J_S, -1)).mean(2))
        moved.append(torch.stack(shifts, 1))
    moved = torch.stack(moved).cpu().numpy()
    return moved, {name: pose.cpu().numpy() for name, pose in poses.items()}


def typical_occlusion(p: dict) -> int:
    """A sample that shows the idea, of typical quality: one arm or leg is missing (two or more of
    its joints, four joints in all at most; any sample, if there is no such one), the 3D error is
    in the middle fifth of such samples, and the person stands the tallest among those."""
    missing = p["conf"] == 0
    limbs = np.array([[1, 2, 3], [4, 5, 6], [11, 12, 13], [14, 15, 16]])
    hidden_limbs = (missing[:, limbs].sum(-1) >= 2).sum(1)
    rows = np.flatnonzero((hidden_limbs == 1) & (missing.sum(1) <= 4))
    rows = rows if len(rows) else np.arange(len(p["mm"]))
    rows = rows[p["mm"][rows].argsort()]
    middle = rows[2 * len(rows) // 5 : 3 * len(rows) // 5 + 1]
    return int(middle[np.ptp(p["true_x_s"][middle, :, 1], axis=1).argmax()])


# --------------------------------------------------------------------------------------------------
# Pieces of pictures


def bones(ax, x: np.ndarray, visible=None, colours=SIDE, **style) -> None:
    """Skeleton x [17, 2 or 3]; bones with a missing end are left out."""
    for j in range(1, J):
        if visible is None or (visible[j] and visible[PARENTS[j]]):
            colour = colours[j] if isinstance(colours, list) else colours
            ax.plot(*zip(x[PARENTS[j]], x[j], strict=True), color=colour, **style)


def detection(ax, p: dict, i: int) -> None:
    """What the detector gave, over the true skeleton; rings where it gave nothing."""
    visible = p["conf"][i] > 0
    bones(ax, p["true_x_s"][i], colours=LIGHT, lw=5, solid_capstyle="round")
    bones(ax, p["x_s"][i], visible, lw=2)
    ax.scatter(*p["x_s"][i][visible].T, c=np.array(SIDE)[visible], s=22, zorder=3)
    ax.scatter(*p["true_x_s"][i][~visible].T, s=130, facecolor="none", edgecolor=RING, lw=2.2,
               zorder=4)


def points(ax, x: np.ndarray, true: np.ndarray) -> None:
    """Points by side of the body; grey rings are the true ones, each tied to its own."""
    ax.add_collection(LineCollection(np.stack([x, true], 1), colors=LIGHT, lw=1, zorder=1))
    ax.scatter(*true.T, s=22, facecolor="none", edgecolor="#888888", lw=0.9, zorder=2)
    ax.scatter(*x.T, s=13, c=np.repeat(PART_COLOURS, len(x) // J_S), zorder=3)


def frame(ax, x: np.ndarray, margin: float = 0.05) -> None:
    """Image axes (y down) with equal scale around points x [n, 2]."""
    middle = (x.max(0) + x.min(0)) / 2
    half = (0.5 + margin) * max(np.ptp(x, 0).max(), 1.0)
    ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] + half, middle[1] - half),
           aspect="equal", xticks=(), yticks=())


def flat(ax, p: dict, i: int) -> None:
    """The same image axes for all panels of a sample."""
    made = p["x_f"][i] if "x_f" in p else p["rebuilt"][i]
    frame(ax, np.concatenate([p["true_x_f"][i], p["true_x_s"][i], made]))


def solid(ax, y: np.ndarray, under: np.ndarray | None, box: np.ndarray,
          others: dict[str, np.ndarray] | None = None) -> None:
    """Skeleton y [17, 3] mm (camera frame: x right, y down, z forward) standing upright, seen from
    50 degrees to the side of the camera; `under` in grey below it, `others` thin in their colours;
    `box` [n, 3] sets the limits."""

    def upright(a):
        return np.stack([a[:, 0], a[:, 2], -a[:, 1]], 1)

    if under is not None:
        bones(ax, upright(under), colours=LIGHT, lw=5, solid_capstyle="round")
    for colour, other in (others or {}).items():
        bones(ax, upright(other), colours=colour, lw=1)
    bones(ax, upright(y), lw=2.4, solid_capstyle="round")
    box = upright(box)
    middle, half = (box.max(0) + box.min(0)) / 2, 0.5 * np.ptp(box, 0).max()
    floor = box[:, 2].min()
    ax.set(xlim=(middle[0] - half, middle[0] + half), ylim=(middle[1] - half, middle[1] + half),
           zlim=(floor, floor + 2 * half), xticklabels=[], yticklabels=[], zticklabels=[])
    for axis in (ax.xaxis, ax.yaxis, ax.zaxis):
        axis.line.set_color("none")
        axis.set_tick_params(color="none")
    ax.set_box_aspect((1, 1, 1), zoom=1.3)
    ax.view_init(elev=12, azim=-40)


def save(fig, path: Path) -> None:
    """Beside and renamed: a reader sees the old picture or the new one."""
    picture = io.BytesIO()
    fig.savefig(picture, dpi=100)
    plt.close(fig)
    write(path, picture.getvalue())
    print(path)


# --------------------------------------------------------------------------------------------------
# Figures of stage 1


def draw_reconstruction(path: Path, p: dict, rows, names: list[str]) -> None:
    """True fine points and what the tokenizer makes of them, four samples in a row."""
    columns = 4
    lines = math.ceil(len(rows) / columns)
    fig, axes = plt.subplots(lines, columns, figsize=(12, 0.3 + 3.2 * lines),
                             layout="constrained", squeeze=False)
    for ax in axes.flat[len(rows) :]:
        ax.axis("off")
    for ax, i in zip(axes.flat, rows, strict=False):
        bones(ax, p["true_x_s"][i], colours="#E4E4E4", lw=4, solid_capstyle="round", zorder=0)
        points(ax, p["rebuilt"][i], p["true_x_f"][i])
        frame(ax, np.concatenate([p["rebuilt"][i], p["true_x_f"][i], p["true_x_s"][i]]))
        ax.set_title(f"{action(p, i, names)}: {p['px_rebuilt'][i]:.1f} px off", fontsize=11,
                     parse_math=False)  # an action may have any name
    fig.suptitle(f"Reconstruction error of the tokenizer: {p['px_rebuilt'].mean():.1f} px, mean of "
                 f"{len(p['px_rebuilt'])} poses. Rings: true fine points; dots: the same, encoded "
                 "and decoded", fontsize=12)
    save(fig, path)


def action(p: dict, i: int, names: list[str]) -> str:
    """The name of a sample's action; -1 is one that the data do not know."""
    return ("unknown", *names)[p["action"][i] + 1]


def draw_similarity(path: Path, runs: dict[str, dict]) -> None:
    """Fig. 7 and 14: four panels for every run; where parts are named, in two large rows."""
    columns, size = (2, 5.3) if any("starts" in s for s in runs.values()) else (4, 3.1)
    fig, axes = plt.subplots(4 * len(runs) // columns, columns, layout="constrained", squeeze=False,
                             figsize=(12, 0.5 + size * 4 * len(runs) // columns))
    for row, (name, s) in zip(axes.reshape(-1, 4), runs.items(), strict=True):
        apart = {key: f"\nown part - others = {value:.2f}" for key, value in
                 s.get("apart", {}).items()}
        panels = {
            "sparse": ("among sparse codes", "sparse code", "sparse code"),
            "dense": ("among dense codes", "dense code", "dense code"),
            "across": ("sparse with dense codes", "sparse code", "dense code"),
            "parts": (f"mean tokens of parts:\nown - others = {s['alignment']:.2f}",
                      "dense tokens of part", "sparse token of part")}
        for ax, (key, (title, x, y)) in zip(row, panels.items(), strict=True):
            image = ax.imshow(s[key], vmin=-1, vmax=1, cmap="PuOr_r", interpolation="nearest")
            ax.set(xlabel=x, ylabel=y, xticks=(), yticks=())
            ax.set_title(title + apart.get(key, ""), fontsize=11)
        if "starts" in s:
            draw_parts(row, s)
        row[0].set_ylabel(f"{name}\n\nsparse code")
    fig.colorbar(image, ax=axes, shrink=0.8, label="cosine similarity")
    save(fig, path)


def draw_parts(row, s: dict) -> None:
    """Lines between the codes of two parts, and the parts' names."""
    sparse, dense = s["starts"]
    for ax, key, left, below in zip(row, ("sparse", "dense", "across"), (sparse, dense, dense),
                                    (sparse, dense, sparse), strict=False):
        height, width = s[key].shape
        for starts, line in ((left, ax.axhline), (below, ax.axvline)):
            for start in starts[1:]:
                line(start - 0.5, color="black", lw=0.4)
        middle = (left + np.append(left[1:], height)) / 2 - 0.5
        shown = np.diff(np.append(left, height)) > 0  # a part may have no code of its own
        ax.set_yticks(middle[shown], np.array(PART_NAMES)[shown], fontsize=6)
    row[3].set_yticks(range(J_S), PART_NAMES, fontsize=6)


def draw_swap(path: Path, moved: np.ndarray, poses: dict, x_s: np.ndarray) -> None:
    """Fig. 8: a sparse and a dense token swapped in two examples, and the mean over all poses.
    All in px: moved and poses as of `swaps`, x_s [n, 17, 2] the true skeletons."""
    fig, axes = plt.subplots(2, 3, figsize=(12, 7.4), layout="constrained",
                             width_ratios=(1, 1, 1.25))
    for level, (row, name) in enumerate(zip(axes, ("sparse", "dense"), strict=True)):
        for ax, part in zip(row, ("left wrist", "right knee"), strict=False):
            draw_one_swap(ax, moved, poses, x_s, level, PART_NAMES.index(part))
        mean = moved[level].mean(0)
        own, other = np.diag(mean).mean(), mean[~np.eye(J_S, dtype=bool)].mean()
        image = row[2].imshow(mean, cmap="cividis", vmin=0, vmax=moved.mean(1).max())
        row[2].set_yticks(range(J_S), PART_NAMES, fontsize=9)
        row[2].set(xlabel="moves the points of this part (same order)",
                   ylabel=f"{name} token swapped", xticks=())
        row[2].set_title(f"mean of {moved.shape[1]} poses:\nown part {own:.1f} px, "
                         f"others {other:.1f} px", fontsize=11)
    fig.colorbar(image, ax=axes[:, 2], shrink=0.6, label="mean shift, px")
    fig.suptitle("One token swapped for another pose's. Black: the points of its part before; "
                 "orange: after; lines: all that moves", fontsize=12)
    save(fig, path)


def draw_one_swap(ax, moved: np.ndarray, poses: dict, x_s: np.ndarray, level: int, i: int) -> None:
    """A pose before and after its token of part i is swapped."""
    # A clear case for the sparse token that is easy to read: the tallest person of those who move
    # a lot, though not the most. The dense token is swapped in the same pose.
    order = moved[0, :, i, i].argsort()
    clear = order[7 * len(order) // 10 : 9 * len(order) // 10 + 1]
    n = int(clear[np.ptp(x_s[clear, :, 1], axis=1).argmax()])
    kept, new, shift = poses["kept"][n], poses[level, i][n], moved[level, n, i]
    mine = np.arange(len(kept)) // (2 * R) == i
    bones(ax, x_s[n], colours="#DDDDDD", lw=4, solid_capstyle="round")
    ax.add_collection(LineCollection(np.stack([kept, new], 1), colors=ORANGE, lw=1.2, zorder=2))
    ax.scatter(*kept.T, s=16, c=np.where(mine, "black", "#999999"), zorder=3)
    ax.scatter(*new[mine].T, s=36, c=ORANGE, edgecolor="white", lw=0.8, zorder=4)
    frame(ax, np.concatenate([kept, x_s[n]]), margin=0.06)
    ax.set_title(f"{('sparse', 'dense')[level]} token, {PART_NAMES[i]}:\n{shift[i]:.0f} px there, "
                 f"elsewhere {np.delete(shift, i).mean():.1f} px", fontsize=11)


# --------------------------------------------------------------------------------------------------
# Figures of stages 2 and 3

LEGEND = "Blue: left; orange: right; grey: truth; pink ring: missing joint"


def draw_levels(axes, p: dict, i: int, names: list[str]) -> None:
    """Three panels of one sample: detected, dense and fine."""
    detection(axes[0], p, i)
    points(axes[1], p["x_d"][i], p["true_x_d"][i])
    points(axes[2], p["x_f"][i], p["true_x_f"][i])
    for ax in axes:
        flat(ax, p, i)
    missing = int((p["conf"][i] == 0).sum())
    axes[0].set_ylabel(action(p, i, names), fontsize=12, parse_math=False)
    axes[0].set_title(f"detected: {p['px_s'][i]:.0f} px off"
                      + (f", {missing} missing" if missing else ""), fontsize=11)
    axes[1].set_title(f"48 dense: {p['px_d'][i]:.0f} px off", fontsize=11)
    axes[2].set_title(f"96 fine: {p['px_f'][i]:.0f} px ({p['percent'][i]:.1f} %)", fontsize=11)


def draw_densified(path: Path, p: dict, rows, names: list[str]) -> None:
    """A sample in every row: detected, dense, fine, and the best that its tokens could do."""
    fig, axes = plt.subplots(len(rows), 4, figsize=(12, 0.8 + 2.9 * len(rows)),
                             layout="constrained", squeeze=False)
    for row, i in zip(axes, rows, strict=True):
        draw_levels(row[:3], p, i, names)
        points(row[3], p["rebuilt"][i], p["true_x_f"][i])
        flat(row[3], p, i)
        row[3].set_title(f"true tokens: {p['px_rebuilt'][i]:.0f} px off", fontsize=11)
    fig.suptitle(f"{LEGEND}. On the right: the true pose, encoded and decoded", fontsize=12)
    save(fig, path)


def draw_order(path: Path, p: dict, rows, names: list[str]) -> None:
    """The order of generation in four samples: fine points in the colour of the step that made
    them."""
    fig, axes = plt.subplots(1, 4, figsize=(12, 3.1), layout="constrained")
    for ax in axes[len(rows) :]:
        ax.axis("off")
    for ax, i in zip(axes, rows, strict=False):
        bones(ax, p["x_s"][i], p["conf"][i] > 0, colours=LIGHT, lw=3, solid_capstyle="round")
        made = ax.scatter(*p["x_f"][i].T, s=22, c=np.arange(J_S).repeat(2 * R), zorder=3,
                          cmap=plt.get_cmap("viridis", J_S), vmin=-0.5, vmax=J_S - 0.5)
        flat(ax, p, i)
        ax.set_title(action(p, i, names), fontsize=11, parse_math=False)
    bar = fig.colorbar(made, ax=axes)
    bar.ax.set_title("step, part", fontsize=11)
    bar.set_ticks([0, J_S - 1], labels=[f"1  {PART_NAMES[0]}", f"{J_S}  {PART_NAMES[-1]}"])
    save(fig, path)


def draw_overview(path: Path, p: dict, i: int) -> None:
    """One person from the detection to 3D, large; the true skeleton in grey under everything."""
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
    titles = (f"detected ({int((p['conf'][i] == 0).sum())} joints missing)",
              f"→ 48 dense points ({p['px_d'][i]:.0f} px off)",
              f"→ 96 fine points ({p['px_f'][i]:.0f} px off)",
              f"→ 3D pose ({p['mm'][i]:.0f} mm off)")
    for ax, title in zip(axes, titles, strict=True):
        ax.set_title(title, fontsize=13)
    save(fig, path)


def draw_poses(path: Path, p: dict, rows, names: list[str], title: str) -> None:
    """Fig. 2, 13, 15: a sample in every row: detected, dense, fine, predicted 3D, true 3D."""
    fig = plt.figure(figsize=(12, 0.8 + 2.3 * len(rows)), layout="constrained")
    for r, i in enumerate(rows):
        axes = [fig.add_subplot(len(rows), 5, 5 * r + k + 1, projection="3d" if k > 2 else None)
                for k in range(5)]
        draw_levels(axes[:3], p, i, names)
        both = np.concatenate([p["y"][i], p["true_y"][i]])
        solid(axes[3], p["y"][i], p["true_y"][i], both)
        solid(axes[4], p["true_y"][i], None, both)
        axes[3].set_title(f"3D: {p['mm'][i]:.0f} mm off", fontsize=11)
        axes[4].set_title("3D: ground truth", fontsize=11)
    fig.suptitle(f"{title}. {LEGEND}; 3D: from the side", fontsize=12)
    save(fig, path)


# --------------------------------------------------------------------------------------------------


def tokenizers(run: Run, msst: MSST, other: str | None) -> dict[str, MSST]:
    """The tokenizers that similarity.png compares, by a name that says their lambda_l."""
    found = {run.path.name: msst}
    if other:
        path = run.path.parent / other
        if not (path / "stage1.pt").exists():
            stop(f"{path}/stage1.pt is not there: run `python train.py --name {other} --stage 1 "
                 "--lambda_l 0` first")
        found[other] = load_msst(replace(run, path=path))
    return {f"{name} (λ_l = {m.config.lambda_l:g})": m for name, m in found.items()}


def main() -> None:
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("--name", help="the run, runs/NAME; default: standard, or without such a run "
                   "the models that come with the project")
    a.add_argument("--data", default=Run.data, help="folder of the data set")
    a.add_argument("--split", default="test", help="of the data; default: test")
    a.add_argument("--n", type=int, default=4, help="samples in a figure of several")
    a.add_argument("--seed", type=int, default=0, help="which samples are drawn")
    a.add_argument("--tokens", default="first", choices=("first", "random", "parts"),
                   help="which codes similarity.png shows: 100, or all that are used, by part")
    a.add_argument("--without", help="a second run for similarity.png, trained with --lambda_l 0; "
                   "stage 1 is enough")
    a.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    args = a.parse_args()
    if args.n < 1:
        stop(f"--n must be at least 1, found {args.n}")
    run, stages = open_run(args.name, args.device, args.data, stage_3=["stage3_generated_0"])
    hipart = load_hipart(run) if stages >= 2 else None
    msst = hipart.msst if hipart else load_msst(run)
    lifter = load_lifter(run, "generated") if stages >= 3 else None
    compared = tokenizers(run, msst, args.without)
    split = run.split(args.split, has_mesh=True)
    if not split.n:
        print(f"Nothing is drawn: no sample of {args.data}, {args.split} has true dense and fine "
              "points.")
        return

    if args.split == "train" and split.meta["noise"]:
        stop("--split train has no stored detections: choose val, test or unseen")
    rows = np.random.default_rng(args.seed).permutation(split.n)[:POOL]
    p, block = predict(split, rows, msst, hipart, lifter), split.read(rows)
    pelvis = detected_pelvis(block["x_s"], block["conf"])
    x_f = to_model_frame(block["x_f"], pelvis)
    few, actions = range(min(args.n, len(rows))), split.meta["actions"]
    figures = Path("runs", run.path.name, "figures")
    figures.mkdir(parents=True, exist_ok=True)

    def px(x: np.ndarray) -> np.ndarray:
        x = from_model_frame(torch.from_numpy(x).to(run.device), pelvis)
        return to_pixels(x, split.w, split.h).cpu().numpy()

    draw_reconstruction(figures / "reconstruction.png", p, few, actions)
    draw_similarity(figures / "similarity.png", {name: similarities(m, x_f, args.tokens)
                                                 for name, m in compared.items()})
    moved, poses = swaps(msst, x_f)
    draw_swap(figures / "swap.png", moved * SCALE * split.w / 2,
              {name: px(x) for name, x in poses.items()}, p["true_x_s"])
    if stages >= 2:
        draw_densified(figures / "densified.png", p, few, actions)
        if run.config.generation == "both":  # others have another order, or none
            draw_order(figures / "order.png", p, few, actions)
    if stages >= 3:
        if (run.path / "log.jsonl").exists():
            save(learning_curves(run), figures / "curves.png")
        worst = p["mm"].argsort()[::-1][: args.n]
        draw_overview(figures / "overview.png", p, typical_occlusion(p))
        draw_poses(figures / "poses_random.png", p, few, actions,
                   f"Random samples of `{args.split}`")
        draw_poses(figures / "poses_worst.png", p, worst, actions,
                   f"Worst 3D of {len(rows)} samples of `{args.split}`")
    if stages < 3:
        print(left_out(run, stages, {2: "densified.png, order.png",
                                     3: "overview.png, poses_random.png and poses_worst.png"}))


if __name__ == "__main__":
    with Watch().listening():
        main()
