"""Evaluate a run: how well it densifies (2D) and lifts (3D), on bodies and on motion that training never saw.

    python evaluate.py                              # runs/standard on data/demo, one lifter per feed
    python evaluate.py --name quick --seeds 3       # mean and spread over the lifters of `python train.py --seeds 3`

Prints tables and writes them to runs/NAME/table.md; every number behind them goes to runs/NAME/evaluation.json.
Covers the paper's Table 1 (errors per action), Fig. 12 (2D error of the fine pose) and Fig. 7's alignment in a number.

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

from hipart import J_D, J_S, SCALE, Config, HiPART, J, R, Regressor, detected_pelvis, from_model_frame, to_model_frame
from train import FEEDS, Run, Split, feed, load_checkpoint, load_hipart, load_regressor, new_lifter, stop, tokenizer_report

SPLITS = {"test": "new bodies, familiar motion", "unseen": "unseen motion"}
LOW_CONF = 0.5  # a sample with a joint that is missing, or less sure than this, counts as occluded
PAPER_MPJPE = {"sparse": "52.1", "generated": "42.0", "sparse_clean": "37.6", "ground_truth_clean": "17.5"}
PAPER_NOTE = ("* Human3.6M, the paper's data set and not this one: compare ratios, never millimetres. Lifting CPN detections, "
              "sparse only 52.1 and with HiPART 42.0 (ratio 0.81); toy experiment on ground-truth 2D 37.6 -> 17.5 (0.47). "
              "HiPART by source of 2D poses: 49.3 SH / 42.0 CPN / 28.3 ground truth.")


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
    minus the mean cosine with the other 15 parts' of the same pose. 0: not tied at all; 2 at the very most.
    """
    part = F.normalize(zh_d.unflatten(1, (J_S, R)).mean(2), dim=-1)
    cosine = F.normalize(zh_s, dim=-1) @ part.transpose(1, 2)  # [B, 16, 16]
    own = cosine.diagonal(dim1=1, dim2=2).mean(-1)
    return own - (cosine.sum((1, 2)) / J_S - own) / (J_S - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


@torch.no_grad()
def measure(split: Split, hipart: HiPART, regressor: Regressor, lifters: dict, rng=None) -> dict[str, np.ndarray]:
    """One number per sample for everything that the tables show: {column: [N]}.

    mpjpe/FEED/SEED, pa_mpjpe/FEED/SEED           mm, for every lifter in `lifters` {(feed, seed): model}
    px/INPUT/WHAT, percent/INPUT/WHAT             mean 2D error in pixels, and in percent of the standing height; INPUT is
                                                  detected or clean, WHAT is what `fine_poses` made, or the input itself
    accuracy_s/INPUT, accuracy_d/INPUT            teacher-forced token accuracy, percent
    alignment, action, occluded
    """
    rows = defaultdict(list)

    def add(name: str, values: Tensor) -> None:
        rows[name].append(values.cpu().numpy().astype(np.float64))

    for kind in ("detected", "clean"):
        names = [key for key in lifters if key[0].endswith("_clean") == (kind == "clean")]
        start = 0
        for block, truth in zip(split.blocks(rng, clean=kind == "clean"), split.blocks(clean=True), strict=True):
            x_s, conf = block["x_s"], block["conf"]
            height = torch.from_numpy(split.arrays["height_px"][start : start + len(x_s)].copy()).to(x_s)
            start += len(x_s)
            points = {name: feed(name, block, hipart, regressor) for name in ("generated", "regressor")}
            made = {name: x[:, J + J_D :] for name, x in points.items()}  # the fine rows
            teacher = [teacher_forced(hipart, *t) for t in
                       zip(*(block[k].split(256) for k in ("x_s", "conf", "x_f")), strict=True)]
            for name in ("floor", "teacher"):
                made[name] = torch.cat([t[name] for t in teacher])
            for name in ("accuracy_s", "accuracy_d"):
                add(f"{name}/{kind}", torch.cat([t[name] for t in teacher]))
            errors = {name: (x - block["x_f"]).norm(dim=-1).mean(-1) for name, x in made.items()}
            seen = (conf > 0).to(x_s)
            errors["input"] = ((x_s - truth["x_s"]).norm(dim=-1) * seen).sum(-1) / seen.sum(-1)
            for name, error in errors.items():
                add(f"px/{kind}/{name}", error * split.w / 2)
                add(f"percent/{kind}/{name}", error * split.w / 2 / height * 100)
            if kind == "detected":
                add("action", block["action"])
                add("occluded", (conf < LOW_CONF).any(1))
                add("alignment", torch.cat([t["alignment"] for t in teacher]))
            for name, seed in names:
                x = points[name] if name in points else feed(name, block, hipart, regressor)
                y = [lifters[name, seed](*p) for p in zip(x.split(1024), conf.split(1024), strict=True)]
                y, gt = torch.cat(y).cpu(), block["y"].cpu()
                rows[f"mpjpe/{name}/{seed}"].append(mpjpe(y, gt))
                rows[f"pa_mpjpe/{name}/{seed}"].append(pa_mpjpe(y, gt))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def teacher_forced(hipart: HiPART, x_s: Tensor, conf: Tensor, x_f: Tensor) -> dict[str, Tensor]:
    """Stages 1 and 2 when they are told the truth: fine poses [B, 96, 2] and numbers [B].

    floor: the true pose through the tokenizer and back, the best that any choice of tokens can be expected to reach;
    teacher: HiARM's choice (the expected embedding if config.soft) given the true tokens of all earlier parts, and of its
    own sparse token for dense ones. What free running loses beyond this, it loses by building on its own errors.
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
        values = np.asarray(values)[~np.isnan(values)]
        return float(values.mean()) if len(values) else None

    label, hidden, result = rows["action"].astype(int), rows["occluded"] > 0, {}
    for column, values in rows.items():
        per_action = {("unknown", *names)[a + 1]: mean(values[label == a]) for a in np.unique(label)}
        result[column] = dict(actions=mean([np.nan if v is None else v for v in per_action.values()]), frames=mean(values),
                              occluded=mean(values[hidden]), clear=mean(values[~hidden]), per_action=per_action)
    result["occluded"]["count"], result["occluded"]["samples"] = int(hidden.sum()), len(hidden)
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Tables. All are Markdown that reads as plain text.


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned Markdown: first column to the left, numbers to the right."""
    width = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        return "| " + " | ".join([row[0].ljust(width[0]), *(c.rjust(w) for c, w in zip(row[1:], width[1:], strict=True))]) + " |"

    rule = "| " + " | ".join(["-" * width[0], *("-" * (w - 1) + ":" for w in width[1:])]) + " |"
    return "\n".join([line(head), rule, *map(line, rows)])


def number(values, digits: int = 1) -> str:
    """One value, or mean ± standard deviation over seeds; "-" for what was not computed."""
    values = [v for v in (values if isinstance(values, list) else [values]) if v is not None]
    if not values:
        return "-"
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def lifting_tables(s: dict, seeds: int) -> str:
    """3D errors of one split, from its summary `s`: all feeds, then the four that matter per action."""

    def over_seeds(name: str, average: str, metric: str = "mpjpe") -> list:
        return [s[f"{metric}/{name}/{seed}"][average] for seed in range(seeds)]

    def ratio(name: str) -> float:
        base = "sparse_clean" if name.endswith("_clean") else "sparse"
        return np.mean(over_seeds(name, "actions")) / np.mean(over_seeds(base, "actions"))

    head = ["lifter fed with", "MPJPE, mean of actions", "MPJPE, all frames", "PA-MPJPE, mean of actions", "PA-MPJPE, all frames",
            "ratio", "occluded", "not occluded", "paper*"]
    rows = []
    for name, label in FEEDS.items():
        clean = name.endswith("_clean")  # nothing is occluded there
        rows.append([label, *(number(over_seeds(name, a, m)) for m in ("mpjpe", "pa_mpjpe") for a in ("actions", "frames")),
                     number(ratio(name), 2), *("-" if clean else number(over_seeds(name, a)) for a in ("occluded", "clear")),
                     PAPER_MPJPE.get(name, "-")])
    four = list(FEEDS)[:4]
    names = s["occluded"]["per_action"]
    per_action = [[a, *(number([s[f"mpjpe/{f}/{i}"]["per_action"][a] for i in range(seeds)]) for f in four)] for a in names]
    per_action += [[f"**{label}**", *(number(over_seeds(f, average)) for f in four)]
                   for label, average in (("mean of actions", "actions"), ("all frames", "frames"))]
    share = s["occluded"]["count"] / s["occluded"]["samples"]
    return "\n\n".join([
        table(head, rows),
        f"Millimetres{', mean ± standard deviation over ' + str(seeds) + ' seeds' if seeds > 1 else ''}. *ratio*: MPJPE "
        "(mean of actions) to that of (a), and of clean rows to clean sparse. *occluded*: the MPJPE over the "
        f"{share:.0%} of frames in which a joint is missing or has confidence below {LOW_CONF}.",
        f"HiPART (b) is at {ratio('generated'):.2f} of sparse-only (a), the plain regressor (d) at {ratio('regressor'):.2f}, "
        f"ground-truth points (c) at {ratio('ground_truth'):.2f}; the paper's (b) on Human3.6M is at 0.81.",
        "MPJPE per action:",
        table(["action", *(FEEDS[f] for f in four)], per_action)])


# Where a fine pose can come from, in the order in which the error is taken apart.
SOURCES = {"input": "the input's own error, 17 joints", "floor": "tokenizer alone (floor)", "teacher": "HiARM, told the past",
           "generated": "HiARM, free running (b)", "regressor": "plain regressor (d)"}


def fine_pose_tables(s: dict) -> str:
    """Fig. 12 for one split: mean error of the 96 fine points per action, from detected and from clean input."""
    parts = []
    for kind in ("detected", "clean"):
        what = list(SOURCES) if kind == "detected" else list(SOURCES)[1:]  # clean input has no error of its own
        names = [*s["occluded"]["per_action"], "**mean of actions**", "**all frames**"]
        averages = [*(lambda c, a=a: c["per_action"][a] for a in s["occluded"]["per_action"]),
                    lambda c: c["actions"], lambda c: c["frames"]]
        rows = [[name, *(pixels(s, kind, w, get) for w in what)] for name, get in zip(names, averages, strict=True)]
        parts += [f"From {kind} input:", table(["action", *(SOURCES[w] for w in what)], rows)]
    return "\n\n".join(parts)


def pixels(s: dict, kind: str, what: str, get) -> str:
    px, share = get(s[f"px/{kind}/{what}"]), get(s[f"percent/{kind}/{what}"])
    return "-" if px is None else f"{px:.1f} ({share:.1f} %)"


def error_table(summaries: dict[str, dict]) -> str:
    """Where the 2D error comes from: training, validation and test samples side by side, all frames."""
    rows = []
    for kind in ("detected", "clean"):
        for what, label in SOURCES.items():
            if (kind, what) != ("clean", "input"):
                cells = [pixels(s, kind, what, lambda c: c["frames"]) for s in summaries.values()]
                rows.append([f"{kind}: {label}", *cells])
        for token, label in (("s", "sparse"), ("d", "dense")):
            cells = [number(s[f"accuracy_{token}/{kind}"]["frames"]) + " %" for s in summaries.values()]
            rows.append([f"{kind}: {label} tokens right, told the past", *cells])
    return table(["px (% of standing height)", *summaries], rows)


def codebook_table(reports: dict[str, dict], summaries: dict[str, dict], c: Config) -> str:
    """Tokenizer and codebooks on splits with stored detections."""
    rows = [[label, *(number(r[key], digits) for r in reports.values())] for label, key, digits in (
        ("fine pose, px", "fine_px", 1), ("dense pose, px", "dense_px", 1),
        (f"perplexity of the {c.K_s} sparse codes", "perplexity_s", 0),
        (f"perplexity of the {c.K_d} dense codes", "perplexity_d", 0))]
    rows += [[f"dead {label} codes", *(f"{r[key]:.1%}" for r in reports.values())]
             for label, key in (("sparse", "dead_s"), ("dense", "dead_d"))]
    rows.append(["action recognised (L_global's head)", *(f"{r['action_accuracy']:.0%}" for r in reports.values())])
    rows.append(["alignment", *(number(summaries[name]["alignment"]["frames"], 2) for name in reports)])
    return table(["tokenizer", *reports], rows)


# ----------------------------------------------------------------------------------------------------------------------
# The run itself


def load_lifters(run: Run, seeds: int) -> tuple[dict, dict[str, dict]]:
    """All lifters {(feed, seed): model} and every checkpoint's {file stem: config, seconds}."""
    lifters, saved = {}, {}
    for stem in ("stage1", "stage2", "regressor"):
        saved[stem] = load_checkpoint(run.path / f"{stem}.pt")
    for seed in range(seeds):
        for name in FEEDS:
            path = run.path / f"stage3_{name}_{seed}.pt"
            if seed and not path.exists():
                stop(f"{path} is not there: run `python train.py --name {run.path.name} --stage 3 --seeds {seeds} --resume` first")
            c = load_checkpoint(path, run.device)
            model = new_lifter(Config(**c["config"]), name).to(run.device)
            model.load_state_dict(c["model"])
            lifters[name, seed], saved[path.stem] = model.eval().requires_grad_(False), c
    return lifters, {stem: dict(config=c["config"], seconds=c["seconds"]) for stem, c in saved.items()}


def describe(run: Run, saved: dict[str, dict], sizes: dict[str, int], seeds: int) -> dict[str, str]:
    """What a reader must know to judge the tables: {heading: text}."""
    changed = {}
    for key, default in vars(Config()).items():
        values = dict.fromkeys(s["config"].get(key, default) for s in saved.values())
        if list(values) != [default]:
            changed[key] = f"{key} {' or '.join(map(str, values))} ({default})"

    def seconds(start: str) -> float:
        return sum(s["seconds"] for stem, s in saved.items() if stem.startswith(start))

    gpu = f"{torch.cuda.get_device_name(run.device)}, " if run.device.type == "cuda" else ""
    note = ("A smaller model, trained for less time, than the paper's; the `quick` preset promises no accuracy for stages 2 "
            "and 3. ") if changed else ""
    return {
        "model": note + "Differences from the paper's `Config()`: " + (", ".join(changed.values()) or "none"),
        "data": f"{run.data}: " + ", ".join(f"{name} {n}" for name, n in sizes.items()) + " samples; of train, the tables "
                "use the first ones under a fresh draw of detections",
        "training": f"stage 1 {seconds('stage1'):.0f} s, stage 2 {seconds('stage2'):.0f} s, the rivals' regressor "
                    f"{seconds('regressor'):.0f} s, {seeds * len(FEEDS)} lifters {seconds('stage3'):.0f} s",
        "evaluated": f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC on {run.device} ({gpu}"
                     f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads), torch "
                     f"{torch.__version__}, Python {platform.python_version()}",
    }


def write(path: Path, text: str) -> None:
    """Beside and renamed: a reader sees the old file or the new one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def arguments() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", default="standard", help="the run, runs/NAME")
    p.add_argument("--data", default="data/demo", help="folder of the data set")
    p.add_argument("--seeds", type=int, default=1, help="lifters per feed")
    p.add_argument("--device", help="cuda, cpu or mps; default: cuda if there is one, else cpu")
    return p


def main() -> None:
    args = arguments().parse_args()
    if args.seeds < 1:
        stop(f"--seeds must be at least 1, found {args.seeds}")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    run = Run(Path("runs") / args.name, Config(), device, data=args.data)
    hipart, regressor = load_hipart(run), load_regressor(run)
    lifters, saved = load_lifters(run, args.seeds)
    splits = {name: run.split(name) for name in ("train", "val", *SPLITS)}
    sizes = {name: split.n for name, split in splits.items()}
    splits["train"].n = min(sizes["train"], sizes["val"])  # as many as there are to validate on
    summaries = {}
    for name, split in splits.items():
        rng = run.rng(5) if name == "train" else None
        rows = measure(split, hipart, regressor, lifters if name in SPLITS else {}, rng)
        summaries[name] = summarize(rows, split.meta["actions"])

    def in_frame(block: dict[str, Tensor]) -> dict[str, Tensor]:
        pelvis = detected_pelvis(block["x_s"], block["conf"])
        return {k: to_model_frame(block[k], pelvis) for k in ("x_f", "x_d")} | dict(a=block["action"])

    reports = {name: tokenizer_report(hipart.msst, splits[name], in_frame) for name in ("val", *SPLITS)}
    header = describe(run, saved, sizes, args.seeds)
    sections = [f"# Evaluation of {run.path}", "\n".join(f"- {heading}: {text}" for heading, text in header.items())]
    for name, kind in SPLITS.items():
        sections += [f"## 3D error, split `{name}`: {kind}", lifting_tables(summaries[name], args.seeds), PAPER_NOTE]
    sections += ["## Where the 2D error comes from", error_table(summaries),
                 "Mean error of the 96 fine points over all frames. *train*: a fresh draw of detections, on poses that all "
                 "stages have seen. *told the past*: every token is chosen given the true ones before it (teacher forcing)."]
    for name, kind in SPLITS.items():
        sections += [f"## 2D error of the fine pose, split `{name}`: {kind}", "Pixels (percent of standing height).",
                     fine_pose_tables(summaries[name])]
    sections += ["## Codebooks", codebook_table(reports, summaries, hipart.config),
                 "Perplexity and dead codes (never used) are taken over the whole split. *alignment*: mean cosine of a sparse "
                 "embedding with the mean dense embedding of its own part, minus that with the other parts."]
    text = "\n\n".join(sections) + "\n"
    print(text)
    write(run.path / "table.md", text)
    write(run.path / "evaluation.json", json.dumps(dict(run=args.name, **header, splits=summaries, codebooks=reports), indent=1))
    print(f"Written to {run.path}: table.md, evaluation.json")


if __name__ == "__main__":
    main()
