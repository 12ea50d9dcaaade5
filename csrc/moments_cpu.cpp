// Schemas and CPU kernels of ucan_fast::_moments_native_ and ucan_fast::_add_delta_native_, through
// PyTorch's stable ABI.
//
// Both are bound by memory: the second reads two matrices and writes one, and its moments are taken
// on the way. Which rows go together, where an fp32 partial sum ends (at most 32 rows) and how the
// fp64 totals are combined follow from the shape and the groups alone: the bits do not depend on
// the number of threads.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "cpu.h"
#include "matrix.h"

namespace ucan_fast {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kRows = 8;               // read at once, so that sums are loaded once per 8 rows
constexpr int kAddedRows = 4;          // 8 rows of two matrices fall on each other in the L1 cache
constexpr int kBatchesPerPartial = 4;  // 32 rows to an fp32 partial sum
constexpr int64_t kBatches = 128;      // 1024 rows to a task
constexpr int64_t kColumns = 1024;     // at most, per task: its sums stay in the cache
constexpr int64_t kGrain = 65536;      // elements that are worth waking a thread for
constexpr int kUncounted = 2;

struct Source {
  const void* data;
  Dtype dtype;
  int64_t row_stride;
  int64_t step;
};

// Rows of one group (or uncounted rows), in the order of memory: rows[first .. first + count).
struct Batch {
  int64_t first;
  int count;
  int group;
};

struct Schedule {
  std::vector<int64_t> rows;
  std::vector<Batch> batches;
};

template <typename G>
void schedule_rows(
    const G* groups, int64_t stride, int64_t tokens, int64_t only_group, bool all_rows,
    Schedule& schedule) {
  std::array<std::array<int64_t, kRows>, 3> waiting;
  std::array<int, 3> count{};
  const auto flush = [&](int group) {
    if (count[group] == 0) return;
    schedule.batches.push_back(
        {static_cast<int64_t>(schedule.rows.size()), count[group], group});
    schedule.rows.insert(
        schedule.rows.end(), waiting[group].begin(), waiting[group].begin() + count[group]);
    count[group] = 0;
  };
  for (int64_t row = 0; row < tokens; ++row) {
    const G value = groups[row * stride];
    int group = value == 0 ? 0 : value == 1 ? 1 : kUncounted;
    if (only_group >= 0 && group != only_group) group = kUncounted;
    if (group == kUncounted && !all_rows) continue;
    waiting[group][count[group]++] = row;
    if (count[group] == kRows) flush(group);
  }
  for (int group = 0; group < 3; ++group) flush(group);
}

// ---- What is compiled once per instruction set. No lambdas: they would not be part of it. ----

UCAN_INLINE float as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

UCAN_INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

UCAN_INLINE float from_bfloat16(uint16_t value) {
  return as_float(static_cast<uint32_t>(value) << 16);
}

// Without branches, so that it vectorises; exact for every fp16 number, infinity and NaN included.
UCAN_INLINE float from_float16(uint16_t value) {
  const uint32_t high = static_cast<uint32_t>(value) << 16;
  const uint32_t sign = high & 0x80000000u;
  const uint32_t magnitude = high + high;
  const float normal = as_float((magnitude >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = as_float((magnitude >> 17) | (126u << 23)) - 0.5f;
  return as_float(sign | (magnitude < (1u << 27) ? as_bits(subnormal) : as_bits(normal)));
}

template <typename W, typename T>
UCAN_INLINE void widen_row(const T* source, int64_t step, int64_t n, W* out) {
  if (step == 1) {
    UCAN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<W>(source[j]);
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = static_cast<W>(source[j * step]);
  }
}

template <typename W, bool kBrain>
UCAN_INLINE void widen_half_row(const uint16_t* source, int64_t step, int64_t n, W* out) {
  if (step == 1) {
    UCAN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      out[j] = kBrain ? from_bfloat16(source[j]) : from_float16(source[j]);
    }
  } else {
    for (int64_t j = 0; j < n; ++j) {
      out[j] = kBrain ? from_bfloat16(source[j * step]) : from_float16(source[j * step]);
    }
  }
}

// Columns from `column` on of one row as W: in place where they are so already, else in `buffer`.
template <typename W>
UCAN_INLINE const W* row_of(
    const Source& source, int64_t row, int64_t column, int64_t n, W* buffer) {
  const int64_t offset = row * source.row_stride + column * source.step;
  switch (source.dtype) {
    case Dtype::float32: {
      const float* data = static_cast<const float*>(source.data) + offset;
      if constexpr (std::is_same_v<W, float>) {
        if (source.step == 1) return data;
      }
      widen_row(data, source.step, n, buffer);
      break;
    }
    case Dtype::float64: {
      const double* data = static_cast<const double*>(source.data) + offset;
      if constexpr (std::is_same_v<W, double>) {
        if (source.step == 1) return data;
      }
      widen_row(data, source.step, n, buffer);
      break;
    }
    case Dtype::bfloat16:
      widen_half_row<W, true>(
          static_cast<const uint16_t*>(source.data) + offset, source.step, n, buffer);
      break;
    case Dtype::float16:
      widen_half_row<W, false>(
          static_cast<const uint16_t*>(source.data) + offset, source.step, n, buffer);
      break;
  }
  return buffer;
}

// The columns [column, column + n) of a task and its running sums: [stat][group][column].
template <typename W>
struct Sums {
  alignas(64) W partial[2][2][kColumns];
  alignas(64) double total[2][2][kColumns];
  int batches[2];
};

template <typename W>
UCAN_INLINE void begin_sums(Sums<W>& sums, int64_t n) {
  for (int s = 0; s < 2; ++s) {
    for (int g = 0; g < 2; ++g) {
      for (int64_t j = 0; j < n; ++j) {
        sums.partial[s][g][j] = 0;
        sums.total[s][g][j] = 0;
      }
    }
  }
  sums.batches[0] = sums.batches[1] = 0;
}

template <typename W>
UCAN_INLINE void fold(Sums<W>& sums, int group, int64_t n) {
  for (int s = 0; s < 2; ++s) {
    W* partial = sums.partial[s][group];
    double* total = sums.total[s][group];
    UCAN_INDEPENDENT
    for (int64_t j = 0; j < n; ++j) {
      total[j] += partial[j];
      partial[j] = 0;
    }
  }
  sums.batches[group] = 0;
}

template <typename W>
UCAN_INLINE void end_batch(Sums<W>& sums, int group, int64_t n) {
  if (++sums.batches[group] == kBatchesPerPartial) fold(sums, group, n);
}

template <typename W>
UCAN_INLINE void end_sums(Sums<W>& sums, int64_t n, double* out, int64_t out_stride) {
  for (int g = 0; g < 2; ++g) {
    fold(sums, g, n);
    for (int s = 0; s < 2; ++s) {
      std::copy_n(sums.total[s][g], n, out + (2 * s + g) * out_stride);
    }
  }
}

template <int kCount, typename W>
UCAN_INLINE void sum_rows(const W* const* rows, int64_t n, W* abs_sum, W* square_sum) {
  const W* row[kCount];
  for (int i = 0; i < kCount; ++i) row[i] = rows[i];
  UCAN_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    W a = 0, q = 0;
    for (int i = 0; i < kCount; ++i) {
      const W value = row[i][j];
      a += std::abs(value);
      q += value * value;
    }
    abs_sum[j] += a;
    square_sum[j] += q;
  }
}

// delta = base + scaling (delta + bias) in kCount rows; the sums are those of scaling delta.
template <int kCount, bool kCounted, typename W>
UCAN_INLINE void add_rows(
    const W* const* bases, W* const* deltas, const W* bias, W scaling, int64_t n, W* abs_sum,
    W* square_sum) {
  const W* base[kCount];
  W* delta[kCount];
  for (int i = 0; i < kCount; ++i) {
    base[i] = bases[i];
    delta[i] = deltas[i];
  }
  UCAN_INDEPENDENT
  for (int64_t j = 0; j < n; ++j) {
    W a = 0, q = 0;
    for (int i = 0; i < kCount; ++i) {
      const W product = delta[i][j];
      if constexpr (kCounted) {
        const W value = scaling * product;
        a += std::abs(value);
        q += value * value;
      }
      delta[i][j] = base[i][j] + scaling * (product + bias[j]);
    }
    if constexpr (kCounted) {
      abs_sum[j] += a;
      square_sum[j] += q;
    }
  }
}

template <bool kCounted, typename W>
UCAN_INLINE void add_batch(
    const W* const* bases, W* const* deltas, int count, const W* bias, W scaling, int64_t n,
    W* abs_sum, W* square_sum) {
  int i = 0;
  for (; i + kAddedRows <= count; i += kAddedRows) {
    add_rows<kAddedRows, kCounted>(
        bases + i, deltas + i, bias, scaling, n, abs_sum, square_sum);
  }
  for (; i < count; ++i) {
    add_rows<1, kCounted>(bases + i, deltas + i, bias, scaling, n, abs_sum, square_sum);
  }
}

template <typename W>
struct Call {
  Source source;        // h or base
  W* delta;             // null for the moments of h
  int64_t columns;      // of the whole matrix
  const W* bias;        // one per column
  W scaling;
  const Schedule* schedule;
};

// Batches [begin, end) of the columns [column, column + n). `out` is null where no sums are wanted.
template <typename W>
UCAN_INLINE void run_task(
    const Call<W>& call, int64_t begin, int64_t end, int64_t column, int64_t n, double* out) {
  Sums<W> sums;
  alignas(64) W buffer[kRows][kColumns];
  const W* rows[kRows];
  W* deltas[kRows];
  begin_sums(sums, n);
  for (int64_t b = begin; b < end; ++b) {
    const Batch& batch = call.schedule->batches[b];
    const int64_t* indices = call.schedule->rows.data() + batch.first;
    for (int i = 0; i < batch.count; ++i) {
      rows[i] = row_of(call.source, indices[i], column, n, buffer[i]);
      if (call.delta != nullptr) deltas[i] = call.delta + indices[i] * call.columns + column;
    }
    const bool counted = batch.group != kUncounted;
    W* abs_sum = counted ? sums.partial[0][batch.group] : nullptr;
    W* square_sum = counted ? sums.partial[1][batch.group] : nullptr;
    if (call.delta != nullptr) {
      const W* bias = call.bias + column;
      if (counted) {
        add_batch<true>(
            rows, deltas, batch.count, bias, call.scaling, n, abs_sum, square_sum);
      } else {
        add_batch<false>(
            rows, deltas, batch.count, bias, call.scaling, n, abs_sum, square_sum);
      }
    } else if (batch.count == kRows) {
      sum_rows<kRows>(rows, n, abs_sum, square_sum);
    } else {
      for (int i = 0; i < batch.count; ++i) sum_rows<1>(rows + i, n, abs_sum, square_sum);
    }
    if (counted) end_batch(sums, batch.group, n);
  }
  if (out != nullptr) end_sums(sums, n, out, call.columns);
}

template <typename W>
using Task = void (*)(const Call<W>&, int64_t, int64_t, int64_t, int64_t, double*);

#define UCAN_TASK(name, attribute)                                                               \
  template <typename W>                                                                          \
  attribute void name(                                                                           \
      const Call<W>& call, int64_t begin, int64_t end, int64_t column, int64_t n, double* out) { \
    run_task(call, begin, end, column, n, out);                                                  \
  }

UCAN_TASK(task_plain, )
#if UCAN_X86
UCAN_TASK(task_avx2, UCAN_AVX2)
UCAN_TASK(task_avx512, UCAN_AVX512)
#endif
#undef UCAN_TASK

template <typename W>
Task<W> best_task() {
#if UCAN_X86
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return task_avx512<W>;
    case InstructionSet::avx2:
      return task_avx2<W>;
    case InstructionSet::plain:
      break;
  }
#endif
  return task_plain<W>;
}

// ---- Once per call ----

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename W>
void run(const Call<W>& call, double* moments) {
  static const Task<W> task = best_task<W>();
  const int64_t n = call.columns;
  const int64_t batches = static_cast<int64_t>(call.schedule->batches.size());
  if (n == 0 || batches == 0) return;
  const int64_t segments = divide_up(batches, kBatches);
  // Equal blocks, whole cache lines wide.
  const int64_t width = divide_up(divide_up(n, divide_up(n, kColumns)), 16) * 16;
  const int64_t blocks = divide_up(n, width);
  std::unique_ptr<double[]> totals;
  if (moments != nullptr) totals.reset(new double[segments * 4 * n]);

  const int64_t task_elements = std::min(batches, kBatches) * kRows * std::min(n, width);
  const int64_t grain = std::max<int64_t>(1, kGrain / task_elements);
  torch::stable::parallel_for(0, segments * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t segment = i / blocks, column = i % blocks * width;
      task(
          call, segment * kBatches, std::min(batches, (segment + 1) * kBatches), column,
          std::min(width, n - column),
          totals ? totals.get() + segment * 4 * n + column : nullptr);
    }
  });
  if (!totals) return;
  for (int64_t segment = 1; segment < segments; ++segment) {
    const double* more = totals.get() + segment * 4 * n;
    for (int64_t j = 0; j < 4 * n; ++j) totals[j] += more[j];
  }
  for (int64_t j = 0; j < 4 * n; ++j) moments[j] += totals[j];
}

Source source_of(const Tensor& matrix, const char* name) {
  STD_TORCH_CHECK(matrix.dim() == 2, name, " must be 2-D, not ", matrix.dim(), "-D");
  Dtype dtype = Dtype::float32;
  switch (matrix.scalar_type()) {
    case ScalarType::Float:
      dtype = Dtype::float32;
      break;
    case ScalarType::Double:
      dtype = Dtype::float64;
      break;
    case ScalarType::BFloat16:
      dtype = Dtype::bfloat16;
      break;
    case ScalarType::Half:
      dtype = Dtype::float16;
      break;
    default:
      STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
  return {matrix.const_data_ptr(), dtype, matrix.stride(0), matrix.stride(1)};
}

Schedule checked_schedule(
    const Tensor& groups, int64_t tokens, int64_t only_group, bool all_rows, const char* op) {
  STD_TORCH_CHECK(
      only_group >= -1 && only_group <= 1, op, ": only_group must be -1 (both), 0 or 1, not ",
      only_group);
  STD_TORCH_CHECK(
      groups.dim() == 1 && groups.size(0) == tokens, op, ": groups must be 1-D with one integer for "
      "each of the ", tokens, " rows");
  Schedule schedule;
  const auto read = [&](auto type) {
    using G = decltype(type);
    schedule.rows.reserve(tokens);
    schedule.batches.reserve(tokens / kRows + 3);
    schedule_rows(
        static_cast<const G*>(groups.const_data_ptr()), groups.stride(0), tokens, only_group,
        all_rows, schedule);
  };
  switch (groups.scalar_type()) {
    case ScalarType::Char:
      read(int8_t{});
      break;
    case ScalarType::Byte:
      read(uint8_t{});
      break;
    case ScalarType::Short:
      read(int16_t{});
      break;
    case ScalarType::Int:
      read(int32_t{});
      break;
    case ScalarType::Long:
      read(int64_t{});
      break;
    default:
      STD_TORCH_CHECK(false, op, ": groups must be int8, uint8, int16, int32 or int64");
  }
  return schedule;
}

double* checked_moments(const Tensor& moments, int64_t n, const char* op) {
  STD_TORCH_CHECK(
      moments.scalar_type() == ScalarType::Double && moments.is_contiguous() &&
          moments.dim() == 3 && moments.size(0) == 2 && moments.size(1) == 2 &&
          moments.size(2) == n,
      op, ": moments must be contiguous float64 [2, 2, ", n, "]");
  return static_cast<double*>(moments.mutable_data_ptr());
}

void moments_cpu(
    const Tensor& h, const Tensor& groups, int64_t only_group, const Tensor& moments) {
  const char* op = "_moments_native_";
  const Source source = source_of(h, "_moments_native_: h");
  const int64_t n = h.size(1);
  double* totals = checked_moments(moments, n, op);
  const Schedule schedule = checked_schedule(groups, h.size(0), only_group, false, op);
  if (source.dtype == Dtype::float64) {
    run(Call<double>{source, nullptr, n, nullptr, 0, &schedule}, totals);
  } else {
    run(Call<float>{source, nullptr, n, nullptr, 0, &schedule}, totals);
  }
}

template <typename W>
void add_delta(
    const Source& base, const Tensor& delta, double scaling, const std::optional<Tensor>& bias,
    const Schedule& schedule, double* moments) {
  const int64_t n = delta.size(1);
  std::vector<W> bias_row(n, W(0));
  if (bias) {
    const W* values = static_cast<const W*>(bias->const_data_ptr());
    for (int64_t j = 0; j < n; ++j) bias_row[j] = values[j * bias->stride(0)];
  }
  run(Call<W>{
          base, static_cast<W*>(delta.mutable_data_ptr()), n, bias_row.data(),
          static_cast<W>(scaling), &schedule},
      moments);
}

// Addresses of the first byte of a matrix and of the first one behind it.
std::pair<uintptr_t, uintptr_t> span_of(const Tensor& matrix) {
  const auto start = reinterpret_cast<uintptr_t>(matrix.const_data_ptr());
  if (matrix.size(0) == 0 || matrix.size(1) == 0) return {start, start};
  const int64_t last =
      (matrix.size(0) - 1) * matrix.stride(0) + (matrix.size(1) - 1) * matrix.stride(1);
  return {start, start + (last + 1) * matrix.element_size()};
}

void add_delta_cpu(
    const Tensor& base, const Tensor& delta, double scaling, const std::optional<Tensor>& bias,
    const Tensor& groups, int64_t only_group, const std::optional<Tensor>& moments) {
  const char* op = "_add_delta_native_";
  const Source source = source_of(base, "_add_delta_native_: base");
  const bool wide = delta.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(
      delta.dim() == 2 && delta.is_contiguous() &&
          (wide || (delta.scalar_type() == ScalarType::Float && source.dtype != Dtype::float64)),
      op, ": delta must be a contiguous 2-D float32 tensor (float64 where base is float64)");
  const int64_t n = delta.size(1);
  STD_TORCH_CHECK(
      base.size(0) == delta.size(0) && base.size(1) == n, op, ": base is [", base.size(0), ", ",
      base.size(1), "] and delta [", delta.size(0), ", ", n, "]; they must have one shape");
  const auto [base_start, base_end] = span_of(base);
  const auto [delta_start, delta_end] = span_of(delta);
  STD_TORCH_CHECK(
      base_end <= delta_start || delta_end <= base_start, op,
      ": base and delta must not share memory");
  STD_TORCH_CHECK(
      !bias || (bias->dim() == 1 && bias->size(0) == n &&
                bias->scalar_type() == delta.scalar_type()),
      op, ": bias must be 1-D with ", n, " values of delta's dtype");
  double* totals = moments ? checked_moments(*moments, n, op) : nullptr;
  Schedule schedule = checked_schedule(groups, delta.size(0), only_group, true, op);
  if (totals == nullptr) {
    for (Batch& batch : schedule.batches) batch.group = kUncounted;
  }
  if (wide) {
    add_delta<double>(source, delta, scaling, bias, schedule, totals);
  } else {
    add_delta<float>(source, delta, scaling, bias, schedule, totals);
  }
}

}  // namespace
}  // namespace ucan_fast

STABLE_TORCH_LIBRARY_FRAGMENT(ucan_fast, m) {
  m.def("_moments_native_(Tensor h, Tensor groups, int only_group, Tensor(a!) moments) -> ()");
  m.def(
      "_add_delta_native_(Tensor base, Tensor(a!) delta, float scaling, Tensor? bias, "
      "Tensor groups, int only_group, Tensor(b!)? moments) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ucan_fast, CPU, m) {
  m.impl("_moments_native_", TORCH_BOX(&ucan_fast::moments_cpu));
  m.impl("_add_delta_native_", TORCH_BOX(&ucan_fast::add_delta_cpu));
}
