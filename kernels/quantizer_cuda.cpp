// What PyTorch has to do with quantizer.cu: memory, stream and device come from here. Nothing waits
// for the GPU, so the ops can be queued, and captured in a CUDA graph.

#include "quantizer.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/sort.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <string>
#include <tuple>

namespace {

using at::Tensor;

void check_launch(int error) {
  TORCH_CHECK(error == 0, "a CUDA kernel failed to start: error " + std::to_string(error));
}

// x [N, D], codebook [K, D] on one GPU, no float64 -> idx [N], d [N]
std::tuple<Tensor, Tensor> quantize(const Tensor& x, const Tensor& codebook) {
  TORCH_CHECK_VALUE(x.is_cuda() && x.device() == codebook.device() && x.dim() == 2 &&
                        codebook.dim() == 2 && x.size(1) == codebook.size(1) &&
                        codebook.numel() > 0 && x.scalar_type() == codebook.scalar_type() &&
                        x.scalar_type() != at::kDouble && codebook.size(0) < INT32_MAX,
                    "hipart_cuda::quantize needs x [N, D] and codebook [K, D] on one GPU, in "
                    "float32, bfloat16 or float16, with K below 2^31");
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor rows = x.to(at::kFloat).contiguous();  // bfloat16 and float16 are widened exactly
  const Tensor codes = codebook.to(at::kFloat).contiguous();
  const Tensor mean = codes.mean(0), largest = codes.sub(mean).abs().max();
  const int64_t N = x.size(0), K = codebook.size(0), D = x.size(1);
  Tensor idx = at::empty({N}, x.options().dtype(at::kLong));
  Tensor distance = at::empty({N}, x.options().dtype(at::kDouble));
  int64_t bytes = 0;
  const auto search = [&](void* scratch) {
    check_launch(hipart::cuda::nearest_code(
        scratch, bytes, rows.const_data_ptr<float>(), codes.const_data_ptr<float>(),
        mean.const_data_ptr<float>(), largest.const_data_ptr<float>(), N, K, D,
        idx.mutable_data_ptr<int64_t>(),
        distance.mutable_data_ptr<double>(), c10::cuda::getCurrentCUDAStream()));
  };
  search(nullptr);  // says how many bytes it needs
  Tensor scratch = at::empty({bytes}, x.options().dtype(at::kByte));
  search(scratch.mutable_data_ptr());
  return {idx, distance};
}

// x [N, D], idx [N] -> n [K], s [K, D]. A code outside [0, K) is not counted. The stable sort keeps
// the rows of a code in ascending order.
std::tuple<Tensor, Tensor> code_statistics(const Tensor& x, const Tensor& idx, int64_t K) {
  TORCH_CHECK_VALUE(x.is_cuda() && x.device() == idx.device() && x.dim() == 2 && idx.dim() == 1 &&
                        idx.size(0) == x.size(0) && idx.scalar_type() == at::kLong && K > 0 &&
                        K < INT32_MAX,
                    "hipart_cuda::code_statistics needs x [N, D] and idx [N] int64 on one GPU");
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor rows = x.to(at::kFloat).contiguous();
  const auto [sorted, order] = at::sort(idx, /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor first = at::searchsorted(sorted, at::arange(K + 1, idx.options()));
  Tensor n = at::empty({K}, rows.options()), s = at::empty({K, x.size(1)}, rows.options());
  check_launch(hipart::cuda::code_statistics(
      rows.const_data_ptr<float>(), order.const_data_ptr<int64_t>(),
      first.const_data_ptr<int64_t>(), K, x.size(1), n.mutable_data_ptr<float>(),
      s.mutable_data_ptr<float>(), c10::cuda::getCurrentCUDAStream()));
  return {n, s};
}

}  // namespace

TORCH_LIBRARY(hipart_cuda, m) {
  m.def("quantize", &quantize);
  m.def("code_statistics", &code_statistics);
}
