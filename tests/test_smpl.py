"""smpl.py and safe_pickle.py: the regressed points against a body that is posed vertex by vertex, and the files."""

import math
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import FUZZ, SMPL_JOINTS, SMPL_PARENTS, smpl_content, write_smpl_pkl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import safe_pickle
import smpl


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
    """The model as its paper has it: one body, 4 x 4 matrices, a loop over the vertices -> vertices [V, 3]."""
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
    pose, shape, trans = rng.normal(size=(3, 24, 3)) * size, rng.normal(size=(3, 10)), rng.normal(size=(3, 3))
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
])  # fmt: skip
def test_other_files_get_one_sentence(tmp_path, content, change, expected):
    bad = dict(content)
    change(bad)
    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps(bad, protocol=2))
    with pytest.raises(ValueError, match=expected) as e:
        smpl.read(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('this ran')",)


@pytest.mark.parametrize("raw", [
    pickle.dumps(Evil()), pickle.dumps({"v_template": Evil()}, protocol=2), pickle.dumps([len]),
    b"cos\nsystem\n(S'true'\ntR.", b"c__builtin__\nobject\nc__builtin__\nobject\nN\x87R.",
    b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR.",
], ids=["call", "within", "name", "system", "object", "reconstructor"])  # fmt: skip
def test_nothing_of_a_pickle_runs(tmp_path, raw):
    path = tmp_path / "evil.pkl"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="is not a pickle that can be read"):
        safe_pickle.load_pickle(path)


@pytest.mark.parametrize("change", [
    dict(indptr=np.array([0, 1])), dict(indices=np.array([5, 0])), dict(_shape=(10**6, 10**6)), dict(_shape=None),
    dict(indptr=np.array([0, 2, 1, 2])), dict(data=np.zeros(9)),
])  # fmt: skip
def test_sparse_matrices_that_contradict_themselves(change):
    made = safe_pickle._Sparse()
    good = dict(_shape=(2, 3), data=np.array([1.0, 2.0]), indices=np.array([0, 1]), indptr=np.array([0, 1, 1, 2]))
    made.__setstate__(good)
    assert made.real({}).tolist() == [[1, 0, 0], [0, 0, 2]]
    rows = safe_pickle._SparseRows()
    rows.__setstate__(good | dict(_shape=(np.int64(3), np.int32(2))))
    assert rows.real({}).tolist() == [[1, 0], [0, 0], [0, 2]]
    made.__setstate__(good | change)
    with pytest.raises((ValueError, TypeError)):
        made.real({})


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


# ----------------------------------------------------------------------------------------------------------------------
# Pickles that are small and want much


def word(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def name(module, what):
    return f"c{module}\n{what}\n".encode()


def laughs(levels, then):
    """A list that holds the one before twice, and so on: tiny in the file, endless when written out. It is memo `levels`."""
    return b"(]K\x01aq\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(levels)) + b"1" + then


ATTACKS = {
    "deep key": b"})" + b"\x85" * 100_000 + b"K\x01s.",
    "key that doubles": b"})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"K\x01s.",
    "keys at once": b"}(" + b")" + b"\x85" * 1000 + b"K\x01u.",
    "set of deep things": b"\x8f(" + b")" + b"\x85" * 100_000 + b"\x90.",
    "memory before reading": b"\x96" + struct.pack("<Q", 1 << 46) + b".",
    "dtype": name("numpy", "dtype") + b"q\xf0" + laughs(40, b"h\xf0h\x28\x85R."),
    "chumpy": laughs(40, name("chumpy.ch", "Ch") + b")R}" + word("x") + b"h\x28sb."),
    "state of a function": name("numpy", "dtype") + b"N}" + word("__defaults__") + word("f8") + b"\x85s\x86b0N.",
    "state of a class": name("chumpy.ch", "Ch") + b"}" + word("real") + b"K\x01sb0N.",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_small_pickles_that_want_much_are_refused_at_once(tmp_path, attack):
    """In a process of its own, with little memory: some of these ended it."""
    path = tmp_path / "attack.pkl"
    path.write_bytes(b"\x80\x04" + ATTACKS[attack])
    code = ("import resource, sys, pathlib, safe_pickle\n"
            "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\nresource.setrlimit(resource.RLIMIT_CPU, (20, 20))\n"
            "before = {k: vars(v).copy() for k, v in safe_pickle._ArraysOnly.stand_ins.items() if hasattr(v, '__dict__')}\n"
            "try:\n    safe_pickle.load_pickle(pathlib.Path(sys.argv[1]))\nexcept ValueError as e:\n    print(len(str(e)))\n"
            "after = {k: vars(v).copy() for k, v in safe_pickle._ArraysOnly.stand_ins.items() if hasattr(v, '__dict__')}\n"
            "assert before == after and not safe_pickle._ArraysOnly.stand_ins['numpy', 'dtype'].__defaults__")
    done = subprocess.run([sys.executable, "-c", code, path], cwd=Path(smpl.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0 and 0 < int(done.stdout) < 600, (done.returncode, done.stderr[-300:])


def test_limits_and_orders_of_arrays(tmp_path, monkeypatch):
    path = tmp_path / "a.pkl"
    a = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    path.write_bytes(pickle.dumps({"a": a, "b": a.astype(">i2")}, protocol=2))
    found = safe_pickle.load_pickle(path)
    assert np.array_equal(found["a"], a) and np.array_equal(found["b"], a) and found["b"].dtype == ">i2"
    with pytest.raises(ValueError, match="has more than 0 MB"):
        safe_pickle.load_pickle(path, 100)
    made = safe_pickle._Sparse()
    made.__setstate__(dict(_shape=(4000, 4000), data=np.zeros(0), indices=np.zeros(0, int), indptr=np.zeros(4001, int)))
    with pytest.raises(ValueError, match="contradicts itself"):
        made.real({})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as z:
        z.writestr("x.npy", b"")
    with pytest.raises(ValueError, match="packed in a way"):
        safe_pickle.load_arrays(tmp_path / "a.npz")
