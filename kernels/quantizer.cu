// Nearest code and code statistics on a GPU with tensor cores (compute capability 7.0 or newer), to
// the contract of reference.py. The idea is that of quantizer.cpp.
// As |x - c|^2 = |x|^2 - 2 (x.c - |c|^2 / 2), the nearest code is the one with the largest *score*
// x.c - |c|^2 / 2. A cheap product gives every score up to an error that has a bound E. A code
// whose score is more than 2 E below the best has lost for certain. The few others are compared in
// float64, exactly as the contract says.
//
//   round_kernel    makes rows and codes, minus the mean of the codes, float16
//   screen_kernel   multiplies on tensor cores; keeps the best score of every group of eight codes
//   certify_kernel  compares in float64 what the screen has left open
//   sum_kernel      adds up the rows of every code, for the EMA update
// Why groups of eight? A warp multiplies 16 rows by 16 codes at a time, and the 256 scores lie in a
// *fragment*, spread over the registers of its 32 lanes. CUDA does not say which score lies where,
// so a program cannot look for the best score of a row. But all fragments of one type keep row i
// and column j in the same place. So the elementwise maximum of eight fragments, for eight times 16
// codes, is again such a fragment, and holds for row i and column j the best of eight scores.
// Those eight codes, 16 apart, are the group. No lane has to know which group it has, and
// `store_matrix_sync` puts each maximum where it belongs. So N x K / 8 numbers are written.

#include "quantizer.h"

#include <cuda_fp16.h>
#include <mma.h>
#include <algorithm>
#include <cmath>

namespace hipart::cuda {
namespace {

namespace wmma = nvcuda::wmma;
constexpr int SIDE = 16, AREA = SIDE * SIDE;    // a fragment holds 16 x 16 numbers
constexpr int GROUP = 8, TILE = GROUP * SIDE;   // codes of a group; codes of 16 groups
constexpr int STRIPS = 2;                       // strips of 16 rows that a warp multiplies at once
constexpr int WARPS = 4, THREADS = 32 * WARPS;  // of a block, in every kernel
constexpr int ROWS = WARPS * STRIPS * SIDE;     // rows of a block of the screen
constexpr int64_t MOST_SCORES = 1 << 23;        // written before they are certified: 32 MB
constexpr int64_t WANTED_BLOCKS = 512;          // of the screen, to keep a large GPU busy
constexpr float NO_CODE = -1e30f;               // the score where there is no code
constexpr unsigned ALL = 0xffffffffu;           // lanes of a warp

struct Size { float length, moved; };  // of a vector; how far rounding has moved it; both at most

// The power of two that brings the largest number of the centred codes to between 2^6 and 2^7.
// float16 reaches from 2^-24 to 2^16: so rows may be 500 times larger than codes.
__device__ float scale_for(float largest) {
  int exponent = 0;
  frexpf(largest, &exponent);
  return largest < INFINITY ? ldexpf(1.f, min(7 - exponent, 126)) : NAN;
}

// E: how far a score may be from the truth, plus what the contract itself rounds, in scaled units.
// x and c are the true centred vectors, x' and c' their float16. X >= |x|, |x'| and dX >= |x - x'|
// are a row's bounds; C and dC are the largest such bounds of any code.
// 1. float16. x.c - x'.c' = (x - x').c + x'.(c - c') is at most dX C + X dC. Both distances are
//    measured, so this holds for subnormal numbers, too.
// 2. Sums. Tensor cores multiply exactly. They add p products (4 on the oldest, 16 on the newest)
//    to a float32 in one step, in which each term is cut off 23 bits below the largest one, and so
//    is the result: p + 1 cuts, as the largest term loses nothing. No term or partial sum exceeds
//    S = X C + C^2 / 2, so a cut loses at most 2^-23 S, and all cuts of the (at most D + 15, as D
//    is padded) products lose (D + 15) (1 + 1/p) 2^-23 S. We allow p = 1: (D + 15) 2^-22 S.
//    The bound has C^2 where S has C^2 / 2. The rest pays for the rounding of -|c|^2 / 2, at which
//    the sum starts: (D / 32 + 9) 2^-24 of itself. D + 16 also pays for rounding `most - 2 E`.
// 3. The contract rounds e = x - c, e e and D sums, each by 2^-53, so its number is off by
//    (D + 3) 2^-53 |x - c|^2. A score is half of that, and of |x - c|^2 <= X^2 + 2 X C + C^2 the
//    second term covers all but X^2. float64 holds the square of any float32: no underflow.
// Floating point rounds this bound as well; that X and C are 1 % too large covers it.
// A number that overflows float16 makes dX infinite or NaN, and so E, and so `most - 2 E`. No score
// is below NaN or minus infinity, so all codes are compared: right, but slow. If E is finite, all
// numbers of the screen are. Beyond D = 2^22 no two scores differ by more than 2 E: slow, too.
__device__ float error_bound(Size row, float C, float dC, int64_t D) {
  const float X = row.length, sums = (D + 16) * 0x1p-22f, contract = (D + 4) * 0x1p-54f;
  return row.moved * C + X * dC + sums * (C * (X + C)) + contract * (X * X);
}

// What codes need and rows do not. The codes of group g are g / 16 * 128 + g % 16 + 16 j, j < 8.
struct CodesOnly {
  float* start;       // [K / 16][16][16] -|c|^2 / 2 of 16 codes, the same in 16 rows
  float* as_given;    // [group][D][8] the codes as they came, those of a group side by side
  unsigned* largest;  // [2] the largest length and the largest `moved`, as bits
};

// m [rows][D] -> out [rows / 16][steps][16][16], one fragment after the other, with zeros beyond
// the last row and column. A warp has a row; the grid has rows up to a multiple of ROWS or TILE.
__global__ void __launch_bounds__(THREADS)
round_kernel(const float* m, int64_t rows, int64_t D, int64_t steps, const float* mean,
             const float* largest, __half* out, Size* sizes, CodesOnly codes) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  const float scale = scale_for(*largest);
  float square = 0, lost = 0;
  for (int64_t d = lane; d < steps * SIDE; d += 32) {
    const bool exists = row < rows && d < D;
    const float given = exists ? m[row * D + d] : 0;
    const float exact = exists ? (given - mean[d]) * scale : 0;
    const __half rounded = __float2half_rn(exact);
    const float moved = exact - __half2float(rounded);
    square += exact * exact, lost += moved * moved;
    out[(row / SIDE * steps + d / SIDE) * AREA + row % SIDE * SIDE + d % SIDE] = rounded;
    const int64_t group = row / TILE * SIDE + row % SIDE, member = row / SIDE % GROUP;
    if (exists && codes.as_given) codes.as_given[(group * D + d) * GROUP + member] = given;
  }
  for (int other = 16; other > 0; other /= 2) {
    square += __shfl_xor_sync(ALL, square, other);
    lost += __shfl_xor_sync(ALL, lost, other);
  }
  // The sums are less than 1 % off, `given - mean` was rounded, and squares below 2^-149 are lost.
  const float moved = 1.01f * sqrtf(lost) + 0x1p-22f * sqrtf(square) + D * 0x1p-60f;
  const Size size = {1.01f * sqrtf(square) + moved, moved};
  if (lane == 0 && sizes) sizes[row] = size;
  if (lane < SIDE && codes.start)
    codes.start[row / SIDE * AREA + lane * SIDE + row % SIDE] = row < rows ? square / -2 : NO_CODE;
  if (lane == 0 && codes.largest) {  // as bits, NaN > infinity > any number
    atomicMax(&codes.largest[0], __float_as_uint(size.length));
    atomicMax(&codes.largest[1], __float_as_uint(size.moved));
  }
}

// Scores of 128 rows a block, 32 a warp -> best [rows][groups]. Blocks with the same blockIdx.x
// share the tiles of codes; every group has a place of its own, so nothing has to be merged. There
// is no copy to shared memory: a fragment is 512 bytes in a row, and the four warps of a block ask
// for the same codes, so the first-level cache serves them.
__global__ void __launch_bounds__(THREADS)
screen_kernel(const __half* x, const __half* codes, const float* start, int64_t steps,
              int64_t tiles, float* best) {
  using Rows = wmma::fragment<wmma::matrix_a, SIDE, SIDE, SIDE, __half, wmma::row_major>;
  using Codes = wmma::fragment<wmma::matrix_b, SIDE, SIDE, SIDE, __half, wmma::col_major>;
  using Scores = wmma::fragment<wmma::accumulator, SIDE, SIDE, SIDE, float>;
  const auto row_major = wmma::mem_row_major;
  const int64_t strip = (int64_t(blockIdx.x) * WARPS + threadIdx.x / 32) * STRIPS;
  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    Scores score[STRIPS][GROUP];
    for (int j = 0; j < GROUP; ++j)
      for (int i = 0; i < STRIPS; ++i)
        wmma::load_matrix_sync(score[i][j], start + (tile * GROUP + j) * AREA, SIDE, row_major);
    for (int64_t step = 0; step < steps; ++step) {
      Rows rows[STRIPS];
      for (int i = 0; i < STRIPS; ++i)
        wmma::load_matrix_sync(rows[i], x + ((strip + i) * steps + step) * AREA, SIDE);
      for (int j = 0; j < GROUP; ++j) {
        Codes some;
        wmma::load_matrix_sync(some, codes + ((tile * GROUP + j) * steps + step) * AREA, SIDE);
        for (int i = 0; i < STRIPS; ++i) wmma::mma_sync(score[i][j], rows[i], some, score[i][j]);
      }
    }
    for (int i = 0; i < STRIPS; ++i) {
      for (int j = 1; j < GROUP; ++j)
        for (int place = 0; place < score[i][0].num_elements; ++place)
          score[i][0].x[place] = fmaxf(score[i][0].x[place], score[i][j].x[place]);
      wmma::store_matrix_sync(best + (strip + i) * SIDE * tiles * SIDE + tile * SIDE,
                              score[i][0], unsigned(tiles * SIDE), row_major);
    }
  }
}

// The contract's answer. Eight lanes have a row: they look through its groups together, and of an
// open group each compares one code.
__global__ void __launch_bounds__(THREADS)
certify_kernel(const float* x, int64_t first, int64_t rows, int64_t K, int64_t D, int64_t groups,
               const float* best, const Size* sizes, CodesOnly codes, int64_t* idx, double* d64) {
  const int lane = threadIdx.x % GROUP;
  const int64_t mine = int64_t(blockIdx.x) * (THREADS / GROUP) + threadIdx.x / GROUP;
  const int64_t row = mine < rows ? mine : rows - 1;  // a warp stays together
  const float* scores = best + row * groups;
  float most = -INFINITY;
  for (int64_t g = lane; g < groups; g += GROUP) most = fmaxf(most, scores[g]);
  for (int other = GROUP / 2; other > 0; other /= 2)
    most = fmaxf(most, __shfl_xor_sync(ALL, most, other));
  const float C = __uint_as_float(codes.largest[0]), dC = __uint_as_float(codes.largest[1]);
  const float limit = most - 2 * error_bound(sizes[row], C, dC, D);
  double least = INFINITY;
  long long nearest = K;
  for (int64_t base = 0; base < groups; base += GROUP) {
    unsigned open = __ballot_sync(ALL, !(scores[base + lane] < limit));  // NaN rules nothing out
    open = open >> (threadIdx.x % 32 - lane) & ((1u << GROUP) - 1);      // this row's eight groups
    for (; open; open &= open - 1) {
      const int64_t group = base + __ffs(open) - 1;
      const float* code = codes.as_given + group * D * GROUP + lane;
      long long k = group / SIDE * TILE + lane * SIDE + group % SIDE;
      if (k >= K) continue;
      double d = 0;
#pragma unroll 8
      for (int64_t i = 0; i < D; ++i) {
        const double e = __dsub_rn(x[(first + row) * D + i], code[i * GROUP]);
        d = __dadd_rn(d, __dmul_rn(e, e));
      }
      if (!(d < INFINITY)) d = -INFINITY, k = K;  // not finite: this wins, and is no code
      if (d < least) least = d, nearest = k;      // a lane's codes come in ascending order
    }
  }
  for (int other = GROUP / 2; other > 0; other /= 2) {
    const double d = __shfl_xor_sync(ALL, least, other);
    const long long k = __shfl_xor_sync(ALL, nearest, other);
    if (d < least || (d == least && k < nearest)) least = d, nearest = k;
  }
  if (lane != 0 || mine >= rows) return;
  idx[first + row] = nearest;
  d64[first + row] = nearest == K ? NAN : least;
}

// A block has a code, a thread has columns. Rows are added one after the other, so the bits are
// the same every time. If one code has nearly all rows, one block does nearly all the work.
__global__ void __launch_bounds__(THREADS)
sum_kernel(const float* x, const int64_t* order, const int64_t* first, int64_t D, float* n,
           float* s) {
  const int64_t k = blockIdx.x, begin = first[k], end = first[k + 1];
  if (threadIdx.x == 0) n[k] = end - begin;
  for (int64_t d = threadIdx.x; d < D; d += THREADS) {
    float total = 0;
#pragma unroll 8
    for (int64_t i = begin; i < end; ++i) total += x[order[i] * D + d];
    s[k * D + d] = total;
  }
}

unsigned blocks(int64_t n, int64_t of) { return unsigned((n + of - 1) / of); }

}  // namespace

int nearest_code(void* scratch, int64_t& bytes, const float* x, const float* codebook,
                 const float* mean, const float* largest, int64_t N, int64_t K, int64_t D,
                 int64_t* idx, double* distance, void* on) {
  const int64_t steps = blocks(D, SIDE), tiles = blocks(K, TILE), groups = tiles * SIDE;
  const int64_t chunk =  // rows that are searched together
      std::clamp<int64_t>(MOST_SCORES / groups / ROWS, 1, blocks(N, ROWS) + !N) * ROWS;
  CodesOnly codes;
  __half *rounded_codes, *rounded_rows;
  Size* sizes;
  float* best;
  bytes = 0;
  auto take = [&](auto*& piece, int64_t n) {  // a piece of the scratch memory
    piece = reinterpret_cast<decltype(piece + 0)>(uintptr_t(scratch) + bytes);
    bytes += (n * sizeof(*piece) + 255) / 256 * 256;
  };
  take(codes.start, tiles * TILE * SIDE), take(codes.as_given, tiles * TILE * D);
  take(codes.largest, 2), take(rounded_codes, tiles * TILE * steps * SIDE);
  take(rounded_rows, chunk * steps * SIDE), take(sizes, chunk), take(best, chunk * groups);
  if (!scratch) return 0;
  const auto stream = static_cast<cudaStream_t>(on);
  cudaMemsetAsync(codes.largest, 0, 2 * sizeof(unsigned), stream);
  round_kernel<<<blocks(tiles * TILE, WARPS), THREADS, 0, stream>>>(
      codebook, K, D, steps, mean, largest, rounded_codes, nullptr, codes);
  for (int64_t first = 0; first < N; first += chunk) {
    const int64_t rows = std::min(chunk, N - first), full = blocks(rows, ROWS);
    const int64_t shares = std::clamp<int64_t>(WANTED_BLOCKS / full, 1, tiles);
    round_kernel<<<blocks(full * ROWS, WARPS), THREADS, 0, stream>>>(
        x + first * D, rows, D, steps, mean, largest, rounded_rows, sizes, CodesOnly{});
    screen_kernel<<<dim3(full, shares), THREADS, 0, stream>>>(
        rounded_rows, rounded_codes, codes.start, steps, tiles, best);
    certify_kernel<<<blocks(rows, THREADS / GROUP), THREADS, 0, stream>>>(
        x, first, rows, K, D, groups, best, sizes, codes, idx, distance);
  }
  return cudaGetLastError();
}

int code_statistics(const float* x, const int64_t* order, const int64_t* first, int64_t K,
                    int64_t D, float* n, float* s, void* on) {
  sum_kernel<<<unsigned(K), THREADS, 0, static_cast<cudaStream_t>(on)>>>(x, order, first, D, n, s);
  return cudaGetLastError();
}
}  // namespace hipart::cuda
