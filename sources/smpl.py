"""SMPL (Loper et al. 2015) without its mesh: the points that Human3.6M, 3DPW and AMASS need.

The body model is licensed, and users bring its file. `read` takes the official .pkl (without
chumpy, and without running anything in it) or an .npz with the same keys.

A regressor R [P, V] makes P points out of the V vertices. A vertex is a sum over joints of rigid
motions of a blended rest position, and therefore so is a point. Nobody has to pose 6890 vertices:

    point_p = sum_j T_j(pose) M_pj      M_pj = sum_v R_pv W_vj [rest_v; 1]
    rest = template + shape blend + pose blend
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hipart import LEFT, RIGHT
from sources.files import shown
from sources.geometry import quat_from_rotvec, quat_to_matrix
from sources.safe_pickle import described, load_arrays, load_pickle

N_JOINTS, N_SHAPE = 24, 10
LARGEST = 512 << 20  # bytes: a model with 300 shapes has 250 MB, if its numbers are text
MOST = 10_000_000  # numbers of one of its arrays: 300 shapes have 6.2 million
MOST_VERTICES = 10_000  # SMPL has 6890
OTHER_MODELS = "smpl-?[hx]|mano"  # in the names of files that are not SMPL
REGRESSOR_NAME = r"j_regressor_h36m.*\.npy"
# For each of Human3.6M's 17 joints the nearest of SMPL's 24 in the rest pose. Only the coarsening
# goes by it.
TO_H36M = [0, 2, 5, 8, 1, 4, 7, 6, 12, 15, 15, 16, 18, 20, 17, 19, 21]


@dataclass
class SMPL:
    """A body model of V vertices. Lengths are in metres."""

    v_template: np.ndarray  # [V, 3]
    shapedirs: np.ndarray  # [V, 3, 10]
    posedirs: np.ndarray  # [V, 3, 207]
    J_regressor: np.ndarray  # [24, V]
    weights: np.ndarray  # [V, 24], of the skinning
    parents: list[int]  # of the 24 joints, -1 for the root
    faces: np.ndarray  # [F, 3]

    def joints(self, shape: np.ndarray) -> np.ndarray:
        """Joints of the rest pose: shape [N, 10] -> [N, 24, 3] m."""
        directions = np.einsum("jv,vck->jck", self.J_regressor, self.shapedirs)
        return self.J_regressor @ self.v_template + np.einsum("jck,nk->njc", directions, shape)

    def posed(self, pose: np.ndarray, shape: np.ndarray, trans: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray]:
        """How each joint is turned and where it is.

        pose [N, 24, 3] axis-angle, shape [N, 10], trans [N, 3] m -> [N, 24, 3, 3], [N, 24, 3] m
        """
        rest, local = self.joints(shape), quat_to_matrix(quat_from_rotvec(pose))
        turn, place = np.empty_like(local), np.empty_like(rest)
        for j, parent in enumerate(self.parents):
            if parent < 0:  # the root turns about its joint, not about the origin
                turn[:, j], place[:, j] = local[:, j], rest[:, j] + trans
                continue
            turn[:, j] = turn[:, parent] @ local[:, j]
            offset = rest[:, j] - rest[:, parent]
            place[:, j] = place[:, parent] + np.einsum("nij,nj->ni", turn[:, parent], offset)
        return turn, place


class Points:
    """Points regressed from posed bodies, in metres:
    Points(model, R [P, V])(pose [N, 24, 3] axis-angle, shape [N, 10], trans [N, 3]) -> [N, P, 3].
    """

    def __init__(self, model: SMPL, regressor: np.ndarray):
        self.model, P, V = model, len(regressor), len(model.v_template)
        # M_pj is linear in (1, shape, pose blend): one table of it for each of these 218 numbers.
        basis = [model.v_template[:, :, None], model.shapedirs, model.posedirs]
        basis = np.concatenate(basis, 2).reshape(V, -1)
        rest = np.stack([(regressor * w) @ basis for w in model.weights.T])  # [24, P, 3 * 218]
        rest = rest.reshape(N_JOINTS, P, 3, -1).transpose(3, 1, 0, 2)
        self.M = np.ascontiguousarray(rest.reshape(-1, P * N_JOINTS * 3))
        self.share = regressor @ model.weights  # [P, 24], how much of a point hangs on each joint

    def __call__(self, pose: np.ndarray, shape: np.ndarray, trans: np.ndarray) -> np.ndarray:
        pose, shape, trans = (np.asarray(a, np.float64) for a in (pose, shape, trans))
        n, p = len(pose), len(self.share)
        if not n:
            return np.zeros((0, p, 3))
        bent = quat_to_matrix(quat_from_rotvec(pose[:, 1:])) - np.eye(3)
        blend = np.concatenate([np.ones((n, 1)), shape, bent.reshape(n, -1)], 1)  # [N, 218]
        rest = (blend @ self.M).reshape(n, p, N_JOINTS, 3)
        turn, place = self.model.posed(pose, shape, trans)
        # A joint takes a point of the rest pose to turn @ point + shift.
        shift = place - np.einsum("njab,njb->nja", turn, self.model.joints(shape))
        # The sum over joints and coordinates is one product a sample: [P, 72] @ [72, 3].
        turned = rest.reshape(n, p, -1) @ turn.transpose(0, 1, 3, 2).reshape(n, -1, 3)
        return turned + self.share @ shift


def read(path: Path) -> SMPL:
    """An SMPL file (.pkl or .npz). Raises ValueError, with one sentence, on anything else."""
    is_npz = path.suffix.lower() == ".npz"
    content = load_arrays(path, LARGEST) if is_npz else load_pickle(path, LARGEST)
    name = shown(path, 4096)
    if not isinstance(content, dict):
        raise ValueError(f"{name} is no SMPL model: expected a dictionary of arrays, "
                         f"found {described(content)}")

    def array(key: str, *shape) -> np.ndarray:
        """The finite numbers of a key, in the given shape (None: any)."""
        if key not in content:
            raise ValueError(f"{name} is no SMPL model: it has no {key}")
        a = content[key]
        if not _is_numbers(a, shape):
            wanted = [s if s is not None else "any" for s in shape]
            raise ValueError(f"{name}: expected {key} to be finite numbers {wanted}, at most "
                             f"{MOST}, found {described(a)}")
        return a

    v = array("v_template", None, 3).astype(np.float64)
    V = len(v)
    if V > MOST_VERTICES:
        raise ValueError(f"{name}: expected at most {MOST_VERTICES} vertices, found {V}")
    shapedirs = array("shapedirs", V, 3, None)[:, :, :N_SHAPE].astype(np.float64)
    if shapedirs.shape[2] < N_SHAPE:
        raise ValueError(f"{name}: expected shapedirs with at least {N_SHAPE} shapes, "
                         f"found {shapedirs.shape[2]}")
    parents, order = array("kintree_table", 2, None).astype(np.int64)
    if len(parents) != N_JOINTS:
        raise ValueError(f"{name}: expected SMPL's {N_JOINTS} joints in kintree_table, found "
                         f"{len(parents)} (SMPL-H has 52 and SMPL-X 55: take the model that is "
                         "called SMPL)")
    parents = [-1 if j == 0 else int(p) for j, p in enumerate(parents)]
    in_order = all(0 <= p < j for j, p in enumerate(parents) if j)
    if (order != np.arange(N_JOINTS)).any() or not in_order:
        raise ValueError(f"{name}: expected kintree_table to list every joint after its parent")
    faces = array("f", None, 3).astype(np.int64)
    if not 0 < len(faces) <= 2 * V or faces.min() < 0 or faces.max() >= V:
        raise ValueError(f"{name}: expected faces f of vertices 0 to {V - 1}, at most {2 * V} of "
                         "them as on any closed body")
    posedirs = array("posedirs", V, 3, 9 * (N_JOINTS - 1)).astype(np.float64)
    J_regressor = array("J_regressor", N_JOINTS, V).astype(np.float64)
    weights = array("weights", V, N_JOINTS).astype(np.float64)
    return SMPL(v, shapedirs, posedirs, J_regressor, weights, parents, faces)


def _is_numbers(a, shape: tuple) -> bool:
    return (
        isinstance(a, np.ndarray)
        and a.dtype.kind in "fiu"
        and a.ndim == len(shape)
        and a.size <= MOST
        and all(s in (None, n) for s, n in zip(shape, a.shape, strict=True))
        and bool(np.isfinite(a).all())
    )


def is_model(name: str) -> bool:
    """Whether a file of this name is an SMPL model; SMPL-H, SMPL-X and MANO are others."""
    name = name.lower()
    if re.search(OTHER_MODELS, name):
        return False
    return bool(re.fullmatch(r".*(smpl|basic_?model).*\.(pkl|npz)", name))


def neutral(paths: list[Path]) -> Path:
    """Of several model files the neutral one; the first, if none is."""
    return min(paths, key=lambda p: "neutral" not in p.name.lower())


def read_regressor(path: Path, model: SMPL) -> np.ndarray:
    """The matrix [17, V] that makes Human3.6M's 17 joints, in its order, out of the V vertices.

    Files of this name differ: SPIN's has the left leg first, and Human3.6M's order the right one.
    The joints of the rest pose tell which it is, since left is at +x there. Raises ValueError, with
    one sentence, if it is neither.
    """
    R, V, name = load_arrays(path)[""], len(model.v_template), shown(path, 4096)
    is_regressor = R.dtype.kind == "f" and R.shape == (17, V)
    if not is_regressor or not (np.abs(R.sum(1) - 1) < 0.05).all():  # NaN is not near 1
        raise ValueError(f"{name}: expected finite numbers [17, {V}] whose rows sum to 1, "
                         f"found {described(R)}")
    x, order, swapped = R @ model.v_template[:, 0], np.arange(17), []
    for limbs, right, left in (("legs", RIGHT[:3], LEFT[:3]), ("arms", RIGHT[3:], LEFT[3:])):
        right, left = list(right), list(left)
        if (x[right] > 0).all() and (x[left] < 0).all():
            order[right + left] = left + right
            swapped.append(limbs)
        elif not ((x[right] < 0).all() and (x[left] > 0).all()):
            at = ", ".join(f"{v:.3g}" for v in x[right + left])
            raise ValueError(f"{name}: expected rows {right} and {left} on the two sides of the "
                             f"body ({limbs}), found them at x = {at} m")
    if swapped:
        print(f"{name}: left and right {' and '.join(swapped)} swapped, "
              "since Human3.6M's order is the other way round")
    return R[order].astype(np.float64)
