// Nearest code and code statistics on the GPU. The contract is that of quantizer.cpp, and so is the idea: a cheap screen with
// a known error, then float64 for what the screen leaves open. No torch header: `nvcc -arch=sm_90 -c quantizer.cu` checks this
// file alone. It needs tensor cores of compute capability 8.0 or newer, and uses those of 9.0 (built for sm_90a) as they want.
//
// The screen multiplies in float16, on tensor cores, and adds up in float32. How far a rounded row x' is from x is measured
// when it is packed, and so is |c - c'|; as x.c - x'.c' = (x - x').c + x'.(c - c'), the product is off by at most
// |x - x'| |c| + |x'| |c - c'|. To look through the scores then takes longer than to multiply, and it is worse than that: while
// tensor cores run, the units that compare have half their rate (measured on an H100). So two scores share a word, in float16,
// next to marks that say whose they are; see screen_kernel for why that loses little. On normal data 89 rows of 100 are left
// with one code, the others with two or three.
//
// Where the bytes go. The codes are packed once, in the order in which tensor cores read them, and pass through shared memory,
// 64 at a time. A warp keeps its 16 rows in registers (D <= 128; else rows, too, are packed, and come back for every 64 codes).
// Scores never leave the registers: of each row, what may still be the best is noted, about three codes of 2048.

#include "quantizer.h"

#include <cmath>

#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

namespace hipart {
namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;    // of a block of the screen
constexpr int GROUP = 16, ROWS = GROUP * WARPS;       // rows of an operand, which a warp of the screen holds; rows of a block
constexpr int TILE = 256, STAGE = 64;                 // codes of a tile; codes that are multiplied together
constexpr int MARKS = TILE / 8;                       // codes of a tile that a lane has in either half of a word
constexpr int RING = 4;                               // records of 64 codes in shared memory: at work, or on their way
constexpr int WANTED_BLOCKS = 132, MOST_SPLITS = 16;  // of the screen: one for each multiprocessor of an H100
constexpr int LIST = 8;                               // candidates that are kept of a row and share of the codes
constexpr int PACKERS = TILE / GROUP * 32;            // threads of pack_kernel
constexpr int FINISHERS = 256;                        // threads of finish_kernel
constexpr int CODES = 8, COLUMNS = 128, COUNTERS = 256;  // codes, dimensions and threads of a block of statistics_kernel
constexpr float MOST = 24576, BEHIND = -15000;           // of x.c - |c|^2 / 2, in units; added to it where there is no code
constexpr int64_t CHUNK = 1 << 17;                       // rows that are searched together: what is noted of them stays in cache
constexpr int64_t MOST_SCREENED = 1 << 20;               // dimensions; about here float32 sums stop to say anything
constexpr unsigned ALL = 0xffffffffu;

// Of packed rows: their largest norm, their largest |v - v'|, both in true units; their unit, a power of two, and one over it.
struct alignas(16) Group { float norm, residual, unit, inverse; };

// The best code of a tile among the 64 that a lane looks at, with bounds below its score (low) and below those of the other 63
// (next). Of a row: a bound above its smallest score, and how many candidates were noted; -1 if some did not fit.
struct alignas(16) Candidate { float low, next; int code, unused; };
struct alignas(8) Row { float limit; int found; };

__host__ __device__ int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
__device__ float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN stays, unlike in fmaxf

// Row-major numbers are read 16 bytes at a time: D is a multiple of 4 here (zeros added to both sides change no distance).
template <class T>
struct alignas(16) Vector { T v[16 / sizeof(T)]; };

// The contract's number, or NaN if anything is not finite.
template <class T>
__device__ __forceinline__ double distance64(const T* x, const T* c, int64_t D) {
  constexpr int EACH = 16 / sizeof(T), BATCH = 8;  // all loads of a batch are under way before the first is needed
  double sum = 0;
  T probe = 0;
  for (int64_t start = 0; start < D; start += BATCH * EACH) {
    Vector<T> x_some[BATCH], c_some[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const bool there = start + i * EACH < D;
      x_some[i] = there ? *reinterpret_cast<const Vector<T>*>(x + start + i * EACH) : Vector<T>{};
      c_some[i] = there ? *reinterpret_cast<const Vector<T>*>(c + start + i * EACH) : Vector<T>{};
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        const double e = __dsub_rn(x_some[i].v[j], c_some[i].v[j]);
        sum = __dadd_rn(sum, __dmul_rn(e, e));
        probe += (x_some[i].v[j] - x_some[i].v[j]) + (c_some[i].v[j] - c_some[i].v[j]);
      }
  }
  return sum + probe;
}

// Distances as integers in the same order, NaN before all others.
__device__ unsigned long long rank(double d) { return d == d ? __double_as_longlong(d) + 1ull : 0; }

// Rows g and g + 8 of 16, as lane 4 g + t of a packing warp sees them: of every 16 columns, four of each row, minus `mean`.
// Which column goes to which place of an operand does not matter, as long as it is the same for both operands.
struct Reader {
  const float *row[2], *mean;
  int D;

  __device__ Reader(const float* x, int64_t first, int64_t rows, const float* mean, int64_t D) : mean(mean), D(int(D)) {
    const int g = threadIdx.x % 32 / 4;  // rows beyond the end repeat the last one
    for (int h = 0; h < 2; ++h) row[h] = x + (first + g + 8 * h < rows ? first + g + 8 * h : rows - 1) * D;
  }
  __device__ void read(int step, float (&v)[8]) const {
    const int d = 16 * step + 4 * (threadIdx.x % 4);
    const auto shift = *reinterpret_cast<const Vector<float>*>(mean + d);  // 0 beyond D
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto some = d < D ? *reinterpret_cast<const Vector<float>*>(row[h] + d) : Vector<float>{};
#pragma unroll
      for (int i = 0; i < 4; ++i) v[4 * h + i] = some.v[i] - shift.v[i];
    }
  }
};

__device__ void add_squares(const float (&v)[8], float (&sum)[2]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i / 4] += v[i] * v[i];
}

__device__ float largest_of_warp(float most) {
  for (int other = 16; other > 0; other /= 2) most = larger(most, __shfl_xor_sync(ALL, most, other));
  return most;
}

// The largest norm of a warp's 16 rows: four lanes hold a row.
__device__ float largest_norm(float (&sum)[2]) {
  for (int h = 0; h < 2; ++h)
    for (int other = 1; other < 4; other *= 2) sum[h] += __shfl_xor_sync(ALL, sum[h], other);
  return sqrtf(largest_of_warp(larger(sum[0], sum[1])));
}

// A power of two that takes a norm to between 2^6 and 2^7, so that a product of two rows is at most 2^14.
__device__ float unit_for(float norm) {
  int exponent = -40;
  if (norm > 0 && norm < INFINITY) frexpf(norm, &exponent);
  return ldexpf(1.f, (exponent > -40 ? exponent : -40) - 7);
}

// Rows take no smaller a unit than any code, so that |c|^2 / 2, in units of both, is at most 2^13.
__device__ float largest_unit(const Group* tiles, int n_tiles) {
  float most = 0;
  for (int i = threadIdx.x % 32; i < n_tiles; i += 32) most = fmaxf(most, tiles[i].unit);
  return largest_of_warp(most);
}

// Rounds to float16 what a lane read, and adds up what that is and what it loses: for two rows.
struct Packer {
  float norm[2] = {}, residual[2] = {};

  __device__ uint4 pack(const float (&v)[8], float scale) {
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = 0;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float exact = v[2 * i + j] * scale;
        const __half rounded = __float2half_rn(exact);
        const float lost = exact - __half2float(rounded);
        norm[i / 2] += exact * exact, residual[i / 2] += lost * lost;
        word[i] |= unsigned(__half_as_ushort(rounded)) << (16 * j);
      }
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
  }
  __device__ void finish_rows() {  // four lanes hold a row
    for (int h = 0; h < 2; ++h)
      for (int other = 1; other < 4; other *= 2)
        norm[h] += __shfl_xor_sync(ALL, norm[h], other), residual[h] += __shfl_xor_sync(ALL, residual[h], other);
  }
  // Sums of D squares in float32 are a little off, and so is v - mean.
  __device__ Group group(float unit, int64_t D) const {
    float most = larger(norm[0], norm[1]), worst = larger(residual[0], residual[1]);
    for (int other = 4; other < 32; other *= 2) {
      most = larger(most, __shfl_xor_sync(ALL, most, other));
      worst = larger(worst, __shfl_xor_sync(ALL, worst, other));
    }
    const float more = unit * (1 + (D + 16) * 0x1p-23f), X = sqrtf(most) * more;
    return {X, sqrtf(worst) * more + X * 0x1p-22f, unit, 1 / unit};
  }
};

// Four columns of an operand; with three of them, a number is the sum of what float16 can hold.
__device__ unsigned bits_of(__half2 v) { return reinterpret_cast<unsigned&>(v); }
__device__ uint2 columns(float a, float b, float c, float d) {
  return make_uint2(bits_of(__floats2half2_rn(a, b)), bits_of(__floats2half2_rn(c, d)));
}
__device__ uint2 split(float v, float fourth) {
  const float high = __half2float(__float2half_rn(v)), middle = __half2float(__float2half_rn(v - high));
  return columns(high, middle, v - high - middle, fourth);
}

// Packed codes lie in records of 64 codes and PART steps, as the screen has them in shared memory: of 8 codes and 8 columns,
// 128 bytes lie together (a core matrix of wgmma), then the other 8 columns, then the next 8 codes, the next step. One step
// more has columns that no code has: |c|^2 / 2 and a place for the offset, which the product thus takes off by itself.
__host__ __device__ constexpr int words_of_record(int part) { return STAGE * 8 * (part + 1); }

__device__ void put(uint4 word, unsigned* to) {  // 16 codes of a step
  const int lane = threadIdx.x % 32;
  to[lane] = word.x, to[lane + 32] = word.y, to[lane + 64] = word.z, to[lane + 96] = word.w;
}

// A tile per block, a warp per group: rows go to out [groups][steps][lane], codes (these have no `code_tiles` yet) to records.
// Codes beyond the last one repeat it, and stay behind it. The mean [16 steps] is made here, by every block of codes, of 32
// codes: any shift would do, this one makes the numbers small, hence their rounding errors.
template <int PART>
__global__ void __launch_bounds__(PACKERS) pack_kernel(const float* m, int64_t first, int64_t rows, int D, int steps, float* mean,
                                                       uint4* out, Group* tiles, const Group* code_tiles, int n_tiles) {
  constexpr int SAMPLE = 32, GROUPS = TILE / GROUP, KEPT = 8;  // steps that stay in registers
  __shared__ float norm_of[GROUPS];
  __shared__ Group group_of[GROUPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (!code_tiles) {
    for (int d = threadIdx.x; d < 16 * steps; d += PACKERS) {
      float sum = 0;
      if (d < D) {
#pragma unroll
        for (int i = 0; i < SAMPLE; ++i) sum += m[rows * i / SAMPLE * D + d] / SAMPLE;
      }
      mean[d] = sum;
    }
    __syncthreads();
  }
  const int64_t group = int64_t(blockIdx.x) * GROUPS + warp;
  const Reader reader(m, first + group * GROUP, first + rows, mean, D);
  float kept[KEPT][8], v[8], sum[2] = {};
#pragma unroll
  for (int s = 0; s < KEPT; ++s)
    if (s < steps) reader.read(s, kept[s]);
#pragma unroll
  for (int s = 0; s < KEPT; ++s)
    if (s < steps) add_squares(kept[s], sum);
  for (int s = KEPT; s < steps; ++s) reader.read(s, v), add_squares(v, sum);
  float norm = largest_norm(sum);
  if (lane == 0) norm_of[warp] = norm;
  __syncthreads();
  for (int i = 0; i < GROUPS; ++i) norm = larger(norm, norm_of[i]);
  const float unit = code_tiles ? fmaxf(unit_for(norm), largest_unit(code_tiles, n_tiles)) : unit_for(norm);
  unsigned* const record = reinterpret_cast<unsigned*>(out) +  // the first of these codes
                           group * GROUP / STAGE * (steps / PART) * words_of_record(PART) + group * GROUP % STAGE * 8;
  Packer packer;
  auto pack = [&](int step, const float (&v)[8]) {
    const uint4 word = packer.pack(v, 1 / unit);  // exact
    if (code_tiles)
      out[(group * steps + step) * 32 + lane] = word;
    else
      put(word, record + step / PART * words_of_record(PART) + step % PART * STAGE * 8);
  };
#pragma unroll
  for (int s = 0; s < KEPT; ++s)
    if (s < steps) pack(s, kept[s]);
  for (int s = KEPT; s < steps; ++s) reader.read(s, v), pack(s, v);
  packer.finish_rows();
  for (int step = 0; step < steps && !code_tiles; step += PART) {  // the columns that no code has: zeros but in the first part
    uint2 more[2] = {};
    for (int h = 0; h < 2 && step == 0; ++h) {
      const float behind = group * GROUP + lane / 4 + 8 * h < rows ? 0 : BEHIND;
      more[h] = lane % 4 == 0 ? split(-packer.norm[h] / 2, behind) : columns(lane % 4 == 1, 0, 0, 0);
    }
    put(make_uint4(more[0].x, more[0].y, more[1].x, more[1].y),
        record + step / PART * words_of_record(PART) + PART * STAGE * 8);
  }
  const Group mine = packer.group(unit, D);
  if (lane == 0) group_of[warp] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    Group all = group_of[0];
    for (int i = 1; i < GROUPS; ++i) {
      all.norm = larger(all.norm, group_of[i].norm);
      all.residual = larger(all.residual, group_of[i].residual);
    }
    tiles[blockIdx.x] = all;
  }
}

// d = a b, or d += a b: 16 x STAGE scores of a warp. Lane 4 g + t holds those of rows g (d[n][0], d[n][1]) and g + 8, codes
// 8 n + 2 t and 8 n + 2 t + 1. Tensor cores of compute capability 9.0 read the codes from shared memory by themselves, for four
// warps together, and a copy engine brings them there.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
struct Operand {  // the address, and how far it is to the next core matrix: 128 bytes along the columns, 256 along the codes
  uint64_t at;
  __device__ explicit Operand(const uint4* codes)
      : at((__cvta_generic_to_shared(codes) & 0x3ffff) >> 4 | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32) {}
};

__device__ void multiply_add(float (&d)[STAGE / 8][4], uint4 a, Operand codes, int offset, bool add) {
  static_assert(STAGE == 64);
  asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
      "{%32, %33, %34, %35}, %36, p, 1, 1, 0;}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]),
        "+f"(d[1][2]), "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]),
        "+f"(d[3][0]), "+f"(d[3][1]), "+f"(d[3][2]), "+f"(d[3][3]), "+f"(d[4][0]), "+f"(d[4][1]),
        "+f"(d[4][2]), "+f"(d[4][3]), "+f"(d[5][0]), "+f"(d[5][1]), "+f"(d[5][2]), "+f"(d[5][3]),
        "+f"(d[6][0]), "+f"(d[6][1]), "+f"(d[6][2]), "+f"(d[6][3]), "+f"(d[7][0]), "+f"(d[7][1]),
        "+f"(d[7][2]), "+f"(d[7][3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(codes.at + offset), "r"(int(add)));
}
__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void await_products() {
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
}
__device__ void here(float& d) { asm volatile("" : "+f"(d)::"memory"); }  // what is done to it is done before, or after

// A barrier in shared memory has phases: one ends when a record is there, one when all warps have left it. Thread 0 asks for
// the records.
struct Gates { uint64_t full[RING], empty[RING]; };
__device__ unsigned address(const void* shared) { return unsigned(__cvta_generic_to_shared(shared)); }
__device__ void wait(const uint64_t& gate, int phase) {
  asm volatile("{.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;}"
      :: "r"(address(&gate)), "r"(phase) : "memory");
}
__device__ void prepare(Gates& gates) {
  if (threadIdx.x != 0) return;
  for (int i = 0; i < RING; ++i)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\nmbarrier.init.shared::cta.b64 [%1], %2;"
        :: "r"(address(&gates.full[i])), "r"(address(&gates.empty[i])), "n"(WARPS) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
template <int WORDS>
__device__ void fetch(uint4* to, const uint4* from, bool there, Gates& gates, int turn) {
  if (there && threadIdx.x == 0) {
    if (turn >= RING) wait(gates.empty[turn % RING], (turn / RING - 1) % 2);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%2], %3;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];"
        :: "r"(address(to)), "l"(__cvta_generic_to_global(from)), "r"(address(&gates.full[turn % RING])), "r"(WORDS * 16)
        : "memory");
  }
  __syncwarp();  // products are asked for by whole warps
}
__device__ void await(Gates& gates, int turn) { wait(gates.full[turn % RING], turn / RING % 2); }
__device__ void leave(Gates& gates, int turn) {
  if (threadIdx.x % 32 == 0)
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(&gates.empty[turn % RING])) : "memory");
}
__device__ void prefetch(const float* from, int64_t floats) {  // into the cache
  if (threadIdx.x == 0 && floats > 0)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)), "r"(unsigned(floats * 4)));
}
#else
using Operand = const uint4*;

__device__ void mma(float (&d)[4], uint4 a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ void multiply_add(float (&d)[STAGE / 8][4], uint4 a, Operand codes, int offset, bool add) {
  const unsigned* b = reinterpret_cast<const unsigned*>(codes + offset) + threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < STAGE / 8; ++n) {
    if (!add) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0;
    mma(d[n], a, b[64 * n], b[64 * n + 32]);
  }
}
__device__ void begin_products() {}
__device__ void await_products() {}
__device__ void here(float&) {}

struct Gates {};
__device__ void prepare(Gates&) {}
template <int WORDS>
__device__ void fetch(uint4* to, const uint4* from, bool there, Gates&, int) {
  for (int i = threadIdx.x; i < WORDS && there; i += THREADS) __pipeline_memcpy_async(&to[i], &from[i], 16);
  __pipeline_commit();
}
__device__ void await(Gates&, int) {
  __pipeline_wait_prior(RING - 2);
  __syncthreads();  // all see this record, and all have left the one before
}
__device__ void leave(Gates&, int) {}
__device__ void prefetch(const float*, int64_t) {}
#endif

// Packed as one operand, wanted as the other: the middle words change places.
__device__ uint4 as_rows(uint4 v) { return make_uint4(v.x, v.z, v.y, v.w); }

// How far a score |c|^2 - 2 x.c, taken in float32, may be from its true value, for a row of norm X and codes of norm at most
// C, apart from what rounding to float16 adds, and the `offset` that is subtracted from all scores of the row.
//  - Tensor cores truncate every term: a product of length D, summed in any order, is off by at most 1.25 D u X C, u = 2^-23.
//    What else is in the sum, -|c|^2 / 2 and the offset, loses as much at most every fourth time. The score holds all
//    that twice; the rounding of the inputs and of this bound add some u of it. All that is taken 1.6 times.
//  - The contract's own float64 sum rounds as well, which decides where a row is far from all codes.
//  - Products and inputs below 2^-126 may be flushed to zero.
// `4 * C * (X + C)` overflows before any score can: then the bound is infinite or NaN, and no code is ruled out. Data of
// 1e19 and more, or of 1e-17 and less, are therefore compared in full: right, and slow.
struct Bound {
  float relative, far, tiny;

  explicit Bound(int64_t D) : relative((D + 16) * 0x1p-23f), far((D + 4) * 0x1p-50f), tiny(D * 0x1p-120f) {}

  __device__ float operator()(float X, float C) const {
    return relative * (4 * C * (X + C)) + far * (X * X) + tiny * (1 + X + C);
  }
};

struct Screen {
  const float *x, *mean;
  const uint4 *packed_x, *codes;
  const Group *x_tiles, *tiles;
  int64_t first, rows, all_rows, D;
  int steps, n_tiles;
  unsigned unmarked;  // a mask; one more constant in the code would be one more instruction
  Bound bound;
  Candidate* lists;
  Row* found;
};

__device__ __half2 marked(__half2 v, unsigned unmarked, unsigned mark) {
  const unsigned bits = (bits_of(v) & unmarked) | mark * 0x10001u;
  return reinterpret_cast<const __half2&>(bits);
}
// A float16 keeps 11 bits of a value, and 6 beside a mark: it is off by less than this. The last term is for the smallest
// numbers of float16, in the value and in the ratio of units that |c|^2 / 2, at most 2^13, is multiplied with.
__device__ float blur(float value) { return fabsf(value) * (MARKS * 0x1p-10f) + 0x1p-11f; }

// Scores of 256 rows against the tiles blockIdx.y, blockIdx.y + gridDim.y, ... While tensor cores multiply for some of the 16
// warps, others look through their scores. WHOLE: D <= 16 STEPS; else the dimensions of 64 codes come in parts.
//
// What is looked through is x.c - |c|^2 / 2 - offset, in units of rows and codes: the larger, the nearer. The offset is the best
// of the row so far, so that codes that matter come out near zero, where float16 has the finest steps; of the others it is
// enough to know that they are far off. Rounded to float16, two codes share a word, and five instructions look at both.
template <int STEPS, bool WHOLE>
__global__ void __launch_bounds__(THREADS, 1) screen_kernel(Screen p) {
  constexpr int NT = STAGE / 8, STAGES = TILE / STAGE, RECORD = STAGE * 2 * (STEPS + 1);  // 16-byte words of a record
  extern __shared__ __align__(128) uint4 ring[];
  __shared__ Gates gates;
  const int lane = threadIdx.x % 32, t = lane % 4, warp = threadIdx.x / 32, parts = WHOLE ? 1 : p.steps / STEPS;
  const int64_t row_0 = int64_t(blockIdx.x) * ROWS + warp * GROUP;
  int coming = blockIdx.y, record = 0;  // the tile, and the record of it, that is fetched next
  auto bring = [&](int turn) {
    fetch<RECORD>(&ring[turn % RING * RECORD], p.codes + (int64_t(coming) * STAGES * parts + record) * RECORD, coming < p.n_tiles,
                  gates, turn);
    if (++record == STAGES * parts) record = 0, coming += gridDim.y;
  };
  prepare(gates);
  __syncthreads();
  for (int turn = 0; turn < RING - 1; ++turn) bring(turn);

  uint4 a[STEPS], extra;  // the rows; the columns that no row has
  Group mine;
  if constexpr (WHOLE) {
    const float largest = largest_unit(p.tiles, p.n_tiles);
    const Reader reader(p.x, p.first + row_0, p.first + p.rows, p.mean, p.D);
    float v[STEPS][8], sum[2] = {};
#pragma unroll
    for (int s = 0; s < STEPS; ++s) reader.read(s, v[s]);
#pragma unroll
    for (int s = 0; s < STEPS; ++s) add_squares(v[s], sum);
    const float unit = fmaxf(unit_for(largest_norm(sum)), largest);
    Packer packer;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) a[s] = as_rows(packer.pack(v[s], 1 / unit));
    packer.finish_rows();
    mine = packer.group(unit, p.D);
    const int64_t later = p.first + (int64_t(blockIdx.x) + WANTED_BLOCKS) * ROWS, left = p.all_rows - later;
    prefetch(p.x + later * p.D, (left < ROWS ? left : ROWS) * p.D);  // another block's
  } else {
    mine = p.x_tiles[row_0 / TILE];
  }
  float acc[NT][4], offset[2], limit[2] = {INFINITY, INFINITY};
  __half2 best[2], next[2];  // of this tile: two codes a word, each with its mark
  int found[2] = {};
  bool lost[2] = {};
  Candidate* lists[2];
  for (int h = 0; h < 2; ++h) lists[h] = p.lists + ((row_0 + lane / 4 + 8 * h) * gridDim.y + blockIdx.y) * LIST;

  auto aim = [&](const float (&at)[2], float ratio) {  // sets the offsets; `ratio` of the units of codes and rows
    uint2 more[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      offset[h] = __half22float2(__floats2half2_rn(at[h], 0)).x;  // any number will do, so one of float16
      more[h] = t == 0 ? columns(ratio, ratio, ratio, 1) : columns(t == 1 ? -offset[h] : 0, 0, 0, 0);
    }
    extra = as_rows(make_uint4(more[0].x, more[0].y, more[1].x, more[1].y));
  };
  auto aim_at_best = [&](float ratio) {  // nothing is known before the first 64 codes: the best of them will do
    float most[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      most[h] = acc[0][2 * h];
#pragma unroll
      for (int n = 0; n < NT; ++n) most[h] = fmaxf(most[h], fmaxf(acc[n][2 * h], acc[n][2 * h + 1]));
      for (int other = 1; other < 4; other *= 2) most[h] = fmaxf(most[h], __shfl_xor_sync(ALL, most[h], other));
    }
    aim(most, ratio);
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[n][i] -= offset[i / 2];
  };
  auto look = [&](int stage) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const __half2 value = marked(__floats2half2_rn(acc[n][2 * h], acc[n][2 * h + 1]), p.unmarked, stage * NT + n);
        next[h] = __hmax2(next[h], __hmin2(best[h], value));
        best[h] = __hmax2(best[h], value);
      }
  };
  auto note = [&](int tile, float scale, float error) {  // a tile has been looked through
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 b = __half22float2(best[h]), n = __half22float2(next[h]);
      const float v = fmaxf(b.x, b.y), E = error - p.bound.relative * scale * fabsf(offset[h]);
      const float low = scale * (v + blur(v) + offset[h]) - E;
      limit[h] = fminf(limit[h], scale * (v - blur(v) + offset[h]) + E);
      for (int other = 1; other < 4; other *= 2) limit[h] = fminf(limit[h], __shfl_xor_sync(ALL, limit[h], other));
      const bool keep = !(low > limit[h]);  // NaN rules nothing out
      const unsigned keepers = __ballot_sync(ALL, keep) >> (lane - t) & 15;  // of the four lanes that share this row
      __syncwarp();  // another lane may have written what this one replaces
      if (keep) {
        const int at = found[h] + __popc(keepers & ((1u << t) - 1)), odd = b.y > b.x;
        const int code = tile * TILE + int(bits_of(best[h]) >> 16 * odd & (MARKS - 1)) * 8 + 2 * t + odd;
        const float w = fmaxf(fminf(b.x, b.y), fmaxf(n.x, n.y));
        Candidate* to = lists[h] + at % LIST;
        lost[h] |= at >= LIST && !(to->low > limit[h]);  // what it replaces may be ruled out by now
        *to = {low, scale * (w + blur(w) + offset[h]) - E, code, 0};
      }
      found[h] += __popc(keepers);
    }
  };
  int turn = 0;
  for (int tile = blockIdx.y; tile < p.n_tiles; tile += gridDim.y) {
    const Group of_tile = p.tiles[tile];
    const float scale = -2 * mine.unit * of_tile.unit;  // a score is this times what is looked through and the offset
    const float ratio = of_tile.unit * mine.inverse, inverse = -0.5f * mine.inverse * of_tile.inverse;
    float at[2];
    for (int h = 0; h < 2; ++h) {
      at[h] = limit[h] < INFINITY ? fminf(fmaxf(limit[h] * inverse, -MOST), MOST) : 0;
      best[h] = next[h] = __floats2half2_rn(-65504, -65504);
    }
    aim(at, ratio);
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      for (int part = 0; part < parts; ++part, ++turn) {
        await(gates, turn);  // this record
        if constexpr (!WHOLE)
#pragma unroll
          for (int s = 0; s < STEPS; ++s)
            a[s] = as_rows(p.packed_x[(row_0 / GROUP * p.steps + part * STEPS + s) * 32 + lane]);
        const Operand operand(&ring[(WHOLE && STAGES % RING == 0 ? stage : turn) % RING * RECORD]);
        for (auto& d : acc) for (float& one : d) here(one);
        begin_products();
        multiply_add(acc, extra, operand, STEPS * STAGE * 2, part > 0);
#pragma unroll
        for (int s = 0; s < STEPS; ++s) multiply_add(acc, a[s], operand, s * STAGE * 2, true);
        await_products();
        for (auto& d : acc) for (float& one : d) here(one);
        leave(gates, turn);
        bring(turn + RING - 1);
      }
      if (stage == 0 && tile == int(blockIdx.y)) aim_at_best(ratio);
      look(stage);
    }
    const float X = mine.norm, gone = mine.residual, C = of_tile.norm, gone_c = of_tile.residual;
    const float error = p.bound(X, C) + 2 * (gone * C + (X + gone) * gone_c);
    note(tile, scale, error);
  }
  for (int h = 0; h < 2; ++h) {
    for (int other = 1; other < 4; other *= 2) lost[h] |= __shfl_xor_sync(ALL, int(lost[h]), other);
    const int64_t row = row_0 + lane / 4 + 8 * h;
    if (t == 0) p.found[row * gridDim.y + blockIdx.y] = {limit[h], lost[h] ? -1 : found[h] < LIST ? found[h] : LIST};
  }
}

// What the screen has left. A row with one code is done. With a few: a thread evaluates each. If there may be others, too: the
// block evaluates all codes. Without lists (float64) it does so for all rows. `readers` threads read the lists of a row.
template <class T>
__global__ void __launch_bounds__(FINISHERS, 2) finish_kernel(const T* x, const T* codes, int64_t first, int64_t rows, int64_t K,
                                                              int64_t D, const Candidate* lists, const Row* of_rows, int shares,
                                                              int readers, int64_t* idx, double* distance) {
  constexpr int PAIRS = 1024;
  __shared__ int row_of[PAIRS], code_of[PAIRS], winner[FINISHERS], many[FINISHERS], n_pairs, n_many;
  __shared__ unsigned long long rank_of[PAIRS], least[FINISHERS];  // of pairs, of rows
  const int mine = threadIdx.x / readers;                          // of the rows of this block
  const int64_t base = int64_t(blockIdx.x) * (FINISHERS / readers), row = base + mine;
  const bool leads = threadIdx.x % readers == 0 && row < rows;
  if (threadIdx.x == 0) n_pairs = n_many = 0;
  least[threadIdx.x] = ~0ull, winner[threadIdx.x] = INT32_MAX;
  __syncthreads();
  int found = 0, all = 0, code = 0;  // codes that this thread has left, and the readers of this row together; one of them
  bool open = !lists;                // there are others
  if (lists) {
    const int64_t share = (row < rows ? row : rows - 1) * shares + threadIdx.x % readers;
    const Row seen = int(threadIdx.x) % readers < shares ? of_rows[share] : Row{INFINITY, 0};
    float limit = seen.limit;
    for (int other = 1; other < readers; other *= 2) limit = fminf(limit, __shfl_xor_sync(ALL, limit, other));
    open = seen.found < 0;
    auto each = [&](auto take) {  // take(code), for all that this thread cannot rule out; `not >`: NaN rules nothing out
      for (int i = 0; i < seen.found; ++i) {
        const Candidate it = lists[share * LIST + i];
        if (it.low > limit) continue;
        take(it.code);
        if (!(it.next > limit))  // others of this tile and lane
          for (int i = 0; i < TILE / 4; ++i) take(it.code / TILE * TILE + i / 2 * 8 + it.code % 8 / 2 * 2 + i % 2);
      }
    };
    each([&](int k) { ++found, code = k; });
    all = found;
    for (int other = 1; other < readers; other *= 2) {
      const int their_code = __shfl_xor_sync(ALL, code, other), theirs = __shfl_xor_sync(ALL, all, other);
      code = all ? code : their_code, all += theirs;
      open |= __shfl_xor_sync(ALL, int(open), other);
    }
    if (all == 1 && !open) {
      if (leads) idx[first + row] = code;
    } else if (!open && row < rows) {
      int at = atomicAdd(&n_pairs, found);
      open = at + found > PAIRS;
      if (!open) each([&](int k) { row_of[at] = mine, code_of[at++] = k; });
      for (; at < PAIRS && open; ++at) code_of[at] = INT32_MAX;  // the list is full: nobody's
    }
    for (int other = 1; other < readers; other *= 2) open |= __shfl_xor_sync(ALL, int(open), other);
  }
  if (leads && open) many[atomicAdd(&n_many, 1)] = mine;
  __syncthreads();
  const int pairs = n_pairs < PAIRS ? n_pairs : PAIRS;
  auto settle = [&](int r, unsigned long long value, int k) {  // ties go to the lowest code, NaN to none
    if (value == least[r]) atomicMin(&winner[r], value ? k : -1);
  };
  for (int i = threadIdx.x; i < pairs; i += FINISHERS)
    if (code_of[i] < K) {
      rank_of[i] = rank(distance64(x + (first + base + row_of[i]) * D, codes + code_of[i] * D, D));
      atomicMin(&least[row_of[i]], rank_of[i]);
    }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += FINISHERS)
    if (code_of[i] < K) settle(row_of[i], rank_of[i], code_of[i]);
  __syncthreads();
  for (int i = 0; i < n_many; ++i) {
    if (threadIdx.x == 0) least[many[i]] = ~0ull, winner[many[i]] = INT32_MAX;  // some of it may have been in the list
    __syncthreads();
    unsigned long long value = ~0ull;
    int nearest = INT32_MAX;
    for (int64_t k = threadIdx.x; k < K; k += FINISHERS) {
      const unsigned long long other = rank(distance64(x + (first + base + many[i]) * D, codes + k * D, D));
      if (other < value) value = other, nearest = int(k);
    }
    atomicMin(&least[many[i]], value);
    __syncthreads();
    settle(many[i], value, nearest);
  }
  __syncthreads();
  if (leads && (open || all > 1)) idx[first + row] = winner[mine] < 0 ? K : winner[mine];
  if (leads && distance) {
    const int64_t k = idx[first + row];
    distance[first + row] = k < K ? distance64(x + (first + row) * D, codes + k * D, D) : NAN;
  }
}

// n [K] and s [K, D]: a block per 8 codes and 128 dimensions goes through all indices, and adds up the rows of its codes in
// ascending order: no atomics on floats, no sort, the same bits every time.
__global__ void __launch_bounds__(COUNTERS) statistics_kernel(const float* x, const int64_t* idx, int64_t N, int64_t K, int64_t D,
                                                             float* n, float* s) {
  constexpr int EACH = 16, SPAN = COUNTERS * EACH, HANDS = COUNTERS / COLUMNS, BATCH = 8;
  __shared__ float sums[CODES][COLUMNS];
  __shared__ int found_by[COUNTERS / 32], list[SPAN];  // of the rows of this span that have one of these codes: 8 row + code
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column = threadIdx.x % COLUMNS, hand = threadIdx.x / COLUMNS;
  const int64_t shares = (K + CODES - 1) / CODES, d = blockIdx.x / shares * COLUMNS + column;
  const int64_t first_code = blockIdx.x % shares * CODES;
  int64_t count = 0;
  for (int i = threadIdx.x; i < CODES * COLUMNS; i += COUNTERS) sums[i / COLUMNS][i % COLUMNS] = 0;
  for (int64_t start = 0; start < N; start += SPAN) {
    const int64_t mine = start + threadIdx.x * EACH;
    int code[EACH], found = 0;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int64_t k = mine + i < N ? idx[mine + i] - first_code : -1;
      code[i] = k >= 0 && k < CODES && first_code + k < K ? int(k) : -1;
      found += code[i] >= 0;
    }
    int before = found;  // inclusive sum over the warp, then over the warps before
    for (int by = 1; by < 32; by *= 2) {
      const int other = __shfl_up_sync(ALL, before, by);
      if (lane >= by) before += other;
    }
    if (lane == 31) found_by[warp] = before;
    before -= found;
    __syncthreads();  // also: all are done with the list of the last span
    int total = 0;
    for (int w = 0; w < COUNTERS / 32; ++w) before += w < warp ? found_by[w] : 0, total += found_by[w];
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (code[i] >= 0) list[before++] = (threadIdx.x * EACH + i) * CODES + code[i];
    __syncthreads();
    for (int i = 0; i < total; i += BATCH) {
      float some[BATCH];
#pragma unroll
      for (int j = 0; j < BATCH; ++j)
        some[j] = i + j < total && list[i + j] % HANDS == hand && d < D ? x[(start + list[i + j] / CODES) * D + d] : 0;
#pragma unroll
      for (int j = 0; j < BATCH; ++j)
        if (i + j < total && list[i + j] % HANDS == hand) sums[list[i + j] % CODES][column] += some[j];
    }
    if (threadIdx.x < CODES)
      for (int i = 0; i < total; ++i) count += list[i] % CODES == threadIdx.x;
  }
  __syncthreads();
  if (threadIdx.x < CODES && first_code + threadIdx.x < K && d < COLUMNS) n[first_code + threadIdx.x] = count;
  for (int k = hand; k < CODES && first_code + k < K; k += HANDS)
    if (d < D) s[(first_code + k) * D + d] = sums[k][column];
}

// How the scratch memory is cut up; every piece starts on a multiple of 256 bytes.
struct Scratch {
  int64_t chunk, codes, splits, bytes = 0;
  int part, steps;
  int64_t mean, c, tiles, x, x_tiles, lists, found;
  bool whole;

  Scratch(int64_t N, int64_t K, int64_t D) {
    auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    auto take = [this](int64_t n) { const int64_t at = bytes; bytes += round_up(n, 256); return at; };
    const int64_t blocks = (N + ROWS - 1) / ROWS;
    part = D > 64 ? 8 : 4, steps = int(round_up((D + 15) / 16, part)), whole = steps == part, codes = round_up(K, TILE);
    splits = least(least(WANTED_BLOCKS / (blocks ? blocks : 1), MOST_SPLITS), codes / TILE), splits = splits ? splits : 1;
    chunk = least(CHUNK, round_up(N, TILE));
    mean = take(4 * 16 * steps), c = take(4 * words_of_record(part) * (steps / part) * (codes / STAGE));
    tiles = take(sizeof(Group) * codes / TILE), x_tiles = take(sizeof(Group) * chunk / TILE);
    x = take(whole ? 0 : 32 * steps * chunk);
    lists = take(splits * LIST * sizeof(Candidate) * chunk), found = take(splits * sizeof(Row) * chunk);
  }
};

unsigned blocks(int64_t n, int64_t per_block) { return unsigned((n + per_block - 1) / per_block); }

// Without a screen.
template <class T>
int search_all(const T* x, const T* codes, int64_t N, int64_t K, int64_t D, int64_t* idx, double* distance, void* on) {
  const auto stream = static_cast<cudaStream_t>(on);
  for (int64_t first = 0; first < N; first += CHUNK) {
    const int64_t rows = N - first < CHUNK ? N - first : CHUNK;
    finish_kernel<T><<<blocks(rows, FINISHERS / 32), FINISHERS, 0, stream>>>(x, codes, first, rows, K, D, nullptr, nullptr, 0, 32,
                                                                             idx, distance);
  }
  return cudaGetLastError();
}

}  // namespace

int64_t nearest_code_cuda_scratch(int64_t N, int64_t K, int64_t D) { return D < MOST_SCREENED ? Scratch(N, K, D).bytes : 0; }

int nearest_code_cuda(const float* x, const float* codes, int64_t N, int64_t K, int64_t D, void* scratch, int64_t* idx,
                      double* distance, void* on) {
  if (N == 0 || D >= MOST_SCREENED) return search_all(x, codes, N, K, D, idx, distance, on);
  const Scratch at(N, K, D);
  char* memory = static_cast<char*>(scratch);
  auto* mean = reinterpret_cast<float*>(memory + at.mean);
  auto *c = reinterpret_cast<uint4*>(memory + at.c), *packed_x = reinterpret_cast<uint4*>(memory + at.x);
  auto *tiles = reinterpret_cast<Group*>(memory + at.tiles), *x_tiles = reinterpret_cast<Group*>(memory + at.x_tiles);
  auto* lists = reinterpret_cast<Candidate*>(memory + at.lists);
  auto* found = reinterpret_cast<Row*>(memory + at.found);
  const int n_tiles = int(at.codes / TILE), shares = int(at.splits);
  const Bound bound(D);
  const auto stream = static_cast<cudaStream_t>(on);
  const auto pack = at.part == 4 ? pack_kernel<4> : pack_kernel<8>;
  const auto screen = at.part == 4 ? screen_kernel<4, true> : at.whole ? screen_kernel<8, true> : screen_kernel<8, false>;
  const int bytes = RING * 4 * words_of_record(at.part);
  cudaFuncSetAttribute(screen, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  int readers = 1;
  while (readers < shares) readers *= 2;
  pack<<<n_tiles, PACKERS, 0, stream>>>(codes, 0, K, int(D), at.steps, mean, c, tiles, nullptr, 0);
  for (int64_t first = 0; first < N; first += at.chunk) {
    const int64_t rows = N - first < at.chunk ? N - first : at.chunk;
    const Screen work{x, mean, packed_x, c, x_tiles, tiles, first, rows, N, D, at.steps, n_tiles, ~(unsigned(MARKS - 1) * 0x10001u),
                      bound, lists, found};
    if (!at.whole)
      pack<<<blocks(rows, TILE), PACKERS, 0, stream>>>(x, first, rows, int(D), at.steps, mean, packed_x, x_tiles, tiles, n_tiles);
    screen<<<dim3(blocks(rows, ROWS), shares), THREADS, bytes, stream>>>(work);
    finish_kernel<float><<<blocks(rows, FINISHERS / readers), FINISHERS, 0, stream>>>(
        x, codes, first, rows, K, D, lists, found, shares, readers, idx, distance);
  }
  return cudaGetLastError();
}

int nearest_code_cuda(const double* x, const double* codes, int64_t N, int64_t K, int64_t D, void*, int64_t* idx,
                      double* distance, void* on) {
  return search_all(x, codes, N, K, D, idx, distance, on);  // float16 cannot screen float64
}

int code_statistics_cuda(const float* x, const int64_t* idx, int64_t N, int64_t K, int64_t D, float* n, float* s, void* on) {
  const unsigned grid = blocks(K, CODES) * blocks(D, COLUMNS);
  const auto stream = static_cast<cudaStream_t>(on);
  statistics_kernel<<<grid, COUNTERS, 0, stream>>>(x, idx, N, K, D, n, s);
  return cudaGetLastError();
}

}  // namespace hipart
