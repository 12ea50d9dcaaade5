// Schema and CPU kernel of ucan_fast::_expand_native_, through PyTorch's stable ABI.
//
// y = base + s (z Bᵀ + bias), a few rows and columns at a time: the product stays in registers,
// where its moments are taken and the base is added to it. Only z, B, the base and y touch memory.
// A bfloat16 or float16 base is widened, and y rounded, a few rows at a time in the cache.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <limits>
#include <optional>

#include "rows.h"

namespace ucan_fast {
namespace {

// ---- What is compiled once per instruction set ----

// kTile rows of kVectors vectors. `z` is [k][kRows] and `panel` [k][kVectors vectors]; with kAll
// all rows are there, else `count` of them.
template <int kBytes, int kTile, int kVectors, bool kCounted, bool kAll, typename W>
UCAN_INLINE void add_tile(
    const W* z, const W* panel, int64_t k, const W* const* bases, W* const* outs, int count,
    const W* bias, W scaling, W* abs_sum, W* square_sum) {
  using Vector = typename Vectors<W, kBytes>::type;
  using Bits = typename Vectors<W, kBytes>::bits;
  using Memory = typename Vectors<W, kBytes>::unaligned;
  constexpr int kLanes = kBytes / sizeof(W);
  constexpr auto kMagnitude = std::numeric_limits<typename Vectors<W, kBytes>::Bits>::max();
  Vector product[kTile][kVectors] = {};
  for (int64_t p = 0; p < k; ++p) {
    Vector b[kVectors];
    UCAN_UNROLL
    for (int v = 0; v < kVectors; ++v) {
      b[v] = *reinterpret_cast<const Memory*>(panel + (p * kVectors + v) * kLanes);
    }
    UCAN_UNROLL
    for (int i = 0; i < kTile; ++i) {
      const W factor = z[p * kRows + i];
      UCAN_UNROLL
      for (int v = 0; v < kVectors; ++v) product[i][v] += factor * b[v];
    }
  }
  UCAN_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    const int j = v * kLanes;
    const Vector shift = *reinterpret_cast<const Memory*>(bias + j);
    Vector a = {}, q = {};
    UCAN_UNROLL
    for (int i = 0; i < kTile; ++i) {
      if (!kAll && i >= count) continue;
      if constexpr (kCounted) {
        const Vector value = scaling * product[i][v];
        a += (Vector)((Bits)value & kMagnitude);
        q += value * value;
      }
      const Vector base = *reinterpret_cast<const Memory*>(bases[i] + j);
      *reinterpret_cast<Memory*>(outs[i] + j) = base + scaling * (product[i][v] + shift);
    }
    if constexpr (kCounted) {
      *reinterpret_cast<Memory*>(abs_sum + j) += a;
      *reinterpret_cast<Memory*>(square_sum + j) += q;
    }
  }
}

// The rows of one batch in some panels side by side.
template <typename W>
struct Strip {
  const W* z;  // [k][kRows]
  const W* panels;
  int64_t k, count;       // panels
  const W* bases[kRows];  // of their first column
  W* outs[kRows];
  int rows;
  const W* bias;
  W scaling;
  W* abs_sum;
  W* square_sum;
};

template <int kBytes, int kTile, int kVectors, bool kCounted, typename W>
UCAN_INLINE void add_strip(const Strip<W>& strip) {
  constexpr int64_t kPanel = kVectors * kBytes / sizeof(W);
  for (int64_t panel = 0; panel < strip.count; ++panel) {
    const int64_t j = panel * kPanel;
    for (int first = 0; first < strip.rows; first += kTile) {
      const W* bases[kTile];
      W* outs[kTile];
      for (int i = 0; i < kTile; ++i) {
        bases[i] = strip.bases[first + i] + j;
        outs[i] = strip.outs[first + i] + j;
      }
      const W* values = strip.panels + j * strip.k;
      W* abs_sum = kCounted ? strip.abs_sum + j : nullptr;
      W* square_sum = kCounted ? strip.square_sum + j : nullptr;
      if (first + kTile <= strip.rows) {
        add_tile<kBytes, kTile, kVectors, kCounted, true>(
            strip.z + first, values, strip.k, bases, outs, kTile, strip.bias + j, strip.scaling,
            abs_sum, square_sum);
      } else {
        add_tile<kBytes, kTile, kVectors, kCounted, false>(
            strip.z + first, values, strip.k, bases, outs, strip.rows - first, strip.bias + j,
            strip.scaling, abs_sum, square_sum);
      }
    }
  }
}

template <typename W>
struct Call {
  Source base;
  const W* z;
  int64_t z_row_stride, z_step;
  const W* panels;  // B: [panels][k][panel width], zero where B ends
  const W* bias;    // one per column, of whole panels
  void* y;          // contiguous, of W or else of the base's dtype
  bool rounds;      // y is not of W
  int64_t columns, k;
  W scaling;
  const Schedule* schedule;
};

template <typename T>
UCAN_INLINE void round_row(const float* values, int64_t n, void* y, int64_t offset) {
  T* out = static_cast<T*>(y) + offset;
  UCAN_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) out[j] = static_cast<T>(values[j]);
}

// Batches [begin, end) of the columns [column, column + n). `out` is null where no sums are wanted.
template <typename Set, typename W>
UCAN_INLINE void run_task(
    const Call<W>& call, int64_t begin, int64_t end, int64_t column, int64_t n, double* out,
    W* z) {
  constexpr int64_t kPanel = Set::template panel<W>;
  const int64_t whole = n / kPanel * kPanel, rest = n - whole;
  Sums<W> sums;
  alignas(64) W buffer[kRows][kColumns];
  alignas(64) W tail[kRows][kPanel] = {};
  begin_sums(sums, rest ? whole + kPanel : n);
  // Pointers to rows that are not there are moved on with the others, and never followed.
  Strip<W> strip{z, nullptr, call.k, 0, {}, {}, 0, nullptr, call.scaling, nullptr, nullptr};
  for (int i = 0; i < kRows; ++i) strip.bases[i] = strip.outs[i] = tail[i];
  for (int64_t b = begin; b < end; ++b) {
    const Batch& batch = call.schedule->batches[b];
    const int64_t* indices = call.schedule->rows.data() + batch.first;
    for (int i = 0; i < batch.count; ++i) {
      const W* row = call.z + indices[i] * call.z_row_stride;
      for (int64_t p = 0; p < call.k; ++p) z[p * kRows + i] = row[p * call.z_step];
      strip.bases[i] = row_of(call.base, indices[i], column, n, buffer[i]);
      // What is rounded lies in the buffer already, and its sum may take its place.
      strip.outs[i] = call.rounds
          ? buffer[i]
          : static_cast<W*>(call.y) + indices[i] * call.columns + column;
    }
    for (int i = batch.count; i < kRows; ++i) {
      for (int64_t p = 0; p < call.k; ++p) z[p * kRows + i] = 0;
    }
    const bool counted = batch.group != kUncounted;
    const auto add = counted ? Set::template counted<W> : Set::template uncounted<W>;
    strip.rows = batch.count;
    strip.count = whole / kPanel;
    strip.panels = call.panels + column * call.k;
    strip.bias = call.bias + column;
    if (counted) {
      strip.abs_sum = sums.partial[0][batch.group];
      strip.square_sum = sums.partial[1][batch.group];
    }
    add(strip);
    if (rest) {
      W* ends[kRows];
      for (int i = 0; i < batch.count; ++i) {
        std::copy_n(strip.bases[i] + whole, rest, tail[i]);
        ends[i] = strip.outs[i] + whole;
        strip.bases[i] = strip.outs[i] = tail[i];
      }
      strip.count = 1;
      strip.panels += whole * call.k;
      strip.bias += whole;
      if (counted) {
        strip.abs_sum += whole;
        strip.square_sum += whole;
      }
      add(strip);
      for (int i = 0; i < batch.count; ++i) std::copy_n(tail[i], rest, ends[i]);
    }
    if constexpr (std::is_same_v<W, float>) {
      for (int i = 0; call.rounds && i < batch.count; ++i) {
        const int64_t offset = indices[i] * call.columns + column;
        if (call.base.dtype == Dtype::bfloat16) {
          round_row<torch::headeronly::BFloat16>(buffer[i], n, call.y, offset);
        } else {
          round_row<torch::headeronly::Half>(buffer[i], n, call.y, offset);
        }
      }
    }
    if (counted) end_batch(sums, batch.group, n);
  }
  if (out != nullptr) end_sums(sums, n, out, call.columns);
}

template <typename W>
struct Code {
  void (*task)(const Call<W>&, int64_t, int64_t, int64_t, int64_t, double*, W*);
  int64_t panel;  // columns
};

// The strips are functions of their own: among the rest of a task compilers run out of registers.
#define UCAN_SET(name, attribute, bytes, tile, vectors)                                           \
  struct name {                                                                                   \
    template <typename W>                                                                         \
    static constexpr int64_t panel = vectors * bytes / sizeof(W);                                 \
    template <typename W>                                                                         \
    UCAN_APART attribute static void counted(const Strip<W>& strip) {                             \
      add_strip<bytes, tile, vectors, true>(strip);                                               \
    }                                                                                             \
    template <typename W>                                                                         \
    UCAN_APART attribute static void uncounted(const Strip<W>& strip) {                           \
      add_strip<bytes, tile, vectors, false>(strip);                                              \
    }                                                                                             \
    template <typename W>                                                                         \
    attribute static void task(                                                                   \
        const Call<W>& call, int64_t begin, int64_t end, int64_t column, int64_t n, double* out,  \
        W* z) {                                                                                   \
      run_task<name>(call, begin, end, column, n, out, z);                                        \
    }                                                                                             \
    template <typename W>                                                                         \
    static constexpr Code<W> code() {                                                             \
      return {task<W>, panel<W>};                                                                 \
    }                                                                                             \
  };

// As many products at a time as fit into 16 vector registers, or 32, beside what makes them.
UCAN_SET(Plain, , 16, 4, 2)
#if UCAN_X86
UCAN_SET(Avx2, UCAN_AVX2, 32, 4, 2)
UCAN_SET(Avx512, UCAN_AVX512, 64, 8, 2)
#endif
#undef UCAN_SET

template <typename W>
Code<W> best_code() {
#if UCAN_X86
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return Avx512::code<W>();
    case InstructionSet::avx2:
      return Avx2::code<W>();
    case InstructionSet::plain:
      break;
  }
#endif
  return Plain::code<W>();
}

// ---- Once per call ----

template <typename W>
void run(
    Call<W> call, const Tensor& b, const std::optional<Tensor>& bias, double* moments) {
  static const Code<W> code = best_code<W>();
  const int64_t n = call.columns, k = call.k, width = code.panel;
  const int64_t panels = divide_up(n, width);
  const std::unique_ptr<W[]> packed(new W[panels * width * k]);
  const W* values = static_cast<const W*>(b.const_data_ptr());
  const int64_t row_stride = b.stride(0), step = b.stride(1);
  const int64_t grain = std::max<int64_t>(1, kGrain / (width * std::max<int64_t>(k, 1)));
  torch::stable::parallel_for(0, panels, grain, [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const W* from = values + panel * width * row_stride;
      W* to = packed.get() + panel * width * k;
      const int64_t there = std::min(width, n - panel * width);
      for (int64_t p = 0; p < k; ++p, to += width) {
        for (int64_t j = 0; j < there; ++j) to[j] = from[j * row_stride + p * step];
        std::fill(to + there, to + width, W(0));
      }
    }
  });
  std::vector<W> bias_row(panels * width, W(0));
  if (bias) {
    const W* shifts = static_cast<const W*>(bias->const_data_ptr());
    for (int64_t j = 0; j < n; ++j) bias_row[j] = shifts[j * bias->stride(0)];
  }
  call.panels = packed.get();
  call.bias = bias_row.data();
  run_tasks(
      *call.schedule, n, width, moments,
      [&](int64_t begin, int64_t end, int64_t column, int64_t columns, double* out) {
        const std::unique_ptr<W[]> z(new W[k * kRows]);
        code.task(call, begin, end, column, columns, out, z.get());
      });
}

template <typename W>
void expand(
    const Source& base, const Tensor& z, const Tensor& b, double scaling,
    const std::optional<Tensor>& bias, const Schedule& schedule, double* moments,
    const Tensor& y) {
  run(
      Call<W>{
          base, static_cast<const W*>(z.const_data_ptr()), z.stride(0), z.stride(1), nullptr,
          nullptr, y.mutable_data_ptr(), y.scalar_type() != z.scalar_type(), y.size(1), z.size(1),
          static_cast<W>(scaling), &schedule},
      b, bias, moments);
}

void expand_cpu(
    const std::optional<Tensor>& base, const Tensor& z, const Tensor& b, double scaling,
    const std::optional<Tensor>& bias, const std::optional<Tensor>& groups, int64_t only_group,
    const std::optional<Tensor>& moments, const Tensor& y) {
  const char* op = "_expand_native_";
  const bool wide = z.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      z.dim() == 2 && (wide || z.scalar_type() == ScalarType::Float), op,
      ": z must be a 2-D float32 or float64 tensor");
  const bool rounds = !wide && y.scalar_type() != ScalarType::Float;
  STD_TORCH_CHECK(
      y.dim() == 2 && y.is_contiguous() &&
          (rounds ? y.scalar_type() == ScalarType::BFloat16 || y.scalar_type() == ScalarType::Half
                  : y.scalar_type() == z.scalar_type()),
      op, ": y must be contiguous, 2-D, and of z's dtype, or bfloat16 or float16 where z is float32");
  const int64_t tokens = y.size(0), n = y.size(1);
  STD_TORCH_CHECK(z.size(0) == tokens, op, ": z must have ", tokens, " rows, as y has");
  STD_TORCH_CHECK(
      b.dim() == 2 && b.size(0) == n && b.size(1) == z.size(1) &&
          b.scalar_type() == z.scalar_type(),
      op, ": b must be [", n, ", ", z.size(1), "] of z's dtype");
  STD_TORCH_CHECK(
      !bias ||
          (bias->dim() == 1 && bias->size(0) == n && bias->scalar_type() == z.scalar_type()),
      op, ": bias must be 1-D with ", n, " values of z's dtype");
  const Source source = source_of(base ? *base : y, "_expand_native_: base");
  if (base) {
    STD_TORCH_CHECK(
        base->size(0) == tokens && base->size(1) == n, op, ": base is [", base->size(0), ", ",
        base->size(1), "] and y [", tokens, ", ", n, "]; they must have one shape");
    STD_TORCH_CHECK(
        wide || source.dtype != Dtype::float64, op, ": y must be float64 where base is");
    STD_TORCH_CHECK(
        !rounds || base->scalar_type() == y.scalar_type(), op,
        ": a bfloat16 or float16 y must have base's dtype");
    check_apart(*base, y, op, "base", "y");
  }
  check_apart(z, y, op, "z", "y");
  STD_TORCH_CHECK(
      groups.has_value() == moments.has_value(), op, ": groups and moments go together");
  double* totals = moments ? checked_moments(*moments, n, op) : nullptr;
  const Schedule schedule = groups
      ? checked_schedule(*groups, tokens, only_group, true, op)
      : uncounted_schedule(tokens);
  if (wide) {
    expand<double>(source, z, b, scaling, bias, schedule, totals, y);
  } else {
    expand<float>(source, z, b, scaling, bias, schedule, totals, y);
  }
}

}  // namespace
}  // namespace ucan_fast

STABLE_TORCH_LIBRARY_FRAGMENT(ucan_fast, m) {
  m.def(
      "_expand_native_(Tensor? base, Tensor z, Tensor b, float scaling, Tensor? bias, "
      "Tensor? groups, int only_group, Tensor(a!)? moments, Tensor(b!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ucan_fast, CPU, m) {
  m.impl("_expand_native_", TORCH_BOX(&ucan_fast::expand_cpu));
}
