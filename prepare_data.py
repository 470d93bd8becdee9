"""Prepare a data set: the default one, or one from your own files.

    python prepare_data.py                                 # data/demo, the default data set python
    prepare_data.py --train 2000 --name small       # another size under another name python
    prepare_data.py --wheels DIR                    # downloads from a folder, not from pip python
    prepare_data.py --source bvh --folder DIR       # your motion on the open bodies; or amass
    python prepare_data.py --source h36m --folder DIR      # Human3.6M with SMPL fits; or 3dpw

Human3.6M is licence-gated, so the default data need no account: open bodies (Anny) in real motion
(DeepMimic's 15 clips), seen by cameras like Human3.6M's. The data flow one way, and so does this
file (paper section 3, appendix B):

    clips -> (augment) -> segments -> 17 + 48 + 96 points -> cameras -> detector -> data/NAME

docs/data.md describes all sources and what is stored.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hipart import PART_JOINT
from sources import human36m, mocap, threedpw
from sources.bodies import (
    ANNY,
    CLIPS_SHA256,
    JOINT_SEGMENT,
    PYBULLET,
    SEGMENTS,
    get_bodies,
    get_clips,
    pose_points,
    rest_alignment,
    segment_transforms,
    skin_weights_of_points,
)
from sources.coarsening import coarsen, draw_coarsening, level_matrix, vertex_areas
from sources.dataset import ARRAYS, SPLITS, base_meta, draw_samples, new_data_set
from sources.detector import NOISE, detect
from sources.geometry import IMAGE_SIZE, make_cameras, project
from sources.motion import CLIP_STANDING_HEIGHT, UNSEEN_CLIPS, Motion, augment, turn

LEAP = 0.8  # m: every other training pose of an airborne clip is lifted by up to this much more


def collides(joints):
    """Crude self-collision of joints [N, 17, 3] mm: limbs in the trunk, a hand or foot in the head,
    crossed shins."""

    def to_line(p, a, b):  # distance of points p [N, K, 3] from the segments a-b [N, 3]
        d, ap = (b - a)[:, None], p - a[:, None]
        t = np.clip(np.sum(ap * d, -1) / np.maximum(np.sum(d * d, -1), 1e-9), 0, 1)
        return np.linalg.norm(ap - t[..., None] * d, axis=-1)

    tips = joints[:, [13, 16, 3, 6]]
    limbs = np.concatenate([tips, (tips + joints[:, [12, 15, 2, 5]]) / 2], 1)
    hit = (to_line(limbs, joints[:, 7], joints[:, 8]) < 70).any(1)
    hit |= (to_line(tips, joints[:, 9], joints[:, 10]) < 70).any(1)
    for a, b in (((2, 3), 5), ((5, 6), 2)):
        shin = np.stack([joints[:, b], joints[:, b + 1], (joints[:, b] + joints[:, b + 1]) / 2], 1)
        hit |= (to_line(shin, joints[:, a[0]], joints[:, a[1]]) < 55).any(1)
    return hit


def point_tables(bodies, level_96, level_48, area):
    """What each body needs for posing: M [S, 17 + 48 + 96, 19, 4] and the rest alignment A [S, 19,
    3, 3]."""
    regressor = np.concatenate([level_matrix(level_48, area), level_matrix(level_96, area)])
    tables = []
    for vertices, joints in zip(bodies["vertices"], bodies["joints"], strict=True):
        table = np.zeros((17, len(SEGMENTS), 4))
        table[np.arange(17), JOINT_SEGMENT, :3] = joints
        table[np.arange(17), JOINT_SEGMENT, 3] = 1
        table = np.concatenate(
            [table, skin_weights_of_points(regressor, bodies["weights"], vertices)]
        )
        tables.append(table)
    return np.stack(tables), rest_alignment(bodies["joints"])


def make_split(split, n, motion, bodies, tables, align, subjects, cameras, rng, bar):
    """Draw n samples of a split -> arrays as stored (see ARRAYS)."""
    hip_height = bodies["joints"][:, 0, 2] - bodies["vertices"][..., 2].min(1)  # [S] m, standing
    parts, done = [], 0
    while done < n:
        m = min(4096, n - done)
        if split == "train":
            pose, clip, action = augment(motion, m, rng)
        else:
            frames = motion.draw(split, m, rng)
            pose, clip = motion.pose(frames), motion.clip[frames]
            action = motion.label[clip]
        pose = turn(pose, rng.uniform(-np.pi, np.pi, m))
        subject, camera = rng.choice(subjects, m), rng.integers(len(cameras), size=m)
        spot = rng.uniform(-400, 400, (m, 2))  # where in the room, mm
        size, leap = np.ones(m), np.zeros(m)
        if split == "train":
            # Any body in the stature of any other, or a network would learn by heart how tall each
            # of them is; and leaps of any height, as the tops of the clips' own may lie in the
            # stretches that are held out.
            size = bodies["stature"][rng.choice(subjects, m)] / bodies["stature"][subject]
            leap = rng.uniform(0, LEAP, m) * (rng.random(m) < 0.5)

        transforms = segment_transforms(pose, align[subject], bodies["heads"][subject])
        points = np.empty((m, 161, 3))
        for s in np.unique(subject):
            points[subject == s] = pose_points(transforms[subject == s], tables[s])
        points *= 1000 * size[:, None, None]  # m -> mm
        # Feet, or whatever is lowest, on the floor; in the air at the clip's height, scaled by the
        # length of the legs.
        floor = -points[..., 2].min(1)
        lift = (
            np.maximum(pose[2] / CLIP_STANDING_HEIGHT * 1000 * hip_height[subject] * size, floor)
            + 1000 * leap
        )
        points += np.concatenate([spot, np.where(motion.airborne[clip], lift, floor)[:, None]], 1)[
            :, None
        ]

        x, seen = np.empty((m, 161, 2)), np.empty((m, 161, 3))
        for c, cam in enumerate(cameras):
            mine = camera == c
            seen[mine] = points[mine] @ np.array(cam["R"]).T + cam["t"]
            x[mine] = project(seen[mine], cam)
        root = seen[:, 0]
        focal = np.array([cam["f"][1] for cam in cameras])[camera]
        good = ((x >= 0) & (x <= IMAGE_SIZE)).all((1, 2))
        if split == "train":
            good &= ~collides(seen[:, :17])
        batch = {
            "x_s": x[:, :17], "x_d": x[:, 17:65], "x_f": x[:, 65:], "y": seen[:, :17] - root[:, None], "root": root,
            "height_px": focal * bodies["stature"][subject] * size * 1000 / root[:, 2],
            "action": action, "subject": subject, "camera": camera,
        }  # fmt: skip
        parts.append({k: v[good].astype(ARRAYS[k][1]) for k, v in batch.items()})
        done += int(good.sum())
        bar.update(int(good.sum()))
    arrays = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    if split != "train":
        arrays["x_s_det"], arrays["conf"] = detect(arrays["x_s"], arrays["height_px"], rng)
    return arrays


def write_data_set(
    folder, clips, bodies, sizes, seed, sources, unseen=UNSEEN_CLIPS, overwrite=False, source="demo"
):
    """Draw all splits and write them to `folder` (data/NAME). Nothing is left behind if this is
    interrupted.

    clips: name -> parse_clip(...). bodies: dict with vertices [S, V, 3] m, faces [F, 3], weights
    [V, 19] (skinning), heads [S, 19, 3] (where segments start), joints [S, 17, 3], stature [S] m,
    and "split_sizes" like N_BODIES; body 0 is also the one that is coarsened. sizes: split ->
    number of samples. Each split has a random stream of its own, so that one split's size does not
    change another. """
    folder = Path(folder)
    with new_data_set(folder, overwrite) as temporary:
        motion = Motion(clips, unseen)
        stream = {
            name: np.random.default_rng([seed, i]) for i, name in enumerate((*SPLITS, "cameras"))
        }
        cameras = make_cameras(stream["cameras"])
        rest, faces = bodies["vertices"][0], bodies["faces"]
        area = vertex_areas(rest, faces)
        levels = coarsen(rest, faces, bodies["joints"][0][list(PART_JOINT)])
        tables, align = point_tables(bodies, levels[96], levels[48], area)
        n_train, n_val, n_test = bodies["split_sizes"]
        ids = np.arange(n_train + n_val + n_test)
        test_bodies = ids[n_train + n_val :]
        subjects = dict(
            train=ids[:n_train],
            val=ids[n_train : n_train + n_val],
            test=test_bodies,
            unseen=test_bodies,
        )
        meta = base_meta(folder, source) | {
            "actions": motion.actions, "image_size": IMAGE_SIZE,
            "cameras": cameras, "splits": {s: {"n": sizes[s]} for s in SPLITS}, "noise": NOISE,
            "coarsening": {"sizes": [192, 96, 48], "weighting": "joint", "points": "area-weighted means",
                           "assignment_mm": 1000 * levels["distance"]},
            "subjects": {s: subjects[s].tolist() for s in SPLITS}, "stature_mm": (1000 * bodies["stature"]).tolist(),
            "unseen_actions": list(unseen), "sources": sources, "seed": seed,
            "training": {"leap_m": LEAP, "stature": "any training body's"},
        }  # fmt: skip
        with tqdm(
            total=sum(sizes.values()), desc=f"samples of {folder.name}", unit_scale=True
        ) as bar:
            for split in SPLITS:
                arrays = make_split(
                    split,
                    sizes[split],
                    motion,
                    bodies,
                    tables,
                    align,
                    subjects[split],
                    cameras,
                    stream[split],
                    bar,
                )
                (temporary / split).mkdir()
                for name, array in arrays.items():
                    np.save(temporary / split / f"{name}.npy", array)
                if split == "test":
                    draw_samples(temporary / "samples.png", arrays, meta)
        draw_coarsening(
            temporary / "coarsening.png", rest, faces, bodies["joints"][0], levels, area
        )
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    return folder


def prepare_demo(folder, sizes, seed=0, wheels=None, overwrite=False, kind="demo", motion=None):
    """Write the default data set to `folder`; sizes: split -> number of samples. The cache is kept
    beside it.

    motion: a folder with files of `kind` (bvh or amass); each is one more clip. A .bvh file is also
    one more action. """
    folder, more = Path(folder), {}
    if folder.exists() and not overwrite:  # before any download
        raise ValueError(f"{folder} exists already: choose another --name or add --overwrite.")
    if motion:
        more = mocap.read_folder(motion, kind)
        seconds = [clip["time"][-1] for clip in more.values()]
        print(
            f"{len(more)} clips of {min(seconds):.1f} to {max(seconds):.1f} s, {sum(seconds) / 60:.1f} min in all"
        )
    cache = folder.parent / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    clips, bodies = get_clips(cache, wheels), get_bodies(cache, seed, wheels)
    if set(clips) & set(more):
        raise ValueError(
            f"{motion}: {', '.join(sorted(set(clips) & set(more)))} are clips already: rename the files."
        )
    clips |= more
    sources = {
        "clips": PYBULLET[0],
        "clips_sha256": CLIPS_SHA256,
        "bodies": ANNY[0],
        "motion": {kind: sorted(more)},
    }
    return write_data_set(
        folder, clips, bodies, sizes, seed, sources, overwrite=overwrite, source=kind
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = dict(zip(SPLITS, (40_000, 2_500, 5_000, 2_500), strict=True))
    for split, n in default.items():
        parser.add_argument(
            f"--{split}", type=int, help=f"samples of the {split} split (default {n})"
        )
    parser.add_argument(
        "--source", choices=("demo", "bvh", "amass", "h36m", "3dpw"), default="demo"
    )
    parser.add_argument(
        "--folder", help="your files, for every source but demo; it is said what was found there"
    )
    parser.add_argument("--name", help="name of the data set (default: that of the source)")
    parser.add_argument("--out", default="data", help="folder of the data sets (default data)")
    parser.add_argument("--seed", type=int, help="of all that is drawn (default 0)")
    parser.add_argument(
        "--detections", help="h36m: which data_2d_h36m_NAME.npz, if there are several"
    )
    parser.add_argument(
        "--without-shifted",
        action="store_true",
        help="h36m: leave out S9's three shifted sequences",
    )
    parser.add_argument(
        "--wheels", help="folder with the wheels, if you have downloaded them yourself"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a data set of that name")
    args = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that it, too, leaves nothing behind
    started = time.time()
    try:
        given = {
            split: getattr(args, split) for split in SPLITS if getattr(args, split) is not None
        }
        sizes = default | given
        given |= {k: v for k, v in (("seed", args.seed), ("wheels", args.wheels)) if v is not None}
        if args.source in ("h36m", "3dpw") and given:
            raise ValueError(
                f"--{' --'.join(given)} has no meaning for --source {args.source}, which draws nothing."
            )
        if min(sizes.values()) < 1:
            raise ValueError(f"Every split needs at least one sample, found {sizes}.")
        folder = Path(args.out) / (args.name or args.source)
        if (args.source == "demo") != (args.folder is None):
            raise ValueError("--folder DIR is needed for every --source but demo, and only there.")
        if args.source != "h36m" and (args.detections or args.without_shifted):
            raise ValueError("--detections and --without-shifted go with --source h36m.")
        if args.source == "h36m":
            human36m.prepare(
                Path(args.folder), folder, args.detections, args.without_shifted, args.overwrite
            )
        elif args.source == "3dpw":
            threedpw.prepare(Path(args.folder), folder, args.overwrite)
        else:
            prepare_demo(
                folder, sizes, args.seed or 0, args.wheels, args.overwrite, args.source, args.folder
            )
            print(", ".join(f"{n} {split}" for split, n in sizes.items()))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"prepare_data.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{folder} after {time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
