"""Training sequences by what a model's own texts are not: the study's mending that METHOD calls witness-weighted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dft_kernels.generation.sampling import continuations
from dft_kernels.materials.encoders import Encoder
from dft_kernels.training.text_features import TextFeatures

BATCH = 50  # texts drawn at a time


def chosen(
    texts: Sequence[str],
    model: Any,
    tokenizer: Any,
    encoder: Encoder,
    length: int,
    prompt: int,
    drawn: int,
    kept: int,
) -> list[str]:
    """`kept` of the sequences of `length` tokens that the texts are cut into, in their order, each at most once, drawn
    with log weights z: the witness of the MMD between people and the model,

        w(x) = mean k(x, people's) - mean k(x, the model's),    standardised over the sequences,

    where x is a sequence behind its first `prompt` tokens, and the model's are `drawn` texts of as many tokens, written
    after the beginnings of sequences at even distances. Without replacement, by the largest of z + Gumbel noise
    (Kool et al., arXiv:1903.06059), so that none of what is held out is trained on.
    """
    ids = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in texts]
    pieces = [each[at : at + length] for each in ids for at in range(0, len(each) - length + 1, length)]
    if len(pieces) < max(kept, drawn):
        raise ValueError(f"effect: texts must hold {max(kept, drawn)} sequences, got {len(pieces)}. Name more text.")
    prompts = [piece[:prompt] for piece in pieces[:: len(pieces) // drawn][:drawn]]
    own: list[str] = []
    for at in range(0, drawn, BATCH):
        some = continuations(model, tokenizer, prompts[at : at + BATCH], length - prompt, seed=at)
        own += tokenizer.batch_decode(some)
    behind = tokenizer.batch_decode([piece[prompt:] for piece in pieces])
    phi = TextFeatures(encoder, behind[:: len(pieces) // drawn])
    z = standardised(phi(behind), phi(own))
    noise = torch.rand(len(z), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    most = (z - torch.log(-torch.log(noise))).topk(kept).indices.sort().values
    return [str(one) for one in tokenizer.batch_decode([pieces[at] for at in most.tolist()])]


def standardised(people: Tensor, model: Tensor) -> Tensor:
    """The witness of phi [D, R] of people's texts against the model's [M, R], of people's, of mean 0 and variance 1."""
    w = people @ (people.mean(0) - model.mean(0))
    return (w - w.mean()) / w.std()
