// Nearest code and code statistics on the GPU. The contract is that of quantizer.cpp, and so is the idea: a cheap screen with
// a known error, then float64 for what the screen leaves open. No torch header: `nvcc -arch=sm_90 -c quantizer.cu` checks this
// file alone. It needs tensor cores of compute capability 8.0 or newer.
//
// The screen multiplies in float16, on tensor cores, and adds up in float32. How far a rounded row x' is from x is measured
// when it is packed, and so is |c - c'|; as x.c - x'.c' = (x - x').c + x'.(c - c'), the product is off by at most
// |x - x'| |c| + |x'| |c - c'|. On normal data that leaves one code a row, rarely two or three.
//
// Where the bytes go. A tensor core takes 16 x 16 numbers of one operand from the registers of a warp, in an odd order:
// lane 4 g + t holds, of rows g and g + 8, the columns 2 t, 2 t + 1, 2 t + 8 and 2 t + 9. pack_kernel writes both operands in
// just that order, so every load from then on is 16 bytes a lane, side by side. A warp keeps 32 rows (all of them in registers if
// D <= 128) and sees tiles of 64 codes pass through shared memory. Of the scores each lane keeps two candidates of each of its
// rows and a lower bound of all others: for each of its rows a block writes 128 bytes, whatever K is.

#include "quantizer.h"

#include <cfloat>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

namespace hipart {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / 32;
constexpr int GROUP = 16;                         // rows that are packed, and scaled, together
constexpr int MT = 2, ROWS = MT * GROUP * WARPS;  // groups of rows that a warp holds; rows of a block
constexpr int NG = 4, TILE = NG * GROUP;          // groups of codes in a tile; codes of a tile
constexpr int WANTED_BLOCKS = 132, MOST_SPLITS = 16;  // of the screen: one for each multiprocessor of an H100
constexpr int SEARCH_THREADS = 1024, SEARCH_BLOCKS = 264;
constexpr int64_t SCRATCH = 64 << 20;             // bytes that a chunk of rows may take, unless 256 rows need more
constexpr unsigned ALL = 0xffffffffu;

// Of 16 packed rows: their largest norm, their largest |v - v'|, both in true units, and 1 / (their common power of two).
struct Group { float norm, residual, unit; };

// What a lane has seen of a row: a bound above the smallest score, two codes with bounds below their scores, and a bound below
// the scores of all other codes.
struct alignas(16) Slot { float limit, low1, low2, rest; int code1, code2, unused[2]; };

__host__ __device__ int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

__device__ float wide(float v) { return v; }
__device__ float wide(__half v) { return __half2float(v); }
__device__ float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ double wide(double v) { return v; }

template <class T>
__device__ auto at(const Matrix& m, int64_t row, int64_t column) {
  return wide(static_cast<const T*>(m.data)[row * m.row_stride + column * m.column_stride]);
}

template <class T>
using Wide = std::conditional_t<sizeof(T) == sizeof(double), double, float>;

__device__ bool finite(double v) { return v - v == 0; }
__device__ double larger(double a, double b) { return a > b || a != a ? a : b; }  // NaN stays, unlike in fmax

// One step of the contract's sum.
__device__ double add_square(double s, double x, double c) {
  const double e = __dsub_rn(x, c);
  return __dadd_rn(s, __dmul_rn(e, e));
}

// mean [D] of the codes, and whether any of them is not finite. One block per dimension. Any shift would do; this one makes
// the numbers small, hence their rounding errors.
template <class T>
__global__ void mean_kernel(Matrix codes, double* mean, int* bad) {
  __shared__ double sums[THREADS];
  double sum = 0;
  for (int64_t k = threadIdx.x; k < codes.rows; k += THREADS) {
    const double v = at<T>(codes, k, blockIdx.x);
    if (!finite(v)) atomicOr(bad, 1);
    sum += v;
  }
  sums[threadIdx.x] = sum;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) mean[blockIdx.x] = sums[0] / codes.rows;
}

// The codes as they were given, [D][codes], so that neighbouring threads read neighbouring codes.
template <class T>
__global__ void transpose_kernel(Matrix codes, Wide<T>* raw, int64_t stride) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, k = i % stride, d = i / stride;
  if (k < codes.rows && d < codes.columns) raw[i] = at<T>(codes, k, d);
}

// Rows first, first + 1, ... of m, shifted by `mean`, scaled by a power of two and rounded to float16: out [groups][steps][lane]. A
// warp per group. Rows beyond the end repeat the last one, with a square that never wins; columns beyond are zero.
template <class T>
__global__ void pack_kernel(Matrix m, int64_t first, int64_t rows, int64_t padded, int64_t steps, const double* mean, uint4* out,
                            Group* groups, float* square) {
  const int64_t group = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32, t = lane % 4;
  if (group >= padded / GROUP) return;
  int64_t row[2];
  double norm[2] = {}, residual[2] = {}, most = 0;
  for (int h = 0; h < 2; ++h) {
    row[h] = group * GROUP + lane / 4 + 8 * h;
    const int64_t from = first + (row[h] < rows ? row[h] : rows - 1);
    for (int64_t d = t; d < m.columns; d += 4) most = fmax(most, fabs(double(at<T>(m, from, d)) - mean[d]));
  }
  for (int other = 16; other > 0; other /= 2) most = fmax(most, __shfl_xor_sync(ALL, most, other));
  int exponent;
  frexp(most, &exponent);  // the largest becomes 2^14 to 2^15: float16 ends at 2^16, and this leaves the small ones their bits
  const double unit = ldexp(1.0, (exponent > -40 ? exponent : -40) - 15), scale = 1 / unit;  // both exact
  for (int64_t step = 0; step < steps; ++step) {
    unsigned word[4];
    for (int i = 0; i < 4; ++i) {  // row g, the same 8 columns on, then both of row g + 8
      const int h = i / 2;
      const int64_t from = first + (row[h] < rows ? row[h] : rows - 1), d = 16 * step + 2 * t + i % 2 * 8;
      word[i] = 0;
      for (int j = 0; j < 2 && d + j < m.columns; ++j) {
        const double v = (double(at<T>(m, from, d + j)) - mean[d + j]) * scale;
        const __half rounded = __float2half_rn(float(v));
        const double lost = v - __half2float(rounded);
        norm[h] += v * v, residual[h] += lost * lost;
        word[i] |= unsigned(__half_as_ushort(rounded)) << (16 * j);
      }
    }
    out[(group * steps + step) * 32 + lane] = make_uint4(word[0], word[1], word[2], word[3]);
  }
  for (int h = 0; h < 2; ++h) {
    for (int other = 1; other < 4; other *= 2)
      norm[h] += __shfl_xor_sync(ALL, norm[h], other), residual[h] += __shfl_xor_sync(ALL, residual[h], other);
    if (square && t == 0) square[row[h]] = row[h] < rows ? float(norm[h] * unit * unit) : FLT_MAX;
  }
  double largest = larger(norm[0], norm[1]), worst = larger(residual[0], residual[1]);
  for (int other = 4; other < 32; other *= 2) {
    largest = larger(largest, __shfl_xor_sync(ALL, largest, other));
    worst = larger(worst, __shfl_xor_sync(ALL, worst, other));
  }
  if (lane == 0) groups[group] = {float(sqrt(largest) * unit), float(sqrt(worst) * unit), float(unit)};
}

// d += a b: 16 x 8 scores. Lane 4 g + t holds those of rows g (d[0], d[1]) and g + 8, codes 2 t and 2 t + 1.
__device__ void multiply_add(float (&d)[4], uint4 a, unsigned b0, unsigned b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// What a tile of codes brings: its operands for STEPS x 16 dimensions, and what turns products into scores.
template <int STEPS>
struct alignas(16) Stage { uint4 codes[NG][STEPS][32]; float square[TILE]; Group groups[NG]; };

// Scores of 256 rows against the tiles blockIdx.y, blockIdx.y + gridDim.y, ...: splitting the codes keeps all multiprocessors
// busy when rows are few. The next tile is on its way into shared memory while this one is multiplied.
template <int STEPS>
__global__ void __launch_bounds__(THREADS) screen_kernel(const uint4* x, const Group* x_groups, const uint4* c,
                                                         const Group* c_groups, const float* square, int steps, int tiles,
                                                         Bound bound, Slot* slots) {
  __shared__ Stage<STEPS> stages[2];
  const int lane = threadIdx.x % 32, t = lane % 4, parts = steps / STEPS;
  const int64_t x_group = (int64_t(blockIdx.x) * WARPS + threadIdx.x / 32) * MT;
  auto copy = [](void* to, const void* from, int bytes, int first_thread) {
    const int at = 16 * (int(threadIdx.x) - first_thread);
    if (at >= 0 && at < bytes) __pipeline_memcpy_async(static_cast<char*>(to) + at, static_cast<const char*>(from) + at, 16);
  };
  auto fetch = [&](Stage<STEPS>& stage, int64_t tile, int part) {
    for (int i = threadIdx.x; i < NG * STEPS * 32; i += THREADS) {
      const int g = i / (STEPS * 32), s = i / 32 % STEPS;
      __pipeline_memcpy_async(&stage.codes[g][s][i % 32], &c[((tile * NG + g) * steps + part * STEPS + s) * 32 + i % 32], 16);
    }
    copy(stage.square, square + tile * TILE, sizeof(stage.square), 0);
    copy(stage.groups, c_groups + tile * NG, sizeof(stage.groups), 32);
    __pipeline_commit();
  };
  uint4 a[MT][STEPS];
  float acc[MT][2 * NG][4];
  Group mine[MT];
  Slot seen[MT][2];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    mine[m] = x_groups[x_group + m];
    for (int h = 0; h < 2; ++h) seen[m][h] = {INFINITY, INFINITY, INFINITY, INFINITY, 0, 0, {}};
  }
  int now = 0, part = 0;
  fetch(stages[0], blockIdx.y, 0);
  for (int tile = blockIdx.y; tile < tiles; now ^= 1) {
    const Stage<STEPS>& stage = stages[now];
    const int next_part = part + 1 < parts ? part + 1 : 0, next_tile = next_part ? tile : tile + int(gridDim.y);
    __pipeline_wait_prior(0);
    __syncthreads();  // this stage is filled, and all have left the other one
    if (next_tile < tiles) fetch(stages[now ^ 1], next_tile, next_part);
    if (parts > 1 || tile == int(blockIdx.y)) {
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int s = 0; s < STEPS; ++s) {
          const uint4 v = x[((x_group + m) * steps + part * STEPS + s) * 32 + lane];
          a[m][s] = make_uint4(v.x, v.z, v.y, v.w);  // packed for the other operand, which wants it 8 columns first
        }
    }
    if (part == 0) {
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int n = 0; n < 2 * NG; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
    }
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
      for (int g = 0; g < NG; ++g) {
        const uint4 b = stage.codes[g][s][lane];  // two operands of 8 codes
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          multiply_add(acc[m][2 * g], a[m][s], b.x, b.y);
          multiply_add(acc[m][2 * g + 1], a[m][s], b.z, b.w);
        }
      }
    const int first_code = tile * TILE;
    part = next_part, tile = next_tile;
    if (part) continue;
    float C = 0, lost = 0;
#pragma unroll
    for (int g = 0; g < NG; ++g) C = fmaxf(C, stage.groups[g].norm), lost = fmaxf(lost, stage.groups[g].residual);
    const float2* squares = reinterpret_cast<const float2*>(stage.square + 2 * t);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const float X = mine[m].norm, gone = mine[m].residual;
      const float E = bound(X, C) + 2 * (gone * C + (X + gone) * lost);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        // The 16 scores of this row that this lane holds: the smallest and the next. The last 4 bits of a score say whose it is.
        float best = INFINITY, next = INFINITY;
#pragma unroll
        for (int n = 0; n < 2 * NG; ++n) {
          const float2 sq = squares[4 * n];
          const float scale = -2 * mine[m].unit * stage.groups[n / 2].unit;
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const float score = fmaf(scale, acc[m][n][2 * h + j], j ? sq.y : sq.x);
            const float marked = __int_as_float((__float_as_int(score) & ~15) | (2 * n + j));
            next = fminf(next, fmaxf(best, marked)), best = fminf(best, marked);
          }
        }
        const int e = __float_as_int(best) & 15, code = first_code + e / 2 * 8 + 2 * t + e % 2;
        const float low = E < INFINITY ? best - E : -INFINITY;  // an infinite or unknown bound rules nothing out
        Slot& s = seen[m][h];
        s.limit = fminf(s.limit, best + E);
        s.rest = fminf(s.rest, E < INFINITY ? next - E : -INFINITY);
        if (low < s.low1) {
          s.rest = fminf(s.rest, s.low2);
          s.low2 = s.low1, s.code2 = s.code1, s.low1 = low, s.code1 = code;
        } else if (low < s.low2) {
          s.rest = fminf(s.rest, s.low2);
          s.low2 = low, s.code2 = code;
        } else {
          s.rest = fminf(s.rest, low);
        }
      }
    }
  }
#pragma unroll
  for (int m = 0; m < MT; ++m)
    for (int h = 0; h < 2; ++h) {
      const int64_t row = (x_group + m) * GROUP + lane / 4 + 8 * h;
      slots[(row * gridDim.y + blockIdx.y) * 4 + t] = seen[m][h];
    }
}

// A lane per row: the contract's number for every candidate that the screen could not rule out. The sum is sequential, so a lane
// has a row to itself; its warp reads rows and codes together, and hands them out through shared memory. Rows for which
// more than the candidates are open go to search_kernel.
template <class T>
__global__ void __launch_bounds__(32) certify_kernel(Matrix x, Matrix codes, int64_t first, int64_t rows, const Slot* slots,
                                                     int n_slots, const int* bad, int64_t* idx, double* distance, int* open,
                                                     int* n_open) {
  constexpr int BATCH = 16;
  __shared__ float xs[32][33], cs[32][33];
  const int lane = threadIdx.x;
  const int64_t from = int64_t(blockIdx.x) * 32, row = from + lane, K = codes.rows, D = codes.columns;
  const Slot* mine = slots + (row < rows ? row : rows - 1) * n_slots;
  float limit = INFINITY, rest = INFINITY;
  for (int s = 0; s < n_slots; ++s) limit = fminf(limit, mine[s].limit), rest = fminf(rest, mine[s].rest);
  int64_t winner = K;
  double best = INFINITY;
  for (int next = 0;;) {
    int k = -1;
    for (; next < 2 * n_slots && k < 0; ++next) {
      const Slot& s = mine[next / 2];
      const int code = next % 2 ? s.code2 : s.code1;
      if (!((next % 2 ? s.low2 : s.low1) > limit) && code < K) k = code;  // `not >`: NaN rules nothing out
    }
    if (!__any_sync(ALL, k >= 0)) break;
    double sum = 0;
    for (int64_t start = 0; start < D; start += 32) {
#pragma unroll
      for (int some = 0; some < 32; some += BATCH) {  // all loads of a batch are under way before the first is needed
        float x_some[BATCH], c_some[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
          const int theirs = __shfl_sync(ALL, k, some + i);
          const bool wanted = theirs >= 0 && start + lane < D;
          x_some[i] = wanted ? at<T>(x, first + (from + some + i < rows ? from + some + i : rows - 1), start + lane) : 0;
          c_some[i] = wanted ? at<T>(codes, theirs, start + lane) : 0;
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) xs[some + i][lane] = x_some[i], cs[some + i][lane] = c_some[i];
      }
      __syncwarp();
      for (int d = 0; d < 32 && start + d < D; ++d) sum = add_square(sum, xs[lane][d], cs[lane][d]);
      __syncwarp();
    }
    if (k >= 0 && (sum < best || (sum == best && k < winner))) winner = k, best = sum;
  }
  if (row >= rows) return;
  if (*bad) {
    idx[first + row] = K, distance[first + row] = NAN;
  } else if (!(rest > limit)) {
    open[atomicAdd(n_open, 1)] = int(row);
  } else {
    idx[first + row] = winner, distance[first + row] = best;
  }
}

// A block per row: the contract's number for every code. For float64, which has no screen, and for the few rows that the screen
// leaves open: the rows `open`, or all if that is null.
template <class T>
__global__ void __launch_bounds__(SEARCH_THREADS) search_kernel(Matrix x, Matrix codes, const Wide<T>* raw, int64_t stride,
                                                                int64_t first, int64_t rows, const int* open, const int* n_open,
                                                                const int* bad, int64_t* idx, double* distance) {
  constexpr int BATCH = 64 / sizeof(Wide<T>);
  __shared__ double best_of[SEARCH_THREADS / 32];
  __shared__ int64_t winner_of[SEARCH_THREADS / 32];
  __shared__ int unusable;
  const int64_t n = open ? *n_open : rows, K = codes.rows, D = codes.columns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
    const int64_t row = first + (open ? open[i] : i);
    int64_t winner = K;
    double best = INFINITY;
    auto take = [&](double s, int64_t k) {
      if (k < K && (winner == K || s < best || (s == best && k < winner))) winner = k, best = s;
    };
    if (threadIdx.x == 0) unusable = *bad;
    __syncthreads();
    for (int64_t d = threadIdx.x; d < D; d += SEARCH_THREADS)
      if (!finite(at<T>(x, row, d))) unusable = 1;
    for (int64_t k = threadIdx.x; k < K; k += SEARCH_THREADS) {
      double sum = 0;
      for (int64_t d = 0; d < D; d += BATCH) {
        Wide<T> x_some[BATCH], c_some[BATCH];  // beyond the last dimension: 0 - 0, which adds nothing
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
          x_some[j] = d + j < D ? at<T>(x, row, d + j) : 0;
          c_some[j] = d + j < D ? raw[(d + j) * stride + k] : 0;
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j) sum = add_square(sum, x_some[j], c_some[j]);
      }
      take(sum, k);
    }
    for (int other = 16; other > 0; other /= 2) {
      const double s = __shfl_xor_sync(ALL, best, other);
      const int64_t k = __shfl_xor_sync(ALL, winner, other);
      take(s, k);
    }
    if (lane == 0) best_of[warp] = best, winner_of[warp] = winner;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int w = 1; w < SEARCH_THREADS / 32; ++w) take(best_of[w], winner_of[w]);
      idx[row] = unusable ? K : winner, distance[row] = unusable ? NAN : best;
    }
    __syncthreads();  // before the next row uses the same memory
  }
}

// s [K, D]: a block per code, a thread per dimension, rows in ascending order: no atomics, the same bits every time.
template <class T>
__global__ void segment_sums_kernel(Matrix x, const int64_t* order, const int64_t* first, float* s) {
  const int64_t k = blockIdx.x;
  for (int64_t d = threadIdx.x; d < x.columns; d += blockDim.x) {
    float sum = 0;
    for (int64_t i = first[k]; i < first[k + 1]; ++i) sum += float(at<T>(x, order[i], d));
    s[k * x.columns + d] = sum;
  }
}

// How the scratch memory is cut up; every piece starts on a multiple of 256 bytes.
struct Scratch {
  int64_t chunk, part, steps, codes, splits, bytes = 0;
  int64_t flags, mean, raw, c, c_groups, square, x, x_groups, slots, open;

  Scratch(int64_t N, int64_t K, int64_t D) : part(D > 64 ? 8 : 4), steps(round_up((D + 15) / 16, part)), codes(round_up(K, TILE)) {
    auto least = [](int64_t a, int64_t b) { return a < b ? a : b; };
    const int64_t blocks = (N + ROWS - 1) / ROWS;
    splits = least(least((WANTED_BLOCKS + blocks - 1) / (blocks ? blocks : 1), MOST_SPLITS), codes / TILE);
    const int64_t per_row = 32 * steps + 4 * splits * int64_t(sizeof(Slot)) + 4;
    chunk = least(SCRATCH / per_row / ROWS * ROWS, blocks * ROWS);
    chunk = chunk < ROWS ? ROWS : chunk;
    auto take = [this](int64_t n) { const int64_t at = bytes; bytes += round_up(n, 256); return at; };
    flags = take(8), mean = take(8 * D), raw = take(8 * D * codes);
    c = take(32 * steps * codes), c_groups = take(sizeof(Group) * codes / GROUP), square = take(4 * codes);
    x = take(32 * steps * chunk), x_groups = take(sizeof(Group) * chunk / GROUP);
    slots = take(4 * splits * sizeof(Slot) * chunk), open = take(4 * chunk);
  }
};

unsigned blocks(int64_t n, int64_t per_block) { return unsigned((n + per_block - 1) / per_block); }

template <class T>
void nearest_code(Matrix x, Matrix codes, char* memory, int64_t* idx, double* distance, cudaStream_t stream) {
  const Scratch at(x.rows, codes.rows, x.columns);
  int *bad = reinterpret_cast<int*>(memory + at.flags), *n_open = bad + 1, *open = reinterpret_cast<int*>(memory + at.open);
  auto* mean = reinterpret_cast<double*>(memory + at.mean);
  auto* raw = reinterpret_cast<Wide<T>*>(memory + at.raw);
  cudaMemsetAsync(bad, 0, sizeof(int), stream);
  mean_kernel<T><<<unsigned(x.columns), THREADS, 0, stream>>>(codes, mean, bad);
  transpose_kernel<T><<<blocks(at.codes * x.columns, THREADS), THREADS, 0, stream>>>(codes, raw, at.codes);
  if constexpr (sizeof(T) == sizeof(double)) {  // float16 cannot screen float64
    search_kernel<T><<<SEARCH_BLOCKS, SEARCH_THREADS, 0, stream>>>(x, codes, raw, at.codes, 0, x.rows, nullptr, nullptr, bad, idx,
                                                                  distance);
  } else {
    const Bound bound(x.columns, 0x1p-23f);
    auto *c = reinterpret_cast<uint4*>(memory + at.c), *xs = reinterpret_cast<uint4*>(memory + at.x);
    auto *c_groups = reinterpret_cast<Group*>(memory + at.c_groups), *x_groups = reinterpret_cast<Group*>(memory + at.x_groups);
    auto* square = reinterpret_cast<float*>(memory + at.square);
    auto* slots = reinterpret_cast<Slot*>(memory + at.slots);
    const int steps = int(at.steps), tiles = int(at.codes / TILE);
    pack_kernel<T><<<blocks(at.codes / GROUP, WARPS), THREADS, 0, stream>>>(codes, 0, codes.rows, at.codes, steps, mean, c,
                                                                           c_groups, square);
    for (int64_t first = 0; first < x.rows; first += at.chunk) {
      const int64_t rows = x.rows - first < at.chunk ? x.rows - first : at.chunk, padded = round_up(rows, ROWS);
      const dim3 grid(unsigned(padded / ROWS), unsigned(at.splits));
      cudaMemsetAsync(n_open, 0, sizeof(int), stream);
      pack_kernel<T><<<blocks(padded / GROUP, WARPS), THREADS, 0, stream>>>(x, first, rows, padded, steps, mean, xs, x_groups,
                                                                           nullptr);
      if (at.part == 4)
        screen_kernel<4><<<grid, THREADS, 0, stream>>>(xs, x_groups, c, c_groups, square, steps, tiles, bound, slots);
      else
        screen_kernel<8><<<grid, THREADS, 0, stream>>>(xs, x_groups, c, c_groups, square, steps, tiles, bound, slots);
      certify_kernel<T><<<blocks(rows, 32), 32, 0, stream>>>(x, codes, first, rows, slots, int(4 * at.splits), bad, idx, distance,
                                                             open, n_open);
      search_kernel<T><<<SEARCH_BLOCKS, SEARCH_THREADS, 0, stream>>>(x, codes, raw, at.codes, first, rows, open, n_open, bad, idx,
                                                                    distance);
    }
  }
}

}  // namespace

int64_t nearest_code_cuda_scratch(int64_t N, int64_t K, int64_t D) { return Scratch(N, K, D).bytes; }

int nearest_code_cuda(Matrix x, Matrix codes, void* scratch, int64_t* idx, double* distance, void* stream) {
  if (x.rows == 0) return cudaSuccess;
  char* memory = static_cast<char*>(scratch);
  cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (x.type) {
    case Type::f32: nearest_code<float>(x, codes, memory, idx, distance, s); break;
    case Type::f64: nearest_code<double>(x, codes, memory, idx, distance, s); break;
    case Type::bf16: nearest_code<__nv_bfloat16>(x, codes, memory, idx, distance, s); break;
    case Type::f16: nearest_code<__half>(x, codes, memory, idx, distance, s); break;
  }
  return cudaGetLastError();
}

int segment_sums_cuda(Matrix x, const int64_t* order, const int64_t* first, int64_t K, float* s, void* stream) {
  const unsigned threads = x.columns < 128 ? 32 * blocks(x.columns, 32) : 128;
  cudaStream_t on = static_cast<cudaStream_t>(stream);
  switch (x.type) {
    case Type::f32: segment_sums_kernel<float><<<unsigned(K), threads, 0, on>>>(x, order, first, s); break;
    case Type::f64: segment_sums_kernel<double><<<unsigned(K), threads, 0, on>>>(x, order, first, s); break;
    case Type::bf16: segment_sums_kernel<__nv_bfloat16><<<unsigned(K), threads, 0, on>>>(x, order, first, s); break;
    case Type::f16: segment_sums_kernel<__half><<<unsigned(K), threads, 0, on>>>(x, order, first, s); break;
  }
  return cudaGetLastError();
}

}  // namespace hipart
