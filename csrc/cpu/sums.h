// What each thread of the chunk step accumulates over its part of the vocabulary, the reduction over threads, and the
// tokens of a sparse target by tile.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "products.h"

namespace dft {

template <class T>
struct Online {  // [c] each: a thread's sums over its part of the vocabulary, see Sums in rows.h
  Numbers<T> max;
  Numbers<Integer<T>> arg;
  Numbers<double> sum[2], spread, pulled;
  Online(int64_t c, bool wants_arg, int temperatures, bool spreads = false, bool pulls = false)
      : max(c, std::numeric_limits<T>::lowest()),
        arg(wants_arg ? c : 0),
        spread(spreads ? c : 0),
        pulled(pulls ? c : 0) {
    for (int k = 0; k < temperatures; k++) sum[k].assign(c, 0.0);
  }
  Sums<T> sums(int temperatures, const T* inverse, const T* table = nullptr) {
    auto data = [](auto& x) { return x.empty() ? nullptr : x.data(); };
    return {max.data(),   data(arg),    temperatures, {inverse[0], inverse[1]}, {sum[0].data(), sum[1].data()},
            data(spread), data(pulled), table};
  }
};

// Entropy and mean potential [c] from all threads' sums at T = 1, in double:
//
//     H = log sum exp(z - top) - sum exp(z - top) (z - top) / sum exp(z - top)
template <class T>
void merge_moments(const std::vector<Online<T>>& parts, Numbers<double>& entropy, Numbers<double>& potential) {
  const size_t c = parts[0].max.size();
  entropy.assign(c, 0.0), potential.assign(c, 0.0);
  for (size_t l = 0; l < c; l++) {
    double top = parts[0].max[l], total = 0, spread = 0, pulled = 0;
    for (const auto& part : parts) top = std::max(top, double(part.max[l]));
    for (const auto& part : parts) {
      const double below = part.max[l] - top, by = std::exp(below);
      total += part.sum[0][l] * by;
      if (!part.spread.empty()) spread += by > 0 ? by * (part.spread[l] + below * part.sum[0][l]) : 0;
      if (!part.pulled.empty()) pulled += by * part.pulled[l];
    }
    entropy[l] = std::log(total) - spread / total;
    potential[l] = pulled / total;
  }
}

// A log-sum-exp [c], and the rounding error of that
template <class T>
struct Merged {
  Numbers<T> lse, low;
  LogSumExp<T> data() const { return {lse.empty() ? nullptr : lse.data(), low.empty() ? nullptr : low.data()}; }
};

// from all threads' sums at temperature k, and from logits apart [rows, count] that are not in these sums
template <class T>
Merged<T> merge(const std::vector<Online<T>>& parts, int k, T inverse, const T* apart = nullptr, size_t rows = 0,
                size_t count = 0) {
  const size_t c = parts[0].max.size();
  Merged<T> out{Numbers<T>(c), Numbers<T>(c)};
  for (size_t l = 0; l < c; l++) {
    T top = parts[0].max[l];
    for (const auto& part : parts) top = std::max(top, part.max[l]);
    const T *from = apart + l * count, *to = l < rows ? from + count : from;
    for (const T* z = from; z < to; z++) top = std::max(top, *z);
    double total = 0;
    for (const auto& part : parts) total += part.sum[k][l] * std::exp((double(part.max[l]) - top) * inverse);
    for (const T* z = from; z < to; z++) total += std::exp((*z - top) * inverse);
    const double exact = double(top) * inverse + std::log(total);
    out.lse[l] = T(exact);
    out.low[l] = std::isfinite(exact) ? T(exact - double(out.lse[l])) : T(0);
  }
  return out;
}

// The argmax [c] of all threads' maxima; of equal ones the lowest index
template <class T>
Numbers<int64_t> merge_arg(const std::vector<Online<T>>& parts) {
  Numbers<int64_t> out(parts[0].max.size());
  for (size_t l = 0; l < out.size(); l++) {
    size_t best = 0;
    for (size_t t = 1; t < parts.size(); t++)
      if (parts[t].max[l] > parts[best].max[l]) best = t;
    out[l] = parts[best].arg[l];
  }
  return out;
}

// The same where the logits apart [R, k] at ids [R, k] are not in the sums
template <class T>
Numbers<int64_t> merge_arg(const std::vector<Online<T>>& parts, const Tensor& ids, const Tensor& apart) {
  auto out = merge_arg(parts);
  const Tensor index = ids.contiguous();
  const int64_t* v = index.const_data_ptr<int64_t>();
  const T* z = apart.const_data_ptr<T>();
  for (int64_t r = 0, k = apart.size(1); r < apart.size(0); r++) {
    T top = parts[0].max[r];
    for (const auto& part : parts) top = std::max(top, part.max[r]);
    for (int64_t j = r * k; j < (r + 1) * k; j++)
      if (z[j] > top || (z[j] == top && v[j] < out[r])) top = z[j], out[r] = v[j];
  }
  return out;
}

// The tokens [R, k] of a sparse target, sorted by the tile of the vocabulary that they are in; those below 0 are left
// out.
class SparseTokens {
 public:
  struct Token {
    int32_t v, row, slot;  // slot: its index in [R, k], flat
  };
  SparseTokens(const Tensor& index, int64_t vocab)
      : starts_((vocab + kTile - 1) / kTile + 1, 0), tokens_(index.numel()) {
    const Tensor ids = index.contiguous();
    const int64_t* v = ids.const_data_ptr<int64_t>();
    const int64_t count = ids.numel(), k = ids.size(1);
    for (int64_t slot = 0; slot < count; slot++) {
      TORCH_CHECK(v[slot] < vocab, "dft_kernels: a sparse target's token is outside the vocabulary");
      if (v[slot] >= 0) starts_[v[slot] / kTile + 1]++;
    }
    for (size_t tile = 1; tile < starts_.size(); tile++) starts_[tile] += starts_[tile - 1];
    std::vector<int64_t> next(starts_.begin(), starts_.end() - 1);
    for (int64_t slot = 0; slot < count; slot++)
      if (v[slot] >= 0) tokens_[next[v[slot] / kTile]++] = {int32_t(v[slot]), int32_t(slot / k), int32_t(slot)};
  }
  // f(i, row, slot) for every token v + i of the tile that starts at v
  template <class F>
  void in_tile(int64_t v, F f) const {
    for (int64_t at = starts_[v / kTile]; at < starts_[v / kTile + 1]; at++)
      f(tokens_[at].v - v, tokens_[at].row, tokens_[at].slot);
  }

 private:
  std::vector<int64_t> starts_;
  std::vector<Token> tokens_;
};

// The sum [n] over threads, in their order
inline Numbers<double> total(const std::vector<Numbers<double>>& parts) {
  Numbers<double> out(parts[0]);
  for (size_t t = 1; t < parts.size(); t++)
    for (size_t i = 0; i < out.size(); i++) out[i] += parts[t][i];
  return out;
}

}  // namespace dft
