"""Train HiPART: data, stages 1 to 3, tables and figures.

    python train.py                          # everything, with the preset that suits this machine
    python train.py --preset standard        # quick | standard | paper
    python train.py --stage 1                # one stage; 2 and 3 need the stages before them
    python train.py --resume                 # go on where an interrupted run stopped
    python train.py --gcsab-blocks 2 --name shallow     # any field of hipart.Config

Stage 1 learns the tokenizer (MSST), stage 2 the transformer (HiARM), stage 3 the rivals' regressor and one lifter for
every kind of input ("feed") that evaluate.py compares. Everything lands in runs/NAME: log.jsonl has one line per epoch,
every checkpoint holds model, optimiser, step, random state and config, and is written beside and renamed.
"""

import argparse
import copy
import dataclasses
import hashlib
import json
import math
import os
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hipart import (
    J_D,
    J_S,
    SCALE,
    Config,
    HiPART,
    J,
    MLPLifter,
    Regressor,
    SpatialLifter,
    detected_pelvis,
    lifting_features,
    normalize_screen,
    to_model_frame,
)
from prepare_data import detect, drop_joints, load

# The same three stages everywhere. The small presets shrink width, depth, codebooks, samples and epochs, take the lifter
# that a CPU can afford, and turn on what goes beyond the paper in HiARM (condition, soft). `paper` is Config() but for
# one number: the paper's 20 epochs of stage 1 are for 38 times the samples of the default data.
SMALL = dict(D=64, K_s=512, K_d=512, encoder_blocks=2, encoder_width=64, decoder_width=64, lr_1=2e-3, ema_decay=0.98,
             width=96, mlp_ratio=2, gcsab_blocks=4, ph_blocks=1, dropout=0.0, lr_2=1e-3, condition="every", soft=True,
             epochs_soft=1, lifter="mlp", lifter_width=512, lifter_blocks=2, lr_3=4e-3, weight_decay_3=0.05,
             cosine_3=True, turn_3=0.5)
PRESETS = {
    "quick": SMALL | dict(limit=12_000, warmup_free=100, epochs_1=3, epochs_2=3, epochs_r=45, epochs_3=8, draws_3=2),
    "standard": SMALL | dict(epochs_1=6, epochs_2=5, epochs_r=80, epochs_3=36, draws_3=4),
    "paper": dict(epochs_1=40),
}
FEEDS = {  # name: (what the lifter is fed with, the letter of the README's table)
    "sparse": "a  detected sparse only",
    "generated": "b  sparse + generated dense + fine (HiPART)",
    "ground_truth": "c  sparse + ground-truth dense + fine (bound)",
    "regressor": "d  sparse + dense + fine from a plain regressor",
    "auxiliary": "e  sparse only, auxiliary loss on dense + fine",
    "sparse_clean": "-  clean sparse only",
    "ground_truth_clean": "-  clean sparse + ground-truth dense + fine",
}
NEED_FIT = ("ground_truth", "auxiliary", "ground_truth_clean")  # their training needs true dense and fine points
FOCAL = 2.29  # of all cameras here, in normalised image coordinates: Human3.6M's 1145 px on 1000 px images
BLOCK = 8192  # samples read, detected and moved to the device at once


# ----------------------------------------------------------------------------------------------------------------------
# Data


class Split:
    """One split of a data set, read in blocks of tensors. Poses come out in normalised image coordinates.

    limit: only so many samples, evenly spread (0: all); fitted: only those that have dense and fine points.
    """

    def __init__(self, data: str, name: str, device: torch.device, limit: int = 0, fitted: bool = False):
        try:
            self.arrays, self.meta = load(Path(data).name, name, Path(data).parent)
        except (ValueError, OSError) as e:
            stop(str(e))
        self.w, self.h = self.meta["image_size"]
        self.device, self.n = device, len(self.arrays["x_s"])
        self.rows = np.arange(self.n)
        chosen = self.with_fit() if fitted else self
        chosen = chosen.spread(limit) if limit else chosen
        self.rows, self.n = chosen.rows, chosen.n

    def _chosen(self, rows: np.ndarray) -> "Split":
        other = copy.copy(self)
        other.rows, other.n = rows, len(rows)
        return other

    def with_fit(self) -> "Split":
        """Only the samples that have dense and fine points."""
        return self._chosen(self.rows[self.arrays["fit"][self.rows]]) if "fit" in self.arrays else self

    def spread(self, n: int) -> "Split":
        """At most n samples, evenly spread."""
        n = min(n, self.n)
        return self._chosen(self.rows[np.arange(n) * self.n // max(n, 1)])

    def read(self, rows, rng: np.random.Generator | None = None, clean: bool = False) -> dict[str, Tensor]:
        """Samples `rows` as tensors: x_s [n, 17, 2], conf [n, 17], x_d, x_f, y [n, 17, 3] mm, action, height_px, fit [n].

        x_s is what the detector gives: the stored draw, or a fresh one if `rng` is given (of real detections: with fresh
        joint dropout), or the clean projection. x_d and x_f mean nothing where fit is False.
        """
        a = {k: np.array(v[self.rows[rows]]) for k, v in self.arrays.items()}
        a.setdefault("fit", np.ones(len(a["y"]), bool))
        if clean:
            a["conf"] = np.ones(a["x_s"].shape[:2], np.float32)
        elif rng is not None and self.meta["noise"]:
            a["x_s"], a["conf"] = detect(a["x_s"], a["height_px"], rng, self.meta["noise"])
        else:
            a["x_s"] = a["x_s_det"]
            if rng is not None:
                a["x_s"], a["conf"] = drop_joints(a["x_s"], a["conf"], a["height_px"], rng)
        names = ("x_s", "conf", "x_d", "x_f", "y", "action", "height_px", "fit")
        t = {k: torch.from_numpy(a[k]).to(self.device) for k in names}
        for k in ("x_s", "x_d", "x_f"):
            t[k] = normalize_screen(t[k], self.w, self.h)
        t["x_s"] = t["x_s"] * (t["conf"] > 0)[..., None]
        return t

    def blocks(self, rng: np.random.Generator | None = None, clean: bool = False, size: int = BLOCK):
        """All samples in order."""
        for start in range(0, self.n, size):
            yield self.read(slice(start, min(start + size, self.n)), rng, clean)

    def batches(self, size: int, rng: np.random.Generator | None, clean: bool = False, prepare=lambda block, rows: block):
        """One epoch of shuffled full batches, or one smaller batch if there are not enough samples for a full one; the
        order comes from torch's random state, and `prepare` sees each block once."""
        order = torch.randperm(self.n).numpy()
        for start in range(0, self.n, BLOCK):
            rows = np.sort(order[start : start + BLOCK])
            if start and len(rows) < size:
                return
            block = prepare(self.read(rows, rng, clean), rows)
            shuffled = torch.randperm(len(rows)).to(self.device)
            for i in range(0, len(rows) - size + 1, size) if len(rows) >= size else [0]:
                yield {k: v[shuffled[i : i + size]] for k, v in block.items()}

    def steps(self, size: int) -> int:
        return max(1, sum(min(BLOCK, self.n - start) // size for start in range(0, self.n, BLOCK)))

    def pixels(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean distance of normalised points, in pixels of the image."""
        return (a - b).norm(dim=-1).mean() * (self.w / 2)


# ----------------------------------------------------------------------------------------------------------------------
# One loop for all models


@dataclass
class Run:
    """Where a run writes, and what it was told."""

    path: Path
    config: Config
    device: torch.device
    seed: int = 0
    data: str = "data/demo"
    limit: int = 0  # training samples used; 0 = all
    resume: bool = False

    def identity(self) -> dict:
        """What must not change when a run resumes, beside its config."""
        return dict(seed=self.seed, data=self.data, limit=self.limit, samples=self.samples())

    def samples(self) -> str:
        """A name for the data set by all that its meta.json says, but for the versions of libraries."""
        meta = {k: v for k, v in json.loads(Path(self.data, "meta.json").read_text()).items() if k != "versions"}
        return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()[:16]

    def log(self, **row) -> None:
        with open(self.path / "log.jsonl", "a") as f:
            f.write(json.dumps({k: _rounded(v) for k, v in row.items()}) + "\n")

    def forget(self, model: str, epoch: int) -> None:
        """Drop log lines of epochs that never reached a checkpoint: a resumed run writes them again."""
        path = self.path / "log.jsonl"
        rows = path.read_text().splitlines() if path.exists() else []
        kept = [r for r in rows if json.loads(r)["model"] != model or json.loads(r)["epoch"] <= epoch]
        beside = path.with_suffix(".tmp")
        beside.write_text("".join(r + "\n" for r in kept))
        os.replace(beside, path)

    def split(self, name: str, fitted: bool = False) -> Split:
        return Split(self.data, name, self.device, self.limit if name == "train" else 0, fitted)

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers for the simulated detector, keyed by stage, seed and epoch: an epoch can be drawn again."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


def _rounded(v):
    if isinstance(v, dict):
        return {k: _rounded(x) for k, x in v.items()}
    return float(f"{float(v):.6g}") if isinstance(v, (float, Tensor)) else v


def stop(message: str) -> NoReturn:
    """The user's mistake, in one sentence, and exit status 2."""
    tqdm.write(message, file=sys.stderr)  # not glued to an open progress bar
    raise SystemExit(2)


def save_checkpoint(path: Path, **content) -> None:
    """torch.save beside and rename: a reader sees the old file or the new one, never half of one."""
    beside = path.with_suffix(".tmp")
    torch.save(content, beside)
    os.replace(beside, path)


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict:
    """A checkpoint of this project; one sentence and exit status 2 if it is missing or unreadable."""
    if not path.exists():
        stop(f"{path} is not there: {_how_to_make(path)}")
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as e:
        stop(f"{path} is not a readable checkpoint ({type(e).__name__}): delete it and {_how_to_make(path)}")
    fields, wanted = {f.name for f in dataclasses.fields(Config)}, {"model", "config", "epoch", "epochs"}
    if not isinstance(saved, dict) or not wanted <= set(saved) or set(saved["config"]) != fields:
        stop(f"{path} is not a checkpoint of this version of the project: delete it and {_how_to_make(path)}")
    return saved


def restore(module: nn.Module, saved: dict, path: Path) -> None:
    """load_state_dict, or one sentence if the sizes do not fit."""
    try:
        module.load_state_dict(saved["model"])
    except RuntimeError:
        stop(f"{path} has weights of other sizes than this config: use the options that it was trained with")


def load_finished(run: Run, name: str, same_data: bool = False) -> dict:
    """The checkpoint of an earlier stage, which must have run to its end; same_data: on the data of this run, too."""
    path = run.path / f"{name}.pt"
    saved = load_checkpoint(path, run.device)
    if saved["epoch"] < saved["epochs"]:
        stop(f"{path} is unfinished ({saved['epoch']} of {saved['epochs']} epochs): go on with --resume")
    if same_data and saved["run"].get("samples", run.samples()) != run.samples():
        stop(f"{path} was trained on other data than {run.data} holds now: train it again under another --name")
    return saved


def _how_to_make(path: Path) -> str:
    stage = {"stage1": 1, "stage2": 2}.get(path.stem, 3)
    return f"run `python train.py --name {path.parent.name} --stage {stage}` (and the options of that run) first"


def fit(run: Run, name: str, model: nn.Module, optimizer, epochs: int, lr_at, train: Split, size: int, batches, loss_of,
        validate, after_step=None) -> nn.Module:
    """Train `model` and keep runs/NAME/{name}.pt up to date; with run.resume go on where it stopped.

    lr_at(step, steps) -> factor on the learning rate; batches(epoch) -> iterator; loss_of(batch) -> (loss, terms, output);
    validate() -> dict for the log; after_step(step, batch, output) for codebooks.
    """
    path, per_epoch = run.path / f"{name}.pt", train.steps(size)
    base = [g["lr"] for g in optimizer.param_groups]
    first, step, spent = 0, 0, 0.0
    if path.exists() and run.resume:
        saved = load_checkpoint(path, run.device)
        if saved["config"] != dataclasses.asdict(run.config) or saved.get("run") != run.identity():
            stop(f"{path} was trained with other options: resume with the same ones, or choose another --name")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        set_random_state(saved["random"])
        first, step, spent = saved["epoch"], saved["step"], saved["seconds"]
        run.forget(name, first)
    elif path.exists():
        stop(f"{path} exists already: add --resume to go on, or choose another --name")
    for epoch in range(first, epochs):
        began, sums = time.perf_counter(), {}
        model.train()
        bar = tqdm(batches(epoch), total=per_epoch, desc=f"{name} {epoch + 1}/{epochs}", leave=False, mininterval=1)
        for batch in bar:
            for group, lr in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = lr * lr_at(step, per_epoch * epochs)
            try:
                loss, terms, output = loss_of(batch)
            except ValueError as e:  # nearest_code refuses NaN; on a GPU it gives an index that the look-up refuses
                stop(f"{name}, step {step}: {e}; try a lower learning rate")
            except RuntimeError as e:
                if "device-side assert" not in str(e):
                    raise
                stop(f"{name}, step {step}: a value became infinite or NaN; try a lower learning rate")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if after_step:
                after_step(step, batch, output)
            step += 1
            for k, v in terms.items():
                sums[k] = sums.get(k, 0.0) + v
            if step % 20 == 0:
                bar.set_postfix({k: f"{float(v):.3g}" for k, v in terms.items()})
        if not all(math.isfinite(float(v)) for v in sums.values()):
            stop(f"{name}: the loss became infinite or NaN in epoch {epoch + 1}; try a lower learning rate")
        model.eval()
        with torch.no_grad():
            result = validate()
        spent += time.perf_counter() - began
        row = dict(model=name, epoch=epoch + 1, steps=step, seconds=spent, lr=optimizer.param_groups[0]["lr"],
                   train={k: v / per_epoch for k, v in sums.items()}, val=result)
        run.log(**row)
        print(f"{name} {epoch + 1}/{epochs}  {spent:.0f} s  " + "  ".join(f"{k} {float(v):.4g}" for k, v in result.items()),
              flush=True)
        save_checkpoint(path, model=model.state_dict(), optimizer=optimizer.state_dict(), random=random_state(),
                        config=dataclasses.asdict(run.config), run=run.identity(), epochs=epochs, epoch=epoch + 1, step=step,
                        seconds=spent,
                        val={k: float(v) for k, v in result.items()})
    return model.eval()


def random_state() -> dict:
    return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])


def warmup_cosine(warmup: int):
    """Linear warm-up over `warmup` steps (at most a tenth of them), then half a cosine down to zero."""

    def factor(step: int, steps: int) -> float:
        rise = max(1, min(warmup, steps // 10))
        return min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))))

    return factor


def adamw(model: nn.Module, lr: float, weight_decay: float, device: torch.device):
    """AdamW with weight decay on matrices only; biases and norms go without."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


# ----------------------------------------------------------------------------------------------------------------------
# Stage 1


def stage_1(run: Run):
    """The tokenizer. It sees no detection, yet its frame is a detected pelvis: so the shift is one that a detector gives."""
    c, train, val = run.config, run.split("train", fitted=True), run.split("val")
    if len(train.meta["actions"]) > c.n_actions:
        n = len(train.meta["actions"])
        stop(f"{run.data} has {n} actions, and the model is made for {c.n_actions}: add --n_actions {n}")
    steps = c.epochs_1 * train.steps(c.batch_1)
    if steps <= c.warmup_free:
        stop(f"stage 1 has {steps} steps, and the codebooks begin only after --warmup_free {c.warmup_free}: train longer")
    if train.n * J_S < c.K_s or train.n * J_D < c.K_d:
        stop(f"{train.n} training samples are too few to start {c.K_s} and {c.K_d} codes: lower --K_s and --K_d")
    torch.manual_seed(run.seed)
    model = HiPART(c).msst.to(run.device)

    def in_frame(block, rows=None):
        pelvis = detected_pelvis(block["x_s"], block["conf"])
        return dict(x_f=to_model_frame(block["x_f"], pelvis), x_d=to_model_frame(block["x_d"], pelvis), a=block["action"])

    def loss_of(b):
        return model.loss(b["x_f"], b["x_d"], b["a"])

    def after_step(step, batch, output):
        model.update_codebooks(output)
        if step + 1 == max(1, c.warmup_free):
            rows = torch.randperm(train.n)[: 8 * max(c.K_s, c.K_d)].sort().values.numpy()
            model.initialize_codebooks(in_frame(train.read(rows, run.rng(1, 10**6)))["x_f"], c.batch_1)

    def validate():
        return tokenizer_report(model, val, in_frame)

    return fit(run, "stage1", model, adamw(model, c.lr_1, c.weight_decay_1, run.device), c.epochs_1,
               warmup_cosine(c.warmup_1), train, c.batch_1,
               lambda epoch: train.batches(c.batch_1, run.rng(1, epoch), prepare=in_frame), loss_of, validate, after_step)


@torch.no_grad()
def tokenizer_report(model, split: Split, in_frame) -> dict:
    """Errors in pixels; perplexity and dead codes (unused over this whole split) of both codebooks; alignment."""
    c, sums, n = model.config, {}, 0
    used_s, used_d = torch.zeros(c.K_s, device=split.device), torch.zeros(c.K_d, device=split.device)
    for block in split.blocks():
        b = in_frame(block)
        _, terms, o = model.loss(b["x_f"], b["x_d"], b["a"])
        part = dict(fine_px=split.pixels(o["x_f"], b["x_f"]) * SCALE, dense_px=split.pixels(o["x_d"], b["x_d"]) * SCALE,
                    L_local=terms["local"], L_global=terms["action"],
                    action_accuracy=(o["p_A"].argmax(-1) == b["a"]).float().mean())
        for k, v in part.items():
            sums[k] = sums.get(k, 0.0) + float(v) * len(b["a"])
        n += len(b["a"])
        used_s += torch.bincount(o["q_s"].flatten(), minlength=c.K_s)
        used_d += torch.bincount(o["q_d"].flatten(), minlength=c.K_d)
    result = {k: v / n for k, v in sums.items()}
    for name, used in (("s", used_s), ("d", used_d)):
        p = used / used.sum()
        result[f"perplexity_{name}"] = float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))
        result[f"dead_{name}"] = float((used == 0).float().mean())
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Stage 2


def stage_2(run: Run):
    """HiARM on a fresh detection of every pose in every epoch; the tokenizer is frozen."""
    c, train, val = run.config, run.split("train", fitted=True), run.split("val")
    torch.manual_seed(run.seed)
    model = HiPART(c).to(run.device)
    restore(model.msst, load_finished(run, "stage1", same_data=True), run.path / "stage1.pt")
    model.msst.eval().requires_grad_(False)
    hiarm = model.hiarm
    hiarm.set_codebooks(model.msst)

    @torch.no_grad()
    def tokenized(block, rows=None):
        pelvis = detected_pelvis(block["x_s"], block["conf"])
        x_f = to_model_frame(block["x_f"], pelvis)
        pairs = [model.msst.encode(part) for part in x_f.split(1024)]
        return dict(x_s=to_model_frame(block["x_s"], pelvis), conf=block["conf"], x_f=x_f,
                    x_d=to_model_frame(block["x_d"], pelvis),
                    q_s=torch.cat([p[0] for p in pairs]), q_d=torch.cat([p[1] for p in pairs]))

    rollout = False

    def batches(epoch):
        nonlocal rollout
        rollout = epoch >= c.epochs_2 - c.epochs_soft
        return train.batches(c.batch_2, run.rng(2, epoch), prepare=tokenized)

    def loss_of(b):
        loss, terms = model.loss(**b, on_rollout=rollout)
        return loss, terms | dict(loss=loss.detach()), None

    def validate():
        sums = {}
        for block in val.blocks(size=512):
            loss, terms = model.loss(**tokenized(block))
            x_d, x_f = model.densify(block["x_s"], block["conf"])
            part = terms | dict(loss=loss, fine_px=val.pixels(x_f, block["x_f"]), dense_px=val.pixels(x_d, block["x_d"]))
            for k, v in part.items():
                sums[k] = sums.get(k, 0.0) + float(v) * len(x_f)
        return {k: v / val.n for k, v in sums.items()}

    fit(run, "stage2", hiarm, adamw(hiarm, c.lr_2, c.weight_decay_2, run.device), c.epochs_2, warmup_cosine(c.warmup_2),
        train, c.batch_2, batches, loss_of, validate)
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Stage 3: the rivals' regressor, the generated training set, one lifter per feed


def load_hipart(run: Run) -> HiPART:
    """Stages 1 and 2 of a run, frozen."""
    saved = {s: load_finished(run, f"stage{s}") for s in (1, 2)}
    if len({s["run"].get("samples") for s in saved.values()} - {None}) > 1:  # None: made before this was kept
        stop(f"{run.path}: stage 2 was trained on other data than stage1.pt; train it again under another --name")
    model = HiPART(Config(**saved[2]["config"])).to(run.device)
    restore(model.msst, saved[1], run.path / "stage1.pt")
    restore(model.hiarm, saved[2], run.path / "stage2.pt")
    if not torch.equal(model.hiarm.C_s, model.msst.Q_s.codebook):
        stop(f"{run.path}: stage 2 was trained on another tokenizer than stage1.pt; train it again under another --name")
    return model.eval().requires_grad_(False)


def load_regressor(run: Run) -> Regressor:
    saved = load_finished(run, "regressor")
    model = Regressor(saved["config"]["regressor_width"]).to(run.device)
    model.load_state_dict(saved["model"])
    return model.eval().requires_grad_(False)


def train_regressor(run: Run) -> Regressor:
    """Feed (d): x_s -> x_d, x_f by a plain MLP on the same detections. Mean distance is its loss and its score."""
    c, train, val = run.config, run.split("train", fitted=True), run.split("val")
    torch.manual_seed(run.seed)
    model = Regressor(c.regressor_width).to(run.device)

    def in_frame(block, rows=None):
        pelvis = detected_pelvis(block["x_s"], block["conf"])
        return dict(conf=block["conf"]) | {k: to_model_frame(block[k], pelvis) for k in ("x_s", "x_d", "x_f")}

    def loss_of(b):
        x_d, x_f = model(b["x_s"], b["conf"])
        loss = (x_d - b["x_d"]).norm(dim=-1).mean() + (x_f - b["x_f"]).norm(dim=-1).mean()
        return loss, dict(loss=loss.detach()), None

    def validate():
        errors = [(val.pixels(model.densify(b["x_s"], b["conf"])[1], b["x_f"]), len(b["x_s"])) for b in val.blocks()]
        return dict(fine_px=sum(float(e) * n for e, n in errors) / val.n)

    return fit(run, "regressor", model, torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True),
               c.epochs_r, warmup_cosine(500), train, c.batch_3,
               lambda epoch: train.batches(c.batch_3, run.rng(4, epoch), prepare=in_frame), loss_of, validate)


def densified_training_set(run: Run, model: HiPART, train: Split, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPART's own output on draw number `draw` of detections of the training set, made once and kept on disk:
    x [N, 161, 2] and conf [N, 17]. Stage 3 trains on what the model generates, not on ground truth."""
    path = run.path / f"generated_{draw}.npy"
    if (not path.exists() or path.stat().st_mtime < (run.path / "stage2.pt").stat().st_mtime
            or len(np.load(path, mmap_mode="r", allow_pickle=False)) != train.n):
        beside, done = path.with_suffix(".tmp"), 0
        out = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float32, shape=(train.n, 161 * 2 + 17))
        with tqdm(desc=f"densify {draw + 1}/{run.config.draws_3}", total=train.n, leave=False) as bar:
            for block in train.blocks(run.rng(3, draw), size=1024):
                x = torch.cat([block["x_s"], *model.densify(block["x_s"], block["conf"])], 1).flatten(1)
                out[done : done + len(x)] = torch.cat([x, block["conf"]], 1).cpu().numpy()
                done += len(x)
                bar.update(len(x))
        out.flush()
        os.replace(beside, path)
    both = np.load(path, mmap_mode="r", allow_pickle=False)
    return both[:, : 161 * 2].reshape(-1, 161, 2), both[:, 161 * 2 :]


@torch.no_grad()
def feed(name: str, block: dict[str, Tensor], hipart: HiPART | None, regressor: Regressor | None) -> Tensor:
    """What the lifter of feed `name` is given for a block of samples: [n, 17, 2] or [n, 161, 2]."""
    if name in ("sparse", "sparse_clean", "auxiliary"):
        return block["x_s"]
    if name in ("ground_truth", "ground_truth_clean"):
        return torch.cat([block["x_s"], block["x_d"], block["x_f"]], 1)
    model = hipart if name == "generated" else regressor
    parts = [model.densify(*p) for p in zip(block["x_s"].split(1024), block["conf"].split(1024), strict=True)]
    return torch.cat([block["x_s"], torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])], 1)


def turned(x: Tensor, y: Tensor, conf: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """What a camera sees that is turned by angle [n] rad about its ray to the pelvis: x [n, P, 2] in normalised image
    coordinates, y [n, 17, 3] mm. No point changes its distance, so this is exact, but for the lens' distortion."""
    seen = torch.cat([x / FOCAL, torch.ones_like(x[..., :1])], -1)  # [n, P, 3] rays
    pelvis = torch.cat([detected_pelvis(x[:, :J], conf) / FOCAL, torch.ones_like(x[:, :1, :1])], -1)  # [n, 1, 3]
    axis = nn.functional.normalize(pelvis, dim=-1) * angle[:, None, None]
    turn = torch.linalg.matrix_exp(torch.linalg.cross(axis, torch.eye(3).to(x)[None]))  # rows axis x e_i; for row vectors
    seen = seen @ turn
    return seen[..., :2] / seen[..., 2:] * FOCAL, y @ turn


def new_lifter(c: Config, name: str) -> nn.Module:
    points = 17 if name in ("sparse", "sparse_clean", "auxiliary") else 161
    if c.lifter == "spatial":
        return SpatialLifter(points, c.lifter_width, c.lifter_blocks, auxiliary=name == "auxiliary")
    return MLPLifter(points, c.lifter_width, c.lifter_blocks, auxiliary=name == "auxiliary")


def train_lifter(run: Run, name: str, seed: int) -> nn.Module:
    """One lifter for one feed: the same network, schedule and number of steps for all of them. Plain MPJPE loss."""
    c, val, everything = run.config, run.split("val"), run.split("train")
    train = everything.with_fit() if name in NEED_FIT else everything
    epochs = max(1, round(c.epochs_3 * everything.steps(c.batch_3) / train.steps(c.batch_3)))  # as many steps for all
    clean = name.endswith("_clean")
    hipart = load_hipart(run) if name == "generated" else None
    regressor = load_regressor(run) if name == "regressor" else None
    torch.manual_seed(1000 + seed)
    model = new_lifter(c, name).to(run.device)

    def fed(block, rows=None):
        # (e) is given all points; its lifter reads the sparse ones, its auxiliary loss the others
        x = feed("ground_truth" if name == "auxiliary" else name, block, hipart, regressor)
        return dict(x=x, y=block["y"], conf=block["conf"])

    def augmented(b):
        if not c.turn_3:
            return b
        n = len(b["x"])  # about every other pose stays as it is: people are mostly upright
        x, y = turned(b["x"], b["y"], b["conf"], (c.turn_3 * torch.randn(n) * torch.randint(2, (n,))).to(b["x"]))
        return b | dict(x=x, y=y)

    def batches(epoch):
        if name != "generated":
            return train.batches(c.batch_3, run.rng(3, seed, epoch), clean, prepare=lambda b, rows: augmented(fed(b)))
        x, conf = densified_training_set(run, hipart, train, epoch % c.draws_3)

        def stored(block, rows):
            return augmented(dict(y=block["y"], x=torch.from_numpy(x[rows]).to(run.device),
                                  conf=torch.from_numpy(conf[rows]).to(run.device)))

        return train.batches(c.batch_3, None, clean=True, prepare=stored)

    def auxiliary_target(b):
        _, dense, fine, _ = lifting_features(b["x"], b["conf"])
        dense, fine = (dense - model.mean_dense) / model.std_dense, (fine - model.mean_fine) / model.std_fine
        return torch.cat([dense.flatten(1), fine.flatten(1)], 1)

    def loss_of(b):
        x = b["x"][:, : model.n_points]
        if name == "auxiliary":
            y, guess = model(x, b["conf"], with_auxiliary=True)
            extra = (guess - auxiliary_target(b)).abs().mean()
        else:
            y, extra = model(x, b["conf"]), 0.0
        error = (y - b["y"]).norm(dim=-1).mean()
        return error / 100 + c.lambda_aux * extra, dict(mpjpe=error.detach()), None

    shown_val = [fed(block) for block in val.blocks(clean=clean)]  # densified once: the same in every epoch

    def validate():
        errors = []
        for b in shown_val:
            errors += [(model(x[:, : model.n_points], conf) - y).norm(dim=-1).mean(-1) for x, conf, y in
                       zip(b["x"].split(1024), b["conf"].split(1024), b["y"].split(1024), strict=True)]
        return dict(mpjpe=torch.cat(errors).mean())

    rows = np.sort(torch.randperm(train.n)[:BLOCK].numpy())
    shown = fed(train.read(rows, run.rng(3, seed, 10**6), clean))
    model.standardize(shown["x"], shown["y"], shown["conf"])
    lr_at = warmup_cosine(500) if c.cosine_3 else lambda step, _: 0.96 ** (step // everything.steps(c.batch_3) // 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr_3, weight_decay=c.weight_decay_3, fused=True)
    return fit(run, f"stage3_{name}_{seed}", model, optimizer, epochs, lr_at, train, c.batch_3, batches, loss_of, validate)


def stage_3(run: Run, seeds: int) -> None:
    load_hipart(run)  # say at once what is missing
    load_finished(run, "stage2", same_data=True)
    train_regressor(run)
    for seed in range(seeds):
        for name in FEEDS:
            train_lifter(run, name, seed)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="quick without a GPU, else paper")
    p.add_argument("--stage", type=int, choices=(1, 2, 3), help="one stage only; default: all, then tables and figures")
    p.add_argument("--name", help="runs/NAME; default: the preset")
    p.add_argument("--data", default="data/demo", help="folder of a prepared data set")
    p.add_argument("--limit", type=int, help="use only so many training samples")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--seeds", type=int, default=1, help="lifters per feed in stage 3")
    p.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoints of this run")
    group = p.add_argument_group("fields of hipart.Config (they override the preset)")
    for f in dataclasses.fields(Config):
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))  # either spelling
        if f.type is bool:
            group.add_argument(*names, dest=f.name, action=argparse.BooleanOptionalAction, default=None)
        else:
            group.add_argument(*names, dest=f.name, type=type(f.default), metavar=str(f.default))
    return p


def main() -> None:
    args = arguments().parse_args()
    if args.seeds < 1 or (args.limit or 0) < 0:
        stop(f"--seeds must be at least 1 and --limit at least 0, found {args.seeds} and {args.limit}")
    if args.device == "cuda" and not torch.cuda.is_available():
        stop("--device cuda needs a GPU that torch can see, and there is none: leave --device out")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    preset = args.preset or ("paper" if device.type == "cuda" else "quick")
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if getattr(args, f.name) is not None}
    options = PRESETS[preset] | given
    limit = options.pop("limit", 0) if args.limit is None else args.limit
    options.pop("limit", None)
    try:
        config = Config(**options)
    except ValueError as e:
        stop(str(e))
    run = Run(Path("runs") / (args.name or preset), config, device, args.seed, args.data, limit, args.resume)
    torch.set_float32_matmul_precision("high")
    print(f"preset {preset} on {device} ({torch.get_num_threads()} threads), torch {torch.__version__}: {run.path}")
    if not Path(args.data, "meta.json").exists():
        if args.data != "data/demo" or args.stage in (2, 3):
            stop(f"{args.data} holds no data set: make one with `python prepare_data.py` "
                             "(`python train.py --stage 1` does so by itself)")
        script("prepare_data.py")
    run.path.mkdir(parents=True, exist_ok=True)
    stages = [args.stage] if args.stage else [1, 2, 3]
    if 1 in stages:
        stage_1(run)
    if 2 in stages:
        stage_2(run)
    if 3 in stages:
        stage_3(run, args.seeds)
    if not args.stage:
        script("evaluate.py", "--name", run.path.name, "--data", args.data, "--seeds", str(args.seeds))
        script("sample.py", "--name", run.path.name, "--data", args.data)


def script(*command: str) -> None:
    """Run another script of this project as its user would."""
    print("$ python", *command, flush=True)
    if subprocess.run([sys.executable, Path(__file__).with_name(command[0]), *command[1:]]).returncode:
        stop(f"`python {' '.join(command)}` failed: see its message above")


if __name__ == "__main__":
    main()
