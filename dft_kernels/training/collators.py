"""Batches for a teacher that is given more than its student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PROMPTED = ("teacher_input_ids", "teacher_attention_mask")


@dataclass
class PrinciplesCollator:
    """Sequences for context distillation: the student's as they are, the teacher's after a text of principles.

        student   x_1 .. x_L                             row t: q(x_t+1 | x_1 .. x_t)
        teacher   c_1 .. c_P  x_1 .. x_L             row P + t: p(x_t+1 | c, x_1 .. x_t)

    (Askell et al., arXiv:2112.00861, section 2.1.) principles: token ids [P], c; pad_token_id: any id, padding is
    masked; padding_side: "right" or "left", of both.

    Called with items of input_ids [L], and optionally labels [L] (input_ids where there are none) and attention_mask
    [L] (tokens of 0 are left out); an item's other columns are. Returns int64 input_ids, attention_mask, labels
    [B, T], and teacher_input_ids, teacher_attention_mask [B, P + T]. Padding is -100 in labels, and so is the first
    token of each sequence: on the left a pad would predict it, on the right nothing does.

    `DFTTrainer(model, args, teacher, train_dataset=..., data_collator=PrinciplesCollator.from_text(text, tokenizer))`
    runs a teacher on the second and matches the rows that line up; a teacher that is a function of the batch finds
    them in it. The student never sees the principles, nor pays for them.
    """

    principles: Sequence[int]
    pad_token_id: int = 0
    padding_side: str = "right"

    def __post_init__(self) -> None:
        ids = self.principles
        if isinstance(ids, str):
            _fail(
                "principles", "be token ids", "a text", "Call PrinciplesCollator.from_text(text, tokenizer)", TypeError
            )
        self.principles = [int(token) for token in ids]
        if any(token < 0 for token in self.principles):
            _fail("principles", "be ids of at least 0", min(self.principles), "Pass what the tokenizer gives")
        if self.padding_side not in ("right", "left"):
            _fail("padding_side", "be right or left", repr(self.padding_side), "Pick one of these")

    @classmethod
    def from_text(cls, text: str, tokenizer: Any) -> PrinciplesCollator:
        """Of a text as it is written: its chat template, and a begin-of-text token, are there if the text has them.
        Padding is the tokenizer's."""
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return cls(ids, tokenizer.pad_token_id or 0, tokenizer.padding_side)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """The batch of these items."""
        sequences, labels = [], []
        for item in items:
            ids, own = self._read(item)
            sequences.append(ids)
            labels.append(torch.cat([own.new_full((1,), -100), own[1:]]))
        before = torch.tensor(self.principles, dtype=torch.int64)
        prompted = [torch.cat([before, ids]) for ids in sequences]
        return {
            "input_ids": self._padded(sequences, self.pad_token_id),
            "attention_mask": self._padded([torch.ones_like(ids) for ids in sequences], 0),
            "labels": self._padded(labels, -100),
            "teacher_input_ids": self._padded(prompted, self.pad_token_id),
            "teacher_attention_mask": self._padded([torch.ones_like(ids) for ids in prompted], 0),
        }

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=self.padding_side)

    def _read(self, item: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """input_ids and labels [L] of an item, without its padding."""
        for name in ("position_ids", "shift_labels"):
            if item.get(name) is not None:
                remedy = "Principles stand before every sequence: unpack them"
                _fail("items", f"be one sequence each, without {name}", "one of a pack", remedy)
        given = {name: item.get(name) for name in ("input_ids", "labels", "attention_mask")}
        found = {name: torch.as_tensor(one, dtype=torch.int64) for name, one in given.items() if one is not None}
        ids = found.get("input_ids", torch.empty(0))
        if ids.ndim != 1 or len(ids) == 0 or any(one.shape != ids.shape for one in found.values()):
            got = ", ".join(f"{name} {list(one.shape)}" for name, one in found.items()) or f"only {', '.join(item)}"
            _fail(
                "items", "have input_ids [L] of a token at least, and labels and attention_mask as long", got, "Fix it"
            )
        here = found.get("attention_mask", torch.ones_like(ids)) != 0
        if not bool(here.any()):
            _fail("items", "have a token that attention_mask does not hide", "none", "Leave this one out")
        return ids[here], found.get("labels", ids)[here]


def _fail(argument: str, relation: str, got: object, remedy: str, kind: type[Exception] = ValueError) -> NoReturn:
    raise kind(f"PrinciplesCollator: {argument} must {relation}, got {got}. {remedy}.")
