#include "scores.h"

#include "products.h"

namespace dft {
namespace {

// f(z, out, n) of every row, of one type
template <class F>
void each_row(const Tensor& scores, const Tensor& out, F f) {
  const int64_t n = scores.size(1);
  AT_DISPATCH_FLOATING_TYPES(scores.scalar_type(), "scores", [&] {
    const scalar_t* z = scores.const_data_ptr<scalar_t>();
    scalar_t* to = out.data_ptr<scalar_t>();
    at::parallel_for(0, scores.size(0), 1, [&](int64_t from, int64_t end) {
      for (int64_t row = from; row < end; row++) f(z + row * n, to + row * n, n);
    });
  });
}

template <class T>
constexpr T kNone = -std::numeric_limits<T>::infinity();

// A row at a temperature: log sum exp of its scores less the largest, over T; their entropy, and its derivative in
// log T, Var_T(scores) / T^2
template <class T>
struct At {
  double log_sum, entropy, slope;
  Tempered<T> how;

  At(const T* z, int64_t n, T top, double log_temperature) : how{top, T(std::exp(-log_temperature)), kNone<T>} {
    double sums[3] = {};
    kernels<T>().scores.weighed(z, n, how, sums);
    const double mean = sums[1] / sums[0], inverse = how.inverse;
    log_sum = std::log(sums[0]);
    entropy = log_sum - inverse * mean;
    slope = inverse * inverse * std::max(sums[2] / sums[0] - mean * mean, 0.0);
  }
};

// The row at the entropy `goal`, from what it is at T = 1
template <class T>
At<T> solved(const T* z, int64_t n, At<T> at, double goal, const Entropies& how) {
  const double edge = goal > at.entropy ? how.most : how.least;  // what log T may not go beyond
  double low = how.least, high = how.most, x = 0;
  bool untried = true;
  for (int number = 0;; number++) {
    (at.entropy > goal ? high : low) = x;
    if (std::abs(at.entropy - goal) <= how.close || low >= high || number == how.iterations) return at;
    untried = untried && x != edge;
    // in log H: of a row with one likely token, H falls by powers as T does
    double there = x + std::log(std::max(goal, 1e-30) / std::max(at.entropy, 1e-30)) * at.entropy /
                           std::max(at.slope, 1e-30);
    const bool beyond = untried && (edge > 0 ? there >= edge : there <= edge);
    if (!(there > low && there < high)) there = (low + high) / 2;
    x = beyond ? edge : there;
    at = At<T>(z, n, at.how.top, x);
  }
}

template <class T>
void normalise(const T* z, T* out, int64_t n, const Tempered<T>& how) {
  double sums[3] = {};
  kernels<T>().scores.weighed(z, n, how, sums);
  kernels<T>().scores.normalised(z, out, n, how, T(std::log(sums[0])));
}

}  // namespace

void shifted_scores(const Tensor& scores, const Tensor& shift, const Tensor& out) {
  each_row(scores, out, [&]<class T>(const T* z, T* to, int64_t n) {
    kernels<T>().scores.shifted(z, shift.const_data_ptr<T>(), to, n);
    normalise<T>(to, to, n, {kernels<T>().scores.largest(to, n), T(1), kNone<T>});
  });
}

void scores_within(const Tensor& scores, double sigmas, const Tensor& out) {
  each_row(scores, out, [&]<class T>(const T* z, T* to, int64_t n) {
    const T top = kernels<T>().scores.largest(z, n);
    double sums[3] = {};
    kernels<T>().scores.moments(z, n, top, sums);
    const double mean = sums[1] / sums[0], sigma = std::sqrt(std::max(sums[2] / sums[0] - mean * mean, 0.0));
    normalise<T>(z, to, n, {top, T(1), T(-sigmas * sigma)});
  });
}

void scores_at_entropy(const Tensor& scores, double factor, const Entropies& how, const Tensor& out) {
  each_row(scores, out, [&]<class T>(const T* z, T* to, int64_t n) {
    const At<T> plain(z, n, kernels<T>().scores.largest(z, n), 0.0);
    const At<T> found = solved(z, n, plain, factor * plain.entropy, how);
    kernels<T>().scores.normalised(z, to, n, found.how, T(found.log_sum));
  });
}

void scores_by_entropy(const Tensor& scores, double log_temperature, double pull, double least, const Tensor& out) {
  each_row(scores, out, [&]<class T>(const T* z, T* to, int64_t n) {
    const At<T> plain(z, n, kernels<T>().scores.largest(z, n), 0.0);
    const double there = log_temperature + pull / std::max(plain.entropy, 1e-6);
    const At<T> found(z, n, plain.how.top, std::max(there, least));
    kernels<T>().scores.normalised(z, to, n, found.how, T(found.log_sum));
  });
}

}  // namespace dft
