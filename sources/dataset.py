"""Data sets on disk, and how they are read.

data/NAME holds meta.json and a folder for each split, with one .npy file for each of ARRAYS. The
readers of sources/ write it (`new_data_set`, `create_split`, `append_samples`), and the scripts
read it as tensors (`Split`). """

import copy
import json
import os
import platform
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure  # without pyplot, which would want a display
from torch import Tensor

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
from sources.detector import detect, drop_joints

FORMAT_VERSION = 2
SPLITS = ("train", "val", "test", "unseen")
BLOCK = 8192  # samples that are read, detected and moved to the device at once

# name: (shape after N, dtype). With a simulated detector, x_s_det and conf are stored for every
# split but train, whose noise is drawn afresh. Where not every pose has a mesh, has_mesh says which
# have; the others' x_d and x_f are 0.
ARRAYS = {
    "x_s": ((17, 2), "float32"), "x_d": ((48, 2), "float32"), "x_f": ((96, 2), "float32"),
    "y": ((17, 3), "float32"), "root": ((3,), "float32"), "height_px": ((), "float32"),
    "action": ((), "int64"), "subject": ((), "int64"), "camera": ((), "int64"),
    "x_s_det": ((17, 2), "float32"), "conf": ((17,), "float32"), "has_mesh": ((), "bool"),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def new_data_set(folder, overwrite=False):
    """A temporary folder beside data/NAME, which takes its place at the end; if anything fails,
    nothing is left of it."""
    folder = Path(folder)
    if folder.exists() and not overwrite:
        raise ValueError(f"{folder} exists already: choose another --name or add --overwrite.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}.????????"):
        print(f"{left} belongs to another preparation: delete it, unless that still runs")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = temporary / "new", temporary / "old"
    try:
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, old)
        os.replace(new, folder)
    finally:
        if old.exists() and not folder.exists():
            os.replace(old, folder)
        shutil.rmtree(temporary, ignore_errors=True)


def create_split(folder, n):
    """Files of all arrays of a split with room for n samples, which `append_samples` fills: any n
    takes the same memory."""
    folder.mkdir()
    for name, (shape, dtype) in ARRAYS.items():
        with open(folder / f"{name}.npy", "wb") as f:
            header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (n, *shape)}
            np.lib.format.write_array_header_1_0(f, header)


def append_samples(folder, arrays):
    """The next samples of a split: arrays as in ARRAYS, or one value for all of them; what is not
    given is 0."""
    n = len(arrays["y"])
    for name, (shape, dtype) in ARRAYS.items():
        with open(folder / f"{name}.npy", "ab") as f:
            f.write(np.broadcast_to(arrays.get(name, 0), (n, *shape)).astype(dtype).tobytes())


def base_meta(folder, source):
    """What the meta.json of every data set holds."""
    return {
        "source": source, "format_version": FORMAT_VERSION, "name": Path(folder).name, "joint_names": list(JOINT_NAMES),
        "parents": list(PARENTS), "part_joint": list(PART_JOINT),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "networkx": nx.__version__},
    }  # fmt: skip


def check_folder(folder, recognise, wanted):
    """Look through a user's folder before any work -> {kind: its files}, and print what each file
    was recognised as.

    recognise(path) -> a key of `wanted`, or None. wanted: kind -> (what it is and where it comes
    from, needed or not). """
    folder, found, other = Path(folder), {kind: [] for kind in wanted}, []
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: --folder must name the folder with your files.")
    files, seen = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):  # people link to where data lie
        if os.path.realpath(root) in seen:
            folders.clear()  # a loop
        else:
            seen.add(os.path.realpath(root))
            files += [Path(root, name) for name in names if Path(root, name).is_file()]
    for path in sorted(files):
        found.get(recognise(path), other).append(path)

    def some(paths):
        more = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
        return ", ".join(str(p.relative_to(folder)) for p in paths[:4]) + more

    print(f"{folder}:")
    for kind, (what, needed) in wanted.items():
        state = some(found[kind]) if found[kind] else "MISSING" if needed else "none (not needed)"
        print(f"  {kind}: {state}" + ("" if found[kind] else f"; {what}"))
    if other:
        print(f"  not used: {some(other)}")
    missing = [
        f"{kind} ({what})" for kind, (what, needed) in wanted.items() if needed and not found[kind]
    ]
    if missing:
        raise ValueError(f"{folder} lacks {'; '.join(missing)}.")
    return found


# --------------------------------------------------------------------------------------------------
# Reading


def load(folder, split):
    """Read one split of a data set -> (arrays, meta): memory-mapped, read-only arrays as in ARRAYS.

    Everything is checked, a chunk at a time, so that any size takes the same memory. ValueError or
    FileNotFoundError, with one sentence, where something is wrong.
    """
    folder = Path(folder)
    make = f"python prepare_data.py --name {folder.name} --out {folder.parent}"
    if not (folder / "meta.json").is_file():
        raise FileNotFoundError(f"No data set in {folder}: make it with `{make}`.")
    again = f"make it again with `{make} --overwrite`"
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except ValueError as error:
        raise ValueError(f"{folder / 'meta.json'} is not valid JSON ({error}): {again}.") from None
    if meta.get("source", "demo") != "demo":
        again = again.replace("--name", f"--source {meta['source']} --folder DIR --name")
    if meta.get("format_version") != FORMAT_VERSION:
        found = meta.get("format_version")
        raise ValueError(
            f"{folder} has format version {found}, expected {FORMAT_VERSION}: {again}."
        )
    if split not in meta["splits"]:
        raise ValueError(f"{folder} has no split {split!r}, only {', '.join(meta['splits'])}.")
    n, arrays = meta["splits"][split]["n"], {}
    for key, (shape, dtype) in ARRAYS.items():
        if (split == "train" and key in ("x_s_det", "conf") and meta["noise"]) or (
                key == "has_mesh" and "with_mesh" not in meta["splits"][split]):  # fmt: skip
            continue
        path = folder / split / f"{key}.npy"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {again}.")
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(
                f"{path} cannot be read, it is truncated or no plain array ({error}): {again}."
            ) from None
        if array.shape != (n, *shape) or array.dtype != dtype:
            raise ValueError(
                f"{path} holds {array.dtype} {array.shape}, expected {dtype} {(n, *shape)}: {again}."
            )
        if not all(np.isfinite(array[i : i + 65536]).all() for i in range(0, n, 65536)):
            raise ValueError(f"{path} holds NaN or infinite values: {again}.")
        arrays[key] = array
    return arrays, meta


class Split:
    """One split of a data set, read in blocks of tensors, with poses in normalised image
    coordinates.

    limit: only so many samples, evenly spread (0: all). has_mesh: only the samples whose dense and
    fine points are known. ValueError or OSError, with one sentence, if the data cannot be read.
    """

    def __init__(
        self,
        folder: Path | str,
        name: str,
        device: torch.device,
        limit: int = 0,
        has_mesh: bool = False,
    ):
        self.arrays, self.meta = load(folder, name)
        self.w, self.h = self.meta["image_size"]
        self.device, self.n = device, len(self.arrays["x_s"])
        self.rows = np.arange(self.n)
        chosen = self.with_mesh() if has_mesh else self
        chosen = chosen.spread(limit) if limit else chosen
        self.rows, self.n = chosen.rows, chosen.n

    def _chosen(self, rows: np.ndarray) -> "Split":
        other = copy.copy(self)
        other.rows, other.n = rows, len(rows)
        return other

    def with_mesh(self) -> "Split":
        """Only the samples whose dense and fine points are known."""
        known = self.arrays.get("has_mesh")
        return self if known is None else self._chosen(self.rows[known[self.rows]])

    def spread(self, n: int) -> "Split":
        """At most n samples, evenly spread."""
        n = min(n, self.n)
        return self._chosen(self.rows[np.arange(n) * self.n // max(n, 1)])

    def read(
        self, rows, rng: np.random.Generator | None = None, clean: bool = False
    ) -> dict[str, Tensor]:
        """Samples `rows` as tensors: x_s [n, 17, 2], conf [n, 17], x_d [n, 48, 2], x_f [n, 96, 2],
        y [n, 17, 3] mm, action [n], height_px [n], has_mesh [n].

        x_s is what the detector gives: the stored draw, or a fresh one if `rng` is given (real
        detections get fresh joint dropout instead), or the clean projection. Where has_mesh is
        False, x_d and x_f mean nothing.
        """
        a = {k: np.array(v[self.rows[rows]]) for k, v in self.arrays.items()}
        a.setdefault("has_mesh", np.ones(len(a["y"]), bool))
        if clean:
            a["conf"] = np.ones(a["x_s"].shape[:2], np.float32)
        elif rng is not None and self.meta["noise"]:
            a["x_s"], a["conf"] = detect(a["x_s"], a["height_px"], rng, self.meta["noise"])
        else:
            a["x_s"] = a["x_s_det"]
            if rng is not None:
                a["x_s"], a["conf"] = drop_joints(a["x_s"], a["conf"], a["height_px"], rng)
        names = ("x_s", "conf", "x_d", "x_f", "y", "action", "height_px", "has_mesh")
        t = {k: torch.from_numpy(a[k]).to(self.device) for k in names}
        for k in ("x_s", "x_d", "x_f"):
            t[k] = normalize_screen(t[k], self.w, self.h)
        t["x_s"] = t["x_s"] * (t["conf"] > 0)[..., None]
        return t

    def blocks(
        self, rng: np.random.Generator | None = None, clean: bool = False, size: int = BLOCK
    ):
        """All samples in order."""
        for start in range(0, self.n, size):
            yield self.read(slice(start, min(start + size, self.n)), rng, clean)

    def batches(
        self,
        size: int,
        rng: np.random.Generator | None,
        clean: bool = False,
        prepare=lambda block, rows: block,
    ):
        """One epoch of shuffled full batches, or one smaller batch if there are not enough samples
        for a full one. The order comes from torch's random state. `prepare(block, rows)` sees each
        block once, before it is cut into batches."""
        order = torch.randperm(self.n).numpy()
        for start in range(0, self.n, BLOCK):
            rows = np.sort(order[start : start + BLOCK])
            if start and len(rows) < size:
                return
            block = prepare(self.read(rows, rng, clean), rows)
            shuffled = torch.randperm(len(rows)).to(self.device)
            for i in range(0, len(rows) - size + 1, size) if len(rows) >= size else [0]:
                yield {k: v[shuffled[i : i + size]] for k, v in block.items()}

    def steps(self, size: int) -> int:
        """How many batches of that size an epoch has."""
        return max(1, sum(min(BLOCK, self.n - start) // size for start in range(0, self.n, BLOCK)))

    def pixels(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean distance of normalised points, in pixels of the image."""
        return (a - b).norm(dim=-1).mean() * (self.w / 2)


def in_model_frame(block: dict[str, Tensor], rows=None) -> dict[str, Tensor]:
    """The same block with x_s, x_d and x_f in the model frame, which is minus the detected
    pelvis."""
    pelvis = detected_pelvis(block["x_s"], block["conf"])
    return block | {k: to_model_frame(block[k], pelvis) for k in ("x_s", "x_d", "x_f")}


# --------------------------------------------------------------------------------------------------
# A look at it

BONE_COLOURS = {
    "left": "#0072B2",
    "right": "#D55E00",
    "middle": "#444444",
}  # Okabe-Ito: safe for the colour-blind


def draw_samples(path, arrays, meta):
    """Random samples: clean skeleton (left blue, right orange), 96 fine points by part, simulated
    detections."""
    colours = colormaps["tab20"](np.arange(16))  # of parts
    rng = np.random.default_rng(meta["seed"])
    pick = rng.permutation(len(arrays["x_s"]))[:12]
    fig = Figure(figsize=(20, 7.6))
    axes = fig.subplots(2, 6)
    for ax, i in zip(axes.flat, pick, strict=False):
        x_s, x_f, x_det, seen = (arrays[k][i] for k in ("x_s", "x_f", "x_s_det", "conf"))
        ax.scatter(*x_f.T, s=16, color=colours[np.arange(96) // 6])
        for joint, parent in enumerate(PARENTS[1:], 1):
            side = "left" if joint in LEFT else "right" if joint in RIGHT else "middle"
            ax.plot(*x_s[[joint, parent]].T, color=BONE_COLOURS[side], lw=2)
        seen = seen > 0
        for joint in np.flatnonzero(seen):
            ax.plot(*np.stack([x_s[joint], x_det[joint]]).T, color="k", lw=0.7)
        ax.scatter(*x_det[seen].T, marker="x", s=22, c="k")
        ax.scatter(*x_s[~seen].T, marker="o", s=60, facecolor="none", edgecolor="#CC0000")
        middle, half = (x_s.max(0) + x_s.min(0)) / 2, 0.6 * max(np.ptp(x_s, 0).max(), 150)
        ax.set(
            xlim=(middle[0] - half, middle[0] + half),
            ylim=(middle[1] + half, middle[1] - half),
            aspect="equal",
        )
        ax.set_xticks([]), ax.set_yticks([])
        action, body, camera = (arrays[k][i] for k in ("action", "subject", "camera"))
        ax.set_title(
            f"{('unknown', *meta['actions'])[action + 1]}, body {body}, camera {camera}",
            fontsize=11,
        )
    fig.suptitle(
        "Test samples: skeleton (left blue, right orange), 96 fine points by part, detected joints (x), "
        "missing joints (red rings)"
    )
    fig.tight_layout()
    fig.savefig(path, dpi=70)
