// Schema and CPU kernel of ucan_fast::_attenuate_native_, through PyTorch's stable ABI.
//
// Row or column j of each weight times its factor: the product in fp32 (fp64 for fp64 weights),
// rounded once to nearest even; a factor of exactly 1 leaves the stored bits as they are. Different
// weights must not share memory.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "checks.h"
#include "cpu.h"

namespace ucan_fast {
namespace {

// Elements per task: about what one core scales while a sleeping thread wakes up.
constexpr int64_t kGrain = 1 << 19;

template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
using BitsOf = std::conditional_t<
    sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;

template <typename T>
UCAN_INLINE T scaled(T value, float factor) {
  return static_cast<T>(static_cast<Wide<T>>(value) * static_cast<Wide<T>>(factor));
}

template <typename T>
UCAN_INLINE void scale_lines(const Matrix& matrix, int64_t first, int64_t last) {
  const float* __restrict__ factors = matrix.factors;
  const int64_t length = matrix.length, step = matrix.step;
  for (int64_t line = first; line < last; ++line) {
    T* __restrict__ values = static_cast<T*>(matrix.data) + line * matrix.line_stride;
    if (matrix.factor_per_line) {
      const float factor = factors[line];
      if (factor == 1.0f) continue;
      if (step == 1) {
        UCAN_INDEPENDENT
        for (int64_t j = 0; j < length; ++j) values[j] = scaled(values[j], factor);
      } else {
        for (int64_t j = 0; j < length; ++j) values[j * step] = scaled(values[j * step], factor);
      }
    } else if (step == 1) {
      // A select of bits, not a branch: it vectorises, and 1 * NaN would change the NaN's bits.
      using Bits = BitsOf<T>;
      UCAN_INDEPENDENT
      for (int64_t j = 0; j < length; ++j) {
        const Bits kept = std::bit_cast<Bits>(values[j]);
        const Bits product = std::bit_cast<Bits>(scaled(values[j], factors[j]));
        values[j] = std::bit_cast<T>(factors[j] == 1.0f ? kept : product);
      }
    } else {
      for (int64_t j = 0; j < length; ++j) {
        if (factors[j] != 1.0f) values[j * step] = scaled(values[j * step], factors[j]);
      }
    }
  }
}

UCAN_INLINE void scale_any(const Matrix& matrix, int64_t first, int64_t last) {
  switch (matrix.dtype) {
    case Dtype::float32:
      return scale_lines<float>(matrix, first, last);
    case Dtype::float64:
      return scale_lines<double>(matrix, first, last);
    case Dtype::bfloat16:
      return scale_lines<torch::headeronly::BFloat16>(matrix, first, last);
    case Dtype::float16:
      return scale_lines<torch::headeronly::Half>(matrix, first, last);
  }
}

using Scale = void (*)(const Matrix&, int64_t, int64_t);

void scale_plain(const Matrix& matrix, int64_t first, int64_t last) {
  scale_any(matrix, first, last);
}
#if UCAN_X86
UCAN_AVX2 void scale_avx2(const Matrix& matrix, int64_t first, int64_t last) {
  scale_any(matrix, first, last);
}
UCAN_AVX512 void scale_avx512(const Matrix& matrix, int64_t first, int64_t last) {
  scale_any(matrix, first, last);
}
#endif

Scale best_scale() {
#if UCAN_X86
  switch (instruction_set()) {
    case InstructionSet::avx512:
      return scale_avx512;
    case InstructionSet::avx2:
      return scale_avx2;
    case InstructionSet::plain:
      break;
  }
#endif
  return scale_plain;
}

void attenuate_cpu(
    const std::vector<Tensor>& weights, const Tensor& factors, const std::vector<int64_t>& offsets,
    const std::vector<int64_t>& axes) {
  static const Scale scale_lines_of = best_scale();
  const std::vector<Matrix> matrices = checked_matrices(weights, factors, offsets, axes);
  // All elements of all matrices are one range, cut once: many small matrices do not open many
  // parallel regions. A task takes the lines that begin in its piece of the range.
  std::vector<int64_t> ends;
  int64_t total = 0;
  for (const Matrix& matrix : matrices) ends.push_back(total += matrix.lines * matrix.length);

  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; i < matrices.size(); ++i) {
      const Matrix& matrix = matrices[i];
      const int64_t start = i == 0 ? 0 : ends[i - 1];
      if (start >= end) break;
      const auto line_at = [&](int64_t position) {  // first line that begins at or after it
        return (std::max<int64_t>(position - start, 0) + matrix.length - 1) / matrix.length;
      };
      scale_lines_of(matrix, line_at(begin), line_at(std::min(end, ends[i])));
    }
  });
}

}  // namespace
}  // namespace ucan_fast

STABLE_TORCH_LIBRARY_FRAGMENT(ucan_fast, m) {
  m.def(
      "_attenuate_native_(Tensor(a!)[] weights, Tensor factors, int[] offsets, int[] axes) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ucan_fast, CPU, m) {
  m.impl("_attenuate_native_", TORCH_BOX(&ucan_fast::attenuate_cpu));
}
