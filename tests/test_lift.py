"""lift.py: from a keypoint file to poses, pictures and animations, and the way there."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import lift
from lift import free_name, square_around, standing_height
from sources.keypoints import Keypoints

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


def person(seed=0):
    """COCO's 17 keypoints [17, 3]: x, y in pixels and a score."""
    return np.random.default_rng(seed).uniform(100, 900, (17, 3)) * [1, 1, 1e-3]


def write_people(path, people, image_ids):
    results = [dict(image_id=i, keypoints=p.ravel().tolist(), score=1.0)
               for p, i in zip(people, image_ids, strict=True)]
    path.write_text(json.dumps(results))
    return path


def test_the_example_from_file_to_animation(own_run, run_script, tmp_path):
    """Twelve frames of it, around those in which two joints are hidden for the first time."""
    frames = tmp_path / "wave.json"
    frames.write_text(json.dumps(json.loads(EXAMPLE.read_text())[4:16]))
    status, out, err = run_script(frames, "--image-size", 1000, 1000)
    assert status == 0, err
    assert "coco17" in out and "12 of 204 joints are missing" in out
    folder = own_run / "keypoints" / "wave"
    assert sorted(f.name for f in folder.iterdir()) == ["poses.npz", "track_1.gif"]
    assert (folder / "track_1.gif").read_bytes()[:6] == b"GIF89a"
    with np.load(folder / "poses.npz", allow_pickle=False) as z:
        shapes = {k: z[k].shape for k in z.files}
        assert shapes == dict(x_s=(12, 17, 2), conf=(12, 17), x_d=(12, 48, 2), x_f=(12, 96, 2),
                              y=(12, 17, 3), name=(12,), track=(12,))
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
    people = [person(i) for i in range(3)]
    people[2][5:, 2] = 0.1
    path = write_people(tmp_path / "people.json", people, range(3))
    status, out, err = run_script(path)
    assert status == 0, err
    assert "1 people with fewer than 6 joints left out" in out
    assert "2 with a square put around the person" in out
    folder = own_run / "keypoints" / "people"
    assert sorted(f.name for f in folder.iterdir()) == ["0_0.png", "1_1.png", "poses.npz"]
    far = people[0] + [5000, 0, 0]  # two people in one image: equal file names once cleaned
    write_people(path, (people[0], far), ["a$\\b$/1"] * 2)
    status, out, err = run_script(path)  # the results before are replaced
    assert status == 0, err
    found = sorted(f.name for f in folder.iterdir())
    assert found == ["a_b_1_0.png", "a_b_1_1.png", "poses.npz"]


def test_refusals_end_with_status_2_and_touch_nothing(own_run, run_script, tmp_path):
    bad = tmp_path / "wave.json"
    bad.write_text("{")
    before = sorted(own_run.rglob("*"))
    for options, expected in (
            ((bad,), "not a JSON"), ((tmp_path / "none.json",), "not there"),
            ((EXAMPLE, "--min-score", "5"), "lower --min-score"),
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


def test_a_run_that_is_not_there_names_those_that_are(run_script):
    status, out, err = run_script(EXAMPLE, name="standard")
    assert status == 2 and out == "" and len(err.strip().split("\n")) == 1
    assert "python train.py --preset standard --stage 1" in err and "--name: tiny" in err


@pytest.mark.parametrize("size", [(1000, 1000), (1920, 1080), (1080, 1920)])
def test_normalisation_is_videopose3ds_and_portrait_is_padded(size):
    points = np.random.default_rng(0).uniform(50, 1000, (2, 17, 2)).astype(np.float32)
    sizes = np.array([size, (0, 0)], np.float64)
    k = Keypoints(points, np.ones((2, 17), np.float32), ["a", "b"], ["", ""], sizes)
    centre, side, _ = square_around(k, None)
    w, h = size
    screen = (points[0] - centre[0]) / (side[0] / 2)
    longer = max(w, h)
    expected = points[0] * 2 / longer - [w / longer, h / longer]
    np.testing.assert_allclose(screen, expected, atol=1e-6)
    assert side[1] == pytest.approx(standing_height(k)[1] / 0.36)
    np.testing.assert_allclose(square_around(k, size)[1], longer)


def test_a_person_of_an_unusual_size_is_said():
    points = np.random.default_rng(0).uniform(50, 1000, (1, 17, 2)).astype(np.float32)
    k = Keypoints(points, np.ones((1, 17), np.float32), ["a"], [""], np.full((1, 2), 1e5))
    assert "far from the 36% that training shows" in square_around(k, None)[2]
    k.size[:] = standing_height(k) / 0.36
    assert "far from" not in square_around(k, None)[2]


def test_standing_height_of_a_person_cut_at_the_hips():
    """From bones, so that half a person is not taken for a small whole one."""
    x_s, conf = np.zeros((2, 17, 2), np.float32), np.ones((2, 17), np.float32)
    x_s[:, [0, 8]] = [[0, 0], [0, -288]]
    x_s[:, [11, 12, 13]] = [[150, -288], [150, -102], [150, 44]]
    x_s[:, [14, 15, 16]] = x_s[:, [11, 12, 13]] * [-1, 1]
    conf[1, [1, 2, 3, 4, 5, 6]] = 0
    k = Keypoints(x_s, conf, ["a", "b"], ["", ""], np.zeros((2, 2)))
    np.testing.assert_allclose(standing_height(k), 1000, rtol=1e-5)


def test_file_names_are_plain_and_differ():
    taken = set()
    names = [free_name(text, taken) for text in ("../a b", "../a b", "a/b", "../a b")]
    assert len(set(names)) == 4 and names[0] == ".._a_b" and taken == set(names)
    assert not any("/" in name or " " in name for name in names)
