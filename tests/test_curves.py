"""curves.py: what the learning curves show."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import curves
from checkpoints import Run
from hipart import Config
from train import INPUTS, Training


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with a log of known numbers: lifters of two seeds, three epochs each."""
    trained = dict(training=dict(batch_2=16, batch_3=32))
    monkeypatch.setattr(curves, "load_checkpoint", lambda run, name: trained)
    run = Run(tmp_path, Config(), Training(), torch.device("cpu"))
    for model in ("stage2", "regressor"):
        (tmp_path / f"{model}.pt").touch()
    for model, per_epoch in {"stage1": 7.0, "stage2": 11.0, "regressor": 5.0}.items():
        for epoch in (1, 2, 3):
            run.log(model=model, epoch=epoch, steps=4 * epoch, seconds=per_epoch * epoch,
                    val=dict(fine_px=12.0 / epoch))
    for name in ("sparse", "generated", "regressor", "sparse_clean"):
        for seed in (0, 1):
            for epoch in (1, 2, 3):
                errors = dict(mpjpe=90.0 / epoch + seed, unseen_mpjpe=99.0 / epoch + seed)
                run.log(model=f"stage3_{name}_{seed}", epoch=epoch, steps=epoch,
                        seconds=2.0 * epoch, val=errors)
    return run


def test_a_lifters_time_begins_with_all_that_it_is_given(run):
    validation, unseen, _ = curves.learning_curves(run).axes
    begin = {"sparse": 0, "generated": 3 * (7 + 11), "regressor": 3 * 5}
    for ax, first in ((validation, 90), (unseen, 99)):
        shown = [(INPUTS[name], seed) for name in begin for seed in (0, 1)]
        assert [line.get_label() for line in ax.lines] == [label for label, _ in shown]
        for line, (label, seed) in zip(ax.lines, shown, strict=True):
            start = next(start for name, start in begin.items() if INPUTS[name] == label)
            np.testing.assert_allclose(line.get_xdata(), start + np.array([2, 4, 6]))
            np.testing.assert_allclose(line.get_ydata(), first / np.array([1, 2, 3]) + seed, 1e-5)


def test_densifiers_are_shown_by_samples(run):
    ax = curves.learning_curves(run).axes[-1]
    assert [line.get_label() for line in ax.lines] == ["HiARM", "plain regressor"]
    for line, batch in zip(ax.lines, (16, 32), strict=True):
        np.testing.assert_allclose(line.get_xdata(), batch * np.array([4, 8, 12]))
        np.testing.assert_allclose(line.get_ydata(), [12, 6, 4])
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_one_legend_line_stands_for_all_seeds(run):
    (legend,) = curves.learning_curves(run).legends
    names = ("sparse", "generated", "regressor")
    assert [text.get_text() for text in legend.texts] == [INPUTS[name] for name in names]


def test_data_without_unseen_motion_have_no_such_panel(run):
    text = (run.path / "log.jsonl").read_text()
    (run.path / "log.jsonl").write_text(text.replace("unseen_mpjpe", "other"))
    assert len(curves.learning_curves(run).axes) == 2


def test_what_is_not_known_is_left_out(run):
    """Packed weights have no regressor, and a log that was begun anew has only later trainings."""
    (run.path / "regressor.pt").unlink()
    lines = (run.path / "log.jsonl").read_text().splitlines(keepends=True)
    (run.path / "log.jsonl").write_text("".join(lines[3:]))  # without stage 1
    validation, *_, densifiers = curves.learning_curves(run).axes
    assert [line.get_label() for line in densifiers.lines] == ["HiARM"]
    shown = {line.get_label() for line in validation.lines}
    assert shown == {INPUTS["sparse"], INPUTS["regressor"]}


@pytest.mark.parametrize("change", [
    lambda rows: [row | dict(val=3) for row in rows],
    lambda rows: [row | dict(steps="many") for row in rows],
    lambda rows: [row | dict(seconds=10**400) for row in rows],
    lambda rows: [3, *rows],
])  # fmt: skip
def test_a_log_that_is_damaged_is_said_in_one_sentence(run, capsys, change):
    path = Path(run.path, "log.jsonl")
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as e:
        curves.learning_curves(run)
    said = capsys.readouterr().err.strip()
    assert e.value.code == 2 and "log.jsonl is damaged" in said and "\n" not in said
