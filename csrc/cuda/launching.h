// What the bindings of _cuda share. No CUDA header: the device's stream and guard come through c10's device-generic
// interface, so that they compile and link against a torch without CUDA too.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

struct CUstream_st;

namespace dft::cuda {

// Runs `launch(stream)` on the current stream of a device
template <class Launch>
void on_device(const c10::Device device, Launch launch) {
  const c10::DeviceGuard guard(device);
  CUstream_st* stream = nullptr;
  if (device.is_cuda())
    stream = static_cast<CUstream_st*>(c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle());
  const char* message = launch(stream);
  TORCH_CHECK(!message, "dft_kernels: a CUDA kernel did not launch (", message, ").");
}

}  // namespace dft::cuda
