"""How text is drawn, as one value: the steps that it stands for, and the command line that says it."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from target_texts import WORDS, documents
from tiny_models import far, word_tokenizer

from dft_kernels.commands.flags import settings_of
from dft_kernels.commands.sample import parser
from dft_kernels.generation.settings import Settings, recorded
from dft_kernels.generation.stream import Stream
from dft_kernels.targets import corpus, target_file


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer(WORDS)


@pytest.fixture(scope="module")
def target(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    made = corpus.build(documents(60), tokenizer, name="made", tokenizer_name="tiny")
    return str(target_file.save(made, tmp_path_factory.mktemp("targets") / "made=1.safetensors"))


def all_of(target: str) -> Settings:
    return Settings(
        temperature=0.8, top_p=0.9, min_p=0.01, top_n_sigma=2.0, diversity=-0.1, style=(target, -1e-05),
        style_base=target, refine=target, bound=0.3, native=target,
        towards=("sentences", "tokens", "ngrams"),
    )  # fmt: skip


def test_the_defaults_are_no_step(tokenizer: Any) -> None:
    assert Settings().steps(tokenizer) == []
    assert Settings(temperature=0.0).steps(tokenizer) == []
    assert Settings(beams=4).steps(tokenizer) == []
    assert Settings().flags() == []
    assert Settings(diversity=0.1, top_p=0.9).plain == Settings()
    assert Settings(top_p=0.9, beams=4).plain == Settings(beams=4)


def test_the_steps_stand_in_order(tokenizer: Any, target: str) -> None:
    names = [type(step).__name__ for step in all_of(target).steps(tokenizer)]
    assert names == [
        "StyleShift", "TemperatureLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TopNSigma", "Diversity",
        "IterativeRefiner",
    ]  # fmt: skip
    (cold,) = Settings(entropy_temperature=0.5).steps(tokenizer)
    assert cold.theta == 0.5
    refiner = all_of(target).steps(tokenizer)[-1]
    assert (refiner.bound, refiner.native.about.name) == (0.3, "made")
    assert refiner._words is not None


def test_special_tokens_are_not_shifted(tokenizer: Any, target: str, tmp_path: Path) -> None:
    other = corpus.build(documents(60, 1), tokenizer, name="other", tokenizer_name="tiny")
    base = str(target_file.save(other, tmp_path / "other.safetensors"))
    (step,) = Settings(style=(target, 2.0), style_base=base).steps(tokenizer)
    moved = step(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, len(WORDS)))[0]
    assert float(moved.max() - moved.min()) > 0.1
    assert {float(moved[one]) for one in tokenizer.all_special_ids} == {float(moved[0])}


@pytest.mark.parametrize("prompt", ["The cat", "--it", "a 'b' \"c\"\nd $e"])
def test_a_command_line_says_it(target: str, prompt: str) -> None:
    for settings in (Settings(), all_of(target), Settings(beams=3), Settings(temperature=0.0, entropy_temperature=0.5)):
        line = settings.command_line("a model", prompt, length=9, seed=4)
        words = shlex.split(line)
        assert words[:2] == ["dft-kernels", "sample"]
        options = parser().parse_args(words[2:])
        assert (options.model, options.prompt, options.length, options.seed) == ("a model", [prompt], 9, 4)
        assert settings_of(options) == settings


def test_what_does_not_go_together(tokenizer: Any, target: str) -> None:
    for given, said in (
        ({"native": target}, "native must come with refine, got none"),
        ({"style_base": target}, "style_base must come with style, got none"),
        ({"towards": ("tokens",)}, "towards must come with refine, got none"),
        ({"towards": ("words",), "refine": target}, "towards must hold statistics of .*, got words"),
        ({"towards": (), "refine": target}, "towards must hold statistics of .*, got none"),
        ({"towards": ("ngrams",), "refine": target}, "native must be there for ngrams, got none"),
    ):
        with pytest.raises(ValueError, match=said):
            Settings(**given)
    for given, said in (
        ({"temperature": 1e-3}, "temperature must be 0 or at least 0.01, got 0.001"),
        ({"diversity": 0.1, "entropy_temperature": 0.5}, "hold one step of entropy"),
        ({"diversity": 0.1, "temperature": 0.0}, "hold no temperature with the likeliest token"),
        ({"diversity": 0.1, "beams": 2}, "hold no temperature with beams"),
        ({"temperature": 0.5, "beams": 2}, "hold no temperature with beams"),
        ({"refine": "literary"}, "Settings: refine: .*literary.*tokenizer_sha256 must be"),
        ({"style": (target, 1.0)}, "Settings: style_base: .*reference.*tokenizer_sha256 must be"),
    ):
        with pytest.raises(ValueError, match=said):
            Settings(**given).steps(tokenizer)
    assert len(Settings(refine=target, beams=2, top_p=0.9).steps(tokenizer)) == 2


def test_a_record_is_of_the_text_as_it_is_now(tokenizer: Any) -> None:
    settings = Settings(top_p=0.9)
    with Stream(far(), tokenizer, [[5, 6], [7]], 6, 3, settings.steps(tokenizer)) as stream:
        assert recorded("m", "p", settings, stream, 1).entropy is None
        next(stream)
        next(stream)
        found = recorded("m", "p", settings, stream, 1)
    drawn = stream.drawn[1]
    assert (found.tokens, found.text.strip()) == (2, tokenizer.decode([one.token for one in drawn]))
    assert found.kl == pytest.approx(sum(one.kl for one in drawn) / 2)
    assert json.loads(json.dumps(asdict(found)))["settings"]["top_p"] == 0.9
