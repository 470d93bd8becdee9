// What the two compilers share: quantizer.cu defines these launchers, quantizer.cpp calls them. No torch header here, so
// `nvcc -c` checks the CUDA source on a machine without a GPU and without a CUDA build of PyTorch.
#pragma once
#include <cstdint>

namespace hipart {

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
