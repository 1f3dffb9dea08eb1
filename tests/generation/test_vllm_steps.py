"""Our steps behind vLLM's interface: requests that come, go and change places have the scores that they have alone."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from target_texts import WORDS, documents
from tiny_models import far, word_tokenizer
from vllm_installed import vllm  # noqa: F401 - a fixture

from dft_kernels.generation.sampling import roll_out
from dft_kernels.generation.settings import Settings
from dft_kernels.targets import corpus, target_file

NAME = "dft_kernels.generation.vllm_steps"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, and targets of it and of another."""
    at, words = tmp_path_factory.mktemp("model"), word_tokenizer(WORDS)
    words.save_pretrained(at)
    target_file.save(corpus.build(documents(60), words, name="here"), at / "here.safetensors")
    target_file.save(corpus.build(documents(60, 1), words, name="base"), at / "base.safetensors")
    target_file.save(corpus.build(documents(60), word_tokenizer(WORDS[::-1]), name="there"), at / "there.safetensors")
    return at


@pytest.fixture
def module(vllm: Any) -> Iterator[Any]:  # noqa: F811
    yield importlib.import_module(NAME)
    del sys.modules[NAME]  # whose base is the stand-in's


@pytest.fixture
def steps(module: Any, folder: Path) -> Any:
    model = SimpleNamespace(tokenizer=str(folder), tokenizer_revision=None, trust_remote_code=False)
    return module.Steps(SimpleNamespace(model_config=model), torch.device("cpu"), False)


class Requests:
    """vLLM's batch in small: a row a request, the likeliest token drawn of each."""

    def __init__(self, module: Any, steps: Any, model: Any) -> None:
        self.module, self.steps, self.model = module, steps, model
        self.rows: list[tuple[Any, list[int], list[int]]] = []
        self.update: dict[str, list[Any]] = {"removed": [], "added": [], "moved": []}

    def add(self, settings: Settings | None, prompt: list[int]) -> list[int]:
        how = self.module.SamplingParams(temperature=0.0)
        if settings is not None:
            how = self.module.sampling_params(settings)
            how.extra_args = json.loads(json.dumps(how.extra_args))  # as between processes
        self.steps.validate_params(how)
        output: list[int] = []
        self.rows.append((how, prompt, output))
        self.update["added"].append((len(self.rows) - 1, *self.rows[-1]))
        return output

    def remove(self, row: int) -> None:
        """The last row takes its place."""
        self.update["removed"].append(row)
        last = len(self.rows) - 1
        if row != last:
            self.update["moved"].append((last, row, self.module.MoveDirectionality.UNIDIRECTIONAL))
        self.rows[row] = self.rows[last]
        self.rows.pop()

    def swap(self, a: int, b: int) -> None:
        self.update["moved"].append((a, b, self.module.MoveDirectionality.SWAP))
        self.rows[a], self.rows[b] = self.rows[b], self.rows[a]

    @torch.no_grad()
    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores before and after."""
        changed = any(self.update.values())
        self.steps.update_state(self.module.BatchUpdate(len(self.rows), **self.update) if changed else None)
        self.update = {"removed": [], "added": [], "moved": []}
        ids = [torch.tensor([[*prompt, *output]]) for _, prompt, output in self.rows]
        before = torch.cat([self.model(input_ids=one).logits[:, -1] for one in ids])
        after = self.steps.apply(before.clone())
        for (_, _, output), token in zip(self.rows, after.argmax(-1).tolist(), strict=True):
            output.append(token)
        return before, after


def test_texts_are_those_of_transformers(module: Any, steps: Any, folder: Path) -> None:
    """Greedy, since draws are each engine's own: requests of several settings, while others come and go."""
    model = far()
    here, base = (str(folder / f"{name}.safetensors") for name in ("here", "base"))
    refined = Settings(temperature=0.0, refine=here, bound=0.5)
    styled = Settings(temperature=0.0, style=(here, 2.0), style_base=base)
    batch = Requests(module, steps, model)
    prompts = [[3, 20, 21], [3, 30], [3, 40, 41, 42, 12], [3, 50], [22, 12]]
    which = [refined, None, refined, styled, Settings(temperature=0.0)]
    outputs = [batch.add(one, prompt) for one, prompt in zip(which[:4], prompts[:4], strict=True)]
    for at in range(12):
        if at == 4:
            batch.swap(0, 3)
        if at == 6:
            batch.remove(1)  # the last row, the first text, takes its place
        if at == 7:
            outputs.append(batch.add(which[4], prompts[4]))
        batch.step()
    assert [len(one) for one in outputs] == [12, 6, 12, 12, 5]
    for settings, prompt, output in zip(which, prompts, outputs, strict=True):
        own = [] if settings is None else settings.steps(word_tokenizer(WORDS))
        drawn = roll_out(model, [prompt], len(output), None, do_sample=False, temperature=None, top_p=None, top_k=None,
                         logits_processor=own)  # fmt: skip
        assert drawn.input_ids[0, len(prompt) :].tolist() == output
    plain = [roll_out(model, [prompts[0]], 12, None, do_sample=False, temperature=None, top_p=None, top_k=None)]
    assert plain[0].input_ids[0, 3:].tolist() != outputs[0]  # the refiner did something


def test_rows_without_settings_are_left_bit_for_bit(module: Any, steps: Any) -> None:
    batch = Requests(module, steps, far())
    for one in (Settings(diversity=0.2), None, Settings(), Settings(diversity=0.2)):
        batch.add(one, [3, 20])
    before, after = batch.step()
    assert torch.equal(before[1:3], after[1:3])
    assert not torch.equal(before[[0, 3]], after[[0, 3]])
    assert torch.equal(after[0], after[3])


def test_diversity_reaches_its_entropy(module: Any, steps: Any) -> None:
    batch = Requests(module, steps, far())
    for at in range(8):
        batch.add(Settings(diversity=(-0.2, -0.1)[at % 2]), [3, 20 + at])
    before, after = (torch.special.entr(scores.softmax(-1)).sum(-1) for scores in batch.step())
    asked = before * torch.tensor([0.8, 0.9] * 4)
    assert torch.allclose(after, asked, atol=1e-3)


def test_a_step_reads_the_text_so_far_padded_on_the_left(
    module: Any, steps: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[list[int]]] = []

    def reading(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(ids.tolist())
        return scores

    monkeypatch.setattr(Settings, "steps", lambda self, tokenizer: [reading] if self.diversity else [])
    batch = Requests(module, steps, far())
    first, second = batch.add(Settings(diversity=0.1), [3, 20, 21]), batch.add(Settings(diversity=0.1), [4])
    for _ in range(70):  # beyond what is set aside at first
        batch.step()
    assert seen[0] == [[3, 20, 21], [0, 0, 4]]
    assert seen[69] == [[3, 20, 21, *first[:69]], [0, 0, 4, *second[:69]]]
    of_embeddings = (0, batch.rows[0][0], None, [])
    steps.update_state(module.BatchUpdate(1, removed=[1], added=[of_embeddings]))
    steps.apply(torch.zeros(1, 100))
    assert seen[70] == [[0]]


def test_wrong_requests_are_refused(module: Any, folder: Path) -> None:
    def params(given: Any, **more: Any) -> Any:
        return module.SamplingParams(extra_args={"dft_kernels": given}, **more)

    module.Steps.validate_params(module.SamplingParams(temperature=0.3, extra_args={"other": 1}))
    module.Steps.validate_params(params('{"diversity": 0.1}'))
    assert module.settings_of(params('{"diversity": 0.1}')) == Settings(diversity=0.1)
    module.Steps.validate_params(params({"style": [str(folder / "here.safetensors"), 1], "top_n_sigma": None}))
    for wrong, said in (
        (params([]), r"Steps: dft_kernels must be an object of settings, got \[\]"),
        (params('{"diversity": 0.1'), r"Steps: dft_kernels must be JSON where it is text, got "),
        (params("0.1"), r"Steps: dft_kernels must be an object of settings, got 0\.1"),
        (params({"diverse": 1}), r"Steps: dft_kernels must hold settings of temperature, .*, got 'diverse'"),
        (params({"beams": 2}), r"must hold settings of .*, got 'beams'"),
        (params({"diversity": "much"}), r"Steps: diversity must be a finite number, got 'much'"),
        (params({"diversity": None}), r"Steps: diversity must be a finite number, got None"),
        (params({"temperature": math.nan}), r"Steps: temperature must be a finite number, got nan"),
        (params({"top_p": True}), r"Steps: top_p must be a finite number, got True"),
        (params({"refine": 3}), r"Steps: refine must name a target, got 3"),
        (params({"style": ["literary"]}), r"Steps: style must be a target's name and a finite number"),
        (params({"refine": "nothing"}), r"nothing"),
        (
            params({"refine": str(folder / "here.safetensors"), "towards": "tokens"}),
            r"Steps: towards must be a list of",
        ),
        (
            params({"refine": str(folder / "here.safetensors"), "towards": ["ngrams"]}),
            r"native must be there for ngrams",
        ),
        (
            params({"refine": str(folder / "here.safetensors"), "bound": -1}),
            r"Steps: bound must be at least 0 nats",
        ),
        (params({"diversity": -2.0}), r"Diversity: d must be at least -1, got -2"),
        (params({"diversity": 0.1, "entropy_temperature": 0.1}), r"hold one step of entropy"),
        (
            params({"diversity": 0.1}, temperature=0.7),
            r"Steps: temperature must be 1 in SamplingParams, got 0.7\. Put what",
        ),
        (params({"temperature": 0}), r"Steps: temperature must be 0 in SamplingParams, got 1"),
        (params({"diversity": 0.1}, top_k=5), r"Steps: top_k must be 0 in SamplingParams, got 5"),
        (params({"diversity": 0.1}, repetition_penalty=1.1), r"Steps: repetition_penalty must be 1 in SamplingParams"),
    ):
        with pytest.raises(ValueError, match=said):
            module.Steps.validate_params(wrong)


def test_a_target_of_another_tokenizer_is_found_in_the_engine(module: Any, steps: Any, folder: Path) -> None:
    how = module.sampling_params(Settings(refine=str(folder / "there.safetensors")))
    steps.validate_params(how)
    with pytest.raises(ValueError, match="tokenizer"):
        steps.update_state(module.BatchUpdate(1, removed=[1], added=[(0, how, [3], [])]))
