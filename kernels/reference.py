"""Pure-PyTorch nearest-code search and EMA codebook update, written to an exactness contract.

The twin of the compiled kernels: what they are tested against, and what does their work where they cannot be built.
__init__.py has checked shapes, dtypes and devices.

Contract of the search. For float32 input (bfloat16 and float16 are widened exactly) the distance of row x to code c
is *this* number:  s = 0;  for i = 0..D-1 in order:  e = double(x_i) - double(c_i);  s = s + e * e,  every operation rounded
to nearest, without fused multiply-add. The answer is the lowest index with the smallest s. The usual
`(c*c).sum() - 2 x @ c.T` in float32 keeps no such promise: shift all data by 1000 and nearly every index is wrong.

How it stays fast: a cheap float32 matrix product *screens* the codes, a bound on its rounding error says which codes
could still win, and only those few are compared in float64 as the contract says. Precision affects speed, never the
answer. float64 input is compared in float64 throughout, which is slow.
"""

import torch
from torch import Tensor

_CHUNK = 1 << 20  # entries of the screening matrix held at once: 4 MB, however many rows there are


@torch.no_grad()
def quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest code of every row and its squared distance: x [N, D], codebook [K, D] -> idx [N] int64, d [N] float64.

    Raises ValueError on non-finite values: an index that looks valid would be a silent error.
    """
    N, K = len(x), len(codebook)
    idx, distance = x.new_empty(N, dtype=torch.int64), x.new_empty(N, dtype=torch.float64)
    c64 = codebook.double()
    if not bool(torch.isfinite(c64).all()):
        raise ValueError("codebook holds a non-finite value; nearest_code needs finite numbers")
    shift = c64.mean(0)  # the screen alone sees centred values, so a common offset costs no precision
    c_screen = c64 - shift
    rows = max(1, _CHUNK // K)
    for start in range(0, N, rows):
        x64 = x[start : start + rows].double()
        if not bool(torch.isfinite(x64).all()):
            row = start + int(torch.isfinite(x64).all(1).logical_not().nonzero()[0])
            raise ValueError(f"x holds a non-finite value in row {row}; nearest_code needs finite numbers")
        chosen = _nearest_chunk(x64, c64, x64 - shift, c_screen, x.dtype == torch.float64)
        idx[start : start + rows], distance[start : start + rows] = chosen, _distance(x64, c64[chosen])
    return idx, distance


def _distance(x64: Tensor, c64: Tensor) -> Tensor:
    """The contract's number for every pair of rows: the order of summation is part of it."""
    d = x64.new_zeros(len(x64))
    for i in range(x64.shape[1]):
        e = x64[:, i] - c64[:, i]
        d += e * e
    return d


def _nearest_chunk(x64: Tensor, c64: Tensor, x_screen: Tensor, c_screen: Tensor, everything: bool) -> Tensor:
    """One chunk of rows: screen in float32, certify in float64. `everything` skips the screen (float64 input)."""
    N, K, D = len(x64), len(c64), x64.shape[1]
    if everything:
        row, code = torch.ones(N, K, dtype=torch.bool, device=x64.device).nonzero(as_tuple=True)
    else:
        # An exact power of two brings the largest magnitude to [0.5, 1): squares can neither overflow nor vanish.
        largest = torch.maximum(x_screen.abs().max(), c_screen.abs().max())
        exponent = -torch.frexp(largest).exponent.double() if float(largest) > 0 else torch.zeros_like(largest)
        scale = torch.pow(2.0, exponent)
        x32, c32 = (x_screen * scale).float(), (c_screen * scale).float()
        x_norm, c_norm = x32.double().norm(dim=1, keepdim=True), c32.double().norm(dim=1)
        score = _float32_scores(x32, c32, (c_norm**2).float())
        # Rounding of inputs to float32, of a length-D float32 dot product in any order, and of the contract's own float64
        # sum, all relative to (|x| + |c|)^2; the last term covers flushed denormals.
        error = (D + 16) * 2.0**-23 * (x_norm + c_norm.max()) ** 2 + D * 2.0**-120
        limit = (score.amin(1, keepdim=True).double() + 2 * error).float()
        limit = torch.nextafter(limit, torch.full_like(limit, torch.inf))  # rounding to float32 must not lower it
        row, code = (score <= limit).nonzero(as_tuple=True)
    idx = torch.full((N,), K, dtype=torch.int64, device=x64.device)
    rivals = torch.bincount(row, minlength=N)[row] > 1
    idx[row[~rivals]] = code[~rivals]  # the screen left one code: no comparison needed
    row, code = row[rivals], code[rivals]
    if not len(row):
        return idx
    d64 = _distance(x64[row], c64[code])
    best = torch.full((N,), torch.inf, dtype=torch.float64, device=x64.device).scatter_reduce(0, row, d64, "amin")
    return idx.scatter_reduce(0, row, torch.where(d64 == best[row], code, K), "amin")


def _float32_scores(x: Tensor, c: Tensor, c2: Tensor) -> Tensor:
    """|c|^2 - 2 x c^T [N, K] in true float32 (|x|^2 is left out: it is the same for every code). The bound above holds for
    nothing less, so neither autocast nor TF32 may touch this product."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(x.device.type, enabled=False):
            return torch.addmm(c2, x, c.T, alpha=-2)
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def code_statistics(x: Tensor, idx: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """x [N, D], idx [N] -> n [K] rows per code, s [K, D] their sum, both float32."""
    if len(idx) and (int(idx.min()) < 0 or int(idx.max()) >= K):
        raise ValueError(f"code_statistics: idx must lie in [0, {K}), found {int(idx.min())}..{int(idx.max())}")
    n = torch.bincount(idx, minlength=K).float()
    s = torch.zeros(K, x.shape[1], device=x.device).index_add_(0, idx, x.float())
    return n, s


@torch.no_grad()
def ema_apply_(codebook: Tensor, count: Tensor, total: Tensor, n: Tensor, s: Tensor, candidates: Tensor | None,
               decay: float, eps: float, restart_below: float) -> Tensor:
    """The EMA step of __init__.py's `ema_apply_`, in place; returns how many codes restarted."""
    K = len(codebook)
    count.mul_(decay).add_(n, alpha=1 - decay)
    total.mul_(decay).add_(s, alpha=1 - decay)
    mass = count.double().sum()
    smooth = (count.double() + eps) / (mass + K * eps) * mass
    codebook.copy_(total / smooth.clamp_min(torch.finfo(torch.float32).tiny).float()[:, None])
    rows = n.sum()
    dead = (count < restart_below) & (rows > 0) & (candidates is not None)
    if candidates is not None:
        fair = rows / K
        codebook.copy_(torch.where(dead[:, None], candidates, codebook))
        total.copy_(torch.where(dead[:, None], candidates * fair, total))
        count.copy_(torch.where(dead, fair, count))
    return dead.sum()
