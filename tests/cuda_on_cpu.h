// Just enough of CUDA to run quantizer.cu on a CPU, one block at a time, every thread of it a fiber: for a machine without a
// GPU, the difference between code that compiles and code that has run. Slow, so for small sizes only. What it cannot show:
// races between threads (fibers never interleave except at barriers and shuffles), reads of what nobody has written, memory
// limits and speed. Of the instructions that only Hopper has, it does what the PTX manual says, not what they are spelled.
#pragma once
#include <csetjmp>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)
#define __forceinline__
#define __align__(n) __attribute__((aligned(n)))

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 { float x, y; };
struct uint2 { unsigned x, y; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
struct uint4 { unsigned x, y, z, w; };
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
using cudaStream_t = void*;
enum { cudaSuccess = 0 };
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
inline int cudaGetLastError() { return cudaSuccess; }
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <class F>
int cudaFuncSetAttribute(F, int, int) { return cudaSuccess; }

struct __half { uint16_t bits; };
inline float __half2float(__half h) {
  const int exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;  // finite values, or infinity for all that are not
  const float size = exponent == 31 ? INFINITY : exponent ? std::ldexp(1024.f + fraction, exponent - 25) : std::ldexp(1.f * fraction, -24);
  return h.bits & 0x8000 ? -size : size;
}
inline __half __float2half_rn(float f) {  // of finite values below 65504; NaN and infinity become infinity
  int exponent;
  const float size = std::fabs(f);
  std::frexp(size, &exponent);
  const int unit = std::isfinite(f) ? std::max(exponent - 11, -24) : 0;
  const double n = std::nearbyint(std::ldexp(double(size), -unit));  // in units of the last place, ties to even
  const int bits = !std::isfinite(f) ? 0x7c00 : n < 1024 ? int(n) : ((unit + 25) << 10) + int(n) - 1024;
  return {uint16_t(bits | (std::signbit(f) ? 0x8000 : 0))};
}
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
struct __half2 { __half x, y; };
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __half2 __hmax2(__half2 a, __half2 b) {
  auto larger = [](__half a, __half b) { return __half2float(a) > __half2float(b) ? a : b; };
  return {larger(a.x, b.x), larger(a.y, b.y)};
}
inline __half2 __hmin2(__half2 a, __half2 b) {
  auto smaller = [](__half a, __half b) { return __half2float(a) < __half2float(b) ? a : b; };
  return {smaller(a.x, b.x), smaller(a.y, b.y)};
}
inline double __dsub_rn(double a, double b) { return a - b; }  // compiled with -ffp-contract=off
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int atomicAdd(int* p, int v) { const int old = *p; *p += v; return old; }
template <class T>
T atomicMin(T* p, T v) { const T old = *p; *p = std::min(old, v); return old; }
inline long long __double_as_longlong(double d) { long long i; std::memcpy(&i, &d, 8); return i; }
inline double __longlong_as_double(long long i) { double d; std::memcpy(&d, &i, 8); return d; }

namespace emulator {

struct Fiber {
  ucontext_t start;  // only for the first entry: swapcontext asks the kernel each time, _longjmp does not
  jmp_buf resume;
  std::vector<char> stack = std::vector<char>(64 << 10);
  int waits_for = 0;  // 0 nothing, 1 the block, 2 its warp, 3 a phase: it looks again
  bool started = false, done = false;
};
inline std::vector<Fiber>* fibers;
inline jmp_buf scheduler;
inline int current;
inline std::function<void()>* body;
inline uint64_t slots[1024];  // what each thread offers to its warp

inline void wait(int whom) {
  Fiber& me = (*fibers)[current];
  me.waits_for = whom;
  if (!_setjmp(me.resume)) _longjmp(scheduler, 1);
}

inline void enter() {
  (*body)();
  (*fibers)[current].done = true;
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] inline void go_on(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// All of [begin, end) wait for the same: let them go on. What some have left behind by returning would hang a GPU.
inline bool release(int begin, int end, int whom) {
  bool left = false, waits = false;
  for (int i = begin; i < end; ++i) {
    if (!(*fibers)[i].done && (*fibers)[i].waits_for != whom) return false;
    left |= (*fibers)[i].done, waits |= !(*fibers)[i].done;
  }
  if (left && waits) std::abort();
  bool any = false;
  for (int i = begin; i < end; ++i)
    if (!(*fibers)[i].done) (*fibers)[i].waits_for = 0, any = true;
  return any;
}

inline void run_block(int threads) {
  std::vector<Fiber> all(threads);
  fibers = &all;
  for (Fiber& f : all) {
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack.data();
    f.start.uc_stack.ss_size = f.stack.size();
    f.start.uc_link = nullptr;
    makecontext(&f.start, enter, 0);
  }
  for (;;) {
    bool ran = false, left = false;
    for (current = 0; current < threads; ++current) {
      left |= !all[current].done;
      if (all[current].done || all[current].waits_for) continue;
      threadIdx = dim3(current);
      go_on(all[current]);
      ran = true;
    }
    if (!left) return;
    bool freed = release(0, threads, 1);
    for (int warp = 0; warp < threads; warp += 32) freed |= release(warp, std::min(warp + 32, threads), 2);
    for (Fiber& f : all)
      if (f.waits_for == 3) f.waits_for = 0, freed = true;
    if (!ran && !freed) std::abort();  // some wait for ever
  }
}

inline void launch(dim3 grid, unsigned threads, std::function<void()> kernel) {
  body = &kernel;
  gridDim = grid, blockDim = dim3(threads);
  for (unsigned y = 0; y < grid.y; ++y)
    for (unsigned x = 0; x < grid.x; ++x) {
      blockIdx = dim3(x, y);
      run_block(static_cast<int>(threads));
    }
}

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  std::memcpy(&slots[current], &value, sizeof(T));
  wait(2);
  std::memcpy(&value, &slots[from], sizeof(T));
  wait(2);  // all have read before anyone writes again
  return value;
}

// All terms are cut off at 23 bits below the largest before they are added up: as coarse as tensor cores may be.
inline float truncated_sum(const double (&terms)[17]) {
  double largest = 0, sum = 0;
  for (double term : terms) largest = std::max(largest, std::fabs(term));
  const double unit = largest > 0 ? std::ldexp(1, std::ilogb(largest) - 23) : 1;
  for (double term : terms) sum += std::trunc(term / unit) * unit;
  return static_cast<float>(std::trunc(sum / unit) * unit);
}

// mma.m16n8k16 with the operands' places as the PTX manual has them (Matrix Fragments for mma.m16n8k16).
inline unsigned operands[1024][6];
inline float half(unsigned word, int i) { return __half2float({uint16_t(word >> 16 * i)}); }
inline void mma(float (&d)[4], uint4 a, unsigned b0, unsigned b1) {
  const unsigned mine[6] = {a.x, a.y, a.z, a.w, b0, b1};
  std::memcpy(operands[current], mine, sizeof(mine));
  wait(2);
  const int first = current / 32 * 32, lane = current % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double terms[17] = {d[i]};
    for (int k = 0; k < 16; ++k)
      terms[k + 1] = double(half(operands[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2)) *
                     half(operands[first + column * 4 + k % 8 / 2][4 + k / 8], k % 2);
    d[i] = truncated_sum(terms);
  }
  wait(2);
}

// wgmma.m64nNk16 for the 16 rows of a warp: a as for mma, b in shared memory, in core matrices of 8 x 8 that lie as `at` says.
inline uintptr_t window;  // of 2^18 bytes, in which shared memory lies
template <int NT>
void wgmma(float (&d)[NT][4], uint4 a, uint64_t at, bool add) {
  std::memcpy(operands[current], &a, sizeof(a));
  wait(2);
  const int first = current / 32 * 32, lane = current % 32;
  const char* b = reinterpret_cast<const char*>(window | (at & 0x3fff) << 4);
  for (int n = 0; n < NT; ++n)
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double terms[17] = {add ? d[n][i] : 0};
      for (int k = 0; k < 16; ++k) {
        __half other;
        std::memcpy(&other, b + n * (at >> 32 & 0x3fff) * 16 + k / 8 * (at >> 16 & 0x3fff) * 16 + column * 16 + k % 8 * 2, 2);
        terms[k + 1] = double(half(operands[first + row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], k % 2)) * __half2float(other);
      }
      d[n][i] = truncated_sum(terms);
    }
  wait(2);
}

// mbarrier: a phase ends when all that are expected have arrived, and what was to be copied is there. That comes as late as can
// be, when somebody waits for it; what lies there until then is not a number.
struct Gate {
  int expected, missing;
  unsigned phase;
  std::function<void()> copy;
};
inline std::map<const void*, Gate> gates;
inline int looks;
inline void prepare(const void* gate, int expected) { gates[gate] = {expected, expected, 0, nullptr}; }
inline void end_phase(Gate& gate) { gate.missing = gate.expected, ++gate.phase, looks = 0; }
inline void arrive(const void* gate) {
  if (--gates.at(gate).missing == 0) end_phase(gates.at(gate));
}
inline void copy(void* to, const void* from, size_t bytes, const void* gate) {
  if (gates.at(gate).copy) std::abort();  // two in one phase
  std::memset(to, 0xff, bytes);
  gates.at(gate).copy = [=] { std::memcpy(to, from, bytes); };
}
inline void await_phase(const void* at, unsigned parity) {
  Gate& gate = gates.at(at);
  for (looks = 0; gate.phase % 2 == parity; wait(3)) {
    if (gate.copy) gate.copy(), gate.copy = nullptr, end_phase(gate);
    if (++looks > 1000000) std::abort();  // in vain
  }
}

// What cp.async has been told to copy, and has not copied yet.
struct Copy { void* to; const void* from; size_t n; };
inline std::vector<std::vector<std::vector<Copy>>> pending(1024, {{}});  // thread by thread, group by group

}  // namespace emulator

inline void __pipeline_memcpy_async(void* to, const void* from, size_t n) { emulator::pending[emulator::current].back().push_back({to, from, n}); }
inline void __pipeline_commit() { emulator::pending[emulator::current].emplace_back(); }
inline void __pipeline_wait_prior(int groups) {
  auto& pending = emulator::pending[emulator::current];  // the last is not committed yet
  for (; int(pending.size()) > groups + 1; pending.erase(pending.begin()))
    for (const auto& c : pending.front()) std::memcpy(c.to, c.from, c.n);
}
inline uint64_t __cvta_generic_to_shared(const void* p) {
  emulator::window = reinterpret_cast<uintptr_t>(p) >> 18 << 18;
  return reinterpret_cast<uintptr_t>(p);
}
inline void __syncthreads() { emulator::wait(1); }
inline void __syncwarp() { emulator::wait(2); }
template <class T>
T __shfl_sync(unsigned, T value, int from) { return emulator::exchange(value, emulator::current / 32 * 32 + from); }
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) { return emulator::exchange(value, emulator::current ^ mask); }
inline unsigned __ballot_sync(unsigned, bool flag) {
  unsigned flags = 0;
  for (int i = 0; i < 32; ++i) flags |= unsigned(emulator::exchange(flag, emulator::current / 32 * 32 + i)) << i;
  return flags;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <class T>
T __shfl_up_sync(unsigned, T value, int by) {
  return emulator::exchange(value, std::max(emulator::current - by, emulator::current / 32 * 32));
}
