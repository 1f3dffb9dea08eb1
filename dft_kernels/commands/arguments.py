"""What the parsers of all commands share: errors of one line that name the flag, numbers with a range, and paths that
are checked before any work."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_WORDS = (  # argparse's messages, and the form that all errors of this package have
    (r"expected (.*?) arguments?", r"must have \1 value, got none. Add it."),
    (r"invalid choice: (.*) \(choose from (.*)\)", r"must be one of \2, got \1. Pick one of these."),
    (r"Truthy value expected: got (\s*) but expected .*", r"must be true or false, got '\1'. Pick one of these."),
    (r"Truthy value expected: got (.*) but expected .*", r"must be true or false, got \1. Pick one of these."),
    (r"not allowed with argument (.*)", r"must not be given with \1, got both. Leave one out."),
    (r"ignored explicit argument (.*)", r"must have no value, got \1. Leave it out."),
)
_REQUIRED = (
    (r"the following arguments are required: (.*)", r"\1 must be given, got none."),
    (r"one of the arguments (.*) is required", r"one of \1 must be given, got none."),
)


class UsageError(ValueError):
    """The command line is wrong: nothing was done."""


class Parser(argparse.ArgumentParser):
    """argparse's, that raises a `UsageError` of one line, naming the flag as it was typed."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's; a flag that does not exist is named first, with the nearest one that does."""
        args = list(sys.argv[1:] if args is None else args)
        known = [flag for action in actions(self) for flag in action.option_strings if flag.startswith("--")]
        for text in args[: args.index("--")] if "--" in args else args:
            name = text.partition("=")[0]
            if name.startswith("--") and not any(self._names(flag, name) for flag in known):
                near = difflib.get_close_matches(name, known, 1, 0.0)[0]
                raise UsageError(f"{name} must be a flag that there is, got none of that name. Did you mean {near}?")
        options, rest = self.parse_known_args(args, namespace)
        if rest:
            raise UsageError(f"{rest[0]} must follow a flag that takes it, got none. See {self.prog} --help.")
        return options

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """argparse's, for which a flag may be written with _ or -; what was typed is kept for messages."""
        self.typed = list(sys.argv[1:] if args is None else args)
        end = self.typed.index("--") if "--" in self.typed else len(self.typed)
        spelled = [*map(self._spelled, self.typed[:end]), *self.typed[end:]]
        return super().parse_known_args(spelled, namespace)

    def _spelled(self, text: str) -> str:
        """A flag as argparse knows it."""
        name, sign, value = text.partition("=")
        flags = self._option_string_actions
        other = _hyphened(name)
        if name.startswith("--") and not any(flag.startswith(name) for flag in flags):
            return other + sign + value if any(flag.startswith(other) for flag in flags) else text
        return text

    def error(self, message: str) -> NoReturn:
        """Raise argparse's message as a `UsageError`."""
        for pattern, words in _REQUIRED:
            if re.fullmatch(pattern, message):
                raise UsageError(f"{re.sub(pattern, words, message)} See {self.prog} --help.")
        found = re.fullmatch(r"argument ([^:]+): (.*)", message, re.S)
        if found is None:
            raise UsageError(message)
        said = found[2]
        for pattern, words in _WORDS:
            said = re.sub(f"^{pattern}$", words, said)
        names = found[1].split("/")
        action = next((a for a in actions(self) if set(names) & {*a.option_strings, a.dest, a.metavar}), None)
        flag = found[1] if action is None else self.shown(action)
        raise UsageError(f"{flag} {said}" if said.startswith("must ") else f"{flag}: {said}")

    def named(self, message: str) -> str:
        """A library's `function: argument must ...` with the flag that gave the argument in its place."""
        known = {action.dest: action for action in reversed(actions(self))}
        for pattern in (r"(?:\w+: )?(\w+)(?=:| must )", r"(\w+)(?=:| must )"):
            found = re.match(pattern, message)
            for dest in (found[1], found[1].removesuffix("s")) if found else ():
                if found and dest in known:
                    return self.shown(known[dest]) + message[found.end() :]
        return message

    def shown(self, action: argparse.Action) -> str:
        """The name of an argument as it was typed."""
        typed = last_of(action.option_strings, getattr(self, "typed", ()))
        return typed or next(iter(action.option_strings), None) or str(action.metavar or action.dest)

    def _names(self, flag: str, typed: str) -> bool:
        flag, typed = _hyphened(flag), _hyphened(typed)
        return flag == typed or (self.allow_abbrev and flag.startswith(typed))


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """argparse's with defaults, where there are any, and of a flag's long names the first."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, []) or action.default is False:
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if action.option_strings and all(flag.startswith("--") for flag in action.option_strings):
            values = self._format_args(action, self._get_default_metavar_for_optional(action))
            return f"{action.option_strings[0]} {values}".rstrip()
        return super()._format_action_invocation(action)


def last_of(flags: Sequence[str], typed: Sequence[str]) -> str | None:
    """The last of what was typed that is one of these flags, without its value."""
    known = {*map(_hyphened, flags)}
    return next((name for text in reversed(typed) if _hyphened(name := text.partition("=")[0]) in known), None)


def _hyphened(flag: str) -> str:
    return flag.replace("_", "-")


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """All arguments of a parser and of its subcommands."""
    found = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [one for child in action.choices.values() for one in actions(child)]
    return found


def _refuse(relation: str, got: object, remedy: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"must {relation}, got {got}. {remedy}.")


@dataclass(frozen=True)
class Whole:
    """A whole number in a range."""

    least: int = -(1 << 63)
    most: int = (1 << 63) - 1

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            _refuse("be a whole number", repr(text), "Write one, such as 8")
        if value < self.least:
            _refuse(f"be at least {self.least}", value, "Raise it")
        if value > self.most:
            _refuse(f"be at most {self.most}", value, "Lower it")
        return value


@dataclass(frozen=True)
class Number:
    """A finite number in a range: from `least`, or above `above`; to `most`, or below `below`."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            _refuse("be a finite number", repr(text), "Write one, such as 0.5")
        for holds, relation, remedy in (
            (value >= self.least, f"be at least {self.least:g}", "Raise it"),
            (value > self.above, f"be above {self.above:g}", "Raise it"),
            (value <= self.most, f"be at most {self.most:g}", "Lower it"),
            (value < self.below, f"be below {self.below:g}", "Lower it"),
        ):
            if not holds:
                _refuse(relation, f"{value:g}", remedy)
        return value


@dataclass(frozen=True)
class Checked:
    """A text that a function refuses by ValueError or OSError; passed on as it is."""

    check: Callable[[str], object]

    def __call__(self, text: str) -> str:
        try:
            self.check(text)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the system's own, of a name
                shown = text if len(text) <= 80 else f"{text[:80]}... ({len(text)} characters)"
                _refuse("be a name that the system takes", f"{shown}: {error.strerror}", "Check the name")
            own_name = re.sub(r"^(\w+: )?\w+ (?=must )", "", str(error))
            raise argparse.ArgumentTypeError(re.sub(r"^\w+: ", "", own_name)) from error
        return text


SEED = Whole(0, (1 << 32) - 1)  # what NumPy, which transformers seeds too, takes


def input_file(text: str) -> Path:
    """A file that can be read."""
    path = Path(text)
    try:
        with path.open("rb"):
            return path
    except (OSError, ValueError) as error:
        _refuse("be a readable file", f"{text}: {error}", "Check the name")


def input_folder(text: str) -> Path:
    """A folder that is there."""
    if not Path(text).is_dir():
        _refuse("be a folder that is there", text, "Check the name")
    return Path(text)


def output_folder(text: str) -> Path:
    """A folder to write into: there, or one that can be made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        _refuse("be a folder, or a name for a new one", f"{text}, a file", "Name another")
    _check_output(path / "file", text)
    return path


@dataclass(frozen=True)
class OutputFile:
    """A file to write: new, or one that is replaced."""

    suffix: str = ""

    def __call__(self, text: str) -> Path:
        path = Path(text)
        if path.is_dir():
            _refuse("be a file's name", f"{text}, a folder", "Name a file in it")
        if not path.name.endswith(self.suffix):
            _refuse(f"end in {self.suffix}", text, "Rename it")
        _check_output(path, text)
        return path


def _check_output(path: Path, text: str) -> None:
    """That the nearest folder above that exists can be written to; and that this is a path: elsewhere than on Windows
    C:\\runs\\one is the name of a file here."""
    if os.sep == "/" and "\\" in text:
        own = re.sub(r"^([A-Za-z]):", lambda drive: f"/mnt/{drive[1].lower()}", text).replace("\\", "/")
        _refuse("have / between its folders", text, f"Write {own}")
    above = next((one for one in path.absolute().parents if one.exists()), Path("/"))
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        _refuse("lie in a folder that can be written to", f"{text}, and {above} is none", "Name another")


def shard(text: str) -> tuple[int, int]:
    """(i, n) of i/n: the part i of n, from 0 as ranks and the shards of datasets are counted."""
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    index, of = (int(found[1]), int(found[2])) if found else (0, 0)
    if index >= of:
        last = f": of {of} the first is 0/{of}, the last {of - 1}/{of}" if of else ", such as 0/4"
        _refuse("be I/N with I in 0..N-1, counted from 0 as ranks are", repr(text), f"Write one{last}")
    return index, of


def device(text: str) -> str:
    """A device of torch that is here."""
    import torch  # here, so that the list of commands needs none

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, ValueError) as error:  # AssertionError: a build without CUDA
        _refuse(
            "be a device that torch has here",
            f"{text!r}: {textwrap.shorten(str(error), 80)}",
            "Try cpu, or see nvidia-smi",
        )
    return text


def each_of(known: Sequence[str]) -> dict[str, Any]:
    """Keywords of `add_argument` for any number of some names, checked one by one."""
    return {"nargs": "*", "type": Checked(lambda text: check_name(text, known)), "metavar": "NAME"}


def check_name(text: str, known: Sequence[str]) -> None:
    """ValueError, with the nearest, for a name that is none of these."""
    if text not in known:
        near = difflib.get_close_matches(text, known, 1, 0.0)[0]
        raise ValueError(f"must be one of {', '.join(known)}, got {text!r}. Did you mean {near}?")
