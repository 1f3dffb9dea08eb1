"""Texts of a model for an evaluation, kept as JSON lines: drawn once, in batches, and read without the model.

    {"format": ..., "model": ..., "sampling": {...}, ...}                        what the texts depend on: `Header`
    {"number": 0, "prompt": ..., "text": ..., "tokens": 128, "seconds": 0.31}    a line a text, in the prompts' order

Where steps are in use (`Settings`), the header has "steps" and a line "entropy" and "kl".

Batch b of a run is drawn by the seed sampling.seed + b and written at once. A run that was killed drops the batch that
was being written and goes on, so that its file equals that of a run which was not, but for the seconds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import fail
from ..files import Source
from ..models.heads import check_ids, check_positions
from ..store.fingerprint import model_fingerprint, tokenizer_fingerprint
from . import native
from .engine import Engine
from .journal import Journal
from .sampling import Sampling, own_settings, text_after, without_given
from .settings import Settings, described

FORMAT = "dft_kernels samples 1"
PLAIN = Settings()


@dataclass(frozen=True)
class Header:
    """What the texts of a file depend on. model_sha256: of the weights; generation: what the model's own
    generation_config sets and is applied too, as a repetition penalty; engine, device: what drew them, and where;
    versions: with steps the instruction set of their kernels too, or torch; steps: besides `sampling`, as
    `settings.described` has them."""

    format: str
    model: str
    model_sha256: str
    tokenizer_sha256: str
    sampling: Sampling
    batch: int
    prompts_sha256: str
    generation: dict[str, Any]
    engine: str
    device: str
    versions: dict[str, str]
    steps: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Line:
    """A text. tokens: that were drawn; seconds: its share of its batch's; entropy, kl: of `engine.Written`."""

    number: int
    prompt: str
    text: str
    tokens: int
    seconds: float
    entropy: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class Samples:
    """The texts of a model after prompts, in their order. tokens, seconds: of all of them together; entropy, kl: nats a
    token that was drawn, None where that was not told."""

    header: Header
    prompts: list[str]
    texts: list[str]
    tokens: int
    seconds: float
    entropy: float | None = None
    kl: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Drawn, all batches together; 0 where no time was measured."""
        return self.tokens / self.seconds if self.seconds else 0.0


def draw(
    engine: Engine,
    prompts: Sequence[str],
    sampling: Sampling,
    file: Path,
    *,
    model_name: str,
    settings: Settings = PLAIN,
    batch: int = 16,
    tick: Callable[[int], None] | None = None,
) -> Samples:
    """What an engine's model writes after prompts, kept in a file, which is gone on with.

    engine: `Engine(model, tokenizer)`, transformers' `generate`, or `vllm_engine.VllmEngine`. The model is left in the
        mode it was in, torch's random state as it was.
    prompts: sampling.count texts, encoded as the tokenizer does by default, with its BOS; unequal lengths are padded on
        the left and masked. The texts are what follows, without special tokens.
    file: JSON lines, see above. A finished one is read and nothing is drawn. One of other settings (`Header`) is not
        touched, an engine's not by another; nor is an unfinished one of other versions or another device gone on with,
        whose draws would be others.
    settings: steps besides sampling, whose temperature, top_p and min_p count.
    batch: prompts at a time, of which the draws depend.
    tick: called with the number of texts there are more, those of an earlier run too.

    Errors: ValueError, by argument or by file and line, before anything is drawn.
    Cost: the draws, and one sha256 over the weights (0.6 s for SmolLM2's 538 MB on one CPU core), less than a batch's
    first tokens, each of which reads them too; by it a model that was trained again into the same folder is not taken
    for the one before.
    """
    if min(batch, sampling.length) < 1:
        fail("draw", "batch and sampling.length", "be at least 1", (batch, sampling.length), "Draw some")
    engine.check(sampling, settings)
    tokenizer = engine.tokenizer
    ids = _encoded(tokenizer, prompts, sampling, engine.model)
    header = _line(_header(engine, prompts, sampling, settings, model_name, batch), "steps")
    journal = Journal.begin(_source("draw", file), header)
    found = _checked(journal)
    finished = len(found.texts) == len(prompts)
    journal.check(header, ("versions", "device") if finished else ())
    if not finished:
        journal.keep(len(found.texts) // batch * batch)
        engine.start(max(map(len, ids)) + sampling.length, min(batch, len(ids)))
    if tick is not None and journal.lines:
        tick(len(journal.lines))
    for start in range(len(journal.lines), len(prompts), batch):
        rows = range(start, min(start + batch, len(prompts)))
        began = time.perf_counter()
        drawn = engine.draw([ids[row] for row in rows], sampling, settings, sampling.seed + start // batch)
        seconds = round((time.perf_counter() - began) / len(rows), 6)
        journal.add(
            _line(
                _Line(
                    row,
                    prompts[row],
                    text_after(tokenizer, ids[row], new.ids),
                    len(new.ids),
                    seconds,
                    new.entropy,
                    new.kl,
                ),
                "entropy",
                "kl",
            )
            for row, new in zip(rows, drawn, strict=True)
        )
        if tick is not None:
            tick(len(rows))
    return _checked(journal)


def read(file: Path) -> Samples:
    """The texts of a file that `draw` has finished; ValueError, by file and line, for any other."""
    found = _checked(Journal.read(_source("samples", file)))
    count = found.header.sampling.count
    if len(found.texts) != count:
        source = _source("samples", file)
        source.fail("the file", f"hold {count} texts", len(found.texts), "Run what draws it again: it goes on")
    return found


def _source(function: str, file: Path) -> Source:
    remedy = "Delete it and draw again, or name another folder"
    return Source(function, file, remedy, "Draw them first")


def _encoded(tokenizer: Any, prompts: Sequence[str], sampling: Sampling, model: Any) -> list[list[int]]:
    """The prompts' token ids."""
    if len(prompts) != sampling.count or not prompts:
        fail("draw", "prompts", f"be sampling.count, {sampling.count}", len(prompts), "Give one for each text")
    ids = [tokenizer(prompt, verbose=False)["input_ids"] for prompt in prompts]
    for number, row in enumerate(ids):
        if not row:
            fail("draw", f"prompts[{number}]", "hold a token", repr(prompts[number]), "Leave it out")
    longest = max(map(len, ids)) + sampling.length
    check_ids(model, max(map(max, ids)), "draw", "prompts")
    remedy = "Shorten them, or draw fewer tokens"
    check_positions(model, longest, "draw", "prompts", "have, with sampling.length,", remedy)
    return ids


def _line(value: Any, *optional: str) -> dict[str, Any]:
    """A record as its file has it: without optional fields that say nothing, which files of before have not."""
    found = asdict(value)
    return {name: one for name, one in found.items() if one not in (None, {}) or name not in optional}


def _header(
    engine: Engine, prompts: Sequence[str], sampling: Sampling, settings: Settings, model_name: str, batch: int
) -> Header:
    kernels = native.instruction_set(engine.device)
    ours = {"dft_kernels": __version__, "kernels": kernels} if settings.stepped else {}
    return Header(
        format=FORMAT,
        model=model_name,
        model_sha256=model_fingerprint(engine.model),
        tokenizer_sha256=tokenizer_fingerprint(engine.tokenizer),
        sampling=sampling,
        batch=batch,
        prompts_sha256=_digest(prompts),
        generation=own_settings(engine.model, greedy=sampling.temperature == 0),
        engine=engine.name,
        device=engine.device,
        versions={**engine.versions, **ours},
        steps=described(settings),
    )


def _digest(prompts: Sequence[str]) -> str:
    """sha256 of texts in their order."""
    found = hashlib.sha256()
    for prompt in prompts:
        data = prompt.encode("utf-8")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.hexdigest()


def _checked(journal: Journal) -> Samples:
    """A file's content, of its types, in its order, of its prompts."""
    source = journal.source
    if journal.header.get("format") != FORMAT:
        source.fail("format", f"be {FORMAT!r}", journal.header.get("format"))
    journal.header.setdefault("engine", Engine.name)  # of a file from before there was another
    if isinstance(own := journal.header.get("generation"), dict):  # and from before these were left out
        journal.header["generation"] = without_given(own)
    header = source.record(Header, {"steps": {}, **journal.header}, bounds={"batch": (1, 1 << 31)})
    most = (0.0, 1e9)
    limits = {"tokens": (0, header.sampling.length), **dict.fromkeys(("seconds", "entropy", "kl"), most)}
    lines: list[_Line] = []
    for number, value in enumerate(journal.lines):
        line = source.record(_Line, {"entropy": None, "kl": None, **value}, f"line {number + 2}", limits)
        if line.number != number:
            source.fail(f"line {number + 2}.number", f"be {number}", line.number)
        lines.append(line)
    if len(lines) > header.sampling.count:
        source.fail("the file", f"hold at most sampling.count, {header.sampling.count}, texts", len(lines))
    prompts = [line.prompt for line in lines]
    if len(lines) == header.sampling.count and _digest(prompts) != header.prompts_sha256:
        source.fail("prompts", "have the header's prompts_sha256", "others")
    return Samples(
        header,
        prompts,
        [line.text for line in lines],
        sum(line.tokens for line in lines),
        sum(line.seconds for line in lines),
        *(_mean(lines, of, header.sampling.length) for of in ("entropy", "kl")),
    )


def _mean(lines: Sequence[_Line], of: str, length: int) -> float | None:
    """Of all draws, of which a text has one more than tokens where it ended."""
    values, draws = [getattr(line, of) for line in lines], [min(line.tokens + 1, length) for line in lines]
    if not lines or None in values:
        return None
    return sum(value * count for value, count in zip(values, draws, strict=True)) / sum(draws)
