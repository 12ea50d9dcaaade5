// Arguments of ucan_fast::_attenuate_native_ -> matrices. Everything is checked before any weight
// is touched, so that an error changes nothing.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "matrix.h"

namespace ucan_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Dtype dtype_of(const Tensor& weight, size_t index) {
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(
          false, "_attenuate_native_: weight ", index,
          " must be float32, float64, bfloat16 or float16");
  }
}

// Whether two elements of a rows x cols matrix share memory: i * s0 == j * s1 for some
// 0 < i < rows, 0 < j < cols. The smallest such pair is (s1, s0) / gcd(s0, s1).
inline bool overlaps_itself(int64_t rows, int64_t cols, int64_t s0, int64_t s1) {
  if (rows == 0 || cols == 0) return false;
  if ((rows > 1 && s0 == 0) || (cols > 1 && s1 == 0)) return true;
  if (rows == 1 || cols == 1) return false;
  const int64_t divisor = std::gcd(s0, s1);
  return s1 / divisor < rows && s0 / divisor < cols;
}

// The memory that a weight lies in, gaps between its elements included.
struct Span {
  uintptr_t first, end;
  size_t weight;
};

// Sorted by address, two spans overlap exactly if some neighbours do. Interleaved views (two column
// ranges of one matrix) span each other without sharing an element; they are refused as well.
inline void check_disjoint(std::vector<Span>& spans) {
  std::sort(spans.begin(), spans.end(), [](const Span& one, const Span& two) {
    return one.first < two.first;
  });
  for (size_t i = 1; i < spans.size(); ++i) {
    STD_TORCH_CHECK(
        spans[i - 1].end <= spans[i].first, "_attenuate_native_: weights ",
        std::min(spans[i - 1].weight, spans[i].weight), " and ",
        std::max(spans[i - 1].weight, spans[i].weight),
        " overlap in memory and would be scaled twice");
  }
}

// The non-empty matrices. `factors` and all weights must be on one device; the dispatcher has
// already chosen the CPU or CUDA kernel by it.
inline std::vector<Matrix> checked_matrices(
    const std::vector<Tensor>& weights, const Tensor& factors, const std::vector<int64_t>& offsets,
    const std::vector<int64_t>& axes) {
  STD_TORCH_CHECK(
      weights.size() == offsets.size() && weights.size() == axes.size(), "_attenuate_native_: ",
      weights.size(), " weights, ", offsets.size(), " offsets and ", axes.size(),
      " axes; there must be one of each per weight");
  STD_TORCH_CHECK(
      factors.dim() == 1 && factors.scalar_type() == ScalarType::Float && factors.is_contiguous(),
      "_attenuate_native_: factors must be one contiguous 1-D float32 tensor");
  const int64_t available = factors.numel();
  const bool on_cpu = factors.is_cpu();
  const bool on_cuda = factors.is_cuda();
  const auto device = factors.get_device_index();

  std::vector<Matrix> matrices;
  std::vector<Span> spans;
  matrices.reserve(weights.size());
  spans.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    STD_TORCH_CHECK(
        weight.dim() == 2, "_attenuate_native_: weight ", i, " must be 2-D, not ", weight.dim(),
        "-D");
    const Dtype dtype = dtype_of(weight, i);
    STD_TORCH_CHECK(
        (on_cpu ? weight.is_cpu() : weight.is_cuda() == on_cuda) &&
            weight.get_device_index() == device,
        "_attenuate_native_: weight ", i, " and the factors must be on the same device");
    const int64_t axis = axes[i];
    STD_TORCH_CHECK(
        axis == 0 || axis == 1, "_attenuate_native_: axis of weight ", i,
        " must be 0 (rows) or 1 (columns), not ", axis);
    const auto sizes = weight.sizes(), strides = weight.strides();
    const int64_t needed = sizes[axis];
    STD_TORCH_CHECK(
        // Subtracting cannot overflow where adding to a wild offset could.
        offsets[i] >= 0 && offsets[i] <= available && needed <= available - offsets[i],
        "_attenuate_native_: weight ", i, " needs ", needed, " factors from ", offsets[i],
        " on, but there are ", available);
    int64_t rows = sizes[0], cols = sizes[1];
    int64_t row_stride = strides[0], col_stride = strides[1];
    STD_TORCH_CHECK(
        !overlaps_itself(rows, cols, row_stride, col_stride), "_attenuate_native_: weight ", i,
        " overlaps itself in memory (an expanded tensor?)");
    if (rows == 0 || cols == 0) continue;

    bool factor_per_line = axis == 0;
    if (row_stride < col_stride) {  // walk along the columns instead
      std::swap(rows, cols);
      std::swap(row_stride, col_stride);
      factor_per_line = !factor_per_line;
    }
    matrices.push_back(
        {weight.mutable_data_ptr(), factors.const_data_ptr<float>() + offsets[i], rows, cols,
         row_stride, col_stride, factor_per_line, dtype});
    const auto first = reinterpret_cast<uintptr_t>(matrices.back().data);
    const int64_t last = (rows - 1) * row_stride + (cols - 1) * col_stride;
    spans.push_back({first, first + (last + 1) * weight.element_size(), i});
  }
  check_disjoint(spans);
  return matrices;
}

}  // namespace ucan_fast
