"""SMPL (Loper et al. 2015) without its mesh: the points that Human3.6M, 3DPW and AMASS need.

The body model is licensed: users bring the file. `read` takes the official .pkl (without chumpy, without running anything
in it) or an .npz with the same keys. A regressor R [P, V] makes P points out of the V vertices; since a vertex is a sum over
joints of rigid motions of a blended rest position, so is a point, and nobody has to pose the 6890 vertices:

    point_p = sum_j T_j(pose) M_pj,   M_pj = sum_v R_pv W_vj [rest_v; 1],   rest = template + shape blend + pose blend
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hipart import LEFT, RIGHT
from sources.geometry import quat_from_rotvec, quat_to_matrix
from sources.safe_pickle import load_arrays, load_pickle

N_JOINTS, N_SHAPE = 24, 10
LARGEST = 2 << 30  # bytes: a model with 300 shapes unpacks to 0.2 GB
OTHER_MODELS = "smpl-?[hx]|mano"  # in the names of files that are not SMPL
REGRESSOR_NAME = r"j_regressor_h36m.*\.npy"
# Which of SMPL's 24 joints is nearest to each of Human3.6M's 17 in the rest pose. Only the coarsening goes by it.
TO_H36M = [0, 2, 5, 8, 1, 4, 7, 6, 12, 15, 15, 16, 18, 20, 17, 19, 21]


@dataclass
class SMPL:
    """A body model: v_template [V, 3] m, shapedirs [V, 3, 10], posedirs [V, 3, 207], J_regressor [24, V], weights [V, 24],
    parents (24 of them, -1 for the root), faces [F, 3]."""

    v_template: np.ndarray
    shapedirs: np.ndarray
    posedirs: np.ndarray
    J_regressor: np.ndarray
    weights: np.ndarray
    parents: list[int]
    faces: np.ndarray

    def joints(self, shape: np.ndarray) -> np.ndarray:
        """Joints of the rest pose: shape [N, 10] -> [N, 24, 3] m."""
        directions = np.einsum("jv,vck->jck", self.J_regressor, self.shapedirs)
        return self.J_regressor @ self.v_template + np.einsum("jck,nk->njc", directions, shape)

    def posed(self, pose: np.ndarray, shape: np.ndarray, trans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Orientation and place of each joint: pose [N, 24, 3] axis-angle, shape [N, 10], trans [N, 3] m -> [N, 24, 3, 3]
        and [N, 24, 3] m."""
        rest, local = self.joints(shape), quat_to_matrix(quat_from_rotvec(pose))
        turn, place = np.empty_like(local), np.empty_like(rest)
        for j, parent in enumerate(self.parents):
            if parent < 0:
                turn[:, j], place[:, j] = local[:, j], rest[:, j] + trans  # the root turns about its joint, not the origin
            else:
                turn[:, j] = turn[:, parent] @ local[:, j]
                offset = rest[:, j] - rest[:, parent]
                place[:, j] = place[:, parent] + np.einsum("nij,nj->ni", turn[:, parent], offset)
        return turn, place


class Points:
    """Points regressed from posed bodies, metres:
    Points(model, R [P, V])(pose [N, 24, 3] axis-angle, shape [N, 10], trans [N, 3]) -> [N, P, 3]."""

    def __init__(self, model: SMPL, regressor: np.ndarray):
        self.model, P = model, len(regressor)
        V = len(model.v_template)
        basis = np.concatenate([model.v_template[:, :, None], model.shapedirs, model.posedirs], 2).reshape(V, -1)
        rest = np.stack([(regressor * w) @ basis for w in model.weights.T])  # [24, P, 3 * 218]
        self.M = np.ascontiguousarray(rest.reshape(N_JOINTS, P, 3, -1).transpose(3, 1, 0, 2).reshape(-1, P * N_JOINTS * 3))
        self.share = regressor @ model.weights  # [P, 24], how much of a point hangs on each joint

    def __call__(self, pose: np.ndarray, shape: np.ndarray, trans: np.ndarray) -> np.ndarray:
        pose, shape, trans = (np.asarray(a, np.float64) for a in (pose, shape, trans))
        n, p = len(pose), len(self.share)
        if not n:
            return np.zeros((0, p, 3))
        bent = quat_to_matrix(quat_from_rotvec(pose[:, 1:])) - np.eye(3)
        blend = np.concatenate([np.ones((n, 1)), shape, bent.reshape(n, -1)], 1)  # [N, 1 + 10 + 207]
        rest = (blend @ self.M).reshape(n, p, N_JOINTS, 3)
        turn, place = self.model.posed(pose, shape, trans)
        shift = place - np.einsum("njab,njb->nja", turn, self.model.joints(shape))  # a point goes to turn @ point + shift
        # [N, P, 24 * 3] @ [N, 24 * 3, 3]: one product a sample
        turned = rest.reshape(n, p, -1) @ turn.transpose(0, 1, 3, 2).reshape(n, -1, 3)
        return turned + self.share @ shift


def read(path: Path) -> SMPL:
    """An SMPL file (.pkl or .npz). ValueError with one sentence on anything else."""
    content = load_arrays(path, LARGEST) if path.suffix.lower() == ".npz" else load_pickle(path, LARGEST)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no SMPL model: expected a dictionary of arrays, found {type(content).__name__}")

    def array(key: str, *shape) -> np.ndarray:
        if key not in content:
            raise ValueError(f"{path} is no SMPL model: it has no {key}")
        a = content[key]
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "fiu" or a.ndim != len(shape) or any(
                s not in (None, n) for s, n in zip(shape, a.shape, strict=True)) or not np.isfinite(a).all():
            found = f"{a.dtype} {list(a.shape)}" if isinstance(a, np.ndarray) else type(a).__name__
            wanted = [s if s is not None else "any" for s in shape]
            raise ValueError(f"{path}: expected {key} to be finite numbers {wanted}, found {found}")
        return a

    v = array("v_template", None, 3).astype(np.float64)
    V = len(v)
    shapedirs = array("shapedirs", V, 3, None)[:, :, :N_SHAPE].astype(np.float64)
    if shapedirs.shape[2] < N_SHAPE:
        raise ValueError(f"{path}: expected shapedirs with at least {N_SHAPE} shapes, found {shapedirs.shape[2]}")
    parents, order = array("kintree_table", 2, None).astype(np.int64)
    if len(parents) != N_JOINTS:
        raise ValueError(f"{path}: expected SMPL's {N_JOINTS} joints in kintree_table, found {len(parents)} (SMPL-H has 52 "
                         "and SMPL-X 55: take the model that is called SMPL)")
    parents = [-1 if j == 0 else int(p) for j, p in enumerate(parents)]
    if (order != np.arange(N_JOINTS)).any() or any(not 0 <= p < j for j, p in enumerate(parents) if j):
        raise ValueError(f"{path}: expected kintree_table to list every joint after its parent")
    faces = array("f", None, 3).astype(np.int64)
    if not len(faces) or faces.min() < 0 or faces.max() >= V:
        raise ValueError(f"{path}: expected faces f of vertices 0 to {V - 1}")
    return SMPL(v, shapedirs, array("posedirs", V, 3, 9 * (N_JOINTS - 1)).astype(np.float64),
                array("J_regressor", N_JOINTS, V).astype(np.float64), array("weights", V, N_JOINTS).astype(np.float64),
                parents, faces)


def is_model(name: str) -> bool:
    """Whether a file of this name is an SMPL model; SMPL-H, SMPL-X and MANO are others."""
    return bool(re.fullmatch(r".*(smpl|basic_?model).*\.(pkl|npz)", name.lower())) and not re.search(
        OTHER_MODELS, name.lower())


def neutral(paths: list[Path]) -> Path:
    """Of several model files the neutral one; the first, if none is."""
    return min(paths, key=lambda p: "neutral" not in p.name.lower())


def read_regressor(path: Path, model: SMPL) -> np.ndarray:
    """The 17 joints out of the V vertices, [17, V], in Human3.6M's order.

    Files of this name differ: SPIN's has the left leg first, Human3.6M's order the right one, and the arms are alike. The
    joints of the rest pose tell, since left is +x there.
    """
    R, V = load_arrays(path)[""], len(model.v_template)
    if R.dtype.kind != "f" or R.shape != (17, V) or not (np.abs(R.sum(1) - 1) < 0.05).all():
        raise ValueError(f"{path}: expected finite numbers [17, {V}] whose rows sum to 1, found {R.dtype} {list(R.shape)}")
    x, order, swapped = R @ model.v_template[:, 0], np.arange(17), []
    for limbs, right, left in (("legs", RIGHT[:3], LEFT[:3]), ("arms", RIGHT[3:], LEFT[3:])):
        right, left = list(right), list(left)
        if (x[right] > 0).all() and (x[left] < 0).all():
            order[right + left] = left + right
            swapped.append(limbs)
        elif not ((x[right] < 0).all() and (x[left] > 0).all()):
            raise ValueError(f"{path}: expected rows {right} and {left} on the two sides of the body ({limbs}), found "
                             f"them at x = {', '.join(f'{v:.2f}' for v in x[right + left])} m")
    if swapped:
        print(f"{path}: left and right {' and '.join(swapped)} swapped, since Human3.6M's order is the other way round")
    return R[order].astype(np.float64)
