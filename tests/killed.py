"""Commands that are killed: each in a process of its own, by SIGKILL, at a place among what it does to its folder."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

PLACES = 10
TOUCHES = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir", "shutil.rmtree")
_forks = multiprocessing.get_context("forkserver")  # of a process that has imported all of it and computed nothing
_forks.set_forkserver_preload(["dft_kernels.commands.train", "dft_kernels.commands.capture"])


def _run(line: list[str], folder: str, place: int | None, after: float, counted: str) -> None:
    """The command; SIGKILL `after` seconds from the event number `place` in its folder on. The number of all events
    goes into a file."""
    import torch

    from dft_kernels.commands import main as cli

    torch.set_num_threads(1)
    events = 0

    def kill() -> None:
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events
        if event in TOUCHES and arguments and str(arguments[0]).startswith(folder):
            events += 1
            if events == place:
                threading.Thread(target=kill).start() if after else kill()

    with Path(counted).with_suffix(".out").open("a") as said:
        sys.addaudithook(heard)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(line)
    Path(counted).write_text(str(events))
    sys.exit(code)


def run(line: list[str], folder: Path, place: int | None = None, after: float = 0.0) -> tuple[int, int, str]:
    """Exit code (-9: killed), events in the folder if it ended, what was said."""
    counted = folder.with_name(f"{folder.name}.events")
    process = _forks.Process(target=_run, args=(line, str(folder), place, after, str(counted)))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "still running"
    said = counted.with_suffix(".out").read_text()
    return process.exitcode, int(counted.read_text()) if process.exitcode == 0 else 0, said


def until_it_ends(line: list[str], folder: Path, events: int, seed: int) -> None:
    """The same command, killed twice at random places among `events`, and run again until it ends."""
    drawn = random.Random(seed)
    for _ in range(2):
        place, after = drawn.randint(1, events), drawn.choice((0.0, drawn.uniform(0.0, 0.03)))
        code, _, said = run(line, folder, place, after)
        assert code in (0, -signal.SIGKILL), said
    code, _, said = run(line, folder)
    assert code == 0, said
