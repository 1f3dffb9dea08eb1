"""The command `dft-kernels`."""

from __future__ import annotations

import sys
from importlib import import_module

_USAGE = """usage: dft-kernels COMMAND [options]

  demo            a real model trained by cross-entropy and towards a teacher's distributions, side by side
  train           a model towards a teacher, from a configuration file or flags
  sample          what a trained model writes, beside its base
  capture         run a teacher over texts and store its distributions
  store           what such a store holds (info), and whether it is whole (verify)
  target          statistics of human writing: build one from texts, list, show, blend
  bench           this loss against the bare matrix products, PyTorch's and other libraries' losses
  info [--json]   versions, backends available and why not, instruction sets, build stamp, defaults
"""

_COMMANDS = {
    **{name: f"commands.{name}" for name in ("bench", "capture", "demo", "gap", "sample", "store", "target")},
    "info": "info",
    "train": "training.train",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its own --help explains its options."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in _COMMANDS:
        try:
            return int(import_module(f"dft_kernels.{_COMMANDS[command]}").main(rest))
        except ModuleNotFoundError as error:
            print(
                f"dft-kernels {command}: {error.name} must be installed, got none. "
                "pip install --no-build-isolation -e '.[finetune]'.",
                file=sys.stderr,
            )
            return 1
    print(_USAGE, end="")
    if command in ("-h", "--help"):
        return 0
    print(
        f"dft-kernels: COMMAND must be one of {', '.join(sorted(_COMMANDS))}, got {command!r}. See the list above.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
