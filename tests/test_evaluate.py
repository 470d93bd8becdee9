"""evaluate.py: metrics against closed forms and another road to them, and a tiny run recomputed."""

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import tables
import train
from baselines import Regressor
from checkpoints import Run
from evaluate import Models, alignment, interpolate_missing, mpjpe, pa_mpjpe
from hipart import (
    MSST,
    Config,
    HiPART,
    detected_pelvis,
    from_model_frame,
    normalize_screen,
    to_model_frame,
)
from sources.dataset import Split, load
from tables import summarize
from train import Training

SCRIPT = Path(evaluate.__file__)


# --------------------------------------------------------------------------------------------------
# Metrics


def matrix(quaternion):
    w, x, y, z = quaternion
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ])


def rotation(rng):
    """A random proper rotation."""
    q = rng.normal(size=4)
    return matrix(q / np.linalg.norm(q))


def horn(pred, gt):
    """PA-MPJPE of one frame by another road: Horn's quaternion, an eigenvector of a matrix."""
    p, g = pred - pred.mean(0), gt - gt.mean(0)
    S = p.T @ g
    d = [S[1, 2] - S[2, 1], S[2, 0] - S[0, 2], S[0, 1] - S[1, 0]]
    N = np.block([[np.array([[np.trace(S)]]), np.array([d])],
                  [np.array(d)[:, None], S + S.T - np.trace(S) * np.eye(3)]])
    values, vectors = np.linalg.eigh(N)
    turn = matrix(vectors[:, -1])
    fitted = values[-1] / (p * p).sum() * p @ turn.T
    return np.linalg.norm(fitted - g, axis=1).mean()


def poses(rng, n=5, joints=17, size=300.0):
    return rng.normal(size=(n, joints, 3)) * size


seeds = st.integers(0, 2**32 - 1)


def test_mpjpe_is_the_mean_distance_of_all_joints_as_given():
    gt = np.zeros((2, 4, 3))
    pred = gt.copy()
    pred[0] += [3, 4, 0]  # every joint 5 mm off, the pelvis too: nothing is re-aligned
    pred[1, 2] = [0, 0, 8]  # one joint of four
    np.testing.assert_allclose(mpjpe(pred, gt), [5, 2])


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_mpjpe_by_loops(seed):
    rng = np.random.default_rng(seed)
    a, b = poses(rng), poses(rng)
    loops = [sum(math.dist(p, g) for p, g in zip(*frame, strict=True)) / 17
             for frame in zip(a, b, strict=True)]
    np.testing.assert_allclose(mpjpe(a, b), loops)
    np.testing.assert_allclose(mpjpe(b, a), loops)


@settings(max_examples=60, deadline=None)
@given(seeds, st.floats(1e-3, 1e3))
def test_pa_mpjpe_is_zero_under_any_similarity(seed, scale):
    rng = np.random.default_rng(seed)
    gt = poses(rng)
    pred = np.stack([scale * g @ rotation(rng).T + rng.normal(size=3) * 1000 for g in gt])
    assert pa_mpjpe(pred, gt).max() < 1e-6
    assert pa_mpjpe(gt, pred).max() < 1e-6 * max(scale, 1)


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(4, 20))
def test_pa_mpjpe_agrees_with_horns_quaternions(seed, joints):
    rng = np.random.default_rng(seed)
    gt = poses(rng, joints=joints)
    pred = gt + poses(rng, joints=joints, size=rng.choice([1, 100, 1000]))
    pred[0] = gt[0] * [-1, 1, 1]  # where an SVD must not answer with a reflection
    expected = [horn(*pair) for pair in zip(pred, gt, strict=True)]
    np.testing.assert_allclose(pa_mpjpe(pred, gt), expected, rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_pa_mpjpe_does_not_see_where_how_large_or_how_turned_the_prediction_is(seed):
    rng = np.random.default_rng(seed)
    gt, pred = poses(rng), poses(rng)
    moved = np.stack([rng.uniform(0.1, 10) * p @ rotation(rng).T + rng.normal(size=3) * 500
                      for p in pred])
    expected = pa_mpjpe(pred, gt)
    np.testing.assert_allclose(pa_mpjpe(moved, gt), expected)
    turn = rotation(rng)
    np.testing.assert_allclose(pa_mpjpe(pred, 2 * gt @ turn.T + 7), 2 * expected)
    order, joints = rng.permutation(5), rng.permutation(17)
    # Frames are on their own, and no joint is special.
    np.testing.assert_allclose(pa_mpjpe(pred[order], gt[order]), expected[order])
    np.testing.assert_allclose(pa_mpjpe(pred[:, joints], gt[:, joints]), expected)
    # Least squares: no worse than no alignment in root mean square, and that is never below the
    # mean distance.
    assert (expected <= np.sqrt(((pred - gt) ** 2).sum(-1).mean(-1)) + 1e-9).all()


def test_a_mirror_image_is_not_aligned_away():
    gt = poses(np.random.default_rng(0))
    mirrored = gt * [-1, 1, 1]
    assert pa_mpjpe(mirrored, gt).min() > 50  # a reflection would make it 0


def test_pa_mpjpe_of_flat_straight_and_single_point_poses():
    rng = np.random.default_rng(0)
    gt, turn = poses(rng, n=3), rotation(rng)
    gt[1, :, 2] = 0  # flat
    gt[2, :, 1:] = 0  # straight
    assert pa_mpjpe(3 * gt @ turn.T + 5, gt).max() < 1e-6
    # A flat mirror image can be turned over.
    assert pa_mpjpe(gt[1:2] * [-1, 1, 1], gt[1:2]).max() < 1e-6
    point = np.full_like(gt, 123.0)
    spread = np.linalg.norm(gt - gt.mean(1, keepdims=True), axis=-1).mean(-1)
    # A point is shifted to the mean, and no more.
    np.testing.assert_allclose(pa_mpjpe(point, gt), spread)
    np.testing.assert_allclose(pa_mpjpe(gt, point), 0, atol=1e-9)
    np.testing.assert_allclose(pa_mpjpe(point, point), 0, atol=1e-9)


def test_metrics_take_tensors_and_leave_their_input_alone():
    rng = np.random.default_rng(0)
    pred, gt = poses(rng), poses(rng)
    before = pred.copy(), gt.copy()
    for metric in (mpjpe, pa_mpjpe):
        expected = metric(pred, gt)
        np.testing.assert_allclose(metric(*map(torch.from_numpy, (pred, gt))), expected)
        single = (a.astype(np.float32) for a in (pred, gt))
        np.testing.assert_allclose(metric(*single), expected, rtol=1e-5)
        assert metric(pred[:0], gt[:0]).shape == (0,)
    assert (pred == before[0]).all() and (gt == before[1]).all()


@pytest.mark.parametrize("metric", [mpjpe, pa_mpjpe])
def test_metrics_refuse_what_is_no_pair_of_poses(metric):
    good = np.zeros((2, 17, 3))
    for pred in (good[:1], good[0], good[..., :2], good[:, :16]):  # nothing is broadcast
        with pytest.raises(ValueError, match="one shape"):
            metric(pred, good)
    with pytest.raises(ValueError, match="NaN"):
        metric(good + np.nan, good)


def test_alignment_by_loops_and_in_the_extremes():
    rng = np.random.default_rng(0)
    zh_s, zh_d = rng.normal(size=(3, 16, 8)), rng.normal(size=(3, 48, 8))
    expected = []
    for s, d in zip(zh_s, zh_d, strict=True):
        part = [d[3 * k : 3 * k + 3].mean(0) for k in range(16)]
        cos = np.array([[a @ b / np.linalg.norm(a) / np.linalg.norm(b) for b in part] for a in s])
        others = [cos[i, k] for i in range(16) for k in range(16) if i != k]
        expected.append(np.mean([cos[i, i] for i in range(16)]) - np.mean(others))
    found = alignment(torch.from_numpy(zh_s), torch.from_numpy(zh_d))
    np.testing.assert_allclose(found, expected)
    scaled = alignment(5 * torch.from_numpy(zh_s), torch.from_numpy(zh_d) / 7)
    np.testing.assert_allclose(scaled, expected)
    tied = torch.eye(16)[None]
    assert alignment(tied, tied.repeat_interleave(3, 1)).item() == pytest.approx(1)
    assert alignment(torch.ones(1, 16, 4), torch.ones(1, 48, 4)).item() == pytest.approx(0)


# --------------------------------------------------------------------------------------------------
# A real run


def main(monkeypatch, folder, *args, name="tiny"):
    with monkeypatch.context() as m:
        m.chdir(folder)
        argv = ["evaluate.py", "--name", name, "--device", "cpu", *map(str, args)]
        m.setattr(sys, "argv", argv)
        evaluate.main()


@pytest.fixture(scope="module")
def data(tiny_data):
    return f"{tiny_data}/tiny"


def copy_runs(source, folder, *left_out):
    skip = shutil.ignore_patterns("*.npy", "figures", "table*", "evaluation*", *left_out)
    shutil.copytree(source / "runs", folder / "runs", ignore=skip)
    return folder


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the tiny run: evaluate.py writes into it."""
    return copy_runs(tiny_run, tmp_path_factory.mktemp("evaluated"))


def read_json(path):
    def strict(constant):
        raise AssertionError(f"{path} holds {constant}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=strict)


@pytest.fixture(scope="module")
def result(run, data):
    """`python evaluate.py --seeds 2` as a user runs it: what it printed, table.md, and
    evaluation.json."""
    before = {p.name: p.read_bytes() for p in (run / "runs/tiny").iterdir()}
    command = [sys.executable, SCRIPT, "--name", "tiny", "--data", data, "--seeds", "2",
               "--device", "cpu"]  # fmt: skip
    done = subprocess.run(command, cwd=run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = {p.name: p.read_bytes() for p in (run / "runs/tiny").iterdir()}
    assert after.keys() - before.keys() == {"table.md", "evaluation.json"}  # nothing half-written
    assert all(after[name] == before[name] for name in before)
    return done.stdout, after["table.md"].decode(), read_json(run / "runs/tiny/evaluation.json")


def saved(run, name):
    return torch.load(run / "runs" / "tiny" / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def model(run):
    parts = saved(run, "stage1"), saved(run, "stage2")
    hipart = HiPART(Config(**parts[1]["config"]))
    hipart.msst.load_state_dict(parts[0]["model"])
    hipart.hiarm.load_state_dict(parts[1]["model"])
    return hipart.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def regressor(run):
    regressor = Regressor(32)
    regressor.load_state_dict(saved(run, "regressor")["model"])
    return regressor.eval().requires_grad_(False)


def load_lifter(run, name, seed):
    checkpoint = saved(run, f"stage3_{name}_{seed}")
    lifter = train.new_lifter(Training(**checkpoint["training"]), name)
    lifter.load_state_dict(checkpoint["model"])
    return lifter.eval().requires_grad_(False)


def arrays(data, split, kind="detected"):
    """A split read without `Split`: normalised x_s, conf, x_d, x_f, and the raw arrays."""
    a = {k: np.array(v) for k, v in load(data, split)[0].items()}
    conf = torch.from_numpy(a["conf"]) if kind == "detected" else torch.ones(len(a["x_s"]), 17)
    x_s = torch.from_numpy(a["x_s_det"] if kind == "detected" else a["x_s"])
    t = {k: normalize_screen(torch.from_numpy(a[k]), 1000, 1000) for k in ("x_d", "x_f")}
    x_s = normalize_screen(x_s, 1000, 1000) * (conf > 0)[..., None]
    return x_s, conf, t["x_d"], t["x_f"], a


def averages(values, a, names=("jump", "kick", "punch", "walk")):
    per_action = {names[k]: values[a["action"] == k].mean() for k in np.unique(a["action"])}
    return dict(per_action=per_action, actions=np.mean(list(per_action.values())),
                frames=values.mean())  # fmt: skip


def assert_average(found, values, a):
    expected = averages(np.asarray(values, np.float64), a)
    assert found["per_action"] == pytest.approx(expected["per_action"], rel=1e-4)
    assert found["actions"] == pytest.approx(expected["actions"], rel=1e-4)
    assert found["frames"] == pytest.approx(expected["frames"], rel=1e-4)


@pytest.mark.parametrize("split", ["test", "unseen"])
@pytest.mark.parametrize("name", train.INPUTS)
def test_3d_errors_are_true(result, run, data, model, regressor, split, name):
    kind = "clean" if name.endswith("_clean") else "detected"
    x_s, conf, x_d, x_f, a = arrays(data, split, kind)
    if name == "generated":
        x_d, x_f = model.densify(x_s, conf)
    elif name == "regressor":
        x_d, x_f = regressor.densify(x_s, conf)
    x = x_s if "sparse" in name else torch.cat([x_s, x_d, x_f], 1)
    s = result[2]["splits"][split]
    for seed in (0, 1):
        y = load_lifter(run, name, seed)(x, conf).numpy()
        off = np.linalg.norm(y - a["y"], axis=-1).mean(1)
        assert_average(s[f"mpjpe/{name}/{seed}"], off, a)
        pa = [horn(*pair) for pair in zip(y.astype(np.float64), a["y"], strict=True)]
        assert_average(s[f"pa_mpjpe/{name}/{seed}"], pa, a)


def test_missing_joints_between_their_neighbours():
    x = torch.randn(1, 17, 2).expand(4, 17, 2).clone()
    conf = torch.ones(4, 17)
    conf[0, 2] = 0  # the right knee: between hip and ankle
    conf[1, [5, 6]] = 0  # left knee and ankle: the end repeats what stands before it
    conf[2, [11, 12, 13]] = 0  # a whole arm
    conf[3] = 0
    visible = conf[..., None] > 0
    filled = interpolate_missing(torch.where(visible, x, torch.nan), conf)
    expected = x.clone()
    expected[0, 2] = (x[0, 1] + x[0, 3]) / 2
    expected[1, [5, 6]] = x[1, 4]
    expected[2, [11, 12, 13]] = x[2, 8]
    expected[3] = 0
    torch.testing.assert_close(filled, expected)
    assert torch.equal(interpolate_missing(x, torch.ones(4, 17)), x)


@pytest.mark.parametrize("split", ["test", "unseen"])
@pytest.mark.parametrize("name", ["sparse_long", "generated", "regressor"])
def test_visible_and_missing_joints_apart_are_true(result, run, data, model, regressor, split,
                                                   name):  # fmt: skip
    x_s, conf, _, _, a = arrays(data, split)
    lifter, dense = load_lifter(run, name, 1), regressor if name == "regressor" else model
    inputs = {name: (x_s, conf)}
    if name != "regressor":  # every sample, also those that miss nothing
        whole = interpolate_missing(x_s, conf), torch.ones_like(conf)
        inputs[f"{name} interpolated"] = whole
    assert (conf == 0).any() and not (conf == 0).all(1).any()
    for label, (x, c) in inputs.items():
        points = x if name == "sparse_long" else torch.cat([x, *dense.densify(x, c)], 1)
        off = np.linalg.norm(lifter(points, c).numpy() - a["y"], axis=-1)
        for which, mask in (("visible", conf.numpy() > 0), ("missing", conf.numpy() == 0)):
            rows = [o[m].mean() for o, m in zip(off, mask, strict=True) if m.any()]
            found = result[2]["splits"][split][f"{which}/{label}/1"]["frames"]
            assert found == pytest.approx(np.mean(rows), rel=1e-4)
    assert "missing joints interpolated" in result[1]


@pytest.mark.parametrize("split", ["val", "test", "unseen"])
@pytest.mark.parametrize("kind", ["detected", "clean"])
def test_2d_errors_are_true(result, data, model, split, kind):
    x_s, conf, _, x_f, a = arrays(data, split, kind)
    s, pelvis = result[2]["splits"][split], detected_pelvis(x_s, conf)
    truth, sight = to_model_frame(x_f, pelvis), to_model_frame(x_s, pelvis)
    q_s, q_d = model.msst.encode(truth)
    logits_s, logits_d = model.hiarm(sight, q_s, q_d, conf)
    guess_s, guess_d = logits_s.argmax(-1), logits_d.argmax(-1)
    made = dict(tokenizer=from_model_frame(model.msst.decode(q_s, q_d)[1], pelvis),
                generated=model.densify(x_s, conf)[1],
                teacher_forced=from_model_frame(model.msst.decode(guess_s, guess_d)[1], pelvis))
    for source, x in made.items():
        px = ((x - x_f).numpy().astype(np.float64) ** 2).sum(-1) ** 0.5 * 500
        assert_average(s[f"px/{kind}/{source}"], px.mean(1), a)
        assert_average(s[f"percent/{kind}/{source}"], px.mean(1) / a["height_px"] * 100, a)
    assert_average(s[f"accuracy_s/{kind}"], (guess_s == q_s).float().mean(1) * 100, a)
    assert_average(s[f"accuracy_d/{kind}"], (guess_d == q_d).float().mean(1) * 100, a)
    if kind == "clean":
        assert s["px/clean/input"]["frames"] < 1e-3
        return
    off = [np.mean([math.dist(p, q) for p, q, c in zip(*sample, strict=True) if c > 0])
           for sample in zip(a["x_s_det"], a["x_s"], a["conf"], strict=True)]
    assert_average(s["px/detected/input"], off, a)
    hidden = [any(c < 0.5 for c in row) for row in a["conf"]]  # a missing joint has confidence 0
    share = np.mean(hidden)
    assert s["occluded"]["frames"] == pytest.approx(share)
    if split != "val":
        error = s["mpjpe/sparse/0"]
        mix = share * (error["occluded"] or 0) + (1 - share) * (error["clear"] or 0)
        assert mix == pytest.approx(error["frames"])


def test_expected_embeddings_are_teacher_forced_where_they_are_handed_on(data, model):
    """config.soft: HiARM's choice is the expected embedding, as it is in free-running."""
    x_s, conf, _, x_f, _ = arrays(data, "test")
    soft = HiPART(dataclasses.replace(model.config, soft=True)).eval()
    soft.load_state_dict(model.state_dict())
    pelvis = detected_pelvis(x_s, conf)
    with torch.no_grad():
        found = evaluate.teacher_forced(soft, x_s, conf, x_f)["teacher_forced"]
        q_s, q_d = soft.msst.encode(to_model_frame(x_f, pelvis))
        logits = soft.hiarm(to_model_frame(x_s, pelvis), q_s, q_d, conf)
        codes = soft.msst.Q_s.codebook, soft.msst.Q_d.codebook
        zh = [p.softmax(-1) @ C for p, C in zip(logits, codes, strict=True)]
        expected = from_model_frame(soft.msst.decode_embeddings(*zh)[1], pelvis)
    torch.testing.assert_close(found, expected)


def test_codebook_numbers_are_true(result, run, data):
    checkpoint = saved(run, "stage1")
    msst = MSST(Config(**checkpoint["config"]))
    msst.load_state_dict(checkpoint["model"])
    for split, report in result[2]["codebooks"].items():
        x_s, conf, _, x_f, _ = arrays(data, split)
        with torch.no_grad():
            poses = to_model_frame(x_f, detected_pelvis(x_s, conf))
            tokens = dict(zip("sd", msst.eval().encode(poses), strict=True))
        for level, K in (("s", 16), ("d", 24)):
            count = [(tokens[level] == k).sum().item() for k in range(K)]
            share = np.array(count) / tokens[level].numel()
            assert report[f"dead_{level}"] == pytest.approx((share == 0).mean())
            entropy = -sum(p * math.log(p) for p in share if p > 0)
            assert report[f"perplexity_{level}"] == pytest.approx(math.exp(entropy), rel=1e-4)


def cells(text, heading, row):
    """The cells of the first line that starts with `row`, after the line with `heading`."""
    for line in text[text.index(heading) :].splitlines():
        if line.startswith(f"| {row}"):
            return [c.strip() for c in line.strip("|").split("|")][1:]
    raise AssertionError(f"no row {row!r} after {heading!r}")


def test_what_is_printed_is_the_short_table_with_the_numbers_of_the_json(result):
    printed, _, numbers = result
    first = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert first == ["mm, mean of actions", "-" * 47, *train.INPUTS.values()]
    for name, label in train.INPUTS.items():
        expected = []
        for split in ("unseen", "test"):
            s = numbers["splits"][split]
            for metric in ("mpjpe", "pa_mpjpe"):
                x = [s[f"{metric}/{name}/{seed}"]["actions"] for seed in (0, 1)]
                spread = abs(x[0] - x[1]) / math.sqrt(2)
                expected.append(f"{np.mean(x):.1f} ± {spread:.1f}")
            base = "sparse_clean" if name.endswith("_clean") else "sparse_long"
            means = [np.mean([s[f"mpjpe/{n}/{seed}"]["actions"] for seed in (0, 1)])
                     for n in (name, base)]  # fmt: skip
            expected.append(f"{means[0] / means[1]:.2f}")
        trained = numbers["training"]
        before = dict(generated=("stage1", "stage2"), regressor=("regressor",)).get(name, ())
        seconds = (sum(trained[model]["seconds"] for model in before)
                   + np.mean([trained[f"stage3_{name}_{seed}"]["seconds"] for seed in (0, 1)]))
        expected += [f"{seconds:,.0f}", "128 + 256" if before else "256"]  # 2 epochs, 4 passes
        assert cells(printed, "unseen: MPJPE", label) == expected
    rest = [line for line in printed.splitlines() if line and not line.startswith("|")]
    assert rest == ["The full report is runs/tiny/table.md, and its numbers are in "
                    "runs/tiny/evaluation.json."]


def test_tables_show_these_numbers(result):
    printed, text, numbers = result
    short = printed[printed.index("|") : printed.rindex("|") + 1]
    assert f"## In short\n\n{short}\n\n" in text
    headings = ("## Training time and samples", "## 3D error on `unseen`", "## 3D error on `test`")
    assert re.findall("^## (?:Training|3D).*$", text, re.M) == list(headings)
    test = numbers["splits"]["test"]
    b, a = ([test[f"mpjpe/{name}/{seed}"] for seed in (0, 1)]
            for name in ("generated", "sparse_long"))
    means = [np.mean([s["actions"] for s in x]) for x in (b, a)]
    found = cells(text, "3D error on `test`", "b  sparse + generated")
    spread = abs(b[0]["actions"] - b[1]["actions"]) / math.sqrt(2)
    assert found[0] == f"{means[0]:.1f} ± {spread:.1f}"
    assert found[1].startswith(f"{np.mean([s['frames'] for s in b]):.1f} ±")
    assert found[4] == f"{means[0] / means[1]:.2f}" and found[-1] == "42.0"
    clean = cells(text, "3D error on `test`", "-  clean sparse")
    assert clean[5:7] == ["-", "-"]  # nothing is occluded there
    assert cells(text, "3D error on `unseen`", "kick")  # its one action
    unseen = numbers["splits"]["unseen"]
    px, percent = (unseen[f"{k}/detected/generated"]["frames"] for k in ("px", "percent"))
    found = cells(text, "Where the 2D", "detected: HiARM, free-running")
    assert found[2] == f"{px:.1f} ({percent:.1f} %)"
    train_px = numbers["splits"]["train"]["px/clean/tokenizer"]["frames"]
    found = cells(text, "Where the 2D", "clean: reconstruction error of the tokenizer")
    assert found[0].startswith(f"{train_px:.1f} (")
    assert not re.search(r"\bnan\b|None|\binf\b", text)


def test_the_top_says_what_was_run(result):
    top = result[1][: result[1].index("3D error")]
    for part in ("runs/tiny", "K_s 16 (2048)", "lifter mlp (spatial)", "epochs_1 3 (20)",
                 "train 64, val 32, unseen 32, test 32", "14 lifters", "stage 1",
                 torch.__version__, "on cpu"):  # fmt: skip
        assert part in top, part
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", top)
    assert "Human3.6M, the paper's data set and not this one" in result[1]


def test_numbers_do_not_depend_on_how_a_split_is_read(result, data, model, regressor, monkeypatch):
    monkeypatch.setattr(Split.blocks, "__defaults__", (None, False, 5))
    split = Split(data, "test", torch.device("cpu"))
    rows = evaluate.measure(split, Models(model.msst, model, regressor))
    found, expected = summarize(rows, split.meta["actions"]), result[2]["splits"]["test"]
    assert {"alignment", "px/clean/regressor", "accuracy_d/detected"} <= found.keys()
    for name in found:
        close = pytest.approx(expected[name]["frames"], rel=1e-4, abs=1e-4)
        assert found[name]["frames"] == close, name


def test_one_seed_has_no_spread(tiny_run, data, tmp_path, monkeypatch, capsys, result):
    copy_runs(tiny_run, tmp_path)
    main(monkeypatch, tmp_path, "--data", data)
    printed, text = capsys.readouterr().out, (tmp_path / "runs/tiny/table.md").read_text()
    assert "±" not in printed and "±" not in text
    expected = result[2]["splits"]["unseen"]["mpjpe/sparse/0"]["actions"]
    for table in (printed, text[text.index("3D error on `unseen`") :]):
        assert cells(table, "MPJPE", "a  sparse")[0] == f"{expected:.1f}"


def test_several_runs_are_compared(run, data, street, tmp_path, monkeypatch, capsys, result):
    """Two runs that are the same run, but for one number."""
    for name in ("tiny", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        shutil.copy(run / "runs/tiny/stage1.pt", tmp_path / "runs" / name)
    path = tmp_path / "runs/other/evaluation.json"
    numbers = json.loads(json.dumps(result[2]))
    (tmp_path / "runs/tiny/evaluation.json").write_text(json.dumps(numbers))
    test, of = numbers["splits"]["test"], numbers["training"]["stage2"]
    before = test["mpjpe/generated/0"]["actions"]
    test["mpjpe/generated/0"]["actions"], of["seconds"] = before + 10, of["seconds"] + 100
    path.write_text(json.dumps(numbers))

    def compare(*args):
        with monkeypatch.context() as m:
            m.chdir(tmp_path)
            argv = ["evaluate.py", "--name", "tiny", "other", "--data", data, *args]
            m.setattr(sys, "argv", argv)
            evaluate.main()
        return capsys.readouterr().out

    printed, one = compare(), result[2]["splits"]["test"]
    found = cells(printed, "unseen: MPJPE", "b  sparse + generated")
    ratio = (before + 5) / one["mpjpe/sparse_long/0"]["actions"]
    assert found[3] == f"{before + 5:.1f} ± 7.1" and found[5] == f"{ratio:.2f}"
    assert found[0].endswith("± 0.0") and "over tiny, other; ratios" in printed
    trained = (result[2]["training"][name]["seconds"]
               for name in ("stage1", "stage2", "stage3_generated_0"))
    assert found[6] == f"{sum(trained) + 50:,.0f}"
    assert {p.name for p in path.parent.iterdir()} == {"stage1.pt", "evaluation.json"}

    def refused(*args):
        with pytest.raises(SystemExit) as e:
            compare(*args)
        said = capsys.readouterr().err.strip()
        assert e.value.code == 2 and "\n" not in said
        return said

    assert "--seeds" in refused("--seeds", "2") and "--occlusion" in refused("--occlusion")
    assert "evaluation_street.json" in refused("--data", str(street))  # never evaluated
    other_data = result[2] | dict(samples="of other data")
    numbers["splits"]["unseen"].pop("mpjpe/sparse_long/0")
    for damage in (other_data, numbers, [], 3, dict(splits=dict(test=3), training=3)):
        path.write_text(json.dumps(damage))
        assert "evaluate.py --name other`" in refused()


# --------------------------------------------------------------------------------------------------
# Runs whose later stages are not trained


def partial(tiny_run, tmp_path, stages):
    """A run with the checkpoints of its first stages."""
    left_out = ["stage2*", "stage3*", "regressor*"] if stages == 1 else ["stage3*", "regressor*"]
    return copy_runs(tiny_run, tmp_path, *left_out)


def next_command(folder, data, stage, monkeypatch):
    with monkeypatch.context() as m:
        m.chdir(folder)
        run = Run(Path("runs/tiny"), Config(), Training(), torch.device("cpu"), data=data)
        return train.next_command(run, stage)


def test_stage_1_alone_has_the_table_of_its_tokenizer(tiny_run, data, tmp_path, monkeypatch,
                                                      capsys, result):  # fmt: skip
    partial(tiny_run, tmp_path, 1)
    main(monkeypatch, tmp_path, "--data", data)
    printed, text = capsys.readouterr().out, (tmp_path / "runs/tiny/table.md").read_text()
    numbers = read_json(tmp_path / "runs/tiny/evaluation.json")
    tokenizer = result[1][result[1].index("## Tokenizer") :]
    assert text[text.index("## Tokenizer") :].startswith(tokenizer.strip())
    shown = [line for line in printed.splitlines() if line.startswith("|")]
    assert "\n".join(shown) in tokenizer and len(shown) == 2 + 8
    assert "## 3D" not in text and "## 2D" not in text and "## Where" not in text
    said = (f"Left out: where the error of generated 2D poses comes from (stage 2) and the errors "
            f"in 3D (stage 3); `{next_command(tmp_path, data, 2, monkeypatch)}` trains the next "
            "stage.")  # fmt: skip
    assert said in printed.splitlines() and said in text.splitlines()
    assert "--stage 2" in said and "The full report is runs/tiny/table.md" in printed
    assert numbers["codebooks"] == result[2]["codebooks"]
    for split in ("val", "test", "unseen"):
        found, whole = numbers["splits"][split], result[2]["splits"][split]
        assert found["alignment"] == whole["alignment"]
    assert numbers["training"].keys() == {"stage1"} and "lifters" not in numbers["about"]


def test_stage_2_adds_where_the_2d_error_comes_from(tiny_run, data, tmp_path, monkeypatch, capsys,
                                                    result):  # fmt: skip
    partial(tiny_run, tmp_path, 2)
    main(monkeypatch, tmp_path, "--data", data)
    printed, text = capsys.readouterr().out, (tmp_path / "runs/tiny/table.md").read_text()
    whole = result[1].splitlines()
    shown = [line for line in printed.splitlines() if line.startswith("|")]
    rows = [line for line in whole if line.startswith(("| detected:", "| clean:"))]
    assert shown[2:] == [line for line in rows if "regressor" not in line]
    assert "plain regressor" not in text and "## 3D" not in text and "## 2D error" in text
    assert result[1][result[1].index("## Tokenizer") :].strip() in text
    said = ("Left out: the errors in 3D (stage 3); "
            f"`{next_command(tmp_path, data, 3, monkeypatch)}` trains the next stage.")
    assert said in printed.splitlines() and said in text.splitlines() and "--stage 3" in said
    found = read_json(tmp_path / "runs/tiny/evaluation.json")["splits"]
    for split, expected in result[2]["splits"].items():
        missing = expected.keys() - found[split].keys()
        assert all("regressor" in name or name.split("/")[-1] in "01" for name in missing)
        assert found[split] == {name: expected[name] for name in found[split]}


def test_the_next_stage_is_trained_on_the_runs_own_data(tiny_run, data, tmp_path, monkeypatch,
                                                        capsys):  # fmt: skip
    """A run that is tried on other data goes on with those that it began with."""
    partial(tiny_run, tmp_path, 1)
    shutil.copytree(data, tmp_path / "other")
    main(monkeypatch, tmp_path, "--data", "other")
    assert f"--data {data} --stage 2" in capsys.readouterr().out
    assert (tmp_path / "runs/tiny/table_other.md").is_file()


# --------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit status 2


def refused(monkeypatch, capsys, folder, *args, **options):
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(monkeypatch, folder, *args, **options)
    assert e.value.code == 2
    said = capsys.readouterr().err.strip()
    assert said and "\n" not in said and "Traceback" not in said
    return said


def test_a_missing_run_is_said_with_the_command(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, "--name", "nowhere"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    said = done.stderr.strip()
    assert "\n" not in said and "python train.py --name nowhere --stage 1" in said
    assert list(tmp_path.iterdir()) == []


def test_a_missing_run_is_said_with_the_runs_that_are_there(run, monkeypatch, capsys):
    said = refused(monkeypatch, capsys, run, name="standard")
    assert "python train.py --preset standard --stage 1" in said and said.endswith("--name: tiny")


def test_missing_data_are_said(run, tmp_path, monkeypatch, capsys):
    said = refused(monkeypatch, capsys, run, "--data", tmp_path / "none")
    assert "prepare_data.py" in said


NAMES = ["stage1", "stage2", "regressor", "stage3_generated_0", "stage3_sparse_1"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", ["gone", "cut", "unfinished"])
def test_a_missing_or_damaged_checkpoint_is_said(tiny_run, data, tmp_path, monkeypatch, capsys,
                                                 name, damage):  # fmt: skip
    copy_runs(tiny_run, tmp_path)
    folder = tmp_path / "runs" / "tiny"
    path, stage = folder / f"{name}.pt", {"stage1": 1, "stage2": 2}.get(name, 3)
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        content = torch.load(path, weights_only=True)
        torch.save(content | dict(epoch=content["epoch"] - 1), path)
    args = ["--data", data, "--seeds", "2"]
    if damage == "cut":
        assert f"{name}.pt is not a readable" in refused(monkeypatch, capsys, tmp_path, *args)
    elif stage == 1 or name.endswith("_1"):  # a table of fewer seeds would not be what was asked
        said = refused(monkeypatch, capsys, tmp_path, *args)
        assert f"--stage {stage}" in said and ("--seeds 2" in said or stage == 1)
        assert "--resume" in said or (damage == "gone" and stage == 1)
    else:  # the stages before it are still there
        main(monkeypatch, tmp_path, *args)
        said = capsys.readouterr().out
        assert f"--stage {stage}" in said and "MPJPE" not in said
        assert "--resume" in said or (damage == "gone" and name == "stage2")
        assert ("--seeds 2" in said) == (stage == 3)
        return
    assert not (folder / "table.md").exists()


def test_a_full_report_is_not_replaced_by_a_lesser_one(tiny_run, data, tmp_path, monkeypatch,
                                                       capsys):  # fmt: skip
    """One lifter is gone, and the table with the errors in 3D is still there."""
    copy_runs(tiny_run, tmp_path)
    folder = tmp_path / "runs" / "tiny"
    (folder / "stage3_sparse_clean_0.pt").unlink()
    (folder / "table.md").write_text("## 3D error on `test`\n")
    said = refused(monkeypatch, capsys, tmp_path, "--data", data)
    assert "table.md" in said and "--stage 3" in said and "--resume" in said
    assert (folder / "table.md").read_text() == "## 3D error on `test`\n"
    assert not (folder / "evaluation.json").exists()


def test_senseless_options_are_said(tiny_run, run, data, tmp_path, monkeypatch, capsys):
    assert "--seeds" in refused(monkeypatch, capsys, run, "--data", data, "--seeds", 0)
    assert "--seeds" in refused(monkeypatch, capsys, run, "--data", data, "--seeds", 2,
                                "--occlusion")
    partial(tiny_run, tmp_path, 2)
    said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--occlusion")
    assert "--occlusion needs all three stages" in said and "--stage 3" in said
    if not torch.cuda.is_available():
        said = refused(monkeypatch, capsys, run, "--data", data, "--device", "cuda")
        assert "--device" in said


# --------------------------------------------------------------------------------------------------
# Joints hidden on purpose


def test_the_box_is_a_square_around_the_person():
    people = np.array([[[0.0, 0.0], [2, 10], [1, 5]], [[5, 1], [1, 1], [3, 1]]])
    low, side = evaluate.person_box(people)
    assert side.ravel().tolist() == [12, pytest.approx(4.8)]
    np.testing.assert_allclose(low[:, 0], [[1 - 6, 5 - 6], [3 - 2.4, 1 - 2.4]])


def test_masks_and_crops_hide_their_share(monkeypatch):
    """Points spread evenly over the box: the hidden ones are that share of it, in one square or
    along one side."""
    unit = np.zeros((40, 1, 2)), np.ones((40, 1, 1))
    monkeypatch.setattr(evaluate, "person_box", lambda x: unit)
    grid = np.stack(np.meshgrid(*[(np.arange(50) + 0.5) / 50] * 2), -1).reshape(-1, 2)
    people, rng = np.tile(grid, (40, 1, 1)), np.random.default_rng(0)
    corners, sides = set(), set()
    for label, hidden in evaluate.under_masks_and_crops(people, rng).items():
        share = float(label.split(" ")[1])
        for h in hidden:
            points = grid[h]
            assert abs(h.mean() - share) < 0.035, label
            if "mask" in label and share:
                assert np.abs(np.ptp(points, 0) - share**0.5).max() < 0.041
                corners.add(tuple(points.min(0)))
            elif share:
                extent = np.ptp(points, 0)
                assert sorted(extent)[1] > 0.97 and abs(sorted(extent)[0] - share) < 0.041
                axis = int(extent.argmin())
                sides.add((axis, bool(points[:, axis].mean() < 0.5)))
    assert len(corners) > 50 and len(sides) == 4


@pytest.mark.parametrize("size, places", [(40, 400), (80, 256)])
def test_patches_go_over_the_whole_box(size, places):
    x_s = np.random.default_rng(0).normal(size=(3, 17, 2)) * 100
    hidden = evaluate.under_patches(x_s, size)
    assert hidden.shape == (3, places, 17)
    starts = sorted({min(10 * k, 224 - size) for k in range(int(places**0.5))})
    for i in range(3):
        low, high = x_s[i].min(0), x_s[i].max(0)
        side = 1.2 * max(high - low)
        at = (x_s[i] - ((low + high) / 2 - side / 2)) / side * 224
        expected = [[x <= p[0] < x + size and y <= p[1] < y + size for p in at]
                    for x in starts for y in starts]
        assert sorted(hidden[i].tolist()) == sorted(map(list, np.array(expected).tolist()))
    assert hidden.any(1).all()  # every joint is under some patch


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(1, 4), st.integers(1, 30), st.floats(0, 1))
def test_distinct_covers_are_all_covers_once(seed, n, places, share):
    hidden = np.random.default_rng(seed).random((n, places, 17)) < share
    sample, covers = evaluate.distinct_covers(hidden)
    assert covers.dtype == bool
    found = [(int(i), tuple(row)) for i, row in zip(sample, covers.tolist(), strict=True)]
    assert len(set(found)) == len(found)
    assert set(found) == {(i, tuple(row)) for i in range(n) for row in hidden[i].tolist()}


def test_errors_under_covers_against_a_loop(run, data, monkeypatch, capsys, result):
    """The table of `--occlusion` on a tiny run: patches recomputed place by place, and what nothing
    covers compared with the evaluation."""
    main(monkeypatch, run, "--data", data, "--occlusion")
    printed = capsys.readouterr().out
    lines = [line.split("|") for line in printed.splitlines() if line.startswith("| keypoint")]
    shown = {line[1].strip(): line[2:-1] for line in lines}
    conditions = (evaluate.MASKS, evaluate.CROPS, evaluate.PATCHES)
    assert len(shown) == sum(map(len, conditions))
    assert (run / "runs/tiny/occlusion.md").read_text() in printed
    split, lifter = Split(data, "test", torch.device("cpu")), load_lifter(run, "sparse_long", 0)
    block = split.read(slice(0, split.n))
    joints = split.read(slice(0, split.n), clean=True)["x_s"].numpy()
    hidden = evaluate.under_patches(joints, 80)
    worst = []
    for i in range(0, split.n, 10):
        conf = block["conf"][i] * torch.from_numpy(~hidden[i])
        y = lifter(block["x_s"][i] * (conf > 0)[..., None], conf)
        off = (y - block["y"][i]).norm(dim=-1).numpy()
        worst.append(max(off[p][~hidden[i, p]].mean() for p in range(256)
                         if not hidden[i, p].all()))  # fmt: skip
    found = float(shown["keypoint-AdvOcc@80, worst of 256 places"][1])
    assert found == pytest.approx(np.mean(worst), abs=0.051)
    test = result[2]["splits"]["test"]
    plain = [test[f"mpjpe/{name}/0"]["frames"] for name in evaluate.HIDDEN_INPUTS]
    nothing = shown["keypoint-mask 0.0"]
    assert [float(cell) for cell in nothing[1:]] == pytest.approx(plain, abs=0.051)
    missing = 100 * float((block["conf"] == 0).float().mean())
    assert float(nothing[0].strip(" %")) == pytest.approx(missing, abs=0.51)
    shares = [float(shown[f"keypoint-mask {m}"][0].strip(" %")) for m in evaluate.MASKS]
    assert shares == sorted(shares) and shares[-1] > 85


# --------------------------------------------------------------------------------------------------
# Other data


def test_fourteen_joints_are_moved_to_their_pelvis(run, data, model, regressor):
    """3DPW's protocol, if the data name the joints: the predicted pelvis moves onto the true one,
    then 14 joints count."""
    split = Split(data, "test", torch.device("cpu"))
    keep = [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]
    split.meta = split.meta | {"joints_14": keep}
    lifter = load_lifter(run, "sparse", 0)
    models = Models(model.msst, model, regressor, {("sparse", 0): lifter})
    rows, block = evaluate.measure(split, models), split.read(slice(0, split.n))
    y = lifter(block["x_s"], block["conf"]).numpy().astype(np.float64)
    assert np.abs(y[:, 0]).max() > 0.1  # it does not put the pelvis at 0 by itself
    true = block["y"].double().numpy()
    expected = [np.mean([math.dist(y[i, j] - y[i, 0], true[i, j]) for j in keep])
                for i in range(split.n)]  # fmt: skip
    np.testing.assert_allclose(rows["mpjpe_14/sparse/0"], expected, rtol=1e-4)
    aligned = [horn((y[i] - y[i, 0])[keep], true[i][keep]) for i in range(split.n)]
    np.testing.assert_allclose(rows["pa_mpjpe_14/sparse/0"], aligned, rtol=1e-4)
    columns = {f"{metric}_14/{name}/0": rows[f"{metric}_14/sparse/0"]
               for metric in ("mpjpe", "pa_mpjpe") for name in train.INPUTS}
    columns |= {name: rows[name] for name in ("action", "occluded")}
    caption, text = tables.protocol_14(summarize(columns, split.meta["actions"]), 1)
    assert "predicted pelvis" in caption
    assert f"| {np.mean(expected):.1f} |" in text.replace("  ", " ")
    assert tables.protocol_14({}, 1) == []


@pytest.fixture
def street(data, tmp_path):
    """Data as 3DPW is: no training split, no dense points, its own words and protocol."""
    folder = tmp_path / "street"
    shutil.copytree(data, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"] = {
        name: {"n": 32, "with_mesh": 0, "about": about}
        for name, about in (("test", "people in the street"), ("occ", "people behind things"))}
    meta |= {"joints_14": [1, 2, 3], "noise": None, "source": "3dpw"}
    (folder / "meta.json").write_text(json.dumps(meta))
    np.save(folder / "test/has_mesh.npy", np.zeros(32, bool))
    shutil.copytree(folder / "test", folder / "occ")
    return folder


def test_other_data_leave_the_runs_own_tables_alone(run, street, monkeypatch, capsys, result):
    before = (run / "runs/tiny/table.md").read_bytes()
    main(monkeypatch, run, "--data", street)
    printed, text = capsys.readouterr().out, (run / "runs/tiny/table_street.md").read_text()
    assert (run / "runs/tiny/table.md").read_bytes() == before
    assert (run / "runs/tiny/evaluation_street.json").is_file()
    assert "(people in the street; 0 of 32 samples have true dense" in text and "14 joints" in text
    assert "(people behind things; 0 of 32" in text
    found = cells(text, "3D error on `test`", "c  sparse + ground")
    assert found[:5] == ["-"] * 5  # nothing to compare with
    found = cells(text, "3D error on `test`", "b  sparse + gen")
    assert re.fullmatch(r"[0-9.]+", found[0])
    assert cells(printed, "occ: MPJPE", "c  sparse + ground")[:6] == ["-"] * 6
    assert cells(printed, "occ: MPJPE", "b  sparse + gen")[0] == found[0]
    assert not re.search(r"\bnan\b|None|\binf\b|## Tokenizer", text)


def test_stage_1_alone_has_nothing_to_measure_without_meshes(tiny_run, street, tmp_path,
                                                             monkeypatch, capsys):  # fmt: skip
    partial(tiny_run, tmp_path, 1)
    said = refused(monkeypatch, capsys, tmp_path, "--data", street)
    assert "true dense and fine points" in said and "--stage 2" in said
    assert not (tmp_path / "runs/tiny/table_street.md").exists()
