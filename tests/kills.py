"""Kill every script at 40 moments, go on after each, and compare with a chain that nobody killed.

    python tests/kills.py FOLDER [SEED]

Each command is a fork of this process, which has imported everything. It counts what it does to
files and its training steps, and kills itself (SIGKILL) at a given number of them, so that the
clock decides nothing. Prints "N kills", or what differs.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import RUN_SIZES, TINY_SIZES, make_bodies, make_clips  # noqa: E402

import evaluate  # noqa: E402
import lift  # noqa: E402
import prepare_data  # noqa: E402
import train  # noqa: E402
import training_loop  # noqa: E402
from kernels import backend  # noqa: E402
from sources import dataset  # noqa: E402

KILLS = dict(prepare=5, stage_1=9, stage_2=7, stage_3=11, evaluate=4, lift=4)
WATCHED = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "step", "half written"}
SIZES = [part for k, v in (RUN_SIZES | dict(batch_1=8)).items() for part in (f"--{k}", str(v))]
RUN = ["--name", "tiny", "--data", "data/tiny", "--device", "cpu"]


def stage(n):
    return ["train.py", "--preset", "paper", *RUN, "--stage", str(n), "--resume", *SIZES]


def prepare(clips, bodies):
    prepare_data.write_data_set(Path("data/tiny"), clips, bodies, TINY_SIZES, 0, {},
                                unseen=("kick",), overwrite=True)


# --------------------------------------------------------------------------------------------------
# One command


def fork(function, said):
    """Run function() in a fork of this process -> its id. What it says is added to the file `said`,
    with its exit status at the end."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1), os.dup2(file, 2)
        sys.stdout.reconfigure(line_buffering=True)  # in turn with what goes to stderr
        function()
        status = 0
    except SystemExit as e:
        status = e.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        print("status", status, flush=True)
        os._exit(status)


def in_child(folder, argv, main, die_at=0, save_every=600):
    """Run main() as a command in a fork -> its exit status (-9: killed at event number `die_at`)
    and how many events it had."""
    reading, writing = os.pipe()

    def command():
        os.chdir(folder)
        sys.argv, training_loop.SAVE_EVERY = argv, save_every
        events = count_events(die_at)
        try:
            main()
        finally:
            os.write(writing, str(events[0]).encode())

    _, status = os.waitpid(fork(command, folder / "said.txt"), 0)
    os.close(writing)
    with open(reading) as f:
        return os.waitstatus_to_exitcode(status), int(f.read() or 0)


def warm_up():
    """Let PyTorch import all that it imports late, or each child would."""
    model = torch.nn.Linear(2, 2)
    optimizer = training_loop.adamw(model, 1e-3, 0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def count_events(die_at):
    """Count what this process does from here on, and kill it at event number `die_at`."""
    events = [0]

    def hook(event, args):
        if event in WATCHED or (event == "open" and str(args[1])[:1] in ("w", "a", "x")):
            events[0] += 1
            if events[0] == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return events


def announce(owner, name, event, half=False):
    """Make a function an event: after it, or in the middle of the file that it writes."""
    function = getattr(owner, name)

    def announced(*args, **options):
        if half:
            function(args[0], args[1][: len(args[1]) // 2])
            sys.audit(event)
        result = function(*args, **options)
        sys.audit(event)
        return result

    setattr(owner, name, announced)


# --------------------------------------------------------------------------------------------------
# What must be the same


def content(folder):
    """All that the chain leaves, but for times."""
    run, left = folder / "runs/tiny", {}
    for path in (folder / "data/tiny").rglob("*.npy"):
        left[path.relative_to(folder).as_posix()] = path.read_bytes()
    for path in run.glob("*.pt"):
        saved = torch.load(path, weights_only=True)
        left[path.name] = flat(saved | dict(seconds=0))
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    left["log.jsonl"] = repr([row | dict(seconds=0) for row in rows])
    numbers = json.loads((run / "evaluation.json").read_text())
    left["evaluation.json"] = repr(numbers["splits"]) + repr(numbers["codebooks"])
    for name, array in np.load(run / "keypoints/people/poses.npz").items():
        left[f"poses {name}"] = array.tobytes()
    return left


def flat(value):
    if isinstance(value, dict):
        return [(str(k), flat(v)) for k, v in value.items()]
    if isinstance(value, list | tuple):
        return [flat(v) for v in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def main():
    root, rng = Path(sys.argv[1]), np.random.default_rng(int([*sys.argv, 0][2]))
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    backend("cpu")  # built once
    warm_up()
    dataset.BLOCK = train.BLOCK = 24  # three blocks an epoch
    train.script = lambda *command: None  # evaluate.py has its own turn
    lift.draw_keypoints = lambda folder, k, p: []
    prepare_data.draw_samples = prepare_data.draw_coarsening = lambda *args: None
    for owner, name, event in ((torch.optim.AdamW, "step", "step"),
                               (train, "lifter_input", "step"), (lift, "lift", "step"),
                               (evaluate, "measure_block", "step")):
        announce(owner, name, event)
    announce(Path, "write_bytes", "half written", half=True)
    clips, bodies = make_clips(), make_bodies()
    people = root / "people.json"
    root.mkdir(parents=True, exist_ok=True)
    x = (100 + 5 * np.arange(51).reshape(17, 3)) % 97 + 200.0
    x[:, 2] = 1
    people.write_text(json.dumps([dict(image_id="a.jpg", category_id=1, score=1,
                                       keypoints=x.flatten().tolist())]))
    commands = dict(
        prepare=(["prepare_data.py"], lambda: prepare(clips, bodies)),
        stage_1=(stage(1), train.main), stage_2=(stage(2), train.main),
        stage_3=(stage(3), train.main),
        evaluate=(["evaluate.py", *RUN], evaluate.main),
        lift=(["lift.py", str(people), "--name", "tiny", "--layout", "coco17", "--image-size",
               "1000", "1000", "--device", "cpu"], lift.main))  # fmt: skip
    kills, gaps = 0, {}
    for folder in (root / "whole", root / "killed"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, (argv, run) in commands.items():
            if folder.name == "killed":
                for _ in range(KILLS[name]):
                    # Either every step has a checkpoint, or only every epoch has.
                    every, status, last = int(rng.choice([-1, 600])), 0, gaps[name]
                    while status != -9:  # a command that goes on near its end has few events
                        last = int(rng.integers(1, last + 1))
                        status, _ = in_child(folder, argv, run, last, every)
                        if status not in (0, -9):
                            raise SystemExit(f"{name} ended with {status} after a kill")
                    kills += 1
            status, events = in_child(folder, argv, run)
            resumes = name.startswith("stage")  # the others begin anew after each kill
            gaps[name] = max(1, 2 * events // KILLS[name] if resumes else events)
            if status:
                raise SystemExit(f"{name} ended with {status}: {folder / 'said.txt'} says why")
    one, other = content(root / "whole"), content(root / "killed")
    differ = [name for name in one | other if one.get(name) != other.get(name)]
    if differ:
        raise SystemExit(f"after {kills} kills, these differ: {', '.join(differ)}")
    print(kills, "kills")


if __name__ == "__main__":
    main()
