"""Does densification pay when 3D labels are scarce? Lifters trained with few labelled poses.

    python benchmarks/few_labels.py                         # runs/standard
    python benchmarks/few_labels.py --name quick --labels 500 2000 12000 --seeds 3

Stages 1 and 2 and the regressor are those of a trained run, and saw all 2D poses of its training
split. Here lifters of inputs (a), (b) and (d) learn from few of these poses, evenly spread. All of
them see the same poses under the same detections, which are drawn and densified before training:
DRAWN in all, and at least LEAST_DRAWS of each pose. As in train.py, poses also turn at random.

One rule ends every training. The learning rate is the run's lr_3, and after every CHECK steps the
lifter is tried on the validation split. When PATIENCE checks in a row were not better than the best
by a share of LEAST, training goes on from the best weights at half the rate; where it would be the
HALVINGS-th time, it ends. The best weights are tested. No choice looks at what is tested.

All numbers go to runs/NAME/few_labels.json after every lifter, a table to few_labels.md and a
figure to few_labels.png. What is in the JSON is not trained again: the same command goes on after
an interruption.
"""

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from checkpoints import Run, choose_device, load_finished  # noqa: E402
from curves import COLOURS  # noqa: E402
from evaluate import mpjpe  # noqa: E402
from hipart import Config  # noqa: E402
from sample import save  # noqa: E402
from sources.dataset import Split  # noqa: E402
from sources.files import read_json  # noqa: E402
from survival import alone_in, stop, write  # noqa: E402
from tables import TESTED, number, summarize, table  # noqa: E402
from train import (  # noqa: E402
    INPUTS,
    Training,
    lift,
    lifter_input,
    load_hipart,
    load_regressor,
    new_lifter,
    turned,
)

# The inputs that are compared
NAMES = {name: INPUTS[name].split(",")[0] for name in ("sparse", "generated", "regressor")}
DRAWN, LEAST_DRAWS = 64_000, 4  # detections in all, and of each pose where there are many
CHECK, PATIENCE, LEAST, HALVINGS = 64, 24, 1e-3, 4  # of the rule: steps, checks, share, times


class Inputs:
    """What lifters are given of a run."""

    def __init__(self, run: Run):
        self.run, self.hipart, self.regressor = run, load_hipart(run), load_regressor(run)

    def of(self, name: str, block: dict, training: bool = False) -> dict:
        """A block as the lifter of input `name` is given it."""
        x = lifter_input(name, block, self.hipart, self.regressor, training)
        own = torch.ones_like(block["begins"])  # batches are shuffled: each pose turns on its own
        return dict(x=x, begins=own, **{key: block[key] for key in ("y", "conf", "action")})

    def of_split(self, name: str, split: Split) -> dict:
        """A whole split, as one block."""
        blocks = [self.of(name, block) for block in split.blocks()]
        return {key: torch.cat([block[key] for block in blocks]) for key in blocks[0]}

    def drawn(self, name: str, train: Split, seed: int) -> dict:
        """The training samples, as one block: several detections of every pose."""
        rng, draws = self.run.rng(7, seed), max(LEAST_DRAWS, DRAWN // train.n)
        blocks = [self.of(name, block, training=True)
                  for _ in range(draws) for block in train.blocks(rng)]
        return {key: torch.cat([block[key] for block in blocks]) for key in blocks[0]}


def batches(samples: dict, t: Training) -> Iterator[dict]:
    """Batches without end: pass after pass over the samples, in random order."""
    n = len(samples["x"])
    while True:
        for rows in torch.randperm(n).to(samples["x"].device).split(t.batch_3):
            if len(rows) == min(n, t.batch_3):  # the last one of a pass may be smaller
                yield turned({key: value[rows] for key, value in samples.items()}, t)


def train_lifter(inputs: Inputs, name: str, train: Split, val: dict, seed: int
                 ) -> tuple[nn.Module, dict]:
    """The lifter of input `name` that is best on the block `val`, and how it was found."""
    t, began = inputs.run.training, time.monotonic()
    torch.manual_seed(1000 + seed)
    model = new_lifter(t, name).to(inputs.run.device)
    samples = inputs.drawn(name, train, seed)
    model.standardize(samples["x"], samples["y"], samples["conf"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=t.lr_3, weight_decay=t.weight_decay_3, fused=True)
    schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=PATIENCE - 1, threshold=LEAST)
    endless, steps, best_steps, lr = batches(samples, t), 0, 0, t.lr_3
    with tqdm(desc=f"{name}, {train.n} labels", unit=" steps", leave=False) as bar:
        while lr > t.lr_3 / 2**HALVINGS:
            model.train()
            for b in itertools.islice(endless, CHECK):
                loss = (model(b["x"], b["conf"]) - b["y"]).norm(dim=-1).mean() / 100
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            model.eval()
            steps, before, error = steps + CHECK, schedule.best, float(errors(model, val).mean())
            if not math.isfinite(error):
                stop("the error became infinite or NaN: train the run with a lower --lr_3")
            schedule.step(error)
            if schedule.best < before:
                best_steps, best = steps, copy.deepcopy(model.state_dict())
            elif optimizer.param_groups[0]["lr"] < lr:
                model.load_state_dict(best)
            lr = optimizer.param_groups[0]["lr"]
            bar.update(CHECK)
            bar.set_postfix(mpjpe=f"{error:.2f}", best=f"{schedule.best:.2f}", lr=f"{lr:.2g}")
    return model, dict(val=schedule.best, steps=steps, best_steps=best_steps,
                       seconds=time.monotonic() - began)


def errors(model: nn.Module, b: dict) -> np.ndarray:
    """MPJPE of every sample of a block, mm."""
    return mpjpe(lift(model, b["x"], b["conf"]).cpu(), b["y"].cpu())


def mean_of_actions(model: nn.Module, b: dict, names: list[str]) -> float:
    """MPJPE of a block as in the tables of evaluate.py."""
    action = b["action"].cpu().numpy()
    rows = dict(mpjpe=errors(model, b), action=action, occluded=np.zeros(len(action)))
    return summarize(rows, names)["mpjpe"]["actions"]


def by_labels(report: dict) -> list[tuple[int, dict]]:
    """The numbers of labels for which all inputs have been trained, and the lifters of each."""
    found = sorted((int(labels), lifters) for labels, lifters in report["lifters"].items())
    return [(labels, lifters) for labels, lifters in found if all(lifters.values())]


def as_page(run: Run, report: dict, splits: list[str]) -> str:
    """A row for every number of labels and every input; means over seeds."""
    head, rows = ["labelled poses, input"], []
    for split in splits:
        head += [f"{split}: MPJPE", "ratio to (a)"]
    for labels, lifters in by_labels(report):
        for name, seeds in lifters.items():
            cells = [f"{labels}: {NAMES[name]}"]
            for split in splits:
                mine, sparse = ([r[split] for r in lifters[n].values()] for n in (name, "sparse"))
                cells += [number(mine), f"{np.mean(mine) / np.mean(sparse):.2f}"]
            cells += [f"{np.mean([r[key] for r in seeds.values()]):.0f}"
                      for key in ("steps", "seconds")]
            rows.append(cells)
    on = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    return (f"# Few 3D labels: {run.path}\n\nMillimetres, mean of actions; steps and seconds until "
            f"validation stopped improving. Measured on: {on}.\n\n"
            f"{table([*head, 'steps', 'seconds'], rows)}\n")


def as_figure(report: dict, splits: list[str]) -> Figure:
    """MPJPE against labelled poses; bars are standard deviations over seeds."""
    fig, found = Figure(figsize=(5 * len(splits), 4.4), layout="constrained"), by_labels(report)
    axes, labels = fig.subplots(1, len(splits), squeeze=False)[0], [n for n, _ in found]
    for ax, split in zip(axes, splits, strict=True):
        for name, label in NAMES.items():
            mm = [[r[split] for r in lifters[name].values()] for _, lifters in found]
            ax.errorbar(labels, [np.mean(v) for v in mm], [np.std(v, ddof=len(v) > 1) for v in mm],
                        color=COLOURS[name], marker="o", capsize=3, label=label)
        ax.set(xscale="log", xlabel="labelled poses", ylabel="MPJPE, mm",
               title=f"{split}: {TESTED[split]}" if split in TESTED else split)
        ax.set_xticks(labels, map(str, labels))
        ax.minorticks_off()
    axes[0].legend(frameon=False, fontsize=9)
    return fig


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", default="standard", help="the run, runs/NAME")
    p.add_argument("--labels", type=int, nargs="+", default=(500, 2000, 8000, 40_000))
    p.add_argument("--seeds", type=int, default=1, help="lifters for every row")
    p.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    args = p.parse_args()
    run = Run(Path("runs") / args.name, Config(), Training(), choose_device(args.device))
    about = {name: load_finished(run, name) for name in ("stage1", "stage2", "regressor")}
    of = about["regressor"]["run"]
    run = replace(run, training=Training(**about["regressor"]["training"]), data=of["data"],
                  seed=of["seed"])
    train, meta = run.split("train"), run.split("test").meta
    if not 0 < min(args.labels) <= max(args.labels) <= train.n or args.seeds < 1:
        stop(f"--labels must be 1 to {train.n}, and --seeds at least 1, found "
             f"{' '.join(map(str, args.labels))} and {args.seeds}")
    splits = sorted((s for s in meta["splits"] if s not in ("train", "val")), reverse=True)
    settings = dict(
        samples=run.samples(), training=asdict(run.training),
        rule=[DRAWN, LEAST_DRAWS, CHECK, PATIENCE, LEAST, HALVINGS],
        trained_before={name: saved["seconds"] for name, saved in about.items()})
    path = run.path / "few_labels.json"
    with alone_in(run.path), run.watch.listening():
        report = dict(machine=machine(run.device.type), settings=settings, lifters={})
        if path.exists():
            try:
                report = read_json(path)
                same = report["settings"] == settings
            except (ValueError, TypeError, LookupError):
                same = False
            if not same:
                stop(f"{path} is damaged, or is of other models or another rule: move it away")
        inputs = Inputs(run)
        shown = {name: {split: inputs.of_split(name, run.split(split))
                        for split in ("val", *splits)} for name in NAMES}
        for seed, labels in itertools.product(range(args.seeds), args.labels):
            trained = report["lifters"].setdefault(str(labels), {name: {} for name in NAMES})
            for name in (name for name in NAMES if str(seed) not in trained[name]):
                blocks = shown[name]
                model, found = train_lifter(inputs, name, train.spread(labels), blocks["val"], seed)
                found |= {s: mean_of_actions(model, blocks[s], meta["actions"]) for s in splits}
                trained[name][str(seed)] = found
                print(f"{labels} labels, {name}, seed {seed}: {json.dumps(found)}", flush=True)
                write(path, json.dumps(report, indent=1))
            write(path.with_suffix(".md"), as_page(run, report, splits))
            save(as_figure(report, splits), path.with_suffix(".png"))
        print(f"\n{path.with_suffix('.md').read_text()}")


if __name__ == "__main__":
    main()
