// Nearest code and code statistics on the GPU. The contract, the screen and its bound are those of quantizer.cpp and
// quantizer.h; here they become kernels. No torch header: `nvcc -arch=sm_90 -c quantizer.cu` checks this file alone.
//
// Where the bytes go. The screen is a matrix product, so it is built like one: a block of 256 threads holds 128 rows x 128
// codes of scores in registers, 8 x 8 a thread, and streams both operands through 8 KB of shared memory, so each number
// that is read serves 8 multiplications. Scores never leave the chip: of every 32 codes only the smallest is written, N x K / 32
// floats, and rows are taken in chunks so that even those stay a few megabytes. The certificate then gives every row a warp
// and every code of a surviving group a lane.

#include "quantizer.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace hipart {
namespace {

constexpr int TILE = 128, DEPTH = 8, THREADS = 256, GROUP = 32;
constexpr int64_t SCRATCH = 64 << 20;  // bytes that a chunk of rows may take, unless 128 rows need more
constexpr unsigned ALL = 0xffffffffu;

__host__ __device__ int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

__device__ float wide(float v) { return v; }
__device__ float wide(__half v) { return __half2float(v); }
__device__ float wide(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ double wide(double v) { return v; }

template <class T>
__device__ auto at(const Matrix& m, int64_t row, int64_t column) {
  return wide(static_cast<const T*>(m.data)[row * m.row_stride + column * m.column_stride]);
}

__device__ bool finite(double v) { return v - v == 0; }

// mean [D] of the codes, and whether any of them is not finite. One block per dimension.
template <class T>
__global__ void mean_kernel(Matrix codes, double* mean, int* bad) {
  __shared__ double sums[THREADS];
  double sum = 0;
  for (int64_t k = threadIdx.x; k < codes.rows; k += THREADS) {
    const double v = at<T>(codes, k, blockIdx.x);
    if (!finite(v)) atomicOr(bad, 1);
    sum += v / codes.rows;
  }
  sums[threadIdx.x] = sum;
  for (int half = THREADS / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  if (threadIdx.x == 0) mean[blockIdx.x] = sums[0];
}

// Rows first, first + 1, ... of m, shifted by `mean` and rounded: out [rows rounded up to TILE][D rounded up to DEPTH], with their
// norms, and squared norms where wanted. Rows beyond the end repeat the last one; columns beyond are zero. A warp per row.
template <class T>
__global__ void shift_kernel(Matrix m, int64_t first, int64_t rows, const double* mean, float* out, float* norm, float* square) {
  const int64_t row = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32, width = round_up(m.columns, DEPTH);
  const int lane = threadIdx.x % 32;
  if (row >= round_up(rows, TILE)) return;
  const int64_t from = first + (row < rows ? row : rows - 1);
  double sum = 0;
  for (int64_t d = lane; d < width; d += 32) {
    const double v = d < m.columns ? at<T>(m, from, d) - mean[d] : 0.0;
    out[row * width + d] = float(v);
    sum += v * v;
  }
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(ALL, sum, other);
  if (lane == 0) {
    norm[row] = float(sqrt(sum));
    if (square) square[row] = float(sum);
  }
}

// The codes as they were given, [group][D][32], so that the lanes of a warp read 32 codes' numbers from one line of memory.
template <class T>
__global__ void group_kernel(Matrix codes, float* raw) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, D = codes.columns;
  const int64_t k = i / (GROUP * D) * GROUP + i % GROUP;
  if (k < codes.rows) raw[i] = float(at<T>(codes, k, i / GROUP % D));
}

// The largest norm among the 32 codes of each group.
__global__ void group_norm_kernel(const float* norm, float* largest, int64_t groups) {
  const int64_t g = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (g >= groups) return;
  float m = 0;
  for (int j = 0; j < GROUP; ++j) m = norm[g * GROUP + j] > m ? norm[g * GROUP + j] : m;
  largest[g] = m;
}

// Scores of 128 rows against the code tiles blockIdx.y, blockIdx.y + gridDim.y, ...; low [rows][groups] gets the minimum of
// every 32. Splitting the codes over gridDim.y keeps all multiprocessors busy when rows are few.
__global__ void __launch_bounds__(THREADS) screen_kernel(const float* x, const float* c, const float* square, int64_t width,
                                                         int64_t codes, float* low) {
  __shared__ float xs[DEPTH][TILE + 4], cs[DEPTH][TILE + 4];  // + 4: the transposing stores meet fewer bank conflicts
  const int tx = threadIdx.x % 16, ty = threadIdx.x / 16;     // codes 4 tx.. and 64 + 4 tx.., rows 4 ty.. and 64 + 4 ty..
  const int load_row = threadIdx.x / 2, load_at = threadIdx.x % 2 * 4;
  const int64_t groups = codes / GROUP;
  const float* x_from = x + (int64_t(blockIdx.x) * TILE + load_row) * width + load_at;
  for (int64_t tile = blockIdx.y; tile < codes / TILE; tile += gridDim.y) {
    const float* c_from = c + (tile * TILE + load_row) * width + load_at;
    float acc[8][8] = {};
    for (int64_t d = 0; d < width; d += DEPTH) {
      const float4 xv = *reinterpret_cast<const float4*>(x_from + d), cv = *reinterpret_cast<const float4*>(c_from + d);
      __syncthreads();  // all have read the step before
      xs[load_at][load_row] = xv.x, xs[load_at + 1][load_row] = xv.y;
      xs[load_at + 2][load_row] = xv.z, xs[load_at + 3][load_row] = xv.w;
      cs[load_at][load_row] = cv.x, cs[load_at + 1][load_row] = cv.y;
      cs[load_at + 2][load_row] = cv.z, cs[load_at + 3][load_row] = cv.w;
      __syncthreads();
#pragma unroll
      for (int k = 0; k < DEPTH; ++k) {
        float a[8], b[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i] = xs[k][4 * ty + i], a[4 + i] = xs[k][64 + 4 * ty + i];
          b[i] = cs[k][4 * tx + i], b[4 + i] = cs[k][64 + 4 * tx + i];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(a[i], b[j], acc[i][j]);
      }
    }
    // Eight neighbouring lanes hold 32 consecutive codes of the lower half of the tile, and 32 of the upper.
    const float* sq = square + tile * TILE + 4 * tx;
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float m = INFINITY;
#pragma unroll
        for (int j = 0; j < 4; ++j) m = fminf(m, sq[64 * half + j] - 2 * acc[i][4 * half + j]);
#pragma unroll
        for (int other = 1; other < 8; other *= 2) m = fminf(m, __shfl_xor_sync(ALL, m, other));
        const int64_t row = int64_t(blockIdx.x) * TILE + (i < 4 ? 0 : 64) + 4 * ty + i % 4;
        if (tx % 8 == 0) low[row * groups + tile * (TILE / GROUP) + 2 * half + tx / 8] = m;
      }
  }
}

// A warp per row: which groups may hold the winner, then the contract's number for each of their codes, one a lane.
// Without a screen (float64) all groups are compared.
template <class T>
__global__ void certify_kernel(Matrix x, Matrix codes, const float* raw, int64_t first, int64_t rows, const float* low,
                               const float* norm, const float* largest, Bound bound, const int* bad, int64_t* idx,
                               double* distance) {
  const int64_t row = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / 32;
  const int64_t groups = round_up(codes.rows, TILE) / GROUP, D = codes.columns;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  bool unusable = *bad;
  for (int64_t d = lane; d < D; d += 32) unusable |= !finite(at<T>(x, first + row, d));
  if (__any_sync(ALL, unusable)) {
    if (lane == 0) idx[first + row] = codes.rows, distance[first + row] = NAN;
    return;
  }
  float limit = INFINITY;
  for (int64_t g = lane; low && g < groups; g += 32) limit = fminf(limit, low[row * groups + g] + bound(norm[row], largest[g]));
  for (int other = 16; other > 0; other /= 2) limit = fminf(limit, __shfl_xor_sync(ALL, limit, other));
  int64_t winner = codes.rows;
  double best = INFINITY;
  for (int64_t start = 0; start < groups; start += 32) {
    const int64_t mine = start + lane;  // `not >`: NaN rules nothing out
    const bool open = mine < groups && !(low && low[row * groups + mine] - bound(norm[row], largest[mine]) > limit);
    for (unsigned left = __ballot_sync(ALL, open); left; left &= left - 1) {
      const int64_t k = (start + __ffs(left) - 1) * GROUP + lane;
      if (k >= codes.rows) continue;
      double s = 0;
      for (int64_t d = 0; d < D; ++d) {
        double c;
        if constexpr (sizeof(T) < sizeof(double)) c = raw[(k / GROUP * D + d) * GROUP + lane];
        else c = at<T>(codes, k, d);
        const double e = __dsub_rn(at<T>(x, first + row, d), c);
        s = __dadd_rn(s, __dmul_rn(e, e));
      }
      if (winner == codes.rows || s < best) winner = k, best = s;  // k grows: the lowest index stays
    }
  }
  for (int other = 16; other > 0; other /= 2) {
    const double s = __shfl_xor_sync(ALL, best, other);
    const int64_t k = __shfl_xor_sync(ALL, winner, other);
    if (k < codes.rows && (winner == codes.rows || s < best || (s == best && k < winner))) winner = k, best = s;
  }
  if (lane == 0) idx[first + row] = winner, distance[first + row] = best;
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
  int64_t chunk, width, codes, groups, bytes = 0;
  int64_t bad, mean, raw, c, c_norm, square, largest, x, x_norm, low;

  Scratch(int64_t N, int64_t K, int64_t D)
      : width(round_up(D, DEPTH)), codes(round_up(K, TILE)), groups(codes / GROUP) {
    chunk = SCRATCH / (4 * (width + 1 + groups)) / TILE * TILE;
    chunk = chunk < TILE ? TILE : chunk;
    chunk = chunk < N ? chunk : round_up(N, TILE);
    auto take = [this](int64_t n) { const int64_t at = bytes; bytes += round_up(n, 256); return at; };
    bad = take(4), mean = take(8 * D), raw = take(4 * codes * D), c = take(4 * codes * width), c_norm = take(4 * codes), square = take(4 * codes);
    largest = take(4 * groups), x = take(4 * chunk * width), x_norm = take(4 * chunk), low = take(4 * chunk * groups);
  }
};

unsigned blocks(int64_t n, int64_t per_block) { return unsigned((n + per_block - 1) / per_block); }

template <class T>
void nearest_code(Matrix x, Matrix codes, char* memory, int64_t* idx, double* distance, cudaStream_t stream) {
  const Scratch at(x.rows, codes.rows, x.columns);
  const bool screened = sizeof(T) < sizeof(double);
  const Bound bound(x.columns);
  auto floats = [memory](int64_t offset) { return reinterpret_cast<float*>(memory + offset); };
  int* bad = reinterpret_cast<int*>(memory + at.bad);
  double* mean = reinterpret_cast<double*>(memory + at.mean);
  cudaMemsetAsync(bad, 0, sizeof(int), stream);
  mean_kernel<T><<<unsigned(x.columns), THREADS, 0, stream>>>(codes, mean, bad);
  if (screened) {
    shift_kernel<T><<<blocks(at.codes * 32, THREADS), THREADS, 0, stream>>>(codes, 0, codes.rows, mean, floats(at.c),
                                                                            floats(at.c_norm), floats(at.square));
    group_kernel<T><<<blocks(at.codes * x.columns, THREADS), THREADS, 0, stream>>>(codes, floats(at.raw));
    group_norm_kernel<<<blocks(at.groups, THREADS), THREADS, 0, stream>>>(floats(at.c_norm), floats(at.largest), at.groups);
  }
  for (int64_t first = 0; first < x.rows; first += at.chunk) {
    const int64_t rows = x.rows - first < at.chunk ? x.rows - first : at.chunk, tiles = (rows + TILE - 1) / TILE;
    if (screened) {
      const int64_t most = at.codes / TILE, wanted = tiles < 256 ? (256 + tiles - 1) / tiles : 1;
      const dim3 grid(unsigned(tiles), unsigned(wanted < most ? wanted : most));
      shift_kernel<T><<<blocks(tiles * TILE * 32, THREADS), THREADS, 0, stream>>>(x, first, rows, mean, floats(at.x),
                                                                                  floats(at.x_norm), nullptr);
      screen_kernel<<<grid, THREADS, 0, stream>>>(floats(at.x), floats(at.c), floats(at.square), at.width, at.codes,
                                                  floats(at.low));
    }
    certify_kernel<T><<<blocks(rows * 32, THREADS), THREADS, 0, stream>>>(
        x, codes, floats(at.raw), first, rows, screened ? floats(at.low) : nullptr, floats(at.x_norm), floats(at.largest), bound,
        bad, idx, distance);
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
