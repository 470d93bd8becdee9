"""Lifters of sequences, from `train.py --stage 3 --lifter mixste --frames 9` to the table of
`evaluate.py --temporal`: the real command lines, on the tiny run and the tiny sequences of
conftest.py."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN_SIZES

import evaluate
import train
import training_loop
from checkpoints import Run
from hipart import Config, HiPART
from sources.dataset import Split

SIZES = RUN_SIZES | dict(lifter_width=16, batch_3=4)
MIXSTE = ("--lifter", "mixste", "--frames", 9)
STAGES = ("stage1", "stage2", "stage3_sparse_0")
LIFTERS = [f"mixste9_{name}" for name in train.TEMPORAL_INPUTS]


def begin(tiny_run, folder):
    (folder / "runs" / "tiny").mkdir(parents=True)
    for name in STAGES:
        shutil.copy(tiny_run / "runs" / "tiny" / f"{name}.pt", folder / "runs" / "tiny")


def main(m, folder, script, *args):
    """A script's command line in this process, with `folder` as the current one."""
    precision = torch.get_float32_matmul_precision()
    with m.context() as inner:
        inner.chdir(folder)
        inner.setattr(sys, "argv", [script.__file__, *map(str, args)])
        script.main()
    torch.set_float32_matmul_precision(precision)


def stage_3(m, folder, data, *args, lifter=MIXSTE, **options):
    sizes = [part for k, v in (SIZES | options).items() if k != "lifter"
             for part in (f"--{k}", v)]
    main(m, folder, train, "--preset", "paper", "--name", "tiny", "--data", data, "--stage", 3,
         "--device", "cpu", *sizes, *lifter, *args)


@pytest.fixture(scope="module")
def trained(tiny_run, tiny_sequences, tmp_path_factory):
    """A folder with runs/tiny: stages 1 and 2 and a lifter of single frames, all of the set 'tiny',
    and MixSTE for every input; the script that was then called; how many poses were generated at
    once."""
    folder, data = tmp_path_factory.mktemp("temporal"), tiny_sequences / "sequences"
    commands, made, densify = [], [], HiPART.densify

    def spy(self, x_s, *args, **options):
        made.append(len(x_s))
        return densify(self, x_s, *args, **options)

    begin(tiny_run, folder)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "script", lambda *command: commands.append(command))
        m.setattr(HiPART, "densify", spy)
        stage_3(m, folder, data)
    return folder, data, commands, made


def checkpoint(folder, name):
    return torch.load(folder / f"runs/tiny/stage3_{name}_0.pt", weights_only=True)


def test_every_input_has_its_lifter_beside_those_of_single_frames(trained):
    folder, data, commands, made = trained
    assert commands == [("evaluate.py", "--name", "tiny", "--data", str(data), "--device", "cpu",
                         "--seeds", "1", "--temporal")]
    there = {path.stem for path in (folder / "runs/tiny").glob("*.pt")}
    assert there == {*STAGES, *(f"stage3_{name}_0" for name in LIFTERS)}
    rows = [json.loads(line) for line in open(folder / "runs/tiny/log.jsonl")]
    epochs = dict.fromkeys(LIFTERS, 4) | dict(mixste9_generated=2)  # of two passes each
    assert [r["model"] for r in rows] == [
        f"stage3_{name}_0" for name, n in epochs.items() for _ in range(n)]
    for name in LIFTERS:
        saved = checkpoint(folder, name)
        assert saved["training"]["lifter"] == "mixste" and saved["training"]["frames"] == 9
        assert saved["step"] == 4 * (256 // 9 // 4) and saved["run"]["data"] == str(data)
    # For validation and unseen motion, for the statistics, and in both epochs: every frame once.
    assert made == [32, 32, 256, 256, 256]


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """runs/tiny with the table of its lifters of sequences."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(trained[0] / "runs", folder / "runs")
    with pytest.MonkeyPatch.context() as m:
        main(m, folder, evaluate, "--name", "tiny", "--data", trained[1], "--temporal",
             "--device", "cpu")
    return folder / "runs/tiny"


@torch.no_grad()
@pytest.mark.parametrize("name", LIFTERS)
@pytest.mark.parametrize("split", ["test", "unseen"])
def test_errors_are_those_of_every_frame(evaluated, trained, name, split):
    """Against windows that are padded here, one after another."""
    found, data = json.loads((evaluated / "temporal_sequences.json").read_text()), trained[1]
    run = Run(evaluated, Config(), train.Training(), torch.device("cpu"))
    lifter, hipart = train.load_lifter(run, name), train.load_hipart(run)
    block = next(Split(data, split, torch.device("cpu")).blocks())
    x = train.lifter_input(train.input_of(name), block, hipart, None)
    number = np.load(data / split / "sequence.npy")
    y = []
    for i in np.unique(number):
        rows = np.flatnonzero(number == i)
        for start in range(0, len(rows), 9):
            some = rows[start : start + 9]
            if len(some) == 9 or len(some) > 4:  # a window of its own
                window = np.pad(some, (0, 9 - len(some)), mode="edge")
                y.append(lifter(x[window][None], block["conf"][window][None])[0, : len(some)])
            else:  # around the last frame
                ends = np.pad(rows, 4, mode="edge")[len(rows) - 1 :]
                made = lifter(x[ends][None], block["conf"][ends][None])[0]
                y.append(made[5 - len(some) : 5])
    error = (torch.cat(y) - block["y"]).norm(dim=-1).mean()
    found = found["splits"][split][f"mpjpe/{name}/0"]["frames"]
    assert found == pytest.approx(float(error), rel=1e-5)


def test_the_table_has_a_row_for_every_input(evaluated):
    """The one lifter of single frames that was trained is there, too."""
    text = (evaluated / "temporal_sequences.md").read_text()
    rows = [[cell.strip() for cell in row.strip("|").split("|")]
            for row in re.findall(r"^\| [sm].*", text, re.M)]
    assert [row[0] for row in rows[1:]] == [
        "single frames: sparse", "mixste, 9 frames: sparse",
        "mixste, 9 frames: sparse + generated dense + fine (HiPART)",
        "mixste, 9 frames: sparse + ground-truth dense + fine (bound)"]
    assert rows[1][-1].endswith("/tiny") and rows[2][-1].endswith("/sequences")  # trained on
    splits = json.loads((evaluated / "temporal_sequences.json").read_text())["splits"]
    for name, row in zip(LIFTERS, rows[2:], strict=True):
        for split, cells in (("unseen", row[1:5]), ("test", row[5:9])):
            own, sparse = (splits[split][f"mpjpe/{n}/0"] for n in (name, LIFTERS[0]))
            pa = splits[split][f"pa_mpjpe/{name}/0"]["actions"]
            ratio = own["actions"] / sparse["actions"]
            assert cells == [f"{own['actions']:.1f}", f"{own['frames']:.1f}", f"{pa:.1f}",
                             f"{ratio:.2f}"]


class Stop(Exception):
    """Pulls the plug."""


def test_a_resumed_lifter_is_bit_for_bit_the_uninterrupted_one(trained, tiny_run, tmp_path,
                                                              monkeypatch):
    save, data = training_loop.save_checkpoint, trained[1]

    def saving(path, **content):
        save(path, **content)
        if content["step"] == 9:  # in the second pass of the first epoch
            raise Stop

    begin(tiny_run, tmp_path)
    monkeypatch.setattr(train, "script", lambda *command: None)
    monkeypatch.setattr(train, "TEMPORAL_INPUTS", ("generated",))
    with monkeypatch.context() as m:
        m.setattr(training_loop, "save_checkpoint", saving)
        m.setattr(training_loop, "SAVE_EVERY", 0)
        with pytest.raises(Stop):
            stage_3(m, tmp_path, data)
    torch.manual_seed(12345)
    stage_3(monkeypatch, tmp_path, data, "--resume")
    one, other = (checkpoint(folder, "mixste9_generated")["model"]
                  for folder in (trained[0], tmp_path))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_poseformer_and_correlated_errors(tiny_run, tiny_sequences, tmp_path, monkeypatch):
    begin(tiny_run, tmp_path)
    monkeypatch.setattr(train, "script", lambda *command: None)
    monkeypatch.setattr(train, "TEMPORAL_INPUTS", ("ground_truth",))
    stage_3(monkeypatch, tmp_path, tiny_sequences / "correlated", lifter=(
        "--lifter", "poseformer", "--frames", 27), turn_3=0.3)
    saved = checkpoint(tmp_path, "poseformer27_ground_truth")
    assert saved["model"]["mean_t.weight"].shape == (1, 27, 1)
    assert saved["step"] == 4 * (256 // 4)  # epochs, and windows around all frames in fours


def refused(m, capsys, folder, *args, **options):
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        stage_3(m, folder, *args, **options)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_trained_is_said_in_one_sentence(
        tiny_run, tiny_data, tiny_sequences, tmp_path, monkeypatch, capsys):
    begin(tiny_run, tmp_path)
    said = refused(monkeypatch, capsys, tmp_path, tiny_data / "tiny")
    assert "tiny has single frames, and no sequences: make some with " in said
    assert "`python prepare_data.py --sequences`" in said
    with pytest.raises(SystemExit):  # said before stages 1 and 2 take their time
        main(monkeypatch, tmp_path, train, "--preset", "quick", "--name", "new", "--device", "cpu",
             "--data", tiny_data / "tiny", *MIXSTE)
    assert "tiny has single frames" in capsys.readouterr().err
    data = tiny_sequences / "sequences"
    for lifter in (("mixste", 8), ("mixste", 1), ("mlp", 9)):
        said = refused(monkeypatch, capsys, tmp_path, data, lifter=(
            "--lifter", lifter[0], "--frames", lifter[1]))
        assert "an odd number, above 1 for poseformer and mixste, and 1 for" in said
    said = refused(monkeypatch, capsys, tmp_path, data, lifter_width=12)
    assert "lifter_width must be a multiple of lifter_heads 8, found 12" in said
    shutil.copytree(data, tmp_path / "other")
    meta = json.loads((tmp_path / "other/meta.json").read_text())
    meta["subjects"]["test"] = meta["subjects"]["train"]
    (tmp_path / "other/meta.json").write_text(json.dumps(meta))
    said = refused(monkeypatch, capsys, tmp_path, tmp_path / "other")
    assert "has other people or other motion than" in said and "may know its test" in said
    for name in ("stage1", "stage2"):  # of data that have changed since
        path = tmp_path / f"runs/tiny/{name}.pt"
        saved = torch.load(path, weights_only=True)
        torch.save(saved | dict(run=saved["run"] | dict(samples="x")), path)
    said = refused(monkeypatch, capsys, tmp_path, data)
    assert "is not what stages 1 and 2 of" in said and "put it back" in said
    assert {path.stem for path in Path(tmp_path / "runs/tiny").glob("*.pt")} == {*STAGES}


def test_without_lifters_of_sequences_there_is_no_table(tiny_run, tiny_sequences, tmp_path,
                                                       monkeypatch, capsys):
    begin(tiny_run, tmp_path)
    with pytest.raises(SystemExit):
        main(monkeypatch, tmp_path, evaluate, "--name", "tiny", "--temporal", "--device", "cpu",
             "--data", tiny_sequences / "sequences")
    assert "has no lifters of sequences: train some with `python train.py" in (
        capsys.readouterr().err)
