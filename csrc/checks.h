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

// A call of torch's C interface; its error becomes an exception.
#define UCAN_ASK(call) STD_TORCH_CHECK((call) == AOTI_TORCH_SUCCESS, "_attenuate_native_: " #call)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The arguments as the dispatcher hands them over. Bare handles: a torch::stable::Tensor allocates
// a reference counter and asks for everything one call at a time, which for many small weights
// takes longer than scaling them.
class Arguments {
 public:
  Arguments(const StableIValue* stack, uint64_t arguments, uint64_t results)
      : weights_(checked(stack, arguments, results)),
        factors_(torch::stable::detail::to<Tensor>(stack[1])),
        offsets_(torch::stable::detail::to<std::vector<int64_t>>(stack[2])),
        axes_(torch::stable::detail::to<std::vector<int64_t>>(stack[3])) {}

  const std::vector<AtenTensorHandle>& weights() const { return weights_.handles; }
  const Tensor& factors() const { return factors_; }
  const std::vector<int64_t>& offsets() const { return offsets_; }
  const std::vector<int64_t>& axes() const { return axes_; }

 private:
  struct Owned {
    std::vector<AtenTensorHandle> handles;
    explicit Owned(std::vector<AtenTensorHandle> taken) : handles(std::move(taken)) {}
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned() {
      for (const AtenTensorHandle handle : handles) aoti_torch_delete_tensor_object(handle);
    }
  };

  static std::vector<AtenTensorHandle> checked(
      const StableIValue* stack, uint64_t arguments, uint64_t results) {
    STD_TORCH_CHECK(
        arguments == 4 && results == 0, "_attenuate_native_: the schema has ", arguments,
        " arguments and ", results, " results, the kernel 4 and 0");
    return torch::stable::detail::to<std::vector<AtenTensorHandle>>(stack[0]);
  }

  Owned weights_;
  Tensor factors_;
  std::vector<int64_t> offsets_, axes_;
};

// torch's numbers of the dtypes, asked for once and not per weight.
struct DtypeNumbers {
  int32_t float32 = aoti_torch_dtype_float32();
  int32_t float64 = aoti_torch_dtype_float64();
  int32_t bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16();
};

inline Dtype dtype_of(int32_t number, const DtypeNumbers& numbers, size_t index) {
  if (number == numbers.float32) return Dtype::float32;
  if (number == numbers.float64) return Dtype::float64;
  if (number == numbers.bfloat16) return Dtype::bfloat16;
  STD_TORCH_CHECK(
      number == numbers.float16, "_attenuate_native_: weight ", index,
      " must be float32, float64, bfloat16 or float16");
  return Dtype::float16;
}

inline int64_t element_size(Dtype dtype) {
  return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// Whether two elements of a rows x cols matrix share memory: i * s0 == j * s1 for some
// 0 < i < rows, 0 < j < cols. The smallest such pair is (s1, s0) / gcd(s0, s1).
inline bool overlaps_itself(int64_t rows, int64_t cols, int64_t s0, int64_t s1) {
  if (rows == 0 || cols == 0) return false;
  if ((rows > 1 && s0 == 0) || (cols > 1 && s1 == 0)) return true;
  if (rows == 1 || cols == 1) return false;
  if ((cols - 1) * s1 < s0 || (rows - 1) * s0 < s1) return false;  // one after the other
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
  const auto earlier = [](const Span& one, const Span& two) { return one.first < two.first; };
  if (!std::is_sorted(spans.begin(), spans.end(), earlier)) {
    std::sort(spans.begin(), spans.end(), earlier);
  }
  for (size_t i = 1; i < spans.size(); ++i) {
    STD_TORCH_CHECK(
        spans[i - 1].end <= spans[i].first, "_attenuate_native_: weights ",
        std::min(spans[i - 1].weight, spans[i].weight), " and ",
        std::max(spans[i - 1].weight, spans[i].weight),
        " overlap in memory and would be scaled twice");
  }
}

// Factors in a weight's memory would change while they are applied, in an order that nobody knows.
inline void check_apart(const Span& span, uintptr_t factors, int64_t count) {
  STD_TORCH_CHECK(
      span.end <= factors || factors + count * sizeof(float) <= span.first || count == 0,
      "_attenuate_native_: weight ", span.weight, " and the factors overlap in memory");
}

// The non-empty matrices. `factors` and all weights must be on one device; the dispatcher has
// already chosen the CPU or CUDA kernel by it.
inline std::vector<Matrix> checked_matrices(const Arguments& arguments) {
  const auto& weights = arguments.weights();
  const auto& offsets = arguments.offsets();
  const auto& axes = arguments.axes();
  const Tensor& factors = arguments.factors();
  STD_TORCH_CHECK(
      weights.size() == offsets.size() && weights.size() == axes.size(), "_attenuate_native_: ",
      weights.size(), " weights, ", offsets.size(), " offsets and ", axes.size(),
      " axes; there must be one of each per weight");
  STD_TORCH_CHECK(
      factors.dim() == 1 && factors.scalar_type() == ScalarType::Float && factors.is_contiguous(),
      "_attenuate_native_: factors must be one contiguous 1-D float32 tensor");
  const int64_t available = factors.numel();
  const float* const first_factor = factors.const_data_ptr<float>();
  int32_t device_type = 0, device_index = 0;
  UCAN_ASK(aoti_torch_get_device_type(factors.get(), &device_type));
  UCAN_ASK(aoti_torch_get_device_index(factors.get(), &device_index));
  const DtypeNumbers numbers;

  std::vector<Matrix> matrices;
  std::vector<Span> spans;
  matrices.reserve(weights.size());
  spans.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const AtenTensorHandle weight = weights[i];
    int64_t dim = 0;
    int32_t dtype_number = 0, on_type = 0, on_index = 0;
    UCAN_ASK(aoti_torch_get_dim(weight, &dim));
    STD_TORCH_CHECK(dim == 2, "_attenuate_native_: weight ", i, " must be 2-D, not ", dim, "-D");
    UCAN_ASK(aoti_torch_get_dtype(weight, &dtype_number));
    const Dtype dtype = dtype_of(dtype_number, numbers, i);
    UCAN_ASK(aoti_torch_get_device_type(weight, &on_type));
    UCAN_ASK(aoti_torch_get_device_index(weight, &on_index));
    STD_TORCH_CHECK(
        on_type == device_type && on_index == device_index, "_attenuate_native_: weight ", i,
        " and the factors must be on the same device");
    const int64_t axis = axes[i];
    STD_TORCH_CHECK(
        axis == 0 || axis == 1, "_attenuate_native_: axis of weight ", i,
        " must be 0 (rows) or 1 (columns), not ", axis);
    int64_t *sizes = nullptr, *strides = nullptr;
    UCAN_ASK(aoti_torch_get_sizes(weight, &sizes));
    UCAN_ASK(aoti_torch_get_strides(weight, &strides));
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
    void* data = nullptr;
    UCAN_ASK(torch_get_mutable_data_ptr(weight, &data));
    matrices.push_back(
        {data, first_factor + offsets[i], rows, cols, row_stride, col_stride, factor_per_line,
         dtype});
    const auto first = reinterpret_cast<uintptr_t>(data);
    const int64_t last = (rows - 1) * row_stride + (cols - 1) * col_stride;
    spans.push_back({first, first + (last + 1) * element_size(dtype), i});
    check_apart(spans.back(), reinterpret_cast<uintptr_t>(first_factor), available);
  }
  check_disjoint(spans);
  return matrices;
}

}  // namespace ucan_fast
