"""sources/human36m.py on a small Human3.6M of our own: made-up motion of a made-up SMPL body, seen
by the real cameras, written in the layouts of VideoPose3D and Pose2Mesh, and read back. What is
expected is computed here in another way."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    FUZZ,
    H36M_OF_SMPL,
    SMPL_JOINTS,
    regressor_onto,
    smpl_content,
    write_smpl_pkl,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_smpl import direct

import evaluate
import prepare_data
import sample
import train
from hipart import PART_JOINT
from sources import human36m as H
from sources import smpl
from sources.coarsening import coarsen
from sources.dataset import Split, load
from sources.geometry import H36M_INTRINSICS, project

SYMMETRY = [[4, 5, 6, 11, 12, 13], [1, 2, 3, 14, 15, 16]]
SUBJECTS = ("S1", "S5", "S6", "S7", "S8", "S9", "S11")
T, EVERY = 12, 3  # frames of a sequence, and every which has a fit
# Of Human3.6M's metadata.xml: file names of sub-actions 1 and 2, of S1, S5, S6, S7, S8, S9, S11
TABLE = {
    2: ["Directions 1, Directions", "Directions 1, Directions 2",
        *["Directions 1, Directions"] * 5],
    3: ["Discussion 1, Discussion", "Discussion 2, Discussion 3", *["Discussion 1, Discussion"] * 3,
        *["Discussion 1, Discussion 2"] * 2],
    4: ["Eating 2, Eating", "Eating 1, Eating", "Eating 1, Eating 2", *["Eating 1, Eating"] * 4],
    5: ["Greeting 1, Greeting", "Greeting 1, Greeting 2", *["Greeting 1, Greeting"] * 4,
        "Greeting 2, Greeting"],
    6: [*["Phoning 1, Phoning"] * 3, "Phoning 2, Phoning", *["Phoning 1, Phoning"] * 2,
        "Phoning 3, Phoning 2"],
    7: [*["Posing 1, Posing"] * 2, "Posing 2, Posing", *["Posing 1, Posing"] * 4],
    8: ["Purchases 1, Purchases"] * 7,
    9: ["Sitting 1, Sitting 2", "Sitting 1, Sitting", "Sitting 1, Sitting 2",
        *["Sitting 1, Sitting"] * 4],
    10: ["SittingDown 2, SittingDown", "SittingDown, SittingDown 1", "SittingDown 1, SittingDown",
         *["SittingDown, SittingDown 1"] * 4],
    11: [*["Smoking 1, Smoking"] * 6, "Smoking 2, Smoking"],
    12: ["Photo 1, Photo", "Photo, Photo 2", *["Photo, Photo 1"] * 2, *["Photo 1, Photo"] * 3],
    13: ["Waiting 1, Waiting", "Waiting 1, Waiting 2", "Waiting 3, Waiting", "Waiting 1, Waiting 2",
         *["Waiting 1, Waiting"] * 3],
    14: [*["Walking 1, Walking"] * 3, "Walking 1, Walking 2", *["Walking 1, Walking"] * 3],
    15: ["WalkDog 1, WalkDog"] * 7,
    16: [*["WalkTogether 1, WalkTogether"] * 4, "WalkTogether 1, WalkTogether 2",
         *["WalkTogether 1, WalkTogether"] * 2],
}  # fmt: skip
# t of X_camera = R X_world + t in mm, cameras 0 to 3, as others derived it from metadata.xml
TRANSLATIONS = {
    "S1": [(-346.051, 546.981, 5474.481), (251.425, 420.942, 5588.196),
           (480.482, 253.832, 5704.208), (51.883, 378.421, 4406.149)],
    "S5": [(-219.306, 544.479, 5518.741), (103.903, 395.672, 5767.973),
           (520.327, 283.369, 5591.124), (-79.116, 425.59, 4454.482)],
    "S6": [(-239.518, 545.814, 5523.931), (169.025, 409.667, 5714.338),
           (521.987, 286.283, 5643.273), (-56.297, 420.296, 4499.323)],
    "S7": [(-323.912, 541.771, 5506.569), (178.624, 403.592, 5694.88),
           (441.107, 271.916, 5660.121), (25.768, 431.056, 4461.873)],
    "S8": [(-82.702, 552.19, 5557.354), (-209.063, 375.07, 5818.277),
           (623.098, 290.905, 5534.379), (-178.367, 423.467, 4421.645)],
    "S9": [(-321.208, 467.135, 5514.33), (19.193, 404.228, 5702.169),
           (455.401, 273.359, 5657.815), (-69.271, 422.185, 4457.893)],
    "S11": [(-234.721, 464.34, 5536.653), (-11.934, 449.417, 5541.114),
           (781.127, 235.313, 5576.37), (-155.136, 422.163, 4435.416)],
}  # fmt: skip
# Places of the 17 among the 32 joints, and the order of Table 1 in papers: written out again
MOVING = [0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27]
PRINTED = (
    "Directions Discussion Eating Greeting Phoning Photo Posing Purchases Sitting SittingDown "
    "Smoking Waiting WalkDog Walking WalkTogether"
).split()


def names_of(subject):
    return [n for code in TABLE for n in TABLE[code][SUBJECTS.index(subject)].split(", ")]


def seen_by(subject, view, world):
    """Points [..., 3] mm in the world -> camera [..., 3] mm and pixels [..., 2], by VideoPose3D's
    formulas, one by one."""
    w, x, y, z, *centre = H.EXTRINSICS[subject][view]
    (fx, fy), (cx, cy), k, p = list(H36M_INTRINSICS.values())[view]
    camera, pixels = np.empty_like(world), np.empty((*world.shape[:-1], 2))
    for index in np.ndindex(world.shape[:-1]):
        v, u = world[index] - centre, np.array([-x, -y, -z])  # the inverse rotation
        camera[index] = v + 2 * (w * np.cross(u, v) + np.cross(u, np.cross(u, v)))
        m = np.clip(camera[index][:2] / camera[index][2], -1, 1)
        r2 = m @ m
        radial = 1 + k[0] * r2 + k[1] * r2**2 + k[2] * r2**3
        bent = m * (radial + p[0] * m[0] + p[1] * m[1]) + np.array(p) * r2
        pixels[index] = bent * [fx, fy] + [cx, cy]
    return camera, pixels


def motion(seed, n=T):
    """pose [n, 24, 3] upright in a z-up world, shape [n, 10], trans [n, 3] m."""
    rng = np.random.default_rng(seed)
    pose = rng.normal(size=(n, 24, 3)) * 0.15
    pose[:, 0] = [np.pi / 2, 0, 0]
    shape = np.tile(rng.normal(size=10), (n, 1))
    return pose, shape, rng.uniform(-0.5, 0.5, (n, 3)) + [0, 0, 0.9]


def write_source(folder, content, frames=T, every=EVERY):
    """A Human3.6M of `frames` frames a sequence, every `every`-th with a fit, in the layouts of its
    owners -> the regressor, {(subject, action): (motion, joints [T, 17, 3] mm)}, and the detections
    {subject: {action: 4 x [T, 17, 2] px}}."""
    write_smpl_pkl(folder / "basicModel_neutral_lbs_10_207_0_v1.0.0.pkl", content)
    rest = SMPL_JOINTS[H36M_OF_SMPL].copy()
    rest[10] += [0, 0.12, 0]
    regressor = regressor_onto(rest, content["v_template"])
    np.save(folder / "J_regressor_h36m_correct.npy", regressor)
    model = smpl.read(smpl.neutral(sorted(folder.glob("*.pkl"))))
    made, points = {}, smpl.Points(model, regressor)
    positions, positions_2d = {}, {}
    for subject in SUBJECTS:
        positions[subject], positions_2d[subject], fits = {}, {}, {}
        for code in TABLE:
            for sub, name in enumerate(TABLE[code][SUBJECTS.index(subject)].split(", "), 1):
                m = motion(1000 * int(subject[1:]) + 10 * code + sub, frames)
                joints = points(*m)  # its own test compares it with a body posed vertex by vertex
                x = np.full((frames, 32, 3), 77.0, np.float32)
                x[:, MOVING] = joints
                positions[subject][name] = x
                rng = np.random.default_rng(len(made))
                cams = [H.camera(subject, v) for v in range(4)]
                views = [project(joints * 1000 @ np.array(c["R"]).T + c["t"], c) for c in cams]
                detected = [np.float32(v + rng.normal(size=v.shape) * 4) for v in views]
                positions_2d[subject][name] = detected
                made[subject, name] = m, joints * 1000
                pose, shape, trans = (a.reshape(frames, -1).tolist() for a in m)
                fits.setdefault(str(code), {})[str(sub)] = {
                    str(t): dict(pose=pose[t], shape=shape[t], trans=trans[t])
                    for t in range(0, frames, every)
                }
        n = subject[1:]
        (folder / f"Human36M_subject{n}_smpl_param.json").write_text(json.dumps(fits))
        cameras = {}
        for k in range(4):
            c = H.camera(subject, k)
            cameras[str(k + 1)] = {key: c[key] for key in ("R", "t", "f", "c")}
        (folder / f"Human36M_subject{n}_camera.json").write_text(json.dumps(cameras))
    np.savez_compressed(folder / "data_3d_h36m.npz", positions_3d=np.array(positions, object))
    write_detections(folder, positions_2d)
    return regressor, made, positions_2d


def write_detections(folder, positions_2d):
    path = folder / "data_2d_h36m_cpn_ft_h36m_dbb.npz"
    metadata = dict(layout_name="h36m", num_joints=17, keypoints_symmetry=SYMMETRY)
    np.savez_compressed(path, positions_2d=np.array(positions_2d, object),
                        metadata=np.array(metadata, object))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The folder, and what went into it: content of the SMPL file, and what write_source
    returns."""
    folder = tmp_path_factory.mktemp("h36m")
    content = smpl_content(20, 16)
    regressor, made, positions_2d = write_source(folder, content)
    # What differs from the rule: longer and shorter detections, a camera without any, bad fits, a
    # joint that was not found
    long = positions_2d["S9"]["Walking"]
    long[0] = np.concatenate([long[0], long[0][-3:]])
    positions_2d["S9"]["Eating"][1] = positions_2d["S9"]["Eating"][1][: T - 5]
    positions_2d["S8"]["Photo"][2] = None
    positions_2d["S6"]["Smoking"][3][2, 13] = 0
    write_detections(folder, positions_2d)
    path = folder / "Human36M_subject5_smpl_param.json"
    fits = json.loads(path.read_text())
    fits["8"]["1"]["-3"] = fits["8"]["1"]["0"]  # no frame
    # an arm that the joints do not have: about 35 mm in the mean
    fits["8"]["1"]["6"]["pose"][48:51] = [0, 0, 0.9]
    fits["9"]["2"] = {}  # a sub-action without any
    fits["9"]["1"]["0"]["shape"][3] = 3.5  # no such body: the mean one
    fits["8"]["1"]["3"]["pose"][3:] = [0.9] * 69  # far from the joints
    fits["8"]["2"]["6"]["trans"] = [float("nan")] * 3
    fits["8"]["2"][str(T + 5)] = fits["8"]["2"]["3"]  # after the end
    path.write_text(json.dumps(fits))
    (folder / "notes.txt").write_text("mine")
    return folder, content, regressor, made, positions_2d


@pytest.fixture(scope="module")
def data(source, tmp_path_factory):
    return H.prepare(source[0], tmp_path_factory.mktemp("data") / "h36m")


def split_of(data, name):
    return load(data, name)


def test_names_of_sub_actions_follow_the_table():
    for code, row in TABLE.items():
        for subject, names in zip(SUBJECTS, row, strict=True):
            assert [H.file_name(subject, code, sub) for sub in (1, 2)] == names.split(", ")
    assert all(len(set(names_of(s))) == 30 for s in SUBJECTS)
    assert H.VAL | H.SHIFTED | H.ABSENT <= {(s, n) for s in SUBJECTS for n in names_of(s)}


@pytest.mark.parametrize("subject, view", [(s, v) for s in SUBJECTS for v in range(4)])
def test_cameras_stand_where_others_put_them(subject, view):
    R, t = (np.array(H.camera(subject, view)[key]) for key in ("R", "t"))
    assert np.allclose(t, TRANSLATIONS[subject][view], atol=6e-4)
    assert np.allclose(R @ R.T, np.eye(3), atol=1e-12) and np.linalg.det(R) > 0


def test_every_camera_looks_at_the_middle_of_the_room():
    for subject in SUBJECTS:
        for view in range(4):
            camera, pixels = seen_by(subject, view, np.array([[0.0, 0, 900], [0, 0, 1000]]))
            assert camera[0, 2] > 3000 and (np.abs(pixels[0] - 500) < 250).all()
            assert pixels[1, 1] < pixels[0, 1]


def test_counts_splits_and_actions(data, source):
    made = source[3]
    arrays = {}
    for name, subjects in (("train", H.TRAIN), ("val", H.TRAIN), ("test", H.TEST)):
        arrays[name], meta = split_of(data, name)
        assert set(arrays[name]["subject"]) == {int(s[1:]) for s in subjects}
        assert set(arrays[name]["camera"]) == {0, 1, 2, 3}
    # A camera of S8 has no detections, one of S9 has fewer, and S11's Directions are left out.
    n_train = sum(4 * T for s, a in made if s in H.TRAIN and (s, a) not in H.VAL) - T
    n_test = sum(4 * T for s, a in made if s in H.TEST) - 4 * T - 5
    assert H.ACTIONS == tuple(PRINTED) and H.KEPT == tuple(MOVING)
    assert H.SHIFTED == {("S9", "Greeting"), ("S9", "SittingDown 1"), ("S9", "Waiting 1")}
    directions = (arrays["test"]["subject"] == 11) & (arrays["test"]["action"] == 0)
    assert directions.sum() == 4 * T  # of two sequences one
    n_val = len(H.VAL) * 4 * len(range(0, T, EVERY))
    assert [len(arrays[s]["y"]) for s in ("train", "val", "test")] == [n_train, n_val, n_test]
    assert arrays["val"]["has_mesh"].all() and not arrays["test"]["has_mesh"].all()
    assert {meta["actions"][a] for a in arrays["val"]["action"]} == {a for _, a in H.VAL}
    assert set(arrays["test"]["action"]) == set(range(15))
    # Two bad poses, a NaN and a sub-action without any, seen by four cameras
    left_out = 4 * (3 + T // EVERY)
    with_mesh = (n_train + T) // EVERY - T // EVERY - left_out
    assert arrays["train"]["has_mesh"].sum() == with_mesh
    assert meta["splits"]["train"]["with_mesh"] == with_mesh
    assert meta["sources"]["fits_left_out"] == 2 and meta["noise"] is None
    assert "with the three shifted" in meta["splits"]["test"]["about"]


@pytest.mark.parametrize("name", ["test", "train"])
def test_numbers_from_the_world_to_the_pixel(data, source, name):
    """Against formulas written one by one, and a body posed vertex by vertex: 1e-3 mm and 1e-4 px,
    and float32 storage."""
    folder, content, regressor, made, detected = source
    rng = np.random.default_rng(0)
    model = smpl.read(sorted(folder.glob("*.pkl"))[0])
    rest = H.rest_joints(model)[list(PART_JOINT)] @ H.Z_UP
    levels = coarsen(model.v_template @ H.Z_UP, model.faces, rest, weighting="plain")
    if name == "test":
        keys = sorted(k for k in made if k[0] in H.TEST and k != ("S11", "Directions"))
    else:
        keys = sorted(k for k in made if k[0] in H.TRAIN and k not in H.VAL)
    arrays, meta = split_of(data, name)
    rows = []  # which frame each sample must be
    for subject, action in keys:
        for view in range(4):
            x = detected[subject][action][view]
            rows += [(subject, action, view, t) for t in range(0 if x is None else min(T, len(x)))]
    assert len(rows) == len(arrays["y"]) and meta["frame_rate"] == 50
    assert arrays["frame"].tolist() == [t for *_, t in rows]
    of = {(*row[:3], number) for row, number in zip(rows, arrays["sequence"], strict=True)}
    assert len(of) == len({row[:3] for row in rows}) == len({number for *_, number in of})
    for i in rng.integers(len(rows), size=60):
        subject, action, view, t = rows[i]
        camera, pixels = seen_by(subject, view, made[subject, action][1][t])
        stored = {k: np.float64(a[i]) for k, a in arrays.items()}
        assert np.abs(stored["y"] - (camera - camera[0])).max() < 1e-3 + 2e-4
        assert np.abs(stored["root"] - camera[0]).max() < 1e-3 + 5e-4
        assert np.abs(stored["x_s"] - pixels).max() < 1e-4 + 6e-5
        x = np.concatenate([made[k][1] for k in made if k[0] == subject])[::50]
        legs = np.linalg.norm(x[:, [1, 2, 4, 5]] - x[:, [2, 3, 5, 6]], axis=-1).sum(1) / 2
        back = np.linalg.norm(x[:, [0, 7, 8, 9]] - x[:, [7, 8, 9, 10]], axis=-1).sum(1)
        focal = list(H36M_INTRINSICS.values())[view][0][1]
        height = (np.median(legs + back) + 80) * focal / camera[0, 2]
        assert abs(stored["height_px"] / height - 1) < 0.03  # the median is over other frames
        visible = (stored["conf"] > 0)[:, None]
        expected = np.float64(detected[subject][action][view][t]) * visible
        assert np.array_equal(stored["x_s_det"], expected)
        assert meta["actions"][int(stored["action"])] == action.split()[0]
        assert f"S{int(stored['subject'])}" == subject
        if subject != "S5" or action.split()[0] not in ("Purchases", "Sitting"):
            assert stored["has_mesh"] == (t % EVERY == 0)
    with_mesh = np.flatnonzero(arrays["has_mesh"])
    some = [i for i in with_mesh if rng.random() < 3 / len(with_mesh)]
    odd = [i for i in with_mesh if rows[i] == ("S5", "Sitting 1", 2, 0)]
    assert bool(odd) == (name == "train")
    for i in [*odd, *some] or with_mesh[:2]:
        subject, action, view, t = rows[i]
        pose, shape, trans = (a[t] for a in made[subject, action][0])
        shape = shape * ((subject, action, t) != ("S5", "Sitting 1", 0))
        vertices = direct(content, pose, shape, trans) * 1000
        for size, key in ((48, "x_d"), (96, "x_f")):
            means = np.stack([vertices[levels[size] == k].mean(0) for k in range(size)])
            expected = seen_by(subject, view, means)[1]
            assert np.abs(arrays[key][i] - expected).max() < 1e-4 + 6e-5
    assert (arrays["x_f"][~arrays["has_mesh"]] == 0).all()
    assert (arrays["conf"] == 0).sum() == (name == "train")  # a joint of S6 was not found


def test_pixels_are_videopose3ds_own(source, tmp_path):
    """Ground-truth 2D of VideoPose3D is what our projection gives: then the input is the clean
    skeleton."""
    folder, _, _, made, detected = source
    shutil.copytree(folder, tmp_path / "gt")
    (tmp_path / "gt" / "data_2d_h36m_cpn_ft_h36m_dbb.npz").unlink()
    gt = {s: {} for s in SUBJECTS}
    for subject, action in made:
        x = np.stack([seen_by(subject, v, made[subject, action][1][:1])[1] for v in range(4)])
        gt[subject][action] = [np.float32(v) for v in x]
    metadata = dict(num_joints=17, keypoints_symmetry=SYMMETRY)
    np.savez(tmp_path / "gt" / "data_2d_h36m_gt.npz", positions_2d=np.array(gt, object),
             metadata=np.array(metadata, object))
    arrays, _ = split_of(H.prepare(tmp_path / "gt", tmp_path / "data"), "test")
    assert np.abs(arrays["x_s_det"] - arrays["x_s"]).max() < 2e-4 and (arrays["conf"] == 1).all()


def test_real_detections_lose_joints_in_training_only(data):
    """Joint dropout teaches the token of a missing joint. What remains is what was stored, and
    testing sees all of it."""
    split = Split(data, "train", torch.device("cpu"))
    stored = split.read(slice(0, split.n))
    a, b, c = (split.read(slice(0, split.n), np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(a["conf"], b["conf"]) and not torch.equal(a["conf"], c["conf"])
    visible = a["conf"] > 0
    lost = (~visible & (stored["conf"] > 0)).float()
    assert 0.02 < lost.mean() < 0.06 and (lost.sum(0) > 0).all() and visible.any(1).all()
    assert torch.equal(a["x_s"][visible], stored["x_s"][visible])
    assert (a["x_s"][~visible] == 0).all()
    assert (stored["conf"] == 0).sum() == 1


def run_main(module, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
    status = 0
    try:
        module.main()
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_from_the_files_to_the_papers_table(source, data, tmp_path, monkeypatch, capsys):
    """One command from the user's folder to data, one to training; evaluate.py prints actions in
    the paper's order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "script", lambda *command: None)  # evaluate.py and sample.py follow
    status, out, err = run_main(prepare_data, monkeypatch, capsys, "--source", "h36m",
                                "--folder", source[0], "--without-shifted")
    assert status == 0, err
    assert "SMPL fits: Human36M_subject11_smpl_param.json" in out and "not used: notes.txt" in out
    assert "2 sequences have more or fewer frames" in out
    assert "1 sequences have no 2D joints (S8 Photo camera 2)" in out
    arrays, meta = load("data/h36m", "test")
    assert len(arrays["y"]) == len(split_of(data, "test")[0]["y"]) - 3 * 4 * T
    assert "without the three" in meta["splits"]["test"]["about"]
    assert (tmp_path / "data/h36m/samples.png").stat().st_size > 10_000
    tiny = (
        "--preset quick --name tiny --data data/h36m --limit 400 --D 16 --K_s 32 --K_d 32 "
        "--encoder_width 16 --decoder_width 16 --width 16 --heads 2 --lifter_width 32 "
        "--regressor_width 32 --epochs_1 2 --epochs_2 2 --epochs_soft 1 --epochs_equal 1 "
        "--epochs_3 1 --warmup_free 2 --gcsab_blocks 1 --device cpu"
    ).split()
    run = ("--name", "tiny", "--data", "data/h36m")
    for stage in (1, 2, 3):
        assert run_main(train, monkeypatch, capsys, *tiny, "--stage", stage)[0] in (0, None)
    assert run_main(evaluate, monkeypatch, capsys, *run)[0] in (0, None)
    table = (tmp_path / "runs/tiny/table.md").read_text()
    after = table.split("MPJPE per action:")[1].split("\n")
    actions = [line.split("|")[1].strip() for line in after if line.startswith("| ")][2:17]
    assert actions == list(H.ACTIONS)
    assert "data_2d_h36m_cpn_ft_h36m_dbb.npz" in table and re.search(r"\| +42\.0 \|", table)
    assert "Human3.6M, as in the paper" in table and "not this one" not in table
    assert "S9 and S11" in table
    with_mesh = meta["splits"]["test"]["with_mesh"]
    assert f"{with_mesh} of {len(arrays['y'])} samples have true dense and fine points" in table
    numbers = json.loads((tmp_path / "runs/tiny/evaluation.json").read_text())["splits"]["test"]
    assert numbers["mpjpe/ground_truth/0"]["frames"] and numbers["px/detected/generated"]["frames"]
    assert run_main(sample, monkeypatch, capsys, *run)[0] in (0, None)


# --------------------------------------------------------------------------------------------------
# What is wrong with a folder, in one sentence


def edit_2d(change):
    def edit(folder):
        path = folder / "data_2d_h36m_cpn_ft_h36m_dbb.npz"
        content = {k: a.item() for k, a in np.load(path, allow_pickle=True).items()}
        change(content)
        np.savez(path, **{k: np.array(v, object) for k, v in content.items()})

    return edit


def edit_3d(change):
    def edit(folder):
        path = folder / "data_3d_h36m.npz"
        positions = np.load(path, allow_pickle=True)["positions_3d"].item()
        change(positions)
        np.savez(path, positions_3d=np.array(positions, object))

    return edit


def edit_json(name, change):
    def edit(folder):
        path = folder / name
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def delete(pattern):
    return lambda folder: [p.unlink() for p in folder.glob(pattern)]


def shift(content):
    for actions in content["positions_2d"].values():
        for views in actions.values():
            views[:] = [None if v is None else v + 300 for v in views]


def erase(content):
    for actions in content["positions_2d"].values():
        for views in actions.values():
            views[:] = [None if v is None else v * 0 for v in views]


FITS_1, POSES_2D = "Human36M_subject1_smpl_param.json", "data_2d_h36m_cpn_ft_h36m_dbb.npz"
MODEL = "basicModel_neutral_lbs_10_207_0_v1.0.0.pkl"


@pytest.mark.parametrize("damage, message", [
    (delete("data_3d*"), "lacks 3D joints"),
    (delete("data_2d*"), "lacks 2D joints"),
    (delete("*_smpl_param.json"), "lacks SMPL fits"),
    (delete("basicModel*"), "lacks SMPL model"),
    (lambda f: shutil.copy(f / POSES_2D, f / "data_2d_h36m_gt.npz"), "choose one with --detec"),
    (edit_3d(lambda p: p.pop("S7")), "lacks S7"),
    (edit_3d(lambda p: p["S1"].update(Eating=p["S1"]["Eating"][:, :17])),
     r"S1 Eating: expected metres \[T, 32, 3\]"),
    (edit_3d(lambda p: [v.__imul__(1000) for a in p.values() for v in a.values()]),
     "expected metres in the world's frame"),
    (edit_3d(lambda p: p["S1"]["Eating"].__setitem__((0, 3, 0), 1e5)), "joints less than 100 m"),
    (edit_3d(lambda p: p["S9"].update(Dancing=p["S9"]["Eating"])),
     "S9 Dancing: expected .* of one of"),
    (edit_3d(lambda p: p["S9"]["Eating"].__setitem__((0, 0, 0), np.nan)),
     "S9 Eating: expected finite"),
    (edit_2d(lambda c: c["positions_2d"]["S1"]["Eating"].pop()), "expected a list of 4"),
    (edit_2d(lambda c: c["positions_2d"]["S1"]["Eating"].__setitem__(0, np.zeros((4, 16, 2)))),
     r"pixels \[T, 17, 2\]"),
    (edit_2d(lambda c: c["metadata"].update(layout_name="mine", keypoints_symmetry=None)),
     "no order of joints"),
    (edit_2d(shift), "expected files of the same frames"),
    (edit_2d(lambda c: c["positions_2d"].pop("S11")), "lacks S11"),
    (edit_2d(lambda c: c["metadata"].update(layout_name=[], keypoints_symmetry=5)),
     "no order of joints"),
    (edit_2d(lambda c: c["positions_2d"]["S1"].update(Eating=np.array(3.0))),
     "expected a list of 4"),
    (edit_2d(lambda c: c["positions_2d"].update({3: {}})), "dictionary of names"),
    (edit_2d(erase), "2D joints of data_2d_h36m_cpn_ft_h36m_dbb.npz, px, are inf"),
    (lambda f: shutil.move(f / MODEL, f / "basicModel_f.pkl"), "lacks SMPL model"),
    (lambda f: (f / "old").mkdir() or shutil.copy(f / FITS_1, f / "old"), "keep one of them"),
    (edit_json(FITS_1, lambda c: c.update({"17": c["2"]})), "expected actions 2 to 16"),
    (edit_json(FITS_1, lambda c: c["4"]["1"]["0"].pop("trans")), "sub-action 1: expected"),
    (edit_json(FITS_1, lambda c: c["4"]["1"]["0"]["pose"].pop()), "pose .72 numbers"),
    (edit_json("Human36M_subject9_camera.json", lambda c: c["2"].update(t=[0, 0, 5000])),
     "camera 2 is .* mm off"),
    (lambda f: (f / FITS_1).write_text("[" * 10**5), "not a JSON file"),
    (lambda f: (f / "data_3d_h36m.npz").write_bytes((f / "data_3d_h36m.npz").read_bytes()[:5000]),
     "not a NumPy file"),
], ids=str)  # fmt: skip
def test_refusals_name_the_file_and_leave_earlier_output(
        source, tmp_path, monkeypatch, capsys, damage, message):
    folder = tmp_path / "files"
    shutil.copytree(source[0], folder)
    damage(folder)
    (tmp_path / "data/h36m").mkdir(parents=True)
    (tmp_path / "data/h36m/meta.json").write_text("earlier")
    monkeypatch.chdir(tmp_path)
    status, _, err = run_main(prepare_data, monkeypatch, capsys, "--source", "h36m",
                              "--folder", folder, "--overwrite")
    said = [line for line in err.splitlines() if line.startswith("prepare_data.py: ")]
    assert status == 2 and len(said) == 1 and str(folder) in said[0]
    assert re.search(message, said[0]), said
    assert [p.name for p in (tmp_path / "data").iterdir()] == ["h36m"]
    assert (tmp_path / "data/h36m/meta.json").read_text() == "earlier"


def test_shifted_fits_are_noticed(source, tmp_path):
    """Fits of other frames: every one is far off, and the folder is refused."""
    folder = tmp_path / "files"
    shutil.copytree(source[0], folder)
    for path in folder.glob("*_smpl_param.json"):
        content = json.loads(path.read_text())
        for subs in content.values():
            for frames in subs.values():
                for f in frames.values():
                    f["pose"][0:3] = [0, 0, 0]  # lying
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no sample for val"):
        H.prepare(folder, tmp_path / "out")
    (folder / "J_regressor_h36m_correct.npy").unlink()
    assert H.prepare(folder, tmp_path / "out").is_dir()  # nobody can tell


def test_spins_regressor_is_turned_round(source, tmp_path, capsys):
    folder, _, regressor, _, _ = source
    model = smpl.read(next(folder.glob("basicModel*")))
    spin = regressor[[0, 4, 5, 6, 1, 2, 3, *range(7, 17)]]
    path = tmp_path / "J_regressor_h36m.npy"
    np.save(path, spin)
    assert np.array_equal(smpl.read_regressor(path, model), regressor)
    assert "left and right legs swapped" in capsys.readouterr().out
    for bad in (spin[:, :-1], spin * 2, spin[[0, 1, 5, 3, 4, 2, *range(6, 17)]], spin * np.nan):
        np.save(path, bad)
        with pytest.raises(ValueError, match="J_regressor_h36m.npy: expected"):
            smpl.read_regressor(path, model)


METADATA = dict(layout_name="h36m", num_joints=17, keypoints_symmetry=SYMMETRY)


def write_arrays(path, **content):
    np.savez(path, **{k: np.array(v, object) for k, v in content.items()})
    return path


@pytest.mark.parametrize("change, message", [
    (dict(layout_name=None, keypoints_symmetry={}), "found no order of joints that is known here"),
    (dict(layout_name=None, keypoints_symmetry=[["a"] * 3]), "found no order of joints"),
    (dict(layout_name=None, keypoints_symmetry=[[np.inf] * 3]), "found no order of joints"),
    (dict(layout_name=None), "lacks S1, S5"),
    (None, "expected metadata to be a dictionary of names, found NoneType"),
])  # fmt: skip
def test_metadata_of_any_kind(tmp_path, change, message):
    metadata = METADATA | change if change else None
    path = write_arrays(tmp_path / "data_2d_h36m_x.npz", positions_2d={}, metadata=metadata)
    with pytest.raises(ValueError, match=f"data_2d_h36m_x.npz.*{message}"):
        H.read_detections(path)
    metadata = {k: v for k, v in METADATA.items() if k == "num_joints"}
    write_arrays(path, positions_2d={}, metadata=metadata)
    with pytest.raises(ValueError, match="found no order of joints"):
        H.read_detections(path)


@pytest.mark.parametrize("actions, message", [
    ({"Eating": np.zeros((1 << 40, 0, 3))}, "the shape of one of its arrays is none"),
    (dict.fromkeys(map("Eating {}".format, range(501)), np.ones((10_000, 32, 3), "f4")),
     "it asks for more than the 349 MB of memory"),
    ({"Eating": np.ones((20_001, 32, 3), "f2")}, "at most 20000 frames T, found float16 .20001"),
    ({"Eating": np.ones((500, 32, 3)), "Eating 1": np.ones((501, 32, 3))}, "at most 1000 frames"),
    ({"\x1b[31m\n" + "x" * 10**6: 3}, r"S1 .x1b.31m.nx+\.\.\.: expected metres"),
    ({5: 3}, "expected positions_3d S1 to be a dictionary of names"),
])  # fmt: skip
def test_joints_that_want_much(tmp_path, monkeypatch, actions, message):
    monkeypatch.setattr(H, "MOST", 1000)
    path = write_arrays(tmp_path / "data_3d_h36m.npz", positions_3d={"S1": actions})
    with pytest.raises(ValueError, match=f"data_3d_h36m.npz.*{message}") as e:
        H.read_joints(path)
    assert str(e.value).isprintable() and len(str(e.value)) < 600


def test_cameras_that_never_end(tmp_path):
    """A loop over 2^40 frames without joints would not come to an end."""
    views = np.zeros((1 << 40, 0, 17, 2))
    path = write_arrays(tmp_path / "data_2d_h36m_x.npz", positions_2d={"S1": {"Eating": views}},
                        metadata=METADATA)
    with pytest.raises(ValueError, match="the shape of one of its arrays is none"):
        H.read_detections(path)


def test_digits_of_other_alphabets_name_no_subject():
    assert H.recognise(Path("Human36M_subject11_smpl_param.json")) == "SMPL fits"
    assert H.recognise(Path("Human36M_subject\u0661_smpl_param.json")) is None
    assert H.recognise(Path("Human36M_subject\u0661_camera.json")) is None


def test_cameras_of_numbers_that_no_camera_has(tmp_path):
    path = tmp_path / "Human36M_subject1_camera.json"
    for number in (10**400, "text", [[]]):
        path.write_text(json.dumps({"1": dict(R=np.eye(3).tolist(), t=[0, 0, number])}))
        with pytest.raises(ValueError, match="camera.json: expected cameras 1 to 4 with R 3 x 3"):
            H.check_cameras(path, "S1")
    path.write_text("{" + " " * H.CAMERA_BYTES + "}")  # the real ones have 2 KB
    with pytest.raises(ValueError, match="camera.json .*it has more than 1 MB"):
        H.check_cameras(path, "S1")


@pytest.mark.parametrize("content, message", [
    ({"\x1b[2J" + "2" * 10**6: {"1": {}}}, r"action .x1b.2J2+\.\.\., sub"),
    ({"2": {"1": {"\x07" * 10**6: 5}}}, r"frame .x07"),
    ({"2": {"1": {"9" * 5000: dict(pose=[0] * 72, shape=[0] * 10, trans=[0] * 3)}}}, "expected fr"),
    ({"2": {"1": {"0": dict(pose=[[0] * 72], shape=[0] * 10, trans=[0] * 3)}}}, "expected frame"),
])  # fmt: skip
def test_fits_are_shown_on_one_line(tmp_path, content, message):
    path = tmp_path / "Human36M_subject1_smpl_param.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"smpl_param.json.*{message}") as e:
        H.read_fits(path, "S1")
    assert str(e.value).isprintable() and len(str(e.value)) < 600


@given(st.data())
@settings(max_examples=60 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_fits_are_read_or_refused(source, tmp_path_factory, data):
    raw = bytearray((source[0] / "Human36M_subject1_smpl_param.json").read_bytes()[:30_000])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        kind = data.draw(st.sampled_from(["cut", "byte", "insert"]))
        if kind == "cut":
            del raw[at : at + data.draw(st.integers(1, 3000))]
        else:
            odd = st.sampled_from([b"1e999", b"NaN", b"{}", b"[]", b'"', b"-"])
            raw[at : at + (kind == "byte")] = data.draw(odd)
    path = tmp_path_factory.getbasetemp() / "mutated.json"
    path.write_bytes(raw)
    try:
        fits = H.read_fits(path, "S1")
    except ValueError as e:
        assert str(path) in str(e)
    else:
        assert all(np.isfinite(a).all() for fit in fits.values() for a in fit)


@given(st.data())
@settings(max_examples=60 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_arrays_are_read_or_refused(source, tmp_path_factory, data):
    """Both kinds of npz, of few frames: bytes changed in the file, or values of the dictionaries
    within."""
    folder = tmp_path_factory.getbasetemp()
    name = data.draw(st.sampled_from(["positions_3d", "positions_2d"]))
    junk = st.sampled_from([
        None, 3, "x", [], {}, np.zeros((2, 32, 2)), np.full((2, 17, 2), np.nan),
        np.zeros((0, 17, 2)), np.array(["a"]), [np.full((2, 17, 2), 1e30)] * 4,
        np.full((3, 32, 3), 1e9),
    ])  # fmt: skip
    good = np.full((2, 32, 3), 0.5) if name.endswith("3d") else [np.ones((2, 17, 2))] * 4
    value = {s: {"Eating": good} for s in SUBJECTS}
    where = data.draw(st.sampled_from(["file", "subject", "action"]))
    if where == "subject":
        value["S1"] = data.draw(junk)
    elif where == "action":
        value["S1"]["Eating"] = data.draw(junk)
    path = folder / f"data_{name[-2:]}_h36m_x.npz"
    metadata = dict(layout_name="h36m", num_joints=17, keypoints_symmetry=SYMMETRY)
    np.savez(path, **{name: np.array(value, object), "metadata": np.array(metadata, object)})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3)) if where == "file" else 0):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=8))
    path.write_bytes(raw)
    try:
        found = H.read_joints(path) if name.endswith("3d") else H.read_detections(path)[0]
    except ValueError as e:
        assert str(path) in str(e) and "\n" not in str(e)
    else:
        for x in found.values():
            if name.endswith("3d"):
                assert x.shape[1:] == (17, 3) and len(x) and np.isfinite(x).all()
            else:
                assert len(x) == 4 and all(
                    v is None or v.shape[1:] in ((17, 2), (17, 3)) for v in x
                )
