"""Pack a trained run into weights/: what lift.py and sample.py use where you have trained nothing.

    python pack.py --name long        # runs/long -> weights/

Kept are stages 1 and 2 and the lifter of generated points, in half precision and without the
optimisers' state, and the run's log and tables. weights/samples.npz holds 100 test samples, and
weights/numbers.json the errors that the run, in full precision, makes on them.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints import WEIGHTS, Run, load_finished, save_checkpoint
from evaluate import mpjpe, open_run
from hipart import HiPART
from survival import Watch, stop, write
from train import lift, load_hipart, load_lifter

CHECKPOINTS = ("stage1", "stage2", "stage3_generated_0")
LEFT_OUT = ("optimizer", "ranks", "path")  # only what goes on training needs these
SAMPLES = 100


def errors(samples: dict[str, np.ndarray], hipart: HiPART, lifter: nn.Module) -> dict[str, float]:
    """The errors on samples x_s [n, 17, 2], conf [n, 17], x_f [n, 96, 2] (normalised image
    coordinates), y [n, 17, 3] (mm) and w (width of the image, px): of the generated fine points in
    px, and of the poses that are lifted from them in mm."""
    x_s, conf, x_f = (torch.from_numpy(samples[name]) for name in ("x_s", "conf", "x_f"))
    x_d, made = hipart.densify(x_s, conf)
    y = lift(lifter, torch.cat([x_s, x_d, made], 1), conf)
    return dict(fine_px=float((made - x_f).norm(dim=-1).mean()) * float(samples["w"]) / 2,
                mpjpe_mm=float(mpjpe(y, samples["y"]).mean()))


def halved(value: Tensor) -> Tensor:
    return value.half() if value.is_floating_point() else value


def pack(run: Run, folder: Path) -> dict[str, float]:
    """Write the weights of a run, and the samples and numbers to check them by -> the numbers."""
    split = run.split("test", has_mesh=True).spread(SAMPLES)
    block = split.read(slice(0, split.n))
    samples = {name: block[name].numpy() for name in ("x_s", "conf", "x_f", "y")}
    samples["w"] = np.array(split.w)
    numbers = errors(samples, load_hipart(run), load_lifter(run, "generated"))
    beside = folder.with_suffix(".tmp")  # what fails leaves the old weights
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for name in CHECKPOINTS:
        saved = {k: v for k, v in load_finished(run, name).items() if k not in LEFT_OUT}
        saved["model"] = {k: halved(v) for k, v in saved["model"].items()}
        save_checkpoint(beside / f"{name}.pt", **saved)
    np.savez_compressed(beside / "samples.npz", **samples)
    write(beside / "numbers.json", json.dumps(numbers, indent=1) + "\n")
    for name in ("log.jsonl", "table.md", "hypotheses.json"):  # the last: a temperature for lift.py
        if (run.path / name).exists():
            shutil.copy(run.path / name, beside / name)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return numbers


def main() -> None:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--name", default="long", help="the run, runs/NAME")
    p.add_argument("--data", default=Run.data, help="folder of the data set that it is tested on")
    args = p.parse_args()
    run, stages = open_run(args.name, "cpu", args.data, stage_3=["stage3_generated_0"])
    if stages < 3:
        stop(f"{run.path} has {stages} of the three stages: train the others first")
    numbers = pack(run, WEIGHTS)
    size = sum(f.stat().st_size for f in WEIGHTS.iterdir())
    print(f"{WEIGHTS}: {size / 1e6:.1f} MB, on {SAMPLES} test samples "
          f"{numbers['fine_px']:.2f} px and {numbers['mpjpe_mm']:.1f} mm")


if __name__ == "__main__":
    with Watch().listening():
        main()
