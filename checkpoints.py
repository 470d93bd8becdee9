"""Runs and their checkpoints: what is on disk, written so that there is always a whole one.

    run = Run(Path("runs/NAME"), Config(...), Training(...), device)
    saved = load_finished(run, "stage1")        # or one sentence, if it is not there or damaged

A run is a folder in which one process at a time trains. log.jsonl has a line for every epoch. A
checkpoint holds the model, the optimiser, the step, the random state, Config and Training;
training_loop.py says when one is written.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distributed import connect, rank
from hipart import Config
from sources.dataset import META_BYTES, Split
from sources.files import read_bytes, read_json, shown
from sources.safe_torch import load_tensors
from survival import Watch, stop, this_command, write

WEIGHTS = Path(__file__).with_name("weights")  # a packed run, which comes with the project
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

    def logged(self) -> list[dict]:
        """The lines of log.jsonl: a dict for every epoch of every training."""
        path = self.path / "log.jsonl"
        try:
            lines = read_bytes(path).decode().splitlines() if path.exists() else []
            rows = [json.loads(line) for line in lines]
            return [r | dict(model=str(r["model"]), epoch=int(r["epoch"])) for r in rows]
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError, OSError):
            stop(f"{path} is damaged: move it away and go on with --resume")

    def forget(self, model: str, epoch: int) -> None:
        """Drop the log lines of epochs that never reached a checkpoint: they will come again."""
        if rank():
            return
        kept = [r for r in self.logged() if r["model"] != model or r["epoch"] <= epoch]
        write(self.path / "log.jsonl", "".join(json.dumps(r) + "\n" for r in kept))

    def split(self, name: str, has_mesh: bool = False, **windows) -> Split:
        """A split of the data, and of the training split as many samples as Training.limit says.
        windows: `frames` and `every` of `Split.in_windows`."""
        limit = self.training.limit if name == "train" else 0
        try:
            split = Data(self.data, name, self.device, 0 if windows else limit, has_mesh,
                         "192" in self.training.levels)
            split = split.in_windows(**windows, limit=limit) if windows else split
        except (ValueError, OSError) as e:
            stop(str(e))
        self.same_samples()
        return split

    def rng(self, *key: int) -> np.random.Generator:
        """Random numbers for the simulated detector, keyed by stage, seed and epoch, so that any
        epoch can be drawn again."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=key))


class Data(Split):
    """A split whose files may be cut short while it is read, or may hold no sequences."""

    def read(self, *args, **options) -> dict[str, Tensor]:
        """As `Split.read`, or one sentence and exit status 2."""
        try:
            return super().read(*args, **options)
        except (ValueError, OSError) as e:
            stop(f"{e}: make the data set again")

    def begins(self) -> np.ndarray:
        """As `Split.begins`, or one sentence and exit status 2."""
        try:
            return super().begins()
        except ValueError as e:
            stop(str(e))


def _rounded(v):
    if isinstance(v, dict):
        return {k: _rounded(x) for k, x in v.items()}
    return float(f"{float(v):.6g}") if isinstance(v, (float, Tensor)) else v


def save_checkpoint(path: Path, **content) -> None:
    """torch.save, beside and renamed."""
    buffer = io.BytesIO()  # PyTorch's own writer of files hides the reason where it fails
    torch.save(content, buffer)
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
    # Packed weights have half precision, since they take half of the space.
    saved["model"] = {name: value.float() if value.dtype == torch.half else value
                      for name, value in saved["model"].items()}
    return saved | dict(path=path)


def _check_content(saved: Any, run: Run) -> None:
    """Refuse with a ValueError, or what Python raises, a checkpoint that is not of this version of
    the project."""
    if not all(isinstance(saved.get(key), dict) for key in ("model", "config", "training", "run")):
        raise ValueError("no dictionaries")
    of, good = saved["run"], []
    for kind, own in (("config", run.config), ("training", run.training)):
        saved[kind] = asdict(type(own)()) | saved[kind]  # it may be older than some options
        good.append(set(saved[kind]) == set(vars(own)))
        for option in fields(own):
            value, most = saved[kind][option.name], MOST_BLOCKS if "blocks" in option.name else MOST
            most = most if option.name != "limit" else 10**9
            plain = type(value) is option.type or option.type is float and type(value) is int
            if not plain or option.type is not str and abs(value) > most:
                raise ValueError(f"no such {option.name}")
        type(own)(**saved[kind])
    good += [type(saved[key]) is int and 0 <= saved[key] < MOST for key in ("epoch", "epochs")]
    good += [type(saved["step"]) is int and saved["step"] >= 0,
             type(saved["seconds"]) is float and 0 <= saved["seconds"] < 1e9,
             type(of["seed"]) is int, type(of["samples"]) is str,
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


def choose_device(name: str | None) -> torch.device:
    """The device of that name; without a name, the GPU if there is one. If torchrun has started
    several processes, they are connected."""
    if name == "cuda" and not torch.cuda.is_available():
        stop("--device cuda needs a GPU that torch can see, and there is none: "
             "leave --device out")
    return connect(torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu")))
