"""Runs and their checkpoints: what all trainings share beside their maths.

    run = Run(Path("runs/NAME"), Config(...), Training(...), device)
    loop = Loop(run, "stage1", model, optimizer, epochs, steps per epoch, schedule)

A run is a folder in which one process at a time trains. log.jsonl has a line for every epoch. A
checkpoint holds the model, the optimiser, the step, the random state, Config and Training. It is
written after every epoch, every SAVE_EVERY seconds and when Ctrl-C or a scheduler asks the run to
stop: beside the old one and renamed, so that there is always a whole one. What is trained on is
what would have been trained on without an interruption, to the bit on a CPU.
"""

import hashlib
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from distributed import connect, gather, highest, mean, rank, same_everywhere, wait, world_size
from hipart import Config
from sources.dataset import META_BYTES, Split
from sources.files import read_bytes, read_json, shown
from sources.safe_torch import load_tensors
from survival import Watch, launcher, stop, this_command, write

SAVE_EVERY = 600  # s: long epochs have checkpoints within
MOST_BLOCKS, MOST = 100, 1_000_000  # of the options in a checkpoint: blocks, and other numbers


@dataclass
class Run:
    """Where a run writes, and its settings."""

    path: Path
    config: Config
    training: Any  # a train.Training
    device: torch.device
    seed: int = 0
    data: str = "data/demo"
    resume: bool = False
    first_samples: str = ""  # what `samples` said when the data set was opened first
    watch: Watch = field(default_factory=Watch)  # for signals

    def identity(self) -> dict:
        """What must not change when a run resumes, beside Config and Training."""
        return dict(seed=self.seed, data=self.data, samples=self.same_samples())

    def same_samples(self) -> str:
        """`samples`, or one sentence and exit status 2 if they are no longer those that this
        process began with."""
        self.first_samples = self.first_samples or self.samples()
        if self.samples() != self.first_samples:
            stop(f"{self.data} was replaced while {self.path} was at work on it: put the old data "
                 f"back and go on with `{this_command()}`, or take another --name")
        return self.first_samples

    def samples(self) -> str:
        """A name for the samples: a hash of what meta.json says, but for versions of libraries."""
        try:
            meta = read_json(Path(self.data, "meta.json"), META_BYTES)
            meta.pop("versions", None)
            text = json.dumps(meta, sort_keys=True)
        except (ValueError, TypeError, AttributeError, RecursionError):
            stop(f"{shown(self.data, 4096)} is not a data set that can be read: make it again with "
                 "`python prepare_data.py`")
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def log(self, **row) -> None:
        """Append a line to log.jsonl, with numbers to six digits. The file is written anew, so
        that no line is ever half there. Of several processes, the first does so."""
        if rank():
            return
        path = self.path / "log.jsonl"
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        write(path, before + json.dumps({k: _rounded(v) for k, v in row.items()}) + "\n")

    def forget(self, model: str, epoch: int) -> None:
        """Drop the log lines of epochs that never reached a checkpoint: they will come again."""
        if rank():
            return
        path = self.path / "log.jsonl"
        try:
            lines = read_bytes(path).decode().splitlines() if path.exists() else []
            rows = [json.loads(line) for line in lines]
            kept = [r for r in rows if r["model"] != model or r["epoch"] <= epoch]
        except (ValueError, TypeError, LookupError, RecursionError, OSError) as e:
            stop(f"{path} is damaged ({type(e).__name__}): move it away and go on with --resume")
        write(path, "".join(json.dumps(r) + "\n" for r in kept))

    def split(self, name: str, has_mesh: bool = False) -> Split:
        """A split of the data, and of the training split as many samples as Training.limit says."""
        limit = self.training.limit if name == "train" else 0
        try:
            split = Data(self.data, name, self.device, limit, has_mesh)
        except (ValueError, OSError) as e:
            stop(str(e))
        self.same_samples()
        return split

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers for the simulated detector, keyed by stage, seed and epoch, so that any
        epoch can be drawn again."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


class Data(Split):
    """A split whose files may be cut short while it is read."""

    def read(self, *args, **options) -> dict[str, Tensor]:
        """As `Split.read`, or one sentence and exit status 2."""
        try:
            return super().read(*args, **options)
        except (ValueError, OSError) as e:
            stop(f"{e}: make the data set again")


def _rounded(v):
    if isinstance(v, dict):
        return {k: _rounded(x) for k, x in v.items()}
    return float(f"{float(v):.6g}") if isinstance(v, (float, Tensor)) else v


def save_checkpoint(path: Path, **content) -> None:
    """torch.save, beside and renamed."""
    buffer = io.BytesIO()  # PyTorch's own writer of files hides the reason where it fails
    torch.save(content, buffer)
    write(path, buffer.getvalue())


def write_array(path: Path, array: np.ndarray) -> None:
    """np.save, beside and renamed."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    write(path, buffer.getvalue())


def load_checkpoint(run: Run, name: str) -> dict:
    """The checkpoint `name` of a run, or one sentence and exit status 2 if it is not there, is
    damaged, or is not of this version of the project."""
    path, stage = run.path / f"{name}.pt", {"stage1": 1, "stage2": 2}.get(name, 3)
    again = f"run `python train.py --name {run.path.name} --stage {stage}` with its options"
    if not path.exists():
        stop(f"{path} is not there: {again} first")
    try:
        saved = load_tensors(path, run.device)
    except ValueError:
        stop(f"{path} is not a readable checkpoint: delete it and {again}")
    try:
        _check_content(saved, run)
    except (ValueError, TypeError, AttributeError, LookupError):
        stop(f"{path} is not a checkpoint of this version of the project: delete it and {again}")
    return saved | dict(path=path)


def _check_content(saved: Any, run: Run) -> None:
    """Refuse with a ValueError, or what Python raises, a checkpoint that is not of this version of
    the project."""
    if not all(isinstance(saved.get(key), dict) for key in ("model", "config", "training", "run")):
        raise ValueError("no dictionaries")
    of, good = saved["run"], [0 <= saved["config"]["dropout"] <= 1]
    for kind, own in (("config", run.config), ("training", run.training)):
        good.append(set(saved[kind]) == set(vars(own)))
        for option in fields(own):
            value, most = saved[kind][option.name], MOST_BLOCKS if "blocks" in option.name else MOST
            good.append(type(value) is option.type or option.type is float and type(value) is int)
            good.append(type(value) is str or abs(value) <= most)
        type(own)(**saved[kind])
    good += [type(saved[key]) is int and 0 <= saved[key] < MOST for key in ("epoch", "epochs")]
    good += [type(saved["seconds"]) is float, type(of["seed"]) is int, type(of["samples"]) is str,
             shown(of["data"], 4096) == of["data"]]
    good += [type(name) is str and type(value) is Tensor and value.is_contiguous()
             for name, value in saved["model"].items()]
    if not all(good):
        raise ValueError("something of another kind")


def load_finished(run: Run, name: str, same_data: bool = False) -> dict:
    """The checkpoint of a training that ran to its end; same_data: on the data of this run, too."""
    saved = load_checkpoint(run, name)
    if saved["epoch"] < saved["epochs"]:
        stop(f"{saved['path']} is unfinished ({saved['epoch']} of {saved['epochs']} epochs): "
             "go on with --resume")
    if same_data and saved["run"]["samples"] != run.samples():
        stop(f"{saved['path']} was trained on other data than {run.data} holds now: "
             "train it again under another --name")
    return saved


def is_finished(run: Run, name: str) -> bool:
    """Whether a training of the run is there and ran to its end."""
    if not (run.path / f"{name}.pt").exists():
        return False
    saved = load_checkpoint(run, name)
    return saved["epoch"] >= saved["epochs"]


def restore(module: nn.Module, saved: dict) -> nn.Module:
    """The module with the weights of a checkpoint, frozen and in eval mode."""
    _check_weights(module, saved)
    module.load_state_dict(saved["model"])
    return module.eval().requires_grad_(False)


def _check_weights(module: nn.Module, saved: dict) -> None:
    """Stop unless the checkpoint holds finite weights of the module's sizes."""
    own, weights = module.state_dict(), saved["model"]
    if ({name: (value.shape, value.dtype) for name, value in own.items()}
            != {name: (value.shape, value.dtype) for name, value in weights.items()}):
        stop(f"{saved['path']} has weights of other sizes than these options: use those of its "
             "training")
    if not all(bool(value.isfinite().all()) for value in weights.values()):
        stop(f"{saved['path']} has weights that are infinite or NaN: train it again")


def build(make: Callable[[], nn.Module], saved: dict, device: torch.device) -> nn.Module:
    """The module that the options of a checkpoint describe, with its weights, frozen and in eval
    mode. It is made without memory first, since the options could ask for any size."""
    with torch.device("meta"):
        plan = make()
    _check_weights(plan, saved)
    return restore(make().to(device), saved)


# --------------------------------------------------------------------------------------------------
# A training


class Loop:
    """The learning rate, the progress bar, the log, and the checkpoints.

        loop = Loop(run, "stage1", model, optimizer, epochs, steps per epoch, schedule)
        for epoch in loop.epochs():                         # with --resume from where it stopped
            for batch in loop.steps(split, size, rng):      # sets the learning rate, shows a bar
                loop.update(loss, terms)                    # backward, and the optimiser's step
            loop.finish_epoch(numbers)                      # log.jsonl, and runs/NAME/stage1.pt

    schedule(step, steps) gives the factor on the learning rate.
    """

    def __init__(self, run: Run, name: str, model: nn.Module, optimizer, epochs: int,
                 per_epoch: int, schedule: Callable[[int, int], float]):
        self.run, self.name, self.model, self.optimizer = run, name, model, optimizer
        self.n_epochs, self.per_epoch, self.schedule = epochs, per_epoch, schedule
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.epoch, self.step, self.seconds = 0, 0, 0.0  # epochs and steps that are done
        self.sums: dict[str, Tensor] = defaultdict(float)  # of this epoch
        self.random: dict[str, Tensor] = {}  # where this epoch and its last block began
        self.path = run.path / f"{name}.pt"
        self.began = self.saved = time.monotonic()
        if self.path.exists():
            self._resume()
        elif rank():
            torch.manual_seed(torch.initial_seed() + 10**6 * rank())  # dropout of its own
        wait()

    def _resume(self) -> None:
        if not self.run.resume:
            stop(f"{self.path} exists already: add --resume to go on, or choose another --name")
        saved = load_checkpoint(self.run, self.name)
        if any(saved.get(key) != value for key, value in self._settings().items()):
            stop(f"{self.path} was trained with other options: resume with the same ones, "
                 "or choose another --name")
        try:
            self._restore(saved)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            stop(f"{self.path} is no checkpoint that this version of the project can go on from "
                 f"({type(e).__name__}): delete it and train again")

    def _restore(self, saved: dict) -> None:
        """Be where the checkpoint was."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.step, self.seconds = saved["epoch"], saved["step"], saved["seconds"]
        self.run.forget(self.name, self.epoch)
        if self.epoch == self.n_epochs:
            return
        if len(saved["ranks"]) != world_size():
            n = len(saved["ranks"])
            stop(f"{self.path} is trained by {n} processes, not by {world_size()}: go on with "
                 f"`{launcher(n)} train.py`, --resume and the same options")
        mine = saved["ranks"][rank()]
        self.sums.update(mine["sums"])
        self.random = {name: state.cpu() for name, state in mine["epoch"].items()}
        torch.set_rng_state(mine["cpu"].cpu())
        if mine["cuda"]:
            torch.cuda.set_rng_state_all([state.cpu() for state in mine["cuda"]])

    def _settings(self) -> dict:
        return dict(config=asdict(self.run.config), training=asdict(self.run.training),
                    run=self.run.identity())

    def epochs(self) -> Iterator[int]:
        """The epochs that are left, counted from 0."""
        while self.epoch < self.n_epochs:
            self.run.same_samples()
            self.began = time.monotonic()
            self.model.train()
            yield self.epoch

    def steps(self, split: Split, size: int, rng: np.random.Generator | None, clean: bool = False,
              prepare=lambda block, rows: block) -> Iterator[dict]:
        """The batches of an epoch that are left (see `Split.batches`), each with its learning rate.
        The model is in eval mode after them.

        A signal ends the run after the step in which it comes, with a checkpoint.
        """
        if size % world_size() or split.n < world_size():
            stop(f"{world_size()} processes cannot share batches of {size} of {split.n} samples: "
                 "take a batch size that is a multiple")
        if rng is not None and rank():
            rng = rng.spawn(rank())[-1]  # detections of its own
        self.run.watch.busy, done = True, self.step - self.epoch * self.per_epoch
        batches = split.batches(size, rng, clean, prepare, done, self.random)
        title = f"{self.name} {self.epoch + 1}/{self.n_epochs}"
        self.bar = tqdm(batches, title, self.per_epoch, initial=done, leave=False, mininterval=1,
                        disable=rank() > 0)
        for batch in self.bar:
            factor = self.schedule(self.step, self.per_epoch * self.n_epochs)
            for group, lr in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = lr * factor
            yield batch
            self.step += 1
            # All processes do the same. A signal's number is 2 or more; 1 asks for a checkpoint.
            due = time.monotonic() - self.saved > SAVE_EVERY
            asked = highest(self.run.watch.signal or due)
            if asked > 1:
                self.run.watch.signal = asked
                break
            if asked:
                self.save()
        self.save()  # validation may take long, and a signal ends it at once
        self.run.watch.rest()
        self.model.eval()

    def update(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        """One step of the optimiser down the gradient of the loss; `terms` go to the log."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        for name, value in terms.items():
            self.sums[name] += value  # stays on the device: nobody waits for it
        if self.step % 20 == 19:
            self.bar.set_postfix({name: f"{float(value):.3g}" for name, value in terms.items()})

    def finish_epoch(self, val: dict[str, float | Tensor]) -> None:
        """Log an epoch and write its checkpoint; val: numbers on the validation split."""
        self.run.watch.busy = True
        self.epoch += 1
        val = {name: float(value) for name, value in val.items()}
        train = mean(self.sums, self.per_epoch)
        self.sums.clear()
        self.random.clear()
        self._count_seconds()
        self.run.log(model=self.name, epoch=self.epoch, steps=self.step, seconds=self.seconds,
                     lr=self.optimizer.param_groups[0]["lr"], train=train, val=val)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in val.items())
        if not rank():
            print(f"{self.name} {self.epoch}/{self.n_epochs}  {self.seconds:.0f} s  {numbers}",
                  flush=True)
        self.save(val=val)
        self.run.watch.rest()

    def _count_seconds(self) -> None:
        now = time.monotonic()
        self.seconds, self.began = self.seconds + now - self.began, now

    def save(self, **more) -> None:
        """Write a checkpoint of this very step."""
        sums = {name: float(v) for name, v in self.sums.items()}
        if not all(map(math.isfinite, sums.values())):
            stop(f"{self.name}: the loss became infinite or NaN in epoch {self.epoch + 1}; "
                 "try a lower learning rate")
        if not same_everywhere(self.model):
            stop(f"{self.name}: the models of the {world_size()} processes differ after step "
                 f"{self.step}, which must never happen: go on from {self.path} with --resume")
        self._count_seconds()
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        ranks = gather(dict(cpu=torch.get_rng_state(), cuda=cuda, epoch=self.random, sums=sums))
        if not rank():
            save_checkpoint(
                self.path, model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                ranks=ranks, epochs=self.n_epochs, epoch=self.epoch, step=self.step,
                seconds=self.seconds, **more, **self._settings())
        wait()
        self.saved = time.monotonic()


def warmup_cosine(warmup: int) -> Callable[[int, int], float]:
    """A linear warm-up over `warmup` steps (at most a tenth of all), then half a cosine to zero."""

    def factor(step: int, steps: int) -> float:
        rise = max(1, min(warmup, steps // 10))
        fallen = max(0, step - rise) / max(1, steps - rise)
        return min((step + 1) / rise, 0.5 * (1 + math.cos(math.pi * fallen)))

    return factor


def every_4_epochs(per_epoch: int) -> Callable[[int, int], float]:
    """The paper's schedule of the lifter: times 0.96 every 4 epochs."""

    def factor(step: int, steps: int) -> float:
        return 0.96 ** (step // per_epoch // 4)

    return factor


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; biases and norms go without."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without a name, the GPU if there is one. If torchrun has started
    several processes, they are connected."""
    if name == "cuda" and not torch.cuda.is_available():
        stop("--device cuda needs a GPU that torch can see, and there is none: "
             "leave --device out")
    return connect(torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu")))


