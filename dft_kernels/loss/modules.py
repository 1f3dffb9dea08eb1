"""nn.Modules over the two linear functions: the constants of a loss in one place, tensors in the call."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import linear_cross_entropy, linear_distribution_loss


class _Loss(nn.Module):
    """The constants of a loss. Wrong ones are reported by the first call. Holds no parameters: the head is passed
    in the call, so that a tied weight needs no second home."""

    def __init__(self, **terms: Any) -> None:
        super().__init__()
        self.terms = terms

    def extra_repr(self) -> str:
        """The constants, as they were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.terms.items())


class LinearDistributionLoss(_Loss):
    """`linear_distribution_loss` with its constants fixed: every keyword of the function may be given here, and
    again in the call, where the call wins."""

    def forward(
        self, hidden: Tensor, weight: Tensor, target: Tensor | None = None, teacher: Any = None, **terms: Any
    ) -> Any:
        """The loss of hidden [..., H] through the head weight [V, H]; see `linear_distribution_loss`."""
        return linear_distribution_loss(hidden, weight, target, teacher, **{**self.terms, **terms})


class LinearCrossEntropyLoss(_Loss):
    """`linear_cross_entropy` with its constants fixed, as `LinearDistributionLoss` does it."""

    def forward(self, input: Tensor, linear_weight: Tensor, target: Tensor, **terms: Any) -> Any:
        """The loss of input [..., H] through linear_weight [V, H]; see `linear_cross_entropy`."""
        return linear_cross_entropy(input, linear_weight, target, **{**self.terms, **terms})
