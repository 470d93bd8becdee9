"""Does HiPART know when it is wrong? Several hypotheses of each pose, against the truth.

    python hypotheses.py --name standard
    python hypotheses.py --name quick --samples 200     # a first look

HiARM is a distribution over poses, and evaluate.py asks it for one answer. Here poses are drawn
from it (`HiPART.sample`), on the data that the run was trained on:

- At which temperature? The one with the lowest *energy score* on validation. This is a proper
  scoring rule: no distribution scores better than the true one, so it rewards neither hypotheses
  that are all alike nor such as are spread at random.
- Is it sure where it is right? How far the hypotheses lie apart and how likely they are, against
  the error of the single answer: rank correlations and risk-coverage curves.
- Is the truth among them? The best of 20 in 3D, chosen with the truth at hand, so an *oracle*: a
  bound for whoever chooses among hypotheses. And the mean of their lifts, which needs no oracle.

Needs all three stages. Writes hypotheses.md, hypotheses.json and figures/risk_coverage.png to
runs/NAME. lift.py draws its hypotheses at the temperature that was found here.
"""

import argparse
import json
from collections.abc import Callable

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import Run
from evaluate import mpjpe, open_run, trained_on_own_data
from hipart import HiPART
from sample import save
from sources.dataset import Split
from sources.files import read_json
from survival import Watch, stop, write
from tables import LOW_CONF, mean, table
from train import lift, load_hipart, load_lifter, next_command

TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
FEW, MANY = 5, 20  # hypotheses of each pose: to choose a temperature, and for all else
BEST_OF = (1, 5, MANY)
COVERAGES = (0.5, 0.8, 0.9, 1.0)
# What may tell that an answer is wrong, the more the higher, in the colours of Okabe and Ito.
SIGNS = {"spread": ("spread of the hypotheses", "#0072B2"),
         "unlikely": ("their negative log-likelihood", "#009E73"),
         "unsure": ("the detector's doubt, 1 - mean confidence", "#D55E00"),
         "error_2d": ("oracle: the error itself", "#444444"),
         "random": ("random", "#BBBBBB")}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Statistics


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of every value [N], from 0; values that are equal share their mean rank."""
    _, group, size = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(size) - (size + 1) / 2)[group]


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's: the correlation of the ranks of a and b [N]; None if one of them is constant."""
    a, b = (r - r.mean() for r in map(ranks, (a, b)))
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size else None


def risk(error: np.ndarray, doubt: np.ndarray) -> np.ndarray:
    """The mean error of the 1, 2, ... N samples with the least doubt [N]. Among samples of equal
    doubt the order is open, so each counts with the mean error of them all."""
    _, group, size = np.unique(doubt, return_inverse=True, return_counts=True)
    shared = (np.bincount(group, error) / size)[group]
    return np.cumsum(shared[np.argsort(doubt, kind="stable")]) / np.arange(1, len(error) + 1)


def risk_at(error: np.ndarray, doubt: np.ndarray, coverage: float) -> float:
    """The mean error of the share `coverage` of the samples with the least doubt."""
    return float(risk(error, doubt)[max(1, round(coverage * len(error))) - 1])


def pose_distance(a: Tensor, b: Tensor) -> Tensor:
    """Poses [..., P, 2] -> their distance [...]: the root of the mean squared distance of their
    points. It is a norm of the difference, as the energy score needs."""
    return (a - b).pow(2).sum(-1).mean(-1).sqrt()


def energy_score(x: Tensor, true: Tensor) -> Tensor:
    """The energy score (Gneiting and Raftery 2007) of n hypotheses x [B, n, P, 2] for the true
    poses [B, P, 2] -> [B]: their mean distance to the truth, minus half their mean distance to one
    another. It does not depend on n, but for chance. Of one hypothesis, it is the distance."""
    n = x.shape[1]
    apart = sum(pose_distance(x, x.roll(k, 1)).mean(1) for k in range(1, n)) / max(1, n - 1)
    return pose_distance(x, true[:, None]).mean(1) - apart / 2


# --------------------------------------------------------------------------------------------------
# Measuring: a number per sample


@torch.no_grad()
def measure_hypotheses(split: Split, hipart: HiPART, lifter: nn.Module | None, temperature: float,
                       n: int, generator: torch.Generator) -> dict[str, np.ndarray]:
    """One number per sample, in pixels, and with a lifter in millimetres: {column: [N]}.

    error_2d, error_3d        of the single answer
    score, score_one          energy score of n hypotheses; of the single answer as the only one
    spread                    mean distance of the hypotheses' fine points to their mean
    error_mean                2D error of that mean
    unlikely                  minus the mean log-probability of the hypotheses
    unsure                    1 minus the detector's mean confidence
    occluded                  as in the tables
    best_3d_K, mean_3d        3D error of the best of the first K hypotheses, and of the mean lift
    """
    columns: dict[str, list] = {}
    for block in tqdm(split.blocks(size=256), "hypotheses", -(-split.n // 256), leave=False):
        x_s, conf, true = block["x_s"], block["conf"], block["x_f"]
        one_d, one_f = hipart.densify(x_s, conf)
        x_d, x_f, log_prob = hipart.sample(x_s, conf, n, temperature, generator=generator)
        centre, px = x_f.mean(1), split.w / 2

        def off(a: Tensor, b: Tensor, px=px) -> Tensor:
            return (a - b).norm(dim=-1).mean(-1) * px

        rows = dict(
            error_2d=off(one_f, true), score_one=pose_distance(one_f, true) * px,
            score=energy_score(x_f, true) * px, spread=off(x_f, centre[:, None]).mean(1),
            error_mean=off(centre, true), unlikely=-log_prob.mean(1), unsure=1 - conf.mean(1),
            occluded=(conf < LOW_CONF).any(1))
        if lifter:
            given = [a.repeat_interleave(n, 0) for a in (x_s, conf)]
            lifts = lift(lifter, torch.cat([given[0], x_d.flatten(0, 1), x_f.flatten(0, 1)], 1),
                         given[1]).unflatten(0, (-1, n))
            single = lift(lifter, torch.cat([x_s, one_d, one_f], 1), conf)
            y = block["y"].cpu()
            off_3d = np.stack([mpjpe(some.cpu(), y) for some in lifts.unbind(1)])  # [n, N]
            rows |= dict(error_3d=mpjpe(single.cpu(), y), mean_3d=mpjpe(lifts.mean(1).cpu(), y))
            rows |= {f"best_3d_{k}": off_3d[:k].min(0) for k in BEST_OF}
        for name, values in rows.items():
            values = values.cpu().numpy() if isinstance(values, Tensor) else values
            columns.setdefault(name, []).append(values.astype(np.float64))
    return {name: np.concatenate(values) for name, values in columns.items()}


def summarize_hypotheses(rows: dict[str, np.ndarray]) -> dict:
    """Averages, rank correlations with the 2D error and risks, over all samples, the occluded ones
    and the others."""
    hidden, result = rows["occluded"] > 0, {}
    for name, chosen in (("all", hidden | ~hidden), ("occluded", hidden), ("clear", ~hidden)):
        some = {k: v[chosen] for k, v in rows.items()}
        result[name] = dict(n=int(chosen.sum()), means={k: mean(v) for k, v in some.items()})
        if chosen.any():
            signs = {k: some[k] for k in SIGNS if k != "random"}
            error = some["error_2d"]
            result[name] |= dict(
                correlation={k: rank_correlation(v, error) for k, v in signs.items()},
                risk={k: [risk_at(error, v, c) for c in COVERAGES] for k, v in signs.items()})
    return result


# --------------------------------------------------------------------------------------------------
# What is shown


def temperature_table(tried: dict[float, dict]) -> str:
    """What validation says of each temperature."""
    rows = [[f"{t:g}", *(f"{s['all']['means'][k]:.2f}" for k in
                         ("score", "spread", "error_mean"))] for t, s in tried.items()]
    one = next(iter(tried.values()))["all"]["means"]
    rows.append(["single answer", f"{one['score_one']:.2f}", "0.00", f"{one['error_2d']:.2f}"])
    return table(["temperature (validation), px", "energy score", "spread", "error of the mean"],
                 rows)


def doubt_table(s: dict) -> str:
    """Rank correlations and risks of one split."""
    head = ["sign of doubt", "all", "occluded", "not occluded",
            *(f"{c:.0%}" for c in COVERAGES)]
    rows = []
    for sign, (label, _) in SIGNS.items():
        if sign == "random":
            rows.append([label, "-", "-", "-", *[f"{s['all']['means']['error_2d']:.2f}"] * 4])
            continue
        cells = [s[part].get("correlation", {}).get(sign) for part in ("all", "occluded", "clear")]
        rows.append([label, *("-" if c is None else f"{c:.2f}" for c in cells),
                     *(f"{r:.2f}" for r in s["all"]["risk"][sign])])
    return table(head, rows)


def lifting_table(summaries: dict[str, dict]) -> str:
    """3D errors of the single answer and of hypotheses; summaries: {how they were drawn: ...}."""
    def cells(s: dict, name: str) -> list[str]:
        values = [s[part]["means"][name] for part in ("all", "occluded", "clear")]
        return ["-" if v is None else f"{v:.1f}" for v in values]

    rows = [["single answer", *cells(next(iter(summaries.values())), "error_3d")]]
    for how, s in summaries.items():
        rows += [[f"{how}: one hypothesis", *cells(s, "best_3d_1")],
                 *([f"{how}: best of {k} (oracle)", *cells(s, f"best_3d_{k}")]
                   for k in BEST_OF[1:]),
                 [f"{how}: mean of {MANY} lifts", *cells(s, "mean_3d")]]
    return table(["MPJPE, mm", "all", "occluded", "not occluded"], rows)


def draw_risk(splits: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Risk-coverage curves, a panel for each split."""
    fig = Figure(figsize=(5.2 * len(splits), 5), layout="constrained")
    axes = fig.subplots(1, len(splits), squeeze=False)[0]
    for ax, (name, rows) in zip(axes, splits.items(), strict=True):
        error, n = rows["error_2d"], len(rows["error_2d"])
        share = np.arange(1, n + 1) / n
        for sign, (label, colour) in SIGNS.items():
            curve = risk(error, np.zeros(n) if sign == "random" else rows[sign])
            ax.plot(share[share >= 0.05], curve[share >= 0.05], color=colour, lw=2, label=label)
        ax.set(xlabel="share of the samples that are kept, the surest first", xlim=(0, 1),
               ylim=(0, None), ylabel="mean 2D error of the single answer, px")
        ax.set_title(f"{name}: {n} samples", fontsize=11)
        ax.grid(alpha=0.3)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", frameon=False,
               ncols=2)
    return fig


# --------------------------------------------------------------------------------------------------
# The run


def best_temperature(run: Run) -> float:
    """The temperature that was found for a run, or 1, the model's own, if none was looked for."""
    path = run.path / "hypotheses.json"
    if not path.exists():
        return 1.0
    try:
        found = float(read_json(path, 1 << 24)["temperature"])
        if not 0 < found < 100:
            raise ValueError
    except (ValueError, TypeError, LookupError, OverflowError):
        stop(f"{path} is damaged: run `python hypotheses.py --name {run.path.name}` again, or "
             "delete it")
    return found


def choose_temperature(measured: Callable[[float], dict]) -> tuple[float, dict[float, dict]]:
    """The temperature with the lowest energy score, and what was measured at all of them."""
    tried = {t: summarize_hypotheses(measured(t)) for t in TEMPERATURES}
    return min(tried, key=lambda t: tried[t]["all"]["means"]["score"]), tried


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", default="standard", help="the run, runs/NAME")
    p.add_argument("--samples", type=int, default=1000, help="of every split, evenly spread")
    p.add_argument("--device", help="cuda or cpu; default: cuda if there is one, else cpu")
    args = p.parse_args()
    if args.samples < 1:
        stop(f"--samples must be at least 1, found {args.samples}")
    run, stages = open_run(args.name, args.device, stage_3=["stage3_generated_0"])
    run = trained_on_own_data(run)
    if stages < 3:
        stop(f"{run.path} has {stages} of the three stages that are needed: go on with "
             f"`{next_command(run, stages + 1)}`")
    names = [name for name in run.split("val").meta["splits"] if name != "train"]
    splits = {name: run.split(name, has_mesh=True).spread(args.samples) for name in names}
    splits = {name: split for name, split in splits.items() if split.n}
    if "val" not in splits or len(splits) < 2:
        stop(f"{run.data} needs true fine points on validation and beyond, found them on "
             f"{', '.join(splits) or 'no split'}: take a run on other data")
    hipart, lifter = load_hipart(run), load_lifter(run, "generated")
    generator = torch.Generator(run.device).manual_seed(run.seed)
    val, tested = splits.pop("val"), splits
    best, tried = choose_temperature(
        lambda t: measure_hypotheses(val, hipart, None, t, FEW, generator))
    hows = {f"at temperature {t:g}": t for t in dict.fromkeys((best, 1.0))}
    rows = {name: {how: measure_hypotheses(split, hipart, lifter, t, MANY, generator)
                   for how, t in hows.items()} for name, split in tested.items()}
    summaries = {name: {how: summarize_hypotheses(r) for how, r in of.items()}
                 for name, of in rows.items()}

    text = [f"# Hypotheses of {run.path}",
            f"{run.data}: " + ", ".join(f"{s.n} samples of {name}" for name, s in
                                        {"val": val, **tested}.items())
            + f"; {FEW} hypotheses of each on validation, {MANY} elsewhere.",
            "## Temperature",
            f"{best:g} has the lowest energy score, a proper scoring rule: it is lowest for the "
            "true distribution. *spread*: mean distance of fine points to their mean over the "
            "hypotheses; a distribution that is as broad as it should be has about the spread of "
            "its errors.", temperature_table(tried)]
    for name, of in summaries.items():
        text += [f"## {name}"]
        for how, s in of.items():
            text += [f"{how.capitalize()}: Spearman's rank correlation of what tells of doubt with "
                     "the 2D error of the single answer, and the mean error (px) of the share of "
                     "samples with the least doubt.", doubt_table(s)]
        text += ["In 3D, each hypothesis lifted as the single answer is. The best is chosen by its "
                 "true error, so it is a bound and no method.", lifting_table(of)]
    text = "\n\n".join(text) + "\n"
    numbers = dict(run=args.name, data=run.data, temperature=best,
                   tried={f"{t:g}": s for t, s in tried.items()}, splits=summaries)
    write(run.path / "hypotheses.md", text)
    write(run.path / "hypotheses.json", json.dumps(numbers, indent=1))
    (run.path / "figures").mkdir(exist_ok=True)
    save(draw_risk({name: of[next(iter(hows))] for name, of in rows.items()}),
         run.path / "figures" / "risk_coverage.png")
    print(f"\n{text}\nThis is {run.path}/hypotheses.md; its numbers are in hypotheses.json beside "
          "it.")


if __name__ == "__main__":
    with Watch().listening():
        main()
