// The dtypes of tensors and the numbering of the row statistics: what the kernels of every device share with their
// callers.
#pragma once

namespace dft {

// The dtype of logits, targets and gradients
enum class Element { f32, f64, bf16, f16 };

// The row statistics (backends/contract.py), as indices into a table [kRows, R] and as bits 1 << Row of a set; those
// before kCorrect are differentiable and have cotangents.
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
  kTop,
  kTargetTop,
  kRows,
};

// The set of those that depend on softmax(z) at T = 1, and so on its log-sum-exp
constexpr int kAtOne = 1 << kLogProb | 1 << kMeanLogProb | 1 << kEntropy | 1 << kLse | 1 << kPotential;

}  // namespace dft
