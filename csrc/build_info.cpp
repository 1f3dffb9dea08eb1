// The pybind11 module dft_kernels._C: what this binary was built from. Importing it also registers csrc/ops.cpp.
#include <pybind11/pybind11.h>
#include <torch/version.h>

namespace py = pybind11;

static py::dict build_info() {
  py::dict info;
  info["torch"] = TORCH_VERSION;
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#elif defined(__GNUC__)
      "gcc " __VERSION__;
#else
      "unknown";
#endif
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled room of dft_kernels.";
  m.def("build_info", &build_info, "Compiler, C++ standard and torch version of this binary.");
}
