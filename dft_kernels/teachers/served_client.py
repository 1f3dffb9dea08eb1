"""HTTP for a served teacher: a pool of connections, retries until a deadline, and replies of bounded size.

Nothing here knows what is asked. Faults that pass (no connection, a broken one, 408, 429, 5xx) are tried again until
the deadline, so that a server may be restarted meanwhile; all others are raised at once. Every error names the request
and never holds the key.
"""

from __future__ import annotations

import json
import os
import queue
import random
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NoReturn
from urllib.parse import urlsplit

from ..errors import fail

KEY = "DFT_KERNELS_API_KEY"  # environment variable of the key that is not given
CONNECT_SECONDS = 10.0
BACKOFF = (0.25, 8.0)  # seconds: the first pause, the longest; each is drawn from half of it to all of it
FIRST = 20.0  # seconds that a server which never answered is waited for
_AGAIN = {408, 429, *range(500, 600)}
_SMALL = 1 << 20  # bytes of a reply that says no more than what a server is
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Client:
    """JSON over HTTP to one server, from any thread.

    url: http or https, host, and a path where the server lies below one. key: sent as a bearer token, to this host
    alone; None: of the environment variable KEY, if it is set. deadline: seconds until the answer, with all tries.
    """

    def __init__(self, url: str, key: str | None, deadline: float, connections: int) -> None:
        self.url, self.deadline = checked_url(url), deadline
        self.reached = (
            False  # whether the server has ever answered: until then a wrong address is likelier than a restart
        )
        self._key = os.environ.get(KEY, "") if key is None else key
        if not (self._key.isascii() and self._key.isprintable()):
            fail("ServedTeacher", "api_key", "be printable ASCII", "another text", f"Check it, or {KEY}")
        self._httpx = _httpx()
        headers = {"Accept-Encoding": "identity"}  # a reply's size is known before it is unpacked
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
            if urlsplit(self.url).scheme == "http" and urlsplit(self.url).hostname not in _LOOPBACK:
                warnings.warn(
                    f"ServedTeacher: the API key goes to {self.url} unencrypted. Use https.",
                    RuntimeWarning,
                    stacklevel=4,
                )
        limits = self._httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        self._http = self._httpx.Client(headers=headers, limits=limits, follow_redirects=False)
        self._closed = threading.Event()
        self._random = random.Random()

    def __repr__(self) -> str:
        return f"Client({self.url!r})"

    def close(self) -> None:
        """End all tries, and the connections."""
        self._closed.set()
        self._http.close()

    def check_open(self) -> None:
        """Refuse to ask after `close`."""
        if self._closed.is_set():
            fail("ServedTeacher", self.url, "be asked before close()", "a request after it", "Make another")

    def ask(self, path: str, body: Any = None, *, what: str = "", limit: int = _SMALL, optional: bool = False) -> Any:
        """The JSON of the answer to a GET, or to a POST of `body`. what: the request, for errors; limit: bytes of the
        reply; optional: None where the server has no such path."""
        method = "GET" if body is None else "POST"
        name = f"{method} {self.url}{path}{what and f' for {what}'}"
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        deadline = self.deadline if self.reached else min(self.deadline, FIRST)
        until, tries, pause = time.monotonic() + deadline, 0, BACKOFF[0]
        while True:
            self.check_open()
            tries += 1
            try:
                status, data, after = self._once(name, method, path, content, until, limit)
                self.reached = True
            except self._httpx.RequestError as error:
                why, after = f"{type(error).__name__} ({self._plain(str(error))})", 0.0
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    remedy = "Give the host that the certificate is of, or its authority by SSL_CERT_FILE"
                    _refuse(name, "have a certificate that verifies", self._plain(str(error)), remedy)
            else:
                if optional and status in (404, 405):
                    return None
                if status not in _AGAIN:
                    return self._parsed(name, status, data)
                why = f"{status} ({self._plain(data)})"
            wait = max(after, pause * self._random.uniform(0.5, 1.0))
            pause = min(2 * pause, BACKOFF[1])
            if time.monotonic() + wait >= until:
                got = f"{why} at the last of {tries} tries"
                remedy = "Nothing was trained on it: start the server, or raise deadline, and go on from the last step"
                if not self.reached:
                    remedy = "Check the address, and that the server is up"
                fail("ServedTeacher", name, f"be answered within {deadline:g} s", got, remedy, ConnectionError)
            self._closed.wait(wait)

    def _once(
        self, name: str, method: str, path: str, content: bytes | None, until: float, limit: int
    ) -> tuple[int, bytes, float]:
        """Status, body, and the seconds that the server asks to wait."""
        left = max(0.001, until - time.monotonic())
        timeout = self._httpx.Timeout(left, connect=min(left, CONNECT_SECONDS))
        headers = {} if content is None else {"Content-Type": "application/json"}
        parts: list[bytes] = []
        size = 0
        with self._http.stream(method, f"{self.url}{path}", content=content, headers=headers, timeout=timeout) as reply:
            for part in reply.iter_bytes():
                size += len(part)
                if size > limit:
                    got = f"more: {self._plain(b''.join(parts)[:40])}..."
                    _refuse(name, f"be answered in {limit:,} bytes at most", got, "Check what answers at this address")
                if time.monotonic() > until:
                    raise self._httpx.ReadTimeout("the reply did not end")
                parts.append(part)
            after = reply.headers.get("Retry-After", "")
            return reply.status_code, b"".join(parts), float(after) if after.isdecimal() else 0.0

    def _parsed(self, name: str, status: int, data: bytes) -> Any:
        if 300 <= status < 400:
            _refuse(name, "be answered by this host", f"{status}, a redirect", "Give the address that it leads to")
        if status in (401, 403):
            given = "a key that it refuses" if self._key else "no key"
            _refuse(name, "have the server's leave", f"{status} for {given}", f"Give api_key, or set {KEY}")
        if status != 200:
            _refuse(name, "be answered by 200", f"{status} ({self._plain(data)})", "Change what the server names")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            why = "brackets nested too deep" if isinstance(error, RecursionError) else str(error)
            got = f"{self._plain(why)}: {self._plain(data[:40])}"
            _refuse(name, "be answered by JSON", got, "Check what answers at this address")

    def _plain(self, text: str | bytes) -> str:
        """A short line of what a server or a library says, without the key."""
        text = text if isinstance(text, str) else text[:4096].decode("utf-8", "replace")
        text = text.replace(self._key, "***") if self._key else text
        text = "".join(letter if letter.isprintable() else " " for letter in text)
        text = " ".join(text.split()).encode("utf-8", "backslashreplace").decode()
        return text if len(text) <= 300 else f"{text[:300]}..."


class Workers:
    """Threads that run functions in the order they were given. They are daemons: a server that never answers does not
    keep the process from ending, which concurrent.futures' own threads do."""

    def __init__(self, threads: int) -> None:
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name="dft_kernels.ServedTeacher", daemon=True)
                         for _ in range(threads)]  # fmt: skip
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[[], Any]) -> Future[Any]:
        """Its result, later. One that nobody began can be cancelled."""
        future: Future[Any] = Future()
        self._waiting.put((future, function))
        return future

    def close(self) -> None:
        """End each thread after what it is at; what waits is cancelled."""
        try:
            while (item := self._waiting.get_nowait()) is not None:
                item[0].cancel()
        except queue.Empty:
            pass
        for _ in self._threads:
            self._waiting.put(None)

    def _run(self) -> None:
        while (item := self._waiting.get()) is not None:
            future, function = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # raised where the result is asked for
                    future.set_exception(error)


def _refuse(name: str, relation: str, got: object, remedy: str) -> NoReturn:
    fail("ServedTeacher", name, relation, got, remedy)


def checked_url(url: str) -> str:
    """A server's address without the slash at its end."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or any(letter.isspace() for letter in url):
        fail("ServedTeacher", "url", "be http://HOST[:PORT] or https://HOST[:PORT]", repr(url[:80]), "Write it so")
    if parts.username is not None or parts.query or parts.fragment:
        got = "one with " + ("a user" if parts.username is not None else "a query")  # which may be secret
        fail("ServedTeacher", "url", "hold no user, query or fragment", got, "Give the key by api_key")
    return url.rstrip("/").removesuffix("/v1")


def _httpx() -> Any:
    try:
        import httpx
    except ModuleNotFoundError as error:
        remedy = "Run pip install 'dft-kernels[served]'"
        raise ValueError(f"ServedTeacher: httpx must be installed, got none. {remedy}.") from error
    return httpx
