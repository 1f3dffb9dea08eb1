"""Every mistake in making a term or in calling with it: one clear error, of one form."""

from __future__ import annotations

import re

import pytest
import torch
from term_cases import EMBEDDINGS, ENDS, HAZARD, LENGTHS, MARKS, RATE, H, P, V

from dft_kernels.terms import (
    ChiSquared,
    Delayed,
    EmbeddingTransport,
    Entropy,
    NGrams,
    PunctuationGap,
    PunctuationRate,
    SentenceLength,
    TokenL2,
    UnigramKL,
    VocabularyMMD,
    exact,
    random_fourier_features,
)

FORM = re.compile(r"^[\w.]+: .+ must .+, got .+\. .+\.$", re.S)
HID, W_ = torch.randn(2, 3, H), torch.randn(V, H)
L2, LENGTH = TokenL2(P), SentenceLength(ENDS, HAZARD)


ERRORS = {
    "target_type": (lambda: TokenL2([1.0]), TypeError, r"TokenL2: target must be a tensor, got list"),
    "target_sum": (lambda: TokenL2(P * 2), ValueError, "target must be probabilities that sum to 1, got a sum of 2"),
    "target_zero": (lambda: ChiSquared(torch.eye(3)[0]), ValueError, "target must be above 0 everywhere, got 2 zeros"),
    "direction": (lambda: UnigramKL(P, "up"), ValueError, "direction must be forward or reverse, got 'up'"),
    "mmd": (lambda: VocabularyMMD(P, EMBEDDINGS[:5]), ValueError, r"features must be floating \[31, r\], got \[5, 6\]"),
    "fourier": (lambda: random_fourier_features(EMBEDDINGS, 0), ValueError, "r must be an int of at least 1, got 0"),
    "bandwidth": (lambda: random_fourier_features(EMBEDDINGS, 4, -1.0), ValueError, "bandwidth must be greater than 0"),
    "nan": (lambda: TokenL2(P / 0 * 0), ValueError, "target must be finite"),
    "ends": (lambda: SentenceLength(torch.zeros(V), HAZARD), ValueError, "sentence_end must hold a token in every class"),
    "ends_2d": (lambda: SentenceLength(MARKS, HAZARD), ValueError, r"sentence_end must have shape \[V\], got \[31, 3\]"),
    "both": (lambda: SentenceLength(ENDS, HAZARD, LENGTHS), ValueError, "hazard or lengths must be given, one of them, got both"),
    "lengths": (lambda: SentenceLength(ENDS, lengths=LENGTHS * 2), ValueError, "lengths must be at least 0 and sum to at most 1"),
    "hazard": (lambda: SentenceLength(ENDS, HAZARD * 9), ValueError, "hazard must lie in 0..1"),
    "kind": (lambda: SentenceLength(ENDS, HAZARD, kind="x"), ValueError, "kind must be hazard or renewal, got 'x'"),
    "renewal": (
        lambda: SentenceLength(ENDS, HAZARD, kind="renewal", distance="squared"),
        ValueError, "distance must be one of wasserstein, cramer with kind='renewal', got 'squared'",
    ),
    "classes": (lambda: PunctuationGap(MARKS, HAZARD), ValueError, r"hazard must have a row for each of 3 classes, got \[1, 5\]"),
    "rate": (lambda: PunctuationRate(MARKS, RATE * 0), ValueError, "rate must be 3 numbers above 0 and at most 1"),
    "ngram_length": (
        lambda: NGrams(torch.ones(2, 4).long(), torch.ones(2).long(), torch.ones(2), V),
        ValueError, "contexts must have 1 to 3 tokens, got 4",
    ),
    "ngram_ids": (
        lambda: NGrams(torch.tensor([V]), torch.tensor([1]), torch.ones(1), V),
        ValueError, r"contexts must hold token ids in 0\.\.30, got torch.int64 in 31\.\.31",
    ),
    "ngram_zero": (
        lambda: NGrams(torch.tensor([1]), torch.tensor([1]), torch.zeros(1), V),
        ValueError, "probabilities must be above 0 and at most 1",
    ),
    "entropy": (lambda: Entropy(), ValueError, r"value or calibration=True must be given, one of them"),
    "entropy_value": (lambda: Entropy(-1.0), ValueError, "value must be a number of nats of at least 0, got -1.0"),
    "weight": (lambda: "a" * L2, TypeError, "a weight must be a number, got 'a'"),
    "sum": (lambda: L2 + 3, TypeError, "what is added to it must be a term, got int"),
    "vocabularies": (lambda: L2 + TokenL2(torch.ones(1)), ValueError, r"terms must be of one vocabulary, got \[1, 31\]"),
    "term": (lambda: exact(HID, W_, None, "l2"), TypeError, "term must be a DistributionTerm or a sum of them, got str"),
    "vocabulary": (lambda: exact(HID, W_[:5], None, L2), ValueError, "term must be of the head's vocabulary of 5, got 31"),
    "hidden": (lambda: exact(HID[0, 0], W_, None, L2), ValueError, r"hidden must be a tensor \[B, T, H\] or \[T, H\], got \[8\]"),
    "text": (lambda: exact(HID, W_, None, LENGTH), TypeError, "input_ids must be a tensor of int64 where a term asks"),
    "text_shape": (
        lambda: exact(HID, W_, None, LENGTH, input_ids=torch.zeros(2, 4).long()),
        ValueError, r"input_ids must be \[2, 3\] on cpu, got \[2, 4\] on cpu",
    ),
    "labels": (lambda: exact(HID, W_, torch.zeros(2, 4).long(), L2), ValueError, r"target must be a tensor \[2, 3\] on cpu"),
    "halves": (lambda: exact(HID[:1], W_, None, L2, cross_fit=True), ValueError, "cross_fit=True must come with two sequences"),
    "ours": (lambda: exact(HID, W_, None, L2, potential=P), TypeError, "potential must be left out, got one"),
    "reduction": (lambda: Delayed(L2).loss(HID, W_, reduction="sum"), ValueError, "reduction must be mean, got 'sum'"),
    "calibration": (lambda: exact(HID, W_, None, Entropy(calibration=True)), ValueError, "target must be given where entropy"),
    "decay": (lambda: Delayed(L2, decay=1.0), ValueError, "decay must lie in 0..1, below 1, got 1.0"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, error, text = ERRORS[name]
    with pytest.raises(error, match=text) as caught:
        call()
    assert FORM.match(str(caught.value)), str(caught.value)


def test_transport_errors() -> None:
    with pytest.raises(ValueError, match=r"embeddings must be floating \[31, d\], got \[5, 6\]"):
        EmbeddingTransport(P, EMBEDDINGS[:5])
    with pytest.raises(ValueError, match=r"regularisation must be at least 0\.01 or None, got 0\.0"):
        EmbeddingTransport(P, EMBEDDINGS, regularisation=0.0)
    with pytest.raises(ValueError, match="k must be an int of at least 1, got 0"):
        EmbeddingTransport(P, EMBEDDINGS, 0)
