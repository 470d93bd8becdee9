"""Evaluate a run: how well it rebuilds, densifies (2D) and lifts (3D) poses it never trained on.

    python evaluate.py                          # runs/standard on data/demo
    python evaluate.py --name quick --seeds 3   # mean and spread over the lifters of three seeds
    python evaluate.py --name quick quick_1     # the same over runs that have been evaluated
    python evaluate.py --occlusion              # joints hidden on purpose: like 3DPW-AdvOcc
    python evaluate.py --temporal --data data/sequences     # lifters of sequences
    torchrun --nproc_per_node=2 evaluate.py     # samples shared out over two processes

Prints a short table. The full report goes to runs/NAME/table.md, and every number behind it to
runs/NAME/evaluation.json. On other data than the run's own (by the name of its folder) both names
end with that of the data. A run gets the tables of the stages that it has been trained for:

    stage 1   how well the tokenizer rebuilds true poses, and how it uses its codebooks
    stage 2   where the error of generated 2D poses comes from                     Fig. 12
    stage 3   3D errors for every input of the lifter, per action                  Table 1
              the same with lifters of sequences (--temporal)                      Tables 6 and 10

It goes one way: `measure` gives every sample of a split a row of numbers, `summarize` averages
them, and tables are text.
"""

import argparse
import json
import signal
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while modules are imported says nothing
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from baselines import Regressor
from checkpoints import WEIGHTS, Run, choose_device, is_finished, load_finished
from distributed import gather, part, rank
from hipart import (
    J_D,
    J_S,
    MSST,
    PARENTS,
    Config,
    HiPART,
    J,
    R,
    detected_pelvis,
    from_model_frame,
    hide_missing,
    to_model_frame,
)
from sources.dataset import Split, in_model_frame
from sources.files import read_json
from survival import Watch, stop, write
from tables import LOW_CONF, describe, report, short_table, summarize, table, temporal_table
from train import (
    INPUTS,
    TEMPORAL_INPUTS,
    Training,
    checkpoints_of,
    input_of,
    lift,
    lifter_input,
    load_hipart,
    load_lifter,
    load_msst,
    load_regressor,
    next_command,
    tokenizer_report,
    trained_stages,
)

# --------------------------------------------------------------------------------------------------
# Metrics


def mpjpe(pred, gt) -> np.ndarray:
    """Mean per-joint position error of every frame: pred, gt [N, J, 3] mm -> [N] mm.

    As in VideoPose3D ("protocol 1"), all J joints count, the pelvis too, and poses are compared as
    they are given. Both are relative to the pelvis already, so the true pelvis is 0; the predicted
    one is not moved onto it. ValueError for anything but two arrays of one such shape.
    """
    pred, gt = _poses(pred, gt)
    return np.linalg.norm(pred - gt, axis=-1).mean(-1)


def pa_mpjpe(pred, gt) -> np.ndarray:
    """MPJPE after the best similarity of every frame ("protocol 2", Procrustes): [N, J, 3] -> [N].

    Rotation, scale and shift are those of least squares; a reflection is not allowed. A prediction
    that is one single point has no orientation or size to adjust: it is shifted only.
    """
    pred, gt = _poses(pred, gt)
    centre = gt.mean(1, keepdims=True)
    p, g = pred - pred.mean(1, keepdims=True), gt - centre
    size_p, size_g = (np.maximum(np.linalg.norm(a, axis=(1, 2), keepdims=True), 1e-9)
                      for a in (p, g))
    u, s, vt = np.linalg.svd((p / size_p).transpose(0, 2, 1) @ (g / size_g))  # u, vt [N, 3, 3]
    # Where the best orthogonal map is a reflection (-1), the best rotation is the same map with
    # its weakest axis turned round.
    sign = np.sign(np.linalg.det(u @ vt))
    u[:, :, -1] *= sign[:, None]
    s[:, -1] *= sign
    scale = s.sum(-1)[:, None, None] * size_g / size_p
    return mpjpe(scale * p @ (u @ vt) + centre, gt)


def _poses(pred, gt) -> tuple[np.ndarray, np.ndarray]:
    pred, gt = np.asarray(pred, np.float64), np.asarray(gt, np.float64)
    if pred.shape != gt.shape or pred.ndim != 3 or pred.shape[-1] != 3:
        raise ValueError("expected two arrays of one shape [N, J, 3], "
                         f"found {list(pred.shape)} and {list(gt.shape)}")
    if not (np.isfinite(pred).all() and np.isfinite(gt).all()):
        raise ValueError("expected finite poses, found NaN or infinite coordinates")
    return pred, gt


def part_cosines(zh_s: Tensor, zh_d: Tensor) -> Tensor:
    """Cosines of sparse embeddings zh_s [B, 16, D] with the mean dense embeddings of all parts,
    zh_d [B, 48, D] -> [B, 16, 16], as L_local (Eq. 3) compares them."""
    mean_d = F.normalize(zh_d.unflatten(1, (J_S, R)).mean(2), dim=-1)
    return F.normalize(zh_s, dim=-1) @ mean_d.transpose(1, 2)


def alignment(zh_s: Tensor, zh_d: Tensor) -> Tensor:
    """How much closer a sparse token is to its own part than to the others: zh_s [B, 16, D],
    zh_d [B, 48, D] -> [B].

    The mean cosine of a quantized sparse embedding with the mean dense embedding of its own part
    (what L_local, Eq. 3, pulls together), minus the mean cosine with those of the other 15 parts
    of the same pose. 0: not tied at all; 2 at the very most.
    """
    cosine = part_cosines(zh_s, zh_d)
    own = cosine.diagonal(dim1=1, dim2=2).mean(-1)
    return own - (cosine.sum((1, 2)) / J_S - own) / (J_S - 1)


# --------------------------------------------------------------------------------------------------
# Measuring: a number per sample


@dataclass
class Models:
    """What a run has trained so far, frozen. hipart is there from stage 2 on; the regressor and
    the lifters, by input and seed, are there from stage 3 on."""

    msst: MSST
    hipart: HiPART | None = None
    regressor: Regressor | None = None
    lifters: dict[tuple[str, int], nn.Module] = field(default_factory=dict)


@torch.no_grad()
def measure(split: Split, models: Models, rng=None) -> dict[str, np.ndarray]:
    """One number per sample for everything that the tables show: {column: [N]}.

    action, occluded, alignment
    px/KIND/SOURCE           mean 2D error in pixels; KIND is detected (drawn afresh from `rng` if
                             it is given) or clean, SOURCE as in SOURCES
    percent/KIND/SOURCE      the same in percent of the person's standing height
    accuracy_s/KIND          teacher-forced token accuracy in percent; accuracy_d/KIND alike
    mpjpe/INPUT/SEED         mm, for every lifter; pa_mpjpe/INPUT/SEED alike
    mpjpe_with_mesh/...      MPJPE of the sparse inputs, only where there is true dense and fine
    mpjpe_14/INPUT/SEED      mm, over the data's joints_14 if it names them, with the predicted
                             pelvis moved onto the true one; pa_mpjpe_14/INPUT/SEED alike
    visible/INPUT/SEED       mm, mean over the joints that the detector gave; missing/INPUT/SEED
                             over those that it missed. INPUT is also "sparse_long interpolated"
                             and "generated interpolated"

    What needs true dense and fine points is NaN for samples without.
    """
    rows = measure_kind("detected", split, models, rng)
    if models.hipart:
        rows |= measure_kind("clean", split, models)
    return rows


def measure_kind(kind: str, split: Split, models: Models, rng=None) -> dict[str, np.ndarray]:
    """The columns of `measure` that come from detected poses, or from clean ones."""
    parts, clean = defaultdict(list), kind == "clean"
    for pair in zip(split.blocks(rng, clean), split.blocks(clean=True), strict=True):
        block, truth = ({k: v[part(len(v))] for k, v in b.items()} for b in pair)
        for rows in gather(measure_block(kind, block, truth, split, models)):
            for name, values in rows.items():
                parts[name].append(values)
    return {name: np.concatenate(values) for name, values in parts.items()}


def measure_block(kind: str, block: dict[str, Tensor], truth: dict[str, Tensor], split: Split,
                  models: Models) -> dict[str, np.ndarray]:
    """The columns of one block. truth: the same samples with clean sparse poses."""
    rows = rows_of_samples(models.msst, block) if kind == "detected" else {}
    lifters = {key: lifter for key, lifter in models.lifters.items()
               if key[0].endswith("_clean") == (kind == "clean")}
    # Densifying is the slow part: once for all that looks at it.
    densifiers = ["generated"] * bool(models.hipart) + ["regressor"] * bool(models.regressor)
    points = {name: lifter_input(name, block, models.hipart, models.regressor)
              for name in {*densifiers, *(input_of(name) for name, _ in lifters)}}
    if models.hipart:
        fine = {name: points[name][:, J + J_D :] for name in densifiers}
        rows |= rows_2d(kind, block, truth, fine, split.w, models.hipart)
    for (name, seed), lifter in lifters.items():
        y = lift(lifter, points[input_of(name)], block["conf"], block["begins"]).cpu()
        rows |= rows_3d(name, seed, y, block, split.meta.get("joints_14"))
        if kind == "detected":
            rows |= rows_of_missing_joints(name, seed, y, block, models)
    return rows


def column(values, known: Tensor | None = None) -> np.ndarray:
    """One number per sample, NaN where it is not known."""
    values = values.cpu().numpy() if isinstance(values, Tensor) else values
    values = values.astype(np.float64)
    return values if known is None else np.where(known.cpu().numpy(), values, np.nan)


def rows_of_samples(msst: MSST, block: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """What a sample shows, and how the tokens of its true pose are tied to one another."""
    tied = [alignment(o["zh_s"], o["zh_d"])
            for o in map(msst, in_model_frame(block)["x_f"].split(1024))]
    return dict(action=column(block["action"]),
                occluded=column((block["conf"] < LOW_CONF).any(1)),
                alignment=column(torch.cat(tied), block["has_mesh"]))


def rows_2d(kind: str, block: dict[str, Tensor], truth: dict[str, Tensor],
            fine: dict[str, Tensor], width: int, hipart: HiPART) -> dict[str, np.ndarray]:
    """2D errors by their source (Fig. 12), and token accuracies. fine: generated fine poses
    {SOURCE: [n, 96, 2]}; width: of the image, px."""
    conf, has_mesh = block["conf"], block["has_mesh"]
    small = zip(*(block[k].split(256) for k in ("x_s", "conf", "x_f")), strict=True)
    forced = [teacher_forced(hipart, *parts) for parts in small]  # by 256: logits are large
    forced = {name: torch.cat([f[name] for f in forced]) for name in forced[0]}
    fine = fine | {name: forced[name] for name in ("tokenizer", "teacher_forced")}
    errors = {name: (x - block["x_f"]).norm(dim=-1).mean(-1) for name, x in fine.items()}
    visible = (conf > 0).to(conf)
    off = (block["x_s"] - truth["x_s"]).norm(dim=-1) * visible
    errors["input"] = off.sum(-1) / visible.sum(-1)
    rows = {}
    for source, error in errors.items():
        known, px = None if source == "input" else has_mesh, error * width / 2
        rows[f"px/{kind}/{source}"] = column(px, known)
        rows[f"percent/{kind}/{source}"] = column(px / block["height_px"] * 100, known)
    for name in ("accuracy_s", "accuracy_d"):
        rows[f"{name}/{kind}"] = column(forced[name], has_mesh)
    return rows


def teacher_forced(hipart: HiPART, x_s: Tensor, conf: Tensor, x_f: Tensor) -> dict[str, Tensor]:
    """Stages 1 and 2 given the truth: fine poses [B, 96, 2] and numbers [B].

    tokenizer: the true pose, encoded and decoded. Its error is the reconstruction error of the
    tokenizer, and no generated tokens can be expected to beat those of the truth.
    teacher_forced: HiARM's choice (the expected embedding if config.soft), given the true tokens
    of all earlier parts, and the true sparse token for dense ones. What free-running generation
    loses beyond this, it loses by building on its own errors.
    """
    msst, hiarm, pelvis = hipart.msst, hipart.hiarm, detected_pelvis(x_s, conf)
    o = msst(to_model_frame(x_f, pelvis))
    logits_s, logits_d = hiarm(to_model_frame(x_s, pelvis), o["q_s"], o["q_d"], conf)
    _, chosen = msst.decode_embeddings(hiarm.pick(logits_s, hiarm.C_s),
                                       hiarm.pick(logits_d, hiarm.C_d))
    right = {level: (logits.argmax(-1) == o[f"q_{level}"]).float().mean(-1) * 100
             for level, logits in (("s", logits_s), ("d", logits_d))}
    return dict(tokenizer=from_model_frame(o["x_f"], pelvis),
                teacher_forced=from_model_frame(chosen, pelvis),
                accuracy_s=right["s"], accuracy_d=right["d"])


def rows_3d(name: str, seed: int, y: Tensor, block: dict[str, Tensor],
            joints_14: list[int] | None) -> dict[str, np.ndarray]:
    """3D errors of one lifter: y [n, 17, 3] mm as predicted."""
    true, this = block["y"].cpu(), f"{name}/{seed}"
    known = block["has_mesh"] if input_of(name).startswith("ground_truth") else None
    rows = {f"mpjpe/{this}": column(mpjpe(y, true), known),
            f"pa_mpjpe/{this}": column(pa_mpjpe(y, true), known)}
    if input_of(name).startswith("sparse"):  # what inputs with ground truth are compared with
        rows[f"mpjpe_with_mesh/{this}"] = column(mpjpe(y, true), block["has_mesh"])
    if joints_14:
        pair = (y - y[:, :1])[:, joints_14], true[:, joints_14]
        rows[f"mpjpe_14/{this}"] = column(mpjpe(*pair), known)
        rows[f"pa_mpjpe_14/{this}"] = column(pa_mpjpe(*pair), known)
    return rows


def rows_of_missing_joints(name: str, seed: int, y: Tensor, block: dict[str, Tensor],
                           models: Models) -> dict[str, np.ndarray]:
    """3D errors of visible and of missing joints apart. The lifters of (b) and of (a) with as much
    time are also tried with missing joints interpolated, as if none were missing."""
    tried = {name: y}
    if name in ("sparse_long", "generated"):
        x_s, conf = block["x_s"], block["conf"]
        rows = (conf == 0).any(1)  # nothing changes for the others
        whole = dict(x_s=interpolate_missing(x_s, conf)[rows], conf=torch.ones_like(conf[rows]))
        guess = tried[f"{name} interpolated"] = y.clone()
        if rows.any():
            x = lifter_input(name, whole, models.hipart, models.regressor)
            guess[rows.cpu()] = lift(models.lifters[name, seed], x, whole["conf"]).cpu()
    true, visible, columns = block["y"].cpu(), block["conf"].cpu().numpy() > 0, {}
    for label, guess in tried.items():
        off = np.linalg.norm(np.float64(guess - true), axis=-1)  # [n, 17]
        columns[f"visible/{label}/{seed}"] = mean_where(off, visible)
        columns[f"missing/{label}/{seed}"] = mean_where(off, ~visible)
    return columns


def mean_where(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The mean over the last axis of what the mask picks; NaN where it picks nothing."""
    n = mask.sum(-1)
    return np.where(n, (values * mask).sum(-1) / np.maximum(n, 1), np.nan)


def interpolate_missing(x_s: Tensor, conf: Tensor) -> Tensor:
    """Missing joints (conf 0) as the mean of their neighbours in the skeleton, from the visible
    ones outwards: x_s [B, 17, 2]. This is what one does without a learned token. The ends of the
    skeleton repeat their parent; without any visible joint all stay 0."""
    near = torch.zeros(J, J)
    for j in range(1, J):
        near[j, PARENTS[j]] = near[PARENTS[j], j] = 1
    near, visible = near.to(x_s), conf > 0
    x = hide_missing(x_s, visible)
    for _ in range(J):
        n = near @ visible.to(x_s)[..., None]  # [B, 17, 1] neighbours that are there by now
        x = torch.where(visible[..., None], x, near @ x / n.clamp_min(1))
        visible = visible | (n[..., 0] > 0)
    return x


# --------------------------------------------------------------------------------------------------
# Joints hidden on purpose. The paper masks and crops images (Table 7) or covers them with patches
# (3DPW-AdvOcc, Zhang et al. 2023), and detects again. Here there are no images: joints under the
# cover go missing, and the others keep what was detected. So these are stand-ins, called
# keypoint-*, and their numbers are not those of the published protocols.

HIDDEN_INPUTS = ("sparse_long", "generated", "regressor")
MASKS, CROPS, PATCHES = (0.0, 0.2, 0.4, 0.6, 0.8), (0.1, 0.2, 0.3, 0.4), (40, 80)
FEW = slice(0, None, 10)  # of the samples: there are hundreds of places for a patch
CROP_PX, STRIDE = 224, 10  # px of the person's box in which PATCHES and their stride are stated


def person_box(x_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joints [N, 17, 2] -> lower corner [N, 1, 2] and side [N, 1, 1] of a square around them, a
    fifth larger than they are."""
    low, high = x_s.min(1, keepdims=True), x_s.max(1, keepdims=True)
    side = 1.2 * (high - low).max(-1, keepdims=True)
    return (low + high - side) / 2, side


def under_masks_and_crops(x_s: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Which joints are hidden [N, 17]: under a square of a share of the box's area, or beyond a cut
    at one of its sides."""
    low, side = person_box(x_s)
    at, n = (x_s - low) / side, len(x_s)  # 0..1 in the box
    place, edge = rng.random((n, 1, 2)), rng.random((n, 1)) < 0.5
    axis = rng.integers(2, size=n)
    along = at[np.arange(n), :, axis]  # [N, 17]
    hidden = {}
    for share in MASKS:
        corner = place * (1 - share**0.5)
        inside = (at >= corner) & (at < corner + share**0.5)
        hidden[f"keypoint-mask {share}"] = inside.all(-1)
    for share in CROPS:
        hidden[f"keypoint-crop {share}"] = np.where(edge, along < share, along >= 1 - share)
    return hidden


def under_patches(x_s: np.ndarray, size: int) -> np.ndarray:
    """Which joints a patch of `size` px hides at each of its P places on the box: [N, P, 17]."""
    low, side = person_box(x_s)
    at = ((x_s - low) / side * CROP_PX)[:, None]  # [N, 1, 17, 2]
    steps = np.minimum(np.arange(0, CROP_PX - size + STRIDE, STRIDE), CROP_PX - size)
    corner = np.stack(np.meshgrid(steps, steps), -1).reshape(-1, 1, 2)
    return ((at >= corner) & (at < corner + size)).all(-1)


def distinct_covers(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Many places of a patch hide the same joints: hidden [N, P, 17] -> the sample [M] and the
    hidden joints [M, 17] of every cover that differs."""
    n, places, _ = hidden.shape
    sample = np.repeat(np.arange(n), places)[:, None]
    covers = np.unique(np.concatenate([sample, hidden.reshape(-1, J)], 1), axis=0)
    return covers[:, 0], covers[:, 1:] == 1


@torch.no_grad()
def measure_hidden(split: Split, models: Models, rng) -> list[list[str]]:
    """Rows of a table: the condition, the share of joints missing, and the MPJPE of HIDDEN_INPUTS
    in mm. Under masks and crops all joints count. Under patches, on every tenth sample, those that
    are not covered count, at the place that is worst for each lifter."""
    block = split.read(slice(0, split.n))
    joints = split.read(slice(0, split.n), clean=True)["x_s"].cpu().numpy()
    missing, rows = block["conf"].cpu().numpy() == 0, []
    for label, hidden in under_masks_and_crops(joints, rng).items():
        cells = [f"{errors_under(hidden, block, name, models).mean():.1f}"
                 for name in HIDDEN_INPUTS]
        rows.append([label, f"{(hidden | missing).mean():.0%}", *cells])
    few = {name: values[FEW] for name, values in block.items()}
    for size in PATCHES:
        hidden = under_patches(joints[FEW], size)
        cells = [f"{worst_under(hidden, few, name, models):.1f}" for name in HIDDEN_INPUTS]
        label = f"keypoint-AdvOcc@{size}, worst of {hidden.shape[1]} places"
        rows.append([label, "-", *cells])
    return rows


def errors_under(hidden: np.ndarray, block: dict[str, Tensor], name: str,
                 models: Models) -> np.ndarray:
    """The 3D error of each joint [n, 17] in mm, with the hidden ones missing."""
    visible = ~torch.from_numpy(hidden).to(block["conf"].device)
    block = block | dict(x_s=hide_missing(block["x_s"], visible), conf=block["conf"] * visible)
    mine = {k: v[part(len(hidden))] for k, v in block.items()}
    x = lifter_input(name, mine, models.hipart, models.regressor)
    y = lift(models.lifters[name, 0], x, mine["conf"])
    off = (y - mine["y"]).norm(dim=-1).cpu().numpy().astype(np.float64)
    return np.concatenate(gather(off))


def worst_under(hidden: np.ndarray, block: dict[str, Tensor], name: str, models: Models) -> float:
    """The mean over samples of the error at the worst place of a patch, mm: hidden [n, P, 17]."""
    sample, covers = distinct_covers(hidden)
    repeated = {k: v[sample] for k, v in block.items()}
    errors = errors_under(covers, repeated, name, models) * ~covers
    worst = np.zeros(len(hidden))
    np.maximum.at(worst, sample, errors.sum(1) / np.maximum((~covers).sum(1), 1))
    return float(worst.mean())


def report_occlusion(run: Run, models: Models, at: str) -> None:
    """Print and write the table of --occlusion."""
    split = run.split("test").spread(2500)
    rows = measure_hidden(split, models, run.rng(6))
    head = ["MPJPE, mm", "joints missing", *(INPUTS[name] for name in HIDDEN_INPUTS)]
    if rank():
        return
    text = (f"Joints hidden on purpose, {split.n} samples of {run.data}, test; under patches every "
            "tenth of them, and only joints that are not covered count. Stand-ins at keypoint "
            "level: the published protocols hide pixels and detect again.\n\n"
            f"{table(head, rows)}\n")
    print(text)
    write(run.path / f"occlusion{at}.md", text)


# --------------------------------------------------------------------------------------------------
# Lifters of sequences


def report_temporal(run: Run, seeds: int, at: str) -> None:
    """Print and write the table of --temporal: lifters of sequences, and of single frames on the
    same samples, as many of the seeds as have been trained."""
    there = {path.stem.removeprefix("stage3_").rpartition("_")[0]
             for path in run.path.glob("stage3_*_*.pt")}
    kinds = {name.removesuffix(input_of(name)) for name in there} - {""}
    if not kinds:
        stop(f"{run.path} has no lifters of sequences: train some with `python train.py --name "
             f"{run.path.name} --stage 3 --lifter mixste --frames 27 --data data/sequences`")
    seeds_of = {name: [seed for seed in range(seeds) if is_finished(run, f"stage3_{name}_{seed}")]
                for kind in ("", *sorted(kinds)) for name in map(kind.__add__, TEMPORAL_INPUTS)}
    lifters = {(name, seed): load_lifter(run, name, seed)
               for name, of in seeds_of.items() for seed in of}
    splits = {name: split for name, split in open_splits(run, 1)[0].items() if name != "val"}
    splits["test"].begins()  # or one sentence, if these are no sequences
    hipart = load_hipart(run)
    models, rows = Models(hipart.msst, hipart, lifters=lifters), []
    summaries = {name: summarize(measure_kind("detected", split, models), split.meta["actions"])
                 for name, split in splits.items()}
    if rank():
        return
    for name, of in ((name, of) for name, of in seeds_of.items() if of):
        saved = [load_finished(run, f"stage3_{name}_{seed}") for seed in of]
        size = sum(p.numel() for p in lifters[name, of[0]].parameters())
        seconds = np.mean([s["seconds"] for s in saved])
        rows.append((name, of, size, seconds, saved[0]["run"]["data"]))
    text = (f"Lifters of sequences, {', '.join(f'{s.n} frames of {n}' for n, s in splits.items())} "
            f"({run.data}); MPJPE of every frame.\n\n{temporal_table(summaries, rows)}\n")
    print(text)
    write(run.path / f"temporal{at}.md", text)
    write(run.path / f"temporal{at}.json", json.dumps(dict(splits=summaries), indent=1))


# --------------------------------------------------------------------------------------------------
# The run


def open_run(name: str | None, device: str | None, data: str = Run.data, seeds: int = 1,
             stage_3: list[str] | None = None) -> tuple[Run, int]:
    """A run that has been trained, and how many of its stages are finished: 1 to 3 (see
    `trained_stages`). Without a name it is `standard`, or else what comes with the project."""
    path = Path("runs") / (name or "standard")
    if name is None and WEIGHTS.exists() and not path.exists():
        path = WEIGHTS
        print("The models are those that come with the project; --name takes your own.")
    run = Run(path, Config(), Training(), choose_device(device), data=data)
    stages = trained_stages(run, seeds, stage_3)
    if not stages:
        others = sorted(p.parent.name for p in Path("runs").glob("*/stage1.pt"))
        others = [other for other in others if other != name]
        hint = f", or choose one of runs/ with --name: {', '.join(others)}" if others else ""
        stop(f"{run.path} holds no stage that is trained: run `{next_command(run, 1)}`{hint}")
    if stages < 3 and trained_stages(run) == 3:
        # Tables without 3D would take the place of those that the run has.
        stop(f"{run.path} has not all lifters of {seeds} seeds: run "
             f"`{next_command(trained_on_own_data(run), 3, seeds)}` first")
    return run, stages


def trained_on_own_data(run: Run) -> Run:
    """The run with the data that it was trained on, which need not be those it is tried on."""
    return replace(run, data=load_finished(run, "stage1")["run"]["data"])


def of_data(run: Run) -> str:
    """What the names of a run's tables end with: "", or the name of other data than its own."""
    own = Path(trained_on_own_data(run).data).name
    return "" if own == Path(run.data).name else f"_{Path(run.data).name}"


def left_out(run: Run, stages: int, contents: dict[int, str], seeds: int = 1) -> str:
    """One sentence: what the stages that are not trained would add, and the command to go on."""
    missing = [f"{what} (stage {stage})" for stage, what in contents.items() if stage > stages]
    command = next_command(trained_on_own_data(run), stages + 1, seeds if stages == 2 else 1)
    return f"Left out: {' and '.join(missing)}; `{command}` trains the next stage."


def load_models(run: Run, stages: int, seeds: int) -> tuple[Models, dict[str, dict]]:
    """The models of the finished stages, and what their checkpoints say: {name: {config, training,
    seconds, samples}}; samples: how many it saw, each as often as it was seen."""
    about = {}
    for stage in range(1, stages + 1):
        for name in checkpoints_of(stage, seeds):
            saved = load_finished(run, name)
            about[name] = {key: saved[key] for key in ("config", "training", "seconds")}
            about[name]["samples"] = saved["step"] * saved["training"][f"batch_{stage}"]
    if stages == 1:
        return Models(load_msst(run)), about
    hipart = load_hipart(run)
    if stages == 2:
        return Models(hipart.msst, hipart), about
    lifters = {(name, seed): load_lifter(run, name, seed)
               for seed in range(seeds) for name in INPUTS}
    return Models(hipart.msst, hipart, load_regressor(run), lifters), about


def open_splits(run: Run, stages: int) -> tuple[dict[str, Split], dict[str, str]]:
    """The splits to measure, unseen motion before test, and the sizes of all of them, in words."""
    test = run.split("test")  # opening a split reads all of it: once
    names = sorted(test.meta["splits"], key=lambda name: name not in ("train", "val", "unseen"))
    splits = {name: test if name == "test" else run.split(name, has_mesh=name == "train")
              for name in names}
    sizes = {name: str(split.n) for name, split in splits.items()}
    if "train" in splits:
        limit = load_finished(run, "stage1")["training"]["limit"]
        sizes["train"] = f"{limit} of {sizes['train']}" if limit else sizes["train"]
        train = splits.pop("train")
        if stages > 1:  # as many samples as there are to validate on
            splits = {"train": train.spread(min(train.n, splits["val"].n))} | splits
    return splits, sizes


def table_over_runs(runs: list[Run]) -> str:
    """The short table as mean and spread over runs that have been evaluated. Of each run, the
    lifters of the first seed count."""
    splits, models, samples = defaultdict(dict), defaultdict(list), set()
    for i, run in enumerate(runs):
        path = run.path / f"evaluation{of_data(run)}.json"
        try:
            numbers = read_json(path)
            tested = {name: s for name, s in numbers["splits"].items()
                      if name not in ("train", "val")}
            short_table(tested, 1, numbers["training"])  # or something is missing
            samples.add(numbers["samples"])
            if len(samples) > 1:
                raise ValueError("other data")
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError):
            stop(f"{path} does not hold what the others do, the errors of all inputs of the lifter "
                 f"on the same data: make it with `python evaluate.py --name {run.path.name}`")
        for name, s in tested.items():
            splits[name] |= {key[:-1] + str(i): s[key] for key in s if key.endswith("/0")}
        for model, of in numbers["training"].items():
            models[model].append((of["seconds"], of["samples"]))
    about = {model: dict(zip(("seconds", "samples"), np.mean(both, 0), strict=True))
             for model, both in models.items()}
    return short_table(splits, len(runs), about)


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", default=["standard"], nargs="+",
                   help="the run, runs/NAME; of several, which have been evaluated: the main table "
                        "as mean and standard deviation")
    p.add_argument("--data", default=Run.data, help="folder of the data set")
    p.add_argument("--seeds", type=int, default=1, help="lifters for every input")
    p.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    p.add_argument("--occlusion", action="store_true",
                   help="instead: joints of the test split hidden on purpose")
    p.add_argument("--temporal", action="store_true",
                   help="instead: lifters of sequences, beside those of single frames")
    args = p.parse_args()
    if args.occlusion and args.temporal:
        stop("--occlusion and --temporal are two tables: ask for one of them")
    if args.seeds < 1 or (args.occlusion and args.seeds > 1):
        stop(f"--seeds must be at least 1, and 1 with --occlusion, found {args.seeds}")
    if len(args.name) > 1:
        if args.seeds > 1 or args.occlusion or args.temporal:
            stop("of several runs there is one table: leave --seeds, --occlusion and --temporal "
                 "out")
        runs = [Run(Path("runs") / name, Config(), Training(), torch.device("cpu"), data=args.data)
                for name in args.name]
        return print(f"Mean ± standard deviation over {', '.join(args.name)}; ratios and costs are "
                     f"of means.\n\n{table_over_runs(runs)}")
    if args.temporal:  # such a run may have no other lifters
        run, _ = open_run(args.name[0], args.device, args.data, stage_3=["stage2"])
        return report_temporal(run, args.seeds, of_data(run))
    run, stages = open_run(args.name[0], args.device, args.data, args.seeds)
    models, about = load_models(run, stages, args.seeds)
    at = of_data(run)
    if args.occlusion:
        if stages < 3:
            stop("--occlusion needs all three stages: go on with "
                 f"`{next_command(trained_on_own_data(run), stages + 1)}`")
        return report_occlusion(run, models, at)

    full = run.path / f"table{at}.md"
    if stages < 3 and full.exists() and "## 3D error" in full.read_text("utf-8", "replace"):
        stop(f"{full} has errors in 3D, and without all of stage 3 they would be lost: go on with "
             f"`{next_command(trained_on_own_data(run), stages + 1)}`, or move that file away")
    splits, sizes = open_splits(run, stages)
    meta = splits["test"].meta
    summaries, codebooks = {}, {}
    for name, split in tqdm(splits.items(), "measuring splits", leave=False, disable=rank() > 0):
        # Poses that training knows are shown under a detection that it does not know.
        fresh = run.rng(5) if name == "train" and meta["noise"] else None
        some = replace(models, lifters={}) if name in ("train", "val") else models
        summaries[name] = summarize(measure(split, some, fresh), meta["actions"])
        if name != "train" and split.with_mesh().n:
            codebooks[name] = tokenizer_report(models.msst, split.with_mesh())
    if stages == 1 and not codebooks:
        stop(f"no sample of {run.data} has true dense and fine points, and a tokenizer can be "
             f"tried on no other: go on with `{next_command(trained_on_own_data(run), 2)}`")
    if rank():
        return  # the first process has the numbers of all
    header = describe(run, about, sizes, meta)
    shown, text = report(f"# Evaluation of {run.path}\n\n{header}", meta, stages, args.seeds,
                         summaries, codebooks, models.msst.config, about)
    print(f"\n{shown}\n")
    if stages < 3:
        rest = left_out(run, stages, {2: "where the error of generated 2D poses comes from",
                                      3: "the errors in 3D"}, args.seeds)
        text += f"\n{rest}\n"
        print(rest)
    numbers = dict(run=run.path.name, about=header, samples=run.same_samples(), training=about,
                   splits=summaries, codebooks=codebooks)
    write(full, text)
    write(run.path / f"evaluation{at}.json", json.dumps(numbers, indent=1))
    print(f"The full report is {full}, and its numbers are in "
          f"{run.path}/evaluation{at}.json.")


if __name__ == "__main__":
    with Watch().listening():
        main()
