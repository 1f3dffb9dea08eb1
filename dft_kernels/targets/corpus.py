"""Targets computed from texts: documents in, counts out, one pass, in memory that the counts bound.

A document longer than PASSAGE characters is cut into passages at paragraphs. Passages, not documents, are dealt to
BLOCKS random blocks, whose halves give the noise floors: what a corpus of several authors differs by between *them* is
more. Sentences are nupunkt's, and a blank line ends one; a token that holds a sentence's last character ends it.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..store.fingerprint import tokenizer_fingerprint
from .comparison import compare
from .ngrams import BLOCKS, NGramCounts, Tracked, entropies, tracked
from .punctuation import CLASSES, marks, token_marks
from .target import AGES, GAPS, LETTERS, WINDOW, WORDS, About, Target

PASSAGE = 8192  # characters
SPLITS = 16  # random halves that a noise floor is the mean of
_BATCH = 32  # passages tokenized at a time
WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
CLOSED = re.compile(r"[.!?…][\"'”’»)\]]*\s*$")  # a text that ends where a sentence does
_PARAGRAPH = re.compile(r"\n[ \t\r]*\n\s*")


def passages(text: Iterable[str], size: int = PASSAGE) -> Iterator[str]:
    """A text, given as lines with their ends (an open file, or `str.splitlines(True)`), in passages: cut at the first
    blank line after `size` characters, or at the first line after four times as many."""
    held: list[str] = []
    length = 0
    for line in text:
        held.append(line)
        length += len(line)
        if length >= size and (not line.strip() or length >= 4 * size):
            yield "".join(held)
            held, length = [], 0
    if "".join(held).strip():
        yield "".join(held)


def sentence_ends(text: str) -> list[int]:
    """Where the sentences of a text end: behind the last character that is no space. What holds no word is part of the
    sentence before it."""
    import nupunkt

    ends: list[int] = []
    start = 0
    for gap in [*_PARAGRAPH.finditer(text), None]:
        paragraph = text[start : gap.start() if gap else len(text)]
        for first, last in nupunkt.sent_spans(paragraph) if paragraph.strip() else ():
            sentence = paragraph[first:last]
            end = start + first + len(sentence.rstrip())
            if WORD.search(sentence):
                ends.append(end)
            elif ends and sentence.strip():
                ends[-1] = end
        start = gap.end() if gap else start
    return ends


def encode(tokenizer: Any, texts: list[str]) -> list[Any]:
    """ids and character offsets of each text, without special tokens."""
    return list(tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False).encodings)


class Counts:
    """What has been counted, by block. `add` a passage, `merge` another's, make a `target`.

    tokenizer: a fast one of transformers, or None for text statistics alone. whole: whether texts begin and end where
    sentences do; else mark_hazard knows the age of a sentence from the first end on, and what no mark closes at the end
    of a text is no sentence.
    """

    def __init__(self, tokenizer: Any = None, whole: bool = True) -> None:
        self.tokenizer, self.whole = tokenizer, whole
        K = len(CLASSES)
        shapes: dict[str, tuple[int, ...]] = {
            **dict.fromkeys(("documents", "characters", "words", "sentences", "tokens"), ()),
            "sentence_words": (WORDS,), "word_length": (LETTERS,), "marks": (K,), "types": (), "windows": (),
        }  # fmt: skip
        self.grams: list[NGramCounts] = []
        if tokenizer is not None:
            if not getattr(tokenizer, "is_fast", False):
                raise ValueError(
                    f"target: --tokenizer must be a fast one, which knows a token's characters, got "
                    f"{type(tokenizer).__name__}. Load it by AutoTokenizer, with tokenizers installed."
                )
            V = len(tokenizer)
            self.vocab_size = V
            self.by_age = np.zeros((AGES, V), np.int32)
            self.features = token_marks(tokenizer, V)
            of, self._mark_class = self.features.long().numpy().T
            self._mark_start = np.searchsorted(of, np.arange(V + 1))
            self.grams = [NGramCounts(size, V) for size in (2, 3)]
            shapes |= {
                "unigram": (V,), "ends": (V,), "sentence_tokens": (AGES,), "at_risk": (AGES,),
                "punctuation": (K,), "gap": (K, GAPS), "transition": (K, K),
                "mark_events": (1 + K, GAPS + 1), "mark_risk": (1 + K, GAPS + 1),
            }  # fmt: skip
        self.sums = {name: np.zeros((BLOCKS, *shape), np.int64) for name, shape in shapes.items()}

    def add(self, text: str, block: int, encoding: Any = None) -> None:
        """Count a passage. encoding: the tokenizer's output for it, if already computed."""
        sums = {name: value[block : block + 1] for name, value in self.sums.items()}
        ends = sentence_ends(text)
        if not self.whole and not CLOSED.search(text):
            del ends[-1:]
        found = list(WORD.finditer(text))
        sums["documents"] += 1
        sums["characters"] += len(text)
        sums["words"] += len(found)
        sums["sentences"] += len(ends)
        of = np.searchsorted(ends, [match.start() for match in found], side="right")
        per_sentence = np.bincount(of, minlength=len(ends))[: len(ends)]
        _tally(sums["sentence_words"][0], per_sentence)
        _tally(sums["word_length"][0], np.array([match.end() - match.start() for match in found], np.int64))
        _tally(sums["marks"][0], np.array(marks(text), np.int64))
        types, windows = _moving_types([match.group().lower() for match in found])
        sums["types"] += types
        sums["windows"] += windows
        if self.tokenizer is not None:
            encoding = encoding or encode(self.tokenizer, [text])[0]
            self._add_tokens(np.array(encoding.ids, np.int64), encoding.offsets, np.array(ends, np.int64), block)

    def _add_tokens(self, ids: Any, offsets: Any, ends: Any, block: int) -> None:
        if not len(ids):
            return
        sums = {name: value[block] for name, value in self.sums.items()}
        self.sums["tokens"][block] += len(ids)
        _tally(sums["unigram"], ids)
        for counter in self.grams:
            counter.add(ids, block)
        starts = np.array(offsets, np.int64)[:, 0]
        last = np.unique(np.maximum(np.searchsorted(starts, ends - 1, side="right") - 1, 0))
        _tally(sums["ends"], ids[last])
        lengths = np.diff(last, prepend=-1)
        _tally(sums["sentence_tokens"], lengths - 1)
        # sentences longer than a; the last bin: tokens at age A - 1 or more
        longer = len(lengths) - np.cumsum(np.bincount(np.minimum(lengths, AGES), minlength=AGES + 1))[:AGES]
        longer[-1] = np.maximum(lengths - (AGES - 1), 0).sum()
        sums["at_risk"] += longer
        if len(last):
            inside = np.arange(last[-1] + 1)
            before = np.searchsorted(last, inside)  # ends before each token
            ages = inside - np.concatenate([[0], last + 1])[before]
            np.add.at(self.by_age, (np.minimum(ages, AGES - 1), ids[inside]), 1)
        counts = self._mark_start[ids + 1] - self._mark_start[ids]
        where = np.repeat(np.arange(len(ids)), counts)
        first = np.cumsum(counts) - counts
        kinds = self._mark_class[np.repeat(self._mark_start[ids] - first, counts) + np.arange(counts.sum())]
        _tally(sums["punctuation"], kinds)
        np.add.at(sums["transition"], (kinds[:-1], kinds[1:]), 1)
        if self.whole:
            _tally_open(sums, 0, last, len(ids), 0)
        elif len(last):
            _tally_open(sums, 0, last[1:] - last[0] - 1, len(ids) - last[0] - 1, 0)
        for kind in range(len(CLASSES)):
            _tally(sums["gap"][kind], np.diff(where[kinds == kind]) - 1)
            _tally_open(sums, 1 + kind, where[kinds == kind], len(ids), GAPS)

    def merge(self, other: Counts) -> None:
        """Add another's counts, of the same tokenizer."""
        for name, value in other.sums.items():
            self.sums[name] += value
        for mine, theirs in zip(self.grams, other.grams, strict=True):
            mine.merge(theirs)
        if self.tokenizer is not None:
            self.by_age += other.by_age

    def statistics(self, blocks: Any, grams: Tracked | None) -> dict[str, Tensor]:
        """The tensors of a Target of some blocks, without entropy."""
        sums = {name: value[blocks].sum(0) for name, value in self.sums.items()}
        out: dict[str, Tensor] = {}
        if sums["sentences"]:
            out["sentence_words"] = _shares(sums["sentence_words"])
        if sums["words"]:
            out["word_length"] = _shares(sums["word_length"])
            out["punctuation_per_1000_words"] = _ratio(1000 * sums["marks"], sums["words"])
        if sums["windows"]:
            out["type_token_ratio"] = _ratio(sums["types"], WINDOW * sums["windows"]).reshape(1)
        if self.tokenizer is None or not sums["tokens"]:
            return out
        out["unigram"] = _shares(sums["unigram"])
        out["punctuation_features"] = self.features
        out["punctuation_rate"] = _ratio(sums["punctuation"], sums["tokens"])
        out["punctuation_gap"] = _shares(sums["gap"])
        out["punctuation_transition"] = _shares(sums["transition"])
        out["mark_hazard"] = _ratio(sums["mark_events"], np.maximum(sums["mark_risk"], 1))
        out["mark_risk"] = _shares(sums["mark_risk"])
        if sums["sentence_tokens"].sum():
            out["sentence_end"] = _ratio(sums["ends"], np.maximum(sums["unigram"], 1))
            out["sentence_tokens"] = _shares(sums["sentence_tokens"])
            out["hazard"] = _ratio(sums["sentence_tokens"], np.maximum(sums["at_risk"], 1))
        if grams is not None:
            out |= grams.tensors(blocks)
        return out

    def noise(self, grams: Tracked | None, seed: int = 0) -> dict[str, float]:
        """Mean over SPLITS random halves of the blocks of the distances between them; {} where a half is empty. It
        falls with the square root of the corpus, squared distances with the corpus."""
        generator = random.Random(seed)
        kept: dict[str, list[float]] = {}
        for _ in range(SPLITS):
            order = generator.sample(range(BLOCKS), BLOCKS)
            halves = [self.statistics(order[at::2], grams) for at in range(2)]
            if not all(self.sums["words"][order[at::2]].sum() for at in range(2)):
                return {}
            for name, value in compare(*halves).items():
                kept.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in kept.items()}

    def target(self, name: str, source: str, licence: str, tokenizer_name: str | None = None) -> Target:
        """All that was counted, as a Target, with its noise floors and warnings."""
        from .. import __version__

        totals = {key: int(value.sum()) for key, value in self.sums.items()}
        if not totals["words"]:
            raise ValueError(f"target: the text of {name} must hold words, got none. Name other files.")
        known = self.tokenizer is not None
        about = About(
            name=name,
            source=source,
            licence=licence,
            documents=totals["documents"],
            characters=totals["characters"],
            words=totals["words"],
            sentences=totals["sentences"],
            tokens=totals["tokens"] if known else None,
            tokenizer=(tokenizer_name or self.tokenizer.name_or_path) if known else None,
            tokenizer_sha256=tokenizer_fingerprint(self.tokenizer) if known else None,
            version=__version__,
        )
        grams = tracked(self.grams) if known else None
        tensors = self.statistics(slice(None), grams)
        if known:
            tensors |= entropies(self.grams[0]) or {}
            if "hazard" in tensors:
                there = np.maximum(self.sums["at_risk"].sum(0), 1)
                tensors["soft_hazard"] = _ratio(self.by_age @ tensors["sentence_end"].double().numpy(), there)
        return Target(about, tensors, self.noise(grams), tuple(warnings_of(self, tensors)))


def build(
    documents: Iterable[str],
    tokenizer: Any = None,
    *,
    name: str,
    source: str = "",
    licence: str = "",
    tokenizer_name: str | None = None,
    seed: int = 0,
    whole: bool = True,
    tick: Callable[[int], None] | None = None,
) -> Target:
    """A Target of passages (see `passages`), streaming: the memory is that of the counts, about 170 V numbers and the
    different n-grams. tick: called with the characters of each passage once counted. seed: of the split into blocks.
    whole: see `Counts`."""
    counts, deal = Counts(tokenizer, whole), random.Random(seed)
    stream = iter(documents)
    while batch := list(islice(stream, _BATCH)):
        encodings = [None] * len(batch) if tokenizer is None else encode(tokenizer, batch)
        for text, encoding in zip(batch, encodings, strict=True):
            counts.add(text, deal.randrange(BLOCKS), encoding)
            if tick is not None:
                tick(len(text))
    return counts.target(name, source, licence, tokenizer_name)


def warnings_of(counts: Counts, tensors: dict[str, Tensor]) -> Iterator[str]:
    """What the corpus is too small for, with numbers."""
    total = {name: int(value.sum()) for name, value in counts.sums.items()}
    if total["documents"] < 2 * BLOCKS:
        yield f"noise: {total['documents']} passages, of {2 * BLOCKS} that halves need to say much"
    if total["sentences"] < 1000:
        yield f"sentence_words: {total['sentences']} sentences, of 1,000 that a histogram takes"
    if not total["windows"]:
        yield f"type_token_ratio: absent, no passage has {WINDOW} words"
    if counts.tokenizer is None:
        return
    once = int((counts.sums["unigram"].sum(0) == 1).sum())
    if once > 0.02 * total["tokens"]:  # Good-Turing: the share of the next text that is tokens never seen
        yield (
            f"unigram: {once:,} of {total['tokens']:,} tokens were seen once: about {once / total['tokens']:.1%} of "
            "such text is tokens that this corpus has not"
        )
    at_risk = counts.sums["at_risk"].sum(0)
    few = np.flatnonzero(at_risk < 100)
    if len(few):
        yield f"hazard: from age {few[0]} on it rests on fewer than 100 tokens"
    rare = [kind for kind, count in zip(CLASSES, counts.sums["punctuation"].sum(0), strict=True) if count < 100]
    if rare:
        yield f"punctuation_gap: fewer than 100 marks of {', '.join(rare)}"
    if "ngram_starts" not in tensors:
        yield "ngram_starts: absent, no n-gram was seen often enough"
    for counter in counts.grams:
        if counter.dropped:
            yield f"{counter.size}-grams: {counter.dropped:,} that were seen once were dropped on the way"
    if "entropy" not in tensors:
        yield "entropy: absent, no token has been seen often enough for what follows it"


def _tally(into: Any, values: Any) -> None:
    """Add a histogram of values, the last bin taking all above."""
    if len(values):
        into += np.bincount(np.minimum(values, len(into) - 1), minlength=len(into))


def _tally_open(sums: dict[str, Any], row: int, at: Any, size: int, first: int) -> None:
    """Of a text of `size` tokens and those `at` which it happens: how many tokens stand at each age, and how often it
    happens there. first: the age of the text's first token, GAPS for all before it has happened."""
    before = np.searchsorted(at, np.arange(size))  # how often
    ages = np.arange(size) - np.concatenate([[0], at + 1])[before]
    ages = np.minimum(ages, GAPS - 1)
    if first:
        ages[before == 0] = first
    _tally(sums["mark_risk"][row], ages)
    _tally(sums["mark_events"][row], ages[at])


def _shares(counts: Any) -> Tensor:
    return _ratio(counts, np.maximum(counts.sum(-1, keepdims=True), 1))


def _ratio(counts: Any, by: Any) -> Tensor:
    return torch.from_numpy(np.asarray(counts / by, np.float32))


def _moving_types(words: list[str]) -> tuple[int, int]:
    """Different words, summed over all windows of WINDOW words, and the windows."""
    if len(words) < WINDOW:
        return 0, 0
    held = Counter(words[:WINDOW])
    types = len(held)
    for at in range(WINDOW, len(words)):
        held[words[at]] += 1
        gone = words[at - WINDOW]
        held[gone] -= 1
        if not held[gone]:
            del held[gone]
        types += len(held)
    return types, len(words) - WINDOW + 1
