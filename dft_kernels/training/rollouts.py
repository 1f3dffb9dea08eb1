"""The steps of `DFTTrainer` that train on text of the model's own."""

from __future__ import annotations

import copy
import hashlib
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..errors import fail
from ..generation.sampling import Rollouts, roll_out, text_after, without_end
from ..models.heads import head_of, hidden_states, output_layer, projection
from ..teachers.head import TeacherHead
from ..terms import OnPolicy
from ..terms.split_half import split_half
from .attach import Held


class Reference:
    """A model as it is now: PEFT's with its adapters disabled, any other as a frozen copy."""

    def __init__(self, model: Any, device: Any = None) -> None:
        self.adapted = hasattr(model, "disable_adapter")
        self.model = model if self.adapted else copy.deepcopy(model).to(device).eval().requires_grad_(False)
        with self._as_it_was():
            self.head = head_of(self.model, adapted=True)

    def _as_it_was(self) -> Any:
        return self.model.disable_adapter() if self.adapted else nullcontext()

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> TeacherHead:
        """The reference's distributions for a batch [B, T]."""
        training = self.model.training
        self.model.eval()
        try:
            with self._as_it_was():
                more = {name: value for name, value in inputs.items() if name != "input_ids"}
                hidden = hidden_states(self.model, inputs["input_ids"], **more)
                given = projection(output_layer(self.model), hidden)
        finally:
            self.model.train(training)
        if "low_rank" in given:
            remedy = "Train LoRA, or leave the ReferenceKL out"
            fail("DFTTrainer", "rollout_terms", "have a ReferenceKL of a plain head", "a corrected one", remedy)
        bias = given["bias"]
        bias = None if bias is None else bias.detach()
        return TeacherHead(hidden, given["weight"].detach(), bias, self.head.logit_scale, self.head.softcap)


def beginning(text: list[int], most: int) -> list[int]:
    """The tokens of a text that a rollout goes on from: its first ones, at most half of it."""
    return text[: max(1, min(most, len(text) // 2))]


def texts_of(tokenizer: Any, prompts: list[list[int]], drawn: Rollouts, end: int | None) -> list[str]:
    """What was written after each prompt, without the end of text."""
    rows = [[token for token in row if token >= 0] for row in drawn.target.tolist()]
    new = without_end(rows, () if end is None else (end,))
    return [text_after(tokenizer, *each) for each in zip(prompts, new, strict=True)]


class OwnText:
    """Rollouts of a step and their gradient. args: a DFTConfig, of which the rollout_ fields are this one's;
    tokenizer: for terms that read texts."""

    def __init__(self, model: Any, terms: OnPolicy, args: Any, end: int | None, tokenizer: Any = None) -> None:
        self.terms, self.args, self.end, self.tokenizer = terms, args, end, tokenizer
        if terms.terms.reads is not None and not hasattr(tokenizer, "decode"):
            remedy = "Pass processing_class=tokenizer"
            fail("DFTTrainer", "processing_class", "be the tokenizer, for a TextMMD", type(tokenizer).__name__, remedy)
        self.reference = Reference(model, args.device) if terms.terms.divergence else None
        self.cosines: list[float] = []
        self.drawn = (-1, 0)  # the last step, and its batches so far

    def _seed(self, trainer: Any) -> int:
        """The seed of a batch's samples: different in every process, batch and step, the same after a resume."""
        step, count = trainer.state.global_step, self.drawn[1]
        self.drawn = (step, count + 1 if step == self.drawn[0] else 1)
        of = (trainer.args.seed, step, self.drawn[1], trainer.args.process_index)
        return int.from_bytes(hashlib.sha256(repr(of).encode()).digest()[:7], "big")

    def prompts(self, inputs: dict[str, Any]) -> list[list[int]]:
        """The beginnings of a batch's texts, at most half of each, rollout_samples times."""
        mask = inputs.get("attention_mask")
        texts = [
            (row if mask is None or mask.ndim != 2 else row[mask[number] != 0]).tolist()
            for number, row in enumerate(inputs["input_ids"])
        ]
        cut = [beginning(text, self.args.rollout_prompt) for text in texts]
        return [prompt for prompt in cut for _ in range(self.args.rollout_samples)]

    def step(self, trainer: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Sample, add the gradient of the terms to the parameters' in two halves, and return the value of the terms."""
        plain = trainer.accelerator.unwrap_model(model)
        prompts = self.prompts(inputs)
        if len(prompts) < 4:
            got = f"{len(prompts)} of a batch of {len(inputs['input_ids'])}"
            remedy = "Raise per_device_train_batch_size or rollout_samples"
            fail("DFTTrainer", "rollouts", "be 4 a batch or more, for two halves that have baselines", got, remedy)
        sampling = {"temperature": self.terms.temperature}
        with trainer.compute_loss_context_manager():
            drawn = roll_out(plain, prompts, self.args.rollout_length, self.end, self._seed(trainer), **sampling)
        values: list[Tensor] = []

        def loss_of(rows: slice, apart: Any) -> Tensor:
            half = drawn[rows]
            terms: Any = self.terms
            if terms.terms.reads is not None:
                texts = texts_of(self.tokenizer, prompts[rows], half, self.end)
                terms = SimpleNamespace(loss=partial(terms.loss, texts=texts))  # models take no texts
            given = half.inputs(plain)
            teacher = None if self.reference is None else Held(self.reference(given))
            with trainer.compute_loss_context_manager(), apart:
                loss = model(**given, shift_labels=half.target, teacher=teacher, distribution_terms=Held(terms)).loss
            values.append(loss.detach())
            return loss / (2 * trainer.current_gradient_accumulation_steps)  # type: ignore[no-any-return]

        middle = len(prompts) // 2
        # the first half's gradient stays this process's, as the second's is when they are compared
        alone = trainer.accelerator.no_sync(model)
        halves = (
            lambda: loss_of(slice(0, middle), alone),
            lambda: loss_of(slice(middle, None), nullcontext()),
        )
        cosine = split_half(plain.parameters(), halves, trainer.accelerator.backward)
        if cosine is not None:
            self.cosines.append(cosine)
        return (values[0] + values[1]) / (2 * trainer.current_gradient_accumulation_steps)
