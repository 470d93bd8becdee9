// The CPU ops: nearest code, code statistics and EMA update, to the contract of reference.py.
//
// How a cheap screen gives an exact answer. Shift a row x and all codes c by one vector. Then
// |x - c|^2 = |x|^2 + (|c|^2 - 2 x.c), and |x|^2 is the same for all codes. A cheap product gives
// the bracket, the *score*, up to an error that has a bound E. If score(a) - E(a) is greater than
// score(b) + E(b), code a has lost for certain. What is left, as a rule eight codes of 2048, is
// compared in float64 exactly as the contract says.
//
// The cheap product is one of integers. Every row and code is scaled to a length of 32767 and
// rounded toward zero, which makes none longer. So each number fits into 16 bits, and no sum of
// products exceeds 2^30 (Cauchy and Schwarz), however large D is. An AVX2 instruction multiplies 16
// such numbers, but 8 of float32; one of AVX-512 VNNI takes 32. Sums of integers are exact. So only
// how far rounding has moved x and c has to be bounded, and that is measured.
//
// Where the bytes go. One step of the inner loop reads two registers of packed codes, and two
// dimensions of each. Two such panels (4 KB with AVX2 and D = 128) and 24 rows (6 KB) share the
// first-level cache. Of N x K scores only the smallest of every 8 codes is kept.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {
// -------------------------------------------------------------------------------------------------
// The search. Up to the next ruler only at::parallel_for is PyTorch's: a test compiles this alone.

constexpr int OCTET = 8;              // neighbouring codes that share a bound and a smallest score
constexpr int MR = 6;                 // rows at once: their sums take 12 of 16 registers
constexpr int ROWS = 4 * MR;          // rows of a block
constexpr double LENGTH = INT16_MAX;  // to which rows and codes are scaled
#define INLINE [[gnu::always_inline]] inline  // into one function for each instruction set

// The contract knows no flushing of denormals, whatever this thread was told before.
struct KeepDenormals {
#ifdef __x86_64__
  unsigned before = _mm_getcsr();
  KeepDenormals() { _mm_setcsr(before & ~0x8040u); }
  ~KeepDenormals() { _mm_setcsr(before); }
#endif
};

using Pair = int32_t __attribute__((may_alias));  // two int16 that are moved together
struct alignas(64) Line { int16_t v[32]; };       // a cache line, or a register of AVX-512
struct Rounded { double length, moved; };         // of a vector; how far rounding has moved it

// Scales a vector to LENGTH and rounds it toward zero.
INLINE Rounded round_to_int16(const std::vector<double>& v, int16_t* out) {
  double square = 0, lost = 0;
#pragma omp simd reduction(+ : square)
  for (size_t d = 0; d < v.size(); ++d) square += v[d] * v[d];
  const double length = std::sqrt(square), scale = length > 0 ? LENGTH / length : 0;
#pragma omp simd reduction(+ : lost)
  for (size_t d = 0; d < v.size(); ++d) {
    const double exact = v[d] * scale;
    out[d] = static_cast<int16_t>(exact);
    lost += (exact - out[d]) * (exact - out[d]);
  }
  return {length, std::sqrt(lost) * (length / LENGTH)};
}

// Where a code lies for the screen. The first codes of 8 octets come first, then the second ones,
// and so on. So the elementwise minimum of 8 vectors of 8 is the smallest score of each octet.
inline int64_t place(int64_t k) { return k / 64 * 64 + k % 8 * 8 + k / 8 % 8; }

struct Codebook {
  int64_t K, D, pairs, octets;       // octets: a multiple of 8
  std::vector<float> as_given;       // [octet][D][8], which the certificate compares
  std::vector<Line> screen;          // int16 [place / lanes][pair][lane][2]
  std::vector<double> mean;          // of the codes; any shift would do, this one makes them short
  double unit = 0;                   // the largest |c - mean|; what follows is measured in it
  std::vector<float> square, scale;  // [place] |c - mean|^2, and what 1 in its integers stands for
  std::vector<float> length, moved;  // [octet] the largest |c - mean|, and how far at most moved

  Codebook(const float* codes, int64_t K, int64_t D, int lanes)
      : K(K), D(D), pairs((D + 1) / 2), octets((K + 63) / 64 * 8), as_given(octets * D * OCTET),
        screen((octets * OCTET * pairs * 2 + 31) / 32), mean(D), square(octets * OCTET),
        scale(octets * OCTET), length(octets), moved(octets) {
    for (int64_t k = 0; k < K; ++k)
      for (int64_t d = 0; d < D; ++d) mean[d] += codes[k * D + d] * (1.0 / K);
    std::vector<Rounded> rounded(octets * OCTET);
    at::parallel_for(0, octets, 8, [&](int64_t begin, int64_t end) {
      const KeepDenormals guard;
      std::vector<double> v(D);
      std::vector<int16_t> whole(pairs * 2);
      for (int64_t k = begin * OCTET; k < end * OCTET; ++k) {
        const float* code = codes + std::min(k, K - 1) * D;  // the last one fills up the octets
        for (int64_t d = 0; d < D; ++d) {
          as_given[(k / OCTET * D + d) * OCTET + k % OCTET] = code[d];
          v[d] = code[d] - mean[d];
        }
        rounded[k] = round_to_int16(v, whole.data());
        const auto* from = reinterpret_cast<const Pair*>(whole.data());
        auto* to = reinterpret_cast<Pair*>(screen.data()) + place(k) / lanes * pairs * lanes;
        for (int64_t d = 0; d < pairs; ++d) to[d * lanes + place(k) % lanes] = from[d];
      }
    });
    for (const Rounded& code : rounded) unit = std::max(unit, code.length);
    if (unit == 0) unit = NAN;  // all codes are equal; NaN rules none of them out
    for (int64_t k = 0; k < octets * OCTET; ++k) {
      const auto c = float(rounded[k].length / unit);
      square[place(k)] = c * c;
      scale[place(k)] = float(rounded[k].length / unit / LENGTH);
      length[k / OCTET] = std::max(length[k / OCTET], c);
      moved[k / OCTET] = std::max(moved[k / OCTET], float(rounded[k].moved / unit));
    }
  }
};

// E: how far a score |c|^2 - 2 x.c may be from the truth, plus what the contract itself rounds. The
// row has length X and was moved by dX; the code has a length of at most C and was moved by at most
// dC. All lengths are those of the shifted vectors, in units in which no C exceeds 1. u is 2^-24.
// 1. int16. With x' and c' for the rounded vectors, x.c - x'.c' = (x - x').c + x'.(c - c') is at
//    most dX C + X dC, as |x'| <= |x|. The score holds it twice. The sum of integers is exact.
// 2. float32. 2 x'.c' is made of two scales, a converted integer and two products: 5 u 2 X C. The
//    square of a rounded length: 3 u C^2. Their difference, and adding or subtracting E: twice
//    u (2 X C + C^2). Together 14 u X C + 5 u C^2, which 16 u C (X + C) covers.
// 3. The contract rounds e = x - c, e e and D sums, each by 2^-53, so its number is off by
//    (D + 3) 2^-53 |x - c|^2. Of |x - c|^2 <= X^2 + 2 X C + C^2 the second term covers all but X^2.
// That it is 2.002 and 2^-52 covers the rounding of E. What underflow loses is far below 2^-90. X^2
// overflows long before any score can: E is infinite or NaN then, and rules nothing out.
INLINE float error_bound(float X, float dX, float C, float dC, int64_t D) {
  const float contract = (D + 4) * 0x1p-52f * (X * X) + 0x1p-90f;
  return 2.002f * (dX * C + X * dC) + 0x1p-20f * (C * (X + C)) + contract;
}

// Pairs, or sums, of one instruction. An intrinsic would want the wider ones of every processor.
using Four = int32_t __attribute__((vector_size(16), may_alias));
using Eight = int32_t __attribute__((vector_size(32), may_alias));
using Sixteen = int32_t __attribute__((vector_size(64), may_alias));

INLINE void multiply_add(Four& sum, const Four& x, const Four& c) {  // x[0] c[0] + x[1] c[1]
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

// 6 rows x [6][pairs][2] meet two registers of codes, from place p on, with all sums in registers.
// Updates low [6][octet], the smallest scores. `scale` is twice what 1 in a row's integers means.
template <class Register>
INLINE void screen_tile(const int16_t* x, const float* scale, const Codebook& codes, int64_t p,
                        float* low) {
  constexpr int LANES = sizeof(Register) / sizeof(Pair);
  const int64_t pairs = codes.pairs;
  const auto* c = reinterpret_cast<const Register*>(codes.screen.data()) + p / LANES * pairs;
  Register sum[MR][2] = {};
  for (int64_t d = 0; d < pairs; ++d, ++c) {
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Register everywhere = reinterpret_cast<const Pair*>(x)[i * pairs + d] - Register{};
      multiply_add(sum[i][0], everywhere, c[0]);
      multiply_add(sum[i][1], everywhere, c[pairs]);
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
                            square[j] - scale[i] * unit[j] * float(product[q + j]));
    }
  }
}

// The contract's number for a row and the codes of an octet.
INLINE void certify(const float* x, const float* c, int64_t D, double* s) {
  std::fill_n(s, OCTET, 0.0);
  for (int64_t d = 0; d < D; ++d, c += OCTET)
#pragma omp simd
    for (int j = 0; j < OCTET; ++j) {
      const double e = double(x[d]) - double(c[j]);
      s[j] += e * e;
    }
}

// x [rows][D], at most 24 rows -> idx, distance [rows]
struct Work { const Codebook& codebook; const float* x; int rows; int64_t* idx; double* distance; };

template <class Register>
INLINE void search(const Work& work) {
  const auto& [codebook, x, rows, idx, distance] = work;
  constexpr int LANES = sizeof(Register) / sizeof(Pair);
  const int64_t K = codebook.K, D = codebook.D, pairs = codebook.pairs, octets = codebook.octets;
  std::vector<int16_t> whole(ROWS * pairs * 2);  // [24][pairs][2] the rows, and zeros after them
  std::vector<float> low(ROWS * octets);         // [24][octet] their smallest scores
  std::vector<double> v(D);                      // a row without the mean
  float length[ROWS], moved[ROWS], scale[ROWS] = {};
  for (int row = 0; row < rows; ++row) {
    for (int64_t d = 0; d < D; ++d) v[d] = x[row * D + d] - codebook.mean[d];
    const Rounded rounded = round_to_int16(v, &whole[row * pairs * 2]);
    length[row] = float(rounded.length / codebook.unit);
    moved[row] = float(rounded.moved / codebook.unit);
    scale[row] = float(2 * rounded.length / codebook.unit / LENGTH);
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
        const float E = error_bound(length[row], moved[row], codebook.length[octet + j],
                                    codebook.moved[octet + j], D);
        limit[j] = std::min(limit[j], lowest[octet + j] + E);
        lowest[octet + j] -= E;
      }
    }
    const float highest = *std::min_element(limit, limit + 8);  // a score above this has lost
    idx[row] = -1;
    for (int64_t first = 0; first < octets; first += 8) {
      int open = 0;
#pragma omp simd reduction(| : open)
      for (int j = 0; j < 8; ++j) open |= !(lowest[first + j] > highest);  // NaN rules nothing out
      for (int64_t octet = first; octet < first + 8 && open; ++octet) {
        if (octet * OCTET >= K || lowest[octet] > highest) continue;
        double s[OCTET];
        certify(&x[row * D], &codebook.as_given[octet * D * OCTET], D, s);
        for (int64_t k = octet * OCTET, j = 0; j < OCTET && k < K; ++j, ++k)
          if (idx[row] < 0 || s[j] < distance[row]) idx[row] = k, distance[row] = s[j];
      }
    }
  }
}

// The same code for three instruction sets. The machine that runs it chooses.
void search_portable(const Work& work) { search<Four>(work); }
#ifdef __x86_64__
[[gnu::target("avx2")]] void search_avx2(const Work& work) { search<Eight>(work); }
[[gnu::target("avx512bw,avx512vnni")]]
void search_avx512(const Work& work) { search<Sixteen>(work); }
#endif

// -------------------------------------------------------------------------------------------------
// The ops. __init__.py has checked what it says to users. Messages are strings before they reach
// TORCH_CHECK: with a second libstdc++ in this library, a number in a stream ends in a crash.

using at::Tensor;

bool all_finite(const float* v, int64_t n) {
  float zero = 0;  // the sum of v - v is NaN if any v is infinite or NaN
#pragma omp simd reduction(+ : zero)
  for (int64_t i = 0; i < n; ++i) zero += v[i] - v[i];
  return zero == 0;
}

// How many codes a register holds, and the search for it. HIPART_LANES=4 or 8 is for tests.
std::pair<int, decltype(&search_portable)> widest_here() {
  const char* wanted = std::getenv("HIPART_LANES");
  const int most = wanted ? std::atoi(wanted) : 16;
  TORCH_CHECK_VALUE(most == 4 || most == 8 || most == 16,
                    "HIPART_LANES must be 4, 8 or 16, found " + std::string(wanted));
#ifdef __x86_64__
  if (most == 16 && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vnni"))
    return {16, search_avx512};
  if (most >= 8 && __builtin_cpu_supports("avx2")) return {8, search_avx2};
#endif
  return {4, search_portable};
}

// x [N, D], codebook [K, D], not float64 -> idx [N], d [N]
std::tuple<Tensor, Tensor> quantize(const Tensor& x, const Tensor& codebook) {
  TORCH_CHECK_VALUE(x.dim() == 2 && codebook.dim() == 2 && x.size(1) == codebook.size(1) &&
                    codebook.numel() > 0 && x.is_cpu() && codebook.is_cpu() &&
                    x.scalar_type() != at::kDouble && codebook.scalar_type() != at::kDouble,
                    "hipart_cpp::quantize needs x [N, D] and codebook [K, D], no float64");
  // bfloat16 and float16 are widened exactly
  const Tensor rows = x.to(at::kFloat).contiguous(), codes = codebook.to(at::kFloat).contiguous();
  const int64_t N = rows.size(0), D = rows.size(1), K = codes.size(0);
  const auto *row = rows.const_data_ptr<float>(), *code = codes.const_data_ptr<float>();
  TORCH_CHECK_VALUE(all_finite(code, K * D),
                    "codebook holds a non-finite value; nearest_code needs finite numbers");
  Tensor idx = at::empty({N}, x.options().dtype(at::kLong));
  Tensor distance = at::empty({N}, x.options().dtype(at::kDouble));
  const auto widest = widest_here();
  const Codebook packed(code, K, D, widest.first);
  at::parallel_for(0, (N + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    const KeepDenormals guard;
    for (int64_t first = begin * ROWS; first < std::min(end * ROWS, N); first += ROWS) {
      const int64_t last = std::min(first + ROWS, N);
      for (int64_t i = first; i < last; ++i)
        TORCH_CHECK_VALUE(all_finite(row + i * D, D), "x holds a non-finite value in row " +
                          std::to_string(i) + "; nearest_code needs finite numbers");
      widest.second({packed, row + first * D, int(last - first),
                     idx.mutable_data_ptr<int64_t>() + first,
                     distance.mutable_data_ptr<double>() + first});
    }
  });
  return {idx, distance};
}

// x [N, D], idx [N] -> n [K], s [K, D]. Every thread owns some of the codes, and goes through all
// rows in order: the same bits for any number of threads.
std::tuple<Tensor, Tensor> code_statistics(const Tensor& x, const Tensor& idx, int64_t K) {
  TORCH_CHECK_VALUE(x.dim() == 2 && idx.dim() == 1 && idx.size(0) == x.size(0) && K > 0 &&
                    idx.scalar_type() == at::kLong && x.is_cpu() && idx.is_cpu(),
                    "hipart_cpp::code_statistics needs x [N, D] and idx [N] int64");
  const Tensor rows = x.to(at::kFloat).contiguous(), codes = idx.contiguous();
  const int64_t N = x.size(0), D = x.size(1), threads = at::get_num_threads();
  Tensor n = at::empty({K}, rows.options()), s = at::zeros({K, D}, rows.options());
  const auto* row = rows.const_data_ptr<float>();
  const auto* code = codes.const_data_ptr<int64_t>();
  std::vector<int64_t> rows_of(K);
  for (int64_t i = 0; i < N; ++i) {
    TORCH_CHECK_VALUE(code[i] >= 0 && code[i] < K, "code_statistics: idx must lie in [0, " +
                      std::to_string(K) + "), found " + std::to_string(code[i]));
    ++rows_of[code[i]];
  }
  std::copy(rows_of.begin(), rows_of.end(), n.mutable_data_ptr<float>());
  auto* const sum = s.mutable_data_ptr<float>();
  at::parallel_for(0, K, (K + threads - 1) / threads, [&](int64_t first, int64_t last) {
    const KeepDenormals guard;
    for (int64_t i = 0; i < N; ++i)
      if (code[i] >= first && code[i] < last)
        for (int64_t d = 0; d < D; ++d) sum[code[i] * D + d] += row[i * D + d];
  });
  return {n, s};
}

// ema_apply_ in reference.py has the equations. Versions are raised, as autograd must notice.
Tensor ema_apply_(const Tensor& codebook, const Tensor& count, const Tensor& total, const Tensor& n,
                  const Tensor& s, const std::optional<Tensor>& candidates, double decay,
                  double eps, double restart_below) {
  const int64_t K = codebook.size(0), D = codebook.numel() / std::max<int64_t>(K, 1);
  for (const Tensor* t : {&codebook, &count, &total, &n, &s, candidates ? &*candidates : &s})
    TORCH_CHECK_VALUE(t->is_cpu() && t->is_contiguous() && t->scalar_type() == at::kFloat &&
                      t->size(0) == K && t->numel() == (t == &count || t == &n ? K : K * D),
                      "hipart_cpp::ema_apply_ needs contiguous float32 tensors [K, D] and [K]");
  const KeepDenormals guard;
  auto *c = codebook.mutable_data_ptr<float>(), *sum = total.mutable_data_ptr<float>();
  auto* running = count.mutable_data_ptr<float>();
  const auto *now = n.const_data_ptr<float>(), *s_now = s.const_data_ptr<float>();
  const float* spare = candidates ? candidates->const_data_ptr<float>() : nullptr;
  const auto keep = float(decay), take = float(1 - decay);
  const auto least = float(restart_below);
  double mass = 0, rows = 0;
  for (int64_t k = 0; k < K; ++k) {
    running[k] = running[k] * keep + now[k] * take;
    mass += running[k], rows += now[k];
  }
  const auto fair = float(rows / K);
  const bool may_restart = spare && rows > 0;
  at::parallel_for(0, K, 16, [&](int64_t begin, int64_t end) {
    const KeepDenormals guard;
    for (int64_t k = begin; k < end; ++k) {
      const double smooth = (running[k] + eps) / (mass + K * eps) * mass;
      const auto divisor = float(std::max(smooth, 0x1p-126));
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
  for (const Tensor& t : {codebook, count, total}) t.unsafeGetTensorImpl()->bump_version();
  return at::empty({}, n.options().dtype(at::kLong)).fill_(restarted);
}

}  // namespace

TORCH_LIBRARY(hipart_cpp, m) {
  m.def("quantize", &quantize);
  m.def("code_statistics", &code_statistics);
  m.def("ema_apply_", &ema_apply_);
}
