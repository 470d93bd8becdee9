"""Read 2D keypoints that other programs wrote, and bring them to Human3.6M's 17 joints.

`read(path, layout)` takes what people have on disk:

    COCO person_keypoints and result files, AlphaPose, MMPose 1.x predictions     one .json
    OpenPose                                                                     a folder of .json, or one of them
    VideoPose3D's data_2d_custom_NAME.npz                                        .npz
    arrays [N, joints, 2 or 3], the third column a score                         .npy, or .npz with one array

The joint order is recognised where the file says it or where the number of joints leaves one choice; anything else is asked
for, never guessed. Nothing that a file holds is executed: object arrays go through an unpickler that builds arrays only.
"""

import io
import json
import pickle
import re
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hipart import JOINT_NAMES

# For each of Human3.6M's joints the source joints whose mean it is. A joint is missing if any of its sources is.
# Human3.6M's own joints sit a little elsewhere (hips lower and wider, head higher), so this costs accuracy.
_LIMBS_COCO = {1: [12], 2: [14], 3: [16], 4: [11], 5: [13], 6: [15], 11: [5], 12: [7], 13: [9], 14: [6], 15: [8], 16: [10]}
_COCO = _LIMBS_COCO | {0: [11, 12], 7: [5, 6, 11, 12], 8: [5, 6], 9: [0], 10: [1, 2]}
LAYOUTS = {  # name: (number of joints, map)
    "h36m17": (17, {j: [j] for j in range(17)}),
    "coco17": (17, _COCO),
    "coco18": (18, {0: [8, 11], 1: [8], 2: [9], 3: [10], 4: [11], 5: [12], 6: [13], 7: [2, 5, 8, 11], 8: [2, 5], 9: [0],
                    10: [14, 15], 11: [5], 12: [6], 13: [7], 14: [2], 15: [3], 16: [4]}),
    "body25": (25, {0: [8], 1: [9], 2: [10], 3: [11], 4: [12], 5: [13], 6: [14], 7: [1, 8], 8: [1], 9: [0], 10: [15, 16],
                    11: [5], 12: [6], 13: [7], 14: [2], 15: [3], 16: [4]}),
    "body25b": (25, _COCO | {10: [18]}),
    "halpe26": (26, _LIMBS_COCO | {0: [19], 7: [18, 19], 8: [18], 9: [0], 10: [17]}),
    "mpii16": (16, {0: [6], 1: [2], 2: [1], 3: [0], 4: [3], 5: [4], 6: [5], 7: [6, 7], 8: [7], 9: [8], 10: [9], 11: [13],
                    12: [14], 13: [15], 14: [12], 15: [11], 16: [10]}),
}  # fmt: skip
LARGEST = 1 << 30  # bytes that a file may unpack to
FAR = 1e6  # px; a larger coordinate is no coordinate


@dataclass
class Keypoints:
    """People found in a file, in file order: x_s [N, 17, 2] px, conf [N, 17] score (0 = missing), name [N] of each, track
    [N] (people of one track follow one another in time; "" for single images), size [N, 2] width and height of the image, 0
    where the file does not know; and what was converted, in words."""

    x_s: np.ndarray
    conf: np.ndarray
    name: list[str]
    track: list[str]
    size: np.ndarray
    said: list[str] = field(default_factory=list)


def read(path: Path | str, layout: str = "auto") -> Keypoints:
    """Everything in `path`. ValueError with one sentence on anything that is not understood."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} is not there: give a keypoint file, or a folder of OpenPose's .json files")
    try:
        people, kind, known = _people(path)
    except Exception as e:  # a broken file can raise nearly anything
        if isinstance(e, ValueError) and str(path) in str(e):
            raise
        raise ValueError(f"{path} could not be read as keypoints: {type(e).__name__}: {e}") from e
    if not people:
        raise ValueError(f"{path} ({kind}) holds no person: expected at least one with keypoints")
    name, k = _layout(path, kind, known, {len(p[0]) for p in people}, layout)
    x_s, conf = to_h36m(np.stack([p[0][:k] for p in people]), name)
    size = np.array([p[3] for p in people], np.float64)
    said = [f"{path}: {kind}, {len(people)} people, joints {name}"]
    if name != "h36m17":
        made = [JOINT_NAMES[j] for j, source in LAYOUTS[name][1].items() if len(source) > 1]
        said.append(f"joints brought from {name} to Human3.6M's order; means of others: {', '.join(made)}; these and the "
                    "hips and the head sit a little elsewhere than Human3.6M's, which costs accuracy")
    return Keypoints(x_s, conf, [p[1] for p in people], [p[2] for p in people], size, said)


def to_h36m(points: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """points [N, K, 3] (x, y, score) in `layout` -> x_s [N, 17, 2], conf [N, 17]: the least score of a joint's sources.

    Absent joints (score 0, or the point (0, 0)) are never averaged: what needs them is missing.
    """
    n, table = LAYOUTS[layout]
    if points.ndim != 3 or points.shape[1:] != (n, 3):
        raise ValueError(f"{layout} needs points [N, {n}, 3], found {list(points.shape)}")
    bad = ~np.isfinite(points).all(-1) | (np.abs(points[..., :2]) > FAR).any(-1)
    points = np.where((bad | (points[..., :2] == 0).all(-1) | (points[..., 2] <= 0))[..., None], 0.0, points)
    x_s, conf = np.zeros((len(points), 17, 2), np.float32), np.zeros((len(points), 17), np.float32)
    for j, sources in table.items():
        conf[:, j] = points[:, sources, 2].min(1)
        x_s[:, j] = points[:, sources, :2].mean(1) * (conf[:, j] > 0)[:, None]
    return x_s, conf


def _layout(path: Path, kind: str, known: str | None, counts: set[int], asked: str) -> tuple[str, int]:
    """The layout and its number of joints."""
    if asked != "auto":
        if asked not in LAYOUTS:
            raise ValueError(f"--layout must be auto or one of {', '.join(LAYOUTS)}, found {asked!r}")
        known = asked
    if len(counts) != 1:
        raise ValueError(f"{path} ({kind}) mixes people of {', '.join(map(str, sorted(counts)))} joints: expected one kind")
    n = counts.pop()
    if known is None:
        fitting = [name for name, (k, _) in LAYOUTS.items() if k == n]
        if not fitting:
            raise ValueError(f"{path} ({kind}) has {n} joints per person: expected one of "
                             f"{', '.join(f'{k} ({name})' for name, (k, _) in LAYOUTS.items())}")
        if len(fitting) > 1:
            raise ValueError(f"{path} ({kind}) has {n} joints per person, which may be {' or '.join(fitting)}: "
                             "say which with --layout")
        known = fitting[0]
    k = LAYOUTS[known][0]
    if n != k and not (known == "halpe26" and n == 136):  # the first 26 of Halpe's 136 are Halpe-26
        raise ValueError(f"{path} ({kind}) has {n} joints per person, and {known} has {k}: choose another --layout")
    return known, k


# ----------------------------------------------------------------------------------------------------------------------
# Files. A person is (points [K, 3], name, track, (width, height) or (0, 0)).


def _people(path: Path) -> tuple[list[tuple], str, str | None]:
    """People, what the file is, and its layout if that is known."""
    if path.is_dir():
        files = sorted(path.glob("*.json"), key=lambda f: _natural(f.name))
        if not files:
            raise ValueError(f"{path} holds no .json file: expected a folder of OpenPose's output, one file a frame")
        people = []
        for file in files:
            content = _json(file)
            if not isinstance(content, dict) or not isinstance(content.get("people"), list):
                raise ValueError(f"{file} is not OpenPose's: expected an object with the list `people`")
            people += _openpose(content, re.sub(r"_keypoints$", "", file.stem))
        return people, f"OpenPose, {len(files)} frames", None
    if path.suffix in (".npy", ".npz"):
        return _arrays(path)
    if path.suffix != ".json":
        raise ValueError(f"{path} has an unknown ending: expected .json, .npz, .npy or a folder of OpenPose's .json files")
    content = _json(path)
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        sizes = {i["id"]: (i.get("width", 0), i.get("height", 0)) for i in content.get("images", [])}
        names = {i["id"]: str(i.get("file_name", i["id"])) for i in content.get("images", [])}
        people = []
        for a in content["annotations"]:
            if any(a.get("keypoints") or ()):
                points, image = _points(path, a["keypoints"]), a["image_id"]
                points[:, 2] = points[:, 2] > 0  # COCO's v: 1 occluded but annotated, 2 visible
                name = f"{names.get(image, image)} #{a.get('id', len(people))}"
                people.append((points, name, "", sizes.get(image, (0, 0))))
        return people, "COCO annotations", "coco17"
    if isinstance(content, dict) and isinstance(content.get("people"), list):
        return _openpose(content, re.sub(r"_keypoints$", "", path.stem)), "OpenPose, one frame", None
    if isinstance(content, dict) and isinstance(content.get("instance_info"), list):
        return _mmpose(path, content["instance_info"]), "MMPose predictions", None
    if isinstance(content, list) and content and all(isinstance(p, dict) and "keypoints" in p for p in content):
        alphapose = any(isinstance(p.get("image_id"), str) for p in content)
        order = sorted(content, key=lambda p: _natural(str(p.get("image_id", "")))) if alphapose else content
        counts, people = {}, []
        for p in order:
            image = str(p.get("image_id", ""))
            counts[image] = counts.get(image, -1) + 1
            track = str(p["idx"]) if "idx" in p else str(counts[image]) if alphapose else ""
            people.append((_points(path, p["keypoints"]), f"{image} #{counts[image]}", track, (0, 0)))
        several = any(len(p[0]) == 17 for p in people)
        known = "coco17" if several else "halpe26" if any(len(p[0]) == 136 for p in people) else None
        return people, "AlphaPose results" if alphapose else "COCO results", known
    raise ValueError(f"{path} is no keypoint file that is known here: expected COCO (`annotations`, or a list of results), "
                     "OpenPose (`people`), AlphaPose (a list with `image_id`) or MMPose 1.x (`instance_info`)")


def _openpose(content: dict, frame: str) -> list[tuple]:
    people = []
    for i, p in enumerate(content["people"]):
        flat = p.get("pose_keypoints_2d", p.get("pose_keypoints"))
        if flat:
            people.append((_points(Path(frame), flat), f"{frame} #{i}", str(i), (0, 0)))
    return people


def _mmpose(path: Path, info: list) -> list[tuple]:
    frames = info if info and "instances" in info[0] else [dict(frame_id=1, instances=info)]
    people = []
    for f in frames:
        for i, p in enumerate(f["instances"]):
            xy, score = np.asarray(p["keypoints"], np.float64), np.asarray(p["keypoint_scores"], np.float64)
            if xy.ndim != 2 or xy.shape[1] != 2 or score.shape != xy.shape[:1]:
                raise ValueError(f"{path}, frame {f.get('frame_id')}: expected keypoints [K, 2] and keypoint_scores [K], "
                                 f"found {list(xy.shape)} and {list(score.shape)}")
            people.append((np.concatenate([xy, score[:, None]], 1), f"frame {f.get('frame_id')} #{i}", str(i), (0, 0)))
    return people


def _arrays(path: Path) -> tuple[list[tuple], str, str | None]:
    content = load_arrays(path)
    if "positions_2d" in content:
        positions, metadata = content["positions_2d"].item(), content["metadata"].item()
        people, symmetry = [], metadata.get("keypoints_symmetry")
        known = {"coco": "coco17", "h36m": "h36m17"}.get(metadata.get("layout_name"))
        if known is None and symmetry is not None:  # the lists of left and right joints tell the layouts apart
            left = tuple(int(j) for j in symmetry[0][:3])
            known = {(4, 5, 6): "h36m17", (1, 3, 5): "coco17", (3, 4, 5): "mpii16"}.get(left)
        for subject, actions in positions.items():
            video = metadata.get("video_metadata", {}).get(subject, {})
            for action, cameras in actions.items():
                for camera, frames in enumerate(cameras):
                    if frames is None:
                        continue
                    track = " ".join([str(subject), str(action), *[str(camera)] * (len(cameras) > 1)])
                    for t, pose in enumerate(_scored(path, frames)):
                        people.append((pose, f"{track} {t}", track, (video.get("w", 0), video.get("h", 0))))
        return people, "VideoPose3D's 2D keypoints", known
    if len(content) != 1:
        raise ValueError(f"{path} holds the arrays {', '.join(content)}: expected positions_2d and metadata (VideoPose3D), "
                         "or one array [N, joints, 2 or 3]")
    (array,) = content.values()
    return [(p, f"{path.stem} {i}", path.stem, (0, 0)) for i, p in enumerate(_scored(path, array))], "an array", None


def _scored(path: Path, a) -> np.ndarray:
    """[N, K, 2 or 3], or one pose [K, 2 or 3] -> [N, K, 3]; a missing score is 1."""
    a = np.asarray(a)
    if a.dtype.kind not in "fiu" or a.ndim not in (2, 3) or a.shape[-1] not in (2, 3):
        raise ValueError(f"{path}: expected numbers [N, joints, 2 or 3], found {a.dtype} {list(a.shape)}")
    a = a.astype(np.float64).reshape(-1, *a.shape[-2:])
    return a if a.shape[-1] == 3 else np.concatenate([a, np.ones_like(a[..., :1])], -1)


def _points(path: Path, flat) -> np.ndarray:
    """x, y, score, x, y, score, ... (or [K][3]) -> [K, 3]."""
    a = np.asarray(flat, np.float64)
    if a.size == 0 or a.size % 3 or a.ndim > 2:
        raise ValueError(f"{path}: expected keypoints as x, y, score for each joint, found {a.size} numbers")
    return a.reshape(-1, 3)


def _natural(text: str) -> list:
    """10.jpg comes after 9.jpg."""
    return [int(t) if t.isdigit() else t for t in re.split(r"(\d+)", text)]


def _json(path: Path):
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has more than {LARGEST >> 20} MB: split it")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not a JSON file that can be read: {e}") from e


# ----------------------------------------------------------------------------------------------------------------------
# NumPy files with object arrays, without running what they say


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that knows how to build arrays and Python's own containers, and nothing else."""

    allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"), ("collections", "OrderedDict"),
               *((f"numpy.{core}.multiarray", f) for core in ("core", "_core") for f in ("_reconstruct", "scalar")),
               *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core"))}

    def find_class(self, module, name):
        if (module, name) in self.allowed:
            return super().find_class(module.replace("numpy.core", "numpy._core") if np.__version__ >= "2" else module, name)
        raise ValueError(f"its pickle asks for {module}.{name}, and only arrays are read here")


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npy (under the key "") or .npz file; object arrays too, if all they hold are arrays, containers,
    strings and numbers. ValueError with one sentence otherwise."""
    try:
        if path.suffix == ".npy":
            with open(path, "rb") as f:
                return {"": _npy(f, path.stat().st_size)}
        with zipfile.ZipFile(path) as z:
            if sum(m.file_size for m in z.infolist()) > LARGEST:
                raise ValueError(f"it unpacks to more than {LARGEST >> 20} MB")
            return {m.filename.removesuffix(".npy"): _npy(io.BytesIO(z.read(m)), m.file_size) for m in z.infolist()}
    except Exception as e:  # a broken file can raise nearly anything
        raise ValueError(f"{path} is not a NumPy file that can be read: {e or type(e).__name__}") from e


def _npy(f, size: int) -> np.ndarray:
    version = np.lib.format.read_magic(f)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"expected .npy version 1 or 2, found {version}")
    shape, fortran, dtype = read_header(f)
    if dtype.hasobject:
        return np.asarray(_ArraysOnly(f, encoding="latin1").load())
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if count * dtype.itemsize > size:
        raise ValueError(f"its header promises {count} numbers, and the file is shorter")
    flat = np.frombuffer(f.read(count * dtype.itemsize), dtype, count)
    return flat.reshape(shape[::-1]).T if fortran else flat.reshape(shape)
