// The contract of csrc/cuda/exponentials.h in plain loops, in the place of CUTLASS's product.
#include "cuda/exponentials.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cuda_on_host.h"
#include "cuda/arithmetic.h"

namespace dft::cuda {

bool has_exponentials() { return true; }
int64_t exponentials_workspace(const ExponentialArguments&) { return 0; }

const char* launch_exponentials(const ExponentialArguments& a, void*, CUstream_st*) {
  const auto bf16 = [](const void* data, int64_t at) { return from_bf16(static_cast<const uint16_t*>(data)[at]); };
  const int64_t padded = (a.rows + kExponentialRows - 1) / kExponentialRows * kExponentialRows;
  const float scale = float(a.finish.scale), cap = float(a.finish.cap);
  std::vector<float> hidden(a.width);
  for (int64_t n = 0; n < a.rows; n++) {
    for (int64_t k = 0; k < a.width; k++) hidden[k] = bf16(a.hidden, n * a.hidden_stride + k);
    for (int64_t t = 0; t * kExponentialColumns < a.vocab; t++) {
      float sum = 0, moment = 0, top = -INFINITY;
      for (int64_t v = t * kExponentialColumns; v < std::min(a.vocab, (t + 1) * kExponentialColumns); v++) {
        float z = 0;
        for (int64_t k = 0; k < a.width; k++) z += hidden[k] * bf16(a.weight, v * a.weight_stride + k);
        if (a.bias) z += a.bias[v];
        z *= scale;
        if (cap != 0) z = cap * std::tanh(z / cap);
        const float d = float(v) == a.label[n] ? -INFINITY : z - a.shift[n];
        const float e = std::exp(d), bent = cap != 0 ? z / cap : 0;
        static_cast<uint16_t*>(a.out)[n * a.out_stride + v] = to_bf16(e * (1 - bent * bent));
        sum += e, moment += e > 0 ? e * d : 0, top = std::fmax(top, d);
      }
      a.sums[t * padded + n] = sum;
      if (a.moments) a.moments[t * padded + n] = moment, a.tops[t * padded + n] = top;
    }
  }
  return nullptr;
}

}  // namespace dft::cuda
