// Just enough of CUDA to run quantizer.cu on a CPU, one warp at a time, with every lane a fiber.
// Lanes change only where all of them meet: at a shuffle, a ballot or a product. So it cannot show
// races, memory limits or speed. (quantizer.cu has no barrier and no shared memory to get wrong.)
#pragma once
#include <csetjmp>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#define __global__
#define __device__
#define __launch_bounds__(...)
struct dim3 {
  unsigned x, y;
  dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {}
} inline threadIdx, blockIdx, gridDim;
using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }
inline void cudaMemsetAsync(void* p, int value, size_t n, void*) { std::memset(p, value, n); }
using __half = _Float16;  // rounds to nearest, ties to even, and has subnormal numbers
inline __half __float2half_rn(float f) { return static_cast<__half>(f); }
inline float __half2float(__half h) { return h; }
inline double __dsub_rn(double a, double b) { return a - b; }  // built with -ffp-contract=off
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
inline void atomicMax(unsigned* p, unsigned v) { *p = std::max(*p, v); }
inline int __ffs(unsigned bits) { return __builtin_ffs(bits); }
using std::min;
namespace emulator {
struct Lane {
  ucontext_t start;  // only for the first entry, as it asks the kernel each time; _longjmp does not
  jmp_buf at;
  const char* waits_at;  // the name of what all lanes must come to; null: done
  char stack[64 << 10];
} inline lanes[32];
inline jmp_buf scheduler;
inline int lane;     // the one that runs
inline bool starts;  // whether it has not begun yet
inline std::function<void()>* kernel;
inline double slots[32];  // what each lane offers to the others

// All 32 lanes meet here. That all come to the same place is checked; on a GPU they would hang.
inline void meet(const char* where) {
  lanes[lane].waits_at = where;
  if (!_setjmp(lanes[lane].at)) _longjmp(scheduler, 1);
}
inline void run_lane() {
  (*kernel)(), lanes[lane].waits_at = nullptr;
  _longjmp(scheduler, 1);
}
inline void run_warp(unsigned first_thread) {
  for (Lane& each : lanes) {
    getcontext(&each.start);
    each.start.uc_stack = {each.stack, 0, sizeof(each.stack)};
    makecontext(&each.start, run_lane, 0);
  }
  // Every lane goes on from where all have met to where all meet next.
  for (starts = true; starts || lanes[0].waits_at; starts = false) {
    for (lane = 0; lane < 32; ++lane) {
      threadIdx = dim3(first_thread + lane);
      if (_setjmp(scheduler)) continue;
      starts ? (void)setcontext(&lanes[lane].start) : _longjmp(lanes[lane].at, 1);
    }
    for (const Lane& each : lanes)
      if (each.waits_at != lanes[0].waits_at) std::abort();
  }
}

inline void launch(dim3 grid, unsigned threads, std::function<void()> body) {
  kernel = &body, gridDim = grid;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
      for (unsigned first = 0; first < threads; first += 32) run_warp(first);
}
// What tensor cores do to a float32 and four products at their worst: all terms are cut off 23
// bits below the largest, and so is the sum.
inline float add_up(const double (&terms)[5]) {
  double most = 0, sum = 0;
  for (double term : terms) most = std::max(most, std::fabs(term)), sum += term;
  if (!(std::fabs(sum) < INFINITY) || most == 0) return sum;
  auto cut = [](double v, double by) {
    const int last = std::ilogb(by) - 23;
    return std::ldexp(std::trunc(std::ldexp(v, -last)), last);
  };
  sum = 0;
  for (double term : terms) sum += cut(term, most);
  return sum == 0 ? 0 : cut(sum, sum);
}
}  // namespace emulator
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  std::memcpy(&emulator::slots[emulator::lane], &value, sizeof(T));
  emulator::meet("shuffle");
  std::memcpy(&value, &emulator::slots[emulator::lane ^ mask], sizeof(T));
  emulator::meet("shuffled");  // all have read before anyone writes again
  return value;
}
inline unsigned __ballot_sync(unsigned, bool flag) {
  unsigned flags = unsigned(flag) << emulator::lane;
  for (int mask = 1; mask < 32; mask *= 2) flags |= __shfl_xor_sync(~0u, flags, mask);
  return flags;
}
namespace nvcuda::wmma {
enum Kind { matrix_a, matrix_b, accumulator, row_major, col_major, mem_row_major };
template <Kind use, int M, int N, int K, class T, Kind layout = row_major>
struct fragment {
  static constexpr int num_elements = 8;
  T x[8];
};
// Which of the 256 numbers a lane keeps in x[i]. No program may know: this is not NVIDIA's way.
inline int keeps(int lane, int i) { return (lane * 8 + i) * 37 % 256; }
// Row-major A, column-major B and row-major scores: 16 numbers lie side by side.
template <class F, class T, class Do>
void each(F& f, T* p, unsigned ldm, Do use) {
  if (reinterpret_cast<uintptr_t>(p) % 32 || ldm * sizeof(T) % 16) std::abort();
  for (int i = 0; i < 8; ++i)
    use(f.x[i], p[keeps(emulator::lane, i) / 16 * ldm + keeps(emulator::lane, i) % 16]);
}
template <class F, class T>
void load_matrix_sync(F& f, const T* p, unsigned ldm, Kind = row_major) {
  each(f, p, ldm, [](T& mine, T theirs) { mine = theirs; });
}
template <class F>
void store_matrix_sync(float* p, const F& f, unsigned ldm, Kind) {
  each(f, p, ldm, [](float mine, float& theirs) { theirs = mine; });
}
template <class A, class B, class C>
void mma_sync(C& d, const A& a, const B& b, const C& c) {
  static double rows[256], columns[256];
  for (int i = 0; i < 8; ++i)
    rows[keeps(emulator::lane, i)] = a.x[i], columns[keeps(emulator::lane, i)] = b.x[i];
  emulator::meet("product");
  for (int i = 0; i < 8; ++i) {
    const int at = keeps(emulator::lane, i), row = at / 16 * 16, column = at % 16 * 16;
    float sum = c.x[i];
    for (int k = 0; k < 16; k += 4) {
      double terms[5] = {sum};
      for (int j = 0; j < 4; ++j) terms[j + 1] = rows[row + k + j] * columns[column + k + j];
      sum = emulator::add_up(terms);
    }
    d.x[i] = sum;
  }
  emulator::meet("multiplied");
}
}  // namespace nvcuda::wmma
