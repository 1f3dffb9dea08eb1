"""A file of JSON lines that grows as results come, and that a run which was killed goes on with.

Its first line, the header, says what all others depend on. Lines are appended a batch at a time; one without its end,
which a kill leaves, is none.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..files import Source

LIMIT = 1 << 30  # bytes of such a file
ANOTHER = "Name another folder, or delete the file"


@dataclass
class Journal:
    """A file's header and whole lines, as objects; `begin` or `read` makes one."""

    source: Source
    header: dict[str, Any]
    lines: list[dict[str, Any]]
    ends: list[int] = field(repr=False)  # offsets behind the header and behind each line

    @classmethod
    def read(cls, source: Source) -> Journal:
        """What is there; ValueError, by file and line, for what is no such file."""
        data = source.data(LIMIT)
        parts = data.split(b"\n")[:-1]
        if not parts:
            source.fail("the file", "begin with a header line", data[:80].decode("utf-8", "replace"))
        found, ends, end = [], [], 0
        for number, part in enumerate(parts, 1):
            # bytes that are no UTF-8 become what `Source.typed` refuses
            found.append(source.parsed(f"line {number}", part.decode("utf-8", "surrogateescape")))
            end += len(part) + 1
            ends.append(end)
        return cls(source, found[0], found[1:], ends)

    @classmethod
    def begin(cls, source: Source, header: dict[str, Any]) -> Journal:
        """Write the header of a new file, or read one that is there, whatever its header."""
        line = _line(header)
        if not source.path.exists() or line.startswith(source.data(LIMIT)):  # killed while it wrote the header
            with _writing(source, "Name another folder"):
                source.path.parent.mkdir(parents=True, exist_ok=True)
                source.path.write_bytes(line)
        return cls.read(source)

    def check(self, header: Mapping[str, Any], beside: Collection[str] = ()) -> None:
        """ValueError, by field, where the file's header is another. beside: names that may differ."""
        ours, theirs = _flat(header), _flat(self.header)
        for name in {**ours, **theirs}:
            if name.split(".")[0] not in beside and (was := theirs.get(name)) != (got := ours.get(name)):
                self.source.fail(name, f"be {json.dumps(was)}, as in the file", json.dumps(got), ANOTHER)

    def keep(self, count: int) -> None:
        """Leave the first lines alone, in the file too, and what a kill has left of one out."""
        self.lines, self.ends = self.lines[:count], self.ends[: count + 1]
        if self.source.size() > self.ends[-1]:
            with _writing(self.source, "Name another folder"), self.source.path.open("r+b") as file:
                file.truncate(self.ends[-1])

    def add(self, lines: Iterable[dict[str, Any]]) -> None:
        """Append lines; when it returns they are the system's to write."""
        made = list(lines)
        written = [_line(one) for one in made]
        with _writing(self.source, "Make room, and run it again: it goes on"), self.source.path.open("ab") as file:
            file.write(b"".join(written))
        for one in written:
            self.ends.append(self.ends[-1] + len(one))
        self.lines += made


@contextmanager
def _writing(source: Source, remedy: str) -> Iterator[None]:
    """Errors of the system as ValueErrors that name the file."""
    try:
        yield
    except OSError as error:
        source.fail("the file", "be writable", error.strerror or str(error), remedy)


def _line(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _flat(header: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Its values by dotted names."""
    found: dict[str, Any] = {}
    for name, value in header.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return found
