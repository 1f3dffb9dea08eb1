// From ATen's dtypes to those of the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include "element.h"

namespace dft {

inline Element element_of(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return Element::f32;
    case at::kDouble:
      return Element::f64;
    case at::kBFloat16:
      return Element::bf16;
    case at::kHalf:
      return Element::f16;
    default:
      TORCH_CHECK(false, "dft_kernels: logits must be floating, got ", type);
  }
}

}  // namespace dft
