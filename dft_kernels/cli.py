"""The command `dft-kernels`."""

from __future__ import annotations

import sys

from . import demo, info
from .benchmarks import command as bench
from .finetune import command as capture
from .targets import command as store

_USAGE = """usage: dft-kernels COMMAND [options]

  demo            a real model trained with the chunked and with the eager loss, side by side
  capture         run a teacher over texts and store its distributions
  store           what such a store holds (info), and whether it is whole (verify)
  bench           this loss against the bare matrix products, PyTorch's and other libraries' losses
  info [--json]   versions, backends available and why not, instruction sets, build stamp, defaults
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; its own --help explains its options."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    commands = {
        "bench": bench.main,
        "capture": capture.main,
        "demo": demo.main,
        "info": info.main,
        "store": store.main,
    }
    if command in commands:
        try:
            return commands[command](rest)
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
        f"dft-kernels: COMMAND must be one of {', '.join(commands)}, got {command!r}. See the list above.",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
