"""A headless Chromium that is asked over a pipe by the DevTools protocol: no port, no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
_FLAGS = (
    "--headless=new", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-extensions",
    "--disable-sync", "--mute-audio",
)  # fmt: skip
# Chromium reads descriptor 3 and writes 4, which this process may have taken: they are given from a process between.
_GIVE = "import fcntl, os, sys; r, w = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3]); \
os.dup2(r, 3); os.dup2(w, 4); os.close(r); os.close(w); os.execv(sys.argv[3], sys.argv[3:])"


class Page:
    """One page. events: all that it said, as (method, parameters)."""

    def __init__(self, read: int, write: int, patience: float) -> None:
        self.read, self.write, self.until = read, write, time.monotonic() + patience
        self.buffer, self.number, self.session = b"", 0, ""
        self.events: list[tuple[str, dict[str, Any]]] = []

    def message(self) -> dict[str, Any]:
        """The next one; TimeoutError past the patience."""
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(0.0, self.until - time.monotonic()))[0]:
                raise TimeoutError("chromium did not answer")
            more = os.read(self.read, 1 << 20)
            if not more:
                raise EOFError("chromium ended")
            self.buffer += more
        one, _, self.buffer = self.buffer.partition(b"\0")
        found: dict[str, Any] = json.loads(one)
        if "method" in found:
            self.events.append((found["method"], found["params"]))
        return found

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command."""
        self.number += 1
        asked = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            asked["sessionId"] = self.session
        os.write(self.write, json.dumps(asked).encode() + b"\0")
        while (found := self.message()).get("id") != self.number:
            pass
        assert "error" not in found, found
        return dict(found["result"])

    def show(self, file: Path, width: int, height: int = 800, dark: bool = False) -> None:
        """Open a file at a size and in a scheme, and wait until it is there."""
        self.ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=file.absolute().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self.message()

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression, which DevTools may evaluate where the page may not."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def picture(self, file: Path, top: float = 0, height: float | None = None) -> None:
        """A screenshot of the page, or of `height` from `top`."""
        size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"] - top, "scale": 1}
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        file.write_bytes(base64.b64decode(found["data"]))

    def pdf(self, file: Path) -> None:
        """The page as it is printed."""
        file.write_bytes(base64.b64decode(self.ask("Page.printToPDF", preferCSSPageSize=True)["data"]))


@contextmanager
def browser(profile: Path, patience: float = 60) -> Iterator[Page]:
    """A page of a Chromium of its own, which ends with the block."""
    assert FOUND is not None
    (read_theirs, write), (read, write_theirs) = os.pipe(), os.pipe()
    command = [FOUND, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", _GIVE, str(read_theirs), str(write_theirs), *command],
        pass_fds=(read_theirs, write_theirs), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read_theirs)
    os.close(write_theirs)
    page = Page(read, write, patience)
    try:
        targets = page.ask("Target.getTargets")["targetInfos"]
        (target,) = (one["targetId"] for one in targets if one["type"] == "page")
        page.session = page.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.ask(f"{domain}.enable")
        yield page
        page.session = ""
        page.ask("Browser.close")
    finally:
        os.close(write)
        os.close(read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
