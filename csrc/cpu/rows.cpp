// The table of kernels of rows.h for one instruction set. setup.py compiles this file once for each, with DFT_ISA as
// its name and the compiler flags that go with it.
#include "rows.h"
#include "common/divergence.h"
#include "simd.h"
#include "sweep_gradient.h"
#include "sweep_scores.h"
#include "sweep_statistics.h"
#include "sweep_sums.h"
#include "transpose.h"

namespace {

template <class T>
void evaluate(int function, const T* x, T* y, int64_t n) {
  using M = Lanes<T>;
  for (int64_t i = 0; i < n; i += M::size) {
    typename M::N a = M::load(x + i);
    M::store(y + i, function == 0   ? M::exp(a)
                    : function == 1 ? M::expm1(a)
                    : function == 2 ? M::log1p(a)
                    : function == 3 ? M::tanh(a)
                                    : M::exp_any(a));
  }
}

template <class T, template <class> class... D>
Kernels<T> table(DivergenceList<D...>) {
  return {
      sums<T>,
      {divergence<T, D>...},
      {D<Lanes<T>>::flat...},
      moments<T>,
      features<T>,
      {gradient<T, With<D>::template Of>..., gradient<T, Without>, gradient<T, OutsideSparse>},
      load<T>,
      save<T>,
      round<T>,
      widen<T>,
      evaluate<T>,
      {largest<T>, shifted<T>, weighed<T>, moments_of<T>, normalised<T>},
  };
}

}  // namespace

namespace dft {

#define DFT_JOIN(a, b) a##b
#define DFT_NAME(a, b) DFT_JOIN(a, b)

const Kernels<float>& DFT_NAME(DFT_ISA, _float)() {
  static const Kernels<float> kernels = table<float>(Divergences());
  return kernels;
}
const Kernels<double>& DFT_NAME(DFT_ISA, _double)() {
  static const Kernels<double> kernels = table<double>(Divergences());
  return kernels;
}

}  // namespace dft
