"""Tokens as HTML: text of a model, which may hold anything, with the entropy and the shift of each in its title."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..evaluation.wording import visible
from ..generation.sampling import text_after
from ..generation.stream import Drawn

SHADES = (0.01, 0.1, 0.5)  # nats of KL at which a token's ground darkens
_BEFORE = 8  # tokens of the prompt that the text is decoded behind


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is whole characters, and the tokens that made it: one, or those that share a character."""

    text: str
    drawn: tuple[Drawn, ...]

    @property
    def values(self) -> str:
        """Its entropy and its shift, in words."""
        entropy = ", ".join(f"{one.entropy:.2f}" for one in self.drawn)
        kl = ", ".join(f"{one.kl:.3f}" for one in self.drawn)
        return f"entropy {entropy} nats, shift {kl} nats"

    @property
    def title(self) -> str:
        """What is shown when it is pointed at."""
        count = f"{len(self.drawn)} tokens " if len(self.drawn) > 1 else ""
        return f"{count}‘{_plain(self.text)}’: {self.values}"

    def html(self, first: bool) -> str:
        """A span; the first of a text is where the Tab key goes, from which arrow keys lead on."""
        shade = sum(max(one.kl for one in self.drawn) >= edge for edge in SHADES)
        return (
            f'<span class="token shade{shade}" tabindex="{0 if first else -1}" title="{escape(self.title)}">'
            f"{escape(visible(self.text))}</span>"
        )


def _plain(text: str) -> str:
    """On one line."""
    return visible(text).replace("\n", "↵").replace("\t", "⇥")


class Written:
    """A text as its tokens come, in pieces. It is decoded by the whole, behind the end of its prompt: a character may
    take several tokens, and a space may depend on what stands before it. html only ever grows at its end."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.drawn: list[Drawn] = []
        self.pieces: list[Piece] = []
        self.text, self.html = "", ""  # of the pieces
        self._before = list(prompt)[-_BEFORE:]
        self._waiting: list[Drawn] = []

    def add(self, drawn: Drawn) -> None:
        """The next token."""
        self.drawn.append(drawn)
        self._waiting.append(drawn)
        whole = self._decoded()
        if not whole.endswith("\ufffd"):
            self._grow(whole)

    def finish(self) -> None:
        """No more will come: what is left of a character is shown as it is."""
        self._grow(self._decoded())

    @property
    def ids(self) -> list[int]:
        """The tokens that text was made of, without one that ends it."""
        return [one.token for piece in self.pieces for one in piece.drawn]

    @property
    def kl(self) -> float:
        """Nats that were spent, over all tokens."""
        return sum(one.kl for one in self.drawn)

    @property
    def entropy(self) -> float:
        """Mean over the tokens, in nats."""
        return sum(one.entropy for one in self.drawn) / max(1, len(self.drawn))

    def summary(self) -> str:
        """Totals and the last token, for who cannot point at it."""
        if not self.drawn:
            return ""
        count = len(self.drawn)
        said = (
            f"{count} {'token' if count == 1 else 'tokens'}. Entropy: {self.entropy:.2f} nats a token. KL spent: "
            f"{self.kl / count:.3f} nats a token, {self.kl:.2f} in all."
        )
        if self.pieces:
            said += f" Last token: {self.pieces[-1].title}."
        return f"<p>{escape(said)}</p>"

    def _grow(self, whole: str) -> None:
        if len(whole) <= len(self.text) or not whole.startswith(self.text):
            return
        piece = Piece(whole[len(self.text) :], tuple(self._waiting))
        self.html += piece.html(first=not self.pieces)
        self.pieces.append(piece)
        self.text, self._waiting = whole, []

    def _decoded(self) -> str:
        return text_after(self.tokenizer, self._before, [one.token for one in self.drawn])
