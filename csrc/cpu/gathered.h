// Products of some of a vocabulary's rows.
#pragma once

#include <ATen/core/Tensor.h>

namespace dft {

// out [V, H] at the rows `index` [n], each of them once: += left [n, R] right [R, H], multiplied in bf16 by brgemm where
// both are, else in fp32 or fp64. `out` is in the accumulation dtype, or in that of `right`, and then written: its rows
// were 0. Returns by how much that changes the sum of squares of `out`.
double add_products(const at::Tensor& out, const at::Tensor& index, const at::Tensor& left, const at::Tensor& right);

}  // namespace dft
