"""A terminal for tests of what commands print."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading

import pytest

END = b"\0"  # which nothing else writes


class Terminal:
    """A pseudo-terminal in the place of stdout and stderr, and what was written to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reader, writer = pty.openpty()
        self.file = os.fdopen(writer, "w", buffering=1)
        self.parts: list[bytes] = []
        self.thread = threading.Thread(target=self.read, daemon=True)  # a test that fails ends all the same
        self.thread.start()
        for name, value in {"TERM": "xterm", "COLUMNS": "160"}.items():
            monkeypatch.setenv(name, value)
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, self.file)

    def read(self) -> None:
        """Up to END: the other end may stay open, in what multiprocessing started while it was stderr."""
        while not self.parts or not self.parts[-1].endswith(END):
            self.parts.append(os.read(self.reader, 1 << 16))

    def said(self) -> str:
        self.file.write(END.decode())
        self.file.close()
        self.thread.join()
        os.close(self.reader)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(self.parts).removesuffix(END).decode())
