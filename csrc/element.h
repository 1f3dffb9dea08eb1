// The floating types that logits, targets and gradients come in.
#pragma once

namespace dft {

enum class Element { f32, f64, bf16, f16 };

}  // namespace dft
