"""Evaluate a run: how well it densifies (2D) and lifts (3D), on bodies and on motion that training never saw.

    python evaluate.py                              # runs/standard on data/demo, one lifter per feed
    python evaluate.py --name quick --seeds 3       # mean and spread over the lifters of `python train.py --seeds 3`
    python evaluate.py --occlusion                  # joints hidden on purpose: stand-ins for Table 7 and 3DPW-AdvOcc

Prints tables and writes them to runs/NAME/table.md; every number behind them goes to runs/NAME/evaluation.json. On other
data than the run's own (by the name of its folder) these names end with that of the data.
Covers the paper's Table 1 (errors per action), Fig. 12 (2D error of the fine pose) and Fig. 7 in one number.

It goes one way: `measure` gives every sample of a split a row of numbers, `summarize` averages them, tables are text.
"""

import argparse
import datetime
import json
import os
import platform
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hipart import (
    J_D,
    J_S,
    PARENTS,
    Config,
    HiPART,
    J,
    R,
    Regressor,
    detected_pelvis,
    from_model_frame,
    hide_missing,
    to_model_frame,
)
from train import FEEDS, Run, Split, feed, load_finished, load_hipart, load_regressor, new_lifter, stop, tokenizer_report

SPLITS = {"test": "new bodies, familiar motion", "unseen": "unseen motion"}  # of the default data; others bring their words
LOW_CONF = 0.5  # a sample with a joint that is missing, or less sure than this, counts as occluded
PAPER_MPJPE = {"sparse": "52.1", "generated": "42.0", "sparse_clean": "37.6", "ground_truth_clean": "17.5"}
PAPER_NOTE = (
    r"\* Human3.6M, the paper's data set and not this one: compare ratios, never millimetres. Lifting CPN detections, "
    "sparse only 52.1 and with HiPART 42.0 (ratio 0.81); toy experiment on ground-truth 2D 37.6 -> 17.5 (ratio 0.47). "
    "HiPART by source of 2D poses: 49.3 SH / 42.0 CPN / 28.3 ground truth.")

SAME_DATA_NOTE = r"\* Human3.6M. The paper: " + PAPER_NOTE.split("millimetres. ")[1]


# ----------------------------------------------------------------------------------------------------------------------
# Metrics


def mpjpe(pred, gt) -> np.ndarray:
    """Mean per-joint position error of every frame: pred, gt [N, J, 3] mm -> [N] mm.

    As VideoPose3D has it ("protocol 1"): all J joints count, the pelvis too, and poses are compared as they are given.
    Both are relative to the pelvis already, so the true pelvis is 0; the predicted one is not moved onto it.
    """
    pred, gt = _poses(pred, gt)
    return np.linalg.norm(pred - gt, axis=-1).mean(-1)


def pa_mpjpe(pred, gt) -> np.ndarray:
    """MPJPE after the best similarity of every frame ("protocol 2", Procrustes): pred, gt [N, J, 3] mm -> [N] mm.

    Rotation, scale and shift are fitted in least squares; a reflection is not allowed. A prediction that is one single
    point has no orientation or size to fit: it is shifted only.
    """
    pred, gt = _poses(pred, gt)
    centre = gt.mean(1, keepdims=True)
    p, g = pred - pred.mean(1, keepdims=True), gt - centre
    size_p, size_g = (np.maximum(np.linalg.norm(a, axis=(1, 2), keepdims=True), 1e-9) for a in (p, g))
    u, s, vt = np.linalg.svd((p / size_p).transpose(0, 2, 1) @ (g / size_g))  # [N, 3, 3]
    sign = np.sign(np.linalg.det(u @ vt))  # -1: the best orthogonal map is a reflection, so turn its weakest axis round
    u[:, :, -1] *= sign[:, None]
    s[:, -1] *= sign
    scale = s.sum(-1)[:, None, None] * size_g / size_p
    return mpjpe(scale * p @ (u @ vt) + centre, gt)


def _poses(pred, gt) -> tuple[np.ndarray, np.ndarray]:
    pred, gt = np.asarray(pred, np.float64), np.asarray(gt, np.float64)
    if pred.shape != gt.shape or pred.ndim != 3 or pred.shape[-1] != 3:
        raise ValueError(f"expected two arrays of one shape [N, J, 3], found {list(pred.shape)} and {list(gt.shape)}")
    if not (np.isfinite(pred).all() and np.isfinite(gt).all()):
        raise ValueError("expected finite poses, found NaN or infinite coordinates")
    return pred, gt


def alignment(zh_s: Tensor, zh_d: Tensor) -> Tensor:
    """How much closer a sparse token is to its own part than to the rest: zh_s [B, 16, D], zh_d [B, 48, D] -> [B].

    Mean cosine of a quantized sparse embedding with its own part's mean dense embedding (what L_local pulls together),
    minus the mean cosine with those of the other 15 parts of the same pose. 0: not tied at all; 2 at the very most.
    """
    part = F.normalize(zh_d.unflatten(1, (J_S, R)).mean(2), dim=-1)
    cosine = F.normalize(zh_s, dim=-1) @ part.transpose(1, 2)  # [B, 16, 16]
    own = cosine.diagonal(dim1=1, dim2=2).mean(-1)
    return own - (cosine.sum((1, 2)) / J_S - own) / (J_S - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def interpolate_missing(x_s: Tensor, conf: Tensor) -> Tensor:
    """Missing joints (conf 0) as the mean of their neighbours in the skeleton, from the seen ones outwards: x_s [B, 17, 2].

    What one does without a learned token. The skeleton's ends repeat their parent; without any joint all stay 0.
    """
    near = torch.zeros(J, J)
    for j in range(1, J):
        near[j, PARENTS[j]] = near[PARENTS[j], j] = 1
    near, seen = near.to(x_s), conf > 0
    x = hide_missing(x_s, seen)
    for _ in range(J):
        n = near @ seen.to(x_s)[..., None]  # [B, 17, 1] seen neighbours
        x = torch.where(seen[..., None], x, near @ x / n.clamp_min(1))
        seen = seen | (n[..., 0] > 0)
    return x


@torch.no_grad()
def measure(split: Split, hipart: HiPART, regressor: Regressor, lifters: dict, rng=None) -> dict[str, np.ndarray]:
    """One number per sample for everything that the tables show: {column: [N]}.

    mpjpe/FEED/SEED, pa_mpjpe/FEED/SEED    mm, for every lifter in `lifters` {(feed, seed): model}
    mpjpe_fit/FEED/SEED                    the same of the sparse feeds, only where there are true dense and fine points
    px/INPUT/SOURCE, percent/INPUT/SOURCE  mean 2D error in pixels, and in percent of the person's standing height; INPUT
                                           is detected (drawn afresh from `rng` if given) or clean, SOURCE as in SOURCES
    mpjpe_14/FEED/SEED, pa_mpjpe_14/...    the same over the data's joints_14, if it names them, the pelvis moved onto 0
    accuracy_s/INPUT, accuracy_d/INPUT     teacher-forced token accuracy, percent
    seen/FEED/SEED, missing/FEED/SEED      mm, mean over the joints that the detector gave and over those it missed; FEED is
                                           also "sparse interpolated" and "generated interpolated"
    alignment, action, occluded

    What needs true dense and fine points is NaN for samples without.
    """
    rows, j14 = defaultdict(list), split.meta.get("joints_14")

    def add(name: str, values: Tensor, known: Tensor | None = None) -> None:
        values = values.cpu().numpy().astype(np.float64)
        rows[name].append(values if known is None else np.where(known.cpu().numpy(), values, np.nan))

    for kind in ("detected", "clean"):
        clean = kind == "clean"
        for block, truth in zip(split.blocks(rng, clean), split.blocks(clean=True), strict=True):
            x_s, conf, height, fit = (block[k] for k in ("x_s", "conf", "height_px", "fit"))
            points = {name: feed(name, block, hipart, regressor) for name in ("generated", "regressor")}
            small = zip(*(block[k].split(256) for k in ("x_s", "conf", "x_f")), strict=True)  # logits are large
            told = [teacher_forced(hipart, *parts) for parts in small]
            told = {name: torch.cat([t[name] for t in told]) for name in told[0]}
            fine = {name: x[:, J + J_D :] for name, x in points.items()} | {k: told[k] for k in ("floor", "teacher")}
            errors = {name: (x - block["x_f"]).norm(dim=-1).mean(-1) for name, x in fine.items()}
            seen = (conf > 0).to(x_s)
            errors["input"] = ((x_s - truth["x_s"]).norm(dim=-1) * seen).sum(-1) / seen.sum(-1)
            for name, error in errors.items():
                known = None if name == "input" else fit
                add(f"px/{kind}/{name}", error * split.w / 2, known)
                add(f"percent/{kind}/{name}", error * split.w / 2 / height * 100, known)
            for name in ("accuracy_s", "accuracy_d"):
                add(f"{name}/{kind}", told[name], fit)
            if not clean:
                add("action", block["action"])
                add("occluded", (conf < LOW_CONF).any(1))
                add("alignment", told["alignment"], fit)
            for (name, seed), lifter in lifters.items():
                if name.endswith("_clean") == clean:
                    x = points[name] if name in points else feed(name, block, hipart, regressor)
                    y = torch.cat([lifter(*p) for p in zip(x.split(1024), conf.split(1024), strict=True)]).cpu()
                    true, known = block["y"].cpu(), fit if name.startswith("ground_truth") else None
                    add(f"mpjpe/{name}/{seed}", torch.from_numpy(mpjpe(y, true)), known)
                    add(f"pa_mpjpe/{name}/{seed}", torch.from_numpy(pa_mpjpe(y, true)), known)
                    if name in ("sparse", "sparse_clean"):  # to compare with rows that need the truth
                        add(f"mpjpe_fit/{name}/{seed}", torch.from_numpy(mpjpe(y, true)), fit)
                    if j14:
                        pair = (y - y[:, :1])[:, j14], true[:, j14]
                        add(f"mpjpe_14/{name}/{seed}", torch.from_numpy(mpjpe(*pair)), known)
                        add(f"pa_mpjpe_14/{name}/{seed}", torch.from_numpy(pa_mpjpe(*pair)), known)
                    if clean:
                        continue
                    tried = {name: y}
                    if name in ("sparse", "generated"):  # the same models, told that nothing is missing
                        gone = (conf == 0).any(1)
                        whole = dict(x_s=interpolate_missing(x_s, conf)[gone], conf=torch.ones_like(conf[gone]))
                        guess = tried[f"{name} interpolated"] = y.clone()
                        guess[gone.cpu()] = lifter(feed(name, whole, hipart, regressor), whole["conf"]).cpu()
                    for label, guess in tried.items():
                        off = np.linalg.norm(np.float64(guess - true), axis=-1)
                        for which, mask in (("seen", conf.cpu().numpy() > 0), ("missing", conf.cpu().numpy() == 0)):
                            n = mask.sum(1)
                            mean = (off * mask).sum(1) / np.maximum(n, 1)
                            rows[f"{which}/{label}/{seed}"].append(np.where(n, mean, np.nan))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def teacher_forced(hipart: HiPART, x_s: Tensor, conf: Tensor, x_f: Tensor) -> dict[str, Tensor]:
    """Stages 1 and 2 when they are told the truth: fine poses [B, 96, 2] and numbers [B].

    floor: the true pose through the tokenizer and back; no generated tokens can be expected to beat their own targets;
    teacher: HiARM's choice (the expected embedding if config.soft), given the true tokens of all earlier parts, and the
    true sparse token for dense ones. What free running loses beyond this, it loses by building on its own errors.
    """
    msst, hiarm, pelvis = hipart.msst, hipart.hiarm, detected_pelvis(x_s, conf)
    o = msst(to_model_frame(x_f, pelvis))
    logits_s, logits_d = hiarm(to_model_frame(x_s, pelvis), o["q_s"], o["q_d"], conf)
    q_s, q_d = logits_s.argmax(-1), logits_d.argmax(-1)
    if hipart.config.soft:
        _, teacher = msst.decode_embeddings(logits_s.softmax(-1) @ hiarm.C_s, logits_d.softmax(-1) @ hiarm.C_d)
    else:
        _, teacher = msst.decode(q_s, q_d)
    return dict(floor=from_model_frame(o["x_f"], pelvis), teacher=from_model_frame(teacher, pelvis),
                accuracy_s=(q_s == o["q_s"]).float().mean(-1) * 100, accuracy_d=(q_d == o["q_d"]).float().mean(-1) * 100,
                alignment=alignment(o["zh_s"], o["zh_d"]))


def summarize(rows: dict[str, np.ndarray], names: list[str]) -> dict[str, dict]:
    """{column: [N]} -> {column: averages}; a sample whose number is undefined (NaN) does not count.

    per_action: {name: mean over its frames}; actions: the plain mean of these (the field's habit); frames: the mean over
    all frames; occluded, clear: the mean over the frames with and without occlusion. An empty average is None.
    """

    def mean(values) -> float | None:
        values = np.asarray(values, np.float64)
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else None

    label, hidden, result = rows["action"].astype(int), rows["occluded"] > 0, {}
    for column, values in rows.items():
        per_action = {("unknown", *names)[a + 1]: mean(values[label == a]) for a in np.unique(label)}
        result[column] = dict(actions=mean(list(per_action.values())), frames=mean(values),
                              occluded=mean(values[hidden]), clear=mean(values[~hidden]), per_action=per_action)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Tables: Markdown that reads as plain text


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned Markdown: first column to the left, numbers to the right."""
    width = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [[cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, width, strict=True))]
             for row in (head, *rows)]
    lines.insert(1, ["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(values: list, digits: int = 1) -> str:
    """One value, or mean ± standard deviation over seeds; "-" for what was not computed."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def per_action(s: dict, cells) -> list[list[str]]:
    """A row for every action and both means of a split's summary `s`; cells(get) -> cells, get(column) -> its number."""
    rows = [[a, *cells(lambda column, a=a: s[column]["per_action"][a])] for a in s["action"]["per_action"]]
    return rows + [["**mean of actions**", *cells(lambda column: s[column]["actions"])],
                   ["**all frames**", *cells(lambda column: s[column]["frames"])]]


def lifting_tables(s: dict, seeds: int, kind: str, note: str, paper: dict[str, str]) -> str:
    """3D errors of one split from its summary: on average, then per action."""

    def values(feed: str, average: str, metric: str = "mpjpe") -> list:
        return [s[f"{metric}/{feed}/{seed}"][average] for seed in range(seeds)]

    def ratio(feed: str) -> str:
        base = "sparse_clean" if feed.endswith("_clean") else "sparse"
        mine = values(feed, "actions")
        same = values(base, "actions", "mpjpe_fit" if feed.startswith("ground_truth") else "mpjpe")  # over the same frames
        return "-" if None in mine else f"{np.mean(mine) / np.mean(same):.2f}"

    head = ["lifter fed with", "MPJPE, mean of actions", "MPJPE, all frames", "PA-MPJPE, mean of actions",
            "PA-MPJPE, all frames", "ratio", "occluded", "not occluded", r"paper\*"]
    rows = []
    for name, label in FEEDS.items():
        errors = [number(values(name, average, m)) for m in ("mpjpe", "pa_mpjpe") for average in ("actions", "frames")]
        occluded = ["-", "-"] if name.endswith("_clean") else [number(values(name, a)) for a in ("occluded", "clear")]
        rows.append([label, *errors, ratio(name), *occluded, paper.get(name, "-")])
    return "\n\n".join([
        f"({kind}) Millimetres{f', mean ± standard deviation over {seeds} seeds' if seeds > 1 else ''}.",
        table(head, rows),
        "*ratio*: MPJPE (mean of actions) to that of (a); in clean rows, to clean sparse. *occluded*: MPJPE over the "
        f"{s['occluded']['frames']:.0%} of frames in which a joint is missing or has confidence below {LOW_CONF}.",
        note,
        f"**HiPART (b) is at {ratio('generated')} of sparse only (a)**; the plain regressor (d) at "
        f"{ratio('regressor')}, ground-truth points (c) at {ratio('ground_truth')}. The paper's ratio (b) : (a) on "
        "Human3.6M is 0.81.",
        *protocol_14(s, seeds),
        "MPJPE per action:",
        table(["action", *FEEDS.values()],
              per_action(s, lambda get: [number([get(f"mpjpe/{f}/{i}") for i in range(seeds)]) for f in FEEDS]))])


def protocol_14(s: dict, seeds: int) -> list[str]:
    """3DPW's usual protocol, if the data name its joints: 14 joints, poses moved to their pelvis, means over frames."""
    if "mpjpe_14/sparse/0" not in s:
        return []
    rows = [[label, *(number([s[f"{metric}_14/{name}/{seed}"]["frames"] for seed in range(seeds)])
                      for metric in ("mpjpe", "pa_mpjpe"))] for name, label in FEEDS.items()]
    head = ["lifter fed with", "MPJPE", "PA-MPJPE"]
    return ["14 joints, relative to the predicted pelvis, mean over all frames, mm:", table(head, rows)]


def missing_table(s: dict, seeds: int) -> str:
    """Joints that the detector gave and joints that it missed, apart; and the learned token against interpolation."""
    rows = []
    for name in ("sparse", "sparse interpolated", "generated", "generated interpolated", "regressor"):
        label = FEEDS[name.split()[0]] + (", missing joints interpolated" if "interpolated" in name else "")
        rows.append([label, *(number([s[f"{which}/{name}/{seed}"]["frames"] for seed in range(seeds)])
                              for which in ("seen", "missing"))])
    return table(["lifter fed with", "joints seen", "joints missing"], rows)


# What a 2D error can be of, in the order in which the error is taken apart.
SOURCES = {"input": "the input's own error, 17 joints", "floor": "tokenizer alone (floor)",
           "teacher": "HiARM, told the past", "generated": "HiARM, free running (b)", "regressor": "plain regressor (d)"}


def pixels(get, kind: str, sources) -> list[str]:
    """Cells `pixels (percent of standing height)`."""
    pairs = [(get(f"px/{kind}/{w}"), get(f"percent/{kind}/{w}")) for w in sources]
    return ["-" if px is None else f"{px:.1f} ({share:.1f} %)" for px, share in pairs]


def fine_pose_tables(s: dict) -> str:
    """Fig. 12 for one split: mean error of the 96 fine points per action, from detected and from clean input."""
    text = []
    for kind, sources in (("detected", list(SOURCES)), ("clean", list(SOURCES)[1:])):  # clean input has no error of its own
        rows = per_action(s, lambda get, kind=kind, sources=sources: pixels(get, kind, sources))
        text += [f"From {kind} input, px (% of standing height):", table(["action", *(SOURCES[w] for w in sources)], rows)]
    return "\n\n".join(text)


def error_table(summaries: dict[str, dict]) -> str:
    """Where the 2D error comes from: training, validation and test samples side by side, all frames."""
    rows = []
    for kind in ("detected", "clean"):
        columns = [pixels(lambda column, s=s: s[column]["frames"], kind, SOURCES) for s in summaries.values()]
        rows += [[f"{kind}: {label}", *cells] for label, *cells in zip(SOURCES.values(), *columns, strict=True)]
        rows += [[f"{kind}: {label} tokens right, told the past",
                  *(f"{number([s[f'accuracy_{t}/{kind}']['frames']])} %" for s in summaries.values())]
                 for t, label in (("s", "sparse"), ("d", "dense"))]
    return table(["px (% of standing height)", *summaries], [r for r in rows if r[0] != f"clean: {SOURCES['input']}"])


def codebook_table(reports: dict[str, dict], summaries: dict[str, dict], c: Config) -> str:
    """Tokenizer and codebooks, on all splits but train that have true dense and fine points."""
    rows = [[label, *(f"{r[key]:{form}}" for r in reports.values())] for label, key, form in (
        ("fine pose, px", "fine_px", ".1f"), ("dense pose, px", "dense_px", ".1f"),
        (f"perplexity of the {c.K_s} sparse codes", "perplexity_s", ".0f"),
        (f"perplexity of the {c.K_d} dense codes", "perplexity_d", ".0f"),
        ("dead sparse codes", "dead_s", ".1%"), ("dead dense codes", "dead_d", ".1%"))]
    rows.append(["action recognised by L_global's head",  # it cannot know the actions of `unseen`
                 *("-" if name == "unseen" else f"{r['action_accuracy']:.0%}" for name, r in reports.items())])
    rows.append(["alignment", *(f"{summaries[name]['alignment']['frames']:.2f}" for name in reports)])
    return table(["tokenizer", *reports], rows)


# ----------------------------------------------------------------------------------------------------------------------
# Joints hidden on purpose. The paper masks and crops images (Table 7) or covers them with patches (3DPW-AdvOcc, Zhang et al.
# 2023) and detects again. Here there are no images: joints under the cover go missing, the others keep what was detected. So
# these are stand-ins, called keypoint-*, and their numbers are not those of the published protocols.

HIDDEN_FEEDS = ("sparse", "generated", "regressor")
MASKS, CROPS, PATCHES = (0.0, 0.2, 0.4, 0.6, 0.8), (0.1, 0.2, 0.3, 0.4), (40, 80)
FEW = slice(0, None, 10)  # of the samples: there are hundreds of places for a patch
CROP_PX, STRIDE = 224, 10  # px of the person's box that PATCHES and the stride of their positions are stated in


def person_box(x_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joints [N, 17, 2] -> lower corner [N, 1, 2] and side [N, 1, 1] of a square around them, a fifth larger than them."""
    low, high = x_s.min(1, keepdims=True), x_s.max(1, keepdims=True)
    side = 1.2 * (high - low).max(-1, keepdims=True)
    return (low + high - side) / 2, side


def under_masks_and_crops(x_s: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Which joints are hidden [N, 17]: under a square of a share of the box's area, or beyond a cut at one of its sides."""
    low, side = person_box(x_s)
    at = (x_s - low) / side  # 0..1 in the box
    place, edge, axis = rng.random((len(at), 1, 2)), rng.random((len(at), 1)) < 0.5, rng.integers(2, size=len(at))
    along = at[np.arange(len(at)), :, axis]  # [N, 17]
    hidden = {}
    for share in MASKS:
        corner = place * (1 - share**0.5)
        hidden[f"keypoint-mask {share}"] = ((at >= corner) & (at < corner + share**0.5)).all(-1)
    for share in CROPS:
        hidden[f"keypoint-crop {share}"] = np.where(edge, along < share, along >= 1 - share)
    return hidden


def under_patches(x_s: np.ndarray, size: int) -> np.ndarray:
    """Which joints a patch of `size` px hides at each of its positions on the box: [N, P, 17]."""
    low, side = person_box(x_s)
    at = (x_s - low) / side * CROP_PX
    steps = np.minimum(np.arange(0, CROP_PX - size + STRIDE, STRIDE), CROP_PX - size)
    corner = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 1, 2)
    return ((at[:, None] >= corner) & (at[:, None] < corner + size)).all(-1)


@torch.no_grad()
def measure_hidden(split: Split, hipart: HiPART, regressor: Regressor, lifters: dict, rng) -> list[list[str]]:
    """Rows of a table: condition, share of joints missing, MPJPE of HIDDEN_FEEDS in mm over all joints; under patches, on
    every tenth sample, over the joints that are not covered, at the position that is worst for each lifter."""

    def errors(block: dict[str, Tensor], hidden: np.ndarray, name: str) -> np.ndarray:
        """Of each joint [n, 17], mm."""
        gone = torch.from_numpy(hidden).to(block["conf"].device)
        given = block | dict(x_s=hide_missing(block["x_s"], ~gone), conf=block["conf"] * ~gone)
        x = feed(name, given, hipart, regressor)
        y = torch.cat([lifters[name, 0](*p) for p in zip(x.split(1024), given["conf"].split(1024), strict=True)])
        return (y - block["y"]).norm(dim=-1).cpu().numpy().astype(np.float64)

    rows = []
    block, truth = (split.read(slice(0, split.n), clean=clean) for clean in (False, True))
    joints, conf = truth["x_s"].cpu().numpy(), block["conf"].cpu().numpy()
    for label, hidden in under_masks_and_crops(joints, rng).items():
        missing = (hidden | (conf == 0)).mean()
        rows.append([label, f"{missing:.0%}", *(f"{errors(block, hidden, name).mean():.1f}" for name in HIDDEN_FEEDS)])
    for size in PATCHES:
        hidden = under_patches(joints[FEW], size)
        n, p, _ = hidden.shape
        sample, code = np.divmod(np.unique(np.arange(n)[:, None] << 17 | (hidden << np.arange(17)).sum(-1)), 1 << 17)
        covers = code[:, None] >> np.arange(17) & 1 == 1  # every distinct cover once
        repeated = {k: v[FEW][sample] for k, v in block.items()}
        cells = []
        for name in HIDDEN_FEEDS:
            worst = np.zeros(n)
            left = np.maximum((~covers).sum(1), 1)
            np.maximum.at(worst, sample, (errors(repeated, covers, name) * ~covers).sum(1) / left)
            cells.append(f"{worst.mean():.1f}")
        rows.append([f"keypoint-AdvOcc@{size}, worst of {p} places", "-", *cells])
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The run


def open_run(args: argparse.Namespace) -> Run:
    """The run that --name, --data and --device point to."""
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda needs a GPU that torch can see, and there is none: leave --device out")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Run(Path("runs") / args.name, Config(), device, data=args.data)


def load_lifters(run: Run, seeds: int) -> tuple[dict, dict[str, dict]]:
    """All lifters {(feed, seed): model}, and of every checkpoint {file stem: {config, seconds}}."""
    stems = {f"stage3_{name}_{seed}": (name, seed) for seed in range(seeds) for name in FEEDS}
    lifters, about = {}, {}
    for stem in ("stage1", "stage2", "regressor", *stems):
        if stem in stems and stems[stem][1] and not (run.path / f"{stem}.pt").exists():
            again = f"python train.py --name {run.path.name} --data {run.data} --stage 3 --seeds {seeds} --resume"
            stop(f"{run.path} has no {stem}.pt: run `{again}` with the options of the first seed")
        saved = load_finished(run, stem)
        about[stem] = dict(config=saved["config"], seconds=saved["seconds"])
        if stem in stems:
            model = new_lifter(Config(**saved["config"]), stems[stem][0]).to(run.device)
            model.load_state_dict(saved["model"])
            lifters[stems[stem]] = model.eval().requires_grad_(False)
    return lifters, about


def paper_mpjpe(meta: dict) -> dict[str, str]:
    """The paper's numbers to set beside ours: on Human3.6M they depend on the detector."""
    detector = meta["sources"]["2D joints"] if meta.get("source") == "h36m" else "cpn"
    known = {"_gt": {"sparse": "37.6", "generated": "28.3"}, "_sh_": {"generated": "49.3"}, "cpn": PAPER_MPJPE}
    return next((numbers for part, numbers in known.items() if part in detector), {})


def describe(run: Run, about: dict[str, dict], sizes: dict[str, str], seeds: int) -> str:
    """What a reader must know to judge the tables, as a list."""
    changed = []
    for key, default in vars(Config()).items():
        values = dict.fromkeys(a["config"].get(key, default) for a in about.values())
        if list(values) != [default]:
            changed.append(f"{key} {' or '.join(map(str, values))} ({default})")

    def seconds(start: str) -> str:
        return f"{sum(a['seconds'] for stem, a in about.items() if stem.startswith(start)):.0f} s"

    gpu = f"{torch.cuda.get_device_name(run.device)}, " if run.device.type == "cuda" else ""
    small = "No accuracy of stages 2 and 3 is promised for the preset `quick`.\n- " if run.path.name == "quick" else ""
    return (f"- {small}model: the paper's `Config()`, but for " + (", ".join(changed) + " (in brackets the paper's)"
                                                                   if changed else "nothing")
            + f"\n- data: {run.data}, samples: " + ", ".join(f"{name} {n}" for name, n in sizes.items())
            + f"\n- training: stage 1 {seconds('stage1')}, stage 2 {seconds('stage2')}, regressor of (d) "
            f"{seconds('regressor')}, {seeds * len(FEEDS)} lifters {seconds('stage3')}"
            f"\n- evaluated {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC on {run.device} ({gpu}"
            f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads), torch {torch.__version__}, "
            f"Python {platform.python_version()}")


def write(path: Path, text: str) -> None:
    """Beside and renamed: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", default="standard", help="the run, runs/NAME")
    p.add_argument("--data", default="data/demo", help="folder of the data set")
    p.add_argument("--seeds", type=int, default=1, help="lifters per feed")
    p.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    p.add_argument("--occlusion", action="store_true", help="instead: joints of the test split hidden on purpose")
    args = p.parse_args()
    if args.seeds < 1 or (args.occlusion and args.seeds > 1):
        stop(f"--seeds must be at least 1, and 1 with --occlusion, found {args.seeds}")
    run = open_run(args)
    hipart, regressor, (lifters, about) = load_hipart(run), load_regressor(run), load_lifters(run, args.seeds)
    trained = load_finished(run, "stage1")["run"]
    at = "" if Path(trained["data"]).name == Path(run.data).name else f"_{Path(run.data).name}"
    if args.occlusion:
        split = Split(run.data, "test", run.device, limit=2500)
        rows = measure_hidden(split, hipart, regressor, lifters, run.rng(6))
        text = table(["MPJPE, mm", "joints missing", *(FEEDS[name] for name in HIDDEN_FEEDS)], rows)
        text = (f"Joints hidden on purpose, {split.n} samples of {run.data}, test; under patches every tenth of them, and "
                "only joints that are not covered count. Stand-ins at keypoint level: the published protocols hide pixels "
                f"and detect again.\n\n{text}\n")
        print(text)
        write(run.path / f"occlusion{at}.md", text)
        return
    test = run.split("test")  # opening a split reads all of it: once
    meta = test.meta
    splits = {name: test if name == "test" else run.split(name, fitted=name == "train") for name in meta["splits"]}
    sizes = {name: str(split.n) for name, split in splits.items()}
    if trained["limit"] and "train" in sizes:
        sizes["train"] = f"{trained['limit']} of {sizes['train']}"
    header = describe(run, about, sizes, args.seeds)
    if meta.get("source") == "h36m":
        part = meta["splits"]["train"]
        header += (f"\n- input: {meta['sources']['2D joints']}; training on {part['about']}: {part['n']} samples, but the "
                   f"{part['fits']} with true points for stages 1 and 2, (d)'s regressor and the lifters of (c), (e) and "
                   "clean + ground truth, which take as many steps as the others; training drops joints, testing does not")
    tested = {name: meta["splits"][name].get("about", SPLITS.get(name)) for name in splits if name not in ("train", "val")}
    if "train" in splits:  # as many samples as there are to validate on
        splits["train"] = splits["train"].spread(min(splits["train"].n, splits["val"].n))
    summaries = {}
    for name, split in splits.items():
        print(f"measuring {name}: {split.n} samples", flush=True)
        fresh = run.rng(5) if name == "train" and meta["noise"] else None
        rows = measure(split, hipart, regressor, lifters if name in tested else {}, fresh)
        summaries[name] = summarize(rows, split.meta["actions"])

    def in_frame(block: dict[str, Tensor]) -> dict[str, Tensor]:
        pelvis = detected_pelvis(block["x_s"], block["conf"])
        return {k: to_model_frame(block[k], pelvis) for k in ("x_f", "x_d")} | dict(a=block["action"])

    fitted = {name: split.with_fit() for name, split in splits.items() if name != "train"}
    reports = {name: tokenizer_report(hipart.msst, split, in_frame) for name, split in fitted.items() if split.n}
    sections = [f"# Evaluation of {run.path}", header]
    for name, kind in tested.items():
        fits = meta["splits"][name].get("fits", splits[name].n)
        if fits < splits[name].n:
            kind += (f"; {fits} of {splits[name].n} samples have true dense and fine points: what needs them is their mean, "
                     "and its ratio is to the same samples")
        note = SAME_DATA_NOTE if meta.get("source") == "h36m" else PAPER_NOTE
        sections += [f"## 3D error on `{name}`", lifting_tables(summaries[name], args.seeds, kind, note, paper_mpjpe(meta)),
                     "Joints that the detector gave and joints that it missed, mm, mean over frames. A missing joint is a "
                     "learned token; *interpolated*: the same models are given the mean of its neighbours instead.",
                     missing_table(summaries[name], args.seeds)]
    sections += ["## Where the 2D error comes from", error_table(summaries),
                 "Mean error of the 96 fine points over all frames. *train*: as many of its poses as val has, under a fresh "
                 "draw of detections if they are simulated; all stages know these poses. *told the past*: every token is "
                 "chosen given the true tokens before it (teacher forcing)."]
    for name, kind in tested.items():
        sections += [f"## 2D error of the fine pose on `{name}` ({kind})", fine_pose_tables(summaries[name])]
    if reports:
        sections += ["## Tokenizer and codebooks", codebook_table(reports, summaries, hipart.config),
                     "Perplexity and dead codes (never used) are taken over the whole split. *alignment*: mean cosine of a "
                     "sparse embedding with the mean dense embedding of its own part, minus that with the other parts."]
    text = "\n\n".join(sections) + "\n"
    print("\n" + text)
    write(run.path / f"table{at}.md", text)
    numbers = dict(run=args.name, about=header, training=about, splits=summaries, codebooks=reports)
    write(run.path / f"evaluation{at}.json", json.dumps(numbers, indent=1))
    print(f"written: {run.path}/table{at}.md, {run.path}/evaluation{at}.json")


if __name__ == "__main__":
    main()
