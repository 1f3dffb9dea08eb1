"""Our steps inside vLLM: a logits processor of its interface (that of its first model runner), told by each request.

    llm = vllm.LLM(MODEL, logits_processors=["dft_kernels.generation.vllm_steps:Steps"])
    llm.generate(prompts, sampling_params(Settings(diversity=0.1, refine="literary", bound=0.1), max_tokens=128))

`Settings` travel in `SamplingParams.extra_args`, as {"dft_kernels": {"diversity": 0.1}}, the inner object also as JSON
text, which is what a request to a server may hold (`vllm_xargs`). vLLM applies its own temperature, top-p, min-p and
penalties to what ours return, so that neither the order nor the bound on the KL would hold: they are given in
`Settings`, and refused beside it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from ..errors import fail
from ..targets import target_file
from .settings import Settings

KEY = "dft_kernels"  # of extra_args
_SERVED = "vllm serve takes a model's own settings unless it is started with --generation-config vllm"
_KEPT = 64  # settings that are kept as they were checked, or with their steps
_DEFAULTS = {one.name: one.default for one in fields(Settings) if one.name != "beams"}
_TARGETS = ("style_base", "refine", "native")
_NEUTRAL = {
    "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
}  # fmt: skip


def sampling_params(settings: Settings, **given: Any) -> SamplingParams:
    """vLLM's SamplingParams of these settings. given: what else it takes, as max_tokens and seed."""
    told = {name: value for name, value in asdict(settings).items() if name != "beams"}
    return SamplingParams(temperature=0.0 if settings.greedy else 1.0, extra_args={KEY: told}, **given)


def settings_of(params: SamplingParams) -> Settings | None:
    """What a request says, None where that is nothing; ValueError for what is no setting, or not of its type."""
    given = (params.extra_args or {}).get(KEY)
    if given is None:
        return None
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            fail("Steps", KEY, "be JSON where it is text", f"{given!r}: {error}", 'Write it, as {"diversity": 0.1}')
    if not isinstance(given, dict):
        fail("Steps", KEY, "be an object of settings", repr(given), 'Write one, as {"diversity": 0.1}')
    for name in given:
        if name not in _DEFAULTS:
            fail("Steps", KEY, f"hold settings of {', '.join(_DEFAULTS)}", repr(name), "Leave it out")
    return Settings(**{name: _typed(name, value) for name, value in given.items()})


def _typed(name: str, value: Any) -> Any:
    """A value out of JSON, as its setting has it."""
    if value is None and _DEFAULTS[name] is None:
        return None
    if name in _TARGETS:
        if isinstance(value, str):
            return value
        fail("Steps", name, "name a target", repr(value), "Write a preset's name, as literary")
    if name == "towards":
        if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
            return tuple(value)
        fail("Steps", name, "be a list of statistics", repr(value), 'Write it, as ["sentences", "tokens"]')
    if name == "style":
        if isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[0], str) and _finite(value[1]):
            return value[0], float(value[1])
        fail("Steps", name, "be a target's name and a finite number", repr(value), 'Write them, as ["literary", 0.5]')
    if not _finite(value):
        fail("Steps", name, "be a finite number", repr(value), "Write one, as 0.1")
    return float(value)


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf and abs(value) <= sys.float_info.max


@lru_cache(_KEPT)
def _check(settings: Settings) -> None:
    """ValueError for what cannot be, whatever the tokenizer."""
    replace(
        settings, style=None, style_base=Settings.style_base, refine=None, native=None, towards=Settings.towards
    ).steps(None)
    if settings.bound < 0:
        fail("Steps", "bound", "be at least 0 nats", settings.bound, "0 leaves the model as it is")
    style = () if settings.style is None else (settings.style[0], settings.style_base)
    for name in (*style, settings.refine, settings.native):
        if name is not None:
            target_file.load(name)


class Steps(LogitsProcessor):
    """`Settings` of each request, in vLLM. Rows of one setting are processed together; a request without settings is
    left as it is, bit for bit.

    What only the model's tokenizer tells, a target of another one, ends vLLM when such a request comes; all other
    mistakes refuse the request. Targets are files of the machine that vLLM runs on: a server's clients name them too.
    Cost: that of the steps, and a copy of the batch's token ids to the device at every token.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """ValueError for settings that cannot be, and for vLLM's own ways of sampling beside them."""
        settings = settings_of(sampling_params)
        if settings is None:
            return
        _check(settings)
        wanted = {"temperature": 0.0 if settings.greedy else 1.0, **_NEUTRAL}
        for name, value in wanted.items():
            if (got := getattr(sampling_params, name)) != value:
                fail("Steps", name, f"be {value:g} in SamplingParams", got, f"Put what is wished into {KEY}. {_SERVED}")
        if sampling_params.top_k > 0:
            fail("Steps", "top_k", "be 0 in SamplingParams", sampling_params.top_k, _SERVED)

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        model = vllm_config.model_config
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            model.tokenizer, revision=model.tokenizer_revision, trust_remote_code=model.trust_remote_code
        )
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._pad = 0 if pad is None else pad
        self._steps = lru_cache(_KEPT)(lambda settings: settings.steps(tokenizer))
        self._texts: dict[int, _Text] = {}

    def is_argmax_invariant(self) -> bool:
        """False: a refiner may change which token is likeliest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests to their rows."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._texts.pop(row, None)
        for row, params, prompt, output in batch_update.added:
            self._texts.pop(row, None)
            settings = settings_of(params)
            if settings is not None and self._steps(settings):
                self._texts[row] = _Text(settings, prompt or [], output)
        for here, there, how in batch_update.moved:
            moved, met = self._texts.pop(here, None), self._texts.pop(there, None)
            if moved is not None:
                self._texts[there] = moved
            if met is not None and how is MoveDirectionality.SWAP:
                self._texts[here] = met

    def apply(self, logits: Tensor) -> Tensor:
        """Logits [B, V] with log-probabilities in the rows that have settings."""
        alike: dict[Settings, list[int]] = {}
        for row in sorted(self._texts):
            alike.setdefault(self._texts[row].settings, []).append(row)
        for settings, rows in alike.items():
            ids = self._padded([self._texts[row].so_far() for row in rows]).to(logits.device, non_blocking=True)
            every = len(rows) == len(logits)
            scores = logits if every else logits[rows]
            for step in self._steps(settings):
                scores = step(ids, scores)
            if every:
                return scores
            logits[rows] = scores
        return logits

    def _padded(self, texts: Sequence[np.ndarray]) -> Tensor:
        """[B, T], with padding on the left."""
        width = max(1, *map(len, texts))
        ids = np.full((len(texts), width), self._pad, np.int64)
        for row, text in zip(ids, texts, strict=True):
            row[width - len(text) :] = text
        return torch.from_numpy(ids)


class _Text:
    """A request's tokens. output: vLLM's own list, which grows."""

    def __init__(self, settings: Settings, prompt: Sequence[int], output: Sequence[int]) -> None:
        self.settings, self._output = settings, output
        self._ids = np.array(prompt, np.int64)
        self._size, self._read = len(prompt), 0

    def so_far(self) -> np.ndarray:
        """All of them [T], of which only the new ones are read."""
        new = self._output[self._read :]
        end = self._size + len(new)
        if end > len(self._ids):
            self._ids = np.concatenate([self._ids, np.empty(end, np.int64)])
        self._ids[self._size : end] = new
        self._size, self._read = end, self._read + len(new)
        return self._ids[:end]
