"""Documents as people have them: JSON lines, parquet files, folders and names of the `datasets` library.

A record is one of

    text                     a text
    prompt, completion       two texts, or two lists of messages
    messages [, tools]       a conversation: [{"role": ..., "content": ...}, ...], as chat templates take them

told by its columns. Records are read one at a time.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..files import regular, shown

LINES, PARQUET = (".jsonl", ".ndjson"), (".parquet",)
HUB = "hf:"
_SAVED = ("dataset_info.json", "dataset_dict.json")  # in a folder of datasets.save_to_disk


@dataclass
class Faults:
    """What becomes of a bad record. skip: it is left out and counted; else ValueError, by its place."""

    skip: bool = False
    skipped: Counter[str] = field(default_factory=Counter)  # by what a record must

    def refuse(self, where: str, relation: str, got: object, remedy: str) -> None:
        """Raise, or count and return."""
        if not self.skip:
            text = " ".join((got if isinstance(got, str) else shown(got)).split())[:300].rstrip(".")
            raise ValueError(f"materials: {where}: a record must {relation}, got {text}. {remedy}.")
        self.skipped[relation] += 1

    def said(self) -> list[str]:
        """For a reader."""
        return [f"{count:,} records are left out: they must {what}" for what, count in self.skipped.items()]


class Document(NamedTuple):
    """A record. before: what a completion follows, None where there is no prompt; messages are lists, texts are str.
    tools: of a conversation's template."""

    where: str
    whole: str | list[dict[str, Any]]
    before: str | list[dict[str, Any]] | None = None
    tools: list[Any] | None = None

    def texts(self, only: str | None = None) -> list[str]:
        """What is written in it, without templates: its text, or prompt and completion in one, or each message's. only:
        "assistant" or "completion", of these alone; nothing where there is no such part."""
        parts = [self.whole] if self.before is None or only == "completion" else [self.before, self.whole]
        if only == "completion" and self.before is None:
            return []
        if isinstance(self.whole, str):
            return [] if only == "assistant" else ["".join(map(str, parts))]
        messages = [message for part in parts if not isinstance(part, str) for message in part]
        return [
            text
            for message in messages
            if (only != "assistant" or message["role"] == "assistant") and (text := content_of(message))
        ]


def content_of(message: Mapping[str, Any]) -> str:
    """The text of a message, of all its parts."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content if isinstance(content, str) else ""


def structured(name: str) -> bool:
    """Whether a name stands for records, not for one text."""
    path = Path(name)
    if name.startswith(HUB) or path.suffix.lower() in LINES + PARQUET:
        return True
    return any((path / file).is_file() for file in _SAVED)


def check(name: str) -> None:
    """ValueError for a source of records that cannot be read, from its beginning alone."""
    if not name.startswith(HUB):
        next(documents([name], Faults(skip=True)), None)


class Unfit(Exception):  # noqa: N818 - becomes a fault of the record
    """What a record must be, and is not."""

    def __init__(self, relation: str, got: object, remedy: str) -> None:
        self.relation, self.got, self.remedy = relation, got, remedy


def documents(names: Iterable[str], faults: Faults) -> Iterator[Document]:
    """The records of sources, in order."""
    for name in names:
        rows, column = _rows(name)
        for where, row in rows:
            try:
                yield _read(where, row, column)
            except Unfit as unfit:
                faults.refuse(where, unfit.relation, unfit.got, unfit.remedy)


_KINDS = (("messages",), ("prompt", "completion"), ("text",))


def _read(where: str, row: object, column: str | None) -> Document:
    """A record, checked. column: the one that is its text."""
    if isinstance(row, Unfit):
        raise row
    if not isinstance(row, Mapping):
        raise Unfit("be an object of columns", row, "Write one object a line")
    kinds = _KINDS if column is None else ((column,),)
    kind = next((names for names in kinds if all(row.get(one) is not None for one in names)), None)
    if kind is None:
        need = "messages, prompt and completion, or text" if column is None else f"a column {column!r}"
        raise Unfit(f"have {need}", f"columns {', '.join(map(str, row)) or 'none'}", "Name the columns so")
    for name in kind:
        value = row[name]
        if isinstance(value, str) and name != "messages":
            if not value.strip() and name != "prompt":
                raise Unfit(f"have a {name} that is not empty", repr(value), "Leave it out")
        elif len(kind) == 1 and name != "messages":
            raise Unfit(f"have a text as its {name}", value, "Correct it")
        elif not _conversation(value):
            form = "messages [{role, content}, ...]"
            raise Unfit(f"have {form if len(kind) == 1 else f'a text or {form}'} as its {name}", value, "Correct it")
    whole = [_plain(row[name]) for name in kind]
    if len({type(part) for part in whole}) > 1:
        remedy = "Write both as texts, or as messages"
        raise Unfit("have a prompt and a completion of one kind", "a text and messages", remedy)
    return Document(where, whole[-1], whole[0] if len(whole) > 1 else None, _tools(row.get("tools")))


def _tools(value: Any) -> list[Any] | None:
    """A list, or its JSON, as tables keep tools, whose columns have one type."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise Unfit("have tools that are JSON", _why(error), "Correct it") from error
    if value is not None and not isinstance(value, list):
        raise Unfit("have a list as its tools", shown(value), "Correct it")
    return value or None


def _plain(value: Any) -> Any:
    """A text, or messages without the columns that parquet fills with None."""
    if isinstance(value, str):
        return value
    return [{name: part for name, part in message.items() if part is not None} for message in value]


def _conversation(value: object) -> bool:
    """Whether it is a list of messages: each a role and a content, a text or parts of one, or what stands for it, as
    tool_calls do."""
    return isinstance(value, list) and bool(value) and all(map(_message, value))


def _message(value: object) -> bool:
    if not isinstance(value, Mapping) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content")
    if isinstance(content, list):
        return all(isinstance(part, Mapping) for part in content)
    if content is None:
        return any(part is not None for name, part in value.items() if name != "role")
    return isinstance(content, str)


# ---- where records come from: (place, row) of each, an Unfit for what is no row


Rows = Iterator[tuple[str, object]]


def _rows(name: str) -> tuple[Rows, str | None]:
    """The rows of a source, and the one column that is asked for."""
    suffix = Path(name).suffix.lower()
    if name.startswith(HUB):
        return _hub(name)
    if suffix in LINES:
        return _lines(name), None
    return (_parquet(name) if suffix in PARQUET else _saved(name)), None


def _lines(name: str) -> Rows:
    try:
        if not Path(name).is_fifo():
            regular(Path(name))
        with Path(name).open("rb") as file:
            for number, line in enumerate(file, 1):
                where = f"{name}, line {number}"
                if not line.strip():
                    continue
                try:
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    if b"\\u" in line:  # which may name half a character
                        json.dumps(row, ensure_ascii=False).encode("utf-8")
                except UnicodeError as error:
                    row = Unfit("be UTF-8 text", str(error), "Convert it")
                except (ValueError, RecursionError) as error:
                    row = Unfit("be JSON", str(error), "Correct it")
                yield where, row
    except OSError as error:
        raise ValueError(
            f"materials: text must name readable files, got {name}: {error.strerror or error}. Check the name."
        ) from error


def _needed(name: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        top = package.split(".")[0]
        raise ValueError(f"materials: text: {name} needs {top}, got none. pip install {top}.") from error


def _parquet(name: str) -> Rows:
    parquet = _needed(name, "pyarrow.parquet")
    try:
        regular(Path(name))
        with parquet.ParquetFile(name) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                try:
                    rows = batch.to_pylist()
                except UnicodeError:
                    rows = [_decoded(batch.slice(at, 1)) for at in range(len(batch))]
                for row in rows:
                    number += 1
                    yield f"{name}, row {number}", _unfilled(row)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise ValueError(
            f"materials: text must name readable parquet files, got {name}: {_why(error)}. Check it."
        ) from error


def _unfilled(row: Any) -> Any:
    """A row without the None that a table puts where its messages and tools have no such part."""

    def within(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: within(part) for name, part in value.items() if part is not None}
        return [within(part) for part in value] if isinstance(value, list) else value

    return {name: within(value) for name, value in row.items()} if isinstance(row, dict) else row


def _decoded(row: Any) -> object:
    """Of a batch of one row."""
    try:
        return row.to_pylist()[0]
    except UnicodeError as error:
        return Unfit("be UTF-8 text", str(error), "Convert it")


def _why(error: Exception) -> str:
    """A library's reason, in one line without its full stop."""
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _numbered(name: str, found: Iterable[object]) -> Rows:
    """The rows of a dataset; ValueError, by the row before, where it cannot go on: it may raise whatever its reader,
    or its network, does."""
    number = 0
    try:
        for row in found:
            number += 1
            yield f"{name}, row {number}", _unfilled(row)
    except Exception as error:
        got = f"{name}: after row {number}: {_why(error)}"
        raise ValueError(f"materials: text must name datasets that can be read, got {got}. Check it.") from error


def _saved(name: str) -> Rows:
    """A folder of datasets.save_to_disk; of several splits the one called train."""
    datasets = _needed(name, "datasets")
    try:
        found = datasets.load_from_disk(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"materials: text must name a folder of datasets.save_to_disk, got {name}: {_why(error)}. Check it."
        ) from error
    if isinstance(found, Mapping):
        if "train" not in found:
            relation = f"name a folder with a split train, got {name} with {', '.join(found)}"
            raise ValueError(f"materials: text must {relation}. Name {name}{os.sep}SPLIT.")
        found = found["train"]
    return _numbered(name, found)


def _hub(name: str) -> tuple[Rows, str | None]:
    """hf:NAME[:SPLIT[:COLUMN]], read as it comes."""
    parts = name.removeprefix(HUB).split(":")
    dataset, split, column = (*parts, "", "")[:3]
    if not dataset or len(parts) > 3:
        raise ValueError(f"materials: text must be hf:NAME[:SPLIT[:COLUMN]], got {name}. Name a dataset.")
    datasets = _needed(name, "datasets")
    split = split or "train"
    try:
        found = datasets.load_dataset(dataset, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"materials: text: {HUB}{dataset} must be a dataset that has a split {split!r}, got: {_why(error)}. "
            "Check the name, or that its hub is reachable."
        ) from error
    names = found.column_names
    if column and names is not None and column not in names:
        raise ValueError(f"materials: text: {HUB}{dataset} must have a column {column!r}, got {names}. Name it.")
    return _numbered(f"{HUB}{dataset}", found), column or None
