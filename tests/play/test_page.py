"""The page as it is served: of this machine alone, with nothing from elsewhere, and its colours."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

gradio = pytest.importorskip("gradio")
from starlette.testclient import TestClient

from dft_kernels.commands import main as cli
from dft_kernels.commands import play
from dft_kernels.materials.sources import Trained
from dft_kernels.play import page
from dft_kernels.play.distances import Distance
from dft_kernels.play.session import Served, Session

TOKEN = "what every visitor knows"
ROOT = Path(page.__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")  # gradio's and starlette's own


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where this process connected to: another address fails."""
    seen: list[Any] = []

    def connect(self: Any, address: Any) -> None:
        seen.append(address)
        raise OSError("nobody is asked")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: seen.append(given) or [])
    return seen


def test_the_page_is_local(served: Served, local: list[Any]) -> None:
    with TestClient(page.application(served), base_url="http://127.0.0.1:7000") as client:
        found = client.get("/")
        assert found.status_code == 200
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", found.text)
        assert len(tags) > 2
        assert not [tag for tag in tags if re.search(r"""(?:src|href)=["']?(?:https?:)?//(?!127\.0\.0\.1)""", tag)]
        assert "connect-src 'self'" in found.headers["content-security-policy"]
        config = client.get("/config").json()
        assert config["analytics_enabled"] is False
        assert config["enable_queue"]
        assert "share" not in config or not config["share"]
        theme = client.get("/theme.css").text
        assert not re.search(r"@import|url\((?!['\"]?(?:data:|static/))", theme)
        assert client.get("/gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}
        assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404
        assert client.get("/gradio_api/file=/etc/passwd").status_code == 404
    assert local == []


def test_a_token_comes_first(served: Served, local: list[Any]) -> None:
    with TestClient(page.application(served, TOKEN), base_url="http://10.0.0.1:7000") as client:
        paths = ("/", "/config", "/theme.css", "/gradio_api/info", "/gradio_api/queue/data", "/gradio_api/file=/x",
                 "/assets/index.js", "/gradio_api/heartbeat/a", "/openapi.json", "/nothing")  # fmt: skip
        for path in paths:
            found = client.get(path)
            assert (found.status_code, "token must be given" in found.text) == (401, True), path
        assert client.post("/gradio_api/queue/join", json={}).status_code == 401
        assert client.get("/", params={"token": TOKEN}).status_code == 200
        assert client.get("/config").status_code == 200
    assert local == []


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_both_schemes() -> None:
    """WCAG 2.1, AA: 4.5 of text, 3 of outlines; grounds that tell shades apart."""
    sheet = (Path(page.__file__).parent / "page.css").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r"\{([^}]*--ink:[^}]*)\}", sheet)
    ]
    assert len(schemes) == 2
    for of, paper in zip(schemes, ("#ffffff", "#27272a"), strict=True):  # gradio's grounds
        grounds = [paper, of["shade1"], of["shade2"], of["shade3"]]
        pairs = [(4.5, of["ink"], ground) for ground in grounds]
        pairs += [(4.5, of[name], paper) for name in ("muted", "bad")] + [
            (3.0, of["link"], ground) for ground in grounds
        ]
        for least, one, on in pairs:
            bright, dark = sorted((luminance(one), luminance(on)), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= least, (one, on)


def test_the_table_says_what_it_is(served: Served) -> None:
    session = Session()
    assert page.table(served, session, []) == ""
    (name,) = served.rulers
    list(session.write(served, served.ask("The cat", length=3, style=name, target=name)))
    cells = [Distance("a <b>", 3.0, 2.0), Distance("c", why="too few words: 3 of 50"), Distance("d", 1.0, 0.0)]
    found = page.table(served, session, [cells, cells])
    assert "a &lt;b&gt;" in found
    assert found.count('<td title="distance 3.00, floor 2.00">1.5 floors</td>') == 2
    assert found.count("too few words: 3 of 50") == 2
    assert found.count("no floor") == 2
    assert found.count('scope="row"') == 4
    assert found.count('scope="col"') == 3
    assert "0.00 nats" in found


def test_errors_are_said_in_their_own_words() -> None:
    assert page._plain(ValueError("play: prompt must hold a word, got none. Write.")) == (
        "prompt must hold a word, got none. Write."
    )
    assert page._plain(ValueError("a b: c")) == "a b: c"
    assert page._plain(RuntimeError()) == "RuntimeError"


def test_the_files_of_the_page_are_packaged() -> None:
    listed = (ROOT / "pyproject.toml").read_text().split("[tool.setuptools.package-data]")[1].split("]\n")[0]
    assert {'"play/page.css"', '"play/page.js"'} <= set(re.findall(r'"[^"]+"', listed))


# ---- the command


def test_the_command_serves_on_this_machine(
    folder: Path, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served: list[tuple[Any, Any]] = []

    class Server:
        def __init__(self, application: Any) -> None:
            self.application = application

        def run(self, sockets: Any) -> None:
            served.append((self.application, sockets[0].getsockname()))

    monkeypatch.setattr(play, "server", Server)
    assert cli.main(["play", str(folder), "--target", file, "--style-base", file]) == 0
    out = capsys.readouterr().out
    ((application, (host, port)),) = served
    assert host == "127.0.0.1"
    assert port > 1023
    assert out == f"http://127.0.0.1:{port}/\n"
    assert application.token is None
    token = "sixteen letters & more"
    assert cli.main(["play", str(folder), "--host", "0.0.0.0", "--token", token]) == 0
    assert capsys.readouterr().out.endswith("?token=sixteen%20letters%20%26%20more\n")
    assert served[1][1][0] == "0.0.0.0"
    assert served[1][0].token == token


def test_errors_are_one_line_before_a_model_is_loaded(
    folder: Path, file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Trained, "load", lambda *_: pytest.fail("a model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for line, said in (
            (["--host", "0.0.0.0"], "--token must be given with --host 0.0.0.0, got none."),
            (
                ["--port", port],
                f"--port must be one that this machine can listen on, got {port}: Address already in use.",
            ),
            (
                ["--host", "203.0.113.1", "--token", "x" * 16],
                "--host must be one that this machine can listen on, got ",
            ),
            (["--target", "literary"], "tokenizer_sha256 must be "),
            (["--native", "literary"], "tokenizer_sha256 must be "),
        ):
            assert cli.main(["play", str(folder), *line]) == 1, line
            err = capsys.readouterr().err
            assert said in err
            assert err.startswith("dft-kernels play: ")
            assert err.count("\n") == 1
