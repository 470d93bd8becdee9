"""The benchmarks that ask for no quiet machine run from end to end, with tiny sizes."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import few_labels
from checkpoints import Run, load_finished
from hipart import Config
from train import Training

ROOT = Path(__file__).resolve().parent.parent


def run(tmp_path, name, *options):
    """What a benchmark prints, and what it writes."""
    command = [sys.executable, ROOT / f"benchmarks/{name}.py", "--results", tmp_path, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert {"device", "threads", "torch", "commit", "date"} <= report["machine"].keys()
    return done.stdout, report


def test_generate(tmp_path):
    printed, report = run(tmp_path, "generate", "--preset", "standard", "--batch", "1", "2",
                          "--seconds", "0")
    for rows in report["sizes"]["standard"].values():
        assert rows.keys() == {"plain loop", "rollout", "densify"}
        assert rows["densify"]["times_densify"] == 1 and rows["densify"]["turns"] == 3
        assert all(r["ms"] > 0 and r["poses_per_second"] > 0 for r in rows.values())
    assert printed.count("| densify |") == 2


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory(tmp_path):
    _, report = run(tmp_path, "memory", "--poses", "5000", "--steps", "40", "--limit", "16")
    assert list(report["densify"]) == ["5000"]
    assert all(r["beside"] < 16 for r in report["densify"].values())
    assert report["trainings"].keys() == {"stage1", "stage2", "stage3_ground_truth_0"}
    assert all(len(noted) >= 10 and min(noted) > 50 for noted in report["trainings"].values())


def test_steps(tmp_path):
    variants = ["line by line", "line by line, bfloat16"]
    _, report = run(tmp_path, "steps", "--device", "cpu", "--preset", "tiny", "--seconds", "0",
                    "--variant", *variants)
    for rows in report["presets"]["tiny"].values():
        assert list(rows) == variants
        plain, bfloat16 = rows.values()
        assert plain["slowest"] <= plain["steps_per_second"] <= plain["fastest"]
        assert plain["loss"] == pytest.approx(bfloat16["loss"], rel=0.05)
    assert report["presets"]["tiny"].keys() == {"stage_1", "stage_2"}


# --------------------------------------------------------------------------------------------------
# few_labels.py


def few(monkeypatch, folder, *options, **rule):
    """Train lifters with few labels in a folder that holds runs/tiny -> what its JSON holds."""
    rule = dict(DRAWN=40, CHECK=2, PATIENCE=1, LEAST=0.5, HALVINGS=1) | rule  # soon over
    with monkeypatch.context() as m:
        m.chdir(folder)
        for name, value in rule.items():
            m.setattr(few_labels, name, value)
        m.setattr(sys, "argv", ["few_labels.py", "--name", "tiny", "--device", "cpu", *options])
        few_labels.main()
    return json.loads((folder / "runs/tiny/few_labels.json").read_text())["lifters"]


def test_few_labels(tiny_run, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    for name in ("stage1", "stage2", "regressor"):
        shutil.copy(tiny_run / f"runs/tiny/{name}.pt", folder)
    first = few(monkeypatch, tmp_path, "--labels", "16")
    both = few(monkeypatch, tmp_path, "--labels", "8", "16")
    assert set(both) == {"8", "16"} and both["16"] == first["16"]  # not trained again
    for rows in both.values():
        assert list(rows) == ["sparse", "generated", "regressor"]
        for found in (rows[name]["0"] for name in rows):
            assert all(0 < found[split] < 1000 for split in ("val", "test", "unseen"))
            assert found["steps"] - found["best_steps"] == 2 and found["seconds"] > 0
    table = (folder / "few_labels.md").read_text()
    assert f"{both['8']['generated']['0']['unseen']:.1f}" in table and table.count("1.00") >= 4
    assert matplotlib.image.imread(folder / "few_labels.png").shape[1] == 1000
    for labels, check, words in (("65", 2, "--labels must be 1 to 64"), ("8", 3, "another rule")):
        with pytest.raises(SystemExit) as e:
            few(monkeypatch, tmp_path, "--labels", labels, CHECK=check)
        assert e.value.code == 2 and words in capsys.readouterr().err


def test_inputs_learn_from_the_same_detections(tiny_run, monkeypatch):
    monkeypatch.chdir(tiny_run)
    monkeypatch.setattr(few_labels, "DRAWN", 100)
    run = Run(Path("runs/tiny"), Config(), Training(), torch.device("cpu"))
    run.data = load_finished(run, "stage1")["run"]["data"]
    inputs, few = few_labels.Inputs(run), run.split("train").spread(16)
    drawn = {name: inputs.drawn(name, few, 0) for name in few_labels.NAMES}
    for samples in drawn.values():
        assert len(samples["x"]) == 16 * 6  # 100 // 16 times
        assert torch.equal(samples["x"][:, :17], drawn["sparse"]["x"])
    follow = few.read(slice(None), clean=True) | dict(begins=torch.zeros(16, dtype=torch.bool))
    assert inputs.of("sparse", follow)["begins"].all()  # or all of a batch would turn alike
    x, y = drawn["sparse"]["x"].unflatten(0, (6, 16)), drawn["sparse"]["y"].unflatten(0, (6, 16))
    assert torch.equal(y[0], y[5]) and not torch.equal(x[0], x[5])
    assert len(inputs.drawn("sparse", few.spread(2), 0)["x"]) == 2 * 50
    # A pass holds every sample once; here the last 96 - 3 * 30 samples make no batch.
    endless = few_labels.batches(drawn["sparse"], Training(batch_3=30))
    for _ in range(2):
        seen = torch.cat([next(endless)["x"] for _ in range(3)]).flatten(1)
        assert len(seen.unique(dim=0)) == 90


class Given(few_labels.Inputs):
    """Instead of a run's models and data: random poses."""

    def __init__(self):
        training = Training(lifter="mlp", lifter_width=6, lifter_blocks=1)
        self.run = Run(Path("none"), Config(), training, torch.device("cpu"))

    def drawn(self, name, train, seed):
        return dict(x=torch.rand(9, 17, 2), y=torch.rand(9, 17, 3), conf=torch.ones(9, 17))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.sampled_from([0.0, 0.01, 0.2]), st.integers(1, 3),
       st.lists(st.floats(1, 200), max_size=30))
def test_the_rule_that_ends_a_training(patience, least, halvings, said):
    """The rule as the docstring says it, for any errors on validation."""
    said = said + [300.0] * patience * halvings if said else [300.0] * (patience * halvings + 1)
    best, best_check, worse, halved, check, rates = math.inf, 0, 0, 0, 0, []
    while halved < halvings:
        rates.append(1e-3 / 2**halved)
        error, check = said[check], check + 1
        if error < best * (1 - least):
            best, best_check, worse = error, check, 0
        else:
            worse += 1
        if worse == patience:
            halved, worse = halved + 1, 0

    weights, used, step = [], [], torch.optim.AdamW.step

    def flat(model):
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def errors(model, block):
        weights.append(flat(model))
        return np.array([said[len(weights) - 1]])

    def noted(optimizer, *args, **kwargs):
        used.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args, **kwargs)

    with pytest.MonkeyPatch.context() as m:
        rule = dict(CHECK=1, PATIENCE=patience, LEAST=least, HALVINGS=halvings, errors=errors)
        for name, value in rule.items():
            m.setattr(few_labels, name, value)
        m.setattr(torch.optim.AdamW, "step", noted)
        model, found = few_labels.train_lifter(Given(), "sparse", SimpleNamespace(n=9), {}, 0)
    assert (found["steps"], found["best_steps"], found["val"]) == (check, best_check, best)
    assert used == rates
    assert torch.equal(flat(model), weights[best_check - 1])
