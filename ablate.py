"""The paper's ablations as commands: each trains variants of HiPART and compares them.

    python ablate.py --list
    python ablate.py --table 3              # 3, 4, 5, 6, 8, 9 or 10; or --figure 5
    python ablate.py --table 4 --dry-run    # what would be trained, and for how long

studies.py is the table of variants. A stage is trained once for all variants that agree on what it
depends on, whichever table they are in. The same command goes on after an interruption, and a
second time it trains nothing.

Whether an ordering of the paper holds here is decided by the seeds (`verdict`), and of speeds by
ROUNDS turns. Markdown, JSON and a figure's PNG go to runs/ablations, beside what has been trained.
"""

import argparse
import hashlib
import json
import math
import os
import signal
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, median

if __name__ == "__main__":  # Ctrl-C while modules are imported says nothing
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from baselines import new_hipart
from benchmarks.machine import machine
from checkpoints import Run, choose_device, is_finished, load_finished
from distributed import world_size
from evaluate import column, rows_3d
from hipart import J_D, Config, J
from sample import save
from sources.dataset import META_BYTES, SPLITS
from sources.files import read_json
from studies import STUDIES, WITH, Study, Variant
from survival import Watch, alone_in, stop, this_command, write
from tables import TESTED, number, summarize, table
from train import (
    PRESETS,
    Training,
    input_of,
    lift,
    lifter_input,
    lifter_names,
    load_hipart,
    load_lifter,
    new_lifter,
    stage_1,
    stage_2,
    train_lifter,
    what_a_user_can_mend,
)

FOLDER = Path("runs/ablations")
FIRST_OF = {"width": 2, "epochs_2": 2, "lifter": 3}  # where the options of stages 2 and 3 begin
# Milliseconds a sample on two cores of an AMD EPYC, small presets, where nothing was trained yet.
RATES = {"stage 1": 1.8, "stage 2": 2.6,
         "mlp of sparse": 0.1, "mlp of generated": 0.4, "mlp of ground_truth": 0.1,
         "spatial of sparse": 0.1, "spatial of generated": 2.6, "spatial of ground_truth": 2.4,
         "poseformer of sparse": 4, "poseformer of generated": 40, "poseformer of ground_truth": 40,
         "mixste of sparse": 0.2, "mixste of generated": 2.5, "mixste of ground_truth": 2.3}
# Student's t of 95 %, two-sided, for so many seeds; for more than these about 2.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
ROUNDS, LEAST = 5, 0.2  # of speeds: turns, and seconds that each of them takes at least


# --------------------------------------------------------------------------------------------------
# What is trained, and where


@dataclass
class Job:
    """A stage of a variant, with one seed."""

    kind: str  # as in RATES
    name: str  # of its checkpoint
    run: Run
    stage: int
    lifter: str  # as in train.lifter_names

    def samples(self, n: int) -> int:
        """How many of n training samples this training sees, each time anew."""
        t, passes = self.run.training, self.run.training.passes_3 if self.stage == 3 else 1
        return passes * getattr(t, f"epochs_{self.stage}") * min(n, t.limit or n)


def until(stage: int, own, base):
    """The options of `own` for stages up to this one, and those of `base` for later ones: all
    variants that share a stage ask for the same."""
    at, kept = 1, {}
    for option in fields(own):
        at = FIRST_OF.get(option.name, at)
        kept[option.name] = getattr(own if at <= stage else base, option.name)
    return type(own)(**kept)


def jobs_of(variant: Variant, study: Study, preset: str, seed: int, like: Run) -> list[Job]:
    """The trainings of a variant, in their order. like: a Run of this data, and all else alike."""
    base, own = ((replace(config, n_actions=like.config.n_actions), training) for config, training
                 in (v.options(preset, study.share) for v in (Variant("", ()), variant)))
    generated, jobs = variant.input == "generated", []
    (lifter,) = (name for name in lifter_names(own[1]) if input_of(name) == variant.input)
    for stage in (1, 2, 3) if generated else (3,):
        # A lifter of other points does not care how points are generated.
        config = until(stage, own[0], base[0]) if generated else base[0]
        training = until(stage, own[1], base[1])
        name = f"stage3_{lifter}_{seed}" if stage == 3 else f"stage{stage}"
        about = [asdict(config), asdict(training), seed, name, like.data, like.same_samples()]
        key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
        kind = f"{training.lifter} of {variant.input}" if stage == 3 else f"stage {stage}"
        run = Run(FOLDER / f"stage{stage}_{seed}_{key}", config, training, like.device, seed,
                  like.data, True, like.first_samples, like.watch)
        jobs.append(Job(kind, name, run, stage, lifter))
    return jobs


def train(jobs: list[Job], seed: int) -> None:
    """Train what is not finished. Later stages look for earlier ones in their own folder."""
    for i, job in enumerate(jobs):
        if is_finished(job.run, job.name):
            continue
        job.run.path.mkdir(exist_ok=True)
        for before in jobs[:i]:
            write(job.run.path / f"{before.name}.pt",
                  (before.run.path / f"{before.name}.pt").read_bytes())
        with what_a_user_can_mend(job.run, job.stage):
            train_stage = (stage_1, stage_2, lambda r, job=job: train_lifter(r, job.lifter, seed))
            train_stage[job.stage - 1](job.run)


@torch.no_grad()
def errors(job: Job, seed: int) -> dict[str, float]:
    """The errors of a lifter on every tested split. They are kept beside it."""
    path, run, found = job.run.path / "errors.json", job.run, {}
    with suppress(ValueError, TypeError, AttributeError, OverflowError, OSError):  # or damaged
        return {str(name): float(value) for name, value in read_json(path).items()}
    hipart = load_hipart(run) if input_of(job.lifter) == "generated" else None
    lifter = load_lifter(run, job.lifter, seed)
    for name in (name for name in TESTED if name in run.split("test").meta["splits"]):
        split, rows = run.split(name), defaultdict(list)
        for block in split.blocks():
            x = lifter_input(input_of(job.lifter), block, hipart, None)
            y = lift(lifter, x, block["conf"], block["begins"]).cpu()
            some = rows_3d(job.lifter, seed, y, block, None)
            some |= dict(action=column(block["action"]), occluded=np.zeros(len(x)))
            if hipart:
                px = (x[:, J + J_D :] - block["x_f"]).norm(dim=-1).mean(-1) * split.w / 2
                some["px"] = column(px, block["has_mesh"])
            for key, values in some.items():
                rows[key].append(values)
        s = summarize({key: np.concatenate(rows[key]) for key in rows}, split.meta["actions"])
        found[f"{name}: MPJPE, mm"] = s[f"mpjpe/{job.lifter}/{seed}"]["actions"]
        if hipart and s["px"]["frames"] is not None:
            found[f"{name}: fine points, px"] = s["px"]["frames"]
    write(path, json.dumps(found, indent=1))
    return found


# --------------------------------------------------------------------------------------------------
# Speed and size


@torch.no_grad()
def speeds(study: Study, preset: str, device: torch.device) -> dict[str, dict[str, list[float]]]:
    """Poses per second of generation and lifting with random weights: {variant: {column: ROUNDS
    numbers}}. Variants take turns, so that a busy machine slows all of them."""
    models, found = {}, defaultdict(lambda: defaultdict(list))
    torch.manual_seed(0)
    for variant in (v for v in study.variants if not v.lacks):
        config, training = variant.options(preset)
        models[variant.name] = (new_hipart(config).eval().to(device),
                                new_lifter(training, "generated").eval().to(device))
    for batch in study.batches:
        x_s, conf = torch.rand(batch, J, 2, device=device) - 0.5, torch.ones(batch, J).to(device)
        for turn in range(ROUNDS + 1):  # the first warms up
            for name, (hipart, lifter) in models.items():
                made, began = 0, time.perf_counter()
                while (spent := time.perf_counter() - began) < LEAST or not made:
                    x = torch.cat([x_s, *hipart.densify(x_s, conf)], 1)
                    lift(lifter, x, conf).sum().item()  # waits for a GPU, too
                    made += batch
                if turn:
                    found[name][f"poses/s, batch {batch}"].append(made / spent)
    return found


def costs(variant: Variant) -> dict[str, list[float]]:
    """Parameters (M) and FLOPs (G) of all three stages for one pose, at the paper's sizes."""
    config, training = variant.options("paper")
    with torch.device("meta"), torch.no_grad():  # nothing is computed
        hipart, lifter = new_hipart(config).eval(), new_lifter(training, "generated").eval()
        x_s = torch.empty(1, J, 2)
        with FlopCounterMode(display=False) as counter:
            o = hipart.hiarm.rollout(x_s)
            made = hipart.msst.decode_embeddings(o["zh_s"], o["zh_d"])
            lifter(torch.cat([x_s, *made], 1))
    parameters = sum(p.numel() for model in (hipart, lifter) for p in model.parameters())
    return {"parameters, M": [parameters / 1e6], "FLOPs, G": [counter.get_total_flops() / 1e9]}


# --------------------------------------------------------------------------------------------------
# The report


def verdict(gaps: list[float]) -> str:
    """What the differences of variants, one for each seed, say of an ordering (see `as_page`)."""
    if len(gaps) < 2:
        return "one seed, no spread"
    spread = STUDENT.get(len(gaps), 2.0) * float(np.std(gaps, ddof=1)) / math.sqrt(len(gaps))
    if abs(mean(gaps)) <= spread:
        return "within the spread"
    return "holds" if mean(gaps) > 0 else "does not hold"


def verdicts(study: Study, found: dict[str, dict[str, list[float]]]) -> list[list[str]]:
    """Rows: the ordering, on what, the mean difference, and the verdict."""
    claims = [(f"{a} before {b}", "MPJPE", {a: -1, b: 1}) for a, b in study.better]
    claims += [(f"{a} before {b}, by {times - 1:.0%}", "poses/s", {a: 1, b: -times})
               for a, b, times in study.faster]
    claims += [(f"{a} gains more than {b}", "MPJPE", {a: 1, a + WITH: -1, b: -1, b + WITH: 1})
               for a, b in study.gains]
    rows = []
    for claim, unit, signs in claims:
        one, *others = (found.get(name, {}) for name in signs)  # of which one may not be made
        for where in (c for c in one if unit in c and all(c in other for other in others)):
            gaps = sum(sign * np.array(found[name][where]) for name, sign in signs.items())
            rows.append([claim, where, f"{gaps.mean():+.2f}", verdict(gaps.tolist())])
    return rows


def changed(preset: str, share: float) -> str:
    """What all variants override of a preset, in words."""
    plain = (kind(**of) for kind, of in zip((Config, Training), PRESETS[preset], strict=True))
    own = Variant("", ()).options(preset, share)
    names = [f"{name} {value}" for a, b in zip(plain, own, strict=True)
             for name, value in vars(b).items() if value != getattr(a, name)]
    return f", but with {', '.join(names)}" if names else ""


def as_page(which: str, study: Study, found: dict, about: dict) -> str:
    """The table and the verdicts, as Markdown."""
    columns = list(dict.fromkeys(c for of in found.values() for c in of))
    rows = [[v.name, *v.paper, *(number(found.get(v.name, {}).get(c, []), 1) for c in columns)]
            for v in study.variants]
    for row, v in zip(rows, study.variants, strict=True):
        row[len(v.paper) + 1] = v.lacks or row[len(v.paper) + 1]
    over = [f"over {about['seeds']} seeds of all stages"] * study.trains
    over += [f"of speeds, over {ROUNDS} turns"] * bool(study.batches)
    text = [f"# {which.capitalize()}: {study.title}",
            f"{study.note}Preset `{about['preset']}`"
            f"{changed(about['preset'], study.share) * study.trains}. Mean ± standard deviation "
            f"{'; '.join(over)}. MPJPE is the mean of actions. The paper's errors are on Human3.6M "
            "with CPN, and its speeds on a V100: compare orders, never numbers.",
            table(["variant", *study.paper, *columns], rows)]
    if orderings := verdicts(study, found):
        text += [table(["ordering", "here by", "difference", "verdict"], orderings),
                 "A difference above 0 is the paper's order. Over the seeds, an ordering *holds* "
                 "if the mean difference is above 0 by more than its 95 % confidence interval "
                 "(Student's t), *does not hold* if below 0 by more, else is *within the spread*."]
    on = ", ".join(f"{key} {value}" for key, value in about["machine"].items())
    return "\n\n".join([*text, f"`{about['command']}` on {on}."]) + "\n"


def as_figure(study: Study, found: dict, preset: str) -> Figure:
    """Errors along every axis; bars are standard deviations over seeds."""
    fig = Figure(figsize=(4 * len(study.axes), 6.4), layout="constrained")
    panels = fig.subplots(2, len(study.axes), squeeze=False)
    for row, unit in zip(panels, ("MPJPE, mm", "fine points, px"), strict=True):
        for ax, axis in zip(row, study.axes, strict=True):
            along = sorted((getattr(v.options(preset)[0], axis), v.name)
                           for v in study.variants if set(v.scale) <= {axis})
            for where in (c for c in found[along[0][1]] if c.endswith(unit)):
                values = [found[name][where] for _, name in along]
                ax.errorbar([x for x, _ in along], [mean(v) for v in values],
                            [np.std(v, ddof=len(v) > 1) for v in values], marker="o", capsize=3,
                            label=where.split(":")[0])
            ax.set(xlabel=axis, ylabel=unit)
    fig.axes[0].legend(frameon=False)
    return fig


def samples_and_actions(data: str, prepare: str) -> tuple[int, int]:
    """How many there are to train on, or one sentence and exit status 2 if there are none."""
    try:
        meta = read_json(Path(data, "meta.json"), META_BYTES)
        return int(meta["splits"]["train"]["n"]), len(meta["actions"])
    except (OSError, ValueError, TypeError, LookupError, OverflowError, RecursionError):
        stop(f"{data} holds no data set to train on: make one with `{prepare}`")


def dry_run(chains: dict[tuple[str, int], list[Job]], n: int) -> str:
    """What is there, what would be trained and for how long, with n training samples. A stage that
    variants share stands at the first of them."""
    rows, took, left = {}, defaultdict(list), {}
    for (name, seed), jobs in chains.items():
        for job in (job for job in jobs if job.run.path not in rows):
            rows[job.run.path] = [name, str(seed), job.kind, "to train"]
            if is_finished(job.run, job.name):
                seconds = load_finished(job.run, job.name)["seconds"]
                took[job.kind].append(seconds / job.samples(n))
                rows[job.run.path][3] = f"there, took {seconds:.0f} s"
            else:
                left[job.run.path] = job
    total = 0.0
    for path, job in left.items():
        seconds = median(took[job.kind] or [RATES[job.kind] / 1e3]) * job.samples(n)
        rows[path][3] += f", about {seconds:.0f} s"
        total += seconds
    return (f"{table(['variant', 'seed', 'training', 'state'], [*rows.values()])}\n\n"
            f"{len(left)} of {len(rows)} trainings are left: about {total / 60:.0f} minutes, by "
            "what others took here, or where there are none, by small models on two cores.")


# --------------------------------------------------------------------------------------------------


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_mutually_exclusive_group(required=True)
    tables, figures = ([int(which.split()[1]) for which in STUDIES if kind in which]
                       for kind in ("table", "figure"))
    what.add_argument("--table", type=int, choices=tables)
    what.add_argument("--figure", type=int, choices=figures)
    what.add_argument("--list", action="store_true", help="what there is")
    p.add_argument("--preset", choices=PRESETS, default="quick", help="what variants override")
    p.add_argument("--seeds", type=int, default=3, help="of all three stages of every variant")
    p.add_argument("--data", help="default: data/demo, and data/sequences for Tables 6 and 10")
    p.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    p.add_argument("--dry-run", action="store_true", help="only say what would be trained")
    return p


def main() -> None:
    args = arguments().parse_args()
    if args.list:
        return print("\n".join(f"--{which:10}{study.title}: "
                               f"{', '.join(v.name for v in study.variants if not v.lacks)}"
                               for which, study in STUDIES.items()))
    if args.seeds < 1:
        stop(f"--seeds must be at least 1, found {args.seeds}")
    which = f"table {args.table}" if args.table else f"figure {args.figure}"
    study, watch = STUDIES[which], Watch()
    data = args.data or study.data
    n, actions = samples_and_actions(data, study.prepare) if study.trains else (0, 0)
    like = Run(FOLDER, Config(n_actions=max(Config.n_actions, actions)), Training(),
               choose_device(args.device), data=data, watch=watch)
    if world_size() > 1:
        stop("ablate.py is a single process: start it with python, and not with torchrun")
    if study.gains:
        like.split("train").begins()  # or one sentence, if these are no sequences
    torch.set_float32_matmul_precision("high")
    has_192 = all(os.path.isfile(f"{data}/{split}/x_192.npy") for split in SPLITS)
    if not has_192 or PRESETS[args.preset][1].get("lifter") != "mlp":
        study = study.without_third_level()
    made = [v for v in study.variants if not v.lacks]
    chains = {(v.name, seed): jobs_of(v, study, args.preset, seed, like)
              for seed in range(args.seeds * study.trains) for v in made}
    if args.dry_run:
        return print(dry_run(chains, n))
    found = defaultdict(lambda: defaultdict(list))
    with alone_in(FOLDER), watch.listening():
        for variant in (v for v in made if study.costs):
            found[variant.name] |= costs(variant)
        for (name, seed), jobs in chains.items():
            print(f"{which}: {name}, seed {seed}", flush=True)
            train(jobs, seed)
            for where, value in errors(jobs[-1], seed).items():
                found[name][where].append(value)
        for name, of in speeds(study, args.preset, like.device).items():
            found[name] |= of
        about = dict(study=which, preset=args.preset, seeds=args.seeds, data=data,
                     command=this_command(), machine=machine(like.device.type))
        path = FOLDER / f"{which.replace(' ', '_')}_{args.preset}"
        text = as_page(which, study, found, about)
        content = about | dict(numbers=found, verdicts=verdicts(study, found))
        write(path.with_suffix(".json"), json.dumps(content, indent=1))
        write(path.with_suffix(".md"), text)
        if study.axes:
            save(as_figure(study, found, args.preset), path.with_suffix(".png"))
        print(f"\n{text}\nwritten: {path}.md and .json")


if __name__ == "__main__":
    main()
