// The extension module dft_kernels._C: what this binary was built from, and the CPU chunk step.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "gathered.h"
#include "memory.h"
#include "products.h"
#include "scores.h"

namespace py = pybind11;
using namespace dft;

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

using Optional = std::optional<at::Tensor>;

PYBIND11_MODULE(_C, m) {
  m.doc() = "The CPU kernels of dft_kernels.";
  m.def("build_info", &build_info, "Compiler, C++ standard and torch version of this binary.");
  m.def("instruction_set", &instruction_set, "The compiled instruction set that the CPU kernels run with.");
  m.def("multiplies_bf16", &multiplies_bf16, "Whether this processor multiplies bf16 tile by tile.");
  m.def(
      "pooled", [](std::vector<int64_t> shape, at::ScalarType type) { return pooled(shape, type); },
      "An uninitialised CPU tensor whose memory is kept between calls.");
  m.def("release_pool", &release_pool, "Free the pool's memory that no tensor holds; its bytes.");
  m.def("pool_bytes", &pool_bytes, "Bytes of the pool, held by tensors or free.");
  m.def("repeats", &repeats, "Rows of ids [N, k] in which an id of 0..vocab-1 is found twice.");
  m.def("add_products", &add_products, py::call_guard<py::gil_scoped_release>(),
        "out[index] += left [n, R] right [R, H]; by how much that changes the sum of squares of out.");
  m.def("all_labels", &all_labels, "Whether target [N] holds ids of 0..vocab-1 alone and never the ignored one.");
  m.def("evaluate", &evaluate, "exp (0), expm1 (1), log1p (2), tanh (3) or exp_any (4) as the CPU kernels compute it.");

  const auto free = py::call_guard<py::gil_scoped_release>();
  m.def("shifted_scores", &shifted_scores, free, "out = log softmax(scores + shift).");
  m.def("scores_within", &scores_within, free, "out = log softmax(scores), of those n standard deviations from the max.");
  m.def(
      "scores_at_entropy",
      [](const at::Tensor& scores, double factor, double least, double most, int iterations, double close,
         const at::Tensor& out) { scores_at_entropy(scores, factor, {least, most, iterations, close}, out); },
      free, "out = log softmax(scores / T), with `factor` times its entropy at T = 1.");
  m.def("scores_by_entropy", &scores_by_entropy, free, "out = log softmax(scores / T), T from the entropy at T = 1.");

  py::class_<HeadArguments>(m, "Head").def(py::init([](Optional weight, Optional bias, double scale, double cap) {
                                             return HeadArguments{std::move(weight), std::move(bias), scale, cap};
                                           }),
                                           py::arg("weight"), py::arg("bias"), py::arg("scale"), py::arg("cap"));

  py::class_<ChunkArguments>(m, "Chunk")
      .def(py::init([](at::Tensor hidden, Optional label, Optional group, Optional weight, Optional target,
                       const std::optional<HeadArguments>& teacher, Optional index, Optional favourite, Optional down) {
             return ChunkArguments{std::move(hidden), std::move(label),     std::move(group),
                                   std::move(weight), std::move(target),    teacher.value_or(HeadArguments{}),
                                   std::move(index),  std::move(favourite), std::move(down)};
           }),
           py::arg("hidden"), py::arg("label"), py::arg("group"), py::arg("weight"), py::arg("target"),
           py::arg("teacher"), py::arg("index"), py::arg("favourite"), py::arg("down"));

  py::class_<SpreadArguments>(m, "Spread")
      .def(py::init([](at::Tensor reach, at::Tensor squares, at::Tensor reached) {
             return SpreadArguments{std::move(reach), std::move(squares), std::move(reached)};
           }),
           py::arg("reach"), py::arg("squares"), py::arg("reached"));

  py::class_<CpuStep>(m, "CpuStep")
      .def(py::init([](HeadArguments model, Optional up, int64_t vocab, int64_t wanted, int64_t differentiated,
                       bool differentiates, int64_t divergence, double parameter, double temperature,
                       double teacher_temperature, Optional potential, Optional feature_rows, Optional feature_columns,
                       Optional feature_entries, int64_t features, at::Tensor logits, Optional target,
                       bool favourites) {
             return make_step({std::move(model), std::move(up), vocab, wanted, differentiated, differentiates,
                               favourites, divergence, parameter, temperature, teacher_temperature, std::move(potential),
                               std::move(feature_rows), std::move(feature_columns), std::move(feature_entries),
                               features, std::move(logits), std::move(target)});
           }),
           py::arg("model"), py::arg("up"), py::arg("vocab"), py::arg("wanted"), py::arg("differentiated"),
           py::arg("differentiates"), py::arg("divergence"), py::arg("parameter"), py::arg("temperature"),
           py::arg("teacher_temperature"), py::arg("potential"), py::arg("feature_rows"), py::arg("feature_columns"),
           py::arg("feature_entries"), py::arg("features"), py::arg("logits"), py::arg("target"),
           py::arg("favourites"))
      .def("statistics", &CpuStep::statistics, py::call_guard<py::gil_scoped_release>())
      .def("both", &CpuStep::both, py::call_guard<py::gil_scoped_release>())
      .def("sums", &CpuStep::sums, py::call_guard<py::gil_scoped_release>())
      .def("gradient", &CpuStep::gradient, py::call_guard<py::gil_scoped_release>())
      .def("keeps_dlogits", &CpuStep::keeps_dlogits)
      .def("dlogits", &CpuStep::dlogits)
      .def("products", &CpuStep::products, py::call_guard<py::gil_scoped_release>())
      .def("favourites", &CpuStep::favourites);
}
