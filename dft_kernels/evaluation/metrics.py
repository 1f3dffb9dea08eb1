"""The one table of metrics: what is asked of a model's text beside human text.

Each is a Statistic of one side, compared by its difference; a Distance between both sides; or an Expectation, of what
the model expects where it reads. Whether a value is more than noise is for `measure` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..targets import distances
from ..targets.punctuation import CLASSES
from ..targets.target import burstiness
from . import embeddings
from .diversity import SelfBLEU, compression_ratio
from .documents import WINDOW, Documents, Rows
from .reading import Read, Reading
from .results import DIFFERENCE, DISTANCE, LEVEL, About

HALVES = 200  # random ones, of a floor and of an interval


@dataclass(frozen=True)
class Sample:
    """The texts of one model: rows [n] of a pool whose first n rows are the human texts after the same prompts; what
    it expects, where it was read."""

    documents: Documents
    rows: Rows
    reading: Reading | None = None


@dataclass(frozen=True)
class Metric(About):
    """An entry. style: part of the style diversity score; halves: how many random halves its floor and interval
    take; words: it is of words, which spaces must separate; counts: which documents [D] it is taken of, None for all;
    events: how many of what it counts each has [D], where that can be rare;
    own_noise: its floor is of a model; centred: of its noise only the spread counts."""

    style: bool = False
    halves: int = HALVES
    words: bool = True
    counts: Callable[[Documents], Any] | None = None
    events: Callable[[Documents], Any] | None = None
    centred: bool = False
    own_noise: ClassVar[bool] = False

    def missing(self, sample: Sample) -> str:
        """Why it cannot be measured; "" where it can."""
        return "not measured: no spaces separate the words" if self.words and not sample.documents.spaced else ""

    def at(self, sample: Sample, prompts: Rows) -> tuple[float, float | None, float | None]:
        """Value, and the statistics of model and human text where it has such, of the texts after some prompts."""
        raise NotImplementedError

    def noise(self, sample: Sample, a: Rows, b: Rows) -> float:
        """The value between two sides of human text."""
        raise NotImplementedError

    def p(self, sample: Sample, seed: int) -> float | None:
        """Of a permutation test that both sides are alike, where it has one."""
        return None


@dataclass(frozen=True)
class Statistic(Metric):
    """of: of one side; the value is the model's less the human one. sized: it depends on how many texts there are."""

    of: Callable[[Documents, Rows], float] = field(kw_only=True)
    sized: bool = False

    def at(self, sample: Sample, prompts: Rows) -> tuple[float, float | None, float | None]:
        model, human = self.of(sample.documents, sample.rows[prompts]), self.of(sample.documents, prompts)
        return model - human, model, human

    def noise(self, sample: Sample, a: Rows, b: Rows) -> float:
        return self.of(sample.documents, a) - self.of(sample.documents, b)


@dataclass(frozen=True)
class Distance(Metric):
    """of: of two sides. test: its permutation test; embedded: of embeddings; lacks: what is not installed."""

    of: Callable[[Documents, Rows, Rows], float] = field(kw_only=True)
    test: Callable[[Documents, Rows, Rows, int], float] | None = None
    embedded: bool = False
    lacks: Callable[[], str] | None = None

    def missing(self, sample: Sample) -> str:
        none = _no_distance(sample.documents) if self.embedded else super().missing(sample)
        return none or (self.lacks() if self.lacks is not None else "")

    def at(self, sample: Sample, prompts: Rows) -> tuple[float, float | None, float | None]:
        return self.of(sample.documents, sample.rows[prompts], prompts), None, None

    def noise(self, sample: Sample, a: Rows, b: Rows) -> float:
        return self.of(sample.documents, a, b)

    def p(self, sample: Sample, seed: int) -> float | None:
        n = len(sample.rows)
        return None if self.test is None else self.test(sample.documents, sample.rows, np.arange(n), seed)


@dataclass(frozen=True)
class Expectation(Metric):
    """of: of what a model expects of some human texts, and of some others, its own.

    Its floor is what the draw of n texts moves it by: the difference of two sides of n human ones over sqrt(2); where
    it is `centred`, between two sides, as far as that is off from its mean."""

    of: Callable[[Read, Rows, Read, Rows], tuple[float, float | None, float | None]] = field(kw_only=True)
    own_noise: ClassVar[bool] = True

    def missing(self, sample: Sample) -> str:
        return "not measured: the model was not read" if sample.reading is None else ""

    def at(self, sample: Sample, prompts: Rows) -> tuple[float, float | None, float | None]:
        assert sample.reading is not None
        return self.of(sample.reading.human, prompts, sample.reading.own, prompts)

    def noise(self, sample: Sample, a: Rows, b: Rows) -> float:
        assert sample.reading is not None
        human = sample.reading.human
        if self.centred:
            return self.of(human, a, human, b)[0]
        return (self.of(human, a, human, a)[0] - self.of(human, b, human, b)[0]) / math.sqrt(2)


def _share(counts: Any, rows: Rows) -> Any:
    """Sums of counts [D, F] over rows, as shares, float64."""
    total = np.asarray(counts[rows].sum(0), np.float64).reshape(-1)
    return total / total.sum() if total.sum() else total


def _token_l2(n: int) -> Callable[[Documents, Rows, Rows], float]:
    def distance(documents: Documents, a: Rows, b: Rows) -> float:
        counts = documents.grams("tokens", n)
        return float(np.linalg.norm(_share(counts, a) - _share(counts, b)))

    return distance


def _distinct(n: int) -> Callable[[Documents, Rows], float]:
    def statistic(documents: Documents, rows: Rows) -> float:
        total = np.asarray(documents.grams("words", n)[rows].sum(0))
        return float((total > 0).sum() / total.sum()) if total.sum() else np.nan

    return statistic


def _mean(of: str) -> Callable[[Documents, Rows], float]:
    def statistic(documents: Documents, rows: Rows) -> float:
        values = getattr(documents, of)[rows]
        there = ~np.isnan(values)
        return float(values[there].mean()) if there.any() else np.nan

    return statistic


def _self_bleu(documents: Documents, rows: Rows) -> float:
    grams = [documents.grams("words", n) for n in range(1, 5)]
    return documents.kept(SelfBLEU, lambda: SelfBLEU(grams, documents.word_counts))(rows)


def _sentence_moments(documents: Documents, rows: Rows) -> tuple[float, float]:
    share = _share(documents.sentence_lengths, rows)
    if not share.any():
        return np.nan, np.nan
    at = np.arange(len(share))
    mean = float(share @ at)
    return mean, float(share @ (at - mean) ** 2) ** 0.5


def _burstiness(documents: Documents, rows: Rows) -> float:
    share = _share(documents.sentence_lengths, rows)
    return burstiness(torch.from_numpy(share)) if share.any() else np.nan


def _openings(documents: Documents, rows: Rows) -> float:
    same, runs = documents.openings[rows].sum(0)
    return float(same / runs) if runs else np.nan


def _between(of: str, distance: Callable[[Tensor, Tensor], float]) -> Callable[[Documents, Rows, Rows], float]:
    """A distance of the shares of what documents count."""

    def found(documents: Documents, a: Rows, b: Rows) -> float:
        shares = [torch.from_numpy(_share(getattr(documents, of), rows)) for rows in (a, b)]
        return distance(*shares) if all(bool(share.any()) for share in shares) else np.nan

    return found


def _rate(kind: int) -> Callable[[Documents, Rows], float]:
    def statistic(documents: Documents, rows: Rows) -> float:
        words = documents.word_counts[rows].sum()
        return float(1000 * documents.marks[rows, kind].sum() / words) if words else np.nan

    return statistic


def _rates_l1(documents: Documents, a: Rows, b: Rows) -> float:
    rates = [np.array([_rate(kind)(documents, rows) for kind in range(len(CLASSES))]) for rows in (a, b)]
    return float(np.abs(rates[0] - rates[1]).sum())


def _marks(kind: int) -> Callable[[Documents], Any]:
    return lambda documents: documents.marks[:, kind]


def _gram(documents: Documents) -> Any:
    """The kernel of the pool [D, D]."""
    pool = documents.embeddings
    return documents.kept("gram", lambda: embeddings.gram(pool, embeddings.bandwidths(pool[documents.human])))


def _no_distance(documents: Documents) -> str:
    """Why embeddings say nothing: there are none, or all of them are the same."""
    if documents.embeddings is None:
        return "not measured: no encoder was named"
    same = np.ptp(documents.embeddings[documents.human], axis=0).max() == 0
    return "too few: all human texts are the same to the encoder" if same else ""


def _mauve(documents: Documents, a: Rows, b: Rows) -> float:
    found = embeddings.mauve(documents.embeddings, a, b)
    return np.nan if found is None else 1 - found


def _perplexity(human: Read, rows: Rows, own: Read, its: Rows) -> tuple[float, float | None, float | None]:
    value = math.exp(human.mean("cross_entropy", rows))
    return value, value, None


def _entropy_gap(human: Read, rows: Rows, own: Read, its: Rows) -> tuple[float, float | None, float | None]:
    entropy, text = own.mean("entropy", its), human.mean("cross_entropy", rows)
    return entropy - text, entropy, text


def _calibration(human: Read, rows: Rows, own: Read, its: Rows) -> tuple[float, float | None, float | None]:
    return _entropy_gap(human, rows, human, rows)


def _long_enough(documents: Documents) -> Any:
    return documents.word_counts >= WINDOW


def _with_sentences(documents: Documents) -> Any:
    return documents.sentence_lengths.sum(1) > 0


_MARKS = {
    "comma": "commas", "semicolon": "semicolons", "colon": "colons", "dash": "dashes", "full_stop": "full stops",
    "question": "question marks", "exclamation": "exclamation marks", "quote": "quotation marks",
}  # fmt: skip
METRICS: tuple[Metric, ...] = (
    *(
        Distance(
            f"token L2, {n}-grams", "frequencies", DISTANCE, "probability",
            f"‖f_model - f_human‖, f the shares of all {n}-grams of tokens",
            "targets.distances.l2", of=_token_l2(n), words=False,
        )
        for n in (1, 2, 3)
    ),
    Distance(
        "MMD², embeddings", "meaning", DISTANCE, "kernel units",
        "mean k(x, x') + mean k(y, y') - 2 mean k(x, y) over different texts: unbiased, so that it may be below 0; k: "
        "mean of three Gaussian kernels whose squared bandwidths are 1/2, 1 and 2 times the median of human pairs",
        "Gretton et al., A Kernel Two-Sample Test, JMLR 13, 2012",
        of=lambda documents, a, b: embeddings.mmd2(_gram(documents), a, b),
        test=lambda documents, a, b, seed: embeddings.permutation_p(_gram(documents), a, b, seed=seed),
        embedded=True,
    ),
    Distance(
        "1 - MAUVE", "meaning", DISTANCE, "area",
        "1 less the area under the divergence curve of both sides' embeddings, quantised by k-means",
        "Pillutla et al., arXiv:2102.01454, by mauve-text, of sentence embeddings in place of GPT-2's",
        of=_mauve, halves=50,
        embedded=True, lacks=embeddings.mauve_missing,
    ),
    *(
        Statistic(
            f"distinct-{n}", "diversity", DIFFERENCE, "share", f"different {n}-grams of words / all of them",
            "Li et al., arXiv:1510.03055", of=_distinct(n), style=n == 2, sized=True,
        )
        for n in (1, 2, 3)
    ),
    Statistic(
        "MATTR", "diversity", DIFFERENCE, "share",
        f"different words of a window of {WINDOW} / {WINDOW}, mean over its places in a text, and over texts",
        "Covington and McFall, Journal of Quantitative Linguistics 17(2), 2010, by lexicalrichness", of=_mean("mattr"),
        style=True, counts=_long_enough,
    ),
    Statistic(
        "MTLD", "diversity", DIFFERENCE, "words",
        "mean length of runs of words whose type-token ratio stays above 0.72, forwards and backwards, mean over texts",
        "McCarthy and Jarvis, Behavior Research Methods 42(2), 2010, by lexicalrichness", of=_mean("mtld"), style=True,
        counts=_long_enough,
    ),
    Statistic(
        "self-BLEU", "diversity", DIFFERENCE, "0 to 100", "mean BLEU-4 of a text against all others of its side",
        "Zhu et al., arXiv:1802.01886", of=_self_bleu, style=True, sized=True,
    ),
    Statistic(
        "compression ratio", "diversity", DIFFERENCE, "ratio", "bytes / bytes after DEFLATE, of all texts in a row",
        "Shaib et al., arXiv:2403.00553",
        of=lambda documents, rows: compression_ratio([documents.texts[row] for row in rows]), style=True, halves=100,
        sized=True, words=False,
    ),
    Statistic(
        "text length", "rhythm", DIFFERENCE, "words", "mean words of a text; distinct-n, self-BLEU and compression "
        "depend on it too", "this package",
        of=lambda documents, rows: float(documents.word_counts[rows].mean()),
    ),
    Statistic(
        "sentence length, mean", "rhythm", DIFFERENCE, "words", "mean words of a sentence that is whole in its text",
        "sentences by nupunkt", of=lambda documents, rows: _sentence_moments(documents, rows)[0], style=True,
        counts=_with_sentences,
    ),
    Statistic(
        "sentence length, SD", "rhythm", DIFFERENCE, "words", "standard deviation of the same",
        "sentences by nupunkt", of=lambda documents, rows: _sentence_moments(documents, rows)[1], style=True,
        counts=_with_sentences,
    ),
    Distance(
        "sentence length, W1", "rhythm", DISTANCE, "words", "sum abs(F_model - F_human) over sentence lengths",
        "Vallender, Theory of Probability and its Applications 18(4), 1974",
        of=_between("sentence_lengths", distances.wasserstein_1), counts=_with_sentences,
    ),
    Statistic(
        "burstiness", "rhythm", DIFFERENCE, "-1 to 1", "(SD - mean) / (SD + mean) of sentence lengths",
        "Goh and Barabási, EPL 81, 48002, 2008", of=_burstiness, style=True,
        counts=_with_sentences,
    ),
    Statistic(
        "repeated openings", "rhythm", DIFFERENCE, "share",
        "three sentences in a row that begin with the same word / all runs of three", "this package", of=_openings,
        style=True, counts=lambda documents: documents.openings[:, 1] > 0,
        events=lambda documents: documents.openings[:, 0],
    ),
    *(
        Statistic(
            name, "punctuation", DIFFERENCE, "per 1,000 words", f"1000 * {name} / words; a run such as ... is one",
            "targets.punctuation", of=_rate(CLASSES.index(kind)), style=True,
            events=_marks(CLASSES.index(kind)),
        )
        for kind, name in _MARKS.items()
    ),
    Distance(
        "punctuation rates, L1", "punctuation", DISTANCE, "per 1,000 words",
        "sum abs(r_model - r_human) over the classes of marks, r the rate of one in 1,000 words",
        "targets.punctuation", of=_rates_l1,
    ),
    Distance(
        "punctuation gaps, W1", "punctuation", DISTANCE, "words",
        "sum abs(F_model - F_human) over the words between a mark and the next",
        "Vallender, Theory of Probability and its Applications 18(4), 1974",
        of=_between("mark_gaps", distances.wasserstein_1),
    ),
    Distance(
        "punctuation transitions, TV", "punctuation", DISTANCE, "probability",
        "1/2 sum abs(f_model - f_human), f the shares of pairs of marks that follow each other, by class",
        "targets.distances.total_variation", of=_between("mark_transitions", distances.total_variation),
    ),
    Expectation(
        "perplexity", "reading", LEVEL, "per token", "exp(mean -log q(y)) over human texts after their prompts",
        "Jelinek et al., JASA 62, S63, 1977",
        of=_perplexity, words=False,
    ),
    Expectation(
        "entropy gap", "reading", DIFFERENCE, "nats a token",
        "mean H(q) over the model's own texts - mean -log q(y) over human ones",
        "Braverman et al., arXiv:1906.05664", of=_entropy_gap, words=False, centred=True,
    ),
    Expectation(
        "calibration", "reading", DIFFERENCE, "nats a token", "mean H(q) - mean -log q(y), both over human texts",
        "Braverman et al., arXiv:1906.05664", of=_calibration, words=False,
    ),
)  # fmt: skip
