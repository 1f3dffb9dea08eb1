"""What a model still knows: the share of right answers to questions that other models are measured by.

    accuracy    of choices: the right one has the largest log-likelihood (acc of lm-evaluation-harness);
                of LAMBADA: every token of the last word is the likeliest, as greedy decoding would write it
    normalised  of choices: the right one has the largest log-likelihood a character of the choice, without the space
                before it (acc_norm)
    error       sqrt(accuracy * (1 - accuracy) / questions)

Without examples, by `choices.log_likelihoods`. Answers are kept in a file, a line a question, and a run that was killed
asks the others alone. Tasks of another name are left to lm-evaluation-harness itself, where that is installed.
"""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import fail
from ..files import Source
from ..generation.journal import Journal
from ..materials.questions import TASKS, Question, questions
from ..store.fingerprint import model_fingerprint, tokenizer_fingerprint
from .choices import log_likelihoods
from .results import Accuracy

FORMAT = "dft_kernels answers 1"
ANSWERS = "answers.jsonl"  # usual name of the file
Answers = dict[int, tuple[list[float], list[bool]]]  # by question: log-likelihoods, greedy


@dataclass(frozen=True)
class Header:
    """What the answers of a file depend on."""

    format: str
    model: str
    model_sha256: str
    tokenizer_sha256: str
    versions: dict[str, str]  # told alone: answers of others differ by rounding


@dataclass(frozen=True)
class _Line:
    """The answer to question `number` of a task: of each choice."""

    task: str
    number: int
    log_likelihoods: list[float]
    greedy: list[bool]


def retention(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    cache: Path,
    file: Path,
    *,
    model_name: str,
    count: int | None = None,
    seed: int = 0,
    batch_tokens: int = 8192,
    tick: Callable[[int], None] | None = None,
) -> list[Accuracy]:
    """The accuracy of a causal LM in each task.

    tasks: names of `materials.questions.TASKS` (lambada, hellaswag, arc_easy, arc_challenge), whose questions are
        fetched once into `cache`; any other is asked for from lm-evaluation-harness (`pip install lm-eval`), with its
        own settings, its first `count` questions, and nothing kept.
    file: JSON lines of answers, which is gone on with; of another model it is not touched.
    count: questions of a task; None, all. seed: which, the same for every model; those of a smaller count are among
        those of a larger one, and a file serves any.
    tick: called with the number of questions (of our tasks) answered more, those of an earlier run too.

    Errors: ValueError, by argument or by file and line. Cost: one forward pass over contexts and choices, see
    `choices.log_likelihoods`; `questions_asked` tells how many questions there will be.
    """
    check(tasks, count)
    asked = {task: questions(task, cache) for task in tasks if task in TASKS}
    found = _answered(model, tokenizer, asked, file, model_name, count, seed, batch_tokens, tick) if asked else {}
    others = [task for task in tasks if task not in TASKS]
    foreign = _by_harness(model, tokenizer, others, count) if others else {}
    return [row for task in tasks for row in ([found[task]] if task in found else foreign[task])]


def questions_asked(tasks: Iterable[str], cache: Path, count: int | None = None) -> int:
    """How many questions `retention` asks of our tasks."""
    sizes = [len(questions(task, cache)) for task in tasks if task in TASKS]
    return sum(size if count is None else min(size, count) for size in sizes)


def check(tasks: Sequence[str], count: int | None) -> None:
    """ValueError for what `retention` does not take, before anything is fetched or read."""
    if not tasks or len(set(tasks)) < len(tasks):
        fail("retention", "tasks", "be names, none of them twice", list(tasks), f"Choose of {', '.join(TASKS)}")
    if count is not None and count < 1:
        fail("retention", "count", "be at least 1, or None", count, "Ask some")
    others = [task for task in tasks if task not in TASKS]
    if others:
        _harness(others)


def chosen(task: str, size: int, count: int | None, seed: int) -> list[int]:
    """The numbers of `count` of a task's questions, in the order of a hash that no version of a library changes."""
    if count is None or count >= size:
        return list(range(size))
    order = sorted(range(size), key=lambda number: hashlib.sha256(f"{seed} {task} {number}".encode()).digest())
    return sorted(order[:count])


def accuracy_of(task: str, asked: Sequence[Question], answers: Answers) -> Accuracy:
    """The row of a task, of the questions `answers` has by number."""
    right = normalised = 0
    for number, (sums, greedy) in answers.items():
        one = asked[number]
        if len(one.choices) == 1:
            right += greedy[0]
            continue
        each = range(len(sums))
        right += max(each, key=lambda choice: sums[choice]) == one.gold
        lengths = [max(1, len(choice)) for choice in one.choices]
        normalised += max(each, key=lambda choice: sums[choice] / lengths[choice]) == one.gold
    count = len(answers)
    share, several = right / count, len(asked[0].choices) > 1
    return _row(task, count, len(asked), share, normalised / count if several else None)


def _row(task: str, count: int, of: int, share: float, normalised: float | None) -> Accuracy:
    """With its standard error."""
    return Accuracy(task, count, of, share, math.sqrt(share * (1 - share) / count), normalised)


def answered(tasks: Sequence[str], cache: Path, file: Path, count: int | None = None, seed: int = 0) -> list[Accuracy]:
    """The rows of our tasks out of a file of answers alone, without the model: of those questions that `retention`
    would ask and that the file answers. ValueError, by file and line, for a file that it did not write."""
    asked, found = _of_file(tasks, cache, file, count, seed)
    return [accuracy_of(task, asked[task], answers) for task, answers in found.items() if answers]


def right(
    tasks: Sequence[str], cache: Path, file: Path, count: int | None = None, seed: int = 0
) -> dict[str, dict[int, bool]]:
    """Of the same file, by task and question, whether the answer is right: what is counted in `Accuracy.accuracy`."""
    asked, found = _of_file(tasks, cache, file, count, seed)
    return {
        task: {at: accuracy_of(task, asked[task], {at: answer}).accuracy == 1.0 for at, answer in answers.items()}
        for task, answers in found.items()
    }


def _of_file(
    tasks: Sequence[str], cache: Path, file: Path, count: int | None, seed: int
) -> tuple[dict[str, list[Question]], dict[str, Answers]]:
    """The questions of our tasks, and the answers that a file has to those which `retention` would ask."""
    asked = {task: questions(task, cache) for task in tasks if task in TASKS}
    known = _known(Journal.read(Source("retention", file, "Ask again", "Ask first")), asked)
    numbers = {task: chosen(task, len(its), count, seed) for task, its in asked.items()}
    return asked, {
        task: {at: known[task, at] for at in those if (task, at) in known} for task, those in numbers.items()
    }


def _answered(
    model: Any,
    tokenizer: Any,
    asked: dict[str, list[Question]],
    file: Path,
    model_name: str,
    count: int | None,
    seed: int,
    batch_tokens: int,
    tick: Callable[[int], None] | None,
) -> dict[str, Accuracy]:
    """The rows of our tasks."""
    header = {
        "format": FORMAT,
        "model": model_name,
        "model_sha256": model_fingerprint(model),
        "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    journal = Journal.begin(Source("retention", file, "Delete it and ask again, or name another folder"), header)
    known = _known(journal, asked)
    journal.check(header, ("versions",))
    journal.keep(len(journal.lines))
    rows = {}
    for task, its in asked.items():
        numbers = chosen(task, len(its), count, seed)
        answers = {number: known[task, number] for number in numbers if (task, number) in known}
        left = [number for number in numbers if number not in answers]
        if tick is not None and answers:
            tick(len(answers))
        given = [(its[number].context, its[number].choices) for number in left]
        for batch in log_likelihoods(model, tokenizer, given, batch_tokens):
            new = {left[one.number]: (one.log_likelihoods, one.greedy) for one in batch}
            journal.add(
                {"task": task, "number": number, "log_likelihoods": sums, "greedy": greedy}
                for number, (sums, greedy) in new.items()
            )
            answers |= new
            if tick is not None:
                tick(len(new))
        rows[task] = accuracy_of(task, its, answers)
    return rows


def _known(journal: Journal, asked: dict[str, list[Question]]) -> dict[tuple[str, int], tuple[list[float], list[bool]]]:
    """The answers of a file, by task and number."""
    source, found = journal.source, {}
    if journal.header.get("format") != FORMAT:
        source.fail("format", f"be {FORMAT!r}", journal.header.get("format"))
    source.record(Header, journal.header)
    for number, value in enumerate(journal.lines, 2):
        line = source.record(_Line, value, f"line {number}")
        if line.task not in TASKS:
            source.fail(f"line {number}.task", f"be one of {', '.join(TASKS)}", line.task)
        if line.task not in asked:
            continue
        its = asked[line.task]
        if line.number >= len(its):
            source.fail(f"line {number}.number", f"be below {len(its)}", line.number)
        if not len(line.log_likelihoods) == len(line.greedy) == len(its[line.number].choices):
            got = f"{len(line.log_likelihoods)} and {len(line.greedy)}"
            source.fail(f"line {number}", f"hold {len(its[line.number].choices)} log_likelihoods and greedy", got)
        found[line.task, line.number] = line.log_likelihoods, line.greedy
    return found


# ---- lm-evaluation-harness, for what we have not


def _harness(tasks: Sequence[str]) -> tuple[Any, Any]:
    """lm_eval and its wrapper of a model."""
    try:
        return importlib.import_module("lm_eval"), importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError:
        relation = f"be of {', '.join(TASKS)}, where lm-evaluation-harness is not installed"
        fail("retention", "tasks", relation, ", ".join(tasks), "pip install lm-eval, or leave them out")


def _by_harness(model: Any, tokenizer: Any, tasks: Sequence[str], count: int | None) -> dict[str, list[Accuracy]]:
    """Its own rows: one a task, or, of a group, one for each of its tasks that has an accuracy."""
    lm_eval, wrapper = _harness(tasks)
    rows: dict[str, list[Accuracy]] = {}
    for task in tasks:
        try:
            found = lm_eval.simple_evaluate(
                model=wrapper(pretrained=model, tokenizer=tokenizer), tasks=[task], limit=count, log_samples=False
            )
        except Exception as error:  # whatever its tasks, their data's readers or the network raise
            why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            remedy = "Check its name, and that its hub is reachable"
            fail("retention", "tasks", "be some that lm-evaluation-harness can ask", f"{task}: {why}", remedy)
        rows[task] = []
        for name, sizes in found["n-samples"].items():
            values = found["results"][name]
            if "acc,none" in values:
                asked, normalised = int(sizes["effective"]), values.get("acc_norm,none")
                rows[task].append(_row(name, asked, int(sizes["original"]), float(values["acc,none"]), normalised))
        if not rows[task]:
            metrics = ", ".join(sorted({metric for values in found["results"].values() for metric in values}))
            fail("retention", "tasks", "be measured by an accuracy", f"{task} with {metrics}", "Leave it out")
    return rows
