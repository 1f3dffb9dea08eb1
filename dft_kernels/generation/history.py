"""What the text so far says of a target's ordered statistics, read from its token ids."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Seen(NamedTuple):
    """Of rows of text, F features of tokens. age [B, F]: tokens since the last with this feature, all of them where
    none has it; met [B, F]: whether one has; counts [B, F]; tokens [B, 1]: of the text; text [B, T]: which are. Special
    tokens are no text."""

    age: Tensor
    met: Tensor
    counts: Tensor
    tokens: Tensor
    text: Tensor


class History:
    """Features [V, F] bool of tokens, F at most 31, as bits. special: ids that begin a text anew: padding, BOS, EOS;
    what stands before the last of them is not looked at. padding: an id that pads on the left and may stand in a text
    too: where a row begins with it, and with more of them, it is no text."""

    def __init__(self, members: Tensor, special: Iterable[int], padding: int | None = None) -> None:
        features = members.shape[1]
        ids = torch.tensor(sorted(set(special)), dtype=torch.int64)
        size = max(len(members), int(ids.max()) + 1 if len(ids) else 0)
        self.special, self.padding = 1 << features, padding
        self.bits = torch.zeros(size + 1, dtype=torch.int32)  # the last of all other ids
        self.shifts = torch.arange(features, dtype=torch.int32)
        self.bits[: len(members)] = (members.int() << self.shifts).sum(1, dtype=torch.int32)
        self.bits[ids] = self.special

    def to(self, device: torch.device) -> None:
        """Move its tables."""
        self.bits, self.shifts = self.bits.to(device), self.shifts.to(device)

    def _code(self, ids: Tensor) -> Tensor:
        return self.bits[ids.clamp(max=len(self.bits) - 1)]

    def begins(self, ids: Tensor) -> Tensor:
        """Whether each begins a text anew."""
        return self._code(ids) == self.special

    def __call__(self, input_ids: Tensor) -> Seen:
        """Of ids [B, T]; an id outside of the vocabulary has no feature."""
        code = self._code(input_ids)
        place = torch.arange(1, code.shape[1] + 1, device=code.device)  # 0: before the first
        begun = torch.where(code == self.special, place, 0).amax(1, keepdim=True)  # behind the last special token
        if self.padding is not None:
            begun = torch.maximum(begun, (input_ids == self.padding).cumprod(1).sum(1, keepdim=True))
        text = place > begun
        has = ((code[..., None] >> self.shifts) & 1).bool() & text[..., None]
        last = torch.where(has, place[:, None], 0).amax(1)
        age = code.shape[1] - torch.maximum(last, begun)
        return Seen(age, last > 0, has.sum(1), code.shape[1] - begun, text)
