"""Pure-PyTorch nearest-code search and EMA codebook update, written to an exactness contract.

The twin of the compiled kernels: what they are tested against, and what does their work where they cannot be built.
__init__.py has checked shapes, dtypes and devices.

Contract of the search. For float32 input (bfloat16 and float16 are widened exactly) the distance of row x to code c
is *this* number:  s = 0;  for i = 0..D-1 in order:  e = double(x_i) - double(c_i);  s = s + e * e,  every operation rounded
to nearest, without fused multiply-add. The answer is the lowest index with the smallest s. The usual
`(c*c).sum() - 2 x @ c.T` in float32 keeps no such promise: shift all data by 1000 and nearly every index is wrong.

How it stays fast: a matrix product in float64 *screens* the codes, a bound on its rounding error says which codes could
still win, and only those few are compared as the contract says. Precision affects speed, never the answer. (CUDA
code does not screen float64 input, but compares all of it, which is slow.) A thread that flushes denormals
(torch.set_flush_denormal), or a worker that one has started, breaks the contract here, on numbers below 1e-38.
"""

import torch
from torch import Tensor


@torch.no_grad()
def quantize(x: Tensor, codebook: Tensor, with_distance: bool = True) -> tuple[Tensor, Tensor]:
    """Nearest code of every row and its squared distance: x [N, D], codebook [K, D] -> idx [N] int64, d [N] float64.

    Raises ValueError on non-finite values: an index that looks valid would be a silent error.
    """
    N, K = len(x), len(codebook)
    idx, distance = x.new_empty(N, dtype=torch.int64), x.new_empty(N, dtype=torch.float64)
    c = codebook.double()
    if not bool(torch.isfinite(c).all()):
        raise ValueError("codebook holds a non-finite value; nearest_code needs finite numbers")
    centre = c.mean(0)  # the screen alone sees centred values, so a common offset costs no precision
    entries = 1 << 19 if x.device.type == "cpu" else 1 << 24  # of the screen at once: 4 MB, or 128 MB for fewer launches
    rows = max(1, entries // K)
    for start in range(0, N, rows):
        part = x[start : start + rows].double()
        if not bool(torch.isfinite(part).all()):
            row = start + int(torch.isfinite(part).all(1).logical_not().nonzero()[0])
            raise ValueError(f"x holds a non-finite value in row {row}; nearest_code needs finite numbers")
        open_ = _screen(part - centre, c - centre)
        idx[start : start + rows], distance[start : start + rows] = _certify(part, c, open_)
    return idx, distance if with_distance else distance.new_empty(0)


def _screen(x: Tensor, c: Tensor) -> Tensor:
    """Which codes may be nearest, [N, K]: all whose score |c|^2 - 2 x.c is within twice its error of the best.

    Neither autocast nor TF32 touches float64. The bound is about D + 16 roundings, each by 2^-53 of (|x| + |c|)^2, four
    times over: that covers the product of length D in any order, and the contract's own rounding. float64 holds the square
    of any float32; of float64 input squares may underflow, which the last term is for, or overflow: NaN rules nothing out.
    """
    score = torch.addmm((c * c).sum(1), x, c.T, alpha=-2)
    error = (x.shape[1] + 16) * (2.0**-51 * (x.norm(dim=1, keepdim=True) + c.norm(dim=1).max()) ** 2 + 2.0**-1000)
    return ~(score > score.amin(1, keepdim=True) + 2 * error)


def _certify(x: Tensor, c: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
    """Of the open codes of every row the lowest with the contract's smallest number, and that number."""
    N, K = open_.shape
    row, code = open_.nonzero(as_tuple=True)
    d = x.new_zeros(len(row))
    for i in range(x.shape[1]):  # the order of summation is part of the contract
        e = x[row, i] - c[code, i]
        d += e * e
    best = x.new_full((N,), torch.inf).scatter_reduce(0, row, d, "amin")
    winner = torch.where(d == best[row], code, K)
    return row.new_full((N,), K).scatter_reduce(0, row, winner, "amin"), best


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
