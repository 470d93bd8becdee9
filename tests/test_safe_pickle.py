"""sources/safe_pickle.py: nothing runs, nothing takes much memory, and arrays of every kind come
back as NumPy reads them."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from sources import safe_pickle
from sources.keypoints import read
from sources.safe_pickle import load_arrays

# --------------------------------------------------------------------------------------------------
# Files of NumPy, as sources/keypoints.py reads them


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_no_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = np.empty((), object)
    array[()] = {"S1": Evil()}
    np.savez(tmp_path / "evil.npz", positions_2d=array, metadata=array)
    for f in (load_arrays, read):
        with pytest.raises(ValueError, match="evil.npz.*only arrays are read here"):
            f(tmp_path / "evil.npz")
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, dict(descr="|O", fortran_order=False, shape=()))
    buffer.write(pickle.dumps(eval))
    (tmp_path / "evil.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="builtins.eval"):
        read(tmp_path / "evil.npy")
    assert not (tmp_path / "pwned").exists()


def raw_pickle(path, *opcodes):
    """A .npy of an object array whose pickle is these bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, dict(descr="|O", fortran_order=False, shape=()))
    path.write_bytes(buffer.getvalue() + b"\x80\x04" + b"".join(opcodes) + b".")
    return path


NDARRAY, DTYPE = b"cnumpy\nndarray\n", b"cnumpy\ndtype\n"


@pytest.mark.parametrize("opcodes", [
    # object pointers out of raw bytes
    (NDARRAY, b"K\x02\x85X\x01\x00\x00\x00OC\x10", bytes(16), b"\x87R"),
    (NDARRAY, b"J\x00\x00\x00\x40\x85X\x02\x00\x00\x00f8\x86R"),  # memory that nobody has filled
    (DTYPE, b"X\x03\x00\x00\x00V16\x85R"),  # a record, whose parts may be objects
    (b"]r\xff\xff\xff\x7f"),  # memo entry two thousand million
    (b"]q\x00h\x00a"),  # a list that holds itself
    (b"cnumpy\nload\n)R"),
    (b"cbuiltins\nexec\nX\x01\x00\x00\x001\x85R"),
    (b"\x82\x01"),
    (b"X\x01\x00\x00\x00aQ"),
], ids=range(9))  # fmt: skip
def test_unusual_pickles_are_refused(tmp_path, opcodes):
    path = raw_pickle(tmp_path / "a.npy", *([opcodes] if isinstance(opcodes, bytes) else opcodes))
    with pytest.raises(ValueError, match="a.npy is not a NumPy file that can be read"):
        read(path)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_arrays_of_every_kind_come_back(tmp_path, protocol):
    """As NumPy itself reads them, whatever pickle wrote them; names of NumPy 1 and 2."""
    inner = dict(
        a=np.arange(6.0).reshape(2, 3),
        b=[np.float32(2), None, (1, "text")],
        c=np.asfortranarray(np.ones((3, 2), ">i2")),
        d=np.array([["x", "yy"]]),
        e=np.array([1, None, "s"], object),
        f=np.zeros((0, 17, 2), np.float32),
    )
    outer = np.empty((), object)
    outer[()] = inner
    for core in (b"numpy._core", b"numpy.core"):
        content = pickle.dumps(outer, protocol=protocol)[2:-1]
        if protocol < 4:
            content = content.replace(b"cnumpy._core.", b"c" + core + b".")
        path = raw_pickle(tmp_path / "a.npy", content)
        found = load_arrays(path)[""].item()
        assert found.keys() == inner.keys() and found["b"] == [np.float32(2), None, [1, "text"]]
        for key in "acdef":
            assert found[key].dtype == inner[key].dtype and np.array_equal(found[key], inner[key])


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z,
        z.open("a.npy", "w", force_zip64=True) as f,
    ):
        for _ in range(300):
            f.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="unpacks to more than"):
        read(tmp_path / "bomb.npz")


def test_a_header_that_promises_too_much(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, dict(descr="<f4", fortran_order=False, shape=(10**12, 17, 3))
    )
    (tmp_path / "a.npy").write_bytes(buffer.getvalue() + bytes(100))
    with pytest.raises(ValueError, match="size of one of its arrays"):
        read(tmp_path / "a.npy")


# --------------------------------------------------------------------------------------------------
# Pickles


class Exits:
    def __reduce__(self):
        return exec, ("raise SystemExit('this ran')",)


@pytest.mark.parametrize("raw", [
    pickle.dumps(Exits()), pickle.dumps({"v_template": Exits()}, protocol=2), pickle.dumps([len]),
    b"cos\nsystem\n(S'true'\ntR.", b"c__builtin__\nobject\nc__builtin__\nobject\nN\x87R.",
    b"ccopy_reg\n_reconstructor\n(c__builtin__\nobject\nc__builtin__\nobject\nNtR.",
], ids=["call", "within", "name", "system", "object", "reconstructor"])  # fmt: skip
def test_nothing_of_a_pickle_runs(tmp_path, raw):
    path = tmp_path / "evil.pkl"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="is not a pickle that can be read"):
        safe_pickle.load_pickle(path)


@pytest.mark.parametrize("change", [
    dict(indptr=np.array([0, 1])), dict(indices=np.array([5, 0])),
    dict(_shape=(10**6, 10**6)), dict(_shape=None),
    dict(indptr=np.array([0, 2, 1, 2])), dict(data=np.zeros(9)),
])  # fmt: skip
def test_sparse_matrices_that_contradict_themselves(change):
    made = safe_pickle._Sparse()
    good = dict(
        _shape=(2, 3),
        data=np.array([1.0, 2.0]),
        indices=np.array([0, 1]),
        indptr=np.array([0, 1, 1, 2]),
    )
    made.__setstate__(good)
    assert made.real({}).tolist() == [[1, 0, 0], [0, 0, 2]]
    rows = safe_pickle._SparseRows()
    rows.__setstate__(good | dict(_shape=(np.int64(3), np.int32(2))))
    assert rows.real({}).tolist() == [[1, 0], [0, 0], [0, 2]]
    made.__setstate__(good | change)
    with pytest.raises((ValueError, TypeError)):
        made.real({})


# --------------------------------------------------------------------------------------------------
# Pickles that are small and want much


def word(text):
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def name(module, what):
    return f"c{module}\n{what}\n".encode()


def laughs(levels, then):
    """A list that holds the one before twice, and so on: tiny in the file, endless when it is
    written out. It is memo `levels`."""
    return (
        b"(]K\x01aq\x00"
        + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(levels))
        + b"1"
        + then
    )


ATTACKS = {
    "deep key": b"})" + b"\x85" * 100_000 + b"K\x01s.",
    "key that doubles": b"})" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"K\x01s.",
    "keys at once": b"}(" + b")" + b"\x85" * 1000 + b"K\x01u.",
    "set of deep things": b"\x8f(" + b")" + b"\x85" * 100_000 + b"\x90.",
    "memory before reading": b"\x96" + struct.pack("<Q", 1 << 46) + b".",
    "dtype": name("numpy", "dtype") + b"q\xf0" + laughs(40, b"h\xf0h\x28\x85R."),
    "chumpy": laughs(40, name("chumpy.ch", "Ch") + b")R}" + word("x") + b"h\x28sb."),
    "state of a function": name("numpy", "dtype")
    + b"N}"
    + word("__defaults__")
    + word("f8")
    + b"\x85s\x86b0N.",
    "state of a class": name("chumpy.ch", "Ch") + b"}" + word("real") + b"K\x01sb0N.",
}


# Reads the pickle that it is given, and says how long the refusal is.
LITTLE_MEMORY = """
import pathlib, resource, sys
from sources import safe_pickle

def state():
    stand_ins = safe_pickle._ArraysOnly.stand_ins
    return {k: vars(v).copy() for k, v in stand_ins.items() if hasattr(v, "__dict__")}

resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
before = state()
try:
    safe_pickle.load_pickle(pathlib.Path(sys.argv[1]))
except ValueError as e:
    print(len(str(e)))
assert before == state()
assert not safe_pickle._ArraysOnly.stand_ins["numpy", "dtype"].__defaults__
"""


@pytest.mark.parametrize("attack", ATTACKS)
def test_small_pickles_that_want_much_are_refused_at_once(tmp_path, attack):
    """In a process of its own, with little memory: some of these ended it."""
    path = tmp_path / "attack.pkl"
    path.write_bytes(b"\x80\x04" + ATTACKS[attack])
    command = [sys.executable, "-c", LITTLE_MEMORY, path]
    root = Path(safe_pickle.__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    said = done.returncode, done.stderr[-300:]
    assert done.returncode == 0 and 0 < int(done.stdout) < 600, said


def test_limits_and_orders_of_arrays(tmp_path, monkeypatch):
    path = tmp_path / "a.pkl"
    a = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    path.write_bytes(pickle.dumps({"a": a, "b": a.astype(">i2")}, protocol=2))
    found = safe_pickle.load_pickle(path)
    assert (
        np.array_equal(found["a"], a)
        and np.array_equal(found["b"], a)
        and found["b"].dtype == ">i2"
    )
    with pytest.raises(ValueError, match="has more than 0 MB"):
        safe_pickle.load_pickle(path, 100)
    made = safe_pickle._Sparse()
    made.__setstate__(
        dict(
            _shape=(4000, 4000),
            data=np.zeros(0),
            indices=np.zeros(0, int),
            indptr=np.zeros(4001, int),
        )
    )
    with pytest.raises(ValueError, match="contradicts itself"):
        made.real({})
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as z:
        z.writestr("x.npy", b"")
    with pytest.raises(ValueError, match="packed in a way"):
        safe_pickle.load_arrays(tmp_path / "a.npz")
