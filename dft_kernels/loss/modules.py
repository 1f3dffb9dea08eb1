"""nn.Modules over the two linear functions: the constants of a loss in one object, tensors in the call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .functional import (
    LINEAR_CROSS_ENTROPY,
    LINEAR_DISTRIBUTION_LOSS,
    linear_cross_entropy,
    linear_distribution_loss,
)
from .options import Function, LossOptions, check_names

if TYPE_CHECKING:
    from typing_extensions import Unpack


class _Loss(nn.Module):
    """The constants of a loss: their names are checked here, their values by each call. Holds no parameters: the head
    is passed in the call, so that a tied weight belongs to one module alone."""

    function: Function

    def __init__(self, **options: Any) -> None:
        super().__init__()
        function = self.function._replace(name=type(self).__name__)
        check_names(function, options, (*function.takes, *function.own))
        self.options = options

    def extra_repr(self) -> str:
        """The constants, as they were given."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class LinearDistributionLoss(_Loss):
    """`linear_distribution_loss` with its constants fixed: every keyword of the function may be given here, and
    again in the call, where the call wins."""

    function = LINEAR_DISTRIBUTION_LOSS

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor | None = None,
        teacher: Any = None,
        **options: Unpack[LossOptions],
    ) -> Any:
        """The loss of hidden [..., H] through the head weight [V, H]; see `linear_distribution_loss`."""
        return linear_distribution_loss(hidden, weight, target, teacher, **{**self.options, **options})


class LinearCrossEntropyLoss(_Loss):
    """`linear_cross_entropy` with its constants fixed, as `LinearDistributionLoss` does it."""

    function = LINEAR_CROSS_ENTROPY

    def forward(self, input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Any:
        """The loss of input [..., H] through linear_weight [V, H]; see `linear_cross_entropy`."""
        return linear_cross_entropy(input, linear_weight, target, **{**self.options, **options})
