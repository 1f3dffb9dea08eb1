"""TRL's trainers with our kernels: `fuse(trainer)`.

TRL gives a model a forward that returns log-probabilities of its labels in place of logits, and computes them chunk by
chunk. `fuse` puts a forward of ours there, with the same results: the model's own forward with
`token_statistics` in place of its head. Whatever a trainer makes of them (losses, rewards, KL, metrics) stays TRL's.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import fail
from ..loss.tokens import token_statistics
from ..models.heads import head_of, output_layer, unwrapped
from .fused_forward import Attachment, check_loss, projected, run_forward, targets_of
from .trl_distillation import distills, fuse_distillation
from .trl_teaching import Lesson, lesson_of, without_store

TRIED = "1.15.0, 1.16.0"  # versions of trl whose trainers were compared with their own results
_OUTPUTS = {  # of TRL's forward, as token_statistics calls them
    "log_probs": "log_prob",
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "is_top1",
}
_FIELDS = {"loss", "label_mask", "aux_loss", *_OUTPUTS}
_SETTINGS = ("original_forward", "temperature", "cast_lm_head_to_fp32", "outputs")  # what TRL's forward closes over
_MADE = ("trl.trainer.utils", "_fused_forward")  # where, and under which name


@dataclasses.dataclass
class FusedHead:
    """What TRL has set for the forward of one model."""

    attachment: Attachment  # of the forward below TRL's
    temperature: float
    outputs: tuple[str, ...]  # beside log_probs
    result: Any  # the class of TRL's output
    lesson: Lesson | None = None  # in training


def fuse(trainer: Any, teacher: Any = None, *, terms: Any = None, terms_decay: float = 0.9, **loss: Any) -> Any:
    """Make our kernels compute what a trainer of TRL asks of its model's head; returns the trainer.

        trainer = GRPOTrainer(model, rewards, args, train_dataset=dataset)
        fuse(trainer).train()
        fuse(sft_trainer, teacher, hard_weight=0.1).train()

    trainer: one of TRL's that give their model a fused head (SFT, DPO, KTO, GRPO, RLOO), a model that has one, or a
    DistillationTrainer, whose divergence is then `linear_distribution_loss`'s: 4 products in place of 6 or 8. The
    reference model is fused too, where the trainer has one. log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1
    and the loss of the forward are then `token_statistics`' at the trainer's temperature, of the labels that count
    alone; whatever else the model's forward adds, as its router's loss, is in the result as before. LoRA on the head
    is trained (TRL's trainers refuse it there).

    teacher, terms: of an SFTTrainer, whose steps then have the loss of `DFTTrainer`,

        soft_weight D(teacher, model) + hard_weight CE + terms

    on the tokens that its labels keep, packed or not. teacher: as there, a causal LM, a `ServedTeacher`, a function of
    the batch, a `Store` (the trainer's data set has its sequences by number, the collator is `store.batch` of them), or
    a `Mixture`. terms: `dft_kernels.terms`, delayed, with running statistics of decay terms_decay that a resumed
    training begins anew. loss: keywords of `linear_distribution_loss`: divergence, soft_weight, hard_weight (0 with a
    teacher, unless given), temperature, teacher_temperature, temperature_scaling, label_smoothing, z_loss,
    memory_budget, logits_dtype, backend, gradient_error. Logged beside TRL's metrics: soft_loss, hard_loss,
    teacher_agreement. Evaluation is cross-entropy.

    Raises ValueError, TypeError: nothing that has TRL's fused head, a model that `attach` took (detach it before the
    trainer is made), a head that `attach` would refuse, or a version of trl whose fused head is not the known one.
    """
    models = _models(trainer)
    lesson = lesson_of(trainer, teacher, terms, terms_decay, loss)
    if distills(trainer):
        fuse_distillation(trainer, TRIED)
        return trainer
    heads = [_head(model, accelerator) for model, accelerator in models]  # all are checked before any is changed
    if lesson is not None:
        heads[0].lesson, heads[0].attachment.terms = lesson, lesson.options
        lesson.follow(trainer)
    for (model, accelerator), head in zip(models, heads, strict=True):
        _install(model, _forward(_below(model.__dict__["forward"], _MADE), head), accelerator)
    return trainer


def _models(trainer: Any) -> list[tuple[Any, Any]]:
    """The models that TRL gave a fused head, and the trainer's accelerator."""
    if isinstance(trainer, torch.nn.Module):
        return [(_causal(trainer), None)]
    accelerator = getattr(trainer, "accelerator", None)
    if accelerator is None or not isinstance(getattr(trainer, "model", None), torch.nn.Module):
        got = type(trainer).__name__
        _fail("trainer", "be a trainer of TRL, or its model", got, "Make the trainer first", TypeError)
    models = [trainer.model, getattr(trainer, "ref_model", None)]
    causal = [_causal(accelerator.unwrap_model(model)) for model in models if model is not None]
    return [(model, accelerator) for model in dict.fromkeys(causal)]


def _causal(model: Any) -> Any:
    return unwrapped(getattr(model, "module", model))


def _head(model: Any, accelerator: Any) -> FusedHead:
    """The fused head that TRL gave a model, which is one that `fuse` can replace."""
    name, forward = type(model).__name__, model.__dict__.get("forward")
    if "_dft_kernels" in model.__dict__:
        remedy = "Call detach(model) before the trainer is made, then fuse(trainer)"
        _fail(name, "be without an attachment", "one that has one", remedy)
    if _below(forward, (__name__, "_fused_forward")) is not None:
        _fail(name, "be fused once", "one that is fused", "Leave out the second fuse")
    theirs = _below(forward, _MADE)
    if theirs is None:
        import trl.trainer.utils

        if not hasattr(trl.trainer.utils, "add_fused_lm_head"):
            _unknown_version("whose trainers have none")
        remedy = "Make the trainer first (SFT, DPO, KTO, GRPO, RLOO), then call fuse(trainer)"
        _fail(name, "have TRL's fused head", "a model without", remedy)
    if "_original_forward" in model.__dict__ and accelerator is None:
        _fail(name, "be given as part of its trainer", "a model that accelerate prepared", "Call fuse(trainer)")
    if "_original_forward" not in model.__dict__ and getattr(forward, "__func__", None) is not theirs:
        got = f"one that {getattr(forward, '__module__', type(forward).__name__)} has wrapped"
        _fail(name, "have TRL's forward as its own", got, "Call fuse right after the trainer is made")
    return _settings(theirs, model)


def _install(model: Any, forward: Callable[..., Any], accelerator: Any) -> None:
    if "_original_forward" in model.__dict__:  # accelerate has wrapped TRL's for mixed precision
        model._original_forward = types.MethodType(forward, model)
        forward = _mixed_precision(forward, accelerator)
    model.forward = types.MethodType(forward, model)


def _below(forward: Any, made: tuple[str, str]) -> Any:
    """The function of this module and name among those that wrappers put around each other; None: there is none."""
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        code, known = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
        if code is not None and (known.get("__name__"), code.co_name) == made:
            return forward
        forward = getattr(forward, "__wrapped__", None)
    return None


def _mixed_precision(forward: Callable[..., Any], accelerator: Any) -> Callable[..., Any]:
    """As `Accelerator.prepare_model` wraps a forward."""
    from accelerate.utils import convert_outputs_to_fp32
    from accelerate.utils.modeling import get_mixed_precision_context_manager

    context = get_mixed_precision_context_manager(accelerator.native_amp, accelerator.autocast_handler)
    wrapped: Callable[..., Any] = convert_outputs_to_fp32(context(forward))
    return wrapped


def _settings(theirs: Any, model: Any) -> FusedHead:
    """What TRL's forward of a model was made with, and the model's head, checked as `attach` does."""
    from trl.trainer.utils import FusedCausalLMOutput

    cells = zip(theirs.__code__.co_freevars, theirs.__closure__ or (), strict=True)
    found = {name: cell.cell_contents for name, cell in cells}
    fields = {field.name for field in dataclasses.fields(FusedCausalLMOutput)}
    strange = [*(set(_SETTINGS) - set(found)), *(fields ^ _FIELDS), *(set(found.get("outputs", ())) - set(_OUTPUTS))]
    if strange:
        _unknown_version(f"whose {', '.join(sorted(strange))} is not as there")
    own = found["original_forward"]
    kept, model.forward = model.forward, own  # without a mixed precision that rounds what is checked
    try:
        head = head_of(model, adapted=True)._replace(weight=None, bias=None)
        attachment = Attachment(
            own, None, inspect.signature(own), head, {}, by="fuse", wide=found["cast_lm_head_to_fp32"]
        )
        check_loss(model, attachment)
    finally:
        model.forward = kept
    outputs = tuple(name for name in found["outputs"] if name != "log_probs")
    return FusedHead(attachment, found["temperature"], outputs, FusedCausalLMOutput)


def _unknown_version(how: str) -> NoReturn:
    import trl

    relation = f"have the fused head of a version that was tried ({TRIED})"
    _fail("trl", relation, f"{trl.__version__}, {how}", "Install one of these")


def _forward(theirs: Callable[..., Any], fused: FusedHead) -> Callable[..., Any]:
    @functools.wraps(theirs)  # generate looks at the signature that it shows
    def _fused_forward(self: Any, *arguments: Any, fused_lm_head: bool = False, **named: Any) -> Any:
        if fused_lm_head:
            return _output(self, fused, fused.attachment.named(arguments, named))
        return theirs(self, *arguments, **named)

    return _fused_forward


def _output(model: Any, fused: FusedHead, given: dict[str, Any]) -> Any:
    """What TRL's forward returns of these inputs."""
    if given.get("labels") is None and given.get("shift_labels") is None:
        _fail("labels", "be given with fused_lm_head=True", "None", "Pass labels, -100 where a token does not count")
    layer, target = output_layer(model), targets_of(given)
    rows = slice(None) if given.get("shift_labels") is not None else slice(-1)  # the last token has no next one
    mask = (target != -100)[:, rows]
    found: dict[str, Any] = {}

    def loss_of(hidden: Tensor) -> Tensor:
        if fused.lesson is not None and model.training:
            loss, outputs = fused.lesson.outputs(layer, fused.attachment, hidden, target, given)
            found.update(outputs)
            return loss
        found.update(_statistics(layer, fused, hidden, target))
        items = given.get("num_items_in_batch")
        return -found["log_probs"].sum() / (mask.sum().clamp(min=1) if items is None else items)

    inputs = {**without_store(given), "use_cache": False}
    out, loss = run_forward(model, fused.attachment, inputs, target, loss_of)
    per_token = {name: value[:, rows] for name, value in found.items()}
    return fused.result(loss=loss, label_mask=mask, aux_loss=out.get("aux_loss"), **per_token)


def _statistics(layer: Any, fused: FusedHead, hidden: Tensor, target: Tensor) -> dict[str, Tensor]:
    """TRL's outputs [B, T], of the head as it is now."""
    names = ("log_probs", *fused.outputs)
    asked = [_OUTPUTS[name] for name in names]

    def statistics_of(head: dict[str, Any]) -> Any:
        return token_statistics(target=target.to(hidden.device), temperature=fused.temperature, outputs=asked, **head)

    found = projected(layer, fused.attachment, hidden, statistics_of)
    return {name: getattr(found, _OUTPUTS[name]) for name in names}


def _fail(argument: str, relation: str, got: object, remedy: str, kind: type[Exception] = ValueError) -> NoReturn:
    fail("fuse", argument, relation, got, remedy, kind)
