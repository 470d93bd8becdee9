"""Feed every reader with mutated files: each must be read, or refused in one sentence.

    python benchmarks/fuzz.py                                    # all readers, 2,000 files each
    python benchmarks/fuzz.py --reader bvh --files 200 --seed 1
    python benchmarks/fuzz.py --reader bvh --seed 1 --only 137   # one file again, its traceback

A reader comes with small, made-up files of every kind that it reads. Each file that it is given has
a few changes: in its bytes, or in what it is made of (JSON values, words, opcodes of pickles,
headers of arrays, members of archives, tensors). Some name code that would leave a mark, some ask
for much memory or time, some are no files at all. A process of its own reads them, with at most 6
GB, and 20 s for each. Anything but success or one plain sentence is a fault, and so is a write
outside of the file's folder. Exit status 1 if there is a fault.
"""

import argparse
import faulthandler
import io
import json
import multiprocessing
import os
import pickle
import pickletools
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import test_human36m  # noqa: E402
import test_mocap  # noqa: E402
import test_threedpw  # noqa: E402
import torch  # noqa: E402
from conftest import RUN_SIZES, rest_joints, smpl_content, write_smpl_pkl, write_tiny  # noqa: E402

import evaluate  # noqa: E402
import train  # noqa: E402
from sources import dataset, human36m, keypoints, mocap, smpl, threedpw  # noqa: E402

MEMORY, SECONDS = 6 << 30, 20  # of a process, and for a file
SLOW, LARGE = 5, 1 << 30  # s and bytes: a file that is refused should take less
LONGEST = 600  # characters of a message
WORK = Path(tempfile.mkdtemp(prefix="fuzz_"))
MARK = WORK / "executed"  # what no file may leave
SECRET = WORK / "secret"  # a file whose content no message may show


# --------------------------------------------------------------------------------------------------
# Readers. Each is a function that writes good files, every folder in `folder` a case of its own,
# and returns what reads one file of a case.


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
        path.write_text(json.dumps(content) if path.suffix == ".json" else content)
    return path


# MediaPipe's 33 landmarks, each at one of Human3.6M's joints
MEDIAPIPE = [9] + [10] * 10 + [11, 14, 12, 15] + [13, 16] * 4 + [4, 1, 5, 2] + [6, 3] * 3


def person(layout):
    """Somebody who stands upright: x, y and score [n, 3] in a layout."""
    x, _, z = rest_joints().T
    joints = np.stack([500 + 300 * x, 800 - 300 * z, np.full(17, 0.9)], 1).round(2)
    if layout == "mediapipe":
        return joints[MEDIAPIPE]
    n, table = keypoints.LAYOUTS[layout]
    points = np.tile(joints[10], (n, 1))
    for j, sources in table.items():
        if len(sources) == 1:
            points[sources[0]] = joints[j]
    return points


def keypoint_files(folder):
    coco, body, pipe, h36m = map(person, ("coco17", "body25", "mediapipe", "h36m17"))
    flat = {k: person(k).ravel().tolist() for k in ("coco17", "coco18", "halpe26", "body25")}
    xy, score, video = coco[:, :2].tolist(), coco[:, 2].tolist(), np.stack([h36m] * 5)
    names = ["nose", *(f"{side}_{joint}" for joint in
                       ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
                       for side in ("left", "right"))]  # fmt: skip
    image = dict(id=7, width=1000, height=1000, file_name="a.jpg")
    result = dict(category_id=1, keypoints=flat["coco17"], score=1.0, bbox=[1, 2, 3, 4])
    put(folder, "coco.json", dict(
        images=[image], categories=[dict(id=1, name="person", keypoints=names)],
        annotations=[result | dict(id=i, image_id=7) for i in (3, 4)]))
    put(folder, "results.json", [result | dict(image_id=i) for i in range(3)])
    put(folder, "openpifpaf.json", [result, result])
    alpha = dict(keypoints=flat["halpe26"], score=2.5)
    put(folder, "alphapose.json", [alpha | dict(image_id=f"{t}.jpg", idx=[1]) for t in range(4)])
    put(folder, "poseflow.json", {f"{t}.jpg": [alpha | dict(idx=1)] for t in range(3)})
    openpose = dict(version=1.3, people=[dict(person_id=[-1], pose_keypoints_2d=flat["body25"])])
    put(folder, "openpose_body25.json", openpose)
    frame = put(folder, "frames_body25/clip_1_keypoints.json".replace("/", "_"), openpose)
    frames = frame.parent / "frames_body25"
    frames.mkdir()
    frame.rename(frames / "clip_1_keypoints.json")
    shutil.copy(frames / "clip_1_keypoints.json", frames / "clip_2_keypoints.json")
    instance = dict(keypoints=xy, keypoint_scores=score, bbox=[[0, 0, 9, 9]], bbox_score=1)
    mmpose = dict(instance_info=[dict(frame_id=t, instances=[instance]) for t in range(3)])
    put(folder, "mmpose.json", mmpose | dict(meta_info=dict(dataset_name="coco")))
    put(folder, "mmpose_coco17.json", [instance])
    put(folder, "ultralytics.json", [dict(
        name="person", confidence=0.9, box=dict(x1=1, y1=2, x2=3, y2=4), track_id=1,
        keypoints=dict(x=coco[:, 0].tolist(), y=coco[:, 1].tolist(), visible=score))])
    label = " ".join(f"{v:.6f}" for v in (coco * [1e-3, 1e-3, 2]).ravel())
    put(folder, "labels.txt", f"0 0.5 0.5 0.2 0.5 {label}\n")
    landmarks = [dict(x=x / 1e3, y=y / 1e3, z=0.0, visibility=v) for x, y, v in pipe]
    put(folder, "mediapipe.json", [landmarks, landmarks])
    put(folder, "mediapipe.npy", np.stack([pipe[:, [0, 1, 2, 2]]] * 3) * [1e-3, 1e-3, 0, 1])
    skeleton = np.array(flat["coco18"]).reshape(18, 3)
    put(folder, "st_gcn.json", dict(label="jump", label_index=0, data=[dict(
        frame_index=t, skeleton=[dict(pose=(skeleton[:, :2] / 1e3).ravel().tolist(),
                                      score=skeleton[:, 2].tolist())]) for t in (1, 2)]))
    put(folder, "array_h36m17.npy", video)
    put(folder, "lifting_h36m17.npz", dict(reconstruction=video[None]))
    put(folder, "video.npz", dict(
        positions_2d=np.array({"a.mp4": {"custom": [np.stack([coco[:, :2]] * 3)]}}, object),
        metadata=np.array(dict(layout_name="coco", num_joints=17, keypoints_symmetry=[[1], [2]],
                               video_metadata={"a.mp4": dict(w=1000, h=1000)}), object)))

    def read(file):
        layout = next((k for k in keypoints.LAYOUTS if k in str(file.relative_to(WORK))), "auto")
        frames = file.parent.name.startswith("frames")
        k = keypoints.read(file.parent if frames else file, layout)
        assert np.isfinite(k.x_s).all() and np.isfinite(k.conf).all()
        print("\n".join(k.said))

    return read


def bvh_files(folder):
    angles = np.random.default_rng(0).normal(size=(6, 21, 3)) * 10
    put(folder, "cmu.bvh", test_mocap.bvh_text(angles))
    put(folder, "mixamo.bvh", test_mocap.bvh_text(angles, "XYZ", "mixamorig:", z_up=True))
    return mocap.read_bvh


def amass_files(folder):
    rotations = test_mocap.body_rotations(9)
    for style in ("smplh", "smplx"):
        put(folder, f"{style}.npz", test_mocap.amass(rotations, style))
    write_smpl_pkl(WORK / "model.pkl", test_mocap.BODY)
    model = smpl.read(WORK / "model.pkl")
    return lambda file: mocap.read_amass(file, model)


def smpl_files(folder):
    content = smpl_content(3, 3)
    put(folder, "model.npz", content)
    write_smpl_pkl(put(folder, "official.pkl", content), content)
    model = smpl.read(put(folder, "plain.pkl", content))
    put(folder, "J_regressor.npy", np.pad(model.J_regressor[smpl.TO_H36M], ((0, 0), (0, 0))))
    return lambda file: (smpl.read_regressor(file, model) if file.suffix == ".npy"
                         else smpl.read(file))


def human36m_files(folder):
    test_human36m.TABLE = {code: test_human36m.TABLE[code] for code in (4, 6)}
    (folder / "h36m").mkdir()
    test_human36m.write_source(folder / "h36m", smpl_content(20, 16), frames=2, every=1)
    human36m.draw_samples = human36m.draw_coarsening = lambda *_: None
    return lambda file: check_data(human36m.prepare(Path(), Path("out")))


def threedpw_files(folder):
    (folder / "3dpw").mkdir()
    for file in test_threedpw.write_folder(folder / "3dpw").rglob("*.pkl"):
        if file.read_bytes() == b"no pickle":
            file.unlink()
    return lambda file: check_data(threedpw.prepare(Path(), Path("out"), False))


def check_data(folder):
    """What was made of a mutated file must be a whole data set."""
    for split in json.loads((folder / "meta.json").read_text())["splits"]:
        try:
            dataset.load(folder, split)
        except ValueError as e:
            raise AssertionError(f"made a data set that cannot be read: {e}") from None


SIZES = [word for k, v in RUN_SIZES.items() for word in (f"--{k}", str(v))]


def command(main, *words):
    sys.argv = ["fuzz", "--name", "tiny", "--data", "data/tiny", "--device", "cpu", *words]
    main()


def run_files(folder):
    """A tiny run on a tiny data set, made once; read by evaluate.py."""
    made = WORK / "run"
    if not made.exists():
        write_tiny(made / "data/tiny")
        train.script = lambda *_: None  # no tables and figures
        os.chdir(made)
        for stage in "123":
            command(train.main, "--preset", "paper", "--stage", stage, *SIZES)
        for file in made.rglob("*.png"):
            file.unlink()
    shutil.copytree(made, folder / "run")
    return lambda file: command(evaluate.main)


def resumed_files(folder):
    """The same run, with which train.py goes on."""
    run_files(folder)

    def read(file):
        if file.name.startswith("generated"):
            file.with_name("stage3_generated_0.pt").unlink()  # what trains on that file
        stage = {"stage2.pt": "2", "stage1.pt": "1", "log.jsonl": "1"}.get(file.name, "3")
        command(train.main, "--preset", "paper", "--stage", stage, "--resume", *SIZES)

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
}


# --------------------------------------------------------------------------------------------------
# Mutations


def splice(rng, x, odd):
    """x, bytes or a list of parts, with a piece cut out, doubled, moved, replaced, or the rest
    cut off."""
    i = rng.randrange(len(x) + 1)
    j = i + rng.choice([0, 1, 1, 4, 40, 400])
    new = rng.choice([x[:0], x[i:j] * 2, x[i:j] * 300, x[j : 2 * j - i] + x[i:j], odd, odd, odd])
    return x[:i] + new + (x[j:] if rng.random() < 0.95 else x[:0])


TEXTS = ["", "x", "\x1b[31mred\nline\u2028\ud800", "x" * 100_000, "../../etc/passwd", "$^$", "..",
         "\u5b57" * 100, "-1", "nan", "\u0663"]  # fmt: skip
VALUES = [None, True, -1, 0, 3, 0.5, 1e300, np.nan, np.inf, 1 << 63, -(1 << 63), 10**400, [], {},
          [[]], [[1], [1, 2]], [None] * 17, *TEXTS]  # fmt: skip
# Values that only a text can write down; and opcodes that only a pickle has.
WRITTEN = {"@deep@": "[" * 100_000 + "]" * 100_000, "@digits@": "9" * 5000, "@large@": "1e999",
           "@many@": f"[{'[],' * 500_000}{{}}]"}


def call(module, name, text, how=b"c%s\n%s\n(V%s\ntR"):
    return how % (module.encode(), name.encode(), text.encode())


TOUCH, OPEN = f"touch {MARK}", f"open({str(MARK)!r}, 'w')"
STRINGS = b"c_codecs\nencode\nqcX" + (1 << 20).to_bytes(4, "little") + b"\xff".ljust(1 << 20, b"x")
OPCODES = [
    call("os", "system", TOUCH), call("posix", "system", TOUCH), call("builtins", "eval", OPEN),
    call("__builtin__", "exec", OPEN), call("subprocess", "getoutput", TOUCH),
    call("os", "system", TOUCH, b"\x8c\x02os\x8c\x06system\x93(%.0s%.0sV%s\ntR"),
    f"(V{TOUCH}\nios\nsystem\n".encode(), f"(cos\nsystem\nV{TOUCH}\no".encode(),
    b"cbuiltins\nlen\n", b"cnumpy\nload\n(Vx\ntR", b"cnumpy\nndarray\n(K\x02K\x03tR",
    b"cnumpy\ndtype\n(Vf4\ntR", b"cnumpy\ndtype\n(VV16\ntR", b"]qch\x63a", b"N", b"b",
    b"]" * 9999 + b"a" * 9998, b"(" * 50_000 + b"t" * 50_000, b"r\xff\xff\xff\x7f", b"Px\n",
    b"K\x01Q", b"\x82\x01",
    b"}(" + b"".join(b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N"
                     for k in range(20_000)) + b"u",  # keys that all have the same hash
    b"\x96" + (1 << 40).to_bytes(8, "little"), b"\x8e" + (1 << 40).to_bytes(8, "little"),
    b"I" + b"9" * 5000 + b"\n", b"\x8b\xff\xff\xff\x7f",
    b"(" + STRINGS.replace(b"\xff", b"y") + b"qd" + b"0hchdX\x06\0\0\0latin1\x86R" * 4000 + b"t",
]  # fmt: skip
ARRAYS = [np.zeros((2, 0)), np.zeros((1 << 40, 0, 17, 2)), np.full((3, 17, 2), np.nan),
          np.full((3, 32, 3), 1e30), np.array("x"), np.array([None, {}], object), np.int8(3),
          np.zeros(3, "M8[s]"), np.zeros(3, complex), b"x", (1, 2), np.ones((2, 3), np.float16),
          *(f"@{i}@" for i in range(len(OPCODES)))]  # fmt: skip
TENSORS = [torch.zeros(0), torch.tensor(np.nan), torch.zeros(3, dtype=torch.complex64),
           torch.zeros(1).expand(1 << 40), torch.zeros(1 << 40, device="meta"), (1, 2), b"x",
           torch.full((16, 8), np.nan), torch.ones(2, dtype=torch.int8),
           torch.eye(3).to_sparse()]  # fmt: skip
WORDS = ["}", "{", "JOINT x", "End Site { OFFSET 0 1 0 }", "-1", "1e999", "CHANNELS 99999", "nan",
         "CHANNELS 3 Xrotation Xrotation Xrotation", "Frames: 0", "Frames: 999999999999", "OFFSET",
         "Frame Time: 1e-9", "MOTION", "\u0663", *TEXTS]  # fmt: skip
BONES = ["End Site { OFFSET 0 1 0 } " * 60_000, "JOINT a { OFFSET 0 1 0 " * 4000 + "} " * 4000,
         "End Site { " * 60_000 + "} " * 60_000]  # fmt: skip
SHAPES = ["(-1, 17, 2)", "(18446744073709551616,)", "(1000000000000, 17, 3)", "(1.5,)", "()",
          "(0,)", "(1099511627776, 0, 17, 2)", "None", "[5, 17, 2]", "(True,)",
          "(" * 3000]  # fmt: skip
DTYPES = ["'|O'", "'>f8'", "'<f2'", "'|b1'", "'<U100000'", "'|V16'", "'<M8[s]'", "'<c16'",
          "'f,f'", "[('a', '<f4')]", "'<f99'", "'|S0'", "None", "','"]  # fmt: skip


def change_tree(rng, tree, odd):
    """Values replaced, dropped, renamed, repeated or nested in what dicts and lists hold."""
    top = [tree]
    for _ in range(rng.choice([1, 1, 2, 3])):
        at, key, depth = top, 0, rng.choice([1, 1, 2, 3, 4, 9])
        while isinstance(at[key], dict | list) and at[key] and depth:
            at, depth = at[key], depth - 1
            key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
        value, how = at[key], rng.choice("replace replace replace drop rename repeat nest".split())
        if how == "replace":
            at[key] = rng.choice(odd)
        elif how == "drop":
            del at[key]
        elif how == "rename" and isinstance(at, dict):
            at[rng.choice(TEXTS)] = at.pop(key)
        elif how == "repeat" and isinstance(value, list):
            at[key] = value * rng.choice([0, 2, 100, 3000])
        elif how == "repeat" and isinstance(at, dict):
            at |= {f"{key}{i}": value for i in range(1000)}
        else:
            at[key] = [value]
        top = top or [None]
    return top[0]


def change_json(rng, raw):
    text = json.dumps(change_tree(rng, json.loads(raw), [*VALUES, *WRITTEN]))
    for value, written in WRITTEN.items():
        text = text.replace(f'"{value}"', written)
    if rng.random() < 0.1:  # a key twice
        text = re.sub(r'("\w+"): ', r"\1: null, \1: ", text, count=1)
    return text.encode()


def change_lines(rng, raw):
    lines = raw.splitlines(keepends=True)
    i = rng.randrange(len(lines))
    lines[i] = change_json(rng, lines[i]) + b"\n"
    return b"".join(lines)


def change_words(rng, raw):
    text = raw.decode()
    if rng.random() < 0.05:
        return text.replace("End Site", rng.choice(BONES) + "End Site", 1).encode()
    parts = re.split(r"(\s+)", text)
    for _ in range(rng.choice([1, 1, 2, 4])):
        parts = splice(rng, parts, [rng.choice(WORDS)])
    return "".join(parts).encode("utf-8", "surrogatepass")


def change_pickle(rng, raw):
    """What a pickle holds, or its opcodes. raw: one of ours, with no more than data in it."""
    if rng.random() < 0.5 and b"chumpy" not in raw and b"torch" not in raw:
        tree = pickle.loads(raw, encoding="latin1")
        if isinstance(tree, np.ndarray):
            tree = np.array(change_tree(rng, tree.item(), [*VALUES, *ARRAYS]), object)
        else:
            tree = change_tree(rng, tree, [*VALUES, *ARRAYS])
        raw = pickle.dumps(tree, protocol=2)
        for i, opcodes in enumerate(OPCODES):
            text = f"@{i}@".encode()
            raw = raw.replace(b"X" + len(text).to_bytes(4, "little") + text, opcodes)
        return raw
    at = [position for _, _, position in pickletools.genops(raw)]
    parts = [raw[a:b] for a, b in zip(at, [*at[1:], len(raw)], strict=True)]
    for _ in range(rng.choice([1, 1, 2, 4])):
        parts = splice(rng, parts, [rng.choice(OPCODES)])
    return b"".join(parts)


def change_array(rng, raw):
    """The header of a .npy file, or what follows it."""
    end = 10 + int.from_bytes(raw[8:10], "little")
    header, body = raw[10:end].decode("latin1"), raw[end:]
    if "|O" in header and rng.random() < 0.7:
        return raw[:end] + change_pickle(rng, body)
    what, odd = rng.choice([(r"\([^)]*\)", SHAPES), (r"(?<='descr': )'[^']*'", DTYPES),
                            ("False", ["True", "7"]), ("{", ["", "{" * 300, "{'a': 1, "])])
    header = re.sub(what, lambda _: rng.choice(odd), header, count=1).encode()
    version = rng.choice([b"\1\0"] * 5 + [b"\2\0", b"\3\0", b"\xff\0"])
    return raw[:6] + version + (len(header) % 65536).to_bytes(2, "little") + header + body


def change_archive(rng, raw):
    """The members of an archive."""
    with zipfile.ZipFile(io.BytesIO(raw)) as z:
        members = [(m, z.read(m)) for m in z.namelist()]
    i, how = rng.randrange(len(members)), rng.random()
    name, content = members[i]
    if how < 0.7:
        members[i] = name, change(rng, Path(name).suffix, content)
    elif how < 0.99:
        odd = rng.choice([*TEXTS, "../evil"]).replace("\ud800", "")[:60_000] + Path(name).suffix
        members = splice(rng, members, [(odd, content)])
    else:
        members[i] = name, content + bytes(400 << 20)
    packed = zipfile.ZIP_DEFLATED
    if how < 0.99:
        packed = rng.choice([packed, zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(new := io.BytesIO(), "w", packed) as z:
        for name, content in members:
            z.writestr(name, content)
    raw, at = new.getvalue(), new.getvalue().rfind(b"PK\1\2")
    if rng.random() < 0.1:  # another size than the member has
        raw = raw[: at + 24] + rng.randbytes(3) + b"\0" + raw[at + 28 :]
    return raw


def change_tensors(rng, raw):
    if rng.random() < 0.4:
        return change_archive(rng, raw)
    tree = torch.load(io.BytesIO(raw), weights_only=True)
    torch.save(change_tree(rng, tree, [*VALUES, *TENSORS]), new := io.BytesIO())
    return new.getvalue()


STRUCTURE = {".json": change_json, ".jsonl": change_lines, ".bvh": change_words,
             ".txt": change_words, ".pkl": change_pickle, ".npy": change_array,
             ".npz": change_archive, ".pt": change_tensors}  # fmt: skip


def change(rng, suffix, raw):
    """A file's bytes, changed in what they mean, in themselves, or both."""
    how = rng.random()
    if suffix in STRUCTURE and how < 0.75:
        raw = STRUCTURE[suffix](rng, raw)
    for _ in range(rng.choice([1, 1, 2, 9]) if how > 0.65 else 0):
        odd = [b"NaN", b"1e999", b"null", b"{}", b"[", b'"', b"\xff\xfe", b"\0", bytes(64)]
        raw = splice(rng, raw, rng.choice([*odd, *[rng.randbytes(1)] * 9]))
    return raw


def place(rng, file, others):
    """Put a mutated file in the place of a good one, perhaps under another name -> its path."""
    raw, how = file.read_bytes(), rng.random()
    file.unlink()
    if how < 0.03 and not any(file.parent.iterdir()):  # alone, so it may have any name
        name = rng.choice(["\x1b[31mred", "a\nb", "\udcff", "\u5b57" * 70, "..", "$^$", "a b"])
        file = file.with_name(name + file.suffix)
    if how < 0.97:
        file.write_bytes(change(rng, file.suffix, raw))
    elif how < 0.98:
        shutil.copy(rng.choice(others), file)
    else:
        rng.choice([
            lambda: file.symlink_to("/dev/zero"), lambda: os.mkfifo(file), file.mkdir, file.touch,
            lambda: file.symlink_to(SECRET), lambda: file.symlink_to("nowhere"),
        ])()  # fmt: skip
    return file


# --------------------------------------------------------------------------------------------------
# The process that reads

RUNS = {"os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pty.spawn",
        "socket.connect", "ctypes.dlopen"}  # fmt: skip
WRITES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate",
          "os.chmod", "os.chown", "shutil.rmtree", "shutil.move", "open"}  # fmt: skip
watched = {"folder": None, "did": []}  # the case that is read, and what is done that may not be


def watch(event, args):
    """An audit hook: notes whatever runs other code or writes outside of the case."""
    if watched["folder"] is None or event not in RUNS | WRITES:
        return
    if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
        return
    paths = [os.path.abspath(os.fsdecode(a)) for a in args if isinstance(a, str | bytes | Path)]
    inside = all(f"{path}/".startswith(f"{watched['folder']}/") for path in paths if path != "r")
    if event in RUNS or not inside:
        watched["did"].append(f"{event} {args}"[:200])


def memory(key):
    return 1024 * int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def serve(read, errors, folder, pipe, log):
    """Read one file after another of the pipe, and send back what came of it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    faulthandler.enable(log)
    sys.addaudithook(watch)
    while True:
        pipe.send(attempt(read, errors, folder, pipe.recv(), log))


def attempt(read, errors, folder, file, log):
    """Read a file -> what came of it: kind, cause, message, traceback, seconds, bytes."""
    os.chdir(folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began, said, trace = memory("VmRSS"), time.perf_counter(), "", ""
    out, err = io.StringIO(), io.StringIO()
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=log)
    watched.update(folder=folder, did=[])
    try:
        with (redirect_stdout(out), redirect_stderr(err),
              warnings.catch_warnings(record=True) as warned):
            warnings.simplefilter("always")
            read(file)
        kind, cause = "read", ""
    except BaseException as e:
        kind, trace = "refused", "".join(traceback.format_exception(e))
        stack = [f for f in traceback.extract_tb(e.__traceback__)
                 if f.filename.startswith(str(ROOT)) and "fuzz.py" not in f.filename]
        cause = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in stack[:-4:-1])
        said = err.getvalue().strip() if isinstance(e, SystemExit) else str(e)
        if not (isinstance(e, errors) or isinstance(e, SystemExit) and e.code == 2):
            kind, cause = "fault", f"{type(e).__name__} at {cause}"
    finally:
        watched["folder"] = None
        faulthandler.cancel_dump_traceback_later()
    seconds, grown = time.perf_counter() - began, memory("VmHWM") - before
    if kind == "refused" and (wrong := wrong_sentence(said)):
        kind, cause = "fault", f"{wrong}: {cause}"
    if "SECRET" in said + out.getvalue():
        kind, cause = "fault", f"shows the content of another file: {cause}"
    if any(not line.isprintable() for line in out.getvalue().split("\n")):
        kind, cause = "fault", f"prints control characters: {cause}"
    if watched["did"]:
        kind, cause = "fault", f"did {watched['did'][0]}: {cause}"
    unnamed = errors and file.stem.isprintable() and file.stem not in said
    notes = [f"warns: {w.message} ({Path(w.filename).name}:{w.lineno})" for w in warned]
    if kind == "refused":
        notes += [f"{why}: {cause}" for why, so in (
            ("is slow to refuse", seconds > SLOW), ("takes much memory to refuse", grown > LARGE),
            ("does not name the file", unnamed),
            ("sounds like Python", re.search(r"\w+Error\b|\[Errno|argument", said)),
        ) if so]  # fmt: skip
    return kind, cause, said, trace, seconds, grown, notes


def wrong_sentence(said):
    """What is wrong with a refusal."""
    if not said or "\n" in said:
        return "not one line"
    if not said.isprintable():
        return "control characters"
    if len(said) > LONGEST:
        return f"more than {LONGEST} characters"
    return "a memory error" if re.search("MemoryError|[Aa]llocat", said) else None


# --------------------------------------------------------------------------------------------------


class Reader:
    """A reader, its good files, and a process in which it reads."""

    def __init__(self, name, seed):
        self.name, self.seed = name, seed
        make, pattern, self.errors = READERS[name]
        self.folder, self.case = WORK / name, WORK / "case" / name
        self.folder.mkdir()
        with redirect_stdout(io.StringIO()):
            self.read = make(self.folder)
        self.cases = [[f for f in sorted(case.rglob(pattern)) if f.is_file()]
                      for case in sorted(self.folder.iterdir())]
        self.process = None

    def mutate(self, number):
        """File `number` in a copy of its case, which is made anew -> its path, and the good file.

        Negative numbers are the good files themselves.
        """
        rng = random.Random(f"{self.seed} {self.name} {number}")
        files = rng.choice(self.cases)
        suffix = rng.choice(sorted({f.suffix for f in files}))
        good = rng.choice([f for f in files if f.suffix == suffix])
        if number < 0:
            good = self.cases[-number - 1][0]
        case = good.relative_to(self.folder).parts[0]
        shutil.rmtree(self.case, ignore_errors=True)
        shutil.copytree(self.folder / case, self.case)
        file = self.case / good.relative_to(self.folder / case)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            others = [f for of in self.cases for f in of]
            return (place(rng, file, others) if number >= 0 else file), good

    def attempt(self, file):
        """What came of a file, even if it was the end of the process."""
        if self.process is None:
            self.log, context = open(WORK / "log", "w+"), multiprocessing.get_context("fork")
            self.pipe, theirs = context.Pipe()
            job = (self.read, self.errors, self.case, theirs, self.log)
            self.process = context.Process(target=serve, args=job, daemon=True)
            self.process.start()
            theirs.close()
        began = time.perf_counter()
        try:
            self.pipe.send(file)
            if not self.pipe.poll(SECONDS + 10):
                self.process.kill()
            result = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            trace = Path(self.log.name).read_text()
            where = re.findall(rf'File "{ROOT}/(?!benchmarks)(.*?)", line (\d+) in (\w+)', trace)
            why = (f"took more than {SECONDS} s" if "Timeout" in trace
                   else f"the process died ({self.process.exitcode})")
            cause = " < ".join(f"{name}:{line} {f}" for name, line, f in where[:3])
            seconds, self.process = time.perf_counter() - began, None
            result = "fault", f"{why}: {cause}", "", trace, seconds, 0, []
        if MARK.exists():
            MARK.unlink()
            result = ("fault", "EXECUTED what a file says", *result[2:])
        return result


def shown(text, most=300):
    return ascii(text)[1:-1][:most]


def run(name, seed, files, keep):
    """Feed one reader -> a row of the table, and its faults."""
    reader, counts, most = Reader(name, seed), defaultdict(int), [0, 0]
    clusters = {"fault": defaultdict(list), "note": defaultdict(list)}
    for number in [*range(-len(reader.cases), 0), *range(files)]:
        file, good = reader.mutate(number)
        kind, cause, said, trace, seconds, grown, notes = reader.attempt(file)
        if number < 0:
            if kind != "read":
                print(f"{name}: the good file {good.name} is {kind}: {shown(said or trace[-300:])}")
            continue
        counts[kind] += 1
        most = [max(most[0], seconds), max(most[1], grown)]
        for note in notes:
            clusters["note"][note].append((number, good.name, said))
        if kind == "fault":
            of = clusters["fault"][cause]
            of.append((number, good.name, said or trace.strip().split("\n")[-1]))
            if len(of) <= 3 and file.is_file() and not file.is_symlink():
                keep.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, keep / f"{name}_{seed}_{number}_{good.name}")
    if reader.process:
        reader.process.kill()
    shutil.rmtree(reader.case, ignore_errors=True)
    for kind, found in clusters.items():
        for cause, of in sorted(found.items(), key=lambda item: -len(item[1])):
            number, example, said = of[0]
            print(f"{kind}, {name}, {len(of)} files, first --only {number} ({example}): "
                  f"{shown(cause)}\n    {shown(said)}")
    return (f"| {name} | {files} | {counts['read']} | {counts['refused']} | {counts['fault']} | "
            f"{most[0]:.1f} s | {most[1] >> 20} MB |"), counts["fault"]


def main():
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    p.add_argument("--reader", choices=READERS, nargs="+", default=list(READERS))
    p.add_argument("--files", type=int, default=2000, help="mutated files for each reader")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--only", type=int, help="the number of one file, which is kept")
    p.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir(), "fuzz"),
                   help="where files that show a fault are kept")
    args = p.parse_args()
    torch.set_num_threads(1)
    SECRET.write_text("SECRET of another file\n")
    try:
        if args.only is not None:
            reader = Reader(args.reader[0], args.seed)
            file, good = reader.mutate(args.only)
            kind, cause, said, trace, seconds, grown, notes = reader.attempt(file)
            print(f"{trace}\n{good.name}: {kind} after {seconds:.1f} s and {grown >> 20} MB. "
                  f"{shown(cause)}\n{shown(said, 2000)}", *notes, sep="\n")
            return
        rows, faults = [], 0
        for name in args.reader:
            row, n = run(name, args.seed, args.files, args.keep)
            rows, faults = [*rows, row], faults + n
            print(row, flush=True)
    finally:
        os.chdir(ROOT)
        shutil.rmtree(WORK, ignore_errors=True)
    print("\n| reader | files | read | refused | faults | slowest | most memory |\n"
          "| --- | --- | --- | --- | --- | --- | --- |", *rows, sep="\n")
    if faults:
        print(f"{faults} faults; files that show them are in {args.keep}")
        sys.exit(1)


if __name__ == "__main__":
    main()
