"""Interruptions: signals, full disks, second processes, replaced data, a GPU without memory.

A run that is interrupted after any step and resumed must be the uninterrupted one, to the bit. The
tiny set is read in three blocks an epoch here, the last of which is not full.
"""

import errno
import functools
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import person
from kills import fork
from test_train import (
    assert_same,
    assert_same_run,
    begin,
    checkpoint,
    log,
    main,
    one_sentence,
    refused,
    run_in,
)

import checkpoints
import survival
import train
import training_loop
from hipart import HiPART
from sources import dataset

HERE = Path(__file__).parent
SHORT = dict(batch_1=8, batch_2=8, batch_3=8, warmup_free=3, epochs_1=2, epochs_2=2, epochs_3=2,
             epochs_equal=1, lifter="mlp", turn_3=0.5, soft=True, history_dropout=0.5,
             epochs_soft=1, passes_3=2)  # fmt: skip
STEPS = 8  # of a pass: blocks of 24, 24 and 16 samples in batches of 8


@pytest.fixture(scope="module")
def data(tiny_data):
    return f"{tiny_data}/tiny"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    set_small_blocks(monkeypatch)


def set_small_blocks(m):
    m.setattr(dataset, "BLOCK", 24)
    m.setattr(train, "BLOCK", 24)
    m.setattr(train, "INPUTS", {"generated": "the only one"})


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """All three stages, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as m:
        set_small_blocks(m)
        for stage in (1, 2, 3):
            main(m, folder, "--data", data, "--stage", stage, **SHORT)
    return folder


class Stop(Exception):
    """Pulls the plug."""


def at_step(m, step, act, owner=training_loop.Loop, name="update"):
    """Call act() in the n-th call of Loop.update, counted from 1, or of another function."""
    function, calls = getattr(owner, name), []

    def counted(*args, **options):
        calls.append(1)
        if len(calls) == step:
            act()
        return function(*args, **options)

    m.setattr(owner, name, counted)


def send(number):
    return lambda: os.kill(os.getpid(), number)


def interrupted(m, capsys, folder, *args, number=signal.SIGINT):
    """The command must end with the status of that signal -> the command that it says goes on."""
    status, said = refused(m, capsys, folder, *args, **SHORT)
    assert status == 128 + number
    said = re.fullmatch(r"interrupted \(SIG\w+\): go on with `python (.*)`", one_sentence(said))
    return shlex.split(said[1])


# --------------------------------------------------------------------------------------------------
# Signals


STAGES = [(1, ()), (2, ("stage1",)), (3, ("stage1", "stage2", "regressor"))]
EVERY = {1: 1, 2: 2, 3: 5}  # steps between interruptions: later stages begin more slowly
NAMES = {1: "stage1", 2: "stage2", 3: "stage3_generated_0"}


@pytest.mark.parametrize("stage, before", STAGES)
def test_a_run_interrupted_again_and_again_is_bit_for_bit_the_uninterrupted_one(
        whole, data, tmp_path, monkeypatch, capsys, stage, before):
    """Ctrl-C in every step, or in every second or fifth, each in a process of its own."""
    begin(whole, tmp_path, *before)
    args = ("--data", data, "--stage", stage, *["--resume"] * (stage == 3))
    per_epoch = STEPS * (SHORT["passes_3"] if stage == 3 else 1)
    for step in range(EVERY[stage], 2 * per_epoch + 1, EVERY[stage]):
        with monkeypatch.context() as m:
            at_step(m, EVERY[stage], send(signal.SIGINT))
            command = interrupted(m, capsys, tmp_path, *args)
        assert command[0] == "train.py" and command.count("--resume") == 1
        saved = checkpoint(tmp_path, NAMES[stage])
        # After its last step an epoch is not finished: validation is to come.
        assert (saved["step"], saved["epoch"]) == (step, (step - 1) // per_epoch)
        torch.manual_seed(step)  # whatever a new process starts with
        args = (*args[:4], "--resume")
    main(monkeypatch, tmp_path, *args, **SHORT)
    assert_same_run(whole, tmp_path, NAMES[stage])


@pytest.mark.parametrize("stage, report", [(1, "tokenizer_report"), (2, "densification_report")])
def test_a_signal_in_validation_loses_no_step(
        whole, data, tmp_path, monkeypatch, capsys, stage, report):
    begin(whole, tmp_path, *["stage1"] * (stage == 2))
    args = ("--data", data, "--stage", stage)
    with monkeypatch.context() as m:
        at_step(m, 2, send(signal.SIGTERM), train, report)
        interrupted(m, capsys, tmp_path, *args, number=signal.SIGTERM)
    saved = checkpoint(tmp_path, NAMES[stage])
    assert (saved["step"], saved["epoch"]) == (2 * STEPS, 1)
    main(monkeypatch, tmp_path, *args, "--resume", **SHORT)
    assert_same_run(whole, tmp_path, NAMES[stage])


def test_a_signal_while_an_epoch_is_logged_waits_for_its_checkpoint(
        whole, data, tmp_path, monkeypatch, capsys):
    args = ("--data", data, "--stage", 1)
    with monkeypatch.context() as m:
        at_step(m, 1, send(signal.SIGINT), checkpoints.Run, "log")
        interrupted(m, capsys, tmp_path, *args)
    assert checkpoint(tmp_path, "stage1")["epoch"] == 1
    main(monkeypatch, tmp_path, *args, "--resume", **SHORT)
    assert_same_run(whole, tmp_path, "stage1")


def test_a_second_ctrl_c_ends_at_once(capfd):
    """But not a second SIGTERM: a scheduler and torchrun may both send it. What waits says so."""
    watch, before = survival.Watch(), signal.getsignal(signal.SIGINT)
    with watch.listening():
        watch.busy = True
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert watch.signal == number and watch.busy
            assert ("Ctrl-C again stops at once" in one_sentence(capfd.readouterr().err.strip())
                    ) == (number == signal.SIGINT)
        with pytest.raises(SystemExit) as e:
            os.kill(os.getpid(), signal.SIGINT)
        assert e.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("name", ["train", "evaluate", "sample", "lift", "prepare_data"])
def test_ctrl_c_while_modules_are_imported_says_nothing(tmp_path, name):
    for module in ("numpy", "matplotlib"):  # what is imported first
        (tmp_path / f"{module}.py").write_text("import signal\nsignal.raise_signal(2)")
    done = subprocess.run([sys.executable, HERE.parent / f"{name}.py"], capture_output=True,
                          env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_the_command_that_goes_on_names_all_nodes(monkeypatch):
    assert survival.launcher(8) == "torchrun --nproc_per_node=8"
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert survival.launcher(8).startswith("torchrun --nnodes=2 --nproc_per_node=4 [other")
    assert survival.launcher(3) == "torchrun --nproc_per_node=3"
    assert survival.launcher(1) == "python"


def test_checkpoints_come_by_time_as_well(whole, data, tmp_path, monkeypatch):
    """With no time to wait, after every step; the plug is pulled in the middle of an epoch."""
    begin(whole, tmp_path, "stage1")
    args = ("--data", data, "--stage", 2)
    for step in (3, 6):  # 2 steps are done, then 5 more
        with monkeypatch.context() as m:
            m.setattr(training_loop, "SAVE_EVERY", -1)
            at_step(m, step, lambda: (_ for _ in ()).throw(Stop))
            with pytest.raises(Stop):
                main(m, tmp_path, *args, **SHORT)
        args = (*args[:4], "--resume")
    saved = checkpoint(tmp_path, "stage2")
    assert (saved["step"], saved["epoch"]) == (7, 0)
    main(monkeypatch, tmp_path, *args, **SHORT)
    assert_same_run(whole, tmp_path, "stage2")
    assert training_loop.SAVE_EVERY == 600  # s: what the README promises


# --------------------------------------------------------------------------------------------------
# Disks and folders


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_full_disk_is_said_and_the_last_checkpoint_stays(
        whole, data, tmp_path, monkeypatch, capsys, epoch):
    """In the first epoch and in the second; after that, --resume goes on."""
    args, write_bytes = ("--data", data, "--stage", 1), Path.write_bytes

    def writing(self, content):
        write_bytes(self, content[:99])
        if self.name == "stage1.pt.tmp" and (self.parent / "log.jsonl").exists() == bool(epoch):
            full()
        return write_bytes(self, content)

    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", writing)
        status, said = refused(m, capsys, tmp_path, *args, **SHORT)
    assert status == 1
    assert re.fullmatch(r"runs/tiny/stage1.pt could not be written \(No space left on device\): "
                        r"it needs \d+ MB; mend that, and go on with `python train.py .* --resume`",
                        one_sentence(said))
    run = tmp_path / "runs/tiny"
    assert {p.name for p in run.iterdir()} == {"lock", *["stage1.pt", "log.jsonl"] * epoch}
    if epoch:
        assert checkpoint(tmp_path, "stage1")["step"] == STEPS
    main(monkeypatch, tmp_path, *args, "--resume", **SHORT)
    assert_same_run(whole, tmp_path, "stage1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_systems_own_word_for_a_full_disk_is_understood(tmp_path, capsys):
    path = tmp_path / "stage1.pt"
    survival.write(path, b"old")
    (tmp_path / "stage1.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(SystemExit) as e:
        checkpoints.save_checkpoint(path, model=torch.zeros(600_000))
    said = one_sentence(capsys.readouterr().err.strip())
    assert e.value.code == 1 and "stage1.pt" in said and "needs 3 MB" in said
    assert [p.name for p in tmp_path.iterdir()] == ["stage1.pt"] and path.read_bytes() == b"old"


def failing(number):
    def function(*args, **options):
        raise OSError(number, os.strerror(number), str(args[0]))

    return function


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EROFS, errno.ENOSPC])
def test_whatever_keeps_a_file_from_being_written_is_said(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(os, "replace", failing(number))
    for act in (lambda path: survival.write(path, "text"), failing(number)):
        with pytest.raises(SystemExit) as e, survival.Watch().listening():
            act(tmp_path / "table.md")
        said = one_sentence(capsys.readouterr().err.strip())
        assert e.value.code == 1 and "table.md could not be " in said
        assert f"written ({os.strerror(number)})" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, options, writes", [
    ("evaluate", (), "replace"), ("sample", (), "replace"), ("lift", ("people.json",), "rename")])
def test_no_script_ends_in_a_traceback_where_it_cannot_write(
        tiny_run, data, tmp_path, monkeypatch, capsys, name, options, writes):
    monkeypatch.undo()  # all inputs
    shutil.copytree(tiny_run / "runs", tmp_path / "runs")
    people = [dict(image_id=0, keypoints=person("coco17").ravel().tolist(), score=1)]
    (tmp_path / "people.json").write_text(json.dumps(people))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    heard = signal.getsignal(signal.SIGINT)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, writes, failing(errno.EACCES))
    monkeypatch.setattr("sys.argv", [f"{name}.py", *options, "--name", "tiny", *[
        "--data", data] * (name != "lift")])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(HERE.parent / f"{name}.py", run_name="__main__")
    signal.signal(signal.SIGINT, heard)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert e.value.code == 1 and "written (Permission denied)" in one_sentence(said)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}


def test_free_space_is_checked_before_a_run_begins(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3_000_000))
    status, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 1, **SHORT)
    assert status == 1 and re.fullmatch(
        r"runs/tiny needs about \d+ MB for this run, and 3 MB of its disk are free: make room "
        "first", one_sentence(said))
    assert not list((tmp_path / "runs/tiny").glob("*.pt"))


def test_the_space_that_is_asked_for_is_what_a_run_takes(data, tmp_path):
    """The checkpoints of `quick`'s models, written here without training them."""
    config, training = train.PRESETS["quick"]
    run = checkpoints.Run(tmp_path, train.Config(**config), train.Training(**training),
                          torch.device("cpu"), data=str(data))
    hipart = HiPART(run.config)
    models = dict(stage1=hipart.msst, stage2=hipart.hiarm, regressor=train.Regressor(1024),
                  stage3_generated_0=train.new_lifter(run.training, "generated"))
    asked = train.disk_needed(run, (1, 2, 3), 1)
    alone = [train.disk_needed(run, (stage,), 1) for stage in (1, 2, 3)]
    for name, model in models.items():
        optimizer = training_loop.adamw(model, 1e-3, 0.1)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        checkpoints.save_checkpoint(tmp_path / f"{name}.pt", model=model.state_dict(),
                                    optimizer=optimizer.state_dict())
    sizes = [p.stat().st_size for p in tmp_path.glob("*.pt")]
    taken = sum(sizes) + max(sizes) + train.SMALL_FILES
    assert 0.9 * taken < asked < 1.3 * taken
    assert max(alone) < asked < sum(alone)
    for stages, before in (((1, 2, 3), asked), *zip(((1,), (2,), (3,)), alone, strict=True)):
        # What is there counts, if it is of these stages.
        names = [name for stage in stages for name in train.checkpoints_of(stage)]
        there = sum((tmp_path / f"{name}.pt").stat().st_size for name in names)
        assert before - 1.1 * there < train.disk_needed(run, stages, 1) < before - 0.9 * there


def test_a_folder_that_cannot_be_written_is_said(data, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").write_text("a file where a folder should be")
    status, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 1, **SHORT)
    assert status == 2 and "runs/tiny cannot be written to" in one_sentence(said)


# --------------------------------------------------------------------------------------------------
# Other processes


@pytest.mark.skipif(not survival.fcntl, reason="Windows has no such locks")
def test_two_processes_write_one_file_whole(tmp_path):
    """As two evaluate.py of one run may, while somebody reads."""
    path = tmp_path / "table.md"

    def writing(letter):
        for _ in range(30):
            survival.write(path, letter * 10**6)

    survival.write(path, "a" * 10**6)
    children = [fork(functools.partial(writing, letter), tmp_path / "said") for letter in "ab"]
    for child in children:
        while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
            text = path.read_text()
            assert len(text) == 10**6 and len(set(text)) == 1
        assert ended[1] == 0, (tmp_path / "said").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"table.md", "said"}


@pytest.mark.skipif(not survival.fcntl, reason="Windows has no such locks")
def test_a_second_process_is_refused_and_a_dead_one_is_not_in_the_way(
        data, tmp_path, monkeypatch, capsys):
    here = HERE.parent
    code = (f"import sys; sys.path.insert(0, {str(here)!r})\n"
            "from pathlib import Path\nfrom survival import alone_in\n"
            "with alone_in(Path('runs/tiny')):\n    print('held', flush=True)\n    input()")
    args = ("--data", data, "--stage", 1)
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == "held\n"
        status, said = refused(monkeypatch, capsys, tmp_path, *args, **SHORT)
        other.kill()
    assert status == 2 and "runs/tiny is in use by another process" in one_sentence(said)
    assert [p.name for p in (tmp_path / "runs/tiny").iterdir()] == ["lock"]
    main(monkeypatch, tmp_path, *args, **SHORT)
    assert checkpoint(tmp_path, "stage1")["epoch"] == 2


def test_data_replaced_under_a_running_process_are_noticed(
        whole, data, tmp_path, monkeypatch, capsys):
    """After the first epoch another data set lies there. With the old one back, the run goes on to
    the same end."""
    ours, folder = tmp_path / "data/tiny", tmp_path / "run"
    shutil.copytree(data, ours)

    def replace():
        shutil.move(ours, tmp_path / "kept")
        shutil.copytree(tmp_path / "kept", ours)
        meta = json.loads((ours / "meta.json").read_text())
        (ours / "meta.json").write_text(json.dumps(meta | dict(seed=1)))

    args = ("--data", ours, "--stage", 1)
    with monkeypatch.context() as m:
        at_step(m, 1, replace, train, "tokenizer_report")
        status, said = refused(m, capsys, folder, *args, **SHORT)
    assert status == 2 and f"{ours} was replaced while runs/tiny was at" in one_sentence(said)
    status, said = refused(monkeypatch, capsys, folder, *args, "--resume", **SHORT)
    assert status == 2 and "stage1.pt" in one_sentence(said)
    shutil.rmtree(ours)
    shutil.move(tmp_path / "kept", ours)
    main(monkeypatch, folder, *args, "--resume", **SHORT)
    assert_same(checkpoint(whole, "stage1")["model"], checkpoint(folder, "stage1")["model"])


@pytest.mark.parametrize("stage, before", STAGES)
def test_a_gpu_without_memory_names_the_batch_option(
        whole, data, tmp_path, monkeypatch, capsys, stage, before):
    begin(whole, tmp_path, *before)

    def exhausted():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    at_step(monkeypatch, 2, exhausted)
    status, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", stage,
                           "--resume", **SHORT)
    assert status == 2
    assert one_sentence(said) == (
        f"the GPU's memory is full: try a smaller --batch_{stage} than {SHORT[f'batch_{stage}']}")


def test_no_line_of_the_log_is_ever_half_there(whole, tmp_path, monkeypatch):
    shutil.copytree(whole / "runs", tmp_path / "runs")
    rows, run = log(tmp_path), run_in(tmp_path / "runs/tiny")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(SystemExit):
        run.log(model="stage1", epoch=3)
    assert log(tmp_path) == rows


def test_forty_kills_leave_no_mark(tmp_path):
    """Over all scripts; kills.py says how."""
    done = subprocess.run([sys.executable, str(HERE / "kills.py"), str(tmp_path)], text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"},
                          capture_output=True)
    assert done.stdout == "40 kills\n" and done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("make", [
    lambda lock, other: lock.symlink_to(other), lambda lock, other: lock.symlink_to("nowhere"),
    lambda lock, other: os.mkfifo(lock), lambda lock, other: lock.mkdir(),
])  # fmt: skip
def test_a_lock_that_is_no_file_is_not_followed(tmp_path, capsys, make):
    other, folder = tmp_path / "other", tmp_path / "run"
    other.write_text("kept")
    folder.mkdir()
    make(folder / "lock", other)
    with pytest.raises(SystemExit) as e, survival.alone_in(folder):
        pass
    assert e.value.code == 2 and "its lock is no regular file" in capsys.readouterr().err
    assert other.read_text() == "kept" and not (folder / "nowhere").exists()
