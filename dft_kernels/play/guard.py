"""What stands between the network and the page: who may ask, and that the page asks nothing of anyone else.

Both classes are ASGI applications around another, and see every request: pages, queues, files and websockets.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

SHORTEST = 16  # characters of a token
LARGEST = 1 << 21  # bytes of a request: the longest prompt, escaped, and some more
COOKIE = "dft_kernels_play"
_PATHS = re.compile(  # what the page asks for; not what gradio serves besides, as uploads, proxies, links that are kept
    r"/(?:favicon\.ico|manifest\.json|theme\.css|config|(?:assets|static)/.*"
    r"|gradio_api/(?:info|app_id|startup-events|heartbeat/\w+|queue/join|queue/data))?"
)
_POLICY = (  # of a page: nothing from elsewhere, whatever a text or a component holds
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; connect-src 'self'; object-src 'none'; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
_ELSEWHERE = re.compile(rb"""<(script|link)\b[^>]*\b(?:src|href)\s*=\s*["']?(?:https?:)?//[^>]*>(?:\s*</\1>)?""", re.I)


def is_loopback(host: str) -> bool:
    """Whether an address or name can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Lets a request through that has the token: in the query once, as `/?token=...`, which sets a cookie, and in that
    cookie from then on. Compared in constant time.

    token None: a page of this machine alone, of which a name that leads here by someone else's DNS is refused. Requests
    that a page of another origin makes are refused either way, and so is what the page does not ask for.
    """

    def __init__(self, app: App, token: str | None = None) -> None:
        self.app, self.token = app, token
        self._cookie = hmac.new((token or "").encode(), COOKIE.encode(), hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(scope, send, *refusal)
        elif self.token is None or self._known(headers.get("cookie", "")):
            if scope["type"] == "http" and _PATHS.fullmatch(scope["path"]):
                await self.app(scope, receive, send)
            else:
                await _answer(scope, send, 404, "play: the path must be one that the page asks for, got another.\n")
        elif scope["type"] == "http" and self._asked(scope):
            cookie = f"{COOKIE}={self._cookie}; HttpOnly; SameSite=Strict; Path=/"
            more = [(b"location", b"/"), (b"set-cookie", cookie.encode())]
            await _answer(scope, send, 303, "", more)
        else:
            await _answer(scope, send, 401, "play: the token must be given, as /?token=TOKEN, got none or another.\n")

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if self.token is None and not is_loopback(re.sub(r":\d+$", "", host)):
            return 421, "play: the host must be this machine, got another. Ask for 127.0.0.1.\n"
        origin = headers.get("origin")
        if origin is not None and re.sub(r"^https?://", "", origin) != host:
            return 403, "play: the origin must be the page itself, got another.\n"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > LARGEST or "transfer-encoding" in headers:
            return 413, f"play: a request must say that it has at most {LARGEST} bytes, got another.\n"
        return None

    def _known(self, cookies: str) -> bool:
        values = [
            value for name, _, value in (one.strip().partition("=") for one in cookies.split(";")) if name == COOKIE
        ]
        return any(_same(value, self._cookie) for value in values)

    def _asked(self, scope: Scope) -> bool:
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        return any(_same(one, self.token or "") for one in given)


def _same(given: str, known: str) -> bool:
    """In a time that neither says how much is right nor how long the known one is."""
    first, second = (hashlib.sha256(one.encode("utf-8", "surrogatepass")).digest() for one in (given, known))
    return hmac.compare_digest(first, second)


async def _answer(
    scope: Scope, send: Send, status: int, text: str, headers: list[tuple[bytes, bytes]] | None = None
) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    start = [(b"content-type", b"text/plain; charset=utf-8"), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": text.encode()})


class Local:
    """Takes out of pages what a browser would fetch from elsewhere, as gradio's own page has it (fonts, a script for
    frames), and has the browser refuse what is left or added."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] == "/":  # as it is, to be read here
            scope = {**scope, "headers": [one for one in scope["headers"] if one[0].lower() != b"accept-encoding"]}
        start: MutableMapping[str, Any] | None = None
        parts: list[bytes] = []

        async def passing(message: MutableMapping[str, Any]) -> None:
            nonlocal start
            if message["type"] == "http.response.start" and _is_page(message["headers"]):
                start = message
            elif start is None or message["type"] != "http.response.body":
                await send(message)
            else:
                parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    body = _ELSEWHERE.sub(b"", b"".join(parts))
                    await send({**start, "headers": _headers(start["headers"], len(body))})
                    await send({"type": "http.response.body", "body": body})

        await self.app(scope, receive, passing)


def _is_page(headers: list[tuple[bytes, bytes]]) -> bool:
    found = {name.lower(): value for name, value in headers}
    return found.get(b"content-type", b"").startswith(b"text/html") and b"content-encoding" not in found


def _headers(headers: list[tuple[bytes, bytes]], length: int) -> list[tuple[bytes, bytes]]:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    return [
        *kept, (b"content-length", str(length).encode()), (b"content-security-policy", _POLICY.encode()),
        (b"referrer-policy", b"same-origin"), (b"x-content-type-options", b"nosniff"),
    ]  # fmt: skip
