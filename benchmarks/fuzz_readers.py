"""The readers that fuzz.py feeds, and good files for them.

Each reader is a function that writes good files and returns what reads one of them. Every folder in
`folder` is a case: what is read together, and of which one file is mutated.
"""

import json
import os
import pickle
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import test_human36m  # noqa: E402
import test_mocap  # noqa: E402
import test_threedpw  # noqa: E402
from conftest import RUN_SIZES, person, smpl_content, write_smpl_pkl, write_tiny  # noqa: E402
from fuzz_mutations import WORK  # noqa: E402

import evaluate  # noqa: E402
import train  # noqa: E402
from sources import dataset, human36m, keypoints, mocap, smpl, threedpw  # noqa: E402


def put(folder, name, content):
    """A case of one file."""
    path = folder / re.sub(r"\W", "_", name) / name
    path.parent.mkdir(parents=True)
    if path.suffix == ".npz":
        np.savez(path, **content)
    elif path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


COCO_NAMES = ["nose"] + [f"{side}_{joint}" for joint in (
    "eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
    for side in ("left", "right")]  # fmt: skip


def keypoint_files(folder):
    coco, h36m, pipe = person("coco17"), person("h36m17"), person("mediapipe33") / [1e3, 1e3, 1]
    flat, halpe, body25 = (person(k).ravel().tolist() for k in ("coco17", "halpe26", "body25"))
    xy, score = coco[:, :2].tolist(), coco[:, 2].tolist()
    pose, pose_score = person("coco18")[:, :2] / 1e3, person("coco18")[:, 2]
    result = dict(category_id=1, keypoints=flat, score=1.0, bbox=[1, 2, 3, 4])
    alpha, open_ = dict(keypoints=halpe, score=2.5), dict(person_id=[-1], pose_keypoints_2d=body25)
    instance = dict(keypoints=xy, keypoint_scores=score, bbox=[[0, 0, 9, 9]], bbox_score=1)
    landmarks = [dict(x=x, y=y, z=0.0, visibility=v) for x, y, v in pipe]
    for name, content in {
        "coco.json": dict(images=[dict(id=7, width=1000, height=1000, file_name="a.jpg")],
                          categories=[dict(id=1, name="person", keypoints=COCO_NAMES)],
                          annotations=[result | dict(id=i, image_id=7) for i in (3, 4)]),
        "results.json": [result | dict(image_id=i) for i in range(3)],
        "openpifpaf.json": [result] * 2,
        "alphapose.json": [alpha | dict(image_id=f"{t}.jpg", idx=[1]) for t in range(4)],
        "poseflow.json": {f"{t}.jpg": [alpha | dict(idx=1)] for t in range(3)},
        "openpose_body25.json": dict(version=1.3, people=[open_]),
        "frames_body25/clip_1_keypoints.json": dict(version=1.3, people=[open_]),
        "mmpose.json": dict(meta_info=dict(dataset_name="coco"), instance_info=[
            dict(frame_id=t, instances=[instance]) for t in range(3)]),
        "mmpose_coco17.json": [instance],
        "ultralytics.json": [dict(box={}, track_id=1) | {"class": 0} | dict(keypoints=dict(
            x=coco[:, 0].tolist(), y=coco[:, 1].tolist(), visible=score))],
        "labels.txt": f"0 .5 .5 .2 .5 {' '.join(map(str, (coco / [1e3, 1e3, 1]).ravel()))}\n",
        "mediapipe.json": [landmarks] * 2,
        "mediapipe.npy": np.stack([pipe[:, [0, 1, 2, 2]]] * 3),
        "st_gcn.json": dict(label="jump", data=[dict(frame_index=t, skeleton=[dict(
            pose=pose.ravel().tolist(), score=pose_score.tolist())]) for t in (1, 2)]),
        "array_h36m17.npy": np.stack([h36m] * 5),
        "lifting_h36m17.npz": dict(reconstruction=np.stack([h36m] * 5)[None]),
        "video.npz": dict(
            positions_2d=np.array({"a.mp4": {"custom": [np.stack([coco[:, :2]] * 3)]}}, object),
            metadata=np.array(dict(layout_name="coco", keypoints_symmetry=[[1], [2]],
                                   video_metadata={"a.mp4": dict(w=1000, h=1000)}), object)),
    }.items():  # fmt: skip
        put(folder, name, content)

    def read(file):
        layout = next((k for k in keypoints.LAYOUTS if k in str(file.relative_to(WORK))), "auto")
        frames = file.parent.name == "frames_body25"
        k = keypoints.read(file.parent if frames else file, layout, (1000, 1000))
        assert np.isfinite(k.x_s).all() and np.isfinite(k.conf).all()
        print("\n".join(k.said))

    return read


def bvh_files(folder):
    angles = np.random.default_rng(0).normal(size=(6, 21, 3)) * 10
    put(folder, "cmu.bvh", test_mocap.bvh_text(angles))
    put(folder, "mixamo.bvh", test_mocap.bvh_text(angles, "XYZ", "mixamorig:", z_up=True))
    return mocap.read_bvh


def amass_files(folder):
    for style in ("smplh", "smplx"):
        put(folder, f"{style}.npz", test_mocap.amass(test_mocap.body_rotations(9), style))
    write_smpl_pkl(WORK / "model.pkl", test_mocap.BODY)
    model = smpl.read(WORK / "model.pkl")
    return lambda file: mocap.read_amass(file, model)


def smpl_files(folder):
    content = smpl_content(3, 3)
    put(folder, "model.npz", content)
    write_smpl_pkl(put(folder, "official.pkl", content), content)
    model = smpl.read(put(folder, "plain.pkl", content))
    put(folder, "J_regressor.npy", model.J_regressor[smpl.TO_H36M])
    return lambda file: (smpl.read_regressor(file, model) if file.suffix == ".npy"
                         else smpl.read(file))


def human36m_files(folder):
    (folder / "h36m").mkdir()
    test_human36m.TABLE = {code: test_human36m.TABLE[code] for code in (4, 6)}  # two actions
    test_human36m.write_source(folder / "h36m", smpl_content(20, 16), frames=2, every=1)
    human36m.draw_samples = human36m.draw_coarsening = lambda *_: None
    return lambda file: load_all(human36m.prepare(Path(), Path("out")))


def threedpw_files(folder):
    (folder / "3dpw").mkdir()
    for file in test_threedpw.write_folder(folder / "3dpw").rglob("*.pkl"):
        if file.read_bytes() == b"no pickle":  # what nobody opens
            file.unlink()
    return lambda file: load_all(threedpw.prepare(Path(), Path("out"), False))


def load_all(folder):
    """What was made of a mutated file must be a whole data set."""
    for split in json.loads((folder / "meta.json").read_text())["splits"]:
        try:
            dataset.load(folder, split)
        except ValueError as e:
            raise AssertionError(f"what it made cannot be read: {e}") from None


def command(main, *words):
    """What a user types, for the tiny run in this folder."""
    sys.argv = ["fuzz", "--name", "tiny", "--data", "data/tiny", "--device", "cpu", *words]
    main()


def train_stage(stage, *words):
    sizes = [word for k, v in RUN_SIZES.items() for word in (f"--{k}", str(v))]
    command(train.main, "--preset", "paper", "--stage", stage, *sizes, *words)


def run_files(folder):
    """A tiny run on a tiny data set, made once. evaluate.py reads both."""
    made = WORK / "run"
    if not made.exists():
        write_tiny(made / "data/tiny")
        train.script = lambda *_: None  # no tables and figures
        os.chdir(made)
        for stage in "123":
            train_stage(stage)
    shutil.copytree(made, folder / "run", ignore=shutil.ignore_patterns("*.png"))
    return lambda file: command(evaluate.main)


def resumed_files(folder):
    """The same run, with which train.py goes on."""
    run_files(folder)

    def read(file):
        if file.suffix == ".npy":
            file.with_name("stage3_generated_0.pt").unlink()  # which is trained on that file
        stages = {"stage1.pt": "1", "log.jsonl": "1", "stage2.pt": "2"}
        train_stage(stages.get(file.name, "3"), "--resume")

    return read


READERS = {  # name: (files, which of them are mutated, errors that the scripts turn into sentences)
    "keypoints": (keypoint_files, "*", ValueError),
    "bvh": (bvh_files, "*", (ValueError, OSError)),
    "amass": (amass_files, "*", (ValueError, OSError)),
    "smpl": (smpl_files, "*", (ValueError, OSError)),
    "h36m": (human36m_files, "*", (ValueError, OSError)),
    "3dpw": (threedpw_files, "*", (ValueError, OSError)),
    "data": (run_files, "data/**/*", ()),
    "checkpoints": (run_files, "runs/**/*.pt", ()),
    "resume": (resumed_files, "runs/**/*", ()),
}  # fmt: skip
