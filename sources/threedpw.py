"""3DPW (von Marcard et al. 2018) as a test set: `prepare_data.py --source 3dpw --folder DIR`.

Users bring the sequences and the SMPL models, both of which are licensed, and the regressor of
Human3.6M's joints. The gendered models give the 17 joints in the world, each frame's camera turns
and moves them, and the detections are OpenPose's, which 3DPW ships. A lifter knows only the cameras
that it was trained with. So all 2D is what Human3.6M's would have seen from the same place: focal
length 1145 px, an image of 1000 x 1000 px, no distortion.
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
from sources.files import shown
from sources.geometry import IMAGE_SIZE
from sources.layouts import to_h36m
from sources.safe_pickle import described, load_pickle

FOCAL, CENTRE = 1145.0, 500.0  # px, about those of Human3.6M's cameras
# A frame counts if more than N_SURE of OpenPose's 18 joints have a confidence above SURE (VIBE).
N_SURE, SURE = 6, 0.3
NEAREST = 500.0  # mm from the camera to the root
AT_ONCE = 4096  # frames, so that any sequence takes the same memory
MOST, MOST_PEOPLE = 100_000, 100  # frames and people of a sequence, which has 2500 and 2
# 3DPW-OCC: the first two words of the names of its sequences, which may be in any folder (the list
# of PARE, Kocabas et al. 2021).
OCC = {
    "courtyard_backpack", "courtyard_basketball", "courtyard_bodyScannerMotions", "courtyard_box",
    "courtyard_golf", "courtyard_jacket", "courtyard_laceShoe", "downtown_stairs", "flat_guitar",
    "flat_packBags", "outdoors_climbing", "outdoors_crosscountry", "outdoors_fencing",
    "outdoors_freestyle", "outdoors_golf", "outdoors_parcours", "outdoors_slalom",
}  # fmt: skip
ABOUT = {
    "test": "3DPW test, frames with a valid camera and more than 6 joints of OpenPose above 0.3 "
            "(as VIBE)",
    "occ": "3DPW-OCC: 17 sequence names over all splits; never train on 3DPW before scoring on it",
}  # fmt: skip
FOLDERS = {"train": 24, "validation": 12, "test": 24}  # of sequenceFiles, with how many files each
_MODEL = "SMPL model, .pkl or .npz, https://smpl.is.tue.mpg.de"
WANTED = {f: (f"sequenceFiles/{f}/*.pkl, https://virtualhumans.mpi-inf.mpg.de/3DPW", True)
          for f in FOLDERS} | {
    "male": (f"the male {_MODEL}", True),
    "female": (f"the female {_MODEL}", True),
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
    patterns = {  # the first that fits decides
        smpl.OTHER_MODELS: None,
        "neutral": None,
        r"female|(?<![a-z])f(?![a-z0-9])": "female",
        r"male|(?<![a-z])m(?![a-z0-9])": "male",
    }
    return next((kind for pattern, kind in patterns.items() if re.search(pattern, name)), None)


# --------------------------------------------------------------------------------------------------
# Reading a sequence


def read_sequence(path: Path) -> tuple[np.ndarray, np.ndarray, list[dict]]:
    """One .pkl of 3DPW -> K [3, 3], world to camera [N, 4, 4] (X_c = R X + t, m), and the people.

    A person is a dict of gender ("m" or "f"), betas [10], poses [N, 72], trans [N, 3] m, poses2d
    [N, 3, 18] (px and score) and campose_valid [N]. All arrays go by image; 3DPW's img_frame_ids
    only says when each was taken. Raises ValueError, with one sentence, on anything else.
    """
    content, name = load_pickle(path), shown(path, 4096)
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no sequence of 3DPW: expected a dictionary, "
                         f"found {described(content)}")
    genders = "gender" if "gender" in content and "genders" not in content else "genders"
    people = ("poses", "betas", "trans", "poses2d", "campose_valid", genders)
    for key in ("cam_poses", "cam_intrinsics", *people):
        if key not in content:
            raise ValueError(f"{name} is no sequence of 3DPW: it has no {key}")

    cam_poses = _numbers(path, "cam_poses", content["cam_poses"], (None, 4, 4))
    if len(cam_poses) > MOST:
        raise ValueError(f"{name}: expected at most {MOST} frames, found {len(cam_poses)}")
    K = _numbers(path, "cam_intrinsics", content["cam_intrinsics"], (3, 3)).astype(np.float64)
    if not (np.isfinite(K).all() and min(K[0, 0], K[1, 1], K[0, 2], K[1, 2]) > 0):
        raise ValueError(f"{name}: expected cam_intrinsics with focal lengths and a centre above "
                         f"0, found {K.tolist()}")
    lists = {key: _as_list(content[key]) for key in people}
    n_people = max(1, len(lists["poses"]))
    if n_people > MOST_PEOPLE or any(len(of) != n_people for of in lists.values()):
        found = ", ".join(f"{len(of)} in {key}" for key, of in lists.items())
        raise ValueError(f"{name}: expected lists of one entry for each of at most {MOST_PEOPLE} "
                         f"people, found {found}")
    persons = [_person(path, lists, i, genders, len(cam_poses)) for i in range(n_people)]
    return K, cam_poses.astype(np.float64), persons


def _person(path: Path, lists: dict[str, list], i: int, genders: str, n: int) -> dict:
    """Person i of a sequence of n images."""
    shapes = {"poses": (n, 72), "betas": (None,), "trans": (n, 3), "poses2d": (n, 3, 18),
              "campose_valid": (n,)}  # fmt: skip
    why = f", and cam_poses has {n} frames"
    person = {key: _numbers(path, key, lists[key][i], shape, why) for key, shape in shapes.items()}
    gender = lists[genders][i]
    gender = gender.decode("latin1") if isinstance(gender, bytes) else gender
    betas = person["betas"]
    if len(betas) < smpl.N_SHAPE or not isinstance(gender, str) or gender not in ("m", "f"):
        raise ValueError(f"{shown(path, 4096)}: expected betas of at least {smpl.N_SHAPE} numbers "
                         f"and {genders} m or f, found {len(betas)} and {shown(gender)}")
    return person | {"gender": gender, "betas": betas[: smpl.N_SHAPE].astype(np.float64)}


def _as_list(x) -> list | np.ndarray:
    """What has an entry for each person: lists and arrays, which may have many."""
    return x if isinstance(x, list) or isinstance(x, np.ndarray) and x.ndim else []


def _numbers(path: Path, key: str, x, shape: tuple, why: str = "") -> np.ndarray:
    """An array of numbers in the given shape (None: any)."""
    parts = x if isinstance(x, list) else [x]
    # Anything else is nested, and what is nested may be endless.
    plain = all(isinstance(v, int | float) or isinstance(v, np.ndarray) and v.dtype.kind in "biuf"
                for v in parts) and sum(map(np.size, parts)) <= 72 * MOST
    try:
        a = np.asarray(x if plain else None)
    except (ValueError, OverflowError):  # a list of unequal parts
        a = np.empty(0, object)
    fits = a.ndim == len(shape) and all(
        s in (None, n) for s, n in zip(shape, a.shape, strict=True))
    if a.dtype.kind not in "biuf" or not fits:
        wanted = ["any" if s is None else s for s in shape]
        raise ValueError(f"{shown(path, 4096)}: expected {key} to be numbers {wanted}, found "
                         f"{described(a)}{why}")
    return a


# --------------------------------------------------------------------------------------------------
# Samples


def samples(K: np.ndarray, poses: np.ndarray, person: dict, points: smpl.Points
            ) -> Iterator[tuple[dict, int]]:
    """The frames of one person that count, some at a time -> (arrays as in ARRAYS, how many frames
    were left out).

    K [3, 3] and poses [N, 4, 4] are the sequence's camera, points the 17 joints of the person's
    body. The size of the image is twice its centre.
    """
    with np.errstate(all="ignore"):  # what overflows is left out below
        detected, size = person["poses2d"].transpose(0, 2, 1).astype(np.float64), 2 * K[:2, 2]
        x = detected[..., :2]
        # A detection that lies farther outside of the image than this is large is no detection.
        there = ((x >= -size) & (x <= 2 * size)).all(-1) & (x != 0).any(-1)
        detected[~there] = 0
        counts = (person["campose_valid"] > 0) & ((detected[..., 2] > SURE).sum(1) > N_SURE)
        model = points.model
        rest_y = model.v_template[:, 1] + model.shapedirs[:, 1] @ person["betas"]
    frames = np.flatnonzero(counts)
    for start in range(0, len(frames), AT_ONCE):
        rows = frames[start : start + AT_ONCE]
        with np.errstate(all="ignore"):
            seen = _joints(person, points, rows, poses[rows])
            x_det, conf = to_h36m(detected[rows], "coco18")
            x_det = (x_det - K[:2, 2]) / K[[0, 1], [0, 1]] * FOCAL + CENTRE
            root = seen[:, 0]
            arrays = {
                "x_s": seen[..., :2] / seen[..., 2:] * FOCAL + CENTRE,
                "y": seen - root[:, None],
                "root": root,
                "height_px": FOCAL * 1000 * np.ptp(rest_y) / root[:, 2],
                "x_s_det": x_det * (conf > 0)[..., None],
                "conf": conf, "frame": rows,
            }
            arrays = {k: v.astype(ARRAYS[k][1]) for k, v in arrays.items()}
        good = (root[:, 2] >= NEAREST) & (seen[..., 2] > 0).all(1)
        for v in arrays.values():
            good &= np.isfinite(v.reshape(len(v), -1)).all(1)
        yield {k: v[good] for k, v in arrays.items()}, int((~good).sum())


def _joints(person: dict, points: smpl.Points, rows: np.ndarray, camera: np.ndarray) -> np.ndarray:
    """Joints of a person in frames `rows`, whose cameras are [n, 4, 4]: [n, 17, 3] mm, as seen by
    the camera."""
    pose = person["poses"][rows].reshape(-1, 24, 3)
    betas = np.tile(person["betas"], (len(rows), 1))
    # trans is added afterwards: the rows of the regressor sum to 1 only nearly, and in a wide world
    # that costs millimetres.
    world = points(pose, betas, np.zeros((len(rows), 3))) + person["trans"][rows, None]
    return 1000 * (world @ camera[:, :3, :3].transpose(0, 2, 1) + camera[:, None, :3, 3])


# --------------------------------------------------------------------------------------------------
# Writing


def choose_sequences(found: dict[str, list[Path]]) -> dict[str, tuple[Path, list[str]]]:
    """The sequences of both splits: name -> (file, splits). Two of a name are refused."""
    files = {}
    for path in (p for f in FOLDERS for p in found[f]):
        is_occ = "_".join(path.stem.split("_")[:2]) in OCC
        member = {"test": path.parent.name == "test", "occ": is_occ}
        if not any(member.values()):
            continue
        if path.stem in files:
            raise ValueError(f"{shown(path, 4096)} is a second {shown(path.stem)} beside "
                             f"{shown(files[path.stem][0], 4096)}: keep one of them")
        files[path.stem] = path, [s for s in ABOUT if member[s]]
    return files


def read_points(found: dict[str, list[Path]]) -> dict[str, smpl.Points]:
    """The 17 joints of the male ("m") and of the female ("f") model."""
    models = {kind[0]: smpl.read(found[kind][0]) for kind in ("male", "female")}
    regressor = smpl.read_regressor(found["regressor"][0], models["m"])
    if len(models["f"].v_template) != regressor.shape[1]:
        raise ValueError(f"{shown(found['female'][0], 4096)}: expected as many vertices as the "
                         f"male model has, {regressor.shape[1]}")
    return {gender: smpl.Points(model, regressor) for gender, model in models.items()}


def prepare(source: Path, out: Path, overwrite: bool) -> Path:
    """Write the splits `test` and `occ` of the files in source to `out` (data/NAME) -> its folder.

    Everything is read twice, since the files of a split are created with their size: first to count
    samples, then to write them. Raises ValueError, with one sentence, where something is missing or
    is not what it should be; then nothing is written.
    """
    found = check_folder(source, _kind, WANTED)
    print(", ".join(f"{len(found[f])} of {n} {f} sequences" for f, n in FOLDERS.items()))
    for kind in ("male", "female", "regressor"):
        if len(found[kind]) > 1:
            first, second = (shown(path, 4096) for path in found[kind][:2])
            raise ValueError(f"{second} is a second {kind} file beside {first}: keep one of them")
    files = choose_sequences(found)
    actions = sorted(files)

    with new_data_set(out, overwrite) as temporary:
        points = read_points(found)

        def everybody(doing):
            """Pieces of all sequences: ([sequence, number of the person], arrays, left out)."""
            for name in tqdm(actions, desc=doing):
                K, poses, people = read_sequence(files[name][0])
                for i, person in enumerate(people):
                    for arrays, n_out in samples(K, poses, person, points[person["gender"]]):
                        yield [name, i], arrays, n_out

        n, people, all_in, all_out = dict.fromkeys(ABOUT, 0), [], 0, 0
        for who, arrays, n_out in everybody("counting"):
            if who not in people:
                people.append(who)
            all_in, all_out = all_in + len(arrays["y"]), all_out + n_out
            for s in files[who[0]][1]:
                n[s] += len(arrays["y"])
        print(f"{all_in} samples; {all_out} more left out: not finite, a joint behind the camera, "
              f"or the root less than {NEAREST / 1000} m in front of it")
        for s in ABOUT:
            if not n[s]:
                of = shown(", ".join(a for a in actions if s in files[a][1]), 1000) or "none found"
                raise ValueError(f"{shown(source, 4096)}: the split {s} would be empty: expected "
                                 "frames with a valid camera and detections in its sequences "
                                 f"({of})")
        for s in ABOUT:
            create_split(temporary / s, n[s])
        for who, arrays, _ in everybody("writing"):
            number = people.index(who)
            labels = {"action": actions.index(who[0]), "subject": number, "sequence": number}
            for s in files[who[0]][1]:
                append_samples(temporary / s, arrays | labels)
        models = shown(", ".join(found[kind][0].name for kind in ("male", "female")))
        meta = base_meta(out, "3dpw") | {
            "actions": list(map(shown, actions)),
            "people": [[shown(name), i] for name, i in people],
            "image_size": IMAGE_SIZE, "noise": None, "seed": 0, "frame_rate": 30,
            "splits": {s: {"n": n[s], "with_mesh": 0, "about": about}
                       for s, about in ABOUT.items()},
            "joints_14": [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15, 16],
            "sources": {
                "sequences": "3DPW, https://virtualhumans.mpi-inf.mpg.de/3DPW",
                "frames": f"campose_valid, and more than {N_SURE} of OpenPose's 18 joints with "
                          f"confidence above {SURE}",
                "detections": "OpenPose's as 3DPW ships them; the paper's CPN detections are not "
                              "distributed",
                "joints": f"gendered SMPL models {models}, regressor "
                          f"{shown(found['regressor'][0].name)}",
            },
        }  # fmt: skip
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    return Path(out)
