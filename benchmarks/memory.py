"""Memory of HiPART.densify for a million poses, and of ten thousand steps of a training (Linux).

    python benchmarks/memory.py                       # about ten minutes
    python benchmarks/memory.py --poses 10000 --steps 500

Models are tiny, the code is train.py's own. densify runs in a process of its own for each number of
poses, and what counts is the peak beside input and output, which must stay below the limit. Of a
training, the memory in use is noted ten times: from the second on it should not grow. The figures
go to benchmarks/results/memory_cpu.json, with machine, versions, commit and date.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import RUN_SIZES, TINY_SIZES, write_tiny  # noqa: E402

import train  # noqa: E402
from benchmarks.machine import machine, memory  # noqa: E402
from checkpoints import Run  # noqa: E402
from hipart import J_D, J_F, HiPART, J  # noqa: E402

SIZES = RUN_SIZES | dict(soft=True)
CONFIG, TRAINING = (
    {name: value for name, value in SIZES.items() if name in vars(kind())}
    for kind in (train.Config, train.Training))


def densify(poses: int, limit: int) -> None:
    """Print the peak beside input and output, in MB, and how long it took."""
    torch.set_num_threads(1)
    model = HiPART(train.Config(**CONFIG)).eval()
    x_s, conf = torch.rand(poses, J, 2) - 0.5, torch.ones(poses, J)
    model.densify(x_s[:2], conf[:2])
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = memory("VmRSS"), time.perf_counter()
    made = model.densify(x_s, conf, limit)
    seconds, output = time.perf_counter() - began, poses * (J_D + J_F) * 2 * 4 / 2**20
    assert all(bool(x.isfinite().all()) for x in (x[::1000] for x in made))
    print(json.dumps(dict(beside=memory("VmHWM") - before - output, seconds=seconds,
                          input=poses * J * 3 * 4 / 2**20, output=output)))


class Metered(train.Loop):
    """A training that notes its memory ten times."""

    noted: dict[str, list[float]] = {}

    def update(self, loss, terms):
        super().update(loss, terms)
        if (self.step + 1) % (self.n_epochs * self.per_epoch // 10) == 0:
            self.noted.setdefault(self.name, []).append(memory("VmRSS"))


def trainings(steps: int, folder: Path) -> dict[str, list[float]]:
    """The memory of the three stages, each of so many steps or a few more."""
    samples = min(4096, steps)  # batches of 16: ten epochs and more
    write_tiny(folder / "data", TINY_SIZES | dict(train=samples))
    epochs = -(-steps // (samples // 16))
    longer = dict(epochs_1=epochs, epochs_2=epochs, epochs_3=epochs, epochs_soft=epochs // 2,
                  batch_3=16)
    run = Run(folder / "runs/memory", train.Config(**CONFIG), train.Training(**TRAINING | longer),
              torch.device("cpu"), data=str(folder / "data"))
    run.path.mkdir(parents=True)
    train.Loop = Metered
    train.stage_1(run)
    train.stage_2(run)
    train.train_lifter(run, "ground_truth", 0)
    return Metered.noted


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--poses", type=int, nargs="+", default=(10**4, 10**5, 10**6))
    p.add_argument("--limit", type=int, default=64, help="MB that densify may take")
    p.add_argument("--steps", type=int, default=10_000)
    p.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    p.add_argument("--work", type=int, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.work:
        return densify(args.work, args.limit)
    torch.set_num_threads(1)
    report = dict(machine=machine(), limit=args.limit, densify={}, trainings={})
    print(f"{json.dumps(report['machine'])}\n\n"
          f"| poses | input, MB | output, MB | beside, MB (at most {args.limit}) | s |\n"
          "| ---: | ---: | ---: | ---: | ---: |")
    for poses in args.poses:
        command = [sys.executable, __file__, "--work", str(poses), "--limit", str(args.limit)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        report["densify"][poses] = r = json.loads(done.stdout)
        print(f"| {poses} | {r['input']:.0f} | {r['output']:.0f} | {r['beside']:.0f} | "
              f"{r['seconds']:.0f} |", flush=True)
    with (tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()),
          redirect_stderr(io.StringIO())):
        report["trainings"] = trainings(args.steps, Path(folder))
    print(f"\n| {args.steps} steps | MB after each tenth |\n| --- | --- |")
    for name, noted in report["trainings"].items():
        print(f"| {name} | {' '.join(f'{mb:.0f}' for mb in noted)} |")
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / "memory_cpu.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {path}")


if __name__ == "__main__":
    main()
