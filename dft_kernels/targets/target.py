"""Target: the statistics of a style of writing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .punctuation import CLASSES

AGES = 128  # A, bins of ages and lengths in tokens
GAPS = 128  # G, bins of gaps in tokens
WORDS = 257  # W, bins of words in a sentence
LETTERS = 25  # bins of letters in a word
WINDOW = 50  # words that the type-token ratio is taken of


class Statistic(NamedTuple):
    """Shape, dtype and constraints of a tensor of a Target."""

    dims: int
    dtype: torch.dtype
    tokens: bool  # of one tokenizer's tokens
    simplex: bool  # its last dimension sums to 1 (or is all 0: never seen)


_F, _I = torch.float32, torch.int32
STATISTICS: dict[str, Statistic] = {
    "unigram": Statistic(1, _F, True, True),
    "ngram_contexts": Statistic(2, _I, True, False),
    "ngram_starts": Statistic(1, _I, True, False),
    "ngram_completions": Statistic(1, _I, True, False),
    "ngram_probability": Statistic(1, _F, True, False),
    "ngram_context_probability": Statistic(1, _F, True, False),
    "sentence_end": Statistic(1, _F, True, False),
    "hazard": Statistic(1, _F, True, False),
    "soft_hazard": Statistic(1, _F, True, False),
    "sentence_tokens": Statistic(1, _F, True, True),
    "punctuation_features": Statistic(2, _I, True, False),
    "punctuation_rate": Statistic(1, _F, True, False),
    "punctuation_gap": Statistic(2, _F, True, True),
    "punctuation_transition": Statistic(2, _F, True, True),
    "mark_hazard": Statistic(2, _F, True, False),
    "mark_risk": Statistic(2, _F, True, True),
    "entropy": Statistic(1, _F, True, False),
    "entropy_contexts": Statistic(1, _I, True, False),
    "entropy_weight": Statistic(1, _F, True, True),
    "sentence_words": Statistic(1, _F, False, True),
    "word_length": Statistic(1, _F, False, True),
    "punctuation_per_1000_words": Statistic(1, _F, False, False),
    "type_token_ratio": Statistic(1, _F, False, False),
}


@dataclass(frozen=True)
class About:
    """Where a Target comes from. Sizes are of the whole corpus; tokens and what tells the tokenizer are None for text
    statistics alone. documents: passages, see corpus.py."""

    name: str
    source: str
    licence: str
    documents: int
    characters: int
    words: int
    sentences: int
    tokens: int | None = None
    tokenizer: str | None = None
    tokenizer_sha256: str | None = None
    version: str = ""


@dataclass(frozen=True)
class Target:
    """Statistics of a corpus as tensors, any of which may be absent. Probabilities, float32, unless said otherwise;
    V tokens, K = 10 punctuation.CLASSES, A, G, W bins of which the last holds all that is more.

    Of the tokens of one tokenizer:
        unigram [V]                  shares of the tokens
        ngram_contexts [M, 2] int32  tracked contexts (the two tokens before, or -1 and the one before), and of
        ngram_starts [M + 1] int32   context m the rows starts[m]..starts[m + 1] of
        ngram_completions [E] int32  and
        ngram_probability [E]        P(completion | context); what is not tracked is missing from the sum
        ngram_context_probability [M]  share of the positions that have this context
        sentence_end [V]             share of a token's occurrences that are the last of a sentence: phi of a model's
                                     soft sentence end <q, phi>
        hazard [A]                   P(this token ends the sentence | a tokens of the sentence stand before it)
        soft_hazard [A]              mean of sentence_end over the tokens of this age: what <q, phi> is to be compared
                                     with, since a full stop behind "Mr" weighs there as much as any other
        sentence_tokens [A]          share of sentences with a + 1 tokens; of lengths this is hazard's histogram
        punctuation_features [F, 2] int32  (token, class): the classes that a token's text holds
        punctuation_rate [K]         share of the tokens that hold this class
        punctuation_gap [K, G]       g + 1 tokens from one of a class to the next one of it
        punctuation_transition [K, K]  P(class of the next mark | class of this)
        mark_hazard [1 + K, G + 1]   P(this token ends the sentence, or holds this class | a tokens of the text stand
                                     behind the last that did; in the last bin: none did, but of sentences, which begin
                                     with the text), gaps that the end of a text cuts off counted as far as they go:
                                     what hazard and punctuation_gap, of whole ones, are not for short texts
        mark_risk [1 + K, G + 1]     shares of the tokens that a row of it was taken of
        entropy [C]                  of the next token after token entropy_contexts [C] int32, nats, where the corpus
                                     tells; entropy_weight [C]: their shares
    Of the text, for any tokenizer:
        sentence_words [W]           share of sentences with w words
        word_length [25]             share of words with l letters
        punctuation_per_1000_words [K]  marks
        type_token_ratio [1]         different words in 50, mean over all windows: MATTR (Covington and McFall,
                                     J. Quantitative Linguistics 17(2), 2010)

    noise: the floor of every distance of comparison.py: its mean between random halves of the corpus. Sampling noise
    between two whole corpora of this size is sqrt(2) lower. warnings: what the corpus is too small for.
    Raises ValueError for a tensor of another name, shape or dtype, or with values that no corpus has.
    """

    about: About
    tensors: Mapping[str, Tensor]
    noise: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            problem = _problem(name, tensor)
            if problem:
                raise ValueError(
                    f"Target: {self.about.name}: {name} must {problem}. Build it again: dft-kernels target build."
                )
        problem = _trie_problem(self.tensors) or _shape_problem(self.tensors) or _id_problem(self.tensors)
        if problem:
            raise ValueError(f"Target: {self.about.name}: {problem}. Build it again: dft-kernels target build.")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            why = next((text for text in self.warnings if text.startswith(f"{name}:")), "It was not measured")
            raise ValueError(f"Target: {self.about.name}: {name} must be there, got none. {why.rstrip('.')}.")
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @property
    def vocab_size(self) -> int | None:
        """V, None for text statistics alone."""
        return len(self["unigram"]) if "unigram" in self else None

    @property
    def burstiness(self) -> float:
        """(sd - mean) / (sd + mean) of the words of a sentence: -1 regular, 0 as a Poisson process, towards 1 in bursts
        (Goh and Barabási, EPL 81, 48002, 2008). From sentence_words."""
        return burstiness(self["sentence_words"])


def burstiness(histogram: Tensor) -> float:
    """(sd - mean) / (sd + mean) of a histogram [W] over 0, 1, 2, ..."""
    p = histogram.double()
    at = torch.arange(len(p), dtype=torch.float64)
    mean = float((p * at).sum())
    deviation = float((p * (at - mean).square()).sum()) ** 0.5
    return (deviation - mean) / (deviation + mean)


def ngrams(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The tracked n-grams [E, 3] int64, -1 before a bigram, and their joint probabilities P(context) P(completion |
    context) [E] float64."""
    sizes = tensors["ngram_starts"].diff().long()
    contexts = tensors["ngram_contexts"].repeat_interleave(sizes, 0)
    weight = tensors["ngram_context_probability"].double().repeat_interleave(sizes)
    grams = torch.cat([contexts, tensors["ngram_completions"][:, None]], 1).long()
    return grams, weight * tensors["ngram_probability"].double()


def _problem(name: str, tensor: Tensor) -> str | None:
    if name not in STATISTICS:
        return f"be one of {', '.join(STATISTICS)}, got another name"
    kind = STATISTICS[name]
    if tensor.dtype != kind.dtype or tensor.ndim != kind.dims:
        return f"be {kind.dims}-d {kind.dtype}, got {tensor.ndim}-d {tensor.dtype}"
    if kind.dtype == _F:
        if not bool(tensor.isfinite().all()) or bool((tensor < 0).any()):
            return "be finite and at least 0, got another value"
        bounded = kind.tokens and name != "entropy"
        if bounded and tensor.numel() and float(tensor.max()) > 1 + 1e-5:
            return f"be at most 1, got {float(tensor.max()):g}"
        if kind.simplex:
            sums = tensor.double().sum(-1)
            wrong = ((sums - 1).abs() > 1e-4) & (sums != 0)
            if bool(wrong.any()):
                return f"sum to 1, got {float(sums[wrong].reshape(-1)[0]):g}"
    return None


def _trie_problem(tensors: Mapping[str, Tensor]) -> str | None:
    names = [name for name in STATISTICS if name.startswith("ngram_")]
    here = [name for name in names if name in tensors]
    if not here:
        return None
    if here != names:
        return f"n-grams must have all of {', '.join(names)}, got {', '.join(here)}"
    starts, contexts = tensors["ngram_starts"], len(tensors["ngram_contexts"])
    entries = len(tensors["ngram_completions"])
    whole = len(starts) == contexts + 1 and len(tensors["ngram_context_probability"]) == contexts
    whole = whole and len(tensors["ngram_probability"]) == entries and tensors["ngram_contexts"].shape[1] == 2
    if not whole or int(starts[0]) != 0 or int(starts[-1]) != entries or bool((starts.long().diff() < 0).any()):
        return f"ngram_starts must rise from 0 to the {entries} completions of {contexts} contexts, got another"
    return None


def _shape_problem(tensors: Mapping[str, Tensor]) -> str | None:
    """Tensors that share an index have the same length."""
    for names in (("unigram", "sentence_end"), ("entropy", "entropy_contexts", "entropy_weight")):
        sizes = [len(tensors[name]) for name in names if name in tensors]
        if len(set(sizes)) > 1:
            return f"{', '.join(names)} must be as long as each other, got {sizes}"
    K = len(CLASSES)
    classes = {
        "mark_hazard": [K + 1, GAPS + 1],
        "mark_risk": [K + 1, GAPS + 1],
        "punctuation_rate": [K],
        "punctuation_per_1000_words": [K],
        "punctuation_gap": [K],
    }
    for name, shape in {**classes, "punctuation_transition": [K, K]}.items():
        if name in tensors and list(tensors[name].shape[: len(shape)]) != shape:
            return f"{name} must be of {K} classes, got {list(tensors[name].shape)}"
    return None


def _id_problem(tensors: Mapping[str, Tensor]) -> str | None:
    """Token ids are in the vocabulary, and classes in punctuation.CLASSES."""
    vocab = len(tensors["unigram"]) if "unigram" in tensors else 1 << 31
    features = tensors.get("punctuation_features", torch.zeros(0, 2, dtype=_I))
    if features.shape[1] != 2:
        return f"punctuation_features must have shape [F, 2], got {list(features.shape)}"
    columns = {
        "ngram_contexts": (-1, vocab, tensors.get("ngram_contexts")),
        "ngram_completions": (0, vocab, tensors.get("ngram_completions")),
        "entropy_contexts": (0, vocab, tensors.get("entropy_contexts")),
        "punctuation_features[:, 0]": (0, vocab, features[:, 0]),
        "punctuation_features[:, 1]": (0, len(CLASSES), features[:, 1]),
    }
    for name, (least, end, ids) in columns.items():
        if ids is not None and ids.numel() and not (least <= int(ids.min()) and int(ids.max()) < end):
            return f"{name} must lie in {least}..{end - 1}, got {int(ids.min())}..{int(ids.max())}"
    return None
