"""A pool of texts of all sides, counted once a document; a side is an array of row numbers.

Metrics are taken of hundreds of random subsets of documents, so that what they need of a document is counted at its
first use and kept: every attribute below has a row a document.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from scipy import sparse

from ..targets.corpus import CLOSED, WORD, encode, sentence_ends
from ..targets.punctuation import CLASSES, placed_marks

T = TypeVar("T")
Rows = Any  # row numbers, int64 [n]
WINDOW = 50  # words of MATTR's window


class Documents:
    """Texts, of which `human` are rows; their tokens by one tokenizer, and their embeddings [D, E] float64 where there
    are any. prompts: what each goes on from; None: nothing."""

    def __init__(
        self,
        texts: Sequence[str],
        human: Rows,
        tokenizer: Any,
        embeddings: Any = None,
        prompts: Sequence[str] | None = None,
    ) -> None:
        self.texts, self.human, self.tokenizer, self.embeddings = list(texts), human, tokenizer, embeddings
        self.prompts = [""] * len(self.texts) if prompts is None else list(prompts)
        self._kept: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.texts)

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def spaced(self) -> bool:
        """Whether the human texts have spaces between their words, one character in twenty at least."""
        texts = [self.texts[row] for row in self.human]
        return 20 * sum(map(str.isspace, "".join(texts))) >= sum(map(len, texts))

    # ---- words and tokens

    @cached_property
    def tokens(self) -> list[list[int]]:
        """Token ids."""
        return [encoding.ids for encoding in encode(self.tokenizer, self.texts)]

    @cached_property
    def words(self) -> list[list[str]]:
        """Lower-cased."""
        return [[match.group().lower() for match in WORD.finditer(text)] for text in self.texts]

    @cached_property
    def word_counts(self) -> Any:
        """[D] words."""
        return np.array([len(words) for words in self.words])

    def grams(self, of: str, n: int) -> Any:
        """Counts of the n-grams of "words" or "tokens", sparse [D, different ones of the pool]."""
        return self.kept((of, n), lambda: _counted(getattr(self, of), n)[0])

    # ---- diversity

    @cached_property
    def mattr(self) -> Any:
        """[D] moving-average type-token ratio over WINDOW words, NaN of shorter texts."""
        return self._richness(lambda one: one.mattr(window_size=WINDOW), WINDOW)

    @cached_property
    def mtld(self) -> Any:
        """[D] measure of textual lexical diversity, NaN of texts shorter than WINDOW words."""
        return self._richness(lambda one: one.mtld(threshold=0.72), WINDOW)

    def _richness(self, measure: Any, least: int) -> Any:
        from lexicalrichness import LexicalRichness

        return np.array([
            measure(LexicalRichness(words, preprocessor=None, tokenizer=None)) if len(words) >= least else np.nan
            for words in self.words
        ])  # fmt: skip

    # ---- sentences

    @cached_property
    def sentences(self) -> list[list[list[str]]]:
        """The words of each sentence that is whole: without the rest of one that began in the prompt, and without one
        that the end of the text cuts off."""
        return [self._sentences(*pair) for pair in zip(self.prompts, self.texts, strict=True)]

    def _sentences(self, prompt: str, text: str) -> list[list[str]]:
        ends = sentence_ends(text)
        found: list[list[str]] = [[] for _ in ends]
        for match in WORD.finditer(text):
            at = int(np.searchsorted(ends, match.start(), side="right"))
            if at < len(found):
                found[at].append(match.group().lower())
        begun = bool(prompt.strip()) and not CLOSED.search(prompt)
        return found[begun:] if CLOSED.search(text) else found[begun:-1]

    @cached_property
    def sentence_lengths(self) -> Any:
        """[D, longest + 1] sentences by their words."""
        return _histograms([[len(words) for words in one] for one in self.sentences])

    @cached_property
    def openings(self) -> Any:
        """[D, 2] runs of three sentences that begin with the same word, and all runs of three."""
        rows = []
        for one in self.sentences:
            first = [words[0] for words in one if words]
            runs = list(zip(first, first[1:], first[2:], strict=False))
            rows.append((sum(a == b == c for a, b, c in runs), len(runs)))
        return np.array(rows).reshape(-1, 2)

    # ---- punctuation

    @cached_property
    def _placed(self) -> list[list[tuple[int, int]]]:
        return [placed_marks(text) for text in self.texts]

    @cached_property
    def marks(self) -> Any:
        """[D, K] marks by class."""
        return np.array([np.bincount([kind for _, kind in one], minlength=len(CLASSES)) for one in self._placed])

    @cached_property
    def mark_gaps(self) -> Any:
        """[D, longest + 1] pairs of marks that follow each other, by the words between them."""
        rows = []
        for text, placed in zip(self.texts, self._placed, strict=True):
            before = np.searchsorted([match.start() for match in WORD.finditer(text)], [at for at, _ in placed])
            rows.append(np.diff(before).tolist())
        return _histograms(rows)

    @cached_property
    def mark_transitions(self) -> Any:
        """[D, K * K] marks by the class of the one before and their own."""
        K = len(CLASSES)
        rows = []
        for placed in self._placed:
            kinds = [kind for _, kind in placed]
            rows.append(np.bincount([a * K + b for a, b in pairwise(kinds)], minlength=K * K))
        return np.array(rows)


def phrases(words: Sequence[Sequence[str]], longest: int = 3) -> tuple[Any, list[str]]:
    """Counts of all n-grams of words up to `longest`, sparse [D, F], and what they are."""
    found = [_counted(words, n) for n in range(1, longest + 1)]
    return sparse.hstack([counts for counts, _ in found], format="csr"), [
        " ".join(g) for _, names in found for g in names
    ]


def _counted(rows: Sequence[Sequence[Hashable]], n: int) -> tuple[Any, list[tuple[Any, ...]]]:
    """n-gram counts, sparse [D, F], and the n-grams."""
    known: dict[tuple[Any, ...], int] = {}
    columns, ends = [], [0]
    for row in rows:
        columns += [known.setdefault(gram, len(known)) for gram in zip(*(row[at:] for at in range(n)), strict=False)]
        ends.append(len(columns))
    counts = sparse.csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(rows), len(known)))
    counts.sum_duplicates()
    return counts, list(known)


def _histograms(rows: list[list[int]]) -> Any:
    """[D, largest + 1]"""
    width = 1 + max((max(row) for row in rows if row), default=0)
    return np.array([np.bincount(row, minlength=width) for row in rows])
