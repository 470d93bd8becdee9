"""The training loop that all trainings share beside their maths.

    loop = Loop(run, "stage1", model, optimizer, epochs, steps per epoch, schedule)
    for epoch in loop.epochs():                         # with --resume from where it stopped
        for batch in loop.steps(split, size, rng):      # sets the learning rate, shows a bar
            loop.update(loss, terms)                    # backward, and the optimiser's step
        loop.finish_epoch(numbers)                      # log.jsonl, and runs/NAME/stage1.pt

A checkpoint is written after every epoch, every SAVE_EVERY seconds and when Ctrl-C or a scheduler
asks the run to stop. What is trained on is what would have been trained on without an
interruption, to the bit on a CPU; where time sets the number of epochs, once that number is found.
"""

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import Run, load_checkpoint, save_checkpoint
from distributed import gather, highest, mean, rank, same_everywhere, wait, world_size
from sources.dataset import Split
from survival import launcher, stop

SAVE_EVERY = 600  # s: long epochs have checkpoints within


class Loop:
    """The learning rate, the progress bar, the log, and the checkpoints of a training.

    schedule(step, steps) gives the factor on the learning rate. With 0 epochs, there are as many as
    take the given seconds. Their number is found while the first tenth of that time passes (each of
    these epochs mends it), and then stays: the same bits need the same number. Until the first
    epoch is over, it is guessed high, so that the learning rate starts no faster than it should.
    """

    def __init__(self, run: Run, name: str, model: nn.Module, optimizer, epochs: int,
                 per_epoch: int, schedule: Callable[[int, int], float], seconds: float = 0.0):
        self.run, self.name, self.model, self.optimizer = run, name, model, optimizer
        self.n_epochs, self.per_epoch, self.schedule = epochs or 1000, per_epoch, schedule
        self.budget = 0.0 if epochs else seconds
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.epoch, self.step, self.seconds = 0, 0, 0.0  # epochs and steps that are done
        self.sums: dict[str, Tensor] = defaultdict(float)  # of this epoch
        self.random: dict[str, Tensor] = {}  # where this epoch and its last pass began
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
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's, about a damaged state of the optimizer
                self._restore(saved)
        except torch.OutOfMemoryError:
            raise
        except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as e:
            stop(f"{self.path} is no checkpoint that this version of the project can go on from "
                 f"({type(e).__name__}): delete it and train again")

    def _restore(self, saved: dict) -> None:
        """Be where the checkpoint was."""
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.epoch, self.step, self.seconds = saved["epoch"], saved["step"], saved["seconds"]
        self.n_epochs = saved["epochs"]
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

    def steps(self, split: Split, size: int, rng: np.random.Generator | None,
              **how) -> Iterator[dict]:
        """The batches of an epoch that are left (see `Split.batches`), each with its learning rate.
        The model is in eval mode after them.

        A signal ends the run after the step in which it comes, with a checkpoint.
        """
        n = split.windows_in_an_epoch()  # of single frames: samples
        if size % world_size() or n < world_size():
            stop(f"{world_size()} processes cannot share batches of {size} of {n} samples: "
                 f"choose a --batch that is a multiple of {world_size()}, and not more processes "
                 "than samples")
        if rng is not None and rank():
            rng = rng.spawn(rank())[-1]  # detections of its own
        self.run.watch.busy, done = True, self.step - self.epoch * self.per_epoch
        batches = split.batches(size, rng, done=done, random=self.random, **how)
        known = self.epoch or not self.budget
        title = f"{self.name} {self.epoch + 1}/{self.n_epochs if known else '?'}"
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
            values = torch.stack([*terms.values()]).tolist()  # a GPU is waited for once
            self.bar.set_postfix({n: f"{v:.3g}" for n, v in zip(terms, values, strict=True)})

    def finish_epoch(self, val: dict[str, float | Tensor]) -> None:
        """Log an epoch and write its checkpoint; val: numbers on the validation split."""
        self.run.watch.busy = True
        self.epoch += 1
        val = {name: float(value) for name, value in val.items()}
        train = mean(self.sums, self.per_epoch)
        self.sums.clear()
        self.random.clear()
        self._count_seconds()
        self.seconds = max(gather(self.seconds))  # all processes must decide alike
        if self.budget and (self.epoch == 1 or self.seconds < self.budget / 10):
            self.n_epochs = max(self.epoch, round(self.epoch * self.budget / self.seconds))
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
        finite = all(bool(p.isfinite().all()) for p in self.model.parameters())
        if not finite or not all(map(math.isfinite, sums.values())):
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


def in_two_phases(schedule: Callable, first: int) -> Callable[[int, int], float]:
    """A schedule for the `first` steps, and then once more for those that are left."""

    def factor(step: int, steps: int) -> float:
        return schedule(step, first) if step < first else schedule(step - first, steps - first)

    return factor


def every_4_epochs(epochs: int) -> Callable[[int, int], float]:
    """The paper's schedule of the lifter: times 0.96 every 4 of so many epochs. A training with
    more epochs than that has the same schedule, stretched."""

    def factor(step: int, steps: int) -> float:
        return 0.96 ** (step * epochs // steps // 4)

    return factor


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only; biases and norms go without."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=decay, weight_decay=weight_decay), dict(params=rest, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, fused=True)
