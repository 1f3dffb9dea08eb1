"""Texts by vLLM, which a stand-in plays: what it is asked for, what comes of it, and what it is not asked."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tiny_models import far, tokenizer  # noqa: F401 - a fixture
from vllm_installed import vllm  # noqa: F401 - a fixture

from dft_kernels.generation import vllm_engine
from dft_kernels.generation.engine import Engine
from dft_kernels.generation.samples import Samples, draw, read
from dft_kernels.generation.sampling import Sampling
from dft_kernels.generation.settings import Settings
from dft_kernels.generation.vllm_engine import VllmEngine
from dft_kernels.models.correction import add_correction

PROMPTS = ["word1 word2 word3", "word4", "word5 word6", "word7", "word8 word9"]
SAMPLING = Sampling(temperature=0.7, top_p=0.9, min_p=0.05, count=5, length=6, seed=3)


@pytest.fixture
def model(tmp_path: Path) -> Any:
    far().save_pretrained(tmp_path / "saved")
    return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")


@pytest.fixture
def drawing(model: Any, tokenizer: Any, vllm: Any) -> Any:  # noqa: F811
    def run(file: Path, engine: Any = VllmEngine, sampling: Sampling = SAMPLING, **more: Any) -> Samples:
        made = engine(model, tokenizer)
        try:
            return draw(made, PROMPTS, sampling, file, **{"model_name": "tiny", "batch": 2, **more})
        finally:
            made.close()

    return run


def test_what_it_is_asked_for(drawing: Any, model: Any, tokenizer: Any, vllm: Any, tmp_path: Path) -> None:  # noqa: F811
    model.generation_config.eos_token_id = [2, 9]
    model.generation_config.repetition_penalty = 1.2
    found = drawing(tmp_path / "samples.jsonl")
    (started,) = vllm.STARTED
    assert started["model"] == str(tmp_path / "saved")
    assert started["dtype"] == "float32"
    assert started["max_model_len"] == 17  # of the comparison, more than 3 + 6
    assert started["kv_cache_memory_bytes"] >= 2 * 2 * 9 * model.config.num_hidden_layers * model.config.hidden_size
    assert not vllm.RUNNING
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert [prompts for prompts, _ in vllm.ASKED] == [ids[:2], ids[2:4], ids[4:]]
    seeds = [int(one) for batch in (3, 4, 5) for one in np.random.SeedSequence(batch).generate_state(2)][:5]
    each = [how for _, those in vllm.ASKED for how in those]
    assert [how.seed for how in each] == seeds
    assert len(set(seeds)) == 5
    for how in each:
        assert (how.temperature, how.top_p, how.min_p, how.max_tokens) == (0.7, 0.9, 0.05, 6)
        assert (how.stop_token_ids, how.ignore_eos, how.detokenize) == ([2, 9], True, False)
        assert how.repetition_penalty == 1.2
    ended = [seed % 3 == 0 for seed in seeds]
    assert any(ended)
    assert not all(ended)
    for prompt, seed, text, short in zip(ids, seeds, found.texts, ended, strict=True):
        whole = [4 + (seed + sum(prompt) + 7 * at) % 90 for at in range(6)]
        assert text.split() == tokenizer.decode(whole[:2] if short else whole).split()
    assert found.tokens == sum(2 if short else 6 for short in ended)
    assert found.header.engine == "vllm"
    assert found.header.versions == {**Engine(model, tokenizer).versions, "vllm": "0.0.0"}


def test_the_likeliest_tokens_are_asked_for_by_temperature_0(drawing: Any, vllm: Any, tmp_path: Path) -> None:  # noqa: F811
    drawing(tmp_path / "samples.jsonl", sampling=Sampling(temperature=0.0, count=5, length=6))
    assert {(how.temperature, how.top_p, how.min_p) for _, those in vllm.ASKED for how in those} == {(0.0, 1.0, 0.0)}


def test_a_killed_run_goes_on_and_a_finished_one_starts_nothing(drawing: Any, vllm: Any, tmp_path: Path) -> None:  # noqa: F811
    whole, file = tmp_path / "whole.jsonl", tmp_path / "samples.jsonl"
    first = drawing(whole)
    file.write_text("".join(whole.read_text().splitlines(True)[:4])[:-9])  # within the second batch
    vllm.ASKED.clear()
    assert drawing(file).texts == first.texts
    assert [len(prompts) for prompts, _ in vllm.ASKED] == [2, 1]
    vllm.STARTED.clear()
    assert drawing(file).texts == first.texts == read(file).texts
    assert not vllm.STARTED


def test_an_engine_does_not_go_on_with_another_ones_file(drawing: Any, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.jsonl", tmp_path / "theirs.jsonl"
    drawing(ours, Engine)
    drawing(theirs)
    for file, engine, said in (
        (ours, VllmEngine, 'engine must be "transformers", as in the file, got "vllm"'),
        (theirs, Engine, 'engine must be "vllm", as in the file, got "transformers"'),
    ):
        kept = file.read_bytes()
        with pytest.raises(ValueError, match=rf"draw: .*: {said}\. Name another folder, or delete the file"):
            drawing(file, engine)
        assert file.read_bytes() == kept
    header, rest = ours.read_text().split("\n", 1)
    old = json.loads(header)
    del old["engine"]  # from before there were engines
    ours.write_text(json.dumps(old) + "\n" + rest)
    assert read(ours).header.engine == "transformers"
    assert drawing(ours, Engine).texts == read(ours).texts


def test_it_starts_again_for_longer_texts_alone(model: Any, tokenizer: Any, vllm: Any) -> None:  # noqa: F811
    engine = VllmEngine(model, tokenizer)
    for tokens, batch, starts in ((20, 4, 1), (12, 4, 1), (20, 3, 1), (21, 4, 2), (21, 5, 3)):
        engine.start(tokens, batch)
        assert len(vllm.STARTED) == starts
        assert len(vllm.RUNNING) == 1
    engine.close()
    engine.close()
    assert not vllm.RUNNING
    with pytest.raises(RuntimeError, match=r"vllm: model must be one that vLLM starts with, got .*: 60 tokens are none "
                                           r"of mine\. Draw by transformers\."):  # fmt: skip
        engine.start(60, 1)


def test_what_it_has_not_is_refused_before_a_file_is_begun(drawing: Any, model: Any, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    for temperature in (0.001, 2.1):
        with pytest.raises(ValueError, match=rf"vllm: temperature must be 0, or in \[0.01, 2\], got {temperature}\."):
            drawing(file, sampling=replace(SAMPLING, temperature=temperature))
    model.generation_config.no_repeat_ngram_size = 3
    with pytest.raises(ValueError, match=r"generation_config must set nothing .*, got no_repeat_ngram_size 3\. Draw"):
        drawing(file)
    assert not file.exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft's, which asks transformers' models by an old name
def test_models_that_it_cannot_read(model: Any, tokenizer: Any, tmp_path: Path) -> None:  # noqa: F811
    import peft

    def refused(one: Any, said: str) -> None:
        with pytest.raises(ValueError, match=rf"vllm: model must {said}"):
            VllmEngine(one, tokenizer)

    refused(far(), r"be of a folder or a name, got one in memory alone\. Save it and load it\.")
    refused(model.double(), r"be of fp32, fp16 or bf16, got torch.float64\. Draw by transformers\.")
    model.float()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    refused(adapted, r"be saved whole, got an adapter of PEFT\. Merge it and save that, or draw by transformers\.")
    corrected = adapted.unload()
    add_correction(corrected, 2)
    refused(corrected, r"have a plain head, got a CorrectionHead\. Draw by transformers\.")


def test_weights_that_are_not_saved_are_not_taken_for_those_that_are(
    model: Any,
    tokenizer: Any,  # noqa: F811
    vllm: Any,  # noqa: F811
) -> None:
    model.train()
    VllmEngine(model, tokenizer).start(20, 2)
    assert model.training
    with torch.no_grad():
        model.lm_head.weight *= 1.05
    with pytest.raises(
        ValueError,
        match=r"vllm: model must be as it is saved in .*, got log-probabilities \d.* nats apart\. Save it and",
    ):
        VllmEngine(model, tokenizer).start(20, 2)
    assert len(vllm.RUNNING) == 1


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"vllm: engine must be installed, got vllm, .*\. Install it in an "):
        vllm_engine.check({}, SAMPLING, Settings())


def test_the_dtype_is_the_models(model: Any, tokenizer: Any, vllm: Any) -> None:  # noqa: F811
    VllmEngine(model.to(torch.bfloat16), tokenizer).start(20, 2)
    assert vllm.STARTED[0]["dtype"] == "bfloat16"
