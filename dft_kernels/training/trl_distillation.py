"""TRL's DistillationTrainer with our chunked divergence in place of its own."""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor

from ..divergences import Divergence, forward_kl, jensen_shannon, reverse_kl
from ..errors import fail
from ..loss.functional import linear_distribution_loss
from ..teachers.head import TeacherHead

_NAME = "_chunked_divergence_loss"  # TRL's function, a global of the module of its trainer


def divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """TRL's function of this signature by `linear_distribution_loss`: the loss, the sum of the student's entropies, and
    the number of positions [B, K] that count.

        sum over these of D(softmax(teacher / T), softmax(student / T)) / num_items_in_batch

    D is KL(teacher‖student) at beta = 0, KL(student‖teacher) at 1, the generalised Jensen-Shannon divergence between
    (arXiv:2306.13649). Both distributions, and the entropies, are at the temperature, which goes into the heads' scales
    and caps. FLOPs: 4 products forward and backward, where TRL's recomputes both models' logits, for 6, or 8 between.
    """
    mask = completion_mask != 0

    def cooled(softcap: float | None) -> float | None:
        return None if softcap is None else softcap / temperature

    loss, metrics = linear_distribution_loss(
        student_hidden_states,
        student_lm_head_weight,
        torch.where(mask, 0, -100),  # of labels no more than where they are
        TeacherHead(
            teacher_hidden_states.detach(),
            teacher_lm_head_weight.detach(),
            None if teacher_lm_head_bias is None else teacher_lm_head_bias.detach(),
            teacher_logit_scale / temperature,
            cooled(teacher_final_logit_softcapping),
        ),
        bias=student_lm_head_bias,
        hard_weight=0.0,
        divergence=_between(beta),
        logit_scale=student_logit_scale / temperature,
        softcap=cooled(student_final_logit_softcapping),
        num_items=num_items_in_batch,
        return_metrics=("entropy",),
    )
    return loss, metrics.entropy.sum(), mask.sum()


def _between(beta: float) -> Divergence:
    return forward_kl() if beta == 0 else reverse_kl() if beta == 1 else jensen_shannon(beta)


def distills(trainer: Any) -> bool:
    """Whether it is TRL's DistillationTrainer."""
    import trl

    return isinstance(trainer, trl.DistillationTrainer)


def fuse_distillation(trainer: Any, tried: str) -> None:
    """Have this trainer, and no other, compute its loss by `divergence_loss`. tried: known versions of trl."""
    import trl
    from trl.trainer import distillation_trainer as module

    known, own = inspect.signature(divergence_loss).parameters, getattr(module, _NAME, None)
    asks = getattr(getattr(type(trainer)._compute_loss, "__code__", None), "co_names", ())
    if own is None or list(inspect.signature(own).parameters) != list(known) or _NAME not in asks:
        relation = f"have the divergence of a version that was tried ({tried})"
        fail("fuse", "trl", relation, trl.__version__, "Install one of these")
    if "_compute_loss" in trainer.__dict__:
        fail("fuse", "trainer", "be fused once", "one that is fused", "Leave out the second fuse")

    def _compute_loss(self: Any, *arguments: Any, **named: Any) -> Any:
        kept = getattr(module, _NAME)
        setattr(module, _NAME, divergence_loss)
        try:
            return type(self)._compute_loss(self, *arguments, **named)
        finally:
            setattr(module, _NAME, kept)

    trainer._compute_loss = types.MethodType(_compute_loss, trainer)
