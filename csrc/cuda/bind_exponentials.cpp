// The part of the extension module dft_kernels._cuda that dft_kernels/backends/exponentials.py calls. Shapes and
// formulas: exponentials.h, labels.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

#include "exponentials.h"
#include "labels.h"
#include "launching.h"
#include "common/tensors.h"

namespace py = pybind11;

namespace dft::cuda {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Refuses anything but a tensor of this type and shape, rows apart by any stride, on the device of `like`
void check(const Tensor& t, at::ScalarType type, at::IntArrayRef shape, const char* name, const Tensor& like) {
  TORCH_CHECK(t.scalar_type() == type && t.sizes() == shape && t.device() == like.device() &&
                  (shape.empty() || shape.back() <= 1 || t.stride(-1) == 1),
              "dft_kernels: ", name, " must be ", type, " ", shape, " on ", like.device(), " with stride 1, got ",
              t.scalar_type(), " ", t.sizes(), " on ", t.device());
}

Matrix matrix(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), element_of(t.scalar_type()), false}; }

const float* numbers(const Optional& t, at::IntArrayRef shape, const char* name, const Tensor& like) {
  if (!t) return nullptr;
  check(*t, at::kFloat, shape, name, like);
  TORCH_CHECK(t->is_contiguous(), "dft_kernels: ", name, " must be contiguous");
  return t->const_data_ptr<float>();
}

const int64_t* indices(const Tensor& t, int64_t count, const char* name, const Tensor& like) {
  check(t, at::kLong, {count}, name, like);
  return t.const_data_ptr<int64_t>();
}

void check_rows(const Tensor& hidden, const Tensor& weight) {
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2, "dft_kernels: hidden and weight must be [R, H] and [V, H], got ",
              hidden.sizes(), " and ", weight.sizes());
  check(hidden, at::kBFloat16, {hidden.size(0), weight.size(1)}, "hidden", weight);
  check(weight, at::kBFloat16, weight.sizes(), "weight", hidden);
}

// What the launches of labels.h have in common
void describe(LabelArguments& a, const Tensor& hidden, const Tensor& weight, const Tensor& label,
              const Optional& mean) {
  check_rows(hidden, weight);
  a.rows = hidden.size(0), a.vocab = weight.size(0), a.width = weight.size(1);
  a.hidden = matrix(hidden), a.weight = matrix(weight);
  a.label = indices(label, a.rows, "label", hidden);
  a.mean = numbers(mean, {a.width}, "mean", hidden);
}

std::tuple<Tensor, Tensor, Optional> label_logits(const Tensor& hidden, const Tensor& weight, const Optional& bias,
                                                  const Tensor& label, const Optional& mean, double scale,
                                                  std::optional<double> cap) {
  LabelLogitArguments a = {};
  describe(a, hidden, weight, label, mean);
  a.bias = numbers(bias, {a.vocab}, "bias", hidden);
  const at::TensorOptions options = hidden.options().dtype(at::kFloat);
  Tensor shift = at::empty({a.rows}, options), number = at::empty({a.rows}, options);
  Optional mean_logit;
  if (mean) mean_logit = at::empty({a.rows}, options);
  a.finish = {scale, cap.value_or(0.0)};
  a.shift = shift.data_ptr<float>(), a.out_label = number.data_ptr<float>();
  a.mean_logit = mean ? mean_logit->data_ptr<float>() : nullptr;
  on_device(hidden.device(), [&](CUstream_st* stream) { return launch_label_logits(a, stream); });
  return {shift, number, mean_logit};
}

std::tuple<Tensor, Optional, Optional> exponentials(const Tensor& hidden, const Tensor& weight, const Optional& bias,
                                                    const Tensor& shift, const Tensor& label, double scale,
                                                    std::optional<double> cap, bool metrics, const Tensor& out) {
  ExponentialArguments a = {};
  check_rows(hidden, weight);
  a.rows = hidden.size(0), a.vocab = weight.size(0), a.width = weight.size(1);
  check(out, at::kBFloat16, {a.rows, a.vocab}, "out", hidden);
  const auto whole = [](const Tensor& t) {  // 16-byte aligned rows
    return t.size(1) % 8 == 0 && t.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  };
  TORCH_CHECK(whole(hidden) && whole(weight) && whole(out) && a.vocab < 1 << 24 && a.rows < 1 << 30,
              "dft_kernels: exponentials take H and V of multiples of 8, rows on 16 bytes, got ", hidden.sizes(), " ",
              weight.sizes());
  a.hidden = hidden.const_data_ptr(), a.weight = weight.const_data_ptr(), a.out = out.mutable_data_ptr();
  a.hidden_stride = hidden.stride(0), a.weight_stride = weight.stride(0), a.out_stride = out.stride(0);
  a.finish = {scale, cap.value_or(0.0)};
  a.bias = numbers(bias, {a.vocab}, "bias", hidden);
  a.shift = numbers(shift, {a.rows}, "shift", hidden), a.label = numbers(label, {a.rows}, "label", hidden);
  const auto up = [](int64_t n, int64_t to) { return (n + to - 1) / to; };
  const int64_t tiles = up(a.vocab, kExponentialColumns), padded = up(a.rows, kExponentialRows) * kExponentialRows;
  const auto table = [&] { return at::empty({tiles, padded}, hidden.options().dtype(at::kFloat)); };
  const auto part = [&](const Tensor& t) { return t.narrow(1, 0, a.rows); };
  const bool rich = metrics || a.bias || a.finish.cap != 0;
  const Tensor sums = table(), moments = rich ? table() : Tensor(), tops = rich ? table() : Tensor();
  a.sums = sums.data_ptr<float>();
  a.moments = rich ? moments.data_ptr<float>() : nullptr, a.tops = rich ? tops.data_ptr<float>() : nullptr;
  on_device(hidden.device(), [&](CUstream_st* stream) {
    const Tensor workspace = at::empty({exponentials_workspace(a)}, hidden.options().dtype(at::kByte));
    return launch_exponentials(a, workspace.mutable_data_ptr(), stream);
  });
  if (!rich) return {part(sums), std::nullopt, std::nullopt};
  return {part(sums), part(moments), part(tops)};
}

void row_gradient_of_labels(const Tensor& hidden, const Tensor& weight, const Tensor& label, const Optional& mean,
                            const Tensor& product, const Tensor& by, const Tensor& at_label, const Optional& at_all,
                            const Tensor& out) {
  RowGradientArguments a = {};
  describe(a, hidden, weight, label, mean);
  check(out, at::kBFloat16, {a.rows, a.width}, "out", hidden);
  a.product = numbers(product, {a.rows, a.width}, "product", hidden);
  a.by = numbers(by, {a.rows}, "by", hidden), a.at_label = numbers(at_label, {a.rows}, "at_label", hidden);
  a.at_all = numbers(at_all, {a.rows}, "at_all", hidden);
  TORCH_CHECK(!a.mean == !a.at_all, "dft_kernels: mean and at_all go together");
  a.out = matrix(out);
  on_device(hidden.device(), [&](CUstream_st* stream) { return launch_row_gradient_of_labels(a, stream); });
}

void label_rows(const Tensor& hidden, const Tensor& at_label, const Tensor& order, const Tensor& starts,
                const Tensor& distinct, const Optional& product, const Tensor& out) {
  LabelRowArguments a = {};
  check_rows(hidden, hidden);
  a.rows = hidden.size(0), a.width = hidden.size(1), a.hidden = matrix(hidden);
  a.vocab = out.size(0), a.segments = distinct.size(0);
  check(out, product ? at::kBFloat16 : at::kFloat, {a.vocab, a.width}, "out", hidden);
  a.order = indices(order, a.rows, "order", hidden);
  a.starts = indices(starts, a.segments + 1, "starts", hidden);
  a.distinct = indices(distinct, a.segments, "distinct", hidden);
  a.product = numbers(product, {a.segments, a.width}, "product", hidden);
  a.at_label = numbers(at_label, {a.rows}, "at_label", hidden);
  a.out = matrix(out);
  on_device(hidden.device(), [&](CUstream_st* stream) { return launch_label_rows(a, stream); });
}

}  // namespace

void bind_exponentials(py::module_& m) {
  m.attr("EXPONENTIALS") = has_exponentials();
  m.attr("BAD_TOTAL") = kBadTotal;
  m.def("label_logits", &label_logits);
  m.def("exponentials", &exponentials);
  m.def("row_gradient_of_labels", &row_gradient_of_labels);
  m.def("label_rows", &label_rows);
}

}  // namespace dft::cuda
