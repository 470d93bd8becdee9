// What the two compilers share: quantizer.cu defines these launchers, quantizer.cpp calls them. No torch header here, so
// `nvcc -c` checks the CUDA source on a machine without a GPU and without a CUDA build of PyTorch.
#pragma once
#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define HIPART_BOTH __host__ __device__
#else
#define HIPART_BOTH
#endif

namespace hipart {

// How far a float32 score |c|^2 - 2 x.c may be from its true value, for a row of norm X and codes of norm at most C.
//  - A float32 product of length D, summed in any order, is off by at most D u X C, where u is the unit of rounding: 2^-24, or
//    2^-23 in tensor cores, which truncate every term (at worst 1.25 D u X C off, then). The score holds it twice, and the rounding of the inputs, of |c|^2, of the score
//    and of this bound add a few u of it. All that is taken twice. The 16 in it also pays for the index that the GPU's screen
//    writes into the last 4 bits of a score.
//  - The contract's own float64 sum rounds as well, which decides where a row is far from all codes.
//  - Products and inputs below 2^-126 may be flushed to zero.
// `4 * C * (X + C)` overflows before any score can: then the bound is infinite or NaN, and no code is ruled out. Data of
// 1e19 and more, or of 1e-17 and less, are therefore compared in full: right, and slow.
struct Bound {
  float relative, far, tiny;

  explicit Bound(int64_t D, float u = 0x1p-24f)
      : relative(D < (1 << 21) ? (D + 16) * u : INFINITY), far((D + 4) * 0x1p-50f), tiny(D * 0x1p-120f) {}

  HIPART_BOTH float operator()(float X, float C) const {
    return relative * (4 * C * (X + C)) + far * (X * X) + tiny * (1 + X + C);
  }
};

enum class Type { f32, f64, bf16, f16 };

struct Matrix {  // rows x columns of device memory, strides in elements
  const void* data;
  Type type;
  int64_t rows, columns, row_stride, column_stride;
};

// Bytes of scratch memory for nearest_code_cuda at these sizes.
int64_t nearest_code_cuda_scratch(int64_t N, int64_t K, int64_t D);

// idx [N] and squared distance [N]; a row without an answer (non-finite input) gets index K and distance NaN.
// Returns a cudaError_t: 0 is success.
int nearest_code_cuda(Matrix x, Matrix codebook, void* scratch, int64_t* idx, double* distance, void* stream);

// s [K, D]: sum of the rows order[first[k]] .. order[first[k + 1] - 1] of x, in that order.
int segment_sums_cuda(Matrix x, const int64_t* order, const int64_t* first, int64_t K, float* s, void* stream);

}  // namespace hipart
