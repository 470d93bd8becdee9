"""quantizer.cu without a GPU: nvcc takes it, and its kernels, run thread by thread on the CPU, keep the contract.

What runs here is the path of older tensor cores (`mma.sync`) and, with stand-ins for its instructions, that of Hopper
(`wgmma`, the copy engine, barriers). That the instructions are what they should be, only a GPU can show:
benchmarks/on_gpu.sh.
"""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from test_kernels import KINDS, brute_force

KERNELS = Path(__file__).parent.parent / "kernels"
WRAPPERS = """
using namespace hipart;
template <class T>
int search(const T* x, const T* c, const int64_t* sizes, int64_t* idx, double* distance, int64_t* left) {
  const int64_t N = sizes[0], K = sizes[1], D = sizes[2];
  std::vector<char> scratch(nearest_code_cuda_scratch(N, K, D), 0x7f);
  const int error = nearest_code_cuda(x, c, N, K, D, scratch.data(), idx, distance, nullptr);
  const Scratch at(N, K, D, scratch.data());
  const int64_t rows = (N - 1) % at.chunk + 1;  // of the last chunk: rows left open, candidates
  const auto* found = at.found;
  const auto* lists = at.lists;
  left[0] = left[1] = 0, left[2] = rows;
  for (int64_t row = 0; row < rows && !scratch.empty() && sizeof(T) == sizeof(float); ++row) {
    const int64_t begin = row * at.splits, end = begin + at.splits;
    float limit = INFINITY;
    bool open = false;
    for (int64_t s = begin; s < end; ++s) limit = std::min(limit, found[s].limit), open |= found[s].found < 0;
    left[0] += open;
    for (int64_t s = begin; s < end; ++s)
      for (int i = 0; i < found[s].found; ++i)
        left[1] += (lists[s * LIST + i].low <= limit) * (1 + (lists[s * LIST + i].next <= limit));
  }
  return error;
}
extern "C" int search_f32(const float* x, const float* c, const int64_t* sizes, int64_t* idx, double* distance,
                          int64_t* left) {
  return search(x, c, sizes, idx, distance, left);
}
extern "C" int search_f64(const double* x, const double* c, const int64_t* sizes, int64_t* idx, double* distance,
                          int64_t* left) {
  return search(x, c, sizes, idx, distance, left);
}
extern "C" int64_t noted(const float* x, const float* c, const int64_t* sizes, float* mean, Row* rows, Candidate* lists) {
  const int64_t N = sizes[0], K = sizes[1], D = sizes[2];
  std::vector<char> scratch(nearest_code_cuda_scratch(N, K, D), 0x7f);
  std::vector<int64_t> idx(N);
  nearest_code_cuda(x, c, N, K, D, scratch.data(), idx.data(), nullptr, nullptr);
  const Scratch at(N, K, D, scratch.data());
  std::memcpy(mean, at.mean, 4 * D);
  std::memcpy(rows, at.found, N * at.splits * sizeof(Row));
  std::memcpy(lists, at.lists, N * at.splits * LIST * sizeof(Candidate));
  return at.splits;
}
extern "C" int statistics(const float* x, const int64_t* idx, const int64_t* sizes, float* n, float* s) {
  return code_statistics_cuda(x, idx, sizes[0], sizes[1], sizes[2], n, s, nullptr);
}
"""


def test_nvcc_takes_it(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc here")
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("80", "90", "90a")]
    fast = ["-Xcicc", "-O0", "-Xptxas", "-O0", "--threads", "3"]  # halves the time
    subprocess.run(["nvcc", "-std=c++17", *architectures, *fast, "-Werror", "all-warnings", "-c", KERNELS / "quantizer.cu",
                    "-o", tmp_path / "quantizer.o"], check=True)


HOPPER = {  # how its instructions begin, and what does the same on a CPU
    "\"{.reg .pred p; setp": "emulator::wgmma(d, a, codes.at + offset, add)",
    "\"{.reg .pred p;\\nAGAIN": "emulator::await_phase(&gate, phase)",
    "\"mbarrier.init": "emulator::prepare(&gates.full[i], 1), emulator::prepare(&gates.empty[i], WARPS)",
    "\"mbarrier.arrive.expect_tx": "emulator::copy(to, from, WORDS * 16, &gates.full[turn % RING])",
    "\"mbarrier.arrive.shared": "emulator::arrive(&gates.empty[turn % RING])",
    "\"wgmma.fence": "", "\"wgmma.commit": "", "\"fence.proxy": "", "\"cp.async.bulk.prefetch": "", "\"\" :": "",
}


def emulate(folder, *flags):
    source = re.sub(r"#include <cuda_\w+\.h>\n", "", (KERNELS / "quantizer.cu").read_text())
    source, launches = re.subn(r"(\w+(?:<[\w, ]+>)?)<<<(.*?), (\w+), \w+, \w+>>>\((.*?)\);",
                               r"emulator::launch(\2, \3, [&] { \1(\4); });", source, flags=re.DOTALL)
    assert launches == 6 and "<<<" not in source
    instructions = {"(\"mma.sync": "emulator::mma(d, a, b0, b1)"} | {f" volatile({k}": v for k, v in HOPPER.items()}
    for begin, instead in instructions.items():
        source, assembly = re.subn(rf"asm{re.escape(begin)}.*?\);", f"{instead};", source, flags=re.DOTALL)
        assert assembly == 1, begin
    assert "asm" not in source
    # small blocks and chunks of rows, few splits of the codes, short lists, so that small inputs take every path
    for there, here in (("int THREADS = 512", "int THREADS = 64"), ("int TILE = 256", "int TILE = 128"),
                        ("CHUNK = 1 << 17", "CHUNK = 128"), ("MOST_SPLITS = 16", "MOST_SPLITS = 2"),
                        ("FINISHERS = 256", "FINISHERS = 64"), ("PAIRS = 1024", "PAIRS = 48"),
                        ("EACH = 16, SPAN", "EACH = 1, SPAN"), ("MOST_SCREENED = 1 << 20", "MOST_SCREENED = 200"),
                        ("extern __shared__ __align__(128) uint4 ring[]",
                         "static __align__(1 << 18) uint4 ring[RING * RECORD]")):
        assert source.count(there) == 1, there
        source = source.replace(there, here)
    (folder / "emulated.cpp").write_text('#include "cuda_on_cpu.h"\n' + source + WRAPPERS)
    subprocess.run(["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC",
                    "-U_FORTIFY_SOURCE", f"-I{KERNELS}", *flags,
                    f"-I{Path(__file__).parent}", folder / "emulated.cpp", "-o", folder / "emulated.so"], check=True)
    return ctypes.CDLL(folder / "emulated.so")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    return emulate(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture(scope="session")
def hopper(tmp_path_factory):
    return emulate(tmp_path_factory.mktemp("hopper_on_cpu"), "-D__CUDA_ARCH_FEAT_SM90_ALL")


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


def search(library, x, c, left=None, with_distance=True):
    """As the binding calls it: row-major, zeros added up to a multiple of 4 dimensions, on an address divisible by 16."""
    left = torch.zeros(3, dtype=torch.int64) if left is None else left
    idx, distance = torch.full((len(x),), -7), torch.full((len(x),), -7.0, dtype=torch.float64)
    x, c = (torch.nn.functional.pad(t, (0, -t.shape[1] % 4)).contiguous() for t in (x, c))
    assert x.data_ptr() % 16 == c.data_ptr() % 16 == 0
    call = library.search_f64 if x.dtype == torch.float64 else library.search_f32
    sizes = torch.tensor([len(x), len(c), x.shape[1]])
    assert call(pointer(x), pointer(c), pointer(sizes), pointer(idx), pointer(distance) if with_distance else None,
                pointer(left)) == 0
    return (idx, distance) if with_distance else idx


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_emulated_search_keeps_the_contract(emulated, kind):
    for N, K, D in ((5, 3, 1), (40, 70, 13)):
        with np.errstate(over="ignore", under="ignore"):
            x, c = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in kind(np.random.default_rng(N), N, K, D))
        idx, distance = search(emulated, x, c)
        np.testing.assert_array_equal(idx.numpy(), brute_force(x, c))
        np.testing.assert_array_equal(distance.numpy(), exact_distance(x, c[idx]))
        assert torch.equal(idx, search(emulated, x, c, with_distance=False))


def exact_distance(x, c):
    s = np.zeros(len(x))
    for i in range(x.shape[1]):
        e = x[:, i].double().numpy() - c[:, i].double().numpy()
        s = s + e * e
    return s


def test_emulated_search_of_float64(emulated):
    x, c = torch.randn(40, 19, dtype=torch.float64), torch.randn(70, 19, dtype=torch.float64)
    idx, distance = search(emulated, x, c)
    np.testing.assert_array_equal(idx.numpy(), brute_force(x, c))
    np.testing.assert_array_equal(distance.numpy(), exact_distance(x, c[idx]))


@pytest.mark.parametrize(("N", "K", "D"), [(300, 270, 40), (20, 140, 128), (20, 70, 150), (20, 70, 201)])
def test_emulated_search_crosses_chunks_of_rows_tiles_of_codes_and_parts_of_dimensions(emulated, N, K, D):
    x, c = torch.randn(N, D), torch.randn(K, D)  # 128 rows, 64 codes, 128 dimensions, and no screen from 200 dimensions
    np.testing.assert_array_equal(search(emulated, x, c)[0].numpy(), brute_force(x, c))


@pytest.mark.parametrize(("N", "K", "D"), [(1, 1, 1), (300, 270, 40), (70, 900, 128), (40, 300, 150)])
def test_emulated_hopper_gives_the_same(hopper, N, K, D):
    for x, c in ((torch.randn(N, D), torch.randn(K, D)), (torch.randn(N, D) + 1e3, torch.randn(K, D).round() + 1e3)):
        np.testing.assert_array_equal(search(hopper, x, c)[0].numpy(), brute_force(x, c))


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1e3, 1), (0, 1e-9), (0, 1e9)])
def test_emulated_screen_leaves_little_open(emulated, offset, scale):
    left = torch.zeros(3, dtype=torch.int64)
    search(emulated, (torch.randn(250, 64) + offset) * scale, (torch.randn(200, 64) + offset) * scale, left)
    open_rows, candidates, rows = left.tolist()
    assert rows > 100 and open_rows <= 0.03 * rows and rows <= candidates <= 1.1 * rows  # of the last chunk


@pytest.mark.parametrize("near", [[5, 69, 133], [5, 12, 69, 76, 133], [*range(5, 640, 64)], [*range(5, 640, 128)],
                                  [*range(0, 640, 128), *range(2, 640, 128), *range(4, 640, 128), *range(6, 640, 128)]],
                         ids=["three", "pairs", "ten", "one a tile", "more than a list holds"])
def test_emulated_screen_forgets_no_candidate_that_others_displace(emulated, near):
    left, any_open = torch.zeros(3, dtype=torch.int64), False
    for _ in range(6):  # in whatever order they come
        where, x, c = torch.randn(16), 3e-3 * torch.randn(30, 16), 10 * torch.randn(640, 16).sign()
        c[near] = where + 3e-3 * torch.randn(len(near), 16)  # in tiles of 128, four lanes; float16 cannot tell them apart
        np.testing.assert_array_equal(search(emulated, where + x, c, left)[0].numpy(), brute_force(where + x, c))
        any_open |= bool(left[0])
    assert any_open == (len(near) == 20)


def test_emulated_screen_is_not_misled_by_what_lies_beyond_the_last_code(emulated):
    left, c = torch.zeros(3, dtype=torch.int64), torch.randn(200, 64)
    idx, _ = search(emulated, c[-1] + 0.1 * torch.randn(100, 64), c, left)
    assert (idx == 199).all() and left.tolist() == [0, 100, 100]  # one candidate a row


@pytest.mark.parametrize("scales", [(1e4, 1), (1, 1e4), (1e-4, 1), (1, 1e-4, 1e4)])
def test_emulated_screen_bears_tiles_of_different_size(emulated, scales):
    for _ in range(6):
        where = torch.randn(24)
        c = torch.cat([where + s * torch.randn(128, 24) for s in scales])
        x = where + min(scales) * torch.randn(40, 24)
        np.testing.assert_array_equal(search(emulated, x, c)[0].numpy(), brute_force(x, c))


def aligned(rng, N, K, D):  # what rounding to float16 takes from a row is parallel to all codes
    x = np.float32(1 + 2.0**-11 - 2.0**-20) * rng.choice([1, 2, 4], (N, 1)) * np.ones((N, D))
    return x, rng.choice([1, -1], (K, 1)) * (1 + 1e-4 * rng.random((K, 1))) * np.ones((K, D))


def exact_in_float16(rng, N, K, D):  # codes in pairs of opposites, so that their mean is zero: only sums are rounded
    c = np.float16(1 + rng.random((K, D)))
    c[(K + 1) // 2:] = -c[:K // 2]
    return np.float16(1 + rng.random((N, D))), c


def ratio_vanishes(rng, N, K, D):  # of the units of codes and rows: 2^-25 is 0 in float16. The mean of the codes is 0
    c = np.zeros((K, D))
    c[:, 0] = 127.99
    c[[K * i // 32 for i in range(0, 32, 2)]] *= -1
    c[-1, 0] = 127 * 2.0**25
    return 1e-4 * rng.standard_normal((N, D)), c


def small_against_offset(rng, N, K, D):  # tiles that go down in size: the offset is large in their units
    scales = np.repeat(10.0 ** -np.arange(K // 64 + 1), 64)[:K, None]
    return 1e-3 * rng.standard_normal((N, D)), scales * (2 + rng.standard_normal((K, D)))


HARD_KINDS = [aligned, exact_in_float16, ratio_vanishes, small_against_offset]


@pytest.mark.parametrize(("kind", "K", "D"), [(kind, 300, 16) for kind in (*KINDS, *HARD_KINDS)] +
                         [(kind, 512, 132) for kind in (KINDS[0], *HARD_KINDS)])
def test_emulated_bounds_hold(emulated, kind, K, D):
    """What the screen notes are bounds of |c - m|^2 - 2 (x - m)(c - m): above the smallest, below all others."""
    N, tile, length = 24, 128, 8
    with np.errstate(over="ignore", under="ignore"):
        x, c = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in kind(np.random.default_rng(K), N, K, D))
    mean, sizes = torch.zeros(D), torch.tensor([N, K, D])
    rows, lists = np.zeros((N, 2), "f4, i4"), np.zeros((N, 2, length), "f4, f4, i4, i4")  # at most two shares of the codes
    shares = emulated.noted(pointer(x), pointer(c), pointer(sizes), pointer(mean), rows.ctypes.data_as(ctypes.c_void_p),
                            lists.ctypes.data_as(ctypes.c_void_p))
    rows = rows.reshape(-1)[:N * shares].reshape(N, shares)
    lists = lists.reshape(-1)[:N * shares * length].reshape(N, shares, length)
    x, c, mean = (t.double().numpy() for t in (x, c, mean))
    score = ((c - mean) ** 2).sum(1) - 2 * (x - mean) @ (c - mean).T
    codes = np.arange(-(-K // tile) * tile)  # in the last tile, some do not exist
    lane_of = codes // tile * 4 + codes % 8 // 2  # four lanes share a row, each has its part of every tile
    for row in range(N):
        for share in range(shares):
            limit, found = rows[row, share]
            of_share = codes[:K] // tile % shares == share
            assert not score[row, of_share].min() > limit
            if found < 0:
                continue
            entries, seen = lists[row, share, :found], np.zeros(K, bool)
            for low, following, code, _ in entries:
                others = (lane_of[:K] == lane_of[code]) & (codes[:K] != code)
                seen |= lane_of[:K] == lane_of[code]
                assert code < K or not low > -np.inf  # where nothing is known, everything is noted
                assert not (code < K and low > score[row, code]) and not (score[row, others] < following).any()
            assert not (score[row, of_share & ~seen] < limit).any()  # a list that was overwritten held what is ruled out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [4, 200])
def test_emulated_search_gives_no_usable_index_to_non_finite_input(emulated, value, dtype, K):
    x, c = torch.randn(9, 3, dtype=dtype), torch.randn(K, 3, dtype=dtype)
    expected = brute_force(x, c)
    x[5, 1] = value
    idx, distance = search(emulated, x, c)
    assert idx[5] == K and distance[5].isnan()
    np.testing.assert_array_equal(np.delete(idx.numpy(), 5), np.delete(expected, 5))
    x[5, 1], c[K - 2, 0] = 0, value
    idx, distance = search(emulated, x, c)
    assert (idx == K).all() and distance.isnan().all()


@pytest.mark.parametrize(("N", "K", "D"), [(700, 19, 131), (5, 3, 1), (0, 4, 7)])
def test_emulated_sums_run_over_ascending_rows(emulated, N, K, D):
    x, idx = torch.randn(N, D), torch.randint(K - 1, (N,))  # the last code is unused
    n, s = torch.full((K,), 7.0), torch.full((K, D), 7.0)
    expected_n, expected = torch.zeros(K), torch.zeros(K, D)
    for row, k in zip(x, idx, strict=True):
        expected_n[k] += 1
        expected[k] += row
    sizes = torch.tensor([N, K, D])
    assert emulated.statistics(pointer(x), pointer(idx), pointer(sizes), pointer(n), pointer(s)) == 0
    assert torch.equal(n, expected_n) and torch.equal(s, expected)


def test_emulated_sums_leave_out_codes_that_do_not_exist(emulated):
    x, idx = torch.ones(6, 3), torch.tensor([0, -1, 8, 9, 2**40, 1])
    n, s = torch.zeros(9), torch.zeros(9, 3)
    sizes = torch.tensor([6, 9, 3])
    assert emulated.statistics(pointer(x), pointer(idx), pointer(sizes), pointer(n), pointer(s)) == 0
    assert n.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1] and torch.equal(s, n[:, None].expand(9, 3))
