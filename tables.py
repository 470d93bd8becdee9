"""Tables: what evaluate.py measures, as averages and as text.

`summarize` averages rows of numbers, one row per sample. `short_table` is what one wants to know
first, and `report` is everything: Markdown that reads as plain text.
"""

import datetime
import os
import platform
import re

import numpy as np
import torch

from checkpoints import Run
from hipart import Config
from train import INPUTS, Training, input_of

# What is tested in the default data. Other data sets say it in their own words (meta.json).
TESTED = {"test": "new bodies, familiar motion", "unseen": "unseen motion"}
LOW_CONF = 0.5  # a sample with a joint that is missing, or less sure than this, counts as occluded
# What a 2D error can be of, in the order in which the error is taken apart.
SOURCES = {"input": "the input itself, at its visible joints",
           "tokenizer": "reconstruction error of the tokenizer",
           "teacher_forced": "HiARM, teacher-forced",
           "generated": "HiARM, free-running (b)",
           "regressor": "plain regressor (d)"}  # fmt: skip
PAPER_MPJPE = {"sparse": "52.1", "generated": "42.0",
               "sparse_clean": "37.6", "ground_truth_clean": "17.5"}  # fmt: skip
PAPER_RESULTS = (
    "With 2D poses from CPN: 52.1 from the sparse pose alone, 42.0 with HiPART (ratio 0.81). Toy "
    "experiment on ground-truth 2D poses: 37.6 -> 17.5 (ratio 0.47). HiPART by source of the 2D "
    "poses: 49.3 SH / 42.0 CPN / 28.3 ground truth.")  # fmt: skip
PAPER_TEMPORAL = (
    "The paper, without and with HiPART, on Human3.6M: spatial transformer (one frame) 52.1 -> "
    "42.0, PoseFormer (81) 44.3 -> 40.8, MixSTE (81) 42.4 -> 39.3, MixSTE (243) 40.9 -> 36.7.")
ON_OTHER_DATA = (r"\* Human3.6M, the paper's data set and not this one: compare ratios, never "
                 "millimetres. ")  # fmt: skip
ON_HUMAN36M = r"\* Human3.6M, as in the paper. "



# --------------------------------------------------------------------------------------------------
# Averages


def summarize(rows: dict[str, np.ndarray], names: list[str]) -> dict[str, dict]:
    """{column: [N]} -> {column: averages}; an undefined number (NaN) does not count.

    per_action: {name: mean over its frames}; actions: the plain mean of these (the field's habit);
    frames: the mean over all frames; occluded, clear: the mean over the frames with and without
    occlusion. An empty average is None. names: of the actions, by number; -1 is "unknown".
    """
    label, hidden, result = rows["action"].astype(int), rows["occluded"] > 0, {}
    for name, values in rows.items():
        per_action = {("unknown", *names)[a + 1]: mean(values[label == a])
                      for a in np.unique(label)}
        result[name] = dict(actions=mean(list(per_action.values())), frames=mean(values),
                            occluded=mean(values[hidden]), clear=mean(values[~hidden]),
                            per_action=per_action)
    return result


def mean(values) -> float | None:
    """The mean of the numbers that are defined; None if none is."""
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None


def errors_3d(s: dict, name: str, seeds: int, metric="mpjpe", average="actions") -> list:
    """The error of input `name` for every seed, from the summary `s` of a split; mm, or None."""
    return [s[f"{metric}/{name}/{seed}"][average] for seed in range(seeds)]


def ratio(s: dict, name: str, seeds: int, base: str = "sparse_long") -> str:
    """The MPJPE of an input to that of another, clean to clean, over the same samples."""
    base = "sparse_clean" if name.endswith("_clean") else base
    metric = "mpjpe_with_mesh" if name.startswith("ground_truth") else "mpjpe"
    mine, sparse = errors_3d(s, name, seeds), errors_3d(s, base, seeds, metric)
    return "-" if None in mine else f"{np.mean(mine) / np.mean(sparse):.2f}"


# --------------------------------------------------------------------------------------------------
# Tables: Markdown that reads as plain text


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned Markdown: the first column to the left, numbers to the right."""
    width = [max(map(len, cells)) for cells in zip(head, *rows, strict=True)]
    lines = [[row[0].ljust(width[0]), *map(str.rjust, row[1:], width[1:])] for row in (head, *rows)]
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
    """A row for every action and for both means of a summary; cells(get) -> the cells of a row,
    where get(column) is its number."""
    rows = [[a, *cells(lambda name, a=a: s[name]["per_action"][a])]
            for a in s["action"]["per_action"]]
    return [*rows, ["**mean of actions**", *cells(lambda name: s[name]["actions"])],
            ["**all frames**", *cells(lambda name: s[name]["frames"])]]


def costs(about: dict[str, dict], name: str) -> dict[str, tuple[float, float]]:
    """The seconds and the samples of all that is trained for an input: {"stage1", "densifier",
    "lifter": (seconds, samples)}, of lifters the means over seeds."""
    trained = dict(stage1=["stage1"], densifier=["stage2"]) if name == "generated" else {}
    trained = dict(densifier=["regressor"]) if name == "regressor" else trained
    trained["lifter"] = [m for m in about if m.rpartition("_")[0] == f"stage3_{name}"]
    return {part: tuple(np.mean([[about[m]["seconds"], about[m]["samples"]] for m in models], 0))
            for part, models in trained.items()}


def short_table(summaries: dict[str, dict], seeds: int, about: dict[str, dict]) -> str:
    """What one wants to know first: all inputs on every tested split, and what they cost."""
    head = ["mm, mean of actions"]
    for name in summaries:
        head += [f"{name}: MPJPE", "PA-MPJPE", "ratio"]
    rows = []
    for name, label in INPUTS.items():
        cells = [[number(errors_3d(s, name, seeds)), number(errors_3d(s, name, seeds, "pa_mpjpe")),
                  ratio(s, name, seeds)] for s in summaries.values()]
        cost = costs(about, name)
        samples = [f"{cost[part][1]:,.0f}" for part in ("densifier", "lifter") if part in cost]
        rows.append([label, *sum(cells, []), f"{sum(s for s, _ in cost.values()):,.0f}",
                     " + ".join(samples)])
    return table([*head, "training, s", "samples"], rows)


def cost_table(about: dict[str, dict]) -> str:
    """The training time and the samples of every input, by what was trained."""
    parts, rows = ("stage1", "densifier", "lifter"), []
    for name, label in INPUTS.items():
        cost = costs(about, name)
        cells = [f"{cost[part][i]:,.0f}" if part in cost else "-" for i in (0, 1) for part in parts]
        rows.append([label, f"{sum(s for s, _ in cost.values()):,.0f}", *cells])
    return table(["input of the lifter", "training, s", "stage 1, s", "densifier, s", "lifter, s",
                  "stage 1, samples", "densifier, samples", "lifter, samples"], rows)


def temporal_table(summaries: dict[str, dict], lifters: list[tuple]) -> str:
    """Lifters of sequences, and of single frames: the errors on every tested split, and the paper's
    (Tables 6 and 10). lifters: (name, seeds, parameters, seconds of training, its data)."""
    head = ["mm, mean of actions"]
    for name in summaries:
        head += [f"{name}: MPJPE", "all frames", "PA-MPJPE", "ratio"]
    rows, seeds_of = [], {name: seeds for name, seeds, *_ in lifters}
    for name, seeds, size, seconds, data in lifters:
        source, cells = input_of(name), []
        kind = re.sub(r"(\d+)_$", r", \1 frames", name.removesuffix(source)) or "single frames"
        sparse = name.removesuffix(source) + "sparse"
        for s in summaries.values():
            errors = [[s[f"{metric}/{name}/{seed}"][average] for seed in seeds]
                      for metric, average in (("mpjpe", "actions"), ("mpjpe", "frames"),
                                              ("pa_mpjpe", "actions"))]
            metric = "mpjpe_with_mesh" if source == "ground_truth" else "mpjpe"
            base = [s[f"{metric}/{sparse}/{seed}"]["actions"] for seed in seeds_of.get(sparse, ())]
            known = base and None not in base + errors[0]
            cells += [*map(number, errors),
                      f"{np.mean(errors[0]) / np.mean(base):.2f}" if known else "-"]
        rows.append([f"{kind}: {INPUTS[source][3:].split(',')[0]}", *cells, f"{size / 1e6:.2f}",
                     f"{seconds:,.0f}", data])
    return (table([*head, "parameters, M", "training, s", "trained on"], rows)
            + "\n\n*ratio*: to the same lifter with sparse input. *training, s*: of the lifter "
            "alone. Errors of lifters that were trained on other data do not compare. "
            f"{PAPER_TEMPORAL}")


def lifting_tables(s: dict, seeds: int, kind: str, meta: dict, split: str) -> str:
    """3D errors of one split: on average, and per action (Table 1). kind: what it holds."""
    n, paper = meta["splits"][split]["n"], paper_mpjpe(meta)
    with_mesh = meta["splits"][split].get("with_mesh", n)
    if with_mesh < n:
        kind += (f"; {with_mesh} of {n} samples have true dense and fine points: what needs them "
                 "is their mean, and its ratio is to the same samples")
    head = ["input of the lifter", "MPJPE, mean of actions", "MPJPE, all frames",
            "PA-MPJPE, mean of actions", "PA-MPJPE, all frames", "ratio", "occluded",
            "not occluded", r"paper\*"]
    rows = []
    for name, label in INPUTS.items():
        errors = [number(errors_3d(s, name, seeds, metric, average))
                  for metric in ("mpjpe", "pa_mpjpe") for average in ("actions", "frames")]
        occluded = [number(errors_3d(s, name, seeds, average=a)) for a in ("occluded", "clear")]
        if name.endswith("_clean"):  # nothing is occluded there
            occluded = ["-", "-"]
        rows.append([label, *errors, ratio(s, name, seeds), *occluded, paper.get(name, "-")])
    spread = f", mean ± standard deviation over {seeds} seeds" if seeds > 1 else ""
    actions = per_action(s, lambda get: [number([get(f"mpjpe/{name}/{i}") for i in range(seeds)])
                                         for name in INPUTS])
    return "\n\n".join([
        f"({kind}) Millimetres{spread}.",
        table(head, rows),
        "*ratio*: MPJPE (mean of actions) to that of (a) with as much time as (b); in clean rows, "
        "to clean sparse. "
        f"*occluded*: MPJPE over the {s['occluded']['frames']:.0%} of frames in which a joint is "
        f"missing or has a confidence below {LOW_CONF}.",
        (ON_HUMAN36M if meta.get("source") == "h36m" else ON_OTHER_DATA) + PAPER_RESULTS,
        f"**HiPART (b) is at {ratio(s, 'generated', seeds)} of sparse only (a)** with as much "
        f"training time, and at {ratio(s, 'generated', seeds, 'sparse')} of (a) with as many "
        f"samples, which the paper compares it with: 0.81 on Human3.6M. The plain regressor (d) is "
        f"at {ratio(s, 'regressor', seeds)} and {ratio(s, 'regressor', seeds, 'sparse')}.",
        *protocol_14(s, seeds),
        "MPJPE per action:",
        table(["action", *INPUTS.values()], actions),
        "Visible and missing joints apart, mm, mean over frames. A missing joint is a learned "
        "token; *interpolated*: the same models are given the mean of its neighbours instead.",
        missing_table(s, seeds)])


def protocol_14(s: dict, seeds: int) -> list[str]:
    """3DPW's usual protocol, if the data name its joints: 14 joints, poses moved to their pelvis,
    means over frames."""
    if "mpjpe_14/sparse/0" not in s:
        return []
    rows = [[label, *(number(errors_3d(s, name, seeds, metric, "frames"))
                      for metric in ("mpjpe_14", "pa_mpjpe_14"))]
            for name, label in INPUTS.items()]
    return ["14 joints, relative to the predicted pelvis, mean over all frames, mm:",
            table(["input of the lifter", "MPJPE", "PA-MPJPE"], rows)]


def missing_table(s: dict, seeds: int) -> str:
    """Visible and missing joints apart; and the learned token against interpolation."""
    rows = []
    for name in ("sparse_long", "sparse_long interpolated", "generated", "generated interpolated",
                 "regressor"):
        label = INPUTS[name.split()[0]]
        label += ", missing joints interpolated" if "interpolated" in name else ""
        rows.append([label, *(number(errors_3d(s, name, seeds, which, "frames"))
                              for which in ("visible", "missing"))])
    return table(["input of the lifter", "visible joints", "missing joints"], rows)


def sources(s: dict, kind: str) -> list[str]:
    """The sources that were measured. Clean input has no error of its own."""
    return [name for name in SOURCES
            if f"px/{kind}/{name}" in s and (kind, name) != ("clean", "input")]


def pixels(get, kind: str, source: str) -> str:
    """A cell: pixels (percent of standing height)."""
    px, share = get(f"px/{kind}/{source}"), get(f"percent/{kind}/{source}")
    return "-" if px is None else f"{px:.1f} ({share:.1f} %)"


def error_table(summaries: dict[str, dict]) -> str:
    """Where the 2D error comes from: training, validation and test samples side by side."""
    rows = []
    for kind in ("detected", "clean"):
        for source in sources(next(iter(summaries.values())), kind):
            cells = [pixels(lambda name, s=s: s[name]["frames"], kind, source)
                     for s in summaries.values()]
            rows.append([f"{kind}: {SOURCES[source]}", *cells])
        for level, label in (("s", "sparse"), ("d", "dense")):
            cells = [f"{number([s[f'accuracy_{level}/{kind}']['frames']])} %"
                     for s in summaries.values()]
            rows.append([f"{kind}: {label} tokens right, teacher-forced", *cells])
    return table(["px (% of standing height)", *summaries], rows)


def fine_pose_tables(s: dict) -> str:
    """Fig. 12 for one split: the error of the 96 fine points per action, by source."""
    text = []
    for kind in ("detected", "clean"):
        shown = sources(s, kind)
        rows = per_action(s, lambda get, kind=kind, shown=shown: [pixels(get, kind, source)
                                                                  for source in shown])
        text += [f"From {kind} input, px (% of standing height):",
                 table(["action", *(SOURCES[source] for source in shown)], rows)]
    return "\n\n".join(text)


def tokenizer_table(reports: dict[str, dict], summaries: dict[str, dict], c: Config) -> str:
    """The tokenizer and its codebooks, on every split with true dense and fine points."""
    rows = [[label, *(f"{r[key]:{form}}" for r in reports.values())] for label, key, form in (
        ("reconstruction error of the fine pose, px", "fine_px", ".1f"),
        ("reconstruction error of the dense pose, px", "dense_px", ".1f"),
        (f"perplexity of the {c.K_s} sparse codes", "perplexity_s", ".0f"),
        (f"perplexity of the {c.K_d} dense codes", "perplexity_d", ".0f"),
        ("dead sparse codes", "dead_s", ".1%"), ("dead dense codes", "dead_d", ".1%"))]
    rows.append(["action recognised by L_global's head",  # it cannot know the actions of `unseen`
                 *("-" if name == "unseen" else f"{r['action_accuracy']:.0%}"
                   for name, r in reports.items())])
    rows.append(["alignment", *(f"{summaries[name]['alignment']['frames']:.2f}"
                                for name in reports)])
    return table(["tokenizer", *reports], rows)


# --------------------------------------------------------------------------------------------------
# The report


def paper_mpjpe(meta: dict) -> dict[str, str]:
    """The paper's numbers to set beside ours. On Human3.6M they depend on the detector."""
    detector = meta["sources"]["2D joints"] if meta.get("source") == "h36m" else "cpn"
    known = {"_gt": {"sparse": "37.6", "generated": "28.3"}, "_sh_": {"generated": "49.3"},
             "cpn": PAPER_MPJPE}
    return next((numbers for part, numbers in known.items() if part in detector), {})


def describe(run: Run, about: dict[str, dict], sizes: dict[str, str], meta: dict) -> str:
    """What a reader must know to judge the tables, as a list. about: what the checkpoints say,
    {name: {config, training, seconds, samples}}."""
    changed = []
    for part, kind in (("config", Config), ("training", Training)):
        for key, default in vars(kind()).items():
            values = list(dict.fromkeys(saved[part][key] for saved in about.values()))
            if values != [default]:
                changed.append(f"{key} {' or '.join(map(str, values))} ({default})")
    n_lifters = sum(name.startswith("stage3") for name in about)
    times = []
    for label, start in (("stage 1", "stage1"), ("stage 2", "stage2"),
                         ("regressor of (d)", "regressor"), (f"{n_lifters} lifters", "stage3")):
        seconds = [saved["seconds"] for name, saved in about.items() if name.startswith(start)]
        times += [f"{label} {sum(seconds):.0f} s"] * bool(seconds)
    gpu = f"{torch.cuda.get_device_name(run.device)}, " if run.device.type == "cuda" else ""
    now = datetime.datetime.now(datetime.timezone.utc)
    lines = [
        f"options other than the default (in brackets): {', '.join(changed) or 'none'}",
        f"data: {run.data}, samples: " + ", ".join(f"{name} {n}" for name, n in sizes.items()),
        f"training: {', '.join(times)}",
        f"evaluated {now:%Y-%m-%d %H:%M} UTC on {run.device} ({gpu}{platform.machine()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads), torch {torch.__version__}, "
        f"Python {platform.python_version()}"]
    if run.path.name == "quick":
        lines.insert(0, "no accuracy of stages 2 and 3 is promised for the preset `quick`")
    if meta.get("source") == "h36m":
        part = meta["splits"]["train"]
        lines.append(
            f"input: {meta['sources']['2D joints']}; training on {part['about']}: {part['n']} "
            f"samples, but the {part['with_mesh']} with true points for stages 1 and 2, the "
            "regressor of (d) and the lifters of (c) and clean + ground truth, which take as many "
            "steps as the others; training drops joints, testing does not")
    return "\n".join(f"- {line}" for line in lines)


def report(title: str, meta: dict, stages: int, seeds: int, summaries: dict[str, dict],
           codebooks: dict[str, dict], config: Config, about: dict[str, dict]) -> tuple[str, str]:
    """The tables of the stages that are trained: the one to print, and all of them.

    summaries: of every split; codebooks: `train.tokenizer_report` of those with true dense and
    fine points; about: as in `describe`.
    """
    kinds = {name: meta["splits"][name].get("about", TESTED.get(name))
             for name in summaries if name not in ("train", "val")}
    sections = [title]
    if stages >= 3:
        shown = short_table({name: summaries[name] for name in kinds}, seeds, about)
        sections += [
            "## In short", shown,
            "*training, s*: of the lifter and of all that its input needs. *samples*: how many "
            "training samples the densifier (stage 2 or the regressor) + the lifter saw; a sample "
            "counts each time that it is seen.",
            "## Training time and samples", cost_table(about)]
        for name, kind in kinds.items():
            sections += [f"## 3D error on `{name}`",
                         lifting_tables(summaries[name], seeds, kind, meta, name)]
    if stages >= 2:
        errors = error_table(summaries)
        shown = shown if stages >= 3 else errors
        sections += [
            "## Where the 2D error comes from", errors,
            "Mean error of the 96 fine points over all frames; that of the input is over other "
            "points, its visible joints. *train*: as many of its poses as "
            "val has, under a fresh draw of detections if they are simulated; all stages know "
            "these poses. *teacher-forced*: every token is chosen given the true tokens before "
            "it; *free-running*: given the tokens that were generated before it."]
        for name, kind in kinds.items():
            sections += [f"## 2D error of the fine pose on `{name}` ({kind})",
                         fine_pose_tables(summaries[name])]
    if codebooks:
        tokenizer = tokenizer_table(codebooks, summaries, config)
        shown = shown if stages >= 2 else tokenizer
        sections += [
            "## Tokenizer and codebooks", tokenizer,
            "Perplexity and dead codes (never used) are taken over the whole split. *alignment*: "
            "mean cosine of a sparse embedding with the mean dense embedding of its own part, "
            "minus that with the other parts."]
    return shown, "\n\n".join(sections) + "\n"
