// Rows of a matrix, alone or in groups, and their moments: what the CPU operators on activations
// share.
//
// Which rows go together, where an fp32 partial sum ends (at most 32 rows) and how the fp64 totals
// are combined follow from the shape and the groups alone: the bits do not depend on the number of
// threads.
#pragma once

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
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu.h"
#include "matrix.h"

namespace ucan_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kRows = 8;               // read at once, so that sums are loaded once per 8 rows
constexpr int kBatchesPerPartial = 4;  // 32 rows to an fp32 partial sum
constexpr int64_t kBatches = 32;       // 256 rows to a task: enough tasks for even shares
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

inline Schedule uncounted_schedule(int64_t tokens) {
  Schedule schedule;
  schedule.rows.resize(tokens);
  for (int64_t row = 0; row < tokens; ++row) {
    schedule.rows[row] = row;
    if (row % kRows == 0) {
      schedule.batches.push_back(
          {row, static_cast<int>(std::min<int64_t>(kRows, tokens - row)), kUncounted});
    }
  }
  return schedule;
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

// ---- Once per call ----

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// task(begin, end, column, width, out) for batches [begin, end) of the columns [column, column +
// width), which adds its sums to `out` (null where none are wanted), in any order; then the sums of
// all tasks, in a fixed one, to `moments`. Blocks of columns are multiples of `align` wide.
template <typename Task>
void run_tasks(
    const Schedule& schedule, int64_t n, int64_t align, double* moments, const Task& task) {
  const int64_t batches = static_cast<int64_t>(schedule.batches.size());
  if (n == 0 || batches == 0) return;
  const int64_t segments = divide_up(batches, kBatches);
  const int64_t width = divide_up(divide_up(n, divide_up(n, kColumns)), align) * align;
  const int64_t blocks = divide_up(n, width);
  std::unique_ptr<double[]> totals;
  if (moments != nullptr) totals.reset(new double[segments * 4 * n]);

  const int64_t task_elements = std::min(batches, kBatches) * kRows * std::min(n, width);
  const int64_t grain = std::max<int64_t>(1, kGrain / task_elements);
  torch::stable::parallel_for(0, segments * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t segment = i / blocks, column = i % blocks * width;
      task(
          segment * kBatches, std::min(batches, (segment + 1) * kBatches), column,
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

inline Source source_of(const Tensor& matrix, const char* name) {
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

inline Schedule checked_schedule(
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

inline double* checked_moments(const Tensor& moments, int64_t n, const char* op) {
  STD_TORCH_CHECK(
      moments.scalar_type() == ScalarType::Double && moments.is_contiguous() &&
          moments.dim() == 3 && moments.size(0) == 2 && moments.size(1) == 2 &&
          moments.size(2) == n,
      op, ": moments must be contiguous float64 [2, 2, ", n, "]");
  return static_cast<double*>(moments.mutable_data_ptr());
}

// Addresses of the first byte of a matrix and of the first one behind it.
inline std::pair<uintptr_t, uintptr_t> span_of(const Tensor& matrix) {
  const auto start = reinterpret_cast<uintptr_t>(matrix.const_data_ptr());
  if (matrix.size(0) == 0 || matrix.size(1) == 0) return {start, start};
  const int64_t last =
      (matrix.size(0) - 1) * matrix.stride(0) + (matrix.size(1) - 1) * matrix.stride(1);
  return {start, start + (last + 1) * matrix.element_size()};
}

inline void check_apart(
    const Tensor& one, const Tensor& y, const char* op, const char* name, const char* out) {
  const auto [start, end] = span_of(one);
  const auto [y_start, y_end] = span_of(y);
  STD_TORCH_CHECK(
      end <= y_start || y_end <= start, op, ": ", name, " and ", out, " must not share memory");
}

}  // namespace ucan_fast
