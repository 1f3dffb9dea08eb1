"""Single checks of a call's arguments, which raise the one form of message that users of this package see.

FUNCTION: ARGUMENT must RELATION, got VALUE. REMEDY.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..distributed.shards import Shards
from ..errors import fail

Fields = dict[str, Any]  # some fields of a `Problem`, by name
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def has_tangent(value: Tensor | None) -> bool:
    """Whether forward-mode differentiation (torch.func.jvp, dual numbers) runs through the tensor."""
    if value is None:
        return False
    if not torch.compiler.is_compiling():
        if forward_ad._current_level < 0:
            return False
        # unpack_dual has no rule for torch.vmap; what is below it has
        while torch._C._functorch.is_batchedtensor(value):
            value = torch._C._functorch.get_unwrapped(value)
    return forward_ad.unpack_dual(value).tangent is not None


def transformed(tensors: Iterable[Tensor | None]) -> bool:
    """Whether a transform of torch.func, or forward mode, runs over a call with these differentiable tensors."""
    return torch._C._are_functorch_transforms_active() or has_tangents(tensors)


def has_tangents(tensors: Iterable[Tensor | None]) -> bool:
    """Whether forward mode runs through any of them."""
    if forward_ad._current_level < 0 and not torch.compiler.is_compiling():
        return False
    return any(map(has_tangent, tensors))


class Checks:
    """The checks of one call: `function` names it in messages, `lead` is hidden's leading shape."""

    def __init__(self, function: str, names: tuple[str, str, str], hidden: Any, shards: Shards | None = None) -> None:
        self.function = function
        self.names = names  # what this function calls hidden, weight and bias
        self.hidden = self.tensor(names[0], hidden)
        if hidden.dtype not in FLOATING:
            self.fail(names[0], "be float32, bfloat16, float16 or float64", hidden.dtype, "Cast it", TypeError)
        if hidden.ndim == 0:
            self.fail(names[0], "have shape [..., H]", "a 0-d tensor", "Add the feature dimension")
        self.lead = hidden.shape[:-1]
        self.vocab = 0  # V, once the head is known; of a vocabulary of several processes, this one's part of it
        self.shards = shards  # of such a vocabulary

    @property
    def whole_vocab(self) -> int:
        """V of all processes."""
        return self.vocab if self.shards is None else self.shards.total

    def fail(
        self, argument: str, relation: str, got: object, remedy: str, kind: type[Exception] = ValueError
    ) -> NoReturn:
        fail(self.function, argument, relation, got, remedy, kind)

    def tensor(self, argument: str, value: Any) -> Tensor:
        if not isinstance(value, Tensor):
            self.fail(argument, "be a tensor", type(value).__name__, "Pass a torch.Tensor", TypeError)
        if hasattr(value, "full_tensor"):  # a DTensor, told without importing torch.distributed
            remedy = f"Pass {argument}.to_local() where its rows are split as the model's are, else .full_tensor()"
            if argument in self.names[1:]:
                remedy = f'Pass {argument}.full_tensor(grad_placements=[Partial("avg")]) under data parallelism, whose '
                remedy += "gradients are means over processes, or use attach, which reads the head inside of forward"
            got = f"a {type(value).__name__} {list(getattr(value, 'placements', ()))}"
            self.fail(argument, "be a tensor of this process", got, remedy, TypeError)
        return value

    def constant(self, argument: str, value: Any, *, floating: bool = True) -> Tensor:
        """A tensor on hidden's device that no gradient flows to."""
        self.tensor(argument, value)
        if floating and not value.is_floating_point():
            self.fail(argument, "have a floating dtype", value.dtype, "Cast it with .float()", TypeError)
        if value.requires_grad:
            self.fail(
                argument,
                "not require grad (no gradient flows to it)",
                "requires_grad=True",
                f"Pass {argument}.detach(), or freeze the teacher with requires_grad_(False)",
            )
        if has_tangent(value):
            remedy = "Differentiate hidden, weight or bias, or use testing.dense_loss on a small problem"
            self.fail(argument, "not be differentiated (no gradient flows to it)", "a forward-mode tangent", remedy)
        if value.device != self.hidden.device:
            self.fail(argument, f"be on {self.names[0]}'s device {self.hidden.device}", value.device, "Move it there")
        return value

    def shape(self, argument: str, value: Tensor, want: tuple[int, ...], why: str) -> Tensor:
        if tuple(value.shape) != want:
            self.fail(argument, f"have shape {list(want)} ({why})", list(value.shape), "Reshape or slice it to match")
        return value

    def per_row(self, argument: str, value: Any, *, floating: bool) -> Tensor | None:
        """An argument that follows hidden's leading shape, flattened to [N]."""
        if value is None:
            return None
        self.constant(argument, value, floating=floating)
        if not floating and value.dtype != torch.int64:
            remedy = "Cast it with .long()"
            if value.is_floating_point():
                remedy = "Class probabilities as targets go in as teacher=TeacherLogits(probabilities.log())"
            self.fail(argument, "be int64", value.dtype, remedy, TypeError)
        value = self.shape(argument, value, tuple(self.lead), f"{self.names[0]}'s leading shape")
        return value if value.ndim == 1 else value.reshape(-1)

    def number(
        self, argument: str, value: Any, relation: str, holds: Callable[[float], bool] = lambda _: True
    ) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.fail(argument, relation, f"{type(value).__name__} {value!r}", "Pass a number", TypeError)
        if not (math.isfinite(value) and holds(value)):
            self.fail(argument, relation, value, "Pass a finite number in that range")
        return float(value)

    def positive(self, argument: str, value: Any, otherwise: str = "") -> float:
        """A number above 0; otherwise: what else is taken."""
        return self.number(argument, value, f"be greater than 0{otherwise}", lambda x: x > 0)

    def nonzero(self, argument: str, value: Any) -> float:
        return self.number(argument, value, "be a number other than 0", lambda x: x != 0)

    def positive_int(self, argument: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(argument, "be an int of at least 1", repr(value), "Pass a positive int")
        return value

    def choice(self, argument: str, value: Any, options: tuple[str, ...]) -> str:
        if value not in options:
            self.fail(argument, f"be one of {', '.join(options)}", repr(value), "Pick one of these")
        return value

    def like(self, other: str, hidden: Tensor, name: str, value: Tensor) -> None:
        """In dtype and device."""
        if value.dtype != hidden.dtype:
            remedy = "Cast one of them, or run under torch.autocast"
            self.fail(name, f"have {other}'s dtype {hidden.dtype}", value.dtype, remedy, TypeError)
        if value.device != hidden.device:
            self.fail(name, f"be on {other}'s device {hidden.device}", value.device, "Move it there")


def flattened(tensor: Tensor) -> Tensor:
    """[..., H] as [N, H]."""
    if tensor.ndim == 2:
        return tensor
    width = tensor.shape[-1]  # -1 rows of width 0 would be ambiguous
    return tensor.reshape(-1, width) if width else tensor.reshape(tensor.shape[:-1].numel(), 0)
