// CUDA kernel of attenuate_: the rows or columns of many matrices times their factors, in place.
// Compiled for the architectures that setup.py names; run and sanitized on an H100, not tuned.
//
// Memory bound: each element that has a factor other than 1 is read and written once. Lines (or
// 16-byte groups) whose factors are all 1 are neither read nor written. A rank-16 adapter on all
// seven projections of a 7B model (32 layers; 4096 and 11008 wide) is 448 matrices of 40.0 million
// elements: in bf16 80 MB read and 80 MB written if every factor differs from 1, that is 55 us at
// 2.9 TB/s, next to one fp32 product an element.
//
// The description of the matrices travels by value in the kernel's argument: no upload, no
// synchronisation, and a CUDA graph keeps it. Arguments may take 32,764 bytes from CUDA 12.1 on
// (and a driver as new), which is one launch for up to kMany matrices; before, and for few
// matrices, 4 KiB hold kFew. A launch of the large one copies all its 30 KB, used or not.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attenuate_cuda.h"

namespace ucan_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kUnitsPerThread = 4;
constexpr int kUnitsPerBlock = kThreads * kUnitsPerThread;
constexpr int kFew = 60;
#if CUDART_VERSION >= 12010
constexpr int kMany = 512;
#endif

// A unit is what a thread scales at once: 16 bytes of a line, or one element where the layout
// allows no 16-byte access.
struct Item {
  void* data;
  const float* factors;
  int64_t units;
  int64_t units_per_line;
  int64_t line_stride;
  int64_t step;
  bool factor_per_line;
  bool vectorised;
  bool factors_aligned;  // a unit's factors may be loaded 16 bytes at a time
};

template <int kCapacity>
struct Batch {
  static constexpr int capacity = kCapacity;
  unsigned first_block[kCapacity];
  int count;
  Item items[kCapacity];
};
static_assert(sizeof(Batch<kFew>) <= 4096, "the limit before CUDA 12.1");
#if CUDART_VERSION >= 12010
static_assert(sizeof(Batch<kMany>) <= 32764, "the limit from CUDA 12.1 on");
#endif

__device__ float scaled(float value, float factor) { return __fmul_rn(value, factor); }
__device__ double scaled(double value, float factor) {
  return __dmul_rn(value, static_cast<double>(factor));
}
__device__ __nv_bfloat16 scaled(__nv_bfloat16 value, float factor) {
  return __float2bfloat16_rn(__fmul_rn(__bfloat162float(value), factor));
}
__device__ __half scaled(__half value, float factor) {
  return __float2half_rn(__fmul_rn(__half2float(value), factor));
}

// The factors of kWidth neighbours of a line.
template <int kWidth>
__device__ void load_factors(
    const Item& item, int64_t line, int64_t position, float (&factors)[kWidth]) {
  if (item.factor_per_line) {
    const float factor = __ldg(item.factors + line);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) factors[j] = factor;
    return;
  }
  const float* first = item.factors + position;
  if constexpr (kWidth % 4 == 0) {
    if (item.factors_aligned) {
#pragma unroll
      for (int j = 0; j < kWidth; j += 4) {
        const float4 four = __ldg(reinterpret_cast<const float4*>(first + j));
        factors[j] = four.x;
        factors[j + 1] = four.y;
        factors[j + 2] = four.z;
        factors[j + 3] = four.w;
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < kWidth; ++j) factors[j] = __ldg(first + j);
}

// kWidth neighbours of a line at once; kWidth > 1 asks for a step of 1 and 16-byte alignment.
template <typename T, int kWidth>
__device__ void scale_units(const Item& item, int64_t first) {
  struct alignas(sizeof(T) * kWidth) Unit {
    T values[kWidth];
  };
#pragma unroll
  for (int k = 0; k < kUnitsPerThread; ++k) {
    const int64_t unit = first + k * kThreads;
    if (unit >= item.units) return;
    // 64-bit division is slow and hardly ever needed.
    const int64_t line = item.units <= 0xffffffffLL
        ? static_cast<uint32_t>(unit) / static_cast<uint32_t>(item.units_per_line)
        : unit / item.units_per_line;
    const int64_t position = (unit - line * item.units_per_line) * kWidth;
    float factors[kWidth];
    load_factors(item, line, position, factors);
    bool touched = false;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) touched |= factors[j] != 1.0f;
    if (!touched) continue;
    Unit* address = reinterpret_cast<Unit*>(
        static_cast<T*>(item.data) + line * item.line_stride + position * item.step);
    Unit loaded = *address;
#pragma unroll
    for (int j = 0; j < kWidth; ++j) {
      // 1 * NaN would change the NaN's bits.
      if (factors[j] != 1.0f) loaded.values[j] = scaled(loaded.values[j], factors[j]);
    }
    *address = loaded;
  }
}

template <typename T, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    attenuate_kernel(const __grid_constant__ Batch<kCapacity> batch) {
  int low = 0, high = batch.count;  // the last item whose first block is not after this one
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (blockIdx.x >= batch.first_block[middle] ? low : high) = middle;
  }
  const Item item = batch.items[low];  // in registers, not read again for each unit
  const int64_t first =
      static_cast<int64_t>(blockIdx.x - batch.first_block[low]) * kUnitsPerBlock + threadIdx.x;
  if (item.vectorised) {
    scale_units<T, 16 / sizeof(T)>(item, first);
  } else {
    scale_units<T, 1>(item, first);
  }
}

Item item_of(const Matrix& matrix, int64_t element_size) {
  const int64_t width = 16 / element_size;
  const bool vectorised = matrix.step == 1 && matrix.length % width == 0 &&
      (matrix.lines == 1 || matrix.line_stride % width == 0) &&
      reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0;
  const int64_t per_line = vectorised ? matrix.length / width : matrix.length;
  const bool factors_aligned = reinterpret_cast<uintptr_t>(matrix.factors) % 16 == 0;
  return {matrix.data, matrix.factors,         matrix.lines * per_line, per_line, matrix.line_stride,
          matrix.step, matrix.factor_per_line, vectorised,              factors_aligned};
}

template <typename T, typename Filled>
const char* launch_batches(
    const std::vector<Matrix>& matrices, Dtype dtype, cudaStream_t stream, Filled& batch) {
  batch.count = 0;
  int64_t blocks = 0;
  const auto flush = [&]() -> const char* {
    if (batch.count == 0) return nullptr;
    attenuate_kernel<T><<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(batch);
    batch.count = 0;
    blocks = 0;
    const cudaError_t error = cudaGetLastError();
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
  };
  for (const Matrix& matrix : matrices) {
    if (matrix.dtype != dtype) continue;
    const Item item = item_of(matrix, sizeof(T));
    const int64_t needed = (item.units + kUnitsPerBlock - 1) / kUnitsPerBlock;
    if (needed > INT32_MAX) return "a weight is too large for one launch";
    if (batch.count == Filled::capacity || blocks + needed > INT32_MAX) {
      if (const char* error = flush()) return error;
    }
    batch.first_block[batch.count] = static_cast<unsigned>(blocks);
    batch.items[batch.count++] = item;
    blocks += needed;
  }
  return flush();
}

#if CUDART_VERSION >= 12010
bool large_arguments() {
  static const bool supported = [] {
    int driver = 0;
    return cudaDriverGetVersion(&driver) == cudaSuccess && driver >= 12010;
  }();
  return supported;
}
#endif

template <typename T>
const char* launch_dtype(const std::vector<Matrix>& matrices, Dtype dtype, cudaStream_t stream) {
#if CUDART_VERSION >= 12010
  const auto count = std::count_if(
      matrices.begin(), matrices.end(), [&](const Matrix& m) { return m.dtype == dtype; });
  if (count > kFew && large_arguments()) {
    Batch<kMany> batch;
    return launch_batches<T>(matrices, dtype, stream, batch);
  }
#endif
  Batch<kFew> batch;
  return launch_batches<T>(matrices, dtype, stream, batch);
}

}  // namespace

const char* launch_attenuate(const std::vector<Matrix>& matrices, void* stream) {
  const auto queue = static_cast<cudaStream_t>(stream);
  if (const char* error = launch_dtype<float>(matrices, Dtype::float32, queue)) return error;
  if (const char* error = launch_dtype<double>(matrices, Dtype::float64, queue)) return error;
  if (const char* error = launch_dtype<__half>(matrices, Dtype::float16, queue)) return error;
  return launch_dtype<__nv_bfloat16>(matrices, Dtype::bfloat16, queue);
}

}  // namespace ucan_fast
