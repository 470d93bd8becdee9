"""Kernels against their contract: nearest code bit for bit, EMA update against the equations, the
pitfalls of both.

The oracle is a float64 brute force in the contract's own order of summation, so every comparison is
exact equality. Each search test runs every implementation that this machine has: the reference
implementation always, C++ where it builds, CUDA where there is a GPU.
"""

import ctypes
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import kernels
from hipart import MSST, Config, Quantizer
from kernels import code_statistics, ema_apply_, ema_update_, nearest_code, quantize, reference

ROOT = Path(__file__).parent.parent
EXAMPLES = settings(max_examples=60, deadline=None)


def distances(x, c):
    """The contract, word for word: float64, dimensions in order, every operation rounded. [N, K]"""
    x, c = np.asarray(x, np.float64), np.asarray(c, np.float64)
    s = np.zeros((len(x), len(c)))
    with np.errstate(over="ignore"):
        for i in range(x.shape[1]):
            e = x[:, i, None] - c[None, :, i]
            s = s + e * e
    return s


def brute_force(x, c):
    """Lowest index on ties. [N]"""
    return distances(x, c).argmin(1)


def narrower(lanes):
    """The search as on processors whose registers hold fewer codes."""

    def search(x, c):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HIPART_LANES", lanes)
            return torch.ops.hipart.quantize(x, c)

    return search


SEARCHES = {"reference": reference.quantize, kernels.backend("cpu")[0]: torch.ops.hipart.quantize}
if "cpp" in SEARCHES:  # 16 of them where the processor has AVX-512
    SEARCHES |= {f"cpp, {lanes} lanes": narrower(lanes) for lanes in ("8", "4")}
if torch.cuda.is_available():
    SEARCHES["cuda"] = lambda x, c: [t.cpu() for t in torch.ops.hipart.quantize(x.cuda(), c.cuda())]


def check(x, c):
    """Every implementation: indices and distances, bit for bit."""
    if not isinstance(x, torch.Tensor):
        x, c = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (x, c))
    assert torch.isfinite(x).all() and torch.isfinite(c).all()
    expected = distances(x.double().numpy(), c.double().numpy())
    for name, search in SEARCHES.items():
        idx, d = search(x, c)
        assert (
            idx.dtype == torch.int64
            and idx.shape == d.shape == (len(x),)
            and d.dtype == torch.float64
        )
        np.testing.assert_array_equal(idx.numpy(), expected.argmin(1), err_msg=name)
        np.testing.assert_array_equal(d.numpy(), expected.min(1, initial=np.inf), err_msg=name)


def test_the_compiled_kernels_are_under_test():
    """Where there is a compiler, a build that fails must not leave the reference implementation to
    be tested against itself."""
    if shutil.which("g++") and os.environ.get("HIPART_KERNELS", "auto") != "reference":
        assert "cpp" in SEARCHES, kernels.backend("cpu")[1]
    if torch.cuda.is_available() and shutil.which("nvcc"):
        assert kernels.backend("cuda")[0] == "cuda", kernels.backend("cuda")[1]


# --------------------------------------------------------------------------------------------------
# Kinds of data. Each takes a generator and sizes and gives x [N, D], c [K, D] in float32.


def plain(rng, N, K, D):
    return rng.standard_normal((N, D)), rng.standard_normal((K, D))


def one_ulp(rng, N, K, D):
    """Pairs of codes one unit in the last place apart in one coordinate; rows on the codes and
    between them."""
    c = rng.standard_normal((K, D)).astype(np.float32)
    pair, column = np.arange(1, K, 2), rng.integers(D, size=K // 2)
    c[pair] = c[pair - 1]
    c[pair, column] = np.nextafter(c[pair, column], np.float32(np.inf))
    x = c[rng.integers(K, size=N)].copy()
    noisy = rng.random(N) < 0.5
    x[noisy] += rng.standard_normal((int(noisy.sum()), D)).astype(np.float32) * np.float32(0.3)
    return x, rng.permutation(c)


def exact_ties(rng, N, K, D):
    """Small integers: distances are exact and many are equal."""
    return rng.integers(-1, 2, (N, D)), rng.integers(-1, 2, (K, D))


def duplicates(rng, N, K, D):
    c = rng.standard_normal((max(1, K // 3), D))
    return rng.standard_normal((N, D)), c[rng.integers(len(c), size=K)]


def offset_1e3(rng, N, K, D):
    return rng.standard_normal((N, D)) + 1e3, rng.standard_normal((K, D)) + 1e3


def offset_1e6(rng, N, K, D):
    return rng.standard_normal((N, D)) + 1e6, rng.standard_normal((K, D)) + 1e6


def only_codes_offset(rng, N, K, D):
    """Every row is far from every code: distances differ in their last digits."""
    return rng.standard_normal((N, D)), rng.standard_normal((K, D)) + 1e5


def scaled(rng, N, K, D):
    # x and c on scales of their own
    return tuple(a * 10.0 ** rng.uniform(-30, 30) for a in plain(rng, N, K, D))


def scaled_together(rng, N, K, D):
    scale = 10.0 ** rng.uniform(-30, 30)
    return tuple(a * scale for a in plain(rng, N, K, D))


def denormals(rng, N, K, D):
    return tuple(rng.integers(-9, 10, s) * np.float64(2.0**-149) for s in ((N, D), (K, D)))


def mixed_columns(rng, N, K, D):
    scale = 10.0 ** rng.uniform(-20, 20, D)
    return tuple(a * scale for a in plain(rng, N, K, D))


def mixed_rows(rng, N, K, D):
    """Rows and codes of every size side by side: one scale for a whole block would flush the small
    ones."""
    x, c = plain(rng, N, K, D)
    return x * 10.0 ** rng.uniform(-35, 35, (N, 1)), c * 10.0 ** rng.uniform(-35, 35, (K, 1))


def products_underflow(rng, N, K, D):
    """A row, or two codes, of ordinary size set the scale; float32 products of all the others are
    denormal. The codes are opposite, so that their mean stays as small as the others."""
    x, c = (a * 2.0 ** rng.uniform(-76, -60) for a in plain(rng, N, K, D))
    if rng.random() < 0.5:
        x[rng.integers(N)] = 1
    else:
        c[:2] = np.array([[1], [-1]])[:K]
    return x, c


def one_huge_code(rng, N, K, D):
    x, c = plain(rng, N, K, D)
    c[rng.integers(K)] *= 10.0 ** rng.uniform(4, 37)
    return x, c


def one_huge_row(rng, N, K, D):
    x, c = plain(rng, N, K, D)
    x[rng.integers(N)] *= 1e37
    return x, c


def largest_numbers(rng, N, K, D):
    top = np.finfo(np.float32).max
    return rng.choice([-top, top, 0.0], (N, D)), rng.choice([-top, top, 0.0, 1.0], (K, D))


def all_equal(rng, N, K, D):
    return rng.standard_normal((N, D)), np.repeat(rng.standard_normal((1, D)), K, 0)


def permutations(rng, N, K, D):
    """Codes that are permutations of one another, rows with one value in every column: equal in
    real numbers, so the order of summation decides. Powers of ten make the partial sums round
    differently."""
    values = rng.standard_normal(D) * 10.0 ** rng.uniform(-6, 6, D)
    return np.repeat(rng.standard_normal((N, 1)), D, 1), np.stack(
        [rng.permutation(values) for _ in range(K)]
    )


def clusters(rng, N, K, D):
    """Codes 1e-3 apart in bunches, rows near them: what a trained codebook with near-duplicates
    looks like."""
    centre = rng.standard_normal((max(1, K // 8), D))
    c = centre[rng.integers(len(centre), size=K)] + 1e-3 * rng.standard_normal((K, D))
    return c[rng.integers(K, size=N)] + 1e-3 * rng.standard_normal((N, D)), c


def midpoints(rng, N, K, D):
    """Rows half-way between two codes."""
    c = rng.standard_normal((K, D)).astype(np.float32)
    a, b = rng.integers(K, size=(2, N))
    return (c[a] + c[b]) / 2, c


def long_and_short(rng, N, K, D):
    """Pairs of long codes 1e-4 apart among short ones, rows half-way between the two of a pair: an
    error bound that looks at the wrong code of a group is too small."""
    c, half = rng.standard_normal((K, D)), K // 3
    c[half : 2 * half] = c[:half] + 1e-4 * rng.standard_normal((half, D))
    c[2 * half :] *= 1e-3
    a = rng.integers(max(1, half), size=N)
    return (c[a] + c[a + half]) / 2, rng.permutation(c)


KINDS = [
    plain,
    one_ulp,
    exact_ties,
    duplicates,
    offset_1e3,
    offset_1e6,
    only_codes_offset,
    scaled,
    scaled_together,
    denormals,
    mixed_columns,
    mixed_rows,
    products_underflow,
    one_huge_code,
    one_huge_row,
    largest_numbers,
    all_equal,
    permutations,
    clusters,
    midpoints,
    long_and_short,
]
SIZES = st.one_of(st.integers(1, 8), st.sampled_from([13, 31, 37, 61]))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@given(seed=st.integers(0, 2**32 - 1), N=SIZES, K=SIZES, D=SIZES)
@settings(max_examples=40, deadline=None)
def test_nearest_code_is_the_contracts_argmin(kind, seed, N, K, D):
    with np.errstate(over="ignore", under="ignore"):
        check(*kind(np.random.default_rng(seed), N, K, D))


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=True)


@given(st.data(), st.integers(0, 4), st.integers(1, 6), st.integers(1, 4))
@EXAMPLES
def test_nearest_code_on_any_finite_floats(data, N, K, D):
    """hypothesis' own floats: signed zeros, subnormals, the largest numbers, integers, repeated
    values."""
    check(
        data.draw(hnp.arrays(np.float32, (N, D), elements=FLOATS)),
        data.draw(hnp.arrays(np.float32, (K, D), elements=FLOATS)),
    )


@given(seed=st.integers(0, 2**32 - 1))
@EXAMPLES
def test_rounding_at_its_worst(seed):
    """Nothing but the screen's rounding tells these codes apart, all of it points along them, and
    all of it is the rows' (or all the codes'): (2, 3, 6) has a length of 7, so 16-bit integers hold
    it exactly. Half the error bound would not do."""
    axis, across = np.array([2.0, 3, 6]), np.array([3.0, -2, 0]) / 13**0.5
    angle = np.random.default_rng(seed).uniform(0, 2 * np.pi, (200, 1))
    # at right angles to the axis
    circle = np.cos(angle) * across + np.sin(angle) * np.cross(axis, across) / 7
    check(circle, np.repeat([axis, -axis], 8, 0))
    check([axis], np.concatenate([circle, -circle]))


def test_rounding_of_the_score():
    """In one dimension the screen's integers are exact as a rule. Codes one unit in the last place
    apart are told apart by less than a float32 score holds; those opposite keep the mean at zero,
    so that nothing cancels before."""
    for a in np.random.default_rng(0).uniform(0.5, 1, 200).astype(np.float32):
        b = np.nextafter(a, np.float32(2))
        check([[a], [b]], np.repeat([a, b, -a], [8, 8, 16])[:, None])


# --------------------------------------------------------------------------------------------------
# The bounds: they hold, and would be missed if they were ten times smaller. (quantizer.cu's is the
# business of test_cuda_source.py.)

OBSERVER = """
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif
namespace at {
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& work) { work(begin, end); }
}
extern "C" { float parts[3] = {1, 1, 1}; }
std::vector<float> seen;  // of every row and octet: its smallest score, and the bound
"""
SEARCH_ALL = """
extern "C" void search_all(const float* x, const float* c, const int64_t* n, int64_t* idx,
                           double* distance, float* scores_and_bounds) {
  const Codebook codebook(c, n[1], n[2], 4);
  seen.clear();
  for (int64_t row = 0; row < n[0]; ++row)
    search_portable({codebook, x + row * n[2], 1, idx + row, distance + row});
  std::copy(seen.begin(), seen.end(), scores_and_bounds);
}
"""


@pytest.fixture(scope="session")
def screened(tmp_path_factory):
    """The search of quantizer.cpp on its own, with the terms of its bound open to change."""
    if not shutil.which("g++"):
        pytest.skip("there is no g++ here")
    folder = tmp_path_factory.mktemp("search_on_its_own")
    ruler = "// " + "-" * 97
    search = (ROOT / "kernels" / "quantizer.cpp").read_text().split(ruler)[1]
    for there, here in (
        ("lowest[octet + j] -= E;",
         "seen.push_back(lowest[octet + j]), seen.push_back(E), lowest[octet + j] -= E;"),
        ("2.002f * (dX", "parts[0] * 2.002f * (dX"),
        ("0x1p-20f * (C", "parts[1] * 0x1p-20f * (C"),
        ("(D + 4) * 0x1p-52f", "parts[2] * (D + 4) * 0x1p-52f"),
    ):  # fmt: skip
        assert search.count(there) == 1, there
        search = search.replace(there, here)
    (folder / "search.cpp").write_text(OBSERVER + search + SEARCH_ALL)
    library = folder / "search.so"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, folder / "search.cpp", "-o", library], check=True)
    return ctypes.CDLL(library)


@pytest.fixture
def parts(screened):
    """The factors of the bound's three terms; 1 again after the test."""
    factors = (ctypes.c_float * 3).in_dll(screened, "parts")
    yield factors
    factors[:] = [1, 1, 1]


def run_screened(library, x, c):
    """idx [N], and by how many times its bound a score is off, at most."""
    x, c = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (x, c))
    (N, D), K, octets = x.shape, len(c), -(-len(c) // 64) * 8
    idx, distance = torch.zeros(N, dtype=torch.int64), torch.zeros(N, dtype=torch.float64)
    seen, n = torch.zeros(N, octets, 2), torch.tensor([N, K, D])
    library.search_all(*(ctypes.c_void_p(t.data_ptr()) for t in (x, c, n, idx, distance, seen)))
    x, c = x.double().numpy(), c.double().numpy()
    mean = c.mean(0)
    x, c = x - mean, c - mean
    unit = np.linalg.norm(c, axis=1).max()
    score = ((c * c).sum(1) - 2 * x @ c.T) / unit**2
    score = np.pad(score, ((0, 0), (0, octets * 8 - K)), constant_values=np.inf)
    lowest = score.reshape(N, octets, 8).min(2)[:, : -(-K // 8)]
    seen = seen.double().numpy()[:, : lowest.shape[1]]
    return idx.numpy(), (np.abs(seen[..., 0] - lowest) / seen[..., 1]).max()


def along_an_axis():
    """See test_rounding_at_its_worst."""
    axis, across = np.array([2.0, 3, 6]), np.array([3.0, -2, 0]) / 13**0.5
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, (200, 1))
    circle = np.cos(angle) * across + np.sin(angle) * np.cross(axis, across) / 7
    return np.float32(circle), np.float32(np.repeat([axis, -axis], 8, 0))


def neighbours():
    """See test_rounding_of_the_score: all in one dimension, and nothing but its rounding."""
    rng = np.random.default_rng(0)
    c = np.repeat(rng.uniform(0.9, 1, 100), 8)
    return np.float32(rng.uniform(0.5, 4, (500, 1))), np.float32(np.append(c, -c)[:, None])


def lost_in_float64():
    """Codes 8 to 15 are truly nearer than 0 to 7, but in float64 every difference is rounded away:
    a tie. The row is exact in 16 bits, as 217 divides 32767, and far from all codes."""
    x, c = np.ones((1, 434), np.float32), np.full((24, 434), 0.95 * 2.0**-39, np.float32)
    x[0, 0], c[:8], c[16:], c[:, 0] = 216, 0, -c[16:], 0
    return x, c


@pytest.mark.parametrize("kind", [plain, offset_1e3, offset_1e6, only_codes_offset, mixed_rows,
                                  clusters, midpoints, long_and_short])
def test_the_bound_in_16_bits_holds(screened, kind):
    for seed in range(5):
        x, c = (np.float32(a) for a in kind(np.random.default_rng(seed), 40, 70, 17))
        idx, off = run_screened(screened, x, c)
        assert not off > 1  # NaN: nothing was ruled out
        np.testing.assert_array_equal(idx, brute_force(x, c))


@pytest.mark.parametrize(
    "term, data", [(0, along_an_axis), (1, neighbours), (2, lost_in_float64)]
)
def test_a_bound_in_16_bits_ten_times_smaller_is_caught(screened, parts, term, data):
    """Each term where it matters."""
    x, c = data()
    idx, off = run_screened(screened, x, c)
    np.testing.assert_array_equal(idx, brute_force(x, c))
    assert off < 1
    parts[term] = 0.1
    idx, off = run_screened(screened, x, c)
    assert off > 1 or (idx != brute_force(x, c)).any()


def test_the_bound_in_float64_holds():
    """Score and contract's number against exact fractions."""
    for kind in KINDS:
        with np.errstate(over="ignore", under="ignore"):
            x, c = (torch.from_numpy(np.float32(a)).double()
                    for a in kind(np.random.default_rng(0), 3, 4, 7))
        centre = c.mean(0)
        bound = reference._error_bound(x - centre, c - centre)
        near, far = c - centre, x - centre
        score = torch.addmm((near * near).sum(1), far, near.T, alpha=-2)
        contract = distances(x.numpy(), c.numpy())
        middle = [Fraction(v) for v in centre.tolist()]
        for i, row in enumerate(x.tolist()):
            for k, code in enumerate(c.tolist()):
                a = [Fraction(v) - m for v, m in zip(row, middle, strict=True)]
                b = [Fraction(v) - m for v, m in zip(code, middle, strict=True)]
                true = sum(q * q for q in b) - 2 * sum(p * q for p, q in zip(a, b, strict=True))
                exact = sum((p - q) ** 2 for p, q in zip(a, b, strict=True))
                off = abs(Fraction(float(score[i, k])) - true)
                off += abs(Fraction(float(contract[i, k])) - exact)
                assert off <= Fraction(float(bound[i])), kind.__name__


def test_a_bound_in_float64_ten_times_smaller_is_caught():
    """Code 0 is truly farther than code 1, but in float64 each of its 999 small squares is rounded
    away, and code 1's only one is rounded up."""
    c = torch.zeros(2, 1000)
    c[:, 0], c[0, 1:], c[1, 1] = 1, (0.98 * 2.0**-53) ** 0.5, (1.2 * 2.0**-53) ** 0.5
    x = torch.zeros(1, 1000)
    check(x, c)
    source = inspect.getsource(reference)
    assert source.count("* (2.0**-51 *") == 1
    smaller = {}
    exec(source.replace("* (2.0**-51 *", "* (0.1 * 2.0**-51 *"), smaller)
    assert reference.quantize(x, c)[0] == 0 and smaller["quantize"](x, c)[0] == 1


# --------------------------------------------------------------------------------------------------
# Sizes, dtypes, strides, and what is refused


@pytest.mark.parametrize(
    "N, K, D", [(3000, 701, 5), (257, 2048, 128), (1, 1, 1), (5, 1, 7), (7, 5, 1), (97, 131, 127)]
)
@pytest.mark.parametrize("kind", [plain, offset_1e3, one_ulp], ids=lambda kind: kind.__name__)
def test_nearest_code_at_real_sizes(kind, N, K, D):
    """Sizes that cross block borders, primes, and the paper's own 2048 codes of width 128."""
    check(*kind(np.random.default_rng(N + K + D), N, K, D))


def test_the_oracle_itself_against_python_floats():
    """NumPy's brute force is what Python's own IEEE doubles give, one by one; and order matters
    where it should."""
    rng = np.random.default_rng(0)
    x, c = (np.asarray(a, np.float32).astype(np.float64) for a in permutations(rng, 40, 6, 9))
    expected = []
    for row in x.tolist():
        best, winner = float("inf"), -1
        for k, code in enumerate(c.tolist()):
            s = 0.0
            for a, b in zip(row, code, strict=True):
                s = s + (a - b) * (a - b)
            if s < best:
                best, winner = s, k
        expected.append(winner)
    np.testing.assert_array_equal(brute_force(x, c), expected)
    # else the kind tests nothing
    assert (brute_force(x, c) != brute_force(x[:, ::-1], c[:, ::-1])).any()


def test_near_ties_defeat_the_usual_formula():
    """The data above are adversarial: c^2 - 2xc in float32 picks other codes, so agreement here is
    no accident."""
    for kind in (one_ulp, offset_1e3, permutations):
        x, c = (
            torch.from_numpy(np.asarray(a, np.float32))
            for a in kind(np.random.default_rng(1), 400, 512, 128)
        )
        usual = ((c * c).sum(1) - 2 * x @ c.T).argmin(1)
        wrong = (usual.numpy() != brute_force(x, c)).mean()
        assert wrong > (0.5 if kind is offset_1e3 else 0), kind.__name__  # most, says the README


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@given(seed=st.integers(0, 2**32 - 1), N=SIZES, K=SIZES, D=SIZES)
@settings(max_examples=15, deadline=None)
def test_other_dtypes_are_widened_exactly(dtype, seed, N, K, D):
    rng = np.random.default_rng(seed)
    for kind in (plain, exact_ties, duplicates):
        x, c = (torch.from_numpy(np.asarray(a, np.float64)).to(dtype) for a in kind(rng, N, K, D))
        check(x, c)


@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**32 - 1),
    N=SIZES,
    K=SIZES,
    D=SIZES,
    power=st.tuples(
        *[st.sampled_from([-320, -308, -162, -154, -150, -121, -60, 0, 120, 154, 200, 307])] * 2
    ),
)
@settings(max_examples=200, deadline=None)
def test_float64_of_any_size(kind, seed, N, K, D, power):
    """Rows and codes, each on a scale: squares that underflow and overflow float64 must not mislead
    the screen."""
    with np.errstate(over="ignore", under="ignore"):
        x, c = (
            np.clip(np.asarray(a, np.float64) * 10.0**p, -1e308, 1e308)
            for a, p in zip(kind(np.random.default_rng(seed), N, K, D), power, strict=True)
        )
        check(torch.from_numpy(x), torch.from_numpy(c))


def test_float64_is_compared_in_float64():
    """Codes that float32 cannot tell apart."""
    c = torch.tensor([[1.0 + 2e-15], [1.0 + 1e-15], [1.0]], dtype=torch.float64)
    assert nearest_code(c, c).tolist() == [0, 1, 2]
    # both squares overflow: a tie, lowest index
    far = torch.tensor([[1e200], [-1e200]], dtype=torch.float64)
    assert nearest_code(far.new_zeros(1, 1), far).tolist() == [0]


def test_squares_that_overflow_beside_some_that_do_not():
    """An infinite length is no unit to measure the others in."""
    c = torch.tensor([1.35e154, -1.35e154] * 4 + [0.0] * 8, dtype=torch.float64)[:, None]
    check(torch.tensor([[1.3e154]], dtype=torch.float64), c)


@pytest.mark.skipif("cpp" not in SEARCHES, reason="no compiled kernels here")
def test_the_width_must_be_one_there_is():
    with pytest.raises(ValueError, match="HIPART_LANES must be 4, 8 or 16, found wide"):
        narrower("wide")(torch.ones(2, 2), torch.ones(2, 2))


def test_strided_views():
    rng = np.random.default_rng(2)
    big_x, big_c = (
        torch.from_numpy(rng.standard_normal((60, 60)).astype(np.float32)) for _ in range(2)
    )
    views = [
        (big_x.T, big_c.T),
        (big_x[::3, ::2], big_c[:, 1::2]),
        (big_x[5:20, 7:18], big_c[30:, 7:18]),
        (big_x[:1].expand(9, 60), big_c),
        (big_x.as_strided((8, 4), (1, 3)), big_c.as_strided((9, 4), (3, 1))),
    ]
    for x, c in views:
        check(x, c)


def test_no_rows():
    idx = nearest_code(torch.empty(0, 5), torch.randn(3, 5))
    assert idx.shape == (0,) and idx.dtype == torch.int64


def test_inputs_stay_untouched_and_no_gradient_flows():
    x, c = torch.randn(20, 4, requires_grad=True), torch.randn(7, 4)
    kept_x, kept_c = x.detach().clone(), c.clone()
    idx = nearest_code(x, c)
    assert not idx.requires_grad
    assert torch.equal(x, kept_x) and torch.equal(c, kept_c)


@pytest.mark.parametrize("order", [0, 1])
def test_rows_do_not_influence_one_another(order):
    """One row's neighbours in the batch change the screen's scale, never its answer."""
    rng = np.random.default_rng(3)
    x, c = (torch.from_numpy(np.asarray(a, np.float32)) for a in clusters(rng, 50, 40, 6))
    alone = torch.cat([nearest_code(row[None], c) for row in x])
    company = torch.full((1, 6), 3e38 if order else 1e-38)
    assert torch.equal(nearest_code(torch.cat([x, company]), c)[:-1], alone)


@pytest.mark.parametrize("x, c, error", [
    (torch.zeros(4), torch.zeros(3, 4), ValueError),
    (torch.zeros(2, 4), torch.zeros(4), ValueError),
    (torch.zeros(2, 3, 4), torch.zeros(3, 4), ValueError),
    (torch.zeros(2, 5), torch.zeros(3, 4), ValueError),
    (torch.zeros(2, 4), torch.zeros(0, 4), ValueError),
    (torch.zeros(2, 0), torch.zeros(3, 0), ValueError),
    (torch.zeros(2, 4), torch.zeros(3, 4, dtype=torch.float64), TypeError),
    (torch.zeros(2, 4, dtype=torch.bfloat16), torch.zeros(3, 4), TypeError),
    (torch.zeros(2, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.int64), TypeError),
    (torch.zeros(2, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.bool), TypeError),
    (torch.zeros(2, 4, dtype=torch.complex64), torch.zeros(3, 4, dtype=torch.complex64), TypeError),
])  # fmt: skip
def test_bad_shapes_and_dtypes_are_refused(x, c, error):
    with pytest.raises(error, match="nearest_code needs .* found"):
        nearest_code(x, c)


@pytest.mark.parametrize("search", [reference.quantize, quantize], ids=["reference", "in use"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["x", "codebook"])
def test_non_finite_input_is_refused(search, dtype, value, where):
    x, c = torch.zeros(9, 3, dtype=dtype), torch.ones(4, 3, dtype=dtype)
    (x if where == "x" else c)[-1, -1] = value
    with pytest.raises(ValueError, match=f"{where} .*non-finite"):
        search(x, c)


@pytest.mark.parametrize("search", [reference.quantize, quantize], ids=["reference", "in use"])
def test_a_non_finite_row_far_down_is_named(search):
    x = torch.zeros(5000, 2)
    x[4999, 1] = float("nan")
    with pytest.raises(ValueError, match="non-finite value in row 4999"):
        search(x, torch.zeros(512, 2))


def test_non_finite_input_on_cuda_gives_no_usable_index():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here; benchmarks/on_gpu.sh runs it where there is one")
    x, c = torch.randn(9, 3).cuda(), torch.randn(4, 3).cuda()
    x[5, 1] = float("nan")
    idx, d = torch.ops.hipart.quantize(x, c)
    assert idx[5] == 4 and d[5].isnan() and (idx[:5] < 4).all()


def test_quantize_gives_codes_and_the_contracts_distances():
    x, c = torch.randn(50, 7), torch.randn(9, 7)
    idx, codes, d = quantize(x, c)
    assert torch.equal(codes, c[idx]) and torch.equal(idx, nearest_code(x, c))
    np.testing.assert_array_equal(d.numpy(), distances(x, c).min(1))


def test_denormals_count_even_where_the_thread_flushes_them():
    """In a process of its own: PyTorch's worker threads inherit the setting, and would flush in
    later tests, too."""
    code = (
        "import torch, kernels\nfrom tests.test_kernels import brute_force, denormals, np\n"
        "data = denormals(np.random.default_rng(8), 200, 50, 3)\n"
        "x, c = (np.asarray(a, np.float32) for a in data)\n"
        "expected = brute_force(x, c).tolist()\n"
        "assert torch.set_flush_denormal(True)\n"
        "idx = kernels.nearest_code(torch.from_numpy(x), torch.from_numpy(c))\n"
        "assert idx.tolist() == expected or kernels.backend()[0] == 'reference'\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_only_dense_tensors():
    x, c = torch.randn(5, 3), torch.randn(4, 3)
    for a, b in ((x.to_sparse(), c), (x, c.to_sparse())):
        with pytest.raises(ValueError, match="dense .*sparse_coo"):
            nearest_code(a, b)


def test_autograd_notices_that_a_codebook_has_changed():
    codebook, count, total = state(4, 3)
    weight = torch.ones(4, 3, requires_grad=True)
    product = (codebook * weight).sum()
    ema_update_(codebook, count, total, torch.randn(5, 3), torch.tensor([0, 1, 2, 3, 0]), 0.9)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads):
    x, c = torch.randn(997, 37), torch.randn(211, 37)
    before = torch.get_num_threads()
    results = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            idx, _, d = quantize(x, c)
            state = c.clone(), torch.ones(211), c.clone()
            ema_update_(*state, x, idx, 0.9, restart_below=0.95, restart_rows=torch.arange(211))
            results.append([idx, d, *code_statistics(x, idx, 211), *state])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_32_bits():
    """Rows more than 2^31 elements apart. The memory in between is never touched, so it costs
    nothing."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 4), (2**31 + 16, 1))
    far.copy_(torch.randn(2, 4))
    check(far, far.clone())
    check(torch.randn(5, 4).bfloat16(), far)
    n, s = code_statistics(far, torch.tensor([1, 0]), 2)
    assert n.tolist() == [1, 1] and torch.equal(s, far.flip(0).float())


def test_exact_under_autocast():
    """bfloat16 training wraps the model in autocast, which would silently run the screen's product
    in bfloat16."""
    rng = np.random.default_rng(4)
    x, c = (torch.from_numpy(np.asarray(a, np.float32)) for a in clusters(rng, 300, 64, 32))
    with torch.autocast("cpu", torch.bfloat16):
        check(x, c)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_exact_at_any_matmul_precision(precision):
    """`set_float32_matmul_precision` lets the product of the screen run in TF32 or bfloat16 where
    the machine can."""
    rng = np.random.default_rng(5)
    x, c = (torch.from_numpy(np.asarray(a, np.float32)) for a in clusters(rng, 300, 64, 32))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        check(x, c)
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_matrix_of_rows_by_codes_exists():
    """N x K would be 16 MB in float32: no single allocation comes near it, even here where every
    code is rescanned."""
    N, K = 4096, 1024
    x, c = (
        torch.from_numpy(np.asarray(a, np.float32))
        for a in all_equal(np.random.default_rng(7), N, K, 16)
    )
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        reference.quantize(x, c)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 8 << 20, f"one allocation of {largest / 2**20:.0f} MB"


# --------------------------------------------------------------------------------------------------
# EMA update


def state(K, D, seed=0):
    g = torch.Generator().manual_seed(seed)
    codebook, count = torch.randn(K, D, generator=g), torch.rand(K, generator=g) + 0.5
    return codebook, count, codebook * count[:, None]


def ema_numpy(codebook, count, total, x, idx, decay, eps):
    """One step of van den Oord et al. 2017, appendix A.1, with Laplace smoothing, in float64."""
    K, hot = len(codebook), np.zeros((len(x), len(codebook)))
    hot[np.arange(len(x)), idx] = 1
    count = decay * count + (1 - decay) * hot.sum(0)
    total = decay * total + (1 - decay) * hot.T @ x
    mass = count.sum()
    return total / ((count + eps) / (mass + K * eps) * mass)[:, None], count, total


@given(
    seed=st.integers(0, 2**32 - 1),
    K=st.integers(1, 9),
    D=st.integers(1, 5),
    N=st.integers(0, 40),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0]),
    eps=st.sampled_from([1e-5, 1e-2]),
)
@EXAMPLES
def test_ema_closed_form_over_several_steps(seed, K, D, N, decay, eps):
    rng = np.random.default_rng(seed)
    torch_state = state(K, D, seed)
    numpy_state = [t.double().numpy().copy() for t in torch_state]
    for _ in range(5):
        x, idx = rng.standard_normal((N, D)).astype(np.float32), rng.integers(K, size=N)
        if decay == 0.0 and len(set(idx.tolist())) < K:
            return  # without memory an unused code is 0 / eps: another test's business
        restarted = ema_update_(
            *torch_state, torch.from_numpy(x), torch.from_numpy(idx), decay, eps
        )
        numpy_state = ema_numpy(*numpy_state, x.astype(np.float64), idx, decay, eps)
        assert restarted == 0
        for got, expected in zip(torch_state, numpy_state, strict=True):
            np.testing.assert_allclose(got.numpy(), expected, rtol=2e-4, atol=2e-5)


def test_t_steps_of_one_batch_in_closed_form():
    """count_t = d^t count_0 + (1 - d^t) n and the same for the sum: written out, not iterated."""
    codebook, count, total = state(4, 3)
    x, idx = torch.randn(10, 3), torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 3, 3])
    n = torch.bincount(idx, minlength=4)
    s = torch.stack([x[idx == k].sum(0) for k in range(4)])
    expected_count = 0.9**20 * count + (1 - 0.9**20) * n
    expected_total = 0.9**20 * total + (1 - 0.9**20) * s
    for _ in range(20):
        ema_update_(codebook, count, total, x, idx, 0.9)
    torch.testing.assert_close(count, expected_count, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(total, expected_total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        codebook[[0, 1, 3]],
        (expected_total / expected_count[:, None])[[0, 1, 3]],
        rtol=1e-3,
        atol=1e-4,
    )


def test_every_code_decays_not_only_the_used_ones():
    codebook, count, total = state(6, 3)
    before = codebook.clone(), count.clone(), total.clone()
    ema_update_(codebook, count, total, torch.randn(8, 3), torch.full((8,), 2), 0.9)
    unused = [0, 1, 3, 4, 5]
    torch.testing.assert_close(count[unused], 0.9 * before[1][unused])
    torch.testing.assert_close(total[unused], 0.9 * before[2][unused])
    # the ratio stays
    torch.testing.assert_close(codebook[unused], before[0][unused], rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 2**32 - 1), N=st.integers(0, 60), K=st.integers(1, 12))
@EXAMPLES
def test_counts_and_sums_are_conserved(seed, N, K):
    """Whatever the assignment, all counts together decay towards N and all sums towards the sum of
    the rows."""
    rng = np.random.default_rng(seed)
    codebook, count, total = state(K, 3, seed)
    x, idx = (
        torch.from_numpy(rng.standard_normal((N, 3)).astype(np.float32)),
        torch.from_numpy(rng.integers(K, size=N)),
    )
    expected_count = 0.99 * count.sum() + 0.01 * N
    expected_total = 0.99 * total.sum(0) + 0.01 * x.sum(0)
    ema_update_(codebook, count, total, x, idx, 0.99)
    torch.testing.assert_close(count.sum(), expected_count, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.sum(0), expected_total, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 2**32 - 1), N=st.integers(1, 60))
@EXAMPLES
def test_order_of_rows_does_not_matter(seed, N):
    rng = np.random.default_rng(seed)
    x, idx = (
        torch.from_numpy(rng.standard_normal((N, 4)).astype(np.float32)),
        torch.from_numpy(rng.integers(7, size=N)),
    )
    shuffle = torch.from_numpy(rng.permutation(N))
    one, other = state(7, 4), state(7, 4)
    ema_update_(*one, x, idx, 0.9)
    ema_update_(*other, x[shuffle], idx[shuffle], 0.9)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_statistics_of_halves_add_up():
    """What data-parallel training relies on: counts and sums of two ranks, added, are those of the
    whole batch."""
    x, idx = torch.randn(30, 4), torch.randint(9, (30,))
    n, s = kernels.code_statistics(x, idx, 9)
    (n_a, s_a), (n_b, s_b) = (
        kernels.code_statistics(x[:11], idx[:11], 9),
        kernels.code_statistics(x[11:], idx[11:], 9),
    )
    assert torch.equal(n, n_a + n_b) and int(n.sum()) == 30
    torch.testing.assert_close(s, s_a + s_b)


def test_laplace_smoothing_pulls_unused_codes_towards_zero():
    """SPEC's warning, so that the restart below is seen to be needed: without use and restart a
    code fades away."""
    codebook, count, total = state(3, 4)
    before, norms = codebook.clone(), []
    x, idx = torch.randn(6, 4), torch.tensor([0, 0, 0, 1, 1, 1])
    for _ in range(300):
        ema_update_(codebook, count, total, x, idx, 0.9, eps=1e-3)
        norms.append(float(codebook[2].norm()))
    assert all(a >= b for a, b in zip(norms, norms[1:], strict=False))
    assert norms[-1] < 1e-3 * before[2].norm()
    assert torch.isfinite(codebook).all()
    torch.testing.assert_close(codebook[0], x[:3].mean(0), rtol=2e-3, atol=2e-3)


def test_restart_resets_code_count_and_sum():
    codebook, count, total = state(5, 3)
    count[3], total[3] = 1e-4, 1e-4 * codebook[3]
    x, idx = torch.randn(10, 3), torch.tensor([0, 1, 2, 4] * 2 + [0, 1])
    rows = torch.tensor([9, 9, 9, 6, 9])
    alive = state(5, 3)
    alive[1][3], alive[2][3] = 1e-4, 1e-4 * alive[0][3]
    ema_update_(*alive, x, idx, 0.9)
    assert (
        ema_update_(codebook, count, total, x, idx, 0.9, restart_below=0.01, restart_rows=rows) == 1
    )
    assert torch.equal(codebook[3], x[6])
    assert float(count[3]) == pytest.approx(10 / 5)
    torch.testing.assert_close(total[3], x[6] * 2)
    others = [0, 1, 2, 4]
    for got, expected in zip((codebook, count, total), alive, strict=True):
        assert torch.equal(got[others], expected[others])  # nobody else is touched
    ema_update_(codebook, count, total, x, idx, 0.9, restart_below=0.01, restart_rows=rows)
    # and it does not jump in the next step
    torch.testing.assert_close(codebook[3], x[6], rtol=1e-4, atol=1e-4)


def test_restart_is_decided_after_the_update():
    """A code below the threshold that this very batch uses is alive."""
    codebook, count, total = state(2, 3)
    count.copy_(torch.tensor([1.0, 0.0]))
    total[1] = 0
    x = torch.randn(4, 3)
    assert (
        ema_update_(
            codebook,
            count,
            total,
            x,
            torch.ones(4, dtype=torch.int64),
            0.5,
            restart_below=0.3,
            restart_rows=torch.zeros(2, dtype=torch.int64),
        )
        == 0
    )
    torch.testing.assert_close(codebook[1], x.mean(0), rtol=1e-3, atol=1e-3)


def test_an_empty_batch_restarts_nothing_and_stays_finite():
    codebook, count, total = state(3, 2)
    assert (
        ema_update_(
            codebook,
            count,
            total,
            torch.empty(0, 2),
            torch.empty(0, dtype=torch.int64),
            0.5,
            restart_below=9.0,
            restart_rows=torch.zeros(3, dtype=torch.int64),
        )
        == 0
    )
    assert torch.isfinite(codebook).all()


@pytest.mark.parametrize("wrong", [
    dict(codebook=torch.zeros(3)), dict(count=torch.ones(3)), dict(total=torch.zeros(4, 2)),
    dict(x=torch.zeros(6, 2)), dict(x=torch.zeros(6, 3, 3)),
    dict(idx=torch.zeros(5, dtype=torch.int64)), dict(idx=torch.zeros(6, dtype=torch.int32)),
    dict(idx=torch.full((6,), 4)), dict(idx=torch.full((6,), -1)),
])  # fmt: skip
def test_ema_refuses_bad_input_and_changes_nothing(wrong):
    codebook, count, total = state(4, 3)
    args = dict(
        codebook=codebook,
        count=count,
        total=total,
        x=torch.randn(6, 3),
        idx=torch.tensor([0, 1, 2, 3, 0, 1]),
    )
    args |= wrong
    before = {k: args[k].clone() for k in ("codebook", "count", "total")}
    with pytest.raises(ValueError, match="needs .* found|must lie in"):
        ema_update_(**args, decay=0.9)
    assert all(torch.equal(before[k], args[k]) for k in before)


@given(
    seed=st.integers(0, 2**32 - 1),
    N=st.integers(0, 60),
    K=SIZES,
    D=SIZES,
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
)
@EXAMPLES
def test_statistics_are_the_bits_of_the_reference(seed, N, K, D, dtype, strided):
    """And those of a plain loop over ascending rows in float32."""
    torch.manual_seed(seed)
    x, idx = torch.randn(N, D).to(dtype), torch.randint(K, (N,))
    if strided:
        x, idx = torch.randn(D, 2 * N).to(dtype).T[::2], torch.randint(K, (3 * N,))[::3]
    n, s = code_statistics(x, idx, K)
    expected = torch.zeros(K, D)
    for row, k in zip(x.float(), idx, strict=True):
        expected[k] += row
    assert torch.equal(s, expected) and torch.equal(n, torch.bincount(idx, minlength=K).float())
    for ours, theirs in zip((n, s), reference.code_statistics(x, idx, K), strict=True):
        assert ours.dtype == theirs.dtype == torch.float32 and torch.equal(ours, theirs)
    if torch.cuda.is_available():
        assert all(
            torch.equal(a, b.cpu())
            for a, b in zip((n, s), code_statistics(x.cuda(), idx.cuda(), K), strict=True)
        )


@given(
    seed=st.integers(0, 2**32 - 1),
    K=SIZES,
    D=SIZES,
    decay=st.sampled_from([0.0, 0.5, 0.99]),
    restart_below=st.sampled_from([0.0, 0.3, 2.0, 1e9]),
    empty=st.booleans(),
    spare=st.booleans(),
)
@EXAMPLES
def test_ema_apply_agrees_with_the_reference(seed, K, D, decay, restart_below, empty, spare):
    """Rounding apart, as the products of the reference implementation are fused where the processor
    can. Both restart the same codes."""
    torch.manual_seed(seed)
    state = [torch.randn(K, D), torch.rand(K) + 0.1, torch.randn(K, D)]
    n = torch.zeros(K) if empty else torch.randint(5, (K,)).float()
    s, candidates = torch.randn(K, D) * n[:, None], torch.randn(K, D) if spare else None
    ours, theirs = [t.clone() for t in state], [t.clone() for t in state]
    restarted = ema_apply_(*ours, n, s, decay, 1e-5, restart_below, candidates)
    assert restarted == reference.ema_apply_(*theirs, n, s, candidates, decay, 1e-5, restart_below)
    assert restarted == (
        0
        if not n.any() or not spare
        else (decay * state[1] + (1 - decay) * n < restart_below).sum()
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_statistics_of_parts_add_up():
    """What data-parallel training does: every process its own statistics, their sum, one apply on
    every process."""
    x, idx = torch.randn(60, 5), torch.randint(7, (60,))
    before, whole, parts = (state(7, 5) for _ in range(3))
    ema_update_(*whole, x, idx, 0.9)
    pieces = [code_statistics(x[i : i + 20], idx[i : i + 20], 7) for i in (0, 20, 40)]
    ema_apply_(*parts, sum(n for n, _ in pieces), sum(s for _, s in pieces), 0.9)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
    assert not torch.equal(whole[0], before[0])


@pytest.mark.parametrize("wrong", [
    dict(n=torch.ones(3)), dict(s=torch.ones(4, 2)), dict(count=torch.ones(4, dtype=torch.float64)),
    dict(total=torch.ones(3, 4).T), dict(candidates=torch.ones(4, 2)), dict(codebook=torch.ones(4)),
])  # fmt: skip
def test_ema_apply_refuses_bad_input(wrong):
    codebook, count, total = state(4, 3)
    args = (
        dict(codebook=codebook, count=count, total=total, n=torch.ones(4), s=torch.ones(4, 3))
        | wrong
    )
    before = {k: args[k].clone() for k in ("codebook", "count", "total")}
    with pytest.raises(ValueError, match="ema_apply_ needs .* found"):
        ema_apply_(**args)
    assert all(torch.equal(before[k], args[k]) for k in before)


# --------------------------------------------------------------------------------------------------
# torch ops: schema, fake kernels, compilation


def test_opcheck():
    x, c, idx, ones = torch.randn(50, 7), torch.randn(9, 7), torch.randint(9, (50,)), torch.ones(9)
    ops = torch.ops.hipart
    for op, args in (
        (ops.quantize, (x, c)),
        (ops.quantize, (x.double().T[:5].T, c.double()[:, :5])),
        (ops.code_statistics, (x, idx, 9)),
        (ops.ema_apply_, (c, ones, c.clone(), ones.clone(), c.clone(), None, 0.9, 1e-5, 0.0)),
        (ops.ema_apply_, (c, ones, c.clone(), ones.clone(), c.clone(), c.clone(), 0.9, 1e-5, 2.0)),
    ):
        torch.library.opcheck(op.default, args)


def test_compiles_into_one_graph():
    def step(x, codebook, count, total):
        idx, codes, d = quantize(x, codebook)
        restarted = ema_update_(
            codebook,
            count,
            total,
            x,
            idx,
            0.9,
            restart_below=0.2,
            restart_rows=torch.arange(9) % len(x),
        )
        return idx, codes, d, restarted

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for N in (50, 51, 1):
        x, states = torch.randn(N, 7), (state(9, 7), state(9, 7))
        plain, graph = step(x, *states[0]), compiled(x, *states[1])
        assert all(
            torch.equal(a, b)
            for a, b in zip((*plain, *states[0]), (*graph, *states[1]), strict=True)
        )


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        idx, codes, d = quantize(torch.empty(5, 3), torch.empty(2, 3))
        n, s = code_statistics(torch.empty(5, 3), idx, 2)
    assert (
        idx.shape == d.shape == (5,)
        and codes.shape == (5, 3)
        and n.shape == (2,)
        and s.shape == (2, 3)
    )


# --------------------------------------------------------------------------------------------------
# Building, and doing without

TINY = 'extern "C" int hipart_tiny() { return 1; }\n'  # builds in a second, registers nothing


def fresh(code, tmp_path, **environment):
    """Run Python code on the kernels package in a process of its own, with a build cache of its
    own."""
    env = {k: v for k, v in os.environ.items() if k != "HIPART_KERNELS"} | {
        "TORCH_EXTENSIONS_DIR": str(tmp_path / "cache")
    }
    return subprocess.run(
        [sys.executable, "-c", "import torch, kernels\nfrom pathlib import Path\n" + code],
        cwd=ROOT,
        env=env | {k: str(v) for k, v in environment.items()},
        capture_output=True,
        text=True,
        timeout=300,
    )


def with_source(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "quantizer.cpp").write_text(text)
    (folder / "quantizer.h").write_text("")
    return f"kernels._HERE = Path({str(folder)!r})\n"


SEARCH = """
idx = kernels.nearest_code(torch.tensor([[1.], [5.]]), torch.tensor([[4.], [2.]]))
print(idx.tolist(), kernels.backend()[0])
"""


def fell_back(result, reason):
    """The right answer from the reference implementation, and one line that says why."""
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[0] == "[1, 0] reference"
    assert result.stderr.count("\n") == 1 and reason in result.stderr, result.stderr
    assert "reference implementation" in result.stderr


def test_no_compiler(tmp_path):
    fell_back(fresh(SEARCH, tmp_path, PATH="", CXX="c++"), "no C++ compiler")
    fell_back(fresh(SEARCH, tmp_path, CXX="/nowhere/g++"), "no C++ compiler '/nowhere/g++'")


def test_a_gpu_without_nvcc_leaves_the_cpu_kernels_alone(tmp_path):
    """The commonest machine with a GPU: PyTorch sees it, and there is no CUDA toolkit. A failed
    build comes first."""
    source = (
        with_source(tmp_path / "tiny", TINY)
        + "kernels._HERE.joinpath('quantizer.cu').write_text('')\n"
        + "kernels._HERE.joinpath('quantizer_cuda.cpp').write_text('')\n"
    )
    pretend = (
        "torch.cuda.is_available = lambda: True\ntorch.cuda.device_count = lambda: 1\n"
        "torch.cuda.get_device_capability = lambda i=0: (9, 0)\n"
    )
    result = fresh(
        source + pretend + "print(kernels.backend('cuda')[0], kernels.backend('cpu')[0])",
        tmp_path,
        CUDA_HOME="/nowhere",
        CUDA_PATH="/nowhere",
    )
    assert result.stdout == "reference cpp\n", result.stderr
    assert (
        result.stderr.count("kernels: ") == 1
        and "the cuda kernels could not be built" in result.stderr
    )
    assert [f.name for f in (tmp_path / "cache").glob("hipart_cpp_*/*.so")] == ["quantizer.so"]


def test_a_gpu_without_tensor_cores_gets_the_reference_implementation(monkeypatch):
    """Beside a newer GPU, too: each is asked for itself."""
    capability = {"cuda:0": (6, 1), "cuda:1": (7, 5)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d: capability[str(d)])
    monkeypatch.setattr(kernels, "_load", lambda kernel: (kernel, "pretended"))
    assert kernels.backend("cuda:1") == ("cuda", "pretended")
    name, why = kernels.backend("cuda:0")
    assert name == "reference" and "cuda:0 is older than compute capability 7.0" in why


def test_a_binary_that_does_not_load_is_built_again(tmp_path):
    code = with_source(tmp_path / "tiny", TINY) + "print(kernels.backend()[0])"
    assert fresh(code, tmp_path).stdout == "cpp\n"
    (binary,) = (tmp_path / "cache").glob("*/quantizer.so")
    binary.unlink()
    binary.write_bytes(b"half a binary")
    assert fresh(code, tmp_path).stdout == "cpp\n" and binary.stat().st_size > 1000


def test_broken_source(tmp_path):
    source = with_source(tmp_path / "broken", "#error this line is broken\n")
    fell_back(fresh(source + SEARCH, tmp_path), "this line is broken")
    forced = fresh(source + SEARCH, tmp_path, HIPART_KERNELS="cpp")
    assert forced.returncode and "RuntimeError: HIPART_KERNELS=cpp, but" in forced.stderr


def test_no_place_to_build(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    fell_back(fresh(SEARCH, tmp_path), "cache")


def test_first_users_at_once_build_once(tmp_path):
    """Three processes start with an empty cache; then one without a compiler loads what they
    built."""
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo >> {tmp_path / "compiled"};; esac\nexec g++ "$@"\n'
    )
    compiler.chmod(0o755)
    code = with_source(tmp_path / "tiny", TINY) + "print(kernels.backend()[0])"
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: fresh(code, tmp_path, CXX=compiler), range(3)))
    assert [r.stdout for r in results] == ["cpp\n"] * 3, results
    assert (tmp_path / "compiled").read_text() == "\n"
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(f.name for f in folder.iterdir()) == ["lock", "quantizer.so"]
    assert fresh(code, tmp_path, PATH="").stdout == "cpp\n"


@pytest.mark.parametrize(
    "choice, stdout, stderr",
    [
        ("reference", "[1, 0] reference\n", ""),
        (
            "fast",
            "",
            "ValueError: HIPART_KERNELS must be one of auto, reference, cpp, cuda, found 'fast'",
        ),
        ("cuda", "", "RuntimeError: HIPART_KERNELS=cuda, but"),
    ],
)
def test_the_choice_can_be_overridden(tmp_path, choice, stdout, stderr):
    nothing_is_built_at_import = "assert not kernels._loaded\n"
    no_gpu = "torch.cuda.is_available = lambda: False\n"
    result = fresh(nothing_is_built_at_import + no_gpu + SEARCH, tmp_path, HIPART_KERNELS=choice)
    assert result.stdout == stdout and stderr in result.stderr
    assert not (tmp_path / "cache").exists()


def test_the_self_check():
    """Ties, offsets and 2,503 x 2,001 pairs against the reference implementation."""
    result = subprocess.run(
        [sys.executable, "-m", "kernels"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0 and "cpu: self-check passed" in result.stdout
    assert f"cpu: {kernels.backend('cpu')[0]} (" in result.stdout


def test_the_benchmark_runs_and_writes_its_figures(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location(
        "benchmark_kernels", ROOT / "benchmarks" / "kernels.py"
    )
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "SEARCH_SIZES", {"cpu": [(65, 33, 8)]})
    monkeypatch.setattr(benchmark, "EMA_SIZES", [(65, 33, 8)])
    monkeypatch.setattr(benchmark, "MEMORY", [("ours", 100)])
    monkeypatch.setattr(benchmark, "STEPS", ["standard"])
    monkeypatch.setattr(
        sys, "argv", ["kernels.py", "--device", "cpu", "--seconds", "0", "--results", str(tmp_path)]
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for a busy machine make it slow
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(before)
    report = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert report["machine"]["backend"] == "cpp"
    assert report["search"]["65,33,8"].keys() >= {
        "ours",
        "reference implementation",
        "cdist + argmin",
    }
    rows = report["search"]["65,33,8"], report["ema"]["65,33,8"], report["step"]["standard"]
    assert all(t > 0 for row in rows for t in row.values())
    assert "| cdist + argmin |" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# The quantizer on top of them


def quantizer(K=16, D=4, decay=0.99, restart_below=0.01, rows=400, rows_per_step=64, seed=0):
    torch.manual_seed(seed)
    q = Quantizer(K, D, decay, restart_below)
    z = torch.randn(rows, D)
    q.initialize(z, rows_per_step)
    return q.train(), z


def buffers(module):
    return {name: b.clone() for name, b in module.named_buffers()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_codebooks_are_buffers_that_no_optimiser_moves():
    model = MSST(
        Config(D=8, K_s=16, K_d=16, encoder_blocks=1, encoder_width=8, decoder_width=8, n_actions=3)
    )
    names = [name for name, _ in model.named_parameters()]
    assert not [n for n in names if "Q_s" in n or "Q_d" in n or "codebook" in n]
    for q in ("Q_s", "Q_d"):
        assert {
            f"{q}.codebook",
            f"{q}.count",
            f"{q}.total",
            f"{q}.active",
        } <= model.state_dict().keys()
    x_f = torch.randn(6, 96, 2)
    model.initialize_codebooks(x_f, 6)
    before = buffers(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    loss, _, _ = model.loss(x_f, x_f[:, ::2], torch.zeros(6, dtype=torch.int64))
    loss.backward()
    optimiser.step()
    assert same(before, buffers(model))


def test_quantize_first_update_after():
    """A training forward uses the codebook as it was and leaves it so; only the explicit update
    moves it."""
    q, _ = quantizer()
    z, before = torch.randn(3, 5, 4), buffers(q)
    z_hat, idx = q(z)
    assert same(before, buffers(q))
    np.testing.assert_array_equal(
        idx.flatten().numpy(), brute_force(z.flatten(0, 1), before["codebook"])
    )
    torch.testing.assert_close(z_hat, before["codebook"][idx])
    q.update(z, idx)
    assert not torch.equal(before["codebook"], q.codebook)
    torch.testing.assert_close(z_hat, before["codebook"][idx])


def test_update_of_the_quantizer_is_the_ema_step():
    q, _ = quantizer(restart_below=0.0)
    before = [t.double().numpy().copy() for t in (q.codebook, q.count, q.total)]
    for seed in range(3):
        z = torch.randn(4, 16, 4, generator=torch.Generator().manual_seed(seed))
        _, idx = q(z)
        q.update(z, idx)
        before = ema_numpy(
            *before, z.flatten(0, 1).double().numpy(), idx.flatten().numpy(), 0.99, 1e-5
        )
    for got, expected in zip((q.codebook, q.count, q.total), before, strict=True):
        np.testing.assert_allclose(got.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_nothing_updates_in_eval_mode():
    q, _ = quantizer()
    q.eval()
    before, z = buffers(q), torch.randn(3, 5, 4)
    q.update(z, q(z)[1])
    assert same(before, buffers(q))


def test_nothing_updates_before_initialisation_and_z_passes_unchanged():
    q = Quantizer(8, 4, 0.99, 0.01).train()
    before, z = buffers(q), torch.randn(2, 5, 4, requires_grad=True)
    z_hat, idx = q(z)
    q.update(z, idx)
    assert same(before, buffers(q)) and not q.active
    assert torch.equal(z_hat, z) and z_hat.requires_grad


def test_no_jump_at_the_first_step():
    """After `initialize` count and sum agree with the codebook: unused codes stay, used ones move
    by EMA's share."""
    q, z = quantizer()
    torch.testing.assert_close(q.total / q.count[:, None], q.codebook)
    # what a steady state of 64 rows a step would hold
    assert float(q.count.sum()) == pytest.approx(64, rel=0.3)
    before = q.codebook.clone()
    batch = z[:64].view(4, 16, 4)
    _, idx = q(batch)
    q.update(batch, idx)
    rows, flat, step = batch.flatten(0, 1), idx.flatten(), (q.codebook - before).norm(dim=1)
    for k in range(16):
        mine = rows[flat == k]
        allowed = 0.0 if not len(mine) else float((mine.mean(0) - before[k]).norm())
        share = 0.01 * len(mine) / float(q.count[k])
        assert float(step[k]) <= share * allowed + 2e-3 * float(before[k].norm())


def test_initialize_is_k_means():
    """Better than random rows, no code without rows, every code the mean of its rows (up to the
    last restart)."""
    torch.manual_seed(0)
    centres = torch.randn(8, 4) * 10
    z = (centres[:, None] + 0.1 * torch.randn(8, 50, 4)).flatten(0, 1)
    q = Quantizer(16, 4, 0.99, 0.01)
    q.initialize(z, 64)
    assert bool(q.active) and torch.isfinite(q.codebook).all()
    distance = (z - q.codebook[nearest_code(z, q.codebook)]).norm(dim=1)
    # every cluster found; random rows leave some at a distance of ten or more
    assert distance.mean() < 2.0
    assert (torch.bincount(nearest_code(z, q.codebook), minlength=16) > 0).sum() >= 8


def test_initialize_survives_a_collapsed_encoder():
    q = Quantizer(8, 4, 0.99, 0.01).train()
    q.initialize(torch.ones(50, 4), 16)
    assert all(torch.isfinite(b).all() for b in (q.codebook, q.count, q.total))
    torch.testing.assert_close(q.codebook, torch.ones(8, 4))
    q.update(torch.ones(1, 16, 4), torch.zeros(1, 16, dtype=torch.int64))
    assert torch.isfinite(q.codebook).all()


def test_initialize_refuses_fewer_rows_than_codes():
    with pytest.raises(ValueError, match=r"at least as many .* \(8\), found 7"):
        Quantizer(8, 4, 0.99, 0.01).initialize(torch.randn(7, 4), 16)


def test_dead_codes_come_back():
    """A code far from all data restarts as a row of the batch once its count has faded, and then
    lives."""
    q, z = quantizer(K=4, decay=0.9)
    q.codebook[2] = 1e3
    q.total[2] = q.codebook[2] * q.count[2]
    for _ in range(80):
        batch = z[torch.randperm(len(z))[:64]].view(4, 16, 4)
        q.update(batch, q(batch)[1])
    used = torch.bincount(nearest_code(z, q.codebook), minlength=4)
    assert float(q.codebook.abs().max()) < 10 and int(used[2]) > 0
    torch.testing.assert_close(q.total / q.count[:, None], q.codebook, rtol=1e-3, atol=1e-3)


def test_restarted_codes_are_different_rows():
    """Codes that restart in one step must not be copies of one another: of equal codes only the
    first is chosen."""
    torch.manual_seed(0)
    q = Quantizer(64, 4, 0.99, 0.01).train()
    q.initialize(torch.randn(200, 4), 64)
    q.count[1:] = 0
    q.total[1:] = 0
    z = torch.randn(4, 16, 4)
    q.update(z, torch.zeros(4, 16, dtype=torch.int64))
    assert len(torch.unique(q.codebook[1:], dim=0)) >= 60


def test_straight_through_gradient_and_bfloat16():
    q, _ = quantizer()
    z = torch.randn(2, 3, 4, requires_grad=True)
    weight = torch.randn(2, 3, 4)
    (q(z)[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)  # as if the quantizer were the identity
    z16 = torch.randn(2, 3, 4).bfloat16()
    q.update(z16, q(z16)[1])
    assert q.codebook.dtype == torch.float32 and torch.isfinite(q.codebook).all()
