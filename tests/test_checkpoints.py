"""checkpoints.py: files beside and renamed, the log, schedules, weight decay.

That a resumed training ends at the same bits is tested in test_train.py, on the real stages.
"""

import json
import math
from pathlib import Path

import pytest
import torch

from checkpoints import Run, adamw, save_checkpoint, warmup_cosine
from hipart import Config, HiARM
from survival import write


class Stop(Exception):
    """Pulls the plug."""


def test_checkpoints_are_written_beside_and_renamed(tmp_path, monkeypatch):
    """A crash while writing leaves the old checkpoint whole."""
    path, write_bytes = tmp_path / "stage1.pt", Path.write_bytes
    save_checkpoint(path, epoch=1)

    def half(self, content):
        write_bytes(self, content[: len(content) // 2])
        raise Stop

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(Stop):
        save_checkpoint(path, epoch=2)
    assert torch.load(path, weights_only=True) == dict(epoch=1)
    assert [p.name for p in tmp_path.iterdir()] == ["stage1.pt"]


def test_weight_decay_spares_biases_and_norms():
    model = HiARM(Config(width=16, heads=2, gcsab_blocks=1))
    optimizer = adamw(model, 1e-3, 0.5)
    decayed = {id(p) for g in optimizer.param_groups if g["weight_decay"] > 0 for p in g["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in decayed}
    assert {"P_c.weight", "head_s.weight", "GCSAB.0.qkv.weight"} <= names
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(model.parameters()))
    assert [n for n in names if n.endswith("bias") or "norm" in n] == []


def test_texts_are_written_beside_and_renamed(tmp_path, monkeypatch):
    path, write_bytes = tmp_path / "table.md", Path.write_bytes
    write(path, "old")

    def half(self, content):
        write_bytes(self, content[:2])
        raise Stop

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(Stop):
        write(path, "new")
    assert path.read_bytes() == b"old"


def test_warmup_cosine_values():
    f = warmup_cosine(10)
    assert [f(s, 110) for s in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert f(10, 110) == pytest.approx(1.0) and f(60, 110) == pytest.approx(0.5)
    assert f(35, 110) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    values = [f(s, 110) for s in range(110)]
    assert max(values) == pytest.approx(1.0) and 0 <= values[-1] < 1e-3
    assert values[:10] == sorted(values[:10]) and values[10:] == sorted(values[10:], reverse=True)
    assert warmup_cosine(500)(49, 500) == pytest.approx(
        1.0
    )  # a short run warms up over a tenth of its steps
    assert all(0 < warmup_cosine(500)(s, n) <= 1 for n in (1, 2, 9, 10) for s in range(n))


def test_resuming_forgets_log_lines_that_have_no_checkpoint(tmp_path):
    run = Run(tmp_path, Config(), None, torch.device("cpu"))
    for model, epoch in (("stage1", 1), ("stage1", 2), ("stage2", 1), ("stage2", 2)):
        run.log(model=model, epoch=epoch)
    run.forget("stage2", 1)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["model"], r["epoch"]) for r in rows] == [("stage1", 1), ("stage1", 2), ("stage2", 1)]
