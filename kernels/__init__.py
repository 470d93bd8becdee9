"""The two operations that the tokenizer lives on: nearest-code search and EMA codebook update, exact and fast.

    python -m kernels                        # what is in use here, why, and a self-check
    HIPART_KERNELS=reference|cpp|cuda|auto   # overrides the choice; auto, the default, takes the best that builds
    HIPART_LANES=4                           # the C++ code as it runs on a processor without AVX2; 8: without AVX-512

Three implementations of one contract (stated in reference.py): the pure-PyTorch twin in reference.py, C++ in
quantizer.cpp, CUDA in quantizer.cu. The compiled ones are built on first use, never at import, into PyTorch's extension
cache (TORCH_EXTENSIONS_DIR, else ~/.cache/torch_extensions). Where that fails, one line says why and the twin does the work.
All are torch ops with fake kernels, so torch.compile(fullgraph=True) takes them. None of them has a gradient: the
straight-through estimator belongs to the model. This package knows nothing of poses.
"""

import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import threading
from pathlib import Path

import torch
from torch import Tensor

from . import reference

__all__ = ["backend", "code_statistics", "ema_apply_", "ema_update_", "nearest_code", "quantize"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHOICES = ("auto", "reference", "cpp", "cuda")


# ----------------------------------------------------------------------------------------------------------------------
# Public functions: they check, then call the op


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of every row: x [N, D], codebook [K, D] -> idx [N] int64. Ties go to the lowest index.

    Both tensors share one floating dtype and one device; N may be 0, K and D are at least 1; any strides, though a copy is
    made of strided, bfloat16 and float16 input. The answer is the exact argmin of the contract in reference.py, the same
    bits from every backend. Raises ValueError on other shapes, TypeError on other dtypes. Non-finite values never give a
    usable index: ValueError from the twin and on the CPU; in CUDA code, where looking would stall the stream, index K,
    which every lookup refuses.
    """
    return quantize_op(x, codebook, False)[0]


def quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`nearest_code`, the codes themselves, and the squared distances: idx [N] int64, codes [N, D], d [N] float64.

    The distance is the contract's own number.
    """
    idx, distance = quantize_op(x, codebook, True)
    return idx, codebook.detach()[idx], distance


def quantize_op(x: Tensor, codebook: Tensor, with_distance: bool) -> tuple[Tensor, Tensor]:
    """Checks, then the op: idx [N], d [N] or [0]."""
    if (x.dim() != 2 or codebook.dim() != 2 or x.shape[1] != codebook.shape[1] or not codebook.numel()
            or x.layout != torch.strided or codebook.layout != torch.strided):
        raise ValueError("nearest_code needs dense x [N, D] and codebook [K, D] with K, D >= 1, "
                         f"found {_say(x)} and {_say(codebook)}")
    if x.dtype != codebook.dtype or x.dtype not in _FLOATS:
        raise TypeError(f"nearest_code needs one floating dtype for both, found {_say(x)} and {_say(codebook)}")
    if x.device != codebook.device:
        raise ValueError(f"nearest_code needs both on one device, found {_say(x)} and {_say(codebook)}")
    return torch.ops.hipart.quantize(x.detach(), codebook.detach(), with_distance)


def code_statistics(x: Tensor, idx: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """How many rows chose each code, and the sum of those rows: x [N, D], idx [N] -> n [K], s [K, D], both float32.

    Sums run over ascending rows in float32: the same bits for any number of threads (but for the twin on a GPU).
    Data-parallel training adds up n and s over its processes before `ema_apply_`. An idx outside [0, K) is a ValueError; in
    CUDA code its row is not counted.
    """
    if (x.dim() != 2 or not x.shape[1] or x.dtype not in _FLOATS or idx.shape != x.shape[:1] or idx.dtype != torch.int64
            or K < 1 or x.layout != torch.strided or idx.layout != torch.strided):
        raise ValueError(f"code_statistics needs dense x [N, D], idx [N] int64 and D, K >= 1, found {_say(x)}, {_say(idx)} "
                         f"and {K}")
    if x.device != idx.device:
        raise ValueError(f"code_statistics needs both on one device, found {_say(x)} and {_say(idx)}")
    return torch.ops.hipart.code_statistics(x.detach(), idx, K)


def ema_apply_(codebook: Tensor, count: Tensor, total: Tensor, n: Tensor, s: Tensor, decay: float = 0.99, eps: float = 1e-5,
               restart_below: float = 0.0, candidates: Tensor | None = None) -> Tensor:
    """Move the codebook by the statistics n [K], s [K, D], in place (van den Oord et al. 2017, appendix A.1).

    codebook [K, D], running count [K] and total [K, D], all float32 and contiguous. *Every* code decays, used or not:
    count <- decay count + (1 - decay) n, total <- decay total + (1 - decay) s, codebook <- total / count with Laplace
    smoothing `eps` on the count. Where the count is then below `restart_below`, the code is dead: it becomes row k of
    `candidates` [K, D], and its count and total are reset with it to a fair share sum(n) / K. Returns how many restarted,
    as a tensor: nobody has to wait for it.
    """
    every = dict(codebook=codebook, count=count, total=total, n=n, s=s)
    if candidates is not None:
        every["candidates"] = candidates
    if codebook.dim() != 2 or any(t.shape != codebook.shape[: 1 if k in ("count", "n") else 2] or t.dtype != torch.float32
                                  or t.device != codebook.device or t.layout != torch.strided or not t.is_contiguous()
                                  for k, t in every.items()):
        raise ValueError("ema_apply_ needs codebook, total, s (and candidates) [K, D], count and n [K], all contiguous "
                         "float32 on one device, found " + ", ".join(f"{k} {_say(t)}" for k, t in every.items()))
    return torch.ops.hipart.ema_apply_(codebook, count, total, n, s, candidates, decay, eps, restart_below)


def ema_update_(codebook: Tensor, count: Tensor, total: Tensor, x: Tensor, idx: Tensor, decay: float = 0.99,
                eps: float = 1e-5, restart_below: float = 0.0, restart_rows: Tensor | None = None) -> Tensor:
    """`code_statistics` of the rows x [N, D] that chose the codes idx [N], then `ema_apply_`.

    A dead code k restarts as row restart_rows[k] of x. An empty batch restarts nothing.
    """
    if x.dim() != 2 or codebook.dim() != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError(f"ema_update_ needs codebook [K, D] and x [N, D], found {_say(codebook)} and {_say(x)}")
    n, s = code_statistics(x, idx, len(codebook))
    candidates = None if restart_rows is None or not len(x) else x.detach()[restart_rows].float()
    return ema_apply_(codebook, count, total, n, s, decay, eps, restart_below, candidates)


def backend(device: torch.device | str = "cpu") -> tuple[str, str]:
    """Which implementation serves tensors on `device` ("reference", "cpp" or "cuda"), and why. Builds it if need be."""
    kind = torch.device(device).type
    return _load("cpp" if kind == "cpu" else "cuda") if kind in ("cpu", "cuda") else ("reference", f"no kernels for {kind}")


def _say(t: Tensor) -> str:
    layout = "" if t.layout == torch.strided else f" {str(t.layout).removeprefix('torch.')}"
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}{layout} on {t.device}"


# ----------------------------------------------------------------------------------------------------------------------
# The ops. The twin is registered for every device. Its first call builds and loads the compiled kernels, which register
# themselves for CPU and CUDA tensors; from then on PyTorch's dispatcher goes straight to them.

torch.library.define("hipart::quantize", "(Tensor x, Tensor codebook, bool with_distance=True) -> (Tensor, Tensor)")
torch.library.define("hipart::code_statistics", "(Tensor x, Tensor idx, int K) -> (Tensor, Tensor)")
torch.library.define("hipart::ema_apply_", "(Tensor(a!) codebook, Tensor(b!) count, Tensor(c!) total, Tensor n, Tensor s, "
                     "Tensor? candidates, float decay, float eps, float restart_below) -> Tensor")


def _dispatch(name: str, twin, compiled: tuple[str, ...]):
    def first_call_or_fallback(*args):
        if backend(args[0].device)[0] in compiled:
            return getattr(torch.ops.hipart, name)(*args)  # loading has registered a kernel that now goes first
        return twin(*args)

    torch.library.impl(f"hipart::{name}", "default")(first_call_or_fallback)


_dispatch("quantize", reference.quantize, ("cpp", "cuda"))
_dispatch("code_statistics", reference.code_statistics, ("cpp", "cuda"))
_dispatch("ema_apply_", reference.ema_apply_, ("cpp",))  # on a GPU a few launches on [K, D] cost next to nothing


@torch.library.register_fake("hipart::quantize")
def _(x, codebook, with_distance=True):
    return x.new_empty(x.shape[:1], dtype=torch.int64), x.new_empty(x.shape[0] if with_distance else 0, dtype=torch.float64)


@torch.library.register_fake("hipart::code_statistics")
def _(x, idx, K):
    return x.new_empty(K, dtype=torch.float32), x.new_empty((K, x.shape[1]), dtype=torch.float32)


@torch.library.register_fake("hipart::ema_apply_")
def _(codebook, count, total, n, s, candidates, decay, eps, restart_below):
    return n.new_empty((), dtype=torch.int64)


# ----------------------------------------------------------------------------------------------------------------------
# Build and load: one library for the CPU, one for CUDA, each on its first use

_HERE = Path(__file__).parent
_FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off"]  # no -march=native, no -ffast-math: a cached binary must run, and be right
_lock = threading.Lock()
_loaded: dict[str, tuple[str, str]] = {}  # of "cpp" and "cuda": itself, or what serves instead; and why


def _load(kernel: str) -> tuple[str, str]:
    """Build and load "cpp" or "cuda", once per process; one line says what went wrong, if something did."""
    with _lock:
        if kernel in _loaded:
            return _loaded[kernel]
        choice = os.environ.get("HIPART_KERNELS", "auto")
        if choice not in _CHOICES:
            raise ValueError(f"HIPART_KERNELS must be one of {', '.join(_CHOICES)}, found {choice!r}")
        if choice == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("HIPART_KERNELS=cuda, but PyTorch sees no GPU here")
        if choice == "reference" or (choice, kernel) == ("cpp", "cuda"):
            _loaded[kernel] = "reference", f"HIPART_KERNELS={choice} asks for it"
            return _loaded[kernel]
        try:
            _loaded[kernel] = kernel, f"built in {_build(kernel)}"
        except Exception as e:  # compilers, linkers and their drivers fail in every way there is
            if choice != "auto":
                raise RuntimeError(f"HIPART_KERNELS={choice}, but the {kernel} kernels could not be built: {e}") from e
            _loaded[kernel] = "reference", f"the {kernel} kernels could not be built: {_reason(e)}"
            print(f"kernels: {_loaded[kernel][1]}. The pure-PyTorch twin works instead (exact, slower).", file=sys.stderr)
        return _loaded[kernel]


def _build(kernel: str) -> Path:
    """Compile unless a cached binary is there, load it, and return its folder.

    The folder's name holds a hash of all that goes in. The binary is made beside and renamed, so that a killed build leaves
    nothing that looks finished; a file lock, which dies with its process, lets several first users build once.
    """
    import fcntl

    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)  # on import it warns that there is no GPU, if it finds nvcc
    from torch.utils import cpp_extension

    log.setLevel(level)

    sources = [_HERE / "quantizer.cpp"] + [_HERE / "quantizer.cu"] * (kernel == "cuda")
    flags = _FLAGS + ["-DWITH_CUDA"] * (kernel == "cuda")
    machine = [platform.machine(), sys.version, torch.__version__, repr(flags)]
    cuda_flags = ["-O3", "-lineinfo"]
    if kernel == "cuda":  # for the GPUs that are here; the tensor cores of 9.0 are used as such by code for 9.0a alone
        capabilities = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        names = ["90a" if capability == (9, 0) else "{}{}".format(*capability) for capability in sorted(capabilities)]
        cuda_flags += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
        machine += cuda_flags
    inputs = b"".join([f.read_bytes() for f in (*sources, _HERE / "quantizer.h")] + [m.encode() for m in machine])
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = root / f"hipart_{kernel}_{hashlib.sha256(inputs).hexdigest()[:16]}"
    binary = folder / "quantizer.so"
    try:
        torch.ops.load_library(binary)
        return folder
    except OSError:  # not there, or not usable
        pass
    if not shutil.which(cpp_extension.get_cxx_compiler()):
        raise OSError(f"there is no C++ compiler {cpp_extension.get_cxx_compiler()!r} (the variable CXX names another)")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            torch.ops.load_library(binary)  # another process was faster
        except OSError:
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                built = cpp_extension.load("quantizer", [str(s) for s in sources], extra_cflags=flags,
                                           extra_cuda_cflags=cuda_flags, build_directory=beside,
                                           is_python_module=False)
                os.replace(built, binary)
    return folder


def _reason(e: BaseException) -> str:
    """The first line that names an error, short: compilers say much."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower() and "Error building" not in line]
    return ((named or lines or [type(e).__name__])[0])[:300]
