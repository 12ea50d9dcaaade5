// One weight as the kernels see it. Plain C++: the .cu file includes this and no torch header.
#pragma once

#include <cstdint>

namespace ucan_fast {

enum class Dtype : int { float32, float64, bfloat16, float16 };

// A matrix is read as lines of elements; a line runs along the smaller of the two strides, so that
// a transposed weight is walked in the order of its memory. Strides count elements.
struct Matrix {
  void* data;
  const float* factors;  // one per line, or one per position within a line
  int64_t lines;
  int64_t length;
  int64_t line_stride;
  int64_t step;
  bool factor_per_line;
  Dtype dtype;
};

}  // namespace ucan_fast
