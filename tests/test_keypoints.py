"""Keypoint files as other programs write them: read back, converted, refused; and sample.py --keypoints end to end."""

import importlib.util
import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import FUZZ
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import keypoints
from hipart import JOINT_NAMES
from keypoints import LAYOUTS, load_arrays, read, to_h36m

ROOT = Path(__file__).parent.parent

# Joint names of each layout as its owners list them, to check the maps against words instead of numbers.
_LIMBS = [f"{side} {joint}" for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle") for side in "lr"]
_COCO = ["nose", "l eye", "r eye", "l ear", "r ear", *_LIMBS]
NAMES = {
    "coco17": _COCO,
    "coco18": ["nose", "neck", "r shoulder", "r elbow", "r wrist", "l shoulder", "l elbow", "l wrist", "r hip", "r knee",
               "r ankle", "l hip", "l knee", "l ankle", "r eye", "l eye", "r ear", "l ear"],
    "body25": ["nose", "neck", "r shoulder", "r elbow", "r wrist", "l shoulder", "l elbow", "l wrist", "pelvis", "r hip",
               "r knee", "r ankle", "l hip", "l knee", "l ankle", "r eye", "l eye", "r ear", "l ear", *["foot"] * 6],
    "body25b": [*_COCO, "upper neck", "head top", *["foot"] * 6],
    "halpe26": [*_COCO, "head top", "neck", "pelvis", *["foot"] * 6],
    "mpii16": ["r ankle", "r knee", "r hip", "l hip", "l knee", "l ankle", "pelvis", "thorax", "upper neck", "head top",
               "r wrist", "r elbow", "r shoulder", "l shoulder", "l elbow", "l wrist"],
    "sh16": ["r ankle", "r knee", "r hip", "l hip", "l knee", "l ankle", "pelvis", "spine", "thorax", "head top", "r wrist",
             "r elbow", "r shoulder", "l shoulder", "l elbow", "l wrist"],
}


def sides(name):
    return name.replace("left ", "l ").replace("right ", "r ")


@pytest.mark.parametrize("layout", NAMES)
def test_maps_against_the_names_of_the_joints(layout):
    names, (n, table) = NAMES[layout], LAYOUTS[layout]
    assert len(names) == n and sorted(table) == list(range(17))
    for j, target in enumerate(map(sides, JOINT_NAMES)):
        sources = [names[s] for s in table[j]]
        if target.startswith(("l ", "r ")):
            assert sources == [target.replace("foot", "ankle")], (target, sources)
        else:  # on the middle line: sources come from the middle, or as many from the left as from the right
            assert sum(s.startswith("l ") for s in sources) == sum(s.startswith("r ") for s in sources), (target, sources)
            assert "foot" not in sources and not any("knee" in s or "wrist" in s for s in sources)


def person(k, seed=0):
    return np.random.default_rng(seed).uniform(100, 900, (k, 3)) * [1, 1, 1e-3]


def test_a_mean_needs_all_its_sources_and_takes_the_least_score():
    p = person(17)
    p[[11, 12], 2] = 0.9, 0.4
    x_s, conf = to_h36m(p[None], "coco17")
    np.testing.assert_allclose(x_s[0, 0], (p[11, :2] + p[12, :2]) / 2, rtol=1e-6)
    assert conf[0, 0] == np.float32(0.4)
    p[12] = 0
    x_s, conf = to_h36m(p[None], "coco17")
    assert conf[0, [0, 1, 7]].tolist() == [0, 0, 0] and (x_s[0, [0, 1, 7]] == 0).all() and conf[0, 4] > 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e7, 1e300])
def test_impossible_coordinates_are_missing_joints(value):
    p = person(17)
    p[9, 0] = value
    x_s, conf = to_h36m(p[None], "coco17")
    assert conf[0, 11 + 2] == 0 and np.isfinite(x_s).all() and (conf > 0).sum() == 16


def write(path, content):
    path.write_text(json.dumps(content))
    return path


def flat(p):
    return p.ravel().tolist()


def test_coco_annotations(tmp_path):
    p, q = person(17), person(17, 1)
    p[:, 2], q[:, 2] = 2, 1
    p[9] = 0
    content = dict(images=[dict(id=7, width=640, height=480, file_name="a.jpg")], annotations=[
        dict(id=3, image_id=7, keypoints=flat(p)), dict(id=4, image_id=7, keypoints=[0] * 51),
        dict(id=5, image_id=7, keypoints=flat(q))])
    k = read(write(tmp_path / "person_keypoints.json", content))
    assert k.name == ["a.jpg #3", "a.jpg #5"] and k.track == ["", ""] and k.size.tolist() == [[640, 480]] * 2
    np.testing.assert_allclose(k.x_s[0, 14], p[6, :2], rtol=1e-6)
    assert k.conf[0, 13] == 0 and set(np.unique(k.conf)) == {0, 1}
    assert any("means of others" in line for line in k.said)


def test_coco_results_and_alphapose(tmp_path):
    people = [person(17, i) for i in range(3)]
    results = [dict(image_id=i, category_id=1, keypoints=flat(p), score=1.0) for i, p in enumerate(people)]
    k = read(write(tmp_path / "results.json", results))
    assert k.track == [""] * 3 and "COCO results" in k.said[0]
    people[1][:, 0] += 5000
    frames = ["10.jpg", "10.jpg", "9.jpg", "9.jpg"]
    for idx, tracks in ((None, "0110"), ([0.0] * 4, "0110"), ([[7], [8], [7], [8]], "7878")):  # all 0: it was not tracking
        results = [dict(image_id=f, keypoints=flat(people[i]), score=1.0) for f, i in zip(frames, (1, 0, 0, 1), strict=True)]
        for i, r in enumerate(results if idx else ()):
            r["idx"] = idx[i]
        k = read(write(tmp_path / "alphapose-results.json", results))
        assert k.name == ["9.jpg #0", "9.jpg #1", "10.jpg #0", "10.jpg #1"] and "".join(k.track) == tracks
        np.testing.assert_allclose(k.x_s[2, 11], people[1][5, :2], rtol=1e-6)
    for n in (26, 136):
        q = person(n)
        k = read(write(tmp_path / f"halpe{n}.json", [dict(image_id="1.jpg", keypoints=flat(q), score=1.0, idx=5)]))
        assert "halpe26" in k.said[0] and k.track == ["5"]
        write(tmp_path / "mixed.json", [dict(image_id="1.jpg", keypoints=flat(person(i))) for i in (17, n)])
        with pytest.raises(ValueError, match="mixes people"):
            read(tmp_path / "mixed.json")
        np.testing.assert_allclose(k.x_s[0, 0], q[19, :2], rtol=1e-6)


def test_openpose_asks_for_an_ambiguous_layout(tmp_path):
    p = person(25)
    folder = tmp_path / "out"
    folder.mkdir()
    for frame in (9, 10):
        people = [dict(person_id=[-1], pose_keypoints_2d=flat(p))]
        write(folder / f"clip_{frame}_keypoints.json", dict(version=1.3, people=people))
    write(folder / "clip_11_keypoints.json", dict(version=1.3, people=[]))
    with pytest.raises(ValueError, match="body25 or body25b.*--layout"):
        read(folder)
    a, b = read(folder, "body25"), read(folder, "body25b")
    assert a.name == b.name == ["clip_9 #0", "clip_10 #0"] and a.track == ["0", "0"]
    np.testing.assert_allclose(a.x_s[0, 0], p[8, :2], rtol=1e-6)
    np.testing.assert_allclose(b.x_s[0, 10], p[18, :2], rtol=1e-6)
    old = write(tmp_path / "one_keypoints.json", dict(people=[dict(pose_keypoints=flat(person(18)))]))
    assert "coco18" in read(old).said[0]


def test_mmpose_video_and_image(tmp_path):
    p = person(17)
    instance = dict(keypoints=p[:, :2].tolist(), keypoint_scores=p[:, 2].tolist(), bbox=[[0, 0, 9, 9]], bbox_score=1)
    video = dict(meta_info={}, instance_info=[dict(frame_id=1, instances=[instance]), dict(frame_id=2, instances=[])])
    for name, content in (("video", video), ("image", dict(meta_info={}, instance_info=[instance]))):
        with pytest.raises(ValueError, match="h36m17 or coco17"):
            read(write(tmp_path / f"{name}.json", content))
        k = read(tmp_path / f"{name}.json", "coco17")
        np.testing.assert_allclose(k.x_s[0, 11], p[5, :2], rtol=1e-6)
        bare = read(write(tmp_path / "bare.json", content["instance_info"]), "coco17")  # what the inferencer writes
        assert np.array_equal(k.x_s, bare.x_s)
        content["meta_info"]["dataset_name"] = "coco"
        assert np.array_equal(k.x_s, read(write(tmp_path / f"{name}.json", content)).x_s)


def videopose(path, metadata, positions):
    np.savez_compressed(path, positions_2d=np.array(positions, object), metadata=np.array(metadata, object))
    return path


@pytest.mark.parametrize("metadata, layout", [
    (dict(layout_name="coco", num_joints=17), "coco17"), (dict(layout_name="h36m", num_joints=17), "h36m17"),
    (dict(num_joints=17, keypoints_symmetry=[[4, 5, 6, 11, 12, 13], [1, 2, 3, 14, 15, 16]]), "h36m17"),
    (dict(num_joints=17, keypoints_symmetry=[[1, 3, 5, 7, 9, 11, 13, 15], [2, 4, 6, 8, 10, 12, 14, 16]]), "coco17"),
    (dict(num_joints=16, keypoints_symmetry=[[3, 4, 5, 13, 14, 15], [0, 1, 2, 10, 11, 12]]), "mpii16"),
    (dict(num_joints=16, keypoints_symmetry=[[3, 4, 5, 13, 14, 15], [0, 1, 2, 10, 11, 12]]), "sh16"),
])  # fmt: skip
def test_videopose3d(tmp_path, metadata, layout):
    n = LAYOUTS[layout][0]
    frames = np.stack([person(n, i)[:, :2] for i in range(3)]).astype(np.float32)
    metadata = metadata | dict(video_metadata={"a.mp4": dict(w=1920, h=1080)})
    name = {"mpii16": "h36m_sh_pt_mpii", "sh16": "h36m_sh_ft_h36m"}.get(layout, "custom_x")  # both say the same within
    path = videopose(tmp_path / f"data_2d_{name}.npz", metadata, {"a.mp4": {"custom": [frames, None]}})
    k = read(path)
    assert len(k.name) == 3 and len(set(k.track)) == 1 and k.size.tolist() == [[1920, 1080]] * 3
    expected, conf = to_h36m(np.concatenate([frames, np.ones((3, n, 1))], -1), layout)
    np.testing.assert_array_equal(k.x_s, expected)
    assert (conf == k.conf).all()


@pytest.mark.parametrize("save", [np.save, np.savez_compressed])
def test_plain_arrays(tmp_path, save):
    p = np.stack([person(17, i) for i in range(4)])
    path = tmp_path / ("a.npy" if save is np.save else "a.npz")
    save(path, p)
    with pytest.raises(ValueError, match="--layout"):
        read(path)
    np.testing.assert_array_equal(read(path, "h36m17").x_s, p[..., :2].astype(np.float32))
    save(path, np.asfortranarray(p[..., :2]))
    k = read(path, "h36m17")
    np.testing.assert_array_equal(k.x_s, p[..., :2].astype(np.float32))
    assert (k.conf == 1).all() and k.track == ["a"] * 4


# ----------------------------------------------------------------------------------------------------------------------
# Refusals


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_no_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = np.empty((), object)
    array[()] = {"S1": Evil()}
    np.savez(tmp_path / "evil.npz", positions_2d=array, metadata=array)
    for f in (load_arrays, read):
        with pytest.raises(ValueError, match="evil.npz.*only arrays are read here"):
            f(tmp_path / "evil.npz")
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, dict(descr="|O", fortran_order=False, shape=()))
    buffer.write(pickle.dumps(eval))
    (tmp_path / "evil.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="builtins.eval"):
        read(tmp_path / "evil.npy")
    assert not (tmp_path / "pwned").exists()


def raw_pickle(path, *opcodes):
    """A .npy of an object array whose pickle is these bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, dict(descr="|O", fortran_order=False, shape=()))
    path.write_bytes(buffer.getvalue() + b"\x80\x04" + b"".join(opcodes) + b".")
    return path


NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"


@pytest.mark.parametrize("opcodes", [
    (NDARRAY, b"K\x02\x85X\x01\x00\x00\x00OC\x10", bytes(16), b"\x87R"),  # object pointers out of raw bytes
    (NDARRAY, b"J\x00\x00\x00\x40\x85X\x02\x00\x00\x00f8\x86R"),  # memory that nobody has filled
    (DTYPE, b"X\x03\x00\x00\x00V16\x85R"),  # a record, whose parts may be objects
    (b"]r\xff\xff\xff\x7f"),  # memo entry two thousand million
    (b"]q\x00h\x00a"),  # a list that holds itself
    (b"cnumpy\nload\n)R"), (b"cbuiltins\nexec\nX\x01\x00\x00\x001\x85R"), (b"\x82\x01"), (b"X\x01\x00\x00\x00aQ"),
], ids=range(9))  # fmt: skip
def test_unusual_pickles_are_refused(tmp_path, opcodes):
    path = raw_pickle(tmp_path / "a.npy", *([opcodes] if isinstance(opcodes, bytes) else opcodes))
    with pytest.raises(ValueError, match="a.npy is not a NumPy file that can be read"):
        read(path)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_every_kind_come_back(tmp_path, protocol):
    """As NumPy itself reads them, whatever pickle wrote them; names of NumPy 1 and 2."""
    inner = dict(a=np.arange(6.0).reshape(2, 3), b=[np.float32(2), None, (1, "text")],
                 c=np.asfortranarray(np.ones((3, 2), ">i2")), d=np.array([["x", "yy"]]),
                 e=np.array([1, None, "s"], object), f=np.zeros((0, 17, 2), np.float32))
    outer = np.empty((), object)
    outer[()] = inner
    for core in (b"numpy._core", b"numpy.core"):
        content = pickle.dumps(outer, protocol=protocol)[2:-1]
        if protocol < 4:
            content = content.replace(b"cnumpy._core.", b"c" + core + b".")
        path = raw_pickle(tmp_path / "a.npy", content)
        found = load_arrays(path)[""].item()
        assert found.keys() == inner.keys() and found["b"] == [np.float32(2), None, [1, "text"]]
        for key in "acdef":
            assert found[key].dtype == inner[key].dtype and np.array_equal(found[key], inner[key])


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z, z.open("a.npy", "w", force_zip64=True) as f:
        for _ in range(300):
            f.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="unpacks to more than"):
        read(tmp_path / "bomb.npz")


def test_a_header_that_promises_too_much(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, dict(descr="<f4", fortran_order=False, shape=(10**12, 17, 3)))
    (tmp_path / "a.npy").write_bytes(buffer.getvalue() + bytes(100))
    with pytest.raises(ValueError, match="size of one of its arrays"):
        read(tmp_path / "a.npy")


@pytest.mark.parametrize("name, text, expected", [
    ("a.json", "", "not a JSON"), ("a.json", "[" * 100_000, "not a JSON"), ("a.json", "{}", "no keypoint file"),
    ("a.json", "[]", "no person"), ("a.json", '[{"image_id": 1, "keypoints": []}]', "x, y, score"),
    ("a.json", '[{"image_id": 1, "keypoints": [1, 2]}]', "x, y, score"),
    ("a.json", '[{"keypoints": [1]}]', "the key 'image_id' is missing"),
    ("a.json", '[{"image_id": 1, "keypoints": "abc"}]', "a.json"), ("a.json", "[1]", "no keypoint file"),
    ("a.json", '[{"image_id": 1, "keypoints": {"a": 1}}]', "a.json"),
    ("a.json", '[{"image_id": 1, "keypoints": [1, 2, 3]}]', "has 1 joints"),
    ("a.json", '[{"image_id": 1, "keypoints": [[1, 2], [3, 4], [5, 6]]}]', "x, y, score"),
    ("a.json", '{"annotations": null}', "a.json"), ("a.json", '{"people": null}', "the list `people`"),
    ("a.json", '{"people": []}', "no person"), ("a.json", '{"people": [3]}', "a.json"),
    ("a.json", '{"annotations": [{"keypoints": [1]}]}', "a.json"), ("a.json", '{"instance_info": [{}]}', "a.json"),
    ("a.json", '{"instance_info": [{"keypoints": [[1, 2]], "keypoint_scores": []}]}', "keypoint_scores"),
    ("a.npy", "no array", "not a NumPy file"), ("a.npz", "no zip", "not a NumPy file"), ("a.txt", "", "unknown ending"),
])  # fmt: skip
def test_bad_files_get_one_sentence(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=expected) as e:
        read(tmp_path / name)
    assert name in str(e.value) and "\n" not in str(e.value)


def test_normalised_coordinates_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", person(17)[None] / 1000)
    with pytest.raises(ValueError, match="look normalised"):
        read(tmp_path / "a.npy", "h36m17")


@pytest.mark.parametrize("w, h, expected", [
    (640, 480, (640, 480)), (None, 480, (0, 0)), ("640", 480, (0, 0)), ({}, [1], (0, 0)), (-5, 4, (0, 0)),
    (True, True, (0, 0)), (float("inf"), 1, (0, 0)), (float("nan"), 1, (0, 0)), (10**400, 1, (0, 0)),
])  # fmt: skip
def test_impossible_image_sizes_are_unknown(tmp_path, w, h, expected):
    images = [dict(id=1, width=w, height=h)]
    content = dict(images=images, annotations=[dict(image_id=1, keypoints=flat(person(17)))])
    assert read(write(tmp_path / "a.json", content)).size.tolist() == [list(expected)]


def test_other_joints_in_cocos_format_are_asked_for(tmp_path):
    content = dict(categories=[dict(keypoints=["root", "right_hip"])], images=[], annotations=[
        dict(image_id=1, keypoints=flat(person(17)))])
    with pytest.raises(ValueError, match="h36m17 or coco17.*--layout"):
        read(write(tmp_path / "a.json", content))


def test_people_who_swap_places_in_the_list_keep_their_tracks(tmp_path):
    a, b = person(18) * [0.5, 1, 1], person(18, 1) * [0.5, 1, 1] + [600, 0, 0]
    folder = tmp_path / "out"
    folder.mkdir()
    for t, people in enumerate(([a, b], [b + [9, 5, 0], a], [], [b, a + [4, 4, 0], b + [5000, 0, 0]])):
        write(folder / f"{t}_keypoints.json", dict(people=[dict(pose_keypoints_2d=flat(p)) for p in people]))
    assert "".join(read(folder).track) == "0110102"


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        read(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="no .json file"):
        read(tmp_path)


def test_the_wrong_layout_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 16, 3)))
    with pytest.raises(ValueError, match="has 16 joints per person, and coco17 has 17"):
        read(tmp_path / "a.npy", "coco17")
    with pytest.raises(ValueError, match="--layout must be"):
        read(tmp_path / "a.npy", "coco")


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A valid file of each kind, for mutation."""
    folder, p = tmp_path_factory.mktemp("seeds"), person(17)
    instance = dict(keypoints=p[:, :2].tolist(), keypoint_scores=p[:, 2].tolist())
    annotations = [dict(id=1, image_id=1, keypoints=flat(p))]
    write(folder / "coco.json", dict(images=[dict(id=1, width=9, height=9)], annotations=annotations))
    write(folder / "alpha.json", [dict(image_id="1.jpg", keypoints=flat(p), score=1)])
    write(folder / "openpose.json", dict(people=[dict(pose_keypoints_2d=flat(person(18)))]))
    write(folder / "mmpose.json", dict(instance_info=[dict(frame_id=1, instances=[instance])]))
    np.save(folder / "array.npy", p[None])
    videopose(folder / "video.npz", dict(layout_name="coco"), {"a": {"custom": [p[None, :, :2]]}})
    return sorted(folder.iterdir())


@given(st.data())
@settings(max_examples=300 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_files_are_read_or_refused(seeds, tmp_path_factory, data):
    """Bytes changed, cut out, doubled; JSON values replaced: either keypoints of the promised shape, or one sentence."""
    source = data.draw(st.sampled_from(seeds))
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        a = data.draw(st.integers(0, max(0, len(content) - 1)))
        b = min(len(content), a + data.draw(st.integers(0, 40)))
        content[a:b] = data.draw(st.one_of(st.binary(max_size=8), st.just(content[a:b] * 2), st.sampled_from(
            [b"NaN", b"1e999", b"null", b"{}", b"[]", b'""', b"-1", b"true", b"\xff\xfe"])))
    path = tmp_path_factory.getbasetemp() / f"mutated{source.suffix}"
    path.write_bytes(content)
    try:
        k = read(path, data.draw(st.sampled_from(["auto", "coco17"])))
    except ValueError as e:
        assert path.name in str(e) or "--layout" in str(e)
    else:
        n = len(k.name)
        assert n and len(k.track) == n
        assert k.x_s.shape == (n, 17, 2) and k.conf.shape == (n, 17) and k.size.shape == (n, 2)
        assert np.isfinite(k.x_s).all() and np.isfinite(k.conf).all()


# ----------------------------------------------------------------------------------------------------------------------
# sample.py --keypoints


@pytest.fixture(scope="module")
def own_run(tiny_run, tmp_path_factory):
    """runs/tiny in a folder of its own, to write to."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copytree(tiny_run / "runs", folder / "runs")
    return folder / "runs" / "tiny"


@pytest.fixture
def sample(own_run, monkeypatch, capsys):
    """Run sample.py on that run with these options: exit status, stdout, stderr."""
    import sample

    monkeypatch.chdir(own_run.parent.parent)

    def run(*options):
        monkeypatch.setattr("sys.argv", ["sample.py", "--name", own_run.name, *map(str, options)])
        try:
            sample.main()
            status = 0
        except SystemExit as e:
            status = e.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


def test_the_example_from_file_to_animation(own_run, sample, tmp_path):
    """Twelve frames of it, around those in which two joints are hidden for the first time."""
    frames = json.loads((ROOT / "examples" / "wave.json").read_text())[4:16]
    status, out, err = sample("--keypoints", write(tmp_path / "wave.json", frames), "--image-size", 1000, 1000)
    assert status == 0, err
    assert "coco17" in out and "12 of 204 joints are missing" in out
    folder = own_run / "keypoints" / "wave"
    assert sorted(f.name for f in folder.iterdir()) == ["poses.npz", "track_1.gif"]
    assert (folder / "track_1.gif").read_bytes()[:6] == b"GIF89a"
    with np.load(folder / "poses.npz", allow_pickle=False) as z:
        shapes = {k: z[k].shape for k in z.files}
        assert shapes == dict(x_s=(12, 17, 2), conf=(12, 17), x_d=(12, 48, 2), x_f=(12, 96, 2), y=(12, 17, 3), name=(12,),
                              track=(12,))
        assert all(np.isfinite(z[k]).all() for k in ("x_s", "x_d", "x_f", "y"))
        assert (z["conf"] == 0).sum() == 12 and z["name"][6] == "10.jpg #0"


def test_the_example_is_what_its_script_writes(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("wave", ROOT / "examples" / "wave.py")
    wave = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wave)
    monkeypatch.setattr(wave, "__file__", str(tmp_path / "wave.py"))
    wave.main()
    ours, stored = (json.loads((folder / "wave.json").read_text()) for folder in (tmp_path, ROOT / "examples"))
    for a, b in zip(ours, stored, strict=True):
        np.testing.assert_allclose(a.pop("keypoints"), b.pop("keypoints"), atol=0.11)
        assert a == b


def test_people_in_images_get_a_picture_each(own_run, sample, tmp_path):
    people = [person(17, i) for i in range(3)]
    people[2][5:, 2] = 0.1
    path = write(tmp_path / "people.json", [dict(image_id=i, keypoints=flat(p), score=1.0) for i, p in enumerate(people)])
    status, out, err = sample("--keypoints", path)
    assert status == 0, err
    assert "1 people with fewer than 6 joints left out" in out and "2 with a square put around the person" in out
    folder = own_run / "keypoints" / "people"
    assert sorted(f.name for f in folder.iterdir()) == ["0_0.png", "1_1.png", "poses.npz"]
    far = people[0] + [5000, 0, 0]  # two people in one image: equal file names once cleaned
    write(path, [dict(image_id="a$\\b$/1", keypoints=flat(p), score=1.0) for p in (people[0], far)])
    status, out, err = sample("--keypoints", path)  # the results before are replaced
    assert status == 0, err
    assert sorted(f.name for f in folder.iterdir()) == ["a_b_1_0.png", "a_b_1_1.png", "poses.npz"]


def test_refusals_end_with_status_2_and_touch_nothing(own_run, sample, tmp_path):
    bad, example = tmp_path / "wave.json", ROOT / "examples" / "wave.json"
    bad.write_text("{")
    before = sorted(own_run.rglob("*"))
    for options, expected in (((bad,), "not a JSON"), ((tmp_path / "none.json",), "not there"),
                              ((example, "--min-score", "5"), "lower --min-score"),
                              ((example, "--image-size", "0", "9"), "--image-size")):
        status, out, err = sample("--keypoints", *options)
        assert status == 2 and expected in err and len(err.strip().split("\n")) == 1
    assert sorted(own_run.rglob("*")) == before


@pytest.mark.parametrize("size", [(1000, 1000), (1920, 1080), (1080, 1920)])
def test_normalisation_is_videopose3ds_and_portrait_is_padded(size):
    from sample import square_around, standing_height

    points = np.random.default_rng(0).uniform(50, 1000, (2, 17, 2)).astype(np.float32)
    k = keypoints.Keypoints(points, np.ones((2, 17), np.float32), ["a", "b"], ["", ""], np.array([size, (0, 0)], np.float64))
    centre, side, _ = square_around(k, None)
    w, h = size
    screen = (points[0] - centre[0]) / (side[0] / 2)
    longer = max(w, h)
    np.testing.assert_allclose(screen, points[0] * 2 / longer - [w / longer, h / longer], atol=1e-6)
    assert side[1] == pytest.approx(standing_height(k)[1] / 0.36)
    np.testing.assert_allclose(square_around(k, size)[1], longer)


def test_standing_height_of_a_person_cut_at_the_hips():
    """From bones, so that half a person is not taken for a small whole one."""
    from sample import standing_height

    x_s, conf = np.zeros((2, 17, 2), np.float32), np.ones((2, 17), np.float32)
    x_s[:, [0, 8]], x_s[:, [11, 12, 13]] = [[0, 0], [0, -288]], [[150, -288], [150, -102], [150, 44]]
    x_s[:, [14, 15, 16]] = x_s[:, [11, 12, 13]] * [-1, 1]
    conf[1, [1, 2, 3, 4, 5, 6]] = 0
    k = keypoints.Keypoints(x_s, conf, ["a", "b"], ["", ""], np.zeros((2, 2)))
    np.testing.assert_allclose(standing_height(k), 1000, rtol=1e-5)
