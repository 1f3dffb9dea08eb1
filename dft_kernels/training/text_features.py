"""What a sentence encoder says of texts, as features whose products are a kernel between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..evaluation.embeddings import bandwidths
from ..generation.sampling import roll_out, text_after, without_end
from ..materials.encoders import Encoder, embed
from ..terms import TextMMD, random_fourier_features
from .rollouts import beginning, texts_of
from .target_terms import Written
from .trainer import DFTConfig

DRAWN = 64  # texts, for bandwidths and gains


class TextFeatures:
    """phi of `TextMMD` by an encoder: <phi(x), phi(y)> is about the kernel of the evaluation's MMD,

        k(x, y) = mean over s of exp(-|e(x) - e(y)|² / (2 s²)),   s² the median |e_i - e_j|² of people's texts x ½, 1, 2

    by `random_fourier_features` of each s: off by about 1 / sqrt(3 r), and a kernel of its own at any r.

    human: at least two different texts of people's, for the bandwidths; r: features of each, 3 r in all; seed: of
    their draw. Cost of a call: the encoder's forward pass on its device, and 6 E r FLOP a text.
    """

    def __init__(self, encoder: Encoder, human: Sequence[str], r: int = 512, seed: int = 0) -> None:
        self.encoder, self.r, self.seed = encoder, r, seed
        self.bandwidths = [math.sqrt(square) for square in bandwidths(embed(encoder, human).double().numpy())]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """phi [B, 3 r], float64 on the CPU."""
        vectors = embed(self.encoder, texts).double()
        each = [
            random_fourier_features(vectors, self.r, bandwidth, self.seed + number)
            for number, bandwidth in enumerate(self.bandwidths)
        ]
        return torch.cat(each, 1) / math.sqrt(len(each))


def written(
    encoder: Encoder, model: Any, tokenizer: Any, sequences: Sequence[Sequence[int]], args: DFTConfig
) -> Written:
    """A `TextMMD` towards what people wrote where the rollouts of these args begin: as many tokens at most, behind each
    sequence's `beginning`. Its gain is of DRAWN texts of the model's own as it is now. sequences: token ids, of
    training text. ValueError where they hold no two different texts."""
    end = tokenizer.eos_token_id
    prompts = [beginning(list(ids), args.rollout_prompt) for ids in sequences]
    human = []
    for ids, before in zip(sequences, prompts, strict=True):
        (after,) = without_end([ids[len(before) : len(before) + args.rollout_length]], (end,))
        if after:
            human.append(text_after(tokenizer, before, after))
    if len(set(human)) < 2:
        raise ValueError(
            "terms: text must hold two different texts behind where rollouts begin at least, for text_mmd, got "
            f"{len(set(human))}. Give more text."
        )
    term = TextMMD(TextFeatures(encoder, human[:DRAWN]), human)

    def gain() -> float:
        some = prompts[:DRAWN]
        drawn = roll_out(model, some, args.rollout_length, end, 0, temperature=args.rollout_temperature)
        return term.gain(texts_of(tokenizer, some, drawn, end), float((drawn.target >= 0).sum() / len(some)))

    return Written(term, gain)
