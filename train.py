"""Train HiPART: data, stages 1 to 3, tables and figures.

    python train.py                       # everything, with the preset that suits this machine
    python train.py --preset standard     # quick | standard | long | paper
    python train.py --stage 1             # one stage; 2 and 3 need the stages before them
    python train.py --resume              # go on where an interrupted run stopped
    python train.py --gcsab_blocks 2 --name shallow     # any field of Config or Training
    torchrun --nproc_per_node=2 train.py                # two processes share every batch
    python train.py --stage 3 --lifter mixste --frames 27 --data data/sequences    # or poseformer

Stage 1 learns the tokenizer (MSST) and stage 2 the transformer (HiARM). Stage 3 learns a plain
regressor for comparison, and one lifter for every *input* that evaluate.py compares. All of it goes
to runs/NAME (checkpoints.py says in what form). At the end, evaluate.py and sample.py show whatever
has been trained.
"""

import argparse
import dataclasses
import functools
import inspect
import os
import re
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while modules are imported says nothing
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from torch import Tensor, nn

from baselines import LIFTERS, OneLevel, Regressor, TemporalLifter, ThirdLevel, new_hipart
from checkpoints import (
    Run,
    build,
    choose_device,
    is_finished,
    load_checkpoint,
    load_finished,
    restore,
)
from distributed import data_parallel, from_first_, gather, mean, part, rank, sum_, wait, world_size
from hipart import J_D, J_F, J_S, MSST, SCALE, Config, HiPART, J, detected_pelvis
from sources.dataset import BLOCK, META_BYTES, Split, in_model_frame
from sources.files import read_json
from sources.windows import windows_for_all
from survival import alone_in, check_space, stop
from training_loop import Loop, adamw, every_4_epochs, in_two_phases, warmup_cosine


@dataclass(frozen=True)
class Training:
    """How the model is trained. The defaults are the paper's (appendix C) unless a comment says
    "ours". What the model is made of stands in `hipart.Config`."""

    limit: int = 0  # ours: so many training samples, evenly spread; 0 takes all
    # Stage 1: AdamW with a linear warm-up and a cosine decay
    warmup_free: int = 150  # ours: steps without quantization, before k-means sets the codebooks
    epochs_1: int = 20
    batch_1: int = 128
    lr_1: float = 1e-3
    weight_decay_1: float = 0.15
    warmup_1: int = 500  # steps of the warm-up
    # Stage 2: AdamW, the same schedule
    epochs_2: int = 50
    epochs_soft: int = 0  # ours: so many last epochs train on HiARM.one_pass, with a pose loss
    batch_2: int = 64
    lr_2: float = 5e-4
    weight_decay_2: float = 0.03
    warmup_2: int = 500
    # Stage 3: Adam, times 0.96 every 4 epochs
    lifter: str = "spatial"  # Fig. 11; "mlp" (Martinez et al. 2017) is small; poseformer, mixste
    frames: int = 1  # T, of windows that poseformer and mixste take; batch_3 is then of windows
    lifter_width: int = 96
    lifter_blocks: int = 12
    lifter_heads: int = 0  # of transformers; 0: as many as in the lifter's paper
    levels: str = "dense+fine"  # what a lifter sees: dense+fine, dense or fine (Table 5)
    epochs_3: int = 25
    passes_3: int = 1  # ours: how often a lifter trains on made points before they are made anew
    batch_3: int = 256
    lr_3: float = 1e-3
    weight_decay_3: float = 0.0  # on all parameters
    cosine_3: bool = False  # ours: warm-up and cosine decay instead
    turn_3: float = 0.0  # ours: standard deviation, in rad, by which training poses are turned
    epochs_equal: int = 0  # ours: of what trains as long as (b); 0: as many as take that time
    regressor_width: int = 1024

    def __post_init__(self):
        if self.lifter not in LIFTERS:
            raise ValueError(f"lifter must be one of {', '.join(LIFTERS)}, found {self.lifter!r}")
        kind = LIFTERS[self.lifter]
        own = inspect.signature(kind).parameters.get("heads")
        if own and self.lifter_width % (heads := self.lifter_heads or own.default):
            raise ValueError(f"lifter_width must be a multiple of lifter_heads {heads}, "
                             f"found {self.lifter_width}")
        if self.frames % 2 == 0 or (self.frames > 1) != issubclass(kind, TemporalLifter):
            raise ValueError("frames must be an odd number, above 1 for poseformer and mixste, and "
                             f"1 for spatial and mlp, found {self.frames} for {self.lifter}")
        levels = ("dense+fine", "dense", "fine") if self.frames == 1 else ("dense+fine",)
        levels += ("192", "dense+fine+192") * (self.lifter == "mlp")
        if self.levels not in levels:
            raise ValueError(f"levels must be one of {', '.join(levels)} for the {self.lifter} "
                             f"lifter, found {self.levels!r}")
        for name, value in vars(self).items():
            least = 0 if re.match("limit|warmup|epochs_soft|epochs_equal|lifter_heads", name) else 1
            kind = type(getattr(Training, name))
            if kind is int and value < least:
                raise ValueError(f"{name} must be at least {least}, found {value}")
            if kind is float and not 0 <= value <= 1e6:
                raise ValueError(f"{name} must be from 0 to 1e+06, found {value}")


# A preset is a pair of overrides, of Config and of Training. The small ones shrink width, depth,
# codebooks, samples and epochs, take a lifter that a CPU can afford, and switch on what goes beyond
# the paper in HiARM. `paper` has more epochs of stage 1: its 20 are for 38 times our samples.
SMALL_MODEL = dict(
    D=64, K_s=512, K_d=512, encoder_blocks=2, encoder_width=64, decoder_width=64, ema_decay=0.98,
    width=96, heads=4, mlp_ratio=2, gcsab_blocks=4, ph_blocks=1, dropout=0.0, condition="every",
    soft=True, soft_targets=2.0, history_dropout=0.5,
)  # fmt: skip
SMALL_TRAINING = dict(
    lr_1=2e-3, lr_2=1e-3, lifter="mlp", lifter_width=512, lifter_blocks=2,
    lr_3=4e-3, weight_decay_3=0.05, cosine_3=True, turn_3=0.5, passes_3=4,
)  # fmt: skip
QUICK = dict(limit=12_000, warmup_free=100, epochs_1=3, epochs_2=4, epochs_soft=2, epochs_3=3)
STANDARD = dict(epochs_1=6, epochs_2=8, epochs_soft=4, epochs_3=14)
LONG = STANDARD | dict(epochs_1=10, epochs_2=50, epochs_soft=25)  # 2 million samples of HiARM
PRESETS = {
    "quick": (SMALL_MODEL, SMALL_TRAINING | QUICK),
    "standard": (SMALL_MODEL, SMALL_TRAINING | STANDARD),
    "long": (SMALL_MODEL, SMALL_TRAINING | LONG),
    "paper": ({}, dict(epochs_1=40)),
}
# What a preset overrides for lifters that are transformers: the papers' sizes, or such as a CPU can
# afford. A window of T frames takes the memory of T samples, or more, so that batches are smaller.
LARGE = {
    "poseformer": dict(lifter_width=32, lifter_blocks=4, lr_3=2e-4),
    "mixste": dict(lifter_width=512, lifter_blocks=8, batch_3=8, lr_3=1e-4),
}
SMALL = {
    "spatial": dict(lifter_width=32, lifter_blocks=4, lifter_heads=2, batch_3=32, lr_3=1e-2),
    "poseformer": dict(lifter_width=16, lifter_blocks=2, lifter_heads=2, batch_3=16, lr_3=1e-3,
                       epochs_3=1, passes_3=1),  # of a window around every frame
    "mixste": dict(lifter_width=32, lifter_blocks=2, lifter_heads=2, batch_3=3, lr_3=3e-3,
                   passes_3=6),
}
LIFTER_SIZES = {name: LARGE if name == "paper" else SMALL for name in PRESETS}

INPUTS = {  # what a lifter is given, by name: its row in the tables
    "sparse": "a  sparse, as many samples as (b)",
    "sparse_long": "a  sparse, as much time as (b)",
    "generated": "b  sparse + generated dense + fine (HiPART)",
    "ground_truth": "c  sparse + ground-truth dense + fine (bound)",
    "regressor": "d  sparse + dense + fine from a plain regressor",
    "sparse_clean": "-  clean sparse",
    "ground_truth_clean": "-  clean sparse + ground-truth dense + fine",
}
TEMPORAL_INPUTS = ("sparse", "generated", "ground_truth")  # what lifters of sequences are given
NEED_MESH = ("ground_truth", "ground_truth_clean")  # they train on true dense and fine points
AS_LONG_AS = {  # lifters that train as long as these together, {} is the seed: equal to (b) in all
    "sparse_long": ("stage1", "stage2", "stage3_generated_{}"),
    "regressor": ("stage3_generated_{}",),  # and the regressor as long as stages 1 and 2
}
SMALL_FILES = 20 << 20  # bytes that the tables, figures and the log of a run take at most
FOCAL = 2.29  # of all cameras, in normalised image coordinates: 1145 px in images of 1000 px


# --------------------------------------------------------------------------------------------------
# What has been trained


def load_msst(run: Run) -> MSST:
    """The tokenizer of a run, frozen."""
    saved = load_finished(run, "stage1")
    return build(lambda: MSST(Config(**saved["config"])), saved, run.device)


def load_hipart(run: Run) -> HiPART:
    """Stages 1 and 2 of a run, frozen."""
    first, second = load_finished(run, "stage1"), load_finished(run, "stage2")
    again = "train it again under another --name"
    if first["run"]["samples"] != second["run"]["samples"]:
        stop(f"{run.path}: stage 2 was trained on other data than stage1.pt; {again}")
    both = {f"msst.{name}": value for name, value in first["model"].items()}
    both |= {f"hiarm.{name}": value for name, value in second["model"].items()}
    model = build(lambda: new_hipart(Config(**second["config"])), second | dict(model=both),
                  run.device)
    if not torch.equal(model.msst.Q_s.codebook, model.hiarm.C_s):
        stop(f"{run.path}: stage 2 was trained on another tokenizer than stage1.pt; {again}")
    return model


def check_motion(run: Run) -> None:
    """Stop unless stages 1 and 2 were trained on the data of the run, or on data that hold out the
    same bodies and the same motion, as data/demo does for data/sequences."""
    made = load_finished(run, "stage2")["run"]
    if made["samples"] == run.samples():
        return
    other = dataclasses.replace(run, data=made["data"])
    if other.samples() != made["samples"]:
        stop(f"{other.data} is not what stages 1 and 2 of {run.path} were trained on, and nobody "
             f"can tell what they know of {run.data}: put it back, or train another --name")
    keys = ("source", "sources", "seed", "actions", "unseen_actions", "subjects")
    one, two = ([read_json(Path(of.data, "meta.json"), META_BYTES).get(key) for key in keys]
                for of in (run, other))
    if one != two or None in one:
        stop(f"{run.data} has other people or other motion than {other.data} of stages 1 and 2, "
             "which may know its test: train all stages on these data, under another --name")


def load_regressor(run: Run) -> Regressor:
    """The plain regressor of a run, frozen."""
    saved = load_finished(run, "regressor")
    return build(lambda: Regressor(saved["training"]["regressor_width"]), saved, run.device)


def load_lifter(run: Run, name: str, seed: int = 0) -> nn.Module:
    """The lifter of one input, or of one of `lifter_names`, frozen."""
    saved = load_finished(run, f"stage3_{name}_{seed}")
    return build(lambda: new_lifter(Training(**saved["training"]), name), saved, run.device)


def lifter_names(t: Training) -> list[str]:
    """The lifters that stage 3 trains: by input, and those of sequences as mixste27_sparse."""
    sequences = [f"{t.lifter}{t.frames}_{name}" for name in TEMPORAL_INPUTS]
    return sequences if t.frames > 1 else [*INPUTS]


def input_of(name: str) -> str:
    """The input of a lifter of that name."""
    return re.sub(r"^[a-z]+\d+_", "", name)


def checkpoints_of(stage: int, seeds: int = 1, t: Training | None = None) -> list[str]:
    """The names of the checkpoints that a stage leaves; without t, of lifters of single frames."""
    names = lifter_names(t or Training())
    lifters = [f"stage3_{name}_{seed}" for seed in range(seeds) for name in names]
    lifters = lifters if t and t.frames > 1 else ["regressor", *lifters]
    return lifters if stage == 3 else [f"stage{stage}"]


def trained_stages(run: Run, seeds: int = 1, stage_3: list[str] | None = None) -> int:
    """How many stages are finished, 0 to 3. stage_3: the checkpoints that count; default: all."""
    for stage in (1, 2, 3):
        names = stage_3 if stage == 3 and stage_3 else checkpoints_of(stage, seeds)
        if not all(is_finished(run, name) for name in names):
            return stage - 1
    return 3


def next_command(run: Run, stage: int, seeds: int = 1) -> str:
    """The command that trains a stage of this run, with the options of its first stage."""
    words, name = ["python train.py"], run.path.name
    if (run.path / "stage1.pt").exists():
        saved = load_checkpoint(run, "stage1")
        preset, changed = nearest_preset(saved["config"] | saved["training"])
        words += [f"--preset {preset}", *[f"--name {name}"] * (name != preset)]
        for field, value in changed.items():
            words.append(f"--{'' if value else 'no-'}{field}" if type(value) is bool
                         else f"--{field} {value}")
        words += [f"--seed {saved['run']['seed']}"] * (saved["run"]["seed"] != 0)
    else:
        words.append(f"--{'preset' if name in PRESETS else 'name'} {name}")
    words += [f"--data {run.data}"] * (run.data != Run.data)
    words += [f"--stage {stage}", *[f"--seeds {seeds}"] * (seeds > 1)]
    begun = any((run.path / f"{n}.pt").exists() for n in checkpoints_of(stage, seeds))
    return " ".join(words + ["--resume"] * begun)


def nearest_preset(fields: dict) -> tuple[str, dict]:
    """The preset that differs least from the given fields of Config and Training, and what does."""
    changed = {}
    for preset, (config, training) in PRESETS.items():
        training = training | LIFTER_SIZES[preset].get(fields["lifter"], {})
        built = vars(Config(**config)) | vars(Training(**training))
        changed[preset] = {k: v for k, v in fields.items() if v != built[k]}
    nearest = min(changed, key=lambda preset: len(changed[preset]))
    return nearest, changed[nearest]


# --------------------------------------------------------------------------------------------------
# Stage 1: the tokenizer


def stage_1(run: Run) -> None:
    """Train MSST on true fine poses.

    It sees no detection, and yet its frame is minus a *detected* pelvis, since that is the frame in
    which stage 2 will ask for tokens. So each pose is shifted as a detector might shift it.
    """
    c, t = run.config, run.training
    train, val = run.split("train", has_mesh=True), run.split("val")
    n_actions, steps = len(train.meta["actions"]), t.epochs_1 * train.steps(t.batch_1)
    if n_actions > c.n_actions:
        stop(f"{run.data} has {n_actions} actions, and the model is made for {c.n_actions}: "
             f"add --n_actions {n_actions}")
    if steps <= t.warmup_free:
        stop(f"stage 1 has {steps} steps, and the codebooks begin only after --warmup_free "
             f"{t.warmup_free}: train longer")
    n = train.n // world_size()  # for each process
    if n * J_S < c.K_s or n * J_D < c.K_d:
        stop(f"{train.n} training samples are too few to start {c.K_s} and {c.K_d} codes: "
             "lower --K_s and --K_d")
    torch.manual_seed(run.seed)
    model = new_hipart(c).msst.to(run.device)
    optimizer = adamw(model, t.lr_1, t.weight_decay_1)
    loop = Loop(run, "stage1", model, optimizer, t.epochs_1, train.steps(t.batch_1),
                warmup_cosine(t.warmup_1))
    loss_of = data_parallel(model, "loss")
    for epoch in loop.epochs():
        for b in loop.steps(train, t.batch_1, run.rng(1, epoch), prepare=in_model_frame):
            loss, terms, o = loss_of(b["x_f"], b["x_d"], b["action"])
            loop.update(loss, terms)
            model.update_codebooks(o)
            if loop.step + 1 == max(1, t.warmup_free):
                # At first all encoder outputs look alike, and codes that start from them collapse.
                # By now the encoder tells poses apart, and k-means finds codes worth having.
                rows = torch.randperm(train.n)[: 8 * max(c.K_s, c.K_d)]
                from_first_(rows)
                equal = len(rows) - len(rows) % world_size()
                rows = rows[:equal][part(equal)].sort().values.numpy()
                poses = in_model_frame(train.read(rows, run.rng(1, 10**6 + rank())))["x_f"]
                model.initialize_codebooks(poses, t.batch_1)
        loop.finish_epoch(tokenizer_report(model, val))


@torch.no_grad()
def tokenizer_report(msst: MSST, split: Split) -> dict[str, float]:
    """Errors in pixels, the two alignment losses, the share of actions that P_A recognises, and of
    both codebooks the perplexity and the share of dead codes, all over one whole split. A code is
    dead if the split never uses it."""
    c, sums, split = msst.config, defaultdict(float), split.my_part()
    used = dict(s=torch.zeros(c.K_s), d=torch.zeros(c.K_d))
    for block in split.blocks():
        b = in_model_frame(block)
        _, terms, o = msst.loss(b["x_f"], b["x_d"], b["action"])
        part = dict(
            fine_px=split.pixels(o["x_f"], b["x_f"]) * SCALE,
            dense_px=split.pixels(o["x_d"], b["x_d"]) * SCALE,
            L_local=terms["local"], L_global=terms["action"],
            action_accuracy=(o["p_A"].argmax(-1) == b["action"]).float().mean())
        for name, value in part.items():
            sums[name] += float(value) * len(b["x_f"])
        for level in used:
            tokens = o[f"q_{level}"].flatten().cpu()
            used[level] += torch.bincount(tokens, minlength=len(used[level]))
    report = mean(sums, split.n)
    sum_(*used.values())
    for level, count in used.items():
        p = count / count.sum()
        report[f"perplexity_{level}"] = float(torch.exp(-(p * p.clamp_min(1e-12).log()).sum()))
        report[f"dead_{level}"] = float((count == 0).float().mean())
    return report


# --------------------------------------------------------------------------------------------------
# Stage 2: HiARM


def stage_2(run: Run) -> None:
    """Train HiARM on a fresh detection of every pose in every epoch; the tokenizer is frozen."""
    c, t = run.config, run.training
    train, val = run.split("train", has_mesh=True), run.split("val")
    torch.manual_seed(run.seed)
    model = new_hipart(c).to(run.device)
    restore(model.msst, load_finished(run, "stage1", same_data=True))
    some = train.read(slice(0, 1024), run.rng(2, 10**6))
    model.hiarm.set_codebooks(model.msst, in_model_frame(some)["x_f"])
    optimizer = adamw(model.hiarm, t.lr_2, t.weight_decay_2)
    per_epoch, forced = train.steps(t.batch_2), t.epochs_2 - t.epochs_soft
    loop = Loop(run, "stage2", model.hiarm, optimizer, t.epochs_2, per_epoch,
                in_two_phases(warmup_cosine(t.warmup_2), forced * per_epoch))
    for epoch in loop.epochs():
        in_one_pass, loss_of = epoch >= forced, None  # two wrappers of one model would be at odds
        loss_of = data_parallel(model, "loss", some_unused=in_one_pass)  # what summarizes a past
        for b in loop.steps(train, t.batch_2, run.rng(2, epoch),
                            prepare=functools.partial(with_tokens, model.msst)):
            loss, terms = loss_of(**b, in_one_pass=in_one_pass)
            loop.update(loss, terms | dict(loss=loss.detach()))
        loop.finish_epoch(densification_report(model, val))


@torch.no_grad()
def with_tokens(msst: MSST, block: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `HiPART.loss` takes: a block in the model frame, with the tokens of its true poses."""
    b = in_model_frame(block)
    tokens = [msst.tokenize(some) for some in b["x_f"].split(1024)]
    of_pose = {name: torch.cat([t[name] for t in tokens]) for name in ("z_s", "zp_d", "q_s", "q_d")}
    return {name: b[name] for name in ("x_s", "conf", "x_d", "x_f")} | of_pose


@torch.no_grad()
def densification_report(model: HiPART, split: Split) -> dict[str, float]:
    """Teacher-forced loss and token accuracies, and the error of what is generated free-running,
    in pixels. The loss has no pose error in it, which that of epochs in one pass has."""
    sums, split = defaultdict(float), split.my_part()
    for block in split.blocks(size=512):
        loss, terms = model.loss(**with_tokens(model.msst, block))
        x_d, x_f = model.densify(block["x_s"], block["conf"])
        part = dict(acc_s=terms["acc_s"], acc_d=terms["acc_d"], loss_forced=loss,
                    fine_px=split.pixels(x_f, block["x_f"]),
                    dense_px=split.pixels(x_d, block["x_d"]))
        for name, value in part.items():
            sums[name] += float(value) * len(x_f)
    return mean(sums, split.n)


# --------------------------------------------------------------------------------------------------
# Stage 3: the plain regressor, and one lifter for every input


def stage_3(run: Run, seeds: int) -> None:
    """Train the regressor, then `seeds` lifters for every input; or lifters of sequences alone."""
    load_hipart(run)  # says at once what is missing
    if run.training.frames > 1:
        check_motion(run)
    else:
        load_finished(run, "stage2", same_data=True)
        train_regressor(run)
    for seed in range(seeds):
        # Those of AS_LONG_AS wait for the others.
        for name in sorted(lifter_names(run.training), key=AS_LONG_AS.__contains__):
            train_lifter(run, name, seed)


def seconds_of(run: Run, *names: str) -> float:
    """How long these trainings took, all together."""
    return sum(load_finished(run, name)["seconds"] for name in names)


def train_regressor(run: Run) -> None:
    """Train the densifier of input (d), as long as that of (b) was trained, on the detections that
    HiARM is trained on. The mean distance is its loss and its score."""
    t, train, val = run.training, run.split("train", has_mesh=True), run.split("val").my_part()
    torch.manual_seed(run.seed)
    model = Regressor(t.regressor_width).to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    loop = Loop(run, "regressor", model, optimizer, t.epochs_equal, train.steps(t.batch_3),
                warmup_cosine(500), seconds_of(run, "stage1", "stage2"))
    predict = data_parallel(model)
    for epoch in loop.epochs():
        for b in loop.steps(train, t.batch_3, run.rng(4, epoch), prepare=in_model_frame):
            x_d, x_f = predict(b["x_s"], b["conf"])
            loss = (x_d - b["x_d"]).norm(dim=-1).mean() + (x_f - b["x_f"]).norm(dim=-1).mean()
            loop.update(loss, dict(loss=loss.detach()))
        error = 0.0
        for b in val.blocks():
            _, x_f = model.densify(b["x_s"], b["conf"])
            error += float(val.pixels(x_f, b["x_f"])) * len(x_f)
        loop.finish_epoch(mean(dict(fine_px=error), val.n))


def train_lifter(run: Run, name: str, seed: int) -> None:
    """Train one lifter of `lifter_names`: the same network and schedule for all inputs, with MPJPE
    as the loss. They take as many steps as (b), or as much time if they are in AS_LONG_AS. Points
    that a network makes are costly, and are used in `passes_3` passes, each under other turns."""
    t, temporal = run.training, run.training.frames > 1
    windows = dict(frames=t.frames, every=LIFTERS[t.lifter].every) if temporal else {}
    everything, source = run.split("train", **windows), input_of(name)
    train = everything.with_mesh() if source in NEED_MESH else everything
    passes = t.passes_3 if source in ("generated", "regressor") else 1
    # Where some samples have no mesh, fewer samples are seen more often: as many steps for all.
    per_epoch = passes * train.steps(t.batch_3)
    epochs = max(1, round(t.epochs_3 * t.passes_3 * everything.steps(t.batch_3) / per_epoch))
    if name in AS_LONG_AS:
        epochs = t.epochs_equal * t.passes_3 // passes
    seconds = 0.0 if epochs else seconds_of(run, *(n.format(seed) for n in AS_LONG_AS[name]))
    clean = name.endswith("_clean")
    hipart = load_hipart(run) if source == "generated" else None
    regressor = load_regressor(run) if source == "regressor" else None
    torch.manual_seed(1000 + seed)
    model = new_lifter(t, name).to(run.device)

    def given(block: dict[str, Tensor], training: bool = False) -> dict[str, Tensor]:
        x = lifter_input(source, block, hipart, regressor, training)
        return dict(x=x, **{key: block[key] for key in ("y", "conf", "begins")})

    # The same in every epoch. Nothing is chosen by the error on unseen motion: it is for the log.
    shown = {key: [given(block) for block in run.split(split).my_part().blocks(clean=clean)]
             for key, split in (("mpjpe", "val"), ("unseen_mpjpe", "unseen"))
             if split in train.meta["splits"]}
    rows = np.sort(torch.randperm(train.n)[:BLOCK].numpy())
    some = given(train.read(rows, run.rng(3, seed, 10**6), clean), training=True)
    model.standardize(some["x"], some["y"], some["conf"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=t.lr_3, weight_decay=t.weight_decay_3, fused=True)
    schedule = warmup_cosine(500) if t.cosine_3 else every_4_epochs(t.epochs_3)
    loop = Loop(run, f"stage3_{name}_{seed}", model, optimizer, epochs, per_epoch, schedule,
                seconds)
    predict = data_parallel(model)
    for epoch in loop.epochs():
        for b in loop.steps(train, t.batch_3, run.rng(3, seed, epoch), clean=clean, passes=passes,
                            prepare=functools.partial(given, training=True),
                            vary=functools.partial(turned, t=t)):
            off = (predict(b["x"], b["conf"]) - b["y"]).norm(dim=-1).mean(-1)
            # Frames that are repeated to fill a window do not count.
            error = (off * b["own"]).sum() / b["own"].sum() if temporal else off.mean()
            loop.update(error / 100, dict(mpjpe=error.detach()))
        loop.finish_epoch({key: mean_error(model, blocks) for key, blocks in shown.items()})


def mean_error(lifter: nn.Module, blocks: list[dict[str, Tensor]]) -> Tensor:
    """MPJPE over the samples of all processes, each of which has some blocks of them."""
    errors = [(lift(lifter, b["x"], b["conf"], b["begins"]) - b["y"]).norm(dim=-1).mean(-1)
              for b in blocks]
    return torch.cat(gather(torch.cat(errors).cpu())).mean()


def new_lifter(t: Training, name: str) -> nn.Module:
    """An untrained lifter of that name, of 17, 161 or 353 points."""
    points = J if input_of(name).startswith("sparse") else J + J_D + J_F
    options = dict(heads=t.lifter_heads) if t.lifter_heads and t.lifter != "mlp" else {}
    options |= dict(frames=t.frames) if t.frames > 1 else {}
    if "192" in t.levels and points > J:
        return ThirdLevel(t.levels, t.lifter_width, t.lifter_blocks)
    model = LIFTERS[t.lifter](points, width=t.lifter_width, blocks=t.lifter_blocks, **options)
    return OneLevel(model, t.levels) if points > J and t.levels != "dense+fine" else model


@torch.no_grad()
def lifter_input(name: str, block: dict[str, Tensor], hipart: HiPART | None,
                 regressor: Regressor | None, training: bool = False) -> Tensor:
    """What the lifter of input `name` is given for a block of n samples: [n, 17 or 161, 2] in
    normalised image coordinates, or [n, 353, 2] if the block has true points of a third level. In
    training, a HiARM that has learned to do without its history makes points in a single pass."""
    x_s, conf = block["x_s"], block["conf"]
    if name.startswith("sparse"):
        return x_s
    if name.startswith("ground_truth"):
        return torch.cat([block[k] for k in ("x_s", "x_d", "x_f", "x_192") if k in block], 1)
    model = hipart if name == "generated" else regressor
    one_pass = training and model is hipart and hipart.config.history_dropout > 0
    options = dict(history=False) if one_pass else {}
    parts = [torch.cat([some, *model.densify(some, c, **options)], 1)
             for some, c in zip(x_s.split(1024), conf.split(1024), strict=True)]
    return torch.cat(parts)


@torch.no_grad()
def lift(lifter: nn.Module, x: Tensor, conf: Tensor, begins: Tensor | None = None) -> Tensor:
    """The poses [n, 17, 3] in mm that a lifter makes of any number of samples, 1024 at a time. A
    lifter of sequences asks for begins [n] (sources/windows.py)."""
    frames = getattr(lifter, "frames", 1)
    if frames == 1:
        pairs = zip(x.split(1024), conf.split(1024), strict=True)
        return torch.cat([lifter(*pair) for pair in pairs])
    cut = windows_for_all(begins.cpu().numpy(), frames, lifter.every)
    y, at_once = x.new_empty(len(x), J, 3), max(1, 1024 // frames)
    for rows, count in zip(*(torch.from_numpy(a).split(at_once) for a in cut), strict=True):
        made = lifter(x[rows], conf[rows])
        y[rows[count]] = made[count] if lifter.every else made
    return y


def turned(b: dict[str, Tensor], t: Training) -> dict[str, Tensor]:
    """Turn about every other pose by a random angle, and the poses of a sequence by the same one.
    The rest stays, as people mostly stand upright."""
    if not t.turn_3:
        return b
    n = len(b["x"])
    angle = (t.turn_3 * torch.randn(n) * torch.randint(2, (n,))).to(b["x"])
    angle = angle[b["begins"].cumsum(0) - 1]
    x, y = turn_camera(b["x"], b["y"], b["conf"], angle)
    return b | dict(x=x, y=y)


def turn_camera(x: Tensor, y: Tensor, conf: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """What a camera sees that is turned by angle [n] rad about its ray to the pelvis: x [n, P, 2]
    in normalised image coordinates, y [n, 17, 3] mm. A camera that turns in place changes no
    distance, so this is exact, but for the distortion of the lens."""
    rays = torch.cat([x / FOCAL, torch.ones_like(x[..., :1])], -1)  # [n, P, 3]
    pelvis = detected_pelvis(x[:, :J], conf) / FOCAL  # [n, 1, 2]
    axis = torch.cat([pelvis, torch.ones_like(pelvis[..., :1])], -1)
    axis = nn.functional.normalize(axis, dim=-1) * angle[:, None, None]
    # Row i of the generator is axis x e_i, so its exponential turns row vectors.
    turn = torch.linalg.matrix_exp(torch.linalg.cross(axis, torch.eye(3).to(x)[None]))
    rays = rays @ turn
    return rays[..., :2] / rays[..., 2:] * FOCAL, y @ turn


# --------------------------------------------------------------------------------------------------
# Command line


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=PRESETS, help="quick without a GPU, else paper")
    p.add_argument("--stage", type=int, choices=(1, 2, 3), help="one stage only; default: all")
    p.add_argument("--name", help="runs/NAME; default: the preset")
    p.add_argument("--data", default=Run.data, help="folder of a prepared data set")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--seeds", type=int, default=1, help="lifters for every input in stage 3")
    p.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    p.add_argument("--resume", action="store_true", help="go on from this run's checkpoints")
    for kind, title in ((Config, "hipart.Config"), (Training, "train.Training")):
        group = p.add_argument_group(f"fields of {title} (they override the preset)")
        about = dict(re.findall(r"^    (\w+): [^#\n]*# (.*)", inspect.getsource(kind), re.M))
        for f in dataclasses.fields(kind):
            names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))
            how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool
                   else dict(type=f.type, metavar=str(f.default)))
            text = about.get(f.name, "").replace("%", "%%")
            group.add_argument(*names, dest=f.name, default=None, help=text, **how)
    return p


def script(*command: str) -> None:
    """Run another script of this project as its user would."""
    print("$ python", *command, flush=True)
    path = Path(__file__).with_name(command[0])
    alone = {k: v for k, v in os.environ.items() if k != "RANK"}  # not one of our processes
    with subprocess.Popen([sys.executable, path, *command[1:]], env=alone) as child:
        try:
            status = child.wait()
        except SystemExit:  # a signal
            child.terminate()
            raise
    if status:
        stop(f"`python {' '.join(command)}` failed: see its message above")


def disk_needed(run: Run, stages: tuple[int, ...], seeds: int) -> int:
    """About how many bytes these stages of a run still write: every checkpoint holds a model and
    two running means of its gradients; one more is written beside the last."""
    t, hipart = run.training, new_hipart(run.config)
    lifters = [new_lifter(t, name) for name in lifter_names(t)] * seeds
    lifters = lifters if t.frames > 1 else [Regressor(t.regressor_width), *lifters]
    models = {1: [hipart.msst], 2: [hipart.hiarm], 3: lifters}
    sizes = [12 * sum(v.numel() for v in model.state_dict().values())
             for stage in stages for model in models[stage]]
    paths = [run.path / f"{n}.pt" for stage in stages for n in checkpoints_of(stage, seeds, t)]
    there = sum(path.stat().st_size for path in paths if path.exists())
    return max(0, sum(sizes) - there) + max(sizes) + SMALL_FILES


@contextmanager
def what_a_user_can_mend(run: Run, stage: int) -> Iterator[None]:
    """While a stage is trained: what a user can mend is said in one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        stop(f"the GPU's memory is full: try a smaller --batch_{stage} than "
             f"{getattr(run.training, f'batch_{stage}')}")
    except (ValueError, RuntimeError) as e:
        # Of NaN, nearest_code makes an error on a CPU; on a GPU, an index that the look-up refuses.
        if "non-finite" not in str(e) and "device-side assert" not in str(e):
            raise
        stop(f"a value became infinite or NaN ({e}): try a lower learning rate")


def main() -> None:
    args = arguments().parse_args()
    if args.seeds < 1 or args.seed < 0:
        stop(f"--seeds must be at least 1 and --seed at least 0, found {args.seeds}, {args.seed}")
    device = choose_device(args.device)
    preset = args.preset or ("paper" if device.type == "cuda" else "quick")
    presets = PRESETS[preset][0], PRESETS[preset][1] | LIFTER_SIZES[preset].get(args.lifter, {})
    given = {name: value for name, value in vars(args).items() if value is not None}
    try:
        config, training = (kind(**options | {k: given[k] for k in given.keys() & vars(kind())})
                            for kind, options in zip((Config, Training), presets, strict=True))
        if training.epochs_soft and not (config.soft and config.history_dropout
                                         and training.epochs_soft < training.epochs_2):
            raise ValueError(f"epochs_soft {training.epochs_soft} needs soft, history_dropout and "
                             "a larger epochs_2: give them, or --epochs_soft 0")
        if "192" in training.levels:
            raise ValueError(f"levels {training.levels} are for true points alone: see `python "
                             "ablate.py --table 5`")
        if not re.fullmatch(r"\w[\w.+-]*", args.name or preset):
            raise ValueError(f"--name must be letters, digits, . + - or _, found {args.name!r}")
    except ValueError as e:
        stop(str(e))
    run = Run(Path("runs") / (args.name or preset), config, training, device, args.seed, args.data,
              args.resume)
    stages = (args.stage,) if args.stage else (1, 2, 3)
    torch.set_float32_matmul_precision("high")
    if not rank():
        print(f"preset {preset} on {world_size()} x {device} ({torch.get_num_threads()} threads), "
              f"torch {torch.__version__}: {run.path}")
    with alone_in(run.path), run.watch.listening():
        if not rank():
            if not Path(run.data, "meta.json").exists():
                if run.data != Run.data or args.stage in (2, 3):
                    stop(f"{run.data} holds no data set: make one with `python prepare_data.py` "
                         "(`python train.py --stage 1` does so by itself)")
                script("prepare_data.py")
            check_space(run.path, disk_needed(run, stages, args.seeds))
        wait()
        if training.frames > 1 and 3 in stages:  # said before stages 1 and 2 take their time
            run.split("train").begins()
        for stage in stages:
            with what_a_user_can_mend(run, stage):
                (stage_1, stage_2, functools.partial(stage_3, seeds=args.seeds))[stage - 1](run)
        if not rank():
            of = ("--name", run.path.name, "--data", run.data, "--device", device.type)
            temporal = ["--temporal"] * (training.frames > 1)
            script("evaluate.py", *of, "--seeds", str(args.seeds), *temporal)
            if not temporal:
                script("sample.py", *of)


if __name__ == "__main__":
    main()
