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
//    2^-23 in tensor cores, which truncate every term (at worst 1.25 D u X C off, then). The score holds it twice, and the
//    rounding of the inputs, of |c|^2, of the score and of this bound add a few u of it. All that is taken twice (the products
//    of tensor cores 1.6 times).
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

// Bytes of scratch memory for nearest_code_cuda at these sizes.
int64_t nearest_code_cuda_scratch(int64_t N, int64_t K, int64_t D);

// x [N, D] and codebook [K, D], row-major on the device, D a multiple of 4, addresses multiples of 16 -> idx [N], and squared
// distance [N] unless that is null; a row without an answer (non-finite input) gets index K and distance NaN. Only float
// needs scratch memory. Returns a cudaError_t: 0 is success.
int nearest_code_cuda(const float* x, const float* codebook, int64_t N, int64_t K, int64_t D, void* scratch, int64_t* idx,
                      double* distance, void* stream);
int nearest_code_cuda(const double* x, const double* codebook, int64_t N, int64_t K, int64_t D, void* scratch, int64_t* idx,
                      double* distance, void* stream);

// How many rows chose each code, n [K], and their sums, s [K, D], over ascending rows. Returns a cudaError_t.
int code_statistics_cuda(const float* x, const int64_t* idx, int64_t N, int64_t K, int64_t D, float* n, float* s, void* stream);

}  // namespace hipart
