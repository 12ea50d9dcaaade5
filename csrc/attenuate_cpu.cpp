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

// Not ==: on the bits it is one instruction, as no NaN is among them.
UCAN_INLINE bool is_one(float factor) {
  return std::bit_cast<uint32_t>(factor) == std::bit_cast<uint32_t>(1.0f);
}

// One factor per line. The lines to scale are listed first, without a branch: whether the next
// factor is 1 cannot be predicted, and a wrong guess costs more than a line of a small rank.
// kLength: of contiguous lines, where it is known while compiling, else 0.
template <typename T, int64_t kLength>
UCAN_INLINE void scale_by_line(const Matrix& matrix, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 256;
  int32_t changed[kBlock];
  const int64_t length = matrix.length, step = matrix.step, line_stride = matrix.line_stride;
  for (int64_t start = first; start < last; start += kBlock) {
    const float* factors = matrix.factors + start;
    T* lines = static_cast<T*>(matrix.data) + start * line_stride;
    const auto block = static_cast<int32_t>(std::min(kBlock, last - start));
    int64_t count = 0;
    for (int32_t line = 0; line < block; ++line) {
      changed[count] = line;
      count += !is_one(factors[line]);
    }
    for (int64_t i = 0; i < count; ++i) {
      T* __restrict__ values = lines + changed[i] * line_stride;
      const float factor = factors[changed[i]];
      if constexpr (kLength != 0) {
        UCAN_INDEPENDENT
        UCAN_ROLLED
        for (int64_t j = 0; j < kLength; ++j) values[j] = scaled(values[j], factor);
      } else if (step == 1) {
        UCAN_INDEPENDENT
        for (int64_t j = 0; j < length; ++j) values[j] = scaled(values[j], factor);
      } else {
        for (int64_t j = 0; j < length; ++j) values[j * step] = scaled(values[j * step], factor);
      }
    }
  }
}

// One factor per position within a line.
template <typename T>
UCAN_INLINE void scale_by_position(const Matrix& matrix, int64_t first, int64_t last) {
  const float* __restrict__ factors = matrix.factors;
  const int64_t length = matrix.length, step = matrix.step;
  if (std::all_of(factors, factors + length, is_one)) return;
  for (int64_t line = first; line < last; ++line) {
    T* __restrict__ values = static_cast<T*>(matrix.data) + line * matrix.line_stride;
    if (step == 1) {
      // A select of bits, not a branch: it vectorises, and 1 * NaN would change the NaN's bits.
      using Bits = BitsOf<T>;
      UCAN_INDEPENDENT
      for (int64_t j = 0; j < length; ++j) {
        const Bits kept = std::bit_cast<Bits>(values[j]);
        const Bits product = std::bit_cast<Bits>(scaled(values[j], factors[j]));
        values[j] = std::bit_cast<T>(is_one(factors[j]) ? kept : product);
      }
    } else {
      for (int64_t j = 0; j < length; ++j) {
        if (!is_one(factors[j])) values[j * step] = scaled(values[j * step], factors[j]);
      }
    }
  }
}

template <typename T>
UCAN_INLINE void scale_lines(const Matrix& matrix, int64_t first, int64_t last) {
  if (!matrix.factor_per_line) return scale_by_position<T>(matrix, first, last);
  switch (matrix.step == 1 ? matrix.length : 0) {  // ranks whose lines are a few instructions
    case 8:
      return scale_by_line<T, 8>(matrix, first, last);
    case 16:
      return scale_by_line<T, 16>(matrix, first, last);
    default:
      return scale_by_line<T, 0>(matrix, first, last);
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

void attenuate_cpu(StableIValue* stack, uint64_t arguments_given, uint64_t results) {
  static const Scale scale_lines_of = best_scale();
  const Arguments arguments(stack, arguments_given, results);
  const std::vector<Matrix> matrices = checked_matrices(arguments);
  // All elements of all matrices are one range, cut once: many small matrices do not open many
  // parallel regions. A task takes the lines that begin in its piece of the range.
  std::vector<int64_t> ends;
  ends.reserve(matrices.size());
  int64_t total = 0;
  for (const Matrix& matrix : matrices) ends.push_back(total += matrix.lines * matrix.length);

  torch::stable::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; i < matrices.size(); ++i) {
      const Matrix& matrix = matrices[i];
      const int64_t start = i == 0 ? 0 : ends[i - 1];
      if (start >= end) break;
      const auto line_at = [&](int64_t position) {  // first line that begins at or after it
        return (position - start + matrix.length - 1) / matrix.length;
      };
      const int64_t first = start >= begin ? 0 : line_at(begin);
      const int64_t last = ends[i] <= end ? matrix.lines : line_at(end);
      scale_lines_of(matrix, first, last);
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
  m.impl("_attenuate_native_", &ucan_fast::attenuate_cpu);
}
