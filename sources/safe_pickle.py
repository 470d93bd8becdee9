"""Read NumPy files with object arrays, and pickles, without running what they say.

Python's own unpickler, in pure Python, walks through the file. Every global that it may name is one
of the stand-ins below, which check their arguments and build plain arrays, containers, strings and
numbers. Two kinds of objects become the arrays that they hold: chumpy's, in which SMPL files are
written, and SciPy's sparse matrices. A few bytes can ask for much, so whatever a file asks for is
counted against its `Budget` before it is made.
"""

import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sources.files import LARGEST, open_regular, shown

# What a file may ask for. Nothing that is larger than its file is made without being counted.
MEMORY = 320 << 20  # bytes of arrays, texts and unpacked files,
PER_BYTE = 8  # and so many more for each byte that the file has on disk
OBJECTS = 2_000_000  # instructions of pickles, and objects that come of them
KEYS = 20_000  # in all dictionaries: a dictionary of numbers that collide is slow
MEMBERS = 1000  # of an .npz file
EMPTY = 1_000_000  # rows of an array without numbers: a loop over them must come to an end
HEADER = 1000  # bytes of text before the numbers of an .npy file


class Refused(ValueError):
    """A reason why a file is not read, in half a sentence that quotes nothing but names."""


class Budget:
    """What a file of a certain size may still ask for. Everything is paid before it is made, and a
    thing that is referred to twice is paid twice, since whoever reads it may copy it."""

    def __init__(self, size: int):
        self.limit = MEMORY + PER_BYTE * size
        self.memory = self.objects = self.keys = 0

    def pay(self, memory: int = 0, objects: int = 0, keys: int = 0) -> None:
        """Pay for so many bytes, objects and keys of dictionaries."""
        self.memory, self.objects = self.memory + memory, self.objects + objects
        self.keys += keys
        if self.memory > self.limit:
            raise Refused(f"it asks for more than the {self.limit >> 20} MB of memory that a file "
                          "of its size may take")
        if self.objects > OBJECTS or self.keys > KEYS:
            raise Refused(f"it asks for more than {OBJECTS} objects or {KEYS} keys")


def load_arrays(path: Path, largest: int = LARGEST) -> dict[str, np.ndarray]:
    """The arrays of a .npy file (under the key "") or of an .npz file.

    Object arrays are read, too, if all they hold are arrays, containers, strings and numbers.
    Raises ValueError, with one sentence, on anything else, and if the file unpacks to more than
    `largest` bytes or asks for more than its `Budget`.
    """
    with _opened(path, "a NumPy file", largest) as (f, budget):
        if path.suffix.lower() == ".npy":
            return {"": _npy(f.read(largest), budget)}
        # A signature starts the entry of each member. They are counted first, since zipfile makes
        # an object of each.
        if sum(piece.count(b"PK\1\2") for piece in iter(lambda: f.read(1 << 20), b"")) > MEMBERS:
            raise Refused(f"it has more than {MEMBERS} members")
        with zipfile.ZipFile(f) as z:
            members, used = z.infolist(), (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            total = sum(m.file_size for m in members)
            if total > largest:
                raise Refused(f"it unpacks to more than {largest >> 20} MB; split it")
            if any(m.compress_type not in used for m in members):
                raise Refused("it is packed in a way that NumPy does not use")
            budget.pay(total)
            return {m.filename.removesuffix(".npy"): _npy(z.open(m).read(m.file_size), budget)
                    for m in members}


def load_pickle(path: Path, largest: int = LARGEST):
    """What a pickle of Python 2 or 3 holds, if that is arrays, containers, strings and numbers.

    Raises ValueError, with one sentence, on anything else, and if the file has more than `largest`
    bytes or asks for more than its `Budget`.
    """
    with _opened(path, "a pickle", largest) as (f, budget):
        return _unpickled(BytesIO(f.read(largest)), budget)


def described(x) -> str:
    """What a file holds in some place, for a message: kind and shape of an array, else the type."""
    return shown(f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__)


@contextmanager
def _opened(path: Path, kind: str, largest: int) -> Iterator[tuple[BinaryIO, Budget]]:
    """The open file and its budget. Whatever fails within becomes one sentence about the file."""
    try:
        try:
            f = open_regular(path, largest)
        except (ValueError, OSError) as e:
            raise Refused(shown(e.args[-1])) from e
        with f:
            yield f, Budget(os.fstat(f.fileno()).st_size)
    except Exception as e:  # a broken file can raise nearly anything
        why = e if isinstance(e, Refused) else "it is damaged"
        raise ValueError(f"{shown(path, 4096)} is not {kind} that can be read: {why}") from e


def read_header(f: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order (whether it is Fortran's) and dtype of a .npy file. Raises `Refused`, or what
    NumPy raises on a damaged one."""
    version = np.lib.format.read_magic(f)
    read = {(1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise Refused(f"expected .npy version 1 or 2, found {version[0]}.{version[1]}")
    shape, fortran, dtype = read(f, max_header_size=HEADER)
    if dtype.kind not in "biufSUO":
        raise Refused("its numbers are of a kind that is not read here")
    return _checked_shape(shape), fortran, dtype


def _npy(content: bytes, budget: Budget) -> np.ndarray:
    """The array of a .npy file."""
    f = BytesIO(content)
    shape, fortran, dtype = read_header(f)
    if not dtype.hasobject:
        return _filled(shape, dtype, fortran, memoryview(content)[f.tell() :])
    found = _unpickled(f, budget)
    if not isinstance(found, np.ndarray):
        raise Refused(f"expected an array in its pickle, found {type(found).__name__}")
    return found


def _checked_shape(shape) -> tuple[int, ...]:
    """Refuse what cannot be the shape of an array, without showing it: a short file can hold a list
    that is endless when it is written out."""
    good = isinstance(shape, tuple) and len(shape) <= 32 and all(
        type(n) is int and 0 <= n < 1 << 48 for n in shape)
    if not good or 0 in shape and math.prod(n or 1 for n in shape) > EMPTY:
        raise Refused("the shape of one of its arrays is none")
    return shape


def _filled(shape, dtype: np.dtype, fortran: bool, raw: bytes | memoryview) -> np.ndarray:
    """An array of plain numbers or strings out of its bytes."""
    if len(raw) != math.prod(_checked_shape(shape)) * dtype.itemsize:
        raise Refused(f"the size of one of its arrays is not that of {shown(str(list(shape)))} "
                      f"times {dtype}")
    if dtype.kind == "U":
        letters = np.frombuffer(raw, np.dtype("u4").newbyteorder(dtype.byteorder))
        if letters.max(initial=0) > 0x10FFFF:
            raise Refused("one of its arrays holds letters that do not exist")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if fortran else "C")


def _unpickled(f: BytesIO, budget: Budget):
    return _Maker(budget).real(_ArraysOnly(f, budget).load())


# --------------------------------------------------------------------------------------------------
# Stand-ins. Each keeps what the pickle says about its object. `real` makes the object of it, with
# the help of a `_Maker`.


class _Dtype:
    """Stands for a numpy.dtype of numbers, strings or objects."""

    def __init__(self, code: str, *_):
        if not (isinstance(code, str) and re.fullmatch(r"[biufSUO][0-9]{1,6}", code)):
            raise Refused("its pickle holds a dtype that is not plain, and only plain ones are "
                          "read here")
        self.code, self.order = code, "="

    def __setstate__(self, state):
        if state[1] not in ("<", ">", "=", "|") or tuple(state[2:5]) != (None, None, None):
            raise Refused("its pickle holds a dtype of many parts, and only plain ones are read "
                          "here")
        self.order = state[1]

    def dtype(self) -> np.dtype:
        return np.dtype(self.code if self.order in "=|" else self.order + self.code)


class _Bytes:
    """Stands for bytes that were written as text, as for Python 2."""

    def __init__(self, text: str, codec: str = "latin1"):
        self.text = text

    def real(self, make: "_Maker") -> bytes:
        make.budget.pay(len(self.text))
        return self.text.encode("latin1")


class _Scalar:
    """Stands for a single number of NumPy."""

    def __init__(self, dtype: _Dtype, raw):
        self.type, self.raw = dtype, raw

    def real(self, make: "_Maker"):
        return make.filled((), self.type, False, self.raw)[()]


class _Array:
    """Stands for a numpy.ndarray."""

    def __init__(self, *_):
        self.shape, self.type, self.fortran, self.raw = None, None, False, None

    def __setstate__(self, state):
        self.shape, self.type, self.fortran, self.raw = state[-4:]

    def real(self, make: "_Maker") -> np.ndarray:
        if not isinstance(self.type, _Dtype) or self.type.code[0] != "O":
            return make.filled(self.shape, self.type, self.fortran, self.raw)
        if not isinstance(self.raw, list):
            raise Refused("an object array of its pickle holds no list")
        make.budget.pay(objects=len(self.raw))
        out = np.empty(len(self.raw), object)
        for i, v in enumerate(self.raw):
            out[i] = make.real(v)
        return out.reshape(_checked_shape(self.shape), order="F" if self.fortran else "C")


class _Chumpy:
    """Stands for an object of chumpy: an array in a wrapper, or a selection of another array."""

    state = None

    def __setstate__(self, state):
        self.state = state

    def real(self, make: "_Maker") -> np.ndarray:
        state = self.state
        if isinstance(state, dict) and "x" in state:
            return make.numbers(state["x"])
        if not isinstance(state, dict) or not {"a", "idxs"} <= set(state):
            raise Refused("its pickle holds an expression of chumpy, and only its arrays are read "
                          "here")
        a, idxs = make.numbers(state["a"]), make.numbers(state["idxs"])
        shape = _checked_shape(state.get("preferred_shape", idxs.shape))
        make.budget.pay(a.nbytes + idxs.size * (8 + a.itemsize))
        return a.ravel()[idxs].reshape(shape)


class _Sparse:
    """Stands for a sparse matrix of SciPy, compressed by columns or by rows."""

    by_column = True

    def __setstate__(self, state):
        self.state = state

    def real(self, make: "_Maker") -> np.ndarray:
        data, indices, starts = (make.numbers(self.state[k])
                                 for k in ("data", "indices", "indptr"))
        make.budget.pay(24 * (data.size + indices.size + starts.size))
        indices, starts = indices.astype(np.int64), starts.astype(np.int64)
        shape = make.real(self.state.get("_shape", self.state.get("shape")))
        rows, columns = _checked_shape(tuple(int(n) for n in shape))
        lines, cells = (columns, rows) if self.by_column else (rows, columns)
        consistent = (
            data.ndim == indices.ndim == starts.ndim == 1
            and len(starts) == lines + 1
            and starts[0] == 0
            and (np.diff(starts) >= 0).all()
            and starts[-1] == len(indices) == len(data)
            and ((indices >= 0) & (indices < cells)).all()
        )
        if not consistent:
            raise Refused("its pickle holds a sparse matrix that contradicts itself")
        make.budget.pay(8 * lines * cells)
        out = np.zeros((lines, cells))
        np.add.at(out, (np.repeat(np.arange(lines), np.diff(starts)), indices), data)
        return out.T if self.by_column else out


class _SparseRows(_Sparse):
    by_column = False


class _Maker:
    """Makes real objects in plain containers out of stand-ins and what holds them.

    Each is made once, however often the pickle refers to it, and paid for every time.
    """

    def __init__(self, budget: Budget):
        self.budget = budget
        self.made = {}  # what was made of the object with that id, and its price

    def real(self, x):
        if not isinstance(x, _STAND_INS | dict | list | tuple):
            return x
        if id(x) in self.made:
            made, memory, objects = self.made[id(x)]
            self.budget.pay(memory, objects)
            return made
        self.made[id(x)] = None, 0, 0  # something that holds itself
        memory, objects = self.budget.memory, self.budget.objects
        self.budget.pay(objects=1 + len(x) if isinstance(x, dict | list | tuple) else 1)
        if isinstance(x, dict):
            made = {k: self.real(v) for k, v in x.items()}
        elif isinstance(x, list | tuple):
            made = [self.real(v) for v in x]
        else:
            made = x.real(self)
        self.made[id(x)] = made, self.budget.memory - memory, self.budget.objects - objects
        return made

    def numbers(self, x) -> np.ndarray:
        """An array of numbers that is one in the pickle, too: nothing is built out of nested lists,
        which may be endless."""
        a = self.real(x) if isinstance(x, _STAND_INS) else None
        if not isinstance(a, np.ndarray) or a.dtype.kind not in "biuf":
            raise Refused("its pickle holds something in the place of an array of numbers")
        return a

    def filled(self, shape, kind: _Dtype, fortran: bool, raw) -> np.ndarray:
        """An array of plain numbers or strings."""
        # Python 2 wrote text.
        raw = _Bytes(raw).real(self) if isinstance(raw, str) else self.real(raw)
        if not isinstance(kind, _Dtype) or not isinstance(raw, bytes):
            raise Refused("its pickle holds an array without a dtype or without numbers")
        a = _filled(shape, kind.dtype(), fortran, raw)
        self.budget.pay(a.nbytes)
        return a


_STAND_INS = _Bytes | _Scalar | _Array | _Chumpy | _Sparse


def _reconstruct(cls, *_):
    """copy_reg._reconstructor, with which Python 2 made objects, for the stand-ins only."""
    if cls not in (_Chumpy, _Sparse, _SparseRows):
        raise Refused("its pickle builds an object in an unusual way")
    return cls()


def _no_call(*_):
    raise Refused("its pickle builds an array in an unusual way")


# --------------------------------------------------------------------------------------------------
# The unpickler


class _Memo(dict):
    """What a pickle remembers by number, counted from 0 or 1 as picklers do: a dictionary of
    numbers that collide is slow."""

    def __setitem__(self, i: int, x) -> None:
        if i > len(self) + 1:
            raise Refused("its pickle remembers things out of order")
        super().__setitem__(i, x)


def _counted(step: Callable) -> Callable:
    """An instruction that is paid for."""

    def counted(self):
        self.budget.pay(objects=1)
        step(self)

    return counted


def _text(size: int) -> Callable:
    """An instruction that reads a text, after its length in so many bytes."""

    def load(self):
        raw = self.read(int.from_bytes(self.read(size), "little"))
        self.budget.pay(4 * len(raw))  # so much if a single character is from far away
        self.append(raw.decode("utf-8", "surrogatepass"))

    return load


class _ArraysOnly(pickle._Unpickler):
    """Python's unpickler in pure Python, which names no globals but the stand-ins."""

    stand_ins = {
        ("numpy", "dtype"): _Dtype,
        ("numpy", "ndarray"): _no_call,  # only named, as the type of what _reconstruct makes
        ("_codecs", "encode"): _Bytes,
        ("chumpy.ch", "Ch"): _Chumpy,
        ("chumpy.reordering", "Select"): _Chumpy,
    }
    for core in ("numpy.core", "numpy._core"):
        stand_ins[f"{core}.multiarray", "_reconstruct"] = _Array
        stand_ins[f"{core}.multiarray", "scalar"] = _Scalar
    for under in ("", "_"):
        stand_ins[f"scipy.sparse.{under}csc", "csc_matrix"] = _Sparse
        stand_ins[f"scipy.sparse.{under}csr", "csr_matrix"] = _SparseRows
    for module in ("__builtin__", "builtins"):
        stand_ins[module, "bytes"] = lambda: b""  # how Python 3 wrote no bytes for Python 2
        stand_ins[module, "object"] = object  # only named, as the base of all classes
    for module in ("copy_reg", "copyreg"):
        stand_ins[module, "_reconstructor"] = _reconstruct

    dispatch = dict(pickle._Unpickler.dispatch)

    def __init__(self, f: BytesIO, budget: Budget):
        super().__init__(f, encoding="latin1")
        self.budget, self.memo = budget, _Memo()

    def find_class(self, module, name):
        if (module, name) not in self.stand_ins:
            raise Refused(f"its pickle asks for {shown(f'{module}.{name}')}, and only arrays are "
                          "read here")
        return self.stand_ins[module, name]

    def load_build(self):
        # Otherwise a function among the stand-ins would keep the state for the next file.
        if not isinstance(self.stack[-2], _Dtype | _Array | _Chumpy | _Sparse):
            raise Refused("its pickle sets the state of something that is no array")
        super().load_build()

    def load_reduce(self):
        # Python makes a tuple of the arguments, and a text of a million letters would be as many.
        if type(self.stack[-1]) is not tuple or len(self.stack[-1]) > 4:
            raise Refused("its pickle builds an object in an unusual way")
        super().load_reduce()

    def keys(self, keys):
        """Python hashes what becomes a key, however deep it is, and numbers may collide."""
        self.budget.pay(keys=len(keys))
        if not all(type(k) in (str, bool, bytes, type(None)) or type(k) is int and abs(k) < 1 << 60
                   for k in keys):
            raise Refused("its pickle holds a dictionary with keys that are neither text nor small "
                          "numbers")

    def load_setitem(self):
        self.keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self):
        self.keys(self.stack[::2])
        super().load_setitems()

    def load_dict(self):
        self.keys(self.stack[::2])
        super().load_dict()

    def load_unicode(self):
        raw = self.readline()[:-1]
        self.budget.pay(4 * len(raw))
        self.append(raw.decode("raw-unicode-escape"))

    def load_unneeded(self):
        raise Refused("its pickle uses an instruction that arrays do not need")

    dispatch |= {code[0]: step for code, step in (
        (pickle.BUILD, load_build), (pickle.REDUCE, load_reduce), (pickle.NEWOBJ, load_reduce),
        (pickle.SETITEM, load_setitem), (pickle.SETITEMS, load_setitems), (pickle.DICT, load_dict),
        (pickle.UNICODE, load_unicode), (pickle.SHORT_BINUNICODE, _text(1)),
        (pickle.BINUNICODE, _text(4)), (pickle.BINUNICODE8, _text(8)),
    )}  # fmt: skip
    for code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID,
                 pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.EMPTY_SET, pickle.ADDITEMS,
                 pickle.FROZENSET, pickle.LONG4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER,
                 pickle.READONLY_BUFFER):  # fmt: skip
        dispatch[code[0]] = load_unneeded
    dispatch = {code: _counted(step) for code, step in dispatch.items()}
