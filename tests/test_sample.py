"""sample.py: the numbers behind the pictures, the way up, and the script without a display."""

import json
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
from checkpoints import Run
from evaluate import alignment
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

SCRIPT = Path(sample.__file__)
FIGURES = {
    1: ["reconstruction.png", "similarity.png", "swap.png"],
    2: ["densified.png", "order.png"],
    3: ["curves.png", "overview.png", "poses_random.png", "poses_worst.png"],
}


@pytest.fixture(scope="module")
def data(tiny_data):
    return f"{tiny_data}/tiny"


def copy_runs(source, folder, *left_out):
    skip = shutil.ignore_patterns("*.npy", "figures", "table*", "evaluation*", *left_out)
    shutil.copytree(source / "runs", folder / "runs", ignore=skip)
    return folder


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """A copy of the tiny run, and the first stage of a second one without L_local: sample.py
    writes into it."""
    folder = copy_runs(tiny_run, tmp_path_factory.mktemp("drawn"))
    (folder / "runs/no_local").mkdir()
    first = torch.load(folder / "runs/tiny/stage1.pt", weights_only=True)
    without = first | dict(config=first["config"] | dict(lambda_l=0.0))
    torch.save(without, folder / "runs/no_local/stage1.pt")
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
    lifter = train.new_lifter(Training(**checkpoint["training"]), "generated")
    lifter.load_state_dict(checkpoint["model"])
    return lifter.eval()


@pytest.fixture(scope="module")
def arrays(data):
    return {k: np.array(v) for k, v in load(data, "test")[0].items()}


@pytest.fixture(scope="module")
def x_f(arrays):
    """Fine poses of the test split in the model frame."""
    x_s = normalize_screen(torch.from_numpy(arrays["x_s_det"]), 1000, 1000)
    conf = torch.from_numpy(arrays["conf"])
    pelvis = detected_pelvis(x_s * (conf > 0)[..., None], conf)
    return to_model_frame(normalize_screen(torch.from_numpy(arrays["x_f"]), 1000, 1000), pelvis)


def main(monkeypatch, folder, *args, name="tiny"):
    with monkeypatch.context() as m:
        m.chdir(folder)
        argv = ["sample.py", "--name", name, "--device", "cpu", *map(str, args)]
        m.setattr(sys, "argv", argv)
        sample.main()


# --------------------------------------------------------------------------------------------------
# Numbers

ROWS = np.array([7, 3, 30])


def test_predict_gives_pixels_and_millimetres_of_the_rows_asked_for(data, model, lifter, arrays):
    split = Split(data, "test", torch.device("cpu"))
    p = sample.predict(split, ROWS, model.msst, model, lifter)
    for name in ("x_s", "x_d", "x_f"):
        np.testing.assert_allclose(p[f"true_{name}"], arrays[name][ROWS], atol=1e-2)
    np.testing.assert_array_equal(p["true_y"], arrays["y"][ROWS])
    np.testing.assert_array_equal(p["action"], arrays["action"][ROWS])
    for i, row in enumerate(ROWS):
        visible = arrays["conf"][row] > 0
        detected, true = arrays["x_s_det"][row][visible], arrays["x_s"][row][visible]
        np.testing.assert_allclose(p["x_s"][i][visible], detected, atol=1e-2)
        off = [math.dist(a, b) for a, b in zip(detected, true, strict=True)]
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
        percent = 100 * p["px_f"][i] / arrays["height_px"][row]
        assert p["percent"][i] == pytest.approx(percent, rel=1e-5)
        with torch.no_grad():
            y = lifter(torch.cat([x_s, x_d, x_f], 1), conf)[0].numpy()
        np.testing.assert_allclose(p["y"][i], y, atol=0.5)
        error = np.linalg.norm(y - arrays["y"][row], axis=1).mean()
        assert p["mm"][i] == pytest.approx(error, rel=1e-3)


def test_a_rebuilt_pose_is_the_true_one_encoded_and_decoded(data, model, arrays, x_f):
    """All that is needed is stage 1."""
    split = Split(data, "test", torch.device("cpu"))
    p = sample.predict(split, ROWS, model.msst)
    assert not {"x_d", "x_f", "y", "mm"} & p.keys()
    rebuilt = model.msst.decode(*model.msst.encode(x_f[ROWS]))[1]
    x_s = normalize_screen(torch.from_numpy(arrays["x_s_det"][ROWS]), 1000, 1000)
    conf = torch.from_numpy(arrays["conf"][ROWS])
    pelvis = detected_pelvis(x_s * (conf > 0)[..., None], conf)
    px = (from_model_frame(rebuilt, pelvis).numpy() + 1) * 500
    np.testing.assert_allclose(p["rebuilt"], px, atol=1e-2)
    error = np.linalg.norm(px - arrays["x_f"][ROWS], axis=-1).mean(1)
    np.testing.assert_allclose(p["px_rebuilt"], error, rtol=1e-3)


def test_swaps_change_one_token_and_measure_what_moves(model, x_f):
    moved, poses = sample.swaps(model.msst, x_f)
    assert moved.shape == (2, len(x_f), 16, 16)
    q_s, q_d = model.msst.encode(x_f)
    kept = model.msst.decode(q_s, q_d)[1]
    np.testing.assert_allclose(poses["kept"], kept.numpy())
    n, i = 5, 9  # pose 5 gets token 9 of pose 4
    for level in (0, 1):
        s, d = q_s[n : n + 1].clone(), q_d[n : n + 1].clone()
        if level == 0:
            s[0, i] = q_s[n - 1, i]
        else:
            d[0, 3 * i] = q_d[n - 1, 3 * i]
        new = model.msst.decode(s, d)[1][0]
        np.testing.assert_allclose(poses[level, i][n], new.numpy(), atol=1e-5)
        shift = (new - kept[n]).norm(dim=-1)
        parts = [shift[6 * k : 6 * k + 6].mean() for k in range(16)]
        np.testing.assert_allclose(moved[level, n, i], parts, atol=1e-5)
    same, _ = sample.swaps(model.msst, x_f[:1].expand(4, -1, -1))
    assert np.abs(same).max() < 1e-5  # the other pose is the same one: nothing moves


def test_similarities(model, x_f):
    s = sample.similarities(model.msst, x_f, "first")
    codebooks = (q.codebook.numpy() for q in (model.msst.Q_s, model.msst.Q_d))
    C_s, C_d = (C / np.linalg.norm(C, axis=1, keepdims=True) for C in codebooks)
    np.testing.assert_allclose(s["sparse"], C_s @ C_s.T, atol=1e-5)
    np.testing.assert_allclose(s["dense"], C_d @ C_d.T, atol=1e-5)
    np.testing.assert_allclose(s["across"], C_d @ C_s.T, atol=1e-5)  # dense down, sparse across
    o = model.msst(x_f)
    tied = alignment(o["zh_s"], o["zh_d"]).mean().item()
    assert s["alignment"] == pytest.approx(tied, abs=1e-5)
    own = np.diag(s["parts"]).mean()
    assert s["alignment"] == pytest.approx(own - (s["parts"].sum() - 16 * own) / 240, abs=1e-5)
    cosine = [torch.cosine_similarity(o["zh_s"][b, 2], o["zh_d"][b, 15:18].mean(0), dim=0)
              for b in range(len(x_f))]  # fmt: skip
    assert s["parts"][2, 5] == pytest.approx(np.mean(cosine), abs=1e-5)
    mixed = sample.similarities(model.msst, x_f, "random")
    a, b = (np.sort(x["sparse"].ravel()) for x in (mixed, s))
    np.testing.assert_allclose(a, b, atol=1e-5)  # all 16 codes
    assert not np.allclose(mixed["sparse"], s["sparse"])
    again = sample.similarities(model.msst, x_f, "random")
    np.testing.assert_array_equal(mixed["sparse"], again["sparse"])


def test_similarities_by_part(model, x_f):
    """By loops: who uses a code most, in which order codes come, and how close they are."""
    s = sample.similarities(model.msst, x_f, "parts")
    codes, owners = [], []
    for quantizer, q in zip((model.msst.Q_s, model.msst.Q_d), model.msst.encode(x_f), strict=True):
        uses = np.zeros((16, len(quantizer.codebook)), int)
        for pose in q.numpy():
            for at, code in enumerate(pose):
                uses[at * 16 // len(pose), code] += 1
        used = sorted(np.flatnonzero(uses.sum(0)), key=lambda code: (uses[:, code].argmax(), code))
        C = quantizer.codebook.numpy()[used]
        codes.append(C / np.linalg.norm(C, axis=1, keepdims=True))
        owners.append(uses[:, used].argmax(0))
    for name, down, across in (("sparse", 0, 0), ("dense", 1, 1), ("across", 1, 0)):
        cosine = codes[down] @ codes[across].T
        np.testing.assert_allclose(s[name], cosine, atol=1e-5)
        own, others = [], []
        for i, j in np.ndindex(cosine.shape):
            if name == "across" or i != j:
                same = owners[down][i] == owners[across][j]
                (own if same else others).append(cosine[i, j])
        expected = np.mean(own) - np.mean(others) if own and others else np.nan
        np.testing.assert_allclose(s["apart"][name], expected, atol=1e-5)
    for starts, owner in zip(s["starts"], owners, strict=True):
        assert list(starts) == [sum(owner < part) for part in range(16)]


def test_100_codes_at_the_most():
    msst = MSST(Config(D=8, K_s=120, K_d=130, encoder_blocks=1, encoder_width=8, decoder_width=8,
                       token_hidden=4)).eval()  # fmt: skip
    for tokens in ("first", "random"):
        s = sample.similarities(msst, torch.randn(2, 96, 2), tokens)
        assert s["sparse"].shape == s["dense"].shape == s["across"].shape == (100, 100)
        assert s["parts"].shape == (16, 16)


def test_the_overview_shows_a_hidden_limb_of_typical_error():
    rng = np.random.default_rng(0)
    p = dict(conf=np.ones((40, 17)), mm=rng.permutation(40).astype(float),
             true_x_s=np.zeros((40, 17, 2)))  # fmt: skip
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


# --------------------------------------------------------------------------------------------------
# Pictures


def test_poses_stand_upright():
    """Image: y grows downwards. 3D: the camera's y is down, so the head, at negative y, must be
    drawn at the top."""
    x = np.stack([np.linspace(400, 600, 17), np.linspace(100, 900, 17)], 1)
    fine = np.repeat(x, 6, 0)[None, :96]
    p = dict(true_x_s=x[None], true_x_f=fine, x_f=fine)
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
    visible = np.ones(17, bool)
    visible[13] = False  # left wrist: one bone
    fig, ax = sample.plt.subplots()
    sample.bones(ax, np.zeros((17, 2)), visible)
    assert len(ax.lines) == 15
    visible[8] = False  # thorax: four more
    fig, ax = sample.plt.subplots()
    sample.bones(ax, np.zeros((17, 2)), visible)
    assert len(ax.lines) == 11
    sample.plt.close("all")


def test_points_have_the_colour_of_their_part():
    assert sample.PART_COLOURS[sample.PART_NAMES.index("left wrist")] == sample.BLUE
    assert sample.PART_COLOURS[sample.PART_NAMES.index("right knee")] == sample.ORANGE
    assert sample.PART_COLOURS[sample.PART_NAMES.index("head")] == sample.DARK


def names_up_to(stages):
    return [name for stage in range(1, stages + 1) for name in FIGURES[stage]]


def test_the_script_draws_everything_without_a_display(run, data):
    displays = ("DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND")
    clean = {k: v for k, v in os.environ.items() if k not in displays}
    command = [sys.executable, SCRIPT, "--name", "tiny", "--data", data, "--n", "1",
               "--device", "cpu", "--without", "no_local"]  # fmt: skip
    done = subprocess.run(command, cwd=run, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = run / "runs" / "tiny" / "figures"
    assert sorted(f.name for f in figures.iterdir()) == sorted(names_up_to(3))  # none half-written
    assert done.stdout.split() == [f"runs/tiny/figures/{name}" for name in names_up_to(3)]
    for f in figures.iterdir():
        image = matplotlib.image.imread(f)
        assert image.shape[1] == 1200 and image[..., :3].std() > 0.02, f.name


@pytest.fixture
def drawn(monkeypatch):
    """Instead of files: the figures that a run of the script draws, {name: figure}."""
    figures = {}
    monkeypatch.setattr(sample, "save", lambda fig, path: figures.update({path.name: fig}))
    yield figures
    sample.plt.close("all")


def test_training_samples_have_no_detections_to_draw(run, data, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(monkeypatch, run, "--data", data, "--split", "train")
    assert "choose val, test or unseen" in capsys.readouterr().err


def test_more_samples_than_there_are_and_another_split(run, data, monkeypatch, drawn):
    monkeypatch.setattr(sample, "POOL", 2)
    args = ("--data", data, "--split", "unseen", "--n", 9, "--tokens", "parts")
    main(monkeypatch, run, *args)
    assert list(drawn) == names_up_to(3)
    panels = {name: len(fig.axes) for name, fig in drawn.items()}
    assert panels["poses_random.png"] == panels["poses_worst.png"] == 2 * 5
    assert panels["similarity.png"] == 4 + 1  # one row, and its colour bar
    assert "own part - others" in drawn["similarity.png"].axes[0].get_title()
    names = [label.get_text() for label in drawn["similarity.png"].axes[1].get_yticklabels()]
    assert names and set(names) <= set(sample.PART_NAMES)
    assert panels["densified.png"] == 2 * 4 and panels["reconstruction.png"] == 4
    assert [ax.axison for ax in drawn["reconstruction.png"].axes] == [True, True, False, False]


def test_the_reconstruction_shows_true_and_decoded_points(run, data, model, monkeypatch, drawn):
    main(monkeypatch, run, "--data", data, "--n", 5, name="no_local")  # stage 1 is enough
    split = Split(data, "test", torch.device("cpu"))
    rows = np.random.default_rng(0).permutation(split.n)
    p = sample.predict(split, rows, model.msst)
    fig = drawn["reconstruction.png"]
    assert f"tokenizer: {p['px_rebuilt'].mean():.1f} px, mean of 32 poses" in fig.get_suptitle()
    assert [ax.axison for ax in fig.axes] == [True] * 5 + [False] * 3  # four in a row
    for i, ax in enumerate(fig.axes[:5]):
        ties, rings, dots = ax.collections
        np.testing.assert_allclose(rings.get_offsets(), p["true_x_f"][i], atol=1e-3)
        np.testing.assert_allclose(dots.get_offsets(), p["rebuilt"][i], atol=1e-3)
        ends = np.stack([p["rebuilt"][i], p["true_x_f"][i]], 1)
        np.testing.assert_allclose(np.array(ties.get_segments()), ends, atol=1e-3)
        name = split.meta["actions"][p["action"][i]]
        assert ax.get_title() == f"{name}: {p['px_rebuilt'][i]:.1f} px off"
        low, high = sorted(ax.get_xlim())
        assert low < p["true_x_f"][i, :, 0].min() and p["true_x_f"][i, :, 0].max() < high


def test_the_order_of_generation_is_shown_by_colour(run, data, model, lifter, monkeypatch, drawn):
    """Rows 6i to 6i + 5 of the fine points belong to part i, and the colour bar names the ends."""
    main(monkeypatch, run, "--data", data, "--n", 3)
    split = Split(data, "test", torch.device("cpu"))
    p = sample.predict(split, np.random.default_rng(0).permutation(split.n)[:3], model.msst, model)
    *panels, bar = drawn["order.png"].axes
    for i, ax in enumerate(panels[:3]):
        (dots,) = ax.collections
        np.testing.assert_allclose(dots.get_offsets(), p["x_f"][i], atol=1e-2)
        np.testing.assert_array_equal(dots.get_array(), [k // 6 for k in range(96)])
    assert [ax.axison for ax in panels] == [True] * 3 + [False]
    names = [label.get_text() for label in bar.get_yticklabels()]
    assert names == ["1  right hip", "16  right wrist"]


def test_an_action_may_have_any_name(run, data, tmp_path, monkeypatch, drawn):
    """Between two dollar signs, matplotlib expects mathematics."""
    shutil.copytree(data, tmp_path / "tiny")
    meta = json.loads((tmp_path / "tiny/meta.json").read_text())
    meta["actions"] = ["$^$"] * len(meta["actions"])
    (tmp_path / "tiny/meta.json").write_text(json.dumps(meta))
    main(monkeypatch, run, "--data", tmp_path / "tiny", "--n", 1)
    for name in ("reconstruction.png", "densified.png", "order.png", "poses_random.png"):
        drawn[name].canvas.draw()
    assert drawn["reconstruction.png"].axes[0].get_title().startswith("$^$: ")


# --------------------------------------------------------------------------------------------------
# Runs whose later stages are not trained


@pytest.mark.parametrize("stages, missing", [
    (1, "densified.png, order.png (stage 2) and overview.png, poses_random.png and poses_worst.png "
        "(stage 3)"),
    (2, "overview.png, poses_random.png and poses_worst.png (stage 3)"),
])  # fmt: skip
def test_a_partial_run_has_the_figures_of_its_stages(tiny_run, data, tmp_path, monkeypatch, capsys,
                                                     drawn, stages, missing):  # fmt: skip
    later = ["stage3*", "regressor*"] + ["stage2*"] * (stages == 1)
    copy_runs(tiny_run, tmp_path, *later)
    main(monkeypatch, tmp_path, "--data", data)
    assert list(drawn) == names_up_to(stages)
    monkeypatch.chdir(tmp_path)
    tiny = Run(Path("runs/tiny"), Config(), Training(), torch.device("cpu"), data=data)
    command = train.next_command(tiny, stages + 1)
    assert f"--stage {stages + 1}" in command
    said = f"Left out: {missing}; `{command}` trains the next stage."
    assert capsys.readouterr().out.splitlines() == [said]


def test_two_runs_are_compared_from_stage_1_on(run, data, monkeypatch, drawn):
    """Both may have no more than that."""
    shutil.copytree(run / "runs/no_local", run / "runs/again")
    main(monkeypatch, run, "--data", data, "--without", "again", name="no_local")
    assert list(drawn) == names_up_to(1) and len(drawn["similarity.png"].axes) == 2 * 4 + 1
    labels = [ax.get_ylabel() for ax in drawn["similarity.png"].axes]
    assert labels[0].startswith("no_local (λ_l = 0)") and labels[4].startswith("again (λ_l = 0)")
    shutil.rmtree(run / "runs/again")


def test_data_without_meshes_are_not_drawn(run, data, tmp_path, monkeypatch, capsys, drawn):
    folder = tmp_path / "street"
    shutil.copytree(data, folder)
    meta = json.loads((folder / "meta.json").read_text())
    meta["splits"]["test"]["with_mesh"] = 0
    (folder / "meta.json").write_text(json.dumps(meta))
    np.save(folder / "test/has_mesh.npy", np.zeros(32, bool))
    main(monkeypatch, run, "--data", folder)
    assert not drawn and "Nothing is drawn" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Bad input: one sentence, exit status 2


@pytest.mark.parametrize("case, words", [
    ("no run", "python train.py --name nowhere"), ("no run", "--stage 1"),
    ("no data", "prepare_data.py"), ("cut", "stage1.pt is not a readable checkpoint"),
    ("cut lifter", "stage3_generated_0.pt is not a readable checkpoint"),
    ("no second run", "--lambda_l 0"), ("n", "--n must be"), ("meta", "make it again with"),
    ("array", "x_f.npy cannot be read, it is truncated"),
    ("string", "stage1.pt is not a checkpoint of this version"),
])  # fmt: skip
def test_bad_input_is_said_in_one_sentence(run, data, tmp_path, monkeypatch, capsys, case, words):
    copy_runs(run, tmp_path)
    name, args = "nowhere" if case == "no run" else "tiny", ["--data", data]
    if case == "no data":
        args = ["--data", tmp_path / "none"]
    elif case.startswith("cut"):
        cut = "stage1" if case == "cut" else "stage3_generated_0"
        path = tmp_path / f"runs/tiny/{cut}.pt"
        path.write_bytes(path.read_bytes()[:1000])
    elif case == "string":
        torch.save("a string", tmp_path / "runs/tiny/stage1.pt")
    elif case in ("meta", "array"):
        shutil.copytree(data, tmp_path / "tiny")
        args = ["--data", tmp_path / "tiny"]
        (tmp_path / "tiny/meta.json").write_text("[]") if case == "meta" else os.truncate(
            tmp_path / "tiny/test/x_f.npy", 1000)
    elif case == "no second run":
        args += ["--without", "nowhere"]
    elif case == "n":
        args += ["--n", "0"]
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        main(monkeypatch, tmp_path, *args, name=name)
    said = capsys.readouterr().err.strip()
    assert e.value.code == 2 and words in said and "\n" not in said
    assert not (tmp_path / "runs/tiny/figures").exists()
