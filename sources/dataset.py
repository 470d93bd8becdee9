"""How a data set lies on disk, and how it is read.

A data set is a folder with meta.json and, for every split, a folder of plain .npy files, one for
each of ARRAYS. Whoever makes one writes into `new_data_set`; the models read it with `Split`, in
blocks of tensors. docs/data.md describes every array.
"""

import copy
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import networkx as nx
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot, which may want a display
from torch import Tensor

from distributed import from_first_, part, world_size
from hipart import (
    JOINT_NAMES,
    LEFT,
    PARENTS,
    PART_JOINT,
    RIGHT,
    detected_pelvis,
    normalize_screen,
    to_model_frame,
)
from sources.detector import NOISE, detect, drop_joints
from sources.files import open_regular, read_json, safe_name, shown
from sources.safe_pickle import read_header
from sources.windows import begins, run_ends, windows

# 2: has_mesh and with_mesh, which version 1 called fit and fits. 3: in the default data, validation
# and test motion come from stretches of their own.
FORMAT_VERSION = 3
SOURCES = ("demo", "bvh", "amass", "h36m", "3dpw")  # choices of prepare_data.py --source
SPLITS = ("train", "val", "test", "unseen")  # of the default data set
META_BYTES = 64 << 20  # of meta.json
FAR = 10_000_000  # px or mm: no array holds as much
BLOCK = 8192  # samples that are read, detected and moved to the device at once

# name: (shape after N, dtype). If the detector is simulated, x_s_det and conf are stored for every
# split but train, for which they are drawn afresh in every epoch. has_mesh is stored if not every
# sample has dense and fine points; where it is False, x_d and x_f are 0. sequence and frame are
# stored if meta.json has a frame_rate.
ARRAYS = {
    "x_s": ((17, 2), "float32"), "x_d": ((48, 2), "float32"), "x_f": ((96, 2), "float32"),
    "y": ((17, 3), "float32"), "root": ((3,), "float32"), "height_px": ((), "float32"),
    "action": ((), "int64"), "subject": ((), "int64"), "camera": ((), "int64"),
    "x_s_det": ((17, 2), "float32"), "conf": ((17,), "float32"), "has_mesh": ((), "bool"),
    "sequence": ((), "int64"), "frame": ((), "int64"),
}  # fmt: skip
# True points of the level below the fine one, for Table 5 alone: open bodies in single frames have
# them.
THIRD_LEVEL = {"x_192": ((192, 2), "float32")}
EVERY_ARRAY = ARRAYS | THIRD_LEVEL


# --------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def new_data_set(folder, overwrite=False):
    """A temporary folder beside `folder`, which takes its place at the end.

    If anything fails, nothing is left of it, and an older data set stays. Raises ValueError if
    `folder` exists and `overwrite` is False.
    """
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise ValueError(f"{shown(folder, 4096)} exists already: choose another --name or add "
                         "--overwrite.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.????????"):
        print(f"{shown(left, 4096)} belongs to another preparation: delete it, unless that still "
              "runs")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():  # the second rename failed
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)


def create_split(folder, n):
    """Create the files of a split of n samples; `append_samples` fills them piece by piece.

    So a split of any size takes the same memory.
    """
    folder.mkdir()
    for name, (shape, dtype) in ARRAYS.items():
        with open(folder / f"{name}.npy", "wb") as f:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (n, *shape)}
            np.lib.format.write_array_header_1_0(f, header)


def append_samples(folder, arrays):
    """Append samples to a split. arrays: as in ARRAYS, or one value for all; what lacks is 0."""
    n = len(arrays["y"])
    for name, (shape, dtype) in ARRAYS.items():
        with open(folder / f"{name}.npy", "ab") as f:
            f.write(np.broadcast_to(arrays.get(name, 0), (n, *shape)).astype(dtype).tobytes())


def base_meta(folder, source):
    """What the meta.json of every data set holds. source: a choice of prepare_data.py --source."""
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    return {
        "source": source,
        "format_version": FORMAT_VERSION,
        "name": Path(folder).name,
        "joint_names": list(JOINT_NAMES),
        "parents": list(PARENTS),
        "part_joint": list(PART_JOINT),
        "versions": versions | {"networkx": nx.__version__},
    }


# --------------------------------------------------------------------------------------------------
# A user's folder


def check_folder(folder, recognise, wanted):
    """Look through a user's folder before any work -> {kind: its files, sorted}.

    recognise(path) -> a key of `wanted`, or None. wanted: kind -> (what it is and where it comes
    from, whether it is needed). What each file was recognised as is printed. Raises ValueError if
    something that is needed is not there.
    """
    folder, found, other = Path(folder), {kind: [] for kind in wanted}, []
    name = shown(folder, 4096)
    if not folder.is_dir():
        raise ValueError(f"{name} is not there: --folder must name the folder with your files.")
    for path in sorted(_files(folder)):
        found.get(recognise(path), other).append(path)

    def some(paths):
        more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
        return ", ".join(shown(p.relative_to(folder), 4096) for p in paths[:4]) + more

    missing = []
    print(f"{name}:")
    for kind, (what, needed) in wanted.items():
        if found[kind]:
            print(f"  {kind}: {some(found[kind])}")
        else:
            print(f"  {kind}: {'MISSING' if needed else 'none (not needed)'}; {what}")
            missing += [f"{kind} ({what})"] * needed
    if other:
        print(f"  not used: {some(other)}")
    if missing:
        raise ValueError(f"{name} lacks {'; '.join(missing)}.")
    return found


def _files(folder):
    """All files under a folder. Links are followed, since people link to where their data lie."""
    visited = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(root) in visited:
            folders.clear()  # a link that leads back: go no deeper
            continue
        visited.add(os.path.realpath(root))
        yield from (Path(root, name) for name in names if Path(root, name).is_file())


# --------------------------------------------------------------------------------------------------
# Reading


def load(folder, split):
    """Read one split of the data set `folder` (data/NAME) -> (arrays, meta).

    arrays: dict of memory-mapped, read-only arrays as in ARRAYS; meta: what meta.json holds. All
    is checked, a piece at a time, so that a split of any size takes the same memory. Raises
    FileNotFoundError or ValueError with one sentence, which names the command that mends it.
    """
    stored, meta = open_split(folder, split)
    return {name: s.array for name, s in stored.items()}, meta


@dataclass
class Stored:
    """A memory-mapped array of a split, and its open file."""

    array: np.memmap
    f: BinaryIO

    def check(self):
        """Refuse a file that has been cut short. The system ends whoever reads a mapped file beyond
        its end, without a word, so this is asked before every block."""
        if os.fstat(self.f.fileno()).st_size < self.array.offset + self.array.nbytes:
            raise ValueError(f"{shown(self.f.name, 4096)} cannot be read, it is truncated")


def open_split(folder, split, third_level=False):
    """What `load` returns, with a `Stored` for every array, and for that of THIRD_LEVEL if asked
    to."""
    folder = Path(folder)
    where, name, root = (shown(p, 4096) for p in (folder, folder.name, folder.parent))
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"No data set in {where}: make it with "
                                f"`python prepare_data.py --name {name} --out {root}`.")
    again = f"make it again with `python prepare_data.py --name {name} --out {root} --overwrite`"
    try:
        meta = read_json(folder / "meta.json", META_BYTES)
        if isinstance(meta, dict) and meta.get("source") in SOURCES[1:]:
            again = again.replace("--name", f"--source {meta['source']} --folder DIR --name")
        _check_meta(where, meta)
        if split in meta["splits"]:
            names = [*_stored(meta, split), *THIRD_LEVEL] if third_level else _stored(meta, split)
            return {k: _open(folder / split, meta, k) for k in names}, meta
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: {again}.") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{error}: {again}.") from None
    raise ValueError(f"{where} has no split {split!r}, only {', '.join(meta['splits'])}.")


def _check_meta(where, meta):
    """Refuse a meta.json that readers cannot go by, and bring the names in it to one line each,
    since they get into tables and pictures."""
    version = meta.get("format_version") if isinstance(meta, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(f"{where} has format version {shown(version)}, expected {FORMAT_VERSION}")

    def need(good, key, what):
        if not good:
            raise ValueError(f"{where}: expected `{key}` of meta.json to be {what}")

    size, joints, noise = meta.get("image_size"), meta.get("joints_14", []), meta.get("noise", 0)
    splits, sources = meta.get("splits"), meta.get("sources")
    time, rate = meta.get("noise_time", 0), meta.get("frame_rate", 1)
    need(meta.get("source") in SOURCES, "source", f"one of {', '.join(SOURCES)}")
    need(_is_list(meta.get("actions"), str), "actions", "a list of names")
    need(_is_list(size, int) and len(size) == 2 and all(0 < n < 1_000_000 for n in size),
         "image_size", "width and height in pixels")
    need(noise is None or _is_like(noise, NOISE)
         and noise["box_half_size"] == sorted(noise["box_half_size"]),
         "noise", "null or parameters like those of sources/detector.py")
    need(type(rate) in (int, float) and 0 < rate <= 1e6, "frame_rate", "frames per second")
    need(type(time) in (int, float) and 0 <= time <= 1e6, "noise_time", "a number of frames")
    need(_is_list(joints, int) and all(0 <= j < 17 for j in joints),
         "joints_14", "a list of numbers of joints")
    need(isinstance(splits, dict) and len(splits) <= 20, "splits", "an object of at most 20 splits")
    for name, of in splits.items():
        need(name == safe_name(name) and isinstance(of, dict), "splits", "named objects")
        need(type(of.get("n")) is int and 0 < of["n"] < 1 << 40, f"splits.{name}.n",
             "a number of samples")
        need(type(of.get("with_mesh", 0)) is int and isinstance(of.get("about", ""), str),
             f"splits.{name}", "samples with_mesh and a text about them")
        if "about" in of:
            of["about"] = shown(of["about"], 1000)
    need("train" not in splits or "val" in splits, "splits", "both train and val, or neither")
    if meta["source"] == "h36m":
        need(isinstance(sources, dict) and isinstance(sources.get("2D joints"), str),
             "sources", "an object that names the 2D joints")
        need({"with_mesh", "about"} <= set(splits.get("train", ())), "splits.train",
             "there, with with_mesh and about")
        sources["2D joints"] = shown(sources["2D joints"])
    meta["actions"] = list(map(shown, meta["actions"]))


def _is_list(x, kind):
    return isinstance(x, list) and all(type(v) is kind for v in x)


def _is_like(x, model):
    """Whether x has the keys and as many numbers as `model`, none of them negative or huge."""
    if isinstance(model, dict):
        return (isinstance(x, dict) and x.keys() == model.keys()
                and all(_is_like(x[key], v) for key, v in model.items()))
    if isinstance(model, list):
        return isinstance(x, list) and len(x) == len(model) and all(map(_is_like, x, model))
    return type(x) in (int, float) and 0 <= x <= 1000


def _stored(meta, split):
    """The names of the arrays of a split."""
    drawn = {"x_s_det", "conf"} if split == "train" and meta["noise"] else set()
    always = set() if "with_mesh" in meta["splits"][split] else {"has_mesh"}
    single = set() if "frame_rate" in meta else {"sequence", "frame"}
    return [name for name in ARRAYS if name not in drawn | always | single]


def _open(folder, meta, name):
    """One checked array of a split."""
    shape, dtype = EVERY_ARRAY[name]
    path = folder / f"{name}.npy"
    stored = open_array(path, (meta["splits"][folder.name]["n"], *shape), dtype)
    if name == "action":
        least, most = stored.array.min(), stored.array.max()
        if not -1 <= least <= most < len(meta["actions"]):
            raise ValueError(f"{shown(path, 4096)} holds actions that meta.json does not name")
    return stored


def open_array(path, expected, dtype):
    """A .npy file of numbers below FAR in the expected shape, memory-mapped -> `Stored`. Raises
    FileNotFoundError or ValueError, with one sentence, on anything else."""
    where = shown(path, 4096)
    if not path.is_file():
        raise FileNotFoundError(f"{where} is missing")
    f = open_regular(path, 1 << 60)
    try:
        found, fortran, kind = read_header(f)
    except Exception:  # a broken file can raise nearly anything
        raise ValueError(f"{where} cannot be read, it is truncated or no plain array") from None
    if found != expected or kind != dtype:
        raise ValueError(f"{where} holds {kind} {shown(str(found))}, expected {dtype} {expected}")
    try:
        array = np.memmap(f, kind, "r", f.tell(), expected, "F" if fortran else "C")
    except ValueError:
        raise ValueError(f"{where} cannot be read, it is truncated") from None
    stored = Stored(array, f)
    for i in range(0, len(array), 65536):
        stored.check()
        if not (np.abs(array[i : i + 65536]) < FAR).all():  # NaN is not, either
            raise ValueError(f"{where} holds values that are NaN, infinite or above {FAR}")
    return stored


class Split:
    """One split of a data set, read in blocks of tensors. Poses come in normalised image
    coordinates (`hipart.normalize_screen`).

    limit: only so many samples, evenly spread (0: all). has_mesh: only samples that have dense and
    fine points. third_level: blocks hold x_192 [n, 192, 2], too. Raises what `load` raises.
    """

    def __init__(self, folder: Path | str, name: str, device: torch.device, limit: int = 0,
                 has_mesh: bool = False, third_level: bool = False):
        self.stored, self.meta = open_split(folder, name, third_level)
        self.arrays = {k: stored.array for k, stored in self.stored.items()}
        self.w, self.h = self.meta["image_size"]
        self.device, self.n = device, len(self.arrays["x_s"])
        self.rows = np.arange(self.n)  # of the arrays; a part of them in what `_chosen` makes
        self.frames, self.every = 1, False  # of windows: see `in_windows`
        chosen = self.with_mesh() if has_mesh else self
        chosen = chosen.spread(limit) if limit else chosen
        self.rows, self.n = chosen.rows, chosen.n

    def _chosen(self, rows: np.ndarray) -> "Split":
        other = copy.copy(self)
        other.rows, other.n = rows, len(rows)
        return other

    def with_mesh(self) -> "Split":
        """Only the samples that have dense and fine points."""
        has_mesh = self.arrays.get("has_mesh")
        return self if has_mesh is None else self._chosen(self.rows[has_mesh[self.rows]])

    def my_part(self) -> "Split":
        """The samples for this process, if there are several."""
        return self._chosen(self.rows[part(self.n)])

    def in_windows(self, frames: int, every: bool, limit: int = 0) -> "Split":
        """The same samples, but `batches` are of windows of so many frames, for a lifter that gives
        every pose of a window, or its centre alone. limit: about so many samples, in whole
        sequences that are evenly spread (0: all). ValueError if there are no sequences."""
        run = np.cumsum(self.begins()) - 1
        share = limit / self.n if 0 < limit < self.n else 1
        other = self._chosen(self.rows[run * share % 1 < share])
        other.frames, other.every = frames, every
        return other

    def begins(self) -> np.ndarray:
        """Which samples do not show the moment after the one before them, [n]. ValueError if there
        are no sequences."""
        if "sequence" not in self.arrays:
            raise ValueError(f"{shown(self.meta.get('name'))} has single frames, and no sequences: "
                             "make some with `python prepare_data.py --sequences`, and add "
                             "--data data/sequences")
        return begins(*(self.arrays[name][self.rows] for name in ("sequence", "frame")))

    def spread(self, n: int) -> "Split":
        """At most n samples, evenly spread."""
        n = min(n, self.n)
        return self._chosen(self.rows[np.arange(n) * self.n // max(n, 1)])

    def read(self, rows, rng: np.random.Generator | None = None, clean: bool = False
             ) -> dict[str, Tensor]:
        """Samples `rows` as tensors: x_s [n, 17, 2], conf [n, 17], x_d [n, 48, 2], x_f [n, 96, 2],
        y [n, 17, 3] mm, action [n], height_px [n], has_mesh [n], begins [n]: whether a sample does
        not show the moment after the one before it.

        x_s is what the detector gives: the stored detections; or, if `rng` is given, fresh ones of
        the simulated detector, or the stored ones with fresh joint dropout; or, if `clean`, the
        projected joints. Where has_mesh is False, x_d and x_f mean nothing.
        """
        for stored in self.stored.values():
            stored.check()
        a = {k: np.array(v[self.rows[rows]]) for k, v in self.arrays.items()}
        a.setdefault("has_mesh", np.ones(len(a["y"]), bool))
        a["begins"] = (begins(a["sequence"], a["frame"]) if "sequence" in a
                       else np.ones(len(a["y"]), bool))
        if clean:
            a["conf"] = np.ones(a["x_s"].shape[:2], np.float32)
        elif rng is not None and self.meta["noise"]:
            a["x_s"], a["conf"] = detect(a["x_s"], a["height_px"], rng, self.meta["noise"],
                                         a["begins"], self.meta.get("noise_time", 0))
        else:
            a["x_s"] = a["x_s_det"]
            if rng is not None:
                a["x_s"], a["conf"] = drop_joints(a["x_s"], a["conf"], a["height_px"], rng)
        names = ("x_s", "conf", "x_d", "x_f", "y", "action", "height_px", "has_mesh", "begins")
        third = a.keys() & THIRD_LEVEL
        t = {k: torch.from_numpy(a[k]).to(self.device) for k in (*names, *third)}
        for k in ("x_s", "x_d", "x_f", *third):
            t[k] = normalize_screen(t[k], self.w, self.h)
        t["x_s"] = t["x_s"] * (t["conf"] > 0)[..., None]  # a missing joint is at 0 here, too
        return t

    def blocks(self, rng: np.random.Generator | None = None, clean: bool = False,
               size: int = BLOCK):
        """All samples in order, `size` at a time."""
        for start in range(0, self.n, size):
            yield self.read(slice(start, min(start + size, self.n)), rng, clean)

    def batches(self, size: int, rng: np.random.Generator | None, clean: bool = False,
                prepare=lambda block: block, vary=lambda block: block, passes: int = 1,
                done: int = 0, random: dict[str, Tensor] | None = None):
        """One epoch of shuffled full batches, or a single smaller one if there are not enough
        samples for a full one. If there are several processes, each gets its part of every batch.

        The order comes from torch's random state. `prepare(block)` sees each block once. Then come
        so many `passes` over what it has made, each in another order, and each over what
        `vary(block)` makes of it.

        An epoch that was interrupted after `done` batches goes on with the same ones if `random`,
        which takes down torch's random state where the epoch and its last pass over a block began,
        is what it was then. `prepare` must draw no random numbers.
        """
        random, now = {} if random is None else random, torch.get_rng_state()
        torch.set_rng_state(random.setdefault("epoch", now))
        whole = self.frames > 1  # windows reach across blocks
        order = torch.arange(self.n) if whole else torch.randperm(self.n)
        block_size = self.n if whole else BLOCK
        from_first_(order)
        if done:
            torch.set_rng_state(now)
        for start in range(0, self.n, block_size):
            rows = order[start : start + block_size].numpy()
            if start and len(rows) < size:
                return
            batches = self.steps(size) if whole else max(1, len(rows) // size)
            if not whole:
                equal = len(rows) - len(rows) % world_size()
                rows = np.sort(rows[:equal][part(equal)])  # in order, which disks like better
            block = self.read(rows, rng, clean)  # of a block that is done, too: `rng` goes on
            if done >= passes * batches:
                done -= passes * batches
                continue
            block, ends = prepare(block), run_ends(self.begins()) if whole else None
            skipped, done = divmod(done, batches)
            for _ in range(skipped, passes):
                if done:
                    torch.set_rng_state(random["block"])
                random["block"] = torch.get_rng_state()  # where this pass over it began
                varied, shuffled = vary(block), torch.randperm(len(rows))
                from_first_(shuffled)
                if done:
                    torch.set_rng_state(now)
                for i in range(done, batches):
                    yield self._batch(varied, shuffled, i, size, ends)
                done = 0

    def _batch(self, block: dict[str, Tensor], order: Tensor, i: int, size: int, ends
               ) -> dict[str, Tensor]:
        """Batch i of a block, or this process's part of it.

        In windows: x [size, T, ...] and so on around random frames, and `own`, which is False for
        frames that are repeated. Of y and own, only the centre is there if a lifter gives no other.
        """
        if self.frames == 1:
            mine = size // world_size()
            rows = order[i * mine : (i + 1) * mine].to(self.device)
            return {name: value[rows] for name, value in block.items()}
        centres = order[: self.windows_in_an_epoch()][i * size : (i + 1) * size]
        mine = centres[part(len(centres))].numpy()
        rows, own = (torch.from_numpy(a).to(self.device) for a in windows(ends, mine, self.frames))
        batch = {name: value[rows] for name, value in block.items()} | dict(own=own)
        for name in () if self.every else ("y", "own"):
            batch[name] = batch[name][:, self.frames // 2]
        return batch

    def windows_in_an_epoch(self) -> int:
        """In a pass: as many as cover all frames side by side, or one around every frame for a
        lifter that gives the centre alone. Then each pose is learned from about once."""
        return max(1, self.n // self.frames) if self.every else self.n

    def steps(self, size: int) -> int:
        """How many batches of `size` a pass over all samples has."""
        if self.frames > 1:
            return max(1, self.windows_in_an_epoch() // size)
        return max(1, sum(min(BLOCK, self.n - start) // size for start in range(0, self.n, BLOCK)))

    def pixels(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean distance of normalised points [..., 2], in pixels of the image."""
        return (a - b).norm(dim=-1).mean() * (self.w / 2)


def in_model_frame(block: dict[str, Tensor]) -> dict[str, Tensor]:
    """A block with x_s, x_d and x_f brought to the model frame; the rest stays as it is."""
    pelvis = detected_pelvis(block["x_s"], block["conf"])
    return block | {k: to_model_frame(block[k], pelvis) for k in ("x_s", "x_d", "x_f")}


# --------------------------------------------------------------------------------------------------
# A picture

BONE_COLOURS = {"left": "#0072B2", "right": "#D55E00", "middle": "#444444"}  # Okabe-Ito


def draw_samples(path, arrays, meta):
    """Twelve random samples as a picture: the clean skeleton (left blue, right orange), the fine
    points by part, and the detections. arrays: of the test split; meta: with seed and actions."""
    colours = colormaps["tab20"](np.arange(16))  # of the parts
    rng = np.random.default_rng(meta["seed"])
    pick = rng.permutation(len(arrays["x_s"]))[:12]
    fig = Figure(figsize=(20, 7.6))
    axes = fig.subplots(2, 6)
    for ax, i in zip(axes.flat, pick, strict=False):
        x_s, x_f, x_det = (arrays[k][i] for k in ("x_s", "x_f", "x_s_det"))
        visible = arrays["conf"][i] > 0
        ax.scatter(*x_f.T, s=16, color=colours[np.arange(96) // 6])
        for joint, parent in enumerate(PARENTS[1:], 1):
            side = "left" if joint in LEFT else "right" if joint in RIGHT else "middle"
            ax.plot(*x_s[[joint, parent]].T, color=BONE_COLOURS[side], lw=2)
        for joint in np.flatnonzero(visible):
            ax.plot(*np.stack([x_s[joint], x_det[joint]]).T, color="k", lw=0.7)
        ax.scatter(*x_det[visible].T, marker="x", s=22, c="k")
        ax.scatter(*x_s[~visible].T, marker="o", s=60, facecolor="none", edgecolor="#CC0000")
        (x, y), half = (x_s.max(0) + x_s.min(0)) / 2, 0.6 * max(np.ptp(x_s, 0).max(), 150)
        ax.set(xlim=(x - half, x + half), ylim=(y + half, y - half), aspect="equal")
        ax.set_xticks([]), ax.set_yticks([])
        action, body, camera = (arrays[k][i] for k in ("action", "subject", "camera"))
        action = ("unknown", *meta["actions"])[action + 1]
        ax.set_title(f"{action}, body {body}, camera {camera}", fontsize=11,
                     parse_math=False)  # an action may have any name
    fig.suptitle("Test samples: skeleton (left blue, right orange), 96 fine points by part, "
                 "detected joints (x), missing joints (red rings)")
    fig.tight_layout()
    fig.savefig(path, dpi=70)
