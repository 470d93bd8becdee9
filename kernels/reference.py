"""Pure-PyTorch nearest-code search and EMA codebook update, written to an exactness contract.

Contract of `nearest_code`. For float32 input (bfloat16 and float16 are widened exactly) the distance of row x to code c
is *this* number:  s = 0;  for i = 0..D-1 in order:  e = double(x_i) - double(c_i);  s = s + e * e,  every operation rounded
to nearest, without fused multiply-add. The answer is the lowest index with the smallest s. The usual
`(c*c).sum() - 2 x @ c.T` in float32 keeps no such promise: shift all data by 1000 and nearly every index is wrong.

How it stays fast: a cheap float32 matrix product *screens* the codes, a bound on its rounding error says which codes
could still win, and only those few are compared in float64 as the contract says. Precision affects speed, never the
answer. No gradient flows through either operation: the straight-through estimator belongs to the model.
"""

import torch
from torch import Tensor

_CHUNK = 1 << 20  # entries of the screening matrix held at once: 4 MB, however many rows there are
_WIDENED = (torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the nearest code of every row: x [N, D], codebook [K, D] -> idx [N] int64. Ties go to the lowest index.

    Both tensors share one floating dtype and one device; N may be 0, K and D are at least 1. Raises ValueError on other
    shapes and on non-finite values (an index that looks valid would be a silent error), TypeError on other dtypes.
    """
    _check_pair(x, codebook)
    N, K = len(x), len(codebook)
    idx = torch.empty(N, dtype=torch.int64, device=x.device)
    c64 = codebook.double()
    if not bool(torch.isfinite(c64).all()):
        raise ValueError(f"codebook {_say(codebook)} holds a non-finite value; nearest_code needs finite numbers")
    shift = c64.mean(0)  # the screen alone sees centred values, so a common offset costs no precision
    c_screen = c64 - shift
    rows = max(1, _CHUNK // K)
    for start in range(0, N, rows):
        x64 = x[start : start + rows].double()
        if not bool(torch.isfinite(x64).all()):
            raise ValueError(f"x {_say(x)} holds a non-finite value; nearest_code needs finite numbers")
        idx[start : start + rows] = _nearest_chunk(x64, c64, x64 - shift, c_screen, x.dtype == torch.float64)
    return idx


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
    d64 = torch.zeros(len(row), dtype=torch.float64, device=x64.device)
    for i in range(D):  # the order of summation is part of the contract
        e = x64[:, i][row] - c64[:, i][code]
        d64 += e * e
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
    """How many rows chose each code, and the sum of those rows: x [N, D], idx [N] -> n [K], s [K, D], both float32."""
    if x.dim() != 2 or idx.shape != x.shape[:1] or idx.dtype != torch.int64:
        raise ValueError(f"code_statistics needs x [N, D] and idx [N] int64, found {_say(x)} and {_say(idx)}")
    if len(idx) and (int(idx.min()) < 0 or int(idx.max()) >= K):
        raise ValueError(f"code_statistics: idx must lie in [0, {K}), found {int(idx.min())}..{int(idx.max())}")
    n = torch.bincount(idx, minlength=K).float()
    s = torch.zeros(K, x.shape[1], device=x.device).index_add_(0, idx, x.float())
    return n, s


@torch.no_grad()
def ema_update_(codebook: Tensor, count: Tensor, total: Tensor, x: Tensor, idx: Tensor, decay: float = 0.99,
                eps: float = 1e-5, restart_below: float = 0.0, restart_rows: Tensor | None = None) -> int:
    """Move the codebook towards the rows that chose it, in place (van den Oord et al. 2017, appendix A.1).

    codebook [K, D], running count [K] and total [K, D] float32; x [N, D], idx [N]. *Every* code decays, used or not:
    count <- decay count + (1 - decay) n, total <- decay total + (1 - decay) s, codebook <- total / count with Laplace
    smoothing `eps` on the count. Where the count is then below `restart_below`, the code is dead: it becomes row
    `restart_rows[k]` of x, and its count and total are reset with it to a fair share N / K. Returns how many restarted.
    """
    if (codebook.dim() != 2 or count.shape != codebook.shape[:1] or total.shape != codebook.shape
            or x.shape[1:] != codebook.shape[1:]):
        raise ValueError(f"ema_update_ needs codebook [K, D], count [K], total [K, D], x [N, D], found {_say(codebook)}, "
                         f"{_say(count)}, {_say(total)}, {_say(x)}")
    K = len(codebook)
    n, s = code_statistics(x, idx, K)
    count.mul_(decay).add_(n, alpha=1 - decay)
    total.mul_(decay).add_(s, alpha=1 - decay)
    mass = count.sum()
    smooth = (count + eps) / (mass + K * eps) * mass
    codebook.copy_(total / smooth.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    if restart_rows is None or not len(x):
        return 0
    dead = (count < restart_below).nonzero()[:, 0]
    fair = len(x) / K
    codebook[dead] = x[restart_rows[dead]].float()
    count[dead] = fair
    total[dead] = codebook[dead] * fair
    return len(dead)


def _say(t: Tensor) -> str:
    return f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}"


def _check_pair(x: Tensor, codebook: Tensor) -> None:
    if x.dim() != 2 or codebook.dim() != 2 or x.shape[1] != codebook.shape[1] or not codebook.numel():
        raise ValueError("nearest_code needs x [N, D] and codebook [K, D] with K, D >= 1, "
                         f"found {_say(x)} and {_say(codebook)}")
    if x.dtype != codebook.dtype or x.dtype not in (*_WIDENED, torch.float64):
        raise TypeError(f"nearest_code needs one floating dtype for both, found {_say(x)} and {_say(codebook)}")
    if x.device != codebook.device:
        raise ValueError(f"nearest_code needs both on one device, found {_say(x)} and {_say(codebook)}")
