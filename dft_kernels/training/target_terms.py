"""The distribution terms that a Target of human writing gives, by name.

In kinds whose pull fades at the target, so that running means do not make a model swing about it: squares of
distances, Cramér's for lengths.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.heads import head_of, hidden_states, output_layer, projection
from ..targets.target import Target
from ..terms import (
    AtMost,
    ChiSquared,
    DistributionTerm,
    EmbeddingTransport,
    Entropy,
    NGrams,
    PunctuationGap,
    PunctuationRate,
    ReferenceKL,
    SentenceLength,
    TermSum,
    TextMMD,
    TokenL2,
    UnigramKL,
    VocabularyMMD,
    gains,
    noise_floor,
    random_fourier_features,
)

_NGRAMS = 1024  # bigrams, the most frequent ones: completions are features of every row


def _padded(values: Tensor, vocab: int) -> Tensor:
    """[V, ...] of the tokenizer as [V, ...] of a head with padded ids."""
    return torch.cat([values, values.new_zeros(vocab - len(values), *values.shape[1:])])


def _smoothed(target: Target, vocab: int) -> Tensor:
    """Frequencies above 0: half a count more for every token of the vocabulary."""
    count = target.about.tokens or 1
    p = _padded(target["unigram"], vocab).double() * count + 0.5
    return p / p.sum()


def _classes(target: Target, vocab: int) -> tuple[Tensor, Tensor]:
    """[V, K] membership of the punctuation classes that the corpus has, and which of all K these are."""
    token, kind = target["punctuation_features"].long().T
    whole = torch.zeros(vocab, len(target["punctuation_rate"]))
    whole[token, kind] = 1.0
    there = (target["punctuation_rate"] > 0) & (whole != 0).any(0)
    return whole[:, there], there


def _rates(target: Target, vocab: int) -> DistributionTerm:
    classes, there = _classes(target, vocab)
    return PunctuationRate(classes, target["punctuation_rate"][there])


def _gaps(target: Target, vocab: int) -> DistributionTerm:
    classes, there = _classes(target, vocab)
    found = target["punctuation_gap"][there]
    known = found.sum(1) > 0
    return PunctuationGap(classes[:, known], lengths=found[known], distance="squared")


def _sentences(target: Target, vocab: int) -> DistributionTerm:
    return SentenceLength(_padded(target["sentence_end"], vocab), hazard=target["soft_hazard"], distance="cramer")


def _bigrams(target: Target, vocab: int) -> DistributionTerm:
    sizes = target["ngram_starts"].diff().long()
    contexts = target["ngram_contexts"].repeat_interleave(sizes, 0)
    joint = target["ngram_context_probability"].repeat_interleave(sizes) * target["ngram_probability"]
    joint = torch.where(contexts[:, 0] < 0, joint, -1.0)
    kept = joint.topk(min(_NGRAMS, int((joint >= 0).sum()))).indices
    return NGrams(contexts[kept, 1].long(), target["ngram_completions"][kept].long(),
                  target["ngram_probability"][kept], vocab)  # fmt: skip


def _embeddings(name: str, vocab: int, model: Any) -> Tensor:
    """The model's own token embeddings [V, H], as they are now: what tokens are alike."""
    if model is None:
        raise ValueError(f"terms: model must be given for {name}, got none. Pass it: its embeddings are needed.")
    weight: Tensor = model.get_input_embeddings().weight
    if len(weight) < vocab:
        raise ValueError(f"terms: {name} must have an embedding for all {vocab} tokens of the head, got {len(weight)}.")
    return weight[:vocab].detach()


def _vocabulary_mmd(target: Target, vocab: int, model: Any) -> DistributionTerm:
    features = random_fourier_features(_embeddings("vocabulary_mmd", vocab, model))
    return VocabularyMMD(_padded(target["unigram"], vocab), features)


def _embedding_transport(target: Target, vocab: int, model: Any) -> DistributionTerm:
    embeddings = _embeddings("embedding_transport", vocab, model)
    return EmbeddingTransport(_padded(target["unigram"], vocab), embeddings.clone())


_OfTarget = Callable[[Target, int], DistributionTerm]
_OfModel = Callable[[Target, int, Any], DistributionTerm]


def _of(make: _OfTarget) -> _OfModel:
    return lambda target, vocab, _: make(target, vocab)


TERMS: dict[str, _OfModel] = {
    "token_l2": _of(lambda target, vocab: TokenL2(_padded(target["unigram"], vocab), squared=True)),
    "chi_squared": _of(lambda target, vocab: ChiSquared(_smoothed(target, vocab))),
    "unigram_kl": _of(lambda target, vocab: UnigramKL(_smoothed(target, vocab))),
    "vocabulary_mmd": _vocabulary_mmd,
    "embedding_transport": _embedding_transport,
    "sentence_length": _of(_sentences),
    "punctuation_rate": _of(_rates),
    "punctuation_gap": _of(_gaps),
    "ngrams": _of(_bigrams),
    "calibration": _of(lambda target, vocab: Entropy(calibration=True)),
}


FLOOR = "floor"  # in place of a weight
TIMES = "x"  # after a number, in place of a weight
TEXT_MMD = "text_mmd"  # the term that is of people's texts, and not of the target
_ROWS = 2048  # that gains are measured on


class HumanText(NamedTuple):
    """What noise floors and gains are taken of: input_ids and labels [S, T], and for floors the rows that a running
    mean looks back on."""

    input_ids: Tensor
    target: Tensor
    rows: int


def asks_for_text(weights: Sequence[str]) -> bool:
    """Whether `terms_of` needs a text, and a model."""
    return any(given.endswith((f"={FLOOR}", TIMES)) for given in weights)


def asks_for_texts(weights: Sequence[str]) -> bool:
    """Whether `terms_of` needs what people have written, as a `TextMMD`."""
    return any(given.startswith(f"{TEXT_MMD}=") for given in weights)


class Asked(NamedTuple):
    """NAME=WEIGHT, read. how: FLOOR, whose weight is 1, TIMES for a weight relative to the gain, or ""."""

    name: str
    weight: float
    how: str


class Written(NamedTuple):
    """A term of people's texts, and its gain, which the model's own are drawn for."""

    term: TextMMD
    gain: Callable[[], float]


def _known(own_text: bool, written: Written | None = None) -> dict[str, _OfModel]:
    if not own_text:
        return TERMS
    known = {name: make for name, make in TERMS.items() if name != "calibration"}
    return {**known, "reference_kl": _of(lambda target, vocab: ReferenceKL()), TEXT_MMD: lambda *_: _given(written)}


def _given(written: Written | None) -> DistributionTerm:
    if written is None:
        raise ValueError(f"terms: written must be given for {TEXT_MMD}, got none. Pass a Written of people's texts.")
    return written.term


def read_terms(weights: Sequence[str], own_text: bool = False) -> list[Asked]:
    """NAME=WEIGHT, ... of `terms_of`; ValueError for a name that is not known, or what is no weight."""
    known, found = _known(own_text), []
    for given in weights:
        name, _, weight = given.partition("=")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.0)[0]
            where = " of the model's own text" if own_text else ""
            raise ValueError(
                f"terms: {name} must be one of {', '.join(known)}{where}, got another. Did you mean {near}?"
            )
        if weight == FLOOR:
            found.append(Asked(name, 1.0, FLOOR))
            continue
        try:
            by = float(weight.removesuffix(TIMES))
        except ValueError:
            by = math.nan
        if not math.isfinite(by):
            raise ValueError(
                f"terms: {name} must come as {name}=WEIGHT, {name}=0.5{TIMES} or {name}={FLOOR}, got {given!r}. Write "
                f"{name}=0.5{TIMES}."
            )
        found.append(Asked(name, by, TIMES if weight.endswith(TIMES) else ""))
    return found


def terms_of(
    target: Target,
    weights: Sequence[str],
    vocab: int,
    text: HumanText | None = None,
    own_text: bool = False,
    model: Any = None,
    written: Written | None = None,
) -> TermSum:
    """NAME=WEIGHT, ... as a sum of terms for a head of `vocab` tokens. NAME=0.5x: at a weight of 0.5 / g, g its gain
    (`dft_kernels.terms.gains`) of `model` on `text`, so that it pulls half as hard as cross-entropy holds; NAME=floor:
    a constraint (`AtMost`) at the `noise_floor` of `text`. own_text: for the model's own, where there are reference_kl
    and text_mmd, which is `written`, and no calibration. model: whose embeddings, as they are now, vocabulary_mmd (256
    random Fourier features of a Gaussian kernel) and embedding_transport (debiased Sinkhorn) are over. ValueError for
    another name or weight, a statistic that the target lacks, or a vocabulary smaller than its."""
    if target.vocab_size is not None and target.vocab_size > vocab:
        raise ValueError(
            f"terms: the target must be of at most the model's {vocab} tokens, got {target.vocab_size}. Build it with "
            "the model's tokenizer."
        )
    known, asked = _known(own_text, written), read_terms(weights, own_text)
    found = [(one.weight, known[one.name](target, vocab, model)) for one in asked]
    measured = [at for at, one in enumerate(asked) if one.how]
    if not found:
        raise ValueError(f"terms: one term at least must be named, got none. There are {', '.join(known)}.")
    if measured:
        if text is None or model is None:
            raise ValueError(
                f"terms: text and model must be given for {weights[measured[0]]}, got neither or one. Pass both, or a "
                "weight."
            )
        # floors first: what has none is told before a model reads
        floors = {at: _floor(asked[at].name, found[at][1], text) for at in measured if asked[at].how == FLOOR}
        of_gains = [(weights[at], found[at][1]) for at in measured]
        for at, gain in zip(measured, _gains(of_gains, text, model, written), strict=True):
            weight, term = found[at]
            found[at] = (1.0, AtMost(term, floors[at], gain)) if at in floors else (weight / gain, term)
    return TermSum(found)


def _gains(
    terms: list[tuple[str, DistributionTerm]], text: HumanText, model: Any, written: Written | None
) -> list[float]:
    """Of terms as they were given, NAME=WEIGHT: of rows on the first sequences of `text`, whatever the model writes
    itself; of whole texts on what it writes."""
    for given, term in terms:
        if term.divergence:
            raise _idle(given, "the divergence from where the model starts")
    rows = [(1.0, term) for _, term in terms if term.reads is None]
    known = iter(_gains_of_rows(TermSum(rows), text, model) if rows else ())
    found = [next(known) if term.reads is None or written is None else written.gain() for _, term in terms]
    for (given, _), gain in zip(terms, found, strict=True):
        if not 0 < gain < math.inf:
            raise _idle(given, f"a gain of {gain:g}")
    return found


def _idle(given: str, got: str) -> ValueError:
    name = given.partition("=")[0]
    return ValueError(
        f"terms: {given} must be of a term that pulls at the start, got {got}. Give it a weight: {name}=0.02."
    )


@torch.no_grad()
def _gains_of_rows(terms: TermSum, text: HumanText, model: Any) -> list[float]:
    count = int(torch.searchsorted((text.target != -100).sum(1).cumsum(0), _ROWS)) + 1
    head, layer, training = head_of(model, adapted=True), output_layer(model), model.training
    ids, labels = (some[:count].to(layer.weight.device) for some in text[:2])
    model.eval()
    try:
        hidden = torch.cat([hidden_states(model, each) for each in ids.split(4)])
    finally:
        model.train(training)
    given = {**projection(layer, hidden), "logit_scale": head.logit_scale, "softcap": head.softcap}
    return list(gains(terms, hidden, target=labels, input_ids=ids, **given).values())


def _floor(name: str, term: DistributionTerm, text: HumanText) -> float:
    bound = noise_floor(term, *text)[term.name]
    if bound is None or not 0 < bound < math.inf:  # KL from a text that lacks what the target has is infinite
        got = "none: no token of a text tells it" if bound is None else f"{bound:g}"
        raise ValueError(f"terms: {name}={FLOOR} must have a finite noise floor above 0, got {got}. Give it a weight.")
    return bound
