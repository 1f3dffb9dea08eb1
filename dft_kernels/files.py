"""Reading files that somebody else may have written: bounded, typed, and refused by file and field.

`Source` is a file and how its faults are said: `FUNCTION: PATH: FIELD must RELATION, got VALUE. REMEDY.` Sizes are
checked before anything is read or allocated, and only regular files are opened, so that no pipe or device is waited on.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import reprlib
import stat
import sys
import types
import typing
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from .errors import fail

T = TypeVar("T")
Bounds = tuple[float, float]
JSON_LIMIT = 1 << 20  # bytes of a JSON file or a safetensors header, unless told otherwise
_MOST = 1 << 53  # of an int: up to here it is the same as a float
_FINITE = sys.float_info.max
_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which nothing prints
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{name}{number}" for name in ("COM", "LPT") for number in range(10))}
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_NAMES = {
    bool: "true or false",
    int: "an int",
    float: "a finite number",
    str: "text",
    dict: "an object",
    list: "a list",
}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 120


def shown(value: object) -> str:
    """A value out of a file, short enough for an error."""
    return _SHORT.repr(value)


def regular(path: Path) -> int:
    """Bytes of a regular file; OSError for one that is none: opening a pipe or a device may wait for ever."""
    try:
        found = path.stat()
    except ValueError as error:  # a NUL in its name
        raise OSError(errno.EINVAL, str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, _KINDS.get(stat.S_IFMT(found.st_mode), "a device"))
    return found.st_size


def replace_text(path: Path, text: str) -> None:
    """Write a file as UTF-8, so that whoever is stopped or reads meanwhile finds the one before, or this one, whole."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")  # names of files may be of any bytes
    part.replace(path)


@dataclass(frozen=True)
class Source:
    """A file to read. function: who says its faults; remedy: for damage; absent: where the file is not there."""

    function: str
    path: Path
    remedy: str
    absent: str | None = None

    def fail(self, field: str, relation: str, got: object, remedy: str | None = None) -> NoReturn:
        """Raise ValueError for a field. got: text as it is to be printed, or a value."""
        text = " ".join((got if isinstance(got, str) else shown(got)).split())
        text = text if len(text) <= 400 else f"{text[:400]}..."
        text = text.encode("utf-8", "backslashreplace").decode()
        fail(self.function, f"{self.path}: {field}", relation, text, remedy or self.remedy)

    # ---- the file

    def size(self) -> int:
        """Bytes of the file, which must be there and regular."""
        try:
            return regular(self.path)
        except (FileNotFoundError, NotADirectoryError):
            self.fail("the file", "be there", "none", self.absent)
        except OSError as error:
            self.fail("the file", "be a readable regular file", error.strerror or str(error))

    def data(self, limit: int | None = None) -> bytes:
        """The file's bytes; limit: how many there may be."""
        size = self.size()
        if limit is not None and size > limit:
            self.fail("bytes", f"be at most {limit:,}", f"{size:,}")
        try:
            return self.path.read_bytes()
        except OSError as error:
            self.fail("the file", "be readable", str(error))

    def text(self, limit: int | None = None) -> str:
        """The file's text, UTF-8, its line ends as they are."""
        data = self.data(limit)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.fail("the file", "be UTF-8 text", str(error))

    def inside(self, field: str, name: object) -> Source:
        """The file that a field names: a plain name in this file's folder, and no link out of it."""
        plain = isinstance(name, str) and _PLAIN.fullmatch(name) and name.split(".")[0].upper() not in _DEVICES
        if not plain:
            self.fail(field, "be a plain file name: letters, digits, '.', '_' and '-'", shown(name))
        folder = self.path.parent
        real = os.path.realpath(folder / str(name))
        if os.path.dirname(real) != os.path.realpath(folder):
            self.fail(field, "name a file of the folder", f"{name}, a link to {real}")
        return replace(self, path=folder / str(name))

    # ---- JSON and YAML

    def json(self, limit: int = JSON_LIMIT) -> dict[str, Any]:
        """The object that a JSON file holds."""
        return self.parsed("the file", self.text(limit))

    def parsed(self, field: str, text: str) -> dict[str, Any]:
        """The object that a JSON text is, in which no object has a name twice."""
        try:
            found = json.loads(text, object_pairs_hook=_distinct)
        except RecursionError:
            self.fail(field, "be readable JSON", "brackets nested too deep")
        except ValueError as error:
            self.fail(field, "be readable JSON", str(error))
        return self.typed(field, found, dict)

    def yaml(self, limit: int = 1 << 15) -> dict[str, Any]:
        """The names and values that a YAML file holds, without anchors, aliases and tags: a small file that stands for
        a large value is refused as any other that no person writes."""
        import yaml

        text = self.text(limit)
        try:
            found = yaml.load(text, _yaml_loader())
        except (yaml.YAMLError, ValueError) as error:
            self.fail("the file", "be a readable YAML file", str(error))
        if not isinstance(found, dict):
            self.fail("the file", "hold names and values", type(found).__name__, "Write NAME: VALUE lines")
        return found

    # ---- fields

    def typed(self, field: str, value: Any, kind: type[T], within: Bounds | None = None) -> T:
        """The value of a field, of this type: a bool is no int, an int may be a float, text is Unicode. within: least
        and most of a number; an int is at least 0 unless told otherwise."""
        least, most = within or ((0, _MOST) if kind is int else (-math.inf, math.inf))
        if kind in (int, float):
            finite = type(value) in (int, kind) and abs(value) <= (_MOST if type(value) is int else _FINITE)
            good = finite and least <= value <= most
        else:
            good = isinstance(value, kind) and not (isinstance(value, str) and _SURROGATE.search(value))
        if not good:
            limits = f" of at least {least:g}" if least > -math.inf else ""
            self.fail(field, f"be {_NAMES[kind]}{limits}{f' and at most {most:g}' if within else ''}", shown(value))
        return kind(value)  # type: ignore[call-arg]

    def record(
        self,
        kind: type[T],
        value: Any,
        where: str = "",
        bounds: Mapping[str, Bounds] = types.MappingProxyType({}),
        beside: Collection[str] = (),
    ) -> T:
        """The dataclass whose fields an object holds: all of them, of their types, and no other but those `beside`;
        fields may be dataclasses, lists and dicts of such. where: the object's own field; bounds: least and most of
        fields."""
        prefix = f"{where}." if where else ""
        given = self.typed(where or "the file", value, dict)
        names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
        for name in given:
            if name not in names and name not in beside:
                self.fail(f"{prefix}{shown(name)}", f"be one of {', '.join(names)}", "another name")
        found: dict[str, Any] = {}
        for name, hint in typing.get_type_hints(kind).items():
            if name not in given:
                self.fail(f"{prefix}{name}", "be there", "none")
            found[name] = self._of(hint, f"{prefix}{name}", given[name], bounds.get(name))
        return kind(**found)

    def _of(self, hint: Any, field: str, value: Any, within: Bounds | None) -> Any:
        """A value of a field's type: one of `typed`, a dataclass, a list or dict of such, or None where that may be."""
        if hint is Any:
            return value
        kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
        if kind in (types.UnionType, typing.Union):
            (one,) = (each for each in inner if each is not type(None))
            return None if value is None and len(inner) > 1 else self._of(one, field, value, within)
        if isinstance(kind, type) and is_dataclass(kind):
            return self.record(kind, value, field)
        held = self.typed(field, value, kind, within)
        if kind is list and inner:
            return [self._of(inner[0], f"{field}[{at}]", one, within) for at, one in enumerate(held)]
        if kind is dict and inner:
            return {name: self._of(inner[1], f"{field}.{shown(name)}", one, within) for name, one in held.items()}
        return held

    # ---- safetensors

    @contextmanager
    def tensors(self) -> Iterator[Any]:
        """The safetensors file, opened; faults found while it is read are said as its damage."""
        import safetensors

        whole = "be a whole safetensors file"
        size = self.size()
        try:
            with self.path.open("rb") as file:
                header = int.from_bytes(file.read(8), "little")
            if not 0 < header <= min(JSON_LIMIT, size - 8):
                self.fail("the file", whole, f"a header of {header:,} bytes in a file of {size:,}")
            with safetensors.safe_open(self.path, framework="pt") as opened:
                yield opened
        except (OSError, safetensors.SafetensorError) as error:
            self.fail("the file", whole, str(error))

    def tensor(self, opened: Any, name: str, shape: list[int], dtype: Any) -> None:
        """Refuse a tensor of an opened file of another shape or dtype, before it is read."""
        if name not in opened.keys():  # noqa: SIM118 - not a dict
            self.fail(name, f"be there with shape {shape}", "no such tensor")
        found = opened.get_slice(name)
        if list(found.get_shape()) != shape:
            self.fail(name, f"have shape {shape}", list(found.get_shape()))
        if found[:0].dtype != dtype:
            self.fail(name, f"be {dtype}", str(found[:0].dtype))


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"{shown(twice)} twice in an object")
    return found


def _yaml_loader() -> type:
    """PyYAML's safe loader without anchors, aliases, tags, repeated names, and dates, which no field has."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        depth = 0
        yaml_implicit_resolvers: typing.ClassVar = {
            letter: [one for one in resolvers if not one[0].endswith(":timestamp")]
            for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def compose_node(self, parent: Any, index: Any) -> Any:
            event = self.peek_event()
            if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
                raise yaml.YAMLError(f"an anchor, alias or tag{event.start_mark}")
            self.depth += 1
            if self.depth > 16:  # a few calls each, and time with the square of what is open
                raise yaml.YAMLError("brackets nested too deep")
            found = super().compose_node(parent, index)
            self.depth -= 1
            return found

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            found = super().construct_mapping(node, deep)
            if len(found) < len(node.value):
                raise yaml.YAMLError(f"a name twice in a mapping{node.start_mark}")
            return found

    return Loader
