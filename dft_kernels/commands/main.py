"""The command `dft-kernels`: finds the command, and says in one line what went wrong."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import NamedTuple

from .arguments import UsageError

_TRAINING = ("transformers", "rich", "matplotlib")


class Command(NamedTuple):
    """A module of this folder with `parser()`, `run(options) -> exit code`, and where an interruption can be gone on
    from, `stopped(options)`, which says how."""

    about: str
    needs: tuple[str, ...] = ()  # packages that must be installed, of `extra`
    extra: str = "finetune"


COMMANDS = {
    "demo": Command("a real model trained by cross-entropy and towards a teacher's distributions, compared", _TRAINING),
    "train": Command("a model towards a teacher, from a configuration file or flags", _TRAINING),
    "sample": Command("what a model writes, beside its base or beside itself with other settings", _TRAINING),
    "play": Command("a page on this machine: a model token by token, beside its base or itself with settings",
                    ("transformers", "gradio", "scipy", "lexicalrichness"), "play"),
    "capture": Command("run a teacher over texts and store its distributions", _TRAINING),
    "store": Command("what such a store holds, whether it is whole, and one store of shards (info, verify, join)",
                     ("safetensors", "rich")),
    "target": Command("statistics of human writing: build one from texts, list, show, blend", ("safetensors", "rich")),
    "gap": Command("how far a model's writing lies from such a target, statistic by statistic", _TRAINING),
    "evaluate": Command("whether models write like people: every metric against human text, with its noise",
                        ("transformers", "rich", "lexicalrichness"), "evaluate"),
    "report": Command("what evaluations found, as one HTML page: is there a gap, was it closed, what did it cost",
                      ("jinja2", "matplotlib"), "evaluate"),
    "bench": Command("this loss against the bare matrix products, PyTorch's and other libraries' losses",
                     ("rich", "matplotlib"), "bench"),
    "info": Command("versions, backends available and why not, instruction sets, build stamp, defaults"),
}  # fmt: skip


def usage() -> str:
    """All commands, a line each."""
    lines = [f"  {name:9} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        ["usage: dft-kernels COMMAND [options]", "", *lines, "", "dft-kernels COMMAND --help: its options"]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Exit code 0: done; 1: it failed; 2: the command line is wrong; 130: interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if name in COMMANDS:
        return _run(name, rest)
    print(usage())
    if name in ("-h", "--help"):
        return 0
    known = ", ".join(sorted(COMMANDS))
    print(f"dft-kernels: COMMAND must be one of {known}, got {name!r}. See the list above.", file=sys.stderr)
    return 2


def _run(name: str, arguments: list[str]) -> int:
    def say(error: object) -> None:
        text = " ".join(str(error).split()).removeprefix(f"{name}: ")
        print(f"dft-kernels {name}: {text}", file=sys.stderr)

    command, parser, options = COMMANDS[name], None, None
    try:
        for package in command.needs:
            import_module(package)
        module = import_module(f".{name}", __package__)
        parser = module.parser()
        options = parser.parse_args(arguments)
        return int(module.run(options))
    except ModuleNotFoundError as error:
        say(f"{error.name} must be installed, got none. Run pip install 'dft-kernels[{command.extra}]'.")
        return 1
    except UsageError as error:
        say(error)
        return 2
    except (ValueError, RuntimeError, OSError) as error:
        say(str(error) if parser is None else parser.named(str(error)))
        return 1
    except KeyboardInterrupt:
        how = module.stopped(options) if options is not None and hasattr(module, "stopped") else ""
        say(f"stopped{how and '; '}{how}")
        return 130


if __name__ == "__main__":
    sys.exit(main())
