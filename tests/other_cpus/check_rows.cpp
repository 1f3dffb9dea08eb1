// The row kernels in float beside those in double, which call the C library, without torch: for processors that can be
// emulated and have no torch here (make aarch64). Prints an error for each kernel; exits with 1 if one is too large.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/rows.h"

using namespace dft;

namespace {

constexpr int64_t kRows = 64, kTokens = 96;  // of a tile
bool failed = false;

void report(const char* kernel, const char* what, double error, double limit) {
  const bool good = error <= limit;  // false for NaN
  failed |= !good;
  std::printf("%-18s %-10s %.2e%s\n", kernel, what, error, good ? "" : "  TOO LARGE");
}

template <class A, class B>
double distance(const std::vector<A>& x, const std::vector<B>& exact) {
  double apart = 0, size = 0;
  for (size_t i = 0; i < x.size(); i++) {
    if (std::isinf(double(exact[i])) && double(x[i]) == double(exact[i])) continue;
    apart += (double(x[i]) - double(exact[i])) * (double(x[i]) - double(exact[i]));
    size += double(exact[i]) * double(exact[i]);
  }
  return std::sqrt(apart / size);
}

// the largest error in units of the last place
void functions(const Kernels<float>& kernels) {
  const struct {
    const char* name;
    double (*exact)(double);
    double low, high, ulps;
  } all[] = {
      {"exp", std::exp, -86, 87.9, 2},  {"expm1", std::expm1, -100, 87, 3}, {"log1p", std::log1p, -0.9999999, 0, 3},
      {"tanh", std::tanh, -30, 30, 4}, {"exp_any", std::exp, -86, 88.7, 4},
  };
  for (int k = 0; k < 5; k++) {
    std::vector<float> x(1 << 16), y(x.size());
    for (size_t i = 0; i < x.size(); i++)
      x[i] = float(all[k].low + (all[k].high - all[k].low) * double(i) / double(x.size() - 1));
    kernels.evaluate(k, x.data(), y.data(), int64_t(x.size()));
    double worst = 0;
    for (size_t i = 0; i < x.size(); i++) {
      const double exact = all[k].exact(x[i]);
      worst = std::fmax(worst, std::fabs(y[i] - exact) / std::ldexp(1.0, std::ilogb(exact) - 23));
    }
    report(all[k].name, "ulp", worst, all[k].ulps);
  }
}

// A tile of two models' logits, and what the kernels make of it
template <class T>
struct Run {
  std::vector<T> z, teacher, lse, low, target_lse, target_low, one, minus, soft, slope;
  std::vector<Integer<T>> label;
  std::vector<double> value, slopes;
  std::vector<T> dz;
  std::vector<uint16_t> narrow;
  const Kernels<T>& kernels;

  explicit Run(const Kernels<T>& kernels)
      : low(kTokens), target_low(kTokens), one(kTokens, T(1)), minus(kTokens, T(-1)), soft(kTokens, T(0.75)),
        slope(kTokens, T(0.125)), label(kTokens), kernels(kernels) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < kRows * kTokens; i++) {
      z.push_back(T(3 * normal(random)));
      teacher.push_back(T(float(z.back()) + normal(random)));
    }
    z[0] = teacher[kTokens + 1] = z[2 * kTokens + 2] = teacher[2 * kTokens + 2] = -std::numeric_limits<T>::infinity();
    for (int64_t l = 0; l < kTokens; l++) label[l] = Integer<T>(l % kRows);
    lse = summed(z, low), target_lse = summed(teacher, target_low);
  }

  // by sweep 1
  std::vector<T> summed(std::vector<T>& logits, std::vector<T>& rest) {
    std::vector<T> top(kTokens, std::numeric_limits<T>::lowest()), out(kTokens);
    std::vector<double> sum(kTokens);
    kernels.sums({logits.data(), kRows, kTokens, 0}, {nullptr, T(1), T(0)},
                 {top.data(), nullptr, 1, {T(1), T(1)}, {sum.data(), nullptr}, nullptr, nullptr, nullptr});
    for (int64_t l = 0; l < kTokens; l++) {
      const double exact = double(top[l]) + std::log(sum[l]);
      out[l] = T(exact), rest[l] = T(exact - double(out[l]));
    }
    return out;
  }

  void divergence(int id) {
    value.assign(kTokens, 0), slopes.assign(kTokens, 0);
    kernels.divergence[id]({z.data(), kRows, kTokens, 0},
                           {teacher.data(), T(1), T(1), {lse.data(), low.data()},
                            {target_lse.data(), target_low.data()}, T(0.25), value.data(), slopes.data()});
  }

  void gradient(int id, bool to_bf16 = false) {
    dz.assign(kRows * kTokens, T(0)), narrow.assign(dz.size(), 0), value.assign(kTokens, 0);
    Gradient<T> at{};
    at.lse = {lse.data(), low.data()}, at.factor = one.data(), at.label = minus.data(), at.target = label.data();
    if (id != kDivergences) at.soft_lse = at.lse, at.target_lse = {target_lse.data(), target_low.data()};
    at.soft = soft.data(), at.slope = slope.data(), at.teacher = teacher.data();
    at.inverse = at.target_inverse = T(1), at.parameter = T(0.25), at.active = one.data(), at.scale = T(1);
    at.out = {to_bf16 ? static_cast<void*>(narrow.data()) : dz.data(), kTokens, to_bf16};
    at.value = value.data();
    kernels.gradient[id]({z.data(), kRows, kTokens, 0}, at);
  }
};

float widened(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

// bf16 and fp16 survive the way into a tile and back
void elements(const Kernels<float>& kernels) {
  for (Element element : {Element::bf16, Element::f16}) {
    const int64_t rows = kTokens - 3;
    std::vector<uint16_t> in(rows * kRows), out(in.size(), 1);
    for (size_t i = 0; i < in.size(); i++) in[i] = uint16_t(0x3000 + i % 0x2000);
    std::vector<float> tile(kRows * kTokens);
    kernels.load(tile.data(), kRows, kTokens, in.data(), element, rows, kRows, 0);
    kernels.save(tile.data(), kRows, kTokens, out.data(), element, rows, kRows, 0);
    report(element == Element::bf16 ? "bf16" : "fp16", "there, back", in == out ? 0 : 1, 0);
  }
}

// The kernels of a row of next-token scores, of a length that no vector divides
template <class T>
std::vector<double> scores(const Kernels<T>& kernels) {
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<T> z(1003), shift(z.size()), out(z.size());
  for (size_t i = 0; i < z.size(); i++) z[i] = T(3 * normal(random)), shift[i] = T(0.5f * float(i % 7));
  z[5] = z[1001] = -std::numeric_limits<T>::infinity();
  const int64_t n = int64_t(z.size());
  kernels.scores.shifted(z.data(), shift.data(), z.data(), n);
  const T top = kernels.scores.largest(z.data(), n);
  std::vector<double> found{double(top)};
  for (const Tempered<T> at : {Tempered<T>{top, T(1), -std::numeric_limits<T>::infinity()}, {top, T(0.5), T(-6)}}) {
    double sums[6] = {};
    kernels.scores.weighed(z.data(), n, at, sums);
    kernels.scores.moments(z.data(), n, top, sums + 3);
    for (double sum : sums) found.push_back(sum / double(n));
    kernels.scores.normalised(z.data(), out.data(), n, at, T(std::log(sums[0])));
    found.insert(found.end(), out.begin(), out.end());
  }
  return found;
}

}  // namespace

int main() {
  functions(baseline_float());
  elements(baseline_float());
  report("scores", "all", distance(scores(baseline_float()), scores(baseline_double())), 1e-6);
  Run<float> fast(baseline_float());
  Run<double> exact(baseline_double());
  report("sums", "lse", distance(fast.lse, exact.lse), 1e-6);
  for (int id = 0; id < kDivergences + 2; id++) {
    const char* name = id < kDivergences ? kDivergenceNames[id] : id == kDivergences ? "none" : "sparse";
    if (id < kDivergences) {
      fast.divergence(id), exact.divergence(id);
      report(name, "value", distance(fast.value, exact.value), 1e-6);
      if (!fast.kernels.flat[id]) report(name, "slope", distance(fast.slopes, exact.slopes), 2e-6);
    }
    fast.gradient(id), exact.gradient(id);
    report(name, "gradient", distance(fast.dz, exact.dz), 1e-6);
    fast.gradient(id, true);
    std::vector<float> wide;
    for (uint16_t x : fast.narrow) wide.push_back(widened(x));
    report(name, "in bf16", distance(wide, exact.dz), 3e-3);
  }
  return failed;
}
