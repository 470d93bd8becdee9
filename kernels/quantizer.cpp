// The compiled ops: nearest code, code statistics and EMA update on the CPU, and their registration. Built a second time with
// WITH_CUDA it is only its last part, the thin layer that hands CUDA tensors to quantizer.cu. reference.py states the
// contract; this file meets it bit for bit.
//
// How a cheap screen can give an exact answer. For a row x and a code c, with both shifted by the same vector,
//     |x - c|^2 = |x|^2 + (|c|^2 - 2 x.c),
// and |x|^2 is the same for all codes. A cheap product gives the bracket, the *score*, up to an error whose bound E we can
// state. So if score(a) - E(a) > score(b) + E(b), code a has lost, for certain. What is left, as a rule eight codes of 2048, is
// compared in float64 exactly as the contract says. A worse screen costs time, never the answer.
//
// The cheap product here is one of integers. Every row and every code is scaled to a length of 32767 and rounded toward zero,
// which makes none longer: so each number fits into 16 bits, and no sum of products exceeds 2^30 (Cauchy and Schwarz), however
// large D is. One AVX2 instruction multiplies 16 of them and adds them in pairs, another adds these to the sums; of float32 it
// takes 8 at a time. (AVX-512 multiplies 32, and adds, in one.) And sums of integers are exact: all there is to bound is how
// far rounding has moved x, and how far c, and both are measured.
//
// Where the bytes go: the codebook is packed once, so that one step of the inner loop reads two registers full of codes, two
// dimensions of each. All of two such panels (4 KB with AVX2 and D = 128) and a block of 24 rows (6 KB) share the first cache.
// Of the N x K scores only the smallest of every 8 codes is kept, 3 K floats per thread, which stay in the second.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

// Messages are strings before they reach TORCH_CHECK: where a toolchain links a second libstdc++ into this library, a number
// that goes through a stream ends in a crash instead of an error.

#ifndef WITH_CUDA

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

constexpr int OCTET = 8;              // codes that follow each other, and share a bound and a smallest score
constexpr int MR = 6;                 // rows that meet two registers of codes at once: the sums take 12 of 16 registers
constexpr int ROWS = 4 * MR;          // rows of a block
constexpr double LENGTH = INT16_MAX;  // to which rows and codes are scaled

// The contract knows no flushing of denormals, whatever this thread was told (torch.set_flush_denormal, -ffast-math).
struct KeepDenormals {
#ifdef __x86_64__
  unsigned before = _mm_getcsr();
  KeepDenormals() { _mm_setcsr(before & ~0x8040u); }
  ~KeepDenormals() { _mm_setcsr(before); }
#endif
};

template <class F>
void in_parallel(int64_t n, int64_t grain, const F& work) {
  at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
    const KeepDenormals guard;
    work(begin, end);
  });
}

template <class Real>
bool all_finite(const Real* v, int64_t n) {
  Real zero = 0;  // a sum of v - v is NaN if any v is infinite or NaN
#pragma omp simd reduction(+ : zero)
  for (int64_t i = 0; i < n; ++i) zero += v[i] - v[i];
  return zero == 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// The codebook, packed

#define INLINE [[gnu::always_inline]] inline  // into one function for each instruction set: see `search_here`

using Pair = int32_t __attribute__((may_alias));  // two int16, moved together

struct Rounded { double length, moved; };  // the vector's, and how far rounding has moved it

// A vector, scaled to LENGTH and rounded toward zero -> out. One so short or so long that its squares leave float64 becomes 0:
// see `unit` below.
INLINE Rounded round_to_int16(const std::vector<double>& v, int16_t* out) {
  double square = 0, lost = 0;
#pragma omp simd reduction(+ : square)
  for (size_t d = 0; d < v.size(); ++d) square += v[d] * v[d];
  const double length = std::sqrt(square), scale = length > 0x1p-500 && length < INFINITY ? LENGTH / length : 0;
#pragma omp simd reduction(+ : lost)
  for (size_t d = 0; d < v.size(); ++d) {
    const double exact = scale > 0 ? v[d] * scale : 0;
    out[d] = static_cast<int16_t>(exact);
    lost += (exact - out[d]) * (exact - out[d]);
  }
  return {length, std::sqrt(lost) * (length / LENGTH)};
}

// Where a code lies for the screen. The first codes of 8 octets come first, then the second ones, and so on: so the smallest
// score of each octet is the smallest in one place of eight vectors of 8, and comes for 8 octets at a time.
inline int64_t place(int64_t k) { return k / 64 * 64 + k % 8 * 8 + k / 8 % 8; }

template <class Real>  // float or double
struct Codebook {
  int64_t K, D, pairs, octets;       // a multiple of 8 octets
  Tensor as_given, as_integers;      // [octet][D][8], which the certificate compares; [place / lanes][pair][lane][2]: the screen
  const Real* raw;
  int16_t* screen;
  std::vector<double> mean;          // of the codes. Any shift would do; this one makes the numbers small
  double unit = 0;                   // the largest |c - mean|. What follows is measured in it, so that nothing overflows
  std::vector<float> square, scale;  // [place] |c - mean|^2, and what 1 in its integers stands for
  std::vector<float> length, moved;  // [octet] the largest |c - mean|, and how far rounding has moved them at most

  Codebook(const Tensor& codebook, int lanes)  // [K, D], contiguous; codes that a register holds
      : K(codebook.size(0)), D(codebook.size(1)), pairs((D + 1) / 2), octets((K + 63) / 64 * 8),
        as_given(at::empty({octets, D, OCTET}, codebook.options())),
        as_integers(at::empty({octets * OCTET / lanes, pairs, lanes, 2}, codebook.options().dtype(at::kShort))),
        raw(as_given.const_data_ptr<Real>()), screen(as_integers.mutable_data_ptr<int16_t>()), mean(D), square(octets * OCTET),
        scale(octets * OCTET), length(octets), moved(octets) {
    const Real* codes = codebook.const_data_ptr<Real>();
    Real* const given = as_given.mutable_data_ptr<Real>();
    TORCH_CHECK_VALUE(all_finite(codes, K * D), "codebook holds a non-finite value; nearest_code needs finite numbers");
    for (int64_t k = 0; k < K; ++k)
      for (int64_t d = 0; d < D; ++d) mean[d] += codes[k * D + d] * (1.0 / K);
    std::vector<Rounded> rounded(octets * OCTET);
    in_parallel(octets, 8, [&](int64_t begin, int64_t end) {
      std::vector<double> v(D);
      std::vector<int16_t> whole(pairs * 2);
      for (int64_t k = begin * OCTET; k < end * OCTET; ++k) {
        const Real* code = codes + std::min(k, K - 1) * D;  // the last octets are filled up with copies of the last code
        for (int64_t d = 0; d < D; ++d) given[(k / OCTET * D + d) * OCTET + k % OCTET] = code[d], v[d] = code[d] - mean[d];
        rounded[k] = round_to_int16(v, whole.data());
        const auto* from = reinterpret_cast<const Pair*>(whole.data());
        auto* to = reinterpret_cast<Pair*>(screen) + place(k) / lanes * pairs * lanes + place(k) % lanes;
        for (int64_t d = 0; d < pairs; ++d) to[d * lanes] = from[d];
      }
    });
    for (const Rounded& code : rounded) unit = std::max(unit, code.length);
    if (!(unit > 0x1p-400 && unit < 0x1p400)) unit = NAN;  // and so every row's length, and every bound
    for (int64_t k = 0; k < octets * OCTET; ++k) {
      const auto c = static_cast<float>(rounded[k].length / unit);
      square[place(k)] = c * c, scale[place(k)] = static_cast<float>(rounded[k].length / unit / LENGTH);
      length[k / OCTET] = std::max(length[k / OCTET], c);
      moved[k / OCTET] = std::max(moved[k / OCTET], static_cast<float>(rounded[k].moved / unit));
    }
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Screen and certificate

// How far a score may be from its true value, for a row of length X, which rounding has moved by dX, and codes of lengths up to
// C, moved by up to dC. As both were shortened, x.c is off by at most dX C + X dC, and the score holds it twice. Floating point
// rounds lengths, squares and the score, each to a few times 2^-24 of C (X + C); and so does the contract itself, which decides
// where a row is far from all codes. What underflow loses is below 2^-90. C is at most 1, and X^2 overflows long before any
// score can: the bound is infinite or NaN then, and rules nothing out.
INLINE float error_bound(float X, float dX, float C, float dC, int64_t D) {
  return 2 * (dX * C + X * dC) + 0x1p-18f * (C * (X + C)) + (D + 4) * 0x1p-50f * (X * X) + 0x1p-90f;
}

// Pairs, or sums, that one instruction takes. Every processor has the first kind; an intrinsic for the others would want the
// same of every processor that runs this code.
using Four = int32_t __attribute__((vector_size(16), may_alias));
using Eight = int32_t __attribute__((vector_size(32), may_alias));
using Sixteen = int32_t __attribute__((vector_size(64), may_alias));

INLINE void multiply_add(Four& sum, const Four& x, const Four& c) {  // of every pair, x[0] c[0] + x[1] c[1]
#ifdef __SSE2__
  sum += Four(_mm_madd_epi16(__m128i(x), __m128i(c)));
#else
  sum += (x << 16 >> 16) * (c << 16 >> 16) + (x >> 16) * (c >> 16);
#endif
}
#ifdef __x86_64__
INLINE void multiply_add(Eight& sum, const Eight& x, const Eight& c) {
  Eight product;
  asm("vpmaddwd %2, %1, %0" : "=x"(product) : "x"(x), "x"(c));
  sum += product;
}
INLINE void multiply_add(Sixteen& sum, const Sixteen& x, const Sixteen& c) {
  Sixteen result = sum;  // of its own: a sum that asm changes would not stay in its register
  asm("vpdpwssd %2, %1, %0" : "+v"(result) : "v"(x), "v"(c));
  sum = result;
}
#endif

// 6 rows x [6][pairs][2] against two registers of codes, from place p on, all sums in registers; then low [6][octet], the
// smallest scores so far. `scale`: twice what 1 in the integers of a row stands for.
template <class Register, class Real>
INLINE void screen_tile(const int16_t* x, const float* scale, const Codebook<Real>& codes, int64_t p, float* low) {
  constexpr int LANES = sizeof(Register) / sizeof(Pair);
  const int64_t pairs = codes.pairs;
  const auto* c = reinterpret_cast<const Register*>(&codes.screen[p * pairs * 2]);
  Register sum[MR][2] = {};
  for (int64_t d = 0; d < pairs; ++d, ++c) {
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Register xi = reinterpret_cast<const Pair*>(x)[i * pairs + d] - Register{};  // the same pair everywhere
      multiply_add(sum[i][0], xi, c[0]);
      multiply_add(sum[i][1], xi, c[pairs]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
    int32_t product[2 * LANES];
    std::memcpy(product, sum[i], sizeof(product));
    float* least = low + i * codes.octets + p / 64 * 8;  // of 8 octets
    for (int q = 0; q < 2 * LANES; q += 8) {
      const float *square = &codes.square[p + q], *unit = &codes.scale[p + q];
      const bool first = (p + q) % 64 == 0;
#pragma omp simd
      for (int j = 0; j < 8; ++j)
        least[j] = std::min(first ? INFINITY : least[j],
                            square[j] - scale[i] * unit[j] * static_cast<float>(product[q + j]));
    }
  }
}

// The contract's number for a row and the codes of an octet.
template <class Real>
INLINE void certify(const Real* x, const Real* c, int64_t D, double* s) {
  std::fill_n(s, OCTET, 0.0);
  for (int64_t d = 0; d < D; ++d, c += OCTET) {
#pragma omp simd
    for (int j = 0; j < OCTET; ++j) {
      const double e = static_cast<double>(x[d]) - static_cast<double>(c[j]);
      s[j] += e * e;
    }
  }
}

// x [rows][D], rows at most 24 -> idx, distance [rows]
template <class Register, class Real>
INLINE void search(const Codebook<Real>& codebook, const Real* x, int rows, int64_t* idx, double* distance) {
  constexpr int LANES = sizeof(Register) / sizeof(Pair);
  const int64_t K = codebook.K, D = codebook.D, pairs = codebook.pairs, octets = codebook.octets;
  std::vector<int16_t> whole(ROWS * pairs * 2);  // [24][pairs][2] the rows; zeros where there is none
  std::vector<float> low(ROWS * octets);         // [24][octet] their smallest scores
  std::vector<double> v(D);                      // a row without the mean
  float length[ROWS], moved[ROWS], scale[ROWS] = {};
  for (int row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < D; ++d) v[d] = x[row * D + d] - codebook.mean[d];
    const Rounded rounded = round_to_int16(v, &whole[row * pairs * 2]);
    length[row] = static_cast<float>(rounded.length / codebook.unit);
    moved[row] = static_cast<float>(rounded.moved / codebook.unit);
    scale[row] = static_cast<float>(2 * rounded.length / codebook.unit / LENGTH);
  }
  for (int64_t p = 0; p < octets * OCTET; p += 2 * LANES)
    for (int row = 0; row < rows; row += MR)
      screen_tile<Register>(&whole[row * pairs * 2], &scale[row], codebook, p, &low[row * octets]);
  for (int row = 0; row < rows; ++row) {
    float limit[8], *lowest = &low[row * octets];
    std::fill_n(limit, 8, INFINITY);
    for (int64_t octet = 0; octet < octets; octet += 8) {
#pragma omp simd
      for (int j = 0; j < 8; ++j) {
        const float E = error_bound(length[row], moved[row], codebook.length[octet + j], codebook.moved[octet + j], D);
        limit[j] = std::min(limit[j], lowest[octet + j] + E);
        lowest[octet + j] -= E;
      }
    }
    const float highest = *std::min_element(limit, limit + 8);  // no code whose score is certainly above can win
    idx[row] = -1;
    for (int64_t first = 0; first < octets; first += 8) {
      int open = 0;
#pragma omp simd reduction(| : open)
      for (int j = 0; j < 8; ++j) open |= !(lowest[first + j] > highest);  // NaN rules nothing out
      for (int64_t octet = first; octet < first + 8 && open; ++octet) {
        if (octet * OCTET >= K || lowest[octet] > highest) continue;
        double s[OCTET];
        certify(&x[row * D], &codebook.raw[octet * D * OCTET], D, s);
        for (int64_t k = octet * OCTET; k < std::min((octet + 1) * OCTET, K); ++k)
          if (idx[row] < 0 || s[k % OCTET] < distance[row]) idx[row] = k, distance[row] = s[k % OCTET];
      }
    }
  }
}

// The same code for three instruction sets, chosen on the machine that runs it: a binary may be cached and copied.
// HIPART_LANES=4 or 8 keeps it from the wider ones.
template <class Real>
void search_portable(const Codebook<Real>& codebook, const Real* x, int rows, int64_t* idx, double* distance) {
  search<Four>(codebook, x, rows, idx, distance);
}

#ifdef __x86_64__
template <class Real>
[[gnu::target("avx2")]] void search_avx2(const Codebook<Real>& codebook, const Real* x, int rows, int64_t* idx, double* distance) {
  search<Eight>(codebook, x, rows, idx, distance);
}

template <class Real>
[[gnu::target("avx512bw,avx512vnni")]] void search_avx512(const Codebook<Real>& codebook, const Real* x, int rows, int64_t* idx,
                                                          double* distance) {
  search<Sixteen>(codebook, x, rows, idx, distance);
}
#endif

int lanes_here() {
  const char* wanted = std::getenv("HIPART_LANES");
  const int most = wanted ? std::atoi(wanted) : 16;
  TORCH_CHECK_VALUE(most == 4 || most == 8 || most == 16, "HIPART_LANES must be 4, 8 or 16, found " + std::string(wanted));
#ifdef __x86_64__
  if (most == 16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni")) return 16;
  if (most >= 8 && __builtin_cpu_supports("avx2")) return 8;
#endif
  return 4;
}

template <class Real>
void search_all(const Tensor& rows, const Tensor& codes, int64_t* idx, double* distance) {
  const int64_t N = rows.size(0), D = rows.size(1);
  const Real* x = rows.const_data_ptr<Real>();
  const int lanes = lanes_here();
  const Codebook<Real> codebook(codes, lanes);
  auto search = search_portable<Real>;
#ifdef __x86_64__
  if (lanes > 4) search = lanes == 8 ? search_avx2<Real> : search_avx512<Real>;
#endif
  in_parallel((N + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * ROWS; first < std::min(end * ROWS, N); first += ROWS) {
      const int64_t last = std::min(first + ROWS, N);
      for (int64_t row = first; row < last; ++row)
        TORCH_CHECK_VALUE(all_finite(x + row * D, D),
                          "x holds a non-finite value in row " + std::to_string(row) + "; nearest_code needs finite numbers");
      search(codebook, x + first * D, static_cast<int>(last - first), idx + first, distance + first);
    }
  });
}

// x [N, D], codebook [K, D] -> idx [N], d64 [N]; the screen and its certificate need the distance anyway
std::tuple<Tensor, Tensor> quantize_cpu(const Tensor& x, const Tensor& codebook, bool with_distance) {
  TORCH_CHECK_VALUE(x.dim() == 2 && codebook.dim() == 2 && x.size(1) == codebook.size(1) && codebook.numel() > 0 &&
                        x.scalar_type() == codebook.scalar_type(), "hipart::quantize needs x [N, D] and codebook [K, D]");
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;  // bfloat16 and float16 are widened exactly
  const Tensor rows = x.to(type).contiguous(), codes = codebook.to(type).contiguous();
  Tensor idx = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  Tensor distance = at::empty({x.size(0)}, x.options().dtype(at::kDouble));
  const auto search = type == at::kDouble ? search_all<double> : search_all<float>;
  search(rows, codes, idx.mutable_data_ptr<int64_t>(), distance.mutable_data_ptr<double>());
  return {idx, with_distance ? distance : at::empty({0}, distance.options())};
}

// ---------------------------------------------------------------------------------------------------------------------
// EMA codebook update. Every thread owns some of the codes, goes through all rows in order, and adds up those of its own: no
// two threads write to one sum, and each sum runs over ascending rows, so any number of threads gives the same bits.

// x [N, D], idx [N] -> n [K], s [K, D]
std::tuple<Tensor, Tensor> code_statistics_cpu(const Tensor& x, const Tensor& idx, int64_t K) {
  TORCH_CHECK_VALUE(x.dim() == 2 && idx.dim() == 1 && idx.size(0) == x.size(0) && idx.scalar_type() == at::kLong && K > 0,
                    "hipart::code_statistics needs x [N, D] and idx [N] int64");
  const Tensor rows = x.to(at::kFloat).contiguous(), codes = idx.contiguous();
  const int64_t N = x.size(0), D = x.size(1), threads = at::get_num_threads();
  Tensor n = at::empty({K}, rows.options()), s = at::zeros({K, D}, rows.options());
  const auto *row = rows.const_data_ptr<float>();
  const auto *code = codes.const_data_ptr<int64_t>();
  auto *count = n.mutable_data_ptr<float>(), *sum = s.mutable_data_ptr<float>();
  std::vector<int64_t> rows_of(K);
  for (int64_t i = 0; i < N; ++i) {
    TORCH_CHECK_VALUE(code[i] >= 0 && code[i] < K, "code_statistics: idx must lie in [0, " + std::to_string(K) + "), found " +
                                                       std::to_string(code[i]) + " in row " + std::to_string(i));
    ++rows_of[code[i]];
  }
  for (int64_t k = 0; k < K; ++k) count[k] = static_cast<float>(rows_of[k]);
  in_parallel(K, (K + threads - 1) / threads, [&](int64_t first, int64_t last) {
    for (int64_t i = 0; i < N; ++i)
      if (code[i] >= first && code[i] < last)
        for (int64_t d = 0; d < D; ++d) sum[code[i] * D + d] += row[i * D + d];
  });
  return {n, s};
}

// One pass over the three arrays; see ema_apply_ in reference.py for the equations. Returns how many codes restarted.
Tensor ema_apply_cpu(Tensor& codebook, Tensor& count, Tensor& total, const Tensor& n, const Tensor& s,
                     const std::optional<Tensor>& candidates, double decay, double eps, double restart_below) {
  const int64_t K = codebook.size(0), D = codebook.numel() / std::max<int64_t>(K, 1);
  const Tensor* const all[] = {&codebook, &count, &total, &n, &s, candidates ? &*candidates : &s};
  for (const Tensor* t : all)
    TORCH_CHECK_VALUE(t->is_contiguous() && t->scalar_type() == at::kFloat && t->size(0) == K &&
                          t->numel() == (t == &count || t == &n ? K : K * D),
                      "hipart::ema_apply_ needs contiguous float32 tensors [K, D] and [K]");
  const KeepDenormals guard;
  auto *c = codebook.mutable_data_ptr<float>(), *running = count.mutable_data_ptr<float>(),
       *sum = total.mutable_data_ptr<float>();
  const auto *now = n.const_data_ptr<float>(), *s_now = s.const_data_ptr<float>(),
             *spare = candidates ? candidates->const_data_ptr<float>() : nullptr;
  const auto keep = static_cast<float>(decay), take = static_cast<float>(1 - decay);
  const auto least = static_cast<float>(restart_below);
  double mass = 0, rows = 0;
  for (int64_t k = 0; k < K; ++k) {
    running[k] = running[k] * keep + now[k] * take;
    mass += running[k], rows += now[k];
  }
  const auto fair = static_cast<float>(rows / K);
  const bool may_restart = spare && rows > 0;
  in_parallel(K, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const double smooth = (running[k] + eps) / (mass + K * eps) * mass;
      const auto divisor = static_cast<float>(std::max<double>(smooth, FLT_MIN));
      const bool dead = may_restart && running[k] < least;
      for (int64_t i = k * D; i < (k + 1) * D; ++i) {
        sum[i] = sum[i] * keep + s_now[i] * take;
        c[i] = sum[i] / divisor;
        if (dead) c[i] = spare[i], sum[i] = spare[i] * fair;
      }
    }
  });
  int64_t restarted = 0;
  for (int64_t k = 0; may_restart && k < K; ++k)
    if (running[k] < least) running[k] = fair, ++restarted;
  for (const Tensor* t : {&codebook, &count, &total}) t->unsafeGetTensorImpl()->bump_version();  // autograd must notice
  Tensor out = at::empty({}, n.options().dtype(at::kLong));
  *out.mutable_data_ptr<int64_t>() = restarted;
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(hipart, CPU, m) {
  m.impl("quantize", &quantize_cpu);
  m.impl("code_statistics", &code_statistics_cpu);
  m.impl("ema_apply_", &ema_apply_cpu);
}

#else  // WITH_CUDA

// ---------------------------------------------------------------------------------------------------------------------
// CUDA: memory, stream and device come from PyTorch, the kernels from quantizer.cu. Nothing here waits for the GPU.

#include <ATen/ops/constant_pad_nd.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "quantizer.h"

namespace {

using at::Tensor;

// Row-major, as quantizer.cu reads it, 16 bytes at a time. What does not lie like that is copied.
Tensor laid_out(const Tensor& t, at::ScalarType type) {
  const Tensor out = t.to(type).contiguous();
  if (out.size(1) % 4) return at::constant_pad_nd(out, {0, 4 - out.size(1) % 4});  // zeros change no distance
  return reinterpret_cast<uintptr_t>(out.const_data_ptr()) % 16 ? out.clone() : out;
}

void check_launch(int error) { TORCH_CHECK(error == 0, "a CUDA kernel of hipart failed to start: error " + std::to_string(error)); }

template <class T>
void search(const Tensor& x, const Tensor& codebook, Tensor& idx, double* distance) {
  const int64_t N = x.size(0), K = codebook.size(0), D = x.size(1);
  const int64_t bytes = sizeof(T) == sizeof(float) ? hipart::nearest_code_cuda_scratch(N, K, D) : 0;
  Tensor scratch = at::empty({bytes}, x.options().dtype(at::kByte));
  check_launch(hipart::nearest_code_cuda(x.const_data_ptr<T>(), codebook.const_data_ptr<T>(), N, K, D, scratch.mutable_data_ptr(),
                                         idx.mutable_data_ptr<int64_t>(), distance, c10::cuda::getCurrentCUDAStream()));
}

std::tuple<Tensor, Tensor> quantize_cuda(const Tensor& x, const Tensor& codebook, bool with_distance) {
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK_VALUE(x.dim() == 2 && codebook.dim() == 2 && x.size(1) == codebook.size(1) && codebook.numel() > 0 &&
                        x.scalar_type() == codebook.scalar_type() && x.device() == codebook.device() &&
                        codebook.size(0) <= INT32_MAX - 256,
                    "hipart::quantize needs x [N, D] and codebook [K, D] on one GPU, with K below 2^31 - 256");
  const auto type = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;  // bfloat16 and float16 are widened exactly
  Tensor idx = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  Tensor distance = at::empty({with_distance ? x.size(0) : 0}, x.options().dtype(at::kDouble));
  const Tensor rows = laid_out(x, type), codes = laid_out(codebook, type);
  double* d = with_distance ? distance.mutable_data_ptr<double>() : nullptr;
  if (type == at::kDouble)
    search<double>(rows, codes, idx, d);
  else
    search<float>(rows, codes, idx, d);
  return {idx, distance};
}

// A code outside [0, K) is not counted.
std::tuple<Tensor, Tensor> code_statistics_cuda(const Tensor& x, const Tensor& idx, int64_t K) {
  const c10::cuda::CUDAGuard guard(x.device());
  TORCH_CHECK_VALUE(x.dim() == 2 && idx.dim() == 1 && idx.size(0) == x.size(0) && idx.scalar_type() == at::kLong && K > 0 &&
                        x.device() == idx.device(), "hipart::code_statistics needs x [N, D] and idx [N] int64 on one GPU");
  const Tensor rows = x.to(at::kFloat).contiguous(), index = idx.contiguous();
  Tensor n = at::empty({K}, x.options().dtype(at::kFloat)), s = at::empty({K, x.size(1)}, x.options().dtype(at::kFloat));
  check_launch(hipart::code_statistics_cuda(rows.const_data_ptr<float>(), index.const_data_ptr<int64_t>(), x.size(0), K, x.size(1),
                                            n.mutable_data_ptr<float>(), s.mutable_data_ptr<float>(),
                                            c10::cuda::getCurrentCUDAStream()));
  return {n, s};
}

}  // namespace

TORCH_LIBRARY_IMPL(hipart, CUDA, m) {
  m.impl("quantize", &quantize_cuda);
  m.impl("code_statistics", &code_statistics_cuda);
}

#endif
