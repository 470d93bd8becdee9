"""sources/keypoints.py and keypoint_files.py: files as other programs write them, read back, or
refused in one sentence. The files hold people who stand and face the camera."""

import json

import numpy as np
import pytest
from conftest import FUZZ, person
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sources.keypoints import read
from sources.layouts import LAYOUTS, to_h36m

COCO_NAMES = ["nose", "left_eye", "right_eye", "left_ear", "right_ear"] + [
    f"{side}_{joint}" for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    for side in ("left", "right")]  # fmt: skip
POSETRACK_NAMES = ["nose", "head_bottom", "head_top", *COCO_NAMES[3:]]
A, B, C = (person("coco17", seed, at=(x, 240)) for seed, x in ((0, 200), (1, 500), (2, 350)))


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def flat(p):
    return p.ravel().tolist()


def expect(k, people, layout="coco17"):
    """Everything is where it should be."""
    x_s, conf = to_h36m(np.stack(people), layout)
    np.testing.assert_allclose(k.x_s, x_s, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(k.conf, conf, rtol=1e-6)


# --------------------------------------------------------------------------------------------------
# COCO, and what has its form


def annotations(people, names=COCO_NAMES, **more):
    return dict(
        images=[dict(id=7, width=640, height=480, file_name="a.jpg")],
        categories=[dict(id=1, keypoints=names)] if names else [],
        annotations=[dict(id=i, image_id=7, category_id=1, keypoints=flat(p), **more)
                     for i, p in enumerate(people, 3)])  # fmt: skip


def test_coco_annotations(tmp_path):
    a, b, nobody = A.copy(), B.copy(), np.zeros((17, 3))
    a[:, 2], b[:, 2], a[9] = 2, 1, 0
    k = read(write(tmp_path / "a.json", annotations([a, nobody, b])))
    assert k.name == ["a.jpg #3", "a.jpg #5"] and k.track == ["", ""]
    expect(k, [a * [1, 1, 0.5], b])
    assert k.conf[0, 13] == 0 and any("means of others" in line for line in k.said)


@pytest.mark.parametrize("layout, names", [
    ("posetrack17", POSETRACK_NAMES),
    ("crowdpose14", [*COCO_NAMES[5:], "head", "neck"]),
    ("aic14", [f"{side}_{joint}" for part in (0, 3) for side in ("right", "left") for joint in
               ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")[part : part + 3]]
     + ["head_top", "neck"]),
])  # fmt: skip
def test_the_names_of_joints_tell_the_layout(tmp_path, layout, names):
    p = person(layout, at=(600, 400))
    p[:, 2] = 1
    k = read(write(tmp_path / "a.json", annotations([p], names)))
    expect(k, [p], layout)
    assert f"joints {layout}" in k.said[0]
    top = p[LAYOUTS[layout].index("head top"), :2]
    np.testing.assert_allclose(k.x_s[0, 10], top, rtol=1e-6)


def test_unknown_names_are_refused_with_what_was_found(tmp_path):
    animal = ["L_Eye", "R_Eye", "Nose", "Neck", "Root of tail", *(f"paw {i}" for i in range(12))]
    with pytest.raises(ValueError, match="L_Eye, R_Eye, Nose, Neck, Root of tail, paw 0"):
        read(write(tmp_path / "a.json", annotations([A], animal)))
    swapped = COCO_NAMES[:1] + COCO_NAMES[:0:-1]  # it begins with the nose
    with pytest.raises(ValueError, match="right_ankle"):
        read(write(tmp_path / "a.json", annotations([A], swapped)))


def test_posetrack_has_tracks_by_video(tmp_path):
    content = annotations([])
    content["images"] = [dict(id=10 * v + t, file_name=f"images/{v}/00{t}.jpg", frame_id=99 - t)
                         for t in (2, 0, 1) for v in (1, 2)]  # fmt: skip
    content["annotations"] = [
        dict(id=i, image_id=image["id"], category_id=1, track_id=5, keypoints=flat(A + [i, 0, 0]))
        for i, image in enumerate(content["images"])]  # fmt: skip
    k = read(write(tmp_path / "a.json", content))
    assert k.track == ["images/1/ 5"] * 3 + ["images/2/ 5"] * 3
    assert k.name[:3] == ["images/1/000.jpg #2", "images/1/001.jpg #4", "images/1/002.jpg #0"]


def results(people, image_ids, **more):
    return [dict(image_id=i, category_id=1, keypoints=flat(p), score=1.0)
            | {key: value[n] for key, value in more.items()}
            for n, (p, i) in enumerate(zip(people, image_ids, strict=True))]  # fmt: skip


def test_coco_results_are_photos(tmp_path):
    k = read(write(tmp_path / "a.json", results([A, B, C], [4, 4, 9])))
    assert k.name == ["4 #0", "4 #1", "9 #0"] and k.track == [""] * 3
    expect(k, [A, B, C])
    assert "COCO results" in k.said[0]


def test_results_in_another_order_are_told_from_cocos(tmp_path):
    """51 numbers are COCO's as a rule, and Human3.6M's for users of lifting models."""
    for layout, names in (("h36m17", "h36m17 would fit"), ("posetrack17", "posetrack17 would fit")):
        path = write(tmp_path / "a.json", results([person(layout, i) for i in range(3)], "123"))
        with pytest.raises(ValueError, match=f"do not look like people in coco17.*{names}.*--lay"):
            read(path)
        assert len(read(path, layout).name) == 3
    up = np.stack([A * [1, -1, 1] + [0, 480, 0]])
    with pytest.raises(ValueError, match="y may point up.*--layout"):
        read(write(tmp_path / "a.json", results(up, "1")))


@pytest.mark.parametrize("ids, tracks", [
    ({}, "0101"), (dict(idx=[0.0] * 4), "0101"), (dict(idx=[[7], [8], [7], [8]]), "7878"),
    (dict(track_id=[3, 1, 3, 1]), "3131"), (dict(person_id=[["b"], ["a"], ["b"], ["a"]]), "baba"),
    (dict(instance_id=[[[2]], [[4]], [[2]], [[4]]]), "2424"), (dict(person_id=[[-1]] * 4), "0101"),
])  # fmt: skip
def test_alphapose_with_and_without_ids(tmp_path, ids, tracks):
    """Frames are sorted by number, and -1 and a 0 for everybody are no ids."""
    frames = ["10.jpg", "10.jpg", "9.jpg", "9.jpg"]
    people = [A + [4, 0, 0], B + [4, 0, 0], A, B]
    k = read(write(tmp_path / "alphapose-results.json", results(people, frames, **ids)))
    assert k.name == ["9.jpg #0", "9.jpg #1", "10.jpg #0", "10.jpg #1"]
    assert "".join(k.track) == tracks and "AlphaPose" in k.said[0]
    expect(k, [A, B, people[0], people[1]])


def test_named_photos_stay_single(tmp_path):
    photos = ["drinking_040.jpg", "jumping_191.jpg", "riding_112.jpg"]
    k = read(write(tmp_path / "a.json", results([A, A, A], photos, idx=[[0.0]] * 3)))
    assert k.track == [""] * 3


@pytest.mark.parametrize("n", [26, 136])
def test_halpe(tmp_path, n):
    q = np.concatenate([person("halpe26"), np.full((n - 26, 3), 0.5)])
    k = read(write(tmp_path / "a.json", results([q], ["1.jpg"])))
    expect(k, [q[:26]], "halpe26")
    with pytest.raises(ValueError, match="mixes people of 17, .*joints"):
        read(write(tmp_path / "b.json", results([A, q], ["1.jpg"] * 2)))


def test_other_forms_of_alphapose_and_of_openpose(tmp_path):
    p, q = person("coco18"), person("coco18", 1, at=(600, 240))
    cmu = {f"{t}.jpg": dict(version="0.3", bodies=[dict(joints=flat(x)) for x in (p, q)])
           for t in range(3)}  # fmt: skip
    as_open = {k: dict(people=[dict(pose_keypoints_2d=b["joints"]) for b in v["bodies"]])
               for k, v in cmu.items()}  # fmt: skip
    for content in (cmu, as_open):
        k = read(write(tmp_path / "a.json", content))
        expect(k, [p, q] * 3, "coco18")
        assert "".join(k.track) == "010101" and k.name[2] == "1.jpg #0"
    poseflow = {f"{t}.jpg": [dict(keypoints=flat(x), scores=[1] * 17, idx=i)
                             for i, x in ((4, A), (2, B))] for t in range(2)}  # fmt: skip
    k = read(write(tmp_path / "a.json", poseflow))
    assert k.track == ["4", "2"] * 2
    expect(k, [A, B] * 2)


def test_openpose_asks_for_an_ambiguous_layout(tmp_path):
    p, folder = person("body25"), tmp_path / "out"
    for frame in (9, 10, 11):
        people = [dict(person_id=[-1], pose_keypoints_2d=flat(p))] * (frame < 11)
        write(folder / f"clip_{frame}_keypoints.json", dict(version=1.3, people=people))
    with pytest.raises(ValueError, match="body25 or body25b.*--layout; body25 would fit"):
        read(folder)
    a = read(folder, "body25")
    assert a.name == ["clip_9 #0", "clip_10 #0"] and a.track == ["0", "0"]
    expect(a, [p, p], "body25")
    old = write(tmp_path / "one_keypoints.json",
                dict(people=[dict(pose_keypoints=flat(person("coco18")))]))
    expect(read(old), [person("coco18")], "coco18")


def test_a_folder_of_photos_is_no_video(tmp_path):
    p = person("coco18")
    for photo in ("beach_1", "kitchen_2"):
        write(tmp_path / "out" / f"{photo}_keypoints.json", dict(people=[dict(
            pose_keypoints_2d=flat(p))]))
    assert read(tmp_path / "out").track == ["", ""]


# --------------------------------------------------------------------------------------------------
# Other programs


def test_mmpose_video_and_image(tmp_path):
    instance = dict(keypoints=A[:, :2].tolist(), keypoint_scores=A[:, 2].tolist(),
                    bbox=[[0, 0, 9, 9]], bbox_score=1)
    frames = [dict(frame_id=1, instances=[instance]), dict(frame_id=2, instances=[])]
    path = tmp_path / "a.json"
    for info in (frames, [instance]):
        content = dict(meta_info={}, instance_info=info)
        with pytest.raises(ValueError, match="h36m17, coco17 or posetrack17.*coco17 and pose"):
            read(write(path, content))
        expect(read(path, "coco17"), [A])
        expect(read(write(path, info), "coco17"), [A])  # what the inferencer writes
        for meta in (dict(dataset_name="coco"),
                     dict(keypoint_id2name=dict(enumerate(COCO_NAMES)))):
            content["meta_info"] = meta
            expect(read(write(path, content)), [A])
    content["meta_info"] = dict(keypoint_id2name=dict(enumerate(["tail"] * 17)))
    with pytest.raises(ValueError, match="tail, tail"):
        read(write(path, content))
    old = [dict(keypoints=p.tolist(), bbox=[0, 0, 9, 9], track_id=i) for i, p in ((1, A), (5, B))]
    k = read(write(path, [old, old]), "coco17")  # MMPose 0.x, a video
    assert k.track == ["1", "5"] * 2
    k = read(write(path, old), "coco17")
    assert k.track == ["", ""] and "MMPose 0.x" in k.said[0]
    expect(k, [A, B])


def test_openpifpaf(tmp_path):
    people = [dict(keypoints=flat(p), bbox=[1, 2, 3, 4], score=0.7, category_id=1) for p in (A, B)]
    k = read(write(tmp_path / "a.json", people))
    assert k.name == ["a #0", "a #1"] and "OpenPifPaf" in k.said[0]
    expect(k, [A, B])
    lines = [json.dumps(dict(frame=t, predictions=people[:1])) for t in range(1, 4)]
    (tmp_path / "video.json").write_text("\n".join(lines))
    k = read(tmp_path / "video.json")
    assert k.track == ["0"] * 3
    expect(k, [A] * 3)


def test_ultralytics(tmp_path):
    x, y, v = A.T.tolist()
    people = [dict(name="person", box=dict(x1=1), track_id=1, keypoints=dict(x=x, y=y, visible=v))]
    people[0]["class"] = 0
    expect(read(write(tmp_path / "a.json", people)), [A])
    del people[0]["keypoints"]["visible"]
    expect(read(write(tmp_path / "a.json", people)), [A * [1, 1, 0] + [0, 0, 1]])
    share = A / [640, 480, 1]
    label = [0, 0.5, 0.5, 0.1, 0.1, *share.ravel()]
    folder = tmp_path / "labels"
    folder.mkdir()
    for end, ids in (([], "0"), ([0.9], "0"), ([0.9, 7], "7"), ([7], "7")):
        for t in (1, 2):
            (folder / f"v_{t}.txt").write_text(" ".join(map(str, label + end)) + "\n")
        with pytest.raises(ValueError, match="shares of the image.*--image-size"):
            read(folder)
        k = read(folder, image_size=(640, 480))
        assert k.track == [ids] * 2
        expect(k, [A, A])
    bare = [0, 0.5, 0.5, 0.1, 0.1, *share[:, :2].ravel()]
    (folder / "classes.txt").write_text("person")
    for end, ids in (([3], "3"), ([0.9, 3], "3"), ([0.9], "0")):
        for t in (1, 2):
            (folder / f"v_{t}.txt").write_text(" ".join(map(str, bare + end)))
        assert read(folder, image_size=(640, 480)).track == [ids] * 2
    (tmp_path / "a.txt").write_text(" ".join(map(str, bare)))
    expect(read(tmp_path / "a.txt", image_size=(640, 480)), [A * [1, 1, 0] + [0, 0, 1]])
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(ValueError, match="39 or 56 numbers, .* found 5 numbers"):
        read(tmp_path / "a.txt")


def test_st_gcn(tmp_path):
    p = person("coco18") / [640, 480, 1]
    data = [dict(frame_index=t, skeleton=[dict(pose=flat(p[:, :2]), score=flat(p[:, 2]))])
            for t in (1, 2)]  # fmt: skip
    k = read(write(tmp_path / "a.json", dict(data=data, label="waving")), image_size=(640, 480))
    assert k.track == ["0", "0"] and "ST-GCN" in k.said[0]
    expect(k, [person("coco18")] * 2, "coco18")


def test_ai_challenger(tmp_path):
    p = person("aic14")
    p[:, 2], p[0, 2], p[1, 2] = 1, 2, 3
    content = [dict(image_id="x", keypoint_annotations=dict(human1=flat(p)))]
    k = read(write(tmp_path / "a.json", content))
    p[:, 2] = [1, 0, *[1] * 12]
    expect(k, [p], "aic14")


def landmarks(p):
    return [dict(x=x, y=y, z=0.1, visibility=v, presence=1.0) for x, y, v in p.tolist()]


def test_mediapipe_needs_the_size_of_the_image(tmp_path):
    p = person("mediapipe33")
    share, path = p / [640, 480, 1], tmp_path / "a.json"
    forms = [dict(pose_landmarks=[landmarks(share)], pose_world_landmarks=[landmarks(p)]),
             dict(landmark=landmarks(share)), landmarks(share), [landmarks(share)],
             dict(frames=[dict(frame=1, landmarks=landmarks(share))])]  # fmt: skip
    for content in forms:
        with pytest.raises(ValueError, match="shares of the image: say its size with --image-size"):
            read(write(path, content))
        k = read(path, image_size=(640, 480))
        assert "MediaPipe" in k.said[0]
        expect(k, [p], "mediapipe33")
    video = [landmarks(share + [t / 640, 0, 0]) for t in range(3)]
    assert read(write(path, video), image_size=(640, 480)).track == ["0"] * 3


def test_the_third_column_of_mediapipe_is_z(tmp_path):
    """Also where it lies between 0 and 1, in arrays and in lists. Others have the score there."""
    p = person("mediapipe33")
    share, path, rng = p / [640, 480, 1], tmp_path / "a.json", np.random.default_rng(0)
    for z in (rng.normal(0, 0.3, 33), rng.uniform(0, 1, 33), np.zeros(33)):
        for columns, seen in ((share[:, :2], 1), (np.c_[share[:, :2], z], 1),
                              (np.c_[share[:, :2], z, share[:, 2]], p[:, 2:])):  # fmt: skip
            np.save(tmp_path / "a.npy", np.stack([columns] * 2))
            write(path, [dict(keypoints=x) for x in (columns.tolist(), flat(columns))][
                : 1 + (columns.shape[1] > 2)])  # fmt: skip
            for k in (read(file, image_size=(640, 480)) for file in (tmp_path / "a.npy", path)):
                expect(k, [p * [1, 1, 0] + seen * np.array([0, 0, 1])] * len(k.name), "mediapipe33")
                assert any("third is taken as z" in line for line in k.said)
    wrong = np.stack([share[:, [0, 1, 2, 2, 2]]])
    np.save(tmp_path / "a.npy", wrong)
    with pytest.raises(ValueError, match="expected numbers .N, joints, 2 or 3"):
        read(tmp_path / "a.npy", image_size=(640, 480))


def test_lifting_demos(tmp_path):
    frames = np.stack([person("h36m17") + [t, 0, 0] for t in range(5)])
    for columns in (2, 3):
        np.savez(tmp_path / "keypoints.npz", reconstruction=frames[None, ..., :columns])
        for layout in ("auto", "h36m17"):
            k = read(tmp_path / "keypoints.npz", layout)
            assert k.track == ["keypoints"] * 5
            expect(k, frames if columns == 3 else frames * [1, 1, 0] + [0, 0, 1], "h36m17")
    np.savez(tmp_path / "keypoints.npz", x=frames[:, None])
    assert read(tmp_path / "keypoints.npz", "h36m17").track == ["keypoints"] * 5
    np.savez(tmp_path / "keypoints.npz", x=np.stack([frames, frames + [300, 0, 0]]))
    k = read(tmp_path / "keypoints.npz", "h36m17")
    assert k.track == ["keypoints 0"] * 5 + ["keypoints 1"] * 5


def test_detectron2(tmp_path):
    """As VideoPose3D's script keeps it: x, y, logit and probability in rows."""
    rows = np.stack([A[:, 0], A[:, 1], A[:, 2] * 9, A[:, 2]])
    frames = np.empty(3, object)
    frames[:] = [[[], rows[None]], [], [[], np.stack([rows, rows + 300])]]
    np.savez(tmp_path / "v.mp4.npz", boxes=np.zeros(3), keypoints=frames, metadata=np.zeros(1))
    k = read(tmp_path / "v.mp4.npz")
    assert k.track == ["0", "0", "1"]
    np.testing.assert_allclose(k.x_s[0], to_h36m(A[None], "coco17")[0][0], rtol=1e-6)


def videopose(path, metadata, positions):
    np.savez_compressed(path, positions_2d=np.array(positions, object),
                        metadata=np.array(metadata, object))
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
    frames = np.stack([person(layout, i)[:, :2] for i in range(3)]).astype(np.float32)
    metadata = metadata | dict(video_metadata={"a.mp4": dict(w=1920, h=1080)})
    # Both files of Stacked Hourglass say the same within.
    names = {"mpii16": "h36m_sh_pt_mpii", "sh16": "h36m_sh_ft_h36m"}
    path = tmp_path / f"data_2d_{names.get(layout, 'custom_x')}.npz"
    k = read(videopose(path, metadata, {"a.mp4": {"custom": [frames, None]}}))
    assert len(set(k.track)) == 1 and "" not in k.track
    expect(k, np.concatenate([frames, np.ones((*frames.shape[:2], 1))], -1), layout)


@pytest.mark.parametrize("save", [np.save, np.savez_compressed])
def test_plain_arrays(tmp_path, save):
    p = np.stack([person("h36m17", i) for i in range(4)])
    path = tmp_path / ("a.npy" if save is np.save else "a.npz")
    save(path, p)
    with pytest.raises(ValueError, match="--layout; h36m17 would fit"):
        read(path)
    expect(read(path, "h36m17"), p, "h36m17")
    save(path, np.asfortranarray(p[..., :2]))
    k = read(path, "h36m17")
    assert (k.conf == 1).all() and k.track == ["a"] * 4


# --------------------------------------------------------------------------------------------------
# What the numbers mean


@pytest.mark.parametrize("scores, least", [
    ([0.1, 0.9], 0.3), ([1.0], 0.3), ([1, 2], 0.3), ([2.0, 4.5, 0.35], 0.2), ([30, 90.0], 30),
    ([0.02, 0.04], 0.002), ([0.05, 2.2, 4.5, 2.2, 3, 1, 2, 2, 2, 3, 2, 2, 20.5], 0.22),
    ([0.9] * 16 + [25.0], 0.3),
])  # fmt: skip
def test_the_least_score_fits_the_scale(tmp_path, scores, least):
    p = A.copy()
    p[:, 2] = np.resize(scores, 17)
    k = read(write(tmp_path / "a.json", results([p], [1])))
    assert k.min_score == pytest.approx(least, rel=0.01)
    assert any("scores go up to" in line for line in k.said) == (least != 0.3)


def test_scores_that_are_all_zero_are_said(tmp_path):
    for content in (results([A * [1, 1, 0]], [1]), annotations([A * [1, 1, 0]])):
        with pytest.raises(ValueError, match="all its scores are 0.*leave the scores out"):
            read(write(tmp_path / "a.json", content))


def test_empty_people_and_null_joints_are_missing(tmp_path):
    points = A.tolist()
    points[9], points[3] = None, []
    content = [dict(image_id=1, keypoints=k) for k in ([], None, points)]
    k = read(write(tmp_path / "a.json", content))
    expect(k, [np.where(np.isin(np.arange(17), (3, 9))[:, None], 0, A)])
    for t, poses in enumerate(([flat(person("coco18"))], [[]], [])):
        people = [dict(pose_keypoints_2d=p) for p in poses]
        write(tmp_path / "out" / f"{t}_keypoints.json", dict(people=people))
    assert len(read(tmp_path / "out").name) == 1


def test_points_with_names_and_scores(tmp_path):
    """As BlazePose and MoveNet write them in JavaScript."""
    points = [dict(x=x, y=y, score=s, name=n) for (x, y, s), n in zip(A, COCO_NAMES, strict=True)]
    expect(read(write(tmp_path / "a.json", [dict(keypoints=points)])), [A])
    points[0]["name"] = "snout"
    with pytest.raises(ValueError, match="joints are snout, left_eye"):
        read(write(tmp_path / "a.json", [dict(keypoints=points)]))


def test_a_layout_overrules_names_and_unused_categories_do_not_matter(tmp_path):
    content = annotations([A * [1, 1, 0] + [0, 0, 1]], [str(i) for i in range(17)])
    expect(read(write(tmp_path / "a.json", content), "coco17"), [A * [1, 1, 0] + [0, 0, 1]])
    content = annotations([A])
    content["categories"].append(dict(id=2, keypoints=["tail", "paw"]))
    assert "joints coco17" in read(write(tmp_path / "a.json", content)).said[0]
    whole = np.concatenate([person("halpe26"), np.ones((110, 3))])
    k = read(write(tmp_path / "a.json", annotations([whole], None)))
    assert "joints halpe26" in k.said[0]


def test_one_image_without_a_number_leaves_a_video_in_time(tmp_path):
    images = [f"{t}.jpg" for t in (0, 1, 10, 11, 2, 3)] + ["cover.jpg"]
    k = read(write(tmp_path / "a.json", results([A] * 7, images)))
    assert k.name == [f"{i} #0" for i in ("cover.jpg", "0.jpg", "1.jpg", "2.jpg", "3.jpg",
                                          "10.jpg", "11.jpg")]  # fmt: skip
    assert k.track == ["", *["0"] * 6]


def test_depths_are_no_scores(tmp_path):
    p = A * [1, 1, 0] + np.c_[np.zeros((17, 2)), np.linspace(-1, 1, 17)]
    np.save(tmp_path / "a.npy", p[None])
    with pytest.raises(ValueError, match="no scores: leave the third column out"):
        read(tmp_path / "a.npy", "coco17")


def test_missing_joints_in_all_their_forms(tmp_path):
    p = A.copy()
    lost = {7: [0, 0, 0.9], 9: [-1, -1, 0.9], 10: [None, None, 0.9], 15: [float("nan"), 5, 0.9],
            16: [5, 5, 0]}  # fmt: skip
    points = p.tolist()
    for joint, value in lost.items():
        points[joint], p[joint] = value, 0
    k = read(write(tmp_path / "a.json", [dict(image_id=1, keypoints=sum(points, []))]))
    expect(k, [p])
    assert (k.conf == 0).sum() == 5


def test_shares_of_an_image_of_known_size(tmp_path):
    content = annotations([A / [640, 480, 1]])
    k = read(write(tmp_path / "a.json", content))
    expect(k, [A * [1, 1, 0] + [0, 0, 1]])
    assert "shares of the image" in k.said[1]
    np.save(tmp_path / "a.npy", (A / [320, 320, 1] - [1, 0.75, 0])[None])  # VideoPose3D's -1 to 1
    with pytest.raises(ValueError, match="expected pixels, or shares"):
        read(tmp_path / "a.npy", "coco17", (640, 480))


# --------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize("name, text, expected", [
    ("a.json", "", "not a JSON"),
    ("a.json", "[" * 100_000, "not a JSON"),
    ("a.json", "[" * 50 + "]" * 50, "too deep"),
    ("a.json", "{}", "no person"),
    ("a.json", "[]", "no person"),
    ("a.json", "[1]", "no keypoint file"),
    ("a.json", '{"a": {"b": [1, 2]}}', "no keypoint file"),
    ("a.json", '[{"image_id": 1, "keypoints": []}]', "no person"),
    ("a.json", '[{"image_id": 1, "keypoints": [1, 2]}]', "x, y, score"),
    ("a.json", '[{"keypoints": [1]}]', "x, y, score"),
    ("a.json", '[{"image_id": 1, "keypoints": "abc"}]', "no keypoint file"),
    ("a.json", '[{"image_id": 1, "keypoints": {"a": 1}}]', "the key 'x' is missing"),
    ("a.json", '[{"image_id": 1, "keypoints": {"x": [1], "y": [1, 2]}}]', "x, y, score"),
    ("a.json", '[{"image_id": 1, "keypoints": [1, 2, 3]}]', "has 1 joints"),
    ("a.json", '[{"image_id": 1, "keypoints": [[1, 2], [3, 4], [5, 6]]}]', "has 3 joints"),
    ("a.json", '[{"image_id": 1, "keypoints": [[1, 2, 3, 4], [3, 4, 5, 6]]}]', "x, y, score"),
    ("a.json", '[{"image_id": 1, "keypoints": ["secret", 1, 2]}]', "expected lists of numbers"),
    ("a.json", '[{"image_id": 1, "keypoints": [1e999, {}, 2]}]', "expected lists of numbers"),
    ("a.txt", "0 0.5 secret", "expected lists of numbers"),
    ("a.json", '{"annotations": null}', "not built as such files are"),
    ("a.json", '{"annotations": [{"keypoints": [1]}]}', "the key 'image_id' is missing"),
    ("a.json", '{"people": null}', "no keypoint file"),
    ("a.json", '{"people": []}', "no person"),
    ("a.json", '{"people": [3]}', "no person"),
    ("a.json", '{"instance_info": [{}]}', "no person"),
    ("a.json", '{"instance_info": [{"keypoints": [[1, 2]], "keypoint_scores": []}]}',
     "found 0 for 1 joints"),
    ("a.npy", "no array", "not a NumPy file"),
    ("a.npz", "no zip", "not a NumPy file"),
    ("a.csv", "", "ends in .json"),
])  # fmt: skip
def test_bad_files_get_one_sentence(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=expected) as e:
        read(tmp_path / name)
    assert name in str(e.value) and "\n" not in str(e.value) and "secret" not in str(e.value)


def test_missing_file_and_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="not there"):
        read(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="one .json or .txt file for every image"):
        read(tmp_path)


def test_the_wrong_layout_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((2, 16, 3)))
    with pytest.raises(ValueError, match="has 16 joints per person, and coco17 has 17"):
        read(tmp_path / "a.npy", "coco17")
    with pytest.raises(ValueError, match="--layout must be"):
        read(tmp_path / "a.npy", "coco")
    np.save(tmp_path / "a.npy", np.ones((2, 19, 3)))
    with pytest.raises(ValueError, match="19 joints .* 14 .aic14."):
        read(tmp_path / "a.npy")


def test_messages_are_short_and_plain(tmp_path):
    odd = "\x1b[31m\n\u202e\udc80" * 100_000
    for content in (annotations([A], [odd, odd]), [{odd: 1, "keypoints": [1]}], {odd: [odd]},
                    annotations([A]) | dict(annotations=[dict(keypoints=[1], image_id=odd)])):
        with pytest.raises(ValueError) as e:
            read(write(tmp_path / "a.json", content))
        assert str(e.value).isprintable() and len(str(e.value)) < len(str(tmp_path)) + 700
    k = read(write(tmp_path / "a.json", results([A], [odd])))
    assert k.name[0].isprintable() and len(k.name[0]) <= 100


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """A valid file of each kind, for mutation."""
    folder = tmp_path_factory.mktemp("seeds")
    instance = dict(keypoints=A[:, :2].tolist(), keypoint_scores=A[:, 2].tolist())
    x, y, v = A.T.tolist()
    contents = dict(
        coco=annotations([A]), alpha=results([A], ["1.jpg"], idx=[1]),
        openpose=dict(people=[dict(pose_keypoints_2d=flat(person("coco18")))]),
        mmpose=dict(instance_info=[dict(frame_id=1, instances=[instance])]),
        pifpaf=[dict(keypoints=flat(A), bbox=[1, 2, 3, 4], category_id=1)],
        lists=[dict(box={}, keypoints=dict(x=x, y=y, visible=v)) | {"class": 0}],
        flow={"1.jpg": [dict(keypoints=flat(A), idx=1)]},
        landmarks=dict(pose_landmarks=landmarks(person("mediapipe33"))))  # fmt: skip
    for name, content in contents.items():
        write(folder / f"{name}.json", content)
    (folder / "label.txt").write_text("0 .5 .5 .1 .1 " + " ".join(map(str, flat(A / 1000))))
    np.save(folder / "array.npy", A[None])
    videopose(folder / "video.npz", dict(layout_name="coco"), {"a": {"custom": [A[None, :, :2]]}})
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
        odd = [b"NaN", b"1e999", b"null", b"{}", b"[]", b'""', b"-1", b"true", b"\xff\xfe"]
        new = st.one_of(st.binary(max_size=8), st.just(content[a:b] * 2), st.sampled_from(odd))
        content[a:b] = data.draw(new)
    path = tmp_path_factory.getbasetemp() / f"mutated{source.suffix}"
    path.write_bytes(content)
    try:
        k = read(path, data.draw(st.sampled_from(["auto", "coco17"])), (640, 480))
    except ValueError as e:
        assert str(e).startswith(str(path)) and str(e).isprintable()
    else:
        n = len(k.name)
        assert n and len(k.track) == n
        assert k.x_s.shape == (n, 17, 2) and k.conf.shape == (n, 17)
        assert np.isfinite(k.x_s).all() and np.isfinite(k.conf).all()
