"""Who is let through, to whatever it asks for, and what a page may fetch."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

import pytest

from dft_kernels.play import guard
from dft_kernels.play.guard import COOKIE, Guard, Local, is_loopback

TOKEN = "a token; of 20 letters"
PATHS = [
    "/",
    "/config",
    "/gradio_api/queue/join",
    "/gradio_api/queue/data",
    "/gradio_api/file=/etc/passwd",
    "/assets/x.js",
]


class Inner:
    """What is guarded: counts who comes."""

    def __init__(self, page: list[bytes] | None = None, kind: bytes = b"text/html; charset=utf-8") -> None:
        self.calls: list[str] = []
        self.page, self.kind = page or [b"inside"], kind
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls.append(scope["type"])
        self.scopes.append(scope)
        if scope["type"] == "http":
            length = str(sum(map(len, self.page))).encode()
            headers = [(b"content-type", self.kind), (b"content-length", length)]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for number, part in enumerate(self.page):
                await send({"type": "http.response.body", "body": part, "more_body": number + 1 < len(self.page)})


def asked(
    app: Any, path: str = "/", kind: str = "http", query: str = "", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """status, headers and body; of a websocket its code."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    named = {"host": "127.0.0.1:8000", **headers}
    scope = {
        "type": kind, "path": path, "query_string": query.encode(), "method": "GET",
        "headers": [(name.encode(), value.encode()) for name, value in named.items()],
    }  # fmt: skip
    asyncio.run(app(scope, None, send))
    if kind != "http":
        return (sent[0]["code"] if sent else 0), {}, b""
    given = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], given, b"".join(one.get("body", b"") for one in sent[1:])


def test_what_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.com", "127.0.0.1.example.com", "")))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_nothing_is_served_without_the_token(path: str, kind: str) -> None:
    inner = Inner()
    app = Guard(inner, TOKEN)
    refused = 401 if kind == "http" else 1008
    for headers in ({}, {"cookie": f"{COOKIE}=wrong"}, {"cookie": f"{COOKIE}={TOKEN}"}, {"cookie": "a; =; b=c"}):
        assert asked(app, path, kind, **headers)[0] == refused
    for query in ("token=", "token=a+token", "token=%FF", "Token=" + TOKEN):
        assert asked(app, path, kind, query)[0] == refused
    assert inner.calls == []


def test_the_token_in_the_query_gives_a_cookie() -> None:
    inner = Inner()
    app = Guard(inner, TOKEN)
    status, headers, _ = asked(app, query="token=a%20token%3B%20of%2020%20letters")
    assert (status, headers["location"], inner.calls) == (303, "/", [])
    cookie, *rest = headers["set-cookie"].split("; ")
    assert rest == ["HttpOnly", "SameSite=Strict", "Path=/"]
    assert TOKEN not in headers["set-cookie"]
    for path in PATHS:
        assert asked(app, path, cookie=f"other=1; {cookie}")[0] == (404 if "file=" in path else 200)
    assert inner.calls == ["http"] * (len(PATHS) - 1)
    assert asked(Guard(inner, TOKEN + "."), cookie=cookie)[0] == 401


def test_the_token_may_be_compared_by_who_counts_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every comparison is of two digests, by hmac."""
    compared: list[tuple[bytes, bytes]] = []

    def noted(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", noted)
    app = Guard(Inner(), TOKEN)
    for given in ("x", "a token", TOKEN, "y" * 10_000):
        asked(app, query=f"token={given}")
        asked(app, cookie=f"{COOKIE}={given.replace(';', '')}")
    assert len(compared) == 8
    assert {len(one) for pair in compared for one in pair} == {32}


def test_a_page_of_this_machine_is_not_reached_by_another_name() -> None:
    inner = Inner()
    app = Guard(inner)
    for host in ("127.0.0.1:1", "localhost:80", "[::1]:5", "localhost"):
        assert asked(app, host=host)[0] == 200
    assert len(inner.calls) == 4
    for host in ("evil.example:8000", "127.0.0.1.evil.example", "10.0.0.1:80", ""):
        assert asked(app, host=host)[0] == 421
    assert len(inner.calls) == 4
    assert asked(Guard(inner, TOKEN), host="10.0.0.1:80")[0] == 401


@pytest.mark.parametrize("token", [None, TOKEN])
def test_pages_of_others_may_not_ask_nor_anyone_for_what_the_page_does_not(token: str | None) -> None:
    inner = Inner()
    app = Guard(inner, token)
    cookie = asked(app, query="token=a%20token%3B%20of%2020%20letters")[1].get("set-cookie", "").split("; ")[0]
    inner.calls.clear()
    for kind in ("http", "websocket"):
        for origin in ("http://evil.example", "null", "http://127.0.0.1:9"):
            assert asked(app, "/gradio_api/queue/join", kind, origin=origin, cookie=cookie)[0] in (403, 1008)
    for path in ("upload", "file=/etc/passwd", "proxy=http://x", "deep_link", "call/wrote", "component_server", "runs"):
        for end in ("", "/"):
            assert asked(app, f"/gradio_api/{path}{end}", cookie=cookie)[0] == 404
    for path in ("/monitoring", "/gradio_api/queue/data/x", "/assets", "//", "/ "):
        assert asked(app, path, cookie=cookie)[0] == 404
    assert asked(app, "/", "websocket", cookie=cookie)[0] == 1008
    assert inner.calls == []
    assert asked(app, origin="http://127.0.0.1:8000", cookie=cookie)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [{"content-length": str(guard.LARGEST + 1)}, {"content-length": "-1"}, {"content-length": "x"},
     {"transfer-encoding": "chunked"}],
)  # fmt: skip
def test_a_huge_request_is_not_read(headers: dict[str, str]) -> None:
    inner = Inner()
    assert asked(Guard(inner), "/gradio_api/queue/join", **headers)[0] == 413
    assert inner.calls == []
    assert asked(Guard(inner), "/gradio_api/queue/join", **{"content-length": str(guard.LARGEST)})[0] == 200


def test_the_life_of_the_server_is_not_guarded() -> None:
    inner = Inner()
    asked(Guard(Local(inner), TOKEN), kind="lifespan")
    assert inner.calls == ["lifespan"]


ELSEWHERE = b"""<head><link rel="preconnect" href="https://fonts.example" /><link
  rel="preconnect" href='//fonts.example' crossorigin="anonymous"
/><script
  src="https://cdn.example/a.js" async
></script><link rel="stylesheet" href="./assets/a.css"><script type="module" src="./assets/a.js"></script>
<script>const a = "https://x.example"; // kept</script><meta property="og:url" content="https://x.example/"></head>"""


def test_a_page_fetches_nothing_from_elsewhere() -> None:
    inner = Inner([ELSEWHERE[:50], ELSEWHERE[50:], b""])
    status, headers, body = asked(Local(inner), **{"accept-encoding": "br"})
    assert status == 200
    assert b"fonts.example" not in body
    assert b"cdn.example" not in body
    assert body.count(b"<script") == body.count(b"</script>") == 2
    assert body.count(b"<link") == 1
    assert b'const a = "https://x.example"' in body
    assert int(headers["content-length"]) == len(body)
    assert "connect-src 'self'" in headers["content-security-policy"]
    assert all(name != b"accept-encoding" for name, _ in inner.scopes[0]["headers"])


def test_what_is_no_page_passes_as_it_is() -> None:
    _, headers, body = asked(Local(Inner([ELSEWHERE], b"text/event-stream")), "/queue")
    assert body == ELSEWHERE
    assert "content-security-policy" not in headers
    assert guard.SHORTEST == 16
