"""What tests/test_distributed.py looks at, done by two connected processes on the CPU.

    python tests/ranks.py DATA FOLDER

Each process is a fork of this one, which has imported everything. What it finds goes to
FOLDER/NAME_RANK.pt, its words and its exit status to FOLDER/NAME_RANK.txt.
"""

import errno
import json
import os
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import RUN_SIZES  # noqa: E402
from kills import fork, warm_up  # noqa: E402

import distributed  # noqa: E402
import evaluate  # noqa: E402
import hipart  # noqa: E402
import train  # noqa: E402
import training_loop  # noqa: E402
from baselines import Regressor  # noqa: E402
from checkpoints import Run  # noqa: E402
from hipart import HiPART, Quantizer  # noqa: E402
from kernels import backend  # noqa: E402
from sources import dataset  # noqa: E402
from sources.dataset import Split, in_model_frame  # noqa: E402

CPU = torch.device("cpu")
SIZES = RUN_SIZES | dict(batch_1=8, batch_2=8, batch_3=8, turn_3=0.5, dropout=0.1, soft=True,
                         history_dropout=0.5, epochs_soft=1)
CONFIG = {k: v for k, v in SIZES.items() if k in vars(hipart.Config())}


def in_ranks(folder, name, function, n=2):
    """Run function() in n processes that torchrun might have started; n = 1: in a single one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def process(rank):
        if n > 1:
            os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank),
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        torch.save(function(), folder / f"{name}_{rank}.pt")

    for child in [fork(partial(process, i), folder / f"{name}_{i}.txt") for i in range(n)]:
        os.waitpid(child, 0)


# --------------------------------------------------------------------------------------------------
# Gradients


def batch_of(n):
    g = torch.Generator().manual_seed(3)
    b = {name: torch.randn(n, points, 2, generator=g)
         for name, points in (("x_s", 17), ("x_d", 48), ("x_f", 96))}
    b |= {name: torch.randn(n, tokens, RUN_SIZES["D"], generator=g)
          for name, tokens in (("z_s", 16), ("zp_d", 48))}
    K = RUN_SIZES["K_s"]
    return b | dict(action=torch.randint(15, (n,), generator=g),
                    q_s=torch.randint(K, (n, 16), generator=g),
                    q_d=torch.randint(K, (n, 48), generator=g),
                    conf=(torch.rand(n, 17, generator=g) > 0.2).float(),
                    y=torch.randn(n, 17, 3, generator=g))


def gradients():
    """The gradients of every training's loss, on this process's part of a batch of 8."""
    distributed.connect(CPU)
    b = batch_of(8)
    b, found = {k: v[distributed.part(8)] for k, v in b.items()}, {}
    own = dict(dropout=0.0, history_dropout=0.0, condition="every", lambda_p=1.0)
    config = hipart.Config(**CONFIG | own)  # nothing at random, and gradients of about 1

    def note(name, model, method, loss_of):
        call = distributed.data_parallel(model, method, some_unused=name == "one_pass")
        loss_of(call).backward()
        found[name] = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}

    torch.manual_seed(0)
    for name in ("msst", "hiarm", "one_pass"):
        model = HiPART(config)
        for q in (model.msst.Q_s, model.msst.Q_d):
            q.active.fill_(True)
        if name == "msst":
            model = model.msst
            note(name, model, "loss", lambda call: call(b["x_f"], b["x_d"], b["action"])[0])
        else:
            model.msst.requires_grad_(False)
            given = {k: b[k] for k in b if k not in ("action", "y")}
            given["in_one_pass"] = name == "one_pass"
            note(name, model, "loss", lambda call, given=given: call(**given)[0])
    model = Regressor(32)
    note("regressor", model, "forward", lambda call: sum(
        (x - b[k]).norm(dim=-1).mean()
        for k, x in zip(("x_d", "x_f"), call(b["x_s"], b["conf"]), strict=True)))
    for lifter in ("mlp", "spatial"):
        model = train.new_lifter(train.Training(lifter=lifter, lifter_width=12, lifter_blocks=2),
                                 "generated").eval()
        x = torch.cat([b["x_s"], b["x_d"], b["x_f"]], 1)
        note(lifter, model, "forward",
             lambda call, x=x: (call(x, b["conf"]) - b["y"]).norm(dim=-1).mean())
    return found


# --------------------------------------------------------------------------------------------------
# Codebooks, samples


def kmeans():
    """k-means where each process has clusters of its own; the codes and their counts."""
    distributed.connect(CPU)
    torch.manual_seed(0)
    centres = 10 * torch.randn(8, 4)
    rows = centres.repeat(16, 1) + 0.01 * torch.randn(128, 4)
    order = torch.arange(128).reshape(16, 8).T.flatten()  # by cluster
    rows = rows[order][distributed.part(128)]
    q = Quantizer(8, 4, 0.99, 0.01)
    torch.manual_seed(distributed.rank())
    q.initialize(rows, rows_per_step=128)
    return dict(codebook=q.codebook, count=q.count, centres=centres)


def epoch(data):
    """Which samples the batches of an epoch hold, by the height that each is seen with."""
    distributed.connect(CPU)
    split = Split(data, "train", CPU)
    torch.manual_seed(5 + distributed.rank())
    rng = np.random.default_rng(distributed.rank())
    batches = list(split.batches(8, rng, prepare=in_model_frame))
    return dict(y=[b["y"] for b in batches], steps=split.steps(8),
                states=torch.get_rng_state())


def clocks(folder):
    """The number of epochs of a training that takes 10 s, where the two clocks lie on both sides of
    the first tenth of it."""
    distributed.connect(CPU)
    folder.mkdir(exist_ok=True)
    (folder / "meta.json").write_text("{}")
    run = Run(folder, hipart.Config(), train.Training(), CPU, data=str(folder))
    model = torch.nn.Linear(3, 1)
    loop = training_loop.Loop(run, "m", model, training_loop.adamw(model, 1.0, 0.0), 0, 4,
                              training_loop.warmup_cosine(500), 10.0)
    loop._count_seconds = lambda: setattr(loop, "seconds", 0.999 + 0.002 * distributed.rank())
    for _ in range(3):
        loop.finish_epoch({})
    return dict(epochs=loop.n_epochs)


# --------------------------------------------------------------------------------------------------
# Runs


def run_stages(data, folder, *stages, options=(), script=False, **sizes):
    """`train.py --stage N` for each stage, in a folder of its own."""
    def function():
        os.makedirs(folder, exist_ok=True)
        os.chdir(folder)
        values = [word for k, v in (SIZES | sizes).items()
                  for word in [f"--{k}", *[str(v)] * (v is not True)]]
        for stage in stages:
            sys.argv = ["train.py", "--preset", "paper", "--name", "tiny", "--data", str(data),
                        "--device", "cpu", "--stage", str(stage), *options, *values]
            train.main()
    return function


def sixty_steps(data, folder):
    """60 steps of stage 1, with the codebooks' bits and the restarts of every step."""
    noted, ema_apply_ = [], hipart.ema_apply_

    def noting(codebook, *rest):
        restarts = ema_apply_(codebook, *rest)
        noted.append((int(restarts), codebook.numpy().tobytes()))
        return restarts

    def function():
        hipart.ema_apply_ = noting
        run_stages(data, folder, 1, epochs_1=8, K_s=48, K_d=64, restart_below=0.9)()
        return noted

    return function


def spoil_one_bit(data, folder):
    """Stage 1, in whose twelfth step the second process changes a bit of what makes its codes."""
    calls, update = [], training_loop.Loop.update

    def spoiling(self, loss, terms):
        update(self, loss, terms)
        calls.append(1)
        if len(calls) == 12 and distributed.rank() == 1:
            self.model.Q_s.total.view(torch.int32)[3, 2] ^= 1

    def function():
        training_loop.Loop.update = spoiling
        run_stages(data, folder, 1)()

    return function


def full_disk(data, folder):
    """Stage 1, whose checkpoint the first process cannot write."""
    def function():
        Path.write_bytes = full
        run_stages(data, folder, 1)()

    def full(self, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return function


def interrupted(data, folder, stage, step):
    """A stage whose second process alone gets a Ctrl-C in the given step."""
    calls, update = [], training_loop.Loop.update

    def stopping(self, loss, terms):
        calls.append(1)
        if len(calls) == step and distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        update(self, loss, terms)

    def function():
        training_loop.Loop.update = stopping
        run_stages(data, folder, stage, options=["--resume"])()

    return function


def evaluated(data, folder, *more):
    def function():
        os.chdir(folder)
        sys.argv = ["evaluate.py", "--name", "tiny", "--data", str(data), "--device", "cpu", *more]
        evaluate.main()
    return function


def main():
    data, folder = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    backend("cpu")  # built once
    warm_up()
    # Three blocks an epoch, the last of which is not full.
    dataset.BLOCK = train.BLOCK = 24
    train.script = lambda *command: None
    two, cut, inputs = folder / "two", folder / "cut", train.INPUTS

    def do(*args):
        in_ranks(folder, *args)

    do("gradients", gradients)
    do("gradients_alone", gradients, 1)
    do("kmeans", kmeans)
    do("epoch", lambda: epoch(data))
    do("clocks", lambda: clocks(folder / "clocks"))
    do("epoch_alone", lambda: epoch(data), 1)
    do("sixty", sixty_steps(data, folder / "sixty"))
    do("spoiled", spoil_one_bit(data, folder / "spoiled"))
    do("full_disk", full_disk(data, folder / "full"))
    do("odd_batch", run_stages(data, folder / "odd", 1, batch_1=7))
    do("trained", run_stages(data, two, 1, 2, 3))
    train.INPUTS = {"generated": "the only one"}
    for stage, step in ((1, 11), (2, 5), (3, 20)):  # 20: of the regressor's 16 + 32
        do(f"cut_{stage}", interrupted(data, cut, stage, step))
        do(f"alone_{stage}", run_stages(data, cut, stage, options=["--resume"]), 1)
        do(f"went_on_{stage}", run_stages(data, cut, stage, options=["--resume"]))
    train.INPUTS, dataset.BLOCK = inputs, 31  # and then one sample for two processes
    for name, *more in (("evaluation.json",), ("occlusion.md", "--occlusion")):
        do(name, evaluated(data, two, *more))
        (two / "runs/tiny" / name).rename(folder / name)
        do(f"{name}_alone", evaluated(data, two, *more), 1)
    print(json.dumps(dict(done=True)))


if __name__ == "__main__":
    main()
