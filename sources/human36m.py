"""Human3.6M (Ionescu et al. 2014) with SMPL fits: `prepare_data.py --source h36m --folder DIR`.

It is read from the files that the field shares:

    data_3d_h36m.npz                  VideoPose3D's: 3D joints in the world, 50 per second
    data_2d_h36m_NAME.npz             VideoPose3D's: 2D joints of a detector
    Human36M_subjectN_smpl_param.json Pose2Mesh's: SMPL fits, for some of the frames
    SMPL model                        the body that was fitted
    J_regressor_h36m_correct.npy      Pose2Mesh's: where Human3.6M's joints lie in that body

Every frame of every camera is a sample; the validation split takes some of its frames only. The
input is what the detector gave, and y is Human3.6M's own 3D pose. Dense and fine points are those
of the fitted body. Where there is no fit, has_mesh is False: stages 1 and 2 train where it is True,
stage 3 everywhere. World and cameras are in mm, with z up, and X_camera = R X_world + t.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hipart import J_D, J_F, PART_JOINT
from sources import smpl
from sources.coarsening import coarsen, draw_coarsening, level_matrix, vertex_areas
from sources.dataset import (
    ARRAYS,
    append_samples,
    base_meta,
    check_folder,
    create_split,
    draw_samples,
    new_data_set,
)
from sources.files import read_json, shown
from sources.geometry import H36M_INTRINSICS, project, quat_to_matrix
from sources.keypoint_files import videopose_layout
from sources.layouts import LAYOUTS, to_h36m
from sources.safe_pickle import described, load_arrays

TRAIN, TEST = ("S1", "S5", "S6", "S7", "S8"), ("S9", "S11")
# Sequences of the training subjects that are for validation.
VAL = {("S1", "Eating"), ("S5", "Phoning"), ("S6", "Posing"), ("S7", "SittingDown"),
       ("S8", "WalkDog")}  # fmt: skip
# In these, 2D and 3D joints do not lie on the images.
SHIFTED = {("S9", "Greeting"), ("S9", "SittingDown 1"), ("S9", "Waiting 1")}
ABSENT = {("S11", "Directions")}  # a damaged video
# In the order in which papers print them.
ACTIONS = ("Directions", "Discussion", "Eating", "Greeting", "Phoning", "Photo", "Posing",
           "Purchases", "Sitting", "SittingDown", "Smoking", "Waiting", "WalkDog", "Walking",
           "WalkTogether")  # fmt: skip
KEPT = (0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 15, 17, 18, 19, 25, 26, 27)  # of the 32 captured joints
IMAGE_SIZE = (1000, 1002)  # px, of cameras 0 and 3; the others' images end two rows earlier
N_VAL = 2500  # samples for validation, about
FIT_ERROR = 25.0  # mm; a worse fit says nothing about the body (Pose2Mesh)
ROOM = 100_000  # mm; a joint that is farther away is a damaged number
WRONG = 100.0  # mm or px, in the median: the files do not belong together
# v @ Z_UP turns SMPL's axes (y up, facing z) into those of the world (z up, facing -y).
Z_UP = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
LARGEST = 1 << 30  # bytes of an .npz file, unpacked, of which the real ones have 0.3 GB
CAMERA_BYTES = 1 << 20  # of a camera file, of which the real ones have 2 KB
MOST, MOST_AT_ONCE = 1_000_000, 20_000  # frames, of which Human3.6M has 0.5 million; of a sequence

# Pose2Mesh numbers actions and sub-actions, and VideoPose3D has names. As a rule, sub-actions 1 and
# 2 are called "Eating 1" and "Eating". IRREGULAR holds what follows no rule, from Human3.6M's own
# metadata.xml: for each subject and action the numbers of both, "-" for none.
CODES = dict(enumerate(("Directions", "Discussion", "Eating", "Greeting", "Phoning", "Posing",
                        "Purchases", "Sitting", "SittingDown", "Smoking", "Photo", "Waiting",
                        "Walking", "WalkDog", "WalkTogether"), start=2))  # fmt: skip
IRREGULAR = {
    "S1": {4: "2 -", 9: "1 2", 10: "2 -"},
    "S5": {2: "1 2", 3: "2 3", 5: "1 2", 10: "- 1", 12: "- 2", 13: "1 2"},
    "S6": {4: "1 2", 7: "2 -", 9: "1 2", 12: "- 1", 13: "3 -"},
    "S7": {6: "2 -", 10: "- 1", 12: "- 1", 13: "1 2", 14: "1 2"},
    "S8": {10: "- 1", 16: "1 2"},
    "S9": {3: "1 2", 10: "- 1"},
    "S11": {3: "1 2", 5: "2 -", 6: "3 2", 10: "- 1", 11: "2 -"},
}

# Camera to world, for the cameras of H36M_INTRINSICS in order, as VideoPose3D has it: a quaternion
# (w, x, y, z) and the centre in mm.
EXTRINSICS = {
    "S1": [
        (0.1407056450843811, -0.1500701755285263, -0.755240797996521, 0.6223280429840088,
         1841.1070556640625, 4955.28466796875, 1563.4454345703125),
        (0.6157187819480896, -0.764836311340332, -0.14833825826644897, 0.11794740706682205,
         1761.278564453125, -5078.0068359375, 1606.2650146484375),
        (0.14651472866535187, -0.14647851884365082, 0.7653023600578308, -0.6094175577163696,
         -1846.7777099609375, 5215.04638671875, 1491.972412109375),
        (0.5834008455276489, -0.7853162288665771, 0.14548823237419128, -0.14749594032764435,
         -1794.7896728515625, -3722.698974609375, 1574.8927001953125)],
    "S5": [
        (0.1467377245426178, -0.162370964884758, -0.7551892995834351, 0.6178938746452332,
         2097.3916015625, 4880.94482421875, 1605.732421875),
        (0.6159758567810059, -0.7626792192459106, -0.15728192031383514, 0.1189815029501915,
         2031.7008056640625, -5167.93310546875, 1612.923095703125),
        (0.14291371405124664, -0.12907841801643372, 0.7678384780883789, -0.6110143065452576,
         -1620.5948486328125, 5171.65869140625, 1496.43701171875),
        (0.5920479893684387, -0.7814217805862427, 0.1274748593568802, -0.15036417543888092,
         -1637.1737060546875, -3867.3173828125, 1547.033203125)],
    "S6": [
        (0.1337897777557373, -0.15692396461963654, -0.7571090459823608, 0.6198879480361938,
         1935.4517822265625, 4950.24560546875, 1618.0838623046875),
        (0.6147197484970093, -0.7628812789916992, -0.16174767911434174, 0.11819244921207428,
         1969.803955078125, -5128.73876953125, 1632.77880859375),
        (0.1529948115348816, -0.13529130816459656, 0.7646096348762512, -0.6112781167030334,
         -1769.596435546875, 5185.361328125, 1476.993408203125),
        (0.5916101336479187, -0.7804774045944214, 0.12832270562648773, -0.1561593860387802,
         -1721.668701171875, -3884.13134765625, 1540.4879150390625)],
    "S7": [
        (0.1435241848230362, -0.1631336808204651, -0.7548328638076782, 0.6188824772834778,
         1974.512939453125, 4926.3544921875, 1597.8326416015625),
        (0.6141672730445862, -0.7638262510299683, -0.1596645563840866, 0.1177929937839508,
         1937.0584716796875, -5119.7900390625, 1631.5665283203125),
        (0.14550060033798218, -0.12874816358089447, 0.7660516500473022, -0.6127139329910278,
         -1741.8111572265625, 5208.24951171875, 1464.8245849609375),
        (0.5912848114967346, -0.7821764349937439, 0.12445473670959473, -0.15196487307548523,
         -1734.7105712890625, -3832.42138671875, 1548.5830078125)],
    "S8": [
        (0.14110587537288666, -0.15589867532253265, -0.7561917304992676, 0.619644045829773,
         2150.65185546875, 4896.1611328125, 1611.9046630859375),
        (0.6169601678848267, -0.7647668123245239, -0.14846350252628326, 0.11158157885074615,
         2219.965576171875, -5148.453125, 1613.0440673828125),
        (0.1471444070339203, -0.13377119600772858, 0.7670128345489502, -0.6100369691848755,
         -1571.2215576171875, 5137.0185546875, 1498.1761474609375),
        (0.5927824378013611, -0.7825870513916016, 0.12147816270589828, -0.14631995558738708,
         -1476.913330078125, -3896.7412109375, 1547.97216796875)],
    "S9": [
        (0.15540587902069092, -0.15548215806484222, -0.7532095313072205, 0.6199594736099243,
         2044.45849609375, 4935.1171875, 1481.2275390625),
        (0.618784487247467, -0.7634735107421875, -0.14132238924503326, 0.11933968216180801,
         1990.959716796875, -5123.810546875, 1568.8048095703125),
        (0.13357827067375183, -0.1367100477218628, 0.7689454555511475, -0.6100738644599915,
         -1670.9921875, 5211.98583984375, 1528.387939453125),
        (0.5879399180412292, -0.7823407053947449, 0.1427614390850067, -0.14794869720935822,
         -1696.04345703125, -3827.099853515625, 1591.4127197265625)],
    "S11": [
        (0.15232472121715546, -0.15442320704460144, -0.7547563314437866, 0.6191070079803467,
         2098.440185546875, 4926.5546875, 1500.278564453125),
        (0.6189449429512024, -0.7600917220115662, -0.15300633013248444, 0.1255258321762085,
         2083.182373046875, -4912.1728515625, 1561.07861328125),
        (0.14943228662014008, -0.15650227665901184, 0.7681233882904053, -0.6026304364204407,
         -1609.8153076171875, 5177.3359375, 1537.896728515625),
        (0.5894251465797424, -0.7818877100944519, 0.13991211354732513, -0.14715361595153809,
         -1590.738037109375, -3854.1689453125, 1578.017578125)],
}  # fmt: skip

WANTED = {
    "3D joints": ("data_3d_h36m.npz, made by the scripts of github.com/facebookresearch/VideoPose3D"
                  " from Human3.6M (vision.imar.ro/human3.6m)", True),
    "2D joints": ("data_2d_h36m_NAME.npz: gt, cpn_ft_h36m_dbb, sh_ft_h36m and more; "
                  "see VideoPose3D's DATASETS.md", True),
    "SMPL fits": ("Human36M_subjectN_smpl_param.json, "
                  "from github.com/hongsukchoi/Pose2Mesh_RELEASE", True),
    "cameras": ("Human36M_subjectN_camera.json, from there; "
                "only compared with the cameras that are built in", False),
    "SMPL model": ("the neutral one, .pkl or .npz, from smplify.is.tue.mpg.de", True),
    "joint regressor": ("J_regressor_h36m_correct.npy, from Pose2Mesh; "
                        "without it fits are not checked", False),
}  # fmt: skip
PATTERNS = {
    "3D joints": r"data_3d_h36m\.npz",
    "2D joints": r"data_2d_h36m_.+\.npz",
    "SMPL fits": r"human36m_subject[0-9]+_smpl_param\.json",
    "cameras": r"human36m_subject[0-9]+_camera\.json",
    "joint regressor": smpl.REGRESSOR_NAME,
}


def file_name(subject: str, code: int, sub: int) -> str:
    """Action and sub-action numbers -> VideoPose3D's name of the sequence."""
    number = IRREGULAR[subject].get(code, "1 -").split()[sub - 1]
    return CODES[code] if number == "-" else f"{CODES[code]} {number}"


def camera(subject: str, index: int) -> dict:
    """Camera 0..3 of a subject, in the form of geometry.make_cameras."""
    name, (f, c, radial, tangential) = list(H36M_INTRINSICS.items())[index]
    pose = np.array(EXTRINSICS[subject][index])
    R = quat_to_matrix(pose[:4] / np.linalg.norm(pose[:4])).T
    return {
        "id": name, "f": list(f), "c": list(c), "k": list(radial), "p": list(tangential),
        "R": R.tolist(), "t": (-R @ pose[4:]).tolist(),
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------
# The user's folder


@dataclass
class Files:
    """What was found, with fits and cameras by subject."""

    joints: Path
    detections: Path
    model: Path
    regressor: Path | None
    fits: dict[str, Path]
    cameras: dict[str, Path]


def find_files(source: Path, detections: str | None) -> Files:
    """Look through the folder; `detections` says which 2D file, if there are several. Raises
    ValueError where something is missing or is there twice."""
    found = check_folder(source, recognise, WANTED)
    names = one_each("2D joints", found["2D joints"],
                     lambda path: path.stem.lower().removeprefix("data_2d_h36m_"))
    known = sorted(names)
    if detections is None and len(names) > 1:
        raise ValueError(f"{shown(source, 4096)} holds several 2D files: choose one with "
                         f"--detections {shown(' | '.join(known), 1000)}.")
    path_2d = names.get((detections or known[0]).lower())
    if path_2d is None:
        raise ValueError(f"{shown(source, 4096)} holds no data_2d_h36m_{detections}.npz: "
                         f"found {shown(', '.join(known), 1000)}.")
    cameras, fits = (one_each(f"{kind} of one subject", found[kind], subject_of)
                     for kind in ("cameras", "SMPL fits"))
    joints, model, regressor = (one_each(kind, found[kind]).get("")
                                for kind in ("3D joints", "SMPL model", "joint regressor"))
    return Files(joints, path_2d, model, regressor, fits, cameras)


def recognise(path: Path) -> str | None:
    """Which of WANTED a file is, by its name."""
    name = path.name.lower()
    for kind, pattern in PATTERNS.items():
        if re.fullmatch(pattern, name):
            return kind
    return "SMPL model" if smpl.is_model(name) and "neutral" in name else None


def one_each(kind: str, paths: list[Path], of=lambda path: "") -> dict[str, Path]:
    """The files of a kind by what they are of. Two of the same are refused with a ValueError."""
    files = {}
    for path in paths:
        if of(path) in files:
            raise ValueError(f"{shown(path, 4096)} and {shown(files[of(path)], 4096)} are both "
                             f"{kind}: keep one of them")
        files[of(path)] = path
    return files


def subject_of(path: Path) -> str:
    return f"S{int(re.findall('[0-9]+', path.name)[1])}"


# --------------------------------------------------------------------------------------------------
# Reading. Each raises ValueError, with one sentence, on anything that is not as it should be.


def read_joints(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """data_3d_h36m.npz -> {(subject, action): [T, 17, 3] mm in the world}."""
    content, name = load_arrays(path, LARGEST), shown(path, 4096)
    if "positions_3d" not in content:
        raise ValueError(f"{name} holds {shown(', '.join(content)) or 'nothing'}: "
                         "expected positions_3d")
    joints, n = {}, 0
    for subject, actions in _mapping(path, "positions_3d", content["positions_3d"]).items():
        for action, x in _mapping(path, f"positions_3d {shown(subject)}", actions).items():
            where = f"{name}, {shown(subject)} {shown(action)}"
            if not _is_float(x, 3) or x.shape[1:] != (32, 3) or not 0 < len(x) <= MOST_AT_ONCE:
                raise ValueError(f"{where}: expected metres [T, 32, 3] with at most {MOST_AT_ONCE} "
                                 f"frames T, found {described(x)}")
            if not np.isfinite(x).all() or action.split(" ")[0] not in ACTIONS:
                raise ValueError(f"{where}: expected finite numbers, of one of "
                                 f"{', '.join(ACTIONS)}")
            joints[subject, action] = np.multiply(x[:, KEPT], 1000, dtype=np.float64)
            n += len(x)
            if n > MOST:
                raise ValueError(f"{name}: expected at most {MOST} frames in all, found more")
    _need_subjects(path, joints)
    largest = max(np.abs(x[:, 0]).max() for x in joints.values())
    if not 100 < largest < 20_000:
        raise ValueError(f"{name}: the pelvis is up to {largest / 1000:.3g} m away from the middle "
                         "of the room: expected metres in the world's frame")
    if not all((np.abs(x) < ROOM).all() for x in joints.values()):
        raise ValueError(f"{name}: expected joints less than {ROOM // 1000} m away from the middle "
                         "of the room, found some that are farther")
    return joints


def read_detections(path: Path) -> tuple[dict[tuple[str, str], list], str]:
    """data_2d_h36m_NAME.npz -> {(subject, action): for each of 4 cameras an array [T', K, 2 or 3]
    px, or None}, and the layout of the K joints."""
    content, name = load_arrays(path, LARGEST), shown(path, 4096)
    if not {"positions_2d", "metadata"} <= set(content):
        raise ValueError(f"{name} holds {shown(', '.join(content)) or 'nothing'}: "
                         "expected positions_2d and metadata")
    metadata = _mapping(path, "metadata", content["metadata"])
    try:
        layout = videopose_layout(path, metadata)
    except (TypeError, ValueError, LookupError, OverflowError):
        layout = None
    if layout is None:
        raise ValueError(f"{name}: expected metadata with layout_name or keypoints_symmetry, "
                         "found no order of joints that is known here")
    n_joints, found = len(LAYOUTS[layout]), {}
    for subject, actions in _mapping(path, "positions_2d", content["positions_2d"]).items():
        for action, views in _mapping(path, f"positions_2d {shown(subject)}", actions).items():
            where = f"{name}, {shown(subject)} {shown(action)}"
            is_list = isinstance(views, list) or isinstance(views, np.ndarray) and views.ndim
            if not is_list or len(views) != 4:
                raise ValueError(f"{where}: expected a list of 4 cameras, found {described(views)}")
            for x in views:
                if x is not None and (not _is_float(x, 3) or x.shape[1] != n_joints
                                      or x.shape[2] not in (2, 3)):
                    raise ValueError(f"{where}: expected pixels [T, {n_joints}, 2] ({layout}), "
                                     f"found {described(x)}")
            found[subject, action] = list(views)
    _need_subjects(path, found)
    return found, layout


def read_fits(path: Path, subject: str) -> dict[str, tuple[np.ndarray, ...]]:
    """Human36M_subjectN_smpl_param.json -> {action: (frames [M] in order, pose [M, 24, 3], shape
    [M, 10], trans [M, 3] m)}. Fits that are no finite numbers are left out."""
    result = {}
    for code, subs in _mapping(path, "it", read_json(path)).items():
        for sub, frames in _mapping(path, f"action {shown(code)}", subs).items():
            what = f"action {shown(code)}, sub-action {shown(sub)}"
            where = f"{shown(path, 4096)}, {what}"
            if code not in map(str, CODES) or sub not in ("1", "2"):
                raise ValueError(f"{where}: expected actions 2 to 16 with sub-actions 1 and 2")
            fits = [_mapping(path, f"{what}, frame {shown(k)}", f)
                    for k, f in _mapping(path, what, frames).items()]
            try:
                rows = [[*f["pose"], *f["shape"], *f["trans"]] for f in fits]
                rows = np.array(rows, np.float64).reshape(-1, 85)
                at = np.array([int(k) for k in frames], np.int64)
            except (KeyError, TypeError, ValueError, OverflowError):
                raise ValueError(f"{where}: expected frame -> pose (72 numbers), shape (10) and "
                                 "trans (3)") from None
            good = np.isfinite(rows).all(1) & (np.abs(rows) < 1e3).all(1) & (at >= 0)
            order = np.flatnonzero(good)[np.argsort(at[good])]
            pose, shape, trans = rows[order, :72], rows[order, 72:82], rows[order, 82:]
            shape[(np.abs(shape) > 3).any(1)] = 0  # no such body: Pose2Mesh takes the mean one
            name = file_name(subject, int(code), int(sub))
            result[name] = at[order], pose.reshape(-1, 24, 3), shape, trans
    return result


def check_cameras(path: Path, subject: str) -> None:
    """Human36M_subjectN_camera.json must say what EXTRINSICS says."""
    content, name = _mapping(path, "it", read_json(path, CAMERA_BYTES)), shown(path, 4096)
    for k in range(4):
        try:
            R, t = (np.array(content[str(k + 1)][key], np.float64) for key in ("R", "t"))
            own = camera(subject, k)
            off = max(np.abs(R - own["R"]).max() * 1000, np.abs(t.ravel() - own["t"]).max())
        except (KeyError, TypeError, ValueError, OverflowError):
            raise ValueError(f"{name}: expected cameras 1 to 4 with R 3 x 3 and t") from None
        if not off < 1:  # NaN is off, too
            raise ValueError(f"{name}, camera {k + 1} is {off:.3g} mm off the one that is built "
                             "in: other files?")


def _mapping(path: Path, what: str, x) -> dict:
    """A dictionary, which NumPy may have wrapped in an array without dimensions."""
    x = x.item() if isinstance(x, np.ndarray) and x.shape == () else x
    if not isinstance(x, dict) or not all(isinstance(key, str) for key in x):
        raise ValueError(f"{shown(path, 4096)}: expected {what} to be a dictionary of names, "
                         f"found {described(x)}")
    return x


def _need_subjects(path: Path, found: dict) -> None:
    missing = [s for s in (*TRAIN, *TEST) if not any(subject == s for subject, _ in found)]
    if missing:
        raise ValueError(f"{shown(path, 4096)} lacks {', '.join(missing)}: "
                         f"expected the subjects {', '.join((*TRAIN, *TEST))}")


def _is_float(x, ndim: int) -> bool:
    return isinstance(x, np.ndarray) and x.dtype.kind == "f" and x.ndim == ndim


# --------------------------------------------------------------------------------------------------
# Bodies


@dataclass
class Body:
    """The fitted body model with z up, and the regressor of its points: 48 dense and 96 fine ones,
    and Human3.6M's 17 joints, if their regressor was found."""

    vertices: np.ndarray  # [V, 3] m, in the rest pose
    faces: np.ndarray  # [F, 3]
    joints: np.ndarray  # [17, 3] m, in the rest pose
    levels: dict  # what `coarsen` returns
    points: smpl.Points


def read_body(files: Files) -> Body:
    """Read the model and coarsen its mesh, as the paper does (plain Graclus, means of vertices)."""
    model = smpl.read(files.model)
    vertices, joints = model.v_template @ Z_UP, rest_joints(model) @ Z_UP
    levels = coarsen(vertices, model.faces, joints[list(PART_JOINT)], weighting="plain")
    regressor = [level_matrix(levels[size], np.ones(len(vertices))) for size in (J_D, J_F)]
    if files.regressor:
        regressor.append(smpl.read_regressor(files.regressor, model))
    points = smpl.Points(model, np.concatenate(regressor))
    return Body(vertices, model.faces, joints, levels, points)


def rest_joints(model: smpl.SMPL) -> np.ndarray:
    """Roughly Human3.6M's joints in the rest pose, for the coarsening: [17, 3] m."""
    joints = (model.J_regressor @ model.v_template)[smpl.TO_H36M]
    highest = np.argsort(-model.v_template[:, 1])[:40]
    joints[10] = model.v_template[highest].mean(0)  # the top of the head, which SMPL lacks
    return joints


def standing_height(joints: np.ndarray) -> float:
    """Height in mm of a person with joints [T, 17, 3] mm: the bones from ankle to head, and 80 mm
    below the ankle."""

    def length(bones):
        return sum(np.linalg.norm(joints[:, a] - joints[:, b], axis=-1) for a, b in bones)

    legs = length(((1, 2), (2, 3), (4, 5), (5, 6)))
    trunk = length(((0, 7), (7, 8), (8, 9), (9, 10)))
    return float(np.median(legs / 2 + trunk)) + 80


def pose_fits(points: smpl.Points, fit: tuple | None, joints: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pose the fits of one sequence, and leave out those that are far off its joints [T, 17, 3] mm.

    -> frames of the good fits [M], their dense and fine points [M, 48 + 96, 3] mm in the world, and
    how far every fit is off the joints, mm (0 if there is no joint regressor).
    """
    n_points = J_D + J_F
    if fit is None:
        return np.zeros(0, np.int64), np.zeros((0, n_points, 3)), np.zeros(0)
    at, *pose = (a[fit[0] < len(joints)] for a in fit)
    parts = [points(*(p[i : i + 512] for p in pose)) for i in range(0, len(at) or 1, 512)]
    x = np.concatenate(parts) * 1000
    own, off = x[:, n_points:], np.zeros(len(at))
    if own.shape[1]:
        # Both are centred, since a fit may stand a little aside and still have the right pose.
        centred = own - own.mean(1, keepdims=True) - joints[at] + joints[at].mean(1, keepdims=True)
        off = np.linalg.norm(centred, axis=-1).mean(1)
    good = off <= FIT_ERROR
    return at[good], x[good, :n_points], off


# --------------------------------------------------------------------------------------------------
# Splits


@dataclass
class Capture:
    """All that the files say: joints and fits by (subject, action), detections by camera, too."""

    joints: dict[tuple[str, str], np.ndarray]
    detections: dict[tuple[str, str], list]
    layout: str
    fits: dict[tuple[str, str], tuple]
    stature: dict[str, float]  # by subject, mm
    points: smpl.Points

    def posed(self, key: tuple[str, str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`pose_fits` of one sequence, (subject, action)."""
        return pose_fits(self.points, self.fits.get(key), self.joints[key])


def read_capture(files: Files, points: smpl.Points) -> Capture:
    """Everything that the files say, in memory."""
    joints, (detections, layout) = read_joints(files.joints), read_detections(files.detections)
    fits = {(subject, action): fit for subject in EXTRINSICS if subject in files.fits
            for action, fit in read_fits(files.fits[subject], subject).items()}
    stature = {}
    for subject in EXTRINSICS:
        some = [x[::50] for key, x in joints.items() if key[0] == subject]
        stature[subject] = standing_height(np.concatenate(some))
    return Capture(joints, detections, layout, fits, stature, points)


def list_sequences(capture: Capture, without_shifted: bool
                   ) -> tuple[list[tuple[str, str, int, int]], list[str]]:
    """(subject, action, camera, frames) of everything that has 3D and 2D joints, and sentences
    about what was trimmed or left out."""
    sequences, unequal, absent = [], [], []
    out = ABSENT | (SHIFTED if without_shifted else set())
    for key, joints in sorted(capture.joints.items()):
        if key[0] not in EXTRINSICS or key in out:
            continue
        for view, x in enumerate(capture.detections.get(key, [None] * 4)):
            name = f"{shown(' '.join(key))} camera {view}"
            if x is None or not len(x):
                absent.append(name)
                continue
            if len(x) != len(joints):
                unequal.append(name)
            sequences.append((*key, view, min(len(joints), len(x))))
    kinds = ((unequal, "more or fewer frames than their 3D joints, and were trimmed"),
             (absent, "no 2D joints"))
    notes = [f"{len(of)} sequences have {what} ({of[0]}{', ...' if len(of) > 1 else ''})"
             for of, what in kinds if of]
    return sequences, notes


def plan_splits(capture: Capture, without_shifted: bool) -> tuple[dict, dict[str, str]]:
    """What to write: split -> {(subject, action): [(camera, frames), ...]}, and each split in
    words. Validation takes only frames with a fit, and so few that no epoch waits for it."""
    fitted = {key: capture.posed(key)[0] for key in VAL if key in capture.joints}
    every = max(1, round(sum(4 * len(at) for at in fitted.values()) / N_VAL))
    sequences, notes = list_sequences(capture, without_shifted)
    for note in notes:
        print(note)
    plan = {"train": {}, "val": {}, "test": {}}
    for subject, action, view, n in sequences:
        key, at = (subject, action), np.arange(n)
        if key in VAL:
            at = fitted[key][fitted[key] < n][view % every :: every]
        split = "val" if key in VAL else "test" if subject in TEST else "train"
        plan[split].setdefault(key, []).append((view, at))
    shifted = f"{'without' if without_shifted else 'with'} the three shifted sequences of S9"
    val = ", ".join(" ".join(key) for key in sorted(VAL))
    return plan, {
        "train": f"{', '.join(TRAIN)} without the sequences of val",
        "val": f"one in {every} of the frames with a fit, of {val}",
        "test": f"{' and '.join(TEST)}, {shifted}",
    }


def samples(capture: Capture, key: tuple[str, str], view: int, at: np.ndarray, fitted: np.ndarray,
            points: np.ndarray) -> dict[str, np.ndarray]:
    """Frames `at` of one sequence as one camera sees them: arrays as in dataset.ARRAYS.

    fitted [M] are the frames that have a fit, points [M, 48 + 96, 3] mm their dense and fine points
    in the world.
    """
    (subject, action), cam = key, camera(key[0], view)
    R, t = np.array(cam["R"]), np.array(cam["t"])
    world, detected = capture.joints[key], capture.detections[key][view][at]
    joints = world[at] @ R.T + t
    root = joints[:, 0]
    scores = np.ones_like(detected[..., :1]) if detected.shape[2] == 2 else detected[..., 2:]
    detected = np.concatenate([detected[..., :2], scores], 2).astype(np.float64)
    x_det, conf = to_h36m(detected, capture.layout)
    row = np.full(len(world), -1)  # of a frame among the fits
    row[fitted] = np.arange(len(fitted))
    has_mesh = row[at] >= 0
    x = np.zeros((len(at), J_D + J_F, 2))
    x[has_mesh] = project(points[row[at[has_mesh]]] @ R.T + t, cam)
    return {
        "x_s": project(joints, cam), "x_d": x[:, :J_D], "x_f": x[:, J_D:], "has_mesh": has_mesh,
        "y": joints - root[:, None], "root": root,
        "height_px": cam["f"][1] * capture.stature[subject] / root[:, 2],
        "action": ACTIONS.index(action.split(" ")[0]), "subject": int(subject[1:]), "camera": view,
        "x_s_det": x_det, "conf": conf, "frame": at,
    }  # fmt: skip


def write_split(folder: Path, n: int, part: dict, capture: Capture, bar
                ) -> tuple[int, np.ndarray, list[np.ndarray]]:
    """Write the sequences `part` of a plan -> samples with dense and fine points, how far the 2D
    joints are off the projected ones, px, and how far fits are off, mm, for each sequence."""
    create_split(folder, n)
    n_mesh, pixels, distances = 0, [], []
    for i, (key, views) in enumerate(part.items()):
        fitted, points, distance = capture.posed(key)
        distances.append(distance)
        for view, at in views:
            new = samples(capture, key, view, at, fitted, points) | {"sequence": 4 * i + view}
            append_samples(folder, new)
            n_mesh += int(new["has_mesh"].sum())
            off = np.linalg.norm(new["x_s_det"] - new["x_s"], axis=-1)[new["conf"] > 0]
            pixels.append(off.astype(np.float32))
            bar.update(len(at))
    return n_mesh, np.concatenate(pixels), distances


def prepare(source: Path, out: Path, detections: str | None = None, without_shifted: bool = False,
            overwrite: bool = False) -> Path:
    """Write the data set `out` (data/NAME) from the files in `source` -> its folder.

    `detections` names the 2D file, if there are several; `without_shifted` leaves out SHIFTED.
    Memory holds the joints, detections and fits (about 1 GB for all of Human3.6M), one number for
    every detected joint, and one sequence of samples. Raises ValueError with one sentence where
    something is missing or is not what it should be; then nothing is written.
    """
    with new_data_set(out, overwrite) as folder:
        files = find_files(source, detections)
        detector = shown(files.detections.name)
        without = [s for s in EXTRINSICS if s not in files.fits]
        if without:
            print(f"no SMPL fits of {', '.join(without)}: these have no dense and fine points")
        for subject in sorted(set(files.cameras) & set(EXTRINSICS)):
            check_cameras(files.cameras[subject], subject)
        body = read_body(files)
        capture = read_capture(files, body.points)
        plan, about = plan_splits(capture, without_shifted)
        sizes = {split: sum(len(at) for views in part.values() for _, at in views)
                 for split, part in plan.items()}
        if empty := [split for split, n in sizes.items() if not n]:
            val = " or ".join(" ".join(key) for key in sorted(VAL))
            raise ValueError(f"{shown(source, 4096)} has no sample for {' and '.join(empty)}: "
                             "expected 2D and 3D joints of all subjects, and SMPL fits of "
                             f"{val} for val.")

        n_mesh, pixels, off = {}, {}, []
        total = sum(sizes.values())
        with tqdm(total=total, desc=f"samples of {Path(out).name}", unit_scale=True) as bar:
            for split, part in plan.items():
                n_mesh[split], pixels[split], distances = write_split(
                    folder / split, sizes[split], part, capture, bar)
                off += distances
                if split == "train" and not n_mesh[split]:
                    raise ValueError(f"{shown(source, 4096)}: no pose for training has a good SMPL "
                                     "fit; stages 1 and 2 train on these.")
                _check_median(source, f"2D joints of {detector}, px", pixels[split])
                if any(map(len, off)):
                    _check_median(source, "SMPL fits, mm", np.concatenate(off))
        draw_samples(folder / "samples.png", _shown(folder / "test"),
                     {"seed": 0, "actions": ACTIONS})
        draw_coarsening(folder / "coarsening.png", body.vertices, body.faces, body.joints,
                        body.levels, vertex_areas(body.vertices, body.faces))
        off = np.concatenate(off)
        left_out = int((off > FIT_ERROR).sum()) if files.regressor else "not checked"
        meta = base_meta(out, "h36m") | {
            "actions": list(ACTIONS), "image_size": IMAGE_SIZE, "noise": None, "seed": 0,
            "frame_rate": 50,
            "splits": {s: {"n": n, "with_mesh": n_mesh[s], "about": about[s]}
                       for s, n in sizes.items()},
            "cameras": {s: [camera(s, k) for k in range(4)] for s in EXTRINSICS},
            "stature_mm": capture.stature,
            "coarsening": {"sizes": [192, 96, 48], "weighting": "plain",
                           "points": "means of vertices",
                           "assignment_mm": 1000 * body.levels["distance"]},
            "shifted": [" ".join(key) for key in sorted(SHIFTED)],
            "sources": {"2D joints": detector, "layout": capture.layout,
                        "fits": len(off), "fits_left_out": left_out},
        }  # fmt: skip
        (folder / "meta.json").write_text(json.dumps(meta, indent=1))
    print(f"{detector}, {capture.layout}: mean distance from the projected joints "
          + ", ".join(f"{split} {e.mean():.1f} px" for split, e in pixels.items()))
    print(f"{len(off)} SMPL fits, more than {FIT_ERROR:.0f} mm off and left out: {left_out}")
    for split, text in about.items():
        print(f"{split}: {sizes[split]} samples, {n_mesh[split]} with dense and fine points; "
              f"{text}")
    return Path(out)


def _check_median(source: Path, what: str, values: np.ndarray) -> None:
    middle = np.median(values) if len(values) else np.inf
    if not middle < WRONG:
        raise ValueError(f"{shown(source, 4096)}: the {what}, are {middle:.0f} off the 3D joints "
                         "in the median: expected files of the same frames, cameras and order of "
                         "joints.")


def _shown(split: Path) -> dict[str, np.ndarray]:
    """Twelve samples from all over a split, with dense and fine points if any have them."""
    arrays = {name: np.load(split / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    has_mesh = arrays["has_mesh"]
    rows = np.flatnonzero(has_mesh) if has_mesh.any() else np.arange(len(has_mesh))
    rows = rows[np.linspace(0, len(rows) - 1, 12).astype(int)]
    return {name: np.array(a[rows]) for name, a in arrays.items()}
