"""The refiner: the state of a text, read from its ids; potentials, of corpora whose odds are known; the step, as far as
its bound allows and no further; and towards the target, in text that a model draws."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from target_texts import WORDS, documents
from tiny_models import far, word_tokenizer

from dft_kernels.generation import potentials
from dft_kernels.generation.continued import Continued
from dft_kernels.generation.history import History
from dft_kernels.generation.refiner import IterativeRefiner
from dft_kernels.generation.sampling import continuations
from dft_kernels.generation.steps import Watch, ordered
from dft_kernels.targets import corpus
from dft_kernels.targets.punctuation import CLASSES
from dft_kernels.targets.target import Target


@pytest.fixture(scope="module")
def words() -> Any:
    return word_tokenizer(WORDS)


def corpus_of(words: Any, name: str, sentences: tuple[int, int], marks: str) -> Target:
    """Sentences of so many words, each ended by one of `marks`."""
    generator = random.Random(name)

    def sentence() -> str:
        length = generator.randint(*sentences)
        return "The " + " ".join(f"word{generator.randrange(60)}" for _ in range(length)) + generator.choice(marks)

    texts = [" ".join(sentence() for _ in range(20)) for _ in range(60)]
    return corpus.build(texts, words, name=name)


@pytest.fixture(scope="module")
def pair(words: Any) -> tuple[Target, Target]:
    """target: short sentences and questions; native: longer ones."""
    return corpus_of(words, "short", (2, 8), "..?"), corpus_of(words, "long", (2, 20), "...!")


def test_history_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    members = torch.rand(50, 5, generator=generator) < 0.1
    special = [0, 49]
    members[special] = False
    ids = torch.randint(0, 50, (8, 30), generator=generator)
    ids[0, :25] = 0  # padding
    ids[1, :] = 0  # nothing but
    seen = History(members, special)(ids)
    for row, tokens in enumerate(ids.tolist()):
        begun = max((at + 1 for at, token in enumerate(tokens) if token in special), default=0)
        text = tokens[begun:]
        assert int(seen.tokens[row]) == len(text)
        for feature in range(5):
            places = [at for at, token in enumerate(text) if members[token, feature]]
            assert int(seen.counts[row, feature]) == len(places)
            assert bool(seen.met[row, feature]) == bool(places)
            assert int(seen.age[row, feature]) == len(text) - 1 - (places[-1] if places else -1)
    beyond = History(members, special)(torch.tensor([[99, 3]]))  # of a padded vocabulary
    assert int(beyond.tokens) == 2
    assert bool((beyond.counts[0] == members[3].long()).all())


def hazard_by_hand(texts: list[list[int]], marks: set[int], age: int) -> float:
    """How often a mark follows where `age` tokens stand behind the last one; age -1: where none stands yet."""
    events = risk = 0
    for ids in texts:
        last = -1
        for at, token in enumerate(ids):
            if (at - last - 1 if last >= 0 else -1) == age:
                risk += 1
                events += token in marks
            last = at if token in marks else last
    return events / risk


def test_open_gaps_are_counted_as_far_as_they_go(words: Any) -> None:
    """Cut off or not, texts of one kind have one hazard; whole gaps alone would make that of short ones too large."""
    texts = [text.split() for text in documents(80)]
    whole, short = (
        corpus.build([" ".join(text[:size]) for text in texts], words, name="made") for size in (10_000, 14)
    )
    question, comma = (1 + CLASSES.index(name) for name in ("question", "comma"))
    ids = [words(" ".join(text), add_special_tokens=False)["input_ids"] for text in texts]
    marks = {words.convert_tokens_to_ids("?")}
    for age, column in ((3, 3), (9, 9), (-1, -1)):
        assert float(whole["mark_hazard"][question, column]) == pytest.approx(hazard_by_hand(ids, marks, age), abs=1e-6)
    for one in (whole, short):
        assert torch.allclose(one["mark_risk"].sum(1), torch.ones(11))
    assert float(short["mark_hazard"][comma, 3]) == pytest.approx(float(whole["mark_hazard"][comma, 3]), abs=0.02)
    assert float(short["mark_hazard"][question, -1]) == pytest.approx(
        float(whole["mark_hazard"][question, -1]), abs=0.02
    )


def test_potentials_are_log_odds_ratios(pair: tuple[Target, Target]) -> None:
    target, native = pair
    found = potentials.ratios(target, native)
    assert not potentials.ratios(target, target).any()
    assert float(found.abs().max()) <= potentials.LIMIT

    def odds(one: Target, row: int, age: int) -> float:
        return float(one["mark_hazard"][row, age].double().logit())

    ends, question, exclamation = (potentials.NAMES.index(name) for name in ("sentence end", "question", "exclamation"))
    assert float(found[ends, 6]) > 0.5  # after "The" and 5 words a short sentence is likelier to end
    assert float(found[ends, 6]) == pytest.approx(odds(target, ends, 6) - odds(native, ends, 6), abs=0.5)  # pooled
    assert bool((found[question] > 0.5).all())
    assert bool((found[exclamation] < -0.5).all())


def test_size_is_no_style(pair: tuple[Target, Target]) -> None:
    """The same statistics of a smaller corpus ask for nothing."""
    small = replace(pair[0], about=replace(pair[0].about, tokens=2000))
    assert not potentials.ratios(pair[0], small).any()


def test_sentences_that_began_before_the_text(words: Any) -> None:
    """Continuations begin inside a sentence: their ages are known from the first end on."""
    texts = [text.split() for text in documents(80)]
    whole, inside, wrong = (
        corpus.build([" ".join(text[cut:]) for text in texts], words, name="made", whole=whole)
        for cut, whole in ((0, True), (6, False), (6, True))
    )
    ages = slice(2, 5)
    least = [float(one["mark_hazard"][0, ages].mean()) for one in (whole, inside, wrong)]
    assert least[0] == pytest.approx(least[1], abs=0.005)
    assert abs(least[2] - least[0]) > 0.015
    assert torch.equal(inside["mark_hazard"][1:], wrong["mark_hazard"][1:])


def test_sentences_that_the_end_of_a_text_cuts_off(words: Any) -> None:
    """Their last token ends no sentence, and nor do words that no mark closes become one."""
    texts = [text.split() for text in documents(80)]
    whole, cut, wrong = (
        corpus.build([" ".join(text[:to]) for text in texts], words, name="made", whole=known)
        for to, known in ((None, True), (-3, False), (-3, True))
    )
    odds = [float(one["mark_hazard"][0, 2:5].mean()) for one in (whole, cut, wrong)]
    assert odds[1] == pytest.approx(odds[0], abs=0.01)
    assert odds[2] - odds[0] > 0.01
    assert (whole.about.sentences, cut.about.sentences, wrong.about.sentences) == (480, 400, 480)
    closed = corpus.build([" ".join(text) for text in texts], words, name="made", whole=False)
    assert closed.about.sentences == 480


def test_text_like_the_targets_asks_for_nothing(words: Any, pair: tuple[Target, Target]) -> None:
    """What the text so far adds, in the limit of a text that has what the target has."""
    target = pair[0]
    refiner = IterativeRefiner(target, words, bound=1.0)
    counts = (potentials.features(target) >= 0.5).float().t() @ target["unigram"]
    seen = History(potentials.features(target) >= 0.5, words.all_special_ids)(torch.full((1, 4), 20))
    much = seen._replace(counts=1e6 * counts[None], tokens=torch.tensor([[1e6]]))
    assert float(refiner._deltas(much).abs().max()) < 1e-4


def test_a_target_that_was_built_before_has_its_whole_gaps(pair: tuple[Target, Target]) -> None:
    target, native = pair
    before = {name: tensor for name, tensor in target.tensors.items() if not name.startswith("mark_")}
    old = replace(target, tensors=before)
    new, found = potentials.ratios(target, native), potentials.ratios(old, native)
    ends = potentials.NAMES.index("sentence end")
    assert torch.allclose(found[ends, :8], new[ends, :8], atol=0.1)
    assert float(found[potentials.NAMES.index("question"), -1]) > 0.5


def kl(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    q, p = q.double(), p.double().log_softmax(-1)
    return torch.where(q > -math.inf, q.exp() * (q - p), 0.0).sum(-1)


@pytest.mark.parametrize("bound", [0.001, 0.02, 0.1, 1.0])
def test_as_far_as_the_bound_allows(words: Any, pair: tuple[Target, Target], bound: float) -> None:
    scores = 2 * torch.randn(64, len(words))
    scores[:8, 20:] = -math.inf
    ids = torch.randint(3, len(words), (64, 40))
    refiner, free = (IterativeRefiner(*pair[:1], words, pair[1], bound=b) for b in (bound, 50.0))
    made, whole = refiner(ids, scores), free(ids, scores)
    spent, most = kl(made, scores), kl(whole, scores)
    assert float(spent.max()) <= bound + 1e-5
    cut = most > bound * 1.01
    assert bool(cut.any()) or bound == 1.0
    assert bool((spent[cut] >= 0.99 * bound).all())  # no less than it may
    assert torch.allclose(made[~cut], whole[~cut], atol=2e-2)
    assert torch.equal(made == -math.inf, scores == -math.inf)
    assert torch.allclose(made.logsumexp(-1), torch.zeros(64), atol=1e-5)
    report = refiner.report()
    assert report.tokens == 64
    assert report.kl == pytest.approx(float(spent.mean()), abs=1e-4)
    assert report.bounded == pytest.approx(float(cut.float().mean()), abs=0.05)


def test_goals_that_tokens_share_are_reached_together(
    words: Any, pair: tuple[Target, Target], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Odds that some tilt of q_0 has are those that mirror descent comes to, though a full stop ends a sentence too."""
    refiner = IterativeRefiner(pair[0], words, pair[1], bound=50.0, steps=400)
    scores, ids = torch.randn(32, len(words)), torch.randint(3, len(words), (32, 30))
    features = potentials.features(pair[0]).double()
    wanted = scores.double() + torch.randn(32, potentials.F).double().clamp(-1, 1) @ features.t()
    before, goal = (x.double().softmax(-1) @ features for x in (scores, wanted))
    there = before.amax(0) > 0
    deltas = torch.where(there, goal.logit() - before.logit(), 0.0).float()
    monkeypatch.setattr(refiner, "_deltas", lambda ids: deltas)
    after = refiner(ids, scores).double().softmax(-1) @ features
    assert int(there.sum()) > 3
    assert float((after - goal)[:, there].abs().max()) < 0.01 < float((before - goal).abs().max()) / 5
    report = refiner.report()
    for name in potentials.NAMES:
        at = potentials.NAMES.index(name)
        assert report.before[name] == pytest.approx(float(before[:, at].mean()), abs=1e-4)
        assert report.after[name] == pytest.approx(float(after[:, at].mean()), abs=1e-4)


def test_a_text_with_too_much_of_a_mark_gets_less(words: Any, pair: tuple[Target, Target]) -> None:
    refiner = IterativeRefiner(pair[0], words, bound=1.0)  # no native: the text so far alone
    stop, word = words.convert_tokens_to_ids("."), words.convert_tokens_to_ids("word1")
    ids = torch.full((2, 60), word)
    ids[0, ::2] = stop
    scores = torch.zeros(2, len(words))
    made = refiner(ids, scores)[:, stop].exp() * len(words)
    assert float(made[0]) < 0.6
    assert float(made[1]) > 1.4


def test_padding_and_other_rows_change_nothing(words: Any, pair: tuple[Target, Target]) -> None:
    refiner = IterativeRefiner(pair[0], words, pair[1], bound=0.1)
    scores, ids = torch.randn(3, len(words)), torch.randint(3, len(words), (3, 20))
    ids[1, :12] = words.pad_token_id
    whole = refiner(ids, scores)
    for row, start in ((0, 0), (1, 12), (2, 0)):
        assert torch.allclose(refiner(ids[row : row + 1, start:], scores[row : row + 1])[0], whole[row], atol=1e-5)


@pytest.mark.parametrize("more", [{}, {"pad_token": "late"}])
def test_padding_without_an_end_of_text(words: Any, more: dict[str, str]) -> None:
    """`roll_out` pads with the model's own end, or with the id 0, which may stand in a text too, and never asks what
    the tokenizer pads with."""
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=words.backend_tokenizer, **more)
    assert len(bare.all_special_ids) == len(more)
    target, native = corpus_of(bare, "short", (2, 8), "..?"), corpus_of(bare, "long", (2, 20), "...!")
    given, ids = torch.randn(1, len(bare)), torch.randint(3, len(bare), (1, 9))
    ids[0, 4] = 0
    for ends, pad in (((), 0), ((1,), 1)):
        step = IterativeRefiner(
            target, bare, native, bound=5.0, towards=("sentences", "punctuation", "tokens"), ends=ends
        )
        padded = torch.cat([torch.full((1, 30), pad), ids], 1)
        assert torch.equal(step(padded, given), step(ids, given))
        assert not torch.equal(step(torch.cat([ids, ids], 1), given), step(ids, given))
        step.reset()
        step(torch.tensor([[5, pad]]), given)
        assert step.report().tokens == (pad == 0)  # after its end a text has no more draws


def test_ngrams_that_both_track(words: Any) -> None:
    """By context of one token and of two, the latter before the former, of text alone."""
    generator = random.Random(0)

    def text(likely: float) -> str:  # behind "dog sat" comes "far", or "late"; behind "cat sat" another share
        draws = []
        for _ in range(60):
            who = generator.choice(["dog", "cat"])
            far = generator.random() < (likely if who == "dog" else 0.5)
            draws.append(f"The {who} sat {'far' if far else 'late'} .")
        return " ".join(draws)

    target, native = (
        corpus.build([text(likely) for _ in range(40)], words, name=name) for name, likely in (("a", 0.8), ("b", 0.2))
    )
    the, dog, cat, sat, far, late = (
        words.convert_tokens_to_ids(word) for word in ("The", "dog", "cat", "sat", "far", "late")
    )
    found = Continued(target, native, torch.tensor(sorted([dog, far, late])))
    at = {token: n for n, token in enumerate(sorted([dog, far, late]))}
    ids = torch.tensor([[the, dog, sat], [the, cat, sat], [dog, 0, sat], [the, the, late], [0, 0, the]])
    made = found(ids, torch.tensor([[1, 1, 1], [1, 1, 1], [0, 0, 1], [1, 1, 1], [0, 0, 1]]).bool())

    def odds(p: float, q: float) -> float:
        return math.log(p / (1 - p)) - math.log(q / (1 - q))

    assert float(made[0, at[far]]) == pytest.approx(2.0, abs=0.01)  # of 2.8: the limit
    assert float(made[0, at[late]]) == pytest.approx(-2.0, abs=0.01)
    assert abs(float(made[1, at[far]])) < 0.3
    assert float(made[2, at[far]]) == pytest.approx(odds(0.65, 0.35), abs=0.3)  # behind "sat" alone
    assert not made[3].any()  # nothing is tracked behind it but "."
    assert abs(float(made[4, at[dog]])) < 0.2


def test_token_frequencies(words: Any) -> None:
    """A word that the target has more often than the model becomes likelier, and one that the text has too often less
    likely; of marks nothing changes but by what sums to 1."""
    more, less = (
        corpus.build([text.replace("word1 ", word) for text in documents(80)], words, name=name)
        for name, word in (("dogs", "dog "), ("cats", "cat "))
    )
    dog, cat, late = (words.convert_tokens_to_ids(word) for word in ("dog", "cat", "late"))
    refiner = IterativeRefiner(more, words, less, bound=1.0, towards=("tokens",))
    scores, ids = torch.zeros(2, len(words)), torch.full((2, 40), dog)
    ids[1] = late
    made = refiner(ids, scores).exp() * len(words)
    assert float(made[1, dog]) > 3 > 0.5 > float(made[1, cat])
    assert float(made[0, dog]) < 0.6 * float(made[1, dog])
    comma, stop = (words.convert_tokens_to_ids(mark) for mark in ",.")
    assert float(made[1, comma]) == pytest.approx(float(made[1, stop]), rel=1e-4)
    ngrams = IterativeRefiner(more, words, less, bound=1.0, towards=("sentences", "punctuation", "tokens", "ngrams"))
    assert torch.allclose(ngrams(ids, scores).logsumexp(-1), torch.zeros(2), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_model_writes_more_like_the_target(words: Any, pair: tuple[Target, Target]) -> None:
    """Of a model that draws all words alike, towards its own corpus: what was measured of it comes to the target's."""
    model, prompts = far(vocab_size=len(words)), [[3]] * 200
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token is as likely as any
    target = pair[0]
    plain = continuations(model, words, prompts, 60, seed=1)
    native = corpus.build([words.decode(ids) for ids in plain], words, name="native")
    watch, refiner = Watch(), IterativeRefiner(target, words, native, bound=0.5)
    made = continuations(model, words, prompts, 60, seed=1, logits_processor=watch.around(ordered([refiner])))
    found = corpus.build([words.decode(ids) for ids in made], words, name="refined")
    report = refiner.report()
    special = {*words.all_special_ids}  # which this model draws as it does any; nothing is refined after one
    draws = [[3, *ids][: min(60, len(ids) + 1)] for ids in made]
    assert report.tokens == sum(token not in special for before in draws for token in before)
    for at, name in enumerate(potentials.NAMES):
        goal, before, after = (float(potentials.rates(one)[at]) for one in (target, native, found))
        if abs(goal - before) > 0.01:
            assert abs(goal - after) < 0.7 * abs(goal - before), name
            assert abs(report.after[name] - goal) < abs(report.before[name] - goal), name
    assert max(float(one.max()) for one in watch.kl) <= 0.5 + 1e-4


def test_idle_and_repr(words: Any, pair: tuple[Target, Target]) -> None:
    scores = torch.randn(2, len(words))
    refiner = IterativeRefiner(pair[0], words)
    assert refiner(torch.zeros(2, 3, dtype=torch.int64), scores) is scores
    assert refiner.report().tokens == 0
    assert repr(refiner) == "IterativeRefiner(its own text -> short, KL <= 0 nats a token)"
    assert repr(IterativeRefiner(*pair[:1], words, pair[1], bound=0.1)).startswith("IterativeRefiner(long -> short")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"bound": -1}, "bound must be at least 0 nats, got -1"),
        ({"bound": math.nan}, "bound must be at least 0 nats, got nan"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"feedback": -1}, "feedback must be at least 0, got -1"),
        ({"towards": ("rhymes",)}, "towards must hold statistics of sentences, .*, got rhymes"),
        ({"towards": ()}, "towards must hold statistics of .*, got none"),
        ({"towards": ("ngrams",)}, "native must be there for ngrams, got none"),
    ],
)
def test_wrong_settings(words: Any, pair: tuple[Target, Target], more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IterativeRefiner(pair[0], words, **more)


def test_wrong_targets(words: Any, pair: tuple[Target, Target]) -> None:
    other = word_tokenizer([*WORDS, "more"])
    with pytest.raises(ValueError, match="target must be of the model's tokenizer, got short"):
        IterativeRefiner(pair[0], other)
    with pytest.raises(ValueError, match="native must be of the model's tokenizer, got alone, of text alone"):
        IterativeRefiner(pair[0], words, corpus.build(documents(10), name="alone"))
    refiner = IterativeRefiner(pair[0], words, bound=0.1)
    with pytest.raises(ValueError, match=r"target must be of the model's 10 tokens, got 79"):
        refiner(torch.zeros(1, 3, dtype=torch.int64), torch.randn(1, 10))
