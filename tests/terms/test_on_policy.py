"""Terms of the model's own text: the gradient of a J of everything that it could write, by enumeration."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dft_kernels.terms import (
    AtMost,
    Delayed,
    Entropy,
    NGrams,
    OnPolicy,
    PunctuationRate,
    ReferenceKL,
    SentenceLength,
    TextMMD,
    TokenL2,
    UnigramKL,
    exact,
)
from dft_kernels.terms.split_half import split_half

V, H, L = 3, 2, 3  # tokens, hidden size, drawn at most after a prompt of one
END = 2
TEXTS = [list(text) for text in itertools.product(range(V), repeat=L)]
P = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
ENDS = torch.tensor([False, True, False])
HAZARD = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def said(target: Tensor) -> list[str]:
    """The texts of drawn tokens, as letters."""
    return ["".join("abc"[token] for token in row if token >= 0) for row in target.tolist()]


def letters(texts: Any) -> Tensor:
    """phi of a text that no row and no sum of rows knows: its first and last letter together, and its length."""
    pairs = [a + b for a in "abc" for b in "abc"]
    return torch.tensor([[*(float(text[0] + text[-1] == pair) for pair in pairs), len(text) / 3] for text in texts])


TERMS: dict[str, Any] = {
    "columns": lambda: 2.0 * TokenL2(P) + UnigramKL(P, "reverse"),
    "rates": lambda: PunctuationRate(torch.eye(V)[:, :2], torch.tensor([0.3, 0.1])),
    "text": lambda: (
        SentenceLength(ENDS, HAZARD, distance="squared", starts=True)
        + NGrams(torch.tensor([1, 0]), torch.tensor([0, 1]), torch.tensor([0.5, 0.3]), V)
    ),
    "entropy": lambda: Entropy(value=0.7),
    "reference": lambda: 0.5 * ReferenceKL(),
    "whole texts": lambda: (
        2.0 * TextMMD(letters, ["abc", "ab", "cab"])
        + AtMost(TextMMD(lambda texts: letters(texts)[:, :4], ["cc", "ab"]), bound=0.1, gain=0.1, start=0.3)
    ),
    "all": lambda: (
        TokenL2(P, squared=True)
        + 3.0 * SentenceLength(ENDS, HAZARD, distance="cramer", starts=True)
        + Entropy(value=0.7)
        + TextMMD(letters, ["abc", "ab", "cab"])
        + 0.3 * ReferenceKL()
        + 0.5 * TextMMD(lambda texts: letters(texts)[:, -1:], ["ab", "c"])
    ),
}


class Writer:
    """A model whose rows are known for every prefix of a prompt and up to two tokens."""

    def __init__(self, ends: bool) -> None:
        draw = torch.Generator().manual_seed(3)
        self.states = torch.randn(1 + V + V * V, H, generator=draw, dtype=torch.float64).requires_grad_()
        self.weight = torch.randn(V, H, generator=draw, dtype=torch.float64).requires_grad_()
        self.reference = torch.randn(1 + V + V * V, V, generator=draw, dtype=torch.float64)
        self.ends = ends

    def rows(self, text: list[int]) -> list[int]:
        """Which states the rows of a text have."""
        return [0, 1 + text[0], 1 + V + V * text[0] + text[1]]

    def batch(self, texts: list[list[int]]) -> dict[str, Any]:
        at = torch.tensor([self.rows(text) for text in texts])
        target = torch.tensor(texts)
        if self.ends:
            target = torch.where((target == END).cumsum(1) - (target == END).long() > 0, -100, target)
        ids = torch.tensor([[1, *text[:-1]] for text in texts])
        return {"hidden": self.states[at], "weight": self.weight, "target": target, "input_ids": ids, "at": at}

    def log_prob(self, batch: dict[str, Any], temperature: float = 1.0) -> Tensor:
        """[B, L] of the drawn tokens, 0 after the end."""
        log_q = (batch["hidden"] @ self.weight.t() / temperature).log_softmax(-1)
        labels = batch["target"]
        return torch.where(labels < 0, 0.0, log_q.gather(-1, labels.clamp(min=0)[..., None])[..., 0])

    def all_texts(self, temperature: float = 1.0) -> tuple[list[list[int]], Tensor]:
        """All texts that differ, and their probabilities, with a graph."""
        known = {tuple(self.batch([text])["target"][0].tolist()): text for text in TEXTS}
        texts = list(known.values())
        return texts, self.log_prob(self.batch(texts), temperature).sum(1).exp()

    def called(self, batch: dict[str, Any], terms: Any) -> dict[str, Any]:
        given = {name: value for name, value in batch.items() if name != "at"}
        more = {"texts": said(batch["target"])} if terms.reads else {}
        return {**given, **more, "teacher": self.reference[batch["at"]] if terms.divergence else None}


def moments_of_all(writer: Writer, own: OnPolicy, temperature: float = 1.0) -> Tensor:
    """E of the moments of a text, with a graph, by plain softmaxes."""
    from dft_kernels.terms.base import Statistics

    texts, chance = writer.all_texts(temperature)
    total: Any = 0
    for text, p in zip(texts, chance, strict=True):
        batch = writer.batch([text])
        log_q = (batch["hidden"] @ writer.weight.t() / temperature).log_softmax(-1)
        q, w = log_q.exp(), (batch["target"] != -100).double()
        features = None if own.terms.features is None else q @ own.terms.features.to_dense().double()
        log_r = (writer.reference[batch["at"]] / temperature).log_softmax(-1)
        seen = Statistics(
            batch["input_ids"], w, torch.einsum("bt,btv->v", w, q), features, -(q * log_q).sum(-1), None,
            (q * (log_q - log_r)).sum(-1), own.terms.reads(said(batch["target"])) if own.terms.reads else None,
            torch.ones(1, dtype=torch.float64),
        )  # fmt: skip
        total = total + p * own.terms.gathered(seen).flat()
    return total


def gradients(of: Tensor, writer: Writer) -> Tensor:
    found = torch.autograd.grad(of, (writer.states, writer.weight), allow_unused=True)
    return torch.cat([torch.zeros(0) if g is None else g.reshape(-1) for g in found])


def pairs(writer: Writer, temperature: float = 1.0) -> Iterator[tuple[list[list[int]], float]]:
    """All batches of two texts, and their probabilities: a batch in the other order is the same."""
    texts, chance = writer.all_texts(temperature)
    for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(texts), 2):
        yield [a, b], float(chance[i].detach() * chance[j].detach()) * (1 if i == j else 2)


CELLS = [*((name, ends, 1.0) for name in TERMS for ends in (False, True)), ("all", True, 0.6)]


# every term once, half of them with an end
@pytest.mark.kept(
    where=lambda name, ends, temperature: temperature != 1.0 or ends == (name in ("rates", "text", "all"))
)
@pytest.mark.parametrize(("name", "ends", "temperature"), CELLS)
def test_the_expected_gradient_is_that_of_all_it_could_write(name: str, ends: bool, temperature: float) -> None:
    """Over all pairs of texts, weighed by their chance: the estimate's mean is J's gradient, times E[W] E[1 / W]."""
    writer = Writer(ends)
    own = OnPolicy(TERMS[name](), temperature=temperature)
    whole = moments_of_all(writer, own, temperature)
    want = gradients(sum(own.terms.values(own.terms.split(whole))), writer)
    own.running = whole.detach()
    texts, chance = writer.all_texts(temperature)
    found = torch.zeros_like(want)
    for batch, p in pairs(writer, temperature):
        found += p * gradients(own.loss(**writer.called(writer.batch(batch), own.terms)).loss, writer)
    sizes = (writer.batch(texts)["target"] != -100).sum(1).double()
    scale = (chance * sizes).sum() * (chance / sizes).sum()
    torch.testing.assert_close(found, want * scale.detach(), rtol=1e-9, atol=1e-11)


def test_without_its_score_the_gradient_is_biased() -> None:
    """The option's name says so."""
    writer = Writer(False)
    biased = OnPolicy(3.0 * TERMS["text"]() + Entropy(value=0.7), biased_without_score=True)
    whole = moments_of_all(writer, biased)
    want = gradients(sum(biased.terms.values(biased.terms.split(whole))), writer)
    biased.running = whole.detach()
    found = torch.zeros_like(want)
    for batch, p in pairs(writer):
        found += p * gradients(biased.loss(**writer.called(writer.batch(batch), biased.terms)).loss, writer)
    assert float((found - want).norm() / want.norm()) > 0.01


def test_importance_weights_are_another_writers() -> None:
    """Texts of another writer, weighed, have the same expectation."""
    writer, other = Writer(False), Writer(False)
    other.weight = (other.weight.detach() * 0.7).requires_grad_()
    own = OnPolicy(TERMS["all"]())
    whole = moments_of_all(writer, own)
    want = gradients(sum(own.terms.values(own.terms.split(whole))), writer)
    own.running = whole.detach()
    found = torch.zeros_like(want)
    for texts, p in pairs(other):
        batch, drawn = writer.batch(texts), other.log_prob(other.batch(texts)).detach()
        loss = own.loss(**writer.called(batch, own.terms), sampled_log_prob=drawn, num_items=2 * L).loss
        found += p * gradients(loss, writer)
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-11)


def test_statistics_of_a_step_and_the_value() -> None:
    writer, own = Writer(True), OnPolicy(TERMS["all"](), decay=0.5)

    def run(of: OnPolicy) -> Any:
        batch = writer.batch([[0, 1, 2], [2, 0, 0], [1, 1, 1]])
        return of.loss(**writer.called(batch, of.terms))

    first = run(own)
    assert float(first.loss.detach()) == 0.0
    assert float(gradients(first.loss, writer).norm()) == 0.0
    own.update()
    twice = run(own)
    values = own.values()
    assert float(twice.loss.detach()) == pytest.approx(float(sum(values.values())))
    assert float(twice.terms["ReferenceKL"]) == pytest.approx(float(values["ReferenceKL"]))
    again = OnPolicy(TERMS["all"](), decay=0.5)
    again.load_state_dict(own.state_dict())
    a, b = (gradients(run(each).loss, writer) for each in (own, again))
    assert torch.equal(a, b)


ERRORS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "one text": (lambda: TokenL2(P), {}, "two sequences or more"),
    "no reference": (ReferenceKL, {"teacher": None}, "be the reference of a ReferenceKL, got None"),
    "a reference": (lambda: TokenL2(P), {"teacher": torch.zeros(2, L, V)}, "be None without a ReferenceKL"),
    "calibration": (lambda: Entropy(calibration=True), {}, "be without calibration on the model's own text"),
    "no target": (lambda: TokenL2(P), {"target": None}, "be the tokens that were drawn, got None"),
    "weight 0": (lambda: TokenL2(P), {"row_weight": torch.zeros(2, L, dtype=torch.float64)}, "be above 0 where"),
    "log_prob": (lambda: TokenL2(P), {"sampled_log_prob": torch.zeros(2)}, r"be a tensor \[2, 3\], got \[2\]"),
    "potential": (lambda: TokenL2(P), {"potential": P}, "be left out"),
    "no texts": (lambda: TextMMD(letters, ["ab"]), {"texts": None}, "be what was drawn, for a TextMMD, got None"),
    "texts": (lambda: TokenL2(P), {"texts": ["ab", "c"]}, "be None without a TextMMD, got 2 texts"),
    "fewer texts": (lambda: TextMMD(letters, ["ab"]), {"texts": ["ab"]}, "one for each of 2 sequences, got 1 of them"),
    "a text": (lambda: TextMMD(letters, ["ab"]), {"texts": "ab"}, "one for each of 2 sequences, got one text"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    term, more, message = ERRORS[name]
    writer, own = Writer(False), OnPolicy(term())
    texts = [[0, 1, 1]] if name == "one text" else [[0, 1, 1], [2, 0, 1]]
    given = {**writer.called(writer.batch(texts), own.terms), **more}
    with pytest.raises((ValueError, TypeError), match=f"OnPolicy: .*{message}"):
        own.loss(**given)
    assert own.pending is None


@pytest.mark.parametrize(("reads", "human", "message"), [
    (letters, [], "human must be texts, one at least, got list of none"),
    (letters, "ab", "human must be texts, one at least, got one text"),
    (lambda texts: [1.0] * len(texts), ["a"], r"phi must be a floating tensor \[1, R\], got list"),
    (lambda texts: torch.ones(len(texts), 2, dtype=torch.int64), ["a"], "got torch.int64"),
    (lambda texts: torch.ones(1, 2), ["a", "b"], r"phi must have shape \[2, R\], got \[1, 2\]"),
    (lambda texts: torch.ones(len(texts)), ["a"], r"phi must have shape \[1, R\], got \[1\]"),
    (lambda texts: torch.full((len(texts), 2), float("nan")), ["a"], "phi must be finite"),
])  # fmt: skip
def test_errors_of_whole_texts(reads: Any, human: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=f"TextMMD: .*{message}"):
        TextMMD(reads, human)


def test_what_reads_texts_says_the_same_of_as_much() -> None:
    term = TextMMD(lambda texts: torch.ones(len(texts), len(texts)), ["a", "b"])
    with pytest.raises(ValueError, match=r"TextMMD: phi must have shape \[3, 2\], got \[3, 3\]"):
        term.reads(["a", "b", "c"])
    with pytest.raises(ValueError, match="biased_without_score must be False with a TextMMD, which is all score"):
        OnPolicy(term, biased_without_score=True)


def test_a_reference_is_of_own_text_alone() -> None:
    writer = Writer(False)
    batch = writer.batch([[0, 1, 1], [2, 0, 1]])
    given = {name: batch[name] for name in ("hidden", "weight", "target", "input_ids")}
    terms = {"ReferenceKL, which is of the model's own text": ReferenceKL(),
             "TextMMD, which is of texts of the model's own": TextMMD(letters, ["ab"])}  # fmt: skip
    for message, term in terms.items():
        for run in (exact, lambda term, **given: Delayed(term).loss(**given)):
            with pytest.raises(ValueError, match=f"be without a {message}"):
                run(**given, term=term)
    with pytest.raises(ValueError, match="temperature must be a number above 0, got 0"):
        OnPolicy(TokenL2(P), temperature=0)


def test_split_half_is_the_cosine() -> None:
    draw = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 5, generator=draw)
    x = torch.zeros(5, requires_grad=True)
    frozen = torch.zeros(5)
    found = split_half([x, frozen], (lambda: (a * x).sum(), lambda: (b * x).sum()))
    assert found == pytest.approx(float(torch.cosine_similarity(a, b, 0)))
    assert torch.allclose(x.grad, a + b)
    assert split_half([x], (lambda: (a * x).sum(), lambda: (b * x).sum())) is None  # something was there
    assert torch.allclose(x.grad, 2 * (a + b))
    x.grad = None
    assert split_half([x], (lambda: 0 * x.sum(), lambda: (b * x).sum())) is None
