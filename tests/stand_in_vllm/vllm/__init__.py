"""In vLLM's place: keeps what it is asked for, and gives tokens that follow from each request's own seed and prompt."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

STARTED: list[dict[str, Any]] = []
ASKED: list[tuple[list[list[int]], list[SimpleNamespace]]] = []
RUNNING: list[LLM] = []


class SamplingParams(SimpleNamespace):
    def __init__(self, **given: Any) -> None:
        plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "extra_args": None}
        penalties = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        super().__init__(**{**plain, **penalties, **given})


class LLM:
    def __init__(self, model: str, **given: Any) -> None:
        if given["max_model_len"] == 60:
            raise ValueError("60 tokens are none of mine\nand a second line")
        STARTED.append({"model": model, **given})
        RUNNING.append(self)
        self.longest, self.model = given["max_model_len"], AutoModelForCausalLM.from_pretrained(model)
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: RUNNING.remove(self)))

    def generate(self, prompts: list[dict[str, Any]], how: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        assert self in RUNNING
        assert not use_tqdm
        ids = [one["prompt_token_ids"] for one in prompts]
        if isinstance(how, SamplingParams):
            return [self._read(*ids)]
        ASKED.append((ids, how))
        return [self._drawn(*one) for one in zip(ids, how, strict=True)]

    @torch.no_grad()
    def _read(self, ids: list[int]) -> Any:
        assert len(ids) < self.longest
        found = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        each = [{token: SimpleNamespace(logprob=float(found[at, token]))} for at, token in enumerate(ids[1:])]
        return SimpleNamespace(prompt_logprobs=[None, *each])

    def _drawn(self, prompt: list[int], how: SamplingParams) -> Any:
        assert len(prompt) + how.max_tokens <= self.longest
        tokens = [4 + (how.seed + sum(prompt) + 7 * at) % 90 for at in range(how.max_tokens)]
        if how.seed % 3 == 0:
            tokens[2:] = how.stop_token_ids[:1]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(tokens))])
