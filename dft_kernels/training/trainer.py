"""`transformers.Trainer` with a teacher: a store, a running model, anything that makes one of a batch, or a mixture."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from ..loss.build import check_options
from ..loss.metrics import Metrics
from ..loss.options import Function
from ..store.reader import Store
from ..teachers.mixture import Mixture
from ..terms import Delayed, DistributionTerm, OnPolicy
from .attach import Held, attach, targets_of
from .collators import PROMPTED, PrinciplesCollator
from .progress import TermsCallback, load_terms, peak_memory_gb, show_metrics, term_logs
from .rollouts import OwnText
from .serving import serve
from .teaching import STORED, asked, check_fits, check_prompted, parts_of, stand_in

METRICS = ("hard_loss", "soft_loss", "entropy", "accuracy", "teacher_agreement")
OF_CALLS = ("dropped", "active_columns")  # metrics of a whole call


@dataclass
class DFTConfig(transformers.TrainingArguments):
    """`TrainingArguments` and what the loss is: soft_weight D(teacher, model) + hard_weight CE.

    The keywords are those of `linear_distribution_loss`. matching_every: of so many optimiser steps the last is one of
    matching, the others are cross-entropy alone (1: every step matches); matching_from: steps before which none does;
    matching_ramp: steps from there on over which matching comes in. A step of matching has weights

        soft_weight r  and  hard_weight r + (1 - r),  r = min(1, (step - matching_from + 1) / matching_ramp)

    rollout_...: how and how often the model writes for `rollout_terms`, from matching_from on.
    """

    divergence: str = field(default="forward_kl", metadata={"help": "a name of dft_kernels.divergences.TABLE"})
    soft_weight: float = field(default=1.0, metadata={"help": "of the divergence"})
    hard_weight: float = field(default=0.1, metadata={"help": "of the cross-entropy, in steps of matching"})
    temperature: float = field(default=1.0, metadata={"help": "of the model, and of the teacher unless told otherwise"})
    teacher_temperature: float | None = field(default=None, metadata={"help": "of the teacher"})
    temperature_scaling: str = field(default="none", metadata={"help": "none, or squared: times temperature^2"})
    loss_memory_budget: int | None = field(default=None, metadata={"help": "bytes of the loss's scratch"})
    loss_backend: str = field(default="auto", metadata={"help": "auto, or the name of one that is available"})
    loss_gradient_error: float | None = field(
        default=None,
        metadata={"help": "relative error that the gradients of the loss may have, for less time: 0.001, say"},
    )
    matching_every: int = field(default=1, metadata={"help": "one of so many steps matches the teacher"})
    matching_from: int = field(default=0, metadata={"help": "optimiser steps of cross-entropy before the first match"})
    terms_decay: float = field(default=0.9, metadata={"help": "of the running statistics of distribution terms"})
    matching_ramp: int = field(default=0, metadata={"help": "optimiser steps from cross-entropy to these weights"})
    rollout_every: int = field(
        default=1, metadata={"help": "one of so many steps has the terms of the model's own text"}
    )
    rollout_prompt: int = field(default=32, metadata={"help": "tokens of a text that it goes on from, at most half"})
    rollout_length: int = field(default=64, metadata={"help": "tokens that it draws at most"})
    rollout_samples: int = field(default=2, metadata={"help": "draws from each text of a batch"})
    rollout_temperature: float = field(default=1.0, metadata={"help": "of these draws; neither top-p nor top-k"})
    rollout_biased_without_score: bool = field(
        default=False, metadata={"help": "leave out what a token's choice does to the text after it"}
    )
    stop_at_floor: bool = field(default=False, metadata={"help": "end once all bounded terms are within their bounds"})
    remove_unused_columns: bool = field(default=False, metadata={"help": "a store's rows are no model's columns"})

    def __post_init__(self) -> None:
        super().__post_init__()
        least_of = {"matching_every": 1, "matching_from": 0, "matching_ramp": 0, "rollout_every": 1,
                    "rollout_prompt": 1, "rollout_length": 2, "rollout_samples": 1}  # fmt: skip
        for name, least in least_of.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"DFTConfig: {name} must be an int of at least {least}, got {value!r}. Change it.")
        check_options(Function("DFTConfig"), self.terms, torch.zeros(1, 2))
        if self.label_smoothing_factor != 0:
            raise ValueError(
                f"DFTConfig: label_smoothing_factor must be 0, got {self.label_smoothing_factor}, for which Trainer "
                "takes the labels from the model. Leave it, or give attach label_smoothing in a loop of your own."
            )

    @property
    def terms(self) -> dict[str, Any]:
        """Keywords of `linear_distribution_loss`."""
        names = (
            "divergence",
            "soft_weight",
            "hard_weight",
            "temperature",
            "teacher_temperature",
            "temperature_scaling",
        )
        own = {name: f"loss_{name}" for name in ("memory_budget", "backend", "gradient_error")}
        return {name: getattr(self, own.get(name, name)) for name in (*names, *own)}


class DFTTrainer(transformers.Trainer):
    """Trainer whose model carries the fused loss (`attach`), and whose batches have a teacher.

    teacher: a `Store` (its sequences are the training set unless one is given, its collate the collator), a causal LM
    of the model's vocabulary (run without gradient on every batch), a `ServedTeacher` (compared with the model and its
    processing_class before the first step, and asked ahead of each), a callable `inputs -> teacher` of
    `linear_distribution_loss`, a `Mixture` of these and of `Labels()`, each asked for every batch, or None:
    cross-entropy alone. terms: `dft_kernels.terms`, which steps of matching have beside their loss, delayed: running
    statistics (args.terms_decay) over all processes and accumulated batches, kept in checkpoints, logged as term_NAME.
    rollout_terms: the same of text that the model writes: every args.rollout_every steps it goes on from the beginnings
    of each batch's texts, and the terms' gradient (`OnPolicy`, with its score term; a `ReferenceKL` among them is to
    the model as it comes here; a `TextMMD` reads texts by processing_class) joins the step's; logged as rollout_NAME,
    with rollout_cosine, that of the gradients of two halves of the rollouts (where a step has one batch): 0 says that
    they are too few. Dropout, which rollouts are drawn without, makes them another model's. With stop_at_floor training
    ends once all `AtMost` terms hold.
    With `PrinciplesCollator` as data_collator a model sees its principles before each sequence.
    Everything else is Trainer's: accumulation (a step is divided by the tokens of all of its batches), checkpoints,
    `report_to`. Metrics of the loss's own pass (METRICS, means over all processes' tokens since the last log;
    OF_CALLS over their calls, of `dropped` the largest) join its logs.

    Raises ValueError for a loss that is not finite, before the step is taken, naming step and sequences.
    """

    def __init__(
        self,
        model: Any,
        args: DFTConfig,
        teacher: Store | torch.nn.Module | Callable[[dict[str, Any]], Any] | Mixture | None = None,
        *,
        terms: DistributionTerm | Delayed | None = None,
        rollout_terms: DistributionTerm | OnPolicy | None = None,
        **more: Any,
    ) -> None:
        if not isinstance(args, DFTConfig):
            raise TypeError(
                f"DFTTrainer: args must be a DFTConfig, got {type(args).__name__}. Its fields are Trainer's."
            )
        if more.get("compute_loss_func") is not None:
            raise ValueError(
                "DFTTrainer: compute_loss_func must be None, got one, which would replace the loss. Use Trainer for it."
            )
        if args.n_gpu > 1 and len(set(getattr(model, "hf_device_map", {}).values())) < 2:
            raise ValueError(
                f"DFTTrainer: args must give each process one device (not nn.DataParallel's), got {args.n_gpu}. Start "
                f"torchrun --nproc_per_node={args.n_gpu}, or show one device: CUDA_VISIBLE_DEVICES=0."
            )
        for store in (part for part in parts_of(teacher) if isinstance(part, Store)):
            if more.get("processing_class") is not None:
                store.check_tokenizer(more["processing_class"])
            more.setdefault("train_dataset", store)
            if more["train_dataset"] is store:
                more.setdefault("data_collator", store.collate)
        if isinstance(more.get("data_collator"), PrinciplesCollator):
            check_prompted(teacher)
        self.teacher = teacher
        self.terms = Delayed(terms, args.terms_decay) if isinstance(terms, DistributionTerm) else terms
        if isinstance(rollout_terms, DistributionTerm):
            biased = args.rollout_biased_without_score
            rollout_terms = OnPolicy(rollout_terms, args.terms_decay, args.rollout_temperature, biased)
        kinds = {"term": self.terms, "rollout": rollout_terms}
        self.delayed = {name: delayed for name, delayed in kinds.items() if delayed is not None}
        if args.stop_at_floor and not any(delayed.bounded for delayed in self.delayed.values()):
            raise ValueError(
                "DFTTrainer: stop_at_floor must come with AtMost among the terms, got none. Bound a term, for example "
                "by its noise_floor."
            )
        self.sums: dict[str, Tensor] = {}
        self.since: float | None = None
        check_options(Function("DFTTrainer"), args.terms, stand_in(teacher, args.device), args.device)
        check_fits(teacher, model)
        tokenizer = more.get("processing_class")
        own = None if rollout_terms is None else OwnText(model, rollout_terms, args, _end_of(model, more), tokenizer)
        super().__init__(attach(model, **args.terms), args, **more)
        self.asked, self.own_text = asked(teacher, args.device), own
        if own is not None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                "DFTTrainer: rollout_terms must be trained with a whole model in each process, got FSDP or DeepSpeed. "
                "Use DDP, or leave them out."
            )
        serve(self, teacher, "DFTTrainer", self._matches)
        if self.delayed:
            self.add_callback(TermsCallback(self.delayed))
        show_metrics(self)

    def train(self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **named: Any) -> Any:
        """Trainer's; a checkpoint's running statistics are taken up with it."""
        if self.delayed and resume_from_checkpoint:
            found = resume_from_checkpoint
            load_terms(str(get_last_checkpoint(self.args.output_dir) if found is True else found), self.delayed)
        return super().train(resume_from_checkpoint, *arguments, **named)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Trainer's, and before it the model's own text, where the step has it."""
        step = self.state.global_step
        value: Tensor | float = 0.0
        if self.own_text is not None and (step + 1) % self.args.rollout_every == 0 and step >= self.args.matching_from:
            model.train()
            self.since = time.perf_counter() if self.since is None else self.since
            value = self.own_text.step(self, model, self._prepare_inputs(inputs))
        return super().training_step(model, inputs, num_items_in_batch) + value  # type: ignore[no-any-return]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch; its teacher's rows are taken out of `inputs`, or made of them."""
        sequences = inputs.get("sequence")
        self.since = time.perf_counter() if self.since is None else self.since
        if PROMPTED[0] in inputs:
            check_prompted(self.teacher)
        teacher = self.asked(inputs) if self.asked is not None and model.training and self._matches() else None
        inputs = {name: value for name, value in inputs.items() if name not in (*STORED, *PROMPTED)}
        if self.terms is not None and model.training and self._matches():
            inputs["distribution_terms"] = Held(self.terms)
        if teacher is not None:
            inputs.update(teacher=Held(teacher), **self._weights())
        elif model.training and inputs.get("labels") is None and inputs.get("shift_labels") is None:
            raise ValueError(
                f"DFTTrainer: labels must be given in a step of cross-entropy, got None in step "
                f"{self.state.global_step + 1}. Let the collator make them, or match a teacher in every step."
            )
        items: Any = num_items_in_batch
        if isinstance(items, Tensor) and self.is_fsdp_enabled:
            items = float(items) or items  # a tensor would be rounded to bf16 by FSDP2's mixed precision
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
        """Trainer's, with the means of METRICS since the last log of the training loss, over all processes' tokens, the
        speed of these, and the most memory that this process has held."""
        if "loss" in logs:
            none = torch.zeros(2, device=self.args.device)
            sums = torch.stack([self.sums.get(name, none).to(none.device) for name in (*METRICS, *OF_CALLS, "tokens")])
            # of every process, whichever of METRICS it has seen
            *means, (tokens, _) = self.accelerator.reduce(sums, "sum").tolist()
            found = zip((*METRICS, *OF_CALLS), means, strict=True)
            logs = {**logs, **{name: total / count for name, (total, count) in found if count > 0}}
            logs |= term_logs(self.delayed)
            if self.own_text is not None and self.own_text.cosines:
                logs["rollout_cosine"] = sum(self.own_text.cosines) / len(self.own_text.cosines)
                self.own_text.cosines.clear()
            logs["tokens_per_second"] = tokens / (time.perf_counter() - (self.since or 0.0))
            logs["peak_memory_gb"] = peak_memory_gb(self.args.device)
            self.sums, self.since = {}, time.perf_counter()
        super().log(logs, start_time)

    def _matches(self, step: int | None = None) -> bool:
        args, step = self.args, self.state.global_step if step is None else step
        return step >= args.matching_from and (step - args.matching_from + 1) % args.matching_every == 0

    def _weights(self) -> dict[str, float]:
        """Of a step of matching, where they are not those of every call."""
        args = self.args
        if self.state.global_step - args.matching_from + 1 >= args.matching_ramp:
            return {}
        ramp = (self.state.global_step - args.matching_from + 1) / args.matching_ramp
        return {"soft_weight": args.soft_weight * ramp, "hard_weight": args.hard_weight * ramp + (1 - ramp)}

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Trainer's, which knows labels alone, of the rows that the loss takes."""
        rows = [torch.nn.functional.pad(targets_of(inputs), (1, 0), value=-100) for inputs in batch_samples]
        return super()._get_num_items_in_batch([{"labels": labels} for labels in rows], device)

    def _count(self, metrics: Metrics, inputs: dict[str, Any]) -> None:
        count = (targets_of(inputs) != -100).sum().float()
        found = {**vars(metrics), "accuracy": metrics.correct}
        for name in METRICS:
            if found[name] is not None:
                total = found[name].sum(dtype=torch.float32)  # 0 for ignored rows
                self._add(name, torch.stack([total, count]))
        for name in OF_CALLS:
            if found[name] is not None:
                value = found[name].to(count)
                if name == "dropped":  # the largest: a mean of bounds is none
                    last = self.sums.get(name)
                    self.sums[name] = torch.stack(
                        [value if last is None else last[0].maximum(value), value.new_ones(())]
                    )
                else:
                    self._add(name, torch.stack([value, torch.ones_like(value)]))
        seen = inputs.get("attention_mask")
        seen = targets_of(inputs).numel() if seen is None or seen.ndim != 2 else (seen != 0).sum()
        self._add("tokens", torch.stack([count.new_zeros(()) + seen, count]))

    def _add(self, name: str, pair: Tensor) -> None:
        self.sums[name] = pair + self.sums.get(name, torch.zeros_like(pair))


def _end_of(model: Any, more: dict[str, Any]) -> int | None:
    """The token that ends a text: the tokenizer's, else the first that the model stops at."""
    known = getattr(more.get("processing_class"), "eos_token_id", None)
    if known is None:
        known = getattr(model.generation_config, "eos_token_id", None)
    return known[0] if isinstance(known, list) else known
