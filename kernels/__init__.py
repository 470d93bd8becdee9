"""The two operations that a VQ tokenizer lives on: nearest-code search and EMA codebook update.

    python -m kernels                        # what is in use here, why, and a self-check
    HIPART_KERNELS=reference|cpp|cuda|auto   # overrides the choice; auto takes the best that builds

There are three implementations of one contract, which reference.py states: the reference
implementation in pure PyTorch, C++ in quantizer.cpp, and CUDA in quantizer.cu. The compiled ones
are built on first use, never at import, into PyTorch's extension cache (TORCH_EXTENSIONS_DIR, else
~/.cache/torch_extensions). Where a build fails, one line says why and the reference implementation
does the work. It also serves float64 input and GPUs without tensor cores.

All are torch ops with fake kernels, so torch.compile(fullgraph=True) takes them. None of them has a
gradient: the straight-through estimator belongs to the model. This package knows nothing of poses.
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


# --------------------------------------------------------------------------------------------------
# Public functions: they check, then call the op


def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the nearest code of every row: x [N, D], codebook [K, D] -> idx [N] int64.

    Ties go to the lowest index. Both tensors share one floating dtype and one device. N may be 0;
    K and D are at least 1. Any strides will do, though strided, bfloat16 and float16 input is
    copied. The answer is the exact argmin of the contract in reference.py, with the same bits from
    every implementation.

    Raises ValueError on other shapes, and TypeError on other dtypes. Non-finite values never give
    a usable index: they are a ValueError in the reference implementation and on the CPU. CUDA code,
    where looking would stall the stream, gives index K, which every lookup refuses.
    """
    return _quantize(x, codebook, False)[0]


def quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`nearest_code`, the codes themselves, and the squared distances.

    x [N, D], codebook [K, D] -> idx [N] int64, codes [N, D], d [N] float64. The distance is the
    contract's own number. Raises what `nearest_code` raises.
    """
    idx, distance = _quantize(x, codebook, True)
    return idx, codebook.detach()[idx], distance


def _quantize(x: Tensor, codebook: Tensor, with_distance: bool) -> tuple[Tensor, Tensor]:
    """Checks, then the op -> idx [N], d [N] or [0]."""
    dense = x.layout == codebook.layout == torch.strided
    if not dense or x.dim() != 2 or codebook.dim() != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError("nearest_code needs dense x [N, D] and codebook [K, D], "
                         + _found(x, codebook))
    if not codebook.numel():
        raise ValueError("nearest_code needs K and D of at least 1, " + _found(x, codebook))
    if x.dtype != codebook.dtype or x.dtype not in _FLOATS:
        raise TypeError("nearest_code needs one floating dtype for both, " + _found(x, codebook))
    if x.device != codebook.device:
        raise ValueError("nearest_code needs both on one device, " + _found(x, codebook))
    return torch.ops.hipart.quantize(x.detach(), codebook.detach(), with_distance)


def code_statistics(x: Tensor, idx: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """How many rows chose each code, and the sum of those rows.

    x [N, D], idx [N] int64 -> n [K], s [K, D], both float32. Sums run over ascending rows in
    float32, so any number of threads gives the same bits (but for the reference implementation on
    a GPU). Data-parallel training adds up n and s over its processes before `ema_apply_`.

    Raises ValueError on other shapes or dtypes, and for an idx outside [0, K). CUDA code does not
    count the row of such an idx.
    """
    dense = x.layout == idx.layout == torch.strided
    if not dense or x.dim() != 2 or not x.shape[1] or idx.shape != x.shape[:1] or K < 1:
        raise ValueError("code_statistics needs dense x [N, D], idx [N] and D, K >= 1, "
                         + _found(x, idx) + f" and K = {K}")
    if x.dtype not in _FLOATS or idx.dtype != torch.int64:
        raise ValueError("code_statistics needs a floating x and int64 idx, " + _found(x, idx))
    if x.device != idx.device:
        raise ValueError("code_statistics needs both on one device, " + _found(x, idx))
    return torch.ops.hipart.code_statistics(x.detach(), idx, K)


def ema_apply_(codebook: Tensor, count: Tensor, total: Tensor, n: Tensor, s: Tensor,
               decay: float = 0.99, eps: float = 1e-5, restart_below: float = 0.0,
               candidates: Tensor | None = None) -> Tensor:
    """Move the codebook by the statistics n [K], s [K, D], in place.

    Source: van den Oord et al. 2017, appendix A.1. codebook [K, D], running count [K] and total
    [K, D] are float32 and contiguous. *Every* code decays, used or not:
    count <- decay count + (1 - decay) n, total <- decay total + (1 - decay) s,
    codebook <- total / count, with Laplace smoothing `eps` on the count.

    A code whose count is then below `restart_below` is dead: it becomes row k of `candidates`
    [K, D], and its count and total are reset with it to a fair share sum(n) / K. Returns how many
    codes restarted, as a tensor, so that nobody has to wait for it. Raises ValueError on other
    shapes, dtypes or strides.
    """
    every = dict(codebook=codebook, count=count, total=total, n=n, s=s)
    if candidates is not None:
        every["candidates"] = candidates
    shape = dict.fromkeys(every, codebook.shape) | dict.fromkeys(("count", "n"), codebook.shape[:1])
    if codebook.dim() != 2 or any(
            t.shape != shape[name] or t.dtype != torch.float32 or t.device != codebook.device
            or t.layout != torch.strided or not t.is_contiguous() for name, t in every.items()):
        raise ValueError(
            "ema_apply_ needs codebook, total, s (and candidates) [K, D], count and n [K], all "
            "contiguous float32 on one device, " + _found(*every.values()))
    return torch.ops.hipart.ema_apply_(codebook, count, total, n, s, candidates, decay, eps,
                                       restart_below)


def ema_update_(codebook: Tensor, count: Tensor, total: Tensor, x: Tensor, idx: Tensor,
                decay: float = 0.99, eps: float = 1e-5, restart_below: float = 0.0,
                restart_rows: Tensor | None = None) -> Tensor:
    """`code_statistics` of the rows x [N, D] that chose the codes idx [N], then `ema_apply_`.

    A dead code k restarts as row restart_rows[k] of x. An empty batch restarts nothing.
    """
    if x.dim() != 2 or codebook.dim() != 2 or x.shape[1] != codebook.shape[1]:
        raise ValueError("ema_update_ needs codebook [K, D] and x [N, D], " + _found(codebook, x))
    n, s = code_statistics(x, idx, len(codebook))
    spare = restart_rows is not None and len(x)
    candidates = x.detach()[restart_rows].float() if spare else None
    return ema_apply_(codebook, count, total, n, s, decay, eps, restart_below, candidates)


def backend(device: torch.device | str = "cpu") -> tuple[str, str]:
    """Which implementation serves tensors on `device` ("reference", "cpp" or "cuda"), and why.

    Builds it if need be. Of several GPUs, each is asked for itself.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _load("cpp")
    if device.type != "cuda":
        return "reference", f"there are no kernels for {device.type}"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (7, 0):
        return "reference", f"{device} is older than compute capability 7.0 and has no tensor cores"
    return _load("cuda")


def _found(*tensors: Tensor) -> str:
    """What a message says of them: shape, dtype, layout if it is unusual, and device."""
    kinds = []
    for t in tensors:
        layout = "" if t.layout == torch.strided else f" {t.layout}"
        kinds.append(f"{list(t.shape)} {t.dtype}{layout} on {t.device}".replace("torch.", ""))
    return "found " + ", ".join(kinds)


# --------------------------------------------------------------------------------------------------
# The ops. Each hands its arguments to the implementation that serves their device. The compiled
# libraries register ops of their own, hipart_cpp::... and hipart_cuda::...

torch.library.define("hipart::quantize",
                     "(Tensor x, Tensor codebook, bool with_distance=True) -> (Tensor, Tensor)")
torch.library.define("hipart::code_statistics", "(Tensor x, Tensor idx, int K) -> (Tensor, Tensor)")
torch.library.define(
    "hipart::ema_apply_",
    "(Tensor(a!) codebook, Tensor(b!) count, Tensor(c!) total, Tensor n, Tensor s, "
    "Tensor? candidates, float decay, float eps, float restart_below) -> Tensor")


@torch.library.impl("hipart::quantize", "default")
def _(x, codebook, with_distance=True):
    name = "reference" if x.dtype == torch.float64 else backend(x.device)[0]
    if name == "reference":
        return reference.quantize(x, codebook, with_distance)
    idx, distance = getattr(torch.ops, f"hipart_{name}").quantize(x, codebook)
    return idx, distance if with_distance else distance.new_empty(0)


@torch.library.impl("hipart::code_statistics", "default")
def _(x, idx, K):
    name = backend(x.device)[0]
    if name == "reference":
        return reference.code_statistics(x, idx, K)
    return getattr(torch.ops, f"hipart_{name}").code_statistics(x, idx, K)


@torch.library.impl("hipart::ema_apply_", "default")
def _(codebook, *rest):
    if backend(codebook.device)[0] == "cpp":
        return torch.ops.hipart_cpp.ema_apply_(codebook, *rest)
    return reference.ema_apply_(codebook, *rest)  # a few launches on [K, D] cost a GPU little


@torch.library.register_fake("hipart::quantize")
def _(x, codebook, with_distance=True):
    distances = x.shape[0] if with_distance else 0
    idx = x.new_empty(x.shape[0], dtype=torch.int64)
    return idx, x.new_empty(distances, dtype=torch.float64)


@torch.library.register_fake("hipart::code_statistics")
def _(x, idx, K):
    return x.new_empty(K, dtype=torch.float32), x.new_empty((K, x.shape[1]), dtype=torch.float32)


@torch.library.register_fake("hipart::ema_apply_")
def _(codebook, count, total, n, *rest):
    return n.new_empty((), dtype=torch.int64)


# --------------------------------------------------------------------------------------------------
# Build and load: one library for the CPU, one for CUDA, each on its first use

_HERE = Path(__file__).parent
_SOURCES = {"cpp": ["quantizer.cpp"], "cuda": ["quantizer_cuda.cpp", "quantizer.cu"]}
# no -march=native and no -ffast-math: a cached binary must run elsewhere, and be right
_FLAGS = ["-O3", "-fopenmp", "-ffp-contract=off"]
_lock = threading.Lock()
_loaded: dict[str, tuple[str, str]] = {}  # "cpp" and "cuda": itself or what serves instead; why


def _load(kernel: str) -> tuple[str, str]:
    """Build and load "cpp" or "cuda", once per process; one line says what went wrong, if so."""
    with _lock:
        if kernel in _loaded:
            return _loaded[kernel]
        choice = os.environ.get("HIPART_KERNELS", "auto")
        if choice not in _CHOICES:
            raise ValueError(
                f"HIPART_KERNELS must be one of {', '.join(_CHOICES)}, found {choice!r}")
        if choice == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("HIPART_KERNELS=cuda, but PyTorch sees no GPU here")
        if choice == "reference" or (choice, kernel) == ("cpp", "cuda"):
            _loaded[kernel] = "reference", f"HIPART_KERNELS={choice} asks for it"
            return _loaded[kernel]
        try:
            _loaded[kernel] = kernel, f"built in {_build(kernel)}"
        except Exception as e:  # compilers, linkers and their drivers fail in every way there is
            what = f"the {kernel} kernels could not be built"
            if choice != "auto":
                raise RuntimeError(f"HIPART_KERNELS={choice}, but {what}: {e}") from e
            _loaded[kernel] = "reference", f"{what}: {_reason(e)}"
            print(f"kernels: {what}: {_reason(e)}. The reference implementation in PyTorch "
                  "works instead (exact, but slower).", file=sys.stderr)
        return _loaded[kernel]


def _build(kernel: str) -> Path:
    """Compile unless a cached binary is there, load it, and return its folder.

    The folder's name holds a hash of all that goes in. The binary is made beside and renamed, so
    that a killed build leaves nothing that looks finished. A file lock, which dies with its
    process, lets several first users build once.
    """
    import fcntl  # not on Windows, where the build then fails and says so

    log = logging.getLogger("torch.utils.cpp_extension")
    level = log.level
    log.setLevel(logging.ERROR)  # on import it warns that there is no GPU, if it finds nvcc
    from torch.utils import cpp_extension  # slow, and needed only here

    log.setLevel(level)

    sources = [_HERE / name for name in _SOURCES[kernel]]
    cuda_flags = ["-O3", "-lineinfo"]
    if kernel == "cuda":
        count = range(torch.cuda.device_count())
        for major, minor in sorted({torch.cuda.get_device_capability(i) for i in count}):
            if major >= 7:  # older GPUs get the reference implementation
                cuda_flags.append(f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}")
    machine = [platform.machine(), sys.version, torch.__version__, *_FLAGS, *cuda_flags]
    inputs = [f.read_bytes() for f in (*sources, _HERE / "quantizer.h")]
    name = hashlib.sha256(b"".join(inputs) + repr(machine).encode()).hexdigest()[:16]
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    folder = root / f"hipart_{kernel}_{name}"
    binary = folder / "quantizer.so"
    try:
        torch.ops.load_library(binary)
        return folder
    except OSError:  # not there, or not usable
        pass
    compiler = cpp_extension.get_cxx_compiler()
    if not shutil.which(compiler):
        raise OSError(f"there is no C++ compiler {compiler!r} (the variable CXX names another)")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            torch.ops.load_library(binary)  # another process was faster
        except OSError:
            with tempfile.TemporaryDirectory(dir=folder) as beside:
                built = cpp_extension.load(
                    "quantizer", [str(s) for s in sources], extra_cflags=list(_FLAGS),
                    extra_cuda_cflags=cuda_flags, build_directory=beside, is_python_module=False)
                os.replace(built, binary)
    return folder


def _reason(e: BaseException) -> str:
    """The first line that names an error, short: compilers say much."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()]
    named = [line for line in lines if "error" in line.lower() and "Error building" not in line]
    return ((named or lines or [type(e).__name__])[0])[:300]
