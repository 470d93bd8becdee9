"""prepare_data.py: what the default data set is, on the bodies and clips of conftest.py; and, with
`pytest -m download`, that the real one has not changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import numpy as np
import pytest
from conftest import TINY_SIZES, make_clips, rest_joints, write_tiny

import prepare_data as P
from sources.bodies import get_bodies, get_clips, point_tables
from sources.coarsening import vertex_areas
from sources.dataset import SPLITS, load
from sources.geometry import project
from sources.motion import CLIP_STANDING_HEIGHT, split_frames

HERE = Path(__file__).parent


def test_collisions_are_found():
    joints = np.repeat(rest_joints()[None] * 1000, 4, 0)
    joints[1, 13] = [0, 0, 1300]  # a hand in the chest
    joints[2, 16] = joints[2, 10]  # a hand in the head
    joints[3, 3] = (joints[3, 5] + joints[3, 6]) / 2  # a foot in the other shin
    assert P.collides(joints).tolist() == [False, True, True, True]


@pytest.mark.parametrize("split", SPLITS)
def test_a_data_set_is_what_it_says(tiny_data, split):
    arrays, meta = load(tiny_data / "tiny", split)
    n = TINY_SIZES[split]
    assert ("x_s_det" in arrays) == ("conf" in arrays) == (split != "train")
    assert all(isinstance(a, np.memmap) and len(a) == n for a in arrays.values())
    assert (arrays["y"][:, 0] == 0).all()
    for i in range(n):  # y + root, seen by the sample's camera, is x_s
        seen = arrays["y"][i].astype(float) + arrays["root"][i]
        x = project(seen, meta["cameras"][arrays["camera"][i]])
        assert np.allclose(x, arrays["x_s"][i], atol=1e-2)
    assert set(arrays["subject"]) <= set(meta["subjects"][split])
    points = np.concatenate([arrays[k] for k in ("x_s", "x_d", "x_f")], 1)
    assert points.min() >= 0 and points.max() <= 1000
    pairs = arrays["x_f"].reshape(n, 48, 2, 2)  # a dense point lies between its two fine points
    gap = np.linalg.norm(pairs[:, :, 0] - pairs[:, :, 1], axis=-1)
    way = np.linalg.norm(pairs - arrays["x_d"][:, :, None], axis=-1).sum(-1)
    assert (way < gap + 0.5).all()
    allowed = {"train": {-1, 0, 2, 3}, "unseen": {1}}  # 1 is kick; -1 is a mixture of clips
    assert set(arrays["action"]) == allowed.get(split, {0, 2, 3})
    assert meta["actions"] == ["jump", "kick", "punch", "walk"]


@pytest.mark.parametrize("split", SPLITS)
def test_points_of_the_third_level_make_the_fine_ones(tiny_data, split, bodies, levels):
    """A fine point is the mean of those that it consists of, weighted by area; in the image, but
    for perspective."""
    area = vertex_areas(bodies["vertices"][0], bodies["faces"])
    share = np.zeros((96, 192))
    np.add.at(share, (levels[96], levels[192]), area)
    assert ((share > 0).sum(0) == 1).all()  # each belongs to one fine point
    x_192 = np.load(tiny_data / "tiny" / split / "x_192.npy", allow_pickle=False)
    assert x_192.shape == (TINY_SIZES[split], 192, 2) and x_192.dtype == np.float32
    made = share / share.sum(1, keepdims=True) @ x_192
    assert np.abs(made - load(tiny_data / "tiny", split)[0]["x_f"]).max() < 1


def test_the_third_level_changes_nothing_else(tiny_data, tmp_path, monkeypatch):
    def far_away(*args):
        tables, align = point_tables(*args)
        tables[:, 161:] *= 100
        return tables, align

    monkeypatch.setattr(P, "point_tables", far_away)
    write_tiny(tmp_path / "far")
    for split in SPLITS:
        (arrays, _), (others, _) = load(tiny_data / "tiny", split), load(tmp_path / "far", split)
        assert all(np.array_equal(arrays[name], others[name]) for name in arrays)


@pytest.mark.parametrize("split", SPLITS)
def test_people_are_as_tall_as_height_px_says(tiny_data, split):
    arrays, meta = load(tiny_data / "tiny", split)
    focal = [meta["cameras"][c]["f"][1] for c in arrays["camera"]]
    stature = np.array(meta["stature_mm"])
    shown = arrays["height_px"] * arrays["root"][:, 2] / focal
    if split != "train":
        assert np.allclose(shown, stature[arrays["subject"]])
        return
    possible = stature[meta["subjects"]["train"]]  # any body in the stature of any other
    assert np.allclose(np.abs(shown[:, None] - possible).min(1), 0, atol=0.1)
    assert not np.allclose(shown, stature[arrays["subject"]], atol=1)
    thigh = np.linalg.norm(arrays["y"][:, 2] - arrays["y"][:, 1], axis=-1) / shown
    for body in meta["subjects"]["train"]:
        assert np.ptp(thigh[arrays["subject"] == body]) < 1e-4


def in_world(arrays, meta):
    """Joints [N, 17, 3] mm in the world, from what a sample's camera sees."""
    cameras = [meta["cameras"][c] for c in arrays["camera"]]
    seen = arrays["y"] + arrays["root"][:, None]
    return np.array([(x - c["t"]) @ np.array(c["R"]) for x, c in zip(seen, cameras, strict=True)])


def test_bodies_stand_on_the_floor_and_leave_it_only_in_airborne_clips(tiny_data, bodies):
    arrays, meta = load(tiny_data / "tiny", "test")
    legs = 1000 * (bodies["joints"][:, 0, 2] - bodies["vertices"][..., 2].min(1))  # mm, standing
    for joints, action, body in zip(in_world(arrays, meta), arrays["action"], arrays["subject"],
                                    strict=True):
        if meta["actions"][action] == "jump":
            # The pelvis is as high as in the clip, 1.30 to 1.40 m, in proportion to the legs: there
            # is no leap of the training poses on top.
            assert 1.295 < joints[0, 2] / legs[body] * CLIP_STANDING_HEIGHT < 1.405
        else:
            assert -50 < joints[:, 2].min() < 150 and joints[:, 2].max() < 2200


def test_training_leaps_reach_higher_and_everything_else_stays_on_the_floor(tiny_data):
    arrays, meta = load(tiny_data / "tiny", "train")
    lowest = in_world(arrays, meta)[:, :, 2].min(1)
    jump, walk = (lowest[arrays["action"] == meta["actions"].index(a)] for a in ("jump", "walk"))
    assert len(jump) > 3 and len(walk) > 3 and walk.max() < 250
    # mm, at most: the clip's own half a metre for legs of any length, and from joints to the sole
    own = 900
    assert (jump > 400).all() and own < jump.max() < own + 1000 * P.LEAP
    assert 0.2 < (jump < own).mean() < 0.9
    # so that older data have another name
    assert meta["training"] == {"leap_m": P.LEAP, "stature": "any training body's"}


def test_bodies_of_the_splits_are_apart(tiny_data):
    subjects = load(tiny_data / "tiny", "val")[1]["subjects"]
    train, val, test = (set(subjects[s]) for s in ("train", "val", "test"))
    assert not train & val and not train & test and not val & test
    assert subjects["unseen"] == subjects["test"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_sequence_is_one_person_who_moves(tiny_sequences, split):
    arrays, meta = load(tiny_sequences / "sequences", split)
    assert len(arrays["y"]) == meta["splits"][split]["n"] == (256 if split == "train" else 32)
    assert meta["frame_rate"] == 60 and meta["noise_time"] == 0
    same = np.diff(arrays["sequence"]) == 0
    assert (np.diff(arrays["sequence"])[~same] > 0).all()
    for name in ("subject", "camera", "action"):
        assert (np.diff(arrays[name])[same] == 0).all()
    assert set(arrays["action"]) <= ({1} if split == "unseen" else {0, 2, 3})
    step = np.diff(arrays["frame"])[same]
    assert (step >= 1).all() and (step == 1).mean() > 0.9  # varied poses are thrown away at times
    world = in_world(arrays, meta)
    moved = np.linalg.norm(np.diff(world, axis=0), axis=-1).max(1)
    assert moved[same][step == 1].max() < 200
    stands = np.diff(world[:, 0, :2], axis=0)[same]
    assert np.abs(stands).max() < 0.1  # mm: the pelvis is not moved along
    stature = arrays["height_px"] * arrays["root"][:, 2]
    assert np.allclose(np.diff(stature)[same], 0, atol=1e-3 * stature.mean())


def test_no_held_out_moment_is_near_a_sequence_for_training(tiny_sequences):
    """By the clock: what is tested is what the default data test, and at least 0.1 s away."""
    clips = make_clips()
    moments = {}
    for split in ("train", "val", "test"):
        arrays, meta = load(tiny_sequences / "sequences", split)
        for i, name in enumerate(meta["actions"]):
            moments[split, name] = np.unique(arrays["frame"][arrays["action"] == i]) / 60
    for name in ("jump", "punch", "walk"):
        parts, clip = split_frames(clips[name]), clips[name]
        for split in ("val", "test"):
            held = clip["time"][parts[split]]
            for moment in moments[split, name]:
                assert np.abs(held - moment).min() < 1 / 50
        for a, b in (("train", "test"), ("train", "val"), ("val", "test")):
            away = np.abs(moments[a, name][:, None] - moments[b, name])
            away = np.minimum(away, clip["period"] - away)
            assert away.size == 0 or away.min() >= 0.1 - 1e-6
    subjects = [set(load(tiny_sequences / "sequences", s)[0]["subject"]) for s in ("train", "test")]
    assert not subjects[0] & subjects[1]


def test_correlated_errors_last(tiny_sequences):
    """The same people and motion as without."""
    changes = []
    for name in ("sequences", "correlated"):
        arrays, meta = load(tiny_sequences / name, "unseen")
        same = (np.diff(arrays["sequence"]) == 0)[:, None]
        gone = arrays["conf"] == 0
        off = np.where(gone, np.nan, (arrays["x_s_det"] - arrays["x_s"])[..., 0])
        both = np.isfinite(off[1:] + off[:-1]) & same
        changes.append(np.corrcoef(off[1:][both], off[:-1][both])[0, 1])
        assert meta["noise_time"] == {"sequences": 0, "correlated": 30}[name]
    one, other = (load(tiny_sequences / n, "unseen")[0] for n in ("sequences", "correlated"))
    assert np.array_equal(one["y"], other["y"])
    assert changes[0] < 0.5 and changes[1] > 0.7


def test_the_same_seed_gives_the_same_data_whatever_the_other_splits_sizes(
        tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(P, "draw_samples", lambda *args: None)
    monkeypatch.setattr(P, "draw_coarsening", lambda *args: None)
    sizes, folders = {**TINY_SIZES, "train": 20, "val": 7}, (tiny_data / "tiny", tmp_path / "other")
    write_tiny(tmp_path / "other", sizes)
    for split in ("test", "unseen"):
        mine, theirs = (load(folder, split)[0] for folder in folders)
        assert all(np.array_equal(mine[k], theirs[k]) for k in mine)
    write_tiny(tmp_path / "other", sizes, seed=1, overwrite=True)
    mine, theirs = (load(folder, "test")[0] for folder in folders)
    assert not np.array_equal(mine["y"], theirs["y"])


def test_a_processor_that_rounds_differently_names_the_same_samples(tiny_data, tmp_path,
                                                                    monkeypatch):
    """Run.samples is a hash of meta.json."""
    cameras, bodies = P.make_cameras, conftest.make_bodies()
    bodies["stature"] = bodies["stature"] * (1 + 1e-13)
    monkeypatch.setattr(conftest, "make_bodies", lambda: bodies)
    monkeypatch.setattr(P, "make_cameras", lambda rng: [
        c | {key: (np.array(c[key]) + noise * 1e-13).tolist() for key in ("R", "t")}
        for c, noise in zip(cameras(rng), (-1, 1, 3, -5), strict=True)])
    write_tiny(tmp_path / "tiny")
    one, other = ((folder / "tiny/meta.json").read_text() for folder in (tiny_data, tmp_path))
    assert one == other


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(P, "draw_coarsening", interrupt)  # the last thing before the rename
    with pytest.raises(KeyboardInterrupt):
        write_tiny(tmp_path / "tiny")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match="python prepare_data.py --name tiny"):
        load(tmp_path / "tiny", "test")


# --------------------------------------------------------------------------------------------------
# The command line


def command(*arguments):
    run = subprocess.run([sys.executable, "prepare_data.py", *map(str, arguments)],
                         cwd=HERE.parent, capture_output=True, text=True)
    return run.returncode, run.stderr


def test_an_existing_set_is_not_overwritten(tiny_data):
    with pytest.raises(ValueError, match="exists already: choose another --name or add --overwr"):
        write_tiny(tiny_data / "tiny")
    status, said = command("--name", "tiny", "--out", tiny_data)
    assert status == 2 and "exists already" in said and "Traceback" not in said


@pytest.mark.parametrize("arguments, message", [
    (["--train", 0], "Every split needs at least one sample"),
    (["--source", "bvh"], "--folder DIR is needed"),
    (["--correlated"], "is about frames that follow one another: add --sequences"),
    (["--source", "3dpw", "--folder", "x", "--sequences"], "always has sequences"),
    (["--folder", "x"], "--folder DIR is needed"),
    (["--source", "h36m", "--folder", "x", "--train", 5, "--seed", 1],
     "--train --seed has no meaning for --source h36m, which draws nothing"),
    (["--source", "3dpw", "--folder", "x", "--wheels", "w"], "--wheels has no meaning"),
    (["--without-shifted"], "go with --source h36m"),
    (["--source", "bvh", "--folder", "x", "--detections", "gt"], "go with --source h36m"),
    (["--source", "amass", "--folder", "nowhere"], "nowhere is not there"),
    (["--source", "3dpw", "--folder", "a\n\x1b[31m"], r"a\n\x1b[31m is not there"),
])  # fmt: skip
def test_commands_that_make_no_sense_are_refused_in_one_sentence(
        tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        P.main()
    said = capsys.readouterr().err
    assert caught.value.code == 2 and message in said
    assert said.startswith("prepare_data.py: ") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# The real parts


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The default data set, with fewer training samples. The parts are those in data/.cache, if
    they are there, and otherwise come from the wheels in $HIPART_WHEELS or from a download.

    A split draws 4096 samples at a time, so its first ones do not depend on its size beyond that;
    detections are drawn at the end, so the other splits have their default sizes.
    """
    cache = HERE.parent / "data" / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    wheels = os.environ.get("HIPART_WHEELS")
    clips, bodies = get_clips(cache, wheels), get_bodies(cache, 0, wheels)
    folder = tmp_path_factory.mktemp("real") / "real"
    P.write_data_set(folder, clips, bodies, P.SIZES | {"train": P.CHUNK}, 0, {})
    return folder, clips, bodies


@pytest.mark.download
def test_real_clips_and_bodies_make_samples(real):
    folder, clips, bodies = real
    assert len(clips) == 15 and sum(len(c["time"]) for c in clips.values()) == 1620
    assert bodies["vertices"].shape == (60, 13718, 3)
    assert 1.4 < bodies["stature"].min() < bodies["stature"].max() < 2.0
    assert np.allclose(bodies["weights"].sum(1), 1, atol=1e-5)
    for split in SPLITS:
        arrays, meta = load(folder, split)
        assert 250 < arrays["height_px"].mean() < 500 and len(meta["actions"]) == 15
    assert meta["coarsening"]["assignment_mm"] < 110
    assert {meta["actions"][a] for a in arrays["action"]} == {"kick", "dance_b"}


@pytest.mark.download
@pytest.mark.parametrize("split", SPLITS)
def test_the_default_data_set_has_not_changed(real, split):
    """default_data.json holds the first two samples of every split (px, mm). All results speak of
    these data."""
    expected = json.loads((HERE / "default_data.json").read_text())[split]
    arrays, _ = load(real[0], split)
    assert arrays.keys() == expected.keys()
    for name, first in expected.items():
        assert np.abs(arrays[name][:2] - np.array(first)).max() < 1e-3, name
