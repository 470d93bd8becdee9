"""checkpoints.py: files beside and renamed, the log, schedules, weight decay.

That a resumed training ends at the same bits is tested in test_train.py, on the real stages.
"""

import codecs
import json
import math
import os
import shutil
import types
import zipfile
from dataclasses import asdict, replace
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch
from conftest import RUN_SIZES
from hypothesis import given, settings
from hypothesis import strategies as st

import train
import training_loop
from baselines import Regressor
from checkpoints import Run, load_checkpoint, save_checkpoint
from hipart import MSST, Config, HiARM, HiPART
from survival import write
from training_loop import Loop, adamw, every_4_epochs, warmup_cosine


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


@given(epochs=st.integers(1, 40), per_epoch=st.integers(1, 9), longer=st.integers(1, 5))
def test_a_longer_training_has_the_papers_schedule_stretched(epochs, per_epoch, longer):
    f, steps = every_4_epochs(epochs), epochs * per_epoch
    paper = [0.96 ** (step // per_epoch // 4) for step in range(steps)]
    assert [f(step, steps) for step in range(steps)] == paper
    assert [f(longer * step, longer * steps) for step in range(steps)] == paper


# --------------------------------------------------------------------------------------------------
# Trainings that take a given time, by a clock of the tests


class FourSteps:
    """A split with four batches an epoch; each of them takes as many seconds as `paces` says for
    this epoch."""

    def __init__(self, *paces):
        self.n, self.now, self.paces = 8, 0.0, chain(paces[:-1], repeat(paces[-1]))

    def windows_in_an_epoch(self):
        return self.n

    def batches(self, *args, **options):
        pace = next(self.paces)
        for _ in range(4):
            self.now += pace
            yield torch.randn(2, 3)


def train_by_the_clock(folder, split, seconds, last=math.inf):
    """Train on from where it stopped, to the end or `last` epochs. -> after each epoch, how many
    there will be, the learning rate of each step, and the model."""
    (folder / "meta.json").write_text("{}")
    run = Run(folder, Config(), train.Training(), torch.device("cpu"), data=str(folder),
              resume=True)
    torch.manual_seed(0)
    model, numbers, rates = torch.nn.Linear(3, 1), [], []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(training_loop, "time", types.SimpleNamespace(monotonic=lambda: split.now))
        loop = Loop(run, "m", model, adamw(model, 1.0, 0.0), 0, 4, warmup_cosine(500), seconds)
        for epoch in loop.epochs():
            for x in loop.steps(split, 2, None):
                loss = model(x).mean()
                loop.update(loss, dict(loss=loss.detach()))
                rates.append(loop.optimizer.param_groups[0]["lr"])
            loop.finish_epoch({})
            numbers.append(loop.n_epochs)
            if epoch + 1 == last:
                break
    return numbers, rates, model.weight.tolist()


@settings(max_examples=8, deadline=None)
@given(pace=st.sampled_from((0.25, 1.0, 16.0)), quarters=st.integers(1, 40))
def test_a_training_takes_the_time_it_is_given(tmp_path_factory, pace, quarters):
    """To half an epoch, but at least one; and from the second epoch on its learning rate is as if
    the number of epochs had been known."""
    folder, epochs = tmp_path_factory.mktemp("run"), quarters / 4
    numbers, rates, _ = train_by_the_clock(folder, FourSteps(pace), 4 * pace * epochs)
    n = len(numbers)
    assert numbers == [n] * n and n == max(1, round(epochs))
    known = [warmup_cosine(500)(step, 4 * n) for step in range(4 * n)]
    assert rates[4:] == pytest.approx(known[4:])
    assert all(rate <= k for rate, k in zip(rates[:4], known[:4], strict=True))


def test_the_number_of_epochs_is_settled_in_the_first_tenth_of_the_time(tmp_path):
    numbers, _, _ = train_by_the_clock(tmp_path, FourSteps(1, 2, 9), 200)
    assert numbers == [50] + [33] * 32  # 4 s; 12 s; then 48 s, which no longer count


def test_a_training_of_a_given_time_goes_on_to_the_same_bits(tmp_path):
    """The number of epochs is that of the checkpoint, however fast the machine is by now."""
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = train_by_the_clock(tmp_path / "whole", FourSteps(1), 80)
    assert len(whole[0]) == 20
    begun = train_by_the_clock(tmp_path / "cut", FourSteps(1), 80, last=5)
    rest = train_by_the_clock(tmp_path / "cut", FourSteps(7), 80)
    assert (begun[0] + rest[0], begun[1] + rest[1], rest[2]) == whole


def test_resuming_forgets_log_lines_that_have_no_checkpoint(tmp_path):
    run = Run(tmp_path, Config(), None, torch.device("cpu"))
    for model, epoch in (("stage1", 1), ("stage1", 2), ("stage2", 1), ("stage2", 2)):
        run.log(model=model, epoch=epoch)
    run.forget("stage2", 1)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["model"], r["epoch"]) for r in rows] == [("stage1", 1), ("stage1", 2), ("stage2", 1)]


# --------------------------------------------------------------------------------------------------
# Checkpoints of any kind


def options(kind):
    return kind(**{k: v for k, v in RUN_SIZES.items() if k in vars(kind())})


@pytest.fixture
def run(tmp_path):
    (tmp_path / "meta.json").write_text("{}")
    return Run(tmp_path, Config(), train.Training(), torch.device("cpu"), data=str(tmp_path))


@pytest.fixture
def good(run):
    """What a checkpoint of stage 1 holds."""
    config = options(Config)
    return dict(model=MSST(config).state_dict(), optimizer={}, random={}, epochs=3, epoch=3, step=9,
                seconds=1.5, val=dict(fine_px=math.nan), config=asdict(config),
                training=asdict(options(train.Training)), run=run.identity())  # fmt: skip


def refused(capsys, f, *args):
    with pytest.raises(SystemExit) as e:
        f(*args)
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.count("\n") == 1 and said.strip().isprintable()
    assert len(said) < 1000
    return said


def test_as_many_samples_as_human36m_has_are_read_again(run, good):
    good["training"]["limit"] = 1_600_000
    save_checkpoint(run.path / "stage1.pt", **good)
    assert load_checkpoint(run, "stage1")["training"]["limit"] == 1_600_000


def test_a_good_checkpoint_is_read(run, good):
    save_checkpoint(run.path / "stage1.pt", **good)
    torch.manual_seed(0)
    expected = MSST(options(Config)).state_dict()
    torch.manual_seed(0)
    model = train.load_msst(run)
    state = torch.get_rng_state()
    assert all(torch.equal(v, good["model"][k]) for k, v in model.state_dict().items())
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    torch.manual_seed(0)  # to plan a model without memory draws no random numbers
    assert expected.keys() == MSST(options(Config)).state_dict().keys()
    assert torch.equal(state, torch.get_rng_state())


NEW_OPTIONS = dict(config=("shared_codebook", "generation"), training=("levels", "frames"))


def test_checkpoints_older_than_an_option_have_its_default(tiny_data, tiny_run, tmp_path):
    """They load, and a run goes on from them; with another value of the option it does not."""
    names = ("stage1", "stage2", "stage3_sparse_0")
    for name in names:
        saved = torch.load(tiny_run / f"runs/tiny/{name}.pt", weights_only=True)
        for part, new in NEW_OPTIONS.items():
            for option in new:
                del saved[part][option]
        torch.save(saved, tmp_path / f"{name}.pt")
    run = Run(tmp_path, Config(), train.Training(), torch.device("cpu"))
    saved = load_checkpoint(run, "stage1")
    config, training = Config(**saved["config"]), train.Training(**saved["training"])
    assert (config.generation, training.levels) == ("both", "dense+fine")
    run = replace(run, config=config, training=training, data=f"{tiny_data}/tiny", resume=True)
    weights = train.load_hipart(run).state_dict(), train.load_lifter(run, "sparse").state_dict()
    assert len(weights[0]) > 50 and len(weights[1]) > 5
    train.stage_1(run)  # finished already: to go on is to do nothing
    other = replace(run, config=replace(config, generation="sparse-to-dense"))
    with pytest.raises(SystemExit):
        train.stage_1(other)
    kept = torch.load(tmp_path / "stage1.pt", weights_only=True)
    assert not set(NEW_OPTIONS["config"]) & set(kept["config"])  # nothing was written


class Encoded:
    """As much memory as you like, out of a function that torch lets any pickle call."""

    def __reduce__(self):
        return codecs.encode, ("x" * 1000, "latin1")


@pytest.mark.parametrize("content", [
    "a string", 5, [1, 2], [[]] * 100, {}, {"model": {}}, torch.zeros(3), b"bytes", None, Encoded(),
    bytearray(10), {1, 2}, 1 << 61,
], ids=range(13))  # fmt: skip
def test_checkpoints_that_hold_anything_else(run, capsys, content):
    torch.save(content, run.path / "stage1.pt")
    said = refused(capsys, load_checkpoint, run, "stage1")
    assert "stage1.pt is not a " in said and "checkpoint" in said and "delete it and run" in said


def change(part, **to):
    return lambda good: good[part].update(to)


def tensor(name, f):
    return lambda good: good["model"].update({name: f(good["model"][name])})


CODES, NOT_THIS = "Q_s.codebook", "stage1.pt is not a checkpoint of this version of the project"


@pytest.mark.parametrize("damage, message", [
    *[(lambda good, key=key: good.pop(key), NOT_THIS)
      for key in ("model", "config", "training", "run", "epoch", "epochs", "step", "seconds")],
    *[(lambda good, key=key, to=to: good.update({key: to}), NOT_THIS)
      for key in ("model", "config", "training", "run", "epoch", "epochs", "step", "seconds")
      for to in ("text", [1], None, -1, torch.zeros(3))],
    (change("config", D="8"), NOT_THIS), (change("config", D=True), NOT_THIS),
    (change("config", D=torch.zeros(1).expand(1 << 40)), NOT_THIS),
    (change("config", width=torch.ones(2)), NOT_THIS), (change("config", dropout=5), NOT_THIS),
    (change("config", dropout=torch.ones(2)), NOT_THIS),
    (change("config", D=0), NOT_THIS), (change("config", more=1), NOT_THIS),
    (change("config", soft=1), NOT_THIS), (change("config", condition="none"), NOT_THIS),
    (change("config", beta=math.nan), NOT_THIS), (change("config", D=10**9), NOT_THIS),
    (change("config", encoder_blocks=10**6), NOT_THIS), (change("config", dropout=5.0), NOT_THIS),
    (change("training", lifter="spatial", lifter_width=17), NOT_THIS),
    (change("training", limit=[1]), NOT_THIS), (change("training", lifter="\x1b[31m"), NOT_THIS),
    (change("run", samples=3), NOT_THIS), (change("run", seed="0"), NOT_THIS),
    (change("run", data="\x1b[31m"), NOT_THIS), (change("run", data="x" * 10**6), NOT_THIS),
    (lambda good: good["run"].pop("samples"), NOT_THIS),
    (tensor(CODES, lambda t: "text"), NOT_THIS), (tensor(CODES, lambda t: t.to_sparse()), "stage1"),
    (tensor(CODES, lambda t: t.to("meta")), "stage1.pt"), (tensor(CODES, lambda t: t.T), NOT_THIS),
    (tensor(CODES, lambda t: torch.zeros(1).expand(1 << 40, 8)), NOT_THIS),
    (lambda good: good["model"].update({5: torch.zeros(1)}), NOT_THIS),
    (tensor(CODES, lambda t: t[1:].clone()), "has weights of other sizes than these options"),
    (tensor(CODES, lambda t: t.double()), "has weights of other sizes than these options"),
    (tensor(CODES, lambda t: t[None].clone()), "has weights of other sizes than these options"),
    (lambda good: good["model"].pop(CODES), "has weights of other sizes than these options"),
    (lambda good: good["model"].clear(), "has weights of other sizes than these options"),
    (tensor(CODES, lambda t: t * math.inf), "has weights that are infinite or NaN"),
    (change("config", D=10**6, K_s=10**6), "has weights of other sizes than these options"),
    (change("config", K_d=17), "has weights of other sizes than these options"),
], ids=range(84))  # fmt: skip
def test_checkpoints_with_anything_in_the_place_of_what_they_hold(run, good, capsys, damage,
                                                                  message):
    damage(good)
    torch.save(good, run.path / "stage1.pt")
    assert message in refused(capsys, train.load_msst, run)


def test_every_model_can_be_planned_without_memory():
    """As `build` does, before it believes the options of a checkpoint."""
    config = Config(D=10**6, K_s=10**6, K_d=10**6, width=10**6, heads=1, mlp_ratio=1000)
    lifters = [train.Training(lifter=kind, lifter_width=6 * 10**5) for kind in ("mlp", "spatial")]
    with torch.device("meta"):
        for model in (HiPART(config), Regressor(10**6),
                      *(train.new_lifter(t, "generated") for t in lifters)):
            assert sum(p.numel() for p in model.parameters()) > 10**10


def test_files_that_are_no_checkpoints(run, good, capsys):
    path = run.path / "stage1.pt"
    save_checkpoint(path, **good)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as z:
        members = {name: z.read(name) for name in z.namelist()}
    packed = run.path / "packed.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as z:
        for name, raw in members.items():
            z.writestr(name, raw)
    old = run.path / "old.pt"
    torch.save({"a": 1}, old, _use_new_zipfile_serialization=False)
    files = {"packed": packed.read_bytes(), "old": old.read_bytes(), "cut": whole[:-100],
             "empty": b"", "text": b"\x1b[31mred", "old and new": old.read_bytes() + whole}
    for raw in files.values():
        path.write_bytes(raw)
        said = refused(capsys, load_checkpoint, run, "stage1")
        assert "stage1.pt is not a readable checkpoint: " in said and "[31m" not in said
    for make in (lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path)):
        path.unlink()
        make()
        assert "stage1.pt is not a readable" in refused(capsys, load_checkpoint, run, "stage1")


# --------------------------------------------------------------------------------------------------
# What lies beside a checkpoint


@pytest.mark.parametrize("text", [
    b"\xff\xfe", b"{", b"[]\n", b"3\n", b'{"epoch": 1}\n', b'{"model": "stage1", "epoch": []}\n',
    b"[" * 10**5, b'{"model": "stage1", "epoch": 1e999}\n',
])  # fmt: skip
def test_a_damaged_log_is_said(run, capsys, text):
    (run.path / "log.jsonl").write_bytes(text)
    assert "log.jsonl is damaged" in refused(capsys, run.forget, "stage1", 1)


@pytest.mark.parametrize("text", ["", "[]", "3", "null", "[" * 10**5, "\x1b[31mred"])
def test_samples_have_no_name_without_a_good_meta_json(run, capsys, text):
    (run.path / "meta.json").write_text(text)
    said = refused(capsys, run.samples)
    assert "is not a data set that can be read: make it again" in said and "red\n" not in said


def test_a_split_that_is_cut_short_ends_the_run(tiny_data, tmp_path, capsys):
    folder = tmp_path / "tiny"
    shutil.copytree(tiny_data / "tiny", folder)
    split = Run(tmp_path, Config(), train.Training(), torch.device("cpu"), data=folder).split("val")
    assert len(next(split.spread(5).blocks())["y"]) == 5
    os.truncate(folder / "val/y.npy", 500)
    assert "y.npy cannot be read, it is truncated" in refused(capsys, list, split.blocks())
