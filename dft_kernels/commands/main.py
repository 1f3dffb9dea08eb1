"""The command `dft-kernels`: finds the command, and says in one line what went wrong."""

from __future__ import annotations

import argparse
import os
import sys
from importlib import import_module
from typing import NamedTuple

from .. import __version__, require_torch
from .arguments import UsageError

_TRAINING = ("transformers", "rich", "matplotlib")


class Command(NamedTuple):
    """A module of this folder with `parser()`, `run(options) -> exit code`, and where an interruption can be gone on
    from, `stopped(options)`, which says how."""

    about: str
    needs: tuple[str, ...] = ()  # packages that must be installed, of `extra`
    extra: str = "finetune"
    torch: bool = True


COMMANDS = {
    "demo": Command("train a real model by cross-entropy and towards a teacher: compare", _TRAINING),
    "train": Command("a model towards a teacher or a target, by a YAML file or flags", _TRAINING),
    "sample": Command("what a model writes, beside its base or other settings", _TRAINING),
    "play": Command("a page on this machine: a model token by token, beside its base",
                    ("transformers", "gradio", "scipy", "lexicalrichness"), "play"),
    "capture": Command("run a teacher over texts and store its distributions", _TRAINING),
    "store": Command("such a store: what it holds, whether it is whole, join shards", ("safetensors", "rich")),
    "target": Command("statistics of human writing: build, list, show, blend", ("safetensors", "rich")),
    "gap": Command("how far a model's writing lies from such a target", _TRAINING),
    "evaluate": Command("whether models write like people, metric by metric",
                        ("transformers", "rich", "lexicalrichness"), "evaluate"),
    "report": Command("such evaluations as one HTML page", ("jinja2", "matplotlib"), "evaluate"),
    "bench": Command("time, memory, errors: against the floor and other libraries", ("rich", "matplotlib"), "bench"),
    "info": Command("versions, backends, build, defaults; --check computes with each"),
    "doctor": Command("what is wrong with this installation, and what mends it", torch=False),
}  # fmt: skip
_SHELLS = ("bash", "zsh", "tcsh")


def usage() -> str:
    """All commands, a line each."""
    lines = [f"  {name:9} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: dft-kernels COMMAND [options]",
            "",
            *lines,
            "",
            "dft-kernels COMMAND --help               its options",
            "dft-kernels --version",
            "dft-kernels --print-completion SHELL     completion for bash, zsh or tcsh",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit code 0: done; 1: it failed; 2: the command line is wrong; 130: interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in COMMANDS:
        return _run(name, rest)
    if name == "--version":
        print(f"dft-kernels {__version__}")
        return 0
    if name == "--print-completion":
        return _print_completion(rest)
    print(usage())
    if name in ("-h", "--help"):
        return 0
    known = ", ".join(sorted(COMMANDS))
    print(f"dft-kernels: COMMAND must be one of {known}, got {name!r}. See the list above.", file=sys.stderr)
    return 2


def _print_completion(arguments: list[str]) -> int:
    """A script for a shell, of every command whose packages are installed."""
    if len(arguments) != 1 or arguments[0] not in _SHELLS:
        got = " ".join(arguments) or "none"
        print(f"dft-kernels: SHELL must be one of {', '.join(_SHELLS)}, got {got}. Name one.", file=sys.stderr)
        return 2
    try:
        import shtab
    except ModuleNotFoundError:
        remedy = "Run pip install 'dft-kernels[completion]'."
        print(f"dft-kernels --print-completion: shtab must be installed, got none. {remedy}", file=sys.stderr)
        return 1
    whole = argparse.ArgumentParser(prog="dft-kernels")
    whole.add_argument("--version", action="store_true")
    commands = whole.add_subparsers()
    for name, command in COMMANDS.items():
        try:
            options = [import_module(f".{name}", __package__).parser()]
        except (ImportError, RuntimeError) as error:
            print(f"dft-kernels: {name} is completed by name alone: {error}", file=sys.stderr)
            options = []
        commands.add_parser(name, help=command.about, parents=options, add_help=not options)
    print(shtab.complete(whole, shell=arguments[0]))
    return 0


def _run(name: str, arguments: list[str]) -> int:
    def say(error: object) -> None:
        text = " ".join(str(error).split()).removeprefix(f"{name}: ")
        print(f"dft-kernels {name}: {text}", file=sys.stderr)

    command, parser, options = COMMANDS[name], None, None
    try:
        if command.torch:
            require_torch()
        for package in command.needs:
            import_module(package)
        module = import_module(f".{name}", __package__)
        parser = module.parser()
        options = parser.parse_args(arguments)
        return int(module.run(options))
    except ModuleNotFoundError as error:
        say(f"{error.name} must be installed, got none. Run pip install 'dft-kernels[{command.extra}]'.")
        return 1
    except ImportError as error:
        say(str(error).removeprefix("dft_kernels: "))
        return 1
    except UsageError as error:
        say(error)
        return 2
    except BrokenPipeError:  # whoever read the output has enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own flush at exit fails again
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        say(str(error) if parser is None else parser.named(str(error)))
        return 1
    except KeyboardInterrupt:
        how = module.stopped(options) if options is not None and hasattr(module, "stopped") else ""
        say(f"stopped{how and '; '}{how}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
