"""The page in a real Chromium: what a visitor sees and does, by mouse and keyboard, and what the browser asks for."""

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
sync_api.expect.set_options(timeout=20_000)

from dft_kernels.commands.play import listen, server
from dft_kernels.play.page import application
from dft_kernels.play.session import Served

pytestmark = pytest.mark.filterwarnings("ignore")  # gradio's own
PROMPT = "The cat sat ."
FAINT = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => parts(colour).slice(0, 3).map((x) => x / 255)
    .map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4))
    .reduce((sum, x, at) => sum + [0.2126, 0.7152, 0.0722][at] * x, 0);
  const ground = (one) => {
    for (; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if ((parts(colour)[3] ?? 1) === 1) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  for (const one of document.querySelectorAll("body *")) {
    const said = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!one.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const colours = said ? [getComputedStyle(one).color] : [];
    if (one.placeholder) colours.push(getComputedStyle(one, "::placeholder").color);
    for (const colour of colours) {
      const [dark, bright] = [luminance(colour), luminance(ground(one))].sort((a, b) => a - b);
      const ratio = (bright + 0.05) / (dark + 0.05);
      if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} ${colour} on ${ground(one)}: ${one.outerHTML.slice(0, 120)}`);
    }
  }
  return [...new Set(faint)];
}"""  # text of less contrast than WCAG 2.1 asks for, AA


class Site:
    """A server in a thread, and a browser. slow: seconds that the model waits before each token."""

    def __init__(self, url: str, browser: Any, served: Served) -> None:
        self.url, self.browser, self.served, self.slow = url, browser, served, 0.0
        self.problems: list[str] = []

    def visitor(self, **context: Any) -> Any:
        """A page of a new visitor, whose requests and console are looked at."""
        page = self.browser.new_context(permissions=["clipboard-read", "clipboard-write"], **context).new_page()
        page.set_default_timeout(20_000)

        def asked(request: Any) -> None:
            if not request.url.startswith((f"{self.url}/", f"blob:{self.url}/", "data:")):
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
    with listen("127.0.0.1", None) as listening, sync_api.sync_playwright() as driver:
        running = server(application(served))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        found = Site(f"http://127.0.0.1:{listening.getsockname()[1]}", browser, served)
        hook = model.register_forward_pre_hook(lambda *_: time.sleep(found.slow))
        yield found
        hook.remove()
        browser.close()
        running.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def visitor(site: Site) -> Any:
    return site.visitor()


@pytest.fixture
def visit(site: Site, visitor: Any) -> Iterator[Any]:
    """A visitor; nothing may have been asked of anyone else, and nothing may have gone wrong, when the test ends."""
    site.slow = 0.0
    visitor.get_by_label("number input for Diversity").fill("0")
    yield visitor
    assert site.problems == []


def status(page: Any, text: str) -> None:
    """Wait until it says so."""
    sync_api.expect(page.locator("#status")).to_contain_text(re.compile(text), timeout=20_000)


def write(page: Any, prompt: str = PROMPT, length: int = 30) -> None:
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("number input for Length").fill(str(length))
    page.get_by_role("button", name="Write").click()


def command(page: Any) -> str:
    return page.get_by_label("The same from the command line").input_value()


def test_two_texts_are_written_copied_and_saved(site: Site, visit: Any) -> None:
    looked_at = sync_api.expect(visit.locator("#looked-at"))
    if not command(visit):
        visit.get_by_role("button", name="Copy the command line").click()
        looked_at.to_contain_text("Nothing to copy")
    write(visit, length=60)
    status(visit, "Done: 60 tokens")
    plain, shifted = (visit.locator(f"#text-{at} .prose") for at in range(2))
    assert plain.text_content() == shifted.text_content()  # no setting yet
    token = plain.locator(".token").nth(2)
    assert re.fullmatch(r"‘.+’: entropy \d\.\d\d nats, shift 0\.000 nats", token.get_attribute("title"))
    token.hover()
    looked_at.to_have_text(token.get_attribute("title"))
    slider = visit.get_by_role("slider", name=re.compile("Diversity"))
    slider.focus()
    for _ in range(8):
        visit.keyboard.press("ArrowRight")
    write(visit, length=60)
    sync_api.expect(visit.get_by_label("The same from the command line")).to_have_value(re.compile("diversity"))
    status(visit, "Done: 60 tokens")
    assert plain.text_content() != shifted.text_content()
    assert shifted.locator(".shade1, .shade2, .shade3").count() > 0
    table = visit.locator(".prose.distances table")
    assert "in floors" in table.locator("caption").inner_text()
    rows = [row.locator("td").all_inner_texts() for row in table.locator("tbody tr").all()]
    assert len(rows) == 7
    assert all(re.fullmatch(r"\d+\.\d floors|too few \w+: \d+ of \d+", cell) for row in rows[:6] for cell in row)
    assert rows[6][0] == "0.00 nats"
    assert float(rows[6][1].split()[0]) > 0
    assert "Last token" in visit.locator(".prose.summary").first.inner_text()
    assert command(visit).endswith("--length 60 --seed 0 --diversity 0.4 --compare")
    visit.get_by_role("button", name="Copy the command line").click()
    looked_at.to_contain_text("copied")
    assert visit.evaluate("navigator.clipboard.readText()") == command(visit)
    visit.evaluate("navigator.clipboard.writeText('').then(() => { navigator.clipboard.writeText = undefined; })")
    visit.get_by_role("button", name="Copy the command line").click()  # as where the page came over plain HTTP
    looked_at.to_contain_text("copied, the old way")
    assert visit.evaluate("navigator.clipboard.readText()") == command(visit)
    with visit.expect_download() as download:
        visit.get_by_role("button", name="Save the pair as JSONL").click()
    assert download.value.suggested_filename == "pair.jsonl"
    lines = [json.loads(one) for one in Path(download.value.path()).read_text().splitlines()]
    assert [one["text"] for one in lines] == [plain.text_content(), shifted.text_content()]


def test_errors_are_said_and_cancelling_works(site: Site, visit: Any) -> None:
    write(visit, "")
    status(visit, "prompt must hold a word, got an empty one")
    line = visit.locator("#status .status")
    assert "error" in line.get_attribute("class")
    write(visit, "cat " * 600)
    status(visit, "at most 512 tokens, the model's positions, got a sequence of 630")
    site.slow = 0.03
    write(visit, length=256)
    status(visit, "Writing at most 256 tokens")
    assert "error" not in line.get_attribute("class")
    sync_api.expect(visit.locator("#text-1 .token").nth(3)).to_be_visible()
    visit.get_by_role("button", name="Cancel").click()
    status(visit, r"Cancelled after \d+ tokens")
    assert 0 < visit.locator("#text-1 .token").count() < 256
    site.slow = 0.0
    write(visit, length=5)
    status(visit, "Done: 5 tokens")


def focused(page: Any) -> str:
    return page.evaluate("""(() => { const one = document.activeElement;
        return one.className + ' ' + (one.ariaLabel || one.labels?.[0]?.innerText || one.innerText || ''); })()""")


def tab_to(page: Any, what: str) -> None:
    for _ in range(40):
        page.keyboard.press("Tab")
        if re.search(what, focused(page)):
            return
    raise AssertionError(f"{what} was not reached")


def test_by_keyboard_alone(site: Site, visit: Any) -> None:
    visit.get_by_label("Prompt").fill("")
    visit.locator("h1").click()  # from where Tab goes on
    visit.mouse.move(0, 0)  # over no token, wherever text moves to
    tab_to(visit, "Prompt")
    visit.keyboard.type("The dog ran .")
    tab_to(visit, "Write")
    visit.keyboard.press("Enter")
    sync_api.expect(visit.get_by_label("The same from the command line")).to_have_value(re.compile("dog ran"))
    status(visit, "Done")
    tab_to(visit, "token")
    first = visit.locator("#text-0 .token")
    for key, at in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", -1), ("Home", 0)):
        visit.keyboard.press(key)
        one = first.last if at < 0 else first.nth(at)
        sync_api.expect(one).to_be_focused()
        sync_api.expect(visit.locator("#looked-at")).to_have_text(one.get_attribute("title"))
    visit.keyboard.press("Tab")
    sync_api.expect(visit.locator("#text-1 .token").first).to_be_focused()
    for name in ("Copy the command line", "Save the pair", "range slider for Temperature", "Style", "Seed"):
        tab_to(visit, name)


def test_two_visitors_do_not_meet(site: Site, visit: Any) -> None:
    """Neither sees the other's text; one waits and is told; one that leaves does not keep the other waiting."""
    leaving = site.visitor()
    site.slow = 0.03
    write(leaving, length=256)
    sync_api.expect(leaving.locator("#text-1 .token").nth(3)).to_be_visible()
    write(visit, "It was late .", 8)
    status(visit, "Waiting: one text comes first")
    assert visit.locator(".token").count() == 0
    assert PROMPT not in visit.content()
    leaving.context.close()
    status(visit, "Done: 8 tokens")
    assert "It was late ." in command(visit)
    assert PROMPT not in visit.content()
    assert site.served.turns._line == []


def test_sizes_and_schemes(site: Site, visit: Any) -> None:
    """Nothing is wider than the page, all that is used has a name, and all text stands out, in both schemes."""
    write(visit)
    status(visit, "Done")
    visit.add_style_tag(content="* { transition: none !important; }")  # colours at once
    for width in (390, 1280):
        for scheme, ink in (("light", "rgb(27, 28, 30)"), ("dark", "rgb(231, 232, 234)")):
            visit.set_viewport_size({"width": width, "height": 800})
            visit.emulate_media(color_scheme=scheme)
            sync_api.expect(visit.locator(".token").first).to_have_css("color", ink)
            assert visit.evaluate("document.documentElement.scrollWidth") <= width
            assert visit.evaluate(FAINT) == []
    unnamed = visit.evaluate("""[...document.querySelectorAll('button, input, textarea, select')].filter(one =>
        one.checkVisibility() && !(one.ariaLabel || one.labels?.length || one.innerText.trim() || one.title)
    ).map(one => one.outerHTML)""")
    assert unnamed == []
    loaded = "[...document.fonts].filter(one => one.status !== 'unloaded').map(one => one.family)"
    assert visit.evaluate(loaded) == []
