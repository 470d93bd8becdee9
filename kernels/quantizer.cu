// Nearest code and code statistics on the GPU. The contract is that of quantizer.cpp, and so is the idea: a cheap screen with
// a known error, then float64 for what the screen leaves open. No torch header: `nvcc -arch=sm_90 -c quantizer.cu` checks this
// file alone. It needs tensor cores of compute capability 8.0 or newer, and uses those of 9.0 (built for sm_90a) as they want.
//
// The screen multiplies in float16, on tensor cores, and adds up in float32. How far a rounded row x' is from x is measured
// when it is packed, and so is |c - c'|; as x.c - x'.c' = (x - x').c + x'.(c - c'), the product is off by at most
// |x - x'| |c| + |x'| |c - c'|. On normal data that leaves one code in 94 rows of 100, two or three in the others.
//
// Where the bytes go. The codes are packed once, in the order in which tensor cores read them, and pass through shared memory
// in tiles of 128. A warp keeps its 32 rows in registers (D <= 128; else rows, too, are packed, and come back for every 64
// codes). Scores never leave the registers: of each of its rows, a lane keeps the most promising codes, and a lower bound of
// all others: 192 bytes a row and share of the codes (few rows: up to 16 shares), whatever K is.

#include "quantizer.h"

#include <cfloat>
#include <cmath>

#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

namespace hipart {
namespace {

constexpr int THREADS = 128, WARPS = THREADS / 32;
constexpr int GROUP = 16, MT = 2;                 // rows of an operand; operands that a warp of the screen holds
constexpr int ROWS = MT * GROUP * WARPS;          // rows of a block of the screen
constexpr int TILE = 128, HALF = 32;              // codes of a tile; codes that are multiplied together
constexpr int PACKERS = TILE / GROUP * 32;        // threads of pack_kernel
constexpr int ENTRIES = 3;                        // codes that a lane remembers of a row
constexpr int WANTED_BLOCKS = 264, MOST_SPLITS = 16;  // of the screen: two for each multiprocessor of an H100
constexpr int FINISHERS = 256;                    // threads of finish_kernel
constexpr int CODES = 8, COLUMNS = 128, COUNTERS = 256;  // codes, dimensions and threads of a block of statistics_kernel
constexpr int64_t CHUNK = 1 << 17;                // rows that are searched together: what is noted of them stays in cache
constexpr float NEVER_WINS = FLT_MAX / 2;         // as a score; no product can take it to infinity where the bound is finite
constexpr int64_t MOST_SCREENED = 1 << 20;        // dimensions; about here float32 sums stop to say anything
constexpr unsigned ALL = 0xffffffffu;

// Of packed rows: their largest norm, their largest |v - v'|, both in true units, and their common power of two.
struct alignas(16) Group { float norm, residual, unit, unused; };

// What a lane has seen of a row. Of every tile it looks at 32 codes. Here are the best codes of its best tiles, with bounds
// below their scores (low), and below those of its other codes of the same tile (next); a bound below the scores of all
// other tiles (rest); and a bound above the smallest score (limit).
struct alignas(16) Slot { float low[ENTRIES], next[ENTRIES]; int code[ENTRIES]; float rest, limit; };

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

// The smallest distance so far, the lowest code on ties. A NaN counts as minus infinity with no code: nothing beats it.
struct Nearest {
  double distance = INFINITY;
  int64_t code = INT64_MAX;

  __device__ void take(double d, int64_t k) {
    if (d != d) d = -INFINITY, k = INT64_MAX;
    if (d < distance || (d == distance && k < code)) distance = d, code = k;
  }
  __device__ void take_from_warp() {
    for (int other = 16; other > 0; other /= 2) {
      const double d = __shfl_xor_sync(ALL, distance, other);
      const int64_t k = __shfl_xor_sync(ALL, code, other);
      take(d, k);
    }
  }
};

// Rows g and g + 8 of 16, as lane 4 g + t of a packing warp sees them: of every 16 columns, four of each row, minus `mean`.
// Which column goes to which place of an operand does not matter, as long as it is the same for both operands.
struct Reader {
  const float *row[2], *mean;
  int64_t D;

  __device__ Reader(const float* x, int64_t first, int64_t rows, const float* mean, int64_t D) : mean(mean), D(D) {
    const int g = threadIdx.x % 32 / 4;  // rows beyond the end repeat the last one
    for (int h = 0; h < 2; ++h) row[h] = x + (first + g + 8 * h < rows ? first + g + 8 * h : rows - 1) * D;
  }
  __device__ void read(int64_t step, float (&v)[8]) const {
    const int64_t d = 16 * step + 4 * (threadIdx.x % 4);
    const auto shift = *reinterpret_cast<const Vector<float>*>(mean + d);  // 0 beyond D
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto some = d < D ? *reinterpret_cast<const Vector<float>*>(row[h] + d) : Vector<float>{};
#pragma unroll
      for (int i = 0; i < 4; ++i) v[4 * h + i] = some.v[i] - shift.v[i];
    }
  }
};

__device__ float largest_of(const float (&v)[8], float most) {
#pragma unroll
  for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(v[i]));
  return most;
}

__device__ float largest_of_warp(float most) {
  for (int other = 16; other > 0; other /= 2) most = fmaxf(most, __shfl_xor_sync(ALL, most, other));
  return most;
}

// A power of two that takes the largest to between 2^14 and 2^15: float16 ends at 2^16, and this leaves small ones their bits.
__device__ float unit_for(float most) {
  int exponent;
  frexpf(most, &exponent);
  return ldexpf(1.f, (exponent > -40 ? exponent : -40) - 15);
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
    return {X, sqrtf(worst) * more + X * 0x1p-22f, unit, 0};
  }
};

// Where 16 packed codes of one step begin, in words of 4 bytes. Of 8 codes and 8 columns, 128 bytes lie together (a core
// matrix of wgmma), then the other 8 columns, then the next 8 codes, the next step of this part, the next half of this stage,
// the next part, the next stage.
__device__ int64_t place_of_code(int64_t code, int64_t step, int64_t steps, int64_t part) {
  const int64_t stage = code / (2 * HALF), half = code / HALF % 2;
  return (((stage * (steps / part) + step / part) * 2 + half) * part + step % part) * (HALF * 8) + code % HALF * 8;
}

// A tile of rows per block, a warp per group: out [groups][steps][lane], or as place_of_code has it. For codes, `square` is
// wanted, |c - mean|^2, and never wins beyond the last one; the mean [16 steps] is then made here, by every block, of 32
// codes: any shift would do, this one makes the numbers small, hence their rounding errors.
__global__ void __launch_bounds__(PACKERS) pack_kernel(const float* m, int64_t first, int64_t rows, int64_t D, int64_t steps,
                                                       int64_t part, float* mean, uint4* out, Group* tiles, float* square) {
  constexpr int SAMPLE = 32, GROUPS = TILE / GROUP;
  __shared__ float most_of[GROUPS];
  __shared__ Group group_of[GROUPS];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (square) {
    for (int64_t d = threadIdx.x; d < 16 * steps; d += PACKERS) {
      float sum = 0;
      if (d < D) {
#pragma unroll 32
        for (int i = 0; i < SAMPLE; ++i) sum += m[rows * i / SAMPLE * D + d] / SAMPLE;
      }
      mean[d] = sum;
    }
    __syncthreads();
  }
  const int64_t group = int64_t(blockIdx.x) * GROUPS + warp;
  const Reader reader(m, first + group * GROUP, first + rows, mean, D);
  float v[8], most = 0;
#pragma unroll 4
  for (int64_t step = 0; step < steps; ++step) reader.read(step, v), most = largest_of(v, most);
  most = largest_of_warp(most);
  if (lane == 0) most_of[warp] = most;
  __syncthreads();
  for (int i = 0; i < GROUPS; ++i) most = fmaxf(most, most_of[i]);
  const float unit = unit_for(most), scale = 1 / unit;  // exact
  Packer packer;
#pragma unroll 4
  for (int64_t step = 0; step < steps; ++step) {
    reader.read(step, v);
    const uint4 word = packer.pack(v, scale);
    if (square) {  // codes: as the screen wants them in shared memory
      auto* to = reinterpret_cast<unsigned*>(out) + place_of_code(group * GROUP, step, steps, part);
      to[lane] = word.x, to[lane + 32] = word.y, to[lane + 64] = word.z, to[lane + 96] = word.w;
    } else {
      out[(group * steps + step) * 32 + lane] = word;
    }
  }
  packer.finish_rows();
  if (square && lane % 4 == 0)
    for (int h = 0; h < 2; ++h) {
      const int64_t row = group * GROUP + lane / 4 + 8 * h;
      square[row] = row < rows ? packer.norm[h] * unit * unit : NEVER_WINS;
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

// d = a b, or d += a b: 16 x HALF scores of a warp. Lane 4 g + t holds those of rows g (d[n][0], d[n][1]) and g + 8, codes
// 8 n + 2 t and 8 n + 2 t + 1. Tensor cores of compute capability 9.0 read the codes from shared memory by themselves, and work
// on while the four warps that asked do something else, until these wait for them.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
struct Operand {  // the address, and how far it is to the next core matrix: 128 bytes along the columns, 256 along the codes
  uint64_t at;
  __device__ explicit Operand(const uint4* codes)
      : at((__cvta_generic_to_shared(codes) & 0x3ffff) >> 4 | uint64_t(128 >> 4) << 16 | uint64_t(256 >> 4) << 32) {}
};

__device__ void multiply_add(float (&d)[HALF / 8][4], uint4 a, Operand codes, int offset, bool add) {
  static_assert(HALF == 32);
  asm volatile("{.reg .pred p; setp.ne.b32 p, %21, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
      "{%16, %17, %18, %19}, %20, p, 1, 1, 0;}"
      : "+f"(d[0][0]), "+f"(d[0][1]), "+f"(d[0][2]), "+f"(d[0][3]), "+f"(d[1][0]), "+f"(d[1][1]), "+f"(d[1][2]),
        "+f"(d[1][3]), "+f"(d[2][0]), "+f"(d[2][1]), "+f"(d[2][2]), "+f"(d[2][3]), "+f"(d[3][0]), "+f"(d[3][1]),
        "+f"(d[3][2]), "+f"(d[3][3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(codes.at + offset), "r"(int(add)));
}
__device__ void publish() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }  // what cp.async has written
__device__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ void await_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }
__device__ void arrived(float& d) { asm volatile("" : "+f"(d)::"memory"); }  // nobody may read it before
#else
using Operand = const uint4*;

__device__ void mma(float (&d)[4], uint4 a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

__device__ void multiply_add(float (&d)[HALF / 8][4], uint4 a, Operand codes, int offset, bool add) {
  const unsigned* b = reinterpret_cast<const unsigned*>(codes + offset) + threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < HALF / 8; ++n) {
    if (!add) d[n][0] = d[n][1] = d[n][2] = d[n][3] = 0;
    mma(d[n], a, b[64 * n], b[64 * n + 32]);
  }
}
__device__ void publish() {}
__device__ void begin_products() {}
__device__ void commit_products() {}
__device__ void await_products() {}
__device__ void arrived(float&) {}
#endif

// Packed as one operand, wanted as the other: the middle words change places.
__device__ uint4 as_rows(uint4 v) { return make_uint4(v.x, v.z, v.y, v.w); }

// How far a float32 score |c|^2 - 2 x.c may be from its true value, for a row of norm X and codes of norm at most C, apart from
// what rounding to float16 adds.
//  - Tensor cores truncate every term: a product of length D, summed in any order, is off by at most 1.25 D u X C, u = 2^-23. The
//    score holds it twice, and the marks in the scores, and the rounding of the inputs, of |c|^2, of the score and of this
//    bound add some u of it. All that is taken 1.6 times.
//  - The contract's own float64 sum rounds as well, which decides where a row is far from all codes.
//  - Products and inputs below 2^-126 may be flushed to zero.
// `4 * C * (X + C)` overflows before any score can: then the bound is infinite or NaN, and no code is ruled out. Data of
// 1e19 and more, or of 1e-17 and less, are therefore compared in full: right, and slow.
struct Bound {
  float relative, far, tiny;

  explicit Bound(int64_t D) : relative((D + TILE / 4 + 16) * 0x1p-23f), far((D + 4) * 0x1p-50f), tiny(D * 0x1p-120f) {}

  __device__ float operator()(float X, float C) const {
    return relative * (4 * C * (X + C)) + far * (X * X) + tiny * (1 + X + C);
  }
};

struct Screen {
  const float *x, *mean, *square;
  const uint4 *packed_x, *codes;
  const Group *x_tiles, *tiles;
  int64_t first, rows, D;
  int steps, n_tiles, unmarked;  // the last is a mask; one more constant in the code would be one more instruction
  Bound bound;
  Slot* slots;
};

// Scores of 128 rows against the tiles blockIdx.y, blockIdx.y + gridDim.y, ... Codes are multiplied 32 at a time (a half), into
// two sets of registers: while tensor cores fill one, the arithmetic units look through the other. Two halves (a stage) are
// in shared memory, and the next two on their way. WHOLE: D <= 16 STEPS; else the dimensions of a stage come in parts.
template <int STEPS, bool WHOLE>
__global__ void __launch_bounds__(THREADS, 2) screen_kernel(Screen p) {
  struct alignas(16) Side { float square[TILE]; Group tile; };
  constexpr int NT = HALF / 8, HALVES = TILE / HALF;  // times 8 codes of a half; halves of a tile
  constexpr int STAGE = 2 * HALF * STEPS * 2;         // words of 16 bytes
  __shared__ uint4 codes[2][STAGE];
  __shared__ Side sides[3];  // of the tile before, this one, the next
  const int lane = threadIdx.x % 32, t = lane % 4, warp = threadIdx.x / 32, parts = WHOLE ? 1 : p.steps / STEPS;
  const int64_t row_0 = (int64_t(blockIdx.x) * WARPS + warp) * MT * GROUP;
  auto fetch = [&](int stage, int side, int tile, int pair, int part) {
    if (tile < p.n_tiles) {
      const uint4* from = p.codes + ((int64_t(tile) * HALVES / 2 + pair) * parts + part) * STAGE;
#pragma unroll
      for (int i = threadIdx.x; i < STAGE; i += THREADS) __pipeline_memcpy_async(&codes[stage][i], &from[i], 16);
      if (pair + part == 0 && threadIdx.x < TILE / 4)
        __pipeline_memcpy_async(&sides[side].square[4 * threadIdx.x], &p.square[int64_t(tile) * TILE + 4 * threadIdx.x], 16);
      if (pair + part == 0 && threadIdx.x == TILE / 4) __pipeline_memcpy_async(&sides[side].tile, &p.tiles[tile], 16);
    }
    __pipeline_commit();
  };
  fetch(0, 0, blockIdx.y, 0, 0);
  for (int i = threadIdx.x; i < TILE; i += THREADS) sides[2].square[i] = NEVER_WINS;  // there is no tile before the first
  if (threadIdx.x == 0) sides[2].tile = {};

  uint4 a[MT][STEPS];
  Group mine[MT];
  float acc[2][MT][NT][4] = {}, best[MT][2], next[MT][2];
  Slot seen[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    if constexpr (WHOLE) {
      const Reader reader(p.x, p.first + row_0 + m * GROUP, p.first + p.rows, p.mean, p.D);
      float v[STEPS][8], most = 0;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) reader.read(s, v[s]);
#pragma unroll
      for (int s = 0; s < STEPS; ++s) most = largest_of(v[s], most);
      const float unit = unit_for(largest_of_warp(most)), scale = 1 / unit;
      Packer packer;
#pragma unroll
      for (int s = 0; s < STEPS; ++s) a[m][s] = as_rows(packer.pack(v[s], scale));
      packer.finish_rows();
      mine[m] = packer.group(unit, p.D);
    } else {
      mine[m] = p.x_tiles[(row_0 + m * GROUP) / TILE];
    }
    for (int h = 0; h < 2; ++h) {
      best[m][h] = next[m][h] = INFINITY;
      seen[m][h].rest = seen[m][h].limit = INFINITY;
      for (int e = 0; e < ENTRIES; ++e) seen[m][h].low[e] = seen[m][h].next[e] = INFINITY, seen[m][h].code[e] = 0;
    }
  }

  // The scores of a half: the smallest of the tile so far, and the next. Their last 5 bits say whose they are.
  auto look = [&](int half, const Side& side) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const float scale = -2 * mine[m].unit * side.tile.unit;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
        const float2 square = *reinterpret_cast<const float2*>(&side.square[(half * NT + n) * 8 + 2 * t]);
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float score = fmaf(scale, acc[half % 2][m][n][2 * h + j], j ? square.y : square.x);
            const float marked = __int_as_float((__float_as_int(score) & p.unmarked) | ((half * NT + n) * 2 + j));
            const float both = best[m][h] + marked;  // minus the smaller is the larger, on units that are not as busy
            best[m][h] = fminf(best[m][h], marked);
            next[m][h] = fminf(next[m][h], both - best[m][h]);
          }
      }
    }
  };
  auto note = [&](int m, const Side& side, int tile) {  // a tile has been looked through
    const float X = mine[m].norm, gone = mine[m].residual, C = side.tile.norm, lost = side.tile.residual;
    const float E = p.bound(X, C) + 2 * (gone * C + (X + gone) * lost);
    const bool usable = E < INFINITY;  // else it rules nothing out
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Slot& s = seen[m][h];
      const int mark = __float_as_int(best[m][h]) & (TILE / 4 - 1), code = tile * TILE + mark / 2 * 8 + 2 * t + mark % 2;
      const float low = usable ? best[m][h] - E : -INFINITY, next_low = usable ? next[m][h] - E : -INFINITY;
      s.limit = fminf(s.limit, usable ? best[m][h] + E : INFINITY);
      s.rest = fminf(s.rest, fmaxf(low, s.low[ENTRIES - 1]));
      bool before[ENTRIES];
#pragma unroll
      for (int e = 0; e < ENTRIES; ++e) before[e] = low < s.low[e];
#pragma unroll
      for (int e = ENTRIES - 1; e > 0; --e) {
        s.code[e] = before[e - 1] ? s.code[e - 1] : before[e] ? code : s.code[e];
        s.next[e] = before[e - 1] ? s.next[e - 1] : before[e] ? next_low : s.next[e];
        s.low[e] = fmaxf(s.low[e - 1], fminf(low, s.low[e]));
      }
      s.next[0] = before[0] ? next_low : s.next[0];
      s.code[0] = before[0] ? code : s.code[0];
      s.low[0] = fminf(low, s.low[0]);
      best[m][h] = next[m][h] = INFINITY;
    }
  };
  auto look_through = [&](int half, const Side& side, int tile) {
    look(half, side);
    if (half == TILE / HALF - 1)
#pragma unroll
      for (int m = 0; m < MT; ++m) note(m, side, tile);
  };
  auto multiply = [&](int stage, int half, bool fresh) {
    const Operand operand(codes[stage]);
    begin_products();
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int m = 0; m < MT; ++m)
        multiply_add(acc[half % 2][m], a[m][s], operand, (half % 2 * STEPS + s) * HALF * 2, !(fresh && s == 0));
    commit_products();
  };
  auto finish = [&](int half) {
    await_products();
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int n = 0; n < NT; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) arrived(acc[half % 2][m][n][i]);
  };
  int stage = 0, side = 0, before = INT32_MAX / TILE;
  for (int tile = blockIdx.y; tile < p.n_tiles; tile += gridDim.y) {
#pragma unroll
    for (int half = 0; half < HALVES; half += 2)
      for (int part = 0; part < parts; ++part, stage ^= 1) {
        const bool starts = part == 0, ends = part == parts - 1, done = ends && half == HALVES - 2;
        __pipeline_wait_prior(0);
        publish();
        __syncthreads();  // this stage is filled, and all have left the other one
        fetch(stage ^ 1, done ? (side + 1) % 3 : side, done ? tile + int(gridDim.y) : tile, done ? 0 : half / 2 + ends,
              ends ? 0 : part + 1);
        if constexpr (!WHOLE)
#pragma unroll
          for (int m = 0; m < MT; ++m)
#pragma unroll
            for (int s = 0; s < STEPS; ++s)
              a[m][s] = as_rows(p.packed_x[((row_0 / GROUP + m) * p.steps + part * STEPS + s) * 32 + lane]);
        multiply(stage, half, starts);
        if (WHOLE || starts)
          look_through((half + HALVES - 1) % HALVES, half ? sides[side] : sides[(side + 2) % 3], before);
        finish(half);
        multiply(stage, half + 1, starts);
        if (WHOLE || ends) look_through(half, sides[side], tile);
        finish(half + 1);
      }
    before = tile, side = (side + 1) % 3;
  }
  look_through(HALVES - 1, sides[(side + 2) % 3], before);
#pragma unroll
  for (int m = 0; m < MT; ++m)
    for (int h = 0; h < 2; ++h) {
      const int64_t row = row_0 + m * GROUP + lane / 4 + 8 * h;
      if (row < p.rows) p.slots[(row * gridDim.y + blockIdx.y) * 4 + t] = seen[m][h];
    }
}

// What the screen has left. A row with one code is done. With a few: a thread evaluates each. If there may be others, too: the
// block evaluates all codes. Without slots (float64) it does so for all rows. `readers` threads read the slots of a row.
template <class T>
__global__ void __launch_bounds__(FINISHERS, 2) finish_kernel(const T* x, const T* codes, int64_t first, int64_t rows, int64_t K,
                                                              int64_t D, const Slot* slots, int n_slots, int readers,
                                                              int64_t* idx, double* distance) {
  constexpr int PAIRS = 1024;
  __shared__ int row_of[PAIRS], code_of[PAIRS], many[FINISHERS], n_pairs, n_many;
  __shared__ double distance_of[PAIRS];
  __shared__ Nearest nearest_of[FINISHERS / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, mine = threadIdx.x / readers;  // of the rows of this block
  const int64_t base = int64_t(blockIdx.x) * (FINISHERS / readers), row = base + mine;
  const bool leads = threadIdx.x % readers == 0 && row < rows;
  if (threadIdx.x == 0) n_pairs = n_many = 0;
  __syncthreads();
  int found = 0, code = 0, at = 0;  // codes that are left, one of them
  bool open = !slots;               // there are others
  if (slots) {
    const Slot* from = slots + (row < rows ? row : rows - 1) * n_slots;
    float limit = INFINITY;
#pragma unroll 4
    for (int s = threadIdx.x % readers; s < n_slots; s += readers) limit = fminf(limit, from[s].limit);
    for (int other = 1; other < readers; other *= 2) limit = fminf(limit, __shfl_xor_sync(ALL, limit, other));
    auto each = [&](auto take) {  // take(code), for all that this thread cannot rule out; `not >`: NaN rules nothing out
#pragma unroll 4
      for (int s = threadIdx.x % readers; s < n_slots; s += readers) {
        const Slot seen = from[s];
        open |= !(seen.rest > limit);
        for (int e = 0; e < ENTRIES; ++e)
          if (!(seen.low[e] > limit)) {
            take(seen.code[e]);
            if (!(seen.next[e] > limit))  // others of this tile and lane
              for (int i = 0; i < TILE / 4; ++i) take(seen.code[e] / TILE * TILE + i / 2 * 8 + s % 4 * 2 + i % 2);
          }
      }
    };
    each([&](int k) { ++found, code = k; });
    int all = found;
    for (int other = 1; other < readers; other *= 2) {
      const int their_code = __shfl_xor_sync(ALL, code, other), theirs = __shfl_xor_sync(ALL, all, other);
      code = all ? code : their_code, all += theirs;
      open |= __shfl_xor_sync(ALL, int(open), other);
    }
    if (all == 1 && !open) {
      if (leads) idx[first + row] = code;
    } else if (!open && row < rows) {
      at = atomicAdd(&n_pairs, found);
      int end = at + found;
      if (end <= PAIRS) each([&](int k) { row_of[at] = mine, code_of[at++] = k; });
      for (open = end > PAIRS; at < PAIRS && open; ++at) code_of[at] = INT32_MAX;  // the list is full: nobody's
    }
    for (int other = 1; other < readers; other *= 2) open |= __shfl_xor_sync(ALL, int(open), other);
    found = all;
  }
  if (leads && open) many[atomicAdd(&n_many, 1)] = mine;
  __syncthreads();
  const int pairs = n_pairs < PAIRS ? n_pairs : PAIRS;
  for (int i = threadIdx.x; i < pairs; i += FINISHERS)
    distance_of[i] = code_of[i] < K ? distance64(x + (first + base + row_of[i]) * D, codes + code_of[i] * D, D) : INFINITY;
  __syncthreads();
  if (leads && !open && found > 1) {
    Nearest nearest;
    for (int i = 0; i < pairs; ++i)
      if (row_of[i] == mine && code_of[i] < K) nearest.take(distance_of[i], code_of[i]);
    idx[first + row] = nearest.code < K ? nearest.code : K;
  }
  for (int i = 0; i < n_many; ++i) {
    const int64_t my_row = first + base + many[i];
    Nearest nearest;
    for (int64_t k = threadIdx.x; k < K; k += FINISHERS) nearest.take(distance64(x + my_row * D, codes + k * D, D), k);
    nearest.take_from_warp();
    if (lane == 0) nearest_of[warp] = nearest;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < FINISHERS / 32; ++w) nearest.take(nearest_of[w].distance, nearest_of[w].code);
      idx[my_row] = nearest.code < K ? nearest.code : K;
    }
    __syncthreads();  // before the next row uses the same memory
  }
  if (!distance) return;
  __syncthreads();
  if (leads) {
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
  int64_t chunk, part, steps, codes, splits, bytes = 0;
  int64_t mean, c, tiles, square, x, x_tiles, slots;
  bool whole;

  Scratch(int64_t N, int64_t K, int64_t D) {
    auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    auto take = [this](int64_t n) { const int64_t at = bytes; bytes += round_up(n, 256); return at; };
    const int64_t blocks = (N + ROWS - 1) / ROWS;
    part = D > 64 ? 8 : 4, steps = round_up((D + 15) / 16, part), whole = steps == part, codes = round_up(K, TILE);
    splits = least(least(WANTED_BLOCKS / (blocks ? blocks : 1), MOST_SPLITS), codes / TILE), splits = splits ? splits : 1;
    chunk = least(CHUNK, blocks * ROWS);
    mean = take(4 * 16 * steps), c = take(32 * steps * codes), square = take(4 * codes);
    tiles = take(sizeof(Group) * codes / TILE), x_tiles = take(sizeof(Group) * chunk / TILE);
    x = take(whole ? 0 : 32 * steps * chunk), slots = take(4 * splits * sizeof(Slot) * chunk);
  }
};

unsigned blocks(int64_t n, int64_t per_block) { return unsigned((n + per_block - 1) / per_block); }

// Without a screen.
template <class T>
int search_all(const T* x, const T* codes, int64_t N, int64_t K, int64_t D, int64_t* idx, double* distance, void* on) {
  const auto stream = static_cast<cudaStream_t>(on);
  for (int64_t first = 0; first < N; first += CHUNK) {
    const int64_t rows = N - first < CHUNK ? N - first : CHUNK;
    finish_kernel<T><<<blocks(rows, FINISHERS / 32), FINISHERS, 0, stream>>>(x, codes, first, rows, K, D, nullptr, 0, 32, idx,
                                                                             distance);
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
  auto *mean = reinterpret_cast<float*>(memory + at.mean), *square = reinterpret_cast<float*>(memory + at.square);
  auto *c = reinterpret_cast<uint4*>(memory + at.c), *packed_x = reinterpret_cast<uint4*>(memory + at.x);
  auto *tiles = reinterpret_cast<Group*>(memory + at.tiles), *x_tiles = reinterpret_cast<Group*>(memory + at.x_tiles);
  auto* slots = reinterpret_cast<Slot*>(memory + at.slots);
  const int n_tiles = int(at.codes / TILE), n_slots = int(4 * at.splits);
  const Bound bound(D);
  const auto stream = static_cast<cudaStream_t>(on);
  int readers = 1;
  while (4 * readers < n_slots) readers *= 2;
  pack_kernel<<<n_tiles, PACKERS, 0, stream>>>(codes, 0, K, D, at.steps, at.part, mean, c, tiles, square);
  for (int64_t first = 0; first < N; first += at.chunk) {
    const int64_t rows = N - first < at.chunk ? N - first : at.chunk;
    const dim3 grid(blocks(rows, ROWS), unsigned(at.splits));
    const Screen screen{x, mean, square, packed_x, c, x_tiles, tiles, first, rows, D, int(at.steps), n_tiles, ~(TILE / 4 - 1),
                        bound, slots};
    if (at.whole && at.part == 4) {
      screen_kernel<4, true><<<grid, THREADS, 0, stream>>>(screen);
    } else if (at.whole) {
      screen_kernel<8, true><<<grid, THREADS, 0, stream>>>(screen);
    } else {
      pack_kernel<<<blocks(rows, TILE), PACKERS, 0, stream>>>(x, first, rows, D, at.steps, at.part, mean, packed_x, x_tiles,
                                                              nullptr);
      screen_kernel<8, false><<<grid, THREADS, 0, stream>>>(screen);
    }
    finish_kernel<float><<<blocks(rows, FINISHERS / readers), FINISHERS, 0, stream>>>(
        x, codes, first, rows, K, D, slots, n_slots, readers, idx, distance);
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
