"""sample.py: the numbers behind the pictures, the way up, and the script end to end without a display."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import sample
import train
from evaluate import alignment
from hipart import Config, HiPART, detected_pelvis, normalize_screen, to_model_frame
from prepare_data import load

SCRIPT = Path(sample.__file__)
FIGURES = {"overview.png", "poses_random.png", "poses_worst.png", "similarity.png", "swap.png"}


@pytest.fixture(scope="module")
def data(tiny_data):
    return f"{tiny_data}/tiny"


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the tiny run, and a second one without L_local: sample.py writes into it."""
    folder = tmp_path_factory.mktemp("drawn")
    shutil.copytree(tiny_run / "runs", folder / "runs", ignore=shutil.ignore_patterns("*.npy"))
    (folder / "runs/no_local").mkdir()
    first = torch.load(folder / "runs/tiny/stage1.pt", weights_only=True)
    torch.save(first | dict(config=first["config"] | dict(lambda_l=0.0)), folder / "runs/no_local/stage1.pt")
    return folder


@pytest.fixture(scope="module")
def model(run):
    parts = [torch.load(run / f"runs/tiny/stage{s}.pt", weights_only=True) for s in (1, 2)]
    hipart = HiPART(Config(**parts[1]["config"]))
    hipart.msst.load_state_dict(parts[0]["model"])
    hipart.hiarm.load_state_dict(parts[1]["model"])
    return hipart.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def lifter(run):
    checkpoint = torch.load(run / "runs/tiny/stage3_generated_0.pt", weights_only=True)
    lifter = train.new_lifter(Config(**checkpoint["config"]), "generated")
    lifter.load_state_dict(checkpoint["model"])
    return lifter.eval()


@pytest.fixture(scope="module")
def arrays(tiny_data):
    return {k: np.array(v) for k, v in load("tiny", "test", tiny_data)[0].items()}


@pytest.fixture(scope="module")
def x_f(arrays):
    """Fine poses of the test split in the model frame."""
    x_s, conf = normalize_screen(torch.from_numpy(arrays["x_s_det"]), 1000, 1000), torch.from_numpy(arrays["conf"])
    pelvis = detected_pelvis(x_s * (conf > 0)[..., None], conf)
    return to_model_frame(normalize_screen(torch.from_numpy(arrays["x_f"]), 1000, 1000), pelvis)


def main(monkeypatch, folder, *args, name="tiny"):
    with monkeypatch.context() as m:
        m.chdir(folder)
        m.setattr(sys, "argv", ["sample.py", "--name", name, "--device", "cpu", *map(str, args)])
        sample.main()


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_predict_gives_pixels_and_millimetres_of_the_rows_asked_for(data, model, lifter, arrays):
    rows = np.array([7, 3, 30])
    p = sample.predict(train.Split(data, "test", torch.device("cpu")), model, lifter, rows)
    for name in ("x_s", "x_d", "x_f"):
        np.testing.assert_allclose(p[f"true_{name}"], arrays[name][rows], atol=1e-2)
    np.testing.assert_array_equal(p["true_y"], arrays["y"][rows])
    np.testing.assert_array_equal(p["action"], arrays["action"][rows])
    for i, row in enumerate(rows):
        seen = arrays["conf"][row] > 0
        np.testing.assert_allclose(p["x_s"][i][seen], arrays["x_s_det"][row][seen], atol=1e-2)
        off = [math.dist(a, b) for a, b in zip(arrays["x_s_det"][row][seen], arrays["x_s"][row][seen], strict=True)]
        assert p["px_s"][i] == pytest.approx(np.mean(off), rel=1e-3)
        x_s = normalize_screen(torch.from_numpy(arrays["x_s_det"][row : row + 1]), 1000, 1000)
        conf = torch.from_numpy(arrays["conf"][row : row + 1])
        x_s = x_s * (conf > 0)[..., None]
        x_d, x_f = model.densify(x_s, conf)
        for level, x in (("d", x_d), ("f", x_f)):
            px = (x[0].numpy() + 1) * 500  # a square image of 1000 px
            np.testing.assert_allclose(p[f"x_{level}"][i], px, atol=1e-2)
            error = np.linalg.norm(px - arrays[f"x_{level}"][row], axis=1).mean()
            assert p[f"px_{level}"][i] == pytest.approx(error, rel=1e-3)
        assert p["percent"][i] == pytest.approx(100 * p["px_f"][i] / arrays["height_px"][row], rel=1e-5)
        with torch.no_grad():
            y = lifter(torch.cat([x_s, x_d, x_f], 1), conf)[0].numpy()
        np.testing.assert_allclose(p["y"][i], y, atol=0.5)
        assert p["mm"][i] == pytest.approx(np.linalg.norm(y - arrays["y"][row], axis=1).mean(), rel=1e-3)


def test_swaps_change_one_token_and_measure_what_moves(model, x_f):
    moved, poses = sample.swaps(model.msst, x_f)
    assert moved.shape == (2, len(x_f), 16, 16)
    q_s, q_d = model.msst.encode(x_f)
    kept = model.msst.decode(q_s, q_d)[1]
    np.testing.assert_allclose(poses["kept"], kept.numpy())
    n, i = 5, 9  # pose 5 gets token 9 of pose 4
    for level in (0, 1):
        s, d = q_s[n : n + 1].clone(), q_d[n : n + 1].clone()
        (s if level == 0 else d)[0, i if level == 0 else 3 * i] = (q_s[n - 1, i], q_d[n - 1, 3 * i])[level]
        new = model.msst.decode(s, d)[1][0]
        np.testing.assert_allclose(poses[level, i][n], new.numpy(), atol=1e-5)
        shift = (new - kept[n]).norm(dim=-1)
        np.testing.assert_allclose(moved[level, n, i], [shift[6 * k : 6 * k + 6].mean() for k in range(16)], atol=1e-5)
    same, _ = sample.swaps(model.msst, x_f[:1].expand(4, -1, -1))
    assert np.abs(same).max() < 1e-5  # the other pose is the same one: nothing moves


def test_similarities(model, x_f):
    s = sample.similarities(model.msst, x_f, "first")
    C_s, C_d = (q.codebook.numpy() / np.linalg.norm(q.codebook.numpy(), axis=1, keepdims=True)
                for q in (model.msst.Q_s, model.msst.Q_d))  # fmt: skip
    np.testing.assert_allclose(s["sparse"], C_s @ C_s.T, atol=1e-5)
    np.testing.assert_allclose(s["dense"], C_d @ C_d.T, atol=1e-5)
    np.testing.assert_allclose(s["across"], C_d @ C_s.T, atol=1e-5)  # dense down, sparse across
    o = model.msst(x_f)
    assert s["alignment"] == pytest.approx(alignment(o["zh_s"], o["zh_d"]).mean().item(), abs=1e-5)
    own = np.diag(s["parts"]).mean()
    assert s["alignment"] == pytest.approx(own - (s["parts"].sum() - 16 * own) / 240, abs=1e-5)
    cosine = [torch.cosine_similarity(o["zh_s"][b, 2], o["zh_d"][b, 15:18].mean(0), dim=0) for b in range(len(x_f))]
    assert s["parts"][2, 5] == pytest.approx(np.mean(cosine), abs=1e-5)
    mixed = sample.similarities(model.msst, x_f, "random")
    np.testing.assert_allclose(np.sort(mixed["sparse"].ravel()), np.sort(s["sparse"].ravel()), atol=1e-5)  # all 16 codes
    assert not np.allclose(mixed["sparse"], s["sparse"])
    np.testing.assert_array_equal(mixed["sparse"], sample.similarities(model.msst, x_f, "random")["sparse"])


def test_100_codes_at_the_most():
    from hipart import MSST

    msst = MSST(Config(D=8, K_s=120, K_d=130, encoder_blocks=1, encoder_width=8, decoder_width=8, token_hidden=4)).eval()
    for tokens in ("first", "random"):
        s = sample.similarities(msst, torch.randn(2, 96, 2), tokens)
        assert s["sparse"].shape == s["dense"].shape == s["across"].shape == (100, 100) and s["parts"].shape == (16, 16)


def test_the_overview_shows_a_hidden_limb_of_typical_error():
    rng = np.random.default_rng(0)
    p = dict(conf=np.ones((40, 17)), mm=rng.permutation(40).astype(float), true_x_s=np.zeros((40, 17, 2)))
    hidden = [3, 8, 15, 22, 30]
    p["conf"][np.ix_(hidden, [12, 13])] = 0  # elbow and wrist of the left arm
    p["conf"][5, [3, 6]] = 0  # two joints, but of two legs
    p["conf"][6, [2, 3, 15, 16]] = 0  # a leg and an arm
    p["conf"][7, [7, 8, 9, 12, 13]] = 0  # an arm and much else
    assert sample.typical_occlusion(p) in hidden
    p["mm"][hidden] = [5, 1, 3, 2, 4]
    assert sample.typical_occlusion(p) in (15, 30)  # the middle fifth, both ends included
    p["true_x_s"][30, 0, 1] = 100  # the taller one
    assert sample.typical_occlusion(p) == 30
    p["conf"][:] = 1
    assert 0 <= sample.typical_occlusion(p) < 40  # nobody is occluded


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_poses_stand_upright():
    """Image: y grows downwards. 3D: the camera's y is down, so the head, at negative y, must be drawn at the top."""
    x = np.stack([np.linspace(400, 600, 17), np.linspace(100, 900, 17)], 1)
    p = dict(true_x_s=x[None], true_x_f=np.repeat(x, 6, 0)[None][:, :96], x_f=np.repeat(x, 6, 0)[None][:, :96])
    fig = sample.plt.figure()
    ax = fig.add_subplot(1, 2, 1)
    sample.flat(ax, p, 0)
    assert ax.get_ylim()[0] > 900 > 100 > ax.get_ylim()[1] and ax.get_aspect() == 1
    assert ax.get_xlim()[0] < 400 < 600 < ax.get_xlim()[1]
    y = np.zeros((17, 3))
    y[:, 1] = np.arange(17) * -100.0  # joint j is j * 100 mm above the pelvis
    y[:, 2] = np.arange(17)  # and a little further away
    ax = fig.add_subplot(1, 2, 2, projection="3d")
    sample.solid(ax, y, None, y)
    for j, line in enumerate(ax.lines, start=1):
        _, depth, height = line.get_data_3d()
        np.testing.assert_allclose(height, [100 * sample.PARENTS[j], 100 * j])
        np.testing.assert_allclose(depth, [sample.PARENTS[j], j])
    assert ax.get_zlim()[0] <= 0 and ax.get_zlim()[1] >= 1600
    sample.plt.close(fig)


def test_a_bone_with_a_missing_end_is_not_drawn():
    seen = np.ones(17, bool)
    seen[13] = False  # left wrist: one bone
    fig, ax = sample.plt.subplots()
    sample.bones(ax, np.zeros((17, 2)), seen)
    assert len(ax.lines) == 15
    seen[8] = False  # thorax: four more
    fig, ax = sample.plt.subplots()
    sample.bones(ax, np.zeros((17, 2)), seen)
    assert len(ax.lines) == 11
    sample.plt.close("all")


def test_points_have_the_colour_of_their_part():
    assert sample.PART_COLOURS[sample.PART_NAMES.index("left wrist")] == sample.BLUE
    assert sample.PART_COLOURS[sample.PART_NAMES.index("right knee")] == sample.ORANGE
    assert sample.PART_COLOURS[sample.PART_NAMES.index("head")] == sample.DARK


def test_the_script_draws_everything_without_a_display(run, data):
    clean = {k: v for k, v in os.environ.items() if k not in ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")}
    command = [sys.executable, SCRIPT, "--name", "tiny", "--data", data, "--n", "1", "--device", "cpu",
               "--without", "no_local"]  # fmt: skip
    done = subprocess.run(command, cwd=run, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = run / "runs" / "tiny" / "figures"
    assert {f.name for f in figures.iterdir()} == FIGURES  # and nothing half-written
    assert done.stdout.split() == [f"runs/tiny/figures/{name}" for name in
                                   ("overview.png", "poses_random.png", "poses_worst.png", "similarity.png", "swap.png")]
    for f in figures.iterdir():
        image = matplotlib.image.imread(f)
        assert image.shape[1] == 1200 and image[..., :3].std() > 0.02, f.name


def test_more_samples_than_there_are_and_another_split(run, data, monkeypatch):
    drawn = {}
    monkeypatch.setattr(sample, "save", lambda fig, path: (drawn.update({path.name: len(fig.axes)}), sample.plt.close(fig)))
    monkeypatch.setattr(sample, "POOL", 2)
    main(monkeypatch, run, "--data", data, "--split", "unseen", "--n", 9, "--tokens", "random")
    assert drawn["poses_random.png"] == drawn["poses_worst.png"] == 2 * 5
    assert drawn.keys() == FIGURES and drawn["similarity.png"] == 4 + 1  # one row, and its colour bar


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit status 2


@pytest.mark.parametrize("case, words", [
    ("no run", "python train.py --name nowhere --stage 1"), ("no data", "prepare_data.py"),
    ("no lifter", "stage3_generated_0.pt"), ("cut", "stage1.pt is not a readable checkpoint"),
    ("no second run", "--lambda_l 0"), ("n", "--n must be"),
])  # fmt: skip
def test_bad_input_is_said_in_one_sentence(run, data, tmp_path, monkeypatch, capsys, case, words):
    shutil.copytree(run / "runs", tmp_path / "runs")
    name, args = "nowhere" if case == "no run" else "tiny", ["--data", data]
    if case == "no data":
        args = ["--data", tmp_path / "none"]
    elif case == "no lifter":
        (tmp_path / "runs/tiny/stage3_generated_0.pt").unlink()
    elif case == "cut":
        path = tmp_path / "runs/tiny/stage1.pt"
        path.write_bytes(path.read_bytes()[:1000])
    elif case == "no second run":
        args += ["--without", "nowhere"]
    elif case == "n":
        args += ["--n", "0"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(monkeypatch, tmp_path, *args, name=name)
    said = capsys.readouterr().err.strip()
    assert e.value.code == 2 and words in said and "\n" not in said
