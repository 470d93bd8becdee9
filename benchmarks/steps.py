"""Steps per second of stages 1 and 2: line by line, compiled, as CUDA graphs, and in bfloat16.

    python benchmarks/steps.py [--device cuda] [--preset paper] [--seconds 10]

Every step is one of train.py's, loss, backward, optimiser and codebooks, on the same made-up batch,
so that neither data nor disk counts. `compiled` is torch.compile of the loss, and `CUDA graphs` is
that with mode="reduce-overhead". `bfloat16` is autocast of the loss; train.py does not use it, as
nobody has shown yet that quality holds. What does not run here is shown with its reason. The loss
after 20 steps stands beside, since a variant that computes something else is none. The figures go
to benchmarks/results/steps_DEVICE.json, with machine, versions, commit and date.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import RUN_SIZES  # noqa: E402

from benchmarks.machine import machine  # noqa: E402
from hipart import J_D, J_F, J_S, Config, HiPART, J  # noqa: E402
from kernels import backend  # noqa: E402
from train import PRESETS, Training  # noqa: E402
from training_loop import adamw  # noqa: E402

TINY = tuple({name: value for name, value in RUN_SIZES.items() if name in vars(kind())}
             for kind in (Config, Training))
VARIANTS = {  # options of torch.compile, and whether to use autocast
    "line by line": (None, False),
    "compiled": (dict(), False),
    "CUDA graphs": (dict(mode="reduce-overhead"), False),
    "line by line, bfloat16": (None, True),
    "compiled, bfloat16": (dict(), True),
}
ON_CPU = ("line by line", "compiled", "line by line, bfloat16")


def stage_1(c: Config, t: Training, device: str):
    """-> the loss, the optimiser, what follows its step, and the batch."""
    model = HiPART(c).msst.to(device).train()
    poses = torch.randn(max(c.K_s, c.K_d) // J_S + t.batch_1, J_F, 2, device=device)
    model.initialize_codebooks(poses, t.batch_1)
    x_f = poses[: t.batch_1]
    batch = dict(x_f=x_f, x_d=x_f[:, ::2].clone(),
                 a=torch.randint(c.n_actions, (t.batch_1,), device=device))
    optimizer = adamw(model, t.lr_1, t.weight_decay_1)
    return model.loss, optimizer, lambda out: model.update_codebooks(out[2]), batch


def stage_2(c: Config, t: Training, device: str, in_one_pass: bool = False):
    model, B = HiPART(c).to(device), t.batch_2
    model.msst.eval().requires_grad_(False)
    batch = {name: torch.randn(B, n, 2, device=device)
             for name, n in dict(x_s=J, x_d=J_D, x_f=J_F).items()}
    batch |= dict(conf=torch.ones(B, J, device=device), in_one_pass=in_one_pass,
                  z_s=torch.randn(B, J_S, c.D, device=device),
                  zp_d=torch.randn(B, J_D, c.D, device=device),
                  q_s=torch.randint(c.K_s, (B, J_S), device=device),
                  q_d=torch.randint(c.K_d, (B, J_D), device=device))
    return model.loss, adamw(model.hiarm, t.lr_2, t.weight_decay_2), lambda out: None, batch


def stage_2_in_one_pass(c: Config, t: Training, device: str):
    return stage_2(c, t, device, in_one_pass=True)


def measure(make, sizes, device: str, variant: str, seconds: float) -> dict[str, float]:
    """Steps per second, and the loss after 20 steps, of one variant of one stage."""
    compile_options, bfloat16 = VARIANTS[variant]
    torch.manual_seed(0)
    loss_of, optimizer, after, batch = make(*sizes, device)
    loss_of(**batch)  # what is done once is done
    if compile_options is not None:
        torch.compiler.reset()
        loss_of = torch.compile(loss_of, **compile_options)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            out = loss_of(**batch)
        optimizer.zero_grad(set_to_none=True)
        out[0].backward()
        optimizer.step()
        after(out)
        return out[0]

    began = time.perf_counter()
    for _ in range(20):
        loss = step()
    result = dict(loss=loss.item(), first_20_seconds=time.perf_counter() - began)
    rates, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(rates) < 3:
        began = time.perf_counter()
        for _ in range(10):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(10 / (time.perf_counter() - began))
    return result | dict(steps_per_second=median(rates), slowest=min(rates), fastest=max(rates))


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   choices=("cpu", "cuda"))
    p.add_argument("--preset", choices=("tiny", *PRESETS), nargs="+", default=("standard", "paper"))
    p.add_argument("--variant", choices=VARIANTS, nargs="+",
                   help="default: all that a CPU knows, too; on a GPU all")
    p.add_argument("--seconds", type=float, default=10, help="for every variant")
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    args = p.parse_args()
    variants = args.variant or (ON_CPU if args.device == "cpu" else VARIANTS)
    torch.set_float32_matmul_precision("high")  # as train.py does
    report = dict(machine=machine(args.device), backend=backend(args.device)[0], presets={})
    print(json.dumps(report["machine"]))
    for preset in args.preset:
        config, training = TINY if preset == "tiny" else PRESETS[preset]
        sizes = Config(**config), Training(**training)
        makes = [stage_1, stage_2, *[stage_2_in_one_pass] * sizes[0].soft]
        rows = report["presets"][preset] = {}
        print(f"\n| {preset} | variant | steps/s | slowest to fastest | loss after 20 steps |\n"
              "| --- | --- | ---: | ---: | ---: |")
        for make in makes:
            rows[make.__name__] = {}
            for variant in variants:
                try:
                    r = measure(make, sizes, args.device, variant, args.seconds)
                    text = (f"{r['steps_per_second']:.4g} | {r['slowest']:.4g} to "
                            f"{r['fastest']:.4g} | {r['loss']:.6g}")
                except Exception as e:  # compilers fail in every way there is
                    r = dict(failed=f"{type(e).__name__}: {str(e).strip()}".splitlines()[0])
                    text = f"does not run here: {r['failed']} | - | -"
                rows[make.__name__][variant] = r
                print(f"| {make.__name__} | {variant} | {text} |", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"steps_{args.device}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
