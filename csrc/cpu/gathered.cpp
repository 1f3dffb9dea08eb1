#include "gathered.h"

#include "products.h"

namespace dft {
namespace {

// to [n] += from [n]; the change of the sum of squares
template <class T>
double add(T* to, const T* from, int64_t n) {
  double change = 0;
  constexpr int64_t kRun = 64;
  for (int64_t k0 = 0; k0 < n; k0 += kRun) {
    T part = 0;
    for (int64_t k = k0; k < std::min(n, k0 + kRun); k++) {
      const T sum = to[k] + from[k];
      part += from[k] * (sum + to[k]);  // sum^2 - to^2
      to[k] = sum;
    }
    change += double(part);
  }
  return change;
}

template <class T>
double add_rows(const Tensor& out, const int64_t* index, const T* from, int64_t n) {
  const int64_t h = out.size(1);
  double change = 0;
  for (int64_t i = 0; i < n; i++) {
    const T* row = from + i * h;
    if (out.scalar_type() == c10::CppTypeToScalarType<T>::value) {
      change += add(out.data_ptr<T>() + index[i] * h, row, h);
      continue;
    }
    if constexpr (sizeof(T) == 4)
      kernels<T>().round(row, nullptr, 1, h, static_cast<uint16_t*>(out.data_ptr()) + index[i] * h,
                         element_of(out.scalar_type()));
    for (int64_t k = 0; k < h; k++) change += double(row[k]) * double(row[k]);
  }
  return change;
}

// f(first, n) for each run of `step` of the rows; the sum of what it returns, in their order
template <class F>
double over(int64_t rows, int64_t step, F f) {
  std::vector<double> parts((rows + step - 1) / step);
  at::parallel_for(0, int64_t(parts.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; i++) parts[i] = f(i * step, std::min(step, rows - i * step));
    at::native::cpublas::brgemm_release(true);
  });
  double sum = 0;
  for (double part : parts) sum += part;
  return sum;
}

template <class T>
double add_wide(const Tensor& out, const int64_t* index, const Tensor& left, const Tensor& right) {
  const auto type = c10::CppTypeToScalarType<T>::value;
  const Tensor wide = right.to(type);
  double change = 0;
  for (int64_t v = 0; v < left.size(0); v += kBlock) {
    const int64_t n = std::min(kBlock, left.size(0) - v), h = out.size(1);
    const Tensor block = at::mm(left.narrow(0, v, n).to(type), wide);
    const T* from = block.const_data_ptr<T>();
    change += over(n, kTile, [&](int64_t i, int64_t m) { return add_rows<T>(out, index + v + i, from + i * h, m); });
  }
  return change;
}

}  // namespace

double add_products(const Tensor& out, const Tensor& index, const Tensor& left, const Tensor& right) {
  const int64_t *ids = index.const_data_ptr<int64_t>(), n = left.size(0), h = out.size(1);
  if (n == 0) return 0;
  if (out.scalar_type() == at::kDouble) return add_wide<double>(out, ids, left, right);
  const bool narrow = left.scalar_type() == at::kBFloat16 && right.scalar_type() == at::kBFloat16;
  if (!narrow || !has_tile_product()) return add_wide<float>(out, ids, left, right);
  const Tensor rows = right.stride(1) == 1 ? right : right.contiguous();
  // operands are packed in pairs
  const Tensor even = left.size(1) % 2 ? at::constant_pad_nd(left, {0, 1}) : left.contiguous();
  const int64_t r = even.size(1);
  const auto packed = pack_tokens(rows, r);
  const auto* from = even.const_data_ptr<at::BFloat16>();
  return over(n, kTile, [&](int64_t i, int64_t m) {
    Numbers<float> tile(kTile * h);
    tile_product(m, h, r, from + i * r, r, packed.data(), tile.data(), false, kHidden);
    return add_rows<float>(out, ids + i, tile.data(), m);
  });
}

}  // namespace dft
