"""Text of a model's own, drawn by vLLM: what is saved whole, many texts at a time.

vLLM is a program of its own beside this one: it reads the model from where it was loaded from, in the dtype it was
loaded in, and draws token ids from token ids. What it lacks is refused before anything is drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NoReturn

import numpy as np
import torch

from ..errors import fail
from ..models.heads import CORRECTION, in_mode, output_layer
from .engine import Engine, Written
from .sampling import Sampling, ends_of, own_settings, without_end
from .settings import Settings

COLDEST, HOTTEST = 0.01, 2.0  # temperatures but 0 that vLLM takes
_TAKEN = {"eos_token_id", "repetition_penalty", "use_cache"}
_ELSE = "Draw by transformers"
_COMPARED = 16  # tokens whose log-probabilities vLLM and the model are asked for


def check(adapters: Mapping[str, str | None], sampling: Sampling, settings: Settings) -> None:
    """ValueError where vLLM is not installed, or has not the way of sampling, the steps or one of the models: adapters,
    by name, their files' names. Before a model is loaded."""
    if find_spec("vllm") is None:
        remedy = "Install it in an environment of its own (docs/evaluation.md), or leave --engine out"
        fail("vllm", "engine", "be installed", "vllm, of which there is no package", remedy)
    for name, adapter in adapters.items():
        if adapter is not None:
            _adapted(f"{name}, with {adapter}")
    if settings.stepped:
        fail("vllm", "engine", "be transformers beside steps", VllmEngine.name, "Leave --engine out, or the steps")
    cold = sampling.temperature
    if cold and not COLDEST <= cold <= HOTTEST:
        fail("vllm", "temperature", f"be 0, or in [{COLDEST}, {HOTTEST:g}]", cold, _ELSE)


def _adapted(got: str) -> NoReturn:
    fail("vllm", "model", "be saved whole", got, "Merge it and save that, or draw by transformers")


class VllmEngine(Engine):
    """vLLM's `LLM`, as `Engine` has it. Its own draws: not those of transformers by the same seed.

    model, tokenizer: of transformers, from a folder or name that vLLM reads too. `start` compares the log-probabilities
        of both: a model that was changed since it was loaded is not taken for the one that is saved.
    Each text has a seed of its own, which the batch's seed gives; draws depend on nothing else but rounding.

    Errors: ValueError for a model that is no folder's or name's, is adapted, of another dtype than fp32, fp16 or bf16,
        whose generation_config sets what vLLM has not, or that vLLM computes otherwise. RuntimeError where it does not
        start.
    Cost: `start` takes a minute or so, and memory for the weights again and for keys and values of a batch's texts.
    """

    name = "vllm"

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(model, tokenizer)
        self._llm: Any = None
        self._room = (0, 0)  # tokens, texts at a time
        if hasattr(model, "peft_config"):
            _adapted("an adapter of PEFT")
        if hasattr(output_layer(model), CORRECTION):
            fail("vllm", "model", "have a plain head", "a CorrectionHead", _ELSE)
        if not model.name_or_path:
            fail("vllm", "model", "be of a folder or a name", "one in memory alone", "Save it and load it")
        if model.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            fail("vllm", "model", "be of fp32, fp16 or bf16", model.dtype, _ELSE)

    @property
    def device(self) -> str:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"

    @property
    def versions(self) -> dict[str, str]:
        return {**super().versions, self.name: version("vllm")}

    def check(self, sampling: Sampling, settings: Settings) -> None:
        check({}, sampling, settings)
        for name, value in own_settings(self.model, greedy=sampling.temperature == 0).items():
            if value and name not in _TAKEN:
                fail("vllm", "generation_config", "set nothing that vLLM has not", f"{name} {value}", _ELSE)

    def start(self, tokens: int, batch: int) -> None:
        if self._llm is not None and tokens <= self._room[0] and batch <= self._room[1]:
            return
        self.close()
        # read when vLLM is imported: it prints a page of lines to stdout, and sends what it is used for to its authors
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        import vllm

        try:
            self._llm = vllm.LLM(
                self.model.name_or_path,
                skip_tokenizer_init=True,
                dtype=str(self.model.dtype).removeprefix("torch."),
                max_model_len=max(tokens, _COMPARED + 1),
                kv_cache_memory_bytes=_cache_bytes(self.model, tokens, batch),
                gpu_memory_utilization=0.01,  # a check at the start alone, where the cache's bytes are given
                enable_prefix_caching=False,  # draws would depend on what was drawn before, by rounding
                use_tqdm_on_load=False,
                enforce_eager=not torch.cuda.is_available(),  # compiling takes longer than an evaluation's texts
            )
        except Exception as error:  # of vLLM's parts, or of a process of its own
            why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise RuntimeError(
                f"vllm: model must be one that vLLM starts with, got {self.model.name_or_path}: {why}. {_ELSE}."
            ) from error
        self._room = tokens, batch
        self._compare()

    @torch.no_grad()
    def _compare(self) -> None:
        """ValueError where vLLM's log-probabilities of some tokens are not the model's."""
        import vllm

        ids = [(37 * at + 100) % self.model.config.get_text_config().vocab_size for at in range(_COMPARED)]
        how = vllm.SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        (made,) = self._llm.generate([{"prompt_token_ids": ids}], how, use_tqdm=False)
        theirs = [one[token].logprob for one, token in zip(made.prompt_logprobs[1:], ids[1:], strict=True)]
        with in_mode(self.model, False):
            given = torch.tensor([ids], device=output_layer(self.model).weight.device)
            logits = self.model(input_ids=given).logits[0, :-1].float()
        ours = logits.log_softmax(-1).gather(1, given[0, 1:, None])[:, 0].cpu()
        apart = float((ours - torch.tensor(theirs)).abs().mean())
        if not apart <= (0.01 if self.model.dtype == torch.float32 else 0.25):  # bf16 logits are steps of 0.125
            self.close()
            got = f"log-probabilities {apart:.2g} nats apart"
            fail(
                "vllm",
                "model",
                f"be as it is saved in {self.model.name_or_path}",
                got,
                "Save it and load it, or draw by transformers",
            )

    def draw(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, settings: Settings, seed: int
    ) -> list[Written]:
        import vllm

        at, own = ends_of(self.model, self.tokenizer), own_settings(self.model)
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts))
        how = [
            vllm.SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                min_p=sampling.min_p,
                repetition_penalty=own.get("repetition_penalty") or 1.0,
                seed=int(one),
                max_tokens=sampling.length,
                stop_token_ids=at,
                ignore_eos=True,  # but for those
                detokenize=False,
            )
            for one in seeds
        ]
        made = self._llm.generate([{"prompt_token_ids": list(one)} for one in prompts], how, use_tqdm=False)
        return [Written(ids) for ids in without_end([one.outputs[0].token_ids for one in made], at)]

    def close(self) -> None:
        """End vLLM's processes, and with them its memory."""
        if self._llm is not None:
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None


def _cache_bytes(model: Any, tokens: int, batch: int) -> int:
    """Keys and values of so many texts, in every layer: enough for any attention. Blocks of tokens are 256 at most."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    return per_token * (tokens + 256) * batch
