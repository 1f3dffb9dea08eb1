"""Log-likelihoods against full logits, one choice at a time; the harness's formulas; answers that are gone on with."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import far as tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from dft_kernels.evaluation import choices, retention
from dft_kernels.evaluation.choices import Answer, log_likelihoods
from dft_kernels.evaluation.results import Accuracy
from dft_kernels.materials import questions
from dft_kernels.materials.questions import Question

ASKED = [
    Question("Question: what is it?\nAnswer:", ("a cat", "a dog that barks", "it", "a bird"), 1),
    Question("A man sits. He", ("is up.", " and two spaces", "walks to the dog."), 0),
    Question("It ends in spaces  ", ("a", "two words"), 1),
    Question("A dog sits. He", ("is up.", "barks."), 1),
    Question("It", ("is", "was a cat", "barks", "sits up"), 2),
    Question("The last word of it is a", ("bird",), 0),
]
PAIRS = [(one.context, one.choices) for one in ASKED]


@pytest.fixture(scope="module")
def pieces() -> Any:
    """A tokenizer of bytes and pieces, in which a choice's encoding depends on what stands before it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    texts = [f"{context} {choice}" for context, several in PAIRS for choice in several]
    core.train_from_iterator(texts * 3, trainers.BpeTrainer(vocab_size=98, special_tokens=["<s>", "</s>"]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def by_logits(model: Any, tokenizer: Any, pairs: list[Any] = PAIRS, most: int = 64) -> list[Answer]:
    """As the harness does it: a choice at a time, from all of its logits."""
    found = []
    for number, (context, several) in enumerate(pairs):
        sums, greedy = [], []
        for choice in several:
            text = f"{context} {choice}"
            before = tokenizer(context.rstrip())["input_ids"]
            ids = tokenizer(text)["input_ids"]
            new = ids[len(before) :]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids[-(most + 1) : -1]])).logits[0, -len(new) :].double()
            log_q = logits.log_softmax(-1)
            sums.append(float(log_q.gather(1, torch.tensor(new)[:, None]).sum()))
            greedy.append(logits.argmax(-1).tolist() == new)
        found.append(Answer(number, sums, greedy))
    return found


def collected(*given: Any) -> list[Answer]:
    return sorted(answer for batch in log_likelihoods(*given) for answer in batch)


def same(found: list[Answer], expected: list[Answer]) -> None:
    assert [one.number for one in found] == [one.number for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.log_likelihoods == pytest.approx(theirs.log_likelihoods, rel=1e-5, abs=1e-5)
        assert ours.greedy == theirs.greedy


KINDS: dict[str, tuple[dict[str, Any], bool]] = {  # and whether the choices share their context's cache
    "llama": ({}, True),
    "gpt2": ({}, True),
    "opt": ({}, True),
    "gemma2": ({"final_logit_softcapping": 5.0, "sliding_window": 4}, True),
    "mamba": ({}, False),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [8192, 1])
def test_log_likelihoods_are_those_of_full_logits(pieces: Any, kind: str, tokens: int) -> None:
    sizes, shares = KINDS[kind]
    model = tiny(kind, **sizes)
    layer = model.get_output_embeddings()
    assert (choices._cache_argument(model, layer) is not None) == shares
    model.train()
    same(collected(model, pieces, PAIRS, tokens), by_logits(model.eval(), pieces))


def test_the_mode_is_left_and_nothing_holds_all_logits(pieces: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny().train()
    rows = []
    loss = choices.linear_distribution_loss

    def counted(hidden: torch.Tensor, **given: Any) -> Any:
        rows.append((given["target"] != -100).sum().item())
        return loss(hidden, **given)

    monkeypatch.setattr(choices, "linear_distribution_loss", counted)
    answers = collected(model, pieces, PAIRS)
    assert model.training
    assert len(answers) == len(ASKED)
    length = {pair: len(pieces(f"{pair[0]} {pair[1]}")["input_ids"]) for pair in _pairs()}
    before = {context: len(pieces(context.rstrip())["input_ids"]) for context, _ in PAIRS}
    assert sum(rows) == sum(length[pair] - before[pair[0]] for pair in _pairs())  # the choices' tokens alone


def _pairs() -> list[tuple[str, str]]:
    return [(context, choice) for context, several in PAIRS for choice in several]


def test_a_context_that_is_too_long_loses_its_beginning(pieces: Any) -> None:
    """By as much as each choice needs; all parts of a question come out as one answer."""
    model = tiny(max_position_embeddings=24)
    context = "A man sits. He walks to the dog that barks. It was a cat that sits"
    pairs = [(context, ("is up.", "a dog that barks", "it")), *PAIRS]
    assert len(pieces(context)["input_ids"]) > 24
    lengths = [len(part.context) for part in choices._encoded(model, pieces, 0, *pairs[0])]
    assert len(set(lengths)) == 3
    same(collected(model, pieces, pairs), by_logits(model, pieces, pairs, 24))
    with pytest.raises(ValueError, match=r"retention: choice 1 of question 0 must be of 1 to 24 tokens, got \d+\."):
        collected(model, pieces, [("A", ("a", context * 2))])
    with pytest.raises(ValueError, match="retention: context 0 must hold a token, got ' '"):
        collected(model, pieces, [(" ", ("a",))])


class _Numbers:
    """A tokenizer of numbers, so that any token can be asked for."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def test_greedy_is_what_the_model_would_write() -> None:
    model = tiny()
    with torch.no_grad():
        first = int(model(input_ids=torch.tensor([[3, 4]])).logits[0, -1].argmax())
        second = int(model(input_ids=torch.tensor([[3, 4, first]])).logits[0, -1].argmax())
    other = (second + 1) % 90 + 3
    (answer,) = collected(
        model, _Numbers(), [("3 4", (f"{first}", f"{first} {second}", f"{first} {other}", f"{other}"))]
    )
    assert answer.greedy[:3] == [True, True, other == second]
    assert answer.log_likelihoods[0] == max(answer.log_likelihoods)


# ---- rows and their file


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Question]]:
    """Two small tasks in place of two large ones."""
    tasks = {"arc_easy": ASKED[:5], "lambada": [Question(one.context, one.choices[:1], 0) for one in ASKED]}
    for name, its in tasks.items():
        monkeypatch.setitem(questions.TASKS, name, lambda _, its=its: its)
    return tasks


@pytest.fixture
def asking(pieces: Any, tmp_path: Path, asked: Any) -> Any:
    def run(model: Any, file: str = "answers.jsonl", **more: Any) -> list[Accuracy]:
        given = {"model_name": "tiny", "batch_tokens": 48, **more}
        tasks = given.pop("tasks", ["lambada", "arc_easy"])
        return retention.retention(model, pieces, tasks, tmp_path, tmp_path / file, **given)

    return run


def test_rows_are_by_the_harnesss_formulas(asking: Any, asked: dict[str, list[Question]], pieces: Any) -> None:
    model, rows = tiny(), []
    for task, its in asked.items():
        answers = by_logits(model, pieces, [(one.context, one.choices) for one in its])
        acc, acc_norm = [], []
        for one, answer in zip(its, answers, strict=True):
            sums = torch.tensor(answer.log_likelihoods, dtype=torch.float64)
            lengths = torch.tensor([float(len(choice)) for choice in one.choices])
            acc.append(int(sums.argmax()) == one.gold if task == "arc_easy" else answer.greedy[0])
            acc_norm.append(int((sums / lengths).argmax()) == one.gold)
        share = sum(acc) / len(acc)
        error = math.sqrt(share * (1 - share) / len(acc))
        normalised = sum(acc_norm) / len(acc) if task == "arc_easy" else None
        rows.append(Accuracy(task, len(its), len(its), share, error, normalised))
    assert asking(model, tasks=list(asked)) == rows


def test_length_is_in_characters_without_the_space() -> None:
    one = Question("", ("ab", "äöü", "long one"), 1)
    answers = {0: ([-2.0, -2.9, -9.0], [False] * 3)}  # by characters -1, -0.97, -1.1; by bytes -1, -0.48, -1.1
    assert retention.accuracy_of("arc_easy", [one], answers) == Accuracy("arc_easy", 1, 1, 0.0, 0.0, 1.0)
    answers = {0: ([-2.0, -3.0, -7.9], [False] * 3)}  # with the space: -0.67, -0.75, -0.88
    assert retention.accuracy_of("arc_easy", [one], answers).normalised == 0.0
    word = Question("", ("word",), 0)
    answers = {0: ([-9.0], [True]), 1: ([-1.0], [False])}
    assert retention.accuracy_of("lambada", [word, word], answers) == Accuracy("lambada", 2, 2, 0.5, 0.125**0.5, None)


class Killed(Exception):  # noqa: N818 - as by a signal
    pass


def test_a_killed_run_asks_the_others_alone(asking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ticks = tiny(), []
    whole = asking(model, "whole.jsonl", tick=ticks.append)
    assert sum(ticks) == 11
    assert len(ticks) > 4

    def kill(_: int) -> None:
        ticks.pop()
        if not ticks:
            raise Killed

    del ticks[3:]
    with pytest.raises(Killed):
        asking(model, tick=kill)
    file = tmp_path / "answers.jsonl"
    file.write_bytes(file.read_bytes()[:-9])  # and while it wrote
    kept = file.read_bytes().rpartition(b"\n")[0].count(b"\n")
    assert 0 < kept < 6
    calls: list[int] = []
    ask = retention.log_likelihoods

    def counted(model: Any, tokenizer: Any, given: Any, tokens: int) -> Any:
        calls.append(len(given))
        return ask(model, tokenizer, given, tokens)

    monkeypatch.setattr(retention, "log_likelihoods", counted)
    assert asking(model) == whole
    assert calls == [6 - kept, 5]
    calls.clear()
    assert asking(model) == whole
    assert calls == [0, 0]
    found, expected = (
        sorted(
            map(json.loads, (tmp_path / name).read_text().splitlines()[1:]),
            key=lambda one: (one["task"], one["number"]),
        )
        for name in ("answers.jsonl", "whole.jsonl")
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.pop("log_likelihoods") == pytest.approx(theirs.pop("log_likelihoods"), abs=1e-5)
        assert ours == theirs


def test_fewer_questions_are_some_of_them(asking: Any, tmp_path: Path) -> None:
    orders = [retention.chosen("hellaswag", 1000, count, 0) for count in (10, 100)]
    assert set(orders[0]) < set(orders[1])
    assert orders[0] == sorted(orders[0]) == [112, 208, 247, 265, 346, 458, 570, 655, 939, 956]  # for ever
    assert orders[0] != retention.chosen("hellaswag", 1000, 10, 1)
    assert retention.chosen("hellaswag", 3, None, 0) == retention.chosen("hellaswag", 3, 5, 0) == [0, 1, 2]
    model = tiny()
    few = asking(model, count=3)
    assert [(row.questions, row.of) for row in few] == [(3, 6), (3, 5)]
    lines = (tmp_path / "answers.jsonl").read_bytes()
    asking(model, count=4)
    assert (tmp_path / "answers.jsonl").read_bytes().startswith(lines)  # what was answered is
    assert asking(model, count=3) == few
    assert retention.questions_asked(["lambada", "arc_easy", "other"], tmp_path, 5) == 10


def test_bad_answers_are_named(asking: Any, tmp_path: Path) -> None:
    model = tiny()
    asking(model)
    file = tmp_path / "answers.jsonl"
    header, first, *_ = file.read_text().splitlines(True)
    answer = json.loads(first)
    cases = {
        '{"format": "other"}\n': "format must be 'dft_kernels answers 1', got other",
        header + json.dumps({**answer, "task": "none"}) + "\n": r"line 2.task must be one of lambada, .*, got none",
        header + json.dumps({**answer, "number": 6}) + "\n": r"line 2.number must be below 6, got 6",
        header
        + json.dumps({**answer, "greedy": []})
        + "\n": r"line 2 must hold 1 log_likelihoods and greedy, got 1 and 0",
        header + json.dumps({**answer, "greedy": [1]}) + "\n": r"line 2.greedy\[0\] must be true or false",
    }
    for text, said in cases.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=f"retention: .*answers.jsonl: {said}"):
            asking(model)
        assert file.read_text() == text
    file.write_text(header + first)
    with pytest.raises(ValueError, match=r'model must be "tiny", as in the file, got "other". Name another folder'):
        asking(model, model_name="other")
    with torch.no_grad():
        model.model.embed_tokens.weight[30:] = torch.nan
    with pytest.raises(ValueError, match=r"model_sha256 must be"):
        asking(model)
    with pytest.raises(ValueError, match=r"retention: model must give log-likelihoods, got NaN at question \d"):
        asking(model, "other.jsonl")


def test_bad_arguments(asking: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"retention: tasks must be names, none of them twice, got \[\]"):
        asking(None, tasks=[])
    with pytest.raises(ValueError, match="none of them twice"):
        asking(None, tasks=["lambada", "lambada"])
    with pytest.raises(ValueError, match="retention: count must be at least 1, or None, got 0"):
        asking(None, count=0)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # not installed
    with pytest.raises(ValueError, match=r"retention: tasks must be of lambada, .* is not installed, got mmlu\. pip"):
        asking(None, tasks=["lambada", "mmlu"])
    assert not list(tmp_path.iterdir())


def test_other_tasks_are_the_harnesss(asking: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in of its interface, as version 0.4 has it."""
    model = tiny()

    def simple_evaluate(model: Any, tasks: list[str], limit: int | None, log_samples: bool) -> dict[str, Any]:
        given.append((model, tasks, limit))
        if tasks == ["unknown"]:
            raise KeyError("unknown")
        sizes = {"original": 50, "effective": limit or 50}
        return {
            "results": {
                "group": {"acc,none": 0.9},
                "piqa": {"alias": "piqa", "acc,none": 0.5, "acc_stderr,none": 0.1, "acc_norm,none": 0.6},
                "other": {"alias": "other", "acc,none": 0.2},
                "rouge": {"rouge1,none": 1.0},
            },
            "n-samples": dict.fromkeys(["rouge"] if tasks == ["rouge"] else ["piqa", "other", "rouge"], sizes),
        }

    class HFLM:
        def __init__(self, pretrained: Any, tokenizer: Any) -> None:
            self.pretrained = pretrained

    given: list[Any] = []
    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["lm_eval"].simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    sys.modules["lm_eval.models.huggingface"].HFLM = HFLM  # type: ignore[attr-defined]
    rows = asking(model, tasks=["group", "lambada"], count=4)
    assert rows[:2] == [Accuracy("piqa", 4, 50, 0.5, 0.25, 0.6), Accuracy("other", 4, 50, 0.2, 0.2, None)]
    assert [row.task for row in rows[2:]] == ["lambada"]
    assert [(one.pretrained, tasks, limit) for one, tasks, limit in given] == [(model, ["group"], 4)]
    with pytest.raises(
        ValueError, match=r"retention: tasks must be measured by an accuracy, got rouge with .*rouge1,none"
    ):
        asking(model, tasks=["rouge"])
    with pytest.raises(
        ValueError, match=r"retention: tasks must be some that .* can ask, got unknown: 'unknown'\. Check"
    ):
        asking(model, tasks=["unknown"])
