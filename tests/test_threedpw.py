"""sources/threedpw.py: files in 3DPW's layout from known geometry, read back against bodies that
are posed vertex by vertex."""

import copy
import pickle
import shutil

import numpy as np
import pytest
from conftest import FUZZ, H36M_OF_SMPL, SMPL_JOINTS, regressor_onto, smpl_content, write_smpl_pkl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_smpl import direct, rodrigues

from hipart import RIGHT
from sources import threedpw
from sources.dataset import load

N = 5  # frames of a sequence
MODELS = {g: smpl_content(10, 8, seed) for seed, g in enumerate("mf")}
MODELS["f"]["v_template"] = MODELS["f"]["v_template"] * [0.9, 0.94, 0.9]
# In Human3.6M's order; as the real file's, its rows sum to 1 only nearly.
REGRESSOR = regressor_onto(SMPL_JOINTS[H36M_OF_SMPL], MODELS["m"]["v_template"])
REGRESSOR = REGRESSOR * np.linspace(0.9996, 1, 17)[:, None]
LANDSCAPE = [[1961, 0, 960], [0, 1962, 540], [0, 0, 1]]
PORTRAIT = [[1969, 0, 540], [0, 1970, 960], [0, 0, 1]]
COCO18 = (
    "nose neck r_shoulder r_elbow r_wrist l_shoulder l_elbow l_wrist "
    "r_hip r_knee r_ankle l_hip l_knee l_ankle r_eye l_eye r_ear l_ear"
).split()
SMPL_OF_COCO = [15, 12, 17, 19, 21, 16, 18, 20, 2, 5, 8, 1, 4, 7, 15, 15, 15, 15]
H36M = [["l_hip", "r_hip"], ["r_hip"], ["r_knee"], ["r_ankle"], ["l_hip"], ["l_knee"], ["l_ankle"],
        ["l_hip", "r_hip", "l_shoulder", "r_shoulder"], ["l_shoulder", "r_shoulder"], ["nose"],
        ["r_eye", "l_eye"], ["l_shoulder"], ["l_elbow"], ["l_wrist"],
        ["r_shoulder"], ["r_elbow"], ["r_wrist"]]  # fmt: skip


def make_sequence(seed, K, genders="mf", gender_key="genders", n_betas=10):
    """A file's content. The camera is anywhere in the world; the people are 3 to 6 m in front of
    it."""
    rng, K, P = np.random.default_rng(seed), np.array(K, float), len(genders)
    cam = np.tile(np.eye(4), (N, 1, 1))
    for c in cam:
        c[:3, :3], c[:3, 3] = rodrigues(rng.normal(size=3) * 2), rng.normal(size=3) * 5
    poses, betas = rng.normal(size=(P, N, 24, 3)) * 0.3, rng.normal(size=(P, n_betas))
    place = rng.uniform((-0.5, -0.4, 3), (0.5, 0.4, 6), (P, N, 3))
    trans = np.einsum("nji,pnj->pni", cam[:, :3, :3], place - cam[:, :3, 3])
    points = SMPL_JOINTS[SMPL_OF_COCO] + rng.normal(size=(P, N, 18, 3)) * 0.02 + trans[:, :, None]
    pixel = np.einsum("nij,pnkj->pnki", cam[:, :3, :3], points) + cam[:, None, :3, 3]
    pixel = np.einsum("ij,pnkj->pnki", K, pixel / pixel[..., 2:])
    score = rng.uniform(0.35, 1, (P, N, 18, 1))
    poses2d = np.concatenate([pixel[..., :2], score], -1).swapaxes(-1, -2)  # [P, N, 3, 18]
    return {
        "sequence": "any", "cam_intrinsics": K, "cam_poses": cam,
        "img_frame_ids": np.arange(N) * 2 + 7,
        "betas": list(betas), "poses": list(poses.reshape(P, N, 72)), "trans": list(trans),
        "poses2d": list(poses2d),
        gender_key: list(genders), "campose_valid": [np.ones(N, bool) for _ in genders],
        "poses_60Hz": [np.zeros((2 * N, 72))] * P, "jointPositions": [np.zeros((N, 72))] * P,
        "texture_maps": [],
    }  # fmt: skip


def make_sequences():
    """Folder and name -> content, with everything that may be wrong with a frame in the first
    one."""
    first = make_sequence(0, LANDSCAPE)
    first["campose_valid"][0][1] = False
    absurd, too, absent = [5000, 300, 0.9], [300, -1081, 0.9], [0, 0, 0]
    first["poses2d"][0][2, :, [9, 13, 17]] = absurd, too, absent
    first["poses2d"][0][3] = 0  # nothing detected
    first["poses2d"][1][0, 2, 5:] = 0.3  # five that are sure
    first["poses2d"][1][1, 2, 7:] = 0.3  # seven
    first["poses"][1][2, 5] = np.nan
    R, t = first["cam_poses"][3, :3, :3], first["cam_poses"][3, :3, 3]
    first["trans"][1][3] = -2 * R.T @ t - first["trans"][1][3]  # behind the camera, as far away
    first["poses2d"][1][4, 0, 0] = np.nan
    return {
        "test/downtown_bar_00": first, "test/flat_guitar_01": make_sequence(1, PORTRAIT, "m"),
        "train/courtyard_box_00": make_sequence(2, LANDSCAPE, "ff"),
        "validation/outdoors_golf_01": make_sequence(3, PORTRAIT, "fm", "gender", 300),
    }  # fmt: skip


SEQUENCES = make_sequences()


def write_folder(folder, sequences=SEQUENCES, regressor=REGRESSOR):
    for name, content in sequences.items():
        path = folder / "sequenceFiles" / f"{name}.pkl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(content, protocol=2))
    # What is neither test nor 3DPW-OCC is not even opened.
    for name in ("downtown_runForBus_00", "courtyard_boxes_00"):
        (folder / "sequenceFiles/train" / f"{name}.pkl").write_bytes(b"no pickle")
    (folder / "models").mkdir()
    write_smpl_pkl(folder / "models/basicModel_f_lbs_10_207_0_v1.0.0.pkl", MODELS["f"])
    np.savez(folder / "models/SMPL_MALE.npz", **MODELS["m"])
    (folder / "models/SMPL_NEUTRAL.pkl").write_bytes(b"no pickle")
    np.save(folder / "J_regressor_h36m_correct.npy", regressor)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("3dpw"))


@pytest.fixture(scope="module")
def data(folder, tmp_path_factory):
    return threedpw.prepare(folder, tmp_path_factory.mktemp("data") / "3dpw", False)


def frames_that_count(names):
    for name in names:
        for person in range(len(SEQUENCES[name]["poses"])):
            for frame in range(N):
                first = name == "test/downtown_bar_00"
                if not (first and (person, frame) in [(0, 1), (0, 3), (1, 0), (1, 2), (1, 3)]):
                    yield name, person, frame


def expected_sample(name, person, frame):
    """One sample on its own: a loop over vertices and homogeneous matrices, from metres in the
    world to pixels."""
    c = SEQUENCES[name]
    gender = c["genders" if "genders" in c else "gender"][person]
    model, betas = MODELS[gender], c["betas"][person][:10]
    vertices = direct(model, c["poses"][person][frame].reshape(24, 3), betas, np.zeros(3))
    world = REGRESSOR @ vertices + c["trans"][person][frame]
    seen = np.array([(c["cam_poses"][frame] @ np.append(p, 1))[:3] for p in world])
    ideal = np.array([[1145, 0, 500], [0, 1145, 500], [0, 0, 1.0]])
    image = (ideal @ (seen / seen[:, 2:]).T).T[:, :2]
    width, height = 2 * c["cam_intrinsics"][:2, 2]
    points = {}
    for joint, (x, y, score) in zip(COCO18, c["poses2d"][person][frame].T, strict=True):
        if score > 0 and -width <= x <= 2 * width and -height <= y <= 2 * height:
            points[joint] = (ideal @ np.linalg.inv(c["cam_intrinsics"]) @ [x, y, 1])[:2], score
    detected, conf = np.zeros((17, 2)), np.zeros(17)
    for j, sources in enumerate(H36M):
        here = [points[s] for s in sources if s in points]
        if len(here) == len(sources) or (j == 10 and here):
            detected[j], conf[j] = np.mean([p for p, _ in here], 0), min(s for _, s in here)
    body = model["v_template"] + model["shapedirs"] @ betas
    stature = 1000 * (body[:, 1].max() - body[:, 1].min())
    return {"root": 1000 * seen[0], "y": 1000 * (seen - seen[0]), "x_s": image,
            "x_s_det": detected, "conf": conf,
            "height_px": 1145 * stature / (1000 * seen[0, 2])}  # fmt: skip


# float32 stores 8000 mm to 2.5e-4 mm and 1000 px to 3e-5 px. Detections are rounded twice, once of
# them as 2000 px or more.
TOLERANCE = {"root": 1e-3, "y": 1e-3, "x_s": 1e-4, "x_s_det": 2e-4, "conf": 1e-6, "height_px": 1e-4}


@pytest.mark.parametrize("split, names", [
    ("test", ["test/downtown_bar_00", "test/flat_guitar_01"]),
    ("occ", ["train/courtyard_box_00", "test/flat_guitar_01", "validation/outdoors_golf_01"]),
])  # fmt: skip
def test_every_number_of_every_sample(data, split, names):
    arrays, meta = load(data, split)
    want, n = list(frames_that_count(names)), {"test": 10, "occ": 25}[split]
    assert len(want) == len(arrays["y"]) == meta["splits"][split]["n"] == n
    for i, (name, person, frame) in enumerate(want):
        for key, value in expected_sample(name, person, frame).items():
            assert np.abs(arrays[key][i] - value).max() < TOLERANCE[key], (key, name, person, frame)
        stem = name.split("/")[1]
        assert meta["actions"][arrays["action"][i]] == stem
        assert meta["people"][arrays["subject"][i]] == [stem, person]
        assert arrays["sequence"][i] == arrays["subject"][i] and arrays["frame"][i] == frame
    assert not any(arrays[k].any() for k in ("x_d", "x_f", "has_mesh", "camera"))
    missing = arrays["conf"] == 0
    assert (arrays["x_s_det"][missing] == 0).all()
    if split == "test":
        # Frames 0, 2, 4 of the first person: absurd and absent joints are missing, others stay.
        assert np.flatnonzero(missing[1]).tolist() == [2, 6]
        assert not missing[0].any() and np.flatnonzero(missing[4]).tolist() == [9]


def test_what_is_said_of_the_set(data):
    _, meta = load(data, "occ")
    actions = "courtyard_box_00 downtown_bar_00 flat_guitar_01 outdoors_golf_01"
    assert meta["actions"] == actions.split()
    assert len(meta["people"]) == 7 and meta["noise"] is None and meta["image_size"] == [1000, 1000]
    assert set(meta["splits"]) == {"test", "occ"} and len(threedpw.OCC) == 17
    assert "never train on 3DPW" in meta["splits"]["occ"]["about"]
    assert all(s["with_mesh"] == 0 for s in meta["splits"].values()) and meta["seed"] == 0
    assert meta["frame_rate"] == 30
    assert meta["joints_14"] == [1, 2, 3, 4, 5, 6, 8, *range(10, 17)]
    assert "CPN detections are not distributed" in meta["sources"]["detections"]
    assert {p.name for p in data.parent.iterdir()} == {"3dpw"}


@pytest.mark.parametrize("limbs, order", [
    ("legs", [0, 4, 5, 6, 1, 2, 3, *range(7, 17)]),  # SPIN's
    ("arms", [*range(11), 14, 15, 16, 11, 12, 13]),
    ("legs and arms", [0, 4, 5, 6, 1, 2, 3, 7, 8, 9, 10, 14, 15, 16, 11, 12, 13]),
])  # fmt: skip
def test_a_regressor_that_has_the_other_side_first(tmp_path, data, capsys, limbs, order):
    source = write_folder(tmp_path / "in", regressor=REGRESSOR[order])
    out = threedpw.prepare(source, tmp_path / "out", False)
    assert capsys.readouterr().out.count(f"left and right {limbs} swapped") == 1
    for split in ("test", "occ"):
        for key in ("y", "x_s", "x_s_det"):
            turned, straight = (np.load(of / split / f"{key}.npy") for of in (out, data))
            assert np.array_equal(turned, straight)


def test_what_is_printed(folder, tmp_path, capsys):
    threedpw.prepare(folder, tmp_path / "out", False)
    out = capsys.readouterr().out
    assert "swapped" not in out
    assert "3 of 24 train, 1 of 12 validation, 2 of 24 test" in out.replace(" sequences", "")
    assert "30 samples; 2 more left out" in out and "not used: models/SMPL_NEUTRAL.pkl" in out


@pytest.mark.parametrize("name, kind", [
    ("SMPL_FEMALE.npz", "female"), ("model_f.pkl", "female"),
    ("SMPL_MALE.PKL", "male"), ("basicmodel_m_lbs_10_207_0_v1.1.0.pkl", "male"),
    ("basicmodel_neutral_lbs_10_207_0_v1.1.0.pkl", None), ("smpl_mean_params.npz", None),
    ("J_regressor_h36m.npy", "regressor"), ("J_regressor_coco.npy", None),
    ("train/downtown_bar_00.pkl", "train"), ("train/._downtown_bar_00.pkl", None),
    ("male.txt", None), ("other.pkl", None),
])  # fmt: skip
def test_files_are_known_by_their_names(tmp_path, name, kind):
    assert threedpw._kind(tmp_path / name) == kind


@pytest.mark.parametrize("missing, said", [
    ("models/SMPL_MALE.npz",
     "lacks male .the male SMPL model, .pkl or .npz, https://smpl.is.tue.mpg.de"),
    ("models/basicModel_f_lbs_10_207_0_v1.0.0.pkl", "lacks female"),
    ("J_regressor_h36m_correct.npy", "lacks regressor .*Pose2Mesh_RELEASE"),
    ("sequenceFiles/test", "lacks test .sequenceFiles/test/.*virtualhumans"),
    ("sequenceFiles/train", "lacks train"),
    ("sequenceFiles/validation", "lacks validation"),
])  # fmt: skip
def test_missing_parts_are_said_before_any_work(folder, tmp_path, missing, said):
    shutil.copytree(folder, tmp_path / "in")
    path = tmp_path / "in" / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=said):
        threedpw.prepare(tmp_path / "in", tmp_path / "data/out", False)
    assert not (tmp_path / "data").exists()


def without_detections(folder):
    for name in ("test/downtown_bar_00", "test/flat_guitar_01"):
        c = copy.deepcopy(SEQUENCES[name])
        c["campose_valid"] = [0 * v for v in c["campose_valid"]]
        (folder / f"sequenceFiles/{name}.pkl").write_bytes(pickle.dumps(c, protocol=2))


def without_occluded(folder):
    for name in ("box", "golf", "guitar"):
        (path,) = folder.rglob(f"*_{name}_*.pkl")
        path.rename(path.with_name(f"x{path.name}"))


@pytest.mark.parametrize("change, said", [
    (without_detections, "the split test would be empty: .*downtown_bar_00, flat_guitar_01"),
    (without_occluded, "the split occ would be empty: .*none found"),
    (lambda d: np.save(d / "J_regressor_h36m_correct.npy", REGRESSOR[:, 1:]),
     r"J_regressor.*\[17, 82\].*found .* .17, 81"),
    (lambda d: np.save(d / "J_regressor_h36m_correct.npy", REGRESSOR * np.nan),
     "J_regressor.*expected finite numbers"),
    (lambda d: np.save(d / "J_regressor_h36m_correct.npy", np.roll(REGRESSOR, 1, 0)),
     r"J_regressor.*rows .1, 2, 3. and"),
    (lambda d: np.save(d / "J_regressor_h36m.npy", REGRESSOR),
     "J_regressor.*second regressor file beside"),
    (lambda d: np.savez(d / "model_m.npz", **MODELS["m"]), "second male file beside"),
    (lambda d: write_smpl_pkl(next(d.rglob("*_f_*.pkl")), smpl_content(3, 3)),
     "_f_lbs.*as many vertices .* 82"),
    (lambda d: shutil.copy(d / "sequenceFiles/test/flat_guitar_01.pkl", d / "sequenceFiles/train"),
     "second flat_guitar_01"),
    (lambda d: (d / "sequenceFiles/test/flat_guitar_01.pkl").write_bytes(pickle.dumps([])),
     "flat_guitar_01.*found list"),
])  # fmt: skip
def test_other_files_get_one_sentence_and_leave_nothing(folder, tmp_path, change, said):
    shutil.copytree(folder, tmp_path / "in")
    change(tmp_path / "in")
    with pytest.raises(ValueError, match=said) as e:
        threedpw.prepare(tmp_path / "in", tmp_path / "data/out", False)
    assert "\n" not in str(e.value)
    assert not any(tmp_path.glob("data/*")) and not any(tmp_path.glob("data/.*"))


def test_interrupted_it_leaves_what_was_there(folder, tmp_path, monkeypatch):
    out = threedpw.prepare(folder, tmp_path / "data/out", False)
    with pytest.raises(ValueError, match="exists already"):
        threedpw.prepare(folder, out, False)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    read, calls = threedpw.read_sequence, []

    def stop_while_writing(path):
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return read(path)

    monkeypatch.setattr(threedpw, "read_sequence", stop_while_writing)
    with pytest.raises(KeyboardInterrupt):
        threedpw.prepare(folder, out, True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    monkeypatch.undo()
    assert threedpw.prepare(folder, out, True) == out
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_part_at_a_time_is_the_same(folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(threedpw, "AT_ONCE", 2)
    out = threedpw.prepare(folder, tmp_path / "out", False)
    for path in data.rglob("*.npy"):
        whole, parts = np.load(path), np.load(out / path.relative_to(data))
        assert np.allclose(whole, parts, rtol=1e-6, atol=1e-4), path


def test_people_too_near_and_numbers_that_overflow_are_left_out(folder, tmp_path, capsys, recwarn):
    shutil.copytree(folder, tmp_path / "in")
    c = copy.deepcopy(SEQUENCES["test/flat_guitar_01"])
    c["poses"][0][0] = 1e200
    c["trans"][0][1] = 1e300
    c["cam_poses"][2, 1, 1] = np.inf
    c["cam_poses"][3:5], c["poses"][0][3:5] = np.eye(4), 0
    c["trans"][0][3], c["trans"][0][4] = (0, 0, 0.4), (0, 0, 0.6)  # the latter is far enough, but
    c["poses"][0][4, 0] = np.pi / 2  # feet towards the camera
    (tmp_path / "in/sequenceFiles/test/flat_guitar_01.pkl").write_bytes(pickle.dumps(c, protocol=2))
    out = threedpw.prepare(tmp_path / "in", tmp_path / "out", False)
    assert "25 samples; 7 more left out" in capsys.readouterr().out and not recwarn.list
    assert load(out, "test")[1]["splits"]["test"]["n"] == 5


@pytest.mark.parametrize("change, said", [
    (dict(poses=np.zeros((1 << 40, 0))), "the shape of one of its arrays is none"),
    (dict(cam_poses=np.zeros((100_001, 4, 4), "i1")), "at most 100000 frames, found 100001"),
    (dict(poses=np.zeros((10**7, 1), "i1")), "at most 100 people, found 10000000 in poses"),
    (dict(genders=["\x1b[31m\n" + "m" * 10**6] * 2), r"genders m or f, found 10 and .x1b.31m.nm"),
    (dict(genders=[10**400, "m"]), "genders m or f, found 10 and a number of more than 64 bits"),
    (dict(cam_intrinsics=[10**400, 1.0]), "cam_intrinsics to be numbers"),
    (dict(cam_poses=[np.zeros((300, 800), "i1")] * 31 + [1.5]), "cam_poses to be numbers"),
])  # fmt: skip
def test_sequences_that_want_much(tmp_path, change, said):
    path = tmp_path / "a.pkl"
    path.write_bytes(pickle.dumps(_SMALL | change, protocol=2))
    with pytest.raises(ValueError, match=f"a.pkl.*{said}") as e:
        threedpw.read_sequence(path)
    assert str(e.value).isprintable() and len(str(e.value)) < 600


def test_names_of_sequences_are_text_for_one_line(folder, tmp_path):
    """A file may have any name, and the name of a sequence gets into tables and pictures."""
    shutil.copytree(folder, tmp_path / "in")
    path = tmp_path / "in/sequenceFiles/test/downtown_bar_00.pkl"
    path.rename(path.with_name("a\nb\udcff.pkl"))
    meta = load(threedpw.prepare(tmp_path / "in", tmp_path / "out", False), "test")[1]
    assert "a\\nb\\udcff" in meta["actions"] and ["a\\nb\\udcff", 0] in meta["people"]


KEYS = ["cam_intrinsics", "cam_poses", "poses", "betas", "trans", "poses2d", "campose_valid",
        "genders"]  # fmt: skip
JUNK = [None, 3, "text", [], [[]], [[1.0], [1.0, 2.0]], {}, np.float64(2), np.zeros((2, 0)),
        np.array("text"), np.array(["a", None], object), [np.zeros(3), "x"],
        np.full((3, 3), -1.0), np.full((2, N + 1), np.nan)]  # fmt: skip


@given(key=st.sampled_from(KEYS),
       kind=st.sampled_from(["drop", "junk", "cut", "more", "part", "text", "bytes"]),
       junk=st.sampled_from(JUNK), where=st.floats(0, 1))  # fmt: skip
@settings(max_examples=60 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_sequences_are_refused(folder, data, tmp_path_factory, key, kind, junk, where):
    content, path = copy.deepcopy(_SMALL), folder / "sequenceFiles/train/courtyard_box_00.pkl"
    value, plain = content[key], key.startswith("cam_")
    if kind == "drop":
        del content[key]
    elif kind == "junk":
        content[key] = junk
    elif kind in ("cut", "more"):  # a person, or a frame of all, too few or too many
        content[key] = value[:-1] if kind == "cut" else [*value, value[0]]
    elif plain or key == "genders":
        content[key] = [["x"]] * 2
    elif kind == "part":  # of one person's
        content[key][1] = value[1][:-1]
    elif kind == "text":
        content[key][1] = np.full(value[1].shape, "x")
    raw, good = pickle.dumps(content, protocol=2), path.read_bytes()
    if kind == "bytes":
        raw = pickle.dumps(_SMALL, protocol=2)[: int(where * 1000)]
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
    path.write_bytes(raw)
    try:
        with pytest.raises(ValueError) as e:
            threedpw.prepare(folder, data, True)
    finally:
        path.write_bytes(good)
    assert str(path) in str(e.value) and "\n" not in str(e.value) and len(str(e.value)) < 500
    assert kind == "bytes" or key in str(e.value)
    assert {p: p.stat().st_mtime_ns for p in data.rglob("*")} == before
    assert len(list(data.parent.iterdir())) == 1


_SMALL = make_sequence(9, LANDSCAPE)


def test_the_regressor_of_the_tests_is_in_the_order_of_human36m():
    x = REGRESSOR @ MODELS["m"]["v_template"][:, 0]
    assert (x[list(RIGHT)] < 0).all() and (x[[4, 5, 6, 11, 12, 13]] > 0).all()
