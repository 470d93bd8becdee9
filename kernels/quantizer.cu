// Nearest code and code statistics on the GPU. The contract is that of quantizer.cpp, and so is the idea: a cheap screen with
// a known error, then float64 for what the screen leaves open. No torch header: `nvcc -arch=sm_90 -c quantizer.cu` checks this
// file alone. It needs tensor cores of compute capability 8.0 or newer, and uses those of 9.0 (built for sm_90a) as they want.
//
// The screen multiplies in float16, on tensor cores, and adds up in float32. How far a rounded row x' is from x is measured
// when it is packed, and so is |c - c'|; as x.c - x'.c' = (x - x').c + x'.(c - c'), the product is off by at most
// |x - x'| |c| + |x'| |c - c'|. To compare what comes out then takes longer than to multiply, the more so as the units that
// compare have half their rate while tensor cores run (measured on an H100). So two results share a word, as float16, and the
// last bits of each say whose it is; see screen_kernel for why that loses little. On normal data 89 rows of 100 are left with
// one code, the others with two or three.
//
// Where the bytes go. The codes are packed once, in the order in which tensor cores read them, and pass through shared memory,
// 64 at a time. A warp keeps its 16 rows in registers (D <= 128; else rows, too, are packed, and come back for every 64 codes).
// Scores never leave the registers: of each row, what may still be the best is noted, about three codes of 2048.
//
// Which lane holds what follows from the instructions (PTX manual, mma.m16n8k16 and wgmma): of 16 rows, lane 4 g + t of a warp
// has rows g and g + 8; of every 8 codes, codes 2 t and 2 t + 1.

#include "quantizer.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

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
constexpr float MOST = 24576, BEHIND = -15000;        // of a closeness (see screen_kernel); added to it where there is no code
constexpr int64_t CHUNK = 1 << 17;                    // rows that are searched together: what is noted of them stays in cache
constexpr int64_t MOST_SCREENED = 1 << 20;            // dimensions; about here float32 sums stop to say anything
constexpr unsigned ALL = 0xffffffffu;

// Of packed rows: their largest norm, their largest |v - v'|, both in true units; their unit, a power of two, and one over it.
struct alignas(16) Group { float norm, residual, unit, inverse; };

// The best of the 64 codes of a tile that a lane has. Its score |c|^2 - 2 x.c is at least `low`, those of the others at least
// `next`. Of a row: its smallest score is at most `limit`; how many candidates were noted, or -1 if some did not fit.
struct alignas(16) Candidate { float low, next; int code, unused; };
struct alignas(8) Row { float limit; int found; };

// The code that a lane has in one half of a word, by its mark there; t = lane % 4.
__device__ int code_of(int tile, int mark, int t, int half) { return tile * TILE + mark * 8 + 2 * t + half; }

__host__ __device__ int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
__device__ float larger(float a, float b) { return a > b || a != a ? a : b; }  // NaN stays, unlike in fmaxf

// Row-major numbers are read 16 bytes at a time: D is a multiple of 4 here (zeros added to both sides change no distance).
template <class T>
struct alignas(16) Vector { T v[16 / sizeof(T)]; };

// The contract's number, or NaN if anything is not finite.
template <class T>
__device__ __forceinline__ double distance64(const T* x, const T* c, int64_t D) {
  constexpr int EACH = 16 / sizeof(T), BATCH = 8;  // by hand, as nvcc would wait for each load before it asks for the next
  double sum = 0;
  T probe = 0;
  for (int64_t start = 0; start < D; start += BATCH * EACH) {
    Vector<T> x_part[BATCH], c_part[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) {
      const bool exists = start + i * EACH < D;
      x_part[i] = exists ? *reinterpret_cast<const Vector<T>*>(x + start + i * EACH) : Vector<T>{};
      c_part[i] = exists ? *reinterpret_cast<const Vector<T>*>(c + start + i * EACH) : Vector<T>{};
    }
#pragma unroll
    for (int i = 0; i < BATCH; ++i)
#pragma unroll
      for (int j = 0; j < EACH; ++j) {
        const double e = __dsub_rn(x_part[i].v[j], c_part[i].v[j]);
        sum = __dadd_rn(sum, __dmul_rn(e, e));
        probe += (x_part[i].v[j] - x_part[i].v[j]) + (c_part[i].v[j] - c_part[i].v[j]);
      }
  }
  return sum + probe;
}

// Distances as integers in the same order. NaN comes first, and so wins: such a row gets no code.
__device__ unsigned long long rank(double d) { return d == d ? __double_as_longlong(d) + 1ull : 0; }

// What a lane has of 16 rows: of rows g and g + 8 four of every 16 columns, minus `mean`. Which column goes to which place of an
// operand does not matter, as long as it is the same for both operands.
struct Reader {
  const float *row[2], *mean;
  int D;

  __device__ Reader(const float* x, int64_t first, int64_t rows, const float* mean, int64_t D) : mean(mean), D(int(D)) {
    const int g = threadIdx.x % 32 / 4;  // rows beyond the end repeat the last one
    for (int h = 0; h < 2; ++h) row[h] = x + (first + g + 8 * h < rows ? first + g + 8 * h : rows - 1) * D;
  }
  template <int STEPS>
  __device__ void read(int step, float (&v)[STEPS][8]) const {
#pragma unroll
    for (int s = 0; s < STEPS; ++s) {
      const int d = 16 * (step + s) + 4 * (threadIdx.x % 4);
      const auto shift = *reinterpret_cast<const Vector<float>*>(mean + d);  // 0 beyond D
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const auto part = d < D ? *reinterpret_cast<const Vector<float>*>(row[h] + d) : Vector<float>{};
#pragma unroll
        for (int i = 0; i < 4; ++i) v[s][4 * h + i] = part.v[i] - shift.v[i];
      }
    }
  }
};

template <int STEPS>
__device__ void add_squares(const float (&v)[STEPS][8], float (&sum)[2]) {
#pragma unroll
  for (int i = 0; i < STEPS * 8; ++i) sum[i % 8 / 4] += v[i / 8][i % 8] * v[i / 8][i % 8];
}

__device__ float largest_of_warp(float most) {
  for (int other = 16; other > 0; other /= 2) most = larger(most, __shfl_xor_sync(ALL, most, other));
  return most;
}

__device__ void add_up(float (&sum)[2]) {  // of two rows, each of which four lanes hold
  for (int h = 0; h < 2; ++h)
    for (int other = 1; other < 4; other *= 2) sum[h] += __shfl_xor_sync(ALL, sum[h], other);
}
__device__ float largest_norm(float (&sum)[2]) {  // of a warp's 16 rows
  add_up(sum);
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
  // All 16 rows are packed. Sums of D squares in float32 are a little off, and so is v - mean.
  __device__ Group group(float unit, int64_t D) {
    add_up(norm), add_up(residual);
    const float most = largest_of_warp(larger(norm[0], norm[1])), worst = largest_of_warp(larger(residual[0], residual[1]));
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

// Packed codes lie in records of 64 codes and PART steps of 16 columns, as the screen has them in shared memory: of 8 codes and
// 8 columns, 128 bytes lie together (a core matrix of wgmma), then the other 8 columns, then the next 8 codes, the next step.
// One step more makes the product come out as x.c - |c|^2 / 2 - offset. There, of its first eight columns,
//     a code has  h1, h2, h3, b, 1, 0, 0, 0   where h1 + h2 + h3 = -|c|^2 / 2, and b is BEHIND beyond the last code, else 0
//     a row has   r, r, r, 1, -offset, 0, 0, 0   where r = unit of the codes / unit of the row
// and both have zeros in the others.
__host__ __device__ constexpr int record_size(int part) { return STAGE * 2 * (part + 1); }  // in words of 16 bytes

// A tile per block, a warp per group: rows go to out [groups][steps][lane], codes (these have no `code_tiles` yet) to records.
// Codes beyond the last one repeat it, and stay behind it. The mean [16 steps] is made here, by every block of codes, of 32
// codes: any shift would do, this one makes the numbers small, hence their rounding errors.
constexpr int PACKERS = TILE / GROUP * 32;  // threads of a block
template <int PART>
__global__ void __launch_bounds__(PACKERS) pack_kernel(const float* m, int64_t first, int64_t rows, int D, int steps, float* mean,
                                                       uint4* out, Group* tiles, const Group* code_tiles, int n_tiles) {
  constexpr int SAMPLE = 32, GROUPS = TILE / GROUP;
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
  const int parts = steps / PART;
  float v[PART][8], sum[2] = {};
  for (int part = 0; part < parts; ++part) reader.read(part * PART, v), add_squares(v, sum);
  float norm = largest_norm(sum);
  if (lane == 0) norm_of[warp] = norm;
  __syncthreads();
  for (int i = 0; i < GROUPS; ++i) norm = larger(norm, norm_of[i]);
  const float unit = code_tiles ? fmaxf(unit_for(norm), largest_unit(code_tiles, n_tiles)) : unit_for(norm);
  auto put = [&](int part, int step, uint4 word) {  // 16 codes of a step into their record
    uint4* const record = out + (group * GROUP / STAGE * parts + part) * record_size(PART);
    unsigned* to = reinterpret_cast<unsigned*>(record) + (step * STAGE + group * GROUP % STAGE) * 8;
    to[lane] = word.x, to[lane + 32] = word.y, to[lane + 64] = word.z, to[lane + 96] = word.w;
  };
  Packer packer;
  for (int part = 0; part < parts; ++part) {
    reader.read(part * PART, v);  // from the cache: registers are dearer
#pragma unroll
    for (int s = 0; s < PART; ++s) {
      const uint4 word = packer.pack(v[s], 1 / unit);  // exact
      if (code_tiles)
        out[(group * steps + part * PART + s) * 32 + lane] = word;
      else
        put(part, s, word);
    }
  }
  const Group mine = packer.group(unit, D);
  for (int part = 0; part < parts && !code_tiles; ++part) {  // the step more: zeros but in the first part
    uint2 extra[2] = {};
    for (int h = 0; h < 2 && part == 0; ++h) {
      const float behind = group * GROUP + lane / 4 + 8 * h < rows ? 0 : BEHIND;
      extra[h] = lane % 4 == 0 ? split(-packer.norm[h] / 2, behind) : columns(lane % 4 == 1, 0, 0, 0);
    }
    put(part, PART, make_uint4(extra[0].x, extra[0].y, extra[1].x, extra[1].y));
  }
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
__device__ void pin(float& d) { asm volatile("" : "+f"(d)::"memory"); }  // what is done to it is done before, or after

// The record that is used as the nth, *turn* n, lies in place n % RING. Two barriers of each place count along: a phase of `full`
// ends when a record is there, a phase of `empty` when all warps have left it. Thread 0 asks for the records.
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
__device__ void fetch(uint4* to, const uint4* from, bool exists, Gates& gates, int turn) {
  if (exists && threadIdx.x == 0) {
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
__device__ void pin(float&) {}

struct Gates {};
__device__ void prepare(Gates&) {}
template <int WORDS>
__device__ void fetch(uint4* to, const uint4* from, bool exists, Gates&, int) {
  for (int i = threadIdx.x; i < WORDS && exists; i += THREADS) __pipeline_memcpy_async(&to[i], &from[i], 16);
  __pipeline_commit();
}
__device__ void await(Gates&, int) {
  __pipeline_wait_prior(RING - 2);
  __syncthreads();  // all see this record, and all have left the one before
}
__device__ void leave(Gates&, int) {}
__device__ void prefetch(const float*, int64_t) {}
#endif

// A lane packs by row: columns 0 to 7 and 8 to 15 of row g, then of row g + 8. The instruction wants both rows' first columns first.
__device__ uint4 as_rows(uint4 v) { return make_uint4(v.x, v.z, v.y, v.w); }

// How far a score |c|^2 - 2 x.c may be from its true value, for rows of norms up to X and codes of norms up to C, apart from what
// the offset adds that is subtracted from all scores of a row.
//  - Rounding rows and codes to float16: see above; the score holds that twice.
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

  __device__ float operator()(const Group& rows, const Group& codes) const {
    const float X = rows.norm, C = codes.norm, rounding = rows.residual * C + (X + rows.residual) * codes.residual;
    return relative * (4 * C * (X + C)) + far * (X * X) + tiny * (1 + X + C) + 2 * rounding;
  }
};

struct Screen {
  const float *x, *mean;
  const uint4 *packed_x, *codes;
  const Group *x_tiles, *tiles;
  int64_t first, rows, all_rows, D;
  int steps, n_tiles;
  unsigned unmarked;  // the bits of two float16 beside their marks; a parameter, as a constant would cost an instruction
  Bound bound;
  Candidate* lists;
  Row* found;
};

__device__ __half2 marked(__half2 v, unsigned unmarked, unsigned mark) {
  const unsigned bits = (bits_of(v) & unmarked) | mark * 0x10001u;
  return reinterpret_cast<const __half2&>(bits);
}
// Of a tile a lane has 32 codes in either half of a word, so a mark takes 5 of a float16's 11 bits, and the value is off by less
// than this. The last term is for the smallest numbers of float16, in the value and in the ratio of units that |c|^2 / 2, at
// most 2^13, is multiplied with.
__device__ float blur(float value) { return fabsf(value) * (MARKS * 0x1p-10f) + 0x1p-11f; }

// Scores of 256 rows against the tiles blockIdx.y, blockIdx.y + gridDim.y, ... While tensor cores multiply for some of the 16
// warps, others look through their scores. WHOLE: D <= 16 STEPS; else the dimensions of 64 codes come in parts.
//
// The product gives the *closeness* x.c - |c|^2 / 2 - offset, in units of rows and codes: the larger, the nearer. A score is
// -2 units (closeness + offset). The offset is the best of the row so far, so that codes that matter come out near zero, where
// float16 has the finest steps; of the others it is enough to know that they are far off. Rounded to float16, two codes share a
// word, and five instructions look at both.
template <int STEPS, bool WHOLE>
__global__ void __launch_bounds__(THREADS, 1) screen_kernel(Screen p) {
  constexpr int NT = STAGE / 8, STAGES = TILE / STAGE, RECORD = record_size(STEPS);
  extern __shared__ __align__(128) uint4 ring[];
  __shared__ Gates gates;
  const int lane = threadIdx.x % 32, t = lane % 4, warp = threadIdx.x / 32, parts = WHOLE ? 1 : p.steps / STEPS;
  const int64_t row_0 = int64_t(blockIdx.x) * ROWS + warp * GROUP;
  int next_tile = blockIdx.y, next_record = 0;  // the record of a tile that is fetched next
  auto fetch_next = [&](int turn) {
    fetch<RECORD>(&ring[turn % RING * RECORD], p.codes + (int64_t(next_tile) * STAGES * parts + next_record) * RECORD,
                  next_tile < p.n_tiles, gates, turn);
    if (++next_record == STAGES * parts) next_record = 0, next_tile += gridDim.y;
  };
  prepare(gates);
  __syncthreads();
  for (int turn = 0; turn < RING - 1; ++turn) fetch_next(turn);

  uint4 a[STEPS], extra;  // the rows; their step more
  Group of_rows;
  if constexpr (WHOLE) {
    const float largest = largest_unit(p.tiles, p.n_tiles);
    const Reader reader(p.x, p.first + row_0, p.first + p.rows, p.mean, p.D);
    float v[STEPS][8], sum[2] = {};
    reader.read(0, v), add_squares(v, sum);
    const float unit = fmaxf(unit_for(largest_norm(sum)), largest);
    Packer packer;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) a[s] = as_rows(packer.pack(v[s], 1 / unit));
    of_rows = packer.group(unit, p.D);
    const int64_t later = p.first + (int64_t(blockIdx.x) + WANTED_BLOCKS) * ROWS, left = p.all_rows - later;
    prefetch(p.x + later * p.D, (left < ROWS ? left : ROWS) * p.D);  // another block's
  } else {
    of_rows = p.x_tiles[row_0 / TILE];
  }
  float acc[NT][4], offset[2], limit[2] = {INFINITY, INFINITY};
  __half2 best[2], next[2];  // of this tile: two codes a word, each with its mark
  int found[2] = {};
  bool lost[2] = {};
  Candidate* lists[2];
  for (int h = 0; h < 2; ++h) lists[h] = p.lists + ((row_0 + lane / 4 + 8 * h) * gridDim.y + blockIdx.y) * LIST;

  auto aim = [&](const float (&target)[2], float ratio) {  // sets the offsets; `ratio` of the units of codes and rows
    uint2 half[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      offset[h] = __half22float2(__floats2half2_rn(target[h], 0)).x;  // any number will do, so one of float16
      half[h] = t == 0 ? columns(ratio, ratio, ratio, 1) : columns(t == 1 ? -offset[h] : 0, 0, 0, 0);
    }
    extra = as_rows(make_uint4(half[0].x, half[0].y, half[1].x, half[1].y));
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
        const int position = found[h] + __popc(keepers & ((1u << t) - 1)), odd = b.y > b.x;
        const int code = code_of(tile, bits_of(best[h]) >> 16 * odd & (MARKS - 1), t, odd);
        const float w = fmaxf(fminf(b.x, b.y), fmaxf(n.x, n.y));
        Candidate* to = lists[h] + position % LIST;
        lost[h] |= position >= LIST && !(to->low > limit[h]);  // what it replaces may be ruled out by now
        *to = {low, scale * (w + blur(w) + offset[h]) - E, code, 0};
      }
      found[h] += __popc(keepers);
    }
  };
  int turn = 0;
  for (int tile = blockIdx.y; tile < p.n_tiles; tile += gridDim.y) {
    const Group of_tile = p.tiles[tile];
    const float scale = -2 * of_rows.unit * of_tile.unit;  // a score is this times closeness + offset
    const float ratio = of_tile.unit * of_rows.inverse, inverse = -0.5f * of_rows.inverse * of_tile.inverse;
    float target[2];
    for (int h = 0; h < 2; ++h) {
      target[h] = limit[h] < INFINITY ? fminf(fmaxf(limit[h] * inverse, -MOST), MOST) : 0;
      best[h] = next[h] = __floats2half2_rn(-65504, -65504);
    }
    aim(target, ratio);
#pragma unroll
    for (int stage = 0; stage < STAGES; ++stage) {
      for (int part = 0; part < parts; ++part, ++turn) {
        await(gates, turn);  // this record
        if constexpr (!WHOLE)
#pragma unroll
          for (int s = 0; s < STEPS; ++s)
            a[s] = as_rows(p.packed_x[(row_0 / GROUP * p.steps + part * STEPS + s) * 32 + lane]);
        const Operand operand(&ring[(WHOLE && STAGES % RING == 0 ? stage : turn) % RING * RECORD]);
        for (auto& d : acc) for (float& one : d) pin(one);
        begin_products();
        multiply_add(acc, extra, operand, STEPS * STAGE * 2, part > 0);
#pragma unroll
        for (int s = 0; s < STEPS; ++s) multiply_add(acc, a[s], operand, s * STAGE * 2, true);
        await_products();
        for (auto& d : acc) for (float& one : d) pin(one);
        leave(gates, turn);
        fetch_next(turn + RING - 1);  // into the place of the record before this one
      }
      if (stage == 0 && tile == int(blockIdx.y)) aim_at_best(ratio);
      look(stage);
    }
    note(tile, scale, p.bound(of_rows, of_tile));
  }
  for (int h = 0; h < 2; ++h) {
    for (int other = 1; other < 4; other *= 2) lost[h] |= __shfl_xor_sync(ALL, int(lost[h]), other);
    const int64_t row = row_0 + lane / 4 + 8 * h;
    if (t == 0) p.found[row * gridDim.y + blockIdx.y] = {limit[h], lost[h] ? -1 : found[h] < LIST ? found[h] : LIST};
  }
}

// What the screen has left. A row with one code is done. With a few: a thread evaluates each. If there may be others, too: the
// block evaluates all codes. Without lists (float64) it does so for all rows. `readers` threads read the lists of a row.
constexpr int FINISHERS = 256;  // threads of a block
template <class T>
__global__ void __launch_bounds__(FINISHERS, 2) finish_kernel(const T* x, const T* codes, int64_t first, int64_t rows, int64_t K,
                                                              int64_t D, const Candidate* lists, const Row* of_rows, int splits,
                                                              int readers, int64_t* idx, double* distance) {
  constexpr int PAIRS = 1024;
  __shared__ int row_of_pair[PAIRS], code_of_pair[PAIRS], winner[FINISHERS], many[FINISHERS], n_pairs, n_many;
  __shared__ unsigned long long rank_of_pair[PAIRS], least[FINISHERS];  // of pairs, of rows
  const int slot = threadIdx.x / readers;                          // of the rows of this block
  const int64_t base = int64_t(blockIdx.x) * (FINISHERS / readers), row = base + slot;
  const bool leads = threadIdx.x % readers == 0 && row < rows;
  if (threadIdx.x == 0) n_pairs = n_many = 0;
  least[threadIdx.x] = ~0ull, winner[threadIdx.x] = INT32_MAX;
  __syncthreads();
  bool open = !lists;  // codes that are in no list may be nearest
  if (lists) {
    const int64_t list = (row < rows ? row : rows - 1) * splits + threadIdx.x % readers;
    const Row seen = int(threadIdx.x) % readers < splits ? of_rows[list] : Row{INFINITY, 0};
    float limit = seen.limit;
    for (int other = 1; other < readers; other *= 2) limit = fminf(limit, __shfl_xor_sync(ALL, limit, other));
    open = seen.found < 0;
    auto each = [&](auto take) {  // take(code), for all that this thread cannot rule out; `not >`: NaN rules nothing out
      for (int i = 0; i < seen.found; ++i) {
        const Candidate candidate = lists[list * LIST + i];
        if (candidate.low > limit) continue;
        take(candidate.code);
        if (!(candidate.next > limit))  // others of this tile and lane, too
          for (int i = 0; i < TILE / 4; ++i) take(code_of(candidate.code / TILE, i / 2, candidate.code % 8 / 2, i % 2));
      }
    };
    int found = 0, code = 0;  // what this thread has left: how many, and one of them
    each([&](int k) { ++found, code = k; });
    int all = found;
    for (int other = 1; other < readers; other *= 2)
      all += __shfl_xor_sync(ALL, all, other), open |= __shfl_xor_sync(ALL, int(open), other);
    if (all == 1 && !open && !distance) {
      if (found) winner[slot] = code;
    } else if (!open && row < rows) {
      int i = atomicAdd(&n_pairs, found);
      open = i + found > PAIRS;  // no room for some
      each([&](int k) { if (i < PAIRS) row_of_pair[i] = slot, code_of_pair[i++] = k; });
    }
    for (int other = 1; other < readers; other *= 2) open |= __shfl_xor_sync(ALL, int(open), other);
  }
  if (leads && open) many[atomicAdd(&n_many, 1)] = slot;
  __syncthreads();
  const int pairs = n_pairs < PAIRS ? n_pairs : PAIRS;
  auto settle = [&](int r, unsigned long long value, int k) {  // ties go to the lowest code, NaN to none
    if (value == least[r]) atomicMin(&winner[r], value ? k : -1);
  };
  for (int i = threadIdx.x; i < pairs; i += FINISHERS)
    if (code_of_pair[i] < K) {
      rank_of_pair[i] = rank(distance64(x + (first + base + row_of_pair[i]) * D, codes + code_of_pair[i] * D, D));
      atomicMin(&least[row_of_pair[i]], rank_of_pair[i]);
    }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs; i += FINISHERS)
    if (code_of_pair[i] < K) settle(row_of_pair[i], rank_of_pair[i], code_of_pair[i]);
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
  if (leads) {
    const int k = winner[slot];
    idx[first + row] = k < 0 ? K : k;
    if (distance) distance[first + row] = k < 0 ? NAN : __longlong_as_double(least[slot] - 1);
  }
}

// n [K] and s [K, D]: a block per 8 codes and 128 dimensions goes through all indices, and adds up the rows of its codes in
// ascending order: no atomics on floats, no sort, the same bits every time.
constexpr int CODES = 8, COLUMNS = 128, COUNTERS = 256;  // codes, dimensions and threads of a block
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

unsigned blocks(int64_t n, int64_t per_block) { return unsigned((n + per_block - 1) / per_block); }

// The scratch memory of a search, in pieces that start on multiples of 256 bytes.
struct Scratch {
  int64_t bytes = 0, chunk;  // rows that are searched together
  int part, steps, n_tiles, splits;
  bool whole;
  float* mean;
  uint4 *codes, *x;
  Group *tiles, *x_tiles;
  Candidate* lists;
  Row* found;

  Scratch(int64_t N, int64_t K, int64_t D, void* memory = nullptr) {
    auto take = [&](auto*& piece, int64_t n) {
      piece = reinterpret_cast<std::remove_reference_t<decltype(piece)>>(uintptr_t(memory) + bytes);
      bytes += round_up(n * sizeof(*piece), 256);
    };
    part = D > 64 ? 8 : 4, steps = int(round_up((D + 15) / 16, part)), whole = steps == part, n_tiles = blocks(K, TILE);
    splits = int(std::clamp<int64_t>(WANTED_BLOCKS / std::max(blocks(N, ROWS), 1u), 1, std::min(MOST_SPLITS, n_tiles)));
    chunk = std::min(CHUNK, round_up(N, TILE));
    take(mean, 16 * steps), take(codes, int64_t(n_tiles) * (TILE / STAGE) * (steps / part) * record_size(part));
    take(tiles, n_tiles), take(x_tiles, chunk / TILE), take(x, whole ? 0 : chunk / GROUP * steps * 32);
    take(lists, chunk * splits * LIST), take(found, chunk * splits);
  }
};

// Without a screen.
template <class T>
int compare_all(const T* x, const T* codes, int64_t N, int64_t K, int64_t D, int64_t* idx, double* distance, void* on) {
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
  if (N == 0 || D >= MOST_SCREENED) return compare_all(x, codes, N, K, D, idx, distance, on);
  const Scratch s(N, K, D, scratch);
  const auto stream = static_cast<cudaStream_t>(on);
  const auto pack = s.part == 4 ? pack_kernel<4> : pack_kernel<8>;
  const auto screen = s.part == 4 ? screen_kernel<4, true> : s.whole ? screen_kernel<8, true> : screen_kernel<8, false>;
  const int bytes = RING * 16 * record_size(s.part);
  cudaFuncSetAttribute(screen, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  int readers = 1;
  while (readers < s.splits) readers *= 2;
  pack<<<s.n_tiles, PACKERS, 0, stream>>>(codes, 0, K, int(D), s.steps, s.mean, s.codes, s.tiles, nullptr, 0);
  for (int64_t first = 0; first < N; first += s.chunk) {
    const int64_t rows = std::min(s.chunk, N - first);
    const Screen work{x, s.mean, s.x, s.codes, s.x_tiles, s.tiles, first, rows, N, D, s.steps, s.n_tiles,
                      ~(unsigned(MARKS - 1) * 0x10001u), Bound(D), s.lists, s.found};
    if (!s.whole)
      pack<<<blocks(rows, TILE), PACKERS, 0, stream>>>(x, first, rows, int(D), s.steps, s.mean, s.x, s.x_tiles, s.tiles, s.n_tiles);
    screen<<<dim3(blocks(rows, ROWS), s.splits), THREADS, bytes, stream>>>(work);
    finish_kernel<float><<<blocks(rows, FINISHERS / readers), FINISHERS, 0, stream>>>(
        x, codes, first, rows, K, D, s.lists, s.found, s.splits, readers, idx, distance);
  }
  return cudaGetLastError();
}

int nearest_code_cuda(const double* x, const double* codes, int64_t N, int64_t K, int64_t D, void*, int64_t* idx,
                      double* distance, void* on) {
  return compare_all(x, codes, N, K, D, idx, distance, on);  // float16 cannot screen float64
}

int code_statistics_cuda(const float* x, const int64_t* idx, int64_t N, int64_t K, int64_t D, float* n, float* s, void* on) {
  const unsigned grid = blocks(K, CODES) * blocks(D, COLUMNS);
  const auto stream = static_cast<cudaStream_t>(on);
  statistics_kernel<<<grid, COUNTERS, 0, stream>>>(x, idx, N, K, D, n, s);
  return cudaGetLastError();
}

}  // namespace hipart
