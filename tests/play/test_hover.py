"""Tokens as HTML: whole characters, nothing that a browser would act on, nothing but growth at the end."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from dft_kernels.generation.stream import Drawn
from dft_kernels.play.hover import SHADES, Piece, Written


def drawn(token: int, kl: float = 0.0) -> Drawn:
    return Drawn(token, 1.25, kl)


@pytest.fixture(scope="module")
def of_bytes() -> Any:
    """A token a byte."""
    core = Tokenizer(models.BPE({one: n for n, one in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core)


class Spans(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.found.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        attributes, text = self.found[-1]
        self.found[-1] = attributes, text + data


def test_the_text_of_a_model_is_text() -> None:
    nasty = "<script>alert(1)</script><img src=x onerror=alert(2)> \"'`&amp; \x00\x1b[31m\u202e {{x}} ${x} \n"
    html = Piece(nasty, (drawn(5),)).html(first=True)
    (found,) = Spans(html).found
    assert Spans(html).tags == ["span"]
    shown = nasty.replace("\x00", "⟨U+0000⟩").replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")
    assert found[1] == shown
    assert sorted(found[0]) == ["class", "tabindex", "title"]
    assert f"‘{shown.replace(chr(10), '↵')}’: entropy 1.25 nats, shift 0.000 nats" == found[0]["title"]
    assert not {"\x00", "\x1b", "\u202e"} & set(html)


def test_characters_of_several_tokens_stay_whole(of_bytes: Any) -> None:
    text = "né 😀!"
    ids = of_bytes(text)["input_ids"]
    assert len(ids) == len(text.encode())
    written = Written(of_bytes, of_bytes("a: ")["input_ids"])
    before = ""
    for number, token in enumerate(ids):
        written.add(Drawn(token, float(number), number / 1000))
        assert "\ufffd" not in written.html
        assert written.html.startswith(before)
        before = written.html
    assert [piece.text for piece in written.pieces] == list(text)
    assert [len(piece.drawn) for piece in written.pieces] == [1, 2, 1, 4, 1]
    assert written.pieces[3].title == (
        "4 tokens ‘😀’: entropy 4.00, 5.00, 6.00, 7.00 nats, shift 0.004, 0.005, 0.006, 0.007 nats"
    )
    assert written.text == text
    assert written.ids == ids
    assert [one[0]["tabindex"] for one in Spans(written.html).found] == ["0", "-1", "-1", "-1", "-1"]


def test_what_is_left_of_a_character_comes_at_the_end(of_bytes: Any) -> None:
    written = Written(of_bytes, of_bytes("a")["input_ids"])
    for token in of_bytes("b😀")["input_ids"][:3]:
        written.add(drawn(token))
    assert written.text == "b"
    written.finish()
    written.finish()
    assert written.text == "b\ufffd"
    assert len(written.drawn) == len(written.ids) == 3


def test_spaces_are_those_of_the_whole(tokenizer: Any) -> None:
    """A decoder of words puts spaces between them, the first too, which stands behind the prompt."""
    ids = tokenizer("The cat sat . </s>", add_special_tokens=False)["input_ids"]
    written = Written(tokenizer, ids[:1])
    for token in ids[1:]:
        written.add(drawn(token))
    written.finish()
    assert written.text == " cat sat ."
    assert written.ids == ids[1:4]
    assert len(written.drawn) == 4  # the end of the text is no text


def test_shades_and_totals() -> None:
    for kl, shade in ((0.0, 0), *((edge, number + 1) for number, edge in enumerate(SHADES)), (9.0, len(SHADES))):
        assert f'class="token shade{shade}"' in Piece("a", (drawn(1, kl),)).html(first=False)


def test_a_summary_says_the_last_token_and_the_sums(tokenizer: Any) -> None:
    written = Written(tokenizer, [3])
    assert written.summary() == ""
    written.add(Drawn(4, 1.0, 0.5))
    written.add(Drawn(5, 2.0, 0.25))
    assert written.kl == 0.75
    assert written.summary() == (
        "<p>2 tokens. Entropy: 1.50 nats a token. KL spent: 0.375 nats a token, 0.75 in all. Last token: "
        "‘ sat’: entropy 2.00 nats, shift 0.250 nats.</p>"
    )
