"""Documents as token sequences to train on, with the tokens that count."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from ..materials.records import Document, Faults, Unfit

_MARKS = re.compile(r"\{%-?\s*generation\b")  # of a chat template that says itself what the assistant writes
_NONE_OF_THE_ASSISTANTS = ("have a message of the assistant, for assistant_only", "none", "Leave out assistant_only")


class Example(NamedTuple):
    """A sequence: its tokens [L], and which of them are predicted [L] bool, the first never."""

    ids: Tensor
    counts: Tensor


@dataclass
class Tally:
    """What is missing of the documents. cut: rows that were too long, and lost: their tokens that are left out; empty:
    rows of which nothing is left to predict, left out."""

    cut: int = 0
    lost: int = 0
    empty: int = 0

    def said(self, examples: Sequence[Example], faults: Faults) -> list[str]:
        """For a reader, with the counts of what is there."""
        tokens, counted = sum(len(one.ids) for one in examples), sum(int(one.counts.sum()) for one in examples)
        lines = [f"{len(examples):,} rows, {tokens:,} tokens, {counted:,} of them count"]
        if self.cut:
            lines.append(f"{self.cut:,} rows were too long: {self.lost:,} tokens are left out")
        if self.empty:
            lines.append(f"{self.empty:,} rows are left out: none of their tokens counts")
        return lines + faults.said()


def examples_of(
    documents: Iterable[Document], tokenizer: Any, length: int, faults: Faults, only: str | None = None
) -> tuple[list[Example], Tally]:
    """Documents as sequences of at most `length` tokens.

    A text is followed by the end-of-text token and cut into pieces; all of its tokens count. A prompt and its
    completion are one sequence with an end-of-text token, a conversation is what the tokenizer's chat template makes of
    it; what is too long is cut off at the end. only: "completion": what follows a prompt counts alone, "assistant":
    what the template shows of the assistant's messages. What has no such part is a fault.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("examples: the tokenizer must have an end-of-text token, got none. Set tokenizer.eos_token.")
    tally, out, rest = Tally(), [], iter(documents)
    while some := list(itertools.islice(rest, 256)):
        plain = [] if only else [one.whole for one in some if _is_text(one)]
        tokens = iter(tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"] if plain else [])
        for document in some:
            try:
                if plain and _is_text(document):
                    ids = torch.tensor([*next(tokens), tokenizer.eos_token_id], dtype=torch.int64)
                    pieces = [
                        (one, torch.ones(len(one), dtype=torch.bool)) for one in ids.split(length) if len(one) > 1
                    ]
                else:
                    pieces = [_one(document, tokenizer, length, only, tally)]
            except Unfit as unfit:
                faults.refuse(document.where, unfit.relation, unfit.got, unfit.remedy)
                continue
            for ids, counts in pieces:
                counts[:1] = False  # nothing predicts the first
                if bool(counts.any()):
                    out.append(Example(ids, counts))
                else:
                    tally.empty += 1
    return out, tally


def _is_text(document: Document) -> bool:
    return isinstance(document.whole, str) and document.before is None


def _one(document: Document, tokenizer: Any, length: int, only: str | None, tally: Tally) -> tuple[Tensor, Tensor]:
    """A prompt and its completion, or a conversation: at most `length` tokens, and which of them count."""
    if _is_text(document):
        raise Unfit(f"have a part that counts under {only}_only", "a text", f"Leave out {only}_only")
    if isinstance(document.whole, str):
        if only == "assistant":
            raise Unfit("be a conversation, for assistant_only", "a prompt and a completion", "Use completion_only")
        before = str(document.before)
        ids, counts = _spanned(tokenizer, before + document.whole, [(len(before) if only else 0, None)])
        ids, counts = (
            torch.cat([ids, ids.new_tensor([tokenizer.eos_token_id])]),
            torch.cat([counts, counts.new_ones(1)]),
        )
    else:
        ids, counts = _conversation(document, tokenizer, only)
    if len(ids) > length:
        tally.cut += 1
        tally.lost += len(ids) - length
    return ids[:length], counts[:length]


def _spanned(tokenizer: Any, text: str, spans: Sequence[tuple[int, int | None]]) -> tuple[Tensor, Tensor]:
    """The tokens of a text, and which of them end within one of the spans of its characters: a token over the border of
    two parts belongs to the second, which it needs."""
    if not tokenizer.is_fast:
        raise ValueError(
            "examples: the tokenizer must say where its tokens are (a fast one), got a slow one. Load it fast."
        )
    made = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [any(start < b and (end is None or b <= end) for start, end in spans) for _, b in made["offset_mapping"]]
    return torch.tensor(made["input_ids"], dtype=torch.int64), torch.tensor(inside, dtype=torch.bool)


def _conversation(document: Document, tokenizer: Any, only: str | None) -> tuple[Tensor, Tensor]:
    messages = [*(document.before or []), *document.whole]
    tools, first = document.tools or None, len(document.before or [])
    if tokenizer.chat_template is None:
        raise ValueError("examples: the tokenizer must have a chat template for messages, got none. Set chat_template.")

    def shown(count: int, asked: bool = False) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                messages[:count], tools=tools, tokenize=False, add_generation_prompt=asked
            )
        except Exception as error:  # of the template's own language, or raised by it
            why = f"{type(error).__name__}: {error}"
            raise Unfit("fit the chat template", why, "Correct the messages, or the template") from error
        return text

    whole = shown(len(messages))
    if only == "assistant" and document.before is None and _MARKS.search(str(tokenizer.chat_template)):
        made = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"verbose": False},
        )
        ids, counts = (torch.tensor(made[name]) for name in ("input_ids", "assistant_masks"))
        if not bool(counts.any()):
            raise Unfit(*_NONE_OF_THE_ASSISTANTS)
        return ids, counts.bool()
    if only is None:
        return _spanned(tokenizer, whole, [(0, None)])
    if only == "completion" and document.before is None:
        raise Unfit("have a prompt and a completion for completion_only", "messages", "Use assistant_only")
    spans = []
    for number in range(first, len(messages)):
        if only == "completion" or messages[number]["role"] == "assistant":
            before, after = shown(number, asked=messages[number]["role"] == "assistant"), shown(number + 1)
            if not whole.startswith(before) or not whole.startswith(after):
                remedy = "Use one that marks its {% generation %}, or leave out the option"
                raise Unfit(f"have a template that adds to what it has shown, for {only}_only", "another", remedy)
            spans.append((len(before), len(after)))
    if not spans:
        raise Unfit(*_NONE_OF_THE_ASSISTANTS)
    return _spanned(tokenizer, whole, spans)


def shown(example: Example, tokenizer: Any, most: int = 160) -> str:
    """An example as it is trained on: its text, what does not count in [brackets]; of each stretch at most `most`
    characters, from its beginning and its end, and of all at most twelve times as many."""
    parts, tokens = [], zip(example.counts.tolist(), example.ids.tolist(), strict=True)
    for counts, stretch in itertools.groupby(tokens, lambda token: token[0]):
        text = tokenizer.decode([token for _, token in stretch])
        if len(text) > most:
            text = f"{text[: most // 2]} ... {text[-(most // 2) :]}"
        parts.append(text if counts else f"[{text}]")
    whole = "".join(parts)
    return whole if len(whole) <= 12 * most else f"{whole[: 12 * most]} ..."


# ---- as items of a Trainer


class Sequences(Dataset[dict[str, list[int]]]):
    """Examples as items: labels are -100 where a token does not count."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        ids, counts = self.examples[number]
        labels = torch.where(counts, ids, -100)
        return {"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": [1] * len(ids)}


def packed(examples: Sequence[Example], length: int) -> list[list[int]]:
    """Which examples stand together in rows of at most `length` tokens: the longest first, each where the least room is
    left that it fits in."""
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (room left, row), ascending
    for number in sorted(range(len(examples)), key=lambda n: (-len(examples[n].ids), n)):
        size = len(examples[number].ids)
        at = bisect.bisect_left(room, (size, -1))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(number)
        bisect.insort(room, (left - size, row))
    return [sorted(row) for row in rows]


class Packs(Dataset[dict[str, list[int]]]):
    """Rows of several examples each. Positions begin anew with each, from which models of transformers tell that
    attention must not cross; nothing predicts its first token."""

    def __init__(self, examples: Sequence[Example], length: int) -> None:
        self.examples, self.rows = examples, packed(examples, length)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        out: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": []}
        for one in self.rows[number]:
            ids, counts = self.examples[one]
            out["input_ids"] += ids.tolist()
            out["labels"] += torch.where(counts, ids, -100).tolist()
            out["position_ids"] += range(len(ids))
        return out


@dataclass
class PackCollator:
    """Packs as a batch, padded on the right: padding is a sequence of its own, whose labels are -100."""

    pad_token_id: int = 0

    def __call__(self, items: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """input_ids, labels, position_ids [B, T]."""
        longest = max(len(item["input_ids"]) for item in items)
        positions = [
            torch.tensor([*item["position_ids"], *range(longest - len(item["position_ids"]))]) for item in items
        ]
        fill = {"input_ids": self.pad_token_id, "labels": -100}
        return {
            **{
                name: pad_sequence([torch.tensor(item[name]) for item in items], True, value)
                for name, value in fill.items()
            },
            "position_ids": torch.stack(positions),
        }


@torch.no_grad()
def check_packing(model: Any, pack: dict[str, list[int]]) -> None:
    """ValueError for a model whose tokens see other sequences of their pack: its first two, together and alone."""
    from ..models.heads import hidden_states

    starts = [n for n, position in enumerate(pack["position_ids"]) if position == 0][:3]
    if len(starts) < 2:
        return
    start, end = starts[1], (*starts[2:], len(pack["input_ids"]))[0]
    ids, positions = (torch.tensor([pack[name][:end]], device=model.device) for name in ("input_ids", "position_ids"))
    training = model.training
    model.eval()
    try:
        together = hidden_states(model, ids, None, position_ids=positions)[0, start:]
        alone = hidden_states(model, ids[:, start:], None, position_ids=positions[:, start:])[0]
    except TypeError as error:  # a model without position_ids
        raise _crosses(model) from error
    finally:
        model.train(training)
    rounding = 1e-3 if together.dtype == torch.float32 else 0.03
    if not float((together - alone).float().norm()) <= rounding * float(alone.float().norm()):
        raise _crosses(model)


def _crosses(model: Any) -> ValueError:
    return ValueError(
        "train: packing must be of a model whose attention stays within a sequence of the pack, got "
        f"{type(model).__name__}, whose tokens see the one before. Leave out --packing."
    )
