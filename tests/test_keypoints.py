"""sources/keypoints.py: files as other programs write them, read back, converted, or refused."""

import json

import numpy as np
import pytest
from conftest import FUZZ
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hipart import JOINT_NAMES
from sources.keypoints import LAYOUTS, read, to_h36m

# The names of the joints of each layout as its owners list them, to check the maps against words
# instead of numbers.
_PAIRS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
_LIMBS = [f"{side} {joint}" for joint in _PAIRS for side in "lr"]
_COCO = ["nose", "l eye", "r eye", "l ear", "r ear", *_LIMBS]
_ARMS = ["r shoulder", "r elbow", "r wrist", "l shoulder", "l elbow", "l wrist"]
_LEGS = ["r hip", "r knee", "r ankle", "l hip", "l knee", "l ankle"]
_FACE = ["r eye", "l eye", "r ear", "l ear"]
_MPII_LEGS = ["r ankle", "r knee", "r hip", "l hip", "l knee", "l ankle", "pelvis"]
_MPII_ARMS = ["r wrist", "r elbow", "r shoulder", "l shoulder", "l elbow", "l wrist"]
NAMES = {
    "coco17": _COCO,
    "coco18": ["nose", "neck", *_ARMS, *_LEGS, *_FACE],
    "body25": ["nose", "neck", *_ARMS, "pelvis", *_LEGS, *_FACE, *["foot"] * 6],
    "body25b": [*_COCO, "upper neck", "head top", *["foot"] * 6],
    "halpe26": [*_COCO, "head top", "neck", "pelvis", *["foot"] * 6],
    "mpii16": [*_MPII_LEGS, "thorax", "upper neck", "head top", *_MPII_ARMS],
    "sh16": [*_MPII_LEGS, "spine", "thorax", "head top", *_MPII_ARMS],
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
        else:  # on the middle line: of the middle, or as many of the left as of the right
            left, right = (sum(s.startswith(side) for s in sources) for side in ("l ", "r "))
            assert left == right, (target, sources)
            assert "foot" not in sources
            assert not any("knee" in s or "wrist" in s for s in sources)


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
    assert (
        conf[0, [0, 1, 7]].tolist() == [0, 0, 0]
        and (x_s[0, [0, 1, 7]] == 0).all()
        and conf[0, 4] > 0
    )


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
    content = dict(
        images=[dict(id=7, width=640, height=480, file_name="a.jpg")],
        annotations=[
            dict(id=3, image_id=7, keypoints=flat(p)),
            dict(id=4, image_id=7, keypoints=[0] * 51),
            dict(id=5, image_id=7, keypoints=flat(q)),
        ],
    )
    k = read(write(tmp_path / "person_keypoints.json", content))
    assert (
        k.name == ["a.jpg #3", "a.jpg #5"]
        and k.track == ["", ""]
        and k.size.tolist() == [[640, 480]] * 2
    )
    np.testing.assert_allclose(k.x_s[0, 14], p[6, :2], rtol=1e-6)
    assert k.conf[0, 13] == 0 and set(np.unique(k.conf)) == {0, 1}
    assert any("means of others" in line for line in k.said)


def test_coco_results_and_alphapose(tmp_path):
    people = [person(17, i) for i in range(3)]
    results = [
        dict(image_id=i, category_id=1, keypoints=flat(p), score=1.0) for i, p in enumerate(people)
    ]
    k = read(write(tmp_path / "results.json", results))
    assert k.track == [""] * 3 and "COCO results" in k.said[0]
    people[1][:, 0] += 5000
    frames = ["10.jpg", "10.jpg", "9.jpg", "9.jpg"]
    for idx, tracks in (
        (None, "0110"),
        ([0.0] * 4, "0110"),
        ([[7], [8], [7], [8]], "7878"),
    ):  # all 0: it was not tracking
        results = [
            dict(image_id=f, keypoints=flat(people[i]), score=1.0)
            for f, i in zip(frames, (1, 0, 0, 1), strict=True)
        ]
        for i, r in enumerate(results if idx else ()):
            r["idx"] = idx[i]
        k = read(write(tmp_path / "alphapose-results.json", results))
        assert (
            k.name == ["9.jpg #0", "9.jpg #1", "10.jpg #0", "10.jpg #1"]
            and "".join(k.track) == tracks
        )
        np.testing.assert_allclose(k.x_s[2, 11], people[1][5, :2], rtol=1e-6)
    for n in (26, 136):
        q = person(n)
        k = read(
            write(
                tmp_path / f"halpe{n}.json",
                [dict(image_id="1.jpg", keypoints=flat(q), score=1.0, idx=5)],
            )
        )
        assert "halpe26" in k.said[0] and k.track == ["5"]
        write(
            tmp_path / "mixed.json",
            [dict(image_id="1.jpg", keypoints=flat(person(i))) for i in (17, n)],
        )
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
    old = write(
        tmp_path / "one_keypoints.json", dict(people=[dict(pose_keypoints=flat(person(18)))])
    )
    assert "coco18" in read(old).said[0]


def test_mmpose_video_and_image(tmp_path):
    p = person(17)
    instance = dict(
        keypoints=p[:, :2].tolist(),
        keypoint_scores=p[:, 2].tolist(),
        bbox=[[0, 0, 9, 9]],
        bbox_score=1,
    )
    video = dict(
        meta_info={},
        instance_info=[dict(frame_id=1, instances=[instance]), dict(frame_id=2, instances=[])],
    )
    for name, content in (
        ("video", video),
        ("image", dict(meta_info={}, instance_info=[instance])),
    ):
        with pytest.raises(ValueError, match="h36m17 or coco17"):
            read(write(tmp_path / f"{name}.json", content))
        k = read(tmp_path / f"{name}.json", "coco17")
        np.testing.assert_allclose(k.x_s[0, 11], p[5, :2], rtol=1e-6)
        bare = read(
            write(tmp_path / "bare.json", content["instance_info"]), "coco17"
        )  # what the inferencer writes
        assert np.array_equal(k.x_s, bare.x_s)
        content["meta_info"]["dataset_name"] = "coco"
        assert np.array_equal(k.x_s, read(write(tmp_path / f"{name}.json", content)).x_s)


def videopose(path, metadata, positions):
    np.savez_compressed(
        path, positions_2d=np.array(positions, object), metadata=np.array(metadata, object)
    )
    return path


def symmetry(n, left, right):
    return dict(num_joints=n, keypoints_symmetry=[left, right])


@pytest.mark.parametrize("metadata, layout", [
    (dict(layout_name="coco", num_joints=17), "coco17"),
    (dict(layout_name="h36m", num_joints=17), "h36m17"),
    (symmetry(17, [4, 5, 6, 11, 12, 13], [1, 2, 3, 14, 15, 16]), "h36m17"),
    (symmetry(17, [1, 3, 5, 7, 9, 11, 13, 15], [2, 4, 6, 8, 10, 12, 14, 16]), "coco17"),
    (symmetry(16, [3, 4, 5, 13, 14, 15], [0, 1, 2, 10, 11, 12]), "mpii16"),
    (symmetry(16, [3, 4, 5, 13, 14, 15], [0, 1, 2, 10, 11, 12]), "sh16"),
])  # fmt: skip
def test_videopose3d(tmp_path, metadata, layout):
    n = LAYOUTS[layout][0]
    frames = np.stack([person(n, i)[:, :2] for i in range(3)]).astype(np.float32)
    metadata = metadata | dict(video_metadata={"a.mp4": dict(w=1920, h=1080)})
    name = {"mpii16": "h36m_sh_pt_mpii", "sh16": "h36m_sh_ft_h36m"}.get(
        layout, "custom_x"
    )  # both say the same within
    path = videopose(
        tmp_path / f"data_2d_{name}.npz", metadata, {"a.mp4": {"custom": [frames, None]}}
    )
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


# --------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("name, text, expected", [
    ("a.json", "", "not a JSON"),
    ("a.json", "[" * 100_000, "not a JSON"),
    ("a.json", "{}", "no keypoint file"),
    ("a.json", "[]", "no person"),
    ("a.json", "[1]", "no keypoint file"),
    ("a.json", '[{"image_id": 1, "keypoints": []}]', "x, y, score"),
    ("a.json", '[{"image_id": 1, "keypoints": [1, 2]}]', "x, y, score"),
    ("a.json", '[{"keypoints": [1]}]', "the key 'image_id' is missing"),
    ("a.json", '[{"image_id": 1, "keypoints": "abc"}]', "a.json"),
    ("a.json", '[{"image_id": 1, "keypoints": {"a": 1}}]', "a.json"),
    ("a.json", '[{"image_id": 1, "keypoints": [1, 2, 3]}]', "has 1 joints"),
    ("a.json", '[{"image_id": 1, "keypoints": [[1, 2], [3, 4], [5, 6]]}]', "x, y, score"),
    ("a.json", '{"annotations": null}', "a.json"),
    ("a.json", '{"annotations": [{"keypoints": [1]}]}', "a.json"),
    ("a.json", '{"people": null}', "the list `people`"),
    ("a.json", '{"people": []}', "no person"),
    ("a.json", '{"people": [3]}', "a.json"),
    ("a.json", '{"instance_info": [{}]}', "a.json"),
    ("a.json", '{"instance_info": [{"keypoints": [[1, 2]], "keypoint_scores": []}]}',
     "keypoint_scores"),
    ("a.npy", "no array", "not a NumPy file"),
    ("a.npz", "no zip", "not a NumPy file"),
    ("a.txt", "", "unknown ending"),
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
    (640, 480, (640, 480)), (None, 480, (0, 0)), ("640", 480, (0, 0)), ({}, [1], (0, 0)),
    (-5, 4, (0, 0)), (True, True, (0, 0)), (float("inf"), 1, (0, 0)), (float("nan"), 1, (0, 0)),
    (10**400, 1, (0, 0)),
])  # fmt: skip
def test_impossible_image_sizes_are_unknown(tmp_path, w, h, expected):
    images = [dict(id=1, width=w, height=h)]
    content = dict(images=images, annotations=[dict(image_id=1, keypoints=flat(person(17)))])
    assert read(write(tmp_path / "a.json", content)).size.tolist() == [list(expected)]


def test_other_joints_in_cocos_format_are_asked_for(tmp_path):
    content = dict(
        categories=[dict(keypoints=["root", "right_hip"])],
        images=[],
        annotations=[dict(image_id=1, keypoints=flat(person(17)))],
    )
    with pytest.raises(ValueError, match="h36m17 or coco17.*--layout"):
        read(write(tmp_path / "a.json", content))


def test_people_who_swap_places_in_the_list_keep_their_tracks(tmp_path):
    a, b = person(18) * [0.5, 1, 1], person(18, 1) * [0.5, 1, 1] + [600, 0, 0]
    folder = tmp_path / "out"
    folder.mkdir()
    for t, people in enumerate(
        ([a, b], [b + [9, 5, 0], a], [], [b, a + [4, 4, 0], b + [5000, 0, 0]])
    ):
        write(
            folder / f"{t}_keypoints.json",
            dict(people=[dict(pose_keypoints_2d=flat(p)) for p in people]),
        )
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
    write(
        folder / "coco.json", dict(images=[dict(id=1, width=9, height=9)], annotations=annotations)
    )
    write(folder / "alpha.json", [dict(image_id="1.jpg", keypoints=flat(p), score=1)])
    write(folder / "openpose.json", dict(people=[dict(pose_keypoints_2d=flat(person(18)))]))
    write(folder / "mmpose.json", dict(instance_info=[dict(frame_id=1, instances=[instance])]))
    np.save(folder / "array.npy", p[None])
    videopose(folder / "video.npz", dict(layout_name="coco"), {"a": {"custom": [p[None, :, :2]]}})
    return sorted(folder.iterdir())


@given(st.data())
@settings(max_examples=300 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_files_are_read_or_refused(seeds, tmp_path_factory, data):
    """Bytes changed, cut out, doubled; JSON values replaced: either there are keypoints of the
    promised shape, or one sentence."""
    source = data.draw(st.sampled_from(seeds))
    content = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        a = data.draw(st.integers(0, max(0, len(content) - 1)))
        b = min(len(content), a + data.draw(st.integers(0, 40)))
        content[a:b] = data.draw(
            st.one_of(
                st.binary(max_size=8),
                st.just(content[a:b] * 2),
                st.sampled_from(
                    [b"NaN", b"1e999", b"null", b"{}", b"[]", b'""', b"-1", b"true", b"\xff\xfe"]
                ),
            )
        )
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
