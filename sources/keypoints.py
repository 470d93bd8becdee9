"""Read 2D keypoints that other programs wrote, and bring them to Human3.6M's 17 joints.

`read(path, layout)` takes what people have on disk:

    COCO annotations and results, AlphaPose, MMPose 1.x predictions    one .json
    OpenPose                                                           a folder of .json, or one
    VideoPose3D's data_2d_custom_NAME.npz                              .npz
    arrays [N, joints, 2 or 3], the third column a score               .npy, or .npz with one array

The order of joints is recognised where the file tells it, or where the number of joints leaves one
choice. Otherwise it is asked for, never guessed. Nothing that a file holds is executed: object
arrays go through an unpickler that builds arrays only (safe_pickle.py).
"""

import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hipart import JOINT_NAMES
from sources.safe_pickle import LARGEST, load_arrays

# For each of Human3.6M's joints the source joints whose mean it is. A joint is missing if any of
# its sources is. Only the head (10), where it is the mean of the eyes, is content with one of them,
# since a profile shows no more. Human3.6M's own joints sit a little elsewhere (hips lower and
# wider, head higher), so this costs accuracy.
_LIMBS_COCO = {1: [12], 2: [14], 3: [16], 4: [11], 5: [13], 6: [15],
               11: [5], 12: [7], 13: [9], 14: [6], 15: [8], 16: [10]}  # fmt: skip
_COCO = _LIMBS_COCO | {0: [11, 12], 7: [5, 6, 11, 12], 8: [5, 6], 9: [0], 10: [1, 2]}
_OPENPOSE = {11: [5], 12: [6], 13: [7], 14: [2], 15: [3], 16: [4], 9: [0]}
_LIMBS_MPII = {0: [6], 1: [2], 2: [1], 3: [0], 4: [3], 5: [4], 6: [5],
               11: [13], 12: [14], 13: [15], 14: [12], 15: [11], 16: [10]}  # fmt: skip
LAYOUTS = {  # name: (number of joints, map)
    "h36m17": (17, {j: [j] for j in range(17)}),
    "coco17": (17, _COCO),
    "coco18": (18, _OPENPOSE | {0: [8, 11], 1: [8], 2: [9], 3: [10], 4: [11], 5: [12], 6: [13],
                                7: [2, 5, 8, 11], 8: [2, 5], 10: [14, 15]}),
    "body25": (25, _OPENPOSE | {0: [8], 1: [9], 2: [10], 3: [11], 4: [12], 5: [13], 6: [14],
                                7: [1, 8], 8: [1], 10: [15, 16]}),
    "body25b": (25, _COCO | {10: [18]}),
    "halpe26": (26, _LIMBS_COCO | {0: [19], 7: [18, 19], 8: [18], 9: [0], 10: [17]}),
    "mpii16": (16, _LIMBS_MPII | {7: [6, 7], 8: [7], 9: [8], 10: [9]}),
    # Stacked Hourglass fine-tuned on Human3.6M has MPII's places, but spine, thorax and head in
    # those of thorax, neck and head.
    "sh16": (16, _LIMBS_MPII | {7: [7], 8: [8], 9: [8, 9], 10: [9]}),
}  # fmt: skip
# Halpe's 136 joints begin with Halpe-26, COCO-WholeBody's 133 with COCO-17.
LARGER = {136: "halpe26", 133: "coco17"}
MOST = 200_000  # people of a file
FAR = 1e6  # px; a larger coordinate is no coordinate
SMALLEST = 8  # px; people smaller than this are not in pixels, but in normalised coordinates


@dataclass
class Keypoints:
    """N people found in a file, in the order of the file."""

    x_s: np.ndarray  # [N, 17, 2] px
    conf: np.ndarray  # [N, 17], the score of the joint; 0: missing
    name: list[str]  # N names
    track: list[str]  # N; the people of a track follow one another in time; "": single images
    size: np.ndarray  # [N, 2] px, width and height of the image; 0: the file does not know
    said: list[str] = field(default_factory=list)  # what was read and converted, in sentences


def read(path: Path | str, layout: str = "auto") -> Keypoints:
    """Everything in `path`. Raises ValueError, with one sentence, on what is not understood."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} is not there: give a keypoint file, or a folder of OpenPose's "
                         ".json files")
    with _about(path):
        people, kind, known = _people(path)
        if not people:
            raise ValueError(f"{path} ({kind}) holds no person: expected at least one with "
                             "keypoints")
        if len(people) > MOST:
            raise ValueError(f"{path} ({kind}) holds {len(people)} people: expected at most "
                             f"{MOST}; split it")
        name, k = _layout(path, kind, known, {len(p[0]) for p in people}, layout)
        x_s, conf = to_h36m(np.stack([p[0][:k] for p in people]), name)
        size = np.array([_size(*p[3]) for p in people])
    visible = [x[c > 0] for x, c in zip(x_s, conf, strict=True)]
    extent = [np.ptp(x, 0).max() for x in visible if len(x) > 1]
    if extent and np.median(extent) < SMALLEST:
        raise ValueError(f"{path} ({kind}) shows people {np.median(extent):.3g} px large: expected "
                         "pixels, and these look normalised; multiply them by the size of the "
                         "image")
    tracks = {p[2] for p in people} - {""}
    said = [f"{path}: {kind}, {len(people)} poses, {len(tracks)} tracks, joints {name}"]
    if name != "h36m17":
        made = [JOINT_NAMES[j] for j, source in LAYOUTS[name][1].items() if len(source) > 1]
        said.append(f"joints brought from {name} to Human3.6M's order; means of others: "
                    f"{', '.join(made)}; these and the hips and the head sit a little elsewhere "
                    "than Human3.6M's, which costs accuracy")
    names = [p[1].encode("utf-8", "replace").decode()[:100] for p in people]
    return Keypoints(x_s, conf, names, [p[2] for p in people], size, said)


def to_h36m(points: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """points [N, K, 3] (x, y, score) in `layout` -> x_s [N, 17, 2] px, conf [N, 17], the least
    score of a joint's sources.

    What is missing (score 0, or the point (0, 0)) is never averaged: joints that need it are
    missing, too.
    """
    n, table = LAYOUTS[layout]
    if points.ndim != 3 or points.shape[1:] != (n, 3):
        raise ValueError(f"{layout} needs points [N, {n}, 3], found {list(points.shape)}")
    bad = ~np.isfinite(points).all(-1) | (np.abs(points[..., :2]) > FAR).any(-1)
    bad |= (points[..., :2] == 0).all(-1) | (points[..., 2] <= 0)
    points = np.where(bad[..., None], 0.0, points)
    xy, score = points[..., :2], np.minimum(points[..., 2], 100.0)
    x_s = np.zeros((len(points), 17, 2), np.float32)
    conf = np.zeros((len(points), 17), np.float32)
    for j, sources in table.items():
        visible = score[:, sources] > 0
        enough = visible.sum(1) >= (1 if j == 10 else len(sources))
        least = np.where(visible, score[:, sources], np.inf).min(1)
        conf[:, j] = np.where(enough, least, 0.0)
        total = (xy[:, sources] * visible[..., None]).sum(1)
        mean = total / np.maximum(visible.sum(1), 1)[:, None]
        x_s[:, j] = mean * (conf[:, j] > 0)[:, None]
    return x_s, conf


@contextmanager
def _about(path: Path):
    """A broken file can raise nearly anything. Make it one sentence that names the file."""
    try:
        yield
    except Exception as e:
        if isinstance(e, ValueError) and str(e).startswith(str(path)):
            raise
        what = f"the key {e} is missing" if isinstance(e, KeyError) else f"{type(e).__name__}: {e}"
        what = " ".join(what.split())[:300]
        raise ValueError(f"{path} could not be read as keypoints: {what}") from e


def _size(w, h) -> tuple[float, float]:
    """Width and height, or (0, 0) if they cannot be those of an image."""
    good = all(isinstance(v, int | float) and not isinstance(v, bool) and 1 <= v <= 100_000
               for v in (w, h))
    return (float(w), float(h)) if good else (0.0, 0.0)


def _layout(path: Path, kind: str, known: str | None, counts: set[int], asked: str
            ) -> tuple[str, int]:
    """The layout and its number of joints: what the user asks for, else what the file tells, else
    what the number of joints leaves."""
    if asked != "auto" and asked not in LAYOUTS:
        raise ValueError(f"{path}: --layout must be auto or one of {', '.join(LAYOUTS)}, "
                         f"found {asked!r}")
    known = known if asked == "auto" else asked
    if len(counts) != 1:
        raise ValueError(f"{path} ({kind}) mixes people of {', '.join(map(str, sorted(counts)))} "
                         "joints: expected one kind")
    n = counts.pop()
    has = f"{path} ({kind}) has {n} joints per person"
    known = known or LARGER.get(n)
    if known is None:
        possible = [name for name, (k, _) in LAYOUTS.items() if k == n]
        if not possible:
            each = ", ".join(f"{k} ({name})" for name, (k, _) in LAYOUTS.items())
            raise ValueError(f"{has}: expected one of {each}")
        if len(possible) > 1:
            raise ValueError(f"{has}, which may be {' or '.join(possible)}: say which with "
                             "--layout")
        known = possible[0]
    k = LAYOUTS[known][0]
    if n != k and LARGER.get(n) != known:
        raise ValueError(f"{has}, and {known} has {k}: choose another --layout")
    return known, k


# --------------------------------------------------------------------------------------------------
# Files. A person is (points [K, 3], name, track, (width, height)).


def _people(path: Path) -> tuple[list[tuple], str, str | None]:
    """The people, what the file is, and its layout, if that is known."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return _openpose_folder(path)
    if suffix in (".npy", ".npz"):
        return _arrays(path)
    if suffix != ".json":
        raise ValueError(f"{path} has an unknown ending: expected .json, .npz, .npy or a folder of "
                         "OpenPose's .json files")
    content = read_json(path)
    if isinstance(content, dict):
        if "annotations" in content:
            return _coco(path, content)
        if "people" in content:
            frame, poses = re.sub(r"_keypoints$", "", path.stem), _openpose(path, content)
            people = [(p, f"{frame} #{i}", "", (0, 0)) for i, p in enumerate(poses)]
            return people, "OpenPose, one frame", None
        if "instance_info" in content:
            dataset = str(content.get("meta_info", {}).get("dataset_name", ""))
            known = {"coco": "coco17", "mpii": "mpii16", "h36m": "h36m17", "halpe26": "halpe26"}
            people = _mmpose(path, content["instance_info"])
            return people, "MMPose predictions", known.get(dataset)
    if content == []:
        return [], "a list", None
    if isinstance(content, list) and all(isinstance(p, dict) for p in content):
        if "instances" in content[0] or "keypoint_scores" in content[0]:
            return _mmpose(path, content), "MMPose predictions", None
        if "keypoints" in content[0]:
            return _results(path, content)
    raise ValueError(f"{path} is no keypoint file that is known here: expected COCO "
                     "(`annotations`, or a list of results), OpenPose (`people`), AlphaPose (a "
                     "list with `image_id`) or MMPose 1.x (`instance_info`)")


def _openpose_folder(path: Path) -> tuple[list[tuple], str, None]:
    """A video: one file a frame, in the order of their names."""
    files = [f for f in path.glob("*.json") if not f.name.startswith(".")]
    if not files:
        raise ValueError(f"{path} holds no .json file: expected a folder of OpenPose's output, "
                         "one file a frame")
    frames = {}
    for file in sorted(files, key=lambda f: _natural(f.name)):
        with _about(file):
            frame = re.sub(r"_keypoints$", "", file.stem)
            frames[frame] = _openpose(file, read_json(file))
    return _linked(frames), f"OpenPose, {len(files)} frames", None


def _coco(path: Path, content: dict) -> tuple[list[tuple], str, str | None]:
    """COCO's annotations. Some people keep other joints in this format: then the names tell."""
    images = {i["id"]: i for i in content.get("images") or ()}
    joints = [c["keypoints"] for c in content.get("categories") or () if "keypoints" in c]
    known = "coco17" if not joints or joints[0][:1] == ["nose"] else None
    people = []
    for a in content["annotations"]:
        if not any(a.get("keypoints") or ()):
            continue
        image, points = images.get(a["image_id"], {}), _points(path, a["keypoints"])
        points[:, 2] = points[:, 2] > 0  # COCO's v: 1 occluded but annotated, 2 visible
        name = f"{image.get('file_name', a['image_id'])} #{a.get('id', len(people))}"
        people.append((points, name, "", (image.get("width"), image.get("height"))))
    return people, "COCO annotations", known


def _results(path: Path, content: list[dict]) -> tuple[list[tuple], str, str | None]:
    """COCO's results, and AlphaPose's, whose image_id is the name of a file."""
    known = "coco17" if any(np.size(p["keypoints"]) == 51 for p in content) else None
    if not any(isinstance(p["image_id"], str) for p in content):
        people = [(_points(path, p["keypoints"]), f"{p['image_id']} #{i}", "", (0, 0))
                  for i, p in enumerate(content)]
        return people, "COCO results", known
    frames, ids = {}, {}
    for p in sorted(content, key=lambda p: _natural(str(p["image_id"]))):
        image = str(p["image_id"])
        frames.setdefault(image, []).append(_points(path, p["keypoints"]))
        ids.setdefault(image, []).append(f"{np.ravel(p.get('idx', 0))[0]:g}")
    # Without tracking, idx is 0 everywhere.
    tracked = {i for of in ids.values() for i in of} != {"0"}
    tracked = tracked and all(len(set(of)) == len(of) for of in ids.values())
    return _linked(frames, ids if tracked else None), "AlphaPose results", known


def _openpose(path: Path, content) -> list[np.ndarray]:
    """The people of one OpenPose file, each [K, 3] px and score."""
    if not isinstance(content, dict) or not isinstance(content.get("people"), list):
        raise ValueError(f"{path} is not OpenPose's: expected an object with the list `people`")
    flat = [p.get("pose_keypoints_2d", p.get("pose_keypoints")) for p in content["people"]]
    return [_points(path, f) for f in flat if f]


def _mmpose(path: Path, info: list) -> list[tuple]:
    """MMPose's video, a list of {frame_id, instances}, or its image, the list of instances."""
    video = bool(info) and "instances" in info[0]
    frames = {}
    for f in info if video else [dict(frame_id=0, instances=info)]:
        people = frames[f"frame {f['frame_id']}"] = []
        for p in f["instances"]:
            xy = np.asarray(p["keypoints"], np.float64)
            score = np.asarray(p["keypoint_scores"], np.float64)
            if xy.ndim != 2 or xy.shape[1] != 2 or score.shape != xy.shape[:1]:
                raise ValueError(f"{path}, frame {f['frame_id']}: expected keypoints [K, 2] and "
                                 f"keypoint_scores [K], found {list(xy.shape)} and "
                                 f"{list(score.shape)}")
            people.append(np.concatenate([xy, score[:, None]], 1))
    if video:
        return _linked(frames)
    return [(p, f"{path.stem} #{i}", "", (0, 0)) for i, p in enumerate(people)]


def _linked(frames: dict[str, list[np.ndarray]], tracks: dict[str, list[str]] | None = None
            ) -> list[tuple]:
    """People of a sequence {frame: [points]}, with a track for each.

    It is the given one, or that of whoever overlaps most in the frame before (by more than 0.3 of
    the boxes' union), or else a new one. The order in a frame means nothing, since programs list
    people in any order.
    """
    people, last, fresh = [], {}, 0  # last: track -> box in the frame before
    for frame, poses in frames.items():
        boxes = [_box(p) for p in poses]
        found = dict(enumerate(tracks[frame])) if tracks else {}
        if boxes and last and not tracks:
            before = list(last)
            overlap = _overlap(np.array(boxes), np.array(list(last.values())))
            pairs = np.argwhere(overlap > 0.3)
            best_first = np.argsort(-overlap[tuple(pairs.T)], kind="stable")
            for i, j in pairs[best_first].tolist():
                if i not in found and before[j] not in found.values():
                    found[i] = before[j]
        for i, p in enumerate(poses):
            if i not in found:
                found[i], fresh = str(fresh), fresh + 1
            people.append((p, f"{frame} #{i}", found[i], (0, 0)))
        last = {found[i]: box for i, box in enumerate(boxes)} or last
    return people


def _box(p: np.ndarray) -> np.ndarray:
    """The box [2 corners, 2] around a person's visible joints, or all of them if none is."""
    visible = p[p[:, 2] > 0, :2] if (p[:, 2] > 0).any() else p[:, :2]
    return np.array([visible.min(0), visible.max(0)])


def _overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes [n, 2 corners, 2] and [m, 2, 2] -> [n, m]."""
    a, b = a[:, None], b[None]
    both = np.maximum(np.minimum(a[:, :, 1], b[:, :, 1]) - np.maximum(a[:, :, 0], b[:, :, 0]), 0)
    both = np.prod(both, -1)
    area_a, area_b = (np.prod(x[:, :, 1] - x[:, :, 0], -1) for x in (a, b))
    return both / np.maximum(area_a + area_b - both, 1e-9)


def _arrays(path: Path) -> tuple[list[tuple], str, str | None]:
    """VideoPose3D's 2D files, and single arrays."""
    content = load_arrays(path)
    if "positions_2d" not in content:
        if len(content) != 1:
            raise ValueError(f"{path} holds the arrays {', '.join(content)}: expected positions_2d "
                             "and metadata (VideoPose3D), or one array [N, joints, 2 or 3]")
        (array,) = content.values()
        track = path.stem if array.ndim == 3 and len(array) > 1 else ""
        people = [(p, f"{path.stem} {i}", track, (0, 0))
                  for i, p in enumerate(_scored(path, array))]
        return people, "an array", None
    positions, metadata = content["positions_2d"].item(), content["metadata"].item()
    known, people = videopose_layout(path, metadata), []
    for subject, actions in positions.items():
        video = metadata.get("video_metadata", {}).get(subject, {})
        size = video.get("w"), video.get("h")
        for action, cameras in actions.items():
            single = isinstance(cameras, np.ndarray) and cameras.ndim == 3
            cameras = [cameras] if single else cameras
            for camera, frames in enumerate(cameras):
                if frames is None:
                    continue
                track = " ".join([str(subject), str(action), *[str(camera)] * (len(cameras) > 1)])
                people += [(p, f"{track} {t}", track, size)
                           for t, p in enumerate(_scored(path, frames))]
    return people, "VideoPose3D's 2D keypoints", known


def videopose_layout(path: Path, metadata: dict) -> str | None:
    """The layout of VideoPose3D's 2D files: by its name, or else by the left joints in the list of
    left and right ones, and by the name of the file."""
    known = {"coco": "coco17", "h36m": "h36m17"}.get(metadata.get("layout_name"))
    if known is None and metadata.get("keypoints_symmetry") is not None:
        left = tuple(int(j) for j in metadata["keypoints_symmetry"][0][:3])
        hourglass = next(iter(re.findall("sh_[pf]t", path.name.lower())), None)
        hourglass = {"sh_pt": "mpii16", "sh_ft": "sh16"}.get(hourglass)
        known = {(4, 5, 6): "h36m17", (1, 3, 5): "coco17", (3, 4, 5): hourglass}.get(left)
    return known


def _scored(path: Path, a) -> np.ndarray:
    """[N, K, 2 or 3], or one pose [K, 2 or 3] -> [N, K, 3]; a missing score is 1."""
    is_numbers = isinstance(a, np.ndarray) and a.dtype.kind in "fiu"
    if not is_numbers or a.ndim not in (2, 3) or a.shape[-1] not in (2, 3):
        found = f"{a.dtype} {list(a.shape)}" if isinstance(a, np.ndarray) else type(a).__name__
        raise ValueError(f"{path}: expected numbers [N, joints, 2 or 3], found {found}")
    a = a.reshape(-1, *a.shape[-2:])
    if len(a) > MOST:
        raise ValueError(f"{path} holds {len(a)} poses in one array: expected at most {MOST}; "
                         "split it")
    a = a.astype(np.float64)
    return a if a.shape[-1] == 3 else np.concatenate([a, np.ones_like(a[..., :1])], -1)


def _points(path: Path, flat) -> np.ndarray:
    """x, y, score, x, y, score, ... (or [K][3]) -> [K, 3]."""
    a = np.asarray(flat, np.float64)
    if a.size == 0 or a.size % 3 or a.ndim not in (1, 2) or (a.ndim == 2 and a.shape[1] != 3):
        raise ValueError(f"{path}: expected keypoints as x, y, score for each joint, "
                         f"found an array {list(a.shape)}")
    return a.reshape(-1, 3)


def _natural(text: str) -> list:
    """A key for sorting: 10.jpg comes after 9.jpg."""
    parts = re.split(r"([0-9]{1,18})", text)
    return [int(t) if i % 2 else t for i, t in enumerate(parts)]


def read_json(path: Path, largest: int = LARGEST):
    """What a JSON file holds. Raises ValueError, with one sentence, if it cannot be read or has
    more than `largest` bytes."""
    if path.stat().st_size > largest:
        raise ValueError(f"{path} has more than {largest >> 20} MB: split it")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not a JSON file that can be read: {e}") from e
