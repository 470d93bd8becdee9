"""Nearest-code search and EMA codebook update in pure PyTorch, written to an exactness contract.

This is the reference implementation: what the compiled kernels are tested against, and what does
their work where they cannot be built. __init__.py has checked shapes, dtypes and devices.

Contract of the search. For float32 input (bfloat16 and float16 are widened exactly) the distance of
row x to code c is *this* number: s = 0; for i = 0..D-1 in order: e = double(x_i) - double(c_i);
s = s + e * e; every operation is rounded to nearest, without fused multiply-add. float64 input is
taken as it is. The answer is the lowest index with the smallest s. The usual
`(c*c).sum() - 2 x @ c.T` in float32 keeps no such promise: shift all data by 1000 and nearly every
index is wrong.

How it stays fast. A matrix product in float64 *screens* the codes. A bound on its rounding error
says which codes could still win, and only those few are compared as the contract says. So precision
affects speed, but never the answer. One exception: a thread that flushes denormals
(torch.set_flush_denormal), or a worker that one has started, breaks the contract here for numbers
below 1e-38.
"""

import torch
from torch import Tensor


@torch.no_grad()
def quantize(x: Tensor, codebook: Tensor, with_distance: bool = True) -> tuple[Tensor, Tensor]:
    """Nearest code of every row and its squared distance.

    x [N, D], codebook [K, D] -> idx [N] int64, d [N] float64 (or [0]). Raises ValueError on
    non-finite values: an index that looks valid would be a silent error.
    """
    N, K = len(x), len(codebook)
    idx, distance = x.new_empty(N, dtype=torch.int64), x.new_empty(N, dtype=torch.float64)
    c = codebook.double()
    if not bool(torch.isfinite(c).all()):
        raise ValueError("codebook holds a non-finite value; nearest_code needs finite numbers")
    centre = c.mean(0)  # the screen alone sees centred values, so an offset costs no precision
    # entries of the screen at once: 4 MB on a CPU; on a GPU 128 MB, for fewer launches
    entries = 1 << 19 if x.device.type == "cpu" else 1 << 24
    rows = max(1, entries // K)
    for start in range(0, N, rows):
        part = x[start : start + rows].double()
        if not bool(torch.isfinite(part).all()):
            row = start + int(torch.isfinite(part).all(1).logical_not().nonzero()[0])
            raise ValueError(f"x holds a non-finite value in row {row}; nearest_code needs finite "
                             "numbers")
        found = _certify(part, c, _screen(part - centre, c - centre))
        idx[start : start + rows], distance[start : start + rows] = found
    return idx, distance if with_distance else distance.new_empty(0)


def _screen(x: Tensor, c: Tensor) -> Tensor:
    """Which codes may be nearest, [N, K]: those whose score is within twice its error of the best.

    The score is |c|^2 - 2 x.c. Neither autocast nor TF32 touches a product in float64.
    """
    score = torch.addmm((c * c).sum(1), x, c.T, alpha=-2)
    return ~(score > score.amin(1, keepdim=True) + 2 * _error_bound(x, c))


def _error_bound(x: Tensor, c: Tensor) -> Tensor:
    """How far a score may be from the truth, plus what the contract itself rounds, [N, 1].

    Let u = 2^-53 and S = (|x| + |c|)^2, for the longest code. To first order in u:
    1. Centring rounds every number of x and c, which moves the score by at most
       2 u (2 |x||c| + |c|^2) <= 2 u S.
    2. A sum of D products, in any order, is off by D u times the sum of their sizes: for |c|^2 and
       2 x.c together that is D u (|c|^2 + 2 |x||c|) <= D u S. The last sum adds u S.
    3. The contract rounds each difference, square and sum: (D + 3) u |x - c|^2 <= (D + 3) u S.
    4. Adding 2 E to the best score rounds once more: u S.
    Together (2 D + 7) u S. The bound is 4 (D + 16) u S; the rest covers terms in u^2 and the
    rounding of S. Squares of float64 input may underflow, which 2^-1000 is for. Where they
    overflow, the score or the bound is infinite or NaN, and rules nothing out.
    """
    size = x.norm(dim=1, keepdim=True) + c.norm(dim=1).max()
    return (x.shape[1] + 16) * (2.0**-51 * size**2 + 2.0**-1000)


def _certify(x: Tensor, c: Tensor, open_: Tensor) -> tuple[Tensor, Tensor]:
    """Of the open codes of every row the lowest with the contract's smallest number, and that."""
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
        raise ValueError(f"code_statistics: idx must lie in [0, {K}), found {int(idx.min())} to "
                         f"{int(idx.max())}")
    n = torch.bincount(idx, minlength=K).float()
    s = torch.zeros(K, x.shape[1], device=x.device).index_add_(0, idx, x.float())
    return n, s


@torch.no_grad()
def ema_apply_(codebook: Tensor, count: Tensor, total: Tensor, n: Tensor, s: Tensor,
               candidates: Tensor | None, decay: float, eps: float,
               restart_below: float) -> Tensor:
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
