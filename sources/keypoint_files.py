"""The files in which other programs keep 2D keypoints, read into people.

Most JSON files are people in images in lists, under names that differ: `_Search` finds people
wherever they are, and PROGRAMS says whose file it is. COCO's annotations, NumPy's arrays and the
labels of Ultralytics have readers of their own. Nothing that a file holds is executed: object
arrays go through an unpickler that builds arrays only (safe_pickle.py).
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sources.files import read_bytes, read_json, shown
from sources.layouts import layout_of
from sources.safe_pickle import load_arrays
from sources.tracks import Frame, frames_of

MOST = 200_000  # people of a file
MOST_NUMBERS = 15_000_000  # of all of them
MOST_NODES = 500_000  # lists and objects that are searched for people
LONGEST_NAME = 100  # characters of an image's name that are kept
DEPTH = 8  # of lists and objects around the people of a JSON file


class Person(NamedTuple):
    """One person as the file has them."""

    points: np.ndarray  # [K, 3]: x, y and score
    name: str
    frame: Frame | str | None = None  # or the name of the image, which may tell
    id: str = ""  # of a track, if the file has one
    size: tuple[float, float] = (0.0, 0.0)  # px, width and height of the image; 0: unknown


class Found(NamedTuple):
    """What a file holds."""

    program: str
    people: list[Person]
    layout: str | None = None  # of the joints, as far as it is known
    assumed: bool = False  # the layout is only the usual one of this program
    unknown: str = ""  # what to say if the joints have names, and no layout has these


# What tells whose file it is: all of these keys are on the way to people, or their own. The first
# that fits counts. With it the layout that files of this program usually have, by the number
# of joints.
COCO = {17: "coco17"}
PROGRAMS = [
    ({"instances"}, "MMPose 1.x", {}),
    ({"keypoint_scores"}, "MMPose 1.x", {}),
    ({"skeleton", "pose"}, "ST-GCN", {}),
    ({"bodies"}, "AlphaPose in CMU's form", {}),
    ({"people"}, "OpenPose", {}),
    ({"landmarks"}, "MediaPipe", {}),
    ({"predictions"}, "OpenPifPaf", COCO),
    ({"box", "class"}, "Ultralytics", COCO),
    ({"idx"}, "AlphaPose", COCO),
    ({"image_id"}, "COCO results", COCO),
    ({"keypoints", "bbox", "category_id"}, "OpenPifPaf", COCO),
    ({"keypoints", "bbox"}, "MMPose 0.x", {}),
    ({"keypoints"}, "people with keypoints", COCO),
]
KNOWN = ("COCO (`annotations`, or a list of results), OpenPose (`people`), AlphaPose, MMPose "
         "(`instance_info`), Ultralytics, OpenPifPaf or MediaPipe (33 landmarks)")  # fmt: skip
DATASETS = {"coco": "coco17", "coco_wholebody": "coco17", "mpii": "mpii16", "h36m": "h36m17",
            "halpe26": "halpe26", "posetrack18": "posetrack17", "crowdpose": "crowdpose14",
            "aic": "aic14"}  # fmt: skip
IDS = ("track_id", "idx", "person_id", "instance_id")
IMAGES = ("image_id", "image_name", "file_name", "filename", "image", "frame_id", "frame_index",
          "frame")  # fmt: skip
GROUPS = ("people", "bodies", "instances", "instance_info", "predictions", "skeleton", "data",
          "frames", "results", "images", "pose_landmarks", "landmarks", "landmark")  # fmt: skip


def read_people(path: Path) -> Found:
    """Everything in a file or folder. Raises nearly anything on a broken file."""
    suffix = path.suffix.lower()
    if path.is_dir():
        return _folder(path)
    if suffix in (".npy", ".npz"):
        return _arrays(path)
    if suffix == ".txt":
        return Found("labels of Ultralytics", _in_time(_labels(path)), "coco17", assumed=True)
    if suffix != ".json":
        raise ValueError(f"expected a file that ends in .json, .npz, .npy or .txt, or a folder of "
                         f".json or .txt files, found the ending {shown(suffix)!r}")
    content = read_json(path, lines=True)  # OpenPifPaf's videos are lines
    if isinstance(content, dict) and "annotations" in content:
        return _coco(content)
    if isinstance(content, list) and content and _is(content[0], "keypoint_annotations"):
        content = [{"image_id": image.get("image_id"), "keypoints": _aic(points)}
                   for image in content for points in image["keypoint_annotations"].values()]
        return Found("AI Challenger", _in_time(_listed(content, path.stem)[0]), "aic14")
    return _recognised(*_listed(content, path.stem), content)


def _is(x, *keys: str) -> bool:
    return isinstance(x, dict) and all(key in x for key in keys)


def _folder(path: Path) -> Found:
    """One file for every image: JSON of any program, or Ultralytics' labels."""
    files = [f for f in path.iterdir() if not f.name.startswith(".")]
    chosen = [f for f in files if f.suffix == ".json"] or [
        f for f in files if f.suffix == ".txt" and f.name != "classes.txt"]
    if not chosen:
        raise ValueError("expected a folder with one .json or .txt file for every image, as "
                         "OpenPose or Ultralytics writes it, found none")
    people, keys, names, first = [], set(), None, None
    for f in sorted(chosen, key=lambda f: natural(f.name)):
        try:
            if f.suffix == ".txt":
                some, k = _labels(f), set()
            else:
                content = read_json(f)
                first = first or content
                some, k, named = _listed(
                    content, re.sub(r"_keypoints$|\.predictions$", "", f.stem))
                names = names or named
        except Exception as e:
            raise ValueError(f"{shown(f.name)}: {reason(e)}") from e
        people.extend(some)
        keys |= k
        _check_count(people)
    if chosen[0].suffix == ".txt":
        program = f"labels of Ultralytics, {len(chosen)} images"
        return Found(program, _in_time(people), "coco17", True)
    found = _recognised(people, keys, names, first)
    return found._replace(program=f"{found.program}, {len(chosen)} files")


def _check_count(people: list[Person]) -> None:
    if len(people) > MOST or people and len(people) * people[-1].points.size > MOST_NUMBERS:
        raise ValueError(f"it holds more than {MOST} people or {MOST_NUMBERS} numbers; split it")


def reason(e: Exception) -> str:
    """What was wrong, in half a sentence, whatever a broken file has raised."""
    if isinstance(e, KeyError):
        return f"the key {shown(e.args[0])!r} is missing"
    if isinstance(e, ValueError) and e.args and isinstance(e.args[0], str):
        return shown(e.args[0], 800)
    return "it is not built as such files are"


# --------------------------------------------------------------------------------------------------
# JSON: people in images in lists


def _recognised(people: list[Person], keys: set[str], names: list | None, content) -> Found:
    """Whose file it is, and in which order its joints are. names: those that the points have."""
    if not keys and content not in ([], {}):
        raise ValueError(f"it is no keypoint file that is known here: expected {KNOWN}")
    people = _in_time(people)
    program, usual = next(((name, usual) for needed, name, usual in PROGRAMS if needed <= keys),
                          ("no people", {}))
    if program == "COCO results" and people and people[0].frame:
        program = "AlphaPose"
    layout, unknown = _named(names) if names else _told_layout(content)
    if layout or unknown:
        return Found(program, people, layout, unknown=unknown)
    layout = usual.get(len(people[0].points)) if people else None
    return Found(program, people, layout, assumed=True)


def _told_layout(content) -> tuple[str | None, str]:
    """The layout that a file names, by a data set or by its joints, and what `_named` says."""
    if not isinstance(content, dict):
        return None, ""
    meta = content.get("meta_info")
    for part in (content, meta, content.get("info")):
        if not isinstance(part, dict):
            continue
        for key in ("keypoints", "keypoint_names", "joint_names", "keypoint_id2name"):
            names = part.get(key)
            names = list(names.values()) if isinstance(names, dict) else names
            if _are_names(names):
                return _named(names)
    dataset = meta.get("dataset_name") if isinstance(meta, dict) else None
    return DATASETS.get(dataset) if isinstance(dataset, str) else None, ""


def _are_names(names) -> bool:
    return isinstance(names, list) and len(names) > 1 and all(isinstance(n, str) for n in names)


def _named(names: list[str]) -> tuple[str | None, str]:
    """The layout whose joints have these names, or what to say if there is none."""
    layout = layout_of(names)
    listed = ", ".join(shown(name, 24) for name in names[:20]) + " ..." * (len(names) > 20)
    return layout, "" if layout else (
        f"its {len(names)} joints are {listed}, and no layout that is known has these in this "
        "order: say one with --layout if only the names differ, or convert them to COCO's 17")


def _in_time(people: list[Person]) -> list[Person]:
    """People with the frames that their images' names tell, those of sequences in the order of the
    frames; the others first, as they are."""
    frames = frames_of({p.frame for p in people if isinstance(p.frame, str)})
    people = [p._replace(frame=frames.get(p.frame, p.frame)) for p in people]
    return sorted(people, key=lambda p: (natural(p.frame.sequence), p.frame.number) if p.frame
                  else ([], 0))


def _listed(content, image: str) -> tuple[list[Person], set[str], list[str] | None]:
    """The people of a JSON file, the keys on the way to them, and the names of the joints,
    if the points have them. image: the name for people who are in no other image."""
    people, search = [], _Search()
    for p, where, of in search.people(content, image):
        track = _id(p) if isinstance(p, dict) else ""
        own = _image(p, where)
        frame = own[-200:] if isinstance(own, str) else Frame("", _whole(own))
        if isinstance(own, int) and isinstance(p, dict) and "image_id" in p and not track:
            frame = None  # COCO counts photos, not frames
        people.append(Person(_points(p), _text(own), frame, track, of))
        _check_count(people)
    seen = Counter()
    for i, p in enumerate(people):
        people[i] = p._replace(name=f"{p.name} #{seen[p.name]}")
        seen[p.name] += 1
    return people, search.keys, search.names


class _Search:
    """Finds people wherever they are in what a JSON file holds. `keys` are those on the way to
    them, and their own; `names` those of the points, if they have any."""

    def __init__(self):
        self.keys, self.names, self.visited = set(), None, 0

    def people(self, node, image, size=(0.0, 0.0), group="", depth=0) -> Iterator[tuple]:
        """Every person under `node`, with the name or number of the image and its size. group: the
        key of `node`, if it is one that holds people."""
        self.visited += 1
        if depth > DEPTH or self.visited > MOST_NODES:
            raise ValueError("its lists and objects lie too deep in one another, or are too many")
        if _is_person(node):
            if isinstance(node, dict):
                self.keys.update(k for k in node if len(k) < 40)
            pose = _pose(node) if isinstance(node, dict) else node
            if _is_landmarks(pose):
                self.keys.add("landmarks")
                names = [p.get("name") for p in pose]
                self.names = self.names or (names if _are_names(names) else None)
            if pose if isinstance(pose, list) else pose.get("x") != []:  # somebody is there
                yield node, image, size
        elif isinstance(node, list):
            # A list of lists is a video, unless the file says that it is a group of people.
            video = not group and any(isinstance(x, list) for x in node)
            for i, x in enumerate(node):
                yield from self.people(x, Frame("", i) if video else image, size, "", depth + 1)
        elif isinstance(node, dict):
            image = _image(node, image)
            size = sized(node["width"], node.get("height")) if "width" in node else size
            group = next((k for k in GROUPS if isinstance(node.get(k), list | dict)), "")
            if group:
                self.keys.add(group)
                yield from self.people(node[group], image, size, group, depth + 1)
            elif node and all(isinstance(v, list | dict) for v in node.values()):
                for k, v in node.items():  # images by their names
                    yield from self.people(v, k, size, "", depth + 1)


def _image(node, otherwise):
    """The name or number of an image or frame, if `node` has one."""
    if not isinstance(node, dict):
        return otherwise
    return next((node[k] for k in IMAGES if type(node.get(k)) in (str, int)), otherwise)


POSES = ("keypoints", "pose_keypoints_2d", "pose_keypoints", "joints", "pose")


def _pose(node: dict):
    return next((node[k] for k in POSES if k in node), None)


def _is_landmarks(x) -> bool:
    """MediaPipe's: points as objects."""
    return isinstance(x, list) and len(x) > 4 and all(_is(p, "x", "y") for p in x)


def _is_person(node) -> bool:
    pose = _pose(node) if isinstance(node, dict) else None
    return _is_landmarks(node) or isinstance(pose, list | dict) and not _are_names(pose)


def _points(p) -> np.ndarray:
    """A person's keypoints in any of their forms -> [K, 3]. What has no score has 1."""
    pose = _pose(p) if isinstance(p, dict) else p
    if _is_landmarks(pose):
        return _numbers([[q["x"], q["y"], q.get("visibility", q.get("score", 1))] for q in pose])
    scores = next((p[k] for k in ("keypoint_scores", "scores", "score", "kp_score")
                   if isinstance(p.get(k), list)), None)
    if isinstance(pose, dict):  # Ultralytics: lists of x and of y
        x, y = (_numbers(pose[k]).ravel() for k in "xy")
        scores = pose.get("visible", pose.get("confidence"))
        a = np.stack([x, y], 1) if len(x) == len(y) else np.zeros(0)
    else:
        width = max((len(p) for p in pose if isinstance(p, list)), default=0)
        a = _numbers([p or [None] * width for p in pose] if width else pose)  # null: a missing one
        a = a[0] if a.ndim == 3 and len(a) == 1 else a
    if scores is not None:
        scores = _numbers(scores).ravel()
        if a.ndim == 1 and a.size == 2 * scores.size or a.ndim == 2 and a.shape[1:] == (2,):
            a = a.reshape(-1, 2)
            if len(a) != len(scores):
                raise ValueError("expected one score for each joint, beside its x and y, found "
                                 f"{len(scores)} for {len(a)} joints")
            return np.concatenate([a, scores[:, None]], 1)
    if a.ndim == 1 and a.size % 3 == 0:
        a = a.reshape(-1, 4 if a.size == 4 * 33 else 3)
    if a.size == 0 or a.ndim != 2 or a.shape[1] not in _columns(a):
        raise ValueError("expected keypoints as x, y, score for each joint, "
                         f"found an array {list(a.shape)}")
    return _with_score(a)


def _numbers(x) -> np.ndarray:
    """Lists as an array of numbers. None is NaN."""
    try:
        return np.asarray(x, np.float64)
    except (ValueError, TypeError, OverflowError):
        raise ValueError("expected lists of numbers for the joints, found something else") from None


def _id(p: dict) -> str:
    """The id of a person's track, however deep it lies in lists; -1 is none."""
    for key in IDS:
        value = p.get(key)
        while isinstance(value, list) and value:
            value = value[0]
        if isinstance(value, str) and value or type(value) in (int, float) and value >= 0:
            return f"{value:.15g}"[:40] if isinstance(value, float) else str(value)[:40]
    return ""


def _whole(x) -> int:
    return min(x, 1 << 62) if type(x) is int and x >= 0 else getattr(x, "number", 0)


def _text(image) -> str:
    """The name of an image, of a sensible length."""
    image = f"frame {image.number}" if isinstance(image, Frame) else image
    return image[:LONGEST_NAME] if isinstance(image, str) else shown(image)


def sized(w, h) -> tuple[float, float]:
    """Width and height, or (0, 0) if they cannot be those of an image."""
    good = all(type(v) in (int, float) and 1 <= v <= 100_000 for v in (w, h))
    return (float(w), float(h)) if good else (0.0, 0.0)


def natural(text: str) -> list:
    """A key for sorting: 10.jpg comes after 9.jpg."""
    parts = re.split(r"([0-9]{1,18})", text)
    return [int(t) if i % 2 else t for i, t in enumerate(parts)]


def _aic(flat: list) -> list:
    """AI Challenger's v is 1 for visible, 2 for hidden and 3 for absent."""
    a = _points(dict(keypoints=flat))
    a[:, 2] = a[:, 2] < 3
    return a.tolist()


# --------------------------------------------------------------------------------------------------
# COCO's annotations, labels, arrays


def _coco(content: dict) -> Found:
    """COCO's annotations, and those of other data sets in this form: the names of the joints in
    `categories` tell which."""
    images = {i["id"]: i for i in content.get("images") or ()}
    names = {c.get("id"): c["keypoints"] for c in content.get("categories") or ()
             if _are_names(c.get("keypoints"))}
    people, used = [], set()
    for a in content["annotations"]:
        if not any(a.get("keypoints") or ()):
            continue
        image, points = images.get(a["image_id"], {}), _points(dict(keypoints=a["keypoints"]))
        points[:, 2] = points[:, 2] > 0  # COCO's v: 1 hidden but annotated, 2 visible
        used.add(tuple(names.get(a.get("category_id"), next(iter(names.values()), ()))))
        file, track = str(image.get("file_name", a["image_id"])), _id(a)
        frame = file[-200:] if track else None
        people.append(Person(points, f"{file[:LONGEST_NAME]} #{shown(a.get('id', len(people)))}",
                             frame, track, sized(image.get("width"), image.get("height"))))
        _check_count(people)
    layouts = {_named(list(of)) for of in used if of}
    if len(layouts) > 1:
        raise ValueError(f"its people have joints of {len(layouts)} kinds: split it")
    layout, unknown = next(iter(layouts), (None, ""))
    if not layouts and people:
        layout = COCO.get(len(people[0].points))
    return Found("COCO annotations", _in_time(people), layout, not layouts, unknown)


def _labels(path: Path) -> list[Person]:
    """Ultralytics' labels of one image: class, box, joints, and perhaps a confidence and an id."""
    people = []
    for i, line in enumerate(read_bytes(path, 16 << 20).decode("utf-8", "replace").splitlines()):
        numbers = _numbers(line.split(maxsplit=100))
        columns = 2 if len(numbers) in (39, 40, 41) else 3
        more = len(numbers) - 5 - 17 * columns  # a confidence, an id, or both
        if more not in (0, 1, 2):
            raise ValueError("expected in every line a class, a box and 17 joints, 39 or 56 "
                             "numbers, and perhaps a confidence and an id, found "
                             f"{len(numbers)} numbers")
        last = numbers[-1]
        is_id = more > 0 and last >= 1 and last == int(last)
        points = np.ones((17, 3))
        points[:, :columns] = numbers[5 : 5 + 17 * columns].reshape(17, columns)
        people.append(Person(points, f"{path.stem[:LONGEST_NAME]} #{i}", path.stem[-200:],
                             f"{last:g}" if is_id else ""))
        _check_count(people)
    return people


def _arrays(path: Path) -> Found:
    """VideoPose3D's 2D files, Detectron2's as VideoPose3D keeps them, and single arrays."""
    content, name = load_arrays(path), path.stem[:LONGEST_NAME]
    if "positions_2d" in content:
        return _videopose(path, content)
    if {"boxes", "keypoints"} <= set(content):
        people = [Person(np.asarray(p, np.float64)[[0, 1, 3]].T, f"{name} {t} #{i}",
                         Frame("", t))
                  for t, found in enumerate(content["keypoints"])
                  for i, p in enumerate(found[1] if len(found) > 1 else ())]
        return Found("Detectron2", people, "coco17", assumed=True)
    if len(content) != 1:
        names = shown(", ".join(n[:40] for n in list(content)[:20]))
        raise ValueError(f"it holds the arrays {names}: expected positions_2d and metadata "
                         "(VideoPose3D), or one array [N, joints, 2 or 3]")
    ((key, array),) = content.items()
    tracks = _scored(array)
    people = [Person(p, f"{name} {t}" + f" #{i}" * (len(tracks) > 1), Frame("", t),
                     name + f" {i}" * (len(tracks) > 1))
              for i, track in enumerate(tracks) for t, p in enumerate(track)]
    is_demo = key == "reconstruction"  # as the demos of lifting models write it
    if is_demo:
        return Found("demos of lifting models", people, "h36m17", assumed=True)
    return Found("an array", people)


def _videopose(path: Path, content: dict) -> Found:
    positions, metadata = content["positions_2d"].item(), content["metadata"].item()
    people = []
    for subject, actions in positions.items():
        video = metadata.get("video_metadata", {}).get(subject, {})
        size = sized(video.get("w"), video.get("h"))
        for action, cameras in actions.items():
            single = isinstance(cameras, np.ndarray) and cameras.ndim == 3
            cameras = [cameras] if single else cameras
            if len(cameras) > 1000:
                raise ValueError(f"it has {len(cameras)} cameras: expected at most 1000")
            for camera, frames in enumerate(cameras):
                if frames is None:
                    continue
                track = shown(f"{subject!s:.40} {action!s:.40}" + f" {camera}" * (len(cameras) > 1))
                people += [Person(p, f"{track} {t}", Frame("", t), track, size)
                           for t, p in enumerate(_scored(frames)[0])]
                _check_count(people)
    return Found("VideoPose3D", people, videopose_layout(path, metadata))


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


def _scored(a) -> np.ndarray:
    """[P, T, K, 2 or 3], [T, K, 2 or 3] or [K, 2 or 3] -> [P, T, K, 3]."""
    is_numbers = isinstance(a, np.ndarray) and a.dtype.kind in "fiu"
    if not is_numbers or a.ndim not in (2, 3, 4) or a.shape[-1] not in _columns(a) or a.size == 0:
        found = f"{a.dtype} {list(a.shape)}" if isinstance(a, np.ndarray) else type(a).__name__
        raise ValueError(f"expected numbers [N, joints, 2 or 3], found {shown(found)}")
    if a.size > MOST_NUMBERS or a.size // a.shape[-1] // a.shape[-2] > MOST:
        raise ValueError(f"it holds an array {list(a.shape)}: expected at most {MOST} people and "
                         f"{MOST_NUMBERS} numbers; split it")
    a = a.reshape(*(1,) * (4 - a.ndim), *a.shape).astype(np.float64)
    a = a.swapaxes(0, 1) if a.shape[1] == 1 else a  # one person, [T, 1, joints, 2 or 3]
    return _with_score(a)


def _columns(a: np.ndarray) -> dict[int, list[int]]:
    """For each number of columns that points [..., K, columns] may have: x, y and, if it is there,
    the score. MediaPipe's 33 landmarks are x, y, z and visibility, so a third number is z."""
    mediapipe = a.ndim > 1 and a.shape[-2] == 33
    return {2: [0, 1], 3: [0, 1], 4: [0, 1, 3]} if mediapipe else {2: [0, 1], 3: [0, 1, 2]}


def _with_score(a: np.ndarray) -> np.ndarray:
    """Points [..., K, columns] -> [..., K, 3]. What has no score has 1."""
    a = a[..., _columns(a)[a.shape[-1]]]
    return a if a.shape[-1] == 3 else np.concatenate([a, np.ones_like(a[..., :1])], -1)
