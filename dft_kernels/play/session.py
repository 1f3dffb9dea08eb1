"""What one visitor of the page has: two texts as they are written, and what was asked for.

All that visitors share is `Served`, which holds no text, and in it `Turns`, which holds places in a line.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from transformers import LogitsProcessor

from ..errors import fail
from ..generation.sampling import ends_of
from ..generation.settings import Settings, recorded
from ..generation.stream import Stream
from ..models.heads import check_positions
from ..store.fingerprint import tokenizer_fingerprint
from ..targets.target import Target
from .distances import Distance, Ruler
from .hover import Written

RANGES = {  # of what a slider sets; 0 of the last three leaves the step out
    "temperature": (0.0, 2.0), "top_p": (0.01, 1.0), "min_p": (0.0, 1.0), "diversity": (-0.9, 1.0),
    "top_n_sigma": (0.0, 5.0), "gamma": (-2.0, 2.0), "bound": (0.0, 1.0),
}  # fmt: skip
LONGEST = 512  # tokens that may be asked for
CHARACTERS = 100_000  # of a prompt: a longer one is not tokenized to be counted
MOST_WAITING = 16  # visitors
IDLE, WAITING, WRITING, DONE, CANCELLED = "idle", "waiting", "writing", "done", "cancelled"
_PAUSE = 0.1  # seconds between looks at the line


class Turns:
    """Who writes: one at a time, in the order in which they came."""

    def __init__(self) -> None:
        self._line: list[object] = []
        self._lock = threading.Lock()

    def enter(self) -> object:
        """A place at the end of the line; ValueError where too many stand in it."""
        place = object()
        with self._lock:
            if len(self._line) > MOST_WAITING:
                got = len(self._line) - 1
                fail("play", "visitors who wait", f"be fewer than {MOST_WAITING}", got, "Try again in a while")
            self._line.append(place)
        return place

    def before(self, place: object) -> int:
        """How many come first."""
        with self._lock:
            return self._line.index(place)

    def leave(self, place: object) -> None:
        """Give the place up."""
        with self._lock:
            self._line.remove(place)


@dataclass(frozen=True)
class Asked:
    """What to write, checked. settings, steps: of each side; target: what the texts are measured by."""

    prompt: str
    ids: list[int]
    length: int
    seed: int
    settings: tuple[Settings, ...]
    steps: tuple[list[LogitsProcessor], ...]
    target: str


class Served:
    """What all visitors share.

    models: by name, the one to look at last; its base stands before it, or, where it has none, it stands there itself,
        without settings. They are put into evaluation mode.
    targets: by the names that `Settings` know them by, of which one is chosen to shift a style to, one to refine and
        measure by.
    base: what --base named, for command lines. style_base, native: of `Settings`, for all visitors.
    """

    def __init__(
        self,
        models: Mapping[str, Any],
        tokenizer: Any,
        targets: Mapping[str, Target],
        *,
        base: str | None = None,
        style_base: str = Settings.style_base,
        native: str | None = None,
    ) -> None:
        self.models = {name: model.eval() for name, model in models.items()}
        self.tokenizer, self.base, self.turns = tokenizer, base, Turns()
        self.style_base, self.native = style_base, native
        fingerprint = tokenizer_fingerprint(tokenizer)
        self.rulers = {name: Ruler(target, fingerprint) for name, target in targets.items()}
        self.name = list(models)[-1]
        self.alone = len(models) == 1
        self.sides = [f"{self.name}, as it is", f"{self.name}, with these settings"] if self.alone else list(models)
        self.by_side = list(self.models.values()) * (2 if self.alone else 1)
        positions = [getattr(one.config.get_text_config(), "max_position_embeddings", None) for one in self.by_side]
        self.longest = max(1, min([LONGEST, *(one // 2 for one in positions if one)]))  # the prompt wants some too

    def ask(
        self,
        prompt: str,
        *,
        length: float = 128,
        seed: float = 0,
        style: str = "",
        target: str = "",
        **sliders: float,
    ) -> Asked:
        """Check what a visitor sent, before anything is drawn. sliders: of RANGES. ValueError, in the page's words."""
        length, seed = _whole("length", length, 1, self.longest), _whole("seed", seed, 0, (1 << 32) - 1)
        for name, value in sliders.items():
            low, high = RANGES[name]
            if not isinstance(value, (int, float)) or not low <= value <= high:
                fail("play", name, f"be a number in {low:g}..{high:g}", repr(value), "Move its slider")
        for name, chosen in (("style", style), ("target", target)):
            if chosen not in self.rulers:
                fail("play", name, f"be one of {', '.join(self.rulers)}", repr(chosen), "Pick one of these")
        settings = self._settings(style, target, **{name: float(value) for name, value in sliders.items()})
        ids = self._encoded(prompt, length)
        steps = tuple(
            one.steps(self.tokenizer, ends_of(model, self.tokenizer))
            for one, model in zip(settings, self.by_side, strict=True)
        )
        return Asked(prompt, ids, length, seed, settings, steps, target)

    def _settings(
        self,
        style: str,
        target: str,
        *,
        gamma: float = 0.0,
        bound: float = 0.0,
        top_n_sigma: float = 0.0,
        **more: float,
    ) -> tuple[Settings, Settings]:
        """Of each side."""
        used: dict[str, Any] = {**more, "top_n_sigma": top_n_sigma or None}
        if gamma:
            used |= {"style": (style, gamma), "style_base": self.style_base}
        if bound:
            used |= {"refine": target, "bound": bound, "native": self.native}
        chosen = Settings(**used)
        plain = Settings(temperature=0.0 if chosen.greedy else 1.0)
        return (plain if self.alone else chosen), chosen

    def command_line(self, asked: Asked) -> str:
        """The command that writes the same texts."""
        line = asked.settings[-1].command_line(
            self.name, asked.prompt, length=asked.length, seed=asked.seed, base=self.base
        )
        return f"{line} --compare" if len(set(asked.settings)) > 1 else line

    def _encoded(self, prompt: str, length: int) -> list[int]:
        if not isinstance(prompt, str) or not prompt.strip():
            fail("play", "prompt", "hold a word", "an empty one", "Write how a text begins")
        if len(prompt) > CHARACTERS:
            fail("play", "prompt", f"have at most {CHARACTERS:,} characters", f"{len(prompt):,}", "Shorten it")
        ids: list[int] = self.tokenizer(prompt, verbose=False)["input_ids"]
        if not ids:
            fail("play", "prompt", "hold a token", repr(prompt), "Write how a text begins")
        for model in self.by_side:
            remedy = "Shorten it, or ask for fewer tokens"
            check_positions(model, len(ids) + length, "play", "prompt", "have, with the new tokens,", remedy)
        return ids


def _whole(name: str, value: Any, least: int, most: int) -> int:
    if not isinstance(value, (int, float)) or value != value // 1 or not least <= value <= most:
        fail("play", name, f"be a whole number in {least}..{most}", repr(value), "Write one")
    return int(value)


class Session:
    """One visitor's. state: what is going on; before: how many come first, while waiting; written: a text a side."""

    def __init__(self) -> None:
        self.state, self.before = IDLE, 0
        self.asked: Asked | None = None
        self.written: list[Written] = []
        self._streams: list[Stream] = []
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End after the next token, or leave the line; from any thread."""
        self._cancelled.set()

    def write(self, served: Served, asked: Asked) -> Iterator[None]:
        """Both texts, a token of each in turn; stops after each, and while it waits. Closing it ends all that runs."""
        if self.state in (WAITING, WRITING):
            fail("play", "the text before", "be finished", "one that is being written", "Cancel it, or wait")
        with ExitStack() as ending:
            place = served.turns.enter()
            ending.callback(served.turns.leave, place)
            self._cancelled.clear()
            self.asked, self.state, self._streams = asked, WAITING, []
            self.written = [Written(served.tokenizer, asked.ids) for _ in served.sides]
            ending.callback(self._end)
            while (before := served.turns.before(place)) and not self._cancelled.is_set():
                self.before = before
                yield
                self._cancelled.wait(_PAUSE)
            self.state = WRITING
            self._streams = [
                ending.enter_context(
                    Stream(model, served.tokenizer, [asked.ids], asked.length, asked.seed, steps, greedy=own.greedy)
                )
                for model, own, steps in zip(served.by_side, asked.settings, asked.steps, strict=True)
            ]
            yield
            yield from self._read()

    def _read(self) -> Iterator[None]:
        going = dict(zip(self._streams, self.written, strict=True))
        while going and not self._cancelled.is_set():
            for stream, written in list(going.items()):
                step = next(stream, None)
                if step is None or step[0] is None:
                    written.finish()
                    del going[stream]
                else:
                    written.add(step[0])
            yield

    def _end(self) -> None:
        self.state = CANCELLED if self._cancelled.is_set() else DONE

    def distances(self, served: Served) -> list[list[Distance]]:
        """Of each text from the target; none before there is a text."""
        if self.asked is None:
            return []
        ruler, prompt = served.rulers[self.asked.target], self.asked.prompt
        return [ruler(prompt, one.text, one.ids) for one in self.written]

    def jsonl(self, served: Served) -> str:
        """Both texts with all that they depend on, a line each, as `dft-kernels sample --out` writes them."""
        names = list(served.models) * (2 if served.alone else 1)
        lines = (
            [
                recorded(name, self.asked.prompt, settings, stream)
                for name, settings, stream in zip(names, self.asked.settings, self._streams, strict=True)
            ]
            if self.asked is not None and self._streams
            else []
        )
        return "".join(f"{json.dumps(asdict(line), ensure_ascii=False, allow_nan=False)}\n" for line in lines)
