"""Texts of random sentences, for the tests of targets."""

from __future__ import annotations

import random

WORDS = [
    "<pad>", "</s>", "<unk>", "The", "cat", "sat", "dog", "ran", "far", "It", "was", "late", ".", ",", "!", "?", '."',
    "the", "and", *(f"word{n}" for n in range(60)),
]  # fmt: skip


def document(generator: random.Random, sentences: int = 6) -> str:
    def sentence() -> str:
        words = [f"word{int(60 * generator.random() ** 2)}" for _ in range(generator.randint(3, 12))]
        return "The " + " ".join(words[:2]) + ", " + " ".join(words[2:]) + generator.choice("...!?")

    return " ".join(sentence() for _ in range(sentences))


def documents(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return [document(generator) for _ in range(count)]
