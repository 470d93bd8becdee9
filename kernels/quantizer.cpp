// The compiled ops: nearest code, code statistics and EMA update on the CPU, and their registration. Built a second time with
// WITH_CUDA it is only its last part, the thin layer that hands CUDA tensors to quantizer.cu. reference.py states the
// contract; this file meets it bit for bit.
//
// How a cheap screen can give an exact answer. For a row x and a code c, with both shifted by the same vector,
//     |x - c|^2 = |x|^2 + (|c|^2 - 2 x.c),
// and |x|^2 is the same for all codes. A float32 product gives the bracket, the *score*, up to an error whose bound E we
// can state (quantizer.h). So if score(a) - E(a) > score(b) + E(b), code a has lost, for certain. What is left, as a rule two
// codes of 2048, is compared in float64 exactly as the contract says. A worse screen costs time, never the answer.
//
// Where the bytes go: the codebook is packed once into *panels* of 16 codes, [panel][dimension][code], so that one step of
// the inner loop reads 16 consecutive floats. A panel (8 KB at D = 128) and a block of 24 rows (12 KB) share the first cache.
// Of the N x K scores only the smaller of every two is stored, 24 x K / 2 floats per thread, which stay in the second: one
// per panel would be fewer, but a minimum across a register costs more than the store.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <string>

#include "quantizer.h"

// Messages are strings before they reach TORCH_CHECK: where a toolchain links a second libstdc++ into this library, a number
// that goes through a stream ends in a crash instead of an error.

#ifndef WITH_CUDA

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <type_traits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace {

using at::Tensor;

constexpr int MR = 6, NR = 16;  // 6 x 16 accumulators fill 12 of the 16 AVX2 registers; 2 hold codes, 1 the row's value
constexpr int ROWS = 4 * MR;    // rows per block
constexpr int LANES = NR / 2;   // scores that a panel keeps of a row: code j or j + 8, whichever is nearer
constexpr int64_t SPAN = 8;     // panels that are ruled out together

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

// ---------------------------------------------------------------------------------------------------------------------
// Input of any type and stride becomes contiguous rows of `Wide`: float, or double for float64 input.

template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Scratch memory that starts on a cache line and is not cleared first, unlike std::vector's.
template <class T>
struct Buffer {
  Tensor memory;
  T* data;

  explicit Buffer(int64_t n)
      : memory(at::empty({n * static_cast<int64_t>(sizeof(T))}, at::kByte)), data(reinterpret_cast<T*>(memory.mutable_data_ptr())) {}
  T& operator[](int64_t i) const { return data[i]; }
};

template <class T>
struct View {
  const T* data;
  int64_t rows, columns, row_stride, column_stride;

  explicit View(const Tensor& t)
      : data(t.const_data_ptr<T>()), rows(t.size(0)), columns(t.size(1)), row_stride(t.stride(0)), column_stride(t.stride(1)) {}

  // Copies a row and says whether all of it is finite: a sum of v - v is 0, or NaN if any v is infinite or NaN.
  bool load(int64_t row, Wide<T>* out) const {
    const T* from = data + row * row_stride;
    if (column_stride == 1)
      for (int64_t d = 0; d < columns; ++d) out[d] = static_cast<Wide<T>>(from[d]);
    else
      for (int64_t d = 0; d < columns; ++d) out[d] = static_cast<Wide<T>>(from[d * column_stride]);
    Wide<T> zero = 0;
#pragma omp simd reduction(+ : zero)
    for (int64_t d = 0; d < columns; ++d) zero += out[d] - out[d];
    return zero == 0;
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// The codebook, packed

template <class T>
struct Codebook {
  int64_t K, D, panels;
  Buffer<Wide<T>> rows, raw;  // [panel][16][D] and [panel][D][16] as given: the certificate compares two codes, or a panel
  Buffer<float> screen;       // [panel][D][16] shifted by `mean` and rounded to float32: what the screen multiplies
  std::vector<float> square;  // [panel][16] |c|^2 of those
  std::vector<float> norm;    // [panel] largest |c|
  std::vector<double> mean;   // any shift would do; this one makes the numbers small, hence their rounding errors

  explicit Codebook(const View<T>& codes)
      : K(codes.rows), D(codes.columns), panels((K + NR - 1) / NR), rows(panels * D * NR), raw(panels * D * NR),
        screen(std::is_same_v<T, double> ? 0 : panels * D * NR), mean(D) {
    std::vector<char> finite(panels);
    in_parallel(panels, 8, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        finite[p] = true;
        for (int j = 0; j < NR; ++j) {  // the last panel is filled up with copies of the last code, which never win
          Wide<T>* row = &rows[(p * NR + j) * D];
          finite[p] &= codes.load(std::min(p * NR + j, K - 1), row);
          for (int64_t d = 0; d < D; ++d) raw[(p * D + d) * NR + j] = row[d];
        }
      }
    });
    TORCH_CHECK_VALUE(std::all_of(finite.begin(), finite.end(), [](char ok) { return ok; }),
                      "codebook holds a non-finite value; nearest_code needs finite numbers");
    if constexpr (!std::is_same_v<T, double>) prepare_screen();
  }

  void prepare_screen() {
    const KeepDenormals guard;
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t d = 0; d < D; ++d) {
        double sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int j = 0; j < NR; ++j) sum += raw[(p * D + d) * NR + j];
        mean[d] += sum / (panels * NR);
      }
    square.resize(panels * NR), norm.resize(panels);
    in_parallel(panels, 8, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        double sum[NR] = {};
        for (int64_t d = 0; d < D; ++d)
          for (int j = 0; j < NR; ++j) {
            const double c = raw[(p * D + d) * NR + j] - mean[d];
            screen[(p * D + d) * NR + j] = static_cast<float>(c);
            sum[j] += c * c;
          }
        for (int j = 0; j < NR; ++j) square[p * NR + j] = static_cast<float>(sum[j]);
        norm[p] = static_cast<float>(std::sqrt(*std::max_element(sum, sum + NR)));
      }
    });
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Screen and certificate. All that is marked so is inlined into one function per instruction set (see `search_here`).

#define INLINE [[gnu::always_inline]] inline

INLINE float multiply_add(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// Scores of 6 rows x [D][6] against one panel c [D][16]; for every row the smaller of every two, low [8].
INLINE void screen_tile(const float* x, const float* c, int64_t D, const float* square, float* low, int64_t stride) {
  float acc[MR][NR];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
#pragma omp simd
    for (int j = 0; j < NR; ++j) acc[i][j] = 0;
  }
  for (int64_t d = 0; d < D; ++d, x += MR, c += NR) {
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
#pragma omp simd
      for (int j = 0; j < NR; ++j) acc[i][j] = multiply_add(x[i], c[j], acc[i][j]);
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
#pragma omp simd
    for (int j = 0; j < LANES; ++j)
      low[i * stride + j] = std::min(square[j] - 2 * acc[i][j], square[j + LANES] - 2 * acc[i][j + LANES]);
  }
}

#ifdef __x86_64__
// The same with the accumulators in registers from the first step to the last: compilers leave those above in memory before and
// after the loop, which costs a tenth.
__attribute__((target("avx2,fma"), noinline)) void screen_tile_avx2(const float* x, const float* c, int64_t D, const float* square,
                                                                    float* low, int64_t stride) {
  __m256 acc[MR][2];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) acc[i][0] = acc[i][1] = _mm256_setzero_ps();
  for (int64_t d = 0; d < D; ++d, x += MR, c += NR) {
    const __m256 c0 = _mm256_loadu_ps(c), c1 = _mm256_loadu_ps(c + LANES);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const __m256 xi = _mm256_broadcast_ss(x + i);
      acc[i][0] = _mm256_fmadd_ps(xi, c0, acc[i][0]);
      acc[i][1] = _mm256_fmadd_ps(xi, c1, acc[i][1]);
    }
  }
  const __m256 two = _mm256_set1_ps(2), s0 = _mm256_loadu_ps(square), s1 = _mm256_loadu_ps(square + LANES);
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
    _mm256_storeu_ps(low + i * stride, _mm256_min_ps(_mm256_fnmadd_ps(two, acc[i][0], s0), _mm256_fnmadd_ps(two, acc[i][1], s1)));
}
#endif

INLINE void take(double s, int64_t k, int64_t K, int64_t& idx, double& best) {
  if (k < K && (idx < 0 || s < best || (s == best && k < idx))) idx = k, best = s;
}

// The contract's number for one row and two codes, each in one piece of memory.
template <class W>
INLINE void certify_pair(const W* x, const W* a, const W* b, int64_t D, double& s, double& t) {
  s = t = 0;
  for (int64_t d = 0; d < D; ++d) {
    const double e = static_cast<double>(x[d]) - static_cast<double>(a[d]);
    const double f = static_cast<double>(x[d]) - static_cast<double>(b[d]);
    s += e * e;
    t += f * f;
  }
}

// The same for the 16 codes of a panel.
template <class W>
INLINE void certify_panel(const W* x, const W* c, int64_t D, double* s) {
  std::fill_n(s, NR, 0.0);
  for (int64_t d = 0; d < D; ++d, c += NR) {
#pragma omp simd
    for (int j = 0; j < NR; ++j) {
      const double e = static_cast<double>(x[d]) - static_cast<double>(c[j]);
      s[j] += e * e;
    }
  }
}

// One block of at most 24 rows: scratch memory and the search.
template <class T>
struct Block {
  Buffer<Wide<T>> raw;  // [24][D]
  Buffer<float> tiles;  // [4][D][6] the rows as the screen reads them, shifted and rounded
  int64_t stride;       // of a row of scores: off the powers of two, which would put all rows into the same cache lines
  Buffer<float> score;  // [24][panels][8]
  Buffer<float> error;  // [panels]
  Buffer<float> below;  // [panels / 8] a bound below all scores of a span

  Block(int64_t D, int64_t panels)
      : raw(ROWS * D), tiles(ROWS * D), stride(panels * LANES + 2 * NR), score(ROWS * stride), error(panels),
        below((panels + SPAN - 1) / SPAN) {}

  template <auto Tile>
  INLINE void search(const Codebook<T>& codebook, int rows, int64_t* idx, double* distance) {
    constexpr bool everything = std::is_same_v<T, double>;  // float32 cannot screen float64
    const int64_t D = codebook.D, panels = codebook.panels;
    const hipart::Bound bound(D);
    float norm[ROWS];
    for (int row = 0; row < rows && !everything; ++row) {
      float* tile = &tiles[row / MR * MR * D + row % MR];
      double sum = 0;
      for (int64_t d = 0; d < D; ++d) {
        const double v = raw[row * D + d] - codebook.mean[d];
        sum += v * v;
        tile[d * MR] = static_cast<float>(v);
      }
      norm[row] = static_cast<float>(std::sqrt(sum));
    }
    for (int64_t p = 0; p < panels && !everything; ++p)
      for (int row = 0; row < rows; row += MR)
        Tile(&tiles[row * D], &codebook.screen[p * D * NR], D, &codebook.square[p * NR],
             &score[row * stride + p * LANES], stride);
    for (int row = 0; row < rows; ++row) {
      const float* low = &score[row * stride];
      float limit = INFINITY, *E = error.data;
#pragma omp simd
      for (int64_t p = 0; p < (everything ? 0 : panels); ++p) E[p] = bound(norm[row], codebook.norm[p]);
      for (int64_t first = 0; first < panels; first += SPAN) {  // one look at every score: the limit, and what each span offers
        const int64_t last = std::min(first + SPAN, panels);
        float least[LANES], worst = everything ? INFINITY : 0;
        std::fill_n(least, LANES, INFINITY);
        for (int64_t p = first; p < last && !everything; ++p) {
          worst = E[p] <= worst ? worst : E[p] < INFINITY ? E[p] : INFINITY;  // NaN, too, is infinite
#pragma omp simd
          for (int j = 0; j < LANES; ++j) least[j] = std::min(least[j], low[p * LANES + j] + E[p]);
        }
        const float above = *std::min_element(least, least + LANES);
        limit = std::min(limit, above);
        below[first / SPAN] = worst < INFINITY ? above - 2 * worst : -INFINITY;
      }
      idx[row] = -1;
      for (int64_t first = 0; first < panels; first += SPAN) {
        if (below[first / SPAN] > limit) continue;  // most spans are ruled out at once
        for (int64_t p = first; p < std::min(first + SPAN, panels); ++p) {
          const Wide<T>* x = &raw[row * D];
          int open = everything || !(E[p] < INFINITY) ? LANES : 0;  // an infinite or unknown bound rules nothing out
          for (int j = 0; j < LANES && open < LANES; ++j) open += low[p * LANES + j] - E[p] <= limit;
          double s[NR];
          if (open > 2) {
            certify_panel(x, &codebook.raw[p * D * NR], D, s);
            for (int j = 0; j < NR; ++j) take(s[j], p * NR + j, codebook.K, idx[row], distance[row]);
          }
          for (int j = 0; j < LANES && 0 < open && open <= 2; ++j) {
            if (low[p * LANES + j] - E[p] > limit) continue;
            const Wide<T>* c = &codebook.rows[(p * NR + j) * D];
            certify_pair(x, c, c + LANES * D, D, s[0], s[1]);
            take(s[0], p * NR + j, codebook.K, idx[row], distance[row]);
            take(s[1], p * NR + j + LANES, codebook.K, idx[row], distance[row]);
          }
        }
      }
    }
  }
};

// The same code for two instruction sets, chosen on the machine that runs it: a binary may be cached and copied.
template <class T>
void search_portable(Block<T>& block, const Codebook<T>& codebook, int rows, int64_t* idx, double* distance) {
  block.template search<screen_tile>(codebook, rows, idx, distance);
}

#ifdef __x86_64__
template <class T>
__attribute__((target("avx2,fma"))) void search_avx2(Block<T>& block, const Codebook<T>& codebook, int rows, int64_t* idx,
                                                     double* distance) {
  block.template search<screen_tile_avx2>(codebook, rows, idx, distance);
}
#endif

template <class T>
auto search_here() {
#ifdef __x86_64__
  if (!std::getenv("HIPART_PORTABLE") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &search_avx2<T>;
#endif
  return &search_portable<T>;
}

template <class T>
void quantize_typed(const Tensor& x_, const Tensor& codebook_, int64_t* idx, double* distance) {
  const View<T> x(x_);
  const Codebook<T> codebook{View<T>(codebook_)};
  const auto search = search_here<T>();
  in_parallel((x.rows + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    Block<T> block(codebook.D, codebook.panels);
    for (int64_t first = begin * ROWS; first < std::min(end * ROWS, x.rows); first += ROWS) {
      const int rows = static_cast<int>(std::min<int64_t>(ROWS, x.rows - first));
      for (int i = 0; i < rows; ++i)
        TORCH_CHECK_VALUE(x.load(first + i, &block.raw[i * codebook.D]),
                          "x holds a non-finite value in row " + std::to_string(first + i) + "; nearest_code needs finite numbers");
      search(block, codebook, rows, idx + first, distance + first);
    }
  });
}

// x [N, D], codebook [K, D] -> idx [N], d64 [N]; the screen and its certificate need the distance anyway
std::tuple<Tensor, Tensor> quantize_cpu(const Tensor& x, const Tensor& codebook, bool with_distance) {
  TORCH_CHECK_VALUE(x.dim() == 2 && codebook.dim() == 2 && x.size(1) == codebook.size(1) && codebook.numel() > 0 &&
                        x.scalar_type() == codebook.scalar_type(), "hipart::quantize needs x [N, D] and codebook [K, D]");
  Tensor idx = at::empty({x.size(0)}, x.options().dtype(at::kLong));
  Tensor distance = at::empty({x.size(0)}, x.options().dtype(at::kDouble));
  auto *i = idx.mutable_data_ptr<int64_t>();
  auto *d = distance.mutable_data_ptr<double>();
  switch (x.scalar_type()) {
    case at::kFloat: quantize_typed<float>(x, codebook, i, d); break;
    case at::kDouble: quantize_typed<double>(x, codebook, i, d); break;
    case at::kHalf: quantize_typed<at::Half>(x, codebook, i, d); break;
    case at::kBFloat16: quantize_typed<at::BFloat16>(x, codebook, i, d); break;
    default: TORCH_CHECK_TYPE(false, "nearest_code needs a floating dtype");
  }
  return {idx, with_distance ? distance : at::empty({0}, distance.options())};
}

// ---------------------------------------------------------------------------------------------------------------------
// EMA codebook update. Every thread owns some of the codes, goes through all rows in order, and adds up those of its own: no
// two threads write to one sum, and each sum runs over ascending rows, so any number of threads gives the same bits.

template <class T>
void sum_rows(const Tensor& x_, const std::vector<int64_t>& code, const std::vector<int64_t>& rows_before, float* s) {
  const View<T> x(x_);
  const int64_t D = x.columns, threads = at::get_num_threads();
  in_parallel(threads, 1, [&](int64_t begin, int64_t end) {
    auto share = [&](int64_t t) {  // the codes of thread t start where the codes before have their share of the rows
      return std::lower_bound(rows_before.begin(), rows_before.end() - 1, x.rows * t / threads) - rows_before.begin();
    };
    const int64_t first = share(begin), last = end == threads ? static_cast<int64_t>(rows_before.size()) - 1 : share(end);
    for (int64_t i = 0; i < x.rows; ++i) {
      if (code[i] < first || code[i] >= last) continue;
      const T* row = x.data + i * x.row_stride;
      float* sum = s + code[i] * D;
      if (x.column_stride == 1)
        for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<float>(row[d]);
      else
        for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<float>(row[d * x.column_stride]);
    }
  });
}

// x [N, D], idx [N] -> n [K], s [K, D]
std::tuple<Tensor, Tensor> code_statistics_cpu(const Tensor& x, const Tensor& idx, int64_t K) {
  const int64_t N = x.size(0);
  TORCH_CHECK_VALUE(x.dim() == 2 && idx.dim() == 1 && idx.size(0) == N && idx.scalar_type() == at::kLong && K > 0,
                    "hipart::code_statistics needs x [N, D] and idx [N] int64");
  Tensor n = at::empty({K}, x.options().dtype(at::kFloat)), s = at::zeros({K, x.size(1)}, x.options().dtype(at::kFloat));
  const int64_t *from = idx.const_data_ptr<int64_t>(), step = idx.stride(0);
  std::vector<int64_t> code(N), rows_before(K + 1);
  for (int64_t i = 0; i < N; ++i) {
    code[i] = from[i * step];
    TORCH_CHECK_VALUE(code[i] >= 0 && code[i] < K, "code_statistics: idx must lie in [0, " + std::to_string(K) + "), found " +
                                                       std::to_string(code[i]) + " in row " + std::to_string(i));
    ++rows_before[code[i] + 1];
  }
  for (int64_t k = 0; k < K; ++k) {
    n.mutable_data_ptr<float>()[k] = static_cast<float>(rows_before[k + 1]);
    rows_before[k + 1] += rows_before[k];
  }
  auto* sums = s.mutable_data_ptr<float>();
  switch (x.scalar_type()) {
    case at::kFloat: sum_rows<float>(x, code, rows_before, sums); break;
    case at::kDouble: sum_rows<double>(x, code, rows_before, sums); break;
    case at::kHalf: sum_rows<at::Half>(x, code, rows_before, sums); break;
    case at::kBFloat16: sum_rows<at::BFloat16>(x, code, rows_before, sums); break;
    default: TORCH_CHECK_TYPE(false, "code_statistics needs a floating dtype");
  }
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

namespace {

using at::Tensor;

// Row-major, and if `wide`, as quantizer.cu reads it: 16 bytes at a time. What does not lie like that is copied.
Tensor laid_out(const Tensor& t, at::ScalarType type, bool wide) {
  Tensor out = t.to(type).contiguous();
  if (!wide) return out;
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
  const Tensor rows = laid_out(x, type, true), codes = laid_out(codebook, type, true);
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
  const Tensor rows = laid_out(x, at::kFloat, false), index = idx.contiguous();
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
