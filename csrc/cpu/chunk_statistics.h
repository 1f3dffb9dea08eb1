// The first half of the chunk step: products and sweeps 1 and 2 of rows.h, which leave the chunk's logits in the
// workspace and return its statistics.
#pragma once

#include <cmath>
#include <limits>

#include "chunk_step.h"

namespace dft {

template <class T>
Source<T> Step<T>::teacher_source(const ChunkArguments& chunk) const {
  if (!chunk.target) return Source<T>(chunk.teacher, chunk.hidden.narrow(0, 0, 0), Logits<T>(), 0, 0);
  TORCH_CHECK(a_.target, "dft_kernels: no workspace for a target");
  return source(chunk.teacher, *chunk.target, *a_.target);
}

// f(thread, v, m) for every tile of the vocabulary, after ATen's products of the block that it is in
template <class T>
template <class F>
void Step<T>::over_blocks(const Source<T>& model, const Source<T>& teacher, bool taught, F f) const {
  const bool blocks = model.blocks() || (taught && teacher.blocks());
  for (int64_t v0 = 0, step = blocks ? kBlock : a_.vocab; v0 < a_.vocab; v0 += step) {
    const int64_t end = std::min(a_.vocab, v0 + step);
    if (model.blocks()) model.multiply_block(v0, end - v0);
    if (taught && teacher.blocks()) teacher.multiply_block(v0, end - v0);
    share(v0, end, [&](int64_t t, int64_t from, int64_t to) {
      for (int64_t v = from; v < to; v += kTile) f(t, v, std::min(kTile, to - v));
      if (model.tiles() || teacher.tiles()) at::native::cpublas::brgemm_release(true);
    });
  }
}

// Sweep 2, of what log-sum-exps are needed for: the divergence's value and slope (soft), moments at T = 1, columns
template <class T>
void Step<T>::second_sweep(const Logits<T>& model, const Logits<T>& teacher, const ChunkArguments& chunk,
                           const optional<Tensor>& columns, Swept asked, const Merged<T>& lse,
                           const Merged<T>& soft_lse, const Merged<T>& target_lse, const Tensor& out) const {
  const int64_t c = padded_rows(chunk.hidden), rows = out.size(1), threads = at::get_num_threads();
  const auto [soft, means, entropies, potentials] = asked;
  const bool moments = means || entropies || potentials || columns;
  if (!soft && !moments) return;
  auto parts = [&](bool needed, int64_t n) { return Parts(threads, Numbers<double>(needed ? n : 0)); };
  Parts value = parts(soft, c), slope = parts(soft, c), mean = parts(means, c),
        entropy = parts(entropies, c), potential = parts(potentials, c);
  const int64_t groups = columns ? columns->size(0) : tables_.groups;
  Parts column = parts(columns.has_value(), groups * kTile);
  const Numbers<T> weight = columns ? weights_of(chunk, c) : Numbers<T>();
  auto group = groups_of(chunk, c, groups);
  auto data = [](Numbers<double>& x) { return x.empty() ? nullptr : x.data(); };
  share(0, a_.vocab, [&](int64_t t, int64_t from, int64_t to) {
    for (int64_t v = from; v < to; v += kTile) {
      const int64_t m = std::min(kTile, to - v);
      const Tile<T> tile{model.read(t, v, m), m, c, v};
      if (soft)
        kernels<T>().divergence[a_.divergence](
            tile, {teacher.read(t, v, m), T(1.0 / a_.temperature), T(1.0 / a_.teacher_temperature),
                   soft_lse.data(), target_lse.data(), T(a_.parameter), value[t].data(), slope[t].data()});
      if (!moments) continue;
      Moments<T> at{};
      at.lse = lse.data();
      at.mean = data(mean[t]), at.entropy = data(entropy[t]), at.potential = data(potential[t]);
      at.table = tables_.potential.defined() ? tables_.potential.const_data_ptr<T>() + v * tables_.groups : nullptr;
      at.group = group.empty() ? nullptr : group.data();
      at.groups = tables_.groups;
      if (columns) {
        std::fill(column[t].begin(), column[t].end(), 0.0);
        at.columns = column[t].data(), at.columns_stride = kTile, at.weight = weight.data();
      }
      kernels<T>().moments(tile, at);
      if (columns) add_columns(*columns, column[t], v, m);
    }
  });
  if (soft) put(out, kDivergence, total(value)), put(out, kSlope, total(slope));
  if (means) {
    put(out, kMeanLogProb, total(mean), 1.0 / double(a_.vocab));
    T* to = out.data_ptr<T>() + kMeanLogProb * rows;
    for (int64_t r = 0; r < rows; r++) to[r] -= lse.lse[r];
  }
  if (entropies) put(out, kEntropy, total(entropy));
  if (potentials) put(out, kPotential, total(potential));
}

// features [R, K] = <q, phi_k>. Threads divide the tokens here, not the vocabulary: no sums to reduce.
template <class T>
void Step<T>::features_of(const Source<T>& model, const Merged<T>& lse, const Tensor& out) const {
  const int64_t rows = out.size(0), k = a_.features;
  at::parallel_for(0, model.c / kLanes, 1, [&](int64_t from, int64_t to) {
    Numbers<double> sum(k * kLanes);
    const Features<T> at{model.logits.held(),
                         lse.data(),
                         tables_.filled.data(),
                         int64_t(tables_.filled.size()),
                         a_.feature_rows->const_data_ptr<int64_t>(),
                         a_.feature_columns->const_data_ptr<int64_t>(),
                         tables_.entries.const_data_ptr<T>(),
                         k,
                         sum.data(),
                         out.data_ptr<T>()};
    for (int64_t block = from; block < to; block++)
      kernels<T>().features(at, block * kLanes, std::min(kLanes, rows - block * kLanes));
  });
}

// The statistics that single logits decide: the label's log-probability, and whether the argmaxima agree
template <class T>
void Step<T>::picks(const Source<T>& model, const Source<T>& teacher, const ChunkArguments& chunk,
                    const Merged<T>& lse, const std::vector<Online<T>>& online,
                    const std::vector<Online<T>>& target_online, const Tensor& found, const Tensor& out) const {
  const int64_t rows = out.size(1);
  T* to = out.data_ptr<T>();
  Numbers<int64_t> label, best, target_best;
  if (chunk.label) label = ids_of(*chunk.label);
  if (wants(kCorrect) || wants(kAgreement)) best = tokens_ ? merge_arg(online, *chunk.index, found) : merge_arg(online);
  if (wants(kAgreement)) target_best = tokens_ ? ids_of(*chunk.favourite) : merge_arg(target_online);
  for (int64_t r = 0; r < rows; r++) {
    if (wants(kLogProb)) {
      bool inside = label[r] >= 0 && label[r] < a_.vocab;
      to[kLogProb * rows + r] = inside ? (model.logits.at(label[r], r) - lse.lse[r]) - lse.low[r]
                                       : std::numeric_limits<T>::quiet_NaN();
    }
    if (wants(kCorrect)) to[kCorrect * rows + r] = T(best[r] == label[r]);
    if (wants(kAgreement)) to[kAgreement * rows + r] = T(best[r] == target_best[r]);
    if (!best.empty()) to[kTop * rows + r] = model.logits.at(best[r], r);
    if (!target_best.empty() && !tokens_) to[kTargetTop * rows + r] = teacher.logits.at(target_best[r], r);
  }
}

template <class T>
CpuStep::Found Step<T>::statistics(const ChunkArguments& chunk, const optional<Tensor>& columns) {
  const Source<T> model = source(a_.model, chunk.hidden, a_.logits, chunk.down, a_.up), teacher = teacher_source(chunk);
  const int64_t c = model.c, threads = at::get_num_threads();
  const bool taught = chunk.target.has_value();
  const bool hard = a_.wanted & kAtOne || columns || a_.feature_rows;
  const bool sparse = chunk.index && compares(), soft = taught && compares();
  const bool apart = (soft || sparse) && hard && a_.temperature != 1.0;  // two temperatures of the model
  const T inverse[2] = {T(hard ? 1.0 : 1.0 / a_.temperature), T(1.0 / a_.temperature)};
  const T target_inverse[2] = {T(1.0 / a_.teacher_temperature), T(0)};
  // the first sweep sums entropy and potential where it sees all logits and all rows share the potential
  const bool pulls = wants(kPotential) && tables_.groups == 1, early = !sparse && (wants(kEntropy) || pulls);
  const T* table = early && pulls ? tables_.potential.const_data_ptr<T>() : nullptr;
  std::vector<Online<T>> online(
      threads, Online<T>(c, wants(kCorrect) || wants(kAgreement), 1 + apart, early && wants(kEntropy), early && pulls));
  const bool favours = taught && (wants(kAgreement) || a_.favourites);
  std::vector<Online<T>> target_online(threads, Online<T>(c, favours, 1));
  tokens_.reset();
  if (sparse) tokens_.emplace(*chunk.index, a_.vocab);
  Tensor found =  // [R, k]: z at the target's tokens
      at::full(sparse ? chunk.index->sizes() : at::IntArrayRef{0}, -std::numeric_limits<T>::infinity(), options());
  T* z = found.data_ptr<T>();

  over_blocks(model, teacher, taught, [&](int64_t t, int64_t v, int64_t m) {
    const Tile<T> tile{model.fill_tile(t, v, m), m, c, v};
    if (!sparse) {
      kernels<T>().sums(tile, model.finish(v), online[t].sums(1 + apart, inverse, table ? table + v : nullptr));
    } else {  // sums over the logits outside of the target's tokens
      Online<T> unused(c, false, 0);
      kernels<T>().sums(tile, model.finish(v), unused.sums(0, inverse));
      take(tile, z);
      kernels<T>().sums(tile, {nullptr, T(1), T(0)}, online[t].sums(1 + apart, inverse));
      tokens_->in_tile(v, [&](int64_t i, int64_t row, int64_t slot) { tile.z[i * c + row] = z[slot]; });
    }
    if (taught) {
      const Tile<T> theirs{teacher.fill_tile(t, v, m), m, c, v};
      kernels<T>().sums(theirs, teacher.finish(v), target_online[t].sums(1, target_inverse));
    }
  });
  const size_t taken = sparse ? found.size(1) : 0, with = sparse ? found.size(0) : 0;
  auto lse = merge(online, 0, inverse[0], z, with, taken);
  auto soft_lse = apart ? merge(online, 1, inverse[1], z, with, taken) : lse;
  auto target_lse = taught ? merge(target_online, 0, target_inverse[0]) : Merged<T>();

  const int64_t rows = chunk.hidden.size(0);
  Tensor out = at::zeros({kRows, rows}, options());
  Tensor features = a_.feature_rows ? at::empty({rows, a_.features}, options()) : at::empty({0}, options());
  const Swept asked{soft && wants(kDivergence) && !waits(), wants(kMeanLogProb), wants(kEntropy) && !early,
                    wants(kPotential) && !(early && tables_.groups == 1)};
  second_sweep(model.logits, teacher.logits, chunk, columns, asked, lse, soft_lse, target_lse, out);
  if (early) {
    Numbers<double> entropy, potential;
    merge_moments(online, entropy, potential);
    if (wants(kEntropy)) put(out, kEntropy, entropy);
    if (pulls) put(out, kPotential, potential);
  }
  if (a_.feature_rows) features_of(model, lse, features);
  put(out, kLse, lse.lse), put(out, kLseLow, lse.low);
  if (soft || sparse) put(out, kSoftLse, soft_lse.lse), put(out, kSoftLseLow, soft_lse.low);
  if (soft) put(out, kTargetLse, target_lse.lse), put(out, kTargetLseLow, target_lse.low);
  Tensor tail = at::empty({sparse ? 2 : 0, rows}, options());
  if (sparse) {
    auto outside = merge(online, apart ? 1 : 0, inverse[1]);
    std::copy_n(outside.lse.begin(), rows, tail.data_ptr<T>());
    std::copy_n(outside.low.begin(), rows, tail.data_ptr<T>() + rows);
  }
  if (a_.favourites && taught) {
    const auto best = merge_arg(target_online);
    favourites_ = at::empty({rows}, at::kLong);
    std::copy_n(best.begin(), rows, favourites_.data_ptr<int64_t>());
  }
  if (wants(kLogProb) || wants(kCorrect) || wants(kAgreement))
    picks(model, teacher, chunk, lse, online, target_online, found, out);
  return {out, features, found, tail};
}

template <class T>
void Step<T>::sums(const ChunkArguments& chunk, const Tensor& statistics, const optional<Tensor>& columns) {
  const int64_t c = padded_rows(chunk.hidden), rows = chunk.hidden.size(0);
  auto known = [&](Row high, Row low) {
    const T* from = statistics.const_data_ptr<T>();
    return Merged<T>{padded(from + high * rows, rows, c), padded(from + low * rows, rows, c)};
  };
  const bool soft = chunk.target && compares();
  const Logits<T> model(a_.logits, a_.vocab, c, a_.model);
  const auto teacher = soft ? Logits<T>(*a_.target, a_.vocab, c, chunk.teacher) : Logits<T>();
  second_sweep(model, teacher, chunk, columns, {soft}, known(kLse, kLseLow), known(kSoftLse, kSoftLseLow),
               known(kTargetLse, kTargetLseLow), statistics);
}

}  // namespace dft
