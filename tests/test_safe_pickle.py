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
from sources.safe_pickle import load_arrays, load_pickle

# --------------------------------------------------------------------------------------------------
# Files of NumPy


class Evil:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_no_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = np.empty((), object)
    array[()] = {"S1": Evil()}
    np.savez(tmp_path / "evil.npz", positions_2d=array, metadata=array)
    with pytest.raises(ValueError, match="evil.npz.*only arrays are read here"):
        load_arrays(tmp_path / "evil.npz")
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, dict(descr="|O", fortran_order=False, shape=()))
    buffer.write(pickle.dumps(eval))
    (tmp_path / "evil.npy").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="builtins.eval"):
        load_arrays(tmp_path / "evil.npy")
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
    (b"\x8f(K\x01\x90"),  # a set
    (b"\x8b\x01\x00\x00\x00\x01"),  # a number that may be as long as the file
    (b"X\x01\x00\x00\x00aa"),  # appends to a text
    (b"cnumpy\nload\n)R"),
    (b"cbuiltins\nexec\nX\x01\x00\x00\x001\x85R"),
    (b"\x82\x01"),
    (b"X\x01\x00\x00\x00aQ"),
], ids=range(12))  # fmt: skip
def test_unusual_pickles_are_refused(tmp_path, opcodes):
    path = raw_pickle(tmp_path / "a.npy", *([opcodes] if isinstance(opcodes, bytes) else opcodes))
    with pytest.raises(ValueError, match="a.npy is not a NumPy file that can be read"):
        load_arrays(path)


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
    bomb = zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED)
    with bomb, bomb.open("a.npy", "w", force_zip64=True) as f:
        for _ in range(300):
            f.write(bytes(1 << 20))
    with pytest.raises(ValueError, match="unpacks to more than"):
        load_arrays(tmp_path / "bomb.npz")


def test_a_header_that_promises_too_much(tmp_path):
    buffer = io.BytesIO()
    header = dict(descr="<f4", fortran_order=False, shape=(10**12, 17, 3))
    np.lib.format.write_array_header_1_0(buffer, header)
    (tmp_path / "a.npy").write_bytes(buffer.getvalue() + bytes(100))
    with pytest.raises(ValueError, match="size of one of its arrays"):
        load_arrays(tmp_path / "a.npy")


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


def sparse(rows, **state):
    """The pickle of a sparse matrix of SciPy."""
    kind = b"cscipy.sparse.csr\ncsr_matrix\n" if rows else b"cscipy.sparse.csc\ncsc_matrix\n"
    return b"\x80\x02" + kind + b")\x81" + pickle.dumps(state, protocol=2)[2:-1] + b"b."


SPARSE = dict(_shape=(2, 3), data=np.array([1.0, 2.0]), indices=np.array([0, 1]),
              indptr=np.array([0, 1, 1, 2]))  # fmt: skip


def test_sparse_matrices_become_arrays(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(sparse(False, **SPARSE))
    assert load_pickle(path).tolist() == [[1, 0, 0], [0, 0, 2]]
    path.write_bytes(sparse(True, **SPARSE | dict(_shape=(np.int64(3), np.int32(2)))))
    assert load_pickle(path).tolist() == [[1, 0], [0, 0], [0, 2]]


@pytest.mark.parametrize("change", [
    dict(indptr=np.array([0, 1])), dict(indices=np.array([5, 0])),
    dict(_shape=(10**6, 10**6)), dict(_shape=(2, 10**12)), dict(_shape=None), dict(_shape=(-2, 3)),
    dict(indptr=np.array([0, 2, 1, 2])), dict(data=np.zeros(9)), dict(data=np.zeros((2, 1))),
    dict(_shape=(10**9, 1), indptr=np.array([0, 2])),
], ids=range(10))  # fmt: skip
def test_sparse_matrices_that_contradict_themselves(tmp_path, change):
    path = tmp_path / "a.pkl"
    path.write_bytes(sparse(False, **SPARSE | change))
    with pytest.raises(ValueError, match="a.pkl is not a pickle that can be read: "):
        load_pickle(path)


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
    "dtype": laughs(40, name("numpy", "dtype") + b"h\x28\x85R."),
    "chumpy": laughs(40, name("chumpy.ch", "Ch") + b")R}" + word("x") + b"h\x28sb."),
    "state of a function": name("numpy", "dtype")
    + b"N}"
    + word("__defaults__")
    + word("f8")
    + b"\x85s\x86b0N.",
    "state of a class": name("chumpy.ch", "Ch") + b"}" + word("real") + b"K\x01sb0N.",
}


def array(shape, dtype, raw):
    """An array, without a memo. shape and raw are what pushes them."""
    return (
        name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray")
        + b"K\x00\x85C\x01b\x87R(K\x01" + shape + name("numpy", "dtype") + word(dtype) + b"\x85R"
        + b"\x89" + raw + b"tb"
    )  # fmt: skip


def long(n):
    return b"\x8a\x0a" + n.to_bytes(10, "little", signed=True)


def zeros(n):
    return b"B" + struct.pack("<I", n) + bytes(n)


def again(things, use, n):
    """Memos 0, 1 ... are `things`, and a list has n times what `use` makes of them."""
    return b"".join(thing + b"\x940" for thing in things) + b"(" + use * n + b"l."


def dictionary(keys):
    return b"}(" + b"".join(key + b"N" for key in keys) + b"u."


ENCODE, SCALAR = name("_codecs", "encode"), name("numpy.core.multiarray", "scalar")
SPARSE_CLASS, SELECT = (name("scipy.sparse.csc", "csc_matrix"),
                        name("chumpy.reordering", "Select"))  # fmt: skip
MILLION = array(b"J" + struct.pack("<i", 10**6) + b"\x85", "f8", zeros(8 * 10**6))
ENDS = array(b"M\xa1\x0f\x85", "i4", zeros(4 * 4001))
NONE = array(b"K\x00\x85", "i4", b"C\x00")
P61 = (1 << 61) - 1  # Python's hash of a number is the number modulo this
ATTACKS |= {
    "a text encoded again and again": again(
        [ENCODE, word("x" * 200_000) + word("latin1") + b"\x86"], b"h\x00h\x01R", 20_000),
    "an array again and again": again([MILLION], b"h\x00", 501),
    "lists of an array that double": MILLION + b"\x94" + b"".join(
        b"](h%ch%ce\x94" % (i, i) for i in range(40)) + b".",
    "sparse matrices again and again": again(
        [SPARSE_CLASS, b"}(" + word("data") + NONE + word("indices") + NONE + word("indptr") + ENDS
         + word("_shape") + b"M\xa0\x0fM\xa0\x0f\x86u"], b"h\x00)\x81h\x01b", 50),
    "selections again and again": again(
        [SELECT, b"}(" + word("a") + MILLION + word("idxs")
         + array(b"J" + struct.pack("<i", 10**6) + b"\x85", "i1", zeros(10**6)) + b"u"],
        b"h\x00)\x81h\x01b", 200),
    "long texts as numbers": again(
        [SCALAR, DTYPE + word("U999999") + b"\x85R" + zeros(4 * 999_999) + b"\x86"],
        b"h\x00h\x01R", 1000),
    "object arrays of one list": again(
        [b"(" + b"N" * 100_000 + b"l"],
        array(b"J" + struct.pack("<i", 100_000) + b"\x85", "O8", b"h\x00"), 5000),
    "arguments out of a text": again(
        [name("numpy.core.multiarray", "_reconstruct"), word("x" * 500_000)],
        b"h\x00h\x01R", 20_000),
    "numbers that collide": dictionary(long(P61 * k) for k in range(60_000)),
    "fractions that collide": dictionary(
        b"G" + struct.pack(">d", float(P61 * k)) for k in range(60_000)),
    "many keys": dictionary(b"J" + struct.pack("<i", k) for k in range(20_001)),
    "memos that collide": b"N" + b"".join(b"p%d\n" % (P61 * k) for k in range(60_000)) + b".",
    "rows without numbers": array(long(1 << 40) + b"K\x00\x86", "f4", b"C\x00") + b".",
    "many instructions": b"N" * 3_000_000 + b".",
    "many dictionaries": b"(" + b"}" * 3_000_000 + b"l.",
    "a deep list": b"]" * 200_000 + b"a" * 199_999 + b".",
}


# Reads the files that it is given, and says for each how long the refusal is, and how much memory
# (MB) all have taken so far.
LITTLE_MEMORY = """
import pathlib, resource, sys
from sources import safe_pickle

def state():
    stand_ins = safe_pickle._ArraysOnly.stand_ins
    return {k: vars(v).copy() for k, v in stand_ins.items() if hasattr(v, "__dict__")}

resource.setrlimit(resource.RLIMIT_AS, (3 << 29, 3 << 29))
before = state()
for path in map(pathlib.Path, sys.argv[1:]):
    used = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    resource.setrlimit(resource.RLIMIT_CPU, (int(used) + 10, -1))
    try:
        read = safe_pickle.load_pickle if path.suffix == ".pkl" else safe_pickle.load_arrays
        print("read", type(read(path, 8 << 30)))
    except ValueError as e:
        # The peak of this process; ru_maxrss would be that of pytest, from which it was forked.
        status = pathlib.Path("/proc/self/status").read_text()
        print(len(str(e)), int(status.split("VmHWM:")[1].split()[0]) >> 10, flush=True)
assert before == state()
"""


def refused_with_little(paths):
    """All files are refused in a short sentence by a process of its own, within 1 GB and 10 s
    each."""
    command = [sys.executable, "-c", LITTLE_MEMORY, *paths]
    root = Path(safe_pickle.__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    said = [line.split() for line in done.stdout.splitlines()]
    last = paths[min(len(said), len(paths) - 1)].name
    assert done.returncode == 0 and len(said) == len(paths), (last, done.stderr[-300:])
    for path, (length, memory) in zip(paths, said, strict=True):
        assert length.isdigit() and int(length) < 600 and int(memory) < 1000, (path.name, memory)


def test_small_pickles_that_want_much_are_refused_at_once(tmp_path):
    for attack, raw in ATTACKS.items():
        (tmp_path / f"{attack}.pkl").write_bytes(b"\x80\x04" + raw)
    refused_with_little([tmp_path / f"{attack}.pkl" for attack in ATTACKS])


def npy(header, raw=b""):
    """A .npy file with a header of any text."""
    text = header.encode("latin1")
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + raw


def with_shape(shape, descr="'<f4'", raw=bytes(64)):
    return npy(f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n", raw)


HEADERS = {
    "negative": with_shape((-4, 4)), "too large": with_shape(((1 << 64) + 16,)),
    "truth": with_shape((16, True)), "no tuple": with_shape([16]), "none": with_shape(None),
    "endless loop": with_shape((1 << 40, 0, 17, 2), raw=b""), "deep": npy("(" * 900 + ")" * 900),
    "minus": npy("-" * 990 + "1"), "long": with_shape((16,), "'<f4'" + " " * 5000),
    "record": with_shape((8,), "[('a', '<f4'), ('b', '<f4')]"),
    "record of objects": with_shape((8,), "[('a', '|O'), ('b', '<f4')]"),
    "array in an array": with_shape((1,), "('<f4', (16,))"),
    "time": with_shape((8,), "'<M8[s]'"), "no size": with_shape((1 << 40,), "'<U0'"),
    "letters": with_shape((16,), "'<U1'", b"\xff" * 64),
    "pickle": npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }\n", b"garbage"),
    "no header": npy("print('\x1b[31mred')"), "zip": b"PK\x03\x04" + bytes(100), "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_headers_that_no_array_has(tmp_path, header):
    path = tmp_path / "a.npy"
    path.write_bytes(HEADERS[header])
    with pytest.raises(ValueError, match="a.npy is not a NumPy file that can be read: ") as e:
        load_arrays(path)
    assert len(str(e.value)) < 300 and str(e.value).isprintable() and "red" not in str(e.value)


def packed(path, pieces, members=("a.npy",)):
    """A zip file of a member that is as long as it takes, in pieces."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as z:
        for member in members:
            with z.open(member, "w", force_zip64=True) as f:
                for piece in pieces:
                    f.write(piece)


def test_small_zip_files_that_want_much_are_refused_at_once(tmp_path):
    header = npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }\n")
    text = b"\x8d" + struct.pack("<Q", 300 << 20) + "\N{PILE OF POO}".encode()
    packed(tmp_path / "zeros.npz", [bytes(1 << 20)] * 800)
    packed(tmp_path / "text.npz", [header, b"\x80\x04", text, *[b"a" * (1 << 20)] * 301])
    packed(tmp_path / "steps.npz", [header, b"\x80\x04", *[b"N" * (1 << 20)] * 300])
    packed(tmp_path / "twice.npz", [with_shape((50 << 20,)), *[bytes(1 << 20)] * 200], "ab")
    packed(tmp_path / "many.npz", [with_shape((16,))], map(str, range(1001)))
    packed(tmp_path / "entries.npz", [with_shape((16,))])
    raw = (tmp_path / "entries.npz").read_bytes()
    start, end = raw.index(b"PK\1\2"), raw.index(b"PK\5\6")
    entries = raw[start:end] * 300_000  # of the same member: zipfile makes an object of each
    ends = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(entries), start, 0)
    (tmp_path / "entries.npz").write_bytes(raw[:start] + entries + ends)
    refused_with_little(sorted(tmp_path.glob("*.npz")))


def test_a_member_with_a_wrong_size_is_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(100))
    good = path.read_bytes()
    at = good.index(b"PK\1\2") + 24
    for size in (10, 0xFFFFFFFE):
        path.write_bytes(good[:at] + struct.pack("<I", size) + good[at + 4 :])
        with pytest.raises(ValueError, match="a.npz is not a NumPy file that can be read: "):
            load_arrays(path)


def test_names_are_shown_on_one_line(tmp_path):
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x04" + name("x\x1b[31m" + "y" * 10**6, "z") + b".")
    with pytest.raises(ValueError, match=r"asks for x\\x1b\[31my") as e:
        load_pickle(path)
    assert len(str(e.value)) < 400 and str(e.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "pipe.npy").symlink_to(tmp_path / "pipe")
    (tmp_path / "zero.npz").symlink_to("/dev/zero")
    (tmp_path / "folder.npy").mkdir()
    for file in ("pipe.npy", "zero.npz", "folder.npy", "nothing.npy"):
        for f in (load_arrays, load_pickle):
            with pytest.raises(ValueError, match=f"{file} is not a .* that can be read: ") as e:
                f(tmp_path / file)
            assert "\n" not in str(e.value)


def test_python_2_wrote_arrays_as_text(tmp_path):
    """In protocol 0, as SMPL's files of 2015, and in protocol 2."""
    arrays = {"v": np.arange(300.0).reshape(100, 3), "w": np.arange(4.0).reshape(2, 2)}

    def written(a, raw):
        head = name("numpy.core.multiarray", "_reconstruct") + b"(" + name("numpy", "ndarray")
        shape = b"(I0\ntS'b'\ntR(I1\n(L%dL\nI%d\nt" % a.shape + name("numpy", "dtype")
        return head + shape + b"(S'f8'\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntbI00\n" + raw + b"tb"

    def quoted(raw):
        return b"S'" + "".join(f"\\x{c:02x}" for c in raw).encode() + b"'\n"

    def counted(raw):
        return b"T" + struct.pack("<I", len(raw)) + raw

    path = tmp_path / "a.pkl"
    for as_text in (quoted, counted):
        items = [b"S'%s'\np%d\n" % (k.encode(), i) + written(a, as_text(a.tobytes())) + b"s"
                 for i, (k, a) in enumerate(arrays.items(), 2)]
        path.write_bytes(b"(dp1\n" + b"".join(items) + b".")
        found = load_pickle(path)
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[k], a) for k, a in arrays.items())


def test_limits_and_orders_of_arrays(tmp_path, monkeypatch):
    path = tmp_path / "a.pkl"
    a = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    path.write_bytes(pickle.dumps({"a": a, "b": a.astype(">i2")}, protocol=2))
    found = safe_pickle.load_pickle(path)
    assert np.array_equal(found["a"], a) and np.array_equal(found["b"], a)
    assert found["b"].dtype == ">i2"
    with pytest.raises(ValueError, match="has more than 0 MB"):
        safe_pickle.load_pickle(path, 100)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_LZMA) as z:
        z.writestr("x.npy", b"")
    with pytest.raises(ValueError, match="packed in a way"):
        safe_pickle.load_arrays(tmp_path / "a.npz")
