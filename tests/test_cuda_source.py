"""quantizer.cu without a GPU: nvcc takes it, and its kernels, run on the CPU, keep the contract.

cuda_emulator.h runs a warp lane by lane. Its tensor cores cut off every term of a sum, four
products at a time, which is as coarse as any real ones are known to be.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kernels import KINDS, brute_force, distances

KERNELS = Path(__file__).parent.parent / "kernels"

# Of every chunk of rows: the best scores of all groups, and the bound of every row. The three terms
# of the bound can be made smaller, one at a time.
DECLARED = """
namespace hipart::cuda {
namespace { struct Size; struct CodesOnly; }
void observe(int64_t, int64_t, int64_t, int64_t, const float*, const Size*, CodesOnly);
}
"""
WRAPPERS = """
namespace hipart::cuda {
struct { float *best, *E; Size* sizes; } out;
void observe(int64_t first, int64_t rows, int64_t D, int64_t groups, const float* best,
             const Size* sizes, CodesOnly codes) {
  if (!out.best) return;
  std::copy(best, best + rows * groups, out.best + first * groups);
  std::copy(sizes, sizes + rows, out.sizes + first);
  const float C = __uint_as_float(codes.largest[0]), dC = __uint_as_float(codes.largest[1]);
  for (int64_t i = 0; i < rows; ++i) out.E[first + i] = error_bound(sizes[i], C, dC, D);
}
extern "C" int search(const float* x, const float* c, const float* mean, const float* largest,
                      const int64_t* n, int64_t* idx, double* distance, float* best, float* E,
                      void* sizes) {
  out = {best, E, static_cast<Size*>(sizes)};
  int64_t bytes = 0;
  nearest_code(nullptr, bytes, x, c, mean, largest, n[0], n[1], n[2], idx, distance, nullptr);
  void* scratch = std::aligned_alloc(256, bytes);
  std::memset(scratch, 0xff, bytes);  // what nobody has written is NaN
  const int error =
      nearest_code(scratch, bytes, x, c, mean, largest, n[0], n[1], n[2], idx, distance, nullptr);
  std::free(scratch);
  return error;
}
extern "C" int statistics(const float* x, const int64_t* order, const int64_t* first,
                          const int64_t* n, float* count, float* s) {
  return code_statistics(x, order, first, n[0], n[1], count, s, nullptr);
}
}
"""


def nvcc(*flags):
    if not shutil.which("nvcc"):
        pytest.skip("there is no nvcc here")
    command = ["nvcc", "-std=c++17", "-Werror", "all-warnings", *flags, KERNELS / "quantizer.cu"]
    return subprocess.run(command, check=True, capture_output=True, text=True)


def test_nvcc_takes_it_and_no_kernel_spills(tmp_path):
    """For the T4 and RTX 20 (7.5), the A100 (8.0) and the H100 (9.0). nvcc 13 no longer compiles
    for the V100 (7.0), so that is not checked here."""
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (75, 80, 90)]
    as_torch = ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"]  # it sets them
    report = nvcc(*archs, *as_torch, "--threads", "3", "-Xptxas", "-v", "-c",
                  "-o", tmp_path / "q.o").stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", report)]
    assert len(spills) == len(registers) == 3 * 4, report
    assert set(spills) == {("0", "0")} and max(registers) <= 200, report


def test_it_is_short_and_plain():
    source = (KERNELS / "quantizer.cu").read_text()
    assert source.count("\n") <= 260 and not re.search(r"\basm\b|torch/|ATen/", source)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    source = re.sub(r"#include <(cuda_fp16|mma)\.h>\n", "", (KERNELS / "quantizer.cu").read_text())

    def replace(there, here):
        nonlocal source
        assert source.count(there) == 1, there
        source = source.replace(there, here)

    # chunks of 128 rows and at most three shares of the codes, so that small inputs cross borders
    replace("MOST_SCORES = 1 << 23", "MOST_SCORES = 1")
    replace("WANTED_BLOCKS = 512", "WANTED_BLOCKS = 3")
    replace("__device__ float error_bound", 'extern "C" { float parts[3] = {1, 1, 1}; }\n'
            "__device__ float error_bound")
    replace("row.moved * C + X * dC + sums * (C * (X + C)) + contract * (X * X)",
            "parts[0] * (row.moved * C + X * dC) + parts[1] * sums * (C * (X + C)) + "
            "parts[2] * contract * (X * X)")
    source, launches = re.subn(r"(\w+)<<<(.*?), (\w+), 0, .*?>>>\((.*?)\);",
                               r"emulator::launch(\2, \3, [&] { \1(\4); });", source, flags=re.S)
    assert launches == 5
    replace("emulator::launch(blocks(rows, THREADS / GROUP)",
            "observe(first, rows, D, groups, best, sizes, codes);\n"
            "    emulator::launch(blocks(rows, THREADS / GROUP)")
    code, library = folder / "emulated.cpp", folder / "emulated.so"
    code.write_text('#include "cuda_emulator.h"\n' + DECLARED + source + WRAPPERS)
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-w", "-shared", "-fPIC",
             "-U_FORTIFY_SOURCE", f"-I{KERNELS}", f"-I{Path(__file__).parent}"]
    subprocess.run(["g++", *flags, code, "-o", library], check=True)
    return ctypes.CDLL(library)


@pytest.fixture
def parts(emulated):
    """The three factors of the bound's terms; 1 again after the test."""
    factors = (ctypes.c_float * 3).in_dll(emulated, "parts")
    yield factors
    factors[:] = [1, 1, 1]


def pointer(t):
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def search(library, x, c, observe=False):
    """As quantizer_cuda.cpp calls it -> idx, distance and, to observe, a dict of the screen."""
    x, c = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (x, c))
    (N, D), K, groups = x.shape, len(c), -(-len(c) // 128) * 16
    mean = c.mean(0)
    largest = (c - mean).abs().max()
    idx, distance = torch.full((N,), -7), torch.full((N,), -7.0, dtype=torch.float64)
    best, E, sizes = torch.zeros(N, groups), torch.zeros(N), torch.zeros(N, 2)
    seen = (best, E, sizes) if observe else (None, None, None)
    n = torch.tensor([N, K, D])
    assert library.search(*map(pointer, (x, c, mean, largest, n, idx, distance, *seen))) == 0
    screen = dict(best=best, E=E, length=sizes[:, 0], moved=sizes[:, 1], mean=mean, largest=largest)
    return idx, distance, screen


def make(kind, N, K, D, seed=None):
    with np.errstate(over="ignore", under="ignore"):
        rng = np.random.default_rng(N if seed is None else seed)
        return [np.ascontiguousarray(a, np.float32) for a in kind(rng, N, K, D)]


def check(library, x, c):
    x, c = (np.asarray(a, np.float32) for a in (x, c))
    expected = distances(x, c)
    idx, distance, _ = search(library, x, c)
    np.testing.assert_array_equal(idx.numpy(), expected.argmin(1))
    np.testing.assert_array_equal(distance.numpy(), expected.min(1, initial=np.inf))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_emulated_search_keeps_the_contract(emulated, kind):
    for N, K, D in ((5, 3, 1), (40, 70, 13)):
        x, c = make(kind, N, K, D)
        check(emulated, x, c)


@pytest.mark.parametrize(("N", "K", "D"), [
    (300, 270, 40), (129, 128, 16), (128, 129, 17), (16, 700, 8), (1, 1, 1), (20, 40, 150),
])  # fmt: skip
def test_emulated_search_crosses_every_border(emulated, N, K, D):
    """128 rows make a chunk and a block, 128 codes a tile, 16 dimensions a step. Three blocks share
    six tiles."""
    check(emulated, torch.randn(N, D), torch.randn(K, D))


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1e3, 1), (0, 1e-9), (0, 1e9), (0, 1e25)])
def test_emulated_screen_leaves_little_open(emulated, offset, scale):
    g = torch.Generator().manual_seed(0)
    x, c = ((torch.randn(n, 64, generator=g) + offset) * scale for n in (200, 300))
    _, _, seen = search(emulated, x, c, observe=True)
    best, E = seen["best"], seen["E"]
    groups = (best >= best.amax(1, keepdim=True) - 2 * E[:, None]).sum(1).float()
    assert (groups >= 1).all() and groups.mean() < 1.1


def test_emulated_screen_is_not_misled_by_what_lies_beyond_the_last_code(emulated):
    c = torch.randn(200, 64)
    idx, _, seen = search(emulated, c[-1] + 0.1 * torch.randn(100, 64), c, observe=True)
    assert (idx == 199).all()
    codes = torch.arange(256)
    missing = torch.ones(32, dtype=torch.bool)  # groups without a code
    missing[codes[:200] // 128 * 16 + codes[:200] % 16] = False
    assert torch.equal((seen["best"] < -1e29).all(0), missing)


@pytest.mark.parametrize("scales", [(1e4, 1), (1, 1e4), (1e-4, 1), (1, 1e-4, 1e4)])
def test_emulated_screen_bears_tiles_of_different_size(emulated, scales):
    where = torch.randn(24)
    c = torch.cat([where + s * torch.randn(128, 24) for s in scales])
    check(emulated, where + min(scales) * torch.randn(20, 24), c)


def test_rows_that_overflow_float16_rule_nothing_out(emulated):
    x, c = torch.randn(40, 8), torch.randn(200, 8)
    x[::3] *= 1e6
    check(emulated, x, c)
    E = search(emulated, x, c, observe=True)[2]["E"]
    assert not E[::3].isfinite().any() and E[1::3].isfinite().all()


# --------------------------------------------------------------------------------------------------
# The bound


def truth(x, c, seen):
    """True scores of the groups, in the screen's units: [N, groups], and what is behind them."""
    exponent = int(np.frexp(np.float32(seen["largest"]))[1])
    scale = 2.0 ** min(7 - exponent, 126)
    x, c = ((a.astype(np.float64) - seen["mean"].double().numpy()) * scale for a in (x, c))
    score = x @ c.T - (c * c).sum(1) / 2
    best = np.full(seen["best"].shape, -np.inf)
    for k in range(len(c)):
        group = k // 128 * 16 + k % 16
        best[:, group] = np.maximum(best[:, group], score[:, k])
    return best, x, c


def excess(x, c, seen):
    """By how many times its bound a score is off, at most."""
    best, _, _ = truth(x, c, seen)
    off = np.abs(seen["best"].double().numpy() - best)[:, np.isfinite(best).any(0)]
    return (off.max(1) / seen["E"].double().numpy()).max()


def aligned(rng, N, K, D):
    """What rounding to float16 takes from a row is parallel to all codes."""
    x = np.float32(1 + 2.0**-11 - 2.0**-20) * rng.choice([1, 2, 4], (N, 1)) * np.ones((N, D))
    near = 1 + 1e-4 * rng.random((K, 1))
    return x, rng.choice([1, -1], (K, 1)) * near * np.ones((K, D))


def codes_aligned(rng, N, K, D):
    """The same for codes, in opposite pairs, so that their mean is zero."""
    c = np.float32(1 + 2.0**-11 - 2.0**-20) * np.ones((K // 2, D)) * rng.choice([1, 2], (K // 2, 1))
    return np.ones((N, D)) * rng.choice([1, 2, 4], (N, 1)), np.concatenate([c, -c])


def exact_in_float16(rng, N, K, D):
    """Codes in opposite pairs, so that their mean is zero: only sums are rounded."""
    c = np.float16(1 + rng.random((K // 2, D)))
    return np.float16(1 + rng.random((N, D))), np.concatenate([c, -c])


def cut_off(rng, N, K, D):
    """The sum starts at -2048, whose last place is 2^-12; each product is a little less, and is
    cut off. All numbers are exact in float16."""
    c = np.full((K // 2, D), 2.0**-6 * (1 - 2.0**-8))
    c[:, 0] = 64
    x = np.full((N, D), 2.0**-6)
    x[:, 0] = 0
    return x, np.concatenate([c, -c])


HARD_KINDS = [aligned, codes_aligned, exact_in_float16, cut_off]


@pytest.mark.parametrize(("kind", "K", "D"), [(kind, 300, 16) for kind in KINDS] +
                         [(kind, 40, 132) for kind in HARD_KINDS])
def test_emulated_bound_holds(emulated, kind, K, D):
    x, c = make(kind, 24, K, D, seed=K)
    idx, _, seen = search(emulated, x, c, observe=True)
    np.testing.assert_array_equal(idx.numpy(), brute_force(x, c))
    with np.errstate(over="ignore", invalid="ignore"):
        best, true_x, _ = truth(x, c, seen)
        seen_best, E = seen["best"].double().numpy(), seen["E"].double().numpy()
        wrong = np.abs(seen_best - best) > E[:, None]  # NaN and infinity bound everything
    assert not wrong[:, np.isfinite(best).any(0)].any()
    finite = np.isfinite(E)
    assert (seen["length"].double().numpy() >= np.linalg.norm(true_x, axis=1))[finite].all()
    if kind in HARD_KINDS:
        assert finite.all()


@pytest.mark.parametrize("kind", [aligned, codes_aligned, cut_off], ids=lambda kind: kind.__name__)
def test_emulated_bound_ten_times_smaller_is_caught(emulated, parts, kind):
    """Each term where it matters: the two of rounding, and that of sums."""
    x, c = make(kind, 24, 40, 132)
    assert excess(x, c, search(emulated, x, c, observe=True)[2]) < 1
    parts[1 if kind is cut_off else 0] = 0.1
    assert excess(x, c, search(emulated, x, c, observe=True)[2]) > 1


def test_emulated_bound_ten_times_smaller_gives_wrong_answers(emulated, parts):
    """Only the rounding of the rows tells these codes apart, and all of it points along them."""
    axis, across = np.array([2.0, 3, 6]), np.array([3.0, -2, 0]) / 13**0.5
    angle = np.random.default_rng(0).uniform(0, 2 * np.pi, (128, 1))
    x = np.cos(angle) * across + np.sin(angle) * np.cross(axis, across) / 7
    c = np.repeat([axis, -axis], 128, 0)  # a group has codes of one kind only
    check(emulated, x, c)
    parts[:] = [0.1] * 3
    x, c = np.float32(x), np.float32(c)
    assert (search(emulated, x, c)[0].numpy() != brute_force(x, c)).any()


def test_emulated_bound_covers_what_the_contract_itself_rounds(emulated, parts):
    """Code 1 is truly nearer, but in float64 every difference to code 0 is rounded away: a tie. The
    numbers are so small that the scale has reached its end, and the row is far from all codes."""
    x = np.array([[2.0**15] + [0.5] * 16]) * 2.0**-126
    c = np.array([[0.0], [1], [-1]]) * np.ones((3, 17)) * 2.0**-149
    c[:, 0] = 0
    check(emulated, x, c)
    assert search(emulated, x, c)[0] == 0
    parts[2] = 0.1
    assert search(emulated, x, c)[0] == 1


def test_length_and_rounding_are_upper_bounds_down_to_nothing(emulated):
    """Squares of what is lost here underflow float32."""
    c = np.array([[64.0, 0], [-64.0, 0]], np.float32)
    x = np.float32(2.0) ** -np.arange(20, 140, dtype=np.float32)[:, None] * np.ones((1, 2), "f4")
    _, _, seen = search(emulated, x, c, observe=True)
    rounded = np.float16(x).astype(np.float64)
    assert (seen["moved"].double().numpy() >= np.linalg.norm(x - rounded, axis=1)).all()
    assert (seen["length"].double().numpy() >= np.linalg.norm(x.astype(np.float64), axis=1)).all()


# --------------------------------------------------------------------------------------------------
# Non-finite input, and sums


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("K", [4, 200])
def test_emulated_search_gives_no_usable_index_to_non_finite_input(emulated, value, K):
    x, c = torch.randn(9, 3), torch.randn(K, 3)
    expected = brute_force(x, c)
    x[5, 1] = value
    idx, distance, _ = search(emulated, x, c)
    assert idx[5] == K and distance[5].isnan()
    np.testing.assert_array_equal(np.delete(idx.numpy(), 5), np.delete(expected, 5))
    x[5, 1], c[K - 2, 0] = 0, value
    idx, distance, _ = search(emulated, x, c)
    assert (idx == K).all() and distance.isnan().all()


def test_emulated_search_of_no_rows(emulated):
    assert search(emulated, torch.empty(0, 3), torch.randn(4, 3))[0].shape == (0,)


def statistics(library, x, idx, K):
    """As quantizer_cuda.cpp calls it."""
    n, s = torch.full((K,), 7.0), torch.full((K, x.shape[1]), 7.0)
    by_code, order = idx.sort(stable=True)
    first = torch.searchsorted(by_code, torch.arange(K + 1))
    sizes = torch.tensor([K, x.shape[1]])
    assert library.statistics(*map(pointer, (x, order, first, sizes, n, s))) == 0
    return n, s


@pytest.mark.parametrize(("N", "K", "D"), [(700, 19, 131), (5, 3, 1), (0, 4, 7)])
def test_emulated_sums_run_over_ascending_rows(emulated, N, K, D):
    x, idx = torch.randn(N, D), torch.randint(K - 1, (N,))  # the last code is unused
    n, s = statistics(emulated, x, idx, K)
    expected_n, expected = torch.zeros(K), torch.zeros(K, D)
    for row, k in zip(x, idx, strict=True):
        expected_n[k] += 1
        expected[k] += row
    assert torch.equal(n, expected_n) and torch.equal(s, expected)


def test_emulated_sums_leave_out_codes_that_do_not_exist(emulated):
    x, idx = torch.ones(6, 3), torch.tensor([0, -1, 8, 9, 2**40, 1])
    n, s = statistics(emulated, x, idx, 9)
    assert n.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1] and torch.equal(s, n[:, None].expand(9, 3))
