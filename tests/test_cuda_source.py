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
  std::memset(scratch, 0x7f, bytes);  // what nobody has written is no number to rely on
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
    report = nvcc(*archs, "--threads", "3", "-Xptxas", "-v", "-c", "-o", tmp_path / "q.o").stderr
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
    declared = "namespace hipart::cuda { namespace { struct Size; struct CodesOnly; }\n" \
               "void observe(int64_t, int64_t, int64_t, int64_t, const float*, const Size*, CodesOnly); }\n"
    (folder / "emulated.cpp").write_text('#include "cuda_emulator.h"\n' + declared + source + WRAPPERS)
    subprocess.run(["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-w", "-shared", "-fPIC",
                    f"-I{KERNELS}", f"-I{Path(__file__).parent}", folder / "emulated.cpp",
                    "-o", folder / "emulated.so"], check=True)
    return ctypes.CDLL(folder / "emulated.so")


@pytest.fixture
def parts(emulated):
    """The three factors of the bound's terms; 1 again after the test."""
    factors = (ctypes.c_float * 3).in_dll(emulated, "parts")
    yield factors
    factors[:] = [1, 1, 1]


def pointer(t):
    return None if t is None else ctypes.c_void_p(t.data_ptr())


def search(library, x, c, observe=False, with_distance=True):
    """As quantizer_cuda.cpp calls it -> idx, distance and, to observe, a dict of the screen."""
    x, c = (torch.from_numpy(np.ascontiguousarray(a, np.float32)) for a in (x, c))
    (N, D), K, groups = x.shape, len(c), -(-len(c) // 128) * 16
    mean = c.mean(0)
    largest = (c - mean).abs().max()
    idx, distance = torch.full((N,), -7), torch.full((N,), -7.0, dtype=torch.float64)
    best, E, sizes = torch.zeros(N, groups), torch.zeros(N), torch.zeros(N, 2)
    seen = (best, E, sizes) if observe else (None, None, None)
    n = torch.tensor([N, K, D])
    arguments = x, c, mean, largest, n, idx, distance if with_distance else None, *seen
    assert library.search(*map(pointer, arguments)) == 0
    screen = dict(best=best, E=E, length=sizes[:, 0], moved=sizes[:, 1], mean=mean, largest=largest)
    return idx, distance, screen


def make(kind, N, K, D, seed=None):
    with np.errstate(over="ignore", under="ignore"):
        rng = np.random.default_rng(N if seed is None else seed)
        return [np.ascontiguousarray(a, np.float32) for a in kind(rng, N, K, D)]


def check(library, x, c):
    expected = distances(x, c)
    idx, distance, _ = search(library, x, c)
    np.testing.assert_array_equal(idx.numpy(), expected.argmin(1))
    np.testing.assert_array_equal(distance.numpy(), expected.min(1, initial=np.inf))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_emulated_search_keeps_the_contract(emulated, kind):
    for N, K, D in ((5, 3, 1), (40, 70, 13), (20, 150, 20)):
        x, c = make(kind, N, K, D)
        check(emulated, x, c)
        without = search(emulated, x, c, with_distance=False)
        np.testing.assert_array_equal(without[0].numpy(), brute_force(x, c))
        assert (without[1] == -7).all()
