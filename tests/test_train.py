"""train.py: resume to the same bits, presets, the log, the lifters' inputs, refusals in one
sentence.

Everything runs the real command line: in this process where the test looks inside, as a subprocess
where the exit status or the whole chain is the point. The data are the tiny set of conftest.py; the
sizes below train in seconds.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import checkpoints
import train
import training_loop
from baselines import Regressor
from hipart import MSST, Config, HiPART, detected_pelvis
from sources import dataset

HERE = Path(train.__file__).parent
TINY = dict(
    D=8, K_s=16, K_d=24, encoder_blocks=1, encoder_width=12, decoder_width=12, token_hidden=8,
    width=16, heads=2, mlp_ratio=2, gcsab_blocks=2, ph_blocks=1, dropout=0.1,
    lifter="spatial", lifter_width=12, lifter_blocks=2, warmup_free=6, epochs_1=3, batch_1=16,
    epochs_2=3, batch_2=16, epochs_3=2, batch_3=32, weight_decay_3=0.05, epochs_equal=2,
    regressor_width=32,
)  # fmt: skip
CONFIG = {k: v for k, v in TINY.items() if k in vars(Config())}
TRAINING = {k: v for k, v in TINY.items() if k in vars(train.Training())}
INPUTS = ("sparse", "generated", "regressor", "ground_truth_clean")  # the chain below has all seven
BAR = re.compile(r"^.*\d+/\d+ \[[^\]]*\]")  # a progress bar, which may stand before the message
FLAGS = {a.dest: a.option_strings[0] for a in train.arguments()._actions}


def flags(**values):
    """Command-line options of the fields of Config and Training; a switch stands alone."""
    return [
        part
        for k, v in values.items()
        for part in ((FLAGS[k],) if v is True else (FLAGS[k], str(v)))
    ]


def main(monkeypatch, folder, *args, script=lambda *command: None, **options):
    """`python train.py --preset paper --name tiny ARGS` with the tiny sizes, in this process, with
    `folder` as the current one; `script` stands in for the tables and figures at its end."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    precision = torch.get_float32_matmul_precision()
    argv = [
        "train.py",
        "--preset",
        "paper",
        "--name",
        "tiny",
        "--device",
        "cpu",
        *map(str, args),
        *flags(**TINY | options),
    ]
    with monkeypatch.context() as m:
        m.setattr(train, "script", script)
        m.chdir(folder)
        m.setattr(sys, "argv", argv)
        try:
            train.main()
        finally:
            torch.set_float32_matmul_precision(precision)


def refused(monkeypatch, capsys, folder, *args, **config):
    """The command must end in SystemExit. -> (exit status as a shell would see it, its message)."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        main(monkeypatch, folder, *args, **config)
    code = exit_info.value.code
    status, said = (code, "") if isinstance(code, int) else (1, str(code))
    lines = [
        BAR.sub("", line).strip()
        for line in re.split(r"[\r\n]", said + "\n" + capsys.readouterr().err)
    ]
    return status, "\n".join(filter(None, lines))


def checkpoint(folder, name):
    return torch.load(Path(folder) / "runs" / "tiny" / f"{name}.pt", weights_only=True)


def log(folder, model=None):
    def strict(constant):
        raise AssertionError(f"log.jsonl holds {constant}, which is not JSON")

    rows = [
        json.loads(line, parse_constant=strict)
        for line in open(Path(folder) / "runs" / "tiny" / "log.jsonl")
    ]
    return [r for r in rows if model is None or r["model"] == model]


def assert_same(a, b, where=""):
    """Bitwise equality of nested containers."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for k in a:
            assert_same(a[k], b[k], f"{where}.{k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def data(tiny_data):
    return f"{tiny_data}/tiny"


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """All three stages in one uninterrupted process; the detections it drew are kept beside. ->
    folder, detections."""
    folder, drawn, detect = tmp_path_factory.mktemp("trained"), [], dataset.detect
    with pytest.MonkeyPatch.context() as m:

        def spy(*args):
            out = detect(*args)
            drawn.append(out[0].copy())
            return out

        m.setattr(dataset, "detect", spy)
        m.setattr(train, "INPUTS", {name: train.INPUTS[name] for name in INPUTS})
        for stage in (1, 2, 3):
            drawn.append(f"stage {stage}")
            main(m, folder, "--data", data, "--stage", stage)
    return folder, drawn


@pytest.fixture(scope="module")
def run(trained):
    return trained[0]


# --------------------------------------------------------------------------------------------------
# Resume


class Stop(Exception):
    """Pulls the plug."""


def pull_plug_after(m, prefix, epoch):
    save = training_loop.save_checkpoint

    def saving(path, **content):
        save(path, **content)
        if path.stem.startswith(prefix) and content["epoch"] == epoch:
            raise Stop

    m.setattr(training_loop, "save_checkpoint", saving)


def begin(run, folder, *names):
    """A fresh folder that holds the checkpoints of the stages before."""
    (folder / "runs" / "tiny").mkdir(parents=True)
    for name in names:
        shutil.copy(run / "runs" / "tiny" / f"{name}.pt", folder / "runs" / "tiny")


def assert_same_run(a, b, name):
    one, other = checkpoint(a, name), checkpoint(b, name)
    for saved in (one, other):
        assert saved.pop("seconds") > 0
    assert_same(one, other, name)
    rows = [[r | {"seconds": 0} for r in log(folder, name)] for folder in (a, b)]
    assert rows[0] == rows[1]


@pytest.mark.parametrize("epoch", [1, 2])
def test_resumed_stage_1_is_bit_for_bit_the_uninterrupted_one(
    run, data, tmp_path, monkeypatch, epoch
):
    """Before the codebooks are set (6 steps are one epoch and a half) and after."""
    with monkeypatch.context() as m:
        pull_plug_after(m, "stage1", epoch)
        with pytest.raises(Stop):
            main(m, tmp_path, "--data", data, "--stage", 1)
    saved = checkpoint(tmp_path, "stage1")
    assert saved["epoch"] == epoch and bool(saved["model"]["Q_s.active"]) == (epoch == 2)
    torch.manual_seed(12345)  # whatever a new process starts with
    main(monkeypatch, tmp_path, "--data", data, "--stage", 1, "--resume")
    assert_same_run(run, tmp_path, "stage1")


def test_a_crash_in_the_middle_of_an_epoch_costs_that_epoch_only(run, data, tmp_path, monkeypatch):
    loss, calls = MSST.loss, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 11:  # 4 training steps and one validation block an epoch: inside epoch 3
            raise Stop
        return loss(*args)

    with monkeypatch.context() as m:
        m.setattr(MSST, "loss", failing)
        with pytest.raises(Stop):
            main(m, tmp_path, "--data", data, "--stage", 1)
    assert checkpoint(tmp_path, "stage1")["epoch"] == 2
    main(monkeypatch, tmp_path, "--data", data, "--stage", 1, "--resume")
    assert_same_run(run, tmp_path, "stage1")


def test_resumed_stage_2_is_bit_for_bit_the_uninterrupted_one(run, data, tmp_path, monkeypatch):
    begin(run, tmp_path, "stage1")
    with monkeypatch.context() as m:
        pull_plug_after(m, "stage2", 2)
        with pytest.raises(Stop):
            main(m, tmp_path, "--data", data, "--stage", 2)
    torch.manual_seed(12345)
    main(monkeypatch, tmp_path, "--data", data, "--stage", 2, "--resume")
    assert_same_run(run, tmp_path, "stage2")


def test_resumed_training_in_one_pass(run, data, tmp_path, monkeypatch):
    """The switches of ours: the last epoch of stage 2 differs from the others, and a resumed run
    has to know."""
    ours = dict(condition="every", soft=True, history_dropout=0.5, epochs_soft=1)
    for name in ("whole", "cut"):
        begin(run, tmp_path / name, "stage1")
    main(monkeypatch, tmp_path / "whole", "--data", data, "--stage", 2, *flags(**ours))
    with monkeypatch.context() as m:
        pull_plug_after(m, "stage2", 2)
        with pytest.raises(Stop):
            main(m, tmp_path / "cut", "--data", data, "--stage", 2, *flags(**ours))
    main(monkeypatch, tmp_path / "cut", "--data", data, "--stage", 2, "--resume", *flags(**ours))
    assert_same_run(tmp_path / "whole", tmp_path / "cut", "stage2")
    rows = log(tmp_path / "whole", "stage2")
    assert (
        rows[-1]["train"]["loss"] > rows[-2]["train"]["loss"] + 1
    )  # the pose error has joined the loss


def test_resumed_lifter_is_bit_for_bit_the_uninterrupted_one(run, data, tmp_path, monkeypatch):
    begin(run, tmp_path, "stage1", "stage2", "regressor")
    monkeypatch.setattr(train, "INPUTS", {"generated": "the only one"})
    with monkeypatch.context() as m:
        pull_plug_after(m, "stage3", 1)
        with pytest.raises(Stop):
            main(m, tmp_path, "--data", data, "--stage", 3, "--resume")
    torch.manual_seed(12345)
    main(monkeypatch, tmp_path, "--data", data, "--stage", 3, "--resume")
    assert_same_run(run, tmp_path, "stage3_generated_0")


def test_resuming_a_finished_stage_changes_nothing(run, data, tmp_path, monkeypatch):
    begin(run, tmp_path, "stage1")
    before = (tmp_path / "runs/tiny/stage1.pt").read_bytes()
    main(monkeypatch, tmp_path, "--data", data, "--stage", 1, "--resume")
    assert (tmp_path / "runs/tiny/stage1.pt").read_bytes() == before


def test_another_seed_is_another_run(run, data, tmp_path, monkeypatch):
    main(monkeypatch, tmp_path, "--data", data, "--stage", 1, "--seed", 1)
    assert not torch.equal(
        checkpoint(tmp_path, "stage1")["model"]["E_f.embed.weight"],
        checkpoint(run, "stage1")["model"]["E_f.embed.weight"],
    )


# --------------------------------------------------------------------------------------------------
# Checkpoints and what stands in them


def test_checkpoints_are_safe_to_load_and_complete(run):
    config, training = vars(Config(**CONFIG)), vars(train.Training(**TRAINING))
    epochs = dict(stage1=3, stage2=3, regressor=2) | {f"stage3_{name}_0": 2 for name in INPUTS}
    for name, n in epochs.items():
        saved = checkpoint(run, name)  # weights_only=True
        assert saved.keys() >= {"model", "optimizer", "ranks", "config", "epoch", "step"}, name
        assert saved["config"] == config and saved["training"] == training, name
        assert saved["epoch"] == n, name
        decay = max(group["weight_decay"] for group in saved["optimizer"]["param_groups"])
        assert decay == {"stage1": 0.15, "stage2": 0.03, "regressor": 0.01}.get(name, 0.05), name
        assert all(
            torch.isfinite(t).all() for t in saved["model"].values() if t.is_floating_point()
        ), name
    assert not [p.name for p in (run / "runs" / "tiny").iterdir() if ".tmp" in p.name]


def test_stage_2_left_the_tokenizer_alone(run):
    one, two = checkpoint(run, "stage1")["model"], checkpoint(run, "stage2")["model"]
    assert torch.equal(one["Q_s.codebook"], two["C_s"]) and torch.equal(
        one["Q_d.codebook"], two["C_d"]
    )
    assert not [k for k in two if k.startswith("msst") or k.startswith("E_f")]


# --------------------------------------------------------------------------------------------------
# Schedules and presets


def test_the_learning_rate_of_the_lifter_is_the_papers(run, data, tmp_path, monkeypatch):
    """Adam, 1e-3 times 0.96 every 4 epochs."""
    begin(run, tmp_path, "stage1", "stage2")
    monkeypatch.setattr(train, "INPUTS", {"sparse": "the only one"})
    main(monkeypatch, tmp_path, "--data", data, "--stage", 3, epochs_3=5, epochs_equal=1)
    lr = [r["lr"] for r in log(tmp_path, "stage3_sparse_0")]
    assert lr == pytest.approx([1e-3] * 4 + [0.96e-3], rel=1e-5)


def test_the_learning_rate_of_stages_1_and_2_falls_to_zero(run):
    for stage in ("stage1", "stage2"):
        rows = log(run, stage)
        assert rows[-1]["lr"] < 0.1 * rows[0]["lr"]
        assert [r["steps"] for r in rows] == [4, 8, 12]


def test_training_is_the_papers():
    """Appendix C; docs/decisions.md lists what is ours."""
    paper = dict(
        limit=0,
        epochs_1=20,
        batch_1=128,
        lr_1=1e-3,
        weight_decay_1=0.15,
        warmup_1=500,
        epochs_2=50,
        batch_2=64,
        lr_2=5e-4,
        weight_decay_2=0.03,
        epochs_soft=0,
        lifter="spatial",
        lifter_width=96,
        lifter_blocks=12,
        epochs_3=25,
        batch_3=256,
        lr_3=1e-3,
        weight_decay_3=0.0,
        cosine_3=False,
        turn_3=0.0,
        passes_3=1,
    )
    training = vars(train.Training())
    assert {k: training[k] for k in paper} == paper
    with pytest.raises(dataclasses.FrozenInstanceError):
        train.Training().lr_1 = 1.0
    assert not set(training) & set(vars(Config()))  # or an option would mean two things


def test_presets_are_pairs_of_overrides():
    assert train.PRESETS.keys() == {"quick", "standard", "long", "paper"}
    for config, training in train.PRESETS.values():
        model, _ = Config(**config), train.Training(**training)
        structure = ("decoder_blocks", "lsab_blocks", "cosine_local")
        assert all(getattr(model, k) == getattr(Config(), k) for k in structure)
    assert train.PRESETS["paper"] == ({}, dict(epochs_1=40))  # all else is the paper's


def test_the_commands_of_the_docstring_parse():
    commands = re.findall(r"python train\.py(.*)", train.__doc__)
    assert len(commands) >= 3
    for command in commands:
        train.arguments().parse_args(shlex.split(command.split("#")[0]))


def test_every_field_of_config_and_training_is_a_typed_option():
    args = train.arguments().parse_args(flags(**TINY))
    for k, v in TINY.items():
        assert getattr(args, k) == v and type(getattr(args, k)) is type(v)
    assert vars(Config()).keys() | vars(train.Training()).keys() <= FLAGS.keys()
    off = next(
        o
        for a in train.arguments()._actions
        for o in a.option_strings
        if re.fullmatch("--no-cosine.local", o)
    )
    assert train.arguments().parse_args([off]).cosine_local is False
    with pytest.raises(SystemExit) as e:
        train.arguments().parse_args(flags(epochs_1="many"))
    assert e.value.code == 2


def raw(data, name, key):
    return np.load(Path(data) / name / f"{key}.npy", allow_pickle=False)


def normalised(px, size=(1000, 1000)):
    return px / size[0] * 2 - np.array([1, size[1] / size[0]])


def row_of(data, y):
    """Which stored training sample each y [n, 17, 3] is."""
    keys = {row.tobytes(): i for i, row in enumerate(raw(data, "train", "y"))}
    assert len(keys) == 64
    return [keys[row.tobytes()] for row in y.numpy()]


def test_noise_is_drawn_afresh_every_epoch_and_stage(trained):
    """No two epochs of a stage see the same detections, and those of stage 3 are not those of stage
    2. All lifters of a seed see the same ones."""
    stages, current = {}, None
    for entry in trained[1]:
        if isinstance(entry, str):
            current = stages.setdefault(entry, [])
        else:
            current.append(entry.tobytes())
    assert all(len(calls) >= 3 for calls in stages.values())
    for stage in ("stage 1", "stage 2"):
        assert len(set(stages[stage])) == len(stages[stage])
    assert not set(stages["stage 2"]) & set(stages["stage 3"])
    assert not set(stages["stage 1"]) & set(stages["stage 2"])
    # Two epochs of the regressor, and of three lifters, which begin with a look at the data.
    assert len(stages["stage 3"]) == 2 + 3 * 3 and len(set(stages["stage 3"])) == 2 + 3


# --------------------------------------------------------------------------------------------------
# The log, and whether its numbers are true


def test_log_holds_everything_for_every_epoch(run):
    epochs = dict(stage1=3, stage2=3, regressor=2) | {f"stage3_{name}_0": 2 for name in INPUTS}
    wanted = dict(
        stage1={
            "fine_px",
            "dense_px",
            "perplexity_s",
            "perplexity_d",
            "dead_s",
            "dead_d",
            "L_local",
            "L_global",
            "action_accuracy",
        },
        stage2={"acc_s", "acc_d", "fine_px"},
        regressor={"fine_px"},
    )
    assert {r["model"] for r in log(run)} == epochs.keys()
    for name, n in epochs.items():
        rows = log(run, name)
        assert [r["epoch"] for r in rows] == list(range(1, n + 1)), name
        for r in rows:
            assert r["val"].keys() >= wanted.get(name, {"mpjpe", "unseen_mpjpe"}), name
            assert r["train"] and all(
                math.isfinite(v) for v in (*r["val"].values(), *r["train"].values())
            ), name
            assert all(
                0 <= v <= 1
                for k, v in r["val"].items()
                if k.startswith(("dead", "acc", "action_acc"))
            )


def model_of(run, with_hiarm=True):
    model = HiPART(Config(**CONFIG)).eval()
    model.msst.load_state_dict(checkpoint(run, "stage1")["model"])
    if with_hiarm:
        model.hiarm.load_state_dict(checkpoint(run, "stage2")["model"])
    return model


def val_poses(data, split="val"):
    """Stored draw of the validation split in normalised coordinates, read without train.py."""
    conf = torch.from_numpy(raw(data, split, "conf"))
    px = {
        k: torch.from_numpy(normalised(raw(data, split, k))).float()
        for k in ("x_s_det", "x_d", "x_f")
    }
    return px["x_s_det"] * (conf > 0)[..., None], conf, px["x_d"], px["x_f"]


def perplexity(q, K):
    p = np.bincount(q.flatten().numpy(), minlength=K) / q.numel()
    return math.exp(-sum(v * math.log(v) for v in p if v > 0)), float((p == 0).mean())


@torch.no_grad()
def test_logged_numbers_of_stage_1_are_true(run, data):
    model, (x_s, conf, x_d, x_f), said = (
        model_of(run, False).msst,
        val_poses(data),
        log(run, "stage1")[-1]["val"],
    )
    pelvis = detected_pelvis(x_s, conf)
    q_s, q_d = model.encode((x_f - pelvis) / 0.125)
    for name, got, target in zip(
        ("dense_px", "fine_px"), model.decode(q_s, q_d), (x_d, x_f), strict=True
    ):
        assert said[name] == pytest.approx(
            float((got * 0.125 + pelvis - target).norm(dim=-1).mean()) * 500, rel=1e-3
        )
    for name, q, K in (("s", q_s, TINY["K_s"]), ("d", q_d, TINY["K_d"])):
        expected, dead = perplexity(q, K)
        assert said[f"perplexity_{name}"] == pytest.approx(expected, rel=1e-3)
        assert said[f"dead_{name}"] == pytest.approx(dead, abs=1e-6)
    o, action = model((x_f - pelvis) / 0.125), torch.from_numpy(raw(data, "val", "action"))
    assert said["action_accuracy"] == pytest.approx(
        float((o["p_A"].argmax(-1) == action).float().mean()), abs=1e-6
    )
    chosen = o["p_A"].log_softmax(-1)[torch.arange(32), action]
    assert said["L_global"] == pytest.approx(-float(chosen.mean()), rel=1e-3)


@torch.no_grad()
def test_logged_numbers_of_stage_2_are_true(run, data):
    model, (x_s, conf, _, x_f), said = model_of(run), val_poses(data), log(run, "stage2")[-1]["val"]
    _, got_f = model.densify(x_s, conf)
    assert said["fine_px"] == pytest.approx(
        float((got_f - x_f).norm(dim=-1).mean()) * 500, rel=1e-3
    )
    pelvis = detected_pelvis(x_s, conf)
    q_s, q_d = model.msst.encode((x_f - pelvis) / 0.125)
    logits_s, logits_d = model.hiarm((x_s - pelvis) / 0.125, q_s, q_d, conf)
    assert said["acc_s"] == pytest.approx(
        float((logits_s.argmax(-1) == q_s).float().mean()), abs=2e-3
    )
    assert said["acc_d"] == pytest.approx(
        float((logits_d.argmax(-1) == q_d).float().mean()), abs=2e-3
    )


@torch.no_grad()
@pytest.mark.parametrize("split, key", [("val", "mpjpe"), ("unseen", "unseen_mpjpe")])
@pytest.mark.parametrize("name", INPUTS)
def test_logged_mpjpe_of_every_input_is_true(run, data, name, split, key):
    """The input of each lifter, built here by hand from a stored split."""
    x_s, conf, x_d, x_f = val_poses(data, split)
    if name.endswith("_clean"):
        x_s, conf = (
            torch.from_numpy(normalised(raw(data, split, "x_s"))).float(),
            torch.ones(32, 17),
        )
    if name == "ground_truth_clean":
        x = torch.cat([x_s, x_d, x_f], 1)
    elif name == "generated":
        x = torch.cat([x_s, *model_of(run).densify(x_s, conf)], 1)
    elif name == "regressor":
        regressor = Regressor(TINY["regressor_width"]).eval()
        regressor.load_state_dict(checkpoint(run, "regressor")["model"])
        x = torch.cat([x_s, *regressor.densify(x_s, conf)], 1)
    else:
        assert name == "sparse"
        x = x_s
    lifter = train.new_lifter(train.Training(**TRAINING), name).eval()
    lifter.load_state_dict(checkpoint(run, f"stage3_{name}_0")["model"])
    error = (lifter(x, conf) - torch.from_numpy(raw(data, split, "y"))).norm(dim=-1).mean()
    assert log(run, f"stage3_{name}_0")[-1]["val"][key] == pytest.approx(float(error), rel=1e-3)


def test_validation_does_not_depend_on_how_it_is_cut_into_blocks(data, tmp_path, monkeypatch):
    """32 validation samples at once, or as 12 + 12 + 8: every mean is over samples, not over
    blocks."""
    monkeypatch.setattr(train, "INPUTS", {"sparse": "a", "generated": "b"})
    blocks = dataset.Split.blocks
    for block in (8192, 12):
        monkeypatch.setattr(
            dataset.Split,
            "blocks",
            lambda self, rng=None, clean=False, size=0, n=block: blocks(self, rng, clean, n),
        )
        for stage in (1, 2, 3):
            main(
                monkeypatch,
                tmp_path / str(block),
                "--data",
                data,
                "--limit",
                12,
                "--stage",
                stage,
                warmup_free=1,
                epochs_1=2,
                epochs_2=1,
                epochs_equal=1,
                epochs_3=1,
                lifter="mlp",
            )
    whole, cut = log(tmp_path / "8192"), log(tmp_path / "12")
    assert [r["model"] for r in whole] == [r["model"] for r in cut]
    for a, b in zip(whole, cut, strict=True):
        assert a["val"] == pytest.approx(b["val"], rel=1e-3), a["model"]


@torch.no_grad()
def test_every_lifter_trains_on_matching_points_and_poses(run, data, tmp_path, monkeypatch):
    """Batch by batch: the detection is that of the very sample whose y is the target, and the rest
    comes from it."""
    seen, batches = [], dataset.Split.batches

    def spy(self, *args, **kwargs):
        for batch in batches(self, *args, **kwargs):
            seen.append(batch)
            yield batch

    monkeypatch.setattr(dataset.Split, "batches", spy)
    clean = torch.from_numpy(normalised(raw(data, "train", "x_s"))).float()
    fine = torch.from_numpy(normalised(raw(data, "train", "x_f"))).float()
    for name in ("sparse", "generated", "regressor", "ground_truth"):
        begin(run, tmp_path / name, "stage1", "stage2")
        monkeypatch.setattr(train, "INPUTS", {name: "the only one"})
        seen.clear()
        with torch.enable_grad():
            main(monkeypatch, tmp_path / name, "--data", data, "--stage", 3, lifter="mlp")
        x, conf, rows = (torch.cat([b[k] for b in seen if "x" in b]) for k in ("x", "conf", "y"))
        rows = torch.tensor(row_of(data, rows))
        assert x.shape[1] == (17 if name == "sparse" else 161) and len(x) == 2 * 64  # two epochs
        distance = ((x[:, None, :17] - clean).norm(dim=-1) * (conf > 0)[:, None]).sum(
            -1
        )  # to every sample of the set
        assert float((distance.argmin(1) == rows).float().mean()) > 0.9, name
        if name == "generated":
            made = model_of(run).densify(x[:, :17], conf)
            torch.testing.assert_close(x[:, 17:], torch.cat(made, 1), rtol=1e-3, atol=1e-3)
        if name == "ground_truth":
            torch.testing.assert_close(x[:, 65:], fine[rows])


@given(seed=st.integers(0, 2**32 - 1), angle=st.floats(-math.pi, math.pi))
def test_turned_is_what_a_camera_that_turns_about_its_ray_to_the_pelvis_sees(seed, angle):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(3, 40, 3)) * 400 + [
        *rng.uniform(-600, 600, 2),
        5000,
    ]  # camera frame, mm
    y = points[:, :17] - points[:, :1]
    seen = torch.tensor(points[..., :2] / points[..., 2:] * train.FOCAL)
    x, turned = train.turn_camera(
        seen, torch.tensor(y), torch.ones(3, 17), torch.full((3,), angle, dtype=torch.float64)
    )
    axis = points[:, 0] / np.linalg.norm(
        points[:, 0], axis=-1, keepdims=True
    )  # Rodrigues' formula, about the ray
    a, c = axis[:, None], np.cos(angle)
    expected = (
        points * c
        + np.cross(a, points) * np.sin(angle)
        + a * np.sum(a * points, -1, keepdims=True) * (1 - c)
    )
    np.testing.assert_allclose(turned, expected[:, :17] - points[:, :1], atol=1e-8)
    np.testing.assert_allclose(x, expected[..., :2] / expected[..., 2:] * train.FOCAL, atol=1e-10)
    np.testing.assert_allclose(x[:, 0], seen[:, 0], atol=1e-12)  # the pelvis stays where it is


@pytest.mark.parametrize("name, passes", [("ground_truth", 1), ("generated", 2)])
def test_half_of_the_training_poses_are_turned(run, data, tmp_path, monkeypatch, name, passes):
    angles, turn = [], train.turn_camera

    def spy(x, y, conf, angle):
        angles.append(angle)
        return turn(x, y, conf, angle)

    monkeypatch.setattr(train, "turn_camera", spy)
    monkeypatch.setattr(train, "INPUTS", {name: "the only one"})
    begin(run, tmp_path, "stage1", "stage2")
    main(monkeypatch, tmp_path, "--data", data, "--stage", 3, epochs_equal=1, epochs_3=4 // passes,
         passes_3=passes, lifter="mlp", turn_3=0.5)
    angle = torch.cat(angles)
    # Training only: every pose in every pass of every epoch, and each pass with other angles.
    n = len(raw(data, "train", "y"))
    assert len(angle) == 4 * n and not torch.equal(angle[:n], angle[n : 2 * n])
    assert (
        0.35 < float((angle == 0).float().mean()) < 0.65
        and 0.3 < float(angle[angle != 0].std()) < 0.7
    )


def test_training_helps(run):
    """Not accuracy, only that the loop descends: reconstruction and lifting end below their first
    epoch."""
    assert log(run, "regressor")[-1]["val"]["fine_px"] < log(run, "regressor")[0]["val"]["fine_px"]
    for name in ("sparse", "ground_truth_clean"):
        rows = log(run, f"stage3_{name}_0")
        assert rows[-1]["train"]["mpjpe"] < rows[0]["train"]["mpjpe"]


# --------------------------------------------------------------------------------------------------
# Refusals


def one_sentence(message):
    assert message and "Traceback" not in message and "\n" not in message, message
    return message


def test_a_missing_earlier_stage_is_said_with_the_command(run, data, tmp_path, monkeypatch, capsys):
    _, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 2)
    assert re.search(
        r"stage1\.pt.*`python train\.py --name tiny --stage 1`.*options", one_sentence(said)
    )
    begin(run, tmp_path / "later", "stage1")
    _, said = refused(monkeypatch, capsys, tmp_path / "later", "--data", data, "--stage", 3)
    assert re.search(r"stage2\.pt.*`python train\.py .*--stage 2.*`", one_sentence(said))


def test_an_unfinished_stage_is_not_built_upon(data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as m:
        pull_plug_after(m, "stage1", 2)
        with pytest.raises(Stop):
            main(m, tmp_path, "--data", data, "--stage", 1)
    _, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 2)
    assert re.search(r"stage1\.pt.*2 of 3.*--resume", one_sentence(said))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_missing_data_set_is_said_with_the_command(tmp_path, monkeypatch, capsys, stage):
    _, said = refused(
        monkeypatch, capsys, tmp_path, "--data", tmp_path / "nowhere", "--stage", stage
    )
    assert "nowhere" in one_sentence(said) and "prepare_data.py" in said


def test_a_finished_run_is_not_overwritten(run, data, tmp_path, monkeypatch, capsys):
    begin(run, tmp_path, "stage1")
    _, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 1)
    assert "--resume" in one_sentence(said)


@pytest.mark.parametrize(
    "change", [dict(lr_1=0.5), dict(epochs_1=4), dict(K_s=8), dict(beta=1.0)], ids=str
)
def test_resume_with_another_config_is_refused(run, data, tmp_path, monkeypatch, capsys, change):
    begin(run, tmp_path, "stage1")
    _, said = refused(
        monkeypatch, capsys, tmp_path, "--data", data, "--stage", 1, "--resume", **change
    )
    assert re.search("stage1.pt.*(config|options)", one_sentence(said))


def test_levels_that_cannot_be_generated_are_refused(tmp_path, monkeypatch, capsys):
    for levels in ("192", "dense+fine+192"):
        _, said = refused(monkeypatch, capsys, tmp_path, lifter="mlp", levels=levels)
        assert f"levels {levels} are for true points alone" in one_sentence(said)


@pytest.mark.parametrize("change", [["--seed", "1"], ["--limit", "48"]], ids=["seed", "limit"])
def test_resume_with_another_seed_or_data_is_refused(data, tmp_path, monkeypatch, capsys, change):
    """It would go on, and end at weights that no uninterrupted run gives."""
    with monkeypatch.context() as m:
        pull_plug_after(m, "stage1", 1)
        with pytest.raises(Stop):
            main(m, tmp_path, "--data", data, "--stage", 1)
    _, said = refused(
        monkeypatch, capsys, tmp_path, "--data", data, "--stage", 1, "--resume", *change
    )
    assert "stage1.pt" in one_sentence(said)


def test_stage_2_on_a_tokenizer_of_other_sizes_is_refused(run, data, tmp_path, monkeypatch, capsys):
    begin(run, tmp_path, "stage1")
    _, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 2, D=16)
    assert "stage1.pt" in one_sentence(said)


@pytest.mark.parametrize("damage", ["half", "empty", "text", "foreign"])
@pytest.mark.parametrize(
    "args", [["--stage", "2"], ["--stage", "1", "--resume"]], ids=["read", "resume"]
)
def test_a_damaged_checkpoint_is_refused(run, data, tmp_path, monkeypatch, capsys, damage, args):
    begin(run, tmp_path, "stage1")
    path = tmp_path / "runs" / "tiny" / "stage1.pt"
    whole = path.read_bytes()
    if damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes(
            {"half": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint"}[damage]
        )
    _, said = refused(monkeypatch, capsys, tmp_path, "--data", data, *args)
    assert "stage1.pt" in one_sentence(said)


def test_an_optimizer_of_nonsense_is_refused_without_pytorchs_warnings(
    run, data, tmp_path, monkeypatch, capsys
):
    begin(run, tmp_path, "stage1")
    saved = checkpoint(tmp_path, "stage1")
    saved["optimizer"]["param_groups"] = [torch.full((16, 8), math.nan)]
    torch.save(saved, tmp_path / "runs" / "tiny" / "stage1.pt")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 1, "--resume")
    # Files of data sets that earlier tests opened may be collected just now: Python says so.
    assert not [w.message for w in warned if w.category is not ResourceWarning]
    assert "can go on from" in one_sentence(said)


def test_a_checkpoint_that_would_run_code_is_refused(run, data, tmp_path, monkeypatch, capsys):
    begin(run, tmp_path, "stage1")
    torch.save(
        dict(checkpoint(run, "stage1"), config=Path("x")), tmp_path / "runs" / "tiny" / "stage1.pt"
    )
    _, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 2)
    assert "stage1.pt" in one_sentence(said)


def spoil_version(folder):
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(meta | {"format_version": 99}))


def spoil_values(folder):
    y = np.load(folder / "train" / "y.npy")
    y[3, 4] = np.nan
    np.save(folder / "train" / "y.npy", y)


def spoil_length(folder):
    path = folder / "train" / "x_f.npy"
    path.write_bytes(path.read_bytes()[:-100])


def spoil_presence(folder):
    (folder / "val" / "conf.npy").unlink()


@pytest.mark.parametrize("spoil", [spoil_version, spoil_values, spoil_length, spoil_presence])
def test_bad_data_are_said_in_one_sentence(data, tmp_path, monkeypatch, capsys, spoil):
    shutil.copytree(data, tmp_path / "bad")
    spoil(tmp_path / "bad")
    _, said = refused(monkeypatch, capsys, tmp_path, "--data", tmp_path / "bad", "--stage", 1)
    assert "bad" in one_sentence(said)


@pytest.mark.parametrize(
    "case", ["no stage", "no data", "bad data", "finished", "config", "damaged"]
)
def test_every_refusal_exits_with_2(run, data, tmp_path, monkeypatch, capsys, case):
    if case in ("finished", "config", "damaged"):
        begin(run, tmp_path, "stage1")
    if case == "damaged":
        (tmp_path / "runs" / "tiny" / "stage1.pt").write_bytes(b"")
    if case == "bad data":
        shutil.copytree(data, tmp_path / "bad")
        spoil_version(tmp_path / "bad")
    folder = {"no data": tmp_path / "nowhere", "bad data": tmp_path / "bad"}.get(case, data)
    args = {
        "no stage": ["--stage", 2],
        "config": ["--stage", 1, "--resume"],
        "damaged": ["--stage", 2],
    }
    config = dict(lr_1=0.5) if case == "config" else {}
    status, _ = refused(
        monkeypatch, capsys, tmp_path, "--data", folder, *args.get(case, ["--stage", 1]), **config
    )
    assert status == 2


@pytest.mark.parametrize("args, config", [
    (["--limit", "-5"], {}),
    ([], dict(K_s=5000)),  # more codes than the data have encoder outputs
    ([], dict(n_actions=2)),  # fewer actions than the data have
    ([], dict(epochs_1=1, warmup_free=100)),  # training would end before quantization begins
    ([], dict(lr_1=1e5)),  # diverges at once
    (["--seed", -1], {}),
    (["--name", "sub/tiny"], {}),
    (["--soft", "--epochs_soft", 1], {}),  # without history_dropout
    (["--soft", "--epochs_soft", 2], dict(epochs_2=2, history_dropout=0.5)),  # all of stage 2
], ids="limit codes actions warmup diverged seed name history forced".split())  # fmt: skip
def test_settings_that_cannot_work_are_said_in_one_sentence(
    data, tmp_path, monkeypatch, capsys, args, config
):
    _, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 1, *args, **config)
    one_sentence(said)


@pytest.mark.parametrize("option, value, expected", [
    ("dropout", 5.0, "0 to 1,"), ("ema_decay", 1.5, "0 to 1,"), ("restart_below", -0.1, "0 to 1,"),
    ("dropout", math.nan, "0 to 1,"), ("tau", -1.0, "from 0"), ("beta", math.inf, "from 0"),
    ("lr_1", -1.0, "from 0"), ("weight_decay_2", math.nan, "from 0"),
    ("turn_3", math.inf, "from 0"), ("lr_3", 1e7, "from 0"), ("heads", 0, "at least 1"),
    ("lifter_width", -6, "at least 1"),
])  # fmt: skip
def test_numbers_that_no_option_can_have_are_refused(tmp_path, monkeypatch, capsys, option, value,
                                                     expected):
    _, said = refused(monkeypatch, capsys, tmp_path, **{option: value})
    assert expected in one_sentence(said) and option in said


def test_a_diverged_stage_2_is_refused_and_not_saved(run, data, tmp_path, monkeypatch, capsys):
    begin(run, tmp_path, "stage1")
    _, said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--stage", 2, lr_2=1e5)
    assert "stage2" in one_sentence(said)
    assert not (tmp_path / "runs" / "tiny" / "stage2.pt").exists()


def test_no_steps_without_quantization_means_quantization_from_the_start(
    data, tmp_path, monkeypatch
):
    main(monkeypatch, tmp_path, "--data", data, "--stage", 1, warmup_free=0, epochs_1=1)
    assert bool(checkpoint(tmp_path, "stage1")["model"]["Q_s.active"])


# --------------------------------------------------------------------------------------------------
# As a user runs it


def python_train(folder, *args):
    env = os.environ | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    return subprocess.run(
        [sys.executable, str(HERE / "train.py"), *map(str, args)],
        cwd=folder,
        env=env,
        text=True,
        capture_output=True,
    )


def test_the_whole_chain_from_another_folder(data, tmp_path):
    """`python train.py` with tiny settings: stages 1-3, tables and figures, run from outside the
    project's folder."""
    short = TINY | dict(epochs_1=2, epochs_2=2, epochs_soft=1, epochs_3=1, epochs_equal=1,
                        lifter="mlp")
    done = python_train(
        tmp_path, "--name", "tiny", "--data", data, "--device", "cpu", *flags(**short)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "preset quick on 1 x cpu" in done.stdout
    run = tmp_path / "runs" / "tiny"
    made = {"stage1.pt", "stage2.pt", "regressor.pt", "log.jsonl"} | {
        f"stage3_{name}_0.pt" for name in train.INPUTS
    }
    assert made <= {p.name for p in run.iterdir()}
    assert list(run.rglob("*.png")) and "mpjpe" in done.stdout.lower()


@pytest.mark.parametrize("stage, file", [(2, "stage1.pt"), (3, "stage2.pt")])
def test_stages_of_other_data_are_refused(run, data, tmp_path, monkeypatch, capsys, stage, file):
    """A data set of the same name that was prepared again in another way; other versions of
    libraries do not count."""
    shutil.copytree(Path(run) / "runs", tmp_path / "runs")
    (tmp_path / "runs/tiny" / ("stage2.pt" if stage == 2 else "regressor.pt")).unlink()
    shutil.copytree(data, tmp_path / "data")
    meta = json.loads((tmp_path / "data/meta.json").read_text())
    (tmp_path / "data/meta.json").write_text(json.dumps(meta | {"seed": 99}))
    status, said = refused(
        monkeypatch, capsys, tmp_path, "--data", tmp_path / "data", "--stage", stage
    )
    assert status == 2 and f"{file} was trained on other data" in said
    names = [run_in(tmp_path, tmp_path / "data").samples()]
    for change in ({"seed": 99, "versions": {"numpy": "0"}}, {"seed": 98}):
        (tmp_path / "data/meta.json").write_text(json.dumps(meta | change))
        names.append(run_in(tmp_path, tmp_path / "data").samples())
    assert names[0] == names[1] != names[2]


def run_in(folder, data="data/demo", **training):
    """A Run in this process."""
    device = torch.device("cpu")
    return checkpoints.Run(folder, Config(), train.Training(**training), device, data=str(data))


def test_finished_stages_are_counted(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "INPUTS", {name: train.INPUTS[name] for name in INPUTS})
    shutil.copytree(Path(run) / "runs", tmp_path / "runs")
    there = run_in(tmp_path / "runs/tiny", data)
    assert train.trained_stages(there) == 3 and train.trained_stages(there, seeds=2) == 2
    (there.path / "stage3_generated_0.pt").unlink()
    assert train.trained_stages(there) == 2
    torch.save(checkpoint(tmp_path, "stage2") | dict(epoch=1), there.path / "stage2.pt")
    assert train.trained_stages(there) == 1
    (there.path / "stage1.pt").unlink()
    assert train.trained_stages(there) == 0


def test_the_next_command_has_the_options_of_stage_1(run, data, tmp_path, monkeypatch):
    """It is run as it is printed: a resumed stage with other options would be refused."""
    begin(run, tmp_path, "stage1", "stage2")
    command = train.next_command(run_in(tmp_path / "runs/tiny", data), 2)
    assert command.startswith("python train.py --preset ") and "--name tiny" in command
    assert command.endswith(f"--data {data} --stage 2 --resume")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    monkeypatch.setattr(train, "script", lambda *command: None)
    train.main()
    assert checkpoint(tmp_path, "stage2")["epoch"] == 3


def test_the_next_command_is_short_where_it_can_be(tmp_path):
    quick, other = (run_in(tmp_path / "runs" / name) for name in ("quick", "other"))
    assert train.next_command(quick, 1) == "python train.py --preset quick --stage 1"
    assert train.next_command(other, 1) == "python train.py --name other --stage 1"
    config, training = train.PRESETS["quick"]
    fields = vars(Config(**config)) | vars(train.Training(**training | dict(turn_3=0.1)))
    assert train.nearest_preset(fields) == ("quick", dict(turn_3=0.1))
    sizes = train.LIFTER_SIZES["quick"]["spatial"] | dict(lifter="spatial", lifter_blocks=2)
    fields |= vars(train.Training(**training | sizes))
    assert train.nearest_preset(fields) == ("quick", dict(lifter="spatial", lifter_blocks=2))
    config, training = (dict(vars(kind())) for kind in (Config, train.Training))
    other.path.mkdir(parents=True)
    of = dict(seed=3, data="data/demo", samples="")
    content = dict(model={}, epoch=1, epochs=1, step=9, seconds=1.0, run=of,
                   config=config | dict(soft=True), training=training | dict(epochs_1=40, limit=9))
    torch.save(content, other.path / "stage1.pt")
    assert train.next_command(other, 3, seeds=2) == (
        "python train.py --preset paper --name other --soft --limit 9 --seed 3 --stage 3 --seeds 2")


def test_a_run_ends_with_tables_and_figures(run, data, tmp_path, monkeypatch):
    begin(run, tmp_path, "stage1")
    commands = []

    def script(*command):
        commands.append(command)

    main(monkeypatch, tmp_path, "--data", data, "--stage", 1, "--resume", script=script)
    names = ("--name", "tiny", "--data", data, "--device", "cpu")
    assert commands == [("evaluate.py", *names, "--seeds", "1"), ("sample.py", *names)]
