// What quantizer.cu offers and quantizer_cuda.cpp calls. There is no torch header here, so that
// `nvcc -arch=sm_75 -c quantizer.cu` checks the CUDA source on a machine without a GPU.
#pragma once
#include <cstdint>

namespace hipart::cuda {

// x [N, D] and codebook [K, D], row-major on the device -> idx [N], squared distance [N]. A row
// without an answer, because some number is not finite, gets the index K and the distance NaN.
// `mean` [D] is subtracted from both before they are screened, and `largest` [1] is the largest
// |codebook - mean|. Neither changes the answer, but with the true mean of all codes the screen
// leaves little open, and a codebook that is not finite is noticed. Returns a cudaError_t: 0 is
// success. As in CUB, a call without scratch memory does nothing but say how many `bytes` of it are
// needed.
int nearest_code(void* scratch, int64_t& bytes, const float* x, const float* codebook,
                 const float* mean, const float* largest, int64_t N, int64_t K, int64_t D,
                 int64_t* idx, double* distance, void* stream);

// The rows of code k are order[first[k]], order[first[k] + 1] ... order[first[k + 1] - 1].
// Gives how many these are, n [K], and their sums, s [K, D], added up in that order.
int code_statistics(const float* x, const int64_t* order, const int64_t* first, int64_t K,
                    int64_t D, float* n, float* s, void* stream);

}  // namespace hipart::cuda
