"""Learning curves of a run, drawn from its log: what training time buys each input of the lifter.

    fig = learning_curves(run)      # sample.py writes it to runs/NAME/figures/curves.png
"""

import re

from matplotlib.figure import Figure  # without pyplot: whoever saves it chooses how it is drawn
from matplotlib.ticker import StrMethodFormatter

from checkpoints import Run, load_checkpoint
from survival import stop
from train import INPUTS

# Okabe and Ito's colours, which colour-blind readers tell apart
COLOURS = {"sparse": "#444444", "generated": "#0072B2", "regressor": "#D55E00"}
MADE_BY = {"generated": ("stage1", "stage2"), "regressor": ("regressor",)}  # what a lifter is given
METRICS = {"mpjpe": "validation", "unseen_mpjpe": "unseen motion"}
DENSIFIERS = {"stage2": ("generated", "batch_2", "HiARM"),
              "regressor": ("regressor", "batch_3", "plain regressor")}  # fmt: skip


def learning_curves(run: Run) -> Figure:
    """MPJPE of lifters (a), (b) and (d) against the time of all trainings that they need, and the
    error of both densifiers against the samples that they have seen."""
    lifters, densifiers = read_log(run)
    metrics = [m for m in METRICS if any(m in epochs[0] for _, epochs in lifters)]
    fig = Figure(figsize=(12, 4.6), layout="constrained")
    axes = fig.subplots(1, len(metrics) + 1, squeeze=False)[0]
    for ax, metric in zip(axes, metrics, strict=False):
        draw_lifters(ax, [(name, e) for name, e in lifters if metric in e[0]], metric)
    draw_densifiers(axes[-1], densifiers)
    lines = {line.get_label(): line for line in axes[0].lines}  # one for all seeds
    fig.legend(lines.values(), lines, loc="outside lower center", ncols=2, frameon=False)
    return fig


def read_log(run: Run) -> tuple[list[tuple[str, list[dict]]], dict[str, list[dict]]]:
    """The epochs of lifters, by input, and of densifiers, by model: dicts of `samples`, `seconds`
    and what was measured on validation. A lifter's seconds begin with all that it is given."""
    logs, lifters = {}, []
    try:
        for row in run.logged():
            numbers = dict(steps=row["steps"], seconds=row["seconds"], **row["val"])
            logs.setdefault(row["model"], []).append({k: float(v) for k, v in numbers.items()})
        for model, epochs in logs.items():
            found = re.fullmatch(r"stage3_(sparse|sparse_long|generated|regressor)_\d+", model)
            if found and all(made in logs for made in MADE_BY.get(found[1], ())):
                name = found[1]
                before = sum(logs[made][-1]["seconds"] for made in MADE_BY.get(name, ()))
                lifters.append((name, [e | dict(seconds=before + e["seconds"]) for e in epochs]))
        densifiers = {}
        for model, (_, batch, _) in DENSIFIERS.items():
            if model in logs and (run.path / f"{model}.pt").exists():  # no regressor in weights/
                size = load_checkpoint(run, model)["training"][batch]
                densifiers[model] = [dict(samples=e["steps"] * size, fine_px=e["fine_px"])
                                     for e in logs[model]]
    except (ValueError, TypeError, LookupError, OverflowError):
        stop(f"{run.path / 'log.jsonl'} is damaged: move it away, and no curves are drawn")
    return lifters, densifiers


def draw_lifters(ax, lifters: list[tuple[str, list[dict]]], metric: str) -> None:
    for name, epochs in lifters:
        ax.plot([e["seconds"] for e in epochs], [e[metric] for e in epochs],
                color=COLOURS[name.removesuffix("_long")], ls="--" if name == "sparse" else "-",
                marker="o", ms=5, markevery=[-1], label=INPUTS[name])
    last = [epochs[-1][metric] for _, epochs in lifters]
    ax.set(xlabel="seconds of training, all that the input needs", ylabel="MPJPE, mm",
           title=f"3D error on {METRICS[metric]}", xlim=(0, None),
           ylim=(0.95 * min(last), 1.4 * max(last)))  # the first epochs are far above


def draw_densifiers(ax, densifiers: dict[str, list[dict]]) -> None:
    """Both axes are logarithmic."""
    for model, epochs in densifiers.items():
        name, _, label = DENSIFIERS[model]
        ax.loglog([e["samples"] for e in epochs], [e["fine_px"] for e in epochs],
                  color=COLOURS[name], marker="o", ms=3, label=label)
    for which in ("set_major_formatter", "set_minor_formatter"):
        getattr(ax.yaxis, which)(StrMethodFormatter("{x:g}"))
    ax.set(xlabel="training samples seen", ylabel="error of the 96 fine points, px",
           title="2D error on validation")
    ax.legend(frameon=False)
