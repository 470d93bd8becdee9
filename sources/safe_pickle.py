"""Read NumPy files with object arrays, and pickles, without running what they say.

Python's own unpickler, in pure Python, walks through the file. Every global that it may name is one
of the stand-ins below, which check their arguments and build plain arrays, containers, strings and
numbers. Two kinds of objects become the arrays that they hold: chumpy's, in which SMPL files are
written, and SciPy's sparse matrices.
"""

import math
import pickle
import re
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np

LARGEST = 256 << 20  # bytes of a file, unpacked, unless the reader knows better
# At most so many numbers may a sparse matrix have when it is made dense, or a selection that is
# larger than what it selects from: a short file must not ask for much memory.
SPARSE_CELLS = 10_000_000


def load_arrays(path: Path, largest: int = LARGEST) -> dict[str, np.ndarray]:
    """The arrays of a .npy file (under the key "") or of an .npz file.

    Object arrays are read, too, if all they hold are arrays, containers, strings and numbers.
    Raises ValueError, with one sentence, on anything else, and if the file unpacks to more than
    `largest` bytes.
    """
    try:
        if path.suffix.lower() == ".npy":
            if path.stat().st_size > largest:
                raise ValueError(f"it has more than {largest >> 20} MB; split it")
            return {"": _npy(path.read_bytes())}
        with zipfile.ZipFile(path) as z:
            if sum(m.file_size for m in z.infolist()) > largest:
                raise ValueError(f"it unpacks to more than {largest >> 20} MB; split it")
            used = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if any(m.compress_type not in used for m in z.infolist()):
                raise ValueError("it is packed in a way that NumPy does not use")
            return {m.filename.removesuffix(".npy"): _npy(z.open(m).read(m.file_size))
                    for m in z.infolist()}
    except Exception as e:  # a broken file can raise nearly anything
        raise ValueError(f"{path} is not a NumPy file that can be read: {_what(e)}") from e


def load_pickle(path: Path, largest: int = LARGEST):
    """What a pickle of Python 2 or 3 holds, if that is arrays, containers, strings and numbers.

    Raises ValueError, with one sentence, on anything else, and if the file has more than `largest`
    bytes.
    """
    try:
        if path.stat().st_size > largest:
            raise ValueError(f"it has more than {largest >> 20} MB")
        return _unpickled(BytesIO(path.read_bytes()))
    except Exception as e:
        raise ValueError(f"{path} is not a pickle that can be read: {_what(e)}") from e


def _what(error: Exception) -> str:
    """An error in one short line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _npy(content: bytes) -> np.ndarray:
    """The array of a .npy file."""
    f = BytesIO(content)
    version = np.lib.format.read_magic(f)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0,
                   (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read_header is None:
        raise ValueError(f"expected .npy version 1 or 2, found {version}")
    shape, fortran, dtype = read_header(f)
    if dtype.hasobject:
        found = _unpickled(f)
        if not isinstance(found, np.ndarray):
            raise ValueError(f"expected an array in its pickle, found {type(found).__name__}")
        return found
    return _filled(shape, dtype, fortran, content[f.tell() :])


def _filled(shape, dtype: np.dtype, fortran: bool, raw: bytes | str) -> np.ndarray:
    """An array of plain numbers or strings out of its bytes."""
    raw = raw.encode("latin1") if isinstance(raw, str) else raw  # how Python 2 wrote bytes
    if not _is_shape(shape):
        raise ValueError("the shape of one of its arrays is none")
    if not isinstance(raw, bytes) or len(raw) != math.prod(shape) * dtype.itemsize:
        raise ValueError("the size of one of its arrays is not that of "
                         f"{list(shape)} times {dtype}")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


def _is_shape(shape) -> bool:
    """Whether this may be the shape of an array. It is asked before the shape is shown, since a
    short file can hold a list that is endless when it is written out."""
    return isinstance(shape, tuple) and len(shape) <= 32 and all(
        type(n) is int and 0 <= n < 1 << 48 for n in shape)


def _unpickled(f: BytesIO):
    return _real(_ArraysOnly(f, encoding="latin1").load(), {})


# --------------------------------------------------------------------------------------------------
# Stand-ins. Each keeps what the pickle says about its object; `real` makes the array of it. `seen`
# is the memory of `_real`.


class _Dtype:
    """Stands for a numpy.dtype of numbers, strings or objects."""

    def __init__(self, code: str):
        if not (isinstance(code, str) and re.fullmatch(r"[biufSUO][0-9]{1,6}", code)):
            raise ValueError("its pickle holds a dtype that is not plain, and only plain ones are "
                             "read here")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        if state[1] not in ("<", ">", "=", "|") or tuple(state[2:5]) != (None, None, None):
            raise ValueError("its pickle holds a dtype of many parts, and only plain ones are "
                             "read here")
        self.order = state[1]

    def real(self) -> np.dtype:
        return np.dtype(self.code if self.order in "=|" else self.order + self.code)


class _Array:
    """Stands for a numpy.ndarray."""

    def __setstate__(self, state):
        self.shape, self.dtype, self.fortran, self.raw = state[-4:]

    def real(self, seen: dict) -> np.ndarray:
        dtype = self.dtype.real()
        if not dtype.hasobject:
            return _filled(self.shape, dtype, self.fortran, self.raw)
        if not isinstance(self.raw, list) or not _is_shape(self.shape):
            raise ValueError("an object array of its pickle holds no list")
        out = np.empty(len(self.raw), object)
        for i, v in enumerate(self.raw):
            out[i] = _real(v, seen)
        return out.reshape(self.shape, order="F" if self.fortran else "C")


class _Chumpy:
    """Stands for an object of chumpy: an array in a wrapper, or a selection of another array."""

    def __setstate__(self, state):
        self.state = state

    def real(self, seen: dict) -> np.ndarray:
        state = getattr(self, "state", None)
        if isinstance(state, dict) and "x" in state:
            return _numbers(state["x"], seen)
        if not isinstance(state, dict) or not {"a", "idxs"} <= set(state):
            raise ValueError("its pickle holds an expression of chumpy, and only its arrays are "
                             "read here")
        a, idxs = _numbers(state["a"], seen), _numbers(state["idxs"], seen)
        shape = state.get("preferred_shape", idxs.shape)
        if not _is_shape(shape) or idxs.size > max(a.size, SPARSE_CELLS):
            raise ValueError("its pickle holds a selection of chumpy that contradicts itself")
        return a.ravel()[idxs].reshape(shape)


class _Sparse:
    """Stands for a sparse matrix of SciPy, compressed by columns or by rows."""

    by_column = True

    def __setstate__(self, state):
        self.state = state

    def real(self, seen: dict) -> np.ndarray:
        keys = ("data", "indices", "indptr")
        data, indices, starts = (_numbers(self.state[k], seen) for k in keys)
        indices, starts = indices.astype(np.int64), starts.astype(np.int64)
        shape = self.state.get("_shape", self.state.get("shape"))
        rows, columns = (n.item() if isinstance(n, np.integer) else n for n in shape)
        lines, cells = (columns, rows) if self.by_column else (rows, columns)
        consistent = (
            type(rows) is type(columns) is int
            and 0 < lines * cells <= SPARSE_CELLS
            and len(starts) == lines + 1
            and starts[0] == 0
            and (np.diff(starts) >= 0).all()
            and starts[-1] == len(indices) == len(data)
            and ((indices >= 0) & (indices < cells)).all()
        )
        if not consistent:
            raise ValueError("its pickle holds a sparse matrix that contradicts itself")
        out = np.zeros((lines, cells))
        np.add.at(out, (np.repeat(np.arange(lines), np.diff(starts)), indices), data)
        return out.T if self.by_column else out


class _SparseRows(_Sparse):
    by_column = False


def _numbers(x, seen: dict) -> np.ndarray:
    """An array of numbers that is one in the pickle, too: nothing is built out of nested lists,
    which may be endless."""
    a = _real(x, seen) if isinstance(x, _Array | _Chumpy | _Sparse) else x
    if not isinstance(a, np.ndarray) or a.dtype.kind not in "biuf":
        raise ValueError("its pickle holds something in the place of an array of numbers")
    return a


def _reconstruct(cls, *_):
    """copy_reg._reconstructor, with which Python 2 made objects, for the stand-ins only."""
    if cls not in (_Chumpy, _Sparse, _SparseRows):
        raise ValueError("its pickle builds an object in an unusual way")
    return cls()


def _real(x, seen: dict):
    """Stand-ins and what holds them -> real arrays in plain containers. `seen` remembers what was
    made, so that everything is made once, however often the pickle refers to it."""
    if not isinstance(x, _Array | _Chumpy | _Sparse | dict | list | tuple):
        return x
    if id(x) not in seen:
        seen[id(x)] = None  # something that holds itself
        if isinstance(x, _Array | _Chumpy | _Sparse):
            seen[id(x)] = x.real(seen)
        elif isinstance(x, dict):
            seen[id(x)] = {k: _real(v, seen) for k, v in x.items()}
        else:
            seen[id(x)] = [_real(v, seen) for v in x]
    return seen[id(x)]


def _no_call(*_):
    raise ValueError("its pickle builds an array in an unusual way")


# --------------------------------------------------------------------------------------------------
# The unpickler


class _ArraysOnly(pickle._Unpickler):
    """Python's unpickler in pure Python, which names no globals but the stand-ins."""

    stand_ins = {
        ("numpy", "dtype"): lambda code, *_: _Dtype(code),
        ("numpy", "ndarray"): _no_call,  # only named, as the type of what _reconstruct makes
        ("_codecs", "encode"): lambda text, codec: text.encode("latin1"),  # bytes, for Python 2
        ("chumpy.ch", "Ch"): _Chumpy,
        ("chumpy.reordering", "Select"): _Chumpy,
    }
    for core in ("numpy.core", "numpy._core"):
        stand_ins[f"{core}.multiarray", "_reconstruct"] = lambda *_: _Array()
        stand_ins[f"{core}.multiarray", "scalar"] = (
            lambda dtype, raw: _filled((), dtype.real(), False, raw)[()])
    for under in ("", "_"):
        stand_ins[f"scipy.sparse.{under}csc", "csc_matrix"] = _Sparse
        stand_ins[f"scipy.sparse.{under}csr", "csr_matrix"] = _SparseRows
    for module in ("__builtin__", "builtins"):
        stand_ins[module, "bytes"] = lambda: b""  # how Python 3 wrote no bytes for Python 2
        stand_ins[module, "object"] = object  # only named, as the base of all classes
    for module in ("copy_reg", "copyreg"):
        stand_ins[module, "_reconstructor"] = _reconstruct

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module, name):
        if (module, name) not in self.stand_ins:
            asked = f"{module}.{name}"[:99]
            raise ValueError(f"its pickle asks for {asked!r}, and only arrays are read here")
        return self.stand_ins[module, name]

    def load_build(self):
        # Otherwise a function among the stand-ins would keep the state for the next file.
        if not isinstance(self.stack[-2], _Dtype | _Array | _Chumpy | _Sparse):
            raise ValueError("its pickle sets the state of something that is no array")
        super().load_build()

    def keys(self, keys):
        """Python hashes what becomes a key, however deep it is: only plain keys pass."""
        if not all(type(k) in (str, int, float, bool, bytes, type(None)) for k in keys):
            raise ValueError("its pickle holds a dictionary or a set with keys that are neither "
                             "text nor numbers")

    def load_setitem(self):
        self.keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        self.keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self):
        self.keys(self.stack[::2])
        super().load_dict()

    def load_additems(self):
        self.keys(self.stack)
        super().load_additems()

    def load_frozenset(self):
        self.keys(self.stack)
        super().load_frozenset()

    def load_unneeded(self):
        raise ValueError("its pickle uses an instruction that arrays do not need")

    for method in (load_build, load_setitem, load_setitems, load_dict, load_additems,
                   load_frozenset):
        dispatch[getattr(pickle, method.__name__[5:].upper())[0]] = method
    # BYTEARRAY8 takes memory before it reads; the buffers come from outside of the file.
    for code in (pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        dispatch[code[0]] = load_unneeded
