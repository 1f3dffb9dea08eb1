// From a divergence's id, known when a kernel is launched, to its pair (f, g), a template argument of the kernel.
// Internal to each translation unit that includes it.
#pragma once

#include "gpu.h"

namespace dft::cuda {

// Stands in for a divergence where none is asked for.
struct None {
  static constexpr bool flat = true, linear = false;
};

namespace {

template <class D, bool Present = true>
struct Pair {
  using type = D;
  static constexpr bool present = Present;
};

// launch(Pair) with the divergence of this id; with None for any other id
template <class T, class Launch, template <class> class... D>
const char* with_pair(DivergenceList<D...>, int id, Launch launch) {
  const char* message = nullptr;
  int at = 0;
  const bool found = ((id == at++ && (message = launch(Pair<D<Math<T>>>()), true)) || ...);
  return found ? message : launch(Pair<None, false>());
}

}  // namespace
}  // namespace dft::cuda
