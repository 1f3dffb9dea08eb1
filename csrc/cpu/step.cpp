// The chunk step on the CPU: products, the three sweeps of rows_cpu.h over their hot tiles, products again.
//
// Logits stand transposed, [V, C]: the weight's rows are then the left operand as they are stored, and only the
// small chunk of hidden states is packed. Where the processor multiplies bf16 (AVX512-BF16, AMX) each thread walks
// its share of the vocabulary tile by tile: product, sweep, next tile; and on the way back sweep, then the tile's
// dlogits straight into the fp32 dweight. Elsewhere, and for the other dtypes, a block of the vocabulary at a time
// is multiplied by ATen in fp32 (fp64), upcast if need be, with the same sweeps between. Threads own disjoint rows
// of the vocabulary, and sums meet in the order of the threads: no atomics, the same bits for the same threads.
#include "step.h"

#include <cmath>
#include <limits>

#include "common/divergence.h"
#include "fold.h"
#include "products.h"
#include "sums.h"

namespace dft {
namespace {

template <class T>
class Step final : public CpuStep {
 public:
  explicit Step(StepArguments arguments) : a_(std::move(arguments)) {
    auto type = c10::CppTypeToScalarType<T>::value;
    if (a_.potential) {
      tables_.potential = a_.potential->to(type).t().contiguous();
      tables_.groups = tables_.potential.size(1);
    }
    if (a_.feature_entries) {
      tables_.entries = a_.feature_entries->to(type).contiguous();
      const int64_t* start = a_.feature_rows->const_data_ptr<int64_t>();
      for (int64_t v = 0; v < a_.vocab; v++)
        if (start[v + 1] > start[v]) tables_.filled.push_back(v);
    }
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> statistics(const ChunkArguments& chunk,
                                                        const optional<Tensor>& columns) override {
    const Source<T> model = source(a_.model, chunk.hidden, a_.logits, chunk.down, a_.up),
                    teacher = teacher_source(chunk);
    const int64_t c = model.c, threads = at::get_num_threads();
    const bool taught = chunk.target.has_value();
    const bool hard = wants(kLogProb) || wants(kMeanLogProb) || wants(kEntropy) || wants(kLse) || wants(kPotential) ||
                      columns || a_.feature_rows;
    const bool sparse = chunk.index && wants(kDivergence), soft = taught && wants(kDivergence);
    const bool apart = (soft || sparse) && hard && a_.temperature != 1.0;  // two temperatures of the model
    const T inverse[2] = {T(hard ? 1.0 : 1.0 / a_.temperature), T(1.0 / a_.temperature)};
    const T target_inverse[2] = {T(1.0 / a_.teacher_temperature), T(0)};
    // entropy and potential come of the first sweep, where it sees all logits and rows share a potential
    const bool pulls = wants(kPotential) && tables_.groups == 1, early = !sparse && (wants(kEntropy) || pulls);
    const T* table = early && pulls ? tables_.potential.const_data_ptr<T>() : nullptr;
    std::vector<Online<T>> online(threads, Online<T>(c, wants(kCorrect) || wants(kAgreement), 1 + apart,
                                                     early && wants(kEntropy), early && pulls));
    std::vector<Online<T>> target_online(threads, Online<T>(c, taught && wants(kAgreement), 1));
    places_.reset();
    if (sparse) places_.emplace(*chunk.index, a_.vocab);
    Tensor found = sparse ? at::empty(chunk.index->sizes(), options()) : at::empty({0}, options());  // z at its tokens
    T* z = found.data_ptr<T>();

    over_blocks(model, teacher, taught, [&](int64_t t, int64_t v, int64_t m) {
      model.fill_tile(v, m);
      const Tile<T> tile{model.logits + v * c, m, c, v};
      if (!sparse) {
        kernels<T>().sums(tile, model.finish(v), online[t].sums(1 + apart, inverse, table ? table + v : nullptr));
      } else {  // sums over what is outside of the target's tokens
        Online<T> unused(c, false, 0);
        kernels<T>().sums(tile, model.finish(v), unused.sums(0, inverse));
        take(tile, z);
        kernels<T>().sums(tile, {nullptr, T(1), T(0)}, online[t].sums(1 + apart, inverse));
        places_->in_tile(v, [&](int64_t i, int64_t row, int64_t slot) { tile.z[i * c + row] = z[slot]; });
      }
      if (taught) {
        teacher.fill_tile(v, m);
        kernels<T>().sums({teacher.logits + v * c, m, c, v}, teacher.finish(v),
                          target_online[t].sums(1, target_inverse));
      }
    });
    const size_t taken = sparse ? found.size(1) : 0, with = sparse ? found.size(0) : 0;
    auto lse = merge(online, 0, inverse[0], z, with, taken);
    auto soft_lse = apart ? merge(online, 1, inverse[1], z, with, taken) : lse;
    auto target_lse = taught ? merge(target_online, 0, target_inverse[0]) : Merged<T>();

    const int64_t rows = chunk.hidden.size(0);
    Tensor out = at::zeros({kRows, rows}, options());
    Tensor features = a_.feature_rows ? at::empty({rows, a_.features}, options()) : at::empty({0}, options());
    second_sweep(model, teacher, chunk, columns, soft && !waits(), early, lse, soft_lse, target_lse, out);
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
    if (wants(kLogProb) || wants(kCorrect) || wants(kAgreement))
      picks(model, chunk, lse, online, target_online, found, out);
    return {out, features, found, tail};
  }

  void gradient(const ChunkArguments& chunk, const Tensor& statistics, const Tensor& features, const Tensor& cotangents,
                const optional<Tensor>& feature_cotangents, const optional<Tensor>& sparse,
                const optional<Tensor>& dhidden, const optional<Tensor>& dweight, const optional<Tensor>& dbias,
                const optional<Tensor>& ddown, const optional<Tensor>& dup, bool first,
                const optional<Tensor>& columns) override {
    const Source<T> model = source(a_.model, chunk.hidden, a_.logits, chunk.down, a_.up);
    const int64_t c = model.c, rows = chunk.hidden.size(0), threads = at::get_num_threads();
    const auto constants =
        fold<T>(a_, tables_, chunk, statistics, features, cotangents, feature_cotangents, c, columns.has_value());
    Gradient<T> shared = constants.kernel(a_);
    const Numbers<T> weight = columns ? weights_of(chunk, c) : Numbers<T>();
    const auto group = columns ? groups_of(chunk, c, columns->size(0)) : Numbers<int64_t>();
    if (columns) shared.weight = weight.data(), shared.columns_stride = kTile;
    if (!group.empty()) shared.group = group.data();
    std::vector<Numbers<double>> column(threads, Numbers<double>(columns ? columns->size(0) * kTile : 0));
    shared.narrow = model.tiles();
    const int which = !shared.soft_lse.lse ? int(kDivergences) : sparse ? int(kDivergences) + 1 : int(a_.divergence);
    const Tensor given = sparse ? sparse->to(options().dtype()).contiguous() : Tensor();
    const T* teacher = a_.target ? a_.target->template const_data_ptr<T>() : nullptr;
    std::vector<FactorGradient<T>> products;
    products.reserve(2);
    if (!model.factors.empty()) products.emplace_back(model.factors[0], dhidden, dweight, c, first);
    if (model.factors.size() > 1) products.emplace_back(model.factors[1], ddown, dup, c, first);
    std::vector<Numbers<double>> sums(threads, Numbers<double>(dbias ? kTile : 0));
    std::vector<Numbers<double>> value(threads, Numbers<double>(c));

    for (int64_t v0 = 0, step = model.blocks() ? kBlock : a_.vocab; v0 < a_.vocab; v0 += step) {
      const int64_t end = std::min(a_.vocab, v0 + step);
      share(v0, end, [&](int64_t t, int64_t from, int64_t to) {
        for (int64_t v = from; v < to; v += kTile) {
          const int64_t m = std::min(kTile, to - v);
          Gradient<T> at = shared;
          if (at.table) at.table += v * tables_.groups;
          if (at.row_start) at.row_start += v;
          if (at.teacher) at.teacher = teacher + v * c;
          std::fill(sums[t].begin(), sums[t].end(), 0.0);
          std::fill(column[t].begin(), column[t].end(), 0.0);
          at.columns = columns ? column[t].data() : nullptr;
          at.bias = dbias ? sums[t].data() : nullptr;
          at.value = value[t].data();
          const Tile<T> tile{model.logits + v * c, m, c, v};
          if (sparse) take(tile, nullptr);
          kernels<T>().gradient[which](tile, at);
          if (columns) add_columns(*columns, column[t], v, m);
          if (sparse) give(tile, given.const_data_ptr<T>(), model.tiles(), at.bias);
          if (dbias) {
            T* out = dbias->template data_ptr<T>() + v;
            for (int64_t i = 0; i < m; i++) out[i] = T(first ? sums[t][i] : out[i] + sums[t][i]);
          }
          if (!a_.model.weight && dhidden)
            kernels<T>().save(model.logits + v * c, m, c, dhidden->data_ptr(), element_of(dhidden->scalar_type()), rows,
                              dhidden->stride(0), v);
          for (auto& product : products) product.tile(t, v, m, model.logits + v * c);
        }
        if (model.tiles()) at::native::cpublas::brgemm_release(true);
      });
      if (!model.blocks()) continue;
      Tensor dlogits = model.view(v0, end - v0);  // [n, R]
      for (auto& product : products) product.block(v0, end - v0, dlogits);
    }
    if (waits()) put(statistics, kDivergence, total(value));
    for (auto& product : products) product.finish(model.logits, a_.vocab);
  }

 private:
  StepArguments a_;
  Tables tables_;
  optional<Places> places_;  // of the chunk's sparse target

  // a tile's logits at the sparse target's tokens out of it, and -inf there
  void take(const Tile<T>& tile, T* to) const {
    places_->in_tile(tile.v, [&](int64_t i, int64_t row, int64_t slot) {
      T& z = tile.z[i * tile.c + row];
      if (to) to[slot] = z;
      z = -std::numeric_limits<T>::infinity();
    });
  }
  // their gradient into the tile's
  void give(const Tile<T>& tile, const T* from, bool narrow, double* bias) const {
    places_->in_tile(tile.v, [&](int64_t i, int64_t row, int64_t slot) {
      T* to = tile.z + i * tile.c;
      if (narrow)
        reinterpret_cast<at::BFloat16*>(to)[row] = at::BFloat16(float(from[slot]));
      else
        to[row] = from[slot];
      if (bias) bias[i] += double(from[slot]);
    });
  }

  // whether the divergence's value is left to the gradient's sweep
  bool waits() const { return a_.differentiates && live(kDivergence) && a_.target && kernels<T>().flat[a_.divergence]; }
  bool wants(Row row) const { return a_.wanted >> row & 1; }
  bool live(Row row) const { return a_.differentiated >> row & 1; }
  at::TensorOptions options() const { return a_.logits.options(); }
  static int64_t padded_rows(const Tensor& hidden) { return (hidden.size(0) + kLanes - 1) / kLanes * kLanes; }

  Source<T> source(const HeadArguments& head, const Tensor& hidden, const Tensor& room,
                   const optional<Tensor>& down = {}, const optional<Tensor>& up = {}) const {
    const int64_t c = padded_rows(hidden);
    TORCH_CHECK(room.numel() >= a_.vocab * c, "dft_kernels: workspace too small");
    return Source<T>(head, hidden, room.data_ptr<T>(), a_.vocab, c, down, up);
  }
  Source<T> teacher_source(const ChunkArguments& chunk) const {
    if (!chunk.target) return Source<T>(chunk.teacher, chunk.hidden.narrow(0, 0, 0), nullptr, 0, 0);
    TORCH_CHECK(a_.target, "dft_kernels: no workspace for a target");
    return source(chunk.teacher, *chunk.target, *a_.target);
  }

  // f(thread, v, m) for every tile of the vocabulary, after the products that ATen does a block at a time
  template <class F>
  void over_blocks(const Source<T>& model, const Source<T>& teacher, bool taught, F f) const {
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

  template <class X>
  static void put(const Tensor& out, Row row, const Numbers<X>& values, double scale = 1.0) {
    T* to = out.data_ptr<T>() + row * out.size(1);
    for (int64_t r = 0; r < out.size(1); r++) to[r] = T(values[r] * scale);
  }

  void second_sweep(const Source<T>& model, const Source<T>& teacher, const ChunkArguments& chunk,
                    const optional<Tensor>& columns, bool soft, bool early, const Merged<T>& lse,
                    const Merged<T>& soft_lse, const Merged<T>& target_lse, const Tensor& out) const {
    const int64_t c = model.c, rows = out.size(1), threads = at::get_num_threads();
    const bool entropies = wants(kEntropy) && !early, potentials = wants(kPotential) && !(early && tables_.groups == 1);
    const bool moments = wants(kMeanLogProb) || entropies || potentials || columns;
    if (!soft && !moments) return;
    using Parts = std::vector<Numbers<double>>;
    auto parts = [&](bool needed, int64_t n) { return Parts(threads, Numbers<double>(needed ? n : 0)); };
    Parts value = parts(soft, c), slope = parts(soft, c), mean = parts(wants(kMeanLogProb), c),
          entropy = parts(entropies, c), potential = parts(potentials, c);
    const int64_t groups = columns ? columns->size(0) : tables_.groups;
    Parts column = parts(columns.has_value(), groups * kTile);
    const Numbers<T> weight = columns ? weights_of(chunk, c) : Numbers<T>();
    auto group = groups_of(chunk, c, groups);
    auto data = [](Numbers<double>& x) { return x.empty() ? nullptr : x.data(); };
    share(0, a_.vocab, [&](int64_t t, int64_t from, int64_t to) {
      for (int64_t v = from; v < to; v += kTile) {
        const int64_t m = std::min(kTile, to - v);
        const Tile<T> tile{model.logits + v * c, m, c, v};
        if (soft)
          kernels<T>().divergence[a_.divergence](
              tile, {teacher.logits + v * c, T(1.0 / a_.temperature), T(1.0 / a_.teacher_temperature), soft_lse.data(),
                     target_lse.data(), T(a_.parameter), value[t].data(), slope[t].data()});
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
    if (wants(kMeanLogProb)) {
      put(out, kMeanLogProb, total(mean), 1.0 / double(a_.vocab));
      T* to = out.data_ptr<T>() + kMeanLogProb * rows;
      for (int64_t r = 0; r < rows; r++) to[r] -= lse.lse[r];
    }
    if (entropies) put(out, kEntropy, total(entropy));
    if (potentials) put(out, kPotential, total(potential));
  }

  Numbers<T> weights_of(const ChunkArguments& chunk, int64_t c) const {
    if (chunk.weight) return padded<T>(*chunk.weight, c);
    Numbers<T> out(c, T(0));
    std::fill_n(out.begin(), chunk.hidden.size(0), T(1));
    return out;
  }
  void add_columns(const Tensor& columns, const Numbers<double>& tile, int64_t v, int64_t m) const {
    for (int64_t g = 0; g < columns.size(0); g++) {
      T* to = columns.data_ptr<T>() + g * a_.vocab + v;
      for (int64_t i = 0; i < m; i++) to[i] += T(tile[g * kTile + i]);
    }
  }

  // Threads share the tokens here: no sums [k, tokens] to meet
  void features_of(const Source<T>& model, const Merged<T>& lse, const Tensor& out) const {
    const int64_t c = model.c, rows = out.size(0), k = a_.features;
    at::parallel_for(0, c / kLanes, 1, [&](int64_t from, int64_t to) {
      Numbers<double> sum(k * kLanes);
      const Features<T> at{model.logits,
                           c,
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

  // What is read off single logits: the label's log-probability, and where the maxima are.
  void picks(const Source<T>& model, const ChunkArguments& chunk, const Merged<T>& lse,
             const std::vector<Online<T>>& online, const std::vector<Online<T>>& target_online, const Tensor& found,
             const Tensor& out) const {
    const int64_t rows = out.size(1);
    T* to = out.data_ptr<T>();
    Numbers<int64_t> label, best, target_best;
    if (chunk.label) label = ids_of(*chunk.label);
    if (wants(kCorrect) || wants(kAgreement))
      best = places_ ? merge_arg(online, *chunk.index, found) : merge_arg(online);
    if (wants(kAgreement)) target_best = places_ ? ids_of(*chunk.favourite) : merge_arg(target_online);
    for (int64_t r = 0; r < rows; r++) {
      if (wants(kLogProb)) {
        bool inside = label[r] >= 0 && label[r] < a_.vocab;
        to[kLogProb * rows + r] = inside ? (model.logits[label[r] * model.c + r] - lse.lse[r]) - lse.low[r]
                                         : std::numeric_limits<T>::quiet_NaN();
      }
      if (wants(kCorrect)) to[kCorrect * rows + r] = T(best[r] == label[r]);
      if (wants(kAgreement)) to[kAgreement * rows + r] = T(best[r] == target_best[r]);
    }
  }
};

}  // namespace

bool multiplies_bf16() { return has_tile_product(); }

std::unique_ptr<CpuStep> make_step(StepArguments arguments) {
  if (arguments.logits.scalar_type() == at::kDouble) return std::make_unique<Step<double>>(std::move(arguments));
  return std::make_unique<Step<float>>(std::move(arguments));
}

at::Tensor repeats(const at::Tensor& ids, int64_t vocab) {
  const at::Tensor in = ids.contiguous();
  const int64_t rows = in.size(0), k = in.size(1);
  at::Tensor out = at::zeros({rows}, in.options().dtype(at::kBool));
  const int64_t* from = in.const_data_ptr<int64_t>();
  bool* to = out.data_ptr<bool>();
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> last(vocab, -1);  // the row that an id was last seen in
    for (int64_t r = begin; r < end; r++)
      for (int64_t j = r * k; j < (r + 1) * k; j++) {
        if (from[j] < 0 || from[j] >= vocab) continue;
        to[r] |= last[from[j]] == r;
        last[from[j]] = int32_t(r);
      }
  });
  return out;
}

at::Tensor evaluate(int64_t function, const at::Tensor& x) {
  at::Tensor in = x.contiguous(), out = at::empty_like(in);
  TORCH_CHECK(in.numel() % kLanes == 0, "dft_kernels: evaluate needs a multiple of ", kLanes, " numbers");
  if (in.scalar_type() == at::kDouble)
    kernels<double>().evaluate(int(function), in.const_data_ptr<double>(), out.data_ptr<double>(), in.numel());
  else
    kernels<float>().evaluate(int(function), in.const_data_ptr<float>(), out.data_ptr<float>(), in.numel());
  return out;
}

}  // namespace dft
