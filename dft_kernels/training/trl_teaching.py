"""A teacher and distribution terms in the steps of TRL's SFTTrainer.

TRL's trainer makes its loss of the log-probabilities that the model's forward returns: minus their sum over the tokens
of all accumulated batches. In a step that is taught, each label's place holds minus the mean loss of its batch, which
has the same sum as minus the losses of its tokens; entropy and accuracy are the model's as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import fail
from ..loss.build import check_options
from ..loss.options import Function
from ..terms import Delayed, DistributionTerm
from .fused_forward import Attachment, fused_loss
from .progress import TermsCallback
from .serving import serve
from .teaching import STORED, asked, check_fits, stand_in

_OPTIONS = ("divergence", "soft_weight", "hard_weight", "temperature", "teacher_temperature", "temperature_scaling",
            "label_smoothing", "z_loss", "memory_budget", "logits_dtype", "backend", "gradient_error")  # fmt: skip
_LOGGED = ("soft_loss", "hard_loss", "teacher_agreement")


@dataclass
class Lesson:
    """What the steps of one trainer are taught."""

    asked: Any  # inputs -> teacher, or None
    terms: Delayed | None
    options: dict[str, Any]  # of linear_distribution_loss
    metrics: Any  # of the trainer: name -> values since the last log
    teacher: Any

    def follow(self, trainer: Any) -> None:
        """Update the terms with the trainer's steps, and ask a served teacher ahead of them."""
        serve(trainer, self.teacher, "fuse")
        if self.terms is not None:
            trainer.add_callback(TermsCallback({"term": self.terms}))

    def outputs(
        self, layer: Any, attachment: Attachment, hidden: Tensor, target: Tensor, given: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of hidden states [B, T, H], and what the trainer reads of each of their labels [B, T]."""
        teacher = None if self.asked is None else self.asked({"shift_labels": target, **given})
        ours = {"teacher": teacher, "distribution_terms": self.terms}
        loss, found = fused_loss(layer, attachment, hidden, target, given, ours)
        valid = (target != -100).to(hidden.device)
        for name in _LOGGED:
            values = getattr(found, name)
            if values is not None:
                self.metrics[name].append(float(values.sum() / valid.sum().clamp(min=1)))
        assert found.entropy is not None
        assert found.correct is not None
        return loss, {"log_probs": torch.where(valid, -loss, 0.0), "entropy": found.entropy, "is_top1": found.correct}


def lesson_of(trainer: Any, teacher: Any, terms: Any, decay: float, options: dict[str, Any]) -> Lesson | None:
    """What `fuse` was asked to teach, checked; None: nothing."""
    if teacher is None and terms is None:
        if options:
            _fail("teacher or terms", f"be given with {', '.join(options)}", "neither", "Leave these out, or give one")
        return None
    import trl

    if not isinstance(trainer, trl.SFTTrainer):
        remedy = "The others' losses are of their own; DistillationTrainer has a teacher"
        _fail("trainer", "be an SFTTrainer where there is a teacher or terms", type(trainer).__name__, remedy)
    args = trainer.args
    for name, value, plain in (
        ("loss_type", args.loss_type, "nll"),
        ("label_smoothing_factor", args.label_smoothing_factor, 0),
        ("compute_loss_func", trainer.compute_loss_func, None),
    ):
        if value != plain:
            _fail(name, f"be {plain!r} where there is a teacher or terms", repr(value), "Leave it out")
    check_fits(teacher, trainer.accelerator.unwrap_model(trainer.model), "fuse")
    device = args.device
    check_options(Function("fuse", _OPTIONS), options, stand_in(teacher, device), device)
    delayed = Delayed(terms, decay) if isinstance(terms, DistributionTerm) else terms
    return Lesson(asked(teacher, device, "fuse"), delayed, options, trainer._metrics["train"], teacher)


def without_store(given: dict[str, Any]) -> dict[str, Any]:
    """Inputs without the rows of a teacher store, which are no model's."""
    return {name: value for name, value in given.items() if name not in STORED}


def _fail(argument: str, relation: str, got: object, remedy: str) -> NoReturn:
    fail("fuse", argument, relation, got, remedy)
