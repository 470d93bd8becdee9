"""sources/smpl.py: points against a body that is posed vertex by vertex, and the model files."""

import math
import pickle

import numpy as np
import pytest
from conftest import FUZZ, SMPL_JOINTS, SMPL_PARENTS, smpl_content, write_smpl_pkl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sources import smpl


@pytest.fixture(scope="module")
def content():
    return smpl_content(10, 8)


@pytest.fixture(scope="module")
def model(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("smpl") / "model.pkl"
    write_smpl_pkl(path, content)
    return smpl.read(path)


def rodrigues(v):
    angle = np.linalg.norm(v)
    k = v / max(angle, 1e-30)
    K = np.array([[0, -k[2], k[1]], [k[2], 0, -k[0]], [-k[1], k[0], 0]])
    return np.eye(3) + math.sin(angle) * K + (1 - math.cos(angle)) * K @ K


def direct(content, pose, shape, trans):
    """The model as its paper has it: one body, 4 x 4 matrices, a loop over the vertices.
    -> vertices [V, 3]"""
    rest = content["v_template"] + content["shapedirs"] @ shape
    joints = content["J_regressor"] @ rest
    R = [rodrigues(v) for v in pose]
    rest = rest + content["posedirs"] @ np.concatenate([(r - np.eye(3)).ravel() for r in R[1:]])
    world = []
    for j, parent in enumerate(SMPL_PARENTS):
        local = np.eye(4)
        local[:3, :3], local[:3, 3] = R[j], joints[j] - (joints[parent] if j else 0)
        world.append(world[parent] @ local if j else local)
    out = np.zeros_like(rest)
    for v in range(len(rest)):
        for j in range(24):
            back = np.eye(4)
            back[:3, 3] = -joints[j]
            out[v] += content["weights"][v, j] * (world[j] @ back @ np.append(rest[v], 1))[:3]
    return out + trans


@pytest.mark.parametrize("size", [0, 1e-9, 0.3, 3.0])
def test_points_equal_a_body_posed_vertex_by_vertex(content, model, size):
    rng = np.random.default_rng(1)
    regressor = rng.normal(size=(7, len(content["v_template"])))
    pose = rng.normal(size=(3, 24, 3)) * size
    shape, trans = rng.normal(size=(3, 10)), rng.normal(size=(3, 3))
    found = smpl.Points(model, regressor)(pose, shape, trans)
    for i in range(3):
        expected = regressor @ direct(content, pose[i], shape[i], trans[i])
        assert np.abs(found[i] - expected).max() < 1e-9  # m: a thousandth of a micrometre


def test_joints_are_where_the_regressor_puts_them(model):
    assert np.allclose(model.joints(np.zeros((1, 10)))[0], SMPL_JOINTS, atol=1e-12)


def test_a_full_size_model_of_either_kind(tmp_path):
    content = smpl_content()
    assert content["v_template"].shape == (6890, 3) and content["f"].shape == (13776, 3)
    write_smpl_pkl(tmp_path / "model.pkl", content)
    np.savez(tmp_path / "model.npz", **content)
    for name in ("model.pkl", "model.npz"):
        m = smpl.read(tmp_path / name)
        assert m.parents == SMPL_PARENTS
        for key in ("v_template", "shapedirs", "posedirs", "J_regressor", "weights"):
            assert np.array_equal(getattr(m, key), content[key]), (name, key)
        assert np.array_equal(m.faces, content["f"])


@pytest.mark.parametrize("change, expected", [
    (lambda c: c.pop("posedirs"), "it has no posedirs"),
    (lambda c: c.update(weights=c["weights"][:, :23]), "expected weights to be finite numbers"),
    (lambda c: c.update(v_template=c["v_template"] * np.nan), "expected v_template to be finite"),
    (lambda c: c.update(v_template="a string"), "found str"),
    (lambda c: c.update(shapedirs=c["shapedirs"][:, :, :9]), "at least 10 shapes"),
    (lambda c: c.update(kintree_table=c["kintree_table"][:, :22]), "found 22"),
    (lambda c: c.update(kintree_table=c["kintree_table"][:, ::-1]), "every joint after its parent"),
    (lambda c: c.update(f=c["f"] + 9999), "expected faces"),
    (lambda c: c.update(f=np.zeros((4_000_000, 3), "u1")), "most 10000000, found uint8 .4000000"),
    (lambda c: c.update(f=np.tile(c["f"], (2, 1))), "at most 164 of them"),
    (lambda c: c.update(v_template=np.zeros((10_001, 3))), "at most 10000 vertices, found 10001"),
    (lambda c: c.update({"\x1b[31m": 0}) or c.pop("f"), "it has no f$"),
    (lambda c: c.update(weights=np.zeros((1 << 40, 0), "f4")), "the shape of one of its arrays"),
])  # fmt: skip
def test_other_files_get_one_sentence(tmp_path, content, change, expected):
    bad = dict(content)
    change(bad)
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps(bad, protocol=2))
    with pytest.raises(ValueError, match=expected) as e:
        smpl.read(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


@given(st.data())
@settings(max_examples=150 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_mutated_models_are_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated_smpl.pkl"
    write_smpl_pkl(path, _SMALL)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        start = data.draw(st.integers(0, len(raw)))
        kind = data.draw(st.sampled_from(["cut", "byte", "insert"]))
        if kind == "cut":
            del raw[start : start + data.draw(st.integers(1, 2000))]
        else:
            raw[start : start + (kind == "byte")] = data.draw(st.binary(min_size=1, max_size=8))
    path.write_bytes(raw)
    try:
        model = smpl.read(path)
    except ValueError as e:
        assert str(path) in str(e) and "\n" not in str(e)
    else:
        assert np.isfinite(model.posedirs).all()


_SMALL = smpl_content(3, 3)
