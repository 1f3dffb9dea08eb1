// The arguments of sweep 3 (Gradient in rows.h): every factor of the gradient that does not depend on the vocabulary
// entry, folded into constants of each token. With the statistics and their cotangents as at the head of rows.h:
//
//     factor = l - a - m - h H - c <q, G> - sum_k s_k <q, phi_k>
#pragma once

#include <limits>

#include "chunk_step.h"
#include "sums.h"

namespace dft {

// [c] each; features [K, c]. Null or empty: absent.
template <class T>
struct Constants {
  Merged<T> lse, soft_lse, target_lse;
  Numbers<T> factor, entropy, pull, label, mean, soft, slope, active, features;
  Numbers<Integer<T>> target;
  Numbers<int64_t> group;
  const T *table = nullptr, *entry = nullptr;
  int64_t groups = 1;

  Gradient<T> kernel(const StepArguments& a) const {
    auto data = [](const Numbers<T>& x) { return x.empty() ? nullptr : x.data(); };
    Gradient<T> g{};
    g.lse = lse.data(), g.factor = data(factor), g.entropy = data(entropy), g.pull = data(pull);
    g.label = data(label), g.mean = data(mean), g.target = target.empty() ? nullptr : target.data();
    g.table = table, g.group = group.empty() ? nullptr : group.data(), g.groups = groups;
    if (!features.empty()) {
      g.row_start = a.feature_rows->const_data_ptr<int64_t>();
      g.column = a.feature_columns->const_data_ptr<int64_t>();
      g.entry = entry, g.features = features.data();
    }
    g.soft_lse = soft_lse.data(), g.target_lse = target_lse.data(), g.soft = data(soft), g.slope = data(slope);
    g.inverse = T(1.0 / a.temperature), g.target_inverse = T(1.0 / a.teacher_temperature), g.parameter = T(a.parameter);
    g.active = active.data(), g.scale = T(a.model.scale), g.cap = T(a.model.cap);
    return g;
  }
};

// columns: whether sums of q over rows are asked for, which need lse whatever is differentiated
template <class T>
Constants<T> fold(const StepArguments& a, const Tables& tables, const ChunkArguments& chunk, const Tensor& statistics,
                  const Tensor& features, const Tensor& cotangents, const optional<Tensor>& feature_cotangents,
                  int64_t c, bool columns) {
  const int64_t rows = chunk.hidden.size(0), k = a.features;
  auto live = [&](Row row) { return a.differentiated >> row & 1; };
  const Tensor seeds = cotangents.to(c10::CppTypeToScalarType<T>::value).contiguous();
  const T *quantity = statistics.const_data_ptr<T>(), *by = seeds.const_data_ptr<T>();
  auto known = [&](Row row) { return padded(quantity + row * rows, rows, c); };
  auto seed = [&](Row row) { return padded(by + row * rows, rows, c); };
  Constants<T> out;
  out.active.assign(c, T(0));
  for (int row = 0; row <= kPotential; row++)
    for (int64_t r = 0; r < rows; r++)
      if (by[row * rows + r] != 0) out.active[r] = T(1);
  const bool hard = a.differentiated & kAtOne || feature_cotangents;
  if (hard || columns) {
    out.lse = {known(kLse), known(kLseLow)};
    out.factor = seed(kLse);
    auto subtract = [&](const Numbers<T>& x) {
      for (int64_t r = 0; r < rows; r++) out.factor[r] -= x[r];
    };
    if (live(kLogProb)) {
      out.label = seed(kLogProb);
      subtract(out.label);
      auto label = ids_of(*chunk.label);
      out.target.assign(c, -1);
      for (int64_t r = 0; r < rows; r++) {
        if (label[r] >= 0 && label[r] < a.vocab)
          out.target[r] = Integer<T>(label[r]);
        else
          out.factor[r] = std::numeric_limits<T>::quiet_NaN();
      }
    }
    if (live(kMeanLogProb)) {
      out.mean = seed(kMeanLogProb);
      subtract(out.mean);
      for (auto& x : out.mean) x /= T(a.vocab);
    }
    auto product = [&](Numbers<T> x, const Numbers<T>& y) {
      for (int64_t r = 0; r < rows; r++) x[r] = x[r] == 0 ? T(0) : x[r] * y[r];
      return x;
    };
    if (live(kEntropy)) {
      out.entropy = seed(kEntropy);
      subtract(product(out.entropy, known(kEntropy)));
    }
    if (live(kPotential)) {
      out.pull = seed(kPotential);
      subtract(product(out.pull, known(kPotential)));
      out.table = tables.potential.template const_data_ptr<T>();
      out.groups = tables.groups;
      out.group = groups_of(chunk, c, tables.groups);
    }
    if (feature_cotangents) {
      Tensor cotangent = feature_cotangents->to(seeds.scalar_type()).contiguous();
      const T *from = cotangent.template const_data_ptr<T>(), *found = features.template const_data_ptr<T>();
      out.features.assign(k * c, T(0));
      out.entry = tables.entries.template const_data_ptr<T>();
      for (int64_t r0 = 0; r0 < rows; r0 += kLanes)  // in blocks that write whole cache lines
        for (int64_t j = 0; j < k; j++)
          for (int64_t r = r0; r < std::min(rows, r0 + kLanes); r++) {
            T x = from[r * k + j];
            out.features[j * c + r] = x;
            if (x != 0) out.active[r] = T(1), out.factor[r] -= x * found[r * k + j];
          }
    }
  }
  if (live(kDivergence) && (a.target || chunk.index)) {
    out.soft_lse = {known(kSoftLse), known(kSoftLseLow)};
    out.target_lse = {known(kTargetLse), known(kTargetLseLow)};
    out.slope = known(kSlope);
    out.soft = seed(kDivergence);
    for (auto& x : out.soft) x /= T(a.temperature);
  }
  return out;
}

}  // namespace dft
