// CUDA registration of ucan_fast::_attenuate_native_. The schema is in _C, which is loaded first.
// Compiled and linked without a GPU; run on an H100.

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "attenuate_cuda.h"
#include "checks.h"

// Part of the stable C interface, but declared by torch only under USE_CUDA, which asks for CUDA's
// headers. It lives in libtorch_cuda.so (see torch_cuda_stub.cpp).
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace {

void attenuate_cuda(StableIValue* stack, uint64_t arguments_given, uint64_t results) {
  const ucan_fast::Arguments arguments(stack, arguments_given, results);
  const auto matrices = ucan_fast::checked_matrices(arguments);
  if (matrices.empty()) return;
  const int32_t device = arguments.factors().get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  STD_TORCH_CHECK(
      aoti_torch_get_current_cuda_stream(device, &stream) == AOTI_TORCH_SUCCESS,
      "_attenuate_native_: torch has no current stream on CUDA device ", device);
  const char* error = ucan_fast::launch_attenuate(matrices, stream);
  STD_TORCH_CHECK(error == nullptr, "_attenuate_native_: CUDA: ", error ? error : "");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ucan_fast, CUDA, m) {
  m.impl("_attenuate_native_", &attenuate_cuda);
}
