"""Human texts cut for an evaluation: prompts, how people went on from them, and other texts of the same kind."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..targets.corpus import encode


@dataclass(frozen=True)
class Passage:
    """A prompt and what a person wrote after it, as they stand in a text."""

    prompt: str
    text: str


@dataclass(frozen=True)
class People:
    """reference [n]: their prompts are the models'; control [n]: other passages."""

    reference: list[Passage]
    control: list[Passage]

    @property
    def all(self) -> list[Passage]:
        """Both, the reference first."""
        return [*self.reference, *self.control]

    @property
    def sha256(self) -> str:
        """Of both."""
        return hashlib.sha256(json.dumps(asdict(self)).encode("utf-8", "surrogatepass")).hexdigest()


def people(texts: Sequence[str], tokenizer: Any, prompt: int, length: int, count: int, seed: int = 0) -> People:
    """2 * count passages of `prompt` and `length` tokens, dealt at random. Of each text one is taken, of a text drawn
    at random of its own; a second of each where there are too few texts, and so on: passages of one text are alike, and
    intervals take them as independent. ValueError where the texts have not as many."""
    generator, size, need = random.Random(seed), prompt + length, 2 * count
    found: list[list[Passage]] = []
    homes = 0
    for text in generator.sample(list(texts), len(texts)):
        offsets = encode(tokenizer, [text])[0].offsets
        starts = list(range(0, len(offsets) - size + 1, size))
        cuts = [(offsets[at][0], offsets[at + prompt - 1][1], offsets[at + size - 1][1]) for at in starts]
        found.append([Passage(text[a:b], text[b:c]) for a, b, c in generator.sample(cuts, len(cuts))])
        homes += bool(cuts)
        if homes >= need:
            break
    rounds = [[row[turn] for row in found if turn < len(row)] for turn in range(max(map(len, found), default=0))]
    those = [passage for one in rounds for passage in one][:need]
    if len(those) < need:
        raise ValueError(
            f"evaluate: human must hold {need} passages of {size} tokens, two for each text of a model, got "
            f"{len(those)}. Name more text, or lower --count, --prompt or --length."
        )
    generator.shuffle(those)
    return People(those[:count], those[count:])


def cut(text: str, tokenizer: Any, length: int) -> str:
    """The first `length` tokens of a text, as it stands there."""
    offsets = encode(tokenizer, [text])[0].offsets
    return text if len(offsets) <= length else text[: offsets[length - 1][1]]
