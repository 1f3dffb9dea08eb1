"""What is public, a line each: names, parameters and their defaults, methods, commands, their flags in every spelling
and the defaults of these. Annotations are left out, and what a class has from another library: both are no promise of
this one.

tests/public_api.txt is what this prints; `PYTHONPATH=. python tests/public_api.py` writes it anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers

from dft_kernels.commands.main import COMMANDS

LISTING = Path(__file__).with_suffix(".txt")
MODULES = (
    "dft_kernels",
    *(f"dft_kernels.{name}" for name in ("divergences", "terms", "targets", "generation", "distributed", "testing")),
)
PLAIN = (bool, int, float, str, tuple, type(None), inspect.Parameter.empty)


def listing() -> list[str]:
    """Everything, in a fixed order."""
    return [*(line for module in MODULES for line in names(module)), *commands()]


def names(module: str) -> Iterator[str]:
    package = import_module(module)
    for name in sorted(package.__all__):
        one, path = getattr(package, name), f"{module}.{name}"
        if inspect.isclass(one):
            yield from members(path, one)
        elif inspect.isfunction(one):
            yield path + parameters(one)
        else:
            yield path


def members(path: str, kind: type) -> Iterator[str]:
    """How a class is made, and what it or a class of this package that it is one of defines."""
    ours = [each for each in kind.__mro__ if each.__module__.startswith("dft_kernels")]
    own = {name: value for each in reversed(ours) for name, value in vars(each).items()}
    if dataclasses.is_dataclass(kind):
        declared = {name for each in ours for name in vars(each).get("__annotations__", ())}
        fields = [each for each in dataclasses.fields(kind) if each.name in declared]
        yield f"{path}({', '.join(each.name + default(each) for each in fields)})"
    else:
        yield path + (parameters(kind) if "__init__" in own or hasattr(kind, "_fields") else "()")
    for name, value in sorted(own.items()):
        if name.startswith("_") or name in getattr(kind, "_fields", ()):
            continue
        if isinstance(value, staticmethod | classmethod) or inspect.isfunction(value):
            yield f"{path}.{name}{parameters(getattr(kind, name))}"
        elif isinstance(value, property):
            yield f"{path}.{name}"


def parameters(function: Any) -> str:
    """(a, b=1, *, c=None)"""
    found = inspect.signature(function)
    bare = [
        each.replace(annotation=each.empty)
        if isinstance(each.default, PLAIN) or each.default is each.empty
        else each.replace(annotation=each.empty, default=type(each.default).__name__)
        for each in found.parameters.values()
    ]
    return str(found.replace(parameters=bare, return_annotation=found.empty))


def default(field: Any) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"={field.default_factory.__name__}()"
    if field.default is dataclasses.MISSING:
        return ""
    return f"={field.default!r}" if isinstance(field.default, PLAIN) else f"={type(field.default).__name__}"


def commands() -> Iterator[str]:
    yield "dft-kernels --version --print-completion"
    for name in sorted(COMMANDS):
        yield from flags(f"dft-kernels {name}", import_module(f"dft_kernels.commands.{name}").parser())


def flags(path: str, parser: argparse.ArgumentParser) -> Iterator[str]:
    theirs = {each.name for each in dataclasses.fields(transformers.TrainingArguments)} if "train" in path else set()
    words, below = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below += [line for name, one in sorted(action.choices.items()) for line in flags(f"{path} {name}", one)]
        elif action.dest not in {"help", *theirs}:
            words.append(("/".join(action.option_strings) or action.dest.upper()) + given(action))
    yield " ".join([path, *words])
    yield from below


def given(action: argparse.Action) -> str:
    """=VALUE, the default of a flag that takes one; folders of this machine's user are no part of it, nor its GPU."""
    value = action.default
    if value in (None, [], ()) or action.nargs == 0 or action.dest == "device" or Path(str(value)).is_absolute():
        return ""
    return f"={','.join(map(str, value)) if isinstance(value, list | tuple) else value}"


if __name__ == "__main__":
    LISTING.write_text("\n".join(listing()) + "\n")
