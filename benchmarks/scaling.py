"""Samples per second that stages 1 and 2 train with 1 and 2 processes, and 1 and 2 threads in each.

    python benchmarks/scaling.py                    # the sizes of `standard`
    python benchmarks/scaling.py --preset paper

The trainings are train.py's own, batches and all, on made-up poses. All variants of a stage wait
side by side, and each in turn trains for a while, so that what else the machine does meets them
alike. Stage 2 is teacher-forced. The figure is the median of the rounds.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import TINY_SIZES, write_tiny  # noqa: E402

import checkpoints  # noqa: E402
import train  # noqa: E402
import training_loop  # noqa: E402
from benchmarks.machine import machine  # noqa: E402
from distributed import wait  # noqa: E402
from hipart import HiPART  # noqa: E402

VARIANTS = [(1, 1), (1, 2), (2, 1)]  # processes, threads in each; two of two on two cores crawl
WARM_UP = 12  # steps; k-means comes within
SAMPLES = 16_384


# --------------------------------------------------------------------------------------------------
# One process of a variant


class Metered(training_loop.Loop):
    """A training that waits for a number of steps on its standard input, and prints how many
    seconds they took. Its first epoch never ends, so that nothing is validated or written."""

    def steps(self, *args, **options):
        left, began = WARM_UP, time.perf_counter()
        while True:
            for batch in super().steps(*args, **options):
                if not left:
                    wait()
                    print(f"took {time.perf_counter() - began}", flush=True)
                    left = int(input() or sys.exit())
                    wait()
                    began = time.perf_counter()
                left -= 1
                yield batch
            self.step = 0
            self.random.clear()

    def save(self, **more):
        pass


def open_run(folder, preset, device=None) -> checkpoints.Run:
    """A run with the sizes of a preset."""
    config, training = (dict(some) for some in train.PRESETS[preset])
    training |= dict(warmup_free=WARM_UP // 2, epochs_soft=0)
    return checkpoints.Run(Path(folder) / "runs/scaling", train.Config(**config),
                           train.Training(**training), device or torch.device("cpu"),
                           data=f"{folder}/data", resume=True)


def work(folder: str, preset: str, stage: int, threads: int) -> None:
    torch.set_num_threads(threads)
    run = open_run(folder, preset, checkpoints.choose_device("cpu"))
    train.Loop = Metered
    if stage == 2:  # on a tokenizer that has learned nothing
        train.load_finished = lambda run, name, same_data: dict(
            model=HiPART(run.config).msst.state_dict(), path=run.path)
    {1: train.stage_1, 2: train.stage_2}[stage](run)


# --------------------------------------------------------------------------------------------------
# All variants of a stage


class Variant:
    """The processes of one variant, connected as torchrun connects them."""

    def __init__(self, folder, preset, stage, processes, threads):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        command = [sys.executable, __file__, "--work", folder, preset, str(stage), str(threads)]
        ours = dict(OMP_NUM_THREADS=str(threads))
        if processes > 1:
            ours |= dict(WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        self.processes = []
        for i in range(processes):
            number = dict(RANK=str(i), LOCAL_RANK=str(i)) if processes > 1 else {}
            self.processes.append(subprocess.Popen(
                command, env=os.environ | ours | number, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
        self.warm_up = self.seconds()

    def seconds(self) -> float:
        """How long the steps took that the processes do just now."""
        lines = [p.stdout.readline().split() for p in self.processes]
        if any(line[:1] != ["took"] for line in lines):
            raise SystemExit("a process of this benchmark has ended: run it with --work by hand")
        return max(float(line[1]) for line in lines)

    def tell(self, line) -> None:
        for p in self.processes:
            p.stdin.write(f"{line}\n")
            p.stdin.flush()

    def train(self, steps) -> float:
        self.tell(steps)
        return self.seconds()

    def end(self) -> None:
        self.tell("")
        for p in self.processes:
            p.wait()


def measure(folder, preset, stage, seconds, rounds) -> dict[str, float]:
    """Samples per second of every variant."""
    batch = getattr(open_run(folder, preset).training, f"batch_{stage}")
    variants = {of: Variant(folder, preset, stage, *of) for of in VARIANTS}
    steps = {of: max(1, round(seconds * 8 / v.train(8))) for of, v in variants.items()}
    rates = {of: [] for of in variants}
    for _ in range(rounds):
        for of, variant in variants.items():
            rates[of].append(batch * steps[of] / variant.train(steps[of]))
    for variant in variants.values():
        variant.end()
    return {f"{p} x {t}": round(median(rates[p, t]), 1) for p, t in variants}


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--preset", choices=train.PRESETS, default="standard")
    p.add_argument("--seconds", type=float, default=6, help="of a variant in a round")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    p.add_argument("--work", nargs=4, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work:
        folder, preset, stage, threads = args.work
        return work(folder, preset, int(stage), int(threads))
    result = dict(machine=machine(), preset=args.preset, stages={})
    print(json.dumps(result["machine"]))
    with tempfile.TemporaryDirectory() as folder:
        print("making poses", flush=True)
        write_tiny(Path(folder) / "data", TINY_SIZES | dict(train=SAMPLES))
        for stage in (1, 2):
            rates = measure(folder, args.preset, stage, args.seconds, args.rounds)
            result["stages"][str(stage)] = rates
            print(f"\n| stage {stage}, processes x threads | samples/s | times 1 x 1 |\n"
                  "| --- | ---: | ---: |")
            for of, rate in rates.items():
                print(f"| {of} | {rate:.0f} | {rate / rates['1 x 1']:.2f} |", flush=True)
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "scaling_cpu.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
