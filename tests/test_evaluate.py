"""evaluate.py: metrics against closed forms and an independent fit, averages, tables, and a real (tiny) run recomputed."""

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
import train
from baselines import Regressor
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
from train import Training

SCRIPT = Path(evaluate.__file__)


# --------------------------------------------------------------------------------------------------
# Metrics


def rotation(rng):
    """A random proper rotation, from a unit quaternion."""
    w, x, y, z = (q := rng.normal(size=4)) / np.linalg.norm(q)
    return np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])  # fmt: skip


def horn(pred, gt):
    """PA-MPJPE of one frame by another road: Horn's quaternion, the largest eigenvector of a 4 x 4 matrix."""
    p, g = pred - pred.mean(0), gt - gt.mean(0)
    S = p.T @ g
    d = [S[1, 2] - S[2, 1], S[2, 0] - S[0, 2], S[0, 1] - S[1, 0]]
    N = np.block([[np.array([[np.trace(S)]]), np.array([d])], [np.array(d)[:, None], S + S.T - np.trace(S) * np.eye(3)]])
    values, vectors = np.linalg.eigh(N)
    w, x, y, z = vectors[:, -1]
    turn = np.array([[1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
                     [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
                     [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)]])  # fmt: skip
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
    loops = [sum(math.dist(p, g) for p, g in zip(*frame, strict=True)) / 17 for frame in zip(a, b, strict=True)]
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
    np.testing.assert_allclose(pa_mpjpe(pred, gt), [horn(*pair) for pair in zip(pred, gt, strict=True)], rtol=1e-6)


@settings(max_examples=40, deadline=None)
@given(seeds)
def test_pa_mpjpe_does_not_see_where_how_large_or_how_turned_the_prediction_is(seed):
    rng = np.random.default_rng(seed)
    gt, pred = poses(rng), poses(rng)
    moved = np.stack([rng.uniform(0.1, 10) * p @ rotation(rng).T + rng.normal(size=3) * 500 for p in pred])
    expected = pa_mpjpe(pred, gt)
    np.testing.assert_allclose(pa_mpjpe(moved, gt), expected)
    turn = rotation(rng)
    np.testing.assert_allclose(pa_mpjpe(pred, 2 * gt @ turn.T + 7), 2 * expected)
    order, joints = rng.permutation(5), rng.permutation(17)
    np.testing.assert_allclose(pa_mpjpe(pred[order], gt[order]), expected[order])  # frames are on their own
    np.testing.assert_allclose(pa_mpjpe(pred[:, joints], gt[:, joints]), expected)
    # Least squares: no worse than no alignment in root mean square, which is never below the mean distance.
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
    assert pa_mpjpe(gt[1:2] * [-1, 1, 1], gt[1:2]).max() < 1e-6  # a flat mirror image can be turned over
    point = np.full_like(gt, 123.0)
    spread = np.linalg.norm(gt - gt.mean(1, keepdims=True), axis=-1).mean(-1)
    np.testing.assert_allclose(pa_mpjpe(point, gt), spread)  # a point is shifted to the mean, no more
    np.testing.assert_allclose(pa_mpjpe(gt, point), 0, atol=1e-9)
    np.testing.assert_allclose(pa_mpjpe(point, point), 0, atol=1e-9)


def test_metrics_take_tensors_and_leave_their_input_alone():
    rng = np.random.default_rng(0)
    pred, gt = poses(rng), poses(rng)
    before = pred.copy(), gt.copy()
    for metric in (mpjpe, pa_mpjpe):
        np.testing.assert_allclose(metric(torch.from_numpy(pred), torch.from_numpy(gt)), metric(pred, gt))
        np.testing.assert_allclose(metric(pred.astype(np.float32), gt.astype(np.float32)), metric(pred, gt), rtol=1e-5)
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
        expected.append(np.mean([cos[i, i] for i in range(16)])
                        - np.mean([cos[i, k] for i in range(16) for k in range(16) if i != k]))  # fmt: skip
    found = alignment(torch.from_numpy(zh_s), torch.from_numpy(zh_d))
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(alignment(5 * torch.from_numpy(zh_s), torch.from_numpy(zh_d) / 7), expected)
    tied = torch.eye(16)[None]
    assert alignment(tied, tied.repeat_interleave(3, 1)).item() == pytest.approx(1)
    assert alignment(torch.ones(1, 16, 4), torch.ones(1, 48, 4)).item() == pytest.approx(0)


# --------------------------------------------------------------------------------------------------
# Averages and tables


def test_summarize_tells_the_mean_of_actions_from_the_mean_of_frames():
    rows = dict(error=np.array([1.0, 1, 1, 5, 9]), action=np.array([0.0, 0, 0, 2, -1]), occluded=np.array([1.0, 0, 0, 0, 1]))
    s = summarize(rows, ["jump", "kick", "walk"])["error"]
    assert s["per_action"] == {"unknown": 9, "jump": 1, "walk": 5}  # no kick, no line for it
    assert s["actions"] == 5 and s["frames"] == pytest.approx(17 / 5)
    assert s["occluded"] == 5 and s["clear"] == pytest.approx(7 / 3)


def test_summarize_never_makes_up_a_number():
    rows = dict(error=np.array([np.nan, 2, np.nan]), action=np.array([0.0, 1, 0]), occluded=np.array([1.0, 0, 1]))
    s = summarize(rows, ["jump", "kick"])["error"]
    assert s == dict(actions=2, frames=2, occluded=None, clear=2, per_action={"jump": None, "kick": 2})


def test_number():
    assert number([3.14159]) == "3.1" and number([3.14159], 3) == "3.142"
    assert number([1.0, 3.0]) == "2.0 ± 1.4"
    assert number([]) == number([None]) == "-"


def test_table_is_aligned_markdown():
    text = table(["name", "x"], [["a", "1.0"], ["longer", "-"]])
    assert text == "| name   |   x |\n| ------ | --: |\n| a      | 1.0 |\n| longer |   - |"


# --------------------------------------------------------------------------------------------------
# A real run


def main(monkeypatch, folder, *args, name="tiny"):
    with monkeypatch.context() as m:
        m.chdir(folder)
        m.setattr(sys, "argv", ["evaluate.py", "--name", name, "--device", "cpu", *map(str, args)])
        evaluate.main()


@pytest.fixture(scope="module")
def data(tiny_data):
    return f"{tiny_data}/tiny"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the tiny run: evaluate.py writes into it."""
    folder = tmp_path_factory.mktemp("evaluated")
    shutil.copytree(tiny_run / "runs", folder / "runs")
    return folder


@pytest.fixture(scope="module")
def result(run, data):
    """`python evaluate.py --seeds 2` as a user runs it. -> (folder, what it printed, evaluation.json)."""
    before = {p.name: p.read_bytes() for p in (run / "runs/tiny").iterdir()}
    command = [sys.executable, SCRIPT, "--name", "tiny", "--data", data, "--seeds", "2", "--device", "cpu"]
    done = subprocess.run(command, cwd=run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = {p.name: p.read_bytes() for p in (run / "runs/tiny").iterdir()}
    assert after.keys() - before.keys() == {"table.md", "evaluation.json"}  # and no half-written file
    assert all(after[name] == before[name] for name in before)

    def strict(constant):
        raise AssertionError(f"evaluation.json holds {constant}, which is not JSON")

    return done.stdout, json.loads(after["evaluation.json"], parse_constant=strict)


def saved(run, stem):
    return torch.load(run / "runs" / "tiny" / f"{stem}.pt", weights_only=True)


@pytest.fixture(scope="module")
def model(run):
    parts = saved(run, "stage1"), saved(run, "stage2")
    hipart = HiPART(Config(**parts[1]["config"]))
    hipart.msst.load_state_dict(parts[0]["model"])
    hipart.hiarm.load_state_dict(parts[1]["model"])
    return hipart.eval()


def arrays(data, split, kind="detected"):
    """A split read without train.py: normalised x_s, x_d, x_f, conf, and the raw arrays."""
    a = {k: np.array(v) for k, v in load("tiny", split, Path(data).parent)[0].items()}
    conf = torch.from_numpy(a["conf"]) if kind == "detected" else torch.ones(len(a["x_s"]), 17)
    x_s = torch.from_numpy(a["x_s_det"] if kind == "detected" else a["x_s"])
    t = {k: normalize_screen(torch.from_numpy(a[k]), 1000, 1000) for k in ("x_d", "x_f")}
    return normalize_screen(x_s, 1000, 1000) * (conf > 0)[..., None], conf, t["x_d"], t["x_f"], a


def averages(values, a, names=("jump", "kick", "punch", "walk")):
    per_action = {names[k]: values[a["action"] == k].mean() for k in np.unique(a["action"])}
    return dict(per_action=per_action, actions=np.mean(list(per_action.values())), frames=values.mean())


def assert_average(found, values, a):
    expected = averages(np.asarray(values, np.float64), a)
    assert found["per_action"] == pytest.approx(expected["per_action"], rel=1e-4)
    assert found["actions"] == pytest.approx(expected["actions"], rel=1e-4)
    assert found["frames"] == pytest.approx(expected["frames"], rel=1e-4)


@pytest.mark.parametrize("split", ["test", "unseen"])
@pytest.mark.parametrize("name", train.FEEDS)
def test_3d_errors_are_true(result, run, data, model, split, name):
    x_s, conf, x_d, x_f, a = arrays(data, split, "clean" if name.endswith("_clean") else "detected")
    if name == "generated":
        x_d, x_f = model.densify(x_s, conf)
    elif name == "regressor":
        regressor = Regressor(32)
        regressor.load_state_dict(saved(run, "regressor")["model"])
        x_d, x_f = regressor.eval().densify(x_s, conf)
    x = x_s if "sparse" in name or name == "auxiliary" else torch.cat([x_s, x_d, x_f], 1)
    for seed in (0, 1):
        checkpoint = saved(run, f"stage3_{name}_{seed}")
        lifter = train.new_lifter(Config(**checkpoint["config"]), name)
        lifter.load_state_dict(checkpoint["model"])
        with torch.no_grad():
            y = lifter.eval()(x, conf).numpy()
        assert_average(result[1]["splits"][split][f"mpjpe/{name}/{seed}"], np.linalg.norm(y - a["y"], axis=-1).mean(1), a)
        pa = [horn(*pair) for pair in zip(y.astype(np.float64), a["y"], strict=True)]
        assert_average(result[1]["splits"][split][f"pa_mpjpe/{name}/{seed}"], pa, a)


def test_missing_joints_between_their_neighbours():
    x = torch.randn(1, 17, 2).expand(4, 17, 2).clone()
    conf = torch.ones(4, 17)
    conf[0, 2] = 0  # the right knee: between hip and ankle
    conf[1, [5, 6]] = 0  # left knee and ankle: the end repeats what stands before it
    conf[2, [11, 12, 13]] = 0  # a whole arm
    conf[3] = 0
    seen = conf[..., None] > 0
    filled = interpolate_missing(torch.where(seen, x, torch.nan), conf)
    expected = x.clone()
    expected[0, 2] = (x[0, 1] + x[0, 3]) / 2
    expected[1, [5, 6]] = x[1, 4]
    expected[2, [11, 12, 13]] = x[2, 8]
    expected[3] = 0
    torch.testing.assert_close(filled, expected)
    assert torch.equal(interpolate_missing(x, torch.ones(4, 17)), x)


@pytest.mark.parametrize("split", ["test", "unseen"])
@pytest.mark.parametrize("name", ["sparse", "generated", "regressor"])
def test_seen_and_missing_joints_apart_are_true(result, run, data, model, split, name):
    x_s, conf, _, _, a = arrays(data, split)
    checkpoint = saved(run, f"stage3_{name}_1")
    lifter = train.new_lifter(Config(**checkpoint["config"]), name)
    lifter.load_state_dict(checkpoint["model"])
    dense = model
    if name == "regressor":
        dense = Regressor(32)
        dense.load_state_dict(saved(run, "regressor")["model"])
    inputs = {name: (x_s, conf)}
    if name != "regressor":  # every sample, also those that miss nothing
        inputs[f"{name} interpolated"] = interpolate_missing(x_s, conf), torch.ones_like(conf)
    assert (conf == 0).any() and not (conf == 0).all(1).any()
    for label, (x, c) in inputs.items():
        with torch.no_grad():
            points = x if name == "sparse" else torch.cat([x, *dense.eval().densify(x, c)], 1)
            off = np.linalg.norm(lifter.eval()(points, c).numpy() - a["y"], axis=-1)
        for which, mask in (("seen", conf.numpy() > 0), ("missing", conf.numpy() == 0)):
            rows = [o[m].mean() for o, m in zip(off, mask, strict=True) if m.any()]
            assert result[1]["splits"][split][f"{which}/{label}/1"]["frames"] == pytest.approx(np.mean(rows), rel=1e-4)
    assert "missing joints interpolated" in result[0]


@pytest.mark.parametrize("split", ["val", "test", "unseen"])
@pytest.mark.parametrize("kind", ["detected", "clean"])
def test_2d_errors_are_true(result, data, model, split, kind):
    x_s, conf, _, x_f, a = arrays(data, split, kind)
    s, pelvis = result[1]["splits"][split], detected_pelvis(x_s, conf)
    truth, sight = to_model_frame(x_f, pelvis), to_model_frame(x_s, pelvis)
    with torch.no_grad():
        q_s, q_d = model.msst.encode(truth)
        logits_s, logits_d = model.hiarm(sight, q_s, q_d, conf)
        guess_s, guess_d = logits_s.argmax(-1), logits_d.argmax(-1)
        made = dict(floor=from_model_frame(model.msst.decode(q_s, q_d)[1], pelvis), generated=model.densify(x_s, conf)[1],
                    teacher=from_model_frame(model.msst.decode(guess_s, guess_d)[1], pelvis))
    for what, x in made.items():
        px = ((x - x_f).numpy().astype(np.float64) ** 2).sum(-1) ** 0.5 * 500
        assert_average(s[f"px/{kind}/{what}"], px.mean(1), a)
        assert_average(s[f"percent/{kind}/{what}"], px.mean(1) / a["height_px"] * 100, a)
    assert_average(s[f"accuracy_s/{kind}"], (guess_s == q_s).float().mean(1) * 100, a)
    assert_average(s[f"accuracy_d/{kind}"], (guess_d == q_d).float().mean(1) * 100, a)
    if kind == "clean":
        assert s["px/clean/input"]["frames"] < 1e-3
    else:
        off = [np.mean([math.dist(*p) for p, c in zip(zip(d, t, strict=True), cs, strict=True) if c > 0])
               for d, t, cs in zip(a["x_s_det"], a["x_s"], a["conf"], strict=True)]  # fmt: skip
        assert_average(s["px/detected/input"], off, a)
        hidden = [any(c < 0.5 for c in row) for row in a["conf"]]  # a missing joint has confidence 0
        assert s["occluded"]["frames"] == pytest.approx(np.mean(hidden))
        error = s["mpjpe/sparse/0"] if split != "val" else None
        if error:
            mix = np.mean(hidden) * (error["occluded"] or 0) + (1 - np.mean(hidden)) * (error["clear"] or 0)
            assert mix == pytest.approx(error["frames"])


def test_codebook_numbers_are_true(result, run, data):
    checkpoint = saved(run, "stage1")
    msst = MSST(Config(**checkpoint["config"]))
    msst.load_state_dict(checkpoint["model"])
    for split, report in result[1]["codebooks"].items():
        x_s, conf, _, x_f, _ = arrays(data, split)
        with torch.no_grad():
            tokens = dict(zip("sd", msst.eval().encode(to_model_frame(x_f, detected_pelvis(x_s, conf))), strict=True))
        for level, K in (("s", 16), ("d", 24)):
            share = np.array([(tokens[level] == k).sum().item() for k in range(K)]) / tokens[level].numel()
            assert report[f"dead_{level}"] == pytest.approx((share == 0).mean())
            entropy = -sum(p * math.log(p) for p in share if p > 0)
            assert report[f"perplexity_{level}"] == pytest.approx(math.exp(entropy), rel=1e-4)


def cells(text, heading, row):
    """The cells of the first line that starts with `row`, after the line with `heading`."""
    for line in text[text.index(heading) :].splitlines():
        if line.startswith(f"| {row}"):
            return [c.strip() for c in line.strip("|").split("|")][1:]
    raise AssertionError(f"no row {row!r} after {heading!r}")


def test_tables_show_these_numbers(result, run):
    text, numbers = result
    assert (run / "runs/tiny/table.md").read_text() in text  # what is printed is what is written
    test = numbers["splits"]["test"]
    b, a = ([test[f"mpjpe/{f}/{seed}"] for seed in (0, 1)] for f in ("generated", "sparse"))
    means = [np.mean([s["actions"] for s in x]) for x in (b, a)]
    found = cells(text, "3D error on `test`", "b  sparse + generated")
    assert found[0] == f"{means[0]:.1f} ± {abs(b[0]['actions'] - b[1]['actions']) / math.sqrt(2):.1f}"
    assert found[1].startswith(f"{np.mean([s['frames'] for s in b]):.1f} ±")
    assert found[4] == f"{means[0] / means[1]:.2f}" and found[-1] == "42.0"
    assert cells(text, "3D error on `test`", "-  clean sparse only")[5:7] == ["-", "-"]  # nothing is occluded there
    assert cells(text, "3D error on `unseen`", "kick")  # its one action
    px, percent = (numbers["splits"]["unseen"][f"{k}/detected/generated"]["frames"] for k in ("px", "percent"))
    assert cells(text, "Where the 2D", "detected: HiARM, free")[3] == f"{px:.1f} ({percent:.1f} %)"
    train_px = numbers["splits"]["train"]["px/clean/floor"]["frames"]
    assert cells(text, "Where the 2D", "clean: tokenizer alone")[0].startswith(f"{train_px:.1f} (")
    assert not re.search(r"\bnan\b|None|\binf\b", text)


def test_the_top_says_what_was_run(result):
    top = result[0][: result[0].index("3D error")]
    for part in ("runs/tiny", "K_s 16 (2048)", "lifter mlp (spatial)", "train 64, val 32, test 32, unseen 32",
                 "14 lifters", "stage 1", torch.__version__, "on cpu"):  # fmt: skip
        assert part in top, part
    assert re.search(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", top)
    assert "Human3.6M, the paper's data set and not this one" in result[0]


def test_numbers_do_not_depend_on_how_a_split_is_read(result, run, data, model, monkeypatch):
    monkeypatch.setattr(train.Split.blocks, "__defaults__", (None, False, 5))
    split = train.Split(data, "test", torch.device("cpu"))
    regressor = Regressor(32)
    regressor.load_state_dict(saved(run, "regressor")["model"])
    rows = evaluate.measure(split, model.requires_grad_(False), regressor.eval(), {})
    found, expected = summarize(rows, split.meta["actions"]), result[1]["splits"]["test"]
    for column in found:
        assert found[column]["frames"] == pytest.approx(expected[column]["frames"], rel=1e-4, abs=1e-4), column


def test_one_seed_has_no_spread(run, data, monkeypatch, capsys, result):
    main(monkeypatch, run, "--data", data)
    text = capsys.readouterr().out
    assert "±" not in text
    expected = result[1]["splits"]["test"]["mpjpe/sparse/0"]["actions"]
    assert cells(text, "3D error on `test`", "a  detected")[0] == f"{expected:.1f}"


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
    done = subprocess.run([sys.executable, SCRIPT, "--name", "nowhere"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    said = done.stderr.strip()
    assert "\n" not in said and "nowhere" in said and "python train.py --name nowhere --stage 1" in said
    assert list(tmp_path.iterdir()) == []


def test_missing_data_are_said(run, tmp_path, monkeypatch, capsys):
    assert "prepare_data.py" in refused(monkeypatch, capsys, run, "--data", tmp_path / "none")


@pytest.mark.parametrize("stem", ["stage1", "stage2", "regressor", "stage3_generated_0", "stage3_sparse_1"])
@pytest.mark.parametrize("damage", ["gone", "cut", "unfinished"])
def test_a_missing_or_damaged_checkpoint_is_said(tiny_run, data, tmp_path, monkeypatch, capsys, stem, damage):
    shutil.copytree(tiny_run / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("*.npy"))
    path = tmp_path / "runs" / "tiny" / f"{stem}.pt"
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    else:
        content = torch.load(path, weights_only=True)
        torch.save(content | dict(epoch=content["epoch"] - 1), path)
    said = refused(monkeypatch, capsys, tmp_path, "--data", data, "--seeds", "2")
    assert stem in said
    if damage == "gone":
        stage = {"stage1": 1, "stage2": 2}.get(stem, 3)
        assert f"--stage {stage}" in said and ("--seeds 2" in said or not stem.endswith("_1"))
    assert not (tmp_path / "runs" / "tiny" / "table.md").exists()


def test_senseless_options_are_said(run, data, monkeypatch, capsys):
    assert "--seeds" in refused(monkeypatch, capsys, run, "--data", data, "--seeds", 0)
    if not torch.cuda.is_available():
        assert "--device" in refused(monkeypatch, capsys, run, "--data", data, "--device", "cuda")


# --------------------------------------------------------------------------------------------------
# Joints hidden on purpose


def test_the_box_is_a_square_around_the_person():
    low, side = evaluate.person_box(np.array([[[0.0, 0.0], [2, 10], [1, 5]], [[5, 1], [1, 1], [3, 1]]]))
    assert side.ravel().tolist() == [12, pytest.approx(4.8)]
    np.testing.assert_allclose(low[:, 0], [[1 - 6, 5 - 6], [3 - 2.4, 1 - 2.4]])


def test_masks_and_crops_hide_their_share(monkeypatch):
    """Points spread evenly over the box: the hidden ones are that share of it, in one square or along one side."""
    monkeypatch.setattr(evaluate, "person_box", lambda x: (np.zeros((len(x), 1, 2)), np.ones((len(x), 1, 1))))
    grid = np.stack(np.meshgrid(*[(np.arange(50) + 0.5) / 50] * 2), -1).reshape(-1, 2)
    corners, sides = set(), set()
    for label, hidden in evaluate.under_masks_and_crops(np.tile(grid, (40, 1, 1)), np.random.default_rng(0)).items():
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
                sides.add((int(extent.argmin()), bool(points[:, extent.argmin()].mean() < 0.5)))
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
        expected = [[x <= p[0] < x + size and y <= p[1] < y + size for p in at] for x in starts for y in starts]
        assert sorted(hidden[i].tolist()) == sorted(map(list, np.array(expected).tolist()))
    assert hidden.any(1).all()  # every joint is under some patch


def test_errors_under_covers_against_a_loop(run, data, model, monkeypatch, capsys, result):
    """The table of `--occlusion` on a tiny run: patches recomputed position by position, masks by a run of their own."""
    main(monkeypatch, run, "--data", data, "--occlusion")
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| keypoint")]
    shown = {line[1].strip(): line[2:-1] for line in lines}
    assert len(shown) == len(evaluate.MASKS) + len(evaluate.CROPS) + len(evaluate.PATCHES)
    assert (run / "runs/tiny/occlusion.md").is_file()
    split = train.Split(data, "test", torch.device("cpu"))
    lifter = train.new_lifter(Config(**saved(run, "stage3_sparse_0")["config"]), "sparse")
    lifter.load_state_dict(saved(run, "stage3_sparse_0")["model"])
    block, joints = split.read(slice(0, split.n)), split.read(slice(0, split.n), clean=True)["x_s"].numpy()
    hidden = evaluate.under_patches(joints, 80)
    worst = []
    with torch.no_grad():
        lifter.eval()
        for i in range(0, split.n, 10):
            conf = block["conf"][i] * torch.from_numpy(~hidden[i])
            y = lifter(block["x_s"][i] * (conf > 0)[..., None], conf)
            off = (y - block["y"][i]).norm(dim=-1).numpy()
            worst.append(max(off[p][~hidden[i, p]].mean() for p in range(256) if not hidden[i, p].all()))
    assert float(shown["keypoint-AdvOcc@80, worst of 256 places"][1]) == pytest.approx(np.mean(worst), abs=0.051)
    plain = [result[1]["splits"]["test"][f"mpjpe/{name}/0"]["frames"] for name in evaluate.HIDDEN_FEEDS]
    assert [float(cell) for cell in shown["keypoint-mask 0.0"][1:]] == pytest.approx(plain, abs=0.051)
    gone = 100 * float((block["conf"] == 0).float().mean())
    assert float(shown["keypoint-mask 0.0"][0].strip(" %")) == pytest.approx(gone, abs=0.51)
    shares = [float(shown[f"keypoint-mask {m}"][0].strip(" %")) for m in evaluate.MASKS]
    assert shares == sorted(shares) and shares[-1] > 85


def test_fourteen_joints_are_moved_to_their_pelvis(run, data, model, monkeypatch):
    """3DPW's protocol, if the data name the joints: the predicted pelvis moves onto the true one, then 14 joints count."""
    split = train.Split(data, "test", torch.device("cpu"))
    split.meta = split.meta | {"joints_14": [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16]}
    lifter = train.new_lifter(Config(**saved(run, "stage3_sparse_0")["config"]), "sparse").eval()
    lifter.load_state_dict(saved(run, "stage3_sparse_0")["model"])
    regressor = Regressor(32)
    regressor.load_state_dict(saved(run, "regressor")["model"])
    rows = evaluate.measure(split, model.requires_grad_(False), regressor.eval(), {("sparse", 0): lifter})
    block = split.read(slice(0, split.n))
    with torch.no_grad():
        y = lifter(block["x_s"], block["conf"]).numpy().astype(np.float64)
    assert np.abs(y[:, 0]).max() > 0.1  # it does not put the pelvis at 0 by itself
    keep = [j for j in range(17) if j not in (0, 7, 9)]
    expected = [np.mean([math.dist(y[i, j] - y[i, 0], block["y"][i, j].double()) for j in keep]) for i in range(split.n)]
    np.testing.assert_allclose(rows["mpjpe_14/sparse/0"], expected, rtol=1e-4)
    fitted = [horn((y[i] - y[i, 0])[keep], block["y"][i].double().numpy()[keep]) for i in range(split.n)]
    np.testing.assert_allclose(rows["pa_mpjpe_14/sparse/0"], fitted, rtol=1e-4)
    columns = {f"{m}_14/{f}/0": rows[f"{m}_14/sparse/0"] for m in ("mpjpe", "pa_mpjpe") for f in train.FEEDS}
    summary = summarize({k: rows[k] for k in ("action", "occluded")} | columns, split.meta["actions"])
    caption, text = evaluate.protocol_14(summary, 1)
    assert "predicted pelvis" in caption and f"| {np.mean(expected):.1f} |" in text.replace("  ", " ")
    assert evaluate.protocol_14({}, 1) == []


def test_other_data_leave_the_runs_own_tables_alone(run, data, tmp_path, monkeypatch, capsys, result):
    """As 3DPW is: no training split, no dense points, its own words and protocol."""
    other = tmp_path / "other"
    shutil.copytree(data, other)
    meta = json.loads((other / "meta.json").read_text())
    meta["splits"] = {"test": {"n": 32, "fits": 0, "about": "people in the street"}}
    (other / "meta.json").write_text(json.dumps(meta | {"joints_14": [1, 2, 3], "noise": None, "source": "3dpw"}))
    np.save(other / "test/fit.npy", np.zeros(32, bool))
    before = (run / "runs/tiny/table.md").read_bytes()
    main(monkeypatch, run, "--data", other)
    text = (run / "runs/tiny/table_other.md").read_text()
    assert (run / "runs/tiny/table.md").read_bytes() == before and (run / "runs/tiny/evaluation_other.json").is_file()
    assert "(people in the street; 0 of 32 samples have true dense" in text and "14 joints" in text
    assert cells(text, "3D error on `test`", "c  sparse + ground")[:5] == ["-"] * 5  # nothing to compare with
    assert re.fullmatch(r"[0-9.]+", cells(text, "3D error on `test`", "b  sparse + gen")[0])
    assert not re.search(r"\bnan\b|None|\binf\b|## Tokenizer", text)
