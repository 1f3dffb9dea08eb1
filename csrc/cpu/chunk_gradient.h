// The second half of the chunk step: sweep 3 of rows.h turns the logits of the workspace into dlogits, and products
// turn these into dhidden = dlogits weight and dweight += dlogits.T hidden.
#pragma once

#include "chunk_step.h"
#include "fold.h"

namespace dft {

// Writes the gradient [R, k] at the sparse target's tokens into that of a tile, and adds it to its sums over tokens.
template <class T>
void Step<T>::give(const Tile<T>& tile, const T* from, const Gradient<T>& at) const {
  tokens_->in_tile(tile.v, [&](int64_t i, int64_t row, int64_t slot) {
    const double given = double(from[slot]);
    if (at.out.narrow)
      static_cast<at::BFloat16*>(at.out.to)[i * at.out.stride + row] = at::BFloat16(float(from[slot]));
    else
      static_cast<T*>(at.out.to)[i * at.out.stride + row] = from[slot];
    if (at.bias) at.bias[i] += given;
    if (at.reach) at.squares[i] += given * given, at.reached[i] += std::abs(given) * double(at.reach[row]);
  });
}

template <class T>
void Step<T>::gradient(const ChunkArguments& chunk, const Tensor& statistics, const Tensor& features,
                       const Tensor& cotangents, const optional<Tensor>& feature_cotangents,
                       const optional<Tensor>& sparse, const optional<Tensor>& dhidden, const optional<Tensor>& dweight,
                       const optional<Tensor>& dbias, const optional<Tensor>& ddown, const optional<Tensor>& dup,
                       bool first, const optional<Tensor>& columns, const optional<SpreadArguments>& spread) {
  const Source<T> model = source(a_.model, chunk.hidden, a_.logits, chunk.down, a_.up);
  const int64_t c = model.c, rows = chunk.hidden.size(0), threads = at::get_num_threads();
  const auto constants =
      fold<T>(a_, tables_, chunk, statistics, features, cotangents, feature_cotangents, c, columns.has_value());
  Gradient<T> shared = constants.kernel(a_);
  const Numbers<T> weight = columns ? weights_of(chunk, c) : Numbers<T>();
  const auto group = columns ? groups_of(chunk, c, columns->size(0)) : Numbers<int64_t>();
  if (columns) shared.weight = weight.data(), shared.columns_stride = kTile;
  if (!group.empty()) shared.group = group.data();
  Parts column(threads, Numbers<double>(columns ? columns->size(0) * kTile : 0));
  const int which = !shared.soft_lse.lse ? int(kDivergences) : sparse ? int(kDivergences) + 1 : int(a_.divergence);
  const Tensor given = sparse ? sparse->to(options().dtype()).contiguous() : Tensor();
  const bool taught = shared.soft_lse.lse && !sparse;
  const auto teacher = taught ? Logits<T>(*a_.target, a_.vocab, c, chunk.teacher) : Logits<T>();
  std::vector<FactorGradient<T>> products;
  products.reserve(2);
  if (!model.factors.empty() && !spread) products.emplace_back(model.factors[0], dhidden, dweight, c, first);
  if (model.factors.size() > 1) products.emplace_back(model.factors[1], ddown, dup, c, first);
  Parts sums(threads, Numbers<double>(dbias ? kTile : 0));
  const Numbers<T> reach = spread ? padded<T>(spread->reach, c) : Numbers<T>();
  Parts squares(threads, Numbers<double>(spread ? kTile : 0)), reached(squares);
  if (spread) shared.reach = reach.data();
  Parts value(threads, Numbers<double>(c));

  for (int64_t v0 = 0, step = model.blocks() ? kBlock : a_.vocab; v0 < a_.vocab; v0 += step) {
    const int64_t end = std::min(a_.vocab, v0 + step);
    share(v0, end, [&](int64_t t, int64_t from, int64_t to) {
      for (int64_t v = from; v < to; v += kTile) {
        const int64_t m = std::min(kTile, to - v);
        Gradient<T> at = shared;
        if (at.table) at.table += v * tables_.groups;
        if (at.row_start) at.row_start += v;
        if (taught) at.teacher = teacher.read(t, v, m);
        std::fill(sums[t].begin(), sums[t].end(), 0.0);
        std::fill(column[t].begin(), column[t].end(), 0.0);
        at.columns = columns ? column[t].data() : nullptr;
        at.bias = dbias ? sums[t].data() : nullptr;
        at.value = value[t].data();
        if (spread) {
          std::fill(squares[t].begin(), squares[t].end(), 0.0), std::fill(reached[t].begin(), reached[t].end(), 0.0);
          at.squares = squares[t].data(), at.reached = reached[t].data();
        }
        const Tile<T> tile{model.logits.read(t, v, m), m, c, v};
        at.out = model.dlogits(tile.z, v);
        if (sparse) take(tile, nullptr);
        kernels<T>().gradient[which](tile, at);
        if (columns) add_columns(*columns, column[t], v, m);
        if (sparse) give(tile, given.const_data_ptr<T>(), at);
        if (spread) {
          std::copy_n(squares[t].begin(), m, spread->squares.data_ptr<T>() + v);
          std::copy_n(reached[t].begin(), m, spread->reached.data_ptr<T>() + v);
        }
        if (dbias) {
          T* out = dbias->template data_ptr<T>() + v;
          for (int64_t i = 0; i < m; i++) out[i] = T(first ? sums[t][i] : out[i] + sums[t][i]);
        }
        if (!a_.model.weight && dhidden)
          kernels<T>().save(tile.z, m, c, dhidden->data_ptr(), element_of(dhidden->scalar_type()), rows,
                            dhidden->stride(0), v);
        for (auto& product : products) product.tile(t, v, m, at.out);
      }
      if (model.tiles()) at::native::cpublas::brgemm_release(true);
    });
    if (!model.blocks()) continue;
    Tensor dlogits = model.view(v0, end - v0);  // [n, R]
    for (auto& product : products) product.block(v0, end - v0, dlogits);
  }
  if (waits()) put(statistics, kDivergence, total(value));
  for (auto& product : products) product.finish(model.dlogits(model.logits.tile(0, 0), 0), a_.vocab);
}

template <class T>
bool Step<T>::keeps_dlogits(const ChunkArguments& chunk) const {
  return a_.model.weight && (by_tiles(a_.model, chunk.hidden) || a_.logits.element_size() == sizeof(T));
}

template <class T>
Tensor Step<T>::dlogits(const ChunkArguments& chunk) const {
  const bool tiles = by_tiles(a_.model, chunk.hidden);  // then over fp32 logits, or over narrow ones
  const int64_t c = padded_rows(chunk.hidden), stride = tiles && a_.logits.element_size() == sizeof(T) ? 2 * c : c;
  const Tensor whole = tiles ? a_.logits.view(at::kBFloat16) : a_.logits;
  return whole.as_strided({a_.vocab, chunk.hidden.size(0)}, {stride, 1});
}

template <class T>
void Step<T>::products(const ChunkArguments& chunk, const optional<Tensor>& dhidden, const optional<Tensor>& dweight,
                       bool first) const {
  const Source<T> model = source(a_.model, chunk.hidden, a_.logits, chunk.down, a_.up);
  FactorGradient<T> product(model.factors[0], dhidden, dweight, model.c, first);
  if (model.blocks()) {
    for (int64_t v = 0; v < a_.vocab; v += kBlock) {
      const int64_t n = std::min(kBlock, a_.vocab - v);
      product.block(v, n, model.view(v, n));
    }
  } else {
    share(0, a_.vocab, [&](int64_t t, int64_t from, int64_t to) {
      for (int64_t v = from; v < to; v += kTile)
        product.tile(t, v, std::min(kTile, to - v), model.dlogits(model.logits.tile(t, v), v));
      at::native::cpublas::brgemm_release(true);
    });
  }
  product.finish(model.dlogits(model.logits.tile(0, 0), 0), a_.vocab);
}

}  // namespace dft
