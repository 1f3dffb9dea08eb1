"""The API reference: for every name of docs/api.md a heading, its signature and its docstring, as they are at run time.

Docstrings are plain text: paragraphs, indented formulas and tables, and the sections Args, Returns and Raises.
"""

from __future__ import annotations

import enum
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

API = Path(__file__).parent.parent / "api.md"
SECTION = re.compile(r"(Args|Returns|Raises):")
WIDE = 78  # characters of code that a desk's column shows
ITEM = re.compile(r"[\w,. *()]+: ")


@cache
def listed() -> dict[str, list[str]]:
    """The names of every module of the API page."""
    sections = re.findall(r"^## `(dft_kernels[\w.]*)`\n(.*?)(?=^## |\Z)", API.read_text(), re.M | re.S)
    return {module: re.findall(r"^\| `(\w+)` \|", text, re.M) for module, text in sections}


def place(module: str) -> str:
    """The page of a module."""
    return f"reference/{module}.md"


def titles() -> dict[str, str]:
    """The pages, by title."""
    return {module: place(module) for module in listed()}


def linked(markdown: str) -> str:
    """The API page, its names linked to their docstrings."""
    module, lines = None, []
    for line in markdown.splitlines():
        if line.startswith("## "):
            heading = re.match(r"## `([\w.]+)`", line)
            module = heading and place(heading[1])
        if module and (name := re.match(r"\| `(\w+)` \|", line)):
            line = f"| [`{name[1]}`]({module}#{name[1].lower()}) |{line[name.end() :]}"
        lines.append(line)
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Their text."""
    return {place(module): page(module, names) for module, names in listed().items()}


def page(module: str, names: list[str]) -> str:
    """Of a module."""
    home = import_module(module)
    entries = "\n\n".join(entry(module, name, getattr(home, name)) for name in names)
    return f"# {module}\n\n{prose(inspect.getdoc(home) or '')}\n\n{entries}\n"


def entry(module: str, name: str, value: Any) -> str:
    """One name: a class with the methods that are its own."""
    head = f"## `{name}`"
    if isinstance(value, ModuleType):
        return f"{head}\n\nA module: [`{value.__name__}`]({value.__name__}.md)."
    if not callable(value):
        return f"{head}\n\nA `{type(value).__name__}`: {', '.join(f'`{key}`' for key in value)}."
    parts = [head, signature(name, value), prose(inspect.getdoc(value) or "")]
    for method, function in vars(value).items() if inspect.isclass(value) else ():
        if not method.startswith("_") and inspect.isfunction(function) and function.__doc__:
            parts += [f"### `{name}.{method}`", signature(method, function), prose(inspect.getdoc(function) or "")]
    return "\n\n".join(parts)


def signature(name: str, value: Any) -> str:
    """As code, in lines of about WIDE. What a class takes from another library's is one word."""
    parameters = [one for one in inspect.signature(value).parameters.values() if one.name != "self"]
    if (base := foreign(value)) is not None:
        theirs = inspect.signature(base).parameters
        parameters = [one for one in parameters if one.name not in theirs]
    words, before = [], None
    for one in parameters:
        if one.kind is one.KEYWORD_ONLY and before not in (one.KEYWORD_ONLY, one.VAR_POSITIONAL):
            words.append("*")
        words.append(said(one))
        before = one.kind
    words += [] if base is None else [f"**{base.__name__}"]
    line = f"{name}({', '.join(words)})"
    if len(line) > WIDE:
        lines = [f"{name}("]
        for word in words:
            if len(lines) > 1 and len(lines[-1]) + len(word) < WIDE - 2:
                lines[-1] += f" {word},"
            else:
                lines.append(f"    {word},")
        line = "\n".join([*lines, ")"])
    return f"```python\n{line}\n```"


def foreign(value: Any) -> Any:
    """The class of another library whose arguments a dataclass of ours goes on from, if it does."""
    bases = inspect.getmro(value)[1:] if is_dataclass(value) else ()
    return next((base for base in bases if is_dataclass(base) and not base.__module__.startswith("dft_kernels")), None)


def said(parameter: inspect.Parameter) -> str:
    """A parameter, with its type and default."""
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    kind = parameter.annotation
    word = stars + parameter.name
    if kind is not parameter.empty:
        word += f": {kind if isinstance(kind, str) else getattr(kind, '__name__', kind)}"
    if parameter.default is not parameter.empty:
        default = parameter.default
        shown = str(default) if isinstance(default, enum.Enum) or "<" in repr(default) else repr(default)
        word += f" = {shown}" if kind is not parameter.empty else f"={shown}"
    return word


def prose(doc: str) -> str:
    """A docstring as Markdown."""
    out: list[str] = []
    for block in re.split(r"\n\n+", doc):
        lines = block.splitlines()
        while lines:
            if SECTION.fullmatch(lines[0]):
                out.append(f"**{lines.pop(0)}**")
                items, lines = split(lines, lambda line: not line.startswith("  "))
                out.append(described(textwrap.dedent("\n".join(items))))
            elif lines[0].startswith("  "):
                code, lines = split(lines, lambda line: not line.startswith("  "))
                out.append("```text\n" + textwrap.dedent("\n".join(code)) + "\n```")
            elif len(lines) > 1 and all(ITEM.match(line) for line in lines if not line.startswith("  ")):
                out.append(described("\n".join(lines)))
                lines = []
            else:
                text, lines = split(lines, lambda line: line.startswith("  ") or SECTION.fullmatch(line) is not None)
                out.append(escaped(" ".join(text)))
    return "\n\n".join(out)


def split(lines: list[str], ends: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    """The lines before the first that ends them, and the rest."""
    until = next((n for n, line in enumerate(lines) if ends(line)), len(lines))
    return lines[:until], lines[until:]


def described(text: str) -> str:
    """Items `name: what it is`, whose lines go on indented, as a list; other text as it is."""
    items = re.split(r"\n(?! )", text)
    if not all(ITEM.match(item) for item in items):
        return escaped(" ".join(text.split()))
    pairs = (item.split(": ", 1) for item in items)
    return "\n".join(f"- `{name}`: {escaped(' '.join(what.split()))}" for name, what in pairs)


def escaped(text: str) -> str:
    """Without a meaning in Markdown, but for what stands in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else plain(part) for part in parts)


def plain(text: str) -> str:
    """Nothing of it markup."""
    return re.sub(r"([*_\[\]#|])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
