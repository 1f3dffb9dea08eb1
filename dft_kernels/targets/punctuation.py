"""Punctuation marks of a text and of a tokenizer's tokens, in ten classes."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

CLASSES = ("comma", "semicolon", "colon", "dash", "full_stop", "question", "exclamation", "quote", "newline", "other")
# A run of one class is one mark: "..." ends once. Apostrophes and hyphens are parts of words; a single hyphen between
# spaces is left out too, since a token does not tell it from one inside a word.
_MARK = re.compile(
    r"(,)|(;)|(:)|([—–―]+|-{2,})|([.…]+)|(\?+)|(!+)|([\"“”„«»]+)|(\n[ \t\n]*)|([()\[\]{}*/&%#@\\§¶†‡•·¿¡]+)"
)


def placed_marks(text: str) -> list[tuple[int, int]]:
    """Where each mark of a text begins, and its class (an index into CLASSES), in order."""
    return [(match.start(), (match.lastindex or 1) - 1) for match in _MARK.finditer(text)]


def marks(text: str) -> list[int]:
    """The classes alone."""
    return [kind for _, kind in placed_marks(text)]


def token_marks(tokenizer: Any, vocab_size: int) -> Tensor:
    """Which classes a token's own text holds: rows (token, class) [nnz, 2] int32, ordered by token and then by where
    in it the class first stands. Special tokens have none."""
    special, rows = set(tokenizer.all_special_ids), []
    for token in range(vocab_size):
        if token not in special:
            rows += [(token, kind) for kind in dict.fromkeys(marks(tokenizer.decode([token])))]
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 2)
