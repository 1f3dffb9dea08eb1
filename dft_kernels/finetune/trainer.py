"""`transformers.Trainer` with a teacher: a store, a running model, or anything that makes one of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor

from ..functional import Metrics
from ..targets.store import Store
from ..teachers import TeacherHead
from .attach import Held, attach
from .heads import head_of, hidden_states

_STORED = ("sequence", "hidden", "indices", "log_probs", "tail")  # of a store's batch, and no model's
METRICS = ("hard_loss", "soft_loss", "entropy", "accuracy", "teacher_agreement")


@dataclass
class DFTConfig(transformers.TrainingArguments):
    """`TrainingArguments` and what the loss is: soft_weight D(teacher, model) + hard_weight CE.

    The keywords are those of `linear_distribution_loss`. matching_every: of so many optimiser steps the last is one of
    matching, the others are cross-entropy alone (1: every step matches); matching_from: steps before which none does.
    """

    divergence: str = field(default="forward_kl", metadata={"help": "a name of dft_kernels.divergences.TABLE"})
    soft_weight: float = field(default=1.0, metadata={"help": "of the divergence"})
    hard_weight: float = field(default=0.1, metadata={"help": "of the cross-entropy, in steps of matching"})
    temperature: float = field(default=1.0, metadata={"help": "of the model, and of the teacher unless told otherwise"})
    teacher_temperature: float | None = field(default=None, metadata={"help": "of the teacher"})
    temperature_scaling: str = field(default="none", metadata={"help": "none, or squared: times temperature^2"})
    loss_memory_budget: int | None = field(default=None, metadata={"help": "bytes of the loss's scratch"})
    loss_backend: str = field(default="auto", metadata={"help": "auto, or the name of one that is available"})
    matching_every: int = field(default=1, metadata={"help": "one of so many steps matches the teacher"})
    matching_from: int = field(default=0, metadata={"help": "optimiser steps of cross-entropy before the first match"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "a store's rows are no model's columns"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("matching_every", 1), ("matching_from", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"DFTConfig: {name} must be at least {least}, got {getattr(self, name)}. Raise it.")


class DFTTrainer(transformers.Trainer):
    """Trainer whose model carries the fused loss (`attach`), and whose batches have a teacher.

    teacher: a `Store` (its sequences are the training set unless one is given, its collate the collator), a causal LM
    of the model's vocabulary (run without gradient on every batch), a callable `inputs -> teacher` of
    `linear_distribution_loss`, or None: cross-entropy alone. Everything else is Trainer's: accumulation, checkpoints,
    `report_to`. Metrics of the loss's own pass (METRICS, means over all processes' tokens since the last log) join
    its logs.

    Raises ValueError for a loss that is not finite, before the step is taken, naming step and sequences.
    """

    def __init__(
        self,
        model: Any,
        args: DFTConfig,
        teacher: Store | torch.nn.Module | Callable[[dict[str, Any]], Any] | None = None,
        **more: Any,
    ) -> None:
        if not isinstance(args, DFTConfig):
            raise TypeError(
                f"DFTTrainer: args must be a DFTConfig, got {type(args).__name__}. Its fields are Trainer's."
            )
        if args.n_gpu > 1 and len(set(getattr(model, "hf_device_map", {}).values())) < 2:
            raise ValueError(
                f"DFTTrainer: args must give each process one device (not nn.DataParallel's), got {args.n_gpu}. Start "
                f"torchrun --nproc_per_node={args.n_gpu}, or show one device: CUDA_VISIBLE_DEVICES=0."
            )
        if isinstance(teacher, Store):
            if more.get("processing_class") is not None:
                teacher.check_tokenizer(more["processing_class"])
            more.setdefault("train_dataset", teacher)
            if more["train_dataset"] is teacher:
                more.setdefault("data_collator", teacher.collate)
        self.teacher = teacher
        self.sums: dict[str, Tensor] = {}
        terms = {
            "divergence": args.divergence, "soft_weight": args.soft_weight, "hard_weight": args.hard_weight,
            "temperature": args.temperature, "teacher_temperature": args.teacher_temperature,
            "temperature_scaling": args.temperature_scaling, "memory_budget": args.loss_memory_budget,
            "backend": args.loss_backend,
        }  # fmt: skip
        super().__init__(attach(model, **terms), args, **more)
        if isinstance(teacher, torch.nn.Module):
            self.teacher = teacher.to(args.device).eval().requires_grad_(False)
            self.teacher_head = head_of(teacher)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; its teacher's rows are taken out of `inputs`, or made of them."""
        sequences = inputs.get("sequence")
        teacher = self._teacher(inputs) if model.training and self._matches() else None
        inputs = {name: value for name, value in inputs.items() if name not in _STORED}
        if teacher is not None:
            inputs["teacher"] = Held(teacher)
        items: Any = num_items_in_batch
        if isinstance(items, Tensor) and self.is_fsdp_enabled:
            items = float(items)  # Trainer's is a tensor in float32, which mixed precision of FSDP2 rounds to bf16
        loss, outputs = super().compute_loss(model, inputs, True, items)
        if model.training:
            if not bool(torch.isfinite(loss)):
                of = "" if sequences is None else f", sequences {sequences.tolist()}"
                raise ValueError(
                    f"DFTTrainer: the loss must be finite, got {float(loss.detach())} in step "
                    f"{self.state.global_step + 1}{of}. Nothing was updated by it: look at these rows, lower the "
                    "learning rate, or go on from the last checkpoint without them."
                )
            self._count(outputs.metrics, inputs)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Trainer's, with the means of METRICS since the last log of the training loss, over all processes' tokens."""
        if "loss" in logs:
            none = torch.zeros(2, device=self.args.device)
            sums = torch.stack([self.sums.get(name, none).to(none.device) for name in METRICS])
            sums = self.accelerator.reduce(sums, "sum")  # of every process, whichever of METRICS it has seen
            found = zip(METRICS, sums.tolist(), strict=True)
            logs = {**logs, **{name: total / count for name, (total, count) in found if count > 0}}
            self.sums = {}
        super().log(logs, start_time)

    def _matches(self) -> bool:
        step = self.state.global_step
        args = self.args
        return step >= args.matching_from and (step - args.matching_from + 1) % args.matching_every == 0

    def _teacher(self, inputs: dict[str, Any]) -> Any:
        if self.teacher is None:
            return None
        if isinstance(self.teacher, Store):
            return self.teacher.teacher(inputs)
        if not isinstance(self.teacher, torch.nn.Module):
            return self.teacher(inputs)
        head = self.teacher_head
        assert head.weight is not None
        with torch.no_grad():
            hidden = hidden_states(self.teacher, inputs["input_ids"], inputs.get("attention_mask"))
        return TeacherHead(hidden, head.weight, head.bias, head.logit_scale, head.softcap)

    def _count(self, metrics: Metrics, inputs: dict[str, Any]) -> None:
        shifted = inputs.get("shift_labels")
        valid = shifted != -100 if shifted is not None else inputs["labels"][..., 1:] != -100
        count = valid.sum().float()
        found = {**vars(metrics), "accuracy": metrics.correct}
        for name in METRICS:
            if found[name] is not None:
                total = found[name].sum(dtype=torch.float32)  # 0 for ignored rows
                old = self.sums.get(name, torch.zeros(2, device=total.device))
                self.sums[name] = old + torch.stack([total, count])
