"""How long HiPART.densify takes: poses per second, beside two plainer ways to the same poses.

    python benchmarks/generate.py [--device cuda] [--threads 1] [--seconds 20]

    plain loop   the teacher-forced HiARM.forward, asked again for every token on its own choices
    rollout      HiARM.rollout: 16 steps that keep their keys and values, as it stands in hipart.py
    densify      the same steps with less around them: generation.py

All three make the same poses, which is checked, and take turns in one process, so that a busy
machine slows all of them. Weights are random, and every step hands on its likeliest code. Shown
are medians, with half the distance of the quartiles as their spread, and the median over turns of
how many times as long as densify the others take. The figures go to
benchmarks/results/generate_DEVICE.json, with machine, versions, commit and date.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import machine  # noqa: E402
from hipart import (  # noqa: E402
    J_D,
    J_S,
    Config,
    HiPART,
    J,
    R,
    detected_pelvis,
    from_model_frame,
    to_model_frame,
)
from train import PRESETS  # noqa: E402


def in_pixels_of(model, x_s, conf, tokens):
    """x_d and x_f, as `HiPART.densify` returns them, of what `tokens` makes of the model frame."""
    pelvis = detected_pelvis(x_s, conf)
    made = model.msst.decode_embeddings(*tokens(to_model_frame(x_s, pelvis)))
    return [from_model_frame(x, pelvis) for x in made]


@torch.no_grad()
def plain_loop(model, x_s, conf):
    def tokens(x):
        q_s = torch.zeros(len(x), J_S, dtype=torch.int64, device=x.device)
        q_d = torch.zeros(len(x), J_D, dtype=torch.int64, device=x.device)
        for i in range(J_S):
            own = slice(i * R, i * R + R)
            q_s[:, i] = model.hiarm(x, q_s, q_d, conf)[0][:, i].argmax(-1)
            q_d[:, own] = model.hiarm(x, q_s, q_d, conf)[1][:, own].argmax(-1)
        return model.hiarm.C_s[q_s], model.hiarm.C_d[q_d]

    return in_pixels_of(model, x_s, conf, tokens)


@torch.no_grad()
def rollout(model, x_s, conf):
    def tokens(x):
        o = model.hiarm.rollout(x, conf)
        return o["zh_s"], o["zh_d"]

    return in_pixels_of(model, x_s, conf, tokens)


def densify(model, x_s, conf):
    return model.densify(x_s, conf)


VARIANTS = {"plain loop": plain_loop, "rollout": rollout, "densify": densify}


def measure(model, batch, seconds, device) -> list[dict[str, float]]:
    """Seconds of a call of each variant in every turn: the mean of as many calls as take 0.1 s, as
    one after another is how poses are made. Turns go on until the time is up, three at least; the
    plain loop sits out some, so that the others get half of the time."""
    x_s, conf = torch.rand(batch, J, 2) - 0.5, (torch.rand(batch, J) > 0.1).float()
    x_s, conf = x_s.to(device), conf.to(device)

    def timed(run, calls):
        began = time.perf_counter()
        for _ in range(calls):
            made = run(model, x_s, conf)
            made[1].sum().item()  # waits for a GPU, too
        return made, (time.perf_counter() - began) / calls

    first = {name: timed(run, 1) for name, run in VARIANTS.items()}
    for name, (poses, _) in first.items():
        for got, expected in zip(poses, first["densify"][0], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5, msg=name)
    calls = {name: 1 + int(0.1 / timed(run, 1)[1]) for name, run in VARIANTS.items()}
    turns, spent, began = [], 0.0, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds or len(turns) < 3:
        sits_out = {"plain loop"} if len(turns) > 2 and spent > passed / 2 else set()
        turns.append({name: timed(VARIANTS[name], calls[name])[1]
                      for name in VARIANTS if name not in sits_out})
        spent += turns[-1].get("plain loop", 0.0) * calls["plain loop"]
    return turns


def summary(turns: list[dict[str, float]], batch: int) -> dict[str, dict[str, float]]:
    out = {}
    for name in VARIANTS:
        taken = [turn for turn in turns if name in turn]
        seconds = [turn[name] for turn in taken]
        low, _, high = quantiles(seconds, n=4)
        out[name] = dict(
            ms=median(seconds) * 1e3, spread_ms=(high - low) / 2 * 1e3, turns=len(taken),
            poses_per_second=batch / median(seconds),
            times_densify=median(turn[name] / turn["densify"] for turn in taken))
    return out


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    p.add_argument("--preset", choices=("standard", "paper"), nargs="+",
                   default=("standard", "paper"))
    p.add_argument("--batch", type=int, nargs="+", default=(1, 8, 64, 512))
    p.add_argument("--seconds", type=float, default=20, help="for every batch size")
    p.add_argument("--threads", type=int, default=1)
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    report = dict(machine=machine(args.device), sizes={})
    print(json.dumps(report["machine"]))
    for preset in args.preset:
        torch.manual_seed(0)
        model = HiPART(Config(**PRESETS[preset][0] | dict(soft=False))).eval().to(args.device)
        model.hiarm.set_codebooks(model.msst, torch.randn(8, 96, 2))
        report["sizes"][preset] = {}
        print(f"\n| {preset}, batch | variant | ms | +- | poses/s | times densify |\n"
              "| ---: | --- | ---: | ---: | ---: | ---: |")
        for batch in args.batch:
            rows = summary(measure(model, batch, args.seconds, args.device), batch)
            report["sizes"][preset][str(batch)] = rows
            for name, r in rows.items():
                print(f"| {batch} | {name} | {r['ms']:.4g} | {r['spread_ms']:.2g} | "
                      f"{r['poses_per_second']:.4g} | {r['times_densify']:.2f} |", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"generate_{args.device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
