"""Text of a model's own, drawn by transformers' `generate`."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.heads import output_layer, unwrapped

DRAWN = ("typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")  # that `generate` applies last, and only where it draws
_GIVEN = {  # what a call of roll_out sets, whatever the model's own are, or does not need
    "do_sample", "temperature", "top_k", "top_p", "min_p", "max_length", "max_new_tokens", "pad_token_id",
    "bos_token_id", "num_return_sequences", "return_dict_in_generate",
}  # fmt: skip
_OF_BEAMS = {"num_beams", "num_beam_groups", "diversity_penalty", "length_penalty", "early_stopping"}


@dataclass(frozen=True)
class Sampling:
    """How text is drawn: what every figure of it depends on. temperature 0: the likeliest token; top_p 1 and min_p 0
    leave nothing out; length: tokens at most; count: texts."""

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    length: int = 128
    count: int = 200

    def keywords(self) -> dict[str, Any]:
        """Those of `generate`."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p or None}


@dataclass(frozen=True)
class Rollouts:
    """Texts [B, T]: prompts, aligned to end together at column `width`, and what the model drew after them."""

    input_ids: Tensor
    attention_mask: Tensor  # 0 before a shorter prompt and after the end of a text
    target: Tensor  # the token drawn after each row, -100 where none was
    width: int

    def __getitem__(self, rows: slice) -> Rollouts:
        return Rollouts(self.input_ids[rows], self.attention_mask[rows], self.target[rows], self.width)

    def inputs(self, model: Any) -> dict[str, Tensor]:
        """Of the model's forward: as `generate` has read them."""
        out = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if "position_ids" in inspect.signature(unwrapped(model).base_model.forward).parameters:
            out["position_ids"] = (self.attention_mask.cumsum(-1) - 1).clamp_min(0)
        return out


@torch.no_grad()
def roll_out(
    model: Any,
    prompts: Sequence[Sequence[int]],
    length: int,
    end: int | Sequence[int] | None,
    seed: int | None = None,
    **sampling: Any,
) -> Rollouts:
    """Draw `length` tokens at most after each prompt (token ids) by `model.generate`, up to the token `end`, or to one
    of several.

    sampling: `generate`'s keywords; by default plain sampling at temperature 1, by one beam. seed: the same one gives
    the same draws, and torch's own random state is left as it was; None: that is drawn from. The mode of the model is
    left.
    """
    device, training = output_layer(model).weight.device, model.training
    ends = [] if end is None else [end] if isinstance(end, int) else list(end)
    width, pad = max(map(len, prompts)), ends[0] if ends else 0
    ids = torch.tensor([[pad] * (width - len(one)) + list(one) for one in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
    one = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False}  # a row each, as ids
    chosen = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, **one, **sampling}
    model.eval()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else [], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            made = model.generate(
                ids, attention_mask=mask, max_new_tokens=length, pad_token_id=pad, eos_token_id=ends or None, **chosen
            )
    finally:
        model.train(training)
    new = made[:, width:]
    ended = torch.isin(new, torch.tensor(ends, device=device, dtype=new.dtype))
    drawn = ended.cumsum(1) - ended.long() == 0  # up to the end, with it
    target = torch.full_like(made, -100)
    target[:, width - 1 : -1] = torch.where(drawn, new, -100)
    return Rollouts(made, torch.cat([mask, drawn.long()], 1), target, width)


def own_settings(model: Any, *, greedy: bool = False) -> dict[str, Any]:
    """What a model's own generation_config sets and `roll_out` of one beam applies. greedy: to the likeliest tokens."""
    config = getattr(model, "generation_config", None)
    own = without_given({} if config is None else config.to_diff_dict(), _GIVEN | _OF_BEAMS)
    idle = {name for name in DRAWN if name in own and (greedy or (own[name] in (0, 1) and name != "top_h"))}
    return {name: value for name, value in own.items() if name not in idle}


def without_given(own: Mapping[str, Any], given: Collection[str] = frozenset(_GIVEN)) -> dict[str, Any]:
    """A model's own settings without those that a call sets in their place."""
    left_out = {"transformers_version", *given}
    return {name: value for name, value in own.items() if name[0] != "_" and name not in left_out}


def continuations(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], length: int, seed: int = 0, **sampling: Any
) -> list[list[int]]:
    """New token ids after each prompt, `length` at most and none after the end of text: `roll_out`, as lists."""
    at = ends_of(model, tokenizer)
    drawn = roll_out(model, prompts, length, at, seed, **sampling)
    return without_end([[token for token in row if token >= 0] for row in drawn.target.tolist()], at)


def without_end(rows: Sequence[Sequence[int]], at: Sequence[int]) -> list[list[int]]:
    """Token ids, but for the one that ended a text. at: those that end one."""
    return [list(row[:-1] if row and row[-1] in at else row) for row in rows]


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's, and the model's own."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = [tokenizer.eos_token_id, *(own if isinstance(own, (list, tuple)) else [own])]
    return list(dict.fromkeys(token for token in listed if token is not None))


def text_after(tokenizer: Any, before: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens as it stands behind the prompt: decoded alone, some tokenizers drop its first space."""

    def decoded(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    whole, prompt = decoded([*before, *new]), decoded([*before])
    return whole.removeprefix(prompt) if whole.startswith(prompt) else decoded([*new])
