// The extension module dft_kernels._cuda: the functions of triton_ops by the CUDA row kernels, on tensors of a CUDA
// device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <vector>

#include "launching.h"
#include "rows.h"
#include "common/divergence.h"
#include "common/tensors.h"

namespace py = pybind11;
using namespace dft;
using namespace dft::cuda;
using Optional = std::optional<at::Tensor>;

namespace dft::cuda {
void bind_exponentials(py::module_&);
}

#ifdef DFT_CUDA_ON_HOST  // tests/cuda_on_host/control.cpp
namespace dft::cuda {
void reverse_threads(bool);
void limit_arena(int64_t);
int cluster_blocks();
const char* run_divergent_barrier();
}  // namespace dft::cuda
#endif

namespace {

const std::vector<std::string> kNames(std::begin(kDivergenceNames), std::end(kDivergenceNames));

// triton_ops.rows.Rows, field by field; shapes there
struct Rows {
  at::Tensor logits;
  double scale;
  std::optional<double> cap;
  Optional label, group, potential, target;
  double target_scale;
  std::optional<double> target_cap;
  std::string divergence;
  double parameter, temperature, target_temperature;
  std::string design;  // a name of Design; triton_ops has none

  at::ScalarType number() const { return logits.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }
  at::TensorOptions options() const { return logits.options().dtype(number()); }
};

Matrix matrix(const at::Tensor& t, const char* name, const Rows& rows) {
  TORCH_CHECK(t.dim() == 2 && t.sizes() == rows.logits.sizes() && t.device() == rows.logits.device(),
              "dft_kernels: ", name, " must be [R, V] like logits ", rows.logits.sizes(), ", got ", t.sizes());
  TORCH_CHECK(t.size(1) == 1 || t.stride(1) == 1, "dft_kernels: ", name, " must have stride 1 along V");
  const int64_t whole = (t.size(1) + 7) / 8 * 8, last = t.storage_offset() + (t.size(0) - 1) * t.stride(0) + whole;
  const bool padded = t.stride(0) >= whole && last * t.element_size() <= int64_t(t.storage().nbytes());
  return {t.const_data_ptr(), t.stride(0), element_of(t.scalar_type()), padded};
}

// The data of a contiguous tensor of this type; null where there is no tensor.
template <class Pointer = const void*>
Pointer numbers(const Optional& t, at::ScalarType type, const char* name, const Rows& rows) {
  if (!t) return nullptr;
  TORCH_CHECK(t->scalar_type() == type && t->is_contiguous() && t->device() == rows.logits.device(),
              "dft_kernels: ", name, " must be contiguous ", type, " beside logits, got ", t->scalar_type());
  return static_cast<Pointer>(t->const_data_ptr());
}

void check_table(const at::Tensor& t, int64_t least, const char* name, const Rows& rows) {
  TORCH_CHECK(t.dim() == 2 && t.size(0) >= least && t.size(1) == rows.logits.size(0) && t.stride(1) == 1 &&
                  t.scalar_type() == rows.number() && t.device() == rows.logits.device(),
              "dft_kernels: ", name, " must be [", least, ", R] ", rows.number(), ", got ", t.sizes());
}

// The launch that is asked for, but for where its statistics and cotangents are
RowArguments described(const Rows& rows, int64_t wanted, int64_t live, const Optional& out) {
  if (wanted & kAtOne) wanted |= 1 << kLse;
  const int64_t asked = wanted | live;
  const bool compared = asked & (1 << kDivergence | 1 << kSoftLse), taught = compared || wanted & 1 << kAgreement;
  RowArguments a = {};
  a.rows = rows.logits.size(0), a.vocab = rows.logits.size(1);
  a.logits = matrix(rows.logits, "logits", rows);
  a.finish = {rows.scale, rows.cap.value_or(0.0)};
  if (taught) {
    TORCH_CHECK(rows.target, "dft_kernels: target must be given where a divergence is asked for, got None");
    a.target = matrix(*rows.target, "target", rows);
    a.target_finish = {rows.target_scale, rows.target_cap.value_or(0.0)};
  }
  if (out) {
    a.out = matrix(*out, "out", rows);
    a.in_place = out->storage().data() == rows.logits.storage().data();
  }
  if (asked & (1 << kLogProb | 1 << kCorrect)) {
    TORCH_CHECK(rows.label, "dft_kernels: label must be given where log_prob is asked for, got None");
    a.label = numbers<const int64_t*>(rows.label, at::kLong, "label", rows);
  }
  if (asked & 1 << kPotential) {
    TORCH_CHECK(rows.potential, "dft_kernels: potential must be given where it is asked for, got None");
    a.potential = numbers(rows.potential, rows.number(), "potential", rows);
    a.group = numbers<const int64_t*>(rows.group, at::kLong, "group", rows);
  }
  const auto name = std::find(kNames.begin(), kNames.end(), rows.divergence);
  TORCH_CHECK(name != kNames.end(), "dft_kernels: divergence must be one of its table, got ", rows.divergence);
  a.divergence = compared ? int(name - kNames.begin()) : int(kNames.size());
  a.parameter = rows.parameter, a.inverse = 1.0 / rows.temperature, a.target_inverse = 1.0 / rows.target_temperature;
  a.wanted = int(wanted), a.live = int(live);
  return a;
}

void run(const Rows& rows, const at::Tensor& statistics, int64_t wanted, int64_t live, const Optional& cotangents,
         const Optional& lse_slope, const Optional& out, bool given = false) {
  RowArguments a = described(rows, wanted, live, out);
  a.given = given;
  check_table(statistics, kRows, "statistics", rows);
  a.statistics = statistics.mutable_data_ptr(), a.statistics_stride = statistics.stride(0);
  if (cotangents) {
    check_table(*cotangents, kCorrect, "cotangents", rows);
    a.cotangents = cotangents->const_data_ptr(), a.cotangents_stride = cotangents->stride(0);
  }
  a.lse_slope = numbers(lse_slope, rows.number(), "lse_slope", rows);
  TORCH_CHECK(rows.design == "automatic" || rows.design == "generic" || rows.design == "lean",
              "dft_kernels: design must be automatic, generic or lean, got ", rows.design);
  const Design design = rows.design == "automatic" ? Design::automatic
                        : rows.design == "generic" ? Design::generic
                                                   : Design::lean;
  on_device(rows.logits.device(), [&](CUstream_st* stream) { return launch_rows(a, design, stream); });
}

// Which kernels `automatic` takes for a launch, where all of the device can be had
std::string chosen_design(const Rows& rows, int64_t wanted, int64_t live, const Optional& out) {
  std::string design;
  on_device(rows.logits.device(), [&](CUstream_st*) {
    design = fits_lean(described(rows, wanted, live, out)) ? "lean" : "generic";
    return nullptr;
  });
  return design;
}

at::Tensor row_statistics(const Rows& rows, int64_t wanted, int64_t live) {
  at::Tensor statistics = at::zeros({kRows, rows.logits.size(0)}, rows.options());
  run(rows, statistics, wanted | 1 << kLse, live, std::nullopt, std::nullopt, std::nullopt);
  return statistics;
}

void row_divergence(const Rows& rows, const at::Tensor& statistics, int64_t live) {
  run(rows, statistics, 1 << kDivergence, live, std::nullopt, std::nullopt, std::nullopt, /*given=*/true);
}

void row_gradient(const Rows& rows, const at::Tensor& statistics, int64_t live, const at::Tensor& cotangents,
                  const Optional& lse_slope, const at::Tensor& out) {
  run(rows, statistics, 0, live, cotangents, lse_slope, out);
}

at::Tensor row_step(const Rows& rows, int64_t wanted, int64_t live, const at::Tensor& cotangents,
                    const Optional& lse_slope, const at::Tensor& out) {
  at::Tensor statistics = at::zeros({kRows, rows.logits.size(0)}, rows.options());
  run(rows, statistics, wanted, live, cotangents, lse_slope, out);
  return statistics;
}

constexpr int64_t kSegments = 8;  // that the rows of one group are split into, so that few columns fill the device

void accumulate_columns(const Rows& rows, const at::Tensor& statistics, const Optional& weight,
                        const at::Tensor& columns) {
  const int64_t count = rows.logits.size(0), vocab = rows.logits.size(1);
  check_table(statistics, kRows, "statistics", rows);
  TORCH_CHECK(columns.dim() == 2 && columns.size(1) == vocab && columns.is_contiguous() && columns.size(0) < 1 << 16,
              "dft_kernels: columns must be [G, ", vocab, "] with G below 65536, got ", columns.sizes());
  const at::TensorOptions index = rows.logits.options().dtype(at::kLong);
  at::Tensor sums = columns, order, starts;
  if (rows.group) {
    order = at::argsort(*rows.group, /*stable=*/true, /*dim=*/0, /*descending=*/false);
    starts = at::searchsorted(rows.group->index_select(0, order), at::arange(columns.size(0) + 1, index));
  } else {
    sums = at::zeros({std::max<int64_t>(1, std::min(count, kSegments)), vocab}, columns.options());
    starts = at::div(at::arange(sums.size(0) + 1, index) * count, sums.size(0), "floor");
  }
  ColumnArguments a = {};
  a.vocab = vocab, a.segments = sums.size(0);
  a.logits = matrix(rows.logits, "logits", rows);
  a.finish = {rows.scale, rows.cap.value_or(0.0)};
  a.statistics = statistics.const_data_ptr(), a.statistics_stride = statistics.stride(0);
  a.weight = numbers(weight, rows.number(), "weight", rows);
  a.order = order.defined() ? order.const_data_ptr<int64_t>() : nullptr;
  a.starts = starts.const_data_ptr<int64_t>();
  a.columns = const_cast<void*>(numbers(sums, rows.number(), "columns", rows));
  on_device(rows.logits.device(), [&](CUstream_st* stream) { return launch_columns(a, stream); });
  if (!rows.group) columns.select(0, 0).add_(sums.sum(0));
}

void scale(const at::Tensor& x, const at::Tensor& factor) {
  const auto number = x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  TORCH_CHECK(x.is_contiguous() && factor.numel() == 1 && factor.scalar_type() == number && factor.device() == x.device(),
              "dft_kernels: scale must be of a contiguous tensor by one ", number, " on its device, got ",
              factor.scalar_type(), " ", factor.sizes());
  const Matrix whole = {x.const_data_ptr(), x.numel(), element_of(x.scalar_type()), false};
  on_device(x.device(),
            [&](CUstream_st* stream) { return launch_scaling(whole, x.numel(), factor.const_data_ptr(), stream); });
}

at::Tensor probabilities(const Rows& rows, const at::Tensor& statistics) {
  at::Tensor out = at::empty(rows.logits.sizes(), rows.options());
  check_table(statistics, kRows, "statistics", rows);
  ProbabilityArguments a = {};
  a.rows = out.size(0), a.vocab = out.size(1);
  a.logits = matrix(rows.logits, "logits", rows);
  a.finish = {rows.scale, rows.cap.value_or(0.0)};
  a.statistics = statistics.const_data_ptr(), a.statistics_stride = statistics.stride(0);
  a.out = out.mutable_data_ptr();
  on_device(rows.logits.device(), [&](CUstream_st* stream) { return launch_probabilities(a, stream); });
  return out;
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The CUDA row kernels of dft_kernels.";
  m.attr("DIVERGENCES") = kNames;
  m.attr("STATISTICS") = int(kRows);
  py::class_<Rows>(m, "Rows", py::module_local()).def(
      py::init([](at::Tensor logits, double scale, std::optional<double> cap, Optional label, Optional group,
                  Optional potential, Optional target, double target_scale, std::optional<double> target_cap,
                  std::string divergence, double parameter, double temperature, double target_temperature,
                  std::string design) {
        return Rows{std::move(logits),
                    scale,
                    cap,
                    std::move(label),
                    std::move(group),
                    std::move(potential),
                    std::move(target),
                    target_scale,
                    target_cap,
                    std::move(divergence),
                    parameter,
                    temperature,
                    target_temperature,
                    std::move(design)};
      }),
      py::kw_only(), py::arg("logits"), py::arg("scale") = 1.0, py::arg("cap") = py::none(),
      py::arg("label") = py::none(), py::arg("group") = py::none(), py::arg("potential") = py::none(),
      py::arg("target") = py::none(), py::arg("target_scale") = 1.0, py::arg("target_cap") = py::none(),
      py::arg("divergence") = "forward_kl", py::arg("parameter") = 0.0, py::arg("temperature") = 1.0,
      py::arg("target_temperature") = 1.0, py::arg("design") = "automatic");
  m.def("row_statistics", &row_statistics);
  m.def("row_divergence", &row_divergence);
  m.def("row_gradient", &row_gradient);
  m.def("row_step", &row_step);
  m.def("chosen_design", &chosen_design, py::arg("rows"), py::arg("wanted"), py::arg("live"),
        py::arg("out") = py::none());
  m.def("accumulate_columns", &accumulate_columns);
  m.def("probabilities", &probabilities);
  m.def("scale", &scale);
  bind_exponentials(m);
#ifdef DFT_CUDA_ON_HOST
  m.def("reverse_threads", [](bool reversed) { reverse_threads(reversed); });
  m.def("limit_arena", [](int64_t bytes) { limit_arena(bytes); });
  m.def("cluster_blocks", [] { return cluster_blocks(); });
  m.def("run_divergent_barrier", [] { return std::string(run_divergent_barrier()); });
#endif
}
