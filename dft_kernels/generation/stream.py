"""Text of a model's own, token by token as it is drawn, with each token's entropy and its distance from the model."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from ..errors import fail
from ..models.heads import check_ids, check_positions
from .sampling import Sampling, ends_of, roll_out, text_after
from .steps import Likeliest, Watch, ordered

_CUT = "\ufffd"  # what decoding makes of bytes that are not yet a character


@dataclass(frozen=True)
class Drawn:
    """A token of a text. entropy: of the distribution that it was drawn from, nats; kl: KL(that || the model's own),
    nats, 0 where no step is in use."""

    token: int
    entropy: float
    kl: float


class Stream:
    """Texts of a model's own, step by step: iterating gives a list with a `Drawn` for each prompt, None after its end,
    whose own token is the last.

    model, tokenizer: of transformers. The model is put into evaluation mode until the end: one that is being trained
        serves one stream at a time.
    prompts: token ids, each of at least one; unequal lengths are padded on the left and masked.
    length: tokens at most after each, up to the tokenizer's or the model's end of text.
    seed: of the draws, which are those of `sampling.roll_out` at the same seed.
    steps: processors of scores, as those of `Settings.steps`. A token is drawn from what they leave, at temperature 1;
        the sampling settings of the model's own generation_config are not applied, its others, as a repetition
        penalty, are, and count as the model.
    greedy: the likeliest token of what they leave, not a random one.

    `generate` runs in a thread of the stream's own, which computes a step when it is asked for and not before: streams
    that are read in turn do not compete for the processor. It draws from a generator of its own, so that torch's random
    state, which all threads of a process share, is neither read nor changed: any number of streams, and whatever else
    draws, go on beside each other, and each has the draws of its seed.
    An error of that thread is raised in the one that iterates. `close`, or leaving a `with` block, ends the thread, as
    does dropping the stream.
    Errors: ValueError, by argument, before anything is drawn.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        length: int,
        seed: int = 0,
        steps: Sequence[LogitsProcessor] = (),
        *,
        greedy: bool = False,
    ) -> None:
        check_prompts(model, prompts, length)
        self.tokenizer, self.prompts = tokenizer, [list(prompt) for prompt in prompts]
        self.length, self.seed = length, seed
        self.ends = ends_of(model, tokenizer)
        self.drawn: list[list[Drawn]] = [[] for _ in prompts]  # so far
        watch = Watch()
        checked = ordered(steps, sample=not greedy)
        processors = watch.around([*checked, Likeliest()]) if greedy else [*watch.around(checked), _Draw(seed)]
        self._work = _Work(watch)
        arguments = (self._work, model, self.prompts, length, self.ends, processors)
        self._thread = threading.Thread(target=_run, args=arguments, name="Stream", daemon=True)
        self._open = [True] * len(prompts)
        self._finished = False
        self._dropped = weakref.finalize(self, self._work.cancel)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> list[Drawn | None]:
        if self._finished:
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        self._work.asked.release()
        found = self._work.made.get()
        if not isinstance(found, _Step):
            self._finished = True
            if found is not None:
                raise found
            raise StopIteration
        step: list[Drawn | None] = [None] * len(self.drawn)
        for row, one in enumerate(map(Drawn, found.tokens, found.entropies, found.kls)):
            if self._open[row]:
                step[row] = one
                self.drawn[row].append(one)
                self._open[row] = one.token not in self.ends
        return step

    def written(self) -> list[list[int]]:
        """The tokens so far after each prompt, without the end."""
        return [[one.token for one in drawn if one.token not in self.ends] for drawn in self.drawn]

    def texts(self) -> list[str]:
        """What was written so far after each prompt, decoded as a whole, without special tokens; of a character nothing
        is shown before its last byte."""
        made = []
        for prompt, ids, still in zip(self.prompts, self.written(), self._open, strict=True):
            text = text_after(self.tokenizer, prompt, ids)
            made.append(text.rstrip(_CUT) if still and not self._finished else text)
        return made

    def cancel(self) -> None:
        """End at the next token; from any thread."""
        self._work.cancel()

    def close(self) -> None:
        """Cancel, and wait for the thread."""
        self.cancel()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def check_prompts(model: Any, prompts: Sequence[Sequence[int]], length: int) -> None:
    """ValueError for prompts that a model, or its configuration, cannot go on from for `length` tokens."""
    if length < 1:
        fail("Stream", "length", "be at least 1", length, "Draw some")
    if not prompts or not all(prompts):
        fail("Stream", "prompts", "hold a token, each of them", "an empty one", "Leave it out")
    check_ids(model, max(map(max, prompts)), "Stream", "prompts")
    longest = max(map(len, prompts)) + length
    check_positions(model, longest, "Stream", "length", "be, with the prompt,", "Lower it, or shorten the prompt")


@dataclass(frozen=True)
class _Step:
    """A step's tokens, of ended texts too."""

    tokens: list[int]
    entropies: list[float]
    kls: list[float]


class _Cancelled(Exception):  # noqa: N818 - no fault
    """Unwinds `generate` where it hands on a token."""


class _Work(BaseStreamer):
    """What the thread and its stream pass to each other; it does not hold the stream, so that one can be dropped."""

    def __init__(self, watch: Watch) -> None:
        self.watch, self.cancelled, self.begun = watch, threading.Event(), False
        self.asked = threading.Semaphore(0)
        self.made: queue.SimpleQueue[_Step | BaseException | None] = queue.SimpleQueue()  # None: the end

    def put(self, value: Tensor) -> None:
        """Of generate: the prompts, then each step's tokens [B]."""
        if self.begun:
            records = torch.stack([self.watch.entropy.pop(0), self.watch.kl.pop(0)])
            self.made.put(_Step(value.tolist(), *records.tolist()))
            self.wait()
        self.begun = True

    def end(self) -> None:
        """Of generate; the thread says it once it has returned."""

    def wait(self) -> None:
        """Until a step is asked for."""
        self.asked.acquire()
        if self.cancelled.is_set():
            raise _Cancelled

    def cancel(self) -> None:
        """From any thread."""
        self.cancelled.set()
        self.asked.release()
        self.made.put(None)


def _run(
    work: _Work, model: Any, prompts: list[list[int]], length: int, ends: list[int], steps: list[LogitsProcessor]
) -> None:
    try:
        work.wait()
        keywords = Sampling(temperature=0).keywords()  # of the scores that the last step leaves
        processors = LogitsProcessorList(steps)
        roll_out(model, prompts, length, ends, None, **keywords, logits_processor=processors, streamer=work)
        work.made.put(None)
    except _Cancelled:
        pass
    except BaseException as error:
        work.made.put(error)  # raised where the stream is read


class _Draw(LogitsProcessor):
    """The last of the steps: scores of 0 for the token that is drawn and -inf for every other, of which `generate`
    takes the likeliest."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator: torch.Generator | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.generator is None:
            self.generator = torch.Generator(scores.device).manual_seed(self.seed)
        token = scores.softmax(-1).multinomial(1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(-1, token, 0.0)
