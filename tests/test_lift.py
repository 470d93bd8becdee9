"""lift.py: from a keypoint file to poses, pictures and animations, and the way there."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import person
from hypothesis import given, settings
from hypothesis import strategies as st

import lift
import survival
from checkpoints import Run
from hipart import Config
from lift import ANIMATIONS, keep_confident, lift_keypoints, square_around, standing_height
from sources.keypoints import Keypoints, read
from sources.layouts import to_h36m
from train import Training, load_hipart, load_lifter

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "wave.json"


@pytest.fixture(scope="module")
def own_run(tiny_run, tmp_path_factory):
    """runs/tiny in a folder of its own, to write to."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(tiny_run / "runs", folder / "runs", ignore=shutil.ignore_patterns("*.npy"))
    return folder / "runs" / "tiny"


@pytest.fixture
def run_script(own_run, monkeypatch, capsys):
    """Run lift.py on that run with these options: exit status, stdout, stderr."""
    monkeypatch.chdir(own_run.parent.parent)

    def run(*options, name=own_run.name):
        monkeypatch.setattr("sys.argv", ["lift.py", *map(str, options), "--name", name])
        try:
            lift.main()
            status = 0
        except SystemExit as e:
            status = e.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def write_people(path, people, image_ids):
    results = [dict(image_id=i, keypoints=p.ravel().tolist(), score=1.0)
               for p, i in zip(people, image_ids, strict=True)]
    path.write_text(json.dumps(results))
    return path


def test_the_example_from_file_to_animation(own_run, run_script, tmp_path):
    """Twelve frames of it, around those in which two joints are hidden for the first time."""
    frames = tmp_path / "wave.json"
    frames.write_text(json.dumps(json.loads(EXAMPLE.read_text())[4:16]))
    status, out, err = run_script(frames)
    assert status == 0, err
    assert "coco17" in out and "12 of 204 joints are missing" in out
    folder = own_run / "keypoints" / "wave"
    assert sorted(f.name for f in folder.iterdir()) == ["poses.npz", "track_1.gif"]
    assert (folder / "track_1.gif").read_bytes()[:6] == b"GIF89a"
    with np.load(folder / "poses.npz", allow_pickle=False) as z:
        assert z["source"] == str(frames) and set(z["made"]) == {f.name for f in folder.iterdir()}
        shapes = {k: z[k].shape for k in z.files if k not in ("source", "made")}
        assert shapes == dict(x_s=(12, 17, 2), conf=(12, 17), x_d=(12, 48, 2), x_f=(12, 96, 2),
                              y=(12, 17, 3), name=(12,), track=(12,), doubtful=(12,),
                              spread_d=(12, 48), spread_f=(12, 96), others_f=(12, 3, 96, 2),
                              others_y=(12, 3, 17, 3))
        assert all(np.isfinite(z[k]).all() for k in ("x_s", "x_d", "x_f", "y"))
        assert (z["conf"] == 0).sum() == 12 and z["name"][6] == "10.jpg #0"


def test_the_example_is_what_its_script_writes(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("wave", ROOT / "examples" / "wave.py")
    wave = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wave)
    monkeypatch.setattr(wave, "__file__", str(tmp_path / "wave.py"))
    wave.main()
    ours, stored = (json.loads(path.read_text()) for path in (tmp_path / "wave.json", EXAMPLE))
    for a, b in zip(ours, stored, strict=True):
        np.testing.assert_allclose(a.pop("keypoints"), b.pop("keypoints"), atol=0.11)
        assert a == b


def test_people_in_images_get_a_picture_each(own_run, run_script, tmp_path):
    people = [person("coco17", i) for i in range(3)]
    people[2][5:, 2] = 0.1
    path = write_people(tmp_path / "people.json", people, range(3))
    status, out, err = run_script(path)
    assert status == 0, err
    assert "1 people with fewer than 6 joints left out" in out
    folder = own_run / "keypoints" / "people"
    assert sorted(f.name for f in folder.iterdir()) == ["0_0.png", "1_0.png", "poses.npz"]
    far = people[0] + [5000, 0, 0]  # two people in one image: equal file names once cleaned
    write_people(path, (people[0], far), ["a$\\b$/"] * 2)
    status, out, err = run_script(path)  # the results before are replaced
    assert status == 0, err
    found = sorted(f.name for f in folder.iterdir())
    assert found == ["a_b_0.png", "a_b_1.png", "poses.npz"]


def test_results_replace_only_their_own(own_run, run_script, tmp_path):
    """Files of one name from different folders, and names that mean something to a path."""
    parent = own_run / "keypoints"
    shutil.rmtree(parent, ignore_errors=True)
    before = {f.name for f in own_run.iterdir()}
    names = ("a/same.json", "b/same.json", "c/...json", "d/..json", "e/cam.01.json",
             "f/cam.02.json", f"g/{'字' * 70}.json", "h/.new.json")  # fmt: skip
    for i, name in enumerate(names):
        (tmp_path / name[0]).mkdir()
        write_people(tmp_path / name, [person("coco17", i)], [i])
        assert run_script(tmp_path / name)[0] == 0
    made = {"same": "a/same.json", "same_2": "b/same.json", "_": "c/...json", "__2": "d/..json",
            "cam.01": "e/cam.01.json", "cam.02": "f/cam.02.json", "字" * 26: names[6],
            "new": "h/.new.json"}  # fmt: skip
    sources = {f.parent.name: str(np.load(f)["source"]) for f in parent.glob("*/poses.npz")}
    assert sources == {name: str(tmp_path / of) for name, of in made.items()}
    assert before <= {f.name for f in own_run.iterdir()} and not list(parent.glob(".*"))
    (parent / "same" / "notes.txt").write_text("mine")  # now it is no longer only ours
    (parent / "cam.01" / "poses.npz").write_text("damaged")
    (parent / "cam.02").rename(parent / "moved")
    (parent / "cam.02").symlink_to(parent / "moved")
    for name in ("a/same.json", "b/same.json", "e/cam.01.json", "f/cam.02.json"):
        assert run_script(tmp_path / name)[0] == 0
    assert (parent / "same" / "notes.txt").read_text() == "mine"
    found = {f.name for f in parent.iterdir()}
    assert found == {*made, "same_3", "cam.01_2", "cam.02_2", "moved"}


def test_animations_are_few_and_numbers_complete(own_run, run_script, tmp_path, monkeypatch):
    monkeypatch.setattr(lift, "draw_animation", lambda path, *_: path.write_bytes(b"GIF89a"))
    n = ANIMATIONS + 2
    people = [person("coco17", i, at=(400 * i, 240)) for i in range(n)]
    rows = [(t, i) for t in range(4) for i in range(n) if t < 2 or i > 1]  # 0 and 1 leave early
    path = write_people(tmp_path / "many.json", [people[i] for _, i in rows],
                        [f"{t}.jpg" for t, _ in rows])
    status, out, err = run_script(path)
    assert status == 0 and f"{ANIMATIONS} of {n} tracks, the longest, are drawn" in out
    folder = own_run / "keypoints" / "many"
    assert sorted(f.name for f in folder.glob("*.gif")) == [f"track_{i}.gif" for i in range(2, n)]
    with np.load(folder / "poses.npz") as z:
        assert z["y"].shape == (len(rows), 17, 3) and set(z["track"]) == set(map(str, range(n)))


def test_refusals_end_with_status_2_and_touch_nothing(own_run, run_script, tmp_path):
    bad = tmp_path / "wave.json"
    bad.write_text("{")
    zeros = write_people(tmp_path / "zeros.json", [person("coco17") * [1, 1, 0]], [0])
    before = sorted(own_run.rglob("*"))
    for options, expected in (
            ((bad,), "not a JSON"), ((tmp_path / "none.json",), "not there"),
            ((EXAMPLE, "--min-score", "5"), "lower --min-score"), ((zeros,), "scores are 0"),
            ((EXAMPLE, "--image-size", "0", "9"), "--image-size")):  # fmt: skip
        status, out, err = run_script(*options)
        assert status == 2 and expected in err and len(err.strip().split("\n")) == 1
    assert sorted(own_run.rglob("*")) == before


@pytest.mark.parametrize("missing, stage", [("stage2", 2), ("stage3_generated_0", 3)])
def test_all_three_stages_are_needed(own_run, run_script, missing, stage):
    partial = own_run.with_name(f"no_{missing}")
    shutil.copytree(own_run, partial, ignore=shutil.ignore_patterns(f"{missing}.pt", "keypoints"))
    status, out, err = run_script(EXAMPLE, name=partial.name)
    shutil.rmtree(partial)
    assert status == 2 and out == "" and len(err.strip().split("\n")) == 1
    assert f"--name no_{missing}" in err and f"--stage {stage}" in err


def test_of_stage_3_one_lifter_is_enough(own_run, run_script):
    partial = own_run.with_name("one_lifter")
    others = shutil.ignore_patterns("stage3_[!g]*", "stage3_ground*", "regressor.pt", "keypoints")
    shutil.copytree(own_run, partial, ignore=others)
    status, out, err = run_script(EXAMPLE, name=partial.name)
    assert status == 0 and "poses.npz" in out, err
    shutil.rmtree(partial)


def test_links_and_folders_that_cannot_be_written(own_run, run_script, tmp_path):
    loop, odd = tmp_path / "loop.json", tmp_path / "no_ending"
    loop.symlink_to(loop)
    assert run_script(loop)[0] == 2
    write_people(odd, [person("coco17")], [0])
    (tmp_path / "link.json").symlink_to(odd)
    assert run_script(tmp_path / "link.json")[0] == 0 and (own_run / "keypoints/link").is_dir()
    shutil.rmtree(own_run / "keypoints")
    (own_run / "keypoints").write_text("")
    status, out, err = run_script(tmp_path / "link.json")
    (own_run / "keypoints").unlink()
    assert status == 2 and "cannot be written to" in err and len(err.strip().split("\n")) == 1


def test_what_killed_processes_left_goes(tmp_path):
    for name in (".new.dead", ".new.alive", "old"):
        (tmp_path / name).mkdir()
    with survival.locked(tmp_path / ".new.alive"), lift.new_folder(tmp_path) as folder:
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {".new.alive", "old", folder.name} and not list(folder.iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {".new.alive", "old"}


def test_a_run_that_is_not_there_names_those_that_are(run_script):
    status, out, err = run_script(EXAMPLE, name="standard")
    assert status == 2 and out == "" and len(err.strip().split("\n")) == 1
    assert "python train.py --preset standard --stage 1" in err and "--name: tiny" in err


@given(st.integers(0, 99), st.floats(20, 3000), st.floats(-500, 4000), st.floats(-500, 4000))
@settings(max_examples=30)
def test_a_person_has_one_size_wherever_and_however_large(seed, height, x, y):
    """What the models see of a person does not depend on the photo."""
    seen = []
    for h, at in ((300, (320, 240)), (height, (x, y))):
        k = keypoints_of([person("coco17", seed, h, at)])
        centre, side = square_around(k)
        seen.append((k.x_s - centre[:, None]) / side[:, None, None])
        assert side[0] == standing_height(k)[0] / lift.STANDING
    np.testing.assert_allclose(seen[0], seen[1], atol=2e-3)


def keypoints_of(points):
    """COCO's points [N, 17, 3] as one track."""
    x_s, conf = to_h36m(np.stack(points), "coco17")
    return Keypoints(x_s, conf, [""] * len(x_s), ["a"] * len(x_s))


def test_the_size_of_the_photo_plays_no_part(own_run, tmp_path):
    """Portrait, landscape, close by, far away, with and without the size: trunk and limbs."""
    run = Run(own_run, Config(), Training(), torch.device("cpu"))
    hipart, lifter = load_hipart(run), load_lifter(run, "generated")
    lengths = []
    for (w, h), height, at in (((540, 960), 900, (270, 480)), ((1920, 1080), 300, (300, 600)),
                               ((8000, 8000), 60, (70, 7000)), ((0, 0), 500, (400, 400))):
        content = dict(annotations=[dict(image_id=1, keypoints=person(
            "coco17", 3, height, at).ravel().tolist())])
        if w:
            content["images"] = [dict(id=1, width=w, height=h)]
        path = tmp_path / "a.json"
        path.write_text(json.dumps(content))
        k = keep_confident(read(path), 0.3)[0]
        y = lift_keypoints(k, *square_around(k), hipart, lifter, run.device)["y"][0]
        lengths.append([np.linalg.norm(y[a] - y[b]) for a, b in ((0, 8), (1, 2), (2, 3), (11, 12))])
    np.testing.assert_allclose(lengths, np.tile(lengths[:1], (4, 1)), rtol=0.01)


def test_hypotheses_and_their_spread_equal_a_plain_reading(own_run):
    """In the pixels of the file, whatever the size of the person."""
    run = Run(own_run, Config(), Training(), torch.device("cpu"))
    hipart, lifter = load_hipart(run), load_lifter(run, "generated")
    k = keypoints_of([person("coco17", 3, 900), person("coco17", 4, 100)])
    k.conf[1, 4] = 0.45  # low, though not missing
    (cx, side), device = square_around(k), run.device
    p = lift_keypoints(k, cx, side, hipart, lifter, device, temperature=0.5)
    x_s = torch.from_numpy((k.x_s - cx[:, None]) / (side[:, None, None] / 2)).float()
    conf, g = torch.from_numpy(k.conf), torch.Generator().manual_seed(0)
    made = hipart.sample(x_s, conf, lift.HYPOTHESES, 0.5, generator=g)
    for i in range(2):
        px = [z[i].numpy() * side[i] / 2 + cx[i] for z in made[:2]]
        for name, z in zip(("spread_d", "spread_f"), px, strict=True):
            off = [[np.hypot(*(point - one.mean(0))) for point in one] for one in z.swapaxes(0, 1)]
            np.testing.assert_allclose(p[name][i], np.mean(off, 1), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(p["others_f"][i], px[1][:3], atol=side[i] * 1e-4)
        for n in range(3):
            x = torch.cat([x_s[i], made[0][i, n], made[1][i, n]])[None]
            np.testing.assert_allclose(p["others_y"][i, n], lifter(x, conf[i : i + 1])[0],
                                       atol=1.0)  # mm
    assert p["doubtful"].tolist() == [False, True]


def test_other_hypotheses_are_drawn_where_joints_are_doubtful(own_run):
    run = Run(own_run, Config(), Training(), torch.device("cpu"))
    k = keypoints_of([person("coco17", 3), person("coco17", 4)])
    k.conf[1, 5] = 0
    p = lift_keypoints(k, *square_around(k), load_hipart(run), load_lifter(run, "generated"),
                       run.device)
    fig, axes = lift.new_figure()
    for i in (1, 0):  # nothing stays of the person before
        lift.draw_person(axes, p, i, p["x_f"][i], p["y"][i])
        clouds = [c for c in axes[0].collections if len(c.get_offsets()) == 96]
        assert len(clouds) == 1 + 3 * i and len(axes[1].lines) == 16 * (1 + 3 * i)
        assert ("3 other hypotheses" in axes[1].get_title()) == bool(i)
        for n, cloud in enumerate(clouds[1:]):
            np.testing.assert_allclose(cloud.get_offsets(), p["others_f"][i, n], atol=1e-3)


def test_a_track_may_come_nearer():
    heights = np.linspace(100, 1000, 300)
    k = keypoints_of([person("coco17", 0, h) for h in heights])
    np.testing.assert_allclose(standing_height(k)[20:-20] / heights[20:-20], 1.0, atol=0.15)
    jumpy = heights.copy()
    jumpy[100] *= 3  # one wrong detection
    again = standing_height(keypoints_of([person("coco17", 0, h) for h in jumpy]))
    np.testing.assert_allclose(again, standing_height(k), rtol=0.02)


@pytest.mark.parametrize("wrong", range(1, 17))
def test_one_wrong_joint_does_not_change_the_size(wrong):
    k = keypoints_of([person("coco17")])
    k.x_s[0, wrong] += 400
    np.testing.assert_allclose(standing_height(k), 300, rtol=0.25)


def test_the_trunk_alone_tells_the_size():
    k = keypoints_of([person("coco17")])
    k.conf[0, [2, 3, 5, 6, 12, 13, 15, 16]] = 0
    np.testing.assert_allclose(standing_height(k), 300, rtol=0.12)


def test_standing_height_of_a_person_cut_at_the_hips():
    """From bones, so that half a person is not taken for a small whole one."""
    x_s, conf = np.zeros((2, 17, 2), np.float32), np.ones((2, 17), np.float32)
    x_s[:, [0, 8]] = [[0, 0], [0, -288]]
    x_s[:, [11, 12, 13]] = [[150, -288], [150, -102], [150, 44]]
    x_s[:, [14, 15, 16]] = x_s[:, [11, 12, 13]] * [-1, 1]
    conf[1, [1, 2, 3, 4, 5, 6]] = 0
    k = Keypoints(x_s, conf, ["a", "b"], ["", ""])
    np.testing.assert_allclose(standing_height(k), 1000, rtol=1e-5)
