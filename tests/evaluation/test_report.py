"""The page of an evaluation: what it says of the numbers, that it is whole and safe, and how a browser shows it."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import chromium
import pytest
from evaluations import NAMES, evaluation

from dft_kernels.commands import main as cli
from dft_kernels.evaluation import report
from dft_kernels.evaluation.results import Evaluation, Phrase, Text

NASTY = (
    "</style></title><script src=//x.y>alert(1)</script><img src=x onerror=alert(2)> \"'`&amp; \x00\x07\x1b[31m\x85 "
    "\u202eabc\u2066 \U0001f600\U00020000 $x^2$ {{ 7 * 7 }} {% raw %} url(http://x.y) javascript:void(0) --> ]]> \ufffe"
)
VOID = {"meta", "br", "link", "img", "input", "hr"}
ROOT = Path(report.__file__).parents[2]


def poisoned(found: Any, kept: bool = False) -> Any:
    """A record of which every text, name and key ends in NASTY, but for what is one of a few words."""
    if isinstance(found, str):
        return found if kept else found + NASTY
    if isinstance(found, list):
        return [poisoned(one) for one in found]
    if isinstance(found, dict):
        return {poisoned(name): poisoned(one) for name, one in found.items()}
    if hasattr(found, "__dataclass_fields__"):
        return replace(
            found, **{name: poisoned(value, name in ("kind", "whose")) for name, value in vars(found).items()}
        )
    return found


class Reader(HTMLParser):
    """Elements in order: tag, attributes, the tags around, and the text in them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.page, self.said = page, list[str]()
        self.open: list[dict[str, Any]] = []
        self.all: list[dict[str, Any]] = []
        self.feed(page)
        self.close()
        assert not self.open, [one["tag"] for one in self.open]
        for one in self.all:
            one["text"] = "".join(self.said[one["from"] : one.get("to", one["from"])])

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len(dict(attrs)) == len(attrs), f"{tag}: an attribute twice"
        around = [one["tag"] for one in self.open]
        one = {"tag": tag, "from": len(self.said), "around": around, **{f"@{name}": value for name, value in attrs}}
        self.all.append(one)
        if tag not in VOID:
            self.open.append(one)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in VOID
        one = self.open.pop()
        assert one["tag"] == tag, f"</{tag}>"
        one["to"] = len(self.said)

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def of(self, *tags: str) -> list[dict[str, Any]]:
        return [one for one in self.all if one["tag"] in tags]


@pytest.fixture(scope="module")
def nasty() -> Reader:
    return Reader(report.page([poisoned(evaluation())]))


@pytest.fixture(scope="module")
def plain() -> Reader:
    return Reader(report.page([evaluation()]))


@pytest.fixture(scope="module")
def single() -> Reader:
    return Reader(report.page([evaluation(1)]))


@pytest.fixture(params=["plain", "nasty", "single"])
def read(request: pytest.FixtureRequest) -> Reader:
    found: Reader = request.getfixturevalue(request.param)
    return found


# ---- the page as text


def test_the_page_asks_nothing_of_anywhere(read: Reader) -> None:
    fetching = "script img link iframe object embed form base video audio image foreignobject"
    assert not read.of(*fetching.split())
    assert "default-src 'none'" in next(one for one in read.all if "@http-equiv" in one)["@content"]
    for one in read.all:
        for name, value in one.items():
            if not name.startswith("@"):
                continue
            assert not name.startswith("@on"), one
            if name in ("@src", "@href", "@xlink:href", "@action", "@srcset", "@data"):
                assert value.startswith("#"), one
            if name not in ("@title", "@aria-label", "@content"):  # of which nothing is fetched
                assert not re.search(r"url\((?!#)|//|:\s*javascript", value or ""), one
    (sheet,) = read.of("style")
    assert not re.search(r"url\(|@import|//", sheet["text"])


def test_the_page_is_well_made(read: Reader) -> None:
    ids = [one["@id"] for one in read.all if "@id" in one]
    assert len(ids) == len(set(ids))
    for one in read.all:
        named = [*one.get("@aria-labelledby", "").split(), one.get("@href", "#")[1:]]
        named += re.findall(r"url\(#([^)]*)\)", " ".join(value or "" for name, value in one.items() if name[0] == "@"))
        assert {*named} - {""} <= {*ids}, one
    levels = [int(one["tag"][1]) for one in read.all if re.fullmatch("h[1-6]", one["tag"])]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(one.get("@scope") for one in read.of("th"))
    assert len(read.of("caption")) == len(read.of("table")) > 0
    assert read.of("html")[0]["@lang"] == "en"
    assert any(one.get("@name") == "viewport" and "width=device-width" in one["@content"] for one in read.of("meta"))
    pictures = [one for one in read.of("svg") if "picture" in one.get("@class", "")]
    assert pictures
    for at, one in enumerate(read.all):
        if one in pictures:
            assert one["@role"] == "img"
            assert [below["tag"] for below in read.all[at + 1 : at + 3]] == ["title", "desc"]
            assert all(below["text"] for below in read.all[at + 1 : at + 3])


def test_every_number_says_what_it_is(read: Reader) -> None:
    numbers = [one for one in read.of("td", "span") if "n" in one.get("@class", "").split()]
    assert len(numbers) > 300
    for one in numbers:
        assert len(one["@title"]) > 4, one
    for one in read.of("td"):
        assert not re.fullmatch(r"[−+]?[\d.,]+(×10\S+)?", one["text"].strip()) or one.get("@title"), one
    marks = [one for one in read.all if one["tag"] == "title" and "g" in one["around"]]
    assert len(marks) > 50
    assert all(one["text"] for one in marks)


def test_a_title_says_metric_model_unit_and_interval(plain: Reader) -> None:
    titles = [one.get("@title", "") for one in plain.of("td")]
    said = r"SmolLM2-135M-Instruct: MTLD, tokens; value −?[\d.]+, 95 % interval \S+ to \S+, floor 3\.36, 200 documents"
    assert len([one for one in titles if re.fullmatch(said, one)]) == 1
    of = [one for one in titles if one.startswith("SmolLM2-135M-Instruct: ") and " of MTLD, tokens; value " in one]
    assert len(of) == 7  # interval, floor, value / floor, both statistics, p, documents


def test_what_comes_from_files_is_text(nasty: Reader) -> None:
    assert "<script" not in nasty.page
    assert "<img" not in nasty.page
    seen = "".join(nasty.of("html")[0]["text"])
    assert "<script src=//x.y>alert(1)</script><img src=x onerror=alert(2)> \"'`&amp;" in seen
    assert "{{ 7 * 7 }} {% raw %}" in seen
    assert "⟨U+0000⟩⟨U+0007⟩⟨U+001B⟩[31m⟨U+0085⟩ ⟨U+202E⟩abc⟨U+2066⟩ \U0001f600\U00020000" in seen
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe]", nasty.page)


def test_it_is_small_and_quick() -> None:
    start = time.perf_counter()
    page = report.page([evaluation()])
    assert time.perf_counter() - start < 20
    assert len(page.encode()) < 3e6
    assert len({value.metric for value in evaluation().models[0].values}) >= 38


def test_the_files_of_the_page_are_packaged() -> None:
    listed = (ROOT / "pyproject.toml").read_text().split("[tool.setuptools.package-data]")[1].split("]\n")[0]
    assert '"evaluation/report.html"' in listed
    assert '"evaluation/report.css"' in listed


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_contrast_in_every_scheme() -> None:
    """WCAG 2.1, AA: 4.5 of text, 3 of marks."""
    sheet = (Path(report.__file__).parent / "report.css").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", sheet, re.S)
    ]
    assert len(schemes) == 3
    for of in schemes:
        pairs = [(4.5, one, "paper") for one in ("ink", "muted", "link")] + [(4.5, "ink", "band"), (4.5, "ink", "mark")]
        pairs += [(3.0, f"model-{at}", on) for at in range(8) for on in ("paper", "band")] + [
            (3.0, "human-line", "paper")
        ]
        for least, one, on in pairs:
            bright, dark = sorted((luminance(of[one]), luminance(of[on])), reverse=True)
            assert (bright + 0.05) / (dark + 0.05) >= least, (one, on, of)


# ---- what it shows


def test_over_used_phrases_are_marked() -> None:
    def phrase(text: str, low: float) -> Phrase:
        return Phrase(text, 3.0, low, 5.0, 9, 3)

    those = [phrase("in the end", 2), phrase("the end", 2), phrase("said", 0.9), phrase("—", 1.5), phrase("(x", 2)]
    found = report.marked("In the\nEnd — the endless end; THE END said (x", those)
    assert [(text, None if one is None else one.phrase) for text, one in found] == [
        ("In the\nEnd", "in the end"), (" ", None), ("—", "—"), (" the endless end; ", None), ("THE END", "the end"),
        (" said ", None), ("(x", "(x"),
    ]  # fmt: skip
    assert report.marked("anything", []) == [("anything", None)]


def test_the_page_shows_it_all(plain: Reader) -> None:
    seen = re.sub(r"\s+", " ", plain.of("main")[0]["text"])
    for about in evaluation().metrics:
        assert about.name in seen
        assert about.formula in seen
        assert about.source in seen
    assert "paragraph length, mean, every model: too few documents: 3 of 20" in seen
    assert "Differences that are the target’s: human text has them too" in seen
    assert "versions.transformers" in seen
    marks = [one["text"] for one in plain.of("mark")]
    assert {"Moreover", "it is worth\nnoting"} <= set(marks)
    assert plain.page.count('<details class="texts">') == report.TEXTS


def test_runs_with_other_metrics_and_settings_stand_together() -> None:
    one, other = evaluation(1), evaluation(2)
    other = replace(other, models=other.models[1:], settings={**other.settings, "permutations": 5})
    less = replace(one, metrics=one.metrics[1:])
    less = replace(less, models=[replace(m, values=m.values[1:]) for m in less.models])
    seen = re.sub(r"\s+", " ", Reader(report.page([less, other])).of("main")[0]["text"])
    assert f"{one.metrics[0].name}, {NAMES[0]}: not in its run" in seen
    assert "permutations1000; 5" in seen


def bare(models: int) -> Evaluation:
    """Without anything that a run may lack."""
    run = evaluation(models)
    empty = {"score": None, "retention": [], "phrases": [], "texts": [], "slices": [], "histograms": {}, "cost": {}}
    models_ = [replace(model, values=[], **empty) for model in run.models]
    return replace(run, models=models_, metrics=[], human_score=[], human_histograms={}, settings={})


def odd() -> Evaluation:
    """With numbers at their ends: no interval, a floor of 0, no number at all, a huge one, shares of another length."""
    run = evaluation(1)
    (model,) = run.models
    changes: list[dict[str, Any]] = [
        {"low": None}, {"floor": 0.0}, {"floor": None}, {"value": None, "note": ""}, {"value": 1e300, "high": 1e301},
        {"value": 0.0, "low": 0.0, "high": 0.0}, {"note": "of 20 documents"},
    ]  # fmt: skip
    values = [replace(value, **change) for value, change in zip(model.values, changes * 9, strict=False)]
    phrases = [replace(model.phrases[0], ratio=0.0, low=0.0, human_count=0), replace(model.phrases[1], phrase=" ")]
    shares = {"punctuation": [0.0] * 10, "sentence words": [1.0]}
    model = replace(model, values=values, phrases=phrases, histograms=shares, texts=[Text("", "", "")])
    return replace(run, models=[model], human_histograms={"punctuation": [0.0] * 10, "sentence words": [1.0]})


def many() -> Evaluation:
    """Of more models than there are colours, some of one name and sampling."""
    return replace(evaluation(1), models=(evaluation().models * 3)[:9])


@pytest.mark.parametrize("run", [bare(1), bare(2), odd(), many()], ids=["bare", "two bare", "odd", "nine models"])
def test_it_is_whole_whatever_a_run_holds(run: Evaluation) -> None:
    read = Reader(report.page([run]))
    ids = [one["@id"] for one in read.all if "@id" in one]
    assert len(ids) == len(set(ids))
    text = read.of("body")[0]["text"]
    assert not re.search(r"\bnan\b|\binf\b|None|undefined", text)
    assert len(read.of("h2")) == 11


# ---- the command


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    evaluation(2).save(tmp_path / "run")
    return tmp_path / "run"


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(run), "--out", str(out)]) == 0
    assert re.fullmatch(rf"{re.escape(str(out))}: 2 models, 0\.\d\d MB\n", capsys.readouterr().out)
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_errors_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, other = tmp_path / "page.html", tmp_path / "other"
    other.mkdir()
    whole = evaluation(2)
    file = other / "evaluation.json"
    whole.save(other)
    text = file.read_text()
    replaced = {
        text[:999]: "the file must be readable JSON, got ",
        "": "the file must be readable JSON, got ",
        text.replace('"format": 1', '"format": 2'): "format must be 1, got 2. Update dft-kernels, or evaluate again.",
        text.replace('"date": "2026', '"date": 2026, "was": "'): "'was' must be one of ",
        text.replace(whole.settings["human_sha256"], "0"): f"RUN must have the human_sha256 of the first, "
        f"{whole.settings['human_sha256']}, got 0. Evaluate both alike, or report each.",
        text.replace('{"name": "MTLD"', '{"name": "other"', 1): "",
    }  # fmt: skip
    for broken, said in replaced.items():
        file.write_text(broken)
        code = cli.main(["report", str(run), str(other), "--out", str(out)])
        err = capsys.readouterr().err
        if not said:  # described by the first run
            assert code == 0
            assert cli.main(["report", str(other), "--out", str(tmp_path / "none.html")]) == 1
            err, said = capsys.readouterr().err, "RUN must describe its metrics, got 'MTLD' without a description."
        else:
            assert code == 1
        assert said in err
        assert err.startswith("dft-kernels report: ")
        assert err.count("\n") == 1
    replace(whole, models=[]).save(other)
    for line, said in (
        ([str(tmp_path / "nothing")], "evaluation.json: the file must be there, got none. Name a folder that "),
        ([str(other)], "RUN must hold a model, got none."),
        ([str(run), "--out", f"{file}/page.html"], "--out must lie in a folder that can be written to, got "),
        ([str(run), "--out", str(tmp_path / "page.txt")], "--out must end in .html, got "),
    ):
        assert cli.main(["report", *line, *([] if "--out" in line else ["--out", str(tmp_path / "none.html")])]) in (
            1,
            2,
        )
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
    assert not (tmp_path / "none.html").exists()


def test_packages_that_are_missing_are_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.sys.modules, "jinja2", None)
    assert cli.main(["report", str(run), "--out", "page.html"]) == 1
    assert "jinja2 must be installed, got none. Run pip install 'dft-kernels[evaluate]'." in capsys.readouterr().err


# ---- a browser


@pytest.mark.skipif(chromium.FOUND is None, reason="no chromium and no chrome on PATH")
def test_a_browser_shows_it(plain: Reader, nasty: Reader, tmp_path: Path) -> None:
    """On a phone: nothing wider than it, no text of a picture below 11 px; nothing logged, nothing asked for."""
    texts = """Math.min(...[...document.querySelectorAll('svg.picture')].filter(one => one.clientWidth).map(
        one => 12 * one.clientWidth / one.viewBox.baseVal.width))"""
    folded = "document.querySelector('details.texts .columns').checkVisibility()"
    with chromium.browser(tmp_path / "profile") as page:
        for name, text in (("plain", plain.page), ("nasty", nasty.page)):
            file = tmp_path / f"{name}.html"
            file.write_text(text, encoding="utf-8")
            for width, dark in ((360, False), (360, True), (820, False), (1280, False))[: 4 if name == "plain" else 1]:
                page.show(file, width, dark=dark)
                assert page.value("document.documentElement.scrollWidth") <= width
                assert page.value(texts) >= 11
                paper = page.value("getComputedStyle(document.body).backgroundColor")
                assert (paper == "rgb(255, 255, 255)") is not dark
                assert page.value("document.title").startswith(NAMES[0])
                said = [one for one in page.events if one[0] in ("Log.entryAdded", "Runtime.consoleAPICalled",
                                                                "Runtime.exceptionThrown")]  # fmt: skip
                assert not said
                asked = [one["request"]["url"] for method, one in page.events if method == "Network.requestWillBeSent"]
                assert asked == [file.as_uri()]
        assert page.value(folded) is False
        page.ask("Emulation.setEmulatedMedia", media="print")
        assert page.value(folded) is True
