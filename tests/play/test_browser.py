"""The page in a real Chromium: what a visitor sees and does, by mouse and by keyboard, and what the browser asks for."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no chromium and no chrome on PATH", allow_module_level=True)
pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
import uvicorn

from dft_kernels.commands.play import _listen
from dft_kernels.play.page import application
from dft_kernels.play.session import Served

pytestmark = pytest.mark.filterwarnings("ignore")  # gradio's own
PROMPT = "The cat sat ."


class Site:
    """A server in a thread, and a browser. slow: seconds that the model waits before each token."""

    def __init__(self, url: str, browser: Any, served: Served) -> None:
        self.url, self.browser, self.served, self.slow = url, browser, served, 0.0
        self.problems: list[str] = []

    def visitor(self, **context: Any) -> Any:
        """A page of a new visitor, whose requests and console are looked at."""
        page = self.browser.new_context(permissions=["clipboard-read", "clipboard-write"], **context).new_page()
        page.set_default_timeout(10_000)

        def asked(request: Any) -> None:
            if not request.url.startswith((self.url, "blob:" + self.url, "data:")):
                self.problems.append(f"asked for {request.url}")

        page.on("request", asked)
        page.on("websocket", lambda one: asked(one))
        page.on("console", lambda one: self.problems.append(one.text) if one.type in ("error", "warning") else None)
        page.on("pageerror", lambda one: self.problems.append(str(one)))
        page.goto(self.url)
        page.get_by_role("button", name="Write").wait_for()
        return page


@pytest.fixture(scope="module")
def site(model: Any, tokenizer: Any, target: Any, file: str) -> Iterator[Site]:
    served = Served({"tiny": model}, tokenizer, {file: target}, style_base=file)
    with _listen("127.0.0.1", None) as listening, sync_api.sync_playwright() as driver:
        server = uvicorn.Server(uvicorn.Config(application(served), log_level="critical", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        found = Site(f"http://127.0.0.1:{listening.getsockname()[1]}", browser, served)
        hook = model.register_forward_pre_hook(lambda *_: time.sleep(found.slow))
        yield found
        hook.remove()
        browser.close()
        server.should_exit = True
        thread.join()


@pytest.fixture
def visit(site: Site) -> Iterator[Any]:
    """A visitor; nothing may have been asked of anyone else, and nothing may have gone wrong, when they leave."""
    site.slow, site.problems = 0.0, []
    page = site.visitor()
    yield page
    for context in site.browser.contexts:
        context.close()
    assert site.problems == []


def status(page: Any, text: str) -> None:
    """Wait until it says so."""
    sync_api.expect(page.locator("#status")).to_contain_text(re.compile(text))


def write(page: Any, length: int = 60) -> None:
    page.get_by_label("Prompt").fill(PROMPT)
    page.get_by_label("number input for Length").fill(str(length))
    page.get_by_role("button", name="Write").click()


def test_a_text_is_written_beside_another(site: Site, visit: Any) -> None:
    write(visit)
    status(visit, r"Done: \d+ tokens")
    plain, shifted = (visit.locator(f"#text-{at}") for at in range(2))
    assert plain.locator(".token").count() > 5
    assert plain.inner_text() == shifted.inner_text()  # no setting yet
    token = plain.locator(".token").nth(2)
    assert re.fullmatch(r"‘.+’: entropy \d\.\d\d nats, shift 0\.000 nats", token.get_attribute("title"))
    token.hover()
    sync_api.expect(visit.locator("#looked-at")).to_have_text(token.get_attribute("title"))
    table = visit.locator(".prose.distances table")
    assert "in floors" in table.locator("caption").inner_text()
    assert table.locator("tbody tr").count() == 7
    assert "Last token" in visit.locator(".prose.summary").first.inner_text()
    assert PROMPT in visit.get_by_label("The same from the command line").input_value()


def test_a_slider_moves_the_text(site: Site, visit: Any) -> None:
    slider = visit.get_by_role("slider", name=re.compile("Diversity"))
    slider.focus()
    for _ in range(8):
        visit.keyboard.press("ArrowRight")
    write(visit)
    status(visit, r"Done: \d+ tokens")
    spent = visit.locator(".prose.distances tbody tr").last.locator("td").all_inner_texts()
    assert spent[0] == "0.00 nats"
    assert float(spent[1].split()[0]) > 0
    assert visit.locator("#text-1").locator(".shade1, .shade2, .shade3").count() > 0
    assert "--diversity 0.4 --compare" in visit.get_by_label("The same from the command line").input_value()


def test_cancel(site: Site, visit: Any) -> None:
    site.slow = 0.03
    write(visit, 256)
    status(visit, "Writing at most 256 tokens")
    visit.locator(".token").nth(3).wait_for()
    visit.get_by_role("button", name="Cancel").click()
    status(visit, r"Cancelled after \d+ tokens")
    assert visit.locator(".token").count() < 400


def test_errors_are_said(site: Site, visit: Any) -> None:
    visit.get_by_role("button", name="Write").click()
    status(visit, "prompt must hold a word, got an empty one")
    assert "error" in visit.locator("#status .status").get_attribute("class")
    visit.get_by_label("Prompt").fill("cat " * 600)
    visit.get_by_role("button", name="Write").click()
    status(visit, "at most 512 tokens, the model's positions, got a sequence of")
    write(visit, 10)
    status(visit, "Done")
    assert "error" not in visit.locator("#status .status").get_attribute("class")


def test_copy_and_save(site: Site, visit: Any) -> None:
    visit.get_by_role("button", name="Copy the command line").click()
    sync_api.expect(visit.locator("#looked-at")).to_contain_text("Nothing to copy")
    write(visit, 10)
    status(visit, "Done")
    visit.get_by_role("button", name="Copy the command line").click()
    sync_api.expect(visit.locator("#looked-at")).to_contain_text("copied")
    line = visit.evaluate("navigator.clipboard.readText()")
    assert line == visit.get_by_label("The same from the command line").input_value()
    with visit.expect_download() as download:
        visit.get_by_role("button", name="Save the pair as JSONL").click()
    lines = [json.loads(one) for one in Path(download.value.path()).read_text().splitlines()]
    assert download.value.suggested_filename == "pair.jsonl"
    assert [one["text"] for one in lines] == [visit.locator(f"#text-{at} .prose").text_content() for at in range(2)]


def focused(page: Any) -> str:
    return page.evaluate("""(() => { const one = document.activeElement;
        return one.className + ' ' + (one.ariaLabel || one.labels?.[0]?.innerText || one.innerText || ''); })()""")


def tab_to(page: Any, what: str, most: int = 40) -> None:
    for _ in range(most):
        page.keyboard.press("Tab")
        if re.search(what, focused(page)):
            return
    raise AssertionError(f"{what} was not reached")


def test_by_keyboard_alone(site: Site, visit: Any) -> None:
    tab_to(visit, "Prompt")
    visit.keyboard.type(PROMPT)
    tab_to(visit, "Write")
    visit.keyboard.press("Enter")
    status(visit, "Done")
    tab_to(visit, "token")
    first = visit.locator("#text-0")
    for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", -1), ("Home", 0)):
        visit.keyboard.press(key)
        every = first.locator(".token").all()
        assert every[at].evaluate("one => one === document.activeElement")
        assert visit.locator("#looked-at").inner_text() == every[at].get_attribute("title")
    tab_to(visit, "token", 1)
    assert visit.locator("#text-1").locator(".token").first.evaluate("one => one === document.activeElement")


def test_two_visitors(site: Site, visit: Any) -> None:
    """Neither sees the other's text; one waits and is told; one that leaves does not keep the other waiting."""
    site.slow = 0.03
    write(visit, 256)
    visit.locator(".token").nth(3).wait_for()
    other = site.visitor()
    other.get_by_label("Prompt").fill("It was late .")
    other.get_by_label("number input for Length").fill("8")
    other.get_by_role("button", name="Write").click()
    status(other, "Waiting: one text comes first")
    assert other.locator(".token").count() == 0
    assert PROMPT not in other.content()
    visit.context.close()
    status(other, r"Done: \d+ tokens")
    site.slow = 0.0
    assert "It was late ." in other.get_by_label("The same from the command line").input_value()
    assert PROMPT not in other.content()
    assert site.served.turns._line == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_sizes_and_schemes(site: Site, visit: Any, width: int, scheme: str) -> None:
    """Nothing is wider than the page, everything that is used has a name, and colours follow the scheme."""
    page = site.visitor(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.get_by_role("slider", name=re.compile("Diversity")).fill("0.5")
    write(page, 100)
    status(page, "Done")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    unnamed = page.evaluate("""[...document.querySelectorAll('button, input, textarea, select')].filter(one =>
        one.checkVisibility() && !(one.ariaLabel || one.labels?.length || one.innerText.trim() || one.title)
    ).map(one => one.outerHTML)""")
    assert unnamed == []
    ink = page.locator(".token").first.evaluate("one => getComputedStyle(one).color")
    assert ink == ("rgb(27, 28, 30)" if scheme == "light" else "rgb(231, 232, 234)")
    fonts = page.evaluate("[...document.fonts].map(one => one.family)")
    assert fonts == []
