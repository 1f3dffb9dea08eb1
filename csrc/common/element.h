// What the kernels of every device share with those who call them.
#pragma once

namespace dft {

// The floating types that logits, targets and gradients come in
enum class Element { f32, f64, bf16, f16 };

// The quantities of a row (backends/contract.py), as indices into [kRows, R]; those before kCorrect have cotangents.
enum Row {
  kLogProb,
  kMeanLogProb,
  kEntropy,
  kLse,
  kDivergence,
  kPotential,
  kCorrect,
  kAgreement,
  kSoftLse,
  kTargetLse,
  kSlope,
  kLseLow,
  kSoftLseLow,
  kTargetLseLow,
  kRows,
};

}  // namespace dft
