"""What is measured: ours by each backend, the losses that people write in PyTorch, and other libraries' (peers.py).

An implementation is prepared for a case before anything is timed; what it cannot do here is said as a reason.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import backends
from ..loss.functional import linear_cross_entropy, linear_distribution_loss
from ..loss.options import DEFAULTS
from ..teachers.head import TeacherHead
from ..teachers.logits import TeacherLogits
from .inputs import Inputs
from .problems import HARD_WEIGHT, LOSSES, Case

OURS = "dft_kernels "  # and a backend: our names
NARROW = "dft_kernels, bf16 logits"
Call = Callable[[Inputs], Tensor]  # the mean loss of a row


class Unavailable(Exception):  # noqa: N818 - no error: a fact about this machine
    """Why an implementation cannot run a case on this machine."""


class Implementation(NamedTuple):
    """One implementation of the losses."""

    name: str
    package: str  # that it comes in
    losses: tuple[str, ...]
    prepare: Callable[[Case], Call]  # raises Unavailable or ImportError
    compiled: bool = False  # compiles itself for each new shape
    ours: bool = False

    def version(self) -> str:
        """Package and version, or the package alone."""
        try:
            return f"{self.package} {importlib.metadata.version(self.package)}"
        except importlib.metadata.PackageNotFoundError:
            return self.package


# ---- ours ----


def terms(loss: str) -> dict[str, Any]:
    """The arguments of `linear_distribution_loss` that make it `loss`."""
    if loss == "ce_and_kl":
        return {"hard_weight": HARD_WEIGHT}
    return {"divergence": loss} if loss in ("reverse_kl", "jensen_shannon") else {}


def labels_and_teacher(x: Inputs, loss: str) -> tuple[Tensor | None, Any]:
    """The target and the teacher of `linear_distribution_loss`."""
    if loss == "cross_entropy":
        return x.target, None
    if loss == "stored_kl":
        assert x.teacher_logits is not None
        return None, TeacherLogits(x.teacher_logits)
    return x.target if loss == "ce_and_kl" else None, TeacherHead(x.teacher_hidden, x.teacher_weight)


def _called(case: Case, **options: Any) -> Call:
    """Our public function of a loss, with these options."""
    if case.loss == "cross_entropy":
        return lambda x: linear_cross_entropy(x.hidden, x.weight, x.target, **options)
    extra = terms(case.loss) | options

    def call(x: Inputs) -> Tensor:
        target, teacher = labels_and_teacher(x, case.loss)
        loss: Tensor = linear_distribution_loss(x.hidden, x.weight, target, teacher, **extra)
        return loss

    return call


def _ours(backend: str) -> Callable[[Case], Call]:
    def prepare(case: Case) -> Call:
        reason = backends.BACKENDS[backend].unavailable(torch.device(case.device), case.torch_dtype)
        if reason is not None:
            raise Unavailable(reason)
        return _called(case, backend=backend)

    return prepare


def _narrow(case: Case) -> Call:
    if case.dtype != "bfloat16":
        raise Unavailable(f"it is for bfloat16 inputs, not for {case.dtype}")
    return _called(case, logits_dtype=torch.bfloat16)


# ---- what people write ----


def _sum_of_rows(
    loss: str, hidden: Tensor, weight: Tensor, target: Tensor, teacher: Tensor, head: Tensor | None
) -> Tensor:
    """The sum over rows of a loss of `LOSSES`, from the teacher's hidden states and head, or its logits and None.
    No logits have a name: what autograd does not need is freed at once."""
    if loss == "cross_entropy":
        return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="sum")
    log_q = F.linear(hidden, weight).float().log_softmax(-1)
    log_p = (teacher if head is None else F.linear(teacher, head)).float().log_softmax(-1)
    if loss == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    if loss == "jensen_shannon":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        halves = (F.kl_div(log_m, log_x, reduction="sum", log_target=True) for log_x in (log_p, log_q))
        return 0.5 * sum(halves, start=log_m.new_zeros(()))
    soft = F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    return soft + HARD_WEIGHT * F.nll_loss(log_q, target, reduction="sum") if loss == "ce_and_kl" else soft


def _teacher(x: Inputs, loss: str) -> tuple[Tensor, Tensor | None]:
    if loss == "stored_kl":
        assert x.teacher_logits is not None
        return x.teacher_logits, None
    return x.teacher_hidden, x.teacher_weight


def _eager(case: Case) -> Call:
    loss = case.loss
    return lambda x: _sum_of_rows(loss, x.hidden, x.weight, x.target, *_teacher(x, loss)) / len(x.hidden)


def _compiled(case: Case) -> Call:
    rows = torch.compile(_sum_of_rows, dynamic=False)
    loss = case.loss
    return lambda x: rows(loss, x.hidden, x.weight, x.target, *_teacher(x, loss)) / len(x.hidden)


TEXTBOOK_ROWS = 1024


def _textbook(case: Case) -> Call:
    """Chunks of rows whose logits are dropped after forward and made again in backward."""
    loss = case.loss

    def call(x: Inputs) -> Tensor:
        teacher, head = _teacher(x, loss)
        total = x.hidden.new_zeros((), dtype=torch.float32)
        chunks = (x.hidden.split(TEXTBOOK_ROWS), x.target.split(TEXTBOOK_ROWS), teacher.split(TEXTBOOK_ROWS))
        for hidden, target, rows in zip(*chunks, strict=True):
            total = total + checkpoint(_sum_of_rows, loss, hidden, x.weight, target, rows, head, use_reentrant=False)
        return total / len(x.hidden)

    return call


EAGER = Implementation("eager", "torch", tuple(LOSSES), _eager)


def ours() -> list[Implementation]:
    """This library by each of its backends; and with logits in bf16, as the others have them, where it takes that."""
    made = [
        Implementation(OURS + name, "dft-kernels", tuple(LOSSES), _ours(name), ours=True) for name in backends.BACKENDS
    ]
    if "logits_dtype" in DEFAULTS:
        made.append(Implementation(NARROW, "dft-kernels", tuple(LOSSES), _narrow, ours=True))
    return made


def written() -> list[Implementation]:
    """The losses that people write in PyTorch."""
    every = tuple(LOSSES)
    return [
        EAGER,
        Implementation("torch.compile(eager)", "torch", every, _compiled, compiled=True),
        Implementation("chunks with checkpoint", "torch", every, _textbook),
    ]
