"""3DPW (von Marcard et al. 2018) as a test set: `python prepare_data.py --source 3dpw --folder DIR`.

Users bring the sequences, the SMPL models (both licensed) and the regressor of Human3.6M's joints, in one folder. The
gendered models give the 17 joints in the world, each frame's camera turns and moves them, and the 2D detections are
OpenPose's, which 3DPW ships. A lifter knows only the camera that it was trained with, so all 2D is what Human3.6M's would
have seen from the same place: focal length 1145 px, a 1000 x 1000 image, no distortion.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sources import smpl
from sources.dataset import (
    ARRAYS,
    append_samples,
    base_meta,
    check_folder,
    create_split,
    new_data_set,
)
from sources.geometry import IMAGE_SIZE
from sources.keypoints import to_h36m
from sources.safe_pickle import load_pickle

FOCAL, CENTRE = 1145.0, 500.0  # px, of Human3.6M's cameras, about
N_SURE, SURE = 6, 0.3  # a frame counts if more than so many of OpenPose's 18 joints have more than this confidence (VIBE)
NEAREST = 500.0  # mm from the camera to the root
AT_ONCE = 4096  # frames, so that any sequence takes the same memory
# 3DPW-OCC: the first two words of these sequences' names, in any folder (the list of PARE, Kocabas et al. 2021).
OCC = {
    "courtyard_backpack", "courtyard_basketball", "courtyard_bodyScannerMotions", "courtyard_box", "courtyard_golf",
    "courtyard_jacket", "courtyard_laceShoe", "downtown_stairs", "flat_guitar", "flat_packBags", "outdoors_climbing",
    "outdoors_crosscountry", "outdoors_fencing", "outdoors_freestyle", "outdoors_golf", "outdoors_parcours",
    "outdoors_slalom",
}  # fmt: skip
ABOUT = {
    "test": "3DPW test, frames with a valid camera and more than 6 joints of OpenPose above 0.3 (as VIBE)",
    "occ": "3DPW-OCC: 17 sequence names over all splits; never train on 3DPW before scoring on it",
}
FOLDERS = {"train": 24, "validation": 12, "test": 24}  # of sequenceFiles, and how many files each has
_MODEL = "SMPL model, .pkl or .npz, https://smpl.is.tue.mpg.de"
WANTED = {f: (f"sequenceFiles/{f}/*.pkl, https://virtualhumans.mpi-inf.mpg.de/3DPW", True) for f in FOLDERS} | {
    "male": (f"the male {_MODEL}", True), "female": (f"the female {_MODEL}", True),
    "regressor": ("J_regressor_h36m*.npy, https://github.com/hongsukchoi/Pose2Mesh_RELEASE or "
                  "https://github.com/mks0601/I2L-MeshNet_RELEASE", True),
}  # fmt: skip


def _kind(path: Path) -> str | None:
    """Which of WANTED a file is, by its name."""
    name = path.name.lower()
    if re.fullmatch(smpl.REGRESSOR_NAME, name):
        return "regressor"
    if name.startswith(".") or not name.endswith((".pkl", ".npz")):
        return None
    if path.parent.name in FOLDERS and name.endswith(".pkl"):
        return path.parent.name
    patterns = {smpl.OTHER_MODELS: None, "neutral": None,
                r"female|(?<![a-z])f(?![a-z0-9])": "female", r"male|(?<![a-z])m(?![a-z0-9])": "male"}  # fmt: skip
    return next((kind for pattern, kind in patterns.items() if re.search(pattern, name)), None)


def read_sequence(path: Path) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """K [3, 3], world to camera [N, 4, 4] (X_c = R X + t, m), and of each person: gender, betas [10], poses [N, 72], trans
    [N, 3] m, poses2d [N, 3, 18] (px and score), campose_valid [N].

    All of them go by image; `img_frame_ids` only says when each was taken. ValueError with one sentence on anything else.
    """
    content = load_pickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no sequence of 3DPW: expected a dictionary, found {type(content).__name__}")
    gender = "gender" if "gender" in content and "genders" not in content else "genders"
    people = ("poses", "betas", "trans", "poses2d", "campose_valid", gender)
    for key in ("cam_poses", "cam_intrinsics", *people):
        if key not in content:
            raise ValueError(f"{path} is no sequence of 3DPW: it has no {key}")

    def array(key, value, shape, why=""):
        plain = isinstance(value, np.ndarray | int | float) or (  # else: something nested, which may be endless
            isinstance(value, list) and all(isinstance(v, np.ndarray | int | float) for v in value))
        try:
            a = np.asarray(value if plain else None)
        except ValueError:  # a list of unequal parts
            a = np.empty(0, object)
        if a.dtype.kind not in "biuf" or a.ndim != len(shape) or any(
                s not in (None, n) for s, n in zip(shape, a.shape, strict=True)):  # fmt: skip
            raise ValueError(f"{path}: expected {key} to be numbers {['any' if s is None else s for s in shape]}, found "
                             f"{a.dtype} {list(a.shape)}{why}")
        return a

    poses = array("cam_poses", content["cam_poses"], (None, 4, 4)).astype(np.float64)
    K, N = array("cam_intrinsics", content["cam_intrinsics"], (3, 3)).astype(np.float64), len(poses)
    if not (np.isfinite(K).all() and min(K[0, 0], K[1, 1], K[0, 2], K[1, 2]) > 0):
        raise ValueError(f"{path}: expected cam_intrinsics with focal lengths and a centre above 0, found {K.tolist()}")
    lists = {k: list(content[k]) if isinstance(content[k], list) or getattr(content[k], "shape", ()) else [] for k in people}
    if len({len(v) for v in lists.values()} | {max(1, len(lists["poses"]))}) > 1:
        raise ValueError(f"{path}: expected lists of one entry for each person, found "
                         f"{', '.join(f'{len(v)} in {k}' for k, v in lists.items())}")
    shapes = {"poses": (N, 72), "betas": (None,), "trans": (N, 3), "poses2d": (N, 3, 18), "campose_valid": (N,)}
    why = f", and cam_poses has {N} frames"
    read = [{k: array(k, lists[k][i], shape, why) for k, shape in shapes.items()} | {"gender": g}
            for i, g in enumerate(lists[gender])]
    for p in read:
        p["gender"] = p["gender"].decode("latin1") if isinstance(p["gender"], bytes) else p["gender"]
        if len(p["betas"]) < smpl.N_SHAPE or not isinstance(p["gender"], str) or p["gender"] not in ("m", "f"):
            found = repr(p["gender"][:20]) if isinstance(p["gender"], str) else type(p["gender"]).__name__
            raise ValueError(f"{path}: expected betas of at least {smpl.N_SHAPE} numbers and {gender} m or f, found "
                             f"{len(p['betas'])} and {found}")
        p["betas"] = p["betas"][: smpl.N_SHAPE].astype(np.float64)
    return K, poses, read


def samples(K: np.ndarray, poses: np.ndarray, person: dict, points: smpl.Points) -> Iterator[tuple[dict, int]]:
    """The frames of one person that count, some at a time -> (arrays as in ARRAYS, how many frames were left out).

    Detections farther outside the image than its size are missing; the image is as large as its centre says.
    """
    with np.errstate(all="ignore"):  # what overflows is left out below
        detected, size = person["poses2d"].transpose(0, 2, 1).astype(np.float64), 2 * K[:2, 2]
        x = detected[..., :2]
        there = ((x >= -size) & (x <= 2 * size)).all(-1) & (x != 0).any(-1)
        detected[~there] = 0
        counts = (person["campose_valid"] > 0) & ((detected[..., 2] > SURE).sum(1) > N_SURE)
        rest_y = points.model.v_template[:, 1] + points.model.shapedirs[:, 1] @ person["betas"]
    frames = np.flatnonzero(counts)
    for start in range(0, len(frames), AT_ONCE):
        rows = frames[start : start + AT_ONCE]
        with np.errstate(all="ignore"):
            pose, betas = person["poses"][rows].reshape(-1, 24, 3), np.tile(person["betas"], (len(rows), 1))
            # trans is added after: rows of the regressor sum to 1 only nearly, which in a wide world costs millimetres
            world = points(pose, betas, np.zeros((len(rows), 3))) + person["trans"][rows, None]
            seen = 1000 * (world @ poses[rows, :3, :3].transpose(0, 2, 1) + poses[rows, None, :3, 3])  # mm
            x_det, conf = to_h36m(detected[rows], "coco18")
            root = seen[:, 0]
            arrays = {
                "x_s": seen[..., :2] / seen[..., 2:] * FOCAL + CENTRE, "y": seen - root[:, None], "root": root,
                "height_px": FOCAL * 1000 * np.ptp(rest_y) / root[:, 2], "conf": conf,
                "x_s_det": ((x_det - K[:2, 2]) / K[[0, 1], [0, 1]] * FOCAL + CENTRE) * (conf > 0)[..., None],
            }  # fmt: skip
            arrays = {k: v.astype(ARRAYS[k][1]) for k, v in arrays.items()}
        good = (root[:, 2] >= NEAREST) & (seen[..., 2] > 0).all(1)
        for v in arrays.values():
            good &= np.isfinite(v.reshape(len(v), -1)).all(1)
        yield {k: v[good] for k, v in arrays.items()}, int((~good).sum())


def prepare(source: Path, out: Path, overwrite: bool) -> Path:
    """Write the splits `test` and `occ` of the files in source to out (data/NAME); nothing, if that is interrupted.

    ValueError with one sentence where something is missing or is not what it should be.
    """
    found, files = check_folder(source, _kind, WANTED), {}
    print(", ".join(f"{len(found[f])} of {n} {f} sequences" for f, n in FOLDERS.items()))
    for kind in ("male", "female", "regressor"):
        if len(found[kind]) > 1:
            raise ValueError(f"{found[kind][1]} is a second {kind} file beside {found[kind][0]}: keep one of them")
    for path in (p for f in FOLDERS for p in found[f]):
        member = {"test": path.parent.name == "test", "occ": "_".join(path.stem.split("_")[:2]) in OCC}
        if any(member.values()):
            if path.stem in files:
                raise ValueError(f"{path} is a second {path.stem} beside {files[path.stem][0]}: keep one of them")
            files[path.stem] = path, [s for s in ABOUT if member[s]]
    actions = sorted(files)

    with new_data_set(out, overwrite) as temporary:
        models = {kind[0]: smpl.read(found[kind][0]) for kind in ("male", "female")}
        regressor = smpl.read_regressor(found["regressor"][0], models["m"])
        if len(models["f"].v_template) != regressor.shape[1]:
            raise ValueError(f"{found['female'][0]}: expected as many vertices as the male model has, {regressor.shape[1]}")
        points = {g: smpl.Points(model, regressor) for g, model in models.items()}

        def everybody(doing):
            for name in tqdm(actions, desc=doing):
                K, poses, read = read_sequence(files[name][0])
                for i, person in enumerate(read):
                    for arrays, n_out in samples(K, poses, person, points[person["gender"]]):
                        yield [name, i], arrays, n_out

        n, people, all_in, all_out = dict.fromkeys(ABOUT, 0), [], 0, 0
        for who, arrays, n_out in everybody("counting"):
            if who not in people:
                people.append(who)
            all_in, all_out = all_in + len(arrays["y"]), all_out + n_out
            for s in files[who[0]][1]:
                n[s] += len(arrays["y"])
        print(f"{all_in} samples; {all_out} more left out: not finite, a joint behind the camera, or the root less than "
              f"{NEAREST / 1000} m in front of it")
        for s in ABOUT:
            if not n[s]:
                of = ", ".join(a for a in actions if s in files[a][1]) or "none found"
                raise ValueError(f"{source}: the split {s} would be empty: expected frames with a valid camera and "
                                 f"detections in its sequences ({of})")
        for s in ABOUT:
            create_split(temporary / s, n[s])
        for who, arrays, _ in everybody("writing"):
            for s in files[who[0]][1]:
                append_samples(temporary / s, arrays | {"action": actions.index(who[0]), "subject": people.index(who)})
        meta = base_meta(out, "3dpw") | {
            "actions": actions, "people": people, "image_size": IMAGE_SIZE, "noise": None, "seed": 0,
            "splits": {s: {"n": n[s], "with_mesh": 0, "about": about} for s, about in ABOUT.items()},
            "joints_14": [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16],
            "sources": {
                "sequences": "3DPW, https://virtualhumans.mpi-inf.mpg.de/3DPW",
                "frames": f"campose_valid, and more than {N_SURE} of OpenPose's 18 joints with confidence above {SURE}",
                "detections": "OpenPose's as 3DPW ships them; the paper's CPN detections are not distributed",
                "joints": "gendered SMPL models " + ", ".join(found[k][0].name for k in ("male", "female"))
                          + f", regressor {found['regressor'][0].name}",
            },
        }  # fmt: skip
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    return Path(out)
