"""quantizer.cu without a GPU: nvcc takes it, and its kernels, run thread by thread on the CPU, keep the contract."""

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
TYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
WRAPPERS = """
using namespace hipart;
extern "C" int search(const void* x, const void* c, int type, const int64_t* sizes, int64_t* idx, double* distance,
                      int64_t* left) {
  const int64_t N = sizes[0], K = sizes[1], D = sizes[2];
  std::vector<char> scratch(nearest_code_cuda_scratch(N, K, D), 0x7f);
  const int error = nearest_code_cuda({x, Type(type), N, D, sizes[3], sizes[4]}, {c, Type(type), K, D, sizes[5], sizes[6]},
                                      scratch.data(), idx, distance, nullptr);
  const Scratch at(N, K, D);
  const int64_t rows = (N - 1) % at.chunk + 1, each = 4 * at.splits;  // of the last chunk: rows left open, candidates
  const Slot* slots = reinterpret_cast<Slot*>(scratch.data() + at.slots);
  left[0] = reinterpret_cast<int*>(scratch.data() + at.flags)[1], left[1] = 0, left[2] = rows;
  for (int64_t row = 0; row < rows; ++row) {
    float limit = INFINITY;
    for (int64_t s = 0; s < each; ++s) limit = std::min(limit, slots[row * each + s].limit);
    for (int64_t s = 0; s < each; ++s)
      left[1] += (slots[row * each + s].low1 <= limit) + (slots[row * each + s].low2 <= limit);
  }
  return error;
}
extern "C" int sums(const void* x, int type, const int64_t* sizes, const int64_t* order, const int64_t* first, int64_t K,
                    float* s) {
  return segment_sums_cuda({x, Type(type), sizes[0], sizes[1], sizes[2], sizes[3]}, order, first, K, s, nullptr);
}
"""


def test_nvcc_takes_it(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc here")
    architectures = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    subprocess.run(["nvcc", "-std=c++17", *architectures, "--threads", "2", "-Werror", "all-warnings", "-c",
                    KERNELS / "quantizer.cu", "-o", tmp_path / "quantizer.o"], check=True)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    source = re.sub(r"#include <cuda_\w+\.h>\n", "", (KERNELS / "quantizer.cu").read_text())
    source, launches = re.subn(r"(\w+(?:<\w+>)?)<<<(.*?), (\w+), 0, \w+>>>\((.*?)\);",
                               r"emulator::launch(\2, \3, [&] { \1(\4); });", source, flags=re.DOTALL)
    assert launches >= 9 and "<<<" not in source
    source, assembly = re.subn(r"asm volatile\(\"mma.*?\);", "emulator::mma(d, a, b0, b1);", source, flags=re.DOTALL)
    assert assembly == 1 and "asm" not in source
    # small blocks and chunks of rows, few splits of the codes, and few blocks, so that small inputs take every path
    for there, here in (("SCRATCH = 64 << 20", "SCRATCH = 64 << 10"), ("int THREADS = 256", "int THREADS = 64"),
                        ("SEARCH_BLOCKS = 264", "SEARCH_BLOCKS = 2"),
                        ("SEARCH_THREADS = 1024", "SEARCH_THREADS = 64"),
                        ("MOST_SPLITS = 16", "MOST_SPLITS = 2")):
        assert there in source
        source = source.replace(there, here)
    (folder / "emulated.cpp").write_text('#include "cuda_on_cpu.h"\n' + source + WRAPPERS)
    subprocess.run(["g++", "-std=c++17", "-O1", "-ffp-contract=off", "-w", "-shared", "-fPIC",
                    "-U_FORTIFY_SOURCE", f"-I{KERNELS}",
                    f"-I{Path(__file__).parent}", folder / "emulated.cpp", "-o", folder / "emulated.so"], check=True)
    return ctypes.CDLL(folder / "emulated.so")


def pointer(t):
    return ctypes.c_void_p(t.data_ptr())


def search(library, x, c, left=None):
    left = torch.zeros(3, dtype=torch.int64) if left is None else left
    idx, distance = torch.full((len(x),), -7), torch.full((len(x),), -7.0, dtype=torch.float64)
    sizes = torch.tensor([len(x), len(c), x.shape[1], *x.stride(), *c.stride()])
    assert library.search(pointer(x), pointer(c), TYPES[x.dtype], pointer(sizes), pointer(idx), pointer(distance),
                          pointer(left)) == 0
    return idx, distance


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_emulated_search_keeps_the_contract(emulated, kind):
    for N, K, D in ((5, 3, 1), (40, 70, 13)):
        with np.errstate(over="ignore", under="ignore"):
            x, c = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in kind(np.random.default_rng(N), N, K, D))
        idx, distance = search(emulated, x, c)
        np.testing.assert_array_equal(idx.numpy(), brute_force(x, c))
        np.testing.assert_array_equal(distance.numpy(), exact_distance(x, c[idx]))


def exact_distance(x, c):
    s = np.zeros(len(x))
    for i in range(x.shape[1]):
        e = x[:, i].double().numpy() - c[:, i].double().numpy()
        s = s + e * e
    return s


@pytest.mark.parametrize("dtype", TYPES)
def test_emulated_search_of_every_dtype_and_stride(emulated, dtype):
    x, c = torch.randn(40, 19).to(dtype), torch.randn(19, 70).to(dtype).T
    idx, distance = search(emulated, x[::2, 1:], c[:, 1:])
    np.testing.assert_array_equal(idx.numpy(), brute_force(x[::2, 1:].double(), c[:, 1:].double()))
    np.testing.assert_array_equal(distance.numpy(), exact_distance(x[::2, 1:], c[idx][:, 1:]))


@pytest.mark.parametrize(("N", "K", "D"), [(300, 270, 40), (20, 140, 128), (20, 70, 150)])
def test_emulated_search_crosses_chunks_of_rows_tiles_of_codes_and_parts_of_dimensions(emulated, N, K, D):
    x, c = torch.randn(N, D), torch.randn(K, D)  # chunks of 64 rows and more, tiles of 64 codes, parts of 128 dimensions
    np.testing.assert_array_equal(search(emulated, x, c)[0].numpy(), brute_force(x, c))


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1e3, 1), (0, 1e-9), (0, 1e9)])
def test_emulated_screen_leaves_little_open(emulated, offset, scale):
    left = torch.zeros(3, dtype=torch.int64)
    search(emulated, (torch.randn(250, 64) + offset) * scale, (torch.randn(200, 64) + offset) * scale, left)
    open_rows, candidates, rows = left.tolist()
    assert rows > 100 and open_rows <= 0.03 * rows and rows <= candidates <= 1.1 * rows  # of the last chunk


def test_emulated_screen_forgets_no_candidate_that_others_displace(emulated):
    for _ in range(12):  # in whatever order the three come
        near, x, c = torch.randn(16), 3e-3 * torch.randn(30, 16), 10 * torch.randn(384, 16).sign()
        c[[5, 133, 261]] = near + 3e-3 * torch.randn(3, 16)  # one lane's, in three tiles; float16 cannot tell them apart
        np.testing.assert_array_equal(search(emulated, near + x, c)[0].numpy(), brute_force(near + x, c))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_emulated_search_gives_no_usable_index_to_non_finite_input(emulated, value, dtype):
    x, c = torch.randn(9, 3, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    expected = brute_force(x, c)
    x[5, 1] = value
    idx, distance = search(emulated, x, c)
    assert idx[5] == 4 and distance[5].isnan()
    np.testing.assert_array_equal(np.delete(idx.numpy(), 5), np.delete(expected, 5))
    c[2, 0] = value
    idx, distance = search(emulated, x, c)
    assert (idx == 4).all() and distance.isnan().all()


@pytest.mark.parametrize("dtype", TYPES)
def test_emulated_sums_run_over_ascending_rows(emulated, dtype):
    K, x = 9, torch.randn(200, 37).to(dtype)
    idx = torch.randint(K - 1, (200,))  # the last code is unused
    order, first = idx.sort(stable=True)[1], torch.searchsorted(idx.sort()[0], torch.arange(K + 1))
    s, sizes = torch.full((K, 37), 7.0), torch.tensor([*x.shape, *x.stride()])
    assert emulated.sums(pointer(x), TYPES[dtype], pointer(sizes), pointer(order), pointer(first), ctypes.c_int64(K),
                         pointer(s)) == 0
    expected = torch.zeros(K, 37)
    for row, k in zip(x.float(), idx, strict=True):
        expected[k] += row
    assert torch.equal(s, expected)
